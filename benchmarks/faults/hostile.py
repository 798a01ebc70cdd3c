"""Files made to run code, to hang or to fill memory, in every place that our programs read."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Put = Callable[[Path], None]  # takes a copy of make()'s folder


@dataclass(frozen=True)
class Case:
    """Something hostile in one place.

    Attributes:
        kind: for the table.
        put: puts it into a copy of the folder of make().
        programs: what reads it; {in} is the copy.
        harmless: whether a program may pass it over.
    """

    kind: str
    name: str
    put: Put
    programs: tuple[str, ...]
    harmless: bool = False


def edit(file: Path, **values: object) -> None:
    """Sets keys of a JSON file."""
    content = json.loads(file.read_text(encoding="utf-8")) | values
    file.write_text(json.dumps(content), encoding="utf-8")
