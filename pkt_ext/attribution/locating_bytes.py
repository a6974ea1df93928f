# SPDX-License-Identifier: Apache-2.0
"""Bytes that locating neurons takes beside the pass itself, for a budget: see `neurons.locate`."""

from __future__ import annotations

import torch

from pkt_ext.attribution.lens import POINTS, pieces_of
from pkt_ext.streaming.blocks import StreamedModel

_TOKEN = 4 * 4 + 3 * 8  # of a sample's token: planes in fp32, logits and softmax in float64
_PAIR = 5 * 8  # of a sample's neuron: strengths, centres and scores in float64
_PANEL = 2**20  # products of neurons and tokens that a thread has at once, fp32


def locating_bytes(
    stream: StreamedModel,
    samples: int,
    attention_neurons: int,
    ffn_neurons: int,
    device: torch.device | None = None,
) -> dict[str, int]:
    """Phase -> bytes, as `needs.ForwardNeeds` wants them.

    Args:
        device: where that is not the model's, which is then on the CPU; it need not be here.
    """
    device = device or stream.device
    anatomy, itemsize = stream.anatomy, stream.dtype.itemsize
    width, vocab, blocks = anatomy.hidden_size, anatomy.vocab_size, len(anatomy.blocks)
    sizes = {"o": anatomy.heads * anatomy.head_dim, "down": anatomy.intermediate_size}
    flows = samples * itemsize * (blocks * (4 * width + sum(sizes.values())) + width)
    head = vocab * width * itemsize
    if stream.checkpoint.is_mapped(stream.head_name, stream.dtype, device):
        head = 0
    queries = 2 * blocks * samples * (2 * width * itemsize + 4 * 4)  # base and added, in rows
    points = min(POINTS, 2 * blocks * samples)
    _, rows = pieces_of((vocab, width), device)
    piece = 0 if stream.dtype == torch.float32 else 4 * rows * width  # of the head, in fp32
    # all logits of one position are compared with the model's own
    logits = 3 * 4 * points * rows + 4 * 4 * vocab
    gains = queries + logits + piece + 3 * 4 * points * width
    wanted = {"o": attention_neurons, "down": ffn_neurons}
    largest = max((size for role, size in sizes.items() if wanted[role]), default=0)
    # the projection, read ahead another, in fp32 twice where a norm follows, and its candidates
    vectors = largest * width * (2 * itemsize + 3 * 4)
    panels = 4 * min(_PANEL, largest * vocab) * torch.get_num_threads()
    neurons = vectors + samples * (vocab * _TOKEN + largest * _PAIR) + panels
    on_device = flows if device.type == "cpu" else 0
    return {
        "forward": on_device,
        "gains": on_device + head + gains,
        "neurons": on_device + head + neurons,
    }
