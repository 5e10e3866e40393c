"""Pretrain a decoder-only Transformer on a corpus, from text to text.

    python -m experiments.pretrain                                  # the main job
    python -m experiments.pretrain --config=gpt2_124m --workdir=runs/gpt2
    python -m experiments.pretrain --config.model.dim=384 --config.train.steps=800 --workdir=runs/x

The same command again resumes. Exit status: 0 finished (early stopping too), 2 something to put
right, 130 Ctrl-C and 143 SIGTERM, after saving: run the command again to go on.

On several hosts run it on each, with a workdir that they share. JAX finds the others on Cloud TPU
and under Slurm (srun) and Open MPI; else add --coordinator=HOST:PORT --processes=N --process_id=I,
with the address of process 0. If one dies or hangs, the others end with their stacks and status 1,
or by SIGABRT from JAX, within train.watchdog_seconds or --heartbeat_seconds: run the command again
on all of them, or on any other number of hosts, to go on.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os

from absl import flags

from experiments.flags import define_hosts, join, launch, parsed_config
from nanoflax import config as configs
from nanoflax import parallel, runs
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", "", "directory of the run; empty means runs/NAME of the config")
define_hosts()
flags.DEFINE_bool(
    "restart_from_weights", False, "begin a new run in workdir from its saved weights; the old one is kept beside"
)


def main():
    config = parsed_config()
    runs.check_metric(config, () if config.train.evaluate_batches else ("bits_per_byte",))
    runs.check_wandb(config)
    check_used(config)
    name = os.path.basename(FLAGS.config).removesuffix(".py")
    workdir = FLAGS.workdir or os.path.join("runs", name)
    runs.setup_jax()
    join(config, restart_from_weights=FLAGS.restart_from_weights)

    from nanoflax.runs import WorkdirLock

    with (
        WorkdirLock(workdir),
        contextlib.nullcontext() if parallel.is_main_process() else contextlib.redirect_stdout(None),
    ):
        return run(config, workdir)


def check_used(config):
    """Raises: UserError for anything but a decoder with its own head, trained from scratch on text."""
    found = [
        f"model.{name}={getattr(config.model, name)!r}"
        for name in ("architecture", "head", "init_from")
        if getattr(config.model, name) != getattr(configs.ModelConfig, name)
    ]
    if config.peft != configs.FullFineTuning():
        found.append(f"peft.kind={config.peft.kind!r}")
    if not isinstance(config.task, configs.Pretrain):
        found.append(f"task.kind={config.task.kind!r}")
    if found:
        raise UserError(
            f"{', '.join(found)}: pretrain trains a decoder from scratch, on text; for "
            "anything else there is experiments.finetune"
        )


def run(config, workdir):
    """Train in workdir."""
    import jax

    from nanoflax import data, generate, nn, parallel, report, runs, train
    from nanoflax.data import Batches, Windows

    def look():
        old, weights = runs.check_workdir(workdir, config, FLAGS.restart_from_weights)
        return old and configs.to_dict(old), weights

    found, weights = parallel.run_on_main_process(look)
    before = found and configs.from_dict(configs.Config, found)
    mesh, params = parallel.make_mesh(config.train.mesh), None
    parallel.check_mesh(dataclasses.replace(config, model=parallel.pad_vocabulary(config.model, mesh)), mesh)
    if weights:
        params, _ = runs.restore_params(
            os.path.join(weights, "checkpoints"), shardings=lambda shapes: parallel.shardings(shapes, mesh)
        )
    source = data.source_of(config.data)
    data.source_version(source)  # refuses what is not there
    tokenizer = runs.get_tokenizer(config.data, weights or workdir, lambda: data.documents(source, "train"))
    config = dataclasses.replace(config, model=runs.with_vocabulary(config.model, tokenizer, mesh, before))
    parallel.check_mesh(config, mesh)  # the vocabulary of a run that goes on, too
    prompt = [tokenizer.bos_id, *tokenizer.encode(config.train.sample_prompt)]
    if config.train.sample_tokens:
        generate.check_prompts(config.model, [prompt], config.train.sample_tokens)
    model = nn.build(config.model, config.train.remat)
    if weights:
        runs.check_same_shapes(f"the run in {weights}", params, parallel.param_shapes(model))
    optimizer, schedule = train.make_optimizer(config.optim, config.train.steps)
    shapes = train.abstract_state(model, optimizer, config, mesh)
    parallel.check_memory(shapes, mesh)
    batch = train.abstract_batch(config, mesh)
    attention = train.attention_backends(model, shapes.params, batch, mesh)
    background = concurrent.futures.ThreadPoolExecutor(2)  # compile while text is read
    step = background.submit(train.compile_step, train.make_train_step(model, optimizer, config), shapes, batch, mesh)
    init = None if found else background.submit(train.compile_init, model, optimizer, config, mesh)
    background.shutdown(wait=False)  # an error that comes meanwhile is told at once
    stores = [
        data.prepare(
            source,
            tokenizer,
            split,
            config.data.cache or None,
            config.data.workers or None,
            progress=parallel.is_main_process(),
        )
        for split in ("train", "validation")
    ]
    for split, store in zip(("training", "validation"), stores):
        print(
            f"{split}: {store.n_documents:,} documents, {report.format_count(store.n_bytes)}B of "
            f"text, {report.format_count(store.n_tokens)} tokens"
        )
        for line in store.report:
            print(f"  {line}")
    windows, held_out = (Windows(s, config.model.context, config.data.packing == "isolated") for s in stores)
    identity = {
        "tokenizer": tokenizer.fingerprint,
        "data": stores[0].fingerprint,
        "validation": stores[1].fingerprint,
        "config": configs.to_dict(config),
    }
    parallel.check_processes_agree("their data", {k: identity[k] for k in identity if k != "config"})
    flops = nn.flops_per_token(config.model)
    print(report.parameter_table(parallel.unstack(shapes.params)))
    print(
        f"{report.format_count(flops)} FLOPs per trained token (6 per weight of a product, and "
        f"attention); mesh {dict(mesh.shape)} of {mesh.devices.flat[0].device_kind}; "
        f"attention {attention}"
    )
    if weights:
        parallel.gather_from_processes("restored")
        print(f"the run before is kept in {parallel.run_on_main_process(lambda: runs.archive_run(workdir))}")
    with runs.Checkpoints(os.path.join(workdir, "checkpoints"), config.train.keep) as saves:
        tracking, start_step = train.Tracking(), 0
        if saves.latest() is not None:
            state, meta = saves.restore(shapes._asdict())
            runs.check_same_data(meta, identity)
            state, start_step = train.TrainState(**state), meta["step"]
            tracking = train.Tracking.read(meta["tracking"], start_step, saves.metric(start_step))
            print(f"resuming at step {start_step}")
        else:
            if parallel.is_main_process():
                runs.write_run(workdir, config, tokenizer)
            state = init.result()() if init else train.init_state(model, optimizer, config, mesh, params)
            if weights:  # at once: these weights are nowhere else in this run
                saves.save(0, state._asdict(), identity | {"step": 0, "position": 0, "tracking": tracking._asdict()})
        if start_step >= config.train.steps and not tracking.owed:
            print(f"the run is complete: {start_step} steps")
            draw(workdir, config)
            return 0
        if 0 < config.train.patience <= tracking.waited:
            print(f"the run stopped early at step {start_step}; a larger train.patience goes on")
            draw(workdir, config)
            return 0
        batches = Batches(
            windows, config.train.batch_size, config.train.seed, True, parallel.own_rows(mesh, config.train.batch_size)
        )
        step = step.result()
        device = mesh.devices.flat[0]
        if device.platform == "cpu":  # not beside the compiler
            peak = parallel.measure_peak_flops()
        elif peak := parallel.peak_flops(device):
            peak *= mesh.size
        score = train.make_evaluation(model, config, mesh)

        def continuation(params):
            if not config.train.sample_tokens:
                return ""
            (new,) = generate.sample(
                model,
                params,
                [prompt],
                config.train.sample_tokens,
                temperature=0.8,
                top_k=40,
                rng=jax.random.PRNGKey(0),
                eos_id=tokenizer.eos_id,
                vocab_size=tokenizer.vocab_size,
            )
            return config.train.sample_prompt + tokenizer.decode(new)

        def evaluate(params, at):
            nats, tokens = score(params, held_out)
            found = {"validation_loss": nats / tokens}
            if not config.train.evaluate_batches:
                found["bits_per_byte"] = nats / math.log(2) / stores[1].n_bytes
            numbers = "  ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in found.items())
            sample = "\n  | ".join(continuation(params).splitlines())
            return found, f"step {at}: {numbers}" + (f"\n  | {sample}" if sample else "")

        tokens = config.train.batch_size * config.model.context
        with runs.displays(workdir, config, start_step, tokens, flops, peak) as (log, progress):
            state, tracking, outcome = train.fit(
                state,
                step,
                batches,
                config,
                mesh,
                evaluate=evaluate,
                checkpoints=saves,
                log=log,
                progress=progress,
                meta=identity,
                tracking=tracking,
                schedule=schedule,
            )
    if parallel.is_main_process():
        summarise(workdir, config, tracking, outcome)
    return 128 + outcome.signal if outcome.signal else 0


def draw(workdir, config):
    """Draw the loss curve, on process 0; returns its path."""
    from nanoflax import report

    if parallel.is_main_process():
        return report.plot_losses(workdir, config.train.batch_size * config.model.context)


def summarise(workdir, config, tracking, outcome):
    """Draw the loss curve and say how the run ended."""
    from nanoflax import report

    plot = draw(workdir, config)
    if outcome.signal:
        print(f"{outcome.reason}: saved at step {outcome.step}; the same command goes on")
        return
    best = next(
        (
            r
            for r in report.read_metrics(os.path.join(workdir, "metrics.jsonl"))
            if r["step"] == tracking.best_step and "validation_loss" in r
        ),
        {},
    )
    print(
        f"{outcome.reason} at step {outcome.step}; best at step {tracking.best_step}: "
        + json.dumps({k: round(v, 4) for k, v in best.items()})
    )
    print(
        f"loss curve: {plot}\nsample it:  python -m experiments.sample --workdir={workdir} "
        '--prompt="The function returns"'
    )


if __name__ == "__main__":
    launch(main, "pydocs_tiny", data=configs.TextData)
