"""What an evaluation has found so far: written as it comes, found again by the same command.

A part is what one document, or one haystack, gave: a line of JSON in OUTPUT.parts, beside the
results in OUTPUT. Parts count for a run under equal conditions on unchanged files.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pose_megatron.evaluation.provenance import provenance
from pose_megatron.evaluation.replicas import batches, shared
from pose_megatron.evaluation.results import append
from pose_megatron.runtime.ranks import rank


class Record:
    """The lines of one evaluation in its files; all ranks hold it, rank 0 reads and writes.

    It is made once the ranks have met.

    Args:
        path: --output; None: nothing is kept.
        conditions: what all lines of this evaluation say: name, metric, and how it is measured.
        files: what was read; a part is found again only while their sizes and times are the same.

    Attributes:
        skipped: called with the number of tokens that are not read, as their parts are found.
    """

    def __init__(self, path: str | None, conditions: Mapping[str, Any], files: Iterable[Path]):
        self.path = path
        self.conditions = json.loads(json.dumps(dict(conditions)))
        self._files = fingerprint(file for file in files if not _is_record(file))
        self._parts = f"{path}.parts" if path else None
        parts = [row for row in _lines(self._parts) if self._is_ours(row)]
        found = [{_key(row["part"]): row["found"] for row in parts}]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(found, src=0)
        self._found = found[0]
        self._rows = {_key(_without(row, {"made"})) for row in _lines(path)}
        self.skipped: Callable[[int], object] = lambda tokens: None

    def complete(
        self,
        parts: Sequence[Mapping[str, Any]],
        tokens: Sequence[int],
        work: Callable[[Sequence[int]], Sequence[Any]],
        at_once: int = 1,
        done: Callable[[int, Any], object] = lambda number, found: None,
    ) -> list:
        """What all parts gave: those that are not done are measured now, and written as they end.

        Args:
            tokens: how many each part reads.
            work: what the parts of these numbers give; each replica has its own.
            at_once: how many of them a replica measures side by side.
            done: called with each part's number and what it gave.
        """
        todo = [i for i, part in enumerate(parts) if self.found(**part) is None]
        self.skipped(sum(tokens) - sum(tokens[i] for i in todo))
        for some, results in shared(batches(todo, at_once), work):
            for i, found in zip(some, results, strict=True):
                self.add(found, **parts[i])
                done(i, found)
        return [self.found(**part) for part in parts]

    def found(self, **part: Any) -> Any:
        """What this part gave; None if it is not done."""
        return self._found.get(_key(part))

    def add(self, found: Any, **part: Any) -> None:
        self._found[_key(part)] = found
        own = {"part": part, "found": found, "files": self._files}
        if rank() == 0:
            append(self._parts, [self.conditions | own])

    def finish(self, row: Mapping[str, Any]) -> None:
        """Writes a result and how it was made, unless it stands there already."""
        whole = self.conditions | dict(row)
        if rank() == 0 and _key(whole) not in self._rows:
            append(self.path, [whole | {"made": provenance()}])

    def _is_ours(self, row: Mapping[str, Any]) -> bool:
        conditions = _without(row, {"part", "found", "files"})
        return conditions == self.conditions and row.get("files") == self._files


def _is_record(file: Path) -> bool:
    """Whether it is OUTPUT or OUTPUT.parts, which may lie in a model's folder."""
    return file.suffix == ".parts" or Path(f"{file}.parts").is_file()


def fingerprint(files: Iterable[Path]) -> str:
    """Changes with the names, sizes or times of files."""
    known = hashlib.blake2b(digest_size=8)
    for file in sorted(files):
        status = file.stat()
        known.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return known.hexdigest()


def _without(row: Mapping[str, Any], names: set[str]) -> dict:
    return {name: value for name, value in row.items() if name not in names}


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps(row, sort_keys=True)


def _lines(path: str | None) -> list[dict]:
    """The objects in a file of JSON lines, on rank 0; what else it holds, `results.read` names."""
    rows = []
    if path and rank() == 0 and Path(path).is_file():
        for line in Path(path).read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows
