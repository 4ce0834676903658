"""The order of batches of several sizes: complete, the same for every resume, weighted."""

from collections import Counter

import pytest

from dataset.order.buckets import PROPORTIONAL, TURNS, BucketOrder

BUCKETS, SIZES = [range(0, 10), range(10, 14), range(14, 20)], [2, 2, 3]  # 5, 2 and 2 batches


def order_of(**options) -> BucketOrder:
    return BucketOrder(BUCKETS, SIZES, seed=3, **options)


def test_buckets_take_turns_until_the_largest_is_through():
    batches = list(order_of().batches(epoch=4))
    assert [bucket for bucket, _ in batches] == [0, 1, 2] * 5
    of_buckets = [[indices for of, indices in batches if of == bucket] for bucket in range(3)]
    assert sorted(sum(of_buckets[0], [])) == list(range(10))
    for bucket, per_pass in ((1, 2), (2, 2)):  # a smaller one starts again, in another order
        passes = [of_buckets[bucket][first : first + per_pass] for first in range(0, 5, per_pass)]
        assert all(sorted(sum(whole, [])) == list(BUCKETS[bucket]) for whole in passes[:2])
        assert passes[0] != passes[1]
    assert batches != list(order_of().batches(epoch=5))


@pytest.mark.parametrize(
    ("temperature", "steps"), [(1.0, {0: 5, 1: 2, 2: 2}), (1e9, {0: 3, 1: 3, 2: 3}), (2.0, {0: 4, 1: 3, 2: 2})]
)
def test_proportional_buckets_come_as_often_as_they_have_data(temperature, steps):
    order = order_of(order=PROPORTIONAL, temperature=temperature)
    turns = [bucket for bucket, _ in order.batches(0)]
    assert Counter(turns) == steps
    assert turns != sorted(turns)
    assert order.steps_per_epoch == 9


@pytest.mark.parametrize("kind", [TURNS, PROPORTIONAL])
def test_an_interrupted_epoch_goes_on_with_the_batch_that_comes_next(kind):
    order = order_of(order=kind)
    whole = list(order.batches(2))
    seen = 0
    for step, (bucket, _) in enumerate(whole):
        assert order.steps_done(2, seen) == step
        assert order.samples_of(2, step) == seen
        assert list(order.batches(2, step)) == whole[step:]
        seen += SIZES[bucket]
    assert seen == order.samples_per_epoch
    assert order.steps_done(2, seen) == order.steps_per_epoch


def test_weights_say_how_often_a_sample_is_taken():
    weights = [3.0 if index < 5 else 1.0 for index in range(10)]
    order = BucketOrder([range(10)], [2], seed=0, weights=weights)
    taken = Counter(index for epoch in range(40) for _, indices in order.batches(epoch) for index in indices)
    heavy, light = (sum(taken[index] for index in part) for part in (range(5), range(5, 10)))
    assert heavy + light == 400
    assert heavy == pytest.approx(300, abs=15)  # 7 or 8 of 10 in each
    even = BucketOrder([range(10)], [2], seed=0, weights=[2.0] * 10)
    assert sorted(index for _, indices in even.batches(0) for index in indices) == list(range(10))


def test_a_bucket_smaller_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="fewer samples than a batch"):
        BucketOrder([range(3)], [4], seed=0)
