"""Text to token ids and back: tokenizers trained here, or read from Hugging Face, SentencePiece and GGUF files."""

from nanoflax.tokenizers.base import Framing, Tokenizer, encode_batch, well_formed
from nanoflax.tokenizers.chat import chat_ids, chat_prompt, show_mask, stop_ids, with_date, with_plain_template
from nanoflax.tokenizers.export import to_huggingface, token_ids
from nanoflax.tokenizers.framing import align_tags, continuation_ids, prompt_ids, word_tags
from nanoflax.tokenizers.gguf import to_gguf
from nanoflax.tokenizers.huggingface import from_gguf
from nanoflax.tokenizers.loading import check_fits, load, parse
from nanoflax.tokenizers.prompts import (
    Scored,
    answers,
    bucket,
    check_prompts,
    cut,
    pad_left,
    request_of,
    row_settings,
    scored,
)
from nanoflax.tokenizers.segmentation import Segmentation
from nanoflax.tokenizers.sentinels import TokenizerWithSentinels
from nanoflax.tokenizers.streaming import StreamingDecoder, decode_parts
from nanoflax.tokenizers.token_bytes import token_bytes
from nanoflax.tokenizers.trained import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece

__all__ = [
    "ByteTokenizer", "Framing", "Scored", "Segmentation", "SentencePieceTokenizer", "StreamingDecoder", "Tokenizer",
    "TokenizerWithSentinels", "align_tags", "answers", "bucket", "chat_ids", "chat_prompt", "check_fits",
    "check_prompts", "continuation_ids", "cut", "decode_parts", "encode_batch", "from_gguf", "load", "pad_left",
    "parse", "prompt_ids", "request_of", "row_settings", "scored", "show_mask", "stop_ids", "to_gguf",
    "to_huggingface", "token_bytes", "token_ids", "train_sentencepiece", "well_formed", "with_date",
    "with_plain_template", "word_tags"]  # fmt: skip
