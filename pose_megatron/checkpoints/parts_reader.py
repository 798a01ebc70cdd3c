"""Reads formats that store Hugging Face's tensors: the parts of which Megatron's are made."""

import functools
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pose_megatron.checkpoints.formats import CheckpointReader
from pose_megatron.checkpoints.huggingface import config_json
from pose_megatron.checkpoints.mapping import (
    ParamMapping,
    check_hf,
    check_weight_dtypes,
    one_dtype,
    param_mappings,
    scatter,
)
from pose_megatron.checkpoints.sidecars import find_sidecars
from pose_megatron.checkpoints.stored_weights import StoredWeights
from pose_megatron.errors import ConfigError
from pose_megatron.models.shape import ModelConfig
from pose_megatron.runtime.json_files import naming


class PartsReader(CheckpointReader):
    """A CheckpointReader over weights under Hugging Face's names."""

    megatron_names = False

    def __init__(self, path: Path, layout: str, model: ModelConfig, weights: StoredWeights):
        self.path, self.layout, self.model, self.weights = path, layout, model, weights
        self.sidecars: Mapping[str, Path] = find_sidecars(path)
        self.progress: Mapping[str, Any] = {}

    @cached_property
    def mappings(self) -> list[ParamMapping]:
        with naming(self.path):
            return list(param_mappings(**config_json.sizes(self.model)))

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        stored = self.weights.dtypes
        return {
            mapping.name: functools.reduce(
                torch.promote_types, (stored[part] for part in mapping.parts)
            )
            for mapping in self.mappings
        }

    def check_kept_dtypes(self) -> None:
        with naming(self.path):
            for mapping in self.mappings:
                one_dtype(mapping, (self.weights.dtypes[part] for part in mapping.parts))

    def check(self) -> None:
        tied = not self.model.untie_embeddings_and_output_weights
        weights = self.weights
        with naming(self.path):
            check_weight_dtypes(self._dtypes_of_weights())
            (embedding,) = self.mappings[0].parts
            for head in check_hf(weights.shapes, self.mappings, tied):
                if weights.shapes[head] != weights.shapes[embedding] or not torch.equal(
                    weights[head], weights[embedding]
                ):
                    raise ConfigError(
                        f"the embeddings are tied, but {head} differs from {embedding}"
                    )

    def _dtypes_of_weights(self) -> dict[str, torch.dtype]:
        """Of the stored tensors that are the model's: buffers may be of any dtype."""
        parts = [part for mapping in self.mappings for part in mapping.parts]
        return {part: self.weights.dtypes[part] for part in parts if part in self.weights}

    def read(self, mapping: ParamMapping, out: Tensor) -> Tensor:
        return mapping.join(self._read, out)

    def _read(self, name: str, pieces: Sequence[Tensor]) -> None:
        if pieces[0].dtype == self.weights.dtypes[name]:
            self.weights.read(name, pieces)
        else:  # stored in another precision than what Megatron keeps beside it
            scatter(self.weights[name], pieces)
