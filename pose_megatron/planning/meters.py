"""What operators cost: FLOPs, bytes of memory read and written, bytes sent to other ranks.

Each is read off the operators that the trainer really calls, by their tensors' shapes.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pose_megatron.planning.ledger import Ledger

# What a ring sends for each byte of the whole, times (n - 1) / n; NVIDIA's nccl-tests call it the
# bus bandwidth's factor.
_ALL_REDUCE = 2
_DATALESS = ("barrier", "monitored_barrier_", "recv_", "recv_any_source_")
# Elements in a block of an operator over many tensors, and blocks in a launch, of a PyTorch that is
# built with CUDA 13 (ATen/native/cuda/MultiTensorApply.cuh).
_CHUNK, _BLOCKS = 65536, 2240
# Kernels and copies of operators that are several, as tests/fake_gpu counts them.
_SEVERAL = {
    "embedding_dense_backward": 2,
    "index_put": 2,
    "_scaled_dot_product_flash_attention_backward": 3,
}
# The embedding's gradient sorts more tokens than these, by so many kernels more.
_UNSORTED, _SORTING = 3072, 17
_UNTOUCHED = (
    *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"),
    *("detach", "_unsafe_view"),
)


class Meters(TorchDispatchMode):
    """Watches every operator while it lasts; collectives end at once, and nothing is sent.

    Attributes:
        phase: what the trainer is doing; counts are kept apart by it.
        vocabulary: this rank's share of it; tensors of that width are logits. None: no such layer.
        memory: of all tensors.
        moments: {phase that is over: what the memory held where it was fullest}.
        gemm, attention: {phase: FLOPs}.
        moved: {phase: bytes that other operators read and write}.
        launches: {phase: kernels and copies}, collectives among them.
        waits: {phase: how often the host fetches a number, and so waits for the GPU}.
        sent: {(phase, name of the process group, or `pipeline` for the next stage): bytes that this
            rank sends}.
    """

    def __init__(self):
        super().__init__()
        self.phase = "setup"
        self.vocabulary: int | None = None
        self.memory = Ledger()
        self.moments: dict[str, dict[str, int]] = {}
        self.gemm: Counter[str] = Counter()
        self.attention: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.sent: Counter[tuple[str, str]] = Counter()

    def enter(self, phase: str) -> None:
        """Begins a phase."""
        self.moments[self.phase] = self.memory.fullest
        self.memory.restart()
        self.phase = phase

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._collective(func, args)
        if func is torch.ops.aten._local_scalar_dense.default:
            if not args[0].is_meta:  # on the host, and at hand
                return func(*args, **kwargs)
            self.waits[self.phase] += 1
            return 1.0
        # Weight gradients that are added up; before PyTorch 2.12 the meta device cannot do it.
        added_up = func.overloadpacket is torch.ops.aten.addmm and "out" in kwargs
        out = kwargs["out"] if added_up else func(*args, **kwargs)
        results = list(_tensors(out))
        for tensor in results:
            self.memory.enter(tensor.untyped_storage(), self._part(tensor))
        kind = _kind(func)
        if kind:
            self.launches[self.phase] += _launches(func, args)
        if kind == "attention":
            self.attention[self.phase] += _attention_flops(func, args)
        elif kind == "gemm":
            formula = flop_registry[func.overloadpacket]
            # without a dtype of the result, which the formulas do not know
            operands = [a for a in args if not isinstance(a, torch.dtype)]
            self.gemm[self.phase] += formula(*operands, **kwargs, out_val=out)
        elif kind == "memory":
            operands = [*_tensors(args), *_tensors(list(kwargs.values()))]
            self.moved[self.phase] += sum(t.nbytes for t in [*operands, *results])
        return out

    def _part(self, tensor: torch.Tensor) -> str:
        if self.phase == "batches" and tensor.shape[-1:] == (self.vocabulary,):
            return "logits"
        return "update" if self.phase == "update" else "activations"

    def _collective(self, func, args):
        """Counts what this rank sends, and returns as if all had arrived."""
        name = func.overloadpacket.__name__
        if name not in _DATALESS:
            self.launches[self.phase] += 1
            group = next(
                dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject)
            )
            n = group.size()
            whole = max(
                sum(t.nbytes for t in _tensors(a))
                for a in args[:2]
                if not isinstance(a, torch.ScriptObject)
            )
            if n == 1 or name not in ("broadcast_", "send"):
                whole = whole * (n - 1) // n
            if name.startswith("allreduce"):
                whole *= _ALL_REDUCE
            # Of two stages, megatron-core has one send over the whole world's group.
            over = "pipeline" if name == "send" else group.group_name
            self.sent[self.phase, over] += whole
        work = FakeWork().boxed()
        returned = len(func._schema.returns)
        return work if returned == 1 else (args[0], work) if returned == 2 else None


@functools.cache
def _kind(func) -> str:
    """What an operator's time goes into: gemm, attention, memory, or nothing."""
    if func.overloadpacket in flop_registry:
        return "attention" if "attention" in func.__name__ else "gemm"
    if func.is_view or func.overloadpacket.__name__ in _UNTOUCHED:
        return ""
    return "memory"


def _launches(func, args) -> int:
    """How many kernels an operator is."""
    name = func.overloadpacket.__name__
    if name.startswith(("_foreach_", "_fused_")):
        blocks = sum(math.ceil(t.numel() / _CHUNK) for t in args[0])
        before_and_after = 2 * (name == "_foreach_norm")
        return max(1, math.ceil(blocks / _BLOCKS)) + before_and_after
    several = _SEVERAL.get(name, 1)
    if name == "embedding_dense_backward":
        several += _SORTING * (args[1].numel() > _UNSORTED)
    elif _kind(func) == "attention" and "backward" in name:
        _, query, key = args[:3]
        several += 2 * (query.size(1) != key.size(1))  # sums over the heads of a group
    return several


def _tensors(value) -> Iterator[torch.Tensor]:
    """The tensors in an operator's argument or result."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _attention_flops(func, args) -> int:
    """Of causal attention, whose last query sees all keys; of each head of the queries.

    torch's own formulas refuse grouped queries before PyTorch 2.12.
    """
    backward = "backward" in func.__name__
    query, key, value = args[1:4] if backward else args[:3]
    samples, heads, tokens, width = query.shape
    pairs = samples * heads * tokens * (key.size(-2) - tokens / 2)
    # Products over the width of a head and over that of its values; backward, the scores again.
    widths = 3 * width + 2 * value.size(-1) if backward else width + value.size(-1)
    return int(2 * pairs * widths)
