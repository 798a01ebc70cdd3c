"""How large a reproduction is: the model, its windows, and how long it trains."""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Profile:
    """
    Attributes:
        window: L in tokens, the base model's.
        base: flags of the base model's training; empty where it comes from outside.
        shape: flags of its sizes; empty where it comes from outside.
        extend: flags of every extension.
        iters, batch: steps of an extension, and windows of L tokens in each.
        micro_batch: of them at once in a process.
        seeds: of each extension.
        factors: T / L of the main comparison, and of the far one (the paper's Table 2).
        documents: held-out ones that are measured; texts with pairs to recall are four times that.
        ranks: processes of a training.
        measure: flags of every measurement.
        cost: flags of benchmarks/full_length.py.
        vocabulary: tokens of the tokenizer that is trained, 136 of them symbols to recall.
    """

    window: int
    base: Sequence[str]
    shape: Sequence[str]
    extend: Sequence[str]
    iters: int
    batch: int
    micro_batch: int
    seeds: Sequence[int]
    factors: Sequence[int]
    far: Sequence[int]
    documents: int
    ranks: int = 1
    cost: Sequence[str] = ("--steps", "5")
    measure: Sequence[str] = ()
    vocabulary: int = 704


_SMALL = Profile(
    window=64,
    base="--train-iters 1200 --lr 3e-3 --lr-warmup-iters 50".split(),
    shape=(
        "--num-layers 3 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 384"
    ).split(),
    extend="--lr 1e-3 --lr-warmup-iters 10".split(),
    iters=150,
    batch=64,
    micro_batch=64,
    seeds=(1, 2, 3),
    factors=(8, 16),
    far=(32, 64),
    documents=24,
)

PROFILES = {
    # two CPU cores, about two hours
    "cpu": _SMALL,
    # one GPU; not run yet
    "gpu": replace(
        _SMALL,
        window=256,
        base="--train-iters 4000 --lr 2e-3 --lr-warmup-iters 100 --bf16".split(),
        shape=(
            "--num-layers 8 --hidden-size 512 --num-attention-heads 8 --ffn-hidden-size 1408"
        ).split(),
        extend="--lr 5e-4 --lr-warmup-iters 10 --bf16".split(),
        iters=300,
        measure=("--bf16",),
        cost="--seq-length 2048 --hidden-size 2048 --steps 5 --extra=--bf16".split(),
        vocabulary=4096,
    ),
    # LLaMA-7B on 8 GPUs, as in the paper; not run, its commands are tested
    "paper": Profile(
        window=2048,
        base=(),
        shape=(),
        extend=(
            "--lr 2e-5 --lr-warmup-iters 10 --lr-decay-style linear --bf16 "
            "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer"
        ).split(),
        iters=1000,
        batch=64,
        micro_batch=1,
        seeds=(1,),
        factors=(8, 16),
        far=(32, 64),
        documents=20,
        ranks=8,
        measure=("--bf16",),
        cost="--seq-length 2048 --hidden-size 4096 --steps 5 --extra=--bf16".split(),
    ),
    # seconds: whether all of it works
    "smoke": replace(
        _SMALL,
        base="--train-iters 4 --lr 3e-3".split(),
        extend="--lr 1e-3".split(),
        iters=2,
        batch=4,
        micro_batch=4,
        seeds=(1, 2),
        factors=(2, 4),
        far=(8,),
        documents=3,
        cost="--seq-length 16 --hidden-size 64 --factors 2 4 --steps 2".split(),
    ),
}
