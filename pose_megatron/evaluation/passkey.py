"""Passkey retrieval: whether a model finds a number that stands anywhere in its window.

    haystack    filler or other text, cut to the token
    needles     K lines that each give a name its number, at K places of the haystack
    question    one of these lines again, up to its number, which is the answer

A haystack is read once, and asked for each of its needles: its K prompts are the same tokens up to
the question. A prompt with its answer has exactly C tokens, at positions 0 to C - 1. Over all
prompts of a length, the needle in question moves evenly from the front to the back; the others,
with other names, distract. This is the task of Mohtashami and Jaggi (2023), and with K > 1 the
multi-key needles of RULER (Hsieh et al., 2024), in our own words and as text to be continued, so
that base models can do it.

Perplexity hardly shows whether far tokens are read; this does.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pose_megatron.errors import ConfigError
from pose_megatron.evaluation.reading import UNASKED, Reader
from pose_megatron.evaluation.record import Record
from pose_megatron.evaluation.replicas import batches
from pose_megatron.positions.draws import PASSKEYS, Draw

Encode = Callable[[str], Sequence[int]]  # text to token ids, none added at either end
Hay = Callable[[Draw, int], np.ndarray]  # `count` ids, which may depend on the draw

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
class Haystack:
    """A text with its questions.

    Attributes:
        prompts: one for each needle.
        shared: how many tokens they all begin with.
    """

    prompts: list[Prompt]
    shared: int

    @property
    def tokens(self) -> int:
        """How many go through a model, where all of `shared` are read once."""
        return self.shared + sum(len(p.tokens) - 1 - self.shared for p in self.prompts)


class Answer(NamedTuple):
    """What the model made of a prompt.

    Attributes:
        depth: where the needle is, as in Prompt.
        found: whether the most likely token is right at each place of the answer, so that greedy
            decoding gives the answer.
        loss: nats per token of the answer.
        right: share of the answer's digits that are right, each foreseen from the right ones before
            its token.
    """

    depth: float
    found: bool
    loss: float
    right: float


def haystacks(
    encode: Encode,
    hay: Hay,
    length: int,
    trials: int,
    needles: int = 1,
    seed: int = 0,
    first: Sequence[int] = (),
) -> list[Haystack]:
    """Haystacks for one context length, the same for every model with this tokenizer.

    Args:
        length: C.
        trials: how many haystacks; the depths of all their needles are evenly spaced from 0 to 1.
        needles: K.
        first: ids that every prompt begins with.

    Raises:
        ConfigError: K needles do not fit into C tokens, or there are fewer names than that.
    """
    if not 1 <= needles <= len(NAMES):
        raise ConfigError(f"--needles {needles} must lie between 1 and {len(NAMES)}")
    made, last = [], trials * needles - 1
    for trial in range(trials):
        draw = Draw(seed, length, trial, PASSKEYS)
        names = _different(draw, len(NAMES), needles)
        span = 10**_DIGITS - 10 ** (_DIGITS - 1)
        numbers = [10 ** (_DIGITS - 1) + n for n in _different(draw, span, needles)]
        lines = [f"\nThe pass key of {NAMES[name]} is" for name in names]
        texts = [
            list(encode(f"{line} {number}\n")) for line, number in zip(lines, numbers, strict=True)
        ]
        asked = [
            _split(encode, line, f" {number}") for line, number in zip(lines, numbers, strict=True)
        ]
        longest = max(len(question) + len(answer) for question, answer in asked)
        room = length - len(first) - sum(map(len, texts)) - longest
        if room < 0:
            raise ConfigError(
                f"--context-lengths {length}: {needles} needles and the question take "
                f"{length - room} tokens"
            )
        # Of K needles in a haystack the first ones of all haystacks are at the front, and so on.
        depths = [(trial + trials * k) / last if last else 0.5 for k in range(needles)]
        straw = hay(draw, room + longest)
        parts: list[Sequence[int] | np.ndarray] = [first]
        before = 0
        for depth, needle in zip(depths, texts, strict=True):
            place = round(depth * room)
            parts += [straw[before:place], needle]
            before = place
        parts.append(straw[before:room])
        text = _joined(parts)
        prompts = []
        for depth, (question, answer) in zip(depths, asked, strict=True):
            rest = straw[room : room + longest - len(question) - len(answer)]
            whole = _joined([text, rest, question, answer])
            prompts.append(Prompt(torch.from_numpy(whole), len(answer), depth))
        made.append(Haystack(prompts, len(text)))
    return made


def filler(encode: Encode) -> Hay:
    """A haystack of FILLER, repeated."""
    ids = np.asarray(encode(FILLER), dtype=np.int64)
    return lambda draw, count: np.resize(ids, count)


class Passkeys:
    """A model's answers, haystack by haystack.

    Args:
        decode: token ids to text.
        record: what is done already, and where parts go.
    """

    def __init__(self, reader: Reader, decode: Callable[[Sequence[int]], str], record: Record):
        self.reader, self.decode, self.record = reader, decode, record

    def answers(self, asked: Sequence[Haystack], length: int) -> list[Answer]:
        """To all questions of some haystacks of C = `length` tokens, in their order."""
        parts = [{"context_length": length, "haystack": i} for i in range(len(asked))]
        rows = max(self.reader.batch_tokens // length, 1)
        found = self.record.complete(parts, lambda some: self._read([asked[i] for i in some]), rows)
        return [Answer(*answer) for answers in found for answer in answers]

    def _read(self, some: Sequence[Haystack]) -> list[list[Answer]]:
        """For each haystack, side by side, the answers to its questions."""
        first = [haystack.prompts[0].tokens for haystack in some]
        multiple = self.reader.multiple
        same = min(haystack.shared for haystack in some) // multiple * multiple
        self.reader.begin(len(some), len(first[0]) - 1)
        if same:
            self.reader.read(torch.stack([tokens[:same] for tokens in first]))
        answers: list[list[Answer]] = [[] for _ in some]
        for prompts in zip(*(haystack.prompts for haystack in some), strict=True):
            rows = torch.stack([prompt.tokens[same:] for prompt in prompts])
            labels = torch.full_like(rows[:, 1:], UNASKED)
            for row, label, prompt in zip(rows, labels, prompts, strict=True):
                label[-prompt.answer :] = row[-prompt.answer :]
            scores = self.reader.read(rows[:, :-1], labels, keep=False)
            for mine, prompt, loss, best in zip(
                answers, prompts, scores.loss, scores.best.tolist(), strict=True
            ):
                right = prompt.tokens[-prompt.answer :].tolist()
                found = best[-prompt.answer :]
                mean = loss[-prompt.answer :].mean().item()
                digits = _digits(self.decode, found, right)
                mine.append(Answer(prompt.depth, found == right, mean, digits))
        return answers


def summary(answers: Sequence[Answer], needles: int) -> dict:
    """What a results file says of a context length; `needles` answers are from one haystack."""
    by_haystack = [[answer.found for answer in some] for some in batches(answers, needles)]
    low, high = interval(by_haystack)
    n = len(answers)
    return {
        "passkey": sum(answer.found for answer in answers) / n,
        "low": low,
        "high": high,
        "digits": sum(answer.right for answer in answers) / n,
        "loss": sum(answer.loss for answer in answers) / n,
        "answers": [[a.depth, a.found, round(a.loss, 4)] for a in answers],
    }


def effective_length(found: Mapping[int, float], threshold: float) -> int:
    """The longest context length up to which all have found at least the threshold; 0: none has."""
    effective = 0
    for length in sorted(found):
        if found[length] < threshold:
            break
        effective = length
    return effective


def interval(answers: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """95 % confidence interval for the share of answers that were found.

    Wilson's; where haystacks gave several answers each, which are alike, for so many independent
    answers as have the same spread between haystacks (Kish's design effect).

    Args:
        answers: by haystack, as many of each.
    """
    n = float(sum(map(len, answers)))
    found = sum(map(sum, answers))
    share, each = found / n, len(answers[0])
    if each > 1 and len(answers) > 1 and 0 < share < 1:
        means = [sum(some) / each for some in answers]
        between = sum((mean - share) ** 2 for mean in means) / (len(means) - 1)
        n /= max(between * each / (share * (1 - share)), 1.0)
    return wilson(share, n)


def wilson(share: float, trials: float) -> tuple[float, float]:
    """Wilson's 95 % confidence interval for a share of independent trials."""
    z = 1.959963984540054
    spread = z * z / trials
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


def _joined(parts: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def _digits(decode, found: Sequence[int], right: Sequence[int]) -> float:
    """Share of the characters of the right tokens that stand in the same places of the others."""
    same = total = 0
    for one, other in zip(found, right, strict=True):
        wanted, got = decode([other]).strip(), decode([one]).strip()
        total += len(wanted)
        same += sum(a == b for a, b in zip(wanted, got, strict=False))
    return same / total if total else float(found == right)
