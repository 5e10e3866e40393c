"""The names of classes are the model's: read from a Transformers directory, kept, exported, matched with the data."""

import json
import random

import jax
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import nanoflax
from nanoflax.config import Config, ModelConfig, TrainConfig
from nanoflax.config import peft as peft_config
from nanoflax.errors import UserError
from nanoflax.runs.finetune import Finetuning, with_arguments

WORDS = [f"w{c}" for c in "abcdefghijklmnopqrst"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
SIZES = dict(
    vocab_size=len(VOCABULARY),
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
)
KINDS = {  # name: (configuration, class, settings)
    "bert": ("BertConfig", "BertForSequenceClassification", SIZES),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        dict(vocab_size=len(VOCABULARY), dim=32, n_layers=1, n_heads=2, hidden_dim=64, max_position_embeddings=64),
    ),
    "llama": ("LlamaConfig", "LlamaForSequenceClassification", SIZES | dict(pad_token_id=0)),
    "tagger": ("BertConfig", "BertForTokenClassification", SIZES),
}


def published(directory, kind, names, **settings):
    """A random model with these classes, written by Transformers with a tokenizer. Returns the model."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = dict(unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    config, cls, sizes = KINDS[kind]
    numbers = dict(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    config = getattr(transformers, config)(**sizes, **(numbers if names else {}), **settings)
    model = getattr(transformers, cls)(config).eval()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.5)
    model.save_pretrained(directory)
    return model


def theirs(model, directory, texts, sigmoid=False):
    """The probabilities of Transformers for each text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    return [(x.sigmoid() if sigmoid else x.softmax(-1)).numpy() for x in logits]


def texts_of(rng, n):
    return [" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) for _ in range(n)]


def predicted(model, directory, texts):
    """The class of each text, or the tag of each word, by Transformers."""
    names = model.config.id2label
    found = [p.argmax(-1) for p in theirs(model, directory, texts)]
    return [[names[i] for i in x[1:-1].tolist()] if x.ndim else names[x.item()] for x in found]


def labelled(directory, kind, names, texts):
    """The labels of the texts by a random model that knows at least two classes of them."""
    for seed in range(50):
        torch.manual_seed(seed)
        labels = predicted(published(directory, kind, names), directory, texts)
        if len(set(map(str, labels))) > 1:
            return labels
    raise AssertionError("every model gives all texts the same class")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_classes_and_probabilities_are_transformers_after_every_conversion(kind, seed, tmp_path):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    names = rng.sample(["O", "B-PER", "I-PER", "B-a b", "é", "0", "LABEL_1", "Positive"], rng.randint(2, 6))
    several = kind == "bert" and seed == 1
    settings = dict(problem_type="multi_label_classification") if several else {}
    model, texts = published(tmp_path / "a", kind, names, **settings), texts_of(rng, 5)
    expected = theirs(model, tmp_path / "a", texts, several)
    opened = nanoflax.open(tmp_path / "a")
    opened.save_run(str(tmp_path / "b"))
    nanoflax.open(tmp_path / "b").save_pretrained(tmp_path / "c")
    for place in "abc":
        run = nanoflax.open(tmp_path / place)
        assert run.labels == tuple(names) and run.config.model.multi_label == several
        for text, found, p in zip(texts, run.predict(texts), expected, strict=True):
            if kind == "tagger":
                assert found == [(w, names[i]) for w, i in zip(text.split(), p[1:-1].argmax(-1), strict=True)]
            else:
                assert found == pytest.approx(dict(zip(names, p.tolist(), strict=True)), abs=2e-5)
    exported = type(model).from_pretrained(tmp_path / "c").eval()
    assert exported.config.id2label == dict(enumerate(names)) and exported.config.label2id == model.config.label2id
    assert exported.config.problem_type in (model.config.problem_type, "single_label_classification")
    for found, p in zip(theirs(exported, tmp_path / "a", texts, several), expected, strict=True):
        np.testing.assert_allclose(found, p, atol=2e-5)


def start(tmp_path, source, train, kind="classify", **settings):
    """A Finetuning from the source on its own training data, its first parameters, and their metrics."""
    config = with_arguments(None, str(source), train, train, kind, settings.pop("peft", None))
    model = ModelConfig(**vars(config.model) | settings)
    config = Config(**vars(config) | dict(model=model, train=TrainConfig(batch_size=32)))
    finetuning = Finetuning(config, str(tmp_path / "w"))
    params = finetuning.job.load()
    return finetuning, params, finetuning.evaluator(params)[0]


def same(name):
    return name


@pytest.mark.parametrize("kind, seed", [("bert", 0), ("tagger", 1)])
@pytest.mark.parametrize("change", [same, str.upper, lambda name: name.replace(" ", "_")])
def test_a_model_is_right_on_what_it_labelled_itself(kind, change, seed, tmp_path, capsys):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    names = ["O", "B-per", "B-a loc", "B-x"] if kind == "tagger" else ["positive", "negative", "so so", "awful"]
    rng.shuffle(names)
    model, texts = published(tmp_path / "m", kind, names), texts_of(rng, 60)
    labels = predicted(model, tmp_path / "m", texts)
    if kind == "tagger":
        rows = [{"tokens": t.split(), "tags": [change(x) for x in y]} for t, y in zip(texts, labels, strict=True)]
    else:
        rows = [{"text": t, "label": change(y)} for t, y in zip(texts, labels, strict=True)]
    data = write(tmp_path / "d.jsonl", rows)
    task = "tag" if kind == "tagger" else "classify"
    finetuning, _, metrics = start(tmp_path, tmp_path / "m", data, task)
    assert metrics["accuracy"] == 1.0 and finetuning.config.model.class_names == tuple(names)
    assert ("the model names otherwise" in capsys.readouterr().out) == (change is not same)
    found = nanoflax.open(tmp_path / "m").evaluate(data)
    assert found["accuracy"] == 1.0 and found["examples"] == len(texts)


@pytest.mark.parametrize("several", [True, False])
def test_a_model_of_several_classes_stays_one(several, tmp_path):
    torch.manual_seed(0)
    names = ["toxic", "insult", "threat"]
    model = published(tmp_path / "m", "bert", names, problem_type="multi_label_classification")
    texts = texts_of(random.Random(0), 60)
    found = [[names[i] for i in np.flatnonzero(p > 0.5)] for p in theirs(model, tmp_path / "m", texts, True)]
    rows = [{"text": text, "labels": labels} for text, labels in zip(texts, found, strict=True)]
    if not several:  # also if each text of the data has one
        rows = [{"text": row["text"], "label": row["labels"][0]} for row in rows if len(row["labels"]) == 1]
    finetuning, _, metrics = start(tmp_path, tmp_path / "m", write(tmp_path / "d.jsonl", rows))
    assert metrics["accuracy"] == 1.0 and finetuning.config.model.multi_label


def test_numbers_mean_the_classes_in_their_order(tmp_path, capsys):
    names = ["positive", "negative", "neutral"]
    texts = texts_of(random.Random(0), 40)
    labels = [names.index(label) for label in labelled(tmp_path / "m", "bert", names, texts)]
    data = write(tmp_path / "d.jsonl", [{"text": t, "label": y} for t, y in zip(texts, labels, strict=True)])
    assert start(tmp_path, tmp_path / "m", data)[2]["accuracy"] == 1.0
    assert all(f"'{i}' is '{names[i]}'" in capsys.readouterr().out for i in labels[:1])
    assert nanoflax.open(tmp_path / "m").evaluate(data)["accuracy"] == 1.0


def test_known_classes_keep_their_rows_and_new_ones_are_drawn(tmp_path, capsys):
    published(tmp_path / "m", "bert", ["b", "a", "c"])
    data = write(tmp_path / "d.jsonl", [{"text": t, "label": "dac"[i % 2]} for i, t in enumerate(WORDS)])
    finetuning, params, _ = start(tmp_path, tmp_path / "m", data, peft="lora")
    said = capsys.readouterr().out
    assert "classes drawn anew: d; kept from the model: b, a, c" in said
    assert "classes of the model without a training example, kept: b, c" in said
    assert finetuning.config.model.class_names == ("b", "a", "c", "d")
    head, before = params["labels"], nanoflax.open(tmp_path / "m").params["labels"]
    assert head["kernel"].shape == (32, 4) and np.any(np.asarray(head["kernel"])[:, 3])
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new[..., :3], old), {**head}, before)
    assert isinstance(finetuning.config.peft, peft_config.LoRA) and "head" in finetuning.config.peft.trained


def test_a_head_of_other_classes_is_drawn_anew_unless_its_classes_are_named(tmp_path, capsys):
    texts, words = texts_of(random.Random(0), 40), {"LABEL_0": "good", "LABEL_1": "bad"}
    labels = [words[label] for label in labelled(tmp_path / "m", "bert", [], texts)]
    data = write(tmp_path / "d.jsonl", [{"text": t, "label": y} for t, y in zip(texts, labels, strict=True)])
    finetuning, params, _ = start(tmp_path, tmp_path / "m", data)
    assert "the head is drawn anew: none of its classes (LABEL_0, LABEL_1)" in capsys.readouterr().out
    assert finetuning.config.model.class_names == ("bad", "good")
    assert not np.allclose(params["labels"]["kernel"], nanoflax.open(tmp_path / "m").params["labels"]["kernel"])
    finetuning, _, metrics = start(tmp_path, tmp_path / "m", data, class_names=("good", "bad"))
    assert metrics["accuracy"] == 1.0 and finetuning.config.model.class_names == ("good", "bad")
    for names, words in ((("good",), "must name the 2 classes"), (("x", "y"), "the labels of the data are bad, good")):
        with pytest.raises(UserError, match=words):
            start(tmp_path, tmp_path / "m", data, class_names=names)
    with pytest.raises(UserError, match="no usable evaluation example.*unknown label"):
        nanoflax.open(tmp_path / "m").evaluate(data)


def test_what_has_no_classes_is_refused_by_name(tmp_path):
    published(tmp_path / "one", "bert", ["score"])
    data = write(tmp_path / "d.jsonl", [{"text": "wa", "label": "score"}])
    for call in (lambda run: run.predict("wa"), lambda run: run.evaluate(data)):
        with pytest.raises(UserError, match="one number for a text"):
            call(nanoflax.open(tmp_path / "one"))
    path = tmp_path / "one" / "config.json"
    config = json.loads(path.read_text())
    two = {"id2label": {"0": "x", "1": "y"}}
    for changes, words in (
        (two | {"problem_type": "regression"}, "problem_type='regression' with 2 outputs is not supported"),
        ({"id2label": {"0": "x", "2": "y"}}, "id2label must name the classes 0 to 1, not 0, 2"),
        ({"id2label": {"0": "x", "1": "x"}}, "class_names has x twice"),
    ):
        path.write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=words):
            nanoflax.hf.load_config(tmp_path / "one")
    path.write_text(json.dumps(config | {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"y": 1, "x": 0}}))
    assert nanoflax.hf.load_config(tmp_path / "one").class_names == ("x", "y")


def test_models_without_a_next_token_are_not_measured_on_text(tmp_path):
    sizes = dict(layers=1, dim=16, heads=2, context=32, vocab_size=260)
    for model in (
        ModelConfig(architecture="encoder_decoder", **sizes),
        ModelConfig(architecture="encoder", head="mlm", **sizes),
    ):
        run = nanoflax.open(saved_run(tmp_path / model.architecture, model))
        with pytest.raises(UserError, match="fine-tune it"):
            run.evaluate(f"text:{__file__}")


def saved_run(workdir, model):
    """A run of no steps with random parameters."""
    from nanoflax import runs, tokenizers
    from nanoflax.runs import directory

    tokenizer = tokenizers.ByteTokenizer()
    params = nanoflax.init(nanoflax.build(model), jax.random.PRNGKey(0))
    with runs.Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(0, {"params": params}, {"tokenizer": tokenizer.fingerprint, "step": 0})
    directory.write_run(str(workdir), Config(model=model), tokenizer)
    return workdir


def test_a_tagger_without_b_is_right_on_what_it_labelled_itself(tmp_path):
    torch.manual_seed(0)
    model, texts = published(tmp_path / "m", "tagger", ["I-a", "O", "I-b"]), texts_of(random.Random(0), 40)
    labels = predicted(model, tmp_path / "m", texts)
    rows = [{"tokens": text.split(), "tags": tags} for text, tags in zip(texts, labels, strict=True)]
    finetuning, _, metrics = start(tmp_path, tmp_path / "m", write(tmp_path / "d.jsonl", rows), "tag")
    assert metrics["accuracy"] == 1.0 and finetuning.config.model.class_names == ("I-a", "O", "I-b")
