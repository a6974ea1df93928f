# SPDX-License-Identifier: Apache-2.0
"""A student that is trained through: whether its weights let gradients pass, and it in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pkt_ext.errors import InputError
from pkt_ext.lora import load_student
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.training_needs import weight_bytes


def check_gradients(student: StreamedModel, device: torch.device) -> None:
    """Now rather than after hours of passes over both models.

    Raises:
        InputError: a student whose quantised weights give no gradients on this device.
    """
    kind = student.checkpoint.quantisation
    if kind is not None and kind.bits == 4 and device.type == "cpu":
        raise InputError(
            f"{student.checkpoint.name}: its weights are quantised ({kind}), and through those no "
            "gradient passes on a CPU; use the unquantised student, or --device cuda"
        )


def dtype_in_memory(stream: StreamedModel) -> torch.dtype:
    """Of the student that `in_memory` gives."""
    checkpoint = stream.checkpoint
    return checkpoint.dtype if checkpoint.folder is None else stream.dtype


def bytes_in_memory(stream: StreamedModel, device: str) -> int:
    """Of its weights there: none of those that are mapped or in memory already.

    Args:
        device: "cpu" or "cuda", which need not be here.
    """
    checkpoint, parameters = stream.checkpoint, dict(stream.model.named_parameters())
    if checkpoint.quantisation:  # stays packed
        return checkpoint.bytes_of(parameters)
    return weight_bytes(checkpoint, parameters, dtype_in_memory(stream), device)


@contextmanager
def in_memory(student, stream: StreamedModel, revision: str | None) -> Iterator:
    """The student on its device; one that was in memory already is afterwards what it was.

    Args:
        student: folder, hub id or loaded model.
        stream:  the same student, as it streams: its device and dtype.
    """
    if isinstance(student, str | os.PathLike):
        model = load_student(student, dtype=stream.dtype, revision=revision or "main")
        yield model.to(stream.device)
        return
    place, modes = student.device, [(m, m.training) for m in student.modules()]
    flags = {parameter: parameter.requires_grad for parameter in student.parameters()}
    try:
        yield student.to(stream.device)
    finally:
        student.to(place)
        for module, training in modes:
            module.training = training
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
