"""``explain``: which variant serves a call, why, and why not the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from tritonconv import fallback
from tritonconv.arguments import geometry
from tritonconv.autocast import cast_arguments
from tritonconv.device import current
from tritonconv.dispatch import Plan, choice_now, plan, plan_for
from tritonconv.errors import EmptyOutputError
from tritonconv.kernels.registry import triton_fault, variants
from tritonconv.kernels.work import bytes_spared
from tritonconv.plan import REPLAYED
from tritonconv.problem import PASSES, Problem
from tritonconv.switches import graphs, torch_only

if TYPE_CHECKING:
    from tritonconv.epilogue import Epilogue

CALLS = {True: "in CUDA graphs", False: "in eager calls"}  # of the choices that do not hold here


@dataclass(frozen=True)
class Explanation:
    """The plan of a call. ``plan`` is None where the call goes to torch itself, and ``reason`` then says why."""

    plan: Plan | None
    reason: str | None
    text: str

    def __str__(self) -> str:
        return self.text


def explain(
    input, weight=None, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1,
    *, out=None, activation=None, residual=None, rounding=None,
) -> Explanation:  # fmt: skip
    """Prints and returns the plan of a call, the reason for each choice, and for every other variant why not.

    Takes the arguments of :func:`tritonconv.conv_transpose3d`, or a :class:`tritonconv.Problem` alone (for the CPU). Of
    an epilogue it says who computes it, and of ``out`` whether y is written there at once. Nothing is computed. Raises
    what the call itself would raise.
    """
    if isinstance(input, Problem):
        return explain_problem(input, torch.device("cpu"))
    if weight is None:
        raise TypeError("explain: weight is missing; give the arguments of conv_transpose3d, or a Problem alone")
    if all(isinstance(tensor, torch.Tensor) for tensor in (input, weight)):
        input, weight, bias = cast_arguments(input, weight, bias)
    epilogue = None
    if activation is not None or residual is not None or rounding is not None:
        from tritonconv.epilogue import parsed  # a plain call has none

        epilogue = parsed(activation, residual, rounding)[0]
    args = (stride, padding, output_padding, groups, dilation)
    batched = input.unsqueeze(0) if input.dim() == 4 else input
    reason = fallback.reason(input, weight, bias)
    try:
        entry = plan_for(batched, weight, bias, args) if reason is None else None
        if entry is not None:
            made = entry if epilogue is None else plan(replace(entry.problem, epilogue=epilogue.kind), entry.device)
            return _show(made, epilogue, out is not None)
    except EmptyOutputError as refusal:
        explanation = Explanation(None, str(refusal), f"torch answers this call, or refuses it: {refusal}")
        print(explanation)
        return explanation
    fallback.call_of(batched, weight, bias, geometry(*args))
    explanation = Explanation(None, reason, f"torch itself serves this call: {reason}")
    print(explanation)
    return explanation


def explain_problem(problem: Problem, device: torch.device) -> Explanation:
    """:func:`explain` of a problem alone, on any device; nothing of the device is touched."""
    return _show(plan(problem, device), problem.epilogue)


def _show(made: Plan, epilogue: Epilogue | None = None, out: bool = False) -> Explanation:
    problem = made.problem
    lines = [
        f"{problem} on {made.device}",
        f"{len(problem.phases)} phases with {', '.join(str(phase.taps) for phase in problem.phases[:8])}"
        f"{', ...' if len(problem.phases) > 8 else ''} taps, "
        f"{problem.flops / 1e9:.3g} GFLOP useful, {problem.bytes() / 1e6:.3g} MB compulsory, "
        f"{problem.intensity():.3g} FLOP/byte, {problem.index_bits}-bit offsets",
    ]
    fault = triton_fault()
    if fault is not None:
        lines.append(f"no Triton variant: {fault}")
    for pass_name in PASSES:
        choice = made.choice(pass_name)
        lines.append(f"{pass_name}: {choice.variant.name} ({choice.variant.idea})")
        lines.append(f"  because: {choice.reason}")
        other = choice_now(problem, made.device, pass_name, in_graph=not graphs.get())
        if (other.variant, other.config) != (choice.variant, choice.config):
            config = "".join(f" {key}={value}" for key, value in other.config.items())
            lines.append(f"  {CALLS[not graphs.get()]}: {other.variant.name}{config}")
            lines.append(f"  because: {other.reason}")
        if pass_name == PASSES[0]:
            lines += [f"  {line}" for line in _behind(made, epilogue, out)]
        if choice.variant.spreads_nonfinite:
            lines.append(f"  NaN and infinities: {choice.variant.spreads_nonfinite}")
        lines += [f"  {line}" for line in _launched(made, pass_name)]
        if choice.outdated:
            lines.append(
                f"  {choice.variant.name} has changed since it was measured; `tritonconv tune` measures it again"
            )
        others = [each for each in variants(pass_name) if each.name != choice.variant.name]
        with current(made.device):
            why_not = [each.supports(problem, made.device) for each in others]
        lines += [
            f"  not {each.name}: {why or 'applies, but the choice above comes first'}"
            for each, why in zip(others, why_not, strict=True)
        ]
    command = tune_command(problem, made.device)
    chosen = [made.choice(pass_name) for pass_name in PASSES]
    if command and any(not each.forced and (each.entry is None or each.outdated) for each in chosen):
        lines.append(f"to measure it here: {command}")
    explanation = Explanation(made, None, "\n".join(lines))
    print(explanation)
    return explanation


def _behind(made: Plan, epilogue: Epilogue | None, out: bool) -> Iterator[str]:
    """Who computes the epilogue, and where y goes."""
    if epilogue is not None and epilogue.in_kernels:
        size = bytes_spared(made.problem) / 1e6
        if made.takes(epilogue):
            yield f"epilogue {epilogue}: in the kernel, before y is stored; spares {size:.3g} MB of torch's operations"
        else:
            yield f"epilogue {epilogue}: torch's operations in y's memory ({size:.3g} MB more than in one pass)"
        yield "gradients: torch's derivative of the epilogue, then those of the plain layer, by its choices below"
    if out or (epilogue is not None and not epilogue.in_kernels):
        yield "out=: " + ("y is written there at once" if made.writes_out else "the answer is computed and copied")


def _launched(made: Plan, pass_name: str) -> Iterator[str]:
    """The kernels of a Triton choice, and how the calls so far found their launches."""
    choice = made.choice(pass_name)
    if choice.variant.launches is None:
        return
    kernels, nbytes = made.launched(pass_name)
    held = f", {nbytes / 1e6:.3g} MB of workspace" if nbytes else ""
    yield f"launches for operands dense in this layout: {', '.join(kernels) or 'none'}{held}"
    for name, replay in made.replays.items():
        counts = replay.counts
        if pass_name in REPLAYED.get(name, PASSES[:1]) and any((counts.repeated, counts.anew, counts.stood_in)):
            yield (
                f"calls ({name.replace('_', ' ')}): {counts.repeated} repeated, {counts.anew} worked out anew, "
                f"{counts.stood_in} answered by torch's own meanwhile"
            )
    if pass_name == "forward" and made.kept_order is not None:
        size = math.prod(made.problem.weight_shape) * made.problem.dtype.itemsize
        yield f"keeps the packed weight for its backward: {size / 1e6:.3g} MB"


def tune_command(problem: Problem, device: torch.device) -> str | None:
    """The command line that tunes a problem on a device; None where there is none, or where no call would use it."""
    if not problem.torch_crop.exact or not problem.n or not problem.c_out or torch_only():
        return None
    if problem.epilogue is not None and not problem.epilogue.in_kernels:
        problem = problem.plain
    crop, usual = problem.torch_crop, {"stride": 1, "padding": 0, "output-padding": 0, "dilation": 1}
    values = (problem.stride, crop.padding, crop.output_padding, problem.dilation)
    words = [f"tritonconv tune --x {_joined(problem.x_shape)} --weight {_joined(problem.weight_shape)}"]
    words += [
        f"--{name} {_joined(value)}"
        for (name, default), value in zip(usual.items(), values, strict=True)
        if value != (default,) * 3
    ]
    words += [f"--groups {problem.groups}"] * (problem.groups != 1) + ["--bias"] * problem.bias
    dtype = str(problem.dtype).removeprefix("torch.")
    words += problem.epilogue.flags if problem.epilogue is not None else []
    return " ".join([*words, f"--dtype {dtype} --layout {problem.layout} --device {device}"])


def _joined(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes))
