"""What a run will need, before there is a GPU: memory by stage, work, traffic and time."""

import argparse
import json
import logging
import warnings

from pose_megatron.config import arguments
from pose_megatron.errors import ConfigError
from pose_megatron.planning.gpus import GPUS, hide_gpus, named, rates
from pose_megatron.runtime.cli import command, positive, progress
from pose_megatron.runtime.ranges import real

EPILOG = """examples:
  # a checkpoint, or a Hugging Face folder of which only config.json need be there
  python tools/plan.py --gpus 64 --gpu H100 --load models/Llama-3-8B --seq-length 8192 \\
      --max-position-embeddings 131072 --rope-scaling yarn --bf16 \\
      --tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer

  # which layouts fit, the fastest first
  pose-megatron plan --search --gpus 64 --gpu H100 <the same flags>"""


def parse() -> tuple[argparse.Namespace, list[str]]:
    """This program's own flags, and the flags of the run."""
    parser = argparse.ArgumentParser(
        description="Runs one step of a pretrain_pose.py run on the meta device, as one rank of "
        "each pipeline\nstage, and says what it takes, for PoSE on windows of L tokens and for "
        "training on all T.\nNo GPU is needed, and no weight is read. Give it the flags of the "
        "run; --load may also be a\nHugging Face folder.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--gpus", type=positive, required=True, help="GPUs of the job")
    add("--gpu", default="H100", help=f"their kind: {', '.join(GPUS)} [H100]")
    add("--gpu-memory", type=real(above=0), metavar="GIB", help="of one, instead of its kind's")
    add(
        "--reserve",
        type=real(at_least=0),
        default=4.0,
        metavar="GIB",
        help="kept free for what no tensor is: CUDA's context, NCCL's buffers, fragments [4]",
    )
    add(
        "--rates",
        metavar="RATES",
        help="what a GPU attains, as gemm=650,attention=450,memory=2.55,link=360,network=40 "
        "(TFLOP/s, TFLOP/s, TB/s, GB/s, GB/s) or a JSON file of these; default: shares of its "
        "data sheet, which are assumed",
    )
    add(
        "--search",
        type=positive,
        nargs="?",
        const=5,
        metavar="COUNT",
        help="instead of the layout that is given, find so many that fit [5]",
    )
    add(
        "--all-layers",
        action="store_true",
        help="run every layer; default: two and three in each model chunk, and the line through "
        "them, which comes to the same",
    )
    add("--json", action="store_true", help="print JSON instead")
    return parser.parse_known_args()


@command
def main() -> None:
    flags, argv = parse()
    gpu = named(flags.gpu)
    attained = rates(gpu, flags.rates)
    args = arguments.parse(argv, trains=False)
    memory = flags.gpu_memory or gpu.memory
    if flags.reserve >= memory:
        raise ConfigError(f"--reserve {flags.reserve:g} leaves nothing of {memory:g} GiB")
    hide_gpus()
    from pose_megatron.runtime.startup import prepare_megatron

    prepare_megatron()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    from pose_megatron.planning import page
    from pose_megatron.planning.plan import job, model_of
    from pose_megatron.planning.search import search

    say = progress("plan")
    planned = job(args, model_of(args), flags.gpus)
    machine = page.Machine(flags.gpu, memory, flags.reserve, attained)
    if flags.search:
        found, tried = search(planned, machine.room, attained, flags.search, say)
        if flags.json:
            print(json.dumps(page.search_to_dict(found, tried, machine), indent=2))
        else:
            print(page.search_page(planned, found, tried, machine))
        if not found:
            raise ConfigError(page.nothing_fits(planned, machine))
        return
    plan = page.measure(planned, machine, say, flags.all_layers)
    print(json.dumps(plan.to_dict(), indent=2) if flags.json else str(plan))
    if not plan.fits:
        say("looking for what helps")
        raise ConfigError(plan.too_small())
