"""Files that go along with a checkpoint, such as a tokenizer's."""

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path

from pose_megatron.errors import ConfigError, gist
from pose_megatron.preprocessing.tokenizer import FOLDER_FILES
from pose_megatron.runtime.json_files import read_json
from pose_megatron.runtime.lfs_pointers import refuse_lfs_pointer

CHAT_TEMPLATES = "additional_chat_templates"  # transformers' folder of further templates
# config.json is among them for its ids of special tokens.
SIDECARS = (*FOLDER_FILES, "chat_template.json", "generation_config.json", "config.json")


def find_sidecars(source: Path) -> dict[str, Path]:
    """Files of the tokenizer and other SIDECARS, by their names in a Hugging Face folder.

    Args:
        source: a folder, or the tokenizer's file. A .model, and a file that is alone, may have any
            name.
    """
    files = sorted(path for path in [source, *source.glob("*")] if path.is_file())
    own = [file for file in files if file.name not in SIDECARS]
    found = {
        f"tokenizer{file.suffix}": file
        for file in own
        if file.suffix == ".model" or len(files) == 1
    }
    found |= {file.name: file for file in files if file not in own}
    templates = source / CHAT_TEMPLATES
    found |= {f"{CHAT_TEMPLATES}/{file.name}": file for file in sorted(templates.glob("*.jinja"))}
    configs = [found[name] for name in ("config.json", "tokenizer_config.json") if name in found]
    if any("auto_map" in read_json(config) for config in configs):
        found |= {file.name: file for file in files if file.suffix == ".py"}
    if source.is_dir():
        held(source, found.values())
    return found


def held(folder: Path, files: Iterable[Path]) -> list[Path]:
    """Files of a folder from anywhere, none of which is a link to what lies outside of it.

    In Hugging Face's cache, snapshots/REVISION holds links into blobs/ of the same repository.

    Raises:
        ConfigError: one is: copying it would carry away a file of this machine.
    """
    found, home = list(files), folder.resolve()
    inside = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    for file in found:
        if not {home, inside}.intersection(file.resolve().parents):
            raise ConfigError(
                f"{file} is a link to {file.resolve()}, outside of its folder, "
                "and is not followed: put the file itself there"
            )
    return found


def check_sidecars(files: Mapping[str, Path]) -> None:
    """Opens each file before it is copied: a broken one would be found by those who get the copy.

    Args:
        files: by their names in the folder.

    Raises:
        ConfigError: a file is not what its name says.
    """
    for name, path in files.items():
        refuse_lfs_pointer(path, ConfigError)
        try:
            _open(name, path)
        except Exception as error:  # tokenizers raises plain Exception
            raise ConfigError(
                f"{path} cannot be read ({gist(error)}): replace it, or take it away"
            ) from None


def _open(name: str, path: Path) -> None:
    if name == "tokenizer.json":
        from tokenizers import Tokenizer

        Tokenizer.from_file(str(path))
    elif name == "tokenizer.model":
        _open_model(path)
    elif path.suffix == ".json":
        read_json(path)
    else:
        path.read_text(encoding="utf-8")


def _open_model(path: Path) -> None:
    """SentencePiece's, or tiktoken's as of LLaMA 3: on each line a token in base64 and its rank."""
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(path)).get_piece_size()
    except RuntimeError:
        pieces = 0
    if pieces:
        return
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            base64.b64decode(token, validate=True)
            int(rank)
        except ValueError:
            raise ValueError(
                f"it is no SentencePiece model, and its line {number} none of tiktoken's"
            ) from None
    if not lines:
        raise ValueError("it is empty")
