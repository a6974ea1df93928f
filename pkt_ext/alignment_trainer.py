# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer for an `objectives.Objective`: a student towards a teacher's hidden states.

The data are items, one for each sequence, of tensors on the CPU:

    input_ids  int64 [T]
    positions  int64 [m], the supervised positions: those whose next token carries loss
    labels     int64 [m], the tokens at positions + 1
    layer      [m, D], mapped teacher states for the block
    output     [m, D_t], what the teacher's head is given, behind its final norm
    hidden     [T, D_s], what the block is given, where that is cached
    layer_positions  int64 [n], where the layer loss looks, one row of `layer` each

The last five may be None or absent where nothing needs them; without `layer_positions` the layer
loss looks at the supervised ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from transformers import Trainer

from pkt_ext.errors import InputError, NonFiniteError
from pkt_ext.models.anatomy import Anatomy, describe
from pkt_ext.models.frontier import Activations, activations, check_block, padded, unwrapped
from pkt_ext.objectives import Counts, Objective
from pkt_ext.training import Schedule, run_trainer
from pkt_ext.training_needs import on_meta

_HALF = (torch.bfloat16, torch.float16)


def collate(items: Sequence[Mapping]) -> dict[str, torch.Tensor | None]:
    """Items as one batch of B sequences with M supervised rows.

    Returns:
        `input_ids` int64 [B, T], right-padded; `rows` int64 [M], b T + t of each supervised row;
        `segments` int64 [B + 1], where each sequence's rows begin; `layer_rows` and
        `layer_segments`, the same of the rows that the layer loss looks at; `labels` [M], `layer`
        [M', D], `output` [M, D_t] and `hidden` [B, T, D_s], or None.
    Raises:
        InputError: items that do not fit each other or themselves.
    """
    input_ids, hidden = padded(items)
    positions = [_positions(item, "positions") for item in items]
    layer_positions = [
        own if item.get("layer_positions") is None else _positions(item, "layer_positions")
        for item, own in zip(items, positions, strict=True)
    ]
    rows, segments = _flat(positions, input_ids.shape[1])
    layer_rows, layer_segments = _flat(layer_positions, input_ids.shape[1])
    return {
        "input_ids": input_ids,
        "rows": rows,
        "segments": segments,
        "layer_rows": layer_rows,
        "layer_segments": layer_segments,
        "hidden": hidden,
        "labels": _joined(items, positions, "labels", torch.int64),
        "layer": _joined(items, layer_positions, "layer"),
        "output": _joined(items, positions, "output"),
    }


def _positions(item: Mapping, name: str) -> torch.Tensor:
    found = torch.as_tensor(item[name], dtype=torch.int64)
    if len(found) and not 0 <= found.min() <= found.max() < len(item["input_ids"]):
        raise InputError(
            f"a supervised position lies outside of its {len(item['input_ids'])} tokens"
        )
    return found


def _flat(positions: Sequence[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of the flattened batch, where each sequence's begin)."""
    counts = torch.tensor([0, *map(len, positions)])
    rows = torch.cat([length * b + wanted for b, wanted in enumerate(positions)])
    return rows, counts.cumsum(0)


def _joined(items, positions, name: str, dtype=None) -> torch.Tensor | None:
    values = [item.get(name) for item in items]
    if all(value is None for value in values):
        return None
    for value, wanted in zip(values, positions, strict=True):
        if value is None or len(value) != len(wanted):
            raise InputError(f"every item needs a row of {name!r} for each position, or none does")
    return torch.cat([torch.as_tensor(value, dtype=dtype) for value in values])


class AlignmentTrainer(Trainer):
    """Trains what requires grad in a student on an Objective.

    Losses are means over a whole optimiser step, however it is cut into micro-batches: every
    supervised row counts alike (RelationGeometry: every sequence). `layer_loss` and `output_loss`
    are logged beside `loss`, and `evaluate` gives the three as means over all of its data. There
    are no predictions, so `compute_metrics` is not called.

    Everything but the dropout of adapters is in eval mode, as the targets are those of a student
    without noise. A half-precision student runs in autocast of its own dtype, any other in that of
    `bf16` or `fp16` where `args` say so; losses are float32. One process and one device.

    Args:
        model: a causal language model, or a PeftModel around one. Its head, embedding and final
            norm have to be frozen: the objective refers to them as they are.
        args: TrainingArguments; `remove_unused_columns` is switched off.
        objective: with a layer loss it needs a `block`.
        block: from 0, the one that the layer loss looks at. Where the items have its `hidden`, the
            blocks before it do not run.
        anatomy: of the student before anything was attached to it; None: found out.
        recompute: compute blocks anew in the backward pass; stands in for `gradient_checkpointing`
            of `args`, which has no effect on modules in eval mode and is refused.
        **options: of Trainer: `train_dataset`, `eval_dataset`, ...; the collator is `collate`.
    Raises:
        InputError: nothing to train, something trained that has to be frozen, several processes.
        NonFiniteError: at any step, a loss that is NaN or infinite; says which.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the counts of the whole step

    def __init__(
        self,
        model,
        args,
        *,
        objective: Objective,
        block: int | None = None,
        anatomy: Anatomy | None = None,
        recompute: bool = False,
        **options,
    ):
        if objective.layer_loss is not None and block is None:
            raise InputError("a layer loss needs the number of its block")
        if args.gradient_checkpointing:
            raise InputError("use recompute=True of AlignmentTrainer for gradient checkpointing")
        if args.world_size > 1:
            raise InputError("AlignmentTrainer runs in one process; start it without a launcher")
        args.remove_unused_columns = False  # the targets are no arguments of the model
        args._n_gpu = min(args.n_gpu, 1)  # DataParallel would call the whole model
        self.objective, self.block, self.recompute = objective, block, recompute
        self.anatomy = anatomy or _anatomy(model)
        check_block(self.anatomy, block)
        self._before = _trained_before(model, self.anatomy, block or 0)
        self._steps, self._parts = 0, {}  # since the log's last line
        self._evaluated: list[tuple[Counts, dict]] = []
        super().__init__(model, args, **({"data_collator": collate} | options))
        self.model_accepts_loss_kwargs = True  # older versions know loss_is_scaled_for_ga by this

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """A step's micro-batches, all on the device at once, and what its losses are means over."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._steps += 1
        return batches, _total([self.objective.counts(batch) for batch in batches])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A micro-batch's share of the step's loss, float32; `num_items_in_batch` are Counts."""
        training = model.training
        if training:
            adapters_alone_random(model)
        loss, parts, found = self._loss(inputs, num_items_in_batch)
        if training:
            for name, part in parts.items():
                self._parts[name] = self._parts.get(name, 0.0) + part
        return (loss, found) if return_outputs else loss

    def log(self, logs, *args, **options):
        """The Trainer's, with the objective's parts beside its loss."""
        if "loss" in logs and self._steps:
            logs |= {name: part.item() / self._steps for name, part in self._parts.items()}
            self._steps, self._parts = 0, {}
        super().log(logs, *args, **options)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(the loss of a batch, None, None)."""
        inputs = self._prepare_inputs(inputs)
        counts = self.objective.counts(inputs)
        with torch.no_grad():
            loss, parts, _ = self._loss(inputs, counts)
        self._evaluated.append((counts, parts))
        return loss, None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **options):
        """The Trainer's, with means over all of the data instead of means of batches."""
        self._evaluated = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        for name, value in self._means().items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def _means(self) -> dict[str, float]:
        every = _total([counts for counts, _ in self._evaluated])
        found = {}
        for name, of in (("layer_loss", "layer"), ("output_loss", "output")):
            sums = [
                parts[name].item() * getattr(counts, of)
                for counts, parts in self._evaluated
                if name in parts
            ]
            if sums:
                found[name] = sum(sums) / max(1, getattr(every, of))
        return found | {"loss": self.objective.total(found)}

    def _loss(self, inputs: dict, counts: Counts | None):
        """(loss, its parts, Activations)."""
        hidden = inputs["hidden"]
        if hidden is not None and self._before:
            raise InputError(
                f"{self._before[0]} cannot be trained: it lies before block {self.block}, whose "
                "input is cached"
            )
        with self._autocast():
            found = activations(
                self.model,  # which a launcher's process, be it the only one, is given wrapped
                self.anatomy,
                inputs["input_ids"],
                self.block,
                hidden,
                outputs=self.objective.output_loss is not None,
                recompute=self.recompute and torch.is_grad_enabled(),
            )
        try:
            loss, parts = self.objective(inputs, **supervised(found, inputs), counts=counts)
        except NonFiniteError as error:
            raise NonFiniteError(f"step {self.state.global_step + 1}: {error}") from error
        return loss, parts, found

    def _autocast(self):
        dtype = unwrapped(self.model).get_input_embeddings().weight.dtype
        if dtype not in _HALF:
            asked = {torch.bfloat16: self.args.bf16, torch.float16: self.args.fp16}
            dtype = next((dtype for dtype, given in asked.items() if given), dtype)
        half = dtype in _HALF
        return torch.autocast(self.args.device.type, dtype=dtype if half else None, enabled=half)


def train_phase(
    student,
    anatomy: Anatomy,
    dataset,
    objective: Objective,
    *,
    block: int | None,
    steps: int,
    learning_rate: float,
    batch: int,
    micro_batch: int,
    warmup: float = 0.03,
    seed: int = 1,
    device: str = "cpu",
    gradient_checkpointing: bool = False,
    progress: bool = True,
    what: str = "",
) -> dict[str, list[float]]:
    """Train what requires grad in a student for one phase, by AdamW and a linear schedule.

    Equal arguments give equal bits on a CPU. Parameters in half precision are trained in float32
    and rounded once, at the end. The student is left on the device, its modes as they were; nothing
    is written to disk.

    Args:
        student, anatomy, objective, block: see AlignmentTrainer.
        dataset: items, see the module; what `len` and `[]` work on.
        steps: optimiser steps.
        learning_rate: at its peak, after a share of `warmup` of the steps; then it falls to 0.
        batch: rows (items) of an optimiser step.
        micro_batch: items at a time, a divisor of `batch`.
        seed: of the items' order, and of adapters' dropout.
        device: "cpu" or "cuda", the first card.
        gradient_checkpointing: compute blocks anew in the backward pass.
        progress: a bar on a terminal, else ten lines in the log.
        what: in front of those lines, as "block 3: ".
    Returns:
        `losses` and `learning_rates` by step; `layer_losses` and `output_losses`, those there are.
    Raises:
        InputError: nothing to train, or anything that does not fit.
        NonFiniteError: a loss or gradient that became NaN or infinite.
    """
    if not len(dataset):
        raise InputError("there is nothing to train on; every row was left out")
    if steps < 1 or micro_batch < 1 or batch % micro_batch:
        raise InputError(
            f"{steps} steps of {batch} rows, {micro_batch} at a time; give at least 1 of each, and "
            "a micro-batch that divides the batch"
        )
    report: dict[str, list[float]] = {}

    def make(arguments):
        return AlignmentTrainer(
            student,
            arguments,
            objective=objective,
            block=block,
            anatomy=anatomy,
            recompute=gradient_checkpointing,
            train_dataset=dataset,
        )

    with _given_back(student), _trained_in_float32(student):
        run_trainer(
            make,
            Schedule(steps, learning_rate, batch, micro_batch, warmup=warmup, seed=seed),
            dtype=unwrapped(student).get_input_embeddings().weight.dtype,
            device=device,
            report=report,
            progress=progress,
            what=what,
        )
    return report


def _total(counts: Sequence[Counts]) -> Counts:
    return Counts(sum(count.layer for count in counts), sum(count.output for count in counts))


def supervised(
    found: Activations, batch: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor | None]:
    """The rows [M, D] of what passed the frontier that a collated batch's losses look at."""
    rows, layer_rows = batch["rows"], batch.get("layer_rows", batch["rows"])
    wanted = {"before": layer_rows, "after": layer_rows, "outputs": rows}
    return {
        name: None if states is None else states.flatten(0, 1).index_select(0, wanted[name])
        for name, states in vars(found).items()
    }


def adapters_alone_random(model) -> None:
    """Everything in eval mode but the dropout of adapters."""
    for name, module in model.named_modules():
        module.training = "lora_dropout" in name  # where PEFT's layers keep theirs


def _anatomy(model) -> Anatomy:
    """Of a student that adapters may be attached to already."""
    student = unwrapped(model)
    if not hasattr(student, "peft_config"):
        return describe(student)
    return describe(on_meta(student.config, student.dtype, student.config.num_hidden_layers))


def _trained_before(model, anatomy: Anatomy, block: int) -> list[str]:
    """Names of the parameters to train that lie in blocks before this one.

    Raises:
        InputError: there are none to train, or some in what has to be frozen.
    """
    student = unwrapped(model)
    trained = {p: name for name, p in student.named_parameters() if p.requires_grad}
    if not trained:
        raise InputError("there is nothing to train: no parameter of the student requires grad")
    for path in (anatomy.head, anatomy.embedding, anatomy.final_norm):
        for parameter in student.get_submodule(path).parameters() if path else ():
            if parameter in trained:
                raise InputError(f"{trained[parameter]} has to be frozen: losses are read from it")
    return [
        trained[parameter]
        for path in anatomy.blocks[:block]
        for parameter in student.get_submodule(path).parameters()
        if parameter in trained
    ]


@contextmanager
def _given_back(model) -> Iterator[None]:
    """Modes and the cache's setting as they were, and without what accelerate hangs on a model."""
    config = unwrapped(model).config
    modes, cache = {module: module.training for module in model.modules()}, config.use_cache
    own = dict(vars(model))
    try:
        yield
    finally:
        for name in vars(model).keys() - own.keys():
            del vars(model)[name]
        if "forward" in own:  # else accelerate's, which casts, was just taken off
            model.forward = own["forward"]
        config.use_cache = cache
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _trained_in_float32(model) -> Iterator[None]:
    """Parameters to train in float32: half precision would round small updates away."""
    half = {p: p.dtype for p in model.parameters() if p.requires_grad and p.dtype in _HALF}
    try:
        for parameter in half:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in half.items():
            parameter.grad = None  # of another dtype
            parameter.data = parameter.data.to(dtype)
