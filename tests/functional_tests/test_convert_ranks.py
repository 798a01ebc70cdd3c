"""Conversion by several processes, and of checkpoints that several ranks load and save."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.functional_tests.families import (
    CASES,
    convert_tool,
    make,
    same_bits,
    stored,
    vivid,
)
from tests.functional_tests.relayout import RELAYOUTS
from tests.processes import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "checkpoint" / "convert.py"


def torchrun(ranks: int, *words, check: bool = True) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
            *map(str, words),
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """A model with biases, grouped queries, and a head of its own; in float32."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("ranks") / "hf"
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=257,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=False,
        )
    )
    vivid(dict(model.named_parameters()))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def megatron(qwen) -> Path:
    """Of it, by three processes."""
    out = torchrun(
        3,
        TOOL,
        "--loader",
        "hf",
        "--saver",
        "megatron",
        "--load-dir",
        qwen,
        "--save-dir",
        qwen.parent / "meg",
    ).stdout
    assert out.count("verify") == 1 and out.count(f"wrote {qwen.parent / 'meg'}") == 1
    return qwen.parent / "meg"


def test_several_processes_share_a_conversion(qwen, megatron, tmp_path):
    files = sorted(p.name for p in (megatron / "release").glob("__*.distcp"))
    assert len(files) >= 3  # each wrote its own
    run = convert_tool()
    words = "--loader", "megatron", "--saver", "hf", "--load-dir", megatron
    run(*words, "--save-dir", tmp_path / "alone")
    assert same_bits(qwen, tmp_path / "alone")
    torchrun(
        2,
        TOOL,
        *words,
        "--save-dir",
        tmp_path / "shared",
        "--max-shard-size",
        "100KB",
        "--dtype",
        "bfloat16",
    )
    assert len(list((tmp_path / "shared").glob("*.safetensors"))) > 2
    there, back = stored(qwen), stored(tmp_path / "shared")
    assert there.keys() == back.keys()
    assert all(torch.equal(there[name].bfloat16(), back[name]) for name in there)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "shared"]


def test_what_one_process_finds_ends_all_of_them(qwen, tmp_path):
    spoiled = stored(qwen)
    spoiled["model.layers.3.mlp.down_proj.weight"][0, 0] = float("nan")
    from safetensors.torch import save_file

    (tmp_path / "hf").mkdir()
    save_file(spoiled, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_bytes((qwen / "config.json").read_bytes())
    done = torchrun(
        2,
        TOOL,
        "--loader",
        "hf",
        "--saver",
        "megatron",
        "--load-dir",
        tmp_path / "hf",
        "--save-dir",
        tmp_path / "meg",
        "--strict",
        check=False,
    )
    assert done.returncode != 0 and "1 values are NaN or infinite, in decoder.layers" in done.stderr
    assert not (tmp_path / "meg").exists()


def test_any_layout_loads_it_and_is_exported_without_ranks(qwen, megatron, tmp_path, stdlib_corpus):
    torchrun(4, ROOT / "tests/functional_tests/relayout.py", megatron, stdlib_corpus, tmp_path)
    run = convert_tool()
    for name in RELAYOUTS:
        assert (tmp_path / name / "latest_checkpointed_iteration.txt").read_text() == "1"
        run(
            "--loader",
            "megatron",
            "--saver",
            "hf",
            "--load-dir",
            tmp_path / name,
            "--save-dir",
            tmp_path / f"{name} out",
            "--no-verify",
        )
        assert same_bits(qwen, tmp_path / f"{name} out"), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_stock_megatron_core_loads_experts_over_ranks(tmp_path, ranks):
    """Every tensor of every expert, and transformers' logits."""
    make(CASES["Qwen3-MoE"], tmp_path / "hf")
    convert_tool()(
        "--loader",
        "hf",
        "--saver",
        "megatron",
        "--load-dir",
        tmp_path / "hf",
        "--save-dir",
        tmp_path / "megatron",
        "--no-verify",
    )
    program = ROOT / "tests" / "functional_tests" / "stock_experts.py"
    done = torchrun(ranks, program, tmp_path / "hf", tmp_path / "megatron")
    assert f"{ranks} ranks: every expert, and logits to" in done.stdout
