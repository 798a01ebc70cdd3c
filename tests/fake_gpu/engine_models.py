"""Models of Transformer Engine's layers: what they are made of, and checkpoints that pass through them.

    python engine_models.py FOLDER > found.json

Needs the variables of environment.py, as Transformer Engine builds no layer without a CUDA device.
Weights stay on the CPU all the same: there, numbers are numbers.
"""

import json
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pose_megatron.runtime.startup import prepare_megatron

prepare_megatron()

# isort: split
import torch
from megatron.core.extensions import transformer_engine as engine
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.gpt.gpt_model import GPTModel

from pose_megatron.checkpoints.megatron import directory
from pose_megatron.checkpoints.megatron.args import common_state
from pose_megatron.checkpoints.megatron.common_state import add_common_file
from pose_megatron.checkpoints.megatron.torch_dist_metadata import read_index
from pose_megatron.models import build
from pose_megatron.models.shape import ModelConfig
from pose_megatron.runtime import distributed
from pose_megatron.training import checkpointing
from tests.functional_tests import stock_experts
from tests.functional_tests.families import CASES, YARN, Case, convert_tool, make, rope, same_bits

FAMILIES = {
    "Llama": Case("Llama", rope(1e4, **YARN)),
    "Qwen2": Case("Qwen2", rope(1e6)),
    "Qwen3": Case("Qwen3", {"head_dim": 32, **rope(1e6)}),
    "Qwen3-MoE": CASES["Qwen3-MoE"],
}


def ours(model: ModelConfig, implementation: str, model_class: str = "gpt"):
    """A stage of fresh weights on the CPU."""
    config = build.transformer_config(
        model, transformer_impl=implementation, model_class=model_class
    )
    config.use_cpu_initialization = True
    with mock.patch.object(build, "device", lambda: torch.device("cpu")):
        return build.build_model(config, model, implementation, model_class=model_class)


def theirs(model: ModelConfig) -> GPTModel:
    """Stock megatron-core's, by nothing of ours."""
    grouped = model.num_experts is not None
    spec = get_gpt_layer_with_transformer_engine_spec(
        model.num_experts, grouped, model.qk_layernorm
    )
    return stock_experts.stock_model(model, spec=spec, moe_grouped_gemm=grouped)


def save(stage, model: ModelConfig, root: Path) -> Path:
    """Weights alone, with all extra state, as Megatron-LM's --no-save-optim leaves them."""
    state = common_state(
        model,
        1,
        0,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=1,
        world_size=1,
        data_parallel_size=1,
        no_save_optim=True,
        no_save_rng=True,
        params_dtype=torch.float32,
        use_distributed_optimizer=False,
    )

    def finish(path: Path) -> None:
        add_common_file(path)
        directory.publish(root, path, 1)

    state["model"] = stock_experts.sharded(stage)
    return checkpointing.write(root, 1, state, directory.content_metadata(), (), finish)


def load(stage, root: Path) -> None:
    found = directory.find(root)
    if type(stage) is GPTModel:  # as Megatron-LM does: with all extra state, and nothing may lack
        stock_experts.load(stage, found.path)
    else:
        checkpointing.load(found, [stage])


def convert(loader: str, source: Path, saver: str, target: Path) -> None:
    """Without comparing logits, which would be computed on the fake GPU."""
    words = ["--loader", loader, "--load-dir", source, "--saver", saver, "--save-dir", target]
    convert_tool()(*words, "--no-verify")


def parameters(stage) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in stage.named_parameters()}


def stored(path: Path) -> dict[str, list[int]]:
    """{key: shape} of a checkpoint's tensors."""
    return {key: list(tensor.size) for key, tensor in read_index(path).tensors.items()}


def scales(stage) -> list[list[float]]:
    """Of each layer that attends: the factor of q.k that each of its kernels takes."""
    found = [m for m in stage.modules() if isinstance(m, engine.TEDotProductAttention)]
    kernels = ("flash_attention", "fused_attention", "unfused_attention")
    return [[getattr(m, name).softmax_scale for name in kernels] for m in found]


# In this order weights pass through them, each from the one before.
STAGES = {
    "stock": theirs,
    "torch": lambda model: ours(model, "torch"),
    "engine": lambda model: ours(model, "transformer_engine"),
    "torch again": lambda model: ours(model, "torch"),
    "engine, hybrid": lambda model: ours(model, "transformer_engine", "hybrid"),
    "engine again": lambda model: ours(model, "transformer_engine"),
    "broken": lambda model: ours(model, "transformer_engine"),
}


def look(case: Case, folder: Path) -> dict:
    """What a family's models are, and whether they hand on its weights."""
    original, path = folder / "hf", folder / "converted"
    make(case, original)
    convert("hf", original, "megatron", path)
    found = directory.find(path)
    row = {"stored": {"converted": stored(found.path)}, "parameters": {}, "scales": {}, "same": {}}
    for name, make_stage in STAGES.items():
        stage = make_stage(found.model)
        row["parameters"][name], row["scales"][name] = parameters(stage), scales(stage)
        load(stage, path)
        if name == "broken":
            with torch.no_grad():
                stage.decoder.layers[0].self_attention.linear_proj.weight[0, 0] += 1
        path = folder / name
        row["stored"][name] = stored(save(stage, found.model, path))
        back = folder / f"{name} in hf"
        convert("megatron", path, "hf", back)
        row["same"][name] = same_bits(original, back)
    return row


def main(folder: Path) -> None:
    distributed.initialize(seed=0)
    found = {}
    for name, case in FAMILIES.items():
        (folder / name).mkdir()
        found[name] = look(case, folder / name)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
