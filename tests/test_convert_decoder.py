"""``convert(model, decoder=True)``: decoder blocks of MONAI and nnU-Net call ``up_concat``, and all else stays."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import tritonconv
from tritonconv import convert, decoders, restore
from tritonconv.lab.models import factories
from tritonconv.problem import PASSES

SHUFFLE = tuple(f"{name}_torch_shuffle" for name in PASSES)  # k = s; float64 has no other that writes the slice


@pytest.fixture
def called(monkeypatch):
    """The skip_first of each call of up_concat by a block."""
    calls, real = [], decoders.up_concat

    def noted(layer, x, skip, skip_first=False):
        calls.append(skip_first)
        return real(layer, x, skip, skip_first)

    monkeypatch.setattr(decoders, "up_concat", noted)
    return calls


def results(model, *inputs):
    """The outputs, and the gradients of the parameters."""
    with tritonconv.use(*SHUFFLE):
        y = model(*inputs)
    outputs = list(y) if isinstance(y, (list, tuple)) else [y]
    loss = sum((each * torch.linspace(-1, 1, each.numel(), dtype=each.dtype).view_as(each)).sum() for each in outputs)
    return [*outputs, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)]


def same_as(model, other, *inputs):
    for got, want in zip(results(model, *inputs), results(other, *inputs), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


# ------------------------------------------------------------------ nnU-Net


class Decoder(nn.Module):
    """As nnU-Net's UNetDecoder: stages from the coarsest on, each an upsampling, a concatenation and convolutions."""

    def __init__(self, deep_supervision=False, up=nn.ConvTranspose3d, conv=nn.Conv3d):
        super().__init__()
        self.deep_supervision = deep_supervision
        channels = [(4, 3), (3, 2)]
        self.transpconvs = nn.ModuleList(up(below, beside, 2, 2) for below, beside in channels)
        self.stages = nn.ModuleList(conv(2 * beside, beside, 3, padding=1) for _, beside in channels)
        self.seg_layers = nn.ModuleList(conv(beside, 2, 1) for _, beside in channels)

    def forward(self, skips):
        coarse, segmentations = skips[-1], []
        for number, stage in enumerate(self.stages):
            joined = torch.cat([self.transpconvs[number](coarse), skips[-(number + 2)]], dim=1)
            coarse = stage(joined)
            segmentations.append(self.seg_layers[number](coarse))
        return segmentations[::-1] if self.deep_supervision else segmentations[-1]


Decoder.__module__ = "dynamic_network_architectures.building_blocks.unet_decoder"
Decoder.__qualname__ = Decoder.__name__ = "UNetDecoder"


@pytest.fixture
def nnunet(monkeypatch):
    """The stand-in's forward is a known one."""
    path = f"{Decoder.__module__}.{Decoder.__qualname__}"
    block = decoders.BLOCKS[path]._replace(fingerprints=(decoders.fingerprint(Decoder.forward),))
    monkeypatch.setitem(decoders.BLOCKS, path, block)


def skips_of(n=1):
    return [torch.randn(n, c, *(extent * 2**level for extent in (1, 2, 1)), dtype=torch.float64)
            for c, level in ((2, 2), (3, 1), (4, 0))]  # fmt: skip


@pytest.mark.usefixtures("nnunet")
@pytest.mark.parametrize("deep", [False, True])
def test_nnunets_decoder(deep, called):
    original = Decoder(deep).double()
    model = copy.deepcopy(original)
    report = convert(model, decoder=True)
    assert [name for name, _ in report.replaced] == ["", "transpconvs.0", "transpconvs.1"] and not report.left
    assert "(the model itself): UNetDecoder, by up_concat" in str(report)
    same_as(model, original, skips_of())
    assert called == [False, False]
    restore(model)
    assert type(model) is Decoder
    same_as(model, original, skips_of())
    assert len(called) == 2


def test_nnunets_own_network_trains_as_before(called):
    pytest.importorskip("dynamic_network_architectures")
    torch.manual_seed(0)
    original = factories.network("nnunet", ((1, 1, 8, 8, 16),), "cpu").build().double()
    model = copy.deepcopy(original)
    report = convert(model, decoder=True)
    assert sum(text.endswith("by up_concat") for _, text in report.replaced) == 1 and len(report.replaced) == 3
    same_as(model, original, torch.randn(1, 1, 8, 8, 16, dtype=torch.float64))
    assert called == [False, False]


def test_another_versions_forward_is_declined():
    model = Decoder()
    report = convert(model, decoder=True)
    assert report.left == (("", "this version's UNetDecoder has a forward that tritonconv does not know"),)
    assert type(model) is Decoder and len(report.replaced) == 2


@pytest.mark.usefixtures("nnunet")
def test_a_decoder_that_cannot_use_it_says_why():
    subclass = type("Mine", (Decoder,), {})
    replaced = Decoder()
    replaced.forward = lambda skips: skips
    for model, filter_fn, reason in (
        (Decoder(up=nn.ConvTranspose2d, conv=nn.Conv2d), None, "upsamples by ConvTranspose2d, not by a transposed"),
        (Decoder(), lambda module, name: not name.endswith("1"), "its transposed convolution is not tritonconv's"),
        (subclass(), None, "Mine is a subclass of dynamic_network_architectures"),
        (replaced, None, "its forward was replaced on the object"),
    ):
        cls = type(model)
        left = dict(convert(model, filter_fn, decoder=True).left)
        assert reason in left[""] and type(model) is cls
    assert not dict(convert(Decoder()).left)  # nobody asked for blocks


class Noted:
    def forward(self, skips: list) -> torch.Tensor:
        """The same code as that of ``Plain``."""
        return skips[0]  # the first


class Plain:
    def forward(self, skips):
        return skips[0]


class Other:
    def forward(self, skips):
        return skips[1]


def test_a_fingerprint_is_of_the_code_alone():
    noted, plain, other = (decoders.fingerprint(each.forward) for each in (Noted, Plain, Other))
    assert noted == plain != other
    assert decoders.fingerprint(len) is None


# ------------------------------------------------------------------ MONAI


def monai(name):
    return getattr(pytest.importorskip("monai.networks.nets"), name)


def dynunet(**more):
    return monai("DynUNet")(3, 1, 2, [3, 3, 3], [1, 2, [2, 2, 1]], [2, [2, 2, 1]], filters=[2, 3, 4], **more).double()


def test_monais_dynunet_trains_as_before(called):
    torch.manual_seed(0)
    original = dynunet()
    model = copy.deepcopy(original)
    report = convert(model, decoder=True)
    assert sum(text.endswith("by up_concat") for _, text in report.replaced) == 2
    assert list(model.state_dict()) == list(original.state_dict())
    same_as(model, original, torch.randn(1, 1, 4, 8, 8, dtype=torch.float64))
    assert called == [False, False]
    again = convert(model, decoder=True)
    assert not again.replaced and all(text == "already tritonconv's" for _, text in again.left)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(each) for each in twin.modules()] == [type(each) for each in model.modules()]
        twin.load_state_dict(original.state_dict())
    assert restore(model).replaced and [type(m) for m in model.modules()] == [type(m) for m in original.modules()]


def blocks(name):
    """(x, skip, a block of MONAI's for them)"""
    pytest.importorskip("monai")
    from monai.networks.blocks import UnetrUpBlock, UnetUpBlock
    from monai.networks.nets.basic_unet import UpCat

    if name == "UpCat":
        block = UpCat(3, 4, 3, 2, "relu", "instance", True)
    elif name == "UnetrUpBlock":
        block = UnetrUpBlock(3, 4, 3, 3, 2, "instance")
    else:
        block = UnetUpBlock(3, 4, 3, 3, 1, 2, "instance")
    x, skip = (torch.randn(1, c, *size, dtype=torch.float64) for c, size in ((4, (2, 3, 2)), (3, (4, 6, 4))))
    return x, skip, block.double()


def test_upcat_pads_by_its_own_forward(called):
    x, skip, original = blocks("UpCat")
    model = copy.deepcopy(original)
    assert convert(model, decoder=True).replaced[0] == ("", "UpCat, by up_concat")
    same_as(model, original, x, skip)
    assert called == [True]
    same_as(model, original, x, torch.nn.functional.pad(skip, (0, 1, 0, 0, 0, 1)))
    assert called == [True]
    with pytest.raises(RuntimeError, match="to have 5 channels"):
        model(x, None)  # without a skip its convolutions have too few channels, as before


def test_what_stands_around_the_upsampling(called):
    x, skip, hooked = blocks("UnetUpBlock")
    from monai.networks.blocks import UnetUpBlock
    from monai.networks.nets.basic_unet import UpCat

    hooked.transp_conv.register_forward_hook(lambda module, args, y: y + 1)
    for block, reason in (
        (UpCat(3, 4, 3, 2, "relu", "instance", True, upsample="nontrainable"), "its upsampling is Conv3d, Upsample"),
        (UpCat(3, 4, 3, 2, "relu", "instance", True, upsample="pixelshuffle"), "by SubpixelUpsample"),
        (UnetUpBlock(3, 4, 3, 3, 1, 2, "instance", dropout=0.5), "its upsampling is ConvTranspose3d, ADN"),
        (UnetUpBlock(2, 4, 3, 3, 1, 2, "instance"), "by ConvTranspose2d"),
        (hooked, "hooks, or a forward of its own, are on the Convolution around"),
    ):
        assert reason in dict(convert(block, decoder=True).left)[""]
    x, skip, block = blocks("UnetUpBlock")
    original = copy.deepcopy(block)
    convert(block, decoder=True)
    for each in (block, original):  # after the conversion
        each.transp_conv.register_forward_hook(lambda module, args, y: y + 1)
    same_as(block, original, x, skip)
    assert called == []


def test_a_block_under_tools(called):
    x, skip, original = blocks("UnetUpBlock")
    block = copy.deepcopy(original)
    convert(block, decoder=True)
    same_as(torch.compile(block, backend="aot_eager", fullgraph=True), original, x, skip)
    scripted = torch.jit.script(block)
    torch.testing.assert_close(scripted(x, skip), original(x, skip))
    torch.testing.assert_close(torch.fx.symbolic_trace(block)(x, skip), original(x, skip))
    called.clear()
    same_as(block, original, x, skip)
    assert called == [False]


def test_unetrs_block(called):
    x, skip, original = blocks("UnetrUpBlock")
    block = copy.deepcopy(original)
    assert convert(block, decoder=True).replaced[0] == ("", "UnetrUpBlock, by up_concat")
    same_as(block, original, x, skip)
    assert called == [False]
