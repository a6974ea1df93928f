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

As published (`compat`), sigma is the square root of a standard deviation, arithmetic is float16,
scores are rounded to 4 decimals, and a of an attention neuron is what the last position takes from
itself alone.

Source: LaTen (ACL 2025) and its released scripts, after Yu & Ananiadou, EMNLP 2024. The scripts run
one sample in half precision with every product stored; here all samples share one forward pass with
one block resident, and the projections of the kept blocks come in once more, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import product

import torch
from tqdm import tqdm

from pkt_ext import ops
from pkt_ext.attribution.flows import ROLES, Flows, projection_of
from pkt_ext.attribution.lens import Lens, LogProbs
from pkt_ext.errors import InputError, NonFiniteError
from pkt_ext.models.norms import read_norm
from pkt_ext.ops.neuron_score import MODES
from pkt_ext.streaming.batches import Sample, with_distinct_ids
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import Allotment
from pkt_ext.streaming.meter import PassReport
from pkt_ext.streaming.passes import Pass
from pkt_ext.streaming.reader import Part
from pkt_ext.streaming.readout import check_logits, head_parts

__all__ = ["BlockNeurons", "Located", "check_options", "locate"]


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
    compat: str | None = None,
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
        compat:            "published": the released ranking, of Llama's kind of model in float16.
                           Equal scores abound: the lower index goes first.
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
    check_options(stream, blocks, counts, mode, compat)
    batches = stream.batches(targets, allotment.micro_batch)
    ids = [sample.id for sample in with_distinct_ids(targets)]
    flows = Flows(stream, batches, ids, own_values=compat is not None)
    with Pass(stream, batches, flows, allotment=allotment, show=show) as run:
        rows = None if compat else allotment.head_rows  # its softmax is of whole rows
        parts, small = head_parts(stream, rows), Part(run.readout.small_names)
        run.forward([small, *parts])
        with run.resident(small), ExitStack() as head:
            if len(parts) == 1:  # it stays for the neurons
                head.enter_context(run.resident(parts[0]))
            with run.meter.stage("gains"):
                gains = _block_gains(run, flows, parts, compat)
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
                        best = _best_neurons(
                            gains.scorer, flows, half, block, some, counts[half], mode
                        )
                    scores |= {(half, n, block): b for n, b in zip(some, best, strict=True)}
        on_report(run.report())
    return [_located(flows, gains, kept, scores, n) for n in range(len(ids))]


def check_options(
    stream: StreamedModel, blocks: int, counts: tuple[int, int], mode: str, compat: str | None
) -> None:
    """Refuse what `locate` cannot do; no weight is read.

    Args:
        counts: attention and FFN neurons to keep; all as in `locate`.
    Raises:
        InputError: more than there is, an unknown mode, a model that `compat` does not know.
    """
    there = len(stream.block_names)
    if mode not in MODES:
        raise InputError(f"mode is {mode!r}; choose one of {', '.join(MODES)}")
    if compat not in (None, "published"):
        raise InputError(f"compat is {compat!r}; choose published, or leave it out")
    if compat and mode == "first-order":
        raise InputError("compat published has no first-order scores; choose mode all or top")
    if compat and stream.dtype != torch.float16:
        kind = str(stream.dtype).removeprefix("torch.")
        raise InputError(f"compat published computes in float16, not {kind}; give --dtype float16")
    if compat and not _is_llamas(stream):
        raise InputError(
            "compat published knows models with a final RMSNorm and plain logits alone; leave it "
            f"out for {type(stream.model).__name__}"
        )
    if not 1 <= blocks <= there:
        raise InputError(f"{blocks} blocks are to be kept of {there}; give 1 to {there}")
    for count, role, what in zip(counts, ROLES, ("attention", "FFN"), strict=True):
        width = min(projection_of(stream, block, role).shape[1] for block in range(there))
        if not 0 <= count <= width:
            raise InputError(
                f"{count} {what} neurons are to be kept of a block's {width}; give 0 to {width}"
            )


def _is_llamas(stream: StreamedModel) -> bool:
    """Whether final norm and head are of Llama's kind."""
    path = stream.anatomy.final_norm
    if path is None or stream.anatomy.logit_softcap or stream.head.bias is not None:
        return False
    return not read_norm(stream.model.get_submodule(path), path).centred


@dataclass(frozen=True, eq=False)
class _Scorer:
    """`ops.neuron_log_prob_gain` of one model and its samples; the head is resident."""

    lens: Lens
    sigma: torch.Tensor  # fp32 [N], on the device
    targets: torch.Tensor  # int64 [N], on the device
    compat: str | None

    def best(
        self,
        some: list[int],
        base: torch.Tensor,
        strengths: torch.Tensor,
        vectors: torch.Tensor,
        count: int,
        mode: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """L2 and L4: scores and indices, both [S, count] on the host, by descending score.

        Args:
            some:      the samples' numbers, S of them.
            base:      [S, D] x.
            strengths: [S, K] m or a.
            vectors:   [D, K], on the device.
        """
        device, top = vectors.device, mode == "top" and self.compat is None
        scores, indices, _ = ops.neuron_log_prob_gain(
            strengths.to(device),
            vectors,
            self.lens.stream.head.weight,
            base.to(device).float(),
            self.sigma[some],
            self.targets[some],
            mode="all" if self.compat else mode,
            k=count if top else None,
            gain=self.lens.gain,
            lens_bias=self.lens.bias,
            head_bias=self.lens.head_bias,
            layernorm=self.lens.centred,
            softcap=self.lens.softcap,
            compat=self.compat,
        )
        if not top:
            scores, indices = (
                t[:, :count] for t in scores.sort(dim=1, descending=True, stable=True)
            )
        return scores.cpu(), indices.cpu()


@dataclass(frozen=True, eq=False)
class _Gains:
    """What the blocks do for the log-probability of each sample's target."""

    scorer: _Scorer
    log_probs: torch.Tensor  # fp32 [N], the model's own
    halves: tuple[torch.Tensor, torch.Tensor]  # fp32 [L, N]: attention, FFN


@torch.no_grad()
def _block_gains(run: Pass, flows: Flows, parts: list[Part], compat: str | None) -> _Gains:
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
                check_logits(stream, final[:1], lens.all_logits(inputs))
            for log_probs in (model, before, after):
                log_probs.take_in(first)
    log_probs = model.result()
    _check_finite(flows, log_probs[None], ["the head"], stream.last_names, "logits")
    found = (after.result() - before.result()).unflatten(0, flows.base.shape[:2])
    scorer = _Scorer(lens, sigma, targets, compat)
    if compat:
        scorer = replace(scorer, sigma=ops.published_scale(final))
        found = _published_gains(scorer, flows)
    where = [path for path in stream.anatomy.blocks for _ in ROLES]
    _check_finite(flows, found, where, (), "gains", compat)
    return _Gains(scorer, log_probs, (found[::2], found[1::2]))


def _published_gains(scorer: _Scorer, flows: Flows) -> torch.Tensor:
    """Gains [2L, N] by the published arithmetic: what a half adds, as if it were one neuron."""
    device, found = flows.stream.device, torch.empty(flows.base.shape[:2])
    for half, n in product(*map(range, found.shape)):
        vector = flows.added[half, n, :, None].to(device)
        base = flows.base[half, n, None]
        found[half, n] = scorer.best([n], base, torch.ones(1, 1), vector, 1, "all")[0]
    return found


def _check_finite(
    flows: Flows,
    values: torch.Tensor,
    where: Sequence[str],
    names: Sequence[str],
    what: str,
    compat: str | None = None,
) -> None:
    """Refuse NaN and infinity in `values` [len(where), N], by name."""
    if not len(bad := (~torch.isfinite(values)).nonzero()):
        return
    place, n = bad[0].tolist()
    sample = flows.ids[n]
    if compat:
        raise NonFiniteError(
            f"{where[place]}: the target of sample {sample!r} has no probability in float16, where "
            "the published code ranks by chance; leave compat out, or the sample",
            sample,
        )
    raise flows.stream.not_finite(sample, where[place], names, what)


def _strongest(gains: torch.Tensor, count: int) -> list[int]:
    """L3: the `count` blocks of highest gain [L], ascending; the lower goes first among equals."""
    return sorted(gains.sort(descending=True, stable=True).indices[:count].tolist())


def _wanted(
    flows: Flows, kept: tuple[list[list[int]], ...], counts: tuple[int, int]
) -> list[tuple[int, int, Part]]:
    """(half, block, what is needed of it) of every block that some sample keeps."""
    stream, found = flows.stream, []
    for block, path in enumerate(stream.anatomy.blocks):
        for half, role in enumerate(ROLES):
            if counts[half] and any(block in chosen for chosen in kept[half]):
                names = [f"{path}.{projection_of(stream, block, role).module}.weight"]
                if norm := flows.norms[2 * block + half]:
                    names += [n for n in stream.block_names[block] if n.startswith(f"{norm[0]}.")]
                found.append((half, block, Part(tuple(names))))
    return found


@torch.no_grad()
def _best_neurons(
    scorer: _Scorer,
    flows: Flows,
    half: int,
    block: int,
    some: list[int],
    count: int,
    mode: str,
) -> list[BlockNeurons]:
    """Of one half of a block, whose projection is resident, for the samples that keep it."""
    stream, place, path = flows.stream, 2 * block + half, flows.stream.anatomy.blocks[block]
    projection = projection_of(stream, block, ROLES[half])
    vectors = projection.matrix(stream.model.get_parameter(f"{path}.{projection.module}.weight"))
    if behind := flows.norms[place]:
        name, norm = behind
        gain = norm.gain(stream.model.get_submodule(name))
        vectors = norm.frozen(vectors.T.float(), 1.0, gain).T
    strengths = flows.neurons[place][some].float() / flows.scales[place, some, None]
    base = flows.base[place, some]
    scores, indices = scorer.best(some, base, strengths, vectors, count, mode)
    whose = torch.zeros(1, len(flows.ids))
    whose[0, some] = scores.sum(1)
    _check_finite(flows, whose, [path], (), "scores of neurons", scorer.compat)
    # copies: what is kept of a sample is not to hold the others'
    pairs = zip(indices, scores, strict=True)
    return [BlockNeurons(block, i.clone(), s.clone()) for i, s in pairs]


def _located(
    flows: Flows,
    gains: _Gains,
    kept: tuple[list[list[int]], ...],
    scores: dict[tuple[int, int, int], BlockNeurons],
    n: int,
) -> Located:
    """What there is of sample `n`."""
    nothing = torch.empty(0, dtype=torch.int64), torch.empty(0)
    attention, ffn = (
        tuple(scores.get((half, n, b)) or BlockNeurons(b, *nothing) for b in kept[half][n])
        for half in range(2)
    )
    of_attention, of_ffn = (tuple(half[:, n].tolist()) for half in gains.halves)
    log_prob = float(gains.log_probs[n])
    return Located(flows.ids[n], log_prob, of_attention, of_ffn, attention, ffn)


def _bar(wanted: list[tuple[int, int, Part]], show: bool) -> Iterable[tuple[int, int, Part]]:
    return tqdm(wanted, "neurons", leave=False, disable=None if show else True)
