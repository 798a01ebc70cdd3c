"""parity.py on models that transformers made: every rope agrees, and what is wrong is seen."""

import dataclasses
import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from pose_megatron.checkpoints.convert import convert
from pose_megatron.checkpoints.huggingface import config_json, rope_check
from pose_megatron.checkpoints.megatron.directory import find
from pose_megatron.checkpoints.megatron.torch_dist import open_weights
from pose_megatron.checkpoints.sidecars import find_sidecars
from pose_megatron.evaluation import parity
from pose_megatron.models import rotary
from pose_megatron.rope.scaling import RopeScaling
from tests.whole_models import TOKENIZER, hf_to_megatron, write_weights

pytestmark = pytest.mark.usefixtures("world")
LISTS = {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
SCALINGS = [
    RopeScaling(),
    RopeScaling("ntk", 8.0, 128),
    RopeScaling("yarn", 8.0, 128),
    RopeScaling("yarn_revised", 8.0, 128),
    RopeScaling("llama3", 8.0, 128),
    RopeScaling("longrope", 8.0, 128, **LISTS),
    RopeScaling("dynamic", 8.0, 128),
    RopeScaling("yarn", 4.0, 256, over=RopeScaling("llama3", 2.0, 128)),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=301,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def both(llama, tmp_path):
    """Both sides of the model, extended as `scaling` says."""

    def make(scaling=SCALINGS[0], dtype=torch.float32, hf_dtype=torch.float32, window=1024):
        window = 128 if scaling.method == "dynamic" else window
        model = dataclasses.replace(
            config_json.read_config(llama), rope_scaling=scaling, max_position_embeddings=window
        )
        hf, megatron = tmp_path / "hf", tmp_path / "megatron"
        hf.mkdir()
        tensors = load_file(llama / "model.safetensors")
        save_file(
            {k: t.to(dtype).to(hf_dtype) for k, t in tensors.items()},
            hf / "model.safetensors",
            metadata={"format": "pt"},
        )
        config_json.write_config(hf, model, hf_dtype, {})
        whole = hf_to_megatron(
            {k: t.to(dtype) for k, t in tensors.items()}, **config_json.sizes(model)
        )
        write_weights(megatron, whole, model)
        return find(megatron), hf

    return make


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_every_rope_agrees_near_0_and_near_the_end(both, scaling, capsys):
    found, hf = both(scaling)
    errors = rope_check.rope_errors(hf, found.model)
    assert errors["inv_freq"] < 1e-6 and errors["attention_factor"] < 1e-12
    said = []
    plain, ends, exact = parity.check(found, hf, tokens=64, say=said.append)
    assert len(said) == 4 and said[0] == "loading both models"
    assert plain.error < 1e-4 and ends.error < 5e-3 and exact.error < 1e-4
    assert "1,023" in ends.where
    assert capsys.readouterr().out.count("(bound") == 2


def test_the_window_is_the_new_one_wherever_it_is_written(both, llama, tmp_path):
    found, _ = both(SCALINGS[2])
    source, export = tmp_path / "source", tmp_path / "export"
    source.mkdir()
    (source / "config.json").write_text((llama / "config.json").read_text())
    (source / "tokenizer.json").write_text(TOKENIZER)
    (source / "tokenizer_config.json").write_text('{"model_max_length": 128, "legacy": true}')
    for length, written in ((128, 1024), (77, 77)):  # the window before, and another limit
        (source / "generation_config.json").write_text(
            json.dumps({"max_length": length, "temperature": 0.6})
        )
        (export / str(length)).mkdir(parents=True)
        config_json.write_config(
            export / str(length), found.model, torch.float32, find_sidecars(source)
        )
        generation = GenerationConfig.from_pretrained(export / str(length))
        assert (generation.max_length, generation.temperature) == (written, 0.6)
    config = AutoConfig.from_pretrained(export / "128")
    assert config.max_position_embeddings == 1024
    assert config.rope_parameters["original_max_position_embeddings"] == 128
    tokenizer = json.loads((export / "128" / "tokenizer_config.json").read_text())
    assert tokenizer == {"model_max_length": 1024, "legacy": True}


def test_yarn_as_longrope_is_the_same_model(both):
    found, hf = both(SCALINGS[2])
    config_json.write_config(hf, found.model, torch.float32, {}, rope_as_longrope=True)
    assert json.loads((hf / "config.json").read_text())["rope_scaling"]["type"] == "longrope"
    assert rope_check.rope_errors(hf, found.model)["inv_freq"] < 1e-6
    parity.check(found, hf, tokens=64)


@pytest.mark.parametrize(
    "dtype, hf_dtype",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
    ],
)
def test_another_precision_is_rounded_away(both, dtype, hf_dtype):
    found, hf = both(SCALINGS[2], dtype, hf_dtype)
    assert set(open_weights(found.path).dtypes.values()) == {dtype}
    config = json.loads((hf / "config.json").read_text())
    for said in (hf_dtype, torch.float32, torch.bfloat16):  # the files count, not what it says
        config |= dict.fromkeys(("dtype", "torch_dtype"), str(said).removeprefix("torch."))
        (hf / "config.json").write_text(json.dumps(config))
        parity.check(found, hf, tokens=64)


def test_tensors_of_several_precisions(both):
    _, hf = both()
    tensors = load_file(hf / "model.safetensors")
    for name in tensors:
        if "norm" not in name and "v_proj" not in name:
            tensors[name] = tensors[name].bfloat16()
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="stored as bfloat16 and float32; say with --dtype"):
        convert(hf, hf.parent / "kept", loader="hf", saver="megatron", quiet=True)
    convert(hf, hf.parent / "m", loader="hf", saver="megatron", dtype=torch.float32, quiet=True)
    parity.check(find(hf.parent / "m"), hf, tokens=64)


LONG = [
    RopeScaling(),
    RopeScaling("yarn", 256.0, 4096),
    RopeScaling("yarn_revised", 256.0, 4096),
]


@pytest.mark.parametrize("scaling", LONG, ids=str)
@pytest.mark.parametrize("window", [524288, 1048576])
def test_float32_angles_of_transformers_refuse_no_window(both, scaling, window):
    found, hf = both(scaling, window=window)
    _, rounded, exact = parity.check(found, hf, tokens=64)
    assert rounded.error > 1e-3 and exact.error < 1e-5  # what a fixed bound would go by


@pytest.mark.parametrize(
    "broken",
    [
        {"factor": 255.0},
        {"rope_theta": 10001.0},
        {"attention_factor": 1.01 * (0.1 * math.log(256) + 1)},
        {"beta_fast": 16.0},
        {"original_max_position_embeddings": 8192},
    ],
    ids=str,
)
def test_a_broken_rope_of_a_million_positions_is_seen(both, broken):
    found, hf = both(LONG[1], window=1048576)
    config = json.loads((hf / "config.json").read_text())
    rope = config["rope_parameters"] | broken
    config |= {"rope_scaling": None, "rope_theta": rope["rope_theta"], "rope_parameters": rope}
    (hf / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="another rope than yarn x256 .* is off by"):
        parity.check(found, hf, tokens=64)


@pytest.mark.parametrize("pair", [0, 5])
def test_one_frequency_off_is_seen_in_our_model_too(both, pair, monkeypatch):
    """Not only in transformers': the angles that our layers compute are held to exact ones."""
    found, hf = both(LONG[1], window=1048576)
    true = rotary.inverse_frequencies

    def one_off(*args, **how):
        wrong = true(*args, **how).clone()
        wrong[pair] *= 1.001
        return wrong

    monkeypatch.setattr(rotary, "inverse_frequencies", one_off)
    with pytest.raises(ValueError, match="logits at .*: error"):
        parity.check(found, hf, tokens=64)


def test_a_narrow_ramp_enlarges_roundings_and_is_no_other_rope(llama, tmp_path):
    source, found = config_json.read_config(llama), []
    for window in range(3000, 6000, 100):  # some put a frequency onto the ramp
        ramp = RopeScaling("llama3", 64.0, window, low_freq_factor=2.0, high_freq_factor=2.25)
        model = dataclasses.replace(
            source,
            kv_channels=128,
            rotary_base=2e6,
            rope_scaling=ramp,
            max_position_embeddings=64 * window,
        )
        config_json.write_config(tmp_path, model, torch.float32, {})
        found.append(rope_check.rope_errors(tmp_path, model)["inv_freq"])
    assert max(found) > 1e-6  # float32's, in transformers
    other = dataclasses.replace(ramp, high_freq_factor=2.24, original_max_position_embeddings=5930)
    with pytest.raises(ValueError, match="reads another rope"):
        rope_check.rope_errors(tmp_path, dataclasses.replace(model, rope_scaling=other))


@pytest.mark.parametrize("method", ["yarn", "llama3"])
def test_a_base_a_little_off_is_seen_however_large_the_factor(llama, tmp_path, method):
    """Pairs on the ramp may be off by up to 5e-4 then; the others tell."""
    scaling = RopeScaling(method, 8192.0, 128)
    model = dataclasses.replace(
        config_json.read_config(llama),
        kv_channels=128,
        rope_scaling=scaling,
        max_position_embeddings=8192 * 128,
    )
    config_json.write_config(tmp_path, model, torch.float32, {})
    rope_check.rope_errors(tmp_path, model)
    said = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        said.replace('"rope_theta": 10000.0', '"rope_theta": 10001.0')
    )
    with pytest.raises(ValueError, match="reads another rope"):
        rope_check.rope_errors(tmp_path, model)


def test_another_rope_is_seen(both):
    """yarn where yarn_revised was trained."""
    found, hf = both(SCALINGS[3])
    config = json.loads((hf / "config.json").read_text())
    yarn = {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 128,
        "rope_theta": 10000.0,
    }
    config |= {"rope_scaling": None, "rope_parameters": yarn}
    (hf / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="reads another rope"):
        rope_check.rope_errors(hf, found.model)
    with pytest.raises(
        ValueError, match=f"{hf}: transformers reads another rope than yarn_revised"
    ):
        parity.check(found, hf, tokens=64)


def test_another_weight_is_seen(both, capsys):
    found, hf = both()
    tensors = load_file(hf / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name].roll(16, 0)  # the heads of another group
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="logits at plain positions: error"):
        parity.check(found, hf, tokens=64)
    assert re.search(r"plain positions: error [1-9]\.\de(-01|\+0)", capsys.readouterr().out)


def test_a_sliding_window_of_transformers_is_seen(both, monkeypatch):
    """Also one that nothing in our reading of config.json would refuse."""
    found, hf = both()
    opened = parity.HuggingFace().open(hf)
    monkeypatch.setattr(parity.HuggingFace, "open", lambda self, folder: opened)
    config = json.loads((hf / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    (hf / "config.json").write_text(json.dumps(config | {"sliding_window": 16}))
    with pytest.raises(ValueError, match="logits at plain positions"):
        parity.check(found, hf)
