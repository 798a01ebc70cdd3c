"""What a step of a large model takes: memory, launches and waits, as `pose-megatron plan` says."""

import json
import subprocess
import sys
from functools import cache

import pytest

from tests.fake_gpu import waits
from tests.fake_gpu.environment import ROOT
from tests.shapes import flags

LAST = "70B, last stage"
LAYERS_HERE = {"8B": 32, "70B": 20, LAST: 20, "7B": 32}
MICRO_BATCHES = {"8B": 1, "70B": 8, LAST: 8, "7B": 1}


def case(gpus: int, size: str, window: int, more: str) -> dict:
    words = flags(size, window, f"--bf16 --sequence-parallel {more}")
    return {"flags": words, "world_size": gpus, "rank": 0, "initialize": False}


CASES = {
    "8B": case(8, "8B", 8192, "--tensor-model-parallel-size 2"),
    "70B": case(
        64,
        "70B",
        8192,
        "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 --global-batch-size 16",
    ),
    "7B": case(32, "7B", 4096, "--tensor-model-parallel-size 2"),
}
CASES[LAST] = CASES["70B"] | {"rank": 63}
PIECES = ", rotated by pieces"
ALL = CASES | {
    name + PIECES: case | {"flags": [*case["flags"], "--fused-rotary", "off"]}
    for name, case in CASES.items()
}


@pytest.fixture(scope="module")
def found(measured):
    # Each in a process of its own, so that nothing of another is in its memory.
    return {name: measured({name: case})[name] for name, case in ALL.items()}


@cache
def planned(name: str) -> dict:
    case = ALL[name]
    words = ["--gpus", str(case["world_size"]), "--gpu", "H100", "--json", *case["flags"]]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/plan.py"), *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)["pose"]


@pytest.mark.parametrize("name", ALL)
def test_peak_memory_is_the_plans(found, name):
    stage = planned(name)["stages_bytes"][-1 if name.startswith(LAST) else 0]
    assert found[name]["parameters"] == stage["parameters"]
    assert found[name]["peak"] == pytest.approx(stage["peak"], rel=0.01)


@pytest.mark.parametrize("name", ALL)
def test_launches_are_the_plans(found, name):
    assert found[name]["launches"] == pytest.approx(planned(name)["launches_per_step"], rel=0.05)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_rotates_instead_of_its_pieces(found, name):
    fused, pieces = (found[each]["launches"] for each in (name, name + PIECES))
    # One each way, in the place of at least six.
    assert fused <= pieces - 10 * LAYERS_HERE[name] * MICRO_BATCHES[name]


@pytest.mark.parametrize("name", CASES)
def test_matrix_products_are_three_for_each_forward(found, name):
    figures = found[name]
    forward = 4 * LAYERS_HERE[name] + (name != "70B")  # which has no output layer
    assert figures["gemm"] == 3 * forward * MICRO_BATCHES[name]


@pytest.mark.parametrize("name", ALL)
def test_the_host_waits_for_the_loss_and_the_norm_only(found, name):
    figures = found[name]
    assert sum(figures["waits"].values()) == waits.expected(), figures["lines"]
    assert planned(name)["host_waits_per_step"] == waits.expected()
