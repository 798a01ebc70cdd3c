"""The same weights in Megatron and in transformers: do both compute the same logits?

In float32, on random tokens, at plain positions and at both ends of the extended window. Where the
two sides are stored in different precisions, each is first rounded to the other's.

At skipped positions only exact angles decide. transformers computes an angle p theta in float32,
rounded once in theta and once in the product: it is off by up to p theta 2^-23 radians, 0.016 at
position 131,071 and 0.125 at 1,048,575, and what that does to logits depends on the model. No bound
on them would tell it from a wrong rope at every T. So what transformers rotates by is compared
itself, frequency by frequency as its model holds them after it has seen the far positions, to the
few roundings of `rope_check.bounds`; and the logits with the angles that these frequencies mean.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pose_megatron.checkpoints.huggingface import rope_check
from pose_megatron.checkpoints.huggingface.format import HuggingFace
from pose_megatron.checkpoints.megatron.directory import Checkpoint
from pose_megatron.checkpoints.megatron.torch_dist import weights_of
from pose_megatron.errors import ConfigError
from pose_megatron.evaluation.logits import load_logits
from pose_megatron.evaluation.stage import round_to
from pose_megatron.evaluation.transformers_reader import load_model
from pose_megatron.rope.scaling import inverse_frequencies
from pose_megatron.runtime.device import device
from pose_megatron.runtime.json_files import naming

Say = Callable[[str], None]  # takes what is done next


@dataclass(frozen=True)
class Difference:
    """The largest difference between two logits, and its bound; both relative to the largest logit
    where that is above 1.

    Attributes:
        where: at which positions, for messages.
        bound: None where nothing is decided.
    """

    where: str
    error: float
    bound: float | None

    def __str__(self) -> str:
        bound = "float32 angles, no bound" if self.bound is None else f"bound {self.bound:g}"
        return f"logits at {self.where}: error {self.error:.1e} ({bound})"


def check(
    found: Checkpoint,
    folder: Path,
    tokens: int = 128,
    seed: int = 0,
    say: Say = lambda doing: None,
) -> list[Difference]:
    """Compares a checkpoint with a Hugging Face folder, prints the differences and returns them.

    Args:
        tokens: per row, of two rows.
        seed: what the tokens are drawn with.
        say: called with what is done next, as large models take long.

    Raises:
        ConfigError: a difference is above its bound.
    """
    differences = logits_differences(found, folder, tokens, seed, say)
    for difference in differences:
        print(difference, flush=True)
    for difference in differences:
        if difference.bound is not None and not difference.error <= difference.bound:
            raise ConfigError(f"{folder} is not the model of {found.path}: {difference}")
    return differences


@torch.no_grad()
def logits_differences(
    found: Checkpoint,
    folder: Path,
    tokens: int = 128,
    seed: int = 0,
    say: Say = lambda doing: None,
) -> list[Difference]:
    """Differences at plain positions, at both ends of the window, and there once more with exact
    angles in transformers; arguments as `check`.

    Raises:
        ConfigError: at both ends, transformers rotates by other frequencies.
    """
    model, scaling = found.model, found.model.rope_scaling
    say("loading both models")
    ours, theirs = _both(found, folder)

    target = model.max_position_embeddings
    if scaling.interpolation.keeps_window:
        target = int(target * scaling.factor)
    length = min(tokens, target // 2 * 2)
    token_ids = torch.randint(
        model.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed)
    ).to(device())
    plain = torch.arange(length, device=device()).expand(2, -1)
    ends = torch.where(plain < length // 2, plain, target - length + plain)
    # A 4-D mask, or transformers takes a jump of positions for the start of another document.
    mask = torch.full((length, length), torch.finfo(torch.float32).min, device=device()).triu(1)
    mask = mask[None, None].expand(2, 1, -1, -1)

    def expected(positions) -> Tensor:
        # At plain positions the mask is transformers' own, which knows sliding windows.
        given = {} if positions is plain else {"position_ids": positions, "attention_mask": mask}
        return theirs(token_ids, use_cache=False, **given).logits

    def difference(found: Tensor, expected: Tensor) -> float:
        return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()

    far = f"positions up to {target - 1:,}"
    say("computing at plain positions")
    at_plain = Difference(
        "plain positions", difference(ours(token_ids, length, plain), expected(plain)), 1e-4
    )
    say(f"computing at {far}")
    our_logits = ours(token_ids, length, ends)
    rounded = Difference(far, difference(our_logits, expected(ends)), None)
    inv_freq = inverse_frequencies(
        model.rotary_dim, model.rotary_base, scaling, target if scaling.depends_on_length else None
    )
    if (rotary := _rotary(theirs)) is not None:
        with naming(folder):
            rope_check.compare(model, rotary.inv_freq, rotary.attention_scaling, target)
    _use_exact_angles(theirs, inv_freq, target)
    say(f"computing at {far} with exact angles")
    exact = Difference(f"{far}, exact angles", difference(our_logits, expected(ends)), 1e-4)
    return [at_plain, rounded, exact]


def _both(found: Checkpoint, folder: Path) -> tuple[Callable[..., Tensor], torch.nn.Module]:
    """Both models in float32, each rounded to the precision that the other's files have."""
    reader, stored = HuggingFace().open(folder), weights_of(found).dtypes
    theirs = load_model(folder, torch.float32, attn_implementation="eager")
    mappings = [mapping for mapping in reader.mappings if mapping.name in stored]
    round_to({part: stored[m.name] for m in mappings for part in m.parts}, theirs)
    return load_logits(found, rounded_to=reader.dtypes), theirs


def _rotary(theirs: Any) -> Any:
    return getattr(getattr(theirs, "model", None), "rotary_emb", None)


def _use_exact_angles(theirs: Any, inv_freq: Tensor, target: int) -> None:
    """Replaces the float32 angles of transformers: its rotary module, or GPT-J's tables."""
    inv_freq = inv_freq.to(device())
    if (rotary := _rotary(theirs)) is not None:
        theirs.model.rotary_emb = ExactAngles(inv_freq, rotary.attention_scaling)
        return
    angles = torch.arange(target, device=device())[:, None] * inv_freq
    table = torch.cat((angles.sin(), angles.cos()), dim=-1).float()
    for module in theirs.modules():
        if hasattr(module, "embed_positions"):
            module.embed_positions = table


class ExactAngles(torch.nn.Module):
    """transformers' rotary embedding with angles computed in float64."""

    def __init__(self, inv_freq: torch.Tensor, attention_scaling: float):
        super().__init__()
        self.inv_freq, self.scaling = inv_freq, attention_scaling

    def forward(self, x, position_ids):
        angles = position_ids[..., None].double() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return (
            (angles.cos() * self.scaling).to(x.dtype),
            (angles.sin() * self.scaling).to(x.dtype),
        )
