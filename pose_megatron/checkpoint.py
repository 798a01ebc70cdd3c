"""Checkpoints in Megatron-LM's directory layout, for any layout of ranks.

    <dir>/latest_checkpointed_iteration.txt    an iteration, or `release` (converted weights)
    <dir>/iter_0000100/                        torch_dist: __R_N.distcp, .metadata, common.pt,
                                               metadata.json (written last)
    <dir>/tokenizer/                           the tokenizer's files, for export

Weights are stored under layout-free names with the layer as a leading axis, so what was saved by
one layout loads under any other. The tracker file is written, atomically, only once everything it
points at is complete; a directory that a killed run left unfinished is never pointed at.
"""

import multiprocessing
import random
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from pose_megatron.durable import fsync, write_atomically
from pose_megatron.legacy import Legacy, is_legacy
from pose_megatron.lifetime import children_end_with_this
from pose_megatron.megatron_args import common_state
from pose_megatron.model_config import ModelConfig
from pose_megatron.optimizer import prime
from pose_megatron.origin import ANY_FAILURE, gist, model_and_common

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
        ValueError: there is none, it is damaged, or is of no LLaMA; names the file.
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
    path = _path(root, word)
    steps = 0 if word == "release" else int(word)
    return Checkpoint(root, steps, path, *model_and_common(path))


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The precision of the weights on disk."""
    if checkpoint.is_legacy:
        return next(iter(Legacy(checkpoint.path).values())).dtype
    stored = dist_checkpointing.load_tensors_metadata(str(checkpoint.path))
    return next(entry.dtype for key, entry in stored.items() if not key.startswith("optimizer."))


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


def _path(root: Path, word: str | int) -> Path:
    return root / (word if word == "release" else f"iter_{int(word):07d}")


def content_metadata() -> dict:
    return {
        # The one form of optimizer state that every other layout of ranks can read back.
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def save(
    root: str | Path, iteration: int, consumed_samples: int, model: ModelConfig, stages: list,
    optimizer, scheduler, tokenizer_files: Iterable[Path] = (), retain: int | None = None,
    queue: AsyncCallsQueue | None = None, done: Callable[[Path], None] = lambda path: None,
) -> Path:
    """Writes a whole training state; every rank calls it.

    Args:
        iteration: steps done.
        stages: this rank's unwrapped GPTModel, or its chunks of an interleaved pipeline.
        tokenizer_files: copied to <root>/tokenizer.
        retain: checkpoints to keep, this one included; older ones are removed after it is whole.
        queue: writes in the background and finishes in the queue's maybe_finalize_async_calls.
        done: told of the checkpoint's folder when it is whole.
    """
    p = parallel_state
    state = common_state(
        model, iteration, consumed_samples,
        world_size=dist.get_world_size(),
        tensor_model_parallel_size=p.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=p.get_pipeline_model_parallel_world_size(),
        data_parallel_size=p.get_data_parallel_world_size(),
        no_save_optim=False, no_save_rng=False,
        params_dtype=next(stages[0].parameters()).dtype,
        use_distributed_optimizer=_is_distributed(optimizer),
    )
    metadata = content_metadata()
    with_group = metadata | {"dp_cp_group": p.get_data_parallel_group(with_context_parallel=True)}
    models = _sharded_models(stages, with_group)
    state |= models
    state["optimizer"] = optimizer.sharded_state_dict(
        _of_optimizer(models), metadata=with_group
    )
    state["opt_param_scheduler"] = scheduler.state_dict()
    state["rng_state"] = _random_state()
    root = Path(root)

    def finish(path: Path) -> None:
        if dist.get_rank() == 0:
            publish(root, path, iteration)
            for older in [i for i in whole_iterations(root) if i <= iteration][retain or 1 << 62 :]:
                shutil.rmtree(_path(root, older))
        done(path)

    return write(root, iteration, state, metadata, tokenizer_files, finish, queue)


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


def write(
    root: Path, word, state: dict, metadata: dict, tokenizer_files, finish: Callable[[Path], None],
    queue: AsyncCallsQueue | None = None,
) -> Path:
    """Writes a state dict as <root>/iter_... or <root>/release, then calls `finish`."""
    path = _path(root, word)
    if dist.get_rank() == 0:
        root.mkdir(parents=True, exist_ok=True)
        if path.exists():  # what a killed save left, or what this run overwrites
            _forget(root, word)
            shutil.rmtree(path)
        path.mkdir()
        _copy_tokenizer(root, tokenizer_files)
    dist.barrier()
    _quick_results_queue()
    request = dist_checkpointing.save(
        state, str(path), content_metadata=metadata, async_sharded_save=queue is not None
    )
    if queue is None:
        finish(path)
        dist.barrier()
    else:
        request.add_finalize_fn(lambda: finish(path))
        queue.schedule_async_request(request)
    return path


def _quick_results_queue() -> None:
    """The writer reports through a manager process that it would spawn, importing everything anew
    (seconds, and the memory of a whole rank); a forked one is there at once."""
    if filesystem_async._results_queue is None:
        children_end_with_this()
        manager = multiprocessing.get_context("fork").Manager()
        filesystem_async._results_queue = manager.Queue()


def _forget(root: Path, word) -> None:
    """Before a checkpoint is written over: the tracker points at the one before, or at none."""
    tracker = root / TRACKER
    if not tracker.is_file() or tracker.read_text().strip() != str(word):
        return
    others = [i for i in whole_iterations(root) if i != word]
    if others:
        write_atomically(tracker, str(others[0]))
    else:
        tracker.unlink()


def _copy_tokenizer(root: Path, files: Iterable[Path]) -> None:
    folder = root / "tokenizer"
    for file in map(Path, files):
        folder.mkdir(exist_ok=True)
        if file.parent.resolve() != folder.resolve():
            shutil.copy2(file, folder / file.name)


def load(checkpoint: Checkpoint, stages: list, optimizer=None, scheduler=None) -> None:
    """Reads weights into this rank's stages and, when given, the rest of the training state.

    Raises:
        ValueError: the checkpoint is damaged or holds other tensors than the model.
    """
    if checkpoint.is_legacy:
        raise ValueError(
            f"checkpoint {checkpoint.path} is in Megatron-LM's legacy layout; convert it first: "
            "tools/checkpoint/convert.py --loader megatron --saver megatron"
        )
    p = parallel_state
    group = p.get_data_parallel_group(with_context_parallel=True)
    metadata = content_metadata() | {"dp_cp_group": group}
    padded = getattr(checkpoint.common["args"], "padded_vocab_size", stages[0].vocab_size)
    if padded != stages[0].vocab_size:  # megatron-core would cut or fill the tables silently
        raise ValueError(
            f"checkpoint {checkpoint.path} has a vocabulary padded to {padded}, the model one "
            f"padded to {stages[0].vocab_size}; see --make-vocab-size-divisible-by"
        )
    models = {
        name: _without_extra_state(model)
        for name, model in _sharded_models(stages, metadata).items()
    }
    sharded = dict(models)
    if optimizer is not None:
        if checkpoint.is_release:
            raise ValueError(
                f"checkpoint {checkpoint.path} holds weights only: add --finetune to start "
                "training from them"
            )
        was = checkpoint.common["args"].use_distributed_optimizer
        if was != _is_distributed(optimizer):
            raise ValueError(
                f"checkpoint {checkpoint.path} was saved {'with' if was else 'without'} "
                "--use-distributed-optimizer: resume the same way, or start anew with --finetune"
            )
        ours = metadata["distrib_optim_sharding_type"]
        theirs = checkpoint.common.get("content_metadata") or {}
        form = theirs.get("distrib_optim_sharding_type", ours)
        if was and form != ours:
            raise ValueError(
                f"checkpoint {checkpoint.path} keeps its optimizer in the form {form}, which only "
                "its own program resumes from; add --finetune to start from its weights, or save "
                "it there with --dist-ckpt-optim-fully-reshardable"
            )
        prime(optimizer)
        sharded["optimizer"] = optimizer.sharded_state_dict(
            _of_optimizer(models), is_loading=True, metadata=metadata
        )
        saved = checkpoint.common["args"]
        if (saved.tensor_model_parallel_size, saved.pipeline_model_parallel_size) == (
                p.get_tensor_model_parallel_world_size(),
                p.get_pipeline_model_parallel_world_size()):
            sharded["rng_state"] = _random_state()
    try:
        state = dist_checkpointing.load(sharded, str(checkpoint.path))
    except ANY_FAILURE as error:
        raise ValueError(
            f"checkpoint {checkpoint.path} cannot be loaded: {gist(error)}"
        ) from error
    for stage, name in zip(stages, models, strict=True):
        missing, _ = stage.load_state_dict(state[name], strict=False)
        missing = [key for key in missing if not key.endswith("_extra_state")]
        assert not missing, missing
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["opt_param_scheduler"])
        if "rng_state" in state:
            _restore_random_state(state["rng_state"])


def _is_distributed(optimizer) -> bool:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return isinstance(parts[0], DistributedOptimizer)


def _sharded_models(stages: list, metadata: dict) -> dict[str, dict]:
    """By Megatron-LM's names: `model`, or `model0`, `model1`, ... of an interleaved pipeline."""
    names = ["model"] if len(stages) == 1 else [f"model{i}" for i in range(len(stages))]
    return {
        name: stage.sharded_state_dict(metadata=metadata)
        for name, stage in zip(names, stages, strict=True)
    }


def _of_optimizer(models: dict[str, dict]) -> dict:
    """The optimizer looks parameters up by identity and takes one level or two."""
    return models["model"] if len(models) == 1 else models


def _without_extra_state(sharded: dict) -> dict:
    """Transformer Engine's FP8 state: absent from converted and from `torch` checkpoints."""
    return {name: v for name, v in sharded.items() if not name.endswith("_extra_state")}


def empty_extra_state(num_layers: int) -> dict[str, ShardedObject]:
    """That state where there is none: stock Megatron-LM does not load a checkpoint that lacks it,
    by default. The names are those of megatron-core's layers and of Transformer Engine's."""
    layers = ("self_attention.linear_qkv", "self_attention.core_attention",
              "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    found = {"decoder.final_layernorm._extra_state": ShardedObject(
        "decoder.final_layernorm._extra_state", None, (1,), (0,))}
    for part in layers:
        key = f"decoder.layers.{part}._extra_state"
        for layer in range(num_layers):
            found[f"{key}/{layer}"] = ShardedObject(key, None, (num_layers,), (layer,))
    return found


def _random_state() -> ShardedObject:
    """Generators of this tensor and pipeline rank, under Megatron-LM's names."""
    p = parallel_state
    state = [{
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }]
    return ShardedObject(
        "rng_state", state,
        (p.get_pipeline_model_parallel_world_size(), p.get_tensor_model_parallel_world_size()),
        (p.get_pipeline_model_parallel_rank(), p.get_tensor_model_parallel_rank()),
        replica_id=p.get_data_parallel_rank(with_context_parallel=True),
    )


def _restore_random_state(states: list[dict]) -> None:
    state = states[0]
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])
