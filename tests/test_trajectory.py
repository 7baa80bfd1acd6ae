"""Progress, InPCA and trajectories side by side: against double loops, SciPy and what must hold exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import brentq
from torch import Tensor

from fasttrain.config import load
from fasttrain.errors import UsageError
from fasttrain.evaluation import progress as progress_module
from fasttrain.evaluation.evaluation import EvaluationData, split_arrays, subjects_of
from fasttrain.evaluation.inpca import inpca
from fasttrain.evaluation.parts import Parts
from fasttrain.evaluation.progress import (
    angles,
    bhattacharyya,
    cross,
    distances,
    floor_of,
    geodesic,
    progress,
    truth,
    uniform,
)
from fasttrain.evaluation.trajectories import FILE, Trajectory, write_trajectories
from fasttrain.evaluation.trajectory import TrajectoryEvaluation, compared, evaluate
from tests.ranks import run_ranks

N, C = 6, 4
LABELS = torch.tensor([0, 1, 2, 3, 1, 2])


def models(count: int, spread: float = 2, images: int = N, classes: int = C, seed: int = 0) -> Tensor:
    """[count, images, classes] float64, the later the nearer to the truth."""
    draw = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(count, images, classes, generator=draw, dtype=torch.float64)
    right = torch.nn.functional.one_hot(LABELS.repeat(images)[:images] % classes, classes)
    return (logits + torch.linspace(0, 4, count)[:, None, None] * right).softmax(-1)


def looped_distance(p: Tensor, q: Tensor) -> float:
    total = 0.0
    for one, other in zip(p.tolist(), q.tolist(), strict=True):
        total -= math.log(math.fsum(math.sqrt(a * b) for a, b in zip(one, other, strict=True)))
    return total / len(p)


def looped_geodesic(p: Tensor, q: Tensor, at: float) -> list[list[float]]:
    rows = []
    for one, other in zip(p.tolist(), q.tolist(), strict=True):
        angle = math.acos(math.fsum(math.sqrt(a * b) for a, b in zip(one, other, strict=True)))
        first, second = (math.sin(part * angle) / math.sin(angle) for part in (1 - at, at))
        rows.append([(first * math.sqrt(a) + second * math.sqrt(b)) ** 2 for a, b in zip(one, other, strict=True)])
    return rows


def close(one: Tensor, other: Tensor, within: float) -> bool:
    return bool((one - other).abs().max() <= within) and one.dtype == torch.float64


def test_the_distance_is_a_double_loops_and_exact_near_0():
    p, q = models(3), models(3, seed=1)
    expected = torch.tensor([looped_distance(one, other) for one, other in zip(p, q, strict=True)], dtype=torch.float64)
    assert close(bhattacharyya(p, q), expected, 1e-15)
    assert bhattacharyya(p, p).tolist() == [0, 0, 0]
    assert bhattacharyya(p.float(), p.double()).max() < 1e-13, "float32 is read, and divided by its sum in float64"
    # against the series: of √p = √q (1 + δ), d_B is ½ Σ q δ² to its third order
    delta = 1e-6 * torch.tensor([1.0, -1, 1, -1], dtype=torch.float64)
    near = torch.full((1, 4), 0.25, dtype=torch.float64)
    assert float(bhattacharyya(near * (1 + delta) ** 2 / (1 + 1e-12), near)) == pytest.approx(0.5e-12, rel=1e-5)


def test_what_shares_no_class_is_infinitely_far_and_a_floor_mends_it():
    right, wrong = truth(LABELS, C), truth((LABELS + 1) % C, C)
    assert bhattacharyya(right, wrong) == math.inf and distances([right, wrong])[0, 1] == math.inf
    assert floor_of(torch.float16) == 2**-25 and floor_of(torch.float32) == 2**-150 and floor_of(torch.float64) == 0
    stored = torch.tensor([1e-9, 1 - 1e-9]).half()[None]
    assert stored[0, 0] == 0
    found = cross([stored], [stored.flip(-1)], floor=floor_of(torch.float16))
    root = math.sqrt(2**-25) / (1 + 2**-25)
    assert float(found) == pytest.approx(-math.log(2 * root), rel=1e-12)


@pytest.mark.parametrize("memory", [9_000, 20_000, 1 << 28])
def test_all_distances_are_those_of_pairs_whatever_the_blocks(memory, monkeypatch):
    many = models(11, images=9)
    monkeypatch.setattr(progress_module, "TILE", 4)
    expected = torch.stack([torch.stack([bhattacharyya(one, other) for other in many]) for one in many])
    found = distances(many, memory=memory)
    assert close(found, expected, 1e-15) and found.equal(found.T) and not found.diagonal().any()
    assert close(distances([one.float() for one in many], memory=memory), expected, 1e-6)
    assert close(distances([many[0].half(), many[1].float()], memory=memory), expected[:2, :2], 1e-3)
    t = progress(many, uniform(9, C), truth(LABELS.repeat(2)[:9], C))
    assert close(progress(many, uniform(9, C), truth(LABELS.repeat(2)[:9], C), memory=memory), t, 1e-14)


def test_the_geodesic_is_equation_5():
    p, q = models(2)
    for at in (0.2, 0.5, 0.9):
        assert close(geodesic(p, q, at), torch.tensor(looped_geodesic(p, q, at), dtype=torch.float64), 1e-14)
    several = geodesic(p, q, torch.tensor([[0.0, 0.2], [0.7, 1.0]]))
    assert several.shape == (2, 2, N, C) and close(several.sum(-1), torch.ones(2, 2, N, dtype=torch.float64), 1e-15)
    assert close(several[0, 0], p, 1e-15) and close(several[1, 1], q, 1e-15)


def test_the_middle_of_a_geodesic_is_as_far_from_both_ends_and_limits_are_no_nan():
    p, q = models(2)
    middle = geodesic(p, q, 0.5)
    assert close(angles(p, middle), angles(middle, q), 1e-14) and close(angles(p, middle), angles(p, q) / 2, 1e-14)
    assert close(middle, geodesic(q, p, 0.5), 1e-15)
    assert close(geodesic(p, p, 0.3), p, 1e-15)
    nearly = p * (1 + 1e-9 * torch.randn_like(p))
    assert close(geodesic(p, nearly / nearly.sum(-1, keepdim=True), 0.3), p, 1e-8)
    right, wrong = truth(LABELS, C), truth((LABELS + 1) % C, C)
    assert close(angles(right, wrong), torch.full((N,), math.pi / 2, dtype=torch.float64), 1e-15)
    assert close(geodesic(right, wrong, 0.5), (right + wrong).double() / 2, 1e-15)


def test_progress_is_where_the_derivative_is_0():
    """By SciPy's root of the derivative, image by image; and beside it d_B itself is greater."""
    start, end, many = uniform(N, C), truth(LABELS, C), models(7, spread=1)
    found = progress(many, start, end)

    def slope(model: Tensor, at: float) -> float:
        angle = math.acos(math.sqrt(1 / C))
        total = 0.0
        for row, label in zip(model.tolist(), LABELS.tolist(), strict=True):
            a, b = sum(math.sqrt(x / C) for x in row), math.sqrt(row[label])
            value = a * math.sin((1 - at) * angle) + b * math.sin(at * angle)
            total -= angle * (b * math.cos(at * angle) - a * math.cos((1 - at) * angle)) / value
        return total

    inside = 0
    for model, t in zip(many, found.tolist(), strict=True):
        if slope(model, 0) >= 0:
            assert t == 0
        else:
            inside += 1
            assert t == pytest.approx(brentq(lambda at, m=model: slope(m, at), 0, 1, xtol=1e-15, rtol=1e-15), abs=1e-13)
            for near in (t - 1e-4, t + 1e-4):
                assert bhattacharyya(model, geodesic(start, end, near)) > bhattacharyya(model, geodesic(start, end, t))
    assert inside >= 4
    assert progress(many[3:4], start, end).equal(found[3:4]), "one model's does not depend on the others"


def test_a_model_on_the_geodesic_has_its_own_place_as_progress():
    start, end, at = uniform(N, C), truth(LABELS, C), torch.linspace(0, 1, 41, dtype=torch.float64)
    assert close(progress(geodesic(start, end, at), start, end), at, 1e-14)
    assert close(progress([start, end], start, end), torch.tensor([0, 1.0], dtype=torch.float64), 1e-15)
    p, q = models(2)
    assert close(progress(geodesic(p, q, at), p, q), at, 1e-13)
    assert progress([p, q], p, p).tolist() == [0, 0], "where there is no way, none is gone"
    certain = truth((LABELS + 1) % C, C)
    assert progress([certain], start, end).tolist() == [0], "certain and wrong: further from the truth than ignorance"
    one_wrong = truth(torch.cat([(LABELS[:1] + 1) % C, LABELS[1:]]), C)
    # infinitely far from the truth, and not from the way: with x = (1 − λ) π/3, tan²x is 1 / 5
    assert float(progress([one_wrong], start, end)) == pytest.approx(1 - 3 / math.pi * math.atan(5**-0.5), abs=1e-15)


def test_inpca_keeps_all_distances_with_imaginary_axes():
    given = distances(torch.cat([uniform(N, C)[None], truth(LABELS, C)[None], models(12, spread=3)]))
    found = inpca(given)
    m = len(given)
    # the same by loops
    looped = torch.zeros(m, m, dtype=torch.float64)
    for i in range(m):
        for j in range(m):
            mean = sum(given[i, k] + given[k, j] for k in range(m)) / m
            looped[i, j] = -0.5 * (given[i, j] - mean + sum(given[k, n] for k in range(m) for n in range(m)) / m**2)
    values, vectors = torch.linalg.eigh(looped)
    order = values.abs().argsort(descending=True)
    assert close(found.eigenvalues, values[order], 1e-14)
    expected = vectors[:, order] * values[order].abs().sqrt()
    assert close((found.coordinates.T @ expected).abs()[:5, :5], (expected.T @ expected)[:5, :5].abs(), 1e-13)
    assert found.imaginary.equal(found.eigenvalues < 0) and 1 <= int(found.imaginary.sum()) < m
    assert float(found.shares.sum()) == pytest.approx(1) and bool((found.shares.diff() <= 0).all())
    gaps = (found.coordinates[:, None] - found.coordinates[None]).square()
    assert close((gaps * found.eigenvalues.sign()).sum(-1), given, 1e-13)
    largest = found.coordinates.abs().argmax(0)
    assert bool((found.coordinates[largest, torch.arange(m)] >= 0).all())
    assert inpca(given, axes=2).coordinates.equal(found.coordinates[:, :2])


def test_inpca_of_euclidean_distances_is_classical_scaling():
    points = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points -= points.mean(0)
    found = inpca(torch.cdist(points, points).square(), axes=3)
    left, sizes, _ = torch.linalg.svd(points, full_matrices=False)
    assert close(found.eigenvalues[:3], sizes.square(), 1e-12)
    assert float(found.eigenvalues[3:].abs().max()) < 1e-12
    assert close(found.coordinates.abs(), (left * sizes).abs(), 1e-12)
    two = inpca(torch.tensor([[0.0, 4], [4, 0]]))
    assert close(two.coordinates, torch.tensor([[1.0, 0], [-1, 0]], dtype=torch.float64), 1e-12)


@pytest.mark.parametrize(
    ("work", "complaint"),
    [
        (lambda p: bhattacharyya(p, p * 1.1), r"are no probabilities: a row sums to 1\.1, where 1 was expected"),
        (lambda p: bhattacharyya(p, -p), "are no probabilities"),
        (lambda p: progress(p.log()[None], p, p), r"are no probabilities: .*give softmax's, not logits"),
        (lambda p: bhattacharyya(p, p[:-1]), r"models of \[6, 4\] and \[5, 4\]: give as many images and classes"),
        (lambda p: distances([p, p[:, :3] / p[:, :3].sum(-1, keepdim=True)]), r"models of \[6, 4\] and \[6, 3\]"),
        (lambda p: distances([p, p], memory=100), r"an image of 4 models and 4 classes takes .* allow more memory"),
        (lambda p: geodesic(p, p, 1.5), r"goes from λ = 0 to 1, and 1\.5 was asked for"),
        (
            lambda p: progress([truth(LABELS, C)], truth((LABELS + 1) % C, C), truth((LABELS + 2) % C, C)),
            "model 0 gives image 0 to no class that either end of the geodesic knows of",
        ),
        (
            lambda p: inpca(torch.tensor([[0.0, math.inf], [math.inf, 0]])),
            "2 of 4 distances are not finite",
        ),
        (lambda p: inpca(torch.tensor([[0.0, 1], [2, 0]])), "the same there and back"),
        (lambda p: inpca(torch.ones(2, 3)), r"distances \[2, 3\]: a square matrix"),
        (lambda p: bhattacharyya(p[:0], p[:0]), "of no image or no class"),
    ],
)
def test_bad_input_is_a_line(work, complaint):
    with pytest.raises(UsageError, match=complaint):
        work(models(1)[0])


def trajectory(task: str = "[0, 1, 2, 3]", seed: int = 0, epochs: int = 3, **changed) -> Trajectory:
    p = models(epochs + 1, spread=1, images=12, seed=seed).half()
    index = torch.arange(0, 36, 3)
    one = Trajectory(task, seed, p, LABELS.repeat(2), index, "f00d", ("ant", "bee", "cat", "dog"), {"how": "linear"})
    return one._replace(**changed)


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Two seeds of one method, with two tasks, and one of another with three."""
    for number, (name, tasks) in enumerate((("a-1", "xy"), ("a-2", "xy"), ("b", "yxz"))):
        (tmp_path / name).mkdir()
        own = [trajectory(task, seed=10 * number + "xyz".index(task)) for task in tasks]
        write_trajectories(tmp_path / name / FILE, own)
    return [str(tmp_path / name) for name in ("a-1", "a-2", "b")]


def evaluate_here(sources: list[str], *given: str) -> dict:
    from tests.test_launch import script  # which ranks need not

    module = script("eval")
    arguments = ["trajectory", *sources, "names=[a,a,b]", "device=cpu", *given]
    config = load(module.schema_of("trajectory"), arguments, module.of_run, ("task", "source"))
    assert module.evaluate(config) == 0
    places = [text.partition("=")[2] for text in given if text.startswith("output=")]
    return json.loads(Path(*places or [Path(sources[0]).parent / "eval-trajectory.json"]).read_text())


def test_the_command_compares_trajectories(sources, tmp_path, capsys, monkeypatch):
    table = evaluate_here(sources)
    out = capsys.readouterr()
    assert "task x: 12 images, 4 classes, 14 models" in out.out and "InPCA's axes explain" in out.out
    assert "not of all sources, and left out: z" in out.err
    assert [task["task"] for task in table["tasks"]] == ["x", "y"] and "data" not in table["settings"]
    assert (tmp_path / "eval-trajectory.png").read_bytes()[:4] == b"\x89PNG"
    first = table["tasks"][0]
    assert [one["method"] for one in first["courses"]] == ["a", "a", "b"] and first["floor"] == 2**-25
    a, b = first["methods"]
    assert (a["trajectories"], b["trajectories"], b["sd"]) == (2, 1, None)
    stored = trajectory("x", seed=0).probabilities
    expected = progress(stored, uniform(12, C), truth(LABELS.repeat(2), C), floor=2**-25)
    assert first["courses"][0]["progress"] == pytest.approx(expected.tolist(), abs=1e-15)
    two = [one["progress"][-1] for one in first["courses"][:2]]
    assert a["mean"][-1] == pytest.approx(sum(two) / 2) and a["sd"][-1] == pytest.approx(abs(two[0] - two[1]) / 2**0.5)
    kept = load_file(tmp_path / "eval-trajectory.safetensors")[first["distances"]["array"]]
    together = [uniform(12, C), truth(LABELS.repeat(2), C), *(x for s in (0, 10, 20) for x in trajectory(seed=s)[2])]
    assert close(kept, distances([one.double() for one in together]), 1e-14)
    embedding = inpca(kept, 3)
    assert first["eigenvalues"] == embedding.eigenvalues.tolist()
    assert [first["start"], first["truth"], *first["courses"][0]["coordinates"]] == embedding.coordinates[:6].tolist()

    worked = []
    before = Parts._keep
    monkeypatch.setattr(Parts, "_keep", lambda self, *given: worked.append(given[1]) or before(self, *given))
    again = evaluate_here(sources, "tasks=[y]", "axes=2")
    assert not worked and again["tasks"][0]["methods"] == table["tasks"][1]["methods"]


def _in_small_tiles(sources: list[str], output: str) -> tuple[dict, dict]:
    progress_module.TILE = 4
    config = TrajectoryEvaluation(task="trajectory", source=sources, names=("a", "a", "b"), device="cpu")
    data = EvaluationData(config, torch.device("cpu"), None)
    return split_arrays(evaluate(subjects_of(config), data, config, Parts(Path(output))))


def test_one_rank_and_two_find_the_same_bits(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(progress_module, "TILE", 4)
    alone, matrices = _in_small_tiles(sources, str(tmp_path / "one"))
    for found, theirs in run_ranks(2, _in_small_tiles, sources, str(tmp_path / "two")):
        assert found == alone and all(theirs[name].equal(matrices[name]) for name in matrices)
    kept = [len(path.read_text().splitlines()) for path in (tmp_path / "two").glob("*.jsonl")]
    assert sum(kept) == 2 * (3 + 6), "three trajectories and six tiles of each of two tasks"


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"data": "beef"}, r"task \[0, 1, 2, 3\] in '.*/b' are of another data set \(fingerprint beef, not f00d\)"),
        ({"classes": ("bee", "ant", "cat", "dog")}, r"other classes, or in another order \(bee, ant, .*not ant, bee"),
        ({"index": torch.arange(12)}, "other validation images .* than those in '.*/a': run transfer of both on"),
        ({"labels": LABELS.repeat(2).flip(0)}, "other labels of the same images"),
        ({"task": "[4, 5]"}, r"no task in common: '.*/a' has \[0, 1, 2, 3\]; '.*/b' has \[4, 5\]"),
        ({"probabilities": trajectory().probabilities * 1.5}, "are no probabilities"),
    ],
)
def test_trajectories_that_cannot_be_compared_are_refused(tmp_path, changed, complaint):
    for name, more in (("a", {}), ("b", changed)):
        (tmp_path / name).mkdir()
        write_trajectories(tmp_path / name / FILE, [trajectory(**more)])
    with pytest.raises(UsageError, match=complaint):
        compared(subjects(tmp_path, "a", "b"), None)


def test_what_is_not_there_is_a_line(sources, tmp_path):
    with pytest.raises(UsageError, match=r"'.*/a-1' has no task z: its tasks are x, y"):
        compared(subjects(tmp_path, "a-1", "b"), ("z",))
    with pytest.raises(UsageError, match=r"has no task \[0, 7\]"):
        compared(subjects(tmp_path, "b"), (("0", "7"),))
    with pytest.raises(UsageError, match=r"trajectories\.safetensors' does not exist: .*transfer .* writes it"):
        compared(subjects(tmp_path, "b", "."), None)
    with pytest.raises(UsageError, match=r"takes .* MiB, and .* are allowed"):
        evaluate_here(sources, "memory=1e-9")
    with pytest.raises(UsageError, match=r"tasks=.*should have at least 1 item"):
        evaluate_here(sources, "tasks=[]")
    with pytest.raises(UsageError, match="unknown key 'data"):
        evaluate_here(sources, "data.root=/data")
    write_trajectories(tmp_path / "a-2" / FILE, [trajectory("x", epochs=5)])
    with pytest.raises(UsageError, match=r"'.*/a-1' has 3 epochs and '.*/a-2' 5: seeds of one method need as many"):
        compared(subjects(tmp_path, "a-1", "a-2", names=("a", "a")), None)


def subjects(folder: Path, *names_of: str, **more) -> list:
    return subjects_of(
        TrajectoryEvaluation(task="trajectory", source=[str(folder / name) for name in names_of], **more)
    )
