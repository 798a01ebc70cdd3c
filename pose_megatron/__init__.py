"""PoSE context extension on megatron-core. What another program needs is named here.

PoseSampler, SkipPlan       numpy: which tokens and positions a sample has
RopeScaling                 torch: how rotary frequencies are interpolated
PoseGPTModel, install_pose  megatron-core: a GPTModel that honours position ids
PoseDataset, build_datasets samples over indexed corpora
convert                     torch: a checkpoint from one format to another
"""

import importlib

__version__ = "0.2.0"

_HOMES = {
    "PoseSampler": "positions.sampler",
    "SkipPlan": "positions.laws",
    "RopeScaling": "rope.scaling",
    "PoseGPTModel": "models.gpt",
    "install_pose": "models.gpt",
    "PoseDataset": "data.dataset",
    "build_datasets": "data.dataset",
    "convert": "checkpoints.convert",
    "ConfigError": "errors",
    "DamagedCheckpoint": "errors",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    """Imports on first use: the samplers need numpy only, and importing megatron-core takes
    seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
