"""The tables of a network as text: operations of a step, and the whole step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tritonconv.lab import text_table
from tritonconv.lab.bench.results import BASELINE, OF_MODEL, Run
from tritonconv.lab.models.whole_model import SAID, STEP

MOST_NAMES = 2  # of layers in a row


def text(run: Run) -> str:
    """All networks of a run, one after the other; then what failed and what was left out."""
    parts = []
    for key in dict.fromkeys(tuple(row[name] for name in OF_MODEL) for row in (*run.operations, *run.steps)):
        of = [
            [row for row in rows if tuple(row[name] for name in OF_MODEL) == key]
            for rows in (run.operations, run.steps)
        ]
        parts.append("\n".join([f"{key[0]}, {', '.join(key[1:])}", *_operations(of[0]), *_steps(of[1])]))
    for kind, rows in (("left out", run.skips), ("failed", run.errors)):
        parts += [f"{kind}: {row['layer']}, {row['variant']}: {row['message']}" for row in rows if row["pass"] == STEP]
    return "\n\n".join(parts)


def _operations(rows: Sequence[Mapping]) -> list[str]:
    if not rows:
        return []
    lines = [["operation", "layers", "calls", "ms", "share", "torch ms", "ours ms", "times as fast"]]
    for row in rows:
        names = row.get("layers") or ()
        more = [f"{len(names) - MOST_NAMES} more"] if len(names) > MOST_NAMES else []
        named = ", ".join([*names[:MOST_NAMES], *more])
        alone = [_number(row.get(name)) for name in ("torch_ms", "ours_ms", "speedup")]
        share = f"{100 * row['share']:.1f} %"
        lines.append([row["operation"], named, f"{row['calls']:g}", _number(row["ms"]), share, *alone])
    ours = sum(row["share"] for row in rows if row.get("layers"))
    saved = sum(row["share"] * (1 - 1 / row["speedup"]) for row in rows if row.get("speedup"))
    most = 1 / (1 - ours) if ours < 1 else float("inf")
    return [
        "", f"one {STEP} with torch's layers, by torch's profiler; torch ms and ours ms: one call by itself", "",
        *text_table.lines(lines, numbers=6), "",
        f"transposed convolutions: {100 * ours:.1f} % of the step; it is {1 / (1 - saved):.3f} times as fast if each "
        f"gains what it gains by itself, {most:.3f} times if they took no time",
    ]  # fmt: skip


def _steps(rows: Sequence[Mapping]) -> list[str]:
    if not rows:
        return []
    graphs = any("graph_ms" in row for row in rows)
    peaks = {row["variant"]: row.get("peak_bytes") for row in rows}
    head = ["whole step", "ms", "20 to 80 %", "times torch", "20 to 80 %", "compile s", "output error"]
    head.append("gradient error")
    lines = [[*head, *(["graph ms", "times torch", "peak MiB"] if graphs or any(peaks.values()) else [])]]
    for row in rows:
        line = [
            SAID.get(row["variant"], row["variant"]), _number(row["median_ms"]),
            f"{_number(row['p20_ms'])} to {_number(row['p80_ms'])}", f"{row['speedup']:.3f}",
            f"{row['speedup_p20']:.3f} to {row['speedup_p80']:.3f}",
            *(_number(row.get(name)) for name in ("compile_s", "output_error", "gradient_error")),
        ]  # fmt: skip
        if len(lines[0]) > len(head):
            peak = row.get("peak_bytes")
            line += [_number(row.get("graph_ms")), _number(row.get("graph_speedup")), f"{peak >> 20}" if peak else ""]
        lines.append(line)
    over = [row["over_torch_compile"] for row in rows if row.get("over_torch_compile")]
    note = [f"compiled, convert(model) is {over[0]:.3f} times as fast as torch's layers"] if over else []
    against = sorted({str(row["held_against"]) for row in rows if row.get("held_against")})
    errors = f"errors: relative, in the 2-norm, against {' and '.join(against)}; rows of {BASELINE}: its own"
    return ["", *text_table.lines(lines, numbers=len(lines[0]) - 1), "", *note, errors]


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, (int, float)) else ""
