"""A rope scaling in others' words: the keys of Hugging Face's config.json, and our JSON options.

    to_hf      RopeScaling -> every spelling that transformers 4 and 5 and vLLM look for
    from_hf    config.json -> RopeScaling, from any of these spellings
    notes      what a reader of the export must be told
    options    --rope-scaling-config -> fields of RopeScaling

Nothing is ever read as plain rope because it was not understood: that is an error.
"""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

from pose_megatron.errors import ConfigError
from pose_megatron.rope.scaling import RopeScaling, attention_factor, inverse_frequencies, ntk_base


def to_hf(
    scaling: RopeScaling,
    *,
    base: float,
    rotary_dim: int,
    max_position_embeddings: int,
    as_longrope: bool = False,
) -> dict:
    """The rope keys of a Hugging Face `config.json` that make transformers compute our frequencies.

    Every reader finds its spelling: `rope_theta` and `rope_scaling` (with `type` and, where a
    reader of that method knows it, `rope_type`) for transformers 4 and vLLM, `rope_parameters` for
    transformers 5. No Hugging Face type is called ntk: its base is written instead. What no type
    computes (yarn_revised, a scaling over another) becomes `longrope` with equal lists, which is
    exact: any fixed frequencies are theta divided by some list. `as_longrope` writes yarn so too,
    for the readers that `notes` names.
    """
    factor, original = float(scaling.factor), scaling.original_max_position_embeddings
    method = "over" if scaling.over is not None else scaling.method
    if method == "yarn" and as_longrope:
        method = "yarn as longrope"
    hf_type, keys = method, {"factor": factor}
    if method in ("none", "ntk"):
        hf_type, keys = "default", {}
        base = ntk_base(rotary_dim, base, factor) if method == "ntk" else base
    elif method == "dynamic":
        max_position_embeddings = original  # which transformers takes for the window before
    elif method == "llama3":
        keys |= {
            "low_freq_factor": float(scaling.low_freq_factor),
            "high_freq_factor": float(scaling.high_freq_factor),
            "original_max_position_embeddings": original,
        }
    elif method == "yarn":
        keys |= {"original_max_position_embeddings": original, **_ramp_keys(scaling)}
        if scaling.attention_factor is not None:
            keys["attention_factor"] = float(scaling.attention_factor)
    elif method != "linear":
        hf_type = "longrope"
        long = short = _stretch(scaling, base, rotary_dim)
        if method == "longrope":
            short, long = list(scaling.short_factor), list(scaling.long_factor)
        temperature = attention_factor(scaling)
        # transformers 4 looks for the window before at the top level, and wants one.
        original = original or max(1, round(max_position_embeddings / factor))
        keys |= {
            "original_max_position_embeddings": original,
            "short_factor": short,
            "long_factor": long,
            "attention_factor": temperature,
            "short_mscale": temperature,  # vLLM reads these two and not attention_factor
            "long_mscale": temperature,
        }
        if method == "yarn_revised":
            keys |= _ramp_keys(scaling)  # nobody else reads them here; from_hf does
    base = float(base)
    config = {"max_position_embeddings": max_position_embeddings, "rope_theta": base}
    if hf_type == "default":
        config["rope_scaling"] = None
    elif hf_type in ("linear", "dynamic"):  # before 4.43 exactly these two keys are allowed
        config["rope_scaling"] = {"type": hf_type, **keys}
    else:
        config["rope_scaling"] = {"rope_type": hf_type, "type": hf_type, **keys}
    config["rope_parameters"] = {"rope_type": hf_type, **keys, "rope_theta": base}
    if hf_type == "longrope":
        config["original_max_position_embeddings"] = original
    return config


def notes(
    scaling: RopeScaling, max_position_embeddings: int, as_longrope: bool = False
) -> list[str]:
    """What a reader of the export must be told, a sentence each.

    Of vLLM: 0.13, 0.19 and 0.33, whose rotary classes were given such exports.
    """
    said, method = [], scaling.method if scaling.over is None else "over"
    longrope = method in ("longrope", "yarn_revised", "over")
    longrope |= as_longrope and method == "yarn"
    if method == "linear":
        said.append(
            "vLLM multiplies the window by the factor of linear interpolation; start it with "
            f"--max-model-len {max_position_embeddings}"
        )
    if longrope:
        said.append(
            "vLLM starts a longrope with the window before it was extended; start it with "
            f"--max-model-len {max_position_embeddings}"
        )
    elif method == "yarn":
        said.append(
            "transformers 4.43 to 4.50 read yarn as if the extended window were the original one, "
            "4.51 to 4.54 leave out truncate and take T / L for the factor; for these export with "
            "--rope-as-longrope"
        )
        if scaling.attention_factor is not None:
            said.append(
                "vLLM 0.19 and before leave out the attention_factor of yarn; for these, too, "
                "export with --rope-as-longrope"
            )
    if method == "dynamic":
        said.append(
            "vLLM 0.19 and before fix the frequencies of dynamic at its largest window, 0.33 does "
            "not interpolate it at all"
        )
    if scaling.method == "longrope" and scaling.depends_on_length:
        said.append(
            "two lists: transformers takes the short one for sequences up to "
            f"{scaling.original_max_position_embeddings} tokens (transformers 4 from 4.51 on), "
            "vLLM one list for all sequences"
        )
    return said


# By Hugging Face type, beside rope_type, type, rope_theta and the original window: the keys that it
# must have, and those that it may.
_NEEDED = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor"},
    "longrope": {"short_factor", "long_factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
}
_OPTIONAL = {
    "yarn": {"attention_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"},
    "longrope": {
        "factor",
        "attention_factor",
        "short_mscale",
        "long_mscale",
        "beta_fast",
        "beta_slow",
        "truncate",
    },  # the last three in our own yarn_revised
}


def from_hf(config: dict) -> tuple[float, RopeScaling]:
    """(base, scaling) of a Hugging Face `config.json`, in any spelling of its rope types.

    Raises:
        ConfigError: a type or key is unknown, missing, no number, or spelt twice with two values;
            names it. The share of a head that rotates is `rotary_percent`'s to read.
    """
    keys = _spellings(config)
    hf_type = keys.pop("rope_type", "default")
    base = _number(keys.pop("rope_theta", 10000.0), "rope_theta")  # LLaMA's first configs lack it
    if hf_type not in _NEEDED:
        raise ConfigError(
            f"config.json: rope_type {hf_type!r} is not supported; supported are "
            f"{', '.join(_NEEDED)}"
        )
    original = keys.pop("original_max_position_embeddings", None)
    if unknown := keys.keys() - _NEEDED[hf_type] - _OPTIONAL.get(hf_type, set()):
        raise ConfigError(
            f"config.json: rope_type {hf_type!r} does not know {', '.join(sorted(unknown))}"
        )
    if missing := _NEEDED[hf_type] - keys.keys():
        raise ConfigError(
            f"config.json: rope_type {hf_type!r} needs {min(missing)}, which is missing"
        )
    for name, value in keys.items():
        if name in ("short_factor", "long_factor"):
            if not isinstance(value, list):
                raise ConfigError(f"config.json: {name} must be a list of numbers, not {value!r}")
        elif name != "truncate":
            keys[name] = _number(value, name)
        elif not isinstance(value, bool):
            raise ConfigError(f"config.json: truncate must be true or false, not {value!r}")
    window = config.get("max_position_embeddings")
    if hf_type == "default":
        return base, RopeScaling()
    if hf_type == "dynamic":
        if original not in (None, window):
            raise ConfigError(
                f"config.json contradicts itself: original_max_position_embeddings {original}; "
                f"dynamic takes max_position_embeddings, which is {window}, for it"
            )
        original = window
    if hf_type == "yarn":
        _resolve_mscale(keys)
    if hf_type == "longrope":
        return base, _longrope(keys, original, window, base)
    return base, _without_default(
        RopeScaling(hf_type, original_max_position_embeddings=original, **keys)
    )


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
        content = text if text.lstrip().startswith("{") else Path(text).read_text()
        keys = json.loads(content)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--rope-scaling-config {text} is neither a JSON object nor a file with one: {error}"
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


def _spellings(config: dict, partial: bool = False) -> dict:
    """All that rope_scaling, rope_parameters and the top level say, under one name each."""
    keys = {}
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


def _number(value, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"config.json: {name} must be a number, not {value!r}")
    return float(value)


def _resolve_mscale(keys: dict) -> None:
    """DeepSeek's spelling of the temperature: a ratio of two, when both are given."""
    top, bottom = keys.pop("mscale", None), keys.pop("mscale_all_dim", None)
    if not (top and bottom):
        return
    step = 0.1 * math.log(max(keys["factor"], 1.0))
    _agree(
        keys, "attention_factor", (step * top + 1) / (step * bottom + 1), "mscale / mscale_all_dim"
    )


def _longrope(keys: dict, original: int | None, window: int | None, base: float) -> RopeScaling:
    if "factor" not in keys:  # as transformers derives it
        if original is None or window is None:
            raise ConfigError("config.json: rope_type 'longrope' needs factor, which is missing")
        keys["factor"] = max(window / original, 1.0)
    mscales = {name: keys.pop(name) for name in ("short_mscale", "long_mscale") if name in keys}
    ramp = {name: keys.pop(name) for name in ("beta_fast", "beta_slow", "truncate") if name in keys}
    own = _without_default(
        RopeScaling("longrope", original_max_position_embeddings=original, **keys)
    )
    for name, value in mscales.items():
        if value != attention_factor(own):
            raise ConfigError(
                f"config.json contradicts itself: longrope {name} is {value} and attention_factor "
                f"{attention_factor(own)}"
            )
    if not ramp:
        return own
    revised = RopeScaling(
        "yarn_revised",
        keys["factor"],
        original,
        **ramp,
        attention_factor=keys.get("attention_factor"),
    )
    for name in ("short_factor", "long_factor"):
        ours = _stretch(revised, base, 2 * len(keys[name]))
        if not all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(ours, keys[name], strict=True)):
            raise ConfigError(
                f"config.json contradicts itself: the {name} of this longrope is not the ramp of "
                "yarn_revised that its beta_fast and beta_slow describe"
            )
    return _without_default(revised)


def _without_default(scaling: RopeScaling) -> RopeScaling:
    """The same, with an attention factor only where it is not the method's own."""
    plain = replace(scaling, attention_factor=None)
    return plain if attention_factor(plain) == attention_factor(scaling) else scaling


def _stretch(scaling: RopeScaling, base: float, rotary_dim: int) -> list[float]:
    """By what theta is divided, pair by pair."""
    plain = inverse_frequencies(rotary_dim, base, RopeScaling())
    return (plain / inverse_frequencies(rotary_dim, base, scaling)).tolist()


def _ramp_keys(scaling: RopeScaling) -> dict:
    return {name: getattr(scaling, name) for name in ("beta_fast", "beta_slow", "truncate")}
