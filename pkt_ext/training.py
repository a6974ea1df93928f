# SPDX-License-Identifier: Apache-2.0
"""One run of transformers' Trainer as our methods use it: quiet, in a scratch folder, watched."""

from __future__ import annotations

import logging
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pkt_ext.errors import NonFiniteError

log = logging.getLogger(__name__)

# keys of the Trainer's log -> what we report them as, one number a step
_REPORTED = {
    "loss": "losses",
    "layer_loss": "layer_losses",
    "output_loss": "output_losses",
    "learning_rate": "learning_rates",
}


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and in which portions to train: AdamW without weight decay."""

    steps: int  # optimiser steps
    learning_rate: float  # at its peak
    batch: int  # rows an optimiser step takes
    micro_batch: int  # rows at a time, a divisor of batch
    kind: str = "linear"  # of the rate: what transformers calls lr_scheduler_type
    warmup: float = 0.03  # share of the steps in which the rate rises
    seed: int = 1  # of the rows' order and of dropout
    gradient_checkpointing: bool = False  # by the model itself


def run_trainer(
    make: Callable,
    schedule: Schedule,
    *,
    dtype: torch.dtype,
    device: str,
    report: dict,
    progress: bool,
    what: str = "",
):
    """Train, and report the losses as they come.

    Nothing is saved: the Trainer's folder is a temporary one.

    Args:
        make:     TrainingArguments -> a Trainer.
        dtype:    of the model: bfloat16 and float16 (on CUDA, its loss scaled) mean autocast.
        device:   "cpu" or "cuda"; of several cards the first.
        report:   `losses` and `learning_rates` by step are put there from the start, `layer_losses`
            and `output_losses` where the Trainer logs them.
        progress: show a bar on a terminal, else ten lines in the log.
        what:     in front of those lines and of errors, as "block 3: ".
    Returns:
        the Trainer, trained.
    Raises:
        NonFiniteError: a loss or gradient that became NaN or infinite.
    """
    from transformers import TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    show = progress and sys.stderr.isatty()
    lines = progress and not show
    watch = _watch(schedule.steps, report, what, lines=lines, scaled=dtype == torch.float16)
    with tempfile.TemporaryDirectory(prefix="pkt_ext-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=schedule.micro_batch,
            gradient_accumulation_steps=schedule.batch // schedule.micro_batch,
            max_steps=schedule.steps,
            learning_rate=schedule.learning_rate,
            lr_scheduler_type=schedule.kind,
            warmup_steps=math.ceil(schedule.warmup * schedule.steps),
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16 and device == "cuda",
            gradient_checkpointing=schedule.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            seed=schedule.seed,
            use_cpu=device == "cpu",
            dataloader_pin_memory=device == "cuda",
            remove_unused_columns=False,
            label_names=["labels"],
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=not show,
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # one process, one card: DataParallel would split PEFT's layers
        trainer = make(arguments)
        trainer.add_callback(watch)
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        except NonFiniteError as error:
            raise NonFiniteError(f"{what}{error}") from error
    return trainer


def _watch(steps: int, report: dict, what: str, *, lines: bool, scaled: bool):
    """Collect the losses, print a line now and then, stop at the first NaN."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, *_, **__):
            report.update(losses=[], learning_rates=[])

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" not in logs:
                return
            # a loss scale of float16 makes gradients overflow now and then: that step is skipped
            for key in ("loss",) if scaled else ("loss", "grad_norm"):
                if not math.isfinite(logs.get(key, 0.0)):
                    raise NonFiniteError(
                        f"{key.replace('_', ' ')} is {logs[key]} at step {state.global_step}; "
                        "lower --learning-rate, or check the student's weights and --dtype"
                    )
            for key, name in _REPORTED.items():
                if key in logs:
                    report.setdefault(name, []).append(logs[key])
            if lines and state.global_step % max(1, steps // 10) == 0:
                log.info("%sstep %d of %d: loss %.4f", what, state.global_step, steps, logs["loss"])

    return Watch()
