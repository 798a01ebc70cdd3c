"""How often a run reads each corpus: what is said, against samples counted one by one."""

import logging
import re
from collections import Counter

import pytest

from pose_megatron.config.flags import DataFlags
from pose_megatron.data.dataset import build_datasets
from pose_megatron.positions.sampler import PoseSampler

LINE = re.compile(
    r"(\S+), (\w+): ([\d,]+) documents, ([\d,]+) samples an epoch, ([\d,]+) samples of "
    r"(.*?), ([\d.,e-]+) epochs(?:; packed end to end)?(; WARNING)?"
)


@pytest.fixture
def corpora(make_corpus):
    """400 documents of 17 tokens, and 3 of 33: two and four windows of 8 each."""
    return [
        make_corpus([[first + i for i in range(n)]] * documents, name)
        for name, first, documents, n in (("a", 0, 400, 17), ("b", 1000, 3, 33))
    ]


def build(caplog, samples, valid=0, **data):
    with caplog.at_level(logging.INFO):
        data = build_datasets(
            DataFlags(seq_length=8, **data), PoseSampler(8, 64), 10**6, samples, valid
        )
    said = [record for record in caplog.records if record.name == "pose_megatron.data.dataset"]
    return data, [LINE.match(record.getMessage()).groups() for record in said], said


@pytest.mark.parametrize("weights", [("0.5", "0.5"), ("9", "1"), None])
@pytest.mark.parametrize("cache", [False, True])
def test_each_corpus_of_a_blend_has_its_epochs(world, corpora, caplog, tmp_path, weights, cache):
    words = (
        corpora if weights is None else [w for p in zip(weights, corpora, strict=True) for w in p]
    )
    more = {"data_cache_path": str(tmp_path)} if cache else {}
    data, lines, said = build(caplog, 800, data_path=words, split="1,0,0", **more)
    drawn = Counter(int(data.train[i]["tokens"][0]) // 1000 for i in range(800))
    assert sum(drawn.values()) == 800
    for k, (prefix, per_epoch, documents) in enumerate(
        zip(corpora, (800, 12), ("400", "3"), strict=True)
    ):
        epochs = drawn[k] / per_epoch
        line = (prefix, "train", documents, str(per_epoch), str(drawn[k]), "this run")
        assert lines[k] == (*line, f"{epochs:.1f}", "; WARNING" if epochs > 4 else None)
        assert said[k].levelno == (logging.WARNING if epochs > 4 else logging.INFO)
    if weights == ("0.5", "0.5"):
        assert drawn[1] == 400 and lines[1][-2:] == ("33.3", "; WARNING")


def test_one_corpus_and_its_validation(world, corpora, caplog):
    _, lines, _ = build(caplog, 2400, 80, data_path=[corpora[0]], split="90,10,0")
    assert lines == [
        (corpora[0], "train", "360", "720", "2,400", "this run", "3.3", None),
        (corpora[0], "valid", "40", "80", "80", "validation", "1.0", None),
    ]


def test_a_packed_corpus_and_a_small_part_of_one(world, corpora, caplog):
    data = {"data_path": [corpora[0]], "split": "1,0,0", "data_mode": "packed"}
    _, (line,), _ = build(caplog, 2, **data)
    assert line[3:] == ("849", "2", "this run", "0.002", None)  # (400 * 17 - 1) // 8 windows


def test_other_ranks_say_nothing(world, corpora, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert build(caplog, 800, data_path=corpora, split="1,0,0")[1] == []
