"""Greedy decoding with any Reader."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pose_megatron.evaluation.reading import UNASKED, Reader


def greedy(reader: Reader, rows: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Goes on with some texts by their most likely tokens, side by side.

    Args:
        reader: it keeps the rows' common beginnings, and is left as it was.
        rows: int64 [n_i] each, what stands behind that; not empty.
        tokens: how many each row has in the end.

    Returns:
        What was written: int64 [tokens - n_i] of each row.
    """
    lengths = torch.tensor([len(row) for row in rows])
    text = torch.zeros(len(rows), tokens, dtype=torch.int64)
    for own, row in zip(text, rows, strict=True):
        own[: len(row)] = row
    start, multiple = reader.kept, reader.multiple
    for n in range(int(lengths.min()), tokens):
        new = text[:, reader.kept - start : n]
        whole = new.size(1) // multiple * multiple
        if whole < new.size(1):  # what does not fill the context ranks is read again
            if whole:
                reader.read(new[:, :whole])
            new = new[:, whole:]
        labels = torch.full_like(new, UNASKED)
        labels[:, -1] = 0  # any token is asked for, to be told the most likely one
        best = reader.read(new, labels, keep=new.size(1) % multiple == 0).best[:, -1].cpu()
        text[:, n] = best.where(lengths <= n, text[:, n])
    reader.rewind(start)
    return [own[len(row) :] for own, row in zip(text, rows, strict=True)]
