"""The same weights in Megatron and in transformers: do both compute the same logits?

In float32, on random tokens, at plain positions and at both ends of the extended window. Where the
two sides are stored in different precisions, each is first rounded to the other's.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from pose_megatron.checkpoints.huggingface import config_json
from pose_megatron.checkpoints.megatron.directory import Checkpoint
from pose_megatron.checkpoints.megatron.torch_dist import open_weights
from pose_megatron.errors import ConfigError
from pose_megatron.evaluation.logits import load_logits, round_to
from pose_megatron.rope.scaling import inverse_frequencies
from pose_megatron.runtime.distributed import device


@dataclass(frozen=True)
class Difference:
    """The largest difference between two logits, and its bound; both relative to the largest logit
    where that is above 1.

    Attributes:
        where: at which positions, for messages.
    """

    where: str
    error: float
    bound: float

    def __str__(self) -> str:
        return f"logits at {self.where}: error {self.error:.1e} (bound {self.bound:g})"


def check(found: Checkpoint, folder: Path, tokens: int = 128, seed: int = 0) -> list[Difference]:
    """Compares a checkpoint with a Hugging Face folder, prints the differences and returns them.

    Args:
        tokens: per row, of two rows.
        seed: what the tokens are drawn with.

    Raises:
        ConfigError: a difference is above its bound.
    """
    differences = logits_differences(found, folder, tokens, seed)
    for difference in differences:
        print(difference, flush=True)
    for difference in differences:
        if not difference.error <= difference.bound:
            raise ConfigError(f"{folder} is not the model of {found.path}: {difference}")
    return differences


@torch.no_grad()
def logits_differences(
    found: Checkpoint, folder: Path, tokens: int = 128, seed: int = 0
) -> list[Difference]:
    """Differences at plain positions, at both ends of the window, and there once more with exact
    angles in transformers; arguments as `check`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, scaling = found.model, found.model.rope_scaling
    ours = load_logits(found, rounded_to=config_json.stored_dtype(folder))
    theirs = (
        AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="eager",
        )
        .eval()
        .to(device())
    )
    round_to(next(iter(open_weights(found.path).dtypes.values())), theirs)

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

    def difference(positions) -> float:
        expected = theirs(
            token_ids, position_ids=positions, attention_mask=mask, use_cache=False
        ).logits
        wrong = (ours(token_ids, length, positions) - expected).abs().max()
        return (wrong / expected.abs().max().clamp(min=1)).item()

    far = f"positions up to {target - 1:,}"
    found_differences = [
        Difference("plain positions", difference(plain), 1e-4),
        Difference(far, difference(ends), 5e-3),
    ]
    rotary = getattr(getattr(theirs, "model", None), "rotary_emb", None)
    if rotary is not None:
        inv_freq = inverse_frequencies(
            model.rotary_dim,
            model.rotary_base,
            scaling,
            target if scaling.depends_on_length else None,
        )
        theirs.model.rotary_emb = ExactAngles(inv_freq.to(device()), rotary.attention_scaling)
        found_differences.append(Difference(f"{far}, exact angles", difference(ends), 1e-4))
    return found_differences


class ExactAngles(torch.nn.Module):
    """transformers' rotary embedding with angles computed in float64.

    transformers multiplies in float32 by a float32 frequency, and is off by up to 8e-3 radians at
    position 131,071. `rope_check.rope_errors` checks the frequencies themselves.
    """

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
