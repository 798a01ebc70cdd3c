"""Our kernels against a copy of as many bytes, and against what they replace."""

from collections.abc import Iterator

import cross_entropy_kernel
import rotary_kernel
from shapes import Scale


def rows(scale: Scale) -> Iterator[dict]:
    """The times of benchmarks/*_kernel.py, and what they are of a copy's."""
    for name, times in (("rotary", rotary_kernel.times), ("loss", cross_entropy_kernel.times)):
        found = times()
        copy = next(row["ms"] for row in found if row["how"] == "a copy")
        for row in found:
            yield {"of": name, **row, "times_a_copy": row["ms"] / copy}
