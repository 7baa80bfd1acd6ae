"""What is drawn, against NumPy's own Philox, torchvision's crop as a plain loop, and the stated distributions."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from fasttrain.config import resolve
from fasttrain.data.augment import AugmentConfig, CentreCrop, Draws, SimCLR, blur_radius, philox
from fasttrain.errors import UsageError
from fasttrain_kernels.augment.draws import packed, unpacked


def test_philox_is_numpys_bit_for_bit():
    random = np.random.default_rng(0)
    for _ in range(100):
        key, counter = random.integers(0, 2**64, 2, np.uint64), random.integers(1, 2**64, 4, np.uint64)
        before = counter - np.array([1, 0, 0, 0], np.uint64)  # NumPy counts up, then computes
        expected = np.random.Philox(key=key, counter=before).random_raw(4)
        assert [int(word[0]) for word in philox(tuple(key), *counter)] == expected.tolist()


def test_the_table_of_the_kernels_holds_every_draw():
    draws = SimCLR(AugmentConfig(views=3, solarise=0.3), 1).draw(2, np.arange(20), np.full((20, 2), 50))
    assert packed(draws).shape == (3, 20, 10)
    assert_equal(unpacked(packed(draws)), draws)


def test_philox_takes_arrays_of_counters():
    samples = np.arange(7, dtype=np.uint64)
    together = np.stack(philox((5, 6), np.uint64(3), np.uint64(1), samples, np.uint64(0)))
    alone = [np.concatenate(philox((5, 6), np.uint64(3), np.uint64(1), i, np.uint64(0))) for i in samples]
    np.testing.assert_array_equal(together, np.stack(alone, axis=1))


def test_draws_depend_on_nothing_but_seed_epoch_sample_and_view():
    random = np.random.default_rng(1)
    ids = random.permutation(10**6)[:64]
    sizes = random.integers(20, 500, (64, 2))
    augment = SimCLR(AugmentConfig(views=3, solarise=0.3), seed=7)
    whole = augment.draw(4, ids, sizes)
    shuffled = random.permutation(64)
    assert_equal(augment.draw(4, ids[shuffled], sizes[shuffled]), whole.take(shuffled))
    for i in (0, 13):
        assert_equal(augment.draw(4, ids[i : i + 1], sizes[i : i + 1]), whole.take([i]))
    fewer = SimCLR(AugmentConfig(views=1, solarise=0.3), seed=7).draw(4, ids, sizes)
    assert_equal(fewer, whole.take((slice(None), [0])))


def test_seed_epoch_sample_and_view_each_change_the_draws():
    config, ids, sizes = AugmentConfig(), np.arange(500), np.full((500, 2), 224)
    first = SimCLR(config, 0).draw(0, ids, sizes)
    others = [SimCLR(config, 1).draw(0, ids, sizes), SimCLR(config, 0).draw(1, ids, sizes)]
    others.append(SimCLR(config, 0).draw(0, ids + 500, sizes))
    for field in ("brightness", "hue", "boxes", "sigma"):
        values = [getattr(draws, field).reshape(500, 2, -1)[:, 0, 0] for draws in (first, *others)]
        values.append(getattr(first, field).reshape(500, 2, -1)[:, 1, 0])
        correlation = np.corrcoef(np.stack(values).astype(float))
        assert abs(correlation - np.eye(len(values))).max() < 0.2, field  # 4.5 standard errors


@pytest.mark.parametrize("size", [(224, 224), (375, 500), (40, 400), (400, 40), (1, 1), (3, 200)])
def test_boxes_are_torchvisions(size):
    config, seed, epoch = AugmentConfig(), 11, 3
    draws = SimCLR(config, seed).draw(epoch, np.arange(50), np.tile(size, (50, 1)))
    for sample in range(50):
        for view in range(2):
            assert tuple(draws.boxes[sample, view]) == torchvision_box(config, size, seed, epoch, sample, view)


def torchvision_box(config, size, seed, epoch, sample, view):
    """RandomResizedCrop.get_params, its random numbers from NumPy's own generator at our counters."""
    height, width = size
    for attempt in range(10):
        block = 0 if attempt == 0 else 15 + attempt
        key = np.array([seed, 0x6175676D656E7400 + epoch], np.uint64)
        state = np.array([block, view, sample, 0], np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=before(state)))
        area = height * width * generator.uniform(*config.scale)
        ratio = math.exp(generator.uniform(*(math.log(x) for x in config.ratio)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(generator.random() * (height - h + 1)), int(generator.random() * (width - w + 1)), h, w
    w, h = width, height
    if width / height < config.ratio[0]:
        h = round(w / config.ratio[0])
    elif width / height > config.ratio[1]:
        w = round(h * config.ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def before(counter):
    """The counter one less, as one number of four words, the first the lowest."""
    number = (sum(int(word) << (64 * place) for place, word in enumerate(counter)) - 1) % 2**256
    return np.array([number >> (64 * place) & (2**64 - 1) for place in range(4)], np.uint64)


def test_what_else_is_drawn_are_numpys_numbers():
    """Compiled, against NumPy's generator at our counters: to the bit."""
    config, seed, epoch = AugmentConfig(jitter=0.7, solarise=0.3), 2**32 - 1, 9
    draws = SimCLR(config, seed).draw(epoch, np.arange(200), np.full((200, 2), 40))
    key, orders = np.array([seed, 0x6175676D656E7400 + epoch], np.uint64), list(permutations(range(4)))
    for sample, view in np.ndindex(200, 2):
        state = np.array([1, view, sample, 0], np.uint64)
        u = np.random.Generator(np.random.Philox(key=key, counter=before(state))).random(12)
        spread = 0.8 * config.jitter * (u[1] < config.jitter_p)
        low, high = max(0, 1 - spread), 1 + spread
        expected = {
            "flip": u[0] < config.flip,
            "brightness": np.float32(low + (high - low) * u[2]),
            "contrast": np.float32(low + (high - low) * u[3]),
            "saturation": np.float32(low + (high - low) * u[4]),
            "hue": np.float32(0.2 * config.jitter * (u[1] < config.jitter_p) * (2 * u[5] - 1)),
            "order": list(orders[int(24 * u[6])]),
            "grey": u[7] < config.grey,
            "sigma": np.float32(0.1 + (2.0 - 0.1) * u[9] if u[8] < config.blur else 0),
            "solarise": u[10] < config.solarise,
        }
        drawn = draws.take((sample, view))._asdict()
        assert {name: drawn[name].tolist() for name in expected} == {
            name: value if isinstance(value, list) else value.item() for name, value in expected.items()
        }


def test_distributions_are_the_stated_ones():
    n, config = 20_000, AugmentConfig(jitter=0.5, solarise=0.2)
    draws = SimCLR(config, 0).draw(0, np.arange(n), np.full((n, 2), 512))
    jittered = draws.brightness != 1
    shares = {"flip": 0.5, "grey": 0.2, "solarise": 0.2}
    for name, share in shares.items():
        assert getattr(draws, name).mean() == pytest.approx(share, abs=0.012), name
    assert jittered.mean() == pytest.approx(0.8, abs=0.012)
    assert (draws.sigma > 0).mean() == pytest.approx(0.5, abs=0.012)
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.6, 1.4),
        ("hue", -0.1, 0.1),
    ):
        values = getattr(draws, name)
        assert (values[~jittered] == (0 if name == "hue" else 1)).all()
        assert uniform_p(values[jittered], low, high) > 1e-4, name
    assert uniform_p(draws.sigma[draws.sigma > 0], 0.1, 2.0) > 1e-4
    orders = np.unique(draws.order.reshape(-1, 4), axis=0, return_counts=True)
    assert len(orders[0]) == 24 and stats.chisquare(orders[1]).pvalue > 1e-4
    top, left, height, width = np.moveaxis(draws.boxes, 2, 0)
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 512).all() and (left + width <= 512).all()
    area = height * width / 512**2
    below = area < 0.7  # above, boxes begin not to fit; sides are whole pixels
    assert uniform_p(area[below], 0.08, 0.7, slack=1e-3) > 1e-4
    assert uniform_p(np.log(width / height)[below], math.log(3 / 4), math.log(4 / 3), slack=1e-2) > 1e-4
    assert uniform_p((top + 0.5) / (512 - height + 1), 0, 1) > 1e-4


def uniform_p(values, low, high, slack=1e-6):
    assert low - slack <= values.min() and values.max() <= high + slack
    return stats.kstest(np.ravel(values)[:5000], stats.uniform(low, high - low).cdf).pvalue


def test_draws_of_one_view_are_independent_of_each_other():
    n = 5000
    draws = SimCLR(AugmentConfig(jitter_p=1, blur=1), 0).draw(0, np.arange(n), np.full((n, 2), 512))
    columns = [
        draws.flip,
        draws.brightness,
        draws.contrast,
        draws.saturation,
        draws.hue,
        draws.order[..., 0],
        draws.grey,
    ]
    columns += [draws.sigma, draws.boxes[..., 2], draws.brightness[:, ::-1], draws.boxes[:, ::-1, 0]]
    correlation = np.corrcoef(np.stack([np.asarray(column[:, 0], float) for column in columns]))
    np.fill_diagonal(correlation, 0)
    assert abs(correlation).max() < 0.065  # 4.5 standard errors


def test_large_ids_seeds_and_epochs():
    augment = SimCLR(AugmentConfig(), 2**63 + 5)
    draws = augment.draw(2**40, np.array([2**40, 2**62]), np.full((2, 2), 100))
    assert draws.boxes.shape == (2, 2, 4) and (draws.brightness > 0).all()


def test_nothing_to_draw():
    draws = SimCLR(AugmentConfig(), 0).draw(0, np.empty(0, np.int64), np.empty((0, 2), np.int32))
    assert draws.boxes.shape == (0, 2, 4) and draws.order.shape == (0, 2, 4) and draws.flip.shape == (0, 2)


def test_types_and_shapes():
    draws = SimCLR(AugmentConfig(views=3), 0).draw(0, np.arange(4), np.full((4, 2), 99))
    kinds = dict(boxes="int32", flip="bool", order="int8", grey="bool", solarise="bool")
    for name, field in draws._asdict().items():
        assert field.dtype == kinds.get(name, "float32") and field.shape[:2] == (4, 3), name


def test_centre_crop_changes_nothing_else():
    draws = CentreCrop(AugmentConfig()).draw(0, np.arange(3), np.array([[256, 256], [300, 401], [32, 20]]))
    assert draws.boxes[:, 0].tolist() == [[16, 16, 224, 224], [19, 69, 262, 262], [7, 1, 18, 18]]
    assert (draws.brightness == 1).all() and (draws.hue == 0).all() and (draws.sigma == 0).all()
    assert not draws.flip.any() and not draws.grey.any() and not draws.solarise.any()
    full = CentreCrop(AugmentConfig(eval_crop=1.0)).draw(0, np.arange(1), np.array([[32, 32]]))
    assert full.boxes[0, 0].tolist() == [0, 0, 32, 32]


def test_blur_radius_is_simclrs():
    assert [2 * blur_radius(size) + 1 for size in (224, 96, 64, 32, 8)] == [23, 9, 7, 3, 3]


@pytest.mark.parametrize(
    "values",
    [{"scale": [0.5, 0.2]}, {"scale": [0, 1]}, {"ratio": [2, 1]}, {"sigma": [0, 1]}, {"flip": 1.5}, {"views": 0}],
)
def test_a_wrong_setting_is_named(values):
    with pytest.raises(UsageError, match=next(iter(values))):
        resolve(AugmentConfig, values)


def assert_equal(left: Draws, right: Draws):
    for name, a, b in zip(Draws._fields, left, right, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
