"""experiments.convert and experiments.sample --model, as a person runs them, against Transformers."""

import json

import numpy as np
import pytest

from tests.compiled import apply
from tests.nn.models_test import randomize
from tests.system.programs_test import corpus, pretrain, run  # noqa: F401 (a fixture)

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def exported(corpus, tmp_path_factory):  # noqa: F811
    """A run of ten steps, and the directory that convert makes of it."""
    workdir, directory = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("exported")
    assert pretrain(workdir, corpus, "--config.train.steps=10").returncode == 0
    done = run("convert", f"--from={workdir}", f"--to={directory}")
    assert done.returncode == 0, done.stderr
    return workdir, directory, done


def test_a_run_opens_in_transformers_with_its_tokenizer(exported):
    import torch

    from nanoflax import runs, tokenizers

    workdir, directory, done = exported
    assert "decoder/block_0/attention/query" in done.stdout and "llama: " in done.stdout
    model, params, ours = runs.open_model(str(workdir))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text = "A line of text,\n and naïve é"
    ids = tokenizer(text)["input_ids"]
    assert ids == tokenizers.prompt_ids(ours, text)
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(apply(model, params, np.array([ids]))[0], logits, atol=1e-5)


def test_there_and_back_writes_the_same_text(exported, tmp_path):
    workdir, directory, _ = exported
    back = run("convert", f"--from={directory}", f"--to={tmp_path / 'back'}")
    assert back.returncode == 0, back.stderr
    sampled = [
        run("sample", flag, "--prompt=The", "--temperature=0", "--max_new_tokens=12").stdout
        for flag in (f"--workdir={workdir}", f"--model={directory}", f"--workdir={tmp_path / 'back'}")
    ]
    assert sampled[0] == sampled[1] == sampled[2] and sampled[0].startswith("The")


def test_a_gguf_file_writes_the_same_text(exported, tmp_path):
    workdir, file = exported[0], tmp_path / "x.gguf"
    done = run("convert", f"--from={workdir}", f"--to={file}", "--gguf_type=F32")
    assert done.returncode == 0, done.stderr
    assert f"{file}: llama, " in done.stdout and f"{file.stat().st_size / 1e6:,.1f} MB in " in done.stdout
    assert [*tmp_path.iterdir()] == [file]
    sampled = [
        run("sample", flag, "--prompt=The", "--temperature=0", "--max_new_tokens=12").stdout
        for flag in (f"--workdir={workdir}", f"--model={file}")
    ]
    assert sampled[0] == sampled[1] and sampled[0].startswith("The")


def test_an_encoder_decoder_reads_its_prompt_as_a_source_and_beams_search(tmp_path):
    import tokenizers as library
    import torch

    config = transformers.T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    randomize(theirs, 3, std=0.5)
    theirs.save_pretrained(tmp_path)
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(37))]
    words = library.Tokenizer(library.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    words.pre_tokenizer = library.pre_tokenizers.Whitespace()
    words.post_processor = library.processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>").save_pretrained(
        tmp_path
    )
    done = run("sample", f"--model={tmp_path}", "--prompt=w1 w5 w9", "--beams=3", "--max_new_tokens=5")
    assert done.returncode == 0, done.stderr
    ids = theirs.generate(torch.tensor([[4, 8, 12, 1]]), num_beams=3, max_new_tokens=5, do_sample=False)
    text = transformers.AutoTokenizer.from_pretrained(tmp_path).decode(ids[0], skip_special_tokens=True)
    assert done.stdout.strip() == text.strip() and len(text.split()) >= 3


@pytest.mark.parametrize(
    "program, flags, words",
    [
        ("convert", ["--from=nothing", "--to={tmp}/new"], "nothing: neither a directory"),
        ("convert", ["--from={tmp}", "--to={tmp}"], "is not an empty directory"),
        ("convert", ["--from={tmp}", "--to={tmp}/new"], "config.json"),
        ("convert", ["--from={tmp}", "--to={tmp}/new", "--gguf_type=F16"], "does not end in .gguf"),
        ("convert", ["--from={tmp}", "--to={tmp}/x.gguf", "--dtype=float32"], "--gguf_type decides its numbers"),
        ("sample", [], "give either --workdir, of a run, or --model"),
        ("sample", ["--model={tmp}/encoder"], "model_type='elmo' is not supported"),
    ],
)
def test_misuse_gets_one_line_and_status_2(program, flags, words, tmp_path):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text(json.dumps({"model_type": "elmo"}))
    done = run(program, *(flag.format(tmp=tmp_path) for flag in flags))
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
