"""The cost of a call besides its work: torch's layer and ours on an input so small that nothing else is left.

On a GPU the calls are queued without waiting, so the time is that of Python and of the launches; on a CPU the tiny
convolution itself is in it, the same on both sides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from time import perf_counter

import torch
from torch import nn

from tritonconv.dispatch import wait_until_compiled
from tritonconv.forced import use
from tritonconv.lab.bench.calls import FORWARD_BACKWARD
from tritonconv.lab.bench.clock import garbage_waits
from tritonconv.lab.bench.results import BASELINE, OURS
from tritonconv.lab.bench.timing import Times, interleave
from tritonconv.layer import ConvTranspose3d

CHANNELS, SIZE = 2, 2
LAYER = f"k2 s2 {CHANNELS}->{CHANNELS} {SIZE}^3"
CALLS = 100  # in one timed batch: fewer than a GPU's queue holds
LIMIT_US = 10.0
# In a forward without gradients, in one that autograd records, and with the backward.
RECORDED = "forward_recorded"
PASSES = ("forward", RECORDED, FORWARD_BACKWARD)


def measure(
    device: torch.device, dtype: torch.dtype, seconds: float, variants: tuple[str, ...] = ()
) -> Iterator[dict[str, object]]:
    """One row per pass and layer (torch's, ours), about ``seconds`` in all; times in microseconds per call.

    ``variants`` are forced in ours. Raises VariantNotApplicable where one of them does not serve the tiny layer.
    """
    theirs = nn.ConvTranspose3d(CHANNELS, CHANNELS, 2, stride=2, device=device, dtype=dtype)
    ours = ConvTranspose3d(CHANNELS, CHANNELS, 2, stride=2, device=device, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    for pass_name in PASSES:
        with use(*variants):
            calls = {BASELINE: _batch(theirs, pass_name), OURS: _batch(ours, pass_name)}
            times = _timed(calls, device, seconds / len(PASSES))
        for name in calls:
            spread = times.spread(name)
            yield {
                "layer": LAYER,
                "pass": pass_name,
                "dtype": str(dtype).removeprefix("torch."),
                "layout": "ncdhw",
                "variant": name,
                "forced": variants if name == OURS else (),
                "median_us": spread.median,
                "p20_us": spread.p20,
                "p80_us": spread.p80,
                "n_runs": spread.runs * CALLS,
            }


def excess(rows: list[dict]) -> dict[str, float]:
    """Microseconds per call of ours over torch's, by pass."""
    medians = {(row["pass"], row["variant"]): row["median_us"] for row in rows}
    return {name: medians[name, OURS] - medians[name, BASELINE] for name in PASSES if (name, OURS) in medians}


def _batch(layer: nn.Module, pass_name: str) -> Callable[[], None]:
    """CALLS calls of a layer."""
    weight = next(layer.parameters())
    x = torch.randn(1, CHANNELS, SIZE, SIZE, SIZE, device=weight.device, dtype=weight.dtype)
    recording = torch.no_grad() if pass_name == "forward" else contextlib.nullcontext()
    grad_y = torch.randn_like(layer(x))
    leaves = (x.requires_grad_(pass_name != "forward"), *layer.parameters())

    def calls() -> None:
        with recording:
            if pass_name == FORWARD_BACKWARD:
                for _ in range(CALLS):
                    torch.autograd.grad(layer(x), leaves, grad_y)
            else:
                for _ in range(CALLS):
                    layer(x)

    return calls


def _timed(calls: dict[str, Callable[[], None]], device: torch.device, seconds: float) -> Times:
    """Microseconds per call; the garbage collector waits, for it would hit one of the two by chance."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def watch(batch: Callable[[], object]) -> float:
        wait()
        begin = perf_counter()
        batch()
        took = perf_counter() - begin
        wait()
        return took / CALLS * 1e6

    for batch in calls.values():
        batch()
        wait_until_compiled()
        batch()
    with garbage_waits():
        return interleave(calls, watch, seconds)
