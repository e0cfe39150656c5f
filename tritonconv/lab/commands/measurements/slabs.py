"""``tritonconv bench --slabs``: layers in slabs, on the ranks that torchrun started."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist

from tritonconv.lab import flags, text_table
from tritonconv.lab.bench import slab_times
from tritonconv.lab.bench.layer_sizes import SCALES
from tritonconv.lab.bench.recording import recording
from tritonconv.lab.bench.workloads import ALL, workloads
from tritonconv.lab.commands.common import OK, RESULTS, dtypes_of, scale_for

FLAG = {"action": "store_true", "help": "under torchrun: time the layers in slabs on the ranks instead"}
SAID = (
    "--slabs times tritonconv.distributed on the layers instead, on each rank that torchrun started: the\n"
    "volume in slabs on 1, 2, 4 ... ranks, the exchange and the products apart, strong and weak scaling."
)
OWN, TOO = (), ("suite", "only", "layout", "scale", "seed")
SECONDS = 3.0  # of a layer
COLUMNS = ["layer", "pass", "dtype", "layout", "scaling", "ranks", "total ms", "exchange ms", "compute ms",
           "efficiency", "bytes"]  # fmt: skip


def add(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace, device: torch.device) -> int:
    layers = workloads(options.suite or ALL, options.only, options.seed or 0)
    scale, layouts = scale_for(options.scale, device), flags.once(options.layout, ("ncdhw",))
    kinds = [(dtype, layout) for dtype in dtypes_of(options, "float32") for layout in layouts]
    cells = [(layer, layer.problem(*kind, scale)) for layer in layers for kind in kinds]
    seconds = SECONDS if options.seconds is None else options.seconds / len(cells)
    with slab_times.ranks(device) as (own, groups):
        first = max(groups) == 1 or dist.get_rank() == 0
        if not first:
            for _, problem in cells:
                for _ in slab_times.measure(problem, own, seconds, groups):
                    pass
            return OK
        lines = [COLUMNS]
        facts = {"scale": scale, "scale_rule": SCALES[scale], "ranks": max(groups)}
        with recording(options.output or RESULTS, "slabs-", own, options.command, options.seed or 0, **facts) as writer:
            for layer, problem in cells:
                named = {"layer": layer.name, "suite": layer.suite}
                rows = [writer.write("slab", {**named, **row})
                        for row in slab_times.measure(problem, own, seconds, groups)]  # fmt: skip
                lines += _lines(rows)
    print("\n".join(text_table.lines(lines, numbers=6)))
    print(f"\nresults: {writer.path}")
    return OK


def _lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line for the three parts of a pass, which follow each other."""
    lines = []
    for whole, exchange, compute in zip(*[iter(rows)] * 3, strict=True):
        facts = [whole["layer"], whole["pass"], whole["dtype"], whole["layout"], whole["scaling"], str(whole["ranks"])]
        times = [f"{row['median_ms']:.3g}" for row in (whole, exchange, compute)]
        lines.append([*facts, *times, f"{whole['efficiency']:.2f}", str(whole["exchanged_bytes"])])
    return lines
