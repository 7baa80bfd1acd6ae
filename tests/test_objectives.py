"""Each objective against a double loop, another formulation, finite differences, and one process."""

from __future__ import annotations

import math
import os
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain import distributed, objectives
from fasttrain.config import resolve
from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.models import Encoded, Encoder, HeadConfig, ModelConfig
from fasttrain.objectives import TermConfig, build_objective, build_one_sided, check_term
from fasttrain.objectives.sup_con import sup_con_rows
from fasttrain.step import Term, TrainStep
from tests.launches import as_on_a_gpu
from tests.ranks import run_ranks

LABELS = torch.tensor([0, 3, 0, 1, 3, 0, 7])  # 1 and 7 stand alone


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def _encoded(projections=None, logits=None, predictions=None) -> Encoded:
    flat = [None if rows is None else rows.flatten(0, 1) for rows in (projections, logits, predictions)]
    return Encoded(torch.empty(0), (), torch.empty(0), *flat)


def _batch(labels: Tensor) -> Batch:
    return Batch(torch.empty(0), labels, torch.arange(len(labels)))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt((a**2).sum() * (b**2).sum()))


def _double_loop_sup_con(z: np.ndarray, labels: list[int], temperature: float) -> np.ndarray:
    """[V, B] losses by the definition, a pair at a time."""
    rows = [(view, image) for view in range(z.shape[0]) for image in range(z.shape[1])]
    losses = np.zeros(z.shape[:2])
    for i in rows:
        similarity = {j: _cosine(z[i], z[j]) / temperature for j in rows if j != i}
        positives = [j for j in similarity if labels[j[1]] == labels[i[1]]]
        log_sum = np.logaddexp.reduce(list(similarity.values()))
        if positives:
            losses[i] = sum(log_sum - similarity[p] for p in positives) / len(positives)
    return losses


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 0.5])
def test_sup_con_equals_a_double_loop(views: int, temperature: float) -> None:
    z = _random(views, 7, 5)
    expected = _double_loop_sup_con(z.numpy(), LABELS.tolist(), temperature)
    rows = sup_con_rows(z, LABELS, temperature, z, LABELS, 0)
    torch.testing.assert_close(rows, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
    loss = objectives.sup_con(temperature)(_encoded(z), _batch(LABELS))
    assert loss.item() == pytest.approx(expected.mean(), rel=1e-12)
    low = sup_con_rows(z.float(), LABELS, temperature, z.float(), LABELS, 0)
    torch.testing.assert_close(low, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4)


def test_sup_con_is_khoslas_code_without_its_factor() -> None:
    """The masked log-softmax of the authors' code (mean over rows), whose τ/τ₀ is 1 here; with its gradient."""
    z, temperature = _random(2, 7, 5).requires_grad_(), 0.2
    loss = objectives.sup_con(temperature)(_encoded(z), _batch(LABELS))
    features, labels = F.normalize(z.flatten(0, 1), dim=1), LABELS.repeat(2)
    logits = features @ features.T / temperature
    others = 1 - torch.eye(len(labels), dtype=torch.double)
    mask = (labels[:, None] == labels).double() * others
    log_probability = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    expected = -((mask * log_probability).sum(1) / mask.sum(1)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(loss, z), torch.autograd.grad(expected, z), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("views", [2, 3])
def test_sup_con_without_two_of_a_class_is_nt_xent(views: int) -> None:
    z, batch = _random(views, 6, 4), _batch(torch.arange(6) * 5)
    ours = objectives.sup_con(0.3)(_encoded(z), batch)
    torch.testing.assert_close(ours, objectives.nt_xent(0.3)(_encoded(z), batch), rtol=1e-13, atol=1e-13)


def test_sup_con_of_one_view_and_no_positive_is_zero_with_zero_gradient() -> None:
    z = _random(1, 3, 4).requires_grad_()
    loss = objectives.sup_con(0.1)(_encoded(z), _batch(torch.arange(3)))
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss == 0 and not gradient.any()


def test_derivatives_of_sup_con_rows() -> None:
    columns, labels = _random(2, 4, 3).requires_grad_(), torch.tensor([0, 1, 0, 2])
    rows = _random(2, 2, 3, seed=1).requires_grad_()
    weights = torch.tensor([[0.5, 2.0], [1.5, 0.7]], dtype=torch.double)
    for function, inputs in (
        (lambda z: sup_con_rows(z, labels, 0.3, z, labels, 0), (columns,)),
        (lambda z, c: sup_con_rows(z, labels[1:3], 0.3, c, labels, 1) * weights, (rows, columns)),
        (lambda z, c: sup_con_rows(z, labels[1:3], 0.3, c, labels, None) * weights, (rows, columns)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_under_autocast(dtype: torch.dtype) -> None:
    z, p, logits = (_random(2, 32, 16, seed=s).to(dtype) for s in range(3))
    batch = _batch(torch.arange(32) % 5)
    for objective in (objectives.sup_con(0.05), objectives.cross_entropy(), objectives.simsiam()):
        with torch.autocast("cpu", torch.bfloat16):
            low = objective(_encoded(z, logits, p), batch)
        exact = objective(_encoded(z.double(), logits.double(), p.double()), batch)
        assert low.dtype == torch.float32
        torch.testing.assert_close(low.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_cross_entropy_equals_a_loop(views: int) -> None:
    logits = 5 * _random(views, 7, 8)
    losses = objectives.cross_entropy()(_encoded(logits=logits), _batch(LABELS))
    assert losses.shape == (views * 7,)
    for view in range(views):
        for image, label in enumerate(LABELS):
            a = logits[view, image].numpy()
            expected = np.logaddexp.reduce(a) - a[label]
            assert losses[view * 7 + image].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_simsiam_is_the_formula() -> None:
    z, p = _random(2, 5, 4).requires_grad_(), _random(2, 5, 4, seed=1).requires_grad_()
    losses = objectives.simsiam()(_encoded(z, predictions=p), _batch(torch.zeros(5)))
    for image in range(5):
        (z1, z2), (p1, p2) = z[:, image].detach().numpy(), p[:, image].detach().numpy()
        assert losses[image].item() == pytest.approx(-_cosine(p1, z2) / 2 - _cosine(p2, z1) / 2, rel=1e-12)
    cosine = F.cosine_similarity
    expected = -(cosine(p[0], z[1].detach()) + cosine(p[1], z[0].detach())) / 2
    torch.testing.assert_close(torch.autograd.grad(losses.mean(), p), torch.autograd.grad(expected.mean(), p))
    assert torch.autograd.gradgradcheck(
        lambda p: objectives.simsiam()(_encoded(z.detach(), predictions=p), _batch(torch.zeros(5))), (p,)
    )
    assert torch.autograd.grad(losses.sum(), z, allow_unused=True) == (None,)  # z stands under the stop-gradient


def test_simsiam_of_three_views_is_the_mean_over_ordered_pairs() -> None:
    z, p = _random(3, 4, 6), _random(3, 4, 6, seed=1)
    losses = objectives.simsiam()(_encoded(z, predictions=p), _batch(torch.zeros(4)))
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    expected = -sum(F.cosine_similarity(p[a], z[b]) for a, b in pairs) / 6
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("fixed_views", [1, 2])
def test_info_nce_equals_a_double_loop(fixed_views: int) -> None:
    anchors, fixed, temperature = _random(1, 4, 3), _random(fixed_views, 4, 3, seed=1), 0.2
    losses = objectives.info_nce(temperature)(_encoded(fixed), _batch(torch.zeros(4)))(_encoded(anchors))
    for i in range(4):
        s = np.array([[_cosine(a.numpy(), anchors[0, i].numpy()) / temperature for a in view] for view in fixed])
        assert losses[i].item() == pytest.approx(np.logaddexp.reduce(s.ravel()) - s[:, i].mean(), rel=1e-12)


def test_one_sided_sup_con_has_its_class_as_positives() -> None:
    anchors, fixed, temperature = _random(1, 7, 3), _random(1, 7, 3, seed=1), 0.2
    losses = objectives.sup_con_one_sided(temperature)(_encoded(fixed), _batch(LABELS))(_encoded(anchors))
    for i in range(7):
        s = np.array([_cosine(a.numpy(), anchors[0, i].numpy()) / temperature for a in fixed[0]])
        positives = [s[j] for j in range(7) if LABELS[j] == LABELS[i]]
        assert losses[i].item() == pytest.approx(np.logaddexp.reduce(s) - np.mean(positives), rel=1e-12)


@pytest.mark.parametrize("name", ["nt_xent", "sup_con", "cross_entropy", "simsiam"])
def test_a_one_sided_loss_is_an_images_own(name: str) -> None:
    """Its Jacobian by the attacked rows is diagonal, and nothing flows into the fixed view."""
    against = build_one_sided(TermConfig(objective=name))
    fixed = [_random(1, 7, 8, seed=s).requires_grad_() for s in range(3)]
    attacked = _random(1, 7, 8, seed=9).requires_grad_()
    losses = against(_encoded(*fixed), _batch(LABELS))(_encoded(attacked, attacked, attacked))
    assert losses.shape == (7,)
    for i in range(7):
        (gradient,) = torch.autograd.grad(losses[i], attacked, retain_graph=True)
        assert gradient[0, i].any() and not gradient[0].index_fill(0, torch.tensor([i]), 0).any()
    assert torch.autograd.grad(losses.sum(), fixed, allow_unused=True) == (None, None, None)


def test_simsiams_one_side_has_the_gradient_of_the_whole() -> None:
    """For the attacked view: up to the factor ½, the symmetric loss gives it the same gradient."""
    weight = _random(6, 6, seed=3)
    x, other = _random(1, 5, 6).requires_grad_(), _random(1, 5, 6, seed=1)
    views, batch = torch.cat([x, other]), _batch(torch.zeros(5))
    (whole,) = torch.autograd.grad(objectives.simsiam()(_encoded(views, None, views @ weight), batch).sum(), x)
    one = objectives.simsiam_one_sided()(_encoded(other), batch)(_encoded(x, None, x @ weight))
    torch.testing.assert_close(whole, torch.autograd.grad(one.sum(), x)[0] / 2)


OBJECTIVES = {
    "sup_con": objectives.sup_con(0.2),
    "cross_entropy": objectives.cross_entropy(),
    "simsiam": objectives.simsiam(),
}


def _derivatives(x: Tensor, weight: Tensor, labels: Tensor) -> dict[str, list[Tensor]]:
    """Value, and first and second derivatives by the weight, over the ranks, of this rank's share of x [V, B, 6]."""
    rank, world = distributed.rank(), distributed.world_size()
    x, labels = x.chunk(world, dim=1)[rank], labels.chunk(world)[rank]
    found = {}
    for name, objective in OBJECTIVES.items():
        rows, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        z = torch.tanh(rows @ w) * rows.square().sum(-1, keepdim=True)
        loss = objective(_encoded(z, z, torch.sin(z @ w)), _batch(labels)).mean()
        (gradient,) = torch.autograd.grad(loss, rows, create_graph=True)
        penalised = loss + gradient.square().sum() / world
        values = [loss, *torch.autograd.grad(loss, w, retain_graph=True), *torch.autograd.grad(penalised, w)]
        found[name] = [distributed.all_reduce(value.detach()) / world for value in values]
    for name in ("nt_xent", "sup_con"):
        losses = build_one_sided(TermConfig(objective=name))(_encoded(x[1:]), _batch(labels))(_encoded(x[:1]))
        found[f"{name}, one side"] = [distributed.all_gather(losses).flatten()]
    return found


def test_two_ranks_equal_one_through_second_derivatives() -> None:
    x, weight, labels = _random(2, 6, 6), _random(6, 6, seed=1), torch.tensor([0, 1, 2, 0, 3, 1])
    one = _derivatives(x, weight, labels)
    for ranks in run_ranks(2, _derivatives, x, weight, labels):
        for name, expected in one.items():
            for position, (ours, whole) in enumerate(zip(ranks[name], expected, strict=True)):
                if position == 2 and name != "sup_con":
                    continue  # of a per-image loss, the gradient by the images of a rank's *mean* depends on the rank
                torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)


HEADS = ModelConfig(
    arch="resnet18",
    stem="cifar",
    width=0.125,
    classes=5,
    layer_heads=True,
    head=HeadConfig(layers=3, out=12, predictor=4),
)


def test_simsiams_heads() -> None:
    encoder = Encoder(HEADS)
    names = [type(m).__name__ for m in encoder.head]
    assert names == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert encoder.head[-1].weight is None and encoder.head[-1].bias is None
    assert [type(m).__name__ for m in encoder.predictor] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [tuple(m.weight.shape) for m in encoder.predictor if isinstance(m, nn.Linear)] == [(4, 12), (12, 4)]
    encoded = encoder(torch.rand(4, 3, 16, 16))
    assert encoded.projections.shape == encoded.predictions.shape == (4, 12)
    torch.testing.assert_close(encoded.predictions, encoder.predictor(encoded.projections))
    with pytest.raises(UsageError, match=r"predictor=4 .* set layers=3"):
        resolve(HeadConfig, {"layers": 0, "predictor": 4})


def test_layers_are_the_stages_with_heads_of_their_own() -> None:
    encoder = Encoder(HEADS).eval()
    encoded = encoder(torch.rand(4, 3, 16, 16))
    assert len(encoded.layers) == 4
    for depth, layer in enumerate(encoded.layers, start=1):
        torch.testing.assert_close(layer.features, encoded.stages[depth - 1].flatten(2).mean(-1))
        assert layer.images is encoded.images and len(layer.stages) == depth
        assert layer.projections.shape == layer.predictions.shape == (4, 12) and layer.logits.shape == (4, 5)
    assert encoded.layers[3].projections is encoded.projections and encoded.layers[3].logits is encoded.logits
    head = encoder.layer_heads[1]
    torch.testing.assert_close(encoded.layers[1].logits, head.fc(encoded.layers[1].features))
    plain = Encoder(HEADS.model_copy(update={"layer_heads": False}))
    assert plain(torch.rand(2, 3, 16, 16)).layers == ()
    assert [key for key in encoder.state_dict() if not key.startswith("layer_heads")] == list(plain.state_dict())


def test_layer_by_layer_is_the_weighted_sum() -> None:
    encoded, batch = Encoder(HEADS)(torch.rand(6, 3, 16, 16)), _batch(torch.tensor([0, 1, 2]))
    for of in (objectives.nt_xent(0.5), objectives.cross_entropy()):
        ours = objectives.layer_by_layer(of, (0.0, 0.1, 0.3, 2.0))(encoded, batch)
        parts = [of(layer, batch) for layer in encoded.layers]
        torch.testing.assert_close(ours, 0.1 * parts[1] + 0.3 * parts[2] + 2 * parts[3])


def test_terms_are_built_by_name() -> None:
    z, p, logits = (_random(2, 7, 8, seed=s) for s in range(3))
    encoded, batch = _encoded(z, logits, p), _batch(LABELS)
    for name, expected in {
        "nt_xent": objectives.nt_xent(0.3),
        "sup_con": objectives.sup_con(0.3),
        "cross_entropy": objectives.cross_entropy(),
        "simsiam": objectives.simsiam(),
    }.items():
        temperature = {"temperature": 0.3} if name in ("nt_xent", "sup_con") else {}
        built = build_objective(TermConfig(objective=name, **temperature))
        assert torch.equal(built(encoded, batch), expected(encoded, batch))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": "simclr"}, "'simclr' does not exist: choose one of nt_xent"),
        ({"objective": "simsiam", "temperature": 0.5}, "temperature=0.5: simsiam has none"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"weight": -1}, "weight=-1"),
        ({"penalty": {"weight": -1}}, r"penalty\.weight=-1"),
        ({"penalty": {"weight": 1, "step": 0.1}}, "step=0.1 means nothing to double_backward"),
        ({"penalty": {"weight": 1, "method": "jvp"}}, r"penalty\.method='jvp'"),
        ({"objective": "simsiam", "penalty": {"weight": 1, "method": "finite_difference"}}, "stop-gradient"),
        ({"layers": {"beta": [0, 0, 0, 1]}}, "without alpha"),
        ({"layers": {"alpha": [0, 0, 0, 0]}}, "at least one stage"),
        ({"layers": {"alpha": [0, 0, 0, 1], "beta": [0, 0, 0, 0]}}, "leave beta out"),
        ({"layers": {"alpha": [0, 0, 1]}}, r"layers\.alpha"),
        ({"penalty": {"weight": 1}, "layers": {"alpha": [0, 0, 0, 1], "beta": [0, 0, 0, 1]}}, "both weigh"),
    ],
)
def test_mistakes_name_the_value(values: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(TermConfig, values)


@pytest.mark.parametrize(
    ("term", "model", "message"),
    [
        ({"objective": "cross_entropy"}, {}, r"model\.classes=0"),
        ({"objective": "simsiam"}, {}, r"model\.head\.predictor=0"),
        ({"objective": "sup_con"}, {"head": {"layers": 0}}, r"model\.head\.layers=0"),
        ({"layers": {"alpha": [0, 0, 1, 1]}}, {}, r"model\.layer_heads=true"),
    ],
)
def test_a_model_without_the_head_is_refused(term: dict, model: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_term(resolve(TermConfig, term), resolve(ModelConfig, {"arch": "resnet18", **model}), 2, 10, 64)
    with pytest.raises(UsageError, match="set model"):  # and the objective itself, called all the same
        build_objective(resolve(TermConfig, term))(
            _encoded(_random(2, 3, 4) if term == {"objective": "simsiam"} else None), _batch(torch.zeros(3))
        )


@pytest.mark.parametrize(
    ("objective", "images", "classes", "message"),
    [
        ("nt_xent", 1, 10, r"nt_xent compares images .* has 1, .* train\.batch .* train\.loss_over=batch"),
        ("sup_con", 1, 10, r"train\.loss_over=batch"),
        ("simsiam", 1, 10, r"raise train\.batch or lower train\.accumulation$"),
        ("sup_con", 64, 1, "sup_con tells classes apart and the images have 1"),
        ("cross_entropy", 64, 1, "choose nt_xent or simsiam"),
        ("sup_con", 64, 0, "sup_con tells classes apart and the images have no labels, .* give images of more classes"),
    ],
)
def test_a_loss_that_would_be_constant_is_refused(objective: str, images: int, classes: int, message: str) -> None:
    heads = resolve(ModelConfig, {"arch": "resnet18", "classes": classes, "head": {"predictor": 8}})
    term = TermConfig(objective=objective)
    check_term(term, heads.model_copy(update={"classes": 10}), 2, 10, 2)
    with pytest.raises(UsageError, match=message):
        check_term(term, heads, 2, classes, images)


def test_a_contrastive_loss_of_one_image_is_constant() -> None:
    """What the refusal says: NT-Xent and SupCon are 0 for any projections."""
    for seed in range(3):
        z = _random(2, 1, 4, seed=seed)
        for objective in (objectives.nt_xent(0.1), objectives.sup_con(0.1)):
            assert abs(float(objective(_encoded(z), _batch(torch.zeros(1, dtype=torch.int64))))) < 1e-6


def test_simsiam_refuses_one_view() -> None:
    with pytest.raises(UsageError, match="views"):
        objectives.simsiam()(_encoded(_random(1, 3, 4), None, _random(1, 3, 4)), _batch(torch.zeros(3)))


def _precisions(objective: objectives.Objective, autocast: bool) -> set[str]:
    """That NT-Xent's kernels would multiply in on a GPU in a training step."""
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    encoder = Encoder(ModelConfig(arch="resnet18", stem="cifar", width=0.125, head=HeadConfig(out=16)))
    batch = Batch(torch.rand(2, 4, 3, 8, 8), torch.arange(4) % 2, torch.arange(4))
    precisions = set()

    def noted(kernel, *arguments, grid, warmup, **options) -> None:
        precisions.update({options["PRECISION"]} if "PRECISION" in options else ())

    with as_on_a_gpu(), mock.patch.object(JITFunction, "run", noted):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = TrainStep(encoder, [Term("loss", objective)])(batch)
        loss.backward()
    return precisions


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="which multiplies everything in float32")
@pytest.mark.parametrize("of", [objectives.nt_xent(0.1), objectives.sup_con(0.1)])
def test_on_a_gpu_the_loss_is_multiplied_in_the_precision_of_its_projections(of: objectives.Objective) -> None:
    assert _precisions(of, autocast=True) == {"bf16"}
    assert _precisions(of, autocast=False) == {"tf32x3"}
    assert _precisions(objectives.gradient_penalty(of, 1.0), autocast=True) == {"bf16"}
    assert _precisions(objectives.gradient_penalty(of, 1.0, precision="fp32"), autocast=True) == {"tf32x3"}


@pytest.mark.parametrize(("dtype", "first", "second"), [(torch.bfloat16, 10, 35), (torch.float32, 8, 28)])
def test_nt_xent_is_few_launches_and_no_wait(dtype: torch.dtype, first: int, second: int) -> None:
    """Forward and backward; and with a penalty on the projections' gradient, three passes more."""
    pytest.importorskip("triton")
    z, batch = torch.randn(16, 128).to(dtype).requires_grad_(), _batch(torch.arange(8))
    with as_on_a_gpu() as watch:
        objectives.nt_xent(0.1)(_encoded(z[None]), batch).backward()
    assert not watch.waits and watch.total <= first
    with as_on_a_gpu() as watch:
        loss = objectives.nt_xent(0.1)(_encoded(z[None]), batch)
        (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
        (loss + gradient.float().square().sum()).backward()
    assert not watch.waits and watch.total <= second
