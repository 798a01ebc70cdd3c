"""What lies in a Hugging Face folder beside the weights and says that they are not the whole model,
or not the only one."""

from pathlib import Path

from pose_megatron.errors import ConfigError
from pose_megatron.models.families import family_named
from pose_megatron.runtime.json_files import read_json

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def check_companions(folder: Path, family: str | None) -> list[str]:
    """Warnings about a folder, a sentence each.

    Raises:
        ConfigError: which weights or which code are the model's cannot be told.
    """
    if found := sorted(folder.glob("adapter_config.json")) + sorted(folder.glob("adapter_model.*")):
        raise ConfigError(
            f"{folder} holds an adapter ({found[0].name}), which transformers would put upon the "
            "weights: merge it first (peft's merge_and_unload), or move its files away"
        )
    indexed = (folder / _INDEX).is_file()
    if indexed and (folder / _SINGLE).is_file():
        shards = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or _SINGLE not in shards.values():
            raise ConfigError(
                f"{folder} holds two sets of weights, {_SINGLE} and those of {_INDEX}: move one of "
                "them away"
            )
    warnings = []
    if indexed or (folder / _SINGLE).is_file():
        if old := sorted(folder.glob("pytorch_model*.bin")):
            warnings.append(
                f"{folder} holds safetensors and {old[0].name}: the safetensors are read, as "
                "transformers does, and the other is not"
            )
    code = read_json(folder / "config.json").get("auto_map") or {}
    if not isinstance(code, dict):
        raise ConfigError(f"{folder}: config.json: auto_map must be an object, not {code!r}")
    if unknown := [name for name in code if not str(name).startswith("Auto")]:
        raise ConfigError(f"{folder}: config.json: auto_map {unknown[0]!r} is not supported")
    models = [code[name] for name in code if name.startswith("AutoModel")]
    if models and family_named(family).in_transformers:
        warnings.append(
            f"{folder}: config.json's auto_map names code of its own for the model ({models[0]}), "
            f"which is not run: it is read as {family_named(family).title}"
        )
    return warnings
