"""Small shapes of models, and settings of rotary positions, that several files of cases change."""

V = 67
LLAMA = dict(
    vocab_size=V,
    max_position_embeddings=64,
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
HEAD8 = LLAMA | dict(head_dim=8)
NEOX = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
GPT2 = dict(
    vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
)
OPT = dict(
    vocab_size=V,
    max_position_embeddings=64,
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    ffn_dim=48,
    word_embed_proj_dim=32,
    dropout=0.0,
)
BERT = dict(
    vocab_size=V,
    max_position_embeddings=64,
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    intermediate_size=48,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    num_labels=3,
)
DISTIL = dict(
    vocab_size=V,
    max_position_embeddings=64,
    n_layers=2,
    dim=32,
    n_heads=4,
    hidden_dim=48,
    dropout=0.0,
    attention_dropout=0.0,
    num_labels=3,
)
T5 = dict(
    vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0
)
BART = dict(
    vocab_size=V,
    max_position_embeddings=64,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    dropout=0.0,
    forced_eos_token_id=None,
)
MARIAN = BART | dict(pad_token_id=66, decoder_start_token_id=66, eos_token_id=0)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 300.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EURO = LLAMA | dict(num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=2, mask_token_id=3)
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0}
LOCAL = {"sliding_attention": {"rope_type": "default", "rope_theta": 50.0}, "full_attention": LINEAR}
SFS = ["sliding_attention", "full_attention", "sliding_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 16}
