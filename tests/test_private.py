"""torch's private names: a release of torch that lacks one is served by the stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tritonconv import private

ROOT = Path(__file__).resolve().parent.parent
WITHOUT = """
import importlib.util, pathlib, sys
path = pathlib.Path("tritonconv/private.py")
source = path.read_text().replace("found = getattr(found, name, None)", "found = None")
assert source != path.read_text()
spec = importlib.util.spec_from_loader("tritonconv.private", None)
module = sys.modules["tritonconv.private"] = importlib.util.module_from_spec(spec)
exec(compile(source, str(path), "exec"), module.__dict__)
import torch, tritonconv
assert tritonconv.fallback.transforms() == "unknown"
x = torch.randn(1, 4, 3, 4, 5, requires_grad=True)
theirs = torch.nn.ConvTranspose3d(4, 3, 3, 2)
ours = tritonconv.ConvTranspose3d(4, 3, 3, 2)
ours.load_state_dict(theirs.state_dict())
pairs = [[y, *torch.autograd.grad(y.square().sum(), (x, layer.weight))] for layer in (ours, theirs) for y in [layer(x)]]
print(all(map(torch.equal, *pairs)), "unknown" in str(tritonconv.fallback.reason(x)), module.deterministic())
"""


def test_a_name_that_is_missing_is_replaced():
    stand_in = object()
    assert private.private("_C._no_such_name", stand_in) is stand_in
    assert private.private("_no_such_part._C.name", stand_in) is stand_in
    assert private.private("are_deterministic_algorithms_enabled", None) is torch.are_deterministic_algorithms_enabled


def test_without_any_of_them_calls_are_torchs_and_right():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.split() == ["True", "False", "False"], done.stderr
