# SPDX-License-Identifier: Apache-2.0
"""The options of SemAlign, and what each objective means by those that are left open."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pkt_ext.data import PROMPT_FORMATS
from pkt_ext.errors import InputError
from pkt_ext.methods.targets import INTERFACES
from pkt_ext.settings import DTYPES, check_choices
from pkt_ext.streaming.budget import parse_bytes

METHODS = ("cosine", "fisher", "geometry")  # objectives with a layer loss
BASELINES = ("finetune", "distillation")
OUTPUTS = ("onehot", "kl", "ce", "none")
MODULES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class _Meaning:
    """What an objective stands for where nothing else is said."""

    output: str
    schedule: str | None = None
    pairing: str | None = None
    interface: str | None = None
    map: str | None = None
    attribution: str | None = None
    positions: str | None = None
    normalise: bool = False  # each teacher vector is divided by its norm before it is mapped (A5)
    learning_rate: float = 1e-4


_MEANS = {
    "cosine": _Meaning(
        "onehot",
        "pairs",
        "published",
        "contribution",
        "frames",
        "output",
        "supervised",
        normalise=True,
        learning_rate=3e-4,
    ),
    # a norm behind the last block makes gradient times output vanish there (Euler): its sources
    # are chosen by contributions
    "fisher": _Meaning("kl", "frontier", "attribution", "output", "least-squares", "contribution"),
    "geometry": _Meaning(
        "kl", "frontier", "attribution", "contribution", "least-squares", "contribution", "all"
    ),
    "finetune": _Meaning("ce"),
    "distillation": _Meaning("kl"),
}


@dataclass(frozen=True)
class SemAlignConfig:
    """How to steer. Options that are None have the objective's own value: see `resolved`."""

    objective: str = "cosine"  # cosine, fisher or geometry; baselines: finetune, distillation
    output: str | None = None  # onehot (A8), kl to the teacher, ce, or none
    beta: float = 1.0  # weight of the output loss beside the layer loss
    temperature: float = 1.0  # of kl and fisher
    schedule: str | None = None  # pairs: critical blocks alone; frontier: every block in turn
    pairing: str | None = None  # published (A2), attribution or similarity; pairs: published
    attribution: str | None = None  # gradient times what: a block's output, or its contribution
    critical: int = 4  # pairs: teacher blocks of highest attribution
    attribution_rows: int = 64  # rows to attribute by, drawn; all activations of each are kept
    interpolate: bool = True  # pairs: targets between two teacher blocks (A4)
    interface: str | None = None  # what is compared: contribution or output of a block
    positions: str | None = None  # where the layer loss looks: supervised ones, or all
    map: str | None = None  # frames (A6) or least-squares
    fold_norm: bool = True  # the final norm's gain belongs to the head, in bases
    train: str = "lora"  # or block: all of the block's own parameters
    modules: str = "up,down,v,o"  # with LoRA on them
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0  # of LoRA
    steps: int | None = None  # optimiser steps of a phase; None: 50, with pairs those of `epochs`
    epochs: float = 5  # pairs: passes over the rows in a phase
    batch: int = 64  # rows of a step
    micro_batch: int = 4  # rows at a time, a divisor of batch; also of the teacher's passes
    learning_rate: float | None = None  # of AdamW at its peak; 3e-4 for cosine, else 1e-4
    warmup: float = 0.03  # share of a phase's steps in which the rate rises
    hold_out: float = 0.1  # share of the rows to look at only, without rows given for that
    max_length: int = 1024  # tokens kept of a row
    train_on_inputs: bool = False  # prompts are supervised too
    prompt_format: str = "auto"  # auto, published, chat or plain: see data.encode
    dtype: str | None = None  # of both models; None: the checkpoints'
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: cuda where there is one
    budget: str | None = None  # memory of the device; None: most of what is free
    gradient_checkpointing: bool = True  # recompute the student's blocks in the backward
    map_cache: str = "auto"  # folder that keeps maps; auto: the user's cache folder; none
    seed: int = 42
    teacher_revision: str | None = None  # branch, tag or commit of a hub id
    student_revision: str | None = None  # likewise

    def __post_init__(self):
        if self.budget is not None:
            parse_bytes(self.budget)
        check_choices(
            self,
            objective=tuple(_MEANS),
            output=(None, *OUTPUTS),
            schedule=(None, "pairs", "frontier"),
            pairing=(None, "published", "attribution", "similarity"),
            interface=(None, *INTERFACES),
            map=(None, "frames", "least-squares"),
            attribution=(None, *INTERFACES),
            positions=(None, "supervised", "all"),
            train=("lora", "block"),
            dtype=(None, *DTYPES),
            prompt_format=PROMPT_FORMATS,
        )
        for name, least in (
            ("critical", 1),
            ("attribution_rows", 1),
            ("rank", 1),
            ("steps", 1),
            ("batch", 1),
            ("micro_batch", 1),
            ("max_length", 2),
        ):
            if (value := getattr(self, name)) is not None and value < least:
                raise InputError(f"{name} is {value}; give at least {least}")
        for name in ("learning_rate", "alpha", "epochs", "temperature"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise InputError(f"{name} is {value}; give a positive number")
        for name in ("warmup", "dropout", "hold_out"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give 0 <= {name} < 1")
        if not 0 <= self.beta < math.inf:
            raise InputError(f"beta is {self.beta}; give 0 or more")
        if not 0 <= self.seed < 2**32:  # numpy's range
            raise InputError(f"seed is {self.seed}; give 0 to {2**32 - 1}")
        if self.batch % self.micro_batch:
            raise InputError(
                f"micro_batch {self.micro_batch} does not divide batch {self.batch}; choose one "
                "that does"
            )
        if not self.roles or not set(self.roles) <= set(MODULES):
            raise InputError(f"modules is {self.modules!r}; give some of {','.join(MODULES)}")
        self._check_together()

    def _check_together(self) -> None:
        """Options that one of the others rules out."""
        baseline = self.objective in BASELINES
        if baseline:
            for name in ("output", "pairing", "interface", "map", "attribution", "positions"):
                if getattr(self, name) is not None:
                    raise InputError(
                        f"{name} is {getattr(self, name)}, but the baseline {self.objective} has "
                        f"no layer loss and one output loss; leave {name} out"
                    )
            return
        if self.schedule_meant == "pairs" and self.pairing not in (None, "published"):
            raise InputError(
                f"pairing is {self.pairing}, but the schedule pairs takes the critical blocks' "
                "published pairs; add --schedule frontier, or leave pairing out"
            )

    @property
    def roles(self) -> tuple[str, ...]:
        """`modules`, taken apart."""
        return tuple(name.strip() for name in self.modules.split(",") if name.strip())

    @property
    def baseline(self) -> bool:
        """No layer loss: everything is trained at once."""
        return self.objective in BASELINES

    @property
    def output_meant(self) -> str:
        """onehot, kl, ce or none."""
        return self.output or _MEANS[self.objective].output

    @property
    def schedule_meant(self) -> str:
        """pairs or frontier; a baseline takes as many steps as that of its sort would."""
        return self.schedule or _MEANS[self.objective].schedule or "frontier"

    @property
    def pairing_meant(self) -> str:
        """published, attribution or similarity."""
        if self.schedule_meant == "pairs":
            return "published"
        return self.pairing or _MEANS[self.objective].pairing or "attribution"

    @property
    def interface_meant(self) -> str:
        """contribution or output."""
        return self.interface or _MEANS[self.objective].interface or "contribution"

    @property
    def map_meant(self) -> str:
        """frames or least-squares."""
        return self.map or _MEANS[self.objective].map or "frames"

    @property
    def attribution_meant(self) -> str:
        """output or contribution."""
        return self.attribution or _MEANS[self.objective].attribution or "output"

    @property
    def positions_meant(self) -> str:
        """supervised or all."""
        return self.positions or _MEANS[self.objective].positions or "supervised"

    @property
    def normalise(self) -> bool:
        """Whether each teacher vector is divided by its norm before it is mapped."""
        return _MEANS[self.objective].normalise

    @property
    def rate_meant(self) -> float:
        """AdamW's peak rate."""
        return self.learning_rate or _MEANS[self.objective].learning_rate

    def phase_steps(self, rows: int) -> int:
        """Optimiser steps of one phase over so many rows."""
        if self.steps is not None:
            return self.steps
        if self.schedule_meant == "frontier":
            return 50
        return max(1, math.ceil(self.epochs * math.ceil(rows / self.batch)))

    def phase_count(self, blocks: int) -> int:
        """Phases that the schedule has at most, of a student with so many blocks."""
        return min(self.critical, blocks) if self.schedule_meant == "pairs" else blocks

    def resolved(self) -> dict:
        """What was left open, as it was meant; for reports."""
        names = (
            "output",
            "schedule",
            "pairing",
            "interface",
            "map",
            "attribution",
            "positions",
        )
        return {name: getattr(self, f"{name}_meant") for name in names} | {
            "learning_rate": self.rate_meant
        }
