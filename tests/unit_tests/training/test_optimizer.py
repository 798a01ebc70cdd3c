"""The optimizer as a GPU without Transformer Engine and apex has it."""

import pytest
import torch
from megatron.core import parallel_state, utils
from megatron.core.optimizer import clip_grads
from torch.utils._python_dispatch import TorchDispatchMode

from pose_megatron.checkpoints.megatron import directory
from pose_megatron.training.gradient_norm import mend_gradient_norm
from pose_megatron.training.optimizer import _adopt, fuse, parts, update
from pose_megatron.training.trainer import save
from tests.unit_tests.training.test_checkpointing import MODEL, trainer_of

pytestmark = pytest.mark.usefixtures("world")


class Waits(TorchDispatchMode):
    """How often a number is fetched to the host, where a GPU's would be waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ == "_local_scalar_dense"
        return func(*args, **kwargs or {})


def gradients(count=50):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, n + 1, generator=generator) * 10 ** (n % 5 - 2) for n in range(count)]


def norm(grads):
    group = parallel_state.get_model_parallel_group()
    return clip_grads.get_grad_norm_fp32(grads, grad_stats_parallel_group=group)


def test_the_norm_of_many_tensors_is_one_wait():
    mend_gradient_norm()
    grads = gradients()
    whole = torch.cat([grad.flatten() for grad in grads]).double().norm().item()
    with Waits() as waits:
        found = norm(grads)
    assert found == pytest.approx(whole, rel=1e-6) and waits.count == 1
    with Waits() as waits:
        utils.local_multi_tensor_l2_norm(0, None, [grads], False)
    assert waits.count  # and what goes on inside torch.tensor() is not seen here


def test_clipping_scales_to_the_norm_that_is_asked_for():
    mend_gradient_norm()
    parameters = [torch.zeros_like(grad) for grad in gradients()]
    for parameter, grad in zip(parameters, gradients(), strict=True):
        parameter.grad = grad
    before = norm(gradients())
    clip_grads.clip_grad_by_total_norm_fp32(parameters, 2.0, before)
    for parameter, grad in zip(parameters, gradients(), strict=True):
        torch.testing.assert_close(parameter.grad, grad * (2.0 / before), rtol=1e-5, atol=0)


def trainer(*words, fused, loaded=None):
    with pytest.MonkeyPatch.context() as patch:
        if fused:  # a CPU has the operator, too
            patch.setattr("pose_megatron.training.optimizer.device", lambda: torch.device("cuda"))
        return trainer_of(MODEL, "--lr", "0.01", *words, loaded=loaded)


def step(made, seed):
    """A step with random gradients; megatron-core's buffers give them to the optimizer."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.models[0].parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    update(made.optimizer, clip_grad=1.0, finite=True)


def weights(made):
    return {name: p.detach().clone() for name, p in made.models[0].named_parameters()}


def groups(made):
    return [g for part in parts(made.optimizer) for g in part.optimizer.param_groups]


FORMS = [[], ["--use-distributed-optimizer"], ["--bf16"], ["--bf16", "--use-distributed-optimizer"]]


@pytest.mark.parametrize("words", FORMS, ids=" ".join)
def test_fused_adam_takes_the_steps_of_torchs_loop(words):
    made = {fused: trainer(*words, fused=fused) for fused in (True, False)}
    start = weights(made[True])
    for seed in range(3):
        for each in made.values():
            step(each, seed)
    assert all(g["fused"] for g in groups(made[True])) and not any(
        g["fused"] for g in groups(made[False])
    )
    for (name, one), other in zip(
        weights(made[True]).items(), weights(made[False]).values(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=name)
        assert not torch.equal(one, start[name])


@pytest.mark.parametrize("words", FORMS, ids=" ".join)
@pytest.mark.parametrize("fused", [True, False])
def test_a_checkpoint_goes_on_with_the_other_form(tmp_path, words, fused):
    words = [*words, "--save", str(tmp_path)]
    first = trainer(*words, fused=fused)
    for seed in range(2):
        step(first, seed)
    first.iteration = 1
    save(first)
    step(first, 2)
    loaded = directory.find(str(tmp_path))
    second = trainer(*words, fused=not fused, loaded=loaded)
    step(second, 2)
    assert all(bool(g["fused"]) is not fused for g in groups(second))
    for (name, one), other in zip(weights(first).items(), weights(second).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=name)


def test_fuse_names_every_group():
    made = trainer(fused=False)
    fuse(made.optimizer)
    assert [(g["fused"], g["foreach"]) for g in groups(made)] == [(True, False)] * len(groups(made))


class NormOnTheDevice:
    """What `update` asks of an optimizer. With Transformer Engine megatron-core 0.19 returns the norm
    as a tensor [1] (optimizer/clip_grads.py, where multi_tensor_scale_tensor is)."""

    def prepare_grads(self):
        pass

    def get_grad_norm(self):
        return torch.tensor([2.5])

    def step_with_ready_grads(self):
        return True


def test_the_norm_is_a_number_wherever_megatron_core_leaves_it():
    norm, updated = update(NormOnTheDevice(), 0.0, True)
    assert type(norm) is float and (norm, updated) == (2.5, True)
    assert f"{norm:.3f}" == "2.500"  # as the log prints it


def test_groups_of_another_adam_are_completed_and_keep_what_they_have():
    """As torch's AdamW saves them, for Transformer Engine's FusedAdam."""
    saved = {"optimizer": {"param_groups": [{"lr": 0.5, "fused": True, "step": 2.0}]}}
    _adopt({"lr": 0.1, "bias_correction": True}, [saved])
    (group,) = saved["optimizer"]["param_groups"]
    assert group == {"lr": 0.5, "fused": True, "step": 2, "bias_correction": True}
    assert type(group["step"]) is int  # its kernel takes no float
