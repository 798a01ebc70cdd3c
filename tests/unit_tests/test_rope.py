"""rope.py against transformers' own functions, hand-derived end points and exact arithmetic."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pose_megatron.rope import (
    METHODS,
    RopeScaling,
    angles,
    attention_factor,
    from_hf,
    inverse_frequencies,
    to_hf,
)

YARN = [
    {"beta_fast": 32.0, "beta_slow": 1.0},
    {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    {"attention_factor": 1.25},
]


def scaling_of(method, factor=16.0, original=2048, **more):
    needs = method.startswith("yarn")
    return RopeScaling(method, factor, original if needs else None, **(more if needs else {}))


def theirs(keys, dim=128, heads=4):
    """transformers' rotary embedding for these config keys."""
    config = LlamaConfig(
        hidden_size=dim * heads, num_attention_heads=heads, num_hidden_layers=1, **keys
    )
    return LlamaRotaryEmbedding(config)


def relative_error(ours, theirs):
    return ((ours - theirs.double()).abs() / ours).max().item()


@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_plain_and_linear_are_those_of_transformers(base):
    plain = theirs({"rope_parameters": {"rope_type": "default", "rope_theta": base}})
    linear = theirs({"rope_parameters": {"rope_type": "linear", "rope_theta": base, "factor": 8.0}})
    assert relative_error(inverse_frequencies(128, base, RopeScaling()), plain.inv_freq) < 1e-6
    ours = inverse_frequencies(128, base, RopeScaling("linear", 8.0))
    assert relative_error(ours, linear.inv_freq) < 1e-6
    assert attention_factor(RopeScaling("linear", 8.0)) == linear.attention_scaling == 1.0


@pytest.mark.parametrize("options", YARN)
@pytest.mark.parametrize("base, dim, original", [(10000.0, 128, 2048), (500000.0, 64, 8192)])
def test_yarn_is_that_of_transformers(base, dim, original, options):
    parameters = {"rope_type": "yarn", "rope_theta": base, "factor": 16.0, **options}
    parameters["original_max_position_embeddings"] = original
    rotary = theirs(
        {"rope_parameters": parameters, "max_position_embeddings": 16 * original}, dim=dim
    )
    scaling = RopeScaling("yarn", 16.0, original, **options)
    assert relative_error(inverse_frequencies(dim, base, scaling), rotary.inv_freq) < 1e-6
    assert attention_factor(scaling) == pytest.approx(rotary.attention_scaling, rel=1e-12)


def test_yarn_revised_by_hand():
    """base 10000, d = 128, L = 2048: the ramp of the paper's models goes from pair 16 to pair 41.

    Pair i turns 2048 / (2 pi 10000^(i/64)) times: 32 times at i = 16.13, once at i = 40.22.
    """
    plain = inverse_frequencies(128, 10000.0, RopeScaling())
    harmonic = inverse_frequencies(128, 10000.0, RopeScaling("yarn_revised", 64.0, 2048))
    arithmetic = inverse_frequencies(128, 10000.0, RopeScaling("yarn", 64.0, 2048))
    for ours in (harmonic, arithmetic):
        assert torch.equal(ours[:17], plain[:17])
        assert torch.allclose(ours[41:], plain[41:] / 64, rtol=1e-15, atol=0)
    kept = 1 - 12 / 25  # pair 28 lies 12 of 25 steps into the ramp
    assert plain[28] / harmonic[28] == pytest.approx(kept + 64 * (1 - kept), rel=1e-12)
    assert arithmetic[28] / plain[28] == pytest.approx(kept + (1 - kept) / 64, rel=1e-12)
    assert (arithmetic / harmonic).max() > 16  # why the two must not be confused
    assert attention_factor(RopeScaling("yarn_revised", 64.0, 2048)) == pytest.approx(1.4158883)


def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest():
    plain = inverse_frequencies(128, 10000.0, RopeScaling())
    ntk = inverse_frequencies(128, 10000.0, RopeScaling("ntk", 64.0))
    assert ntk[0] == plain[0] == 1
    assert plain[-1] / ntk[-1] == pytest.approx(64, rel=1e-13)
    assert torch.all((plain / ntk).diff() > 0)


@given(
    st.sampled_from(METHODS),
    st.integers(2, 64).map(lambda n: 2 * n),
    st.floats(100, 1e7),
    st.integers(32, 10**6),
)
def test_factor_one_is_the_identity(method, dim, base, original):
    scaling = scaling_of(method, 1.0, original)
    plain = inverse_frequencies(dim, base, RopeScaling())
    assert torch.allclose(inverse_frequencies(dim, base, scaling), plain, rtol=1e-14, atol=0)
    assert attention_factor(scaling) == 1.0


@given(
    st.sampled_from(METHODS[1:]),
    st.integers(2, 64).map(lambda n: 2 * n),
    st.floats(100, 1e7),
    st.integers(32, 10**6),
    st.floats(1, 200),
)
def test_every_frequency_lies_between_plain_and_linear(method, dim, base, original, factor):
    plain = inverse_frequencies(dim, base, RopeScaling())
    ours = inverse_frequencies(dim, base, scaling_of(method, factor, original))
    assert torch.all(ours <= plain * (1 + 1e-12))
    assert torch.all(ours >= plain / factor * (1 - 1e-12))


def test_angles_are_exact_at_far_positions():
    """Against integer arithmetic: inv_freq as a fraction, 2 pi from 60 digits."""
    from fractions import Fraction

    turn = Fraction("6.28318530717958647692528676655900576839433879875021164194989")
    inv_freq = inverse_frequencies(16, 10000.0, RopeScaling("linear", 3.0))
    positions = [0, 1, 2047, 131071, 999_999, 10**6]
    ours = angles(torch.tensor([positions]), inv_freq)
    assert ours.shape == (6, 1, 1, 16) and ours.dtype == torch.float32
    for p, row in zip(positions, ours[:, 0, 0], strict=True):
        for f, angle in zip(inv_freq.tolist() * 2, row.tolist(), strict=True):
            exact = p * Fraction(f)
            exact -= turn * round(exact / turn)
            assert abs(angle - float(exact)) < 1.3e-7  # half a float32 step at pi


def test_angles_of_each_sample_and_of_fractions():
    inv_freq = inverse_frequencies(8, 10000.0, RopeScaling())
    ids = torch.tensor([[0, 1, 2], [0, 500, 70000]])
    ours = angles(ids, inv_freq)
    assert ours.shape == (3, 2, 1, 8)
    assert torch.equal(ours[:, 1:], angles(ids[1:], inv_freq))
    assert torch.equal(ours[..., :4], ours[..., 4:])
    assert torch.allclose(ours[2, 0, 0, :4], 2 * inv_freq.float())
    # linear interpolation by 4 is position / 4
    quarter = inverse_frequencies(8, 10000.0, RopeScaling("linear", 4.0))
    assert torch.allclose(angles(ids / 4, inv_freq), angles(ids, quarter), atol=2e-6)


def test_cos_and_sin_are_those_of_transformers():
    rotary = theirs({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})
    ids = torch.tensor([[0, 1, 2, 600], [0, 7, 900, 2047]])
    cos, sin = rotary(torch.zeros(1), ids)
    ours = angles(ids, inverse_frequencies(128, 10000.0, RopeScaling()))[:, :, 0].transpose(0, 1)
    assert torch.allclose(ours.cos(), cos, atol=3e-4)
    assert torch.allclose(ours.sin(), sin, atol=3e-4)


EXPORTS = [scaling_of(method) for method in METHODS if method != "none"] + [
    RopeScaling(),
    *(RopeScaling(method, 6.5, 4096, **more) for method in METHODS[3:] for more in YARN),
]


@pytest.mark.parametrize("scaling", EXPORTS, ids=lambda s: f"{s.method}-{s.attention_factor}")
@pytest.mark.parametrize("spelling", ["both", "rope_scaling", "rope_parameters"])
def test_export_loads_in_transformers_with_our_frequencies(scaling, spelling, tmp_path):
    keys = to_hf(scaling, base=12345.5, rotary_dim=64, max_position_embeddings=32768)
    if spelling == "rope_scaling":
        del keys["rope_parameters"]
    elif spelling == "rope_parameters":
        del keys["rope_scaling"], keys["rope_theta"]
    shape = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps({**shape, **keys}))
    config = AutoConfig.from_pretrained(tmp_path)
    rotary = LlamaRotaryEmbedding(config)
    ours = inverse_frequencies(64, 12345.5, scaling)
    assert config.max_position_embeddings == 32768
    assert relative_error(ours, rotary.inv_freq) < 1e-6
    assert rotary.attention_scaling == pytest.approx(attention_factor(scaling), rel=1e-12)
    rotary(torch.zeros(1), torch.tensor([[0, 30000]]))  # longrope chooses its list by position
    assert relative_error(ours, rotary.inv_freq) < 1e-6

    config.save_pretrained(tmp_path / "again")  # transformers' own spelling of the same
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    for read in (json.loads((tmp_path / "config.json").read_text()), again):
        base, back = from_hf(read)
        assert torch.allclose(inverse_frequencies(64, base, back), ours, rtol=1e-12, atol=0)
        assert attention_factor(back) == attention_factor(scaling)
        if scaling.method != "ntk":  # which is another base, in Hugging Face's words
            assert (base, back.method) == (12345.5, scaling.method)


def test_export_of_yarn_revised_also_serves_vllm():
    keys = to_hf(scaling_of("yarn_revised"), base=1e4, rotary_dim=64, max_position_embeddings=32768)
    longrope = keys["rope_scaling"]
    assert longrope["short_mscale"] == longrope["long_mscale"] == 0.1 * math.log(16) + 1
    assert keys["original_max_position_embeddings"] == 2048


def test_import_spells_alike():
    yarn = {"factor": 4.0, "original_max_position_embeddings": 4096}
    expected = (5e5, RopeScaling("yarn", 4.0, 4096))
    assert from_hf({"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **yarn}}) == expected
    assert from_hf({"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", **yarn}}) == expected
    new = {"rope_type": "yarn", "rope_theta": 5e5, **yarn}
    assert from_hf({"rope_parameters": new}) == expected
    assert from_hf({}) == from_hf({"rope_scaling": None}) == (10000.0, RopeScaling())
    mscale = {"rope_type": "yarn", **yarn, "mscale": 0.7, "mscale_all_dim": 1.0}
    rotary = theirs({"rope_parameters": dict(mscale), "max_position_embeddings": 16384})
    _, scaling = from_hf({"rope_parameters": mscale})
    assert attention_factor(scaling) == pytest.approx(rotary.attention_scaling, rel=1e-12)


LONGROPE = to_hf(scaling_of("yarn_revised"), base=1e4, rotary_dim=8, max_position_embeddings=32768)
YARN_4K = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    "config, named",
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ({"rope_scaling": {"factor": 8.0}}, "factor"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "0.5"),
        ({"rope_scaling": {"type": "yarn", "factor": 8.0}}, "original_max_position_embeddings"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 8.0}}, "rope_type"),
        ({"rope_scaling": {**YARN_4K, "finetuned": True}}, "finetuned"),
        ({"rope_scaling": YARN_4K, "rope_parameters": {"rope_type": "default"}}, "rope_type"),
        ({"rope_scaling": YARN_4K, "rope_parameters": {**YARN_4K, "factor": 8.0}}, "factor"),
        ({"rope_scaling": YARN_4K, "original_max_position_embeddings": 2048}, "2048"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": LONGROPE["rope_scaling"], "rope_theta": 5e5}, "short_factor"),
        ({"rope_scaling": {**LONGROPE["rope_scaling"], "long_factor": [1.0] * 4}}, "long_factor"),
        ({"rope_scaling": {**LONGROPE["rope_scaling"], "long_mscale": 1.0}}, "long_mscale"),
        (
            {"rope_scaling": {**LONGROPE["rope_scaling"], "attention_factor": None}},
            "attention_factor",
        ),
    ],
)
def test_import_refuses_by_name_what_it_does_not_know(config, named):
    with pytest.raises(ValueError, match=named):
        from_hf(config)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"method": "su"}, "su"),
        ({"factor": 2.0}, "none"),
        ({"method": "linear", "factor": 0.9}, "0.9"),
        ({"method": "linear", "factor": math.nan}, "nan"),
        ({"method": "linear", "factor": 2.0, "attention_factor": 1.1}, "attention_factor"),
        ({"method": "yarn", "factor": 2.0}, "original-max-position-embeddings"),
        ({"method": "yarn", "factor": 2.0, "original_max_position_embeddings": 6}, "6"),
        ({"method": "ntk", "factor": 2.0, "original_max_position_embeddings": 0}, "0"),
    ],
)
def test_scaling_that_makes_no_sense(arguments, named):
    with pytest.raises(ValueError, match=named):
        RopeScaling(**arguments)


def test_shapes_that_make_no_sense():
    for dim, base in ((7, 1e4), (0, 1e4), (8, 1.0), (8, math.inf)):
        with pytest.raises(ValueError, match=r"rope needs|rotary base"):
            inverse_frequencies(dim, base, RopeScaling())
    with pytest.raises(ValueError, match="ntk"):
        inverse_frequencies(2, 1e4, RopeScaling("ntk", 2.0))
    with pytest.raises(ValueError, match="beta_fast"):
        RopeScaling("yarn", 2.0, 2048, beta_fast=1.0, beta_slow=2.0)
