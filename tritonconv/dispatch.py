"""Turns a problem into a plan: for each pass the variant, its config and the reason. Plans are kept.

``tritonconv.use`` forces variants, ``torch.use_deterministic_algorithms`` restricts the choice, ``autotune`` decides
the rest: the tuned choice where there is one, else its rules.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tritonconv import fallback
from tritonconv.arguments import geometry, problem_of
from tritonconv.autotune import model, pins, rules
from tritonconv.autotune.choose import Selection, ceilings_of, choose, untuned
from tritonconv.autotune.choose import forget as forget_tables
from tritonconv.device import current
from tritonconv.errors import VariantNotApplicable
from tritonconv.forced import forced
from tritonconv.kernels.registry import file_of, variant, variants
from tritonconv.kernels.torch_layout import to_layout
from tritonconv.kernels.triton_weights import AS_GIVEN
from tritonconv.problem import PASSES, Problem

MAX_PLANS = 4096

_deterministic = torch._C._get_deterministic_algorithms

_by_call: dict[tuple, Plan] = {}
_by_problem: dict[tuple, Plan] = {}


class Plan:
    """The choices of one problem, each made when its pass is first needed. The methods return dense tensors in the
    problem's layout.

    A torch formulation gets its operands dense in that layout, a Triton kernel as they are: it takes any strides.
    Choices may be given by pass; ``choose`` makes the others. Where ``standby`` is set, torch's own runs until a chosen
    kernel is compiled, and for good where it cannot be compiled or launched.
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
        found = self.chosen.get(pass_name)
        if found is None:
            with current(self.device):
                found = self.chosen[pass_name] = self._choose(pass_name)
        return found

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
        prepare = self.choice("backward_data").variant.prepare
        assert prepare is not None  # backward() asked
        return self._launch(
            "backward_data", lambda problem, config, grad_y: prepare(problem, grad_y), lambda grad_y: grad_y
        )

    def _launch(
        self, pass_name: str, launch: Callable[..., Any], torchs: Callable[..., Any] | None = None
    ) -> Callable[..., Any]:
        """A launch of the pass's choice, of the operands alone; what the Triton kernels' host side works out is kept.

        ``torchs`` computes the same in torch, by default in the pass's own operation.
        """
        chosen = self.choice(pass_name)
        if chosen.variant.backend != "triton":
            return partial(launch, self.problem, chosen.config)
        from tritonconv.kernels.triton_replay import Replay  # needs Triton

        standby = (torchs or self._torchs_own(pass_name)) if self.standby and not chosen.forced else None
        return Replay(launch, self.problem, chosen.config, keeps=file_of(chosen.variant.name) is None, standby=standby)

    def _torchs_own(self, pass_name: str) -> Callable[..., Any]:
        """torch's own operation, of the operands of a Triton launch of the pass."""
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
            operands = _operand(grad_y, chosen, layout), weight, *_given(prepared, grad_y)
            return to_layout(self._backward_data(*operands), layout)

    def backward_weight(self, x, grad_y, need_bias, prepared=None):
        """x, grad_y -> (grad_weight, grad_bias or None)."""
        chosen, layout = self.choice("backward_weight"), self.problem.memory_format
        with _no_autocast(x):
            operands = _operand(x, chosen, layout), _operand(grad_y, chosen, layout), need_bias
            return self._backward_weight(*operands, *_given(prepared, grad_y))

    def backward(self, x, weight, grad_y, need_bias):
        """Both gradients: (grad_x, grad_weight, grad_bias or None); what their variants share is done once."""
        data, chosen = (self.choice(name).variant for name in ("backward_data", "backward_weight"))
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
        chosen, layout = self.choice("backward_weight"), self.problem.memory_format
        with _no_autocast(x):
            operands = _operand(x, chosen, layout), weight, _operand(grad_y, chosen, layout), need_bias
            grad_x, *of_parameters = self._joint(*operands)
            return to_layout(grad_x, layout), *of_parameters


def _given(prepared: torch.Tensor | None, grad_y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What was prepared, as a further operand; nothing where there was nothing to do."""
    return () if prepared is None or prepared is grad_y else (prepared,)


def _operand(tensor, chosen: Selection, layout: torch.memory_format):
    return tensor if chosen.variant.backend == "triton" else to_layout(tensor, layout)


_NOTHING = contextlib.nullcontext()


def _no_autocast(tensor):
    # A backward pass that runs inside an autocast region must not be lowered a second time.
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING


def plan(problem: Problem, device: torch.device) -> Plan:
    """The plan of a problem on a device, under the variants forced by :func:`tritonconv.use`."""
    named, deterministic = forced.get(), _deterministic()
    key = (problem, device, named, deterministic)
    found = _by_problem.get(key)
    if found is None:
        choose_pass = partial(_choose, problem, device, named, deterministic)
        # A deterministic run has the same bits from its first call on, and waits for the compiler.
        standby = device.type == "cuda" and not deterministic
        found = _remember(_by_problem, key, Plan(problem, device, choose_pass, standby=standby))
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


def _choose(problem, device, named, deterministic, pass_name) -> Selection:
    for name, items in named:
        record = variant(name)
        if record.pass_name == pass_name:
            why_not = record.supports(problem, device)
            if why_not is not None:
                raise VariantNotApplicable(f"{name} was forced but does not serve {problem}: {why_not}")
            config = record.default(problem, device) if items is None else dict(items)
            return Selection(record, config, "forced by tritonconv.use", forced=True)
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
    """A plan outside every memory: ``chosen`` by pass, the other passes without any stored entry; no standby.

    For the tuner, which measures what is not chosen yet.
    """
    return Plan(problem, device, partial(untuned, problem, device), chosen)


def forget() -> None:
    """Every call is planned anew: after the tuned choices have changed."""
    _by_call.clear()
    _by_problem.clear()
    forget_tables()


def save_choices(path: str | os.PathLike) -> int:
    """Writes what the calls of this process run, by problem and pass, for :func:`pin_choices`; returns how many
    problems that are. What :func:`tritonconv.use` forced is left out.

    Raises StoreError where the file cannot be written.
    """
    found = {
        str(made.problem): {name: (each.variant.name, each.config) for name, each in made.chosen.items()}
        for (_, _, named, _), made in list(_by_problem.items())
        if not named and made.chosen
    }
    pins.write(found, Path(path))
    return len(found)


def pin_choices(path: str | os.PathLike | None) -> None:
    """Has later calls run exactly what :func:`save_choices` wrote, here or on another machine; None ends that.

    A run under pinned choices repeats bit for bit: no tuned table, no model and no compiler's delay decides. Problems
    that the file does not hold are chosen as ever. The variable TRITONCONV_CHOICES names a file for a whole program.
    Raises StoreError where the file cannot be read; a call raises VariantNotApplicable where a pinned variant does not
    serve it.
    """
    pins.pin(None if path is None else Path(path))
    forget()


def wait_until_compiled(seconds: float | None = None) -> bool:
    """Waits for the kernels that calls so far have asked for; False where that takes longer than ``seconds``.

    On a GPU a layer's first calls run torch's own while its kernels are compiled in the background: a benchmark, or a
    capture of a CUDA graph, calls the model once, waits, and calls it again. At once where nothing is compiled.
    """
    from tritonconv.kernels import triton_background

    return triton_background.wait(seconds)


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
