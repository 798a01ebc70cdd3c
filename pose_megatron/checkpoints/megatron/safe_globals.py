"""What Megatron-LM's args and progress are pickled from beside plain values."""

import enum
import pickle
import signal
from typing import Any

import torch


def allow_megatron_globals() -> None:
    """Lets torch's weights-only unpickler read them, in this process: classes that megatron-core
    names for this, and members of their enums."""
    from megatron.core.safe_globals import register_safe_globals  # imports much

    register_safe_globals()
    # Python 3.11.0 to 3.11.3 pickles an enum's member by name, getattr(class, name), and a signal
    # as a constant of its module.
    by_name: list[Any] = [(_member, "builtins.getattr")]
    by_name += [(number, f"signal.{number.name}") for number in signal.Signals]
    torch.serialization.add_safe_globals(by_name)


def _member(kind: object, name: str) -> enum.Enum:
    """All that `getattr` may do here."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"getattr of {kind!r}, {name!r}: no member of an enum")
