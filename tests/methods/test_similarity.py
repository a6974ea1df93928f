# SPDX-License-Identifier: Apache-2.0
"""Linear CKA against its formulas written out, and what leaves it as it is."""

import pytest
import torch

from pkt_ext.methods import similarity
from pkt_ext.methods.similarity import cka_matrix, linear_cka

SHAPES = [(50, 7, 11), (9, 20, 30), (9, 5, 30), (2, 3, 1), (4, 64, 64)]


def drawn(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def layers(count, p, q, seed=0):
    """Two layers that have something in common, off centre."""
    common = drawn((count, p), seed)
    return common + 3, common @ drawn((p, q), seed + 1) + drawn((count, q), seed + 2) - 1


def formula(x, y):
    """By cross products and by a centring matrix; they agree."""
    x, y = x.double(), y.double()
    count = len(x)
    centring = torch.eye(count, dtype=torch.float64) - 1 / count
    k, l = (centring @ m @ m.T @ centring for m in (x, y))
    by_grams = (k * l).sum() / (k.norm() * l.norm())
    x, y = x - x.mean(0), y - y.mean(0)
    by_products = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    torch.testing.assert_close(by_grams, by_products, rtol=1e-10, atol=1e-12)
    return float(by_grams)


def hsic_1(x, y):
    """The U-statistic, term by term."""
    k, l = (m @ m.T for m in (x, y))
    k, l = (g - torch.diag(g.diag()) for g in (k, l))
    n, one = len(x), torch.ones(len(x), dtype=torch.float64)
    total = (k @ l).trace() + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_formula(shape, dtype, monkeypatch):
    x, y = (m.to(dtype) for m in layers(*shape))
    assert linear_cka(x, y) == pytest.approx(formula(x, y), rel=1e-9)
    monkeypatch.setattr(similarity, "_PIECE", 3)  # pieces that do not divide the rows
    assert linear_cka(x, y) == pytest.approx(formula(x, y), rel=1e-9)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] >= 4])
def test_debiased_equals_its_u_statistic(shape):
    x, y = layers(*shape)
    truth = hsic_1(x, y) / (hsic_1(x, x) * hsic_1(y, y)).sqrt()
    assert linear_cka(x, y, debiased=True) == pytest.approx(float(truth), rel=1e-8)


def test_few_rows_make_strangers_alike_but_for_the_debiased():
    x, y = drawn((20, 500)), drawn((20, 500), seed=9)
    assert linear_cka(x, y) > 0.9
    assert abs(linear_cka(x, y, debiased=True)) < 0.1
    x, y = drawn((4000, 5)), drawn((4000, 5), seed=9)
    assert linear_cka(x, y) < 0.01


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("shape", [(50, 7, 11), (9, 20, 30)])
def test_what_leaves_it_as_it_is(shape, debiased):
    x, y = layers(*shape)
    before = linear_cka(x, y, debiased=debiased)
    turned = x @ torch.linalg.qr(drawn((shape[1], shape[1]), seed=5)).Q
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(3))
    for a, b in (
        (turned, y),
        (-0.01 * x, 1000 * y),
        (x + 7, y - drawn((shape[2],), seed=6)),
        (x[order], y[order]),
        (y, x),
    ):
        assert linear_cka(a, b, debiased=debiased) == pytest.approx(before, rel=1e-9)
    assert linear_cka(x, turned, debiased=debiased) == pytest.approx(1.0, rel=1e-12)
    assert linear_cka(x[order], y, debiased=debiased) < before  # positions matter
    stretched = x * torch.linspace(0.1, 5, shape[1], dtype=torch.float64)
    assert abs(linear_cka(stretched, y, debiased=debiased) - before) > 1e-3


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("count", [40, 6])
def test_a_matrix_is_by_pairs(count, debiased):
    ours = [drawn((count, 8), seed=n) for n in range(3)]
    theirs = [drawn((count, width), seed=n + 5) for n, width in enumerate((8, 12))]
    found = cka_matrix(ours, theirs, debiased=debiased)
    assert found.shape == (3, 2) and found.dtype == torch.float64
    pairs = [[linear_cka(x, y, debiased=debiased) for y in theirs] for x in ours]
    torch.testing.assert_close(found, torch.tensor(pairs, dtype=torch.float64))


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("count", [40, 6])
def test_equal_rows_resemble_nothing(count, debiased):
    assert linear_cka(drawn((1, 8)), drawn((1, 3))) == 0
    same = torch.full((count, 8), 0.1, dtype=torch.float32)  # no exact mean
    other = drawn((count, 8))
    found = cka_matrix([same, other], [other, same], debiased=debiased)
    assert found[0].tolist() == [0, 0] and found[1].tolist() == [pytest.approx(1.0), 0]


@pytest.mark.parametrize("debiased", [False, True])
def test_what_cannot_be_compared_is_refused(debiased):
    x = drawn((5, 3))
    with pytest.raises(ValueError, match="one number of rows"):
        cka_matrix([x], [x, x[:4]], debiased=debiased)
    few = x[: 3 if debiased else 0]
    with pytest.raises(ValueError, match=f"at least {4 if debiased else 1}"):
        cka_matrix([few], [few], debiased=debiased)
    with pytest.raises(ValueError, match="finite"):
        cka_matrix([x], [x.log()], debiased=debiased)
