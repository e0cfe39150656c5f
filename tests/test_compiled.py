"""The compiler's output for a launch, with no GPU: offsets of 64 bits, sizes of one, and no compilation per size.

The tests run in a process of their own: the interpreter, in which the other tests run the kernels, compiles nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from variant_cases import form_names

import tritonconv

ROOT = Path(__file__).resolve().parent.parent
NAMES = form_names(record for record in tritonconv.variants() if record.backend == "triton")
# Without the halves of backward_together, which launch the kernels of two others by themselves, for short problems.
ALONE = [name for name in NAMES if not name.endswith("_together")]
EVERY = (
    "every" if "EVERY_LAYER" in os.environ else ""
)  # else a variant takes one size in one layout, the other in the other

COMMON = """
import dataclasses, json, sys
import torch
from tritonconv.lab.inspection.compiling import GPU, META, TARGETS, compile_launch, compiling_for
from tritonconv.kernels import triton_launch
from tritonconv.kernels.triton_buffers import new, operand
from tritonconv.kernels.triton_program import Program
from variant_cases import form
from tritonconv.problem import Problem, output_size

def problem_of(n, size, channels=(64, 32), kernel=2, groups=1, layout="ndhwc", crop=0):
    k, s, p = (kernel,) * 3, (2,) * 3, (crop,) * 3
    out = output_size(size, k, s, p, p, (0,) * 3, (1,) * 3)
    return Problem(n, *channels, size, k, s, p, out, (1,) * 3, groups, torch.bfloat16, layout, True)

def served(name, **sizes):
    record = form(name)
    for more in (
        {}, {"channels": (64, 64), "groups": 64, "kernel": 3}, {"channels": (32, 4)}, {"channels": (16, 16)},
        {"channels": (32, 2), "kernel": 4}, {"kernel": 3, "layout": "ncdhw"},
        {"channels": (32, 2), "kernel": 4, "layout": "ncdhw"}, {"channels": (64, 48)},
    ):
        problem = problem_of(**{**more, **sizes})
        if record.supports(problem, GPU) is None:
            return record, problem
    raise AssertionError(name)

def turns(some, place, layout):
    return some if sys.argv[2] else (some[(place + (layout == "ndhwc")) % len(some)],)

def compiled(record, problem, config=None):
    config = record.default(problem, GPU) if config is None else config
    return config, [kernel for name, kernel in compile_launch(record, problem, config) if "joint" not in name]
"""


def in_a_process(code: str, *names: str):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    script = COMMON + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", script, *names], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("layout", ["ncdhw", "ndhwc"])
def test_what_the_gate_judges_on_a_gpu_is_the_kernel_that_is_timed(layout):
    """But for the copies in another order, whose tiles go by how much there is to copy."""
    others = in_a_process(
        """
        from tritonconv.lab.bench.gate import reduced

        names, found = sys.argv[3:], []
        with compiling_for(TARGETS["sm_90"]):
            for place, name in enumerate(names):
                for size in turns(((32, 32, 32), (12, 34, 60)), place, sys.argv[1]):
                    try:
                        record, problem = served(name, n=3, size=size, layout=sys.argv[1])
                    except AssertionError:
                        continue
                    small = reduced(problem, GPU)
                    config, timed = compiled(record, problem)
                    _, judged = compiled(record, small, config)
                    hashes = {kernel.hash for kernel in timed}
                    found += [f"{kernel.name} of {name} on {problem}: {small.size}" for kernel in judged
                              if kernel.hash not in hashes and "transpose" not in kernel.name]
        print(json.dumps(found))
        """,
        layout,
        EVERY,
        *NAMES,
    )
    assert others == []


def test_a_new_image_size_compiles_nothing():
    """Channels a multiple of 16, channels_last_3d: whatever the divisors of the sizes, one kernel serves them all.

    The copy of an NCDHW operand is compiled twice: a number of voxels that 16 divides permits wide loads. So is a
    kernel that stores whole rows of NCDHW, and one of few output channels that takes grad_y by its strides, which 16
    divides or not.
    """
    anew = in_a_process(
        """
        anew = []
        with compiling_for(TARGETS["sm_90"]):
            for name in sys.argv[1:]:
                config, kernels = None, []
                for n, size in ((1, (16, 16, 16)), (2, (5, 7, 3)), (3, (1, 1, 48))):
                    record, problem = served(name, n=n, size=size)
                    config, found = compiled(record, problem, config)
                    kernels.append(next(each for each in found if each.name != "transpose_kernel"))
                if (problem.layout == "ncdhw" and config.get("ROWS")) or name.endswith("_patches"):
                    del kernels[1]  # whose width 16 does not divide
                if any(kernel is not kernels[0] for kernel in kernels):
                    anew.append(name)
        print(json.dumps(anew))
        """,
        *ALONE,
    )
    assert anew == []


@pytest.mark.parametrize("layout", ["ncdhw", "ndhwc"])
def test_offsets_of_64_bits_and_sizes_of_one_compile(layout):
    wrong = in_a_process(
        """
        wrong = []
        with compiling_for(TARGETS["sm_90"]):
            for place, name in enumerate(sys.argv[3:]):
                many = ((1 << 14, (64, 32, 32), 2), (520, (64, 32, 32), 1), (1, (1, 1, 1), 0))
                for n, size, wide in turns(many, place, sys.argv[1]):
                    try:
                        record, problem = served(name, n=n, size=size, layout=sys.argv[1])
                    except AssertionError:
                        continue
                    x, y = (operand(torch.empty(shape, device=META), 0) for shape in (problem.x_shape, problem.y_shape))
                    if triton_launch.wide(x, y, of=problem) != wide:
                        wrong.append(f"{name} {n} {size}: not {wide}")
                    try:
                        compiled(record, problem)
                    except Exception as error:
                        wrong.append(f"{name} {n} {size}: {type(error).__name__} {str(error)[-300:]}")
        print(json.dumps(wrong))
        """,
        layout,
        EVERY,
        *NAMES,
    )
    assert wrong == []


def test_copies_and_sums_of_volumes_compile_twice_for_sizes_of_one_order():
    """Once for numbers of voxels that 16 divides, which permits wide loads, and once for all others."""
    counts = in_a_process(
        """
        from tritonconv.kernels.triton_reduce import sum_volumes
        from tritonconv.kernels.triton_transpose import channels_last
        counts = []

        def summed(partial):
            _, n, *size, channels = partial.shape
            out = new((n, channels, *size), partial, torch.bfloat16)
            sum_volumes(partial, out)
            return out

        with compiling_for(TARGETS["sm_90"]):
            for make in (
                lambda size: (channels_last, torch.empty(1, 48, *size, dtype=torch.bfloat16, device=META)),
                lambda size: (summed, torch.empty(3, 1, *size, 48, device=META)),
            ):
                kernels = set()
                for size in ((16, 16, 16), (15, 17, 16), (15, 15, 19), (16, 16, 15), (17, 17, 15)):
                    launches, operands = make(size)
                    (kernel,) = Program.of(launches, [operands]).compile()
                    kernels.add(kernel.hash)
                counts.append(len(kernels))
        print(json.dumps(counts))
        """
    )
    assert counts == [2, 2]


def test_channels_that_8_divides_are_loaded_as_wide_as_those_that_16_divides():
    """The compiler is told of no stride that 16 does not divide: 24 channels would be loaded one by one."""
    narrow = in_a_process(
        """
        import re
        narrow = {}
        with compiling_for(TARGETS["sm_90"]):
            for name in sys.argv[1:]:
                record, counts = form(name), []
                for channels in ((64, 32), (56, 24)):
                    problem = problem_of(2, (8, 9, 10), channels, kernel=3, crop=1)
                    if record.supports(problem, GPU) is None:
                        _, found = compiled(record, problem)
                        main = next(each for each in found if each.name.startswith(record.name))
                        counts.append(len(re.findall(r"ld[.]global[.]b16", main.asm["ptx"])))
                narrow[name] = counts
        print(json.dumps(narrow))
        """,
        *ALONE,
    )
    narrow = {name: counts for name, counts in narrow.items() if counts}
    assert {"forward_phases", "backward_data_gemm", "backward_weight_splitk", "backward_weight_cells"} <= set(narrow)
    assert all(few <= many for many, few in narrow.values()), narrow
