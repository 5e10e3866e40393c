"""Adapters of the peft library and of ours compute the same, with every setting of peft drawn at random."""

import random
import re

import numpy as np
import pytest

from nanoflax import hf
from nanoflax.errors import UserError
from nanoflax.nn import build
from tests.compiled import apply

V, COMPARED = 64, 1  # comparisons of each base; more for a longer search
IDS = np.random.default_rng(0).integers(5, V, (2, 7))
SIZES = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
             max_position_embeddings=64, initializer_range=0.3)  # fmt: skip
LLAMA = SIZES | dict(num_key_value_heads=2)
GPT2 = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
BART = dict(vocab_size=V, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
            init_std=0.3)  # fmt: skip
T5 = dict(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
NO_PAD = dict(pad_token_id=None, bos_token_id=1, eos_token_id=2)
# name -> (class, sizes, names of Linears, names of embeddings and output layers)
BASES = {
    "llama": ("LlamaForCausalLM", LLAMA | dict(tie_word_embeddings=False),
              "q_proj k_proj v_proj o_proj gate_proj down_proj", "embed_tokens lm_head"),
    "llama-tied": ("LlamaForCausalLM", LLAMA | dict(tie_word_embeddings=True, attention_bias=True),
                   "q_proj v_proj up_proj", "embed_tokens lm_head"),
    "phi3": ("Phi3ForCausalLM", LLAMA | NO_PAD, "qkv_proj gate_up_proj o_proj down_proj", "embed_tokens lm_head"),
    "gpt2": ("GPT2LMHeadModel", GPT2, "c_attn c_fc attn.c_proj mlp.c_proj", "wte wpe lm_head"),
    "neox": ("GPTNeoXForCausalLM", SIZES, "query_key_value dense dense_h_to_4h", "embed_in lm_head"),
    "opt": ("OPTForCausalLM", dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
                                   max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.3),
            "q_proj k_proj fc1", "embed_tokens lm_head"),
    "opt-350m": ("OPTForCausalLM", dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                        ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=24, init_std=0.3,
                                        do_layer_norm_before=False),
                 "q_proj project_in project_out fc1", "embed_tokens"),
    "glm4": ("Glm4ForCausalLM", LLAMA | NO_PAD | dict(head_dim=8), "q_proj gate_up_proj down_proj",
             "embed_tokens lm_head"),
    "nanochat": ("NanoChatForCausalLM", LLAMA, "k_proj o_proj fc1 fc2", "embed_tokens lm_head"),
    "cohere2": ("Cohere2ForCausalLM", LLAMA, "k_proj o_proj gate_proj", "embed_tokens lm_head"),
    "t5": ("T5ForConditionalGeneration", T5, "q v wo", "shared encoder.embed_tokens lm_head"),
    "bart": ("BartForConditionalGeneration", BART, "q_proj out_proj fc1", "shared decoder.embed_tokens lm_head"),
    "bert": ("BertForMaskedLM", SIZES, "query value intermediate.dense", "word_embeddings decoder"),
    "bert-classes": ("BertForSequenceClassification", SIZES | dict(num_labels=3), "query key output.dense",
                     "word_embeddings classifier"),
    "roberta-classes": ("RobertaForSequenceClassification", SIZES | dict(num_labels=3, pad_token_id=1), "query value",
                        "word_embeddings classifier"),
    "distilbert-classes": ("DistilBertForSequenceClassification",
                           dict(vocab_size=V, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64,
                                initializer_range=0.3, num_labels=3), "q_lin lin1", "word_embeddings classifier"),
    "bert-tags": ("BertForTokenClassification", SIZES | dict(num_labels=5), "query value", "word_embeddings"),
    "llama-classes": ("LlamaForSequenceClassification", LLAMA | NO_PAD | dict(num_labels=3), "q_proj v_proj", "score"),
}  # fmt: skip
TASKS = {"CausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ConditionalGeneration": "SEQ_2_SEQ_LM",
         "SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """name -> directory of a model with random weights, written when it is first asked for."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    root, made = tmp_path_factory.mktemp("bases"), {}

    def directory(name):
        if name not in made:
            cls, sizes = BASES[name][:2]
            torch.manual_seed(0)
            cls = getattr(transformers, cls)
            model = cls(cls.config_class(**sizes))
            for parameter in model.parameters():  # biases and norms are not all 0 or 1
                parameter.data += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(root / name)
            made[name] = root / name
        return made[name]

    return directory


def theirs(model):
    """The logits of a model of Transformers or peft."""
    import torch

    ids = torch.tensor(IDS)
    found = []
    with torch.no_grad():
        for row in ids[:, None]:  # without padding, a decoder classifies one text at a time
            more = {"decoder_input_ids": row} if model.config.is_encoder_decoder else {}
            found.append(model.eval()(input_ids=row, **more).logits[0].numpy())
    return np.stack(found)


def ours(config, params):
    """The logits of our model."""
    source = {"source": IDS} if config.reads_source else {}
    y = apply(build(config), params, IDS, **source)
    return np.asarray(y[0] if isinstance(y, tuple) else y)


def base_model(directory, name):
    import transformers

    return getattr(transformers, BASES[name][0]).from_pretrained(directory)


def draw(rng, name):
    """Settings of peft's LoraConfig for a base."""
    _, _, linears, tables = BASES[name]
    linears, tables = linears.split(), tables.split()
    some = lambda names: rng.sample(names, rng.randint(1, len(names)))
    maybe = lambda value, share=0.3: rng.random() < share and value
    targets = rng.choice(
        [None, "all-linear", some(linears), some(linears), "|".join(rf".*\.{x}" for x in some(linears))]
    )
    c = {"r": rng.choice([2, 4]), "lora_alpha": rng.choice([3, 8]), "target_modules": targets}
    if isinstance(targets, list) and maybe(True):
        c["target_modules"] = targets + some(tables)
    elif maybe(True):
        c["modules_to_save"] = some(tables)
    elif maybe(True, 0.4):
        c["trainable_token_indices"] = rng.sample(range(V), 5)
    if isinstance(targets, list) and maybe(True):
        c["layers_to_transform"] = [1]
    c |= {
        "use_rslora": maybe(True), "use_dora": maybe(True), "lora_dropout": maybe(0.1) or 0.0,
        "bias": rng.choice(["none", "none", "all", "lora_only"]),
        "init_lora_weights": rng.choice([True, "gaussian", "orthogonal"]),
        "rank_pattern": maybe({rng.choice(linears): 6}) or {}, "alpha_pattern": maybe({rng.choice(linears): 5}) or {},
        "exclude_modules": maybe([rng.choice(linears)]) or None, "ensure_weight_tying": maybe(True),
        "lora_bias": maybe(True, 0.1),
    }  # fmt: skip
    c["task_type"] = next((task for end, task in TASKS.items() if BASES[name][0].endswith(end)), None)
    return c


def tuned(base, name, settings, seed):
    """A model of peft with random adapters; None if peft refuses the settings."""
    import peft
    import torch

    torch.manual_seed(seed)
    try:
        model = peft.get_peft_model(base_model(base, name), peft.LoraConfig(**settings))
    except (ValueError, RuntimeError, AttributeError, KeyError, TypeError, NotImplementedError):
        return None
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn_like(parameter)
            parameter.data += 0.1 * (noise.abs() if "magnitude" in path else noise)
    return model


def read_back(base, name, directory):
    """The logits of peft with the adapters of a directory."""
    import peft

    return theirs(peft.PeftModel.from_pretrained(base_model(base, name), directory))


def loaded(base, directory):
    config, params = hf.load(base)
    config = hf.adapted_config(directory, config)
    return config, *hf.load_adapter(directory, config, params)


REFUSED = "has no bias here, so the bias of its lora_B|the adapters change them differently|without its bias"
NOT_WRITTEN = "only a part of|cannot both adapt|in no module that peft could save|no Linear has an adapter"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BASES)
def test_adapters_of_peft_compute_the_same_here_and_written_back(name, bases, tmp_path):
    base, rng, count = bases(name), random.Random(name), 0
    for draws in range(60):
        model = tuned(base, name, settings := draw(rng, name), draws)
        if model is None:
            continue
        adapter = tmp_path / str(draws)
        want = theirs(model)
        model.save_pretrained(adapter)
        scale = np.abs(want).max()
        try:
            if np.abs(read_back(base, name, adapter) - want).max() > 1e-4 * scale:
                continue  # peft itself does not read these settings back
        except (KeyError, RuntimeError, ValueError):
            continue
        try:
            config, params, c = loaded(base, adapter)
        except UserError as error:
            assert re.search(REFUSED, str(error)), (settings, error)
            continue
        np.testing.assert_allclose(ours(config, params), want, atol=1e-4 * scale, err_msg=str(settings))
        count += 1
        try:
            hf.save_adapter(tmp_path / f"{draws}-ours", config, params, c, base=base)
        except UserError as error:
            assert re.search(NOT_WRITTEN, str(error)), (settings, error)
        else:
            again = read_back(base, name, tmp_path / f"{draws}-ours")
            np.testing.assert_allclose(again, want, atol=1e-4 * scale, err_msg=str(settings))
        if count == COMPARED:
            return
    raise AssertionError(f"{name}: only {count} of the draws could be compared")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, kind", [("llama", "Prefix"), ("neox", "Prefix"), ("llama", "Prompt"), ("gpt2", "Prompt")]
)
def test_virtual_tokens_of_peft_are_the_same_here_and_written_back(name, kind, bases, tmp_path):
    import peft
    import torch

    settings = getattr(peft, f"{kind}TuningConfig")(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(base_model(bases(name), name), settings)
    torch.manual_seed(0)
    for path, parameter in model.named_parameters():
        if "prompt" in path:
            parameter.data = torch.randn_like(parameter) / 2
    model.save_pretrained(tmp_path / "theirs")
    if name == "gpt2":
        with pytest.raises(UserError, match="for positions='learned': peft counts those of the text from after"):
            loaded(bases(name), tmp_path / "theirs")
        return
    want = theirs(model)[:, -IDS.shape[1] :]  # with a prompt, peft returns its logits too
    config, params, c = loaded(bases(name), tmp_path / "theirs")
    scale = np.abs(want).max()
    np.testing.assert_allclose(ours(config, params), want, atol=1e-4 * scale)
    hf.save_adapter(tmp_path / "ours", config, params, c, base=bases(name))
    again = read_back(bases(name), name, tmp_path / "ours")[:, -IDS.shape[1] :]
    np.testing.assert_allclose(again, want, atol=1e-4 * scale)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_ranks_that_adalora_has_pruned_are_gone_here_too(name, bases, tmp_path):
    import peft
    import torch

    settings = dict(init_r=4, target_r=2, tinit=1, tfinal=1, total_step=6, deltaT=1, lora_alpha=6)
    model = peft.get_peft_model(base_model(bases(name), name), peft.AdaLoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(0)
    for path, parameter in model.named_parameters():
        if "lora_" in path:
            parameter.data = 0.3 * torch.randn_like(parameter)
    for step in range(7):
        model(input_ids=torch.tensor(IDS)).logits.square().mean().backward()
        model.base_model.update_and_allocate(step)
    assert model.peft_config["default"].rank_pattern
    model.save_pretrained(tmp_path)
    want = read_back(bases(name), name, tmp_path)
    config, params, c = loaded(bases(name), tmp_path)
    np.testing.assert_allclose(ours(config, params), want, atol=1e-4 * np.abs(want).max())
    if name == "llama":
        hf.save_adapter(tmp_path / "ours", config, params, c, base=bases(name))
        again = read_back(bases(name), name, tmp_path / "ours")
        np.testing.assert_allclose(again, want, atol=1e-4 * np.abs(want).max())
