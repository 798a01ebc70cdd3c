"""Steps of the trainer on one GPU: their time, tokens/s, MFU and peak memory."""

import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import trainers
from shapes import Scale, Shape

from pose_megatron.training.log import peak_flops

LONGER = 16  # the target window, in windows
KINDS = ("pose", "stock")
WARM_UP = 2  # steps of each kind that are not counted


def rows(scale: Scale) -> Iterator[dict]:
    """PoSE and megatron-core's own rotary embedding in turn, on the same model and batches."""
    for name, shape in scale.shapes.items():
        for window in scale.windows:
            samples = scale.micro_batches * scale.samples_of_micro_batch(window)
            row = {"shape": name, "window": window, "target": LONGER * window}
            yield {**row, **_measured(scale, shape, window, LONGER * window, samples, KINDS)}


def full_length(scale: Scale) -> Iterator[dict]:
    """PoSE on the shortest window against training on all tokens of 2, 4, ... windows.

    A step takes as many samples everywhere.
    """
    name, shape = next(iter(scale.shapes.items()))
    window = scale.windows[0]
    longest = window * max(scale.times)
    for kind, tokens, target in [
        ("pose", window, longest),
        *(("full", window * times, window * times) for times in scale.times),
    ]:
        found = _measured(scale, shape, tokens, target, scale.samples, KINDS[:1])
        row = {"shape": name, "kind": kind, "window": tokens, "target": target}
        pose = found.pop("pose", {})
        yield {**row, **found, **pose}


def _measured(
    scale: Scale, shape: Shape, window: int, target: int, samples: int, kinds: tuple[str, ...]
) -> dict:
    """{kind: its figures}, or {"error": why not}: a GPU may be too small for a row."""
    micro_batch = scale.samples_of_micro_batch(window)
    flags = shape.flags(window, target, micro_batch, samples)
    try:
        with tempfile.TemporaryDirectory() as folder:
            prefix = trainers.random_corpus(Path(folder), shape.vocabulary, 2 * LONGER * window, 8)
            found = _in_turn(_run(flags, prefix), window, scale.steps, kinds)
            return {"micro_batch": micro_batch, "global_batch": samples, **found}
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _run(flags: list[str], prefix: str) -> trainers.Run:
    more = ["--data-path", prefix, "--split", "100,0,0", "--num-workers", "0"]
    return trainers.Run([*flags, *more, "--train-iters", "1000000"])


def _in_turn(run: trainers.Run, window: int, steps: int, kinds: tuple[str, ...]) -> dict:
    ways = Ways(run)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    peaks = dict.fromkeys(kinds, 0)
    for i in range(WARM_UP + steps):
        for kind in kinds if i % 2 else reversed(kinds):  # neither always comes first
            ways.take(kind)
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            start = time.perf_counter()
            run.step()
            torch.cuda.synchronize()
            if i >= WARM_UP:
                seconds[kind].append(time.perf_counter() - start)
                peaks[kind] = max(peaks[kind], torch.cuda.max_memory_allocated())
    tokens = window * run.trainer.layout.global_batch_size
    flops = run.trainer.config.flops_per_token(window) * tokens
    known = peak_flops()
    found: dict = {}
    for kind in kinds:
        median = statistics.median(seconds[kind])
        found[kind] = {
            "seconds": median,
            "tokens_per_second": tokens / median,
            "model_tflops": flops / median / 1e12,
            "mfu": flops / median / known if known else None,
            "peak_bytes": peaks[kind],
        }
    if len(kinds) == 2:
        pairs = zip(*seconds.values(), strict=True)
        found["ratio"] = statistics.median(one / other for one, other in pairs)
    return found


class Ways:
    """The two ways in which a trainer's stages may rotate."""

    def __init__(self, run: trainers.Run):
        self.stages = run.trainer.stages
        self.pose = [(type(stage), stage.rotary_pos_emb) for stage in self.stages]
        config = run.trainer.config
        self.stock = [trainers.stock_rotation(stage, config) for stage in self.stages]

    def take(self, kind: str) -> None:
        for stage, (own, rotary) in zip(self.stages, getattr(self, kind), strict=True):
            stage.__class__, stage.rotary_pos_emb = own, rotary
