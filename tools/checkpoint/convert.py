"""Megatron-LM's name for `pose-megatron convert`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed

from pose_megatron.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
