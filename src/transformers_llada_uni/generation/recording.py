"""Steps recorded as CUDA graphs, their buffers, and which of them a model keeps."""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..kernels import has_grouped_mm_kernel, is_fused, is_kernel_device
from ..kernels.groupwise_modules import GroupwiseExperts
from ..weight_hooks import is_hooked
from .cache import BlockDiffusionCache
from .state import BlockState
from .step import DenoisingStep


logger = logging.get_logger(__name__)

# Steps of so many kinds (shapes and settings) are kept for a model, and at most so many bytes of their buffers (those
# of the last call in any case).
MAX_KINDS = 8
MAX_BYTES = 2 * 2**30
# Buffers are as long as the shortest of these that will do, so that canvases of different lengths share them.
BUFFER_LENGTHS = tuple(1024 * 2**power for power in range(32))
# The prompt is forwarded in pieces of so many tokens of all rows together, the last one filled up; the buffers have
# room for that. The same number for any number of rows, so that kernels are the same.
PIECES = (2048, 512)
RECORDABLE_DEVICES = ("cuda",)
LONGEST_WAIT = 30.0  # seconds, for another thread that works with what a model keeps recorded


_recording_lock = threading.RLock()


@functools.cache
def _recording_stream(device: int) -> torch.cuda.Stream:
    """torch's own is one of the first GPU, for all; and libraries keep working memory for every new one."""
    return torch.cuda.Stream(device)


class CudaGraph:
    """
    A program of tensors recorded on a GPU; recording does not run it.

    Args:
        program: Changes tensors that outlive it, and allocates none that does.
        pool ([`GraphPool`]): Memory for what it allocates.
    """

    def __init__(self, program: Callable[[], object], pool: "GraphPool"):
        self.graph = torch.cuda.CUDAGraph()
        stream = _recording_stream(torch.cuda.current_device())
        try:
            # torch records one graph at a time in a process, and does not go back to the stream before if that fails.
            # Other threads may go on with what a recording thread may not do.
            with (
                _recording_lock,
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(self.graph, pool=pool.handle, stream=stream, capture_error_mode="thread_local"),
            ):
                program()
        except BaseException:
            # torch would take the device's random numbers for those of the recording for ever.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            raise

    def replay(self) -> None:
        self.graph.replay()


class GraphPool:
    """
    Memory of graphs that never run at the same time.

    torch lets go of a pool with its last graph, and fails if another one then asks for it: an empty graph keeps it.
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Another place for graphs to come, as torch records nothing more where a recording was broken off."""
        self.handle = torch.cuda.graph_pool_handle()
        self._keeper = CudaGraph(lambda: torch.zeros(1, device="cuda"), self)


class StaticBuffers:
    """
    All that steps of one kind read and write, at addresses that stay; and, where they are recorded, their graphs.

    Args:
        backbone: The model without its head.
        state ([`BlockState`]): Of the block.
        step ([`DenoisingStep`]): Works on that state.
        num_columns (`int`): Columns of the canvas.
        pool: For graphs. `None`: nothing is recorded.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        state: BlockState,
        step: DenoisingStep,
        num_columns: int,
        pool: GraphPool | None,
    ):
        num_branches, num_rows, block_length = state.tokens.shape
        device = state.tokens.device
        self.state, self.step = state, step
        # Whole blocks: a block that is forwarded in parts would not see all of itself.
        self.pieces = {
            length: torch.zeros(num_branches, num_rows, length, dtype=torch.long, device=device)
            for length in self._piece_lengths(num_branches * num_rows, block_length)
        }
        needed = num_columns + min(self.pieces)
        self.length = needed if pool is None else next(length for length in BUFFER_LENGTHS if length >= needed)
        self.cache = BlockDiffusionCache(backbone.config.num_hidden_layers, self.length)
        self.cache.make_static(backbone.config, num_branches * num_rows, backbone.dtype, device)
        self.padding = torch.zeros(num_branches, num_rows, dtype=torch.long, device=device)
        self.context = torch.zeros_like(state.tokens)
        self.first_columns = torch.zeros(num_rows, 1, dtype=torch.long, device=device)
        self.pool = pool
        self._graphs: dict[str, CudaGraph] = {}
        self._has_run: set[str] = set()
        self._refused: set[str] = set()  # what could not be recorded

    @staticmethod
    def _piece_lengths(batch_size: int, block_length: int) -> list[int]:
        """In columns, the longest first."""
        lengths = {max(piece // batch_size // block_length, 1) * block_length for piece in PIECES}
        return sorted(lengths, reverse=True)

    def will_do(self, num_columns: int) -> bool:
        """Whether the buffers are long enough for a canvas of so many columns."""
        return num_columns + min(self.pieces) <= self.length

    def run(self, name: str, program: Callable[[], None]) -> None:
        """
        Runs the program of this name, which is the same at every call: as it is at first, which compiles its kernels
        and takes the memory of its libraries; from its second run on recorded.
        """
        is_new = name not in self._graphs and name not in self._refused
        if self.pool is not None and name in self._has_run and is_new:
            try:
                self._graphs[name] = CudaGraph(program, self.pool)
            except RuntimeError as error:  # out of memory, or something that cannot be recorded
                self.pool.renew()
                self._refused.add(name)
                logger.warning_once(f"Steps of generation are not recorded as CUDA graphs, and so slower: {error}")
            except BaseException:
                self.pool.renew()
                raise
        if name in self._graphs:
            self._graphs[name].replay()
        else:
            program()
            self._has_run.add(name)


MakeBuffers = Callable[[GraphPool | None], StaticBuffers]


class Recordings:
    """What a model keeps recorded, the least recently used first. One thread works with it at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._kept: OrderedDict[Hashable, StaticBuffers] = OrderedDict()
        self.fingerprint: Hashable = None
        self._last_use: torch.cuda.Event | None = None
        self.pool: GraphPool | None = None

    @contextmanager
    def borrow(
        self, kind: Hashable, fingerprint: Hashable, num_columns: int, make: MakeBuffers
    ) -> Iterator[StaticBuffers]:
        """
        Buffers and graphs of a kind of steps, for this thread alone until it leaves. Who has waited for
        `LONGEST_WAIT` while others work with them, or cannot wait as it has borrowed others (in a callback of
        generation), gets buffers of its own, whose steps are not recorded.

        Args:
            kind: All that a recorded step holds fixed, but for what follows.
            fingerprint: Of the model: where its weights are. A graph reads them there.
            num_columns: Columns of the canvas.
            make: Makes them, given the pool, where there are none yet that will do.
        """
        may_wait = getattr(_borrowed, "count", 0) == 0
        if not self._lock.acquire(timeout=LONGEST_WAIT if may_wait else 0):
            yield make(None)
            return
        try:
            self._owner, _borrowed.count = threading.get_ident(), getattr(_borrowed, "count", 0) + 1
            if self._last_use is not None:
                self._last_use.wait()  # another thread's stream may still be at work
            with torch.inference_mode(False):  # what is kept must do for calls outside of it as well
                buffers = self._find(kind, fingerprint, num_columns, make)
            yield buffers
        finally:
            # Whatever thread ends an abandoned generator: the lock is let go.
            self._owner, _borrowed.count = None, max(getattr(_borrowed, "count", 0) - 1, 0)
            try:
                self._last_use = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
            finally:
                self._lock.release()

    def _find(self, kind: Hashable, fingerprint: Hashable, num_columns: int, make: MakeBuffers) -> StaticBuffers:
        if self.fingerprint != fingerprint:  # another model by now, perhaps on another device
            self._kept.clear()
            self.fingerprint, self.pool = fingerprint, GraphPool()
        buffers = self._kept.pop(kind, None)
        if buffers is None or not buffers.will_do(num_columns):
            buffers = None  # its memory serves the new ones
            buffers = make(self.pool)
        self._kept[kind] = buffers
        buffers.cache.reset()
        while len(self._kept) > 1 and (len(self._kept) > MAX_KINDS or self.num_bytes > MAX_BYTES):
            self._kept.popitem(last=False)
        return buffers

    @property
    def num_bytes(self) -> int:
        """Of all keys and values that are kept."""
        return sum(buffers.cache.num_bytes for buffers in self._kept.values())

    def release(self, wait: bool = True) -> None:
        """Lets go of all graphs and buffers; of those in use as soon as they are not. `wait`: for other threads."""
        is_own = self._owner == threading.get_ident()
        if not is_own and not self._lock.acquire(blocking=wait):
            return
        try:
            self._kept.clear()
            self.fingerprint = self.pool = None
        finally:
            if not is_own:
                self._lock.release()


_borrowed = threading.local()  # how many this thread has borrowed
_RECORDINGS: WeakKeyDictionary[nn.Module, Recordings] = WeakKeyDictionary()
_RECORDINGS_LOCK = threading.Lock()


def recordings_of(backbone: nn.Module) -> Recordings:
    """Those of a model; not an attribute of it, as graphs can be neither copied nor saved."""
    with _RECORDINGS_LOCK:
        return _RECORDINGS.setdefault(backbone, Recordings())


def release_unused(backbone: nn.Module) -> None:
    """Lets go of what a model keeps that has left its place, as offloaded to a CPU; not while a thread uses it."""
    recordings = _RECORDINGS.get(backbone)
    if recordings is not None:
        recordings.release(wait=False)


def why_not_static(backbone: PreTrainedModel, head: nn.Module) -> str | None:
    """What stands against steps in static buffers, which the kernels for GPUs go by. `None`: nothing."""
    tensors = [*backbone.parameters(), *backbone.buffers(), *head.parameters()]
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        return f"the model is spread over {', '.join(sorted(map(str, devices)))}"
    if next(iter(devices)).type not in RECORDABLE_DEVICES:
        return f"the model is on {next(iter(devices))}, not on a GPU of CUDA"
    if any(is_hooked(module) for module in (*backbone.modules(), head)):
        return "the model has hooks, such as those that offload its weights"
    if backbone.config._attn_implementation not in ("sdpa", "eager"):
        return f"`attn_implementation={backbone.config._attn_implementation!r}` takes no 4-D mask"
    if any(module._compiled_call_impl or hasattr(module, "_orig_mod") for module in backbone.modules()):
        return "the backbone is compiled"
    if torch.is_autocast_enabled(next(iter(devices)).type):
        return "autocast is on"
    return None


def why_not_recorded(backbone: PreTrainedModel, head: nn.Module) -> str | None:
    """What stands against recording steps of a model, where nothing stands against static buffers. `None`: nothing."""
    experts_implementation = backbone.config._experts_implementation
    # The others decide by values of tensors, as `grouped_mm` does where it has no kernel.
    is_recordable = experts_implementation in ("triton", "batched_mm")
    if experts_implementation == "grouped_mm":
        is_recordable = has_grouped_mm_kernel(backbone.device, backbone.dtype)
    if not is_recordable:
        return f"`experts_implementation={experts_implementation!r}` may read values of tensors"
    modules = (*backbone.modules(), head)
    if any(type(module).__module__.startswith("torch.distributed") for module in modules):
        return "the model is sharded"
    if any(type(module).__module__.partition(".")[0] == "peft" for module in modules):
        return "adapters, which may be switched, are not merged into the model"
    is_quantised = any(isinstance(module, GroupwiseExperts) for module in modules)
    if is_quantised and not is_kernel_device(next(backbone.parameters()).device):
        return "quantised experts are computed one by one on this device, by what the router chose"
    kinds = {type(tensor) for module in modules for tensor in module.parameters(recurse=False)}
    if kinds - {nn.Parameter}:
        return f"weights are {', '.join(sorted(kind.__name__ for kind in kinds - {nn.Parameter}))}"
    if backbone.training:
        return "the model is in training mode"
    return None


def fingerprint_of(backbone: PreTrainedModel, head: nn.Module) -> Hashable:
    """Where all tensors of a model are, and how it computes."""
    tensors = [*backbone.parameters(), *backbone.buffers(), *head.parameters()]
    places = tuple((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors)
    switches = is_fused(), torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    return places, str(vars(backbone.config)), *switches
