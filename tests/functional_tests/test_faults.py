"""benchmarks/faults, a few of its cases: nothing runs, hangs or is passed over without a reason."""

import json
import subprocess
import sys

from tests.processes import PATIENCE


def test_a_few_of_each_kind(root, tmp_path):
    words = ["--damages", "18", "--seed", "1", "--only", "code beside weights", "--pairs", "1"]
    run = subprocess.run(
        [sys.executable, root / "benchmarks/faults", *words, "--output", tmp_path / "figures.json"],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    bad = {"executed", "hung", "memory", "killed", "traceback", "unseen"}
    for kind, counts in figures["counts"].items():
        assert not bad & counts.keys(), (kind, figures["named"])
        assert counts.get("refused"), kind
    assert len(figures["counts"]) == 10
    assert len(figures["pairs"]) == 10  # five tools, twice at once and killed
    for kind, counts in figures["pairs"].items():
        assert counts in ({"right": 1}, {"refused": 1}), kind
    assert figures["most_mebibytes"] < 1024
