"""The checkpoint under evaluation, and the interpolation that flags put on it."""

import pytest
import torch

from pose_megatron.checkpoints.megatron.format import Megatron
from pose_megatron.errors import ConfigError
from pose_megatron.evaluation.target import find_target
from tests.unit_tests.checkpoints.test_megatron_interop import (
    save_as_they_do,
    their_args,
    whole_tensors,
)

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture
def load(tmp_path):
    """A stock checkpoint whose window is 256, its seq_length."""
    save_as_they_do(tmp_path, {"args": their_args()}, whole_tensors())
    return tmp_path


def test_a_factor_of_one_is_refused(load):
    with pytest.raises(ConfigError, match="factor 1, .* 256: give --rope-scaling-factor"):
        find_target(load, [64, 256], rope_scaling="yarn")
    given = find_target(load, [64, 256], rope_scaling="yarn", rope_scaling_factor=4.0)
    assert str(given.model.rope_scaling) == "yarn x4 from 256"
    assert find_target(load, [64, 1024], rope_scaling="yarn").model.rope_scaling.factor == 4
    assert find_target(load, [64]).model.rope_scaling.factor == 1


def test_the_window_of_a_stock_checkpoint_can_be_said(load):
    assert Megatron().open(load).model.max_position_embeddings == 256
    assert Megatron(max_position_embeddings=4096).open(load).model.max_position_embeddings == 4096


def test_a_recorded_window_is_not_contradicted(load):
    from tests.unit_tests.checkpoints.test_megatron_interop import MODEL

    record = {"args": their_args(), "pose_megatron": {"model": MODEL.to_dict()}}
    torch.save(record, load / "iter_0000020" / "common.pt")
    with pytest.raises(ConfigError, match="records the window that it was trained to, 256"):
        Megatron(max_position_embeddings=4096).open(load)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_computes_in_the_precision_of_the_weights_unless_told(tmp_path, monkeypatch, dtype):
    save_as_they_do(tmp_path, {"args": their_args()}, whole_tensors(), dtype)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not find_target(tmp_path, [64]).bf16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert find_target(tmp_path, [64]).bf16 == (dtype != torch.float32)
    assert not find_target(tmp_path, [64], bf16=False).bf16
    assert find_target(tmp_path, [64], bf16=True).bf16
