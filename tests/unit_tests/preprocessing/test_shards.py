"""shards.py: merge reads nothing that it writes, and joins only what one tokenizer wrote."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import tokenizers
from megatron.core.datasets.indexed_dataset import IndexedDataset

from pose_megatron.errors import ConfigError
from pose_megatron.preprocessing.preprocess import PreprocessingJob, preprocess
from pose_megatron.preprocessing.shards import merge


def write_tokenizer(folder: Path, letters: str) -> str:
    folder.mkdir()
    vocab = {letter: i for i, letter in enumerate(["?", "<eos>", *letters])}
    model = tokenizers.models.WordLevel(vocab, unk_token="?")
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return str(folder)


@pytest.fixture
def made(tmp_path):
    """made(name, letters, **options) -> the prefix of a shard of two documents."""
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')

    def make(name: str, letters: str = "xy", **options) -> str:
        folder = write_tokenizer(tmp_path / f"tokenizer of {name}", letters)
        job = PreprocessingJob(
            [str(tmp_path / "c.jsonl")],
            str(tmp_path / name),
            "HuggingFaceTokenizer",
            folder,
            tokenizer_library="own",
            **options,
        )
        preprocess(job)
        return f"{tmp_path / name}_text_document"

    return make


def whole(prefix: str) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


@pytest.mark.parametrize("spelled", ["plain", "dots", "symlink", "hard link", "through a folder"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_what_it_reads_is_never_what_it_writes(made, tmp_path, monkeypatch, spelled, overwrite):
    a, b = made("a"), made("b")
    kept = whole(a)
    monkeypatch.chdir(tmp_path)
    output = {
        "plain": a,
        "dots": "./b/.././a_text_document",
        "symlink": str(tmp_path / "s"),
        "hard link": str(tmp_path / "h"),
        "through a folder": str(tmp_path / "folder" / "a_text_document"),
    }[spelled]
    (tmp_path / "b").mkdir()
    (tmp_path / "folder").symlink_to(tmp_path)
    for suffix in (".bin", ".idx"):
        os.symlink(f"{a}{suffix}", f"s{suffix}")
        os.link(f"{a}{suffix}", f"h{suffix}")
    with pytest.raises(ConfigError, match="--output-prefix .* is one of the shards.* choose anoth"):
        merge([b, a], output, overwrite)
    assert whole(a) == kept


def test_the_summary_of_a_shard_is_not_replaced(made, tmp_path):
    a, b = made("a"), made("b")
    with pytest.raises(ConfigError, match="would replace a file of one: .*a_summary.json is"):
        merge([a, b], str(tmp_path / "a"), overwrite=True)


@pytest.mark.parametrize(
    "other, message",
    [
        ({"append_eod": True}, "b_summary.json: --append-eod True, in .*_summary.json False; onl"),
        ({"letters": "yx"}, r"the tokenizer's files \(SHA-256\) \w{16} \w{16}, in .* \w{16} \w"),
    ],
)
def test_shards_of_two_tokenizers_are_named(made, tmp_path, other, message):
    a, b = made("a"), made("b", **other)
    with pytest.raises(ConfigError, match=message):
        merge([a, b], str(tmp_path / "c"), overwrite=False)
    merge([a, a], str(tmp_path / "twice"), overwrite=False)
    with pytest.raises(ConfigError, match=message):  # what was merged says it, too
        merge([str(tmp_path / "twice"), b], str(tmp_path / "c"), overwrite=False)
    assert not list(tmp_path.glob("c.[bi]*"))
    Path(tmp_path / "b_summary.json").unlink()  # as of Megatron-LM's own
    merge([a, b], str(tmp_path / "c"), overwrite=False)
    ids = {"x": 2, "y": 3} if "append_eod" in other else {"x": 3, "y": 2}
    stock = IndexedDataset(str(tmp_path / "c"))
    assert stock[2].tolist()[0] == ids["x"] and stock[3].tolist()[0] == ids["y"]


def test_the_same_tokenizer_in_another_place_is_the_same(made, tmp_path):
    size = merge([made("a"), made("b")], str(tmp_path / "c"), overwrite=False)
    assert (size.documents, size.tokens) == (4, 4)
    summary = json.loads((tmp_path / "c_summary.json").read_text())
    assert summary["append_eod"] is False and summary["vocab_size"] == 4
    assert dataclasses.asdict(size)["documents"] == len(IndexedDataset(str(tmp_path / "c")))
