"""The charts beside roofline and speed-up, and the HTML report: from results files alone. CPU only."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from tests.test_plots import COPY, PEAK
from tests.test_results import ENVIRONMENT, result
from tritonconv.errors import ResultsError
from tritonconv.lab import cli, markdown
from tritonconv.lab.bench.results import Run, Writer, read
from tritonconv.lab.bench.standings import standings
from tritonconv.lab.bench.summary import summary
from tritonconv.plots import best, charts, html, landscape, percent, scaling, section

HEAD = {"suite": "unet", "pass": "forward", "dtype": "float32", "layout": "ncdhw"}
COMMANDS = {"landscape": "tritonconv tune", "overhead": "tritonconv bench --overhead", "scaling": "--sizes"}


def timing(variant: str, ms: float, predicted: float | None, config: dict | None = None, layer="a") -> dict:
    times = {"median_ms": ms, "p20_ms": 0.9 * ms, "p80_ms": 1.1 * ms, "n_runs": 5, "speedup": 1.0}
    return {**HEAD, "layer": layer, "variant": variant, "config": config or {}, "stage": "screen",
            "predicted_ms": predicted, **times}  # fmt: skip


def timed(layer: str, variant: str, ms: float, layout: str = "ncdhw", **more) -> dict:
    row = result(layer, variant, 1.0, 0.9, 1.1, layout)
    return {**row, "median_ms": ms, "p20_ms": 0.9 * ms, "p80_ms": 1.1 * ms, **more}


def write(folder: Path, name: str = "layer") -> Run:
    """One file with rows of every kind."""
    with Writer(folder) as writer:
        writer.write("environment", {**ENVIRONMENT, "device_name": "a box"})
        for roof in (COPY, PEAK):
            writer.write("roof", roof)
        for index in range(3):
            for variant, ms in (("torch", 2.0 + index), ("tritonconv", 1.0)):
                more = {"percent_of_roof": 40.0 + index, "class": "k = s", "max_error": 1e-6, "torch_error": 2e-6,
                        "chosen": {"forward": "forward_torch_conv"} if variant != "torch" else {}}  # fmt: skip
                writer.write("result", timed(f"{name}_{index}", variant, ms, **more))
        for size in (4, 8, 16):
            for variant in ("torch", "tritonconv"):
                row = timed(f"{name}_0@{size}", variant, size / 4, family=f"{name}_0", percent_of_roof=50.0)
                writer.write("result", {**row, "flops": 1e6 * size**3})
        for index, variant in enumerate(("forward_torch_conv", "forward_torch_phases", "forward_torch_native")):
            writer.write("timing", timing(variant, 1.0 + index, 2.0 - index / 2, layer=f"{name}_0"))
        tuned = {**HEAD, "layer": f"{name}_0", "variant": "forward_torch_conv", "config": {}, "median_ms": 1.0}
        writer.write("tuned", {**tuned, "torch_ms": 3.0, "candidates": 3})
        for variant, us in (("torch", 8.0), ("tritonconv", 11.0)):
            row = {
                **HEAD,
                "layer": "tiny",
                "variant": variant,
                "median_us": us,
                "p20_us": us,
                "p80_us": us,
                "n_runs": 9,
            }
            writer.write("overhead", row)
        check = {**HEAD, "layer": f"{name}_0", "variant": "forward_torch_conv", "max_error": 1.0, "tolerance": 4.0}
        writer.write("check", check)
        writer.write("skip", {"layer": "big", "pass": "all", "variant": "all", "message": "its weight alone"})
        writer.write("end", {"reason": "complete"})
    return read(writer.path)


# ------------------------------------------------------------------ charts


def test_the_charts_are_the_files_that_say_who_writes_their_rows():
    beside = {"roofline", "speedup", "percent", "scaling", "landscape", "overhead"}
    assert charts.names()[:2] == ("headline", "best") and set(charts.names()[2:]) == beside
    assert all(charts.chart(name).MADE_BY.startswith("tritonconv ") for name in charts.names())
    assert set(html.CAPTIONS) == set(charts.names())


@pytest.mark.parametrize("name", ["best", "percent", "scaling", "landscape", "overhead"])
def test_a_chart_is_a_png_and_an_svg_and_repeats(tmp_path, name):
    run = write(tmp_path)
    png, svg = charts.draw(run, tmp_path, (name,))[name]
    assert png.read_bytes().startswith(b"\x89PNG") and png.stem == f"{run.run}-{name}"
    first = svg.read_bytes()
    charts.draw(run, tmp_path, (name,))
    assert svg.read_bytes() == first and b"</svg>" in first
    with pytest.raises(ResultsError):
        charts.chart(name).draw(Run(run.path, run.environment))


@pytest.mark.parametrize("name", charts.names())
def test_a_chart_without_rows_names_the_command_that_writes_them(tmp_path, name):
    with Writer(tmp_path) as writer:
        writer.write("environment", ENVIRONMENT)
    with pytest.raises(ResultsError, match=re.escape(COMMANDS.get(name, "tritonconv bench"))):
        charts.draw(read(writer.path), tmp_path, (name,))


def test_the_best_torch_counts_in_any_layout(tmp_path):
    rows = [timed("a", "torch", 4.0), timed("a", "torch", 2.0, "ndhwc"), timed("a", "torch_compile", 3.0)]
    rows += [timed("a", "tritonconv", 1.0), timed("b", "tritonconv", 1.0)]
    assert best.ratios(rows) == {("forward", "float32"): {"a": 2.0}}


def test_a_kernels_tiles_are_a_map_and_formulations_are_bars():
    rows = [
        timing("k", m * n, 1.0, {"BLOCK_M": m, "BLOCK_N": n, "num_warps": 4}) for m in (32, 64) for n in (16, 32, 64)
    ]
    assert landscape._tiles(rows) == ("BLOCK_N", "BLOCK_M")
    assert landscape._tiles(rows[:1]) is None and landscape._tiles([timing("k", 1.0, 1.0)]) is None
    assert list(landscape._rank([3.0, 1.0, 1.0])) == [3.0, 1.5, 1.5]
    assert landscape.LEAST == scaling.LEAST == 3


def test_a_map_of_tiles_is_drawn(tmp_path):
    with Writer(tmp_path) as writer:
        writer.write("environment", ENVIRONMENT)
        for m in (32, 64):
            for n in (16, 32):
                writer.write("timing", timing("k", m * n / 100, m + n, {"BLOCK_M": m, "BLOCK_N": n}))
    assert len(charts.draw(read(writer.path), tmp_path, ("landscape",))["landscape"]) == 2


def test_report_draws_every_chart_or_those_asked_for(tmp_path, capsys):
    run = write(tmp_path)
    assert cli.main(["report", str(run.path), "--output", str(tmp_path / "all")]) == 0
    assert len(capsys.readouterr().out.split()) == 2 * (len(charts.names()) - 1) + 1  # no layer of the headline
    assert cli.main(["report", str(run.path), "--charts", "overhead,percent", "--output", str(tmp_path / "two")]) == 0
    assert len(list((tmp_path / "two").iterdir())) == 5
    assert cli.main(["report", str(run.path), "--charts", "pie"]) == 2
    assert "'pie'" in capsys.readouterr().err
    assert percent.MADE_BY == "tritonconv bench"


# ------------------------------------------------------------------ the report


class Page(HTMLParser):
    """The tables by their heading, and every address the page names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.addresses: list[str] = []
        self.heading, self.inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag, attributes) -> None:
        self.inside = tag
        self.addresses += [value for key, value in attributes if key in ("src", "href", "xlink:href") and value]
        if tag == "h2":
            self.heading = ""
        if tag == "tr":
            self.tables.setdefault(self.heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self.heading][-1].append("")

    def handle_data(self, data: str) -> None:
        if self.inside == "h2":
            self.heading += data
        elif self.inside in ("td", "button"):
            self.tables[self.heading][-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def test_the_report_holds_the_files_numbers_and_loads_nothing(tmp_path, capsys):
    run = write(tmp_path)
    assert cli.main(["report", str(run.path)]) == 0
    path = Path(capsys.readouterr().out.split()[-1])
    assert path == tmp_path.resolve() / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert all(address.startswith("#") for address in page.addresses)
    layers = page.tables["Layers"]
    row = next(line for line in layers if line[0] == "layer_2")
    assert row[5:9] == ["forward_torch_conv", "4", "1", "1"] and row[11:] == ["42", "1e-06", "2e-06"]
    assert len(layers) == 1 + 6  # three layers, three sizes of one
    ranked = page.tables["Against the best torch"]
    assert len(ranked) == 1 + 3 and ranked[3][4:9] == ["torch ncdhw", "forward_torch_conv ncdhw", "4", "1", "4"]
    assert page.tables["Tuned choices"][1][:5] == ["layer_0", "forward", "float32", "ncdhw", "forward_torch_conv"]
    assert page.tables["Tuned choices"][1][-3:] == ["3", "1", "3"]
    assert page.tables["Verified"][1] == ["forward_torch_conv", "float32", "1", "0.25"]
    assert page.tables["Left out"][1][3] == "its weight alone"
    assert ["device_name", "a box"] in page.tables["Environment"]
    titles = re.findall(r"<h2>(.*?)</h2>", path.read_text(encoding="utf-8"))
    assert [title for title in titles if title in html.CAPTIONS.values()] == [
        html.CAPTIONS[name] for name in charts.names() if name != "headline"
    ]


def test_ids_of_the_pictures_do_not_collide(tmp_path):
    run = write(tmp_path)
    ids = re.findall(r'\bid="([^"]+)"', html.page(run, charts.draw(run, tmp_path)))
    assert len(ids) > 20 and len(set(ids)) == len(ids)


def test_names_from_the_file_are_escaped(tmp_path):
    run = write(tmp_path, "<script>alert(1)</script>")
    text = html.page(run, charts.draw(run, tmp_path))
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text


def test_an_unfinished_run_says_so_and_an_empty_one_is_refused(tmp_path, capsys):
    with Writer(tmp_path) as writer:
        writer.write("environment", ENVIRONMENT)
        writer.write("roof", COPY)
    assert "cut off" in html.page(read(writer.path), {})
    with Writer(tmp_path / "empty") as writer:
        writer.write("environment", ENVIRONMENT)
    assert cli.main(["report", str(writer.path)]) == 2
    assert "nothing was measured" in capsys.readouterr().err
    assert not (tmp_path / "empty" / "report.html").exists()
    assert cli.main(["report", str(tmp_path / "none")]) == 2


def test_a_run_is_a_section_of_a_markdown_file(tmp_path, capsys):
    run, readme = write(tmp_path / "results"), tmp_path / "R.md"
    begin, end = markdown.markers("report")
    readme.write_text(f"# Head\n\n{begin}\n\n### another device\n\nkept\n\n{end}\n\ntail\n")
    for _ in range(2):
        assert cli.main(["report", str(run.path), "--markdown", str(readme), "--every-layer"]) == 0
    text = readme.read_text()
    assert text.startswith("# Head\n") and text.endswith("\n\ntail\n") and "### another device\n\nkept" in text
    assert text.count("### a box") == 1
    assert "| forward | float32 | all | 3 | 2.88 | 2.00 | 0 | 0 |" in text
    assert "| forward | float32 | k = s | 3 | 2.88 | 2.00 | 0 | 0 |" in text
    assert "| layer_0 | k = s | torch ncdhw | forward_torch_conv ncdhw | 2 | 1 | 2.00 | 40 |" in text
    assert "layer_0@4" not in text  # sizes that no model has
    assert cli.main(["report", str(run.path), "--markdown", str(readme)]) == 0
    assert "layer_0" not in readme.read_text() and "| all |" in readme.read_text()
    capsys.readouterr()
    (tmp_path / "none.md").write_text("no markers")
    assert cli.main(["report", str(run.path), "--markdown", str(tmp_path / "none.md")]) == 2
    assert "report: begin" in capsys.readouterr().err


def test_graphs_stand_against_graphs_beside_eager_calls_for_both_passes(tmp_path):
    """In the summary, the page and the section: each column by its own times, torch.compile among the best of torch."""
    ms = {
        ("forward", "torch"): (4.0, 3.0, 9.0), ("forward", "torch_compile"): (5.0, 2.0, 8.0),
        ("forward", "tritonconv"): (2.0, 1.0, 16.0), ("forward_backward", "torch"): (8.0, 6.0, 12.0),
        ("forward_backward", "torch_compile"): (9.0, 9.0, 15.0), ("forward_backward", "tritonconv"): (2.0, 2.0, 10.0),
    }  # fmt: skip
    with Writer(tmp_path) as writer:
        writer.write("environment", {**ENVIRONMENT, "device": "cuda", "device_name": "a GPU"})
        for (pass_name, variant), times in ms.items():
            row = timed("up", variant, times[0], timing="gpu")
            columns = {f"{name}_ms": each for name, each in zip(("gpu", "graph", "wall"), times, strict=True)}
            writer.write("result", {**row, "pass": pass_name, "class": "k = s", **columns})
        writer.write("end", {"reason": "complete"})
    run = read(writer.path)
    ratios = {
        ("gpu", "forward"): "2.00", ("gpu", "forward_backward"): "4.00", ("graph", "forward"): "2.00",
        ("graph", "forward_backward"): "3.00", ("wall", "forward"): "0.50", ("wall", "forward_backward"): "1.20",
    }  # fmt: skip
    said = {tuple(line.split()[:2]): line.split()[4] for line in summary(run).splitlines() if line.count("none") == 1
            and line.split()[0] in ("gpu", "graph", "wall")}  # fmt: skip
    assert said == ratios
    text = section.section(run, standings(run.of_models()), every_layer=False)
    for (column, pass_name), ratio in ratios.items():
        label = pass_name if column == "gpu" else f"{pass_name} ({column})"
        assert f"| {label} | float32 | all | 1 | {ratio} |" in text
    assert "(graph) by the GPU time of a CUDA graph of it" in text
    page = html.page(run, {})
    assert "By the GPU time of a CUDA graph of it, over the best torch" in page
    assert "torch graph ms" in page
