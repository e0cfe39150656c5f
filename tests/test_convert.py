"""convert and restore: the class changes, everything else of a model stays."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from tritonconv.convert import ConversionReport, convert, restore
from tritonconv.layer import ConvTranspose3d, LazyConvTranspose3d


class Subclass(nn.ConvTranspose3d):
    """Adds a method, keeps torch's forward."""

    def double_bias(self):
        return self.bias * 2


class OwnForward(nn.ConvTranspose3d):
    def forward(self, input, output_size=None):
        return super().forward(input, output_size) + 1


def up(c_in=2, c_out=3, **arguments):
    return nn.ConvTranspose3d(c_in, c_out, 2, stride=2, **arguments)


def make():
    return nn.Sequential(nn.Conv3d(1, 2, 1), up(), nn.Sequential(nn.ReLU(), up(3, 2, bias=False)))


def image(channels=1, **arguments):
    return torch.randn(1, channels, 2, 3, 2, **arguments)


def names(rows):
    return [name for name, _ in rows]


def same_results(model, other, x):
    """Both models give one output and one set of gradients, up to rounding."""
    results = []
    for each in (model, other):
        leaf = x.clone().requires_grad_()
        y = each(leaf)
        wanted = [p for p in each.parameters() if p.requires_grad]
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *wanted])])
    torch.testing.assert_close(*results)


def test_replaces_and_restores_in_place():
    model = make()
    original, layers = copy.deepcopy(model), list(model.modules())
    report = convert(model)
    assert isinstance(report, ConversionReport)
    assert report.model is model
    assert names(report.replaced) == ["1", "2.1"]
    assert report.left == ()
    assert all(new is old for new, old in zip(model.modules(), layers, strict=True))
    assert type(model[1]) is type(model[2][1]) is ConvTranspose3d
    same_results(model, original, image())
    report = restore(model)
    assert names(report.replaced) == ["1", "2.1"]
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    same_results(model, original, image())


def test_both_are_idempotent():
    model = make()
    assert restore(model).left == (("1", "not tritonconv's"), ("2.1", "not tritonconv's"))
    convert(model)
    again = convert(model)
    assert again.replaced == ()
    assert again.left == (("1", "already tritonconv's"), ("2.1", "already tritonconv's"))
    restore(model)
    assert restore(model).replaced == ()


def test_the_report_reads_well():
    report = convert(nn.Sequential(up(), OwnForward(2, 3, 2)))
    assert str(report).splitlines() == [
        "1 replaced, 1 left",
        "  replaced  0: ConvTranspose3d(2, 3, kernel_size=(2, 2, 2), stride=(2, 2, 2))",
        f"  left      1: {__name__}.OwnForward has a forward of its own",
    ]
    assert "(the model itself): ConvTranspose3d" in str(convert(up()))
    assert "model=" not in repr(report)


def test_the_model_itself_can_be_the_layer():
    layer = up()
    report = convert(layer)
    assert report.model is layer
    assert type(layer) is ConvTranspose3d
    assert names(report.replaced) == [""]
    assert type(restore(layer).model) is nn.ConvTranspose3d


def test_state_of_the_layer_stays():
    model = make().double().eval()
    layer = model[1]
    layer.weight.requires_grad_(False)
    layer.note = "mine"
    weight, bias = layer.weight, layer.bias
    convert(model)
    assert layer.weight is weight
    assert layer.bias is bias
    assert layer.note == "mine"
    assert not layer.training
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    assert layer.weight.dtype is torch.float64
    assert model(image(dtype=torch.float64)).dtype is torch.float64


def test_tied_parameters_and_shared_layers_stay_so():
    shared = up(2, 2)
    tied = up(2, 2)
    tied.weight = shared.weight
    model = nn.ModuleDict({"first": shared, "second": tied, "again": shared})
    original = copy.deepcopy(model)
    assert names(convert(model).replaced) == ["first", "second"]
    assert model["again"] is model["first"]
    assert model["second"].weight is model["first"].weight
    for layers in (model, original):
        layers["again"](layers["second"](layers["first"](torch.ones(1, 2, 2, 2, 2)))).sum().backward()
    torch.testing.assert_close(model["first"].weight.grad, original["first"].weight.grad)


def test_hooks_keep_firing():
    model = make()
    seen = []
    handles = [
        model[1].register_forward_pre_hook(lambda *_: seen.append("pre")),
        model[1].register_forward_hook(lambda *_: seen.append("forward")),
        model[1].register_full_backward_hook(lambda *_: seen.append("backward")),
        model[1].weight.register_hook(lambda grad: seen.append("gradient")),
    ]
    convert(model)
    model(image()).sum().backward()
    assert sorted(seen) == ["backward", "forward", "gradient", "pre"]
    for handle in handles:
        handle.remove()
    model(image()).sum().backward()
    assert len(seen) == 4


def test_an_optimizer_made_before_keeps_training():
    model = make()
    original = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (model, original)]
    x = image()
    for step in range(3):
        if step == 1:
            convert(model)
        for each, optimizer in zip((model, original), optimizers, strict=True):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model.state_dict(), original.state_dict())


def test_subclasses_are_left_unless_admitted():
    model = nn.Sequential(up(), Subclass(2, 3, 2), OwnForward(2, 3, 2))
    report = convert(model)
    assert names(report.replaced) == ["0"]
    assert report.left == (
        ("1", f"{__name__}.Subclass is a subclass of torch's; a filter_fn can admit it"),
        ("2", f"{__name__}.OwnForward has a forward of its own"),
    )
    restore(model)
    asked = []
    report = convert(model, filter_fn=lambda module, name: asked.append((name, module)) or name != "0")
    assert asked == [("0", model[0]), ("1", model[1]), ("2", model[2])]
    assert names(report.replaced) == ["1"]
    assert report.left == (("0", "filter_fn declined it"), ("2", f"{__name__}.OwnForward has a forward of its own"))


def test_an_admitted_subclass_keeps_its_methods_and_comes_back():
    model = nn.Sequential(Subclass(2, 3, 2, stride=2))
    original = copy.deepcopy(model)
    convert(model, filter_fn=lambda module, name: True)
    layer, converted = model[0], type(model[0])
    assert isinstance(layer, Subclass)
    assert isinstance(layer, ConvTranspose3d)
    assert converted.forward is ConvTranspose3d.forward
    assert torch.equal(layer.double_bias(), layer.bias * 2)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[0]) is converted
        same_results(twin, original, image(2))
        restore(twin)
        assert type(twin[0]) is Subclass


def test_a_failing_filter_changes_nothing():
    model = make()
    with pytest.raises(ZeroDivisionError):
        convert(model, filter_fn=lambda module, name: name == "1" or 1 / 0)
    assert type(model[1]) is nn.ConvTranspose3d


def test_a_replaced_forward_is_left():
    layer = up()
    layer.forward = lambda x: x
    assert convert(layer).left == (("", "its forward was replaced on the object"),)
    assert type(layer) is nn.ConvTranspose3d


def test_layers_built_as_ours():
    model = nn.Sequential(ConvTranspose3d(2, 3, 2))
    assert convert(model).left == (("0", "already tritonconv's"),)
    restore(model)
    assert type(model[0]) is nn.ConvTranspose3d

    class Mine(ConvTranspose3d):
        pass

    report = restore(Mine(2, 3, 2))
    assert report.replaced == ()
    assert report.left[0][1].endswith("Mine is a subclass of tritonconv's")


def test_lazy_layers():
    model = nn.Sequential(nn.LazyConvTranspose3d(3, 2), nn.LazyConvTranspose3d(3, 2))
    convert(model)
    assert type(model[0]) is type(model[1]) is LazyConvTranspose3d
    model[0](image(2))
    assert type(model[0]) is ConvTranspose3d
    assert model[0].in_channels == 2
    restore(model)
    assert type(model[0]) is nn.ConvTranspose3d
    assert type(model[1]) is nn.LazyConvTranspose3d
    model[1](image(2))
    assert type(model[1]) is nn.ConvTranspose3d


@pytest.mark.parametrize("register", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_layers(register):
    model = nn.Sequential(register(up()))
    bystander = copy.deepcopy(model)
    original = copy.deepcopy(model)
    # Power iteration moves spectral_norm's buffers in training mode; evaluate from one state.
    for each in (model, bystander, original):
        each.eval()
    convert(model)
    layer = model[0]
    assert isinstance(layer, ConvTranspose3d)
    assert parametrize.type_before_parametrizations(layer) is ConvTranspose3d
    assert not isinstance(bystander[0], ConvTranspose3d)
    same_results(model, original, image(2))
    same_results(copy.deepcopy(model), original, image(2))
    assert list(model.state_dict()) == list(original.state_dict())
    restore(model)
    assert parametrize.type_before_parametrizations(layer) is nn.ConvTranspose3d
    same_results(model, original, image(2))
    convert(model)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is ConvTranspose3d
    same_results(bystander, original, image(2))


def test_a_layer_parametrized_after_conversion():
    model = nn.Sequential(up())
    convert(model)
    parametrizations.weight_norm(model[0])
    assert convert(model).left == (("0", "already tritonconv's"),)
    restore(model)
    assert parametrize.type_before_parametrizations(model[0]) is nn.ConvTranspose3d


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
def test_weight_norm_by_hooks():
    layer = nn.utils.weight_norm(up())
    original = nn.utils.weight_norm(up())
    original.load_state_dict(layer.state_dict())
    convert(layer)
    same_results(layer, original, image(2))


def test_copy_pickle_and_state_dict():
    x = image()
    model = make()
    original = copy.deepcopy(model)
    convert(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[1]) is ConvTranspose3d
        assert twin[1].weight is not model[1].weight
        assert torch.equal(twin(x), model(x))
    fresh = make()
    fresh.load_state_dict(model.state_dict())
    same_results(fresh, model, x)
    convert(fresh)
    fresh.load_state_dict(make().state_dict())
    fresh.load_state_dict(original.state_dict())
    same_results(fresh, original, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_kinds_of_model_do_not_fail():
    traced = torch.fx.symbolic_trace(make())
    original = copy.deepcopy(traced)
    assert names(convert(traced).replaced) == ["1", "2.1"]
    same_results(traced, original, image())
    report = convert(torch.jit.script(make()))
    assert report.replaced == ()
    assert names(report.left) == ["1", "2.1"]
    compiled = torch.compile(make(), backend="eager")
    assert names(convert(compiled).replaced) == ["_orig_mod.1", "_orig_mod.2.1"]


def test_refuses_what_is_no_model():
    with pytest.raises(TypeError, match=r"convert: model expects a torch\.nn\.Module, got type"):
        convert(nn.ConvTranspose3d)
    with pytest.raises(TypeError, match="filter_fn"):
        convert(make(), filter_fn="1")
    with pytest.raises(TypeError, match="restore: model"):
        restore(None)
