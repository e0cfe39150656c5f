"""A transposed convolution of a volume whose slabs along one spatial axis lie on the ranks of a group."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist

from tritonconv import autocast, fallback
from tritonconv.arguments import OP, Geometry, check_shapes, check_types, geometry
from tritonconv.distributed import agreement, slabs
from tritonconv.distributed.halo import Halo
from tritonconv.distributed.passes import ShardedPasses, forward
from tritonconv.errors import ArgumentError, ArgumentTypeError
from tritonconv.private import any_autocast, without_compiler
from tritonconv.problem import Axis

_met: weakref.WeakSet = weakref.WeakSet()  # groups in which all ranks have met: NCCL asks for that before it sends


@without_compiler  # a graph cannot hold the messages: a compiled function breaks around the call
def conv_transpose3d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride=1,
    padding=0,
    output_padding=0,
    groups=1,
    dilation=1,
    *,
    group: dist.ProcessGroup | None = None,
    axis: int = 2,
    sizes: Sequence[int] | None = None,
    out_sizes: Sequence[int] | None = None,
    overlap: bool | None = None,
) -> torch.Tensor:
    """:func:`tritonconv.conv_transpose3d` of a volume that the ranks of a group hold in slabs; every rank calls it.

    Rank j's slab is planes [a_j, a_j+1) of the whole volume along ``axis``. It gets planes [stride * a_j,
    stride * a_j+1) of the whole answer, as far as there are such; the last rank with planes of the input also gets
    those behind. Slabs may be uneven, and empty: an empty slab gives an empty slab. The planes that a rank needs of
    others come point to point, from as many ranks as the kernel reaches.

    The gradient of the input goes back the same way. The gradients of weight and bias are summed over the group in the
    backward: every rank gets the gradient of the sum of all ranks' losses, and reduces it no further. DDP over the same
    group averages what is equal, and leaves it as it is. Double backward works in the same sense: a loss of
    second order is the sum over the ranks too. All ranks run the backward, also those with an empty slab.

    Args:
        input: (n, c_in, d, h, w), this rank's slab; with the other ranks' the same in all axes but ``axis``.
        weight, bias: (c_in, c_out/groups, kd, kh, kw) and (c_out,) or None, equal on every rank.
        stride, padding, output_padding, groups, dilation: of the whole volume, as in
            :func:`tritonconv.conv_transpose3d`; ``(begin, end)`` pairs too.
        group: a process group of torch.distributed (gloo, NCCL) that this rank is in; None for the default one.
        axis: 2, 3 or 4, the spatial axis of the slabs.
        sizes: the planes of every rank, where they are known. By default the ranks compare all arguments in each call,
            by one small all_gather that the host waits for (on a GPU also for the work before it). With ``sizes`` only
            the first call in a group does; later a rank with other arguments is an error of the group or undefined.
        out_sizes: the planes of the answer that each rank gets, in place of the rule above.
        overlap: compute the planes that need no other rank's while the halo is on its way, and the others after it.
            None: on a CPU where that pays; on a GPU it was not measured, and the halo comes first.

    Returns:
        This rank's slab of the answer, (n, c_out, od, oh, ow).

    Raises:
        ArgumentError (a ValueError and a RuntimeError): a value or a shape is refused, on each rank where one refuses
            or has other arguments than the rest; also where the whole answer has an axis of no planes.
        ArgumentTypeError (a TypeError and a RuntimeError): a type or dtype is refused: all but float16, bfloat16,
            float32, float64.
        torch.distributed's own error: a rank that died or does not come, within the group's timeout.
    """
    arguments = stride, padding, output_padding, groups, dilation
    return sharded(input, weight, bias, arguments, group, axis, sizes, out_sizes, overlap)


def sharded(
    x,
    weight,
    bias,
    arguments: tuple,
    group,
    axis,
    sizes,
    out_sizes,
    overlap: bool | None = None,
    one_loss: bool = False,
) -> torch.Tensor:
    """As :func:`conv_transpose3d`. ``one_loss``: a loss of the gradients of weight and bias is one for all ranks, not
    the sum of theirs; so it is with a replicated DTensor.
    """
    group = _group(group)
    refusal: Exception | None = None
    own, planes = None, None
    try:
        _check_tensors(x, weight, bias)
        if any_autocast():
            x, weight, bias = autocast.cast_arguments_once(x, weight, bias)
        geo = _checked(x, weight, bias, arguments)
        axis = checked_axis(axis)
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        planes = _planes("sizes", sizes, world)
        out_planes = _planes("out_sizes", out_sizes, world)
        if planes is not None and planes[rank] != x.shape[axis]:
            shape = tuple(x.shape)
            raise ArgumentError(
                f"{OP}: sizes {planes} give rank {rank} {planes[rank]} planes; input {shape}, axis {axis}"
            )
        needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias))
        own = agreement.terms(x, weight, bias, geo, axis, needs, planes, out_planes)
    except Exception as error:
        refusal = error  # the others learn of it before it is raised
    if sizes is None or group not in _met:  # else the others are on their way to the exchange
        try:
            found = agreement.compare(own, _device(x, group), group)
        except Exception as error:
            raise (refusal or error) from (error if refusal else None)
        if refusal is None:  # else the others raise there: all ranks must agree on whether they have met
            _met.add(group)
            planes = found if planes is None else planes
    if refusal is not None:
        raise refusal
    return forward(x, weight, bias, passes_of(x, weight, bias, geo, axis, planes, out_planes, group, overlap, one_loss))


def _group(group) -> dist.ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        raise ArgumentError(f"{OP}: torch.distributed has no process group; call init_process_group first")
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise ArgumentError(f"{OP}: group expects a process group that this rank is in, got {group!r}")
    return group


def _device(x, group) -> torch.device:
    """A device whose tensors the group takes, also where x is refused; x's, so that NCCL meets before it sends."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return x.device if isinstance(x, torch.Tensor) and not x.is_meta else torch.device("cpu")


def _check_tensors(x, weight, bias) -> None:
    for name, tensor in (("input", x), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, torch.Tensor) and (name != "bias" or tensor is not None):
            raise ArgumentTypeError(f"{OP}: {name} expects a tensor, got {tensor!r} ({type(tensor).__name__})")


def _checked(x, weight, bias, arguments) -> Geometry:
    """The geometry of a call whose operands are this rank's; the shapes are checked when the ranks have compared."""
    if not fallback.plain(x, weight, bias):
        raise ArgumentError(f"{OP}: slabs are not served where {fallback.reason(x, weight, bias)}")
    why_not = fallback.unserved(x, weight, bias)
    if why_not is not None:
        raise ArgumentTypeError(f"{OP}: slabs are not served where {why_not}")
    if x.dim() != 5 or weight.dim() != 5:
        shapes = f"input {tuple(x.shape)}, weight {tuple(weight.shape)}"
        raise ArgumentError(f"{OP}: a slab and the weight expect 5 axes, got {shapes}")
    check_types(x, weight, bias)
    return geometry(*arguments)


def checked_axis(axis) -> int:
    """The axis of the slabs as an integer. Raises ArgumentTypeError for none, ArgumentError for another axis."""
    try:
        number = operator.index(axis)
    except TypeError:
        raise ArgumentTypeError(f"{OP}: axis expects an integer, got {axis!r}") from None
    if number not in (2, 3, 4):
        raise ArgumentError(f"{OP}: axis expects 2, 3 or 4, got {axis!r}")
    return number


def _planes(name: str, given, world: int) -> tuple[int, ...] | None:
    if given is None:
        return None
    try:
        planes = tuple(operator.index(each) for each in given)
    except TypeError:
        message = f"{OP}: {name} expects an integer for each of the {world} ranks, got {given!r}"
        raise ArgumentTypeError(message) from None
    if len(planes) != world or min(planes) < 0:
        raise ArgumentError(f"{OP}: {name} expects planes of each of the {world} ranks, got {given!r}")
    return planes


def passes_of(
    x, weight, bias, geo: Geometry, axis: int, sizes, out_sizes, group, overlap=None, one_loss=False
) -> ShardedPasses:
    """The passes of a checked call on this rank, after the checks of the whole volume, which end alike on all ranks."""
    shape = list(x.shape)
    shape[axis] = sum(sizes)
    out = check_shapes(torch.empty(shape, device="meta"), weight, bias, geo)
    index = axis - 2
    total = out[index]
    line = Axis(shape[axis], weight.shape[axis], geo.stride[index], geo.crop[index], geo.dilation[index], total)
    owned = slabs.output_sizes(sizes, line.stride, total) if out_sizes is None else out_sizes
    if sum(owned) != total:
        raise ArgumentError(f"{OP}: out_sizes {owned} are {sum(owned)} planes, the answer has {total}")
    halo = Halo(slabs.exchange(line, sizes, owned), dist.get_rank(group), axis, group)
    return ShardedPasses(halo, geo, line, overlap, one_loss)
