"""How a rank writes its files of a checkpoint: in threads, with a word of what went wrong.

megatron-core's own writers can lose a failure. Those of 0.16.1 are processes, and it waits for ever
for one that was killed; those of 0.19 are threads, and it turns the reason, such as a full disk,
into a bare assertion. Both report through a manager process, whose death is a "Broken pipe".
"""

import pickle
import queue
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from pose_megatron.runtime.processes import children_end_with_this


class Results:
    """What became of a rank's files, from the process that wrote them: the rank, or a fork of it.

    A file that both have open holds it, so that no third process is needed.
    """

    def __init__(self):
        self.file = tempfile.TemporaryFile()

    def put(self, results: dict | Exception) -> None:
        self._clear()
        pickle.dump(results, self.file)
        self.file.flush()

    def get_nowait(self) -> dict | Exception:
        """What was put last; after the writer has ended."""
        self.file.seek(0)
        try:
            return pickle.load(self.file)
        except EOFError:
            return ChildProcessError(
                "the process that wrote it was killed, perhaps because memory ran out"
            )
        finally:
            self._clear()

    def _clear(self) -> None:
        self.file.seek(0)
        self.file.truncate()


def report_failures() -> None:
    """Has megatron-core write in this way."""
    if isinstance(filesystem_async._results_queue, Results):
        return
    children_end_with_this()  # the fork that writes in the background
    filesystem_async._results_queue = Results()
    for name in ("write_preloaded_data_multiproc", "write_preloaded_data_multithread"):
        if hasattr(FileSystemWriterAsync, name):  # 0.16.1, 0.19
            setattr(FileSystemWriterAsync, name, staticmethod(_write))


def _write(transforms: list, use_msc: bool, rank: int, buckets: list, results: Results) -> None:
    """Writes a file for each bucket; arguments as megatron-core gives them."""
    write = partial(_write_bucket, transforms, use_msc)
    try:
        with ThreadPoolExecutor(max(len(buckets), 1)) as threads:
            written = dict(threads.map(write, range(len(buckets)), buckets))
    except Exception as error:
        results.put(error)
    else:
        results.put(written)


def _write_bucket(transforms: list, use_msc: bool, index: int, bucket) -> tuple[int, list]:
    """Writes one file; returns its index and megatron-core's results."""
    reported: queue.Queue = queue.Queue()
    begun: queue.Queue = queue.Queue()
    begun.put(index)
    FileSystemWriterAsync.write_preloaded_data(
        transforms, index, bucket, reported, begun, use_fsync=True, use_msc=use_msc
    )
    index, written = reported.get_nowait()
    if isinstance(written, Exception):
        raise written
    return index, written
