"""An 8-bit cache by nanoflax.open and by the flag of the programs."""

import re

import jax
import jax.numpy as jnp
import pytest

import nanoflax
from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.nn import build
from tests import processes
from tests.serve.servers import tiny


def test_text_is_generated_with_a_cache_of_8_bits(tmp_path):
    made, path = tiny(), str(tmp_path / "tiny")
    params = jax.tree.map(lambda x: x * 4, made.params)  # so that the rounding of the cache changes a long text
    nanoflax.hf.save(tmp_path / "tiny", made.model.config, params, made.tokenizer)
    run = nanoflax.open(path, cache_dtype="int8")
    assert run.model.empty_cache(1, 8)["layers"][0]["key"].dtype == jnp.int8
    settings = dict(max_new_tokens=150, temperature=1.0, top_k=0, seed=3)
    prompts = [*"abcdefgh"]
    texts, plain = (found.generate(prompts, **settings) for found in (run, nanoflax.open(path)))
    assert texts != plain
    flags = [*(f"--prompt={text}" for text in prompts), *(f"--{name}={value}" for name, value in settings.items())]
    for more, wanted in (["--cache_dtype=int8"], texts), ([], plain):
        done = processes.run(["-m", "experiments.sample", f"--model={path}", *flags, *more])
        letters = [re.sub(r"\W", "", text) for text in (done.stdout, *wanted)]
        assert all(text in letters[0] for text in letters[1:]), (wanted, done)


def test_what_has_no_such_cache_is_refused(tmp_path):
    made = tiny()
    nanoflax.hf.save(tmp_path / "tiny", made.model.config, made.params, made.tokenizer)
    with pytest.raises(UserError, match="cache_dtype='int4' must be int8, or empty"):
        nanoflax.open(str(tmp_path / "tiny"), cache_dtype="int4")
    run = nanoflax.open(str(tmp_path / "tiny"), cache_dtype="int8")
    with pytest.raises(UserError, match="cache_dtype='int8' has no effect"):
        run.evaluate("pydocs")
    with pytest.raises(UserError, match="cache_dtype='int8' needs attention"):
        build(ModelConfig(vocab_size=9, architecture="lstm"), cache_dtype="int8")
