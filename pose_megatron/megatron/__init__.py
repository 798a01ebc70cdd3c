"""PoSE as a plugin of megatron.training's pretrain(); docs/megatron.md shows a whole script.

    prepare()                              before megatron.training is imported
    add_pose_args                          the flags that Megatron does not have
    with_pose(config, args)                the model's configuration, with PoSE in it
    train_valid_test_datasets_provider     skip-wise samples
    forward_step                           position ids on every pipeline stage
    run()                                  all of it in one call

Importing this imports neither megatron-core nor torch's CUDA; the names are imported when used.
"""

from importlib import import_module

_HOMES = {
    "prepare": "startup",
    "add_pose_args": "flags",
    "with_pose": "model",
    "train_valid_test_datasets_provider": "batch",
    "get_batch": "batch",
    "micro_batch": "batch",
    "forward_step": "step",
    "loss_func": "step",
    "run": "pretrain",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
