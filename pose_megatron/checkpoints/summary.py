"""What a checkpoint is, without loading it: shape, parameters, precision, rope, progress.

Any that we can read: Hugging Face folders, Meta's (consolidated.NN.pth with params.json), and
Megatron's, ours or others', torch_dist or legacy. Tensors are known by name, shape and dtype, from
headers and mapped files; `compare` reads values only when asked to.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pose_megatron.checkpoints import meta
from pose_megatron.checkpoints.huggingface import config_json, shards
from pose_megatron.checkpoints.mapping import param_mappings
from pose_megatron.checkpoints.megatron.directory import Checkpoint, find
from pose_megatron.checkpoints.megatron.torch_dist import open_weights
from pose_megatron.errors import ConfigError
from pose_megatron.models.shape import ModelConfig
from pose_megatron.rope.scaling import attention_factor, inverse_frequencies


@dataclasses.dataclass(frozen=True)
class Summary:
    """One checkpoint.

    Attributes:
        format: "hf", "meta", "megatron" or "megatron legacy".
        model: shape and rope.
        progress: what is known of the training, by name; empty of weights alone.
        tensors: every weight as an empty tensor on the meta device, of an undivided model; Meta's
            under Hugging Face's names.
        tokenizer: names of its files.
    """

    path: Path
    format: str
    model: ModelConfig
    progress: dict
    tensors: Mapping[str, Tensor]
    tokenizer: list[str]

    @property
    def by_row(self) -> bool:
        """Whether names are Megatron's, not Hugging Face's."""
        return self.format.startswith("megatron")

    @property
    def config(self) -> dict:
        return self.model.to_dict()

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Number of tensors of each precision."""
        return dict(Counter(_word(tensor.dtype) for tensor in self.tensors.values()))

    @property
    def rope(self) -> str:
        text = f"theta {self.model.rotary_base:g}, {self.model.rope_scaling}"
        if (factor := attention_factor(self.model.rope_scaling)) != 1:
            text += f", attention factor {factor:.4f}"
        return f"{text}, window {self.model.max_position_embeddings:,}"

    def to_dict(self) -> dict:
        """Plain values only, for JSON."""
        return {
            "path": str(self.path),
            "format": self.format,
            "config": self.config,
            "parameters": self.parameters,
            "dtypes": self.dtypes,
            "rope": self.rope,
            "bytes": sum(tensor.nbytes for tensor in self.tensors.values()),
            "progress": self.progress,
            "tokenizer": self.tokenizer,
        }

    def __str__(self) -> str:
        c = self.config
        size = sum(tensor.nbytes for tensor in self.tensors.values())
        tied = "" if c["untie_embeddings_and_output_weights"] else ", tied embeddings"
        progress = (
            ", ".join(
                f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"
                for name, value in self.progress.items()
            )
            or "weights only"
        )
        return (
            f"checkpoint  {self.path}\n"
            f"format      {self.format}, family {c['family'] or 'of no Hugging Face class'}\n"
            f"shape       {c['num_layers']} layers, hidden {c['hidden_size']}, ffn "
            f"{c['ffn_hidden_size']}, {c['num_attention_heads']} heads of {c['kv_channels']}, "
            f"{c['num_query_groups']} groups, vocabulary {c['vocab_size']}{tied}\n"
            f"parameters  {self.parameters:,} in {len(self.tensors)} tensors, "
            f"{size / 1e6:,.1f} MB\n"
            f"dtype       {', '.join(f'{name} x{n}' for name, n in self.dtypes.items())}\n"
            f"rope        {self.rope}\n"
            f"progress    {progress}\n"
            f"tokenizer   {', '.join(self.tokenizer) or 'none'}"
        )


def summarise(path: str | Path, iteration: int | None = None) -> Summary:
    """Looks at a checkpoint.

    Raises:
        ConfigError: there is none of a known format, or it is damaged.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return _huggingface(path)
    if (path / "params.json").is_file():
        return _meta(path)
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder")
    return _megatron(find(path, iteration))


def compare(one: Summary, other: Summary, values: bool = False) -> dict:
    """What differs between two checkpoints, {} when nothing does.

    Two of Megatron's are compared under Megatron's names, all others under Hugging
    Face's. Two ropes of the same frequencies are the same, however they are spelt.

    Args:
        values: reads every tensor, and gives the largest absolute difference of each that differs.

    Returns:
        Under `config`, `only in one`, `only in other`, `shape`, `dtype`, `values`: by name, what
        each side has, or the difference.
    """
    across = one.by_row != other.by_row
    found = {"config": _compare_configs(one, other, across)}
    a, b = (_names(side, across) for side in (one, other))
    found["only in one"] = {name: _word(a[name].dtype) for name in a.keys() - b.keys()}
    found["only in other"] = {name: _word(b[name].dtype) for name in b.keys() - a.keys()}
    both = [name for name in a if name in b]
    found["shape"] = {
        name: [list(a[name].shape), list(b[name].shape)]
        for name in both
        if a[name].shape != b[name].shape
    }
    found["dtype"] = {
        name: [_word(a[name].dtype), _word(b[name].dtype)]
        for name in both
        if a[name].dtype != b[name].dtype
    }
    if values:
        found["values"] = {}
        read_one, read_other = (_reader(side, across) for side in (one, other))
        for name in both:
            if name not in found["shape"]:
                pair = read_one(name).double(), read_other(name).double()
                difference = (pair[0] - pair[1]).abs().max().item()
                if difference != 0:
                    found["values"][name] = math.inf if math.isnan(difference) else difference
    return {what: dict(sorted(names.items())) for what, names in found.items() if names}


def _compare_configs(one: Summary, other: Summary, across: bool) -> dict:
    a, b = (
        {k: v for k, v in side.config.items() if k != "rope_scaling"}
        | {f"rope_scaling.{k}": v for k, v in side.config["rope_scaling"].items() if v is not None}
        for side in (one, other)
    )
    ignored = {"make_vocab_size_divisible_by"} if across else set()  # Megatron's alone
    if _same_rope(one, other):
        ignored |= {k for k in a.keys() | b.keys() if k.startswith("rope_scaling.")}
        ignored |= {"rotary_base"}
    return {
        k: [a.get(k), b.get(k)]
        for k in a.keys() | b.keys()
        if k not in ignored and a.get(k) != b.get(k)
    }


def _same_rope(one: Summary, other: Summary) -> bool:
    if one.model.rotary_dim != other.model.rotary_dim:
        return False
    scalings = [side.model.rope_scaling for side in (one, other)]
    windows = [s.original_max_position_embeddings for s in scalings if s.depends_on_length]
    for length in {1, *windows, *(window + 1 for window in windows), 10**6}:
        a, b = (
            inverse_frequencies(
                side.model.rotary_dim, side.model.rotary_base, side.model.rope_scaling, length
            )
            for side in (one, other)
        )
        if not torch.allclose(a, b, rtol=1e-6, atol=0):
            return False
    return math.isclose(*map(attention_factor, scalings), rel_tol=1e-6)


def _names(side: Summary, across: bool) -> Mapping[str, Tensor]:
    """Empty tensors, by Hugging Face's names if the other side has those."""
    if not across or not side.by_row:
        return side.tensors
    return {
        part: _empty(shape, side.tensors[row.name].dtype)
        for row in param_mappings(**config_json.sizes(side.model))
        if row.name in side.tensors
        for part, shape in row.parts.items()
    }


def _reader(side: Summary, across: bool) -> Callable[[str], Tensor]:
    """Reads a tensor that `_names` names."""
    if side.format == "hf":
        return shards.Tensors(side.path).__getitem__
    if side.format == "meta":
        return meta.Tensors(side.path).__getitem__
    weights = open_weights(side.path)
    if not across:
        return weights.__getitem__
    rows = {
        part: row for row in param_mappings(**config_json.sizes(side.model)) for part in row.parts
    }
    return lambda part: torch.cat(rows[part].pieces(weights[rows[part].name])[part])


def _huggingface(path: Path) -> Summary:
    model, tensors = config_json.read_config(path), shards.Tensors(path)
    files = config_json.find_sidecars(path).keys() - {"config.json", "generation_config.json"}
    return Summary(path, "hf", model, {}, _empties(tensors), sorted(files))


def _meta(path: Path) -> Summary:
    tensors = meta.Tensors(path)
    with config_json.naming(path):
        model = meta.read_config(tensors)
    tokenizer = sorted(file.name for file in path.glob("tokenizer*"))
    return Summary(path, "meta", model, {}, _empties(tensors), tokenizer)


def _megatron(found: Checkpoint) -> Summary:
    args = vars(found.common["args"])
    progress = (
        {}
        if found.is_release
        else {
            "iteration": found.iteration,
            "samples": args.get("consumed_train_samples"),
            "optimizer state": "no" if args.get("no_save_optim") else "yes",
            "tensor ranks": args.get("tensor_model_parallel_size"),
            "pipeline ranks": args.get("pipeline_model_parallel_size"),
            "ranks": args.get("world_size"),
        }
    )
    return Summary(
        found.path,
        "megatron legacy" if found.is_legacy else "megatron",
        found.model,
        {k: v for k, v in progress.items() if v is not None},
        _empties(open_weights(found.path)),
        [file.name for file in found.tokenizer_files],
    )


def _empties(tensors) -> dict[str, Tensor]:
    return {name: _empty(shape, tensors.dtypes[name]) for name, shape in tensors.shapes.items()}


def _empty(shape, dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
