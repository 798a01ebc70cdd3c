"""The installed megatron-core: which release it is, and whether it will do."""

import functools
import importlib.util
import runpy
from pathlib import Path

from packaging.version import Version

from pose_megatron.errors import ConfigError

OLDEST = Version("0.16.1")
_CURRENT = "'megatron-core>=0.19.2,<0.20' on Python 3.12 and 3.13"
INSTALL = f"pip install 'megatron-core==0.16.1' on Python 3.11, {_CURRENT}"


@functools.cache
def megatron_core_version() -> Version:
    """The release, of a wheel or of a clone of Megatron-LM; megatron.core is not imported.

    Raises:
        ConfigError: megatron-core is missing, or too old; says what to install.
    """
    package = importlib.util.find_spec("megatron")
    for folder in (package and package.submodule_search_locations) or ():
        file = Path(folder, "core/package_info.py")
        if file.is_file():
            version = Version(runpy.run_path(str(file))["__version__"])
            if version < OLDEST:
                raise ConfigError(
                    f"megatron-core {version} in {file.parent} is older than {OLDEST}: {INSTALL}"
                )
            return version
    raise ConfigError(f"megatron-core is not installed: {INSTALL}")


def common_state_is_an_object() -> bool:
    """Whether megatron-core keeps the common state of a checkpoint among the tensors; it is a file
    of its own before 0.19."""
    return megatron_core_version() >= Version("0.19.0.dev0")


def require_hybrid() -> None:
    """That megatron-core's HybridModel reads and writes GPTModel's checkpoints, as from 0.19 on.

    Raises:
        ConfigError: it is older; says what to install.
    """
    if megatron_core_version() < Version("0.19.0.dev0"):
        raise ConfigError(
            f"--model-class hybrid needs megatron-core 0.19, not {megatron_core_version()}: "
            f"pip install {_CURRENT}, or use --model-class gpt"
        )
