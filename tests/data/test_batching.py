from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ppomax.data.batching import (
    OVERHEAD,
    collate,
    derived_seed,
    permutation,
    plan_micro_batches,
    token_batches,
)

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 60), max_size=40)


# --- seeds and orders


def test_seeds_are_the_recorded_ones():
    assert derived_seed(0, "ppo", 0) == 1394131496077728037
    assert derived_seed("a") == 7299139317422481125
    assert derived_seed(1, "ppo", 0, 3, 17, 0) == derived_seed("1", "ppo", "0", "3", "17", "0")


def test_a_seed_is_63_bits_and_every_part_and_its_place_count():
    seeds = {derived_seed(a, "x", b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    assert derived_seed(1, 23) != derived_seed(12, 3)
    assert derived_seed(1, 2) != derived_seed(2, 1)
    assert derived_seed("a", "") != derived_seed("a")


def test_a_permutation_is_the_recorded_one():
    assert permutation(8, 0, 1) == [1, 5, 2, 6, 4, 0, 7, 3]


@settings(max_examples=50)
@given(st.integers(0, 200), st.integers(), st.integers(0, 9))
def test_a_permutation_holds_every_place_once_and_is_pure(count, seed, epoch):
    first = permutation(count, seed, epoch)
    assert sorted(first) == list(range(count))
    torch.rand(1)
    assert permutation(count, seed, epoch) == first


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(permutation(20, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_a_permutation_is_uniform():
    first = [permutation(4, seed)[0] for seed in range(4000)]
    counts = [first.count(place) for place in range(4)]
    assert max(abs(count - 1000) for count in counts) < 120  # 4.4 standard deviations


# --- micro-batches


def test_a_plan_worked_by_hand():
    # longest first: 9, 7, 4, 4, 2; two of 7 would be 14 > 12, and 3 x 4 = 12 fits with the 2
    assert plan_micro_batches([4, 9, 2, 7, 4], 12) == [[1], [3], [0, 4], [2]]
    # of a budget of 64 a micro-batch costs 4: all in one 5 x 10 + 4; cut after the third
    # 3 x 10 + 4 + 2 x 9 + 4 = 56, with 8 for 9 as much as in one, 54, with 7 less, 52
    assert plan_micro_batches([10, 10, 10, 9, 9], 64) == [[0, 1, 2, 3, 4]]
    assert plan_micro_batches([10, 10, 8, 10, 8], 64) == [[0, 1, 3, 2, 4]]
    assert plan_micro_batches([10, 10, 7, 10, 7], 64) == [[0, 1, 3], [2, 4]]


@settings(max_examples=200)
@given(LENGTHS, st.integers(1, 300), st.integers(1, 8))
def test_a_plan_holds_every_sequence_once_within_the_budget(lengths, budget, at_least):
    plan = plan_micro_batches(lengths, budget, at_least)
    assert sorted(index for batch in plan for index in batch) == list(range(len(lengths)))
    assert all(batch for batch in plan)
    for batch in plan:
        padded = len(batch) * max(lengths[index] for index in batch)
        assert padded <= budget or len(batch) == 1
    widths = [lengths[index] for batch in plan for index in batch]
    assert widths == sorted(widths, reverse=True)


def cost(batches, overhead):
    return sum(len(batch) * max(batch) + overhead for batch in batches)


@settings(max_examples=100)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 400))
def test_no_other_way_of_cutting_costs_less(lengths, budget):
    ordered = sorted(lengths, reverse=True)
    overhead = budget // OVERHEAD
    least = None
    for cuts in product((False, True), repeat=len(ordered) - 1):
        batches = [[ordered[0]]]
        for length, cut in zip(ordered[1:], cuts, strict=True):
            if cut:
                batches.append([length])
            else:
                batches[-1].append(length)
        if all(len(b) == 1 or len(b) * b[0] <= budget for b in batches):
            found = cost(batches, overhead)
            least = found if least is None else min(least, found)
    plan = plan_micro_batches(lengths, budget)
    assert cost([[lengths[i] for i in batch] for batch in plan], overhead) == least


@settings(max_examples=100)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=40), st.integers(1, 4000))
def test_equal_lengths_are_cut_by_the_budget_alone(lengths, budget):
    equal = [lengths[0]] * len(lengths)
    fit = max(1, budget // equal[0])
    assert len(plan_micro_batches(equal, budget)) == -(-len(equal) // fit)


@pytest.mark.parametrize(("count", "ranks"), [(8, 2), (8, 4), (8, 8), (3, 8), (6, 3), (1, 1)])
def test_each_rank_has_a_micro_batch_where_the_sequences_divide(count, ranks):
    plan = plan_micro_batches([5] * count, 10**6, ranks)
    assert len(plan) == min(count, ranks)


@settings(max_examples=100)
@given(LENGTHS, st.integers(1, 300), st.integers(1, 8))
def test_no_rank_computes_a_micro_batch_twice_where_one_can_be_cut(lengths, budget, ranks):
    plan = plan_micro_batches(lengths, budget, ranks)
    assert len(plan) % ranks == 0 or len(plan) == len(lengths)


@settings(max_examples=100)
@given(LENGTHS, st.integers(1, 300), st.integers(1, 8))
@example([1] * 5, 100, 4)
def test_each_rank_has_a_micro_batch_where_there_are_as_many_sequences(lengths, budget, ranks):
    plan = plan_micro_batches(lengths, budget, ranks)
    assert len(plan) >= min(ranks, len(lengths))


def test_nothing_makes_an_empty_plan():
    assert plan_micro_batches([], 100) == []


# --- batches of about so many tokens


def test_token_batches_worked_by_hand():
    lengths = [5, 5, 5, 3, 9, 1]
    order = [0, 1, 2, 3, 4, 5]
    assert token_batches(order, lengths, 10) == [[0, 1], [2, 3], [4, 5]]
    assert token_batches(order, lengths, 10, most=1) == [[0], [1], [2], [3], [4], [5]]
    assert token_batches(order, lengths, 10, least=4) == [[0, 1, 2, 3, 4, 5]]
    assert token_batches([5, 4, 0], lengths, 100) == [[5, 4, 0]]
    assert token_batches([], lengths, 100) == []


@pytest.mark.slow
@settings(max_examples=300)
@given(
    LENGTHS,
    st.integers(1, 200),
    st.integers(1, 6),
    st.none() | st.integers(1, 10),
    st.randoms(use_true_random=False),
)
def test_token_batches_cut_the_order_and_keep_the_bounds(lengths, tokens, least, most, random):
    if most is not None:
        most = max(most, least)
    order = list(range(len(lengths)))
    random.shuffle(order)
    batches = token_batches(order, lengths, tokens, least=least, most=most)
    assert [index for batch in batches for index in batch] == order
    assert all(batch for batch in batches)
    for place, batch in enumerate(batches):
        total = sum(lengths[index] for index in batch)
        last = place == len(batches) - 1
        assert most is None or len(batch) <= most
        assert len(batch) >= least or last
        assert total <= tokens or len(batch) <= least or last
        if place < len(batches) - 2:  # full: one more would have passed a bound
            after = lengths[batches[place + 1][0]]
            assert total + after > tokens or len(batch) == most


def test_a_short_rest_joins_the_batch_before_unless_that_would_be_too_many():
    assert token_batches(range(5), [1] * 5, 2, least=2) == [[0, 1], [2, 3, 4]]
    assert token_batches(range(5), [1] * 5, 2, least=2, most=2) == [[0, 1], [2, 3], [4]]
    assert token_batches(range(1), [1], 9, least=4) == [[0]]


def test_a_short_rest_that_cannot_join_takes_from_the_batch_before():
    assert [len(b) for b in token_batches(range(131), [1] * 131, 999, least=4, most=128)] == [
        127,
        4,
    ]
    assert token_batches(range(6), [1] * 6, 9, least=2, most=5) == [[0, 1, 2, 3], [4, 5]]


def test_items_of_one_label_are_in_one_batch_where_the_first_of_them_stands():
    labels = list("abacbd")
    found = token_batches([5, 0, 1, 2, 3, 4], [1] * 6, 3, together=labels)
    assert found == [[5, 0, 2], [1, 4, 3]]
    assert token_batches(range(6), [1] * 6, 2, most=2, together=list("xaaabb")) == [
        [0],
        [1, 2, 3],
        [4, 5],
    ]


def test_repeats_of_an_item_are_spread_and_those_of_a_list_keep_its_items_together():
    order = [0, 1, 0, 2, 0, 3]  # a small source beside a large one, weighted alike
    assert token_batches(order, [10] * 4, 20, together=list("abcd")) == [[0, 1], [0, 2], [0, 3]]
    twice = token_batches([0, 1, 2, 1, 0], [1] * 3, 3, together=list("aab"))
    assert twice == [[0, 1, 2], [1, 0]]


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1, max_size=30),
    st.integers(1, 40),
    st.integers(1, 4),
    st.none() | st.integers(4, 8),
)
def test_labels_stay_whole_whatever_the_bounds(items, tokens, least, most):
    lengths, labels = zip(*items, strict=True)
    batches = token_batches(
        range(len(items)), lengths, tokens, least=least, most=most, together=labels
    )
    assert sorted(index for batch in batches for index in batch) == list(range(len(items)))
    assert all(batches)
    for label in set(labels):
        assert sum(any(labels[index] == label for index in batch) for batch in batches) == 1
    for batch in batches:
        assert most is None or len(batch) <= most or len({labels[index] for index in batch}) == 1


# --- collating


def test_rows_are_padded_on_the_right_and_masks_come_from_lengths():
    pad = 7  # also a real token of the first row, and its last target
    batch = collate([([7, 5, 7], [False, True, True]), ([1], [False])], pad, CPU)
    assert batch.input_ids.tolist() == [[7, 5, 7], [1, 7, 7]]
    assert batch.targets.tolist() == [[False, True, True], [False, False, False]]
    assert batch.lengths.tolist() == [3, 1]
    assert batch.num_targets == 2
    assert batch.input_ids.dtype == torch.long
    assert batch.targets.dtype == torch.bool


def test_a_mask_of_another_length_than_its_ids_is_refused():
    with pytest.raises(ValueError, match="as many marks"):
        collate([([1, 2], [True]), ([3], [False, True])], 0, CPU)


@pytest.mark.slow
@settings(max_examples=60)
@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1), min_size=1))
def test_collating_keeps_every_id_and_target(rows):
    pairs = [([i for i, _ in row], [m for _, m in row]) for row in rows]
    batch = collate(pairs, 3, CPU)
    assert batch.input_ids.shape == batch.targets.shape == (len(rows), max(map(len, rows)))
    for place, (ids, mask) in enumerate(pairs):
        size = int(batch.lengths[place])
        assert size == len(ids)
        assert batch.input_ids[place, :size].tolist() == ids
        assert batch.targets[place, :size].tolist() == mask
        assert bool((batch.input_ids[place, size:] == 3).all())
        assert not bool(batch.targets[place, size:].any())
    assert batch.num_targets == sum(map(sum, (mask for _, mask in pairs)))
