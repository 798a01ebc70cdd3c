"""Merging shards, the token files of several machines or days: only what belongs together."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pose_megatron.errors import ConfigError
from pose_megatron.preprocessing.indexed_writer import Size, digests, join, summary_of
from pose_megatron.runtime.atomic_files import staged_files

# What a summary says of the ids' meaning: in words -> its fields.
IDENTITY = {
    "tokenizer": ("tokenizer", "class"),  # not its path, which differs between machines
    "the tokenizer's files (SHA-256)": ("tokenizer_sha256",),
    "--append-eod": ("append_eod",),
    "vocabulary": ("vocab_size",),
}


def merge(prefixes: Sequence[str], output: str, overwrite: bool) -> Size:
    """Writes OUTPUT.bin/.idx with the documents of all shards, in order, and OUTPUT_summary.json.

    Raises:
        ConfigError: a shard is damaged, of another tokenizer, or what is written; or the output
            exists; or another job writes it.
    """
    what, name = f"--output-prefix {output}", Path(output).name
    files = [f"{name}.bin", f"{name}.idx", f"{name}_summary.json"]
    summaries = {prefix: summary_of(prefix) for prefix in prefixes}
    _refuse_reading(prefixes, summaries, [Path(output).with_name(file) for file in files], what)
    identity = _identity(summaries)
    with staged_files(output, what, files, overwrite) as draft:
        size = join(prefixes, draft, name)
        counts = {"documents": size.documents, "tokens": size.tokens}
        content = counts | {"crc32": digests(name, size)} | identity
        (draft / files[-1]).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return size


Summaries = dict[str, tuple[Path, dict] | None]


def _refuse_reading(
    prefixes: Sequence[str], summaries: Summaries, written: Sequence[Path], what: str
) -> None:
    """No file that is read may be one that is written, by whatever path or link."""
    for prefix in prefixes:
        found = summaries[prefix]
        for read in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), *(found[:1] if found else ())):
            for path in written:
                if read.exists() and path.exists() and os.path.samefile(read, path):
                    raise ConfigError(
                        f"{what} is one of the shards, or would replace a file of one: {path} is "
                        f"{read} of --input {prefix}; choose another"
                    )


def _identity(summaries: Summaries) -> dict:
    """The fields on which all summaries agree, for the summary of the whole.

    Raises:
        ConfigError: two shards are of different tokenizers.
    """
    for words, path in IDENTITY.items():
        first: tuple[Path, object] | None = None
        for found in filter(None, summaries.values()):
            for value in _values(found[1], path):
                if first and first[1] != value:
                    raise ConfigError(
                        f"{found[0]}: {words} {_short(value)}, in {first[0]} {_short(first[1])}; "
                        "only shards of one tokenizer can be joined: preprocess one of them again, "
                        "or delete its summary if you know better"
                    )
                first = first or (found[0], value)
    known = [found[1] if found else {} for found in summaries.values()]
    fields = [path[0] for path in IDENTITY.values()]
    return {field: known[0][field] for field in fields if all(field in one for one in known)}


def _values(summary: dict, path: Sequence[str]) -> Iterator[object]:
    """The value at a path of keys, if it is there."""
    value: object = summary
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return
        value = value[key]
    yield value


def _short(value: object) -> str:
    """A value for a message; of digests the beginnings."""
    values = value if isinstance(value, list) else [value]
    return " ".join(str(one)[:16] if isinstance(value, list) else str(one) for one in values)[:200]
