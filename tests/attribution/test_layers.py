# SPDX-License-Identifier: Apache-2.0
"""Streamed gradient x activation of blocks against autograd through the whole model."""

import model_zoo as zoo
import published
import pytest
import torch

from pkt_ext.attribution import layers
from pkt_ext.attribution.layers import block_attribution
from pkt_ext.errors import NonFiniteError
from pkt_ext.models.anatomy import describe
from pkt_ext.streaming import passes
from pkt_ext.streaming.batches import Sample
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import Allotment, fit
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.passes import Pass
from pkt_ext.streaming.progress import Progress

LENGTHS = (11, 5, 23, 2, 17)  # longer than the sliding windows (4); two samples and one in a batch


def streamed(source, dtype=torch.float32) -> StreamedModel:
    return StreamedModel(Checkpoint.open(source), dtype=dtype)


def attribute(source, rows, *, dtype=torch.float32, micro_batch=2, share=None, **options):
    allotment = Allotment(micro_batch, **(share or {}))
    stream = streamed(source, dtype)
    return block_attribution(stream, rows, allotment=allotment, show=False, **options)


def by_autograd(model, rows) -> torch.Tensor:
    """float64 [L], one sample at a time through the whole model."""
    kept, scores = [], []

    def keep(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.requires_grad_().retain_grad()
        kept.append(hidden)

    blocks = [model.get_submodule(path) for path in describe(model).blocks]
    handles = [block.register_forward_hook(keep) for block in blocks]
    for row in rows:
        kept.clear()
        labels = row.labels[None]
        model(input_ids=row.input_ids[None], labels=labels, use_cache=False).loss.backward()
        at = (row.labels[1:] != -100).nonzero().squeeze(1)
        products = [(h.detach().double() * h.grad.double())[0, at].sum(1) for h in kept]
        scores.append(torch.stack([p.abs().mean() for p in products]))
    for handle in handles:
        handle.remove()
    return torch.stack(scores).mean(0)


def assert_close(ours, truth, rtol=1e-5):
    assert ours.shape == truth.shape and ours.dtype == torch.float64
    error = ((ours - truth).abs() / truth.max()).max().item()
    assert error <= rtol, f"off by {error:.1e} of the largest score: {ours} {truth}"


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_equals_autograd_through_the_whole_model(family, tmp_path):
    model = zoo.build(family, layers=3).requires_grad_(False)
    rows = published.samples(LENGTHS, vocab=zoo.VOCAB)
    reports = []
    scores = attribute(zoo.save(model, tmp_path), rows, on_report=reports.append)
    truth = by_autograd(model, rows)
    assert_close(scores, truth)
    # a norm that follows hides how long the last block's output is, and no other's
    hidden = truth <= 1e-4 * truth.max()
    assert hidden.tolist() == [False, False, family != "opt_post_norm"]
    assert len(reports) == 1 and set(reports[0].samples) == {row.id for row in rows}


def test_float64_equals_to_its_own_rounding(tmp_path):
    model = zoo.build("gpt2", layers=3).double().requires_grad_(False)
    rows = published.samples(LENGTHS, vocab=zoo.VOCAB)
    # the loss and the norms of rotary models are computed in float32 whatever the dtype
    assert_close(attribute(model, rows, dtype=torch.float64), by_autograd(model, rows), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama_gqa", "gemma2", "gpt2"])
def test_half_precision_is_as_good_as_autograd_in_it(family, dtype, tmp_path):
    model = zoo.build(family, layers=3).to(dtype).requires_grad_(False)
    rows = published.samples((40, 25, 33, 18), vocab=zoo.VOCAB)
    theirs = by_autograd(model, rows)
    truth = by_autograd(model.float(), rows)
    ours = attribute(zoo.save(model.to(dtype), tmp_path), rows, dtype=None)
    floor = 2 * torch.finfo(dtype).eps * truth.max()
    assert ((ours - truth).abs() <= 2 * (theirs - truth).abs() + floor).all(), (ours, theirs, truth)


def test_scales_of_float16_gradients_leave_no_trace(tmp_path, monkeypatch):
    folder = zoo.save(zoo.build("llama_gqa", layers=3).half(), tmp_path)
    rows = published.samples((120, 90, 7), vocab=zoo.VOCAB)
    truth, boundary = attribute(folder, rows), layers._Scores.boundary
    for largest in (0, 8):
        scales = {}

        def spy(self, index, batch, hidden, gradient, scale, scales=scales):
            scales[index] = scale
            boundary(self, index, batch, hidden, gradient, scale)

        monkeypatch.setattr(passes, "_LARGEST", (largest,))
        monkeypatch.setattr(layers._Scores, "boundary", spy)
        assert_close(attribute(folder, rows, dtype=torch.float16), truth, 0.01)
        assert len(scales) == 4 and len(set(scales.values())) > 1 and 1.0 not in scales.values()


def test_an_overflow_counts_once(tmp_path, monkeypatch):
    folder = zoo.save(zoo.build("qwen3").half(), tmp_path)
    rows = published.samples(LENGTHS, vocab=zoo.VOCAB)
    monkeypatch.setattr(passes, "_LARGEST", (4,))
    first = attribute(folder, rows, dtype=torch.float16)
    check, tries = Pass._check, []

    def fail_late(self, tensor, batch, where, names, what):
        """The last micro-batch of block 1 overflows at the first attempt."""
        check(self, tensor, batch, where, names, what)
        if what == "gradients" and where.endswith(".1") and batch is self.batches[-1]:
            tries.append(where)
            if len(tries) == 1:
                raise NonFiniteError("overflow", batch.ids[0])

    monkeypatch.setattr(passes, "_LARGEST", (4, 4))
    monkeypatch.setattr(Pass, "_check", fail_late)
    assert attribute(folder, rows, dtype=torch.float16).equal(first)
    assert len(tries) == 2


@pytest.mark.parametrize("share", [{"ahead": False}, {"resident": 1, "activation_bytes": 20_000}])
def test_bits_do_not_depend_on_what_is_kept_where(share, tmp_path):
    folder = zoo.save(zoo.build("qwen3", layers=3), tmp_path)
    rows = published.samples(LENGTHS, vocab=zoo.VOCAB)
    assert attribute(folder, rows).equal(attribute(folder, rows, share=share))


def test_micro_batches_and_parts_of_the_head_change_rounding_only(tmp_path, monkeypatch):
    folder = zoo.save(zoo.build("phi3_gqa", layers=3), tmp_path)
    rows = published.samples(LENGTHS, vocab=zoo.VOCAB)
    alone = block_attribution(streamed(folder), rows, show=False)
    for micro_batch in (1, 3, 5):
        assert_close(attribute(folder, rows, micro_batch=micro_batch), alone, 1e-6)
    assert_close(attribute(folder, rows, share={"head_rows": 100}), alone, 1e-6)
    monkeypatch.setattr(layers, "_PIECE", 1)  # a position at a time
    assert_close(attribute(folder, rows), alone, 1e-6)


def test_every_sample_counts_the_same_and_padding_not_at_all(tmp_path):
    folder = zoo.save(zoo.build("llama", layers=3), tmp_path)
    rows = published.samples((31, 4, 9), vocab=zoo.VOCAB)
    each = torch.stack([attribute(folder, [row]) for row in rows])
    assert_close(attribute(folder, rows, micro_batch=3), each.mean(0), 1e-6)
    # two samples that may have one name, as different files have their rows
    same = [Sample("same", row.input_ids, row.labels) for row in rows]
    assert attribute(folder, same).equal(attribute(folder, rows))


STEPS = ["forward 2", "attribution 3", "tail", "backward 2", "attribution 1", "backward 1"]


class Killed(Exception):
    pass


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("written", [False, True], ids=["before", "behind"])
def test_an_interrupted_pass_goes_on_to_the_same_bits(step, written, tmp_path, monkeypatch):
    folder = zoo.save(zoo.build("llama_gqa", layers=3), tmp_path / "model")
    rows = published.samples(LENGTHS, vocab=zoo.VOCAB)
    whole = attribute(folder, rows)
    record = Progress.record

    def killed(self, name, **facts):
        if name == step and not written:
            raise Killed
        record(self, name, **facts)
        if name == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "record", killed)
        with pytest.raises(Killed):
            attribute(folder, rows, progress=Progress(tmp_path / "p", {}))
    kept = Progress(tmp_path / "p", {})
    assert kept.found
    assert attribute(folder, rows, progress=kept).equal(whole)
    # all is there: nothing is run, and the scores are those that were recorded
    monkeypatch.setattr(Pass, "_backward", None)
    assert attribute(folder, rows, progress=Progress(tmp_path / "p", {})).equal(whole)


def test_the_plan_of_such_a_pass_knows_no_scores_of_parameters():
    stream = streamed(zoo.build("llama", layers=3), torch.bfloat16)
    rows = published.samples(LENGTHS, vocab=zoo.VOCAB)
    options = dict(micro_batch=2, outer=False, durable=False)
    scored = fit(stream, rows, 2**40, **options)
    plain = fit(stream, rows, 2**40, scored=False, **options)
    assert plain.phases["backward"]["scores"] == 0 < scored.phases["backward"]["scores"]
    assert plain.flops["backward"] < scored.flops["backward"]
    working = [p.phases["backward"]["working memory"] for p in (plain, scored)]
    assert 0 < working[0] <= working[1]
