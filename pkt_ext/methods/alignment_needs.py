# SPDX-License-Identifier: Apache-2.0
"""What LaTen's alignment takes, before a weight is read: the stage in which the student is whole.

One row of the most tokens goes through the student on fake tensors (see streaming.footprint), all
its blocks with their hooks, forward, loss and backward; what surrounds it is counted here from the
code of `alignment`, `matching` and `hypernetwork`.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pkt_ext.heap import give_back_freed_memory
from pkt_ext.methods.alignment import losses_at
from pkt_ext.methods.laten_inputs import Job, located_bytes
from pkt_ext.methods.matching import KIND
from pkt_ext.methods.students import bytes_in_memory, dtype_in_memory
from pkt_ext.models.anatomy import describe
from pkt_ext.models.injection import ROW_ROLES, Change, added
from pkt_ext.models.replaced import recomputed
from pkt_ext.streaming.batches import ALIGNMENT, IGNORED
from pkt_ext.streaming.footprint import Tracker, count_flops
from pkt_ext.streaming.meter import resident_bytes
from pkt_ext.streaming.needs import CONTEXT, SLACK
from pkt_ext.training_needs import fake_device, fill_with_fakes, on_meta


class AlignmentNeeds:
    """Bytes and operations of the alignment.

    On a CPU freed memory goes back to the system from here on (see `heap`).

    Args:
        job:    no weight is read, nor is anything changed.
        config: the `LatenConfig`.
        device: where the student is to be, where that is not the job's; it need not be here.
    Attributes:
        phases: phase -> ingredient -> bytes; the phase's peak is their sum.
    """

    def __init__(self, job: Job, config, device: torch.device | None = None):
        self.job, self.config = job, config
        self.device = (device or job.streams[1].device).type
        if self.device == "cpu":
            give_back_freed_memory()
        self.student, (theirs, self.ours) = job.streams[1], job.anatomies
        self.sizes = d_t, d_s = theirs.hidden_size, self.ours.hidden_size
        self.parameters = len(config.types) * d_t * (d_t + d_s)
        self._neurons = {name: job.blocks * job.counts[KIND[name]] for name in config.types}
        samples = [*job.located, *job.align, *job.holdout]
        self._length = max(len(sample.input_ids) for sample in samples)
        self._targets = max(int((sample.labels[1:] != IGNORED).sum()) for sample in samples)
        self._activations = self._row()
        # what measuring has loaded is there from now on, what the passes load will be
        self.process = resident_bytes() + 2 * SLACK if self.device == "cpu" else CONTEXT
        self.phases = self._phases()

    @property
    def peak(self) -> int:
        """Bytes at most."""
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def changed(self) -> int:
        """Numbers that the student's changes are: rows of v that neurons share count once."""
        rows = sum(self._rows(name) for name in self.config.types)
        return self.job.blocks * rows * self.sizes[1]

    def flops(self) -> int:
        """Operations of all steps: hypernetwork, student with the changes and as it is."""
        d_t, d_s = self.sizes
        # outer: forward and two gradients; inner: forward and its weight's gradient
        translated = sum(self._neurons.values()) * (6 * d_t * d_s + 4 * d_t * d_t)
        row = sum(self._count(gradients) for gradients in (True, False))
        rows = min(self.config.rows, len(self.job.align) + 1)
        return len(self.job.located) * (translated + rows * row)

    def _phases(self) -> dict[str, dict[str, int]]:
        """What is alive at once; the hypernetwork's moments are from the first step on."""
        (d_t, d_s), types = self.sizes, self.config.types
        on_cpu = self.device == "cpu"
        theirs = {name: 4 * count * d_t for name, count in self._neurons.items()}
        ours = {name: 4 * count * d_s for name, count in self._neurons.items()}
        network, changes = 4 * self.parameters, 4 * self.changed
        # v's rows are sums of their own; the other changes are views of what was translated
        own = 4 * self.job.blocks * self._rows("v") * d_s if "v" in types else 0
        # each neuron and its hidden layer, which the backward looks at
        kept = 2 * sum(theirs.values()) + sum(ours.values()) + own
        largest = max(theirs[name] + ours[name] for name in types)
        matrix = 4 * d_t * max(d_t, d_s)
        always = {
            "process": self.process + (located_bytes(self.job) if on_cpu else 0),
            "weights": bytes_in_memory(self.student, self.device),
        }
        found = {
            # they are stacked while the last step's gradients are there
            "match": {
                "hypernetwork": 4 * network,
                "neurons": sum(theirs.values()) if on_cpu else 0,
                "working memory": max(theirs.values()) if on_cpu else 0,
            },
            # the changes' gradients, summed up over the rows
            "rows": {
                "hypernetwork": 3 * network,
                "neurons": kept + changes,
                "activations": self._activations,
            },
            # these, and a scaled copy, go back
            "update": {
                "hypernetwork": 4 * network,
                "neurons": kept + 2 * changes,
                # AdamW's temporaries, of all matrices at once on a GPU
                "working memory": max(2 * largest, 2 * matrix if on_cpu else 2 * network),
            },
        }
        if on_cpu:  # the moments, as bytes of a file
            found["save"] = {"hypernetwork": 4 * network, "working memory": 2 * network}
        copies = changes if on_cpu else 0
        found["write"] = {"hypernetwork": 4 * network, "neurons": changes + copies}
        return {phase: always | parts for phase, parts in found.items()}

    def _rows(self, name: str) -> int:
        """Rows or columns of a block that neurons of this type change, at most."""
        count = self.job.counts[KIND[name]]
        return min(count, self.ours.kv_heads * self.ours.head_dim) if name == "v" else count

    @property
    def _dtype(self) -> torch.dtype:
        return dtype_in_memory(self.student)

    # --- one row through the student --------------------------------------------------------------

    def _row(self) -> int:
        """Peak bytes of one row's forward and backward, the changes' gradients included."""
        model = self._on_meta()
        with FakeTensorMode():
            changes = self._fakes(model)
            given = [*model.parameters(), *model.buffers()]
            given += [t for change in changes for t in (change.index, change.values)]
            with Tracker(given) as tracker:
                self._run(model, changes, gradients=True)
        return tracker.peak

    def _count(self, gradients: bool) -> int:
        """Operations of one row with its changes and their gradients, or as the student is."""
        model = self._on_meta()
        with FakeTensorMode():
            changes = self._fakes(model)
            with count_flops() as flops:
                self._run(model, changes if gradients else [], gradients)
        return flops.get_total_flops()

    def _on_meta(self):
        """The student in eval mode. Outside of fakes: some models make tensors of numbers."""
        config = self.student.checkpoint.config
        return on_meta(config, self._dtype, len(self.ours.blocks)).eval()

    def _fakes(self, model) -> list[Change]:
        """Its changes, of fake tensors, which its own weights become too."""
        device = fake_device(self.device)
        fill_with_fakes(model, device)
        paths, found = describe(model).blocks, []
        for block in range(self.job.blocks):
            for name in self.config.types:
                part = next(p for p in self.ours.projections[block] if p.role == name)
                width = part.shape[1] if name in ROW_ROLES else part.shape[0]
                values = torch.empty(self._rows(name), width, device=device, requires_grad=True)
                index = torch.empty(self._rows(name), dtype=torch.int64, device=device)
                path = f"{paths[block]}.{part.module}"
                found.append(Change(path, name in ROW_ROLES, index, values))
        return found

    def _run(self, model, changes: list[Change], gradients: bool) -> None:
        anatomy = describe(model)
        device = model.get_input_embeddings().weight.device
        length = -(-self._length // ALIGNMENT) * ALIGNMENT
        if anatomy.position_embedding:
            length = min(length, model.config.max_position_embeddings)
        ids = torch.zeros(1, length, dtype=torch.int64, device=device)
        kept = torch.zeros(self._targets, dtype=torch.int64, device=device)
        blocks = [model.get_submodule(path) for path in anatomy.blocks]
        again = recomputed(blocks if self.config.gradient_checkpointing and gradients else [])
        with (
            added(model, changes, torch.float32),
            again,
            torch.set_grad_enabled(gradients),
        ):
            losses = losses_at(model, ids, kept, [(kept, kept)])
            if gradients:
                torch.autograd.grad(losses.sum(), [change.values for change in changes])
