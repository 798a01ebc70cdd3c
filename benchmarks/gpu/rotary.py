"""The rotary kernel against a copy of as many bytes, the plain path and Transformer Engine's."""

from collections.abc import Iterator

import rotary_kernel
from shapes import Scale


def rows(scale: Scale) -> Iterator[dict]:
    """The times of benchmarks/rotary_kernel.py, and what they are of a copy's."""
    found = rotary_kernel.times()
    copy = next(row["ms"] for row in found if row["how"] == "a copy")
    for row in found:
        yield {**row, "times_a_copy": row["ms"] / copy}
