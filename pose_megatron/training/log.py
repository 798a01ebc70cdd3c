"""A run's log: lines on rank 0, the same as JSON, TensorBoard and Weights & Biases.

Throughput is counted in model FLOPs, without what recomputation adds; MFU is their share of the
device's dense bfloat16 peak, where that is known.
"""

import dataclasses
import json
import math
import resource
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from pose_megatron.config.flags import LoggingFlags
from pose_megatron.errors import ConfigError
from pose_megatron.runtime.device import device
from pose_megatron.runtime.ranks import print_rank_0, rank, world_size
from pose_megatron.training.step import Step
from pose_megatron.training.trainer import Trainer

# Dense bfloat16 FLOP/s of a device by a part of its name, from NVIDIA's data sheets.
PEAKS = {
    "H200": 989e12,
    "H100 80GB HBM3": 989e12,
    "H100 PCIe": 756e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "H800": 989e12,
    "L40S": 362e12,
}


class Log:
    """Rank 0's log lines and their records in the sinks; all ranks call it."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        flags: LoggingFlags = trainer.args.logging
        self.interval = flags.log_interval
        self.losses: list[float] = []  # of the steps since the last line
        self.samples, self.skipped = 0, 0
        self.mark, self.seconds = time.perf_counter(), 0.0
        self.sinks = sinks(flags, dataclasses.asdict(trainer.args)) if rank() == 0 else []
        self.peak = peak_flops() if trainer.args.training.bf16 else None

    def step(self, step: Step, lr: float) -> None:
        """Counts a step; prints a line every --log-interval steps and at the end of the run."""
        self.losses.append(step.loss)
        self.samples += step.samples
        self.skipped += not step.updated
        self.seconds += time.perf_counter() - self.mark
        self.mark = time.perf_counter()
        trainer, at = self.trainer, self.trainer.iteration
        if at % self.interval and at != trainer.iterations:
            return
        # The mean leaves out steps that were skipped, which are logged on their own.
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        mean = statistics.fmean(finite) if finite else math.nan
        seconds = self.seconds / len(self.losses)
        window = trainer.args.data.seq_length
        rate = self.samples * window / self.seconds / world_size()
        flops = rate * trainer.config.flops_per_token(window)
        memory = _largest(peak_memory())
        values = {
            "consumed_samples": trainer.consumed_samples,
            "global_batch_size": step.samples,
            "loss": mean,
            "grad_norm": step.grad_norm,
            "lr": lr,
            "tokens_per_second_per_rank": rate,
            "model_flops_per_second_per_rank": flops,
            "seconds_per_step": seconds,
            "peak_memory_bytes": memory,
        }
        words = [
            f"iteration {at:{len(str(trainer.iterations))}d}/{trainer.iterations}",
            f"samples {trainer.consumed_samples}",
            f"batch {step.samples}",
            f"{rate:,.0f} tokens/s per rank",
            f"{flops / 1e12:.3g} TFLOP/s",
        ]
        if self.peak:
            values["mfu"] = flops / self.peak
            words.append(f"MFU {100 * values['mfu']:.1f}%")
        if self.skipped:
            values["skipped"] = self.skipped
            words.append(f"skipped {self.skipped}")
        left = _clock(seconds * (trainer.iterations - at))
        words += [
            f"loss {mean:.4f}",
            f"grad norm {step.grad_norm:.3f}",
            f"lr {lr:.3e}",
            f"memory {memory / 2**30:.2f} GiB",
            f"left {left}",
        ]
        print_rank_0(" | ".join(words))
        self._record(values)
        self.losses, self.samples, self.skipped, self.seconds = [], 0, 0, 0.0
        self.mark = time.perf_counter()

    def validation(self, loss: float, name: str = "validation") -> None:
        """A mean loss per token, of validation or of the test."""
        # exp() of a fresh model's loss can overflow; infinity is then the honest figure.
        perplexity = math.exp(loss) if loss < 700 else math.inf
        print_rank_0(
            f"{name} at {self.trainer.iteration} | loss {loss:.4f} | perplexity {perplexity:.3f}"
        )
        self._record({"test_loss" if name == "test" else "valid_loss": loss})
        self.mark = time.perf_counter()  # not a step's time

    def saved(self, path: Path) -> None:
        """A checkpoint is whole."""
        print_rank_0(f"saved {path}")
        self.mark = time.perf_counter()  # not a step's time

    def stopping(self, reason: str, saves: bool, saved: bool) -> None:
        """The run ends early.

        Args:
            saves: whether there is a --save; `saved`: whether it holds the last whole step.
        """
        at = self.trainer.iteration
        what = f"saving iteration {at}"
        if saved or not at:
            what = f"iteration {at} is saved already" if at else "nothing was trained yet"
        elif not saves:
            what = f"iteration {at} is lost, as there is no --save"
        print_rank_0(f"Stopping: {what} ({reason})")

    def anomaly(self, what: str, worst: list[tuple[str, float]]) -> None:
        """A step that went wrong, and the (name, loss) of its samples with the highest loss."""
        at = self.trainer.iteration
        print_rank_0(f"iteration {at}: {what}; its samples of highest loss:")
        for name, loss in worst:
            print_rank_0(f"  {loss:.4f}  {name}")
        named = [{"sample": name, "loss": loss} for name, loss in worst]
        self._record({"anomaly": what, "samples": named})

    def _record(self, values: dict) -> None:
        for sink in self.sinks:
            sink.write(self.trainer.iteration, values)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


class AnomalyDetector:
    """Finds steps that went wrong: skipped because a value was not finite, or with a loss far above
    the mean of the last WINDOW steps. Every rank finds the same ones.

    Args:
        spike_factor: how far above the mean, as a factor; 0 for no such check.
        max_skipped: after how many skipped steps in a row to give up.
    """

    WINDOW = 20

    def __init__(self, spike_factor: float, max_skipped: int):
        self.factor, self.max_skipped = spike_factor, max_skipped
        self.losses: deque[float] = deque(maxlen=self.WINDOW)
        self.skipped = 0  # in a row

    def judge(self, step: Step) -> str | None:
        """What is wrong with the step, or None."""
        if not step.updated:
            self.skipped += 1
            return (
                f"skipped, loss {step.loss:.4f} and gradient norm {step.grad_norm:.3f} "
                f"({self.skipped} in a row)"
            )
        self.skipped = 0
        mean = statistics.fmean(self.losses) if len(self.losses) == self.WINDOW else math.inf
        self.losses.append(step.loss)
        if self.factor and step.loss > self.factor * mean:
            return f"loss spike, {step.loss:.4f} after a mean of {mean:.4f}"
        return None

    @property
    def gives_up(self) -> bool:
        return self.skipped >= self.max_skipped


class Sink(Protocol):
    """Where records of a run go."""

    def write(self, iteration: int, values: dict) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One JSON object per line, appended; numbers that JSON lacks are strings, such as "nan"."""

    def __init__(self, path: str):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a", buffering=1, encoding="utf-8")

    def write(self, iteration: int, values: dict) -> None:
        values = {
            k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        self.file.write(json.dumps({"iteration": iteration, **values}) + "\n")

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    def __init__(self, folder: str):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "--tensorboard-dir needs a package: pip install tensorboard"
            ) from None
        self.writer = SummaryWriter(folder)

    def write(self, iteration: int, values: dict) -> None:
        for name, value in values.items():
            if isinstance(value, float | int):
                self.writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    def __init__(self, flags: LoggingFlags, config: dict):
        try:
            import wandb
        except ImportError:
            raise ConfigError("--wandb-project needs a package: pip install wandb") from None
        if flags.wandb_save_dir:
            Path(flags.wandb_save_dir).mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=flags.wandb_project,
            name=flags.wandb_exp_name,
            dir=flags.wandb_save_dir,
            config=config,
        )

    def write(self, iteration: int, values: dict) -> None:
        scalars = {k: v for k, v in values.items() if isinstance(v, float | int)}
        self.run.log(scalars, step=iteration)

    def close(self) -> None:
        self.run.finish()


def sinks(flags: LoggingFlags, config: dict) -> list[Sink]:
    """The sinks that the flags name.

    Args:
        config: the run's arguments, for Weights & Biases.

    Raises:
        ConfigError: a sink's package is not installed.
    """
    made: list[Sink] = []
    if flags.log_file:
        made.append(JsonLines(flags.log_file))
    if flags.tensorboard_dir:
        made.append(TensorBoard(flags.tensorboard_dir))
    if flags.wandb_project:
        made.append(WeightsAndBiases(flags, config))
    return made


def peak_memory() -> int:
    """The most bytes so far: allocated on the GPU, or resident without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_flops() -> float | None:
    """Dense bfloat16 FLOP/s of this rank's device; None where they are not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def _largest(value: int) -> int:
    """The largest value on any rank."""
    largest = torch.tensor([value], dtype=torch.int64, device=device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest.item())


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
