"""Plans against CUDA's allocator, published sizes and arithmetic by hand.

The peaks are those of CUDA's caching allocator: on an H200, which benchmarks/results has, and where
stock PyTorch 2.13 ran two steps of the trainer with a CUDA driver underneath that hands out
addresses and computes nothing.
"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from pose_megatron.config.arguments import parse
from pose_megatron.errors import ConfigError
from pose_megatron.planning import shortage
from pose_megatron.planning.gpus import GPUS, Rates, named, rates
from pose_megatron.planning.plan import model_of
from pose_megatron.planning.shortage import shortages_explained
from pose_megatron.runtime.megatron_core import megatron_core_version
from tests.shapes import flags

ROOT = Path(__file__).resolve().parents[3]
GIB = 2**30
# https://huggingface.co: meta-llama's Llama-2-7b, Meta-Llama-3-8B and -70B, mistralai's Mixtral-8x7B
PARAMETERS = {"7B": 6_738_415_616, "8B": 8_030_261_248, "70B": 70_553_706_496}
PARAMETERS["8x7B"] = 46_702_792_704
NORMS = {"7B": 65 * 4096, "8B": 65 * 4096, "70B": 161 * 8192}  # on every tensor-parallel rank


# What is fused by default, in pieces.
PIECES = "--fused-rotary off --no-gradient-accumulation-fusion"
LOSS = "--fused-cross-entropy off"


def case(
    size, gpus, window, tp=1, pp=1, more="", pieces=f"{PIECES} {LOSS} --no-bias-swiglu-fusion"
):
    words = flags(size, window, f"--bf16 {more} {pieces}")
    if tp > 1:
        words += ["--tensor-model-parallel-size", str(tp), "--sequence-parallel"]
    if pp > 1:
        words += ["--pipeline-model-parallel-size", str(pp)]
    return {"gpus": gpus, "flags": words}


FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
# {case: (how to plan it, GiB of the fullest stage)}
ALLOCATED = {
    "8B tp2 8k": (case("8B", 8, 8192, tp=2), 62.30),
    "8B tp2 8k, SwiGLU fused": (case("8B", 8, 8192, tp=2, pieces=f"{PIECES} {LOSS}"), 55.30),
    "8B tp2 8k, all but the loss fused": (case("8B", 8, 8192, tp=2, pieces=LOSS), 55.06),
    "8B 4k": (case("8B", 8, 4096), 84.5),
    "8B 4k mlp": (
        case("8B", 8, 4096, more="--recompute-granularity selective --recompute-modules mlp"),
        67.0,
    ),
    "8B 4k full": (case("8B", 8, 4096, more=FULL), 60.2),
    "7B 4k": (case("7B", 32, 4096), 64.4),
    "7B tp2 4k": (case("7B", 32, 4096, tp=2), 33.5),
    "7B tp4 4k": (case("7B", 32, 4096, tp=4), 18.0),
    "70B tp8 pp4 8k": (
        case("70B", 64, 8192, tp=8, pp=4, more="--global-batch-size 16"),
        57.62,
    ),
    "70B tp8 pp4 8k, all fused": (
        case("70B", 64, 8192, tp=8, pp=4, more="--global-batch-size 16", pieces=""),
        48.19,
    ),
}


def benchmarked_shapes() -> dict:
    path = ROOT / "benchmarks/gpu/shapes.py"
    spec = importlib.util.spec_from_file_location("shapes", path)
    shapes = sys.modules["shapes"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shapes)
    return shapes.SHAPES


def measured() -> dict[str, tuple[dict, dict]]:
    """{case: (how to plan it, what benchmarks/gpu/run.py found)}"""
    found = json.loads((ROOT / "benchmarks/results/2026-11-29-h200/gpu.json").read_text())
    cases = {}
    for row in found["parts"]["steps"]["rows"]:
        sizes = [row[name] for name in ("window", "target", "micro_batch", "global_batch")]
        words = SHAPES[row["shape"]].flags(*sizes)
        cases[f"{row['shape']}, {row['window']}"] = ({"gpus": 1, "flags": words}, row["pose"])
    return cases


SHAPES = benchmarked_shapes()
MEASURED = measured()
SMALL = flags("tiny", 64, "--bf16 --global-batch-size 8")
PIPELINED = [*SMALL, "--pipeline-model-parallel-size", "2"]
TIED = [word for word in SMALL if not word.startswith("--untie")]
ALONE = [word for word in SMALL if word != "--use-distributed-optimizer"]
MIXTRAL = "--num-experts 8 --moe-router-topk 2 --expert-model-parallel-size 8"
WIDE = "--num-layers 4 --hidden-size 1024 --ffn-hidden-size 3584 --num-attention-heads 8 --num-experts 4"


def mixture(experts_of_a_token, ranks=1):
    words = f"{WIDE} --moe-router-topk {experts_of_a_token} --seq-length 8192 --vocab-size 2048"
    words += f" --max-position-embeddings 8192 --bf16 --expert-model-parallel-size {ranks}"
    return {"gpus": ranks, "flags": words.split(), "whole": True}


CASES = {name: plan for name, (plan, _) in (ALLOCATED | MEASURED).items()} | {
    "8B tp2 8k, SwiGLU and loss fused": case("8B", 8, 8192, tp=2, pieces=PIECES),
    "sketch": {"gpus": 4, "flags": PIPELINED},
    "whole": {"gpus": 4, "flags": PIPELINED, "whole": True},
    "interleaved": {
        "gpus": 4,
        "flags": [*PIPELINED, "--num-layers-per-virtual-pipeline-stage", "2"],
        "whole": True,
    },
    "update sketch": {"gpus": 1, "flags": [*ALONE, *FULL.split()]},
    "update": {"gpus": 1, "flags": [*ALONE, *FULL.split()], "whole": True},
    "tied": {"gpus": 1, "flags": TIED, "whole": True},
    "tied, pipelined": {
        "gpus": 2,
        "flags": [*TIED, "--pipeline-model-parallel-size", "2"],
        "whole": True,
    },
    "8x7B": {"gpus": 8, "flags": flags("8x7B", 4096, f"--bf16 {MIXTRAL}")},
    "2 of 4 experts": mixture(2),
    "3 of 4 experts": mixture(3),
    "2 of 4 experts, divided": mixture(2, ranks=4),
    "context": {"gpus": 2, "flags": [*SMALL, "--context-parallel-size", "2"], "whole": True},
}


@pytest.fixture(scope="module")
def found():
    """{case: its stages}, and the layouts of a search."""
    wanted = {"gpus": 4, "flags": SMALL, "room": 3_500_000, "count": 3}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("measure_cases.py"))],
        input=json.dumps({"stages": CASES, "search": wanted}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ALLOCATED)
def test_peak_memory_is_the_allocators(found, name):
    peak = max(stage["peak"] for stage in found[name]) / GIB
    assert peak == pytest.approx(ALLOCATED[name][1], rel=0.003)


@pytest.mark.parametrize("name", MEASURED)
def test_peak_memory_is_that_of_a_gpu(found, name):
    (stage,) = found[name]
    assert stage["peak"] == pytest.approx(MEASURED[name][1]["peak_bytes"], rel=0.005)


@pytest.mark.parametrize(
    "name, size, tp", [("7B 4k", "7B", 1), ("8B tp2 8k", "8B", 2), ("70B tp8 pp4 8k", "70B", 8)]
)
def test_parameters_are_the_published_ones(found, name, size, tp):
    on_rank = sum(stage["parameters"] for stage in found[name])
    assert tp * (on_rank - NORMS[size]) + NORMS[size] == PARAMETERS[size]


def test_weights_gradients_and_optimizer_take_18_bytes_a_parameter(found):
    (stage,) = found["8B tp2 8k"]
    per_parameter = {
        part: stage["memory"][part] / stage["parameters"]
        for part in ("weights", "gradients", "optimizer")
    }
    # bfloat16, float32, and a quarter each of float32 weights and two moments
    assert per_parameter == pytest.approx({"weights": 2, "gradients": 4, "optimizer": 3}, rel=1e-3)


def test_logits_are_bfloat16_once_and_float32_once(found):
    (stage,) = found["8B tp2 8k"]
    assert stage["memory"]["logits"] == 8192 * 128256 // 2 * (2 + 4)


def test_a_fused_loss_leaves_the_logits_as_the_only_tensor_of_their_size(found):
    (fused,), (plain,) = (found[f"8B tp2 8k, SwiGLU{more} fused"] for more in (" and loss", ""))
    logits = 8192 * 128256 // 2
    assert fused["memory"]["logits"] == 2 * logits
    # The float32 copy is gone; now the output layer's backward pass is fullest, with a gradient of
    # its bfloat16 weights, and at most its input and the gradient of that, gathered.
    layer = 2 * 4096 * (128256 // 2 + 2 * 8192)
    assert 4 * logits - layer < plain["peak"] - fused["peak"] < 4 * logits
    # Three numbers a token, reduced to all, of which two travel together; over a ring of two.
    assert fused["sent"]["tensor"] == plain["sent"]["tensor"]


def test_early_stages_of_a_pipeline_hold_more_micro_batches(found):
    held = [stage["memory"]["activations"] for stage in found["70B tp8 pp4 8k"]]
    # 4, 3, 2 and 1 of them (Narayanan et al., arXiv 2104.04473, figure 4)
    assert [round(n / held[3]) for n in held] == [4, 3, 2, 1]


def test_matrix_products_are_6_a_weight_and_token(found):
    (stage,) = found["8B tp2 8k"]
    weights = PARAMETERS["8B"] - NORMS["8B"] - 128256 * 4096  # the embedding multiplies nothing
    assert 2 * stage["gemm"] == 6 * weights * 8192


def test_attention_is_causal_and_its_backward_pass_two_and_a_half_times_the_forward(found):
    (stage,) = found["8B tp2 8k"]
    forward = 32 * 2 * 2 * 4096 * 8192 * 8192 / 2  # layers x (q.k and sums) x 2 h L^2, half masked
    assert 2 * stage["attention"] == pytest.approx(3.5 * forward)


def test_full_recompute_adds_the_forward_pass_of_the_layers(found):
    plain, again = found["8B 4k"][0]["gemm"], found["8B 4k full"][0]["gemm"]
    output = 6 * 128256 * 4096 * 4096  # which is not among the layers
    assert (again - output) / (plain - output) == pytest.approx(4 / 3)


def test_tensor_parallel_traffic_by_hand(found):
    (stage,) = found["8B tp2 8k"]
    # Korthikanti et al. (arXiv 2205.05198), and two gathers again for the weights' gradients: ten
    # of 2 s h bytes a layer, of which a ring of two sends half; five at the embedding and output.
    assert stage["sent"]["tensor"] == pytest.approx((10 * 32 + 5) * 8192 * 4096 * 2 / 2, rel=1e-3)


def test_data_parallel_traffic_by_hand(found):
    (stage,) = found["8B tp2 8k"]
    # float32 gradients scattered, bfloat16 weights gathered, over a ring of four
    assert stage["sent_once"]["data"] == pytest.approx(6 * stage["parameters"] * 3 / 4, rel=1e-3)


def test_pipeline_traffic_by_hand(found):
    sent = [stage["sent"]["pipeline"] for stage in found["70B tp8 pp4 8k"]]
    activation = 8192 // 8 * 8192 * 2
    assert sent == [activation, 2 * activation, 2 * activation, activation]


def test_context_parallel_traffic_by_hand(found):
    (stage,) = found["context"]
    gathered = 8 * 2 * 64 * 64 * 2  # layers x (keys, values) x s h x bfloat16
    assert stage["sent"]["context"] == 2 * gathered / 2  # and their gradients; a ring of two


def test_a_mixture_of_experts_has_its_published_parameters(found):
    (stage,) = found["8x7B"]
    experts = 32 * 8 * 3 * 4096 * 14336
    assert stage["parameters"] + experts * 7 // 8 == PARAMETERS["8x7B"]


def test_another_expert_of_a_token_costs_its_products_and_what_they_save(found):
    (two,), (three,) = found["2 of 4 experts"], found["3 of 4 experts"]
    layers, tokens, hidden, width = 4, 8192, 1024, 3584
    assert three["gemm"] - two["gemm"] == layers * tokens * 6 * 3 * hidden * width
    # In bfloat16 the inputs of both products and of SwiGLU, and the token's index and weight; at
    # the fullest moment the last layer's gradients of the second product's output and input, too.
    saved = 2 * (hidden + 2 * width + width) + 8 + 4
    at_once = 2 * (hidden + width)
    more = tokens * (layers * saved + at_once)
    assert three["peak"] - two["peak"] == pytest.approx(more, rel=1e-3)


def test_ranks_that_divide_experts_gather_each_others_tokens(found):
    (alone,), (divided,) = found["2 of 4 experts"], found["2 of 4 experts, divided"]
    assert divided["gemm"] == pytest.approx(alone["gemm"])
    layers, tokens, hidden, experts = 4, 8192, 1024, 4
    # Gathered and scattered back, and so their gradients, by a ring of four: bfloat16; for each
    # expert a float32 weight with its gradient, and whether the token goes there.
    sent = 3 * tokens * (4 * 2 * hidden + (2 * 4 + 1) * experts)
    assert divided["sent"]["expert"] == pytest.approx(layers * sent, rel=2e-3)


@pytest.mark.parametrize("sketch, all_layers", [("sketch", "whole"), ("update sketch", "update")])
def test_a_sketch_comes_to_what_all_layers_come_to(found, sketch, all_layers):
    for sketched, whole in zip(found[sketch], found[all_layers], strict=True):
        assert sketched["parameters"] == whole["parameters"]
        for name in ("peak", "gemm", "attention"):
            assert sketched[name] == pytest.approx(whole[name], rel=0.002), name


def test_the_optimizer_needs_nothing_in_passing(found):
    (stage,) = found["update"]
    assert stage["memory"]["update"] < 0.01 * 4 * stage["parameters"]


@pytest.mark.parametrize(
    "name, chunks",
    [("8B tp2 8k", 1), ("70B tp8 pp4 8k", 1), ("context", 1), ("interleaved", 2)],
)
def test_the_host_waits_for_tokens_loss_and_norm_alone(found, name, chunks):
    asked = chunks if megatron_core_version() < Version("0.19.0.dev0") else 0  # for the tokens
    assert [stage["waits"] for stage in found[name]] == [[0, asked + 2]] * len(found[name])


def test_an_interleaved_pipeline_holds_more(found):
    plain, interleaved = (found[name][0]["memory"] for name in ("whole", "interleaved"))
    assert interleaved["weights"] == plain["weights"]
    assert interleaved["activations"] > 1.2 * plain["activations"]


def test_tied_embeddings_are_one_table_whose_gradients_the_ends_of_a_pipeline_add_up(found):
    table, layer = 384 * 64, 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert found["tied"][0]["parameters"] == table + 8 * layer + 64
    once = [stage["sent_once"]["pipeline"] for stage in found["tied, pipelined"]]
    assert once == pytest.approx([4 * table, 4 * table], rel=1e-3)  # float32, a ring of two


def test_both_stages_of_an_interleaved_pipeline_send(found):
    activation = 64 * 64 * 2
    # forward from chunk to chunk thrice, and backward thrice, over two stages
    sent = sum(stage["sent"]["pipeline"] for stage in found["interleaved"])
    assert sent == 6 * activation


def test_a_search_finds_what_fits_the_fastest_first(found):
    layouts = found["search"]
    assert layouts and all(each["peak"] <= 3_500_000 for each in layouts)
    seconds = [each["seconds"] for each in layouts]
    assert seconds == sorted(seconds)
    assert len({each["layout"] for each in layouts}) == len(layouts)


def test_a_run_out_of_memory_is_answered_by_its_plan(monkeypatch):
    def out_of_memory(gib, taken=0.0):
        info = (int(gib * (1 - taken) * GIB), int(gib * GIB))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: info)
        with pytest.raises(ConfigError) as caught, shortages_explained(SMALL):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0")
        return str(caught.value)

    told = out_of_memory(gib=0.002)
    assert told.startswith("rank 0: CUDA out of memory. tensor 1 x pipeline 1 x context 1 x data 1")
    assert (
        "does not fit" in told and " --recompute-num-layers 1 (0.00" in told
    )  # a change and its peak
    told = out_of_memory(gib=80, taken=0.9)
    assert "another process may hold memory" in told
    assert "Of the GPU's 80.0 GiB 72.0 are not this run's tensors" in told
    assert "not this run's" not in out_of_memory(gib=80)


def test_a_host_that_is_slower_than_the_gpu_is_told(root):
    """A step of one window of 2,048 took an H200 0.097 s (one_window.json), of which it ran half."""

    def said(samples):
        words = SHAPES["Llama 3.2 1B"].flags(2048, 32768, samples, samples)
        command = [sys.executable, str(root / "tools/plan.py"), *words]
        command += ["--gpus", "1", "--gpu", "H200"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    told = re.search(r"the host may need ([\d.]+) s, and the GPU\s+waits", said(1))
    assert float(told[1]) == pytest.approx(0.097, abs=0.01)
    assert "the host may need" not in said(4)


def test_a_plan_that_fails_leaves_the_sentence_and_no_traceback(monkeypatch):
    broken = "import sys; sys.exit('Traceback (most recent call last):\\nTypeError: 1')"
    monkeypatch.setattr(shortage, "_PLAN", [sys.executable, "-c", broken])
    assert shortage.advice(SMALL, 80 * GIB) == (
        "tools/plan.py with the same flags says what the run takes"
    )


def test_a_plan_starts_where_the_run_does(tmp_path, capsys):
    empty = tmp_path / "run"
    same = ["--load", str(empty), "--save", str(empty)]
    model = model_of(parse([*SMALL, *same], trains=False))
    assert model.num_layers == 8
    assert "holds no checkpoint yet" in capsys.readouterr().err
    base = ["--pretrained-checkpoint", str(tmp_path / "base")]
    with pytest.raises(ConfigError, match="base is not a checkpoint folder"):
        model_of(parse([*same, *base, "--seq-length", "64"], trains=False))


def test_a_layout_that_does_not_divide_is_refused():
    from pose_megatron.planning.plan import job, model_of

    args = parse([*SMALL, "--tensor-model-parallel-size", "2"], trains=False)
    with pytest.raises(ConfigError, match=r"7 ranks do not divide .*multiple of 2"):
        job(args, model_of(args), 7)
    args = parse([*SMALL, "--pipeline-model-parallel-size", "3"], trains=False)
    with pytest.raises(ConfigError, match=r"--num-layers 8 .*--pipeline-model-parallel-size"):
        job(args, model_of(args), 3)
    args = parse([*SMALL, "--transformer-impl", "transformer_engine"], trains=False)
    with pytest.raises(ConfigError, match="--transformer-impl torch"):
        job(args, model_of(args), 1)
    args = parse(
        [*SMALL, *"--recompute-granularity selective --recompute-modules moe_act".split()],
        trains=False,
    )
    with pytest.raises(ConfigError, match="--recompute-modules moe_act cannot be planned"):
        job(args, model_of(args), 1)


def test_a_rank_of_a_job_cannot_plan(world):
    from pose_megatron.planning.plan import job, model_of

    args = parse(SMALL, trains=False)
    with pytest.raises(ConfigError, match="has not joined"):
        job(args, model_of(args), 1).stage(0)


def test_a_gpu_that_is_too_small_is_answered_with_what_helps(root, tmp_path):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = (
        f"--load {tmp_path} --gpus 4 --gpu-memory 0.002 --reserve 0 --json --seq-length 64 --bf16 "
        "--max-position-embeddings 256 --rope-scaling yarn --global-batch-size 8"
    )
    done = subprocess.run(
        [sys.executable, str(root / "tools/plan.py"), *flags.split()],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    plan = json.loads(done.stdout)
    assert plan["fits"] is False and plan["gpus"] == 4
    assert (plan["pose"]["seq_length"], plan["full_length"]["seq_length"]) == (64, 256)
    layers = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128 + 2 * 64)
    assert plan["pose"]["stages_bytes"][0]["parameters"] == layers + 2 * 384 * 64 + 64
    sentence = done.stderr.splitlines()[-1]
    assert "tensor 1 x pipeline 1 x context 1 x data 4 does not fit" in sentence
    assert sentence.count(" GiB)") == 3 and "--search" in sentence
    assert any(f"{flag} " in sentence for flag in ("--use-distributed-optimizer", "--tensor-model"))


def test_rates_are_a_data_sheets_shares_or_what_is_given(tmp_path):
    h100 = GPUS["H100"]
    assert rates(h100, None) == h100.rates and h100.rates.gemm == pytest.approx(0.66 * 989)
    assert rates(h100, "gemm=600,network=45") == Rates(
        600, h100.rates.attention, h100.rates.memory, h100.rates.link, 45
    )
    (tmp_path / "rates.json").write_text('{"memory": 3}')
    assert rates(h100, str(tmp_path / "rates.json")).memory == 3
    for wrong in ("gemm", "gem=600", "gemm=-1", "gemm=nan", "gemm=fast"):
        with pytest.raises(ConfigError, match="--rates"):
            rates(h100, wrong)
    assert named("h100") is h100
    with pytest.raises(ConfigError, match=r"--gpu V100 .*A100-80GB.*--gpu-memory"):
        named("V100")


def test_a_step_takes_its_micro_batches_and_the_pipelines_bubble():
    from pose_megatron.config.flags import ParallelFlags
    from pose_megatron.planning.prediction import predict
    from pose_megatron.planning.stage import AXES, Stage, Work

    nothing = dict.fromkeys(AXES, 0.0)

    def stage(gemm, sent):
        return Stage(
            0, 0, {}, Work(gemm, 0, 0, 0, 0, nothing), Work(0, 0, 0, 0, 0, nothing | {"data": sent})
        )

    one = Rates(1, 1, 1, 1, 1)
    layout = ParallelFlags(pipeline_model_parallel_size=4)
    step = predict([stage(1e12, 2e9), stage(2e12, 0)], one, layout, 8, 2, 1)
    # eight and three micro-batches of 2 s on the slower stage, and 2 s of gradients
    assert step.step == pytest.approx(8 * 2 + 3 * 2 + 2)
    interleaved = predict([stage(1e12, 0), stage(2e12, 0)], one, layout, 8, 2, 3)
    assert interleaved.step == pytest.approx(8 * 2 + 3 * 2 / 3)
    hidden = ParallelFlags(pipeline_model_parallel_size=4, overlap_grad_reduce=True)
    assert predict([stage(2e12, 2e9)], one, hidden, 8, 2, 1).step == pytest.approx(11 * 2)
