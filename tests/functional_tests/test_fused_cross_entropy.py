"""The fused cross entropy against float64, megatron-core's own and the plain path, in Triton's
interpreter; and what the compiler makes of it for each GPU."""

import json
import math

import pytest

from pose_megatron.runtime.megatron_core import common_state_is_an_object
from tests.functional_tests.fused_cross_entropy import MODELS, WIDTHS
from tests.functional_tests.test_fused_rotary import check_registers, far, printed

pytest.importorskip(
    "triton", reason="Triton comes with PyTorch's CUDA builds and megatron-core 0.19"
)
PROGRAM = "tests/functional_tests/fused_cross_entropy.py"
# Losses are float32 whatever the logits are; the gradient has their precision, which is that of
# numbers that are cut where the interpreter writes bfloat16.
LOSS = 2e-6
GRADIENT = {"float32": 2e-7, "bfloat16": 2**-7, "float16": 2**-11}


@pytest.fixture(scope="module")
def kernel(root, tmp_path_factory):
    return json.loads(printed(root, tmp_path_factory, PROGRAM, "kernel").splitlines()[-1])


@pytest.fixture(scope="module")
def ranks(root, tmp_path_factory):
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    out = printed(root, tmp_path_factory, *torchrun, PROGRAM, "ranks")
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def training(root, tmp_path_factory):
    return json.loads(printed(root, tmp_path_factory, PROGRAM, "training").splitlines()[-1])


@pytest.mark.parametrize("dtype", GRADIENT)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_the_cross_entropy_of_float64(kernel, width, dtype):
    found = kernel[str(width)][dtype]
    assert found["loss"] < LOSS and found["gradient"] < GRADIENT[dtype]


@pytest.mark.parametrize(
    "name, loss, gradient",  # of the last two entries, the loss counted twice
    [
        ("thirds", math.log(4 / 3), [2 / 4, 2 * (3 / 4 - 1)]),
        ("large", math.log(2), [2 * (1 / 2 - 1), 1]),
        ("barred", math.log(2), [1, 2 * (1 / 2 - 1)]),
        ("nobody's", math.log(2), [1, 1]),  # as megatron-core has it
        ("not a number", math.nan, [math.nan, math.nan]),
    ],
)
def test_rows_known_by_hand(kernel, name, loss, gradient):
    assert kernel["by hand"][name] == pytest.approx([loss, *gradient], rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("dtype", GRADIENT)
def test_two_tensor_parallel_ranks_have_what_megatron_core_has(ranks, dtype):
    assert len(ranks[dtype]) == 2
    for found in ranks[dtype]:
        for other in found.values():
            assert other["loss"] < LOSS and other["gradient"] < GRADIENT[dtype]


@pytest.mark.parametrize("model", MODELS)
def test_a_model_has_the_losses_of_the_plain_path(training, model):
    if model == "HybridModel" and not common_state_is_an_object():
        pytest.skip("--model-class hybrid needs megatron-core 0.19")
    plain, fused = training[model]["off"], training[model]["on"]
    assert [row["launches"] for row in plain] == [0, 0, 0]
    passes = 4 if "two micro-batches" in model else 2
    assert [row["launches"] for row in fused] == [passes] * 3
    assert far(fused, plain) < 1e-6
    assert far(fused[1:], plain[:-1]) > 1e-4  # a step changes them


def test_no_gpu_spills_a_register(root, tmp_path_factory, tmp_path):
    check_registers(root, tmp_path_factory, tmp_path, "benchmarks/cross_entropy_kernel.py")
