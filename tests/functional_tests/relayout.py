"""Loads a converted checkpoint in several layouts of four ranks, trains a little at a learning rate
of zero, and saves the whole training state in each: what comes out holds the weights that went in.

    torchrun --standalone --nproc-per-node 4 tests/functional_tests/relayout.py MODEL CORPUS OUTPUT
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.functional_tests.layouts import COMMON, CP, PP, SHARDED, SP, TP, VPP2, train

RELAYOUTS = {
    "TP4 SP, 2 query groups": f"{TP} 4 {SP}",
    "TP2 PP2 VPP2, distributed optimizer": f"{TP} 2 {PP} 2 {VPP2} {SHARDED}",
    "CP2 TP2 SP, distributed optimizer": f"{CP} 2 {TP} 2 {SP} {SHARDED}",
    "PP4": f"{PP} 4",
}


def main() -> None:
    from pose_megatron.runtime import cpu

    cpu.install()
    import torch.distributed as dist

    from pose_megatron.runtime import distributed

    model, corpus, output = sys.argv[1:]
    distributed.initialize(seed=0)
    for name, words in RELAYOUTS.items():
        flags = f"{COMMON} {words} --data-path {corpus} --load {model} --finetune --lr 0"
        train([*flags.split(), "--save", f"{output}/{name}"], save_at=1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
