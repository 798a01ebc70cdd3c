"""Megatron's own pretrain() of a HybridModel, with PoSE: positions up to --max-position-embeddings.

torchrun --nproc-per-node 8 pretrain_hybrid_pose.py <Megatron-LM's flags> --rope-scaling yarn
"""

import sys

from pose_megatron.megatron import prepare
from pose_megatron.runtime.cli import command


@command
def main() -> None:
    prepare()
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import hybrid_config_from_args as config_from_args
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from pose_megatron import megatron as pose

    args = parse_and_validate_args(extra_args_provider=pose.add_pose_args)
    config = pose.with_pose(config_from_args(args), args)
    pretrain(
        pretrain_cfg_container_from_args(args, config),
        pose.train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        pose.forward_step,
    )


if __name__ == "__main__":
    sys.exit(main())
