"""tools/checkpoint/: convert, verify and checkpoint_inspector as programs, on one small extended LLaMA."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from pose_megatron.checkpoints.huggingface import config_json
from pose_megatron.rope.scaling import RopeScaling
from tests.whole_models import hf_to_megatron, write_weights

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "checkpoint"


def run(tool, *words, cwd=None):
    """(exit code, output, errors) of a tool."""
    done = subprocess.run(
        [sys.executable, TOOLS / f"{tool}.py", *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def megatron(tmp_path_factory):
    """A LLaMA of window 128, extended to 1024 with YaRN."""
    folder = tmp_path_factory.mktemp("tools")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=2,
            hidden_size=64,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=301,
            max_position_embeddings=128,
            initializer_range=0.2,
        )
    ).save_pretrained(folder / "source")
    model = config_json.read_config(folder / "source")
    tensors = load_file(folder / "source" / "model.safetensors")
    extended = dataclasses.replace(
        model, max_position_embeddings=1024, rope_scaling=RopeScaling("yarn", 8.0, 128)
    )
    whole = hf_to_megatron(tensors, **config_json.sizes(model))
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        whole[name][301:] = 0.1  # the vocabulary's padding, as training leaves it
    write_weights(folder / "pose", whole, extended)
    return folder / "pose"


def test_an_export_is_verified_compared_and_inspected(megatron, tmp_path):
    to_hf = ("--loader", "megatron", "--saver", "hf", "--load-dir", megatron)
    code, said, wrong = run(
        "convert", *to_hf, "--save-dir", tmp_path / "hf", "--json", tmp_path / "report.json"
    )
    assert code == 0, wrong
    assert "rope as transformers reads it: relative errors: inv_freq" in said
    assert "logits at plain positions: error" in said
    assert "logits at positions up to 1,023, exact angles: error" in said
    assert "note: transformers 4.43 to 4.50 read yarn as if" in said
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["logits_errors"]["plain positions"] < 1e-4 and len(report["logits_errors"]) == 3

    code, said, wrong = run("verify", "--megatron", megatron, "--hf", tmp_path / "hf", cwd=TOOLS)
    assert code == 0 and said.count("(bound") == 4, wrong  # none for float32 angles

    code, said, wrong = run(
        "checkpoint_inspector", "--diff", "--json", megatron.parent / "source", tmp_path / "hf"
    )
    assert code == 1, wrong
    changed = json.loads(said)
    assert changed.keys() == {"config"}
    assert changed["config"]["rope_scaling.method"] == ["none", "yarn"]
    assert changed["config"]["max_position_embeddings"] == [128, 1024]


def test_a_mistake_is_answered_in_one_sentence(tmp_path):
    code, _, wrong = run("checkpoint_inspector", tmp_path)
    assert code == 1 and wrong.count("\n") == 1
    assert wrong.endswith("has no latest_checkpointed_iteration.txt\n")
