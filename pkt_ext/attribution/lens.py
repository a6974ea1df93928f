# SPDX-License-Identifier: Apache-2.0
"""What the head makes of any vector of the residual stream, the final norm's scale frozen.

    L1  lens(x) = softmax(E (gain * x / sigma)),    sigma: the norm's scale of the model's own
                                                    final hidden state at that position

LayerNorm's mean and bias, a head's bias and a soft cap enter where the model has them.
Source: Yu & Ananiadou, EMNLP 2024, as LaTen (ACL 2025) uses it; LaTen's released scripts divide by
the square root of the standard deviation instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from pkt_ext.models.norms import Norm, read_norm
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.readout import LOGITS, add_logits, soft_capped

POINTS = 1024  # vectors put through the head at once
HEAD_ELEMENTS = 2**24  # of the head in fp32 at once


@dataclass(frozen=True, eq=False)
class Lens:
    """Final norm and head of a model, all but the head's matrix, in fp32 on the model's device."""

    stream: StreamedModel
    norm: Norm | None  # None: there is none
    gain: torch.Tensor | None  # [D]
    bias: torch.Tensor | None  # [D], the norm's
    head_bias: torch.Tensor | None  # [V]
    softcap: float | None

    @classmethod
    def of(cls, stream: StreamedModel) -> Lens:
        """While the small parameters outside the blocks are resident."""
        path, head_bias = stream.anatomy.final_norm, stream.head.bias
        norm = gain = bias = None
        if path:
            module = stream.model.get_submodule(path)
            norm = read_norm(module, path)
            gain, bias = norm.gain(module), norm.bias(module)
        if head_bias is not None:
            head_bias = head_bias.detach().float()
        return cls(stream, norm, gain, bias, head_bias, stream.anatomy.logit_softcap)

    @property
    def centred(self) -> bool:
        """Whether the norm subtracts the mean."""
        return self.norm is not None and self.norm.centred

    def sigma(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, D], the model's own final hidden states -> fp32 [N]."""
        if self.norm is None:
            return torch.ones(len(hidden), device=hidden.device)
        return self.norm.scale(hidden.float())

    def head_inputs(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """What the head is given for fp32 x [N, D]."""
        if self.norm is None:
            return x
        y = self.norm.frozen(x, sigma[:, None], self.gain)
        return y if self.bias is None else y + self.bias

    def logits(self, inputs: torch.Tensor, first: int, rows: slice) -> torch.Tensor:
        """fp32 [N, K] of `rows` of the head's resident part, which starts at token `first`."""
        logits = inputs @ self.stream.head.weight[rows].float().T
        if self.head_bias is not None:
            logits += self.head_bias[first + rows.start : first + rows.stop]
        return soft_capped(logits, self.softcap)

    def all_logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """fp32 [N, K] of the head's resident part, which starts at token 0, some rows at a time."""
        spans = _slices(*pieces_of(self.stream.head.weight.shape, inputs.device))
        return torch.cat([self.logits(inputs, 0, rows) for rows in spans], 1)


class LogProbs:
    """log lens(x)[y] of many vectors x, the head coming in parts.

    Args:
        base:    [Q, D], on the host, any dtype.
        added:   [Q, D], likewise, or None: x is their sum, which is never rounded to that dtype.
        sample:  int64 [Q], on the device: which sample each vector is of.
        sigma:   fp32 [N], on the device, by sample.
        targets: int64 [N], on the device, by sample.
    """

    def __init__(
        self,
        lens: Lens,
        base: torch.Tensor,
        added: torch.Tensor | None,
        sample: torch.Tensor,
        sigma: torch.Tensor,
        targets: torch.Tensor,
    ):
        self.lens, self.base, self.added = lens, base, added
        self.sample, self.sigma, self.targets = sample, sigma, targets
        # see `readout.LogSums`
        self.sums = torch.zeros(len(base), device=sigma.device)
        self.largest, self.scored = self.sums - torch.inf, self.sums.clone()

    @torch.no_grad()
    def take_in(self, first: int) -> None:
        """The resident rows of the head, from token `first` on; each token once."""
        count, size = pieces_of(self.lens.stream.head.weight.shape, self.sigma.device)
        for some in _slices(len(self.base), POINTS):
            sample = self.sample[some]
            x = self.base[some].to(sample.device).float()
            if self.added is not None:
                x = x + self.added[some].to(sample.device)
            inputs = self.lens.head_inputs(x, self.sigma[sample])
            for rows in _slices(count, size):
                column = self.targets[sample] - (first + rows.start)
                column = torch.where((column >= 0) & (column < rows.stop - rows.start), column, -1)
                add_logits(self.lens.logits(inputs, first, rows), self, some, column)

    def result(self) -> torch.Tensor:
        """After all of the head: fp32 [Q], on the host."""
        return (self.scored - self.largest - self.sums.log()).cpu()


def pieces_of(shape: Sequence[int], device: torch.device) -> tuple[int, int]:
    """Rows of a head [K, D], and how many of them meet `POINTS` vectors at once."""
    limit = LOGITS.get(device.type, 2**26) // POINTS
    return shape[0], max(1, min(shape[0], limit, HEAD_ELEMENTS // shape[1]))


def _slices(count: int, size: int) -> Iterable[slice]:
    return (slice(n, min(n + size, count)) for n in range(0, count, size))
