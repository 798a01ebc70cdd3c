"""Megatron's indexed corpora, memory-mapped and checked."""

from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import (
    IndexedDataset,
    _IndexReader,
    get_bin_path,
    get_idx_path,
)

from pose_megatron.errors import ConfigError


class IndexedCorpus:
    """`prefix.bin` and `prefix.idx`: token ids of documents, checked to belong together.

    Args:
        prefix: path of the two files without their endings.
        flag: the flag that named it, for messages.

    Attributes:
        tokens: the IndexedDataset; only `get` touches the .bin.
        lengths: tokens of each document, int32.

    Raises:
        ConfigError: a file is missing, truncated or not an index, or the corpus is empty.
    """

    def __init__(self, prefix: str, flag: str = "--data-path"):
        self.prefix, self.flag = prefix, flag
        for path in (get_idx_path(prefix), get_bin_path(prefix)):
            if not Path(path).is_file():
                raise ConfigError(
                    f"{flag} {prefix}: {path} is missing; the prefix is what "
                    "tools/preprocess_data.py wrote, such as corpus_text_document"
                )
        # The index alone first: the whole reader, when it fails half-way, prints from __del__.
        try:
            index = _IndexReader(get_idx_path(prefix), multimodal=False)
            _check(index)
        except Exception as error:  # the reader fails in many ways on foreign bytes
            raise ConfigError(
                f"{flag} {prefix}: {get_idx_path(prefix)} is truncated or not a Megatron "
                f"index ({str(error) or type(error).__name__}); preprocess the corpus again"
            ) from None
        if not np.issubdtype(index.dtype, np.integer):
            raise ConfigError(
                f"{flag} {prefix}: its values are {np.dtype(index.dtype).name}, not token ids"
            )
        needed = int(index.sequence_lengths.sum(dtype=np.int64)) * index.dtype_size
        if not needed:
            raise ConfigError(f"{flag} {prefix}: the corpus has no tokens")
        have = Path(get_bin_path(prefix)).stat().st_size
        if have != needed:
            raise ConfigError(
                f"{flag} {prefix}: {get_bin_path(prefix)} has {have} bytes, its index "
                f"describes {needed}: truncated or from another corpus; preprocess it again"
            )
        self.tokens = IndexedDataset(prefix)
        self.lengths = self.tokens.sequence_lengths

    @property
    def identity(self) -> dict:
        """What identifies this corpus, as it is now, in index caches."""
        path = Path(get_idx_path(self.prefix)).resolve()
        stat = path.stat()
        return {"path": str(path), "bytes": stat.st_size, "modified": stat.st_mtime_ns}


def _check(index: _IndexReader) -> None:
    """Documents must lie end to end; read in pieces, since an index may be larger than memory."""
    if index.document_indices[-1] != len(index):
        raise ConfigError("its tables disagree")
    lengths, pointers, end = index.sequence_lengths, index.sequence_pointers, 0
    for start in range(0, len(lengths), 1 << 20):
        part = lengths[start : start + (1 << 20)].astype(np.int64)
        if (part < 0).any():
            raise ConfigError("a document has a negative length")
        ends = end + np.cumsum(part * index.dtype_size)
        begins = np.concatenate([[end], ends[:-1]])
        if (pointers[start : start + len(part)] != begins).any():
            raise ConfigError("its documents do not adjoin")
        end = ends[-1]
