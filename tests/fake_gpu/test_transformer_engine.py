"""`--transformer-impl transformer_engine` with the real Transformer Engine, where it is installed.

Its layers are built, weights go through them, and steps run; README.md here says how to install it for
that. Figures of steps come from measure.py, all else from engine_models.py.
"""

import json
import math
from importlib.machinery import PathFinder

import pytest

from tests.fake_gpu import waits
from tests.fake_gpu.environment import HERE, ROOT
from tests.functional_tests.families import TARGET, YARN
from tests.shapes import LAYERS, flags

if PathFinder.find_spec("transformer_engine") is None:  # from this process it is hidden
    pytest.skip(
        "Transformer Engine is not installed; tests/fake_gpu/README.md says how",
        allow_module_level=True,
    )

WINDOW, L = 256, LAYERS["small"]
POSE = "--max-position-embeddings 4096 --rope-scaling yarn --transformer-impl transformer_engine"


@pytest.fixture(scope="module")
def models(on_fake_gpu, tmp_path_factory):
    printed = on_fake_gpu(HERE / "engine_models.py", tmp_path_factory.mktemp("models"))
    return json.loads(printed.splitlines()[-1])


def case(more: str = "", world_size: int = 1) -> dict:
    words = flags("small", WINDOW, f"--bf16 {POSE} {more}")
    return {"flags": words, "world_size": world_size, "rank": 0, "initialize": True}


CASES = {
    "engine": case(),
    "engine, rotated by pieces": case("--fused-rotary off"),
    "engine, tensor": case("--tensor-model-parallel-size 2 --sequence-parallel", 2),
    "engine, hybrid": case("--model-class hybrid"),
    "engine, unfused": case("--attention-backend unfused"),
}


@pytest.fixture(scope="module")
def steps(measured):
    # Transformer Engine keeps its choice for as long as a process lasts.
    (*others, unfused) = CASES
    return measured({name: CASES[name] for name in others}) | measured({unfused: CASES[unfused]})


# What the models are.


FAMILIES = ("Llama", "Qwen2", "Qwen3", "Qwen3-MoE")


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_shapes_are_those_of_stock_megatron_core(models, name):
    found = models[name]["parameters"]
    assert found["engine"] == found["stock"] != found["torch"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_implementation_stores_the_same_tensors(models, name):
    stored = models[name]["stored"]
    assert len(stored["stock"]) >= 9  # of LLaMA: 6 of the layers, and 3
    for how, tensors in stored.items():
        if how == "converted":  # it answers to a second name, too
            tensors = {key: tensors[key] for key in stored["stock"]}
        assert tensors == stored["stock"], how


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_go_through_every_implementation_and_back(models, name):
    same = dict(models[name]["same"])
    assert same.pop("broken") is False  # a value of one weight was changed on its way
    assert len(same) == 6 and all(same.values()), same


@pytest.mark.parametrize("how", ["engine", "engine, hybrid"])
def test_attention_gets_yarns_temperature(models, how):
    """arXiv 2309.00071, section 3.4: 1 / sqrt(t) = 0.1 ln(s) + 1, of queries and of keys."""
    head = 16
    wanted = (0.1 * math.log(YARN["factor"]) + 1) ** 2 / math.sqrt(head)
    scales = models["Llama"]["scales"]
    assert YARN["factor"] == TARGET / 4096 and wanted > 1.4 / math.sqrt(head)
    assert scales[how] == [[pytest.approx(wanted, rel=1e-12)] * 3] * 2
    assert scales["stock"] == [[pytest.approx(1 / math.sqrt(head), rel=1e-12)] * 3] * 2
    assert models["Qwen2"]["scales"][how] == scales["stock"]  # without YaRN


# What a step runs.


@pytest.mark.parametrize("name", CASES)
def test_a_step_runs_on_the_gpu(steps, name):
    figures = steps[name]
    assert figures["updated"]
    for what, devices in figures["devices"].items():
        assert devices == ["cuda:0"], what


@pytest.mark.parametrize("name", CASES)
def test_the_attention_is_the_one_that_is_asked_for(steps, name):
    kernels = "engine unfused" if name == "engine, unfused" else "engine fused"
    assert steps[name]["attention"] == [kernels]


@pytest.mark.parametrize("name", CASES)
def test_queries_and_keys_are_rotated_by_their_position_ids(steps, name):
    figures = steps[name]
    (ids,) = figures["rotations"]["ids"]
    assert [ids] == figures["batch_ids"]
    assert max(b - a for a, b in zip(ids[0], ids[0][1:], strict=False)) > 1  # they skip
    pieces = name == "engine, rotated by pieces"
    assert figures["rotations"]["kernel"] == (0 if pieces else L)
    assert figures["rotations"]["stock"] == (2 * L if pieces else 0)


@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_for_the_loss_and_the_norm_only(steps, name):
    figures = steps[name]
    assert sum(figures["waits"].values()) == waits.expected(), figures["lines"]


# The program.


def test_a_run_goes_on_with_it_and_without_it(on_fake_gpu, corpus, tmp_path, monkeypatch):
    """Its Adam and torch's keep their state in different ways."""
    hidden = tmp_path / "hidden/transformer_engine"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('as if it were not installed')")
    words = flags("small", 128, f"--bf16 --data-path {corpus} --num-workers 0 --log-interval 1")
    words += "--max-position-embeddings 512 --rope-scaling yarn --split 100,0,0".split()
    words += f"--save {tmp_path / 'checkpoints'} --load {tmp_path / 'checkpoints'}".split()
    engine = "transformer_engine --attention-backend unfused"  # the other kernels are cuDNN's
    for done, implementation in ((0, "torch"), (2, engine), (4, "torch")):
        more = f"--transformer-impl {implementation} --train-iters {done + 2}".split()
        with monkeypatch.context() as patched:
            if implementation == "torch":
                patched.setenv("PYTHONPATH", str(hidden.parent))
            printed = on_fake_gpu(ROOT / "pretrain_pose.py", *words, *more)
        assert (f"of which {done} steps" in printed) == (done > 0)
    assert (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").read_text().strip() == "6"
