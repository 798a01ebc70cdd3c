"""What one step of training takes of a pipeline stage's rank: memory, work and traffic."""

import dataclasses
import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer

from pose_megatron.config.layout import Layout
from pose_megatron.data.batch import fields_here
from pose_megatron.planning.meta import META, one_rank
from pose_megatron.planning.meters import Meters
from pose_megatron.training.optimizer import init_optimizer_state, parts
from pose_megatron.training.run import Run
from pose_megatron.training.step import train_step
from pose_megatron.training.trainer import Trainer, setup

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "update")
PHASES = ("batches", "reduction", "update")  # of a step
COUNTS = ("gemm", "attention", "moved", "launches", "waits")
AXES = ("tensor", "context", "pipeline", "data", "expert")
FEW = (2, 3)  # layers in each model chunk of a sketch


@dataclass(frozen=True)
class Work:
    """What a rank computes, reads, writes and sends.

    Attributes:
        gemm, attention: FLOPs, with those of recomputation.
        moved: bytes that other operators read and write.
        launches: kernels that the host starts, collectives among them.
        waits: how often the host waits for the GPU.
        sent: {axis of AXES: bytes to other ranks}.
    """

    gemm: float
    attention: float
    moved: float
    launches: float
    waits: float
    sent: dict[str, float]

    def beyond(self, other: "Work", share: float) -> "Work":
        """On the line from `other` through this, `share` of its length further."""
        return self._with(other, lambda this, that: this + share * (this - that))

    def __add__(self, other: "Work") -> "Work":
        return self._with(other, operator.add)

    def __truediv__(self, count: int) -> "Work":
        return self._with(self, lambda this, _: this / count)

    def _with(self, other: "Work", of: Callable[[float, float], float]) -> "Work":
        counts = {name: of(getattr(self, name), getattr(other, name)) for name in COUNTS}
        return Work(**counts, sent={axis: of(self.sent[axis], other.sent[axis]) for axis in AXES})


@dataclass(frozen=True)
class Stage:
    """A pipeline stage's first rank in one step.

    Attributes:
        number: the stage's, from 0.
        parameters: on this rank.
        moments: {phase of PHASES: {part of PARTS: bytes}}, where it is fullest; `update` is what
            the optimizer needs in passing.
        batch: work of one micro-batch, forward and backward.
        step: work of the gradients' reduction and the update, once a step.
    """

    number: int
    parameters: int
    moments: dict[str, dict[str, int]]
    batch: Work
    step: Work

    @property
    def memory(self) -> dict[str, int]:
        """{part: bytes} at the fullest moment of the step."""
        return max(self.moments.values(), key=lambda parts: sum(parts.values()))

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        return sum(self.memory.values())

    def beyond(self, other: "Stage", share: float) -> "Stage":
        """As Work.beyond."""
        return Stage(
            self.number,
            self.parameters + round(share * (self.parameters - other.parameters)),
            {
                phase: {
                    part: n + round(share * (n - other.moments[phase][part]))
                    for part, n in memory.items()
                }
                for phase, memory in self.moments.items()
            },
            self.batch.beyond(other.batch, share),
            self.step.beyond(other.step, share),
        )


def sketch(run: Run, layout: Layout, world_size: int, number: int) -> Stage:
    """What `measure` returns, from two runs of FEW layers in each model chunk: all of it is linear
    in the layers, memory phase by phase."""
    p, layers = run.args.parallel, run.model.num_layers
    pp = p.pipeline_model_parallel_size
    chunks = p.virtual_pipeline_size(layers) or 1
    each = layers // pp // chunks
    t = run.args.training
    if each <= FEW[1] or t.recompute_method == "block" or (t.recompute_num_layers or 1) > 1:
        return measure(run, layout, world_size, number)
    parallel = p
    fewer = []
    for count in FEW:
        if chunks > 1:
            parallel = dataclasses.replace(p, num_layers_per_virtual_pipeline_stage=count)
        model = dataclasses.replace(run.model, num_layers=count * chunks * pp)
        args = dataclasses.replace(run.args, parallel=parallel)
        shallow = dataclasses.replace(run, args=args, model=model)
        fewer.append(measure(shallow, layout, world_size, number))
    return fewer[1].beyond(fewer[0], (each - FEW[1]) / (FEW[1] - FEW[0]))


def measure(run: Run, layout: Layout, world_size: int, number: int) -> Stage:
    """Runs one step of a stage's first rank on the meta device.

    Args:
        run: as `assemble` returns it; nothing is loaded.
        number: of the pipeline stage.
    """
    p = run.args.parallel
    sizes = p.sizes(run.model.num_layers)
    rank = number * (world_size // p.pipeline_model_parallel_size)
    run = dataclasses.replace(run, loaded=None, resume=False, tokenizer=None)
    batches = _micro_batches(run, layout)
    layout = dataclasses.replace(
        layout,
        global_batch_size=batches * layout.micro_batch_size * layout.data_parallel_size,
        rampup=None,
    )
    routed = (run.model.moe_router_topk or 1) / (run.model.num_experts or 1)
    with one_rank(rank, world_size, sizes, routed), Meters() as meters:
        trainer = setup(run, layout)
        init_optimizer_state(trainer.optimizer)
        _file(trainer, meters)
        _mark_phases(trainer, meters)
        tokens = torch.empty(
            len(fields_here()), layout.micro_batch_size, run.args.data.seq_length,
            dtype=torch.int64, device=META,
        )  # fmt: skip
        data = [itertools.repeat(tokens) for _ in trainer.models]
        for model in trainer.models:
            model.train()
        meters.enter("batches")
        train_step(trainer, data if len(data) > 1 else data[0])
        meters.enter("end")
        axes = _axes()
        parameters = sum(t.numel() for stage in trainer.stages for t in stage.parameters())
    moments = {
        phase: {part: meters.moments[phase].get(part, 0) for part in PARTS} for phase in PHASES
    }
    batch, reduction, update = (_work(meters, phase, axes) for phase in PHASES)
    # With the flags that overlap them, gradients and weights travel between the micro-batches.
    step = reduction + update
    step.sent["data"] += batch.sent["data"]
    batch.sent["data"] = 0.0
    return Stage(number, parameters, moments, batch / batches, step)


def _micro_batches(run: Run, layout: Layout) -> int:
    """As many as fill the pipeline: later ones take what earlier ones leave."""
    p = run.args.parallel
    pp, chunks = p.pipeline_model_parallel_size, p.virtual_pipeline_size(run.model.num_layers)
    enough = 2 * pp if chunks or pp == 1 else pp + 1
    return min(layout.num_microbatches(layout.global_batch_size), enough)


def _file(trainer: Trainer, meters: Meters) -> None:
    """Says whose the tensors are that outlast a step."""
    ledger = meters.memory
    for part in parts(trainer.optimizer):
        ledger.move(_optimizer_tensors(part), "optimizer")
    for model in trainer.models:
        for buffer in [*model.buffers, *model.expert_parallel_buffers]:
            ledger.move([buffer.grad_data], "gradients")
            if buffer.param_data is not None:
                ledger.move([buffer.param_data], "weights")
    ledger.move((t for stage in trainer.stages for t in stage.parameters()), "weights")
    last = trainer.stages[-1]
    if last.post_process:
        meters.vocabulary = (
            trainer.config.padded_vocab_size // last.config.tensor_model_parallel_size
        )


def _optimizer_tensors(optimizer: MegatronOptimizer):
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _mark_phases(trainer: Trainer, meters: Meters) -> None:
    core, optimizer = trainer.stages[0].config, trainer.optimizer
    reduce, prepare = core.finalize_model_grads_func, optimizer.prepare_grads

    def reduction(*args, **kwargs):
        meters.enter("reduction")
        return reduce(*args, **kwargs)

    def update(*args, **kwargs):
        meters.enter("update")
        return prepare(*args, **kwargs)

    core.finalize_model_grads_func = reduction
    optimizer.prepare_grads = update


def _axes() -> dict[str, str]:
    """{name of a process group: axis}."""
    state = parallel_state
    groups = {
        "tensor": [state.get_tensor_model_parallel_group()],
        "context": [state.get_context_parallel_group()],
        "pipeline": [
            state.get_pipeline_model_parallel_group(),
            state.get_embedding_group(check_initialized=False),  # of tied embeddings
        ],
        "data": [
            state.get_data_parallel_group(),
            state.get_data_parallel_group(with_context_parallel=True),
            state.get_expert_data_parallel_group(),
        ],
        "expert": [
            state.get_expert_model_parallel_group(),
            state.get_expert_tensor_and_model_parallel_group(),
        ],
    }
    named = {group.group_name: axis for axis, found in groups.items() for group in found if group}
    return named | {"pipeline": "pipeline"}


def _work(meters: Meters, phase: str, axes: dict[str, str]) -> Work:
    sent = dict.fromkeys(AXES, 0.0)
    for (when, group), bytes_sent in meters.sent.items():
        if when == phase and group in axes:
            sent[axes[group]] += bytes_sent
    return Work(**{name: getattr(meters, name)[phase] for name in COUNTS}, sent=sent)
