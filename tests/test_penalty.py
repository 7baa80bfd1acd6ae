"""Tikhonov penalties against their equations written out, numerical derivatives, one process, and h → 0."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain import distributed, objectives
from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.models import Encoded, Encoder, HeadConfig, ModelConfig, frozen_statistics
from fasttrain.objectives import TermConfig, build_objective, encode, gradient_penalty, layer_by_layer_penalty
from fasttrain.step import Term, TrainStep
from tests.ranks import run_ranks

ALPHA, BETA = (0.1, 0.2, 0.5, 1.0), (0.0, 3.0, 5.0, 9.0)
CONFIG = ModelConfig(
    arch="resnet18",
    stem="cifar",
    width=0.0625,
    classes=3,
    zero_init_residual=False,
    layer_heads=True,
    head=HeadConfig(layers=2, width=12, out=8, predictor=4),
)


class Smooth(nn.Module):
    """A network without kinks, and with BatchNorm: x [N, 3, 2, 2] -> everything that an objective may read."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5)).double()

    def forward(self, images: Tensor) -> Encoded:
        z = self.body(images.flatten(1))
        return Encoded(images, (), z, z, z, torch.sin(z), encoder=self)


def _smooth() -> Smooth:
    torch.manual_seed(0)
    return Smooth()


def _images(views: int, images: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(views, images, 3, side, side, generator=generator, dtype=torch.double)


def _batch(images: Tensor) -> Batch:
    count = images.shape[1]
    return Batch(images, torch.arange(count) % 3, torch.arange(count))


def _value_and_gradient(
    encoder: nn.Module, objective, batch: Batch, autocast: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Mean loss and its gradients by the parameters; the forward as TrainStep's, the backward outside autocast."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = objective(encode(encoder, batch.images.flatten(0, 1), [objective]), batch).mean()
    gradients = torch.autograd.grad(value, list(encoder.parameters()), allow_unused=True, materialize_grads=True)
    return value.detach(), list(gradients)


def _close(ours: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]], rtol: float) -> None:
    torch.testing.assert_close(ours[0], expected[0], rtol=rtol, atol=0)
    scale = max(float(g.abs().max()) for g in expected[1])
    for a, b in zip(ours[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * scale)


def _nt_xent_written_out(z: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss of z [2N, D], view-major, by cross-entropy of the masked similarities."""
    n = len(z) // 2
    unit = z / z.norm(dim=1, keepdim=True)
    logits = (unit @ unit.T / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * n).roll(n))


def _equation(name: str, encoder: nn.Module, batch: Batch, weight: float) -> Tensor:
    """The regularised loss from its equation, an image at a time, without the library's objectives."""
    views, count = batch.images.shape[:2]
    pixels = [[image.clone().requires_grad_() for image in view] for view in batch.images]
    encoded = encoder(torch.stack([image for view in pixels for image in view]))
    if name == "nt_xent":  # eq. 3: L + λ/2 Σ_k (‖∇_{2k−1} L‖² + ‖∇_{2k} L‖²) / 2
        loss = _nt_xent_written_out(encoded.projections, 0.3)
        total = loss
        for k in range(count):
            squares = [torch.autograd.grad(loss, pixels[v][k], create_graph=True)[0].square().sum() for v in range(2)]
            total = total + weight / 2 * (squares[0] + squares[1]) / 2
        return total
    if name == "cross_entropy":  # eq. 2, rows of the summed loss
        logits, labels = encoded.logits, batch.labels.repeat(views)
        losses = logits.exp().sum(1).log() - logits[torch.arange(len(logits)), labels]
        rows = [(pixels[v][k],) for v in range(views) for k in range(count)]
    else:  # simsiam
        z, p = encoded.projections.detach(), encoded.predictions
        first, second = slice(0, count), slice(count, 2 * count)
        losses = -F.cosine_similarity(p[first], z[second]) / 2 - F.cosine_similarity(p[second], z[first]) / 2
        rows = [(pixels[0][k], pixels[1][k]) for k in range(count)]
    norms = []
    for images in rows:
        gradients = torch.autograd.grad(losses.sum(), images, create_graph=True)
        norms.append(sum(g.square().sum() for g in gradients) / len(images))
    return (losses + weight / 2 * torch.stack(norms)).mean()


PLAIN = {
    "nt_xent": objectives.nt_xent(0.3),
    "sup_con": objectives.sup_con(0.3),
    "cross_entropy": objectives.cross_entropy(),
    "simsiam": objectives.simsiam(),
}


@pytest.mark.parametrize("name", ["nt_xent", "cross_entropy", "simsiam"])
@pytest.mark.parametrize("training", [True, False])
def test_value_and_parameter_gradient_are_the_equations(name: str, training: bool) -> None:
    encoder, batch = _smooth().train(training), _batch(_images(2, 5, 2))
    ours = _value_and_gradient(encoder, gradient_penalty(PLAIN[name], 20.0), batch)
    value = _equation(name, encoder, batch, 20.0)
    _close(ours, (value.detach(), list(torch.autograd.grad(value, list(encoder.parameters())))), 1e-11)
    assert ours[0] > PLAIN[name](encoder(batch.images.flatten(0, 1)), batch).mean() + 0.01  # the penalty counts


@pytest.mark.parametrize("name", ["nt_xent", "sup_con", "cross_entropy"])
def test_against_numerical_derivatives(name: str) -> None:
    """R from the loss's values alone, and the parameter gradient from the regularised loss's."""
    encoder, batch = _smooth().eval(), _batch(_images(2, 4, 2))
    objective, weight, h = gradient_penalty(PLAIN[name], 7.0), 7.0, 1e-5
    value, gradients = _value_and_gradient(encoder, objective, batch)

    @torch.no_grad()
    def loss(images: Tensor) -> Tensor:
        return PLAIN[name](encoder(images.flatten(0, 1)), batch).mean()

    squares = 0.0
    for position in range(batch.images.numel()):
        shift = torch.zeros(batch.images.numel(), dtype=torch.double)
        shift[position] = h
        shift = shift.view_as(batch.images)
        squares += float((loss(batch.images + shift) - loss(batch.images - shift)) / (2 * h)) ** 2
    rows = 8
    expected = squares * rows if name == "cross_entropy" else squares / 2  # mean over rows of (rows · slope)²; eq. 3
    assert value.item() == pytest.approx(float(loss(batch.images)) + weight / 2 * expected, rel=1e-8)

    weights = encoder.body[0].weight
    for position in ((0, 0), (3, 7), (5, 11)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weights[position] += sign * h
            values.append(_value_and_gradient(encoder, objective, batch)[0])
            with torch.no_grad():
                weights[position] -= sign * h
        assert gradients[0][position].item() == pytest.approx(
            float(values[0] - values[1]) / (2 * h), rel=1e-6, abs=1e-8
        )


def test_a_per_image_penalty_is_per_image() -> None:
    encoder, batch = _smooth().eval(), _batch(_images(2, 5, 2))
    for name, count in (("cross_entropy", 10), ("simsiam", 5)):
        objective = gradient_penalty(PLAIN[name], 1.0)
        whole = objective(encode(encoder, batch.images.flatten(0, 1), [objective]), batch)
        assert whole.shape == (count,)
        alone = Batch(batch.images[:, 2:3], batch.labels[2:3], batch.index[2:3])
        part = objective(encode(encoder, alone.images.flatten(0, 1), [objective]), alone)
        torch.testing.assert_close(whole[2::5], part)


def _encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(CONFIG).double()


@pytest.mark.parametrize("name", ["nt_xent", "cross_entropy"])
def test_layer_by_layer_is_the_sum_of_penalties_on_each_stage(name: str) -> None:
    encoder, batch = _encoder(), _batch(_images(2, 4, 8))
    ours = _value_and_gradient(encoder, layer_by_layer_penalty(PLAIN[name], ALPHA, BETA), batch)

    def summed(encoded: Encoded, batch: Batch) -> Tensor:
        total = 0.0
        for k, (a, b) in enumerate(zip(ALPHA, BETA, strict=True)):
            one = gradient_penalty(lambda _, batch, k=k: PLAIN[name](encoded.layers[k], batch), 2 * b / a)
            total = total + a * one(encoded, batch)
        return total

    encoded = encoder(batch.images.flatten(0, 1).requires_grad_())
    value = summed(encoded, batch).mean()
    gradients = torch.autograd.grad(value, list(encoder.parameters()), allow_unused=True, materialize_grads=True)
    _close(ours, (value.detach(), list(gradients)), 1e-10)


CASES = {
    **{name: gradient_penalty(of, 50.0) for name, of in PLAIN.items()},
    "layers, nt_xent": layer_by_layer_penalty(PLAIN["nt_xent"], ALPHA, BETA),
    "layers, cross_entropy": layer_by_layer_penalty(PLAIN["cross_entropy"], ALPHA, BETA),
    "difference, nt_xent": gradient_penalty(PLAIN["nt_xent"], 50.0, "finite_difference", step=0.1),
    "difference, cross_entropy": gradient_penalty(PLAIN["cross_entropy"], 50.0, "finite_difference", scheme="central"),
    "difference, layers": layer_by_layer_penalty(PLAIN["sup_con"], ALPHA, BETA, "finite_difference", scheme="central"),
}


def _share(images: Tensor) -> dict[str, list[Tensor]]:
    """This rank's value, gradients and BatchNorm statistics, the first two averaged over the ranks."""
    rank, world = distributed.rank(), distributed.world_size()
    whole = _batch(images)
    batch = Batch(*(t.chunk(world, dim=d)[rank] for t, d in zip(whole[:3], (1, 0, 0), strict=True)))
    found = {}
    for name, objective in CASES.items():
        encoder = _encoder()
        value, gradients = _value_and_gradient(encoder, objective, batch)
        found[name] = [*(distributed.all_reduce(v.detach()) / world for v in (value, *gradients)), *encoder.buffers()]
    return found


def test_two_ranks_equal_one_in_training_mode() -> None:
    """Value, parameter gradient and running statistics, through BatchNorm over both ranks."""
    images = _images(2, 6, 8)
    one = _share(images)
    for name, of in PLAIN.items():
        encoder = _encoder()
        plain = of(encoder(images.flatten(0, 1)), _batch(images)).mean()
        assert one[name][0] > plain + 1e-3, name  # the penalty counts
    for rank in run_ranks(2, _share, images):
        for name, expected in one.items():
            scale = max(float(v.abs().max()) for v in expected)
            for ours, whole in zip(rank[name], expected, strict=True):
                torch.testing.assert_close(
                    ours, whole, rtol=1e-10, atol=1e-11 * scale, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.parametrize("name", ["nt_xent", "cross_entropy"])
def test_a_penalty_is_logged_beside_the_term_that_it_is_a_part_of(name: str) -> None:
    encoder, batch = _encoder(), _batch(_images(2, 5, 8))
    layers = objectives.layer_by_layer(PLAIN[name], ALPHA)
    for penalised, plain in [
        (gradient_penalty(PLAIN[name], 20.0), PLAIN[name]),
        (layer_by_layer_penalty(PLAIN[name], ALPHA, BETA), layers),
        (layer_by_layer_penalty(PLAIN[name], ALPHA, (0, 0, 0, 0)), layers),
    ]:
        _, values = TrainStep(encoder, [Term("with", penalised, 3.0), Term("without", plain)])(batch)
        logged = values.get("penalty/with", torch.zeros((), dtype=torch.double))
        torch.testing.assert_close(logged, values["with"] - values["without"], rtol=1e-9, atol=1e-12)
        assert not logged.requires_grad and not logged.dim()


def _cosine(a: list[Tensor], b: list[Tensor]) -> float:
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (a, b))
    return float(a @ b / a.norm() / b.norm())


@pytest.mark.parametrize(("name", "training"), [("nt_xent", True), ("sup_con", True), ("cross_entropy", False)])
@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_finite_differences_converge_in_float64_only_at_tiny_steps(name: str, training: bool, scheme: str) -> None:
    """The penalty alone, through ResNet-18's kinks: exact at h = 1e-7; with the loss's own gradient taken off."""
    encoder, batch = _encoder().train(training), _batch(_images(2, 4, 8))
    plain = _value_and_gradient(encoder, PLAIN[name], batch)

    def penalty(*arguments, **options) -> tuple[float, list[Tensor]]:
        objective = gradient_penalty(PLAIN[name], 2.0, *arguments, **options)
        value, gradients = _value_and_gradient(encoder, objective, batch)
        return float(value - plain[0]), [g - p for g, p in zip(gradients, plain[1], strict=True)]

    exact = penalty()
    errors, cosines = [], []
    for step in (1.0, 1e-2, 1e-7):
        value, gradients = penalty("finite_difference", step=step, scheme=scheme)
        errors.append(abs(value / exact[0] - 1))
        cosines.append(_cosine(gradients, exact[1]))
    assert errors[2] < 1e-4 and cosines[2] > 1 - 1e-5
    assert errors[2] < errors[1] < errors[0] and cosines[0] < 0.999


def test_finite_differences_are_finlays_and_obermans() -> None:
    """Written out on a network without BatchNorm: each image along its own unit gradient, its own loss's difference."""
    encoder, batch, h = _smooth().eval(), _batch(_images(1, 6, 2)), 0.3
    for scheme in ("forward", "central"):
        objective = gradient_penalty(PLAIN["cross_entropy"], 1.0, "finite_difference", step=h, scheme=scheme)
        losses = objective(encode(encoder, batch.images.flatten(0, 1), [objective]), batch)
        for i, label in enumerate(batch.labels):

            def loss(image: Tensor, label: Tensor = label) -> Tensor:
                return F.cross_entropy(encoder(image[None]).logits, label[None])

            x = batch.images[0, i].clone().requires_grad_()
            (g,) = torch.autograd.grad(loss(x), x)
            d = g / g.norm()
            slope = (loss(x + h * d) - loss(x)) / h
            if scheme == "central":
                slope = (loss(x + h * d) - loss(x - h * d)) / (2 * h)
            assert losses[i].item() == pytest.approx((loss(x) + slope**2 / 2).item(), rel=1e-12)


def _difference(of, encoder: Encoder, encoded: Encoded, batch: Batch, h: float) -> Tensor:
    """R of a scalar objective by forward differences, without a gradient kept from one use to the next."""
    loss = of(encoded, batch)
    (g,) = torch.autograd.grad(loss, encoded.images, retain_graph=True)
    d = g / g.square().sum().sqrt() * len(g) ** 0.5
    with frozen_statistics():
        slope = (of(encoder(encoded.images.detach() + h * d), batch) - loss) / h
    return slope.square() / (len(g) * len(batch.images))


@pytest.mark.parametrize("name", ["nt_xent", "sup_con"])
def test_a_scalars_finite_difference_beside_another_term_and_a_trained_view(name: str) -> None:
    """The encoding is another objective's too, and the images depend on a parameter."""
    of, plain, h = PLAIN[name], PLAIN["cross_entropy"], 0.3
    encoder, batch = _encoder(), _batch(_images(2, 4, 8))
    tint = torch.full((3, 1, 1), 0.1, dtype=torch.double, requires_grad=True)
    parameters = [tint, *(p for p in encoder.parameters())]

    def gradients(value: Tensor) -> tuple[Tensor, list[Tensor]]:
        found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        return value.detach(), list(found)

    encoded = encoder(batch.images.flatten(0, 1) + tint)
    objective = gradient_penalty(of, 50.0, "finite_difference", step=h)
    ours = gradients(0.7 * objective(encoded, batch) + plain(encoded, batch).mean())
    encoded = encoder(batch.images.flatten(0, 1) + tint)
    regularised = of(encoded, batch) + 25.0 * _difference(of, encoder, encoded, batch, h)
    _close(ours, gradients(0.7 * regularised + plain(encoded, batch).mean()), 1e-10)


class Counted(TorchDispatchMode):
    """Convolution passes, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            self.passes["outputs"] += 1
        if function is torch.ops.aten.convolution_backward.default:
            self.passes.update(kind for kind, asked in zip(("images", "weights"), args[-1], strict=False) if asked)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["double_backward", "finite_difference"])
def test_a_penalty_step_takes_twice_the_passes_of_a_plain_one(method: str) -> None:
    """Of 20 convolutions; the first one's gradient by the images is a plain step's only spared pass."""
    encoder, batch = _encoder().float(), _batch(_images(2, 4, 8).float())
    with Counted() as counted:
        PLAIN["nt_xent"](encoder(batch.images.flatten(0, 1)), batch).backward()
    assert counted.passes == {"outputs": 20, "images": 19, "weights": 20}
    with Counted() as counted:
        objective = gradient_penalty(PLAIN["nt_xent"], 1.0, method)
        value = objective(encode(encoder, batch.images.flatten(0, 1), [objective]), batch)
        inside = counted.passes.copy()
        value.backward()
    if method == "double_backward":
        assert inside == {"outputs": 20, "images": 20}
        assert counted.passes == {"outputs": 40, "images": 40, "weights": 40}
    else:
        assert inside == {"outputs": 40, "images": 20, "weights": 20}
        assert counted.passes == {"outputs": 40, "images": 39, "weights": 40}


@pytest.mark.parametrize("name", ["nt_xent", "cross_entropy"])
def test_float32_in_channels_last_is_near_float64(name: str) -> None:
    torch.manual_seed(0)
    encoder = Encoder(CONFIG.model_copy(update={"width": 0.125})).to(memory_format=torch.channels_last)
    batch = _batch(_images(2, 8, 16).float())
    objective = gradient_penalty(PLAIN[name], 20.0)
    value, gradients = _value_and_gradient(encoder, objective, batch)
    exact, truth = _value_and_gradient(encoder.double(), objective, _batch(batch.images.double()))
    assert value.item() == pytest.approx(exact.item(), rel=1e-4)
    assert _cosine([g.double() for g in gradients], truth) > 1 - 1e-4


def test_running_statistics_move_once() -> None:
    batch, states = _batch(_images(2, 4, 8)), []
    for options in ({}, {"method": "finite_difference", "scheme": "central"}):
        encoder = _encoder()
        _value_and_gradient(encoder, gradient_penalty(PLAIN["nt_xent"], 1.0, **options), batch)
        states.append(dict(encoder.named_buffers()))
    plain = _encoder()
    plain(batch.images.flatten(0, 1))
    for state in states:
        assert state["backbone.bn1.num_batches_tracked"] == 1
        assert all(torch.equal(value, state[key]) for key, value in plain.named_buffers())


def test_a_flat_loss_has_no_penalty_and_no_nan() -> None:
    encoder, batch = _smooth().eval(), _batch(_images(2, 3, 2))
    with torch.no_grad():
        encoder.body[0].weight.zero_()
    for options in ({}, {"method": "finite_difference"}):
        for name, of in PLAIN.items():
            if options and name == "simsiam":
                continue
            value, gradients = _value_and_gradient(encoder, gradient_penalty(of, 1.0, **options), batch)
            plain = _value_and_gradient(encoder, of, batch)
            torch.testing.assert_close(value, plain[0])
            assert all(g.isfinite().all() for g in gradients)


def test_autocast() -> None:
    """bf16 is near fp32; ``precision="fp32"`` is fp32 exactly; a finite difference of bf16 losses is refused."""
    torch.manual_seed(0)
    config = CONFIG.model_copy(update={"width": 0.25})  # narrower overruns oneDNN's memory in float32
    encoder, batch = Encoder(config).train(), _batch(_images(2, 8, 8).float())
    half, full = (gradient_penalty(PLAIN["cross_entropy"], 10.0, precision=p) for p in ("autocast", "fp32"))
    exact = _value_and_gradient(encoder, full, batch)
    same = _value_and_gradient(encoder, full, batch, autocast=True)
    near = _value_and_gradient(encoder, half, batch, autocast=True)
    with torch.autocast("cpu", torch.bfloat16):
        encoded = encode(encoder, batch.images.flatten(0, 1), [half])
        assert half(encoded, batch).dtype == torch.float32
        with pytest.raises(UsageError, match="finite_difference under autocast"):
            gradient_penalty(PLAIN["cross_entropy"], 1.0, "finite_difference")(encoded, batch)
    assert torch.equal(same[0], exact[0]) and all(map(torch.equal, same[1], exact[1]))
    assert near[0].item() == pytest.approx(exact[0].item(), rel=0.1) and _cosine(near[1], exact[1]) > 0.9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gradient_penalty(gradient_penalty(PLAIN["nt_xent"], 1.0), 1.0), "third derivatives"),
        (lambda: gradient_penalty(PLAIN["simsiam"], 1.0, "finite_difference"), "stop-gradient"),
        (lambda: layer_by_layer_penalty(PLAIN["simsiam"], ALPHA, BETA, "finite_difference"), "stop-gradient"),
        (lambda: gradient_penalty(PLAIN["nt_xent"], -1.0), "weight=-1.0"),
        (lambda: gradient_penalty(PLAIN["nt_xent"], 1.0, "finite_difference", step=0.0), "step=0.0"),
        (lambda: gradient_penalty(PLAIN["nt_xent"], 1.0, "jvp"), "method=jvp"),
        (lambda: gradient_penalty(PLAIN["nt_xent"], 1.0, precision="bf16"), "precision=bf16"),
        (lambda: objectives.layer_by_layer(gradient_penalty(PLAIN["nt_xent"], 1.0), ALPHA), "layer_by_layer_penalty"),
        (lambda: layer_by_layer_penalty(PLAIN["nt_xent"], (0, 0, 0, 0), (0, 0, 0, 0)), "at least one stage"),
        (lambda: layer_by_layer_penalty(PLAIN["nt_xent"], ALPHA, (0, -2, 0, 0)), r"beta\[1\]=-2"),
    ],
)
def test_what_the_mathematics_does_not_allow_is_refused(make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_settings_build_the_same() -> None:
    encoder, batch = _encoder(), _batch(_images(2, 4, 8))
    for settings, expected in (
        ({"temperature": 0.3, "penalty": {"weight": 2}}, gradient_penalty(PLAIN["nt_xent"], 2.0)),
        (
            {"objective": "cross_entropy", "penalty": {"weight": 2, "method": "finite_difference", "step": 0.5}},
            gradient_penalty(PLAIN["cross_entropy"], 2.0, "finite_difference", step=0.5),
        ),
        (
            {"temperature": 0.3, "layers": {"alpha": ALPHA, "beta": BETA}},
            layer_by_layer_penalty(PLAIN["nt_xent"], ALPHA, BETA),
        ),
        (
            {"temperature": 0.3, "penalty": {"weight": 2}, "layers": {"alpha": ALPHA}},
            gradient_penalty(objectives.layer_by_layer(PLAIN["nt_xent"], ALPHA), 2.0),
        ),
    ):
        built = build_objective(TermConfig(**settings))
        assert _comparable(objectives.traits(built)) == _comparable(objectives.traits(expected))
        _close(*(_value_and_gradient(encoder, objective, batch) for objective in (built, expected)), 1e-12)


def _comparable(traits: objectives.Traits) -> objectives.Traits:
    """Without the losses of its summands, functions that equal only themselves; their values are compared."""
    return traits._replace(summands=tuple(summand._replace(loss=None) for summand in traits.summands))
