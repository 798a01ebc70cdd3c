"""What a checkpoint is, without loading it: shape, parameters, precision, rope, progress.

Any format that can be converted is understood. Tensors are known by name, shape and dtype, from
headers; `compare` reads values only when asked to.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pose_megatron.checkpoints.formats import CheckpointReader, format_class, marks
from pose_megatron.errors import ConfigError
from pose_megatron.rope.scaling import attention_factor, inverse_frequencies


class Summary:
    """One checkpoint, from its headers.

    Attributes:
        path: the folder that holds the weights.
        format: "hf", "meta", "megatron" or "megatron legacy".
        model: shape and rope.
        progress: what is known of the training run, by name; empty for weights alone.
        tensors: every weight of the undivided model as an empty tensor on the meta device, under
            Megatron's names or (hf, meta) Hugging Face's.
        tokenizer: names of its files.
    """

    def __init__(self, reader: CheckpointReader):
        self.reader = reader
        self.path, self.format, self.model = reader.path, reader.layout, reader.model
        self.progress = reader.progress
        weights = reader.weights
        self.tensors = {
            name: _empty(shape, weights.dtypes[name]) for name, shape in weights.shapes.items()
        }
        self.tokenizer = sorted(
            file.name
            for name, file in reader.sidecars.items()
            if name not in ("config.json", "generation_config.json")
        )

    @property
    def config(self) -> dict:
        return self.model.to_dict()

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Number of tensors of each precision."""
        return dict(Counter(_name_of(tensor.dtype) for tensor in self.tensors.values()))

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
        experts = ""
        if self.model.num_experts is not None:
            experts = (
                f", {c['num_experts']} experts of {c['moe_ffn_hidden_size']}, "
                f"{c['moe_router_topk']} to a token"
            )
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
            f"{c['num_query_groups']} groups, vocabulary {c['vocab_size']}{tied}{experts}\n"
            f"parameters  {self.parameters:,} in {len(self.tensors)} tensors, "
            f"{size / 1e6:,.1f} MB\n"
            f"dtype       {', '.join(f'{name} x{n}' for name, n in self.dtypes.items())}\n"
            f"rope        {self.rope}\n"
            f"progress    {progress}\n"
            f"tokenizer   {', '.join(self.tokenizer) or 'none'}"
        )


def summarise(path: str | Path, iteration: int | None = None) -> Summary:
    """Looks at a checkpoint.

    Args:
        iteration: the one of a Megatron checkpoint; None for its latest.

    Raises:
        ConfigError: there is no checkpoint of a known format, or its model is not supported.
        DamagedCheckpoint: a file is missing or damaged.
    """
    path = Path(path)
    for mark, name in marks().items():
        if name != "megatron" and (path / mark).is_file():
            return Summary(format_class(name)().open(path))
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder")
    return Summary(format_class("megatron")(iteration).open(path))  # or of one iteration


def compare(one: Summary, other: Summary, values: bool = False) -> dict:
    """What differs between two checkpoints, {} when nothing does.

    Two Megatron checkpoints are compared under Megatron's names, all others under Hugging Face's.
    Ropes of the same frequencies are the same, however they are spelled.

    Args:
        values: also read every tensor and give the largest absolute difference where one differs.

    Returns:
        Under `config`, `only in one`, `only in other`, `shape`, `dtype` and `values`: what each
        side has, or the difference, by name.
    """
    across = one.reader.megatron_names != other.reader.megatron_names
    found = {"config": _compare_configs(one, other, across)}
    a, b = (_names(side, across) for side in (one, other))
    found["only in one"] = {name: _name_of(a[name].dtype) for name in a.keys() - b.keys()}
    found["only in other"] = {name: _name_of(b[name].dtype) for name in b.keys() - a.keys()}
    both = [name for name in a if name in b]
    found["shape"] = {
        name: [list(a[name].shape), list(b[name].shape)]
        for name in both
        if a[name].shape != b[name].shape
    }
    found["dtype"] = {
        name: [_name_of(a[name].dtype), _name_of(b[name].dtype)]
        for name in both
        if a[name].dtype != b[name].dtype
    }
    if values:
        found["values"] = {}
        read_one, read_other = (_value_of(side, across) for side in (one, other))
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
    ignored = {"make_vocab_size_divisible_by"} if across else set()  # only Megatron keeps it
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
    windows = [s.original_max_position_embeddings or 1 for s in scalings if s.depends_on_length]
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
    """Empty tensors, under Hugging Face's names if the other side has those."""
    if not across or not side.reader.megatron_names:
        return side.tensors
    return {
        part: _empty(shape, side.tensors[mapping.name].dtype)
        for mapping in side.reader.mappings
        if mapping.name in side.tensors
        for part, shape in mapping.parts.items()
    }


def _value_of(side: Summary, across: bool) -> Callable[[str], Tensor]:
    """Reads a tensor that `_names` names."""
    weights = side.reader.weights
    if not across or not side.reader.megatron_names:
        return weights.__getitem__
    mappings = {part: mapping for mapping in side.reader.mappings for part in mapping.parts}
    return lambda part: torch.cat(mappings[part].pieces(weights[mappings[part].name])[part])


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
