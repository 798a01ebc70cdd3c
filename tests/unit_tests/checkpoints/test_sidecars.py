"""Files of a tokenizer and others that go along: broken ones are named before anything is copied."""

import base64
import json

import pytest
from tokenizers import Tokenizer, models

import pose_megatron
from pose_megatron.checkpoints.sidecars import check_sidecars
from pose_megatron.errors import ConfigError
from pose_megatron.preprocessing import tokenizer_training
from tests.unit_tests.checkpoints.test_folders_from_anywhere import make

TIKTOKEN = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))


@pytest.fixture
def files(tmp_path):
    """One of each kind that is right."""
    tokenizer_training.write_folder(
        tokenizer_training.train(["a text of words"] * 9, 274, 1, 1.0), tmp_path
    )
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ 'é' }}", encoding="utf-8")
    (tmp_path / "generation_config.json").write_text("{}")
    return {file.name: file for file in tmp_path.iterdir()}


def test_right_files_pass_and_llama_3s_tokenizer_too(files):
    check_sidecars(files)
    files["tokenizer.model"].write_bytes(TIKTOKEN)
    check_sidecars(files)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a'),
        ("tokenizer.model", b""),
        ("tokenizer.model", b"\0\1\2\3"),
        ("tokenizer.model", TIKTOKEN + b"IQ== \n"),
        ("tokenizer_config.json", b"[]"),
        ("generation_config.json", b'{"a": "\xff"}'),
        ("chat_template.jinja", b"\xff\xfe"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
    ],
)
def test_a_broken_file_is_named(files, name, content):
    files[name].write_bytes(content)
    with pytest.raises(ConfigError, match=str(files[name])):
        check_sidecars(files)


def test_conversion_copies_no_broken_file(tmp_path):
    hf, _ = make(tmp_path / "hf")
    (hf / "tokenizer.json").write_text(json.dumps({"model": None}))
    with pytest.raises(ConfigError, match=r"hf/tokenizer\.json cannot be read .*: replace it, or"):
        pose_megatron.convert(hf, tmp_path / "out", loader="hf", saver="megatron", quiet=True)
    assert not (tmp_path / "out").exists()
