"""For each Triton variant one small problem that no tile fits, and a config that launches all that the variant has."""

from __future__ import annotations

import torch
from variant_cases import DEVICE, Case

from tritonconv import Problem
from tritonconv.kernels.variant import Variant

# The first one that a variant serves is its own. Where TMA loads want rows of 16 bytes, channels are multiples of 8.
ODD = {
    "k3 s2": Case(n=1, channels=(19, 7), size=(3, 1, 5), stride=2, front=1, back=1, extra=1),
    "k2 s2": Case(n=1, channels=(37, 7), size=(3, 1, 5), kernel=2, stride=2),
    "k3 s2, channels by 8": Case(n=1, channels=(24, 40), size=(3, 1, 3), stride=2, front=1, back=1, extra=1),
    "k2 s2, channels by 8": Case(n=1, channels=(24, 40), size=(3, 1, 5), kernel=2, stride=2),
    "k4 s2 to 1": Case(n=1, channels=(19, 1), size=(3, 3, 5), kernel=4, stride=2, front=1, back=1),
    "depthwise k3 s2": Case(n=1, channels=(19, 19), size=(3, 1, 5), stride=2, front=1, back=1, extra=1, groups=19),
}
LAYOUTS = ("ndhwc", "ncdhw")  # the one that more variants have vector loads for first
SPLITS = 3
PACKED = 1


def odd(record: Variant, dtype: torch.dtype = torch.float16) -> tuple[Case, Problem]:
    for case in ODD.values():
        for layout in LAYOUTS:
            problem = case.problem(dtype, layout)
            if record.supports(problem, DEVICE) is None:
                return case, problem
    raise AssertionError(f"{record.name} serves none of the problems")


def whole_config(record: Variant, problem: Problem) -> dict[str, int]:
    """The default, with a sum of partial results and a packed weight where the variant can have them."""
    config = dict(record.default(problem, DEVICE))
    return config | {key: value for key, value in (("SPLITS", SPLITS), ("WEIGHT", PACKED)) if key in config}
