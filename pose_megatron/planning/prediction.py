"""How long a step should take: a roofline over what its stages compute, read, write and send.

A prediction, in which nothing is measured. It knows no launches, no waiting of the host, no
straggling ranks and no congestion, so a real step takes longer.
"""

from dataclasses import dataclass

from pose_megatron.config.flags import ParallelFlags
from pose_megatron.planning.gpus import NODE, Rates
from pose_megatron.planning.stage import Stage, Work

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step.

    Attributes:
        parts: {what: seconds}, of the slowest stage; they add up to the step.
    """

    parts: dict[str, float]

    @property
    def step(self) -> float:
        return sum(self.parts.values())


def predict(
    stages: list[Stage],
    rates: Rates,
    p: ParallelFlags,
    micro_batches: int,
    data_parallel_size: int,
    chunks: int,
) -> Prediction:
    """The time of a step of `micro_batches` on each rank.

    A stage's micro-batch takes the sum of its parts; tensor- and context-parallel traffic is not
    overlapped. The pipeline fills and drains in (stages - 1) / chunks micro-batches of its slowest
    stage (Narayanan et al., arXiv 2104.04473). Gradients and weights travel once a step, behind the
    last micro-batch where --overlap-grad-reduce is given.

    Args:
        chunks: of the model on each rank; 1 without interleaving.
    """
    reach = _reach(p, data_parallel_size)
    speed = {
        axis: (rates.link if ranks <= NODE else rates.network) * GIGA
        for axis, ranks in reach.items()
    }
    batches = [_seconds(stage.batch, rates, speed) for stage in stages]
    slowest = max(batches, key=lambda parts: sum(parts.values()))
    last = max((_seconds(s.step, rates, speed) for s in stages), key=lambda x: sum(x.values()))
    once = last["data"]
    if p.overlap_grad_reduce:
        once = max(0.0, once - sum(slowest.values()))
    parts = {name: micro_batches * seconds for name, seconds in slowest.items()}
    parts["bubble"] = (p.pipeline_model_parallel_size - 1) / chunks * sum(slowest.values())
    parts["data"] += once
    parts["update"] = last["memory"]
    return Prediction(parts)


def _reach(p: ParallelFlags, dp: int) -> dict[str, int]:
    """{axis: how many consecutive ranks its groups span}: one node's, or more."""
    tp, cp, ep = (
        p.tensor_model_parallel_size,
        p.context_parallel_size,
        p.expert_model_parallel_size,
    )
    pp = p.pipeline_model_parallel_size
    return {
        "tensor": tp,
        "context": tp * cp,
        "expert": tp * ep,
        "data": tp * cp * dp,
        "pipeline": tp * cp * dp * pp,
    }


def _seconds(work: Work, rates: Rates, speed: dict[str, float]) -> dict[str, float]:
    return {
        "matrix products": work.gemm / (rates.gemm * TERA),
        "attention": work.attention / (rates.attention * TERA),
        "memory": work.moved / (rates.memory * TERA),
        **{axis: sent / speed[axis] for axis, sent in work.sent.items()},
    }
