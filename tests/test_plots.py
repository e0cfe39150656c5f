"""The charts: drawn from a results file alone, the same bytes each time, with what a reader must be told."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.text import Text

from tests.test_results import ENVIRONMENT, ROOF, result
from tritonconv.errors import ResultsError
from tritonconv.lab import cli
from tritonconv.lab.bench.results import Run, Writer, read
from tritonconv.plots import charts, figures, labels, roofline, speedup, style

COPY = {"name": "copy_memory", "what": "copy in memory", "dtype": None, "value": 2e10, "unit": "byte/s"}
PEAK = {**ROOF, "value": 3e11, "what": "float32 matrix product"}


def write(folder: Path, layers: int, roofs=(COPY, PEAK), reason="complete", layouts=("ncdhw", "ndhwc"), fast=1.0):
    with Writer(folder) as writer:
        writer.write("environment", ENVIRONMENT)
        for roof in roofs:
            writer.write("roof", roof)
        for index in range(layers):
            for layout in layouts:
                for name, gain in (("torch", 1.0), ("tritonconv", 1.5 + index % 3)):
                    ms = 2.0 * fast / gain
                    row = result(f"layer_{index}", name, gain, gain * 0.9, gain * 1.1, layout)
                    flops = 5e7 * (1 + index)
                    row |= {"median_ms": ms, "p20_ms": 0.9 * ms, "p80_ms": 1.2 * ms, "flops": flops, "bytes": 4e6}
                    writer.write("result", {**row, "suite": "unet" if index % 2 else "gan"})
        writer.write("end", {"reason": reason})
    return read(writer.path)


def draw(chart, run, folder) -> list[Path]:
    name = chart.__name__.rpartition(".")[2]
    return charts.draw(run, folder, (name,))[name]


def texts(monkeypatch, chart, run, folder) -> str:
    """Every text of the figure, with its line breaks taken out."""
    found = []

    def keep(figure, run, folder, name):
        found.extend(item.get_text() for item in figure.findobj(match=lambda artist: hasattr(artist, "get_text")))
        return []

    monkeypatch.setattr(style, "save", keep)
    draw(chart, run, folder)
    return " ".join(reversed(found))


@pytest.mark.parametrize("chart", [roofline, speedup])
@pytest.mark.parametrize("layers", [1, 30])
def test_png_and_svg_are_written_and_repeat(tmp_path, chart, layers):
    run = write(tmp_path, layers)
    png, svg = draw(chart, run, tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG")
    first = svg.read_bytes()
    assert b"</svg>" in first
    assert draw(chart, run, tmp_path)[1].read_bytes() == first


@pytest.mark.parametrize("chart", [roofline, speedup])
def test_filters_reach_the_chart_and_the_file_name(tmp_path, monkeypatch, chart):
    run = write(tmp_path, 2)
    png, _ = draw(chart, run.only(**{"pass": "forward", "layout": "ndhwc", "dtype": "float32"}), tmp_path)
    assert png.name.endswith("-forward-ndhwc-float32.png")
    shown = texts(monkeypatch, chart, run.only(layout="ndhwc"), tmp_path)
    assert "NDHWC" in shown
    assert "NCDHW" not in shown


def footer(shown: str) -> bool:
    facts = ("Some CPU", "2 threads", "torch 2.13.0", "triton not installed", "no commit", "2026-01-02", "(cpu): small")
    return all(fact in shown for fact in facts)


def test_speedup_names_every_layer_and_labels_the_geometric_means(tmp_path, monkeypatch):
    shown = texts(monkeypatch, speedup, write(tmp_path, 3), tmp_path)
    assert all(f"layer_{index}" in shown for index in range(3))
    mean = (1.5 * 2.5 * 3.5) ** (1 / 3)
    assert f"NCDHW: mean {mean:.2f}, 3 layers" in shown
    assert footer(shown)
    assert "ended early" not in shown


def test_roofline_labels_measured_roofs_and_names_few_layers(tmp_path, monkeypatch):
    shown = texts(monkeypatch, roofline, write(tmp_path, 3), tmp_path)
    assert "copy in memory: 20 GB/s" in shown
    assert "float32 matrix product: 300 GFLOP/s" in shown
    assert shown.count("layer_1") == 2  # in both panels
    assert "multiply-adds that land inside the output" in shown
    assert footer(shown)
    assert "Ringed" not in shown


def test_of_many_layers_the_extremes_are_named(tmp_path, monkeypatch):
    shown = texts(monkeypatch, roofline, write(tmp_path, 30), tmp_path)
    named = set(re.findall(r"layer_\d+", shown))
    assert {"layer_0", "layer_29"} <= named and len(named) <= roofline.NAMED
    assert "Named (black edge), where there is room" in shown


def test_of_a_few_layers_every_contestant_shows(tmp_path, monkeypatch):
    run = write(tmp_path, 8)
    compiled = [{**row, "variant": "torch_compile"} for row in run.results if row["variant"] == "torch"]
    shown = texts(monkeypatch, roofline, replace(run, results=[*run.results, *compiled]), tmp_path)
    assert len(set(re.findall(r"layer_\d+", shown))) == 8 and "where there is room" not in shown
    assert "torch_compile" in shown


def test_the_label_of_a_roof_stands_over_the_line_above_where_that_is_near(tmp_path, monkeypatch):
    for factor, one in ((1.15, True), (10.0, False)):
        near = {**COPY, "name": "copy_cache", "what": "near", "value": factor * COPY["value"]}
        shown = texts(monkeypatch, roofline, write(tmp_path, 3, roofs=(COPY, near, PEAK)), tmp_path)
        assert ("copy in memory (dashed): 20 GB/s\nnear" in shown) is one


def test_missing_roofs_are_said(tmp_path, monkeypatch):
    shown = texts(monkeypatch, roofline, write(tmp_path, 2, roofs=()), tmp_path)
    assert "no measured copy and float32 matrix roof in this file" in shown
    assert "No roofs were measured." in shown


def test_a_point_above_the_roofs_is_ringed_and_said(tmp_path, monkeypatch):
    shown = texts(monkeypatch, roofline, write(tmp_path, 2, fast=0.01), tmp_path)
    assert "Ringed: 8 of 8 points lie above every measured roof" in shown


def test_an_early_end_is_said(tmp_path, monkeypatch):
    for chart in (roofline, speedup):
        with monkeypatch.context() as context:
            assert "ended early" in texts(context, chart, write(tmp_path, 2, reason="budget"), tmp_path)


def test_the_titles_of_all_panels_have_one_size(tmp_path):
    frame = figures.Frame(write(tmp_path, 1), "Two panels", [], size=(2.0, 1.0), panels=2, columns=2)
    titles = "forward", "forward + backward, NDHWC, float32"
    for index, title in enumerate(titles):
        frame.panel(index, title)
    texts = [text for text in frame.done().findobj(Text) if text.get_text() in titles]
    assert len(texts) == 2 and texts[0].get_fontsize() == texts[1].get_fontsize() < 8.5


def test_nothing_to_draw_is_an_error(tmp_path):
    run = write(tmp_path, 1)
    with pytest.raises(ResultsError, match="no results to draw"):
        roofline.draw(Run(run.path, run.environment))
    run.results = [row | {"speedup": None} for row in run.results]
    with pytest.raises(ResultsError, match="no layer was timed beside torch"):
        speedup.draw(run)


KIND = {"layer": "a", "suite": "unet", "pass": "forward", "dtype": "float32", "layout": "ncdhw", "variant": "torch"}
TIMED = {"config": {}, "stage": "screen", "median_ms": 2.0, "p20_ms": 1.0, "p80_ms": 3.0, "n_runs": 5, "speedup": 1.0}


@pytest.mark.parametrize(("kind", "rows"), [
    ("overhead", [KIND | {"median_us": 2.0, "p20_us": 1.0, "p80_us": 3.0, "n_runs": 5}]),
    ("landscape", [KIND | TIMED | {"variant": name, "predicted_ms": 1.0} for name in ("torch", "b", "c")]),
])  # fmt: skip
def test_the_command_draws_what_there_is_without_results(tmp_path, capsys, kind, rows):
    with Writer(tmp_path, f"{kind}-") as writer:
        writer.write("environment", ENVIRONMENT)
        for row in rows:
            writer.write({"landscape": "timing"}.get(kind, kind), row)
    for flags, suffix in (((), ""), (("--pass", "forward"), "-forward")):
        assert cli.main(["report", str(tmp_path), *flags]) == 0
        *pictures, page = capsys.readouterr().out.split()
        assert page.endswith(f"report{suffix}.html")
        assert [name.rsplit("bench-x", 1)[1] for name in pictures] == [
            f"-{kind}{suffix}.png",
            f"-{kind}{suffix}.svg",
        ]
    assert cli.main(["report", str(writer.path), "--pass", "backward_data"]) == 2
    assert "--pass 'backward_data'" in (err := capsys.readouterr().err) and "has rows for forward only" in err


def test_a_file_without_a_chart_has_a_page_of_tables_and_a_wanted_chart_says_who_writes_it(tmp_path, capsys):
    with Writer(tmp_path, "roofs-") as writer:
        writer.write("environment", ENVIRONMENT)
        for roof in (COPY, PEAK):
            writer.write("roof", roof)
    assert cli.main(["report", str(writer.path), "--charts", "overhead"]) == 2
    assert "written by tritonconv bench --overhead" in capsys.readouterr().err
    assert cli.main(["report", str(writer.path)]) == 0
    (page,) = capsys.readouterr().out.split()
    assert "<h2>Roofs</h2>" in Path(page).read_text() and "<svg" not in Path(page).read_text()


@pytest.fixture
def axes_and_canvas() -> tuple[Axes, object]:
    figure, canvas = style.new_figure(6, 5)
    axes = figure.add_axes((0.1, 0.1, 0.85, 0.85))
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 10)
    return axes, canvas


def test_labels_cover_neither_points_nor_each_other(axes_and_canvas):
    axes, canvas = axes_and_canvas
    placer = labels.Placer(axes, canvas)
    points = [(3 + 0.25 * (index % 7), 4 + 0.25 * (index // 7)) for index in range(42)]
    for x, y in points:
        placer.block_point(x, y, 2.0)
    placed = sum(placer.place(str(index), x, y, 6) for index, (x, y) in enumerate(points))
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in axes.texts]
    assert len(boxes) == placed > 0.8 * len(points)
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])
        assert not any(box.contains(*axes.transData.transform(point)) for point in points)
        assert axes.bbox.x0 <= box.x0 <= box.x1 <= axes.bbox.x1


def test_a_label_without_room_inside_the_frame_is_left_out(axes_and_canvas):
    axes, canvas = axes_and_canvas
    placer = labels.Placer(axes, canvas)
    assert not placer.place("far away", 100, 100, 6)
    placer.block_point(5, 5, 100)
    assert not placer.place("everything is taken", 5, 5, 6)
    assert not axes.texts
