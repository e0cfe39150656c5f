"""Compiles the launch of a variant for a target that need not be there.

Triton asks its *driver* for the target; a driver that only answers this question is all that compilation needs. The
launches are the variant's own, for operands without memory, so that strides, divisibility and constants are specialised
as they are in a real call.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tritonconv.errors import ArgumentError
from tritonconv.kernels import triton_compiled
from tritonconv.kernels.registry import triton_fault, variant
from tritonconv.kernels.targets import TARGETS, Target
from tritonconv.kernels.variant import Config, Variant
from tritonconv.lab.bench.layer_sizes import Workload
from tritonconv.lab.inspection.machine_code import resources
from tritonconv.lab.inspection.records import Record
from tritonconv.precision import IEEE, PRECISIONS, TF32
from tritonconv.problem import Problem

# Placeholder device that is passed to ``supports`` and ``default``; no CUDA device is touched.
GPU = torch.device("cuda", 0)
META = torch.device("meta")
MOST_SUMMARY_TEXT, MOST_ERROR_TEXT = 240, 4000


@dataclass(frozen=True)
class Job:
    """One launch to compile for one target; ``config`` None is the variant's default."""

    variant: str
    layer: Workload
    precision: str
    layout: str
    target: str
    config: Config | None = None

    @property
    def problem(self) -> Problem:
        return self.layer.problem(PRECISIONS[self.precision], self.layout)


# (name, compiled kernel, target, seconds of compilations by hash) -> fields of a record
Measure = Callable[[str, Any, Target, dict[str, float]], dict[str, Any]]


def check_compiler() -> None:
    """Raises ArgumentError where this process cannot compile.

    A folder of compiled kernels is set aside: it holds binaries alone, and none of the code on the way to them.
    """
    fault = triton_fault()
    if fault is not None:
        raise ArgumentError(f"{fault}; nothing else compiles the kernels")
    import triton

    if triton.knobs.runtime.interpret:
        raise ArgumentError("TRITON_INTERPRET=1 is set, and the interpreter compiles nothing: unset it")
    triton_compiled.remove()


class TargetDriver:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, target: Target) -> None:
        self.target = target.gpu_target()
        # Kernels keep their compiled forms by device: each target is a device of its own, far from the real ones.
        self.device = 1000 + list(TARGETS).index(target.name)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return GPU


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Inside the block Triton compiles for the target."""
    from triton.runtime import driver

    before = driver._active
    driver.set_active(TargetDriver(target))
    try:
        yield
    finally:
        driver._active = before  # reset_active() would ask for the driver of a GPU, and there may be none


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Inside the block torch's convolutions of float32 multiply in this precision, where it is one of float32."""
    switch: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = switch.fp32_precision
    if precision in (TF32, IEEE):
        switch.fp32_precision = precision
    try:
        yield
    finally:
        switch.fp32_precision = before


_known: dict[str, dict[str, Any]] = {}


def _measured(name: str, kernel: Any, target: Target, seconds: dict[str, float]) -> dict[str, Any]:
    """The fields of a record that the compiled kernel answers; a kernel that several launches share is read once."""
    if kernel.hash not in _known:
        _known[kernel.hash] = resources(kernel, target.backend)
    read = _known[kernel.hash]
    blocks = target.resident_blocks(
        read["warps"], read["registers"], read["shared_bytes"], read["tensor_memory_columns"]
    )
    return {
        **read,
        "kernel": name,
        "seconds": seconds.get(kernel.hash),
        "blocks": blocks,
        "occupancy": round(target.occupancy(blocks, read["warps"]), 4),
    }


def compile_job(job: Job, measure: Measure = _measured) -> list[Record]:
    """Compiles one launch: a record per kernel, or one that carries the error. Nothing is raised for a bad kernel."""
    record, target, problem, fields = variant(job.variant), TARGETS[job.target], job.problem, _fields(job)
    begin = time.perf_counter()
    try:
        with compiling_for(target), products_in(job.precision), _seconds() as seconds:
            starts = record.starts(problem, GPU)
            config = starts[0] if job.config is None else job.config
            fields |= {"config": dict(config), "default": config in starts}
            kernels = compile_launch(record, problem, fields["config"])
            return [Record(**fields, **measure(name, kernel, target, seconds)) for name, kernel in kernels]
    except Exception as error:  # a kernel that does not compile is a result
        return [Record(**fields, error=_text(error), seconds=round(time.perf_counter() - begin, 3))]


def failed(job: Job, error: str) -> list[Record]:
    """The record of a job that made none."""
    return [Record(**_fields(job), error=error)]


def _fields(job: Job) -> dict[str, Any]:
    problem = job.problem
    return {
        "variant": job.variant,
        "layer": job.layer.name,
        "problem": str(problem),
        "dtype": str(problem.dtype).removeprefix("torch."),
        "precision": job.precision,
        "layout": job.layout,
        "target": job.target,
        "config": dict(job.config or {}),
        "default": job.config is None,
    }


def compile_launch(record: Variant, problem: Problem, config: Config) -> list[tuple[str, Any]]:
    """(name, compiled kernel) of everything the variant launches.

    The whole backward at once is compiled with the backward-weight variant, whose config it takes. Raises RuntimeError
    for a variant that launches as it likes, or nothing.
    """
    from tritonconv.kernels.triton_program import JOINT, Program, operands_of

    if record.launches is None:
        raise RuntimeError("the variant does not say what it launches")
    kernels = _compiled(record.program(problem, config))
    if not kernels:
        raise RuntimeError("the variant launches no kernel")
    if record.joint is not None:
        both = Program.of(partial(record.joint, problem, config), operands_of(problem, JOINT, META))
        kernels += [(f"{name} (joint)", each) for name, each in _compiled(both)]
    return kernels


def _compiled(program: Any) -> list[tuple[str, Any]]:
    return [(kernel.name, compiled) for kernel, compiled in zip(program.kernels, program.compile(), strict=True)]


@contextlib.contextmanager
def _seconds() -> Iterator[dict[str, float]]:
    """Inside the block the seconds of each compilation that Triton's cache does not spare, by the kernel's hash."""
    import triton

    spent: dict[str, float] = {}

    def listen(*, src, metadata, metadata_group, times, cache_hit):
        if not cache_hit:
            spent[metadata["hash"]] = round(times.total / 1e6, 3)

    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = listen
        yield spent


def _text(error: BaseException) -> str:
    """The reason in one line, then the whole error. Triton's quote the kernel's source down to a caret below a line."""
    quotes = [_around_caret(str(error))]
    while error.__cause__ is not None:
        error = error.__cause__
        quotes.append(_around_caret(str(error)))
    line = next((line for _, line in reversed(quotes) if line), "")
    text = f"{type(error).__name__}: {' '.join(quotes[-1][0].split())}"[:MOST_SUMMARY_TEXT]
    return f"{text}{f' (at: {line})' if line else ''}\n{str(error)[-MOST_ERROR_TEXT:]}"


def _around_caret(text: str) -> tuple[str, str]:
    """(the text behind the last caret, the line of source above it); without a caret the whole text and no line."""
    lines = text.splitlines()
    carets = [index for index, line in enumerate(lines) if line.strip() == "^" and index > 0]
    if not carets:
        return text, ""
    return "\n".join(lines[carets[-1] + 1 :]) or text, lines[carets[-1] - 1].strip()
