"""The headline, and what else a picture must show: units, bands of noise, both columns, labels inside. CPU only."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from matplotlib.text import Text

from tests.test_plots import COPY, PEAK
from tests.test_results import ENVIRONMENT, result
from tritonconv.errors import ResultsError
from tritonconv.lab import cli, markdown
from tritonconv.lab.bench.results import Run, Writer
from tritonconv.plots import best, figures, headline, percent, readme, roofline, section, speedup, style, units

ROOFS = (
    {**COPY, "value": 4e12},
    {**PEAK, "value": 8e14},
    {**COPY, "name": "bias_add", "what": "a pass", "value": 9e12},
)
BY_BYTES, BY_FLOPS = list(headline.LAYERS)[:2]


def gpu_run(gain: float = 2.0, layers: int = 60) -> Run:
    """Two layers of the headline on a GPU, one on each side of the ridge, and others; ours ``gain`` times as fast as
    torch.compile on the device and half as fast by the host's clock."""
    sizes = {BY_BYTES: (1e9, 1e9), BY_FLOPS: (1e12, 1e9)}
    sizes |= {f"layer_{n}": (1e9 * (1 + n), 1e8) for n in range(layers)}
    environment = {**ENVIRONMENT, "device": "cuda", "device_name": "a GPU", "commit": "c" * 40}
    run = Run(Path("rows.jsonl"), environment, roofs=[dict(roof) for roof in ROOFS], end={"reason": "complete"})
    for layer, (flops, moved) in sizes.items():
        for pass_name, passes in (("forward", 1), ("forward_backward", 3)):
            for name, ms in (("torch", 4.0), ("torch_compile", 2.0), ("tritonconv", 2.0 / gain)):
                row = result(layer, name, 4.0 / ms, gpu_ms=ms, wall_ms=4.0 if name == "tritonconv" else 2.0)
                row |= {"median_ms": ms, "p20_ms": 0.9 * ms, "p80_ms": 1.1 * ms, "sm_mhz": 1980, "timing": "gpu"}
                run.results.append({**row, "pass": pass_name, "flops": passes * flops, "bytes": passes * moved})
    run.nulls = [{**result(BY_BYTES, "torch_again", ratio), "timing": "gpu"} for ratio in (0.98, 1.0, 1.03)]
    return run


def drawn(chart, run: Run):
    """The figure, and its texts that are seen, from the top; each of them lies inside the figure."""
    with style.style():
        figure = chart.draw(run)
        figure.draw_without_rendering()  # it places the labels of the axes
    unseen = {
        tick.label1
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    texts = [text for text in set(figure.findobj(Text)) - unseen if text.get_text().strip() and text.get_visible()]
    boxes = {text: text.get_window_extent() for text in texts}
    width, height = figure.bbox.size
    assert [text.get_text() for text, box in boxes.items()
            if min(box.x0, box.y0) < -1 or box.x1 > width + 1 or box.y1 > height + 1] == []  # fmt: skip
    return figure, " ".join(text.get_text() for text in sorted(texts, key=lambda text: -boxes[text].y0))


def test_a_rate_has_three_figures_and_the_unit_of_its_size():
    said = [units.rate(value, "FLOP/s") for value in (8.444e14, 1e12, 9.996e11, 9.99e11, 2.15e11, 3e8)]
    assert said == ["844 TFLOP/s", "1 TFLOP/s", "1 TFLOP/s", "999 GFLOP/s", "215 GFLOP/s", "0.3 GFLOP/s"]
    assert units.unit(4e12, "B/s") == (1e12, "TB/s")


def test_a_loss_never_reads_as_none():
    assert [units.ratio(value) for value in (0.994, 0.9951, 0.99998, 1.0, 1.004)] == [
        "0.99", "0.995", "0.999", "1.00", "1.00"]  # fmt: skip
    run = gpu_run(gain=0.998, layers=0)
    figure, _ = drawn(headline, run)
    marked = [text for text in figure.findobj(Text) if text.get_text() == "0.998x"]
    assert len(marked) == 4 and all(text.get_color() == style.VERMILLION for text in marked)
    table = section._table(["slowest"], [[0.998], [1.5]], 1)
    assert "| 0.998 |" in table and "| 1.50 |" in table


@pytest.mark.parametrize("gain", [0.02, 0.5, 0.998, 1.0, 1.9])
@pytest.mark.parametrize("roof", [0.7, 1.02, 1.2, 1.9])
def test_no_roof_goes_through_a_number(gain, roof):
    """Whichever bar is the longest; the roof is that many times the rates of torch.compile."""
    run = gpu_run(gain=gain, layers=0)
    run.roofs = [{**COPY, "value": 5e11 * roof}, {**PEAK, "value": 5e14 * roof}]
    for row in run.results:  # three passes of a training step move three times as much: here in as much time
        if row["pass"] == "forward_backward":
            row |= {"median_ms": 3 * row["median_ms"], "gpu_ms": 3 * row["gpu_ms"]}
    figure, _ = drawn(headline, run)
    for axes in (axes for axes in figure.axes if axes.texts):
        for line in axes.lines:
            (x, _), _ = axes.transData.transform(line.get_xydata() * (1, 0))
            boxes = [text.get_window_extent() for text in axes.texts]
            assert not any(box.x0 < x < box.x1 for box in boxes), (gain, roof, [text.get_text() for text in axes.texts])


def test_a_chart_says_what_was_not_timed():
    run = gpu_run(layers=2)
    assert "the fastest of torch and torch.compile" in drawn(best, run)[1]
    run.results = [row for row in run.results if row["variant"] != "torch_compile"]
    run.nulls = []
    for chart in (best, speedup):
        _, said = drawn(chart, run)
        assert "No null rows" in said and "Shaded" not in said
        assert chart is speedup or "(torch.compile was not timed)" in said
    assert "(torch.compile was not timed)" in section._caption(run)


@pytest.mark.parametrize("letter", ["i", "2", "W", "—", "."])
def test_a_footer_of_any_letters_stays_inside(letter):
    run = gpu_run(layers=1)
    run.environment["scale_rule"] = " ".join([letter * 9] * 40)
    run.environment["run"] = "model-20261129T174439Z-6b2958e " * 9
    drawn(best, run)  # which holds that each text lies inside


@pytest.mark.parametrize("low", [0.2, 0.49, 0.55, 0.69])
def test_a_loss_has_a_tick_to_be_read_by(low):
    with style.style():
        axes = style.new_figure(3, 3)[0].add_subplot()
        figures.ratio_axis(axes, low, 3.0)
    left = axes.get_xlim()[0]
    assert left <= low and any(left <= tick <= 0.5 for tick in axes.get_xticks())


@pytest.mark.parametrize("chart", [percent, roofline])
def test_torchs_mark_shows_where_ours_is_the_same(chart):
    run = gpu_run(gain=0.5, layers=1)  # as fast as torch
    run.results = [row | {"percent_of_roof": 50.0} for row in run.results]
    figure, _ = drawn(chart, run)
    for axes in (axes for axes in figure.axes if axes.get_xlabel()):
        dots = (line for line in axes.lines if line.get_marker() == "o")
        marks = [line for line in dots if line.get_color() in (style.GREY, style.BLUE)]
        top = max(marks, key=lambda line: line.get_zorder())
        assert top.get_markerfacecolor() == "none" and top.get_color() == style.GREY


def test_the_headline_has_rates_of_each_contestant_under_measured_roofs_and_its_losses():
    run = gpu_run(gain=0.5, layers=0)
    panels, dtype = headline.bars(run)
    (by_bytes, by_flops), training = panels["forward"], panels["forward_backward"]
    assert (by_bytes.layer, by_flops.layer, dtype) == (BY_BYTES, BY_FLOPS, "float32")
    assert by_bytes.rates == {"torch": 2.5e11, "torch_compile": 5e11, "tritonconv": 2.5e11} and by_bytes.by_bytes
    assert by_flops.rates["torch"] == 2.5e14 and not by_flops.by_bytes and training[1].rates["torch"] == 7.5e14
    assert by_bytes.ratio == 0.5
    figure, said = drawn(headline, run)
    for fact in ("TB/s", "useful FLOPs", "copy in memory 4 TB/s", "float32 matrix product 800 TFLOP/s", "torch.compile",
                 "measured roof", "nnU-Net", "training step", "a GPU at 1980 MHz", "c" * 10, "2026-01-02",
                 "GPU time"):  # fmt: skip
        assert fact in said, fact
    assert "not timed" not in said and "ended early" not in said
    marked = [text for text in figure.findobj(Text) if text.get_text() == "0.50x"]
    assert len(marked) == 4 and all(text.get_color() == style.VERMILLION for text in marked)


def test_no_headline_without_roofs_or_its_layers():
    run = gpu_run(layers=0)
    for rows in ({"roofs": []}, {"results": [row for row in run.results if row["layer"] not in headline.LAYERS]}):
        with pytest.raises(ResultsError, match="nnU-Net"):
            headline.bars(Run(run.path, run.environment, **({"roofs": run.roofs, "results": run.results} | rows)))


def test_gpu_time_and_wall_time_stand_side_by_side_and_noise_is_a_band():
    run = gpu_run()
    figure, said = drawn(best, run)
    assert "GPU time of an eager call" in said and "wall time of an eager call" in said
    assert said.count("mean 2.00, 0 of 62 below 1") == said.count("mean 0.50, 62 of 62 below 1") == 2
    band = "Shaded: torch against torch, 3 null rows, 0.984 to 1.024"
    assert band in said
    for chart in (figure, drawn(speedup, run)[0]):
        forward, step = [axes for axes in chart.axes if axes.get_xlabel()]
        widths = [[round(patch.get_width(), 3) for patch in axes.patches] for axes in (forward, step)]
        assert 0.04 in widths[0] and 0.04 not in widths[1]  # the null rows are of the forward


def test_the_roofline_of_many_layers_is_inside_its_picture():
    _, said = drawn(roofline, gpu_run())
    assert "useful TFLOP/s" in said and "copy in memory: 4 TB/s" in said and "e+0" not in said


def test_the_readme_is_written_between_its_markers_with_its_picture(tmp_path, capsys):
    run, path = gpu_run(layers=0), tmp_path / "R.md"
    with Writer(tmp_path / "rows") as writer:
        writer.write("environment", run.environment)
        for kind in ("roof", "result", "null"):
            for row in getattr(run, f"{kind}s"):
                writer.write(kind, row)
    begin, end = markdown.markers(readme.COMMAND)
    path.write_text(f"# Head\n\n{begin}\nold\n{end}\n\ntail\n")
    for _ in range(2):
        assert cli.main(["report", str(writer.path), "--readme", str(path)]) == 0
    text = path.read_text()
    assert text.startswith("# Head\n") and text.endswith("\n\ntail\n") and "old" not in text
    assert "On one a GPU, in float32" in text and "**2.00 times** as fast in the forward (2 layers" in text
    assert "| a GPU, float32: training step | 2 | 2.00 (2.00; 0 of 2) | 0.50 (0.50; 2 of 2) |" in text
    assert 'src="rows/headline.png"' in text and (tmp_path / "rows" / "headline.png").is_file()
    path.write_text("no markers")
    assert cli.main(["report", str(writer.path), "--readme", str(path)]) == 2
    assert "argument --readme" in capsys.readouterr().err


def test_the_readme_says_what_a_whole_model_gains_and_where_none_was_timed():
    on_gpu, on_cpu = gpu_run(layers=0), gpu_run(layers=0)
    assert "whole models" not in readme.text([on_gpu, on_cpu], "picture.png")
    on_cpu.environment["device_name"] = "a CPU"
    for model, ours, compiled in (("unet", 1.25, 1.5), ("gan", 0.75, None)):
        of_model = {"tritonconv": ours, "torch_again": ours / 2, "tritonconv_compile": 9.0}
        on_cpu.steps += [{"model": model, "variant": name, "speedup": value, "over_torch_compile": compiled}
                         for name, value in of_model.items()]  # fmt: skip
    said = readme.text([on_gpu, on_cpu], "picture.png").splitlines()[-1]
    assert "on a CPU unet 1.25 (both compiled 1.50), gan 0.75; torch against itself 0.38 to 0.62." in said
    assert said.endswith("On a GPU they were not timed.")
