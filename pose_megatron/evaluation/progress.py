"""Progress of an evaluation on stderr: a bar on a terminal, else a line from time to time."""

import sys

from tqdm import tqdm

from pose_megatron.evaluation.reading import Reader
from pose_megatron.evaluation.record import Record
from pose_megatron.evaluation.replicas import replicas
from pose_megatron.runtime.ranks import print_rank_0, rank

_SECONDS = 30  # between two lines


class Progress(tqdm):
    """Tokens read by all replicas, with rate and time left; on rank 0.

    Args:
        name: of the model.
        total: tokens to read.
    """

    def __init__(self, name: str, total: int):
        seconds = 0.1 if sys.stderr.isatty() else _SECONDS
        super().__init__(
            desc=name,
            total=total,
            unit="token",
            unit_scale=True,
            disable=rank() != 0,
            mininterval=seconds,
            maxinterval=seconds,
            leave=False,
        )

    def follow(self, reader: Reader, record: Record) -> None:
        """Counts what this replica's reader reads, as all do, and what the record has already."""
        reader.progress = lambda tokens: self.update(tokens * replicas())
        record.skipped = self.skip

    def skip(self, tokens: int) -> None:
        """Counts what an earlier run has read: it is done, and not this run's speed."""
        if not self.disable:
            self.n += tokens
            self.initial += tokens
            self.last_print_n += tokens

    def close(self):
        """Overrides tqdm's, which would end an empty line."""
        if sys.stderr.isatty():
            super().close()
        else:
            self.disable = True

    def say(self, text: str) -> None:
        """Prints a line on rank 0, above the bar."""
        self.clear()
        print_rank_0(text)

    def display(self, msg=None, pos=None):
        """Overrides tqdm's, which redraws a line that a file cannot take back."""
        if sys.stderr.isatty():
            return super().display(msg, pos)
        if msg is None and 0 < self.n < (self.total or 0):
            done = {**self.format_dict, "ncols": None, "ascii": True}
            print(self.format_meter(**done), file=sys.stderr, flush=True)
        return True
