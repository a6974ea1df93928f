# SPDX-License-Identifier: Apache-2.0
"""A block measured on fake tensors against the same block at work on real ones."""

import model_zoo
import pytest
import torch

from pkt_ext.models import capture
from pkt_ext.models.anatomy import matmul_modules
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.footprint import Tracker, measure, record

FAMILIES = list(model_zoo.FAMILIES)
SHAPE = (3, 32)  # longer than the sliding windows


def streamed(family: str, dtype: torch.dtype = torch.float32, **sizes) -> StreamedModel:
    return StreamedModel(Checkpoint.open(model_zoo.build(family, **sizes)), dtype=dtype)


def at_work(stream: StreamedModel, index: int, call) -> tuple[int, int]:
    """(forward, backward) peak bytes of one block with real weights, scored parts held."""
    args, kwargs = call
    block = stream.blocks[index]
    hidden = torch.randn(*SHAPE, stream.embedding.embedding_dim, dtype=stream.dtype)
    gradient = torch.randn_like(hidden)
    matrices, small = matmul_modules(block), []

    def receive(call):
        if call.name not in matrices:  # these are scored when the backward is over
            small.append(call)

    with stream.resident(stream.fetch(stream.block_names[index])):
        given = (call, hidden, gradient, list(block.parameters()), list(block.buffers()))
        with torch.no_grad(), Tracker(given) as forward:
            block(hidden, *args, **kwargs)
        leaf = hidden.detach().requires_grad_()
        with Tracker(given) as backward, capture.gradients(block, receive):
            output = block(leaf, *args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
            torch.autograd.backward(output, gradient)
    return forward.peak, backward.peak


@pytest.mark.parametrize("family", FAMILIES)
def test_fake_tensors_take_what_real_ones_take(family):
    stream = streamed(family)
    found = measure(stream, SHAPE)
    calls = record(stream, SHAPE).calls
    for index, footprint in enumerate(found):
        forward, backward = at_work(stream, index, calls[index])
        assert footprint.forward == forward
        assert footprint.backward == backward
        held = stream.parameters(stream.block_names[index]).values()
        assert footprint.parameters == sum(p.numel() for p in held)
        assert footprint.weights == 4 * footprint.parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_stay_on_meta_and_buffers_real(family):
    stream = streamed(family)
    measure(stream, SHAPE)
    assert all(p.is_meta for p in stream.model.parameters())
    assert not any(type(b) is not torch.Tensor for b in stream.model.buffers())


def test_the_embedding_is_not_made():
    config = model_zoo.config("llama", hidden=64, vocab=2**40 // 64)  # 4 TiB
    stream = StreamedModel(Checkpoint.open(model_zoo.build("llama", hidden=64)))
    with torch.device("meta"):
        table = torch.nn.Embedding(config.vocab_size, 64)
    stream._meta[stream.embedding_name] = table.weight
    stream._put(stream.embedding_name, table.weight)
    assert record(stream, SHAPE).peak < 10 * SHAPE[0] * SHAPE[1] * 64 * 4


def test_operations_are_counted_by_hand():
    stream = streamed("llama", hidden=32, ffn=48, heads=4)
    rows, width, ffn = SHAPE[0] * SHAPE[1], 32, 48
    matrices = 2 * rows * (4 * width * width + 3 * width * ffn)
    attention = 2 * 2 * SHAPE[0] * SHAPE[1] ** 2 * width
    (found, _) = measure(stream, SHAPE)
    assert found.forward_flops == matrices + attention
    # no weight's gradient is taken; attention's backward recomputes its scores
    assert found.backward_flops == matrices + 2.5 * attention
    assert found.scoring_flops == matrices


def test_blocks_of_two_kinds_are_measured_apart():
    stream = streamed("gemma3", layers=4)  # sliding and full attention take turns
    kinds = [f.backward for f in measure(stream, SHAPE)]
    assert kinds[0] == kinds[2] != kinds[1] == kinds[3]


def test_bytes_follow_dtype_and_rows():
    narrow, wide = streamed("llama", torch.bfloat16), streamed("llama")
    few, many = measure(wide, (1, 32))[0], measure(wide, (4, 32))[0]
    assert many.backward == pytest.approx(4 * few.backward, rel=0.05)
    assert many.weights == few.weights == 2 * measure(narrow, (1, 32))[0].weights
    assert measure(narrow, SHAPE)[0].backward < 0.7 * measure(wide, SHAPE)[0].backward


def test_scoring_holds_inputs_that_the_graph_does_not():
    stream = streamed("llama")
    scored, plain = measure(stream, SHAPE)[0], measure(stream, SHAPE, scored=False)[0]
    assert scored.backward > plain.backward
    assert plain.scoring_flops == 0
