"""Flags of the programs that show results of evaluations."""

import argparse

from pose_megatron.runtime.cli import positive


def add_results_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("results", nargs="+", help="files of JSON lines")
    add("--window", type=positive, help="mark this window, in tokens")
    add(
        "--apart",
        action="store_true",
        help="draw unlike results of one name also where they share no context length, and were "
        "perhaps meant as one curve",
    )
