"""Hardware counters: what is asked of ncu, what is read from its table, which cells are looked into first. CPU only.

The tests beside a GPU are in test_stand_in_gpu.py.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.test_results import ENVIRONMENT, result
from tritonconv.errors import ResultsError
from tritonconv.lab import cli, flags
from tritonconv.lab.bench import counters, results
from tritonconv.lab.bench.results import Run, Writer
from tritonconv.lab.bench.workloads import workload
from tritonconv.lab.profiling import ncu
from tritonconv.lab.profiling.cells import ProfiledCell, combinations, worst_of

HEAD = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name","Rule Type","Rule Description"'
)


def line(launch: int, kernel: str, section: str, name: str, unit: str, value: str) -> str:
    return f'"{launch}","1","python","host","{kernel}","1","7","(128, 1, 1)","(66, 1, 1)","0","9.0","{section}",' + (
        f'"{name}","{unit}","{value}","","",""'
    )


SPEED, MEMORY = "GPU Speed Of Light Throughput", "Memory Workload Analysis"
TABLE = "\n".join(
    [
        "==PROF== Connected to process 1 (/usr/bin/python)",
        '==PROF== Profiling "forward_shuffle_kernel": 0%....50%....100% - 8 passes',
        HEAD,
        line(0, "pack", SPEED, "Duration", "ns", "2,048"),
        line(0, "pack", SPEED, "DRAM Throughput", "%", "12.5"),
        line(1, "f<int, 3>(T1, T2)", SPEED, "Duration", "ns", "1,500,000"),
        line(1, "f<int, 3>(T1, T2)", SPEED, "Memory Throughput", "%", "81.25"),
        line(1, "f<int, 3>(T1, T2)", MEMORY, "Memory Throughput", "byte/s", "4,000,000,000,000"),
        line(1, "f<int, 3>(T1, T2)", "Launch Statistics", "Function Cache Configuration", "", "CachePreferNone"),
        line(1, "f<int, 3>(T1, T2)", "Launch Statistics", "Registers Per Thread", "register/thread", "102"),
        '"1","1","python","host","f<int, 3>(T1, T2)","1","7","","","0","9.0","","","","","CPIStall","INF","Long, said"',
    ]
)


def test_the_table_is_read_launch_by_launch_and_what_is_no_number_is_passed_over():
    pack, kernel = ncu.read(TABLE)
    assert (pack.kernel, pack.duration_us, pack.counters["DRAM Throughput [%]"]) == ("pack", 2.048, 12.5)
    assert kernel.kernel == "f<int, 3>(T1, T2)" and kernel.duration_us == 1500.0
    assert set(kernel.counters) == {
        "Duration [ns]", "Memory Throughput [%]", "Memory Throughput [byte/s]", "Registers Per Thread [register/thread]"
    }  # fmt: skip
    assert counters.moved_bytes(kernel.counters, kernel.duration_us) == pytest.approx(6e9)
    assert counters.moved_bytes(pack.counters, pack.duration_us) is None
    assert list(ncu.read("==PROF== Disconnected")) == []


@pytest.mark.parametrize("unit", ["nsecond", "us", "msecond", "s"])
def test_a_duration_is_in_the_unit_that_ncu_says(unit):
    factor = {"nsecond": 1e-3, "us": 1.0, "msecond": 1e3, "s": 1e6}[unit]
    assert ncu.KernelCounters("k", {f"Duration [{unit}]": 3.0}).duration_us == pytest.approx(3 * factor)
    with pytest.raises(ResultsError, match="no duration of k"):
        _ = ncu.KernelCounters("k", {"Cycles []": 3.0}).duration_us


def test_the_lines_show_the_columns_and_a_dash_for_what_was_not_counted():
    rows = [
        {"kernel": each.kernel, "duration_us": each.duration_us, "counters": each.counters} for each in ncu.read(TABLE)
    ]
    head, pack, kernel = (text.split("  ") for text in counters.lines(rows))
    assert [each.strip() for each in head if each.strip()][:4] == ["kernel", "us", "MB", "SM %"]
    assert [each.strip() for each in pack if each.strip()][:3] == ["pack", "2.048", "-"]
    assert [each.strip() for each in kernel if each.strip()][:3] == ["f<int, 3>(T1, T2)", "1500", "6000"]


def tool(folder: Path, script: str) -> str:
    path = folder / "ncu"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


LOG = 'while [ "$1" != --log-file ]; do shift; done; log="$2"; shift 2'


def test_what_is_asked_of_the_tool(tmp_path):
    (tmp_path / "table").write_text(TABLE)
    asked = tmp_path / "asked"
    script = f'echo "$@" > {asked}; {LOG}; cp {tmp_path / "table"} "$log"; "$@"'
    found = ncu.count(tool(tmp_path, script), ["touch", str(tmp_path / "ran")], seconds=60)
    assert [each.kernel for each in found] == ["pack", "f<int, 3>(T1, T2)"] and (tmp_path / "ran").exists()
    text = asked.read_text()
    for option in ("--clock-control none", "--profile-from-start off", "--csv --page details", "--print-units base"):
        assert option in text
    assert all(f"--section {name}" in text for name in ncu.SECTIONS)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (f'{LOG}; echo "==ERROR== ERR_NVGPUCTRPERM - no permission" > "$log"; exit 1', "1: ==ERROR== ERR_NV"),
        (f'{LOG}; echo "==PROF== Connected" > "$log"; echo Traceback; echo "ValueError: a size"; exit 3', "ValueError"),
        ("exit 0", "it counted no kernel"),
    ],
)
def test_why_nothing_was_counted(tmp_path, script, said):
    with pytest.raises(ResultsError, match=f"ncu: exit code .*{said}"):
        ncu.count(tool(tmp_path, script), ["true"], seconds=60)


def test_a_tool_that_hangs_ends_with_its_command(tmp_path):
    begin = time.perf_counter()
    with pytest.raises(ResultsError, match="not done after 0 s"):
        ncu.count(tool(tmp_path, "sleep 600 & sleep 600"), ["true"], seconds=0.3)
    assert time.perf_counter() - begin < 120  # the command, which holds the pipe, has ended too
    with pytest.raises(ResultsError, match=r"cannot run .*absent"):
        ncu.count(str(tmp_path / "absent"), ["true"], seconds=1)


# ------------------------------------------------------------------ which cells


def sizes(name: str) -> dict:
    problem = workload(name).problem(scale="full")
    return {"groups": problem.groups, "c_in": problem.c_in, "c_out": problem.c_out, "kernel": problem.kernel,
            "stride": problem.stride}  # fmt: skip


def rows_of(writer, name, ours_ms, torch_ms, roof, chosen="forward_shuffle", layout="ndhwc", pass_name="forward"):
    for variant, ms in (("torch", torch_ms), ("tritonconv", ours_ms)):
        made = {"forward": chosen} if pass_name == "forward" else dict.fromkeys(("forward", "backward_data"), chosen)
        more = {"median_ms": ms, "percent_of_roof": roof, "problem": sizes(name), "pass": pass_name,
                "chosen": made if variant == "tritonconv" else {}}  # fmt: skip
        writer.write("result", {**result(name, variant, layout=layout), **more})


@pytest.fixture
def measured(tmp_path) -> Run:
    """Of k = s: two behind torch, two ahead; of depthwise: torch had to be chosen, and the tuner timed ours."""
    with Writer(tmp_path) as writer:
        writer.write("environment", {**ENVIRONMENT, "scale": "full"})
        rows_of(writer, "segresnet_deconv_up0", 2.0, 1.0, 30.0)
        rows_of(writer, "vnet_up1", 2.0, 1.5, 20.0)
        rows_of(writer, "segresnet_deconv_up2", 1.0, 2.0, 10.0)
        rows_of(writer, "nnunet_resenc_160x192_up4", 1.0, 2.0, 90.0)
        rows_of(writer, "mednext_k3_dw_128", 1.0, 1.0, 50.0, chosen="forward_torch_native", layout="ncdhw")
        where = {"layer": "mednext_k3_dw_128", "suite": "unet", "pass": "forward", "dtype": "float32",
                 "stage": "screen", "predicted_ms": None, "speedup": 1.0, "n_runs": 3}  # fmt: skip
        for variant, ms, layout in (
            ("forward_depthwise", 1.2, "ncdhw"), ("forward_phases_packed", 1.1, "ncdhw"),
            ("forward_torch_native", 0.9, "ncdhw"), ("forward_depthwise", 0.5, "ndhwc"),
        ):  # fmt: skip
            times = {"median_ms": ms, "p20_ms": ms, "p80_ms": ms}
            writer.write("timing", {**where, "variant": variant, "layout": layout, "config": {"BLOCK_M": 64}, **times})
    return results.read(writer.path)


def test_the_slower_than_torch_come_first_then_the_furthest_from_the_roof(measured):
    names = [(cell.layer, cell.contestant) for cell in worst_of(measured, 3) if cell.layer.startswith(("seg", "vnet"))]
    assert names == [
        ("vnet_up1", "tritonconv"), ("vnet_up1", "torch"),
        ("segresnet_deconv_up0", "tritonconv"), ("segresnet_deconv_up0", "torch"),
        ("segresnet_deconv_up2", "tritonconv"),
    ]  # fmt: skip
    first = worst_of(measured, 1)[0]
    assert first.about == "2000 us measured, 0.75 times as fast as the best torch, 20 % of the roof"
    assert worst_of(measured, 9, only="up4")[0].layer == "nnunet_resenc_160x192_up4"
    assert worst_of(measured, 9, passes=("forward_backward",)) == []


def test_where_torch_was_chosen_the_nearest_kernel_stands_for_ours(measured):
    ours, torchs = [cell for cell in worst_of(measured, 1) if cell.layer == "mednext_k3_dw_128"]
    assert (ours.contestant, ours.layout, ours.config) == (
        "forward_phases_packed",
        "ncdhw",
        (("BLOCK_M", 64), ("COPY", 0)),
    )
    assert ours.about == "lost: 1100 us measured"
    assert (torchs.contestant, torchs.layout, torchs.config) == ("torch", "ncdhw", None)


def test_a_variant_is_looked_at_in_its_own_pass():
    layers, contestants = [workload("vnet_up3")], ("torch", "forward_shuffle", "backward_data_gemm")
    cells = combinations(layers, ("forward", "backward_data"), ("bfloat16",), ("ndhwc",), contestants, "full")
    assert [(cell.pass_name, cell.contestant) for cell in cells] == [
        ("forward", "torch"), ("forward", "forward_shuffle"), ("backward_data", "torch"),
        ("backward_data", "backward_data_gemm"),
    ]  # fmt: skip


def test_a_cell_goes_through_its_command_unchanged():
    from tritonconv.lab.profiling import cells

    cell = ProfiledCell(
        "vnet_up3", "forward", "bfloat16", "ndhwc", "forward_shuffle", "full", (("BLOCK_M", 64),), "why", ("a",)
    )
    assert cells._read(cell.command()[3]) == cell


def test_the_command_says_what_it_lacks(capsys, tmp_path):
    assert cli.main(["profile", "--only", "vnet"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    with pytest.raises(Exception, match="1 to 2"):
        flags.count("0")


# ------------------------------------------------------------------ its file, and the report


def profile_of(folder: Path, device: str = "Some CPU") -> Path:
    with Writer(folder, results.PROFILE) as writer:
        writer.write("environment", {**ENVIRONMENT, "device_name": device})
        first = {"layer": "a", "pass": "forward", "dtype": "float32", "layout": "ncdhw", "variant": "tritonconv"}
        for index, each in enumerate(ncu.read(TABLE)):
            writer.write("profile", {**first, "kernel": each.kernel, "launch": index, "duration_us": each.duration_us,
                                     "counters": each.counters})  # fmt: skip
        writer.write("end", {"reason": "complete"})
    return writer.path


def test_a_folder_has_the_profiles_of_its_device_and_the_newest_run_stays_the_newest(tmp_path):
    with Writer(tmp_path) as writer:
        writer.write("environment", ENVIRONMENT)
        writer.write("result", result())
    profile_of(tmp_path)
    profile_of(tmp_path, device="Another")
    assert results.latest(tmp_path) == writer.path
    whole = results.load(tmp_path)
    assert len(whole.results) == 1 and [row["kernel"] for row in whole.profiles] == ["pack", "f<int, 3>(T1, T2)"]
    (tmp_path / results.LATEST).unlink()
    assert results.latest(tmp_path) == writer.path


def test_the_report_has_the_counters(tmp_path):
    pytest.importorskip("matplotlib")
    from tritonconv.plots import html

    page = html.page(results.load(profile_of(tmp_path)), {})
    assert "<h2>Counters</h2>" in page and "f&lt;int, 3&gt;(T1, T2)" in page
    assert '<td class="n" data-v="6000.0">6,000</td>' in page
