"""Makes Triton's interpreter fit for tests: several times faster, with its overflow checks where a test asks for them.

The interpreter (3.6 to 3.9) patches ``triton.language`` anew at every call of a device function, recomputes every
integer operation in 64 bits, and works out the type of every value anew. None of it changes a result.
"""

from __future__ import annotations

import contextlib
import math

from triton.language import core, semantic
from triton.runtime import interpreter

OPTIONS = interpreter.interpreter_builder.options


def speed_up() -> None:
    patched: set = set()
    run_grid, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang

    def grid_call(self, *args, **kwargs):
        patched.clear()
        return run_grid(self, *args, **kwargs)

    def device_call(self, *args, **kwargs):
        if self.fn not in patched:
            patched.add(self.fn)
            patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = grid_call
    interpreter.InterpretedFunction.__call__ = device_call
    object.__setattr__(OPTIONS, "sanitize_overflow", False)
    _remember_types()


def _remember_types() -> None:
    """Works out once all that follows from the name of a type or from a shape; integers of one type need no cast."""
    np_dtype, block_type = interpreter._get_np_dtype, core.block_type.__init__
    operands = semantic.TritonSemantic.binary_op_type_checking_impl
    np_dtypes: dict[str, object] = {}
    block_types: dict[tuple, dict[str, object]] = {}
    shapes: dict[tuple, tuple] = {}

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
        shape = type.shape if type.is_block() else ()
        if shape not in shapes:
            shapes[shape] = core.constexpr(math.prod(shape)), core.tuple([core.constexpr(size) for size in shape])
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = shapes[shape]

    def common_operands(self, lhs, rhs, *args, **kwargs):
        tensors = isinstance(lhs, core.tensor) and isinstance(rhs, core.tensor)
        if tensors and lhs.type.name == rhs.type.name and lhs.dtype.is_int():
            return lhs, rhs
        return operands(self, lhs, rhs, *args, **kwargs)

    interpreter._get_np_dtype = np_dtype_of
    core.block_type.__init__ = new_block_type
    core.tensor.__init__ = new_tensor
    semantic.TritonSemantic.binary_op_type_checking_impl = common_operands


@contextlib.contextmanager
def overflow_checks():
    """Inside, an integer operation whose result does not fit its type is an error."""
    object.__setattr__(OPTIONS, "sanitize_overflow", True)
    try:
        yield
    finally:
        object.__setattr__(OPTIONS, "sanitize_overflow", False)
