# SPDX-License-Identifier: Apache-2.0
"""What training a student's adapter takes, before a weight is read.

Models of one and of two blocks, with their adapters, run forward, loss and backward on fake tensors
(see streaming.footprint) with micro-batches of one and of two rows; further blocks and rows add
what the second one added. Weights, adapter and AdamW's moments are counted.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pkt_ext.adapter import Factor, matrix_shape
from pkt_ext.baselines import targets
from pkt_ext.heap import give_back_freed_memory
from pkt_ext.models.anatomy import describe
from pkt_ext.streaming.footprint import Tracker, count_flops
from pkt_ext.streaming.meter import resident_bytes
from pkt_ext.streaming.needs import CONTEXT, SLACK

TRAINER = 44 * 2**20  # CPU: transformers' Trainer, where it is still to be imported


@dataclass(frozen=True)
class TrainingPlan:
    """How a student is to be trained."""

    config: object  # the student's transformers configuration
    targets: Mapping[str, int]  # module path -> rank of its adapter
    length: int  # tokens of the longest row
    dtype: torch.dtype
    device: str  # "cpu" or "cuda", which need not be here
    frozen: bool  # a frozen half lies beside each adapter: a Seeking start
    dropout: float
    checkpointing: bool
    weights: int  # bytes that the student's take; none where they are mapped, or there already


class TrainingNeeds:
    """Bytes by ingredient, for any micro-batch.

    On a CPU freed memory goes back to the system from here on (see `heap`).
    """

    def __init__(self, plan: TrainingPlan):
        if plan.device == "cpu":
            give_back_freed_memory()
        self.plan = plan
        layers = plan.config.num_hidden_layers
        stride = block_stride(plan.config)
        few, many = min(stride, layers), min(2 * stride, layers)
        one, two = ([_step(plan, n, rows)[0] for rows in (1, 2)] for n in (few, many))
        more = (layers - few) / (many - few) if layers > few else 0
        whole = [a + (b - a) * more for a, b in zip(one, two, strict=True)]
        self._each = whole[1] - whole[0]  # of one row
        self._fixed = whole[0] - self._each
        model = on_meta(plan.config, plan.dtype, layers)
        shapes = {path: matrix_shape(model.get_submodule(path)) for path in plan.targets}
        self.adapter_parameters = sum(r * sum(shapes[path]) for path, r in plan.targets.items())
        flops = [_step(plan, n, 1, flops=True)[1] for n in (few, many)]
        self.flops_per_row = int(flops[0] + (flops[1] - flops[0]) * more)
        # what measuring has loaded is there from now on
        self.process = CONTEXT
        if plan.device == "cpu":
            self.process = resident_bytes() + SLACK
            if "transformers.trainer" not in sys.modules:
                self.process += TRAINER

    def predict(self, micro_batch: int) -> dict[str, int]:
        """Ingredient -> bytes; the peak is their sum."""
        halves = 2 if self.plan.frozen else 1
        return {
            "process": self.process,
            "weights": self.plan.weights,
            "adapter": 4 * self.adapter_parameters * halves,
            "optimizer": 8 * self.adapter_parameters,  # AdamW's two moments
            "activations and gradients": int(self._fixed + self._each * micro_batch),
        }

    def peak(self, micro_batch: int) -> int:
        """Bytes at most."""
        return sum(self.predict(micro_batch).values())

    def largest(self, sizes: Sequence[int], limit: int) -> int | None:
        """The first of these micro-batches that takes no more than `limit` bytes."""
        return next((size for size in sizes if self.peak(size) <= limit), None)


def needs_of(
    checkpoint,
    config,
    dtype: torch.dtype,
    device: str,
    *,
    length: int,
    ranks: Mapping[str, int] | None = None,
    frozen: bool = False,
    dropout: float | None = None,
) -> TrainingNeeds:
    """What training a student takes; no weight is read.

    Args:
        checkpoint: the student's `Checkpoint`, its headers at least.
        config:   the `FinetuneConfig`.
        dtype:    of a student that is not in memory yet.
        length:   tokens of the longest row.
        ranks:    {module path: rank} of an adapter that is there; None: a new one's.
        frozen:   it is a Seeking start (or PiSSA's): a frozen half goes with it.
        dropout:  of the adapter; None: a new one's.
    """
    dtype = checkpoint.dtype if checkpoint.folder is None else dtype
    skeleton = checkpoint.skeleton(dtype)
    parameters = dict(skeleton.named_parameters())
    if config.load_in_4bit:  # NF4: half a byte, and a twice quantised scale for 64 of them
        blocks = tuple(f"{path}." for path in describe(skeleton).blocks)
        weights = sum(
            int(0.516 * p.numel()) if n.startswith(blocks) and p.ndim == 2 else 2 * p.numel()
            for n, p in parameters.items()
        )
    else:
        weights = weight_bytes(checkpoint, parameters, dtype, device)
    return TrainingNeeds(
        TrainingPlan(
            config=checkpoint.config,
            targets=ranks or targets(skeleton, config),
            length=length,
            dtype=dtype,
            device=device,
            frozen=frozen,
            dropout=0.05 if dropout is None else dropout,
            checkpointing=config.gradient_checkpointing,
            weights=weights,
        )
    )


def weight_bytes(
    checkpoint, parameters: Mapping[str, torch.Tensor], dtype: torch.dtype, device: str
) -> int:
    """Bytes of a student's parameters on its device: none of those that are mapped or there."""
    return sum(
        parameter.numel() * dtype.itemsize
        for name, parameter in parameters.items()
        if not checkpoint.is_mapped(name, dtype, device)
    )


def on_meta(config, dtype: torch.dtype, layers: int):
    """A model of this transformers configuration on meta, cut off after some blocks."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def fake_device(device: str) -> str:
    """Where fake tensors lie that stand for some on a device which need not be here.

    torch cannot differentiate on a device that is not here; the tensors have the same sizes.
    """
    return device if device == "cpu" or torch.cuda.is_available() else "cpu"


def _step(plan: TrainingPlan, layers: int, rows: int, flops: bool = False) -> tuple[int, int]:
    """(peak bytes, operations) of one forward, loss and backward, weights and adapter aside."""
    student = on_meta(plan.config, plan.dtype, layers).train()
    model = with_adapters(student, plan.targets, plan.dropout)
    if plan.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    device = fake_device(plan.device)
    with FakeTensorMode():
        fill_with_fakes(model, device)
        ids = torch.zeros(rows, plan.length, dtype=torch.int64, device=device)
        mask = torch.ones_like(ids)
        half = plan.dtype != torch.float32 and not (
            plan.device == "cpu" and plan.dtype == torch.float16
        )
        watch = count_flops() if flops else Tracker([*model.parameters(), *model.buffers()])
        with watch, torch.autocast(device, dtype=plan.dtype if half else None, enabled=half):
            loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
            loss.backward()
    return (0, watch.get_total_flops()) if flops else (watch.peak, 0)


def with_adapters(student, ranks: Mapping[str, int], dropout: float):
    """A student on meta with LoRA on some of its modules, as a PeftModel.

    Args:
        ranks: module path -> rank; paths that the student does not have are passed over.
    """
    from pkt_ext.attached import plain_peft_model

    factors = {}
    for path, module in student.named_modules():
        if path not in ranks:
            continue
        out, size = matrix_shape(module)
        zero = torch.zeros(())
        if embedding := isinstance(module, torch.nn.Embedding):
            out, size = size, out
        rank = ranks[path]
        factors[path] = Factor(zero.expand(rank, size), zero.expand(out, rank), embedding)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copies to meta do nothing, as is meant
        return plain_peft_model(student, factors, dict.fromkeys(factors, 1.0), dropout)


def block_stride(config) -> int:
    """How many blocks are measured at a time: two, where blocks of two kinds take turns."""
    return 2 if len(set(getattr(config, "layer_types", None) or ())) > 1 else 1


def fill_with_fakes(model, device: str) -> None:
    """Give a model on meta fake parameters and buffers, in place."""
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                trained = parameter.requires_grad
                module._parameters[key] = torch.nn.Parameter(empty, requires_grad=trained)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
