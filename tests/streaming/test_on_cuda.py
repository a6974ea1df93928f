# SPDX-License-Identifier: Apache-2.0
"""The streamed pass and what runs on top of it on a GPU, against the same on the CPU.

What only a card has is all here: the link's stream and pinned buffers, activations in pinned
memory, hooks that run in the backward's own thread, blocks on the device.
"""

import json

import model_zoo
import published
import pytest
import torch

from pkt_ext import artifact, cli
from pkt_ext.attribution.neurons import locate
from pkt_ext.attribution.sensitivity import stream_sensitivity
from pkt_ext.data import IGNORED
from pkt_ext.streaming import reader
from pkt_ext.streaming.batches import Sample
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import Allotment
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.store import ActivationStore

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PLENTY = 2**40
SHARES = {
    "all on the device": {"resident": 4, "activation_bytes": PLENTY},
    "blocks streamed": {"activation_bytes": PLENTY},
    "one after the other": {"activation_bytes": PLENTY, "ahead": False},
    "activations in pinned memory": {"host_bytes": PLENTY},
    "some of them in files": {"host_bytes": 2**14},
    "the head in parts": {"head_rows": 100, "activation_bytes": PLENTY},
}
ROWS = [{"prompt": f"{i} + {i} =", "completion": f"{2 * i}" * (1 + i % 3)} for i in range(5)]


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """A matrix takes both of the link's buffers several times over."""
    monkeypatch.setattr(reader, "_PINNED", 4096)


def scored(stream, rows, **share):
    """({parameter of a block: its scores}, {embedding, head: column sums}, report), on the host."""
    scores, outer = {}, {}

    def on_block(found):
        path = stream.anatomy.blocks[found.index]
        scores.update({f"{path}.{name}": score.cpu() for name, score in found.scores.items()})

    report = stream_sensitivity(
        stream,
        rows,
        allotment=Allotment(2, **share),
        on_block=on_block,
        on_outer=lambda found: outer.update({found.name: found.column_sums.cpu()}),
        show=False,
    )
    return scores, outer, report


def assert_near(found, truth, relative=1e-3):
    assert found.keys() == truth.keys()
    for name, values in truth.items():
        error = (found[name] - values).abs().max()
        assert error <= relative * values.max(), f"{name}: off by {float(error / values.max()):.1e}"


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "gemma2"])
def test_scores_are_those_of_the_cpu(family, share, tmp_path):
    folder = model_zoo.save(model_zoo.build(family, layers=4), tmp_path)
    rows = published.samples((30, 9, 17, 23, 5), vocab=model_zoo.VOCAB)
    truth, outer, expected = scored(StreamedModel(Checkpoint.open(folder)), rows)
    stream = StreamedModel(Checkpoint.open(folder), device="cuda")
    found, columns, report = scored(stream, rows, **SHARES[share])
    assert_near(found, truth)
    assert_near(columns, outer)
    assert report.losses == pytest.approx(expected.losses, rel=1e-4)
    assert report.peak_bytes > 0 and all(seconds >= 0 for seconds in report.waits.values())
    assert (report.spilled_bytes > 0) == (share == "some of them in files")


def test_weights_of_another_dtype_are_converted_on_the_way(tmp_path):
    folder = model_zoo.save(model_zoo.build("llama_gqa", layers=4).bfloat16(), tmp_path)
    rows = published.samples((30, 9, 17), vocab=model_zoo.VOCAB)
    sides = [
        StreamedModel(Checkpoint.open(folder), dtype=torch.float32, device=device)
        for device in ("cpu", "cuda")
    ]
    (truth, _, _), (found, _, _) = (scored(stream, rows) for stream in sides)
    assert_near(found, truth)


def test_pinned_memory_is_counted_as_torch_hands_it_out(tmp_path):
    store = ActivationStore(torch.device("cuda"), 0, tmp_path, host_limit=3 * 2**16)
    made = [torch.randn(2**14 + 1, device="cuda") for _ in range(2)]  # rounded up to 128 KiB
    for number, tensor in enumerate(made):
        store.put("group", number, tensor)
    assert store.bytes_in_host == 2**17 and store.bytes_on_disk == made[1].nbytes
    assert all(store.get("group", number).equal(tensor) for number, tensor in enumerate(made))
    store.drop("group")
    assert store.bytes_in_host == 0
    store.close()


@pytest.mark.parametrize("family", ["llama_gqa", "gpt_neox", "gemma2"])
def test_neurons_are_those_of_the_cpu(family, tmp_path):
    folder = model_zoo.save(model_zoo.build(family, layers=4), tmp_path)
    rows = []
    for number, row in enumerate(published.samples((20, 9, 13), vocab=model_zoo.VOCAB)):
        labels = torch.full_like(row.input_ids, IGNORED)
        labels[-1] = row.input_ids[-1]
        rows.append(Sample(str(number), row.input_ids, labels))
    ours, theirs = (
        locate(
            StreamedModel(Checkpoint.open(folder), device=device),
            rows,
            blocks=3,
            attention_neurons=4,
            ffn_neurons=6,
            allotment=Allotment(2),
            show=False,
        )
        for device in ("cuda", "cpu")
    )
    for one, two in zip(ours, theirs, strict=True):
        assert one.log_prob == pytest.approx(two.log_prob, abs=1e-4)
        assert one.ffn_gains == pytest.approx(two.ffn_gains, abs=1e-4)
        assert one.attention_gains == pytest.approx(two.attention_gains, abs=1e-4)
        for here, there in zip(one.attention + one.ffn, two.attention + two.ffn, strict=True):
            assert here.block == there.block and here.indices.device.type == "cpu"
            torch.testing.assert_close(here.scores, there.scores, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return model_zoo.save_pair(tmp_path_factory.mktemp("pair"), ROWS)


def models(place):
    return [f"--teacher={place / 'teacher'}", f"--student={place / 'student'}", "-q"]


def test_seeking_cuts_the_same_windows(place, tmp_path):
    found = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        more = [f"--data={place / 'rows.jsonl'}", f"--out={out}", f"--device={device}", "--rank=4"]
        assert cli.run(["seeking", *models(place), *more, "--budget=3GiB"]) == 0
        report = json.loads((out / "report.json").read_bytes())
        windows = {name: (w["row"], w["col"]) for name, w in report["windows"].items()}
        found.append((report["blocks"], windows))
    assert found[0] == found[1]


def test_laten_from_end_to_end(place, tmp_path):
    files = [f"--{name}={place / 'rows.jsonl'}" for name in ("locate", "align", "holdout")]
    more = ["--rate=0.2", "--rows=2", "--device=cuda", f"--out={tmp_path / 'out'}"]
    assert cli.run(["laten", *models(place), *files, *more]) == 0
    assert artifact.verify(tmp_path / "out") == []


@pytest.mark.parametrize("objective", ["cosine", "fisher", "geometry"])
def test_semalign_sees_the_same_on_both(place, tmp_path, objective):
    found = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        more = [f"--data={place / 'rows.jsonl'}", f"--out={out}", f"--device={device}"]
        more += [f"--objective={objective}", "--steps=2", "--batch=2", "--micro-batch=2"]
        more += ["--hold-out=0.4", "--map-cache=none"]
        assert cli.run(["semalign", *models(place), *more]) == 0
        assert artifact.verify(out) == []
        found.append(json.loads((out / "report.json").read_bytes()))
    here, there = found
    assert here["pairs"] == there["pairs"]
    assert here["attribution"] == pytest.approx(there["attribution"], rel=1e-3, abs=1e-6)
    assert here["before"]["kl"] == pytest.approx(there["before"]["kl"], rel=1e-3)
    for one, two in zip(here["losses"], there["losses"], strict=True):
        assert one["losses"][0] == pytest.approx(two["losses"][0], rel=1e-3)
