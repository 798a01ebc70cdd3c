"""Preprocessing beside Megatron-LM's loop, and beside the fastest tokenizer library alone.

One run measures, on source code of the standard library and then of installed packages (exact
duplicates left out), with a Hugging Face byte-level BPE and a SentencePiece BPE of 32k tokens:

  theirs   what Megatron-LM's tools/preprocess_data.py does: megatron-core's tokenizer in each
           worker, multiprocessing's Pool.imap over lines, megatron-core's IndexedDatasetBuilder
  ours     tools/preprocess_data.py, which must write the same bytes
  ceiling  gigatoken alone on the same texts in memory, on all workers, ids thrown away: the faster
           of its own threads and of forked processes

Each runs in its own process, in turn, and the median of several runs counts (three times as many
for ours and the ceiling). Rates leave start-up out: they are taken between a corpus of 1 MB and
the whole one. Start-up is reported on its own, as the time for one document. Rates are given by the
clock, and by the processor time of all processes, divided by the number of workers: other work on
the machine disturbs that less.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import sysconfig
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOKENIZERS = {
    "hf": ("HuggingFaceTokenizer", "Hugging Face BPE 32k"),
    "spm": ("SentencePieceTokenizer", "SentencePiece BPE 32k"),
}
VOCAB_SIZE = 32_000
TRAINED_ON = 20_000_000  # bytes
OFTEN = 3  # runs of what takes a second, for each run of what takes a minute
GOALS = {"hf": 40, "spm": 4}  # our rate over theirs


def documents(limit: int) -> list[str]:
    """Different source files until there are `limit` bytes, the standard library's first."""
    stdlib, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    paths = [p for p in sorted(stdlib.rglob("*.py")) if "site-packages" not in p.parts]
    texts, seen, size = [], set(), 0
    for path in [*paths, *sorted(packages.rglob("*.py"))]:
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest in seen or not content or size >= limit:
            continue
        seen.add(digest)
        try:
            texts.append(content.decode())
        except UnicodeDecodeError:
            continue
        size += len(content)
    return texts


def prepare(folder: Path, limit: int) -> dict[str, int]:
    """Writes the corpora and trains the tokenizers, where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    corpora = {"one": 1, "small": 1_000_000, "whole": limit}
    sizes = {}
    for name, size in corpora.items():
        texts = documents(size)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines)
        sizes[name] = sum(len(text.encode()) for text in texts)
        sizes[f"{name} documents"] = len(texts)
    if not (folder / "spm").exists():
        subprocess.run(
            [
                sys.executable,
                ROOT / "tools/train_tokenizer.py",
                "--input",
                folder / "whole.jsonl",
                "--output-dir",
                folder / "spm",
                "--vocab-size",
                str(VOCAB_SIZE),
                "--sample-size",
                str(TRAINED_ON),
            ],
            check=True,
        )
    if not (folder / "hf").exists():
        train_byte_level(documents(limit), folder / "hf")
    return sizes


def train_byte_level(texts: list[str], folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    step = max(1, sum(map(len, texts)) // TRAINED_ON)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts[::step],
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<|endoftext|>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


class TheirEncoder:
    """A worker of Megatron-LM's loop: one line in, ids and lengths out."""

    def __init__(self, kind: str, folder: str):
        self.kind, self.folder = kind, folder

    def load(self) -> None:
        from megatron.core.tokenizers.text import libraries

        if self.kind == "hf":
            TheirEncoder.tokenizer = libraries.HuggingFaceTokenizer(self.folder, use_fast=True)
            TheirEncoder.eod = TheirEncoder.tokenizer.eod
        else:
            TheirEncoder.tokenizer = libraries.SentencePieceTokenizer(
                f"{self.folder}/tokenizer.model"
            )
            TheirEncoder.eod = TheirEncoder.tokenizer.eos_id

    def encode(self, line: str) -> tuple[dict, dict, int]:
        ids = TheirEncoder.tokenizer.text_to_ids(json.loads(line)["text"])
        if ids:
            ids.append(TheirEncoder.eod)
        return {"text": ids}, {"text": [len(ids)] if ids else []}, len(line)


def theirs(kind: str, tokenizer: str, corpus: str, prefix: str, workers: int) -> None:
    """Megatron-LM's loop."""
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    encoder = TheirEncoder(kind, tokenizer)
    encoder.load()
    dtype = DType.optimal_dtype(TheirEncoder.tokenizer.vocab_size)
    with open(corpus, encoding="utf-8") as lines:
        pool = multiprocessing.Pool(workers, initializer=encoder.load)
        encoded = pool.imap(encoder.encode, lines, 32)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for ids, lengths, _ in encoded:
            builder.add_document(ids["text"], lengths["text"])
        builder.finalize(f"{prefix}.idx")
        pool.close()
        pool.join()


def ceiling(kind: str, tokenizer: str, corpus: str, way: str, workers: int) -> None:
    """Prints how long gigatoken takes for texts in memory that are new to it: seconds by the clock,
    and of processor time."""
    import gigatoken

    with open(corpus, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    name = "tokenizer.json" if kind == "hf" else "tokenizer.model"
    fast = gigatoken.Tokenizer(f"{tokenizer}/{name}")
    if way == "threads":
        os.environ["RAYON_NUM_THREADS"] = str(workers)
        fast.encode_batch(["x"])  # imports, and starts its threads
        started, before = time.perf_counter(), sum(os.times()[:4])
        fast.encode_batch(texts, parallel=True)
    else:
        started, before = time.perf_counter(), sum(os.times()[:4])
        children = []
        for worker in range(workers):
            if not (child := os.fork()):
                for text in texts[worker::workers]:
                    fast.backend.encode(text)
                os._exit(0)
            children.append(child)
        for child in children:
            assert os.waitpid(child, 0)[1] == 0
    print(time.perf_counter() - started, sum(os.times()[:4]) - before)


def run(*command) -> tuple[float, float, str]:
    """Seconds by the clock, seconds of processor time, and stdout."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    output, errors = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, errors
    return seconds, usage.ru_utime + usage.ru_stime, output


def measure(kind: str, folder: Path, sizes: dict[str, int], workers: int, repeats: int) -> dict:
    tokenizer, (tokenizer_type, _) = folder / kind, TOKENIZERS[kind]
    clock, processor = {}, {}

    def keep(name: str, seconds: float, processors: float) -> None:
        clock.setdefault(name, []).append(seconds)
        processor.setdefault(name, []).append(processors / workers)

    for _ in range(repeats):
        for name in ("one", "small", "whole"):
            corpus = folder / f"{name}.jsonl"
            for _ in range(OFTEN):
                keep(
                    f"ours {name}",
                    *run(
                        ROOT / "tools/preprocess_data.py",
                        "--input",
                        corpus,
                        "--output-prefix",
                        folder / "ours",
                        "--tokenizer-type",
                        tokenizer_type,
                        "--tokenizer-model",
                        tokenizer,
                        "--append-eod",
                        "--workers",
                        workers,
                        "--overwrite",
                        "--log-interval",
                        10**9,
                    )[:2],
                )
            keep(
                f"theirs {name}",
                *run(__file__, "theirs", kind, tokenizer, corpus, folder / "theirs", workers)[:2],
            )
            for suffix in ("bin", "idx"):
                ours = (folder / f"ours_text_document.{suffix}").read_bytes()
                assert ours == (folder / f"theirs.{suffix}").read_bytes(), f".{suffix} differs"
        for way in ("threads", "processes") * OFTEN:
            output = run(__file__, "ceiling", kind, tokenizer, corpus, way, workers)[2]
            keep(f"gigatoken's {way}", *map(float, output.split()))
    return {
        "by the clock": rates(clock, sizes),
        "by processor time": rates(processor, sizes),
        "goal": GOALS[kind],
        "start-up, seconds": {
            who: round(statistics.median(clock[f"{who} one"]), 2) for who in ("ours", "theirs")
        },
        "tokens": json.loads((folder / "ours_summary.json").read_text())["tokens"],
        "seconds by the clock": clock,
        "seconds of processors / workers": processor,
    }


def rates(seconds: dict[str, list[float]], sizes: dict[str, int]) -> dict[str, float]:
    """MB/s of both programs, gigatoken's ways and the ceiling, and two ratios."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    found = {
        who: (sizes["whole"] - sizes["small"])
        / 1e6
        / (median[f"{who} whole"] - median[f"{who} small"])
        for who in ("ours", "theirs")
    }
    ways = {way: sizes["whole"] / 1e6 / median[way] for way in median if "gigatoken" in way}
    found |= ways | {"ceiling": max(ways.values())}
    return {name: round(rate, 2) for name, rate in found.items()} | {
        "ours / theirs": round(found["ours"] / found["theirs"], 1),
        "ours / ceiling": round(found["ours"] / found["ceiling"], 2),
    }


def main() -> None:
    if sys.argv[1:2] in (["theirs"], ["ceiling"]):
        role, kind, tokenizer, corpus, last, workers = sys.argv[1:]
        {"theirs": theirs, "ceiling": ceiling}[role](kind, tokenizer, corpus, last, int(workers))
        return
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python benchmarks/preprocess.py --output preprocess.json",
    )
    p.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/benchmark-preprocess"),
        help="for corpora and tokenizers, kept (default: %(default)s)",
    )
    p.add_argument("--megabytes", type=int, default=100, help="of text (default: %(default)s)")
    p.add_argument("--workers", type=int, default=2, help="(default: %(default)s)")
    p.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    p.add_argument("--output", type=Path, help="JSON of everything measured")
    flags = p.parse_args()
    sizes = prepare(flags.folder, flags.megabytes * 1_000_000)
    print(
        f"{sizes['whole documents']:,} documents, {sizes['whole'] / 1e6:.1f} MB of text, "
        f"{flags.workers} workers, {os.cpu_count()} cores, median of {flags.repeats}"
    )
    results = {"corpus": sizes, "workers": flags.workers, "cores": os.cpu_count()}
    print(f"{'MB/s':42}{'theirs':>9}{'ours':>9}{'ceiling':>9}{'times':>9}{'of ceiling':>12}")
    for kind, (_, name) in TOKENIZERS.items():
        results[kind] = found = measure(kind, flags.folder, sizes, flags.workers, flags.repeats)
        for clock in ("by the clock", "by processor time"):
            r = found[clock]
            print(
                f"{f'{name}, {clock}':42}{r['theirs']:9.1f}{r['ours']:9.1f}{r['ceiling']:9.1f}"
                f"{r['ours / theirs']:9.1f}{r['ours / ceiling']:12.0%}",
                flush=True,
            )
        starts = found["start-up, seconds"]
        print(
            f"{'  one document, s':42}{starts['theirs']:9.2f}{starts['ours']:9.2f}"
            f"{'goal':>9}{found['goal']:9}{'50%':>12}",
            flush=True,
        )
    if flags.output:
        flags.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
