"""Megatron-LM's name for `pose-megatron merge`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from pose_megatron.commands.merge import main

if __name__ == "__main__":
    sys.exit(main())
