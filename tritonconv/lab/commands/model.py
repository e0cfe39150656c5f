"""``tritonconv model``: how well the cost model ranks what was measured, and the fit of it that ships."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from tritonconv.autotune import model
from tritonconv.autotune.ceilings import Ceilings, from_roofs, nominal
from tritonconv.autotune.tuning import calibrate, held_out
from tritonconv.errors import ArgumentError, ResultsError
from tritonconv.kernels.registry import have_triton, variant, variants
from tritonconv.lab.bench import results
from tritonconv.lab.bench.results import Run
from tritonconv.lab.bench.summary import columns
from tritonconv.lab.commands.common import OK, add_variant_files, load_variant_files
from tritonconv.problem import Problem

HELP = "say how well the cost model ranks what was measured"
LEAST = 3  # candidates: two are ranked right by chance half of the time


class Group(NamedTuple):
    """The candidates of one layer, pass, dtype and layout: predicted and measured ms."""

    device: str
    pass_name: str
    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    @property
    def correlation(self) -> float:
        return model.correlation(self.predicted, self.measured)

    @property
    def loss(self) -> float:
        """The measured time of the model's first choice over that of the fastest."""
        first = min(range(len(self.predicted)), key=lambda index: self.predicted[index])
        return self.measured[first] / min(self.measured)


def add(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the flags of the command."""
    parser.description = (
        "Reads results files that hold times of single variants (tritonconv tune; tritonconv bench --variants all), "
        "predicts each with the cost model, and prints Spearman's rank correlation: the median over the layers, and "
        "how often the model's first choice is the fastest or near it. Then, of each kind of kernel, the measured time "
        "over the predicted one. --held-out fits the screenings and finals of a GPU with one layer after the other "
        "left out, and prints how the choice for it compares with the best measured (the oracle) and with torch's own; "
        "--fit writes the fit that ships (autotune/fit_sm_90.json)."
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE", help="results files, or a campaign's folder")
    parser.add_argument("--held-out", action="store_true", help="the figures of layers that the fit has not seen")
    parser.add_argument("--fit", type=Path, metavar="JSON", help="fit factors, corrections and torch's own; write them")
    add_variant_files(parser)


def run(options: argparse.Namespace) -> int:
    load_variant_files(options)
    runs = [results.load(path) for path in options.results]
    if options.held_out or options.fit:
        for one in runs:
            with as_on(one):
                _fitted(one, options.held_out, options.fit)
        return OK
    groups = [group for one in runs for group in groups_of(one)]
    if not groups:
        raise ResultsError(
            f"results: nowhere {LEAST} candidates of one layer and pass; run tritonconv tune, or "
            "tritonconv bench --variants all --passes forward,backward_data,backward_weight"
        )
    print("\n".join(table(groups)))
    for path, one in zip(options.results, runs, strict=True):
        print("\n".join(["", f"measured over predicted time, {path}:", *factors_of(one)]))
    return OK


def _fitted(run: Run, figures: bool, path: Path | None) -> None:
    """Prints the figures of layers left out, and writes the fit."""
    ceilings = ceilings_of(run)
    groups = held_out.trials_of(timed(run), ceilings)
    if not groups:
        raise ResultsError(
            f"{run.path}: no timing of a single variant beside torch's own; run tritonconv tune on a GPU"
        )
    if figures:
        print(f"{run.environment['device_name']}: {len(groups)} problems of a pass. " + held_out.RULE)
        fits = held_out.fits(groups, ceilings)
        for what, served in (("all that was measured", lambda sample: True), (held_out.SAFE, held_out.safe)):
            lines = held_out.table(held_out.scores(fits, served))
            print("\n".join(["", f"Chosen among {what}:", *columns(lines, numbers=6)]))
    if path:
        versions = {name: run.environment.get(name) for name in ("torch", "triton", "cuda")}
        found = held_out.fit(groups, ceilings, versions | {"run": run.run})
        path.write_text(compact(found.to_json()))
        print(f"written: {path}")


def compact(data: Mapping) -> str:
    """JSON with a line for each kind, place and rate, and no longer: what a change of a fit touches can be read."""
    lines = json.dumps(data, indent=1).splitlines()
    depth, found = 5, []  # type: int, list[str]
    for line in lines:
        inner = len(line) - len(line.lstrip()) >= depth
        found.append(line.strip() if inner and found else f"\n{line}")
    return "".join(found).lstrip() + "\n"


def ceilings_of(run: Run) -> Ceilings:
    """Of the roofs that the run measured, else of the data sheet."""
    device = torch.device(run.environment["device"])
    return from_roofs(run.roofs, run.environment, device) or nominal(device)


@contextlib.contextmanager
def as_on(run: Run) -> Iterator[None]:
    """Inside the block kernels are counted as on the GPU of the run."""
    capability = run.environment.get("gpu_capability")
    if not capability or not have_triton():
        yield
        return
    from tritonconv.kernels.triton_target import assume_capability  # needs Triton

    with assume_capability(int(capability.replace(".", ""))):
        yield


def timed(run: Run) -> list[held_out.Timed]:
    """The tuner's timings of variants that are known here."""
    wrong = {_name(row) for row in run.errors if row["status"] == "wrong" and isinstance(row.get("config"), dict)}
    known = {record.name: record for record in variants()}
    return [
        held_out.Timed(
            row["layer"],
            calibrate.Sample(known[row["variant"]], problem_of_row(row), row["config"], row["median_ms"]),
            row["speedup"],
            row["stage"] == "final",
            _name(row) not in wrong,
        )
        for row in run.timings
        if row["variant"] in known and row["speedup"] is not None and isinstance(row.get("problem"), dict)
    ]


def _name(row: Mapping) -> tuple:
    return row["layer"], row.get("layout"), row["variant"], json.dumps(row["config"], sort_keys=True)


def factors_of(run: Run) -> list[str]:
    """A line per kind of kernel: the median of measured over predicted time, what ``tritonconv tune`` corrects by."""
    ceilings, found = ceilings_of(run), []
    for row in _single(run):
        if predict(row, ceilings) is not None:
            record = variant(row["variant"])
            found.append(calibrate.Sample(record, problem_of_row(row), _config(row), row["median_ms"]))
    lines = [["kind", "timings", "p20", "median", "p80"]]
    for kind, ratios in sorted(calibrate.ratios(found, ceilings).items()):
        spread = [f"{value:.2f}" for value in np.percentile(ratios, (20, 50, 80))]
        lines.append([kind, str(len(ratios)), *spread])
    return columns(lines, numbers=4)


def groups_of(run: Run) -> Iterator[Group]:
    """The groups of a run that have at least LEAST candidates whose variants are known here."""
    ceilings = ceilings_of(run)
    found: dict[tuple, dict[tuple, tuple[float, float]]] = {}
    for row in _single(run):
        where = (row["layer"], row["pass"], row["dtype"], row["layout"])
        predicted = predict(row, ceilings)
        if predicted is not None:
            config = tuple(sorted(_config(row).items()))
            found.setdefault(where, {})[row["variant"], config] = (predicted, row["median_ms"])
    for (_, pass_name, _, _), candidates in found.items():
        if len(candidates) >= LEAST:
            predicted, measured = zip(*candidates.values(), strict=True)
            yield Group(run.environment["device_name"], pass_name, predicted, measured)


def predict(row: Mapping, ceilings: Ceilings) -> float | None:
    """The model's ms for a row; None where the config is not of this version of the variant."""
    problem = problem_of_row(row)
    try:
        return model.estimate(variant(row["variant"]), problem, _config(row), ceilings).ms
    except (KeyError, ArgumentError):
        return None


def problem_of_row(row: Mapping) -> Problem:
    """The problem that a row was measured on."""
    sizes: dict[str, Any] = {
        key: tuple(each) if isinstance(each, list) else each for key, each in row["problem"].items()
    }
    sizes.pop("back_crop", None)
    return Problem(**sizes, dtype=getattr(torch, row["dtype"]), layout=row["layout"])


def _single(run: Run) -> Iterator[Mapping]:
    """Rows that time one variant by itself."""
    known = {record.name: record.pass_name for record in variants()}
    timings = (row for row in run.timings if row["stage"] == "screen")
    for row in (*run.results, *timings):
        if known.get(row["variant"]) == row["pass"] and isinstance(row.get("problem"), dict):
            yield row


def _config(row: Mapping) -> dict[str, int]:
    config = row.get("config") or {}
    return config.get(row["pass"], {}) if "chosen" in row else config


def table(groups: Iterable[Group]) -> list[str]:
    """A line per device and pass."""
    head = ["device", "pass", "layers", "rank correlation", "first is fastest", "within 1.1", "within 1.5"]
    lines = [head]
    by: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        by.setdefault((group.device, group.pass_name), []).append(group)
    for (device, pass_name), same in by.items():
        near = [sum(group.loss <= limit for group in same) / len(same) for limit in (1.0, 1.1, 1.5)]
        middle = median(group.correlation for group in same)
        lines.append([device, pass_name, str(len(same)), f"{middle:.2f}", *(f"{share:.0%}" for share in near)])
    return columns(lines, numbers=5)
