"""Whole models in memory, through the package's own tables and files: what tests start from."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

from pose_megatron.checkpoints.mapping import (
    check_hf,
    check_megatron,
    one_dtype,
    param_mappings,
    scatter,
)
from pose_megatron.checkpoints.megatron.directory import find
from pose_megatron.checkpoints.megatron.torch_dist import DistcpWriter, begin, finish, weights_of
from pose_megatron.errors import ConfigError
from pose_megatron.models.shape import ModelConfig

TOKENIZER = tokenizers.Tokenizer(tokenizers.models.BPE()).to_str()  # a tokenizer.json


def hf_to_megatron(tensors: Mapping[str, Tensor], **sizes) -> dict[str, Tensor]:
    """Converts the tensors of a Hugging Face model; `sizes` as in `param_mappings`.

    Raises:
        ConfigError: as in check_hf; or the embeddings are tied, and an `lm_head.weight` is there
            and differs from the embedding.
    """
    mappings = list(param_mappings(**sizes))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for head in check_hf(shapes, mappings, sizes["tied"]):
        (embedding,) = mappings[0].parts
        if not torch.equal(tensors[head], tensors[embedding]):
            raise ConfigError(f"the embeddings are tied, but {head} differs from {embedding}")

    result = {}
    for mapping in mappings:
        dtype = one_dtype(mapping, (tensors[name].dtype for name in mapping.parts))
        result[mapping.name] = mapping.join(
            lambda name, pieces: scatter(tensors[name], pieces),
            torch.empty(mapping.shape, dtype=dtype),
        )
    return result


def megatron_to_hf(tensors: Mapping[str, Tensor], **sizes) -> dict[str, Tensor]:
    """The inverse of `hf_to_megatron`, same sizes and errors; the results are contiguous."""
    mappings = list(param_mappings(**sizes))
    check_megatron({name: tensor.shape for name, tensor in tensors.items()}, mappings)
    return {
        name: torch.cat(pieces)
        for mapping in mappings
        for name, pieces in mapping.pieces(tensors[mapping.name]).items()
    }


def write_weights(
    root: str | Path,
    tensors: Mapping[str, Tensor],
    model: ModelConfig,
    tokenizer_files: Iterable[Path] = (),
) -> Path:
    """Writes a folder's `release` checkpoint in one process; returns the path of `release`.

    Args:
        tensors: by the names of an undivided model, as checkpoints.mapping makes them.
    """
    root = Path(root)
    path = begin(root, tokenizer_files)
    with DistcpWriter(root) as writer:
        for name, tensor in tensors.items():
            writer.put(name, tensor)
    finish(root, model, writer.chunks)
    return path


def read_weights(
    root: str | Path, iteration: int | None = None
) -> tuple[dict[str, Tensor], ModelConfig]:
    """All tensors at once by the names of an undivided model, and the model; errors as `find`."""
    checkpoint = find(root, iteration)
    return dict(weights_of(checkpoint)), checkpoint.model
