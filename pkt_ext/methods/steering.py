# SPDX-License-Identifier: Apache-2.0
"""The training of a SemAlign run: phase by phase, on a student in memory, from files.

In a phase one block of the student is trained, or a LoRA on its modules; its input, which no later
phase changes, is computed once and kept in a file, so that the blocks before it do not run again.
A baseline is one phase in which every block is trained, as many steps as all phases together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate

import torch
from torch import nn

from pkt_ext import objectives
from pkt_ext.alignment_trainer import train_phase
from pkt_ext.baselines import gaussian_factors
from pkt_ext.errors import NonFiniteError
from pkt_ext.lora import attach_factors
from pkt_ext.methods.closeness import Closeness, Heads
from pkt_ext.methods.semalign_inputs import Job
from pkt_ext.methods.similarity import linear_cka
from pkt_ext.methods.supervision import DEBIASED, Observer, Supervision
from pkt_ext.methods.targets import Phase, watched
from pkt_ext.models.anatomy import Anatomy
from pkt_ext.models.frontier import activations, advance
from pkt_ext.streaming.batches import Sample
from pkt_ext.streaming.blocks import batches_for
from pkt_ext.streaming.progress import Progress
from pkt_ext.streaming.rows import RowFile


class Steering:
    """A context manager around the training of one student.

    Args:
        model: the student in memory, on its device; one that the caller has loaded is afterwards
            what it was.
        supervision: what the teacher left.
        kept: the run's progress, whose folder takes the files.
    """

    def __init__(
        self,
        model,
        job: Job,
        config,
        phases: Sequence[Phase],
        supervision: Supervision,
        kept: Progress,
    ):
        self.model, self.job, self.config, self.phases = model, job, config, phases
        self.supervision, self.kept, self.anatomy = supervision, kept, job.anatomies[1]
        self.adapted = None  # the PeftModel around the student, with LoRA
        self._heads = Heads.of(model, self.anatomy, job.streams[0], job.shared)
        self._stack = ExitStack()

    def __enter__(self) -> Steering:
        self.model.eval().requires_grad_(False)
        if self.config.train == "lora":
            from pkt_ext.attached import detach

            factors = gaussian_factors(self.model, self._ranks(), self.config.seed)
            scales = dict.fromkeys(factors, self.config.alpha / self.config.rank)
            self._stack.callback(detach, self.model)
            self.adapted = attach_factors(
                self.model, factors, scales, dropout=self.config.dropout, frozen=False
            )
        elif self.job.student.folder is None:  # a model of the caller's
            own = {n: p.detach().clone() for n, p in self.trained_weights().items()}
            self._stack.callback(self._put_back, own)
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    @torch.no_grad()
    def _put_back(self, own: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.trained_weights().items():
            parameter.copy_(own[name])

    def train(self, show: bool) -> list[dict]:
        """All phases, those of an interrupted run restored; what each reports."""
        reports, prefix = [], None
        for number, phase in enumerate(self.phases):
            step, parameters = f"phase {number}", self._trained(phase)
            if line := self.kept.find(step):
                found = self.kept.load(line["saved"]["parameters"])
                with torch.no_grad():
                    for name, parameter in parameters.items():
                        parameter.copy_(found[name])
                reports.append(line["report"])
                continue
            prefix = self._prefix(prefix, phase.block)
            try:
                reports.append(self._train(number, phase, parameters, prefix, show))
            except NonFiniteError as error:
                if damaged := self._damaged():
                    raise damaged from error
                raise
            if bad := [name for name, p in parameters.items() if not _finite(p)]:
                raise NonFiniteError(
                    f"{bad[0]} holds NaN or Inf when it is trained; lower --learning-rate"
                )
            held = {name: p.detach().cpu() for name, p in parameters.items()}
            saved = {"parameters": self.kept.save(f"phase-{number:04}", held)}
            self.kept.record(step, saved=saved, report=reports[-1])
        self.model.requires_grad_(False)
        return reports

    def _damaged(self) -> NonFiniteError | None:
        """Which of the student's own weights is not finite, if any; trained ones are."""
        for name, parameter in self.model.named_parameters():
            own = not parameter.requires_grad and ".lora_" not in name
            if own and not _finite(parameter):
                advice = "the checkpoint is damaged, download or convert it again"
                if parameter.dtype == torch.float16:
                    advice = f"use --dtype float32 or bfloat16; if it does there too, {advice}"
                return NonFiniteError(
                    f"{self.job.student.name}: {name.replace('.base_layer', '')} holds NaN or Inf; "
                    f"{advice}"
                )
        return None

    def _check(self, found: torch.Tensor, sample: str) -> None:
        """Refuse what of the student is not finite on a sample."""
        if torch.isfinite(found).all():
            return
        raise self._damaged() or NonFiniteError(
            f"sample {sample!r} gives NaN or Inf in the student ({self.model.dtype}); lower "
            "--learning-rate if it is trained already, else use --dtype float32 or bfloat16"
        )

    def trained_weights(self) -> dict[str, nn.Parameter]:
        """The student's own parameters of all blocks that were trained, without LoRA."""
        return {n: p for phase in self.phases for n, p in self._parameters(phase).items()}

    # --- one phase --------------------------------------------------------------------------------

    def _train(self, number: int, phase: Phase, parameters, prefix, show: bool) -> dict:
        config, device = self.config, self.job.streams[1].device
        self.model.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        rows = _Rows(self.job, self.supervision, number if phase.sources else None, prefix)
        steps = config.phase_steps(len(rows))
        if phase.block is None:
            steps *= config.phase_count(len(self.anatomy.blocks))
        found = train_phase(
            self.model,
            self.anatomy,
            rows,
            self._objective(phase),
            block=phase.block,
            steps=steps,
            learning_rate=config.rate_meant,
            batch=config.batch,
            micro_batch=config.micro_batch,
            warmup=config.warmup,
            seed=config.seed + number,
            device=device.type,
            gradient_checkpointing=config.gradient_checkpointing,
            progress=show,
            what="" if phase.block is None else f"block {phase.block}: ",
        )
        return {"block": phase.block, "steps": steps, **found}

    def _objective(self, phase: Phase) -> objectives.Objective:
        path = self.anatomy.final_norm
        norm = self.model.get_submodule(path) if path else None
        return objective_of(self.config, self._heads, norm, steered=bool(phase.sources))

    def _prefix(self, known: tuple[int, RowFile] | None, block: int | None):
        """(block, a file of what it is given [tokens, D_s]); None where no block runs before it.

        Args:
            known: of an earlier phase, whose file goes.
        """
        if not block:
            return None
        samples = self.job.rows.student
        total = sum(len(sample.input_ids) for sample in samples)
        shape, dtype = (total, self.anatomy.hidden_size), self.model.dtype
        while known is None or known[0] < block:
            # without a file all blocks up to the one wanted run at once
            at = block - 1 if known is None else known[0]
            path = self.kept.folder / f"prefix-{at + 1:04}.activations"
            file, first = RowFile(path, shape, dtype).create(), 0
            items = _Prefixed(samples, known and known[1])
            for rows in advance(
                self.model, self.anatomy, items, at, micro_batch=self.config.micro_batch
            ):
                file.write(first, rows)
                first += len(rows)
            if known is not None:
                known[1].remove()
            known = at + 1, file
        return known

    def _trained(self, phase: Phase) -> dict[str, nn.Parameter]:
        """What a phase trains, by name."""
        if self.adapted is None:
            return self._parameters(phase)
        return {n: p for n, p in self._parameters(phase).items() if ".lora_" in n}

    def _parameters(self, phase: Phase) -> dict[str, nn.Parameter]:
        paths = self.anatomy.blocks
        chosen = paths if phase.block is None else paths[phase.block : phase.block + 1]
        starts = tuple(f"{path}." for path in chosen)
        return {n: p for n, p in self.model.named_parameters() if n.startswith(starts)}

    def _ranks(self) -> dict[str, int]:
        blocks = {phase.block for phase in self.phases}
        if None in blocks:
            blocks = range(len(self.anatomy.blocks))
        return lora_ranks(self.anatomy, self.config, blocks)

    # --- how close the student is -----------------------------------------------------------------

    def look(self) -> dict:
        """The student's closeness to the teacher on the held-out rows, as it is now.

        `kl` in nats and `agreement` by position, `cka` (linear, debiased) of each phase's block
        with the teacher block that weighs most in what steers it, `perplexity` of the unrelated
        rows; what cannot be had is None.
        """
        found: dict = {"kl": None, "agreement": None, "cka": None, "perplexity": None}
        self.model.eval()
        if self.job.held is not None:
            found |= self._compare()
        if self.job.unrelated:
            found["perplexity"] = self._perplexity()
        return found

    @torch.no_grad()
    def _compare(self) -> dict:
        held, places = self.job.held, self.supervision.output_places
        ours = {s.id: own for s, (_, own) in zip(held.student, held.positions, strict=True)}
        blocks = {phase.block: self._steered_by(phase) for phase in self.phases if phase.sources}
        positions, width = list(ours.values()), self.anatomy.hidden_size
        observer = Observer(held.student, positions, self.kept.folder, "own", width, set(blocks))
        closeness, theirs = Closeness(self._heads), self.supervision.output.read()
        for batch in self._batches(held.student):
            with ExitStack() as stack:
                for block in blocks:
                    module = self.model.get_submodule(self.anatomy.blocks[block])
                    take = partial(observer.take, block, batch)
                    stack.enter_context(watched(module, self.config.interface_meant, take))
                outputs = activations(self.model, self.anatomy, batch.input_ids).outputs
            for index, name in enumerate(batch.ids):
                rows = outputs[index, ours[name].to(outputs.device)]
                self._check(rows, name)
                first = places.first[name]
                closeness.add(rows, theirs[first : first + len(rows)].to(rows.device))
        cka = None
        if blocks and observer.places.total >= DEBIASED:
            seen = self.supervision.seen
            pairs = ((observer.files[own], seen[source]) for own, source in blocks.items())
            cka = [linear_cka(a.read(), b.read(), debiased=True) for a, b in pairs]
        return closeness.result() | {"cka": cka}

    @torch.no_grad()
    def _perplexity(self) -> float:
        total, count = 0.0, 0
        loss = objectives.CrossEntropyOutput(self._heads.own, cap=self._heads.student_cap)
        for batch in self._batches(self.job.unrelated):
            outputs = activations(self.model, self.anatomy, batch.input_ids).outputs
            for index in range(len(batch.ids)):
                positions, tokens = batch.targets(index)
                each = loss.each(outputs[index, positions], tokens)
                self._check(each, batch.ids[index])
                total, count = total + float(each.double().sum()), count + len(each)
        return float(torch.tensor(total / count, dtype=torch.float64).exp())

    def _batches(self, samples: Sequence[Sample]):
        size, device = self.config.micro_batch, self.job.streams[1].device
        return batches_for(self.model, self.anatomy, samples, size, device)

    @staticmethod
    def _steered_by(phase: Phase) -> int:
        return max(phase.sources, key=lambda source: source.weight).block


def objective_of(config, heads: Heads, norm: nn.Module | None, steered: bool):
    """What a phase minimises: an `objectives.Objective`.

    Args:
        norm:    the student's final one.
        steered: by a layer loss too.
    """
    layer, options = None, {"cap": heads.student_cap}
    if steered:
        if config.objective == "cosine":
            layer = objectives.CosineSteering()
        elif config.objective == "geometry":
            layer = objectives.RelationGeometry()
        else:
            tau = config.temperature
            layer = objectives.FisherAlignment(norm, heads.student, temperature=tau, **options)
        layer.interface = config.interface_meant
    output = {
        "onehot": lambda: objectives.CosineOutput(heads.own, **options),
        "ce": lambda: objectives.CrossEntropyOutput(heads.own, **options),
        "kl": lambda: objectives.OutputDistillation(
            heads.student,
            heads.teacher,
            temperature=config.temperature,
            teacher_cap=heads.teacher_cap,
            **options,
        ),
        "none": lambda: None,
    }[config.output_meant]()
    return objectives.Objective(layer, output, config.beta)


def lora_ranks(anatomy: Anatomy, config, blocks: Iterable[int]) -> dict[str, int]:
    """Module path -> rank of its LoRA in these blocks; a fused module takes part as a whole."""
    return {
        f"{anatomy.blocks[block]}.{projection.module}": config.rank
        for block in sorted(blocks)
        for projection in anatomy.projections[block]
        if projection.role in config.roles
    }


def _finite(parameter: torch.Tensor) -> bool:
    """Without a mask as large as the parameter; quantised numbers are finite."""
    if not parameter.is_floating_point() or not parameter.numel():
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(parameter.detach()))


class _Prefixed:
    """The rows with what a block is given, for `frontier.advance`."""

    def __init__(self, samples: Sequence[Sample], file: RowFile | None):
        self._samples = samples
        self._held = None if file is None else file.read()
        self._first = [0, *accumulate(len(sample.input_ids) for sample in samples)]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict:
        item = {"input_ids": self._samples[index].input_ids}
        if self._held is not None:
            item["hidden"] = self._held[self._first[index] : self._first[index + 1]]
        return item


class _Rows(torch.utils.data.Dataset):
    """The rows to train on, as `alignment_trainer` takes them.

    Args:
        layer:  the phase whose mapped vectors steer; None: none do.
        prefix: from `Steering._prefix`.
    """

    def __init__(self, job: Job, supervision: Supervision, layer: int | None, prefix):
        self._rows, self._layer_positions = job.rows, job.layer_positions
        self._supervision = supervision
        self._prefixed = _Prefixed(job.rows.student, prefix and prefix[1])
        self._layer = None if layer is None else supervision.layers[layer].read()
        self._output = supervision.output.read()

    def __len__(self) -> int:
        return len(self._rows.student)

    def __getitem__(self, index: int) -> dict:
        item, name = self._prefixed[index], self._rows.teacher[index].id
        positions, layer_positions = (
            each[index][1] for each in (self._rows.positions, self._layer_positions)
        )
        first = self._supervision.output_places.first[name]
        item |= {
            "positions": positions,
            "labels": item["input_ids"][positions + 1],
            "output": self._output[first : first + len(positions)],
        }
        if self._layer is not None:
            first = self._supervision.layer_places.first[name]
            item["layer_positions"] = layer_positions
            item["layer"] = self._layer[first : first + len(layer_positions)]
        return item
