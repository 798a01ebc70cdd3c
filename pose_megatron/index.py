"""The index of a torch_dist checkpoint: .metadata, read without trusting or importing anything."""

import json
import pickle
from pathlib import Path

import torch

from pose_megatron.durable import gist


class _Plain(pickle.Unpickler):
    """Unpickles .metadata into plain values and objects that have attributes and do nothing.

    No class or function that the file names is ever called, and torch.distributed.checkpoint, whose
    classes they are, need not be imported.
    """

    def find_class(self, module: str, name: str):
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) == ("torch", "Size"):
            return tuple
        return type(name, (_Inert,), {})


class _Inert:
    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)
        elif isinstance(state, tuple) and state and isinstance(state[0], torch.dtype):
            self.dtype = state[0]  # of TensorProperties


def read_index(path: Path):
    """.metadata, and of each chunk its shape by (key, corner)."""
    try:
        name = "metadata.json"
        backend = json.loads((path / name).read_text())
        if backend.get("sharded_backend") != "torch_dist":
            raise ValueError(f"sharded_backend {backend.get('sharded_backend')!r} is not supported")
        name = ".metadata"
        with open(path / name, "rb") as file:
            index = _Plain(file).load()
        index.chunk_sizes = {
            (key, chunk.offsets): chunk.sizes
            for key, tensor in index.state_dict_metadata.items()
            for chunk in getattr(tensor, "chunks", ())
        }
        index.storage_data.items()
    except Exception as error:  # of many classes, for damaged bytes
        raise ValueError(
            f"checkpoint {path} cannot be loaded: {name} is damaged ({gist(error)})"
        ) from None
    return index
