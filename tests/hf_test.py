"""Against Transformers, every family: logits, gradients, generation, and the way there and back."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from nanoflax import families, hf
from nanoflax.errors import UserError
from nanoflax.models import build
from nanoflax.sampling import sample

V, T = 67, 20
LENGTHS, LEFT = (20, 13, 13, 5), (False, False, True, True)  # rows, and the side of their padding

LLAMA = dict(vocab_size=V, max_position_embeddings=64, num_hidden_layers=2, hidden_size=32,
             num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)
HEAD8 = LLAMA | dict(head_dim=8)
NEOX = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
GPT2 = dict(vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0)
OPT = dict(vocab_size=V, max_position_embeddings=64, num_hidden_layers=2, hidden_size=32,
           num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)
BERT = dict(vocab_size=V, max_position_embeddings=64, num_hidden_layers=2, hidden_size=32,
            num_attention_heads=4, intermediate_size=48, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, num_labels=3)
DISTIL = dict(vocab_size=V, max_position_embeddings=64, n_layers=2, dim=32, n_heads=4,
              hidden_dim=48, dropout=0.0, attention_dropout=0.0, num_labels=3)
T5 = dict(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
          decoder_start_token_id=0)
BART = dict(vocab_size=V, max_position_embeddings=64, d_model=32, encoder_layers=2,
            decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0, forced_eos_token_id=None)
MARIAN = BART | dict(pad_token_id=66, decoder_start_token_id=66, eos_token_id=0)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 300.0, "factor": 4.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0}
LOCAL = {"sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
         "full_attention": LINEAR}
SFS = ["sliding_attention", "full_attention", "sliding_attention"]

# Transformers' class, its configuration's, the changes to it.
CASES = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-untied": ("GPT2LMHeadModel", GPT2 | dict(
        tie_word_embeddings=False, activation_function="gelu", n_inner=40,
        layer_norm_epsilon=1e-3)),
    "gpt2-wide": ("GPT2LMHeadModel", GPT2 | dict(
        n_layer=3, n_embd=48, n_head=2, activation_function="relu")),
    "opt": ("OPTForCausalLM", OPT),
    "opt-post": ("OPTForCausalLM", OPT | dict(do_layer_norm_before=False)),
    "opt-no-bias": ("OPTForCausalLM", OPT | dict(
        enable_bias=False, tie_word_embeddings=False, activation_function="gelu")),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama-3": ("LlamaForCausalLM", LLAMA | dict(
        num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "llama-bias": ("LlamaForCausalLM", LLAMA | dict(
        num_key_value_heads=4, head_dim=12, attention_bias=True, mlp_bias=True,
        hidden_act="gelu", rms_norm_eps=1e-3, rope_parameters=LINEAR)),
    "mistral": ("MistralForCausalLM", LLAMA | dict(sliding_window=6)),
    "mistral-whole": ("MistralForCausalLM", LLAMA | dict(sliding_window=None)),
    "mistral-tied": ("MistralForCausalLM", LLAMA | dict(
        sliding_window=3, tie_word_embeddings=True, head_dim=16, num_key_value_heads=1)),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "qwen2-window": ("Qwen2ForCausalLM", LLAMA | dict(
        use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen2-tied": ("Qwen2ForCausalLM", LLAMA | dict(
        tie_word_embeddings=True, num_key_value_heads=1, rope_parameters=LINEAR)),
    "qwen3": ("Qwen3ForCausalLM", HEAD8),
    "qwen3-window": ("Qwen3ForCausalLM", LLAMA | dict(
        head_dim=16, num_hidden_layers=3, use_sliding_window=True, sliding_window=5,
        layer_types=SFS)),
    "qwen3-tied": ("Qwen3ForCausalLM", HEAD8 | dict(
        tie_word_embeddings=True, attention_bias=True, num_key_value_heads=4)),
    "gemma2": ("Gemma2ForCausalLM", HEAD8 | dict(sliding_window=5, query_pre_attn_scalar=10)),
    "gemma2-plain": ("Gemma2ForCausalLM", HEAD8 | dict(
        head_dim=16, sliding_window=40, attn_logit_softcapping=None,
        final_logit_softcapping=None, attention_bias=True, num_key_value_heads=1)),
    "gemma2-types": ("Gemma2ForCausalLM", HEAD8 | dict(
        num_hidden_layers=3, layer_types=SFS, sliding_window=4, attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0, tie_word_embeddings=False)),
    "gemma3": ("Gemma3ForCausalLM", HEAD8 | dict(
        num_hidden_layers=3, layer_types=SFS, sliding_window=5, rope_parameters=LOCAL)),
    "gemma3-pattern": ("Gemma3ForCausalLM", HEAD8 | dict(
        num_hidden_layers=7, sliding_window=4, query_pre_attn_scalar=20, num_key_value_heads=1)),
    "gemma3-caps": ("Gemma3ForCausalLM", HEAD8 | dict(
        sliding_window=30, layer_types=SFS[:2], attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0, num_key_value_heads=4, tie_word_embeddings=False)),
    "olmo2": ("Olmo2ForCausalLM", LLAMA),
    "olmo2-tied": ("Olmo2ForCausalLM", LLAMA | dict(
        tie_word_embeddings=True, attention_bias=True, num_key_value_heads=4)),
    "olmo2-scaled": ("Olmo2ForCausalLM", LLAMA | dict(
        rope_parameters=LLAMA3, num_key_value_heads=1, rms_norm_eps=1e-3)),
    "neox": ("GPTNeoXForCausalLM", NEOX),
    "neox-sequential": ("GPTNeoXForCausalLM", NEOX | dict(
        use_parallel_residual=False, rotary_pct=1.0, hidden_act="gelu_new")),
    "neox-no-bias": ("GPTNeoXForCausalLM", NEOX | dict(
        attention_bias=False, rotary_pct=0.5, tie_word_embeddings=True, num_attention_heads=2)),
    "bert": ("BertModel", BERT),
    "bert-mlm": ("BertForMaskedLM", BERT | dict(hidden_act="gelu_new")),
    "bert-mlm-untied": ("BertForMaskedLM", BERT | dict(
        tie_word_embeddings=False, hidden_act="relu", layer_norm_eps=1e-3)),
    "bert-classify": ("BertForSequenceClassification", BERT),
    "bert-tag": ("BertForTokenClassification", BERT | dict(num_attention_heads=2)),
    "roberta": ("RobertaModel", BERT | dict(hidden_act="relu")),
    "roberta-mlm": ("RobertaForMaskedLM", BERT | dict(type_vocab_size=1)),
    "roberta-mlm-untied": ("RobertaForMaskedLM", BERT | dict(
        tie_word_embeddings=False, pad_token_id=3)),
    "roberta-classify": ("RobertaForSequenceClassification", BERT),
    "roberta-tag": ("RobertaForTokenClassification", BERT | dict(hidden_act="gelu_new")),
    "distilbert": ("DistilBertModel", DISTIL | dict(n_heads=2)),
    "distilbert-mlm": ("DistilBertForMaskedLM", DISTIL | dict(activation="relu")),
    "distilbert-mlm-untied": ("DistilBertForMaskedLM", DISTIL | dict(tie_word_embeddings=False)),
    "distilbert-classify": ("DistilBertForSequenceClassification", DISTIL),
    "distilbert-tag": ("DistilBertForTokenClassification", DISTIL | dict(
        sinusoidal_pos_embds=True)),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5-1.1": ("T5ForConditionalGeneration", T5 | dict(
        feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "t5-deep": ("T5ForConditionalGeneration", T5 | dict(
        feed_forward_proj="gated-silu", num_decoder_layers=3, d_kv=12, layer_norm_epsilon=1e-3,
        relative_attention_num_buckets=8, relative_attention_max_distance=12,
        decoder_start_token_id=5)),
    "bart": ("BartForConditionalGeneration", BART),
    "bart-scaled": ("BartForConditionalGeneration", BART | dict(
        scale_embedding=True, decoder_layers=3, activation_function="relu",
        decoder_start_token_id=5)),
    "bart-untied": ("BartForConditionalGeneration", BART | dict(
        tie_word_embeddings=False, encoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2)),
    "marian": ("MarianMTModel", MARIAN | dict(activation_function="swish", scale_embedding=True)),
    "marian-plain": ("MarianMTModel", MARIAN | dict(decoder_layers=1)),
    "marian-relu": ("MarianMTModel", MARIAN | dict(
        activation_function="relu", encoder_layers=1, d_model=48, decoder_start_token_id=60,
        pad_token_id=60)),
}


def randomize(model, seed=0, std=0.1):
    """Every parameter and buffer of weights far from its first value, so that none can be mixed
    up."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.round() + std * torch.randn_like(p))  # norms about 1, the rest about 0
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(torch.randn_like(model.final_logits_bias))


def make(case):
    """Transformers' model of a case, random."""
    name, fields = CASES[case]
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**fields, attn_implementation="eager")).eval()
    randomize(model)
    with torch.no_grad():
        if case == "t5-1.1":  # Transformers 5 ties at first what a file may hold untied
            model.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn(V, 32))
        if case == "bart-untied":
            for side in (model.model.encoder, model.model.decoder):
                side.embed_tokens.weight.copy_(model.model.shared.weight)
        for head in (getattr(model, "cls", None), getattr(model, "lm_head", None)):
            head = getattr(head, "predictions", head)
            if hasattr(head, "decoder"):  # its bias is there twice
                head.decoder.bias.copy_(head.bias)
    return model


def tensors_of(directory):
    out = {}
    for file in sorted(directory.glob("*.safetensors")):
        out |= safetensors.numpy.load_file(file)
    return out


def batch(kind, case, pad):
    """ids [B, T] and mask [B, T]; where Transformers knows no other, the padding is on the right."""
    rng = np.random.default_rng(1)
    ids, mask = rng.integers(4, 60, (len(LENGTHS), T)), np.zeros((len(LENGTHS), T), bool)
    right_only = "classify" in case or case.startswith(("bart", "marian", "distilbert"))
    for row, (length, left) in enumerate(zip(LENGTHS, LEFT)):
        mask[row, T - length:] = True
        if right_only or not left:
            mask[row] = mask[row, ::-1]
    return np.where(mask, ids, pad).astype(np.int32), mask


def theirs_of(model, kind, case, ids, mask, types, targets):
    """Transformers' logits or states, as a tensor that gradients flow through."""
    ids, mask, extra = torch.tensor(ids).long(), torch.tensor(mask).long(), {}
    if kind == "encoder_decoder":
        return model(input_ids=ids, attention_mask=mask,
                     decoder_input_ids=torch.tensor(targets).long()).logits
    if not case.startswith(("distilbert", "roberta", "opt")):  # which do so themselves
        extra["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if kind == "encoder" and types is not None:
        extra["token_type_ids"] = torch.tensor(types).long()
    out = model(input_ids=ids, attention_mask=mask, **extra)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@partial(jax.jit, static_argnums=0)
def ours_of(model, params, ids, mask, types, targets, weights):
    """(logits or states, gradient of their weighted sum by the embedding)."""
    def loss(table):
        p = {"params": params | {"embed": {"embedding": table}}}
        kind = model.config.architecture
        if kind == "decoder":
            out = model.apply(p, ids, mask.astype(jnp.int32))[0]
        elif kind == "encoder":
            out = model.apply(p, ids, mask, types)
        else:
            out = model.apply(p, targets, source=ids, source_mask=mask)[0]
        return (out * weights).sum(), out

    grads, out = jax.grad(loss, has_aux=True)(params["embed"]["embedding"])
    return out, grads


@pytest.mark.parametrize("case", CASES)
def test_equal_to_transformers_there_and_back(case, tmp_path, record_property):
    theirs = make(case)
    theirs.save_pretrained(tmp_path / "theirs")
    config, params = hf.load(tmp_path / "theirs")
    kind = config.architecture

    # The same numbers, and gradients, under padding on either side.
    ids, mask = batch(kind, case, theirs.config.pad_token_id or 0)
    rng = np.random.default_rng(2)
    types = rng.integers(0, config.token_types, ids.shape) if config.token_types else None
    targets = rng.integers(4, 60, (len(LENGTHS), 9)).astype(np.int32)
    expected = theirs_of(theirs, kind, case, ids, mask, types, targets)
    shown = np.ones(expected.shape, bool)
    if expected.shape[:2] == mask.shape:
        shown &= mask[..., None]
    weights = np.where(shown, rng.normal(size=expected.shape), 0).astype(np.float32)
    (expected * torch.tensor(weights)).sum().backward()
    found, grads = ours_of(build(config), params, ids, mask, types, targets, weights)
    expected = expected.detach().numpy()
    error = np.abs(found - expected)[shown].max() / max(1, np.abs(expected[shown]).max())
    table = theirs.get_input_embeddings().weight.grad
    if case == "bart-untied":  # where the two sides have a table each
        table = sum(side.embed_tokens.weight.grad
                    for side in (theirs.model.encoder, theirs.model.decoder))
    grad_error = np.linalg.norm(grads - table.numpy()) / np.linalg.norm(table)
    record_property("error", error)
    print(f"{case}: {error:.1e} {grad_error:.1e}")
    assert np.abs(expected[shown]).std() > 0.1
    assert error < 1e-5
    assert grad_error < 1e-4

    # Back: every tensor to the byte, nothing missing, nothing unexpected, and the same numbers.
    model_type = theirs.config.model_type
    hf.save(tmp_path / "ours", config, params, model_type=model_type)
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert before.keys() <= after.keys()
    for name, tensor in before.items():
        assert tensor.tobytes() == after[name].tobytes() and tensor.shape == after[name].shape, name
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True,
                                               attn_implementation="eager")
    assert not any(info.values()), info
    found = theirs_of(again.eval(), kind, case, ids, mask, types, targets).detach().numpy()
    np.testing.assert_allclose(found[shown], expected[shown], rtol=1e-5, atol=1e-5)
    # And that directory is the same model here.
    config_again, _ = hf.load(tmp_path / "ours")
    family = families.of_type(model_type)
    assert families.differences(family, config) == []
    assert families.canonical(config_again) == families.canonical(config)
