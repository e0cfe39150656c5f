"""The options of a run of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tritonconv.kernels.variant import Variant
from tritonconv.lab.bench.calls import FORWARD_BACKWARD
from tritonconv.lab.bench.layer_sizes import Workload

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    """The measurements of a run. ``seconds`` is the budget of the run or None; ``scale`` is ``"cpu"`` or ``"full"``.

    A variant in ``variants`` is timed by itself in the cells of its own pass. ``compiled`` adds torch.compile, which
    takes a second or more per cell; with ``only_compiled`` its are the only rows, timed beside torch. ``done`` are
    cells (layer, dtype, layout, pass) that an earlier run has. ``copies`` times a copy of the same bytes in each cell,
    ``cudnn_graph`` cuDNN's fused graph.
    """

    layers: tuple[Workload, ...]
    passes: tuple[str, ...] = ("forward", FORWARD_BACKWARD)
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    layouts: tuple[str, ...] = ("ncdhw", "ndhwc")
    variants: tuple[Variant, ...] = ()
    scale: str = "cpu"
    seconds: float | None = None
    device: torch.device = CPU
    seed: int = 0
    command: tuple[str, ...] = ()
    compiled: bool = False
    only_compiled: bool = False
    copies: bool = False
    cudnn_graph: bool = False
    done: frozenset[tuple[str, str, str, str]] = frozenset()
