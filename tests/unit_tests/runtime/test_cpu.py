"""cpu.py: each of megatron-core's CUDA words has its CPU meaning, in every thread."""

import subprocess
import sys
import threading

import pytest
import torch

from pose_megatron.runtime import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA: nothing to mend")

ARGUMENTS = {"arange": (3,), "full": ((2,), 7), "randint": (5, (2,)), "tensor": ([1.0],)}
LIKE = {"full_like": (7,)}


@pytest.mark.parametrize("name", cpu.FACTORIES)
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 0)], ids=str)
def test_a_factory_asked_for_cuda_answers_on_the_cpu(name, device):
    if name.endswith("_like"):
        arguments = (torch.ones(2), *LIKE.get(name, ()))
    else:
        arguments = ARGUMENTS.get(name, (2,))
    made = getattr(torch, name)(*arguments, device=device)
    assert made.device.type == "cpu"


def test_factories_otherwise_do_what_they_did():
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.arange(3, device=None).tolist() == [0, 1, 2]
    assert torch.full((2,), 7, device="cuda").tolist() == [7, 7]
    assert not torch.empty(2, device="cuda", pin_memory=True).is_pinned()


def test_a_device_context_still_governs_the_factories():
    with torch.device("meta"):  # how transformers builds a model before it loads one
        made = [torch.empty(2), torch.zeros(2), torch.arange(3), torch.nn.Linear(2, 2).weight]
    assert {x.device.type for x in made} == {"meta"}


def test_moving_to_cuda_stays_here_and_keeps_the_other_wishes():
    x = torch.arange(3.0)
    assert x.cuda() is x and x.cuda(non_blocking=True) is x
    for moved in (x.to("cuda"), x.to(torch.device("cuda")), x.to(device="cuda:0")):
        assert moved.device.type == "cpu" and moved.tolist() == [0, 1, 2]
    assert x.to("cuda", torch.float64).dtype == torch.float64
    assert x.to(device="cuda", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert x.to(torch.int64).dtype == torch.int64
    assert x.to("meta").device.type == "meta"
    assert torch.nn.Linear(2, 2).to("cuda").weight.device.type == "cpu"


def test_type_names_are_those_that_the_optimizer_compares():
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


def test_the_generator_of_the_device_is_the_cpus():
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    torch.cuda.manual_seed(5)
    first = torch.rand(4)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(4), first)


def test_it_holds_in_other_threads():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.ones(1, device="cuda").device.type))
    thread.start()
    thread.join()
    assert seen == ["cpu"]


def test_what_megatron_core_would_compile_runs_as_it_is_written():
    program = """
import sys, torch
own = torch.compile
from pose_megatron.runtime import cpu
cpu.install()
from megatron.core.fusions.fused_bias_swiglu import swiglu
assert "torch._inductor" not in sys.modules
assert torch.compile is own  # the user's still compiles
x = torch.tensor([[0.0, 1.0, 3.0, 4.0]])
silu = 1 / (1 + torch.e ** -1)
assert torch.allclose(swiglu(x), torch.tensor([[0.0, 4 * silu]]))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_installing_twice_wraps_once():
    before = {name: getattr(torch, name) for name in cpu.FACTORIES} | {"to": torch.Tensor.to}
    cpu.install()
    assert before == {name: getattr(torch, name) for name in cpu.FACTORIES} | {
        "to": torch.Tensor.to
    }
    assert torch.cuda.current_device() == torch.device("cpu")
    torch.cuda.synchronize()
    torch.cuda.set_device(0)
