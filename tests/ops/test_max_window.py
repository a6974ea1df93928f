# SPDX-License-Identifier: Apache-2.0
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pkt_ext.ops import _backend, max_window, max_window_reference

# rows, cols, height, width: one element, whole matrix, below, at and above a tile, primes; windows
# with and without rows that none of them leaves; 16-byte loads possible and not
SHAPES = [
    (1, 1, 1, 1),
    (7, 9, 3, 4),
    (5, 5, 5, 5),
    (63, 255, 1, 254),
    (64, 257, 64, 1),
    (131, 263, 67, 5),
    (65, 300, 3, 299),
    (193, 40, 129, 17),
    (50, 40, 9, 17),
    (40, 64, 33, 40),
    (41, 72, 16, 8),
    (5, 1300, 3, 100),
    (4, 2640, 2, 40),
    (2, 4208, 1, 16),
]


def brute_force(score, height, width):
    """First best window by summing every one in float64."""
    windows = score.double().unfold(0, height, 1).unfold(1, width, 1).sum((-1, -2))
    place = int(windows.flatten().argmax())
    ties = (windows.flatten() == windows.flatten()[place]).nonzero()
    place = int(ties[0])
    return place // windows.shape[1], place % windows.shape[1], float(windows.flatten()[place])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_matches_brute_force(backend, shape, dtype):
    rows, cols, height, width = shape
    if backend.emulated and rows * cols > 9_000 and dtype != torch.float32:
        pytest.skip("slow; the dtypes differ in their loads, which smaller shapes have too")
    generator = torch.Generator().manual_seed(rows * cols)
    score = torch.randn(rows, cols, generator=generator).abs().to(dtype)
    found = max_window(score.to(backend.device), height, width)
    row, col, total = brute_force(score, height, width)
    assert (int(found.row), int(found.col)) == (row, col)
    assert float(found.total) == pytest.approx(total, rel=(rows + cols) * 2.0**-53)


@pytest.mark.parametrize("shape", SHAPES[2:-3], ids=str)
def test_whole_numbers_tie_as_the_oracle_does(backend, shape):
    rows, cols, height, width = shape
    generator = torch.Generator().manual_seed(rows + cols)
    score = torch.randint(0, 2, (rows, cols), generator=generator).float()
    score[-1], score[:, -1] = score[0], score[:, 0]  # so that windows at either end tie more often
    for matrix, (a, b) in ((score, (height, width)), (score.t(), (width, height))):
        found = max_window(matrix.to(backend.device), a, b)
        assert tuple(float(part) for part in found) == brute_force(matrix, a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_little_shared_memory(emulation, dtype, monkeypatch):
    """sm_75 has 64 KB a block, which the large tiles of 16-byte loads exceed."""
    monkeypatch.setattr(_backend, "_C", emulation)
    score = torch.rand(4, 2640, generator=torch.Generator().manual_seed(2)).to(dtype)
    emulation.set_shared_memory_limit(64 * 1024)
    try:
        found = max_window(score, 2, 40)
    finally:
        emulation.set_shared_memory_limit(227 * 1024)
    row, col, total = brute_force(score, 2, 40)
    assert (int(found.row), int(found.col)) == (row, col)
    assert float(found.total) == pytest.approx(total, rel=1e-12)


def test_strided_views_and_batches(backend):
    base = torch.rand(3, 2, 40, 76, generator=torch.Generator().manual_seed(1))
    for view in (
        base[..., 1:38:2, 3:70],
        base.transpose(-1, -2),
        base.transpose(0, 1)[:, 1:, 5:, ::3],
        base[:, 0],
    ):
        found = max_window(view.to(backend.device), 13, 17)
        expected = max_window_reference(view, 13, 17)
        assert found.row.shape == view.shape[:-2]
        assert found.row.cpu().equal(expected.row) and found.col.cpu().equal(expected.col)
        torch.testing.assert_close(found.total.cpu(), expected.total, rtol=1e-13, atol=0)


@pytest.mark.parametrize("value", [0.0, 1.0, 1 / 3])
def test_ties_go_to_the_first(backend, value):
    found = max_window(torch.full((130, 300), value, device=backend.device), 66, 20)
    assert (int(found.row), int(found.col)) == (0, 0)


def test_planted_tie_goes_to_the_first_row_then_column(backend):
    score = torch.zeros(80, 120, device=backend.device)
    for row, col in ((70, 10), (20, 90), (20, 91), (50, 0)):
        score[row, col] = 3.0
    found = max_window(score, 1, 1)
    assert (int(found.row), int(found.col), float(found.total)) == (20, 90, 3.0)
    found = max_window(score.t(), 1, 1)
    assert (int(found.row), int(found.col), float(found.total)) == (0, 50, 3.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (25, 30), (49, 59), (49, 0)])
def test_non_finite_scores_are_reported(backend, bad, place):
    score = torch.rand(2, 50, 60, generator=torch.Generator().manual_seed(2))
    score[(1, *place)] = bad
    found = max_window(score.to(backend.device), 27, 21)
    assert found.row[1] == -1 and found.col[1] == -1 and found.total[1].isnan()
    assert found.row[0] >= 0 and found.total[0].isfinite()


def test_empty_batch(backend):
    found = max_window(torch.empty(0, 4, 5, device=backend.device), 2, 2)
    assert [part.shape for part in found] == [torch.Size([0])] * 3


def test_more_matrices_than_a_grid_holds(backend, monkeypatch):
    limit = 65535
    if backend.emulated:  # which takes a minute for as many blocks
        limit = 3
        monkeypatch.setattr(sys.modules["pkt_ext.ops.max_window"], "_GRID", limit)
    score = torch.zeros(limit + 2, 1, 2)
    score[-3:, 0] = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    found = max_window(score.to(backend.device), 1, 1)
    assert found.total[-4:].tolist() == [0.0, 1.0, 2.0, 3.0] and found.total[:-3].sum() == 0.0
    assert found.col[-4:].tolist() == [0, 1, 0, 1] and found.row.count_nonzero() == 0


def test_bitwise_repeatable_on_any_thread_count(any_threads):
    score = torch.rand(700, 1500, generator=torch.Generator().manual_seed(3)) ** 8
    totals = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        totals.append(max_window(score, 500, 1100))
    assert len({(int(t.row), int(t.col), float(t.total)) for t in totals}) == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_whole_numbers_match_brute_force_exactly(data):
    rows, cols = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    height, width = data.draw(st.integers(1, rows)), data.draw(st.integers(1, cols))
    seed = data.draw(st.integers(0, 2**31))
    score = torch.randint(0, 3, (rows, cols), generator=torch.Generator().manual_seed(seed)).float()
    found = max_window(score, height, width)
    assert (int(found.row), int(found.col), float(found.total)) == brute_force(score, height, width)


def test_reference_agrees_with_brute_force():
    score = torch.randint(0, 4, (30, 50), generator=torch.Generator().manual_seed(4)).float()
    found = max_window_reference(score, 7, 11)
    assert tuple(float(part) for part in found) == brute_force(score, 7, 11)


def test_errors(backend):
    score = torch.rand(4, 5, device=backend.device)
    with pytest.raises(ValueError, match="5 x 2 does not fit a score matrix of 4 x 5"):
        max_window(score, 5, 2)
    with pytest.raises(ValueError, match="0 x 2 does not fit"):
        max_window(score, 0, 2)
    with pytest.raises(TypeError, match="score: expected dtype float32, .* got torch.int64"):
        max_window(score.long(), 1, 1)
    with pytest.raises(ValueError, match="score: expected at least 2 dimensions"):
        max_window(score[0], 1, 1)
