"""gigatoken, a byte-pair encoder many times faster than the tokenizers' own libraries.

It is another implementation, so it is used only where it gives the ids of the tokenizer's own
library, on texts of the corpus and on texts that implementations get wrong. A text with a character
newer than this Python's Unicode goes to the tokenizer's own library: the two may know different
versions of Unicode, and take a letter for a sign.
"""

import functools
import json
import os
import unicodedata
from collections.abc import Sequence

import numpy as np

from pose_megatron.errors import ConfigError
from pose_megatron.preprocessing.tokenizer import PROBES, Tokenizer

CACHE_BYTES = 1 << 28  # by how much a process may grow before its cache of words starts anew


class FastTokenizer:
    """A tokenizer's ids by gigatoken, on one thread; by its own library where the two may differ.

    Raises:
        ConfigError: gigatoken is not installed, or cannot express the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer):
        try:
            from gigatoken import gigatoken_rs
        except ImportError:
            raise ConfigError("gigatoken is not installed") from None
        form = tokenizer.as_json()
        self._own = tokenizer
        self.added = [token["content"] for token in form["added_tokens"]]
        self._json, self._load = json.dumps(form), gigatoken_rs.load_hf_json
        self._reload()

    def tokenize_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, uint32; the texts hold no lone surrogates.

        Raises:
            ConfigError: gigatoken fails on a text.
        """
        try:
            ids = [
                self._encode(text)
                if text.isascii() or not _has_new_characters(text)
                else np.array(self._own.tokenize(text), dtype=np.uint32)
                for text in texts
            ]
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | MemoryError):
                raise
            # BaseException, since a panic in Rust is no Exception
            raise ConfigError(f"gigatoken fails ({error})") from error
        if _resident() > self._limit:
            self._reload()
        return ids

    def _encode(self, text: str) -> np.ndarray:
        assert self._backend is not None
        return self._backend.encode(text)

    def _reload(self) -> None:
        # The cache grows without bound, by about 1 MB per MB of sentencepiece text: start anew.
        self._backend = None  # frees the old one first
        try:
            self._backend = self._load(self._json)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(f"gigatoken cannot express it ({reason})") from error
        self._limit = _resident() + CACHE_BYTES


def _has_new_characters(text: str) -> bool:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return bool(_unassigned()[codes].any())


@functools.cache
def _unassigned() -> np.ndarray:
    """Whether this Python's Unicode has no character yet for each code point, bool [0x110000]."""
    table = np.zeros(0x110000, dtype=bool)
    table[0x40000:0xF0000] = True  # nearly empty planes; the private ones beyond never change
    for code in range(0x40000):
        table[code] = unicodedata.category(chr(code)) == "Cn"
    return table


def difference(fast: FastTokenizer, tokenizer: Tokenizer, texts: Sequence[str]) -> str | None:
    """What is wrong with the fast ids on the first text where they differ, or None."""
    try:
        ours = fast.tokenize_batch(texts)
    except ValueError as error:
        return str(error)
    for text, ids, expected in zip(texts, ours, tokenizer.tokenize_batch(texts), strict=True):
        if not np.array_equal(ids, expected):
            return f"gigatoken's ids differ on {text[:40]!r}"
    return None


def prove(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[FastTokenizer | None, str]:
    """A FastTokenizer, if gigatoken gives the same ids on the texts.

    Returns:
        The fast tokenizer or None, and the reason in one sentence.
    """
    try:
        fast = FastTokenizer(tokenizer)
        added = [f"x{token} {token}y" for token in fast.added[:1000]]
        wrong = difference(fast, tokenizer, [*PROBES, *added, *texts])
    except ValueError as error:
        wrong = str(error)
    if wrong:
        return None, f"tokenizing with the tokenizer's own library: {wrong}"
    return fast, (
        "tokenizing with gigatoken: its ids are those of the tokenizer's own library on "
        f"{len(texts):,} texts of the corpus ({sum(map(len, texts)) / 1e6:.1f} M characters)"
    )


def _resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
