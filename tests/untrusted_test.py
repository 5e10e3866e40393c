"""Files of strangers: sizes, JSON and links are checked where they are read, in every room."""

import base64
import json
import os
import pathlib
import signal
import struct

import jax
import pytest

from nanoflax import report, tokenizers, untrusted
from nanoflax.errors import UserError
from nanoflax.runs import checkpoint, manifest, step_files
from nanoflax.runs import directory as runs
from tests.campaign import fuzz, seeds
from tests.campaign.mutation import mutate, pack, unpack


@pytest.mark.parametrize(
    "text,said",
    [
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "more than 64 levels"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "more than 64 levels"),
        (b"[" * 10_000_000, "is not JSON"),
        (b'{"a": "\xed\xa0\x80"}', "is not JSON"),
        ('{"a": 1}'.encode("utf-16"), "is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"a": [{"b": "x\\ud800y"}]}', "unpaired surrogate"),
        (b'{"\\uDC00": 1}', "unpaired surrogate"),
        (b"[1]", "must hold an object, not list"),
        (b"NaN", "must hold an object, not float"),
    ],
)
def test_json_of_strangers(text, said):
    with pytest.raises(UserError, match=f"file.json.* {said}") as error:
        untrusted.json_object(text, "file.json")
    assert len(str(error.value)) < 300


def test_json_that_is_right():
    for value in ({"a": "\U0001f600 \\ud800", "b": [[{}]] * 3, "c": 1e308}, {}):
        assert untrusted.json_object(json.dumps(value).encode(), "x") == value
        assert untrusted.json_object(b"\xef\xbb\xbf" + json.dumps(value, ensure_ascii=False).encode(), "x") == value
    assert untrusted.json_object(b'{"a": 1, "a": 2}', "x") == {"a": 2}
    with pytest.raises(UserError, match="'a' is there twice"):
        untrusted.json_object(b'{"b": {"a": 1, "a": 2}}', "x", repeats=False)


def test_a_huge_file_is_not_read(tmp_path):
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(10**12)  # a hole: takes no disk
    with pytest.raises(UserError, match="its 1000000000000 bytes are more than 500000000"):
        untrusted.read_bytes(tmp_path, "a.json")
    os.mkfifo(tmp_path / "b.json")  # opening it would wait for ever
    with pytest.raises(UserError, match="not a file"):
        untrusted.read_bytes(tmp_path, "b.json")


def linked(directory, name):
    """Moves a file out of its directory and links to it."""
    outside = directory.parent / f"outside-{directory.name}-{name}"
    (directory / name).rename(outside)
    (directory / name).symlink_to(outside)


def test_tokenizers_follow_no_links_but_those_of_the_hub_cache(tmp_path):
    for name, tokenizer in (("ours", tokenizers.ByteTokenizer()), ("theirs", None)):
        directory = tmp_path / name
        tokenizer = tokenizer or tokenizers.to_huggingface(tokenizers.ByteTokenizer())
        tokenizer.save(directory)
        hub, blobs = tmp_path / f"{name}-hub" / "snapshots" / "0a", tmp_path / f"{name}-hub" / "blobs"
        hub.mkdir(parents=True)
        blobs.mkdir()
        for file in directory.iterdir():
            (blobs / file.name).write_bytes(file.read_bytes())
            (hub / file.name).symlink_to(f"../../blobs/{file.name}")
        assert tokenizers.load(hub).encode("ab") == tokenizers.load(directory).encode("ab")
        for file in sorted(path.name for path in directory.iterdir()):
            linked(directory, file)
            with pytest.raises(UserError, match=f"{file} is a link out of its directory"):
                tokenizers.load(directory)
            (directory / file).unlink()
            (directory.parent / f"outside-{name}-{file}").rename(directory / file)


def test_a_run_follows_no_links(tmp_path):
    from nanoflax.config import Config

    runs.write_run(str(tmp_path / "run"), Config(), tokenizers.ByteTokenizer())
    linked(tmp_path / "run", "config.json")
    with pytest.raises(UserError, match="config.json is a link"):
        runs.read_run(tmp_path / "run")


@pytest.fixture
def step(tmp_path):
    """The directory of one step of a checkpoint."""
    path = tmp_path / "checkpoints" / "1"
    (path / "state").mkdir(parents=True)
    (path / "state" / "a").write_bytes(b"123")
    (path / "meta").mkdir()
    (path / "meta" / "metadata").write_text("{}")
    manifest.write(path, 1, 1.5)
    assert manifest.find_damage(path) is None
    return path


@pytest.mark.parametrize("name", ["state/a", "state", "meta/metadata", "manifest.json"])
def test_links_in_a_checkpoint_are_damage(step, name):
    outside = step.parent / "outside"
    (step / name).rename(outside)
    (step / name).symlink_to(outside)
    assert f"{pathlib.Path(name).name} is a link" in manifest.find_damage(step)
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.read_metadata(step.parent, log=lambda line: None)


@pytest.fixture
def hurry():
    """A test that waits for a pipe ends after 20 s. (TimeoutError is an OSError, which readers catch.)"""

    def late(*_):
        raise AssertionError("it waits for a pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ["state/a", "manifest.json"])
def test_a_pipe_in_a_checkpoint_is_damage(step, name, hurry):
    (step / "state" / "a").write_bytes(b"")  # as large as a pipe
    manifest.write(step, 1, 1.5)
    (step / name).unlink()
    os.mkfifo(step / name)
    assert manifest.find_damage(step) == f"{pathlib.Path(name).name} is no file"
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.restore_params(step.parent, which="best", log=lambda line: None)
    assert manifest.read_metric(step) == (1.5 if name == "state/a" else None)


def test_a_file_that_another_process_removes_is_no_error(step, monkeypatch):
    found = [*step.rglob("*")]
    monkeypatch.setattr(pathlib.Path, "rglob", lambda path, pattern: [*found, step / "removed"])
    assert manifest.find_damage(step) is None
    gone = next(path for path in found if path.name != "manifest.json" and path.is_file())
    gone.unlink()
    assert gone.name in manifest.find_damage(step)


def test_a_huge_manifest_is_damage(step):
    assert manifest.read_metric(step) == 1.5
    with open(step / manifest.NAME, "ab") as file:
        file.truncate(10**12)  # a hole: takes no disk; to read it would take a terabyte of memory
    assert manifest.find_damage(step) == "manifest.json is missing or damaged"
    assert manifest.read_metric(step) is None


def test_metrics_that_are_a_pipe(tmp_path, hurry):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="metrics.jsonl is no file"):
        report.read_metrics(tmp_path / "metrics.jsonl")
    for step in (0, 1):
        with pytest.raises(UserError, match="metrics.jsonl is no file"):
            report.MetricsLog(tmp_path, tensorboard=False, resume_step=step)


def test_a_run_does_not_name_checkpoints_elsewhere(step, tmp_path, monkeypatch):
    # The user's own account would read, and a resumed run would delete, what the name leads to.
    directory = step.parent
    (directory / ".remote").write_text("gs://bucket/run/checkpoints")
    for open_ in (checkpoint.restore_params, checkpoint.list_steps, checkpoint.Checkpoints):
        with pytest.raises(UserError, match="[.]remote is only for the cache of remote runs"):
            open_(directory)
    (directory / ".remote").unlink()
    assert checkpoint.list_steps(directory) == [1]
    monkeypatch.setenv("NANOFLAX_CACHE", str(tmp_path / "cache"))
    step_files.point_to(copy := step_files.copies() / "reading" / "gs" / "bucket" / "run" / "checkpoints", "gs://b/c")
    monkeypatch.setattr(step_files, "RemotePath", str)
    assert step_files.path_of(copy) == "gs://b/c"


@pytest.mark.parametrize(
    "body",
    [
        {"files": {"../../secret": [3, 0]}},
        {"files": {"/etc/hostname": [3, 0]}},
        {"files": {"state/../../x": [3, 0]}},
        {"files": {"state/a": [3]}},
        {"files": {"state/a": "xy"}},
        {"files": {"state/a": [True, None]}},
        {"files": []},
        {"files": {}, "metric": "nan"},
        {"files": {}, "metric": [1]},
        {},
    ],
)
def test_a_manifest_that_lies_is_damage(step, body):
    # Its own checksum is right, so only what it says can be wrong.
    manifest._write_body(step / manifest.NAME, {"metric": 1.0} | body)
    assert manifest.find_damage(step) == "manifest.json is missing or damaged"
    assert manifest.read_metric(step) is None


def test_a_state_that_orbax_cannot_read_is_one_line(step):
    for name, content in (("_METADATA", b"{"), ("_METADATA", b'{"tree_metadata": 1}'), ("manifest.ocdbt", b"x")):
        (step / "state" / name).write_bytes(content)
        (step / manifest.NAME).unlink()
        manifest.write(step, 1, 1.0)
        with pytest.raises(UserError, match="step 1 cannot be restored"):
            checkpoint.restore_params(step.parent)


def test_a_message_is_one_line_whatever_it_quotes():
    error = UserError("x='\x1b[2J\n\u202e\ud800' é日 \t" + "y" * 10**6)
    assert str(error).startswith("x='\\x1b[2J\\n\\u202e\\ud800' é日 \\ty") and len(str(error)) < 6000


# What the fuzzer found, and what is like it: each refused in one line, at once.


def byte_tokenizer_files(**changes):
    """The files of a tokenizer.json, with changes to its contents; a name with __ is nested."""
    files = dict(tokenizers.to_huggingface(tokenizers.ByteTokenizer()).files)
    spec = json.loads(files["tokenizer.json"])
    for name, value in changes.items():
        *outer, last = name.split("__")
        inner = spec
        for part in outer:
            inner = inner[part]
        inner[last] = value
    return files | {"tokenizer.json": json.dumps(spec).encode()}


GROWING = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
LETTERS = {chr(c): i for i, c in enumerate(range(33, 127))} | {"<|endoftext|>": 100}


@pytest.mark.parametrize(
    "files,said",
    [
        (byte_tokenizer_files(model__vocab=LETTERS | {"x": 2**31}), "the id of 'x' is 2147483648, not a number from 0"),
        (byte_tokenizer_files(model__vocab=LETTERS | {"x": -1}), "the id of 'x' is -1"),
        (byte_tokenizer_files(model__vocab=LETTERS | {"x": True}), "the id of 'x' is True"),
        (byte_tokenizer_files(model__vocab=LETTERS | {"x": 1e300}), "the id of 'x' is 1e[+]300"),
        (byte_tokenizer_files(model__vocab=3), "must hold a vocabulary"),
        (byte_tokenizer_files(normalizer={"type": "Sequence", "normalizers": [GROWING] * 9}), "its normalizer can"),
        (byte_tokenizer_files() | {"added_tokens.json": b'{"<x>": 4000000000}'}, "the id of '<x>' is 4000000000"),
        ({"vocab.json": json.dumps(LETTERS | {"x": 2**31}).encode(), "merges.txt": b""}, "the id of 'x' is 2147483648"),
        (byte_tokenizer_files() | {"tokenizer_config.json": b'{"a": ' + b"[" * 99 + b"]" * 99 + b"}"}, "64 levels"),
    ],
)  # fmt: skip
def test_vocabularies_that_lie(tmp_path, files, said):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        tokenizers.load(tmp_path)


@pytest.fixture(scope="module")
def pieces():
    """The bytes of a SentencePiece model."""
    return tokenizers.train_sentencepiece(["The quick brown fox jumps over the lazy dog.\n" * 3], 289, "unigram").model


def test_sentencepiece_models_that_lie(tmp_path, pieces):
    (tmp_path / "x.model").write_bytes(pieces.replace("\u2581".encode(), b"\xff\xfe\xfd"))
    assert b"\xff\xfe\xfd" in (tmp_path / "x.model").read_bytes()
    with pytest.raises(UserError, match="x.model is not a SentencePiece model"):
        tokenizers.load(tmp_path / "x.model")
    (tmp_path / "spiece.model").write_bytes(pieces)
    for wrong in (10**9, -1, "3", None, 1.5):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": wrong, "eos_token": "<eos>"}))
        with pytest.raises(UserError, match="extra_ids="):
            tokenizers.load(tmp_path)


def with_characters(pieces, table):
    """The files of two tokenizers with this table of what replaces a character."""
    from nanoflax.tokenizers.sentencepiece_schema import model_class

    proto = model_class().FromString(pieces)
    proto.normalizer_spec.precompiled_charsmap = table
    normalizer = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
    named = b'{"eos_token": "<eos>", "extra_ids": 3}'
    return (
        {"spiece.model": proto.SerializeToString(), "tokenizer_config.json": named},
        byte_tokenizer_files(normalizer={"type": "Sequence", "normalizers": [normalizer]}),
    )


def test_tables_of_characters_that_lie(tmp_path, pieces):
    # The library takes eight bytes for every four of the tree, before it reads them: here 8 GB.
    for table in (b"\xff\xff\xff\xff" + bytes(60), b"\x41\0\0\0" + bytes(60), b"\x01"):
        for i, files in enumerate(with_characters(pieces, table)):
            (tmp_path / str(i)).mkdir(exist_ok=True)
            for name, content in files.items():
                (tmp_path / str(i) / name).write_bytes(content)
            with pytest.raises(UserError, match=f"its precompiled_charsmap has {len(table)} bytes"):
                tokenizers.load(tmp_path / str(i))


def test_a_table_of_characters_that_ends_inside_a_text(tmp_path, pieces):
    # The library panics, in Rust, at the first character that the tree does not reach.
    for i, files in enumerate(with_characters(pieces, struct.pack("<II", 4, 1 << 10))):
        (tmp_path / str(i)).mkdir()
        for name, content in files.items():
            (tmp_path / str(i) / name).write_bytes(content)
        tokenizer = tokenizers.load(tmp_path / str(i))
        for encode in (tokenizer.encode, tokenizer.encode_source, lambda text, t=tokenizer: t.encode_batch([text])):
            with pytest.raises(UserError, match="cannot encode: index out of bounds"):
                encode("Hello")


def test_a_sentencepiece_model_whose_end_has_an_odd_name(tmp_path, pieces):
    from nanoflax.tokenizers.sentencepiece_schema import model_class

    for name, kind in (("<x:1>", "CONTROL"), ("$B:2", "CONTROL"), ("<x:1>", "NORMAL")):
        proto = model_class().FromString(pieces)
        end = proto.pieces[proto.trainer_spec.eos_id]
        end.piece, end.type = name, getattr(end, kind)
        (tmp_path / "spiece.model").write_bytes(proto.SerializeToString())
        tokenizer = tokenizers.load(tmp_path)
        assert tokenizer.encode_with_template("fox") == [*tokenizer.encode("fox"), proto.trainer_spec.eos_id]
    proto.trainer_spec.eos_id = -1
    (tmp_path / "spiece.model").write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match="a SentencePiece model as in T5 needs an end of texts, eos_id"):
        tokenizers.load(tmp_path)


def test_a_piece_of_a_gguf_that_takes_hours():
    values = {"tokens": ["<unk>", "<s>", "</s>", "a", "b" * 10**6], "token_type": [2, 3, 3, 1, 1], "scores": [0.0] * 5}
    metadata = {f"tokenizer.ggml.{name}": value for name, value in ({"model": "llama"} | values).items()}
    with pytest.raises(UserError, match="has 1000000 characters, more than 1000"):
        tokenizers.from_gguf(metadata)


def test_a_gguf_whose_names_are_odd():
    tokens = ["a", "<s:", "<s:1", "$A", "b"]
    values = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": [1, 3, 3, 3, 1], "merges": [],
              "add_bos_token": True, "add_eos_token": True}  # fmt: skip
    for bos, eos in ((1, 2), (2, 3), (3, 1)):
        more = {"bos_token_id": bos, "eos_token_id": eos}
        metadata = {f"tokenizer.ggml.{name}": value for name, value in (values | more).items()}
        assert tokenizers.from_gguf(metadata).encode_with_template("ab") == [bos, 0, 4, eos]
    with pytest.raises(UserError, match="tokenizer.ggml.pre is .'gpt-2'.; supported"):
        tokenizers.from_gguf(metadata | {"tokenizer.ggml.pre": ["gpt-2"]})


def test_a_tokenizer_without_ids_for_a_reply(tmp_path):
    nothing = {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}
    files = byte_tokenizer_files(normalizer=nothing)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert tokenizers.chat_prompt(tokenizers.load(tmp_path), [{"role": "user", "content": "Hello"}]) == []


@pytest.mark.parametrize(
    "settings,said",
    [
        ({"peft_type": []}, "peft_type=.* has a wrong type"),
        ({"task_type": {}}, "task_type=.* has a wrong type"),
        ({"modules_to_save": "all"}, "modules_to_save=all has a wrong type"),
        ({"target_parameters": [{}]}, "target_parameters=.* has a wrong type"),
        ({"trainable_token_indices": "1"}, "trainable_token_indices=1 has a wrong type"),
        ({"alpha_pattern": {"((a+)+)+$": 1}}, "not a simple pattern"),
        ({"alpha_pattern": {"[": 1}}, "not a simple pattern"),
        ({"alpha_pattern": {".*.*.*.*x": 1}}, "not a simple pattern"),
    ],
)
def test_adapters_that_lie(tmp_path, settings, said):
    from nanoflax import hf
    from nanoflax.config import preset

    wrong = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "x"} | settings
    (tmp_path / "adapter_config.json").write_text(json.dumps(wrong))
    for open_ in (hf.base_of_adapter, lambda directory: hf.adapted_config(directory, preset("gpt2"))):
        with pytest.raises(UserError, match=said):
            open_(tmp_path)


def test_an_adapter_whose_rank_lies(tmp_path):
    from nanoflax import hf, peft
    from nanoflax.config import AdaLoRA

    config, params = seeds.base()
    lora, adalora = tmp_path / "lora", tmp_path / "adalora"
    lora.mkdir()
    for name, content in seeds.adapters()[0].items():
        (lora / name).write_bytes(content)
    settings = AdaLoRA(rank=2, target_rank=1)
    hf.save_adapter(adalora, config, peft.add(params, settings, jax.random.PRNGKey(0)), settings)
    for directory, field in ((lora, "r"), (adalora, "init_r")):
        hf.load_adapter(directory, config, params)
        path = directory / "adapter_config.json"
        # As many flags or numbers would take terabytes of memory.
        path.write_text(json.dumps(json.loads(path.read_bytes()) | {field: 10**12}))
    hf.load_adapter(lora, config, params)  # its tensors have their own ranks
    with pytest.raises(UserError, match="but the tensors have 2 of init_r=1000000000000"):
        hf.load_adapter(adalora, config, params)


def test_names_of_classes_and_modules_are_safe_to_print(capsys):
    from nanoflax.runs import opening, start
    from nanoflax.tasks import metrics

    name = "\x1b]0;title\x07\x9b2Jcat\u202e"
    opening._print_modules("not needed", {f"{name}/kernel"})
    lines = [start.some([name, "dog"]), *metrics.metrics_table(metrics.classes([name], [name]))]
    lines += capsys.readouterr().err.splitlines()
    assert sum("\\x1b]0;title\\x07\\x9b2Jcat\\u202e" in line for line in lines) == 3
    assert all(report.printable(line) == line for line in lines)


@pytest.mark.parametrize("number", [10**9, -1, 0, "3", 2.0, [1]])
def test_a_number_of_classes_that_lies(number):
    from nanoflax.hf.families import family_of_type
    from nanoflax.hf.family import to_config

    described = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                 "intermediate_size": 16, "max_position_embeddings": 16, "type_vocab_size": 2}  # fmt: skip
    assert to_config(family_of_type("bert"), described | {"num_labels": 3}, "classify").labels == 3
    with pytest.raises(UserError, match="num_labels=.* must be a number from 1 to 1000000"):
        to_config(family_of_type("bert"), described | {"num_labels": number}, "classify")


def test_numbers_of_a_config_that_are_large_integers():
    from nanoflax.hf.families import family_of_type
    from nanoflax.hf.family import to_config

    described = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                 "intermediate_size": 16, "max_position_embeddings": 16}  # fmt: skip
    llama = family_of_type("llama")
    config = to_config(llama, described | {"rope_theta": 3580165449}, "lm")
    assert config.rope == to_config(llama, described | {"rope_theta": 3580165449.0}, "lm").rope
    assert type(config.rope.theta) is float, "JAX has no such integer"
    with pytest.raises(UserError, match=r"model.rope.theta=10{19}... is too large for a float"):
        to_config(llama, described | {"rope_theta": 10**400}, "lm")
    with pytest.raises(UserError, match=r"max_position_embeddings=2147483647 is too large"):
        to_config(llama, described | {"max_position_embeddings": 2**31 - 1}, "lm")  # JAX adds to it


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "x.pth", "x.ckpt", "x.pkl"])
def test_a_pickle_is_refused_by_its_name(tmp_path, name):
    from nanoflax import hf

    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    for source in (tmp_path / name, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
        with pytest.raises(UserError, match=f"{name}: a pickle can run code .* safe_serialization"):
            hf.load(source)
    assert not pathlib.Path("executed").exists() and not (tmp_path / "executed").exists()


def test_code_of_a_model_directory_is_not_run(tmp_path, monkeypatch):
    from nanoflax import hf

    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory, marker = tmp_path / "model", tmp_path / "executed"
    files = next(files for files in fuzz.TARGETS["model"].seeds() if "config.json" in files)
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nfrom transformers import GPT2Config as Theirs\n"
    (directory / "theirs.py").write_text(code)
    described = json.loads(files["config.json"])
    custom = described | {"auto_map": {"AutoConfig": "theirs.Theirs"}, "trust_remote_code": True, "model_type": "own"}
    (directory / "config.json").write_text(json.dumps(custom))
    transformers.AutoConfig.from_pretrained(directory, trust_remote_code=True)
    assert marker.exists(), "the code is right: Transformers runs it if it may"
    marker.unlink()
    (directory / "config.json").write_text(json.dumps(custom | {"model_type": described["model_type"]}))
    hf.load(directory)
    assert not marker.exists()


@pytest.mark.parametrize("delimiter", ['"', "\r"])
def test_a_delimiter_that_divides_nothing(tmp_path, delimiter):
    from nanoflax import tasks

    (tmp_path / "x.csv").write_text(f'sep={delimiter}\ntext{delimiter}label\n"a",b\n')
    with pytest.raises(UserError, match="x.csv:1: sep=.* cannot divide cells"):
        tasks.read(f"csv:{tmp_path}/x.csv", tasks.Classification)


@pytest.mark.parametrize("name", ["safetensors", "index", "gguf", "tokenizer_json", "vocabularies", "template", "jsonl",
                                  "csv", "conll", "text"])  # fmt: skip
def test_some_damage_of_the_fuzzer(tmp_path, name):
    # The fuzzer itself makes a million inputs: python -m tests.campaign.fuzz
    target = fuzz.TARGETS[name]
    for seed, files in enumerate(target.seeds() * 12):
        if seed >= len(target.seeds()):
            files = unpack(mutate(pack(files), 10**6, seed))
        for file, content in files.items():
            (tmp_path / str(seed)).mkdir(exist_ok=True)
            (tmp_path / str(seed) / file).write_bytes(content)
        target.open(tmp_path / str(seed))
