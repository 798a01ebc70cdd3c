"""Adam and its schedule, resumed exactly.

megatron-core builds the optimizer: FusedAdam from Transformer Engine or NVIDIA's apex where one is
installed, torch's AdamW elsewhere.
"""

import functools
import math
from collections.abc import Iterator

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    distrib_optimizer,
    get_megatron_optimizer,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from pose_megatron.config.flags import ParallelFlags, TrainingFlags
from pose_megatron.config.layout import Layout
from pose_megatron.runtime.device import device
from pose_megatron.training.gradient_norm import mend_gradient_norm


def build_optimizer(
    t: TrainingFlags, p: ParallelFlags, chunks: list[DistributedDataParallel]
) -> MegatronOptimizer:
    """Adam over float32 main parameters; weight decay spares the norms."""
    mend_torch_adam()
    mend_gradient_norm()
    config = OptimizerConfig(
        optimizer="adam",
        lr=t.lr,
        min_lr=t.min_lr,
        weight_decay=t.weight_decay,
        clip_grad=t.clip_grad,
        adam_beta1=t.adam_beta1,
        adam_beta2=t.adam_beta2,
        adam_eps=t.adam_eps,
        bf16=t.bf16,
        params_dtype=torch.bfloat16 if t.bf16 else torch.float32,
        use_distributed_optimizer=p.use_distributed_optimizer,
        overlap_param_gather=p.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(config, chunks)
    if not distrib_optimizer.HAVE_APEX_OR_TE and device().type != "cpu":
        fuse(optimizer)
    return optimizer


def build_scheduler(
    t: TrainingFlags, layout: Layout, optimizer: MegatronOptimizer
) -> OptimizerParamScheduler:
    """The learning rate's schedule over consumed samples, which megatron-core calls steps."""
    length, warmup, decay, final = (
        (t.train_samples, t.lr_warmup_samples, t.lr_decay_samples, t.lr_wsd_decay_samples)
        if t.train_samples
        else (
            layout.global_batch_size * (count or 0)
            for count in (t.train_iters, t.lr_warmup_iters, t.lr_decay_iters, t.lr_wsd_decay_iters)
        )
    )
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=t.lr,
        min_lr=t.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay or length,
        lr_decay_style=t.lr_decay_style,
        wsd_decay_steps=final or None,
        lr_wsd_decay_style=t.lr_wsd_decay_style,
        start_wd=t.weight_decay,
        end_wd=t.weight_decay,
        wd_incr_steps=length,  # without effect; Megatron-LM compares it with its own
        wd_incr_style="constant",
        # A resumed run's flags win over the checkpoint's.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def fuse(optimizer: MegatronOptimizer) -> None:
    """Has torch's AdamW update each tensor in one pass, without the copies that its loop makes.

    Its `step` is then on the device, too.
    """
    for part in parts(optimizer):
        for group in part.optimizer.param_groups:
            group.update(fused=True, foreach=False)


def parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that megatron-core has chained, or the only one."""
    if isinstance(optimizer, ChainedOptimizer):
        return optimizer.chained_optimizers
    return [optimizer]


@torch.no_grad()
def update(optimizer: MegatronOptimizer, clip_grad: float, finite: bool) -> tuple[float, bool]:
    """Clips the gradient and takes one step of the optimizer, if loss and gradient are finite.

    Every rank decides alike, as the norm is the whole gradient's.

    Args:
        clip_grad: the norm to clip to; 0 for none.
        finite: whether the loss is.

    Returns:
        (gradient norm before clipping, whether the weights changed).
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())  # with Transformer Engine a tensor on the device
    if not (finite and math.isfinite(norm)):
        return norm, False
    for part in parts(optimizer):
        if clip_grad > 0 and (parameters := part.get_parameters()):
            clip_grad_by_total_norm_fp32(parameters, clip_grad, norm)
    return norm, optimizer.step_with_ready_grads()


def load(optimizer: MegatronOptimizer, state: dict) -> None:
    """Takes a checkpoint's state, but for what the flags say of the optimizer (resume.py).

    That is put into the state: megatron-core 0.19 finds parameter groups by their learning rates.
    """
    group = optimizer.param_groups[0]  # all have the same of these
    names = ("betas", "eps", "max_lr", "min_lr", "fused", "foreach")  # the last two: of the device
    _put({name: group[name] for name in names if name in group}, state)
    defaults = parts(optimizer)[0].optimizer.defaults
    _adopt({name: group.get(name, value) for name, value in defaults.items()}, state)
    optimizer.load_state_dict(state)


def _adopt(own: dict, state) -> None:
    """Completes parameter groups that another Adam has saved: torch's and Transformer Engine's keep
    different things in them, and torch's counts its steps in floats."""
    for part in _dicts(state):
        for group in part.get("param_groups", ()):
            group.update({name: value for name, value in own.items() if name not in group})
            if "step" in group:
                group["step"] = int(group["step"])


def _put(values: dict, state) -> None:
    """Sets what a tree of dicts and lists holds by these names."""
    for part in _dicts(state):
        part.update({name: value for name, value in values.items() if name in part})


def _dicts(state) -> Iterator[dict]:
    """Those of a tree of dicts and lists, each before what it holds."""
    if isinstance(state, dict):
        yield state
    if isinstance(state, dict | list):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _dicts(part)


def init_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Gives torch's AdamW its whole state before a checkpoint is loaded into it.

    megatron-core 0.16.1 makes exp_avg and exp_avg_sq but not `step`, and then fails on its absence.
    """
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    for part in parts(optimizer):
        inner = part.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": _steps(0, group, parameter),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def _steps(count: float, group: dict, parameter: torch.Tensor) -> torch.Tensor:
    """AdamW's `step` of a parameter, where it expects it."""
    where = parameter.device if group.get("fused") else "cpu"
    return torch.tensor(float(count), dtype=torch.float32, device=where)


@functools.cache
def mend_torch_adam() -> None:
    """Three defects of megatron-core 0.16.1 when torch's AdamW is in the distributed optimizer.

    Loading a parameter's state expects a 'step', which was never saved; it writes into leaf tensors
    that require gradients; and it gives all parameters one shared `step` tensor, which each of them
    then increments.
    """
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    set_state = DistributedOptimizer._set_main_param_and_optimizer_states
    load = DistributedOptimizer.load_state_dict

    @torch.no_grad()
    def set_state_keeping_step(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        tensors = {name: value for name, value in tensors.items() if name != "step"}
        if "step" in state:
            tensors["step"] = state["step"].clone()
        return set_state(self, model_param, tensors)

    def load_with_own_steps(self, state_dict):
        result = load(self, state_dict)
        step = float(state_dict["optimizer"]["param_groups"][0]["step"])
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state.get(parameter, {})
                if "step" in state:
                    state["step"] = _steps(step, group, parameter)
        return result

    DistributedOptimizer._set_main_param_and_optimizer_states = set_state_keeping_step
    DistributedOptimizer.load_state_dict = load_with_own_steps


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The learning rate of the next step."""
    return next(g["lr"] for g in optimizer.param_groups if g["default_config"])
