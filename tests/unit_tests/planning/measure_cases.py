"""Measures the cases of test_plan.py in a process of its own, as planning needs one; JSON out."""

import json
import sys

from pose_megatron.planning.gpus import GPUS, hide_gpus

hide_gpus()

from pose_megatron.runtime.startup import prepare_megatron

prepare_megatron()

from pose_megatron.config.arguments import parse
from pose_megatron.planning.plan import job, layout_of, model_of
from pose_megatron.planning.search import search


def planned(case):
    args = parse(case["flags"], trains=False)
    return job(args, model_of(args), case["gpus"])


def row(stage):
    return {
        "peak": stage.peak,
        "parameters": stage.parameters,
        "memory": stage.memory,
        "gemm": stage.batch.gemm,
        "attention": stage.batch.attention,
        "waits": (stage.batch.waits, stage.step.waits),
        "sent": stage.batch.sent,
        "sent_once": stage.step.sent,
    }


cases = json.load(sys.stdin)
found = {}
for name, case in cases["stages"].items():
    this = planned(case)
    numbers = range(this.run.args.parallel.pipeline_model_parallel_size)
    found[name] = [row(this.stage(n, case.get("whole", False))) for n in numbers]
wanted = cases["search"]
layouts, tried = search(
    planned(wanted), wanted["room"], GPUS["H100"].rates, wanted["count"], lambda text: None
)
found["search"] = [
    {"layout": layout_of(each.job), "peak": each.peak, "seconds": each.prediction.step}
    for each in layouts
]
print(json.dumps(found))
