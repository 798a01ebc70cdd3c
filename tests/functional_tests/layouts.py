"""Trains the same weights on the same batches in many layouts of ranks, many to a process.

    python tests/functional_tests/layouts.py                   all of them, as a Markdown table

    torchrun --standalone --nproc-per-node 2 tests/functional_tests/layouts.py --load weights
        --data-path corpus --output rows.jsonl --layouts "TP2, tied" "CP2"      some, as JSON rows

Start-up is paid once for each number of ranks: between two layouts only megatron-core's groups are
made anew. Micro-batches hold two samples or four, each with skip-wise positions of its own, up to
T = 8 L, and with a loss mask of its own, so that no two micro-batches count equally many tokens.
Some layouts save after two steps, and others go on from there.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

TESTS = Path(__file__).resolve().parents[1]
STEPS, SAVE_AT = 4, 2
COMMON = f"""
    --seq-length 32 --max-position-embeddings 256 --rope-scaling yarn --pose-num-chunks 3
    --micro-batch-size 2 --global-batch-size 8 --train-iters {STEPS} --split 100,0,0 --num-workers 0
    --lr 3e-3 --lr-warmup-iters 1 --lr-decay-iters 8 --clip-grad 0.5 --init-method-std 0.2"""
SHAPE = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --vocab-size 257"
MODELS = {
    "grouped": f"{SHAPE} --group-query-attention --num-query-groups 2 "
    "--untie-embeddings-and-output-weights",
    "tied": SHAPE,  # embedding and output layer are one table; every head has its own keys
    # Qwen2's biases of queries, keys and values, and Qwen3's norms of queries and keys.
    "biased-normed": f"{SHAPE} --group-query-attention --num-query-groups 2 "
    "--untie-embeddings-and-output-weights --add-qkv-bias --qk-layernorm",
    # Qwen3-MoE's layers: every token goes to two of four experts.
    "experts": f"{SHAPE} --group-query-attention --num-query-groups 2 --qk-layernorm "
    "--untie-embeddings-and-output-weights --num-experts 4 --moe-router-topk 2 "
    "--moe-ffn-hidden-size 64",
    "GPT-J": f"{SHAPE} --untie-embeddings-and-output-weights",
    "Baichuan2": f"{SHAPE} --untie-embeddings-and-output-weights",
}
FAMILIES = {"GPT-J": "gptj", "Baichuan2": "baichuan"}  # which no flag of a fresh model asks for

TP, PP, CP = (f"--{name}-parallel-size" for name in ("tensor-model", "pipeline-model", "context"))
EP = "--expert-model-parallel-size"
SP = "--sequence-parallel"
VPP2 = "--num-layers-per-virtual-pipeline-stage 1"  # of PP2: four layers, two to a rank
SHARDED = "--use-distributed-optimizer"
OVERLAP = f"{SHARDED} --overlap-grad-reduce --overlap-param-gather"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
BLOCK = "--recompute-granularity full --recompute-method block --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective"
WIDE = "--micro-batch-size 4"  # the same batch in half the exchanges, which take the time here


@dataclass(frozen=True)
class Layout:
    ranks: int
    words: str
    model: str = "grouped"
    fault: str | None = None  # of FAULTS
    saves: bool = False  # after SAVE_AT steps
    resumes: str | None = None  # the layout whose checkpoint it goes on from

    @property
    def reference(self) -> str:
        return f"1 rank, {self.model}"


LAYOUTS = {
    "1 rank, grouped": Layout(1, ""),
    "1 rank, tied": Layout(1, "", "tied"),
    **{f"1 rank, {name}": Layout(1, "", name) for name in ("biased-normed", "experts", *FAMILIES)},
    "1 rank, selective recompute": Layout(1, SELECTIVE),
    "DP2": Layout(2, ""),
    "DP2, distributed optimizer": Layout(2, SHARDED, "tied"),
    "DP2, overlapped reduction": Layout(2, "--overlap-grad-reduce"),
    "DP2, distributed optimizer, overlapped": Layout(2, OVERLAP),
    "TP2": Layout(2, f"{TP} 2", saves=True),
    "TP2, tied": Layout(2, f"{TP} 2", "tied"),
    "TP2 SP": Layout(2, f"{TP} 2 {SP}"),
    "TP2 SP, distributed optimizer, full recompute": Layout(
        2, f"{TP} 2 {SP} {SHARDED} {FULL} {WIDE}", saves=True
    ),
    "TP2 SP, tied, selective recompute": Layout(2, f"{TP} 2 {SP} {SELECTIVE}", "tied"),
    "PP2": Layout(2, f"{PP} 2"),
    "PP2, tied, full recompute": Layout(2, f"{PP} 2 {BLOCK}", "tied"),
    "PP2 VPP2": Layout(2, f"{PP} 2 {VPP2}"),
    "PP2 VPP2, tied, full recompute": Layout(2, f"{PP} 2 {VPP2} {FULL}", "tied"),
    "PP2 VPP2, distributed optimizer, selective recompute": Layout(
        2, f"{PP} 2 {VPP2} {SHARDED} {SELECTIVE}"
    ),
    "CP2": Layout(2, f"{CP} 2"),
    "CP2, distributed optimizer, full recompute": Layout(2, f"{CP} 2 {SHARDED} {FULL} {WIDE}"),
    "CP2, tied, selective recompute": Layout(2, f"{CP} 2 {SELECTIVE}", "tied"),
    "TP2, biased-normed": Layout(2, f"{TP} 2", "biased-normed"),
    "TP2 SP, biased-normed, full recompute": Layout(2, f"{TP} 2 {SP} {FULL}", "biased-normed"),
    "PP2, biased-normed": Layout(2, f"{PP} 2", "biased-normed"),
    "TP2 SP, GPT-J, selective recompute": Layout(2, f"{TP} 2 {SP} {SELECTIVE}", "GPT-J"),
    "PP2 VPP2, GPT-J": Layout(2, f"{PP} 2 {VPP2}", "GPT-J"),
    "CP2, GPT-J, full recompute": Layout(2, f"{CP} 2 {FULL}", "GPT-J"),
    "TP2 SP, Baichuan2": Layout(2, f"{TP} 2 {SP}", "Baichuan2"),
    "PP2, Baichuan2, distributed optimizer": Layout(2, f"{PP} 2 {SHARDED}", "Baichuan2"),
    "DP2, experts, distributed optimizer": Layout(2, SHARDED, "experts"),
    "EP2": Layout(2, f"{EP} 2", "experts", saves=True),
    "EP2, distributed optimizer, overlapped": Layout(2, f"{EP} 2 {OVERLAP}", "experts", saves=True),
    "TP2 SP, experts, full recompute": Layout(2, f"{TP} 2 {SP} {FULL}", "experts", saves=True),
    "PP2 VPP2, experts, selective recompute": Layout(2, f"{PP} 2 {VPP2} {SELECTIVE}", "experts"),
    "CP2, experts": Layout(2, f"{CP} 2", "experts"),
    "CP2 EP2": Layout(2, f"{CP} 2 {EP} 2", "experts"),
    "EP2 TP2 SP": Layout(4, f"{EP} 2 {TP} 2 {SP} {WIDE}", "experts"),
    "EP2 PP2 VPP2, distributed optimizer": Layout(4, f"{EP} 2 {PP} 2 {VPP2} {SHARDED}", "experts"),
    "TP4 SP, 2 query groups": Layout(4, f"{TP} 4 {SP} {WIDE}"),
    "CP4, distributed optimizer": Layout(4, f"{CP} 4 {SHARDED} {WIDE}"),
    "CP2 TP2 SP": Layout(4, f"{CP} 2 {TP} 2 {SP} {WIDE}"),
    "PP2 CP2": Layout(4, f"{PP} 2 {CP} 2"),
    "PP2 VPP2 CP2, tied, full recompute": Layout(4, f"{PP} 2 {VPP2} {CP} 2 {FULL}", "tied"),
    "TP2 PP2 SP": Layout(4, f"{TP} 2 {PP} 2 {SP}"),
    "TP2 PP2 VPP2 SP, tied, distributed optimizer": Layout(
        4, f"{TP} 2 {PP} 2 {VPP2} {SP} {SHARDED}", "tied"
    ),
    "PP4, tied": Layout(4, f"{PP} 4", "tied"),
    "DP2 TP2 SP, distributed optimizer": Layout(4, f"{TP} 2 {SP} {SHARDED}"),
    "DP2 PP2 VPP2, tied": Layout(4, f"{PP} 2 {VPP2}", "tied"),
    "DP2 PP2 VPP2, tied, distributed optimizer, overlapped": Layout(
        4, f"{PP} 2 {VPP2} {OVERLAP}", "tied"
    ),
    "DP2 CP2, distributed optimizer": Layout(4, f"{CP} 2 {SHARDED}"),
}
# Training goes on in another layout than the one that saved.
_SHARDED_TP2 = "TP2 SP, distributed optimizer, full recompute"
RESUMED = {
    "TP2 -> PP2": Layout(2, f"{PP} 2", resumes="TP2"),
    "TP2 -> DP2": Layout(2, "", resumes="TP2"),
    "TP2 -> TP2 PP2 SP": Layout(4, f"{TP} 2 {PP} 2 {SP}", resumes="TP2"),
    "EP2 -> EP2 TP2 SP": Layout(4, f"{EP} 2 {TP} 2 {SP}", "experts", resumes="EP2"),
    "EP2, distributed optimizer -> EP4": Layout(
        4, f"{EP} 4 {SHARDED}", "experts", resumes="EP2, distributed optimizer, overlapped"
    ),
    "TP2 SP, experts, full recompute -> PP2": Layout(
        2, f"{PP} 2", "experts", resumes="TP2 SP, experts, full recompute"
    ),
    "TP2 -> 1 rank": Layout(1, "", resumes="TP2"),
    "TP2 SP, distributed optimizer -> PP2": Layout(2, f"{PP} 2 {SHARDED}", resumes=_SHARDED_TP2),
    "TP2 SP, distributed optimizer -> DP2, overlapped": Layout(2, OVERLAP, resumes=_SHARDED_TP2),
    "TP2 SP, distributed optimizer -> PP2 VPP2 CP2": Layout(
        4, f"{PP} 2 {VPP2} {CP} 2 {SHARDED}", resumes=_SHARDED_TP2
    ),
    "TP2 SP, distributed optimizer -> TP2 PP2 SP": Layout(
        4, f"{TP} 2 {PP} 2 {SP} {SHARDED}", resumes=_SHARDED_TP2
    ),
    "TP2 SP, distributed optimizer -> 1 rank": Layout(1, SHARDED, resumes=_SHARDED_TP2),
}

# Mistakes of position ids that the comparison must see. Not among them: the same number added to
# all ids of a stage, which leaves every distance, and so the model, as it is.
FAULTS = {
    "plain": lambda ids: ids.new_tensor(range(ids.size(1))).expand_as(ids),
    "of the next sample": lambda ids: ids.roll(1, 0),
    "of the other chunk": lambda ids: ids.roll(ids.size(1) // 2, 1),
}
BROKEN = {
    "1 rank, plain positions": Layout(1, "", fault="plain"),
    "PP2, plain positions on the last stage": Layout(2, f"{PP} 2", fault="plain"),
    "PP2, the next sample's positions on the last stage": Layout(
        2, f"{PP} 2", fault="of the next sample"
    ),
    "PP2 VPP2, the next sample's positions in the last chunk": Layout(
        2, f"{PP} 2 {VPP2}", fault="of the next sample"
    ),
    "TP2, the next sample's positions on the last rank": Layout(
        2, f"{TP} 2", fault="of the next sample"
    ),
    "CP2, the other chunk's positions on the last rank": Layout(
        2, f"{CP} 2", fault="of the other chunk"
    ),
}
# HybridModel in place of GPTModel; which megatron-core 0.19 is the first to have. A row's twin is
# the same layout of a GPTModel.
HAS_HYBRID = Version(version("megatron-core")) >= Version("0.19")
GPT_BF16 = {name: Layout(2, f"{TP} 2 {SP} --bf16") for name in ("TP2 SP, bf16",)}
_HYBRID = "--model-class hybrid"
_TWINS = LAYOUTS | RESUMED | GPT_BF16
HYBRID = {
    f"{name}, hybrid": replace(_TWINS[name], words=f"{_TWINS[name].words} {_HYBRID}")
    for name in (
        "1 rank, grouped",
        "1 rank, tied",
        "1 rank, biased-normed",
        "1 rank, Baichuan2",
        "DP2, distributed optimizer, overlapped",
        "TP2",
        _SHARDED_TP2,
        "PP2",
        "PP2, tied, full recompute",
        "PP2 VPP2",
        "PP2 VPP2, distributed optimizer, selective recompute",
        "CP2",
        "TP2 SP, bf16",
        "TP2 PP2 SP",
        "TP2 -> PP2",  # from a GPTModel's checkpoint
        "TP2 SP, distributed optimizer -> PP2 VPP2 CP2",
    )
}
# A GPTModel goes on from a HybridModel's checkpoint.
FROM_HYBRID = {
    f"{name}, from hybrid": replace(RESUMED[name], resumes=f"{RESUMED[name].resumes}, hybrid")
    for name in ("TP2 -> 1 rank", "TP2 SP, distributed optimizer -> PP2")
}
ALL = LAYOUTS | BROKEN | RESUMED | (GPT_BF16 | HYBRID | FROM_HYBRID if HAS_HYBRID else {})


def train_each(names: list[str], weights: Path, corpus: str, output: Path) -> None:
    """Trains in each layout; rank 0 appends a row for each to `output`.

    Args:
        names: of ALL.
        weights: folder with a checkpoint of each model; one rank makes what is missing.
        corpus: a --data-path.
    """
    sys.path.insert(0, str(TESTS.parent))
    from pose_megatron.runtime import cpu

    cpu.install()
    import torch.distributed as dist

    from pose_megatron.runtime import distributed

    distributed.initialize(seed=0)
    for model, shape in MODELS.items() if distributed.world_size() == 1 else ():
        if not (weights / model).exists():
            # Of another seed: a layout that did not load them would be seen.
            words = f"{COMMON} {shape} --data-path {corpus} --seed 5 --save {weights / model}"
            train(words.split(), save_at=STEPS, family=FAMILIES.get(model))
    for name in names:
        layout = ALL[name]
        words = f"{COMMON} {layout.words} --data-path {corpus}".split()
        if layout.resumes:
            words += ["--load", str(weights / layout.resumes)]
        else:
            words += ["--load", str(weights / layout.model), "--finetune"]
        if layout.saves:
            words += ["--save", str(weights / name)]
        values = train(words, layout.fault, save_at=SAVE_AT if layout.saves else None)
        if distributed.rank() == 0:
            with output.open("a") as file:
                file.write(json.dumps({"layout": name, **values}) + "\n")
    dist.destroy_process_group()


def train(
    words: list[str],
    fault: str | None = None,
    save_at: int | None = None,
    family: str | None = None,
) -> dict:
    """Up to step STEPS, with pretrain_pose.py's parts.

    Args:
        words: flags of pretrain_pose.py.
        fault: of FAULTS, for `spoil`.
        save_at: the step after which it saves into --save.
        family: of the model, instead of the one that its flags name.

    Returns:
        {"losses": per token of each step, "grad_norms": before clipping, "sample_losses": of every
        sample of every step}, the same on every rank.
    """

    from pose_megatron.config.arguments import parse
    from pose_megatron.config.layout import lay_out
    from pose_megatron.data.batch import fields_here
    from pose_megatron.runtime import distributed
    from pose_megatron.training.run import assemble
    from pose_megatron.training.step import sample_losses, train_step
    from pose_megatron.training.trainer import save, setup

    args = parse(words)
    run = assemble(args)
    run = replace(run, model=replace(run.model, family=family or run.model.family))
    layout = lay_out(args, run.model, distributed.world_size())
    regroup(args, run.model)
    train_set, *_ = run.datasets(
        STEPS * layout.global_batch_size, positions_only="tokens" not in fields_here()
    )
    trainer = setup(run, layout)
    if fault:
        spoil(trainer.stages[-1], FAULTS[fault])
    if train_set is not None:
        train_set = Masked(train_set)
    data = trainer.data_iterator(train_set, trainer.consumed_samples, 0)
    losses, grad_norms, per_sample = [], [], []
    while trainer.iteration < STEPS:
        step = train_step(trainer, data)
        losses.append(step.loss)
        grad_norms.append(step.grad_norm)
        per_sample += sample_losses(trainer, step)
        if trainer.iteration == save_at:
            save(trainer)
    return {"losses": losses, "grad_norms": grad_norms, "sample_losses": per_sample}


class Masked:
    """Samples in which no token of every fifth kind counts, and fewer still in some samples."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        sample = self.dataset[index]
        if "tokens" in sample:
            sample["loss_mask"] = (sample["tokens"] % (2 + index % 5) != 0).astype("int64")
        return sample


def regroup(args, config) -> None:
    """megatron-core's groups for another layout, of the ranks that have met already."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    dist.barrier()
    for group in parallel_state._global_process_group_list[1:]:  # [0] is the world
        dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    p = args.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=p.tensor_model_parallel_size,
        pipeline_model_parallel_size=p.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=p.virtual_pipeline_size(config.num_layers),
        context_parallel_size=p.context_parallel_size,
        expert_model_parallel_size=p.expert_model_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(args.training.seed)


def spoil(stage, change) -> None:
    """On the last rank, changes the position ids on their way into its last stage."""
    import torch.distributed as dist

    if dist.get_rank() == dist.get_world_size() - 1:
        stage.register_forward_pre_hook(
            lambda _, inputs: (inputs[0], change(inputs[1]), *inputs[2:])
        )


def measure(folder: Path, corpus: str) -> dict[str, dict]:
    """Every layout, in one start for each number of ranks: rows by name."""
    output = folder / "rows.jsonl"
    for ranks in (1, 2, 4, 1):
        done = [json.loads(line)["layout"] for line in output.open()] if output.exists() else []
        names = [
            name
            for name, x in ALL.items()
            if x.ranks == ranks
            and name not in done
            and (x.resumes is None or (folder / x.resumes).exists() or ranks > 1)
        ]
        program = [
            __file__,
            "--load",
            str(folder),
            "--data-path",
            corpus,
            "--output",
            str(output),
            "--layouts",
            *names,
        ]
        if ranks > 1:
            program = [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(ranks),
                *program,
            ]
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        # On CPU also where there are GPUs: float32 is the same there everywhere.
        env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        run = subprocess.run(
            [sys.executable, *program], env=env, capture_output=True, text=True, timeout=900
        )
        if run.returncode:
            raise RuntimeError(run.stdout[-2000:] + run.stderr[-6000:])
    return {row.pop("layout"): row for row in map(json.loads, output.read_text().splitlines())}


def deviation(rows: dict[str, dict], name: str) -> tuple[float, float, float]:
    """Of losses, gradient norms and losses of single samples from one rank's, relative, the largest
    of all steps."""
    row, alone = rows[name], rows[ALL[name].reference]
    return tuple(
        max(abs(a - b) / b for a, b in zip(row[key], alone[key][-len(row[key]) :], strict=True))
        for key in ("losses", "grad_norms", "sample_losses")
    )


def table(rows: dict[str, dict]) -> str:
    """Markdown; the references are left out."""
    lines = ["| layout | ranks | loss | gradient norm |", "|---|---|---|---|"]
    for name, layout in ALL.items():
        if name != layout.reference:
            loss, norm, _ = deviation(rows, name)
            label = f"broken: {name}" if layout.fault else name
            lines.append(f"| {label} | {layout.ranks} | {loss:.1e} | {norm:.1e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layouts", nargs="+", help="names, with --output")
    parser.add_argument("--load", type=Path, help="folder of checkpoints; one rank fills it")
    parser.add_argument("--data-path", help="corpus prefix (default: some of Python's library)")
    parser.add_argument("--output", type=Path, help="append one JSON row per layout here")
    args = parser.parse_args()
    if args.output:
        train_each(args.layouts, args.load, args.data_path, args.output)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(table(measure(Path(folder), args.data_path or stdlib_corpus(folder))))


def stdlib_corpus(folder: str) -> str:
    sys.path.insert(0, str(TESTS.parent))
    from tests.conftest import EOD, STDLIB, write_corpus

    library = Path(sysconfig.get_path("stdlib"))
    documents = [[*(library / f"{name}.py").read_bytes(), EOD] for name in STDLIB]
    return write_corpus(Path(folder) / "text_document", documents)


if __name__ == "__main__":
    main()
