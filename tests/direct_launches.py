"""Run by test_direct_launch.py, without the interpreter: prints, per variant, how its replayed launches compare.

Kernels are compiled for sm_90; a driver that only writes down what it is asked to launch takes the GPU's place.
"""

from __future__ import annotations

import torch
import triton
from triton.runtime.jit import JITFunction

from tritonconv import Problem
from tritonconv.kernels.registry import variant
from tritonconv.kernels.targets import TARGETS
from tritonconv.kernels.triton_replay import Replay
from tritonconv.lab.inspection.compiling import GPU, TargetDriver

HALF = torch.float16
SHUFFLE = Problem(1, 32, 16, (3, 4, 5), (2, 2, 2), (2, 2, 2), (0, 0, 0), (6, 8, 10), dtype=HALF, bias=True)
HALO = Problem(1, 16, 16, (3, 4, 5), (3, 3, 3), (2, 2, 2), (1, 1, 1), (6, 8, 10), dtype=HALF, layout="ndhwc")
CASES = (
    ("forward_shuffle", SHUFFLE),  # one launch
    ("backward_data_gemm", HALO),  # a sum of partial results
    ("forward_boxes", HALO),  # a packed weight, descriptors
    ("backward_data_boxes", HALO),  # of views
    ("backward_weight_fused", SHUFFLE),  # partial sums, the bias too; and the whole backward at once
)
launched: list[tuple] = []


def told(value, places):
    """An argument as it can be compared between two calls; tensors by their place, new ones in order of appearance."""
    if isinstance(value, torch.Tensor):
        return "tensor", places.setdefault(value.data_ptr(), len(places)), value.dtype
    if hasattr(value, "block_shape"):
        return told(value.base, places), tuple(value.shape), tuple(value.strides), tuple(value.block_shape)
    return value


class Utilities:
    """As much of the driver's utilities as loading a kernel asks for."""

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def load_binary(self, name, binary, shared, device):
        return 1, name, 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module):
        pass


class Driver(TargetDriver):
    utils = Utilities()

    def launcher_cls(self, src, metadata):
        def launch(x, y, z, stream, function, packed_metadata, launch_metadata, enter, leave, *arguments):
            launched.append(((x, y, z), stream, function, arguments))

        return launch


def calls(launch, problem, config, operands):
    """The launches of a first call, through Triton's own launcher, and of a second one, which may not use it."""
    replay, own, found = Replay(launch, problem, config), JITFunction.run, []
    for call in range(2):
        launched.clear()
        if call == 1:
            JITFunction.run = None
        results = replay(*operands)
        JITFunction.run = own
        places = {each.data_ptr(): place for place, each in enumerate(operands) if isinstance(each, torch.Tensor)}
        kept = [(*head, [told(each, places) for each in arguments]) for *head, arguments in launched]
        results = [results] if isinstance(results, torch.Tensor) else results
        found.append((kept, [None if each is None else (each.shape, each.stride(), each.dtype) for each in results]))
    return found


def main() -> None:
    triton.runtime.driver.set_active(Driver(TARGETS["sm_90"]))
    for name, problem in CASES:
        record = variant(name)
        config = record.default(problem, GPU)
        x, y = (torch.empty(shape, dtype=HALF).contiguous(memory_format=problem.memory_format)
                for shape in (problem.x_shape, problem.y_shape))  # fmt: skip
        weight, bias = torch.empty(problem.weight_shape, dtype=HALF), torch.empty(problem.c_out, dtype=HALF)
        wanted = {
            "forward": (x, weight, bias if problem.bias else None),
            "backward_data": (y, weight),
            "backward_weight": (x, y, problem.bias),
        }[record.pass_name]
        made = [(name, record.launch, wanted)]
        if record.joint is not None:
            made.append((f"{name} joint", record.joint, (x, weight, y, problem.bias)))
        for title, launch, operands in made:
            first, second = calls(launch, problem, config, operands)
            print(title, len(first[0]), "same" if first == second else f"differ: {first} {second}")


if __name__ == "__main__":
    main()
