"""A converted mixture of experts in pretrain_pose.py, at plain positions: transformers' loss before a
step, and its loss for the export of what that step left."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from pose_megatron.checkpoints.convert import convert
from pose_megatron.checkpoints.huggingface.format import HuggingFace
from pose_megatron.checkpoints.megatron.format import Megatron
from tests.conftest import EOD, write_corpus
from tests.functional_tests.families import CASES, VOCABULARY, make
from tests.functional_tests.test_training import launch

WINDOW = 32
# One document of one window, so that every sample is that text.
TEXT = [*(b"A token goes to two of four experts." * 2)[:WINDOW], EOD]
FLAGS = f"""--seq-length {WINDOW} --micro-batch-size 2 --global-batch-size 4 --train-iters 2
    --split 100,0,0 --num-workers 0 --lr 1e-2 --log-interval 1 --position-sampler full
    --finetune --save-interval 1""".split()


@torch.no_grad()
def loss_in_transformers(folder) -> float:
    tokens = torch.tensor([TEXT])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(tokens, labels=tokens).loss.item()


@pytest.mark.parametrize(
    "name, ranks, layout",
    [
        ("Mixtral", 2, "--expert-model-parallel-size 2"),
        ("Qwen3-MoE, tied, softmax over all", 1, ""),
        ("Qwen3-MoE", 2, "--expert-model-parallel-size 2 --use-distributed-optimizer"),
    ],
)
def test_losses_are_those_of_transformers(tmp_path, name, ranks, layout):
    hf, megatron, save, log = (tmp_path / part for part in ("hf", "mg", "save", "log.jsonl"))
    make(CASES[name], hf)
    # Without rows of padding, which count in Megatron's loss.
    unpadded = HuggingFace(make_vocab_size_divisible_by=VOCABULARY)
    convert(hf, megatron, loader=unpadded, saver="megatron", quiet=True)
    corpus = write_corpus(tmp_path / "text_document", [TEXT])
    paths = ["--data-path", corpus, "--load", megatron, "--save", save, "--log-file", log]
    run = launch(ranks, [*FLAGS, *layout.split(), *map(str, paths)])
    assert run.returncode == 0, run.stderr[-4000:]
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    first, second = (row["loss"] for row in rows if "loss" in row)
    assert first == pytest.approx(loss_in_transformers(hf), rel=1e-6)
    convert(save, tmp_path / "trained", loader=Megatron(iteration=1), saver="hf", quiet=True)
    assert second == pytest.approx(loss_in_transformers(tmp_path / "trained"), rel=1e-6)
    assert second < first - 0.5
