"""Checkpoint formats: what each of them implements, and the table of them.

A format is a frozen dataclass whose fields are its own parameters, spelled as the flags of
`pose-megatron convert`. It opens a folder as a CheckpointReader and starts a new one with a
CheckpointWriter. Both speak of Megatron's tensors, one `ParamMapping` each, so a conversion holds
one tensor that is read and one that is written, whatever the size of the model.

A new format is one file and its line in FORMATS. Nothing here imports torch: `--help` stays quick.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pose_megatron.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pose_megatron.checkpoints.mapping import ParamMapping
    from pose_megatron.checkpoints.stored_weights import StoredWeights
    from pose_megatron.models.shape import ModelConfig

FORMATS = {  # name: module and class; imported on first use
    "hf": "huggingface.format:HuggingFace",
    "megatron": "megatron.format:Megatron",
    "meta": "meta.format:Meta",
}


class CheckpointReader(Protocol):
    """One checkpoint on disk.

    Attributes:
        path: the folder that holds the weights.
        layout: the format's name, "megatron legacy" for Megatron-LM's old layout.
        model: shape and rope.
        weights: the tensors under the names they are stored by.
        megatron_names: whether these are Megatron's, vocabulary padding included; else they are
            Hugging Face's.
        mappings: Megatron's tensors, in the order of the forward pass.
        dtypes: what each mapping is stored in, by its name.
        sidecars: files of the tokenizer and other companions, by their names in a Hugging Face
            folder.
        progress: what is known of the training run, by name; empty for weights alone.

    Raises:
        ConfigError: `mappings`: no Hugging Face family has a model like this one.
    """

    path: Path
    layout: str
    model: ModelConfig
    weights: StoredWeights
    megatron_names: bool
    sidecars: Mapping[str, Path]
    progress: Mapping[str, Any]

    @property
    def mappings(self) -> Sequence[ParamMapping]: ...

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]: ...

    def check(self) -> None:
        """Holds the names and shapes of the stored tensors to the model's.

        Raises:
            ConfigError: a tensor is missing, unknown, quantized, of another shape, or not one the
                model ties.
        """

    def check_kept_dtypes(self) -> None:
        """Asks whether `dtypes` is what every value is stored in; it is wider where the tensors
        that Megatron keeps in one are stored in several.

        Raises:
            ConfigError: names such tensors.
        """

    def read(self, mapping: ParamMapping, out: Tensor) -> Tensor:
        """Fills `out`, of the mapping's shape and dtype, with Megatron's tensor; returns it.

        Raises:
            DamagedCheckpoint: a file is cut off or damaged.
        """


class CheckpointWriter(Protocol):
    """A checkpoint that is being written: prepare, write each job, finish.

    Attributes:
        jobs: mappings that one process writes together, in this order.
    """

    jobs: Sequence[Sequence[ParamMapping]]

    def prepare(self) -> None:
        """Writes what stands beside the weights; called once, before the first job.

        Raises:
            ConfigError: the format has no such model or rope.
        """

    def write(self, job: int, tensors: Iterable[tuple[ParamMapping, Tensor]]) -> Any:
        """Writes job number `job`, in any process; the result can be pickled."""

    def finish(self, results: Sequence[Any]) -> None:
        """Completes the checkpoint; called once, after all jobs, with their results in order."""

    def read_back(self) -> CheckpointReader:
        """Opens what was written, to compare it with its source.

        Raises:
            ConfigError, DamagedCheckpoint: it is not what was to be written.
        """

    def notes(self) -> list[str]:
        """What the user should know about the finished checkpoint, in sentences."""


@dataclass(frozen=True)
class Contents:
    """What a writer is to write.

    Attributes:
        dtypes: what each mapping is written in, by its name.
        sidecars: as CheckpointReader's.
    """

    model: ModelConfig
    mappings: Sequence[ParamMapping]
    dtypes: Mapping[str, torch.dtype]
    sidecars: Mapping[str, Path]


class CheckpointFormat(Protocol):
    """A format with its parameters.

    Attributes:
        mark: the file by which its folders are known.
        read_by_transformers: whether transformers reads its folders, so that the rope it reads
            there can be checked.

    Raises:
        ConfigError: when it is made with a parameter that cannot be.
    """

    mark: ClassVar[str]
    read_by_transformers: ClassVar[bool]

    def open(self, folder: Path) -> CheckpointReader:
        """Opens a checkpoint; headers are read, tensors are not.

        Raises:
            ConfigError: there is none, or its model is not supported.
            DamagedCheckpoint: a file of it is missing, damaged or incomplete.
        """

    def create(self, folder: Path, contents: Contents, processes: int) -> CheckpointWriter:
        """A writer into an empty folder.

        Args:
            processes: how many share the jobs.
        """


def format_class(name: str) -> Any:
    """The class of a format in FORMATS, a CheckpointFormat; its arguments are its parameters.

    Raises:
        ConfigError: there is no such format.
    """
    if name not in FORMATS:
        raise ConfigError(f"unknown checkpoint format {name!r}; known are {', '.join(FORMATS)}")
    module, _, member = FORMATS[name].partition(":")
    return getattr(importlib.import_module(f"pose_megatron.checkpoints.{module}"), member)


def marks() -> dict[str, str]:
    """The formats by the file that marks a folder of theirs."""
    return {format_class(name).mark: name for name in FORMATS}
