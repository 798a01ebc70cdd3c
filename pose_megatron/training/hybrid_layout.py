"""Loads a checkpoint in HybridModel's layout into a model whose state has GPTModel's."""

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from pose_megatron.checkpoints.megatron.hybrid_layout import hybrid_key


def retarget_to_hybrid_layout(sharded: dict) -> None:
    """Changes, in place, where the entries of a model's sharded state are looked up."""
    dict_list_map_inplace(_retarget, sharded)


def _retarget(entry):
    if isinstance(entry, ShardedTensorFactory):
        build = entry.build_fn

        def build_retargeted(*args):
            parts = build(*args)
            dict_list_map_inplace(_retarget, parts)
            return parts

        entry.build_fn = build_retargeted
    elif isinstance(entry, ShardedTensor):
        of_layers = "decoder.layers." in entry.key
        entry.key = hybrid_key(entry.key, entry.global_offset[0])
        if of_layers:  # the layer moves from the first axis into the key
            entry.global_shape = entry.global_shape[1:]
            entry.global_offset = entry.global_offset[1:]
            entry.axis_fragmentations = entry.axis_fragmentations[1:]
            entry.prepend_axis_num -= 1
    return entry
