"""The null contestants, which differ from torch in nothing that a clock should see: what they show is noise.

``torch_again`` is torch's own call once more; ``torch_by_our_road`` is the public operation with torch's own variants
forced: our dispatch looks up the plan and hands the call to torch, so in the wall column it shows what that costs.
"""

from __future__ import annotations

from tritonconv.autotune.rules import FALLBACK
from tritonconv.errors import VariantNotApplicable
from tritonconv.forced import in_force
from tritonconv.lab.bench.calls import FORWARD_BACKWARD, TensorCall, operation_call
from tritonconv.lab.bench.case import Case
from tritonconv.lab.bench.measure import Measured
from tritonconv.lab.bench.noise import AGAIN, OUR_ROAD
from tritonconv.lab.bench.operations import our_operation
from tritonconv.lab.bench.results import BASELINE
from tritonconv.problem import PASSES


def calls(case: Case, pass_name: str) -> dict[str, TensorCall]:
    """The null contestants of a pass of a problem that torch serves: warm, their answers torch's own.

    A gradient by itself has no public operation, and so no road of ours.
    """
    contestants = {AGAIN: case.torch(pass_name)}
    passes = {"forward": ("forward",), FORWARD_BACKWARD: PASSES}.get(pass_name)
    if passes is not None:
        call = operation_call(our_operation, case.problem, case.tensors, pass_name)
        contestants[OUR_ROAD] = in_force(call, *(FALLBACK[name] for name in passes))
    for name in list(contestants):
        try:
            contestants[name]()
        except VariantNotApplicable:  # torch's own is wrong here, and known to be
            del contestants[name]
    return contestants


def fields(name: str, measured: Measured) -> dict[str, object]:
    """The fields of a null contestant's row."""
    return {"variant": name, "timing": measured.first, "baseline": BASELINE, **measured.fields(name, BASELINE)}
