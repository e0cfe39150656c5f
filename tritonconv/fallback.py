"""torch itself for every call that our variants do not serve, with the reason, under every torch transform.

The three passes here are compositions of differentiable torch operations. They keep forward-mode, vmap, complex
numbers, tracing, fake tensors and tensor subclasses exactly as torch has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tritonconv.arguments import Geometry, check_shapes, geometry
from tritonconv.errors import ArgumentError
from tritonconv.kernels import torch_native
from tritonconv.kernels.torch_layout import bias_gradient
from tritonconv.private import dispatch_modes, forward_mode, old_vmap, tracing, transforms
from tritonconv.problem import TorchCrop, Triple

DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
DEVICES = frozenset(("cpu", "cuda"))
PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter))


class SymbolicCall(NamedTuple):
    """The fields of a problem that the torch formulation reads; the sizes may be symbolic."""

    size: Triple
    stride: Triple
    torch_crop: TorchCrop
    out_size: Triple
    dilation: Triple
    groups: int
    weight_shape: tuple[int, ...]

    @property
    def c_out(self) -> int:
        return self.weight_shape[1] * self.groups


def call_of(x, weight, bias, geo: Geometry) -> SymbolicCall:
    """Checks a batched call and records it without asking for concrete sizes."""
    out = check_shapes(x, weight, bias, geo)
    size, weight_shape = tuple(x.shape[2:]), tuple(weight.shape)
    return SymbolicCall(size, geo.stride, torch_crop(geo), out, geo.dilation, geo.groups, weight_shape)


def torch_crop(geo: Geometry) -> TorchCrop:
    """The crops of a call in torch's terms."""
    if geo.crop == geo.back:  # torch's own arguments, which may be symbolic too: nothing to compare
        return TorchCrop(geo.crop, geo.output_padding, (0, 0, 0), (0, 0, 0))
    net = tuple(b - q for b, q in zip(geo.back, geo.output_padding, strict=True))
    return TorchCrop.of(geo.crop, net, geo.stride, geo.dilation)  # type: ignore[arg-type]


def traced(x, weight, bias, arguments):
    """The call as torch.jit.trace records it: unchecked, for a size that is compared becomes a constant.

    torch's arguments go to torch as they are: an output padding that was computed from sizes is recorded so.
    """
    padding = arguments[1]
    if not (isinstance(padding, Sequence) and any(isinstance(entry, Sequence) for entry in padding)):
        return torch.nn.functional.conv_transpose3d(x, weight, bias, *arguments)
    if x.dim() == 4:
        return traced(x.unsqueeze(0), weight, bias, arguments).squeeze(0)
    geo = geometry(*arguments)
    crop = torch_crop(geo)
    y = torch.nn.functional.conv_transpose3d(
        x, weight, bias, geo.stride, crop.padding, crop.output_padding, geo.groups, geo.dilation
    )  # type: ignore[call-arg]
    return torch_native.cut(y, crop)


def transformed() -> bool:
    """A functorch transform or forward-mode differentiation is active; a registered operator would lose tangents."""
    return transforms() is not None or forward_mode._current_level >= 0


def exporting() -> bool:
    """torch.export is active. torch.compile of torch 2.11 takes ``torch.compiler.is_exporting`` for True."""
    return torch.compiler.is_exporting()


# torch.compiler.assume_constant_result without its import of the whole compiler: while it traces, torch.compile runs
# the functions with the transforms really active, keeps the answers, and guards on the transforms itself.
for _constant in (transformed, exporting):
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def ordinary(first: torch.Tensor, second: torch.Tensor, third: torch.Tensor | None = None) -> bool:
    """Tensors of torch's own classes, and no tracer, which would record each size that is looked at."""
    return (
        type(first) in PLAIN_TYPES
        and type(second) in PLAIN_TYPES
        and (third is None or type(third) in PLAIN_TYPES)
        and tracing() is None
    )


def undisturbed(first: torch.Tensor, second: torch.Tensor, third: torch.Tensor | None = None) -> bool:
    """No transform and no mode beside ordinary autograd."""
    return (
        transforms() is None
        and forward_mode._current_level < 0
        and dispatch_modes() == 0
        and not (old_vmap(first) or old_vmap(second) or (third is not None and old_vmap(third)))
    )


def plain(first: torch.Tensor, second: torch.Tensor, third: torch.Tensor | None = None) -> bool:
    """The quick test of the eager path: ordinary tensors, and no transform or tracer beside ordinary autograd."""
    return ordinary(first, second, third) and undisturbed(first, second, third)


def unserved(*tensors: torch.Tensor | None) -> str | None:
    """Why the variants do not serve tensors of this kind; None where they do."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            return f"{tensor.dtype} is not one of the dtypes the variants serve (float16, bfloat16, float32, float64)"
        if tensor.device.type not in DEVICES:
            return f"the tensor is on {tensor.device}, and the variants serve {' and '.join(sorted(DEVICES))}"
        if tensor.layout is not torch.strided:
            return f"the tensor has layout {tensor.layout}, not torch.strided"
    return None


def reason(*tensors: torch.Tensor | None) -> str | None:
    """Why a call goes to torch itself, in words; None where the variants serve it."""
    if transforms() is not None:
        return "a torch.func transform is active"
    if forward_mode._current_level >= 0:
        return "forward-mode differentiation is active"
    if dispatch_modes() > 0:
        return "a torch dispatch mode is active (fake tensors, FLOP counter, make_fx)"
    if tracing() is not None:
        return "torch.jit.trace or an exporter is tracing"
    if any(old_vmap(tensor) for tensor in tensors if tensor is not None):
        return "batched gradients are computed"
    for tensor in tensors:
        if tensor is not None and type(tensor) not in PLAIN_TYPES:
            return f"the tensor is a {type(tensor).__name__}, a subclass that torch handles"
    return unserved(*tensors)


def forward(call: torch_native.Call, x, weight, bias):
    """torch's transposed convolution with a front and a back crop; shapes as in :func:`torch_native.forward`."""
    _refuse_shards(x, weight, bias)
    return torch_native.forward(call, x, weight, bias)


def gradients(call: torch_native.Call, grad_y, x, weight, wanted):
    """(grad_x, grad_weight, grad_bias), None for a gradient that ``wanted`` does not mark."""
    need_x, need_weight, need_bias = wanted
    return (
        torch_native.backward_data(call, grad_y, weight) if need_x else None,
        torch_native.backward_weight(call, x, grad_y) if need_weight else None,
        bias_gradient(grad_y) if need_bias else None,
    )


def is_dtensor(tensor) -> bool:
    """A tensor of torch.distributed; recognised by name, for the import of that package takes a second."""
    return type(tensor).__name__ == "DTensor"


def spatially_sharded(x) -> bool:
    """A DTensor that an axis of its mesh shards along a spatial axis (of a batched call)."""
    return is_dtensor(x) and any(placement.is_shard() and placement.dim >= 2 for placement in x.placements)


def _refuse_shards(x, weight, bias) -> None:
    """The placements that torch's DTensor serves: others it answers with wrong numbers and no error (torch 2.13)."""
    if not is_dtensor(x):
        return
    for placement in x.placements:
        if not placement.is_replicate() and not (placement.is_shard() and placement.dim == 0):
            raise ArgumentError(
                f"conv_transpose3d: input is a DTensor with placement {placement}, which is not served here; shard "
                "the batch (axis 0), or redistribute first"
            )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if is_dtensor(tensor) and not all(placement.is_replicate() for placement in tensor.placements):
            raise ArgumentError(
                f"conv_transpose3d: {name} is a DTensor with placements {tensor.placements}; it must be replicated: "
                "redistribute first"
            )
