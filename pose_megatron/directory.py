"""The directory of a checkpoint: Megatron-LM's names, the tracker, and common.pt.

    <dir>/latest_checkpointed_iteration.txt    an iteration, or `release` (converted weights)
    <dir>/iter_0000100/                        torch_dist: __R_N.distcp, .metadata, common.pt,
                                               metadata.json (written last)
    <dir>/tokenizer/                           the tokenizer's files, for export

The tracker is written, atomically, only once everything it points at is complete; a directory that
a killed run left unfinished is never pointed at. Nothing here imports megatron-core, which takes
seconds: tools that only look into a checkpoint start at once.
"""

import argparse
import pickle
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from pose_megatron.durable import fsync, write_atomically
from pose_megatron.model_config import ModelConfig, family_of

torch.serialization.add_safe_globals([argparse.Namespace])

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
    def tokenizer_files(self) -> list[Path]:
        folder = self.root / "tokenizer"
        return sorted(p for p in folder.iterdir()) if folder.is_dir() else []


def exists(root: str | Path) -> bool:
    """Whether a folder holds a checkpoint."""
    return (Path(root) / TRACKER).is_file()


def find(root: str | Path, iteration: int | None = None) -> Checkpoint:
    """The latest checkpoint of a folder, or that of `iteration`.

    Raises:
        ValueError: there is none, or it is damaged; names the file.
    """
    root = Path(root)
    tracker = root / TRACKER
    if not tracker.is_file():
        raise ValueError(f"{root} is not a checkpoint folder: it has no {TRACKER}")
    word = tracker.read_text(errors="replace").strip()
    if iteration is not None:
        word = str(iteration)
    if word != "release" and not word.isdecimal():
        raise ValueError(f"{tracker} says '{word}': neither an iteration nor 'release'")
    path = path_of(root, word)
    for name in ("metadata.json", "common.pt", ".metadata"):
        if not (path / name).is_file():
            raise ValueError(f"checkpoint {path} is incomplete: {name} is missing")
    try:
        common = _read_common(path / "common.pt")
    except Exception as error:  # unpickling fails in many ways on damaged bytes
        raise ValueError(
            f"checkpoint {path}: common.pt cannot be read ({gist(error)})"
        ) from None
    if "args" not in common:
        raise ValueError(f"checkpoint {path}: common.pt holds no 'args' to take the model from")
    steps = 0 if word == "release" else int(word)
    return Checkpoint(root, steps, path, _model_of(common, path), common)


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


def _read_common(path: Path) -> dict:
    """What every rank shares; only plain values are unpickled."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # Megatron-LM's has some classes of megatron-core
        from megatron.core.safe_globals import register_safe_globals

        register_safe_globals()
        return torch.load(path, map_location="cpu", weights_only=True)


def path_of(root: Path, word: str | int) -> Path:
    """Where a checkpoint is; `word` as in the tracker."""
    return root / (word if word == "release" else f"iter_{int(word):07d}")


def _model_of(common: dict, path: Path) -> ModelConfig:
    if "pose_megatron" in common:
        return ModelConfig.from_dict(common["pose_megatron"]["model"])
    args = vars(common["args"])
    if args.get("normalization") != "RMSNorm" or not args.get("swiglu") or args.get(
            "position_embedding_type") != "rope" or args.get("use_rope_scaling"):
        raise ValueError(
            f"checkpoint {path} is no LLaMA with plain RoPE: normalization "
            f"{args.get('normalization')}, swiglu {args.get('swiglu')}, position_embedding_type "
            f"{args.get('position_embedding_type')}, use_rope_scaling "
            f"{args.get('use_rope_scaling')}"
        )
    grouped = args.get("group_query_attention")
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
             "max_position_embeddings", "make_vocab_size_divisible_by",
             "untie_embeddings_and_output_weights", "norm_epsilon", "rotary_base", "rotary_percent",
             "add_qkv_bias", "qk_layernorm")
    family = family_of(bool(args.get("add_qkv_bias")), bool(args.get("qk_layernorm")))
    return ModelConfig(
        num_query_groups=args["num_query_groups"] if grouped else args["num_attention_heads"],
        vocab_size=args.get("vocab_size") or args["padded_vocab_size"],
        family=family,
        **{name: args[name] for name in names if args.get(name) is not None},
    )


def common_state(model: ModelConfig, iteration: int, consumed_samples: int, **more) -> dict:
    """What Megatron-LM keeps in common.pt, and our own key."""
    scaling = model.rope_scaling
    args = argparse.Namespace(
        **{k: v for k, v in model.to_dict().items() if k != "rope_scaling"},
        padded_vocab_size=model.padded_vocab_size,
        group_query_attention=model.num_query_groups != model.num_attention_heads,
        swiglu=not model.is_gptj, normalization="LayerNorm" if model.is_gptj else "RMSNorm",
        add_bias_linear=model.is_gptj, rotary_interleaved=model.is_gptj,
        position_embedding_type="rope", use_rope_scaling=False,
        rotary_seq_len_interpolation_factor=(
            scaling.factor if scaling.method == "linear" else None),
        seq_length=model.max_position_embeddings, iteration=iteration,
        consumed_train_samples=consumed_samples, consumed_valid_samples=0,
        ckpt_format="torch_dist", **more,
    )
    return {
        "args": args, "checkpoint_version": 3.0, "iteration": iteration,
        "num_floating_point_operations_so_far": 0,
        "pose_megatron": {"model": model.to_dict()},
    }


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


def gist(error: BaseException) -> str:
    """Its class and first line."""
    if failures := getattr(error, "failures", None):  # torch's, by rank: what the first one said
        error = next(iter(failures.values()))[0]
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
