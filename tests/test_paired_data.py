# SPDX-License-Identifier: Apache-2.0
"""Rows read by two models: what is paired, against the texts that both have read so far."""

import string

import model_zoo
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pkt_ext.data import IGNORED, encode, read_rows
from pkt_ext.errors import InputError
from pkt_ext.paired_data import encode_pairs

WORDS = ("The", "_answer", "_is", "_brief", "brief", "_seven", "_fox", "_quick", "own", "_two")
ANSWERS = (
    "The answer is seven.",
    " The quick fox. ",
    "naïve café, déjà vu",
    "seven 😀😀 eight 👩‍🚀!",
    "日本 and 東京",
    "e\u0301 is two characters",
    "one\n\n two\n three  four",
    "x",
)
ROWS = [{"id": str(i), "prompt": f"Row {i}? ", "completion": a} for i, a in enumerate(ANSWERS)]


def byte_level(*, chat=False):
    """As GPT-2's: tokens are made of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(**_merging("Ġ", ["<pad>", "</s>", *alphabet])))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return _outer(inner, chat)


def metaspace(*, chat=False):
    """As Llama 2's: tokens are made of characters, and of bytes where there is no such token."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    tokens += [*string.printable.replace(" ", ""), *"é日"]
    inner = Tokenizer(models.BPE(**_merging("▁", tokens), unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    )
    return _outer(inner, chat)


def _merging(blank, tokens):
    """Vocabulary and merges that make `WORDS` tokens, each from its left."""
    merges = []
    for word in WORDS:
        word = word.replace("_", blank)
        merges += [(word[:n], word[n]) for n in range(1, len(word))]
    merges = list(dict.fromkeys(merges))
    tokens = dict.fromkeys([*tokens, *(left + right for left, right in merges)])
    return {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}


def _outer(inner, chat):
    outer = hf.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    if chat:
        outer.chat_template = model_zoo.CHAT_TEMPLATE
    return outer


TOKENIZERS = {
    "bytes": model_zoo.tokenizer,
    "byte_level": byte_level,
    "metaspace": metaspace,
}


def pairs(rows, teacher, student, shared=False, **options):
    return encode_pairs(read_rows(rows), teacher, student, shared, **{"max_length": 500} | options)


def texts(found, n, tokenizers):
    """What is read up to each paired position of row `n`: (teacher's, student's) texts."""
    sides = zip((found.teacher, found.student), found.positions[n], tokenizers, strict=True)
    return [
        [tokenizer.decode(samples[n].input_ids[: p + 1].tolist()) for p in positions.tolist()]
        for samples, positions, tokenizer in sides
    ]


def test_tokenizers_of_these_tests_read_everything():
    for make in (byte_level, metaspace):
        tokenizer = make()
        for answer in ANSWERS:
            assert tokenizer.decode(tokenizer(f"?{answer}").input_ids) == f"?{answer}"
    assert "▁answer" in metaspace().get_vocab() and "Ġanswer" in byte_level().get_vocab()


def read_by(sample, tokenizer, answer):
    """Characters of the answer -> the last supervised position that has read them, by decoding."""
    ids = sample.input_ids.tolist()
    before = tokenizer.decode(ids).index(answer)
    found = {}
    for position in range(len(ids) - 1):
        text = tokenizer.decode(ids[: position + 1])
        if sample.labels[position + 1] != IGNORED and not text.endswith("\ufffd"):
            found[max(0, len(text) - before)] = position
    return {read: position for read, position in found.items() if read <= len(answer)}


@pytest.mark.parametrize("chat", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("byte_level", "metaspace"),
        ("metaspace", "byte_level"),
        ("bytes", "metaspace"),
        ("metaspace", "bytes"),
        ("byte_level", "byte_level"),
    ],
)
@pytest.mark.parametrize("form", ["auto", "published", "plain"])
def test_positions_have_read_the_same_part_of_the_answer(teacher, student, chat, form):
    speaks = [TOKENIZERS[name](chat=c) for name, c in zip((teacher, student), chat, strict=True)]
    found = pairs(ROWS, *speaks, prompt_format=form)
    assert [s.id for s in found.teacher] == [s.id for s in found.student] == [r["id"] for r in ROWS]
    assert found.dropped == found.truncated == []
    for own, tokenizer in zip((found.teacher, found.student), speaks, strict=True):
        alone = encode(
            read_rows(ROWS), tokenizer, max_length=500, prompt_format=form, stage="train"
        )
        for one, other in zip(own, alone.samples, strict=True):
            assert one.input_ids.equal(other.input_ids) and one.labels.equal(other.labels)
    for n, answer in enumerate(ANSWERS):
        answer = answer.strip()
        theirs, ours = (
            read_by(samples[n], tokenizer, answer)
            for samples, tokenizer in zip((found.teacher, found.student), speaks, strict=True)
        )
        both = sorted(theirs.keys() & ours.keys())
        assert found.positions[n][0].tolist() == [theirs[read] for read in both], answer
        assert found.positions[n][1].tolist() == [ours[read] for read in both], answer
        assert both[-1] == len(answer)  # the end pairs with the end
        assert found.positions[n][0].dtype == torch.int64


def test_a_row_by_hand():
    tokenizers = byte_level(chat=True), metaspace()
    found = pairs([{"prompt": "Hm?", "completion": "brief é 😀"}], *tokenizers)
    theirs, ours = texts(found, 0, tokenizers)
    # "brief" is one token; "é" is two in one of them, and the emoji four in both
    read = ["", "brief", "brief ", "brief é", "brief é ", "brief é 😀"]
    assert theirs == [f"<user>Hm?</user>\n<assistant>{part}" for part in read]
    assert ours == [f"<|user|>\nHm?\n\n<|assistant|>\n{part}" for part in read]
    # what the answers' ends predict is what each rendering closes them with
    for samples, positions, token in (
        (found.teacher, found.positions[0][0], tokenizers[0].convert_tokens_to_ids("<")),
        (found.student, found.positions[0][1], tokenizers[1].convert_tokens_to_ids("\n")),
    ):
        assert samples[0].labels[positions[-1] + 1] == token
    example = found.example
    assert (example["teacher"]["format"], example["student"]["format"]) == ("chat", "published")
    assert example["student"]["target"] == "brief é 😀\n\n</s>"
    assert example["positions"] == [each.tolist() for each in found.positions[0]]
    assert example["id"] == "row:1" == found.student[0].id


def test_a_token_that_reaches_beyond_the_answer_has_not_read_its_end_alone():
    eager = byte_level()
    eager.add_tokens([" nine.\n"])
    found = pairs([{"prompt": "Hm?", "completion": "eight, nine."}], eager, byte_level())
    theirs, ours = texts(found, 0, (eager, byte_level()))
    assert theirs == ours and theirs[-1].endswith("eight,")


def test_rows_without_any_pair_are_dropped():
    eager = byte_level()
    eager.add_tokens(["\nx\n"])  # the answer comes with what is around it
    rows = [{"id": id_, "prompt": "Hm?", "completion": id_} for id_ in ("x", "y")]
    found = pairs(rows, byte_level(), eager)
    reason = "there is no part of its answer after which both models predict a token"
    assert found.dropped == [("x", reason)] and [s.id for s in found.teacher] == ["y"]


def test_truncated_rows_are_paired_as_far_as_both_go():
    long = {"id": "long", "prompt": "Hm?", "completion": "The answer is brief. " * 12}
    speaks = model_zoo.tokenizer(), byte_level()  # a token a byte, and fewer
    found = pairs([long, {"id": "short", "prompt": "a", "completion": "b"}], *speaks, max_length=60)
    assert [s.id for s in found.teacher] == ["long", "short"] and found.truncated == ["long"]
    assert len(found.teacher[0].input_ids) == len(found.student[0].input_ids) == 60
    theirs, ours = texts(found, 0, speaks)
    assert [f"<s>{text}" for text in ours] == theirs
    # the last token that the teacher is given is only predicted
    assert theirs[-1].endswith("The answer is brief. The") and len(theirs) == 8


def test_rows_that_cannot_be_paired_are_dropped_by_name():
    rows = [
        {"id": "good", "prompt": "Hm?", "completion": "brief"},
        {"id": "theirs", "prompt": "The answer is brief. " * 3, "completion": "x"},
        {"id": "good", "prompt": "Hm?", "completion": "seven"},
    ]
    found = pairs(rows, model_zoo.tokenizer(), byte_level(), max_length=60)
    assert [s.id for s in found.student] == ["good", "good (2)"]
    assert found.dropped == [("theirs", "teacher: the prompt alone fills the 60 tokens")]
    assert found.left_out().startswith("1 of 3 rows left out (theirs: teacher: the prompt")
    with pytest.raises(InputError, match="^teacher: none of the 1 rows keeps a token"):
        pairs(rows[1:2], model_zoo.tokenizer(), byte_level(), max_length=60)


def test_templates_that_change_an_answer():
    tokenizer = model_zoo.tokenizer(chat=True)
    tokenizer.chat_template = CUTS = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'].split('.')[-1] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    rows = [
        {"id": "cut", "prompt": "Hm?", "completion": "one. two"},
        {"id": "whole", "prompt": "Hm?", "completion": "two"},
    ]
    found = pairs(rows, byte_level(), tokenizer)
    assert found.dropped == [("cut", "student: the chat template rewrites its answer")]
    with pytest.raises(InputError, match="none of the 1 rows can be paired .cut: student: the"):
        pairs(rows[:1], byte_level(), tokenizer)
    tokenizer.chat_template = CUTS.replace("split('.')[-1]", "upper() | length")
    with pytest.raises(InputError, match="student: row:1: .*does not write answers as"):
        pairs(rows, byte_level(), tokenizer)


def test_a_template_that_opens_an_answer_with_more_than_it_announces():
    tokenizer = model_zoo.tokenizer(chat=True)
    tokenizer.chat_template = model_zoo.CHAT_TEMPLATE.replace(
        "<{{ m['role'] }}>{{", "<{{ m['role'] }}>{{ '<think></think>' if loop.last }}{{"
    )
    speaks = tokenizer, byte_level()
    found = pairs([{"prompt": "Hm?", "completion": " brief"}], *speaks)
    theirs, ours = texts(found, 0, speaks)
    assert [text.partition("<think></think>")[2] for text in theirs] == [" ", " brief"]
    assert [text.partition("<|assistant|>\n")[2] for text in ours] == ["", "brief"]


def test_shared_ids_are_read_once():
    teacher, student = byte_level(chat=True), byte_level()
    found = pairs(ROWS, teacher, student, True)
    alone = encode(read_rows(ROWS), student, max_length=500, stage="train")
    assert found.example["teacher"]["format"] == "published"  # the student's reading
    for n, sample in enumerate(alone.samples):
        for own in (found.teacher[n], found.student[n]):
            assert own.id == sample.id
            assert own.input_ids.equal(sample.input_ids) and own.labels.equal(sample.labels)
        labels = sample.labels.tolist()
        targets = [p for p in range(len(labels) - 1) if labels[p + 1] != IGNORED]
        assert [each.tolist() for each in found.positions[n]] == [targets, targets]


def test_a_token_that_the_teacher_does_not_have_drops_its_row():
    student = byte_level()
    student.add_tokens(["<new>"])
    rows = [{"id": "new", "prompt": "<new>?", "completion": "x"}, *ROWS]
    found = pairs(rows, byte_level(), student, True)
    token = student.convert_tokens_to_ids("<new>")
    assert found.dropped == [("new", f"token {token} is not in the teacher's vocabulary")]
    assert len(found.student) == len(ROWS)


@pytest.mark.parametrize("shared", [False, True])
def test_inputs_are_paired_where_the_text_is_the_same(shared):
    speaks = (byte_level(), byte_level() if shared else metaspace())
    found = pairs(ROWS[:3], *speaks, shared, train_on_inputs=True)
    for n, row in enumerate(ROWS[:3]):
        for samples in (found.teacher, found.student):
            assert samples[n].labels.equal(samples[n].input_ids)
        theirs, ours = texts(found, n, speaks)
        assert theirs == ours and theirs[0] in ("<", "<|")
        assert theirs[-1] == f"<|user|>\nRow {n}?\n\n<|assistant|>\n{row['completion'].strip()}\n\n"
    if shared:
        assert found.positions[0][0].tolist() == list(range(len(found.teacher[0].input_ids) - 1))


def test_inputs_of_different_texts_are_refused():
    speaks = byte_level(chat=True), metaspace()
    says = r"row:1: teacher \(chat\) and student \(published\) .*--prompt-format published"
    with pytest.raises(InputError, match=says):
        pairs(ROWS, *speaks, train_on_inputs=True)
    assert pairs(ROWS, *speaks, prompt_format="published", train_on_inputs=True).dropped == []


def test_a_tokenizer_that_tells_no_characters_is_refused():
    class Slow(hf.PreTrainedTokenizerFast):
        is_fast = False

    slow = byte_level()
    slow.__class__ = Slow
    with pytest.raises(InputError, match=r"student: Slow does not .*with a tokenizer.json"):
        pairs(ROWS, metaspace(), slow)
    assert pairs(ROWS, byte_level(), slow, True).dropped == []
