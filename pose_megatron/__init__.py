"""PoSE context extension on megatron-core. What another program needs is named here.

    PoseSampler, SkipPlan       numpy: which tokens and positions a sample has
    RopeScaling                 torch: how rotary frequencies are interpolated
    PoseGPTModel, install_pose  megatron-core: a GPTModel that honours position ids
    PoseDataset, build_datasets samples over indexed corpora
"""

import importlib
import warnings

__version__ = "0.2.0"

_HOMES = {
    "PoseSampler": "positions", "SkipPlan": "samplers", "RopeScaling": "rope",
    "PoseGPTModel": "model", "install_pose": "model",
    "PoseDataset": "dataset", "build_datasets": "dataset",
}
__all__ = list(_HOMES)

# Said on every start by megatron-core and torch, about packages that are optional and names that
# only they can change.
for _message in (".*Apex (is|are) not installed", "full scope is deprecated",
                 r"`(torch\.distributed\.)?\w+` is deprecated", "Please use DTensor instead",
                 "The .grad attribute of a Tensor that is not a leaf"):
    warnings.filterwarnings("ignore", message=_message)


def __getattr__(name: str):
    """Imports on first use: the samplers need numpy only, and importing megatron-core takes
    seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
