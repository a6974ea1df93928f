# SPDX-License-Identifier: Apache-2.0
"""Tokens of different tokenizers paired by the bytes they stand for."""

import model_zoo as zoo
import pytest
import transformers as hf
from semantics import byte_level, sentencepiece, wrapped
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pkt_ext.methods.vocabulary import shared_vocabulary


def paired(teacher, student, rows=1000) -> dict[str, str]:
    """{teacher's token: student's}, each id checked to occur once."""
    shared = shared_vocabulary(teacher, student, rows, rows)
    assert not shared.identical and len(shared) == len(shared.student)
    ids = shared.teacher.tolist(), shared.student.tolist()
    assert all(len(set(each)) == len(each) for each in ids)
    assert ids[1] == sorted(ids[1])
    theirs, ours = teacher.convert_ids_to_tokens(ids[0]), student.convert_ids_to_tokens(ids[1])
    return dict(zip(theirs, ours, strict=True))


def test_bytes_and_spaces_are_compared_however_they_are_written():
    teacher = byte_level("Ġthe", "Ã©", "ĠÐ¼", "ĊĊ", "the", "only")
    student = sentencepiece("▁the", "é", "▁м", "\n\n", "the", "▁", "A", "mine")
    pairs = paired(teacher, student)
    assert pairs["Ġthe"] == "▁the" and pairs["the"] == "the"
    assert pairs["Ã©"] == "é" and pairs["ĠÐ¼"] == "▁м" and pairs["ĊĊ"] == "\n\n"
    assert pairs["Ġ"] == "▁"
    assert pairs["Ċ"] == "<0x0A>" and pairs["â"] == "<0xE2>" and pairs["Ģ"] == "<0x80>"
    assert pairs["A"] == "A"  # <0x41> stands for the same, but is never used beside it
    assert pairs["B"] == "<0x42>"
    assert pairs["<|endoftext|>"] == "</s>"
    assert "only" not in pairs and "mine" not in pairs.values()
    assert len(pairs) == 256 + 5 + 1
    assert {v: k for k, v in pairs.items()} == paired(student, teacher)


def test_the_first_of_several_ids_for_the_same_bytes_is_paired():
    inner = Tokenizer(models.BPE(vocab={"▁a": 0, " a": 1, "b": 2, "c": 3}, merges=[]))
    inner.decoder = decoders.Metaspace()
    twice = wrapped(inner)  # both decode to " a"
    pairs = paired(twice, byte_level("Ġa"))
    assert pairs == {"▁a": "Ġa", "b": "b", "c": "c"}


def test_special_tokens_by_string_then_by_role():
    teacher = byte_level(
        "<s>", special=("<|endoftext|>", "<|im_end|>", "<tool>"), eos_token="<|im_end|>"
    )
    same = sentencepiece(special=("<|im_end|>", "<|endoftext|>", "<tool>"), eos_token="<tool>")
    pairs = paired(teacher, same)
    for token in ("<|im_end|>", "<|endoftext|>", "<tool>"):
        assert pairs[token] == token  # whatever their roles
    other = sentencepiece("<tool>", special=("<unk>", "<s>", "</s>"), pad_token="</s>",
                          eos_token="</s>", bos_token="<s>")  # fmt: skip
    pairs = paired(teacher, other)
    assert pairs["<|im_end|>"] == "</s>" and pairs["<tool>"] == "<tool>"
    assert pairs["<s>"] == "<s>" and "<|endoftext|>" not in pairs
    # a special token is never taken for the text that another tokenizer spells like a byte
    assert "<unk>" not in pairs.values()


def test_added_tokens_are_written_as_they_are():
    teacher = byte_level("Ġx", added=("    ", "naïve"))
    pairs = paired(teacher, sentencepiece("▁▁▁▁", "naïve", "▁x"))
    assert pairs["    "] == "▁▁▁▁" and pairs["naïve"] == "naïve" and pairs["Ġx"] == "▁x"


def as_published(name: str):
    """A tokenizer of this family by transformers' own class, of few tokens."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = {
        "Qwen2": [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġthe", "Ã©"],
        "GPTNeoX": ["Ã©", "Ġthe", *sorted(pre_tokenizers.ByteLevel.alphabet())],
        "Llama": ["<unk>", "<s>", "</s>", *bytes_, "▁the", "é", "▁", "A"],
        "Gemma": ["<pad>", "<eos>", "<bos>", "<unk>", *bytes_, "▁", "é", "▁▁", "▁the", "A"],
    }[name]
    return getattr(hf, f"{name}Tokenizer")(vocab={t: i for i, t in enumerate(tokens)}, merges=[])


@pytest.mark.parametrize(
    "names, count",
    [
        (("Qwen2", "Llama"), 256 + 2 + 1),  # the ends; nothing begins or fills up a text of Qwen
        (("Gemma", "GPTNeoX"), 256 + 2 + 2),  # and <pad>
        (("Llama", "Gemma"), 256 + 2 + 3),
        (("Qwen2", "GPTNeoX"), 256 + 2 + 1),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_families_as_transformers_has_them(names, count):
    teacher, student = (as_published(name) for name in names)
    pairs = paired(teacher, student)
    texts = {"Ġthe": "▁the", "Ã©": "é", "A": "A", "Ġ": "▁"}
    level = [name in ("Qwen2", "GPTNeoX") for name in names]
    for byte_form, space_form in texts.items():
        theirs, ours = (byte_form if one else space_form for one in level)
        assert pairs[theirs] == ours
    newline = ["Ċ" if one else "<0x0A>" for one in level]
    assert pairs[newline[0]] == newline[1]
    assert pairs[teacher.eos_token] == student.eos_token
    assert len(pairs) == count


@pytest.mark.parametrize("make", [zoo.tokenizer, sentencepiece, byte_level])
def test_equal_tokenizers_share_every_id_that_has_a_row(make):
    count = len(make().get_vocab())
    shared = shared_vocabulary(make(), make(), count + 5, count + 90)
    assert shared.identical and shared.teacher.tolist() == list(range(count))
    assert shared.student.tolist() == list(range(count))
    fewer = shared_vocabulary(make(), make(), count - 7, count)
    assert fewer.identical and len(fewer) == count - 7


def test_a_vocabulary_that_goes_on_where_the_other_ends():
    plain, longer = zoo.tokenizer(), zoo.tokenizer()
    longer.add_special_tokens({"additional_special_tokens": ["[PAD]"]})
    for pair in ((longer, plain), (plain, longer)):
        shared = shared_vocabulary(*pair, 264, 264)
        assert shared.identical and shared.teacher.tolist() == list(range(259))
        assert shared.student.tolist() == shared.teacher.tolist()


def test_other_ids_for_the_same_tokens():
    one, other = byte_level("Ġa", "b c"), byte_level("b c", "Ġa")
    shared = shared_vocabulary(one, other, 1000, 1000)
    assert not shared.identical and len(shared) == 259
    moved = dict(zip(shared.teacher.tolist(), shared.student.tolist(), strict=True))
    assert moved[256] == 257 and moved[257] == 256 and moved[258] == 258 and moved[7] == 7
    cut = shared_vocabulary(one, other, 257, 1000)  # the teacher's head ends after "Ġa"
    assert cut.teacher.max() == 256 and len(cut) == 257
