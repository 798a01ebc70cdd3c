"""Megatron-LM's layout from before distributed checkpoints, for reading.

    <dir>/iter_0000100/mp_rank_TT/model_optim_rng.pt         TT of the tensor ranks
    <dir>/iter_0000100/mp_rank_TT_PPP/model_optim_rng.pt     and PPP of the pipeline ranks
    <dir>/iter_0000100/mp_rank_TT[_PPP]_EEE/...              and EEE of the expert-parallel ranks

Each file holds its rank's part of the model under `model`, or under `model0`, `model1`, ... for an
interleaved pipeline. Here the parts are joined, one tensor at a time, under the names of an
undivided model; files are mapped into memory, not read. Both generations of names are understood:
megatron-core's, and those of the `language_model` tree that came before it.
"""

import argparse
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pose_megatron.checkpoints.checksums import records
from pose_megatron.checkpoints.mapping import scatter
from pose_megatron.checkpoints.megatron.args import from_args
from pose_megatron.checkpoints.megatron.safe_globals import allow_megatron_globals
from pose_megatron.checkpoints.stored_weights import StoredWeights
from pose_megatron.checkpoints.tensor_files import data
from pose_megatron.errors import ConfigError, DamagedCheckpoint
from pose_megatron.models.shape import ModelConfig

_FOLDER = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")
Rank = tuple[int, int, int]  # among the tensor-, pipeline- and expert-parallel ones
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_FILE = "model_optim_rng.pt"
_EMBEDDING = "embedding.word_embeddings.weight"
_RENAMED = [  # both generations' names, and today's in their place
    (r"^language_model\.", ""),
    (r"^(encoder|transformer)\.", "decoder."),
    (r"^decoder\.final_norm\.", "decoder.final_layernorm."),
    (r"\.attention\.", ".self_attention."),
    (r"\.query_key_value\.", ".linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.dense_h_to_4h\.", ".linear_fc1."),
    (r"\.dense_4h_to_h\.", ".linear_fc2."),
    (r"\.input_(layer)?norm\.", ".self_attention.linear_qkv.layer_norm_"),
    (r"\.(post_attention|pre_mlp)_(layer)?norm\.", ".mlp.linear_fc1.layer_norm_"),
]
_ROWS = ("linear_qkv.weight", "linear_qkv.bias", _EMBEDDING, "output_layer.weight")
_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


def is_legacy(path: Path) -> bool:
    """Whether an iteration's folder is in this layout."""
    return any(path.glob("mp_rank_*"))


class LegacyWeights(StoredWeights):
    """The weights of one iteration by the names of an undivided model.

    Attributes:
        args: Megatron-LM's arguments in the run that wrote it.
        iteration: steps trained.
        model: shape and rope.

    Raises:
        ConfigError: the model is no LLaMA, or the file's version is too old.
        DamagedCheckpoint: a rank's file is missing or damaged.
    """

    def __init__(self, path: Path):
        super().__init__()
        self._path, files = path, _files(path)
        states = {rank: _read(file) for rank, file in files.items()}
        first = states[0, 0, 0]
        self.args, version = first.get("args"), first.get("checkpoint_version", 0)
        self.iteration = first.get("iteration", 0)
        if not isinstance(self.args, argparse.Namespace):
            raise ConfigError(f"{files[0, 0, 0]} holds no 'args' to take the model from")
        if version < 2.0:
            raise ConfigError(
                f"{files[0, 0, 0]} has checkpoint_version {version}, which orders queries, keys "
                "and values otherwise than 2.0; save it anew with a later Megatron-LM first"
            )
        self._tensor_ranks, self._stages, self._expert_ranks = _ranks(files)
        self._experts = getattr(self.args, "num_experts", None) or 0
        over = getattr(self.args, "expert_tensor_parallel_size", None) or self._tensor_ranks
        if self._experts and over != self._tensor_ranks:
            raise ConfigError(
                f"checkpoint {path}: expert_tensor_parallel_size {over} is not supported in the "
                f"legacy layout, only that of all else, {self._tensor_ranks}, is"
            )
        self._gated = bool(getattr(self.args, "swiglu", False))
        self._parts = self._whole_model(states)
        # Of each record with a checksum its length and CRC-32: bytes that have changed match none.
        self._sums = {
            (record.length, record.crc)
            for file in files.values()
            for record in records(file).values()
        }
        if _EMBEDDING not in self._parts:
            raise ConfigError(f"{files[0, 0, 0]} holds no {_EMBEDDING}")
        rows = sum(len(part) for part in self._parts[_EMBEDDING])
        try:
            self.model: ModelConfig = from_args(vars(self.args), rows)
        except ValueError as error:
            raise ConfigError(f"checkpoint {path}: {error}") from None
        if not self.model.untie_embeddings_and_output_weights:
            self._parts.pop("output_layer.weight", None)  # the last stage's copy
        self.dtypes = {name: parts[0].dtype for name, parts in self._parts.items()}
        self.shapes = {
            name: tuple(self._joined(name, [_meta(part) for part in parts]).shape)
            for name, parts in self._parts.items()
        }
        layers = {int(match[1]) for name in self._parts if (match := _LAYER.match(name))}
        if layers != set(range(self.model.num_layers)):
            raise DamagedCheckpoint(
                f"checkpoint {path} holds {len(layers)} layers, its args say "
                f"{self.model.num_layers}: a pipeline rank is missing"
            )

    def read(self, name: str, pieces: Sequence[Tensor]) -> None:
        scatter(self[name], pieces)

    def _whole_model(self, states: dict[Rank, dict]) -> dict[str, list[Tensor]]:
        """Each tensor's parts, in the order of the tensor ranks."""
        chunks = sum(bool(re.fullmatch(r"model\d*", key)) for key in states[0, 0, 0])
        result: dict[str, list[Tensor]] = {}
        layers_before = 0
        for chunk in range(chunks):  # the first chunk of every stage, then the second, ...
            key = "model" if chunks == 1 else f"model{chunk}"
            for stage in range(self._stages):
                here = [
                    self._stage([states[rank, stage, e][key] for e in range(self._expert_ranks)])
                    for rank in range(self._tensor_ranks)
                ]
                deepest = -1
                for name in here[0]:
                    whole = name
                    if match := _LAYER.match(name):
                        deepest = max(deepest, int(match[1]))
                        layer = layers_before + int(match[1])
                        whole = _LAYER.sub(f"decoder.layers.{layer}.", name)
                    result.setdefault(whole, [part[name] for part in here])
                layers_before += deepest + 1
        return result

    def _stage(self, states: Sequence[Mapping]) -> dict[str, Tensor]:
        """One tensor rank's part of a stage.

        Args:
            states: of its expert-parallel ranks, which hold some experts each, and all else.
        """
        result: dict[str, Tensor] = {}
        count = self._experts // len(states)
        for rank, state in enumerate(states):
            for name, tensor in _named(state):
                if self._experts:
                    name = name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
                if ".mlp.experts." not in name:
                    result.setdefault(name, tensor)
                else:
                    result |= _experts(name, tensor, rank * count, count)
        return result

    def __getitem__(self, name: str) -> Tensor:
        for part in self._parts[name] if self._sums else ():
            self._check(name, part)
        return self._joined(name, self._parts[name])

    def _check(self, name: str, part: Tensor) -> None:
        storage = torch.empty(0, dtype=torch.uint8).set_(part.untyped_storage())
        if not self._sums & {(len(storage), zlib.crc32(data(storage))), (len(storage), 0)}:
            raise DamagedCheckpoint(
                f"checkpoint {self._path} is damaged at {name}: its CRC-32 does not match"
            )

    def _joined(self, name: str, parts: list[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        if name.endswith(_ROWS):
            return torch.cat(parts)
        if name.endswith(_COLUMNS):
            return torch.cat(parts, dim=1)
        if name.endswith(("linear_fc1.weight", "linear_fc1.bias")):
            if not self._gated:
                return torch.cat(parts)
            halves = [part.chunk(2) for part in parts]  # a rank holds [its gate; its up]
            return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
        return parts[0]  # norms, and biases of matrices split by columns, are the same everywhere


def _meta(tensor: Tensor) -> Tensor:
    """An empty tensor of the same shape and dtype, on the meta device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _files(path: Path) -> dict[Rank, Path]:
    """The ranks' files, none missing."""
    folders = sorted(path.glob("mp_rank_*"))
    several = _has_expert_ranks(folders[0] / _FILE)
    files: dict[Rank, Path] = {}
    for folder in folders:
        match = _FOLDER.fullmatch(folder.name)
        numbers = [int(number) for number in match.groups() if number] if match else []
        if not numbers or len(numbers) + (not several) > 3:
            raise ConfigError(
                f"checkpoint {path}: {folder.name} is of a mixture of experts, and the args say "
                "expert_model_parallel_size 1"
            )
        expert = numbers.pop() if several else 0
        tensor, stage, *_ = [*numbers, 0]
        files[tensor, stage, expert] = folder / _FILE
    piped = any(len(file.parent.name.split("_")) > 3 + several for file in files.values())
    for tensor, stage, expert in itertools.product(*map(range, _ranks(files))):
        name = f"mp_rank_{tensor:02d}" + f"_{stage:03d}" * piped + f"_{expert:03d}" * several
        file = files.get((tensor, stage, expert))
        if file is None or not file.is_file():
            raise DamagedCheckpoint(f"checkpoint {path} is incomplete: {name}/{_FILE} is missing")
    return files


def _has_expert_ranks(file: Path) -> bool:
    """Whether a folder's last number is an expert-parallel rank, which its name does not tell."""
    args = _read(file).get("args") if file.is_file() else None
    return getattr(args, "expert_model_parallel_size", None) not in (None, 1)


def _ranks(files: Iterable[Rank]) -> Rank:
    """How many there are of each kind."""
    tensor, stage, expert = (1 + max(numbers) for numbers in zip(*files, strict=True))
    return tensor, stage, expert


def _read(file: Path) -> dict:
    allow_megatron_globals()
    for mapped in (True, False):  # files that torch wrote before 1.6 cannot be mapped
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
            break
        except Exception as error:  # damaged bytes raise errors of many classes
            failure = " ".join(str(error).split())[:300]
    else:
        raise DamagedCheckpoint(f"{file} cannot be read: {failure}")
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{file} holds a {type(state).__name__}, no state dict")
    return state


def _named(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors by today's names; before megatron-core, a state dict held dicts in dicts."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _named(value, f"{name}.")
        elif isinstance(value, Tensor) and not name.endswith(("_extra_state", "inv_freq")):
            if "word_embeddings_for_head" in name:  # a tied head, again
                continue
            for old, new in _RENAMED:
                name = re.sub(old, new, name)
            yield name, value


def _experts(name: str, tensor: Tensor, first: int, count: int) -> dict[str, Tensor]:
    """Tensors of single experts by today's names.

    Args:
        name: of a tensor in one of megatron-core's modules for experts. SequentialMLP and
            TEGroupedMLP number them, GroupedMLP has all of them side by side and transposed.
        first, count: number of this rank's first expert, and how many it has.
    """
    layer, _, rest = name.partition(".mlp.experts.")

    def whole(expert: int, matrix: str) -> str:
        return f"{layer}.mlp.experts.experts.{expert}.linear_fc{matrix}.weight"

    if match := re.fullmatch(r"local_experts\.(\d+)\.linear_fc([12])\.weight", rest):
        return {whole(first + int(match[1]), match[2]): tensor}
    if match := re.fullmatch(r"linear_fc([12])\.weight(\d+)", rest):
        return {whole(first + int(match[2]), match[1]): tensor}
    if rest == "weight1":
        apart = tensor.view(count, len(tensor), -1)
    elif rest == "weight2":
        apart = tensor.view(count, -1, tensor.shape[1])
    else:
        return {name: tensor}
    return {whole(first + i, rest[-1]): matrix.T for i, matrix in enumerate(apart)}
