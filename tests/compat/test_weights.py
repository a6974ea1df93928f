# SPDX-License-Identifier: Apache-2.0
"""Whether a model's weights changed."""

import pytest
import torch

from pkt_ext.compat._weights import checksum, state_of


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 4), (4, 5), (2, 3, 4), (0, 3), (3, 0)])
def test_a_checksum_sees_bits_and_places(dtype, shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    own = checksum(values)
    assert own == checksum(values.clone())
    if values.numel():
        assert own != checksum(-values)
    for axis in range(values.ndim):
        if values.numel() and values.shape[axis] > 1:
            assert own != checksum(values.roll(1, axis))
    if values.ndim == 2 and values.numel():
        assert checksum(values.t()) == checksum(values.t().contiguous())


def test_a_state_sees_writes_and_edits():
    layer = torch.nn.Linear(3, 2)
    states = [state_of(layer)]
    assert states == [state_of(layer)]
    with torch.no_grad():
        layer.weight.mul_(1)  # the same bits
    states.append(state_of(layer))
    layer.weight.data[0, 0] += 1
    states.append(state_of(layer))
    layer.bias = torch.nn.Parameter(layer.bias.detach().clone())
    states.append(state_of(layer))
    assert len(set(states)) == 4
    with torch.inference_mode():
        frozen = torch.nn.Linear(3, 2)
    assert state_of(frozen) == state_of(frozen)
