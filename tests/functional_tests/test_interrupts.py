"""Ctrl-C and SIGTERM end every tool in one sentence, also while it is imported."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pose_megatron.commands.__main__ import MODULES
from tests.processes import PATIENCE
from tests.unit_tests.test_commands import TOOLS

# Runs a tool, and sends it a signal when it begins to import a module.
AT_IMPORT = """
import os, runpy, sys

class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), number)

module, number = sys.argv[1], int(sys.argv[2])
sys.argv = sys.argv[3:]
sys.meta_path.insert(0, Sender())
runpy.run_path(sys.argv[0], run_name="__main__")
"""
RUN = """--output x --samples 4 --data-path {corpus} --vocab-size 257 --num-layers 2 --hidden-size 32
    --num-attention-heads 4 --seq-length 32 --max-position-embeddings 128 --train-iters 1
    --global-batch-size 1 --micro-batch-size 1 --split 1,0,0"""


def run(root, tmp_path, module, number, tool, *words):
    return subprocess.run(
        [sys.executable, "-c", AT_IMPORT, module, str(int(number)), root / "tools" / tool, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        # pytest may run in the background, where Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.parametrize("name", MODULES)
def test_while_a_tool_is_imported(root, tmp_path, name):
    module = f"pose_megatron.commands.{MODULES[name]}"
    done = run(root, tmp_path, module, signal.SIGINT, TOOLS[name], "--help")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == f"{TOOLS[name].rpartition('/')[2]}: interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "module", ["torch", "numpy.linalg", "megatron.core.datasets.indexed_dataset", "tqdm"]
)
def test_while_it_imports_what_it_needs(root, tmp_path, stdlib_corpus, module, number):
    words = RUN.format(corpus=stdlib_corpus).split()
    done = run(root, tmp_path, module, number, "materialize_positions.py", *words)
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("materialize_positions.py: interrupted\n")
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("*x*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_it_works(root, tmp_path, stdlib_corpus, number):
    words = RUN.format(corpus=stdlib_corpus).replace("--samples 4", "--samples 30000000").split()
    with subprocess.Popen(
        [sys.executable, root / "tools" / "materialize_positions.py", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        end = time.monotonic() + PATIENCE
        while not list(tmp_path.glob(".x.draft/*")) and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert json.loads((tmp_path / ".x.owner").read_text())["pid"] == process.pid
        process.send_signal(number)
        _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, error
    assert error.endswith("materialize_positions.py: interrupted\n") and "Traceback" not in error
    assert not list(tmp_path.iterdir())
