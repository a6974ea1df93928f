# SPDX-License-Identifier: Apache-2.0
"""What a transfer will take, before it runs: memory, traffic, operations and time, by phase.

Configuration and safetensors headers are enough. The predictions are those by which the runs
themselves share out their memory.
"""

from __future__ import annotations

from pkt_ext.errors import InputError
from pkt_ext.finetune import FinetuneConfig
from pkt_ext.methods.laten import LatenConfig
from pkt_ext.methods.seeking import SeekingConfig
from pkt_ext.methods.semalign_config import SemAlignConfig
from pkt_ext.plan import laten, seeking
from pkt_ext.settings import refuse_processes

METHODS = {"seeking": SeekingConfig, "laten": LatenConfig, "semalign": SemAlignConfig}


def plan(
    teacher,
    student,
    config: SeekingConfig | LatenConfig | SemAlignConfig | None = None,
    training: FinetuneConfig | None = None,
    *,
    method: str = "seeking",
    samples: int = 32,
    data=None,
    timed: bool = True,
) -> dict:
    """What a transfer will take; of a Hub id only headers are fetched.

    Args:
        teacher, student: folders, hub ids or loaded models.
        config:   the method's; of Seeking its budget and device are those of the training too. A
                  device that is not here needs a budget.
        training: Seeking's; what `config` has too is taken from there, except for dtype.
        samples:  rows of `config.max_length` tokens, each of which is predicted: the worst case.
                  LaTen: rows to locate by, a step for each. SemAlign: those held out included.
        data:     Seeking: plan for these rows instead (needs the teacher's tokenizer).
        timed:    Seeking: run one block for a moment, for the times; without it nothing but headers
                  is read.
    Returns:
        The document that `pkt plan --json` prints; `text` makes a table of it.
    Raises:
        InputError: models that do not go together; a budget too small for the passes, or for
            LaTen's alignment, SemAlign's map or training.
    """
    refuse_processes("pkt plan", "start it without a launcher")
    config = config or config_of(method)()
    if not isinstance(config, config_of(method)):
        raise InputError(f"config is a {type(config).__name__}; of another method than {method}")
    if samples < 1:
        raise InputError(f"samples is {samples}; give at least 1")
    if method != "seeking":
        if data is not None or training is not None:
            raise InputError(
                f"pkt plan --method {method} takes --samples; leave data and training out"
            )
        return _module(method).plan(teacher, student, config, samples=samples)
    return seeking.plan(
        teacher,
        student,
        config,
        training or FinetuneConfig(),
        samples=samples,
        data=data,
        timed=timed,
    )


def config_of(method: str) -> type:
    """The configuration class of a method.

    Raises:
        InputError: an unknown method.
    """
    if method not in METHODS:
        raise InputError(f"method is {method!r}; known is {', '.join(METHODS)}")
    return METHODS[method]


def text(document: dict) -> str:
    """The document as a table."""
    return _module(document["method"]).text(document)


def _module(method: str):
    if method == "semalign":
        from pkt_ext.plan import semalign  # loads transformers' Trainer, which others do without

        return semalign
    return {"seeking": seeking, "laten": laten}[method]
