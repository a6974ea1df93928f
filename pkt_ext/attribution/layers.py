# SPDX-License-Identifier: Apache-2.0
"""How much a model's loss depends on what each of its blocks gives: gradient x activation.

    score_l = mean over samples of the mean over supervised positions t of
              | sum over channels of  dloss/dh_l[t] * a_l[t] |

h_l is what leaves block l, the residual stream included; a_l is h_l itself ("output"), or what the
block adds to the stream, h_l - h_(l-1) ("contribution"). A position is supervised where its next
token carries loss. A sample's loss is its mean cross-entropy, so every sample counts by a mean in
both places: a long answer weighs no more than a short one, and other samples change nothing.

A norm behind the last block hides how long that block's output is: in most models the last block's
score is zero up to rounding for "output", and it never is a critical one.

Source: SemAlign, arXiv 2510.24208 v1, which takes Captum's layer gradient x activation and does not
say how it is made one number; the sum, the absolute value and the means are our choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from pkt_ext.errors import InputError
from pkt_ext.streaming.batches import Batch, Sample
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import Allotment
from pkt_ext.streaming.meter import PassReport
from pkt_ext.streaming.passes import Pass, Visitor
from pkt_ext.streaming.progress import Progress

INTERFACES = ("output", "contribution")
_PIECE = 2**18  # products at once, in float64: little beside what a block's backward takes


def block_attribution(
    stream: StreamedModel,
    samples: Sequence[Sample],
    *,
    interface: str = "output",
    allotment: Allotment | None = None,
    progress: Progress | None = None,
    show: bool = True,
    on_report: Callable[[PassReport], None] = lambda report: None,
) -> torch.Tensor:
    """Gradient x activation of every block, by one streamed forward and backward.

    For `budget.fit` it is a pass with `outer=False, scored=False` that takes nothing beside, and
    is `durable` where there is a progress.

    Args:
        interface: one of `INTERFACES`.
        allotment: how memory is shared out; None: one sample at a time, and everything that was
                   read stays. The scores depend on it by rounding only.
        progress:  of this pass alone, to go on from where it was interrupted and to add to.
        on_report: given what the pass has cost.
        show:      show a bar over the blocks.
    Returns:
        float64 [L], on the CPU; in nats, as the loss.
    Raises:
        NonFiniteError: NaN or infinity anywhere, by block and sample.
        InputError: bad samples, an unsupported model, an unknown interface.
        ResourceError: no disk space for the activations.
    """
    if interface not in INTERFACES:
        raise InputError(f"interface is {interface!r}; choose one of {', '.join(INTERFACES)}")
    batches = stream.batches(samples, allotment.micro_batch if allotment else 1)
    visitor = _Outputs if interface == "output" else _Contributions
    scores = visitor(len(samples), progress)
    with Pass(stream, batches, scores, allotment=allotment, progress=progress, show=show) as run:
        run.run()
        on_report(run.report())
    found = [scores.score(index) for index in range(len(stream.block_names))]
    return torch.tensor(found, dtype=torch.float64)


class _Scores(Visitor):
    """Collects the samples' scores; a block's is recorded before the pass records the step."""

    def __init__(self, samples: int, progress: Progress | None):
        self._samples, self._progress = samples, progress
        self._found: dict[int, list[float]] = {}  # block -> a score for each sample so far

    def score(self, block: int) -> float:
        """Of this run, or of an interrupted one that went further."""
        if block in self._found:
            return math.fsum(self._found[block]) / self._samples  # exact in any order of them
        return self._progress.find(f"score {block}")["score"]

    def _add(self, block: int, products: list[torch.Tensor]) -> None:
        """Take in some samples, float64 [n] each."""
        found = self._found.setdefault(block, [])
        found += [float(each.abs().mean()) for each in products]
        if len(found) == self._samples and self._progress is not None:
            self._progress.record(f"score {block}", score=self.score(block))


class _Outputs(_Scores):
    """Scores of what leaves the blocks."""

    def loaded(self, index: int, block: nn.Module, scale: float) -> None:
        """Forget what an attempt at this block has found that did not come to its end."""
        self._found.pop(index - 1, None)

    def boundary(
        self, index: int, batch: Batch, hidden: torch.Tensor, gradient: torch.Tensor, scale: float
    ) -> None:
        """Score one micro-batch of what leaves block `index - 1`."""
        if index:
            self._add(index - 1, _products(batch, hidden, gradient, scale))


class _Contributions(_Scores):
    """Scores of what the blocks add: products with what leaves them, less with what goes in."""

    def __init__(self, samples: int, progress: Progress | None):
        super().__init__(samples, progress)
        # boundary -> sample -> float64 [n]; one boundary waits for the block before it
        self._behind: dict[int, dict[str, torch.Tensor]] = {}

    def loaded(self, index: int, block: nn.Module, scale: float) -> None:
        """Forget what an attempt at this block has found that did not come to its end."""
        self._found.pop(index, None)
        self._behind.pop(index, None)
        if index + 1 not in self._behind:  # an interrupted run has been there
            line = self._progress.find(f"products {index + 1}")
            self._behind[index + 1] = self._progress.load(line["saved"]["products"])

    def boundary(
        self, index: int, batch: Batch, hidden: torch.Tensor, gradient: torch.Tensor, scale: float
    ) -> None:
        """Keep one micro-batch's products of what leaves block `index - 1`."""
        self._behind.pop(index + 2, None)
        behind = self._behind.setdefault(index, {})
        behind |= zip(batch.ids, _products(batch, hidden, gradient, scale), strict=True)
        if len(behind) == self._samples and self._progress is not None:
            saved = self._progress.save(f"products-{index}", behind)
            self._progress.record(f"products {index}", saved={"products": saved})

    def crossing(
        self, index: int, batch: Batch, hidden: torch.Tensor, gradient: torch.Tensor, scale: float
    ) -> None:
        """Score one micro-batch of what block `index` adds."""
        into = _products(batch, hidden, gradient, scale)
        behind = (self._behind[index + 1][name] for name in batch.ids)
        self._add(index, [out - less for out, less in zip(behind, into, strict=True)])


def _products(
    batch: Batch, hidden: torch.Tensor, gradient: torch.Tensor, scale: float
) -> list[torch.Tensor]:
    """Sums over channels at each sample's supervised positions, float64 [n] each, on the CPU."""
    found, counts = [], []
    for row in range(len(batch.ids)):
        positions, _ = batch.targets(row)
        counts.append(len(positions))
        for some in positions.split(max(1, _PIECE // hidden.shape[2])):
            found.append((hidden[row, some].double() * gradient[row, some].double()).sum(1))
    return list((torch.cat(found) / scale).cpu().split(counts))
