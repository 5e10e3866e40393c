"""The small models of Transformers with which each family is compared: a class, and changes to its configuration.

CASES: {name: (class, changes)}; GREEDY: the cases whose greedy text is compared too. OLDER: (case, changes of its
config.json to an older file of the same model); REFUSED: (case, changes of its config.json, a part of the error).
"""

from tests.hf import cases_dense, cases_encoders, cases_hybrid, cases_latent, cases_sparse
from tests.hf.shapes import (  # noqa: F401
    BART,
    BERT,
    DISTIL,
    EURO,
    GPT2,
    HEAD8,
    LINEAR,
    LLAMA,
    LLAMA3,
    LOCAL,
    LONGROPE,
    MARIAN,
    NEOX,
    OPT,
    SFS,
    T5,
    V,
)

# Transformers' class, its configuration's, the changes to it.
CASES = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-untied": (
        "GPT2LMHeadModel",
        GPT2 | dict(tie_word_embeddings=False, activation_function="gelu", n_inner=40, layer_norm_epsilon=1e-3),
    ),
    "gpt2-wide": ("GPT2LMHeadModel", GPT2 | dict(n_layer=3, n_embd=48, n_head=2, activation_function="relu")),
    "opt": ("OPTForCausalLM", OPT),
    "opt-post": ("OPTForCausalLM", OPT | dict(do_layer_norm_before=False)),
    "opt-no-bias": (
        "OPTForCausalLM",
        OPT | dict(enable_bias=False, tie_word_embeddings=False, activation_function="gelu"),
    ),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama-3": (
        "LlamaForCausalLM",
        LLAMA | dict(num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=LLAMA3),
    ),
    "llama-bias": (
        "LlamaForCausalLM",
        LLAMA
        | dict(
            num_key_value_heads=4,
            head_dim=12,
            attention_bias=True,
            mlp_bias=True,
            hidden_act="gelu",
            rms_norm_eps=1e-3,
            rope_parameters=LINEAR,
        ),
    ),
    "mistral": ("MistralForCausalLM", LLAMA | dict(sliding_window=6)),
    "mistral-whole": ("MistralForCausalLM", LLAMA | dict(sliding_window=None)),
    "mistral-tied": (
        "MistralForCausalLM",
        LLAMA | dict(sliding_window=3, tie_word_embeddings=True, head_dim=16, num_key_value_heads=1),
    ),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "qwen2-window": ("Qwen2ForCausalLM", LLAMA | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen2-tied": (
        "Qwen2ForCausalLM",
        LLAMA | dict(tie_word_embeddings=True, num_key_value_heads=1, rope_parameters=LINEAR),
    ),
    "qwen3": ("Qwen3ForCausalLM", HEAD8),
    "qwen3-window": (
        "Qwen3ForCausalLM",
        LLAMA | dict(head_dim=16, num_hidden_layers=3, use_sliding_window=True, sliding_window=5, layer_types=SFS),
    ),
    "qwen3-tied": (
        "Qwen3ForCausalLM",
        HEAD8 | dict(tie_word_embeddings=True, attention_bias=True, num_key_value_heads=4),
    ),
    "gemma": ("GemmaForCausalLM", HEAD8 | dict(attention_bias=True)),
    "gemma-gelu": (
        "GemmaForCausalLM",
        HEAD8 | dict(hidden_act="gelu", head_dim=16, tie_word_embeddings=False, num_key_value_heads=1),
    ),
    "gemma2": ("Gemma2ForCausalLM", HEAD8 | dict(sliding_window=5, query_pre_attn_scalar=10)),
    "gemma2-plain": (
        "Gemma2ForCausalLM",
        HEAD8
        | dict(
            head_dim=16,
            layer_types=["full_attention"] * 2,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            attention_bias=True,
            num_key_value_heads=1,
        ),
    ),
    "gemma2-types": (
        "Gemma2ForCausalLM",
        HEAD8
        | dict(
            num_hidden_layers=3,
            layer_types=SFS,
            sliding_window=4,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            tie_word_embeddings=False,
        ),
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        HEAD8 | dict(num_hidden_layers=3, layer_types=SFS, sliding_window=5, rope_parameters=LOCAL),
    ),
    "gemma3-pattern": (
        "Gemma3ForCausalLM",
        HEAD8 | dict(num_hidden_layers=7, sliding_window=4, query_pre_attn_scalar=20, num_key_value_heads=1),
    ),
    "gemma3-caps": (
        "Gemma3ForCausalLM",
        HEAD8
        | dict(
            sliding_window=30,
            layer_types=SFS[:2],
            final_logit_softcapping=3.0,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        ),
    ),
    "olmo2": ("Olmo2ForCausalLM", LLAMA),
    "olmo2-tied": (
        "Olmo2ForCausalLM",
        LLAMA | dict(tie_word_embeddings=True, attention_bias=True, num_key_value_heads=4),
    ),
    "olmo2-scaled": (
        "Olmo2ForCausalLM",
        LLAMA | dict(rope_parameters=LLAMA3, num_key_value_heads=1, rms_norm_eps=1e-3),
    ),
    "neox": ("GPTNeoXForCausalLM", NEOX),
    "neox-sequential": (
        "GPTNeoXForCausalLM",
        NEOX | dict(use_parallel_residual=False, rotary_pct=1.0, hidden_act="gelu_new"),
    ),
    "neox-no-bias": (
        "GPTNeoXForCausalLM",
        NEOX | dict(attention_bias=False, rotary_pct=0.5, tie_word_embeddings=True, num_attention_heads=2),
    ),
    "phi3": ("Phi3ForCausalLM", LLAMA),
    "phi3-partial": (
        "Phi3ForCausalLM",
        LLAMA
        | dict(
            num_key_value_heads=1,
            sliding_window=5,
            rope_parameters={"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.75},
        ),
    ),
    "phi3-tied": (
        "Phi3ForCausalLM",
        LLAMA
        | dict(num_key_value_heads=4, head_dim=12, hidden_act="gelu", rms_norm_eps=1e-3, tie_word_embeddings=True),
    ),
    **{
        f"{name.lower()}-classify": (f"{name}ForSequenceClassification", fields | dict(num_labels=3, pad_token_id=0))
        for name, fields in [
            ("GPT2", GPT2),
            ("OPT", OPT),
            ("Llama", LLAMA),
            ("Mistral", LLAMA),
            ("Qwen2", LLAMA),
            ("Qwen3", HEAD8),
            ("Gemma2", HEAD8),
            ("Gemma3Text", HEAD8),
            ("Olmo2", LLAMA),
            ("GPTNeoX", NEOX),
            ("Phi3", LLAMA),
        ]
    },
    "bert": ("BertModel", BERT),
    "bert-mlm": ("BertForMaskedLM", BERT | dict(hidden_act="gelu_new")),
    "bert-mlm-untied": (
        "BertForMaskedLM",
        BERT | dict(tie_word_embeddings=False, hidden_act="relu", layer_norm_eps=1e-3),
    ),
    "bert-classify": ("BertForSequenceClassification", BERT),
    "bert-tag": ("BertForTokenClassification", BERT | dict(num_attention_heads=2)),
    "roberta": ("RobertaModel", BERT | dict(hidden_act="relu")),
    "roberta-mlm": ("RobertaForMaskedLM", BERT | dict(type_vocab_size=1)),
    "roberta-mlm-untied": ("RobertaForMaskedLM", BERT | dict(tie_word_embeddings=False, pad_token_id=3)),
    "roberta-classify": ("RobertaForSequenceClassification", BERT),
    "roberta-tag": ("RobertaForTokenClassification", BERT | dict(hidden_act="gelu_new")),
    "xlm-roberta": ("XLMRobertaModel", BERT | dict(hidden_act="relu")),
    "xlm-roberta-mlm": ("XLMRobertaForMaskedLM", BERT | dict(type_vocab_size=1)),
    "xlm-roberta-classify": ("XLMRobertaForSequenceClassification", BERT),
    "xlm-roberta-tag": ("XLMRobertaForTokenClassification", BERT | dict(hidden_act="gelu_new")),
    "distilbert": ("DistilBertModel", DISTIL | dict(n_heads=2)),
    "distilbert-mlm": ("DistilBertForMaskedLM", DISTIL | dict(activation="relu")),
    "distilbert-mlm-untied": ("DistilBertForMaskedLM", DISTIL | dict(tie_word_embeddings=False)),
    "distilbert-classify": ("DistilBertForSequenceClassification", DISTIL),
    "distilbert-tag": ("DistilBertForTokenClassification", DISTIL | dict(sinusoidal_pos_embds=True)),
    "eurobert": ("EuroBertModel", EURO),
    "eurobert-mlm": ("EuroBertForMaskedLM", EURO | dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "eurobert-mlm-bias": ("EuroBertForMaskedLM", EURO | dict(attention_bias=True, mlp_bias=True, hidden_act="gelu")),
    "eurobert-classify": ("EuroBertForSequenceClassification", EURO | dict(classifier_pooling="bos")),
    "eurobert-tag": ("EuroBertForTokenClassification", EURO | dict(num_key_value_heads=1)),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5-1.1": ("T5ForConditionalGeneration", T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "t5-deep": (
        "T5ForConditionalGeneration",
        T5
        | dict(
            feed_forward_proj="gated-silu",
            num_decoder_layers=3,
            d_kv=12,
            layer_norm_epsilon=1e-3,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=12,
            decoder_start_token_id=5,
        ),
    ),
    "bart": ("BartForConditionalGeneration", BART),
    "bart-scaled": (
        "BartForConditionalGeneration",
        BART | dict(scale_embedding=True, decoder_layers=3, activation_function="relu", decoder_start_token_id=5),
    ),
    "bart-untied": (
        "BartForConditionalGeneration",
        BART | dict(tie_word_embeddings=False, encoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2),
    ),
    "marian": ("MarianMTModel", MARIAN | dict(activation_function="swish", scale_embedding=True)),
    "marian-plain": ("MarianMTModel", MARIAN | dict(decoder_layers=1)),
    "marian-relu": (
        "MarianMTModel",
        MARIAN
        | dict(activation_function="relu", encoder_layers=1, d_model=48, decoder_start_token_id=60, pad_token_id=60),
    ),
}
OLDER: list[tuple[str, dict]] = []
REFUSED: list[tuple[str, dict, str]] = []
GREEDY = [
    "gpt2",
    "opt",
    "llama-3",
    "mistral",
    "gemma",
    "gemma3-caps",
    "neox",
    "phi3-partial",
    "t5-1.1",
    "bart",
    "marian",
]
for more in (cases_dense, cases_encoders, cases_hybrid, cases_latent, cases_sparse):
    CASES |= more.CASES
    GREEDY += more.GREEDY
    OLDER += more.OLDER
    REFUSED += more.REFUSED
