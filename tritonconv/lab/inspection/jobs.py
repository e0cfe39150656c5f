"""What is compiled, one job per launch and target, and the processes that do it."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from tritonconv.autotune.model import pruned
from tritonconv.kernels.variant import Variant
from tritonconv.lab.bench.workloads import Workload, workload
from tritonconv.lab.inspection.compiling import GPU, Job, compile_job, compiling_for
from tritonconv.lab.inspection.records import Record
from tritonconv.lab.inspection.targets import TARGETS

# One real layer for each class of problems that tiles and code differ by. A variant is compiled for the first of
# them that it serves (see FEW), so the heavy dense ones stand first and the special ones behind.
CLASSES = {
    "k4s2": "3dgan_128_64",  # compute-bound
    "k3s2": "psmnet_train_64_32",  # phases of 1 to 8 taps
    "k2s2": "nnunet_resenc_160x192_up4",  # kernel = stride, memory-bound
    "k1s2": "mednext_res_k1s2_64_32",  # outputs without a tap
    "k1x2x2": "anisotropic_unetpp_128_64",
    "depthwise_k3": "mednext_k3_dw_128",
    "depthwise_k5": "mednext_k5_dw_64",
    "grouped": "kernelbench_l1_72",
    "few_in": "kernelbench_l2_50",  # 3 input channels
    "few_out": "vqvae3d_256_1",  # 1 output channel
    "by_8_and_4": "foundationstereo_56_28",  # channels, and so strides, that 16 does not divide
}
FEW = 2  # layers per variant unless others are asked for


@dataclass(frozen=True)
class Plan:
    """The jobs, and what is left out: (variant, why it serves none of the layers)."""

    jobs: tuple[Job, ...]
    left_out: tuple[tuple[str, str], ...]


def plan(
    records: Sequence[Variant],
    targets: Sequence[str],
    precisions: Sequence[str],
    layouts: Sequence[str],
    classes: Sequence[str] | None = None,
    candidates: bool = False,
) -> Plan:
    """Every launch that is asked for. ``classes`` None: of each variant the first ``FEW`` that it serves.

    ``candidates``: the pruned space of a problem beside the default.
    """
    jobs: list[Job] = []
    left_out = []
    for record in records:
        before = len(jobs)
        reasons: dict[str, None] = {}
        for name in targets:
            with compiling_for(TARGETS[name]):  # what a variant serves may depend on the target
                served = 0
                for each in CLASSES if classes is None else classes:
                    found = _of_layer(record, workload(CLASSES[each]), name, precisions, layouts, reasons)
                    for job in found:
                        jobs += _with_more(job, record, candidates)
                    served += bool(found)
                    if classes is None and served == FEW:
                        break
        if len(jobs) == before:
            left_out.append((record.name, "; ".join(reasons)))
    return Plan(tuple(jobs), tuple(left_out))


def _of_layer(
    record: Variant,
    layer: Workload,
    target: str,
    precisions: Sequence[str],
    layouts: Sequence[str],
    reasons: dict[str, None],
) -> list[Job]:
    """The jobs of one layer that the variant serves; why it does not serve the others is added to ``reasons``."""
    found = []
    for precision, layout in itertools.product(precisions, layouts):
        job = Job(record.name, layer, precision, layout, target)
        why_not = record.supports(job.problem, GPU)
        if why_not is None:
            found.append(job)
        else:
            reasons[why_not] = None
    return found


def _with_more(job: Job, record: Variant, candidates: bool) -> list[Job]:
    """With the default config, the one that copies operands first, or all of the pruned space."""
    default, *copies = record.starts(job.problem, GPU)
    others = [each for each in pruned(record, job.problem, GPU) if each != default] if candidates else copies
    return [job] + [Job(job.variant, job.layer, job.precision, job.layout, job.target, dict(each)) for each in others]


Step = Callable[[str], None]
Compiled = Callable[[Job], list[Record]]


def run(jobs: Sequence[Job], processes: int, step: Step, compiled: Compiled = compile_job) -> list[Record]:
    """Compiles all jobs and returns their records in the order of the jobs; ``step`` is told of each that is done.

    ``compiled``, a function of a module, makes the records of one job. With one process it is this one; with more a
    crash of the compiler is a record of the job that caused it.
    """
    alone = processes <= 1 or len(jobs) < 2
    finished = _here(jobs, compiled) if alone else _in_processes(jobs, processes, compiled)
    by_index: dict[int, list[Record]] = {}
    for index, records in finished:
        by_index[index] = records
        step(f"{jobs[index].variant} on {jobs[index].layer.name} for {jobs[index].target}")
    return [record for index in range(len(jobs)) for record in by_index[index]]


def _here(jobs: Sequence[Job], compiled: Compiled) -> Iterator[tuple[int, list[Record]]]:
    for index, job in enumerate(jobs):
        yield index, compiled(job)


def _in_processes(jobs: Sequence[Job], processes: int, compiled: Compiled) -> Iterator[tuple[int, list[Record]]]:
    """As jobs finish. When the compiler takes its process down, the jobs that were on their way go one by one."""
    waiting = list(reversed(range(len(jobs))))
    suspects: list[int] = []
    while waiting or suspects:
        # Alone in a pool of one, a job that breaks it is the culprit.
        queue, width = ([suspects.pop()], 1) if suspects else (waiting, processes)
        running: dict[Future, int] = {}
        with _pool(width) as pool:
            try:
                while queue or running:
                    while queue and len(running) < width:
                        index = queue.pop()
                        running[pool.submit(compiled, jobs[index])] = index
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        records = future.result()
                        yield running.pop(future), records
            except BrokenProcessPool:
                if width == 1:
                    yield next(iter(running.values())), [_crashed(jobs[next(iter(running.values()))])]
                else:
                    suspects = sorted(running.values(), reverse=True)


def _pool(processes: int) -> ProcessPoolExecutor:
    # A forked child would share the threads' locks of torch and LLVM.
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))


def _crashed(job: Job) -> Record:
    problem = job.problem
    return Record(
        variant=job.variant,
        layer=job.layer.name,
        problem=str(problem),
        dtype=str(problem.dtype).removeprefix("torch."),
        precision=job.precision,
        layout=job.layout,
        target=job.target,
        config=dict(job.config or {}),
        default=job.config is None,
        error="the compiler ended its process",
    )
