"""A model as a CUDA graph, beside the stand-in for a GPU: what it computes is what eager calls do.

The stand-in captures and replays by torch's own ``make_graphed_callables``; test_graphed_gpu.py asks a GPU the same.
"""

from __future__ import annotations

from captured_block import beside_stand_in  # noqa: F401


def test_a_block_of_a_converted_unet_trains_as_eagerly(beside):
    """Outputs, gradients, accumulated ones too, buffers and trained weights; the sample is only a sample."""
    out = beside(
        """
        theirs, mine = blocks()
        sample = data()
        before = [each.clone() for each in (*sample, *mine.buffers())]
        with tritonconv.use(*KERNELS):
            model = tritonconv.graphed(mine, *sample)
        assert model is mine and all(each.grad is None for each in (sample[0], *mine.parameters()))
        first = mine.forward
        optimizers = [torch.optim.SGD(each.parameters(), 0.1, momentum=0.9) for each in (theirs, mine)]
        for step in range(6):
            if step < 4:  # gradients are accumulated, then made zero, then dropped
                for optimizer in optimizers:
                    optimizer.step()
                    if step > 1:
                        optimizer.zero_grad(set_to_none=step == 3)
            x, skip = data()
            ours = x.detach().clone().requires_grad_()
            grad_y = torch.randn(1, 4, 4, 6, 4).cuda()
            with tritonconv.use(*KERNELS):
                y = theirs(x, skip)
                y.backward(grad_y)
            z = mine(ours, skip)
            z.backward(grad_y)
            assert torch.equal(y, z) and torch.equal(x.grad, ours.grad)
            for (name, one), other in zip(theirs.named_parameters(), mine.parameters(), strict=True):
                assert torch.equal(one, other), name
                assert (one.grad is other.grad is None) == name.startswith("unused"), name
                assert one.grad is None or torch.equal(one.grad, other.grad), (step, name)
            assert all(map(torch.equal, theirs.buffers(), mine.buffers()))
        assert all(map(torch.equal, before[:2], sample))
        assert mine.forward is first
        assert not torch.equal(before[2], list(mine.buffers())[0])  # the norm saw six calls, not those of the capture
        assert list(mine.buffers())[2] == 6

        for each in (theirs, mine):  # the other mode is eager
            each.eval()
        x, skip = data()
        with tritonconv.use(*KERNELS):
            assert torch.equal(theirs(x[:, :, :1], skip[:, :, :2]), mine(x[:, :, :1], skip[:, :, :2]))
        mine.train()
        del mine.forward
        assert mine(x[:, :, :1], skip=skip[:, :, :2]).shape == (1, 4, 2, 6, 4)
        """
    )
    assert out == ""


def test_the_kernels_are_compiled_first(beside):
    """A capture keeps what runs then for good: the kernels, and not what stands in for them until they are compiled."""
    out = beside(
        """
        import threading, time
        from tritonconv.kernels import triton_background

        class Late(nn.Module):
            # Twice x by a kernel whose first calls ask for it and run something else; the second kernel after the first
            def __init__(self):
                super().__init__()
                self.asked, self.ready, self.runs = [], set(), []

            def compile_one(self, name):
                time.sleep(0.2)
                self.ready.add(name)

            def forward(self, x):
                for name in ("first", "second"):
                    if name not in self.ready:
                        if name not in self.asked:
                            self.asked.append(name)
                            triton_background.submit(lambda: self.compile_one(name))
                        self.runs.append(f"without the {name}")
                        return x * 3
                self.runs.append("compiled")
                return x * 2

        model = Late()
        x = torch.ones(3).cuda()
        model(x)  # asked for, and still compiling when the capture is
        tritonconv.graphed(model, x)
        assert threading.active_count() == 1
        print(*dict.fromkeys(model.runs), sep=", ")
        seen = len(model.runs)
        print(model(torch.full((3,), 5.0).cuda()).cpu().tolist(), len(model.runs) - seen)

        class Never(nn.Module):
            def forward(self, x):
                triton_background.submit(lambda: None)
                return x * 2

        said(lambda: tritonconv.graphed(Never(), x))
        """
    )
    assert out.splitlines() == [
        "without the first, without the second, compiled",
        "[10.0, 10.0, 10.0] 0",
        "ArgumentError graphed: model asks for new kernels in each of 8 runs of one sample",
    ]


def test_a_capture_without_gradients_and_one_under_autocast(beside):
    out = beside(
        """
        theirs, mine = blocks()
        x, skip = data(requires_grad=False)
        said(lambda: [torch.autocast("cuda", torch.float16).__enter__(), tritonconv.graphed(mine, x, skip)])
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)

        with torch.inference_mode():
            tritonconv.graphed(mine.eval(), x, skip)
            want = theirs.eval()(x, skip)
        with torch.no_grad():  # the stand-in's tensors cannot be detached in inference mode, as a replay's outputs are
            assert torch.equal(mine(x, skip), want)
        said(lambda: mine(x, skip))

        up = tritonconv.ConvTranspose3d(4, 6, 2, 2).cuda()
        with torch.autocast("cuda", torch.float16):
            want = up(x)
        with torch.autocast("cuda", torch.float16, cache_enabled=False):
            tritonconv.graphed(up, x)
        with torch.autocast("cuda", torch.float16):
            assert up(x).dtype is torch.float16 and torch.equal(up(x), want)
        said(lambda: up(x))

        class Frozen(nn.Linear):  # records nothing by itself
            @torch.no_grad()
            def forward(self, x):
                return super().forward(x)

        frozen = Frozen(2, 2).cuda()
        want = frozen(x)
        assert torch.equal(tritonconv.graphed(frozen, x)(x), want) and not frozen(x).requires_grad
        """
    )
    cached, recorded, autocast = out.splitlines()
    assert "capture inside torch.autocast('cuda', cache_enabled=False)" in cached
    assert recorded.startswith("ArgumentError graphed model: was captured under torch.no_grad()")
    assert autocast.endswith("autocast is off, and was torch.float16 in the capture")


def test_a_captured_call_and_an_eager_one_have_a_choice_each(beside):
    out = beside(
        """
        stand_in_gpu.PRODUCT, stand_in_gpu.HOST_LAUNCH = 15, 40  # a launch of ours takes 10 on the device
        from tritonconv.autotune.key import device_name
        from tritonconv.autotune import store

        stand_in_gpu.shrink()
        layer = tritonconv.ConvTranspose3d(16, 8, 2, stride=2, bias=False, device="cuda", dtype=torch.float16)
        x = torch.ones(1, 16, 4, 4, 4, dtype=torch.float16, device="cuda")
        print(str(tritonconv.tune(layer, x)).count("; in eager calls forward_torch_native"))
        stored = store.own(device_name(x.device)).entries.values()
        forward = next(each for each in stored if each.timed == "forward")
        print(*(f"{ms:.3f}" for each in (forward, forward.eager) for ms in (each.ms, each.host_ms)))
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), tritonconv.for_graphs():
            layer(x)
            with torch.cuda.graph(graph):
                y = layer(x)
        print([us for _, us, _ in graph.calls if us > 1])
        before = stand_in_gpu.now.us
        with torch.no_grad():
            eager = layer(x)
        print(stand_in_gpu.now.us - before, torch.equal(eager, y))

        from tritonconv.dispatch import watch
        from tritonconv.lab.bench.contestants import contestant
        from tritonconv.lab.bench.case import Case
        from tritonconv.lab.bench.clock import GpuClock
        from tritonconv.lab.bench.measure import measure

        with watch() as problems, torch.no_grad():
            layer(x)
        case = Case(*problems[0])
        ours, torchs = (contestant(name, None, case, "forward", False) for name in ("tritonconv", "torch"))
        calls, graphs = {one.name: one.call for one in (ours, torchs)}, {ours.name: ours.in_graph.call}
        measured = measure(calls, "torch", x.device, GpuClock(x.device), 0.01, in_graph=graphs)
        fields = measured.fields(ours.name, "torch")
        print(ours.fields["chosen"]["forward"], ours.fields["graph_chosen"]["forward"] != "forward_torch_native")
        print(*(f"{fields[name]:.3f}" for name in ("gpu_ms", "graph_ms")), torchs.in_graph)
        """
    )
    *lines, chosen, times = out.splitlines()
    assert lines == ["1", "0.010 0.040 0.015 0.004", "[10]", "15.0 True"]
    assert chosen == "forward_torch_native True" and times == "0.015 0.010 None"  # each column by its own choice
