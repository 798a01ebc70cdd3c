"""What a program does before it imports megatron.training."""

import functools
import multiprocessing.connection
import multiprocessing.process
import os
import socket
import threading
import types
from importlib.util import find_spec

import torch
from packaging.version import Version

from pose_megatron.checkpoints.megatron.safe_loading import load_safely
from pose_megatron.errors import ConfigError
from pose_megatron.runtime.cli import print_error
from pose_megatron.runtime.megatron_core import megatron_core_version
from pose_megatron.runtime.processes import children_end_with_this
from pose_megatron.runtime.startup import prepare_megatron

# Flags that a machine without CUDA needs, by their names in Megatron's parser.
CPU_DEFAULTS = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "masked_softmax_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    "apply_rope_fusion": False,
}


def prepare() -> None:
    """Lets megatron.training run from a wheel, with torch's AdamW, and without CUDA, and has it run
    no code that a torch_dist checkpoint holds.

    Raises:
        ConfigError: this megatron-core has no megatron.training, or one that is driven in another
            way; says what to install.
    """
    prepare_megatron()
    _check_version()
    load_safely()
    _mend_wheel()
    if not torch.cuda.is_available():
        _run_without_cuda()
    _mend_resuming()
    _notice_dead_writers()


def _check_version() -> None:
    version = megatron_core_version()
    if version < Version("0.19.0.dev0"):
        raise ConfigError(
            "pose_megatron.megatron needs megatron.training of megatron-core 0.19 or newer, not "
            f"of {version}: pip install 'megatron-core>=0.19.2,<0.20' on Python 3.12 or 3.13"
        )
    if find_spec("megatron.training") is None:
        raise ConfigError(
            f"megatron-core {version} comes without megatron.training: pip install the wheel of "
            "PyPI, or put a clone of Megatron-LM on PYTHONPATH"
        )


def _mend_wheel() -> None:
    """Keeps pretrain() from running `make` for the dataset helpers that a wheel has compiled.

    The wheels of 0.17 to 0.19.2 leave the Makefile out, and pretrain() exits when `make` fails
    (megatron/training/initialize.py). No report of it was found upstream.
    """
    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401  compiled: there is nothing to make
    except ImportError:
        return
    from megatron.core.datasets import utils

    utils.compile_helpers = lambda: None


def _run_without_cuda() -> None:
    """What pretrain() needs beyond runtime/cpu.py."""
    if "RANK" not in os.environ:  # a single rank, without torchrun
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    properties = types.SimpleNamespace(
        major=9, minor=0, name="cpu", total_memory=0, multi_processor_count=1
    )
    for name, function in {
        "device_count": lambda: 1,  # guards the process groups and the seeds
        "get_device_properties": lambda *_: properties,
    }.items():
        setattr(torch.cuda, name, function)
    torch._dynamo.config.disable = True  # pretrain() compiles its fused activations at every start
    from megatron.training import training

    training.initialize_megatron = functools.partial(
        training.initialize_megatron, allow_no_cuda=True
    )


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _mend_resuming() -> None:
    """Has torch's AdamW, where neither Transformer Engine nor apex is, resume exactly."""
    from megatron.core.optimizer import distrib_optimizer
    from megatron.training import training

    from pose_megatron.training.optimizer import init_optimizer_state, mend_torch_adam

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    mend_torch_adam()
    load = training.load_checkpoint

    @functools.wraps(load)
    def load_checkpoint(model, optimizer, *args, **kwargs):
        if optimizer is not None:
            init_optimizer_state(optimizer)
        return load(model, optimizer, *args, **kwargs)

    training.load_checkpoint = load_checkpoint


def _notice_dead_writers() -> None:
    """Ends a rank whose writer of checkpoints (--use-persistent-ckpt-worker) has died: Megatron
    would wait for it for ever."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    children_end_with_this()  # Megatron forks a manager, too
    start, watched = PersistentAsyncCaller._get_process, set()

    def start_watched(cls, *args, **kwargs):
        writer = start(*args, **kwargs)
        if writer.pid not in watched:
            watched.add(writer.pid)
            threading.Thread(target=_end_with, args=(writer,), daemon=True).start()
        return writer

    PersistentAsyncCaller._get_process = classmethod(start_watched)


def _end_with(writer: multiprocessing.process.BaseProcess) -> None:
    """Waits in a thread, until the rank or its writer ends."""
    multiprocessing.connection.wait([writer.sentinel])
    if writer.exitcode and threading.main_thread().is_alive():
        print_error(
            f"the process that writes this rank's checkpoints ended with code {writer.exitcode}: "
            "killed, perhaps because memory ran out, or see its traceback; the checkpoint that it "
            "was writing is not whole, those before it are"
        )
        os._exit(1)
