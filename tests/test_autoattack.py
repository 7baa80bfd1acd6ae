"""AutoAttack: searches that end with an image, the stages that they make, and what is said of the figure."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from fasttrain.attacks import L2, Linf, Threat, image_keys
from fasttrain.attacks.apgd import apgd_search
from fasttrain.attacks.autoattack import (
    KINDS,
    VERSIONS,
    Budget,
    autoattack,
    doubts,
    later_doubts,
    other_classes,
    stages,
)
from fasttrain.attacks.losses import cross_entropy, dlr_targeted
from fasttrain.attacks.search import Cases, Standing, Victim
from fasttrain.errors import NotFinite, UsageError
from tests.test_robust import Rootlike

COUNT, CLASSES = 24, 5
SMALL = Budget(steps=10, targets=2, queries=20)


def network(seed: int = 0, classes: int = CLASSES) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, classes)
    return nn.Sequential(*layers).requires_grad_(False)


def samples(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Images in channels-last and their classes, every fifth label another."""
    images = torch.rand(COUNT, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = model(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % CLASSES
    return images.to(memory_format=torch.channels_last), labels


def case(images: Tensor, labels: Tensor) -> Cases:
    return Cases(images, labels, image_keys(0, 0, torch.arange(len(images))), (labels + 1) % CLASSES)


def untargeted(scores: Tensor, cases: Cases) -> Tensor:
    return cross_entropy(scores, cases.labels)


@pytest.mark.parametrize("threat", [Linf(0.02), L2(0.15)])
def test_what_fell_is_in_the_ball_and_misclassified_and_no_attack_raises_the_accuracy(threat):
    model = network()
    images, labels = samples(model)
    found = autoattack(model, images, labels, threat, budget=SMALL, batch=10)
    assert list(found.standing) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    masks = list(found.standing.values())
    assert all((after <= before).all() for before, after in itertools.pairwise(masks))
    assert masks[0].equal(model(images).argmax(1) == labels) and masks[1].sum() < masks[0].sum() - 2
    change = (found.images - images).flatten(1)
    size = change.abs().amax(1) if threat.norm == "linf" else change.norm(dim=1)
    assert size.max() <= threat.eps * (1 + 1e-5) and found.images.min() >= 0 and found.images.max() <= 1
    fell = masks[0] & ~masks[-1]
    assert (model(found.images).argmax(1) != labels)[fell].all() and not size[~fell].any()
    assert found.images.is_contiguous(memory_format=torch.channels_last)


def test_a_network_is_shown_no_empty_batch_once_all_images_fell():
    model = network()
    images, labels = samples(model)

    def shown(x: Tensor) -> Tensor:
        assert len(x)
        return model(x)

    found = autoattack(shown, images, labels, Linf(0.9), budget=SMALL)
    assert not found.standing["apgd-t"].any() and not found.standing["square"].any()


@pytest.mark.parametrize("threat", [Linf(0.02), L2(0.15)])
def test_an_image_meets_the_same_attacker_in_any_batch(threat):
    model = network()
    images, labels = samples(model)
    one = autoattack(model, images, labels, threat, budget=SMALL, batch=COUNT)
    other = autoattack(model, images, labels, threat, budget=SMALL, batch=5)
    for name, mask in one.standing.items():
        assert mask.equal(other.standing[name]), name
    rows = torch.tensor([7, 3, 18])
    alone = autoattack(model, images[rows], labels[rows], threat, budget=SMALL, index=rows)
    assert alone.standing["square"].equal(one.standing["square"][rows])


def published(model: nn.Module, images: Tensor, labels: Tensor, loss, threat: Threat, steps: int) -> Tensor:
    """Who stands, by the published bookkeeping for one image after the other: no image of 101 iterates fools."""
    stands = []
    for image, label, number in zip(images, labels, range(len(images)), strict=True):
        cases = case(image[None], label[None])._replace(keys=image_keys(0, 0, torch.tensor([number])))
        iterates = []

        def watched(x: Tensor, iterates=iterates) -> Tensor:
            iterates.append(x.detach())
            return model(x)

        never = Victim(watched, lambda x, label=label: torch.eye(CLASSES)[label.expand(len(x))])  # it is never fooled
        apgd_search(threat, steps, loss)(never, cases)
        assert len(iterates) == steps + 1
        stands.append((model(torch.cat(iterates)).argmax(1) == label).all())
    return torch.stack(stands)


@pytest.mark.parametrize(
    ("loss", "eps"),
    [(untargeted, 0.02), (lambda scores, cases: dlr_targeted(scores, cases.labels, cases.targets), 0.06)],
    ids=["ce", "dlr-t"],
)
def test_letting_images_go_changes_nothing_for_the_others(loss, eps):
    model = network()
    images, labels = samples(model)
    right = model(images).argmax(1) == labels
    images, labels = images[right], labels[right]
    found = apgd_search(Linf(eps), 12, loss)(Victim(model), case(images, labels))
    assert (~found.fell).equal(published(model, images, labels, loss, Linf(eps), 12))
    assert 0 < found.fell.sum() < len(images)


def test_an_image_that_fell_costs_nothing():
    model = network()
    images, labels = samples(model)
    right = model(images).argmax(1) == labels
    rows = []

    def counted(x: Tensor) -> Tensor:
        rows.append(len(x))
        return model(x)

    found = apgd_search(Linf(0.05), 20, untargeted)(Victim(counted), case(images[right], labels[right]))
    stands = int((~found.fell).sum())
    assert rows[0] == int(right.sum()) and rows == sorted(rows, reverse=True) and len(set(rows)) <= 16
    assert rows[-1] <= stands + 2 or not stands
    assert sum(rows) < 0.7 * 21 * rows[0]


def test_a_batch_shrinks_to_few_sizes_and_keeps_all_that_stand():
    cases = case(torch.rand(64, 3, 2, 2), torch.zeros(64, dtype=torch.int64))
    standing, number = Standing(Victim(lambda x: x), cases), torch.arange(64)
    sizes = []
    for falls in range(64):
        scores = torch.zeros(len(number), CLASSES)
        scores[number == falls, 1] = 1
        assert standing.strike(standing.cases.images, scores) == (falls == 63)
        (number,) = standing.shrink(number)
        assert set(range(falls + 1, 64)) <= set(number.tolist()) and standing.cases.keys.equal(cases.keys[number])
        sizes.append(len(number))
    assert set(sizes) == set(range(0, 65, 4)) and standing.found.fell.all()


def test_the_judge_has_the_last_word():
    """What a search goes by may be rounded; an image falls where the network in full is fooled."""
    model = network()
    images, labels = samples(model)
    right = model(images).argmax(1) == labels
    cases = case(images[right], labels[right])
    bias = torch.zeros(CLASSES)
    bias[1] = 0.5
    found = apgd_search(Linf(0.02), 10, untargeted)(Victim(lambda x: model(x) + bias, model), cases)
    fooled = model(found.images).argmax(1) != cases.labels
    assert fooled.equal(found.fell) and 0 < fooled.sum() < len(fooled)


@pytest.mark.parametrize("attack", KINDS)
def test_scores_that_are_not_finite_end_it(attack):
    model = network()
    images, labels = samples(model)
    calls = []

    def spoilt(x: Tensor) -> Tensor:
        calls.append(len(x))
        return model(x) * (torch.nan if len(calls) > 1 else 1)

    with pytest.raises(NotFinite, match=f"{attack} met scores that are not finite"):
        autoattack(spoilt, images, labels, Linf(0.02), (attack,), SMALL)


def test_gradients_that_are_not_finite_end_it():
    model = network()
    with pytest.raises(NotFinite, match="apgd-ce met scores that are not finite"):
        autoattack(lambda x: model(Rootlike.apply(x)), *samples(model), Linf(0.02), ("apgd-ce",), SMALL)


def test_targets_are_the_highest_other_classes_of_the_clean_image():
    scores = torch.tensor([[3.0, 5.0, 1.0, 4.0], [9.0, 1.0, 2.0, 3.0]])
    assert other_classes(scores, torch.tensor([1, 1]), 2).tolist() == [[3, 0], [0, 3]]
    assert other_classes(scores, torch.tensor([1, 1]), 9).shape == (2, 3)


def test_the_versions_are_the_published_ones():
    planned = stages(Linf(8 / 255), VERSIONS["standard"], 10)
    assert [(stage.attack, stage.target) for stage in planned] == [
        ("apgd-ce", 0),
        *[("apgd-t", target) for target in range(9)],
        *[("fab-t", target) for target in range(9)],
        ("square", 0),
    ]
    assert Budget() == (100, 9, 5000) and VERSIONS["first_two"] == ("apgd-ce", "apgd-t")
    assert len(stages(Linf(8 / 255), ("apgd-t",), 5)) == 4  # of 5 classes, all others


def test_stages_draw_different_numbers():
    planned = stages(Linf(8 / 255), tuple(KINDS), 10)
    given = torch.zeros(1, 3, 2, 2), torch.tensor([0]), torch.tensor([5]), torch.arange(9)[None]
    assert len({int(stage.cases(*given).keys) for stage in planned}) == len(planned)


@pytest.mark.parametrize(
    ("attacks", "classes", "budget", "said"),
    [
        ((), 10, Budget(), "AutoAttack without attacks: give some of apgd-ce, "),
        (("apgd-c",), 10, Budget(), "no attack 'apgd-c': give some of apgd-ce, "),
        (
            ("apgd-ce", "apgd-t"),
            3,
            Budget(),
            "apgd-t needs 4 classes and there are 3: run apgd-ce, fab-t, square alone",
        ),
        (("apgd-dlr",), 2, Budget(), "apgd-dlr needs 3 classes and there are 2"),
        (("apgd-ce",), 1, Budget(), "apgd-ce needs 2 classes and there are 1: there is nothing to mistake"),
        (("square",), 10, Budget(queries=0), "AutoAttack with queries=0: give at least 1"),
        (("apgd-t",), 10, Budget(targets=0), "AutoAttack with targets=0: give at least 1"),
    ],
)
def test_a_mistake_names_the_value_and_the_remedy(attacks, classes, budget, said):
    with pytest.raises(UsageError, match=said) as caught:
        stages(Linf(0.1), attacks, classes, budget)
    assert "\n" not in str(caught.value)


def test_labels_outside_the_classes_and_images_outside_the_range_are_refused():
    model = network()
    images, labels = samples(model)
    labels[3] = CLASSES
    with pytest.raises(UsageError, match="label 5 is outside the network's 5 classes"):
        autoattack(model, images, labels, Linf(0.02), budget=SMALL)
    with pytest.raises(UsageError, match=r"AutoAttack on values from .* to 25\d.*: give images in"):
        autoattack(model, images * 255, labels.clamp(max=4), Linf(0.02), budget=SMALL)
    with pytest.raises(UsageError, match="AutoAttack on 0 images"):
        autoattack(model, images[:0], labels[:0], Linf(0.02), budget=SMALL)


def test_a_network_that_attacks_cannot_judge_is_doubted():
    model = network()
    images, _ = samples(model)
    assert doubts(model, images) == []
    (said,) = doubts(lambda x: model(x).softmax(1), images)
    assert said.startswith("the scores are probabilities")
    (said,) = doubts(lambda x: model(x) + 1e-2 * torch.randn(len(x), CLASSES), images)
    assert said.startswith("the network is random")


def test_what_square_takes_from_gradient_attacks_and_dead_gradients_are_doubted():
    fine = {"apgd-ce": 0.5, "apgd-t": 0.45, "fab-t": 0.45, "square": 0.449}
    assert later_doubts(fine, 0) == []
    (said,) = later_doubts(fine | {"square": 0.44}, 0)
    assert "square, which needs no gradients, took another 1.00 points" in said
    assert later_doubts({"square": 0.4}, 0) == []
    assert later_doubts(fine, 3)[0].startswith("3 images had no gradient")


def test_dead_gradients_are_counted_for_the_scale_free_losses():
    """Scores rounded to whole numbers have none; square alone finds its way."""
    model = network()
    images, labels = samples(model)
    found = autoattack(lambda x: (model(x) * 20).round(), images, labels, Linf(0.02), ("apgd-t",), SMALL)
    assert any("no gradient" in doubt for doubt in found.doubts)
