"""What a perplexity's context lengths allow; without torch, for command lines."""

from collections.abc import Sequence

from pose_megatron.errors import ConfigError


def check_stride(stride: int, context_lengths: Sequence[int]) -> None:
    """
    Raises:
        ConfigError: windows of the shortest context length hold fewer tokens than are scored.
    """
    if not 1 <= stride <= min(context_lengths):
        raise ConfigError(
            f"--stride {stride} must lie between 1 and the shortest context length, "
            f"{min(context_lengths)}"
        )


def check_cut(max_tokens: int, longest: int) -> None:
    """
    Raises:
        ConfigError: documents that are cut there do not fill the longest context length.
    """
    if max_tokens <= longest:
        raise ConfigError(
            f"--max-document-tokens {max_tokens} must exceed the longest context length, {longest}"
        )
