# SPDX-License-Identifier: Apache-2.0
"""What a student is steered by, against the whole teacher's hidden states in float64."""

import model_zoo as zoo
import pytest
import torch

from pkt_ext.errors import NonFiniteError
from pkt_ext.methods.targets import Phase, Places, Source, make_targets
from pkt_ext.streaming.batches import Sample
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import Allotment
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.rows import RowFile

PHASES = [
    Phase(0, (Source(0),)),
    Phase(1, (Source(1, 0.75), Source(2, 0.25))),
    Phase(2, (Source(2),)),
]
WIDTH = 7


def samples():
    generator = torch.Generator().manual_seed(3)
    found = []
    for number, length in enumerate((9, 21, 4, 17)):
        ids = torch.randint(3, 259, (length,), generator=generator)
        found.append(Sample(f"row {number}", ids, ids))
    return found


POSITIONS = [torch.tensor(each) for each in ([0, 3, 7], [19], [0, 1, 2], list(range(5, 16)))]

ENDS = [torch.tensor(each) for each in ([8], [0, 20], [3], [4, 5])]


def whole(model, interface):
    """By sample: (what every block gives at the interface, the head's inputs), float64."""
    model = model.double()
    found = []
    for sample in samples():
        seen = []

        def look(module, args, output, seen=seen):
            seen.append((args[0], output[0] if isinstance(output, tuple) else output))

        hooks = [block.register_forward_hook(look) for block in blocks(model)]
        with torch.no_grad():
            last = model.base_model(sample.input_ids[None], use_cache=False).last_hidden_state[0]
        for hook in hooks:
            hook.remove()
        given = [(o if interface == "output" else o - i)[0] for i, o in seen]
        found.append((given, last))
    return found


def blocks(model):
    from pkt_ext.models.anatomy import describe

    return [model.get_submodule(path) for path in describe(model).blocks]


@pytest.mark.parametrize("interface", ["contribution", "output"])
@pytest.mark.parametrize(
    "family", ["llama_gqa", "qwen3", "gemma2", "gpt_neox", "gpt2", "opt_post_norm", "olmo2"]
)
def test_targets_are_what_the_whole_model_gives(tmp_path, family, interface):
    model = zoo.build(family, **zoo.TEACHER)
    stream = StreamedModel(Checkpoint.open(model))
    matrix = torch.randn(WIDTH, stream.anatomy.hidden_size)
    places = Places.of(samples(), POSITIONS)
    layers = [
        RowFile(tmp_path / f"layer-{n}", (places.total, WIDTH), torch.float32) for n in range(3)
    ]
    ends = Places.of(samples(), ENDS)
    output = RowFile(tmp_path / "output", (ends.total, 48), torch.float32)
    observed = {}
    report = make_targets(
        stream,
        samples(),
        phases=PHASES,
        layers=(layers, places),
        output=(output, ends),
        mapped=lambda rows: rows @ matrix.T,
        interface=interface,
        allotment=Allotment(2, activation_bytes=0),
        observe=lambda block, batch, hidden: observed.setdefault(block, []).append(hidden.shape),
        show=False,
    )
    assert report.peak_bytes > 0 and observed.keys() == {0, 1, 2}
    want = whole(model, interface)
    for phase, file in zip(PHASES, layers, strict=True):
        mixed = [
            sum(s.weight * given[s.block] for s in phase.sources)[positions]
            for (given, _), positions in zip(want, POSITIONS, strict=True)
        ]
        expected = torch.cat(mixed) @ matrix.double().T
        torch.testing.assert_close(file.read().double(), expected, rtol=1e-4, atol=2e-5)
    expected = torch.cat([last[p] for (_, last), p in zip(want, ENDS, strict=True)])
    torch.testing.assert_close(output.read().double(), expected, rtol=1e-4, atol=2e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "layer-0", "layer-1", "layer-2", "output"
    ]  # fmt: skip


def test_rows_that_float16_cannot_hold_are_named(tmp_path):
    stream = StreamedModel(Checkpoint.open(zoo.build("llama_gqa", **zoo.TEACHER)))
    places = Places.of(samples(), POSITIONS)
    layer = RowFile(tmp_path / "layer", (places.total, 48), torch.float16)
    output = RowFile(tmp_path / "output", (places.total, 48), torch.float16)
    with pytest.raises(NonFiniteError, match="block 1 .* use --dtype bfloat16 or float32"):
        make_targets(
            stream,
            samples(),
            phases=[Phase(0, (Source(1),))],
            layers=([layer], places),
            output=(output, places),
            mapped=lambda rows: 1e6 * rows,
            interface="output",
            allotment=Allotment(2, activation_bytes=0),
            show=False,
        )
