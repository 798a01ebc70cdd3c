"""Megatron's indexed corpora, memory-mapped and checked."""

from pathlib import Path

from megatron.core.datasets.indexed_dataset import IndexedDataset, get_bin_path, get_idx_path

from pose_megatron.errors import ConfigError
from pose_megatron.preprocessing.indexed_writer import IndexedReader


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
        # What merging checks, and before megatron-core's reader, which prints from __del__ when it
        # fails half-way.
        try:
            found = IndexedReader(prefix)
        except ConfigError as error:
            raise ConfigError(
                f"{flag} {prefix}: {get_idx_path(prefix)} is truncated or not a Megatron index "
                f"({error}); preprocess the corpus again"
            ) from None
        try:
            found.check_tokens()
        except ConfigError as error:
            raise ConfigError(f"{flag} {prefix}: {error}") from None
        if not found.size.tokens:
            raise ConfigError(f"{flag} {prefix}: the corpus has no tokens")
        self.tokens = IndexedDataset(prefix)
        self.lengths = self.tokens.sequence_lengths

    @property
    def identity(self) -> dict:
        """What identifies this corpus, as it is now, in index caches."""
        path = Path(get_idx_path(self.prefix)).resolve()
        stat = path.stat()
        return {"path": str(path), "bytes": stat.st_size, "modified": stat.st_mtime_ns}
