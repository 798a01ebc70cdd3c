"""Preprocessing that is killed anywhere ends with the same bytes; what it refuses, and says."""

import dataclasses
import gzip
import json
import os
import signal
import sys
import sysconfig
import zlib
from pathlib import Path

import pytest
import sentencepiece

from pose_megatron.preprocessing import fast_tokenizer, indexed_writer, readers, resume
from pose_megatron.preprocessing import preprocess as preprocess_module
from pose_megatron.preprocessing.encoding import Encoder
from pose_megatron.preprocessing.preprocess import PreprocessingJob, preprocess
from pose_megatron.preprocessing.tokenizer import build_tokenizer
from pose_megatron.runtime.ownership import owned

STDLIB = Path(sysconfig.get_path("stdlib"))
TEXTS = [
    (STDLIB / f"{name}.py").read_text("utf-8")[:9000]
    for name in ("argparse", "ast", "bisect", "heapq", "inspect", "shlex", "stat", "typing")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("spm") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        max_sentence_length=1 << 20,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    return f"{prefix}.model"


@pytest.fixture
def job(tmp_path, model, monkeypatch):
    """Several parts of each of two files, saved after each part."""
    monkeypatch.setattr(readers, "PART_BYTES", 6000)
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0.0)
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    rows = [
        {"text": text, "title": f"{i} </s>"} for i, text in enumerate([*TEXTS[:4], "", *TEXTS[4:]])
    ]
    for path in paths:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PreprocessingJob(
        list(map(str, paths)),
        str(tmp_path / "out" / "c"),
        "SentencePieceTokenizer",
        model,
        json_keys=("text", "title"),
        append_eod=True,
    )


def outputs(job):
    folder = Path(job.output_prefix).parent
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}


def counts(summary):
    return {name: value for name, value in summary.items() if name != "seconds"}


POINTS = [  # the call at whose beginning or end the run is killed
    (resume.IndexedWriter, "append", 5, "end"),  # between the two keys of a part
    (resume.IndexedWriter, "append", 14, "begin"),
    (resume.UnfinishedRun, "add", 1, "end"),
    (resume.UnfinishedRun, "add", 11, "end"),
    (resume, "write_atomically", 2, "begin"),
    (resume.IndexedWriter, "finish", 1, "end"),
    (resume.IndexedWriter, "finish", 2, "end"),
    (preprocess_module, "publish", 1, "begin"),
    (preprocess_module, "publish", 1, "end"),
    (preprocess_module, "publish", 2, "end"),
    (preprocess_module, "write_atomically", 1, "end"),
]


@pytest.mark.parametrize(
    "owner, name, call, where",
    POINTS,
    ids=lambda x: getattr(x, "__name__", str(x)).rpartition(".")[2],
)
def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(
    job, tmp_path, owner, name, call, where
):
    expected = counts(preprocess(job))
    whole = outputs(job)
    again = dataclasses.replace(job, output_prefix=str(tmp_path / "killed" / "c"))
    if not (child := os.fork()):
        real, calls = getattr(owner, name), []

        def last(*arguments):
            calls.append(1)
            if where == "end":
                result = real(*arguments)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result if where == "end" else real(*arguments)

        setattr(owner, name, last)
        sys.stderr = open(os.devnull, "w")
        preprocess(again)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    summary = counts(preprocess(again))
    assert outputs(again) == whole
    assert not Path(f"{again.output_prefix}.partial").exists()
    folder = Path(again.output_prefix).parent
    assert len(summary["crc32"]) == 4
    for name, crc in summary["crc32"].items():
        assert crc == f"{zlib.crc32((folder / name).read_bytes()):08x}"
    for key, output in summary["outputs"].items():
        assert output.pop("prefix") != expected["outputs"][key].pop("prefix")
    assert summary == expected


@pytest.fixture
def half(job):
    """A job whose second file stopped it, and half of which is done."""
    path = Path(job.input[1])
    whole = path.read_text()
    path.write_text(whole + "{oops\n")
    with pytest.raises(ValueError, match=r"b\.jsonl:10: not JSON"):
        preprocess(job)
    assert [path.name for path in Path(job.output_prefix).parent.iterdir()] == ["c.partial"]
    return job, whole


def test_on_error_skip_goes_on_after_the_line_that_stopped_it(half, capsys):
    job, _ = half
    with pytest.raises(ValueError, match=r"b\.jsonl:10: not JSON"):
        preprocess(job)
    summary = preprocess(dataclasses.replace(job, on_error="skip", workers=2))
    assert "going on after" in capsys.readouterr().err
    assert summary["skipped"] == {"not JSON": 1} and summary["lines"] == 19
    assert summary["first_skipped"][0].startswith(f"{job.input[1]}:10: not JSON")


def test_lines_are_counted_by_file_whatever_its_kind(job, tmp_path):
    good = (json.dumps({"text": TEXTS[0], "title": "x"}) + "\n").encode() * 2
    names = ("a.jsonl.gz", "b.jsonl", "c.jsonl", "d.jsonl.gz")
    for name in names:
        content = good + (b"{bad\n" + good if name[0] in "bd" else b"")
        (tmp_path / name).write_bytes(gzip.compress(content) if name[-1] == "z" else content)
    files = [str(tmp_path / name) for name in names]
    summary = preprocess(dataclasses.replace(job, input=files, on_error="skip"))
    assert [line.split(": ")[0] for line in summary["first_skipped"]] == [
        f"{tmp_path}/b.jsonl:3",
        f"{tmp_path}/d.jsonl.gz:3",
    ]
    with pytest.raises(ValueError, match=r"d\.jsonl\.gz:3: not JSON"):
        preprocess(dataclasses.replace(job, input=[files[0], files[3]], overwrite=True))


@pytest.mark.parametrize(
    "change, flag",
    [
        ({"append_eod": False}, "--append-eod and --eod-token"),
        ({"eod_token": "<s>"}, "--eod-token"),
        ({"control_tokens_in_text": "split"}, "--control-tokens-in-text"),
        ({"json_keys": ("title", "text")}, "--json-keys"),
        ({"input": "a only"}, "--input"),
        ({"input": "b mended"}, "--input"),
        ({"tokenizer_library": "own"}, "--tokenizer-library"),
        ({"tokenizer_model": "other"}, "--tokenizer-model"),
    ],
)
def test_an_unfinished_run_of_something_else_is_noticed(half, tmp_path, change, flag):
    job, mended = half
    if change == {"input": "b mended"}:
        change = {}
        Path(job.input[1]).write_text(mended)
    elif "input" in change:
        change = {"input": job.input[:1]}
    elif "tokenizer_model" in change:
        other = tmp_path / "other.model"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_prefix=str(other)[:-6],
            vocab_size=300,
            model_type="bpe",
            hard_vocab_limit=False,
            minloglevel=2,
        )
        change = {"tokenizer_model": str(other)}
    changed = dataclasses.replace(job, on_error="skip", **change)
    with pytest.raises(ValueError, match=rf"c\.partial holds an unfinished run with other {flag} "):
        preprocess(changed)
    preprocess(dataclasses.replace(changed, overwrite=True))
    ours = outputs(job)
    preprocess(dataclasses.replace(changed, overwrite=True, output_prefix=f"{tmp_path}/new/c"))
    assert outputs(dataclasses.replace(job, output_prefix=f"{tmp_path}/new/c")) == ours


def test_gigatoken_that_goes_wrong_later_is_used_no_further(job, monkeypatch, capfd):
    """The documents concerned, and all that this process tokenizes after them, get their own ids."""
    real = fast_tokenizer.FastTokenizer._encode

    def wrong(self, text):  # on what no sample has seen
        ids = real(self, text)
        return ids[::-1] if "zzlate" in text else ids

    monkeypatch.setattr(fast_tokenizer.FastTokenizer, "_encode", wrong)
    row = json.dumps({"text": "too zzlate " * 20, "title": "x"}) + "\n"
    with open(job.input[1], "a") as file:
        file.write(json.dumps({"text": "x" * 200_000, "title": "x"}) + "\n" + row * 400)
    monkeypatch.setattr(readers, "sample", lambda *_: TEXTS)
    preprocess(dataclasses.replace(job, overwrite=True, tokenizer_library="own"))
    own = outputs(job)
    for workers in (1, 2):
        preprocess(dataclasses.replace(job, overwrite=True, workers=workers))
        assert outputs(job) == own
        errors = capfd.readouterr().err
        assert "b.jsonl: gigatoken's ids differ on '" in errors
        assert "goes on with the tokenizer's own library" in errors


def test_gigatoken_that_fails_is_used_no_further(job, monkeypatch, capfd):
    def fails(self, text):
        raise RuntimeError("panicked" if "zzlate" in text else "never")

    with open(job.input[1], "a") as file:
        file.write(json.dumps({"text": "too zzlate", "title": "x"}) + "\n")
    preprocess(dataclasses.replace(job, overwrite=True, tokenizer_library="own"))
    own = outputs(job)
    monkeypatch.setattr(readers, "sample", lambda *_: TEXTS)
    real = fast_tokenizer.FastTokenizer._encode
    monkeypatch.setattr(
        fast_tokenizer.FastTokenizer,
        "_encode",
        lambda self, text: (fails if "zzlate" in text else real)(self, text),
    )
    preprocess(dataclasses.replace(job, overwrite=True))
    assert outputs(job) == own
    assert "gigatoken fails (panicked); this process goes on" in capfd.readouterr().err


def test_two_runs_of_one_output_are_refused(job):
    with owned(job.output_prefix, ""):
        if not (child := os.fork()):
            try:
                preprocess(job)
            except ValueError as error:
                os._exit(7 if "at work on it" in str(error) else 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_ids_beyond_the_vocabulary_are_refused(job, tmp_path):
    tokenizer = build_tokenizer(job.tokenizer_type, job.tokenizer_model)
    tokenizer.vocab_size = 10
    encoder = Encoder(
        tokenizer, None, ["text"], None, True, f"{tmp_path}/x", type("Never", (), {"value": False})
    )
    [part, *_] = readers.parts([Path(job.input[0])])
    with pytest.raises(ValueError, match="gave id .*, and its vocabulary has 10 entries"):
        encoder(part, 0)


def test_a_killed_worker_is_said(job, monkeypatch):
    monkeypatch.setattr(readers.Part, "batches", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(readers, "sample", lambda *_: TEXTS)
    with pytest.raises(ValueError, match="--workers 2: a worker was killed, most likely for mem"):
        preprocess(dataclasses.replace(job, workers=2))
    assert not list(Path(job.output_prefix).parent.iterdir())


@pytest.mark.parametrize(
    "part, name, value",
    [
        ("state", "lines", "3"),
        ("state", "bytes", -1),
        ("state", "seconds", float("nan")),
        ("state", "cursor", {"file": 0.5, "offset": 0}),
        ("state", "sizes", {"text": {"tokens": True}}),
        ("state", "file_lines", [1]),
        ("state", "histogram", []),
    ],
)
def test_a_state_of_wrong_types_is_named(half, part, name, value):
    job, _ = half
    path = Path(f"{job.output_prefix}.partial/state.json")
    stored = json.loads(path.read_text())
    stored[part][name] = value
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"state\.json is damaged"):
        preprocess(job)


def test_one_flipped_bit_of_token_files_is_seen(job):
    preprocess(job)
    prefix = f"{job.output_prefix}_text_document"
    assert indexed_writer.check_digests(prefix)
    for suffix in (".bin", ".idx"):
        path = Path(prefix + suffix)
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        with pytest.raises(ValueError, match=f"text_document{suffix} is damaged: its CRC-32"):
            indexed_writer.check_digests(prefix)
        path.write_bytes(whole)
    summary = Path(f"{job.output_prefix}_summary.json")
    summary.write_text('{"crc32": 5}')
    with pytest.raises(ValueError, match=r"_summary\.json is damaged: crc32 is 5"):
        indexed_writer.check_digests(prefix)
    summary.unlink()
    assert not indexed_writer.check_digests(prefix)
    Path(f"{job.output_prefix}.json").write_text('{"text": "a"}\n{"text": "b"}\n')  # a corpus
    assert not indexed_writer.check_digests(prefix)
