"""Trainers as `pretrain_pose.py` builds them, on random tokens, for the benchmarks of steps.

Also launches a benchmark's ranks, and describes the machine that the figures are from.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pose_megatron.runtime.startup import prepare_megatron

prepare_megatron()

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel

from pose_megatron.config.arguments import parse
from pose_megatron.config.layout import lay_out
from pose_megatron.data.batch import fields_here
from pose_megatron.models.fused_cross_entropy import LossByKernel
from pose_megatron.models.shape import ModelConfig
from pose_megatron.runtime import distributed
from pose_megatron.training.run import assemble
from pose_megatron.training.step import Step, train_step
from pose_megatron.training.trainer import setup


def random_corpus(folder: Path, vocabulary: int, document: int, documents: int = 64) -> str:
    """A corpus of documents of `document` random tokens each; returns its prefix."""
    prefix = folder / "random_text_document"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    generator = torch.Generator().manual_seed(0)
    for _ in range(documents):
        tokens = torch.randint(vocabulary, (document,), generator=generator)
        builder.add_document(tokens, [document])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


class Run:
    """A trainer and its micro-batches.

    Args:
        words: flags of pretrain_pose.py.
        stock: whether to rotate by megatron-core's own RotaryEmbedding at 0, 1, 2, ..., as its
            GPTModel does, over plain positions from the dataset; all else is the same.
    """

    def __init__(self, words: list[str], stock: bool = False):
        args = parse([*words, "--position-sampler", "full"] if stock else words)
        run = assemble(args)
        layout = lay_out(args, run.model, distributed.world_size())
        if not torch.distributed.is_initialized():
            distributed.initialize(args.training.seed, **args.parallel.sizes(run.model.num_layers))
        self.trainer = setup(run, layout)
        train_set, *_ = run.datasets(
            layout.end(args.training)[1], positions_only="tokens" not in fields_here()
        )
        for stage in self.trainer.stages if stock else ():
            stage.__class__, stage.rotary_pos_emb = stock_rotation(stage, run.model)
        self.data = self.trainer.data_iterator(
            train_set, self.trainer.consumed_samples, args.data.num_workers
        )
        for model in self.trainer.models:
            model.train()

    def step(self) -> Step:
        return train_step(self.trainer, self.data)


class StockRotation(LossByKernel, GPTModel):
    """A GPTModel that rotates as megatron-core does; where a kernel computes the loss, it stays."""


def stock_rotation(stage, config: ModelConfig) -> tuple[type, RotaryEmbedding]:
    """The class and the rotary embedding of a PoSE model's stage, without PoSE."""
    rotary = RotaryEmbedding(
        config.kv_channels,
        config.rotary_percent,
        rotary_base=config.rotary_base,
        use_cpu_initialization=not torch.cuda.is_available(),
        cp_group=stage.rotary_pos_emb.cp_group,
    )
    return StockRotation, rotary


def launch(program: str, words: list[str], ranks: int = 1) -> list[dict]:
    """Runs a program with `words` and --rows FILE on `ranks` ranks; returns the rows of FILE."""
    command = [sys.executable, program]
    if ranks > 1:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
            program,
        ]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        run = subprocess.run(
            [*command, *words, "--rows", str(rows)], env=env, capture_output=True, text=True
        )
        if run.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{run.stdout[-2000:]}{run.stderr[-4000:]}")
        return [json.loads(line) for line in rows.read_text().splitlines()]


def report(rows_file: str, **row) -> None:
    """On rank 0, adds a row to the file that `launch` reads."""
    if distributed.rank() == 0:
        with open(rows_file, "a") as file:
            file.write(json.dumps(row) + "\n")


def synchronize() -> None:
    torch.cuda.synchronize()  # nothing on a CPU


def machine() -> dict:
    """The date, the device and the versions of the packages that matter."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": date.today().isoformat(),
        "device": gpu or f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("torch", "megatron-core", "numpy")},
    }
