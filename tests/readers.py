"""A Reader whose logits a test makes up, and one of transformers that keeps nothing."""

import torch

from pose_megatron.evaluation.reading import Reader, first_asked, score


class LogitsReader(Reader):
    """Reads by `logits(tokens [b, s], last) -> [b, last, vocabulary]`, each chunk from the start.

    Attributes:
        seen: all tokens that went through, chunk by chunk.
    """

    def __init__(self, logits, vocab_size=256, batch_tokens=4096):
        super().__init__(vocab_size, batch_tokens)
        self.logits, self.seen = logits, []

    def _begin(self, rows, tokens):
        self._text = torch.zeros(rows, 0, dtype=torch.int64)
        self._most = tokens

    def _read(self, chunks, start):
        text, scores = self._text[:, :start], []
        for tokens, labels in chunks:
            self.seen.append(tokens.clone())
            text = torch.cat([text, tokens], 1)
            assert text.size(1) <= self._most
            n, first = labels.size(1), first_asked(labels)
            logits = torch.zeros(len(tokens), n, self.vocab_size)
            if first < n:
                logits[:, first:] = self.logits(text, n - first)
            scores.append(score(logits.clone(), labels))
            self.progress(tokens.numel())
        self._text = text
        return scores
