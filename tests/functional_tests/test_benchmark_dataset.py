"""benchmarks/dataset.py runs and says what it promises; its figures are for a quiet machine."""

import json
import subprocess
import sys

from tests.processes import PATIENCE


def test_it_measures_both_sides(root, tmp_path):
    run = subprocess.run(
        [
            sys.executable,
            str(root / "benchmarks/dataset.py"),
            "--window",
            "64",
            "--target",
            "512",
            "--documents",
            "20",
            "--document-tokens",
            "1000",
            "--many-documents",
            "500",
            "--samples",
            "50",
            "--repeats",
            "1",
            "--output",
            str(tmp_path / "figures.json"),
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {"megatron-core GPTDataset", "PoSE, documents", "PoSE, packed"} <= set(
        figures["samples_per_second"]
    )
    assert {"the authors' rule", "one at a time", "batches of 4096"} <= set(
        figures["plans_per_second"]
    )
    for group in ("samples_per_second", "plans_per_second", "start_seconds"):
        assert all(value > 0 for value in figures[group].values())
