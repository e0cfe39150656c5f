"""The tests' short cuts through Triton's interpreter (interpreter.py) give what the interpreter itself gives, and its
watch over the accesses sees the faults that no result shows.
"""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch

if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels are compiled here, not interpreted", allow_module_level=True)

import triton
import triton.language as tl
from interpreter import OPERATORS, SEMANTIC
from triton.language import core
from triton.runtime import interpreter

NUMPY = {
    "int32": np.int32,
    "int64": np.int64,
    "uint32": np.uint32,
    "int1": np.bool_,
    "fp32": np.float32,
    "fp16": np.float16,
}
ELEMENTS = (tl.int32, tl.int64, tl.uint32, tl.int1, tl.float32, tl.float16, core.pointer_type(tl.float16))
SHAPES = [(4, 1), (1, 8), (4, 8), ()]


@pytest.fixture(autouse=True, scope="module")
def _interpreted_language():
    """The language as it is while a kernel runs."""
    scope = interpreter._patch_lang(check)
    with np.errstate(all="ignore"):
        yield
    scope.restore()


def tensor(dtype, shape: tuple[int, ...], values: np.ndarray) -> core.tensor:
    numpy = np.uint64 if dtype.is_ptr() else NUMPY[dtype.name]
    data = np.resize(values, shape or 1).astype(numpy)
    return core.tensor(interpreter.TensorHandle(data, dtype), core.block_type(dtype, list(shape)) if shape else dtype)


def check(operation, *args) -> bool:
    """Whether Triton does the operation at all. Called twice, for the second time is the short cut."""
    try:
        right = operation.__wrapped__(*args, _semantic=SEMANTIC)
    except Exception as refusal:
        with pytest.raises(type(refusal)):
            operation(*args)
        return False
    for result in (operation(*args), operation(*args)):
        assert (result.type, result.dtype, result.shape) == (right.type, right.dtype, right.shape)
        data, expected = result.handle.data, right.handle.data
        assert (data.dtype, data.shape) == (expected.dtype, expected.shape)
        assert np.array_equal(data, expected, equal_nan=data.dtype.kind == "f")
    return True


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    values = np.arange(31) if "shift" in name else np.array([5, -7, 3, -2, 2**31 - 1, -(2**31), 1, 1000, -13])
    operation, done = getattr(core.tensor, name), 0
    for (own, other), (left, right) in itertools.product(
        itertools.product(ELEMENTS, [*ELEMENTS, 7, -3, 2.5]), itertools.permutations(SHAPES, 2)
    ):
        second = tensor(other, right, values[::-1]) if isinstance(other, core.dtype) else core.constexpr(other)
        done += check(operation, tensor(own, left, values), second)
    assert done > 20


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_the_larger_and_the_smaller(name):
    values = np.array([5, -7, 3, -2, 2**31 - 1, -(2**31), 1, 1000, -13])
    for own, other in itertools.product(ELEMENTS, [*ELEMENTS, 7]):
        second = tensor(other, (4, 1), values[::-1]) if isinstance(other, core.dtype) else other
        check(getattr(tl, name), tensor(own, (4, 8), values), second)


def test_a_choice():
    values, numbers = np.arange(-5, 40), [0, 7, -3, 2**40, 2.5, core.constexpr(3)]
    for x, y in itertools.product([*ELEMENTS, *numbers], repeat=2):
        operands = [
            tensor(each, (4, 8), values * place) if isinstance(each, core.dtype) else each
            for place, each in enumerate((x, y))
        ]
        for shape in SHAPES:
            check(tl.where, tensor(tl.int1, shape, values % 3 == 0), *operands)


def test_casts_and_new_axes():
    values = np.array([5, -7, 3, -2, 2**31 - 1, -(2**31), 1, 0, -13])
    for own, shape in itertools.product(ELEMENTS, [(8,), *SHAPES]):
        for to in (*ELEMENTS, tl.float16):
            check(core.tensor.to, tensor(own, shape, values), to)
        every = slice(None)
        for index in (
            [(every, None), (None, every)] if len(shape) == 1 else [(every, None, every), (None, every, every)]
        ):
            check(core.tensor.__getitem__, tensor(own, shape, values), index)


@triton.jit
def copy_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(y_ptr + lane, tl.load(x_ptr + lane, mask=lane < count, other=0.0), mask=lane < count)


def test_an_access_beside_the_operands_and_a_second_store_are_errors():
    memory = torch.arange(32.0)
    x, long, y = memory[2:7], memory[8:16], memory[20:25]
    copy_kernel[(1,)](x, y, 5, BLOCK=8)
    assert torch.equal(x, y)
    for first, second, count in ((x, long, 6), (long, y, 6), (memory[:0], y, 1)):
        with pytest.raises(interpreter.InterpreterError, match="beside the operands"):
            copy_kernel[(1,)](first, second, count, BLOCK=8)
    with pytest.raises(RuntimeError, match="copy_kernel stores an element twice"):
        copy_kernel[(2,)](x, y, 5, BLOCK=8)
