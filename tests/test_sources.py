"""Revisions of variants: what changes them and what does not. A variant is edited as a file outside the project."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from tritonconv.autotune import sources
from tritonconv.kernels import registry
from tritonconv.kernels.registry import variant

NUMBERS = itertools.count()  # no two files have one module's name
ROOT = Path(__file__).resolve().parent.parent
TRITON = '''
"""A kernel."""
import triton
import triton.language as tl
from tritonconv.kernels.triton_device import ceil_div
from tritonconv.kernels.variant import Variant

PLACES = 4


@triton.jit
def helper(x, STEP: tl.constexpr):
    """Adds."""
    return x + STEP * ceil_div(3, 2)


@triton.jit(do_not_specialize=["n"])
def kernel(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)  # of a tile
    columns = i + 0
    tl.store(x_ptr + i, helper(tl.load(x_ptr + i), PLACES), mask=columns < n)


def columns(problem):
    return problem.c_out


def launch(problem, config, x, weight, bias):
    """Launches."""
    return kernel[(1,)](x, 3, BLOCK=4)


VARIANT = Variant(
    name="forward_edited", pass_name="forward", idea="an example", backend="triton", launch=launch,
    supports=lambda problem, device: None,
)
'''
TORCH = """
from tritonconv.kernels import torch_phases
from tritonconv.kernels.variant import Variant


def launch(problem, config, x, weight, bias):
    return torch_phases.correlate(x, weight, bias, [], [], [], 1)


VARIANT = Variant(
    name="forward_edited", pass_name="forward", idea="an example", backend="torch", launch=launch,
    supports=lambda problem, device: None,
)
"""


@pytest.fixture
def revision_of(tmp_path):
    """The revision of a variant whose file holds a text; the registry forgets it again."""

    def made(text: str) -> str:
        path = tmp_path / f"edited_{next(NUMBERS)}.py"
        path.write_text(text)
        (record,) = registry.load(path)
        del registry._records()[record.name], registry._files[record.name]
        return sources.revision(record)

    return made


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("# of a tile", "# of one tile of the image"), ('"""Adds."""', '"""Adds a step, as the name says."""'),
        ('    """Adds."""\n', ""), ('"""A kernel."""', ""), ('"""Launches."""', '"""Runs it."""'),
        ("    return x + STEP", "\n    return (x + STEP"), ("BLOCK=4)", "BLOCK=8)"), ("an example", "another"),
        ("return problem.c_out", "return problem.c_in"),
        ("i = tl.arange(0, BLOCK)", "i = tl.arange(\n        0,\n        BLOCK,\n    )"),
    ],
    ids=["comment", "docstring", "no docstring", "module", "host's docstring", "brackets", "host", "record",
         "host of one name", "lines"],
)  # fmt: skip
def test_what_the_compiler_does_not_see_changes_no_revision(revision_of, before, after):
    assert before in TRITON
    edited = TRITON.replace(before, after)
    if "(x + STEP" in after:
        edited = edited.replace("ceil_div(3, 2)", "ceil_div(3, 2))")
    assert revision_of(edited) == revision_of(TRITON)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("x + STEP", "x - STEP"), ("PLACES = 4", "PLACES = 8"), ("STEP: tl.constexpr", "STEP"),
        ('do_not_specialize=["n"]', 'do_not_specialize=["x_ptr"]'), ("import ceil_div", "import gcd as ceil_div"),
        ("mask=columns < n", "mask=columns <= n"),
    ],
    ids=["helper", "constant", "constexpr", "specialisation", "imported helper", "kernel"],
)  # fmt: skip
def test_what_the_compiler_sees_does(revision_of, before, after):
    assert before in TRITON
    assert revision_of(TRITON.replace(before, after)) != revision_of(TRITON)


def test_of_torchs_operations_all_that_runs_counts(revision_of):
    assert revision_of(TORCH.replace("[], 1)", "[], 2)")) != revision_of(TORCH)
    assert revision_of(TORCH + "# the end\n") == revision_of(TORCH)


def test_an_edit_of_one_kernel_is_no_edit_of_another():
    names = ("forward_gather", "forward_boxes", "backward_data_gemm", "backward_weight_splitk", "forward_torch_phases")
    assert len({sources.revision(variant(name)) for name in names}) == len(names)


def test_names_are_followed_into_other_files():
    places = sources.places(variant("forward_phases"))
    found = {(place.module.rpartition(".")[2], place.name) for place in places}
    assert {("forward_phases", "forward_phases_kernel"), ("triton_gemm", "implicit_gemm")} <= found
    assert not any(module in ("registry", "work", "backward_data_gemm") for module, _ in found)


def test_a_call_parses_no_sources():
    """Reading them would cost a second at the first call."""
    program = """
import torch, tritonconv
from tritonconv.autotune import sources
sources.revision = None
weight = torch.ones(8, 4, 3, 3, 3, requires_grad=True)
tritonconv.conv_transpose3d(torch.ones(1, 8, 4, 4, 4), weight, stride=2).sum().backward()
assert sources._tree.cache_info().misses == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
