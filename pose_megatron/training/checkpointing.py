"""Saves and loads a training state in Megatron-LM's directory layout, for any layout of ranks.

Weights are stored under names that no layout changes, with the layer as a leading axis, so what one
layout has saved loads under any other.
"""

import contextlib
import inspect
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from pose_megatron.checkpoints.megatron.args import common_state
from pose_megatron.checkpoints.megatron.common_state import FILE, add_common_file
from pose_megatron.checkpoints.megatron.directory import (
    AS_IT_LIES,
    RESHARDABLE,
    Checkpoint,
    content_metadata,
    copy_tokenizer,
    discard,
    forget,
    optimizer_form,
    path_of,
    publish,
    stored_record,
    whole_iterations,
)
from pose_megatron.checkpoints.megatron.safe_loading import safe_loading
from pose_megatron.checkpoints.megatron.torch_dist import EXPERTS_NORM, LOCAL_EXPERTS_NORM
from pose_megatron.checkpoints.megatron.torch_dist_metadata import read_index
from pose_megatron.errors import ConfigError, DamagedCheckpoint, SaveFailed, gist
from pose_megatron.models.shape import ModelConfig
from pose_megatron.runtime.megatron_core import common_state_is_an_object, megatron_core_version
from pose_megatron.runtime.ranks import print_rank_0
from pose_megatron.training.hybrid_layout import retarget_to_hybrid_layout
from pose_megatron.training.optimizer import init_optimizer_state, parts
from pose_megatron.training.optimizer import load as load_optimizer
from pose_megatron.training.writers import report_failures

# megatron-core has no error of its own for damaged files, and torch's is no Exception.
_OURS = f"{DamagedCheckpoint.__name__}: "
ANY_FAILURE = (Exception, CheckpointException)


class SaveQueue(AsyncCallsQueue):
    """Saves in the background, one at a time."""

    path: Path | None = None  # of the last save

    def maybe_finalize_async_calls(self, blocking: bool = False, no_dist: bool = False) -> list:
        """Finishes a save if all ranks have written it; with `blocking`, waits until they have.

        Raises:
            SaveFailed: it could not be written.
        """
        if self.path is None:
            return []
        with _half_a_save_goes(self.path):
            return super().maybe_finalize_async_calls(blocking, no_dist)


def save(
    root: str | Path,
    iteration: int,
    consumed_samples: int,
    model: ModelConfig,
    stages: list,
    optimizer,
    scheduler,
    tokenizer_files: Iterable[Path] = (),
    retain: int | None = None,
    queue: SaveQueue | None = None,
    done: Callable[[Path], None] = lambda path: None,
    record: dict | None = None,
    form: str = RESHARDABLE,
) -> Path:
    """Writes a whole training state; every rank calls it.

    Args:
        root: --save.
        iteration: steps done.
        model: shape and rope, stored beside the weights.
        stages: this rank's unwrapped GPTModel, or its model chunks in an interleaved pipeline.
        tokenizer_files: copied to <root>/tokenizer.
        retain: how many checkpoints to keep, this one included; older ones are removed once it is
            whole.
        queue: to write in the background; the queue's maybe_finalize_async_calls finishes the save.
        done: called with the checkpoint's folder once it is whole.
        record: what else to say of the run, for the one that goes on from it.
        form: of a distributed optimizer's state, RESHARDABLE or AS_IT_LIES.

    Returns:
        The checkpoint's folder.

    Raises:
        SaveFailed: it could not be written; nothing of it stays.
    """
    p = parallel_state
    state = common_state(
        model,
        iteration,
        consumed_samples,
        record,
        world_size=dist.get_world_size(),
        tensor_model_parallel_size=p.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=p.get_pipeline_model_parallel_world_size(),
        expert_model_parallel_size=p.get_expert_model_parallel_world_size(),
        data_parallel_size=p.get_data_parallel_world_size(),
        no_save_optim=False,
        no_save_rng=False,
        params_dtype=next(stages[0].parameters()).dtype,
        use_distributed_optimizer=_is_distributed(optimizer),
    )
    metadata = content_metadata(form if _is_distributed(optimizer) else RESHARDABLE)
    with_group = metadata | {"dp_cp_group": p.get_data_parallel_group(with_context_parallel=True)}
    models = _sharded_models(stages, with_group)
    state |= models
    state["optimizer"] = optimizer.sharded_state_dict(_of_optimizer(models), metadata=with_group)
    state["opt_param_scheduler"] = scheduler.state_dict()
    state["rng_state"] = _random_state()
    root = Path(root)

    def finish(path: Path) -> None:
        if dist.get_rank() == 0:
            add_common_file(path)
            publish(root, path, iteration)
            for older in [i for i in whole_iterations(root) if i <= iteration][retain or 1 << 62 :]:
                shutil.rmtree(path_of(root, older))
        done(path)

    return write(root, iteration, state, metadata, tokenizer_files, finish, queue)


def write(
    root: Path,
    word,
    state: dict,
    metadata: dict,
    tokenizer_files,
    finish: Callable[[Path], None],
    queue: SaveQueue | None = None,
) -> Path:
    """Writes a state dict as <root>/iter_... or <root>/release, then calls `finish`.

    Args:
        word: an iteration, or "release".
        queue: see `save`.
    """
    path = path_of(root, word)
    report_failures()
    with _half_a_save_goes(path):
        if dist.get_rank() == 0:
            root.mkdir(parents=True, exist_ok=True)
            if path.exists():  # what a killed save left, or what this run overwrites
                forget(root, word)
                shutil.rmtree(path)
            path.mkdir()
            copy_tokenizer(root, tokenizer_files)
        dist.barrier()
        options = {"content_metadata": metadata, "async_sharded_save": queue is not None}
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
            options["async_strategy"] = "mcore"  # the default is a package that is not installed
        request = dist_checkpointing.save(state, str(path), **options)
        if queue is None:
            finish(path)
        else:
            request.add_finalize_fn(lambda: finish(path))
            queue.path = path
            queue.schedule_async_request(request)
    if queue is None:
        dist.barrier()
    return path


@contextlib.contextmanager
def _half_a_save_goes(path: Path) -> Iterator[None]:
    """Removes a checkpoint that did not become whole, as on a full disk, and says why."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        left = "; what was written of it stays"
        if dist.get_rank() == 0 and discard(path):
            left = ""
        free = shutil.disk_usage(path.parent if path.parent.is_dir() else Path.cwd()).free
        reason = gist(error).removeprefix("RuntimeError: Worker failure: ")
        raise SaveFailed(
            f"checkpoint {path} cannot be written: {reason}; {free / 2**20:,.0f} MiB are free "
            f"there{left}"
        ) from error


def load(checkpoint: Checkpoint, stages: list, optimizer=None, scheduler=None) -> None:
    """Loads weights into this rank's stages and, where given, optimizer and schedule.

    Raises:
        ConfigError: the checkpoint is whole and does not fit the model or the optimizer.
        DamagedCheckpoint: it cannot be read.
    """
    if checkpoint.is_legacy:
        raise ConfigError(
            f"checkpoint {checkpoint.path} is in Megatron-LM's legacy layout; convert it first: "
            "tools/checkpoint/convert.py --loader megatron --saver megatron"
        )
    if not ((checkpoint.path / FILE).is_file() or common_state_is_an_object()):
        raise ConfigError(
            f"checkpoint {checkpoint.path} has no {FILE}, which megatron-core "
            f"{megatron_core_version()} needs: load it with megatron-core 0.19, or convert it "
            "first: tools/checkpoint/convert.py --loader megatron --saver megatron"
        )
    p = parallel_state
    group = p.get_data_parallel_group(with_context_parallel=True)
    form = optimizer_form(checkpoint.common)
    metadata = content_metadata(form) | {"dp_cp_group": group}
    padded = getattr(checkpoint.common["args"], "padded_vocab_size", stages[0].vocab_size)
    if padded != stages[0].vocab_size:  # megatron-core would cut or fill the tables silently
        raise ConfigError(
            f"checkpoint {checkpoint.path} has a vocabulary padded to {padded}, the model one "
            f"padded to {stages[0].vocab_size}; see --make-vocab-size-divisible-by"
        )
    models = {
        name: _without_extra_state(model)
        for name, model in _sharded_models(stages, metadata).items()
    }
    _ask_as_stored(models, checkpoint.path)
    if checkpoint.is_hybrid:
        for model in models.values():
            retarget_to_hybrid_layout(model)
    sharded = dict(models)
    if optimizer is not None:
        if checkpoint.is_release:
            raise ConfigError(
                f"checkpoint {checkpoint.path} holds weights only: add --finetune to start "
                "training from them"
            )
        was = checkpoint.common["args"].use_distributed_optimizer
        if was != _is_distributed(optimizer):
            raise ConfigError(
                f"checkpoint {checkpoint.path} was saved {'with' if was else 'without'} "
                "--use-distributed-optimizer: resume the same way, or start anew with --finetune"
            )
        divided = getattr(checkpoint.common["args"], "expert_model_parallel_size", 1) > 1
        if divided != (len(parts(optimizer)) > 1):  # experts have an optimizer of their own
            raise ConfigError(
                f"checkpoint {checkpoint.path} was saved {'with' if divided else 'without'} "
                "--expert-model-parallel-size above 1: resume the same way, or start anew with "
                "--finetune"
            )
        ours = "settings" in stored_record(checkpoint.common)
        if was and form not in ([RESHARDABLE, AS_IT_LIES] if ours else [RESHARDABLE]):
            raise ConfigError(
                f"checkpoint {checkpoint.path} keeps its optimizer in the form {form}, which only "
                "its own program resumes from; add --finetune to start from its weights, or save "
                "it there with --dist-ckpt-optim-fully-reshardable"
            )
        init_optimizer_state(optimizer)
        sharded["optimizer"] = optimizer.sharded_state_dict(
            _of_optimizer(models), is_loading=True, metadata=metadata
        )
        saved = checkpoint.common["args"]
        if (saved.tensor_model_parallel_size, saved.pipeline_model_parallel_size) == (
            p.get_tensor_model_parallel_world_size(),
            p.get_pipeline_model_parallel_world_size(),
        ):
            sharded["rng_state"] = _random_state()
    try:
        with safe_loading():
            state = dist_checkpointing.load(sharded, str(checkpoint.path))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except ANY_FAILURE as error:
        raise DamagedCheckpoint(
            f"checkpoint {checkpoint.path} cannot be loaded: {gist(error).removeprefix(_OURS)}"
        ) from error
    for stage, name in zip(stages, models, strict=True):
        missing, _ = stage.load_state_dict(state[name], strict=False)
        missing = [key for key in missing if not _is_extra_state(key)]
        assert not missing, missing
    if optimizer is not None:
        load_optimizer(optimizer, state["optimizer"])
        scheduler.load_state_dict(state["opt_param_scheduler"])
        if "rng_state" in state:
            _restore_random_state(state["rng_state"])


def _is_distributed(optimizer) -> bool:
    return isinstance(parts(optimizer)[0], DistributedOptimizer)


def _sharded_models(stages: list, metadata: dict) -> dict[str, dict]:
    """Sharded state dicts under Megatron-LM's names: `model`, or `model0`, `model1`, ... for the
    chunks of an interleaved pipeline."""
    names = ["model"] if len(stages) == 1 else [f"model{i}" for i in range(len(stages))]
    return {
        name: stage.sharded_state_dict(metadata=metadata)
        for name, stage in zip(names, stages, strict=True)
    }


def _of_optimizer(models: dict[str, dict]) -> dict:
    """The optimizer looks parameters up by identity and takes one level or two."""
    return models["model"] if len(models) == 1 else models


def _without_extra_state(sharded: dict) -> dict:
    """Leaves out Transformer Engine's FP8 state, which converted and `torch` checkpoints lack."""
    return {name: value for name, value in sharded.items() if not _is_extra_state(name)}


def _is_extra_state(name: str) -> bool:
    """Of several experts in one module they are `_extra_state`, `_extra_state1`, and so on."""
    return name.rpartition(".")[2].startswith("_extra_state")


def _ask_as_stored(models: dict[str, dict], path: Path) -> None:
    """Names the norm before experts as the checkpoint does: megatron-core's local layer spec takes
    it for a part of a dense MLP."""
    own, local = (f"decoder.layers.{name}" for name in (EXPERTS_NORM, LOCAL_EXPERTS_NORM))
    everything = (tensor for model in models.values() for tensor in model.values())
    asked = [tensor for tensor in everything if getattr(tensor, "key", None) == own]
    if not asked or own in (stored := read_index(path).tensors) or local not in stored:
        return
    for tensor in asked:
        tensor.key = local


def _random_state() -> ShardedObject:
    """This tensor and pipeline rank's random generators, under Megatron-LM's names."""
    p = parallel_state
    state = [
        {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "cuda_rng_state": torch.cuda.get_rng_state(),
            "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
        }
    ]
    return ShardedObject(
        "rng_state",
        state,
        (p.get_pipeline_model_parallel_world_size(), p.get_tensor_model_parallel_world_size()),
        (p.get_pipeline_model_parallel_rank(), p.get_tensor_model_parallel_rank()),
        replica_id=p.get_data_parallel_rank(with_context_parallel=True),
    )


def _restore_random_state(states: list[dict]) -> None:
    """Those of the device go on too, unless it is of another kind and has other generators; no
    sample, position or step draws from them."""
    state = states[0]
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    if state["cuda_rng_state"].shape != torch.cuda.get_rng_state().shape:
        print_rank_0(
            "the run was saved on another kind of device: the random generators of this one begin "
            "anew; samples, positions and steps, which do not draw from them, go on"
        )
        return
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])
