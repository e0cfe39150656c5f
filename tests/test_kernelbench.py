"""KernelBench's layers beside the published figures. CPU only."""

from __future__ import annotations

from tests.test_results import ENVIRONMENT, result
from tritonconv.lab.bench import kernelbench
from tritonconv.lab.bench.results import Writer, read
from tritonconv.lab.bench.workloads import workloads


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
        for name, gain, same in (("l1_72", 2.0, ["kernelbench_l1_61"]), ("l1_70", 8.0, []), ("l2_26", 3.0, [])):
            for variant, ratio in (("torch", 1.0), ("tritonconv", gain)):
                writer.write("result", result(f"kernelbench_{name}", variant, ratio, duplicates=same))
                whole = {"model": f"kernelbench_{name}", "inputs": "1", "timing": "gpu"}
                if name == "l2_26":
                    writer.write("problem", {**whole, **result(variant=variant, speedup=ratio, fused=["residual"])})
        wrong = {"layer": "kernelbench_l1_77", "pass": "forward", "variant": "tritonconv", "message": "off"}
        writer.write("error", {**wrong, "status": "wrong"})
    text = kernelbench.text(read(writer.path))
    first, second = text.index("level 1"), text.index("level 2")
    assert "products of both sides: tf32" in text[:first] and "wrong: tritonconv on kernelbench_l1_77" in text
    assert "geometric mean 3.17, least 2.00 (kernelbench_l1_72)" in text[first:second]
    assert "fast_0 75%, fast_1 75%, fast_2 25%, fast_4 25%, fast_8 0%, of 4 problems" in text[first:second]
    assert "CUDA-L1 on an H100: l1_61 2.06, l1_70 3.2, l1_77 1.4" in text[first:second]
    assert "KernelBench's leaderboard: no right answer" in text[first:second]
    assert "geometric mean 3.00" in text[second:] and "of 1 problems" in text[second:]
    assert "kernelbench_l2_26  residual" in text[second:] and "2.82 / 2.82" in text[first:second]
    assert text.index("kernelbench_l1_61 ") < text.index("kernelbench_l1_70 ") < text.index("kernelbench_l1_72 ")
