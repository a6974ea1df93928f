# SPDX-License-Identifier: Apache-2.0
"""The products of the truncated SVD, and the kernels around them."""

import itertools
import math

import pytest
import torch

from pkt_ext.ops import _backend, _krylov, _thin_products
from pkt_ext.ops.low_rank import lora_factors


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# The CPU's product kernel; on a GPU the same products are cuBLAS's.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (24, 512), (2, 541), (149, 31), (131, 1039)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_thin_product(backend, dtype, shape, transposed):
    if backend.device == "cuda":
        pytest.skip("cuBLAS does these products on a GPU")
    parent = torch.randn(shape[0] + 2, shape[1] + 9, generator=generator()).to(dtype)
    parent[0] = parent[:, :3] = parent[:, -6:] = math.nan  # nothing outside the window is read
    matrix = parent[1:-1, 3:-6]
    exact = (matrix if transposed else matrix.T).double()
    for columns, variant in itertools.product((8, 40), (0, 1, 2)):
        thin = torch.randn(columns, len(exact), generator=generator())
        wanted, scale = thin.double() @ exact, thin.double().abs() @ exact.abs()
        results = []
        for threads in (1, 2, 5):
            out = torch.full((columns, exact.shape[1]), math.nan)
            arguments = {"threads": threads, "variant": variant}
            _backend._C.thin_product(matrix, thin, out, transposed, **arguments)
            results.append(out.clone())
            _backend._C.thin_product(matrix, thin, out, transposed, accumulate=True, **arguments)
            assert ((out.double() - 2 * wanted).abs() <= 8e-7 * scale).all()
        assert ((results[0].double() - wanted).abs() <= 4e-7 * scale).all()
        assert results[0].equal(results[1]) and results[0].equal(results[2])


@pytest.mark.parametrize("variant", [0, 1, 2])
def test_thin_product_widens_every_16_bit_number(variant):
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    one = torch.zeros(8, 1)
    one[3] = 1.0
    for dtype in (torch.float16, torch.bfloat16):
        matrix = patterns.view(dtype)[None]
        out = torch.empty(8, 2**16)
        _backend._C.thin_product(matrix, one, out, True, variant=variant)
        torch.testing.assert_close(out[3], matrix[0].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (300, 77), (513, 32)], ids=str)
def test_square_sum(dtype, shape):
    matrix = torch.randn(shape[0], shape[1] + 9, generator=generator()).to(dtype)[:, 3:-6]
    found = {_backend._C.square_sum(matrix, threads=threads) for threads in (1, 2, 5)}
    assert len(found) == 1
    assert found.pop() == pytest.approx(float(matrix.double().square().sum()), rel=1e-14)
    for view in (matrix, matrix.T, matrix[:, ::2]):
        wanted = float(view.double().square().sum())
        assert float(_thin_products.square_sum(view)) == pytest.approx(wanted, rel=1e-12)


def test_thin_product_errors():
    matrix, thin, out = torch.rand(5, 7), torch.rand(16, 7), torch.rand(16, 5)
    call = _backend._C.thin_product
    with pytest.raises(ValueError, match="thin: expected a multiple of 8 rows, got 15"):
        call(matrix, thin[:15], out, False)
    with pytest.raises(ValueError, match=r"thin: expected shape \[16, 5\], got \[16, 7\]"):
        call(matrix, thin, out, True)
    with pytest.raises(ValueError, match=r"out: expected shape \[16, 5\], got \[16, 7\]"):
        call(matrix, thin, torch.rand(16, 7), False)
    with pytest.raises(ValueError, match="contiguous rows, got a column stride of 5"):
        call(torch.rand(7, 5).T, thin, out, False)
    with pytest.raises(TypeError, match="matrix: expected dtype float32, float16, bfloat16"):
        call(matrix.double(), thin, out, False)


# The glue kernels, on every backend.


def call(name, *tensors, **launch):
    with _backend.device_of(tensors[0]) as arguments:
        getattr(_backend._C, name)(*tensors, **launch, **arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, cols, lead, tail", [(1, 1, 0, 0), (37, 8, 5, 2), (257, 3, 0, 7)])
def test_slices_hold_float32_and_pad_with_zeros(backend, dtype, rows, cols, lead, tail):
    values = torch.randn(rows, cols, generator=generator())
    values[rows // 2] *= 1e-6
    peak = torch.frexp(values.abs().amax(0))[1]
    scale = torch.exp2(15 - peak.float()) if dtype == torch.float16 else torch.ones(cols)
    slices = torch.full((lead + rows + tail, 3 * cols), math.nan, dtype=dtype)
    values, scale, slices = (t.to(backend.device) for t in (values, scale, slices))
    call("split_slices", values, scale, slices, lead=lead)
    inside = slices[lead : lead + rows]
    assert not slices[:lead].any() and not slices[lead + rows :].any()
    first = (values * scale).to(dtype)
    assert inside[:, :cols].equal(first)
    assert inside[:, cols : 2 * cols].equal((values * scale - first.float()).to(dtype))

    # Three slices miss less than 2^-24 of an entry, or 2^-39 of its column's peak in float16.
    out = torch.empty_like(values)
    call("merge_slices", slices.float(), scale, out, lead=lead)
    missed = (out.double() - values.double()).abs()
    floor = values.abs().amax(0) * 2.0**-38 if dtype == torch.float16 else torch.zeros(cols)
    assert (missed <= values.abs() * 2.0**-23 + floor.to(backend.device)).all()


def test_merge_adds_the_parts_and_undoes_the_scale(backend):
    parts = torch.randn(300, 15, generator=generator()).to(backend.device)
    scale = torch.tensor([1.0, 2.0, 0.5, 2.0**-20, 2.0**14], device=backend.device)
    out = torch.full((290, 5), math.nan, device=backend.device)
    call("merge_slices", parts, scale, out, lead=7)
    one, two, three = parts[7:297].split(5, dim=1)
    assert out.equal((three + two + one) / scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows, rank, cols", [(1, 1, 1), (255, 3, 257), (256, 1, 40), (601, 5, 0)])
def test_orient_makes_the_first_peak_positive(backend, dtype, rows, rank, cols):
    left = torch.randn(rows, rank, dtype=dtype, generator=generator())
    right = torch.randn(rank, cols, dtype=dtype, generator=generator())
    a, b = torch.rand(2, rank, dtype=dtype, generator=generator())
    if rows > 300:  # equal peaks in other lanes, warps and rounds: the first row's sign decides
        left[[8, 300, 520], 0] = torch.tensor([-9.0, 9.0, 9.0], dtype=dtype)
        left[[263, 264], 1] = torch.tensor([9.0, -9.0], dtype=dtype)
        left[:, 2] = 0
    peak = (left.abs() == left.abs().amax(0)).byte().argmax(0)
    sign = torch.where(left.gather(0, peak[None])[0] < 0, -1.0, 1.0).to(dtype)
    wanted = left * (sign * a), right * (sign * b)[:, None]
    found = [t.clone().to(backend.device) for t in (left, right, a, b)]
    call("orient_factors", *found)
    assert found[0].cpu().equal(wanted[0]) and found[1].cpu().equal(wanted[1])


def test_kernel_errors(backend):
    def tensors(*shapes):
        return [torch.zeros(shape, device=backend.device) for shape in shapes]

    values, scale = tensors((4, 2), (2,))
    slices = torch.zeros(5, 6, dtype=torch.bfloat16, device=backend.device)
    with pytest.raises(ValueError, match=r"4 rows from row 2 do not fit slices of shape \[5, 6\]"):
        call("split_slices", values, scale, slices, lead=2)
    with pytest.raises(ValueError, match=r"scale: expected shape \[2\], got \[4\]"):
        call("split_slices", values, *tensors((4,)), slices, lead=0)
    with pytest.raises(TypeError, match="slices: expected dtype float16, bfloat16"):
        call("split_slices", values, scale, slices.float(), lead=0)
    with pytest.raises(ValueError, match="values: expected a contiguous tensor"):
        call("split_slices", *tensors((2, 4))[0].T[None], scale, slices, lead=0)
    with pytest.raises(ValueError, match=r"parts: expected shape \[5, 6\], got \[5, 5\]"):
        call("merge_slices", *tensors((5, 5), (2,), (4, 2)), lead=0)
    with pytest.raises(ValueError, match=r"right: expected shape \[3, 4\], got \[2, 4\]"):
        call("orient_factors", *tensors((5, 3), (2, 4), (3,), (3,)))
    with pytest.raises(TypeError, match="right: expected dtype float32, got torch.float64"):
        call("orient_factors", *tensors((5, 3)), torch.zeros(3, 4).double(), *tensors((3,), (3,)))


@pytest.fixture
def sliced(backend, monkeypatch):
    """The GPU's 16-bit products everywhere; on the CPU float64 ones play the tensor cores."""

    def products(matrix, threads):
        if matrix.element_size() != 2:
            return _thin_products.thin_products(matrix, threads)
        if matrix.stride(1) != 1:
            return products(matrix.T, threads)[::-1]
        return _thin_products._sliced_products(matrix)

    if backend.device == "cpu":
        monkeypatch.setattr(
            _thin_products, "_mm_float32", lambda a, b: (a.double() @ b.double()).float()
        )
        monkeypatch.setattr(_krylov, "thin_products", products)
    return backend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("col, stride", [(0, 64), (3, 64), (8, 64), (5, 61)])
def test_sliced_products_are_as_good_as_float32(sliced, dtype, col, stride):
    parent = torch.randn(50, stride, generator=generator()).to(dtype).to(sliced.device)
    window = parent[1:-1, col : col + 43]
    apply, adjoint = _thin_products._sliced_products(window)
    exact = window.double()
    for product, a in ((apply, exact.T), (adjoint, exact)):
        thin = torch.randn(8, len(a), generator=generator()).to(sliced.device) * 1e-3
        wanted = thin.double() @ a
        missed = (product(thin).double() - wanted).abs()
        assert (missed <= 2.0**-22 * (thin.double().abs() @ a.abs()) + 1e-12).all()


def test_neighbours_of_a_window_stay_out_of_it(sliced):
    parent = torch.ones(20, 64, dtype=torch.bfloat16, device=sliced.device)
    window = parent[:, 3:60]
    assert _thin_products._aligned_superset(window)[1] == 3
    parent[:, 1] = math.nan
    assert _thin_products._aligned_superset(window)[1] == 0  # zero rows would not silence it
    parent[:, 1] = 1.0
    assert _thin_products._aligned_superset(parent[:, 3:64])[0].shape == (20, 64)
    last = torch.ones(20 * 64 - 3, dtype=torch.bfloat16).as_strided((20, 58), (64, 1), 3)
    assert _thin_products._aligned_superset(last)[1] == 0  # the superset would leave the storage


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_svd_of_a_16_bit_window_through_slices(sliced, dtype):
    parent = torch.zeros(560, 640)
    decay = torch.arange(1, 541)[:, None] ** -0.5
    parent[3:543, 5:] = decay * torch.randn(540, 635, generator=generator())
    window = parent.to(dtype)[3:543, 5:]
    b, a = lora_factors(window.to(sliced.device), 4)
    wide_b, wide_a = lora_factors(window.float(), 4)
    wanted = (wide_b @ wide_a).double()
    assert ((b.cpu() @ a.cpu()) - wanted).norm() < 2e-3 * wanted.norm()
