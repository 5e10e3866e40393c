"""Text to token ids and back: trained here, or read from the files of others."""

from nanoflax.tokenizers.base import Tokenizer, well_formed
from nanoflax.tokenizers.framing import align_tags, chat_ids, chat_prompt, ends, prompt_ids, show_mask, word_tags
from nanoflax.tokenizers.huggingface import exported, from_gguf
from nanoflax.tokenizers.loading import check_fits, load, parse
from nanoflax.tokenizers.trained import ByteTokenizer, SentencePieceTokenizer, train_sentencepiece

__all__ = [
    "ByteTokenizer", "SentencePieceTokenizer", "Tokenizer", "align_tags", "chat_ids", "chat_prompt", "check_fits",
    "ends", "exported", "from_gguf", "load", "parse", "prompt_ids", "show_mask", "train_sentencepiece", "well_formed",
    "word_tags"]  # fmt: skip
