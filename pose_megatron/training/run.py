"""What a run is made of before its ranks meet: checkpoint, tokenizer, model, sampler, datasets.

`assemble` is the one place where flags become these; the entry, the tools that need a run's samples
and the benchmarks start here.
"""

from dataclasses import dataclass

from pose_megatron.checkpoints.megatron import directory
from pose_megatron.checkpoints.megatron.directory import Checkpoint
from pose_megatron.config.flags import Arguments, CheckpointFlags, TrainingFlags
from pose_megatron.config.layout import Layout
from pose_megatron.config.model import resolve_model
from pose_megatron.config.sampler import build_sampler, non_default_flags
from pose_megatron.data.dataset import Datasets, build_datasets
from pose_megatron.errors import DamagedCheckpoint
from pose_megatron.models.shape import ModelConfig
from pose_megatron.positions.sampler import PoseSampler
from pose_megatron.preprocessing.tokenizer import Tokenizer, build_tokenizer
from pose_megatron.runtime.ranks import print_rank_0


@dataclass(frozen=True)
class Run:
    """A run as its flags describe it.

    Attributes:
        model: shape and rope, on which flags, checkpoint and tokenizer agree.
        sampler: draws the training positions.
        tokenizer: --tokenizer-model, if given.
        loaded: the checkpoint to start from, if any.
        resume: whether to continue the training that saved `loaded`; else only its weights are
            taken.
    """

    args: Arguments
    model: ModelConfig
    sampler: PoseSampler
    tokenizer: Tokenizer | None = None
    loaded: Checkpoint | None = None
    resume: bool = False

    def datasets(
        self,
        train_samples: int,
        valid_samples: int = 0,
        test_samples: int = 0,
        positions_only: bool = False,
    ) -> Datasets:
        """The run's samples; for arguments and errors see data.dataset.build_datasets."""
        return build_datasets(
            self.args.data,
            self.sampler,
            self.model.vocab_size,
            train_samples,
            valid_samples,
            positions_only,
            test_samples,
            non_default_flags(self.args.position),
        )


def assemble(args: Arguments) -> Run:
    """The run that flags describe; reads the checkpoint's description and no weights.

    Raises:
        ConfigError: a flag or file cannot be used; names it, its value and the way out.
        DamagedCheckpoint: see `starting_point`.
    """
    loaded, resume = starting_point(args.checkpoint)
    tokenizer = None
    if args.data.tokenizer_model:
        tokenizer = build_tokenizer(args.data.tokenizer_type, args.data.tokenizer_model)
    model = resolve_model(
        args.model,
        args.data.seq_length,
        loaded.model if loaded else None,
        tokenizer.vocab_size if tokenizer else None,
    )
    sampler = build_sampler(args, model.max_position_embeddings, tokenizer)
    return Run(args, model, sampler, tokenizer, loaded, resume)


def train_valid_test_datasets_provider(
    run: Run, layout: Layout, positions_only: bool = False
) -> Datasets:
    """The samples of the run: for training to its end, for each validation and for the test.

    Args:
        positions_only: for a middle pipeline stage, which needs no tokens.
    """
    logging = run.args.logging
    train_samples = samples_needed(run.args.training, layout, run.loaded if run.resume else None)
    validations = logging.eval_iters if logging.eval_interval else 0
    tests = logging.eval_iters if run.args.data.test_data_path else 0
    return run.datasets(
        train_samples,
        validations * layout.global_batch_size,
        tests * layout.global_batch_size,
        positions_only,
    )


def samples_needed(t: TrainingFlags, layout: Layout, resumed: Checkpoint | None) -> int:
    """How many training samples last to the end of the run, even if --load-fallback goes back to an
    earlier checkpoint than `resumed`."""
    from_start = layout.end(t)[1]
    if resumed is None:
        return from_start
    return max(from_start, layout.end(t, resumed.iteration, resumed.consumed_samples)[1])


def starting_point(flags: CheckpointFlags) -> tuple[Checkpoint | None, bool]:
    """The checkpoint to start from, if any, and whether to continue its training.

    Raises:
        ConfigError: --load is no checkpoint folder, or its model is of an unknown kind.
        DamagedCheckpoint: the checkpoint is damaged, and there is no earlier one to fall back to.
    """
    if flags.pretrained_checkpoint and not (flags.load and directory.exists(flags.load)):
        return directory.find(flags.pretrained_checkpoint), False
    if not flags.load:
        return None, False
    if flags.load == flags.save and not (directory.exists(flags.load) or flags.finetune):
        print_rank_0(f"{flags.load} holds no checkpoint yet: starting from fresh weights")
        return None, False
    if directory.exists(flags.load) and not directory.has_tracker(flags.load):
        print_rank_0(
            f"{flags.load} has no {directory.TRACKER}: going on from the newest whole checkpoint, "
            f"{directory.latest_whole(flags.load)}"
        )
    try:
        return directory.find(flags.load), not flags.finetune
    except DamagedCheckpoint as error:
        return fall_back(flags, error), not flags.finetune


def fall_back(
    flags: CheckpointFlags, error: DamagedCheckpoint, below: int | None = None
) -> Checkpoint:
    """With --load-fallback, the newest whole checkpoint before iteration `below`.

    Raises:
        DamagedCheckpoint: `error`, without the flag or without such a checkpoint.
    """
    if not flags.load_fallback:
        raise error
    assert flags.load, "fall_back is for --load"
    earlier = directory.fall_back(flags.load, error, below)
    print_rank_0(f"{error}; falling back to {earlier.path}")
    return earlier
