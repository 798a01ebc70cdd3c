"""What a conversion tells its user: warnings, progress, and seconds."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor
from tqdm import tqdm

from pose_megatron.checkpoints.mapping import ParamMapping
from pose_megatron.checkpoints.transfer import count_nonfinite
from pose_megatron.errors import ConfigError

Advance = Callable[[int], None]  # takes the bytes that were just done


class Problems:
    """Warnings; each is an error if `strict`.

    Attributes:
        nonfinite: how many values are NaN or infinite, by tensor.
    """

    def __init__(self, strict: bool):
        self._strict = strict
        self.nonfinite: dict[str, int] = {}

    def add(self, warning: str) -> None:
        if self._strict:
            raise ConfigError(f"{warning} (--strict)")
        print(f"warning: {warning}", file=sys.stderr, flush=True)

    def inspect(self, mapping: ParamMapping, tensor: Tensor) -> None:
        """Counts values that are NaN or infinite."""
        if count := count_nonfinite(tensor):
            self.nonfinite[mapping.name] = count
            if self._strict:
                self.report()

    def report(self) -> None:
        """One warning for all such values."""
        if self.nonfinite:
            names = sorted(self.nonfinite)
            more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
            self.add(
                f"{sum(self.nonfinite.values())} values are NaN or infinite, in {names[0]}{more}"
            )


class Report:
    """What a conversion prints, unless `quiet`; the seconds of its phases go to `seconds`."""

    def __init__(self, quiet: bool, seconds: dict[str, float]):
        self._quiet, self._seconds = quiet, seconds

    def say(self, text: str) -> None:
        if not self._quiet:
            print(text, flush=True)

    def rope(self, errors: Sequence[Mapping[str, float]]) -> None:
        """The rope of each folder that transformers reads."""
        for folder in errors:
            numbers = ", ".join(f"{name} {error:.1e}" for name, error in folder.items())
            numbers = numbers or "transformers has no class for it"
            self.say(f"rope as transformers reads it: relative errors: {numbers}")

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[Advance]:
        """A progress bar in bytes on a terminal; everywhere one line with MB/s at the end."""
        start, done = time.perf_counter(), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            bar.update(count)

        # Rank 0's share stands for all. None: no bar without a terminal.
        with tqdm(
            desc=name,
            total=total,
            unit="B",
            unit_scale=True,
            leave=False,
            disable=True if self._quiet else None,
        ) as bar:
            yield advance
        self._seconds[name] = seconds = round(time.perf_counter() - start, 3)
        self.say(
            f"{name:7} {done / 1e6:10,.1f} MB {seconds:8.1f} s "
            f"{done / 1e6 / max(seconds, 1e-3):8,.0f} MB/s"
        )
