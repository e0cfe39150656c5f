"""KernelBench's transposed 3-D convolutions: tensors in float32, NCDHW, the forward; beside the published figures.

Level 1 is the layer alone, level 2 the layer and the operations behind it (``lab/models/level2_times.py``). TF32 is
torch's switch, on or off for both sides at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from statistics import geometric_mean
from typing import Any

from tritonconv.lab import text_table
from tritonconv.lab.bench import noise
from tritonconv.lab.bench.noise import AGAIN
from tritonconv.lab.bench.results import BASELINE, COMPILED, OURS, OURS_COMPILED, Run
from tritonconv.lab.bench.summary import fast_p

SUITE = "kernelbench"
LEVELS = {1: "the layer alone", 2: "the whole problem: the layer and the operations behind it"}
FAST = (0.0, 1.0, 2.0, 4.0, 8.0)
DEVICES = ("H100 SXM", "H100 PCIe")  # whose published times stand in the table

Contestants = dict[str, dict[str, Mapping]]  # by problem, by variant


@cache
def published() -> dict[str, Any]:
    """The published times and speed-ups, each with its source."""
    with (files("tritonconv") / "data" / "kernelbench.json").open(encoding="utf-8") as file:
        return json.load(file)


def level_of(name: str) -> int:
    """Of a problem's or a layer's name."""
    return 1 if name.startswith(f"{SUITE}_l1_") else 2


def text(run: Run) -> str:
    """The problems of each level beside torch and the published times, geometric means and fast_p; then the sources."""
    env = run.environment
    precision = env.get("cudnn_conv_fp32")
    on_gpu = env["device"] == "cuda"
    products = (
        f"float32 products of both sides: {precision}" if on_gpu else "a CPU multiplies float32 as it is: no TF32"
    )
    parts = [f"KernelBench on {env['device_name']}, torch {env['torch']}; {products}; sizes: scale {env['scale']}"]
    if env["scale"] != "full":
        parts[0] += f", smaller than KernelBench's: {env['scale_rule']}"
    for level, found in ((1, _of_layers(run.results)), (2, _of_problems(run.problems))):
        lines = _level(run, level, found)
        if lines:
            parts.append("\n".join([f"level {level}: {LEVELS[level]}", "", *lines]))
    failed = [f"{row['status']}: {row['variant']} on {row['layer']}: {row['message']}" for row in run.errors]
    failed += [f"not run: {row['layer']}, {row['variant']}: {row['message']}" for row in run.skips]
    parts += ["\n".join(failed)] if failed else []
    return "\n\n".join([*parts, f"published times: {published()['times']['source']}"])


def _of_layers(rows: Iterable[Mapping]) -> Contestants:
    found: Contestants = {}
    for row in rows:
        for name in (row["layer"], *row.get("duplicates", ())):  # problems of one layer, which is timed once
            if level_of(name) == 1:
                found.setdefault(name, {})[row["variant"]] = row
    return found


def _of_problems(rows: Iterable[Mapping]) -> Contestants:
    found: Contestants = {}
    for row in rows:
        found.setdefault(row["model"], {})[row["variant"]] = row
    return found


def _level(run: Run, level: int, rows: Contestants) -> list[str]:
    prefix = f"{SUITE}_l{level}_"
    wrong = {
        row["layer"] for row in run.errors if row["layer"].startswith(prefix) and row["variant"] in (OURS, BASELINE)
    }
    ratios = {name: of[OURS]["speedup"] for name, of in rows.items() if OURS in of and of[OURS].get("speedup")}
    if not ratios and not wrong:
        return []
    contestants = [BASELINE, COMPILED, OURS, *([OURS_COMPILED] if level == 2 else [])]
    head = {BASELINE: "torch ms", COMPILED: "compiled ms", OURS: "ours ms", OURS_COMPILED: "ours compiled ms"}
    fused = ["fused"] if level == 2 else []
    lines = [
        ["problem", *fused, *(head[name] for name in contestants), "times torch", *(f"{name} ms" for name in DEVICES)]
    ]
    for name, of in sorted(rows.items(), key=lambda pair: int(pair[0].removeprefix(prefix))):
        ms = [_number(of[each]["median_ms"]) if each in of else "" for each in contestants]
        theirs = published()["times"]["ms"].get(name, {})
        times = [" / ".join(map(_number, theirs.get(device, ()))) for device in DEVICES]
        taken = [", ".join(of.get(OURS, {}).get("fused") or ()) or "nothing"] if level == 2 else []
        lines.append([name, *taken, *ms, _number(ratios.get(name)), *times])
    found = text_table.lines(lines, numbers=len(lines[0]) - 1 - len(fused))
    if ratios:
        worst = min(ratios, key=lambda name: ratios[name])
        mean = geometric_mean(ratios.values())
        found += ["", f"over torch eager: geometric mean {mean:.2f}, least {ratios[worst]:.2f} ({worst})"]
        found += _compiled(rows)
        nulls = [of[AGAIN] for of in rows.values() if AGAIN in of]
        band = noise.band(nulls, str(nulls[0]["timing"])) if nulls else None
        found += [f"torch against torch (null): {band}, of {band.rows} problems"] if band else []
    of_all = [*ratios.values(), *[0.0] * len(wrong - set(ratios))]  # a wrong answer is not fast, but it counts
    found.append(f"{_shares(of_all)}, of {len(of_all)} problems")
    for one in published()["solutions"]:
        if one["level"] == level:
            gains = [f"{name.removeprefix(f'{SUITE}_')} {value:g}" for name, value in one["speedups"].items()]
            found.append(f"published, {one['who']}: {', '.join(gains) or 'no right answer'} ({one['source']})")
    return found


def _compiled(rows: Contestants) -> list[str]:
    """Our faster side over torch.compile, where that was timed: a ratio of medians."""
    ratios = [of[COMPILED]["median_ms"] / min(of[name]["median_ms"] for name in (OURS, OURS_COMPILED) if name in of)
              for of in rows.values() if COMPILED in of and OURS in of]  # fmt: skip
    return (
        [f"over torch.compile: geometric mean {geometric_mean(ratios):.2f}, of {len(ratios)} problems"]
        if ratios
        else []
    )


def _shares(ratios: Sequence[float]) -> str:
    return ", ".join(f"fast_{p:g} {fast_p(ratios, p):.0%}" for p in FAST)


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, (int, float)) else ""
