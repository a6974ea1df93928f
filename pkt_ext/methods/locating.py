# SPDX-License-Identifier: Apache-2.0
"""Where both models of a LaTen run keep what they know about its rows; kept for a resumed run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch

from pkt_ext.attribution.locating_bytes import locating_bytes
from pkt_ext.attribution.neurons import BlockNeurons, Located, locate
from pkt_ext.methods.laten_inputs import Job
from pkt_ext.models.anatomy import Anatomy
from pkt_ext.streaming.batches import Sample
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import fit, parse_bytes
from pkt_ext.streaming.meter import PassReport
from pkt_ext.streaming.needs import Prediction
from pkt_ext.streaming.progress import Progress


def locate_in(job: Job, which: int, config, kept: Progress, show: bool):
    """(every row's neurons in one of the models, what the pass cost: report values)."""
    who, stream, targets = ("teacher", "student")[which], job.streams[which], job.targets[which]
    if line := kept.find(f"locate {who}"):
        return _unpack([s.id for s in targets], kept.load(line["saved"]["found"])), line["cost"]
    budget = config.budget and parse_bytes(config.budget)
    name = f"allotment {who}"
    predicted = share_out(
        stream, targets, job.counts, budget, config.micro_batch, known=kept.state.get(name)
    )
    allotment = predicted.allotment
    rounding = {"micro_batch": allotment.micro_batch, "head_rows": allotment.head_rows}
    kept.remember(**{name: rounding})
    passed: list[PassReport] = []
    found = locate(
        stream,
        targets,
        blocks=job.blocks,
        attention_neurons=job.counts["attention"],
        ffn_neurons=job.counts["ffn"],
        mode=config.mode,
        compat=config.compat,
        allotment=allotment,
        on_report=passed.append,
        show=show,
    )
    # a row to align by may have the name of one to locate by, and is numbered in the pass
    found = [replace(one, sample=sample.id) for one, sample in zip(found, targets, strict=True)]
    (spent,) = passed
    cost = {
        "peak_bytes": spent.peak_bytes,
        "predicted_bytes": predicted.peak,
        "seconds": spent.seconds,
        "waits": spent.waits,
        "bytes_read": spent.bytes_read,
        **asdict(allotment),
    }
    saved = {"found": kept.save(f"located-{who}", _pack(found))}
    kept.record(f"locate {who}", saved=saved, cost=cost)
    return found, cost


def share_out(
    stream: StreamedModel,
    targets: Sequence[Sample],
    counts: Mapping[str, int],
    budget: int | None,
    micro_batch: int,
    device: torch.device | None = None,
    known: dict | None = None,
) -> Prediction:
    """How locating in one model shares out its memory, and what it is predicted to take.

    Args:
        counts: neurons kept of a block, by "attention", "ffn".
        budget, micro_batch, device: see `budget.fit`.
        known: of an interrupted run, what touches the rounding.
    Raises:
        InputError: the budget is too small; names the smallest that works.
    """
    extra = locating_bytes(stream, len(targets), counts["attention"], counts["ffn"], device)
    return fit(
        stream,
        targets,
        budget,
        micro_batch=micro_batch,
        extra=extra,
        outer=False,
        durable=False,
        backward=False,
        fixed=known,
        device=device,
    )


def _pack(found: Sequence[Located]) -> dict[str, torch.Tensor]:
    """All rows' neurons as a few tensors; floats as float64, in which they come back the same."""
    packed = {"log_probs": torch.tensor([each.log_prob for each in found], dtype=torch.float64)}
    for kind in ("attention", "ffn"):
        gains = [getattr(each, f"{kind}_gains") for each in found]
        kept = [getattr(each, kind) for each in found]
        packed[f"{kind}.gains"] = torch.tensor(gains, dtype=torch.float64)
        packed[f"{kind}.blocks"] = torch.tensor([[one.block for one in each] for each in kept])
        for name in ("indices", "scores"):
            rows = [torch.stack([getattr(one, name) for one in each]) for each in kept]
            packed[f"{kind}.{name}"] = torch.stack(rows)
    return packed


def _unpack(names: Sequence[str], packed: dict[str, torch.Tensor]) -> list[Located]:
    def kept(kind: str, row: int) -> tuple[BlockNeurons, ...]:
        parts = (packed[f"{kind}.{name}"][row] for name in ("blocks", "indices", "scores"))
        return tuple(BlockNeurons(int(b), i, s) for b, i, s in zip(*parts, strict=True))

    return [
        Located(
            name,
            float(packed["log_probs"][row]),
            tuple(packed["attention.gains"][row].tolist()),
            tuple(packed["ffn.gains"][row].tolist()),
            kept("attention", row),
            kept("ffn", row),
        )
        for row, name in enumerate(names)
    ]


def at_random(found: list[Located], anatomy: Anatomy, seed: int) -> list[Located]:
    """The baseline: as many neurons of the same blocks, drawn instead of located."""
    generator = torch.Generator().manual_seed(seed)
    widths = {"attention": anatomy.heads * anatomy.head_dim, "ffn": anatomy.intermediate_size}

    def drawn(one: BlockNeurons, kind: str) -> BlockNeurons:
        indices = torch.randperm(widths[kind], generator=generator)[: len(one.indices)]
        return BlockNeurons(one.block, indices, torch.zeros(len(indices)))

    return [
        replace(each, **{k: tuple(drawn(one, k) for one in getattr(each, k)) for k in widths})
        for each in found
    ]
