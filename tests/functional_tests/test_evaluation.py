"""The evaluators under layouts of ranks, on both kinds of folder, killed, and given bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from pose_megatron.checkpoints.convert import convert
from tests.byte_level import train
from tests.conftest import write_corpus

ROOT = Path(__file__).resolve().parents[2]
TP, PP, CP = (f"--{name}-parallel-size" for name in ("tensor-model", "pipeline-model", "context"))
LENGTHS = ["--context-lengths", "200", "256", "400"]


SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 257,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}


def furnished(folder, model, documents):
    """The model as a Megatron folder and a Hugging Face folder, and a corpus."""
    model.save_pretrained(folder / "hf")
    train([], 257).save(str(folder / "hf" / "tokenizer.json"))
    (folder / "hf" / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    convert(folder / "hf", folder / "megatron", loader="hf", saver="megatron", quiet=True)
    write_corpus(folder / "text", [document[:700] for document in documents[:5]])
    return folder


@pytest.fixture(scope="module")
def house(tmp_path_factory, stdlib_documents):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    return furnished(tmp_path_factory.mktemp("house"), model, stdlib_documents)


@pytest.fixture(scope="module")
def house_of_experts(tmp_path_factory, stdlib_documents):
    torch.manual_seed(0)
    experts = MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)
    folder = tmp_path_factory.mktemp("experts")
    return furnished(folder, MixtralForCausalLM(experts), stdlib_documents)


def words(house, program, load, output, *more):
    command = [f"tools/evaluate_{program}.py", "--load", house / load, *LENGTHS]
    if program == "perplexity":
        command += ["--data-path", house / "text"]
    return [str(word) for word in [*command, "--output", output, "--name", "model", *more]]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(house, program, load, output, *more, ranks=1):
    """(results without the folder's name, stdout)"""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*start, *words(house, program, load, output, *more)],
        cwd=ROOT,
        env=environment(),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return results(output), done.stdout


def results(output):
    """But for how they were made, which parts do not say."""
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    return [{name: row[name] for name in row if name != "made"} for row in rows]


MEASURES = {
    "by position": ("perplexity", []),
    "sliding windows": ("perplexity", ["--stride", "100"]),
    "passkeys": ("passkey", ["--trials", "5", "--needles", "2"]),
}


@pytest.fixture(scope="module")
def alone(house, tmp_path_factory):
    """{measure: its results on one rank}"""
    output = tmp_path_factory.mktemp("alone")
    return {
        name: run(house, program, "megatron", output / name, *more)[0]
        for name, (program, more) in MEASURES.items()
    }


def assert_alike(found, expected, folder=True):
    assert len(found) == len(expected) == 3
    for row, other in zip(found, expected, strict=True):
        for name, value in other.items():
            if name in ("load", "iteration") and not folder:
                continue
            if name == "answers":
                for one, two in zip(row[name], value, strict=True):
                    assert one[:2] == two[:2] and one[2] == pytest.approx(two[2], abs=2e-3)
            elif isinstance(value, float) or name == "by_document":
                assert row[name] == pytest.approx(value, rel=2e-4), name
            else:
                assert row[name] == value, name


@pytest.mark.parametrize(
    "measure, ranks, layout",
    [
        ("passkeys", 2, [TP, 2]),
        ("by position", 2, [CP, 2, "--batch-tokens", 90]),
        ("passkeys", 2, [CP, 2, "--batch-tokens", 90]),
        ("sliding windows", 2, [PP, 2]),
        ("by position", 4, [TP, 2, CP, 2]),
        ("passkeys", 4, [PP, 2, "--batch-tokens", 130]),  # and two replicas
    ],
    ids=str,
)
def test_every_layout_gives_the_same_figures(house, alone, tmp_path, measure, ranks, layout):
    program, more = MEASURES[measure]
    found, _ = run(
        house, program, "megatron", tmp_path / "out", *more, *map(str, layout), ranks=ranks
    )
    assert_alike(found, alone[measure])


@pytest.mark.parametrize(
    "measure, ranks, layout",
    [("by position", 2, [TP, 2]), ("passkeys", 4, [PP, 2, CP, 2])],
    ids=str,
)
def test_experts_over_ranks_give_the_figures_of_transformers(
    house_of_experts, tmp_path, measure, ranks, layout
):
    program, more = MEASURES[measure]
    expected, _ = run(house_of_experts, program, "hf", tmp_path / "theirs", *more)
    ours = [tmp_path / "ours", *more, *map(str, layout)]
    found, _ = run(house_of_experts, program, "megatron", *ours, ranks=ranks)
    assert_alike(found, expected, folder=False)


@pytest.mark.parametrize("measure", ["by position", "passkeys"])
def test_both_back_ends_give_the_same_figures(house, alone, tmp_path, measure):
    program, more = MEASURES[measure]
    found, _ = run(house, program, "hf", tmp_path / "out", *more, ranks=2)
    assert_alike(found, alone[measure], folder=False)


def test_what_a_model_writes_is_the_same_in_both_back_ends_and_on_context_ranks(house, tmp_path):
    """It finds nothing, so what it writes is compared."""
    tasks = ["--tasks", "single", "multi-key", "--needles", "2", "--trials", "3"]
    tasks += ["--context-lengths", "200", "300"]
    found, texts = {}, {}
    for case, load, ranks, more in (
        ("alone", "megatron", 1, []),
        ("transformers", "hf", 1, ["--batch-tokens", "1000"]),
        ("context ranks", "megatron", 2, [CP, "2", "--batch-tokens", "90"]),
    ):
        output = tmp_path / case
        rows, said = run(house, "ruler", load, output, *tasks, *more, ranks=ranks)
        assert "200, 300 tokens are beyond its window of 128" in said
        found[case] = [[row[name] for name in ("task", "ruler", "answers")] for row in rows]
        parts = results(output.with_name(f"{case}.parts"))
        texts[case] = {json.dumps(row["part"]): row["found"] for row in parts}
    assert found["alone"] == found["transformers"] == found["context ranks"]
    assert [task for task, _, _ in found["alone"]] == ["single", "multi-key"] * 2
    assert texts["alone"] == texts["transformers"] == texts["context ranks"]
    written = {text for answers in texts["alone"].values() for _, _, text in answers}
    assert len(written) > 9  # of 18 answers: they depend on what was read


def test_figures_depend_on_what_is_read(house, alone, tmp_path):
    """What the comparisons above would see."""
    by_position = {row["context_length"]: row["loss"] for row in alone["by position"]}
    windows = {row["context_length"]: row["loss"] for row in alone["sliding windows"]}
    assert len({*by_position.values(), *windows.values()}) == 6
    found, said = run(
        house, "perplexity", "megatron", tmp_path / "out", "--rope-scaling", "linear", TP, "1"
    )
    assert abs(found[-1]["loss"] - by_position[400]) > 1e-3
    assert "model: rope scaling linear x3.125 from 128" in said


@pytest.mark.parametrize("measure", ["sliding windows", "passkeys"])
def test_a_killed_evaluation_is_gone_on_with(house, alone, tmp_path, measure):
    program, more = MEASURES[measure]
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, *words(house, program, "megatron", output, *more, "--batch-tokens", "50")],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    parts = output.with_name("out.parts")
    while process.poll() is None and not (parts.is_file() and parts.read_text()):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = parts.read_text().splitlines()
    assert done
    found, _ = run(house, program, "megatron", output, *more)
    assert_alike(found, alone[measure])
    lines = parts.read_text().splitlines()
    assert lines[: len(done)] == done
    assert len({json.dumps(json.loads(line)["part"]) for line in lines}) == len(lines)


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--tensor-model-parallel-size", "2"], "1 ranks do not divide into"),
        (["--context-lengths", "1000"], "no document has more than 1000 tokens, the longest"),
        (["--max-document-tokens", "500"], "--max-document-tokens has no effect without --stride"),
        (["--prepend-bos"], "--prepend-bos: the tokenizer has no such token"),
    ],
)
def test_bad_input_is_named(house, tmp_path, more, sentence):
    command = words(house, "perplexity", "megatron", tmp_path / "out", *more)
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment(), text=True, capture_output=True
    )
    assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_hugging_face_folder_is_not_divided(house, tmp_path):
    command = words(house, "perplexity", "hf", tmp_path / "out", TP, "2")
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment(), text=True, capture_output=True
    )
    assert done.returncode == 1
    assert "--tensor-model-parallel-size 2: transformers computes a Hugging Face" in done.stderr
