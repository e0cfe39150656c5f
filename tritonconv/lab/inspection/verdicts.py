"""Verdicts on the machine code of all configs that dispatch and tuner can choose, in files of the project.

A file is of one Triton version and :data:`TARGET`; in it each variant has the revision of its device code, and for each
class of problems that its code is specialised by (layout, kernel = stride or not, products) the configs of one layer's
pruned space: safe, unsafe (a register is written while a product may read it) or not compiled.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tritonconv.autotune.model import pruned_space, work_of
from tritonconv.autotune.sources import revision
from tritonconv.errors import ResultsError
from tritonconv.kernels.targets import TARGETS, Target
from tritonconv.kernels.variant import Config, Variant
from tritonconv.lab.bench.workloads import workload
from tritonconv.lab.inspection.compiling import GPU, Job, compile_job, compiling_for, products_in
from tritonconv.lab.inspection.jobs import SAMPLE_LAYERS
from tritonconv.lab.inspection.machine_code import early_write
from tritonconv.lab.inspection.records import Record
from tritonconv.lab.inspection.shallow import shallow
from tritonconv.problem import LAYOUTS

TARGET = "sm_90"  # alone has products that read registers while the program goes on
PRODUCTS = ("bfloat16", "tf32")
SAFE, UNSAFE, BROKEN = "safe", "unsafe", "not compiled"
SEED = 0
ORDERS = ("WEIGHT", "GROUP_M", "SPLITS", "PHASE_INNER", "SKIP")

Verdicts = dict[str, dict[str, Any]]  # by variant: revision, and classes by name


def jobs_of(record: Variant, precisions: Iterable[str] = PRODUCTS) -> list[Job]:
    """The pruned spaces of the first layer of each class that the variant serves; tf32 of one class alone."""
    jobs: dict[tuple, Job] = {}
    with compiling_for(TARGETS[TARGET]):
        for precision in precisions:
            for layer in SAMPLE_LAYERS.values():
                for layout in LAYOUTS:
                    job = Job(record.name, workload(layer), precision, layout, TARGET)
                    special = precision, *((layout, job.problem.tiles_exactly) if precision == PRODUCTS[0] else ())
                    if special not in jobs and record.supports(job.problem, GPU) is None:
                        jobs[special] = job
        # Here too: what fits decides the space, and the target decides what fits.
        return [replace(job, config=dict(config)) for job in jobs.values() for config in _configs(record, job)]


def _configs(record: Variant, job: Job) -> tuple[Config, ...]:
    """One of each class of the pruned space, for kernels that multiply matrices; none for the others."""
    with products_in(job.precision):
        configs = pruned_space(record, job.problem, GPU)
    if not work_of(record, job.problem, configs[0]).matrix:
        return ()
    return tuple({class_of(config): config for config in reversed(configs)}.values())


def class_of(config: Config) -> tuple[tuple[str, int], ...]:
    """The config without the orders of tiles and weights: configs of one class have the same products."""
    return tuple((key, value) for key, value in config.items() if key not in ORDERS)


def sample(records: Sequence[Variant], known: Verdicts, count: int) -> list[Job]:
    """``count`` jobs of each variant whose revision has no verdict, and as many of all others; the same each time."""
    draw = random.Random(SEED)
    new = [record for record in records if known.get(record.name, {}).get("revision") != revision(record)]
    others = [job for record in records if record not in new for job in jobs_of(record)]
    return [job for jobs in (others, *map(jobs_of, new)) for job in draw.sample(jobs, min(count, len(jobs)))]


def check(job: Job) -> list[Record]:
    """The records of a job, as far as a verdict asks."""
    with shallow():
        return compile_job(job, measure=_early_write)


def _early_write(name: str, kernel: Any, target: Target, seconds: dict[str, float]) -> dict[str, Any]:
    return {"kernel": name, "early_write": early_write(kernel)}


def verdicts(records: Iterable[Record], revisions: Mapping[str, str]) -> Verdicts:
    """The verdicts of compiled jobs; a launch of several kernels has the worst of theirs."""
    launches: dict[tuple, list[Record]] = {}
    for record in records:
        launches.setdefault((record.variant, class_name(record), tuple(record.config.items())), []).append(record)
    by_variant: Verdicts = {}
    for (name, kind, config), kernels in launches.items():
        of_variant = by_variant.setdefault(name, {"revision": revisions[name], "classes": {}})
        of_class = of_variant["classes"].setdefault(kind, {"keys": [key for key, _ in config]})
        of_class.setdefault(_worst(kernels), []).append([value for _, value in config])
    return by_variant


def class_name(record: Record) -> str:
    return f"{record.layer} {record.precision} {record.layout}"


def _worst(kernels: Sequence[Record]) -> str:
    if any(record.error is not None for record in kernels):
        return BROKEN
    return UNSAFE if any(record.early_write for record in kernels) else SAFE


def configs_of(by_variant: Verdicts, verdict: str) -> list[tuple[str, str, Config]]:
    """(variant, class, config) of all with this verdict."""
    return [
        (name, kind, dict(zip(of_class["keys"], values, strict=True)))
        for name, of_variant in by_variant.items()
        for kind, of_class in of_variant["classes"].items()
        for values in of_class.get(verdict, ())
    ]


def path_of(folder: Path, triton: str) -> Path:
    return folder / f"{triton}.json"


def read(path: Path) -> Verdicts:
    """The verdicts of a file; none where there is none. Raises ResultsError for a file that holds something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return dict(data["variants"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path}: not a file of verdicts ({error!r})") from None


def write(path: Path, triton: str, by_variant: Verdicts) -> None:
    """Raises ResultsError where the file cannot be written."""
    head = json.dumps({"triton": triton, "target": TARGET})
    lines = ",\n".join(f"{json.dumps(name)}: {_lines(of_variant)}" for name, of_variant in sorted(by_variant.items()))
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'{head[:-1]}, "variants": {{\n{lines}\n}}}}\n', encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"cannot write {path}: {error}") from None


def _lines(of_variant: Mapping[str, Any]) -> str:
    """One line a class, so that a change of one shows as one."""
    classes = ",\n".join(f"  {json.dumps(kind)}: {json.dumps(each)}" for kind, each in of_variant["classes"].items())
    return f'{{"revision": {json.dumps(of_variant["revision"])}, "classes": {{\n{classes}\n}}}}'
