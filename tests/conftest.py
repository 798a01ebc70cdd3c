"""Shared by all tests: the CPU words first, then a one-rank world and small real corpora."""

import os
import signal
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Not into the user's own: what tools keep from run to run.
CACHE = tempfile.TemporaryDirectory(prefix="pose-cache-")
os.environ["XDG_CACHE_HOME"] = CACHE.name
# Started in the background, a process ignores Ctrl-C, and what it starts inherits that; some tests
# send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
import torch.distributed as dist

EOD = 256  # bytes are tokens 0 to 255
STDLIB = (
    "bisect",
    "colorsys",
    "contextlib",
    "fnmatch",
    "heapq",
    "keyword",
    "operator",
    "queue",
    "sched",
    "shlex",
    "stat",
    "textwrap",
    "this",
    "token",
    "tokenize",
    "types",
)


def pytest_report_header(config) -> str:
    """What runs, and on what."""
    python = ".".join(map(str, sys.version_info[:3]))
    core, tests = version("megatron-core"), ", ".join(config.args)
    return f"== Python {python}, torch {torch.__version__}, megatron-core {core}: {tests}"


def pytest_configure(config) -> None:
    """All but the tests of a GPU run on the CPU, wherever they run."""
    from pose_megatron.runtime import cpu, transformer_engine

    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Before anything imports megatron.core.
    transformer_engine.fault()
    cpu.install()


def pytest_collection_modifyitems(items) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device and -m gpu"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def world():
    """A process group of one rank, with megatron-core's groups in it."""
    from megatron.core import parallel_state, tensor_parallel

    from pose_megatron.runtime import distributed

    if not dist.is_initialized():
        distributed.initialize(seed=1234)
    elif not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def write_corpus(prefix: Path, documents, dtype=np.uint16) -> str:
    """Writes token lists with stock megatron-core's builder; returns the prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture
def make_corpus(tmp_path):
    """make_corpus(documents, name="corpus", dtype=np.uint16) -> prefix"""

    def make(documents, name="corpus", dtype=np.uint16) -> str:
        return write_corpus(tmp_path / name, documents, dtype)

    return make


@pytest.fixture(scope="session")
def stdlib_documents() -> list[list[int]]:
    """Source files of the Python that runs, as bytes and an end-of-document token; vocabulary 257."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [[*(folder / f"{name}.py").read_bytes(), EOD] for name in STDLIB]


@pytest.fixture(scope="session")
def stdlib_corpus(stdlib_documents, tmp_path_factory) -> str:
    """Their corpus; returns the prefix."""
    return write_corpus(tmp_path_factory.mktemp("stdlib") / "text_document", stdlib_documents)
