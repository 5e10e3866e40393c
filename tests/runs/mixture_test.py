"""Runs on a mixture of sources: what they log, how they resume, and what they refuse."""

import dataclasses
import json
import math
import shutil

import pytest

import nanoflax
from nanoflax import config as configs
from nanoflax import data, runs, tokenizers
from nanoflax.errors import UserError
from nanoflax.runs import checkpoint
from nanoflax.runs.text_data import training_batches, training_fingerprint

STAGES = "0: web=0.8,code=0.2; 6: web=0.5,code=0.3,math=0.2"
TEXTS = {"web": "a house and a tree ", "code": "for x in y: ", "math": "1 + 2 = 3, "}
FIELDS = {"web": "text", "code": "content", "math": "text"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sources")
    for name, text in TEXTS.items():
        records = [{FIELDS[name]: f"{i} {text}" * (3 + i % 5)} for i in range(130)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = "; ".join(f"{name}=text:{directory}/{name}.jsonl" for name in TEXTS)
    return configs.Config(
        model=configs.ModelConfig(layers=1, dim=16, heads=1, context=32),
        data=configs.TextData(
            train=sources, mixture=STAGES, field="text; code=content", tokenizer="bytes", cache=f"{directory}/cache"
        ),
        train=configs.TrainConfig(
            steps=12,
            batch_size=4,
            accumulate=2,
            evaluate_every=6,
            checkpoint_every=4,
            keep=9,
            sample_tokens=0,
            tensorboard=False,
        ),
    )


def with_data(config, **settings):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **settings))


def records(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """(the directory of a run that nothing interrupted, the Run)."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, nanoflax.pretrain(config, str(workdir))


def batches_of(config):
    """The batches that this run should have read."""
    tokenizer = tokenizers.load("bytes")
    sources = data.sources_of(config.data)
    stores = {name: data.prepare(x, tokenizer, "train", config.data.cache, 1, False) for name, x in sources.items()}
    return training_batches(config, stores)


def test_the_log_has_losses_and_epochs_of_the_sources_that_were_read(config, whole):
    batches, read = batches_of(config), dict.fromkeys(TEXTS, 0)
    steps = [record for record in records(whole[0]) if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 13))
    for step, record in enumerate(steps):
        tokens = dict.fromkeys(TEXTS, 0)
        for (source, *_), weights in zip(batches.describe(step), batches[step]["weights"], strict=True):
            read[source] += 1
            tokens[source] += weights.sum()
        assert {name for name in TEXTS if f"loss/{name}" in record} == {name for name, n in tokens.items() if n}
        parts = math.fsum(record[f"loss/{name}"] * n for name, n in tokens.items() if n)
        assert record["loss"] == pytest.approx(parts / sum(tokens.values()), rel=1e-5)
        for name in TEXTS:
            assert record[f"epoch/{name}"] == read[name] / len(batches.windows[name])
    assert not read["math"] > 6 * 4 and read["math"] >= 4  # a fifth of the second stage


def test_the_validation_loss_is_over_all_sources_and_of_each(config, whole):
    workdir, run = whole
    found = [record for record in records(workdir) if "validation_loss" in record][-1]
    measured = run.evaluate()
    assert measured["loss"] == pytest.approx(found["validation_loss"], rel=1e-6)
    nats = tokens = 0
    for name, source in data.sources_of(config.data).items():
        alone = with_data(config, train=source.name, mixture="", field=FIELDS[name])
        other = runs.Run(str(workdir))
        other.config = alone
        other = other.evaluate()
        assert measured[f"loss/{name}"] == pytest.approx(other["loss"], rel=1e-6)
        assert found[f"validation_loss/{name}"] == pytest.approx(other["loss"], rel=1e-6)
        nats, tokens = nats + other["loss"] * other["tokens"], tokens + other["tokens"]
    assert measured["loss"] == pytest.approx(nats / tokens, rel=1e-6) and measured["tokens"] == tokens


def test_a_run_that_stopped_before_a_stage_goes_on_to_the_bit(config, whole, tmp_path):
    """A killed one does in tests/system/hosts_test.py, whose runs are of mixtures too."""
    shutil.copytree(whole[0], tmp_path / "run")
    for step in checkpoint.list_steps(tmp_path / "run" / "checkpoints")[1:]:
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints") == [4]
    nanoflax.pretrain(config, str(tmp_path / "run"))
    assert records(tmp_path / "run") == records(whole[0])


def test_a_mixture_of_one_source_gives_the_losses_of_that_source(config, tmp_path):
    source = data.sources_of(config.data)["web"].name
    for name, train, mixture in [("plain", source, ""), ("named", f"web={source}", "0: web=1; 3: web=2")]:
        nanoflax.pretrain(with_data(config, train=train, mixture=mixture, field="text"), str(tmp_path / name))
    assert records(tmp_path / "plain") == records(tmp_path / "named")


def test_a_file_gives_the_sources_and_the_stages(config, whole, tmp_path):
    path = tmp_path / "mixture.txt"
    path.write_text("# sources\n" + config.data.train.replace("; ", "\n") + "\n\n" + STAGES.replace("; ", "\n"))
    of_file = data.with_mixture_file(dataclasses.replace(config.data, train=f"mixture:{path}", mixture=""))
    assert of_file == config.data
    # Without steps there is one stage; an editor of Windows begins the file with a mark.
    path.write_text("\ufeffweb = pydocs\ncode=pydocs\nweb = 1/3, code=.5\n")
    of_file = data.with_mixture_file(dataclasses.replace(config.data, train=f"mixture:{path}", mixture=""))
    assert (of_file.train, of_file.mixture) == ("web = pydocs; code=pydocs", "web = 1/3, code=.5")
    path.write_text("# sources\n" + config.data.train.replace("; ", "\n") + "\n\n" + STAGES.replace("; ", "\n"))
    # The run holds the text of the file, so that a change of the file is seen.
    path.write_text(path.read_text().replace("math=0.2", "math=0.3"))
    changed = with_data(config, train=f"mixture:{path}", mixture="")
    with pytest.raises(UserError, match=r"another configuration \(data.mixture: .*math=0.2' -> .*math=0.3'"):
        nanoflax.pretrain(changed, str(whole[0]))


def test_other_text_of_one_source_is_refused_when_the_run_resumes(config, whole, tmp_path):
    batches = batches_of(config)
    fingerprints = set()
    for changed in (config, with_data(config, mixture="0: web=1,code=1,math=1")):
        fingerprints.add(training_fingerprint(batches_of(changed)))
    renamed = dict(zip(("code", "web", "math"), batches.windows.values(), strict=True))
    renamed = data.Mixture(renamed, batches.stages, 4)
    fingerprints.add(training_fingerprint(renamed))
    assert len(fingerprints) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixture": "0: web=1,code=1; 20: math=1"}, "the stage at step 20 never begins: train.steps=12"),
        (
            {"mixture": "0: web=1,code=1,maths=1"},
            "'maths=1' is not NAME=WEIGHT with a name of data.train: web, code, m",
        ),
        ({"mixture": "0: web=1,code=1"}, "no stage uses math"),
        ({"train": "pydocs", "field": "text"}, "data.mixture=.* needs named sources"),
        ({"field": "text; cod=content"}, "data.field: data.train has no source cod; it has web, code, math"),
        ({"validation": "pydocs; web=pydocs"}, "data.validation: give one source for all, or NAME=SOURCE"),
        ({"train": "web=text:/nowhere/*.txt; code=pydocs", "mixture": "", "field": "text"}, "matches no file"),
        ({"train": "web=web.jsonl; code=pydocs", "mixture": "", "field": "text"}, "'web.jsonl' is not known"),
        (
            {"train": "pydocs; text:*.txt", "mixture": "", "field": "text"},
            "several sources need names; write NAME=SOURCE",
        ),
        ({"train": "mixture:/nowhere.txt", "mixture": ""}, "/nowhere.txt cannot be read"),
        ({"train": "1web=pydocs; code=pydocs", "mixture": "", "field": "text"}, "a NAME begins with a letter"),
        ({"train": "web=pydocs; my code=pydocs", "mixture": "", "field": "text"}, "'my code=pydocs' is not NAME=VALUE"),
    ],
)
def test_mistakes_are_refused_before_anything_is_built(config, settings, message, tmp_path):
    with pytest.raises(UserError, match=message) as found:
        nanoflax.pretrain(with_data(config, **settings), str(tmp_path / "run"))
    assert "\n" not in str(found.value) and not (tmp_path / "run").exists()


def test_one_validation_text_for_all_sources(config, whole, tmp_path):
    (tmp_path / "held_out.txt").write_text("for x in a house: 1 + 2\n" * 50)
    run = runs.Run(str(whole[0]))
    run.config = with_data(config, validation=f"text:{tmp_path}/held_out.txt")
    found = run.evaluate()
    assert found["bytes"] == 24 * 50 and found["documents"] == 1 and not [name for name in found if "/" in name]
    # All training text is kept: nothing is held out of the sources.
    windows = batches_of(run.config).windows
    assert [windows[name].store.n_documents for name in TEXTS] == [130] * 3
    assert batches_of(config).windows["web"].store.n_documents < 130


def test_a_missing_field_is_chosen_by_the_name_of_its_source(config, whole, tmp_path):
    for tokenizer in ("bytes", "bpe:300"):  # it is found by tokenizing, or by training a tokenizer
        with pytest.raises(UserError, match=r"content, as in --config.data.field='text; code=content'$"):
            nanoflax.pretrain(with_data(config, field="text", tokenizer=tokenizer), str(tmp_path / "run"))
    run, code = runs.Run(str(whole[0])), data.sources_of(config.data)["code"].name
    with pytest.raises(UserError, match="content, as in --fields=text=content$"):
        run.evaluate(code)  # its field is that of sources without a name, not "text; code=content"
    assert run.evaluate(code, fields="text=content")["documents"] == 130


def test_shared_evaluation_text_is_read_in_the_field_of_sources_without_a_name(config, tmp_path):
    copy = f"5 {TEXTS['code']}" * 3  # of a document of code, whose field is content
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"text": copy}) + "\n")
    held_out = f"text:{tmp_path}/held_out.jsonl"
    for settings in ({"validation": held_out}, {"evaluation": held_out}):
        changed = with_data(config, decontaminate=8, **settings)
        kept = [*data.documents(data.sources_of(changed.data)["code"], "train")]
        assert len(kept) > 100 and not any(text.startswith("5 for") for text in kept)
    (validation,) = data.validation_of(with_data(config, validation=held_out).data).values()
    assert [*data.documents(validation, "validation")] == [copy]


def test_tokens_in_a_mixture_have_no_field():
    config = configs.TextData(train="a=tokens:x; b=text:y; c=text:z", field="content; c=body")
    assert [source.field for source in data.sources_of(config).values()] == ["text", "content", "body"]


def test_an_empty_source_is_named_also_if_a_tokenizer_is_trained(config, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    train = config.data.train.replace("math=", f"math=text:{tmp_path}/empty.jsonl; rest=")
    with pytest.raises(UserError, match="empty.jsonl' has no text for its train split: files without a text: 1"):
        nanoflax.pretrain(with_data(config, train=train, mixture="", tokenizer="bpe:300"), str(tmp_path / "run"))
