"""One self-contained HTML page of a run: means, charts, every layer, roofs, tuned choices, errors, the environment.

Everything comes from the results file; pictures are inlined as SVG, nothing is loaded from anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import geometric_mean
from typing import TypeVar

from tritonconv.errors import ResultsError
from tritonconv.lab.bench import counters, noise
from tritonconv.lab.bench.columns import SAID, columns_of, median
from tritonconv.lab.bench.results import BASELINE, OF_MODEL, OURS, Run
from tritonconv.lab.bench.standings import Standing, by_column, by_pass, grouped, standings
from tritonconv.plots import style
from tritonconv.plots.page import PAGE

CAPTIONS = {
    "headline": "Layers of known models under the roofs",
    "roofline": "Roofline", "speedup": "Speed-up per layer and memory format", "best": "Speed-up over the best torch",
    "percent": "Share of the attainable roof", "scaling": "Time against work", "landscape": "Tuning landscape",
    "overhead": "Overhead of a call", "shares": "Shares of a training step",
}  # fmt: skip
ENVIRONMENT = (
    "device_name", "gpu_driver", "gpu_capability", "cuda", "cudnn", "cudnn_conv_fp32", "cpu", "cores", "threads",
    "torch", "triton", "numpy", "python", "system", "tritonconv", "commit", "dirty", "utc", "scale", "scale_rule",
    "timing", "command", "seed", "budget_s",
)  # fmt: skip

MEANS = ("pass", "dtype", "class", "layers", "geometric mean", "slowest", "below 1", "torch's own runs")
STANDING = ("layer", "class", "best torch", "ours", "torch ms", "ms", "speed-up", "% of roof")
LONG = 48  # characters of a cell that may be broken into lines
Cell = str | float | int | None
Pictures = Mapping[str, Sequence[Path]]
T = TypeVar("T")


def write(run: Run, folder: Path, pictures: Pictures) -> Path:
    """Writes the page into the folder. Raises ResultsError where there is nothing to show, OSError where it cannot."""
    shown = (run.results, run.roofs, run.timings, run.overheads, run.profiles, run.checks, run.operations, run.slabs,
             run.problems)  # fmt: skip
    if not any(shown):
        raise ResultsError(f"{run.path}: nothing was measured, so there is nothing to report")
    path = folder / f"{'-'.join(['report', *run.selection])}.html"
    path.write_text(page(run, pictures), encoding="utf-8")
    return path


def page(run: Run, pictures: Pictures) -> str:
    """The page's HTML; ``pictures`` are the files of each chart."""
    sections = [
        ("Means", _means(run)),
        *((CAPTIONS[name], _picture(name, paths)) for name, paths in pictures.items()),
        ("Against the best torch", _against_the_best(run)),
        ("Layers", _layers(run)),
        ("Whole models", _steps(run)),
        ("Operations of a training step", _operations(run)),
        ("KernelBench's level 2", _problems(run)),
        ("Slabs", _slabs(run)),
        ("Null rows", _nulls(run)),
        ("Roofs", _roofs(run)),
        ("Tuned choices", _tuned(run)),
        ("Overhead, in numbers", _overheads(run)),
        ("Counters", _counters(run)),
        ("Verified", _checks(run)),
        ("Errors", _errors(run)),
        ("Left out", _skips(run)),
        ("Where the seconds went", _spent(run)),
        ("Environment", _environment(run)),
    ]
    body = "\n".join(f"<section><h2>{escape(title)}</h2>\n{text}</section>" for title, text in sections if text)
    title = f"tritonconv on {run.environment['device_name']}"
    return PAGE.substitute(title=escape(title), lead=_lead(run), body=body)


def _lead(run: Run) -> str:
    lines = [style.machine(run)]
    if run.selection:
        lines.append(f"Only {', '.join(run.selection)}.")
    if run.end is None:
        lines.append("The run was cut off: its finished rows are shown.")
    elif run.end["reason"] != "complete":
        lines.append(f"The run ended early ({run.end['reason']}): its finished rows are shown.")
    if run.disturbance:
        lines.append(run.disturbance)
    return "\n".join(f"<p>{escape(text)}</p>" for text in (*lines, *run.warnings))


def table(head: Sequence[str], rows: Iterable[Sequence[Cell]], numbers: int) -> str:
    """A table whose last ``numbers`` columns are numbers; a click on a head sorts by it. Empty without rows."""
    lines = [_row(row, len(head) - numbers) for row in rows]
    if not lines:
        return ""
    heads = "".join(
        f'<th class="{"n" if index >= len(head) - numbers else "t"}"><button>{escape(name)}</button></th>'
        for index, name in enumerate(head)
    )
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>\n'


def _row(row: Sequence[Cell], first_number: int) -> str:
    cells = []
    for index, value in enumerate(row):
        kind = "n" if index >= first_number else "t"
        key = f' data-v="{value}"' if isinstance(value, (int, float)) else ""
        text = shown(value)
        kind += " long" if len(text) > LONG else ""
        cells.append(f'<td class="{kind}"{key}>{escape(text)}</td>')
    return f"<tr>{''.join(cells)}</tr>\n"


def shown(value: Cell) -> str:
    """A number with three figures, text as it is, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def _means(run: Run) -> str:
    rows: list[list[Cell]] = []
    ours = [row for row in run.of_models() if row["variant"] == OURS and row["speedup"] is not None]
    for key, mine in grouped(ours, "pass", "dtype", "layout").items():
        for kind, same in _classes(mine, mine):
            rows.append([*key, kind, len(same), geometric_mean(row["speedup"] for row in same)])
    text = _after(
        f"Speed-up over {BASELINE} in the same memory format, from calls made next to each other:",
        table(["pass", "dtype", "layout", "class", "layers", "geometric mean"], rows, 2),
    )
    for column, ranked in by_column(run.of_models()).items():
        caption = f"By {SAID[column]}, over the best torch, our best memory format (a ratio of medians):"
        text += _after(caption, table(MEANS, means_of(ranked), 5))
    return text


def means_of(ranked: Sequence[Standing]) -> list[list[Cell]]:
    """Rows under MEANS: by pass and dtype, of all layers and then of each class."""
    rows: list[list[Cell]] = []
    for key, of_pass in by_pass(ranked).items():
        for kind, same in _classes(of_pass, [one.ours for one in of_pass]):
            ratios = [one.ratio for one in same]
            below, torchs = sum(ratio < 1 for ratio in ratios), sum(one.torch_chosen for one in same)
            rows.append([*key, kind, len(same), geometric_mean(ratios), min(ratios), below, torchs])
    return rows


def _classes(all_of_them: Sequence[T], rows: Sequence[Mapping]) -> Iterator[tuple[str, Sequence[T]]]:
    """``all`` of them, then those of each class of layers, which their rows say."""
    yield "all", all_of_them
    for kind in sorted({row.get("class") or "" for row in rows} - {""}):
        yield kind, [item for item, row in zip(all_of_them, rows, strict=True) if row.get("class") == kind]


def _after(caption: str, text: str) -> str:
    """A table after its caption; nothing without a table."""
    return f"<p>{caption}</p>\n{text}" if text else ""


def _picture(name: str, paths: Sequence[Path]) -> str:
    """The SVG of a chart, inlined; its ids are made its own, for several pictures share the page."""
    text = next(path for path in paths if path.suffix == ".svg").read_text(encoding="utf-8")
    svg = re.sub(r'\bid="', f'id="{name}-', text[text.index("<svg") :])
    svg = re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{name}-", svg)
    return f'<div class="scroll picture">{svg}</div>'


def _against_the_best(run: Run) -> str:
    of_models = "The fastest torch in any memory format, and our fastest: a ratio of medians."
    of_stages = "The same of layers with what stands behind them: one call of ours, separate operations of torch's:"
    text = ""
    for caption, results in ((of_models, run.of_models()), (of_stages, run.of_stages())):
        rows = [[one.ours["pass"], one.ours["dtype"], *standing_cells(one)] for one in standings(results)]
        text += _after(caption, table(("pass", "dtype", *STANDING), rows, 4))
    return text


def standing_cells(one: Standing) -> list[Cell]:
    """A layer's row under STANDING."""
    ours, theirs = one.ours, one.torch
    names = f"{theirs['variant']} {theirs['layout']}", f"{chosen(ours)} {ours['layout']}"
    return [ours["layer"], ours.get("class"), *names, one.torch_ms, one.ms, one.ratio, ours.get("percent_of_roof")]


def chosen(row: Mapping) -> str:
    """The variants that a row of ours ran, or its name where it does not say."""
    return ", ".join(dict.fromkeys((row.get("chosen") or {}).values())) or row["variant"]


def _layers(run: Run) -> str:
    torchs = {_where(row): row for row in run.results if row["variant"] == BASELINE}
    others = columns_of(run.results)[1:]
    head = ["layer", "suite", "pass", "dtype", "layout", "variant", "torch ms", "ms", "speed-up", "20 %", "80 %",
            *(f"{who}{column} ms" for column in others for who in ("torch ", "")),
            "% of roof", "max error", "torch's error"]  # fmt: skip
    rows: list[list[Cell]] = []
    for row in run.results:
        if row["variant"] == BASELINE:
            continue
        theirs = torchs.get(_where(row))
        label = row["variant"] if row["variant"] != OURS else chosen(row)
        rows.append([
            row["layer"], row["suite"], row["pass"], row["dtype"], row["layout"], label,
            theirs["median_ms"] if theirs else None, row["median_ms"],
            row["speedup"], row["speedup_p20"], row["speedup_p80"],
            *(median(each, column) if each else None for column in others for each in (theirs, row)),
            row.get("percent_of_roof"), row.get("max_error"), row.get("torch_error"),
        ])  # fmt: skip
    return table(head, rows, 8 + 2 * len(others))


def _nulls(run: Run) -> str:
    rows: list[list[Cell]] = []
    for column in columns_of(run.nulls):
        for name, call in noise.SAID.items():
            band = noise.band(run.nulls, column, name)
            if band is not None:
                rows.append([call, column, band.rows, band.low, band.high])
    return _after(
        "Calls that are torch's own, timed beside torch: a difference counts only beyond theirs.",
        table(["call", "column", "rows", "least ratio", "largest"], rows, 3),
    )


def _spent(run: Run) -> str:
    steps = ((run.end or {}).get("spent") or {}).items()
    rows = [[step, kind, seconds] for step, kinds in steps for kind, seconds in kinds.items()]
    return table(["step", "seconds went to", "s"], rows, 1)


def _where(row: Mapping) -> tuple:
    return row["layer"], row["pass"], row["dtype"], row["layout"]


def _roofs(run: Run) -> str:
    rows: list[list[Cell]] = []
    for (what, unit), same in grouped(run.roofs, "what", "unit").items():
        values = [float(row["value"]) for row in same]
        rows.append([what, unit, min(values) if unit == "us" else max(values)])
    return table(["roof", "unit", "value"], rows, 1)


def _tuned(run: Run) -> str:
    rows: list[list[Cell]] = []
    for row in run.tuned:
        config = " ".join(f"{key}={value}" for key, value in row["config"].items())
        ms, torch_ms = row["median_ms"], row["torch_ms"]
        rows.append([*_where(row), row["variant"], config, row.get("candidates"), torch_ms, ms, torch_ms / ms])
    head = ["layer", "pass", "dtype", "layout", "variant", "config", "candidates", "torch ms", "ms", "speed-up"]
    return table(head, rows, 4)


def _overheads(run: Run) -> str:
    names = ("layer", "pass", "dtype", "variant", "median_us", "p20_us", "p80_us")
    rows = [[row[name] for name in names] for row in run.overheads]
    return table(["layer", "pass", "dtype", "layer of", "us per call", "20 %", "80 %"], rows, 3)


def _counters(run: Run) -> str:
    rows = [[*_where(row), row["variant"], *counters.cells(row)] for row in run.profiles]
    head = ["layer", "pass", "dtype", "layout", "contestant", *counters.HEAD]
    caption = "The counts of ncu for each kernel of a call, with cold caches; MB are those of device memory."
    return _after(caption, table(head, rows, len(counters.HEAD) - 1))


def _checks(run: Run) -> str:
    rows: list[list[Cell]] = []
    for key, checks in grouped(run.checks, "variant", "dtype").items():
        shares = [row["max_error"] / row["tolerance"] for row in checks if row["tolerance"] > 0]
        if shares:
            rows.append([*key, len(checks), max(shares)])
    caption = "Variants held against float64 on one layer per class; the worst error as a share of the allowed one."
    return _after(caption, table(["variant", "dtype", "answers", "worst error / allowed"], rows, 2))


def _steps(run: Run) -> str:
    names = ("variant", "median_ms", "p20_ms", "p80_ms", "speedup", "speedup_p20", "speedup_p80", "graph_ms",
             "graph_speedup", "output_error", "gradient_error")  # fmt: skip
    head = [*OF_MODEL, "layers", "ms", "20 %", "80 %", "speed-up", "20 %", "80 %", "graph ms", "graph speed-up",
            "output error", "gradient error"]  # fmt: skip
    rows = [[row.get(name) for name in (*OF_MODEL, *names)] for row in run.steps]
    caption = "One training step (forward, loss, backward); speed-ups are over the eager step with torch's layers."
    return _after(caption, table(head, rows, len(names) - 1))


def _operations(run: Run) -> str:
    names = ("calls", "ms", "share", "torch_ms", "ours_ms", "speedup")
    rows = [[*(row[name] for name in (*OF_MODEL, "operation")), ", ".join(row.get("layers") or ()),
             *(row.get(name) for name in names)] for row in run.operations]  # fmt: skip
    caption = "With torch's layers, backward included; torch ms and ours ms are those of one call by itself."
    head = [*OF_MODEL, "operation", "layers", "calls", "ms", "share", "torch ms", "ours ms", "speed-up"]
    return _after(caption, table(head, rows, len(names)))


def _problems(run: Run) -> str:
    names = ("median_ms", "p20_ms", "p80_ms", "speedup", "speedup_p20", "speedup_p80", "max_difference")
    rows = [[row["model"], row["inputs"], row["variant"], ", ".join(row.get("fused") or ()),
             *(row.get(name) for name in names)] for row in run.problems]  # fmt: skip
    head = ["problem", "inputs", "variant", "fused", "ms", "20 %", "80 %", "speed-up", "20 %", "80 %", "difference"]
    caption = "The forward of the whole problem; speed-ups are over torch eager, differences are to its output."
    return _after(caption, table(head, rows, len(names)))


def _slabs(run: Run) -> str:
    where = ("layer", "pass", "dtype", "layout", "scaling", "part", "ranks")
    numbers = ("median_ms", "p20_ms", "p80_ms", "efficiency", "exchanged_bytes")
    rows = [[row.get(name) for name in (*where, *numbers)] for row in run.slabs]
    caption = "Times of the slowest rank; strong: the ranks share the layer's volume, weak: each has one of its size."
    return _after(caption, table([*where, "ms", "20 %", "80 %", "efficiency", "bytes"], rows, 6))


def _errors(run: Run) -> str:
    head = ("status", "variant", "layer", "pass", "message")
    return table(head, [[row[name] for name in head] for row in run.errors], 0)


def _skips(run: Run) -> str:
    rows = dict.fromkeys((row["variant"], row["layer"], row["pass"], row["message"]) for row in run.skips)
    return table(["variant", "layer", "pass", "why"], rows, 0)


def _environment(run: Run) -> str:
    env = run.environment
    rows = [[name, str(env[name])] for name in ENVIRONMENT if env.get(name) is not None]
    return table(["fact", "value"], rows, 0)
