"""Gradients that are added up in float32 by the product that computes them."""

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import layers

from pose_megatron.models import build, weight_gradients
from pose_megatron.models.build import build_model, initialize, transformer_config
from pose_megatron.models.shape import ModelConfig

pytestmark = pytest.mark.usefixtures("world")

TOKENS = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(32).repeat(2, 1) * 3


def shape(**options):
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4}
    return ModelConfig(
        **sizes,
        **{"num_query_groups": 2, "kv_channels": 16, "vocab_size": 300}
        | {"max_position_embeddings": 128, "untie_embeddings_and_output_weights": True}
        | options,
    )


@pytest.mark.gpu
def test_the_product_is_rounded_once():
    draw = torch.Generator("cuda").manual_seed(0)

    def random(*sizes):
        return torch.randn(*sizes, generator=draw, device="cuda", dtype=torch.bfloat16)

    inputs, grads = random(512, 96), random(512, 64)
    total = torch.ones(64, 96, device="cuda")
    weight_gradients.accumulate(inputs, grads, total)
    wanted = 1 + grads.double().t() @ inputs.double()
    assert (total - wanted).abs().max() < 1e-4


@pytest.fixture
def on_gpu(monkeypatch):
    """The wiring of a GPU, with the product in float64: a CPU has no such operator."""

    def accumulate(inputs, grads, total):
        total.copy_(total.double() + grads.double().t() @ inputs.double())

    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", None, raising=False)
    monkeypatch.setattr(weight_gradients, "accumulate", accumulate)
    monkeypatch.setattr(build, "device", lambda: torch.device("cuda"))
    yield
    monkeypatch.undo()


def gradients(model, micro_batches=2, **settings):
    """({name: float32 gradient} of some micro-batches, how many were added up in passing)."""
    config = transformer_config(model, bf16=True, bias_swiglu_fusion=False, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "device", lambda: torch.device("cpu"))
        stage = build_model(config, model)
    initialize(stage, seed=1, std=0.1, num_layers=2)
    stage = stage.bfloat16()
    reduction = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, reduction, stage)
    model.zero_grad_buffer()
    for i in range(micro_batches):
        tokens = TOKENS.roll(i, 1)
        model(tokens, POSITIONS, None, labels=tokens.roll(-1, 1)).mean().backward()
    parameters = dict(stage.named_parameters())
    fused = sum(p.grad_added_to_main_grad for p in parameters.values())
    return {name: p.main_grad for name, p in parameters.items()}, fused


@pytest.mark.parametrize(
    "options, linear",
    [
        ({}, 2 * 4 + 1),
        ({"untie_embeddings_and_output_weights": False}, 2 * 4 + 1),
        ({"family": "baichuan", "num_query_groups": 4}, 2 * 4),  # not its normalized output layer
    ],
)
def test_gradients_are_those_of_separate_products(on_gpu, options, linear):
    model = shape(**options)
    wanted, none = gradients(model)
    found, fused = gradients(model, gradient_accumulation_fusion=True)
    assert (none, fused) == (0, linear)
    for name, grad in found.items():
        error = (grad - wanted[name]).norm() / wanted[name].norm()
        assert error < 2**-7, name  # bfloat16 has 8 bits
        assert grad.norm() > 0, name


def test_only_bfloat16_on_a_gpu_without_transformer_engine_does_so(on_gpu, monkeypatch):
    def fuses(**settings):
        on = {"bf16": True, "gradient_accumulation_fusion": True} | settings
        return transformer_config(shape(), **on).gradient_accumulation_fusion

    assert fuses() and not fuses(bf16=False) and not fuses(gradient_accumulation_fusion=False)
    assert not fuses(transformer_impl="transformer_engine")
    monkeypatch.setattr(build, "device", lambda: torch.device("cpu"))
    assert not fuses()
