"""torch's transforms, exporters, tracers, counters and tensor subclasses around the operation. Runs on the CPU.

Where our variants could run they are forced, because tiny problems go to torch itself by default.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from beside_torch import HYPER, PHASES, close, f64, operands, ours, theirs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import tritonconv


def layers(**more):
    """Our layer and torch's, the same parameters."""
    torch.manual_seed(0)
    mine = tritonconv.ConvTranspose3d(3, 4, (3, 4, 3), **HYPER, **more)
    own = torch.nn.ConvTranspose3d(3, 4, (3, 4, 3), **HYPER, **more)
    own.load_state_dict(mine.state_dict())
    return mine, own


def gradients(function, args):
    leaves = [t.detach().clone().requires_grad_() for t in args]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y.square().sum(), leaves)


# ------------------------------------------------------------------ torch.func


@pytest.mark.parametrize(
    "in_dims", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0), (2, 1, 1), (-1, None, 0)]
)
def test_vmap(variants, in_dims):
    single = operands()
    args = [torch.stack([t, -t, 2 * t], dim=0) if d is not None else t for t, d in zip(single, in_dims, strict=True)]
    args = [t if d is None else t.movedim(0, d) for t, d in zip(args, in_dims, strict=True)]
    assert torch.allclose(vmap(ours, in_dims)(*args), vmap(theirs, in_dims)(*args))
    assert vmap(ours, in_dims)(*args).shape == (3, 2, 4, 4, 7, 4)


def test_forward_and_reverse_transforms(variants):
    args, tangents = operands(), operands()
    for got, want in zip(jvp(ours, args, tangents), jvp(theirs, args, tangents), strict=True):
        close(got, want)
    cotangent = torch.randn_like(theirs(*args))
    for got, want in zip(vjp(ours, *args)[1](cotangent), vjp(theirs, *args)[1](cotangent), strict=True):
        close(got, want)
    small = operands(1, (1, 2, 1))
    for transform in (jacrev, jacfwd):
        for got, want in zip(transform(ours, (0, 2))(*small), transform(theirs, (0, 2))(*small), strict=True):
            close(got, want)
    close(
        hessian(lambda w: ours(small[0], w).pow(3).sum())(small[1]),
        hessian(lambda w: theirs(small[0], w).pow(3).sum())(small[1]),
    )


def test_per_sample_gradients_and_functional_call(variants):
    mine, own = (module.double() for module in layers())
    x, parameters = operands(3)[0], {name: 2 * p.detach() for name, p in mine.named_parameters()}

    def loss(module):
        return lambda p, one: functional_call(module, p, (one[None],)).square().sum()

    got, want = (vmap(grad(loss(module)), in_dims=(None, 0))(parameters, x) for module in (mine, own))
    assert got["weight"].shape == (3, 3, 4, 3, 4, 3)
    for name in parameters:
        close(got[name], want[name])


def test_forward_mode_dual_tensors(variants):
    args, tangents = operands(), operands()
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, tangent) for t, tangent in zip(args, tangents, strict=True)]
        got, want = forward_ad.unpack_dual(ours(*duals)), forward_ad.unpack_dual(theirs(*duals))
    close(got.tangent, want.tangent)
    close(got.primal, want.primal)


# ------------------------------------------------------------------ export and tracing


def targets(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_export_with_a_dynamic_batch_needs_only_torch(tmp_path):
    mine, _ = layers()
    x = torch.randn(3, 3, 2, 3, 2)
    program = torch.export.export(mine, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    found = targets(program.graph)
    assert sum("conv_transpose3d" in target or "convolution" in target for target in found) == 1
    assert not any("tritonconv" in target for target in found)
    for n in (1, 5):
        one = torch.randn(n, 3, 2, 3, 2)
        close(program.module()(one), mine(one))
    torch.export.save(program, tmp_path / "layer.pt2")
    torch.save((x, mine(x).detach()), tmp_path / "data.pt")
    script = (
        "import sys; sys.modules['tritonconv'] = None; import torch;"
        f"x, y = torch.load(r'{tmp_path / 'data.pt'}'); m = torch.export.load(r'{tmp_path / 'layer.pt2'}').module();"
        "assert torch.allclose(m(x), y, atol=1e-5); print('same')"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
def test_onnx_export_is_one_node(dynamo):
    import onnx
    import onnxruntime

    mine, _ = layers()
    x, buffer = torch.randn(2, 3, 2, 3, 2), io.BytesIO()
    torch.onnx.export(mine, (x,), buffer, dynamo=dynamo, input_names=["x"], output_names=["y"])
    model = onnx.load_from_string(buffer.getvalue())
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("ConvTranspose") == 1
    assert set(kinds) <= {"ConvTranspose", "Constant", "Identity"}
    (y,) = onnxruntime.InferenceSession(buffer.getvalue()).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(y, mine(x).detach().numpy(), rtol=1e-4, atol=1e-5)


class Decoder(torch.nn.Module):
    """Down and up again to the size of the input, whatever that is."""

    def __init__(self, kind):
        super().__init__()
        self.down = torch.nn.Conv3d(1, 2, 3, stride=2, padding=1)
        self.up = kind(2, 1, 3, stride=2, padding=1)

    def forward(self, x):
        return self.up(self.down(x), output_size=x.shape[2:])


def exported(model, x):
    axis = torch.export.Dim("depth", min=2, max=64)
    return torch.export.export(model, (x,), dynamic_shapes=({2: axis},)).module()


def exported_to_onnx(model, x):
    import onnxruntime

    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=({2: "depth"},), verbose=False)
    run = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda one: torch.from_numpy(run.run(None, {run.get_inputs()[0].name: one.numpy()})[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("export", [exported, exported_to_onnx])
def test_an_export_with_output_size_is_right_for_other_sizes_or_refused(export):
    refused = []
    for kind in (torch.nn.ConvTranspose3d, tritonconv.ConvTranspose3d):
        model = Decoder(kind).eval()
        try:
            program = export(model, torch.randn(1, 1, 8, 8, 8))
        except Exception as error:
            refused.append(type(error))
            continue
        for depth in (10, 9, 5):
            x = torch.randn(1, 1, depth, 8, 8)
            close(program(x), model(x).detach())
    assert len(refused) in (0, 2) and len(set(refused)) <= 1, "refused where torch's layer is"


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_records_torchs_operation():
    mine, _ = layers()
    x = torch.randn(2, 3, 2, 3, 2)
    traced = torch.jit.trace(mine, (x,))
    assert "conv_transpose3d" in str(traced.inlined_graph) or "aten::_convolution" in str(traced.inlined_graph)
    for one in (x, torch.randn(4, 3, 3, 2, 2)):
        close(traced(one), mine(one))


def test_fx_and_make_fx():
    mine, own = layers()
    model = torch.nn.Sequential(mine, torch.nn.ReLU())
    x = torch.randn(2, 3, 2, 3, 2)
    symbolic = torch.fx.symbolic_trace(model)
    close(symbolic(x), own(x).relu())
    close(symbolic(x[:, :, :1]), own(x[:, :, :1]).relu())
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(mine, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
        assert any("convolution" in target for target in targets(graph.graph))
        assert not any("tritonconv" in target for target in targets(graph.graph))
        close(graph(x), own(x))


# ------------------------------------------------------------------ shapes, FLOPs, dtypes, determinism, DTensor


@pytest.mark.parametrize("last", [False, True])
def test_meta_and_fake_tensors_have_the_real_shape(last):
    args = operands()
    args = [t.to(memory_format=torch.channels_last_3d) if last and t.dim() == 5 else t for t in args]
    want = theirs(*args)
    for fakes in (lambda mode: [t.to("meta") for t in args], lambda mode: [mode.from_tensor(t) for t in args]):
        mode = FakeTensorMode()
        y = ours(*fakes(mode))
        assert (y.shape, y.dtype) == (want.shape, want.dtype)
    with FakeTensorMode():
        leaves = [torch.empty(t.shape, dtype=f64, requires_grad=True) for t in args]
        found = torch.autograd.grad(ours(*leaves).sum(), leaves)
    assert [g.shape for g in found] == [t.shape for t in args]
    assert ours(torch.empty(3, 2, 3, 2, device="meta"), args[1].float().to("meta")).shape == want.shape[1:]
    with torch.autocast("cpu", torch.bfloat16):  # which knows no meta device
        assert ours(*[t.to("meta") for t in args]).shape == want.shape


def test_flop_counter_equals_torchs(variants):
    totals = []
    for module in layers():
        x = torch.randn(2, 3, 2, 3, 2, requires_grad=True)
        with FlopCounterMode(display=False) as forward:
            y = module(x)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        totals.append((forward.get_total_flops(), backward.get_total_flops()))
    assert totals[0] == totals[1]
    assert 0 < totals[0][0] < totals[0][1]


def test_flop_counter_around_the_backward_of_an_eager_call():
    """The graph was made outside the counter; its backward is counted all the same."""
    totals = []
    for function in (ours, theirs):
        leaves = [t.requires_grad_() for t in operands()]
        with tritonconv.use(*PHASES):
            y = function(*leaves)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.int64], ids=str)
def test_other_dtypes_are_torchs(dtype):
    x, weight, bias = ((4 * t).to(dtype) for t in operands(dtype=torch.complex128 if dtype.is_complex else f64))
    assert torch.equal(ours(x, weight, bias), theirs(x, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):  # lowers real floating-point numbers only
        got, want = ours(x, weight, bias), theirs(x, weight, bias)
    assert got.dtype == want.dtype == dtype
    assert torch.equal(got, want)
    if dtype.is_complex:
        for got, want in zip(*(complex_gradients(f, (x, weight, bias)) for f in (ours, theirs)), strict=True):
            close(got, want)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64], ids=str)
def test_a_forced_variant_refuses_a_dtype_that_is_torchs(dtype):
    args = [(4 * t).to(dtype) for t in operands()]
    with tritonconv.use(PHASES[0]), pytest.raises(tritonconv.VariantNotApplicable, match=str(dtype)):
        ours(*args)


def complex_gradients(function, args):
    leaves = [t.detach().clone().requires_grad_() for t in args]
    return torch.autograd.grad(function(*leaves).abs().sum(), leaves)


def test_deterministic_algorithms_give_the_same_bits(variants):
    args = operands(dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = [gradients(ours, args) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in others:
        assert all(map(torch.equal, other, first))


@pytest.fixture
def mesh(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_dtensor_shards_of_the_batch_and_spatial_ones_work(mesh, variants):
    """Of one rank; tests/test_distributed.py has four."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x, weight, bias = operands()
    rest = [distribute_tensor(t, mesh, [Replicate()]) for t in (weight, bias)]
    for axis in (2, 3, 4):
        close(ours(distribute_tensor(x, mesh, [Shard(axis)]), *rest).full_tensor(), theirs(x, weight, bias))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for placement in (Shard(0), Replicate()):
            spread = distribute_tensor(x, mesh, [placement])
            try:
                theirs(spread, *rest)
            except RuntimeError as refusal:  # torch 2.11 shares out no convolution with a stride and a padding
                with pytest.raises(RuntimeError, match=re.escape(str(refusal))):
                    ours(spread, *rest)
            else:
                close(ours(spread, *rest).full_tensor(), theirs(x, weight, bias))
