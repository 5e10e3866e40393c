"""The decoders with recurrent layers among the families of Hugging Face Transformers."""

import math

from nanoflax.errors import UserError
from nanoflax.hf.family import Family, under

_NO_LIMIT = 3.4e38  # the largest float32: not every version of Transformers reads Infinity in JSON


def _read_mamba2(hf):
    inner, width = hf["num_heads"] * hf["head_dim"], hf["expand"] * hf["hidden_size"]
    if inner != width:
        raise UserError(
            f"expand={hf['expand']!r} times hidden_size is {width}, but num_heads times head_dim is {inner}"
        )
    low, high = (math.inf if isinstance(x, dict) else float(x) for x in hf["time_step_limit"])
    return {"recurrent.min_step": low, "recurrent.max_step": None if high >= _NO_LIMIT else high}


def _write_mamba2(c):
    r = c.recurrent
    return {
        "expand": r.heads * r.value_dim // c.dim,
        "time_step_limit": [r.min_step, _NO_LIMIT if r.max_step is None else r.max_step],
    }


# residual_in_fp32 changes nothing in float32; time_step_rank, _min, _max and _floor are for new weights only.
_MAMBA2 = Family(
    model_type="mamba2",
    classes={"lm": ("Mamba2ForCausalLM",)},
    keys={"embed": "backbone.embeddings", "decoder/norm": "backbone.norm_f", "unembed": "lm_head",
          **under("decoder/block_{i}", "backbone.layers.{i}", {
              "norm_attention": "norm",
              **{f"recurrent/{name}": ("mixer.in_proj", "fused", part)
                 for part, name in enumerate(("gate", "value", "key", "query", "step"))},
              "recurrent/conv": "mixer.conv1d", "recurrent/decay": "mixer.A_log",
              "recurrent/step_bias": "mixer.dt_bias", "recurrent/skip": "mixer.D",
              "recurrent/norm": "mixer.norm.weight", "recurrent/out": "mixer.out_proj"})},
    fields={"vocab_size": "vocab_size", "num_hidden_layers": "layers", "hidden_size": "dim",
            "hidden_act": "activation", "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tied",
            "num_heads": "recurrent.heads", "n_groups": "recurrent.groups", "state_size": "recurrent.key_dim",
            "head_dim": "recurrent.value_dim", "conv_kernel": "recurrent.conv",
            "use_conv_bias": "recurrent.conv_bias", "use_bias": "recurrent.bias", "chunk_size": "recurrent.chunk"},
    preset=dict(norm="rmsnorm", positions="none", layer_types=("mamba2",), mlp_dim=0, bias=False, heads=1),
    # What Mamba2Config has, where config.json says nothing.
    defaults={"vocab_size": 32768, "num_hidden_layers": 64, "hidden_size": 4096, "hidden_act": "silu",
              "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False, "num_heads": 128, "n_groups": 8,
              "state_size": 128, "head_dim": 64, "conv_kernel": 4, "use_conv_bias": True, "use_bias": False,
              "chunk_size": 256, "expand": 2, "time_step_limit": [0.0, math.inf]},
    only={"rms_norm": (True,)},
    read=_read_mamba2, write=_write_mamba2,
    base="backbone.")  # fmt: skip

HYBRID = [_MAMBA2]
