"""Tokenizers of Marian's translation models."""

import re
from collections.abc import Iterable

from nanoflax.errors import UserError
from nanoflax.tokenizers import specs
from nanoflax.tokenizers.base import SPACE, Framing, check_ids, well_formed
from nanoflax.tokenizers.file_tokenizer import Files, FileTokenizer, any_of, read_json, without_spaces_before_marks


class MarianTokenizer(FileTokenizer):
    """Marian: a SentencePiece model for each language (source.spm, target.spm), ids from vocab.json.

    Transformers also normalizes punctuation if sacremoses is installed; this class does not.
    """

    unk_id: int

    def __init__(self, files: Files, name: str):
        import sentencepiece

        super().__init__(files, name)
        self._ids = read_json(files, "vocab.json", name)
        specs.check_vocabulary(self._ids, f"tokenizer {name}: vocab.json")
        if self._config.get("separate_vocabs"):
            raise UserError(f"tokenizer {name}: separate_vocabs is not supported")
        self._roles = {"eos": "</s>", "pad": "<pad>", "unk": "<unk>"} | self._roles
        missing = [t for t in self._roles.values() if t not in self._ids]
        if missing:
            raise UserError(f"tokenizer {name}: vocab.json lacks {', '.join(missing)}")
        self._source, self._target = (
            sentencepiece.SentencePieceProcessor(model_proto=files[f"{side}.spm"]) for side in ("source", "target")
        )
        self._pieces = {i: piece for piece, i in self._ids.items()}
        self.vocab_size = 1 + max(self._pieces)
        self._set_ids(self._ids.get)
        self.framing = Framing((), (self.eos_id,), (), self.bos_id, self.eos_id)
        self.special = {t: self._ids[t] for t in self._roles.values()}
        self.cleans_up = bool(self._config.get("clean_up_tokenization_spaces"))
        self._codes = [piece for piece in self._ids if re.fullmatch(r">>.*<<", piece)]
        self._special_pattern = any_of([*self.special, *self._codes])

    def token_ids(self) -> dict[str, int]:
        """{token: id} of the vocabulary."""
        return dict(self._ids)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The ids of a source text. special: read special tokens and language codes in it."""
        text, ids, end = well_formed(text), [], 0
        for match in self._special_pattern.finditer(text) if special else ():
            ids += [*self._encode_part(text[end : match.start()]), self._ids[match[0]]]
            end = match.end()
        return ids + self._encode_part(text[end:])

    def encode_source(self, text: str) -> list[int]:
        """The ids of a source text. At its beginning, a code such as >>fr<< names the language of the target.

        Raises: UserError for a code that is not in the vocabulary, if others are.
        """
        code = re.match(r">>[^\s<>]+<<", text)
        if not code or not self._codes:
            return self.encode(text)
        if code[0] not in self._ids:
            raise UserError(
                f"tokenizer {self.name} has no language code {code[0]}; it has {', '.join(sorted(self._codes))}"
            )
        return [self._ids[code[0]], *self.encode(text[code.end() :])]

    def encode_target(self, text: str) -> list[int]:
        """The ids of a text in the target language."""
        return self._encode_part(well_formed(text), self._target)

    def _encode_part(self, text, model=None):
        pieces = (model or self._source).encode(text, out_type=str)
        return [self._ids.get(piece, self.unk_id) for piece in pieces]

    def encode_with_template(self, text: str, pair: str | None = None, special: bool = False) -> list[int]:
        """The ids of one or two source texts, then the end-of-sequence token that the encoder expects."""
        return self.framing.whole([*self.encode(text, special), *(self.encode(pair, special) if pair else ())])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of target ids; special tokens give none."""
        check_ids(ids, self.vocab_size)
        pieces = [self._pieces.get(int(i), "") for i in ids if i not in self.special.values()]
        text = self._target.decode_pieces(pieces).replace(SPACE, " ").strip()
        return without_spaces_before_marks(text) if self.cleans_up else text
