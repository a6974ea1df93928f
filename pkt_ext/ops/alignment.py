# SPDX-License-Identifier: Apache-2.0
"""Losses that align a student's outputs and hidden states with a teacher's, row by row.

Row kernels work in place: they are given float32 logits and leave the gradient there. Through
frozen heads, logits exist a chunk of rows at a time, and what is kept for the backward pass is the
gradient by the hidden states, [M, D]: three products with a head (two where there is a label), and
memory that does not grow with the number of rows. Every loss is per row: weigh and add them up
outside.

c(z) = cap tanh(z / cap) is a model's soft cap on its logits (Gemma 2), c(z) = z for None.

A row with a NaN or an infinity, among logits, targets or states, has a NaN loss and a gradient of
NaN, and does not touch its neighbours. Sums over a row are float32 lanes within 512 columns and
float64 beyond (on a GPU four columns and float64): losses and gradients are within 2^-18 of their
terms' magnitudes of what float64 makes of the same float32 logits, a cap adds 2^-20 cap / tau. Our
part has equal bits on any thread count and in every run; torch's products need not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import cosine_similarity

from pkt_ext.ops import _backend
from pkt_ext.ops._head_products import HeadProducts, chunk_rows
from pkt_ext.ops._workers import spans

CPU_CHUNK_BYTES = 256 << 20  # 220 rows of both logits at a vocabulary of 152k
CUDA_CHUNK_BYTES = 1 << 30
_TINY = 1e-38  # a norm that only zeros are below
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


# --- rows of logits, in place ---------------------------------------------------------------------


def kl_rows_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    cap: float | None = None,
    target_cap: float | None = None,
) -> torch.Tensor:
    """tau^2 KL(softmax(c(targets) / tau) || softmax(c(logits) / tau)) of every row, float32 [M].

    No token's part of the loss is negative and equal rows give exactly 0. The part of a token whose
    two probabilities are within a factor of 1.6 is formed without cancellation.

    Args:
        logits:      [M, V] float32, rows contiguous and as far apart as you like; becomes the
                     gradient of the losses' sum by the logits as given, before the cap.
        targets:     [M, V] float32, float16 or bfloat16; copied unless rows are contiguous.
        temperature: tau, positive.
        cap:         of the logits.
        target_cap:  of the targets.
    Raises:
        ValueError: shapes or devices differ, logits whose rows are not contiguous or overlap, a
            tensor that requires a gradient, a temperature or cap that is not positive.
        TypeError:  a dtype not listed above.
    Source: Hinton et al., arXiv 1503.02531, with Kullback and Leibler's divergence.
    """
    _check_rows(logits, targets, temperature, cap, target_cap)
    return _kl_rows(logits, targets, temperature, cap or 0.0, target_cap or 0.0)


def fisher_rows_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    cap: float | None = None,
) -> torch.Tensor:
    """(sum p D^2 - (sum p D)^2) / 2 of every row, float32 [M], formed as sum p (D - sum p D)^2 / 2.

    p = softmax(c(targets) / tau), D = c(logits) - c(targets): the second-order expansion of
    `kl_rows_` at the targets. Arguments and errors are those of `kl_rows_`.

    Source: METHODS A9.
    """
    _check_rows(logits, targets, temperature, cap)
    return _fisher_rows(logits, targets, temperature, cap or 0.0)


def cosine_onehot_rows_(
    logits: torch.Tensor, labels: torch.Tensor, *, cap: float | None = None
) -> torch.Tensor:
    """1 - c(z)_y / |c(z)| of every row, float32 [M]; a zero row has loss 1 and gradient 0.

    Args:
        logits: as for `kl_rows_`; magnitudes up to 1e18.
        labels: [M] int64 y. Those on a GPU are not validated, which would wait for it; a row whose
                label is no column is like one with a NaN.
        cap:    of the logits.
    Raises:
        ValueError, TypeError: as `kl_rows_`; on the CPU also a label that is no column.
    Source: METHODS A8.
    """
    _check_labels(logits, labels, cap)
    return _cosine_onehot_rows(logits, labels, cap or 0.0)


def cross_entropy_rows_(
    logits: torch.Tensor, labels: torch.Tensor, *, cap: float | None = None
) -> torch.Tensor:
    """log sum exp(c(z)) - c(z)_y of every row, float32 [M], for any confidence to its last digits.

    Arguments and errors are those of `cosine_onehot_rows_`.
    """
    _check_labels(logits, labels, cap)
    return _cross_entropy_rows(logits, labels, cap or 0.0)


@torch.library.custom_op("pkt_ext::kl_rows_", mutates_args=("logits",))
def _kl_rows(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float, cap: float, target_cap: float
) -> torch.Tensor:
    return _to_targets("kl_rows", logits, targets, temperature, cap, target_cap)


@torch.library.custom_op("pkt_ext::fisher_rows_", mutates_args=("logits",))
def _fisher_rows(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float, cap: float
) -> torch.Tensor:
    return _to_targets("fisher_rows", logits, targets, temperature, cap, cap)


@torch.library.custom_op("pkt_ext::cosine_onehot_rows_", mutates_args=("logits",))
def _cosine_onehot_rows(logits: torch.Tensor, labels: torch.Tensor, cap: float) -> torch.Tensor:
    return _to_labels("cosine_onehot_rows", logits, labels, cap)


@torch.library.custom_op("pkt_ext::cross_entropy_rows_", mutates_args=("logits",))
def _cross_entropy_rows(logits: torch.Tensor, labels: torch.Tensor, cap: float) -> torch.Tensor:
    return _to_labels("cross_entropy_rows", logits, labels, cap)


@_kl_rows.register_fake
@_fisher_rows.register_fake
@_cosine_onehot_rows.register_fake
@_cross_entropy_rows.register_fake
def _(logits, *_):
    return logits.new_empty(logits.shape[0])


def _to_targets(kernel: str, logits, targets, temperature, cap, target_cap) -> torch.Tensor:
    loss = logits.new_zeros(len(logits))
    with _backend.device_of(logits) as launch:
        run = getattr(_backend._C, kernel)
        run(loss, logits, _dense_rows(targets), temperature, cap, target_cap, **launch)
    return loss


def _to_labels(kernel: str, logits, labels, cap) -> torch.Tensor:
    loss = logits.new_zeros(len(logits))
    with _backend.device_of(logits) as launch:
        getattr(_backend._C, kernel)(loss, logits, labels.contiguous(), cap, **launch)
    return loss


def _dense_rows(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.ndim != 2 or rows.stride(1) == 1 else rows.contiguous()


# --- through frozen heads -------------------------------------------------------------------------


def head_kl(
    states: torch.Tensor,
    head: torch.Tensor,
    teacher_states: torch.Tensor,
    teacher_head: torch.Tensor,
    *,
    temperature: float = 1.0,
    cap: float | None = None,
    teacher_cap: float | None = None,
    chunk_bytes: int | None = None,
) -> torch.Tensor:
    """`kl_rows_` of states head^T to teacher_states teacher_head^T, float32 [M].

    The gradient by `states` is formed along with the losses where it is wanted, and kept in float32
    until the backward pass, which scales its rows; a second derivative is refused there. Logits are
    float32 whatever the operands: on a GPU 16-bit operands of one dtype are multiplied as they are,
    and the logits' gradient is rounded to that dtype for its product; everywhere else products are
    float32, torch's precision settings permitting. Autocast does not reach inside.

    Args:
        states:         [M, D] float32, float16 or bfloat16.
        head:           [V, D] likewise, any strides; frozen.
        teacher_states: [M, D'] likewise; a constant.
        teacher_head:   [V, D'] likewise, the same tokens in the same order; frozen.
        temperature:    tau, positive.
        cap:            of the student's logits.
        teacher_cap:    of the teacher's.
        chunk_bytes:    memory beside result and gradient, at least a row's; None: 256 MiB on a CPU,
                        1 GiB on a GPU.
    Raises:
        ValueError: shapes or devices differ, an operand beside states that requires a gradient, a
            temperature, cap or budget that is not positive.
        TypeError:  a dtype not listed above.
    """
    operands = {"states": states, "head": head}
    operands |= {"teacher_states": teacher_states, "teacher_head": teacher_head}
    _check_heads(operands, temperature=temperature, cap=cap, teacher_cap=teacher_cap)
    budget = _budget(chunk_bytes, states.device.type)
    fixed = (head, teacher_states, teacher_head, temperature, cap or 0.0, teacher_cap or 0.0)
    return _attach(states, lambda x, wanted: _head_kl(x, *fixed, budget, wanted))


def head_fisher(
    states: torch.Tensor,
    targets: torch.Tensor,
    head: torch.Tensor,
    *,
    temperature: float = 1.0,
    cap: float | None = None,
    chunk_bytes: int | None = None,
) -> torch.Tensor:
    """`fisher_rows_` of states head^T to targets head^T, float32 [M]; as `head_kl` for the rest.

    Args:
        targets: [M, D] float32, float16 or bfloat16: the states to align with; a constant.
    """
    operands = {"states": states, "head": head, "targets": targets}
    _check_heads(operands, temperature=temperature, cap=cap)
    budget = _budget(chunk_bytes, states.device.type)
    fixed = (targets, head, temperature, cap or 0.0)
    return _attach(states, lambda x, wanted: _head_fisher(x, *fixed, budget, wanted))


def head_cosine_onehot(
    states: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    *,
    cap: float | None = None,
    chunk_bytes: int | None = None,
) -> torch.Tensor:
    """`cosine_onehot_rows_` of states head^T, float32 [M]; as `head_kl` for the rest.

    Args:
        labels: [M] int64; on the CPU those that are no token are refused.
    """
    _check_heads({"states": states, "head": head}, cap=cap)
    _check_label_range(labels, len(states), len(head))
    budget = _budget(chunk_bytes, states.device.type)
    return _attach(
        states, lambda x, wanted: _head_cosine_onehot(x, head, labels, cap or 0.0, budget, wanted)
    )


def head_cross_entropy(
    states: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    *,
    cap: float | None = None,
    chunk_bytes: int | None = None,
) -> torch.Tensor:
    """`cross_entropy_rows_` of states head^T, float32 [M]; as `head_cosine_onehot` for the rest."""
    _check_heads({"states": states, "head": head}, cap=cap)
    _check_label_range(labels, len(states), len(head))
    budget = _budget(chunk_bytes, states.device.type)
    return _attach(
        states, lambda x, wanted: _head_cross_entropy(x, head, labels, cap or 0.0, budget, wanted)
    )


def head_bytes(
    rows: int,
    heads: Sequence[torch.Tensor],
    dtype: torch.dtype,
    device: str,
    chunk_bytes: int | None = None,
) -> int:
    """The memory that the losses above take beside result and gradient.

    Args:
        rows:   of states.
        heads:  one for each product with a head, as the op is given them; meta tensors will do.
        dtype:  of the states.
        device: "cpu" or "cuda", which need not be here.
    """
    budget = _budget(chunk_bytes, device)
    products = [
        HeadProducts(head.detach().to("meta"), dtype, budget, device=device) for head in heads
    ]
    at_once = chunk_rows(products, rows, budget)
    return sum(one.fixed_bytes + at_once * one.row_bytes for one in products)


# Each returns the losses [M] and the gradient by the states, float32 [M, D], or empty where it is
# not wanted.
@torch.library.custom_op("pkt_ext::head_kl", mutates_args=())
def _head_kl(
    states: torch.Tensor,
    head: torch.Tensor,
    teacher_states: torch.Tensor,
    teacher_head: torch.Tensor,
    temperature: float,
    cap: float,
    teacher_cap: float,
    chunk_bytes: int,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    teacher = HeadProducts(teacher_head, teacher_states.dtype, chunk_bytes)

    def compare(part: slice, logits: torch.Tensor, space: torch.Tensor | None) -> torch.Tensor:
        targets = teacher.logits(teacher_states[part], space)
        return _to_targets("kl_rows", logits, targets, temperature, cap, teacher_cap)

    return _in_chunks(states, head, compare, chunk_bytes, gradient, teacher)


@torch.library.custom_op("pkt_ext::head_fisher", mutates_args=())
def _head_fisher(
    states: torch.Tensor,
    targets: torch.Tensor,
    head: torch.Tensor,
    temperature: float,
    cap: float,
    chunk_bytes: int,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    lens = HeadProducts(head, targets.dtype, chunk_bytes)

    def compare(part: slice, logits: torch.Tensor, space: torch.Tensor | None) -> torch.Tensor:
        return _to_targets(
            "fisher_rows", logits, lens.logits(targets[part], space), temperature, cap, cap
        )

    return _in_chunks(states, head, compare, chunk_bytes, gradient, lens)


@torch.library.custom_op("pkt_ext::head_cosine_onehot", mutates_args=())
def _head_cosine_onehot(
    states: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    cap: float,
    chunk_bytes: int,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    def compare(part: slice, logits: torch.Tensor, _) -> torch.Tensor:
        return _to_labels("cosine_onehot_rows", logits, labels[part], cap)

    return _in_chunks(states, head, compare, chunk_bytes, gradient)


@torch.library.custom_op("pkt_ext::head_cross_entropy", mutates_args=())
def _head_cross_entropy(
    states: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    cap: float,
    chunk_bytes: int,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    def compare(part: slice, logits: torch.Tensor, _) -> torch.Tensor:
        return _to_labels("cross_entropy_rows", logits, labels[part], cap)

    return _in_chunks(states, head, compare, chunk_bytes, gradient)


@_head_kl.register_fake
@_head_fisher.register_fake
@_head_cosine_onehot.register_fake
@_head_cross_entropy.register_fake
def _(states, *arguments):
    return _results(states, arguments[-1])


def _results(states: torch.Tensor, gradient: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows = states.shape[0] if gradient else 0
    return (
        states.new_empty(states.shape[0], dtype=torch.float32),
        states.new_empty((rows, states.shape[1]), dtype=torch.float32),
    )


def _in_chunks(
    states: torch.Tensor,
    head: torch.Tensor,
    compare: Callable[[slice, torch.Tensor, torch.Tensor | None], torch.Tensor],
    budget: int,
    gradient: bool,
    other: HeadProducts | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses, and gradients by the states, of as many rows at a time as fit the budget.

    `compare(rows, logits, space)` gives a chunk's losses and leaves the logits' gradient in their
    place; `space` is for the logits of `other`, the product that it compares with.
    """
    loss, gradients = _results(states, gradient)
    with torch.no_grad(), torch.autocast(states.device.type, enabled=False):
        products = HeadProducts(head, states.dtype, budget)
        both = [products] if other is None else [products, other]
        rows = chunk_rows(both, len(states), budget)
        space = products.buffer(rows)
        other_space = None if other is None else other.buffer(rows)
        for part in spans(len(states), rows):
            logits = products.logits(states[part], space)
            loss[part] = compare(part, logits, other_space)
            if gradient:
                products.back(logits, gradients[part])
            del logits  # before the next are allocated
    return loss, gradients


class _Attached(torch.autograd.Function):
    """Losses whose gradient by the states is known."""

    @staticmethod
    def forward(ctx, states, loss, gradient):
        ctx.save_for_backward(gradient)
        ctx.dtype = states.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        _refuse_second_derivative()
        (gradient,) = ctx.saved_tensors
        return (upstream.float()[:, None] * gradient).to(ctx.dtype), None, None


def _attach(states: torch.Tensor, run: Callable) -> torch.Tensor:
    """run(states, is the gradient wanted) -> losses, gradient; the losses, as autograd has them."""
    wanted = torch.is_grad_enabled() and states.requires_grad
    loss, gradient = run(states.detach(), wanted)
    return _Attached.apply(states, loss, gradient) if wanted else loss


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # within a backward pass: create_graph=True
        raise NotImplementedError(
            "alignment losses have no second derivative; call backward without create_graph=True"
        )


# --- hidden states --------------------------------------------------------------------------------


def cosine_loss(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """1 - cos(states, targets) of every row, float32 [M]; a zero row has loss 1 and gradient 0.

    Differentiable once, by the states; the gradient has their dtype. Equal rows give exactly 0. On
    a CPU sums are float64, on a GPU float32 in a thread and float64 among them.

    Args:
        states:  [M, D] float32, float16 or bfloat16, copied unless rows are contiguous; rows whose
                 norm is between 1e-18 and 1e18, or 0.
        targets: [M, D] likewise, of any of these dtypes; a constant.
    Raises:
        ValueError: shapes or devices differ, targets that require a gradient.
        TypeError:  a dtype not listed above.
    Source: METHODS A7.
    """
    _check_constants({"targets": targets})
    return _CosineLoss.apply(states, targets)


class _CosineLoss(torch.autograd.Function):
    """Forward and backward kernel."""

    @staticmethod
    def forward(ctx, states, targets):
        loss, factors = _cosine_rows(states, targets)
        ctx.save_for_backward(states, targets, factors)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        _refuse_second_derivative()
        states, targets, factors = ctx.saved_tensors
        return _cosine_rows_backward(upstream, factors, states, targets), None


@torch.library.custom_op("pkt_ext::cosine_rows", mutates_args=())
def _cosine_rows(states: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [M], and [M, 2] what their gradient multiplies targets and states with."""
    loss = states.new_empty(len(states), dtype=torch.float32)
    factors = states.new_empty((len(states), 2), dtype=torch.float32)
    with _backend.device_of(states) as launch:
        _backend._C.cosine_rows(loss, factors, _dense_rows(states), _dense_rows(targets), **launch)
    return loss, factors


@_cosine_rows.register_fake
def _(states, targets):
    rows = states.shape[0]
    return (
        states.new_empty(rows, dtype=torch.float32),
        states.new_empty((rows, 2), dtype=torch.float32),
    )


@torch.library.custom_op("pkt_ext::cosine_rows_backward", mutates_args=())
def _cosine_rows_backward(
    upstream: torch.Tensor, factors: torch.Tensor, states: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    gradient = states.new_empty(states.shape)
    operands = (upstream.float().contiguous(), factors, _dense_rows(states), _dense_rows(targets))
    with _backend.device_of(states) as launch:
        _backend._C.cosine_rows_backward(gradient, *operands, **launch)
    return gradient


@_cosine_rows_backward.register_fake
def _(upstream, factors, states, targets):
    return states.new_empty(states.shape)


# --- plain torch ----------------------------------------------------------------------------------


def kl_rows_reference(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    cap: float | None = None,
    target_cap: float | None = None,
) -> torch.Tensor:
    """Plain torch, differentiable, in the operands' dtype (float64 for the truth)."""
    log_q = (_capped(logits, cap) / temperature).log_softmax(-1)
    log_p = (_capped(targets, target_cap) / temperature).log_softmax(-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def fisher_rows_reference(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    cap: float | None = None,
) -> torch.Tensor:
    """Plain torch, differentiable, in the operands' dtype."""
    targets = _capped(targets, cap)
    probs = (targets / temperature).softmax(-1)
    apart = _capped(logits, cap) - targets
    return ((probs * apart.square()).sum(-1) - (probs * apart).sum(-1).square()) / 2


def cosine_onehot_rows_reference(
    logits: torch.Tensor, labels: torch.Tensor, *, cap: float | None = None
) -> torch.Tensor:
    """Plain torch, differentiable, in the logits' dtype."""
    onehot = torch.nn.functional.one_hot(labels, logits.shape[-1]).to(logits.dtype)
    return 1 - cosine_similarity(_capped(logits, cap), onehot, dim=-1, eps=_TINY)


def cross_entropy_rows_reference(
    logits: torch.Tensor, labels: torch.Tensor, *, cap: float | None = None
) -> torch.Tensor:
    """Plain torch, differentiable, in the logits' dtype."""
    return torch.nn.functional.cross_entropy(_capped(logits, cap), labels, reduction="none")


def head_kl_reference(
    states: torch.Tensor,
    head: torch.Tensor,
    teacher_states: torch.Tensor,
    teacher_head: torch.Tensor,
    *,
    temperature: float = 1.0,
    cap: float | None = None,
    teacher_cap: float | None = None,
) -> torch.Tensor:
    """Plain torch, all logits at once, differentiable by everything."""
    logits, targets = states @ head.T, teacher_states @ teacher_head.T
    return kl_rows_reference(
        logits, targets, temperature=temperature, cap=cap, target_cap=teacher_cap
    )


def head_fisher_reference(
    states: torch.Tensor,
    targets: torch.Tensor,
    head: torch.Tensor,
    *,
    temperature: float = 1.0,
    cap: float | None = None,
) -> torch.Tensor:
    """Plain torch, all logits at once, differentiable by everything."""
    return fisher_rows_reference(
        states @ head.T, targets @ head.T, temperature=temperature, cap=cap
    )


def head_cosine_onehot_reference(
    states: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, *, cap: float | None = None
) -> torch.Tensor:
    """Plain torch, all logits at once, differentiable by everything."""
    return cosine_onehot_rows_reference(states @ head.T, labels, cap=cap)


def head_cross_entropy_reference(
    states: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, *, cap: float | None = None
) -> torch.Tensor:
    """Plain torch, all logits at once, differentiable by everything."""
    return cross_entropy_rows_reference(states @ head.T, labels, cap=cap)


def cosine_loss_reference(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Plain torch, differentiable, in the operands' dtype."""
    return 1 - cosine_similarity(states, targets, dim=-1, eps=_TINY)


def _capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


# --- checks ---------------------------------------------------------------------------------------


def _check_positive(**numbers: float | None) -> None:
    for name, number in numbers.items():
        wanted = "a positive number" if name == "temperature" else "a positive number or None"
        if number is None and name != "temperature":
            continue
        if not isinstance(number, (int, float)) or not 0 < number < math.inf:
            raise ValueError(f"{name}: expected {wanted}, got {number}")


def _check_constants(tensors: dict[str, torch.Tensor]) -> None:
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient, which this op does not form; pass {name}.detach()"
            )


def _check_rows(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    cap: float | None,
    target_cap: float | None = None,
) -> None:
    _check_constants({"logits": logits, "targets": targets})
    _check_positive(temperature=temperature, cap=cap, target_cap=target_cap)
    if logits.numel() and logits.data_ptr() == targets.data_ptr():
        raise ValueError("targets: shares its memory with logits, which are overwritten; clone it")


def _check_labels(logits: torch.Tensor, labels: torch.Tensor, cap: float | None) -> None:
    _check_constants({"logits": logits})
    _check_positive(cap=cap)
    if logits.ndim == 2:  # otherwise the binding says what is wrong
        _check_label_range(labels, *logits.shape)


def _check_label_range(labels: torch.Tensor, rows: int, vocab: int) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected dtype int64, got {labels.dtype}")
    if list(labels.shape) != [rows]:
        raise ValueError(f"labels: expected shape [{rows}], got {list(labels.shape)}")
    if not labels.is_cpu or isinstance(labels, FakeTensor) or not rows:
        return  # no values to look at, or only by waiting for the GPU
    if not 0 <= int(labels.min()) <= int(labels.max()) < vocab:
        lowest, highest = int(labels.min()), int(labels.max())
        raise ValueError(
            f"labels: expected tokens from 0 to {vocab - 1}, got {lowest} to {highest}"
        )


def _check_heads(operands: dict[str, torch.Tensor], **numbers: float | None) -> None:
    """Operands by name: states and head, and what they are compared with."""
    for name, tensor in operands.items():
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}")
        if tensor.ndim != 2:
            raise ValueError(f"{name}: expected a matrix, got shape {list(tensor.shape)}")
        if tensor.device != operands["states"].device:
            at = operands["states"].device
            raise ValueError(f"{name}: lies on {tensor.device}, states on {at}")
    (rows, width), vocab = operands["states"].shape, len(operands["head"])
    wanted = {"head": [vocab, width], "targets": [rows, width]}
    if "teacher_head" in operands:
        teacher_width = operands["teacher_states"].shape[1]
        wanted |= {"teacher_states": [rows, teacher_width], "teacher_head": [vocab, teacher_width]}
    for name, shape in wanted.items():
        if name in operands and list(operands[name].shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {list(operands[name].shape)}")
    _check_constants({name: tensor for name, tensor in operands.items() if name != "states"})
    _check_positive(**numbers)


def _budget(chunk_bytes: int | None, device: str) -> int:
    if chunk_bytes is None:
        return CUDA_CHUNK_BYTES if device == "cuda" else CPU_CHUNK_BYTES
    if not isinstance(chunk_bytes, int) or chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes: expected a positive number of bytes, got {chunk_bytes}")
    return chunk_bytes
