"""From what the user says of positions to the sampler of a run."""

import dataclasses

from pose_megatron.config.flags import Arguments, PositionFlags
from pose_megatron.errors import ConfigError
from pose_megatron.positions.laws import SAMPLERS
from pose_megatron.positions.sampler import PoseSampler

SENTENCE_ENDS = (".", "!", "?", "\n")  # of longrecipe


def build_sampler(args: Arguments, target: int, tokenizer=None) -> PoseSampler:
    """The sampler of training positions.

    Args:
        target: T, in tokens.
        tokenizer: a tokenizer.Tokenizer, where chunks start after tokens named by their text.

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
    """The position flags that are not at their defaults."""
    defaults, given = dataclasses.asdict(PositionFlags()), dataclasses.asdict(flags)
    return {name: value for name, value in given.items() if value != defaults[name]}


def _token_ids(words: list[str], tokenizer) -> tuple[int, ...]:
    """Ids, or texts that tokens are or end with, to ids."""
    ids = {int(word) for word in words if word.isdecimal()}
    for text in [word for word in words if not word.isdecimal()]:
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


def _stages(words: list[str]) -> tuple[tuple[int, int], ...]:
    try:
        return tuple((int(first), int(target)) for first, target in (w.split(":") for w in words))
    except ValueError:
        raise ConfigError(
            f"--pose-target-schedule {' '.join(words)}: give 'first-sample:target' "
            "words, such as 0:8192 64000:131072"
        ) from None
