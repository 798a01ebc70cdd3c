"""Checkpoints that stock megatron-core writes of a HybridModel are a GPTModel's to us."""

import argparse
import dataclasses

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from transformers import AutoModelForCausalLM

from pose_megatron.checkpoints.convert import convert
from pose_megatron.checkpoints.megatron import args as megatron_args
from pose_megatron.checkpoints.megatron import directory
from pose_megatron.checkpoints.megatron.hybrid_layout import gpt_args
from pose_megatron.errors import ConfigError
from pose_megatron.models.build import transformer_config
from pose_megatron.models.shape import ModelConfig
from pose_megatron.training.trainer import save
from tests import whole_models
from tests.hybrid_models import hybrid_name, needs_hybrid, stock_hybrid
from tests.unit_tests.training.test_checkpointing import stage_of, trainer_of

pytestmark = pytest.mark.usefixtures("world")

MODEL = ModelConfig(
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=256,
    max_position_embeddings=64,
    untie_embeddings_and_output_weights=True,
    rotary_base=50000.0,
)
TOKENS = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(3))
PLAIN = torch.arange(32).repeat(2, 1)


def their_args(model=MODEL, **more) -> argparse.Namespace:
    """As pretrain_hybrid leaves them: num_layers counts attention and MLP."""
    args = vars(megatron_args.to_args(model, 20, 640, tensor_model_parallel_size=1))
    hybrid = {"num_layers": 2 * model.num_layers, "hybrid_layer_pattern": "*-*-|*-"}
    run = {"pipeline_model_parallel_size": 1, "use_distributed_optimizer": False}
    return argparse.Namespace(**args | hybrid | run | more)


@pytest.fixture(params=["untied", "tied"])
def theirs(request, tmp_path):
    """(root, stock HybridModel with random weights that lie in it)."""
    model = dataclasses.replace(
        MODEL, untie_embeddings_and_output_weights=request.param == "untied"
    )
    built = stock_hybrid(model, transformer_config(model), "*-*-*-").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 0.2, generator=generator)
    root = tmp_path / "theirs"
    path = root / "iter_0000020"
    path.mkdir(parents=True)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = {
        "checkpoint_version": 3.0,
        "iteration": 20,
        "args": their_args(model),
        "model": built.sharded_state_dict(metadata={"dp_cp_group": group}),
    }
    dist_checkpointing.save(state, str(path), async_strategy="mcore")
    (root / "latest_checkpointed_iteration.txt").write_text("20")
    return root, model, built


def stored_name(name: str) -> str:
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


@needs_hybrid
def test_their_tensors_have_a_gpt_models_names(theirs):
    root, model, built = theirs
    found = directory.find(root)
    assert found.model == model and found.is_hybrid and found.iteration == 20
    tensors, _ = whole_models.read_weights(root)
    parameters = dict(built.named_parameters())
    gpt = dict(stage_of(model).named_parameters())
    assert set(tensors) == {stored_name(name) for name in gpt}
    for name in gpt:
        assert torch.equal(tensors[stored_name(name)], parameters[hybrid_name(name)]), name


@needs_hybrid
@torch.no_grad()
def test_a_conversion_has_the_logits_of_the_stock_hybrid_model(theirs, tmp_path):
    root, _, built = theirs
    convert(root, tmp_path / "hf", loader="megatron", saver="hf", quiet=True)
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    expected = built(TOKENS, PLAIN, None)
    assert expected.abs().max() > 1
    assert (llama(input_ids=TOKENS).logits - expected).abs().max() < 1e-4


@needs_hybrid
@pytest.mark.parametrize("kind", ["gpt", "hybrid"])
def test_training_starts_from_their_weights(theirs, kind):
    root, model, built = theirs
    words = ["--load", str(root), "--finetune", "--model-class", kind]
    trainer = trainer_of(model, *words, loaded=directory.find(root))
    mine = trainer.stages[0].eval()
    with torch.no_grad():
        assert (mine(TOKENS, PLAIN, None) - built(TOKENS, PLAIN, None)).abs().max() < 1e-5
    names = [hybrid_name(n) if kind == "gpt" else n for n, _ in mine.named_parameters()]
    parameters = dict(built.named_parameters())
    for name, weight in zip(names, mine.parameters(), strict=True):
        assert torch.equal(weight, parameters[name]), name


@needs_hybrid
@pytest.mark.parametrize("distributed", [False, True])
def test_a_gpt_model_resumes_the_optimizer_of_a_hybrid_layout(tmp_path, monkeypatch, distributed):
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from pose_megatron.models.hybrid import PoseHybridModel

    words = ["--save", str(tmp_path), *["--use-distributed-optimizer"] * distributed]
    theirs = trainer_of(MODEL, "--model-class", "hybrid", *words)
    generator = torch.Generator().manual_seed(1)
    for buffer in theirs.models[0].buffers:
        buffer.grad_data.normal_(generator=generator)
    theirs.optimizer.step()
    theirs.iteration = 1
    # megatron-core's own names.
    monkeypatch.setattr(PoseHybridModel, "sharded_state_dict", HybridModel.sharded_state_dict)
    path = save(theirs)
    args = directory.find(tmp_path).common["args"]
    assert "decoder.layers.5.mlp.linear_fc2.weight" in (
        dist_checkpointing.load_tensors_metadata(str(path))
    )
    assert args.num_layers == 3
    mine = trainer_of(MODEL, "--load", str(tmp_path), *words, loaded=directory.find(tmp_path))
    weights = dict(theirs.stages[0].named_parameters())
    for name, weight in mine.stages[0].named_parameters():
        twin = weights[hybrid_name(name)]
        assert torch.equal(weight, twin), name
        for moment in ("exp_avg", "exp_avg_sq"):
            one, other = (
                moments_of(trainer.optimizer, parameter)[moment]
                for trainer, parameter in ((mine, weight), (theirs, twin))
            )
            assert torch.equal(one, other) and one.abs().max() > 0, (name, moment)


def moments_of(optimizer, parameter) -> dict:
    (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
    if hasattr(part, "model_param_group_index_map"):
        group, order = part.model_param_group_index_map[parameter]
        parameter = part.optimizer.param_groups[group]["params"][order]
    return part.optimizer.state[parameter]


# Bad input.


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("M*-*-", "has Mamba layer 'M' at 0, where a GPTModel has '\\*'"),
        ("*-|*E", "has mixture-of-experts layer 'E' at 3, where a GPTModel has '-'"),
        ("**--", "has another kind of layer '\\*' at 1, where a GPTModel has '-'"),
        ("*-*-*", "ends without an MLP"),
        ("*-*-/*-", "has multi-token prediction after the '/'"),
    ],
)
@pytest.mark.parametrize("name", ["hybrid_layer_pattern", "hybrid_override_pattern"])
def test_a_pattern_that_is_no_gpt_models_is_refused(name, pattern, message):
    args = vars(their_args(hybrid_layer_pattern=None)) | {name: pattern}
    with pytest.raises(ConfigError, match=f"{name} .*{message}"):
        megatron_args.from_args(args, 256)


def test_a_pattern_says_how_many_layers_there_are():
    args = vars(their_args()) | {"is_hybrid_model": True}
    assert gpt_args(args)["num_layers"] == 3
    assert megatron_args.from_args(args, 256) == MODEL
    plain = vars(megatron_args.to_args(MODEL, 0, 0))
    assert gpt_args(plain) is plain
