# SPDX-License-Identifier: Apache-2.0
"""Where a model's prediction of one token comes from: blocks and neurons by log-probability gain.

    L2  gain(v; x) = log lens(x + v)[w] - log lens(x)[w]            lens: see `lens`
        block, attention      x: block input     v: what attention adds
        block, FFN            x: mid residual    v: what the FFN adds
        neuron i of the FFN   x: mid residual    v: m_i down[:, i],  m what goes into down
        attention neuron i    x: block input     v: a_i o[:, i],     a what goes into o
    L3  per sample, the blocks of highest gain, attention and FFN each by themselves
    L4  in each of them the neurons of highest gain, in that order

In parallel blocks the FFN reads the block's input, so that is its x. Where a norm stands between
the last projection and the residual stream (Gemma 2, OLMo 2), its scale is frozen as well and its
gain is part of v: a block's neurons always sum to what it adds, less biases.

Source: LaTen (ACL 2025) and its released scripts, after Yu & Ananiadou, EMNLP 2024. The scripts run
one sample in half precision with every product stored; here all samples share one forward pass with
one block resident, and the projections of the kept blocks come in once more, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from pkt_ext import ops
from pkt_ext.attribution.lens import Lens, LogProbs
from pkt_ext.errors import InputError
from pkt_ext.models.anatomy import Projection
from pkt_ext.models.capture import Flow, residual_flow
from pkt_ext.models.norms import Norm, read_norm
from pkt_ext.ops.neuron_score import MODES
from pkt_ext.streaming.batches import Batch, Sample, with_distinct_ids
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import Allotment
from pkt_ext.streaming.meter import PassReport
from pkt_ext.streaming.passes import Pass, Visitor
from pkt_ext.streaming.reader import Part
from pkt_ext.streaming.readout import check_logits, head_parts

__all__ = ["BlockNeurons", "Located", "locate"]

_ROLES = ("o", "down")  # by half of a block: the projection whose columns are its neurons


@dataclass(frozen=True, eq=False)
class BlockNeurons:
    """The best neurons of one kept block, by descending gain; the lower index first among equals.

    An FFN neuron i is row i of up (and gate) and column i of down. An attention neuron i is column
    i of o: head i // head_dim.
    """

    block: int
    indices: torch.Tensor  # int64 [k], on the CPU
    scores: torch.Tensor  # fp32 [k], on the CPU, in nats


@dataclass(frozen=True, eq=False)
class Located:
    """What `locate` finds for one sample; gains in nats, kept blocks ascending."""

    sample: str
    log_prob: float  # of the target, the model's own
    attention_gains: tuple[float, ...]  # by block
    ffn_gains: tuple[float, ...]
    attention: tuple[BlockNeurons, ...]  # of the kept blocks
    ffn: tuple[BlockNeurons, ...]

    @property
    def attention_blocks(self) -> tuple[int, ...]:
        """The kept blocks, ascending."""
        return tuple(found.block for found in self.attention)

    @property
    def ffn_blocks(self) -> tuple[int, ...]:
        """The kept blocks, ascending."""
        return tuple(found.block for found in self.ffn)

    def summary(self, neurons: int = 10) -> dict:
        """For a report: plain values, with the first `neurons` of each kept block."""

        def half(gains: tuple[float, ...], kept: tuple[BlockNeurons, ...]) -> dict:
            return {
                "gains": list(gains),
                "blocks": [found.block for found in kept],
                "neurons": [found.indices[:neurons].tolist() for found in kept],
                "scores": [found.scores[:neurons].tolist() for found in kept],
            }

        return {
            "sample": self.sample,
            "log_prob": self.log_prob,
            "attention": half(self.attention_gains, self.attention),
            "ffn": half(self.ffn_gains, self.ffn),
        }


def locate(
    stream: StreamedModel,
    targets: Sequence[Sample],
    *,
    blocks: int,
    attention_neurons: int,
    ffn_neurons: int,
    mode: str = "top",
    allotment: Allotment,
    on_report: Callable[[PassReport], None] = lambda report: None,
    show: bool = True,
) -> list[Located]:
    """Find the blocks and neurons that speak for each sample's target, all samples in one pass.

    Args:
        targets:           from `data.encode_targets`: one token to predict each.
        blocks:            how many are kept, of attention and FFN each.
        attention_neurons: how many are kept of a kept block's attention; 0: none are scored.
        ffn_neurons:       likewise of its FFN.
        mode:              "top" (exact, only those that can be among the best are evaluated), "all"
                           or "first-order"; see `ops.neuron_log_prob_gain`.
        allotment:         how memory is shared out; `resident` does not count. While neurons are
                           scored the whole head is resident.
        on_report:         given what the pass has cost.
        show:              show bars.
    Returns:
        One for each sample, in their order.
    Raises:
        NonFiniteError: NaN or infinity anywhere, by block and sample.
        InputError: bad samples, more blocks or neurons than there are, a model whose blocks do not
            add to a residual stream.
        ResourceError: no disk space for the activations.
    """
    counts = (attention_neurons, ffn_neurons)
    _check_options(stream, blocks, counts, mode)
    batches = stream.batches(targets, allotment.micro_batch)
    flows = _Flows(stream, batches, [sample.id for sample in with_distinct_ids(targets)])
    with Pass(stream, batches, flows, allotment=allotment, show=show) as run:
        parts, small = head_parts(stream, allotment.head_rows), Part(run.readout.small_names)
        run.forward([small, *parts])
        with run.resident(small), ExitStack() as head:
            if len(parts) == 1:  # it stays for the neurons
                head.enter_context(run.resident(parts[0]))
            with run.meter.stage("gains"):
                gains = _block_gains(run, flows, parts)
            kept = tuple([_strongest(g, blocks) for g in half.T] for half in gains.halves)
            wanted = _wanted(flows, kept, counts)
            whole = [Part((stream.head_name,))] if wanted and len(parts) > 1 else []
            run.plan([*whole, *(part for *_, part in wanted)])
            for part in whole:
                head.enter_context(run.resident(part))
            scores: dict[tuple[int, int, int], BlockNeurons] = {}  # half, sample, block
            with run.meter.stage("neurons"):
                for half, block, part in _bar(wanted, show):
                    some = [n for n, chosen in enumerate(kept[half]) if block in chosen]
                    with run.resident(part):
                        best = _best(flows, gains, half, block, some, counts[half], mode)
                    scores |= {(half, n, block): b for n, b in zip(some, best, strict=True)}
        on_report(run.report())

    nothing = torch.empty(0, dtype=torch.int64), torch.empty(0)

    def neurons(half: int, n: int) -> tuple[BlockNeurons, ...]:
        found = (scores.get((half, n, b)) or BlockNeurons(b, *nothing) for b in kept[half][n])
        return tuple(found)

    return [
        Located(
            sample=name,
            log_prob=float(gains.log_probs[n]),
            attention_gains=tuple(gains.halves[0][:, n].tolist()),
            ffn_gains=tuple(gains.halves[1][:, n].tolist()),
            attention=neurons(0, n),
            ffn=neurons(1, n),
        )
        for n, name in enumerate(flows.ids)
    ]


def _check_options(stream: StreamedModel, blocks: int, counts: tuple[int, int], mode: str) -> None:
    there = len(stream.block_names)
    if mode not in MODES:
        raise InputError(f"mode is {mode!r}; choose one of {', '.join(MODES)}")
    if not 1 <= blocks <= there:
        raise InputError(f"{blocks} blocks are to be kept of {there}; give 1 to {there}")
    for count, role, what in zip(counts, _ROLES, ("attention", "FFN"), strict=True):
        width = min(_projection(stream, block, role).shape[1] for block in range(there))
        if not 0 <= count <= width:
            raise InputError(
                f"{count} {what} neurons are to be kept of a block's {width}; give 0 to {width}"
            )


def _projection(stream: StreamedModel, block: int, role: str) -> Projection:
    return next(p for p in stream.anatomy.projections[block] if p.role == role)


class _Flows(Visitor):
    """What flows at each sample's scored position, on the host; N samples in the order of `ids`.

    Halves of blocks are counted 2 * block + (0 attention, 1 FFN).

    Attributes:
        base, added: [2L, N, D], see `capture.Addition`.
        final:       [N, D], out of the last block.
        neurons:     by half, [N, K].
        scales:      fp32 [2L, N], what the norm behind the last projection divides by, or 1.
        norms:       by half, that norm's path and what it is, or None.
        targets:     int64 [N].
    """

    def __init__(self, stream: StreamedModel, batches: Sequence[Batch], ids: list[str]):
        self.stream, self.ids = stream, ids
        self._row = {name: n for n, name in enumerate(ids)}
        self._positions: dict[str, int] = {}
        self.targets = torch.empty(len(ids), dtype=torch.int64)
        for batch in batches:
            for index, name in enumerate(batch.ids):
                positions, tokens = batch.targets(index)
                if len(tokens) != 1:
                    raise InputError(
                        f"sample {name!r} has {len(tokens)} targets; locating looks at one, see "
                        "pkt_ext.data.encode_targets"
                    )
                self._positions[name] = int(positions)
                self.targets[self._row[name]] = tokens[0]
        halves, width = 2 * len(stream.block_names), stream.anatomy.hidden_size
        shape = (halves, len(ids), width)
        self.base, self.added = (torch.empty(shape, dtype=stream.dtype) for _ in range(2))
        self.final = torch.empty(shape[1:], dtype=stream.dtype)
        self.neurons = [
            torch.empty(len(ids), _projection(stream, block, role).shape[1], dtype=stream.dtype)
            for block in range(len(stream.block_names))
            for role in _ROLES
        ]
        self.scales = torch.ones(shape[:2])
        self.norms: list[tuple[str, Norm] | None] = [None] * halves

    @contextmanager
    def forward(self, index: int, block: nn.Module, batch: Batch) -> Iterator[None]:
        """Keep the flow of one micro-batch through one block."""
        positions = torch.tensor([self._positions[name] for name in batch.ids])
        projections, found = self.stream.anatomy.projections[index], []
        with residual_flow(block, projections, positions.to(self.stream.device), found.append):
            yield
        self._keep(index, block, [self._row[name] for name in batch.ids], *found)

    def _keep(self, index: int, block: nn.Module, rows: list[int], flow: Flow) -> None:
        self.final[rows] = flow.output.cpu()
        for half, addition in enumerate((flow.attention, flow.ffn), 2 * index):
            self.base[half, rows] = addition.base.cpu()
            self.added[half, rows] = addition.added.cpu()
            self.neurons[half][rows] = addition.neurons.cpu()
            if addition.norm is not None:
                path = f"{self.stream.anatomy.blocks[index]}.{addition.norm}"
                norm = read_norm(block.get_submodule(addition.norm), path)
                self.norms[half] = path, norm
                self.scales[half, rows] = norm.scale(addition.output.float()).cpu()


@dataclass(frozen=True, eq=False)
class _Gains:
    """What the blocks do for the log-probability of each sample's target."""

    lens: Lens
    sigma: torch.Tensor  # fp32 [N], on the device
    log_probs: torch.Tensor  # fp32 [N], the model's own
    halves: tuple[torch.Tensor, torch.Tensor]  # fp32 [L, N]: attention, FFN


@torch.no_grad()
def _block_gains(run: Pass, flows: _Flows, parts: list[Part]) -> _Gains:
    """L2 of every block; a head in one part is resident already."""
    stream, lens = run.stream, Lens.of(run.stream)
    final, targets = (tensor.to(stream.device) for tensor in (flows.final, flows.targets))
    sigma = lens.sigma(final)
    sample = torch.arange(len(final), device=stream.device)
    every = sample.repeat(len(flows.base))
    base, added = flows.base.flatten(0, 1), flows.added.flatten(0, 1)
    model = LogProbs(lens, flows.final, None, sample, sigma, targets)
    before = LogProbs(lens, base, None, every, sigma, targets)
    after = LogProbs(lens, base, added, every, sigma, targets)
    for part in parts:
        with run.resident(part) if len(parts) > 1 else nullcontext():
            first = part.rows.start if part.rows else 0
            if first == 0:
                inputs = lens.head_inputs(final[:1].float(), sigma[:1])
                rows = slice(0, len(stream.head.weight))
                check_logits(stream, final[:1], lens.logits(inputs, 0, rows))
            for log_probs in (model, before, after):
                log_probs.take_in(first)
    found = (after.result() - before.result()).unflatten(0, flows.base.shape[:2])
    _check_finite(stream, flows, model.result()[None], ["the head"], stream.last_names, "logits")
    _check_finite(
        stream, flows, found, [b for b in stream.anatomy.blocks for _ in _ROLES], (), "gains"
    )
    return _Gains(lens, sigma, model.result(), (found[::2], found[1::2]))


def _check_finite(
    stream: StreamedModel,
    flows: _Flows,
    values: torch.Tensor,
    where: Sequence[str],
    names: Sequence[str],
    what: str,
) -> None:
    """Refuse NaN and infinity in `values` [len(where), N], by name."""
    if len(bad := (~torch.isfinite(values)).nonzero()):
        place, n = bad[0].tolist()
        raise stream.not_finite(flows.ids[n], where[place], names, what)


def _strongest(gains: torch.Tensor, count: int) -> list[int]:
    """L3: the `count` blocks of highest gain [L], ascending; the lower goes first among equals."""
    return sorted(gains.sort(descending=True, stable=True).indices[:count].tolist())


def _wanted(
    flows: _Flows, kept: tuple[list[list[int]], ...], counts: tuple[int, int]
) -> list[tuple[int, int, Part]]:
    """(half, block, what is needed of it) of every block that some sample keeps."""
    stream, found = flows.stream, []
    for block, path in enumerate(stream.anatomy.blocks):
        for half, role in enumerate(_ROLES):
            if counts[half] and any(block in chosen for chosen in kept[half]):
                names = [f"{path}.{_projection(stream, block, role).module}.weight"]
                if norm := flows.norms[2 * block + half]:
                    names += [n for n in stream.block_names[block] if n.startswith(f"{norm[0]}.")]
                found.append((half, block, Part(tuple(names))))
    return found


@torch.no_grad()
def _best(
    flows: _Flows,
    gains: _Gains,
    half: int,
    block: int,
    some: list[int],
    count: int,
    mode: str,
) -> list[BlockNeurons]:
    """L4: of one half of a block, whose projection is resident, for the samples that keep it."""
    stream, lens, place = flows.stream, gains.lens, 2 * block + half
    device, path = stream.device, stream.anatomy.blocks[block]
    projection = _projection(stream, block, _ROLES[half])
    vectors = projection.matrix(stream.model.get_parameter(f"{path}.{projection.module}.weight"))
    if behind := flows.norms[place]:
        name, norm = behind
        gain = norm.gain(stream.model.get_submodule(name))
        vectors = norm.frozen(vectors.T.float(), 1.0, gain).T
    strengths = flows.neurons[place][some].float() / flows.scales[place, some, None]
    best = mode == "top"
    scores, indices, _ = ops.neuron_log_prob_gain(
        strengths.to(device),
        vectors,
        stream.head.weight,
        flows.base[place, some].to(device).float(),
        gains.sigma[some],
        flows.targets[some].to(device),
        mode=mode,
        k=count if best else None,
        gain=lens.gain,
        lens_bias=lens.bias,
        head_bias=lens.head_bias,
        layernorm=lens.centred,
        softcap=lens.softcap,
    )
    for n, row in zip(some, scores, strict=True):
        if not torch.isfinite(row).all():
            raise stream.not_finite(flows.ids[n], path, (), "scores of neurons")
    if not best:
        scores, indices = (t[:, :count] for t in scores.sort(dim=1, descending=True, stable=True))
    pairs = zip(indices.cpu(), scores.cpu(), strict=True)
    return [BlockNeurons(block, *(t.clone() for t in pair)) for pair in pairs]


def _bar(wanted: list[tuple[int, int, Part]], show: bool) -> Iterable[tuple[int, int, Part]]:
    return tqdm(wanted, "neurons", leave=False, disable=None if show else True)
