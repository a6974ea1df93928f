# SPDX-License-Identifier: Apache-2.0
"""The map between two hidden spaces and its cache, against dense float64 (METHODS 4.9)."""

import copy
import logging

import model_zoo as zoo
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from semantics import Largest, byte_level, llama_with, random_head, sentencepiece, stream_of

from pkt_ext.errors import InputError, NonFiniteError
from pkt_ext.methods import semantic_map
from pkt_ext.methods.semantic_map import VARIANTS, SemanticMap, build_map, map_bytes
from pkt_ext.methods.vocabulary import SharedVocabulary, shared_vocabulary
from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.checkpoint import Checkpoint

PAIRS = [
    ("llama", "llama_gqa"),
    ("qwen3", "qwen3"),
    ("gemma2", "gemma2"),
    ("gpt_neox", "gpt_neox"),
    ("gemma2", "gpt_neox"),
    ("llama", "opt_post_norm"),
]


def same(count: int) -> SharedVocabulary:
    ids = torch.arange(count)
    return SharedVocabulary(ids, ids, True)


def built(teacher, student, shared=None, **options) -> SemanticMap:
    streams = [stream_of(model) for model in (teacher, student)]
    return build_map(*streams, shared or same(259), **({"show": False} | options))


def frame(model, ids, fold=True) -> torch.Tensor:
    """S [D, m], unit columns, by the pseudo-inverse."""
    head = model.get_output_embeddings().weight.detach()[ids].double()
    path = stream_of(model).anatomy.final_norm
    if fold and path:
        gain = model.get_parameter(f"{path}.weight").detach()
        head = head * (gain + 1.0 if "Gemma" in type(model).__name__ else gain).double()
    return torch.nn.functional.normalize(torch.linalg.pinv(head), dim=0)


def decompose(state, columns):
    """(A5): cosines [m] with the teacher's basis."""
    return columns.T @ state / state.norm()


def recompose(cosines, columns):
    """(A6): [D_s]."""
    return columns @ cosines


def error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("families", PAIRS, ids="-".join)
def test_map_is_the_product_of_the_frames(families, fold):
    teacher, student = zoo.build(families[0], **zoo.TEACHER), zoo.build(families[1], **zoo.STUDENT)
    ids = torch.arange(259)
    theirs, ours = frame(teacher, ids, fold), frame(student, ids, fold)
    found = built(teacher, student, fold_norm=fold)
    assert found.matrix.shape == (32, 48) and found.matrix.dtype == torch.float32
    assert error(found.matrix, ours @ theirs.T) < 1e-6
    state = torch.randn(48, generator=torch.Generator().manual_seed(5))
    # measured 2e-7: the matrix is float32
    both_ways = recompose(decompose(state.double(), theirs), ours)
    assert error(found.apply(state, normalise=True), both_ways) < 1e-5
    squares = built(teacher, student, fold_norm=fold, variant="least-squares")
    assert error(squares.matrix, torch.linalg.lstsq(ours.T, theirs.T).solution) < 1e-6


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_neox"])
def test_student_and_teacher_the_same(family):
    model = zoo.build(family)
    matrix = built(model, copy.deepcopy(model)).matrix.double()
    assert error(matrix, matrix.T) < 1e-6
    assert torch.linalg.eigvalsh(matrix).min() > 1e-3 * torch.linalg.eigvalsh(matrix).max()
    squares = built(model, copy.deepcopy(model), variant="least-squares").matrix
    assert (squares - torch.eye(32)).abs().max() < 1e-6


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_ill_conditioned_heads(condition):
    teacher = llama_with(random_head(300, 48, condition, seed=1))
    student = llama_with(random_head(300, 32, condition, seed=2))
    ids = torch.arange(300)
    theirs, ours = frame(teacher, ids), frame(student, ids)
    assert error(built(teacher, student, same(300)).matrix, ours @ theirs.T) < 1e-6
    alone = built(student, student, same(300), variant="least-squares").matrix
    assert (alone - torch.eye(32)).abs().max() < 1e-6


def test_a_head_of_lower_rank_maps_its_own_directions():
    student = llama_with(random_head(300, 32, 10.0, rank=20))
    squares = built(student, student, same(300), variant="least-squares")
    assert squares.report["student"] == squares.report["teacher"]
    assert squares.report["student"]["rank"] == 20 and squares.report["student"]["cut_off"]
    matrix = squares.matrix.double()
    assert error(matrix @ matrix, matrix) < 1e-6 and error(matrix, matrix.T) < 1e-6
    assert float(matrix.trace()) == pytest.approx(20, abs=1e-4)
    teacher = llama_with(random_head(300, 48, 10.0, seed=1))
    ids = torch.arange(300)
    expected = frame(student, ids) @ frame(teacher, ids).T
    assert error(built(teacher, student, same(300)).matrix, expected) < 1e-6


def test_a_token_without_a_row_in_the_head():
    teacher, student = zoo.pair("llama")
    teacher.lm_head.weight.data[7] = 0.0
    student.lm_head.weight.data[9] = 0.0
    ids = torch.arange(259)
    for variant in VARIANTS:
        found = built(teacher, student, variant=variant)
        assert torch.isfinite(found.matrix).all()
    theirs, ours = frame(teacher, ids), frame(student, ids)
    theirs[:, 7] = ours[:, 9] = 0.0  # the pseudo-inverse has 1e-17 there
    assert error(built(teacher, student).matrix, ours @ theirs.T) < 1e-6


def renumbered(model, order):
    """The model whose token order[i] is the given one's token i."""
    found = copy.deepcopy(model)
    for name in ("get_output_embeddings", "get_input_embeddings"):
        weight = getattr(found, name)().weight
        weight.data[order] = getattr(model, name)().weight.detach()
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("families", [("llama", "qwen3"), ("gemma2", "gpt_neox")], ids="-".join)
def test_renumbered_tokens_change_nothing(families, variant):
    teacher, student = zoo.build(families[0], **zoo.TEACHER), zoo.build(families[1], **zoo.STUDENT)
    generator = torch.Generator().manual_seed(1)
    orders = [torch.randperm(zoo.VOCAB, generator=generator) for _ in range(2)]
    shared = SharedVocabulary(orders[0][:259], orders[1][:259], False)
    moved = [renumbered(m, order) for m, order in zip((teacher, student), orders, strict=True)]
    one = built(teacher, student, variant=variant).matrix
    assert error(built(*moved, shared, variant=variant).matrix, one.double()) < 1e-6


def test_rows_of_no_token_change_nothing():
    teacher, student = zoo.pair("llama")
    shared = shared_vocabulary(zoo.tokenizer(), zoo.tokenizer(), zoo.VOCAB, zoo.VOCAB)
    assert len(shared) == 259
    one = built(teacher, student, shared).matrix
    teacher.lm_head.weight.data[259:] = 1e30
    student.lm_head.weight.data[259:] = float("nan")
    assert torch.equal(built(teacher, student, shared).matrix, one)


def test_other_families_other_tokenizers():
    letters = [chr(n) for n in range(ord("A"), ord("z"))]
    tokenizers = byte_level("Ġthe", "Ġa", "only"), sentencepiece("▁a", "mine", "▁the", *letters)
    teacher = zoo.build("qwen3", vocab=280, hidden=48)
    student = zoo.build("gpt_neox", vocab=400, hidden=32)
    shared = shared_vocabulary(*tokenizers, 280, 400)
    assert not shared.identical and len(shared) == 256 + 2 + 1
    expected = frame(student, shared.student) @ frame(teacher, shared.teacher).T
    assert error(built(teacher, student, shared).matrix, expected) < 1e-6


def test_chunks_change_no_more_than_rounding():
    teacher, student = zoo.pair("llama")
    for variant in VARIANTS:
        one = built(teacher, student, variant=variant).matrix
        for rows in (1, 7, 258, 259):
            other = built(teacher, student, variant=variant, chunk_bytes=rows * 8 * 48).matrix
            assert error(other, one.double()) < 1e-6


def test_from_files_as_from_memory(tmp_path):
    models = [m.to(torch.bfloat16) for m in zoo.pair("gemma2")]
    folders = [zoo.save(m, tmp_path / name) for m, name in zip(models, "ts", strict=True)]
    streams = [StreamedModel(Checkpoint.open(folder)) for folder in folders]
    found = build_map(*streams, same(259), show=False)
    assert torch.equal(found.matrix, built(*models).matrix)
    theirs, ours = (frame(model.float(), torch.arange(259)) for model in models)
    assert error(found.matrix, ours @ theirs.T) < 1e-6


def test_a_head_quantised_to_four_bits(tmp_path):
    student = zoo.build("llama", hidden=64, ffn=96)
    folder = zoo.save(student, tmp_path / "model")
    settings = hf.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["none"])
    teacher = hf.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map={"": "cpu"}
    )
    assert type(teacher.lm_head).__name__ == "Linear4bit"
    streams = [StreamedModel(Checkpoint.open(m), dtype=torch.float32) for m in (teacher, student)]
    found = build_map(*streams, same(259), variant="least-squares", show=False)
    # four bits of the teacher's head away from the student's, so from the identity
    assert 1e-3 < (found.matrix - torch.eye(64)).abs().max() < 0.1
    decoded = copy.deepcopy(student)
    weight = streams[0].fetch([streams[0].head_name])[streams[0].head_name]
    decoded.lm_head.weight.data.copy_(weight)
    expected = built(decoded, student, variant="least-squares").matrix
    assert torch.allclose(found.matrix, expected, atol=1e-6)


def test_apply():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(32, 48, generator=generator)
    found = SemanticMap(matrix, {})
    states = torch.randn(2, 5, 48, generator=generator).to(torch.bfloat16)
    states[0, 3] = 0.0
    plain = found.apply(states, normalise=False)
    assert plain.shape == (2, 5, 32) and plain.dtype == torch.float32
    assert torch.allclose(plain, states.float() @ matrix.T)
    scaled = found.apply(states, normalise=True)
    assert (scaled[0, 3] == 0).all()
    lengths = states.float().norm(dim=-1, keepdim=True)
    assert torch.allclose(scaled * lengths, plain, atol=1e-5)
    assert found.apply(states[:, :0], normalise=True).shape == (2, 0, 32)
    assert torch.equal(found.to("cpu").matrix, matrix)


def test_report():
    teacher, student = zoo.pair("llama")
    report = built(teacher, student, variant="least-squares", ridge=1e-3).report
    assert report.pop("seconds") > 0
    for name, width in (("teacher", 48), ("student", 32)):
        figures = report.pop(name)
        assert figures["rank"] == width and 1 < figures["condition"] < 10
        assert figures["ridge"] > 0 and figures["passes"] == 1 and figures["cut_off"] is False
    assert report == {
        "variant": "least-squares",
        "fold_norm": True,
        "ridge": 1e-3,
        "tokens": 259,
        "same_ids": True,
        "cached": False,
    }


def test_progress_is_logged_where_there_is_no_terminal(caplog):
    teacher, student = zoo.pair("llama")
    with caplog.at_level(logging.INFO, "pkt_ext"):
        built(teacher, student, show=True)
    said = [record.message for record in caplog.records]
    assert said == [
        "teacher: Gram matrix, 259 tokens",
        "student: Gram matrix, 259 tokens",
        "semantic map, 259 tokens",
    ]


def test_refusals():
    teacher, student = zoo.pair("llama")
    with pytest.raises(InputError, match="map variant 'cosine'; choose one of frames, least-sq"):
        built(teacher, student, variant="cosine")
    for ridge in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="give 0 or a small positive number"):
            built(teacher, student, ridge=ridge)
    with pytest.raises(InputError, match="share 47 tokens, but hidden size 48 takes as many"):
        built(teacher, student, same(47))
    student.lm_head.weight.data[11, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"lm_head\.weight, token 11, holds NaN or Inf"):
        built(teacher, student)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_of_the_vocabularys_size_is_made(variant):
    streams = [stream_of(zoo.build("llama", vocab=5000, hidden=width)) for width in (32, 24)]
    options = dict(variant=variant, chunk_bytes=16 * 8 * 32, show=False)
    with Largest() as largest:
        build_map(*streams, same(1000), **options)
    assert largest.elements == 32 * 32


def test_predicted_bytes_know_no_vocabulary():
    small, large = (
        [stream_of(zoo.build("llama", vocab=vocab, hidden=d)) for d in (64, 32)]
        for vocab in (264, 5000)
    )
    for variant in VARIANTS:
        found = map_bytes(*small, variant=variant, chunk_bytes=2**12)
        assert found == map_bytes(*large, variant=variant, chunk_bytes=2**12)
    # both bases and the sum at the least
    assert map_bytes(*small, chunk_bytes=0) > 8 * (64 * 64 + 32 * 32 + 64 * 32)
    assert map_bytes(*small, variant="least-squares") >= map_bytes(*small)


# --- the cache ------------------------------------------------------------------------------------


def files_in(folder) -> list:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def no_building(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("built again")

    return lambda: monkeypatch.setattr(semantic_map, "semantic_basis", refuse)


def test_a_map_is_found_again(tmp_path, no_building):
    teacher, student = zoo.pair("llama")
    folder = tmp_path / "deep" / "maps"
    first = built(teacher, student, cache=folder)
    (name,) = files_in(folder)
    no_building()
    again = built(teacher, student, cache=folder, chunk_bytes=2**12)
    assert torch.equal(again.matrix, first.matrix)
    assert again.report == first.report | {"cached": True} and not first.report["cached"]
    (again.matrix).zero_()  # its own memory: the file stays as it is
    assert torch.equal(built(teacher, student, cache=folder).matrix, first.matrix)
    assert files_in(folder) == [name]


def test_another_map_is_another_file(tmp_path):
    teacher, student = zoo.pair("llama")
    found = []

    def differs(*args, **options):
        built(*args, cache=tmp_path, **options)
        found.append(len(files_in(tmp_path)))

    differs(teacher, student)
    differs(teacher, student, variant="least-squares")
    differs(teacher, student, fold_norm=False)
    differs(teacher, student, ridge=1e-6)
    differs(teacher, student, same(258))
    order = torch.randperm(259, generator=torch.Generator().manual_seed(0))
    differs(teacher, student, SharedVocabulary(order, torch.arange(259), False))
    for model in (teacher, student):
        model.lm_head.weight.data[100, 3] += 1e-3
        differs(teacher, student)
        model.model.norm.weight.data[5] += 1e-3
        differs(teacher, student)
    assert found == list(range(1, 11))
    teacher.lm_head.weight.data[260] = 7.0  # in no tokenizer
    differs(teacher, student)
    assert found[-1] == 10


def cut(path, content):
    path.write_bytes(content[:-100])


def flip(path, content):
    path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])


def empty(path, _):
    path.write_bytes(b"")


def foreign(path, _):
    save_file({"matrix": torch.zeros(32, 48)}, path)


def another_shape(path, _):
    save_file({"matrix": load_file(path)["matrix"].T.contiguous()}, path)


def another_name(path, _):
    save_file({"other": torch.zeros(32, 48)}, path)


@pytest.mark.parametrize("damage", [cut, flip, empty, foreign, another_shape, another_name])
def test_a_damaged_file_is_built_again(damage, tmp_path, caplog):
    teacher, student = zoo.pair("llama")
    first = built(teacher, student, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    damage(path, content)
    again = built(teacher, student, cache=tmp_path)
    assert torch.equal(again.matrix, first.matrix) and not again.report["cached"]
    (said,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert f"{path} is damaged" in said and "built again" in said
    caplog.clear()
    assert built(teacher, student, cache=tmp_path).report["cached"]
    assert not caplog.records and files_in(tmp_path) == [path.name]


def test_a_cache_that_cannot_be_written(tmp_path, caplog):
    teacher, student = zoo.pair("llama")
    folder = tmp_path / "file"
    folder.write_text("no folder")
    found = built(teacher, student, cache=folder)
    assert torch.equal(found.matrix, built(teacher, student).matrix)
    assert f"the semantic map was not kept in {folder}" in caplog.text
