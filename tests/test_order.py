"""Order against Philox written out, and its promises: permutations, one for any world, unmoved by exclusions."""

import threading

import numpy as np
import pytest

from fasttrain.data.order import Order
from fasttrain.errors import UsageError


def philox_words(key, count):
    """The first outputs of NumPy's Philox stream, from Salmon et al. 2011 in Python integers: counters 1, 2, ..."""
    mask, words = 2**64 - 1, []
    for block in range(1, -(-count // 4) + 1):
        x0, x1, x2, x3 = block, 0, 0, 0
        k0, k1 = key
        for _ in range(10):
            low, high = 0xD2E7470EE14C6C93 * x0, 0xCA5A826395121157 * x2
            x0, x1, x2, x3 = (high >> 64) ^ x1 ^ k0, high & mask, (low >> 64) ^ x3 ^ k1, low & mask
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
        words += [x0, x1, x2, x3]
    return words[:count]


def whole_epoch(order, epoch):
    return np.concatenate([order.at(epoch * len(order) + step)[1] for step in range(len(order))])


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 3), (2**63, 100)])
def test_is_the_argsort_of_philox_keys(seed, epoch):
    keys = philox_words((seed, 0x6F72646572000000 + epoch), 23)
    expected = sorted(range(23), key=keys.__getitem__)
    assert whole_epoch(Order(np.arange(23), seed, batch=1), epoch).tolist() == expected


def test_an_epoch_is_a_permutation_and_epochs_and_seeds_differ():
    order, ids = Order(np.arange(0, 300, 3), seed=1, batch=10), np.arange(0, 300, 3)
    first, second = whole_epoch(order, 0), whole_epoch(order, 1)
    assert np.array_equal(np.sort(first), ids) and np.array_equal(np.sort(second), ids)
    other = whole_epoch(Order(ids, seed=2, batch=10), 0)
    assert not np.array_equal(first, second) and not np.array_equal(first, other) and not np.array_equal(first, ids)


def test_every_place_is_equally_likely():
    places = np.zeros((6, 6))
    for epoch in range(2000):
        places[np.arange(6), whole_epoch(Order(np.arange(6), seed=3, batch=6), epoch)] += 1
    chi2 = ((places - 2000 / 6) ** 2 / (2000 / 6)).sum()
    assert chi2 < 52.6  # the 0.999 quantile of chi-squared with 25 degrees of freedom


def test_leaving_one_out_does_not_move_the_others():
    full, fewer = np.arange(100), np.delete(np.arange(100), [17, 42, 99])
    before, after = (whole_epoch(Order(ids, seed=5, batch=1), 4) for ids in (full, fewer))
    assert after.tolist() == [index for index in before.tolist() if index not in (17, 42, 99)]


def test_seeks_to_any_position_and_keeps_its_neighbours():
    ids = np.arange(50)
    walked = [Order(ids, 0, 8).at(position) for position in range(40)]
    order = Order(ids, 0, 8)
    for position in (39, 0, 23, 5, 39, 12):
        epoch, got = order.at(position)
        assert epoch == position // 6 == walked[position][0]
        assert np.array_equal(got, walked[position][1])
    assert len(order._epochs) <= 3


def test_threads_get_the_same_batches():
    order, alone, wrong = Order(np.arange(999), 0, 100), Order(np.arange(999), 0, 100), []

    def read(start):
        for position in range(start, 90, 4):
            if not np.array_equal(order.at(position)[1], alone_batches[position]):
                wrong.append(position)

    alone_batches = [alone.at(position)[1].copy() for position in range(90)]
    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_any_world_sees_the_same_global_order(world):
    order = Order(np.arange(100), seed=9, batch=12)
    for position in (0, 7, 8, 30):
        epoch, ids = order.at(position)
        shares = [order.share(position, rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate([share for _, share in shares]), ids)
        assert {(when, len(share)) for when, share in shares} == {(epoch, 12 // world)}


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7])
def test_evaluation_keeps_the_last_partial_batch_and_splits_it_like_numpy(world):
    order = Order(np.arange(23), seed=0, batch=10, shuffle=False, drop_last=False)
    assert len(order) == 3
    for position in range(3):
        ids = np.arange(23)[10 * position : 10 * position + 10]
        for rank, expected in enumerate(np.array_split(ids, world)):
            assert np.array_equal(order.share(position, rank, world)[1], expected)


def test_training_drops_what_does_not_fill_a_step():
    assert len(Order(np.arange(103), 0, batch=10)) == 10
    assert len(Order(np.arange(103), 0, batch=10, accumulation=4)) == 8
    order = Order(np.arange(103), 0, batch=10, accumulation=4)
    assert {order.at(position)[0] for position in range(8)} == {0} and order.at(8)[0] == 1
    assert all(len(order.at(position)[1]) == 10 for position in range(16))


def test_mistakes_name_the_numbers():
    with pytest.raises(UsageError, match=r"batch of 64 is larger than the data set's 50 images: lower it"):
        Order(np.arange(50), 0, batch=64)
    with pytest.raises(UsageError, match=r"batch of 64 \(16 x 4 accumulated"):
        Order(np.arange(50), 0, batch=16, accumulation=4)
    with pytest.raises(UsageError, match="no usable image"):
        Order(np.arange(0), 0, batch=1, drop_last=False)
    with pytest.raises(UsageError, match="10 does not divide among 3 ranks"):
        Order(np.arange(50), 0, batch=10).share(0, 0, 3)
