"""The loss landscape and its curvature against double loops, closed forms, explicit Hessians, and over ranks."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from torch import Tensor, nn

from fasttrain.config import load
from fasttrain.errors import UsageError
from fasttrain.evaluation.classifier import Linear
from fasttrain.evaluation.curvature import (
    estimate,
    hessian_product,
    hutchinson,
    signs,
    summed_loss,
    top_eigenvalue,
    weights_of,
)
from fasttrain.evaluation.evaluation import EvaluationData, split_arrays, subjects_of
from fasttrain.evaluation.landscape import (
    EVALUATION,
    Landscape,
    LandscapeEvaluation,
    LandscapeResult,
    Network,
    Rise,
    labels,
)
from fasttrain.evaluation.loss_plane import (
    axis_of,
    filter_normalised,
    filter_scales,
    loss_plane,
    moved,
    random_directions,
    ring_of,
)
from fasttrain.evaluation.parts import Parts
from fasttrain.export import export
from fasttrain.figures import png
from fasttrain.models import Encoder, HeadConfig, ModelConfig
from fasttrain.stop import Stopped, StopRequest
from tests.ranks import run_ranks
from tests.test_launch import script


def small_network() -> Network:
    """A ResNet with weights of three classes' classifier, its BatchNorm statistics not those of the start."""
    torch.manual_seed(0)
    shape = {"arch": "resnet18", "stem": "cifar", "width": 1 / 32, "zero_init_residual": False}
    encoder = Encoder(ModelConfig(**shape, head=HeadConfig(layers=0))).double()
    for name, parameter in encoder.named_parameters():
        if parameter.dim() == 1:  # no sum that ReLU sees is 0
            nn.init.normal_(parameter, 1.0 * name.endswith("weight"), 0.1)
    for _ in range(3):
        encoder(torch.rand(16, 3, 8, 8, dtype=torch.float64))
    features = encoder.backbone.num_features
    weight, bias = torch.randn(3, features, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    return Network(encoder, Linear(weight, bias, None)).double().eval()


def batches_of(sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.rand(n, 3, 8, 8, generator=draw, dtype=torch.float64), torch.randint(3, (n,), generator=draw))
        for n in sizes
    ]


# directions


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (5, 7), (1, 1), (2, 3, 5)])
def test_each_filter_of_a_direction_is_as_long_as_the_weights(shape):
    torch.manual_seed(0)
    direction, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    found = filter_normalised(direction, weight)
    for d, w, f in zip(direction, weight, found, strict=True):
        length = math.sqrt(sum(x * x for x in w.flatten().tolist()))
        own = math.sqrt(sum(x * x for x in d.flatten().tolist()))
        expected = torch.tensor([x / own * length for x in d.flatten().tolist()], dtype=torch.float64)
        torch.testing.assert_close(f.flatten(), expected, rtol=1e-14, atol=0)


def test_filters_of_no_length_and_biases_stay():
    weight = torch.randn(3, 2, 1, 1, dtype=torch.float64)
    weight[1] = 0
    direction = torch.randn(3, 2, 1, 1, dtype=torch.float64)
    direction[2] = 0
    found = filter_normalised(direction, weight)
    assert found[0].norm() == pytest.approx(float(weight[0].norm())) and not found[1:].any()
    assert not filter_normalised(torch.randn(5), torch.randn(5)).any()
    assert filter_normalised(torch.tensor(1.0), torch.tensor(1.0)) == 0


def test_a_networks_directions_move_its_filters_alone():
    network = small_network()
    first, second = random_directions(network, seed=3)
    assert list(first) == [name for name, _ in network.named_parameters()]
    filters = 0
    for name, weight in network.named_parameters():
        assert first[name].shape == weight.shape and first[name].dtype == weight.dtype
        if ".bn" in name or name.endswith("bias") or weight.dim() == 1:
            assert not first[name].any()
        else:
            assert not first[name].equal(second[name])
            filters += len(weight)
            for row, wanted in zip(first[name], weight, strict=True):
                assert row.norm() == pytest.approx(float(wanted.detach().norm()), rel=1e-12)
    assert filters > 100 and first["classifier.weight"].any() and not first["classifier.bias"].any()


def test_directions_depend_on_the_seed_and_on_nothing_else():
    network = small_network()
    first = random_directions(network, seed=3)
    torch.manual_seed(8)
    again = random_directions(network, seed=3, count=3)
    assert all(first[k][name].equal(again[k][name]) for k in range(2) for name in first[k])
    assert not random_directions(network, seed=4)[0]["classifier.weight"].equal(first[0]["classifier.weight"])
    narrow = random_directions({name: weight.float() for name, weight in weights_of(network).items()}, seed=3)
    for name, direction in narrow[0].items():
        torch.testing.assert_close(direction.double(), first[0][name], rtol=1e-6, atol=1e-8)


# the plane


def linear_case() -> tuple[nn.Linear, list[tuple[Tensor, Tensor]], list[dict[str, Tensor]]]:
    torch.manual_seed(5)
    network = nn.Linear(4, 3, dtype=torch.float64)
    batches = [(torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))) for n in (5, 2)]
    return network, batches, random_directions(network, seed=1)


def test_the_plane_of_a_linear_classifier_is_the_closed_form():
    """Cross-entropy is log Σ_c exp(z_c) − z_y, and z is W x + b + α D₁ x + β D₂ x."""
    network, batches, directions = linear_case()
    weight, bias = (parameter.detach() for parameter in network.parameters())
    points = [(0.0, 0.0), (0.5, -1.0), (-1 / 3, 2.0), (0.0, 30.0)]
    found = loss_plane(network, directions, points, batches)
    for (alpha, beta), loss, error in zip(points, *found, strict=True):
        total = wrong = 0
        for x, label in ((x, int(y)) for xs, ys in batches for x, y in zip(xs, ys, strict=True)):
            scores = []
            for c in range(3):
                row = [
                    float(weight[c, i])
                    + alpha * float(directions[0]["weight"][c, i])
                    + beta * float(directions[1]["weight"][c, i])
                    for i in range(4)
                ]
                scores.append(sum(r * float(v) for r, v in zip(row, x, strict=True)) + float(bias[c]))
            total += math.log(sum(math.exp(score) for score in scores)) - scores[label]
            wrong += scores.index(max(scores)) != label
        assert float(loss) == pytest.approx(total / 7, rel=1e-12, abs=1e-14)
        assert float(error) == pytest.approx(100 * wrong / 7)


def test_the_plane_of_a_network_is_that_of_its_copies():
    network, batches = small_network(), batches_of([6, 3])
    directions, points = random_directions(network, seed=2), [(0.0, 0.0), (0.25, -0.5), (1.0, 1.0)]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = loss_plane(network, directions, points, batches)
    assert all(tensor.equal(before[name]) for name, tensor in network.state_dict().items())
    for (alpha, beta), loss in zip(points, found.losses, strict=True):
        copy = small_network()
        with torch.no_grad():
            for name, weight in copy.named_parameters():
                weight += alpha * directions[0][name] + beta * directions[1][name]
            expected = sum(nn.functional.cross_entropy(copy(x), y, reduction="sum") for x, y in batches) / 9
        assert float(loss) == pytest.approx(float(expected), rel=1e-10)


def test_more_directions_than_two_and_weights_left_out():
    network, batches, directions = linear_case()
    one = loss_plane(network, [{"weight": directions[0]["weight"]}], [(0.5,)], batches)
    assert one.losses.equal(loss_plane(network, directions, [(0.5, 0.0)], batches).losses)
    three = loss_plane(network, [*directions, directions[0]], [(0.25, 0.0, 0.25)], batches)
    torch.testing.assert_close(three.losses, one.losses, rtol=1e-14, atol=0)


def test_losses_that_overflow_stay_and_count_as_wrong():
    network, batches, _ = linear_case()
    far = [{"weight": torch.full((3, 4), 1e38)}]
    found = loss_plane(network.float(), far, [(1e3,)], [(x.float(), y) for x, y in batches])
    assert not found.losses.isfinite().any() and found.errors == 100


def test_batchnorm_takes_back_what_a_filter_is_multiplied_by():
    """So the landscape stays, and so does the curvature along its directions, while the trace itself changes."""
    network, batches = small_network(), batches_of([6])
    scaled = small_network()
    with torch.no_grad():
        scaled.encoder.backbone.layer1[0].conv1.weight *= 4
        scaled.encoder.backbone.layer1[0].bn1.running_mean *= 4
        scaled.encoder.backbone.layer1[0].bn1.running_var *= 16
        scaled.encoder.backbone.layer1[0].bn1.eps *= 16
    planes = [loss_plane(n, random_directions(n), [(0.0, 0.0), (0.3, -0.4)], batches).losses for n in (network, scaled)]
    torch.testing.assert_close(*planes, rtol=1e-10, atol=0)
    found = []
    for n in (network, scaled):
        size = sum(weight.numel() for weight in n.parameters())
        plain, normalised = (
            hutchinson(lambda v, n=n: hessian_product(n, batches, v), size, 2, scales=scales).mean
            for scales in (None, filter_scales(n))
        )
        found.append((plain, normalised))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-8) and abs(found[0][0] / found[1][0] - 1) > 1e-6


def test_grids_share_their_points_to_the_bit():
    assert set(axis_of(1.0, 11)) < set(axis_of(1.0, 21)) and set(axis_of(0.5, 11)) < set(axis_of(1.0, 21))
    assert set(axis_of(0.3, 3)) < set(axis_of(0.9, 7)) and axis_of(0.3, 3) == [-0.3, 0.0, 0.3]
    assert axis_of(1.0, 21)[12] == 0.2
    assert all(math.hypot(*point) == pytest.approx(0.7) for point in ring_of(0.7, 5))


# the Hessian


def explicit_hessian(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    weights = weights_of(network)
    shapes = [(name, weight.shape, weight.numel()) for name, weight in weights.items()]

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([count for *_, count in shapes])
        named = {name: part.view(shape) for part, (name, shape, _) in zip(parts, shapes, strict=True)}
        return sum(summed_loss(network, named, x, y)[0] for x, y in batches) / sum(len(y) for _, y in batches)

    return torch.autograd.functional.hessian(loss, torch.cat([weight.flatten() for weight in weights.values()]))


def tiny_case() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(2)
    network = nn.Sequential(
        nn.Conv2d(3, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 3)
    )
    network = network.double()
    network(torch.rand(8, 3, 8, 8, dtype=torch.float64))
    return network.eval(), batches_of([5, 4])


def test_products_traces_and_eigenvalues_are_those_of_the_explicit_hessian():
    network, batches = tiny_case()
    hessian = explicit_hessian(network, batches)
    size = len(hessian)
    vector = torch.randn(size, dtype=torch.float64)

    def product(v: Tensor) -> Tensor:
        return hessian_product(network, batches, v)

    torch.testing.assert_close(product(vector), hessian @ vector, rtol=1e-9, atol=1e-12)
    found = hutchinson(product, size, 40, seed=1)
    assert abs(found.mean - float(hessian.trace())) < 4 * found.standard_error
    expected = [float(signs(size, 1, k) @ hessian @ signs(size, 1, k)) for k in range(40)]
    assert found.mean == pytest.approx(sum(expected) / 40, rel=1e-9)
    along = hutchinson(product, size, 40, seed=1, scales=filter_scales(network))
    exact = float((filter_scales(network) ** 2 * hessian.diagonal()).sum())
    assert abs(along.mean - exact) < 4 * along.standard_error
    values = torch.linalg.eigvalsh(hessian)
    top = top_eigenvalue(product, signs(size, 0, 0), 40, tolerance=1e-9)
    assert top.converged and top.value == pytest.approx(float(values[-1]), rel=1e-10)


def test_products_are_differences_of_gradients():
    """Of our network with its own BatchNorm and convolutions; no ReLU changes sides on so short a step."""
    network, batches = small_network(), batches_of([4, 3])
    weights = weights_of(network)
    size = sum(weight.numel() for weight in weights.values())
    vector = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = hessian_product(network, batches, vector)

    def gradient(step: float) -> Tensor:
        parts = vector.split([weight.numel() for weight in weights.values()])
        at = {
            name: (weight + step * part.view(weight.shape)).requires_grad_()
            for part, (name, weight) in zip(parts, weights.items(), strict=True)
        }
        loss = sum(summed_loss(network, at, x, y)[0] for x, y in batches) / 7
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(at.values()))])

    difference = (gradient(1e-7) - gradient(-1e-7)) / 2e-7
    assert (found - difference).norm() < 1e-5 * found.norm()


def test_products_in_float32_are_those_in_float64():
    batches, exact = batches_of([6]), small_network()
    vector = signs(sum(weight.numel() for weight in exact.parameters()), 0, 0)
    expected = hessian_product(exact, batches, vector)
    found = hessian_product(small_network().float(), [(x.float(), y) for x, y in batches], vector.float())
    assert found.dtype == torch.float32 and (found - expected).norm() < 1e-5 * expected.norm()


def test_the_mean_curvature_along_directions_is_that_of_many():
    network, batches = tiny_case()
    hessian = explicit_hessian(network, batches)
    exact = float((filter_scales(network) ** 2 * hessian.diagonal()).sum())
    directions = random_directions(network, seed=0, count=1500)
    vectors = torch.stack([torch.cat([part.flatten() for part in d.values()]) for d in directions])
    along = estimate(((vectors @ hessian) * vectors).sum(1).tolist())
    assert abs(along.mean - exact) < 4 * along.standard_error < 0.3 * exact


def test_the_trace_of_a_diagonal_matrix_takes_one_probe():
    diagonal = torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    found = hutchinson(lambda v: diagonal * v, 4, 3)
    assert found.mean == 4.5 and found.standard_error == 0 and found.probes == 3
    assert math.isnan(hutchinson(lambda v: diagonal * v, 4, 1).standard_error)
    assert hutchinson(lambda v: diagonal * v, 4, 1, scales=torch.tensor([1.0, 0, 0, 2])).mean == 11


def test_probes_are_signs_of_their_seed_and_number():
    assert set(signs(100, 0, 0).tolist()) == {-1.0, 1.0}
    assert signs(64, 0, 0).equal(signs(64, 0, 0)) and signs(64, 0, 0).equal(signs(100, 0, 0)[:64])
    assert len({tuple(signs(64, s, k).tolist()) for s in (0, 1) for k in (0, 1)}) == 4
    assert abs(float(signs(100_000, 2, 5).mean())) < 0.02


def test_the_top_eigenvalue_is_the_largest_and_not_the_largest_in_magnitude():
    diagonal = torch.cat([torch.tensor([-10.0, 3.0]), torch.linspace(-1, 1, 200)]).double()
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(202, 202, generator=draw, dtype=torch.float64)).Q
    matrix = basis @ diagonal.diag() @ basis.T
    found = top_eigenvalue(lambda v: matrix @ v, signs(202, 0, 0), 100, 1e-3)
    assert found.converged and found.iterations < 40
    assert abs(found.value - 3) <= found.residual <= 3e-3
    few = top_eigenvalue(lambda v: matrix @ v, signs(202, 0, 0), 2, 1e-9)
    assert not few.converged and few.iterations == 2 and few.residual > 0.1
    exact = top_eigenvalue(lambda v: 2 * v, signs(5, 0, 0), 50, 1e-12)
    assert exact.value == pytest.approx(2) and exact.converged and exact.iterations == 1
    small = top_eigenvalue(lambda v: torch.tensor([1.0, 5.0]) * v, torch.ones(2), 50, 1e-12)
    assert small.value == pytest.approx(5, rel=1e-6) and small.iterations == 2
    lost = top_eigenvalue(lambda v: v * torch.inf, torch.ones(3), 5)
    assert math.isnan(lost.value) and not lost.converged


def test_a_search_ends_on_a_signal():
    with StopRequest() as request, pytest.raises(Stopped):
        request.received = True
        top_eigenvalue(lambda v: v, torch.ones(3), 5)


# the command

SMALL = ["augment.size=16", "classifier.linear.l2=[0.1]", "batch=8", "images=20", "points=3", "radii=[0.4]", "ring=4"]
SMALL += ["hessian.probes=2", "hessian.iterations=3", "hessian.images=6", "hessian.batch=4", "loader.threads=1"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    encoder = Encoder(ModelConfig(arch="resnet18", stem="cifar", width=1 / 16, head=HeadConfig(layers=0)))
    return export(encoder, tmp_path_factory.mktemp("weights"))


def config_of(source, images, output, *given: str) -> LandscapeEvaluation:
    arguments = ["task=landscape", f"source=[{source}]", f"data.root={images}", f"output={output}", "device=cpu"]
    return load(LandscapeEvaluation, [*arguments, *SMALL, *given])


def evaluate_here(source, images, output, *given: str) -> dict:
    assert not script("eval").evaluate(config_of(source, images, output, *given))
    return json.loads(output.read_text())


def told(table: dict) -> dict:
    return {name: table[name] for name in LandscapeResult._fields}


@pytest.fixture(scope="module")
def first(weights, images, tmp_path_factory):
    """The folder of a command that has run, and its table."""
    folder = tmp_path_factory.mktemp("landscape")
    return folder, evaluate_here(weights, images, folder / "one.json")


def kept(folder) -> list[str]:
    """Lines of what was found, beside the classifier."""
    lines = [line for path in folder.glob("one.parts/*.jsonl") for line in path.read_text().splitlines()]
    return [line for line in lines if json.loads(line)["point"].get("classifier") is None]


def test_the_command_tells_a_plane_and_its_flatness(first):
    folder, table = first
    (one,) = table["landscapes"]
    assert table["coordinates"] == [-1, 0, 1] and one["losses"][1][1] == one["loss"] and 0 <= one["error"] <= 100
    assert len(one["losses"]) == len(one["losses"][0]) == 3 and one["trace"]["probes"] == 2
    assert one["rises"][0]["mean"] <= one["rises"][0]["max"] and one["top_eigenvalue"]["iterations"] <= 3
    assert table["images"] == 20 and table["hessian_images"] == 6 and table["train"]["images"] == 24
    assert (folder / "one.png").read_bytes()[:4] == b"\x89PNG" and len(kept(folder)) == 9 + 4 + 3


def test_a_finer_grid_and_more_probes_go_on_from_what_is_there(first, weights, images, tmp_path, capsys):
    folder, table = first
    before = set(kept(folder))
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    finer = evaluate_here(weights, images, tmp_path / "one.json", "points=5", "hessian.probes=3")
    assert before < set(kept(tmp_path)) and len(kept(tmp_path)) == len(before) + 25 - 9 + 1
    assert [row[::2] for row in finer["landscapes"][0]["losses"][::2]] == table["landscapes"][0]["losses"]
    assert told(evaluate_here(weights, images, tmp_path / "one.json")) == told(table)
    assert len(kept(tmp_path)) == len(before) + 25 - 9 + 1  # worked on nothing
    assert "encoder" in capsys.readouterr().out


def _on_a_rank(source: str, images: str) -> dict:
    config = config_of(source, images, "none.json")
    data = EvaluationData(config, torch.device("cpu"), None)
    found = EVALUATION.evaluate(subjects_of(config), data, config, Parts(None))
    return json.loads(json.dumps(split_arrays(found)[0]))


def test_two_ranks_find_what_one_does_to_the_bit(first, weights, images):
    expected = told(first[1])
    assert run_ranks(2, _on_a_rank, str(weights), str(images)) == [expected, expected]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("points=20", "points.*20 is even, .* use 21"),
        ("points=1", "points"),
        ("extent=0", "extent"),
        ("extent=-1", "extent"),
        ("radii=[0.5,0]", "radii"),
        ("images=0", "images"),
        ("hessian.tolerance=0", "tolerance"),
    ],
)
def test_settings_that_make_no_plane_are_refused(given, complaint, weights, images, tmp_path):
    with pytest.raises(UsageError, match=complaint):
        config_of(weights, images, tmp_path / "o.json", given)


def test_too_few_images_are_refused_before_any_work(weights, images, tmp_path):
    with pytest.raises(UsageError, match="1 train images of 2 classes are fewer than one each: set images=2 or more"):
        evaluate_here(weights, images, tmp_path / "one.json", "images=1")
    with pytest.raises(UsageError, match="class 'bird' is none of the 2"):
        evaluate_here(weights, images, tmp_path / "one.json", "classifier.classes=[cat,bird]")
    assert not kept(tmp_path)


def landscape(name: str, height: float, cut: bool = False) -> Landscape:
    axis = axis_of(1.0, 5)
    losses = [[height * (0.1 + a * a + 0.5 * b * b) for b in axis] for a in axis]
    if cut:
        losses[0][0], losses[4][0] = math.inf, math.nan
    rises = [Rise(0.5, 0.1, 0.2), Rise(1.0, 0.4, 0.8)]
    errors = [[10.0] * 5] * 5
    return Landscape(name, name, name, losses[2][2], 10.0, losses, errors, rises, estimate([1, 2]), None, None)


@pytest.mark.parametrize("count", [1, 6])
def test_pictures_of_one_encoder_and_of_many(count):
    landscapes = [landscape(f"run{number}", 1.0 + number, cut=number == 0) for number in range(count)]
    landscapes = [one._replace(curvature=one.trace) for one in landscapes]
    result = LandscapeResult("train", 100, 50, "all 3 classes", axis_of(1.0, 5), landscapes)
    drawn = EVALUATION.figure(result)
    assert png(drawn, 30)[:4] == b"\x89PNG"
    assert "2 of 25 losses not finite, left blank" in " ".join(drawn.get_supxlabel().split())
    assert EVALUATION.lines(result)[-1] == f"2 of {25 * count} losses are not finite"


def test_seeds_of_one_method_keep_their_own_names():
    several = [landscape(name, 1.0)._replace(method=method) for name, method in (("a", "x"), ("b", "x"), ("c", "y"))]
    assert labels(several) == ["x (a)", "x (b)", "y"]


def test_weights_of_a_point_are_the_exact_sum():
    weights = {"w": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0])}
    found = moved(weights, [{"w": torch.tensor([[4.0, 8.0]])}, {"w": torch.tensor([[0.5, 0.25]])}], (0.5, -2.0))
    assert found["w"].tolist() == [[2.0, 5.5]] and found["b"] is weights["b"]
