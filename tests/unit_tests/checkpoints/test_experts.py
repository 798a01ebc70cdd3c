"""Mixtures of experts in checkpoints: stock megatron-core's own writing and reading, their args, and
the layouts of a Hugging Face folder."""

import argparse
import dataclasses
import itertools
import json

import pytest
import torch
import transformers
from megatron.core import dist_checkpointing
from megatron.core.transformer.moe import experts as core_experts
from safetensors.torch import load_file, save_file

from pose_megatron.checkpoints.convert import convert
from pose_megatron.checkpoints.huggingface import config_json
from pose_megatron.checkpoints.megatron import args as megatron_args
from pose_megatron.checkpoints.megatron import directory, run_config, torch_dist
from pose_megatron.checkpoints.megatron.format import Megatron
from pose_megatron.checkpoints.summary import summarise
from pose_megatron.config.arguments import parse
from pose_megatron.config.layout import lay_out
from pose_megatron.config.sampler import build_sampler
from pose_megatron.evaluation.logits import load_logits
from pose_megatron.models.shape import ModelConfig
from pose_megatron.training.run import Run
from pose_megatron.training.trainer import setup
from tests.functional_tests.families import vivid
from tests.functional_tests.stock_experts import load, sharded, stock_model

pytestmark = pytest.mark.usefixtures("world")
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=256,
    max_position_embeddings=256,
    make_vocab_size_divisible_by=64,
    untie_embeddings_and_output_weights=True,
    rotary_base=50000.0,
    family="qwen3_moe",
    qk_layernorm=True,
    num_experts=4,
    moe_ffn_hidden_size=24,
    moe_router_topk=2,
)
# What load_args_from_checkpoint of Megatron-LM sets for experts, whatever the flags say.
MEGATRON_LM = """num_experts moe_layer_freq moe_ffn_hidden_size moe_router_topk
moe_router_pre_softmax moe_shared_expert_intermediate_size moe_router_score_function
moe_router_enable_expert_bias moe_router_topk_scaling_factor moe_latent_size""".split()
EXPERT = "decoder.layers.{}.mlp.experts.experts.{}.linear_fc{}.weight"
LOCAL = "decoder.layers.{}.mlp.experts.local_experts.{}.linear_fc{}.weight"


def their_args(**more) -> argparse.Namespace:
    """As Megatron-LM's parser leaves those that say what the model is."""
    return argparse.Namespace(
        **{
            "num_layers": 2,
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
            "swiglu": True,
            "normalization": "RMSNorm",
            "norm_epsilon": 1e-5,
            "add_bias_linear": False,
            "qk_layernorm": True,
            "untie_embeddings_and_output_weights": True,
            "make_vocab_size_divisible_by": 64,
            "num_experts": 4,
            "moe_layer_freq": 1,
            "moe_ffn_hidden_size": 24,
            "moe_router_topk": 2,
            "moe_router_pre_softmax": False,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_router_score_function": "softmax",
            "consumed_train_samples": 640,
            "tensor_model_parallel_size": 1,
            "use_distributed_optimizer": False,
            **more,
        }
    )


def fresh(**more):
    """A stock model of random weights."""
    model = stock_model(MODEL, **more)
    vivid(dict(model.named_parameters()))
    return model


def save_as_they_do(root, model, **args):
    path = root / "iter_0000020"
    path.mkdir(parents=True)
    state = {"args": their_args(**args), "iteration": 20, "checkpoint_version": 3.0}
    dist_checkpointing.save(state | {"model": sharded(model)}, str(path))
    (root / "latest_checkpointed_iteration.txt").write_text("20")
    return path


def check_experts(weights, model):
    held = dict(model.named_parameters())
    for layer in range(2):
        norm = held[f"decoder.layers.{layer}.pre_mlp_layernorm.weight"]
        assert torch.equal(weights[f"decoder.layers.{layer}.pre_mlp_layernorm.weight"], norm)
        router = f"decoder.layers.{layer}.mlp.router.weight"
        assert torch.equal(weights[router], held[router])
        for expert in range(4):
            for fc in (1, 2):
                mine = weights[EXPERT.format(layer, expert, fc)]
                assert torch.equal(mine, held[LOCAL.format(layer, expert, fc)])


@pytest.mark.parametrize(
    "as_transformer_engine, layer_freq", [(False, 1), (True, 1), (True, [1, 1])]
)
def test_what_stock_megatron_core_saves_is_read(tmp_path, as_transformer_engine, layer_freq):
    """A list of layers makes megatron-core keep them under keys of their own."""
    model = fresh(as_transformer_engine=as_transformer_engine, moe_layer_freq=layer_freq)
    save_as_they_do(tmp_path / "theirs", model, moe_layer_freq=layer_freq)
    assert directory.find(tmp_path / "theirs").model == MODEL
    weights = torch_dist.open_weights(tmp_path / "theirs")
    assert len(weights) == 3 + 2 * (7 + 2 * 4)
    check_experts(weights, model)
    convert(tmp_path / "theirs", tmp_path / "hf", loader="megatron", saver="hf", quiet=True)
    if layer_freq == 1:
        tokens, positions = torch.arange(24)[None] * 7, torch.arange(24)[None]
        ours = load_logits(directory.find(tmp_path / "theirs"))(tokens, 24)
        mask = torch.ones(24, 24).triu(1).bool()[None, None]
        with torch.no_grad():
            expected = model.eval()(tokens, positions, mask)
        assert expected.abs().max() > 0.5 and (ours - expected).abs().max() < 1e-4
    back = load_file(tmp_path / "hf" / "model.safetensors")
    fc1 = weights[EXPERT.format(1, 3, 1)].split(24)
    for name, half in zip(("gate", "up"), fc1, strict=True):
        assert torch.equal(back[f"model.layers.1.mlp.experts.3.{name}_proj.weight"], half)


@pytest.mark.skipif(
    not hasattr(core_experts, "GroupedMLP"), reason="this megatron-core has TEGroupedMLP alone"
)
def test_grouped_experts_load_what_we_write(tmp_path, monkeypatch):
    """Their weights lie side by side and transposed; only their product needs the library."""
    save_as_they_do(tmp_path / "theirs", fresh())
    convert(tmp_path / "theirs", tmp_path / "ours", loader="megatron", saver="megatron", quiet=True)
    monkeypatch.setattr(core_experts.gg, "assert_grouped_gemm_is_available", lambda: None)
    grouped = stock_model(MODEL, moe_grouped_gemm=True, bf16=False)
    load(grouped, directory.find(tmp_path / "ours").path)
    weights = torch_dist.open_weights(tmp_path / "ours")
    held = dict(grouped.named_parameters())
    for layer in range(2):
        fc1 = held[f"decoder.layers.{layer}.mlp.experts.weight1"].view(4, 32, 48)
        fc2 = held[f"decoder.layers.{layer}.mlp.experts.weight2"].view(4, 24, 32)
        for expert in range(4):
            assert torch.equal(fc1[expert].T, weights[EXPERT.format(layer, expert, 1)])
            assert torch.equal(fc2[expert].T, weights[EXPERT.format(layer, expert, 2)])


def test_our_args_are_what_their_loader_sets():
    args = megatron_args.to_args(MODEL, 0, 0)
    assert not [name for name in MEGATRON_LM if not hasattr(args, name)]
    assert (args.num_experts, args.moe_ffn_hidden_size, args.moe_router_topk) == (4, 24, 2)
    assert args.moe_router_pre_softmax is False and args.moe_layer_freq == 1
    assert args.moe_grouped_gemm is None  # which leaves the flag of the run that loads them
    assert megatron_args.from_args(vars(args), 256) == MODEL
    dense = megatron_args.to_args(dataclasses.replace(MODEL, **DENSE), 0, 0)
    assert not [name for name in vars(dense) if name.startswith("moe_") and "gemm" not in name]


DENSE = {
    "family": "qwen3",
    "num_experts": None,
    "moe_ffn_hidden_size": None,
    "moe_router_topk": None,
}


@pytest.mark.parametrize(
    "more, family, expected",
    [
        ({}, "qwen3_moe", (24, 2, False)),
        ({"qk_layernorm": False}, "mixtral", (24, 2, False)),
        ({"moe_router_pre_softmax": True, "moe_router_topk": 1}, "qwen3_moe", (24, 1, True)),
        ({"moe_ffn_hidden_size": None}, "qwen3_moe", (64, 2, False)),
    ],
)
def test_their_args_name_the_family(more, family, expected):
    model = megatron_args.from_args(vars(their_args(**more)), 256)
    found = (model.moe_ffn_hidden_size, model.moe_router_topk, model.moe_router_pre_softmax)
    assert (model.family, found) == (family, expected)


def test_a_dense_models_args_hold_the_parsers_defaults_for_experts():
    model = megatron_args.from_args(vars(their_args(num_experts=None)), 256)
    assert model == dataclasses.replace(MODEL, **DENSE)


@pytest.mark.parametrize(
    "more, said",
    [
        (
            {"moe_layer_freq": [0, 1]},
            r"experts with moe_layer_freq \[0, 1\] is not supported",
        ),
        ({"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ({"moe_shared_expert_intermediate_size": 64}, "moe_shared_expert_intermediate_size 64"),
        ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function 'sigmoid'"),
        ({"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor 1.0"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "'sinkhorn' is not supported"),
        ({"moe_router_topk": None}, "num_experts 4 needs moe_router_topk"),
        ({"moe_router_topk": 1}, "--moe-router-topk 1 needs --moe-router-pre-softmax"),
        ({"moe_router_topk": 5}, "--moe-router-topk 5 is more than --num-experts 4"),
        ({"add_qkv_bias": True}, "--add-qkv-bias: no supported mixture of experts"),
        (
            {"qk_layernorm": False, "moe_router_pre_softmax": True},
            "--moe-router-pre-softmax: the softmax of Mixtral is over the chosen experts",
        ),
    ],
)
def test_experts_of_another_kind_are_named(more, said):
    with pytest.raises(ValueError, match=said):
        megatron_args.from_args(vars(their_args(**more)), 256)


def test_optimizers_of_experts_that_were_apart_are_not_resumed_together(tmp_path):
    args = {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 1}
    save_as_they_do(tmp_path, fresh(), **args)
    found = directory.find(tmp_path)
    words = parse(["--train-iters", "4", "--seq-length", "32", "--load", str(tmp_path)])
    sampler = build_sampler(words, MODEL.max_position_embeddings)
    run = Run(words, found.model, sampler, loaded=found, resume=True)
    with pytest.raises(ValueError, match="with --expert-model-parallel-size above 1: .*--finetune"):
        setup(run, lay_out(words, found.model, 1))


def test_a_model_of_megatron_bridge():
    section = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "seq_length": 256,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "qk_layernorm": True,
        "share_embeddings_and_output_weights": False,
        "make_vocab_size_divisible_by": 64,
        "rotary_base": 50000,
        "position_embedding_type": "rope",
        "num_moe_experts": 4,
        "moe_ffn_hidden_size": 24,
        "moe_router_topk": 2,
        "moe_router_pre_softmax": False,
        "moe_layer_freq": 1,
        "moe_router_score_function": "softmax",
    }
    assert run_config.from_run_config({"model": section}, 256) == MODEL
    section["moe_shared_expert_intermediate_size"] = 64
    with pytest.raises(ValueError, match="moe_shared_expert_intermediate_size 64 is not supported"):
        run_config.from_run_config({"model": section}, 256)


# The legacy layout.


def shard(name, tensor, rank, ranks):
    """A tensor rank's share, as Megatron-LM's parallel layers hold it."""
    if name.endswith("linear_fc1.weight"):
        gate, up = tensor.chunk(2)
        return torch.cat((gate.chunk(ranks)[rank], up.chunk(ranks)[rank]))
    if name.endswith(("linear_qkv.weight", "word_embeddings.weight", "output_layer.weight")):
        return tensor.chunk(ranks)[rank]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return tensor.chunk(ranks, dim=1)[rank]
    return tensor


def sequential(fc1, fc2):
    for i, (one, two) in enumerate(zip(fc1, fc2, strict=True)):
        yield from ((f"local_experts.{i}.linear_fc{n}.weight", t) for n, t in ((1, one), (2, two)))


def te_grouped(fc1, fc2):
    for n, weights in ((1, fc1), (2, fc2)):
        yield from ((f"linear_fc{n}.weight{i}", weight) for i, weight in enumerate(weights))


def grouped(fc1, fc2):
    """As GroupedMLP multiplies by them: [experts, in, out] in two dimensions."""
    yield "weight1", torch.stack([t.T for t in fc1]).reshape(len(fc1[0].T), -1)
    yield "weight2", torch.stack([t.T for t in fc2]).reshape(-1, len(fc2[0]))


def save_legacy(root, model, module, tp=1, pp=1, ep=1, **args):
    """mp_rank folders: every expert-parallel rank has some experts, and all else."""
    held, count, depth = dict(model.named_parameters()), 4 // ep, 2 // pp
    for rank, stage, expert in itertools.product(range(tp), range(pp), range(ep)):
        part = {}
        for name, tensor in held.items():
            layer = int(name.split(".")[2]) if name.startswith("decoder.layers") else None
            if ".local_experts." in name or (layer is not None and layer // depth != stage):
                continue
            if layer is None and (name.startswith("embedding") != (stage == 0)) and pp > 1:
                continue
            local = name if layer is None else name.replace(f".{layer}.", f".{layer % depth}.", 1)
            part[local] = shard(name, tensor, rank, tp).detach().clone()
        for layer in range(stage * depth, (stage + 1) * depth):
            numbers = range(expert * count, (expert + 1) * count)
            fc1, fc2 = (
                [
                    shard(
                        f"linear_fc{n}.weight", held[LOCAL.format(layer, i, n)], rank, tp
                    ).detach()
                    for i in numbers
                ]
                for n in (1, 2)
            )
            for name, tensor in module(fc1, fc2):
                part[f"decoder.layers.{layer % depth}.mlp.experts.{name}"] = tensor.clone()
        words = {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "expert_model_parallel_size": ep,
        }
        folder = f"mp_rank_{rank:02d}" + f"_{stage:03d}" * (pp > 1) + f"_{expert:03d}" * (ep > 1)
        (root / "iter_0000020" / folder).mkdir(parents=True)
        torch.save(
            {
                "args": their_args(**words | args),
                "iteration": 20,
                "checkpoint_version": 3.0,
                "model": part,
            },
            root / "iter_0000020" / folder / "model_optim_rng.pt",
        )
    (root / "latest_checkpointed_iteration.txt").write_text("20")


@pytest.mark.parametrize("module", [sequential, te_grouped, grouped])
@pytest.mark.parametrize(
    "tp, pp, ep", [(1, 1, 1), (1, 1, 2), (2, 1, 2), (1, 2, 1), (2, 2, 4), (2, 1, 1)]
)
def test_legacy_folders_of_experts_become_whole(tmp_path, module, tp, pp, ep):
    model = fresh()
    save_legacy(tmp_path, model, module, tp, pp, ep)
    found = directory.find(tmp_path)
    assert found.is_legacy and found.model == MODEL
    weights = torch_dist.open_weights(tmp_path)
    assert len(weights) == 3 + 2 * (7 + 2 * 4)
    check_experts(weights, model)
    assert all(weights[name].shape == shape for name, shape in weights.shapes.items())
    Megatron().open(tmp_path).check()


def test_what_is_wrong_with_legacy_experts_is_named(tmp_path):
    save_legacy(tmp_path / "hole", fresh(), sequential, ep=4)
    (tmp_path / "hole" / "iter_0000020" / "mp_rank_00_002" / "model_optim_rng.pt").unlink()
    with pytest.raises(ValueError, match="mp_rank_00_002/model_optim_rng.pt is missing"):
        directory.find(tmp_path / "hole")
    save_legacy(tmp_path / "other", fresh(), sequential, tp=2, expert_tensor_parallel_size=1)
    with pytest.raises(ValueError, match="expert_tensor_parallel_size 1 is not supported"):
        directory.find(tmp_path / "other")


# Hugging Face's folders.

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
OF = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}


def made(name, folder, **more):
    """A model that transformers writes, one tensor for each expert as on the hub, or all in one."""
    config = getattr(transformers, f"{name}Config")(**SIZES, **OF[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    vivid(dict(model.named_parameters()))
    model.save_pretrained(folder, **more)


@pytest.mark.parametrize("name", OF)
def test_both_layouts_of_transformers_are_one_model(tmp_path, name):
    made(name, tmp_path / "apart")
    model = getattr(transformers, f"{name}ForCausalLM").from_pretrained(tmp_path / "apart")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    apart, stacked = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("apart", "stacked")
    )
    assert len(apart) > len(stacked)
    for folder in ("apart", "stacked"):
        convert(tmp_path / folder, tmp_path / "back", loader="hf", saver="hf", overwrite=True)
        back = load_file(tmp_path / "back" / "model.safetensors")
        assert back.keys() == apart.keys()
        assert all(torch.equal(back[key], apart[key]) for key in apart)

    key = "model.layers.0.mlp.experts.gate_up_proj"
    odd = stacked[key][:, 1:].contiguous()
    save_file(stacked | {key: odd}, tmp_path / "stacked" / "model.safetensors")
    with pytest.raises(ValueError, match=f"{key} has shape .*, which is not .experts, 2 x rows"):
        convert(tmp_path / "stacked", tmp_path / "no", loader="hf", saver="hf")


def change(folder, **keys):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def test_config_json_in_the_hubs_spelling(tmp_path):
    """Qwen3-30B-A3B's names, where transformers 5 writes num_local_experts."""
    made("Qwen3Moe", tmp_path)
    expected = config_json.read_config(tmp_path)
    assert expected.moe_router_pre_softmax  # norm_topk_prob is false, as transformers' default
    change(tmp_path, num_experts=4, num_local_experts="absent", norm_topk_prob=True)
    found = config_json.read_config(tmp_path)
    assert found == dataclasses.replace(expected, moe_router_pre_softmax=False)
    change(tmp_path, num_local_experts=8)
    with pytest.raises(ValueError, match="num_experts is 4, num_local_experts 8"):
        config_json.read_config(tmp_path)


def test_an_export_keeps_what_the_source_says_of_balancing(tmp_path):
    made("Mixtral", tmp_path / "theirs")
    change(tmp_path / "theirs", router_aux_loss_coef=0.02, output_router_logits=True)
    convert(tmp_path / "theirs", tmp_path / "mg", loader="hf", saver="megatron", quiet=True)
    convert(tmp_path / "mg", tmp_path / "back", loader="megatron", saver="hf", quiet=True)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["router_aux_loss_coef"], config["output_router_logits"]) == (0.02, True)
    assert (config["num_local_experts"], config["intermediate_size"]) == (4, 48)
    assert "4 experts of 48, 2 to a token" in str(summarise(tmp_path / "mg"))


@pytest.mark.parametrize(
    "name, keys, said",
    [
        ("Qwen3Moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported, only 1"),
        ("Qwen3Moe", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\] is not supported"),
        ("Mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1 is not supported"),
        ("Mixtral", {"sliding_window": 4096}, "sliding_window 4096 is not supported"),
        ("Mixtral", {"num_experts_per_tok": 1}, "--moe-router-topk 1 needs"),
    ],
)
def test_what_our_layers_do_not_compute_is_refused(tmp_path, name, keys, said):
    made(name, tmp_path)
    change(tmp_path, **keys)
    with pytest.raises(ValueError, match=said):
        config_json.read_config(tmp_path)


def test_a_dense_models_dict_says_nothing_of_experts():
    dense = dataclasses.replace(MODEL, **DENSE)
    assert not [name for name in dense.to_dict() if "moe" in name or "expert" in name]
    assert ModelConfig.from_dict(dense.to_dict()) == dense
    assert ModelConfig.from_dict(MODEL.to_dict()) == MODEL


def test_parameters_and_flops_count_the_experts():
    """By hand: 4 experts hold weights, 2 of them multiply a token."""
    attention = 2 * 32 * 32 + 2 * 16 * 32
    expert, router = 3 * 24 * 32, 4 * 32
    norms = 2 * (2 * 32 + 2 * 8) + 32
    whole = 2 * (attention + router + 4 * expert) + norms + 2 * 256 * 32
    assert MODEL.num_parameters == whole
    active = 2 * (attention + router + 2 * expert) + 256 * 32
    assert MODEL.flops_per_token(64) == 3 * (2 * active + 2 * 2 * 32 * 64)
