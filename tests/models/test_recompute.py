# SPDX-License-Identifier: Apache-2.0
"""What a recomputation leaves out is never looked at, and its gradients are the same bits."""

from functools import partial

import model_zoo
import pytest
import torch
from torch import nn

from pkt_ext.models import capture
from pkt_ext.models.recompute import Recomputation
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.checkpoint import Checkpoint

# these normalise what the last product gives
WHOLE = ("gemma2", "gemma3", "olmo2", "opt_post_norm")


def backward(stream, index, call, hidden, recompute=None):
    """(the block's output, gradient by its input, gradients that arrived at its modules)."""
    block, (args, kwargs) = stream.blocks[index], call
    hidden = hidden.clone().requires_grad_()
    found = {}
    with capture.gradients(block, lambda c: found.update({c.name: c.grad_output})):
        output = (
            recompute(block, lambda: block(hidden, *args, **kwargs))
            if recompute
            else block(hidden, *args, **kwargs)
        )
        output = output[0] if isinstance(output, tuple) else output
        torch.autograd.backward(output, torch.linspace(-1, 1, output.numel()).view_as(output))
    return output.detach(), hidden.grad, found


@pytest.mark.parametrize("family", model_zoo.FAMILIES)
def test_same_gradients_without_the_last_product(family, monkeypatch):
    stream = StreamedModel(Checkpoint.open(model_zoo.build(family).requires_grad_(False)))
    ids = torch.randint(0, model_zoo.VOCAB, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), stream.embedding_of(ids.unique()):
        hidden, calls = stream.record(torch.searchsorted(ids.unique(), ids))
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    recompute, held = Recomputation(), stream.checkpoint.load
    for index, (names, call) in enumerate(zip(stream.block_names, calls, strict=True)):
        with stream.resident(held(names, dtype=stream.dtype)):
            truth = backward(stream, index, call, hidden)
            output, gradient, found = backward(stream, index, call, hidden, recompute)
        assert gradient.equal(truth[1])
        assert found.keys() == truth[2].keys()
        assert all(found[name].equal(truth[2][name]) for name in found)
        left_out = index > 0 and not family.startswith(WHOLE)
        assert output.isnan().all() if left_out else output.equal(truth[0])


class Scaled(nn.Module):
    """A residual block that multiplies its last product by a learned vector, or squares it."""

    def __init__(self, bend):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale, self.bend = nn.Parameter(torch.full((8,), 3.0)), bend
        self.requires_grad_(False)

    def forward(self, x):
        return x + self.bend(self.down(self.up(x).relu()), self.scale)


@pytest.mark.parametrize(
    ("bend", "whole"),
    [
        (lambda y, scale: y, False),
        (lambda y, scale: 2.0 * y, False),
        (lambda y, scale: y * scale, True),  # saves the vector: not known to be harmless
        (lambda y, scale: y.square(), True),
        (lambda y, scale: y.tanh(), True),
    ],
)
def test_a_product_that_is_looked_at_is_computed(bend, whole):
    torch.manual_seed(0)
    recompute, x = Recomputation(), torch.randn(3, 5, 8)
    for place in range(2):  # watched, then left out
        block = Scaled(bend)
        inputs, others = x.clone().requires_grad_(), x.clone().requires_grad_()
        truth, output = block(inputs), recompute(block, partial(block, others))
        truth.sum().backward()
        output.sum().backward()
        assert inputs.grad.equal(others.grad)
        if whole or not place:
            assert output.equal(truth)
