# SPDX-License-Identifier: Apache-2.0
"""LaTen's class and translator against slow ones in the published way (scripts/), and corrected."""

import copy
import json
import sys
import warnings
from pathlib import Path

import model_zoo as zoo
import numpy as np
import pytest
import torch
import transformers as hf

from pkt_ext.attribution.neurons import locate
from pkt_ext.compat import notices, patched
from pkt_ext.compat._positions import EmptyAnswerError
from pkt_ext.compat.neural_incompatibility import Knowledge_translator, KnowledgeNeurons, _look
from pkt_ext.models.anatomy import describe
from pkt_ext.streaming.batches import IGNORED, Sample
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.budget import Allotment
from pkt_ext.streaming.checkpoint import Checkpoint

SCRIPTS = Path(__file__).with_name("scripts")
sys.path.insert(0, str(SCRIPTS))
try:
    import knowledge_neurons as slow
    import knowledge_translator as slow_translator
    import laten_script
    from modified_llama import ModifiedLlama
finally:
    sys.path.remove(str(SCRIPTS))

BLOCKS, WIDTH, FFN = 3, 32, 48
PROMPTS = ["2 and 2 are", "The capital is", "Sort this list"]
ANSWERS = [" four.", ' Rome")', " [1, 2, 3]\n"]
STEP = 2.0**-6  # of float16 at a difference of two logarithms under -8
MODULES = {"mlp": ["down_proj", "up_proj"], "self_attn": ["v_proj", "o_proj"]}

pytestmark = pytest.mark.filterwarnings("ignore::pkt_ext.compat.PublishedBehaviour")


def config(kv_heads=4):
    sizes = {"layers": BLOCKS, "hidden": WIDTH, "ffn": FFN, "kv_heads": kv_heads}
    return zoo.config("llama", **sizes, attn_implementation="eager")


def modified(dtype=torch.float16, kv_heads=4, seed=0):
    return zoo.randomize(ModifiedLlama(config(kv_heads)), seed).to(dtype).eval()


def stock_of(model):
    stock = hf.LlamaForCausalLM(model.config).to(next(model.parameters()).dtype).eval()
    stock.load_state_dict(model.state_dict())
    return stock


def both(model, **options):
    """(ours, the slow one)"""
    tokenizer = zoo.tokenizer()
    ours = KnowledgeNeurons(model, tokenizer, device="cpu", **options)
    return ours, slow.KnowledgeNeurons(model, tokenizer, device="cpu")


def check(ours, truth, what, texts, blocks, count, *, top=True):
    """The published neurons in the published order, ties included, but where a logit in a thousand
    rounds the other way."""
    found = getattr(ours, f"get_top_attribute_neurons_{what}")(*texts, blocks, count, top)
    same = getattr(truth, f"get_top_attribute_neurons_{what}")(*texts, blocks, count, top)
    scores = (truth.ffn_scores if what == "ffn" else truth.attention_scores)(*texts)
    assert [b for b, _ in found] == [b for b in blocks for _ in range(count)]
    scorer, seen = _look(ours, *texts)
    exact = 0
    for i, block in enumerate(blocks):
        chosen, expected = (
            [n for _, n in some[i * count : (i + 1) * count]] for some in (found, same)
        )
        off = (scores[block][chosen] - scores[block][expected]).abs()
        assert off.max() <= STEP
        if scorer.scores(seen, "down" if what == "ffn" else "o", block).equal(scores[block]):
            assert chosen == expected
            exact += 1
    # a stock model's own forward may round apart from the modified one's
    assert exact or not isinstance(ours.model, ModifiedLlama)
    assert scores[blocks].unique().numel() < scores[blocks].numel()  # there are ties


# --- locating -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["modified", "stock"])
def test_blocks_come_in_the_published_order(kind, capsys):
    model = modified()
    truth = slow.KnowledgeNeurons(model, zoo.tokenizer(), device="cpu")
    ours, _ = both(model if kind == "modified" else stock_of(model))
    for some in (slice(0, 1), slice(1, 2), slice(0, 3)):
        for count in (1, 32):
            arguments = PROMPTS[some], ANSWERS[some], count
            found = ours.get_top_attribute_layers(*arguments)
            assert found == truth.get_top_attribute_layers(*arguments)
    assert "ffn: " in capsys.readouterr().out


def test_blocks_of_equal_gain_come_last_first():
    model = modified()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight.zero_()
    ours, truth = both(model)
    assert ours.get_top_attribute_layers(PROMPTS, ANSWERS, 2)[1] == [2, 1]
    assert truth.get_top_attribute_layers(PROMPTS, ANSWERS, 2)[1] == [2, 1]


@pytest.mark.parametrize("kind", ["modified", "stock"])
@pytest.mark.parametrize("top", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_neurons_are_the_published_ones(kind, top, kv_heads):
    model = modified(kv_heads=kv_heads)
    truth = slow.KnowledgeNeurons(model, zoo.tokenizer(), device="cpu")
    ours, _ = both(model if kind == "modified" else stock_of(model))
    for some in (slice(0, 1), slice(0, 3)):
        texts = PROMPTS[some], ANSWERS[some]
        check(ours, truth, "ffn", texts, [2, 0, 1], 9, top=top)
        check(ours, truth, "attn", texts, [1, 2], 6, top=top)


def test_a_large_vocabulary():
    """Where few neurons meet all of it."""
    model = ModifiedLlama(zoo.config("llama", layers=2, vocab=6000, hidden=WIDTH, ffn=FFN))
    ours, truth = both(zoo.randomize(model).half().eval())
    check(ours, truth, "ffn", (PROMPTS[:1], ANSWERS[:1]), [0, 1], FFN)


def test_more_neurons_than_there_are():
    ours, _ = both(modified())
    assert len(ours.get_top_attribute_neurons_ffn(PROMPTS[:1], ANSWERS[:1], [1], 1000)) == FFN


def test_nan_and_infinity_come_first():
    """log 0 less log 0, and what a neuron brings back from 0."""
    model = modified(seed=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    ours, truth = both(model)
    texts = PROMPTS[:1], ANSWERS[:1]
    scores = truth.ffn_scores(*texts)[2]
    assert scores.isnan().any() and scores.isinf().any()
    arguments = *texts, [2], FFN
    found = ours.get_top_attribute_neurons_ffn(*arguments)
    assert found == truth.get_top_attribute_neurons_ffn(*arguments)
    assert scores[found[0][1]].isnan()


def test_answers_are_stripped():
    ours, truth = both(modified())
    plain = ours.get_top_attribute_neurons_ffn(["a"], ["b c"], [1], 5)
    assert plain == ours.get_top_attribute_neurons_ffn(["a"], ['b c." ),]\n'], [1], 5)
    for nothing in ("", '."'):
        with pytest.raises(EmptyAnswerError, match="empty without its punctuation"):
            ours.get_top_attribute_neurons_attn(["a"], [nothing], [1], 5)
        with pytest.raises(IndexError):
            truth.get_top_attribute_neurons_attn(["a"], [nothing], [1], 5)
        left = truth.get_top_attribute_layers(["ab"], [nothing])
        assert ours.get_top_attribute_layers(["ab"], [nothing]) == left
    ours.tokenizer = zoo.tokenizer(bos=False)
    with pytest.raises(ValueError, match="1 token"):
        ours.get_top_attribute_layers(["a"], [""])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_get_the_same_formulas_in_float32(dtype, monkeypatch):
    monkeypatch.setattr(notices, "_given", set())
    model = modified(dtype)
    ours, _ = both(stock_of(model))
    with pytest.warns(UserWarning, match="crashes on models that are not float16"):
        found = ours.get_top_attribute_neurons_ffn(PROMPTS[:1], ANSWERS[:1], [0, 2], FFN)
    tokens = ours.tokenizer.encode(PROMPTS[0] + ANSWERS[0].rstrip("."))
    with torch.no_grad():
        flows = model(torch.tensor([tokens[:-1]]), use_cache=True)[2]
    deviation = (flows[-1][4][0, -1].double().var(correction=0) + 1e-5).sqrt()

    def log_prob(x):
        y = x * torch.rsqrt(deviation + 1e-6) * model.model.norm.weight.double()
        return (y @ model.lm_head.weight.double().T).log_softmax(-1)[..., tokens[-1]]

    for i, block in enumerate((0, 2)):
        residual, strengths = (flows[block][part][0, -1].double() for part in (2, 6))
        added = model.model.layers[block].mlp.down_proj.weight.double() * strengths
        scores = log_prob(residual + added.T) - log_prob(residual)
        chosen = scores[[n for _, n in found[i * FFN : (i + 1) * FFN]]].detach()
        tolerance = 2e-4 if dtype == torch.float32 else 5e-3  # stock and modified round apart
        assert (chosen.diff() <= tolerance).all() and chosen[0] > chosen[-1] + 10 * tolerance


# --- one forward ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["modified", "stock"])
def test_one_forward_serves_all_until_a_weight_changes(kind):
    model = modified()
    ours, _ = both(model if kind == "modified" else stock_of(model))
    forwards = []
    ours.model.register_forward_hook(lambda *_: forwards.append(1))

    def look():
        forwards.clear()
        layers = ours.get_top_attribute_layers(PROMPTS, ANSWERS)
        ffn = ours.get_top_attribute_neurons_ffn(PROMPTS, ANSWERS, [0, 1, 2], 9)
        ours.get_top_attribute_neurons_attn(PROMPTS, ANSWERS, [0, 1, 2], 9)
        return layers, ffn, len(forwards)

    layers, ffn, count = look()
    assert count - (kind == "modified") <= 3  # but for the one that asks what it returns
    assert look() == (layers, ffn, 0)
    weight = ours.model.model.layers[1].mlp.down_proj.weight
    before = weight.detach().clone()
    weight.data.mul_(-3.0)  # which no version counts
    changed = look()
    assert changed[1] != ffn and changed[2] == 3
    weight.data.copy_(before)
    weight.delta = weight  # of a parameter: no module's
    assert look()[1] == ffn
    ours.model.model.layers[1].mlp.down_proj.delta = torch.zeros_like(weight).half()
    assert look()[2] == 9  # with a delta attached nothing is remembered


@pytest.mark.parametrize("through", ["copy_", ".data"])
def test_permuted_neurons_are_seen(through):
    """Whose bits add up to the same."""
    ours, truth = both(modified())
    texts, mlp = (PROMPTS[:1], ANSWERS[:1]), ours.model.model.layers[1].mlp
    before = ours.get_top_attribute_neurons_ffn(*texts, [1], 9)
    order = torch.arange(FFN).roll(8)
    for weight, axis in ((mlp.up_proj, 0), (mlp.gate_proj, 0), (mlp.down_proj, 1)):
        weight = weight.weight.data if through == ".data" else weight.weight.detach()
        weight.copy_(weight.index_select(axis, order))
    check(ours, truth, "ffn", texts, [1], 9)
    found = ours.get_top_attribute_neurons_ffn(*texts, [1], 9)
    assert {n for _, n in found} != {n for _, n in before}


@pytest.mark.parametrize("fix", [False, True])
@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_blocks_of_a_tensor_or_an_array(kind, fix):
    ours, _ = both(modified(), fix=fix)
    for what in ("ffn", "attn"):
        method = getattr(ours, f"get_top_attribute_neurons_{what}")
        plain = method(PROMPTS[:1], ANSWERS[:1], [2, 0], 5)
        found = method(PROMPTS[:1], ANSWERS[:1], kind([2, 0]), 5)
        assert found == plain and type(found[0][0]) is int
        for neurons in (kind(plain), [[kind(b), kind(n)] for b, n in plain]):
            taken = ours.extract_ffn_attn_knowledge(neurons, [], ["up_proj"], None)["up_proj"]
            weights = [ours.model.model.layers[b].mlp.up_proj.weight[n] for b, n in plain]
            assert taken.equal(torch.stack(weights).unflatten(0, (2, 5)))


# --- extraction -----------------------------------------------------------------------------------


def some_neurons(ours):
    ffn = ours.get_top_attribute_neurons_ffn(PROMPTS[:1], ANSWERS[:1], [2, 0], 5)
    return ffn, ours.get_top_attribute_neurons_attn(PROMPTS[:1], ANSWERS[:1], [0, 1], 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_extraction(dtype):
    ours, truth = both(modified(dtype))
    neurons = some_neurons(ours)
    found, expected = (kn.extract_ffn_attn_knowledge(*neurons) for kn in (ours, truth))
    assert list(found) == list(expected) == ["down_proj", "up_proj", "v_proj", "o_proj"]
    for name, weights in found.items():
        assert weights.dtype == torch.float16 and weights.equal(expected[name])
        assert not weights.requires_grad
    assert found["down_proj"].shape == (2, WIDTH, 5) and found["v_proj"].shape == (2, 4, WIDTH)
    (only,) = ours.extract_ffn_attn_knowledge(*neurons, ["gate_proj"], None).items()
    assert only[0] == "gate_proj" and only[1].shape == (2, 5, WIDTH)


def test_shared_heads_have_no_value_neurons():
    ours, _ = both(modified(kv_heads=2))
    ffn, attention = some_neurons(ours)
    assert ours.extract_ffn_attn_knowledge(ffn, attention, None, ["o_proj"])["o_proj"].any()
    with pytest.raises(ValueError, match="v_proj has 2 heads for 4 query heads"):
        ours.extract_ffn_attn_knowledge(ffn, attention)


def test_neurons_that_are_not_there():
    ours, truth = both(modified())
    for wrong in (48, -1):  # from the end alone in an injection, as published
        message = f"neurons of block 1 go from {wrong} to {wrong}; down_proj has 0 to 47"
        with pytest.raises(ValueError, match=message):
            ours.extract_ffn_attn_knowledge([[1, wrong]], [])
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            truth.extract_ffn_attn_knowledge([[1, wrong]], [])
    with pytest.raises(ValueError, match="module 'fc1'; choose of"):
        ours.extract_ffn_attn_knowledge([[1, 4]], [], ["fc1"])


# --- injection ------------------------------------------------------------------------------------


def inject(kn, weights, ffn, attention):
    return kn.knowledge_injection(
        weights,
        weights,
        ffn_layers=[0, 2],
        attn_layers=[0, 1],
        ffn_neurons=ffn,
        ffn_module=MODULES["mlp"],
        attn_neurons=attention,
        attn_module=MODULES["self_attn"],
    )


def some_weights(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"down_proj": (2, WIDTH, 5), "up_proj": (2, 5, WIDTH)}
    shapes |= {"v_proj": (2, 4, WIDTH), "o_proj": (2, WIDTH, 4)}
    return {n: (torch.randn(s, generator=generator) * 0.3).to(dtype) for n, s in shapes.items()}


def logits(model):
    return model(torch.arange(3, 40)[None])[0]


def test_injection_is_the_published_one():
    ours, truth = both(modified())
    neurons, before = some_neurons(ours), logits(ours.model)
    graph, weights = [], [{n: w.requires_grad_() for n, w in some_weights().items()}] * 2
    for kn in (ours, truth):
        leaves = {n: w.detach().clone().requires_grad_() for n, w in weights[0].items()}
        deltas = inject(kn, leaves, *neurons)
        after = logits(kn.model)
        for key in deltas:
            delattr(kn.model.get_submodule(key.removesuffix(".delta")), "delta")
        after.float().square().mean().backward()
        graph.append((deltas, after, leaves))
    assert list(graph[0][0]) == list(graph[1][0])
    for key, delta in graph[0][0].items():
        assert delta.dtype == torch.float16 and delta.equal(graph[1][0][key])
    assert graph[0][1].equal(graph[1][1]) and not graph[0][1].equal(before)
    for name, leaf in graph[0][2].items():
        assert leaf.grad.any() and leaf.grad.equal(graph[1][2][name].grad)
    assert logits(ours.model).equal(before)


@pytest.mark.parametrize("blocks", [[0, 2], [0, 0], torch.tensor([0, 2]), np.array([2, 0])])
def test_injection_counts_from_the_end_and_takes_any_blocks(blocks):
    ours, truth = both(modified())
    neurons = [[0, -1], [2, 5], [0, 3], [2, -FFN]]
    weights = {"up_proj": some_weights()["up_proj"][:, :2]}
    deltas = [
        kn.knowledge_injection(weights, weights, blocks, None, neurons, ["up_proj"])
        for kn in (ours, truth)
    ]
    assert list(deltas[0]) == list(deltas[1])
    assert all(delta.equal(deltas[1][key]) and delta.any() for key, delta in deltas[0].items())
    with pytest.raises(ValueError, match="go from -49 to -49; up_proj has -48 to 47"):
        ours.knowledge_injection(weights, weights, [1], None, [[1, -FFN - 1]], ["up_proj"])


def test_a_stock_model_adds_its_deltas_by_itself():
    model = modified()
    ours, truth = both(model)
    neurons, weights = some_neurons(ours), some_weights()
    stock, _ = both(stock_of(model))
    before = logits(stock.model)
    for _ in range(2):  # hooks do not pile up, in a copy neither
        stock.model = copy.deepcopy(stock.model)
        with torch.no_grad():
            deltas = inject(stock, weights, *neurons)
    inject(truth, weights, *neurons)
    found, expected = logits(stock.model).float(), logits(model).float()
    assert (found - expected).abs().max() <= 2.0**-5 < (found - before.float()).abs().max()
    for key in deltas:
        delattr(stock.model.get_submodule(key.removesuffix(".delta")), "delta")
    assert logits(stock.model).equal(before)


def test_as_published_a_saved_model_is_the_untouched_student(tmp_path):
    ours, _ = both(stock_of(modified()))
    plain = {n: p.clone() for n, p in ours.model.named_parameters()}, logits(ours.model)
    with torch.no_grad():
        inject(ours, some_weights(), *some_neurons(ours))
    assert not logits(ours.model).equal(plain[1])
    ours.model.save_pretrained(tmp_path)
    saved = hf.AutoModelForCausalLM.from_pretrained(tmp_path, **{zoo.DTYPE: torch.float16})
    assert {n: p.equal(plain[0][n]) for n, p in saved.named_parameters()} == dict.fromkeys(
        plain[0], True
    )


@pytest.mark.parametrize("kind", ["modified", "stock"])
def test_fixed_injection_is_saved_and_taken_back(kind, tmp_path):
    model = modified()
    ours, _ = both(model if kind == "modified" else stock_of(model), fix=True)
    neurons, weights = some_neurons(ours), some_weights()
    plain = {n: p.clone() for n, p in ours.model.named_parameters()}
    for _ in range(2):  # rates do not pile up
        with torch.no_grad():
            deltas = inject(ours, weights, *neurons)
    for name, p in ours.model.named_parameters():
        delta = deltas.get(name.replace("weight", "delta"))
        truth = plain[name] if delta is None else (plain[name].float() + delta.float()).half()
        assert p.equal(truth)
    assert len(deltas) == 8 and all("delta" not in vars(m) for m in ours.model.modules())
    ours.model.save_pretrained(tmp_path)
    saved = hf.AutoModelForCausalLM.from_pretrained(tmp_path, **{zoo.DTYPE: torch.float16})
    assert all(p.equal(saved.get_parameter(n)) for n, p in ours.model.named_parameters())
    ours.get_top_attribute_layers(PROMPTS[:1], ANSWERS[:1])
    assert all(p.equal(plain[n]) for n, p in ours.model.named_parameters())


def test_weights_loaded_after_a_merge_are_left_alone():
    ours, _ = both(stock_of(modified()), fix=True)
    neurons = some_neurons(ours)
    with torch.no_grad():
        inject(ours, some_weights(), *neurons)
    other = modified(seed=5).state_dict()
    ours.model.load_state_dict(other)
    ours.get_top_attribute_layers(PROMPTS[:1], ANSWERS[:1])
    assert all(p.equal(other[n]) for n, p in ours.model.named_parameters())


MERGED = {  # family -> its fused or transposed module, the published names in it
    "phi3": ("mlp.gate_up_proj", ["up_proj", "gate_proj"]),
    "gpt2": ("mlp.c_fc", ["up_proj"]),
    "llama": ("mlp.down_proj", ["down_proj"]),
}


@pytest.mark.parametrize("family", MERGED)
@pytest.mark.parametrize("blocks", [[1], [1, 1]])
def test_rates_do_not_pile_up_in_one_weight(family, blocks):
    """Nor does a block that comes twice: as with deltas, the last one's counts."""
    path, names = MERGED[family]
    ours = KnowledgeNeurons(zoo.build(family), zoo.tokenizer(), device="cpu", fix=True)
    weight = ours.model.get_submodule(describe(ours.model).blocks[1]).get_submodule(path).weight
    before = weight.detach().clone()
    shape = (WIDTH, 3) if names == ["down_proj"] else (3, WIDTH)
    for rate in (0.25, 0.5):
        parts = [torch.full(shape, rate * (i + 1)) for i in range(len(blocks))]
        weights = dict.fromkeys(names, torch.stack(parts))
        neurons = [[1, 3], [1, -1], [1, 5]]
        deltas = ours.knowledge_injection(weights, {}, blocks, None, neurons, names)
        changed = (weight - before).detach()
        assert len(deltas) == len(names)
        assert changed.abs().max().item() == pytest.approx(rate * len(blocks), rel=1e-4)
        assert changed.count_nonzero() == 3 * WIDTH * len(names)
    ours.get_top_attribute_layers(PROMPTS[:1], ANSWERS[:1])
    assert weight.equal(before)


def test_a_merge_that_fails_changes_nothing():
    ours, _ = both(stock_of(modified()), fix=True)
    neurons, weights = some_neurons(ours), some_weights()
    plain = {n: p.clone() for n, p in ours.model.named_parameters()}
    weights["o_proj"] = weights["o_proj"][:, :3]
    with torch.no_grad(), pytest.raises(ValueError, match="for 4 neurons, expected"):
        inject(ours, weights, *neurons)
    assert all(p.equal(plain[n]) for n, p in ours.model.named_parameters())


def test_neurons_edited_after_a_merge_are_left_alone():
    ours, _ = both(stock_of(modified()), fix=True)
    with torch.no_grad():
        inject(ours, some_weights(), *some_neurons(ours))
    mlp = ours.model.model.layers[0].mlp
    edited, other = mlp.up_proj.weight, mlp.down_proj.weight
    edited.data.mul_(2)  # which no version counts
    after = edited.detach().clone()
    ours.get_top_attribute_layers(PROMPTS[:1], ANSWERS[:1])
    assert edited.equal(after)
    assert other.equal(modified().model.layers[0].mlp.down_proj.weight)  # this one is put back


def test_a_neuron_named_twice_is_put_back():
    ours, _ = both(stock_of(modified()), fix=True)
    weight = ours.model.model.layers[1].mlp.up_proj.weight
    before, neurons = weight.detach().clone(), [[1, FFN - 1], [1, 4], [1, -1]]
    weights = {"up_proj": torch.tensor([1.0, 2.0, 3.0])[None, :, None].expand(1, 3, WIDTH)}
    ours.knowledge_injection(weights, {}, [1], None, neurons, ["up_proj"])
    assert (weight[-1] - before[-1]).mean().item() == pytest.approx(3.0, abs=0.01)
    ours.get_top_attribute_layers(PROMPTS[:1], ANSWERS[:1])
    assert weight.equal(before)


def test_fixed_injection_trains_too():
    ours, _ = both(stock_of(modified()), fix=True)
    weights = {n: w.requires_grad_() for n, w in some_weights().items()}
    deltas = inject(ours, weights, *some_neurons(ours))
    assert all(d.dtype == torch.float32 for d in deltas.values())
    logits(ours.model).float().square().mean().backward()
    assert all(w.grad.any() for w in weights.values())


def test_weights_of_another_shape():
    ours, _ = both(modified())
    ffn, attention = some_neurons(ours)
    with pytest.raises(ValueError, match="for 5 neurons, expected"):
        inject(ours, {n: w[:, :3, :3] for n, w in some_weights().items()}, ffn, attention)


def test_a_delta_of_a_part_of_a_module():
    ours = KnowledgeNeurons(zoo.build("phi3"), zoo.tokenizer(), device="cpu", fix=True)
    arguments = {"up_proj": torch.ones(1, 2, WIDTH)}, {}, [1], None, [[1, 3], [1, 5]], ["up_proj"]
    leaf = {"up_proj": torch.ones(1, 2, WIDTH, requires_grad=True)}
    with pytest.raises(ValueError, match="a delta cannot be attached"):
        ours.knowledge_injection(leaf, *arguments[1:])
    weight = ours.model.model.layers[1].mlp.gate_up_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        ours.knowledge_injection(*arguments)
    changed = (weight != before).any(1).nonzero()[:, 0].tolist()
    assert changed == [FFN + 3, FFN + 5]  # gate's rows come first


# --- corrected ------------------------------------------------------------------------------------


def row(tokenizer):
    """The first text, its last token the target."""
    ids = torch.tensor(tokenizer.encode(PROMPTS[0] + ANSWERS[0].rstrip(".")))
    labels = torch.full_like(ids, IGNORED)
    labels[-1] = ids[-1]
    return Sample("row", ids, labels)


@pytest.mark.parametrize(
    "family", ["llama_gqa", "qwen3", "gemma2", "olmo2", "gpt_neox", "gpt2", "opt", "phi3"]
)
def test_fixed_scores_are_those_of_locate(family):
    """Which has its own float64 oracle."""
    model, tokenizer = zoo.build(family, layers=BLOCKS), zoo.tokenizer()
    ours = KnowledgeNeurons(model, tokenizer, model_type="any", device="cpu", fix=True)
    stream = StreamedModel(Checkpoint.open(model), dtype=torch.float32)
    counts = {"blocks": BLOCKS, "attention_neurons": 7, "ffn_neurons": 9}
    (truth,) = locate(stream, [row(tokenizer)], allotment=Allotment(1), show=False, **counts)
    texts, every = (PROMPTS[:1], ANSWERS[:1]), list(range(BLOCKS))
    for found, gains in zip(
        ours.get_top_attribute_layers(*texts, BLOCKS),
        (truth.attention_gains, truth.ffn_gains),
        strict=True,
    ):
        assert found == sorted(every, key=lambda b: -gains[b])
    for found, best in (
        (ours.get_top_attribute_neurons_attn(*texts, every, 7), truth.attention),
        (ours.get_top_attribute_neurons_ffn(*texts, every, 9), truth.ffn),
    ):
        assert found == [[b.block, n] for b in best for n in b.indices.tolist()]


@pytest.mark.parametrize("family", ["llama_gqa", "olmo2"])
def test_published_scores_are_those_of_locate(family):
    model, tokenizer = zoo.build(family, layers=BLOCKS).half(), zoo.tokenizer()
    ours = KnowledgeNeurons(model, tokenizer, device="cpu")
    stream = StreamedModel(Checkpoint.open(model))
    counts = {"blocks": BLOCKS, "attention_neurons": 9, "ffn_neurons": 9, "compat": "published"}
    (truth,) = locate(stream, [row(tokenizer)], allotment=Allotment(1), show=False, **counts)
    scorer, seen = _look(ours, PROMPTS[:1], ANSWERS[:1])
    for role, kept in (("o", truth.attention), ("down", truth.ffn)):
        for best in kept:
            found = scorer.scores(seen, role, best.block).sort(descending=True).values[:9]
            assert (found - best.scores).abs().max() <= STEP and best.scores.any()


def test_fixed_scores_of_a_modified_model_and_of_several_prompts():
    model = modified(torch.float32)
    ours, stock = both(model, fix=True)[0], both(stock_of(model), fix=True)[0]
    arguments = PROMPTS, ANSWERS, [0, 2]
    for name in ("get_top_attribute_neurons_ffn", "get_top_attribute_neurons_attn"):
        found = getattr(ours, name)(*arguments, 6)
        assert found == getattr(stock, name)(*arguments, 6)
        assert found != getattr(ours, name)(PROMPTS[-1:], ANSWERS[-1:], [0, 2], 6)
        worst = getattr(ours, name)(*arguments, 32, top=False)
        assert [n for b, n in worst if b == 0][-6:] == [n for b, n in found if b == 0][::-1] or (
            name.endswith("ffn")
        )
    assert ours.get_top_attribute_layers(PROMPTS, ANSWERS) == stock.get_top_attribute_layers(
        PROMPTS, ANSWERS
    )


def test_fixed_scores_of_a_port_whose_ffn_output_has_the_residual_in_it():
    class Port(ModifiedLlama):
        def _block(self, *arguments):
            left, flow = super()._block(*arguments)
            return left, (*flow[:3], left, *flow[4:])

    model = modified()
    port = Port(model.config).half().eval()
    port.load_state_dict(model.state_dict())
    found, plain = both(port, fix=True)[0], both(model, fix=True)[0]
    texts = PROMPTS[:1], ANSWERS[:1], BLOCKS
    assert found.get_top_attribute_layers(*texts) == plain.get_top_attribute_layers(*texts)
    found.fix = False  # as published the residual counts twice
    assert (
        found.get_top_attribute_layers(*texts)[1]
        != both(model)[0].get_top_attribute_layers(*texts)[1]
    )


def test_what_is_not_llamas_kind_needs_fix():
    with pytest.raises(NotImplementedError, match="pass fix=True"):
        KnowledgeNeurons(modified(), zoo.tokenizer(), model_type="qwen")
    ours = KnowledgeNeurons(zoo.build("gpt2"), zoo.tokenizer(), device="cpu")
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not of Llama's kind"):
        ours.get_top_attribute_layers(PROMPTS, ANSWERS)


# --- translator -----------------------------------------------------------------------------------

NAMES = ["down_proj", "up_proj", "o_proj", "v_proj"]


def translators(**options):
    found = []
    for cls, extra in ((Knowledge_translator, options), (slow_translator.Knowledge_translator, {})):
        torch.manual_seed(3)
        found.append((cls(NAMES, 3, 40, 24, **extra), torch.rand(())))
    return found


def knowledge(scale=1.0):
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name in NAMES:
        vectors = (torch.randn(3, 10, 40, generator=generator) * scale).half()
        found[name] = vectors.transpose(1, 2) if name in ("down_proj", "o_proj") else vectors
    return found


def test_translator_starts_as_published():
    (ours, after), (truth, drawn) = translators()
    assert after == drawn  # as many random numbers are taken
    found, expected = ours.state_dict(), truth.state_dict()
    assert list(found) == list(expected)
    assert all(weight.equal(expected[name]) for name, weight in found.items())
    assert not any(y.any() for y in ours(knowledge(), [0, 1]).values())  # 0 in half precision
    assert all(y.any() for y in translators(fix=True)[0][0](knowledge(), [0]).values())


@pytest.mark.parametrize("rows", [2048, 10])
def test_translator_and_its_gradients(rows, monkeypatch):
    monkeypatch.setattr("pkt_ext.compat.neural_incompatibility._ROWS", rows)
    (ours, _), (truth, _) = translators()
    for network in (ours, truth):
        with torch.no_grad():
            for weight in network.parameters():
                weight.mul_(1e4)
        outputs = network(knowledge(), source_idxs=[0, 1, 2])
        sum(y.float().pow(3).sum() for y in outputs.values()).backward()
        network.seen = outputs
    for name, y in ours.seen.items():
        assert y.dtype == torch.float16 and y.shape == truth.seen[name].shape and y.any()
        torch.testing.assert_close(y, truth.seen[name], rtol=2.0**-10, atol=2.0**-24)
    gradients = dict(truth.named_parameters())
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name].grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("rows", "calls"), [(4, [4] * 7 + [2]), (64, [30])])
def test_the_translator_keeps_no_hidden_activations(rows, calls, monkeypatch):
    monkeypatch.setattr("pkt_ext.compat.neural_incompatibility._ROWS", rows)
    ours, seen = Knowledge_translator(["up_proj"], 3, 40, 24), []
    ours.network["up_proj"].register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    outputs = ours({"up_proj": knowledge()["up_proj"]}, [0])
    assert seen == calls
    outputs["up_proj"].sum().backward()
    assert sorted(seen) == sorted(calls * 2)  # computed anew


@pytest.mark.parametrize("shape", [(1, 10), (3, 10), (0, 10), (3, 0)])
def test_translated_bits_are_the_published_ones(shape):
    (ours, _), (truth, _) = translators()
    vectors = torch.randn(*shape, 40, generator=torch.Generator().manual_seed(2)).half()
    some = {n: vectors.mT.contiguous() if n in ("down_proj", "o_proj") else vectors for n in NAMES}
    gradients = []
    for network in (ours, truth):
        for weight in network.parameters():
            weight.data.mul_(1e4)
        outputs = network(some, [0])
        sum(y.float().square().sum() for y in outputs.values()).backward()
        gradients.append([outputs, [w.grad for w in network.parameters()]])
    for name, y in gradients[0][0].items():
        assert y.equal(gradients[1][0][name]) and bool(y.any()) == bool(vectors.numel())
    assert all(a.equal(b) for a, b in zip(gradients[0][1], gradients[1][1], strict=True))


# --- scripts --------------------------------------------------------------------------------------


def run_script(folder, out, fix=None):
    """The stand-in for the published scripts; fix None: as it is."""
    out.mkdir()
    arguments = [str(folder / n) for n in ("teacher", "student", "rows.jsonl")]
    if fix is None:
        laten_script.main(*arguments, str(out))
    else:
        with patched(slow, fix=fix) as ours, patched(slow_translator, fix=fix) as too:
            laten_script.main(*arguments, str(out))
        assert len(ours) == (6 if fix else 5) and too == [
            "knowledge_translator.Knowledge_translator.forward"
        ]
    return json.loads((out / "log.json").read_text())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("laten")
    for name, model in zip(("teacher", "student"), zoo.pair("llama"), strict=True):
        zoo.save(model.half(), folder / name)
    rows = [{"prompt": p, "response": a} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_script_gives_the_same_with_and_without(prepared, tmp_path, no_bars):
    plain, ours = run_script(prepared, tmp_path / "a"), run_script(prepared, tmp_path / "b", False)
    for one, other in zip(plain, ours, strict=True):
        if one["neurons"] == other["neurons"]:  # but where a logit rounds the other way
            assert one.get("losses", []) == pytest.approx(other.get("losses", []), rel=1e-2)
        for theirs, mine in zip(one["neurons"], other["neurons"], strict=True):
            for a, b in zip(theirs, mine, strict=True):
                a, b = set(map(tuple, a)), set(map(tuple, b))
                assert len(a & b) >= 0.8 * len(a) == 0.8 * len(b)
    found, expected = (torch.load(tmp_path / n / "translator.pt") for n in "ba")
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=5e-3)
    student = hf.AutoModelForCausalLM.from_pretrained(prepared / "student")
    saved = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "b" / "rate0.25")
    assert logits(saved).equal(logits(student))
    assert not hasattr(slow.KnowledgeNeurons, "fix")


def test_a_fixed_script_saves_what_it_injects(prepared, tmp_path, no_bars):
    run_script(prepared, tmp_path / "c", True)
    student = hf.AutoModelForCausalLM.from_pretrained(prepared / "student")
    changed = []
    for rate in (0.25, 0.5):
        saved = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "c" / f"rate{rate}")
        changed.append(
            sum(
                int((p != saved.get_parameter(n)).any(0).sum())
                for n, p in student.named_parameters()
                if "down_proj" in n
            )
        )
    assert changed == [2 * 12, 2 * 24]  # of 48 neurons in two blocks


def test_each_flaw_is_named_once(monkeypatch):
    monkeypatch.setattr(notices, "_given", set())
    ours, _ = both(modified())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            inject(ours, some_weights(), *some_neurons(ours))
            translators()[0][0](knowledge(), [])
    texts = [str(w.message) for w in seen if "fix=True" in str(w.message)]
    assert len(texts) == 4
