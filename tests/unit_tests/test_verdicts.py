"""examples/real_model/verdicts.py on figures whose verdicts are known."""

import json
import subprocess
import sys

import pytest

from pose_megatron.evaluation.claims import read_verdicts
from pose_megatron.evaluation.shares import wilson

BASE = {8192: 1.8, 10240: 1.9, 12288: 3.0, 16384: 6.0}
CLAIMS = {  # words of it: (a model, its losses, found at 4,096 and 12,288 of 40; the verdict then)
    "loses at least 0.5 nats more": ("as it was", BASE | {16384: 1.9}, None, "does not hold"),
    "no bin beyond 10,240": ("PoSE", BASE | {12288: 1.7, 16384: 2.4}, None, "does not hold"),
    "plain positions loses more": ("plain positions", dict.fromkeys(BASE, 1.5), None, "does not hold"),
    "costs at most 0.05 nats": ("PoSE", dict.fromkeys(BASE, 1.7) | {8192: 2.0}, None, "does not hold"),
    "fewer than one passkey in five": ("as it was", BASE, (30, 25), "does not hold"),
    "as often as it found them at 4,096": ("PoSE", dict.fromkeys(BASE, 1.6), (30, 10), "does not hold"),
    "after the same training": ("plain positions", BASE, (30, 39), "undecided"),
}  # fmt: skip


def models():
    return {
        "as it was": (BASE, (30, 1)),
        "plain positions": (BASE, (30, 1)),
        "PoSE": (dict.fromkeys(BASE, 1.6), (39, 39)),
    }


def verdicts(root, folder, models):
    """{claim: verdict}"""
    rows = []
    for name, (losses, found) in models.items():
        rows += [
            {"name": name, "metric": "perplexity", "measured": "by position", "perplexity": 1.0}
            | {"context_length": end, "by_document": [loss - 0.01, loss, loss + 0.01]}
            for end, loss in losses.items()
        ]
        for length, n in zip((4096, 12288), found, strict=True):
            low, high = wilson(n / 40, 40)
            rows.append(
                {"name": name, "metric": "passkey", "context_length": length, "passkey": n / 40}
                | {"low": low, "high": high, "answers": [[0, True, 0]] * 40}
            )
    file = folder / "results.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = root / "examples/real_model/verdicts.py"
    done = subprocess.run([sys.executable, script, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = read_verdicts(str(folder / "results.verdicts.json"))
    assert all(f"{one.verdict:12}  {one.claim}: {one.numbers}\n" in done.stdout for one in found)
    return {one.claim: one.verdict for one in found}


def test_what_holds(root, tmp_path):
    found = verdicts(root, tmp_path, models())
    assert len(found) == len(CLAIMS) and set(found.values()) == {"holds"}


@pytest.mark.parametrize("words", CLAIMS)
def test_what_does_not(root, tmp_path, words):
    name, losses, shares, verdict = CLAIMS[words]
    changed = models()
    changed[name] = (losses, shares or changed[name][1])
    found = verdicts(root, tmp_path, changed)
    assert next(said for claim, said in found.items() if words in claim) == verdict
