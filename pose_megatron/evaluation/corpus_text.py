"""Text of an indexed corpus, for evaluations: whole documents, or a haystack."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import get_bin_path, get_idx_path

from pose_megatron.data.indexed_corpus import IndexedCorpus
from pose_megatron.errors import ConfigError
from pose_megatron.evaluation.lengths import check_cut
from pose_megatron.positions.draws import Draw


def files_of(prefix: str | None) -> list[Path]:
    """The two files of a corpus; none without one."""
    return [Path(get_idx_path(prefix)), Path(get_bin_path(prefix))] if prefix else []


def long_documents(
    prefix: str,
    longest: int,
    max_documents: int,
    max_tokens: int,
    vocab_size: int,
) -> list[torch.Tensor]:
    """The first documents with more than `longest` tokens, int64 [n] each, n <= max_tokens.

    Args:
        prefix: --data-path.
        longest: the longest context length, in tokens.
        max_tokens: where documents are cut; above `longest`.
        vocab_size: token ids must lie below it.

    Raises:
        ConfigError: no document is long enough, or one holds another model's token ids.
    """
    check_cut(max_tokens, longest)
    corpus = IndexedCorpus(prefix)
    long_enough = (corpus.lengths > longest).nonzero()[0][:max_documents]
    if not len(long_enough):
        raise ConfigError(
            f"--data-path {prefix}: no document has more than {longest} tokens, the longest "
            f"context length (the longest has {corpus.lengths.max()})"
        )
    documents = []
    for i in long_enough.tolist():
        tokens = corpus.tokens.get(i, 0, min(max_tokens, int(corpus.lengths[i])))
        if tokens.max() >= vocab_size:
            raise ConfigError(
                f"--data-path {prefix}: token id {tokens.max()} in document {i} is outside the "
                f"checkpoint's vocabulary of {vocab_size}"
            )
        documents.append(torch.from_numpy(tokens.astype("int64")))
    return documents


def haystack(prefix: str, longest: int) -> Callable[[Draw, int], np.ndarray]:
    """`take(draw, count)`: the next `count` ids of the corpus, int64, from a drawn document on.

    Args:
        prefix: --data-path.
        longest: the longest context length, in tokens.

    Raises:
        ConfigError: the corpus has fewer than `longest` tokens.
    """
    corpus = IndexedCorpus(prefix)
    total = int(corpus.lengths.sum(dtype=np.int64))
    if total < longest:
        raise ConfigError(
            f"--data-path {prefix} has {total} tokens, fewer than the longest context length, "
            f"{longest}"
        )

    def take(draw: Draw, count: int) -> np.ndarray:
        document, parts = draw.integer(0, len(corpus.lengths) - 1), []
        while count > 0:
            n = min(count, int(corpus.lengths[document]))
            parts.append(corpus.tokens.get(document, 0, n).astype(np.int64))
            count -= n
            document = (document + 1) % len(corpus.lengths)
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    return take
