"""Tokenizers trained here: bytes, and SentencePiece on the corpus."""

import functools
import hashlib
import io
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

from nanoflax.errors import UserError
from nanoflax.tokenizers.base import SPACE, Framing, check_ids, well_formed
from nanoflax.tokenizers.segmentation import SegmentationSampler, sampler_of

CHUNK_CHARACTERS = 1000
MAX_WORD_CHARACTERS = 1000  # longer words make unigram training slow, and its probabilities too small for a float
MAX_TRAINING_CHARACTERS = 200_000_000  # training on them takes minutes and a few gigabytes of memory


class ByteTokenizer:
    """Ids 0-255 are the bytes of the text in UTF-8; four special tokens follow."""

    chat_template: str | None = None
    vocab_size, pad_id, eos_id, mask_id, sep_id = 260, 256, 257, 258, 259
    bos_id = eos_id
    framing = Framing(before=(), after=(eos_id,), start=(bos_id,), bos_id=bos_id, eos_id=eos_id)
    fingerprint = hashlib.blake2b(b"nanoflax bytes 260", digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(well_formed(text).encode())

    encode_source = encode_target = encode

    def decode(self, ids: Iterable[int]) -> str:
        """Special tokens give no text; bytes that are not UTF-8 give U+FFFD."""
        check_ids(ids, self.vocab_size)
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def save(self, directory: str | os.PathLike) -> None:
        _write(directory, {"kind": "bytes", "fingerprint": self.fingerprint})


class SentencePieceTokenizer:
    """A SentencePiece model, given as its serialized bytes.

    Other people's models may normalize the text. Models trained here keep spaces and have a piece for each byte, so
    decoding restores every text exactly. This needs one correction: SentencePiece cannot distinguish U+2581 from a
    space, so this character is encoded as its three bytes.
    """

    chat_template: str | None = None

    def __init__(self, model: bytes, name: str = "model"):
        import sentencepiece

        self.model = model
        self.fingerprint = hashlib.blake2b(model, digest_size=16).hexdigest()
        try:
            self._processor = sp = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size = sp.vocab_size()
            sp.id_to_piece(list(range(self.vocab_size)))  # all are UTF-8
            probe = " a  b\n "
            is_exact = sp.decode(sp.encode(probe)) == probe
        except (RuntimeError, UnicodeDecodeError) as error:
            raise UserError(f"tokenizer {name} is not a SentencePiece model") from error
        self.eos_id = sp.eos_id()
        if self.eos_id < 0:
            raise UserError(f"tokenizer {name} has no end-of-sequence token, which training needs")
        self.bos_id = sp.bos_id() if sp.bos_id() >= 0 else self.eos_id
        self.unk_id = sp.unk_id()
        self.pad_id = sp.pad_id() if sp.pad_id() >= 0 else self.unk_id  # not eos, which ends texts
        self.framing = Framing((), (self.eos_id,), (self.bos_id,), self.bos_id, self.eos_id)
        space = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._space_ids = space if is_exact and all(sp.is_byte(i) for i in space) else None

    def __reduce__(self):  # for worker processes: the processor cannot be pickled, its model can
        return SentencePieceTokenizer, (self.model,)

    def encode(self, text: str) -> list[int]:
        text = well_formed(text)
        if self._space_ids is None or SPACE not in text:
            return self._processor.encode(text)
        ids, *rest = self._processor.encode(text.split(SPACE))
        for part in rest:
            ids += [*self._space_ids, *part]
        return ids

    encode_source = encode_target = encode

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """`encode` of each text; most are int32 arrays."""
        texts = [well_formed(text) for text in texts]
        try:
            found = self._processor.encode(texts, return_type="numpy")
        except TypeError:  # SentencePiece before 0.2.2 gives lists
            found = self._processor.encode(texts)
        if self._space_ids is not None:
            found = [self.encode(text) if SPACE in text else ids for text, ids in zip(texts, found, strict=True)]
        return found

    @functools.cached_property
    def sampler(self) -> SegmentationSampler | None:
        """Draws random segmentations; None if the model has none. See `sampler_of`."""
        return sampler_of(self.model)

    def decode(self, ids: Iterable[int]) -> str:
        """Special tokens give no text; bytes that are not UTF-8 give U+FFFD."""
        check_ids(ids, self.vocab_size)
        unknown = self._processor.unk_id()  # would be written as " ⁇ "
        try:
            return self._processor.decode([int(i) for i in ids if i != unknown])
        except UnicodeDecodeError as error:  # rules of a model for decoded text can write any bytes
            raise UserError(f"the tokenizer's model cannot decode: {error}") from error

    def save(self, directory: str | os.PathLike) -> None:
        _write(directory, {"kind": "sentencepiece", "fingerprint": self.fingerprint}, self.model)


def _write(directory, description, model=None):
    directory = pathlib.Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if model is not None:
            (directory / "tokenizer.model").write_bytes(model)
        (directory / "tokenizer.json").write_text(json.dumps(description) + "\n")
    except OSError as error:
        raise UserError(f"tokenizer cannot be saved in {directory}: {error.strerror}") from error


def _training_chunks(texts: Iterable[str]) -> Iterator[str]:
    # A chunk has several lines with their newlines, so that pieces with newlines (".\n\n") are learned:
    # 5% fewer tokens. SentencePiece strips the last newline of a chunk.
    total = 0
    for text in texts:
        if total >= MAX_TRAINING_CHARACTERS:
            return
        total += len(text)
        chunk = ""
        for line in well_formed(text).splitlines(keepends=True):
            chunk += line
            if len(chunk) >= CHUNK_CHARACTERS:
                yield from _cut_long_words(chunk)
                chunk = ""
        if chunk.strip():
            yield from _cut_long_words(chunk)


def _cut_long_words(chunk: str) -> Iterator[str]:
    """The chunk, cut inside words (text without spaces, as Chinese or DNA, or spaces alone) of more characters."""
    start, n = 0, MAX_WORD_CHARACTERS
    for word in re.finditer(f"[^ ]{{{n}}}(?=[^ ])| {{{n}}}(?= )", chunk):
        yield chunk[start : (start := word.end())]
    yield chunk[start:]


def train_sentencepiece(texts: Iterable[str], vocab_size: int, model_type: str = "bpe") -> SentencePieceTokenizer:
    """Train a tokenizer whose decoding is exact: nothing is normalized, characters not in the vocabulary become bytes.

    At most MAX_TRAINING_CHARACTERS are read. Pieces 0, 1, 2 are <pad>, <unk> and <eos>; 256 bytes follow.

    Args:
      model_type: "bpe" or "unigram".
    Raises:
      UserError: the texts are empty, or the vocabulary is too small for the bytes and characters, or too large for
        the amount of text.
    """
    import sentencepiece

    if model_type not in ("bpe", "unigram"):
        raise UserError(f"tokenizer type {model_type!r}: choose bpe or unigram")
    failures, output = [], io.BytesIO()

    def chunks():
        try:  # SentencePiece would turn any exception of the iterator into a RuntimeError
            yield from _training_chunks(texts)
        except (Exception, KeyboardInterrupt) as error:
            failures.append(error)
            raise  # else it would train on the texts before the error

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chunks(),
            model_writer=output,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2**30,
            pad_id=0,
            unk_id=1,
            eos_id=2,
            bos_id=-1,
            pad_piece="<pad>",
            unk_piece="<unk>",
            eos_piece="<eos>",
            # Unigram: with fewer candidates than the default million, training is faster and needs fewer tokens.
            seed_sentencepiece_size=10 * vocab_size,
            minloglevel=4,
        )
    except (RuntimeError, OSError) as error:
        if failures:
            raise failures[0] from None
        message = str(error)
        if "sentences_.empty()" in message:
            raise UserError("tokenizer: there is no text for its training") from error
        if most := re.search(r"set it to a value <= (\d+)", message):
            raise UserError(
                f"tokenizer {model_type}:{vocab_size}: the corpus is too small for "
                f"this vocabulary; at most {model_type}:{most[1]}"
            ) from error
        if least := re.search(r"(\d+) vs (\d+)", message):
            raise UserError(
                f"tokenizer {model_type}:{vocab_size}: the 256 bytes and the characters "
                f"of the corpus need at least {model_type}:{least[2]}"
            ) from error
        raise UserError(f"tokenizer {model_type}:{vocab_size}: {message}") from error
    if failures:
        raise failures[0]
    return SentencePieceTokenizer(output.getvalue(), name=f"{model_type}:{vocab_size}")
