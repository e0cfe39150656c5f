"""The models that are measured whole: three by a short name, and any other as ``module:factory``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tritonconv.errors import ArgumentError
from tritonconv.lab.bench.failures import one_line

Shape = tuple[int, ...]

LEAST_EDGE, MOST_FEATURES = 4, 320  # of nnU-Net's plans: edge of the deepest level, channels


@dataclass(frozen=True)
class Network:
    """A model that can be built; ``inputs`` are the shapes of the tensors that its forward takes."""

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[Shape, ...]


@dataclass(frozen=True)
class BuiltIn:
    """A network by its short name. ``shapes`` holds the input by scale; ``build(shape, scale)`` needs ``packages``."""

    said: str
    packages: tuple[str, ...]
    shapes: dict[str, Shape]
    build: Callable[[Shape, str], nn.Module]


def _nnunet(shape: Shape, scale: str) -> nn.Module:
    """PlainConvUNet as nnU-Net plans it for a patch: an axis is halved while it stays at least four voxels long."""
    unet: Any = importlib.import_module("dynamic_network_architectures.architectures.unet")
    strides: list[Shape] = [(1, 1, 1)]
    edges = list(shape[2:])
    while any(edge >= 2 * LEAST_EDGE for edge in edges):
        halves = [2 if edge >= 2 * LEAST_EDGE else 1 for edge in edges]
        edges = [edge // half for edge, half in zip(edges, halves, strict=True)]
        strides.append(tuple(halves))
    stages = len(strides)
    return unet.PlainConvUNet(
        shape[1], stages, [min(32 << stage, MOST_FEATURES) for stage in range(stages)], nn.Conv3d, 3, strides,
        2, 3, 2, conv_bias=True, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True,
    )  # fmt: skip


def _swinunetr(shape: Shape, scale: str) -> nn.Module:
    nets: Any = importlib.import_module("monai.networks.nets")
    return nets.SwinUNETR(shape[1], 14, feature_size=48 if scale == "full" else 24)


def _vqvae(shape: Shape, scale: str) -> nn.Module:
    """The VQ-VAE of MONAI's tutorial 3d_vqvae."""
    nets: Any = importlib.import_module("monai.networks.nets")
    return nets.VQVAE(
        3, shape[1], shape[1], channels=(256, 256), num_res_layers=2, num_res_channels=(256, 256),
        downsample_parameters=((2, 4, 1, 1),) * 2, upsample_parameters=((2, 4, 1, 1, 0),) * 2,
        num_embeddings=256, embedding_dim=32,
    )  # fmt: skip


BUILT_IN = {
    "nnunet": BuiltIn(
        "nnU-Net's PlainConvUNet with deep supervision", ("dynamic_network_architectures",),
        {"full": (2, 1, 128, 128, 128), "cpu": (1, 1, 32, 32, 32)}, _nnunet,
    ),
    "swinunetr": BuiltIn(
        "MONAI's SwinUNETR, feature size 48 (24 at scale cpu)", ("monai", "einops"),
        {"full": (1, 1, 96, 96, 96), "cpu": (1, 1, 64, 32, 32)}, _swinunetr,
    ),
    "vqvae": BuiltIn(
        "MONAI's VQVAE as its tutorial has it", ("monai",),
        {"full": (2, 1, 64, 64, 64), "cpu": (1, 1, 16, 16, 16)}, _vqvae,
    ),
}  # fmt: skip


def described() -> list[str]:
    """A line for each built-in network: its name, and its input at each scale."""
    return [
        f"{name}: {each.said}; {', '.join(f'{shown([shape])} at scale {key}' for key, shape in each.shapes.items())}"
        for name, each in BUILT_IN.items()
    ]


def shown(inputs: Sequence[Shape]) -> str:
    """Shapes as ``--input`` takes them."""
    return ",".join("x".join(map(str, shape)) for shape in inputs)


def network(text: str, inputs: Sequence[Shape], scale: str) -> Network:
    """The network of ``--model``; ``inputs`` are those of ``--input``, none for a built-in one's own at this scale.

    Raises ArgumentError for a name that is none, a package that is missing, a module or factory that cannot be had, and
    where the input of a model that is not built in is missing.
    """
    if ":" not in text:
        return _built_in(text, inputs, scale)
    if not inputs:
        raise ArgumentError(f"argument --model: {text} needs --input, such as --input 1x1x96x96x96")
    return Network(text, _made_by(text), tuple(inputs))


def _built_in(name: str, inputs: Sequence[Shape], scale: str) -> Network:
    found = BUILT_IN.get(name)
    if found is None:
        raise ArgumentError(f"argument --model: expects module:factory or one of {', '.join(BUILT_IN)}, got {name!r}")
    missing = [each for each in found.packages if importlib.util.find_spec(each) is None]
    if missing:
        raise ArgumentError(f"argument --model: {name} needs {' and '.join(missing)}: pip install 'tritonconv[models]'")
    shapes = tuple(inputs) or (found.shapes[scale],)
    if len(shapes) != 1 or len(shapes[0]) != 5:
        raise ArgumentError(f"argument --input: {name} takes one tensor NxCxDxHxW, got {shown(shapes)}")
    return Network(name, lambda: found.build(shapes[0], scale), shapes)


def _made_by(text: str) -> Callable[[], nn.Module]:
    module, _, attribute = text.partition(":")
    if (here := str(Path.cwd())) not in sys.path:  # as python -m has it
        sys.path.insert(0, here)
    try:
        factory: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a script that parses the command line exits
        raise ArgumentError(f"argument --model: {module!r} cannot be imported: {one_line(error)}") from None
    for part in attribute.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        raise ArgumentError(f"argument --model: {module} has no {attribute!r} that can be called")

    def build() -> nn.Module:
        made = factory if isinstance(factory, nn.Module) else factory()
        if not isinstance(made, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got a {type(made).__name__}")
        return made

    return build
