"""models/families against transformers' models, and a new family that is one object."""

import dataclasses
import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file

from pose_megatron.checkpoints.huggingface import config_json, rope_check
from pose_megatron.checkpoints.megatron import args
from pose_megatron.models import families
from pose_megatron.models.build import build_model, transformer_config
from pose_megatron.models.families import FAMILIES, family_named, family_of, llama
from pose_megatron.models.families.family import Family
from pose_megatron.models.shape import ModelConfig
from pose_megatron.models.tensors import EXPERT, LAYER
from pose_megatron.rope.scaling import RopeScaling
from tests.whole_models import hf_to_megatron, megatron_to_hf

SIZES = {
    "vocab_size": 301,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": None,
}
EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 32, "moe_router_topk": 2}
GPTJ = {"vocab_size": 301, "n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8}


def saved(config, folder):
    """A random model of transformers, written by itself."""
    torch.manual_seed(0)
    model = getattr(transformers, config.__class__.__name__.replace("Config", "ForCausalLM"))(
        config
    )
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "name, tied",
    [
        *(
            (name, tied)
            for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Mixtral", "Qwen3Moe")
            for tied in (False, True)
        ),
        ("GPTJ", False),
    ],
)
def test_parameters_are_as_many_as_in_transformers(tmp_path, name, tied):
    sizes = GPTJ if name == "GPTJ" else SIZES
    if name == "Mixtral":
        sizes = sizes | {"num_local_experts": 4}
    if name == "Qwen3Moe":
        sizes = sizes | {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, tie_word_embeddings=tied)
    theirs = saved(config, tmp_path)
    model = config_json.read_config(tmp_path)
    vocabulary = [64] * (1 if tied else 2) + [1] * (name == "GPTJ")  # columns of each table
    padding = (384 - 301) * sum(vocabulary)
    assert model.padded_vocab_size == 384
    assert model.num_parameters == theirs.num_parameters() + padding


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("family", [*FAMILIES, None])
def test_a_built_model_has_the_tensors_of_its_table(family):
    traits = family_named(family)
    model = ModelConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        vocab_size=301,
        max_position_embeddings=128,
        untie_embeddings_and_output_weights=True,
        family=family,
        add_qkv_bias=traits.add_qkv_bias,
        qk_layernorm=traits.qk_layernorm,
        **EXPERTS if traits.has_experts else {},
    )
    built = build_model(transformer_config(model), model)
    values = [parameter.numel() for parameter in built.parameters()]
    assert sum(values) == model.num_parameters
    outside = sum(not name.startswith(LAYER) for name in traits.tensors)
    experts = sum(name.startswith(EXPERT) for name in traits.tensors)
    assert len(values) == outside + 2 * (len(traits.tensors) - outside + 3 * experts)


@pytest.mark.parametrize(
    "bias, norm, experts, family",
    [
        (False, False, False, "llama"),
        (True, False, False, "qwen2"),
        (False, True, False, "qwen3"),
        (True, True, False, None),
        (False, False, True, "mixtral"),
        (False, True, True, "qwen3_moe"),
    ],
)
def test_flags_of_a_fresh_model_name_its_family(bias, norm, experts, family):
    assert family_of(bias, norm, experts) == family
    found = family_named(family)
    assert found.has_experts == experts
    assert (found.add_qkv_bias, found.qk_layernorm) == (bias, norm)


@pytest.mark.parametrize("kind", ["Gemma3TextConfig", "Gemma3Config"])
@pytest.mark.parametrize("with_architecture", [True, False])
def test_gemma_3_is_refused_with_the_reason(tmp_path, kind, with_architecture):
    config = getattr(transformers, kind)()
    name = "Gemma3ForCausalLM" if "Text" in kind else "Gemma3ForConditionalGeneration"
    config.architectures = [name] if with_architecture else None
    config.save_pretrained(tmp_path)
    what = name if with_architecture else f"None of model_type {config.model_type}"
    with pytest.raises(
        ValueError,
        match=f"architecture {what} is not supported: its layers rotate by two bases.* norms behind attention "
        "and MLP, .*; supported are LlamaForCausalLM, .*, Qwen3MoeForCausalLM",
    ):
        config_json.read_config(tmp_path)


@pytest.mark.parametrize(
    "name", ["DeepseekV3", "Qwen2Moe", "GptOss", "Llama4Text", "Glm4Moe", "Gemma2", "Phi3", "Olmo2"]
)
def test_other_models_are_refused_with_those_that_are_supported(tmp_path, name):
    config = getattr(transformers, f"{name}Config")()
    config.architectures = [architecture := f"{name.removesuffix('Text')}ForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=f"architecture {architecture} is not supported; supported are Llama.*Mix"
    ):
        config_json.read_config(tmp_path)


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="the family 'gpt5' is not supported; .* llama, mistral"):
        family_named("gpt5")


def test_only_baichuan_is_exported_as_a_llama():
    assert families.family_as_llama("baichuan") == "llama"
    tensor = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    for name, expected in [
        ("decoder.layers.0.mlp.linear_fc2.weight", [[3.0, 4.0], [0.0, 2.0]]),
        ("output_layer.weight", [[0.6, 0.8], [0.0, 1.0]]),
    ]:
        FAMILIES["baichuan"].weight_as_llama(name, tensor)
        torch.testing.assert_close(tensor, torch.tensor(expected))
    for name in FAMILIES.keys() - {"baichuan"}:
        with pytest.raises(ValueError, match=f"--as-llama is for Baichuan2, not {name}"):
            families.family_as_llama(name)


# A new family: Phi-3 is a LLaMA with q, k and v in one tensor, and gate and up in another.
PHI3 = Family(
    name="phi3",
    title="Phi-3",
    tensors={
        **llama.TENSORS,
        f"{LAYER}.self_attention.linear_qkv.weight": f"{llama.HF_LAYER}.self_attn.qkv_proj.weight",
        f"{LAYER}.mlp.linear_fc1.weight": f"{llama.HF_LAYER}.mlp.gate_up_proj.weight",
    },
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    only={"hidden_act": "silu", "sliding_window": None, "attention_bias": False},
    epsilon=("rms_norm_eps", 1e-5),
)


@pytest.mark.usefixtures("world")
@torch.no_grad()
def test_a_new_family_is_one_object_and_its_place_in_the_table(monkeypatch, tmp_path):
    theirs = saved(
        transformers.Phi3Config(
            **{k: v for k, v in SIZES.items() if k != "head_dim"},
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.2,
            attn_implementation="eager",
        ),
        tmp_path / "theirs",
    ).eval()
    with pytest.raises(ValueError, match="architecture Phi3ForCausalLM is not supported"):
        config_json.read_config(tmp_path / "theirs")
    monkeypatch.setitem(FAMILIES, "phi3", PHI3)

    model = config_json.read_config(tmp_path / "theirs")
    assert model.family == "phi3" and model == ModelConfig.from_dict(model.to_dict())
    assert model.num_parameters == theirs.num_parameters() + 2 * (384 - 301) * 64
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    tensors = hf_to_megatron(weights, **config_json.sizes(model))
    back = megatron_to_hf(tensors, **config_json.sizes(model))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in back)

    built = build_model(transformer_config(model), model).eval()
    names = {  # the torch layer spec keeps its norms under other names than checkpoints do
        "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
        "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    }
    for stored, own in names.items():
        tensors = {name.replace(stored, own): tensor for name, tensor in tensors.items()}
    built.load_state_dict(tensors, strict=False)
    tokens = torch.arange(48)[None] * 5
    logits = built(tokens, torch.arange(48)[None], None)[..., :301]
    expected = theirs(tokens).logits
    assert expected.abs().max() > 1 and (logits - expected).abs().max() < 1e-4

    extended = dataclasses.replace(
        model, rope_scaling=RopeScaling("linear", 4.0, 128), max_position_embeddings=512
    )
    config_json.write_config(tmp_path, model, torch.float32, {})
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "phi3"
    assert config_json.read_config(tmp_path) == model
    assert rope_check.rope_errors(tmp_path, model)["inv_freq"] < 1e-6
    with pytest.raises(ValueError, match="transformers reads another rope"):
        rope_check.rope_errors(tmp_path, extended)
    assert args.to_args(model, 0, 0).swiglu and not args.to_args(model, 0, 0).add_bias_linear
    # By hand: projections q and output 64 x 64, k and v 32 x 64, three of the MLP, the output layer.
    matrices = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64) + 384 * 64
    assert math.isclose(model.flops_per_token(48), 3 * (2 * matrices + 3 * 2 * 64 * 48))
