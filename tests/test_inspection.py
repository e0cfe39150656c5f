"""``tritonconv inspect``: real compilations without a GPU, what counts as a fault, and the files it writes.

The compilations run in a process of their own, without the interpreter.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tritonconv.autotune import model
from tritonconv.errors import ResultsError
from tritonconv.kernels.registry import have_triton, variants
from tritonconv.kernels.targets import TARGETS
from tritonconv.lab import cli, markdown
from tritonconv.lab.bench.workloads import workload
from tritonconv.lab.inspection import compiling, jobs, records, tables
from tritonconv.lab.inspection.records import Inspection, Record, faults, remarks

pytestmark = pytest.mark.xdist_group("inspection")  # one process compiles for all

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--layers", "k3s2", "--dtype", "bfloat16", "--layout", "ndhwc")
needs_triton = pytest.mark.skipif(not have_triton(), reason="Triton is not installed")

GOOD = Record(
    variant="forward_phases",
    layer="psmnet_train_64_32",
    problem="n3 64->32 24x32x64 k3 s2 crop 1/0 bfloat16 ndhwc",
    dtype="bfloat16",
    precision="bfloat16",
    layout="ndhwc",
    target="sm_90",
    config={"BLOCK_M": 128, "num_warps": 4},
    default=True,
    kernel="forward_phases_kernel",
    seconds=1.5,
    dot="matrix",
    warps=4,
    registers=125,
    shared_bytes=61440,
    blocks=3,
    occupancy=0.1875,
    instructions=1600,
    matrix={"HGMMA": 8},
    async_copies=30,
    stores={"16": 12},
    loop_instructions=191,
    loop_loads={"registers 2": 2, "async 16": 24},
    products_in_flight=0,
)


def changed(**fields) -> Record:
    return dataclasses.replace(GOOD, **fields)


def inspection(*found: Record, triton: str = "3.9.0") -> Inspection:
    return Inspection(triton, "2.13.0+cpu", "tritonconv inspect", found or (GOOD,))


def compiling_process(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        timeout=300,
        check=False,
    )


def read(path: Path) -> Inspection:
    data = json.loads(path.read_text())
    assert data.pop("schema") == records.SCHEMA
    return Inspection(**{**data, "records": tuple(Record(**row) for row in data["records"])})


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], Inspection, str]:
    """forward_phases on one layer for four targets: the process, its JSON and its Markdown."""
    folder, (begin, end) = tmp_path_factory.mktemp("inspect"), markdown.markers("inspect")
    (folder / "R.md").write_text(f"before\n{begin}\n{end}\nafter\n")
    command = ["-m", "tritonconv", "inspect", "forward_phases", "--target", "sm_80,sm_90,sm_100,gfx942", *SMALL]
    files = ["--json", "run.json", "--markdown", "R.md"]
    done = compiling_process(folder, *command, *files, "--jobs", "1", "--quiet")
    assert done.returncode in (0, 1), done.stderr
    return done, read(folder / "run.json"), (folder / "R.md").read_text()


@needs_triton
def test_a_default_config_compiles_for_every_target_with_its_matrix_instructions(small_run):
    done, run, _ = small_run
    assert done.returncode == 0, done.stdout
    assert done.stderr == ""
    assert "8 kernels of 4 launches of 1 variant compiled" in done.stdout
    assert " 0 faults in default configs, 0 warnings" in done.stdout
    by_target = {record.target: record for record in run.records}
    assert list(by_target) == ["sm_80", "sm_90", "sm_100", "gfx942"]
    for name, instruction in (("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "MFMA")):
        record = by_target[name]
        assert list(record.matrix) == [instruction]
        assert record.matrix[instruction] > 0
        assert record.kernel == "forward_phases_kernel"
        assert record.dot == "matrix"
        assert record.default and record.error is None
        assert record.seconds > 0
        assert 0 < record.registers <= 255
        assert 0 < record.shared_bytes <= TARGETS[name].shared_per_block
        assert record.spill_load_bytes == record.spill_store_bytes == record.local_accesses == record.stack_bytes == 0
        assert record.blocks >= 1
        assert record.occupancy == pytest.approx(record.blocks * record.warps / TARGETS[name].warps, abs=1e-4)
        assert record.instructions > 100
    assert by_target["sm_90"].async_copies > 0
    assert by_target["sm_100"].tensor_memory_columns > 0


@needs_triton
def test_the_markdown_of_a_run_has_a_row_per_target(small_run):
    _, run, text = small_run
    end = markdown.markers("inspect")[1]
    assert text.startswith("before\n") and text.endswith(f"{end}\nafter\n")
    assert f"### Triton {run.triton}" in text
    rows = [line for line in text.splitlines() if line.startswith("| forward_phases | k3s2 bfloat16 ndhwc |")]
    assert [row.split("|")[3].strip() for row in rows] == ["sm_80", "sm_90", "sm_100", "gfx942"]


BAD_DEFAULT = """
import dataclasses, sys
from tritonconv.lab import cli
from tritonconv.kernels import registry

records = registry._records()
good = registry.variant("forward_phases")
bad = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 4}
records["forward_phases"] = dataclasses.replace(good, default=lambda *args: {**good.default(*args), **bad})
sys.exit(cli.main(["inspect", "forward_phases", "--target", "sm_86", "--jobs", "1", "--quiet", *sys.argv[1:]]))
"""


@needs_triton
def test_a_bad_default_makes_the_exit_code_1_and_is_named(tmp_path):
    done = compiling_process(tmp_path, "-c", BAD_DEFAULT, *SMALL)
    assert done.returncode == 1, done.stderr
    assert "fault: forward_phases_kernel for sm_86: asks for " in done.stdout
    assert "bytes of shared memory, sm_86 has 101376 [k3s2 bfloat16 ndhwc]" in done.stdout
    assert " 0 faults" not in done.stdout


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"error": "RuntimeError: no\nat length"}, "does not compile: RuntimeError: no"),
        ({"spill_store_bytes": 8, "local_accesses": 2}, "spills: 8 bytes stored, 0 loaded by 2"),
        ({"stack_bytes": 16}, "stack of 16 bytes"),
        ({"shared_bytes": 232449}, "232449 bytes of shared memory, sm_90 has 232448"),
        ({"tensor_memory_columns": 1024}, "1024 columns of tensor memory"),
        ({"blocks": 0, "warps": 32}, "32 warps with 125 registers do not fit"),
        ({"matrix": {}}, "no matrix instruction (HGMMA expected)"),
        ({"early_write": "LDS R8, [R2]"}, "product in flight may read (triton #9433): LDS R8, [R2]"),
    ],
)
def test_what_is_a_fault(fields, words):
    (fault,) = faults(changed(**fields))
    assert words in fault
    run = inspection(changed(**fields), changed(**fields, default=False))
    assert len(run.failures()) == len(run.warnings()) == 1  # a candidate only warns
    text = tables.verdict(run)
    assert f"fault: forward_phases_kernel for sm_90: {fault} [k3s2 bfloat16 ndhwc]" in text
    assert f"warning: forward_phases_kernel for sm_90: {fault} [k3s2 bfloat16 ndhwc (M128 warps=4)]" in text


def test_what_is_none():
    for record in (GOOD, changed(dot="", matrix={}), changed(dot="fma", matrix={})):
        assert faults(record) == remarks(record) == ()
    old = changed(matrix={"HMMA": 4})
    assert faults(old) == ()
    assert remarks(old) == ("its matrix instruction is HMMA, sm_90 has HGMMA",)


def test_how_many_blocks_are_resident():
    def resident(name, *args):
        target = TARGETS[name]
        blocks = target.resident_blocks(*args)
        return blocks, target.occupancy(blocks, args[0])

    assert resident("sm_80", 8, 64, 0) == (4, 0.5)  # by registers
    assert resident("sm_90", 4, 32, 60 * 1024) == (3, 0.1875)  # by shared memory: 61 KiB each of 228
    assert resident("sm_86", 1, 32, 0) == (16, 16 / 48)  # by blocks
    assert resident("sm_100", 4, 32, 0, 256) == (2, 0.125)  # by tensor memory
    assert resident("sm_90", 4, 255, 0) == (2, 0.125)
    assert resident("gfx942", 4, 128, 32 * 1024) == (2, 0.25)
    assert resident("sm_89", 4, 32, 99 * 1024 + 1) == (0, 0.0)


def test_the_json_file_holds_every_field(tmp_path):
    run = inspection(GOOD, changed(error="no", matrix={}, seconds=None))
    path = tmp_path / "run.json"
    records.write(run, path)
    assert read(path) == run
    with pytest.raises(ResultsError, match="cannot write"):
        records.write(run, tmp_path)


def test_each_triton_version_has_its_own_section(tmp_path):
    path, (begin, end) = tmp_path / "R.md", markdown.markers("inspect")
    path.write_text(f"head\n\n{begin}\nold text\n{end}\n\n### Triton stays\n")
    tables.update(inspection(triton="3.9.0"), path)
    tables.update(inspection(triton="3.10.0"), path)
    tables.update(inspection(triton="3.6.0"), path)
    text = path.read_text()
    assert text.startswith("head\n") and text.endswith("\n### Triton stays\n")
    assert "old text" not in text
    assert [line for line in text.splitlines() if line.startswith("### ")] == [
        "### Triton 3.10.0",
        "### Triton 3.9.0",
        "### Triton 3.6.0",
        "### Triton stays",
    ]
    tables.update(inspection(changed(registers=77), triton="3.9.0"), path)
    again = path.read_text()
    assert again.count("| 77 |") == 2  # the row's own, and the most of all
    assert again.replace("| 77 |", "| 125 |") == text


def test_a_row_stands_for_the_first_layer_and_counts_all():
    reduction = changed(kernel="sum_kernel", dot="", matrix={}, instructions=9000)
    other = changed(layout="ncdhw", registers=200, local_accesses=1)
    row = tables.section(inspection(other, reduction, GOOD)).splitlines()[-1]
    assert "| HGMMA 8 | 125 | 0 | 60 | 3 | 19% | 0 | 30 | 0 | 191 | 24 x async 16, 2 x registers 2 | 0 |" in row
    assert "| 0 | 12 x 16 | 3 | 200 | 60 | 1 |" in row


def test_the_readme_of_the_kernels_has_the_markers():
    tables.check(ROOT / "kernels" / "README.md")


def test_the_table_shows_every_record(capsys):
    tables.show(inspection(GOOD, changed(target="sm_80", matrix={"HMMA": 4}), changed(target="gfx942", error="no")))
    out = capsys.readouterr().out
    assert "HGMMA 8" in out and "HMMA 4" in out and "does not compile" in out
    assert "k3s2  psmnet_train_64_32  n3 64->32 24x32x64 k3 s2 crop 1/0" in out


@needs_triton
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["forward_fast"], ["VARIANT", "'forward_fast' is unknown", "forward_phases"]),
        (["forward_torch_conv"], ["'forward_torch_conv' is computed by torch", "forward_phases"]),
        (["--target", "sm_91"], ["--target", "'sm_91'", "sm_90, sm_100"]),
        (["--dtype", "float32"], ["--dtype", "'float32'", "tf32, ieee"]),
        (["--layers", "k9"], ["--layers", "'k9'", "depthwise_k3"]),
        (["--jobs", "0"], ["--jobs", "'0'", "1 to 1024"]),
        (["--all"], ["--all", "--accesses"]),
        (["--accesses", "--verdicts", "here"], ["--accesses", "--verdicts", "not allowed"]),
        (["--configs", "some"], ["--configs", "'some'", "default", "all"]),
        (["--markdown", "none.md"], ["--markdown", "none.md"]),
        (["--markdown", "LICENSE"], ["--markdown", "LICENSE", markdown.markers("inspect")[0]]),
        (["--json", "none/run.json"], ["--json", "none"]),
    ],
    ids=" ".join,
)
def test_bad_usage_is_2_and_says_what_there_is(capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(ROOT)
    assert cli.main(["inspect", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert all(word in err for word in words), err


@needs_triton
def test_the_interpreter_compiles_nothing_and_says_so(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["inspect"]) == 2
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err


@needs_triton
def test_the_plan_takes_the_first_layers_that_a_variant_serves():
    triton = [record for record in variants() if record.backend == "triton"]
    arguments = (["sm_80", "sm_90"], ["bfloat16"], ["ndhwc"])
    made, left_out = jobs.job_list(triton, *arguments)
    (phases,) = [record for record in triton if record.name == "forward_phases"]
    few = [job for job in made if job.variant == "forward_phases"]
    assert [(job.target, job.layer.name) for job in few] == [
        (name, jobs.SAMPLE_LAYERS[layer]) for name in ("sm_80", "sm_90") for layer in ("k4s2", "k3s2")
    ]
    assert all(job.config is None for job in made)
    assert {job.variant for job in made} | set(left_out) == {each.name for each in triton}
    whole, _ = jobs.job_list([phases], ["sm_80"], ["bfloat16"], ["ndhwc"], classes=["k2s2"], candidates=True)
    assert len(whole) == len(model.pruned_space(phases, whole[0].problem, compiling.GPU)) == model.MOST_CONFIGS
    assert [job.config is None for job in whole] == [True] + [False] * (len(whole) - 1)


def answers_or_dies(job: jobs.Job) -> list[Record]:
    """Stands in for the compiler in another process; a target's crash takes the process down."""
    if job.target == "sm_86":
        os.abort()
    return [changed(target=job.target)]


def test_a_crash_of_the_compiler_is_a_record_of_its_job():
    layer = workload("psmnet_train_64_32")
    asked = [jobs.Job("forward_phases", layer, "bfloat16", "ndhwc", name) for name in ("sm_80", "sm_86", "sm_90")]
    steps: list[str] = []
    found = jobs.run(asked, 2, steps.append, answers_or_dies)
    assert [record.target for record in found] == ["sm_80", "sm_86", "sm_90"]
    assert [record.error for record in found] == [None, "the compiler ended its process", None]
    assert len(steps) == 3
