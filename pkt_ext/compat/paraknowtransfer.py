# SPDX-License-Identifier: Apache-2.0
"""The functions of ParaKnowTransfer's extract_lora_with_sensitivity.py, by our kernels.

Names, arguments, their order and what is returned are the published ones. What is published and
wrong is kept where results depend on it, and said once; `fix=True` corrects it:

    function               as published                                 with fix=True
    calculate_sensitivity  a row whose prompt fills 2048 tokens         ValueError
                           counts for nothing, in silence
                           tied models: no score of lm_head.weight      the embedding's
    select_top_k_layers    fewer blocks than asked for are all kept     ValueError
    max_sens_submatrix     a NaN spoils windows below and right of it   ValueError
    svd                    r above the shorter side: factors that do    padded with zeros
                           not multiply
                           overflow of float16 gives infinities         ValueError

Always corrected: scores are float32 sums of |w * g| also for a model in half precision, windows are
compared by float64 sums (first in row-major order among equals), a model on a GPU works, and
gradients that are NaN or infinite are an error by name.

Source of the interface: Zhong et al., ICLR 2024 (arXiv 2310.11451), its released script.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch

from pkt_ext import ops
from pkt_ext.compat import notices
from pkt_ext.compat.deferred import (
    DeferredScore,
    Ledger,
    ledger_of,
    rows_of,
    spare_collections,
)
from pkt_ext.errors import InputError
from pkt_ext.rendering import published_prompt, published_turns
from pkt_ext.streaming.batches import IGNORED, Sample

__all__ = [
    "LORA_PARA",
    "NotSupported",
    "calculate_sensitivity",
    "compute_summed_area_table",
    "max_sens_submatrix",
    "resize_params",
    "select_top_k_layers",
    "sum_submatrix",
    "svd",
]

# Llama's sizes; `select_top_k_layers` reads the number of blocks, and the rest foresees windows
LORA_PARA = {
    "7b": {"dim": 4096, "ffn": 11008, "n_layer": 32},
    "13b": {"dim": 5120, "ffn": 13824, "n_layer": 40},
    "30b": {"dim": 6656, "ffn": 17920, "n_layer": 60},
    "65b": {"dim": 8192, "ffn": 22016, "n_layer": 80},
}

_MAX_LENGTH = 2048  # tokens kept of a row
_ROLES = ("system", "user", "assistant")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class NotSupported(InputError):
    """A model that cannot be scored block by block; a script's own function still can."""


# --- windows --------------------------------------------------------------------------------------


def compute_summed_area_table(matrix: torch.Tensor) -> torch.Tensor:
    """[N, D] -> [N, D]: the sum of all elements above and to the left of each, itself included."""
    return matrix.cumsum(0).cumsum(1)


def sum_submatrix(
    sum_area_table: torch.Tensor, top_left: tuple[int, int], bottom_right: tuple[int, int]
) -> torch.Tensor:
    """The sum over a window, corners inclusive, as a tensor without dimensions."""
    (top, left), (bottom, right) = top_left, bottom_right
    total = sum_area_table[bottom, right]
    if top > 0:
        total = total - sum_area_table[top - 1, right]
    if left > 0:
        total = total - sum_area_table[bottom, left - 1]
    if top > 0 and left > 0:
        total = total + sum_area_table[top - 1, left - 1]
    return total


def max_sens_submatrix(
    sens: torch.Tensor, tgt_x: int, tgt_y: int, *, fix: bool = False
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The tgt_x x tgt_y window of the largest sum (METHODS S5).

    Args:
        sens: [N, D].
    Returns:
        (row, column) of the first and of the last element. Sums are float64; among windows of equal
        sum the first in row-major order.
    Raises:
        ValueError: the window does not fit; NaN or infinity with `fix`.
    """
    corner = sens.corner(tgt_x, tgt_y) if isinstance(sens, DeferredScore) else None
    if corner is None:
        values = sens.value() if isinstance(sens, DeferredScore) else sens
        if values.ndim != 2:
            raise ValueError(f"expected a matrix, got shape {list(values.shape)}")
        values = values if values.is_floating_point() else values.double()
        row, col, _ = ops.max_window(values, tgt_x, tgt_y)
        corner = int(row), int(col)
        if corner[0] < 0:  # NaN or infinity
            if fix:
                raise ValueError(
                    "the scores hold NaN or infinity; leave out the row that they come from"
                )
            notices.once(
                "nan window",
                "the scores hold NaN or infinity: as published, every window whose last corner is "
                "below and right of one is passed over; fix=True makes it an error",
            )
            corner = _window_beside_nan(values, tgt_x, tgt_y)
    return corner, (corner[0] + tgt_x - 1, corner[1] + tgt_y - 1)


def _window_beside_nan(sens: torch.Tensor, height: int, width: int) -> tuple[int, int]:
    """What the published comparison of sums of which some are NaN ends with."""
    table = torch.nn.functional.pad(compute_summed_area_table(sens.double()), (1, 0, 1, 0))
    sums = table[height:, width:] - table[:-height, width:]
    sums = sums - table[height:, :-width] + table[:-height, :-width]
    sums = torch.where(sums.isnan(), -torch.inf, sums)
    place = int((sums == sums.max()).flatten().byte().argmax())
    return place // sums.shape[1], place % sums.shape[1]


def resize_params(
    params: torch.Tensor, sens: torch.Tensor, tgt_x: int, tgt_y: int, *, fix: bool = False
) -> torch.Tensor:
    """The window of `params` [N, D] where `sens` [N, D] sums to most; a view [tgt_x, tgt_y].

    Raises:
        ValueError: a window larger than the matrix, or two shapes.
    """
    if tgt_x > params.size(0) or tgt_y > params.size(1):
        raise ValueError(
            f"a matrix of {list(params.shape)} cannot grow to {tgt_x} x {tgt_y}: the teacher has "
            "to be the larger one in every dimension (pkt seeking leaves such a matrix out)"
        )
    if params.shape != sens.shape:
        raise ValueError(
            f"parameters are {list(params.shape)} and their sensitivities {list(sens.shape)}"
        )
    (top, left), (bottom, right) = max_sens_submatrix(sens, tgt_x, tgt_y, fix=fix)
    return params[top : bottom + 1, left : right + 1]


# --- factors --------------------------------------------------------------------------------------


def svd(mat: torch.Tensor, r: int, *, fix: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The best rank-r approximation in two factors, all singular values in the first (METHODS S6).

    Args:
        mat: [M, N], any floating dtype; nothing is differentiable.
    Returns:
        (U S [M, r], Vh [r, N]) in float16. Their product is within 1e-3 of the full SVD's, rounding
        to float16 included; a pair of columns and rows may have the other sign.
    Raises:
        ValueError: r below 0, NaN or infinity; an overflow of float16 with `fix`.
    """
    if mat.ndim != 2 or r < 0:
        raise ValueError(f"expected a matrix and r >= 0, got shape {list(mat.shape)} and r {r}")
    if r == 0:
        return mat.new_empty(len(mat), 0).half(), mat.new_empty(0, mat.shape[1]).half()
    rank = min(r, *mat.shape)
    b, a, report = ops.lora_factors(mat.detach(), rank, return_report=True)
    if not report.converged and report.error.isinf():
        notices.once(
            "svd gap",
            f"singular values {rank} and {rank + 1} of a matrix lie within 1e-4 of each other: the "
            "published factors are one choice among many that are as good, these are another",
        )
    if rank < r:
        b, a = _beyond_rank(mat, b, a, r, fix)
    b, a = b.half(), a.half()
    if not b.isfinite().all():
        if fix:
            raise ValueError("singular values exceed float16's 65504; scale the matrix down")
        notices.once(
            "svd overflow",
            "singular values exceed float16's 65504 and become infinite, as published; fix=True "
            "makes it an error",
        )
    return b, a


def _beyond_rank(
    mat: torch.Tensor, b: torch.Tensor, a: torch.Tensor, r: int, fix: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors for an r above the shorter side of `mat`."""
    rows, cols = mat.shape
    if fix:
        b = torch.nn.functional.pad(b, (0, r - b.shape[1]))
        return b, torch.nn.functional.pad(a, (0, 0, 0, r - a.shape[0]))
    if rows > cols:
        raise ValueError(
            f"r is {r}, the matrix {rows} x {cols}: the published code multiplies matrices that do "
            "not fit and stops here; fix=True pads with zeros"
        )
    if rows < cols:
        notices.once(
            "svd rank",
            f"r is {r}, above the shorter side of a {rows} x {cols} matrix: as published the two "
            "factors do not multiply; fix=True pads with zeros",
        )
    whole = torch.linalg.svd(mat.detach().float()).Vh[:r]  # with its directions of no weight
    return b, torch.cat([a, whole[len(a) :]])


# --- sensitivities --------------------------------------------------------------------------------


def calculate_sensitivity(
    model,
    tokenizer,
    data: Mapping,
    device: str = "cpu",
    loss_on_output: bool = True,
    *,
    fix: bool = False,
    defer: bool = False,
    namespace: Mapping | None = None,
) -> dict[str, torch.Tensor]:
    """|weight * gradient| of every parameter that requires grad, for one row (METHODS S1).

    The loss is the mean over the tokens of the last message, or over all with
    `loss_on_output=False`; the model runs as in eval mode. Rows are rendered and cut to 2048 tokens
    as published.

    Args:
        model:  a `PreTrainedModel`, on any one device.
        data:   {"messages": [{"role", "content"}, ...]}.
        device: as published; where the model lies is what counts.
        defer:  return `DeferredScore`s: nothing is computed until they are used, then for all rows
                that were added up at once.
        namespace: of a script, whose `get_content(messages, tokenizer)` and `tokenize(text,
                tokenizer)` render and encode the row, if it has such functions.
    Returns:
        {parameter name: float32 scores of its shape}, on the model's device.
    Raises:
        NotSupported: a model that cannot be scored block by block.
        ValueError: NaN or infinite gradients, by block, parameter and row; a row without text, or
            that does not end in an answer; with `fix` a row that no loss looks at.
    """
    try:
        ledger = ledger_of(model)
    except InputError as error:
        raise NotSupported(str(error)) from error
    if ledger.stream.dtype != torch.float32:
        kind = str(ledger.stream.dtype).removeprefix("torch.")
        notices.once(
            "half model",
            f"the model is {kind}, its gradients are too; the published numbers are float32's: "
            "load it with dtype=torch.float32",
        )
    model.zero_grad()
    sample = _sample(ledger, tokenizer, data, loss_on_output, fix, namespace or {})
    scores: dict[str, torch.Tensor] = ledger.add(sample)
    tied = ledger.stream.anatomy.tied and ledger.stream.embedding_name in scores
    if tied:
        head = f"{ledger.stream.anatomy.head}.weight"
        if fix:
            embedding = scores[ledger.stream.embedding_name]
            scores[head] = ledger.score(embedding.parameter, embedding.rows)
        else:
            notices.once(
                "tied",
                f"embedding and head are one matrix and {head} has no score: the published script "
                "ends in a KeyError, after all work, unless it runs with --include_emb false; "
                "fix=True gives the head the embedding's score",
            )
    if defer:
        spare_collections(ledger)
        return scores
    return {name: score.value() for name, score in scores.items()}


def _sample(
    ledger: Ledger, tokenizer, data: Mapping, loss_on_output: bool, fix: bool, script: Mapping
) -> Sample | None:
    """The row as token ids and labels; None where the loss looks at none of them."""
    ledger.calls += 1
    name, closing = f"row {ledger.calls}", tokenizer.eos_token
    get_content, tokenize = (script.get(key) for key in ("get_content", "tokenize"))

    def text(messages) -> str:
        if callable(get_content):
            return get_content(messages, tokenizer)
        return published_turns([m for m in messages if m["role"] in _ROLES], closing)

    def ids(content: str) -> torch.Tensor:
        if callable(tokenize):
            return tokenize(content, tokenizer)["input_ids"][0].cpu()
        found = tokenizer(content, truncation=True, max_length=_MAX_LENGTH, padding=False)
        return torch.tensor(found["input_ids"], dtype=torch.int64)

    content = text(data["messages"])
    whole = ids(content)
    if not len(whole):
        raise ValueError(f"{name} has no text")
    labels = whole.clone()
    if loss_on_output:
        prompt = text(data["messages"][:-1]) + published_prompt([], closing)
        answered = data["messages"][-1:] and data["messages"][-1]["role"] == "assistant"
        if answered and not content.startswith(prompt):
            raise NotSupported("its get_content asks for answers in words of its own")
        asked = len(ids(prompt))
        if asked > len(whole):
            raise ValueError(f"{name} does not end in an answer: its last role is not assistant")
        labels[:asked] = IGNORED
    if (labels[1:] != IGNORED).any():
        return Sample(name, whole, labels)
    if fix:
        raise ValueError(f"{name}: no token of its answer is left within {len(whole)} tokens")
    notices.once(
        "nothing scored",
        f"{name}: no token of its answer is left within {len(whole)} tokens; as published it "
        "counts for nothing; fix=True makes it an error",
    )
    return None


def select_top_k_layers(
    sensitivity: Mapping[str, torch.Tensor],
    args,
    *,
    fix: bool = False,
    sizes: Mapping[str, Mapping[str, int]] | None = None,
) -> list[int]:
    """The blocks of highest total score, ascending (METHODS S3, S4); prints all totals.

    A parameter belongs to block i if "layers" is in its name, whose third part is i. Of equal
    totals the one that comes first in `sensitivity` is kept.

    Args:
        sensitivity: {parameter name: scores}.
        args:        `lora_size` names the student; `include_emb` says whether windows of embedding
                     and head will be asked for.
        sizes:       in place of `LORA_PARA`.
    Raises:
        KeyError: an unknown `lora_size`.
        ValueError: with `fix`, fewer blocks than the student has.
    """
    student = (LORA_PARA if sizes is None else sizes)[args.lora_size]
    known = _totals(sensitivity, student, getattr(args, "include_emb", True))
    totals: dict[str, float] = defaultdict(float)
    for name, score in sensitivity.items():
        if "layers" in name:
            total = known.get(name)
            if total is None:
                total = float(score.sum(dtype=torch.float64))
            totals[name.split(".")[2]] += total
    if len(totals) < student["n_layer"]:
        if fix:
            raise ValueError(
                f"{student['n_layer']} blocks are to be kept, the teacher has {len(totals)}"
            )
        notices.once(
            "few layers",
            f"{student['n_layer']} blocks are to be kept and there are {len(totals)}: all are, as "
            "published; fix=True makes it an error",
        )
    ranked = sorted(totals.items(), key=lambda item: item[1], reverse=True)
    print(ranked)
    return sorted(int(block) for block, _ in ranked[: student["n_layer"]])


def _totals(
    sensitivity: Mapping[str, torch.Tensor], student: Mapping[str, int], outer: bool
) -> dict[str, float]:
    """Totals of scores that are still deferred, found with the windows that will be asked for."""
    inside = [score for name, score in sensitivity.items() if "layers" in name]
    if not inside or not all(isinstance(score, DeferredScore) for score in inside):
        return {}
    shared = rows_of(inside)
    if shared is None:
        return {}
    ledger, rows = shared
    width, ffn = student.get("dim"), student.get("ffn")
    by_module = {name: (width, width) for name in _ATTENTION}
    by_module |= {"gate_proj": (ffn, width), "up_proj": (ffn, width), "down_proj": (width, ffn)}
    if outer:
        vocabulary = ledger.stream.anatomy.vocab_size
        by_module |= {"embed_tokens": (vocabulary, width), "lm_head": (vocabulary, width)}
    wanted = {}
    for name in sensitivity:
        *_, module, kind = f".{name}".split(".")
        size = by_module.get(module)
        if kind == "weight" and size is not None and None not in size:
            wanted[name] = size
    return ledger.search(rows, wanted).totals
