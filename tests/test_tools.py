"""A converted model under the tools that look at layers: each answers as for torch's layer, or names ``restore``."""

from __future__ import annotations

import copy
import importlib
import io
import sys
import warnings

import pytest
import torch
import torch.ao.quantization as quantization
from torch import nn
from torch.ao.quantization import quantize_fx

import tritonconv

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")


class Decoder(nn.Module):
    """Down and up again to the size of the input, whatever that is."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv3d(1, 2, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose3d(2, 1, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor):
        return self.up(self.down(x), output_size=[x.size(2), x.size(3), x.size(4)])


def plain() -> nn.Module:
    up = nn.ConvTranspose3d(3, 2, 3, stride=2, padding=1, output_padding=1)
    return nn.Sequential(nn.Conv3d(3, 3, 1), up, nn.BatchNorm3d(2)).eval()


def both(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The model, and a converted copy."""
    converted = copy.deepcopy(model)
    assert tritonconv.convert(converted).replaced
    return model, converted


def image(*size: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(1, channels, *size)


# ------------------------------------------------------------------ torch.fx


def kinds(graph: torch.fx.Graph) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in graph.nodes]


@pytest.mark.parametrize("model", [plain, Decoder])
def test_fx_records_a_leaf_as_of_torchs_layer(model):
    torchs, ours = map(torch.fx.symbolic_trace, both(model()))
    assert kinds(ours.graph) == kinds(torchs.graph)
    assert any(type(module) is tritonconv.ConvTranspose3d for module in ours.modules())
    again = torch.fx.Transformer(torch.fx.symbolic_trace(ours)).transform()
    for size in ((4, 5, 6), (5, 6, 7)):
        x = image(*size, channels=next(ours.parameters()).shape[1])
        torch.testing.assert_close(again(x), torchs(x))


def test_fx_records_matlabs_layer_as_a_leaf():
    layer = tritonconv.TransposedConv3dLayer(3, 2, stride=2, cropping="same", num_channels=3)
    graph = torch.fx.symbolic_trace(nn.Sequential(layer))
    assert kinds(graph.graph)[1] == ("call_module", "0")
    x = image(2, 3, 2)
    assert torch.equal(graph(x), layer(x))


def test_fx_traces_into_the_layer_where_it_traces_into_torchs():
    class Through(torch.fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return False

    torchs, ours = (Through().trace(model[:2]) for model in both(plain()))
    assert [target for op, target in kinds(ours) if op == "get_attr"] == [
        target for op, target in kinds(torchs) if op == "get_attr"
    ]
    assert not any(op == "call_module" for op, _ in kinds(ours))
    root = torch.fx.symbolic_trace(both(nn.ConvTranspose3d(1, 1, 2))[1], concrete_args={"output_size": None})
    assert not any(op == "call_module" for op, _ in kinds(root.graph))


def test_fx_runs_a_hook_once():
    torchs, ours = both(plain())
    for model in (torchs, ours):
        model[1].register_forward_hook(lambda layer, args, y: 2 * y)
    x = image(3, 4, 3)
    torch.testing.assert_close(torch.fx.symbolic_trace(ours)(x), torchs(x))
    _, ours = both(Decoder())
    ours.up.register_forward_hook(lambda layer, args, y: 2 * y)
    with pytest.raises(
        tritonconv.ArgumentTypeError, match=r"'up': with hooks .* call tritonconv.restore\(model\) first"
    ):
        torch.fx.symbolic_trace(ours)


def test_fx_of_a_layer_without_channels_says_what_to_do():
    for layer in (tritonconv.TransposedConv3dLayer(3, 2), tritonconv.LazyConvTranspose3d(2, 3)):
        with pytest.raises(tritonconv.ArgumentTypeError, match="run one forward first"):
            torch.fx.symbolic_trace(nn.Sequential(layer))
        layer(image(2, 2, 2))
        assert kinds(torch.fx.symbolic_trace(nn.Sequential(layer)).graph)[1] == ("call_module", "0")


# ------------------------------------------------------------------ torch.jit


@pytest.mark.parametrize("model", [plain, Decoder])
def test_jit_script_compiles_the_layer(model):
    torchs, ours = both(model())
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(ours), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for size in ((4, 5, 6), (5, 6, 7)):
        x = image(*size, channels=next(ours.parameters()).shape[1])
        assert torch.equal(loaded(x), torchs(x))


def test_jit_script_of_matlabs_layer_says_what_to_do():
    with pytest.raises(tritonconv.ArgumentTypeError, match=r"torch.jit.trace and torch.export record it"):
        torch.jit.script(nn.Sequential(tritonconv.TransposedConv3dLayer(3, 2, num_channels=1)))


def traced(model: nn.Module, x: torch.Tensor) -> tuple[torch.jit.ScriptModule, int]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        graph = torch.jit.trace(model, x)
    return graph, sum(issubclass(each.category, torch.jit.TracerWarning) for each in said)


@pytest.mark.parametrize("model", [plain, Decoder])
def test_jit_trace_warns_no_more_than_of_torchs_layer(model):
    torchs, ours = both(model())
    (want, expected), (got, warned) = (traced(each, image(4, 5, 6, channels=3 if model is plain else 1))
                                       for each in (torchs, ours))  # fmt: skip
    assert warned == expected and (model is Decoder or warned == 0)
    for size in ((4, 5, 6), (5, 6, 7)):
        x = image(*size, channels=3 if model is plain else 1)
        assert torch.equal(got(x), want(x))


@pytest.mark.parametrize("size", [(1, 3, 2, 3, 2), (3, 2, 3, 2)], ids=["batched", "unbatched"])
def test_jit_trace_of_two_crops_serves_other_sizes(size):
    layer = tritonconv.TransposedConv3dLayer(4, 2, stride=1, cropping=[[3, 0, 1], [0, 1, 1]], num_channels=3)
    graph, warned = traced(layer, torch.randn(size))
    assert warned == 0
    x = torch.randn(*size[:-3], 5, 6, 7)
    torch.testing.assert_close(graph(x), layer(x))


# ------------------------------------------------------------------ counters that look a layer up by its class


@pytest.mark.parametrize(
    ("package", "module", "table"),
    [("thop", "profile", "register_hooks"), ("ptflops", "pytorch_ops", "MODULES_MAPPING")],
)
def test_a_counters_table_has_our_class_as_soon_as_it_is_imported(package, module, table, monkeypatch, tmp_path):
    """Beside stand-ins with the tables of thop 0.1.1 and ptflops 0.7.5."""
    assert issubclass(tritonconv.FusedConvTranspose3d, tritonconv.ConvTranspose3d)  # its first use loads it
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(f"from .{module} import *\n")
    source = f"from torch import nn\n{table} = {{nn.ConvTranspose3d: 'counts it', nn.Conv3d: 'another'}}\n"
    (tmp_path / package / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in (package, f"{package}.{module}"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        entries = getattr(importlib.import_module(f"{package}.{module}"), table)
    finally:
        for name in (package, f"{package}.{module}"):
            sys.modules.pop(name, None)
    assert entries == {
        nn.ConvTranspose3d: "counts it", tritonconv.ConvTranspose3d: "counts it", nn.Conv3d: "another",
        tritonconv.FusedConvTranspose3d: "counts it",
    }  # fmt: skip


@pytest.mark.parametrize("layer", [(2, 2, 0), (3, 2, 1), (1, 1, 0)], ids=["k2 s2", "k3 s2", "k1 s1"])
def test_a_formulation_calls_no_function_that_ptflops_counts_besides_the_layer(layer, monkeypatch):
    kernel, stride, padding = layer
    model = tritonconv.ConvTranspose3d(4, 3, kernel, stride, padding)
    x, ran = image(2, 3, 2, channels=4), 0
    want = model(x)

    def counted(*operands, **more):
        raise AssertionError("counted besides the layer")

    for name in ("matmul", "mm", "bmm", "addmm", "mul", "add"):
        monkeypatch.setattr(torch, name, counted)
        monkeypatch.setattr(torch.Tensor, name, counted)
    monkeypatch.setattr(torch, "baddbmm", counted)
    for variant in tritonconv.variants():
        if variant.backend == "torch" and variant.pass_name == "forward":
            with tritonconv.use(variant.name), torch.no_grad():
                try:
                    y = model(x)
                except tritonconv.VariantNotApplicable:
                    continue
            ran += 1
            torch.testing.assert_close(y, want)
    assert ran >= 3


# ------------------------------------------------------------------ quantization and fusion


def statically_quantized(model: nn.Module, x: torch.Tensor, **more) -> nn.Module:
    model = nn.Sequential(quantization.QuantStub(), model[1], quantization.DeQuantStub()).eval()
    model.qconfig = quantization.QConfig(
        activation=quantization.default_observer, weight=quantization.default_weight_observer
    )
    quantization.prepare(model, inplace=True)(x)
    return quantization.convert(model, inplace=True, **more)


@pytest.mark.parametrize("more", [{}, {"is_reference": True}], ids=["quantized", "reference"])
def test_eager_quantization_makes_torchs_quantized_layer(more):
    x = image(4, 4, 4)
    torchs, ours = (statically_quantized(model, x, **more) for model in both(plain()))
    assert type(ours[1]) is type(torchs[1]) is not nn.ConvTranspose3d
    got, want = ours[1].state_dict(), torchs[1].state_dict()
    assert list(got) == list(want) and torch.equal(got["weight"], want["weight"])
    if not more:  # torch runs the reference in graphs alone
        assert torch.equal(ours(x), torchs(x))


def test_quantization_with_a_mapping_of_its_own_names_restore():
    x = image(4, 4, 4)
    _, ours = both(plain())
    mapping = {quantization.QuantStub: nn.quantized.Quantize, quantization.DeQuantStub: nn.quantized.DeQuantize}
    model = statically_quantized(ours, x, mapping=mapping)
    with pytest.raises(tritonconv.ArgumentTypeError, match=r"quantize after tritonconv.restore\(model\)"):
        model(x)


@pytest.mark.parametrize("model", [plain, Decoder])
def test_fx_quantization_names_restore(model):
    """It would leave the layer as floating point, and the batch norm behind it apart."""
    torchs, ours = both(model().eval())
    x = image(4, 4, 4, channels=next(ours.parameters()).shape[1])
    mapping = quantization.get_default_qconfig_mapping()
    with pytest.raises(tritonconv.ArgumentTypeError, match=r"call tritonconv.restore\(model\) first"):
        quantize_fx.prepare_fx(ours, mapping, (x,))
    tritonconv.restore(ours)
    if model is Decoder:  # torch's quantized layer takes no output_size
        return
    results = []
    for each in (torchs, ours):
        prepared = quantize_fx.prepare_fx(each, mapping, (x,))
        prepared(x)
        results.append(quantize_fx.convert_fx(prepared)(x))
    assert torch.equal(*results)


def test_fuse_modules_folds_the_batch_norm():
    x = image(4, 5, 6)
    torchs, ours = both(plain())
    for model in (torchs, ours):
        model[2].running_mean.normal_()
        torch.manual_seed(0)
        model[2].running_var.uniform_(1, 2)
    ours[2].load_state_dict(torchs[2].state_dict())
    want = torchs(x)
    fused = quantization.fuse_modules(ours, [["1", "2"]])
    assert type(fused[1]) is tritonconv.ConvTranspose3d and isinstance(fused[2], nn.Identity)
    torch.testing.assert_close(fused(x), want)


# ------------------------------------------------------------------ wrappers and files


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def one_step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The parameters after a step of SGD, and the gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    values = [value for p in model.parameters() for value in (p.detach(), p.grad)]
    return [value.full_tensor() if hasattr(value, "full_tensor") else value for value in values]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_distributed_wrappers(alone, wrapper):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def wrap(model):
        if wrapper == "DDP":
            return nn.parallel.DistributedDataParallel(model)
        fully_shard(model[1], mesh=init_device_mesh("cpu", (1,)))
        return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))

    x = image(3, 4, 3)
    torchs, ours = both(plain())
    wrapped = wrap(ours)
    torch.testing.assert_close(one_step(wrapped, x), one_step(torchs, x))
    if wrapper == "FSDP2":  # which gives the layer a class of its own
        assert dict(tritonconv.restore(ours).left)["1"] == "sharded by torch.distributed"
        late = wrap(plain())
        assert dict(tritonconv.convert(late).left)["1"] == "sharded by torch.distributed; convert before that"


def test_averaged_model_averages():
    x, averages = image(3, 4, 3), []
    for model in both(plain()):
        average = torch.optim.swa_utils.AveragedModel(model)
        for _ in range(2):
            one_step(model, x)
            average.update_parameters(model)
        averages.append(average(x))
    torch.testing.assert_close(*averages)


def test_weights_only_loading():
    torchs, ours = both(plain())
    for saved, reader in ((torchs, both(plain())[1]), (ours, plain())):
        buffer = io.BytesIO()
        torch.save(saved.state_dict(), buffer)
        buffer.seek(0)
        reader.load_state_dict(torch.load(buffer, weights_only=True))
        x = image(3, 4, 3)
        torch.testing.assert_close(reader(x), saved(x))
    buffer = io.BytesIO()
    torch.save(ours[1], buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals([tritonconv.ConvTranspose3d, set]):
        loaded = torch.load(buffer, weights_only=True)
    assert type(loaded) is tritonconv.ConvTranspose3d
    assert torch.equal(loaded.weight, ours[1].weight)
