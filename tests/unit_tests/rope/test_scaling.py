"""Frequencies, attention factors and angles against transformers' own functions, hand-derived end points and exact arithmetic."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pose_megatron.rope.angles import angles
from pose_megatron.rope.methods import METHODS
from pose_megatron.rope.scaling import RopeScaling, attention_factor, inverse_frequencies

YARN = [
    {"beta_fast": 32.0, "beta_slow": 1.0},
    {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    {"attention_factor": 1.25},
]
STATIC = [method for method in METHODS if method not in ("none", "longrope", "dynamic")]


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


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "options",
    [
        LLAMA3,
        {**LLAMA3, "factor": 32.0},
        {"factor": 2.5, "low_freq_factor": 0.5, "high_freq_factor": 6.0},
    ],
)
@pytest.mark.parametrize("base, dim, original", [(500000.0, 128, 8192), (10000.0, 64, 2048)])
def test_llama3_is_that_of_transformers(base, dim, original, options):
    keys = {
        "rope_type": "llama3",
        "rope_theta": base,
        "original_max_position_embeddings": original,
        **options,
    }
    rotary = theirs({"rope_parameters": keys, "max_position_embeddings": 16 * original}, dim=dim)
    scaling = RopeScaling("llama3", original_max_position_embeddings=original, **options)
    assert relative_error(inverse_frequencies(dim, base, scaling), rotary.inv_freq) < 1e-6
    assert attention_factor(scaling) == rotary.attention_scaling == 1.0


def test_llama3_by_hand():
    """Llama 3.1: base 500000, d = 128, L = 8192. A pair turns 8192 / (2 pi 500000^(i/64)) times:
    four times at i = 28.2, once at i = 34.98."""
    plain = inverse_frequencies(128, 5e5, RopeScaling())
    ours = inverse_frequencies(128, 5e5, RopeScaling("llama3", 8.0, 8192))
    assert torch.equal(ours[:29], plain[:29])
    assert torch.allclose(ours[35:], plain[35:] / 8, rtol=1e-15, atol=0)
    turns = 1303.797 * math.exp(-30 / 64 * 13.12236)  # pair 30: 2.78
    kept = (turns - 1) / 3
    assert ours[30] / plain[30] == pytest.approx(kept + (1 - kept) / 8, rel=1e-5)


@pytest.mark.parametrize("temperature", [None, 1.3])
@pytest.mark.parametrize(
    "position, given",
    [(0, "short_factor"), (4095, "short_factor"), (4096, "long_factor"), (40000, "long_factor")],
)
def test_longrope_is_that_of_transformers(temperature, position, given):
    lists = {
        "short_factor": [1.0 + 0.01 * i for i in range(32)],
        "long_factor": [1.0 + 0.5 * i for i in range(32)],
    }
    keys = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 16.0,
        **lists,
        "original_max_position_embeddings": 4096,
        "attention_factor": temperature,
    }
    rotary = theirs({"rope_parameters": keys, "max_position_embeddings": 65536}, dim=64)
    rotary(torch.zeros(1), torch.tensor([[0, position]]))
    scaling = RopeScaling("longrope", 16.0, 4096, attention_factor=temperature, **lists)
    ours = inverse_frequencies(64, 1e4, scaling, length=position + 1)
    assert relative_error(ours, rotary.inv_freq) < 1e-6
    assert attention_factor(scaling) == pytest.approx(rotary.attention_scaling, rel=1e-12)
    plain = inverse_frequencies(64, 1e4, RopeScaling())
    assert torch.equal(ours, plain / torch.tensor(lists[given], dtype=torch.float64))
    trained = inverse_frequencies(64, 1e4, scaling)
    assert torch.equal(trained, plain / torch.tensor(lists["long_factor"], dtype=torch.float64))
    assert scaling.depends_on_length


def test_longrope_of_one_list_does_not_depend_on_length():
    scaling = RopeScaling("longrope", 4.0, 2048, long_factor=[1.0, 2.0, 3.0, 4.0])
    assert scaling.short_factor == scaling.long_factor == (1.0, 2.0, 3.0, 4.0)
    assert not scaling.depends_on_length
    short = inverse_frequencies(8, 1e4, scaling, length=5)
    assert torch.equal(short, inverse_frequencies(8, 1e4, scaling))


@pytest.mark.parametrize("length", [1, 2048, 2049, 5000, 8192])
def test_dynamic_is_that_of_transformers(length):
    keys = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    rotary = theirs({"rope_parameters": keys, "max_position_embeddings": 2048})
    rotary(torch.zeros(1), torch.tensor([[0, length - 1]]))
    ours = inverse_frequencies(128, 1e4, RopeScaling("dynamic", 4.0, 2048), length)
    assert relative_error(ours, rotary.inv_freq) < 1e-6


def test_dynamic_has_nothing_to_train_with():
    with pytest.raises(ValueError, match="dynamic.*anew for every sequence length; train with ntk"):
        inverse_frequencies(128, 1e4, RopeScaling("dynamic", 4.0, 2048))


def test_linear_and_ntk_over_llama3():
    """The frequencies of transformers' llama3, divided once more."""
    keys = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "original_max_position_embeddings": 8192,
        **LLAMA3,
    }
    rotary = theirs({"rope_parameters": keys, "max_position_embeddings": 131072})
    before = RopeScaling("llama3", 8.0, 8192)
    linear = RopeScaling("linear", 4.0, 131072, over=before)
    assert relative_error(inverse_frequencies(128, 5e5, linear), rotary.inv_freq / 4) < 1e-6
    ntk = inverse_frequencies(128, 5e5, RopeScaling("ntk", 4.0, 131072, over=before))
    by_pair = 4.0 ** (torch.arange(64) / 63)  # from 1 to 4
    assert relative_error(ntk, rotary.inv_freq / by_pair) < 1e-6
    assert str(linear) == "linear x4 from 131072 over llama3 x8 from 8192"


@pytest.mark.parametrize("method", ["yarn", "yarn_revised", "llama3"])
def test_a_ramp_over_linear_counts_the_turns_that_are_left(method):
    """Positions at half speed in a window of 4096 turn as plain ones do in 2048."""
    even = {} if method == "llama3" else {"truncate": False}
    over = RopeScaling(method, 8.0, 4096, over=RopeScaling("linear", 2.0, 2048))
    alone = RopeScaling(method, 8.0, 2048, **even)
    ours = inverse_frequencies(128, 1e4, over)
    assert torch.allclose(ours, inverse_frequencies(128, 1e4, alone) / 2, rtol=1e-12, atol=0)
    assert attention_factor(over) == attention_factor(alone)


def test_temperatures_multiply():
    before = RopeScaling("yarn", 16.0, 4096)
    assert attention_factor(before) == pytest.approx(1.2772589)  # 0.1 ln 16 + 1
    over = RopeScaling("yarn_revised", 2.0, 65536, over=before)
    assert attention_factor(over) == pytest.approx(1.2772589 * 1.0693147)
    assert attention_factor(RopeScaling("linear", 2.0, over=before)) == attention_factor(before)
    ours = inverse_frequencies(128, 1e4, over)
    plain = inverse_frequencies(128, 1e4, RopeScaling())
    assert torch.equal(ours[:17], plain[:17])  # turn often enough in both windows
    assert torch.allclose(ours[-4:], plain[-4:] / 32, rtol=1e-12, atol=0)


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
    st.sampled_from(STATIC),
    st.integers(2, 64).map(lambda n: 2 * n),
    st.floats(100, 1e7),
    st.integers(32, 10**6),
    st.sampled_from([None, *STATIC]),
)
def test_factor_one_is_the_identity(method, dim, base, original, before):
    over = RopeScaling(before, 3.0, 64) if before else None
    plain = inverse_frequencies(dim, base, over or RopeScaling())
    scaling = RopeScaling(method, 1.0, original, over=over)
    assert torch.allclose(inverse_frequencies(dim, base, scaling), plain, rtol=1e-14, atol=0)
    assert attention_factor(scaling) == (attention_factor(over) if over else 1.0)


@given(
    st.sampled_from(STATIC),
    st.integers(2, 64).map(lambda n: 2 * n),
    st.floats(100, 1e7),
    st.integers(32, 10**6),
    st.floats(1, 200),
    st.sampled_from([None, *STATIC]),
)
def test_every_frequency_lies_between_plain_and_linear(method, dim, base, original, factor, before):
    over = RopeScaling(before, 3.0, 64) if before else None
    plain = inverse_frequencies(dim, base, over or RopeScaling())
    ours = inverse_frequencies(dim, base, RopeScaling(method, factor, original, over=over))
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
        ({"method": "ntk", "factor": "2"}, "factor '2' must be a finite number"),
        (
            {
                "method": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "beta_fast": "32",
            },
            "beta_fast '32' must be a finite number",
        ),
        (
            {
                "method": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "truncate": 1,
            },
            "truncate 1 must be true or false",
        ),
        ({"method": "llama3", "factor": 2.0}, "original-max-position-embeddings"),
        (
            {
                "method": "llama3",
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "high_freq_factor": 1.0,
            },
            "high_freq_factor > low_freq_factor > 0, not 1.0 and 1.0",
        ),
        (
            {
                "method": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "low_freq_factor": 2.0,
            },
            "'yarn' has no low_freq_factor; .* choose llama3",
        ),
        (
            {"method": "longrope", "factor": 2.0, "original_max_position_embeddings": 64},
            "needs long_factor, a list .*--rope-scaling-config.*, not None",
        ),
        (
            {
                "method": "longrope",
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "long_factor": [1.0, -2.0],
            },
            "long_factor holds -2.0",
        ),
        (
            {
                "method": "longrope",
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "long_factor": [1.0],
                "short_factor": [1.0, 2.0],
            },
            "short_factor has 2 .* long_factor 1",
        ),
        ({"method": "dynamic", "factor": 2.0}, "original-max-position-embeddings"),
        (
            {"method": "linear", "factor": 2.0, "over": RopeScaling("dynamic", 2.0, 64)},
            "'dynamic' cannot be extended",
        ),
        (
            {
                "method": "longrope",
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "long_factor": [1.0],
                "over": RopeScaling("linear", 2.0),
            },
            "'longrope' cannot extend a model that is already scaled with 'linear'",
        ),
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
    with pytest.raises(ValueError, match="'longrope' has 3 factors; 8 rotated channels need 4"):
        scaling = RopeScaling("longrope", 2.0, 64, long_factor=[1.0, 2.0, 3.0])
        inverse_frequencies(8, 1e4, scaling)
