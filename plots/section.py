"""The section of a device in a Markdown file: means against the best torch, and every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean

from tritonconv.errors import ResultsError
from tritonconv.lab import markdown, text_table
from tritonconv.lab.bench.columns import SAID
from tritonconv.lab.bench.noise import AGAIN
from tritonconv.lab.bench.results import BASELINE, OF_MODEL, OURS, Run
from tritonconv.lab.bench.standings import Standing, by_column, by_pass, grouped, standings
from tritonconv.plots import style, units
from tritonconv.plots.html import MEANS, STANDING, Cell, means_of, shown, standing_cells

COMMAND = "report"
RATIOS = ("geometric mean", "slowest", "speed-up", "times as fast", "20 %", "80 %", "null")  # as units.ratio has them
STEPS = ("model", "inputs", "dtype", "step", "compile s", "rounds", "ms", "times as fast", "20 %", "80 %")
STEPS_CAPTION = (
    f"Whole models, one training step (forward, loss, backward), beside the eager step with torch's layers: medians of "
    f"the ratios of steps next to each other. `{AGAIN}`, a copy with torch's layers, shows the noise. A row of "
    f"torch.compile is timed in a second turn, and its seconds of compilation stand beside it."
)
KERNELBENCH = "kernelbench_"  # names of its problems begin so
SPREAD = ("speedup", "speedup_p20", "speedup_p80")
PROBLEMS = ("problem", "inputs", "fused", "batch there", "torch ms", "ours ms", "times as fast", "20 %", "80 %", "null")
PROBLEMS_CAPTION = (
    "KernelBench's level 2, the whole problem: the layer and the operations behind it, forward, float32, NCDHW, as "
    "`convert(model)` and `fuse(model)` have it, beside torch eager. The batch is that of *inputs*; KernelBench's is "
    "*batch there*. *Null*: a copy with torch's layer."
)


def update(run: Run, path: Path, every_layer: bool) -> None:
    """Replaces the section of the run's device. Raises ResultsError where nothing was timed beside torch."""
    ranked = standings(run.of_models())
    if not ranked and not run.steps and not run.problems:
        raise ResultsError(f"{run.path}: no layer was timed beside torch")
    body = section(run, ranked, every_layer)
    markdown.update(path, COMMAND, run.environment["device_name"], body, str, newest_first=False)


def section(run: Run, ranked: Sequence[Standing], every_layer: bool) -> str:
    """The Markdown of a run: means, of all layers and by class, whole models, and with ``every_layer`` a table of
    each layer."""
    means = means_of(ranked)
    for column, others in list(by_column(run.of_models()).items())[1:]:
        means += [[f"{name} ({column})", *rest] for name, *rest in means_of(others)]
    text = [_caption(run), _table(MEANS, means, 5)] if ranked else [f"{style.machine(run)}."]
    if run.steps:
        text += [
            f"{STEPS_CAPTION} {style.made_by(run.steps)}".strip(),
            _table(STEPS, [_step_cells(row) for row in run.steps], 6),
        ]
    if run.problems:
        text += _problems(run)
    for (pass_name, dtype), of_pass in by_pass(ranked).items() if every_layer else ():
        rows = _table(STANDING, [standing_cells(one) for one in sorted(of_pass, key=lambda one: one.ratio)], 4)
        text.append(f"#### {style.PASS_NAMES.get(pass_name, pass_name)}, {dtype}: the slowest first\n\n{rows}")
    return "\n\n".join(text) + "\n"


def _step_cells(row: Mapping) -> list[Cell]:
    times = [f"{row[name]:.3f}" for name in ("speedup", "speedup_p20", "speedup_p80")]
    names = ("model", "inputs", "dtype", "variant")
    return [*(row[name] for name in names), row.get("compile_s"), row["n_runs"], row["median_ms"], *times]


def _problems(run: Run) -> list[str]:
    """Of KernelBench's level 2 each problem, the slowest first; the mean, and what was not measured."""
    measured: list[tuple[float, list[Cell]]] = []
    for (name, inputs, *_), of in grouped(run.problems, *OF_MODEL).items():
        by_variant = {row["variant"]: row for row in of}
        if {BASELINE, OURS} <= set(by_variant):
            torch, ours = by_variant[BASELINE], by_variant[OURS]
            null = by_variant.get(AGAIN, {}).get("speedup")
            cells = [name, inputs, ", ".join(ours.get("fused") or ()), ours.get("defined_batch"), torch["median_ms"],
                     ours["median_ms"], *(ours[key] for key in SPREAD), null]  # fmt: skip
            measured.append((ours["speedup"], cells))
    done = {str(cells[0]) for _, cells in measured}  # by another run, as it may be
    of_problems = [row for row in (*run.skips, *run.errors)
                   if str(row.get("model")).startswith(KERNELBENCH) and row["layer"] not in done]  # fmt: skip
    failed = [f"{row['layer']}, {row['variant']}: {row['message']}" for row in of_problems]
    caption = f"{PROBLEMS_CAPTION} {style.made_by(run.problems)}".strip()
    parts = [caption, _table(PROBLEMS, [cells for _, cells in sorted(measured, key=lambda pair: pair[0])], 7)]
    if measured:
        ratios = [ratio for ratio, _ in measured]
        mean, least = geometric_mean(ratios), min(ratios)
        below = sum(ratio < 1 for ratio in ratios)
        parts.append(
            f"Of {len(ratios)} problems: geometric mean {mean:.2f}, the slowest {units.ratio(least)}, {below} below 1."
        )
    return [*parts, *(f"Not measured: {'; '.join(failed)}." for _ in failed[:1])]


def _table(head: Sequence[str], rows: Sequence[Sequence[Cell]], numbers: int) -> str:
    def cell(name: str, value: Cell) -> str:
        return units.ratio(value) if name in RATIOS and isinstance(value, float) else shown(value)

    cells = ([cell(*pair) for pair in zip(head, row, strict=True)] for row in rows)
    return "\n".join(text_table.lines([head, *cells], numbers, markdown=True))


def _caption(run: Run) -> str:
    first, *others = by_column(run.of_models())
    by = "; by " + SAID[first] + "".join(f", ({name}) by {SAID[name]}" for name in others) if others else ""
    lines = [
        f"{style.machine(run)}. Layers: {run.environment['scale_rule']}.",
        f"Speed-up of our fastest memory format over {style.best_torch(run.of_models())}: a ratio of medians{by}.",
    ]
    return "\n".join(lines + ([run.disturbance] if run.disturbance else []))
