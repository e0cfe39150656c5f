"""Turns a problem into a plan: for each pass the variant, its config and the reason. Plans are made once and kept.

``tritonconv.use`` forces variants, ``torch.use_deterministic_algorithms`` restricts the choice, ``autotune`` decides
the rest: the tuned choice where there is one, else its rules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from tritonconv import fallback
from tritonconv.arguments import geometry, problem_of
from tritonconv.autotune import model, rules
from tritonconv.autotune.choose import Selection, ceilings_of, choose, untuned
from tritonconv.autotune.choose import forget as forget_tables
from tritonconv.device import current
from tritonconv.errors import VariantNotApplicable
from tritonconv.forced import forced
from tritonconv.kernels.registry import file_of, variant, variants
from tritonconv.kernels.torch_layout import as_convolutions, to_layout
from tritonconv.kernels.triton_weights import AS_GIVEN
from tritonconv.problem import PASSES, Problem

MAX_PLANS = 4096

_deterministic = torch._C._get_deterministic_algorithms

_by_call: dict[tuple, Plan] = {}
_by_problem: dict[tuple, Plan] = {}


@dataclass(frozen=True)
class Plan:
    """The three choices of one problem. The methods return dense tensors in the problem's layout.

    A torch formulation gets its operands dense in that layout, a Triton kernel as they are: it takes any strides.
    """

    problem: Problem
    device: torch.device
    forward_choice: Selection
    backward_data_choice: Selection
    backward_weight_choice: Selection

    @cached_property
    def torch_alone(self) -> tuple | None:
        """Where every pass is torch's own and torch has arguments for the crops: those arguments, else None.

        Such a call goes straight to torch and its autograd, with no Python of ours behind it.
        """
        return self.torch_forward if all(self._torchs(name) for name in PASSES) else None

    @cached_property
    def torch_forward(self) -> tuple | None:
        """The same where the forward alone is torch's own: a call that needs no gradient goes straight to torch."""
        problem, crop = self.problem, self.problem.torch_crop
        if not crop.exact or not self._torchs("forward"):
            return None
        return problem.stride, crop.padding, crop.output_padding, problem.groups, problem.dilation

    @cached_property
    def packs_weights(self) -> bool:
        """Forward and backward-data are Triton kernels that may share one packed copy of the weight."""
        both = self.forward_choice, self.backward_data_choice
        return all(
            each.variant.backend == "triton" and each.config.get("WEIGHT", AS_GIVEN) != AS_GIVEN for each in both
        )

    @cached_property
    def _forward(self) -> Callable[..., torch.Tensor]:
        return _launch_of(self.forward_choice, self.problem, self.device)

    @cached_property
    def _backward_data(self) -> Callable[..., torch.Tensor]:
        return _launch_of(self.backward_data_choice, self.problem, self.device)

    @cached_property
    def _backward_weight(self) -> Callable[..., tuple]:
        return _launch_of(self.backward_weight_choice, self.problem, self.device)

    @cached_property
    def _joint(self) -> Callable[..., tuple]:
        chosen = self.backward_weight_choice
        assert chosen.variant.joint is not None  # backward() asked
        return _kept(chosen.variant.joint, chosen, self.problem, self.device)

    @cached_property
    def _prepare(self) -> Callable[..., torch.Tensor]:
        chosen = self.backward_data_choice
        prepare = chosen.variant.prepare
        assert prepare is not None  # backward() asked
        return _kept(lambda problem, config, grad_y: prepare(problem, grad_y), chosen, self.problem, self.device)

    def _torchs(self, pass_name: str) -> bool:
        return self.choice(pass_name).variant.name == rules.FALLBACK[pass_name]

    def choice(self, pass_name: str) -> Selection:
        return getattr(self, f"{pass_name}_choice")

    def forward(self, x, weight, bias):
        """x (n, c_in, d, h, w), weight, bias (c_out,) or None -> y (n, c_out, od, oh, ow)."""
        chosen, layout = self.forward_choice, self.problem.memory_format
        with _no_autocast(x):
            return to_layout(self._forward(_operand(x, chosen, layout), weight, bias), layout)

    def backward_data(self, grad_y, weight, prepared=None):
        """grad_y (n, c_out, od, oh, ow), weight -> grad_x (n, c_in, d, h, w)."""
        chosen, layout = self.backward_data_choice, self.problem.memory_format
        with _no_autocast(grad_y):
            operands = _operand(grad_y, chosen, layout), weight, *_given(prepared, grad_y)
            return to_layout(self._backward_data(*operands), layout)

    def backward_weight(self, x, grad_y, need_bias, prepared=None):
        """x, grad_y -> (grad_weight, grad_bias or None)."""
        chosen, layout = self.backward_weight_choice, self.problem.memory_format
        with _no_autocast(x):
            operands = _operand(x, chosen, layout), _operand(grad_y, chosen, layout), need_bias
            return self._backward_weight(*operands, *_given(prepared, grad_y))

    def backward(self, x, weight, grad_y, need_bias):
        """Both gradients: (grad_x, grad_weight, grad_bias or None); what their variants share is done once."""
        data, chosen = self.backward_data_choice.variant, self.backward_weight_choice.variant
        if data.joint is not None and data.joint is chosen.joint:
            return self.joint_backward(x, weight, grad_y, need_bias)
        prepared, prepare = None, data.prepare
        if not all(self.choice(name).variant.backend == "triton" for name in PASSES[1:]):
            grad_y = to_layout(grad_y, self.problem.memory_format)
        if prepare is not None and prepare is chosen.prepare:
            with _no_autocast(grad_y):
                prepared = self._prepare(grad_y)
        grad_x = self.backward_data(grad_y, weight, prepared)
        return (grad_x, *self.backward_weight(x, grad_y, need_bias, prepared))

    def joint_backward(self, x, weight, grad_y, need_bias):
        """The same from the one function that both variants name as ``joint``."""
        chosen, layout = self.backward_weight_choice, self.problem.memory_format
        with _no_autocast(x):
            operands = _operand(x, chosen, layout), weight, _operand(grad_y, chosen, layout), need_bias
            grad_x, *of_parameters = self._joint(*operands)
            return to_layout(grad_x, layout), *of_parameters


def _given(prepared: torch.Tensor | None, grad_y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What was prepared, as a further operand; nothing where there was nothing to do."""
    return () if prepared is None or prepared is grad_y else (prepared,)


def _launch_of(chosen: Selection, problem: Problem, device: torch.device) -> Callable[..., Any]:
    return _kept(chosen.variant.launch, chosen, problem, device)


def _kept(launch: Callable[..., Any], chosen: Selection, problem: Problem, device: torch.device) -> Callable[..., Any]:
    """A launch of a choice, of the operands alone; what the Triton kernels' host side works out is kept."""
    if chosen.variant.backend != "triton":
        made = partial(launch, problem, chosen.config)
        return as_convolutions(made) if device.type == "cuda" and problem.dtype is torch.float32 else made
    from tritonconv.kernels.triton_replay import Replay  # needs Triton

    return Replay(launch, problem, chosen.config, keeps=file_of(chosen.variant.name) is None)


def _operand(tensor, chosen: Selection, layout: torch.memory_format):
    return tensor if chosen.variant.backend == "triton" else to_layout(tensor, layout)


_NOTHING = contextlib.nullcontext()


def _no_autocast(tensor):
    # A backward pass that runs inside an autocast region must not be lowered a second time.
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING


def plan(problem: Problem, device: torch.device) -> Plan:
    """The plan of a problem on a device, under the variants forced by :func:`tritonconv.use`.

    Raises VariantNotApplicable where a forced variant does not serve the problem.
    """
    named, deterministic = forced.get(), _deterministic()
    key = (problem, device, named, deterministic)
    found = _by_problem.get(key)
    if found is None:
        with current(device):
            choices = {f"{name}_choice": _choose(problem, device, name, named, deterministic) for name in PASSES}
        found = _remember(_by_problem, key, Plan(problem, device, **choices))
    return found


def plan_for(x, weight, bias, stride, padding, output_padding, groups, dilation) -> Plan | None:
    """The plan of a batched call, None where no variant serves such tensors; a distinct call is checked once.

    A repeated call costs one tuple and one dict lookup.
    """
    try:
        key = (
            x.shape, x.stride(), x.dtype, x.device,
            weight.shape, weight.stride(), weight.dtype, weight.device,
            None if bias is None else (bias.shape, bias.dtype, bias.device),
            stride, padding, output_padding, groups, dilation,
            forced.get(), _deterministic(),
        )  # fmt: skip
        found = _by_call.get(key)
    except (TypeError, RuntimeError):  # a list cannot be hashed, a sparse tensor has no strides: looked at each time
        return _plan_anew(x, weight, bias, stride, padding, output_padding, groups, dilation)
    if found is None:
        found = _plan_anew(x, weight, bias, stride, padding, output_padding, groups, dilation)
        if found is not None:
            _remember(_by_call, key, found)
    elif not _integers((stride, padding, output_padding, groups, dilation)):  # 1.0 == True == 1, and they hash alike
        geometry(stride, padding, output_padding, groups, dilation)
    return found


def _integers(values: tuple) -> bool:
    """Only ``int`` and tuples of it, nested; the quick test for arguments that were accepted before."""
    for value in values:
        kind = type(value)
        if kind is not int and not (kind is tuple and _integers(value)):
            return False
    return True


def _plan_anew(x, weight, bias, *arguments) -> Plan | None:
    if fallback.unserved(x, weight, bias) is not None:
        return None
    return plan(problem_of(x, weight, bias, geometry(*arguments)), x.device)


def _remember(memory: dict[tuple, Plan], key: tuple, made: Plan) -> Plan:
    if len(memory) >= MAX_PLANS:  # endless new image sizes must not grow memory without bound
        memory.clear()
    memory[key] = made
    return made


def _choose(problem, device, pass_name, named, deterministic) -> Selection:
    for name, items in named:
        record = variant(name)
        if record.pass_name == pass_name:
            why_not = record.supports(problem, device)
            if why_not is not None:
                raise VariantNotApplicable(f"{name} was forced but does not serve {problem}: {why_not}")
            config = record.default(problem, device) if items is None else dict(items)
            return Selection(record, config, "forced by tritonconv.use")
    chosen = choose(problem, device, pass_name)
    if deterministic and not chosen.variant.deterministic and device.type != "cpu":
        because = f"torch.use_deterministic_algorithms is on and {chosen.variant.name} is not deterministic"
        return next(_deterministics(problem, device, pass_name, because), chosen)
    return chosen


def _deterministics(problem, device, pass_name, because) -> Iterator[Selection]:
    """The deterministic variants that serve the problem: in the model's order, where there is something to compute."""
    if device.type == "cuda" and problem.n and problem.c_out:
        for record, config, guess in model.rank(problem, device, pass_name, ceilings_of(device)):
            if record.deterministic:
                said = f"{because}; the cost model's first that is: {guess.ms * 1e3:.3g} us, {guess.limit}"
                yield Selection(record, config, said)
    else:
        for record in variants(pass_name):
            if record.deterministic and record.supports(problem, device) is None:
                yield Selection(record, record.default(problem, device), because)


def plan_of(problem: Problem, device: torch.device, **chosen: Selection) -> Plan:
    """A plan outside every memory: ``chosen`` by pass, the other passes without any stored entry.

    For the tuner, which measures what is not chosen yet.
    """
    choices = {f"{name}_choice": chosen.get(name) or untuned(problem, device, name) for name in PASSES}
    return Plan(problem, device, **choices)


def forget() -> None:
    """Every call is planned anew: after the tuned choices have changed."""
    _by_call.clear()
    _by_problem.clear()
    forget_tables()


@contextlib.contextmanager
def watch() -> Iterator[list[tuple[Problem, torch.device]]]:
    """After the block the list holds the distinct problems that calls in it made, and where, in their order."""
    global _by_call, _by_problem
    found: list[tuple[Problem, torch.device]] = []
    outer = _by_call, _by_problem
    _by_call, _by_problem = {}, {}
    try:
        yield found
    finally:
        found += dict.fromkeys((problem, device) for problem, device, *_ in _by_problem)
        _by_call, _by_problem = outer
