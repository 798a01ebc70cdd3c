"""The directory of a checkpoint: Megatron-LM's names, the tracker, and common.pt.

    <dir>/latest_checkpointed_iteration.txt    an iteration, or `release` (converted weights)
    <dir>/iter_0000100/                        torch_dist: __R_N.distcp, .metadata, common.pt,
                                               metadata.json (written last)
    <dir>/tokenizer/                           the tokenizer's files, for export

The tracker is written, atomically, only once everything it points at is complete; a directory that
a killed run left unfinished is never pointed at. Nothing here imports megatron-core, which takes
seconds: tools that only look into a checkpoint start at once.
"""

import pickle
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from pose_megatron.checkpoints.megatron import args as megatron_args
from pose_megatron.checkpoints.megatron.legacy import Legacy, is_legacy
from pose_megatron.checkpoints.megatron.torch_dist_metadata import read_index
from pose_megatron.errors import ConfigError, DamagedCheckpoint
from pose_megatron.models.shape import ModelConfig
from pose_megatron.runtime.atomic_files import fsync, gist, write_atomically

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
        DamagedCheckpoint: there is none, it is damaged, or is of no model of ours; names the file.
    """
    root, word = Path(root), None if iteration is None else str(iteration)
    tracker = root / TRACKER
    if word is None and not exists(root) and re.fullmatch(r"iter_\d{7,}|release", root.name):
        root, word = root.parent, root.name.removeprefix("iter_")
    elif not exists(root):
        lost = DamagedCheckpoint if whole_iterations(root) else ConfigError
        raise lost(f"{root} is not a checkpoint folder: it has no {TRACKER}")
    word = word or tracker.read_text(errors="replace").strip()
    if word != "release" and not word.isdecimal():
        raise DamagedCheckpoint(f"{tracker} says '{word}': neither an iteration nor 'release'")
    path = path_of(root, word)
    steps = 0 if word == "release" else int(word)
    return Checkpoint(root, steps, path, *model_and_common(path))


def fall_back(root: str | Path, error: ValueError, below: int | None = None) -> Checkpoint:
    """The newest checkpoint of a folder that can be found, below an iteration that failed.

    Raises:
        DamagedCheckpoint: `error`, when there is none.
    """
    for iteration in whole_iterations(Path(root)):
        if below is None or iteration < below:
            try:
                return find(root, iteration)
            except ValueError:
                continue
    raise DamagedCheckpoint(f"{error}; and {root} has no other checkpoint to fall back to")


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


def model_and_common(path: Path) -> tuple[ModelConfig, dict]:
    """The model of one iteration, and its common.pt, with Megatron-LM's `args` in it.

    Raises:
        DamagedCheckpoint: a file is missing or damaged, or the model is no LLaMA; names it.
    """
    if is_legacy(path):
        old = Legacy(path)
        return old.model, {"args": old.args, "iteration": old.iteration}
    for name in ("metadata.json", "common.pt", ".metadata"):
        if not (path / name).is_file():
            raise DamagedCheckpoint(f"checkpoint {path} is incomplete: {name} is missing")
    try:
        common = _read_common(path / "common.pt")
    except Exception as error:  # unpickling fails in many ways on damaged bytes
        raise DamagedCheckpoint(
            f"checkpoint {path}: common.pt cannot be read ({gist(error)})"
        ) from None
    if "pose_megatron" in common:
        return ModelConfig.from_dict(common["pose_megatron"]["model"]), common
    run_config = path / "run_config.yaml"
    if "args" not in common and not run_config.is_file():
        raise ConfigError(
            f"checkpoint {path}: common.pt holds no 'args' to take the model from, and there is no "
            "run_config.yaml"
        )
    try:
        rows = read_index(path).state_dict_metadata["embedding.word_embeddings.weight"].size[0]
    except KeyError as error:
        raise ConfigError(f"checkpoint {path} holds no {error}") from None
    try:
        if "args" in common:
            return megatron_args.from_args(vars(common["args"]), rows), common
        model, run = megatron_args.read_run_config(run_config, rows)
    except ValueError as error:
        raise ConfigError(f"checkpoint {path}: {error}") from None
    # Megatron-Bridge keeps its progress in a file of its own.
    state = path / "train_state.pt"
    progress = torch.load(state, weights_only=True) if state.is_file() else {}
    consumed = int(progress.get("consumed_train_samples", 0))
    args = megatron_args.to_args(model, int(progress.get("step", 0)), consumed, **run)
    return model, common | {"args": args}


def _read_common(path: Path) -> dict:
    """What every rank shares; only plain values are unpickled."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # Megatron-LM's has some classes of megatron-core
        from megatron.core.safe_globals import register_safe_globals

        register_safe_globals()
        return torch.load(path, map_location="cpu", weights_only=True)
