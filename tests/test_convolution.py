"""The convolution's derivatives against numerical ones, float64 and PyTorch's own; and what no pass computes."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain.models import Encoder, HeadConfig, ModelConfig
from fasttrain.models.convolution import Conv2d
from fasttrain_kernels import convolution as kernel
from fasttrain_kernels.convolution import convolution
from fasttrain_kernels.wanted import wanted_gradients

# (channels in, out, kernel, height, width, options)
CASES = {
    "3x3": (2, 3, 3, 5, 4, {"padding": 1}),
    "1x1, stride 2": (3, 2, 1, 5, 6, {"stride": 2}),
    "7x7, stride 2, odd": (1, 2, 7, 9, 8, {"stride": 2, "padding": 3}),
    "rows that no window reaches": (2, 2, 2, 8, 8, {"stride": 3}),
    "dilated": (2, 2, 3, 7, 6, {"padding": 2, "dilation": 2}),
    "groups": (4, 6, 3, 4, 5, {"padding": 1, "groups": 2}),
    "depthwise": (3, 3, 3, 5, 5, {"stride": 2, "padding": 1, "groups": 3}),
}


def _ours(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    return convolution(x, weight, bias, (stride, stride), (padding, padding), (dilation, dilation), groups)


def _tensors(case: str, dtype: torch.dtype = torch.double, images: int = 2, channels_last: bool = False):
    """(x, weight, bias) with gradients."""
    inputs, outputs, kernel, height, width, options = CASES[case]
    generator = torch.Generator().manual_seed(0)
    shapes = (images, inputs, height, width), (outputs, inputs // options.get("groups", 1), kernel, kernel), (outputs,)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.double).to(dtype) for shape in shapes]
    if channels_last:
        tensors[:2] = [t.contiguous(memory_format=torch.channels_last) for t in tensors[:2]]
    return [t.requires_grad_() for t in tensors]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_first_and_second_derivatives_are_the_numerical_ones(case: str, channels_last: bool) -> None:
    x, weight, bias = _tensors(case, channels_last=channels_last)
    options = CASES[case][-1]
    torch.testing.assert_close(_ours(x, weight, bias, **options), F.conv2d(x, weight, bias, **options))
    for given in ((x, weight, bias), (x, weight)):
        assert gradcheck(lambda *t: _ours(*t, **options), given)
        assert gradgradcheck(lambda *t: _ours(*t, **options), given)


@pytest.mark.parametrize("given", ["x", "weight", "bias"])
def test_derivatives_by_one_input_alone(given: str) -> None:
    """The others are constants, and their gradients ``None``."""
    tensors = dict(zip(("x", "weight", "bias"), _tensors("3x3"), strict=True))
    fixed = {name: t.detach() for name, t in tensors.items() if name != given}
    assert gradcheck(lambda t: _ours(**fixed, **{given: t}, padding=1).square(), tensors[given])
    assert gradgradcheck(lambda t: _ours(**fixed, **{given: t}, padding=1).square(), tensors[given])


def test_third_derivative() -> None:
    def gradient(x: Tensor, weight: Tensor) -> Tensor:
        return torch.autograd.grad(_ours(x, weight, padding=1).pow(3).sum(), x, create_graph=True)[0]

    assert gradgradcheck(gradient, tuple(_tensors("3x3", images=1)[:2]))


def _penalty_gradients(convolve, tensors: list[Tensor], options: dict) -> list[Tensor]:
    """Gradients of Σ sin y + ‖∂/∂x‖² by x, w, b: every term of the second derivative takes part."""
    x, weight, bias = (t.detach().requires_grad_() for t in tensors)
    y = convolve(x, weight, bias, **options)
    by_x, by_weight = torch.autograd.grad(y.sin().sum(), [x, weight], create_graph=True)
    return list(torch.autograd.grad(y.sin().sum() + by_x.square().sum() + by_weight.square().sum(), [x, weight, bias]))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_no_further_from_float64_than_torchs(case: str, dtype: torch.dtype, channels_last: bool) -> None:
    options = CASES[case][-1]
    tensors = _tensors(case, dtype, 16, channels_last)
    exact = _penalty_gradients(F.conv2d, [t.detach().double() for t in tensors], options)
    errors = [
        [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
        for found in (_penalty_gradients(convolve, tensors, options) for convolve in (_ours, F.conv2d))
    ]
    rounding = 4 * torch.finfo(dtype).eps
    assert all(ours <= max(1.5 * torchs, rounding) for ours, torchs in zip(*errors, strict=True)), errors


class Counted(TorchDispatchMode):
    """What convolutions were asked for, and whether their weights have channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.last: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            self.asked.append("y")
            self.last.append(args[1].is_contiguous(memory_format=torch.channels_last))
        if function is torch.ops.aten.convolution_backward.default:
            self.asked += [name for name, wanted in zip(("x", "weight", "bias"), args[-1], strict=True) if wanted]
            self.last.append(args[2].is_contiguous(memory_format=torch.channels_last))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("inputs", "outputs", "side"), [(3, 4, 8), (4, 4, 8), (4, 8, 16), (8, 16, 8)])
def test_strided_1x1_of_few_channels_last(inputs: int, outputs: int, side: int) -> None:
    """oneDNN's weight gradient of these is wrong by up to a half with AVX2, and has overrun memory."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(16, inputs, side, side, generator=generator), torch.randn(outputs, inputs, 1, 1)
    found, expected = [], []
    for dtype, gradients in ((torch.float32, found), (torch.double, expected)):
        given = [t.detach().to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, weight)]
        given = [t.requires_grad_() for t in given]
        function = _ours if dtype == torch.float32 else F.conv2d
        first = torch.autograd.grad(function(*given, stride=2).square().sum(), given, create_graph=True)
        gradients += [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), given)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4 * float(theirs.detach().abs().max()))


def test_each_pass_computes_what_was_asked_for_and_no_more() -> None:
    x, weight, _ = _tensors("3x3")
    with Counted() as counted:
        y = _ours(x, weight, padding=1).sin()
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        assert counted.asked == ["y", "x"]
        (y.sum() + gradient.square().sum()).backward(inputs=[x, weight])
    assert sorted(counted.asked) == ["weight", "weight", "x", "x", "y", "y"]
    with Counted() as counted:
        torch.autograd.grad(_ours(x, weight, padding=1).sum(), weight)
    assert counted.asked == ["y", "weight"]


@pytest.mark.parametrize("autocast", [False, True])
def test_a_weight_is_laid_out_as_cudnn_wants_it_once(monkeypatch, autocast: bool) -> None:
    """Where ZeRO keeps weights contiguous and images have channels last."""
    monkeypatch.setattr(kernel, "_is_cudnns", lambda x: True)
    x, weight, _ = _tensors("3x3", torch.float32, channels_last=True)
    weight = weight.detach().contiguous().requires_grad_()
    with Counted() as counted, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = _ours(x, weight, padding=1)
        (gradient,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
    assert counted.last == [True] * len(counted.last) and len(counted.last) == 5
    assert weight.grad.is_contiguous() and weight.grad.dtype == torch.float32


SEEN: list[tuple[bool, ...]] = []


class Asked(torch.autograd.Function):
    """x · y, noting which gradients were wanted."""

    @staticmethod
    def forward(ctx, number: float, x: Tensor, nothing: None, y: Tensor, constant: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, g: Tensor):
        SEEN.append(wanted_gradients(ctx))
        x, y = ctx.saved_tensors
        return None, g * y, None, g * x, None


def test_wanted_gradients_are_those_of_the_pass_under_way() -> None:
    leaf, other, constant = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True), torch.ones(2)

    def seen(run) -> tuple[bool, bool]:
        SEEN.clear()
        run()
        ((number, x, nothing, y, fixed),) = SEEN
        assert not (number or nothing or fixed)
        return x, y

    for x, y in ((leaf, other), (2 * leaf, other), (leaf, 2 * other), (2 * leaf, 2 * other)):
        product = Asked.apply(3.0, x, None, y, constant).sum()
        for create_graph in (False, True):
            grad = lambda *by, c=create_graph, p=product: torch.autograd.grad(p, by, create_graph=c, retain_graph=True)  # noqa: E731
            assert seen(lambda grad=grad: grad(leaf)) == (True, False)
            assert seen(lambda grad=grad: grad(other)) == (False, True)
            assert seen(lambda grad=grad, y=y: grad(y)) == (False, True)
            assert seen(lambda grad=grad: grad(leaf, other)) == (True, True)
        assert seen(lambda p=product: p.backward(inputs=[other], retain_graph=True)) == (False, True)
        assert seen(lambda p=product: p.backward(retain_graph=True)) == (True, True)
    product = Asked.apply(3.0, leaf, None, constant, constant).sum()
    assert seen(product.backward) == (True, False)

    def elsewhere() -> None:
        product = Asked.apply(3.0, leaf, None, other, constant).sum()
        thread = threading.Thread(target=torch.autograd.grad, args=(product, leaf))
        thread.start()
        thread.join()

    assert seen(elsewhere) == (True, False)


def test_autocast_is_that_of_torch() -> None:
    tensors = _tensors("3x3", torch.float32, 16)
    found = []
    for convolve in (_ours, F.conv2d):
        x, weight, bias = (t.detach().requires_grad_() for t in tensors)
        with torch.autocast("cpu", torch.bfloat16):
            y = convolve(x, weight, bias, padding=1)
        assert y.dtype == torch.bfloat16
        found.append([y, *torch.autograd.grad(y.float().square().sum(), [x, weight, bias])])
    assert all(map(torch.equal, *found))


def test_the_layer_is_torchs_but_for_derivatives() -> None:
    torch.manual_seed(0)
    ours = Conv2d(3, 4, 3, stride=2, padding=1, bias=True)
    torchs = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 7, 6)
    assert torch.equal(ours(x), torchs(x))
    with torch.no_grad():
        assert torch.equal(ours(x), torchs(x))


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_narrow_network_in_float32(channels_last: bool) -> None:
    """At 8 channels PyTorch's second derivative of a channels-last 1x1 convolution of stride 2 overruns memory."""
    torch.manual_seed(0)
    config = ModelConfig(
        arch="resnet18", stem="cifar", width=0.125, head=HeadConfig(layers=0), zero_init_residual=False
    )
    encoder = Encoder(config).eval()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.rand(8, 3, 16, 16)

    def gradients(encoder: Encoder, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=layout).requires_grad_()
        (by_images,) = torch.autograd.grad(encoder(images).features.sum(), images, create_graph=True)
        parameters = [p for p in encoder.parameters() if p.dim() == 4]
        return torch.cat([g.flatten() for g in torch.autograd.grad(by_images.square().sum(), parameters)])

    ours = gradients(encoder.to(memory_format=layout), images)
    exact = gradients(encoder.double(), images.double())
    assert float((ours - exact).norm() / exact.norm()) < 1e-5
