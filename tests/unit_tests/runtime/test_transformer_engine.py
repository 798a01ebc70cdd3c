"""Transformer Engine that is missing, broken, of another version or without a GPU takes nothing else
down."""

import os
import subprocess
import sys

import pytest

BROKEN = {
    "a library is missing": "raise OSError('libcudnn.so.9: cannot open shared object file')",
    "for another torch": "raise ImportError('undefined symbol: _ZN3c10')",
    "no bindings for torch": None,
}
PROGRAM = """
import sys
from unittest import mock
import torch
from pose_megatron.runtime.startup import prepare_megatron
from pose_megatron.runtime.transformer_engine import fault
with mock.patch.object(torch.cuda, "is_available", lambda: sys.argv[1] == "GPU"):
    fault()
prepare_megatron()
hidden = sys.modules.get("transformer_engine", "not imported") is None
from megatron.core.extensions.transformer_engine import HAVE_TE
print(HAVE_TE, hidden, fault(), sep="|")
"""


def installed(folder, bindings, version=None):
    """A package of that name: what importing its bindings runs; None: it has none."""
    package = folder / "transformer_engine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    if bindings is not None:
        (package / "pytorch.py").write_text(bindings)
    if version:
        info = folder / f"transformer_engine-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: transformer_engine\nVersion: {version}\n")
    return folder


def told(folder, device: str) -> list[str]:
    """Whether megatron-core uses the package, whether it is hidden, and what is wrong with it."""
    path = os.pathsep.join([str(folder), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, device],
        env=os.environ | {"PYTHONPATH": path},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip().split("|")


@pytest.mark.parametrize("bindings", BROKEN.values(), ids=BROKEN)
def test_one_that_is_half_installed_is_a_sentence_and_torch_goes_on(tmp_path, bindings):
    *used, fault = told(installed(tmp_path, bindings), "GPU")
    assert used == ["False", "True"]
    assert fault.startswith("it is installed and cannot be imported (")
    assert any(word in fault for word in ("libcudnn", "undefined symbol", "No module named"))
    assert "); install it after PyTorch" in fault


def test_a_whole_one_is_hidden_where_there_is_no_gpu(tmp_path):
    """Its Adam would be megatron-core's choice there, too, and takes CUDA tensors only."""
    found = told(installed(tmp_path, ""), "CPU")
    assert found == ["False", "True", "it needs a GPU, and torch finds none"]


def test_one_for_another_megatron_core_is_told_apart(tmp_path, monkeypatch):
    from importlib.metadata import requires

    from pose_megatron.runtime import transformer_engine

    ranges = [line for line in requires("megatron-core") if line.startswith("transformer-engine")]
    if not any("<" in line for line in ranges):
        pytest.skip("this megatron-core asks for no version")
    monkeypatch.syspath_prepend(installed(tmp_path, "", "1.7.0"))
    fault = transformer_engine._other_version()
    assert fault.startswith("it is 1.7.0, and megatron-core") and ">=2.9" in fault
    monkeypatch.undo()
    monkeypatch.syspath_prepend(installed(tmp_path / "own", "", "2.10.0"))
    assert transformer_engine._other_version() is None
