# SPDX-License-Identifier: Apache-2.0
"""Every kernel once on small ragged shapes, a minute under compute-sanitizer: benchmarks/run_gpu.sh
runs the cuda cases below each of its tools. Closer checks are in the ops' own tests."""

import pytest
import torch

from pkt_ext.ops import (
    SensitivitySums,
    _backend,
    accumulate_sensitivity_,
    accumulate_sensitivity_reference_,
    batched_cholesky_inverse,
    batched_svd,
    cosine_loss,
    cosine_loss_reference,
    cosine_onehot_rows_,
    cosine_onehot_rows_reference,
    cross_entropy_rows_,
    cross_entropy_rows_reference,
    fisher_rows_,
    fisher_rows_reference,
    kl_rows_,
    kl_rows_reference,
    linear_sensitivity_,
    linear_sensitivity_reference_,
    lora_factors,
    max_window,
    max_window_reference,
    neuron_log_prob_gain,
    neuron_log_prob_gain_reference,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(37, 53, 19, 24), (37, 56, 11, 24), (6, 1100, 4, 35)], ids=str)
def test_max_window(backend, shape, dtype):
    rows, cols, height, width = shape
    score = randn(rows, cols, dtype=dtype).abs()
    found = max_window(score.to(backend.device), height, width)
    expected = max_window_reference(score, height, width)
    assert found.row.item() == expected.row and found.col.item() == expected.col


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(33, 70), (65, 136)], ids=str)
@pytest.mark.parametrize("op", ["elementwise", "linear"])
def test_sensitivity(backend, op, shape, dtype):
    outputs = [
        (torch.zeros(shape, device=device),
         SensitivitySums.zeros(shape, device=device, rows=True, cols=True, blocks=True))
        for device in (backend.device, "cpu")
    ]  # fmt: skip
    if op == "elementwise":
        operands = [randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)]
        ours, reference = accumulate_sensitivity_, accumulate_sensitivity_reference_
    else:
        operands = [randn(*shape, dtype=dtype), randn(43, shape[1], dtype=dtype),
                    randn(43, shape[0], dtype=dtype), torch.tensor([0, 5, 5, 38])]  # fmt: skip
        ours, reference = linear_sensitivity_, linear_sensitivity_reference_
    (score, sums), (expected, expected_sums) = outputs
    ours(score, *(x.to(backend.device) for x in operands), sums=sums)
    reference(expected, *operands, sums=expected_sums)
    torch.testing.assert_close(score.cpu(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sums.blocks.cpu(), expected_sums.blocks, rtol=1e-3, atol=1e-2)


# variant (sensitivity.h), dtype, and how far apart rows are, in elements
KERNELS = {
    "fma-64": (0, torch.float32, 1),
    "fma-128": (1, torch.bfloat16, 1),
    "split-float32": (2, torch.float32, 1),
    "split-unaligned": (2, torch.bfloat16, 1),
    "mma-half": (2, torch.float16, 8),
    "mma-bfloat16": (2, torch.bfloat16, 8),
    "wgmma-half": (3, torch.float16, 8),
    "wgmma-bfloat16": (3, torch.bfloat16, 8),
}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_linear_kernels(backend, kernel):
    """Each that a GPU has, whichever the op would choose there."""
    variant, dtype, multiple = kernel
    if backend.name == "cpu":
        pytest.skip("a GPU's kernels")
    if variant == 3 and not backend.has_wgmma:
        pytest.skip("wgmma needs sm_90a")

    def rows(count, width):
        wide = randn(count, -(-width // multiple) * multiple, dtype=dtype)
        return wide.to(backend.device)[:, :width]  # in this order: a copy of a view is dense

    shape, segments = (65, 137), torch.tensor([0, 5, 5, 38])
    weight = randn(*shape, dtype=dtype).to(backend.device)
    operands = [weight, rows(43, shape[1]), rows(43, shape[0]), segments.to(backend.device)]
    wanted = {"rows": True, "cols": True, "blocks": True}
    score = torch.zeros(shape, device=backend.device)
    sums = SensitivitySums.zeros(shape, device=backend.device, **wanted)
    given = (score, *operands, sums)
    with _backend.device_of(score) as launch:
        size = _backend._C.linear_sensitivity_workspace(*given, **launch, variant=variant)
        workspace = torch.empty(size, dtype=torch.uint8, device=backend.device)
        _backend._C.linear_sensitivity(*given, workspace, **launch, variant=variant)
    expected = torch.zeros(shape)
    expected_sums = SensitivitySums.zeros(shape, device="cpu", **wanted)
    linear_sensitivity_reference_(expected, *(x.cpu() for x in operands), sums=expected_sums)
    torch.testing.assert_close(score.cpu(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sums.blocks.cpu(), expected_sums.blocks, rtol=1e-3, atol=1e-2)


def test_small_algebra(backend):
    rows = randn(2, 17, 40).double()
    gram = rows @ rows.mT
    lower = batched_cholesky_inverse(gram.to(backend.device)).lower.cpu()
    torch.testing.assert_close(lower @ lower.mT, gram)
    matrix = randn(2, 21, 13)
    found = batched_svd(matrix.to(backend.device))
    product = found.u * found.s[:, None] @ found.vh
    torch.testing.assert_close(product.cpu(), matrix, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank(backend, dtype):
    if backend.emulated:
        pytest.skip("products go through torch")
    matrix = randn(71, 90, dtype=dtype)[:, 5:50]
    b, a = lora_factors(matrix.to(backend.device), 4)
    left = torch.linalg.matrix_norm(matrix.double() - b.cpu().double() @ a.cpu().double())
    best = torch.linalg.svdvals(matrix.double())[4:].norm()
    assert left <= 1.02 * best


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0], ids=str)
def test_neuron_score(backend, dtype, softcap):
    operands = [randn(2, 131), randn(37, 131, dtype=dtype) * 0.1, randn(261, 37, dtype=dtype) * 0.3,
                randn(2, 37), torch.tensor([1.0, 2.0]), torch.tensor([7, 260])]  # fmt: skip
    found = neuron_log_prob_gain(*(x.to(backend.device) for x in operands), softcap=softcap)
    expected = neuron_log_prob_gain_reference(*operands, softcap=softcap).float()
    torch.testing.assert_close(found.scores.cpu(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [131, 1028])
@pytest.mark.parametrize("cap", [None, 3.0], ids=str)
def test_alignment_rows(backend, cap, columns, dtype):
    ops = [(kl_rows_, kl_rows_reference), (fisher_rows_, fisher_rows_reference)]
    labelled = [
        (cross_entropy_rows_, cross_entropy_rows_reference),
        (cosine_onehot_rows_, cosine_onehot_rows_reference),
    ]
    others = [randn(3, columns, dtype=dtype), torch.tensor([0, columns - 1, 70])]
    for op, reference in ops + labelled:
        other = others[(op, reference) in labelled]
        logits = (2 * randn(3, columns) + 1).requires_grad_()
        found = logits.detach().clone().to(backend.device)
        losses = op(found, other.to(backend.device), cap=cap)
        expected = reference(logits, other.float() if other.dtype == dtype else other, cap=cap)
        expected.sum().backward()
        torch.testing.assert_close(losses.cpu(), expected.detach(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.cpu(), logits.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cosine_loss(backend, dtype):
    states, targets = randn(5, 307, dtype=dtype), randn(5, 308, dtype=dtype)[:, 1:]
    given = states.clone().to(backend.device).requires_grad_()
    losses = cosine_loss(given, targets.to(backend.device))
    losses.sum().backward()
    truth = states.double().requires_grad_()
    expected = cosine_loss_reference(truth, targets.double())
    expected.sum().backward()
    torch.testing.assert_close(losses.detach().cpu().double(), expected.detach())
    assert given.grad.dtype == dtype
    torch.testing.assert_close(given.grad.cpu().double(), truth.grad, rtol=1e-2, atol=1e-3)
