# SPDX-License-Identifier: Apache-2.0
"""The semantic basis of a head, streamed, against the pseudo-inverse in float64 (METHODS 4.9)."""

import model_zoo as zoo
import pytest
import torch
from semantics import Largest, llama_with, random_head, stream_of

from pkt_ext.errors import InputError, NonFiniteError
from pkt_ext.methods.semantic_bases import HeadRows, semantic_basis
from pkt_ext.streaming.blocks import StreamedModel

FAMILIES = ["llama", "qwen3", "gemma2", "gpt_neox", "gpt2", "opt_post_norm"]


def with_head(weight: torch.Tensor) -> StreamedModel:
    return stream_of(llama_with(weight))


def raw(head: HeadRows, **options) -> tuple[torch.Tensor, object]:
    """(S_raw [m, D] made chunk by chunk, the basis)."""
    chunk = options.setdefault("chunk", 50)
    basis = semantic_basis(head, "head", **options)
    starts = range(0, len(head), chunk)
    rows = [head(start, min(start + chunk, len(head))) for start in starts]
    return torch.cat([basis.vectors(basis.whitened(some)) for some in rows]), basis


def error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours - truth).norm() / truth.norm())


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_basis_is_the_transposed_pseudo_inverse(family, fold):
    model = zoo.build(family)
    stream = stream_of(model)
    ids = torch.randperm(zoo.VOCAB, generator=torch.Generator().manual_seed(3))[:200]
    truth = model.get_output_embeddings().weight.detach()[ids].double()
    if fold and (path := stream.anatomy.final_norm):
        gain = model.get_parameter(f"{path}.weight").detach()
        truth = truth * (gain + 1.0 if family == "gemma2" else gain).double()
    found, basis = raw(HeadRows(stream, ids, fold_norm=fold))
    assert error(found, torch.linalg.pinv(truth).T) < 1e-11
    assert basis.rank == 32
    assert basis.condition == pytest.approx(float(torch.linalg.cond(truth)), rel=0.1)


@pytest.mark.parametrize("m, d", [(97, 96), (300, 48), (501, 136)])
@pytest.mark.parametrize("condition", [1.0, 3e2, 1e4, 1e6])
def test_identities_hold_however_the_head_is_conditioned(m, d, condition):
    weight = random_head(m, d, condition)
    basis_rows, basis = raw(HeadRows(with_head(weight), torch.arange(m), fold_norm=True))
    identity = torch.eye(d, dtype=torch.float64)
    # measured: 4e-11 at a condition number of 1e6, which the Gram matrix alone misses by 1e-5
    assert (basis_rows.T @ weight - identity).abs().max() < 1e-9
    projector = weight @ basis_rows.T
    assert (projector @ projector - projector).abs().max() < 1e-9
    assert (projector - projector.T).abs().max() < 1e-9
    assert float(projector.trace()) == pytest.approx(d, abs=1e-7)
    assert error(basis_rows, torch.linalg.pinv(weight).T) < 1e-8
    assert basis.condition == pytest.approx(condition, rel=0.2)
    assert basis.report()["passes"] == (1 if condition < 1e3 else 2)


@pytest.mark.parametrize(
    "condition, rank, kept",
    [(10.0, 30, 30), (1e5, 47, 47), (1.0, 1, 1), (1e9, 48, 34)],
    ids=["low", "one short", "one", "steep"],
)
def test_directions_without_weight_are_left_out(condition, rank, kept):
    weight = random_head(300, 48, condition, rank=rank)
    found, basis = raw(HeadRows(with_head(weight), torch.arange(300), fold_norm=True))
    assert basis.rank == kept and basis.report()["cut_off"]
    truth = torch.linalg.pinv(weight, rtol=1 / 3e6).T
    # the Gram matrix's rounding turns the smallest direction kept towards those left out: measured
    # 3e-8 at 1e-5 of the largest, 1e-3 beside the cut
    assert error(found, truth) < (1e-6 if condition < 1e6 else 1e-2)
    projector = found.T @ weight
    assert float(projector.trace()) == pytest.approx(kept, abs=1e-6)


def test_a_channel_that_the_norm_switches_off():
    model = llama_with(random_head(200, 32, 5.0))
    model.model.norm.weight.data[[3, 17]] = 0.0
    stream = stream_of(model)
    found, basis = raw(HeadRows(stream, torch.arange(200), fold_norm=True))
    assert basis.rank == 30 and (found[:, [3, 17]].abs() < 1e-12).all()
    assert raw(HeadRows(stream, torch.arange(200), fold_norm=False))[1].rank == 32


@pytest.mark.parametrize("ridge", [1e-6, 0.5])
def test_ridge(ridge):
    weight = random_head(200, 32, 1e4)
    found, basis = raw(HeadRows(with_head(weight), torch.arange(200), fold_norm=True), ridge=ridge)
    gram = weight.T @ weight
    added = ridge * gram.trace() / 32
    truth = torch.linalg.solve(gram + added * torch.eye(32, dtype=torch.float64), weight.T).T
    assert error(found, truth) < 1e-9
    assert basis.ridge == pytest.approx(float(added)) and len(basis.factors) == 1


@pytest.mark.parametrize("condition", [10.0, 1e5])
def test_chunks_change_nothing(condition):
    head = HeadRows(with_head(random_head(300, 48, condition)), torch.arange(300), fold_norm=True)
    one, _ = raw(head, chunk=300)
    for chunk in (1, 7, 299, 10**6):
        assert error(raw(head, chunk=chunk)[0], one) < 1e-9


def test_rows_come_in_the_order_of_the_ids():
    model = zoo.build("llama")
    stream, weight = stream_of(model), model.lm_head.weight.detach()
    for ids in ([5, 6, 7, 8], [8, 7, 6, 5], [5, 7, 6, 8], [0, 3], [263]):
        ids = torch.tensor(ids)
        assert torch.equal(HeadRows(stream, ids, fold_norm=False).stored(0, 9), weight[ids])


def test_not_finite_is_named():
    model = llama_with(random_head(264, 32, 5.0))
    stream = stream_of(model)
    model.lm_head.weight.data[200, 4] = float("nan")
    rows = HeadRows(stream, torch.arange(100, 260), fold_norm=True)
    with pytest.raises(NonFiniteError, match=r"lm_head\.weight, token 200, holds NaN or Inf"):
        semantic_basis(rows, "head", chunk=64)
    raw(HeadRows(stream, torch.arange(200), fold_norm=True))  # nobody asks for that row
    model.model.norm.weight.data[3] = float("inf")
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight holds NaN or Inf"):
        HeadRows(stream, torch.arange(200), fold_norm=True)


def test_a_head_of_zeros():
    head = HeadRows(with_head(torch.zeros(264, 32)), torch.arange(264), fold_norm=True)
    with pytest.raises(InputError, match=r"lm_head\.weight is all zero"):
        semantic_basis(head, "head", chunk=64)


@pytest.mark.parametrize("condition", [1.0, 1e5, 1e9], ids=["plain", "refined", "cut off"])
def test_nothing_of_the_vocabularys_size_is_made(condition):
    head = HeadRows(with_head(random_head(5000, 32, condition)), torch.arange(5000), fold_norm=True)
    with Largest() as largest:
        semantic_basis(head, "head", chunk=16)
    assert largest.elements == 32 * 32
