"""A model's sizes from a file: whole numbers of a possible size, before anything is built."""

import pytest

from pose_megatron.models.shape import ModelConfig

SIZES = {
    "num_layers": 2,
    "hidden_size": 8,
    "ffn_hidden_size": 16,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "kv_channels": 4,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}
EXPERTS = {"family": "qwen3_moe", "moe_ffn_hidden_size": 8, "moe_router_topk": 2}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", ["2", 2.0, True, None, [2], -1, 0, 10**12, float("nan")])
def test_a_size_that_cannot_be_names_itself(name, value):
    with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} .*(must be|more than)"):
        ModelConfig(**SIZES | {name: value})


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"num_layers": 10**9}, "--num-layers 1000000000 is more than 10,000"),
        ({"kv_channels": 10**9}, "--kv-channels 1000000000 is more than"),
        ({**EXPERTS, "num_experts": 10**9}, "--num-experts 1000000000 in each of"),
        ({**EXPERTS, "num_experts": "8"}, "--num-experts must be a whole number"),
        ({"norm_epsilon": float("nan")}, "--norm-epsilon must be a number"),
        ({"rotary_base": "1e4"}, "--rotary-base must be a number"),
        ({"rotary_percent": float("inf")}, "--rotary-percent must be a number"),
    ],
)
def test_what_would_take_all_memory_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        ModelConfig(**SIZES | wrong)


def test_the_largest_published_shapes_are_accepted():
    llama_405b = {"num_layers": 126, "num_attention_heads": 128, "num_query_groups": 8}
    assert ModelConfig(**SIZES | llama_405b).num_layers == 126
    kimi_k2 = {"num_layers": 61, "num_experts": 384}
    assert ModelConfig(**SIZES | EXPERTS | kimi_k2).num_experts == 384
