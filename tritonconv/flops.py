"""torch's count of FLOPs (``torch.utils.flop_counter``), where it can be had: its import imports Triton.

A broken Triton fails in that import, then nobody counts FLOPs in this process, and nothing needs the formulas.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

_log = logging.getLogger("torch.utils.flop_counter")
_before, _log.disabled = _log.disabled, True  # of an absent Triton it warns those who count, and here nobody does
try:
    from torch.utils.flop_counter import conv_flop_count, register_flop_formula
except (Exception, SystemExit):

    def register_flop_formula(targets: Any, get_raw: bool = False) -> Callable:
        return lambda formula: formula

    def conv_flop_count(*shapes: Any, **how: Any) -> int:
        raise NotImplementedError("torch.utils.flop_counter cannot be imported")

finally:
    _log.disabled = _before

__all__ = ["conv_flop_count", "register_flop_formula"]
