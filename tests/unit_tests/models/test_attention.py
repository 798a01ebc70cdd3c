"""attention.py against a softmax and a norm written out."""

import importlib.util
import math

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from pose_megatron.models.attention import RMSNorm, SdpaCoreAttention, for_each_head, layer_spec


def core_config(**options):
    return TransformerConfig(
        **{
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "use_cpu_initialization": True,
            "add_bias_linear": False,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        }
        | options
    )


def core_attention(config, **options):
    groups = ProcessGroupCollection()
    groups.cp = parallel_state.get_context_parallel_group()
    return SdpaCoreAttention(
        config, 1, AttnMaskType.causal, "self", pg_collection=groups, **options
    )


def softmax_attention(query, key, value, scale):
    """Token by token and head by head: [s, b, h, d] and [s, b, g, d] -> [s, b, h*d]."""
    s, _, h, _ = query.shape
    shared = h // key.size(2)
    rows = []
    for t in range(s):
        heads = []
        for head in range(h):
            keys, values = key[: t + 1, :, head // shared], value[: t + 1, :, head // shared]
            scores = (query[t, :, head] * keys).sum(-1) * scale  # [t+1, b]
            heads.append((scores.softmax(0)[..., None] * values).sum(0))
        rows.append(torch.cat(heads, dim=-1))
    return torch.stack(rows)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_keys_of_groups_repeated_for_each_head_are_theirs(groups):
    """How a GPU attends in float32."""
    s, b, h, d = 9, 2, 4, 8
    query, key, value = (torch.randn(s, b, n, d) for n in (h, groups, groups))
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, for_each_head(k, h), for_each_head(v, h), is_causal=True
    )
    expected = softmax_attention(query, key, value, d**-0.5)
    torch.testing.assert_close(out.permute(2, 0, 1, 3).flatten(2), expected)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("route", ["config", "argument"])
def test_core_attention_is_a_causal_softmax(world, groups, scale, route):
    torch.manual_seed(groups)
    s, b, h, d = 9, 2, 4, 8
    query, key, value = (
        torch.randn(s, b, n, d, dtype=torch.float64, requires_grad=True)
        for n in (h, groups, groups)
    )
    if route == "config":
        attend = core_attention(core_config(softmax_scale=scale))
    else:
        attend = core_attention(core_config(), softmax_scale=scale)
    ours = attend(query, key, value, None)
    theirs = softmax_attention(query, key, value, scale or 1 / math.sqrt(d))
    assert ours.shape == (s, b, h * d) and ours.is_contiguous()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad((ours * upstream).sum(), (query, key, value)),
        torch.autograd.grad((theirs * upstream).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_core_attention_refuses_what_it_would_get_wrong(world):
    attend, x = core_attention(core_config()), torch.zeros(2, 1, 4, 8)
    for options in ({"packed_seq_params": object()}, {"attention_bias": torch.zeros(1)}):
        with pytest.raises(ValueError, match="no packed .* and no attention bias"):
            attend(x, x, x, None, **options)


def test_dropout_acts_in_training_only(world):
    attend = core_attention(core_config(attention_dropout=0.5))
    torch.manual_seed(0)
    x = torch.randn(16, 1, 4, 8)
    attend.eval()
    still = attend(x, x, x, None)
    torch.testing.assert_close(still, softmax_attention(x, x, x, 8**-0.5))
    attend.train()
    one, other = attend(x, x, x, None), attend(x, x, x, None)
    assert not torch.equal(one, other) and not torch.equal(one, still)


@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_rms_norm_divides_by_the_root_mean_square(eps, dtype, tolerance):
    torch.manual_seed(0)
    norm = RMSNorm(core_config(params_dtype=dtype), 32, eps=eps)
    assert norm.weight.dtype == dtype and norm.weight.tolist() == [1.0] * 32
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x = (3 * torch.randn(5, 2, 32)).to(dtype)
    exact = x.double()
    mean_square = (exact * exact).sum(-1, keepdim=True) / 32
    expected = exact / (mean_square + eps).sqrt() * norm.weight.double()
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x).double(), expected, rtol=tolerance, atol=tolerance)


def test_norm_weights_carry_the_mark_of_sequence_parallelism():
    for parallel in (False, True):
        config = core_config(tensor_model_parallel_size=2, sequence_parallel=parallel)
        assert RMSNorm(config, 32).weight.sequence_parallel is parallel


def test_the_layer_spec_leaves_the_librarys_own_alone(world):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    def core(spec):
        return spec.submodules.self_attention.submodules.core_attention

    before = core(get_gpt_layer_local_spec(normalization="RMSNorm"))
    block = layer_spec(core_config(), "torch")
    assert len(block.layer_specs) == 2 and block.layer_norm is RMSNorm
    assert core(block.layer_specs[0]) is SdpaCoreAttention
    assert core(get_gpt_layer_local_spec(normalization="RMSNorm")) is before
    assert before is not SdpaCoreAttention


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None,
    reason="Transformer Engine is installed",
)
def test_transformer_engine_is_missed_in_one_sentence(world):
    with pytest.raises(
        ValueError,
        match="--transformer-impl transformer_engine: .*install .*Or use --transformer-impl torch",
    ):
        layer_spec(core_config(), "transformer_engine")
