# SPDX-License-Identifier: Apache-2.0
"""From a cached hidden state a student computes what it computes from its tokens."""

import model_zoo as zoo
import pytest
import torch

from pkt_ext.adapter import Factor, matrix_shape
from pkt_ext.errors import InputError
from pkt_ext.lora import attach_factors
from pkt_ext.models.anatomy import describe
from pkt_ext.models.frontier import activations, advance, padded

ROWS = [[1, 40, 50, 60, 70, 80, 9, 8], [1, 9, 33, 200, 12], [1, 7]]
IDS = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ROWS], batch_first=True)
LAYERS = 3
REAL = torch.arange(IDS.shape[1]) < torch.tensor([len(row) for row in ROWS])[:, None]


def student(family="llama_gqa", **sizes):
    return zoo.build(family, seed=3, **({"layers": LAYERS} | sizes))


def states(model):
    """What each block was given and gave, and what the head was given, by hooks on a whole run."""
    found, handles = {}, []
    for index, path in enumerate(describe(model).blocks):
        handles.append(
            model.get_submodule(path).register_forward_hook(
                lambda module, args, kwargs, output, index=index: found.update(
                    {index: (args or (kwargs["hidden_states"],))[0], index + 1: output}
                ),
                with_kwargs=True,
            )
        )
    head = model.get_output_embeddings()
    handles.append(head.register_forward_pre_hook(lambda _, args: found.update(head=args[0])))
    try:
        mask = REAL.long()  # frontier gives none: what is not padding may not depend on it
        logits = model(input_ids=IDS, attention_mask=mask, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return found, logits


def weights_of(model, block):
    return dict(model.get_submodule(describe(model).blocks[block]).named_parameters())


def only_block_trains(model, block):
    model.requires_grad_(False)
    for parameter in weights_of(model, block).values():
        parameter.requires_grad_(True)


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_equals_the_whole_forward(family, recompute):
    """Values and the block's gradients, whether the blocks before run or are skipped."""
    model = student(family)
    anatomy, block = describe(model), 1
    only_block_trains(model, block)
    found, _ = states(model)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, *IDS.shape, anatomy.hidden_size, generator=generator) * REAL[..., None]
    expected = torch.autograd.grad(
        (found[block + 1] * weights[0]).sum() + (found["head"] * weights[1]).sum(),
        list(weights_of(model, block).values()),
    )
    for hidden in (None, found[block].detach()):
        ours = activations(model, anatomy, IDS, block, hidden, recompute=recompute)
        close(ours.before[REAL], found[block][REAL])
        close(ours.after[REAL], found[block + 1][REAL])
        close(ours.outputs[REAL], found["head"][REAL])
        loss = (ours.after * weights[0]).sum() + (ours.outputs * weights[1]).sum()
        gradients = torch.autograd.grad(loss, list(weights_of(model, block).values()))
        for name, one, other in zip(weights_of(model, block), gradients, expected, strict=True):
            scale = other.abs().max().item()
            torch.testing.assert_close(one, other, atol=1e-5 * scale, rtol=1e-5, msg=name)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("family", ["gemma2", "opt_post_norm", "gpt2"])
def test_outputs_are_what_the_head_takes(family):
    model = student(family)
    _, logits = states(model)
    outputs = activations(model, describe(model), IDS).outputs
    ours, cap = model.get_output_embeddings()(outputs), describe(model).logit_softcap
    close((cap * torch.tanh(ours / cap) if cap else ours)[REAL], logits[REAL])


@pytest.mark.parametrize(
    "block, cached, outputs, expected",
    [
        (2, True, True, [0, 0, 1]),
        (1, True, True, [0, 1, 1]),
        (1, True, False, [0, 1, 0]),
        (1, False, False, [1, 1, 0]),
        (0, True, False, [1, 0, 0]),
        (None, False, True, [1, 1, 1]),
    ],
)
def test_blocks_that_run(block, cached, outputs, expected):
    """Blocks before the frontier do not run, nor those after it where nobody looks further."""
    model = student()
    hidden = torch.zeros(*IDS.shape, 32) if cached else None
    counts = [0] * LAYERS
    for index, path in enumerate(describe(model).blocks):

        def count(*_, index=index):
            counts[index] += 1

        model.get_submodule(f"{path}.mlp").register_forward_hook(count)
    found = activations(model, describe(model), IDS, block, hidden, outputs=outputs)
    assert counts == expected
    assert (found.outputs is not None) == outputs and (found.after is not None) == (
        block is not None
    )


def test_half_precision_takes_a_float32_cache():
    model = student().bfloat16()
    found = activations(model, describe(model), IDS, 1, torch.ones(*IDS.shape, 32))
    assert found.before.dtype == found.after.dtype == found.outputs.dtype == torch.bfloat16


def lora(model, block, rank=2, dropout=0.0):
    """A PeftModel with a LoRA on a block's matrices, not at zero."""
    generator, factors = torch.Generator().manual_seed(1), {}
    anatomy = describe(model)
    for part in anatomy.projections[block]:
        path = f"{anatomy.blocks[block]}.{part.module}"
        out, size = matrix_shape(model.get_submodule(path))
        factors[path] = Factor(
            torch.randn(rank, size, generator=generator) * size**-0.5,
            torch.randn(out, rank, generator=generator),
        )
    scales = dict.fromkeys(factors, 1.0)
    return attach_factors(model, factors, scales, dropout=dropout, frozen=False)


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "phi3"])
def test_lora_students(family):
    """A PeftModel, and the student that its layers were put into: the same, with gradients."""
    model = student(family)
    anatomy = describe(model)
    plain, logits = states(model)
    adapted = lora(model, 1)
    found = activations(adapted, anatomy, IDS, 1, plain[1].detach())
    inside = activations(model, anatomy, IDS, 1, plain[1].detach())
    close(found.after, inside.after)
    assert (found.after - plain[2]).abs().max() > 0.1
    with torch.no_grad():
        whole = adapted(input_ids=IDS, use_cache=False).logits
    close(model.get_output_embeddings()(found.outputs)[REAL], whole[REAL])
    found.outputs[REAL].sum().backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in adapted.named_parameters() if p.requires_grad}


def test_recomputing_draws_the_same_dropout():
    model = student()
    anatomy, hidden = describe(model), torch.randn(*IDS.shape, 32)
    adapted = lora(model, 1, dropout=0.5).train()
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(5)
        found = activations(adapted, anatomy, IDS, 1, hidden, recompute=recompute)
        parameters = [p for p in adapted.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(found.outputs.square().sum(), parameters))
    for one, other in zip(*gradients, strict=True):
        close(one, other)


def test_advance():
    """Block by block from the tokens: each item's states are those of a whole run."""
    model = student("gpt2").train()  # its dropout must not act
    model.transformer.h[1].eval()
    anatomy = describe(model)
    found, _ = states(student("gpt2"))
    items = [{"input_ids": torch.tensor(row)} for row in ROWS]
    for block in range(LAYERS):
        states_here = list(advance(model, anatomy, items, block, micro_batch=2))
        for index, row in enumerate(ROWS):
            assert states_here[index].shape == (len(row), 32)
            close(states_here[index], found[block + 1][index, : len(row)])
        items = [item | {"hidden": state} for item, state in zip(items, states_here, strict=True)]
    modes = [module.training for module in model.transformer.h]
    assert modes == [True, False, True] and not states_here[0].requires_grad


def test_padded():
    items = [{"input_ids": torch.tensor(row), "hidden": None} for row in ROWS]
    ids, hidden = padded(items)
    assert torch.equal(ids, IDS) and hidden is None
    items = [item | {"hidden": torch.ones(len(item["input_ids"]), 4)} for item in items]
    _, hidden = padded(items)
    assert torch.equal(hidden.sum(-1), 4.0 * REAL)
    for odd in (None, torch.ones(3, 4)):
        with pytest.raises(InputError, match="every item needs a hidden state"):
            padded([items[0], items[1] | {"hidden": odd}])


def test_errors():
    model = student()
    anatomy = describe(model)
    with pytest.raises(InputError, match="block 3 is not one of the student's 3, 0 to 2"):
        activations(model, anatomy, IDS, 3)
    with pytest.raises(InputError, match="needs a block"):
        activations(model, anatomy, IDS, outputs=False)
    with pytest.raises(InputError, match=r"is \[3, 8, 31\], the tokens need \[3, 8, 32\]"):
        activations(model, anatomy, IDS, 1, torch.zeros(3, 8, 31))
    model.model.layers[0].forward = lambda hidden, **_: hidden[0]
    with pytest.raises(InputError, match="calls its blocks in a way that is not supported"):
        activations(model, anatomy, IDS, 1)
