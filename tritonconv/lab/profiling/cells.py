"""The cells to profile, and the process that runs one of them while ncu counts."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tritonconv.dispatch import Selection
from tritonconv.forced import pinned
from tritonconv.kernels import registry
from tritonconv.kernels.registry import variant, variants
from tritonconv.lab.bench import gpu, rows
from tritonconv.lab.bench.calls import FORWARD_BACKWARD
from tritonconv.lab.bench.case import Case
from tritonconv.lab.bench.classes import layer_class
from tritonconv.lab.bench.contestants import prepared
from tritonconv.lab.bench.layer_sizes import Workload
from tritonconv.lab.bench.results import BASELINE, OURS, Run
from tritonconv.lab.bench.rows import sizes_of
from tritonconv.lab.bench.standings import Standing, standings
from tritonconv.lab.bench.workloads import workload
from tritonconv.problem import PASSES, Problem

# Runs under the tool, in a process with the module paths of this one. It does not read the caller's script.
WORKER = (
    "import sys; job, sys.path[:] = sys.argv[1], sys.argv[2:]; "
    "from tritonconv.lab.profiling.cells import run_once; run_once(job)"
)


@dataclass(frozen=True)
class ProfiledCell:
    """A contestant (``torch``, ``tritonconv`` or a variant) on a layer, in one dtype, layout and pass.

    ``config`` None is what dispatch gives the contestant. ``about`` says why the cell is looked into;
    ``variant_files`` have variants that are not the project's.
    """

    layer: str
    pass_name: str
    dtype: str
    layout: str
    contestant: str
    scale: str
    config: tuple[tuple[str, int], ...] | None = None
    about: str = ""
    variant_files: tuple[str, ...] = ()

    @property
    def problem(self) -> Problem:
        return workload(self.layer).problem(getattr(torch, self.dtype), self.layout, self.scale)

    def command(self) -> list[str]:
        """Runs the cell in a Python of its own."""
        return [sys.executable, "-c", WORKER, json.dumps(asdict(self)), *map(str, sys.path)]


def worst_of(run: Run, count: int, passes: Sequence[str] = (), only: str = "") -> list[ProfiledCell]:
    """The ``count`` cells to look into first, in each class of layers, pass and dtype; ``only`` is a part of a layer's
    name.

    Cells where torch is faster come first, then those furthest from their roof. Where torch is faster, its own call
    follows, in its memory format. Where dispatch chose torch's own call, our fastest Triton variant stands for ours.
    """
    groups: dict[tuple[str, str, str], list[Standing]] = {}
    for standing in standings(run.of_models()):
        row = standing.ours
        if only in row["layer"] and (not passes or row["pass"] in passes):
            groups.setdefault((layer_class(row["problem"]), row["pass"], row["dtype"]), []).append(standing)
    first = (standing for group in groups.values() for standing in sorted(group, key=_urgency)[:count])
    return list(dict.fromkeys(cell for standing in first for cell in _cells_of(standing, run)))


def _urgency(standing: Standing) -> tuple[bool, float]:
    return standing.ratio >= 1 and not standing.torch_chosen, standing.ours.get("percent_of_roof") or standing.ratio


def _cells_of(standing: Standing, run: Run) -> Iterator[ProfiledCell]:
    if standing.torch_chosen:
        for name in PASSES if standing.ours["pass"] == FORWARD_BACKWARD else (standing.ours["pass"],):
            nearest = _nearest(standing.ours, name, run)
            if nearest is not None:
                yield _cell(nearest, run, nearest["variant"], f"lost: {_times(nearest)}", nearest["config"])
                yield _cell(nearest, run, BASELINE, "chosen")
        return
    roof = standing.ours.get("percent_of_roof")
    share = f", {roof:.0f} % of the roof" if roof else ""
    faster = f"{standing.ratio:.2f} times as fast as the best torch"
    yield _cell(standing.ours, run, OURS, f"{_times(standing.ours)}, {faster}{share}")
    if standing.ratio < 1:
        yield _cell(standing.torch, run, BASELINE, f"faster: {_times(standing.torch)}")


def _nearest(row: Mapping, pass_name: str, run: Run) -> Mapping | None:
    """The tuner's fastest timing of a Triton kernel in a pass of the row's cell."""
    where = {"layer": row["layer"], "dtype": row["dtype"], "layout": row["layout"], "pass": pass_name}
    mine = [row for row in run.timings if all(row[key] == value for key, value in where.items())]
    names = {record.name for record in variants(pass_name) if record.backend == "triton"}
    return min((row for row in mine if row["variant"] in names), key=lambda row: row["median_ms"], default=None)


def _times(row: Mapping) -> str:
    return f"{row['median_ms'] * 1e3:.4g} us measured"


def _cell(row: Mapping, run: Run, contestant: str, about: str, config: Mapping[str, int] | None = None) -> ProfiledCell:
    given = None if config is None else tuple(sorted(config.items()))
    return ProfiledCell(
        row["layer"], row["pass"], row["dtype"], row["layout"], contestant, run.environment["scale"], given, about
    )


def combinations(
    layers: Iterable[Workload],
    passes: Iterable[str],
    dtypes: Iterable[str],
    layouts: Sequence[str],
    contestants: Sequence[str],
    scale: str,
    variant_files: tuple[str, ...] = (),
) -> list[ProfiledCell]:
    """Every combination; a variant in the cells of its own pass. Raises ArgumentError for a variant there is not."""
    own = {name: variant(name).pass_name for name in contestants if name not in (BASELINE, OURS)}
    return [
        ProfiledCell(layer.name, pass_name, dtype, layout, name, scale, variant_files=variant_files)
        for layer in layers
        for pass_name in passes
        for dtype in dtypes
        for layout in layouts
        for name in contestants
        if own.get(name, pass_name) == pass_name
    ]


def run_once(job: str) -> None:
    """In the process under ncu: the cell's call, warm, between the start and the stop of the counting."""
    cell = _read(job)
    for path in cell.variant_files:
        registry.load(Path(path))
    device = torch.device("cuda")
    case = Case(cell.problem, device)
    record = None if cell.contestant in (BASELINE, OURS) else variant(cell.contestant)
    fixed: tuple[Selection, ...] = ()
    if record is not None and cell.config is not None:
        fixed, record = (Selection(record, dict(cell.config), "profiled"),), None
    with gpu.cudnn_benchmark(device), pinned(*fixed) if fixed else contextlib.nullcontext():
        call, _ = prepared(cell.contestant, record, case, cell.pass_name)
        for _ in range(gpu.WARM_CALLS):
            call()
        torch.cuda.synchronize(device)
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize(device)
        torch.cuda.profiler.stop()


def _read(job: str) -> ProfiledCell:
    fields = json.loads(job)
    config = None if fields["config"] is None else tuple((key, value) for key, value in fields["config"])
    return ProfiledCell(**{**fields, "variant_files": tuple(fields["variant_files"]), "config": config})


def head(cell: ProfiledCell) -> dict[str, object]:
    """The fields that the rows about a cell begin with."""
    return {
        **rows.head(cell.layer, workload(cell.layer).suite, cell.pass_name, cell.problem),
        "variant": cell.contestant,
        **({} if cell.config is None else {"config": dict(cell.config)}),
        "problem": sizes_of(cell.problem),
        "about": cell.about,
    }
