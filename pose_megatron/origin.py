"""Which program wrote a checkpoint, and what model it holds.

    ours              `pose_megatron` in common.pt
    Megatron-LM       `args` in common.pt; or the legacy layout
    Megatron-Bridge   run_config.yaml beside common.pt, progress in train_state.pt
"""

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.safe_globals import register_safe_globals
from torch.distributed.checkpoint.api import CheckpointException

from pose_megatron import megatron_args
from pose_megatron.legacy import Legacy, is_legacy
from pose_megatron.model_config import ModelConfig

# The library has no error of its own for damaged files, and torch's is no Exception.
ANY_FAILURE = (Exception, CheckpointException)

register_safe_globals()


def model_and_common(path: Path) -> tuple[ModelConfig, dict]:
    """The model of one iteration, and its common.pt, with Megatron-LM's `args` in it.

    Raises:
        ValueError: a file is missing or damaged, or the model is no LLaMA; names it.
    """
    if is_legacy(path):
        old = Legacy(path)
        return old.model, {"args": old.args, "iteration": old.iteration}
    for name in ("metadata.json", "common.pt", ".metadata"):
        if not (path / name).is_file():
            raise ValueError(f"checkpoint {path} is incomplete: {name} is missing")
    try:
        common = dist_checkpointing.load_common_state_dict(str(path))
    except Exception as error:  # unpickling fails in many ways on damaged bytes
        raise ValueError(
            f"checkpoint {path}: common.pt cannot be read ({gist(error)})"
        ) from None
    if "pose_megatron" in common:
        return ModelConfig.from_dict(common["pose_megatron"]["model"]), common
    run_config = path / "run_config.yaml"
    if "args" not in common and not run_config.is_file():
        raise ValueError(
            f"checkpoint {path}: common.pt holds no 'args' to take the model from, and there is no "
            "run_config.yaml"
        )
    try:
        stored = dist_checkpointing.load_tensors_metadata(str(path))
        rows = stored["embedding.word_embeddings.weight"].global_shape[0]
    except KeyError as error:
        raise ValueError(f"checkpoint {path} holds no {error}") from None
    except ANY_FAILURE as error:
        raise ValueError(f"checkpoint {path} cannot be loaded: {gist(error)}") from error
    try:
        if "args" in common:
            return megatron_args.from_args(vars(common["args"]), rows), common
        model, run = megatron_args.read_run_config(run_config, rows)
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from None
    # Megatron-Bridge keeps its progress in a file of its own.
    state = path / "train_state.pt"
    progress = torch.load(state, weights_only=True) if state.is_file() else {}
    consumed = int(progress.get("consumed_train_samples", 0))
    args = megatron_args.to_args(model, int(progress.get("step", 0)), consumed, **run)
    return model, common | {"args": args}


def gist(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # by rank: what the first one said
        error = next(iter(error.failures.values()))[0]
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
