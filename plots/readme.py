"""The results of a run as a section of a Markdown file: means against the best torch, and every layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tritonconv.errors import ResultsError
from tritonconv.lab import markdown
from tritonconv.lab.bench.columns import SAID
from tritonconv.lab.bench.results import Run
from tritonconv.lab.bench.standings import Standing, by_column, by_pass, mean, standings
from tritonconv.plots import style
from tritonconv.plots.report import chosen, shown

COMMAND = "report"
MEANS = ("pass", "dtype", "class", "layers", "geometric mean", "slowest", "below 1", "torch's own runs")
EACH = ("layer", "class", "best torch", "ours", "torch ms", "ms", "speed-up", "% of roof")


def update(run: Run, path: Path, every_layer: bool) -> None:
    """Replaces the section of the run's device. Raises ResultsError where nothing was timed beside torch."""
    found = standings(run.of_models())
    if not found:
        raise ResultsError(f"{run.path}: no layer was timed beside torch")
    body = section(run, found, every_layer)
    markdown.update(path, COMMAND, run.environment["device_name"], body, str, newest_first=False)


def section(run: Run, found: Sequence[Standing], every_layer: bool) -> str:
    """The Markdown of a run: means, of all layers and by class, and with ``every_layer`` a table of each."""
    groups, means = by_pass(found), []
    others = {
        (f"{name} ({column})", dtype): each
        for column, standing in list(by_column(run.of_models()).items())[1:]
        for (name, dtype), each in by_pass(standing).items()
    }
    for key, each in (groups | others).items():
        means.append([*key, "all", *_mean(each)])
        for kind in sorted({one.ours.get("class") or "" for one in each} - {""}):
            means.append([*key, kind, *_mean([one for one in each if one.ours.get("class") == kind])])
    text = [_caption(run), markdown.table(MEANS, means, 3)]
    for (pass_name, dtype), each in groups.items() if every_layer else ():
        ordered = sorted(each, key=lambda one: one.ratio)
        rows = markdown.table(EACH, [_row(one) for one in ordered], 4)
        text.append(f"#### {style.PASS_NAMES.get(pass_name, pass_name)}, {dtype}: the slowest first\n\n{rows}")
    return "\n\n".join(text) + "\n"


def _mean(each: Sequence[Standing]) -> list[str]:
    least, below = min(one.ratio for one in each), sum(one.ratio < 1 for one in each)
    return [str(len(each)), f"{mean(each):.2f}", f"{least:.2f}", str(below), str(sum(one.torch_chosen for one in each))]


def _caption(run: Run) -> str:
    first, *others = by_column(run.of_models())
    by = "; by " + SAID[first] + "".join(f", ({name}) by {SAID[name]}" for name in others) if others else ""
    said = [
        f"{style.machine(run)}. Layers: {run.environment['scale_rule']}.",
        f"Speed-up of our fastest memory format over the fastest of torch and torch.compile in any: a ratio of "
        f"medians{by}.",
    ]
    return "\n".join(said + ([run.disturbance] if run.disturbance else []))


def _row(one: Standing) -> list[str]:
    ours, theirs = one.ours, one.torch
    return [
        ours["layer"],
        ours.get("class") or "",
        f"{theirs['variant']} {theirs['layout']}",
        f"{chosen(ours)} {ours['layout']}",
        shown(one.torch_ms),
        shown(one.ms),
        f"{one.ratio:.2f}",
        shown(ours.get("percent_of_roof")),
    ]
