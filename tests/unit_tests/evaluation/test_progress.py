"""Progress of an evaluation that is gone on with: it ends at its end, at this run's own speed."""

import io
import sys

import pytest
import torch

from pose_megatron.evaluation.haystack import filler
from pose_megatron.evaluation.passkey import Passkeys, haystacks
from pose_megatron.evaluation.perplexity import Perplexities
from pose_megatron.evaluation.progress import Progress
from pose_megatron.evaluation.record import Record
from tests.readers import LogitsReader

pytestmark = pytest.mark.usefixtures("world")
DOCUMENTS = [torch.arange(n) % 256 for n in (420, 450, 480)]


def encode(text):
    return list(text.encode())


def by_position(reader, record):
    return list(Perplexities(reader, DOCUMENTS, [200, 400], record).by_position())


def in_windows(reader, record):
    return list(Perplexities(reader, DOCUMENTS, [200, 400], record).in_windows(20))


def passkeys(reader, record):
    for length in (200, 400):
        made = haystacks(encode, filler(encode), length, 3, needles=2)
        Passkeys(reader, lambda ids: bytes(ids).decode("latin1"), record).answers(made, length)


@pytest.mark.parametrize("measure", [by_position, in_windows, passkeys])
def test_what_an_earlier_run_has_read_is_done(tmp_path, monkeypatch, measure):
    seen = []

    def logits(tokens, last):
        seen.append(tokens.numel())
        return torch.zeros(len(tokens), last, 256)

    def start(name):
        record = Record(str(tmp_path / name), {"metric": measure.__name__}, [])
        reader = LogitsReader(logits, 256, 400)
        reader.progress = counted.append
        return reader, record

    counted: list[int] = []
    measure(*start("whole"))
    total = sum(counted)

    parts = (tmp_path / "whole.parts").read_text().splitlines(keepends=True)
    (tmp_path / "again.parts").write_text("".join(parts[: len(parts) // 2 + 1]))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    reader, record = start("again")
    with Progress("model", total) as bar:
        read = []
        reader.progress = lambda tokens: (read.append(tokens), bar.update(tokens))
        record.skipped = bar.skip
        measure(reader, record)
        assert 0 < sum(read) < total and bar.n == total
        ten = {"elapsed": 10, "rate": None, "unit_scale": False}  # the rate is the mean of these
        said = bar.format_meter(**bar.format_dict | ten)
    assert f"{total}/{total}" in said and f"{sum(read) / 10:.2f}token/s" in said
