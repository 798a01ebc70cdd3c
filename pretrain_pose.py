"""Trains a RoPE language model on L tokens at a time, with positions up to T.

    torchrun --nproc-per-node 2 pretrain_pose.py --help

The program is pose_megatron/pretrain.py; it reads from top to bottom.
"""

import sys

from pose_megatron.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
