"""Trains a RoPE language model on L tokens at a time, with positions up to T.

    torchrun --nproc-per-node 2 pretrain_pose.py --help

The program is pose_megatron/pretrain.py; it reads from top to bottom.
"""

import sys

from pose_megatron.runtime.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()
    from pose_megatron.pretrain import main

    sys.exit(main())
