"""The rows of a results file: the fields that a reader relies on, by kind, and the check of them."""

from __future__ import annotations

import math
from typing import Any

SCHEMA = 1  # the version of all this, in the environment row

_CELL = "layer pass dtype layout variant"
_MODEL = "model inputs dtype layout"
# The fields that a reader relies on, by kind; a row may carry more. With "?" null is a value too.
REQUIRED = {
    "environment": "schema run utc device device_name threads torch triton? scale scale_rule commit?",
    "roof": "name what dtype? value unit",
    "result": f"{_CELL} suite median_ms p20_ms p80_ms n_runs flops bytes speedup? speedup_p20? speedup_p80?",
    # It differs from torch in nothing that a clock should see, and was timed beside it: see nulls.py.
    "null": f"{_CELL} timing",
    # A variant whose answer was held against float64, and not timed.
    "check": f"{_CELL} max_error tolerance",
    # One candidate of the tuner: a variant with one config. ``stage`` is "screen" or "final"; predicted_ms the model's.
    "timing": f"{_CELL} suite config stage median_ms p20_ms p80_ms n_runs predicted_ms? speedup?",
    # The tuner's choice for one pass of a layer; torch_ms is torch's own in the same rounds.
    "tuned": f"{_CELL} suite config median_ms torch_ms",
    # Time of the Python and the launches of one call on a tiny layer; variant is torch's or ours.
    "overhead": f"{_CELL} median_us p20_us p80_us n_runs",
    # A part of a pass on slabs, on so many ranks: "total", "exchange" or "compute"; "strong" or "weak" scaling.
    "slab": f"{_CELL} suite scaling part ranks axis median_ms p20_ms p80_ms n_runs exchanged_bytes efficiency?",
    # The counters of ncu for one kernel of a call, by "name [unit]".
    "profile": f"{_CELL} kernel launch duration_us counters",
    # Of a whole model (lab/models): an operation of one training step with torch's layers, ms and its share of all; and
    # the times of the step of a contestant.
    "operation": f"{_MODEL} operation calls ms share",
    "step": f"{_MODEL} variant median_ms p20_ms p80_ms n_runs speedup speedup_p20 speedup_p80",
    # A contestant's forward of a whole problem of KernelBench's level 2 (lab/models/level2_times.py).
    "problem": f"{_MODEL} variant timing median_ms p20_ms p80_ms n_runs speedup speedup_p20 speedup_p80",
    "skip": "layer pass variant message",
    "error": "layer pass variant status message",
    "end": "reason",
}
KINDS = tuple(REQUIRED)
# The columns of a row about a layer with an epilogue, which all such rows have and no other, and older files none:
# torch's separate operations move so many bytes more.
EPILOGUE = "epilogue activation? residual rounding? spared_bytes"
_NUMBERS = (int, float)
_TIMES = ("median_ms", "p20_ms", "p80_ms", "n_runs", "torch_ms", "median_us", "p20_us", "p80_us", "duration_us")
_ABOVE_0 = {*_TIMES, "value", "bytes"}
# The types of fields that are no text.
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys((*_ABOVE_0, "flops", "speedup", "speedup_p20", "speedup_p80", "predicted_ms"), _NUMBERS),
    **dict.fromkeys(("max_error", "tolerance", "calls", "ms", "share", "efficiency"), _NUMBERS),
    **dict.fromkeys(("schema", "threads", "n_runs", "launch", "ranks", "axis", "exchanged_bytes"), (int,)),
    **dict.fromkeys(("config", "counters"), (dict,)),
    "residual": (bool,),
    "spared_bytes": (int,),
}


def check(row: Any) -> None:
    """Raises ValueError for a row without what a reader relies on."""
    kind = row.get("kind") if isinstance(row, dict) else row
    if not isinstance(row, dict) or kind not in KINDS:
        raise ValueError(f"kind expects one of {', '.join(KINDS)}, got {kind!r}")
    for field in (REQUIRED[kind] + (f" {EPILOGUE}" if "epilogue" in row else "")).split():
        key = field.rstrip("?")
        types = _TYPES.get(key, (str,))
        if key not in row:
            raise ValueError(f"the {kind} row has no {key!r}")
        value = row[key]
        if value is None and key != field:
            continue
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            names = " or ".join([*(type_.__name__ for type_ in types), *(["null"] if key != field else [])])
            raise ValueError(f"{key} expects {names}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} expects a finite number, got {value!r}")
        if key in _ABOVE_0 and row[key] <= 0:
            raise ValueError(f"{key} must be above 0, got {value!r}")
