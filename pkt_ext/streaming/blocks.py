# SPDX-License-Identifier: Apache-2.0
"""A model whose weights come and go, one block at a time, and what its blocks are called with."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager

import torch
from torch import nn

from pkt_ext.errors import InputError, NonFiniteError
from pkt_ext.models.anatomy import Anatomy, describe
from pkt_ext.models.replaced import replaced
from pkt_ext.models.versions import long_rope
from pkt_ext.streaming.batches import Batch, check_samples, make_batches


class StreamedModel:
    """A causal language model whose weights come from a checkpoint, part by part.

    Args:
        checkpoint: a `streaming.checkpoint.Checkpoint`.
        dtype:      of weights and activations; None is the checkpoint's.
        device:     where the parts are brought.
    Attributes:
        model:   the transformers model, parameters on meta unless they are resident.
        anatomy: its parts.
        block_names, outer_names: parameter names of each block, and of all that is in no block.
    Raises:
        InputError: an unsupported architecture, or a checkpoint that does not fit it.
    """

    def __init__(
        self,
        checkpoint,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ):
        self.checkpoint = checkpoint
        self.dtype = dtype or checkpoint.dtype
        self.device = torch.device(device)
        self.model = checkpoint.skeleton(self.dtype).requires_grad_(False)
        self.anatomy = describe(self.model)
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        names: dict[int, str] = {}  # a tied parameter has one name and two places
        for path, module in self.model.named_modules():
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else buffer.to(self.device)
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    name = names.setdefault(id(parameter), f"{path}.{key}" if path else key)
                    self._places.setdefault(name, []).append((module, key))
        # dynamic rotary tables grow with what is run; these are the ones of a short text
        self._rotary = [
            (module, dict(module._buffers))
            for module in self.model.modules()
            if hasattr(module, "original_max_seq_len")
        ]
        self._meta = {n: getattr(m, k) for n, ((m, k), *_) in self._places.items()}
        self.block_names = tuple(
            tuple(n for n in self._places if n.startswith(f"{block}."))
            for block in self.anatomy.blocks
        )
        inside = {name for names in self.block_names for name in names}
        self.outer_names = tuple(n for n in self._places if n not in inside)
        self.embedding_name = names[id(self.embedding.weight)]
        self.head_name = names[id(self.head.weight)]

    @property
    def embedding(self) -> nn.Module:
        """The token embedding."""
        return self.model.get_submodule(self.anatomy.embedding)

    @property
    def head(self) -> nn.Module:
        """The language-model head."""
        return self.model.get_submodule(self.anatomy.head)

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder blocks, in order."""
        return [self.model.get_submodule(path) for path in self.anatomy.blocks]

    @property
    def first_names(self) -> tuple[str, ...]:
        """Parameters outside the blocks but for a head of its own: what embedding needs."""
        untied = () if self.anatomy.tied else (self.head_name,)
        return tuple(n for n in self.outer_names if n not in untied)

    @property
    def last_names(self) -> tuple[str, ...]:
        """Parameters outside the blocks but for an embedding of its own: what the loss needs."""
        untied = () if self.anatomy.tied else (self.embedding_name,)
        return tuple(n for n in self.outer_names if n not in untied)

    def fetch(self, names: Iterable[str], move=None) -> dict[str, torch.Tensor]:
        """Parameters by name, on the device, in this model's dtype; `move`: see `load`."""
        return self.checkpoint.load(tuple(names), self.dtype, self.device, move)

    def fetch_rows(self, name: str, index: slice | torch.Tensor, move=None) -> torch.Tensor:
        """Some rows of a matrix, [K, D], on the device, in this model's dtype."""
        return self.checkpoint.rows(name, index, self.dtype, self.device, move)

    @contextmanager
    def embedding_of(self, tokens: torch.Tensor, *, trainable: bool = False):
        """Let the model embed these tokens: their rows of the embedding and no others are brought.

        Args:
            tokens:    int64 [K], ascending; inside the context their numbers 0 .. K-1 stand for
                       them in `record`.
            trainable: let the parameters require grad.
        """
        tensors = self.fetch(n for n in self.first_names if n != self.embedding_name)
        tensors[self.embedding_name] = self.fetch_rows(self.embedding_name, tokens)
        table, padding = self.embedding, self.embedding.padding_idx
        if padding is not None:
            here = (tokens == padding).nonzero().flatten().tolist()
            table.padding_idx = here[0] if here else None
        try:
            with self.resident(tensors, trainable=trainable):
                yield
        finally:
            table.padding_idx = padding

    @contextmanager
    def resident(self, tensors: dict[str, torch.Tensor], *, trainable: bool = False):
        """Give the model these parameters; they leave it with the context.

        Args:
            tensors:   from `fetch`; emptied, so that the context holds the only reference.
            trainable: let them require grad.
        """
        names = tuple(tensors)
        try:
            for name in names:
                self._put(name, nn.Parameter(tensors.pop(name), requires_grad=trainable))
            yield
        finally:
            for name in names:
                self._put(name, self._meta[name])

    def parameters(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """The parameters as the model holds them now, on meta or resident."""
        return {n: self._places[n][0][0]._parameters[self._places[n][0][1]] for n in names}

    def not_finite(
        self, sample: str | None, where: str, names: Iterable[str], what: str
    ) -> NonFiniteError:
        """The error that says why something is NaN or infinite and what to do.

        Args:
            sample: its id; None where no single one is to blame.
            where:  the block, or the part of the model.
            names:  the parameters that may be to blame; those that are resident are looked at.
            what:   what is not finite.
        """
        who = "their sum" if sample is None else f"sample {sample!r}"
        for name, parameter in self.parameters(names).items():
            if not parameter.is_meta and not torch.isfinite(parameter).all():
                return NonFiniteError(
                    f"{where}: parameter {name} holds NaN or Inf (seen on {who}); the checkpoint "
                    "is damaged, download or convert it again"
                )
        return NonFiniteError(
            f"{where}: {who} gives NaN or Inf {what} in {self.dtype}; use dtype float32 or "
            "bfloat16, or leave the sample out (pkt seeking --nonfinite skip-sample)",
            sample,
        )

    def check(self, samples) -> None:
        """Refuse samples that `batches` would.

        Raises:
            InputError: one too long, ids out of range.
        """
        check_samples(samples, **_limits(self.model, self.anatomy))

    def batches(self, samples, micro_batch: int) -> list[Batch]:
        """`make_batches` within this model's vocabulary and positions."""
        return batches_for(self.model, self.anatomy, samples, micro_batch, self.device)

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        for module, key in self._places[name]:
            module._parameters[key] = parameter

    def replaced_blocks(self, forward):
        """Let `forward(index, hidden, args, kwargs)` stand for every block's forward."""
        return replaced(self.blocks, forward)

    def record(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, list[tuple[tuple, dict]]]:
        """What block 0 is given, and every block's other arguments, inside `embedding_of`.

        Args:
            input_ids: int64 [B, T], right-padded, as numbers of the embedding's resident rows. No
                mask: causality hides the padding.
        Returns:
            hidden states [B, T, D] and, by block, (args, kwargs).
        """
        count, first, calls = len(self.anatomy.blocks), [], []

        def recorder(index: int, hidden: torch.Tensor, args: tuple, kwargs: dict):
            first.append(hidden)
            if hidden.shape[:2] != input_ids.shape or kwargs.get("past_key_values") is not None:
                raise InputError(
                    f"{type(self.model).__name__} calls its blocks in a way that cannot be "
                    "streamed; install a transformers version from pkt_ext's constraints"
                )
            calls.append((args, kwargs))
            if index == count - 1:
                raise _Stop
            return hidden

        for module, buffers in self._rotary:  # no batch sees what a longer one has left behind
            module._buffers.update(buffers)
            module.max_seq_len_cached = module.original_max_seq_len
        with self.replaced_blocks(recorder):
            try:
                self.model(input_ids=input_ids, use_cache=False)
            except _Stop:
                return first[0], calls
        raise InputError(f"{type(self.model).__name__} does not run all of its blocks in order")


def batches_for(
    model, anatomy: Anatomy, samples, micro_batch: int, device: torch.device | str
) -> list[Batch]:
    """`make_batches` within a model's vocabulary and positions; `model` may be on meta."""
    return make_batches(
        samples,
        micro_batch,
        **_limits(model, anatomy),
        alone_above=long_rope(model.config),
        device=device,
    )


def _limits(model, anatomy: Anatomy) -> dict[str, int | None]:
    positions = None
    if anatomy.position_embedding:  # rotary models have no table to run out of
        positions = model.config.max_position_embeddings
    vocabulary = model.get_input_embeddings().num_embeddings
    return {"vocab_size": vocabulary, "max_positions": positions}


class _Stop(Exception):
    """Ends a recording after the last block."""
