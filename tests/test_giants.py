"""Tensors of more than 2**31 elements, on a GPU: each variant on the first such problem it serves, in both layouts.

Each answer twice, bitwise the same. The tensors take 25 GB together, so pytest-xdist keeps the tests in one process.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from repeated import twice
from test_triton_kernels import NAMES
from variant_cases import DEVICE, form, run

from tritonconv import Problem
from tritonconv.kernels.variant import Variant
from tritonconv.problem import LAYOUTS

GIANT = {
    "k3 s2": Problem(1, 16, 16, (130, 1024, 128), (3, 3, 3), (2, 2, 2), (1, 1, 1), (260, 2048, 256)),
    "k2 s2": Problem(1, 8, 8, (256, 1024, 130), (2, 2, 2), (2, 2, 2), (0, 0, 0), (512, 2048, 260)),
    "k2 s2 to 5": Problem(1, 8, 5, (256, 1024, 210), (2, 2, 2), (2, 2, 2), (0, 0, 0), (512, 2048, 420)),
    "depthwise": Problem(1, 16, 16, (130, 1024, 128), (3, 3, 3), (2, 2, 2), (1, 1, 1), (260, 2048, 256), groups=16),
    "to 1": Problem(1, 4, 1, (130, 1024, 2048), (4, 4, 4), (2, 2, 2), (1, 1, 1), (260, 2048, 4096)),
    "16 to 2": Problem(1, 16, 2, (130, 1024, 1024), (4, 4, 4), (2, 2, 2), (1, 1, 1), (260, 2048, 2048)),
}
BEYOND = 2**31
TAIL = 8  # planes of x at the end that are compared


def giant(label: str, layout: str) -> Problem:
    problem = replace(GIANT[label], dtype=torch.float16, layout=layout)
    assert math.prod(problem.y_shape) > BEYOND
    return problem


def judged(label: str, layout: str) -> list[Variant]:
    """The variants whose first giant this is: each costs seconds to compile."""
    served = {
        each: [form(name) for name in NAMES if form(name).supports(giant(each, layout), DEVICE) is None]
        for each in GIANT
    }
    earlier = {record.name for each in list(GIANT)[: list(GIANT).index(label)] for record in served[each]}
    return [record for record in served[label] if record.name not in earlier]


def test_every_variant_has_a_giant():
    """But the two halves of backward_together, which serve short problems alone, in the tiles of two that have one."""
    found = {record.name for label in GIANT for layout in LAYOUTS for record in judged(label, layout)}
    assert found == {name for name in NAMES if not name.endswith("_together")}


def integers(shape, layout: str) -> torch.Tensor:
    empty = torch.empty(shape, dtype=torch.float16, device=DEVICE, memory_format=LAYOUTS[layout])
    return empty.random_(-2, 3)


@pytest.mark.gpu
@pytest.mark.xdist_group("giant")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("label", GIANT)
def test_tensors_beyond_2_to_31_elements(label, layout):
    """The planes at the far end are those of a small problem of the same values."""
    problem = giant(label, layout)
    weight = torch.randint(-2, 3, problem.weight_shape, device=DEVICE).half()
    x, grad_y = integers(problem.x_shape, layout), integers(problem.y_shape, layout)
    with torch.no_grad():
        x[:, :, : 1 - TAIL] = 0  # so that grad_weight is that of the tail, and of no grad_y before it
    tail = x[:, :, -TAIL:].double().requires_grad_()
    wide = weight.double().requires_grad_()
    crop = problem.torch_crop
    last = torch.conv_transpose3d(tail, wide, None, problem.stride, crop.padding, crop.output_padding, problem.groups)
    planes = last.shape[2] - 2  # the first ones read what is before the tail
    of_tail = torch.autograd.grad(last, (tail, wide), grad_y[:, :, -last.shape[2] :].double())
    wanted = {"forward": last[:, :, -planes:], "backward_data": of_tail[0][:, :, 2:], "backward_weight": of_tail[1]}
    for record in judged(label, layout):
        config, want = record.default(problem, DEVICE), wanted[record.pass_name]
        found = twice(lambda each=record, config=config: run(each, problem, config, (x, weight, None), grad_y, False))[
            0
        ]
        at_the_end = found if record.pass_name == "backward_weight" else found[:, :, -want.shape[2] :]
        assert torch.equal(at_the_end, want.half()), record.name
