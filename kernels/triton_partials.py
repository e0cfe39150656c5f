"""The host's side of grad_weight and grad_bias as sums over chunks: who writes what, and who adds it up.

The programs of a launch write the gradients themselves, or a partial for each chunk (SPLITS of them). The partials are
added by a second launch (``triton_reduce.py``), or by the last program of a tile to arrive (``triton_arrival.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from tritonconv.kernels.triton_arrival import ARRIVE, arrivals, arrives
from tritonconv.kernels.triton_buffers import Buffer, new
from tritonconv.kernels.triton_launch import geometry, scalar_strides
from tritonconv.kernels.triton_launch import launch as run
from tritonconv.kernels.triton_reduce import sum_parts, sum_weights
from tritonconv.kernels.variant import Config
from tritonconv.problem import Problem

POINTERS = ("partial_ptr", "bias_partial_ptr", "arrivals_ptr", "total_ptr", "total_bias_ptr")
Add = Callable[[Buffer, Buffer, Buffer | None, Buffer | None], None]  # of partials and results, weight and bias


class WeightGradients:
    """grad_weight, grad_bias (None without ``need_bias``), and what the programs of a launch write for them.

    ``partial`` and ``bias_partial`` are the gradients themselves until :meth:`split_weight` and :meth:`split_bias` make
    them others. Where x or grad_y is empty (``nothing``) both gradients are zeros, and there is no launch.
    """

    def __init__(self, problem: Problem, config: Config, x: Buffer, grad_y: Buffer, need_bias: bool) -> None:
        self.problem, self.x, self.grad_y = problem, x, grad_y
        self.nothing = x.numel() == 0 or grad_y.numel() == 0
        self.weight = new(problem.weight_shape, x, zero=self.nothing)
        self.bias = new((problem.c_out,), x, zero=self.nothing) if need_bias else None
        self.partial, self.bias_partial = self.weight, self.bias
        self.splits, self.arrive = config["SPLITS"], arrives(config)
        self.config = {key: value for key, value in config.items() if key not in ("SPLITS", ARRIVE)}

    def split_weight(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        """Has the programs write partials of grad_weight, (SPLITS, *shape)."""
        self.partial = new((self.splits, *shape), self.x, dtype)

    def split_bias(self, rows: int) -> None:
        """Has the programs write partials of grad_bias, float32 (rows, c_out), where it is asked for."""
        if self.bias is not None:
            self.bias_partial = new((rows, self.problem.c_out), self.x, torch.float32)

    def pointers(self, tiles: int) -> dict[str, Buffer | None]:
        """The kernel's arguments for them. With ARRIVE there are counters for the ``tiles`` of a chunk, and the last
        program of a tile writes its sums.
        """
        counters = arrivals(tiles, self.x) if self.arrive else None
        totals = (self.weight, self.bias) if self.arrive else (None, None)
        return dict(zip(POINTERS, (self.partial, self.bias_partial, counters, *totals), strict=True))

    @property
    def written(self) -> tuple[Buffer | None, ...]:
        """The buffers that the launch writes."""
        return self.partial, self.bias_partial, *((self.weight, self.bias) if self.arrive else ())

    def launch(self, kernel: Any, programs: int, partial_strides: tuple[int, ...] | None = None, **arguments: Any):
        """Launches a kernel with so many programs for each chunk, which own a tile each.

        ``arguments`` are those beside the pointers, sizes and strides, of which the kernel gets what it takes;
        ``partial_strides`` belong to the strides where given.
        """
        strides = self.x.stride(), self.grad_y.stride()
        known = {
            **self.pointers(programs),
            "strides": strides if partial_strides is None else (*strides, partial_strides),
            **scalar_strides(self.grad_y),
        }
        run(
            kernel,
            self.splits * programs,
            self.config,
            self.written,
            x_ptr=self.x,
            grad_y_ptr=self.grad_y,
            **{name: value for name, value in known.items() if name in kernel.arg_names},
            **geometry(self.problem, kernel),
            splits=self.splits,
            **arguments,
        )

    def results(self, add: Add = sum_weights) -> tuple[Buffer, Buffer | None]:
        """(grad_weight, grad_bias or None), by a launch of ``add`` where partials are left to add.

        Partials of grad_bias ride along where each chunk has one; where a chunk has several they have their own launch.
        """
        if self.nothing or self.arrive:
            return self.weight, self.bias
        apart = self.bias_partial if self.bias_partial is not self.bias else None
        if self.partial.base is not self.weight:
            together = apart is not None and apart.shape[0] == self.splits
            add(self.partial, self.weight, *((apart, self.bias) if together else (None, None)))
            apart = None if together else apart
        if apart is not None and self.bias is not None:
            sum_parts(apart, self.bias)
        return self.weight, self.bias


def depthwise_gradients(
    problem: Problem, config: Config, x: Buffer, grad_y: Buffer, need_bias: bool
) -> WeightGradients:
    """Those of the depthwise kernels: always through partials, (splits, taps, c_out) and (splits, c_out)."""
    sums = WeightGradients(problem, config, x, grad_y, need_bias)
    if not sums.nothing:
        sums.split_weight(1, math.prod(problem.kernel), 1, problem.c_out)  # as sum_weights takes them
        sums.split_bias(sums.splits)
    return sums
