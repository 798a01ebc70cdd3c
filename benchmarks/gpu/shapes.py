"""LLaMA's shapes, as flags of pretrain_pose.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A model, or so many of its layers that one GPU trains them.

    Attributes:
        layers: of them all, and how many are trained here.
        groups: key-value heads.
    """

    layers: tuple[int, int]
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocabulary: int
    tied: bool = False

    def flags(
        self, window: int, target: int, micro_batch: int = 1, batch: int = 1, layers: int = 0
    ) -> list[str]:
        """For a window of so many tokens, with positions up to `target`.

        Args:
            micro_batch, batch: samples.
            layers: others than are trained.
        """
        words = (
            f"--num-layers {layers or self.layers[1]} --hidden-size {self.hidden} "
            f"--ffn-hidden-size {self.ffn} --num-attention-heads {self.heads} "
            f"--group-query-attention --num-query-groups {self.groups} "
            f"--vocab-size {self.vocabulary} --rotary-base 500000 --bf16 --seq-length {window} "
            f"--micro-batch-size {micro_batch} --global-batch-size {batch}"
        ).split()
        if target > window:
            words += ["--max-position-embeddings", str(target), "--rope-scaling", "yarn"]
        return words if self.tied else [*words, "--untie-embeddings-and-output-weights"]


SHAPES = {
    "Llama 3.2 1B": Shape((16, 16), 2048, 8192, 32, 8, 128256, tied=True),
    "Llama 3 8B, 6 of 32 layers": Shape((32, 6), 4096, 14336, 32, 8, 128256),
}
WHOLE = "Llama 3 8B, 6 of 32 layers"  # evaluated with all of its layers
DRY = Shape((2, 2), 256, 512, 4, 2, 1024)


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        shapes: that train.
        windows: tokens, of steps.
        times: of the window, trained on at full length.
        micro_batch: tokens of it, or one sample where a window is longer.
        micro_batches: of a step.
        samples: of a step, at full length and of PoSE beside it.
        lengths: tokens, of evaluation.
        steps: measured, of each kind.
        reader: the shape that evaluates, with all of its layers.
    """

    shapes: dict[str, Shape]
    windows: tuple[int, ...]
    times: tuple[int, ...]
    micro_batch: int
    micro_batches: int
    samples: int
    lengths: tuple[int, ...]
    steps: int
    reader: Shape

    def samples_of_micro_batch(self, window: int) -> int:
        return max(1, self.micro_batch // window)


FULL = Scale(SHAPES, (2048, 4096, 8192), (2, 4, 8), 8192, 4, 8, (32768, 131072), 5, SHAPES[WHOLE])
TINY = Scale({"dry": DRY}, (128, 256), (2, 4), 256, 2, 2, (512, 1024), 2, DRY)
