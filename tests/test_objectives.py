# SPDX-License-Identifier: Apache-2.0
"""Losses and gradients against plain formulas in float64, and the identities of the paper."""

import model_zoo as zoo
import pytest
import torch
import torch.nn.functional as F

from pkt_ext.errors import InputError, NonFiniteError
from pkt_ext.models.anatomy import describe
from pkt_ext.models.frontier import activations
from pkt_ext.objectives import (
    CosineOutput,
    CosineSteering,
    Counts,
    CrossEntropyOutput,
    FisherAlignment,
    Objective,
    OutputDistillation,
    RelationGeometry,
    relation_distance,
)

ROWS, WIDTH, TEACHER, VOCAB = 13, 16, 24, 37
SEGMENTS = torch.tensor([0, 7, 9, 13])  # the second sequence is too short for A10
CAP, TAU = 3.0, 1.7


def draw(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator)


STATES, TARGETS, OUTPUT = (
    draw(ROWS, WIDTH),
    draw(ROWS, WIDTH, seed=1),
    draw(ROWS, TEACHER, seed=2),
)
LABELS = torch.arange(ROWS) % VOCAB
HEAD, TEACHER_HEAD = draw(VOCAB, WIDTH, seed=3), draw(VOCAB, TEACHER, seed=4)


def norm_module():
    norm = torch.nn.LayerNorm(WIDTH)
    with torch.no_grad():
        norm.weight.copy_(draw(WIDTH, seed=5))
        norm.bias.copy_(draw(WIDTH, seed=6))
    return norm.requires_grad_(False)


# --- the formulas, as they stand in the paper ---------------------------------------------------


def capped(logits, cap):
    return logits if cap is None else cap * torch.tanh(logits / cap)


def plain_cosine(states, targets):
    return (1 - F.cosine_similarity(states, targets)).mean()


def plain_fisher(states, targets, norm, head, tau, cap):
    z, aligned = (
        capped(F.layer_norm(x, (WIDTH,), norm.weight.double(), norm.bias.double()) @ head.T, cap)
        for x in (states, targets)
    )
    losses = []
    for row, other in zip(z, aligned, strict=True):
        p = (other / tau).softmax(0)
        D = row - other
        losses.append(D @ (torch.diag(p) - torch.outer(p, p)) @ D / 2)
    return torch.stack(losses).mean()


def plain_geometry(states, targets, segments):
    losses = []
    for start, end in zip(segments, segments[1:], strict=False):
        if end - start < 3:
            continue
        C = torch.eye(end - start).double() - 1 / (end - start)
        R, S = states[start:end], targets[start:end]
        G, H = C @ R @ R.T @ C, C @ S @ S.T @ C
        losses.append(1 - (G * H).sum() / (G.norm() * H.norm()))
    return torch.stack(losses).mean()


def plain_cosine_output(states, labels, head, cap):
    z = capped(states @ head.T, cap)
    return (1 - F.cosine_similarity(z, F.one_hot(labels, len(head)).double())).mean()


def plain_cross_entropy(states, labels, head, cap):
    return F.cross_entropy(capped(states @ head.T, cap), labels)


def plain_distillation(states, output, head, teacher_head, tau, cap, teacher_cap):
    z = (capped(states @ head.T, cap) / tau).log_softmax(1)
    teacher = (capped(output @ teacher_head.T, teacher_cap) / tau).log_softmax(1)
    return tau**2 * (teacher.exp() * (teacher - z)).sum(1).mean()


NORM = norm_module()
CASES = {
    "cosine": (CosineSteering(), TARGETS, plain_cosine, ()),
    "fisher": (
        FisherAlignment(NORM, HEAD, temperature=TAU, cap=CAP),
        TARGETS,
        plain_fisher,
        (NORM, HEAD.double(), TAU, CAP),
    ),
    "geometry": (RelationGeometry(), TARGETS, plain_geometry, (SEGMENTS,)),
    "geometry of another width": (RelationGeometry(), OUTPUT, plain_geometry, (SEGMENTS,)),
    "cosine output": (
        CosineOutput(HEAD, cap=CAP),
        LABELS,
        plain_cosine_output,
        (HEAD.double(), CAP),
    ),
    "cross-entropy": (CrossEntropyOutput(HEAD), LABELS, plain_cross_entropy, (HEAD.double(), None)),
    "distillation": (
        OutputDistillation(HEAD, TEACHER_HEAD, temperature=TAU, cap=CAP),
        OUTPUT,
        plain_distillation,
        (HEAD.double(), TEACHER_HEAD.double(), TAU, CAP, None),
    ),
}


def with_gradient(loss, states, *arguments):
    states = states.clone().requires_grad_()
    value = loss(states, *arguments)
    return value.detach(), torch.autograd.grad(value, states)[0]


@pytest.mark.parametrize("case", CASES)
def test_against_the_formulas(case):
    loss, targets, plain, arguments = CASES[case]
    exact = targets if targets.dtype == torch.int64 else targets.double()
    expected, slope = with_gradient(plain, STATES.double(), exact, *arguments)
    value, gradient = with_gradient(loss, STATES, targets, SEGMENTS)
    assert value.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    scale = slope.abs().max().item()
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-5, atol=2e-6 * scale)
    each = loss.each(STATES, targets, SEGMENTS)
    assert len(each) == loss.count(targets, SEGMENTS) == (2 if "geometry" in case else ROWS)
    torch.testing.assert_close(each.mean(), value)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_losses(case, dtype):
    """In autocast as without, and gradients in the states' dtype."""
    loss, targets, *_ = CASES[case]
    states = STATES.to(dtype)
    value, gradient = with_gradient(loss, states, targets, SEGMENTS)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    exact, slope = with_gradient(loss, states.float(), targets, SEGMENTS)
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(gradient, slope.to(dtype))
    states.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = loss(states, targets, SEGMENTS)
    assert torch.equal(value, again)
    assert torch.equal(gradient, torch.autograd.grad(again, states)[0])


@pytest.mark.parametrize("case", CASES)
def test_heads_and_norms_are_not_registered(case):
    """A Trainer would train and save them."""
    loss = CASES[case][0]
    assert not list(loss.parameters()) and not list(loss.children()) and not loss.state_dict()


def test_heads_are_referred_to():
    """Moved with their model, never given a gradient."""
    head, states = torch.nn.Parameter(HEAD.clone()), STATES.clone().requires_grad_()
    loss = OutputDistillation(head, TEACHER_HEAD)
    before = loss(states, OUTPUT)
    before.backward()
    assert head.grad is None and states.grad is not None
    head.data = 2 * head.data  # as moving a model replaces them
    assert loss(states, OUTPUT) != before


# --- identities ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [3, 9, 40])  # Gram matrices of tokens, and of features
def test_geometry_sees_neither_rotation_nor_scale(rows):
    one = draw(rows, WIDTH).double()
    rotation = torch.linalg.qr(draw(WIDTH, WIDTH, seed=1).double()).Q
    for other in (one @ rotation, 7.0 * one, one + draw(WIDTH, seed=2)):
        assert relation_distance(one, other)[0].abs() < 1e-12
    assert relation_distance(one, draw(rows, WIDTH, seed=3).double())[0] > 0.1


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_geometry_of_tiny_and_huge_rows(size):
    plain = relation_distance(STATES, TARGETS)[0]
    torch.testing.assert_close(relation_distance(size * STATES, TARGETS)[0], plain)


def test_fisher_is_zero_where_the_difference_is_constant():
    head = torch.cat([HEAD[:, :-1], torch.ones(VOCAB, 1)], dim=1)
    shifted = TARGETS + 2.5 * F.one_hot(torch.tensor(WIDTH - 1), WIDTH)
    value, gradient = with_gradient(FisherAlignment(None, head), shifted, TARGETS)
    assert value.abs() < 1e-5 and gradient.abs().max() < 1e-5
    assert FisherAlignment(None, head)(STATES, TARGETS) > 1


def test_fisher_is_the_divergence_to_third_order():
    """KL(p || softmax(z)) and A9 part with the third power of the difference."""
    gaps = []
    for step in (0.05, 0.025):
        states = TARGETS + step * draw(ROWS, WIDTH, seed=7)
        fisher = FisherAlignment(None, HEAD).each(states, TARGETS)
        divergence = OutputDistillation(HEAD, HEAD).each(states, TARGETS)
        gaps.append((fisher - divergence).abs().mean())
    assert 6 < gaps[0] / gaps[1] < 10


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "gemma2", "opt_post_norm"])
def test_a_student_that_is_its_teacher_has_no_loss(family):
    model = zoo.build(family)
    anatomy = describe(model)
    ids = torch.tensor([[1, 40, 50, 60, 70, 80]])
    found = activations(model, anatomy, ids, 1)
    before, after, outputs = (x[0].detach() for x in vars(found).values())
    norm = model.get_submodule(anatomy.final_norm) if anatomy.final_norm else None
    head, cap = model.get_submodule(anatomy.head).weight, anatomy.logit_softcap
    distillation = OutputDistillation(head, head, cap=cap, teacher_cap=cap)
    for layer_loss, targets in (
        (FisherAlignment(norm, head, cap=cap), 3.0 * after if norm and cap is None else after),
        (RelationGeometry(), 3.0 * (after - before)),
    ):
        batch = {"layer": targets, "output": outputs, "segments": torch.tensor([0, len(after)])}
        loss, parts = Objective(layer_loss, distillation)(
            batch, before=before, after=after, outputs=outputs
        )
        assert loss.abs() < 1e-5 and set(parts) == {"layer_loss", "output_loss"}


# --- which rows count ---------------------------------------------------------------------------


def test_geometry_leaves_out_what_has_none():
    """Short sequences, and those whose rows do not differ, on either side."""
    loss = RelationGeometry()
    alone = loss(STATES[:7], TARGETS[:7])
    constant = TARGETS.clone()
    constant[9:] = 0.1 * constant[9]  # the mean of equal numbers is not quite that number
    value, gradient = with_gradient(loss, STATES, constant, SEGMENTS)
    torch.testing.assert_close(value, alone)
    assert loss.count(constant, SEGMENTS) == 1 and not gradient[7:].any()
    assert gradient.isfinite().all() and gradient[:7].any()
    still = STATES.clone()
    still[9:] = 0.0
    value, gradient = with_gradient(loss, still, TARGETS, SEGMENTS)
    torch.testing.assert_close(value, alone)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("targets", [torch.zeros(4, WIDTH), TARGETS[:4]])
def test_nothing_left_is_a_zero_with_a_graph(targets):
    value, gradient = with_gradient(
        RelationGeometry(), STATES[:4], targets, torch.tensor([0, 2, 2, 4])
    )
    assert value == 0 and not gradient.any()
    value, gradient = with_gradient(CosineSteering(), STATES[:0], targets[:0])
    assert value == 0 and gradient.shape == (0, WIDTH)


def test_nan_is_not_left_out():
    broken = STATES.clone()
    broken[10] = torch.nan
    assert RelationGeometry()(broken, TARGETS, SEGMENTS).isnan()


# --- the objective ------------------------------------------------------------------------------

BATCH = {"layer": TARGETS, "output": OUTPUT, "labels": LABELS, "segments": SEGMENTS}
DISTILLATION = OutputDistillation(HEAD, TEACHER_HEAD)


@pytest.mark.parametrize(
    "layer_loss, interface",
    [
        (CosineSteering(), "contribution"),
        (RelationGeometry(), "contribution"),
        (FisherAlignment(NORM, HEAD), "output"),
    ],
)
def test_an_objective_is_the_sum_of_its_parts(layer_loss, interface):
    """Of what the block adds to the stream, or of what comes out of it."""
    before, after, outputs = draw(3, ROWS, WIDTH, seed=8)
    states = after if interface == "output" else after - before
    objective = Objective(layer_loss, DISTILLATION, beta=0.25)
    total, parts = objective(BATCH, before=before, after=after, outputs=outputs)
    expected = layer_loss(states, TARGETS, SEGMENTS), DISTILLATION(outputs, OUTPUT)
    torch.testing.assert_close(total, expected[0] + 0.25 * expected[1])
    torch.testing.assert_close((parts["layer_loss"], parts["output_loss"]), expected)
    sequences = 2 if isinstance(layer_loss, RelationGeometry) else ROWS
    assert objective.counts(BATCH) == Counts(sequences, ROWS)


def test_contributions_of_half_precision_are_exact():
    before = draw(ROWS, WIDTH, seed=8, scale=100.0).bfloat16()
    after = before + draw(ROWS, WIDTH, seed=9).bfloat16()
    total, _ = Objective(CosineSteering())(BATCH, before=before, after=after)
    torch.testing.assert_close(total, CosineSteering()(after.float() - before.float(), TARGETS))


@pytest.mark.parametrize("layer_loss", [CosineSteering(), RelationGeometry()])
def test_parts_of_a_step_add_up(layer_loss):
    """Two micro-batches with the step's counts are the step, whatever rows each has."""
    before, after, outputs = draw(3, ROWS, WIDTH, seed=8)
    objective = Objective(layer_loss, CrossEntropyOutput(HEAD))
    whole, _ = objective(BATCH, before=before, after=after, outputs=outputs)
    counts, parts = objective.counts(BATCH), []
    for start, end, segments in ((0, 9, SEGMENTS[:3]), (9, 13, torch.tensor([0, 4]))):
        batch = {name: rows[start:end] for name, rows in BATCH.items()} | {"segments": segments}
        rows = (states[start:end] for states in (before, after, outputs))
        named = dict(zip(("before", "after", "outputs"), rows, strict=True))
        parts.append(objective(batch, **named, counts=counts)[0])
    torch.testing.assert_close(sum(parts), whole)


def test_errors():
    for arguments, message in (
        ((), "a layer loss, an output loss, or both"),
        ((DISTILLATION,), "OutputDistillation is no layer loss"),
        ((None, CosineSteering()), "CosineSteering is no output loss"),
        ((CosineSteering(), None, -1.0), "beta is -1.0; give 0 or more"),
    ):
        with pytest.raises(InputError, match=message):
            Objective(*arguments)
    with pytest.raises(InputError, match="37 rows, the teacher's 36; give the rows"):
        OutputDistillation(HEAD, TEACHER_HEAD[:-1])
    with pytest.raises(InputError, match="temperature is 0; give a positive number"):
        FisherAlignment(None, HEAD, temperature=0)
    with pytest.raises(InputError, match="CosineSteering needs 'layer' in every item"):
        Objective(CosineSteering())(
            {"segments": SEGMENTS, "layer": None}, before=STATES, after=STATES
        )


@pytest.mark.parametrize("broken", ["layer", "output"])
def test_the_loss_that_is_not_finite_is_named(broken):
    batch = BATCH | {broken: torch.full_like(BATCH[broken], torch.nan)}
    objective = Objective(CosineSteering(), DISTILLATION)
    loss = {"layer": "CosineSteering", "output": "OutputDistillation"}[broken]
    with pytest.raises(NonFiniteError, match=rf"the {broken} loss \({loss}\) is nan; lower"):
        objective(batch, before=STATES, after=TARGETS, outputs=STATES)
