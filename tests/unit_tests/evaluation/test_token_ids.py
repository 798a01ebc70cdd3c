"""A tokenizer or a corpus of another model with as many tokens."""

import argparse
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models

from pose_megatron.commands.target_flags import introduce, open_tokenizer
from pose_megatron.preprocessing import tokenizer_training
from pose_megatron.preprocessing.preprocess import PreprocessingJob, preprocess


def write_tokenizer(folder: Path, words: str) -> Path:
    folder.mkdir(parents=True)
    vocab = {word: i for i, word in enumerate(["?", "<eos>", *words.split()])}
    Tokenizer(models.WordLevel(vocab, unk_token="?")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return folder


@pytest.fixture
def house(tmp_path):
    """The tokenizer of the model, its copy in a checkpoint, another one, and a corpus of each."""
    own = write_tokenizer(tmp_path / "own", "red green blue")
    shutil.copytree(own, tmp_path / "checkpoint/tokenizer")
    write_tokenizer(tmp_path / "other", "red blue green")
    (tmp_path / "c.jsonl").write_text('{"text": "red"}\n{"text": "blue"}\n')
    for name in ("own", "other"):
        job = [[str(tmp_path / "c.jsonl")], str(tmp_path / f"{name}-c"), "HuggingFaceTokenizer"]
        preprocess(PreprocessingJob(*job, str(tmp_path / name), tokenizer_library="own"))
    return tmp_path


def said(capsys, house, carried="checkpoint/tokenizer", data=None, tokenizer=None) -> str:
    """What the evaluators say before they begin."""
    capsys.readouterr()
    flags = argparse.Namespace(
        load="checkpoint",
        data_path=data and str(house / f"{data}_text_document"),
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=tokenizer and str(house / tokenizer),
    )
    target = SimpleNamespace(name="model", lengths=[], tokenizer=house / carried, bf16=False)
    target.model = SimpleNamespace(rope_scaling="none")
    introduce(flags, target)
    if tokenizer or target.tokenizer.is_dir():
        open_tokenizer(flags, target)
    precision, rope, *lines = capsys.readouterr().out.splitlines()
    assert precision.startswith("model: in float32 on ")
    assert rope == "model: rope scaling none" and len(lines) < 2
    return "".join(lines)


def test_another_tokenizer_of_the_same_size_is_named(capsys, house):
    assert said(capsys, house, tokenizer="own") == ""
    assert said(capsys, house, tokenizer="other") == (
        f"warning: --tokenizer-model {house / 'other'} is another tokenizer than "
        f"{house / 'checkpoint/tokenizer'}, the checkpoint's: 2 of 5 ids are other tokens; leave "
        "the flag out to use the checkpoint's"
    )
    assert said(capsys, house, carried="none", tokenizer="other") == ""


def test_the_same_tokenizer_in_another_form_is_not_another_one(capsys, tmp_path):
    """SentencePiece's model, and the tokenizer.json that gives the same ids."""
    for folder in ("one", "both"):
        (tmp_path / folder).mkdir()
    trained = tokenizer_training.train(["one fish two fish", "red fish blue fish"] * 9, 290, 1, 1.0)
    tokenizer_training.write_folder(trained, tmp_path / "both")
    shutil.move(tmp_path / "both/tokenizer.model", tmp_path / "one/tokenizer.model")
    assert said(capsys, tmp_path, carried="one/", tokenizer="both") == ""


@pytest.mark.parametrize("carried, tokenizer", [("checkpoint/tokenizer", None), ("none", "own")])
def test_a_corpus_of_another_tokenizer_is_named(capsys, house, carried, tokenizer):
    assert said(capsys, house, carried, data="own-c", tokenizer=tokenizer) == ""
    model = house / (tokenizer or carried)
    assert said(capsys, house, carried, data="other-c", tokenizer=tokenizer) == (
        f"warning: --data-path {house / 'other-c_text_document'} was made with another tokenizer "
        f"than {model}, the model's: with {house / 'other/tokenizer.json'}, as "
        "other-c_summary.json says; preprocess the text again with --tokenizer-model "
        f"{model}, or delete the summary if you know better"
    )


@pytest.mark.parametrize("known", [None, 7, "not JSON"])
def test_what_a_summary_does_not_say_is_not_compared(capsys, house, known):
    summary = house / "other-c_summary.json"
    content = json.loads(summary.read_text()) | {"tokenizer_sha256": known}
    summary.write_text(json.dumps(content) if known != "not JSON" else known)
    assert said(capsys, house, data="other-c") == ""
    summary.unlink()
    assert said(capsys, house, data="other-c") == ""
