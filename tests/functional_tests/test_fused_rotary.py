"""The fused rotary embedding against float64 and the plain path, in Triton's interpreter; and what
the compiler makes of it for each GPU."""

import json
import os
import subprocess
import sys

import pytest

from pose_megatron.runtime.megatron_core import common_state_is_an_object
from tests.functional_tests.fused_rotary import MODELS, SHAPES

pytest.importorskip(
    "triton", reason="Triton comes with PyTorch's CUDA builds and megatron-core 0.19"
)


def printed(root, tmp_path_factory, *words) -> str:
    # Not the user's own folder of compiled kernels.
    own = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run(
        [sys.executable, *words], cwd=root, env=os.environ | own, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def kernel(root, tmp_path_factory):
    program = "tests/functional_tests/fused_rotary.py"
    return json.loads(printed(root, tmp_path_factory, program, "kernel").splitlines()[-1])


@pytest.fixture(scope="module")
def training(root, tmp_path_factory):
    program = "tests/functional_tests/fused_rotary.py"
    return json.loads(printed(root, tmp_path_factory, program, "training").splitlines()[-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_it_turns_as_float64_does_up_to_2_24(kernel, shape):
    single, half = (dict(kernel[shape][dtype]) for dtype in ("float32", "bfloat16"))
    assert single.pop("float32 angle") > 0.01  # what would be seen of rounded frequencies
    assert max(single.values()) <= 2e-7
    del half["float32 angle"]
    assert half.pop("angle") <= 2**-7.5  # of two numbers that bfloat16 cuts to 8 bits
    assert max(half.values()) <= 2**-8


@pytest.mark.parametrize("model", MODELS)
def test_a_model_has_the_losses_of_the_plain_path(training, model):
    if model == "HybridModel" and not common_state_is_an_object():
        pytest.skip("--model-class hybrid needs megatron-core 0.19")
    plain, fused = training[model]["off"], training[model]["on"]
    # Of 2 layers, once each way; recomputation goes forward twice.
    passes = 3 if "recompute" in model else 2
    assert [row["launches"] for row in plain] == [0, 0, 0]
    assert [row["launches"] for row in fused] == [2 * passes] * 3
    assert far(fused, plain) < 1e-6


def test_frequencies_rounded_to_float32_are_seen(training):
    found = training["grouped queries, YaRN, full recompute"]
    assert far(found["rounded"], found["off"][:1]) > 1e-5


def far(found, wanted) -> float:
    """The largest relative difference of a loss or gradient norm."""
    return max(
        abs(a[name] / b[name] - 1)
        for a, b in zip(found, wanted, strict=True)
        for name in ("loss", "grad_norm")
    )


def test_no_gpu_spills_a_register(root, tmp_path_factory, tmp_path):
    check_registers(root, tmp_path_factory, tmp_path, "benchmarks/rotary_kernel.py")


def check_registers(root, tmp_path_factory, tmp_path, program):
    rows = tmp_path / "rows.json"
    printed(root, tmp_path_factory, program, "--only", "registers", "--output", rows)
    found = json.loads(rows.read_text())["registers"]
    assert {row["architecture"] for row in found} == {80, 90, 100}
    assert {row["backward"] for row in found} == {True, False}
    for row in found:
        assert row["spilled"] == 0 and 0 < row["registers"] <= 128, row
