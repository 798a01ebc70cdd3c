"""Characters that two implementations of a tokenizer take alike, each looked at once.

Their tables may be of different versions of Unicode: what is a letter in one is a sign in the
other, and splits words there. A character is compared when a text first holds it, beside characters
of every kind that the patterns of pre-tokenizers tell apart; known_characters.py keeps what comes
of it.
"""

import functools
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, Protocol

import numpy as np

from pose_megatron.preprocessing.known_characters import (
    NORMALIZED,
    PLAIN,
    UNSAFE,
    UNSEEN,
    KnownCharacters,
)

# The character beside a capital and a small letter, a digit, signs, spaces, ends of lines, the
# apostrophe of a contraction, combining marks, and itself.
BESIDE = (
    *("{}", "a{}a", "A{}a", "A{}A", "1{}1", "!{}!", "/{}/", " {}", "a {}a", "a{} a", "a{}  a"),
    *("{}\n", "a\r{}\r", "'{}a", "a'{}", "{}{}", "\u0301{}\u0301", "e{}\u0323\u0301", "中{}中"),
    *("\u0345{}", "_{}_", "\t{}\t"),
)
SPLITS = ("\nb".join(BESIDE),)  # contexts where pre-tokenizers differ
MODELS = ("{}", "a{}a {}{}")  # where models and normalizers do


class Ids(Protocol):
    """What gives the ids of texts."""

    def __call__(self, texts: Sequence[str], /) -> Sequence[Any]: ...


class SafeCharacters:
    """By character, whether a text that holds it may go to the other implementation.

    Args:
        pairs: contexts, and two that must give the same ids there; None of the first is right.
        normalize: the own library's normalizer, where texts go through it first; else None.
        unsafe: characters that are not safe in any case.
        known: what is known of them; it hangs on all of the others.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Sequence[str], Ids, Ids]],
        normalize: Callable[[str], str] | None,
        unsafe: str,
        known: KnownCharacters,
    ):
        self._pairs, self._normalize = pairs, normalize
        self._verdicts = known.verdicts
        self._verdicts[:128] = PLAIN
        self._verdicts[[ord(c) for c in unsafe]] = UNSAFE

    def verdict(self, text: str) -> int:
        """PLAIN: safe. NORMALIZED: the text is to be normalized, and what comes of it looked at
        again. UNSAFE."""
        if text.isascii():
            return PLAIN
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        worst = int(self._verdicts[codes].max())
        if worst == UNSEEN:
            unseen = codes[self._verdicts[codes] == UNSEEN]
            self._look_at([chr(code) for code in np.unique(unseen)])
            worst = int(self._verdicts[codes].max())
        return worst

    def _look_at(self, characters: Sequence[str]) -> None:
        known = [c for c in characters if unicodedata.category(c) != "Cn"]
        safe = np.ones(len(known), dtype=bool)
        for contexts, one, other in self._pairs if known else ():
            texts = [context.replace("{}", c) for c in known for context in contexts]
            same = [
                a is None or np.array_equal(a, b)
                for a, b in zip(one(texts), other(texts), strict=True)
            ]
            safe &= np.reshape(same, (-1, len(contexts))).all(1)
        verdicts = dict.fromkeys(characters, UNSAFE)  # a character that Python does not know yet
        for character, right in zip(known, safe, strict=True):
            if right:
                inert = self._normalize is None or self._is_inert(character)
                verdicts[character] = PLAIN if inert else NORMALIZED
        for character, verdict in verdicts.items():
            self._verdicts[ord(character)] = verdict

    def _is_inert(self, character: str) -> bool:
        """Whether texts of such characters are in normal form C (and KC) already."""
        assert self._normalize
        return (
            not unicodedata.combining(character)
            and character not in _composing()
            and self._normalize(character) == character
        )


@functools.cache
def _composing() -> set[str]:
    """Characters that compose with one before them."""
    pairs = (unicodedata.decomposition(chr(code)).split() for code in range(0x110000))
    seconds = {chr(int(pair[1], 16)) for pair in pairs if len(pair) == 2 and pair[0][0] != "<"}
    return seconds | {chr(code) for code in (*range(0x1160, 0x1200), *range(0xD7B0, 0xD800))}


@functools.cache
def byte_letters() -> dict[int, str]:
    """How byte-level vocabularies spell each byte."""
    spelled = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in spelled]
    return {byte: chr(byte) for byte in spelled} | {b: chr(256 + i) for i, b in enumerate(others)}


def splits_shown(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """tokenizer.json of a vocabulary that shows by its ids where a pre-tokenizer splits.

    It merges the last byte of each character with the first of the next, if one of the two is a
    context's.
    """
    letters = byte_letters()
    beside = sorted({letters[b] for context in SPLITS for b in context.replace("{}", "").encode()})
    leads, lasts = ([letters[b] for b in range(*ends)] for ends in ((0xC2, 0xF5), (0x80, 0xC0)))
    pairs = dict.fromkeys(
        [
            *product(lasts, leads),
            *product(beside, leads),
            *product(lasts, beside),
            *product(beside, beside),
        ]
    )
    vocab = {token: i for i, token in enumerate([*letters.values(), *map("".join, pairs)])}
    model = {"type": "BPE", "vocab": vocab, "merges": [list(pair) for pair in pairs]}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": None,
            "decoder": None,
            "model": model,
        }
    )
