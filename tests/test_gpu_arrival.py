"""Seen on a GPU alone: launches whose last program sums, on two streams and in two graphs at once, 1000 times.

``triton_arrival.TUNED`` may be switched on once this has passed.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from variant_cases import DEVICE, integers, run

from tritonconv import Problem
from tritonconv.kernels.registry import variant
from tritonconv.kernels.triton_replay import Replay
from tritonconv.problem import LAYOUTS

pytestmark = pytest.mark.gpu

ROUNDS = 1000
SETS = 3  # of operands, in turn: a partial of an earlier round is never that of this one
SPLITS = 8
HELD, CYCLES = 40, 40_000_000  # rounds that the host enqueues while the GPU waits: then all streams run side by side
CHANNELS_AND_LAYERS = {  # c_in, c_out, kernel, stride, groups
    "backward_weight_splitk": (64, 32, 3, 2, 1),
    "backward_weight_cells": (16, 32, 4, 2, 1),
    "backward_weight_depthwise": (64, 64, 3, 2, 64),
    "backward_weight_depthwise_cells": (64, 64, 3, 2, 64),
    "backward_weight_fused": (32, 16, 2, 2, 1),
}


def problem_of(name: str, layout: str) -> Problem:
    c_in, c_out, kernel, stride, groups = CHANNELS_AND_LAYERS[name]
    size = (12, 11, 16)
    out = tuple((length - 1) * stride + kernel for length in size)
    return Problem(
        2, c_in, c_out, size, (kernel,) * 3, (stride,) * 3, (0,) * 3, out, groups=groups, dtype=torch.float16,
        layout=layout, bias=True,
    )  # fmt: skip


def operands(problem: Problem, seed: int) -> list[torch.Tensor]:
    dense = {"device": DEVICE, "dtype": problem.dtype, "memory_format": problem.memory_format}
    return [
        integers(shape, seed + 10 * place).to(**dense) for place, shape in enumerate((problem.x_shape, problem.y_shape))
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CHANNELS_AND_LAYERS)
def test_two_streams_and_two_graphs_at_once(name, layout):
    """Integers, so every sum is exact: each round's answers are those of two launches, whatever runs beside it."""
    record, problem = variant(name), problem_of(name, layout)
    assert record.supports(problem, DEVICE) is None
    config = {**record.default(problem, DEVICE), "SPLITS": SPLITS}
    replay = Replay(partial(record.launches, problem, {**config, "ARRIVE": 1}))

    def launch(x, grad_y):
        return replay(x, grad_y, True)

    sets = [operands(problem, seed) for seed in range(SETS)]
    want = [run(record, problem, config, (x, None, None), grad_y, True) for x, grad_y in sets]
    assert not torch.equal(want[0][0], want[1][0])
    for _ in range(2):  # by Triton's own launch, and by the direct one
        assert all(map(torch.equal, launch(*sets[0]), want[0]))
    torch.cuda.synchronize()

    streams, graphs = [torch.cuda.Stream() for _ in range(4)], []
    for _ in range(2):
        given, graph = [each.clone() for each in sets[0]], torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = launch(*given)
        graphs.append((graph, given, answer))
    wrong = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in streams]
    torch.cuda.synchronize()
    for turn in range(ROUNDS):
        for place, stream in enumerate(streams):
            which = (turn + place) % SETS
            with torch.cuda.stream(stream):
                if turn % HELD == 0:
                    torch.cuda._sleep(CYCLES)
                if place < len(graphs):
                    graph, given, answer = graphs[place]
                    for old, new in zip(given, sets[which], strict=True):
                        old.copy_(new)
                    graph.replay()
                else:
                    answer = launch(*sets[which])
                for got, right in zip(answer, want[which], strict=True):
                    wrong[place] += (got != right).sum()
    torch.cuda.synchronize()
    assert [int(each) for each in wrong] == [0] * len(streams)


def test_the_counters_of_each_stream_are_its_own_and_zero():
    from tritonconv.kernels import triton_arrival

    buffers = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            buffers.append(triton_arrival.counters(7, DEVICE))
    assert buffers[0].data_ptr() != buffers[1].data_ptr()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [triton_arrival.counters(7, DEVICE) for _ in range(2)]
    assert len({each.data_ptr() for each in (*buffers, *captured)}) == 4
    captured[0].fill_(3)
    graph.replay()
    assert not captured[0].any() and not any(int(each.sum()) for each in triton_arrival._buffers.values())
