"""The torch formulations of each pass beside torch's own, on a CPU: the rows that ``autotune/nearby.py`` chooses by."""

from __future__ import annotations

import datetime
import json
import math
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

from tritonconv.arguments import geometry, problem_of
from tritonconv.autotune import nearby
from tritonconv.device import cpu_name, cpu_vendor
from tritonconv.errors import ArgumentError
from tritonconv.kernels import torch_native
from tritonconv.kernels.registry import variants
from tritonconv.lab.bench.layer_sizes import Workload
from tritonconv.lab.bench.progress import Progress
from tritonconv.problem import LAYOUTS, PASSES, Problem

CPU = torch.device("cpu")
CELL_SECONDS = 0.35  # of one pass of one layer
LEAST_ROUNDS, MOST_ROUNDS = 4, 40


def measure(problem: Problem) -> dict[str, float]:
    """The logarithm of (median time / torch's own) by variant, of a gradient over torch's one operation for both; and
    those of torch's own times in microseconds (``nearby.KINDS``).
    """
    x, grad_y = (
        torch.randn(shape, dtype=problem.dtype).contiguous(memory_format=problem.memory_format)
        for shape in (problem.x_shape, problem.y_shape)
    )
    weight = torch.randn(problem.weight_shape, dtype=problem.dtype)
    bias = torch.randn(problem.c_out, dtype=problem.dtype) if problem.bias else None
    operands = {PASSES[0]: (x, weight, bias), PASSES[1]: (grad_y, weight), PASSES[2]: (x, grad_y, problem.bias)}
    both = partial(torch_native.native_gradients, problem, grad_y, x, weight, (True, True, problem.bias))
    logs: dict[str, float] = {}
    with torch.no_grad():
        for name in PASSES:
            calls: dict[str, Callable[[], object]] = {} if name == PASSES[0] else {nearby.BOTH: both}
            for record in variants(name):
                if record.backend == "torch" and record.supports(problem, CPU) is None and record.launch is not None:
                    config = record.default(problem, CPU)
                    calls[record.name] = partial(record.launch, problem, config, *operands[name])
            medians = _medians(calls)
            base = medians.pop(nearby.BOTH) if nearby.BOTH in medians else medians.pop(f"{name}_{nearby.NATIVE}")
            logs[nearby.KINDS["forward" if name == PASSES[0] else "gradients"]] = math.log(1e6 * base)
            logs |= {each: math.log(median / base) for each, median in medians.items()}
    return logs


def _medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds by name, of calls in turns."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin, rounds = perf_counter(), 0
    while rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and perf_counter() - begin < CELL_SECONDS):
        for name, call in calls.items():
            start = perf_counter()
            call()
            times[name].append(perf_counter() - start)
        rounds += 1
    return {name: statistics.median(each) for name, each in times.items()}


def problems(layers: Iterable[Workload], dtype: torch.dtype) -> list[tuple[str, Problem]]:
    """(name of the layer, problem) in both memory formats, where torch answers in that of the operands."""
    found = []
    for layer in layers:
        for layout, memory_format in LAYOUTS.items():
            problem = layer.problem(dtype, layout, scale="cpu")
            if not problem.torch_crop.exact or not problem.n or not problem.c_out:
                continue
            stride, padding, output_padding, groups, dilation = problem.torch_arguments
            call = geometry(stride, padding, output_padding, groups, dilation)
            x, weight = (
                torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
                for shape in (problem.x_shape, problem.weight_shape)
            )
            if problem_of(x, weight, None, call, CPU).layout == layout:
                found.append((layer.name, problem))
    return found


def extend(path: Path, layers: Iterable[Workload], dtype: torch.dtype, seconds: float, progress: Progress) -> int:
    """Measures within the seconds and merges the rows into the file; returns how many were measured.

    Raises ArgumentError where the file is of another vendor, number of threads or torch.
    """
    here = {"format": nearby.FORMAT, "vendor": cpu_vendor(), "cpu": cpu_name(), "threads": torch.get_num_threads(),
            "torch": torch.__version__.partition("+")[0]}  # fmt: skip
    rows: dict[Problem, tuple[str, dict[str, float]]] = {}
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        differs = [f"{name} {old.get(name)!r} and {value!r}" for name, value in here.items() if old.get(name) != value]
        if differs:
            raise ArgumentError(f"{path}: its rows were measured elsewhere: {'; '.join(differs)}")
        rows = {problem: (layer, logs) for layer, problem, logs in nearby.unpacked(old)}
    begin, count = perf_counter(), 0
    wanted = problems(layers, dtype)
    progress.begin(len(wanted))
    for layer, problem in wanted:
        if perf_counter() - begin > seconds:
            break
        rows[problem] = layer, measure(problem)
        count += 1
        progress.step(f"{layer} {problem.layout}")
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    text = nearby.pack({**here, "utc": today}, [(layer, problem, logs) for problem, (layer, logs) in rows.items()])
    path.write_text(text, encoding="utf-8")
    return count
