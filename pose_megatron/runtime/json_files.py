"""JSON and YAML files that hold one object, and messages that name the file they are about.

Files come from anywhere: what they can make of memory and time is bounded before they are parsed.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pose_megatron.errors import ConfigError, DamagedCheckpoint, gist
from pose_megatron.runtime.lfs_pointers import refuse_lfs_pointer

LARGEST_JSON = 1 << 25  # bytes; the largest index of a model's weights has half of that
LARGEST_YAML = 1 << 19  # bytes; reading them takes half a minute
MOST_YAML_NODES = 1 << 17  # with every alias written out


def read_json(path: Path, error: type[ValueError] = ConfigError) -> dict:
    """The JSON object in a file.

    Args:
        error: what is raised; DamagedCheckpoint where the file is a part of a checkpoint.

    Raises:
        ConfigError: the file is missing, too large, is not JSON, or holds something other than an
            object.
    """
    if not path.is_file():
        raise error(f"{path} is missing")
    refuse_lfs_pointer(path, error)
    content = parse_json(path, _bytes_of(path, LARGEST_JSON, error), error)
    if not isinstance(content, dict):
        raise error(f"{path} is not a JSON object")
    return content


def parse_json(path: Path, text: bytes | str, error: type[ValueError] = ConfigError) -> Any:
    """The JSON value in what was read from a file; errors as in `read_json`."""
    try:
        return json.loads(text)
    except RecursionError:
        raise error(f"{path} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as reason:
        raise error(f"{path} is not JSON: {reason}") from None


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file, {} for an empty one, as YAML 1.1 means it.

    Raises:
        ConfigError: as compose_yaml.
    """
    import yaml

    root = compose_yaml(path)
    if root is None:
        return {}
    with _read_as_yaml(path):
        return yaml.SafeLoader("").construct_document(root)


def compose_yaml(path: Path, as_text: bool = False):
    """The root of a YAML file's nodes, a yaml.MappingNode; None for an empty file.

    Args:
        as_text: every scalar is a string to the library, whatever it looks like.

    Raises:
        ConfigError: the file is missing, too large, is not YAML, or no mapping; or its aliases
            stand for more than anyone writes.
    """
    import yaml

    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    text = _bytes_of(path, LARGEST_YAML, ConfigError)
    with _read_as_yaml(path):
        root = yaml.compose(text, yaml.BaseLoader if as_text else yaml.SafeLoader)
        if root is not None and _nodes(root, {}) > MOST_YAML_NODES:
            raise ConfigError(f"more than {MOST_YAML_NODES:,} values, with its aliases written out")
    if not isinstance(root, yaml.MappingNode | None):
        raise ConfigError(f"{path} must be a mapping of names to values")
    return root


@contextlib.contextmanager
def _read_as_yaml(path: Path) -> Iterator[None]:
    """Turns whatever goes wrong into a ConfigError."""
    try:
        yield
    except RecursionError:
        raise ConfigError(f"{path} is not YAML that can be read: it is nested too deeply") from None
    except Exception as reason:  # wrong dates and numbers raise errors of many classes
        told = reason if isinstance(reason, ConfigError) else gist(reason)
        raise ConfigError(f"{path} is not YAML that can be read: {told}") from None


def _nodes(node, known: dict[int, int]) -> int:
    """How many values a YAML node has, with aliases written out; each node is visited once."""
    if id(node) not in known:
        known[id(node)] = MOST_YAML_NODES + 1  # for an alias of itself, inside itself
        children = node.value if isinstance(node.value, list) else []
        pairs = (child if isinstance(child, tuple) else (child,) for child in children)
        known[id(node)] = 1 + sum(_nodes(part, known) for pair in pairs for part in pair)
    return known[id(node)]


def _bytes_of(path: Path, most: int, error: type[ValueError]) -> bytes:
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise error(f"{path} has more than the {most:,} bytes that such a file may have")
    return content


def write_json(path: Path, content: dict) -> None:
    """Writes an object, indented by two spaces."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the path in front of messages about what is in it; a DamagedCheckpoint stays one, every
    other ValueError becomes a ConfigError."""
    try:
        yield
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{path}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
