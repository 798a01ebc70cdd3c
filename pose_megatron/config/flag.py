"""A flag as a dataclass field, and the check of a group of them."""

from collections.abc import Collection
from dataclasses import field, fields
from typing import Any

from pose_megatron.errors import ConfigError, flag_name
from pose_megatron.runtime.ranges import Range


def flag(
    default,
    help: str,
    choices: Collection[str] | None = None,
    nargs: str | int | None = None,
    within: Range | None = None,
    in_yaml: type | None = None,
) -> Any:
    """A dataclass field that is a flag; `choices` and `nargs` as argparse's.

    Args:
        within: the numbers that it takes; each numeric flag has them.
        in_yaml: what its text may be in run.yaml: a list, of what stands between commas, or a dict,
            for a JSON object.
    """
    metadata: dict[str, Any] = {"help": help, "choices": choices, "nargs": nargs}
    metadata |= {"within": within, "in_yaml": in_yaml}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Flags:
    """A group of flags.

    Raises:
        ConfigError: a number is outside its flag's range.
    """

    def __post_init__(self):
        for f in fields(self):  # type: ignore[arg-type]  # the groups are dataclasses
            value, within = getattr(self, f.name), f.metadata["within"]
            for number in value if isinstance(value, list) else [value]:
                if within and number is not None and (fault := within.fault(number)):
                    raise ConfigError(f"{flag_name(f.name)} {fault}")
