# SPDX-License-Identifier: Apache-2.0
"""Training the hypernetwork: against a plain loop, its schedules, what resuming and NaN do."""

import random
from dataclasses import replace

import model_zoo as zoo
import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from pkt_ext.errors import InputError
from pkt_ext.methods.alignment import (
    Alignment,
    AlignmentConfig,
    EarlyStop,
    draw_rows,
    row_losses,
)
from pkt_ext.methods.hypernetwork import Hypernetwork, penalty
from pkt_ext.methods.matching import Match, Places, student_deltas
from pkt_ext.models.anatomy import describe
from pkt_ext.models.injection import injected
from pkt_ext.streaming.batches import Sample
from pkt_ext.streaming.blocks import batches_for
from pkt_ext.streaming.progress import Progress

STD = 0.03  # a start whose deltas count at once


def some_rows(count=6, *, seed=0) -> list[Sample]:
    """Rows of different lengths, with a prompt each."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for i in range(count):
        ids = torch.randint(3, 40, (7 + 5 * i,), generator=generator)
        labels = ids.clone()
        labels[: 2 + i] = -100
        rows.append(Sample(f"row{i}", ids, labels))
    return rows


def some_match(teacher, student, *, n=6, seed=0) -> Match:
    """Random neurons of the teacher for random ones of every block of the student."""
    generator = torch.Generator().manual_seed(seed)
    theirs, ours = describe(teacher), describe(student)
    blocks, neurons = tuple(range(len(ours.blocks))), {}
    for role in ("up", "down", "v", "o"):
        found = []
        for block in blocks:
            part = next(p for p in theirs.projections[block] if p.role == role)
            name = f"{theirs.blocks[block]}.{part.module}.weight"
            matrix = part.matrix(teacher.get_parameter(name).detach())
            matrix = matrix if role in ("up", "v") else matrix.T
            found.append(matrix[torch.randperm(len(matrix), generator=generator)[:n]])
        neurons[role] = torch.stack(found)

    def places(width):
        index = [torch.randperm(width, generator=generator)[:n] for _ in blocks]
        return Places(blocks, torch.stack(index))

    return Match(neurons, places(ours.intermediate_size), places(ours.heads * ours.head_dim))


def made(family="llama_gqa", *, std=STD, **settings):
    """(alignment, match) of the tiny pair."""
    teacher, student = zoo.pair(family)
    network = Hypernetwork(48, 32, seed=1, std=std)
    settings = {"steps": 8, "learning_rate": 3e-3} | settings
    return Alignment(student, network, AlignmentConfig(**settings)), some_match(teacher, student)


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize("family", ["llama_gqa", "gpt_neox", "gpt2", "phi3_gqa"])
def test_training_lowers_the_loss_and_leaves_the_student_alone(family):
    alignment, match = made(family, std=1e-5, learning_rate=1e-2)  # the published start
    student, rows = alignment.student, some_rows()
    student.train()
    student.get_output_embeddings().eval()
    modes = [module.training for module in student.modules()]
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    flags = [parameter.requires_grad for parameter in student.parameters()]
    reports = [alignment.step(match, rows) for _ in range(8)]
    assert [report.step for report in reports] == list(range(1, 9)) and alignment.done == 8
    assert reports[-1].edited < reports[-1].unedited - 0.1
    assert len({report.unedited for report in reports}) == 1
    assert mean(alignment.losses(rows, match)) < mean(alignment.losses(rows)) - 0.1
    assert all(torch.equal(tensor, before[n]) for n, tensor in student.state_dict().items())
    assert [parameter.requires_grad for parameter in student.parameters()] == flags
    assert all(p.grad is None for p in student.parameters())
    assert [module.training for module in student.modules()] == modes
    assert not any(m._forward_hooks or "forward" in vars(m) for m in student.modules())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("family", ["llama_gqa", "gpt_neox"])
def test_gradient_is_that_of_the_plain_loop(family, reduction):
    """As published: everything anew for each row, through an undivided graph."""
    alignment, match = made(family, reduction=reduction, gradient_checkpointing=False)
    student, network, rows = alignment.student, alignment.hypernetwork, some_rows()
    expected = [torch.zeros_like(p) for p in network.parameters()]
    for row in rows:
        translated = network(match.neurons)
        with injected(student, student_deltas(translated, match, alignment.anatomy)):
            loss = student(row.input_ids[None], labels=row.labels[None], use_cache=False).loss
        loss = loss + penalty(translated, 1000.0)
        for total, each in zip(
            expected, torch.autograd.grad(loss, list(network.parameters())), strict=True
        ):
            total += each / (len(rows) if reduction == "mean" else 1)
    report = alignment.step(match, rows)
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
    assert report.gradient_norm == pytest.approx(torch.cat([g.flatten() for g in expected]).norm())


def test_micro_batches_and_recomputation_change_nothing():
    rows, found = some_rows(), []
    for settings in (
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True},
        {"micro_batch": 4},
    ):
        alignment, match = made(**settings)
        report = alignment.step(match, rows)
        gradients = [p.grad for p in alignment.hypernetwork.parameters()]
        found.append((report, torch.cat([g.flatten() for g in gradients])))
        assert alignment.losses(rows) == pytest.approx(made()[0].losses(rows))
    for report, gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-4, atol=1e-5)
        assert report.edited == pytest.approx(found[0][0].edited)
        assert report.unedited == pytest.approx(found[0][0].unedited)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_losses_are_the_models_own(family):
    student = zoo.build(family)
    rows = some_rows()
    for size in (1, 4):
        for batch in batches_for(student, describe(student), rows, size, "cpu"):
            with torch.no_grad():
                ours = row_losses(student, batch)
            for name, loss in zip(batch.ids, ours, strict=True):
                row = next(row for row in rows if row.id == name)
                with torch.no_grad():
                    given = row.input_ids[None], row.labels[None]
                    theirs = student(given[0], labels=given[1], use_cache=False).loss
                torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-5)


def test_only_target_positions_reach_the_head():
    student, seen = zoo.build("llama"), []
    student.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    (batch,) = batches_for(student, describe(student), some_rows(1), 1, "cpu")
    row_losses(student, batch)
    assert seen == [5]  # 7 tokens, 2 of the prompt; the last target is token 6


def test_a_zero_hypernetwork_is_the_identity():
    alignment, match = made(std=0.0)
    rows = some_rows()
    assert alignment.losses(rows, match) == alignment.losses(rows)
    report = alignment.step(match, rows)
    assert report.edited == report.unedited and report.penalty == 0.0


@pytest.mark.parametrize("cycle", [True, False])
@pytest.mark.parametrize("steps", [2, 9, 10, 11, 20])
def test_published_schedules(steps, cycle):
    found = {}
    rows, settings = some_rows(1), {"steps": steps, "learning_rate": 3e-5, "cycle_momentum": cycle}
    for schedule in ("onecycle", "constant"):
        alignment, match = made(schedule=schedule, **settings)
        group, found[schedule] = alignment.optimizer.param_groups[0], []
        for _ in range(steps if cycle else 2):
            first = group["betas"][0]
            found[schedule].append((alignment.step(match, rows).learning_rate, first))
        assert group["betas"][1] == 0.95 and group["weight_decay"] == 0.05
    assert all(rate == pytest.approx(3e-5 / 25) for rate, _ in found["constant"])
    assert all(first == (0.95 if cycle else 0.9) for _, first in found["constant"])
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], betas=(0.9, 0.95))
    if steps == 10:  # torch divides by zero there
        rates = [rate for rate, _ in found["onecycle"]]
        assert rates[0] == pytest.approx(1.2e-6) and max(rates) == pytest.approx(3e-5, rel=0.05)
        return
    scheduler = OneCycleLR(
        optimizer, 3e-5, total_steps=steps, pct_start=0.1, div_factor=25, final_div_factor=1,
        cycle_momentum=cycle,
    )  # fmt: skip
    for rate, first in found["onecycle"]:
        group = optimizer.param_groups[0]
        assert (rate, first) == (group["lr"], group["betas"][0])
        optimizer.step()
        scheduler.step()


def test_resumed_training_is_the_same_to_the_bit(tmp_path):
    rows, whole = some_rows(), Progress(tmp_path / "whole", {})
    alignment, match = made()
    reports = []
    for _ in range(5):
        reports.append(alignment.step(match, rows))
        alignment.save(whole, reports[-1])

    def interrupted(steps, kept, damage=None):
        progress = Progress(tmp_path / "cut", {}, resume=False)
        progress.record("locate")
        first, _ = made()
        for _ in range(steps):
            first.save(progress, first.step(match, rows))
        if damage:
            path = progress.folder / damage
            path.write_bytes(path.read_bytes()[:-1])
        progress = Progress(tmp_path / "cut", {})
        # other weights than at the start: they must come from the checkpoint
        again, _ = made(std=0.5 if kept else STD)
        found = again.resume(progress)
        assert len(found) == again.done == kept and progress.find("locate")
        while again.done < 5:
            found.append(again.step(match, rows))
            again.save(progress, found[-1])
        return again, found

    for steps, kept, damage in [
        (0, 0, None),
        (1, 1, None),
        (3, 3, None),
        (3, 2, "optimizer-1.safetensors"),  # the last step's: one step is done again
        (4, 3, "hypernetwork-0004.safetensors"),
        (4, 0, "hypernetwork-0002.safetensors"),  # the optimiser's state of step 1 is gone
    ]:
        again, found = interrupted(steps, kept, damage)
        assert found == reports
        for one, two in zip(
            again.hypernetwork.parameters(), alignment.hypernetwork.parameters(), strict=True
        ):
            assert torch.equal(one, two)
        for number in range(1, 6):
            name = f"hypernetwork-{number:04}.safetensors"
            first, second = ((tmp_path / f / name).read_bytes() for f in ("whole", "cut"))
            assert first == second
    for step in (2, 5):
        alignment.load_step(whole, step)
        one = Hypernetwork.load(whole.folder / f"hypernetwork-{step:04}.safetensors").state_dict()
        assert all(torch.equal(one[k], v) for k, v in alignment.hypernetwork.state_dict().items())


def test_what_is_not_finite_stops_by_name():
    alignment, match = made()
    rows = some_rows()
    alignment.step(match, rows)
    match.neurons["up"][0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="step 2: the loss of row 'row.' is nan"):
        alignment.step(match, rows)
    assert alignment.done == 1
    alignment, match = made()
    with torch.no_grad():
        alignment.hypernetwork.get_submodule("o").inner.weight.mul_(1e37)
    with pytest.raises(InputError, match="step 1: .*(nan|inf)"):
        alignment.step(match, rows)
    alignment, _ = made()
    with torch.no_grad():
        alignment.student.lm_head.weight[0, 0] = float("inf")
    with pytest.raises(InputError, match="after step 0: the loss of row 'row5' is nan"):
        alignment.losses(rows)


def test_float16_gradients_do_not_vanish():
    """Scaled, and the scale falls where a gradient overflows; bfloat16 needs none."""
    teacher, student = zoo.pair("llama_gqa")
    match, rows = some_match(teacher, student), some_rows()
    found = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        network = Hypernetwork(48, 32, seed=1, std=STD)
        config = AlignmentConfig(steps=4, learning_rate=3e-3)
        alignment = Alignment(student.to(dtype), network, config)
        if dtype == torch.float16:
            alignment._scale = 2.0**24
        alignment.step(match, rows)
        if dtype == torch.float16:
            assert 1 < alignment._scale < 2.0**24
        found[dtype] = torch.cat([p.grad.flatten() for p in network.parameters()])
    for dtype, most in ((torch.float16, 0.01), (torch.bfloat16, 0.05)):
        error = (found[dtype] - found[torch.float32]).norm() / found[torch.float32].norm()
        assert error < most


def test_rows_of_a_step_are_drawn_as_published():
    align, located = some_rows(20), some_rows(1, seed=9)[0]
    random.seed(3)
    expected = [*random.sample(align, 15), located]
    assert draw_rows(located, align, 3) == expected
    assert len(draw_rows(located, align[:4], 0)) == 5
    assert draw_rows(located, align, 3, rows=1) == [located]


def test_early_stop():
    stop = EarlyStop(2)
    losses = [3.0, 2.0, 2.5, 1.9, 1.9, 2.0]
    assert [stop.update(i, loss) for i, loss in enumerate(losses, 1)] == [False] * 5 + [True]
    assert (stop.best, stop.loss) == (4, 1.9)
    assert EarlyStop(1).update(1, float("nan"))


def test_refusals():
    alignment, match = made()
    student, rows = alignment.student, some_rows()
    fewer = {name: vectors[:, 1:] for name, vectors in match.neurons.items()}
    with pytest.raises(InputError, match="go in pairs"):
        replace(match, neurons=fewer)
    with pytest.raises(InputError, match="None places"):
        replace(match, attention=None)
    with pytest.raises(InputError, match="another student"):
        Alignment(student, Hypernetwork(48, 31), AlignmentConfig(steps=1))
    student.is_loaded_in_4bit = True
    with pytest.raises(InputError, match="no gradients on a CPU"):
        Alignment(student, Hypernetwork(48, 32), AlignmentConfig(steps=1))
    student.is_loaded_in_4bit = False
    wrong = Alignment(student, Hypernetwork(40, 32), AlignmentConfig(steps=1))
    with pytest.raises(InputError, match="48 numbers; the hypernetwork translates .* of 40"):
        wrong.step(match, rows)
    foreign = Sample("far", torch.tensor([1, 999]), torch.tensor([1, 999]))
    with pytest.raises(InputError, match="vocabulary of 264"):
        alignment.step(match, [*rows, foreign])
    for settings, words in [
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"regulariser": -1.0}, "regulariser is -1"),
        ({"betas": (0.9, 1.0)}, "betas are"),
        ({"schedule": "cosine"}, "cosine"),
        ({"reduction": "max"}, "max"),
    ]:
        with pytest.raises(InputError, match=words):
            AlignmentConfig(**{"steps": 1} | settings)
    with pytest.raises(InputError, match="patience is 0"):
        EarlyStop(0)
