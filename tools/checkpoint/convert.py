"""Converts a checkpoint between Hugging Face, Meta's own format and Megatron, exactly.

hf        safetensors (or legacy .bin) with config.json and the tokenizer's files: LLaMA, Mistral,
          Qwen2, Qwen3, Baichuan2-7B, GPT-J
meta      consolidated.NN.pth with params.json: LLaMA 1, 2, 3
megatron  a torch_dist checkpoint that every layout of ranks loads, or saved

Tensor after tensor passes through, so a model of any size fits; torchrun shares the work between
processes. The output is built in a temporary folder beside --save-dir, read back and compared, and
only then renamed: it is whole or it is not there.
"""

import os
import sys

# Not this folder: its inspect.py would hide Python's own from all that is imported below.
HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path[:] = [ROOT, *(path for path in sys.path if os.path.abspath(path) != HERE)]

import argparse
import contextlib
import hashlib
import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from pose_megatron.checkpoints import formats, meta
from pose_megatron.checkpoints.formats import FORMATS, Source, read_ahead
from pose_megatron.checkpoints.huggingface import config_json, rope_check
from pose_megatron.checkpoints.megatron import torch_dist
from pose_megatron.checkpoints.megatron.directory import TRACKER, find
from pose_megatron.checkpoints.tensor_files import size
from pose_megatron.rope.huggingface import notes
from pose_megatron.runtime.atomic_files import staged, write_atomically
from pose_megatron.runtime.cli import command
from pose_megatron.runtime.distributed import CpuGroup
from pose_megatron.runtime.processes import end_with_parent

MARKS = ("config.json", "params.json", TRACKER)  # of a checkpoint in one of the formats
SMALL = 100_000_000  # parameters up to which logits are compared unasked
EXAMPLES = """examples:
  # a Hugging Face folder into Megatron's format
  python tools/checkpoint/convert.py --loader hf --saver megatron \\
      --load-dir models/llama-2-7b --save-dir checkpoints/llama-2-7b

  # the extended model back, in bfloat16; config.json carries the interpolation
  python tools/checkpoint/convert.py --loader megatron --saver hf --dtype bfloat16 \\
      --load-dir checkpoints/llama-2-7b-pose-128k --save-dir models/llama-2-7b-pose-128k

  # a large one, as Meta gives it away, by eight processes
  torchrun --nproc-per-node 8 tools/checkpoint/convert.py --loader meta --saver megatron \\
      --load-dir Meta-Llama-3-70B/original --save-dir checkpoints/llama-3-70b
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="convert.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--loader", required=True, choices=FORMATS, help="format of --load-dir")
    p.add_argument("--saver", required=True, choices=FORMATS, help="format of --save-dir")
    p.add_argument("--load-dir", required=True, type=Path)
    p.add_argument("--save-dir", required=True, type=Path)
    p.add_argument("--overwrite", action="store_true", help="replace a checkpoint in --save-dir")
    p.add_argument(
        "--dtype", choices=("keep", "float32", "bfloat16", "float16"), default="keep", help="[keep]"
    )
    p.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        metavar="N",
        help="loader hf, meta: the embedding gets zero rows up to a multiple of N [128]",
    )
    p.add_argument(
        "--iteration", type=int, help="loader megatron: which one [the latest of the folder]"
    )
    p.add_argument(
        "--max-position-embeddings",
        type=int,
        metavar="N",
        help="loader meta: the window, which params.json leaves out [the published model's]",
    )
    p.add_argument(
        "--tokenizer-model",
        type=Path,
        help="tokenizer file or folder to copy [the one that the source carries]",
    )
    p.add_argument(
        "--max-shard-size", default="5GB", help="saver hf: of one safetensors file [5GB]"
    )
    p.add_argument(
        "--target-tensor-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="saver meta: files, one for each rank of Meta's code [1]",
    )
    p.add_argument(
        "--strict", action="store_true", help="fail on what is otherwise a warning, such as NaN"
    )
    p.add_argument(
        "--as-llama",
        action="store_true",
        help="a Baichuan2 becomes the LLaMA that computes the same, which can be interpolated",
    )
    p.add_argument(
        "--rope-as-longrope",
        action="store_true",
        help="saver hf: write yarn as longrope, which transformers 4.43 to 4.54 read exactly",
    )
    p.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="check hashes that came along, read the result back and compare every bit, then its "
        "logits with transformers' [logits of models up to 100M parameters only; the rope is "
        "always checked]",
    )
    p.add_argument(
        "--json", type=Path, metavar="FILE", help="write tensors, bytes, seconds, rope errors there"
    )
    return p


@command
def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the temporary folder is removed
    convert(parser().parse_args())


def convert(args: argparse.Namespace) -> None:
    start, seconds = time.perf_counter(), {}
    team = CpuGroup()
    say = print if team.rank == 0 else lambda *_, **__: None
    load, save = args.load_dir.resolve(), args.save_dir.resolve()
    shard_bytes = _check(args, load, save)
    source = Source(
        args.loader,
        load,
        args.iteration,
        args.max_position_embeddings,
        args.make_vocab_size_divisible_by,
        args.as_llama,
    )
    model, rows = source.model, source.rows
    problems = Problems(args.strict)
    for warning in source.warnings if team.rank == 0 else ():
        problems.add(warning)
    dtypes = source.dtypes
    if args.dtype != "keep":
        dtypes = dict.fromkeys(dtypes, getattr(torch, args.dtype))
    total = _bytes({0: rows}, dtypes)
    sidecars = config_json.find_sidecars(args.tokenizer_model or source.tokenizer)
    with _staged(team, save, args.overwrite) as folder:
        if team.rank == 0:
            _check_space(folder, total, save)
            _prepare(args, folder, model, dtypes[rows[0].name], sidecars)
        team.broadcast(None)
        with _rope_check(
            [load] * (args.loader == "hf") + [folder] * (args.saver == "hf"), model, team.rank == 0
        ) as rope:
            sink = _sink(args, folder, source, dtypes, shard_bytes, team.size)
            jobs = {n: sink.jobs[n] for n in range(team.rank, len(sink.jobs), team.size)}
            mine = {row.name: row for job in jobs.values() for row in job}
            with _phase(say, seconds, "convert", _bytes(jobs, dtypes)) as advance:
                _transfer(team, source, sink, jobs, dtypes, problems, advance)
        if args.saver == "hf" and not (folder / "tokenizer_config.json").is_file():
            say("note: no tokenizer to copy; name one with --tokenizer-model", flush=True)
        errors, logits = rope(), []
        if args.verify is not False:
            with _phase(say, seconds, "verify", _bytes({0: mine.values()}, dtypes)) as advance:
                _check_hashes(source, team)
                window = model.max_position_embeddings
                again = Source(args.saver, folder, None, window, model.make_vocab_size_divisible_by)
                if args.saver == "megatron" and again.model != model:
                    raise ValueError(f"read back {again.model}, wrote {model}")
                _compare(source, again, mine.values(), dtypes, advance)
            if team.size == 1:
                logits = _check_logits({args.loader: load, args.saver: folder}, model, args)
        team.broadcast(None)
    if args.saver == "hf":
        for note in notes(model.rope_scaling, model.max_position_embeddings, args.rope_as_longrope):
            say(f"note: {note}")
    if args.json and team.rank == 0:
        write_atomically(
            args.json,
            json.dumps(
                {
                    "tensors": len(rows),
                    "bytes": total,
                    "processes": team.size,
                    "seconds": round(time.perf_counter() - start, 3),
                    "phases": seconds,
                    "nonfinite": sum(problems.nonfinite.values()),
                    "rope_errors": errors,
                    "logits_errors": {d.where: d.error for d in logits},
                }
            )
            + "\n",
        )
    say(f"wrote {save}", flush=True)


def _check(args: argparse.Namespace, load: Path, save: Path) -> int:
    """Holds flags to each other; the bytes of --max-shard-size."""
    if save == load or save in load.parents:
        raise ValueError(f"--save-dir {save} would replace --load-dir {load}; choose another")
    if args.tokenizer_model and not args.tokenizer_model.exists():
        raise ValueError(f"--tokenizer-model {args.tokenizer_model} does not exist")
    for name, loader in (("iteration", "megatron"), ("max_position_embeddings", "meta")):
        if getattr(args, name) is not None and args.loader != loader:
            raise ValueError(
                f"--{name.replace('_', '-')} has no meaning with --loader "
                f"{args.loader}, only with {loader}"
            )
    for name in (
        "make_vocab_size_divisible_by",
        "max_position_embeddings",
        "target_tensor_parallel_size",
    ):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if args.target_tensor_parallel_size != 1 and args.saver != "meta":
        raise ValueError(
            "--target-tensor-parallel-size has no meaning with --saver "
            f"{args.saver}: what it writes every layout of ranks loads"
        )
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B", args.max_shard_size.strip().upper())
    if not match or float(match[1]) == 0:
        raise ValueError(
            f"--max-shard-size {args.max_shard_size} is not a size such as 5GB or 200MB"
        )
    return int(float(match[1]) * 1000 ** ["", *"KMGT"].index(match[2]))


@contextlib.contextmanager
def _staged(team: CpuGroup, save: Path, overwrite: bool) -> Iterator[Path]:
    """One temporary folder for all processes, which rank 0 makes, renames or removes."""
    with contextlib.ExitStack() as stack:
        folder = None
        if team.rank == 0:
            folder = stack.enter_context(staged(save, overwrite, MARKS))
        yield team.broadcast(folder)


def _check_space(folder: Path, needed: int, save: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"--save-dir {save}: the weights take {needed / 1e9:.2f} GB, the disk has "
            f"{free / 1e9:.2f} GB free"
        )


def _prepare(args, folder, model, dtype, sidecars) -> None:
    """All that a folder holds beside the weights."""
    if args.saver == "hf":
        config_json.sizes(model)
        config_json.write_config(folder, model, dtype, sidecars, args.rope_as_longrope)
    elif args.saver == "megatron":
        torch_dist.begin(folder, sidecars.values())
    else:
        meta.write_params(folder, model, args.target_tensor_parallel_size)
        if "tokenizer.model" in sidecars:
            shutil.copyfile(sidecars["tokenizer.model"], folder / "tokenizer.model")


def _sink(args, folder, source, dtypes, shard_bytes, processes):
    if args.saver == "hf":
        return formats.HuggingFaceSink(folder, source.rows, dtypes, shard_bytes)
    if args.saver == "megatron":
        return formats.MegatronSink(folder, source.rows, dtypes, source.model, processes)
    return formats.MetaSink(
        folder, source.rows, dtypes, source.model, args.target_tensor_parallel_size
    )


def _transfer(team: CpuGroup, source: Source, sink, jobs: dict, dtypes, problems, advance) -> None:
    """Does this process's jobs, and what is to be done once all have done theirs."""
    results = {}
    for number, job in jobs.items():
        tensors = read_ahead(source, job, dtypes, problems.look)
        results[number] = sink.write(number, _counted(tensors, advance))
    together = {k: v for part in team.gather(results) for k, v in part.items()}
    problems.nonfinite = {k: v for x in team.gather(problems.nonfinite) for k, v in x.items()}
    if team.rank == 0:
        sink.finish([together[number] for number in range(len(sink.jobs))])
        problems.report()
    team.broadcast(None)


def _bytes(jobs: dict, dtypes) -> int:
    return sum(size(dtypes[row.name], row.shape) for job in jobs.values() for row in job)


class Problems:
    """Warnings; each is an error if `strict`.

    Attributes:
        nonfinite: by tensor, how many of its values are NaN or infinite.
    """

    def __init__(self, strict: bool):
        self._strict, self.nonfinite = strict, {}

    def add(self, warning: str) -> None:
        if self._strict:
            raise ValueError(f"{warning} (--strict)")
        print(f"warning: {warning}", file=sys.stderr, flush=True)

    def look(self, row, tensor: torch.Tensor) -> None:
        """Counts values that are NaN or infinite."""
        if count := formats.count_nonfinite(tensor):
            self.nonfinite[row.name] = count
            if self._strict:
                self.report()

    def report(self) -> None:
        if self.nonfinite:
            names = sorted(self.nonfinite)
            more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
            self.add(
                f"{sum(self.nonfinite.values())} values are NaN or infinite, in {names[0]}{more}"
            )


@contextlib.contextmanager
def _rope_check(folders: list[Path], model, wanted: bool) -> Iterator[Callable[[], dict]]:
    """Starts to ask transformers what rope it reads from the folders; yields how to get the answer.

    Importing transformers takes longer than converting a small model, so where that is not done yet
    another process does it meanwhile.
    """
    folders = folders if wanted else []
    if "transformers" in sys.modules or not folders:
        yield lambda: _rope_errors(folders, model)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(
        1, multiprocessing.get_context("fork"), initializer=end_with_parent, initargs=(os.getpid(),)
    ) as pool:
        future = pool.submit(_rope_errors, folders, model)
        yield future.result


def _rope_errors(folders: list[Path], model) -> dict[str, float]:
    errors = {}
    for folder in folders:
        errors = rope_check.rope_errors(folder, model)
        words = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        words = words or "transformers has no class for it"
        print(f"rope as transformers reads it: relative errors: {words}", flush=True)
    return errors


@contextlib.contextmanager
def _phase(say, seconds: dict, name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes on a terminal; everywhere one line with MB/s at the end."""
    start, done = time.perf_counter(), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        bar.update(count)

    disable = None if say is print else True  # rank 0's share stands for all
    with tqdm(
        desc=name, total=total, unit="B", unit_scale=True, leave=False, disable=disable
    ) as bar:
        yield advance
    seconds[name] = round(time.perf_counter() - start, 3)
    say(
        f"{name:7} {done / 1e6:10,.1f} MB {seconds[name]:8.1f} s "
        f"{done / 1e6 / max(seconds[name], 1e-3):8,.0f} MB/s",
        flush=True,
    )


def _counted(tensors, advance: Callable[[int], None]):
    for row, tensor in tensors:
        yield row, tensor
        advance(tensor.nbytes)


def _check_hashes(source: Source, team: CpuGroup) -> None:
    """Of files that came with one: each process takes some."""
    for path in sorted(source.hashes)[team.rank :: team.size]:
        algorithm, expected = source.hashes[path]
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, algorithm).hexdigest()
        if found != expected:
            raise ValueError(f"{path} is damaged: its {algorithm} is {found}, should be {expected}")


def _check_logits(sides: dict[str, Path], model, args) -> list:
    """Compared in Megatron and transformers: of small models, and with --verify of any."""
    comparable = {"hf", "megatron"} <= sides.keys() and model.family != "baichuan"
    if args.as_llama or not comparable or not (args.verify or model.num_parameters <= SMALL):
        return []
    found = find(sides["megatron"], args.iteration)
    if found.is_legacy and not args.verify:  # which no model loads
        return []
    from pose_megatron.runtime import cpu

    cpu.install()
    from pose_megatron.evaluation import parity

    return parity.check(found, sides["hf"])


def _compare(source: Source, again: Source, rows, dtypes, advance: Callable[[int], None]) -> None:
    rows = list(rows)
    pairs = zip(
        read_ahead(source, rows, dtypes, buffers=1),
        read_ahead(again, rows, again.dtypes, buffers=1),
        strict=True,
    )
    for (row, tensor), (_, other) in pairs:
        # Padding of the vocabulary, which training changes, leaves Megatron's format for none.
        kept = len(tensor) if again.by_row else sum(row.blocks)
        if formats.differing(tensor[:kept], other[:kept]):
            raise ValueError(f"read back another {row.name} than was written")
        advance(tensor.nbytes)


if __name__ == "__main__":
    sys.exit(main())
