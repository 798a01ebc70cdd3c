"""The checkpoint under evaluation, as it is or with an interpolation put on it."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pose_megatron.checkpoints.megatron.directory import Checkpoint, find
from pose_megatron.config.flags import ModelFlags
from pose_megatron.config.model import resolve_model
from pose_megatron.errors import ConfigError
from pose_megatron.evaluation.logits import load_logits
from pose_megatron.models.shape import ModelConfig


@dataclass(frozen=True)
class EvaluationTarget:
    """A checkpoint under evaluation.

    Attributes:
        name: what tables and plots call it.
        lengths: context lengths C in tokens, ascending.
        model: shape and rope, with the interpolation to evaluate.
        bf16: whether to compute in bfloat16; else in float32.
    """

    name: str
    lengths: list[int]
    found: Checkpoint
    model: ModelConfig
    bf16: bool

    def load_logits(self):
        """Loads the weights; the logits function of logits.py, in one process."""
        return load_logits(self.found, self.model, self.bf16)

    @property
    def row(self) -> dict:
        """What all of its results have in common, for report.append."""
        rope = self.model.rope_scaling
        options = {
            f.name: value
            for f in dataclasses.fields(rope)
            if (value := getattr(rope, f.name)) != f.default
            and f.name not in ("method", "factor", "over")
        }
        return {
            "load": str(self.found.root),
            "iteration": self.found.iteration,
            "rope_scaling": rope.method,
            "rope_scaling_factor": rope.factor,
            "rope_scaling_config": options | ({"over": str(rope.over)} if rope.over else {}),
            "bf16": self.bf16,
        }


def find_target(
    load: str,
    context_lengths: Iterable[int],
    *,
    iteration: int | None = None,
    rope_scaling: str | None = None,
    rope_scaling_factor: float | None = None,
    rope_scaling_config: str | None = None,
    bf16: bool = False,
    name: str | None = None,
) -> EvaluationTarget:
    """Finds a checkpoint and reads its description, no weights.

    Args:
        load: Megatron checkpoint folder.
        context_lengths: C in tokens, in any order.
        iteration: default: the latest.
        rope_scaling: interpolates up to the longest context a checkpoint that is not interpolated;
            `_factor` and `_config` as the flags of pretrain_pose.py.
        name: default: the folder's.

    Raises:
        ConfigError: a length below 2, a model that is not ours, or one that is interpolated
            already.
        DamagedCheckpoint: there is no checkpoint, or it cannot be read.
    """
    lengths = sorted(set(context_lengths))
    if lengths[0] < 2:
        raise ConfigError(f"--context-lengths {lengths[0]} must be at least 2")
    found = find(load, iteration)
    model = resolve_model(
        ModelFlags(
            rope_scaling=rope_scaling,
            rope_scaling_factor=rope_scaling_factor,
            rope_scaling_config=rope_scaling_config,
            max_position_embeddings=lengths[-1] if rope_scaling else None,
        ),
        lengths[0],
        found.model,
        None,
    )
    scaling = model.rope_scaling
    if rope_scaling not in (None, "none") and scaling.factor == 1:
        raise ConfigError(
            f"--rope-scaling {rope_scaling} up to --context-lengths {lengths[-1]} has factor 1, as "
            f"the window is {found.model.max_position_embeddings}: give --rope-scaling-factor, the "
            "same for all lengths that are to be compared"
        )
    return EvaluationTarget(name or Path(load).name, lengths, found, model, bf16)
