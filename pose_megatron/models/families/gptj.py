"""GPT-J (github.com/kingoflolz/mesh-transformer-jax): attention and MLP side by side.

One LayerNorm in a layer, an MLP with biases and without a gate, an output layer with a bias, and
rotary pairs of neighbouring channels in a part of each head. Its megatron-core layers are in
`gptj_layers`, which is imported only when a model is built.
"""

import torch
import torch.nn.functional as F

from pose_megatron.models.families.family import Family
from pose_megatron.models.tensors import EMBEDDING, LAYER, OUTPUT

_HF_LAYER = "transformer.h.{}"


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


class _GPTJ(Family):
    def default_sizes(self, hidden_size, num_attention_heads):
        sizes = super().default_sizes(hidden_size, num_attention_heads)
        return sizes | {"ffn_hidden_size": 4 * hidden_size}

    def transformers_rope(self, config, length):
        """Its table at position 1 is the sine and cosine of the inverse frequencies."""
        from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions

        sine, cosine = create_sinusoidal_positions(2, config.rotary_dim)[1].double().chunk(2)
        return torch.atan2(sine, cosine), 1.0

    def layer_spec(self, config, implementation, vp_stage=None):
        from pose_megatron.models.families import gptj_layers

        return gptj_layers.layer_spec(config, implementation, vp_stage)

    def adapt_output_layer(self, layer):
        from pose_megatron.models.families import gptj_layers

        gptj_layers.add_bias(layer)


GPTJ = _GPTJ(
    name="gptj",
    title="GPT-J",
    tensors={
        EMBEDDING: "transformer.wte.weight",
        f"{LAYER}.input_layernorm.weight": f"{_HF_LAYER}.ln_1.weight",
        f"{LAYER}.input_layernorm.bias": f"{_HF_LAYER}.ln_1.bias",
        f"{LAYER}.self_attention.linear_qkv.weight": tuple(
            f"{_HF_LAYER}.attn.{x}_proj.weight" for x in "qkv"
        ),
        f"{LAYER}.self_attention.linear_proj.weight": f"{_HF_LAYER}.attn.out_proj.weight",
        f"{LAYER}.mlp.linear_fc1.weight": f"{_HF_LAYER}.mlp.fc_in.weight",
        f"{LAYER}.mlp.linear_fc1.bias": f"{_HF_LAYER}.mlp.fc_in.bias",
        f"{LAYER}.mlp.linear_fc2.weight": f"{_HF_LAYER}.mlp.fc_out.weight",
        f"{LAYER}.mlp.linear_fc2.bias": f"{_HF_LAYER}.mlp.fc_out.bias",
        "decoder.final_layernorm.weight": "transformer.ln_f.weight",
        "decoder.final_layernorm.bias": "transformer.ln_f.bias",
        OUTPUT: "lm_head.weight",
        "output_layer.bias": "lm_head.bias",
    },
    architecture="GPTJForCausalLM",
    model_type="gptj",
    sizes={
        "n_layer": "num_layers",
        "n_embd": "hidden_size",
        "n_inner": "ffn_hidden_size",
        "n_head": "num_attention_heads",
        "vocab_size": "vocab_size",
        "n_positions": "max_position_embeddings",
    },
    only={
        "activation_function": "gelu_new",
        "tie_word_embeddings": False,
        "scale_attn_weights": True,
    },
    defaults={"rotary_dim": 64},
    epsilon=("layer_norm_epsilon", 1e-5),
    in_megatron_lm=False,
    rotary_dim_key="rotary_dim",
    reads_rope=False,
    normalization="LayerNorm",
    gated_mlp=False,
    activation=gelu_new,
    add_bias_linear=True,
    rotary_interleaved=True,
)
