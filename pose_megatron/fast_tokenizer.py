"""gigatoken, a byte-pair encoder many times faster than the tokenizers' own libraries.

It is another implementation, so it is used only where its ids are those of the tokenizer's own
library, on texts of the corpus at hand and on texts that implementations get wrong.
"""

import json
import os
from collections.abc import Sequence

import numpy as np

from pose_megatron.tokenizer import PROBES, Tokenizer

CACHE_BYTES = 1 << 28  # what one process may remember of the words that it has seen


class FastTokenizer:
    """A tokenizer's ids from gigatoken, on one thread.

    Raises:
        ValueError: gigatoken is not installed, or cannot express the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer):
        try:
            from gigatoken import gigatoken_rs
        except ImportError:
            raise ValueError("gigatoken is not installed") from None
        form = tokenizer.as_json()
        self.vocab_size = tokenizer.vocab_size
        self.added = [token["content"] for token in form["added_tokens"]]
        self._json, self._load = json.dumps(form), gigatoken_rs.load_hf_json
        self._reload()

    def tokenize_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, uint32. No lone surrogates, please."""
        ids = [self._encode(text) for text in texts]
        if _resident() > self._limit:
            self._reload()
        return ids

    def _reload(self) -> None:
        # gigatoken caches what it has seen without bound: about 1 MB per MB of sentencepiece text
        self._encode = None
        try:
            self._encode = self._load(self._json).encode
        except Exception as error:  # whatever its bindings raise
            raise ValueError(f"gigatoken cannot express it ({error})") from error
        self._limit = _resident() + CACHE_BYTES


def difference(fast: FastTokenizer, tokenizer: Tokenizer, texts: Sequence[str]) -> str | None:
    """The start of the first text whose ids differ; None: there is none."""
    try:
        ours = fast.tokenize_batch(texts)
    except Exception as error:  # whatever its bindings raise
        return str(error)
    for text, ids, expected in zip(texts, ours, tokenizer.tokenize_batch(texts), strict=True):
        if not np.array_equal(ids, expected):
            return repr(text[:40])
    return None


def prove(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[FastTokenizer | None, str]:
    """gigatoken in place of the tokenizer's own library, if its ids are the same on the texts.

    Returns:
        The fast tokenizer or None, and why, in one sentence.
    """
    size = sum(map(len, texts))
    try:
        fast = FastTokenizer(tokenizer)
    except ValueError as error:
        return None, f"tokenizing with the tokenizer's own library: {error}"
    added = [f"x{token} {token}y" for token in fast.added[:1000]]
    if (text := difference(fast, tokenizer, [*PROBES, *added, *texts])) is not None:
        return None, (
            f"tokenizing with the tokenizer's own library: gigatoken's ids differ on {text}"
        )
    return fast, (
        f"tokenizing with gigatoken: its ids are those of the tokenizer's own library on "
        f"{len(texts):,} texts of the corpus ({size / 1e6:.1f} M characters)"
    )


def _resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
