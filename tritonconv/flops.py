"""torch's count of FLOPs (``torch.utils.flop_counter``), where it can be had: its import imports Triton.

A broken Triton fails in that import; then nobody counts FLOPs in this process, and nothing needs the formulas.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

_log = logging.getLogger("torch.utils.flop_counter")
_before, _log.disabled = _log.disabled, True  # of an absent Triton it warns those who count, and here nobody does
_counter: Any = None
try:
    from torch.utils import flop_counter as _counter
except (Exception, SystemExit):
    pass
finally:
    _log.disabled = _before


def register_flop_formula(operator: Any) -> Callable[[Callable], Callable]:
    """Decorates the formula of an operator, as torch's function of the name."""
    return _counter.register_flop_formula(operator) if _counter is not None else lambda formula: formula


def conv_flop_count(x_shape: Sequence[int], weight_shape: Sequence[int], out_shape: Any, transposed: bool) -> int:
    """torch's own count; asked for by the formulas alone."""
    return _counter.conv_flop_count(x_shape, weight_shape, out_shape, transposed=transposed)
