"""Megatron's format: torch_dist checkpoints, which every layout of ranks loads, written and read;
and Megatron-LM's legacy layout, read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from pose_megatron.checkpoints.formats import (
    CheckpointFormat,
    CheckpointReader,
    CheckpointWriter,
    Contents,
)
from pose_megatron.checkpoints.huggingface import config_json
from pose_megatron.checkpoints.mapping import (
    ParamMapping,
    check_megatron,
    check_weight_dtypes,
    param_mappings,
)
from pose_megatron.checkpoints.megatron import torch_dist
from pose_megatron.checkpoints.megatron.directory import (
    TRACKER,
    Checkpoint,
    find,
    stored_record,
)
from pose_megatron.checkpoints.megatron.stock_flags import notes
from pose_megatron.checkpoints.megatron.torch_dist_metadata import ChunkLocation
from pose_megatron.checkpoints.sidecars import find_sidecars
from pose_megatron.checkpoints.tensor_files import size
from pose_megatron.errors import ConfigError
from pose_megatron.runtime.json_files import naming


@dataclass(frozen=True)
class Megatron(CheckpointFormat):
    """Checkpoints of this trainer, of Megatron-LM and of Megatron-Bridge.

    Attributes:
        iteration: the one to read; None for the latest of the folder.
        max_position_embeddings: the window of a foreign checkpoint that says another, as its last
            run's seq_length; None for what it says.
    """

    iteration: int | None = None
    max_position_embeddings: int | None = None

    mark: ClassVar[str] = TRACKER
    read_by_transformers: ClassVar[bool] = False

    def open(self, folder: Path) -> "MegatronReader":
        checkpoint = find(folder, self.iteration)
        if self.max_position_embeddings is not None:
            checkpoint = _with_window(checkpoint, self.max_position_embeddings)
        return MegatronReader(checkpoint, folder)

    def create(self, folder: Path, contents: Contents, processes: int) -> "MegatronWriter":
        return MegatronWriter(folder, contents, processes)


def _with_window(checkpoint: Checkpoint, window: int) -> Checkpoint:
    """Raises ConfigError where the checkpoint records another, or the window is below 1."""
    model = checkpoint.model
    stated = stored_record(checkpoint.common) and model.max_position_embeddings
    if stated and stated != window:
        raise ConfigError(
            f"--max-position-embeddings {window} contradicts {checkpoint.path}, which records the "
            f"window that it was trained to, {stated}: leave the flag out"
        )
    scaling = model.rope_scaling
    if scaling.method == "linear" and not stated:  # whose first window was counted from the other
        scaling = replace(
            scaling, original_max_position_embeddings=max(int(window / scaling.factor), 1)
        )
    model = replace(model, max_position_embeddings=window, rope_scaling=scaling)
    return replace(checkpoint, model=model)


class MegatronReader(CheckpointReader):
    """Reads one iteration, or a `release`.

    Args:
        folder: as the user named it, for messages.
    """

    megatron_names = True

    def __init__(self, checkpoint: Checkpoint, folder: Path):
        self._folder = folder
        self.path, self.model = checkpoint.path, checkpoint.model
        self.weights = torch_dist.weights_of(checkpoint)
        self.layout = "megatron legacy" if checkpoint.is_legacy else "megatron"
        if getattr(self.weights, "is_hybrid", False):
            self.layout = "megatron hybrid"
        self.sidecars: Mapping[str, Path] = find_sidecars(checkpoint.root / "tokenizer")
        self.progress: Mapping[str, Any] = _progress(checkpoint)

    @cached_property
    def mappings(self) -> list[ParamMapping]:
        with naming(self._folder):
            return list(param_mappings(**config_json.sizes(self.model)))

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return self.weights.dtypes

    def check(self) -> None:
        with naming(self._folder):
            check_megatron(self.weights.shapes, self.mappings)
            check_weight_dtypes(self.weights.dtypes)

    def check_kept_dtypes(self) -> None:
        pass  # each of Megatron's tensors has one

    def read(self, mapping: ParamMapping, out: Tensor) -> Tensor:
        self.weights.read(mapping.name, [out])
        return out


def _progress(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.is_release:
        return {}
    args = vars(checkpoint.common["args"])
    known = {
        "iteration": checkpoint.iteration,
        "samples": args.get("consumed_train_samples"),
        "optimizer state": "no" if args.get("no_save_optim") else "yes",
        "tensor ranks": args.get("tensor_model_parallel_size"),
        "pipeline ranks": args.get("pipeline_model_parallel_size"),
        "ranks": args.get("world_size"),
    }
    return {name: value for name, value in known.items() if value is not None}


class MegatronWriter(CheckpointWriter):
    """Writes a torch_dist checkpoint named `release`, a file for each process."""

    def __init__(self, folder: Path, contents: Contents, processes: int):
        self.folder, self._contents = folder, contents
        sizes = [size(contents.dtypes[m.name], m.shape) for m in contents.mappings]
        jobs: list[list[ParamMapping]] = [[] for _ in range(processes)]
        total, done = sum(sizes), 0
        for mapping, nbytes in zip(contents.mappings, sizes, strict=True):
            jobs[min(done * processes // total, processes - 1)].append(mapping)
            done += nbytes
        self.jobs = [job for job in jobs if job]

    def prepare(self) -> None:
        torch_dist.begin(self.folder, self._contents.sidecars.values())

    def write(
        self, job: int, tensors: Iterable[tuple[ParamMapping, Tensor]]
    ) -> list[ChunkLocation]:
        with torch_dist.DistcpWriter(self.folder, job) as file:
            for mapping, tensor in tensors:
                file.put(mapping.name, tensor)
        return file.chunks

    def finish(self, results: Sequence[list[ChunkLocation]]) -> None:
        torch_dist.finish(
            self.folder, self._contents.model, [chunk for chunks in results for chunk in chunks]
        )

    def read_back(self) -> MegatronReader:
        again = Megatron().open(self.folder)
        if again.model != self._contents.model:
            raise ConfigError(f"read back {again.model}, wrote {self._contents.model}")
        return again

    def notes(self) -> list[str]:
        return notes(self._contents.model)
