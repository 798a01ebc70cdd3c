"""Which device a program computes on, what it says of it, and which GPU is a rank's."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from pose_megatron.errors import ConfigError
from pose_megatron.runtime import device
from pose_megatron.runtime.device import check_bf16, choose_device, describe_device, local_rank

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")


@pytest.fixture
def a_gpu(monkeypatch, tmp_path):
    """A driver's file of a GPU, and a PyTorch that is made for it, whose own call for CUDA fails."""
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(device, "DEVICE_FILES", (f"{tmp_path}/nvidia[0-9]*",))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "nvidia0"


@without_cuda
def test_a_gpu_that_pytorch_cannot_use_is_no_reason_to_train_on_the_cpu(a_gpu):
    with pytest.raises(ConfigError) as caught:
        choose_device()
    said = str(caught.value)
    assert said.startswith(f"there is a GPU ({a_gpu}), but PyTorch")
    # what torch itself says: not compiled with CUDA, or no driver found
    assert "Torch not compiled with CUDA" in said or "NVIDIA driver" in said
    assert "nvidia-smi" in said and "CUDA_VISIBLE_DEVICES=" in said


@without_cuda
@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_the_user_has_hidden_are_not_missed(a_gpu, monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    choose_device()


@without_cuda
def test_without_a_gpu_the_cpu_is_taken_and_said(a_gpu, monkeypatch):
    a_gpu.unlink()
    choose_device()
    assert describe_device() == f"CPU: PyTorch {torch.__version__} sees no GPU here"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert describe_device().startswith("CPU, 4 ranks over gloo: ")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert describe_device().endswith("CUDA_VISIBLE_DEVICES is empty")


@without_cuda
def test_a_pytorch_without_cuda_beside_a_gpu_says_so(a_gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    choose_device()
    assert describe_device().endswith("is built without CUDA; there is a GPU")


@without_cuda
@pytest.mark.parametrize("built", [None, "13.0"])
def test_cuda_that_was_asked_for_and_is_not_there_is_refused(monkeypatch, built):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", built)
    with pytest.raises(ConfigError, match="--device cuda: PyTorch .* or take --device cpu"):
        choose_device("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    if built:
        with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES='7' leaves PyTorch none"):
            choose_device("cuda")


def test_the_cpu_is_taken_where_it_is_asked_for():
    program = """
from pose_megatron.runtime.startup import prepare_megatron
prepare_megatron("cpu")
import torch
from pose_megatron.runtime.device import describe_device, device
print(torch.ones(1, device="cuda").device, device(), describe_device())
"""
    told = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert told == "cpu cpu CPU: CUDA_VISIBLE_DEVICES is empty\n"


def test_a_gpu_without_bfloat16_is_named(monkeypatch):
    volta = SimpleNamespace(name="Tesla V100-SXM2-16GB", major=7, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda rank: volta)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(ConfigError, match=r"--bf16: Tesla V100-SXM2-16GB .*7\.0.* float32"):
        check_bf16()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    check_bf16()


@pytest.mark.parametrize(
    ("environment", "gpu"),
    [({}, 0), ({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}, 1), ({"LOCAL_RANK": "3"}, 3)],
)
def test_a_rank_takes_the_gpu_of_its_number_on_the_node(monkeypatch, environment, gpu):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert local_rank() == gpu


def test_ranks_that_would_all_take_gpu_0_are_refused(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 8 and LOCAL_RANK is missing"):
        local_rank()
