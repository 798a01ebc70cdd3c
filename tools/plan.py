"""The same as `pose-megatron plan`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from pose_megatron.runtime.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()
    from pose_megatron.commands.__main__ import run

    sys.exit(run("plan"))
