"""run.yaml: what the file of --config says, value by value, as YAML 1.2 means it.

Most YAML libraries read version 1.1, in which `010` is eight, `1:30` is ninety, `no` is false and
`1e-4` is a word. Here a value keeps its text, which means to a flag what it means on the command
line; only `true`, `false` and `null` are words of the file's own.
"""

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pose_megatron.errors import ConfigError
from pose_megatron.runtime.json_files import compose_yaml
from pose_megatron.runtime.ranges import WRITTEN

# The core schema: https://yaml.org/spec/1.2.2/#103-core-schema
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_NUMBERS = (
    (WRITTEN[int], int),
    (re.compile(r"0o[0-7]+"), lambda text: int(text[2:], 8)),
    (re.compile(r"0x[0-9a-fA-F]+"), lambda text: int(text[2:], 16)),
    (WRITTEN[float], float),
    (
        re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
        lambda text: float(text.replace(".", "")),
    ),
)


class Scalar(NamedTuple):
    """One value: its text, and whether it stands without quotes."""

    text: str
    plain: bool

    @property
    def value(self) -> bool | int | float | str | None:
        """What it is by the core schema."""
        if not self.plain:
            return self.text
        if self.text in _WORDS:
            return _WORDS[self.text]
        for pattern, number in _NUMBERS:
            if pattern.fullmatch(self.text):
                return number(self.text)
        return self.text


@dataclass(frozen=True)
class Entry:
    """A name in the file and what it is given: one value, several, or a mapping, whose values are
    the core schema's."""

    path: Path
    line: int
    name: str
    content: Scalar | list[Scalar] | dict[str, Any]

    def error(self, why: str) -> ConfigError:
        return ConfigError(f"--config {self.path}, line {self.line}: {why}")

    def value_for(self, options: Mapping[str, Any], in_yaml: type | None) -> Any:
        """What the entry gives to a flag; None for null.

        Args:
            options: of the flag, as argparse's add_argument takes them.
            in_yaml: as in config.flags.flag.

        Raises:
            ConfigError: the flag does not take it.
        """
        content, nargs = self.content, options.get("nargs")
        if isinstance(content, Scalar) and content.value is None:
            return None
        if "action" in options:
            if isinstance(content, Scalar) and isinstance(content.value, bool):
                return content.value
            raise self.error(f"{self.name} is a switch, true or false, not {_shown(content)}")
        if isinstance(content, dict):
            if in_yaml is not dict:
                raise self.error(f"{self.name} takes no mapping")
            return json.dumps(content)
        words = [scalar.text for scalar in (content if isinstance(content, list) else [content])]
        if isinstance(content, list) and nargs is None:
            if in_yaml is not list:
                raise self.error(f"{self.name} takes one value, not a list")
            words = [",".join(words)]
        if len(words) != (nargs if isinstance(nargs, int) else max(len(words), 1)):
            wanted = nargs if isinstance(nargs, int) else "at least 1"
            raise self.error(f"{self.name} takes {wanted} values, not {len(words)}")
        try:
            values = [options["type"](word) for word in words]
        except argparse.ArgumentTypeError as reason:
            raise self.error(f"{self.name}: {reason}") from None
        if (choices := options.get("choices")) and (wrong := set(values) - set(choices)):
            raise self.error(f"{self.name}: {min(wrong)!r} is none of {', '.join(choices)}")
        return values if nargs else values[0]


def _shown(content: Scalar | list[Scalar] | dict) -> str:
    if isinstance(content, Scalar):
        return content.text if content.plain else repr(content.text)
    return "a list" if isinstance(content, list) else "a mapping"


OFF = tuple(Scalar(text, True) for text, value in _WORDS.items() if not value)


def read_run_file(path: Path) -> list[Entry]:
    """The entries of the file, in its order.

    Raises:
        ConfigError: the file is missing, no such YAML, or no mapping; it says a name twice, also
            inside of a mapping; or it holds what no flag takes: a tag, or a list in a list.
    """
    try:
        root = compose_yaml(path, as_text=True)
    except ConfigError as error:
        raise ConfigError(f"--config {error}") from None
    return [] if root is None else [_entry(path, *pair) for pair in _pairs(path, root)]


def _entry(path: Path, line: int, name: str, node) -> Entry:
    content = _content(path, node)
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Scalar) or part.value is None:
                raise _error(
                    path, node, f"{name}: a list holds values, not lists, mappings or null"
                )
    if isinstance(content, dict):
        content = _values(content)
    return Entry(path, line, name, content)


def _pairs(path: Path, node) -> list[tuple[int, str, Any]]:
    """(line, name, node) of what a mapping holds."""
    found: dict[str, tuple[int, str, Any]] = {}
    for key, value in node.value:
        if key.id != "scalar":
            raise _error(path, key, "a name must be a word")
        if key.value in found:
            first = found[key.value][0]
            raise _error(path, key, f"{key.value} is in line {first} already; keep one")
        found[key.value] = key.start_mark.line + 1, key.value, value
    return list(found.values())


def _content(path: Path, node) -> Any:
    """A Scalar, or a list or dict of such."""
    if node.tag.rpartition(":")[2] not in ("str", "seq", "map"):
        raise _error(path, node, f"tags such as {node.tag} are not read")
    if node.id == "scalar":
        return Scalar(node.value, node.style is None)
    if node.id == "sequence":
        return [_content(path, part) for part in node.value]
    return {name: _content(path, value) for _, name, value in _pairs(path, node)}


def _values(content: Any) -> Any:
    """What JSON has for a `_content`."""
    if isinstance(content, Scalar):
        return content.value
    if isinstance(content, list):
        return list(map(_values, content))
    return {name: _values(value) for name, value in content.items()}


def _error(path: Path, node, why: str) -> ConfigError:
    return ConfigError(f"--config {path}, line {node.start_mark.line + 1}: {why}")
