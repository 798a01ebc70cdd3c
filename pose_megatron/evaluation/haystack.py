"""A text with needles in it and questions behind it, exact to the token.

    haystack    filler or other text, cut to the token
    needles     lines, each at its place of the haystack
    question    a line to be continued; the tokens behind it are room for the answer

A haystack is read once, and asked all of its questions: their prompts are the same tokens up to the
rest of the text that makes a short question as long as a long one. Text, question and room have
exactly C tokens, at positions 0 to C - 1. Everything is text to be continued, so that base models
can do it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pose_megatron.errors import ConfigError
from pose_megatron.positions.draws import Draw

Encode = Callable[[str], Sequence[int]]  # text to token ids, none added at either end
Hay = Callable[[Draw, int], np.ndarray]  # `count` ids, which may depend on the draw

FILLER = (
    "The mill stands where the two streams meet. In the morning a cart brings grain, and in the "
    "evening it takes the flour to town. When it rains the road is slow and nobody minds. "
)


@dataclass(frozen=True)
class Question:
    """
    Attributes:
        tokens: int64 [n], behind the haystack's.
        answer: int64 [m], the right continuation, or one that is.
        room: how many tokens are left for an answer; m or more.
        wanted: what an answer has to hold.
        depth: where its needle is: 0 at the front of the haystack, 1 right before the question;
            None: it has several.
    """

    tokens: Tensor
    answer: Tensor
    room: int
    wanted: tuple[str, ...]
    depth: float | None


@dataclass(frozen=True)
class Haystack:
    """A text with its questions.

    Attributes:
        tokens: int64 [n], which all prompts begin with.
    """

    tokens: Tensor
    questions: list[Question]

    @property
    def cost(self) -> int:
        """How many tokens go through a model, where `tokens` are read once; the last of an answer
        does not."""
        return len(self.tokens) + sum(len(q.tokens) + q.room - 1 for q in self.questions)


@dataclass(frozen=True)
class Draft:
    """What a haystack will hold beside its hay.

    Attributes:
        first: ids that it begins with.
        needles: (depth, ids), in their order.
        questions: as they are without the rest of the text.
    """

    first: Sequence[int]
    needles: Sequence[tuple[float, Sequence[int]]]
    questions: Sequence[Question]

    @property
    def takes(self) -> int:
        """Tokens without any hay."""
        needles = sum(len(ids) for _, ids in self.needles)
        return len(self.first) + needles + self._longest

    @property
    def _longest(self) -> int:
        return max(len(q.tokens) + q.room for q in self.questions)

    def filled(self, length: int, hay: Hay, draw: Draw) -> Haystack:
        """The haystack whose prompts have `length` tokens, which is what it takes or more."""
        room, longest = length - self.takes, self._longest
        straw = hay(draw, room + longest)
        parts: list[Sequence[int] | np.ndarray] = [self.first]
        before = 0
        for depth, needle in self.needles:
            place = round(depth * room)
            parts += [straw[before:place], needle]
            before = place
        parts.append(straw[before:room])
        questions = []
        for q in self.questions:
            rest = straw[room : room + longest - len(q.tokens) - q.room]
            whole = torch.cat([_joined([rest]), q.tokens])
            questions.append(Question(whole, q.answer, q.room, q.wanted, q.depth))
        return Haystack(_joined(parts), questions)


def question(
    encode: Encode,
    text: str,
    answer: str,
    wanted: tuple[str, ...],
    depth: float | None = None,
    room: Callable[[int], int] = lambda tokens: tokens,
) -> Question:
    """A question that `answer` continues; cut from it where its ids first differ from those of the
    question alone.

    Args:
        room: for an answer, by the number of tokens of this one.
    """
    whole, alone = list(encode(text + answer)), list(encode(text))
    same = 0
    while same < min(len(whole), len(alone)) and whole[same] == alone[same]:
        same += 1
    tokens = torch.tensor(whole, dtype=torch.int64)
    return Question(tokens[:same], tokens[same:], room(len(whole) - same), wanted, depth)


def depths(trial: int, trials: int, needles: int) -> list[float]:
    """Those of a haystack's needles, ascending. Over all haystacks they are evenly spaced from 0 to
    1: the first needles of all are at the front, and so on."""
    last = trials * needles - 1
    return [(trial + trials * k) / last if last else 0.5 for k in range(needles)]


def filler(encode: Encode) -> Hay:
    """A haystack of FILLER, repeated."""
    ids = np.asarray(encode(FILLER), dtype=np.int64)
    return lambda draw, count: np.resize(ids, count)


def check_vocabulary(haystacks: Sequence[Haystack], vocab_size: int) -> None:
    """
    Raises:
        ConfigError: one holds another model's token ids.
    """
    for haystack in haystacks:
        parts = [
            haystack.tokens,
            *(part for q in haystack.questions for part in (q.tokens, q.answer)),
        ]
        largest = max(int(part.max()) for part in parts if len(part))
        if largest >= vocab_size:
            raise ConfigError(
                f"token id {largest} is outside the checkpoint's vocabulary of {vocab_size}: "
                "--tokenizer-model or --data-path is of another model"
            )


def _joined(parts: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]))
