"""Times of layers whose volume lies in slabs on the ranks of a process group: exchange and products apart.

The ranks are 1, 2, 4 and so on, and all there are. *Strong* scaling: they share the layer's volume, cut along its
longest spatial axis. *Weak*: the volume has so many times the layer's planes there. A sample begins when all ranks are
ready, and is the time of the slowest.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from tritonconv import autograd
from tritonconv.arguments import geometry
from tritonconv.dispatch import wait_until_compiled
from tritonconv.distributed import call
from tritonconv.distributed.halo import total
from tritonconv.distributed.passes import ShardedPasses
from tritonconv.errors import ArgumentError
from tritonconv.functional import conv_transpose3d
from tritonconv.lab.bench.calls import FORWARD_BACKWARD
from tritonconv.lab.bench.clock import garbage_waits
from tritonconv.lab.bench.layer_sizes import resized
from tritonconv.lab.bench.results import OURS
from tritonconv.lab.bench.timing import Spread
from tritonconv.problem import Problem

LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # variables of the environment
LEAST_RUNS, MOST_RUNS = 5, 200
GATE_PLANES, GATE_SIZE = 3, 4  # a rank's planes, and the most along the other axes
CELLS = 12  # a number of ranks has two scalings, two passes and three parts
Groups = dict[int, dist.ProcessGroup]


@contextlib.contextmanager
def ranks(device: torch.device) -> Iterator[tuple[torch.device, Groups]]:
    """This rank's device, and the groups of the first 1, 2, 4 ... ranks that it is in, by their number.

    Raises ArgumentError where torchrun (or another launcher that sets its variables) has not started this process, and
    for more ranks on a machine than it has GPUs.
    """
    if not dist.is_initialized() and any(name not in os.environ for name in LAUNCHERS):
        raise ArgumentError("argument --slabs: start it as torchrun --nproc-per-node RANKS -m tritonconv bench --slabs")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.index >= torch.cuda.device_count():
            raise ArgumentError(f"argument --slabs: a rank is for {device}, and there are {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    groups = {count: dist.new_group(range(count)) for count in rank_counts()}  # every rank makes each
    try:
        yield device, {count: group for count, group in groups.items() if dist.get_rank() < count}
        dist.barrier()
    finally:
        if own:
            dist.destroy_process_group()


def rank_counts() -> list[int]:
    """1, 2, 4 and so on below the number of ranks, and that."""
    world = dist.get_world_size()
    return [*(2**power for power in range((world - 1).bit_length())), world]


def measure(problem: Problem, device: torch.device, seconds: float, groups: Groups) -> Iterator[dict[str, object]]:
    """The rows of one layer, about ``seconds`` in all. Rank 0 has those of all groups; it needs no answer of others.

    Raises ArgumentError where the slabs' answer of a small volume is not the whole's.
    """
    index = max(range(3), key=lambda at: problem.size[at])
    alone: dict[tuple[str, str], float] = {}
    each = seconds / CELLS / len(rank_counts())
    for count, group in groups.items():
        _check(problem, index, device, group)
        for scaling, planes, work in (("strong", 1, count), ("weak", count, 1)):
            volume = _with_planes(problem, index, planes * problem.size[index])
            slab = Slab(volume, index + 2, device, group)
            for (pass_name, part), function in slab.calls().items():
                spread = _timed(function, device, group, each)
                efficiency = None
                if part == "total":
                    once = alone.setdefault((scaling, pass_name), spread.median)
                    efficiency = once / spread.median / work
                yield {
                    "pass": pass_name, "layout": problem.layout, "dtype": str(problem.dtype).removeprefix("torch."),
                    "variant": OURS, "scaling": scaling, "part": part, "ranks": count, "axis": index + 2,
                    "size": volume.size, "median_ms": spread.median, "p20_ms": spread.p20, "p80_ms": spread.p80,
                    "n_runs": spread.runs, "exchanged_bytes": slab.exchanged(pass_name), "efficiency": efficiency,
                }  # fmt: skip


class Slab:
    """This rank's slab of a volume of small integers, and the parts of its passes as functions."""

    def __init__(self, problem: Problem, axis: int, device: torch.device, group: dist.ProcessGroup) -> None:
        rank, count, size = dist.get_rank(group), dist.get_world_size(group), problem.size[axis - 2]
        self.device, self.group, self.axis = device, group, axis
        self.sizes = tuple(size * (each + 1) // count - size * each // count for each in range(count))

        def drawn(seed: int, *shape: int) -> torch.Tensor:
            generator = torch.Generator(device).manual_seed(seed)
            return torch.randint(-1, 2, shape, generator=generator, device=device).to(problem.dtype)

        self.weight = drawn(count, *problem.weight_shape)  # equal on all ranks, the slabs are not
        self.bias = drawn(count, problem.c_out) if problem.bias else None
        shape = (*problem.x_shape[:axis], self.sizes[rank], *problem.x_shape[axis + 1 :])
        self.x = drawn(rank, *shape).contiguous(memory_format=problem.memory_format)
        back = [each.back_crop for each in problem.axes]
        padding = [(front, max(0, each)) for front, each in zip(problem.crop, back, strict=True)]
        self.arguments = problem.stride, padding, [max(0, -each) for each in back], problem.groups, problem.dilation

    def run(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The sharded call."""
        stride, padding, more, groups, dilation = self.arguments
        where: dict[str, Any] = {"group": self.group, "axis": self.axis, "sizes": self.sizes}
        return call.conv_transpose3d(x, weight, bias, stride, padding, more, groups, dilation, **where)

    def passes(self) -> ShardedPasses:
        """The passes of the slab, for their parts."""
        operands = self.x, self.weight, self.bias
        return call.passes_of(*operands, geometry(*self.arguments), self.axis, self.sizes, None, self.group)

    def calls(self) -> dict[tuple[str, str], Callable[[], object]]:
        """By pass and part: the whole call, its messages, and the products with the copies beside them."""
        operands, passes = (self.x, self.weight, self.bias), self.passes()
        leaves = [each.clone().requires_grad_() for each in operands if each is not None]
        halo = passes.halo
        y, pieces = passes.forward(*operands)
        grad_y, whole = torch.ones_like(y), self.x.new_ones(passes.plan.problem.y_shape)
        wanted = True, True, self.bias is not None

        def gradients() -> tuple:
            return autograd.gradients(whole, halo.join(self.x, pieces), self.weight, wanted, passes.plan)

        grad_x, *others = gradients()
        sums = [each for each in others if each is not None]

        def forward() -> None:
            with torch.no_grad():
                self.run(*leaves)

        def exchange() -> None:
            halo.receive(self.x)
            halo.give_back(grad_x)
            total(self.group, sums)

        def compute() -> None:
            passes.forward(*operands, pieces)
            gradients()

        return {
            ("forward", "total"): forward,
            ("forward", "exchange"): lambda: halo.receive(self.x),
            ("forward", "compute"): lambda: passes.forward(*operands, pieces),
            (FORWARD_BACKWARD, "total"): lambda: torch.autograd.grad(self.run(*leaves), leaves, grad_y),
            (FORWARD_BACKWARD, "exchange"): exchange,
            (FORWARD_BACKWARD, "compute"): compute,
        }

    def exchanged(self, pass_name: str) -> int:
        """Bytes of x, and in a backward of its gradient, that go between ranks; not those of the weight's sum."""
        planes = self.passes().halo.plan.planes() * (2 if pass_name == FORWARD_BACKWARD else 1)
        shape = (*self.x.shape[: self.axis], planes, *self.x.shape[self.axis + 1 :])
        return torch.Size(shape).numel() * self.x.element_size()


def _timed(function: Callable[[], object], device: torch.device, group: dist.ProcessGroup, seconds: float) -> Spread:
    """Milliseconds of the slowest rank, for about ``seconds``."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def sample() -> float:
        dist.barrier(group)
        wait()
        begin = perf_counter()
        function()
        wait()
        return (perf_counter() - begin) * 1e3

    def slowest(values: list[float]) -> list[float]:
        every = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(every, dist.ReduceOp.MAX, group)
        return every.tolist()

    sample()
    wait_until_compiled()
    sample()
    (once,) = slowest([sample()])
    runs = min(MOST_RUNS, max(LEAST_RUNS, int(seconds * 1e3 / once)))
    with garbage_waits():
        return Spread.of(slowest([sample() for _ in range(runs)]))


def _with_planes(problem: Problem, index: int, planes: int) -> Problem:
    size = list(problem.size)
    size[index] = planes
    return resized(problem, (size[0], size[1], size[2]))


def _check(problem: Problem, index: int, device: torch.device, group: dist.ProcessGroup) -> None:
    """Raises ArgumentError where the slabs of a small volume of small integers are not exactly the whole's."""
    count = dist.get_world_size(group)
    planes = -(-problem.size[index] // count) * count
    small = _with_planes(problem, index, planes)
    with contextlib.suppress(ArgumentError):  # crops larger than what is left
        size = [min(each, GATE_SIZE) for each in problem.size]
        size[index] = GATE_PLANES * count
        small = resized(problem, (size[0], size[1], size[2]), 1)
    slab = Slab(replace(small, dtype=torch.float32, bias=False), index + 2, device, group)
    parts = [torch.empty_like(slab.x) for _ in slab.sizes]
    dist.all_gather(parts, slab.x, group)
    with torch.no_grad():
        y, whole = slab.run(slab.x, slab.weight), torch.cat(parts, slab.axis)
        stride, padding, *more = slab.arguments
        want = conv_transpose3d(whole, slab.weight, None, stride, padding, *more)
    begin, end = slab.passes().halo.share.y
    if not torch.equal(y, want.narrow(slab.axis, begin, end - begin)):
        raise ArgumentError(f"bench --slabs: on {count} ranks the slabs of {small} are not the whole's")
