# SPDX-License-Identifier: Apache-2.0
"""Contests of the streamed pass: forward and backward to the first hidden states, no scoring."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pkt_ext.bench.contest import Contest, Contestant, Verdict, Work
from pkt_ext.streaming.batches import Sample
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import Allotment
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.passes import Pass

_RATIO = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest gradient, between two orders


@dataclass(frozen=True)
class Streamed:
    """A pass over B rows of T tokens through a Llama of random weights."""

    name: str
    hidden: int
    intermediate: int
    blocks: int
    vocab: int
    batch: int
    tokens: int
    dtype: torch.dtype = torch.float32

    op = "pass"

    @property
    def shape(self) -> str:
        """The problem in words."""
        model = f"{self.blocks} blocks of {self.hidden}/{self.intermediate}"
        return f"{model}, {self.vocab} tokens, {self.batch} x {self.tokens}"

    def arithmetic(self, device_type: str) -> torch.dtype:
        """What the ceiling of matrix products is taken in."""
        return self.dtype

    def work(self) -> Work:
        """Blocks: forward twice and one backward, no weight gradients; head: once each.

        Bytes are those of the weights, brought in twice.
        """
        block = self.hidden * (4 * self.hidden + 3 * self.intermediate)
        head = self.hidden * self.vocab
        rows = self.batch * self.tokens
        flops = 2.0 * rows * (3 * self.blocks * block + 2 * head)
        return Work(flops, 2.0 * self.dtype.itemsize * (self.blocks * block + head))

    def contest(self, device: torch.device) -> Contest:
        """Make the model and name the contestants."""
        model = self._model(device)
        folder = tempfile.TemporaryDirectory(prefix="pkt_ext-")
        model.save_pretrained(folder.name)
        ids = torch.randint(0, self.vocab, (self.batch, self.tokens), device=device)
        truth = _plain(model, ids, checkpointing=False)
        largest = float(truth.abs().max())

        def check(found: torch.Tensor) -> Verdict:
            return Verdict(float((found - truth).abs().max()) / largest, _RATIO[self.dtype])

        held = StreamedModel(Checkpoint.open(model), device=device)

        def streamed(ids: torch.Tensor) -> torch.Tensor:
            # the folder lives as long as this function
            file = StreamedModel(Checkpoint.open(folder.name), dtype=self.dtype, device=device)
            return _streamed(file, ids, Allotment(self.batch))

        work = self.work()
        return Contest(
            [(ids,)],
            [
                Contestant("ours", "ours", lambda ids: _streamed(held, ids), check, work),
                Contestant("ours, a block at a time from files", "other", streamed, check, work),
                Contestant(
                    "row by row, every weight's gradient",
                    "published",
                    lambda ids: _row_by_row(model, ids),
                    check,
                    work,
                ),
                Contestant(
                    "transformers, gradient checkpointing",
                    "torch",
                    lambda ids: _plain(model, ids, checkpointing=True),
                    check,
                    work,
                ),
                Contestant(
                    "transformers, every activation kept",
                    "light",
                    lambda ids: _plain(model, ids, checkpointing=False),
                    check,
                    work,
                ),
            ],
        )

    def _model(self, device: torch.device) -> LlamaForCausalLM:
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.hidden // 64,
            vocab_size=self.vocab,
            max_position_embeddings=self.tokens,
            tie_word_embeddings=False,
            use_cache=False,
        )
        torch.manual_seed(0)
        with torch.device(device):
            model = LlamaForCausalLM(config).to(self.dtype)
        return model.train().requires_grad_(False)  # checkpointing takes place in training only


def _streamed(
    model: StreamedModel, ids: torch.Tensor, allotment: Allotment | None = None
) -> torch.Tensor:
    samples = [Sample(str(number), row, row) for number, row in enumerate(ids.cpu())]
    batches = model.batches(samples, len(ids))
    with Pass(model, batches, allotment=allotment, show=False) as run:
        run.run()
        return run.first_gradient(0)[:, : ids.shape[1]]


def _plain(model, ids: torch.Tensor, *, checkpointing: bool) -> torch.Tensor:
    """Gradient of the sum of the rows' mean losses by the first hidden states."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    first = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = len(ids) * model(inputs_embeds=first, labels=ids).loss
    loss.backward()
    return first.grad


def _row_by_row(model, ids: torch.Tensor) -> torch.Tensor:
    model.requires_grad_(True)
    try:
        found = []
        for row in ids:
            found.append(_plain(model, row[None], checkpointing=False))
            model.zero_grad()
        return torch.cat(found)
    finally:
        model.requires_grad_(False)
