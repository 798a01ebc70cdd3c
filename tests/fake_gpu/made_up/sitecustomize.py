"""Numbers for programs on the fake GPU, whose kernels write none: Python imports this at its start.

A loss of 0 tokens, or a gradient without a norm, would end a run. So where Python reads a floating
point number from the device, it gets NUMBER. Whole numbers and flags it reads as they are: what was
copied to the device, or zeros.
"""

import importlib.machinery
import importlib.util
import sys

NUMBER = 10.0
_METHODS = ("item", "tolist", "__float__")


class _AfterTorch:
    """Changes torch right after its import, whenever that comes."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_change(module):
                execute(module)
                for method in _METHODS:
                    _change(module.Tensor, method)

            spec.loader.exec_module = execute_and_change
        return spec


def _change(tensor_class, name: str) -> None:
    real = getattr(tensor_class, name)

    def read(tensor, *args, **kwargs):
        if tensor.is_cuda and tensor.is_floating_point():
            tensor = tensor.detach().cpu()  # waits for the device, as the real method does
            tensor.fill_(NUMBER)
        return real(tensor, *args, **kwargs)

    setattr(tensor_class, name, read)


sys.meta_path.insert(0, _AfterTorch())
