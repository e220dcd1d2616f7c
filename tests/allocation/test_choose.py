"""The knapsack: never above the limit, and next to nothing worse than the best."""

import itertools
import random

import pytest

from hf_pcdvq.allocation.choose import Option, choose


def exhaustive(groups, limit):
    """The least loss of all combinations within the limit."""
    sums = (
        (sum(option.nbytes for option in options), sum(option.loss for option in options))
        for options in itertools.product(*groups)
    )
    return min(loss for nbytes, loss in sums if nbytes <= limit)


def random_groups(seed, count):
    """Groups of different sizes, whose settings save loss at different rates; with padding, more bits can take less."""
    draw = random.Random(seed)
    groups = []
    for _ in range(count):
        size, sensitivity = draw.choice([8, 8, 24, 64]), draw.random() ** 3
        rates = [(2.0, 0.072), (2.25 + draw.choice([0, 0.5]), 0.052), (2.5, 0.037), (3.0, 0.019)]
        groups.append([Option(int(size * bits * 16), size * sensitivity * error) for bits, error in rates])
    return groups


def bound(groups, limit):
    """What no combination within the limit can be below: the best price per byte in Lagrange's dual problem."""
    prices = [10 ** (exponent / 20) for exponent in range(-240, -20)]
    return max(
        sum(min(option.loss + price * option.nbytes for option in options) for options in groups) - price * limit
        for price in prices
    )


SHARES = (0.0, 0.1, 0.3, 0.7, 1.0)


def limits(groups):
    smallest, largest = (sum(pick(option.nbytes for option in group) for group in groups) for pick in (min, max))
    return [smallest + int(share * (largest - smallest)) for share in SHARES]


def loss_of_chosen(groups, limit):
    chosen = [options[index] for options, index in zip(groups, choose(groups, limit))]
    assert sum(option.nbytes for option in chosen) <= limit
    return sum(option.loss for option in chosen)


@pytest.mark.parametrize("seed", range(12))
def test_as_good_as_trying_everything(seed):
    groups = random_groups(seed, 6)
    for limit in limits(groups):
        assert loss_of_chosen(groups, limit) == pytest.approx(exhaustive(groups, limit), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_for_a_whole_model_it_is_the_best_there_is(seed):
    groups = random_groups(seed, 150)
    for limit in limits(groups):
        assert loss_of_chosen(groups, limit) <= 1.002 * bound(groups, limit)


def test_sizes_without_a_common_unit():
    groups = [
        [Option(option.nbytes * 1000 + 7 * index, option.loss) for index, option in enumerate(options)]
        for options in random_groups(3, 60)
    ]
    for limit in limits(groups):
        assert loss_of_chosen(groups, limit) <= 1.005 * bound(groups, limit)


def test_what_saves_most_per_byte_is_not_always_best():
    # What the small group leaves is too little for the large one, which saves more.
    small, large = [Option(10, 1.0), Option(12, 0.5)], [Option(10, 8.0), Option(20, 7.0)]
    assert choose([small, large], 30) == [0, 1]
    assert choose([small, large], 32) == [1, 1]


def test_the_limit_is_refused_below_the_smallest():
    with pytest.raises(ValueError, match="take 20 bytes, more than the limit of 19"):
        choose([[Option(10, 1.0)], [Option(10, 1.0), Option(11, 0.0)]], 19)
