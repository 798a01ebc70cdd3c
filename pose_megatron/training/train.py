"""The training loop: steps, validations and checkpoints, to the end or until told to stop."""

from pose_megatron.data.dataset import PoseDataset, TrainingSet
from pose_megatron.errors import ConfigError
from pose_megatron.runtime.ranks import print_rank_0
from pose_megatron.training.checkpointing import SaveQueue
from pose_megatron.training.log import AnomalyDetector, Log
from pose_megatron.training.optimizer import learning_rate
from pose_megatron.training.step import evaluate, sample_losses, train_step, worst_samples
from pose_megatron.training.stop import Stop
from pose_megatron.training.trainer import Trainer, save


def train(
    trainer: Trainer,
    train_set: TrainingSet | None,
    valid_set: PoseDataset | None,
    test_set: PoseDataset | None = None,
) -> None:
    """Trains to the end of the run, with validations and checkpoints on the way and at the end.
    With --test-data-path it then reports the loss of --eval-iters test batches.

    SIGTERM, SIGUSR1, Ctrl-C and --exit-duration-in-mins stop it before the next micro-batch, with a
    checkpoint of the last whole step and without a validation.

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
    p, chunks = args.parallel, len(trainer.models)
    stop = Stop(
        t.exit_duration_in_mins,
        2 * p.pipeline_model_parallel_size * chunks if p.pipeline_model_parallel_size > 1 else 1,
        p.distributed_timeout_minutes,
    )
    log = Log(trainer)
    anomalies = AnomalyDetector(t.loss_spike_factor, t.max_skipped_iterations)
    queue = SaveQueue() if args.checkpoint.async_save else None
    saved = trainer.iteration  # or nothing has been trained yet
    for model in trainer.models:
        model.train()
    while trainer.iteration < trainer.iterations and not stop.reason:
        lr = learning_rate(trainer.optimizer)
        step = train_step(trainer, data, stop)
        if step:
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
        at, end = trainer.iteration, trainer.iteration == trainer.iterations
        every = args.logging.eval_interval
        if not stop.between_steps() and every and (at % every == 0 or end):
            loss = evaluate(trainer, valid_set, stop)
            if loss is not None and not stop.between_steps():
                log.validation(loss)
        every = args.checkpoint.save_interval
        due = end or stop.reason or (every and at % every == 0)
        if stop.reason:
            log.stopping(stop.reason, bool(args.checkpoint.save), at == saved)
        if args.checkpoint.save and due and at != saved:
            save(trainer, queue, log.saved, last=end or bool(stop.reason))
            saved = at
        if queue:
            queue.maybe_finalize_async_calls(blocking=bool(end or stop.reason))
    if args.data.test_data_path and not stop.reason:
        loss = evaluate(trainer, test_set, stop)
        if loss is not None:
            log.validation(loss, "test")
    if stop.reason:
        print_rank_0(f"stopped at {trainer.iteration} by {stop.reason}")
    log.close()
