"""How float32 is multiplied, as torch's switches say. Each call reads them here; no call sets them.

``torch.backends.cudnn.conv.fp32_precision`` is that of convolutions; the older ``allow_tf32`` raises where a program
has set the newer switches.
"""

from __future__ import annotations

from typing import Any

import torch

from tritonconv.private import fp32_precision

TF32, IEEE = "tf32", "ieee"
# The dtype of the tensors by the precision of their products, which float32 alone has a choice of.
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, TF32: torch.float32, IEEE: torch.float32}

_convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]


def float32_precision() -> str:
    """``tf32`` or ``ieee``: the precision of float32 products in convolutions now."""
    return TF32 if fp32_precision("cuda", "conv") == TF32 else IEEE


def switches() -> dict[str, str]:
    """Both switches as they stand, for the header of a results file."""
    return {"cudnn_conv_fp32": _convolutions.fp32_precision, "matmul_fp32": torch.backends.cuda.matmul.fp32_precision}
