"""The PoSE paper in small: its tables, beside what it has no control for, and verdicts.

    python examples/reproduce/run.py --profile cpu

trains a base model on windows of L tokens, extends it in all the ways of experiments.py, measures
each at L, 2 L, 4 L, ... and writes a report. What is done is kept: the same command goes on.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import summary
from experiments import TITLES, Experiment, experiments, lengths
from profiles import PROFILES, Profile

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Reproduction:
    """Where everything lies, and the commands that make it.

    Attributes:
        model: a Hugging Face folder as the base model; None: it is trained.
        train, test: corpus prefixes; None: the standard library's source.
        dry_run: whether commands are printed only.
    """

    profile: Profile
    folder: Path
    model: str | None
    train: str | None
    test: str | None
    dry_run: bool
    _running: set[subprocess.Popen] = field(default_factory=set)
    _said: set[str] = field(default_factory=set)
    _speaking: threading.Lock = field(default_factory=threading.Lock)
    _steps: dict[str, threading.Lock] = field(default_factory=dict)
    _stopped: bool = False

    @property
    def tokenizer(self) -> str:
        return self.model or f"{self.folder}/tokenizer"

    @property
    def corpus(self) -> tuple[str, str]:
        here = self._prefix("train"), self._prefix("test")
        return self.train or here[0], self.test or here[1]

    def _prefix(self, part: str) -> str:
        return f"{self.folder}/{part}_text_document"

    def text(self, family: str) -> list[str]:
        """--data-path of a training: pairs to recall are mixed with text."""
        if family == "recall":
            return ["0.3", self.corpus[0], "0.7", self._prefix("recall")]
        return [self.corpus[0]]

    def prepare(self) -> None:
        """Corpus and tokenizer."""
        folder, profile = self.folder, self.profile
        if not self.train:
            corpus = f"{folder}/corpus"
            pairs = ["python", "examples/reproduce/recall_corpus.py", f"{corpus}/train.jsonl"]
            text = ["python", "examples/stdlib_corpus.py", corpus]
            self.step("corpus", [text, [*pairs, corpus]])
            train = ["python", "tools/train_tokenizer.py"]
            train += ["--input", f"{corpus}/train.jsonl", f"{corpus}/symbols.jsonl"]
            train += ["--vocab-size", str(profile.vocabulary), "--output-dir", self.tokenizer]
            self.step("tokenizer", [[*train, "--overwrite"]])
            for part in ("train", "test", "recall"):
                make = ["python", "tools/preprocess_data.py", "--append-eod", "--overwrite"]
                make += ["--tokenizer-type", "HuggingFaceTokenizer"]
                make += ["--tokenizer-model", self.tokenizer]
                make += ["--input", f"{corpus}/{part}.jsonl"]
                self.step(f"{part}-text", [[*make, "--output-prefix", f"{folder}/{part}"]])

    def base(self, family: str) -> None:
        """The base model of an architecture."""
        folder, profile = self.folder, self.profile
        base = f"{folder}/base-{family}"
        if self.model:
            self.step(f"base-{family}", [_convert(self.model, base)])
            return
        shape = [*profile.shape, "--untie-embeddings-and-output-weights"]
        shape += ["--make-vocab-size-divisible-by", "64"]
        if family == "recall":
            # turns faster, so that beyond its window it fails as large models do
            shape += ["--rotary-base", "1000"]
        commands = []
        if family == "gptj":
            # fresh weights come in as a checkpoint of transformers does
            new = f"{folder}/new-{family}"
            make = ["python", "examples/reproduce/new_gptj.py", f"{new}-hf", self.tokenizer]
            make += ["--window", str(profile.window)]
            commands = [[*make, *profile.shape], _convert(f"{new}-hf", new)]
            shape = ["--pretrained-checkpoint", new]
        train = self.trainer(base, family, profile.window, profile.batch, 1234)
        commands.append([*train, *shape, *profile.base])
        self.step(f"base-{family}", commands)

    def cost(self) -> Path:
        """What steps cost; nothing else should run meanwhile."""
        found = self.folder / "cost.json"
        measure = ["python", "benchmarks/full_length.py", *self.profile.cost]
        self.step("cost", [[*measure, "--output", str(found)]])
        return found

    def runs(self, experiment: Experiment) -> Iterator["Run"]:
        for seed in self.profile.seeds if experiment.trained else [0]:
            yield Run(self, experiment, seed)

    def trainer(self, save: str, family: str, window: int, batch: int, seed: int) -> list[str]:
        profile = self.profile
        micro = max(min(profile.micro_batch, batch // profile.ranks), 1)
        launch = ["torchrun", "--standalone", "--nproc-per-node", str(profile.ranks)]
        if profile.ranks == 1:  # needs no launcher, which takes seconds to start
            launch = ["python"]
        return [
            *(*launch, "pretrain_pose.py", "--load", save, "--save", save, "--save-retain", "1"),
            *("--data-path", *self.text(family), "--split", "100,0,0", "--num-workers", "0"),
            *("--tokenizer-model", self.tokenizer, "--seq-length", str(window)),
            *("--micro-batch-size", str(micro), "--global-batch-size", str(batch)),
            *("--seed", str(seed), "--log-interval", "50"),
        ]

    def step(self, name: str, commands: Sequence[Sequence[str]]) -> None:
        """Runs commands one after the other, once; what they print goes to a file.

        Raises:
            SystemExit: one of them fails.
        """
        with self._steps.setdefault(name, threading.Lock()):  # two tables may share a model
            self._step(name, commands)

    def _step(self, name: str, commands: Sequence[Sequence[str]]) -> None:
        if self.dry_run:
            if name not in self._said:
                self.say("\n".join(shlex.join(command) for command in commands))
            self._said.add(name)
            return
        mark = self.folder / "done" / name
        if mark.exists():
            return
        mark.parent.mkdir(parents=True, exist_ok=True)
        start, log = time.monotonic(), self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        with open(log, "a") as file:
            for command in commands:
                if self._stopped:
                    raise SystemExit(f"{name}: not begun")
                print(f"$ {shlex.join(command)}", file=file, flush=True)
                process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
                self._running.add(process)
                code = process.wait()
                self._running.discard(process)
                if code:
                    raise SystemExit(f"{name}: exit code {code}, see {log}: {_reason(log)}")
        mark.touch()
        self.say(f"{name}: {time.monotonic() - start:.0f} s")

    def stop(self) -> None:
        """Ends what runs, and begins nothing more; a training saves first."""
        self._stopped = True
        for process in list(self._running):
            process.terminate()

    def say(self, text: str) -> None:
        with self._speaking:
            print(text, flush=True)


@dataclass(frozen=True)
class Run:
    """One experiment with one seed."""

    of: Reproduction
    experiment: Experiment
    seed: int

    @property
    def name(self) -> str:
        return f"{self.experiment.key}-{self.seed}"

    @property
    def results(self) -> Path:
        return self.of.folder / "results" / f"{self.name}.jsonl"

    def __call__(self) -> None:
        """Trains the model, where it is not the base model itself, and measures it."""
        if self.experiment.trained:
            self.of.step(f"{self.experiment.model}-{self.seed}", [self.training()])
        self.of.step(self.name, [self.measuring()])

    @property
    def base(self) -> str:
        return f"{self.of.folder}/base-{self.experiment.family}"

    @property
    def model(self) -> str:
        if not self.experiment.trained:
            return self.base
        return f"{self.of.folder}/models/{self.experiment.model}-{self.seed}"

    def training(self) -> list[str]:
        experiment, profile = self.experiment, self.of.profile
        window, batch = profile.window, profile.batch
        target = window * experiment.factor
        if experiment.full:
            window, batch = target, max(batch // experiment.factor, 1)
        iters = round(profile.iters * experiment.share)
        return [
            *self.of.trainer(self.model, experiment.family, window, batch, self.seed),
            *("--pretrained-checkpoint", self.base, "--train-iters", str(iters)),
            *("--max-position-embeddings", str(target), *experiment.rope, *profile.extend),
            *experiment.flags,
        ]

    def measuring(self) -> list[str]:
        experiment, profile = self.experiment, self.of.profile
        # a model that was trained carries its own
        scale = experiment.rope if not experiment.trained and experiment.scaling != "none" else []
        measure = ["tools/evaluate_perplexity.py", "--max-documents", str(profile.documents)]
        measure += ["--stride", str(profile.window)]
        if experiment.recalls:
            texts = str(4 * profile.documents)
            measure = ["examples/reproduce/evaluate_recall.py", "--trials", texts]
        measured = map(str, lengths(experiment.table, profile))
        return [
            *("python", *measure, "--load", self.model, "--name", experiment.name),
            *("--data-path", self.of.corpus[1], "--context-lengths", *measured, *scale),
            *(*profile.measure, "--output", str(self.results)),
        ]


def _convert(source: str, target: str) -> list[str]:
    command = ["python", "tools/checkpoint/convert.py", "--loader", "hf", "--saver", "megatron"]
    return [*command, "--load-dir", source, "--save-dir", target, "--overwrite"]


def _reason(log: Path) -> str:
    """The last line that names an error; below it torchrun has more of its own."""
    lines = log.read_text(errors="replace").rstrip().splitlines() or [""]
    errors = [line for line in lines if ": error: " in line]
    return (errors or lines)[-1]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--profile", choices=PROFILES, default="cpu", help="how large it is [cpu]")
    add("--output", type=Path, default=Path("runs/reproduce"), help="[runs/reproduce]")
    add("--tables", nargs="+", choices=TITLES, default=list(TITLES), help="only these [all]")
    add("--jobs", type=int, default=1, help="runs side by side [1]")
    add("--model", help="Hugging Face folder of the base model [profile paper needs one]")
    add("--train", help="corpus prefix to train on, with --model")
    add("--test", help="corpus prefix to measure on, with --model")
    add("--dry-run", action="store_true", help="print the commands only")
    flags = parser.parse_args()
    own = [flags.model, flags.train, flags.test]
    if any(own) and not all(own):
        parser.error("--model, --train and --test belong together")
    if not any(own) and not PROFILES[flags.profile].base:
        parser.error(f"--profile {flags.profile} needs --model, --train and --test")
    if flags.jobs < 1:
        parser.error(f"--jobs {flags.jobs}: must be at least 1")
    return flags


def main() -> None:
    flags = parse()
    # the programs of this Python's environment
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if flags.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    profile = PROFILES[flags.profile]
    own = flags.model, flags.train, flags.test
    whole = Reproduction(profile, flags.output, *own, dry_run=flags.dry_run)
    chosen = [e for e in experiments(profile) if e.table in flags.tables]
    if flags.model:  # it is of one architecture
        chosen = [e for e in chosen if e.family == "llama"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    runs = [run for experiment in chosen for run in whole.runs(experiment)]
    with ThreadPoolExecutor(1 if flags.dry_run else flags.jobs) as pool:
        try:
            whole.prepare()
            families = dict.fromkeys(experiment.family for experiment in chosen)
            bases = {family: pool.submit(whole.base, family) for family in families}

            def after_base(run: Run) -> None:
                bases[run.experiment.family].result()
                run()

            for done in as_completed([pool.submit(after_base, run) for run in runs]):
                done.result()
            cost = whole.cost() if "figure-3" in flags.tables else None
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            whole.stop()
            if isinstance(error, KeyboardInterrupt):
                raise SystemExit("interrupted; the same command goes on") from None
            raise
    if not flags.dry_run:
        made = {run.results: run.experiment for run in runs}
        summary.write(flags.output, profile, made, cost)


if __name__ == "__main__":
    main()
