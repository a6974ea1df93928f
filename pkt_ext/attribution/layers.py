# SPDX-License-Identifier: Apache-2.0
"""How much a model's loss depends on what each of its blocks hands on: gradient x activation.

    score_l = mean over samples of the mean over supervised positions t of
              | sum over channels of  dloss/dh_l[t] * h_l[t] |

h_l is what leaves block l, the residual stream included; a position is supervised where its next
token carries loss. A sample's loss is its mean cross-entropy, so every sample counts by a mean in
both places: a long answer weighs no more than a short one, and other samples change nothing.

A norm behind the last block hides how long that block's output is, so its sum over channels is zero
up to rounding: in most models the last block never is a critical one.

Source: SemAlign, arXiv 2510.24208 v1, which takes Captum's layer gradient x activation and does not
say how it is made one number; the sum, the absolute value and the means are our choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from pkt_ext.streaming.batches import Batch, Sample
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import Allotment
from pkt_ext.streaming.meter import PassReport
from pkt_ext.streaming.passes import Pass, Visitor
from pkt_ext.streaming.progress import Progress

_PIECE = 2**18  # products at once, in float64: little beside what a block's backward takes


def block_attribution(
    stream: StreamedModel,
    samples: Sequence[Sample],
    *,
    allotment: Allotment | None = None,
    progress: Progress | None = None,
    show: bool = True,
    on_report: Callable[[PassReport], None] = lambda report: None,
) -> torch.Tensor:
    """Gradient x activation of every block, by one streamed forward and backward.

    For `budget.fit` it is a pass with `outer=False, scored=False` that takes nothing beside, and
    is `durable` where there is a progress.

    Args:
        allotment: how memory is shared out; None: one sample at a time, and everything that was
                   read stays. The scores depend on it by rounding only.
        progress:  of this pass alone, to go on from where it was interrupted and to add to.
        on_report: given what the pass has cost.
        show:      show a bar over the blocks.
    Returns:
        float64 [L], on the CPU; in nats, as the loss.
    Raises:
        NonFiniteError: NaN or infinity anywhere, by block and sample.
        InputError: bad samples, an unsupported model.
        ResourceError: no disk space for the activations.
    """
    batches = stream.batches(samples, allotment.micro_batch if allotment else 1)
    scores = _Scores(len(samples), progress)
    with Pass(stream, batches, scores, allotment=allotment, progress=progress, show=show) as run:
        run.run()
        on_report(run.report())
    found = [scores.of_block(index) for index in range(len(stream.block_names))]
    return torch.tensor(found, dtype=torch.float64)


class _Scores(Visitor):
    """Adds up a boundary's samples; a complete one is recorded before the pass records its step."""

    def __init__(self, samples: int, progress: Progress | None):
        self._samples, self._progress = samples, progress
        self._seen: dict[int, list[float]] = {}  # boundary -> a score for each sample so far

    def loaded(self, index: int, block: nn.Module, scale: float) -> None:
        """Forget what an attempt at this block has found that did not come to its end."""
        self._seen.pop(index, None)

    def boundary(
        self, index: int, batch: Batch, hidden: torch.Tensor, gradient: torch.Tensor, scale: float
    ) -> None:
        """Score one micro-batch behind block `index - 1`."""
        if index == 0:
            return
        sums, counts = [], []
        for row in range(len(batch.ids)):
            positions, _ = batch.targets(row)
            sums.append(_strength(hidden[row], gradient[row], positions))
            counts.append(len(positions))
        found = torch.stack(sums).tolist()
        seen = self._seen.setdefault(index, [])
        seen += [total / count / scale for total, count in zip(found, counts, strict=True)]
        if len(seen) == self._samples and self._progress is not None:
            self._progress.record(_step(index), score=self._mean(index))

    def of_block(self, index: int) -> float:
        """The score of one block, of this run or of an interrupted one that went further."""
        boundary = index + 1
        if boundary in self._seen:
            return self._mean(boundary)
        return self._progress.find(_step(boundary))["score"]

    def _mean(self, boundary: int) -> float:
        return math.fsum(self._seen[boundary]) / self._samples  # exact in any order of the samples


def _step(boundary: int) -> str:
    return f"attribution {boundary}"


def _strength(
    hidden: torch.Tensor, gradient: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Sum over positions of |sum over channels of the product|, float64 []; of [T, D] each."""
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for some in positions.split(max(1, _PIECE // hidden.shape[1])):
        products = hidden[some].double() * gradient[some].double()
        total += products.sum(1).abs().sum()
    return total
