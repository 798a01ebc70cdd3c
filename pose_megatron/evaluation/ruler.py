"""RULER's tasks: texts for them, exact to the token, and the score of what a model writes.

The score of an answer is the share of the wanted strings that stand in what greedy decoding gives.
Room for it are the tokens of a right answer, half as many again, and 8.
"""

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from pose_megatron.errors import ConfigError, flag_name
from pose_megatron.evaluation.decoding import greedy
from pose_megatron.evaluation.haystack import Draft, Encode, Hay, Haystack, Question, question
from pose_megatron.evaluation.replicas import batches
from pose_megatron.evaluation.retrieval import Retrieval
from pose_megatron.evaluation.shares import interval
from pose_megatron.evaluation.tasks import TASKS, Settings
from pose_megatron.positions.draws import RULER, Draw

_TRIES, _CLOSE = 8, 3  # to find how many entries of a list fit, which may be so many too few


class Answer(NamedTuple):
    """What the model made of a question.

    Attributes:
        depth: where the needle is, as in Question.
        found: whether each wanted string stands in the answer.
        written: the answer.
    """

    depth: float | None
    found: list[bool]
    written: str


def haystacks(
    task: str,
    encode: Encode,
    hay: Hay,
    length: int,
    trials: Iterable[int],
    settings: Settings = Settings(),
    seed: int = 0,
    first: Sequence[int] = (),
) -> list[Haystack]:
    """Texts of a task for one context length, the same for every model with this tokenizer.

    Args:
        task: one of TASKS.
        length: C.
        trials: numbers of the texts; each depends on its own, not on how many there are.
        first: ids that every prompt begins with.

    Raises:
        ConfigError: the task does not fit into C tokens.
    """
    return [_haystack(task, encode, hay, length, i, settings, seed, first) for i in trials]


def _haystack(task, encode, hay, length, trial, settings, seed, first) -> Haystack:
    def draft(entries: int) -> tuple[Draft, Draw]:
        draw = Draw(seed, zlib.crc32(task.encode()) << 32 | length, trial, RULER)
        content = TASKS[task].write(draw, replace(settings, entries=entries))
        needles = [(depth, encode(text)) for depth, text in content.needles]
        questions = [
            question(encode, query.text, query.answer, query.wanted, query.depth, _room)
            for query in content.queries
        ]
        return Draft(first, needles, questions), draw

    least = TASKS[task].least
    fitting, draw = draft(least)
    if fitting.takes > length:
        sizes = "".join(f" with {flag_name(n)} {getattr(settings, n)}" for n in TASKS[task].sizes)
        raise ConfigError(
            f"--context-lengths {length}: {task}{sizes} takes {fitting.takes} tokens; leave it out "
            "of --tasks, or ask for longer texts"
        )
    # Lists grow as long as they fit: by what is left over, at the tokens that an entry takes.
    tried, most, takes = least, least, fitting.takes
    for _ in range(_TRIES if least else 0):
        step = (length - takes) * tried // takes
        if 0 <= step < _CLOSE:
            break
        tried = max(tried + step, least)
        longer, drawn = draft(tried)
        takes = longer.takes
        if takes <= length and tried > most:
            most, fitting, draw = tried, longer, drawn
    return fitting.filled(length, hay, draw)


def _room(tokens: int) -> int:
    return tokens + tokens // 2 + 8


def found_in(wanted: str, written: str) -> bool:
    """Whether a string stands there whole: no letter, digit or underscore right before or behind
    it; capital letters are as small ones."""
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", written, re.IGNORECASE) is not None


class Ruler(Retrieval[Answer]):
    """Answers that the model writes, with the room that they have."""

    kind = Answer

    def _ask(self, rows: Sequence[Tensor], questions: Sequence[Question]) -> list[Answer]:
        answers = []
        tokens = len(rows[0]) + questions[0].room
        for ids, asked in zip(greedy(self.reader, rows, tokens), questions, strict=True):
            written = self.decode(ids.tolist())
            found = [found_in(wanted, written) for wanted in asked.wanted]
            answers.append(Answer(asked.depth, found, written))
        return answers


def summary(answers: Sequence[Answer], haystacks: int) -> dict:
    """What a results file says of a task at a context length; `haystacks` gave as many answers
    each."""
    by_haystack = [
        [found for answer in some for found in answer.found]
        for some in batches(answers, len(answers) // haystacks)
    ]
    low, high = interval(by_haystack)
    shares = [sum(answer.found) / len(answer.found) for answer in answers]
    return {
        "ruler": sum(shares) / len(shares),
        "low": low,
        "high": high,
        "answers": [[a.depth, round(share, 4)] for a, share in zip(answers, shares, strict=True)],
    }
