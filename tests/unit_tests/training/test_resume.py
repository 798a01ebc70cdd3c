"""What a resumed run takes from its flags, over every flag; an outside answer is the same change made
by hand in a run that never stopped, or the schedule's formula."""

import argparse
import dataclasses
import math
import re

import pytest
import torch

from pose_megatron.checkpoints.megatron.directory import (
    AS_IT_LIES,
    Checkpoint,
    content_metadata,
    find,
)
from pose_megatron.config.arguments import parse
from pose_megatron.config.flags import Arguments
from pose_megatron.config.layout import lay_out
from pose_megatron.errors import ConfigError
from pose_megatron.training.description import length
from pose_megatron.training.optimizer import learning_rate
from pose_megatron.training.resume import BUFFERS, CHANGES, FIXED, FREE, SHAPE, changes, settings
from pose_megatron.training.run import assemble
from pose_megatron.training.step import train_step
from pose_megatron.training.trainer import save, setup

pytestmark = pytest.mark.usefixtures("world")

WORDS = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 2 --vocab-size 16 --seq-length 8
    --max-position-embeddings 64 --rope-scaling linear --split 100,0,0 --micro-batch-size 2
    --global-batch-size 4 --num-workers 0 --init-method-std 0.1 --train-iters 8 --lr 1e-2
    --min-lr 1e-4""".split()


@pytest.fixture
def corpus(make_corpus):
    return make_corpus([[(7 * i + j * j) % 16 for j in range(40)] for i in range(24)])


@pytest.fixture
def run_of(corpus):
    """run_of(*words): (run, its layout)."""

    def make(*words, ranks=1):
        run = assemble(parse([*WORDS, "--data-path", corpus, *map(str, words)]))
        return run, lay_out(run.args, run.model, ranks)

    return make


def trained(run, layout, steps, trainer=None):
    """A trainer after so many more steps, and [(learning rate, loss)] of each."""
    trainer = trainer or setup(run, layout)
    train_set, *_ = run.datasets(64)
    data = trainer.data_iterator(train_set, trainer.consumed_samples, 0)
    rows = []
    for _ in range(steps):
        rate = learning_rate(trainer.optimizer)
        rows.append((rate, train_step(trainer, data).loss))
    return trainer, rows


def weights(trainer):
    return torch.cat([p.detach().float().flatten() for p in trainer.stages[0].parameters()])


@pytest.fixture
def saved(run_of, tmp_path):
    """saved(*words): the folder in which a run has saved after three steps."""

    def make(*words):
        run, layout = run_of("--save", tmp_path / "saved", *words)
        trainer, _ = trained(run, layout, 3)
        save(trainer)
        return tmp_path / "saved"

    return make


def test_the_rule_covers_every_flag_once():
    groups = [f.type for f in dataclasses.fields(Arguments)]
    flags = [f.name for group in groups for f in dataclasses.fields(group)]
    rule = [*CHANGES, *FIXED, *FREE, *SHAPE]
    assert sorted(rule) == sorted(flags) and len(set(rule)) == len(rule)


# For each flag that may change: words before, words after, what the line says of both.
SAMPLES, WINDOW = "--train-samples 64", "--original-max-position-embeddings 8"
OTHER = {
    "micro_batch_size": ("", "--micro-batch-size 1", "2 -> 1"),
    "global_batch_size": ("", "--global-batch-size 8", "4 -> 8"),
    "rampup_batch_size": (
        f"{SAMPLES} --rampup-batch-size 2 2 8",
        f"{SAMPLES} --rampup-batch-size 2 2 12",
        "2 2 8 -> 2 2 12",
    ),
    "train_iters": ("", "--train-iters 9", "8 -> 9"),
    "train_samples": (SAMPLES, "--train-samples 32", "64 -> 32"),
    "lr": ("", "--lr 0.02", "0.01 -> 0.02"),
    "min_lr": ("", "--min-lr 0.001", "0.0001 -> 0.001"),
    "lr_decay_style": ("", "--lr-decay-style linear", "cosine -> linear"),
    "lr_decay_iters": ("", "--lr-decay-iters 6", "none -> 6"),
    "lr_decay_samples": (SAMPLES, f"{SAMPLES} --lr-decay-samples 60", "none -> 60"),
    "lr_warmup_iters": ("", "--lr-warmup-iters 2", "0 -> 2"),
    "lr_warmup_samples": (SAMPLES, f"{SAMPLES} --lr-warmup-samples 8", "0 -> 8"),
    "lr_wsd_decay_iters": (
        "--lr-decay-style WSD --lr-wsd-decay-iters 2",
        "--lr-decay-style WSD --lr-wsd-decay-iters 3",
        "2 -> 3",
    ),
    "lr_wsd_decay_samples": (
        f"{SAMPLES} --lr-decay-style WSD --lr-wsd-decay-samples 8",
        f"{SAMPLES} --lr-decay-style WSD --lr-wsd-decay-samples 9",
        "8 -> 9",
    ),
    "lr_wsd_decay_style": ("", "--lr-wsd-decay-style linear", "exponential -> linear"),
    "weight_decay": ("", "--weight-decay 0.1", "0.01 -> 0.1"),
    "moe_aux_loss_coeff": (
        "--num-experts 2 --moe-aux-loss-coeff 0.01",
        "--num-experts 2 --moe-aux-loss-coeff 0.02",
        "0.01 -> 0.02",
    ),
    "clip_grad": ("", "--clip-grad 0.5", "1.0 -> 0.5"),
    "adam_beta1": ("", "--adam-beta1 0.8", "0.9 -> 0.8"),
    "adam_beta2": ("", "--adam-beta2 0.99", "0.95 -> 0.99"),
    "adam_eps": ("", "--adam-eps 1e-6", "1e-08 -> 1e-06"),
    "seed": ("", "--seed 7", "1234 -> 7"),
    "data_path": ("", "--data-path OTHER", "CORPUS -> OTHER"),
    "train_data_path": ("PER-SPLIT CORPUS", "PER-SPLIT OTHER", "CORPUS -> OTHER"),
    "valid_data_path": (
        "PER-SPLIT CORPUS --valid-data-path CORPUS",
        "PER-SPLIT CORPUS --valid-data-path OTHER",
        "CORPUS -> OTHER",
    ),
    "test_data_path": (
        "PER-SPLIT CORPUS --test-data-path CORPUS",
        "PER-SPLIT CORPUS --test-data-path OTHER",
        "CORPUS -> OTHER",
    ),
    "split": ("", "--split 90,10,0", "100,0,0 -> 90,10,0"),
    "data_mode": ("", "--data-mode packed", "document -> packed"),
    "packed_skips": (
        "--data-mode packed",
        "--data-mode packed --packed-skips stream",
        "document -> stream",
    ),
    "seq_length": (WINDOW, f"{WINDOW} --seq-length 16", "8 -> 16"),
    "short_documents": ("", "--short-documents pack", "drop -> pack"),
    "max_position_embeddings": ("", "--max-position-embeddings 128", "64 -> 128"),
    "position_sampler": ("", "--position-sampler full", "pose -> full"),
    "pose_num_chunks": ("", "--pose-num-chunks 3", "2 -> 3"),
    "pose_content": ("", "--pose-content aligned", "uniform -> aligned"),
    "pose_skip_law": ("", "--pose-skip-law sorted-uniform", "chain -> sorted-uniform"),
    "pose_boundaries": (
        "--position-sampler pose-boundary --pose-boundaries 3",
        "--position-sampler pose-boundary --pose-boundaries 3 4",
        "3 -> 3 4",
    ),
    "pose_plain_fraction": ("", "--pose-plain-fraction 0.5", "0.0 -> 0.5"),
    "pose_target_schedule": (
        "",
        "--pose-target-schedule 0:32 40:64",
        "none -> 0:32 40:64",
    ),
    "tensor_model_parallel_size": ("", "--tensor-model-parallel-size 2", "1 -> 2"),
    "pipeline_model_parallel_size": ("", "--pipeline-model-parallel-size 2", "1 -> 2"),
    "num_layers_per_virtual_pipeline_stage": (
        "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
        "--num-layers 4 --pipeline-model-parallel-size 2",
        "1 -> none",
    ),
    "context_parallel_size": ("", "--context-parallel-size 2", "1 -> 2"),
    "expert_model_parallel_size": (
        "--num-experts 2",
        "--num-experts 2 --expert-model-parallel-size 2",
        "1 -> 2",
    ),
    "sequence_parallel": (
        "--tensor-model-parallel-size 2",
        "--tensor-model-parallel-size 2 --sequence-parallel",
        "False -> True",
    ),
}
# What takes whole files to change; the checkpoint is edited instead.
OF_FILES = {"materialized", "tokenizer_type", "tokenizer_model"}


@pytest.mark.parametrize("name", sorted(OF_FILES))
def test_other_files_are_named(name, run_of, saved):
    run, layout = run_of("--load", saved())
    now = settings(run, layout)[name]
    run.loaded.common["pose_megatron"]["settings"][name] = "/another"
    line = f"changed since iter_0000003: --{name.replace('_', '-')} /another -> {now or 'none'}"
    assert list(changes(run, layout)) == [line]


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in OF_FILES])
def test_what_changes_is_said_with_both_values(name, run_of, corpus, make_corpus, tmp_path):
    other = make_corpus([[1] * 40] * 3, "other")
    before, after, said = OTHER[name]

    def words(text: str) -> list[str]:
        text = text.replace("PER-SPLIT", "--data-path --train-data-path")
        return text.replace("CORPUS", corpus).replace("OTHER", other).split()

    run, layout = make_run(words(before), corpus)
    args = argparse.Namespace(consumed_train_samples=12)
    record = {"model": run.model.to_dict(), "settings": settings(run, layout)}
    common = {"args": args, "pose_megatron": record}
    loaded = Checkpoint(tmp_path, 3, tmp_path / "iter_0000003", run.model, common)
    unchanged = dataclasses.replace(run, loaded=loaded, resume=True)
    assert not list(changes(unchanged, layout))
    run, layout = make_run(words(after), corpus)
    lines = list(changes(dataclasses.replace(run, loaded=loaded, resume=True), layout))
    flag = "--" + name.replace("_", "-")
    said = said.replace("CORPUS", corpus).replace("OTHER", other)
    assert f"changed since iter_0000003: {flag} {said}" in lines


@pytest.mark.parametrize("name", BUFFERS)
def test_an_optimizer_as_its_ranks_had_it_needs_their_layout(name, corpus, tmp_path):
    before, after, said = OTHER.get(name) or (
        *("--use-distributed-optimizer", "--use-distributed-optimizer --overlap-grad-reduce"),
        "none -> buckets of 40,000,000 parameters",
    )
    run, layout = make_run(before.split(), corpus)
    args = argparse.Namespace(consumed_train_samples=12)
    record = {"model": run.model.to_dict(), "settings": settings(run, layout)}
    common = {
        "args": args,
        "pose_megatron": record,
        "content_metadata": content_metadata(AS_IT_LIES),
    }
    loaded = Checkpoint(tmp_path, 3, tmp_path / "iter_0000003", run.model, common)
    assert not list(changes(dataclasses.replace(run, loaded=loaded, resume=True), layout))
    run, layout = make_run(after.split(), corpus)
    run = dataclasses.replace(run, loaded=loaded, resume=True)
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ConfigError, match=re.escape(f"otherwise: {flag} {said}.")):
        list(changes(run, layout))
    common["content_metadata"] = content_metadata()
    list(changes(run, layout))


def without(words, flag):
    """The words but for a flag and its value."""
    at = words.index(flag)
    return [*words[:at], *words[at + 2 :]]


def make_run(words, corpus):
    """Of flags over WORDS; a layout of as many ranks as they need."""
    base = [*WORDS, "--data-path", corpus]
    if "--train-samples" in words:
        base = without(base, "--train-iters")
    if "--train-data-path" in words:
        words.remove("--data-path")
        base = without(without(base, "--split"), "--data-path")
    run = assemble(parse([*base, *words]))
    p = run.args.parallel
    ranks = p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size
    return run, lay_out(run.args, run.model, max(ranks, p.expert_model_parallel_size))


@pytest.mark.parametrize(
    ("words", "by_hand"),
    [
        ("--lr 0.03", {"max_lr": 0.03}),
        ("--min-lr 0.005", {"min_lr": 0.005}),
        ("--adam-beta1 0.5", {"betas": (0.5, 0.95)}),
        ("--adam-beta2 0.5", {"betas": (0.9, 0.5)}),
        ("--adam-eps 0.01", {"eps": 0.01}),
    ],
)
@pytest.mark.parametrize("kind", ["", "--use-distributed-optimizer"])
def test_the_flags_of_the_optimizer_take_effect(run_of, saved, words, by_hand, kind):
    """As if somebody had set them in the optimizer of a run that never stopped."""
    kind = kind.split()
    folder = saved(*kind)
    run, layout = run_of(*kind)
    straight, _ = trained(run, layout, 3)
    for group in straight.optimizer.param_groups:
        group.update(by_hand)
    straight.scheduler.step(increment=0)
    straight, wanted = trained(run, layout, 2, straight)
    run, layout = run_of("--load", folder, *kind, *words.split())
    resumed, found = trained(run, layout, 2)
    assert found == wanted
    assert torch.equal(weights(resumed), weights(straight))
    run, layout = run_of("--load", folder, *kind)
    same, _ = trained(run, layout, 2)
    assert not torch.equal(weights(same), weights(resumed))


@pytest.mark.parametrize("words", ["--weight-decay 0.9", "--clip-grad 0.001"])
def test_other_flags_of_a_step_take_effect(run_of, saved, words):
    folder = saved()
    run, layout = run_of("--load", folder)
    same, _ = trained(run, layout, 1)
    run, layout = run_of("--load", folder, *words.split())
    changed, _ = trained(run, layout, 1)
    assert not torch.equal(weights(same), weights(changed))


def cosine(step: int, steps: int, lr=1e-2, min_lr=1e-4) -> float:
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * step / steps)) / 2


@pytest.mark.parametrize("batch", [2, 8, 12])
def test_another_batch_size_leaves_the_schedule_where_it_is(run_of, saved, batch):
    """--train-iters 8: step 3 has the rate of step 3, whatever its batch."""
    run, layout = run_of("--load", saved(), "--global-batch-size", batch)
    _, rows = trained(run, layout, 3)
    assert [rate for rate, _ in rows] == pytest.approx([cosine(step, 8) for step in (3, 4, 5)])


def test_a_schedule_of_samples_goes_on_after_those_consumed(saved, corpus):
    folder = saved()  # of 12 samples, in --train-iters
    words = without(WORDS, "--train-iters")
    words += ["--train-samples", "64", "--global-batch-size", "2", "--load", str(folder)]
    run = assemble(parse([*words, "--data-path", corpus]))
    _, rows = trained(run, lay_out(run.args, run.model, 1), 2)
    assert [rate for rate, _ in rows] == pytest.approx([cosine(12, 64), cosine(14, 64)])


def test_a_longer_run_stretches_the_decay(run_of, saved):
    run, layout = run_of("--load", saved(), "--train-iters", 16)
    _, rows = trained(run, layout, 1)
    assert rows[0][0] == pytest.approx(cosine(3, 16))


def test_tokens_are_counted_as_they_were_trained(run_of, saved):
    """3 steps of 4 windows of 8 tokens, then 5 of 8 windows of 16."""
    folder = saved()
    run, layout = run_of("--load", folder, "--global-batch-size", 8, "--seq-length", 16)
    said = length(run, layout)
    assert said.startswith(f"8 steps, {3 * 4 * 8 + 5 * 8 * 16} tokens, of which 3 steps and 96 ")
    trainer, _ = trained(run, layout, 2)
    assert trainer.consumed_tokens == 3 * 4 * 8 + 2 * 8 * 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--bf16", "was saved without --bf16: resume the same way, or start anew with --finetune"),
        ("--use-distributed-optimizer", "was saved without --use-distributed-optimizer: resume"),
        ("--rope-scaling yarn", "is interpolated already, to 64 positions (--rope-scaling linear"),
        ("--rope-scaling-factor 4", "the checkpoint is interpolated already, to 64 positions"),
        ("--num-layers 3", "--num-layers 3 contradicts the checkpoint, which has 2"),
        ("--hidden-size 64", "--hidden-size 64 contradicts the checkpoint"),
        ("--vocab-size 17", "--vocab-size 17 contradicts the checkpoint"),
        ("--rotary-base 500", "--rotary-base 500.0 contradicts the checkpoint"),
        ("--norm-epsilon 1e-3", "--norm-epsilon 0.001 contradicts the checkpoint"),
    ],
)
def test_what_may_not_change_is_refused_by_name(run_of, saved, words, message):
    folder = saved()
    with pytest.raises(ConfigError) as refused:
        list(changes(*run_of("--load", folder, *words.split())))
    assert words.split()[0] in str(refused.value) and message in str(refused.value)
    if words in ("--bf16", "--use-distributed-optimizer"):  # but from its weights
        assert not list(changes(*run_of("--load", folder, "--finetune", *words.split())))


@pytest.mark.parametrize("flag", ["qk-layernorm", "untie-embeddings-and-output-weights"])
def test_a_switch_that_is_turned_off_is_refused_too(run_of, saved, flag):
    folder = saved(f"--{flag}")
    assert not list(changes(*run_of("--load", folder)))
    with pytest.raises(ConfigError, match=f"--{flag} False contradicts the checkpoint, which has"):
        run_of("--load", folder, f"--no-{flag}")


def test_a_plain_rope_is_not_scaled_without_an_extension(run_of, saved, corpus):
    folder = saved("--rope-scaling", "none")
    with pytest.raises(ConfigError, match="a resumed run may only extend it"):
        list(changes(*run_of("--load", folder, "--rope-scaling-factor", 4)))
    wider = ["--load", folder, "--max-position-embeddings", 128]
    lines = list(changes(*run_of(*wider)))
    assert lines == ["changed since iter_0000003: --max-position-embeddings 64 -> 128"]


def test_a_corpus_that_was_written_anew_is_named(run_of, saved, corpus, make_corpus):
    folder = saved()
    assert not list(changes(*run_of("--load", folder)))
    assert make_corpus([[1] * 50] * 9) == corpus
    (line,) = changes(*run_of("--load", folder))
    assert f"{corpus} itself, of [" in line


def test_another_spelling_of_a_path_is_no_other_corpus(
    run_of, saved, corpus, monkeypatch, tmp_path
):
    folder = saved()
    monkeypatch.chdir(tmp_path)
    relative = corpus.removeprefix(f"{tmp_path}/")
    assert relative != corpus
    assert not list(changes(*run_of("--load", folder, "--data-path", relative)))


def test_a_list_of_corpora_is_what_it_names(saved, corpus, tmp_path):
    """The same corpus by --data-args-path, with a comment, is no change."""
    folder, file = saved(), tmp_path / "corpora.txt"
    file.write_text(f'"{corpus}" # books\n', encoding="utf-8-sig")
    run = assemble(parse([*WORDS, "--load", str(folder), "--data-args-path", str(file)]))
    assert not list(changes(run, lay_out(run.args, run.model, 1)))
    file.write_text(f"0.5 {corpus} 0.5 {corpus}")
    (line,) = changes(run, lay_out(run.args, run.model, 1))
    assert line.endswith(f"--data-path {corpus} -> 0.5 {corpus} 0.5 {corpus}")


def test_a_checkpoint_without_our_record_is_compared_as_far_as_it_says(run_of, saved):
    """Such as one of Megatron-LM, whose args have its flags' names."""
    folder = saved()
    run, layout = run_of("--load", folder, "--lr", 0.02, "--bf16")
    common = dict(find(folder).common)
    common["pose_megatron"] = {"model": run.model.to_dict()}
    args = vars(common["args"]) | {"lr": 0.01, "adam_beta1": 0.9, "params_dtype": torch.bfloat16}
    common["args"] = argparse.Namespace(**args)
    stock = dataclasses.replace(run, loaded=dataclasses.replace(run.loaded, common=common))
    assert list(changes(stock, layout)) == ["changed since iter_0000003: --lr 0.01 -> 0.02"]


def test_a_ramp_up_that_is_over_does_not_bind_more_ranks(saved, run_of, corpus):
    """Batches of 2 do not divide over two ranks of 2 samples, and no such batch is to come."""
    words = without(WORDS, "--train-iters")
    words += ["--train-samples", "64", "--rampup-batch-size", "2", "2", "4", "--data-path", corpus]
    run = assemble(parse(words))
    with pytest.raises(ConfigError, match="--rampup-batch-size 2 2 4: a batch of 2 is not a"):
        lay_out(run.args, run.model, 2)
    assert lay_out(run.args, run.model, 2, consumed=6).num_microbatches(4) == 1
