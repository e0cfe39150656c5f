"""NaN and infinities are never lost: an output to which one contributes is not finite, in any variant and pass.

Nothing is promised of the other outputs. A variant that multiplies the zeros of a tile's padding by what the tile holds
makes more of them NaN; torch's own gradients do so too, where a layer crops. Those that do are named in ``MORE``.
"""

from __future__ import annotations

import math

import pytest
import torch
from odd_cases import ODD, odd, whole_config
from repeated import twice
from test_triton_kernels import NAMES, ON_GPU
from variant_cases import DEVICE, Case, run

from tritonconv.kernels.registry import variant
from tritonconv.problem import LAYOUTS

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter

VALUES = math.nan, math.inf, -math.inf
PLACES = "voxels", "weight"  # of x and grad_y, or of the weight
# Variants that have further outputs which are not finite, on their problem of odd_cases.py in the interpreter.
MORE = {
    "voxels": {
        "forward_phases_packed",
        "backward_weight_cells",
        "backward_weight_cells_last",
        "backward_weight_depthwise",
        "backward_weight_splitk",
        "backward_weight_splitk_last",
    },
    "weight": {
        "forward_boxes",
        "forward_depthwise",
        "forward_gather",
        "forward_overlap",
        "forward_phases",
        "forward_phases_last",
        "forward_phases_packed",
        "backward_data_boxes",
        "backward_data_depthwise",
        "backward_data_gemm",
        "backward_data_gemm_last",
        "backward_data_packed",
    },
}


def spoiled(tensor: torch.Tensor) -> torch.Tensor:
    """One NaN and one infinity of each sign: at both ends, where a tile has its border, and in the middle."""
    found = tensor.clone()
    flat, last = found.view(-1), found.numel() - 1
    for place, value in zip((last // 2, 0, last), VALUES, strict=True):
        flat[place] = value
    return found


def inputs(case: Case, place: str) -> list[torch.Tensor]:
    """x, weight, bias, grad_y with such values in the one place."""
    problem, generator = case.problem(), torch.Generator().manual_seed(0)
    shapes = problem.x_shape, problem.weight_shape, (problem.c_out,), problem.y_shape
    x, weight, bias, grad_y = (torch.randn(shape, generator=generator) for shape in shapes)
    return [spoiled(x), weight, bias, spoiled(grad_y)] if place == "voxels" else [x, spoiled(weight), bias, grad_y]


def reached(case: Case, tensors: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Of each pass the outputs to which a value that is not finite contributes: sums of how many do."""
    counts = [torch.zeros(())] * 4
    ones = [torch.ones(each.shape, dtype=torch.float64) for each in tensors]
    for index, tensor in enumerate(tensors):
        x, weight, bias, grad_y = (*ones[:index], (~tensor.isfinite()).double(), *ones[index + 1 :])
        leaves = [each.clone().requires_grad_() for each in (x, weight, bias)]
        y = case.reference(leaves[0], leaves[1], None)
        gradients = torch.autograd.grad(y, leaves[:2], grad_y)
        # An operand that a pass does not read adds nothing.
        reads = [index < 2, index in (1, 3), index in (0, 3), index == 3]
        sums = [y.detach(), *gradients, grad_y.sum((0, 2, 3, 4))]
        counts = [count + read * each for count, read, each in zip(counts, reads, sums, strict=True)]
    y, grad_x, grad_weight, grad_bias = (count > 0 for count in counts)
    return {"forward": [y], "backward_data": [grad_x], "backward_weight": [grad_weight, grad_bias]}


def read(name: str) -> tuple[str, ...]:
    """The places that the variant's pass reads."""
    return PLACES[:1] if variant(name).pass_name == "backward_weight" else PLACES


@pytest.mark.parametrize(
    ("name", "place"),
    [pytest.param(name, place, marks=pytest.mark.xdist_group(name)) for name in NAMES for place in read(name)],
)
def test_no_variant_loses_one(name, place):
    record = variant(name)
    case, problem = odd(record)
    tensors = inputs(case, place)
    wanted = reached(case, tensors)[record.pass_name]
    dense = {"device": DEVICE, "dtype": problem.dtype, "memory_format": LAYOUTS[problem.layout]}
    x, grad_y = (tensors[index].to(**dense) for index in (0, 3))
    weight, bias = (each.to(DEVICE, problem.dtype) for each in tensors[1:3])
    config = whole_config(record, problem)

    def call():
        return run(record, problem, config, (x, weight, bias), grad_y, True)

    answers = twice(call) if ON_GPU else call()
    more = False
    for answer, want in zip(answers, wanted, strict=True):
        lost = answer.isfinite().cpu() & want
        assert want.any() and not lost.any()
        more |= bool((~answer.isfinite().cpu() & ~want).any())
    assert ON_GPU or more == (name in MORE[place])  # a GPU's tiles are others, and so is their padding


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("label", ODD)
def test_nor_does_torch(label, place):
    """The claim is no stronger than what torch's own layer does."""
    case = ODD[label]
    tensors = inputs(case, place)
    wanted = reached(case, tensors)
    crop = case.problem().torch_crop
    leaves = [each.requires_grad_() for each in tensors[:3]]
    y = torch.conv_transpose3d(*leaves, case.stride, crop.padding, crop.output_padding, case.groups)
    gradients = torch.autograd.grad(y, leaves, tensors[3])
    for answer, want in zip((y, *gradients), (each for of_pass in wanted.values() for each in of_pass), strict=True):
        assert not (answer.isfinite() & want).any()
