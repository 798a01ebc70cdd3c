"""The rope on which Megatron's flags and a checkpoint agree, and one that cannot be."""

import argparse
import inspect

import pytest
import torch

from pose_megatron.runtime.megatron_core import common_state_is_an_object
from tests.unit_tests.checkpoints.test_megatron_interop import their_args

pytestmark = [
    pytest.mark.usefixtures("world"),
    pytest.mark.skipif(
        not common_state_is_an_object(), reason="megatron.training comes with megatron-core 0.19"
    ),
]


def flags(**more):
    """Megatron's parsed flags of a fresh run, and ours."""
    ours = {
        "rope_scaling": "yarn",
        "rope_scaling_factor": None,
        "rope_scaling_config": None,
        "fused_rotary": None,
        "fused_cross_entropy": None,
        "original_max_position_embeddings": None,
        "load": None,
        "pretrained_checkpoint": None,
        "ckpt_step": None,
        "hybrid_layer_pattern": None,
        "seq_length": 32,
    }
    return argparse.Namespace(**vars(their_args()) | ours | more)


def test_a_fresh_model_is_interpolated_from_the_window_to_the_target():
    from pose_megatron.megatron.model import resolve_rope

    rope = resolve_rope(flags())
    assert (rope.rope_scaling.method, rope.rope_scaling.factor) == ("yarn", 256 / 32)
    assert rope.rope_scaling.original_max_position_embeddings == 32
    assert rope.record()["model"]["rope_scaling"]["factor"] == 8.0


def test_layers_beside_attention_keep_only_the_rope():
    from pose_megatron.megatron.model import resolve_rope

    rope = resolve_rope(flags(hybrid_layer_pattern="M*M-", num_layers=4, is_hybrid_model=True))
    assert rope.model is None and rope.rope_scaling.factor == 8.0
    assert rope.record()["rope"]["rotary_base"] == 50000


def test_a_pattern_without_attention_is_refused():
    from pose_megatron.megatron.model import resolve_rope

    with pytest.raises(ValueError, match=r"M-M- has no attention layer '\*': nothing rotates"):
        resolve_rope(flags(hybrid_layer_pattern="M-M-", num_layers=4, is_hybrid_model=True))


def test_a_batch_without_position_ids_is_refused(monkeypatch):
    from pose_megatron.megatron import batch

    args = argparse.Namespace(micro_batch_size=2, seq_length=32)
    monkeypatch.setattr(batch, "get_args", lambda: args)
    stock = {name: torch.zeros(2, 32) for name in ("tokens", "labels", "loss_mask")}
    with pytest.raises(ValueError, match="the batch has no position_ids: hand pretrain"):
        batch.get_batch(iter([stock]))


def test_an_unknown_pretrain_is_refused(monkeypatch):
    from pose_megatron.megatron import pretrain

    def future(config, data, model): ...

    monkeypatch.setattr(pretrain, "pretrain", future)
    names = ", ".join(inspect.signature(future).parameters)
    with pytest.raises(ValueError, match=rf"has pretrain\({names}\), and PoSE knows"):
        pretrain.run()
