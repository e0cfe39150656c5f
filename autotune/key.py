"""The key of a stored choice: the facts that decide which variant is fastest, without the exact sizes.

One table belongs to one device. Sizes enter as the class of the crop and as the power of two of the number of input
voxels, so a new image size finds the choice of its bucket and nothing is tuned again. The input gradient does not know
of a bias, and a layer with one shares its key with a layer without. A forward with an epilogue has a key of its own,
which ends with the epilogue's words.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tritonconv.device import cpu_name
from tritonconv.errors import ArgumentError
from tritonconv.problem import PASSES, Axis, Problem, Triple


@dataclass(frozen=True)
class Key:
    """``crop`` has a letter per axis: ``0`` nothing, ``c`` cropped, ``a`` appended in all; ``c_in``, ``c_out`` are
    per group; ``bucket`` is floor(log2(n * d * h * w)) of the input, -1 where it is empty."""

    pass_name: str
    dtype: str
    layout: str
    kernel: Triple
    stride: Triple
    dilation: Triple
    crop: str
    c_in: int
    c_out: int
    groups: int
    bias: bool
    bucket: int
    epilogue: str = ""

    @classmethod
    def of(cls, problem: Problem, pass_name: str) -> Key:
        """Raises ArgumentError for an unknown pass."""
        if pass_name not in PASSES:
            raise ArgumentError(f"Key: pass_name expects one of {', '.join(PASSES)}, got {pass_name!r}")
        voxels = problem.n * problem.size[0] * problem.size[1] * problem.size[2]
        return cls(
            pass_name,
            str(problem.dtype).removeprefix("torch."),
            problem.layout,
            problem.kernel,
            problem.stride,
            problem.dilation,
            "".join(_crop_class(axis) for axis in problem.axes),
            problem.c_in // problem.groups,
            problem.c_out // problem.groups,
            problem.groups,
            problem.bias and pass_name != "backward_data",
            voxels.bit_length() - 1,
            str(problem.epilogue.kind) if problem.epilogue is not None and pass_name == "forward" else "",
        )

    def neighbours(self) -> tuple[Key, Key]:
        """The keys of half and of twice as many voxels."""
        return replace(self, bucket=self.bucket - 1), replace(self, bucket=self.bucket + 1)

    def other_bias(self) -> Key:
        """The key of the same layer without its bias, or with one."""
        return self if self.pass_name == "backward_data" else replace(self, bias=not self.bias)

    def in_bfloat16(self) -> Key:
        return replace(self, dtype="bfloat16")

    def __str__(self) -> str:
        parts = [self.pass_name, self.dtype, self.layout]
        triples = (("k", self.kernel), ("s", self.stride), ("r", self.dilation))
        parts += [letter + "x".join(map(str, values)) for letter, values in triples]
        parts += [f"crop-{self.crop}", f"{self.c_in}->{self.c_out}", f"g{self.groups}"]
        parts += ["bias" if self.bias else "no-bias", f"2^{self.bucket}"]
        return " ".join(parts) + (f" then {self.epilogue}" if self.epilogue else "")


def _crop_class(axis: Axis) -> str:
    if axis.crop == 0 and axis.back_crop == 0:
        return "0"
    return "a" if axis.back_crop < 0 and axis.crop == 0 else "c"


def device_name(device: torch.device) -> str:
    """The device that a table belongs to: the GPU's name, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"
