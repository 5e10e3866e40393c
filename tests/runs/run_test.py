"""A run from Python: opened lazily, it generates, predicts, is measured, drawn and exported."""

import json
import sys
import types

import jax
import numpy as np
import pytest

import nanoflax
from nanoflax import runs, tokenizers
from nanoflax.config import Config, ModelConfig, TrainConfig
from nanoflax.errors import UserError
from nanoflax.runs import directory
from nanoflax.runs.generation import GenerationSettings, stream_texts

BYTES = tokenizers.ByteTokenizer()
DECODER = ModelConfig(layers=1, dim=32, heads=2, context=64, vocab_size=BYTES.vocab_size)


def write(workdir, model_config, config=None):
    """A run of no steps in workdir, its parameters drawn at random."""
    model = nanoflax.build(model_config)
    params = nanoflax.init(model, jax.random.PRNGKey(0))
    with runs.Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(0, {"params": params}, {"tokenizer": BYTES.fingerprint, "step": 0})
    directory.write_run(str(workdir), config or Config(model=model_config), BYTES)
    return model, params


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("decoder")
    return workdir, *write(workdir, DECODER)


def test_generate_is_sample_with_its_prompts(decoder):
    workdir, model, params = decoder
    run = nanoflax.open(workdir)
    prompts = ["the", "a longer prompt"]
    ids = [[BYTES.bos_id, *BYTES.encode(prompt)] for prompt in prompts]
    ends = dict(eos_id=BYTES.eos_id, vocab_size=BYTES.vocab_size)
    filters = dict(top_h=0.9, typical_p=0.3, epsilon_cutoff=0.001, eta_cutoff=0.9)
    for settings, options in (
        (dict(temperature=0), dict(temperature=0)),
        (dict(top_k=0, seed=3), dict(temperature=0.8, rng=jax.random.PRNGKey(3))),
        (dict(top_k=0, **filters), dict(temperature=0.8, **filters)),
    ):
        new = nanoflax.sample(model, params, ids, 12, **options, **ends)
        texts = run.generate(prompts, max_new_tokens=12, **settings)
        assert texts == [prompt + BYTES.decode(tokens) for prompt, tokens in zip(prompts, new, strict=True)]
    found = nanoflax.beam_search(model, params, ids[:1], beams=3, max_new_tokens=5, **ends)
    assert run.generate("the", beams=3, max_new_tokens=5) == "the" + BYTES.decode(found[0])
    with pytest.raises(UserError, match="temprature: not a setting of generation"):
        run.generate("the", temprature=0)
    with pytest.raises(UserError, match="context of 64"):
        run.generate("x" * 80)


def test_pieces_are_the_text_up_to_a_stop_string(decoder):
    _, model, params = decoder
    ids = [[BYTES.bos_id, *BYTES.encode(prompt)] for prompt in ("one", "two")]

    def written(**settings):
        pieces = list(stream_texts(model, params, BYTES, ids, GenerationSettings.of(dict(temperature=0) | settings)))
        return ["".join(new) for new in zip(*pieces, strict=True)]

    texts = written(max_new_tokens=40)
    stop = texts[0][len(texts[0]) // 2 :][:2]
    assert written(max_new_tokens=40, stop=stop) == [text.split(stop)[0] for text in texts]
    assert GenerationSettings.of({}, {"beams": 4}).beams == 4
    assert GenerationSettings.of({"temperature": 1.0}, {"beams": 4}).beams == 0


def test_nothing_is_read_before_it_is_needed(decoder, tmp_path, monkeypatch):
    workdir, *_ = decoder
    (workdir / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": 5 - i}) + "\n" for i in (1, 2)))
    monkeypatch.setattr("nanoflax.runs.opening.restore_model", lambda *_: pytest.fail("weights were read"))
    run, shown = nanoflax.open(str(workdir)), []
    assert nanoflax.open(run) is run and run.config.model == DECODER and run.labels == () and run.task is None
    assert run.tokenizer.fingerprint == BYTES.fingerprint
    assert run.plot() == workdir / "loss.png" and run.plot().stat().st_size > 1000
    shell = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=1))
    monkeypatch.setitem(sys.modules, "IPython", shell)
    display = types.SimpleNamespace(Image=lambda path: path, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    assert run.plot() and shown == [str(workdir / "loss.png")]
    for source, words in (("nothing", "nothing: neither a directory"), (tmp_path, "config.json")):
        with pytest.raises(UserError, match=words):
            nanoflax.open(source)
    with pytest.raises(UserError, match="was not fine-tuned"):
        run.predict("a text")


def test_a_text_and_candidates_are_measured(decoder, tmp_path):
    workdir, *_ = decoder
    run = nanoflax.open(workdir)
    (tmp_path / "a.txt").write_text("the model reads this text\n" * 8)
    found = run.evaluate(f"text:{tmp_path}/a.txt")
    for ignored in dict(out="x.jsonl"), dict(reward="length"):
        with pytest.raises(UserError, match="--reward a run of grpo: text has neither"):
            run.evaluate(f"text:{tmp_path}/a.txt", **ignored)
    assert found["bytes"] == 8 * 26 and found["perplexity"] == pytest.approx(np.exp(found["loss"]))
    questions = [{"prompt": "the", "candidates": [" a", " model"], "answer": " a"}]
    ranked = run.rank(questions)
    assert ranked["answers"] == 1 and ranked["rankings"][0]["answer"] == " a"
    (tmp_path / "q.jsonl").write_text(json.dumps(questions[0]))
    path = str(tmp_path / "q.jsonl")
    assert run.rank(path) == run.rank(runs.read_questions(path)) == ranked
    with pytest.raises(UserError, match="question 2 must have a 'prompt'"):
        run.rank([{"prompt": "a", "candidates": ["b"]}, {"prompt": "a", "candidates": []}])
    for call, words in (
        (lambda: run.rank([]), "no question"),
        (lambda: nanoflax.open(workdir, dtype="float3"), "dtype='float3' must be"),
        (lambda: nanoflax.open(workdir, "newest"), "checkpoint='newest' must be"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    with pytest.raises(UserError, match="has no validation data"):
        run.save_pretrained(tmp_path / "theirs")
        nanoflax.open(tmp_path / "theirs").evaluate()


def test_a_model_is_exported_and_imported(decoder, tmp_path):
    workdir, *_ = decoder
    run = nanoflax.open(workdir, dtype="bfloat16")
    run.save_pretrained(tmp_path / "theirs")
    theirs = nanoflax.open(tmp_path / "theirs")
    assert theirs.workdir is None and theirs.config.model == theirs.model.config
    theirs.save_run(str(tmp_path / "back"))
    back = nanoflax.open(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, run.params, back.params)
    assert {x.dtype for x in jax.tree.leaves(back.params)} == {np.dtype("bfloat16")}


@pytest.mark.parametrize("kind", ["classify", "tag", "masked_lm", "translate", "instruct"])
def test_a_fine_tuned_run_does_its_task(kind, tmp_path, capsys):
    from nanoflax.config import TASK_KINDS, ExampleData

    task = TASK_KINDS[kind](length=32)
    head = {"classify": "classify", "tag": "tag", "masked_lm": "mlm"}.get(kind, "lm")
    architecture = {"translate": "encoder_decoder", "instruct": "decoder"}.get(kind, "encoder")
    labels = {"classify": ("cat", "dog"), "tag": ("O", "B-X", "I-X")}.get(kind, ())
    model = ModelConfig(
        layers=1,
        dim=32,
        heads=2,
        context=128,
        vocab_size=261,
        architecture=architecture,
        head=head,
        labels=len(labels) or 1,
        class_names=labels,
        start_id=BYTES.bos_id,
    )
    write(tmp_path, model, Config(model=model, data=ExampleData(), task=task, train=TrainConfig(batch_size=2)))
    run = nanoflax.open(tmp_path)
    texts = ["a cat", "two words and many more than there is room for"]
    found = run.predict(texts, **(dict(max_new_tokens=8) if run.task.prompt else {}))
    assert len(found) == 2 and run.task is not None and run.labels == labels
    if kind == "classify":
        assert sorted(found[0]) == ["cat", "dog"] and sum(found[0].values()) == pytest.approx(1)
        assert list(found[0].values()) == sorted(found[0].values(), reverse=True)
    elif kind == "tag":
        assert [[word for word, _ in words] for words in found] == [text.split() for text in texts]
    else:
        assert all(isinstance(text, str) for text in found)
    if not run.task.prompt:
        assert "longer than" in capsys.readouterr().err
        one = run.predict(texts[0])
        assert run.task.show(one) == run.task.show(found[0])
    with pytest.raises(UserError, match="text 2 is empty after cleaning"):
        run.predict(["a", " "])
