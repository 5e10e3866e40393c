"""Any tokenizer in a form whose files Transformers reads."""

import json
from typing import Any

from nanoflax.tokenizers import specs, vocabularies
from nanoflax.tokenizers.file_tokenizer import read_json, token_fields
from nanoflax.tokenizers.huggingface import PLAIN_CLASSES, HFTokenizer, from_files, from_spec
from nanoflax.tokenizers.marian import MarianTokenizer
from nanoflax.tokenizers.sentinels import TokenizerWithSentinels


def to_huggingface(tokenizer: Any, for_prompts: bool = False) -> HFTokenizer | MarianTokenizer:
    """The tokenizer in a form whose files Transformers reads.

    A tokenizer trained here becomes an HFTokenizer with the same ids for every text, except that U+2581 is read as
    a space; see `HFTokenizer.for_transformers` for those of files. Transformers then puts the ids of `Framing.whole`
    around every text. for_prompts: those of `Framing.prompt`, for a causal language model.
    The mask and the sentinels of a TokenizerWithSentinels become special tokens.
    """
    if isinstance(tokenizer, TokenizerWithSentinels):
        return _with_tokens(to_huggingface(tokenizer.plain, for_prompts), tokenizer)
    if isinstance(tokenizer, MarianTokenizer):
        return tokenizer
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.for_transformers()
    spec, framing = vocabularies.from_ours(tokenizer), tokenizer.framing
    specs.set_template(spec, *((framing.start, ()) if for_prompts else (framing.before, framing.after)))
    names = {token["id"]: token["content"] for token in spec["added_tokens"]}
    ids = {role: getattr(tokenizer, f"{role}_id", None) for role in ("bos", "eos", "pad", "unk", "mask")}
    if ids["pad"] in framing.after:  # then a classifier of Transformers would read the state before the final eos
        ids["pad"] = ids["unk"]
    config = {"tokenizer_class": PLAIN_CLASSES[0], "model_input_names": ["input_ids", "attention_mask"]}
    config |= {"clean_up_tokenization_spaces": False}
    config |= {f"{role}_token": names[i] for role, i in ids.items() if i in names}
    return from_spec(spec, config, {}, "exported from nanoflax")


def token_ids(tokenizer: Any) -> dict[str, int]:
    """{token: id} of the vocabulary, as files of Transformers write it, with special tokens."""
    return to_huggingface(tokenizer).token_ids()


def _with_tokens(exported, tokenizer):
    """`exported` with the new tokens of a TokenizerWithSentinels in its settings, where Transformers reads them."""
    if not tokenizer.added:
        return exported
    config = read_json(exported.files, "tokenizer_config.json", exported.name)
    own = config.get("added_tokens_decoder") or {}
    tokens = {str(i): token_fields(specs.added_token(name, i), name) for name, i in tokenizer.special.items()}
    config["added_tokens_decoder"] = tokens | own
    config["additional_special_tokens"] = [*(config.get("additional_special_tokens") or []), *tokenizer.added]
    if tokenizer.mask_id in tokenizer.added.values():
        config["mask_token"] = "<mask>"
    return from_files(exported.files | {"tokenizer_config.json": json.dumps(config).encode()}, exported.name)
