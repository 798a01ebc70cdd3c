"""What an evaluation has found so far: written as it comes, found again by the same command.

A part is what one document, or one haystack, gave: a line of JSON in OUTPUT.parts, beside the
results in OUTPUT. Parts count for a run under equal conditions on unchanged files.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pose_megatron.evaluation.results import append
from pose_megatron.runtime.ranks import rank


class Record:
    """The lines of one evaluation in its files; all ranks hold it, rank 0 writes.

    Args:
        path: --output; None: nothing is kept.
        conditions: what all lines of this evaluation say: name, metric, and how it is measured.
        files: what was read; a part is found again only while their sizes and times are the same.
    """

    def __init__(self, path: str | None, conditions: Mapping[str, Any], files: Iterable[Path]):
        self.path, self._parts = path, f"{path}.parts" if path else None
        self.conditions = json.loads(json.dumps(dict(conditions)))
        self._files = fingerprint(files)
        reads = path is not None and rank() == 0
        parts = _lines(f"{path}.parts") if reads else []
        self._found = {_key(row["part"]): row["found"] for row in parts if self._is_ours(row)}
        self._rows = _lines(str(path)) if reads else []

    def share(self) -> None:
        """Gives every rank what rank 0 has found; once the ranks have met."""
        found = [self._found]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(found, src=0)
        self._found = found[0]

    def found(self, **part: Any) -> Any:
        """What this part gave; None if it is not done."""
        return self._found.get(_key(part))

    def add(self, found: Any, **part: Any) -> None:
        self._found[_key(part)] = found
        own = {"part": part, "found": found, "files": self._files}
        if rank() == 0:
            append(self._parts, [self.conditions | own])

    def finish(self, row: Mapping[str, Any]) -> None:
        """Writes a result, unless it stands there already."""
        whole = self.conditions | json.loads(json.dumps(dict(row)))
        if rank() == 0 and whole not in self._rows:
            append(self.path, [whole])

    def _is_ours(self, row: Mapping[str, Any]) -> bool:
        own = {"part", "found", "files"}
        conditions = {name: value for name, value in row.items() if name not in own}
        return conditions == self.conditions and row.get("files") == self._files


def fingerprint(files: Iterable[Path]) -> str:
    """Changes with the names, sizes or times of files."""
    known = hashlib.blake2b(digest_size=8)
    for file in sorted(files):
        status = file.stat()
        known.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return known.hexdigest()


def _key(part: Mapping[str, Any]) -> str:
    return json.dumps(part, sort_keys=True)


def _lines(path: str) -> list[dict]:
    """The objects in a file of JSON lines; what else it holds, `results.read` names."""
    rows = []
    if Path(path).is_file():
        for line in Path(path).read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows
