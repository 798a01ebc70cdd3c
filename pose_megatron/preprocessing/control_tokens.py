"""Control tokens, such as <|im_end|>, that are written in texts: found, counted, refused."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby, takewhile

import numpy as np

from pose_megatron.preprocessing.tokenizer import Tokenizer


class ControlTokens:
    """Finds control tokens by their text.

    Args:
        ids: by the text of each token; None where the tokenizer takes it for ordinary text.
        refused: whether a text may hold none.
    """

    def __init__(self, ids: dict[str, int | None], refused: bool = False):
        self.ids, self.refused = ids, refused
        # Without a group around it all, Python's re looks for the first characters quickly.
        self._pattern = re.compile("|".join(_by_first_character(ids)) or "(?!)")

    @classmethod
    def of(cls, tokenizer: Tokenizer, refused: bool) -> "ControlTokens":
        ids = tokenizer.control_tokens
        alone = tokenizer.tokenize_batch(list(ids))
        found = zip(ids.items(), alone, strict=True)
        return cls({text: i if i in there else None for (text, i), there in found}, refused)

    def written(self, text: str) -> list[str]:
        """The tokens whose text is in this one, in order; of two that begin alike the longer."""
        return self._pattern.findall(text)

    def count(
        self, texts: Sequence[str], documents: Sequence[Sequence[int] | np.ndarray]
    ) -> tuple[Counter, Counter]:
        """How often each token is written in the texts: where it became the token, and where it
        became ordinary text.

        Args:
            documents: the ids of each text.
        """
        kept: Counter[str] = Counter()
        split: Counter[str] = Counter()
        for text, ids in zip(texts, documents, strict=True):
            for token, written in Counter(self.written(text)).items():
                tokens = 0
                if (token_id := self.ids[token]) is not None:
                    # <unk> may come more often: for unknown characters.
                    tokens = min(written, int(np.count_nonzero(np.asarray(ids) == token_id)))
                kept[token] += tokens
                split[token] += written - tokens
        return +kept, +split  # without zeros


def _by_first_character(words: Iterable[str]) -> list[str]:
    """Regular expressions that match the longest of the words, one for each first character."""
    by_first = groupby(sorted(filter(None, words)), key=lambda word: word[0])
    return [_tree(list(group)) for _, group in by_first]


def _tree(words: list[str]) -> str:
    """What sorted words begin with, then their ends by first character: thousands cost as few."""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(words[0], words[-1], strict=False))
    head = "".join(character for character, _ in alike)
    ends = [word[len(head) :] for word in words]
    branches = _by_first_character(ends)
    rest = f"(?:{'|'.join(branches)})" + "?" * ("" in ends) if branches else ""
    return re.escape(head) + rest
