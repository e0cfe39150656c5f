"""The record of a variant: one way to compute one pass, its configs and its counts of work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tritonconv.errors import ArgumentError
from tritonconv.kernels.work import Work
from tritonconv.problem import PASSES, Problem

if TYPE_CHECKING:
    from tritonconv.epilogue import Epilogue
    from tritonconv.kernels.triton_program import Program

Config = Mapping[str, int]
NO_CONFIG: Config = MappingProxyType({})
BACKENDS = ("triton", "torch")
APART = "APART"  # of a config: how many axes, d first, have programs of their own for each phase; 0 where it is absent
FOLD = "FOLD"  # of a config: 1 counts the taps along w as channels (triton_fold.py); 0 where it is absent
COPY = "COPY"  # of a config: 1 copies operands to channels_last_3d first (triton_channels_last.py)

# Reasons for ``Variant.spreads_nonfinite``: what is multiplied by a zero that stands for nothing.
SPREADS_WEIGHT = "taps that find no voxel are multiplied by zeros: where the weight is not finite they give NaN"
SPREADS_VOXELS = "voxels that meet nothing are multiplied by zeros: where x or grad_y is not finite they give NaN"
SPREADS_PADDING = "torch's convolution may multiply the zeros of a padding, and gives NaN where the other is not finite"


def _serves(problem: Problem, device: torch.device) -> None:
    return None


def _one_config(problem: Problem, device: torch.device) -> tuple[Config, ...]:
    return (NO_CONFIG,)


def _no_config(problem: Problem, device: torch.device) -> Config:
    return NO_CONFIG


def _no_workspace(problem: Problem) -> int:
    return 0


class Toolchain(NamedTuple):
    """The target and the compiler of a kernel: the compute capability (90 for 9.0, 0 for none) and Triton's version."""

    capability: int
    triton: tuple[int, int]


@dataclass(frozen=True)
class Variant:
    """One way to compute one pass.

    Each has one of two functions, which takes (problem, config) and then

    * forward: ``x, weight, bias`` -> ``y``
    * backward_data: ``grad_y, weight`` -> ``grad_x``
    * backward_weight: ``x, grad_y, need_bias`` -> ``(grad_weight, grad_bias or None)``

    ``launch`` takes tensors, does as it likes and returns new tensors. ``launches``, of a Triton variant, takes buffers
    and returns buffers, each of which knows the kernel that writes it (:mod:`tritonconv.kernels.triton_buffers`): it is
    worked out once for operands of a kind. :meth:`compute` is the pass on tensors, by either.

    ``strided``, of a variant with ``launch``: that of a forward takes also ``out``, a tensor of any strides that do not
    overlap, and writes y there; that of a gradient takes grad_y as it lies. (Those with ``launches`` all do.)

    ``takes_room``, of a forward that is ``strided``: with ``out`` it takes also ``room``, None or a tensor (n,
    channels, od, oh, ow) of the same device and dtype that it may write as it likes: the caller fills it afterwards.

    ``supports`` returns None, or the reason why the variant cannot serve the problem on the device; by default it
    serves all. ``workspace_bytes`` bounds the temporary memory besides inputs and outputs.

    ``options`` are keys that a config may have beside those of the default; an absent one stands for 0.

    ``copied`` is the default config of those that copy operands first (key COPY), None where the space has none.

    ``prepare`` (problem, grad_y) -> tensor is work on grad_y that a backward_data and a backward_weight variant share
    where both name the same function: it is done once, and each takes its result as the last operand, ``prepared``.
    (Variants with ``launches`` share their copies without it.)

    ``joint`` (problem, config, x, weight, grad_y, need_bias) -> (grad_x, grad_weight, grad_bias or None) is the whole
    backward at once as ``launches``, used instead of the two where the chosen backward_data and backward_weight
    variants name the same function. The config is the backward_weight variant's.

    ``spreads_nonfinite`` says in words where NaN is made of finite values beside a NaN or an infinity, in outputs that
    torch's own leaves finite; empty where it is not. No variant makes a finite value of one that is not.

    ``hazard`` (problem, config, target) -> None, or the reason why the config must not run on what the
    :class:`Toolchain` names, though it compiles: such configs are chosen by nothing.

    ``epilogue`` (problem, config, epilogue) -> bool, of a forward: whether it computes this
    :class:`~tritonconv.epilogue.Epilogue` itself, by the contract of that module; None stands for never.

    ``work`` (problem, config) -> :class:`~tritonconv.kernels.work.Work` is what the launch executes, for the cost
    model; None stands for the useful FLOPs and the compulsory bytes.
    """

    name: str
    pass_name: str
    idea: str
    backend: str
    launch: Callable[..., Any] | None = None
    supports: Callable[[Problem, torch.device], str | None] = field(default=_serves)
    space: Callable[[Problem, torch.device], tuple[Config, ...]] = field(default=_one_config)
    default: Callable[[Problem, torch.device], Config] = field(default=_no_config)
    options: tuple[str, ...] = ()
    copied: Callable[[Problem, torch.device], Config | None] | None = None
    prepare: Callable[[Problem, torch.Tensor], torch.Tensor] | None = None
    joint: Callable[..., Any] | None = None
    deterministic: bool = True
    spreads_nonfinite: str = ""
    workspace_bytes: Callable[[Problem], int] = field(default=_no_workspace)
    work: Callable[[Problem, Config], Work] | None = None
    hazard: Callable[[Problem, Config, Toolchain], str | None] | None = None
    launches: Callable[..., Any] | None = None
    epilogue: Callable[[Problem, Config, Epilogue], bool] | None = None
    strided: bool = False
    takes_room: Callable[[Problem, int], bool] | None = None

    def compute(self, problem: Problem, config: Config, *operands: Any, **more: Any) -> Any:
        """The pass on tensors; ``more``: ``out``, a tensor for y, where the variant takes one."""
        if self.launches is None:
            assert self.launch is not None  # as __post_init__ holds
            return self.launch(problem, config, *operands, **more)
        from tritonconv.kernels.triton_program import compute  # needs Triton

        return compute(partial(self.launches, problem, config), operands, more)

    def program(self, problem: Problem, config: Config) -> Program:
        """The launches of a variant that has them, for dense operands on the meta device: with the problem's epilogue
        where it computes that."""
        from tritonconv.kernels.triton_program import Program, operands_of  # needs Triton

        assert self.launches is not None  # the caller looked
        launches, meta, epilogue = partial(self.launches, problem, config), torch.device("meta"), problem.epilogue
        operands = operands_of(problem, self.pass_name, meta)
        if epilogue is None or not self.finishes(problem, config, epilogue):
            return Program.of(launches, operands)
        y, weight = operands_of(problem, PASSES[1], meta)
        residual = y if epilogue.residual else None
        slopes = weight.new_empty(problem.c_out) if epilogue.activation == "prelu" else None

        def finished(x, weight, bias, residual, slopes):
            return launches(x, weight, bias, epilogue=epilogue, residual=residual, slopes=slopes)

        return Program.of(finished, (*operands, residual, slopes))

    def finishes(self, problem: Problem, config: Config, epilogue: Epilogue | None) -> bool:
        """It computes an epilogue itself, where there is one."""
        if epilogue is None or self.epilogue is None or not epilogue.in_kernels:
            return False
        return self.epilogue(problem, config, epilogue)

    def starts(self, problem: Problem, device: torch.device) -> tuple[Config, ...]:
        """The default config, and the one that copies operands first, where there is another: the rest of the space is
        around these."""
        default, copied = self.default(problem, device), None if self.copied is None else self.copied(problem, device)
        return (default,) if copied in (None, default) else (default, copied)

    def __post_init__(self) -> None:
        if self.pass_name not in PASSES:
            raise ArgumentError(f"variant {self.name}: pass_name expects one of {PASSES}, got {self.pass_name!r}")
        if not self.name.startswith(f"{self.pass_name}_"):
            raise ArgumentError(f"variant {self.name}: the name must start with its pass, {self.pass_name!r}")
        if (self.launch is None) == (self.launches is None):
            raise ArgumentError(f"variant {self.name}: expects launch or launches, one of the two")
        if self.backend not in BACKENDS:
            raise ArgumentError(f"variant {self.name}: backend expects one of {BACKENDS}, got {self.backend!r}")
