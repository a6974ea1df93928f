# SPDX-License-Identifier: Apache-2.0
"""Sensitivities that are taken when they are first read, for all rows in one pass.

The published script scores one row at a time and adds every row's scores up in a loop of its own:
the model, its gradients, the sum and the row's scores lie in memory at once. Here what a row gives
is a `DeferredScore`, a tensor without values. Adding two with `+=` joins their rows. Once blocks
are chosen, one pass over all rows finds the blocks' totals and the windows that the script is about
to ask for (`Ledger.search`), with the scores of a single block in memory. Whatever else is done
with a score first takes the scores of all parameters, in a pass of its own.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from pkt_ext import ops
from pkt_ext.attribution.outer import OuterScores
from pkt_ext.attribution.sensitivity import BlockScores, every_score, stream_sensitivity
from pkt_ext.compat._weights import checksum, version
from pkt_ext.errors import InputError
from pkt_ext.streaming.batches import Sample
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import Allotment, fit
from pkt_ext.streaming.checkpoint import Checkpoint

_TOKENS = 512  # of a micro-batch; rows longer than that go alone
_HEAD_ROWS = 4096  # of the head at a time, on a CPU

Rows = tuple[int, ...]  # numbers of a ledger's rows; one may occur twice
Shape = tuple[int, int]


@dataclass(frozen=True)
class Found:
    """What one pass has found of some rows."""

    totals: dict[str, float] = field(default_factory=dict)  # by parameter of a block
    corners: dict[tuple[str, Shape], Shape] = field(default_factory=dict)  # (name, size) -> corner


class Ledger:
    """The rows for which a model in memory has been asked for its scores.

    Raises:
        InputError: a model that cannot be scored block by block.
    """

    def __init__(self, model):
        check_scorable(model)
        self.model, self.kind = model, kind_of(model)
        self.stream = StreamedModel(Checkpoint.open(model), device=model.device)
        if self.stream.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise InputError(f"the model is {self.stream.dtype}; scores are taken up to float32")
        self.names = [n for n, p in model.named_parameters() if p.requires_grad]
        if not self.names:
            raise InputError("no parameter of the model requires grad")
        self.calls = 0  # rows asked for, those that count for nothing included
        self._samples: list[Sample] = []
        self._versions: list[tuple] = []  # of the weights, by row
        self._sums: dict[tuple, list[int]] = {}  # the weights' checksums, by their versions
        self._scores: list[weakref.ref[DeferredScore]] = []
        self._searched: tuple[Rows, Found] = (), Found()

    def add(self, sample: Sample | None) -> dict[str, DeferredScore]:
        """The scores of one row, by parameter name; None is a row that no loss looks at."""
        rows: Rows = ()
        if sample is not None:
            self.stream.check([sample])
            rows = (len(self._samples),)
            self._samples.append(sample)
            self._versions.append(self._version())
            if self._versions[-1] not in self._sums:
                self._sums[self._versions[-1]] = self._checksums()
        return {name: self.score(name, rows) for name in self.names}

    def score(self, name: str, rows: Rows) -> DeferredScore:
        """The score of one parameter over some rows, not taken yet."""
        score = DeferredScore(self, name, rows)
        self._scores.append(weakref.ref(score))
        return score

    def search(self, rows: Rows, sizes: Mapping[str, Shape]) -> Found:
        """Totals of all parameters of blocks, and the best windows of those in `sizes`.

        Args:
            sizes: parameter name -> (height, width); what is larger than the parameter is left out.
        """
        known, found = self._searched
        if rows == known and all((name, size) in found.corners for name, size in sizes.items()):
            return found
        found, blocks = Found(), self.stream.anatomy.blocks

        def of_block(block: BlockScores) -> None:
            for name, score in block.scores.items():
                name = f"{blocks[block.index]}.{name}"
                if fits(sizes.get(name), score.shape):
                    row, col, _ = ops.max_window(score, *sizes[name])
                    found.corners[name, sizes[name]] = int(row), int(col)
            totals = {f"{blocks[block.index]}.{n}": t for n, t in block.totals.items()}
            found.totals.update(totals)

        def of_outer(outer: OuterScores) -> None:
            name, width = outer.parameter, len(outer.column_sums)
            height = self.stream.anatomy.vocab_size
            # the score itself is never held: of windows, those of full height
            if name in sizes and sizes[name][0] == height and fits(sizes[name], (height, width)):
                _, col, _ = ops.max_window(outer.column_sums[None], 1, sizes[name][1])
                found.corners[name, sizes[name]] = 0, int(col)

        if rows:
            outside = {self.stream.embedding_name, self.stream.head_name} & set(sizes)
            samples = self._current(rows)
            with _own_modes(self.stream.device):
                stream_sensitivity(
                    self.stream,
                    samples,
                    allotment=self._allotment(samples),
                    on_block=of_block,
                    on_outer=of_outer if outside else None,
                )
        self._searched = rows, found
        return found

    def corner(self, name: str, rows: Rows, size: Shape) -> Shape | None:
        """Where the best window of this size starts, if a search has looked for it."""
        known, found = self._searched
        return found.corners.get((name, size)) if rows == known else None

    def take(self, rows: Rows) -> None:
        """Give their values to all open scores over these rows, in one pass."""
        living = [score for ref in self._scores if (score := ref()) is not None]
        taking = [score for score in living if score.rows == rows]
        scores: dict[str, torch.Tensor] = {}
        if rows:
            samples = self._current(rows)
            allotment = self._allotment(samples)
            with _own_modes(self.stream.device):
                batches = self.stream.batches(samples, allotment.micro_batch)
                scores = every_score(self.stream, batches, allotment)
        given: set[str] = set()
        for score in taking:
            if not rows:
                value = torch.zeros(score.shape, device=score.device)
            elif score.parameter in given:  # two scores of one parameter are two tensors
                value = scores[score.parameter].clone()
            else:
                value = scores[score.parameter]
            given.add(score.parameter)
            score.settle(value)
        self._scores = [weakref.ref(score) for score in living if score.ledger is self]

    def _allotment(self, samples: list[Sample]) -> Allotment:
        """Lean on a CPU, where the script has its model in memory already; on a GPU as it fits."""
        longest = max(len(sample.input_ids) for sample in samples)
        micro_batch = max(1, _TOKENS // longest)
        if self.stream.device.type == "cpu":
            return Allotment(micro_batch, head_rows=_HEAD_ROWS)
        return fit(self.stream, samples, None, micro_batch=micro_batch).allotment

    def _version(self) -> tuple:
        """What an in-place operation on a weight, or another tensor in its place, changes."""
        return tuple((p.data_ptr(), version(p)) for p in self.model.parameters())

    def _checksums(self) -> list[int]:
        """What an edit through `.data` changes."""
        return [checksum(parameter) for parameter in self.model.parameters()]

    def _current(self, rows: Rows) -> list[Sample]:
        """The rows' samples, if the weights are still those they were to be scored with."""
        now = self._version()
        known = all(self._versions[row] == now for row in rows)
        if not known or self._sums[now] != self._checksums():
            raise InputError(
                "the model's weights changed between calculate_sensitivity and the first use of "
                "its scores; read a score (sensitivity[name].sum()) before changing the model, or "
                "call pkt_ext.compat.paraknowtransfer.calculate_sensitivity, which does not defer"
            )
        return [self._samples[row] for row in rows]


@contextmanager
def _own_modes(device: torch.device) -> Iterator[None]:
    """Whatever modes the script reads its scores in."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        yield


def kind_of(model) -> list[tuple]:
    """What a ledger takes for granted of its model's parameters."""
    return [(n, p.shape, p.dtype, p.device, p.requires_grad) for n, p in model.named_parameters()]


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_scorable(model) -> None:
    """Refuse models that do not compute what transformers' own of their configuration does.

    A subclass will do, if it leaves `forward` alone.

    Raises:
        InputError: the model, by what is its own.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"expected a transformers PreTrainedModel, got {type(model).__name__}")
    if len({p.device for p in model.parameters()}) > 1:
        raise InputError("the model is spread over several devices")
    for path, module in model.named_modules():
        hooks = any(vars(module).get(name) for name in _HOOKS)
        theirs = type(module).forward.__module__.startswith(("transformers.", "torch."))
        if hooks or not theirs or "forward" in vars(module):
            what = "hooks" if hooks else "a forward of its own"
            raise InputError(f"{path or type(model).__name__} has {what}")
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise InputError(f"{name} has hooks on its gradient")


_LEDGERS: weakref.WeakValueDictionary[int, Ledger] = weakref.WeakValueDictionary()


def ledger_of(model) -> Ledger:
    """The model's ledger, for as long as somebody holds one of its scores that is not taken."""
    ledger = _LEDGERS.get(id(model))
    if ledger is None or ledger.kind != kind_of(model):
        _LEDGERS[id(model)] = ledger = Ledger(model)
    else:
        check_scorable(model)
    return ledger


_sparing: set[int] = set()  # ids of ledgers


def spare_collections(ledger: Ledger) -> None:
    """Make `gc.collect()` cheap for as long as the ledger lives.

    The published loop calls it after every row, and each time it would go through all the objects
    of torch and transformers. What is there by now is exempt until the last ledger goes. Where the
    user has frozen objects already, nothing is done.
    """
    if not _sparing:
        if gc.get_freeze_count():
            return
        gc.collect()
        gc.freeze()
    if id(ledger) not in _sparing:
        _sparing.add(id(ledger))
        weakref.finalize(ledger, _stop_sparing, id(ledger))


def _stop_sparing(number: int) -> None:
    _sparing.discard(number)
    if not _sparing:
        gc.unfreeze()


def fits(size: Shape | None, shape: torch.Size | Shape) -> bool:
    """Whether there is a window of this size in a matrix of this shape."""
    if size is None or len(shape) != 2:
        return False
    return all(1 <= n <= m for n, m in zip(size, shape, strict=True))


class DeferredScore(torch.Tensor):
    """float32 scores of one parameter, of its shape; any use but those below takes their values.

    `a += b` joins the rows of two scores of the same parameter; shape, dtype and device are known;
    `t()` and `T` are deferred too.
    """

    ledger: Ledger | None  # None once the values are there
    parameter: str  # its name
    rows: Rows

    @staticmethod
    def __new__(cls, ledger: Ledger, name: str, rows: Rows, base: DeferredScore | None = None):
        parameter = ledger.model.get_parameter(name)
        shape = parameter.shape if base is None else parameter.shape[::-1]
        score = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=torch.float32, device=parameter.device
        )
        score.ledger, score.parameter, score.rows = ledger, name, rows
        score._base_score, score._value = base, None
        return score

    def value(self) -> torch.Tensor:
        """The scores themselves, an ordinary tensor."""
        if self._base_score is not None:
            return self._base_score.value().t()
        if self._value is None:
            self.ledger.take(self.rows)
        return self._value

    def settle(self, value: torch.Tensor) -> None:
        """These are the values."""
        self._value, self.ledger = value, None

    def corner(self, height: int, width: int) -> Shape | None:
        """Where the best window starts, if that is known without taking the scores."""
        if self._base_score is not None:
            found = self._base_score.corner(width, height)
            return found and found[::-1]
        if self._value is not None:
            return None
        return self.ledger.corner(self.parameter, self.rows, (height, width))

    def _join(self, other) -> DeferredScore:
        """`self += other` where both are open; else NotImplemented."""
        if not (isinstance(self, DeferredScore) and isinstance(other, DeferredScore)):
            return NotImplemented
        if not (self.is_open and other.is_open):
            return NotImplemented
        if self.ledger is not other.ledger or self.parameter != other.parameter:
            return NotImplemented
        self.rows += other.rows
        return self

    @property
    def is_open(self) -> bool:
        """Whether nothing is known of it but its rows."""
        return self._value is None and self._base_score is None

    def _transposed(self) -> DeferredScore:
        if self.ndim != 2 or self._base_score is not None:
            return NotImplemented
        return DeferredScore(self.ledger, self.parameter, self.rows, self)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """What is known without the scores, or `func` of their values."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _KNOWN:
                return func(*args, **kwargs)
            if func in _OPEN and not kwargs:
                found = _OPEN[func](*args)
                if found is not NotImplemented:
                    return found
        plain = tree_map(lambda x: x.value() if isinstance(x, cls) else x, (args, kwargs))
        return func(*plain[0], **plain[1])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Reached by torch's own inner calls only, past `__torch_function__`."""

        def value(x):
            if not isinstance(x, cls):
                return x
            with ThreadPoolExecutor(1) as fresh:  # here autograd is behind us: nothing can be taken
                return fresh.submit(x.value).result()

        plain = tree_map(value, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


_OPEN = {
    torch.Tensor.__iadd__: DeferredScore._join,
    torch.Tensor.add_: DeferredScore._join,
    torch.Tensor.t: DeferredScore._transposed,
    torch.t: DeferredScore._transposed,
    torch.Tensor.T.__get__: DeferredScore._transposed,
}
_KNOWN = {
    torch.Tensor.__hash__,
    torch.Tensor.__len__,
    torch.Tensor.dim,
    torch.Tensor.is_floating_point,
    torch.Tensor.nelement,
    torch.Tensor.numel,
    torch.Tensor.size,
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("device", "dtype", "is_leaf", "layout", "ndim", "requires_grad", "shape")
    ),
}


def rows_of(scores: list[DeferredScore]) -> tuple[Ledger, Rows] | None:
    """Whose and which rows all of these are sums over; None where they differ or are taken."""
    first = scores[0]
    if not all(score.is_open for score in scores):
        return None
    same = all(s.ledger is first.ledger and s.rows == first.rows for s in scores)
    return (first.ledger, first.rows) if same else None
