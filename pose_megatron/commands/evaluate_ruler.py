"""RULER's tasks of a model at several context lengths."""

import argparse

from pose_megatron.commands.haystack_flags import add_haystack_flags, open_haystack, open_record
from pose_megatron.commands.target_flags import add_target_flags
from pose_megatron.evaluation.tasks import TASKS, Settings
from pose_megatron.evaluation.words import KINDS
from pose_megatron.runtime.cli import command
from pose_megatron.runtime.ranges import whole
from pose_megatron.runtime.startup import prepare_megatron


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="The tasks of RULER (Hsieh et al., 2024) in our own words, as text to be\n"
        "continued: needles, chains of variables, and which words of a list stand most often.\n"
        "The score is the share of what is asked for that stands in what the model writes.\n"
        "Text, question and room for the answer have exactly the context length.",
        epilog="example:\n  python tools/evaluate_ruler.py --load checkpoints/pose --bf16 \\\n"
        "      --context-lengths 4096 16384 65536 --trials 20 --output results.jsonl\n"
        "  python tools/plot_results.py results.jsonl --metric ruler --output ruler.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_target_flags(parser)
    add = parser.add_argument
    add(
        "--tasks",
        choices=list(TASKS),
        nargs="+",
        default=list(TASKS),
        metavar="TASK",
        help=f"some of {', '.join(TASKS)} [all]",
    )
    add(
        "--needles",
        type=whole(1, 1000),
        default=Settings.needles,
        help="names of multi-key and multi-query, values of multi-value [4]",
    )
    add(
        "--hops",
        type=whole(1, 1000),
        default=Settings.hops,
        help="of a chain of variables [4]",
    )
    for what in ("keys", "values"):
        default = getattr(Settings, what)
        help = f"kind of the needles' {'names' if what == 'keys' else 'values'} [{default}]"
        add(f"--{what}", choices=list(KINDS), default=default, help=help)
    add_haystack_flags(parser, "all that is drawn")
    return parser.parse_args()


@command
def main() -> None:
    flags = parse()
    prepare_megatron(flags.device)

    from pose_megatron.evaluation import ruler
    from pose_megatron.evaluation.haystack import Haystack, check_vocabulary
    from pose_megatron.evaluation.progress import Progress
    from pose_megatron.evaluation.shares import effective_length

    target, tokenizer, hay, first = open_haystack(flags)
    tasks = list(dict.fromkeys(flags.tasks))
    sizes = {name: getattr(flags, name) for name in ("needles", "hops", "keys", "values")}
    settings = Settings(**sizes)

    def texts(task: str, length: int, trials: int) -> list[Haystack]:
        made = ruler.haystacks(
            task, tokenizer.tokenize, hay, length, range(trials), settings, flags.seed, first
        )
        check_vocabulary(made, target.model.vocab_size)
        return made

    # One text of each, before the weights are read; the others are made when they are read.
    cells = [(length, task) for length in target.lengths for task in tasks]
    tokens = sum(texts(task, length, 1)[0].cost * flags.trials for length, task in cells)
    reader = target.open_reader(flags.batch_tokens)
    record = open_record(flags, target, "ruler", **sizes)

    means = {}
    with Progress(target.name, tokens) as bar:
        bar.follow(reader, record)
        asking = ruler.Ruler(reader, tokenizer.detokenize, record)
        for length in target.lengths:
            here = f"{target.name}: context {length:>7,}"
            shares = []
            for task in tasks:
                answers = asking.answers(texts(task, length, flags.trials), length, task=task)
                row = ruler.summary(answers, flags.trials)
                shares.append(row["ruler"])
                bar.say(
                    f"{here}  {task:14}  {row['ruler']:6.1%}  "
                    f"(95 % interval {row['low']:.0%} to {row['high']:.0%})"
                )
                record.finish({"task": task, "context_length": length, **row})
            means[length] = sum(shares) / len(shares)
            bar.say(f"{here}  {'mean of ' + str(len(tasks)):14}  {means[length]:6.1%}")
        bar.say(
            f"{target.name}: effective context length "
            f"{effective_length(means, flags.threshold):,} (at all lengths up to it the mean of "
            f"{', '.join(tasks)} is at least {flags.threshold:.0%})"
        )
