"""Asking a model about haystacks: each is read once, then asked all of its questions."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pose_megatron.evaluation.haystack import Haystack, Question
from pose_megatron.evaluation.reading import Reader
from pose_megatron.evaluation.record import Record

Answer = TypeVar("Answer", bound=tuple)


class Retrieval(ABC, Generic[Answer]):
    """A model's answers, haystack by haystack.

    Args:
        decode: token ids to text.
        record: what is done already, and where parts go.
    """

    kind: Callable[..., Answer]

    def __init__(self, reader: Reader, decode: Callable[[Sequence[int]], str], record: Record):
        self.reader, self.decode, self.record = reader, decode, record

    def answers(self, asked: Sequence[Haystack], length: int, **part: Any) -> list[Answer]:
        """To all questions of some haystacks of C = `length` tokens, in their order.

        Args:
            part: what else tells these haystacks from others of the record.
        """
        parts = [{**part, "context_length": length, "haystack": i} for i in range(len(asked))]
        rows = max(self.reader.batch_tokens // length, 1)
        tokens = [haystack.cost for haystack in asked]
        found = self.record.complete(
            parts, tokens, lambda some: self._read([asked[i] for i in some], length), rows
        )
        return [self.kind(*answer) for answers in found for answer in answers]

    def _read(self, some: Sequence[Haystack], length: int) -> list[list[Answer]]:
        """For each haystack, side by side, the answers to its questions."""
        multiple = self.reader.multiple
        same = min(len(haystack.tokens) for haystack in some) // multiple * multiple
        self.reader.begin(len(some), length - 1)
        if same:
            self.reader.read(torch.stack([haystack.tokens[:same] for haystack in some]))
        answers: list[list[Answer]] = [[] for _ in some]
        for questions in zip(*(haystack.questions for haystack in some), strict=True):
            rows = [
                torch.cat([haystack.tokens[same:], question.tokens])
                for haystack, question in zip(some, questions, strict=True)
            ]
            for mine, answer in zip(answers, self._ask(rows, questions), strict=True):
                mine.append(answer)
        return answers

    @abstractmethod
    def _ask(self, rows: Sequence[Tensor], questions: Sequence[Question]) -> list[Answer]:
        """The answers to questions of haystacks side by side.

        Args:
            rows: int64 [n_i], what stands behind what the reader keeps, the question the last; with
                its room for the answer each row has as many tokens. The reader is left as it was.
        """
