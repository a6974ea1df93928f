# SPDX-License-Identifier: Apache-2.0
"""Layer maps against the published lists and against brute force."""

from fractions import Fraction
from itertools import combinations, combinations_with_replacement

import pytest
import torch

from pkt_ext.errors import InputError
from pkt_ext.methods.layer_maps import (
    Between,
    Pair,
    by_attribution,
    critical,
    interpolation,
    order_preserving,
    published_map,
    published_pairs,
)

DEPTHS = [(40, 32), (36, 28), (32, 32), (48, 28), (7, 3), (5, 1), (3, 8), (1, 4), (1, 1)]


def test_published_maps_of_40_to_32_and_36_to_28():
    ell = [block + 1 for block in published_map(40, 32)]
    assert ell[:16] == [1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18, 20]
    assert ell[-2:] == [38, 40] and len(ell) == 32
    assert sorted(set(range(1, 41)) - set(ell)) == [4, 9, 14, 19, 24, 29, 34, 39]
    missed = set(range(36)) - set(published_map(36, 28))
    assert sorted(block + 1 for block in missed) == [4, 8, 13, 17, 22, 26, 31, 35]


@pytest.mark.parametrize(("theirs", "ours"), DEPTHS)
def test_a_published_map_is_a2_in_exact_arithmetic(theirs, ours):
    found = published_map(theirs, ours)
    exact = [max(1, Fraction(theirs * k, ours).__floor__()) - 1 for k in range(1, ours + 1)]
    assert found == exact and found == sorted(found) and found[-1] == theirs - 1
    if theirs == ours:
        assert found == list(range(ours))


@pytest.mark.parametrize(("theirs", "ours"), DEPTHS)
def test_every_critical_block_is_served_by_the_first_that_reaches_it(theirs, ours):
    ell = published_map(theirs, ours)
    for block in range(theirs):
        ((source, k),) = published_pairs([block], theirs, ours)
        assert source == ell[k] >= block
        assert all(earlier < block for earlier in ell[:k])
        if block in ell:
            assert source == block


def test_critical_blocks_that_share_a_student_block_make_one_pair():
    # the 4th and the 5th of 40 both fall to the 4th of 32, which A2 gives the 5th
    assert published_pairs([3, 4], 40, 32) == [Pair(4, 3)]
    assert published_pairs([39, 8, 3, 39, 0], 40, 32) == [(0, 0), (4, 3), (9, 7), (39, 31)]
    assert published_pairs([], 40, 32) == []


@pytest.mark.parametrize("block", [-1, 40])
def test_a_critical_block_that_is_not_there_is_refused(block):
    with pytest.raises(InputError, match=f"no block {block}; give blocks from 0 to 39"):
        published_pairs([0, block], 40, 32)


def test_interpolation_of_40_to_32():
    found = interpolation(40, 32)
    assert found[0] == Between(0, 1, 0.25) and found[-1] == Between(38, 39, 1.0)
    for k, (lower, upper, share) in enumerate(found, 1):
        assert upper == lower + 1
        # the depth that is asked for, exactly: 40 / 32 has few bits
        assert (1 - share) * (lower + 1) + share * (upper + 1) == 40 * k / 32


@pytest.mark.parametrize(("theirs", "ours"), DEPTHS)
def test_interpolation_stays_within_the_teacher(theirs, ours):
    found = interpolation(theirs, ours)
    assert len(found) == ours
    for k, (lower, upper, share) in enumerate(found, 1):
        assert 0 <= lower <= upper < theirs and 0 <= share <= 1
        depth = (1 - share) * (lower + 1) + share * (upper + 1)
        assert depth == pytest.approx(max(1, theirs * k / ours), rel=1e-12)


def test_equal_depths_interpolate_to_the_same_block():
    for k, (lower, upper, share) in enumerate(interpolation(5, 5)):
        assert (lower, upper)[round(share)] == k and share in (0.0, 1.0)


def test_critical_blocks_are_the_highest_scores():
    scores = torch.tensor([0.3, 0.9, 0.1, 0.9, 0.5], dtype=torch.float64)
    assert critical(scores, 1) == [1]  # the lower of two equal ones
    assert critical(scores, 3) == critical(scores.tolist(), 3) == [1, 3, 4]
    for count in (0, 6):
        with pytest.raises(InputError, match=f"{count} critical blocks .* has 5; give 1 to 5"):
            critical(scores, count)


def test_a_map_by_attribution_is_in_order():
    scores = [0.3, 0.9, 0.1, 0.9, 0.5]
    assert by_attribution(scores, 2) == [1, 3]
    assert by_attribution(scores, 4) == [0, 1, 3, 4]
    assert by_attribution(scores, 5) == [0, 1, 2, 3, 4]
    assert by_attribution(scores[:3], 5) == published_map(3, 5) == [0, 0, 0, 1, 2]


def brute_force(similarity, strict):
    """The first map, in lexicographic order, that has the highest sum."""
    ours, theirs = similarity.shape
    choose = combinations if strict and theirs >= ours else combinations_with_replacement
    rows = similarity.tolist()
    return list(
        max(
            choose(range(theirs), ours),
            key=lambda each: (
                sum(Fraction(row[t]) for row, t in zip(rows, each, strict=True)),
                tuple(-t for t in each),
            ),
        )
    )


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("shape", [(3, 6), (4, 4), (4, 2), (1, 5), (5, 1), (4, 7)])
def test_the_best_map_in_order_is_that_of_brute_force(shape, strict):
    generator = torch.Generator().manual_seed(0)
    for trial in range(20):
        similarity = torch.rand(shape, generator=generator, dtype=torch.float64)
        if trial % 2:  # many ties
            similarity = (3 * similarity).floor()
        assert order_preserving(similarity, strict=strict) == brute_force(similarity, strict)


def test_a_map_in_order_prefers_the_smallest_block_among_equals():
    assert order_preserving(torch.zeros(3, 5)) == [0, 1, 2]
    assert order_preserving(torch.zeros(3, 5), strict=False) == [0, 0, 0]
    assert order_preserving(torch.zeros(3, 2)) == [0, 0, 0]
    assert order_preserving(torch.eye(4, dtype=torch.float16)) == [0, 1, 2, 3]
    assert order_preserving(-torch.eye(3)) == [0, 1, 2]  # strict and square: there is no other


@pytest.mark.parametrize(
    "similarity", [torch.zeros(3), torch.zeros(0, 3), torch.tensor([[1.0, float("nan")]])]
)
def test_a_similarity_that_is_no_matrix_of_numbers_is_refused(similarity):
    with pytest.raises(ValueError, match="of finite numbers"):
        order_preserving(similarity)
