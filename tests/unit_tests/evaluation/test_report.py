"""Results that someone else's program, or an editor, wrote: each line is a result or is named."""

import json
import os
import resource
import signal

import pytest

from pose_megatron.evaluation import report

GOOD = {"metric": "perplexity", "name": "base", "context_length": 64, "perplexity": 9.5}


def test_the_last_of_equals_counts(tmp_path):
    file = tmp_path / "results.jsonl"
    rows = [GOOD, GOOD | {"perplexity": 8}, GOOD | {"metric": "passkey"}, GOOD | {"name": "é"}]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    found = report.read([str(file)], "perplexity")
    assert {name: list(row) for name, row in found.items()} == {"base": [64], "é": [64]}
    assert found["base"][64]["perplexity"] == 8.0


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"[" * 100_000,
        b"[1]",
        b"3",
        json.dumps(GOOD | {"context_length": "64"}).encode(),
        json.dumps(GOOD | {"context_length": [64]}).encode(),
        json.dumps(GOOD | {"context_length": 64.5}).encode(),
        json.dumps(GOOD | {"perplexity": None}).encode(),
        json.dumps(GOOD | {"perplexity": 10**400}).encode(),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path, line):
    file = tmp_path / "results.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=r"results\.jsonl:2: not a result"):
        report.read([str(file)], "perplexity")


def test_evaluators_side_by_side_never_tear_a_line(tmp_path):
    """Rows far longer than a buffer, from four processes at a time."""
    path, text = tmp_path / "results.jsonl", "x" * 40_000
    children = []
    for writer in range(4):
        if not (child := os.fork()):
            for number in range(50):
                report.append(str(path), [{"writer": writer, "number": number, "text": text}])
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(row["writer"], row["number"]) for row in rows} == {
        (writer, number) for writer in range(4) for number in range(50)
    }
    assert len(rows) == 200 and {row["text"] for row in rows} == {text}


def test_what_a_killed_evaluator_left_spoils_no_other_line(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"metric": "perpl')
    report.append(str(path), [{"a": 1}])
    assert path.read_text() == '{"metric": "perpl\n{"a": 1}\n'
    with pytest.raises(ValueError, match=r"results.jsonl:1: not a result"):
        report.read([str(path)], "perplexity")


def test_a_full_disk_takes_back_what_was_begun(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"a": 1}\n')
    if not (child := os.fork()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            report.append(str(path), [{"b": "x" * 2000}])
        except OSError:
            os._exit(7)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert path.read_text() == '{"a": 1}\n'
