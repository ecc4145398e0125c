"""Batches: every sequence once, within the budget, a function of the lengths."""

from hypothesis import given
from hypothesis import strategies as st

from stillroom.workers.batching import batches, shapes

LENGTHS = st.lists(st.integers(1, 300), max_size=60)
BUDGET = st.integers(1, 2000)


@given(LENGTHS, BUDGET)
def test_every_sequence_is_in_one_batch(lengths: list[int], budget: int) -> None:
    assert sorted(i for group in batches(lengths, budget) for i in group) == list(range(len(lengths)))


@given(LENGTHS, BUDGET)
def test_padded_size_stays_within_the_budget_unless_alone(lengths: list[int], budget: int) -> None:
    groups = batches(lengths, budget)
    for group, (count, width) in zip(groups, shapes(lengths, groups), strict=True):
        assert (count, width) == (len(group), max(lengths[i] for i in group))
        assert count * width <= budget or count == 1


@given(LENGTHS, BUDGET)
def test_longest_first_and_ties_keep_their_order(lengths: list[int], budget: int) -> None:
    order = [i for group in batches(lengths, budget) for i in group]
    assert order == sorted(order, key=lambda i: (-lengths[i], i))


@given(LENGTHS, BUDGET)
def test_no_batch_could_have_taken_the_next_sequence(lengths: list[int], budget: int) -> None:
    groups = batches(lengths, budget)
    for group in groups[:-1]:
        assert (len(group) + 1) * lengths[group[0]] > budget


@given(LENGTHS, BUDGET, st.integers(1, 300))
def test_nothing_shares_a_batch_across_the_border(lengths: list[int], budget: int, border: int) -> None:
    groups = batches(lengths, budget, border=border)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len({lengths[i] > border for i in group}) == 1 for group in groups)


@given(LENGTHS, BUDGET, st.randoms())
def test_shapes_do_not_depend_on_the_order(lengths: list[int], budget: int, random: object) -> None:
    shuffled = list(lengths)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert shapes(lengths, batches(lengths, budget)) == shapes(shuffled, batches(shuffled, budget))
