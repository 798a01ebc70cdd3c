"""The position flags in, the sampler of a run out."""

import dataclasses
from collections.abc import Sequence

from pose_megatron.config.flags import Arguments, PositionFlags
from pose_megatron.errors import ConfigError
from pose_megatron.positions.laws import SAMPLERS
from pose_megatron.positions.sampler import PoseSampler

SENTENCE_ENDS = (".", "!", "?", "\n")  # longrecipe's default boundaries


def build_sampler(args: Arguments, target: int, tokenizer=None) -> PoseSampler:
    """The sampler of training positions.

    Args:
        target: T, in tokens.
        tokenizer: preprocessing's Tokenizer, needed where --pose-boundaries holds texts.

    Raises:
        ConfigError: naming the flag, its value and the way out.
    """
    p, window = args.position, args.data.seq_length
    name = p.position_sampler or ("pose" if target > window else "full")
    boundaries = p.pose_boundaries
    if name in SAMPLERS and SAMPLERS[name].reads_tokens:
        boundaries = boundaries or list(SENTENCE_ENDS if name == "longrecipe" else ())
    elif boundaries:
        raise ConfigError(
            f"--pose-boundaries {' '.join(boundaries)} has no effect with --position-sampler "
            f"{name}, which does not read tokens"
        )
    return PoseSampler(
        window,
        target,
        name,
        p.pose_num_chunks,
        p.pose_content,
        args.training.seed,
        p.pose_skip_law,
        _token_ids(boundaries, tokenizer),
        p.pose_plain_fraction,
        _stages(p.pose_target_schedule),
    )


def non_default_flags(flags: PositionFlags) -> dict:
    """The position flags that differ from their defaults."""
    defaults, given = dataclasses.asdict(PositionFlags()), dataclasses.asdict(flags)
    return {name: value for name, value in given.items() if value != defaults[name]}


def _token_ids(boundaries: Sequence[str], tokenizer) -> tuple[int, ...]:
    """Ids of the boundaries: an id itself, or every token that is a text or ends with it."""
    ids = {int(boundary) for boundary in boundaries if boundary.isdecimal()}
    for text in [boundary for boundary in boundaries if not boundary.isdecimal()]:
        if tokenizer is None:
            raise ConfigError(
                f"--pose-boundaries {text!r} is a text: name the tokenizer with --tokenizer-model, "
                "or give token ids"
            )
        found = tokenizer.ids_ending(text)
        if not found:
            raise ConfigError(
                f"--pose-boundaries {text!r}: no token of the tokenizer is that text "
                "or ends with it"
            )
        ids.update(found)
    return tuple(sorted(ids))


def _stages(schedule: list[str]) -> tuple[tuple[int, int], ...]:
    """((first sample, target), ...) of --pose-target-schedule."""
    try:
        pairs = (stage.split(":") for stage in schedule)
        return tuple((int(first), int(target)) for first, target in pairs)
    except ValueError:
        raise ConfigError(
            f"--pose-target-schedule {' '.join(schedule)}: give 'first-sample:target' "
            "words, such as 0:8192 64000:131072"
        ) from None
