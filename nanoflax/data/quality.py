"""Which documents of a corpus are worth their tokens: settings, and the steps that see one document at a time."""

import dataclasses
import functools
import importlib.util
from typing import Any

from nanoflax.data.report import DataReport
from nanoflax.errors import UserError

LANGUAGE_CHARS = 1000  # enough to name the language of a document; longer texts cost time


@dataclasses.dataclass(frozen=True)
class Quality:
    """Steps that leave documents out. The default leaves none out.

    min_chars, max_chars: lengths of a document; 0 for no limit. languages: ISO 639 codes, separated by commas.
    dedup: exact, or minhash:THRESHOLD for near-duplicates too. See `duplicates.Seen`.
    decontaminate: a number of words. A document that shares so many words in a row with evaluation text is left out;
      0 for none. evaluation: sources of evaluation text, separated by ";", beside the validation split of the corpus.

    Lengths and languages also choose the validation documents if they are a part of the training data. The other steps
    leave the validation documents as they are, so that losses can be compared. In a mixture each source is compared
    with its own documents and its own validation split.
    """

    min_chars: int = 0
    max_chars: int = 0
    languages: str = ""
    dedup: str = ""
    decontaminate: int = 0
    evaluation: str = ""

    def __post_init__(self) -> None:
        if self.max_chars and self.max_chars < self.min_chars:
            raise UserError(f"data.max_chars={self.max_chars} is less than data.min_chars={self.min_chars}")
        if self.evaluation and not self.decontaminate:
            raise UserError(f"data.evaluation={self.evaluation} is not used; set data.decontaminate=13 too")
        if self.threshold and not importlib.util.find_spec("rensa"):
            raise UserError(f'data.dedup={self.dedup} needs a package; run: pip install "nanoflax[quality]"')
        unknown = set(self.codes) - set(_identifier().labels if self.languages else ())
        if unknown or (self.languages and not self.codes):
            raise UserError(
                f"data.languages={self.languages}: {', '.join(sorted(unknown)) or 'no code'} is not known; choose from "
                f"{','.join(_identifier().labels)}"
            )

    @property
    def codes(self) -> list[str]:
        return [code for code in self.languages.lower().replace(" ", "").split(",") if code]

    @property
    def threshold(self) -> float | None:
        """The similarity from which documents are near-duplicates; None without that step."""
        kind, _, number = self.dedup.partition(":")
        try:
            if self.dedup in ("", "exact"):
                return None
            if kind == "minhash" and 0 < float(number) < 1:
                return float(number)
        except ValueError:
            pass
        raise UserError(f"data.dedup={self.dedup!r}: choose exact, or minhash:THRESHOLD as in minhash:0.8; empty: none")

    @property
    def compares(self) -> bool:
        """Whether a step compares documents with other documents, so that the corpus must be read first."""
        return bool(self.dedup or self.decontaminate)

    def keeps(self, text: str, report: DataReport) -> bool:
        """Whether the steps for single documents keep a text. The report counts a text that they leave out."""
        if len(text) < self.min_chars:
            report.add(f"documents shorter than {self.min_chars} characters, left out", excerpt(text))
        elif self.max_chars and len(text) > self.max_chars:
            report.add(f"documents longer than {self.max_chars} characters, left out", excerpt(text))
        elif self.languages and (found := language(text)) not in self.codes:
            report.add(f"documents in other languages than {self.languages}, left out", f"{found}: {excerpt(text)}")
        else:
            return True
        return False


def excerpt(text: str) -> str:
    """The beginning of a text, for a report."""
    return repr(" ".join(text[:200].split())[:40])


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise UserError('data.languages needs a package; run: pip install "nanoflax[quality]"') from error
    return LanguageIdentifier.from_model_file(MODEL_FILE)


def language(text: str) -> str:
    """The ISO 639 code of the likeliest language of a text, by its first 1,000 characters; zxx if it is no language.

    langid.py, Lui and Baldwin (2012), https://aclanthology.org/P12-3005, in the package py3langid.
    """
    return _identifier().classify(text[:LANGUAGE_CHARS])[0]
