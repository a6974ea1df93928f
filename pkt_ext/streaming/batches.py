# SPDX-License-Identifier: Apache-2.0
"""Samples -> right-padded micro-batches."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pkt_ext.errors import InputError

IGNORED = -100  # the label that carries no loss, as in transformers
ALIGNMENT = 16  # padded lengths are multiples of it: tensor-core tiles start at sample boundaries


@dataclass(frozen=True, eq=False)
class Sample:
    """One tokenised row."""

    id: str
    input_ids: torch.Tensor  # int64 [T]
    labels: torch.Tensor  # int64 [T], IGNORED where the loss does not look


@dataclass(frozen=True, eq=False)
class Batch:
    """A right-padded micro-batch of B samples, T tokens with the padding."""

    input_ids: torch.Tensor  # int64 [B, T]; padding repeats the sample's first token
    labels: torch.Tensor  # int64 [B, T], IGNORED where there is no loss and in the padding
    lengths: tuple[int, ...]  # tokens of each sample
    ids: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return tuple(self.input_ids.shape)

    @property
    def segments(self) -> torch.Tensor:
        """int64 [B + 1]: where each sample's rows start in the flattened [B * T, ...] batch."""
        size, length = self.shape
        return torch.arange(size + 1, device=self.input_ids.device) * length

    def targets(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample `index`'s (positions whose next token carries loss, those tokens): int64 [n]."""
        following = self.labels[index, 1 : self.lengths[index]]
        positions = (following != IGNORED).nonzero().squeeze(1)
        return positions, following[positions]


def make_batches(
    samples: Sequence[Sample],
    micro_batch: int,
    *,
    vocab_size: int,
    max_positions: int | None = None,
    alone_above: int | None = None,
    device: torch.device | str = "cpu",
) -> list[Batch]:
    """Group samples of like length, the longest first. A repeated id gets a number behind it.

    Args:
        micro_batch:   samples a batch holds at most.
        vocab_size:    ids at or above are refused.
        max_positions: the model's limit on T, if it has one.
        alone_above:   longer samples are neither padded nor batched (rotary tables that depend on
                       the length of the batch).
    Raises:
        InputError: no samples, an empty one, one without a target, one too long, ids out of range.
    """
    if micro_batch < 1:
        raise InputError(f"micro_batch is {micro_batch}; give at least 1")
    if not samples:
        raise InputError("there are no samples to run; give at least one")
    check_samples(samples, vocab_size, max_positions)
    # stable: equal inputs, equal batches
    ordered = sorted(with_distinct_ids(samples), key=lambda sample: -len(sample.input_ids))
    long = [s for s in ordered if alone_above and len(s.input_ids) > alone_above]
    rest = ordered[len(long) :]
    groups = [rest[i : i + micro_batch] for i in range(0, len(rest), micro_batch)]
    limit = min((n for n in (max_positions, alone_above) if n), default=None)
    return [_pad([sample], len(sample.input_ids), device) for sample in long] + [
        _pad(group, limit, device) for group in groups
    ]


def with_distinct_ids(samples: Sequence[Sample]) -> list[Sample]:
    """The samples in their order; an id that occurs again gets a number behind it."""
    seen: Counter[str] = Counter()
    named = []
    for sample in samples:
        name = str(sample.id)
        seen[name] += 1
        named.append(replace(sample, id=name if seen[name] == 1 else f"{name} ({seen[name]})"))
    return named


def digest(samples: Sequence[Sample]) -> str:
    """sha256 of the samples, their ids and order."""
    content = hashlib.sha256()
    for sample in samples:
        content.update(sample.id.encode())
        content.update(sample.input_ids.numpy().tobytes() + sample.labels.numpy().tobytes())
    return content.hexdigest()


def check_samples(
    samples: Sequence[Sample], vocab_size: int, max_positions: int | None = None
) -> None:
    """Arguments and errors: see `make_batches`."""
    for sample in samples:
        _check(sample, vocab_size, max_positions)


def _check(sample: Sample, vocab_size: int, max_positions: int | None) -> None:
    ids, labels = sample.input_ids, sample.labels
    where = f"sample {sample.id!r}"
    if ids.ndim != 1 or ids.shape != labels.shape:
        shapes = f"{list(ids.shape)} and {list(labels.shape)}"
        raise InputError(f"{where}: input_ids and labels are {shapes}; give both as [T]")
    if max_positions and len(ids) > max_positions:
        raise InputError(
            f"{where}: {len(ids)} tokens, the model has {max_positions} positions; "
            "lower the maximum length"
        )
    if not (labels[1:] != IGNORED).any():
        raise InputError(f"{where}: no token to predict; drop it, or keep more of its tokens")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size or int(labels.max()) >= vocab_size:
        raise InputError(
            f"{where}: a token id lies outside the model's vocabulary of {vocab_size}; "
            "use the model's own tokenizer"
        )


def _pad(samples: Sequence[Sample], limit: int | None, device) -> Batch:
    lengths = tuple(len(sample.input_ids) for sample in samples)
    length = -(-max(lengths) // ALIGNMENT) * ALIGNMENT
    if limit:
        length = min(length, limit)
    # a token of the sample itself: nothing but its own rows of the embedding is ever read
    input_ids = torch.stack([sample.input_ids[:1].expand(length) for sample in samples])
    labels = torch.full((len(samples), length), IGNORED)
    for row, sample in enumerate(samples):
        input_ids[row, : lengths[row]] = sample.input_ids
        labels[row, : lengths[row]] = sample.labels
    names = tuple(sample.id for sample in samples)
    return Batch(input_ids.to(device), labels.to(device), lengths, names)
