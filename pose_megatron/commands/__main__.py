"""The command `pose-megatron`, also `python -m pose_megatron.commands`.

Only the chosen command is imported, so that `--help` is quick.
"""

import importlib
import signal
import sys

from pose_megatron import __version__
from pose_megatron.runtime.interrupts import end_at_once

PROGRAM = "pose-megatron"
# {step of the job: {command: (module in this folder, one line of help)}}
COMMANDS = {
    "the corpus": {
        "train-tokenizer": ("train_tokenizer", "train a byte-pair tokenizer"),
        "preprocess": ("preprocess", "turn text into token files"),
        "merge": ("merge", "join token files"),
        "materialize": ("materialize", "write the samples of a run to disk"),
        "plot-coverage": ("plot_coverage", "draw which distances a position sampler shows"),
    },
    "checkpoints": {
        "convert": ("convert", "convert between Hugging Face, Meta and Megatron"),
        "verify": ("verify", "compare a checkpoint with its conversion"),
        "inspect": ("inspect_checkpoint", "describe a checkpoint without loading its weights"),
    },
    "before training": {
        "plan": ("plan", "say what a run needs: memory, work, traffic and time"),
    },
    "evaluation": {
        "evaluate-perplexity": ("evaluate_perplexity", "measure perplexity by context length"),
        "evaluate-passkey": ("evaluate_passkey", "measure passkey retrieval by context length"),
        "evaluate-ruler": ("evaluate_ruler", "measure RULER's tasks by context length"),
        "plot": ("plot", "draw evaluation results against context length"),
        "report": ("report", "make a page of evaluation results"),
    },
}
MODULES = {name: module for group in COMMANDS.values() for name, (module, _) in group.items()}


def usage() -> str:
    """What `pose-megatron --help` prints."""
    width = max(map(len, MODULES))
    lines = [
        f"usage: {PROGRAM} COMMAND ...",
        f"       {PROGRAM} COMMAND --help",
        f"       {PROGRAM} --version",
        "",
        "Context extension of RoPE language models on megatron-core (PoSE).",
    ]
    for step, commands in COMMANDS.items():
        lines += ["", f"{step}:"]
        lines += [f"  {name:{width}}  {summary}" for name, (_, summary) in commands.items()]
    lines += ["", "training:", "  torchrun --nproc-per-node 8 -m pose_megatron.pretrain --help"]
    return "\n".join(lines)


def run(name: str) -> int:
    """Runs a command of COMMANDS on the rest of sys.argv; returns its exit code."""
    end_at_once()
    code = importlib.import_module(f"pose_megatron.commands.{MODULES[name]}").main()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    end_at_once(code)
    return code


def main() -> int:
    """Runs the command that sys.argv names; returns its exit code, 2 where there is none."""
    name, *argv = sys.argv[1:] or [""]
    if name in MODULES:
        # What argparse and error messages call the program.
        sys.argv = [f"{PROGRAM} {name}", *argv]
        return run(name)
    sys.argv[0] = PROGRAM
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends as in any program
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    if not name:
        print(usage(), file=sys.stderr)
        return 2
    import difflib

    from pose_megatron.runtime.cli import print_error

    near = difflib.get_close_matches(name, MODULES, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"see {PROGRAM} --help"
    print_error(f"there is no command {name!r}; {hint}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
