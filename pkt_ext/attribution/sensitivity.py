# SPDX-License-Identifier: Apache-2.0
"""How much a model's loss depends on each of its weights: |weight x gradient|, per sample.

    S1  S_ij = | w_i * dloss(sample j) / dw_i |      the absolute value of each sample by itself,
    S2  S_i  = sum_j S_ij                            its tokens summed before

Source: Zhong et al., "Seeking Neural Nuggets", ICLR 2024 (arXiv 2310.11451), and its released
scripts, which run one sample at a time with every gradient in memory. Here a padded micro-batch
runs at once and one block is resident: linear weights through `ops.linear_sensitivity_`, biases by
row sums, norms by autograd through the module itself. A sample's loss is its mean cross-entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from pkt_ext import ops
from pkt_ext.attribution.outer import OuterScores, score_outer
from pkt_ext.errors import InputError
from pkt_ext.models import capture
from pkt_ext.models.anatomy import matmul_modules
from pkt_ext.streaming.batches import Batch, Sample
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import Allotment
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.meter import PassReport
from pkt_ext.streaming.passes import Pass, Visitor
from pkt_ext.streaming.progress import Progress
from pkt_ext.streaming.ranks import ALONE, World

__all__ = ["BlockScores", "OuterScores", "PassReport", "sensitivity", "stream_sensitivity"]


@dataclass(frozen=True, eq=False)
class BlockScores:
    """The scores of one block, complete over all samples."""

    index: int
    total: float  # S3: the sum over every parameter of the block, in float64
    totals: dict[str, float]  # name relative to the block -> its part of the total
    scores: dict[str, torch.Tensor]  # the same names -> fp32, the stored shape
    weights: dict[str, torch.Tensor]  # the same names; to be used during the callback only


def stream_sensitivity(
    model: StreamedModel,
    samples: Sequence[Sample],
    *,
    allotment: Allotment,
    on_block: Callable[[BlockScores], None],
    on_restored: Callable[[int], None] = lambda index: None,
    on_outer: Callable[[OuterScores], None] | None = None,
    tokens: torch.Tensor | None = None,
    progress: Progress | None = None,
    world: World = ALONE,
    show: bool = True,
) -> PassReport:
    """Score every parameter of a model, one block resident at a time.

    Args:
        samples:     those of this process; the scores are sums over the samples of all.
        allotment:   how memory is shared out; its micro_batch is the number of samples run at once.
                     The scores depend on it by rounding only.
        on_block:    given each block's scores, the last block first.
        on_restored: given, in its turn, the index of a block that an interrupted run has finished.
        on_outer:    given the embedding's and then the head's scores, after all blocks. A tied
                     matrix comes twice, each time with both uses summed before the |.|.
        tokens:      int64 [K]: rows of embedding and head that count; None is all of them.
        progress:    of an interrupted run, to go on from and to add to.
        world:       the processes that share the samples; each calls this and is given all scores.
        show:        show a bar over the blocks.
    Returns:
        What this process's pass has cost.
    Raises:
        NonFiniteError: NaN or infinity anywhere, by block, parameter and sample.
        InputError: bad samples; a parameter that no gradient reaches.
        ResourceError: no disk space for the activations.
        PktError: what another process has raised.
    """
    batches = model.batches(samples, allotment.micro_batch)
    scorer = BlockScorer(model, on_block, on_restored, world)
    with Pass(
        model,
        batches,
        scorer,
        allotment=allotment,
        keep_rows=on_outer is not None,
        progress=progress,
        world=world,
        show=show,
    ) as run:
        run.run()
        if on_outer is not None:
            with run.meter.stage("outer"):
                score_outer(run, on_outer, tokens=tokens)
        return run.report()


def sensitivity(model, batches: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Sensitivity of every parameter of a model in memory.

    Args:
        model:   a `PreTrainedModel` (or a folder or hub id); it is neither changed nor run itself.
        batches: mappings as a DataLoader gives them: input_ids int64 [B, T], labels int64 [B, T]
                 (-100 where there is no loss), and attention_mask [B, T] where rows are padded.
    Returns:
        {parameter name: fp32 scores of the parameter's shape}, summed over all samples, each of
        which counts by the mean of its tokens' losses. A tied matrix has one name.
    Raises:
        InputError: see `stream_sensitivity`.
    """
    batches = list(batches)
    device = getattr(model, "device", torch.device("cpu"))
    stream = StreamedModel(Checkpoint.open(model), device=device)
    samples = [s for number, batch in enumerate(batches) for s in _samples(number, batch)]
    size = max((len(batch["input_ids"]) for batch in batches), default=1)
    return every_score(stream, stream.batches(samples, size), show=False)


def every_score(
    model: StreamedModel,
    batches: list[Batch],
    allotment: Allotment | None = None,
    *,
    show: bool = True,
) -> dict[str, torch.Tensor]:
    """What `sensitivity` returns, of micro-batches; arguments and errors as in `Pass`."""
    found: dict[str, torch.Tensor] = {}

    def keep(block: BlockScores) -> None:
        path = model.anatomy.blocks[block.index]
        found.update({f"{path}.{name}": score for name, score in block.scores.items()})

    scorer = BlockScorer(model, keep)
    with Pass(model, batches, scorer, allotment=allotment, keep_rows=True, show=show) as run:
        run.run()
        found.update(scorer.last)
        score_outer(run, full=found)
    return {name: found[name] for name in dict(model.model.named_parameters())}


def _samples(number: int, batch: Mapping[str, torch.Tensor]) -> list[Sample]:
    """The rows of a batch without their padding."""
    if "labels" not in batch:
        raise InputError("a batch has no labels; give input_ids, labels and attention_mask")
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask.cpu()
    return [
        Sample(f"batch {number}, row {row}", ids[row, keep], labels[row, keep])
        for row, keep in enumerate(mask.bool())
    ]


class BlockScorer(Visitor):
    """Scores of the block whose backward runs; `last` are those of what follows the last block."""

    def __init__(
        self,
        stream: StreamedModel,
        on_block: Callable[[BlockScores], None],
        on_restored: Callable[[int], None] = lambda index: None,
        world: World = ALONE,
    ):
        self.stream, self.on_block, self.restored = stream, on_block, on_restored
        self.world = world
        self.last: dict[str, torch.Tensor] = {}

    def loaded(self, index: int, block: nn.Module, scale: float) -> None:
        """Start the block's scores at zero."""
        self._scale = scale
        self._weights = {n: p.detach() for n, p in block.named_parameters()}
        self._scores = {
            n: torch.zeros(p.shape, dtype=torch.float32, device=p.device)
            for n, p in self._weights.items()
        }
        self._totals = {
            n: ops.SensitivitySums.zeros(p.shape, device=p.device) for n, p in self._weights.items()
        }
        self._matmuls = set(matmul_modules(block))
        self._reached: set[str] = set()

    @contextmanager
    def backward(self, index: int, block: nn.Module, batch: Batch):
        """Score one micro-batch: matrices while the backward runs, small parameters after it."""
        small: list[capture.Call] = []
        # in the order of the backward: (name, [B], finite where all of a sample's gradient is)
        self._sums: list[tuple[str, torch.Tensor]] = []

        def receive(call: capture.Call) -> None:
            if call.name in self._matmuls:
                self._matmul(call, batch)
            else:
                small.append(call)

        with capture.gradients(block, receive):
            yield
        for call in small:
            self._small(call, batch)
        self._check(index, batch)

    def finished(self, index: int, block: nn.Module) -> None:
        """Add up, check and hand over the block's scores."""
        path = self.stream.anatomy.blocks[index]
        names = self.stream.block_names[index]
        if missing := [n for n in self._scores if n not in self._reached]:
            raise InputError(
                f"{path}: no gradient reaches {', '.join(missing[:6])}; this model's blocks "
                "cannot be scored"
            )
        sums = self._totals.values()
        if self._scale != 1.0:
            for name, score in self._scores.items():
                score.mul_(1 / self._scale)
                self._totals[name].scale_(1 / self._scale)
        own = (torch.stack([s.total for s in sums]), torch.stack([s.nonfinite for s in sums]))
        found = self.world.gather([tensor.tolist() for tensor in own])
        # which blocks are kept hangs on the totals: equal bits for every process
        each = [math.fsum(parts) for parts in zip(*(totals for totals, _ in found), strict=True)]
        totals = dict(zip(self._totals, each, strict=True))
        self.world.sum_(*self._scores.values())
        for name, *flags in zip(totals, *(flags for _, flags in found), strict=True):
            if any(flags):
                # every gradient was finite: a weight is not, or a score has left fp32's range
                what = f"scores of parameter {name}"
                raise self.stream.not_finite(None, path, names, what)
        total = math.fsum(totals.values())
        self.on_block(BlockScores(index, total, totals, self._scores, self._weights))
        self._scores, self._weights, self._totals = {}, {}, {}

    def last_gradients(self, sample: str, gradients: dict[str, torch.Tensor]) -> None:
        """Score the final norm."""
        held = self.stream.parameters(gradients)
        for name, gradient in gradients.items():
            score = self.last.setdefault(name, torch.zeros_like(gradient, dtype=torch.float32))
            ops.accumulate_sensitivity_(score, held[name].detach(), gradient)

    def _matmul(self, call: capture.Call, batch: Batch) -> None:
        """nn.Linear and Conv1D: y = x W^T + b over the flattened rows of the whole micro-batch."""
        size, length = batch.shape
        inputs = call.input.reshape(-1, call.input.shape[-1])
        grads = call.grad_output.reshape(-1, call.grad_output.shape[-1])
        if len(inputs) != size * length or len(grads) != size * length:
            raise InputError(
                f"{call.name} sees {len(inputs)} rows of a batch of {size} x {length} tokens; this "
                "model is not supported"
            )
        name = f"{call.name}.weight"
        score, weight, sums = self._scores[name], self._weights[name], self._totals[name]
        # the padding's rows of `grads` are exactly zero: no later token is seen by an earlier one
        if isinstance(call.module, Conv1D):  # stored [in, out]: the same sum with the roles changed
            ops.linear_sensitivity_(score, weight, grads, inputs, batch.segments, sums=sums)
        else:
            ops.linear_sensitivity_(score, weight, inputs, grads, batch.segments, sums=sums)
        per_sample = grads.unflatten(0, (size, length)).sum(1, dtype=torch.float32)  # [B, D_out]
        self._sums.append((name, per_sample.sum(1)))
        if call.module.bias is not None:
            name = f"{call.name}.bias"
            for gradient in per_sample:
                self._add(name, gradient)
            self._sums.append((name, per_sample.sum(1)))

    def _small(self, call: capture.Call, batch: Batch) -> None:
        """Any other module: its own parameters' gradients, one sample at a time."""
        size, length = batch.shape
        inputs, grads = (self._by_sample(t, size, length) for t in (call.input, call.grad_output))
        own = {n: p for n, p in call.module._parameters.items() if p is not None}
        sums: dict[str, list[torch.Tensor]] = {n: [] for n in own}
        for x, dy in zip(inputs, grads, strict=True):
            parameters = {n: p.detach().requires_grad_() for n, p in own.items()}
            with torch.enable_grad():
                y = functional_call(call.module, parameters, (x,))
            found = torch.autograd.grad(y, list(parameters.values()), dy, allow_unused=True)
            for name, gradient in zip(own, found, strict=True):
                if gradient is not None:
                    self._add(f"{call.name}.{name}", gradient)
                    sums[name].append(gradient.float().sum())
        for name, values in sums.items():
            if values:
                self._sums.append((f"{call.name}.{name}", torch.stack(values)))

    def _check(self, index: int, batch: Batch) -> None:
        """Name the first parameter, in the order of the backward, with a gradient not finite."""
        self._reached.update(name for name, _ in self._sums)
        if not self._sums or torch.isfinite(torch.stack([s for _, s in self._sums])).all():
            return
        path, names = self.stream.anatomy.blocks[index], self.stream.block_names[index]
        name, sums = next((n, s) for n, s in self._sums if not torch.isfinite(s).all())
        sample = batch.ids[int((~torch.isfinite(sums)).nonzero()[0])]
        what = f"gradients of parameter {name}"
        raise self.stream.not_finite(sample, path, names, what)

    def _add(self, name: str, gradient: torch.Tensor) -> None:
        ops.accumulate_sensitivity_(
            self._scores[name], self._weights[name], gradient, sums=self._totals[name]
        )

    @staticmethod
    def _by_sample(tensor: torch.Tensor, size: int, length: int) -> torch.Tensor:
        """[B, ...] or flattened [B * T, ...] -> one slice a sample; padding has no gradient."""
        if tensor.shape[0] == size:
            return tensor
        if tensor.shape[0] != size * length:
            raise InputError(
                f"a module sees {list(tensor.shape)} of a batch of {size} x {length} tokens; this "
                "model is not supported"
            )
        return tensor.unflatten(0, (size, length))
