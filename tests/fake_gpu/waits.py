"""Where in Python the host waits for the device."""

import contextlib
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from packaging.version import Version

HERE = str(Path(__file__).resolve().parent)
ROOT = str(Path(HERE).parents[1])
FRAMES = 3  # callers of a line that are named with it

_ASKS_FOR_TOKENS = Version(version("megatron-core")) < Version("0.18")


def expected(model_chunks: int = 1) -> int:
    """In a step: for the loss and the norm; older cores ask of each chunk if there were tokens."""
    return 2 + model_chunks * _ASKS_FOR_TOKENS


@contextlib.contextmanager
def noted_waits() -> Iterator[Counter]:
    """{lines: how often torch waited there}, innermost first; filled while the context lasts."""
    found: Counter = Counter()
    synchronize = torch.cuda.synchronize

    def note(message="", *args, **kwargs) -> None:
        if "called a synchronizing" in str(message):
            found[_lines()] += 1

    def noted_synchronize(device=None) -> None:
        found[_lines()] += 1
        synchronize(device)

    with (
        warnings.catch_warnings(),
        mock.patch.object(warnings, "showwarning", note),
        mock.patch.object(torch.cuda, "synchronize", noted_synchronize),
    ):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _lines() -> str:
    stack = [
        frame
        for frame in reversed(traceback.extract_stack())
        if not frame.filename.startswith(HERE)
        and "/torch/" not in frame.filename
        and not frame.filename.endswith(("warnings.py", "contextlib.py"))
    ]
    return " < ".join(
        f"{frame.filename.rpartition('site-packages/')[2].removeprefix(f'{ROOT}/')}:{frame.lineno}"
        for frame in stack[:FRAMES]
    )
