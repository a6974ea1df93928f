# SPDX-License-Identifier: Apache-2.0
"""The streamed, batched sensitivities against the published one-sample loop."""

import model_zoo as zoo
import published
import pytest
import torch
from torch import nn

from pkt_ext import ops
from pkt_ext.attribution.outer import score_outer
from pkt_ext.attribution.sensitivity import BlockScorer, sensitivity, stream_sensitivity
from pkt_ext.errors import InputError, NonFiniteError
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import Allotment
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.passes import Pass

LENGTHS = (11, 5, 23, 2, 17)  # longer than the sliding windows (4); two samples and one in a batch


def run(source, rows, *, dtype=torch.float32, micro_batch=2, share=None, **options):
    """({parameter name: score}, {block index: total}, {name: OuterScores}, report)."""
    stream = StreamedModel(Checkpoint.open(source), dtype=dtype)
    scores, totals, outer = {}, {}, {}

    def on_block(block):
        path = stream.anatomy.blocks[block.index]
        assert block.scores.keys() == block.weights.keys() == block.totals.keys()
        for name, score in block.scores.items():
            whole = score.sum(dtype=torch.float64).item()
            assert block.totals[name] == pytest.approx(whole, rel=1e-6), name
        assert block.total == pytest.approx(sum(block.totals.values()), rel=1e-12)
        scores.update({f"{path}.{n}": s for n, s in block.scores.items()})
        totals[block.index] = block.total

    def on_outer(found):
        outer[found.name] = found

    report = stream_sensitivity(
        stream,
        rows,
        allotment=Allotment(micro_batch, **(share or {})),
        on_block=on_block,
        on_outer=on_outer,
        show=False,
        **options,
    )
    return scores, totals, outer, report


def assert_close(name, ours, truth, rtol, floor=0.0):
    """max |ours - truth| <= rtol x the largest true score (of the tensor, or `floor`)."""
    assert ours.shape == truth.shape and ours.dtype == torch.float32, name
    error, scale = (ours - truth).abs().max().item(), max(truth.max().item(), floor)
    assert error <= rtol * scale, f"{name}: off by {error / scale:.1e} of the largest score"


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_equals_the_published_loop(family, tmp_path):
    model = zoo.build(family)
    rows = published.samples(LENGTHS, vocab=zoo.VOCAB)
    truth, losses = published.sensitivity(model, rows)
    scores, totals, outer, report = run(zoo.save(model, tmp_path), rows)

    blocks = [n for n in truth if ".layers." in n or ".h." in n]
    assert scores.keys() == set(blocks)
    for name in blocks:
        # without rotary positions a key bias has no gradient at all: rounding against rounding
        floor = 1e-3 * max(truth[n].max() for n in blocks) if "bias" in name else 0.0
        assert_close(name, scores[name], truth[name], 1e-5, floor)
    for index, total in totals.items():
        mine = [n for n in blocks if f".{index}." in n]
        assert total == pytest.approx(sum(truth[n].double().sum().item() for n in mine), rel=1e-5)
    assert sorted(totals) == [0, 1]
    for name, module in (
        ("embedding", model.get_input_embeddings()),
        ("head", model.get_output_embeddings()),
    ):
        found = outer[name]
        assert found.weight().equal(module.weight)
        expected = truth[found.parameter].sum(0, dtype=torch.float64)
        torch.testing.assert_close(found.column_sums, expected, rtol=1e-5, atol=0)
        assert found.total == pytest.approx(expected.sum().item(), rel=1e-5)
    assert (outer["embedding"].parameter == outer["head"].parameter) == (family in zoo.TIED)
    assert report.losses == pytest.approx(losses, rel=1e-5)
    assert report.samples and set(report.samples) == losses.keys()
    assert report.peak_bytes > 0 and report.stages.keys() >= {"load", "forward", "tail", "backward"}


@pytest.mark.parametrize("family", ["llama_gqa", "gemma3", "gpt2", "opt"])
def test_public_function_scores_every_parameter(family):
    model = zoo.build(family)
    rows = published.samples((9, 14, 6), vocab=zoo.VOCAB)
    truth, _ = published.sensitivity(model, rows)
    length = max(len(r.input_ids) for r in rows)
    batch = {k: torch.zeros(len(rows), length, dtype=torch.int64) for k in ("input_ids", "labels")}
    batch["attention_mask"] = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):  # one row padded on the left, as some tokenizers do
        real = slice(length - len(row.input_ids), None) if i == 2 else slice(len(row.input_ids))
        batch["input_ids"][i, real] = row.input_ids
        batch["labels"][i, real] = row.labels
        batch["attention_mask"][i, real] = 1
    before = {n: p.clone() for n, p in model.named_parameters()}
    scores = sensitivity(model, [batch])
    assert scores.keys() == truth.keys()
    for name in truth:
        floor = 1e-3 * max(t.max() for t in truth.values()) if "bias" in name else 0.0
        assert_close(name, scores[name], truth[name], 1e-5, floor)
    for name, parameter in model.named_parameters():
        assert parameter.equal(before[name]) and parameter.grad is None, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama_bias", "gemma2", "gpt2"])
def test_half_precision_is_as_good_as_the_loop_in_it(family, dtype, tmp_path):
    model = zoo.build(family).to(dtype)
    rows = published.samples(LENGTHS, vocab=zoo.VOCAB)
    half, _ = published.sensitivity(model, rows)
    truth, _ = published.sensitivity(model.float(), rows)
    scores, _, outer, _ = run(zoo.save(model.to(dtype), tmp_path), rows, dtype=None)
    scores |= {o.parameter: o.column_sums for o in outer.values()}
    ratios = []
    for name, score in scores.items():
        true, loop = truth[name].double(), half[name].double()
        if score.ndim < true.ndim:  # embedding and head come as column sums
            true, loop = true.sum(0), loop.sum(0)
        theirs, ours = (loop - true).norm(), (score.double() - true).norm()
        ratios.append((ours / theirs).item())
        # two roundings of one computation; worst of all families 1.93 (a bias of 16 numbers)
        assert ratios[-1] <= 2.5, f"{name}: {ratios[-1]:.2f} times the loop's error"
    assert sorted(ratios)[len(ratios) // 2] <= 1.2  # measured 0.91 to 1.07


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # as stored, and converted
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])  # tied; learned positions, Conv1D
def test_bits_do_not_depend_on_what_is_kept_where(family, dtype, tmp_path):
    folder = zoo.save(zoo.build(family), tmp_path)
    rows = published.samples(LENGTHS, vocab=zoo.VOCAB)
    first = run(folder, rows, dtype=dtype)
    for share in (
        {"ahead": False},
        {"resident": 1, "activation_bytes": 20_000},
        {"resident": 99, "activation_bytes": 2**40},
    ):
        again = run(folder, rows, dtype=dtype, share=share)
        assert all(again[0][n].equal(first[0][n]) for n in first[0])
        assert again[1] == first[1]
        assert again[2]["head"].column_sums.equal(first[2]["head"].column_sums)


@pytest.mark.parametrize("micro_batch", [1, 5])
def test_micro_batch_changes_rounding_only(micro_batch, tmp_path):
    folder = zoo.save(zoo.build("phi3_gqa"), tmp_path)
    rows = published.samples(LENGTHS, vocab=zoo.VOCAB)
    one, other = run(folder, rows), run(folder, rows, micro_batch=micro_batch)
    for name in one[0]:
        assert_close(name, other[0][name], one[0][name], 1e-5)


def test_absolute_value_is_taken_per_sample(tmp_path):
    """S2: two samples in a batch score as the sum of each alone, though their gradients differ."""
    folder = zoo.save(zoo.build("llama"), tmp_path)
    rows = published.samples((12, 12), vocab=zoo.VOCAB)
    both, first, second = (run(folder, r)[0] for r in (rows, rows[:1], rows[1:]))
    for name in both:
        assert_close(name, both[name], first[name] + second[name], 1e-5)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_token_restriction_leaves_the_other_rows_out(family, tmp_path):
    model = zoo.build(family)
    rows = published.samples((12, 7), vocab=zoo.VOCAB)
    truth, _ = published.sensitivity(model, rows)
    tokens = torch.unique(torch.cat([r.input_ids[::2] for r in rows] + [torch.arange(0, 264, 5)]))
    outer = run(zoo.save(model, tmp_path), rows, tokens=tokens)[2]
    for found in outer.values():
        expected = truth[found.parameter][tokens].sum(0, dtype=torch.float64)
        torch.testing.assert_close(found.column_sums, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("restricted", [False, True], ids=["all", "tokens"])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_sums_and_full_scores_together(family, restricted, dense, monkeypatch):
    if dense:  # as an embedding of another class than nn.Embedding would give them
        reached = Pass._reached
        monkeypatch.setattr(
            Pass, "_reached", lambda self, name, p, g: reached(self, name, p, g.to_dense())
        )
    model = zoo.build(family)
    rows = published.samples((12, 7), vocab=zoo.VOCAB)
    truth, _ = published.sensitivity(model, rows)
    tokens = torch.cat([rows[0].input_ids[::2], torch.arange(0, 264, 5)]) if restricted else None
    counts = torch.zeros(zoo.VOCAB, 1)
    counts[slice(None) if tokens is None else tokens] = 1
    stream, outer, full = StreamedModel(Checkpoint.open(model)), [], {}
    scorer = BlockScorer(stream, lambda block: None)
    with Pass(stream, stream.batches(rows, 2), scorer, keep_rows=True, show=False) as run:
        run.run()
        score_outer(run, outer.append, tokens=tokens, full=full)
    matrices = {found.parameter for found in outer}
    assert matrices <= full.keys() and len(full) == {"llama": 2, "llama_tied": 1, "gpt2": 2}[family]
    for name, score in full.items():
        assert_close(name, score, truth[name] * counts if name in matrices else truth[name], 1e-5)
    for found in outer:
        expected = (truth[found.parameter] * counts).sum(0, dtype=torch.float64)
        torch.testing.assert_close(found.column_sums, expected, rtol=1e-5, atol=0)
        assert found.total == pytest.approx(expected.sum().item(), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_scores_of_embedding_and_head_are_never_formed(family, tmp_path, monkeypatch):
    seen = []
    for name in ("linear_sensitivity_", "accumulate_sensitivity_"):
        op = getattr(ops, name)

        def spy(score, weight, *operands, op=op, **options):
            if options and options["sums"].cols is not None:
                seen.append((op.__name__, score))
            op(score, weight, *operands, **options)

        monkeypatch.setattr(ops, name, spy)
    run(zoo.save(zoo.build(family), tmp_path), published.samples((9, 4), vocab=zoo.VOCAB))
    assert {score for _, score in seen} == {None}
    untied = {"accumulate_sensitivity_"} if family == "llama" else set()  # the embedding by itself
    assert {name for name, _ in seen} == {"linear_sensitivity_"} | untied


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2"])  # gemma2: soft-capped
def test_vocabulary_chunks_add_up(family, tmp_path, monkeypatch):
    folder = zoo.save(zoo.build(family), tmp_path)
    rows = published.samples(LENGTHS, vocab=zoo.VOCAB)
    scores, _, whole, report = run(folder, rows)
    monkeypatch.setattr("pkt_ext.attribution.outer._CHUNK", 1)  # 64 rows, 264 in the vocabulary
    monkeypatch.setattr("pkt_ext.streaming.readout.LOGITS", {"cpu": 3 * zoo.VOCAB})
    for share in ({}, {"head_rows": 100}, {"head_rows": 1000}):
        found, _, parts, again = run(folder, rows, share=share)
        assert again.losses == pytest.approx(report.losses, rel=1e-6)
        for name in whole:
            torch.testing.assert_close(
                parts[name].column_sums, whole[name].column_sums, rtol=1e-6, atol=0
            )
        for name, score in found.items():
            assert_close(name, score, scores[name], 1e-5)


@pytest.mark.parametrize(
    ("parameter", "where"),
    [
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1"),
        ("model.layers.0.input_layernorm.weight", "model.layers.0"),
        ("model.embed_tokens.weight", "the embedding"),
        ("model.norm.weight", "row-"),
        ("lm_head.weight", "row-"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_named(parameter, where, value, tmp_path):
    model = zoo.build("llama")
    rows = published.samples((8, 6), vocab=zoo.VOCAB)
    with torch.no_grad():
        model.get_parameter(parameter)[rows[0].input_ids[1] % 8] = value
        if parameter.endswith("embed_tokens.weight"):
            model.get_parameter(parameter)[rows[0].input_ids[1]] = value
    with pytest.raises(InputError, match="download or convert it again") as error:
        run(zoo.save(model, tmp_path), rows)
    assert parameter in str(error.value) and where in str(error.value)
    assert "row-" in str(error.value) and "\n" not in str(error.value)


def test_overflowing_activations_name_block_and_sample(tmp_path):
    model = zoo.build("llama")
    rows = published.samples((6, 9), vocab=zoo.VOCAB)  # the longer one comes first in the batch
    with torch.no_grad():  # block 1's MLP leaves fp16's range
        model.model.layers[1].mlp.down_proj.weight *= 60000
        model.model.layers[1].mlp.up_proj.weight *= 100
    with pytest.raises(InputError, match=r"model\.layers\.1: sample 'row-1' gives NaN or Inf"):
        run(zoo.save(model, tmp_path), rows, dtype=torch.float16)


class _BadGradient(nn.Module):
    """SiLU whose gradient is NaN for one sample of the micro-batch."""

    def forward(self, x):
        y = nn.functional.silu(x)
        if y.requires_grad:
            mask = torch.ones(len(x), 1, 1)
            mask[1] = float("nan")
            y.register_hook(lambda g: g * mask)
        return y


def test_bad_gradients_name_block_parameter_and_sample():
    stream = StreamedModel(Checkpoint.open(zoo.build("llama")))
    stream.blocks[1].mlp.act_fn = _BadGradient()
    rows = published.samples((6, 9), vocab=zoo.VOCAB)  # the longer one comes first in the batch
    with pytest.raises(InputError, match="gradients of parameter mlp.gate_proj.weight") as error:
        stream_sensitivity(stream, rows, allotment=Allotment(2), on_block=print, show=False)
    assert "model.layers.1" in str(error.value) and "'row-0'" in str(error.value)


def test_parameter_that_no_gradient_reaches_is_refused():
    stream = StreamedModel(Checkpoint.open(zoo.build("llama")))
    mlp = stream.blocks[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x))
    rows = published.samples((6,), vocab=zoo.VOCAB)
    with pytest.raises(InputError, match="no gradient reaches mlp.gate_proj.weight"):
        stream_sensitivity(
            stream, rows, allotment=Allotment(1), on_block=lambda _: None, show=False
        )


def test_batch_without_labels_is_refused():
    with pytest.raises(InputError, match="has no labels"):
        sensitivity(zoo.build("llama"), [{"input_ids": torch.ones(1, 4, dtype=torch.int64)}])


HALF = {"dtype": torch.float16}


def faint(folder, factor):
    """A model whose gradients are fainter by `factor` from block 0 down: its output counts less."""
    model = zoo.build("llama_gqa", layers=3)
    with torch.no_grad():
        for layer in model.model.layers[1:]:  # block 0's output is all that the others see of it
            layer.input_layernorm.weight.mul_(factor)
            layer.post_attention_layernorm.weight.mul_(factor)
        model.model.norm.weight.mul_(factor)
    return zoo.save(model.half(), folder)


def half_error(scores, truth):
    """The relative error of every score, by name."""
    return {
        n: ((scores[n].double() - t.double()).norm() / t.double().norm()).item()
        for n, t in truth.items()
        if n in scores
    }


@pytest.mark.parametrize("factor", [1.0, 2.0**-6, 2.0**-9])
def test_float16_gradients_do_not_flush_to_zero(factor, tmp_path):
    folder = faint(tmp_path, factor)
    rows = published.samples((120, 90, 7), vocab=zoo.VOCAB)
    exact = run(folder, rows)[0]  # the same weights, computed in float32
    errors = half_error(run(folder, rows, **HALF)[0], exact)
    # rounding alone: 2^-11 a step; without scaling most of block 0 is gone at 2^-9
    assert max(errors.values()) < 0.02, errors


def test_without_scaling_they_would(tmp_path, monkeypatch):
    monkeypatch.setattr(Pass, "_size", lambda self, gradient: 0.0)  # no boundary is scaled
    monkeypatch.setattr("pkt_ext.streaming.passes._HEAD_SCALE", 0)
    folder = faint(tmp_path, 2.0**-9)
    rows = published.samples((120, 90, 7), vocab=zoo.VOCAB)
    errors = half_error(run(folder, rows, **HALF)[0], run(folder, rows)[0])
    assert max(errors.values()) > 0.05


def test_an_overflow_is_run_again_with_less_and_leaves_no_trace(tmp_path, monkeypatch):
    folder = zoo.save(zoo.build("qwen3").half(), tmp_path)
    rows = published.samples(LENGTHS, vocab=zoo.VOCAB)
    monkeypatch.setattr("pkt_ext.streaming.passes._LARGEST", (4,))
    first = run(folder, rows, **HALF)
    monkeypatch.setattr("pkt_ext.streaming.passes._LARGEST", (30, 4))  # 2^30 is infinite
    again = run(folder, rows, **HALF)
    assert first[1] == again[1]
    assert all(score.equal(again[0][name]) for name, score in first[0].items())
    monkeypatch.setattr("pkt_ext.streaming.passes._LARGEST", (30,))
    with pytest.raises(NonFiniteError, match="gradients .*in torch.float16"):
        run(folder, rows, **HALF)
