"""Settings of Megatron's that change a model's function are refused, never dropped. What settings
there are, and what their defaults are, megatron-core's own TransformerConfig says."""

import dataclasses

import pytest
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from pose_megatron.checkpoints.megatron import settings
from pose_megatron.checkpoints.megatron.args import from_args, from_record, to_args
from pose_megatron.checkpoints.megatron.run_config import from_run_config
from pose_megatron.errors import ConfigError
from pose_megatron.models.shape import ModelConfig
from pose_megatron.rope.scaling import RopeScaling, attention_factor

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=128,
    max_position_embeddings=256,
    untie_embeddings_and_output_weights=True,
)


def args(**more):
    return vars(to_args(MODEL, 0, 0)) | more


def defaults(config):
    return {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(config)
    }


def bridges(**more):
    """A model section with every field of megatron-core's, as Megatron-Bridge writes a LLaMA's."""
    own = {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        "transformer_layer_spec": {"_target_": "megatron.bridge.models.gpt_provider.spec"},
        "hf_model_id": "meta-llama/Llama-2-7b-hf",
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "vocab_size": 128,
        "seq_length": 256,
        "gated_linear_unit": True,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
    }
    return {"model": defaults(TransformerConfig) | own | more}


def test_every_setting_of_megatron_core_is_known():
    known = settings.READ | settings.HARMLESS | settings.ONLY.keys()
    known |= settings.ONLY_OF_EXPERTS.keys()
    unknown = [
        name
        for name in defaults(MLATransformerConfig)
        if name not in known and not settings._HARMLESS.match(name)
    ]
    assert not unknown
    stock = defaults(TransformerConfig)
    for name, values in (settings.ONLY | settings.ONLY_OF_EXPERTS).items():
        assert stock.get(name, values[0]) in values


def test_plain_models_load():
    assert from_args(args(), 128) == MODEL
    assert from_run_config(bridges(), 128) == MODEL
    # A flag of a user's own program, one that spells the default out, one frequency for all layers.
    assert from_args(args(my_corpus="books", softmax_scale=8**-0.5, no_rope_freq=[0, 0]), 128)


CHANGED = [
    ("softmax_scale", 0.1),
    ("softmax_type", "off-by-one"),
    ("window_size", (16, 0)),
    ("attention_output_gate", True),
    ("activation_func_clamp_value", 7.0),
    ("glu_linear_offset", 1.0),
    ("layernorm_zero_centered_gamma", True),
    ("apply_residual_connection_post_layernorm", True),
    ("qk_clip", True),
    ("use_mup", True),
    ("mtp_num_layers", 1),
    ("heterogeneous_layers_config_path", "layers.json"),
    ("attn_logit_softcapping", 50.0),  # of no megatron-core
    ("embedding_multiplier", 12.0),
    ("layers_to_loop", 2),
]


@pytest.mark.parametrize("name, value", CHANGED)
def test_a_changed_function_is_refused_by_name(name, value):
    for read in (
        lambda: from_args(args(**{name: value}), 128),
        lambda: from_run_config(bridges(**{name: value}), 128),
        lambda: from_record(MODEL.to_dict(), args(**{name: value})),
    ):
        with pytest.raises(ConfigError, match=f"{name} .*(is not supported|is not known)"):
            read()


def test_all_of_a_model_section_counts():
    with pytest.raises(ConfigError, match="wibble 3 is not known"):
        from_run_config(bridges(wibble=3), 128)
    with pytest.raises(ConfigError, match="transformer_layer_spec 'mine.layers'"):
        from_run_config(bridges(transformer_layer_spec={"_target_": "mine.layers"}), 128)


def test_the_temperature_of_an_interpolation_is_no_change():
    yarn = RopeScaling("yarn", 4.0, 64)
    record = dataclasses.replace(MODEL, rope_scaling=yarn)
    scale = attention_factor(yarn) ** 2 / 8**0.5
    assert from_record(record.to_dict(), args(softmax_scale=scale)) == record
    with pytest.raises(ConfigError, match="softmax_scale"):
        from_record(MODEL.to_dict(), args(softmax_scale=scale))


def test_the_rope_of_bridges_first_llama31_is_read():
    ramp = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
    model = from_run_config(bridges(scale_factor=32.0, **ramp), 128)
    assert model.rope_scaling == RopeScaling("llama3", 32.0, 8192)
    with pytest.raises(ConfigError, match="old_context_len 4096"):
        from_run_config(bridges(scale_factor=8.0, **ramp | {"old_context_len": 4096}), 128)
