"""A run on chats: what ends a reply and the date of a template are those of the run, on every road."""

import datetime
import json
import types

import jax
import pytest
import transformers

import nanoflax
from nanoflax import tokenizers
from nanoflax.config import Config, Instruct, ModelConfig, OptimConfig, TrainConfig
from nanoflax.runs import vocabulary
from nanoflax.runs.start import texts_of
from nanoflax.tasks import Chat, Tagging
from tests.tokenizers.chat_test import TEMPLATES, make, without_marks

SPECIAL, CHATML = TEMPLATES["eos is another token than the end of a reply"]
TEMPLATE = "{{ strftime_now('%d %B %Y') + '\n' }}" + without_marks(CHATML)
CHAT = [{"role": "user", "content": "grass?"}, {"role": "assistant", "content": "Green."}]


@pytest.fixture
def base(tmp_path):
    """A published model whose chat template reads the date."""
    (tmp_path / "tokenizer").mkdir()
    tokenizer, _ = make(tmp_path / "tokenizer", SPECIAL, TEMPLATE)
    config = ModelConfig(layers=1, dim=32, heads=2, context=64, vocab_size=tokenizer.vocab_size)
    params = nanoflax.init(nanoflax.build(config), jax.random.PRNGKey(0))
    nanoflax.hf.save(tmp_path / "base", config, params, tokenizer)
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_id}))
    return tmp_path / "base"


def set_date(monkeypatch, *day):
    clock = types.SimpleNamespace(now=lambda: datetime.datetime(*day), fromisoformat=datetime.datetime.fromisoformat)
    monkeypatch.setattr(vocabulary, "datetime", types.SimpleNamespace(datetime=clock))


def test_the_date_is_that_of_the_start_and_the_reply_ends(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    train = TrainConfig(steps=2, batch_size=2, evaluate_every=2, tensorboard=False)
    config = Config(task=Instruct(length=64), train=train, optim=OptimConfig(warmup_steps=0))
    source = f"jsonl:{tmp_path}/t.jsonl"
    start = lambda: nanoflax.finetune(base, source, validation=source, config=config, workdir=str(tmp_path / "run"))
    set_date(monkeypatch, 2001, 2, 3)
    start()
    said = capsys.readouterr().out
    assert "the chat template reads the date; this run always writes 2001-02-03" in said
    assert "  | ⟦Green.<|im_end|>⟧" in said and "  | 03 February 2001" in said
    set_date(monkeypatch, 2002, 1, 1)
    run = start()  # resumes, and measures again
    assert "2002" not in capsys.readouterr().out
    run.save_pretrained(tmp_path / "exported")
    ends = [run.tokenizer.special[name] for name in ("<|endoftext|>", "<|im_end|>")]
    assert json.loads((tmp_path / "exported" / "generation_config.json").read_text())["eos_token_id"] == ends
    assert tokenizers.stop_ids(run.tokenizer) == (*ends,)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    for workdir in (tmp_path / "run", tmp_path / "run" / "final", tmp_path / "exported"):
        prompt = tokenizers.chat_prompt(nanoflax.open(workdir).tokenizer, CHAT[:1])
        assert prompt == theirs.apply_chat_template(CHAT[:1], add_generation_prompt=True)["input_ids"]
    assert "03 February 2001" in theirs.decode(prompt)


def test_a_tokenizer_is_trained_on_chats_with_calls_of_tools():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    messages = ({"role": "user", "content": "2+2?"}, call, call | {"content": None}, {"role": "tool", "content": "4"})
    assert "".join(texts_of([Chat(messages, "here")])) == "2+2?4"
    assert [*texts_of([Tagging(("two", "words"), ("O", "B-x"))])] == ["two words"]  # names of classes are no text
