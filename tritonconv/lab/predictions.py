"""The cost model's predictions beside measured times: how well it ranks them, and the fit of it that ships."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from tritonconv.autotune import model
from tritonconv.autotune.ceilings import Ceilings, from_roofs, nominal
from tritonconv.autotune.tuning import calibrate, held_out
from tritonconv.errors import ArgumentError, ResultsError
from tritonconv.kernels.registry import have_triton, variants
from tritonconv.lab import text_table
from tritonconv.lab.bench.results import Run
from tritonconv.problem import Problem

LEAST = 3  # candidates: two are ranked right by chance half of the time


class Ranking(NamedTuple):
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


def accuracy(paths: Sequence[Path], runs: Sequence[Run]) -> str:
    """How well the model ranks what the runs timed, and by how much it errs for each kind of kernel of a run.

    Raises ResultsError where nothing can be ranked.
    """
    rankings = [ranking for run in runs for ranking in rankings_of(run)]
    if not rankings:
        raise ResultsError(
            f"results: nowhere {LEAST} candidates of one layer and pass; run tritonconv tune, or "
            "tritonconv bench --variants all --passes forward,backward_data,backward_weight"
        )
    lines = table(rankings)
    for path, run in zip(paths, runs, strict=True):
        lines += ["", f"measured over predicted time, {path}:", *factors_of(run)]
    return "\n".join(lines)


def fitted(runs: Sequence[Run], figures: bool, path: Path | None) -> str:
    """Fits the runs of one device, with the rates of the first; says how well the fit chooses for layers left out
    (``figures``), and writes it to ``path``.

    Raises ResultsError where the runs are of several devices, where no variant was timed beside torch's own, or the
    file cannot be written.
    """
    run, devices = runs[0], {each.environment["device_name"]: each.path for each in runs}
    if len(devices) > 1:
        named = ", ".join(f"{name} ({where})" for name, where in devices.items())
        raise ResultsError(f"results: a fit is of one device, got {named}")
    with as_on(run):
        ceilings = ceilings_of(run)
        trials = held_out.trials_of(timed_in(runs), ceilings)
        if not trials:
            raise ResultsError(
                f"{run.path}: no timing of a single variant beside torch's own; run tritonconv tune on a GPU"
            )
        lines = []
        if figures:
            lines.append(f"{run.environment['device_name']}: {len(trials)} problems of a pass. {held_out.RULE}")
            fits = held_out.fits(trials, ceilings)
            for candidates, served in (("all that was measured", lambda _: True), (held_out.SAFE, held_out.safe)):
                scores = held_out.table(held_out.scores(fits, served))
                lines += ["", f"Chosen among {candidates}:", *text_table.lines(scores, numbers=6)]
        if path:
            versions = {name: run.environment.get(name) for name in ("torch", "triton", "cuda")}
            fit = held_out.fit(trials, ceilings, versions | {"run": run.run})
            try:
                path.write_text(compact(fit.to_json()))
            except OSError as error:
                raise ResultsError(f"argument --fit: cannot write {path}: {error.strerror}") from None
            lines.append(f"written: {path}")
        return "\n".join(lines)


def compact(data: Mapping) -> str:
    """JSON with a line for each kind, place and rate, and no longer: what a change of a fit touches can be read."""
    lines = json.dumps(data, indent=1).splitlines()
    depth, joined = 5, []  # type: int, list[str]
    for line in lines:
        inner = len(line) - len(line.lstrip()) >= depth
        joined.append(line.strip() if inner and joined else f"\n{line}")
    return "".join(joined).lstrip() + "\n"


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


def timed_in(runs: Sequence[Run]) -> list[held_out.Timed]:
    """The timings of the first run, and of each further one those of kernels that no run before it has timed.

    A kernel that was timed twice has mostly been edited in between, on few layers again: its times of two revisions
    would be fitted as one.
    """
    found: list[held_out.Timed] = []
    for run in runs:
        known = {each.sample.record.name for each in found}
        found += [
            each
            for each in timed(run)
            if not known or (each.sample.record.backend == "triton" and each.sample.record.name not in known)
        ]
    return found


def timed(run: Run) -> list[held_out.Timed]:
    """The tuner's timings of variants that are known here."""
    wrong = {_name(row) for row in run.errors if row["status"] == "wrong" and isinstance(row.get("config"), dict)}
    records = {record.name: record for record in variants()}
    found = []
    for row in run.timings:
        if row["variant"] in records and row["speedup"] is not None and isinstance(row.get("problem"), dict):
            sample = calibrate.Sample(records[row["variant"]], problem_of_row(row), row["config"], row["median_ms"])
            sound, lasting = _name(row) not in wrong, held_out.lasting(sample, run.environment["utc"])
            last = row["stage"] == "final"
            found.append(held_out.Timed(row["layer"], sample, row["speedup"], last, sound, lasting))
    return found


def _name(row: Mapping) -> tuple:
    return row["layer"], row.get("layout"), row["variant"], json.dumps(row["config"], sort_keys=True)


def factors_of(run: Run) -> list[str]:
    """A line per kind of kernel: the median of measured over predicted time, what ``tritonconv tune`` corrects by."""
    ceilings = ceilings_of(run)
    counts = calibrate.counts((sample for _, sample in _single(run) if predict(sample, ceilings) is not None), ceilings)
    lines = [["kind", "timings", "p20", "median", "p80"]]
    for kind, ratios in sorted(calibrate.ratios(counts, ceilings).items()):
        spread = [f"{value:.2f}" for value in np.percentile(ratios, (20, 50, 80))]
        lines.append([kind, str(len(ratios)), *spread])
    return text_table.lines(lines, numbers=4)


def rankings_of(run: Run) -> Iterator[Ranking]:
    """The rankings of a run that have at least LEAST candidates whose variants are known here."""
    ceilings = ceilings_of(run)
    groups: dict[tuple, dict[tuple, tuple[float, float]]] = {}
    for row, sample in _single(run):
        predicted = predict(sample, ceilings)
        if predicted is not None:
            where = (row["layer"], row["pass"], row["dtype"], row["layout"])
            config = tuple(sorted(sample.config.items()))
            groups.setdefault(where, {})[row["variant"], config] = (predicted, sample.ms)
    for (_, pass_name, _, _), candidates in groups.items():
        if len(candidates) >= LEAST:
            predicted, measured = zip(*candidates.values(), strict=True)
            yield Ranking(run.environment["device_name"], pass_name, predicted, measured)


def predict(sample: calibrate.Sample, ceilings: Ceilings) -> float | None:
    """The model's ms for a sample; None where the config is not of this version of the variant."""
    try:
        return model.estimate(sample.record, sample.problem, sample.config, ceilings).ms
    except (KeyError, ArgumentError):
        return None


def problem_of_row(row: Mapping) -> Problem:
    """The problem that a row was measured on."""
    sizes: dict[str, Any] = {
        key: tuple(each) if isinstance(each, list) else each for key, each in row["problem"].items()
    }
    sizes.pop("back_crop", None)
    return Problem(**sizes, dtype=getattr(torch, row["dtype"]), layout=row["layout"])


def _single(run: Run) -> Iterator[tuple[Mapping, calibrate.Sample]]:
    """The rows that time one variant by itself."""
    records = {record.name: record for record in variants()}
    for row in (*run.results, *(row for row in run.timings if row["stage"] == "screen")):
        if row.get("epilogue"):
            continue
        record, config = records.get(row["variant"]), row.get("config") or {}
        if record is not None and record.pass_name == row["pass"] and isinstance(row.get("problem"), dict):
            config = config.get(row["pass"], {}) if "chosen" in row else config
            yield row, calibrate.Sample(record, problem_of_row(row), config, row["median_ms"])


def table(rankings: Iterable[Ranking]) -> list[str]:
    """A line per device and pass."""
    head = ["device", "pass", "layers", "rank correlation", "first is fastest", "within 1.1", "within 1.5"]
    lines = [head]
    by: dict[tuple[str, str], list[Ranking]] = {}
    for ranking in rankings:
        by.setdefault((ranking.device, ranking.pass_name), []).append(ranking)
    for (device, pass_name), same in by.items():
        near = [sum(ranking.loss <= limit for ranking in same) / len(same) for limit in (1.0, 1.1, 1.5)]
        middle = median(ranking.correlation for ranking in same)
        lines.append([device, pass_name, str(len(same)), f"{middle:.2f}", *(f"{share:.0%}" for share in near)])
    return text_table.lines(lines, numbers=5)
