"""Passkey retrieval: whether a model finds a number that stands anywhere in its window.

K needles each give a name its number, at K places of a haystack, and its questions are these lines
again, up to the number. The room for an answer is the number's: prompt and answer have exactly C
tokens. Over all prompts of a length, the needle in question moves evenly from the front to the
back; the others, with other names, distract. This is the task of Mohtashami and Jaggi (2023), and
with K > 1 the multi-key needles of RULER (Hsieh et al., 2024), in our own words.

Perplexity hardly shows whether far tokens are read; this does.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pose_megatron.errors import ConfigError
from pose_megatron.evaluation.haystack import (
    Draft,
    Encode,
    Hay,
    Haystack,
    Question,
    depths,
    question,
)
from pose_megatron.evaluation.reading import UNASKED
from pose_megatron.evaluation.replicas import batches
from pose_megatron.evaluation.retrieval import Retrieval
from pose_megatron.evaluation.shares import interval
from pose_megatron.positions.draws import PASSKEYS, Draw

NAMES = tuple(
    "heron otter badger falcon salmon beetle marten plover walnut poplar willow cherry juniper "
    "clover barley thistle copper silver marble amber velvet linen paper candle anchor ladder "
    "bridge harbour meadow valley island glacier".split()
)
_DIGITS = 5


class Answer(NamedTuple):
    """What the model made of a prompt.

    Attributes:
        depth: where the needle is, as in Question.
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
    made = []
    for trial in range(trials):
        draw = Draw(seed, length, trial, PASSKEYS)
        names = draw.different(len(NAMES), needles)
        span = 10**_DIGITS - 10 ** (_DIGITS - 1)
        numbers = [str(10 ** (_DIGITS - 1) + n) for n in draw.different(span, needles)]
        texts, questions = [], []
        places = depths(trial, trials, needles)
        for name, number, depth in zip(names, numbers, places, strict=True):
            line = f"\nThe pass key of {NAMES[name]} is"
            texts.append((depth, encode(f"{line} {number}\n")))
            questions.append(question(encode, line, f" {number}", (number,), depth))
        draft = Draft(first, texts, questions)
        if draft.takes > length:
            raise ConfigError(
                f"--context-lengths {length}: {needles} needles and the question take "
                f"{draft.takes} tokens"
            )
        made.append(draft.filled(length, hay, draw))
    return made


class Passkeys(Retrieval[Answer]):
    """Answers that are foreseen token by token, each behind the right ones."""

    kind = Answer

    def _ask(self, rows: Sequence[Tensor], questions: Sequence[Question]) -> list[Answer]:
        whole = torch.stack(
            [torch.cat([row, q.answer]) for row, q in zip(rows, questions, strict=True)]
        )
        labels = torch.full_like(whole[:, 1:], UNASKED)
        for label, q in zip(labels, questions, strict=True):
            label[-len(q.answer) :] = q.answer
        scores = self.reader.read(whole[:, :-1], labels, keep=False)
        answers = []
        for q, loss, best in zip(questions, scores.loss, scores.best.tolist(), strict=True):
            assert q.depth is not None
            right, found = q.answer.tolist(), best[-len(q.answer) :]
            mean = loss[-len(q.answer) :].mean().item()
            digits = _digits(self.decode, found, right)
            answers.append(Answer(q.depth, found == right, mean, digits))
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


def _digits(decode, found: Sequence[int], right: Sequence[int]) -> float:
    """Share of the characters of the right tokens that stand in the same places of the others."""
    same = total = 0
    for one, other in zip(found, right, strict=True):
        wanted, got = decode([other]).strip(), decode([one]).strip()
        total += len(wanted)
        same += sum(a == b for a, b in zip(wanted, got, strict=False))
    return same / total if total else float(found == right)
