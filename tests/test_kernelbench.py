"""KernelBench's layers beside the published figures. CPU only."""

from __future__ import annotations

import torch

from tests.test_results import ENVIRONMENT, result
from tritonconv.lab import cli
from tritonconv.lab.bench import kernelbench, results
from tritonconv.lab.bench.results import Writer, read
from tritonconv.lab.bench.runner import Outcome
from tritonconv.lab.bench.workloads import workloads
from tritonconv.lab.commands.measurements import layers


def test_the_published_figures_are_of_the_suites_layers():
    names = {layer.name for layer in workloads(kernelbench.SUITE)}
    published = kernelbench.published()
    assert set(published["times"]["ms"]) == names and len(names) == 26
    assert all(min(ms) > 0 for of in published["times"]["ms"].values() for ms in of.values())
    assert all(set(one["speedups"]) <= names for one in published["solutions"])
    assert published["times"]["ms"]["kernelbench_l1_72"]["H100 SXM"] == [2.82, 2.82]


def test_levels_have_their_means_and_a_wrong_answer_counts(tmp_path):
    with Writer(tmp_path) as writer:
        writer.write("environment", {**ENVIRONMENT, "device": "cuda", "cudnn_conv_fp32": "tf32"})
        for name, gain, same in (("l1_61", 2.0, []), ("l1_72", 8.0, []), ("l2_26", 3.0, ["kernelbench_l2_3"])):
            for variant, ratio in (("torch", 1.0), ("tritonconv", gain)):
                writer.write("result", result(f"kernelbench_{name}", variant, ratio, duplicates=same))
        wrong = {"layer": "kernelbench_l1_77", "pass": "forward", "variant": "tritonconv", "message": "off"}
        writer.write("error", {**wrong, "status": "wrong"})
    text = kernelbench.text(read(writer.path))
    first, second = text.index("level 1"), text.index("level 2")
    assert "products of both sides: tf32" in text[:first] and "wrong: tritonconv on kernelbench_l1_77" in text
    assert "geometric mean 4.00, least 2.00 (kernelbench_l1_61)" in text[first:second]
    assert "fast_0 67%, fast_1 67%, fast_2 33%, fast_4 33%, fast_8 0%, of 3 problems" in text[first:second]
    assert "CUDA-L1 on an H100: l1_61 2.06, l1_70 3.2, l1_77 1.4" in text[first:second]
    assert "KernelBench's leaderboard: no right answer" in text[first:second]
    assert "geometric mean 3.00" in text[second:] and "of 2 problems" in text[second:]
    assert text.index("kernelbench_l2_3 ") < text.index("kernelbench_l2_26 ") and "2.82 / 2.82" in text[first:second]


def test_the_command_measures_them_as_kernelbench_defines_them(tmp_path, monkeypatch, capsys):
    def measured(options, folder, progress):
        """As the benchmark, with no clock."""
        asked.append(options)
        with Writer(folder) as writer:
            precision = torch.backends.cudnn.conv.fp32_precision
            writer.write("environment", {**ENVIRONMENT, "cudnn_conv_fp32": precision})
            writer.write("result", result(options.layers[0].name, "tritonconv", 2.0))
        return Outcome(writer.path, "complete", 0)

    asked = []
    monkeypatch.setattr(layers, "bench", measured)
    command = ["bench", "--kernelbench", "ieee", "--only", "l2_50", "--quiet", "--output", str(tmp_path)]
    assert cli.main(command) == 0
    (options,) = asked
    assert [layer.name for layer in options.layers] == ["kernelbench_l2_50"] and options.passes == ("forward",)
    assert options.layouts == ("ncdhw",) and options.dtypes == (torch.float32,)
    assert results.read(results.latest(tmp_path)).environment["cudnn_conv_fp32"] == "ieee"
    said = capsys.readouterr().out
    assert "a CPU multiplies float32 as it is" in said and "fast_1 100%" in said and "of 1 problems" in said
    assert cli.main([*command, "--suite", "unet"]) == 2
    assert "--suite: goes with the layers, not with --kernelbench" in capsys.readouterr().err
    assert cli.main([*command, "--dtype", "float16"]) == 2
    assert "--dtype: KernelBench's problems are float32" in capsys.readouterr().err
