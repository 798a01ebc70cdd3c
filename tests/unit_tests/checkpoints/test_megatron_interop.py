"""Megatron-LM's and Megatron-Bridge's checkpoints: ours hold what their loaders ask for; theirs,
written here as they write them, are read. Rotary angles are stock megatron-core's."""

import argparse
import dataclasses

import pytest
import torch
import yaml
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    YarnRotaryEmbedding,
    _yarn_get_concentration_factor,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel

from pose_megatron.checkpoints.megatron import args as megatron_args
from pose_megatron.checkpoints.megatron import directory, torch_dist
from pose_megatron.checkpoints.megatron.common_state import read_common_state
from pose_megatron.checkpoints.megatron.format import Megatron
from pose_megatron.checkpoints.megatron.run_config import from_run_config
from pose_megatron.checkpoints.megatron.torch_dist_metadata import read_index
from pose_megatron.config.layout import lay_out
from pose_megatron.evaluation.logits import load_logits
from pose_megatron.models.build import transformer_config
from pose_megatron.models.shape import ModelConfig
from pose_megatron.rope.angles import angles
from pose_megatron.rope.scaling import RopeScaling, attention_factor, inverse_frequencies
from tests import whole_models

pytestmark = pytest.mark.usefixtures("world")
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=250,
    max_position_embeddings=256,
    make_vocab_size_divisible_by=64,
    untie_embeddings_and_output_weights=True,
    norm_epsilon=1e-6,
    rotary_base=50000.0,
)

# Every name that load_args_from_checkpoint, check_checkpoint_args and load_checkpoint of
# Megatron-LM core_v0.16.1 (megatron/training/checkpointing.py) look up, for a dense GPT ...
MEGATRON_LM = """num_layers hidden_size ffn_hidden_size seq_length num_attention_heads
num_query_groups group_query_attention kv_channels max_position_embeddings position_embedding_type
add_position_embedding use_rotary_position_embeddings rotary_base rotary_percent rotary_interleaved
add_bias_linear add_qkv_bias squared_relu swiglu untie_embeddings_and_output_weights
apply_layernorm_1p normalization apply_query_key_layer_scaling attention_dropout hidden_dropout
num_experts spec hybrid_override_pattern is_hybrid_model heterogeneous_layers_config_path
padded_vocab_size make_vocab_size_divisible_by ckpt_format tensor_model_parallel_size
pipeline_model_parallel_size virtual_pipeline_model_parallel_size
num_layers_per_virtual_pipeline_stage expert_model_parallel_size world_size data_parallel_size
no_save_rng no_save_optim consumed_train_samples skipped_train_samples consumed_valid_samples
data_parallel_random_init ckpt_fully_parallel_save""".split()
# ... and that Megatron-Bridge takes from such args without a default
# (src/megatron/bridge/training/mlm_compat/arguments.py and model.py).
BRIDGE = """multi_latent_attention heterogeneous_layers_config_path no_persist_layer_norm
params_dtype overlap_p2p_comm num_experts rotary_interleaved decoder_first_pipeline_num_layers
decoder_last_pipeline_num_layers fp8_param_gather swiglu bias_swiglu_fusion bias_gelu_fusion
squared_relu init_method_xavier_uniform group_query_attention num_query_groups config_logger_dir
cp_comm_type is_hybrid_model moe_grouped_gemm qk_layernorm qk_l2_norm normalization transformer_impl
mtp_num_layers padded_vocab_size max_position_embeddings fp16_lm_cross_entropy
untie_embeddings_and_output_weights position_embedding_type rotary_percent rotary_base
use_rope_scaling make_vocab_size_divisible_by tensor_model_parallel_size""".split()


def whole_tensors(seed=0):
    """Those of an undivided stock GPTModel, by today's names."""
    torch.manual_seed(seed)
    model = stock_model()
    named = {}
    for name, tensor in model.named_parameters():
        named[todays_name(name)] = torch.randn_like(tensor)
    return named


def todays_name(name):
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


def stock_model():
    return GPTModel(
        transformer_config(MODEL),
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=256,
        max_sequence_length=256,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def their_args(**more):
    """As Megatron-LM's parser leaves them; of some 700, those that say what the model is."""
    return argparse.Namespace(
        **{
            "num_layers": 4,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "group_query_attention": True,
            "kv_channels": 8,
            "seq_length": 256,
            "max_position_embeddings": 256,
            "position_embedding_type": "rope",
            "rotary_base": 50000,
            "rotary_percent": 1.0,
            "rotary_interleaved": False,
            "use_rope_scaling": False,
            "rope_scaling_factor": 8.0,
            "rotary_seq_len_interpolation_factor": None,
            "swiglu": True,
            "normalization": "RMSNorm",
            "norm_epsilon": 1e-6,
            "add_bias_linear": False,
            "add_qkv_bias": False,
            "qk_layernorm": False,
            "squared_relu": False,
            "untie_embeddings_and_output_weights": True,
            "vocab_size": None,
            "padded_vocab_size": 256,
            "make_vocab_size_divisible_by": 64,
            "multi_latent_attention": False,
            "num_experts": None,
            "apply_layernorm_1p": False,
            "params_dtype": torch.float32,
            "fp16": False,
            "consumed_train_samples": 640,
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "use_distributed_optimizer": False,
            **more,
        }
    )


def save_as_they_do(root, common: dict, tensors: dict, dtype=torch.float32):
    """A torch_dist checkpoint: stock model, their common state, their tracker."""
    path = root / "iter_0000020"
    path.mkdir(parents=True)
    model = stock_model().to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[todays_name(name)])
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = {
        "checkpoint_version": 3.0,
        "iteration": 20,
        **common,
        "model": model.sharded_state_dict(metadata={"dp_cp_group": group}),
    }
    dist_checkpointing.save(state, str(path))
    (root / "latest_checkpointed_iteration.txt").write_text("20")
    return path


@pytest.mark.parametrize("name", ["norm_epsilon", "layernorm_epsilon"])
def test_the_norms_epsilon_is_read_by_both_of_its_names(name):
    """Megatron-LM has renamed it in 0.16.1."""
    args = vars(their_args())
    del args["norm_epsilon"]
    assert megatron_args.from_args(args | {name: 2e-6}, 256).norm_epsilon == 2e-6
    assert megatron_args.from_args(args, 256).norm_epsilon == 1e-5  # Megatron-LM's default


def test_two_epsilons_are_refused():
    args = vars(their_args(layernorm_epsilon=1e-5))
    message = "norm_epsilon 1e-06 and layernorm_epsilon 1e-05 contradict"
    with pytest.raises(ValueError, match=message):
        megatron_args.from_args(args, 256)


# Ours, as they read it.


def test_our_common_file_has_what_their_loaders_ask_for(tmp_path):
    whole_models.write_weights(tmp_path, whole_tensors(), MODEL)
    path = tmp_path / "release"
    common = dist_checkpointing.load_common_state_dict(str(path))
    args = common["args"]
    assert isinstance(args, argparse.Namespace) and common["checkpoint_version"] == 3.0
    assert common["iteration"] == 0 and common["num_floating_point_operations_so_far"] == 0
    metadata = dist_checkpointing.load_content_metadata(str(path))
    assert metadata["distrib_optim_sharding_type"] == "fully_reshardable"
    missing = {name for name in MEGATRON_LM + BRIDGE if not hasattr(args, name)}
    assert not missing
    assert (args.params_dtype, args.padded_vocab_size) == (torch.float32, 256)
    assert args.swiglu and args.normalization == "RMSNorm" and not args.add_bias_linear
    # And a reader that knows nothing of us sees the same model.
    assert megatron_args.from_args(vars(args), 256) == MODEL


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(),
        RopeScaling("linear", 4.0, 64),
        RopeScaling("ntk", 4.0, 64),
        RopeScaling("llama3", 32.0, 8192),
    ],
    ids=str,
)
def test_stock_megatron_core_rotates_as_we_do_from_our_args(scaling):
    model = dataclasses.replace(MODEL, rope_scaling=scaling)
    args = megatron_args.to_args(model, 0, 0)
    stock = RotaryEmbedding(
        args.kv_channels,
        args.rotary_percent,
        args.rotary_interleaved,
        args.rotary_seq_len_interpolation_factor,
        args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        use_cpu_initialization=True,
        cp_group=parallel_state.get_context_parallel_group(),
    )
    ours = angles(torch.arange(100)[None], inverse_frequencies(8, 50000.0, scaling))
    assert torch.allclose(stock(100).cos(), ours.cos(), atol=1e-5)
    assert torch.allclose(stock(100).sin(), ours.sin(), atol=1e-5)


def test_stock_megatron_core_finds_all_that_it_asks_for(tmp_path):
    """Extra state too, which Megatron-LM's loader wants by default (assume_ok_unexpected)."""
    tensors = whole_tensors()
    path = whole_models.write_weights(tmp_path, tensors, MODEL)
    model = stock_model()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    asked = model.sharded_state_dict(metadata={"dp_cp_group": group})
    assert any(name.endswith("_extra_state") for name in asked)
    state = dist_checkpointing.load({"model": asked}, str(path))["model"]
    model.load_state_dict(state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[todays_name(name)])


def test_layers_of_transformer_engine_find_the_extra_state_of_the_norms_of_heads(tmp_path):
    """Asked for by megatron-core 0.19.2 with Transformer Engine 2.20.2; see tests/fake_gpu."""
    model = dataclasses.replace(MODEL, family="qwen3", add_qkv_bias=False, qk_layernorm=True)
    tensors = {"decoder.final_layernorm.weight": torch.ones(model.hidden_size)}
    for at, of, asked in ((tmp_path / "with", model, True), (tmp_path / "without", MODEL, False)):
        objects = read_index(whole_models.write_weights(at, tensors, of)).objects
        for name in ("q_layernorm", "k_layernorm"):
            key = f"decoder.layers.self_attention.{name}._extra_state/shard_1_{of.num_layers}"
            assert (key in objects) == asked


# Megatron-LM's, as we read it.

YARN = {
    "position_embedding_type": "yarn",
    "rotary_scaling_factor": 8.0,
    "yarn_original_max_position_embeddings": 64,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_mscale": 1.0,
    "yarn_mscale_all_dim": 0.0,
    "yarn_correction_range_round_to_int": True,
}


def test_a_checkpoint_of_megatron_lm_is_read(tmp_path):
    tensors = whole_tensors()
    save_as_they_do(tmp_path, {"args": their_args()}, tensors)
    found = directory.find(tmp_path)
    assert found.model == dataclasses.replace(MODEL, vocab_size=256)
    assert (found.iteration, found.consumed_samples) == (20, 640)
    read, model = whole_models.read_weights(tmp_path)
    assert read.keys() == tensors.keys() and model == found.model
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert directory.find(tmp_path / "iter_0000020") == found  # the iteration itself
    tokens = torch.arange(10)[None]
    assert load_logits(found)(tokens, 10).shape == (1, 10, 256)


@pytest.mark.parametrize(
    "more, stock",
    [
        ({}, {}),
        (
            {"use_rope_scaling": True, "rope_scaling_factor": 4.0},
            {"rope_scaling": True, "rope_scaling_factor": 4.0},
        ),
        ({"rotary_seq_len_interpolation_factor": 4}, {"seq_len_interpolation_factor": 4}),
        (
            {"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2},
            {"rope_scaling": True, "rope_scaling_factor": 8.0, "seq_len_interpolation_factor": 2},
        ),
        ({"rotary_percent": 0.5}, {"rotary_percent": 0.5}),
    ],
)
def test_their_rope_is_stock_megatron_cores(more, stock):
    model = megatron_args.from_args(vars(their_args(**more)), 256)
    theirs = RotaryEmbedding(
        **{"kv_channels": 8, "rotary_percent": 1.0, "rotary_base": 50000} | stock,
        use_cpu_initialization=True,
        cp_group=parallel_state.get_context_parallel_group(),
    )
    ours = inverse_frequencies(model.rotary_dim, model.rotary_base, model.rope_scaling)
    ours = angles(torch.arange(100)[None], ours)
    assert torch.allclose(theirs(100).cos(), ours.cos(), atol=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"yarn_beta_fast": 16.0, "yarn_correction_range_round_to_int": False},
        {"yarn_mscale": 0.7, "yarn_mscale_all_dim": 1.0},
        {"yarn_mscale": None},
    ],
)
def test_their_yarn_is_stock_megatron_cores(more):
    args = YARN | more
    model = megatron_args.from_args(vars(their_args(**args)), 256)
    theirs = YarnRotaryEmbedding(
        8,
        rotary_base=50000,
        scaling_factor=8.0,
        original_max_position_embeddings=64,
        beta_fast=args["yarn_beta_fast"],
        beta_slow=1.0,
        use_cpu_initialization=True,
        correction_range_round_to_int=args["yarn_correction_range_round_to_int"],
        cp_group=parallel_state.get_context_parallel_group(),
    )
    stock = theirs.get_emb(100)[0]
    ours = inverse_frequencies(8, 50000.0, model.rope_scaling)
    assert torch.allclose(stock.cos(), angles(torch.arange(100)[None], ours).cos(), atol=1e-5)
    assert attention_factor(model.rope_scaling) == pytest.approx(
        _yarn_get_concentration_factor(8.0, args["yarn_mscale"], args["yarn_mscale_all_dim"])
    )


@pytest.mark.parametrize("wrong", ["word", -1, 0, 2.5, True, [], [4], {"a": 1}, 10**30])
def test_their_sizes_are_whole_numbers(wrong):
    for name in ("num_layers", "kv_channels", "make_vocab_size_divisible_by", "seq_length"):
        with pytest.raises(ValueError, match=name):
            megatron_args.from_args(vars(their_args(**{name: wrong})), 256)


@pytest.mark.parametrize("name", ["norm_epsilon", "rotary_base", "rotary_percent"])
def test_their_numbers_are_numbers(name):
    for wrong in ("word", [1.0], {}, True):
        with pytest.raises(ValueError, match=f"{name} must be a number"):
            megatron_args.from_args(vars(their_args(**{name: wrong})), 256)


@pytest.mark.parametrize(
    "args, rows, padded_by",
    [
        ({"vocab_size": 250}, 256, 64),
        ({"vocab_size": 250, "tensor_model_parallel_size": 8}, 512, 512),
        ({"vocab_size": 250, "make_vocab_size_divisible_by": 100}, 257, 257),
    ],
)
def test_their_padding_of_the_vocabulary_is_kept(args, rows, padded_by):
    model = megatron_args.from_args(vars(their_args(**args)), rows)
    assert (model.vocab_size, model.padded_vocab_size) == (250, rows)
    assert model.make_vocab_size_divisible_by == padded_by


@pytest.mark.parametrize(
    "more, said",
    [
        (
            {"normalization": "LayerNorm"},
            "normalization 'LayerNorm' is not supported, only 'RMSNorm'",
        ),
        ({"swiglu": False}, "swiglu False"),
        ({"num_experts": 8}, "num_experts 8"),
        ({"position_embedding_type": "learned_absolute"}, "'learned_absolute' is not supported"),
        ({"rotary_interleaved": True}, "rotary_interleaved True"),
        ({"multi_latent_attention": True}, "multi_latent_attention True"),
        ({"no_rope_freq": [0, 1]}, "no_rope_freq"),
        ({"num_layers": None}, "num_layers is missing"),
        ({"position_embedding_type": "yarn"}, "needs yarn_rotary_scaling_factor"),
    ],
)
def test_what_is_no_llama_is_named(tmp_path, more, said):
    path = save_as_they_do(tmp_path, {"args": their_args(**more)}, whole_tensors())
    with pytest.raises(ValueError, match=f"checkpoint {path}: .*{said}"):
        directory.find(tmp_path)


@pytest.mark.parametrize("distributed", [False, True])
def test_a_run_of_theirs_is_resumed(tmp_path, distributed):
    """Optimizer, scheduler and random state, from a checkpoint that holds nothing of our own."""
    from pose_megatron.config import arguments
    from pose_megatron.config.sampler import build_sampler
    from pose_megatron.training.run import Run
    from pose_megatron.training.trainer import save, setup

    words = [
        "--train-iters",
        "4",
        "--seq-length",
        "32",
        "--global-batch-size",
        "2",
        "--save",
        str(tmp_path),
        *["--use-distributed-optimizer"] * distributed,
    ]
    args = arguments.parse(words)
    sampler = build_sampler(args, MODEL.max_position_embeddings)
    trainer = setup(Run(args, MODEL, sampler), lay_out(args, MODEL, 1))
    trainer.models[0].zero_grad_buffer()
    trainer.optimizer.step()
    trainer.scheduler.step(2)
    trainer.continue_from(1, 2)
    path = save(trainer)
    common = read_common_state(path)
    del common["pose_megatron"]
    torch.save(common, path / "common.pt")
    found = directory.find(tmp_path)
    assert found.model == MODEL and found.consumed_samples == 2
    run = Run(args, found.model, sampler, loaded=found, resume=True)
    again = setup(run, lay_out(args, MODEL, 1))
    assert again.iteration == 1 and again.scheduler.num_steps == 2
    assert again.optimizer.param_groups[0]["lr"] == trainer.optimizer.param_groups[0]["lr"]
    for one, two in zip(again.stages[0].parameters(), trainer.stages[0].parameters(), strict=True):
        assert torch.equal(one, two)


def test_an_optimizer_in_a_form_of_theirs_is_not_resumed(tmp_path):
    from pose_megatron.config import arguments
    from pose_megatron.config.sampler import build_sampler
    from pose_megatron.training.run import Run
    from pose_megatron.training.trainer import setup

    path = save_as_they_do(
        tmp_path, {"args": their_args(use_distributed_optimizer=True)}, whole_tensors()
    )
    common = read_common_state(path)
    common["content_metadata"] = {"distrib_optim_sharding_type": "dp_reshardable"}
    torch.save(common, path / "common.pt")
    found = directory.find(tmp_path)
    args = arguments.parse(
        [
            "--train-iters",
            "4",
            "--seq-length",
            "32",
            "--use-distributed-optimizer",
            "--load",
            str(tmp_path),
        ]
    )
    sampler = build_sampler(args, found.model.max_position_embeddings)
    run = Run(args, found.model, sampler, loaded=found, resume=True)
    with pytest.raises(ValueError, match="in the form dp_reshardable, .*--finetune"):
        setup(run, lay_out(args, found.model, 1))


# Megatron-Bridge's, as we read it.

BRIDGE_MODEL = {  # of run_config.yaml, written by a GPTModelProvider
    "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "seq_length": 256,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    "layernorm_epsilon": 1e-6,
    "share_embeddings_and_output_weights": False,
    "vocab_size": 250,
    "make_vocab_size_divisible_by": 64,
    "should_pad_vocab": True,
    "rotary_base": 50000,
    "rotary_percent": 1.0,
    "position_embedding_type": "rope",
    "rope_scaling": False,
    "rope_scaling_factor": 1.0,
    "seq_len_interpolation_factor": None,
    "num_moe_experts": None,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 1,
    "params_dtype": {"_target_": "torch.bfloat16", "_call_": False},
}


def nested(model):
    """As the builders of later releases write it."""
    outer = {
        "vocab_size",
        "seq_length",
        "rotary_base",
        "rotary_percent",
        "rope_scaling",
        "share_embeddings_and_output_weights",
        "position_embedding_type",
        "make_vocab_size_divisible_by",
        "seq_len_interpolation_factor",
        "rope_scaling_factor",
    }
    inner = {k: v for k, v in model.items() if k not in outer and k != "_target_"}
    return {
        "_builder_": "megatron.bridge.models.gpt.gpt_builder.GPTModelBuilder",
        "transformer": inner | {"activation_func": "silu"},
        **{k: v for k, v in model.items() if k in outer},
    }


@pytest.mark.parametrize("shape", [BRIDGE_MODEL, nested(BRIDGE_MODEL)], ids=["flat", "nested"])
def test_a_checkpoint_of_megatron_bridge_is_read(tmp_path, shape):
    tensors = whole_tensors()
    path = save_as_they_do(tmp_path, {}, tensors)
    with pytest.raises(ValueError, match="no 'args' .*, and there is no run_config.yaml"):
        directory.find(tmp_path)
    (path / "run_config.yaml").write_text(
        yaml.safe_dump({"model": shape, "optimizer": {"use_distributed_optimizer": True}})
    )
    torch.save(
        {"step": torch.tensor(20), "consumed_train_samples": torch.tensor(1280)},
        path / "train_state.pt",
    )
    found = directory.find(tmp_path)
    assert found.model == MODEL and (found.iteration, found.consumed_samples) == (20, 1280)
    assert found.common["args"].use_distributed_optimizer
    assert found.common["args"].tensor_model_parallel_size == 2
    read, _ = whole_models.read_weights(tmp_path)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    load_logits(found)


@pytest.mark.parametrize(
    "more, scaling",
    [
        ({"rope_scaling": True, "rope_scaling_factor": 32.0}, RopeScaling("llama3", 32.0, 8192)),
        ({"seq_len_interpolation_factor": 4.0}, RopeScaling("linear", 4.0, 64)),
        (
            {
                "position_embedding_type": "yarn",
                "yarn_rotary_scaling_factor": 4.0,
                "yarn_original_max_position_embeddings": 64,
            },
            RopeScaling("yarn", 4.0, 64),
        ),
    ],
)
def test_bridges_rope(more, scaling):
    model = from_run_config({"model": BRIDGE_MODEL | more}, 256)
    assert model.rope_scaling == scaling


@pytest.mark.parametrize(
    "text, said",
    [
        ("model: [1", "run_config.yaml is not YAML"),
        ("- 1", "run_config.yaml must be a mapping"),
        ("train: {}", "run_config.yaml has no model section"),
        ("model: {num_layers: 4, gated_linear_unit: false}", "swiglu False"),
    ],
)
def test_a_broken_run_config_is_named(tmp_path, text, said):
    path = save_as_they_do(tmp_path, {}, whole_tensors())
    (path / "run_config.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"checkpoint {path}: .*{said}"):
        directory.find(tmp_path)


# The legacy layout.


def part_of(name, tensor, rank, ranks):
    """A tensor rank's share of a whole tensor, as Megatron-LM's parallel layers hold it."""
    if name.endswith("linear_fc1.weight"):
        gate, up = tensor.chunk(2)
        return torch.cat((gate.chunk(ranks)[rank], up.chunk(ranks)[rank]))
    if name.endswith(("linear_qkv.weight", "word_embeddings.weight", "output_layer.weight")):
        return tensor.chunk(ranks)[rank]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return tensor.chunk(ranks, dim=1)[rank]
    return tensor


def core_name(name):
    return name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.").replace(
        "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
    )


def old_name(name):
    for new, old in [
        ("decoder.", "encoder."),
        ("linear_qkv.layer_norm_", "!"),
        ("linear_qkv", "query_key_value"),
        ("linear_proj", "dense"),
        ("self_attention.!", "input_norm."),
        ("mlp.linear_fc1.layer_norm_", "post_attention_norm."),
        ("linear_fc1", "dense_h_to_4h"),
        ("linear_fc2", "dense_4h_to_h"),
        ("final_layernorm", "final_norm"),
    ]:
        name = name.replace(new, old)
    return name


def as_tree(named):
    """The models before megatron-core: language_model -> embedding, encoder, output_layer."""
    tree = {}
    for name, tensor in named.items():
        place = tree.setdefault("language_model", {})
        first, rest = name.split(".", 1)
        if first == "embedding":
            rest = rest.split(".")
            place.setdefault(first, {}).setdefault(rest[0], {})[rest[1]] = tensor
        else:
            place.setdefault(first, {})[rest] = tensor
    return tree


def save_legacy(
    root, tensors, tp=1, pp=1, vpp=1, rename=lambda name: name, tree=dict, args=(), **top
):
    """mp_rank folders as Megatron-LM writes them: chunk c of stage p has layers (c pp + p) n ..."""
    path = root / "iter_0000020"
    layers = 4 // (pp * vpp)
    for rank in range(tp):
        for stage in range(pp):
            state = {
                "checkpoint_version": 3.0,
                "iteration": 20,
                **top,
                "args": their_args(
                    tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **dict(args)
                ),
            }
            for chunk in range(vpp):
                first, named = (chunk * pp + stage) * layers, {}
                for name, tensor in tensors.items():
                    if name.startswith("decoder.layers."):
                        number = int(name.split(".")[2])
                        if not first <= number < first + layers:
                            continue
                        local = name.replace(f"layers.{number}.", f"layers.{number - first}.")
                    elif (name.startswith("embedding") and first) or (
                        not name.startswith("embedding") and first + layers < 4
                    ):
                        continue
                    else:
                        local = name
                    named[rename(local)] = part_of(name, tensor, rank, tp).clone()
                named |= (
                    {"decoder.layers.0.mlp.linear_fc1._extra_state": None} if (tree is dict) else {}
                )
                state["model" if vpp == 1 else f"model{chunk}"] = tree(named)
            folder = path / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else ""))
            folder.mkdir(parents=True)
            torch.save(state, folder / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("20")
    return path


@pytest.mark.parametrize("tp, pp, vpp", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 2), (2, 4, 1)])
@pytest.mark.parametrize(
    "rename, tree",
    [(lambda name: name, dict), (core_name, dict), (old_name, as_tree)],
    ids=["te", "local", "old"],
)
def test_legacy_parts_become_whole(tmp_path, tp, pp, vpp, rename, tree):
    tensors = whole_tensors()
    save_legacy(tmp_path, tensors, tp, pp, vpp, rename, tree)
    found = directory.find(tmp_path)
    assert found.model == dataclasses.replace(MODEL, vocab_size=256) and found.is_legacy
    assert (found.iteration, found.consumed_samples) == (20, 640)
    read, model = whole_models.read_weights(tmp_path)
    assert read.keys() == tensors.keys() and model == found.model
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert set(torch_dist.open_weights(tmp_path).dtypes.values()) == {torch.float32}
    assert torch_dist.open_weights(tmp_path).shapes == {
        n: tuple(t.shape) for n, t in tensors.items()
    }


def test_legacy_parts_are_a_source_of_conversion(tmp_path):
    tensors = whole_tensors()
    save_legacy(tmp_path, tensors, 2, 2)
    reader = Megatron().open(tmp_path)
    reader.check()
    assert [m.name for m in reader.mappings if m.name not in tensors] == []
    for mapping in reader.mappings:
        out = torch.empty(mapping.shape, dtype=reader.dtypes[mapping.name])
        assert torch.equal(reader.read(mapping, out), tensors[mapping.name])


def test_a_tied_head_is_not_read_twice(tmp_path):
    save_legacy(
        tmp_path, whole_tensors(), pp=2, args={"untie_embeddings_and_output_weights": False}
    )
    read, _ = whole_models.read_weights(tmp_path)
    assert "output_layer.weight" not in read and "embedding.word_embeddings.weight" in read


def test_what_is_wrong_with_a_legacy_checkpoint_is_named(tmp_path):
    def fails(said, name, spoil=lambda path: None, **how):
        path = save_legacy(tmp_path / name, whole_tensors(), **how)
        spoil(path)
        with pytest.raises(ValueError, match=said):
            directory.find(tmp_path / name)

    fails(
        "incomplete: mp_rank_01_001/model_optim_rng.pt is missing",
        "hole",
        tp=2,
        pp=2,
        spoil=lambda path: (path / "mp_rank_01_001" / "model_optim_rng.pt").unlink(),
    )
    fails(
        "holds 2 layers, its args say 4: a pipeline rank is missing",
        "cut",
        pp=2,
        spoil=lambda path: [
            (path / "mp_rank_00_001" / "model_optim_rng.pt").unlink(),
            (path / "mp_rank_00_001").rmdir(),
        ],
    )
    fails(
        "mp_rank_00/model_optim_rng.pt cannot be read",
        "damaged",
        spoil=lambda path: (path / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"PK\3\4no"),
    )
    fails(
        "mp_rank_00_000_001 is of a mixture of experts",
        "experts",
        spoil=lambda path: (path / "mp_rank_00_000_001").mkdir(),
    )
    fails("checkpoint_version 1.0, which orders queries", "ancient", checkpoint_version=1.0)
    fails("normalization 'LayerNorm' is not supported", "gpt2", args={"normalization": "LayerNorm"})
    fails(
        "holds no embedding.word_embeddings.weight", "other", rename=lambda name: f"vision.{name}"
    )
    with pytest.raises(ValueError, match="legacy layout; convert it first: .*--saver megatron"):
        save_legacy(tmp_path / "whole", whole_tensors())
        load_logits(directory.find(tmp_path / "whole"))
