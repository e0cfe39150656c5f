"""The jobs of an inspection, one per launch and target, and their run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import replace
from functools import partial

from tritonconv.autotune.model import pruned_space
from tritonconv.kernels.targets import TARGETS
from tritonconv.kernels.variant import Variant
from tritonconv.lab.bench.workloads import workload
from tritonconv.lab.inspection.compiling import GPU, Job, compile_job, compiling_for, failed
from tritonconv.lab.inspection.records import Record
from tritonconv.lab.inspection.workers import Workers

# One real layer for each class of problems that tiles and code differ by. A variant is compiled for the first of
# them that it serves (see FEW), so the heavy dense ones stand first and the special ones behind.
SAMPLE_LAYERS = {
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
    "short": "monai_unet_spleen_128_32",  # neither gradient alone fills a GPU
    "patches": "pangu_patch_recovery3d",  # 160 columns (phase, output channel), no power of two
}
FEW = 2  # layers per variant unless others are asked for


def job_list(
    records: Sequence[Variant],
    targets: Sequence[str],
    precisions: Sequence[str],
    layouts: Sequence[str],
    classes: Sequence[str] | None = None,
    candidates: bool = False,
) -> tuple[list[Job], dict[str, str]]:
    """The launches, and by variant why it serves none of the layers.

    ``classes`` None: of each variant the first ``FEW`` that it serves. ``candidates``: the pruned space of a problem
    beside the default.
    """
    jobs: list[Job] = []
    left_out = {}
    for record in records:
        before = len(jobs)
        reasons: dict[str, None] = {}
        for target in targets:
            with compiling_for(TARGETS[target]):  # the target decides too whether a variant serves a problem
                served = 0
                for name in SAMPLE_LAYERS if classes is None else classes:
                    layer = workload(SAMPLE_LAYERS[name])
                    every = [Job(record.name, layer, *each, target) for each in itertools.product(precisions, layouts)]
                    refusals = [record.supports(job.problem, GPU) for job in every]
                    reasons |= dict.fromkeys(filter(None, refusals))
                    for job, refusal in zip(every, refusals, strict=True):
                        jobs += _with_more(job, record, candidates) if refusal is None else []
                    served += None in refusals
                    if classes is None and served == FEW:
                        break
        if len(jobs) == before:
            left_out[record.name] = "; ".join(reasons)
    return jobs, left_out


def _with_more(job: Job, record: Variant, candidates: bool) -> list[Job]:
    """With the default config, the one that copies operands first, or all of the pruned space."""
    default, *copies = record.starts(job.problem, GPU)
    configs = pruned_space(record, job.problem, GPU) if candidates else copies
    return [job] + [replace(job, config=dict(config)) for config in configs if config != default]


def run(
    jobs: Sequence[Job],
    processes: int,
    step: Callable[[str], None],
    compiled: Callable[[Job], list[Record]] = compile_job,
) -> list[Record]:
    """Compiles all jobs and returns their records in the order of the jobs; calls ``step`` after each.

    ``compiled``, a function of a module, makes the records of one job. With ``processes`` 1 the jobs run in this
    process; with more, a crash of the compiler becomes a record of the job that caused it.
    """
    by_job: list[list[Record]] = [[] for _ in jobs]
    here = ((index, compiled(job)) for index, job in enumerate(jobs))
    for index, records in here if processes <= 1 or len(jobs) < 2 else _in_workers(jobs, processes, compiled):
        by_job[index] = records
        step(f"{jobs[index].variant} on {jobs[index].layer.name} for {jobs[index].target}")
    return [record for records in by_job for record in records]


def _in_workers(
    jobs: Sequence[Job], processes: int, compiled: Callable[[Job], list[Record]]
) -> Iterator[tuple[int, list[Record]]]:
    """As jobs finish."""
    with Workers(processes) as workers:
        running = {workers.submit(compiled, job, lost=partial(failed, job)): index for index, job in enumerate(jobs)}
        for done in as_completed(running):
            yield running[done], done.result()
