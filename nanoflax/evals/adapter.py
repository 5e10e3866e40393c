"""The adapter between lm-eval and our models. lm-eval is imported only when it is used."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanoflax import generate, kernels, tokenizers
from nanoflax.errors import UserError
from nanoflax.evals.likelihood import NoBar, Progress, score_pairs
from nanoflax.evals.strided import windows

CHUNK = 16  # tokens between two checks whether all texts have ended
# The settings of a task that we read.
FILTERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
OTHERS = ("do_sample", "until", "max_gen_toks")


class Adapter:
    """The methods of an lm_eval.api.model.TemplateLM for a Run: `as_lm` joins the two classes.

    Texts become the ids that lm-eval's HFLM gives: with the token that begins a text, and with the special tokens that
    a text names (those of a chat template). A context that is too long loses its beginning, as in HFLM; `n_cut` counts
    these contexts.
    """

    def __init__(self, run: Any, batch_size: int = 16, progress: bool = True) -> None:
        super().__init__()
        if run.tokenizer is None:
            raise UserError(f"{run.source} has no tokenizer that nanoflax can read")
        if run.model.config.head != "lm":
            raise UserError(f"{run.source}: a model with model.head={run.model.config.head!r} writes no text")
        self.run, self.tokenizer, self.model = run, run.tokenizer, run.model
        self.params = jax.tree_util.tree_map(jnp.asarray, run.params)
        self.batch_size, self.progress, self.n_cut = batch_size, progress, 0
        c = self.model.config
        self.backend = "seq2seq" if c.reads_source else "causal"
        self.max_length = c.context

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """What a results file says of the model. Quantised matrices count as the arrays for which they stand."""
        leaves = jax.tree_util.tree_leaves(self.params, is_leaf=kernels.is_quantized)
        dtypes = sorted({str(x.kind if kernels.is_quantized(x) else x.dtype) for x in leaves})
        return {"model_num_parameters": sum(x.size for x in leaves), "model_dtype": ",".join(dtypes)}

    # Texts and chats.

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text. add_special_tokens: False adds none; None also none if the text begins with them."""
        tokenizer, text = self.tokenizer, tokenizers.well_formed(string)
        ids = tokenizer.encode(text, special=True) if hasattr(tokenizer, "special") else tokenizer.encode(text)
        if add_special_tokens is False:
            return ids
        if self.backend == "seq2seq":
            return tokenizer.framing.whole(ids)
        start = list(tokenizer.framing.start)
        return ids if start and ids[: len(start)] == start else start + ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat, with the names of special tokens. Without the prompt of a generation, it ends with the
        content of the last message, which the model continues."""
        chat = self.tokenizer.render_chat(chat_history, add_generation_prompt)
        text, end = "", 0
        for start, stop, name in sorted(chat.special):
            text, end = text + chat.text[end:start] + name, stop
        text += chat.text[end:]
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        at = text.rindex(last) + len(last)
        return text[:at]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else None

    # Likelihoods.

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore  # of TemplateLM

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        pairs = []
        for names, before, ids in requests:
            if not ids or len(ids) > self.max_length:
                raise UserError(
                    f"a continuation has {len(ids)} tokens, and the model's context {self.max_length}: {names[1]!r:.60}"
                )
            room = self.max_length if self.backend == "seq2seq" else self.max_length + 1 - len(ids)
            self.n_cut += len(before) > room
            pairs.append((before[len(before) - min(len(before), room) :], ids))
        return list(score_pairs(self.model, self.params, pairs, self.batch_size, self.progress))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        pairs, owners = [], []
        for i, request in enumerate(requests):
            # As in HFLM, a model that reads a source has only the first token as its source.
            found = windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, self.max_length)
            for before, ids in found:
                pairs.append((before, ids))
                owners.append(i)
        totals = np.zeros(len(requests))
        for i, found in zip(
            owners, score_pairs(self.model, self.params, pairs, self.batch_size, self.progress), strict=True
        ):
            totals[i] += found.log_likelihood
        return totals.tolist()

    # Generation.

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts until a stop string, an end of the tokenizer or the largest length, 256 tokens by default. Each request
        has a key of its own, its number, so that its text does not depend on the others."""
        groups = defaultdict(list)  # the settings -> numbers of requests
        for i, request in enumerate(requests):
            groups[repr(request.args[1])].append(i)
        settings = {
            key: _settings(requests[members[0]].args[1], self.max_length, self.backend)
            for key, members in groups.items()
        }
        ids = {
            i: self._prompt(requests[i].args[0], settings[key][1]) for key, members in groups.items() for i in members
        }
        texts = [""] * len(requests)
        work = sum(settings[key][1] * len(members) for key, members in groups.items())
        with Progress("texts", len(requests), work) if self.progress else NoBar() as bar:
            for key, members in groups.items():
                members.sort(key=lambda i: -len(ids[i]))
                size = min(self.batch_size, 1 << (len(members) - 1).bit_length())
                for at in range(0, len(members), size):
                    part = members[at : at + size]
                    part += part[-1:] * (size - len(part))  # so that the last batch needs no compilation
                    self._generate(part, ids, *settings[key], texts)
                    bar.add(len({*part}), len({*part}) * settings[key][1])
        return texts

    def _prompt(self, context: str, new: int) -> list[int]:
        room = self.max_length - (0 if self.backend == "seq2seq" else new)
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self.n_cut += len(ids) > room
        return ids[-room:]

    def _generate(
        self, part: list[int], ids: dict, stops: list[str], new: int, filters: dict, texts: list[str]
    ) -> None:
        """Fill in the texts of a batch of requests."""
        rng = jnp.stack([jax.random.PRNGKey(i) for i in part])
        pieces = generate.stream(
            self.model, self.params, [ids[i] for i in part], new, rng=rng, chunk=CHUNK,
            eos_id=tokenizers.stop_ids(self.tokenizer), vocab_size=self.tokenizer.vocab_size, **filters,
        )  # fmt: skip
        written: list[list[int]] = [[] for _ in part]
        for new_ids in pieces:
            ended = []
            for row, found in zip(written, new_ids, strict=True):
                row += found
                ended.append(len(found) < CHUNK or _first_stop(self.tokenizer.decode(row), stops) is not None)
            if all(ended):
                break
        for i, row in zip(part, written, strict=True):
            text = self.tokenizer.decode(row)
            texts[i] = text[: _first_stop(text, stops)]


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def _settings(given: dict[str, Any], most: int, backend: str) -> tuple[list[str], int, dict[str, Any]]:
    """(stop strings, largest number of new tokens, filters of generate.stream) of a task's generation_kwargs."""
    from lm_eval.models.utils import normalize_gen_kwargs

    known: Any = normalize_gen_kwargs(given)
    new, filters = known["max_gen_toks"], {name: known[name] for name in FILTERS if known.get(name) is not None}
    rest = {name: value for name, value in known.items() if name not in (*FILTERS, *OTHERS)}
    rest = {name: value for name, value in rest.items() if (name, value) != ("num_beams", 1)}
    if rest:
        shown = ", ".join(f"{name}={value!r}" for name, value in rest.items())
        raise UserError(f"generation_kwargs of a task: {shown}: nanoflax reads {', '.join((*FILTERS, *OTHERS))}")
    if new < 1 or (new >= most and backend == "causal"):
        raise UserError(f"generation_kwargs of a task: max_gen_toks={new}, but the model's context is {most}")
    if not known["do_sample"]:
        filters["temperature"] = 0.0
    return [stop for stop in known["until"] if stop], new, filters
