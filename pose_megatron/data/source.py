"""A source: the stretch of an indexed corpus that one sample may be cut from."""

from dataclasses import dataclass

import numpy as np

from pose_megatron.data.indexed_corpus import IndexedCorpus
from pose_megatron.positions.laws import SkipPlan


@dataclass(frozen=True)
class Source:
    """Tokens that one sample may be cut from: a piece of one document, or pieces of several, packed
    end to end. The last token is only ever a label.

    Attributes:
        corpus: the indexed corpus that holds the tokens.
        pieces: (document, first token, number of tokens), in order.
    """

    corpus: IndexedCorpus
    pieces: tuple[tuple[int, int, int], ...]

    @property
    def length(self) -> int:
        """Lx: how many of the tokens can be inputs."""
        return sum([n for _, _, n in self.pieces]) - 1

    def read(self, plan: SkipPlan) -> np.ndarray:
        """Inputs and labels, int64 [2, L]; labels are true next tokens, also at a chunk's end."""
        runs = plan.runs()
        rows = np.empty((2, sum([length for _, length in runs])), dtype=np.int64)
        at = 0
        for start, length in runs:
            run = self.tokens(start, length + 1)
            rows[0, at : at + length] = run[:-1]
            rows[1, at : at + length] = run[1:]
            at += length
        return rows

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Tokens start to start + length - 1 of the source, in the corpus's own dtype."""
        parts = []
        for document, first, tokens in self.pieces:
            take = min(length, tokens - start)
            if take > 0:
                parts.append(self.corpus.tokens.get(document, first + start, take))
                length -= take
            start = max(start - tokens, 0)
            if not length:
                break
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
