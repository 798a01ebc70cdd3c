"""The training loop: steps, validations and checkpoints, to the end or until told to stop."""

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from pose_megatron.data.dataset import PoseDataset, TrainingSet
from pose_megatron.errors import ConfigError
from pose_megatron.runtime.processes import Stop
from pose_megatron.runtime.ranks import print_rank_0
from pose_megatron.training.log import AnomalyDetector, Log
from pose_megatron.training.optimizer import learning_rate
from pose_megatron.training.step import evaluate, sample_losses, train_step, worst_samples
from pose_megatron.training.trainer import Trainer, save


def train(
    trainer: Trainer,
    train_set: TrainingSet | None,
    valid_set: PoseDataset | None,
    test_set: PoseDataset | None = None,
) -> None:
    """Trains to the end of the run, with validations and checkpoints on the way and at the end.
    With --test-data-path it then reports the loss of --eval-iters test batches.

    SIGTERM, SIGUSR1 and --exit-duration-in-mins stop it after the current step, with a checkpoint.

    Args:
        train_set, valid_set, test_set: None on ranks that do not load.

    Raises:
        ConfigError: --max-skipped-iterations steps in a row were not finite.
    """
    args, t = trainer.args, trainer.args.training
    if trainer.iteration >= trainer.iterations:
        print_rank_0(f"nothing to do: {trainer.iteration} of {trainer.iterations} steps done")
        return
    data = trainer.data_iterator(train_set, trainer.consumed_samples, args.data.num_workers)
    log, stop = Log(trainer), Stop(t.exit_duration_in_mins)
    anomalies = AnomalyDetector(t.loss_spike_factor, t.max_skipped_iterations)
    queue = AsyncCallsQueue() if args.checkpoint.async_save else None
    for model in trainer.models:
        model.train()
    while trainer.iteration < trainer.iterations:
        lr = learning_rate(trainer.optimizer)
        step = train_step(trainer, data, stop.stop_votes())
        log.step(step, lr)
        if wrong := anomalies.judge(step):
            losses = sample_losses(trainer, step)
            log.anomaly(wrong, worst_samples(losses, step.first, train_set))
        if anomalies.gives_up:
            if queue:
                queue.maybe_finalize_async_calls(blocking=True)
            raise ConfigError(
                f"{anomalies.skipped} steps in a row had a loss or gradient that is not finite "
                f"(--max-skipped-iterations {t.max_skipped_iterations}), the last at "
                f"{trainer.iteration}: see their samples above; lower --lr, or start again from "
                "an earlier checkpoint"
            )
        at = trainer.iteration
        reason = stop.reason(step.stop_votes)
        last = at == trainer.iterations or reason is not None
        if args.logging.eval_interval and (at % args.logging.eval_interval == 0 or last):
            log.validation(evaluate(trainer, valid_set))
        every = args.checkpoint.save_interval
        if args.checkpoint.save and (last or (every and at % every == 0)):
            save(trainer, queue, log.saved)
        if queue:
            queue.maybe_finalize_async_calls(blocking=last)
        if reason:
            print_rank_0(f"stopped at {at} by {reason}")
            break
    if args.data.test_data_path and trainer.iteration == trainer.iterations:
        log.validation(evaluate(trainer, test_set), "test")
    log.close()
