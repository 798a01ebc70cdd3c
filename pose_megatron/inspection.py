"""What a checkpoint is, without loading it: shape, parameters, precision, rope, progress.

Any that we can read: Hugging Face folders, Meta's (consolidated.NN.pth with params.json), and
Megatron's, ours or others', torch_dist or legacy. Tensors are known by name, shape and dtype, from
headers and mapped files; `compare` reads values only when asked to.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pose_megatron import huggingface
from pose_megatron.checkpoint import Checkpoint, find
from pose_megatron.convert import megatron_to_hf
from pose_megatron.legacy import Legacy
from pose_megatron.model_config import ModelConfig
from pose_megatron.origin import ANY_FAILURE, gist
from pose_megatron.rope import RopeScaling, attention_factor, inverse_frequencies
from pose_megatron.weights import read_weights


@dataclasses.dataclass(frozen=True)
class Summary:
    """One checkpoint.

    Attributes:
        format: "hf", "meta", "megatron" or "megatron legacy".
        model: shape and rope; None of Meta's format, which does not name its window.
        config: the same as plain values, by ModelConfig's names.
        progress: what is known of the training, by name; empty of weights alone.
        tensors: every weight, an empty tensor on the meta device by its name in this format, of an
            undivided model.
        tokenizer: names of its files.
    """

    path: Path
    format: str
    model: ModelConfig | None
    config: dict
    progress: dict
    tensors: Mapping[str, Tensor]
    tokenizer: list[str]

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Number of tensors of each precision."""
        return dict(Counter(_word(tensor.dtype) for tensor in self.tensors.values()))

    @property
    def rope(self) -> str:
        scaling = RopeScaling(**self.config["rope_scaling"])
        text = f"theta {self.config['rotary_base']:g}, {scaling}"
        if (factor := attention_factor(scaling)) != 1:
            text += f", attention factor {factor:.4f}"
        window = self.config.get("max_position_embeddings")
        return text + (f", window {window:,}" if window else "")

    def to_dict(self) -> dict:
        """Plain values only, for JSON."""
        return {
            "path": str(self.path), "format": self.format, "config": self.config,
            "parameters": self.parameters, "dtypes": self.dtypes, "rope": self.rope,
            "bytes": sum(tensor.nbytes for tensor in self.tensors.values()),
            "progress": self.progress, "tokenizer": self.tokenizer,
        }

    def __str__(self) -> str:
        c = self.config
        size = sum(tensor.nbytes for tensor in self.tensors.values())
        tied = "" if c["untie_embeddings_and_output_weights"] else ", tied embeddings"
        progress = ", ".join(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"
                             for name, value in self.progress.items()) or "weights only"
        return (
            f"checkpoint  {self.path}\n"
            f"format      {self.format}\n"
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
        ValueError: there is none of a known format, or it is damaged.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return _huggingface(path)
    if (path / "params.json").is_file():
        return _meta(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")
    return _megatron(find(path, iteration))


def compare(one: Summary, other: Summary, values: bool = False) -> dict:
    """What differs between two checkpoints, {} when nothing does.

    Two of one format are compared under their own names; Hugging Face and Megatron under Hugging
    Face's. Two ropes of the same frequencies are the same, however they are spelt.

    Args:
        values: reads every tensor, and gives the largest absolute difference of each that differs.

    Returns:
        Under `config`, `only in one`, `only in other`, `shape`, `dtype`, `values`: by name, what
        each side has, or the difference.

    Raises:
        ValueError: one is in Meta's format, the other not.
    """
    across = (one.format == "hf") != (other.format == "hf")
    if (one.format == "meta") != (other.format == "meta"):
        raise ValueError("Meta's names are compared with Meta's only; convert one of the two first")
    found = {"config": _compare_configs(one, other, across)}
    a, b = (_names(side, side.tensors, across) for side in (one, other))
    found["only in one"] = {name: _word(a[name].dtype) for name in a.keys() - b.keys()}
    found["only in other"] = {name: _word(b[name].dtype) for name in b.keys() - a.keys()}
    both = [name for name in a if name in b]
    found["shape"] = {name: [list(a[name].shape), list(b[name].shape)] for name in both
                      if a[name].shape != b[name].shape}
    found["dtype"] = {name: [_word(a[name].dtype), _word(b[name].dtype)] for name in both
                      if a[name].dtype != b[name].dtype}
    if values:
        a, b = (_names(side, _values(side), across) for side in (one, other))
        found["values"] = {}
        for name in both:
            if name not in found["shape"]:
                difference = (a[name].double() - b[name].double()).abs().max().item()
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
    return {k: [a.get(k), b.get(k)] for k in a.keys() | b.keys()
            if k not in ignored and a.get(k) != b.get(k)}


def _same_rope(one: Summary, other: Summary) -> bool:
    if one.model is None or other.model is None or one.model.rotary_dim != other.model.rotary_dim:
        return False
    scalings = [side.model.rope_scaling for side in (one, other)]
    windows = [s.original_max_position_embeddings for s in scalings if s.depends_on_length]
    for length in {1, *windows, *(window + 1 for window in windows), 10**6}:
        a, b = (inverse_frequencies(
            side.model.rotary_dim, side.model.rotary_base, side.model.rope_scaling, length)
            for side in (one, other))
        if not torch.allclose(a, b, rtol=1e-6, atol=0):
            return False
    return math.isclose(*map(attention_factor, scalings), rel_tol=1e-6)


def _names(side: Summary, tensors: Mapping[str, Tensor], across: bool) -> Mapping[str, Tensor]:
    """By Hugging Face's names, if the other side has those."""
    if not across or side.format == "hf":
        return tensors
    return megatron_to_hf(tensors, **huggingface.sizes(side.model))


def _values(side: Summary) -> Mapping[str, Tensor]:
    if side.format == "hf":
        return huggingface.Tensors(side.path)
    if side.format == "meta":
        raise ValueError("--values is not for Meta's format; convert both checkpoints first")
    return read_weights(side.path)[0]


def _huggingface(path: Path) -> Summary:
    model, tensors = huggingface.read_config(path), {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    part = opened.get_slice(name)
                    tensors[name] = _empty(part.get_shape(), _DTYPES[part.get_dtype()])
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or cut off: {error}") from None
    if not tensors:
        for file in sorted(path.glob("pytorch_model*.bin")):
            tensors |= {name: _like(tensor) for name, tensor in _mapped(file).items()}
    if not tensors:
        raise ValueError(f"{path} holds no weights, neither *.safetensors nor pytorch_model*.bin")
    tokenizer = sorted(name for name in huggingface.find_sidecars(path)
                       if name not in ("config.json", "generation_config.json"))
    return Summary(path, "hf", model, model.to_dict(), {}, tensors, tokenizer)


def _megatron(found: Checkpoint) -> Summary:
    common, args = found.common, vars(found.common["args"])
    optimizer = "optimizer" in common
    if found.is_legacy:
        tensors = {name: _like(tensor) for name, tensor in Legacy(found.path).items()}
    else:
        try:
            stored = dist_checkpointing.load_tensors_metadata(str(found.path))
        except ANY_FAILURE as error:
            raise ValueError(
                f"checkpoint {found.path} cannot be loaded: {gist(error)}"
            ) from error
        optimizer |= any(key.startswith("optimizer.") for key in stored)
        tensors = {}
        for key, entry in stored.items():
            if key.startswith("decoder.layers."):
                for layer in range(entry.global_shape[0]):
                    name = key.replace("layers.", f"layers.{layer}.", 1)
                    tensors[name] = _empty(entry.global_shape[1:], entry.dtype)
            elif not key.startswith("optimizer."):
                tensors[key] = _empty(entry.global_shape, entry.dtype)
    progress = {} if found.is_release else {
        "iteration": found.iteration,
        "samples": args.get("consumed_train_samples"),
        "optimizer state": "yes" if optimizer else "no",
        "tensor ranks": args.get("tensor_model_parallel_size"),
        "pipeline ranks": args.get("pipeline_model_parallel_size"),
        "ranks": args.get("world_size"),
    }
    return Summary(
        found.path, "megatron legacy" if found.is_legacy else "megatron", found.model,
        found.model.to_dict(), {k: v for k, v in progress.items() if v is not None}, tensors,
        [file.name for file in found.tokenizer_files],
    )


def _meta(path: Path) -> Summary:
    with huggingface.naming(path):
        try:
            params = json.loads((path / "params.json").read_text())
            dim, heads = params["dim"], params["n_heads"]
            layers, multiple = params["n_layers"], params["multiple_of"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"params.json is broken or lacks a size: {error}") from None
    parts: dict[str, list[Tensor]] = {}
    for file in sorted(path.glob("consolidated.*.pth")):
        for name, tensor in _mapped(file).items():
            if not name.endswith("rope.freqs"):
                parts.setdefault(name, []).append(tensor)
    if "tok_embeddings.weight" not in parts:
        raise ValueError(f"{path} holds no consolidated.*.pth with tok_embeddings.weight")
    tensors = {name: _joined(name, tensors, dim) for name, tensors in parts.items()}
    ffn = int(params.get("ffn_dim_multiplier", 1) * int(8 * dim / 3))
    scaling = RopeScaling()
    if params.get("use_scaled_rope"):
        scaling = RopeScaling("llama3", float(params.get("rope_scaling_factor", 8.0)), 8192)
    config = {
        "num_layers": layers, "hidden_size": dim,
        "ffn_hidden_size": -(-ffn // multiple) * multiple,
        "num_attention_heads": heads, "num_query_groups": params.get("n_kv_heads") or heads,
        "kv_channels": dim // heads, "vocab_size": len(tensors["tok_embeddings.weight"]),
        "untie_embeddings_and_output_weights": "output.weight" in tensors,
        "norm_epsilon": params.get("norm_eps", 1e-5),
        "rotary_base": float(params.get("rope_theta", 10000.0)),
        "rope_scaling": dataclasses.asdict(scaling),
    }
    tokenizer = sorted(file.name for file in path.glob("tokenizer*"))
    return Summary(path, "meta", None, config, {}, tensors, tokenizer)


def _joined(name: str, parts: list[Tensor], dim: int) -> Tensor:
    """The whole of what Meta's model-parallel files hold parts of."""
    shape = list(parts[0].shape)
    if len(shape) == 2:
        by_rows = not name.endswith(("wo.weight", "w2.weight"))
        if name == "tok_embeddings.weight":  # LLaMA 1 and 2 cut its columns
            by_rows = shape[1] == dim
        shape[0 if by_rows else 1] *= len(parts)
    return _empty(shape, parts[0].dtype)


def _mapped(file: Path) -> dict[str, Tensor]:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpickling fails in many ways on damaged bytes
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())[:300]}") from None


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8,
           "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def _empty(shape, dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _like(tensor: Tensor) -> Tensor:
    return _empty(tensor.shape, tensor.dtype)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
