"""The fields of a result row, from the layer and from what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from tritonconv.bench import gate, roofs
from tritonconv.bench.calls import TensorCall, work
from tritonconv.bench.results import BASELINE
from tritonconv.bench.subject import Subject
from tritonconv.bench.timing import Times
from tritonconv.kernels.registry import Variant
from tritonconv.problem import Problem


@dataclass(frozen=True)
class Candidate:
    """A contestant of a cell: what it runs by pass (nothing for torch), the call at size, and the gate's verdict."""

    name: str
    chosen: dict[str, Variant]
    call: TensorCall
    verdict: gate.Verdict


def layer_fields(subject: Subject, problem: Problem) -> dict[str, object]:
    """The layer: where it comes from, its sizes as timed and as in the model."""
    names = ("n", "c_in", "c_out", "size", "kernel", "stride", "crop", "out_size", "dilation", "groups", "bias")
    sizes = {name: getattr(problem, name) for name in names}
    original = subject.original(problem.layout)
    return {
        "source": subject.layer.source,
        "duplicates": subject.duplicates,
        "text": str(problem),
        "problem": {**sizes, "back_crop": [axis.back_crop for axis in problem.axes]},
        "scaled": problem != original,
        "original": {name: getattr(original, name) for name in ("n", "size", "out_size")},
    }


def measured_fields(
    one: Candidate,
    times: Times,
    problem: Problem,
    head: Mapping[str, str],
    measured_roofs: Iterable[Mapping],
    device: torch.device,
) -> dict[str, object]:
    """The candidate: times (ms), rates, share of the roof, errors, speed-up; ``head`` holds the pass and the dtype."""
    flops, moved = work(problem, head["pass"])
    allowed = roofs.attainable(measured_roofs, head["dtype"], flops, moved, problem.bytes())
    spread = times.spread(one.name)
    seconds = spread.median * 1e-3
    ratio = times.speedup(one.name, BASELINE) if BASELINE in times.rounds else None
    return {
        "variant": one.name,
        "chosen": {name: record.name for name, record in one.chosen.items()},
        "config": {name: dict(record.default(problem, device)) for name, record in one.chosen.items()},
        "median_ms": spread.median,
        "p20_ms": spread.p20,
        "p80_ms": spread.p80,
        "n_runs": spread.runs,
        "flops": flops,
        "bytes": moved,
        "gflop_per_s": flops / seconds / 1e9,
        "gb_per_s": moved / seconds / 1e9,
        "percent_of_roof": 100 * flops / seconds / allowed if allowed else None,
        "gate_output": one.verdict.output,
        "max_error": one.verdict.max_error,
        "torch_error": one.verdict.torch_error,
        "tolerance": one.verdict.tolerance,
        "deterministic": all(record.deterministic for record in one.chosen.values()) if one.chosen else None,
        "baseline": BASELINE,
        "speedup": ratio.median if ratio else None,
        "speedup_p20": ratio.p20 if ratio else None,
        "speedup_p80": ratio.p80 if ratio else None,
    }
