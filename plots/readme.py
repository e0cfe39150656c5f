"""The results in the README: a sentence, a table and a picture, made from rows and from nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean

from tritonconv.errors import ResultsError
from tritonconv.lab import markdown, text_table
from tritonconv.lab.bench.columns import WALL, columns_of
from tritonconv.lab.bench.noise import AGAIN
from tritonconv.lab.bench.results import BASELINE, COMPILED, OURS, OURS_COMPILED, Run
from tritonconv.lab.bench.standings import by_pass, standings
from tritonconv.plots import headline, style, units
from tritonconv.plots.headline import PASSES

COMMAND = "report --readme"
FLAG = "--readme"
PICTURE = "headline.png"
WIDTH = 500  # pixels, at which the picture is meant to be read
PHRASES = {"forward": "the forward", "forward_backward": "a training step"}
HEAD = ("speed-up: mean (slowest; below 1)", "layers", "GPU time", "wall time, eager")


def update(runs: Sequence[Run], path: Path, folder: Path) -> Path:
    """Puts :func:`text` between the markers of a Markdown file, and the picture of the first run into its folder.

    Returns the picture's path. Raises ArgumentError for a file without the markers, ResultsError where a run has
    nothing to show, OSError where something cannot be written.
    """
    before, _, after = markdown.parts(path, COMMAND, FLAG)
    picture = folder / PICTURE
    with style.style():
        headline.draw(runs[0]).savefig(
            picture, dpi=style.DPI, metadata={"Software": None, "Description": headline.digest(runs[0])}
        )
    link = Path(os.path.relpath(picture, path.resolve().parent)).as_posix()
    path.write_text(f"{before}\n\n{text(runs, link)}\n\n{after}", encoding="utf-8")
    return picture


def text(runs: Sequence[Run], picture: str) -> str:
    """The Markdown of runs, the first of which has the sentence and the picture; ``picture`` is where it lies.

    Raises ResultsError for a run without a forward and a training step timed beside torch.
    """
    image = f'<img src="{picture}" width="{WIDTH}" alt="{_alternative(runs[0])}">'
    table = "\n".join(text_table.lines([HEAD, *(row for run in runs for row in _rows(run))], 3, markdown=True))
    return f"{_sentence(runs[0])}\n\n{image}\n\n{table}{_host(runs[0])}{_models(runs)}"


def _means(run: Run, column: str) -> dict[str, list[float]]:
    """The ratios to the best torch of each layer by pass, in one column; of the run's first dtype."""
    found: dict[str, list[float]] = {}
    for (pass_name, _), layers in by_pass(standings(run.of_models(), column)).items():
        found.setdefault(pass_name, [one.ratio for one in layers])
    if not set(PASSES) <= set(found):
        raise ResultsError(f"{run.path}: no forward and training step of layers of models were timed beside torch")
    return found


def _columns(run: Run) -> list[str]:
    """The run's first column of the device, if it has one, and the wall time."""
    return [*[name for name in columns_of(run.of_models()) if name != WALL][:1], WALL]


def _said(ratios: Sequence[float]) -> str:
    below = sum(ratio < 1 for ratio in ratios)
    return f"{geometric_mean(ratios):.2f} ({units.ratio(min(ratios))}; {below} of {len(ratios)})"


def _rows(run: Run) -> list[list[str]]:
    columns = _columns(run)
    means = {column: _means(run, column) for column in columns}
    cells = []
    for pass_name, title in PASSES.items():
        of_device = _said(means[columns[0]][pass_name]) if columns[0] != WALL else ""
        count = len(means[columns[0]][pass_name])
        cells.append([f"{_device(run)}: {title}", str(count), of_device, _said(means[WALL][pass_name])])
    return cells


def _device(run: Run) -> str:
    env = run.environment
    cores = f", {env['threads']} cores" if env["device"] == "cpu" else ""
    return f"{env['device_name']}{cores}, {_dtype(run)}"


def _dtype(run: Run) -> str:
    return run.of_models()[0]["dtype"]


def _sentence(run: Run) -> str:
    env, first = run.environment, _columns(run)[0]
    parts = []
    for pass_name, phrase in PHRASES.items():
        ratios = _means(run, first)[pass_name]
        below = sum(ratio < 1 for ratio in ratios)
        parts.append(
            f"**{geometric_mean(ratios):.2f} times** as fast in {phrase} ({len(ratios)} layers, the slowest "
            f"{units.ratio(min(ratios))}, {below} below 1)"
        )
    compiled = "" if any(row["variant"] == COMPILED for row in run.results) else "; torch.compile was not timed"
    total, timed = env.get("distinct_layers"), len({row["layer"] for row in run.results})
    seconds = f", in {run.end['seconds']:.0f} s" if run.end and "seconds" in run.end else ""
    return (
        f"On one {env['device_name']}, in {_dtype(run)}, layers of known models run, against the best torch, "
        f"{' and '.join(parts)}: geometric means, {style.COLUMN_NAMES[first]}, the fastest memory format of each "
        f"side{compiled}. {_versions(env)}; commit {(env['commit'] or 'unknown')[:7]}, {env['utc'][:10]}{seconds}"
        f"{f', which sufficed for {timed} of {total} layers' if total and timed < total else ''}."
    )


def _host(run: Run) -> str:
    """The host time of a call beside torch's; "" where that was not measured."""
    us: dict[str, dict[str, float]] = {}
    for row in run.overheads:
        us.setdefault(row["pass"], {})[row["variant"]] = row["median_us"]
    more = [f"{mine[OURS] - mine[BASELINE]:+.0f} µs in {phrase}" for name, phrase in PHRASES.items()
            if {BASELINE, OURS} <= set(mine := us.get(name, {}))]  # fmt: skip
    return f"\n\nHost time of an eager call over that of torch's layer: {', '.join(more)}." if more else ""


def _models(runs: Sequence[Run]) -> str:
    """Of whole models the training step, eager and compiled, and the noise; "" where no run has any."""
    parts = []
    for run in (run for run in runs if run.steps):
        by_model: dict[str, dict[str, Mapping]] = {}
        for row in run.steps:
            by_model.setdefault(row["model"], {})[row["variant"]] = row
        gains = []
        for name, rows in by_model.items():
            if OURS in rows:
                compiled = rows.get(OURS_COMPILED, {}).get("over_torch_compile")
                beside = "" if compiled is None else f" (both compiled {compiled:.2f})"
                gains.append(f"{name} {rows[OURS]['speedup']:.2f}{beside}")
        nulls = [rows[AGAIN]["speedup"] for rows in by_model.values() if AGAIN in rows]
        noise = f"; torch against itself {min(nulls):.2f} to {max(nulls):.2f}" if nulls else ""
        parts.append(f"on {run.environment['device_name']} {', '.join(gains)}{noise}")
    untimed = [run.environment["device_name"] for run in runs if not run.steps]
    also = f". On {' and '.join(untimed)} they were not timed" if untimed else ""
    head = "Training steps of [whole models](plots/README.md#a-models-gain), times as fast as torch's"
    return f"\n\n{head}: {'; '.join(parts)}{also}." if parts else ""


def _versions(env: Mapping) -> str:
    cudnn = env.get("cudnn")
    names = [f"torch {env['torch']}", f"Triton {env['triton']}"]
    if cudnn:
        names.insert(1, f"cuDNN {cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}")
    return ", ".join(names)


def _alternative(run: Run) -> str:
    first = _columns(run)[0]
    return f"Bars of torch and tritonconv under the measured roofs, by {style.COLUMN_NAMES[first]} on {_device(run)}"
