# SPDX-License-Identifier: Apache-2.0
"""Sparse deltas against dense ones added to the weights, in every family."""

import copy

import model_zoo as zoo
import pytest
import torch

from pkt_ext.errors import InputError
from pkt_ext.models.anatomy import describe
from pkt_ext.models.injection import changes, injected, value_row_numbers, value_rows

IDS = torch.tensor([[1, 40, 50, 60, 70, 80], [1, 9, 33, 200, 12, 5]])


def random_deltas(anatomy, *, seed=0, size=0.2, dtype=torch.float32):
    """Some rows of up and v, some columns of down and o, of every block, in no order."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for block, projections in enumerate(anatomy.projections):
        for role in ("up", "down", "v", "o"):
            out, size_in = next(p.shape for p in projections if p.role == role)
            count, width = (out, size_in) if role in ("up", "v") else (size_in, out)
            index = torch.randperm(count, generator=generator)[: 3 + block]
            values = size * torch.randn(len(index), width, generator=generator, dtype=dtype)
            deltas[block, role] = index, values
    return deltas


def dense(projection, index, values):
    """[out, in] of one projection, in plain torch, differentiable."""
    matrix = values.new_zeros(projection.shape)
    if projection.role in ("up", "v"):
        return matrix.index_add(0, index, values)
    return matrix.index_add(1, index, values.T)


def dense_weights(model, deltas) -> dict[str, torch.Tensor]:
    """{parameter name: weight with its dense delta}, by way of an independent scatter."""
    anatomy, found = describe(model), {}
    for (block, role), (index, values) in deltas.items():
        projection = next(p for p in anatomy.projections[block] if p.role == role)
        name = f"{anatomy.blocks[block]}.{projection.module}.weight"
        weight = found.get(name, model.get_parameter(name).detach())
        weight = weight.T if projection.transposed else weight
        out = weight.shape[0]
        rows = projection.rows.index() if projection.rows else torch.arange(out)
        weight = weight.index_add(0, rows, dense(projection, index, values).to(weight.dtype))
        found[name] = weight.T if projection.transposed else weight
    return found


def merged(model, deltas):
    """A copy of the model with the deltas in its weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in dense_weights(model, deltas).items():
            other.get_parameter(name).copy_(weight)
    return other


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_injected_equals_merged(family):
    student = zoo.build(family, seed=2)
    weights = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    before = logits(student)
    deltas = random_deltas(describe(student))
    with injected(student, deltas):
        after = logits(student)
    assert (after - before).abs().max() > 0.05
    torch.testing.assert_close(after, logits(merged(student, deltas)), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(student), before)  # nothing is left behind
    assert all(torch.equal(tensor, weights[n]) for n, tensor in student.state_dict().items())
    zeros = {key: (index, torch.zeros_like(values)) for key, (index, values) in deltas.items()}
    with injected(student, zeros):
        assert torch.equal(logits(student), before)


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "gpt_neox", "phi3_gqa", "opt", "gemma2"])
def test_gradients_equal_those_of_a_dense_delta(family):
    student = zoo.build(family, seed=2).double()
    deltas = random_deltas(describe(student), dtype=torch.float64)
    leaves = [values.requires_grad_() for _, values in deltas.values()]
    with injected(student, deltas):
        ours = torch.autograd.grad(student(IDS, labels=IDS, use_cache=False).loss, leaves)
    weights = dense_weights(student, deltas)
    loss = torch.func.functional_call(
        student, weights, (IDS,), {"labels": IDS, "use_cache": False}
    ).loss
    for mine, theirs in zip(ours, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt"])  # no float32 norms inside
def test_gradients_by_finite_differences(family):
    student = zoo.build(family, layers=1, seed=2).double()
    deltas = random_deltas(describe(student), dtype=torch.float64)
    keys, indices = list(deltas), [index for index, _ in deltas.values()]

    def loss(*values):
        given = dict(zip(keys, zip(indices, values, strict=True), strict=True))
        with injected(student, given):
            return student(IDS, use_cache=False).logits.logsumexp(-1).mean()

    values = [values.requires_grad_() for _, values in deltas.values()]
    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


def test_flags_and_hooks_are_put_back_after_an_error():
    student = zoo.build("llama")
    student.lm_head.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in student.named_parameters()}
    with pytest.raises(ZeroDivisionError), injected(student, random_deltas(describe(student))):
        assert not any(p.requires_grad for p in student.parameters())
        raise ZeroDivisionError
    assert {name: p.requires_grad for name, p in student.named_parameters()} == flags
    assert not any(module._forward_hooks for module in student.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_students(dtype):
    """The delta's own values are not rounded: far below the weights' spacing they still count."""
    student = zoo.build("llama_gqa", seed=2).to(dtype)
    deltas = random_deltas(describe(student))
    exact = merged(student.float(), deltas)
    student = student.to(dtype)
    with injected(student, deltas):
        found = logits(student)
    assert found.dtype == dtype
    plain = (logits(merged(student, deltas)).float() - logits(exact)).abs().mean()
    ratio = (found.float() - logits(exact)).abs().mean() / plain
    assert ratio < 1.5  # measured 1.14 (bfloat16), 0.87 (float16)
    tiny = {k: (i, (1e-9 * v).requires_grad_()) for k, (i, v) in deltas.items()}
    with injected(student, tiny):
        student(IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(v.grad.dtype == torch.float32 and v.grad.abs().max() > 0 for _, v in tiny.values())
    with torch.no_grad():  # one module with the delta alone
        module = student.model.layers[0].mlp.down_proj
        module.weight.zero_()
        index, values = deltas[0, "down"]
        small = {(0, "down"): (index, 1e-6 * values)}
        x = torch.ones(1, 48, dtype=dtype)
        errors = []
        for computed in (torch.float32, None):
            with injected(student, small, dtype=computed):
                errors.append((module(x)[0] - 1e-6 * values.sum(0)).abs().max())
    assert errors[0] <= errors[1] and errors[0] <= torch.finfo(dtype).eps * 1e-6 + 3e-8


def test_autocast():
    student = zoo.build("llama_gqa", seed=2)
    deltas = random_deltas(describe(student))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with injected(student, deltas):
            ours = logits(student)
        theirs = logits(merged(student, deltas))
    exact = logits(merged(student, deltas))
    # measured 1.06 times the error of a dense sum in the same precision
    assert (ours - exact).abs().mean() < 1.5 * (theirs - exact).abs().mean()


def test_gradient_checkpointing_of_the_student():
    student = zoo.build("llama_gqa", seed=2)
    deltas = random_deltas(describe(student))
    leaves = [values.requires_grad_() for _, values in deltas.values()]

    def gradients():
        with injected(student, deltas):
            loss = student(IDS, labels=IDS, use_cache=False).loss
            return torch.autograd.grad(loss, leaves)

    plain = gradients()
    student.train()
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for mine, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-7, rtol=1e-5)


def test_value_rows_of_grouped_queries():
    """4 query heads of 12 on 2 key-value heads: neurons 0-11 and 12-23 read the same rows."""
    anatomy = describe(zoo.build("llama_wide_heads"))
    assert (anatomy.heads, anatomy.kv_heads, anatomy.head_dim) == (4, 2, 12)
    index = torch.tensor([13, 1, 47, 25])  # (1, 1) and (0, 1) -> row 1; (3, 11) -> 23; (2, 1) -> 13
    assert value_row_numbers(index, anatomy).tolist() == [1, 1, 23, 13]
    values = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    rows, averaged = value_rows(index, values, anatomy)
    assert rows.tolist() == [1, 13, 23]
    expected = torch.stack([(values[0] + values[1]) / 2, values[3], values[2]])
    torch.testing.assert_close(averaged, expected)
    assert torch.autograd.gradcheck(lambda v: value_rows(index, v, anatomy)[1], values)


def test_value_row_is_what_the_neuron_reads():
    """Moving row r of v moves the inputs of o at exactly the neurons that map to r."""
    student = zoo.build("llama_gqa", layers=1)
    anatomy, seen = describe(student), []
    o = student.model.layers[0].self_attn.o_proj
    handle = o.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        student(IDS, use_cache=False)
        student.model.layers[0].self_attn.v_proj.weight[11] += 1
        student(IDS, use_cache=False)
    handle.remove()
    moved = (seen[0] != seen[1]).any(0).any(0).nonzero().flatten()
    every = torch.arange(anatomy.heads * anatomy.head_dim)
    assert torch.equal(moved, every[value_row_numbers(every, anatomy) == 11])


def test_refusals():
    anatomy = describe(zoo.build("llama"))
    index, values = random_deltas(anatomy)[0, "up"]
    for key, content, words in [
        ((2, "up"), (index, values), "has 2 blocks"),
        ((0, "gate"), (index, values), "unknown role"),
        ((0, "up"), (index.int(), values), "int64"),
        ((0, "up"), (index, values[:, 1:]), r"values \[3, 32\] expected"),
        ((0, "up"), (index + 60, values), "48 rows"),
        ((0, "down"), (index + 60, values), "48 columns"),
        ((0, "up"), (index * 0, values), "twice"),
    ]:
        with pytest.raises(InputError, match=words):
            changes(anatomy, {key: content})
