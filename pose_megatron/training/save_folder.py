"""--save: one run's alone, and proven before the first step to take its checkpoints."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from pose_megatron.checkpoints.megatron.directory import tokenizer_path, whole_iterations
from pose_megatron.errors import ConfigError
from pose_megatron.models.shape import ModelConfig
from pose_megatron.runtime.ownership import owned
from pose_megatron.runtime.ranks import print_rank_0, rank
from pose_megatron.training.run import Run


def check_save(run: Run) -> None:
    """That the folder holds nothing that this run would overwrite, or remove by --save-retain.

    Raises:
        ConfigError: it holds checkpoints that the run does not go on from.
    """
    flags = run.args.checkpoint
    if not flags.save:
        return
    goes_on = run.resume and run.loaded and run.loaded.root.resolve() == Path(flags.save).resolve()
    if not goes_on and (held := whole_iterations(Path(flags.save))):
        raise ConfigError(
            f"--save {flags.save} holds checkpoints up to iteration {held[0]}, and this run does "
            f"not go on from them: add --load {flags.save} (and give the weights to begin with as "
            "--pretrained-checkpoint, without --finetune), or name another folder"
        )


@contextlib.contextmanager
def own_save(save: str | None, model: ModelConfig, bf16: bool) -> Iterator[None]:
    """While it lasts, no other run can save there. Only rank 0 holds the folder, for all.

    Raises:
        ConfigError: another run does, or the folder cannot be written.
    """
    if not save or rank() != 0:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            Path(save).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=save):
                pass
            # In the folder itself: the one around it may belong to others.
            stack.enter_context(owned(Path(save, "save"), f"--save {save}"))
        except OSError as error:
            raise ConfigError(f"--save {save} cannot be written: {error}") from None
        # Weights as they are, float32 main copies where they are not float32, two moments.
        two = 2 * model.num_parameters * (2 + 12 if bf16 else 12)
        free = shutil.disk_usage(save).free
        if free < two:
            print_rank_0(
                f"warning: two checkpoints take {two / 2**30:.3g} GiB, and --save {save} has "
                f"{free / 2**30:.3g} GiB of free space"
            )
        yield


def check_tokenizer_files(root: str, files: Iterable[Path]) -> None:
    """That a tokenizer's files can be copied into checkpoints of a folder.

    Raises:
        ConfigError: something else is in the way.
    """
    for file in files:
        target = tokenizer_path(Path(root), file)
        for path in (target, *target.parents):
            if path.exists() and path.is_dir() != (path != target):
                raise ConfigError(
                    f"--save {root}: {path} is in the way of the tokenizer's {file.name}; move it "
                    "away"
                )
