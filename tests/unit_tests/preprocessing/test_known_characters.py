"""What is kept of characters: looked at once for each tokenizer, by whatever process."""

import json
import os
import shutil
import zlib

import numpy as np
import pytest

from pose_megatron.preprocessing.fast_tokenizer import FastTokenizer
from pose_megatron.preprocessing.known_characters import CODE_POINTS, PLAIN, UNSEEN, KnownCharacters
from pose_megatron.preprocessing.preprocess import PreprocessingJob, preprocess
from pose_megatron.preprocessing.tokenizer import HuggingFaceTokenizer, build_tokenizer
from tests.byte_level import train

TEXT = "naïve 日本 ½ straße"
BEYOND_ASCII = sorted(set(TEXT) - set(map(chr, range(128))))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pose_megatron" / "characters"


@pytest.fixture
def folder(tmp_path):
    """A byte-level tokenizer."""
    path = tmp_path / "tokenizer"
    path.mkdir()
    train([TEXT * 3], 300).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return path


@pytest.fixture
def compared(monkeypatch):
    """The texts that the tokenizer's own library was given."""
    texts = []
    own = HuggingFaceTokenizer.tokenize_batch
    monkeypatch.setattr(
        HuggingFaceTokenizer, "tokenize_batch", lambda t, new: texts.extend(new) or own(t, new)
    )
    return texts


def run(folder, text=TEXT):
    """Characters that one process compares on its way through a text."""
    tokenizer = build_tokenizer("HuggingFaceTokenizer", folder)
    fast = FastTokenizer(tokenizer)
    ids = fast.tokenize_batch([text])[0].tolist()
    fast.keep_characters()
    assert ids == tokenizer.tokenize(text)


def test_a_character_is_compared_once_for_each_tokenizer(folder, compared):
    run(folder)
    assert all(f"a{c}a {c}{c}" in compared for c in BEYOND_ASCII)
    compared.clear()
    run(folder, TEXT + "é")
    assert sorted(compared) == sorted(["é", "aéa éé", TEXT + "é"])


def test_another_tokenizer_compares_anew(folder, compared):
    run(folder)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "<eos>", "split_special_tokens": True}))
    compared.clear()
    run(folder)
    assert "aïa ïï" in compared


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-5],
        lambda content: content[:40] + bytes([content[40] ^ 4]) + content[41:],
        lambda content: zlib.compress(bytes(CODE_POINTS - 1)),
        lambda content: zlib.compress(bytes(CODE_POINTS * 5)),
        lambda content: zlib.compress(bytes([UNSEEN + 1]) * CODE_POINTS),
    ],
    ids=["empty", "cut", "a bit", "too short", "too long", "no verdicts"],
)
def test_a_damaged_file_is_made_again(folder, cache, compared, damage):
    run(folder)
    [file] = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    compared.clear()
    run(folder)
    assert "aïa ïï" in compared
    assert file.read_bytes() == whole and list(cache.iterdir()) == [file]


def test_runs_at_once_keep_what_either_found():
    one, other = KnownCharacters([b"tokenizer"]), KnownCharacters([b"tokenizer"])
    one.verdicts[ord("é")] = PLAIN
    other.verdicts[ord("日")] = PLAIN
    one.keep()
    other.keep()
    known = KnownCharacters([b"tokenizer"]).verdicts
    assert np.flatnonzero(known == PLAIN).tolist() == [ord("é"), ord("日")]
    assert (KnownCharacters([b"token", b"izer"]).verdicts == UNSEEN).all()


def test_workers_share_what_they_find_and_the_run_keeps_it(folder, cache, tmp_path):
    # far into their texts, where what is compared before the workers start does not reach
    lines = [json.dumps({"text": "a " * 50_000 + chr(c)}) for c in range(0x400, 0x418)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    preprocess(
        PreprocessingJob(
            input=[str(tmp_path / "corpus.jsonl")],
            output_prefix=str(tmp_path / "corpus"),
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(folder),
            workers=2,
        )
    )
    [file] = cache.iterdir()
    known = np.frombuffer(zlib.decompress(file.read_bytes()), np.uint8)
    assert (known[0x400:0x418] == PLAIN).all()


@pytest.mark.parametrize("home", ["file", "relative"])
def test_a_cache_that_cannot_be_written_stops_nothing(folder, cache, monkeypatch, home, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if home == "file":
        (tmp_path / "cache").write_text("not a folder")
    else:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", "cache")  # to be passed over, says the specification
    run(folder)
    made = [path.name for path in tmp_path.rglob("*.zz")]
    assert len(made) == (home == "relative")
    assert not (tmp_path / "cache" / "pose_megatron").exists()


def test_a_disk_that_fills_up_leaves_nothing(folder, cache, monkeypatch):
    def full(source, target):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", full)
    run(folder)
    assert list(cache.iterdir()) == []
    shutil.rmtree(cache)
