"""rope.huggingface: every spelling against transformers' reading of the same keys."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pose_megatron.rope.huggingface import from_hf, notes, options, rotary_percent, to_hf
from pose_megatron.rope.scaling import RopeScaling, attention_factor, inverse_frequencies

LLAMA31 = RopeScaling("llama3", 8.0, 8192)
YARN = [
    {},
    {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    {"attention_factor": 1.25},
]
LISTS = {"long_factor": [1.0 + i for i in range(32)], "short_factor": [1.0] * 32}
EXPORTS = [
    RopeScaling(),
    RopeScaling("linear", 16.0),
    RopeScaling("ntk", 16.0),
    *(
        RopeScaling(method, 6.5, 4096, **more)
        for method in ("yarn", "yarn_revised")
        for more in YARN
    ),
    LLAMA31,
    RopeScaling("llama3", 3.5, 4096, low_freq_factor=0.5, high_freq_factor=6.0),
    RopeScaling("longrope", 16.0, 2048, **LISTS),
    RopeScaling("longrope", 16.0, 2048, **LISTS, attention_factor=1.1),
    RopeScaling("longrope", 16.0, 2048, long_factor=LISTS["long_factor"]),
    RopeScaling("dynamic", 4.0, 2048),
    RopeScaling("linear", 2.0, 131072, over=LLAMA31),
    RopeScaling("yarn", 2.0, 131072, over=LLAMA31),
    RopeScaling("ntk", 2.0, 131072, over=RopeScaling("yarn", 4.0, 32768)),
    RopeScaling("yarn_revised", 2.0, 8192, over=RopeScaling("linear", 4.0)),
]
LENGTHS = (1, 100, 2048, 2049, 30001)  # of sequences, where the frequencies depend on it


def frequencies(scaling, base, length=None):
    return inverse_frequencies(64, base, scaling, length if scaling.depends_on_length else None)


def float32_limit(scaling, base):
    """The relative error of each of 32 pairs that single precision explains, by hand.

    llama3: 64 times a rounding of 2e-7, divided by 1 - 2 / 3 (below) at worst. yarn: transformers
    computes the ramp r = (i - first) / (last - first) in float32, whose unit roundoff is u = 2^-24.
    Both differences and the quotient are rounded, and `first` before them unless it is whole. The
    frequency is theta (1 - r + r / s), in which r's error weighs 1 - 1 / s.
    """
    if scaling.over is not None or scaling.method not in ("llama3", "yarn"):
        return torch.full((32,), 1e-6)
    if scaling.method == "llama3":
        return torch.full((32,), 4e-5)
    s, window = scaling.factor, scaling.original_max_position_embeddings
    first, last = (  # the paper's equation for the pair that turns so many times in the window
        64 * math.log(window / (2 * math.pi * turns)) / (2 * math.log(base))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 63)
    ramp = (torch.arange(32) - first) / (last - first)
    wrong = 2**-24 * (3 + (0 if scaling.truncate else abs(first / (last - first))))
    on_ramp = (ramp > -wrong) & (ramp < 1 + wrong)
    ramp = ramp.clamp(0, 1)
    return 1e-6 + on_ramp * (1 - 1 / s) * wrong / (1 - ramp + ramp / s)


def check_reading(config: dict, base: float, scaling: RopeScaling, folder=None):
    """transformers computes from `config` what we compute from (base, scaling)."""
    shape = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "head_dim": 64}
    if folder:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**shape, **config}))
        rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))
    else:
        rotary = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps({**shape, **config}))))
    for length in LENGTHS:
        rotary(torch.zeros(1), torch.tensor([[0, length - 1]]))
        ours = frequencies(scaling, base, length)
        limit = float32_limit(scaling, base)
        assert ((rotary.inv_freq.double() - ours).abs() / ours < limit).all(), length
    assert rotary.attention_scaling == pytest.approx(attention_factor(scaling), rel=1e-12)
    return rotary.config


@pytest.mark.parametrize("scaling", EXPORTS, ids=str)
@pytest.mark.parametrize("spelling", ["both", "rope_scaling", "rope_parameters"])
def test_export_loads_in_transformers_with_our_frequencies(scaling, spelling, tmp_path):
    base = 12345.5
    keys = to_hf(scaling, base=base, rotary_dim=64, max_position_embeddings=32768)
    if spelling == "rope_scaling":
        del keys["rope_parameters"]
    elif spelling == "rope_parameters":
        del keys["rope_scaling"], keys["rope_theta"]
    config = check_reading(keys, base, scaling, tmp_path / "ours")
    # dynamic: transformers takes the window before from here
    assert config.max_position_embeddings == (2048 if scaling.method == "dynamic" else 32768)

    config.save_pretrained(tmp_path / "again")  # transformers' own spelling of the same
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    for read in (json.loads((tmp_path / "ours" / "config.json").read_text()), again):
        read_base, back = from_hf(read)
        for length in LENGTHS:
            ours = frequencies(scaling, base, length)
            assert torch.allclose(frequencies(back, read_base, length), ours, rtol=1e-12, atol=0)
        assert attention_factor(back) == pytest.approx(attention_factor(scaling), rel=1e-15)
        if scaling.method != "ntk" and scaling.over is None:
            assert (read_base, back) == (base, scaling)  # ntk is a base in Hugging Face's words


def test_keys_that_transformers_4_and_vllm_look_for():
    """By their published rules; versions before 4.43 refuse any third key of linear."""
    written = {
        str(scaling): to_hf(scaling, base=1e4, rotary_dim=64, max_position_embeddings=65536)
        for scaling in EXPORTS
    }
    for text, keys in written.items():
        scaling = keys["rope_scaling"]
        assert keys["rope_theta"] == keys["rope_parameters"]["rope_theta"], text
        if scaling is None:
            assert text.startswith(("none", "ntk"))
            continue
        hf_type = scaling["type"]
        assert keys["rope_parameters"]["rope_type"] == hf_type
        assert all(isinstance(v, float) for k, v in scaling.items() if k.endswith("_freq_factor"))
        assert type(scaling["factor"]) is float  # an int is refused before 4.43
        if hf_type in ("linear", "dynamic"):
            assert scaling.keys() == {"type", "factor"}
        else:
            assert scaling["rope_type"] == hf_type
            assert type(scaling["original_max_position_embeddings"]) is int
        if hf_type == "longrope":  # 4 reads the window here, vLLM the two mscales
            window = scaling["original_max_position_embeddings"]
            assert keys["original_max_position_embeddings"] == window
            assert scaling["short_mscale"] == scaling["long_mscale"] == scaling["attention_factor"]
    revised = to_hf(
        RopeScaling("yarn_revised", 6.5, 4096),
        base=1e4,
        rotary_dim=64,
        max_position_embeddings=26624,
    )["rope_scaling"]
    assert revised["short_factor"] == revised["long_factor"]
    assert revised["long_mscale"] == 0.1 * math.log(6.5) + 1


@pytest.mark.parametrize("more", YARN)
def test_yarn_as_longrope_is_the_same_rope(more):
    scaling = RopeScaling("yarn", 6.5, 4096, **more)
    keys = to_hf(scaling, base=1e4, rotary_dim=64, max_position_embeddings=26624, as_longrope=True)
    assert keys["rope_scaling"]["rope_type"] == "longrope"
    check_reading(keys, 1e4, scaling)
    base, back = from_hf(keys)
    assert back.method == "longrope" and attention_factor(back) == attention_factor(scaling)
    assert torch.allclose(frequencies(back, base), frequencies(scaling, base), rtol=1e-12, atol=0)


numbers = st.floats(1.0, 64.0)
windows = st.integers(64, 8192)
factors = st.lists(st.floats(1.0, 64.0), min_size=32, max_size=32)
temperature = {"attention_factor": st.floats(0.5, 2.0)}
HF_TYPES = [
    st.fixed_dictionaries({"rope_type": st.just("default")}),
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": numbers}),
    st.fixed_dictionaries({"rope_type": st.just("dynamic"), "factor": numbers}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("yarn"),
            "factor": numbers,
            "original_max_position_embeddings": windows,
        },
        optional={
            **temperature,
            "beta_fast": st.floats(8.0, 64.0),
            "beta_slow": st.floats(0.5, 4),
            "truncate": st.booleans(),
        },
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("yarn"),
            "factor": numbers,
            "mscale": st.floats(0.1, 2.0),
            "original_max_position_embeddings": windows,
        },
        optional={"mscale_all_dim": numbers},
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("longrope"),
            "short_factor": factors,
            "long_factor": factors,
            "original_max_position_embeddings": windows,
        },
        optional={**temperature, "factor": numbers},
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": numbers,
            "low_freq_factor": st.floats(0.5, 2.0),
            "high_freq_factor": st.floats(3.0, 8.0),
            "original_max_position_embeddings": windows,
        }
    ),
]


@given(st.one_of(HF_TYPES), st.floats(1e3, 1e7), st.booleans(), st.booleans())
def test_any_rope_means_to_us_what_it_means_to_transformers(rope, base, legacy, old_name):
    if legacy:
        spelt = {"type" if old_name and k == "rope_type" else k: v for k, v in rope.items()}
        config = {"rope_scaling": spelt, "rope_theta": base}
    else:
        config = {"rope_parameters": {**rope, "rope_theta": base}}
    config["max_position_embeddings"] = 16384
    read_base, scaling = from_hf(config)
    assert read_base == base
    check_reading(config, base, scaling)
    if rope["rope_type"] != "dynamic":
        again = to_hf(scaling, base=base, rotary_dim=64, max_position_embeddings=16384)
        assert from_hf(again) == (base, scaling)
        check_reading(again, base, scaling)


def test_import_spells_alike():
    yarn = {"factor": 4.0, "original_max_position_embeddings": 4096}
    expected = (5e5, RopeScaling("yarn", 4.0, 4096))
    assert from_hf({"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **yarn}}) == expected
    assert from_hf({"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", **yarn}}) == expected
    new = {"rope_type": "yarn", "rope_theta": 5e5, **yarn}
    assert from_hf({"rope_parameters": new}) == expected
    top = {"type": "yarn", "factor": 4.0}
    assert (
        from_hf({"rope_theta": 5e5, "rope_scaling": top, "original_max_position_embeddings": 4096})
        == expected
    )
    assert from_hf({}) == from_hf({"rope_scaling": None}) == (10000.0, RopeScaling())


def test_llama_3_1s_own_config():
    published = {  # the rope keys of meta-llama/Llama-3.1-8B
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    }
    assert from_hf(published) == (5e5, LLAMA31)


def test_the_share_of_a_head_that_rotates():
    assert rotary_percent({}) == 1.0
    assert rotary_percent({"partial_rotary_factor": 0.5}) == 0.5
    assert rotary_percent({"rotary_pct": 0.25, "rope_theta": 1e4}) == 0.25
    assert rotary_percent({"rope_parameters": {"partial_rotary_factor": 0.25}}) == 0.25
    assert from_hf({"rope_parameters": {"partial_rotary_factor": 0.25}}) == (1e4, RopeScaling())
    for twice in (
        {"partial_rotary_factor": 0.5, "rotary_pct": 0.25},
        {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 1}},
    ):
        with pytest.raises(ValueError, match=r"contradicts itself.*0\.5"):
            rotary_percent(twice)


LONGROPE = to_hf(
    RopeScaling("yarn_revised", 16.0, 2048), base=1e4, rotary_dim=8, max_position_embeddings=32768
)["rope_scaling"]
YARN_4K = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LIST = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}


@pytest.mark.parametrize(
    "config, said",
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic.*original_max_position"),
        (
            {
                "rope_scaling": {
                    "type": "dynamic",
                    "factor": 2.0,
                    "original_max_position_embeddings": 64,
                },
                "max_position_embeddings": 128,
            },
            "contradicts itself: .* 64; dynamic takes .* is 128",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3.*high_freq_factor"),
        ({"rope_scaling": LLAMA3}, "llama3.*original_max_position_embeddings"),
        (
            {"rope_scaling": {"rope_type": "su", "factor": 8.0}},
            "'su' is not supported; supported are",
        ),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 8.0}}, "proportional"),
        ({"rope_scaling": {"factor": 8.0}}, "'default' does not know factor"),
        ({"rope_scaling": {"type": "linear"}}, "needs factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "0.5"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor must be a number, not '4'"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor must be a number, not True"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, not 'linear'"),
        ({"rope_theta": "big"}, "rope_theta must be a number, not 'big'"),
        ({"rope_scaling": {"type": "yarn", "factor": 8.0}}, "original_max_position_embeddings"),
        ({"rope_scaling": {**YARN_4K, "truncate": "no"}}, "truncate must be true or false"),
        (
            {
                "rope_scaling": {
                    **YARN_4K,
                    "attention_factor": 1.5,
                    "mscale": 1.0,
                    "mscale_all_dim": 1.0,
                }
            },
            "mscale / mscale_all_dim says attention_factor 1.0, another spelling 1.5",
        ),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 8.0}}, "rope_type"),
        ({"rope_scaling": {**YARN_4K, "attn_factor": 0.8}}, "vLLM multiplies .* by it, transf"),
        (
            {"rope_scaling": {**YARN_4K, "low_freq_factor": 1.0}},
            "'yarn' does not know low_freq_factor",
        ),
        ({"rope_scaling": YARN_4K, "rope_parameters": {"rope_type": "default"}}, "rope_type"),
        ({"rope_scaling": YARN_4K, "rope_parameters": {**YARN_4K, "factor": 8.0}}, "factor"),
        ({"rope_scaling": YARN_4K, "original_max_position_embeddings": 2048}, "2048"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_scaling": LIST}, "needs factor"),
        ({"rope_scaling": {**LIST, "factor": 2.0}}, "original_max_position_embeddings"),
        ({"rope_scaling": {**LIST, "long_factor": 2.0}}, "long_factor must be a list"),
        (
            {
                "rope_scaling": {**LIST, "factor": 2.0, "short_factor": [1.0, 2.0]},
                "original_max_position_embeddings": 64,
            },
            "short_factor has 2 numbers",
        ),
        (
            {
                "rope_scaling": {**LIST, "factor": 2.0, "long_factor": ["a"]},
                "original_max_position_embeddings": 64,
            },
            "long_factor holds 'a'",
        ),
        ({"rope_scaling": LONGROPE, "rope_theta": 5e5}, "long_factor|short_factor"),
        ({"rope_scaling": {**LONGROPE, "long_factor": [1.0] * 4}}, "long_factor .*not the ramp"),
        ({"rope_scaling": {**LONGROPE, "long_mscale": 1.0}}, "long_mscale"),
        (
            {"rope_scaling": {**LONGROPE, "attention_factor": None}},
            "short_mscale.*attention_factor",
        ),
    ],
)
def test_import_refuses_by_name_what_it_does_not_know(config, said):
    with pytest.raises(ValueError, match=said):
        from_hf(config)


def test_options_in_hugging_faces_words(tmp_path):
    text = '{"rope_type": "longrope", "long_factor": [1, 2]}'
    assert options(text) == {"method": "longrope", "long_factor": [1, 2]}
    (tmp_path / "rope.json").write_text(text)
    assert options(str(tmp_path / "rope.json")) == options(text)
    for wrong, said in [
        ("nowhere.json", "nowhere.json is neither a JSON object nor a file with one"),
        ("{", "is neither a JSON object"),
        ('{"type": "yarn", "rope_type": "ntk"}', "method|contradicts itself"),
        ('{"rope_theta": 10000}', "does not know rope_theta; it knows attention_factor, beta_fast"),
        ('{"over": {}}', "does not know over"),
    ]:
        with pytest.raises(ValueError, match=said):
            options(wrong)
    (tmp_path / "rope.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"rope.json is not a JSON object"):
        options(str(tmp_path / "rope.json"))


@pytest.mark.parametrize(
    "harmless", [{"finetuned": True}, {"finetuned": False}, {"attn_factor": 1}]
)
def test_keys_of_yarn_that_change_nothing(harmless):
    assert from_hf({"rope_scaling": {**YARN_4K, **harmless}}) == from_hf({"rope_scaling": YARN_4K})


def test_readers_are_told_what_differs():
    assert "--rope-as-longrope" in notes(RopeScaling("yarn", 4.0, 4096), 16384)[0]
    cooler = RopeScaling("yarn", 4.0, 4096, attention_factor=1.0)
    assert "attention_factor" in notes(cooler, 16384)[1]
    assert "--max-model-len 8192" in notes(RopeScaling("linear", 4.0), 8192)[0]
    for scaling, as_longrope in (
        (RopeScaling("yarn", 4.0, 4096), True),
        (cooler, True),
        (RopeScaling("yarn_revised", 4.0, 4096), False),
        (RopeScaling("linear", 4.0, 4096, over=LLAMA31), False),
    ):
        vllm, llama_cpp = notes(scaling, 16384, as_longrope)
        assert "longrope" in vllm and "--max-model-len 16384" in vllm
        assert "llama.cpp" in llama_cpp and "plain rope" in llama_cpp
    assert "takes 8192" in notes(RopeScaling("llama3", 4.0, 4096), 16384)[1]
    assert len(notes(LLAMA31, 131072)) == 1
    assert notes(RopeScaling(), 4096, True) == notes(RopeScaling("ntk", 4.0), 16384) == []
    assert "two lists" in notes(RopeScaling("longrope", 16.0, 2048, **LISTS), 32768)[2]
    assert "dynamic" in notes(RopeScaling("dynamic", 4.0, 2048), 2048)[0]
