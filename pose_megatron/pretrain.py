"""Trains a RoPE language model on L tokens at a time, with positions up to T.

torchrun --nproc-per-node 2 -m pose_megatron.pretrain --help
"""

import logging
import sys

from pose_megatron.config.arguments import parse
from pose_megatron.runtime.cli import command
from pose_megatron.runtime.ranks import print_rank_0, rank, world_size
from pose_megatron.runtime.startup import prepare_megatron


@command
def main() -> None:
    args = parse()
    prepare_megatron(args.parallel.device)
    from pose_megatron.config.layout import lay_out
    from pose_megatron.data.batch import fields_here
    from pose_megatron.planning.shortage import shortages_explained
    from pose_megatron.runtime import distributed
    from pose_megatron.runtime.device import check_bf16
    from pose_megatron.training.description import describe
    from pose_megatron.training.resume import changes
    from pose_megatron.training.run import assemble, train_valid_test_datasets_provider
    from pose_megatron.training.save_folder import check_save, own_save
    from pose_megatron.training.train import train
    from pose_megatron.training.trainer import setup

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if rank() == 0:
        logging.getLogger("pose_megatron").setLevel(logging.INFO)

    if args.training.bf16:
        check_bf16()
    # What is trained, and how the ranks divide it.
    run = assemble(args)
    check_save(run)
    resumed = run.loaded if run.resume else None
    layout = lay_out(args, run.model, world_size(), resumed.consumed_samples if resumed else 0)
    describe(run, layout)
    for line in changes(run, layout):
        print_rank_0(line)
    if args.logging.dry_run:
        return

    distributed.initialize(
        args.training.seed,
        **args.parallel.sizes(run.model.num_layers),
        timeout_minutes=args.parallel.distributed_timeout_minutes,
    )

    with own_save(args.checkpoint.save, run.model, args.training.bf16):
        # The corpus: skip-wise positions for training, plain ones for validation.
        positions_only = "tokens" not in fields_here()
        datasets = train_valid_test_datasets_provider(run, layout, positions_only)

        with shortages_explained(sys.argv[1:]):
            trainer = setup(run, layout)
            train(trainer, *datasets)


if __name__ == "__main__":
    sys.exit(main())
