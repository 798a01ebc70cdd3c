"""training.train on a corpus with a sample that breaks the numbers: what changes, what is said."""

import math

import pytest
import torch
import torch.nn.functional as F

from pose_megatron.config.arguments import parse
from pose_megatron.config.layout import lay_out
from pose_megatron.config.model import resolve_model
from pose_megatron.positions.sampler import PoseSampler
from pose_megatron.training import train
from pose_megatron.training.run import Run
from pose_megatron.training.step import sample_losses, train_step
from pose_megatron.training.trainer import setup

pytestmark = pytest.mark.usefixtures("world")

POISON = 7  # a token whose embedding is infinite
WORDS = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 2 --vocab-size 16
    --untie-embeddings-and-output-weights --seq-length 8 --max-position-embeddings 64
    --rope-scaling linear --rope-scaling-factor 8 --split 100,0,0 --micro-batch-size 2
    --global-batch-size 4 --num-workers 0 --lr 1e-2 --lr-decay-style constant --log-interval 1
    --init-method-std 0.1""".split()


@pytest.fixture
def run_on(make_corpus, tmp_path):
    """run_on(poisoned, *words): a trainer and its dataset of 8-token documents, of which those of
    number `poisoned` hold the poison."""

    def make(poisoned, *words):
        documents = [[(i + j) % 6 for j in range(9)] for i in range(24)]
        for i in poisoned:
            documents[i][4] = POISON
        args = parse([*WORDS, "--data-path", make_corpus(documents), *words])
        config = resolve_model(args.model, args.data.seq_length, None, None)
        layout = lay_out(args, config, 1)
        sampler = PoseSampler(8, 64, seed=args.training.seed)
        run = Run(args, config, sampler)
        train_set, *_ = run.datasets(layout.end(args.training)[1])
        trainer = setup(run, layout)
        with torch.no_grad():
            trainer.stages[0].embedding.word_embeddings.weight[POISON] = math.inf
        return trainer, train_set

    return make


def documents_of(train_set, indices):
    return [train_set.sources[i]["source"].pieces[0][0] for i in indices]


def weights(trainer):
    return {name: p.clone() for name, p in trainer.stages[0].named_parameters()}


def test_a_step_that_is_not_finite_changes_nothing_and_names_its_sample(
    run_on, capsys, monkeypatch
):
    trainer, train_set = run_on([], "--train-iters", "5")
    bad = documents_of(train_set, range(20))[9]  # the second of step 3, samples 8 to 11
    trainer, train_set = run_on([bad], "--train-iters", "5")
    seen = []
    step = train.train_step

    def watched(*args):
        before = weights(trainer), trainer.scheduler.num_steps
        result = step(*args)
        after = weights(trainer), trainer.scheduler.num_steps
        same = all(torch.equal(before[0][k], after[0][k]) for k in after[0])
        seen.append((result.updated, same, after[1] - before[1], trainer.consumed_samples))
        return result

    monkeypatch.setattr(train, "train_step", watched)
    train.train(trainer, train_set, None)
    # The one step without an update leaves weights and schedule alone; the samples are consumed.
    assert seen == [
        (True, False, 4, 4),
        (True, False, 4, 8),
        (False, True, 0, 12),
        (True, False, 4, 16),
        (True, False, 4, 20),
    ]
    out = capsys.readouterr().out
    assert "iteration 3: skipped, loss nan and gradient norm nan (1 in a row)" in out
    assert f"  nan  sample 9: {trainer.args.data.data_path[0]}, document {bad} from token 0" in out
    assert "skipped 1 | loss nan" in out  # in the log line of that step alone
    assert out.count("skipped 1 |") == 1


def test_too_many_in_a_row_end_the_run(run_on):
    trainer, train_set = run_on(range(24), "--train-iters", "9", "--max-skipped-iterations", "3")
    with pytest.raises(
        ValueError,
        match="3 steps in a row had a loss or gradient that is not "
        r"finite \(--max-skipped-iterations 3\), the last at 3",
    ):
        train.train(trainer, train_set, None)


def test_the_loss_of_each_sample_is_its_own(run_on):
    trainer, train_set = run_on([], "--train-iters", "5")
    data = trainer.data_iterator(train_set, 0, 0)
    stage, expected = trainer.stages[0], []
    for i in range(4):
        sample = {k: torch.from_numpy(v)[None] for k, v in train_set[i].items()}
        with torch.no_grad():
            logits = stage(sample["tokens"], sample["position_ids"], None)[0, :, :16]
            whole = stage(sample["tokens"], sample["position_ids"], None)[0]
        assert logits.shape == (8, 16)
        expected.append(F.cross_entropy(whole, sample["labels"][0]).item())
    step = train_step(trainer, data)
    assert sample_losses(trainer, step) == pytest.approx(expected, rel=1e-5)
    assert step.loss == pytest.approx(sum(expected) / 4, rel=1e-6)


def test_a_ramped_run_has_the_batches_and_ends_in_time(run_on, capsys, monkeypatch):
    # 2 samples, then 4: two increments of 2 over 6 samples, then 6 of --global-batch-size.
    trainer, train_set = run_on(
        [],
        "--train-samples",
        "23",
        "--global-batch-size",
        "6",
        "--rampup-batch-size",
        "2",
        "2",
        "6",
        "--lr-warmup-samples",
        "6",
    )
    assert (trainer.iterations, len(train_set)) == (5, 20)
    sizes, rates = [], []
    step = train.train_step

    def watched(*args):
        rates.append(train.learning_rate(trainer.optimizer))
        result = step(*args)
        sizes.append((result.first, result.samples))
        return result

    monkeypatch.setattr(train, "train_step", watched)
    train.train(trainer, train_set, None)
    # Consumed 0, 2: still the first batch; 4, 6 samples: 4 and, at the end of the ramp, 6.
    assert sizes == [(0, 2), (2, 2), (4, 4), (8, 6), (14, 6)]
    assert rates == pytest.approx([0, 1e-2 / 3, 1e-2 * 2 / 3, 1e-2, 1e-2])
    assert "batch 2 |" in capsys.readouterr().out
