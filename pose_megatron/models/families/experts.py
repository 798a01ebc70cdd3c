"""The names of a mixture of experts: a router, and several MLPs in the place of one."""

from collections.abc import Mapping

from pose_megatron.models.families.family import HFNames
from pose_megatron.models.tensors import EXPERT, LAYER, MOE_NORM, ROUTER


def with_experts(
    dense: Mapping[str, HFNames], router: str, expert: str, gate: str, up: str, down: str
) -> dict[str, HFNames]:
    """The name table of a family whose other tensors are those of a dense one.

    Args:
        dense: name table of the dense family.
        router: Hugging Face's name of the router's weight.
        expert: Hugging Face's name of an expert, with `{}` for the layer's and for its own number.
        gate, up, down: names of its matrices.
    """
    table = {name: names for name, names in dense.items() if ".mlp." not in name}
    return table | {
        MOE_NORM: dense[f"{LAYER}.mlp.linear_fc1.layer_norm_weight"],
        ROUTER: router,
        f"{EXPERT}.linear_fc1.weight": (f"{expert}.{gate}.weight", f"{expert}.{up}.weight"),
        f"{EXPERT}.linear_fc2.weight": f"{expert}.{down}.weight",
    }


def stacked(table: Mapping[str, HFNames], mlp: str) -> dict[str, HFNames]:
    """`Family.stacked` for a name table of `with_experts`.

    Args:
        mlp: transformers' module that holds the router and the experts.
    """
    return {
        f"{mlp}.gate.weight": table[ROUTER],
        f"{mlp}.experts.gate_up_proj": table[f"{EXPERT}.linear_fc1.weight"],
        f"{mlp}.experts.down_proj": table[f"{EXPERT}.linear_fc2.weight"],
    }
