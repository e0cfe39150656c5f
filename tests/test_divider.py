"""Division by multiplication: exact for every divisor and dividend that a kernel has."""

from __future__ import annotations

import random

import pytest
import torch
from variant_cases import DEVICE

from tritonconv.kernels import registry

if not registry.have_triton():
    pytest.skip("needs Triton", allow_module_level=True)

import triton
import triton.language as tl

from tritonconv.kernels.triton_device import FAR, divided, divider, given_dividers
from tritonconv.kernels.triton_launch import BY, division

BLOCK = 1024


@triton.jit(do_not_specialize=["divisor"])
def divide_kernel(value_ptr, quotient_ptr, rest_ptr, divisor, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    quotient, rest = divided(tl.load(value_ptr + lane), divisor, False, divider(divisor))
    tl.store(quotient_ptr + lane, quotient)
    tl.store(rest_ptr + lane, rest)


def divisors() -> list[int]:
    rng = random.Random(0)
    powers = [1 << bits for bits in range(16)]
    around = {p + step for p in powers for step in (-1, 0, 1)}
    found = {*around, 3, 5, 7, 11, 48, 85, 360, 641, FAR - 1, *(rng.randrange(1, FAR) for _ in range(20))}
    return sorted(d for d in found if 1 <= d < FAR)


@pytest.mark.parametrize("divisor", divisors())
def test_exact(divisor):
    rng, most = random.Random(divisor), 2**31 - 1
    multiples = [min(most, divisor * rng.randrange(0, most // divisor + 1)) for _ in range(300)]
    near = [value + step for value in multiples for step in (-1, 0, 1)]
    values = [v for v in (0, 1, divisor - 1, divisor, most, most - 1, *near) if 0 <= v <= most][:BLOCK]
    values += [rng.randrange(0, most + 1) for _ in range(BLOCK - len(values))]
    value = torch.tensor(values, device=DEVICE, dtype=torch.int32)
    quotient, rest = torch.empty_like(value), torch.empty_like(value)
    divide_kernel[(1,)](value, quotient, rest, divisor, BLOCK=BLOCK)
    assert torch.equal(quotient, value // divisor) and torch.equal(rest, value % divisor)


@triton.jit(do_not_specialize=["divisor", *BY])
def both_kernel(out_ptr, divisor, by_d, by_h, by_w, shift_d, shift_h, shift_w):
    own = divider(divisor)
    given = given_dividers(by_d, by_h, by_w, shift_d, shift_h, shift_w)
    tl.store(out_ptr, own[0].to(tl.int64))
    tl.store(out_ptr + 1, own[1].to(tl.int64))
    tl.store(out_ptr + 2, given[2][0].to(tl.int64))
    tl.store(out_ptr + 3, given[2][1].to(tl.int64))


def test_the_host_works_out_the_same():
    for divisor in divisors():
        out = torch.empty(4, device=DEVICE, dtype=torch.int64)
        given = division((3, 5, divisor))
        assert all(-(2**31) <= value < 2**31 for value in given.values())  # one type of argument, whatever the size
        both_kernel[(1,)](out, divisor, **given)
        assert out[:2].tolist() == out[2:].tolist(), divisor
    assert division((0, 1, 2))["by_d"] == 1  # an empty axis has no voxels to divide
