"""Open a trained or published model: a run, a Transformers directory, a hub name, a GGUF file, adapters."""

import os
import sys

from nanoflax import config as configs
from nanoflax.errors import UserError
from nanoflax.parallel import is_main_process
from nanoflax.runs.directory import is_run, model_directory, read_run


def restore_model(workdir, config, tokenizer, which="best"):
    """The model of a run and its parameters (their moving average, if it keeps one), without the
    padding of its vocabulary.

    Those that finetune does not train are not in its checkpoints: they are taken again from
    config.model.init_from.
    Raises: UserError if there is no sound checkpoint or the tokenizer is not the run's.
    """
    import jax

    from nanoflax import nn, parallel, peft
    from nanoflax.runs import checkpoint

    subtree = "ema" if config.optim.ema else "params"
    params, meta = checkpoint.restore_params(os.path.join(workdir, "checkpoints"), which=which, subtree=subtree)
    if meta["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"the tokenizer in --workdir={workdir} (fingerprint "
            f"{tokenizer.fingerprint[:12]}) is not the one that the checkpoint was "
            f"trained with ({meta['tokenizer'][:12]}); put that one back"
        )
    model = nn.build(config.model)
    paths = jax.tree_util.tree_leaves_with_path

    def fits(params):
        own = dict(paths(params))  # adapters may be among them
        return all(path in own and own[path].shape == x.shape for path, x in paths(parallel.param_shapes(model)))

    if not fits(params) and config.peft != configs.FullFineTuning():
        given = open_model(config.model.init_from)[1] if config.model.init_from else None
        first = initialize_with_adapters(model, given, config, parallel.make_mesh("-1,1,1"))
        params = peft.join(params, peft.split(first, peft.trainable(first, config.peft))[1])
    if not fits(params):
        raise UserError(
            f"the checkpoint in --workdir={workdir} does not hold the parameters of its "
            "config.json; it may be of an older nanoflax"
        )
    model_config, params = nn.without_padding(config.model, params)
    return nn.build(model_config), params


def initialize_with_adapters(model, given, config, mesh):
    """What finetune begins from: `started`, with the adapters that config.peft adds."""
    import jax

    from nanoflax import parallel, peft

    seed = config.train.seed
    add = lambda params: peft.add(params, config.peft, jax.random.PRNGKey(seed + 1))  # noqa: E731
    params = initialize_from(model, given, seed, mesh)
    return jax.jit(add, donate_argnums=0, out_shardings=parallel.shardings(jax.eval_shape(add, params), mesh))(params)


def initialize_from(model, given, seed, mesh):
    """New parameters in float32, with those of the source in their places; says what is new.

    Raises: UserError for a source with adapters that cannot be merged.
    """
    import jax
    import numpy as np
    from flax import traverse_util

    from nanoflax import nn, parallel, peft

    new = traverse_util.flatten_dict(parallel.init(model, jax.random.PRNGKey(seed), mesh), sep="/")
    if given is None:
        return traverse_util.unflatten_dict(new, sep="/")
    given = traverse_util.flatten_dict(peft.merge(given), sep="/")
    # Tokens that the source lacks (a mask, sentinels, padding) come after its own.
    for path in sorted(nn.VOCABULARY & new.keys() & given.keys()):  # so on all processes
        old = given[path]
        if old.shape != new[path].shape:
            given[path] = np.array(parallel.fetch(new[path]))
            given[path][tuple(map(slice, old.shape))] = old
    fits = {path for path in new if path in given and given[path].shape == new[path].shape}
    fresh = sorted({path.split("/")[0] for path in new.keys() - fits})
    if fresh and is_main_process():
        print(f"not in the source, drawn anew: {', '.join(fresh)}", file=sys.stderr)
    left = sorted({path.split("/")[0] for path in given.keys() - fits})
    if left and is_main_process():
        print(f"in the source, not needed: {', '.join(left)}", file=sys.stderr)
    new |= parallel.put_params({path: given[path].astype(new[path].dtype) for path in fits}, mesh)
    return traverse_util.unflatten_dict(new, sep="/")


def open_model(source, which="best"):
    """(model, params, tokenizer or None) of a run's workdir, a directory of Transformers, a name on
    the hub, a .gguf file, or a directory of the peft library: low-rank adapters, which are folded
    into the model that it names.

    Raises: UserError for what cannot be opened, or a tokenizer that the embedding is too small for.
    """
    from nanoflax import hf, nn, peft, tokenizers

    if is_run(source):
        source = model_directory(source, which)
        config, tokenizer = read_run(source)
        return *restore_model(source, config, tokenizer, which), tokenizer
    if base := hf.base_of_adapter(source):
        if hf.base_of_adapter(base):
            raise UserError(f"{source} belongs to {base}, which holds adapters too; merge those first")
        model, params, tokenizer = open_model(base, which)
        params, _ = hf.load_adapter(source, model.config, params)
        return model, peft.merge(params), tokenizer
    path = hf.find_source(source)
    config, params = hf.load(path)
    if path.suffix == ".gguf":
        tokenizer = tokenizers.from_gguf(hf.open_gguf(path)[0], str(path))
    else:
        tokenizer = tokenizers.load(path)
    tokenizers.check_fits(tokenizer, config.vocab_size)
    return nn.build(config), params, tokenizer
