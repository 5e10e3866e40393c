"""The compiled functions of an engine: a request compiles nothing.

Those for the smallest caches are compiled when the engine starts. Those for longer texts follow in a thread, the ones
that a request waits for first; texts that need none of them go on in the meantime.

A cache of one text has leaves [1, ...], the slots' cache [slots, 1, ...]. A size S is the number of tokens, and for a
model with a source also of its source, that a cache has room for. It is one array, not blocks with a table: XLA copies
blocks before attention reads them, and attention took 1.5 to 5 times as long (GPT-2 124M, 8 texts, two CPU cores).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from nanoflax import generate, parallel
from nanoflax.config import OF_SAMPLING, ModelConfig
from nanoflax.errors import UserError
from nanoflax.generate import Filters, Generation, Written
from nanoflax.kernels import most_probable
from nanoflax.nn import LanguageModel
from nanoflax.serve import attention
from nanoflax.serve.compiler import Compiler
from nanoflax.serve.requests import Request

CONTEXT = 4096  # tokens of a text by default, if the model has no smaller context
PIECES = 64, 16, 4, 1  # tokens that one call reads of a prompt
PADDED = 16  # a cache's size is a multiple of it; also the last piece of a prompt, with padding on the right
ALTERNATIVES = 20  # of each token that can be reported, as in OpenAI's API
FILTERS = (*OF_SAMPLING, "repetition_penalty")  # of a Request
PENALTIES = ("presence_penalty", "frequency_penalty")  # of a Request, 0: none
GROWTH = 4  # from a size to the next
LEAST = 256  # the smallest size, if the context is not smaller
LEAST_SOURCE = 64  # the same of a model with a source, which is padded to the size

Array = jax.Array
Scores = tuple[Float[Array, "*B"], Int[Array, "*B n"], Float[Array, "*B n"]]  # of `most_probable`


class Rows(LanguageModel):
    """A model that decodes texts of different lengths: its cache is that of the slots."""

    one: LanguageModel | None = None  # the model of each text

    def setup(self) -> None:
        """No parameters of its own."""

    def decode(
        self, params: dict, tokens: Int[Array, "B 1"], cache: dict[str, Any]
    ) -> tuple[Float[Array, "B 1 V"], dict[str, Any]]:
        """`LanguageModel.decode` of each text alone; the matrices are read once for all of them."""
        decode = functools.partial(self.one.decode, params)  # type: ignore  # it is given
        logits, cache = jax.vmap(lambda token, cache: decode(token[None], cache))(tokens, cache)
        return logits[:, 0], cache


class Programs:
    """Functions of arrays for `slots` texts of at most `context` tokens.

    sizes: of caches, the last is `context` or a little more. pieces: how many tokens are read at once. exact: whether
    a piece must not end with padding, because a state sums over all tokens (recurrent layers, output_delay).
    """

    def __init__(
        self, model: LanguageModel, params: dict, eos_ids: tuple[int, ...], vocab_size: int, slots: int, context: int
    ) -> None:
        c = model.config
        self.eos_ids, self.vocab_size, self.slots, self.reads_source = eos_ids, vocab_size, slots, c.reads_source
        self.exact = bool(c.output_delay) or any(map(c.is_recurrent, range(c.layers)))
        self.alternatives = min(ALTERNATIVES, vocab_size)
        self.pieces = () if c.reads_source else PIECES if self.exact else PIECES[:2]
        self.sizes = sizes_of(context, LEAST_SOURCE if c.reads_source else LEAST)
        if not c.reads_source and all(map(c.is_recurrent, range(c.layers))):
            self.sizes = self.sizes[-1:]  # one size of the state for all texts
        self.mesh: Any = parallel.mesh_of(params)
        if self.mesh is not None and jax.process_count() > 1:
            raise UserError(f"the engine serves in one process, not in {jax.process_count()}")
        self.params = self._compiled(lambda params: generate.decoding_params(model, params, slots))(params)
        self.model = generate.decoding_model(model, slots)
        everywhere = self.mesh and parallel.cache_sharding(self.mesh, (), slots=False)
        self._numbers = functools.partial(jax.ShapeDtypeStruct, sharding=everywhere)
        all_allowed = np.full((slots, -(-c.vocab_size // 32)), ~np.uint32(0))  # see Filters
        self.all_allowed = jax.device_put(all_allowed, everywhere)
        self._no_bias = jax.device_put(np.zeros((slots, c.vocab_size), np.float32), everywhere)
        self.virtual = 0 if c.reads_source else len(params["decoder"].get("prompt", ()))
        self.compiler = Compiler()
        self._one = {S: self._caches(self._empty, S) for S in self.sizes}  # of one text
        self._all = {S: self._caches(self._start, S, slots=True) for S in self.sizes}  # of the slots
        small = [name for name in self._add_all() if {*name[1:3]} & {*self.sizes} == {self.sizes[0]}]
        small = [name for name in small if name[0] != "attention"]
        self.compiler.ready(*small)  # they come first
        self.compiler.start()
        try:
            for name in small:
                self.compiler.get(*name)
        except BaseException:
            self.compiler.close()  # a process that ends while XLA compiles is aborted
            raise

    # What is compiled.

    def _add_all(self):
        """Add all functions to the compiler, and return their names. Those without which no text of a size is possible
        come first."""
        one, all_ = self._one, self._all
        i32, flag, ids = self._numbers((), jnp.int32), self._numbers((), bool), lambda *N: self._numbers(N, jnp.int32)
        row = ids(self.sizes[-1])
        source = row if self.reads_source else None
        like = lambda tree: jax.tree.map(lambda x: self._numbers(np.shape(x), jnp.asarray(x).dtype), tree)
        filters, wanted = like(self.filters([None] * self.slots))
        found, params = {}, self.params  # name -> function, what is donated, the caches of the result, arguments
        for S in self.sizes:
            for n in [n for n in self.pieces if n <= S]:
                arguments = params, one[S], ids(n), ids(n), i32, flag
                found["piece", S, n] = self._piece, (1,), (one[S], None), *arguments
            if self.reads_source:
                found["read", S] = self._read, (), one[S], params, ids(1, S), ids(1)
            found["step", S] = self._step, (1,), (all_[S], None), params, all_[S], filters, wanted
            for T in self.sizes:
                if not self.reads_source:
                    found["copy", T, S] = functools.partial(self._copy, size=S), (), one[S], one[T]
                if T <= S:
                    arguments = all_[S], i32, one[T], i32, row, i32, i32, i32, source
                    found["insert", S, T] = self._insert, (0,), all_[S], *arguments
                if T != S:
                    found["resize", T, S] = functools.partial(self._resize, size=S), (), all_[S], all_[T]
        shown = attention.layers_of(self.model.config)
        if shown.kinds:
            tokens, factors = ids(attention.STEPS[self.reads_source]), like(attention.factors(shown, None, None))
            for S in self.sizes:
                kept = one[S] if self.reads_source else {}
                found["attention", S] = self._attention, (), (kept, None), params, one[S], tokens, i32, i32, factors
        least = self.sizes[0]
        if not self.reads_source:
            found["empty", least] = functools.partial(self._empty, size=least), (), one[least], params
        first = [
            name
            for S in self.sizes
            for name in (
                ("piece", S, PIECES[0]),
                ("copy", least, S),
                ("read", S),
                ("resize", least, S),
                ("insert", S, S),
                ("step", S),
                ("attention", S),
            )
            if name in found
        ]
        for name in dict.fromkeys((*first, *found)):
            function, donate, result, *arguments = found[name]
            run = self._compiled(function, result, donate_argnums=donate)
            self.compiler.add(name, lambda run=run, arguments=arguments: run.lower(*arguments).compile())
        return [*found]

    def _get(self, *name):
        return self.compiler.get(*name)

    def _compiled(self, function, caches=None, **options):
        """The function under jax.jit. caches: the shapes of a part of its result, with shardings."""
        where = jax.tree.map(lambda x: x.sharding, caches)
        options["compiler_options"] = parallel.compiler_options(jax.default_backend())
        return jax.jit(parallel.with_mesh(self.mesh, function), out_shardings=where, **options)

    def _caches(self, make, size, slots=False):
        """The shapes of the caches that make(params, size) returns, with their shardings on a mesh."""
        place = lambda x: self.mesh and parallel.cache_sharding(self.mesh, x.shape, slots)
        shapes = jax.eval_shape(lambda params: make(params, size), self.params)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), shapes)

    # The state of the slots.

    def filters(self, requests: Sequence[Request | None]) -> tuple[Filters, Bool[np.ndarray, " B"]]:
        """(Filters with an array [slots] in every field for the requests in the slots, whose log-probabilities are
        wanted)."""
        settings = {name: [getattr(r, name) if r else generate.NO_EFFECT[name] for r in requests] for name in FILTERS}
        made = generate.make_filters(**settings, defaults=self.model.config.generation)
        penalties = {name: [r and getattr(r, name) or 0 for r in requests] for name in PENALTIES}
        more: dict[str, Any] = {name: np.array(x, np.float32) for name, x in penalties.items()}
        more |= {"allowed": self.all_allowed, "logit_bias": self._no_bias}
        if any(r and r.logit_bias for r in requests):
            more["logit_bias"] = bias = np.zeros(self._no_bias.shape, np.float32)
            for i, r in enumerate(requests):
                if r and r.logit_bias:
                    bias[i, [*r.logit_bias]] = [*r.logit_bias.values()]
        wanted = np.array([r is not None and r.log_probabilities is not None for r in requests])
        return made._replace(**more), wanted

    def start(self) -> Generation:
        """Empty slots of the smallest size."""
        least = self.sizes[0]
        return self._compiled(lambda params: self._start(params, least), self._all[least])(self.params)

    def _start(self, params, size):
        B, one = self.slots, self._empty(params, size)
        cache = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, *x.shape)), one)
        history, numbers = jnp.full((B, self.sizes[-1]), -1, jnp.int32), jnp.zeros(B, jnp.int32)
        written = Written(history, numbers, numbers, numbers, history if self.reads_source else None)
        return Generation(cache, numbers, jnp.zeros(B, bool), written, jax.vmap(jax.random.PRNGKey)(numbers))

    def insert(
        self,
        state: Generation,
        slot: int,
        cache: dict,
        token: int,
        text: Int[np.ndarray, " N"],
        length: int,
        limit: int,
        seed: int,
        source: Int[np.ndarray, " N"] | None = None,
    ) -> Generation:
        """Put a text into a slot. text: its tokens so far and then -1; token: the last; limit: of new tokens; source:
        of a model that reads one, and then -1."""
        function = self._get("insert", self.size_of(state.cache, 1), self.size_of(cache))
        low = np.int64(seed).astype(np.int32)  # as jax.random.PRNGKey
        numbers = (np.int32(x) for x in (length, limit, low))
        return function(state, np.int32(slot), cache, np.int32(token), text, *numbers, source)

    def _insert(self, state, slot, cache, token, text, length, limit, seed, source):
        cache = jax.tree.map(lambda x: x, cache)
        if "index" in cache and not self.reads_source:
            cache["index"] = length - 1 + self.virtual  # without the padding of the last piece
        written = Written(text, length, jnp.int32(0), limit, source)
        row = (cache, token, jnp.bool_(False), written, jax.random.PRNGKey(seed))

        def put(all_, one):
            one = _padded(one, all_.shape[1:])
            return jax.lax.dynamic_update_index_in_dim(all_, one.astype(all_.dtype), slot, 0)

        return jax.tree.map(put, state, Generation(*row))

    def step(
        self, state: Generation, filters: Filters, wanted: Bool[np.ndarray, " B"]
    ) -> tuple[Generation, tuple[Int[Array, " B"], Scores]]:
        """A token of every slot. filters: with arrays [slots] in every field; wanted: whose log-probabilities are read.
        Returns (the new state, (the tokens, their log-probabilities and alternatives))."""
        return self._get("step", self.size_of(state.cache, 1))(self.params, state, filters, wanted)

    def _step(self, params, state, filters, wanted):
        def record(logits, _, token):
            return self._scores(lambda: logits, token, wanted.any())

        rows, arguments = Rows(self.model.config, one=self.model), (state, filters, 1, self.eos_ids, self.vocab_size)
        state, found = generate.advance(rows, params, *arguments, record)
        return state, jax.tree.map(lambda x: x[:, 0], found)

    def resize(self, state: Generation, size: int) -> Generation:
        """The slots with another size."""
        now = self.size_of(state.cache, 1)
        return state if now == size else self._get("resize", now, size)(state)

    def _resize(self, state, size):
        fit = lambda x, like: _padded(x, (x.shape[0], *like.shape))
        return state._replace(cache=jax.tree.map(fit, state.cache, self._one[size]))

    # Prompts.

    def empty(self) -> dict:
        """The cache of a text before its first token, of the smallest size."""
        return self._get("empty", self.sizes[0])(self.params)

    def _empty(self, params, size):
        tokens = jnp.zeros((1, size if self.reads_source else 1), jnp.int32)
        return self.model.prefill(params, tokens, jnp.ones(1, jnp.int32), size)[1]

    def copy(self, cache: dict, size: int) -> dict:
        """A cache with room for `size` tokens."""
        return self._get("copy", self.size_of(cache), size)(cache)

    def _copy(self, cache, size):
        return jax.tree.map(lambda x, like: jnp.copy(_padded(x, like.shape)), cache, self._one[size])

    def read(self, source: list[int], size: int) -> tuple[dict, int]:
        """(the cache of a source, the first token of the target)."""
        tokens = np.zeros((1, size), np.int32)
        tokens[0, size - len(source) :] = source
        cache = self._get("read", size)(self.params, tokens, np.full(1, len(source), np.int32))
        return cache, self.model.config.start_id

    def _read(self, params, tokens, lengths):
        return self.model.prefill(params, tokens, lengths, tokens.shape[1])[1]

    def larger(self, size: int, most: int) -> int | None:
        """The next size of a cache that grows from `size` to `most`: the smallest that is compiled; None: none is yet,
        and all that a text of the size `most` needs is compiled next."""
        needed = lambda T: (("copy", size, T), ("piece", T, PIECES[0]))
        found = next((T for T in self.sizes if size < T <= most and self.compiler.has(*needed(T))), None)
        if found is None:
            slots = ("step", most), ("resize", self.sizes[0], most), ("insert", most, most)
            self.compiler.ready(*needed(most), *slots)
        return found

    def next_piece(self, rest: int, at: int, size: int) -> int | None:
        """The length of the next piece of a prompt; None: it is not compiled yet. rest: tokens to read after the first
        `at`; size: of the cache."""
        fitting = [n for n in self.pieces if n <= size - at and (n <= rest or not self.exact)]
        if not self.exact and rest <= PIECES[0] // 2:
            fitting.reverse()  # less padding
        found = next((n for n in fitting if self.compiler.has(("piece", size, n))), None)
        if found is None:
            self.compiler.ready(("piece", size, fitting[0]))
        return found

    def piece(self, cache: dict, prompt: list[int], at: int, n: int, scored: bool) -> tuple[dict, Scores]:
        """Read n tokens of a prompt from position `at`, fewer at its end.
        Returns (the new cache, the scores of the tokens that follow each, if `scored`)."""
        tokens, targets = np.zeros(n, np.int32), np.zeros(n, np.int32)
        for row, part in ((tokens, prompt[at : at + n]), (targets, prompt[at + 1 : at + 1 + n])):
            row[: len(part)] = part
        run = self._get("piece", self.size_of(cache), n)
        return run(self.params, cache, tokens, targets, np.int32(at), np.bool_(scored))

    def _piece(self, params, cache, tokens, targets, at, scored):
        if "index" in cache:
            cache = cache | {"index": at + self.virtual}
        run = functools.partial(self.model.apply, {"params": params})
        x, cache = run(tokens[None], cache=cache, method="hidden")
        head = lambda: generate.only_below(self.vocab_size, run(x, method="head")[0])
        return cache, self._scores(head, targets, scored)

    def attention(
        self, cache: dict, tokens: list[int], at: int, factors: Float[np.ndarray, "L H"]
    ) -> tuple[dict, Float[Array, " S"]]:
        """`attention.step` for a few tokens. at: how many a text without a source has before them."""
        padded = np.zeros(attention.STEPS[self.reads_source], np.int32)
        padded[: len(tokens)] = tokens
        run = self._get("attention", self.size_of(cache))
        return run(self.params, cache, padded, np.int32(len(tokens)), np.int32(at), factors)

    def _attention(self, params, cache, tokens, count, at, factors):
        if "index" in cache and not self.reads_source:
            cache = cache | {"index": at + self.virtual}
        cache, row = attention.step(self.model, params, cache, tokens, count, factors)
        return (cache if self.reads_source else {}), row

    def _scores(self, logits: Callable[[], Any], tokens: Array, wanted: Any) -> Any:
        """`most_probable` of the logits that a function computes, or zeros if not wanted."""
        computed = lambda: most_probable(logits(), tokens, self.alternatives)
        shapes = jax.eval_shape(computed)
        return jax.lax.cond(wanted, computed, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))

    # Sizes.

    def size_of(self, cache: dict, extra: int = 0) -> int:
        """The size of a cache; extra: dimensions before those of one text."""
        leaves = [x.shape[extra:] for x in jax.tree.leaves(cache)]
        return next(S for S, shapes in self._one.items() if leaves == [x.shape for x in jax.tree.leaves(shapes)])

    def size_for(self, tokens: int) -> int:
        """The smallest size with room for these tokens."""
        return next(S for S in self.sizes if S >= tokens)


def sizes_of(context: int, least: int) -> tuple[int, ...]:
    """The sizes of caches, growing from `least` to the context rounded up to a multiple of PADDED."""
    last = -(-context // PADDED) * PADDED
    sizes = []
    while last > 0 and (not sizes or sizes[-1] < last):
        sizes.append(min(last, sizes[-1] * GROWTH if sizes else least))
    return tuple(sizes)


def _padded(x: Shaped[Array, "..."], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
    """x with this shape: with zeros at the end of each dimension, or without its last numbers."""
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, n - m, 0) for m, n in zip(x.shape, shape, strict=True)])


def context_of(config: ModelConfig, context: int | None) -> int:
    """The engine's context. Raises: UserError if the model has a smaller one."""
    rope, most = config.rope, config.max_length
    if rope.scaling in ("longrope", "dynamic"):  # longer texts change the angles of every token
        most = min(most, rope.context // PADDED * PADDED)
    if context is None:
        return min(most, CONTEXT)
    if not 1 <= context <= most:
        raise UserError(f"context={context} must be from 1 to {most}, the longest text that the engine can continue")
    return context
