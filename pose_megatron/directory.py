"""The directory of a checkpoint: Megatron-LM's names, the tracker, and common.pt.

    <dir>/latest_checkpointed_iteration.txt    an iteration, or `release` (converted weights)
    <dir>/iter_0000100/                        torch_dist: __R_N.distcp, .metadata, common.pt,
                                               metadata.json (written last)
    <dir>/tokenizer/                           the tokenizer's files, for export

The tracker is written, atomically, only once everything it points at is complete; a directory that
a killed run left unfinished is never pointed at. Nothing here imports megatron-core, which takes
seconds: tools that only look into a checkpoint start at once.
"""

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pose_megatron.durable import fsync, write_atomically
from pose_megatron.legacy import is_legacy
from pose_megatron.model_config import ModelConfig
from pose_megatron.origin import model_and_common

TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on disk.

    Attributes:
        root: the --load folder.
        iteration: steps trained, 0 for converted weights.
        path: its iter_ or release directory.
        model: shape and rope.
        common: everything in common.pt.
    """

    root: Path
    iteration: int
    path: Path
    model: ModelConfig
    common: dict

    @property
    def consumed_samples(self) -> int:
        return self.common["args"].consumed_train_samples

    @property
    def is_release(self) -> bool:
        return self.path.name == "release"

    @property
    def is_legacy(self) -> bool:
        return is_legacy(self.path)

    @property
    def tokenizer_files(self) -> list[Path]:
        folder = self.root / "tokenizer"
        return sorted(p for p in folder.iterdir()) if folder.is_dir() else []


def exists(root: str | Path) -> bool:
    """Whether a folder holds a checkpoint."""
    return (Path(root) / TRACKER).is_file()


def find(root: str | Path, iteration: int | None = None) -> Checkpoint:
    """The latest checkpoint of a folder, or that of `iteration`.

    The folder of one iteration, or `release`, may be named itself. Megatron-LM's and
    Megatron-Bridge's checkpoints are found too, also those in Megatron-LM's legacy layout.

    Raises:
        ValueError: there is none, it is damaged, or is of no model of ours; names the file.
    """
    root, word = Path(root), None if iteration is None else str(iteration)
    tracker = root / TRACKER
    if word is None and not exists(root) and re.fullmatch(r"iter_\d{7,}|release", root.name):
        root, word = root.parent, root.name.removeprefix("iter_")
    elif not exists(root):
        raise ValueError(f"{root} is not a checkpoint folder: it has no {TRACKER}")
    word = word or tracker.read_text(errors="replace").strip()
    if word != "release" and not word.isdecimal():
        raise ValueError(f"{tracker} says '{word}': neither an iteration nor 'release'")
    path = path_of(root, word)
    steps = 0 if word == "release" else int(word)
    return Checkpoint(root, steps, path, *model_and_common(path))


def fall_back(root: str | Path, error: ValueError, below: int | None = None) -> Checkpoint:
    """The newest checkpoint of a folder that can be found, below an iteration that failed.

    Raises:
        ValueError: `error`, when there is none.
    """
    for iteration in whole_iterations(Path(root)):
        if below is None or iteration < below:
            try:
                return find(root, iteration)
            except ValueError:
                continue
    raise ValueError(f"{error}; and {root} has no other checkpoint to fall back to")


def path_of(root: Path, word: str | int) -> Path:
    """Where a checkpoint is; `word` as in the tracker."""
    return root / (word if word == "release" else f"iter_{int(word):07d}")


def content_metadata() -> dict:
    return {
        # The one form of optimizer state that every other layout of ranks can read back.
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def whole_iterations(root: Path) -> list[int]:
    """Iterations of the complete checkpoints in a folder, newest first."""
    # The writer makes metadata.json last.
    found = (p.parent.name.removeprefix("iter_") for p in root.glob("iter_*/metadata.json"))
    return sorted((int(i) for i in found if i.isdecimal()), reverse=True)


def publish(root: Path, path: Path, word) -> None:
    """Makes a complete checkpoint the one that is found."""
    for file in path.iterdir():
        fsync(file)
    fsync(path)
    write_atomically(root / TRACKER, str(word))


def forget(root: Path, word) -> None:
    """Before a checkpoint is written over: the tracker points at the one before, or at none."""
    tracker = root / TRACKER
    if not tracker.is_file() or tracker.read_text().strip() != str(word):
        return
    others = [i for i in whole_iterations(root) if i != word]
    if others:
        write_atomically(tracker, str(others[0]))
    else:
        tracker.unlink()


def copy_tokenizer(root: Path, files: Iterable[Path]) -> None:
    folder = root / "tokenizer"
    for file in map(Path, files):
        folder.mkdir(exist_ok=True)
        if file.parent.resolve() != folder.resolve():
            shutil.copy2(file, folder / file.name)
