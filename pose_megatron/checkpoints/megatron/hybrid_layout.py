"""HybridModel's layout of a checkpoint, which Megatron's pretrain_hybrid saves, as GPTModel's.

    decoder.layers.0.self_attention...   of layer 0     GPTModel: decoder.layers.self_attention...
    decoder.layers.1.mlp...              of layer 0               with the layer as the first axis
    decoder.layers.2.self_attention...   of layer 1
    decoder.final_norm.weight                           decoder.final_layernorm.weight

Only a pattern of attention and MLP in turn, `*-*-...`, is a GPTModel's.
"""

import re
from collections.abc import Iterable
from typing import Any

from pose_megatron.errors import ConfigError

_HYBRID_NORM, _NORM = "decoder.final_norm.", "decoder.final_layernorm."
_LAYERS = "decoder.layers."
_NUMBERED = re.compile(r"decoder\.layers\.(\d+)\.")
_PATTERNS = ("hybrid_layer_pattern", "hybrid_override_pattern")  # the latter up to 0.17
_KINDS = {"M": "Mamba", "G": "GDN", "D": "DSA", "+": "MLA", "E": "mixture-of-experts"}


def is_hybrid(keys: Iterable[str]) -> bool:
    """Whether these are the stored keys of a HybridModel."""
    return any(key.startswith(_HYBRID_NORM) for key in keys)


def gpt_args(args: dict[str, Any]) -> dict[str, Any]:
    """Megatron-LM's arguments of a HybridModel as those of the GPTModel with the same weights;
    others are left as they are.

    Raises:
        ConfigError: the pattern is not one of attention and MLP in turn; names the first layer that
            a GPTModel does not have there.
    """
    name = next((n for n in _PATTERNS if args.get(n)), None)
    if name is None:
        return args
    layers = args[name].replace("|", "")
    for number, (kind, wanted) in enumerate(zip(layers, "*-" * len(layers), strict=False)):
        if kind == "/":
            raise ConfigError(f"{name} {args[name]!r} has multi-token prediction after the '/'")
        if kind != wanted:
            raise ConfigError(
                f"{name} {args[name]!r} has {_KINDS.get(kind, 'another kind of')} layer {kind!r} "
                f"at {number}, where a GPTModel has {wanted!r}: only '*-*-...' is supported"
            )
    if len(layers) % 2:
        raise ConfigError(f"{name} {args[name]!r} ends without an MLP: only '*-*-...' is supported")
    plain = dict.fromkeys(_PATTERNS) | {"is_hybrid_model": False}
    return args | plain | {"num_layers": len(layers) // 2}


def gpt_name(key: str) -> str:
    """The name of a HybridModel's tensor in an undivided GPTModel."""
    name = _NUMBERED.sub(lambda match: f"{_LAYERS}{int(match[1]) // 2}.", key)
    return name.replace(_HYBRID_NORM, _NORM)


def hybrid_key(key: str, layer: int) -> str:
    """The key of a HybridModel for a GPTModel's.

    Args:
        layer: the tensor's first index, where it is one of the layers.
    """
    *_, part = key.partition(_LAYERS)
    number = 2 * layer + part.startswith(("mlp.", "pre_mlp_layernorm."))
    return key.replace(_LAYERS, f"{_LAYERS}{number}.").replace(_NORM, _HYBRID_NORM)
