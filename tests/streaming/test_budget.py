# SPDX-License-Identifier: Apache-2.0
"""What is kept, read ahead and spilled under a budget, and what a pass is predicted to take."""

import functools
import re
from dataclasses import asdict

import model_zoo
import published
import pytest
import torch

from pkt_ext.attribution.sensitivity import stream_sensitivity
from pkt_ext.errors import InputError
from pkt_ext.streaming import budget as budget_module
from pkt_ext.streaming import needs as needs_module
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import (
    Allotment,
    available_bytes,
    fit,
    format_bytes,
    parse_bytes,
)
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.needs import CONTEXT, LIBRARY, Needs

MIB = 2**20
SIZES = dict(layers=4, hidden=64, ffn=256)


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """The process stays as large as it is; what was measured is not measured again."""
    monkeypatch.setattr(needs_module, "resident_bytes", lambda: 300 * MIB)
    for name in ("measure", "record"):
        monkeypatch.setattr(needs_module, name, functools.cache(getattr(needs_module, name)))


def streamed(family="llama", dtype=torch.bfloat16, **sizes) -> StreamedModel:
    """On a CPU, in another dtype than the weights', so that they take memory."""
    return StreamedModel(Checkpoint.open(model_zoo.build(family, **SIZES | sizes)), dtype=dtype)


def rows(*lengths, vocab=model_zoo.VOCAB):
    return published.samples(lengths, vocab=vocab)


@pytest.mark.parametrize(
    "text, count",
    [
        ("8GiB", 8 * 2**30),
        ("512MiB", 512 * MIB),
        ("6.5GB", 6_500_000_000),
        ("4G", 4_000_000_000),
        ("0.5 tib", 2**39),
        (" 2 Kib ", 2048),
        ("1k", 1000),
        ("17", 17),
        ("3B", 3),
        (12345, 12345),
    ],
)
def test_amounts(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "GiB", "8 apples", "-1GiB", "0", "0.1", "0MiB", "1e9", "8GiBiB", "1,5GB", "2PiB"]
)
def test_what_is_no_amount(text):
    with pytest.raises(InputError, match="no amount of memory; write it as 8GiB"):
        parse_bytes(text)


def test_amounts_are_shown_rounded_up():
    assert format_bytes(640 * MIB) == "640 MiB" and format_bytes(640 * MIB + 1) == "641 MiB"
    assert format_bytes(2**30) == "1.0 GiB" and format_bytes(2**30 + 1) == "1.1 GiB"
    for count in (1, 5 * MIB + 7, 3 * 2**30 + 5, 123_456_789_012):
        assert parse_bytes(format_bytes(count)) >= count


def worth(allotment: Allotment) -> tuple:
    """What comes first in the order of what memory is given to."""
    head = allotment.head_rows or 2**62
    return allotment.ahead, head, allotment.micro_batch, allotment.activation_bytes, (
        allotment.resident
    )  # fmt: skip


@pytest.mark.parametrize("family, durable", [("llama", True), ("gpt2", False), ("gemma3", False)])
def test_more_memory_is_used_for_more(family, durable):
    stream, samples = streamed(family, vocab=4096), rows(32, 32, 32, 32)
    roomy = fit(stream, samples, 2**40, micro_batch=4, durable=durable)
    assert roomy.allotment.resident == 4 and roomy.allotment.ahead
    assert roomy.allotment.micro_batch == 4 and roomy.allotment.head_rows is None
    steps = range(roomy.least, roomy.peak + 2, (roomy.peak - roomy.least) // 6)
    found = [fit(stream, samples, limit, micro_batch=4, durable=durable) for limit in steps]
    assert all(p.peak <= limit for p, limit in zip(found, steps, strict=True))
    order = [worth(p.allotment) for p in found]
    assert order == sorted(order) and order[0] < order[-1]
    assert len({p.least for p in found}) == 1
    alone = [fit(stream, samples, limit, micro_batch=1, durable=durable) for limit in steps]
    whole = [p.allotment.resident for p in alone if p.allotment.head_rows is None]
    assert whole == sorted(whole) and whole[-1] == 4


def test_the_smallest_budget_works_and_less_is_refused(monkeypatch):
    monkeypatch.setattr(
        needs_module, "resident_bytes", lambda: 300 * MIB
    )  # however large this one is
    stream, samples = streamed(vocab=2**16, hidden=32), rows(32, 20)
    least = fit(stream, samples, 2**40, micro_batch=4).least
    tight = fit(stream, samples, least, micro_batch=4)
    assert tight.peak == least and tight.allotment.micro_batch == 1
    with pytest.raises(InputError, match=r"smallest --budget that works is (\d+) MiB") as caught:
        fit(stream, samples, least - 1, micro_batch=4)
    assert "lower --max-length" in str(caught.value)
    named = parse_bytes(re.search(r"works is (\d+ MiB)", str(caught.value))[1])
    assert least <= named <= least + 9 * MIB
    assert fit(stream, samples, named, micro_batch=4).peak <= named


def test_a_large_head_comes_in_parts_where_it_has_to():
    stream, samples = streamed(vocab=2**17, hidden=64), rows(32, 20)
    roomy = fit(stream, samples, 2**40, micro_batch=2, outer=False)
    tight = fit(stream, samples, roomy.least, micro_batch=2, outer=False)
    assert roomy.allotment.head_rows is None
    assert 1024 < tight.allotment.head_rows < 2**14
    head = 2**17 * 64 * 2
    weights = [p.phases["tail"]["weights"] for p in (roomy, tight)]
    assert weights[0] >= head > 8 * weights[1]
    assert tight.read["tail"] > 1.9 * roomy.read["tail"]  # forward and backward sweep the parts
    assert tight.flops["tail"] == 1.5 * roomy.flops["tail"]


def test_what_touches_the_rounding_stays_as_an_interrupted_run_began():
    stream, samples = streamed(vocab=4096), rows(32, 32, 20)
    fixed = {"micro_batch": 2, "head_rows": 1500}
    for limit in (2**40, fit(stream, samples, 2**40, micro_batch=4, fixed=fixed).least):
        found = fit(stream, samples, limit, micro_batch=4, fixed=fixed)
        assert asdict(found.allotment).items() >= fixed.items()


def test_mapped_weights_take_no_memory():
    samples = rows(32, 20)
    here, converted = streamed(dtype=torch.float32), streamed()
    assert fit(here, samples, 2**40, micro_batch=2).phases["backward"]["weights"] == 0
    inside = sum(p.numel() for p in here.blocks[0].parameters())
    found = fit(converted, samples, 2**40, micro_batch=2)
    assert found.phases["backward"]["weights"] == 4 * inside * 2  # all four blocks stay


def test_a_device_that_is_not_here():
    stream, samples = streamed(dtype=torch.float32), rows(32, 20)
    there = torch.device("cuda")
    roomy = fit(stream, samples, 2**40, micro_batch=2, device=there)
    assert {parts["process"] for parts in roomy.phases.values()} == {CONTEXT}
    assert roomy.phases["backward"]["weights"] > 0  # nothing is mapped there
    assert roomy.allotment.activation_bytes > 0
    tight = fit(stream, samples, roomy.least, micro_batch=2, device=there)
    assert tight.allotment.activation_bytes == 0 < tight.allotment.host_bytes
    assert tight.spilled > 0


@pytest.mark.parametrize(
    ("names", "prefix"),
    [(("memory.max", "memory.current"), ""), (("limit_in_bytes", "usage_in_bytes"), "total_")],
)
def test_the_files_that_a_container_has_cached_are_free_memory(
    names, prefix, tmp_path, monkeypatch
):
    """A pass over a large checkpoint leaves the container full of them."""
    monkeypatch.setattr(budget_module, "resident_bytes", lambda: 0)
    monkeypatch.setattr(budget_module, "_CGROUPS", [(tmp_path / "none", *names)])
    cpu = torch.device("cpu")
    assert available_bytes(cpu) > 64 * MIB
    monkeypatch.setattr(budget_module, "_CGROUPS", [(tmp_path, *names)])
    for name, size in zip(names, (64 * MIB, 60 * MIB), strict=True):
        (tmp_path / name).write_text(f"{size}\n")
    statistics = {"anon": 10, "inactive_file": 30, "active_file": 20}
    lines = [f"{prefix}{name} {size * MIB}\n" for name, size in statistics.items()]
    (tmp_path / "memory.stat").write_text("".join(lines))
    assert available_bytes(cpu) == int(54 * MIB * 0.8)
    (tmp_path / names[0]).write_text("max\n")
    assert available_bytes(cpu) > 64 * MIB


def test_a_library_that_is_still_to_be_imported_counts(monkeypatch):
    stream, samples = streamed(), rows(20)
    plain = Needs(stream, samples, {}, outer=True, durable=True).process
    stream.checkpoint.quantisation = object()
    monkeypatch.delitem(needs_module.sys.modules, "bitsandbytes", raising=False)
    assert Needs(stream, samples, {}, outer=True, durable=True).process == plain + LIBRARY
    monkeypatch.setitem(needs_module.sys.modules, "bitsandbytes", object())
    assert Needs(stream, samples, {}, outer=True, durable=True).process == plain


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("resident", [0, 3])
@pytest.mark.parametrize("head_rows", [None, 100])
def test_a_pass_reads_and_writes_what_is_predicted(family, resident, head_rows):
    stream, samples = streamed(family), rows(32, 20, 17)
    needs = Needs(stream, samples, {}, outer=True, durable=False)
    allotment = Allotment(2, resident=resident, head_rows=head_rows)
    predicted = needs.predict(allotment)
    passed = stream_sensitivity(
        stream,
        samples,
        allotment=allotment,
        on_block=lambda scores: None,
        on_outer=lambda scores: None,
        show=False,
    )
    # the embedding's rows are looked up, not read as a part
    rows_of_embedding = predicted.read.pop("record")
    assert sum(predicted.read.values()) - rows_of_embedding == passed.bytes_read
