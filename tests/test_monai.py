"""MONAI's networks, converted: outputs, gradients, state dicts and training as with torch's own layers.

Converted layers sum the same float32 products in another order. No constant bounds the growth of those roundings behind
the normalizations of a network, so torch gives the bound: the same network in float64 is the truth, and the converted
one may be off by at most 4 times the error of torch's own float32. Two terms cover torch's luck: 1e-5 of the compared
tensor's norm (about 80 roundings), and 1e-6 of the largest gradient's norm, because the gradient of a bias in front of
a normalization is zero in truth and nothing but roundings in float32.
"""

import copy

import pytest
import torch
from torch import nn

from tritonconv.convert import convert
from tritonconv.layer import ConvTranspose3d

nets = pytest.importorskip("monai.networks.nets")

# The smallest sizes whose deepest level keeps two voxels, which normalization needs in training.
NETWORKS = {
    "BasicUNet": (lambda: nets.BasicUNet(3, 1, 2, features=(4, 4, 4, 4, 8, 4)), (32, 16, 16)),
    "UNet": (lambda: nets.UNet(3, 1, 2, channels=(4, 8, 8), strides=(2, 2), num_res_units=1), (8, 8, 8)),
    "UNETR": (
        lambda: nets.UNETR(1, 2, (16, 16, 16), feature_size=4, hidden_size=12, mlp_dim=16, num_heads=2),
        (16, 16, 16),
    ),
    "SwinUNETR": (
        lambda: nets.SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=2),
        (64, 32, 32),
    ),
    "VNet": (lambda: nets.VNet(3, 1, 2), (32, 16, 16)),
    "DynUNet": (
        lambda: nets.DynUNet(3, 1, 2, [3, 3, 3], [1, 2, [2, 2, 1]], [2, [2, 2, 1]], filters=[4, 8, 8]),
        (8, 8, 8),
    ),
}


@pytest.fixture(params=NETWORKS)
def trio(request):
    """The network converted, with torch's layers, and with torch's layers in float64; an image and a target."""
    build, size = NETWORKS[request.param]
    torch.manual_seed(0)
    network = build()
    for module in network.modules():
        if isinstance(module, nn.Dropout3d):  # VNet has some that no argument turns off
            module.p = 0.0
    exact, converted = copy.deepcopy(network).double(), copy.deepcopy(network)
    assert convert(converted).replaced
    return converted, network, exact, torch.randn(1, 1, *size), torch.randn(1, 2, *size)


def norm(values):
    return torch.linalg.vector_norm(values).item()


def off(values, truth):
    return norm(values.double() - truth)


def assert_as_good(converted, torchs, exact, what, largest=0.0):
    limit = 4 * off(torchs, exact) + 1e-5 * norm(exact) + 1e-6 * largest
    assert off(converted, exact) <= limit, f"{what}: off by {off(converted, exact):.3g}, allowed {limit:.3g}"


def test_outputs_and_gradients(trio):
    *networks, x, target = trio
    results = []
    for network in networks:
        image = x.to(next(network.parameters()).dtype, copy=True).requires_grad_()
        y = network(image)
        (y * target).sum().backward()
        results.append([y.detach(), image.grad, *(p.grad for p in network.parameters())])
    names = ["output", "image", *(name for name, _ in networks[0].named_parameters())]
    layers = [name for name, module in networks[0].named_modules() if type(module) is ConvTranspose3d]
    assert any(f"{layer}.weight" in names for layer in layers)
    largest = max(norm(gradient) for gradient in results[-1][1:] if gradient is not None)
    for name, *values in zip(names, *results, strict=True):
        if any(value is None for value in values):
            assert all(value is None for value in values), name
            continue
        assert_as_good(*values, name, largest)


def test_state_dict_both_ways(trio):
    converted, network, *_ = trio
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(0.01)
    network.load_state_dict(converted.state_dict(), strict=True)
    for name, values in network.state_dict().items():
        assert torch.equal(values, converted.state_dict()[name])
    converted.load_state_dict(network.state_dict(), strict=True)
    assert list(converted.state_dict()) == list(network.state_dict())


@pytest.mark.parametrize("trio", ["UNet", "SwinUNETR", "DynUNet"], indirect=True)
def test_three_steps_of_training(trio):
    *networks, x, target = trio
    losses = []
    for network in networks:
        dtype = next(network.parameters()).dtype
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        losses.append([])
        for _ in range(3):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(network(x.to(dtype)), target.to(dtype))
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    converted, torchs, exact = (torch.tensor(each, dtype=torch.float64) for each in losses)
    assert exact.diff().abs().min() > 1e-4
    assert_as_good(converted, torchs, exact, "losses")
