"""Megatron-LM's args as every patch version of Python 3.11 pickles them."""

import argparse
import enum
import pickle
import signal
import types

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend

from pose_megatron.checkpoints.megatron import legacy
from pose_megatron.checkpoints.megatron.common_state import read_common_state


class ByName(pickle.Pickler):
    """Pickles an enum's member by its name, as Python 3.11.0 to 3.11.3 do (Enum.__reduce_ex__; a
    signal's as that of a module's constant)."""

    def reducer_override(self, it):
        if isinstance(it, signal.Signals):
            return it.name
        return (getattr, (type(it), it.name)) if isinstance(it, enum.Enum) else NotImplemented


class Reached:
    """A pickle that gets hold of what an allowed class carries."""

    def __init__(self, kind, name):
        self.of = kind, name

    def __reduce__(self):
        return getattr, self.of


def read_legacy(folder):
    return legacy._read(folder / "common.pt")


@pytest.fixture(params=[read_common_state, read_legacy])
def read(request, tmp_path):
    """What comes back of args, pickled in the given way."""

    def written_and_read(args, pickler=pickle.Pickler):
        module = types.SimpleNamespace(__name__="pickle", Pickler=pickler)
        args = {"args": argparse.Namespace(**args)}
        torch.save(args, tmp_path / "common.pt", pickle_module=module)
        return vars(request.param(tmp_path)["args"])

    return written_and_read


@pytest.mark.parametrize("pickler", [pickle.Pickler, ByName])
def test_members_of_enums_are_read(read, pickler):
    args = {"attention_backend": AttnBackend.flash, "exit_signal": signal.SIGTERM}
    assert read(args, pickler) == args


@pytest.mark.parametrize(
    ("kind", "name"),
    [(argparse.Namespace, "__init__"), (AttnBackend, "mro"), (AttnBackend, "__new__")],
)
def test_nothing_else_is_reached_through_them(read, kind, name):
    with pytest.raises(ValueError, match=r"common\.pt.* cannot be read"):
        read({"attention_backend": Reached(kind, name)})
