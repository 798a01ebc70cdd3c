"""A rope scaling in others' words: the keys of Hugging Face's config.json, and our JSON options.

    to_hf           RopeScaling -> every spelling that transformers 4 and 5 and vLLM look for
    from_hf         config.json -> RopeScaling, from any of these spellings
    rotary_percent  config.json -> the share of a head that rotates
    notes           RopeScaling -> what users of the export must be told
    options         --rope-scaling-config -> fields of RopeScaling

Which keys a method has, its class in `methods` says; here is what all of them share. Nothing is
ever read as plain rope because it was not understood: that is an error.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from pose_megatron.errors import ConfigError
from pose_megatron.rope.interpolation import Interpolation, Pairs, longrope_keys, longrope_notes
from pose_megatron.rope.methods import METHODS
from pose_megatron.rope.scaling import RopeScaling, attention_factor, inverse_frequencies


def to_hf(
    scaling: RopeScaling,
    *,
    base: float,
    rotary_dim: int,
    max_position_embeddings: int,
    as_longrope: bool = False,
) -> dict[str, Any]:
    """The rope keys of a Hugging Face `config.json` that make transformers compute our frequencies.

    Every reader finds its spelling: `rope_theta` and `rope_scaling` (with `type` and, where a
    reader of that method knows it, `rope_type`) for transformers 4 and vLLM, `rope_parameters` for
    transformers 5. A scaling over another is written as `longrope` with equal lists, which is
    exact: any fixed frequencies are theta divided by some list. `as_longrope` writes a method so
    too when some readers misread it (`notes` names them).
    """
    method, pairs = scaling.interpolation, Pairs.unscaled(rotary_dim, base)
    hf_type, original = method.hf_type, scaling.original_max_position_embeddings
    if _is_rewritten(scaling, as_longrope):
        stretch = pairs.frequencies / inverse_frequencies(rotary_dim, base, scaling)
        original = original or max(1, round(max_position_embeddings / scaling.factor))
        hf_type = "longrope"
        keys = longrope_keys(scaling.factor, original, stretch.tolist(), attention_factor(scaling))
    else:
        keys = method.to_hf(pairs, max_position_embeddings)
    base = float(keys.pop("rope_theta", base))
    config: dict[str, Any] = {
        "max_position_embeddings": original if method.keeps_window else max_position_embeddings,
        "rope_theta": base,
    }
    if hf_type == "default":
        config["rope_scaling"] = None
    elif keys.keys() == {"factor"}:  # before 4.43 exactly these two keys are allowed
        config["rope_scaling"] = {"type": hf_type, **keys}
    else:
        config["rope_scaling"] = {"rope_type": hf_type, "type": hf_type, **keys}
    config["rope_parameters"] = {"rope_type": hf_type, **keys, "rope_theta": base}
    if hf_type == "longrope":  # transformers 4 looks for the window before at the top level
        config["original_max_position_embeddings"] = keys["original_max_position_embeddings"]
    return config


def notes(
    scaling: RopeScaling, max_position_embeddings: int, as_longrope: bool = False
) -> list[str]:
    """What users of the export must be told, a sentence each.

    What they say about vLLM was seen in 0.13, 0.19 and 0.33, whose rotary classes were given such
    exports; about llama.cpp, in the code of its converter.
    """
    if _is_rewritten(scaling, as_longrope):
        return longrope_notes(max_position_embeddings)
    return scaling.interpolation.notes(max_position_embeddings)


def _is_rewritten(scaling: RopeScaling, as_longrope: bool) -> bool:
    """Whether longrope's lists take the place of the method's own form."""
    return scaling.over is not None or (as_longrope and scaling.interpolation.longrope_is_safer)


def from_hf(config: dict) -> tuple[float, RopeScaling]:
    """(base, scaling) from a Hugging Face `config.json`, in any spelling of its rope types.

    Raises:
        ConfigError: a type or key is unknown, missing, no number, or spelt twice with two values;
            names it. The share of a head that rotates is `rotary_percent`'s to read.
    """
    keys = _spellings(config)
    hf_type = keys.pop("rope_type", "default")
    base = _number(keys.pop("rope_theta", 10000.0), "rope_theta")  # LLaMA's first configs lack it
    original = keys.pop("original_max_position_embeddings", None)
    method = _method(hf_type, keys)
    if method.hf_type == "yarn":  # true or false, and changes nothing
        keys.pop("finetuned", None)
    keys = {name: _checked(value, name) for name, value in keys.items()}
    keys["original_max_position_embeddings"] = original
    own = method.from_hf(keys, config.get("max_position_embeddings"), base)
    scaling = RopeScaling(method.name, **own)
    # An attention factor is an option only where it is not the method's own.
    plain = RopeScaling(method.name, **own | {"attention_factor": None})
    same = attention_factor(plain) == attention_factor(scaling)
    return base, plain if same else scaling


def _method(hf_type: str, keys: dict) -> type[Interpolation]:
    """The method of this type that leaves the fewest keys unknown; of several, the plainest.

    Raises:
        ConfigError: there is no such type, or it does not know a key, or needs another.
    """
    required = {m: m.hf_required for m in METHODS.values() if m.hf_required is not None}
    known = {m: required[m] | m.hf_optional for m in required if m.hf_type == hf_type}
    if not known:
        types = dict.fromkeys(method.hf_type for method in required)
        raise ConfigError(
            f"config.json: rope_type {hf_type!r} is not supported; supported are {', '.join(types)}"
        )
    method = min(known, key=lambda m: (len(keys.keys() - known[m]), len(known[m])))
    if unknown := keys.keys() - known[method]:
        raise ConfigError(
            f"config.json: rope_type {hf_type!r} does not know {', '.join(sorted(unknown))}"
        )
    if missing := required[method] - keys.keys():
        raise ConfigError(
            f"config.json: rope_type {hf_type!r} needs {min(missing)}, which is missing"
        )
    return method


def rotary_percent(config: dict) -> float:
    """The share of a head that rotates: `partial_rotary_factor` or `rotary_pct`, anywhere; or 1."""
    keys, names = _spellings(config, partial=True), ("partial_rotary_factor", "rotary_pct")
    found = {name: _number(keys[name], name) for name in names if name in keys}
    if len(set(found.values())) > 1:
        raise ConfigError(f"config.json contradicts itself: {found}")
    return next(iter(found.values()), 1.0)


def options(text: str) -> dict:
    """Fields of RopeScaling from a JSON object, or from a file that holds one.

    Keys are Hugging Face's, which are the fields' own names; `rope_type` or `type` is the method.
    """
    try:
        content = text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8")
        keys = json.loads(content, object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"--rope-scaling-config {text[:100]} is neither a JSON object nor a file with one: "
            f"{error}"
        ) from None
    if not isinstance(keys, dict):
        raise ConfigError(f"--rope-scaling-config {text} is not a JSON object")
    for name in ("type", "rope_type"):
        if name in keys:
            _agree(keys, "method", keys.pop(name), name, "--rope-scaling-config")
    known = {field.name for field in fields(RopeScaling)} - {"over"}
    if unknown := keys.keys() - known:
        raise ConfigError(
            f"--rope-scaling-config does not know {', '.join(sorted(unknown))}; it knows "
            f"{', '.join(sorted(known - {'method'} | {'rope_type'}))}"
        )
    return keys


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object that has no key twice."""
    names = [name for name, _ in pairs]
    if twice := sorted(name for name in set(names) if names.count(name) > 1):
        raise ValueError(f"it has {', '.join(twice)} twice")
    return dict(pairs)


def _spellings(config: dict, partial: bool = False) -> dict:
    """All that rope_scaling, rope_parameters and the top level say, under one name each."""
    keys: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        said = config.get(name) or {}
        if not isinstance(said, dict):
            raise ConfigError(f"config.json: {name} must be an object, not {said!r}")
        said = {key: value for key, value in said.items() if value is not None}
        if nested := [key for key, value in said.items() if isinstance(value, dict)]:
            raise ConfigError(f"config.json: {name} by layer type ({nested[0]}) is not supported")
        for key, value in said.items():  # `type` is the older name of rope_type
            _agree(keys, "rope_type" if key == "type" else key, value, name)
    shares = ("partial_rotary_factor", "rotary_pct")
    for key in ("rope_theta", "original_max_position_embeddings", *shares):
        if config.get(key) is not None:
            _agree(keys, key, config[key], "the top level")
    return keys if partial else {key: keys[key] for key in keys if key not in shares}


def _agree(keys: dict, key: str, value, where: str, file: str = "config.json") -> None:
    if keys.setdefault(key, value) != value:
        raise ConfigError(
            f"{file} contradicts itself: {where} says {key} {value!r}, another spelling "
            f"{keys[key]!r}"
        )


def _checked(value: Any, name: str) -> Any:
    """The value, if it has the type of the option by this name; other keys are numbers."""
    kind = {field.name: field.type for field in fields(RopeScaling)}.get(name)
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"config.json: {name} must be true or false, not {value!r}")
        return value
    if kind == tuple[float, ...] | None:
        if not isinstance(value, list):
            raise ConfigError(f"config.json: {name} must be a list of numbers, not {value!r}")
        return value
    return _number(value, name)


def _number(value, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"config.json: {name} must be a number, not {value!r}")
    return float(value)
