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
