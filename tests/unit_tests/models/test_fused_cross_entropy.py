"""--fused-cross-entropy where the kernel cannot compute, and what its backward pass may overwrite."""

import sys
import types

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt.gpt_model import GPTModel
from torch.utils._python_dispatch import TorchDispatchMode

from pose_megatron.models import fused_cross_entropy
from pose_megatron.models.build import build_model, transformer_config
from pose_megatron.models.gpt import PoseGPTModel, install_pose
from pose_megatron.models.shape import ModelConfig

pytestmark = pytest.mark.usefixtures("world")

MODEL = ModelConfig(
    num_layers=1,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=60,  # padded to 128, which have a share
    max_position_embeddings=64,
    untie_embeddings_and_output_weights=True,
)
TOKENS = torch.tensor([[0, 1, 59, 3], [5, 6, 7, 8]])
IDS = torch.arange(4).expand(2, 4)
LABELS = torch.tensor([[1, 59, 3, 4], [6, 7, 8, 0]])


def built(fused: str) -> PoseGPTModel:
    torch.manual_seed(0)
    return build_model(transformer_config(MODEL), MODEL, fused_cross_entropy=fused)


@pytest.fixture
def kernel(monkeypatch):
    """A stand-in for the module that needs Triton, which computes the same by torch."""
    launches = []

    def statistics(logits, labels, first):
        launches.append("forward")
        x = logits.float()
        largest = x.amax(-1)
        total = (x - largest[..., None]).exp().sum(-1)
        return largest, total, x.gather(-1, labels[..., None] - first)[..., 0]

    def write_gradient(logits, labels, first, largest, total, grad):
        launches.append("backward")
        y = (logits.float() - largest[..., None]).exp() / total[..., None]
        y.scatter_add_(-1, labels[..., None] - first, torch.tensor(-1.0).expand(*labels.shape, 1))
        logits.data.copy_(y * grad[..., None])  # autograd sees as little of it as of a kernel

    module = types.SimpleNamespace(
        RUNS_ON_CPU=True, statistics=statistics, write_gradient=write_gradient, launches=launches
    )
    monkeypatch.setitem(sys.modules, "pose_megatron.models.cross_entropy_kernel", module)
    monkeypatch.setattr("pose_megatron.models.cross_entropy_kernel", module, raising=False)
    return module


def loss_of(logits):
    return fused_cross_entropy.cross_entropy(logits, LABELS.t().contiguous(), dist.group.WORLD)


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return torch.randn(4, 2, 60, requires_grad=True)


def test_on_without_cuda_is_refused(kernel):
    kernel.RUNS_ON_CPU = False
    with pytest.raises(
        ValueError,
        match="--fused-cross-entropy on: torch finds no CUDA device.* --fused-cross-entropy auto",
    ):
        built("on")


def test_on_without_triton_is_refused_and_auto_does_without(monkeypatch):
    monkeypatch.setitem(sys.modules, "pose_megatron.models.cross_entropy_kernel", None)
    monkeypatch.delattr("pose_megatron.models.cross_entropy_kernel", raising=False)
    model = built("off")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        ValueError,
        match="--fused-cross-entropy on: Triton cannot be imported .*: pip install triton.*auto",
    ):
        fused_cross_entropy.kernel_computes("on", model)
    assert not fused_cross_entropy.kernel_computes("auto", model)


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="--fused-cross-entropy yes is none of auto, on, off"):
        built("yes")


def test_a_loss_of_the_models_own_is_left_to_it(kernel, monkeypatch):
    class Own(PoseGPTModel):
        def compute_language_model_loss(self, labels, logits):
            return super().compute_language_model_loss(labels, logits)

    model = built("off")
    model.__class__ = Own
    with pytest.raises(ValueError, match="on: Own computes its loss in a way of its own"):
        fused_cross_entropy.kernel_computes("on", model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not fused_cross_entropy.kernel_computes("auto", model)


def test_megatron_cores_own_kernel_goes_first(kernel, monkeypatch):
    model = built("off")
    monkeypatch.setattr(model.config, "cross_entropy_loss_fusion", True)
    with pytest.raises(ValueError, match=r"megatron-core's: leave it out \(--cross-entropy-loss-f"):
        fused_cross_entropy.kernel_computes("on", model)


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_without_cuda_nothing_is_fused(kernel, choice):
    built(choice)(TOKENS, IDS, None, labels=LABELS)
    assert not kernel.launches


def test_with_cuda_auto_is_on(kernel, monkeypatch):
    model = built("off")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kernel.RUNS_ON_CPU = False
    assert fused_cross_entropy.kernel_computes("auto", model)
    assert not fused_cross_entropy.kernel_computes("off", model)


def test_a_model_has_the_plain_loss_and_gradients_padding_included(kernel):
    fused, plain = built("on"), built("off")
    plain.load_state_dict(fused.state_dict())
    losses = [model(TOKENS, IDS, None, labels=LABELS) for model in (fused, plain)]
    assert torch.allclose(*losses, rtol=1e-6)
    for loss in losses:
        loss.sum().backward()
    assert kernel.launches == ["forward", "backward"]
    named = dict(plain.named_parameters())
    assert named["output_layer.weight"].grad[60:].abs().min() > 0  # a share of the padding's
    for name, parameter in fused.named_parameters():
        assert torch.allclose(parameter.grad, named[name].grad, rtol=1e-4, atol=1e-7), name


def test_a_model_of_others_takes_it_too(kernel):
    plain = built("off")
    stock = build_stock(plain)
    install_pose(stock, fused_cross_entropy="on")
    assert torch.allclose(
        stock(TOKENS, IDS, None, labels=LABELS), plain(TOKENS, IDS, None, labels=LABELS), rtol=1e-6
    )
    assert kernel.launches == ["forward"]


def build_stock(like: PoseGPTModel) -> GPTModel:
    """megatron-core's model with the weights of ours."""
    from pose_megatron.models.attention import torch_layer_spec

    config = transformer_config(MODEL)
    model = GPTModel(
        config,
        torch_layer_spec(config),
        vocab_size=MODEL.padded_vocab_size,
        max_sequence_length=MODEL.max_position_embeddings,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=not MODEL.untie_embeddings_and_output_weights,
        rotary_base=MODEL.rotary_base,
    )
    model.load_state_dict(like.state_dict())
    assert type(model).compute_language_model_loss is LanguageModule.compute_language_model_loss
    return model


def test_logits_without_labels_are_the_callers(kernel):
    logits = built("on")(TOKENS, IDS, None)
    assert not kernel.launches
    logits.square().sum().backward()


def test_float64_takes_the_plain_path(kernel):
    model = built("on")
    logits = torch.randn(4, 2, 128, dtype=torch.float64)
    model.compute_language_model_loss(LABELS, logits)
    assert not kernel.launches


def test_the_gradient_takes_the_logits_place_and_nothing_is_as_large(kernel, weights):
    logits = weights * 1
    kept, places = logits.detach().clone(), []
    logits.register_hook(lambda gradient: places.append(gradient.data_ptr()))

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            if isinstance(out, torch.Tensor) and out.data_ptr() != logits.data_ptr():
                self.elements = max(self.elements, out.numel())
            return out

    def untouched(*args):
        return torch.zeros(4, 2), torch.ones(4, 2), torch.zeros(4, 2)

    with Largest() as seen:
        kernel.statistics, kernel.write_gradient = untouched, lambda *args: None
        (gradient,) = torch.autograd.grad(loss_of(logits).sum(), logits)
    assert seen.elements == 2 * 4 * 2  # what the ranks exchange, two numbers a token
    assert places == [logits.data_ptr()] and gradient.data_ptr() == logits.data_ptr()
    assert torch.equal(gradient, kept)  # nothing was written


def test_the_forward_pass_leaves_the_logits_alone(kernel, weights):
    kept = weights.detach().clone()
    with torch.no_grad():
        assert not loss_of(weights * 1).requires_grad
    logits = weights * 1
    loss_of(logits)
    assert torch.equal(logits, kept)


def test_a_second_backward_pass_is_refused(kernel, weights):
    loss = loss_of(weights * 1).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass .* --fused-cross-entropy off"):
        loss.backward()


def test_logits_that_changed_in_between_are_refused(kernel, weights):
    logits = weights * 1
    loss = loss_of(logits).sum()
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_whoever_needs_the_logits_later_is_refused(kernel, weights):
    logits = weights.tanh()  # which its own gradient needs
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(logits).sum().backward()


def test_another_loss_whose_turn_comes_first_adds_to_the_gradient(kernel, weights):
    logits = weights * 1
    (loss_of(logits).sum() + logits.square().sum()).backward()
    exact = weights.detach().requires_grad_()
    labels = LABELS.t().flatten()
    cross = torch.nn.functional.cross_entropy(exact.flatten(0, 1), labels, reduction="sum")
    (cross + exact.square().sum()).backward()
    assert torch.allclose(weights.grad, exact.grad, rtol=1e-5, atol=1e-6)


def test_a_leaf_is_not_overwritten(kernel, weights):
    with pytest.raises(AssertionError, match="leaf"):
        loss_of(weights)


def test_logits_in_pieces_are_copied_first(kernel, weights):
    kept = weights.detach().clone()
    halves = (torch.cat((weights, weights), dim=-1) * 1)[..., 30:90]
    assert not halves.is_contiguous()
    loss_of(halves).sum().backward()
    assert torch.equal(weights, kept) and weights.grad.abs().max() > 0
