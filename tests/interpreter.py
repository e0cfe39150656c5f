"""Makes Triton's interpreter fit for tests: several times faster, with its overflow checks where a test asks for them.

The interpreter (3.6 to 3.9) patches ``triton.language`` anew at every call of a device function, and recomputes every
integer operation in 64 bits. Neither changes a result.
"""

from __future__ import annotations

import contextlib

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


@contextlib.contextmanager
def overflow_checks():
    """Inside, an integer operation whose result does not fit its type is an error."""
    object.__setattr__(OPTIONS, "sanitize_overflow", True)
    try:
        yield
    finally:
        object.__setattr__(OPTIONS, "sanitize_overflow", False)
