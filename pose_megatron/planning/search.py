"""Layouts of a number of GPUs that hold a run, in the order of their predicted times."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pose_megatron.errors import ConfigError
from pose_megatron.planning.gpus import NODE, Rates
from pose_megatron.planning.plan import Job, layout_of
from pose_megatron.planning.prediction import Prediction

MOST_STAGES = 32
RECOMPUTE_ALL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
RECOMPUTE_NOTHING = dict.fromkeys(RECOMPUTE_ALL)
# bfloat16 weights and float32 gradients; float32 weights and both moments of Adam, which data
# parallelism divides.
WHOLE_BYTES, SHARED_BYTES = 6, 12


@dataclass(frozen=True)
class Found:
    """A layout that fits; `peak` in bytes, of the fuller of its first and last stage."""

    job: Job
    peak: int
    prediction: Prediction


def search(
    start: Job, room: int, rates: Rates, count: int, say: Callable[[str], None]
) -> tuple[list[Found], int]:
    """The layouts that fit into `room` bytes, the fastest first.

    They are tried from those that divide the model least; a layout whose weights, gradients and
    optimizer alone are too large is not run. The search ends with the size of model parallelism at
    which `count` layouts have been found and one of them recomputes nothing: larger ones send more.

    Args:
        start: its other flags hold for all; the distributed optimizer is on, and sequence
            parallelism with tensor parallelism.
        say: told what is tried.

    Returns:
        (layouts, how many were run on the meta device).
    """
    found: list[Found] = []
    tried = 0
    for _, group in itertools.groupby(_candidates(start), lambda job: _size(job)):
        for job in group:
            if _least(job) > room:
                continue
            say(f"trying {layout_of(job)}")
            tried += 1
            stages = job.ends()
            if (peak := max(stage.peak for stage in stages)) <= room:
                found.append(Found(job, peak, job.predict(stages, rates)))
        if len(found) >= count and not all(_recomputes(layout.job) for layout in found):
            break
    return sorted(found, key=lambda layout: layout.prediction.step)[:count], tried


def _candidates(start: Job) -> Iterator[Job]:
    """All layouts that divide, those with the smallest model parallelism first."""
    world, layers = start.world_size, start.run.model.num_layers
    powers = [2**n for n in range(world.bit_length())]
    tensor = [n for n in powers if n <= NODE]
    pipeline = [n for n in range(1, MOST_STAGES + 1) if layers % n == 0 and world % n == 0]
    expert = [n for n in powers if (start.run.model.num_experts or 1) % n == 0]
    sizes = sorted(
        itertools.product(tensor, pipeline, powers, expert),
        key=lambda s: (s[0] * s[1] * s[2], -s[0], s[3]),
    )
    for tp, pp, cp, ep in sizes:
        for recompute in (RECOMPUTE_NOTHING, RECOMPUTE_ALL):
            try:
                yield start.changed(
                    tensor_model_parallel_size=tp,
                    pipeline_model_parallel_size=pp,
                    context_parallel_size=cp,
                    expert_model_parallel_size=ep,
                    num_layers_per_virtual_pipeline_stage=None,
                    sequence_parallel=tp > 1,
                    use_distributed_optimizer=True,
                    global_batch_size=start.layout.global_batch_size,
                    **recompute,
                )
            except ConfigError:  # it does not divide
                break


def _recomputes(job: Job) -> bool:
    return job.run.args.training.recompute_granularity is not None


def _size(job: Job) -> int:
    return job.world_size // job.layout.data_parallel_size


def _least(job: Job) -> float:
    """Bytes that the mean stage of a bfloat16 model holds at the very least."""
    run, p = job.run, job.run.args.parallel
    if not run.args.training.bf16:
        return 0
    replicas = job.layout.data_parallel_size * p.context_parallel_size
    ranks = p.tensor_model_parallel_size * p.pipeline_model_parallel_size
    ep, experts = p.expert_model_parallel_size, run.model.num_expert_parameters
    held = run.model.num_parameters - experts + experts / ep
    return (held * WHOLE_BYTES + run.model.num_parameters / replicas * SHARED_BYTES) / ranks
