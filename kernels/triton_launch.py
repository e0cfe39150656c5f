"""Host side that the Triton variants share: what they serve, arguments of a problem, the launch, the accounting."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from tritonconv.errors import ArgumentError
from tritonconv.kernels import triton_compiled
from tritonconv.kernels.targets import MULTIPROCESSORS
from tritonconv.kernels.triton_buffers import Buffer, KernelLaunch, copied, new
from tritonconv.kernels.triton_device import FAR
from tritonconv.kernels.triton_target import INTERPRETED, driver_fault, registers_in_flight, target
from tritonconv.kernels.variant import Config
from tritonconv.precision import IEEE, TF32, float32_precision
from tritonconv.problem import Problem, Triple, largest_offset

INTERPRETED_PROGRAMS = 3  # few, so that each takes several tiles there as well
WIDE_FROM = 2**30  # half of the int32 range: the rest is head-room for masked addresses outside the tensor
COUNTED_FROM = 2**29  # voxels: those of a tile's cells may be twice as many, and fill a tile beyond the last one

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Sizes are unspecialised run-time scalars, so a new image size does not recompile. They are not passed as a tuple,
# whose elements Triton specialises. Strides stay specialised: divisibility by 16 permits 16-byte loads.
CROPS = ("d_crop", "h_crop", "w_crop")
RUN_TIME = ("n", "d_in", "h_in", "w_in", "d_out", "h_out", "w_out", *CROPS)

# Of very few channels a stride has other divisors at every image size, and no wide load or store needs them.
Y_STRIDES = ("y_n", "y_c", "y_d", "y_h")
OPTIONS = ("num_warps", "num_stages", "maxnreg")  # keys of a config, and an option, that Triton takes itself
BY = ("by_d", "by_h", "by_w", "shift_d", "shift_h", "shift_w")  # of :func:`division`

triton_compiled.from_environment()  # here, where every Triton variant comes along: before the first of them compiles


def refusal(problem: Problem, device: torch.device) -> str | None:
    """Why no Triton kernel serves the problem on the device; None where one may."""
    if problem.dtype not in DTYPES:
        return f"Triton kernels serve float16, bfloat16 and float32, not {str(problem.dtype).removeprefix('torch.')}"
    if device.type == "cuda":
        return driver_fault()
    if not INTERPRETED:
        return f"a Triton kernel needs a CUDA device, not {device} (or TRITON_INTERPRET=1 set before the import)"
    if problem.dtype is torch.bfloat16:
        return "Triton's interpreter computes bfloat16 products wrongly"
    return None


def scalar_strides(y: Buffer) -> dict[str, int]:
    """The strides of y or grad_y one by one, of which most kernels leave Y_STRIDES unspecialised."""
    return dict(zip((*Y_STRIDES, "y_w"), y.stride(), strict=True))


class Layer(NamedTuple):
    """The argument LAYER of a kernel: all that is compiled in about the layer; channels are per group."""

    C_IN: int
    C_OUT: int
    GROUPS: int
    KERNEL: Triple
    STRIDE: Triple
    DILATION: Triple


def geometry(problem: Problem, kernel) -> dict[str, Any]:
    """The arguments that kernels take under the same names, of them those of this kernel.

    The constants of a layer come one by one, or as LAYER where a kernel would have too many parameters.
    """
    run_time = (problem.n, *problem.size, *problem.out_size, *problem.crop)
    channels = problem.c_in // problem.groups, problem.c_out // problem.groups
    layer = Layer(*channels, problem.groups, problem.kernel, problem.stride, problem.dilation)
    arguments = dict(zip(RUN_TIME, run_time, strict=True)) | layer._asdict() | {"LAYER": layer}
    return {name: value for name, value in arguments.items() if name in kernel.arg_names}


def division(size: Triple) -> dict[str, int]:
    """As arguments what ``triton_device.dividers`` works out for the voxels of ``size``: see ``divider`` there."""
    shifts = [(length - 1).bit_length() if length > 0 else 0 for length in size]
    exact = [((1 << shift) - length) * 2**32 // max(1, length) + 1 for shift, length in zip(shifts, size, strict=True)]
    signed = [value - 2**32 if value >= 2**31 else value for value in exact]  # an argument of 32 bits, whatever it is
    return dict(zip(BY, (*signed, *shifts), strict=True))


def accounting(grid, kernel, args) -> dict[str, Any]:
    """Triton's ``launch_metadata``: name, useful FLOPs and compulsory bytes of a launch, for a profiler (Proton)."""
    tensor = next(value for name, value in args.items() if name.endswith("_ptr") and isinstance(value, torch.Tensor))
    if "LAYER" in args:
        args = args | args["LAYER"]._asdict()
    size, kernel_size, groups = (args["d_in"], args["h_in"], args["w_in"]), tuple(args["KERNEL"]), args["GROUPS"]
    # A kernel takes only what its problems do not have in common: one of kernel = stride has KERNEL alone.
    whole = tuple(length * taps for length, taps in zip(size, kernel_size, strict=True))
    out_size = tuple(args.get(name, length) for name, length in zip(("d_out", "h_out", "w_out"), whole, strict=True))
    problem = Problem(
        args["n"], args.get("C_IN", 1) * groups, args.get("C_OUT", 1) * groups, size, kernel_size,
        tuple(args.get("STRIDE", kernel_size)), tuple(args.get(name, 0) for name in CROPS), out_size,
        tuple(args.get("DILATION", (1, 1, 1))), groups, tensor.dtype, bias=args.get("bias_ptr") is not None,
    )  # fmt: skip
    name = f"{kernel.name} {problem}"
    return {"name": name, f"flops{8 * tensor.dtype.itemsize}": problem.flops, "bytes": problem.bytes()}


def empty(problem: Problem, shape: tuple[int, ...], beside: Buffer, zero: bool = False) -> Buffer:
    """A new buffer in the problem's layout, as :func:`new` makes it."""
    return new(shape, beside, memory_format=problem.memory_format, zero=zero)


def multiprocessors(device: torch.device) -> int:
    """The number that a persistent grid has to fill; few in the interpreter, an H100's where the device is absent."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return INTERPRETED_PROGRAMS if device.type == "cpu" else MULTIPROCESSORS


@cache
def _multiplies_tf32(backend: str, arch) -> bool:
    options = make_backend(GPUTarget(backend, arch, 64 if backend == "hip" else 32)).parse_options(
        {"enable_fp_fusion": True}
    )
    return TF32 in options.allowed_dot_input_precisions


def precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s input_precision for a dtype: torch's switch for convolutions, read at each launch.

    A GPU without TF32 (AMD's gfx90a) multiplies float32 in IEEE precision, whatever the switch says.
    """
    if dtype is not torch.float32 or float32_precision() == IEEE:
        return IEEE
    gpu = target()
    return TF32 if gpu is None or _multiplies_tf32(gpu.backend, gpu.arch) else IEEE


def wide(*buffers: Buffer | None, of: Problem | None = None) -> int:
    """WIDE: 0, 1 where an element offset into one of the buffers needs 64 bits, 2 where numbers of its voxels do too or
    an axis is too long for dividers.

    ``of``: the problem whose taps and crops reach beyond x and y, masked: offsets of voxels not there count too.
    """
    reach = (0, 0, 0) if of is None else tuple(2 * (a.dilation * a.kernel + a.crop + a.stride) for a in of.axes)
    return max((_width(each, reach) for each in buffers if each is not None), default=0)


def _width(buffer: Buffer, reach: tuple[int, ...]) -> int:
    shape, strides = buffer.shape, buffer.stride()
    voxels = shape[0] * math.prod(length + more for length, more in zip(shape[2:], reach, strict=False))
    if voxels >= COUNTED_FROM or max(shape[2:], default=0) >= FAR // 2:
        return 2
    beyond = sum(more * abs(stride) for more, stride in zip(reach, strides[2:], strict=False))
    return int(beyond >= WIDE_FROM or largest_offset(shape, strides) >= WIDE_FROM)


def units(strides: tuple[int, ...]) -> tuple[int, ...]:
    """A known divisor of each stride, as a hint for the compiler: 2, 4 or 8, or 1 for nothing; 0 for a stride of 1.

    The compiler finds out by itself where 16 divides, and only there: it would load 24 or 56 contiguous channels, or
    rows of 40 voxels, one by one. For NCDHW the only hint is 8, and without a unit stride there is none: there the
    divisors depend on the image size, and each further one would compile again.
    """
    unit = math.gcd(16, *(stride for stride in strides if stride != 1))
    if unit == 16 or 1 not in strides or (1 not in strides[:3] and unit != 8):
        unit = 1
    return tuple(0 if stride == 1 else unit for stride in strides)


def _attributes(function: Any) -> set[str]:
    """The names in a device function, and in those that it hands CONFIG on to; of ``CONFIG.ROWS`` this is ROWS."""
    names, known = function.__code__.co_names, function.__globals__
    called = (known[name].fn for name in names if "CONFIG" in getattr(known.get(name), "arg_names", ()))
    return set(names).union(*map(_attributes, called))


@cache
def _config_type(function: Any, names: tuple[str, ...]) -> Any:
    read = _attributes(function)
    unread = [name for name in names if name not in read]
    if unread:
        raise ArgumentError(f"{function.__name__} reads no {', '.join(unread)}, of its arguments or of CONFIG")
    return namedtuple("Config", names)  # type: ignore[misc]


def gathered(kernel, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, of them as CONFIG those that the kernel does not take by their names: its config, without what
    Triton takes, and what else is compiled in.

    In one order, whatever that of the config's keys is: the values are part of the key of a compiled kernel. Raises
    ArgumentError for a name that the kernel does not read.
    """
    own = {name: value for name, value in arguments.items() if name in kernel.arg_names or name in OPTIONS}
    names = tuple(sorted(arguments.keys() - own.keys()))
    return {**own, "CONFIG": _config_type(kernel.fn, names)(*(arguments[name] for name in names))}


def launch(kernel, grid: int | tuple[int, ...], config: Config, written: Sequence[Buffer | None], **arguments) -> None:
    """Has a kernel write the buffers ``written``; ``config`` holds tiles, num_warps, num_stages. Nothing runs."""
    arguments |= config
    if arguments.get("bias_ptr") is not None:  # the one operand without strides of its own
        arguments["bias_ptr"] = copied(arguments["bias_ptr"], torch.Tensor.contiguous)
    if "UNITS" in kernel.arg_names:
        arguments["UNITS"] = tuple(units(strides) for strides in arguments["strides"])
    if "WAIT" in kernel.arg_names:
        arguments["WAIT"] = registers_in_flight()
    if "CONFIG" in kernel.arg_names:
        arguments = gathered(kernel, arguments)
    arguments["enable_fp_fusion"] = True
    filled = tuple(each.base for each in written if each is not None)
    made = KernelLaunch(kernel, (grid,) if isinstance(grid, int) else grid, arguments, filled)
    for buffer in filled:
        buffer.writer = made
