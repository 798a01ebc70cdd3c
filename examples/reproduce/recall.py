"""Pairs of a key and a value: what a small model learns to recall in minutes.

A document gives some keys a value, and writes these pairs again and again between pieces of text.
So nearly every pair of a window can be foreseen from the window itself, as in multi-query
associative recall (Arora et al., "Zoology", arXiv 2312.04927). Each key has values of its own, so
that one step of attention finds a key's value; values that keys share take two, which models of
this size do not learn in minutes. To be asked, a model is shown each pair once, anywhere in a text,
and then a key.
"""

import random
from collections.abc import Sequence

import torch

from pose_megatron.errors import ConfigError
from pose_megatron.evaluation.haystack import Draft, Encode, Hay, Haystack, Question, depths
from pose_megatron.positions.draws import PASSKEYS, Draw

# Hiragana and ideographs: a character each that texts do not hold, and a token each.
KEYS = [chr(0x3042 + 2 * key) for key in range(8)]
VALUES = [[chr(0x4E00 + 16 * key + value) for value in range(16)] for key in range(8)]
SYMBOLS = [*KEYS, *(value for some in VALUES for value in some)]

_FEWEST = 2  # pairs of a document
_PIECES = (0, 0, 4, 8, 16, 32)  # characters of text between two pairs, on average; 0: none


def document(draw: random.Random, text: str) -> str:
    """The text, or pieces of a character each that are left out, with pairs in between."""
    keys = draw.sample(range(len(KEYS)), draw.randint(_FEWEST, len(KEYS)))
    pairs = [KEYS[key] + draw.choice(VALUES[key]) for key in keys]
    piece, at, parts = draw.choice(_PIECES), 0, []
    while at < len(text):
        length = draw.randint(0, 2 * piece)
        parts += [text[at : at + length], draw.choice(pairs)]
        at += length if piece else 1
    return "".join(parts)


def haystacks(
    encode: Encode, hay: Hay, length: int, trials: int, needles: int, seed: int
) -> list[Haystack]:
    """Texts of `length` tokens with their questions included, each asked for all of its pairs.

    Over all texts the pair that is asked for moves evenly from the front to the back.

    Raises:
        ConfigError: a symbol is not one token of this tokenizer, or the pairs do not fit.
    """
    ids = {symbol: _one(encode(symbol), symbol) for symbol in SYMBOLS}
    made = []
    for trial in range(trials):
        draw = Draw(seed, length, trial, PASSKEYS)
        pairs: list[tuple[float, Sequence[int]]] = []
        questions = []
        keys = draw.different(len(KEYS), needles)
        for key, depth in zip(keys, depths(trial, trials, needles), strict=True):
            value = VALUES[key][draw.integer(0, len(VALUES[key]) - 1)]
            pair = [ids[KEYS[key]], ids[value]]
            pairs.append((depth, pair))
            asked, answer = torch.tensor(pair).split(1)
            questions.append(Question(asked, answer, 1, (value,), depth))
        draft = Draft((), pairs, questions)
        if draft.takes > length:
            raise ConfigError(
                f"--context-lengths {length}: {needles} pairs and a question take {draft.takes} "
                "tokens; take fewer --needles"
            )
        made.append(draft.filled(length, hay, draw))
    return made


def _one(ids: Sequence[int], symbol: str) -> int:
    if len(ids) != 1:
        raise ConfigError(
            f"{symbol} is {len(ids)} tokens of this tokenizer, not one: the corpus of "
            "recall_corpus.py was not among its texts"
        )
    return ids[0]
