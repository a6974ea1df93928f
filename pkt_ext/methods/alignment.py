# SPDX-License-Identifier: Apache-2.0
"""LaTen's alignment: the hypernetwork trained through the frozen student (METHODS L7, L8).

One optimiser step belongs to one located row. The teacher's neurons are translated once; what comes
out is detached into leaves, and P rows go through the student with these added to its weights, in
micro-batches of their own lengths. Their gradients by the leaves are summed up in float32, joined
by that of the penalty, and go back through the hypernetwork once: the published loop translates
anew for each of the 16 rows, and differentiates all of the student's weights besides.

    loss = sum over rows of (cross-entropy + 1000 * sum_m mean(g_m^2))

The published gradients accumulate as this sum; `reduction="mean"` divides it by P.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import OneCycleLR

from pkt_ext.errors import InputError, NonFiniteError
from pkt_ext.methods.hypernetwork import REGULARISER, Hypernetwork, penalty
from pkt_ext.methods.matching import Match, student_deltas
from pkt_ext.models.anatomy import Anatomy, describe
from pkt_ext.models.injection import Deltas, injected
from pkt_ext.models.replaced import in_eval_mode, recomputed
from pkt_ext.settings import check_choices
from pkt_ext.streaming.batches import Batch, Sample
from pkt_ext.streaming.blocks import batches_for
from pkt_ext.streaming.progress import Progress

ROWS = 16  # P: the located row and 15 others, as published
_LOSS_SCALE = 2.0**10  # of float16 students at the start; it falls where gradients overflow


@dataclass(frozen=True)
class AlignmentConfig:
    """How the hypernetwork is trained. The defaults are the published ones."""

    steps: int  # optimiser steps that the schedule is made for: one for each located row
    learning_rate: float = 3e-5  # the highest
    # onecycle: max/25 -> max over the first tenth -> max/25. constant: max/25 throughout, which is
    # what the first published code did: it made the same schedule and never stepped it.
    schedule: str = "onecycle"
    cycle_momentum: bool = True  # as published: beta1 goes 0.95 -> 0.85 -> 0.95 and is never betas'
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    regulariser: float = REGULARISER  # weight of the penalty, beside each row's cross-entropy
    reduction: str = "sum"  # over the rows of a step: sum (published) or mean
    micro_batch: int = 1  # rows at a time
    gradient_checkpointing: bool = True  # recompute the student's blocks in the backward pass
    exact_products: bool = True  # deltas times activations in float32, else in the student's dtype

    def __post_init__(self):
        for name in ("steps", "micro_batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate is {self.learning_rate}; give a positive number")
        for name in ("regulariser", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; give 0 or more")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas are {self.betas}; give two numbers from 0 to below 1")
        check_choices(self, schedule=("onecycle", "constant"), reduction=("sum", "mean"))


@dataclass(frozen=True)
class StepReport:
    """What one step saw, before its update."""

    step: int  # from 1
    edited: float  # mean cross-entropy of the step's rows, in nats, with the deltas
    unedited: float  # without: the student's own
    penalty: float  # added to every row's
    learning_rate: float
    gradient_norm: float  # of the hypernetwork's gradient


class EarlyStop:
    """Ends the training where the held-out loss has not fallen for `patience` steps.

    Attributes:
        best: step with the lowest loss so far; 0 before the first.
        loss: that loss.
    """

    def __init__(self, patience: int):
        if patience < 1:
            raise InputError(f"patience is {patience}; give at least 1")
        self.patience, self.best, self.loss = patience, 0, math.inf

    def update(self, step: int, loss: float) -> bool:
        """Take note of a step's held-out loss; whether to stop. In order, also when resuming."""
        if loss < self.loss:
            self.best, self.loss = step, loss
        return step - self.best >= self.patience


def draw_rows(
    located: Sample, align: Sequence[Sample], step: int, rows: int = ROWS
) -> list[Sample]:
    """The rows of one step: `rows - 1` of `align` without repetition, and the located one last.

    As published: drawn by Python's generator, seeded with the step's number from 0. With fewer
    rows than that, all of them.
    """
    count = min(rows - 1, len(align))
    return [*random.Random(step).sample(list(align), count), located]


class Alignment:
    """The training of one hypernetwork through one frozen student.

    Args:
        student: a loaded PreTrainedModel of a supported family, any dtype, on one device. It is
            never changed: frozen and in eval mode while it is used, so that nothing is random.
        hypernetwork: trained in place, moved to the student's device.
        config: see there.
    Attributes:
        done: steps taken.
    Raises:
        InputError: they do not fit each other, or a student that gives no gradients.
    """

    def __init__(
        self,
        student,
        hypernetwork: Hypernetwork,
        config: AlignmentConfig,
        *,
        anatomy: Anatomy | None = None,
    ):
        self.student, self.config = student, config
        self.anatomy = anatomy or describe(student)
        if hypernetwork.student_size != self.anatomy.hidden_size:
            raise InputError(
                f"the hypernetwork gives vectors of {hypernetwork.student_size} numbers, the "
                f"student's have {self.anatomy.hidden_size}; it was trained for another student"
            )
        if getattr(student, "is_loaded_in_4bit", False) and student.device.type == "cpu":
            # bitsandbytes repacks the weights there, and their products lose the gradient
            raise InputError("a 4-bit student gives no gradients on a CPU; load it unquantised")
        self.hypernetwork = hypernetwork.to(student.device)
        self.optimizer = torch.optim.AdamW(
            hypernetwork.parameters(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        # never stepped where it is constant, whatever its length; below 10 steps it starts high
        steps = config.steps if config.schedule == "onecycle" else 100
        self.scheduler = OneCycleLR(
            self.optimizer,
            config.learning_rate,
            total_steps=steps,
            pct_start=_rising(steps),
            anneal_strategy="cos",
            cycle_momentum=config.cycle_momentum,
            div_factor=25,
            final_div_factor=1,
        )
        self.done = 0
        self._scale = _LOSS_SCALE if student.dtype == torch.float16 else 1.0
        self._own: dict[bytes, float] = {}  # the un-edited student's loss by row

    def step(self, match: Match, rows: Sequence[Sample]) -> StepReport:
        """One update by these rows; see the module.

        Raises:
            NonFiniteError: a loss or gradient that is NaN or infinite; names the step.
            InputError: rows that do not fit the student, or a match that does not.
        """
        number, config = self.done + 1, self.config
        self.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            translated = self._translate(match)
            deltas = student_deltas(translated, match, self.anatomy)
            fine = penalty(translated, config.regulariser)
        with self._in_use():
            edited, gradients = self._gradients(deltas, self._batches(rows), f"step {number}")
        unedited = self.losses(rows)
        share = 1.0 if config.reduction == "sum" else 1.0 / len(rows)
        torch.autograd.backward(
            [fine, *(values for _, values in deltas.values())],
            [fine.new_tensor(share * len(rows)), *(share * each for each in gradients)],
        )
        norm = torch.nn.utils.get_total_norm(
            [parameter.grad for parameter in self.hypernetwork.parameters()]
        ).item()
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"step {number}: the hypernetwork's gradient is {norm}; lower --learning-rate"
            )
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        if config.schedule == "onecycle":
            self.scheduler.step()
        self.done = number
        return StepReport(
            number, math.fsum(edited) / len(rows), math.fsum(unedited) / len(rows), fine.item(),
            rate, norm,
        )  # fmt: skip

    def losses(self, rows: Sequence[Sample], match: Match | None = None) -> list[float]:
        """Mean cross-entropy of each row: with the deltas of `match`, else the student's own.

        The student's own are computed once a row. For a held-out loss give a match of a row that
        the training does not see.

        Raises:
            NonFiniteError: a loss that is NaN or infinite.
        """
        if match is not None:
            return self._losses(rows, self.deltas(match))
        keys = [row.input_ids.numpy().tobytes() + row.labels.numpy().tobytes() for row in rows]
        missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._own}
        if missing:
            self._own |= zip(missing, self._losses(list(missing.values()), {}), strict=True)
        return [self._own[key] for key in keys]

    @torch.no_grad()
    def deltas(self, match: Match) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
        """The student's changes by the hypernetwork as it is now; see `injection.Deltas`."""
        return student_deltas(self._translate(match), match, self.anatomy)

    def save(self, progress: Progress, report: StepReport) -> None:
        """Note the step just taken: a checkpoint of the hypernetwork, and what resuming needs.

        Checkpoints of all steps are kept (`hypernetwork-0001.safetensors`, ...); the optimiser's
        state, twice as large, of the last two.
        """
        name = f"{self.done:04}"
        state = {
            f"{number}.{key}": tensor
            for number, entry in self.optimizer.state_dict()["state"].items()
            for key, tensor in entry.items()
        }
        group = self.optimizer.param_groups[0]
        progress.record(
            f"align-{name}",
            saved={
                "hypernetwork": progress.save(
                    f"hypernetwork-{name}", self.hypernetwork.state_dict()
                )
            },
            optimizer=progress.save(f"optimizer-{self.done % 2}", state),
            learning_rate=group["lr"],
            betas=group["betas"],
            scale=self._scale,
            report=asdict(report),
        )

    def resume(self, progress: Progress) -> list[StepReport]:
        """Go on behind the last step that `save` noted; reports of all that were taken.

        There is no other state: a step's rows are drawn by its number, and nothing else is random.
        """
        lines = []
        while line := progress.find(f"align-{len(lines) + 1:04}"):
            lines.append(line)
        while lines and not progress.sound(lines[-1]["optimizer"]):
            progress.drop_from(lines.pop()["step"])
        if lines:
            self._load(progress, lines[-1], len(lines))
        return [StepReport(**line["report"]) for line in lines]

    def load_step(self, progress: Progress, step: int) -> None:
        """Take the hypernetwork as it was behind a step that `save` noted; to use, not to train."""
        saved = progress.find(f"align-{step:04}")["saved"]["hypernetwork"]
        self.hypernetwork.load_state_dict(progress.load(saved))

    def _load(self, progress: Progress, line: dict, done: int) -> None:
        self.hypernetwork.load_state_dict(progress.load(line["saved"]["hypernetwork"]))
        state = self.optimizer.state_dict()
        for key, tensor in progress.load(line["optimizer"]).items():
            number, _, name = key.partition(".")
            state["state"].setdefault(int(number), {})[name] = tensor
        state["param_groups"][0] |= {"lr": line["learning_rate"], "betas": tuple(line["betas"])}
        self.optimizer.load_state_dict(state)
        self.scheduler.last_epoch = done  # all that it computes a rate from
        self.done, self._scale = done, line["scale"]

    # --- the student ------------------------------------------------------------------------------

    def _translate(self, match: Match) -> dict[str, torch.Tensor]:
        device, size = self.student.device, self.hypernetwork.teacher_size
        for name, vectors in match.neurons.items():
            if name not in self.hypernetwork.types or vectors.shape[-1] != size:
                raise InputError(
                    f"{name}: teacher neurons of {vectors.shape[-1]} numbers; the hypernetwork "
                    f"translates {', '.join(self.hypernetwork.types)} of {size}"
                )
        return self.hypernetwork({name: v.to(device) for name, v in match.neurons.items()})

    def _batches(self, rows: Sequence[Sample]) -> list[Batch]:
        return batches_for(
            self.student, self.anatomy, rows, self.config.micro_batch, self.student.device
        )

    def _injected(self, deltas: Deltas):
        dtype = torch.float32 if self.config.exact_products else None
        return injected(self.student, deltas, anatomy=self.anatomy, dtype=dtype)

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """The student in eval mode, its blocks recomputed in the backward pass where asked for."""
        blocks = [self.student.get_submodule(path) for path in self.anatomy.blocks]
        again = recomputed(blocks if self.config.gradient_checkpointing else [])
        with in_eval_mode(self.student), again:
            yield

    def _gradients(
        self, deltas: Deltas, batches: list[Batch], where: str
    ) -> tuple[list[float], list[torch.Tensor]]:
        """(each row's loss, gradient of their sum by every delta's values)."""
        leaves = {
            key: (index, values.detach().requires_grad_())
            for key, (index, values) in deltas.items()
        }
        values = [values for _, values in leaves.values()]
        total = [torch.zeros_like(each) for each in values]
        losses: list[float] = []
        with self._injected(leaves), torch.enable_grad():
            for batch in batches:
                while True:
                    each = row_losses(self.student, batch)
                    found = torch.autograd.grad(self._scale * each.sum(), values)
                    known = each.tolist()
                    _check_finite(known, batch, where)
                    if torch.nn.utils.get_total_norm(found).isfinite():
                        break
                    if self._scale == 1.0:
                        raise NonFiniteError(
                            f"{where}: the gradient of {', '.join(batch.ids)} is NaN or infinite; "
                            "check the student's --dtype, or lower --learning-rate"
                        )
                    self._scale /= 2.0
                torch._foreach_add_(total, found, alpha=1.0 / self._scale)
                losses += known
        return losses, total

    @torch.no_grad()
    def _losses(self, rows: Sequence[Sample], deltas: Deltas) -> list[float]:
        """In the order of `rows`, whatever that of the micro-batches is."""
        numbered = [Sample(str(i), row.input_ids, row.labels) for i, row in enumerate(rows)]
        found = [0.0] * len(rows)
        with self._in_use(), self._injected(deltas):
            for batch in self._batches(numbered):
                known = row_losses(self.student, batch).tolist()
                for i, loss in zip(map(int, batch.ids), known, strict=True):
                    if not math.isfinite(loss):
                        raise _not_finite(rows[i].id, loss, f"after step {self.done}")
                    found[i] = loss
        return found


def row_losses(model, batch: Batch) -> torch.Tensor:
    """[B]: mean cross-entropy of each sample's targets, in at least float32.

    Logits are made at positions that some sample of the batch has a target at, no others.
    """
    targets = [batch.targets(index) for index in range(len(batch.ids))]
    kept = torch.cat([positions for positions, _ in targets]).unique()
    places = [(torch.searchsorted(kept, positions), tokens) for positions, tokens in targets]
    return losses_at(model, batch.input_ids, kept, places)


def losses_at(
    model,
    input_ids: torch.Tensor,
    kept: torch.Tensor,
    targets: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """`row_losses` of tokens [B, T], with logits at positions `kept` [n] alone.

    Args:
        targets: each sample's (places in `kept`, tokens), int64 [m].
    """
    logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=kept).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.stack(
        [
            F.cross_entropy(logits[index, places], tokens)
            for index, (places, tokens) in enumerate(targets)
        ]
    )


def _rising(steps: int) -> float:
    """Share of the steps in which the rate rises: a tenth, as published.

    Of 10 steps that would be a rise of no length, which torch divides by.
    """
    return 0.1 if steps != 10 else 0.1 * (1 + 1e-9)


def _check_finite(losses: list[float], batch: Batch, where: str) -> None:
    for sample, loss in zip(batch.ids, losses, strict=True):
        if not math.isfinite(loss):
            raise _not_finite(sample, loss, where)


def _not_finite(sample: str, loss: float, where: str) -> NonFiniteError:
    return NonFiniteError(
        f"{where}: the loss of row {sample!r} is {loss}; check the student's weights and --dtype, "
        "or lower --learning-rate",
        sample,
    )
