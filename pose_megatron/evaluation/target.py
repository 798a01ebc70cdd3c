"""The model under evaluation, as it is or with an interpolation put on it."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pose_megatron.checkpoints.huggingface.config_json import read_config
from pose_megatron.checkpoints.huggingface.format import HuggingFace
from pose_megatron.checkpoints.megatron import directory
from pose_megatron.checkpoints.megatron.directory import Checkpoint
from pose_megatron.checkpoints.megatron.torch_dist import weights_of
from pose_megatron.config.flags import ModelFlags, ParallelFlags
from pose_megatron.config.layout import divide_ranks
from pose_megatron.config.model import resolve_model
from pose_megatron.errors import ConfigError, flag_name
from pose_megatron.evaluation.reading import Reader
from pose_megatron.evaluation.stage import load_stage, meet
from pose_megatron.models.families import family_named
from pose_megatron.models.shape import ModelConfig
from pose_megatron.runtime.device import check_bf16
from pose_megatron.runtime.ranks import world_size


@dataclass(frozen=True)
class EvaluationTarget:
    """A model under evaluation: a Megatron checkpoint, or a Hugging Face folder.

    Attributes:
        name: what tables and plots call it.
        lengths: context lengths C in tokens, ascending.
        root: the --load folder.
        found: the checkpoint; None for a Hugging Face folder.
        model: shape and rope, with the interpolation to evaluate.
        window: the context length that model and interpolation are made for, in tokens.
        bf16: whether to compute in bfloat16; else in float32.
        layout: tensor_, pipeline_model_parallel_size and context_parallel_size.
    """

    name: str
    lengths: list[int]
    root: Path
    found: Checkpoint | None
    model: ModelConfig
    window: int
    bf16: bool
    layout: Mapping[str, Any] = field(default_factory=dict)

    def open_reader(self, batch_tokens: int) -> Reader:
        """Loads the weights, on all ranks of the job."""
        if self.found is None:
            from pose_megatron.evaluation.transformers_reader import load_transformers

            meet()
            return load_transformers(self.root, self.model, self.bf16, batch_tokens)
        from pose_megatron.evaluation.megatron_reader import MegatronReader

        stage = load_stage(self.found, self.model, self.bf16, **self.layout)
        return MegatronReader(stage, self.model.vocab_size, batch_tokens)

    @property
    def tokenizer(self) -> Path:
        """Where a tokenizer would be that it carries."""
        return self.root if self.found is None else self.found.root / "tokenizer"

    @property
    def files(self) -> list[Path]:
        """What its weights and its tokenizer are read from."""
        folder = self.root if self.found is None else self.found.path
        tokenizer = [] if self.found is None else self.found.tokenizer_files
        return [*filter(Path.is_file, folder.iterdir()), *tokenizer]

    @property
    def row(self) -> dict:
        """What all of its results have in common."""
        rope = self.model.rope_scaling
        options = {
            f.name: value
            for f in dataclasses.fields(rope)
            if (value := getattr(rope, f.name)) != f.default
            and f.name not in ("method", "factor", "over")
        }
        return {
            "load": str(self.root),
            "iteration": self.found.iteration if self.found else None,
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
    bf16: bool | None = None,
    name: str | None = None,
    **layout: Any,
) -> EvaluationTarget:
    """Finds a model and reads its description, no weights.

    Args:
        load: a Megatron checkpoint's folder, or one with config.json.
        context_lengths: C in tokens, in any order.
        iteration: default: the latest.
        rope_scaling: interpolates up to the longest context a checkpoint that is not interpolated;
            `_factor` and `_config` as the flags of pretrain_pose.py.
        bf16: whether to compute in bfloat16, else in float32; None: on a GPU, where most weights
            have 16 bits.
        name: default: the folder's.
        layout: sizes of model parallelism; 1 where not given.

    Raises:
        ConfigError: a length below 2, a model that is not ours, one that is interpolated already,
            a layout that it cannot have, or a GPU without bfloat16.
        DamagedCheckpoint: there is no checkpoint, or it cannot be read.
    """
    lengths = sorted(set(context_lengths))
    if lengths[0] < 2:
        raise ConfigError(f"--context-lengths {lengths[0]} must be at least 2")
    found = None
    if (Path(load) / HuggingFace.mark).is_file() and not directory.exists(load):
        if iteration is not None:
            raise ConfigError(f"--iteration {iteration}: {load} is a Hugging Face folder")
        original = read_config(Path(load), 1)
        if not (family := family_named(original.family)).in_transformers:
            raise ConfigError(
                f"--load {load}: transformers has no class for {family.title}; convert it with "
                "tools/checkpoint/convert.py --loader hf --saver megatron"
            )
    else:
        found = directory.find(load, iteration)
        original = found.model
    ways = [f"{flag_name(name)} {size}" for name, size in layout.items() if size > 1]
    if found is None and ways:
        raise ConfigError(
            f"{ways[0]}: transformers computes a Hugging Face folder in one process; convert "
            f"{load} with tools/checkpoint/convert.py --loader hf --saver megatron"
        )
    divide_ranks(ParallelFlags(**layout), original, world_size())
    model = resolve_model(
        ModelFlags(
            rope_scaling=rope_scaling,
            rope_scaling_factor=rope_scaling_factor,
            rope_scaling_config=rope_scaling_config,
            max_position_embeddings=lengths[-1] if rope_scaling else None,
        ),
        lengths[0],
        original,
        None,
    )
    scaling = model.rope_scaling
    if rope_scaling not in (None, "none") and scaling.factor == 1:
        raise ConfigError(
            f"--rope-scaling {rope_scaling} up to --context-lengths {lengths[-1]} has factor 1, as "
            f"the window is {original.max_position_embeddings}: give --rope-scaling-factor, the "
            "same for all lengths that are to be compared"
        )
    window = original.max_position_embeddings if rope_scaling is None else lengths[-1]
    if rope_scaling is None and original.rope_scaling.interpolation.keeps_window:
        window = int(window * original.rope_scaling.factor)
    root = Path(load)
    if bf16 is None:
        bf16 = torch.cuda.is_available() and _has_16_bits(root, found)
    if bf16:
        check_bf16()
    return EvaluationTarget(name or root.name, lengths, root, found, model, window, bf16, layout)


def _has_16_bits(root: Path, found: Checkpoint | None) -> bool:
    """Whether most tensors of a checkpoint, or of a Hugging Face folder, are stored so."""
    dtypes = weights_of(found).dtypes if found else HuggingFace().open(root).dtypes
    ((most, _),) = Counter(dtypes.values()).most_common(1)
    return most.itemsize == 2
