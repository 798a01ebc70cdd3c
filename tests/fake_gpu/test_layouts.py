"""The trainer's steps on CUDA tensors, in every layout: where tensors are, what is sent, what runs.

Expected numbers of calls are by hand, of one step with M micro-batches, on one rank.
"""

import pytest

from tests.fake_gpu import waits
from tests.shapes import LAYERS, flags

WINDOW, MICRO_BATCHES = 256, 4
L, M = LAYERS["small"], MICRO_BATCHES
POSE = "--max-position-embeddings 4096 --rope-scaling yarn"


def case(world_size: int, more: str = "", precision: str = "--bf16", rank: int = 0) -> dict:
    words = flags("small", WINDOW, f"{POSE} {precision} {more}")
    return {"flags": words, "world_size": world_size, "rank": rank, "initialize": True}


PIPELINE = f"--pipeline-model-parallel-size 2 --global-batch-size {M}"
OF_FOUR = f"--pipeline-model-parallel-size 4 --global-batch-size {M}"
CASES = {
    "alone": case(1),
    "alone, rotated by pieces": case(1, "--fused-rotary off"),
    "float32": case(1, precision=""),
    "tensor": case(2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pipeline": case(2, PIPELINE),
    "interleaved": case(2, f"{PIPELINE} --num-layers-per-virtual-pipeline-stage 1"),
    "context": case(2, "--context-parallel-size 2"),
    "data": case(2, "--overlap-grad-reduce --overlap-param-gather"),
}
LAST = ", last rank"
CASES |= {
    name + LAST: CASES[name] | {"rank": 1}
    for name in ("tensor", "pipeline", "interleaved", "context", "data")
}
CASES["pipeline of four, third stage"] = case(4, OF_FOUR, rank=2)
# Layers x micro-batches of a rank; under context parallelism each layer attends twice.
ATTENDS = dict.fromkeys(CASES, L)
for end in ("", LAST):
    ATTENDS |= {
        "pipeline" + end: L // 2 * M,
        "interleaved" + end: L // 2 * M,
        "context" + end: 2 * L,
    }
ATTENDS["pipeline of four, third stage"] = L // 4 * M


@pytest.fixture(scope="module")
def found(measured):
    return measured(CASES)


def sent(figures: dict, call: str) -> int:
    """How often the rank called NCCL so, in groups of two."""
    return int(figures["nccl"].get(f"nccl {call} 2", 0))


@pytest.mark.parametrize("name", CASES)
def test_all_that_a_step_works_on_is_on_the_gpu(found, name):
    figures = found[name]
    assert figures["updated"]
    for what, devices in figures["devices"].items():
        assert devices == [f"cuda:{CASES[name]['rank']}"], what


@pytest.mark.parametrize("name", [name for name in CASES if name != "float32"])
def test_attention_is_a_fused_kernel(found, name):
    figures = found[name]
    assert set(figures["attention"]) <= {"cudnn", "flash"}
    assert figures["flash"] == ATTENDS[name]
    assert figures["softmax"] == 0


def test_attention_in_float32_holds_no_scores_either(found):
    assert found["float32"]["attention"] == ["efficient"]
    assert found["float32"]["flash"] == found["float32"]["softmax"] == 0


@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_for_the_loss_and_the_norm_only(found, name):
    figures = found[name]
    chunks = 2 if name.startswith("interleaved") else 1
    assert sum(figures["waits"].values()) == waits.expected(chunks), figures["lines"]


def test_the_kernel_rotates_instead_of_its_pieces(found):
    fused, pieces = (found[name]["launches"] for name in ("alone", "alone, rotated by pieces"))
    # Queries and keys, forward and backward: two kernels a layer in the place of many.
    assert fused < pieces - 10 * L


@pytest.mark.parametrize("end", ["", LAST])
def test_tensor_parallel_ranks_gather_and_scatter(found, end):
    # Forward and backward, 6 and 4 a layer; the embedding and the output layer have the rest.
    assert sent(found["tensor" + end], "all_gather") == 6 * L + 3
    assert sent(found["tensor" + end], "reduce_scatter") == 4 * L + 2


@pytest.mark.parametrize("end", ["", LAST])
def test_a_pipelines_ends_send_and_receive_once_a_micro_batch(found, end):
    # Of activations and gradients the first stage sends the ones, and the last the others.
    figures = found["pipeline" + end]
    assert (sent(figures, "send"), sent(figures, "recv")) == (M, M)


def test_a_stage_in_between_sends_and_receives_both(found):
    nccl = found["pipeline of four, third stage"]["nccl"]
    for call in ("send", "recv"):
        assert sum(n for name, n in nccl.items() if name.startswith(f"nccl {call} ")) == 2 * M


@pytest.mark.parametrize("end", ["", LAST])
def test_two_chunks_of_it_send_three_times(found, end):
    # Of the first stage: activations of both chunks, and gradients of the second's input.
    interleaved = found["interleaved" + end]
    assert (sent(interleaved, "send"), sent(interleaved, "recv")) == (3 * M, 3 * M)


@pytest.mark.parametrize("end", ["", LAST])
def test_context_parallel_ranks_gather_keys_and_values(found, end):
    activation = WINDOW * 256 // 2 * 2  # tokens x width of half as many heads, bfloat16
    figures = found["context" + end]
    assert figures["nccl"]["bytes all_gather 2"] >= 2 * L * activation
    assert sent(figures, "all_gather") >= 2 * L and sent(figures, "reduce_scatter") >= 2 * L


@pytest.mark.parametrize("end", ["", LAST])
def test_data_parallel_ranks_share_gradients_and_weights(found, end):
    figures = found["data" + end]
    nccl, parameters = figures["nccl"], figures["parameters"]
    assert nccl["bytes reduce_scatter 2"] == pytest.approx(4 * parameters, rel=0.01)  # float32
    assert nccl["bytes all_gather 2"] == pytest.approx(2 * parameters, rel=0.01)  # bfloat16
