"""Code in pickles, in a folder's modules, templates and YAML, and links out of a folder."""

import contextlib
import functools
import os
import pickle
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from hostile import ITERATION, Case, edit, edited_metadata, without_args
from programs import RUN_READERS, TOKENIZE, TRAIN, readers


def code(marker: Path) -> Iterator[Case]:
    """All cases; `marker` is a folder that code makes if it is executed."""
    yield from _pickles(marker)
    yield from _code_of_folders(marker)


def payloads(marker: Path) -> dict[str, object]:
    """Objects whose unpickling, without care, makes the marker."""
    path = str(marker)
    inner = pickle.dumps(_Calls(os.mkdir, path))
    return {
        "os.mkdir": _Calls(os.mkdir, path),
        "eval": _Calls(eval, f"__import__('os').mkdir({path!r})"),
        "subprocess.run": _Calls(subprocess.run, ["mkdir", path]),
        "a pickle inside torch's storage": _Calls(torch.storage._load_from_bytes, inner),
        "functools.reduce": _Calls(functools.reduce, os.makedirs, [path, 0o777]),
    }


class _Calls:
    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _pickles(marker: Path) -> Iterator[Case]:
    for name, payload in payloads(marker).items():
        kind = "code in pickles"
        with contextlib.suppress(RuntimeError):  # of torch, which finds no tensor in it
            pickle.loads(pickle.dumps(payload))
        marker.rmdir()  # fails where the payload does nothing: then nothing would be shown

        def in_metadata(folder: Path, payload=payload) -> None:
            with edited_metadata(folder) as metadata:
                metadata.planner_data = payload

        yield Case(kind, f"{name} in .metadata", in_metadata, RUN_READERS)

        def in_common(folder: Path, payload=payload) -> None:
            file = folder / ITERATION / "common.pt"
            torch.save(torch.load(file, weights_only=False) | {"more": payload}, file)

        yield Case(kind, f"{name} in common.pt", in_common, RUN_READERS)

        def in_object(folder: Path, payload=payload) -> None:
            """Among the tensors, in every object that is none."""
            names = re.compile("rng_state|common_state|.*_extra_")
            with edited_metadata(folder) as metadata:
                for where, info in metadata.storage_data.items():
                    if names.match(where.fqn):
                        with open(folder / ITERATION / info.relative_path, "ab") as out:
                            info.offset = out.tell()
                            torch.save([payload], out)
                            info.length = out.tell() - info.offset

        yield Case(kind, f"{name} among the tensors", in_object, RUN_READERS, harmless=True)
        for place, programs in {
            "legacy/iter_0000002/mp_rank_00/model_optim_rng.pt": readers("legacy", "megatron"),
            "meta/consolidated.00.pth": readers("meta", "meta"),
            "bin/pytorch_model.bin": readers("bin", "hf"),
        }.items():

            def among(folder: Path, payload=payload, place=place) -> None:
                content = torch.load(folder / place, weights_only=False)
                torch.save(content | {"more": payload}, folder / place)

            def bare(folder: Path, payload=payload, place=place) -> None:
                (folder / place).write_bytes(pickle.dumps(payload))

            yield Case(kind, f"{name} in {place}", among, programs)
            yield Case(kind, f"{name} as {place}", bare, programs)


def _code_of_folders(marker: Path) -> Iterator[Case]:
    kind = "code beside weights"
    code = f"import os\nos.mkdir({str(marker)!r})\nclass Thing:\n    pass\n"
    tokenize = TOKENIZE.replace("{in}/tokenizer", "{in}/hf")

    def auto_map(folder: Path) -> None:
        for file in ("config.json", "tokenizer_config.json"):
            names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
            edit(folder / "hf" / file, auto_map=dict.fromkeys(names, "thing.Thing"))
        edit(folder / "hf" / "tokenizer_config.json", tokenizer_class="Thing")
        (folder / "hf" / "thing.py").write_text(code, encoding="utf-8")

    yield Case(kind, "auto_map", auto_map, (*readers("hf", "hf"), tokenize), harmless=True)

    def unknown_model(folder: Path) -> None:
        auto_map(folder)
        edit(folder / "hf" / "config.json", model_type="thing", architectures=["Thing"])

    yield Case(kind, "auto_map of an unknown model", unknown_model, readers("hf", "hf"))

    def template(folder: Path) -> None:
        line = "{{ cycler.__init__.__globals__.os.mkdir('" + str(marker) + "') }}"
        edit(folder / "hf" / "tokenizer_config.json", chat_template=line)

    yield Case(kind, "a chat template", template, (*readers("hf", "hf"), tokenize), harmless=True)

    def run_config(folder: Path) -> None:
        without_args(folder)
        line = f"model: !!python/object/apply:os.mkdir [{str(marker)!r}]\n"
        (folder / ITERATION / "run_config.yaml").write_text(line, encoding="utf-8")

    yield Case(kind, "run_config.yaml", run_config, RUN_READERS)

    def run_yaml(folder: Path) -> None:
        line = f"lr: !!python/object/apply:os.mkdir [{str(marker)!r}]\n"
        (folder / "run.yaml").write_text(line, encoding="utf-8")

    yield Case(kind, "run.yaml", run_yaml, (f"{TRAIN} --config {{in}}/run.yaml",))

    def link(folder: Path) -> None:
        """A secret of this machine that an export would carry away."""
        secret = folder / "secret.json"
        secret.write_text("{}", encoding="utf-8")
        for place in ("run/tokenizer", "hf"):
            file = folder / place / "tokenizer_config.json"
            file.unlink()
            file.symlink_to(secret)

    yield Case(kind, "a link out of the folder", link, (RUN_READERS[0], readers("hf", "hf")[0]))
