"""``tritonconv model``: how well the cost model ranks what was measured."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from tritonconv.autotune import calibrate, model
from tritonconv.autotune.ceilings import Ceilings, from_roofs, nominal
from tritonconv.bench import results
from tritonconv.bench.results import Run
from tritonconv.bench.summary import columns
from tritonconv.commands.common import OK, add_variant_files, load_variant_files
from tritonconv.errors import ArgumentError, ResultsError
from tritonconv.kernels.registry import variant, variants
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
        "over the predicted one."
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE", help="results files")
    add_variant_files(parser)


def run(options: argparse.Namespace) -> int:
    load_variant_files(options)
    groups = [group for path in options.results for group in groups_of(results.read(path))]
    if not groups:
        raise ResultsError(
            f"results: nowhere {LEAST} candidates of one layer and pass; run tritonconv tune, or "
            "tritonconv bench --variants all --passes forward,backward_data,backward_weight"
        )
    print("\n".join(table(groups)))
    for path in options.results:
        print("\n".join(["", f"measured over predicted time, {path}:", *factors_of(results.read(path))]))
    return OK


def factors_of(run: Run) -> list[str]:
    """A line per kind of kernel: the median of measured over predicted time, what ``tritonconv tune`` corrects by."""
    device = torch.device(run.environment["device"])
    ceilings = from_roofs(run.roofs, run.environment, device) or nominal(device)
    found = []
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
    device = torch.device(run.environment["device"])
    ceilings = from_roofs(run.roofs, run.environment, device) or nominal(device)
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
