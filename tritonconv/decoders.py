"""Decoder blocks of MONAI and nnU-Net whose concatenation ``up_concat`` writes: ``tritonconv.convert(decoder=True)``.

A class is known by the path of its module and by the source of its ``forward``: a version of the library with another
one is left as it is. A block keeps its own ``forward`` for every call that is not a batch of images with a skip that
fits, and where its transposed convolution is not the last thing before the concatenation. Neither library is imported.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from tritonconv.concatenation import hooked, up_concat
from tritonconv.layer import ConvTranspose3d
from tritonconv.problem import output_size

Class = type[nn.Module]
Forward = Callable[..., Any]


def sole_layer(module: nn.Module) -> ConvTranspose3d | None:
    """The transposed convolution of tritonconv's that the call of ``module`` is: itself, or all of a ``Sequential``."""
    while not isinstance(module, ConvTranspose3d):
        if _why_more(module) is not None or len(module._modules) != 1:
            return None
        module = next(iter(module.children()))
    return module


def _why_more(module: nn.Module) -> str | None:
    """Why the call of a container is more than its parts one after the other; None where it is not."""
    if type(module).forward is not nn.Sequential.forward:
        return f"it upsamples by {type(module).__name__}, not by a transposed convolution in 3-D"
    if hooked(module) or "forward" in vars(module):
        return f"hooks, or a forward of its own, are on the {type(module).__name__} around the transposed convolution"
    return None


def _why_not(module: nn.Module) -> str | None:
    """Why ``module`` has no sole layer; None where it has one."""
    while not isinstance(module, nn.ConvTranspose3d):
        why = _why_more(module)
        if why is not None:
            return why
        parts = list(module.children())
        if len(parts) != 1:
            names = ", ".join(type(each).__name__ for each in parts) or "nothing"
            return f"its upsampling is {names}, not a transposed convolution alone"
        module = parts[0]
    return None if isinstance(module, ConvTranspose3d) else "its transposed convolution is not tritonconv's"


# ------------------------------------------------------------------ the forwards, around those of the classes


def _up_block(theirs: Forward) -> Forward:
    def forward(self: Any, inp: Any, skip: Any) -> Any:
        layer = sole_layer(self.transp_conv)
        if layer is None or not _images(inp, skip):
            return theirs(self, inp, skip)
        return self.conv_block(up_concat(layer, inp, skip))

    return forward


def _up_cat(theirs: Forward) -> Forward:
    def forward(self: Any, x: Any, x_e: Any) -> Any:
        layer = sole_layer(self.upsample)
        if layer is None or not _images(x, x_e) or (self.is_pad and _reached(layer, x) != tuple(x_e.shape[2:])):
            return theirs(self, x, x_e)
        return self.convs(up_concat(layer, x, x_e, skip_first=True))

    return forward


def _unet_decoder(theirs: Forward) -> Forward:
    def forward(self: Any, skips: Any) -> Any:
        if not isinstance(skips, (list, tuple)) or not _images(*skips) or not len(self.stages):
            return theirs(self, skips)
        x = skips[-1]
        outputs: list[torch.Tensor] = []
        for index, stage in enumerate(self.stages):
            x = stage(up_concat(self.transpconvs[index], x, skips[-2 - index]))
            if self.deep_supervision:
                outputs.insert(0, self.seg_layers[index](x))  # the finest first
        return outputs if self.deep_supervision else self.seg_layers[-1](x)

    return forward


def _images(*values: Any) -> bool:
    """Batches of 3-D images, all of them."""
    return all(isinstance(each, torch.Tensor) and each.dim() == 5 for each in values)


def _reached(layer: ConvTranspose3d, x: torch.Tensor) -> tuple:
    crop: Any = layer.padding
    sizes: Any = x.shape[2:], layer.kernel_size, layer.stride, crop, crop, layer.output_padding, layer.dilation
    return tuple(output_size(*sizes))


# ------------------------------------------------------------------ the classes


class Block(NamedTuple):
    """A class of blocks: the fingerprints of the forwards that ``around`` makes ours of, and where the layers are."""

    fingerprints: tuple[str, ...]
    around: Callable[[Forward], Forward]
    upsamplings: Callable[[Any], Iterable[nn.Module]]


_UP_BLOCK = Block(("241ab2e86c49dff7",), _up_block, lambda block: (block.transp_conv,))
_UNET_DECODER = Block(("1691bca0a1f04c27",), _unet_decoder, lambda block: block.transpconvs)
_NNUNET = "dynamic_network_architectures.building_blocks"
BLOCKS = {
    "monai.networks.blocks.dynunet_block.UnetUpBlock": _UP_BLOCK,
    "monai.networks.blocks.unetr_block.UnetrUpBlock": _UP_BLOCK,
    "monai.networks.nets.basic_unet.UpCat": Block(("44e936e19c2d01e9",), _up_cat, lambda block: (block.upsample,)),
    f"{_NNUNET}.unet_decoder.UNetDecoder": _UNET_DECODER,
    f"{_NNUNET}.unet_residual_decoder.UNetResDecoder": _UNET_DECODER,
}


def known(cls: type) -> Block | None:
    return BLOCKS.get(f"{cls.__module__}.{cls.__qualname__}")


def why_left(module: nn.Module) -> str | None:
    """Why a block of a known class keeps its forward; None where it gets ours."""
    cls, block = type(module), known(type(module))
    assert block is not None  # the caller looked
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    if fingerprint(cls.forward) not in block.fingerprints:
        return f"this version's {cls.__name__} has a forward that tritonconv does not know"
    reasons = [_why_not(each) for each in block.upsamplings(module)]
    return next(filter(None, reasons), None)


def forward_of(cls: Class) -> Forward:
    """The forward of a known class, with ours where it serves."""
    block = known(cls)
    assert block is not None  # the caller looked
    return block.around(cls.forward)


def fingerprint(function: Any) -> str | None:
    """Of the source of a function, without its annotations and its docstring; None where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(tree, ast.FunctionDef):
        return None
    tree.returns = None
    for argument in ast.walk(tree.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]
