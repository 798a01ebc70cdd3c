"""The driver, built once, and programs that run on it."""

import json
import subprocess
import sys

import pytest

from tests.conftest import write_corpus
from tests.fake_gpu.environment import HERE, build, environment, obstacle

PATIENCE = 900  # seconds
GIB = 2**30
FIGURES = pytest.StashKey[dict]()


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    if reason := obstacle():
        pytest.skip(f"no fake GPU: {reason}")
    return build(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="session")
def on_fake_gpu(driver):
    """on_fake_gpu(program, *words, text=None) -> what it prints; it must end well."""

    def run(program, *words, text: str | None = None) -> str:
        done = subprocess.run(
            [sys.executable, str(program), *map(str, words)],
            input=text,
            env=environment(driver),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    return run


@pytest.fixture(scope="session")
def measured(on_fake_gpu, pytestconfig):
    """measured(cases) -> {case: what measure.py found of it}; the summary prints it, too."""

    def measure(cases: dict) -> dict:
        printed = on_fake_gpu(HERE / "measure.py", text=json.dumps(cases))
        found = json.loads(printed.splitlines()[-1])
        pytestconfig.stash.setdefault(FIGURES, {}).update(found)
        return found

    return measure


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """40 documents of 1,024 tokens below 1,000; returns the prefix."""
    documents = [[(7 * i + number) % 1000 for i in range(1024)] for number in range(40)]
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text_document", documents)


def pytest_terminal_summary(terminalreporter, config) -> None:
    """A line for each case, and where the host waited in it."""
    for name, figures in config.stash.get(FIGURES, {}).items():
        waits = sum(figures["waits"].values())
        terminalreporter.write_line(
            f"{name}: {figures['peak'] / GIB:.2f} GiB, {figures['launches']:,} launches, "
            f"{figures['gemm']:,} matrix products, {waits} waits"
        )
        for lines, count in figures["lines"].items():
            terminalreporter.write_line(f"    {count} at {lines}")
