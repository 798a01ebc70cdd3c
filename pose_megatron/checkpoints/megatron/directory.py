"""A checkpoint's directory: Megatron-LM's names, the tracker, and what all ranks share.

    <dir>/latest_checkpointed_iteration.txt    an iteration, or `release` (converted weights)
    <dir>/iter_0000100/                        torch_dist: __R_N.distcp, .metadata, metadata.json
                                               (written last), common.pt
    <dir>/tokenizer/                           the tokenizer's files, for export

The tracker is written, atomically, once everything it points at is complete; it never points at a
directory that a killed run left unfinished. Nothing here imports megatron-core, which takes
seconds, as long as the common state is our own: programs that only look into a checkpoint start at
once.
"""

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pose_megatron.checkpoints.megatron import args as megatron_args
from pose_megatron.checkpoints.megatron.common_state import read_common_state, read_plain
from pose_megatron.checkpoints.megatron.hybrid_layout import is_hybrid
from pose_megatron.checkpoints.megatron.legacy import LegacyWeights, is_legacy
from pose_megatron.checkpoints.megatron.run_config import read_run_config
from pose_megatron.checkpoints.megatron.torch_dist_metadata import read_index
from pose_megatron.checkpoints.sidecars import CHAT_TEMPLATES, held
from pose_megatron.errors import ConfigError, DamagedCheckpoint
from pose_megatron.models.shape import ModelConfig
from pose_megatron.runtime.atomic_files import fsync, write_atomically

TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on disk.

    Attributes:
        root: the --load folder.
        iteration: steps trained, 0 for converted weights.
        path: its iter_ or release directory.
        model: shape and rope.
        common: what all ranks share (common_state.py), with Megatron-LM's `args`.
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
    def is_hybrid(self) -> bool:
        """Whether it is in HybridModel's layout (hybrid_layout.py)."""
        return not self.is_legacy and is_hybrid(read_index(self.path).tensors)

    @property
    def tokenizer_files(self) -> list[Path]:
        folder = self.root / "tokenizer"
        found = [*folder.glob("*"), *folder.glob(f"{CHAT_TEMPLATES}/*")]
        return held(folder, sorted(path for path in found if path.is_file()))


def exists(root: str | Path) -> bool:
    """Whether a folder holds a checkpoint."""
    return has_tracker(root) or latest_whole(root) is not None


def has_tracker(root: str | Path) -> bool:
    return (Path(root) / TRACKER).is_file()


def latest_whole(root: str | Path) -> str | None:
    """What a lost tracker would say: the newest whole iteration, or `release`."""
    if found := whole_iterations(Path(root)):
        return str(found[0])
    return "release" if (Path(root) / "release" / "metadata.json").is_file() else None


def find(root: str | Path, iteration: int | None = None) -> Checkpoint:
    """The latest checkpoint of a folder, or the one of `iteration`.

    `root` may also be the folder of one iteration, or `release`, itself. Where the tracker was
    lost, the newest whole iteration is the latest. Checkpoints of Megatron-LM and Megatron-Bridge
    are found too, and those in Megatron-LM's legacy layout.

    Raises:
        ConfigError: there is none, or its model is not supported.
        DamagedCheckpoint: a file of it, which the message names, is missing or damaged.
    """
    root, entry = Path(root), None if iteration is None else str(iteration)
    tracker = root / TRACKER
    if entry is None and not exists(root) and re.fullmatch(r"iter_\d{7,}|release", root.name):
        root, entry = root.parent, root.name.removeprefix("iter_")
    elif not exists(root):
        raise ConfigError(f"{root} is not a checkpoint folder: it has no {TRACKER}")
    if entry is None and not has_tracker(root):
        entry = latest_whole(root)
    entry = entry or tracker.read_text(encoding="utf-8", errors="replace").strip()
    if entry != "release" and not entry.isdecimal():
        raise DamagedCheckpoint(f"{tracker} says '{entry}': neither an iteration nor 'release'")
    path = path_of(root, entry)
    steps = 0 if entry == "release" else int(entry)
    model, common = model_and_common(path)
    stored = common.get("iteration")
    if entry != "release" and isinstance(stored, int) and stored != steps:
        raise DamagedCheckpoint(
            f"checkpoint {path}: its common state is of iteration {stored}, not of {steps}"
        )
    return Checkpoint(root, steps, path, model, common)


def fall_back(root: str | Path, error: ValueError, below: int | None = None) -> Checkpoint:
    """The newest checkpoint of a folder that `find` accepts.

    Args:
        error: why the latest one cannot be used.
        below: take iterations before this one only.

    Raises:
        DamagedCheckpoint: there is none; the message begins with `error`.
    """
    for iteration in whole_iterations(Path(root)):
        if below is None or iteration < below:
            try:
                return find(root, iteration)
            except ValueError:
                continue
    raise DamagedCheckpoint(f"{error}; and {root} has no other checkpoint to fall back to")


def path_of(root: Path, entry: str | int) -> Path:
    """The folder of a tracker's entry: an iteration, or `release`."""
    return root / ("release" if entry == "release" else f"iter_{int(entry):07d}")


# Forms of the distributed optimizer's state: the one that every other layout of ranks reads back,
# and the one of its own buffers, of which only the number of data-parallel ranks may change.
RESHARDABLE, AS_IT_LIES = "fully_reshardable", "dp_reshardable"


def content_metadata(form: str = RESHARDABLE) -> dict[str, Any]:
    """What megatron-core keeps in the common state about the form of the optimizer's."""
    return {
        "distrib_optim_sharding_type": form,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def whole_iterations(root: Path) -> list[int]:
    """Iterations of the complete checkpoints in a folder, newest first."""
    # metadata.json is written last.
    found = (p.parent.name.removeprefix("iter_") for p in root.glob("iter_*/metadata.json"))
    return sorted((int(i) for i in found if i.isdecimal()), reverse=True)


def publish(root: Path, path: Path, entry: str | int) -> None:
    """Puts a complete checkpoint on disk and points the tracker at it."""
    for file in path.iterdir():
        fsync(file)
    fsync(path)
    write_atomically(root / TRACKER, str(entry))


def forget(root: Path, entry: str | int) -> None:
    """Points the tracker at the newest other checkpoint, or removes it, before `entry` is written
    over."""
    tracker = root / TRACKER
    if not tracker.is_file() or tracker.read_text(encoding="utf-8").strip() != str(entry):
        return
    others = [i for i in whole_iterations(root) if i != entry]
    if others:
        write_atomically(tracker, str(others[0]))
    else:
        tracker.unlink()


def discard(path: Path) -> bool:
    """Removes a checkpoint that did not become whole; returns whether it is gone.

    One that the tracker names is whole, and stays.
    """
    tracker = path.parent / TRACKER
    named = tracker.is_file() and tracker.read_text(encoding="utf-8").strip()
    if named and path.name in (named, f"iter_{named:0>7}"):
        return False
    shutil.rmtree(path, ignore_errors=True)
    return not path.exists()


def copy_tokenizer(root: Path, files: Iterable[Path]) -> None:
    """Keeps a tokenizer's files in the checkpoint, for export."""
    for file in map(Path, files):
        target = tokenizer_path(root, file)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.resolve() != target.resolve():
            shutil.copy2(file, target)


def tokenizer_path(root: Path, file: Path) -> Path:
    """Where a checkpoint keeps one of its tokenizer's files."""
    folder = root / "tokenizer"
    return (folder / CHAT_TEMPLATES if file.parent.name == CHAT_TEMPLATES else folder) / file.name


def optimizer_form(common: dict) -> str:
    """RESHARDABLE, AS_IT_LIES or another of megatron-core's forms."""
    return (common.get("content_metadata") or {}).get("distrib_optim_sharding_type", RESHARDABLE)


def stored_record(common: dict) -> dict:
    """What we have stored of the model: our trainer beside Megatron-LM's args, the plugin in them,
    where Megatron's own trainer carries it along; empty in a stock checkpoint."""
    args = vars(common["args"]) if "args" in common else {}
    return common.get("pose_megatron") or args.get("pose_megatron") or {}


def model_and_common(path: Path) -> tuple[ModelConfig, dict]:
    """One iteration's model and its common state, with Megatron-LM's `args` in it.

    Raises:
        ConfigError: the model is not supported.
        DamagedCheckpoint: a file, which the message names, is missing or damaged.
    """
    if is_legacy(path):
        old = LegacyWeights(path)
        return old.model, {"args": old.args, "iteration": old.iteration}
    for name in ("metadata.json", ".metadata"):
        if not (path / name).is_file():
            raise DamagedCheckpoint(f"checkpoint {path} is incomplete: {name} is missing")
    common = read_common_state(path)
    if "model" in (ours := stored_record(common)):
        args = vars(common["args"]) if "args" in common else {}
        try:
            return megatron_args.from_record(ours["model"], args), common
        except ConfigError as error:
            raise ConfigError(f"checkpoint {path}: {error}") from None
    run_config = path / "run_config.yaml"
    if "args" not in common and not run_config.is_file():
        raise ConfigError(
            f"checkpoint {path}: its common state holds no 'args' to take the model from, and there"
            " is no run_config.yaml"
        )
    try:
        embedding = read_index(path).tensors["embedding.word_embeddings.weight"]
    except KeyError as error:
        raise ConfigError(f"checkpoint {path} holds no {error}") from None
    rows = embedding.size[0]
    try:
        if "args" in common:
            return megatron_args.from_args(vars(common["args"]), rows), common
        model, run = read_run_config(run_config, rows)
    except ValueError as error:
        raise ConfigError(f"checkpoint {path}: {error}") from None
    # Megatron-Bridge keeps its progress in a file of its own.
    state = path / "train_state.pt"
    progress = read_plain(path, state.name, state.read_bytes()) if state.is_file() else {}
    consumed = int(progress.get("consumed_train_samples", 0))
    args = megatron_args.to_args(model, int(progress.get("step", 0)), consumed, **run)
    return model, common | {"args": args}
