"""Meta's own format: consolidated.NN.pth with params.json."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from pose_megatron.checkpoints.formats import CheckpointFormat, CheckpointWriter, Contents
from pose_megatron.checkpoints.mapping import ParamMapping
from pose_megatron.checkpoints.meta.consolidated import ConsolidatedWriter, MetaWeights
from pose_megatron.checkpoints.meta.params import (
    guessed_window,
    read_config,
    read_params,
    write_params,
)
from pose_megatron.checkpoints.parts_reader import PartsReader
from pose_megatron.errors import ConfigError, flag_name
from pose_megatron.runtime.json_files import naming

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Meta(CheckpointFormat):
    """LLaMA 1, 2 and 3.

    Attributes:
        max_position_embeddings: the window, which params.json leaves out; None for the published
            model's.
        make_vocab_size_divisible_by: when read, the embedding gets zero rows up to a multiple.
        target_tensor_parallel_size: files to write, one for each rank of Meta's code.
    """

    max_position_embeddings: int | None = None
    make_vocab_size_divisible_by: int = 128
    target_tensor_parallel_size: int = 1

    mark: ClassVar[str] = "params.json"
    read_by_transformers: ClassVar[bool] = False

    def __post_init__(self):
        for name in (
            "make_vocab_size_divisible_by",
            "max_position_embeddings",
            "target_tensor_parallel_size",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{flag_name(name)} must be at least 1, not {value}")

    def open(self, folder: Path) -> PartsReader:
        weights = MetaWeights(folder)
        with naming(folder):
            model = read_config(
                folder, weights, self.max_position_embeddings, self.make_vocab_size_divisible_by
            )
        return PartsReader(folder, "meta", model, weights)

    def create(self, folder: Path, contents: Contents, processes: int) -> "MetaWriter":
        return MetaWriter(folder, contents, self.target_tensor_parallel_size)


class MetaWriter(CheckpointWriter):
    """Writes consolidated.NN.pth for `ranks` tensor-parallel ranks, one job each."""

    def __init__(self, folder: Path, contents: Contents, ranks: int):
        self.folder, self._contents, self._ranks = folder, contents, ranks
        self.jobs = [contents.mappings] * ranks
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for mapping in contents.mappings:
            self._shapes |= mapping.parts
            self._dtypes |= dict.fromkeys(mapping.parts, contents.dtypes[mapping.name])
        self._tied = not contents.model.untie_embeddings_and_output_weights
        if self._tied:  # Meta's code has a head of its own all the same
            self._shapes[_HEAD] = self._shapes[_EMBEDDING]
            self._dtypes[_HEAD] = self._dtypes[_EMBEDDING]

    def prepare(self) -> None:
        write_params(self.folder, self._contents.model, self._ranks)
        if tokenizer := self._contents.sidecars.get("tokenizer.model"):
            shutil.copyfile(tokenizer, self.folder / "tokenizer.model")

    def write(self, job: int, tensors: Iterable[tuple[ParamMapping, Tensor]]) -> None:
        with ConsolidatedWriter(
            self.folder, self._contents.model, self._shapes, self._dtypes, job, self._ranks
        ) as file:
            for mapping, tensor in tensors:
                for name, pieces in mapping.pieces(tensor).items():
                    part = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
                    file.put(name, part)
                    if self._tied and name == _EMBEDDING:
                        file.put(_HEAD, part)

    def finish(self, results: Sequence[None]) -> None:
        pass

    def read_back(self) -> PartsReader:
        model = self._contents.model
        return Meta(model.max_position_embeddings, model.make_vocab_size_divisible_by).open(
            self.folder
        )

    def notes(self) -> list[str]:
        window = self._contents.model.max_position_embeddings
        if guessed_window(read_params(self.folder)) == window:
            return []
        return [
            f"params.json cannot hold the window: whoever reads it must be told {window}, our "
            f"converter with --max-position-embeddings {window}"
        ]
