"""The checkpoint that an evaluation tool looks at: its flags, its logits, and the results' file."""

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pose_megatron.checkpoints.megatron.directory import Checkpoint, find
from pose_megatron.config.flags import ModelFlags
from pose_megatron.config.model import resolve_model
from pose_megatron.errors import ConfigError
from pose_megatron.evaluation.logits import load_logits
from pose_megatron.models.shape import ModelConfig
from pose_megatron.rope.scaling import METHODS
from pose_megatron.runtime.cli import positive


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What every evaluation tool asks for."""
    add = parser.add_argument
    add("--load", required=True, help="Megatron checkpoint folder")
    add("--iteration", type=int, help="default: the latest")
    add("--context-lengths", type=positive, nargs="+", required=True, metavar="TOKENS")
    add("--batch-tokens", type=positive, default=16384, help="input tokens of one forward pass")
    add("--rope-scaling", choices=METHODS, help="interpolate a checkpoint that is not yet")
    add("--rope-scaling-factor", type=float, help="default: longest context / original window")
    add("--rope-scaling-config", metavar="JSON", help="its other options, as in pretrain_pose.py")
    add("--bf16", action="store_true")
    add("--name", help="label in tables and plots (default: the folder's name)")
    add("--output", help="JSON lines file to append to")


@dataclass(frozen=True)
class Subject:
    """A checkpoint under evaluation.

    Attributes:
        name: in tables and plots.
        lengths: context lengths C, ascending.
        model: with the interpolation that the flags ask for.
    """

    name: str
    lengths: list[int]
    found: Checkpoint
    model: ModelConfig
    bf16: bool

    def logits(self):
        """Loads the weights: a logits function of one process, as `evaluation.Logits`."""
        return load_logits(self.found, self.model, self.bf16)

    @property
    def row(self) -> dict:
        """What is the same in all of its results."""
        rope = self.model.rope_scaling
        return {
            "load": str(self.found.root),
            "iteration": self.found.iteration,
            "rope_scaling": rope.method,
            "rope_scaling_factor": rope.factor,
        }


def resolve(flags: argparse.Namespace) -> Subject:
    """The checkpoint that flags name.

    Raises:
        ConfigError: there is none, or it is interpolated already.
    """
    lengths = sorted(set(flags.context_lengths))
    if lengths[0] < 2:
        raise ConfigError(f"--context-lengths {lengths[0]} must be at least 2")
    found = find(flags.load, flags.iteration)
    model = resolve_model(
        ModelFlags(
            rope_scaling=flags.rope_scaling,
            rope_scaling_factor=flags.rope_scaling_factor,
            rope_scaling_config=flags.rope_scaling_config,
            max_position_embeddings=lengths[-1] if flags.rope_scaling else None,
        ),
        lengths[0],
        found.model,
        None,
    )
    return Subject(flags.name or Path(flags.load).name, lengths, found, model, flags.bf16)


def append(path: str | None, rows: Iterable[dict]) -> None:
    """Adds results to a file of JSON lines, if there is one."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
