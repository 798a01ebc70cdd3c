"""Files made to run code, to hang or to fill memory, in every place that our programs read."""

import contextlib
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata

ITERATION = "run/iter_0000002"  # a whole Megatron checkpoint, in the folder of make()
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


@contextlib.contextmanager
def edited_metadata(folder: Path) -> Iterator[Metadata]:
    """torch's index of the checkpoint, which is written again afterwards."""
    metadata = FileSystemReader(folder / ITERATION).read_metadata()
    yield metadata
    (folder / ITERATION / ".metadata").write_bytes(pickle.dumps(metadata))


def without_args(folder: Path) -> None:
    """Leaves the model of the checkpoint to run_config.yaml."""
    file = folder / ITERATION / "common.pt"
    common = torch.load(file, weights_only=False)
    torch.save({k: v for k, v in common.items() if k not in ("args", "pose_megatron")}, file)
