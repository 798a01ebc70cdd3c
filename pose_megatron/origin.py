"""Which program wrote a checkpoint, and what model it holds.

    ours              `pose_megatron` in common.pt
    Megatron-LM       `args` in common.pt; or the legacy layout
    Megatron-Bridge   run_config.yaml beside common.pt, progress in train_state.pt
"""

import argparse
import pickle
from pathlib import Path

import torch

from pose_megatron import megatron_args
from pose_megatron.durable import gist
from pose_megatron.index import read_index
from pose_megatron.legacy import Legacy, is_legacy
from pose_megatron.model_config import ModelConfig

torch.serialization.add_safe_globals([argparse.Namespace])


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
        common = _read_common(path / "common.pt")
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
        rows = read_index(path).state_dict_metadata["embedding.word_embeddings.weight"].size[0]
    except KeyError as error:
        raise ValueError(f"checkpoint {path} holds no {error}") from None
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


def _read_common(path: Path) -> dict:
    """What every rank shares; only plain values are unpickled."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # Megatron-LM's has some classes of megatron-core
        from megatron.core.safe_globals import register_safe_globals

        register_safe_globals()
        return torch.load(path, map_location="cpu", weights_only=True)
