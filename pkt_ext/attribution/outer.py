# SPDX-License-Identifier: Apache-2.0
"""Sensitivity of what lies outside the blocks: embedding, head, position embedding.

The score of the embedding or the head is [V, D], the model's largest, and never exists: the ops
give its column sums, all that a window along the hidden axis needs. The head's output gradients
exist for a chunk of vocabulary rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pkt_ext import ops
from pkt_ext.streaming.passes import Pass
from pkt_ext.streaming.reader import Part

_CHUNK = 2**23  # elements of a chunk of the head, or of its output gradients, whichever is more
_NARROW = 256  # rows of a chunk whose rows are embeddings too; each brings as many rows again


@dataclass(frozen=True, eq=False)
class OuterScores:
    """The scores of the embedding or the head, over the tokens asked for."""

    name: str  # "embedding" or "head"
    parameter: str  # its name; one and the same where the two are tied
    column_sums: torch.Tensor  # float64 [D]: the [V, D] score summed over V
    total: float  # their sum
    weight: Callable[[], torch.Tensor]  # loads [V, D]


def score_outer(
    run: Pass,
    on_outer: Callable[[OuterScores], None] | None = None,
    *,
    tokens: torch.Tensor | None = None,
    full: dict[str, torch.Tensor] | None = None,
) -> None:
    """Score embedding, head and position embedding after `run.run()` (with keep_rows).

    Args:
        on_outer: given the embedding's scores, then the head's.
        tokens:   int64 [K], the rows of embedding and head that count; None is all.
        full:     filled with {parameter name: fp32 score} of everything here, zero in the rows that
                  do not count; costs their size.
    Raises:
        InputError: NaN or infinity, by parameter and sample.
    """
    stream = run.stream
    vocab, width = stream.anatomy.vocab_size, stream.embedding.embedding_dim
    wanted = None
    if tokens is not None:
        wanted = torch.zeros(vocab, dtype=torch.bool, device=stream.device)
        wanted[tokens.to(stream.device)] = True

    def sums(name: str) -> ops.SensitivitySums:
        if full is not None:
            full[name] = torch.zeros(vocab, width, device=stream.device)
        return ops.SensitivitySums.zeros((vocab, width), device=stream.device, cols=True)

    embedding = sums(stream.embedding_name)
    head = embedding if stream.anatomy.tied else sums(stream.head_name)
    _score_first(run, embedding, wanted, full)
    _score_head(run, head, wanted, full)
    if on_outer is None:
        return
    for found in {id(found): found for found in (embedding, head)}.values():
        run.world.sum_(found.cols, found.total)
    for name, parameter, found in (
        ("embedding", stream.embedding_name, embedding),
        ("head", stream.head_name, head),
    ):
        on_outer(
            OuterScores(
                name,
                parameter,
                found.cols,
                float(found.total),
                lambda key=parameter: stream.fetch([key])[key],
            )
        )


def _score_first(
    run: Pass,
    sums: ops.SensitivitySums,
    wanted: torch.Tensor | None,
    full: dict[str, torch.Tensor] | None,
) -> None:
    """Embedding and positions. A tied embedding's gradients are kept for the head's turn."""
    stream = run.stream
    for number, row, gradients in run.first_gradients():
        for name, (ids, values, weight) in gradients.items():
            if not torch.isfinite(values).all():
                what = f"gradients of parameter {name}"
                sample = run.batches[number].ids[row]
                raise stream.not_finite(sample, "the embedding", gradients, what)
            if name == stream.embedding_name and stream.anatomy.tied:
                run.store.put("tied", (number, row), values, passing=True)
                run.store.put("tied ids", (number, row), ids, passing=True)
                continue
            own = sums if name == stream.embedding_name else None
            if own is None and full is None:
                continue
            if own is not None and wanted is not None:
                kept = wanted[ids]
                ids, values, weight = ids[kept], values[kept], weight[kept]
            score = None if full is None else torch.zeros(values.shape, device=values.device)
            ops.accumulate_sensitivity_(score, weight, values, sums=own)
            if score is not None:
                shape = stream.checkpoint.shape(name)
                whole = full.setdefault(name, torch.zeros(shape, device=stream.device))
                whole[ids] += score


def _score_head(
    run: Pass,
    sums: ops.SensitivitySums,
    wanted: torch.Tensor | None,
    full: dict[str, torch.Tensor] | None,
) -> None:
    """The head, a chunk of vocabulary rows at a time over all samples.

    A tied matrix's rows that are some sample's input come apart from the others, in narrow chunks:
    only their chunks get further rows of inputs and gradients, as many as the chunk has tokens.
    """
    stream = run.stream
    ids = torch.arange(stream.anatomy.vocab_size, device=stream.device)
    also_embedded = torch.zeros_like(ids, dtype=torch.bool)
    if stream.anatomy.tied:
        for number, batch in enumerate(run.batches):
            for row in range(len(batch.ids)):
                also_embedded[run.store.get("tied ids", (number, row))] = True
    if wanted is not None:
        ids = ids[wanted]
    rows = max(batch.labels.numel() for batch in run.batches)
    size = max(64, _CHUNK // max(rows, stream.embedding.embedding_dim))
    alone, both = ids[~also_embedded[ids]], ids[also_embedded[ids]]
    chunks = [c for c in (*alone.split(size), *both.split(min(size, _NARROW))) if len(c)]
    parts = [Part((stream.head_name,), _as_range(chunk)) for chunk in chunks]
    run.plan(parts)
    for chunk, part in zip(chunks, parts, strict=True):
        with run.resident(part):
            weight = stream.head.weight.detach()
            score = None if full is None else torch.zeros(weight.shape, device=stream.device)
            for number, inputs, grads, segments in run.readout.head_gradients(weight, chunk):
                if also_embedded[chunk[0]]:
                    inputs, grads, segments = _with_embedding(
                        run, number, chunk, inputs, grads, segments
                    )
                ops.linear_sensitivity_(score, weight, inputs, grads, segments, sums=sums)
            if sums.nonfinite:
                _blame_head(run, chunk)
            if score is not None:
                full[stream.head_name][chunk] = score / run.readout.scale
    sums.scale_(1 / run.readout.scale)


def _as_range(ids: torch.Tensor) -> slice | torch.Tensor:
    """Ascending row numbers, as a slice where none is left out: it is read without a copy."""
    start, stop = int(ids[0]), int(ids[-1]) + 1
    return slice(start, stop) if stop - start == len(ids) else ids


def _with_embedding(run: Pass, number: int, chunk: torch.Tensor, inputs, grads, segments):
    """Append the embedding's gradient to each sample's rows.

    A row (dE_v, one-hot v) adds dE_v to row v of that sample's head gradient, before the |.|.
    """
    column = torch.full((run.stream.anatomy.vocab_size,), -1, device=chunk.device)
    column[chunk] = torch.arange(len(chunk), device=chunk.device)
    parts, offsets = [], [0]
    for row in range(len(run.batches[number].ids)):
        own = slice(int(segments[row]), int(segments[row + 1]))
        here = column[run.store.get("tied ids", (number, row))]
        values = run.store.get("tied", (number, row))[here >= 0]
        onehot = torch.zeros(len(values), len(chunk), dtype=grads.dtype, device=grads.device)
        onehot[torch.arange(len(values)), here[here >= 0]] = 1
        parts.append((inputs[own], grads[own]))
        parts.append(((values * run.readout.scale).to(inputs.dtype), onehot))
        offsets.append(offsets[-1] + len(inputs[own]) + len(values))
    x, g = (torch.cat(p) for p in zip(*parts, strict=True))
    return x, g, torch.tensor(offsets, device=segments.device)


def _blame_head(run: Pass, chunk: torch.Tensor) -> None:
    """Name the weight or the sample that makes a chunk's scores NaN or infinite."""
    stream, guilty = run.stream, None
    for number, inputs, grads, segments in run.readout.head_gradients(stream.head.weight, chunk):
        bad = ~(torch.isfinite(inputs).all(1) & torch.isfinite(grads).all(1))
        if bad.any():
            position = int(bad.nonzero()[0])
            row = int(torch.searchsorted(segments, position, right=True)) - 1
            guilty = run.batches[number].ids[row]
            break
    name = stream.head_name
    raise stream.not_finite(guilty, "the head", [name], f"scores of parameter {name}")
