"""gigatoken, a byte-pair encoder many times faster than the tokenizers' own libraries.

It is another implementation, so it is used only where it gives the ids of the tokenizer's own
library. definition.py says which texts it may take differently, safe_text.py which characters: such
texts go to the tokenizer's own library, one by one. What is left is compared on texts of the corpus
and on texts that implementations get wrong.
"""

import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from pose_megatron import __version__
from pose_megatron.errors import ConfigError
from pose_megatron.preprocessing.definition import Definition, definition
from pose_megatron.preprocessing.known_characters import NORMALIZED, UNSAFE, KnownCharacters
from pose_megatron.preprocessing.safe_text import (
    MODELS,
    SPLITS,
    Ids,
    SafeCharacters,
    splits_shown,
)
from pose_megatron.preprocessing.tokenizer import PROBES, Tokenizer

CACHE_BYTES = 1 << 28  # by how much a process may grow before its cache of words starts anew


class FastTokenizer:
    """A tokenizer's ids by gigatoken, on one thread; by its own library where the two may differ.

    Attributes:
        definition: what gigatoken is given, and the texts that it is not given.
        own_texts: how many texts went to the own library.

    Raises:
        ConfigError: gigatoken is not installed, or cannot express the tokenizer.
    """

    _backend: Any  # gigatoken's; None where there is none

    def __init__(self, tokenizer: Tokenizer):
        try:
            from gigatoken import gigatoken_rs
        except ImportError:
            raise ConfigError("gigatoken is not installed") from None
        self.definition = given = definition(tokenizer)
        self.own_texts = 0
        self._own, self._distrusted = tokenizer, False
        self._json, self._load = json.dumps(given.form), gigatoken_rs.load_hf_json
        self._reload()
        size = 1 + max([tokenizer.vocab_size, *given.doubts])
        self._doubtful, self._added = np.zeros(size, bool), np.zeros(size, bool)
        self._doubtful[list(given.doubts)] = True
        self._added[list(given.added)] = True
        pairs: list[tuple[Sequence[str], Ids, Ids]] = [
            (MODELS, self._whatever_characters, tokenizer.tokenize_batch)
        ]
        if given.byte_level:
            pairs.append((SPLITS, *_splitters(given, self._load)))
        self._known_characters = KnownCharacters(_decisive(tokenizer, self._json))
        self._characters = SafeCharacters(
            pairs,
            tokenizer.normalize if given.normalizes else None,
            given.characters,
            self._known_characters,
        )

    def tokenize_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, uint32; the texts hold no lone surrogates.

        Raises:
            ConfigError: gigatoken fails on a text.
        """
        if self._distrusted:
            return self._by_own(texts)
        try:
            ids = [self._if_safe(text) for text in texts]
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | MemoryError):
                raise
            # BaseException, since a panic in Rust is no Exception
            raise ConfigError(f"gigatoken fails ({error})") from error
        own = iter(self._by_own([text for text, i in zip(texts, ids, strict=True) if i is None]))
        if _resident() > self._limit:
            self._reload()
        return [next(own) if i is None else i for i in ids]

    def keep_characters(self) -> None:
        """Keeps what this process and those forked of it found of characters for later runs."""
        self._known_characters.keep()

    def distrust(self) -> None:
        """From now on the own library does all."""
        self._distrusted, self._backend = True, None

    def _by_own(self, texts: Sequence[str]) -> list[np.ndarray]:
        self.own_texts += len(texts)
        ids = self._own.tokenize_batch(texts) if texts else []
        return [np.array(i, dtype=np.uint32) for i in ids]

    def _if_safe(self, text: str) -> np.ndarray | None:
        """gigatoken's ids of a text; None if the own library's may be others."""
        given, verdict = self.definition, self._characters.verdict(text)
        if verdict == UNSAFE or (given.starts and text.startswith(given.starts)):
            return None
        if given.normalizes and (verdict == NORMALIZED or not given.composes):
            normalized = self._own.normalize(text)
            # A look at what came of it; a character there is safe as a character of a text is.
            if self._characters.verdict(normalized) == UNSAFE:
                return None
            return self._known(text, normalized)
        return self._known(text, text)

    def _known(self, text: str, normalized: str) -> np.ndarray | None:
        """As _if_safe, but for the characters."""
        ids = self._encode(normalized)
        if self._doubtful[ids].any():
            return None
        if normalized != text and self.definition.added:
            # They were to be found before normalizing, and may be other texts by now.
            special = self._added | self._doubtful
            if special[ids].any() or special[self._encode(text)].any():
                return None
        return ids

    def _whatever_characters(self, texts: Sequence[str]) -> list[np.ndarray | None]:
        normalize = self._own.normalize if self.definition.normalizes else str
        return [self._known(text, normalize(text)) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
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


def _decisive(tokenizer: Tokenizer, form: str) -> Iterator[bytes]:
    """All that decides which characters the two take alike."""
    yield tokenizer.serialized()
    yield form.encode()
    yield repr((MODELS, SPLITS)).encode()
    yield unicodedata.unidata_version.encode()
    yield __version__.encode()
    for package in ("gigatoken", "tokenizers", "sentencepiece"):
        yield version(package).encode()


def _splitters(given: Definition, load: Callable) -> tuple[Ids, Ids]:
    """gigatoken and tokenizers, both with the pre-tokenizer and ids that show where it splits."""
    from tokenizers import Tokenizer as Backend

    form = splits_shown(given.form["pre_tokenizer"])
    fast, own = load(form), Backend.from_str(form)
    return (
        lambda texts: [fast.encode(text) for text in texts],
        lambda texts: [encoding.ids for encoding in own.encode_batch_fast(list(texts))],
    )


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
        tokens = [token["content"] for token in fast.definition.form["added_tokens"][:1000]]
        tokens += [*tokenizer.control_tokens][:1000]
        found = [f"x{token} {token}y" for token in dict.fromkeys(tokens)]
        wrong = difference(fast, tokenizer, [*PROBES, *found, *fast.definition.probes])
        before = fast.own_texts
        wrong = wrong or difference(fast, tokenizer, texts)
    except ValueError as error:
        wrong = str(error)
    if wrong:
        return None, f"tokenizing with the tokenizer's own library: {wrong}"
    own = fast.own_texts - before
    return fast, (
        "tokenizing with gigatoken: its ids are those of the tokenizer's own library on "
        f"{len(texts):,} texts of the corpus ({sum(map(len, texts)) / 1e6:.1f} M characters"
        + (f"; {own:,} of them are left to that library)" if own else ")")
    )


def _resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
