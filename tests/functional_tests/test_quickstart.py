"""The README's main job with few steps: every tool in the order a user meets them."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import write_corpus

ROOT = Path(__file__).resolve().parents[2]


def run(*command, **env):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | env
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=environment, text=True, capture_output=True
    )


def assert_one_sentence(done, message):
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    small = {"BASE_ITERS": "60", "POSE_ITERS": "12", "DOCUMENTS": "4"}
    done = run("bash", "examples/quickstart.sh", OUT=str(folder), **small)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


def test_every_model_is_measured_on_the_same_tokens(quickstart):
    folder, _ = quickstart
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    names = {row["name"] for row in rows}
    assert names == {
        "base",
        "plain positions, linear",
        "interpolation only, linear",
        "PoSE, linear",
        "interpolation only, yarn",
        "PoSE, yarn",
    }
    assert {row["context_length"] for row in rows} == {64, 128, 256, 512}
    assert len(rows) == 24
    assert len({(row["tokens"], row["documents"]) for row in rows}) == 1
    assert all(1 < row["perplexity"] < 512 and math.isfinite(row["loss"]) for row in rows)


def test_training_lowered_the_loss_below_a_uniform_guess(quickstart):
    folder, _ = quickstart
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    base = next(r for r in rows if r["name"] == "base" and r["context_length"] == 64)
    assert base["loss"] < math.log(512) - 1


def test_the_export_is_the_model(quickstart):
    folder, out = quickstart
    # verify.py, of both exports; the script ends where an error is too large.
    assert out.count("rope inv_freq: relative error") == 2 and "exact angles: error" in out
    for scaling in ("yarn", "linear"):
        config = json.loads((folder / f"pose-{scaling}-hf" / "config.json").read_text())
        assert config["max_position_embeddings"] == 512
        # The spelling of transformers 4, before 4.43 and after, and that of transformers 5.
        assert config["rope_scaling"]["type"] == config["rope_parameters"]["rope_type"] == scaling
        assert config["rope_scaling"]["factor"] == config["rope_parameters"]["factor"] == 8
        assert (folder / f"pose-{scaling}-hf" / "tokenizer.json").is_file()


def test_table_and_plot(quickstart):
    folder, out = quickstart
    assert (folder / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "perplexity.md").read_text()
    assert table.startswith("| | 64 | 128 | 256 | 512 |") and table in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load", "{}/nowhere"], "is not a checkpoint folder"),
        (["--context-lengths", "999999"], "no document has more than 999999 tokens"),
        (["--stride", "500"], "--stride 500 must lie between 1 and the shortest context length"),
        (["--data-path", "{}/nowhere"], "nowhere.idx is missing"),
        (["--load", "{}/pose-yarn", "--rope-scaling", "linear"], "is interpolated already"),
    ],
)
def test_evaluation_names_bad_input(quickstart, flags, message):
    folder, _ = quickstart
    usual = [
        "--load",
        f"{folder}/base",
        "--data-path",
        f"{folder}/test_text_document",
        "--context-lengths",
        "128",
    ]
    done = run(
        sys.executable,
        "tools/evaluate_perplexity.py",
        *usual,
        *(flag.format(folder) for flag in flags),
    )
    assert_one_sentence(done, message)


def test_passkeys_of_the_extended_model(quickstart, tmp_path):
    folder, _ = quickstart
    results = tmp_path / "results.jsonl"
    for name, more in (
        ("base", []),
        ("pose-yarn", []),
        (
            "base",
            [
                "--rope-scaling",
                "linear",
                "--name",
                "interpolated",
                "--data-path",
                f"{folder}/test_text_document",
                "--prepend-bos",
            ],
        ),
    ):
        done = run(
            sys.executable,
            "tools/evaluate_passkey.py",
            "--load",
            folder / name,
            "--context-lengths",
            "512",
            "128",
            "--trials",
            "5",
            "--needles",
            "2",
            "--output",
            results,
            *more,
        )
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(r["name"], r["context_length"]) for r in rows] == [
        (name, n) for name in ("base", "pose-yarn", "interpolated") for n in (128, 512)
    ]
    for row in rows:
        depths = sorted(depth for depth, _, _ in row["answers"])  # of two needles in five texts
        assert depths == pytest.approx([i / 9 for i in range(10)])
        assert row["passkey"] == sum(found for _, found, _ in row["answers"]) / 10
        assert row["low"] <= row["passkey"] <= row["high"] and 0 < row["loss"] < 30
    done = run(
        sys.executable,
        "tools/plot_results.py",
        results,
        "--metric",
        "passkey",
        "--output",
        tmp_path / "passkey.png",
        "--window",
        "64",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "passkey.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "passkey.md").read_text().startswith("| | 128 | 512 |")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--needles", "9"], "--context-lengths 128: 9 needles and the question take"),
        (["--load", "{}/nowhere"], "is not a checkpoint folder"),
        (["--data-path", "{}/nowhere"], "nowhere.idx is missing"),
        (["--tokenizer-model", "{}/nowhere"], "nowhere: no such file or folder"),
        (
            ["--context-lengths", "9000000", "--data-path", "{}/test_text_document"],
            "fewer than the longest context length, 9000000",
        ),
    ],
)
def test_passkey_names_bad_input(quickstart, flags, message):
    folder, _ = quickstart
    done = run(
        sys.executable,
        "tools/evaluate_passkey.py",
        "--load",
        f"{folder}/base",
        "--context-lengths",
        "128",
        *(flag.format(folder) for flag in flags),
    )
    assert_one_sentence(done, message)


def test_passkeys_in_another_models_ids(quickstart, tmp_path):
    folder, _ = quickstart
    haystack = write_corpus(tmp_path / "text_document", [[9999] * 300])
    done = run(
        sys.executable,
        "tools/evaluate_passkey.py",
        "--load",
        f"{folder}/base",
        "--context-lengths",
        "128",
        "--data-path",
        haystack,
    )
    assert_one_sentence(done, "token id 9999 is outside the checkpoint's vocabulary of 512")


def test_verification_sees_another_model(quickstart):
    folder, _ = quickstart
    done = run(
        sys.executable,
        "tools/checkpoint/verify.py",
        "--megatron",
        folder / "pose-yarn",
        "--hf",
        folder / "pose-linear-hf",
    )
    assert done.returncode == 1
    assert "reads another rope than" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ('{"metric": "perplexity"}\n', "lines.jsonl:1: not a result"),
        ("\nnonsense\n", "lines.jsonl:1: not a result"),
        ('{"metric": "accuracy"}\n', "no results of metric 'perplexity'"),
    ],
)
def test_plot_names_bad_input(tmp_path, text, message):
    file = tmp_path / "lines.jsonl"
    if text is not None:
        file.write_text(text)
    done = run(sys.executable, "tools/plot_results.py", file, "--output", tmp_path / "out.png")
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out.png").exists()
