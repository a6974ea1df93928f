# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a student's adapter with transformers' Trainer: from a Seeking start, from a plain LoRA
or PiSSA initialisation to compare with, or on from an adapter that is there.

Whatever it starts from, what it leaves is an ordinary adapter for the unmodified student.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from pkt_ext import artifact, data, lora
from pkt_ext.adapter import (
    AdapterConfig,
    Factor,
    read_adapter,
    read_ordinary,
    stores_transposed,
    write_adapter,
)
from pkt_ext.baselines import INITS, new_factors
from pkt_ext.errors import InputError, ResourceError
from pkt_ext.settings import DTYPES, check_choices, refuse_processes, trainer_device
from pkt_ext.streaming.budget import format_bytes, parse_bytes, smallest_that_works
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.meter import PeakMemory
from pkt_ext.training import Schedule, run_trainer

log = logging.getLogger(__name__)

_SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
_LARGEST_MICRO_BATCH = {"cpu": 8, "cuda": 16}  # where the search for one that fits begins


@dataclass(frozen=True)
class FinetuneConfig:
    """How to train. The defaults are the published ones (arXiv 2310.11451)."""

    epochs: float = 3  # passes over the data
    max_steps: int | None = None  # optimiser steps; None: as many as `epochs` take
    batch: int = 64  # rows an optimiser step averages over
    micro_batch: int | None = (
        None  # rows at a time, a divisor of batch; None: the largest that fits
    )
    learning_rate: float = 3e-4  # of AdamW, at its peak
    schedule: str = "linear"  # linear, cosine, constant or constant_with_warmup
    warmup: float = 0.03  # share of the steps in which the rate rises
    max_length: int = 2048  # tokens kept of a row
    prompt_format: str = "auto"  # auto, published, chat or plain: see data.encode
    init: str = "gaussian"  # without an adapter: gaussian or pissa
    rank: int = 16  # of a new adapter; one that is given keeps its own
    alpha: float = 16.0  # likewise
    dropout: float | None = None  # LoRA dropout; None: the given adapter's, else 0.05
    embeddings: bool = True  # a new adapter on embedding and head too, where they are not tied
    dtype: str | None = None  # of the student; None: bfloat16 (float16) on CUDA, float32 on the CPU
    load_in_4bit: bool = False  # keep the student in NF4 (needs bitsandbytes)
    gradient_checkpointing: bool = True  # recompute activations in the backward pass
    device: str = "auto"  # cpu, cuda or cuda:0; auto: cuda where there is one
    budget: str | None = None  # memory of the device, as 8GiB; None: what there is
    seed: int = 1  # of a new adapter, the order of the rows, and dropout
    student_revision: str | None = None  # branch, tag or commit of a hub id

    def __post_init__(self):
        for name in ("batch", "rank", "max_steps", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; give at least 1")
        for name in ("epochs", "learning_rate", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; give a positive number")
        for name in ("warmup", "dropout"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give 0 <= {name} < 1")
        if self.max_length < 2:
            raise InputError(f"max_length is {self.max_length}; give at least 2")
        if self.micro_batch and self.batch % self.micro_batch:
            raise InputError(
                f"micro_batch {self.micro_batch} does not divide batch {self.batch}; choose one "
                "that does"
            )
        if self.budget is not None:
            parse_bytes(self.budget)
        if not 0 <= self.seed < 2**32:  # numpy's range
            raise InputError(f"seed is {self.seed}; give 0 to {2**32 - 1}")
        check_choices(
            self,
            schedule=_SCHEDULES,
            init=INITS,
            dtype=(None, *DTYPES),
            prompt_format=data.PROMPT_FORMATS,
        )


def finetune(
    student,
    adapter: str | os.PathLike | None,
    data_rows,
    out: str | os.PathLike,
    config: FinetuneConfig | None = None,
    *,
    tokenizer=None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict:
    """Train an adapter for `student` on chat rows and publish it as the folder `out`.

    Args:
        student: a folder, a hub id, or a loaded PreTrainedModel, which is used in its own dtype
            and is afterwards what it was.
        adapter: a Seeking start (kind `init`), an ordinary adapter to train on (ours or PEFT's), or
            None for a new one by `config.init`.
        data_rows: a JSON-lines file of rows, or the rows; see `data.read_rows`.
        out: the folder to make (kind `adapter`).
        tokenizer: the student's, where `student` is a loaded model that has none on disk.
        overwrite: replace a complete output of an earlier run.
        progress: show the Trainer's progress bar (on a terminal only).
    Returns:
        What report.json holds: `losses` and `learning_rates` by step, `seconds`, `samples`,
        `dropped`, `truncated`, `example`, `micro_batch`, `trainable_parameters`, `peak_bytes`, ...
    Raises:
        InputError: inputs that do not work; a budget too small for one row at a time; a loss or
            gradient that became NaN or infinite.
        OutputBusyError: see `artifact.publish`.
        ResourceError: disk full, or memory short with one row at a time.
    """
    config = config or FinetuneConfig()
    refuse_processes(
        "pkt finetune", "under torchrun use lora.attach with a Trainer (docs/training.md)"
    )
    start = time.perf_counter()
    device = trainer_device(config.device).type
    factors, given, source_run, frozen = _read(adapter)
    encoded, name = _encode(student, data_rows, tokenizer, config)
    sizes, predicted = _sizes(student, factors, given, frozen, encoded, config, device)
    run = {
        "paradigm": source_run.get("paradigm", None if adapter else "baseline"),
        "config": asdict(config),
        "inputs": {
            "student": artifact.fingerprint(name),
            "adapter": artifact.fingerprint(adapter) if adapter else None,
            "data": artifact.fingerprint(data_rows)
            if isinstance(data_rows, str | os.PathLike)
            else {"rows": len(encoded.samples) + len(encoded.dropped)},
        },
    }
    report: dict = {
        "init": source_run.get("method", "adapter") if adapter else config.init,
        "samples": len(encoded.samples),
        "dropped": [{"id": row, "reason": reason} for row, reason in encoded.dropped],
        "truncated": encoded.truncated,
        "example": encoded.example,
        "device": device,
        "budget": config.budget and parse_bytes(config.budget),
        "predicted_bytes": predicted,
    }
    card = lora.adapter_card(name, asdict(config))
    with (
        artifact.publish(
            out, kind="adapter", run=run, report=report, card=card, overwrite=overwrite
        ) as folder,
        PeakMemory(torch.device(device)) as memory,
        _loaded(student, config, device) as model,
    ):
        _check_ids(encoded, model)
        if factors is None:
            factors, given, frozen = new_factors(model, config)
        dropout = given.dropout if config.dropout is None else config.dropout
        prepared = time.perf_counter()

        def build():
            return lora.attach_factors(model, factors, given.scale, dropout=dropout, frozen=frozen)

        trained, scales = _train(
            build, model, encoded, config, device, report, progress, sizes=sizes
        )
        report["peak_bytes"] = memory.bytes
        report["seconds"] = {
            "prepare": prepared - start,
            "train": time.perf_counter() - prepared,
        }
        write_adapter(
            folder,
            trained,
            alpha_over_rank=scales,
            dropout=dropout,
            base_model=name,
            fan_in_fan_out=stores_transposed(model),
        )
    return report


# --- what goes in ---------------------------------------------------------------------------------


def _read(adapter) -> tuple[dict[str, Factor] | None, AdapterConfig | None, dict, bool]:
    """(factors, configuration, run record, whether a frozen minus half belongs beside them)."""
    if adapter is None:
        return None, None, {}, False
    if artifact.is_published(adapter) and artifact.read(adapter)["kind"] == "init":
        return *read_adapter(os.path.join(adapter, "start")), artifact.read(adapter), True
    return *read_ordinary(adapter), False


def _encode(student, rows, tokenizer, config: FinetuneConfig) -> tuple[data.Encoded, str]:
    if isinstance(student, str | os.PathLike):
        checkpoint = Checkpoint.open(student, revision=config.student_revision)
        tokenizer, name = tokenizer or checkpoint.tokenizer(), checkpoint.name
    else:
        name = student.name_or_path
        tokenizer = tokenizer or Checkpoint.open(student).tokenizer()
    encoded = data.encode(
        data.read_rows(rows),
        tokenizer,
        max_length=config.max_length,
        prompt_format=config.prompt_format,
        stage="train",
    )
    if encoded.dropped:
        log.warning(encoded.left_out())
    return encoded, name


def _check_ids(encoded: data.Encoded, model) -> None:
    rows = model.get_input_embeddings().num_embeddings
    for sample in encoded.samples:
        if (largest := int(sample.input_ids.max())) >= rows:
            raise InputError(
                f"row {sample.id} has token {largest}, the student knows {rows}; the tokenizer is "
                "of another model"
            )


@contextmanager
def _loaded(student, config: FinetuneConfig, device: str):
    """The student in memory; one that was already there is given back as it was."""
    if isinstance(student, str | os.PathLike):
        yield lora.load_student(student, **_loading(config, device))
        return
    if config.load_in_4bit:
        raise InputError("load_in_4bit needs the student's folder or hub id, not a loaded model")
    flags = {parameter: parameter.requires_grad for parameter in student.parameters()}
    mode, place, cache = student.training, student.device, student.config.use_cache
    checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in student.modules())
    try:
        yield student
    finally:
        if config.gradient_checkpointing and not checkpointing:
            student.gradient_checkpointing_disable()
        student.config.use_cache = cache
        student.train(mode).to(place)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def training_dtype(config: FinetuneConfig, device: str) -> torch.dtype:
    """What a student that is not in memory yet is loaded as."""
    if config.dtype:
        return getattr(torch, config.dtype)
    if device == "cuda":
        old = torch.cuda.is_available() and not torch.cuda.is_bf16_supported()
        return torch.float16 if old else torch.bfloat16
    return torch.float32


def _loading(config: FinetuneConfig, device: str) -> dict:
    dtype = training_dtype(config, device)
    arguments = {"dtype": dtype, "revision": config.student_revision or "main"}
    if config.load_in_4bit:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise InputError("load_in_4bit needs bitsandbytes: pip install 'pkt_ext[quant]'")
        if config.init == "pissa":
            raise InputError(
                "init pissa needs the student's full weights; leave --load-in-4bit out"
            )
        from transformers import BitsAndBytesConfig

        arguments["device_map"] = {"": device}
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return arguments


# --- the training itself --------------------------------------------------------------------------


def micro_batches(config: FinetuneConfig, device: str) -> list[int]:
    """Micro-batches to choose from, the largest first: divisors of the batch."""
    largest = config.micro_batch or _LARGEST_MICRO_BATCH[device]
    return [n for n in range(largest, 0, -1) if config.batch % n == 0]


def _sizes(
    student, factors, given, frozen, encoded, config, device
) -> tuple[list[int], int | None]:
    """(micro-batches to try, the largest first; bytes predicted of it where there is a budget)."""
    sizes = micro_batches(config, device)
    if config.budget is None:
        return [config.micro_batch] if config.micro_batch else sizes, None
    from pkt_ext.training_needs import needs_of

    needs = needs_of(
        Checkpoint.open(student, revision=config.student_revision),
        config,
        training_dtype(config, device),
        device,
        length=max(len(sample.input_ids) for sample in encoded.samples),
        ranks=factors and {path: factor.rank for path, factor in factors.items()},
        frozen=frozen or (factors is None and config.init == "pissa"),
        dropout=given.dropout if given and config.dropout is None else config.dropout,
    )
    limit = parse_bytes(config.budget)
    if size := needs.largest(sizes, limit):
        return [size], needs.peak(size)
    raise InputError(
        f"{format_bytes(limit)} of memory is too little to train in; the smallest --budget that "
        f"works is {smallest_that_works(needs.peak(1))}; a lower --max-length takes less"
    )


def _train(build, student, encoded, config, device, report, progress, *, sizes: list[int]):
    """Train with the first of these micro-batches that fits; (factors, scales) of an adapter."""
    from accelerate.utils import find_executable_batch_size

    sizes = iter(sizes)

    @find_executable_batch_size(
        starting_batch_size=next(sizes), reduce_batch_size_fn=lambda: next(sizes, 0)
    )
    def attempt(micro_batch):
        from transformers import set_seed

        from pkt_ext.attached import detach, ordinary_factors

        set_seed(config.seed)
        try:
            model = build()
            _run_trainer(model, encoded, config, micro_batch, device, report, progress)
            factors, scales, _ = ordinary_factors(model)
            return factors, scales
        finally:
            detach(student)

    try:
        return attempt()
    except RuntimeError as error:
        if "No executable batch size found" not in str(error):
            raise
        raise ResourceError(
            "out of memory with the smallest micro-batch; lower --max-length or --rank, or use "
            "--gradient-checkpointing or --load-in-4bit"
        ) from error


def _run_trainer(model, encoded, config, micro_batch, device, report, progress) -> None:
    from transformers import Trainer

    samples = [{"input_ids": s.input_ids, "labels": s.labels} for s in encoded.samples]
    accumulation = config.batch // micro_batch
    steps_per_epoch = math.ceil(math.ceil(len(samples) / micro_batch) / accumulation)
    dtype = model.get_base_model().dtype
    schedule = Schedule(
        steps=config.max_steps or math.ceil(config.epochs * steps_per_epoch),
        learning_rate=config.learning_rate,
        batch=config.batch,
        micro_batch=micro_batch,
        kind=config.schedule,
        warmup=config.warmup,
        seed=config.seed,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    trainer = run_trainer(
        lambda arguments: Trainer(model, arguments, train_dataset=samples, data_collator=_pad),
        schedule,
        dtype=dtype,
        device=device,
        report=report,
        progress=progress,
    )
    report.update(
        steps=trainer.state.global_step,
        micro_batch=micro_batch,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        dtype=str(dtype).removeprefix("torch."),
    )


def _pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Right-pad to [B, T]; what pads is masked, so its token id does not matter."""
    ids = [row["input_ids"] for row in rows]
    mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    labels = [row["labels"] for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": mask,
        "labels": pad_sequence(labels, batch_first=True, padding_value=data.IGNORED),
    }
