"""Converts a checkpoint from one format to another, exactly.

One tensor after the other passes through, so a model of any size fits; processes that torchrun
started share the work. The output is built in a temporary folder beside its place, read back and
compared, and only then renamed: it is whole or it is not there.
"""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pose_megatron.checkpoints.as_llama import AsLlama
from pose_megatron.checkpoints.formats import (
    CheckpointFormat,
    CheckpointReader,
    CheckpointWriter,
    Contents,
    format_class,
    marks,
)
from pose_megatron.checkpoints.huggingface import rope_check
from pose_megatron.checkpoints.mapping import ParamMapping
from pose_megatron.checkpoints.report import Advance, Problems, Report
from pose_megatron.checkpoints.sidecars import check_sidecars, find_sidecars
from pose_megatron.checkpoints.transfer import differing, read_ahead, total_bytes
from pose_megatron.errors import ConfigError, DamagedCheckpoint
from pose_megatron.models.shape import ModelConfig
from pose_megatron.runtime.atomic_files import staged
from pose_megatron.runtime.distributed import CpuGroup
from pose_megatron.runtime.processes import end_with_parent


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        tensors: how many Megatron's side has.
        bytes: their size as written, vocabulary padding included.
        processes: how many shared the work.
        seconds: from the call to its end.
        phases: seconds of "convert" and "verify".
        nonfinite: values that are NaN or infinite.
        rope_errors: relative errors of `inv_freq` and `attention_factor` as transformers reads
            them; empty where transformers reads neither side.
    """

    tensors: int
    bytes: int
    processes: int
    seconds: float
    phases: dict[str, float]
    nonfinite: int
    rope_errors: dict[str, float]


def convert(
    load: str | Path,
    save: str | Path,
    *,
    loader: str | CheckpointFormat,
    saver: str | CheckpointFormat,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    verify: bool = True,
    strict: bool = False,
    as_llama: bool = False,
    check: Callable[[Path, ModelConfig], None] | None = None,
    quiet: bool = False,
) -> Conversion:
    """Converts the checkpoint in `load` to another format in `save`.

    Args:
        loader, saver: a name in FORMATS ("hf", "megatron", "meta"), or a format with parameters,
            such as `Megatron(iteration=1000)` or `HuggingFace(max_shard_size="2GB")`.
        dtype: what to store floating-point values in; None keeps the source's.
        tokenizer: the tokenizer's file or folder to copy; None for the one beside the weights.
        overwrite: replace a checkpoint in `save`.
        verify: check hashes that came with the source, read the result back, compare every bit.
        strict: raise ConfigError for what is otherwise a warning, such as NaN.
        as_llama: make of a Baichuan2 the LLaMA that computes the same.
        check: called with the finished folder and its model before the folder takes its place;
            if it raises, the folder is removed. Not called where several processes share
            the work.
        quiet: print neither progress nor notes (warnings go to stderr all the same).

    Raises:
        ConfigError: the model or an argument cannot be used, or the result is not what was read.
        DamagedCheckpoint: a file of the source is missing or damaged.
        OSError: the disk is full or the folder cannot be written.
    """
    start = time.perf_counter()
    phases: dict[str, float] = {}
    source, target = (format_class(f)() if isinstance(f, str) else f for f in (loader, saver))
    load, save = Path(load).resolve(), Path(save).resolve()
    tokenizer = Path(tokenizer) if tokenizer else None
    _check_folders(load, save, tokenizer)
    team = CpuGroup()
    report = Report(quiet or team.rank > 0, phases)
    reader: CheckpointReader = source.open(load)
    reader.check()
    read_by_transformers = [(load, reader.model)] * source.read_by_transformers
    if as_llama:
        reader = AsLlama(reader)
    problems = Problems(strict)
    for warning in reader.weights.warnings if team.rank == 0 else ():
        problems.add(warning)
    contents = _contents(reader, dtype, tokenizer)
    total = total_bytes(contents.mappings, contents.dtypes)
    with _staged(team, save, overwrite) as folder:
        read_by_transformers += [(folder, reader.model)] * target.read_by_transformers
        writer = target.create(folder, contents, team.size)
        if team.rank == 0:
            _check_space(folder, total, save)
            writer.prepare()
        team.broadcast(None)
        with _rope_check(read_by_transformers if team.rank == 0 else []) as rope_result:
            jobs = {n: writer.jobs[n] for n in range(team.rank, len(writer.jobs), team.size)}
            size = sum(total_bytes(job, contents.dtypes) for job in jobs.values())
            with report.phase("convert", size) as advance:
                _transfer(team, reader, writer, jobs, contents.dtypes, problems, advance)
        rope_errors = rope_result()
        report.rope(rope_errors)
        if verify:
            mine = {mapping.name: mapping for job in jobs.values() for mapping in job}
            size = total_bytes(mine.values(), contents.dtypes)
            with report.phase("verify", size) as advance:
                _check_hashes(reader, team)
                again = writer.read_back()
                again.check()
                _compare(reader, again, list(mine.values()), contents.dtypes, advance)
        if check and team.size == 1:
            check(folder, reader.model)
        team.broadcast(None)
        notes = writer.notes()
    for note in notes:
        report.say(f"note: {note}")
    return Conversion(
        tensors=len(contents.mappings),
        bytes=total,
        processes=team.size,
        seconds=round(time.perf_counter() - start, 3),
        phases=phases,
        nonfinite=sum(problems.nonfinite.values()),
        rope_errors=rope_errors[-1] if rope_errors else {},
    )


def _check_folders(load: Path, save: Path, tokenizer: Path | None) -> None:
    if save == load or save in load.parents:
        raise ConfigError(f"--save-dir {save} would replace --load-dir {load}; choose another")
    if tokenizer and not tokenizer.exists():
        raise ConfigError(f"--tokenizer-model {tokenizer} does not exist")


def _contents(
    reader: CheckpointReader, dtype: torch.dtype | None, tokenizer: Path | None
) -> Contents:
    if dtype is None:
        reader.check_kept_dtypes()
    dtypes = dict.fromkeys(reader.dtypes, dtype) if dtype else reader.dtypes
    sidecars = find_sidecars(tokenizer) if tokenizer else reader.sidecars
    check_sidecars(sidecars)
    return Contents(reader.model, reader.mappings, dtypes, sidecars)


@contextlib.contextmanager
def _staged(team: CpuGroup, save: Path, overwrite: bool) -> Iterator[Path]:
    """One temporary folder for all processes, which rank 0 makes, renames or removes."""
    with contextlib.ExitStack() as stack:
        folder = None
        if team.rank == 0:
            folder = stack.enter_context(staged(save, overwrite, marks()))
        yield team.broadcast(folder)


def _check_space(folder: Path, needed: int, save: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"--save-dir {save}: the weights take {needed / 1e9:.2f} GB, the disk has "
            f"{free / 1e9:.2f} GB free"
        )


@contextlib.contextmanager
def _rope_check(
    folders: Sequence[tuple[Path, ModelConfig]],
) -> Iterator[Callable[[], list[dict[str, float]]]]:
    """Starts to ask transformers which rope it reads from each folder; yields how to get the
    answers.

    Importing transformers takes longer than converting a small model, so another process does it
    meanwhile, unless it is imported already.
    """
    if "transformers" in sys.modules or not folders:
        yield lambda: _rope_errors(folders)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    with ProcessPoolExecutor(
        1, multiprocessing.get_context("fork"), initializer=_begin_child, initargs=(os.getpid(),)
    ) as pool:
        future = pool.submit(_rope_errors, folders)

        def result() -> list[dict[str, float]]:
            try:
                return future.result()
            except BrokenProcessPool:
                raise ConfigError(
                    "the process in which transformers reads the rope of config.json was killed or "
                    "crashed; if memory ran out, free some, and convert again"
                ) from None

        yield result


def _begin_child(parent: int) -> None:
    """Signals end the process, as the handlers that it has from its parent are not for it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    end_with_parent(parent)


def _rope_errors(folders: Sequence[tuple[Path, ModelConfig]]) -> list[dict[str, float]]:
    return [rope_check.rope_errors(folder, model) for folder, model in folders]


def _transfer(
    team: CpuGroup,
    reader: CheckpointReader,
    writer: CheckpointWriter,
    jobs: Mapping[int, Sequence[ParamMapping]],
    dtypes: Mapping[str, torch.dtype],
    problems: Problems,
    advance: Advance,
) -> None:
    """Does this process's jobs; rank 0 finishes the checkpoint when all have done theirs."""
    results: dict[int, Any] = {}
    for number, job in jobs.items():
        tensors = read_ahead(reader, job, dtypes, problems.inspect)
        results[number] = writer.write(number, _counted(tensors, advance))
    together = {k: v for part in team.gather(results) for k, v in part.items()}
    problems.nonfinite = {k: v for x in team.gather(problems.nonfinite) for k, v in x.items()}
    if team.rank == 0:
        writer.finish([together[number] for number in range(len(writer.jobs))])
        problems.report()
    team.broadcast(None)


def _counted(
    tensors: Iterable[tuple[ParamMapping, Tensor]], advance: Advance
) -> Iterator[tuple[ParamMapping, Tensor]]:
    for mapping, tensor in tensors:
        yield mapping, tensor
        advance(tensor.nbytes)


def _check_hashes(reader: CheckpointReader, team: CpuGroup) -> None:
    """Checks the files that came with a hash; each process takes some of them."""
    hashes = reader.weights.hashes
    for path in sorted(hashes)[team.rank :: team.size]:
        algorithm, expected = hashes[path]
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, algorithm).hexdigest()
        if found != expected:
            raise DamagedCheckpoint(
                f"{path} is damaged: its {algorithm} is {found}, should be {expected}"
            )


def _compare(
    reader: CheckpointReader,
    again: CheckpointReader,
    mappings: Sequence[ParamMapping],
    dtypes: Mapping[str, torch.dtype],
    advance: Advance,
) -> None:
    """Holds every bit that was written to what was read."""
    pairs = zip(
        read_ahead(reader, mappings, dtypes, buffers=1),
        read_ahead(again, mappings, again.dtypes, buffers=1),
        strict=True,
    )
    for (mapping, tensor), (_, other) in pairs:
        # The vocabulary's padding, which training changes, is lost on the way out of Megatron.
        kept = len(tensor) if again.megatron_names else sum(mapping.blocks)
        if differing(tensor[:kept], other[:kept]):
            raise ConfigError(f"read back another {mapping.name} than was written")
        advance(tensor.nbytes)
