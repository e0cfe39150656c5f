"""The fields of a result row, from the layer and from what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from tritonconv.lab.bench import roofs, stages
from tritonconv.lab.bench.calls import work
from tritonconv.lab.bench.classes import layer_class
from tritonconv.lab.bench.clock import CLOCK
from tritonconv.lab.bench.contestants import Contestant
from tritonconv.lab.bench.environment import version
from tritonconv.lab.bench.layer_sizes import Workload
from tritonconv.lab.bench.measure import Measured
from tritonconv.lab.bench.results import BASELINE
from tritonconv.precision import TF32, float32_precision
from tritonconv.problem import Problem


def sizes_of(problem: Problem) -> dict[str, object]:
    """The sizes and hyper-parameters of a problem, by their names in :class:`~tritonconv.problem.Problem`."""
    names = ("n", "c_in", "c_out", "size", "kernel", "stride", "crop", "out_size", "dilation", "groups", "bias")
    back_crop = [axis.back_crop for axis in problem.axes]
    return {**{name: getattr(problem, name) for name in names}, "back_crop": back_crop}


def head(layer: str, suite: str, pass_name: str, problem: Problem) -> dict[str, Any]:
    """The fields that every row about a pass of a layer begins with, the columns of an epilogue among them."""
    dtype = str(problem.dtype).removeprefix("torch.")
    names = {"layer": layer, "suite": suite, "pass": pass_name, "layout": problem.layout, "dtype": dtype}
    return names | stages.fields(problem)


def layer_fields(layer: Workload, duplicates: Iterable[str], problem: Problem) -> dict[str, object]:
    """The layer: where it comes from, its sizes as timed and as in the model."""
    original = layer.problem(problem.dtype, problem.layout)
    return {
        "source": layer.source,
        **({"family": layer.family} if layer.family else {}),
        "duplicates": duplicates,
        "text": str(problem),
        "problem": sizes_of(problem),
        "class": layer_class(sizes_of(problem)),
        "scaled": problem != original,
        "original": {name: getattr(original, name) for name in ("n", "size", "out_size")},
    }


def versions_of(device: torch.device) -> dict[str, str | None]:
    """The versions that a time depends on besides the device and our own sources; on a GPU also the clock's."""
    versions: dict[str, str | None] = {"torch": torch.__version__, "triton": version("triton")}
    if device.type == "cuda":
        versions |= {"cuda": torch.version.cuda, "clock": CLOCK}
    return versions


def measured_fields(
    one: Contestant,
    measured: Measured,
    problem: Problem,
    head: Mapping[str, str],
    measured_roofs: Iterable[Mapping],
) -> dict[str, object]:
    """Times (ms), rates, share of the roof, errors, speed-up of a contestant; ``head`` holds the pass and the dtype.

    A field without a column in its name belongs to the device's first column, which ``timing`` names.
    """
    flops, moved = work(problem, head["pass"])
    allowed = roofs.attainable(
        measured_roofs, head["dtype"], flops, moved, problem.bytes(), float32_precision() == TF32
    )
    times = measured.times[measured.first]
    spread = times.spread(one.name)
    seconds = spread.median * 1e-3
    executed = executed_flops(one, problem)
    warning = warning_of(one, measured, problem, head["pass"], measured_roofs)
    ratio = times.speedup(one.name, BASELINE) if BASELINE in times.rounds else None
    return {
        "variant": one.name,
        "median_ms": spread.median,
        "p20_ms": spread.p20,
        "p80_ms": spread.p80,
        "n_runs": spread.runs,
        "flops": flops,
        "bytes": moved,
        "gflop_per_s": flops / seconds / 1e9,
        "gb_per_s": moved / seconds / 1e9,
        "executed_flops": executed,
        "executed_gflop_per_s": executed / seconds / 1e9 if executed else None,
        "timing": measured.first,
        **measured.fields(one.name, BASELINE),
        "compile_s": max(0.0, one.first_s - seconds),
        **({"warning": warning} if warning else {}),
        "percent_of_roof": 100 * flops / seconds / allowed if allowed else None,
        "gate_output": one.verdict.output,
        "max_error": one.verdict.max_error,
        "torch_error": one.verdict.torch_error,
        "tolerance": one.verdict.tolerance,
        "deterministic": all(choice.variant.deterministic for choice in one.chosen.values()) if one.chosen else None,
        "baseline": BASELINE,
        "speedup": ratio.median if ratio else None,
        "speedup_p20": ratio.p20 if ratio else None,
        "speedup_p80": ratio.p80 if ratio else None,
    }


def warning_of(
    one: Contestant, measured: Measured, problem: Problem, pass_name: str, measured_roofs: Iterable[Mapping]
) -> str:
    """Where a column's time is too good for the memory (:func:`roofs.beyond`): the column, and how much; else ""."""
    rate = roofs.fastest_rate(measured_roofs, problem.bytes())
    for column, times in measured.times.items():
        if one.name in times.rounds:
            found = roofs.beyond(problem, pass_name, times.spread(one.name).median, rate)
            if found:
                return f"{column}: {found}"
    return ""


def executed_flops(one: Contestant, problem: Problem) -> float | None:
    """The FLOPs that the variants execute, padding and masked taps included; None where one of them does not say."""
    counts = [choice.variant.work(problem, choice.config) for choice in one.chosen.values() if choice.variant.work]
    if not counts or len(counts) < len(one.chosen):
        return None
    return float(sum(count.flops for count in counts))
