"""A stand-in for a GPU, so that what runs only beside one can be gone through without: campaigns, the tuner, the bench.

``python tests/stand_in_gpu.py campaign --dtype float16 --scale cpu --no-compile ...`` is the command line beside it,
and ``python tests/stand_in_gpu.py pytest tests/test_gpu.py -k ...`` runs tests. ``torch.cuda`` says that there is a
device, and tensors say that they are on ``cuda:0``; their values are on the CPU, where torch computes on them and
Triton's interpreter runs the kernels. As on a GPU, a CPU tensor among those of the device is refused, a captured graph
makes its calls again when it is replayed, and in a capture nothing waits for the device or moves values to or from it.

It finds mistakes of the program around a GPU, and says nothing of a GPU: its times are made up. Kernels in bfloat16
are wrong here, as in Triton's interpreter: float16 is right. Needs a C++ compiler.

It is the GPU that stand_in_facts.py describes. Its choices go to the folder that ``TRITONCONV_CACHE`` names, else to
one that ends with the process: never to those of a GPU.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

if "STAND_IN_GPU" in os.environ:  # the compiled stand_in_gpu.cpp, before torch
    native = ctypes.CDLL(os.environ["STAND_IN_GPU"])
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from stand_in_facts import CAPABILITY, NAME, PROPERTIES, own_store
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

COMPILER = os.environ.get("CXX", "g++")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# Microseconds on the clock of the device: kernels win, so that they are chosen, captured and benchmarked.
PRODUCT, OTHER, LAUNCH = 1000, 1, 10
HOST, HOST_LAUNCH = 4, 4  # of the host, for an operation and for a kernel: one choice is the best for all calls
MHZ = 1980
SECONDS = 3000  # of a campaign beside it; its pieces are short

# Both clocks, the graph that is being captured, and the current device's index: another GPU's where a test says so.
now = SimpleNamespace(us=0, host_us=0, graph=None, device=GPU.index)


class OnGpu(torch.Tensor):
    """A tensor that says that it is on the GPU; ``host`` holds its values."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, host.stride(), host.storage_offset(), dtype=host.dtype, device=GPU
        )
        made.host = host
        return made

    def __init__(self, host: torch.Tensor) -> None:
        pass

    def __repr__(self, **how) -> str:
        return f"{self.host!r} on {self.device}"

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        mixed = any(_elsewhere(each) and each.dim() for each in tree_leaves((args, kwargs)))
        if mixed and op is not torch.ops.aten.copy_.default:
            raise RuntimeError(f"{op}: Expected all tensors to be on the same device, but found cuda:0 and cpu")
        target = kwargs.get("device")
        to_cpu = target is not None and torch.device(target).type == "cpu"
        call = partial(op, *_hosts(args), **_hosts(kwargs) | ({} if target is None else {"device": CPU}))
        name, back = op.overloadpacket.__name__, [each.alias_info for each in op._schema.returns]
        view = any(back) and not any(each.is_write for each in back if each)  # no kernel: nothing for the device
        found = _run(call, 0 if view else PRODUCT if "conv" in name or name.endswith("mm") else OTHER)
        if mixed or to_cpu or not _tensors(found):
            synchronize()
        wrapped = tree_map_only(torch.Tensor, lambda each: each if isinstance(each, OnGpu) else OnGpu(each), found)
        return found if to_cpu else return_and_correct_aliasing(op, args, kwargs, wrapped)


def _elsewhere(value) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, OnGpu)


def _hosts(tree):
    return tree_map_only(OnGpu, lambda each: each.host, tree)


def _tensors(tree) -> list[torch.Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)]


def _run(call: Callable, us: int):
    """The answer of a call on the device, which takes so long; a graph that is being captured keeps it."""
    now.us += us
    now.host_us += HOST_LAUNCH if us == LAUNCH else HOST if us else 0
    found = call()
    if now.graph is not None:
        now.graph.calls.append((call, us, _tensors(found)))
    return found


def synchronize(device=None) -> None:
    """Functions that wait for the device."""
    if now.graph is not None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


class CUDAGraph:
    """The calls of a capture; a replay makes them again, in the same memory."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable, int, list[torch.Tensor]]] = []

    def replay(self) -> None:
        for call, us, kept in self.calls:
            for old, new in zip(kept, _tensors(_run(call, us)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def graph(captured: CUDAGraph, pool=None) -> Iterator[None]:
    now.graph = captured
    try:
        yield
    finally:
        now.graph = None


@contextlib.contextmanager
def device(wanted) -> Iterator[None]:
    before, now.device = now.device, torch.device(wanted).index
    try:
        yield
    finally:
        now.device = before


def only_here() -> None:
    """The current device is this one."""
    if now.device != GPU.index:
        raise RuntimeError(f"the current device is cuda:{now.device}")


def sleep(cycles: int) -> None:
    now.us += cycles / MHZ


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.us = 0

    def record(self, stream=None) -> None:
        only_here()
        self.us = now.us

    def query(self) -> bool:
        return False  # the device is busy while the host enqueues

    def synchronize(self) -> None:
        synchronize()

    def elapsed_time(self, end: Event) -> float:
        return (end.us - self.us) / 1000


class Stream:
    cuda_stream = 0

    def __init__(self, device=None) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        synchronize()


# As much of torch.cuda as is asked for.
CUDA = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: now.device,
    "device": device,
    "get_device_name": lambda device=None: NAME,
    "get_device_capability": lambda device=None: CAPABILITY,
    "get_device_properties": lambda device=None: PROPERTIES,
    "mem_get_info": lambda device=None: (PROPERTIES.total_memory, PROPERTIES.total_memory),
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 1,
    "reset_peak_memory_stats": lambda device=None: None,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "synchronize": synchronize,
    "Stream": Stream,
    "stream": lambda stream: contextlib.nullcontext(),
    "current_stream": lambda device=None: Stream(),
    "Event": Event,
    "CUDAGraph": CUDAGraph,
    "graph": graph,
    "is_current_stream_capturing": lambda: now.graph is not None,
    "_sleep": sleep,
    "_lazy_init": lambda: None,
}


def install() -> None:
    """From here on this process has the GPU."""
    own_store()
    native.stand_in_guard()
    for name, value in CUDA.items():
        setattr(torch.cuda, name, value)
    torch.cuda.graphs.graph_pool_handle = lambda: None
    torch.backends.cudnn.version = lambda: None
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # what is assigned to .data would lose its host
    install.library = _memory()  # its kernels live as long
    _launches()
    from tritonconv import fallback
    from tritonconv.lab.bench import clock

    fallback.PLAIN_TYPES |= {OnGpu}
    clock.time = SimpleNamespace(perf_counter=lambda: now.host_us / 1e6)  # the interpreter's time says nothing
    atexit.register(time.sleep, 0.1)  # the thread of the last backward still drops its tensors, and needs Python for it


def _memory() -> torch.library.Library:
    """The kernels that all other ways to make a tensor on the device, or to move one there, begin with."""

    def empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        return OnGpu(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))

    def empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
        return OnGpu(torch.empty_strided(size, stride, dtype=dtype))

    def copy_(self, source, non_blocking=False):  # torch.tensor() goes past __torch_dispatch__
        _hosts(self).copy_(_hosts(source))
        return self

    library = torch.library.Library("aten", "IMPL", "CUDA")
    library.impl("empty.memory_format", empty)
    library.impl("empty_strided", empty_strided)
    library.impl("copy_", copy_)
    return library


def _launches() -> None:
    """Triton's interpreter runs them on the values."""
    from tritonconv.kernels.registry import have_triton

    if not have_triton():
        return
    import interpreter
    import triton

    from tritonconv.kernels import triton_boxes, triton_launch, triton_target

    interpreter.speed_up()
    executor = triton.runtime.interpreter.GridExecutor
    interpret = executor.__call__

    def launch(self, *args, **kwargs) -> None:
        only_here()
        named = {name: _argument(value) for name, value in kwargs.items()}
        _run(partial(interpret, self, *map(_argument, args), **named), LAUNCH)

    executor.__call__ = launch
    triton.runtime.driver.set_active(SimpleNamespace(get_current_stream=lambda index: Stream.cuda_stream))
    if PROPERTIES.major:
        gpu = triton.backends.compiler.GPUTarget("cuda", 10 * PROPERTIES.major + PROPERTIES.minor, 32)
        for module in (triton_target, triton_launch, triton_boxes):
            module.target = lambda: gpu


def _argument(value):
    if hasattr(value, "base"):  # a TensorDescriptor
        value = copy.copy(value)
        value.base = _argument(value.base)
    if _elsewhere(value):
        raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
    return _hosts(value)


def shrink() -> None:
    """Sizes meant for a GPU, or for minutes, become small enough for the interpreter."""
    from tritonconv.autotune.tuning import session
    from tritonconv.lab import campaign, verification
    from tritonconv.lab.bench import call_overhead, clock, gpu, layer_sizes, measure, roofs, runner, timing

    roofs.MEMORY_BYTES["cuda"], roofs.LARGE_MATRIX["cuda"], roofs.SMALL_MATRIX = 1 << 20, 64, 32
    clock.FLUSH_BYTES, clock.MOST_WALL_CALLS, gpu.WARM_CALLS = 1 << 10, 1, 1
    call_overhead.CALLS, runner.MOST_CELL_SECONDS = 2, 0.1
    # By the clock of the device every round takes as long, and none is warmer.
    one = {"few_rounds": 1, "min_rounds": 1, "max_rounds": 1}
    measure.interleave = lambda *args, **rounds: timing.interleave(*args, **rounds | one)
    measure.warm_up, timing.MOST_WARM_ROUNDS = (lambda *args: 0), 1
    layer_sizes.CPU_GFLOP, layer_sizes.CPU_BATCH, verification.CHECKED_AXES = 0.0, 1, 2
    verification.SAMPLE_LAYERS = {"k2s2": "segresnet_deconv_up2"}
    campaign.SHARES["cuda"] = campaign.Shares(0.3, 0.6 / SECONDS, 0.3, 0.05, 0.6 / SECONDS)
    session.EFFORTS, session.WHOLE = (session.Effort(1, 1.0, 1.5, 0.1),), session.Effort(1, 1.0, 4.0, 0.1)


def build(folder: Path) -> Path:
    """Compiles stand_in_gpu.cpp into the folder. Raises subprocess.CalledProcessError with the compiler's message."""
    torchs, library = Path(torch.__file__).parent, folder / "libstand_in_gpu.so"
    subprocess.run(
        [
            *(COMPILER, "-std=c++20", "-shared", "-fPIC", "-I", torchs / "include", Path(__file__).with_suffix(".cpp")),
            *("-o", library, "-L", torchs / "lib", f"-Wl,-rpath,{torchs / 'lib'}", "-lc10", "-ltorch_cpu"),
        ],
        check=True,
    )
    return library


def main(arguments: Sequence[str]) -> int:
    """The command line beside the stand-in, or pytest; in a process of its own where the library is not loaded yet."""
    if "STAND_IN_GPU" not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            own = {**os.environ, "STAND_IN_GPU": str(build(Path(folder)))}
            return subprocess.run([sys.executable, __file__, *arguments], env=own, check=False).returncode
    install()
    if arguments[:1] == ["pytest"]:
        import pytest

        return pytest.main(arguments[1:])
    from tritonconv.lab import cli

    shrink()
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
