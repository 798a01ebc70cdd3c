"""LLaMA's shapes and a small one, as flags of pretrain_pose.py."""

SIZES = {  # layers, hidden, feed-forward, heads, key-value heads, vocabulary
    "7B": (32, 4096, 11008, 32, 32, 32000),
    "8B": (32, 4096, 14336, 32, 8, 128256),
    "70B": (80, 8192, 28672, 64, 8, 128256),
    "8x7B": (32, 4096, 14336, 32, 8, 32000),  # --num-experts 8
    "tiny": (8, 64, 128, 4, 4, 300),
    "small": (4, 256, 512, 4, 2, 1000),
}
LAYERS = {name: size[0] for name, size in SIZES.items()}


def flags(size: str, window: int, more: str = "") -> list[str]:
    """For training on `window` tokens, with the distributed optimizer."""
    layers, hidden, ffn, heads, groups, vocabulary = SIZES[size]
    words = (
        f"--num-layers {layers} --hidden-size {hidden} --ffn-hidden-size {ffn} "
        f"--num-attention-heads {heads} --vocab-size {vocabulary} --seq-length {window} "
        f"--untie-embeddings-and-output-weights --use-distributed-optimizer {more}"
    ).split()
    if groups < heads:
        words += ["--group-query-attention", "--num-query-groups", str(groups)]
    return words
