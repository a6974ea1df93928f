# SPDX-License-Identifier: Apache-2.0
"""Streamed gradient x activation of blocks against autograd through the whole model."""

import model_zoo as zoo
import published
import pytest
import torch

from pkt_ext.attribution import layers
from pkt_ext.attribution.layers import INTERFACES, block_attribution
from pkt_ext.errors import InputError, NonFiniteError
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


def by_autograd(model, rows, interface="output") -> torch.Tensor:
    """float64 [L], one sample at a time through the whole model."""
    kept, scores = [], []

    def keep(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.requires_grad_().retain_grad()
        kept.append((hidden, args[0].detach() if interface == "contribution" else 0))

    blocks = [model.get_submodule(path) for path in describe(model).blocks]
    handles = [block.register_forward_hook(keep) for block in blocks]
    for row in rows:
        kept.clear()
        labels = row.labels[None]
        model(input_ids=row.input_ids[None], labels=labels, use_cache=False).loss.backward()
        at = (row.labels[1:] != -100).nonzero().squeeze(1)
        products = [((h.detach().double() - x) * h.grad)[0, at].sum(1) for h, x in kept]
        scores.append(torch.stack([p.abs().mean() for p in products]))
    for handle in handles:
        handle.remove()
    return torch.stack(scores).mean(0)


def assert_close(ours, truth, rtol=1e-5):
    assert ours.shape == truth.shape and ours.dtype == torch.float64
    error = ((ours - truth).abs() / truth.max()).max().item()
    assert error <= rtol, f"off by {error:.1e} of the largest score: {ours} {truth}"


both = pytest.mark.parametrize("interface", INTERFACES)


@both
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_equals_autograd_through_the_whole_model(family, interface, tmp_path):
    model = zoo.build(family, layers=3).requires_grad_(False)
    rows = published.samples(LENGTHS, vocab=zoo.VOCAB)
    reports = []
    scores = attribute(
        zoo.save(model, tmp_path), rows, interface=interface, on_report=reports.append
    )
    truth = by_autograd(model, rows, interface)
    assert_close(scores, truth)
    # a norm that follows hides how long the last block's output is, and nothing else
    hidden = truth <= 1e-4 * truth.max()
    last = interface == "output" and family != "opt_post_norm"
    assert hidden.tolist() == [False, False, last]
    assert len(reports) == 1 and set(reports[0].samples) == {row.id for row in rows}


def test_float64_equals_to_its_own_rounding(tmp_path):
    model = zoo.build("gpt2", layers=3).double().requires_grad_(False)
    rows = published.samples(LENGTHS, vocab=zoo.VOCAB)
    # the loss and the norms of rotary models are computed in float32 whatever the dtype
    assert_close(attribute(model, rows, dtype=torch.float64), by_autograd(model, rows), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama_gqa", "gemma2", "gpt2"])
@both
def test_half_precision_is_as_good_as_autograd_in_it(interface, family, dtype, tmp_path):
    model = zoo.build(family, layers=3).to(dtype).requires_grad_(False)
    rows = published.samples((40, 25, 33, 18), vocab=zoo.VOCAB)
    theirs = by_autograd(model, rows, interface)
    truth = by_autograd(model.float(), rows, interface)
    ours = attribute(zoo.save(model.to(dtype), tmp_path), rows, dtype=None, interface=interface)
    floor = 2 * torch.finfo(dtype).eps * truth.max()
    assert ((ours - truth).abs() <= 2 * (theirs - truth).abs() + floor).all(), (ours, theirs, truth)


@both
def test_scales_of_float16_gradients_leave_no_trace(interface, tmp_path, monkeypatch):
    folder = zoo.save(zoo.build("llama_gqa", layers=3).half(), tmp_path)
    rows = published.samples((120, 90, 7), vocab=zoo.VOCAB)
    truth, products = attribute(folder, rows, interface=interface), layers._products
    for largest in (0, 8):
        scales = set()

        def spy(batch, hidden, gradient, scale, scales=scales):
            scales.add(scale)
            return products(batch, hidden, gradient, scale)

        monkeypatch.setattr(passes, "_LARGEST", (largest,))
        monkeypatch.setattr(layers, "_products", spy)
        ours = attribute(folder, rows, dtype=torch.float16, interface=interface)
        assert_close(ours, truth, 0.01)
        assert len(scales) > 1 and 1.0 not in scales


@both
def test_an_overflow_counts_once(interface, tmp_path, monkeypatch):
    folder = zoo.save(zoo.build("qwen3", layers=3).half(), tmp_path)
    options = dict(dtype=torch.float16, interface=interface)
    rows = published.samples(LENGTHS, vocab=zoo.VOCAB)
    monkeypatch.setattr(passes, "_LARGEST", (4,))
    first = attribute(folder, rows, **options)
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
    assert attribute(folder, rows, **options).equal(first)
    assert len(tries) == 2


@pytest.mark.parametrize("share", [{"ahead": False}, {"resident": 1, "activation_bytes": 20_000}])
def test_bits_do_not_depend_on_what_is_kept_where(share, tmp_path):
    folder = zoo.save(zoo.build("qwen3", layers=3), tmp_path)
    rows = published.samples(LENGTHS, vocab=zoo.VOCAB)
    assert attribute(folder, rows).equal(attribute(folder, rows, share=share))


@both
def test_micro_batches_and_parts_of_the_head_change_rounding_only(interface, tmp_path, monkeypatch):
    folder = zoo.save(zoo.build("phi3_gqa", layers=3), tmp_path)
    rows = published.samples(LENGTHS, vocab=zoo.VOCAB)
    alone = block_attribution(streamed(folder), rows, interface=interface, show=False)

    def again(**options):
        assert_close(attribute(folder, rows, interface=interface, **options), alone, 1e-6)

    for micro_batch in (1, 3, 5):
        again(micro_batch=micro_batch)
    again(share={"head_rows": 100})
    monkeypatch.setattr(layers, "_PIECE", 1)  # a position at a time
    again()


def test_every_sample_counts_the_same_and_padding_not_at_all(tmp_path):
    folder = zoo.save(zoo.build("llama", layers=3), tmp_path)
    rows = published.samples((31, 4, 9), vocab=zoo.VOCAB)
    each = torch.stack([attribute(folder, [row]) for row in rows])
    assert_close(attribute(folder, rows, micro_batch=3), each.mean(0), 1e-6)
    # two samples that may have one name, as different files have their rows
    same = [Sample("same", row.input_ids, row.labels) for row in rows]
    assert attribute(folder, same).equal(attribute(folder, rows))


class Killed(Exception):
    pass


STEPS = {
    "output": ["forward 2", "score 2", "tail", "backward 2", "score 0", "backward 1"],
    "contribution": ["products 3", "tail", "score 2", "products 2", "backward 2", "score 0"],
}


@pytest.mark.parametrize(
    ("interface", "step"), [(name, step) for name, steps in STEPS.items() for step in steps]
)
@pytest.mark.parametrize("written", [False, True], ids=["before", "behind"])
def test_an_interrupted_pass_goes_on_to_the_same_bits(
    interface, step, written, tmp_path, monkeypatch
):
    folder = zoo.save(zoo.build("llama_gqa", layers=3), tmp_path / "model")
    rows = published.samples(LENGTHS, vocab=zoo.VOCAB)
    whole = attribute(folder, rows, interface=interface)
    record = Progress.record

    def killed(self, name, **facts):
        if name == step and not written:
            raise Killed
        record(self, name, **facts)
        if name == step:
            raise Killed

    def go_on():
        kept = Progress(tmp_path / "p", {})
        return attribute(folder, rows, interface=interface, progress=kept)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "record", killed)
        with pytest.raises(Killed):
            go_on()
    assert Progress(tmp_path / "p", {}).found
    assert go_on().equal(whole)
    # all is there: nothing is run, and the scores are those that were recorded
    for stage in ("_forward", "_tail", "_backward"):
        monkeypatch.setattr(Pass, stage, None)
    assert go_on().equal(whole)


def test_an_unknown_interface_is_refused():
    rows = published.samples((5,), vocab=zoo.VOCAB)
    with pytest.raises(InputError, match="'input'; choose one of output, contribution"):
        block_attribution(streamed(zoo.build("llama")), rows, interface="input", show=False)


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
