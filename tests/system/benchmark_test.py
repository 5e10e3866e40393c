"""experiments.benchmark: what is counted, the order of the rounds, the warning of other load, `all`."""

import io
import itertools
import json
import re
import types

import jax
import pytest

import nanoflax
from experiments.benchmarks import everything, packing, rounds, serving, sides, tokenizing, where
from nanoflax import data, planning, tasks
from nanoflax.errors import UserError

TINY = {kind: sides.Job(kind, "tiny", 2, 1, 4) for kind in ("train", "decode", "encode")}


class Side:
    """A side that answers at once; writes its rounds into `log`. The side `broken` ends before it is ready."""

    pid, kill = 1, lambda self: None

    def __init__(self, name, log, seconds, broken=False, cpu=True):
        facts = {"cpu": cpu, "what": "w", "device": "d", "tokens": 6, "work": 6.0, "limit": "flops", "peak": None,
                 "formula": "f"}  # fmt: skip
        answers = itertools.chain([facts], itertools.repeat({"seconds": seconds, "flops": 10.0}))
        self.stdin, self.stdout = io.StringIO(), types.SimpleNamespace()
        self.stdin.write = lambda word: log.append(name)
        self.stdout.readline = lambda: "" if broken else json.dumps(next(answers))

    def poll(self):
        return 0


def measured(monkeypatch, names, num_rounds, compiler="g++", **options):
    log = []
    seconds = {"nanoflax": 0.5, "machine": 1.0, "torch": 1.0, "compiled": 0.75}
    monkeypatch.setattr(rounds, "compiler", lambda: compiler)
    monkeypatch.setattr(
        rounds, "_start", lambda _, name: Side(name, log, seconds[name], **options.get(name, options.get("all", {})))
    )
    return (*rounds.measure([], names, num_rounds), log)


def test_every_two_rounds_run_each_pair_of_sides_in_both_orders(monkeypatch, capsys):
    names = ["nanoflax", "machine", "torch", "compiled"]
    facts, results, log = measured(monkeypatch, names, 4)
    turns = [log[i : i + 4] for i in range(0, 16, 4)]
    assert all(sorted(turn) == sorted(names) for turn in turns)
    for a, b in itertools.combinations(names, 2):
        assert [turn.index(a) < turn.index(b) for turn in turns] in ([True, False] * 2, [False, True] * 2)
    rounds.summarise("train", facts | {"other_load": 0.3}, results)
    out = capsys.readouterr().out
    assert "2.00 times as fast as eager PyTorch" in out and "1.50 times as fast as torch.compile" in out
    assert "120% of the measured matrix-product rate" in out  # 6 / 0.5 s of 10 a second
    assert "warning: other work took 30%" in out


@pytest.mark.parametrize(
    "options, left",
    [
        ({"compiled": {"broken": True}}, ["nanoflax", "machine", "torch"]),
        ({"compiler": None}, ["nanoflax", "machine", "torch"]),
        ({"nanoflax": {"cpu": False}}, ["nanoflax"]),
        ({"nanoflax": {"cpu": False}, "torch": {"cpu": False}}, ["nanoflax", "torch"]),
    ],
)
def test_sides_that_cannot_run_here_are_left_out(options, left, monkeypatch, capsys):
    facts, results, _ = measured(monkeypatch, ["nanoflax", "machine", "torch", "compiled"], 2, **options)
    assert [*results] == left
    rounds.summarise("train", facts, results)
    words = "needs a C++ compiler" if "compiler" in options else "limit" if len(left) == 1 else "2.00 times"
    assert words in capsys.readouterr().out


def test_another_side_that_ends_early_is_an_error(monkeypatch):
    with pytest.raises(UserError, match="side torch"):
        measured(monkeypatch, ["nanoflax", "torch"], 1, torch={"broken": True})


def test_other_load_is_what_the_sides_did_not_use():
    assert rounds.other_load((100, 50, 0), (200, 110, 40)) == pytest.approx(0.2)
    assert rounds.other_load(None, (1, 1, 1)) is None
    assert not rounds.load_warning({"other_load": 0.04}) and not rounds.load_warning({"other_load": None})


@pytest.mark.parametrize("bias", [True, False])
def test_both_sides_train_the_same_parameters(bias):
    pytest.importorskip("torch")
    from experiments.benchmarks import torch_sides

    job = sides.Job("train", "tiny", 2, 1, bias=bias)
    facts, _ = torch_sides.torch_side(job)
    shapes = nanoflax.parallel.param_shapes(nanoflax.build(job.decoder))
    assert facts["parameters"] == sum(x.size for x in jax.tree.leaves(shapes))


def test_decoding_counts_weights_and_cache():
    facts, run = sides.nanoflax_side(TINY["decode"])
    c = TINY["decode"].decoder
    matrices = c.vocab_size * c.dim + c.layers * 12 * c.dim**2
    assert facts["weight_bytes"] == pytest.approx(4 * 4 * matrices, rel=0.03)  # float32, 4 tokens; and biases, norms
    assert facts["cache_bytes"] == 2 * (16 + 17 + 18 + 19) * c.layers * 2 * c.dim * 4
    assert run() is None and facts["tokens"] == 8


def test_the_batch_is_the_largest_whose_plan_fits():
    config = TINY["train"].decoder
    need = sides.planned_bytes(config, 16)
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1.01 * need / sides.USED_MEMORY})
    B = sides.batch_that_fits(config, device)
    assert B == 16 and sides.planned_bytes(config, 32) > 1.01 * need


def test_all_writes_a_table_and_strict_json(monkeypatch, tmp_path, capsys):
    def measure(arguments, names, num_rounds):
        if arguments[0] == "decode":
            raise UserError("the side nanoflax of the benchmark ended early")
        facts, run = sides.nanoflax_side(TINY[arguments[0]])
        run()
        return facts | {"other_load": None}, {"nanoflax": [{"seconds": 0.5}], "machine": [{"flops": 1e9}]}

    monkeypatch.setattr(rounds, "measure", measure)
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    path = tmp_path / "figures.json"
    assert everything.measure_all({"shape": "tiny"}, 1, str(path)) == 1  # decoding failed
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    rows = {row["command"].split()[0]: row for row in found["measurements"]}
    assert rows["train"]["tokens_per_second"] == 2 * 64 / 0.5 and "ended early" in rows["decode"]["error"]
    flops = planning.flops_per_token(TINY["train"].decoder) * 128
    assert rows["train"]["share_of_limit"] == pytest.approx(flops / 0.5 / 1e9)
    assert rows["train"]["compiler_bytes"] > rows["train"]["planned_bytes"] / 2
    out = capsys.readouterr().out
    assert all(row["command"] in out for row in found["measurements"]) and "GiB used" in out
    with pytest.raises(UserError, match="--out=.* cannot be written"):
        everything.measure_all({}, 1, str(tmp_path))


def test_operations_at_the_same_time_share_it():
    times = where.seconds_of_ops([(0, 4, "a"), (1, 3, "b"), (6, 7, "a"), (1, 2, "b")])
    assert times["a"] == pytest.approx(1 + 1 / 3 + 1 / 2 + 1 + 1) and times["b"] == pytest.approx(2 / 3 + 1 / 2)


@pytest.mark.parametrize(
    "opcode, shape, name, kind",
    [
        ("dot", (64, 256), "transpose(jvp(Decoder.hidden))/decoder/block_0/mlp/up/transpose", "products with weights"),
        ("dot", (64, 64), "jvp(Decoder.hidden)/attention/attention.attend/out/dot_general", "products with weights"),
        ("dot", (4, 2, 8, 8), "jvp()/attention.attend/bgntk,bgsk->bgnts/dot_general", "attention: scores"),
        ("dot", (1, 64), "transpose(jvp(Decoder.hidden))/mlp/up/dot_general", "sums of bias"),
        ("fusion", (64,), "transpose(jvp(Decoder.hidden))/decoder/block_0/mlp/down/reduce_sum", "sums of bias"),
        ("fusion", (4, 64), "jvp(Decoder.hidden)/decoder/block_0/block_0._before/norm_mlp/mul", "norms"),
        ("fusion", (4, 64), "jvp(Decoder.hidden)/decoder/block_0/mlp/tanh", "activations"),
        ("fusion", (4,), "jvp()/log", "loss"),
        ("fusion", (4,), "is_finite", "optimizer"),
        ("copy", (4,), "", "copies"),
    ],
)
def test_an_operation_has_a_kind(opcode, shape, name, kind):
    assert where.Op(opcode, shape, [], "", f"jit(step)/{name}" if name else "").kind.startswith(kind)


def test_the_products_of_a_program_are_measured_alone():
    def f(a, b):
        return jax.numpy.tanh(jax.numpy.einsum("bij,bjk->bik", a, b))

    arrays = jax.numpy.ones((2, 8, 16)), jax.numpy.ones((2, 16, 4))
    ops = where.parse_program(jax.jit(f).lower(*arrays).compile().as_text())
    (dot,) = [op for op in ops.values() if op.opcode == "dot"]
    assert where.alone(dot, ops)[1] == 2 * 2 * 8 * 16 * 4 and "dot_general" in dot.op_name
    assert {op.shape for op in ops.values()} >= {(2, 8, 16), (2, 16, 4), (2, 8, 4)}


def test_the_table_accounts_for_the_step(capsys):
    where.print_table(TINY["train"])
    out = capsys.readouterr().out
    rows = re.findall(r"^([^\d\n]+?) +[\d.]+ +([\d.]+)%(?: +[\d.]+ +([\d.]+)%)?$", out, re.MULTILINE)
    shares = {kind: float(share) for kind, share, _ in rows}
    assert sum(shares.values()) == pytest.approx(100, abs=1) and shares["products with weights"] > 1
    assert {kind for kind, _, products in rows if products} >= {"products with weights"}
    assert re.search(r"all products, each alone: [\d.]+ ms, [\d.]+% of the step, \d+ GFLOP/s", out)


def test_a_batch_that_does_not_fit_after_all_is_halved(monkeypatch, capsys):
    sizes = []

    def train_batch(job, device, B):
        sizes.append(B)
        if B > 16:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return {"B": B}, lambda: None

    monkeypatch.setattr(sides, "_train_batch", train_batch)
    monkeypatch.setattr(sides, "batch_that_fits", lambda config, device: 64)
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1})
    assert sides._train(sides.Job("train", "gpt2", alone=True), device)[0] == {"B": 16} and sizes == [64, 32, 16]
    assert "B=64 does not fit; trying half of it" in capsys.readouterr().err
    with pytest.raises(jax.errors.JaxRuntimeError):  # a batch that was asked for is not changed
        sides._train(sides.Job("train", "gpt2", batch_size=64, alone=True), device)


def test_packed_and_padded_sides_train_the_same_tokens(monkeypatch, capsys):
    def chat(words):
        return tasks.Chat(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * words}))

    examples = [chat(40 if i % 10 == 0 else i % 5) for i in range(70)]
    seen = {}
    monkeypatch.setattr(packing, "summarise", lambda found, other_load: seen.update(found))
    monkeypatch.setattr(packing.train, "jit_step", lambda *_: lambda state, batch: (state, batch))  # compiles nothing
    packing.measure_packing(sides.Job("train", "tiny", 8, 1), 2, examples)
    out = capsys.readouterr().out
    assert "packing: 70 chats, mean 2" in out and "longest 59" in out
    assert float(re.search(r"relative difference (\S+)", out)[1]) < 1e-6
    many, few, pooled, plain = seen.values()
    share = lambda of: sum(tokens for _, tokens, _ in of) / sum(positions for *_, positions in of)
    assert min(share(many), share(few)) > 0.85 > share(pooled) > share(plain) > 0.2
    for of in (many, few, pooled):
        assert sum(tokens for _, tokens, _ in of) == pytest.approx(sum(tokens for _, tokens, _ in plain), rel=0.25)
    monkeypatch.undo()
    packing.summarise({"packed": [(1.0, 60, 60), (1.0, 40, 60)], "padded": [(3.0, 60, 99), (2.0, 40, 99)]}, 0.5)
    out = capsys.readouterr().out
    assert "packed: 2.50 times as fast (2.00 to 3.00)" in out and "other work took 50%" in out


def test_served_replies_equal_those_one_by_one(monkeypatch, capsys):
    monkeypatch.setattr(serving, "REQUESTS", 5)
    serving.measure_serving(sides.Job("serve", "tiny"), 1, slots=2)
    out = capsys.readouterr().out
    assert "round 1: 5 of 5 replies are equal" in out
    assert "time to the first token" in out and "times as fast" in out


def test_both_sides_of_tokenize_read_the_same_text(tmp_path):
    path = tmp_path / "corpus.jsonl"
    size = tokenizing.write_corpus(path, 200_000)
    texts = [text for chunk in tokenizing.chunks(path) for text in chunk]
    assert texts == list(data.documents(f"text:{path}", "all")) and size == sum(len(x.encode()) for x in texts)
    assert 200_000 <= size < 220_000
