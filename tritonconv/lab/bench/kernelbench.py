"""KernelBench's transposed 3-D convolutions: tensors in float32, NCDHW, the forward; beside the published figures.

Level 1 is the layer alone. Of level 2 the layer with its bias is measured, and not the operations behind it, so a
published time of level 2 is that of more work. TF32 is torch's switch, on or off for both sides at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from statistics import geometric_mean
from typing import Any

from tritonconv.lab import text_table
from tritonconv.lab.bench.results import BASELINE, COMPILED, OURS, Run
from tritonconv.lab.bench.summary import fast_p

SUITE = "kernelbench"
LEVELS = {1: "the layer alone", 2: "its layer with the bias; published times hold the operations behind it too"}
FAST = (0.0, 1.0, 2.0, 4.0, 8.0)
DEVICES = ("H100 SXM", "H100 PCIe")  # whose published times stand in the table


@cache
def published() -> dict[str, Any]:
    """The published times and speed-ups, each with its source."""
    with (files("tritonconv") / "data" / "kernelbench.json").open(encoding="utf-8") as file:
        return json.load(file)


def text(run: Run) -> str:
    """The problems of each level beside torch and the published times, geometric means and fast_p; then the sources."""
    env = run.environment
    precision = env.get("cudnn_conv_fp32")
    on_gpu = env["device"] == "cuda"
    products = (
        f"float32 products of both sides: {precision}" if on_gpu else "a CPU multiplies float32 as it is: no TF32"
    )
    parts = [f"KernelBench on {env['device_name']}, torch {env['torch']}; {products}; sizes: scale {env['scale']}"]
    for level, said in LEVELS.items():
        lines = _level(run, f"{SUITE}_l{level}_")
        if lines:
            parts.append("\n".join([f"level {level}: {said}", "", *lines]))
    failed = [f"{row['status']}: {row['variant']} on {row['layer']}: {row['message']}" for row in run.errors]
    parts += ["\n".join(failed)] if failed else []
    return "\n\n".join([*parts, f"published times: {published()['times']['source']}"])


def _level(run: Run, prefix: str) -> list[str]:
    rows: dict[str, dict[str, Mapping]] = {}
    for row in run.results:
        for name in (row["layer"], *row.get("duplicates", ())):  # problems of one layer, which is timed once
            if name.startswith(prefix):
                rows.setdefault(name, {})[row["variant"]] = row
    wrong = {row["layer"] for row in run.errors if row["layer"].startswith(prefix) and row["variant"] == OURS}
    ratios = {name: of[OURS]["speedup"] for name, of in rows.items() if OURS in of and of[OURS].get("speedup")}
    if not ratios and not wrong:
        return []
    lines = [["problem", "torch ms", "compiled ms", "ours ms", "times torch", *(f"{name} ms" for name in DEVICES)]]
    for name, of in sorted(rows.items(), key=lambda pair: int(pair[0].removeprefix(prefix))):
        ms = [_number(of[each]["median_ms"]) if each in of else "" for each in (BASELINE, COMPILED, OURS)]
        theirs = published()["times"]["ms"].get(name, {})
        times = [" / ".join(map(_number, theirs.get(device, ()))) for device in DEVICES]
        lines.append([name, *ms, _number(ratios.get(name)), *times])
    found = text_table.lines(lines, numbers=len(lines[0]) - 1)
    if ratios:
        worst = min(ratios, key=lambda name: ratios[name])
        mean = geometric_mean(ratios.values())
        found += ["", f"over torch eager: geometric mean {mean:.2f}, least {ratios[worst]:.2f} ({worst})"]
    of_all = [*ratios.values(), *[0.0] * len(wrong - set(ratios))]  # a wrong answer is not fast, but it counts
    found.append(f"{_shares(of_all)}, of {len(of_all)} problems")
    for one in published()["solutions"]:
        if prefix == f"{SUITE}_l{one['level']}_":
            gains = [f"{name.removeprefix(f'{SUITE}_')} {value:g}" for name, value in one["speedups"].items()]
            found.append(f"published, {one['who']}: {', '.join(gains) or 'no right answer'} ({one['source']})")
    return found


def _shares(ratios: Sequence[float]) -> str:
    return ", ".join(f"fast_{p:g} {fast_p(ratios, p):.0%}" for p in FAST)


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, (int, float)) else ""
