# SPDX-License-Identifier: Apache-2.0
"""ParaKnowTransfer's functions against a slow script of the same shape, written anew."""

import copy
import gc
import io
import weakref
from types import SimpleNamespace

import model_zoo
import pytest
import torch
import transformers
from compat.scripts import seeking_script as slow

from pkt_ext.compat import PublishedBehaviour, deferred, notices
from pkt_ext.compat import paraknowtransfer as ours
from pkt_ext.compat.deferred import DeferredScore

ARGS = SimpleNamespace(lora_size="7b", include_emb=True)
ROWS = [
    {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": f" question {n}"},
            {"role": "assistant", "content": "hm\n"},
            {"role": "user", "content": "and?" * n},
            {"role": "assistant", "content": f"answer {3 * n}. "},
        ]
    }
    for n in range(3)
]


@pytest.fixture(scope="module")
def tokens():
    return model_zoo.tokenizer()


@pytest.fixture(scope="module")
def teacher():
    return model_zoo.build("llama", **model_zoo.TEACHER)


@pytest.fixture
def told(monkeypatch):
    """Every notice is given anew."""
    monkeypatch.setattr(notices, "_given", set())


def accumulated(calculate, model, tokens, rows=ROWS, **options) -> dict[str, torch.Tensor]:
    """The script's own loop."""
    total = {}
    for row in rows:
        for name, score in calculate(model, tokens, row, "cpu", **options).items():
            if name in total:
                total[name] += score
            else:
                total[name] = score
    return total


def assert_close(found, expected):
    """To float32 rounding of the largest score."""
    assert list(found) == list(expected)
    for name, score in expected.items():
        assert found[name].dtype == torch.float32
        error = (found[name] - score).abs().max()
        assert error <= 2e-5 * score.abs().max(), name


# --- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, size", [((9, 7), (4, 3)), ((1, 5), (1, 5)), ((31, 2), (17, 2))])
@pytest.mark.parametrize("whole", [False, True])
def test_the_same_window(shape, size, whole):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        sens = torch.rand(shape, generator=generator)
        if whole:  # sums that both hold exactly: ties, of which the first wins
            sens = (sens * 3).floor()
        assert ours.max_sens_submatrix(sens, *size) == slow.max_sens_submatrix(sens, *size)
        turned = sens.t()
        assert ours.max_sens_submatrix(turned, *size[::-1]) == slow.max_sens_submatrix(
            turned, *size[::-1]
        )


def test_whole_numbers_and_other_shapes():
    sens = torch.randint(0, 3, (9, 7), generator=torch.Generator().manual_seed(0))
    for scores in (sens, sens > 1):
        assert ours.max_sens_submatrix(scores, 4, 3) == slow.max_sens_submatrix(scores.long(), 4, 3)
    with pytest.raises(ValueError, match="matrix"):
        ours.max_sens_submatrix(torch.ones(1, 9, 7), 4, 3)
    with pytest.raises(ValueError):
        ours.max_sens_submatrix(torch.ones(9, 7), 10, 3)


def test_corners_are_pairs_of_ints_inclusive():
    first, last = ours.max_sens_submatrix(torch.eye(4), 2, 3)
    assert (first, last) == ((0, 0), (1, 2))
    assert {type(n) for n in (*first, *last)} == {int}


def test_table_and_sums():
    matrix = torch.randint(0, 9, (6, 5))
    table = ours.compute_summed_area_table(matrix)
    assert table.dtype == matrix.dtype
    assert torch.equal(table, slow.compute_summed_area_table(matrix))
    for first, last in (((0, 0), (5, 4)), ((2, 0), (3, 4)), ((0, 3), (4, 3)), ((1, 2), (5, 3))):
        found = ours.sum_submatrix(table, first, last)
        assert found.shape == ()
        assert found == matrix[first[0] : last[0] + 1, first[1] : last[1] + 1].sum()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (4, 3), (8, 6), (2, 6)])
def test_nan_and_infinity_as_published(value, place, told):
    sens = torch.rand(9, 7, generator=torch.Generator().manual_seed(1))
    sens[place] = value
    with pytest.warns(PublishedBehaviour, match="fix=True"):
        found = ours.max_sens_submatrix(sens, 4, 3)
    assert found == slow.max_sens_submatrix(sens, 4, 3)
    with pytest.raises(ValueError, match="NaN or infinity"):
        ours.max_sens_submatrix(sens, 4, 3, fix=True)


def test_resize_params_views_the_window():
    params, sens = torch.randn(9, 7), torch.rand(9, 7)
    window = ours.resize_params(params, sens, 4, 3)
    assert torch.equal(window, slow.resize_params(params, sens, 4, 3))
    assert window.untyped_storage().data_ptr() == params.untyped_storage().data_ptr()


@pytest.mark.parametrize("size", [(10, 3), (4, 8)])
def test_growth_and_two_shapes_are_refused(size):
    with pytest.raises(ValueError, match="cannot grow"):
        ours.resize_params(torch.ones(9, 7), torch.ones(9, 7), *size)
    with pytest.raises(ValueError, match=r"\[9, 7\].*\[7, 9\]"):
        ours.resize_params(torch.ones(9, 7), torch.ones(7, 9), 3, 3)


# --- factors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (16, 16), (1, 9), (700, 600)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_multiply_to_the_same(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, min(shape), generator=generator) for n in shape)
    mat = ((left * torch.arange(1.0, min(shape) + 1) ** -0.6) @ right.T).to(dtype)
    rank = min(5, *shape)
    b, a = ours.svd(mat, rank)
    expected_b, expected_a = slow.svd(mat, rank)
    assert (b.shape, a.shape) == (expected_b.shape, expected_a.shape)
    assert b.dtype == a.dtype == torch.float16
    expected = expected_b.double() @ expected_a.double()
    assert (b.double() @ a.double() - expected).norm() <= 1e-3 * expected.norm()
    # all singular values in b, the rows of a orthonormal
    assert torch.allclose(b.double().norm(dim=0), expected_b.double().norm(dim=0), rtol=3e-3)
    assert torch.allclose(a.double() @ a.double().T, torch.eye(rank).double(), atol=3e-3)


def test_a_rank_above_the_matrix(told):
    wide = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    with pytest.warns(PublishedBehaviour, match="do not multiply"):
        b, a = ours.svd(wide, 7)
    assert (b.shape, a.shape) == tuple(x.shape for x in slow.svd(wide, 7)) == ((5, 5), (7, 8))
    assert torch.allclose(a.float() @ a.float().T, torch.eye(7), atol=5e-3)
    for matrix in (wide, wide.t()):
        b, a = ours.svd(matrix, 7, fix=True)
        assert (b.shape[1], a.shape[0]) == (7, 7)
        assert torch.allclose(b.float() @ a.float(), matrix, atol=1e-2)
    with pytest.raises(RuntimeError):
        slow.svd(wide.t(), 7)
    with pytest.raises(ValueError, match="fix=True pads"):
        ours.svd(wide.t(), 7)


def test_no_rank_at_all():
    b, a = ours.svd(torch.ones(5, 8), 0)
    assert (b.shape, a.shape, b.dtype) == ((5, 0), (0, 8), torch.float16)


def test_overflow_of_float16(told):
    mat = torch.eye(4) * 1e6
    with pytest.warns(PublishedBehaviour, match="65504"):
        assert ours.svd(mat, 2)[0].isinf().any()
    assert slow.svd(mat, 2)[0].isinf().any()
    with pytest.raises(ValueError, match="scale the matrix"):
        ours.svd(mat, 2, fix=True)
    with pytest.raises(ValueError, match="NaN"):
        ours.svd(mat * torch.nan, 2)


# --- sensitivities --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama_gqa", "qwen2_tied", "gpt_neox"])
@pytest.mark.parametrize("on_output", [True, False])
def test_the_same_scores(family, on_output, tokens, told):
    model = model_zoo.build(family, layers=2)
    options = {"loss_on_output": on_output}
    expected = accumulated(slow.calculate_sensitivity, model, tokens, **options)
    assert_close(accumulated(ours.calculate_sensitivity, model, tokens, **options), expected)
    deferred = accumulated(ours.calculate_sensitivity, model, tokens, **options, defer=True)
    assert all(type(score) is DeferredScore for score in deferred.values())
    assert_close(deferred, expected)


def test_one_pass_finds_blocks_and_windows(teacher, tokens, capsys):
    """What the script does, up to its factors, without one score ever in memory."""
    weights = teacher.state_dict()
    expected = accumulated(slow.calculate_sensitivity, teacher, tokens)
    found = accumulated(ours.calculate_sensitivity, teacher, tokens, defer=True)
    kept = ours.select_top_k_layers(found, ARGS, sizes=slow.LORA_PARA)
    printed = eval(capsys.readouterr().out)
    assert kept == slow.select_top_k_layers(expected, ARGS)
    slow_printed = eval(capsys.readouterr().out)
    assert [block for block, _ in printed] == [block for block, _ in slow_printed]
    assert dict(printed) == pytest.approx(dict(slow_printed), rel=1e-5)
    sizes = {"q_proj": (32, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
    for name, score in expected.items():
        module = name.split(".")[-2]
        if module in sizes:
            window = ours.resize_params(weights[name], found[name], *sizes[module])
            assert torch.equal(window, slow.resize_params(weights[name], score, *sizes[module]))
    for name, size in (("model.embed_tokens.weight", (32, 264)), ("lm_head.weight", (264, 32))):
        turn = torch.t if size[0] == 32 else torch.Tensor.contiguous
        score = found[name].t() if size[0] == 32 else found[name]
        window = ours.resize_params(turn(weights[name]), score, *size)
        assert torch.equal(
            window, slow.resize_params(turn(weights[name]), turn(expected[name]), *size)
        )
    assert all(score._value is None for score in found.values())
    # another size than foreseen takes the scores, all in one more pass
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(
        ours.resize_params(weights[name], found[name], 7, 5),
        slow.resize_params(weights[name], expected[name], 7, 5),
    )
    assert_close(found, expected)


def test_a_deferred_score_is_a_tensor(teacher, tokens):
    expected = slow.calculate_sensitivity(teacher, tokens, ROWS[0])
    name = "model.layers.0.mlp.up_proj.weight"

    def fresh():
        return ours.calculate_sensitivity(teacher, tokens, ROWS[0], defer=True)[name]

    score = fresh()
    assert isinstance(score, torch.Tensor)
    assert (score.shape, score.dtype, score.device) == (
        expected[name].shape,
        torch.float32,
        torch.device("cpu"),
    )
    assert (score.size(0), score.ndim, len(score), score.numel()) == (80, 2, 80, 80 * 48)
    assert score._value is None  # nothing has been computed for all that

    def same(one, other=expected[name]):
        assert_close({"": one}, {"": other})

    same(fresh() * 1)
    same(fresh()[:3, 4], expected[name][:3, 4])
    same(fresh().t().contiguous(), expected[name].t())
    same(fresh().T[2], expected[name].T[2])
    same(torch.from_numpy(fresh().numpy()))
    same(torch.stack([fresh(), fresh()])[1])
    same(copy.deepcopy(fresh()))
    same(fresh() + fresh(), 2 * expected[name])
    joined = fresh()
    joined += expected[name]  # an ordinary tensor
    same(joined, 2 * expected[name])
    halved = fresh()
    halved *= 0.5
    halved += fresh()
    same(halved, 1.5 * expected[name])
    twice = fresh()
    twice += twice
    same(twice, 2 * expected[name])
    for change in (
        lambda x: x.mul_(10),
        lambda x: x.clamp_(max=1e-6),
        lambda x: x.t().zero_(),
    ):
        total, edited, truth = fresh(), fresh(), expected[name].clone()
        change(edited)
        change(truth)
        total += edited
        same(total, expected[name] + truth)
    same(torch.tensor(fresh()))
    buffer = io.BytesIO()
    torch.save({"a": fresh()}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer)["a"]
    assert type(loaded) is torch.Tensor
    same(loaded)


def test_passes_are_few_however_scores_are_added(teacher, tokens, monkeypatch):
    passes = []
    take = deferred.every_score

    def counted(stream, batches, *rest):
        passes.append(sum(len(batch.ids) for batch in batches))
        return take(stream, batches, *rest)

    monkeypatch.setattr(deferred, "every_score", counted)
    rows = [ours.calculate_sensitivity(teacher, tokens, row, defer=True) for row in ROWS]
    expected = accumulated(slow.calculate_sensitivity, teacher, tokens)
    assert_close({name: sum(row[name] for row in rows) for name in rows[0]}, expected)
    assert passes == [1, 1, 1]
    rows = [ours.calculate_sensitivity(teacher, tokens, row, defer=True) for row in ROWS]
    assert_close({n: torch.stack([row[n] for row in rows]).sum(0) for n in rows[0]}, expected)
    assert passes == [1, 1, 1] * 2
    assert_close(accumulated(ours.calculate_sensitivity, teacher, tokens, defer=True), expected)
    assert passes == [1, 1, 1] * 2 + [3]


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
)
def test_scores_are_the_same_in_any_mode(mode, teacher, tokens):
    expected = accumulated(slow.calculate_sensitivity, teacher, tokens)
    with mode():
        found = accumulated(ours.calculate_sensitivity, teacher, tokens, defer=True)
        kept = ours.select_top_k_layers(found, ARGS, sizes=slow.LORA_PARA)
        values = {name: score * 1 for name, score in found.items()}
    assert kept == slow.select_top_k_layers(expected, ARGS)
    assert_close(values, expected)


def test_nothing_is_held_once_scores_are_there(tokens):
    model = model_zoo.build("llama", layers=1)
    gone, frozen = weakref.ref(model), gc.get_freeze_count()
    score = ours.calculate_sensitivity(model, tokens, ROWS[0], defer=True)["model.norm.weight"]
    other = model_zoo.build("llama", layers=1)
    second = ours.calculate_sensitivity(other, tokens, ROWS[0], defer=True)["model.norm.weight"]
    assert gc.get_freeze_count() > frozen
    assert score.sum() > 0
    del model
    assert gc.get_freeze_count() > frozen  # the second one is open still
    del second
    assert gc.get_freeze_count() == frozen
    gc.collect()
    assert gone() is None


def test_a_model_that_changes_its_shape_or_what_is_trained(tokens):
    model = model_zoo.build("llama", layers=1)
    held = ours.calculate_sensitivity(model, tokens, ROWS[0], defer=True)
    model.model.embed_tokens.weight.requires_grad_(False)
    found = ours.calculate_sensitivity(model, tokens, ROWS[1], defer=True)
    assert "model.embed_tokens.weight" not in found
    assert_close(found, slow.calculate_sensitivity(model, tokens, ROWS[1]))
    assert len(held) == len(found) + 1


def test_a_script_renders_and_encodes_by_its_own(teacher, tokens):
    def get_content(messages, tokenizer):
        marks = {"user": "### ", "assistant": "<|assistant|>\n"}
        return "".join(marks[m["role"]] + m["content"] for m in messages)

    def tokenize(text, tokenizer, device="cpu"):
        return tokenizer(text, truncation=True, max_length=30, return_tensors="pt")

    row = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 50}]
    }
    own = {"get_content": get_content, "tokenize": tokenize}
    found = ours.calculate_sensitivity(teacher, tokens, row, namespace=own)
    ids = tokenize(get_content(row["messages"], tokens), tokens).input_ids
    labels = ids.clone()
    labels[:, : len(tokens("### a<|assistant|>\n").input_ids)] = -100
    teacher.zero_grad()
    teacher(input_ids=ids, labels=labels).loss.backward()
    expected = {n: (p * p.grad).abs().detach() for n, p in teacher.named_parameters()}
    teacher.zero_grad()
    assert_close(found, expected)
    # where the prompt ends is known of the published answer's mark alone
    own = {"get_content": lambda messages, _: "".join(f"# {m['content']}" for m in messages)}
    with pytest.raises(ours.NotSupported, match="words of its own"):
        ours.calculate_sensitivity(teacher, tokens, row, namespace=own)


@pytest.mark.parametrize(
    "messages, said",
    [
        ([], "no text|does not end"),
        ([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], "does not end"),
    ],
)
def test_rows_without_an_answer_are_refused(messages, said, teacher):
    with pytest.raises(ValueError, match=said):
        ours.calculate_sensitivity(teacher, model_zoo.tokenizer(bos=False), {"messages": messages})


def test_weights_that_change_before_the_scores_are_read(tokens):
    for edit in (
        lambda weight: weight.mul_(2),
        lambda weight: weight.data.mul_(2),
        lambda weight: weight.data.copy_(weight.flip(0).clone()),
    ):
        model = model_zoo.build("llama", layers=1)
        score = ours.calculate_sensitivity(model, tokens, ROWS[0], defer=True)["model.norm.weight"]
        with torch.no_grad():
            edit(model.lm_head.weight)
        for _ in range(2):
            with pytest.raises(ValueError, match="weights changed"):
                score.sum()
        # what comes after the change is scored with what it left
        del score
        gc.collect()  # the error holds it
        later = ours.calculate_sensitivity(model, tokens, ROWS[1], defer=True)
        assert_close(later, slow.calculate_sensitivity(model, tokens, ROWS[1]))


def test_frozen_parameters_have_no_score(tokens):
    model = model_zoo.build("llama", layers=1)
    model.model.embed_tokens.weight.requires_grad_(False)
    expected = slow.calculate_sensitivity(model, tokens, ROWS[1])
    assert "model.embed_tokens.weight" not in expected
    assert_close(ours.calculate_sensitivity(model, tokens, ROWS[1]), expected)
    assert not model.model.embed_tokens.weight.requires_grad
    assert model.lm_head.weight.requires_grad and model.lm_head.weight.grad is None


def test_a_row_that_no_loss_looks_at(teacher, tokens, told):
    long = {
        "messages": [
            {"role": "user", "content": "x" * 3000},
            {"role": "assistant", "content": "y"},
        ]
    }
    with pytest.warns(PublishedBehaviour, match="counts for nothing"):
        found = ours.calculate_sensitivity(teacher, tokens, long)
    assert not any(score.any() for score in found.values())
    assert [s.shape for s in found.values()] == [p.shape for p in teacher.parameters()]
    mixed = accumulated(
        ours.calculate_sensitivity, teacher, tokens, [ROWS[0], long, ROWS[1]], defer=True
    )
    assert_close(mixed, accumulated(slow.calculate_sensitivity, teacher, tokens, ROWS[:2]))
    with pytest.raises(ValueError, match="no token of its answer"):
        ours.calculate_sensitivity(teacher, tokens, long, fix=True)


def test_tied_matrices(tokens, told):
    model = model_zoo.build("llama_tied", layers=1)
    with pytest.warns(PublishedBehaviour, match="include_emb false"):
        assert "lm_head.weight" not in ours.calculate_sensitivity(model, tokens, ROWS[0])
    expected = accumulated(slow.calculate_sensitivity, model, tokens)["model.embed_tokens.weight"]
    for defer in (False, True):
        found = accumulated(ours.calculate_sensitivity, model, tokens, fix=True, defer=defer)
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            assert_close({"": found[name]}, {"": expected})


def test_half_precision_is_said(tokens, told):
    model = model_zoo.build("llama", layers=1).bfloat16()
    with pytest.warns(PublishedBehaviour, match="bfloat16"):
        found = ours.calculate_sensitivity(model, tokens, ROWS[0])
    assert {score.dtype for score in found.values()} == {torch.float32}


def test_models_that_cannot_be_scored(tokens):
    with pytest.raises(ours.NotSupported, match="got Linear"):
        ours.calculate_sensitivity(torch.nn.Linear(2, 2), tokens, ROWS[0])
    spread = model_zoo.build("llama", layers=1)
    spread.lm_head.to("meta")
    with pytest.raises(ours.NotSupported, match="several devices"):
        ours.calculate_sensitivity(spread, tokens, ROWS[0])


def _scaled_forward(model):
    inner = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: 2 * inner(x)


class ScaledLinear(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnLlama(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda m: m.model.layers[0].mlp.register_forward_hook(lambda *a: 2 * a[2]), "hooks"),
        (lambda m: m.model.layers[0].register_forward_pre_hook(lambda *a: None), "hooks"),
        (lambda m: m.lm_head.weight.register_hook(lambda g: 2 * g), "hooks on its gradient"),
        (_scaled_forward, "a forward of its own"),
        (lambda m: setattr(m, "lm_head", ScaledLinear(32, model_zoo.VOCAB, bias=False)), "forward"),
        (lambda m: m.double(), "float64"),
        (lambda m: m.requires_grad_(False), "no parameter"),
        (lambda m: setattr(m, "__class__", OwnLlama), "OwnLlama has a forward of its own"),
    ],
)
def test_models_that_compute_something_else(change, said, tokens):
    """Nothing but transformers' own forward is scored; a script keeps its own function then."""
    model = model_zoo.build("llama", layers=1)
    change(model)
    with pytest.raises(ours.NotSupported, match=said):
        ours.calculate_sensitivity(model, tokens, ROWS[0])


def test_a_subclass_that_computes_the_same(tokens):
    """Such as one that finds its checkpoints elsewhere."""
    model = model_zoo.build("llama", layers=1)
    expected = slow.calculate_sensitivity(model, tokens, ROWS[0])
    model.__class__ = type("Elsewhere", (transformers.LlamaForCausalLM,), {})
    assert_close(ours.calculate_sensitivity(model, tokens, ROWS[0]), expected)


def test_nan_gradients_are_an_error_by_name(tokens):
    model = model_zoo.build("llama", layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layers.1.*NaN"):
        ours.calculate_sensitivity(model, tokens, ROWS[0])


# --- blocks ---------------------------------------------------------------------------------------


def test_equal_totals_keep_the_lower_block_and_too_few_are_all_kept(told, capsys):
    scores = {f"model.layers.{n}.w": torch.tensor([1.0, 2.0]) for n in (0, 1, 2, 10)}
    scores |= {"model.norm.weight": torch.tensor([9.0]), "model.layers.2.b": torch.tensor([5.0])}
    assert ours.select_top_k_layers(scores, ARGS, sizes=slow.LORA_PARA) == [0, 2]
    assert slow.select_top_k_layers(scores, ARGS) == [0, 2]
    sizes = {"7b": {"n_layer": 9}}
    with pytest.warns(PublishedBehaviour, match="all are"):
        assert ours.select_top_k_layers(scores, ARGS, sizes=sizes) == [0, 1, 2, 10]
    with pytest.raises(ValueError, match="9 blocks"):
        ours.select_top_k_layers(scores, ARGS, sizes=sizes, fix=True)
    with pytest.raises(KeyError, match="70b"):
        ours.select_top_k_layers(scores, SimpleNamespace(lora_size="70b"))


def test_the_published_sizes():
    assert ours.LORA_PARA["13b"] == {"dim": 5120, "ffn": 13824, "n_layer": 40}
    assert sorted(ours.LORA_PARA) == ["13b", "30b", "65b", "7b"]
