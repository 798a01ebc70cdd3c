"""Results that someone else's program, or an editor, wrote: each line is a result or is named."""

import json

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
