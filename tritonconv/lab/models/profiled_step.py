"""Where the time of a step goes: torch's profiler, each top operation with its backward in one row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from tritonconv.lab.models.recorded import LayerCall
from tritonconv.problem import Problem

TRANSPOSED = "conv_transpose3d"
BACKWARD = "autograd::engine::evaluate_function: "
ENGINE = "autograd engine"  # nodes that belong to no operation of the forward: sums into parameters' gradients
LEAST_SHARE = 0.005  # what takes less is one row
OTHER = "other"
TIMES = ("forward_ms", "backward_ms")

Key = tuple[Any, ...]


@dataclass
class Operation:
    """An operation of a step: ms of a step on the device, and the calls. A transposed convolution has its problem, and
    the layers that are that problem; without layers the model calls torch's function, which ``convert`` leaves."""

    name: str
    calls: int = 0
    forward_ms: float = 0.0
    backward_ms: float = 0.0
    problem: Problem | None = None
    layers: tuple[str, ...] = ()

    @property
    def ms(self) -> float:
        return self.forward_ms + self.backward_ms


def profiled(
    step: Callable[[], object], device: torch.device, calls: Sequence[LayerCall], steps: int
) -> list[Operation]:
    """The operations of a warm step, longest first; the times are medians of ``steps`` steps.

    ``calls`` are those of one step, whose problems name the transposed convolutions.
    """
    _events(step, device)  # the profiler's own start
    each = [operations(_events(step, device), calls, device.type == "cuda") for _ in range(steps)]
    found = each[0]
    for key, one in found.items():
        same = [other[key] for other in each if key in other]
        one.forward_ms, one.backward_ms = (median(getattr(other, name) for other in same)
                                           for name in TIMES)  # fmt: skip
    return _longest_first(found.values())


def _events(step: Callable[[], object], device: torch.device) -> list[Any]:
    """The events of a step: of a CPU's operations, which on a GPU hold the times of their kernels."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=kinds, record_shapes=True, acc_events=True) as profile:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return [event for event in profile.events() or [] if event.device_type == DeviceType.CPU]


def operations(events: Iterable[Any], calls: Iterable[LayerCall], on_gpu: bool) -> dict[Key, Operation]:
    """The operations of one step; a backward counts to the operation of the forward that has its sequence number."""
    tops = list(_tops(event for event in events if event.cpu_parent is None))
    forwards = {each.sequence_nr: top for top in tops if not _is_backward(top) for each in _within(top)
                if each.sequence_nr >= 0}  # fmt: skip
    layers: dict[Key, list[LayerCall]] = {}
    for call in calls:
        layers.setdefault(_key_of(call.problem), []).append(call)
    found: dict[Key, Operation] = {}
    for top in tops:
        backward = _is_backward(top)
        source = forwards.get(top.sequence_nr) if backward else top
        key: Key = (ENGINE,) if source is None else (source.name.removeprefix("aten::"),)
        known: list[LayerCall] = []
        if key == (TRANSPOSED,):
            key = _key_of_event(source)
            known = layers.get(key, [])
        if key not in found:
            names = tuple(dict.fromkeys(call.layer for call in known))
            problem = known[0].problem if known else None
            found[key] = Operation(str(problem) if problem else key[0], problem=problem, layers=names)
        one, us = found[key], top.device_time_total if on_gpu else top.cpu_time_total
        if backward:
            one.backward_ms += us / 1e3
        else:
            one.calls += 1
            one.forward_ms += us / 1e3
    return found


def _longest_first(found: Iterable[Operation]) -> list[Operation]:
    """The operations, those that take next to nothing in one row at the end."""
    ordered = sorted((each for each in found if each.ms > 0), key=lambda each: -each.ms)
    least = LEAST_SHARE * sum(each.ms for each in ordered)
    kept = [each for each in ordered if each.ms >= least or each.problem is not None]
    rest = [each for each in ordered if each.ms < least and each.problem is None]
    if rest:
        calls = sum(each.calls for each in rest)
        kept.append(Operation(OTHER, calls, *(sum(getattr(each, name) for each in rest) for name in TIMES)))
    return kept


def _is_backward(event: Any) -> bool:
    return event.name.startswith(BACKWARD)


def _tops(events: Iterable[Any]) -> Iterator[Any]:
    """The operations that no other operation called; an annotation of a program is none."""
    for event in events:
        if getattr(event, "is_user_annotation", False):
            yield from _tops(event.cpu_children)
        else:
            yield event


def _within(event: Any) -> Iterator[Any]:
    yield event
    for child in event.cpu_children:
        yield from _within(child)


def _key_of(problem: Problem) -> Key:
    stride, padding, output_padding, groups, dilation = problem.torch_arguments
    return TRANSPOSED, problem.x_shape, problem.weight_shape, stride, padding, output_padding, groups, dilation


def _key_of_event(event: Any) -> Key:
    """The same of a call of ``aten::conv_transpose3d``, whose arguments the profiler keeps."""
    x, weight = (tuple(shape) for shape in event.input_shapes[:2])
    stride, padding, output_padding, groups, dilation = event.concrete_inputs[3:8]
    triples = (tuple(each) * (3 // len(each)) for each in (stride, padding, output_padding, dilation))
    steps, front, extra, rates = triples
    return TRANSPOSED, x if len(x) == 5 else (1, *x), weight, steps, front, extra, groups, rates
