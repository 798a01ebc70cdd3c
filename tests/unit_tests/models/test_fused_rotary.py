"""--fused-rotary where the kernel cannot rotate, and what travels to the layers where it can."""

import sys
import types

import pytest
import torch
from megatron.core.transformer.attention import SelfAttention

from pose_megatron.models import fused_rotary
from pose_megatron.models.build import build_model, transformer_config
from pose_megatron.models.gpt import PoseGPTModel
from pose_megatron.models.shape import ModelConfig
from pose_megatron.rope.angles import fixed_point_turns

pytestmark = pytest.mark.usefixtures("world")

MODEL = ModelConfig(
    num_layers=1,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=64,
    max_position_embeddings=2**20,
)
IDS = torch.tensor([[0, 1, 70000, 2**20 - 1], [5, 6, 7, 900000]])


def built(fused: str) -> PoseGPTModel:
    return build_model(transformer_config(MODEL), MODEL, fused_rotary=fused)


@pytest.fixture
def kernel(monkeypatch):
    """A stand-in for the module that needs Triton: what it was asked to rotate, doubled."""
    asked = []

    def rotate(query, key, *how, **more):
        asked.append((*how, more))
        return 2 * query, 2 * key

    module = types.SimpleNamespace(RUNS_ON_CPU=True, rotate=rotate, asked=asked)
    monkeypatch.setitem(sys.modules, "pose_megatron.models.rotary_kernel", module)
    monkeypatch.setattr("pose_megatron.models.rotary_kernel", module, raising=False)
    return module


def test_on_without_cuda_is_refused(kernel):
    kernel.RUNS_ON_CPU = False
    with pytest.raises(
        ValueError, match="--fused-rotary on: torch finds no CUDA device.* --fused-rotary auto"
    ):
        built("on")


def test_on_without_triton_is_refused_and_auto_does_without(monkeypatch):
    monkeypatch.setitem(sys.modules, "pose_megatron.models.rotary_kernel", None)
    monkeypatch.delattr("pose_megatron.models.rotary_kernel", raising=False)
    attention = built("off").decoder.layers[0].self_attention
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        ValueError,
        match="--fused-rotary on: Triton cannot be imported .*: pip install triton.*auto",
    ):
        fused_rotary.kernel_rotates("on", [attention])
    assert not fused_rotary.kernel_rotates("auto", [attention])


def test_an_attention_that_rotates_by_itself_is_named(kernel):
    class Own(SelfAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    attention = built("off").decoder.layers[0].self_attention
    attention.__class__ = Own
    with pytest.raises(ValueError, match="layer 1 has Own, whose forward is not megatron-core's"):
        fused_rotary.kernel_rotates("on", [attention])


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="--fused-rotary yes is none of auto, on, off"):
        built("yes")


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_without_cuda_nothing_is_fused(kernel, choice):
    model = built(choice)
    assert type(model.decoder.layers[0].self_attention) is SelfAttention
    model(IDS % 64, IDS, None)
    assert not kernel.asked


def test_with_cuda_auto_is_on(kernel, monkeypatch):
    attention = built("off").decoder.layers[0].self_attention
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kernel.RUNS_ON_CPU = False
    assert fused_rotary.kernel_rotates("auto", [attention])
    assert not fused_rotary.kernel_rotates("off", [attention])


def test_every_layer_is_handed_the_ids_and_the_frequencies(kernel):
    model = built("on")
    model(IDS % 64, IDS[:, :1].expand(2, 4), None)
    ((ids, turns, how),) = kernel.asked
    assert torch.equal(ids, torch.tensor([[0] * 4, [5] * 4]))
    # By hand: theta_i = 10000^(-2i/8) radians, of 2 pi, in units of 2^-64.
    wanted = [10000 ** (-i / 4) / 6.283185307179586 * 2**64 for i in range(4)]
    assert turns.tolist() == pytest.approx(wanted, rel=1e-15)
    assert how == {"interleaved": False}


def test_ids_that_are_no_whole_numbers_take_the_plain_path(kernel):
    model, plain = built("on").eval(), built("off").eval()
    plain.load_state_dict(model.state_dict())
    tokens, ids = IDS % 64, IDS / 2
    with torch.no_grad():
        assert torch.equal(model(tokens, ids, None), plain(tokens, ids, None))
    assert not kernel.asked


def test_a_cache_of_megatron_core_is_refused(kernel):
    attention = built("on").decoder.layers[0].self_attention
    query = torch.zeros(4, 2, 4, 8)
    numbers = fused_rotary.packed(IDS, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="key-value cache: build the model with --fused-rotary"):
        attention._adjust_key_value_for_inference(object(), query, query, query, (numbers,) * 2)


def test_turns_wrap_round_in_64_bits():
    """Half a turn, three quarters and a tenth of a position."""
    turn = 6.283185307179586
    found = fixed_point_turns(torch.tensor([0.5 * turn, 0.75 * turn, 0.1 * turn], dtype=float))
    assert found[:2].tolist() == [-(2**63), -(2**62)]
    assert found[2].item() / 2**64 == pytest.approx(0.1, abs=1e-16)
