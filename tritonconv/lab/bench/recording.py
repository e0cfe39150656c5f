"""One measurement as one results file: its environment first, its rows, and why it ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter

import torch

from tritonconv.lab.bench.environment import environment
from tritonconv.lab.bench.failures import one_line
from tritonconv.lab.bench.results import Writer
from tritonconv.lab.bench.schema import SCHEMA


@contextlib.contextmanager
def recording(
    folder: Path, prefix: str, device: torch.device, command: Sequence[str], seed: int = 0, **facts: object
) -> Iterator[Writer]:
    """Inside the block the file is open; ``facts`` go with the environment.

    The block may add to the writer's ``end``, the last row. An exception is written there too and raised again. Raises
    ResultsError where the file cannot be written.
    """
    with Writer(folder, prefix) as writer:
        head = {"schema": SCHEMA, "run": writer.run, **environment(device, command, seed), **facts}
        writer.environment, begin = writer.write("environment", head), perf_counter()
        try:
            yield writer
        except KeyboardInterrupt:
            writer.end["reason"] = "interrupted"
            raise
        except Exception as error:
            writer.end |= {"reason": "error", "message": one_line(error)}
            raise
        finally:
            writer.write("end", {**writer.end, "seconds": round(perf_counter() - begin, 3)})
