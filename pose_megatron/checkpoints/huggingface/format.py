"""The format of a Hugging Face folder: safetensors (or legacy .bin) with config.json and the
tokenizer's files."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from pose_megatron.checkpoints.formats import CheckpointFormat, CheckpointWriter, Contents
from pose_megatron.checkpoints.huggingface import config_json, shards
from pose_megatron.checkpoints.huggingface.companions import check_companions
from pose_megatron.checkpoints.huggingface.tied_head import untied_if_another
from pose_megatron.checkpoints.mapping import ParamMapping
from pose_megatron.checkpoints.parts_reader import PartsReader
from pose_megatron.errors import ConfigError, flag_name
from pose_megatron.models.families import family_named
from pose_megatron.rope.huggingface import notes


@dataclass(frozen=True)
class HuggingFace(CheckpointFormat):
    """LLaMA, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, Baichuan2-7B and GPT-J.

    Attributes:
        make_vocab_size_divisible_by: when read, the embedding gets zero rows up to a multiple.
        max_shard_size: largest size of a written file, such as 5GB or 200MB (powers of 1000).
        rope_as_longrope: write yarn as longrope, which transformers 4.43 to 4.54 read exactly.
    """

    make_vocab_size_divisible_by: int = 128
    max_shard_size: str = "5GB"
    rope_as_longrope: bool = False

    mark: ClassVar[str] = "config.json"
    read_by_transformers: ClassVar[bool] = True

    def __post_init__(self):
        if self.make_vocab_size_divisible_by < 1:
            raise ConfigError(
                f"{flag_name('make_vocab_size_divisible_by')} must be at least 1, not "
                f"{self.make_vocab_size_divisible_by}"
            )
        self.shard_bytes()

    def shard_bytes(self) -> int:
        """max_shard_size as a number."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B", self.max_shard_size.strip().upper())
        if not match or float(match[1]) == 0:
            raise ConfigError(
                f"--max-shard-size {self.max_shard_size} is not a size such as 5GB or 200MB"
            )
        return int(float(match[1]) * 1000 ** ["", *"KMGT"].index(match[2]))

    def open(self, folder: Path) -> PartsReader:
        model = config_json.read_config(folder, self.make_vocab_size_divisible_by)
        said = check_companions(folder, model.family)
        weights = shards.ShardedWeights(folder, family_named(model.family).stacked)
        weights.warnings.extend(said)
        return PartsReader(folder, "hf", untied_if_another(model, weights), weights)

    def create(self, folder: Path, contents: Contents, processes: int) -> "HuggingFaceWriter":
        return HuggingFaceWriter(folder, contents, self.shard_bytes(), self.rope_as_longrope)


class HuggingFaceWriter(CheckpointWriter):
    """Writes a safetensors file for each job."""

    def __init__(self, folder: Path, contents: Contents, shard_bytes: int, rope_as_longrope: bool):
        self.folder, self._contents, self._longrope = folder, contents, rope_as_longrope
        itemsizes = {name: dtype.itemsize for name, dtype in contents.dtypes.items()}
        self.jobs = shards.plan(contents.mappings, itemsizes, shard_bytes)

    def prepare(self) -> None:
        contents = self._contents
        config_json.sizes(contents.model)
        dtype = contents.dtypes[contents.mappings[0].name]
        config_json.write_config(
            self.folder, contents.model, dtype, contents.sidecars, self._longrope
        )

    def write(self, job: int, tensors: Iterable[tuple[ParamMapping, Tensor]]) -> None:
        path = self.folder / shards.name_of(job, len(self.jobs))
        with shards.create(path, self.jobs[job], self._contents.dtypes) as file:
            for mapping, tensor in tensors:
                for name, pieces in mapping.pieces(tensor).items():
                    file.put(name, *pieces)

    def finish(self, results: Sequence[None]) -> None:
        shards.write_index(self.folder, self.jobs, self._contents.dtypes)

    def read_back(self) -> PartsReader:
        return HuggingFace(self._contents.model.make_vocab_size_divisible_by).open(self.folder)

    def notes(self) -> list[str]:
        missing = [] if (self.folder / "tokenizer_config.json").is_file() else ["tokenizer"]
        model = self._contents.model
        return [
            *(f"no {file} to copy; name one with --tokenizer-model" for file in missing),
            *notes(model.rope_scaling, model.max_position_embeddings, self._longrope),
        ]
