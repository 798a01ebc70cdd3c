"""Whole tensors in and out of a checkpoint, in one process: what conversion works on.

Names are those of an undivided model; in the checkpoint the layer is a leading axis.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from pose_megatron.checkpoint import ANY_FAILURE, write
from pose_megatron.directory import common_state, content_metadata, find, gist, publish
from pose_megatron.model_config import ModelConfig

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def write_weights(
    root: str | Path, tensors: dict[str, torch.Tensor], model: ModelConfig,
    tokenizer_files: Iterable[Path] = (),
) -> Path:
    """Writes whole tensors as the `release` checkpoint of a folder, in one process.

    Args:
        tensors: by the names of an undivided model, as pose_megatron.convert makes them
            (`decoder.layers.3.mlp.linear_fc2.weight`).
    """
    state = common_state(model, 0, 0, tensor_model_parallel_size=1, pipeline_model_parallel_size=1,
                    world_size=1, data_parallel_size=1, no_save_optim=True, no_save_rng=True)
    state["model"] = {}
    for name, tensor in tensors.items():
        key, layer = _key(name)
        offsets = () if layer is None else ((0, layer, model.num_layers),)
        state["model"][name] = ShardedTensor.from_rank_offsets(
            key, tensor.contiguous(), *offsets, prepend_axis_num=len(offsets)
        )
    _alone()
    root = Path(root)
    return write(root, "release", state, content_metadata(), tokenizer_files,
                  lambda path: publish(root, path, "release"))


def read_weights(
    root: str | Path, iteration: int | None = None
) -> tuple[dict[str, torch.Tensor], ModelConfig]:
    """Whole tensors by the names of an undivided model, in one process, whatever layout saved them.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    checkpoint = find(root, iteration)
    _alone()
    try:
        stored = dist_checkpointing.load_tensors_metadata(str(checkpoint.path))
        wanted = {k: tensor for k, tensor in stored.items() if not k.startswith("optimizer.")}
        stored = dist_checkpointing.load(
            wanted, str(checkpoint.path), validate_access_integrity=False
        )
    except ANY_FAILURE as error:
        raise ValueError(
            f"checkpoint {checkpoint.path} cannot be loaded: {gist(error)}"
        ) from error
    tensors = {}
    for key in wanted:
        if key.startswith("decoder.layers."):
            for layer, tensor in enumerate(stored[key]):
                tensors[key.replace("layers.", f"layers.{layer}.", 1)] = tensor
        else:
            tensors[key] = stored[key]
    return tensors, checkpoint.model


def _key(name: str) -> tuple[str, int | None]:
    match = _LAYER.match(name)
    if not match:
        return name, None
    return _LAYER.sub("decoder.layers.", name), int(match[1])


def _alone() -> None:
    """dist_checkpointing wants a process group, also for one process."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
