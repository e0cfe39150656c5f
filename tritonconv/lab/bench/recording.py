"""One measurement as one results file: its environment first, its rows, and why it ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tritonconv.lab.bench.environment import environment
from tritonconv.lab.bench.failures import one_line
from tritonconv.lab.bench.results import SCHEMA, Writer


@contextlib.contextmanager
def recording(
    folder: Path, prefix: str, device: torch.device, command: Sequence[str], scale: str, rule: str
) -> Iterator[Writer]:
    """Inside the block the file is open. The block may set the writer's ``end``, the last row; an exception does.

    Raises ResultsError where the file cannot be written.
    """
    with Writer(folder, prefix) as writer:
        facts = environment(device, ("tritonconv", *command), 0)
        writer.environment = writer.write(
            "environment", {"schema": SCHEMA, "run": writer.run, **facts, "scale": scale, "scale_rule": rule}
        )
        try:
            yield writer
        except KeyboardInterrupt:
            writer.end = {"reason": "interrupted"}
            raise
        except Exception as error:
            writer.end = {"reason": "error", "message": one_line(error)}
            raise
        finally:
            writer.write("end", writer.end)
