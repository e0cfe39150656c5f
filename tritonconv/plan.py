"""A plan: the choice for each of the three passes of one problem, and its launch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import torch

from tritonconv.autotune import rules
from tritonconv.autotune.choose import Selection
from tritonconv.device import current
from tritonconv.kernels.registry import file_of
from tritonconv.kernels.torch_layout import to_layout
from tritonconv.kernels.weight_orders import AS_GIVEN
from tritonconv.problem import PASSES, Problem


class Plan:
    """The choices of one problem, each made when its pass is first needed. The methods return dense tensors in the
    problem's layout.

    A torch formulation gets its operands dense in that layout. A Triton kernel takes any strides. ``chosen`` holds
    choices by pass; ``choose`` makes the others. Where ``standby`` is set, torch's own runs until a chosen kernel is
    compiled, and for good where it cannot be compiled or launched.
    """

    def __init__(
        self,
        problem: Problem,
        device: torch.device,
        choose: Callable[[str], Selection],
        chosen: Mapping[str, Selection] = MappingProxyType({}),
        standby: bool = False,
    ) -> None:
        self.problem, self.device, self.standby = problem, device, standby
        self._choose, self.chosen = choose, dict(chosen)

    def choice(self, pass_name: str) -> Selection:
        """Raises VariantNotApplicable where a forced variant does not serve the problem."""
        selection = self.chosen.get(pass_name)
        if selection is None:
            with current(self.device):
                selection = self.chosen[pass_name] = self._choose(pass_name)
        return selection

    @cached_property
    def torch_alone(self) -> tuple | None:
        """torch's arguments where every pass is torch's own and torch can express the crops, else None.

        Such a call goes straight to torch and its autograd.
        """
        torchs = [
            self._torchs(name) for name in PASSES
        ]  # a list, so that any forced variant that does not serve raises here
        return self.torch_forward if all(torchs) else None

    @cached_property
    def torch_forward(self) -> tuple | None:
        """As ``torch_alone``, where only the forward must be torch's own: for a call that needs no gradient."""
        if not self.problem.torch_crop.exact or not self._torchs("forward"):
            return None
        return self.problem.torch_arguments

    @cached_property
    def packs_weights(self) -> bool:
        """Forward and backward-data are Triton kernels that may share one packed copy of the weight."""
        both = self.choice("forward"), self.choice("backward_data")
        return all(
            each.variant.backend == "triton" and each.config.get("WEIGHT", AS_GIVEN) != AS_GIVEN for each in both
        )

    @cached_property
    def _forward(self) -> Callable[..., torch.Tensor]:
        return self._launch("forward", self.choice("forward").variant.launch)

    @cached_property
    def _backward_data(self) -> Callable[..., torch.Tensor]:
        return self._launch("backward_data", self.choice("backward_data").variant.launch)

    @cached_property
    def _backward_weight(self) -> Callable[..., tuple]:
        return self._launch("backward_weight", self.choice("backward_weight").variant.launch)

    @cached_property
    def _joint(self) -> Callable[..., tuple]:
        joint = self.choice("backward_weight").variant.joint
        assert joint is not None  # backward() asked
        return self._launch("backward_weight", joint, self._torchs_gradients)

    @cached_property
    def _prepare(self) -> Callable[..., torch.Tensor]:
        prepare = self.choice("backward_data").prepare
        assert prepare is not None  # backward() asked
        return self._launch(
            "backward_data", lambda problem, config, grad_y: prepare(problem, grad_y), lambda grad_y: grad_y
        )

    def _launch(
        self, pass_name: str, launch: Callable[..., Any], torchs: Callable[..., Any] | None = None
    ) -> Callable[..., Any]:
        """A function of the operands that launches the pass's choice; a Triton launch is recorded and replayed.

        ``torchs`` computes the same in torch, by default by the pass's own operation.
        """
        chosen = self.choice(pass_name)
        if chosen.variant.backend != "triton":
            return partial(launch, self.problem, chosen.config)
        from tritonconv.kernels.triton_replay import Replay  # needs Triton

        standby = (torchs or self._torchs_own(pass_name)) if self.standby and not chosen.forced else None
        return Replay(launch, self.problem, chosen.config, keeps=file_of(chosen.variant.name) is None, standby=standby)

    def compile(self, pass_name: str) -> bool:
        """Compiles the Triton kernels of a pass's choice for dense operands in the problem's layout; runs nothing.
        Returns whether the kernels are ready."""
        from tritonconv.kernels.triton_replay import Compiled  # needs Triton

        problem, chosen = self.problem, self.choice(pass_name)

        def like(shape: tuple[int, ...], layout: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
            return torch.empty(shape, dtype=problem.dtype, device="meta", memory_format=layout)

        x, y = (like(shape, problem.memory_format) for shape in (problem.x_shape, problem.y_shape))
        weight, bias = like(problem.weight_shape), like((problem.c_out,)) if problem.bias else None
        operands = {
            "forward": (x, weight, bias), "backward_data": (y, weight), "backward_weight": (x, y, problem.bias),
        }[pass_name]  # fmt: skip
        kernels = Compiled(partial(chosen.variant.launch, problem, chosen.config), operands, self.device)
        kernels.compile()
        return kernels.ready

    def _torchs_own(self, pass_name: str) -> Callable[..., Any]:
        """torch's own operation as a function of the operands of the pass's Triton launch."""
        record, _ = rules.choose(self.problem, self.device, pass_name)
        launch = partial(record.launch, self.problem, record.default(self.problem, self.device))
        layout = self.problem.memory_format
        if pass_name == "backward_weight":
            return lambda x, grad_y, need_bias, *prepared: launch(
                to_layout(x, layout), to_layout(grad_y, layout), need_bias
            )
        if pass_name == "backward_data":
            return lambda grad_y, weight, *prepared: launch(to_layout(grad_y, layout), weight)
        return lambda x, weight, bias: launch(to_layout(x, layout), weight, bias)

    def _torchs_gradients(self, x, weight, grad_y, need_bias) -> tuple:
        grad_x = self._torchs_own("backward_data")(grad_y, weight)
        return grad_x, *self._torchs_own("backward_weight")(x, grad_y, need_bias)

    def _torchs(self, pass_name: str) -> bool:
        return self.choice(pass_name).variant.name == rules.FALLBACK[pass_name]

    def forward(self, x, weight, bias):
        """x (n, c_in, d, h, w), weight, bias (c_out,) or None -> y (n, c_out, od, oh, ow)."""
        chosen, layout = self.choice("forward"), self.problem.memory_format
        with _no_autocast(x):
            return to_layout(self._forward(_operand(x, chosen, layout), weight, bias), layout)

    def backward_data(self, grad_y, weight, prepared=None):
        """grad_y (n, c_out, od, oh, ow), weight -> grad_x (n, c_in, d, h, w)."""
        chosen, layout = self.choice("backward_data"), self.problem.memory_format
        with _no_autocast(grad_y):
            operands = _operand(grad_y, chosen, layout), weight, *_prepared_operand(prepared, grad_y)
            return to_layout(self._backward_data(*operands), layout)

    def backward_weight(self, x, grad_y, need_bias, prepared=None):
        """x, grad_y -> (grad_weight, grad_bias or None)."""
        chosen, layout = self.choice("backward_weight"), self.problem.memory_format
        with _no_autocast(x):
            operands = _operand(x, chosen, layout), _operand(grad_y, chosen, layout), need_bias
            return self._backward_weight(*operands, *_prepared_operand(prepared, grad_y))

    def backward(self, x, weight, grad_y, need_bias):
        """Both gradients: (grad_x, grad_weight, grad_bias or None); work that their variants share is done once."""
        data, chosen = (self.choice(name).variant for name in ("backward_data", "backward_weight"))
        if data.joint is not None and data.joint is chosen.joint:
            return self.joint_backward(x, weight, grad_y, need_bias)
        prepared, prepare = None, self.choice("backward_data").prepare
        if not all(self.choice(name).variant.backend == "triton" for name in PASSES[1:]):
            grad_y = to_layout(grad_y, self.problem.memory_format)
        if prepare is not None and prepare is self.choice("backward_weight").prepare:
            with _no_autocast(grad_y):
                prepared = self._prepare(grad_y)
        grad_x = self.backward_data(grad_y, weight, prepared)
        return (grad_x, *self.backward_weight(x, grad_y, need_bias, prepared))

    def joint_backward(self, x, weight, grad_y, need_bias):
        """As ``backward``, by the one function that both variants name as ``joint``."""
        chosen, layout = self.choice("backward_weight"), self.problem.memory_format
        with _no_autocast(x):
            operands = _operand(x, chosen, layout), weight, _operand(grad_y, chosen, layout), need_bias
            grad_x, *parameter_gradients = self._joint(*operands)
            return to_layout(grad_x, layout), *parameter_gradients


def _prepared_operand(prepared: torch.Tensor | None, grad_y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The prepared tensor as one more operand; none where ``prepare`` had nothing to do."""
    return () if prepared is None or prepared is grad_y else (prepared,)


def _operand(tensor, chosen: Selection, layout: torch.memory_format):
    return tensor if chosen.variant.backend == "triton" else to_layout(tensor, layout)


_NOTHING = contextlib.nullcontext()


def _no_autocast(tensor):
    # A backward pass that runs inside an autocast region must not be lowered a second time.
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING
