# SPDX-License-Identifier: Apache-2.0
"""The emulation finds the faults it is there for: each is planted in a small kernel."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulation import sanitized

ROOT = Path(__file__).parents[2]
ORDERS = ["ascending", "descending", "random"]


def reverse(module, values, fault):
    out = torch.full_like(values, -1.0)
    module.planted_reverse(values, out, fault)
    return out


def expected(values):
    return torch.cat([tile.flip(0) for tile in values.split(64)])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 130])
def test_correct_kernel_passes(emulation, order, count):
    emulation.set_fiber_order(order, 7)
    values = torch.arange(float(count))
    assert reverse(emulation, values, "none").equal(expected(values))


@pytest.mark.parametrize("order", ORDERS)
def test_missing_barrier_fails(emulation, order):
    emulation.set_fiber_order(order, 7)
    values = torch.arange(128.0)
    out = reverse(emulation, values, "missing_barrier")
    assert not out.equal(expected(values))
    assert out.isnan().any()  # shared memory starts poisoned, so the early reader shows


@pytest.mark.parametrize("order", ORDERS)
def test_off_by_one_at_the_tail_fails(emulation, order):
    emulation.set_fiber_order(order, 7)
    values = torch.arange(100.0)
    assert not reverse(emulation, values, "tail_off_by_one").equal(expected(values))


@pytest.mark.parametrize("order", ORDERS)
def test_barrier_that_some_threads_skip_is_an_error(emulation, order):
    emulation.set_fiber_order(order, 7)
    with pytest.raises(RuntimeError, match="wait at a barrier that the others never reach"):
        reverse(emulation, torch.arange(64.0), "partial_barrier")


def multiply(module, fault, dtype=torch.float16, transposed=True):
    """The planted tensor-core product, and what it should be; small integers, so both are exact."""
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randint(-8, 9, (2, 16, 16), generator=generator).to(dtype) for _ in range(2))
    out = torch.ones(16, 16)
    module.planted_multiply(a, b, out, transposed, fault)
    return out, ((a.mT if transposed else a).float() @ b.float()).sum(0) + 1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("transposed", [True, False])
def test_correct_product_passes(emulation, order, dtype, transposed):
    emulation.set_fiber_order(order, 7)
    found, expected = multiply(emulation, "none", dtype, transposed)
    assert found.equal(expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault", ["missing_wait", "short_wait", "missing_barrier", "early_copy"])
def test_copy_read_too_early_fails(emulation, order, fault):
    emulation.set_fiber_order(order, 7)
    found, _ = multiply(emulation, fault)
    assert found.isnan().any()


@pytest.mark.parametrize("order", ORDERS)
def test_copy_never_waited_for_is_an_error(emulation, order):
    emulation.set_fiber_order(order, 7)
    with pytest.raises(RuntimeError, match="copies or products it had not waited for"):
        multiply(emulation, "abandoned_copy")


@pytest.mark.parametrize("order", ORDERS)
def test_wrong_fragment_fails(emulation, order):
    emulation.set_fiber_order(order, 7)
    found, expected = multiply(emulation, "swapped_fragments")
    assert not found.isnan().any() and not found.equal(expected)


@pytest.mark.parametrize("order", ORDERS)
def test_lanes_in_different_operations_are_an_error(emulation, order):
    emulation.set_fiber_order(order, 7)
    with pytest.raises(RuntimeError, match="lanes of a warp are in different operations"):
        multiply(emulation, "divergent_warp")


def multiply_boxes(module, fault, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randint(-8, 9, (16, n), generator=generator).to(dtype) for n in (64, 192))
    out = torch.zeros(64, 192)
    module.planted_multiply_boxes(a, b, out, fault)
    return out, a.float().T @ b.float()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_correct_box_product_passes(emulation, order, dtype):
    emulation.set_fiber_order(order, 7)
    found, expected = multiply_boxes(emulation, "none", dtype)
    assert found.equal(expected)


@pytest.mark.parametrize("order", ORDERS)
def test_box_read_too_early_fails(emulation, order):
    emulation.set_fiber_order(order, 7)
    found, _ = multiply_boxes(emulation, "box_not_waited")
    assert found.isnan().any()


@pytest.mark.parametrize("order", ORDERS)
def test_wrong_descriptor_fails(emulation, order):
    emulation.set_fiber_order(order, 7)
    found, expected = multiply_boxes(emulation, "wrong_descriptor")
    assert not found.isnan().any() and not found.equal(expected)


@pytest.mark.parametrize("order", ORDERS)
def test_products_never_waited_for_are_an_error(emulation, order):
    emulation.set_fiber_order(order, 7)
    with pytest.raises(RuntimeError, match="copies or products it had not waited for"):
        multiply_boxes(emulation, "sums_not_waited")


@pytest.mark.parametrize("order", ORDERS)
def test_barrier_whose_bytes_never_land_is_an_error(emulation, order):
    emulation.set_fiber_order(order, 7)
    with pytest.raises(RuntimeError, match="wait at a barrier that the others never reach"):
        multiply_boxes(emulation, "endless_barrier")


def run_sanitized(fault: str) -> subprocess.CompletedProcess:
    """Runs the planted kernel under AddressSanitizer in a process of its own."""
    script = (
        "import glob, importlib.util, torch\n"
        "path = glob.glob('build/emulated-asan/_C_emulated*.so')[0]\n"
        "spec = importlib.util.spec_from_file_location('_C_emulated', path)\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "values = torch.arange(100.0)\n"
        f"module.planted_reverse(values, torch.empty(100), {fault!r})\n"
    )
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, cwd=ROOT, env=sanitized.environment(), capture_output=True, text=True
    )


@pytest.mark.skipif(
    not list((ROOT / "build/emulated-asan").glob("_C_emulated*.so")),
    reason="no AddressSanitizer build of the emulation (make emulation builds it with g++)",
)
def test_out_of_range_read_fails():
    assert run_sanitized("none").returncode == 0
    caught = run_sanitized("out_of_range_read")
    assert caught.returncode != 0
    assert "heap-buffer-overflow" in caught.stderr
