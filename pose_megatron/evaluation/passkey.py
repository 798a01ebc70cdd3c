"""Passkey retrieval: whether a model finds a number that stands anywhere in its window.

    haystack    filler or other text, cut to the token
    needles     K lines that each give a name its number, at K places of the haystack
    question    one of these lines again, up to its number, which is the answer

A prompt with its answer has exactly C tokens, at positions 0 to C - 1. From trial to trial the
needle in question moves from the front to the back; the others, with other names, distract. This
is the task of Mohtashami and Jaggi (2023), and with K > 1 the multi-key needles of RULER (Hsieh et
al., 2024), in our own words and as text to be continued, so that base models can do it.

Perplexity hardly shows whether far tokens are read; this does.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pose_megatron.errors import ConfigError
from pose_megatron.evaluation.perplexity import Logits
from pose_megatron.positions.draws import PASSKEYS, Draw

FILLER = (
    "The mill stands where the two streams meet. In the morning a cart brings grain, and in the "
    "evening it takes the flour to town. When it rains the road is slow and nobody minds. "
)
NAMES = tuple(
    "heron otter badger falcon salmon beetle marten plover walnut poplar willow cherry juniper "
    "clover barley thistle copper silver marble amber velvet linen paper candle anchor ladder "
    "bridge harbour meadow valley island glacier".split()
)
_DIGITS = 5


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        tokens: int64 [C], the answer included.
        answer: how many of the last tokens are the answer.
        depth: where the needle is: 0 at the front of the haystack, 1 right before the question.
    """

    tokens: Tensor
    answer: int
    depth: float


@dataclass(frozen=True)
class Answer:
    """What the model made of a prompt.

    Attributes:
        depth: where the needle is, as in Prompt.
        found: whether the most likely token is right at each place of the answer, so that greedy
            decoding gives the answer.
        loss: nats per token of the answer.
    """

    depth: float
    found: bool
    loss: float


def prompts(
    encode: Callable[[str], Sequence[int]],
    haystack: Callable[[Draw, int], np.ndarray],
    length: int,
    trials: int,
    needles: int = 1,
    seed: int = 0,
    first: Sequence[int] = (),
) -> list[Prompt]:
    """Prompts for one context length, the same for every model with this tokenizer.

    Args:
        encode: text to token ids, none added at either end.
        haystack: (draw, count) to `count` ids, which may depend on the draw.
        length: C.
        trials: how many prompts; their depths are evenly spaced from 0 to 1.
        needles: K.
        first: ids that every prompt begins with.

    Raises:
        ConfigError: K needles do not fit into C tokens, or there are fewer names than that.
    """
    if not 1 <= needles <= len(NAMES):
        raise ConfigError(f"--needles {needles} must lie between 1 and {len(NAMES)}")
    made = []
    for trial in range(trials):
        draw = Draw(seed, length, trial, PASSKEYS)
        names = _different(draw, len(NAMES), needles)
        span = 10**_DIGITS - 10 ** (_DIGITS - 1)
        numbers = [10 ** (_DIGITS - 1) + n for n in _different(draw, span, needles)]
        lines = [f"\nThe pass key of {NAMES[name]} is" for name in names]
        texts = [
            list(encode(f"{line} {number}\n")) for line, number in zip(lines, numbers, strict=True)
        ]
        question, answer = _split(encode, lines[0], f" {numbers[0]}")
        room = length - len(first) - sum(map(len, texts)) - len(question) - len(answer)
        if room < 0:
            raise ConfigError(
                f"--context-lengths {length}: {needles} needles and the question take "
                f"{length - room} tokens"
            )
        depth = trial / (trials - 1) if trials > 1 else 0.5
        places = [round(depth * room), *(draw.integer(0, room) for _ in lines[1:])]
        hay = haystack(draw, room)
        parts: list[Sequence[int] | np.ndarray] = [first]
        before = 0
        for place, text in sorted(zip(places, texts, strict=True)):
            parts += [hay[before:place], text]
            before = place
        parts += [hay[before:], question, answer]
        tokens = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
        made.append(Prompt(torch.from_numpy(tokens), len(answer), depth))
    return made


def filler(encode: Callable[[str], Sequence[int]]) -> Callable[[Draw, int], np.ndarray]:
    """A haystack of FILLER, repeated."""
    ids = np.asarray(encode(FILLER), dtype=np.int64)
    return lambda draw, count: np.resize(ids, count)


def answers(
    logits: Logits,
    asked: Sequence[Prompt],
    batch_tokens: int = 16384,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Iterator[Answer]:
    """The model's answers to prompts of one length, in their order.

    Args:
        logits: the model's.
        batch_tokens: about how many tokens go into one call.
        progress: called with the number of tokens just done.
    """
    size = max(batch_tokens // len(asked[0].tokens), 1)
    for batch in (asked[k : k + size] for k in range(0, len(asked), size)):
        tokens = torch.stack([prompt.tokens for prompt in batch])
        scored = logits(tokens[:, :-1], max(prompt.answer for prompt in batch))
        for prompt, row in zip(batch, scored, strict=True):
            right, row = prompt.tokens[-prompt.answer :].to(row.device), row[-prompt.answer :]
            yield Answer(
                prompt.depth,
                bool((row.argmax(-1) == right).all()),
                F.cross_entropy(row.float(), right).item(),
            )
        progress(tokens.numel())


def interval(found: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval for the share found / trials."""
    z = 1.959963984540054
    share, spread = found / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _different(draw: Draw, below: int, count: int) -> list[int]:
    """Different integers in [0, below), in random order."""
    found: list[int] = []
    while len(found) < count:
        if (value := draw.integer(0, below - 1)) not in found:
            found.append(value)
    return found


def _split(encode, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of question + answer, cut where they first differ from those of the question alone."""
    whole, alone = list(encode(question + answer)), list(encode(question))
    same = 0
    while same < min(len(whole), len(alone)) and whole[same] == alone[same]:
        same += 1
    return whole[:same], whole[same:]
