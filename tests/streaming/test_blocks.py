# SPDX-License-Identifier: Apache-2.0
"""The layer-major engine: what is resident when, what is read how often, batches, activations."""

import copy
import json
import logging
from contextlib import contextmanager
from pathlib import Path

import model_zoo as zoo
import published
import pytest
import torch

from pkt_ext.errors import InputError, ResourceError
from pkt_ext.streaming.batches import ALIGNMENT, IGNORED, make_batches
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import Allotment
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.passes import Pass, Visitor
from pkt_ext.streaming.reader import Part
from pkt_ext.streaming.store import ActivationStore


class Reader:
    """A checkpoint that writes down what is read, and what was resident then."""

    def __init__(self, checkpoint):
        self.checkpoint, self.reads, self.resident, self.model = checkpoint, [], [], None

    def __getattr__(self, name):
        return getattr(self.checkpoint, name)

    def skeleton(self, dtype):
        self.model = self.checkpoint.skeleton(dtype)
        return self.model

    def load(self, names, dtype, device, move=None):
        self.resident.append(resident(self.model))
        self.reads.append(names)
        return self.checkpoint.load(names, dtype, device, move)


def resident(model) -> set[str]:
    return {n for n, p in model.named_parameters() if not p.is_meta}


class Witness(Visitor):
    """Writes down what is resident while the engine works on a block."""

    def __init__(self, stream):
        self.stream, self.seen, self.inputs = stream, [], {}

    @contextmanager
    def _look(self, step, index):
        yield
        self.seen.append((step, index))
        assert resident(self.stream.model) == set(self.stream.block_names[index])

    def forward(self, index, block, batch):
        return self._look("forward", index)

    def loaded(self, index, block, scale):
        assert scale == 1.0
        self.seen.append(("loaded", index))

    def backward(self, index, block, batch):
        return self._look("backward", index)

    def finished(self, index, block):
        self.seen.append(("finished", index))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 4])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_one_block_is_resident_and_read_as_often_as_said(family, kept, ahead, tmp_path):
    folder = zoo.save(zoo.build(family, layers=4), tmp_path)
    reader = Reader(Checkpoint.open(folder))
    stream = StreamedModel(reader)
    witness = Witness(stream)
    rows = published.samples((9, 4, 13), vocab=zoo.VOCAB)
    share = Allotment(2, ahead=ahead, resident=kept)
    batches = stream.batches(rows, 2)
    with Pass(stream, batches, witness, allotment=share, show=False) as run:
        run.run()
        found = run.report()
    if not ahead:  # one part leaves before the next comes; norms stay while the head comes
        assert all(len(names) < len(stream.block_names[0]) for names in reader.resident)
    order = [names for names in reader.reads if names in stream.block_names]
    assert order == [*stream.block_names, *reversed(stream.block_names[: 4 - kept])]
    outer = [names for names in reader.reads if names not in stream.block_names]
    assert stream.embedding_name not in outer[0]  # only its rows were read
    assert [n for names in outer[1:] for n in names] == [
        *run.readout.small_names,
        stream.head_name,
    ]
    blocks = sum(reader.checkpoint.bytes_of(names) for names in order)
    assert found.bytes_read == blocks + sum(map(reader.checkpoint.bytes_of, outer[1:]))
    assert set(found.waits) == {"disk", "link", "compute"} and found.seconds > 0
    assert resident(stream.model) == set()
    assert witness.seen == [("forward", i) for i in range(4) for _ in range(2)] + [
        step
        for i in (3, 2, 1, 0)
        for step in (("loaded", i), ("backward", i), ("backward", i), ("finished", i))
    ]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_forward_alone_reads_once_and_keeps_one_boundary(family, ahead, tmp_path):
    folder = zoo.save(zoo.build(family, layers=4), tmp_path)
    rows = published.samples((9, 4, 13), vocab=zoo.VOCAB)
    whole = StreamedModel(Checkpoint.open(folder))
    with Pass(whole, whole.batches(rows, 2), show=False) as run:
        outputs = Outputs()
        run.visitor = outputs
        run.run()

    reader = Reader(Checkpoint.open(folder))
    stream = StreamedModel(reader)
    witness, alone = Witness(stream), Outputs()
    batches = stream.batches(rows, 2)
    with Pass(stream, batches, alone, allotment=Allotment(2, ahead=ahead), show=False) as run:
        alone.beside, alone.store = witness, run.store
        run.forward([Part((stream.head_name,))])
        with run.resident(Part((stream.head_name,))):
            assert resident(stream.model) == {stream.head_name}
        found = run.report()
        assert not run.store._entries  # nothing is left
    assert witness.seen == [("forward", i) for i in range(4) for _ in range(2)]
    assert reader.reads[1:] == [*stream.block_names, (stream.head_name,)]  # after the embedding's
    assert all(a.equal(b) for a, b in zip(alone.found, outputs.found, strict=True))
    assert alone.boundaries == 2 and found.losses == {}
    assert set(found.stages) == {"record", "load", "forward"} and resident(stream.model) == set()


class Outputs(Visitor):
    """Keeps every block's output, and counts the boundaries that are stored at once."""

    def __init__(self):
        self.found, self.boundaries, self.beside, self.store = [], 0, Visitor(), None

    @contextmanager
    def forward(self, index, block, batch):
        def keep(module, args, output):
            self.found.append(output[0] if isinstance(output, tuple) else output)

        with self.beside.forward(index, block, batch):
            handle = block.register_forward_hook(keep)
            yield
            handle.remove()
        if self.store is not None:
            self.boundaries = max(self.boundaries, len(self.store._entries))


def test_masks_are_kept_once_for_all_blocks_and_samples():
    stream = StreamedModel(Checkpoint.open(zoo.build("gemma2", layers=4)))
    rows = published.samples((20, 25, 30), vocab=zoo.VOCAB)
    with Pass(stream, stream.batches(rows, 3), show=False) as run:
        run.run()
        kept = {}  # storage -> bytes
        for _, kwargs in run._calls[0]:
            mask = kwargs["attention_mask"]
            assert mask.shape == (3, 1, 32, 32)
            kept[mask.untyped_storage().data_ptr()] = mask.untyped_storage().nbytes()
    assert list(kept.values()) == [32 * 32 * 4] * 2  # sliding and full, of one sample each


def test_untied_head_is_absent_while_embedding_and_the_other_way_round(tmp_path):
    stream = StreamedModel(Checkpoint.open(zoo.save(zoo.build("llama"), tmp_path)))
    assert stream.first_names == ("model.embed_tokens.weight", "model.norm.weight")
    assert stream.last_names == ("model.norm.weight", "lm_head.weight")


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_gradient_of_the_hidden_states_equals_transformers(family):
    """The gradient that leaves block 0, which saw every block, and the losses."""
    model = zoo.build(family)
    rows = published.samples((14, 6, 9), vocab=zoo.VOCAB)
    stream = StreamedModel(Checkpoint.open(model))
    batches = stream.batches(rows, 3)
    with Pass(stream, batches, show=False) as run:
        run.run()
        gradient = run.store.get("gradient-0000", 0)
        losses = run.report().losses
    (batch,) = batches
    model.requires_grad_(True)
    for index, name in enumerate(batch.ids):
        row = next(r for r in rows if r.id == name)
        kept = []
        handle = model.get_submodule(stream.anatomy.blocks[0]).register_forward_pre_hook(
            lambda _, args, kwargs, kept=kept: kept.append((args or (kwargs["hidden_states"],))[0]),
            with_kwargs=True,
        )
        loss = model(input_ids=row.input_ids[None], labels=row.labels[None], use_cache=False).loss
        handle.remove()
        (expected,) = torch.autograd.grad(loss, kept[0])
        length = batch.lengths[index]
        torch.testing.assert_close(
            gradient[index, :length], expected[0], rtol=0, atol=1e-5 * expected.abs().max().item()
        )
        assert not gradient[index, length:].any()  # padding: exactly zero
        assert losses[name] == pytest.approx(loss.item(), rel=1e-5)


def test_no_batch_sees_the_rotary_table_of_a_longer_one():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = zoo.build("llama", max_position_embeddings=16, rope_parameters=rope)
    rows = published.samples((10, 40, 16, 20), vocab=zoo.VOCAB)
    stream = StreamedModel(Checkpoint.open(model))
    for _ in range(2):
        with Pass(stream, stream.batches(rows, 2), show=False) as run:
            run.run()
            found = run.report().losses
        for row in rows:
            _, alone = published.sensitivity(copy.deepcopy(model), [row])
            assert found[row.id] == pytest.approx(alone[row.id], rel=1e-6)


def test_unknown_logit_scaling_is_refused():
    stream = StreamedModel(Checkpoint.open(zoo.build("llama")))
    plain = stream.model.forward

    def scaled(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits = out.logits / 8  # as Granite does
        return out

    stream.model.forward = scaled
    rows = published.samples((6,), vocab=zoo.VOCAB)
    with (
        Pass(stream, stream.batches(rows, 1), show=False) as run,
        pytest.raises(InputError, match="logits in a way that is not supported"),
    ):
        run.run()


def test_module_that_runs_twice_is_refused():
    from pkt_ext.models.capture import gradients

    linear = torch.nn.Linear(3, 3)
    twice = torch.nn.Sequential(linear, torch.nn.ReLU(), linear)
    with pytest.raises(InputError, match="twice in one forward"), gradients(twice, print):
        twice(torch.ones(2, 3, requires_grad=True))


def test_batches_sort_pad_and_find_targets():
    rows = published.samples((3, 20, 17, 5), vocab=50)
    first, second = make_batches(rows, 3, vocab_size=50)
    assert (first.ids, second.ids) == (("row-1", "row-2", "row-3"), ("row-0",))
    assert first.lengths == (20, 17, 5) and first.shape == (3, 2 * ALIGNMENT)
    assert second.shape == (1, ALIGNMENT)
    assert first.segments.tolist() == [0, 32, 64, 96]
    assert first.input_ids[2].tolist() == [*rows[3].input_ids, *[rows[3].input_ids[0]] * 27]
    assert (first.labels[2, 5:] == IGNORED).all()
    positions, targets = second.targets(0)  # 3 tokens, the first carries no loss
    assert positions.tolist() == [0, 1] and targets.equal(rows[0].input_ids[1:])


def test_repeated_ids_stay_apart():
    row = published.samples((9,), vocab=50)[0]
    (batch,) = make_batches([row, row, row], 3, vocab_size=50)
    assert batch.ids == ("row-0", "row-0 (2)", "row-0 (3)")


def test_batches_obey_limits_on_length():
    rows = published.samples((18, 20, 9, 30), vocab=50)
    assert make_batches(rows, 4, vocab_size=50, max_positions=30)[0].shape == (4, 30)
    shapes = [b.shape for b in make_batches(rows, 4, vocab_size=50, alone_above=18)]
    assert shapes == [(1, 30), (1, 20), (2, 18)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(labels=torch.tensor([5, -100, -100])), "no token to predict"),
        (dict(input_ids=torch.tensor([1, 2, 50])), "outside the model's vocabulary of 50"),
        (dict(input_ids=torch.tensor([1, -2, 3])), "outside the model's vocabulary of 50"),
        (dict(labels=torch.tensor([1, 2])), r"give both as \[T\]"),
        (dict(input_ids=torch.ones(9).long(), labels=torch.ones(9).long()), "has 8 positions"),
    ],
)
def test_bad_samples_are_named(change, message):
    good = dict(id="seed 7", input_ids=torch.tensor([1, 2, 3]), labels=torch.tensor([1, 2, 3]))
    sample = published.Sample(**(good | change))
    with pytest.raises(InputError, match=f"seed 7.*{message}"):
        make_batches([sample], 1, vocab_size=50, max_positions=8)


def test_no_samples_and_no_micro_batch_are_refused():
    with pytest.raises(InputError, match="no samples"):
        make_batches([], 1, vocab_size=50)
    with pytest.raises(InputError, match="micro_batch is 0"):
        make_batches(published.samples((4,), vocab=50), 0, vocab_size=50)


def test_learned_positions_limit_the_length_and_rotary_ones_do_not():
    rows = published.samples((140,), vocab=zoo.VOCAB)  # the configurations say 128
    with pytest.raises(InputError, match="140 tokens, the model has 128 positions"):
        StreamedModel(Checkpoint.open(zoo.build("gpt2"))).batches(rows, 1)
    assert StreamedModel(Checkpoint.open(zoo.build("llama"))).batches(rows, 1)[0].shape == (1, 144)


@pytest.mark.parametrize("limit", [0, 100, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_store_returns_what_was_put(limit, dtype, tmp_path):
    store = ActivationStore(torch.device("cpu"), limit, str(tmp_path))
    made = {
        (g, i): torch.randn(3 + i, 4 + n).mul(9).to(dtype)
        for n, g in enumerate("ab")
        for i in range(3)
    }
    for (group, item), tensor in made.items():
        store.put(group, item, tensor)
    made["a", 1] = torch.randn(4, 4).to(dtype)
    store.put("a", 1, made["a", 1])  # the same size, in its place
    made["b", 0] = torch.randn(11, 7).to(dtype).T
    store.put("b", 0, made["b", 0])  # another size and not contiguous
    for (group, item), tensor in made.items():
        assert store.get(group, item).equal(tensor)
    assert store.bytes_in_memory <= limit and (store.bytes_on_disk == 0) == (limit == 10**6)
    store.drop("a")
    with pytest.raises(KeyError):
        store.get("a", 0)
    assert store.get("b", 2).equal(made["b", 2])
    store.close()
    assert store.bytes_in_memory == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [0, 10**6])
def test_durable_store_is_taken_up_again_unless_damaged(limit, tmp_path):
    store = ActivationStore(torch.device("cpu"), limit, tmp_path, durable=True)
    made = {i: torch.randn(5, 4 + i) for i in range(3)}
    for item, tensor in made.items():
        store.put("hidden", item, tensor)
    store.put("scratch", 0, made[0], passing=True)
    entries = json.loads(json.dumps(store.entries("hidden")))
    store.close()
    again = ActivationStore(torch.device("cpu"), limit, tmp_path, durable=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hidden.activations"]
    assert again.restore("hidden", entries)
    assert all(again.get("hidden", item).equal(tensor) for item, tensor in made.items())
    again.put("hidden", 7, made[2])  # behind what is there
    assert all(again.get("hidden", item).equal(tensor) for item, tensor in made.items())
    path = tmp_path / "hidden.activations"
    content = bytearray(path.read_bytes())
    content[entries[1]["offset"] + 3] ^= 1
    path.write_bytes(content)
    assert not ActivationStore(torch.device("cpu"), 0, tmp_path).restore("hidden", entries)
    path.write_bytes(content[:20])
    assert not ActivationStore(torch.device("cpu"), 0, tmp_path).restore("hidden", entries)
    again.drop("hidden")
    assert not list(tmp_path.iterdir())
    assert not again.restore("hidden", entries)
    again.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_full_disk_says_what_to_do(monkeypatch):
    monkeypatch.setattr(
        "pkt_ext.streaming.store.tempfile.TemporaryFile", lambda **_: open("/dev/full", "r+b", 0)
    )
    store = ActivationStore(torch.device("cpu"), 0)
    with pytest.raises(ResourceError, match="no space for 40000 bytes.*TMPDIR"):
        store.put("a", 0, torch.ones(10000))
        store.flush()


def test_progress_is_plain_lines_without_a_terminal(caplog):
    stream = StreamedModel(Checkpoint.open(zoo.build("llama")))
    rows = published.samples((6,), vocab=zoo.VOCAB)
    with (
        caplog.at_level(logging.INFO, "pkt_ext"),
        Pass(stream, stream.batches(rows, 1), show=True) as run,
    ):
        run.run()
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("pkt_ext.streaming")]
    assert [line.split(",")[0] for line in lines] == [
        "forward: block 1 of 2",
        "forward: block 2 of 2",
        "backward: block 2 of 2",
        "backward: block 1 of 2",
    ]
    assert all(" GB/s" in line and line.endswith(" s left") for line in lines)
