"""Makes Triton's interpreter fit for tests: several times faster, and with more checks.

It looks at every access of a launch, and for overflows where a test asks for it.

The interpreter (3.6 to 3.9) patches ``triton.language`` anew at every call of a device function, recomputes every
integer operation in 64 bits, and works out the type of every value anew. No result needs it.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator

import numpy as np
import torch
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from tritonconv.lab.inspection.interpreted import named

OPTIONS = interpreter.interpreter_builder.options
SEMANTIC = TritonSemantic(interpreter.interpreter_builder)


@functools.cache  # a second time each access would count twice
def speed_up() -> None:
    patched: set = set()
    run_grid, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang

    @functools.cache
    def modules(fn) -> frozenset:
        return frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is core)

    def grid_call(self, *args, **kwargs):
        patched.clear()
        patched.add(modules(self.fn))  # by the executor itself
        _buffers[:] = [_extent(each) for each in _tensors((*args, *kwargs.values())) if each.numel()]
        _stored.clear()
        run_grid(self, *args, **kwargs)
        if _stored and len(np.unique(every := np.concatenate(_stored))) < len(every):
            raise RuntimeError(f"{self.fn.__name__} stores an element twice: on a GPU either may come last")

    def device_call(self, *args, **kwargs):
        if modules(self.fn) not in patched:
            patched.add(modules(self.fn))
            patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = grid_call
    interpreter.InterpretedFunction.__call__ = device_call
    object.__setattr__(OPTIONS, "sanitize_overflow", False)
    core._unwrap_if_constexpr = named(core._unwrap_if_constexpr)
    _watch_accesses()
    _remember_types()
    _remember_results()


_buffers: list[tuple[int, int]] = []  # of the launch: each operand's first byte, and the one behind its last
_stored: list[np.ndarray] = []  # addresses, of the launch


def _tensors(values) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif hasattr(value, "base"):  # of a descriptor
            yield value.base


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _watch_accesses() -> None:
    """Two faults that the results of programs in one order seldom show are errors: an access beside all operands of
    the launch, and an element that is stored twice.
    """

    def checked(access):
        stores = access.__name__ == "create_masked_store"

        @functools.wraps(access)
        def operation(self, pointers, *rest, **more):
            active = pointers.data[rest[stores].data]  # (value, mask) of a store, (mask, other) of a load
            if active.size:
                low, high = int(active.min()), int(active.max())
                if not any(first <= low and high < end for first, end in _buffers):
                    raise IndexError(f"{access.__name__} at {low} to {high}, beside the operands {_buffers}")
                if stores:
                    _stored.append(active)
            return access(self, pointers, *rest, **more)

        return operation

    for name in ("create_masked_load", "create_masked_store"):
        setattr(interpreter.InterpreterBuilder, name, checked(getattr(interpreter.InterpreterBuilder, name)))


def _remember_types() -> None:
    """Works out once all that follows from the name of a type or from a shape."""
    np_dtype, block_type = interpreter._get_np_dtype, core.block_type.__init__
    np_dtypes: dict[str, object] = {}
    block_types: dict[tuple, dict[str, object]] = {}
    shapes: dict[str, tuple] = {}

    def np_dtype_of(dtype):
        if dtype.name not in np_dtypes:
            np_dtypes[dtype.name] = np_dtype(dtype)
        return np_dtypes[dtype.name]

    def new_block_type(self, element_ty, shape):
        key = (element_ty.name, *shape)
        if key not in block_types:
            block_type(self, element_ty, shape)
            block_types[key] = dict(vars(self))
        vars(self).update(block_types[key])

    def new_tensor(self, handle, type):
        if type.name not in shapes:
            shape = type.shape if type.is_block() else ()
            shapes[type.name] = core.constexpr(math.prod(shape)), core.tuple([core.constexpr(size) for size in shape])
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = shapes[type.name]

    interpreter._get_np_dtype = np_dtype_of
    core.block_type.__init__ = new_block_type
    core.tensor.__init__ = new_tensor


# From here on: operations of which Triton computes the first result for each combination of types, and numpy alone
# the later ones. Only such are served as numpy does them without a cast, or with the cast that Triton makes.

INTEGERS, BITS = ("int32", "int64"), ("__and__", "__or__", "__xor__")
OPERATORS = {
    "__add__": np.add,
    "__radd__": np.add,
    "__sub__": np.subtract,
    "__rsub__": lambda own, other: np.subtract(other, own),
    "__mul__": np.multiply,
    "__rmul__": np.multiply,
    "__floordiv__": lambda own, other: (own - np.fmod(own, other)) // other,  # towards zero, as in C
    "__mod__": np.fmod,
    "__and__": np.bitwise_and,
    "__or__": np.bitwise_or,
    "__xor__": np.bitwise_xor,
    "__lshift__": np.left_shift,
    "__rlshift__": lambda own, other: np.left_shift(other, own),
    "__rshift__": np.right_shift,
    "__lt__": np.less,
    "__le__": np.less_equal,
    "__gt__": np.greater,
    "__ge__": np.greater_equal,
    "__eq__": np.equal,
    "__ne__": np.not_equal,
}


def _remember_results() -> None:
    for name, function in OPERATORS.items():
        _remember(name, _served_operator(name, function), core.tensor)
    for name, function in (("maximum", np.maximum), ("minimum", np.minimum)):
        _remember(name, _served_operator(name, function), tl, core)
    _remember("__getitem__", _served_index, core.tensor)
    _remember("to", _served_cast, core.tensor)
    _remember("where", _served_choice, tl, core)


def _remember(name: str, served, *places) -> None:
    """Replaces an operation of the language. ``served(*args)`` returns the key of the result's type, a function of
    numpy and its operands, or None where Triton itself must do it.
    """
    by_triton = getattr(places[0], name)
    if not core.is_builtin(by_triton):  # done already
        return
    results: dict[object, dict[str, object]] = {}

    @functools.wraps(by_triton)
    def operation(*args, _semantic=None, **kwargs):
        if _semantic is not None or OPTIONS.sanitize_overflow or kwargs or not (call := served(*args)):
            return by_triton(*args, **kwargs, _semantic=_semantic or SEMANTIC)
        key, function, operands = call
        fields = results.get(key)
        if fields is None:
            result = by_triton(*args, _semantic=SEMANTIC)
            results[key] = vars(result)
            return result
        handle, result = object.__new__(interpreter.TensorHandle), object.__new__(core.tensor)
        handle.data, handle.dtype, handle.attr = function(*operands), fields["dtype"], {}
        result.__dict__.update(fields)
        result.handle = handle
        return result

    delattr(operation, core.TRITON_BUILTIN)  # the interpreter's patch of the language leaves it alone
    for place in places:
        setattr(place, name, operation)


def _served_operator(name: str, function):
    elements = {(own, other): function for own in INTEGERS for other in INTEGERS} | {("uint32", "uint32"): function}
    if name in BITS:
        elements["int1", "int1"] = function
    elif name not in ("__mod__", "__floordiv__", "__lshift__", "__rlshift__", "__rshift__"):
        elements["fp32", "fp32"] = function

    def served(own, other):
        if type(own) is not core.tensor:
            return None
        if type(other) is core.constexpr:
            other = other.value
        if type(other) is int:
            low = 0 if own.dtype.name == "uint32" else -(2**31)
            if own.dtype.name in ("uint32", *INTEGERS) and low <= other < 2**31:
                return own.type.name, function, (own.handle.data, other)
        elif type(other) is core.tensor:
            kind = own.dtype.name, other.dtype.name
            if name == "__add__" and kind not in elements and own.dtype.is_ptr() and kind[1] in INTEGERS:
                size = np.uint64(max(1, own.dtype.element_ty.primitive_bitwidth // 8))
                elements[kind] = lambda address, offset: address + size * offset.astype(np.uint64)
            if kind in elements:
                return (own.type.name, other.type.name), elements[kind], (own.handle.data, other.handle.data)
        return None

    return served


def _served_index(own, index):
    """New axes, and nothing else: a block with None between its axes."""
    if type(index) is tuple and [part for part in index if part is not None] == [slice(None)] * len(own.shape):
        return (own.type.name, *(part is None for part in index)), np.ndarray.__getitem__, (own.handle.data, index)
    return None


def _served_cast(own, dtype, *rest):
    if rest:
        return None
    if own.dtype is dtype or (own.dtype.name == "fp16" and dtype is tl.float32):
        return (own.type.name, dtype.name), np.ndarray.astype, (own.handle.data, interpreter._get_np_dtype(dtype))
    if own.dtype.name in ("int1", "uint32", *INTEGERS) and dtype in (tl.uint32, tl.int32, tl.int64):
        return (own.type.name, dtype.name), np.ndarray.astype, (own.handle.data, interpreter._get_np_dtype(dtype))
    return None


def _served_choice(condition, x, y):
    x, y = (value.value if type(value) is core.constexpr else value for value in (x, y))
    kinds = [value.type.name if type(value) is core.tensor else type(value) for value in (condition, x, y)]
    elements = {value.dtype.name for value in (x, y) if type(value) is core.tensor}
    if type(condition) is not core.tensor or condition.dtype.name != "int1" or len(elements) != 1:
        return None
    if int in kinds and (elements != {"int32"} or not all(-(2**31) <= v < 2**31 for v in (x, y) if type(v) is int)):
        return None
    if any(kind is not int and type(kind) is not str for kind in kinds):
        return None
    x, y = (np.int32(value) if type(value) is int else value.handle.data for value in (x, y))
    return tuple(kinds), np.where, (condition.handle.data, x, y)


@contextlib.contextmanager
def overflow_checks():
    """Inside, an integer operation whose result does not fit its type is an error."""
    object.__setattr__(OPTIONS, "sanitize_overflow", True)
    try:
        yield
    finally:
        object.__setattr__(OPTIONS, "sanitize_overflow", False)
