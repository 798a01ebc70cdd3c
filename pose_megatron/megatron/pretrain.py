"""Megatron's own trainer with PoSE, in one call."""

import datetime
import inspect
import os

import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args

from pose_megatron.errors import ConfigError
from pose_megatron.megatron.batch import train_valid_test_datasets_provider
from pose_megatron.megatron.flags import add_pose_args
from pose_megatron.megatron.model import with_pose
from pose_megatron.megatron.step import forward_step
from pose_megatron.runtime.attempts import meet
from pose_megatron.runtime.megatron_core import INSTALL, megatron_core_version

_KNOWN = ["cfg_container", "train_valid_test_dataset_provider", "model_type", "forward_step_func"]


def run() -> None:
    """Megatron's pretrain() of a GPTModel, or of a HybridModel if there is --hybrid-layer-pattern.

    Raises:
        ConfigError: pretrain() takes other arguments than those of megatron-core 0.19, or a flag
            contradicts PoSE.
    """
    names = list(inspect.signature(pretrain).parameters)
    if names[: len(_KNOWN)] != _KNOWN:
        raise ConfigError(
            f"megatron-core {megatron_core_version()} has pretrain({', '.join(names)}), and PoSE "
            f"knows pretrain({', '.join(_KNOWN)}, ...): {INSTALL}"
        )
    args = parse_and_validate_args(extra_args_provider=add_pose_args)
    config_from_args = (
        hybrid_config_from_args if args.hybrid_layer_pattern else gpt_config_from_args
    )
    config = with_pose(config_from_args(args), args)
    pretrain(
        pretrain_cfg_container_from_args(args, config),
        train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        store=_store(args.distributed_timeout_minutes),
    )


def _store(timeout_minutes: int) -> dist.Store | None:
    """Where the ranks that torchrun started meet; None leaves that to Megatron."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    store, _, _ = meet(datetime.timedelta(minutes=timeout_minutes))
    return store
