"""A Baichuan2 read as the LLaMA that computes the same: its own code cannot interpolate."""

import dataclasses
from functools import cached_property

from torch import Tensor

from pose_megatron.checkpoints.formats import CheckpointReader
from pose_megatron.checkpoints.huggingface import config_json
from pose_megatron.checkpoints.mapping import ParamMapping, param_mappings
from pose_megatron.models.families import family_as_llama, family_named
from pose_megatron.runtime.json_files import naming


class AsLlama(CheckpointReader):
    """Another reader's Baichuan2; the rows of its output layer get the length one that Baichuan2's
    code gives them in every step.

    Raises:
        ConfigError: the reader's model is of another family.
    """

    def __init__(self, reader: CheckpointReader):
        with naming(reader.path):
            llama = family_as_llama(reader.model.family)
        self._reader = reader
        self._own_mappings = {mapping.name: mapping for mapping in reader.mappings}
        self.model = dataclasses.replace(reader.model, family=llama)
        self.path, self.layout, self.progress = reader.path, reader.layout, reader.progress
        self.weights, self.sidecars = reader.weights, reader.sidecars
        self.megatron_names = reader.megatron_names

    @cached_property
    def mappings(self) -> list[ParamMapping]:
        with naming(self.path):
            return list(param_mappings(**config_json.sizes(self.model)))

    @property
    def dtypes(self):
        return self._reader.dtypes

    def check(self) -> None:
        self._reader.check()

    def check_kept_dtypes(self) -> None:
        self._reader.check_kept_dtypes()

    def read(self, mapping: ParamMapping, out: Tensor) -> Tensor:
        self._reader.read(self._own_mappings[mapping.name], out)
        family_named(self._reader.model.family).weight_as_llama(mapping.name, out)
        return out
