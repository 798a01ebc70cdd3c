"""A plan as a page and as JSON."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from pose_megatron.errors import ConfigError
from pose_megatron.planning.gpus import Rates
from pose_megatron.planning.plan import GIB, Job, layout_of, remedies
from pose_megatron.planning.prediction import Prediction
from pose_megatron.planning.search import Found
from pose_megatron.planning.stage import AXES, PARTS, Stage

# Of a launch on the host beside an H200, forward and backward (docs/scale.md).
LAUNCH = 1.2e-4  # seconds
LEGEND = """memory: GiB of tensors on a GPU at the fullest moment of a step, by CUDA's allocator;
  activations hold that moment's temporary tensors, update the optimizer's if the moment is there
FLOPs: 6 a weight and token, and 6 x heads x channels x L a layer and token for causal attention
sent: by a GPU in a step, counted at the collectives, as rings send
time: a prediction, nothing is measured: FLOPs, bytes and traffic over the rates above. Launches and
  waits of the host are not counted, so a real step is slower"""


@dataclass(frozen=True)
class Machine:
    """The GPU of a plan; `memory` and `reserve` in GiB."""

    gpu: str
    memory: float
    reserve: float
    rates: Rates

    @property
    def room(self) -> int:
        """Bytes that tensors may take."""
        return int((self.memory - self.reserve) * GIB)

    def __str__(self) -> str:
        return f"{self.gpu} of {self.memory:g} GiB, {self.reserve:g} of them kept free"


@dataclass(frozen=True)
class Measured:
    """A job and its stages on the meta device."""

    job: Job
    stages: list[Stage]
    prediction: Prediction

    @property
    def peak(self) -> int:
        return max(stage.peak for stage in self.stages)

    @property
    def fullest(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def launching(self) -> float:
        """Seconds that the host may need to launch a step's kernels, for which the GPU waits."""
        return LAUNCH * self.job.count(self.stages, "launches")

    @property
    def model_flops_rate(self) -> float:
        """FLOP/s of a GPU, without recomputation."""
        return self.job.flops / self.prediction.step / self.job.world_size

    def to_dict(self) -> dict:
        stages = [
            {"stage": s.number, "parameters": s.parameters, "peak": s.peak, **s.memory}
            for s in self.stages
        ]
        return {
            "seq_length": self.job.window,
            "tokens_per_step": self.job.tokens,
            "micro_batches": self.job.micro_batches,
            "stages_bytes": stages,
            "model_flops_per_token": self.job.run.model.flops_per_token(self.job.window),
            "model_flops_per_step": self.job.flops,
            "bytes_sent_per_gpu_and_step": self.job.sent(self.stages),
            "launches_per_step": self.job.count(self.stages, "launches"),
            "host_seconds_of_launches": self.launching,
            "host_waits_per_step": self.job.count(self.stages, "waits"),
            "predicted_seconds_per_step": self.prediction.step,
            "predicted_seconds": self.prediction.parts,
            "predicted_model_flops_per_second_per_gpu": self.model_flops_rate,
        }


@dataclass(frozen=True)
class Plan:
    """A run in its layout, for its window L and, where T is longer, for all of T."""

    machine: Machine
    pose: Measured
    full: Measured | None
    full_refused: str = ""

    @property
    def fits(self) -> bool:
        return self.pose.peak <= self.machine.room

    def too_small(self) -> str:
        """What the layout lacks, and the three changes that help most."""
        job = self.pose.job
        helps = "; ".join(
            f"{remedy.flags} ({remedy.peak / GIB:.3g} GiB)" for remedy in remedies(job)
        )
        return (
            f"{layout_of(job)} does not fit: stage {self.pose.fullest.number} takes "
            f"{self.pose.peak / GIB:.3g} GiB, and a GPU has "
            f"{self.machine.memory:.3g} less --reserve {self.machine.reserve:g}; what helps most: "
            f"{helps}; or --search for a layout"
        )

    def to_dict(self) -> dict:
        job = self.pose.job
        return {
            "model_parameters": job.run.model.num_parameters,
            "gpus": job.world_size,
            "gpu": dataclasses.asdict(self.machine),
            "layout": layout_of(job),
            "global_batch_size": job.layout.global_batch_size,
            "fits": self.fits,
            "pose": self.pose.to_dict(),
            "full_length": self.full.to_dict() if self.full else None,
        }

    def __str__(self) -> str:
        return "\n\n".join(
            [
                _settings(self.pose.job, self.machine),
                _stages(self.pose),
                _comparison(self),
                LEGEND,
            ]
        )


def measure(job: Job, machine: Machine, say: Callable[[str], None], whole: bool = False) -> Plan:
    """A plan of every stage, for L and, where it is longer, for T; `whole` as Job.stage."""
    pose = _measured(job, machine, say, whole)
    target = job.run.model.max_position_embeddings
    if target <= job.window:
        return Plan(machine, pose, None)
    try:
        full = job.at_full_length()
    except ConfigError as error:
        return Plan(machine, pose, None, str(error))
    return Plan(machine, pose, _measured(full, machine, say, whole))


def _measured(job: Job, machine: Machine, say: Callable[[str], None], whole: bool) -> Measured:
    count = job.run.args.parallel.pipeline_model_parallel_size
    stages = []
    for number in range(count):
        say(f"{job.window:,} tokens, stage {number + 1} of {count}")
        stages.append(job.stage(number, whole))
    return Measured(job, stages, job.predict(stages, machine.rates))


def _settings(job: Job, machine: Machine) -> str:
    args, model = job.run.args, job.run.model
    p, t = args.parallel, args.training
    switches = [
        name
        for name, on in {
            "bf16": t.bf16,
            "float32": not t.bf16,
            "sequence parallel": p.sequence_parallel and p.tensor_model_parallel_size > 1,
            "distributed optimizer": p.use_distributed_optimizer,
            "overlapped gradients": p.overlap_grad_reduce,
            "overlapped weights": p.overlap_param_gather,
        }.items()
        if on
    ]
    experts = ""
    if model.num_experts:
        experts = f"experts each of the {model.num_experts} gets as many tokens\n"
    return (
        f"model   {model.num_parameters:,} parameters: {model.num_layers} layers, hidden "
        f"{model.hidden_size}, vocabulary {model.vocab_size} (padded {model.padded_vocab_size})\n"
        f"job     {job.world_size} x {machine}\n"
        f"layout  {layout_of(job)}; {', '.join(switches)}\n"
        f"batch   {job.layout.global_batch_size} samples = {t.micro_batch_size} x "
        f"{job.micro_batches} micro-batches x {job.layout.data_parallel_size}; L {job.window:,}, "
        f"T {model.max_position_embeddings:,}\n"
        f"{experts}"
        f"rates   {machine.rates} (assumed, or as --rates says)"
    )


def _stages(measured: Measured) -> str:
    rows = [["stage", "parameters", *PARTS, "peak, GiB"]]
    rows += [
        [
            str(stage.number),
            f"{stage.parameters:,}",
            *(f"{stage.memory[part] / GIB:.2f}" for part in PARTS),
            f"{stage.peak / GIB:.2f}",
        ]
        for stage in measured.stages
    ]
    return _table(rows)


def _comparison(plan: Plan) -> str:
    sides = [plan.pose, *([plan.full] if plan.full else [])]
    names = ["PoSE, L" if plan.full else "L", "full length, T"][: len(sides)]
    rows = [["", *(f"{n} = {side.job.window:,}" for n, side in zip(names, sides, strict=True))]]

    def row(name: str, value: Callable[[Measured], str]) -> None:
        rows.append([name, *(value(side) for side in sides)])

    row("tokens in a step", lambda m: f"{m.job.tokens:,}")
    row("peak of the fullest stage, GiB", lambda m: f"{m.peak / GIB:.2f}")
    row("fits", lambda m: "yes" if m.peak <= plan.machine.room else "no")
    row(
        "GFLOPs of a token",
        lambda m: f"{m.job.run.model.flops_per_token(m.job.window) / 1e9:,.1f}",
    )
    row("PFLOPs of a step", lambda m: f"{m.job.flops / 1e15:,.2f}")
    for axis in AXES:
        sent = [side.job.sent(side.stages)[axis] / 1e9 for side in sides]
        if max(sent) >= 0.001:
            rows.append([f"sent over {axis} parallelism, GB", *(f"{n:,.2f}" for n in sent)])
    row("launches of a step", lambda m: f"{m.job.count(m.stages, 'launches'):,.0f}")
    row("waits of the host in a step", lambda m: f"{m.job.count(m.stages, 'waits'):,.0f}")
    row("predicted step, s", lambda m: f"{m.prediction.step:,.2f}")
    for name in plan.pose.prediction.parts:
        seconds = [side.prediction.parts[name] for side in sides]
        if max(seconds) >= 0.005:
            rows.append([f"  {name}", *(f"{n:,.2f}" for n in seconds)])
    row(
        "tokens/s of a GPU",
        lambda m: f"{m.job.tokens / m.prediction.step / m.job.world_size:,.0f}",
    )
    row("model TFLOP/s of a GPU", lambda m: f"{m.model_flops_rate / 1e12:,.0f}")
    text = _table(rows, left=1)
    if plan.full:
        ratio = plan.full.prediction.step / plan.pose.prediction.step
        text += f"\na step of as many samples takes {ratio:,.1f} times as long at full length"
    if plan.pose.launching > plan.pose.prediction.step:
        text += (
            f"\nto launch its kernels the host may need {plan.pose.launching:,.2f} s, and the GPU "
            "waits for it: a larger --micro-batch-size keeps it busy"
        )
    if plan.full_refused:
        text += f"\nfull length, T: not in this layout: {plan.full_refused}"
    return text


def _table(rows: list[list[str]], left: int = 0) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def search_page(job: Job, found: list[Found], tried: int, machine: Machine) -> str:
    """The layouts that fit, the fastest first."""
    rows = [["layout", "peak, GiB", "step, s", "tokens/s of a GPU"]]
    rows += [
        [
            layout_of(layout.job),
            f"{layout.peak / GIB:.2f}",
            f"{layout.prediction.step:,.2f}",
            f"{layout.job.tokens / layout.prediction.step / layout.job.world_size:,.0f}",
        ]
        for layout in found
    ]
    return (
        f"{job.world_size} x {machine}; batch {job.layout.global_batch_size} samples of "
        f"{job.window:,} tokens; {tried} layouts were run\nrates   {machine.rates}\n\n"
        f"{_table(rows, left=1)}\n\n{LEGEND}"
    )


def search_to_dict(found: list[Found], tried: int, machine: Machine) -> dict:
    return {
        "gpu": dataclasses.asdict(machine),
        "tried": tried,
        "layouts": [
            {
                "layout": layout_of(layout.job),
                "flags": layout.job.run.args.parallel.sizes(layout.job.run.model.num_layers),
                "recompute_granularity": layout.job.run.args.training.recompute_granularity,
                "peak_bytes": layout.peak,
                "predicted_seconds_per_step": layout.prediction.step,
            }
            for layout in found
        ],
    }


def nothing_fits(job: Job, machine: Machine) -> str:
    return (
        f"--search: no layout of {job.world_size} GPUs fits into {machine.gpu}'s "
        f"{machine.memory:g} GiB less --reserve {machine.reserve:g}; give more --gpus, a larger "
        "--gpu, or a smaller --micro-batch-size or --seq-length"
    )
