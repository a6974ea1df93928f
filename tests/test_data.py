# SPDX-License-Identifier: Apache-2.0
"""Rows, renderings and loss masks."""

import json

import model_zoo
import pytest

from pkt_ext.data import IGNORED, MAX_LINE_BYTES, Row, encode, encode_targets, read_rows
from pkt_ext.errors import InputError

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Two and two? "},
    {"role": "assistant", "content": "Four.\n"},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": " Seven. "},
]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ids(text, bos=True):
    """The zoo's tokenizer by hand: bytes after three specials, in the byte-level alphabet."""
    return model_zoo.tokenizer(bos=bos)(text)["input_ids"]


def test_reads_both_spellings_and_skips_blank_lines(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"id": 7, "messages": TURNS})
    with path.open("a", encoding="utf-8") as file:
        file.write('\n  \n{"prompt": "1+1=", "completion": "2"}\n')
    first, second = read_rows(path)
    assert first.id == "7" and [m["role"] for m in first.messages][-1] == "assistant"
    assert second.id == "rows.jsonl:4" and second.where == f"{path}:4"
    assert second.messages == (
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
    )


def test_reads_a_byte_order_mark_and_conversational_prompts(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": TURNS[:4], "completion": [TURNS[4]]}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode())
    assert list(read_rows(path)[0].messages) == TURNS


def test_takes_rows_from_python():
    (row,) = read_rows([{"messages": TURNS}])
    assert row.id == "row:1" and read_rows([row]) == [row]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no rows"),
        (b"\n\n", "no rows"),
        (b"{", ":1: not JSON"),
        (b"[1, 2]", ":1: the row is a list"),
        (b'{"text": "x"}', ":1: no 'messages' .*keys: text"),
        (b'{"messages": []}', "not a list with at least one message"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "last message is not the assistant"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', "role 'robot'"),
        (b'{"messages": [{"role": "assistant", "content": null}]}', "message 0 has no text"),
        (b'{"messages": [{"role": "assistant"}]}', "message 0 has no text"),
        (b'{"prompt": "x"}', "no 'messages' and no 'prompt' with 'completion'"),
        (b'{"prompt": 3, "completion": "x"}', "message 0 has no text"),
        (b'{"prompt": "\\ud800", "completion": "x"}', "surrogate"),
        (b'{"prompt": "ok", "completion": "x"}\n{"prompt": "\xff"}', ":2: not UTF-8"),
        (b"[" * 100_000, ":1: not JSON"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", ":1: not JSON"),
    ],
)
def test_a_bad_row_is_named_in_one_line(tmp_path, content, says):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        read_rows(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_say_what_to_give(tmp_path):
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(InputError, match="give a JSON-lines file"):
            read_rows(path)


def test_an_endless_line_is_refused_before_it_is_parsed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b" " * (MAX_LINE_BYTES + 1))
    with pytest.raises(InputError, match="longer than 16 MiB"):
        read_rows(path)


PUBLISHED = {
    "extract": (
        "<|system|>\nBe brief.\n\n<|user|>\nTwo and two?\n\n<|assistant|>\nFour.</s>"
        "<|user|>\nAnd three?\n\n<|assistant|>\n",
        "Seven.",
    ),
    "train": (
        "<|system|>\nBe brief.\n\n<|user|>\nTwo and two?\n\n<|assistant|>\nFour.\n\n"
        "<|user|>\nAnd three?\n\n<|assistant|>\n",
        "Seven.\n\n",
    ),
}


@pytest.mark.parametrize("stage", ["extract", "train"])
@pytest.mark.parametrize("bos", [True, False])
def test_published_rendering(stage, bos):
    tokenizer = model_zoo.tokenizer(bos=bos)
    encoded = encode(read_rows([{"messages": TURNS}]), tokenizer, max_length=500, stage=stage)
    prompt, answer = PUBLISHED[stage]
    want = ids(prompt + answer, bos) + [tokenizer.eos_token_id]
    (sample,) = encoded.samples
    assert sample.input_ids.tolist() == want
    masked = len(ids(prompt, bos))
    assert sample.labels.tolist() == [IGNORED] * masked + want[masked:]
    assert encoded.example["format"] == "published"
    assert encoded.example["prompt"].removeprefix("<s>") == prompt
    assert encoded.example["target"] == answer + "</s>"
    assert sum(encoded.example["loss_mask"]) == len(want) - masked
    assert (encoded.dropped, encoded.truncated) == ([], [])


def test_a_tokenizer_that_appends_eos_is_counted_once():
    from tokenizers import processors

    tokenizer = model_zoo.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    rows = read_rows([{"prompt": "ab", "completion": "cd"}])
    plain, eager = (
        encode(rows, t, max_length=99).samples[0] for t in (model_zoo.tokenizer(), tokenizer)
    )
    assert plain.input_ids.tolist() == eager.input_ids.tolist()
    assert plain.labels.tolist() == eager.labels.tolist()


def test_chat_template_is_taken_where_there_is_one():
    tokenizer = model_zoo.tokenizer(chat=True)
    rows = read_rows([{"messages": TURNS[:3]}])
    encoded = encode(rows, tokenizer, max_length=500)
    assert encoded.example["format"] == "chat"
    assert encoded.example["prompt"].endswith("</user>\n<assistant>")
    assert encoded.example["target"] == "Four.\n</assistant>\n"
    forced = encode(rows, tokenizer, max_length=500, prompt_format="published")
    assert forced.example["format"] == "published"


def test_chat_masks_up_to_where_prompt_and_conversation_part():
    tokenizer = model_zoo.tokenizer(chat=True)
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    encoded = encode(read_rows([{"messages": TURNS[:3]}]), tokenizer, max_length=500)
    assert encoded.example["target"] == "Four.\n</assistant>\n"


def test_plain_joins_the_texts():
    rows = read_rows([{"prompt": "1 + 1 = ", "completion": "2"}])
    encoded = encode(rows, model_zoo.tokenizer(), max_length=50, prompt_format="plain")
    assert encoded.example["prompt"] == "<s>1 + 1 = " and encoded.example["target"] == "2</s>"


def test_formats_that_cannot_be_had_are_refused():
    rows = read_rows([{"prompt": "a", "completion": "b"}])
    with pytest.raises(InputError, match="no chat template; use published"):
        encode(rows, model_zoo.tokenizer(), max_length=50, prompt_format="chat")
    with pytest.raises(InputError, match="choose one of auto, published, chat, plain"):
        encode(rows, model_zoo.tokenizer(), max_length=50, prompt_format="alpaca")
    tokenizer = model_zoo.tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="row:1: .*roles must alternate.*published"):
        encode(rows, tokenizer, max_length=50)


def test_rows_without_a_kept_target_are_dropped_by_name():
    rows = read_rows(
        [
            {"id": "long", "prompt": "x" * 60, "completion": "y"},
            {"id": "cut", "prompt": "x", "completion": "y" * 60},
            {"id": "fits", "prompt": "x", "completion": "y"},
        ]
    )
    encoded = encode(rows, model_zoo.tokenizer(), max_length=40)
    assert [s.id for s in encoded.samples] == ["cut", "fits"]
    assert encoded.dropped == [("long", "the prompt alone fills the 40 tokens")]
    assert encoded.truncated == ["cut"] and len(encoded.samples[0].input_ids) == 40
    with pytest.raises(InputError, match=r"none of the 3 rows .*\(long: .*raise --max-length"):
        encode(rows, model_zoo.tokenizer(), max_length=10)


def test_training_appends_eos_only_where_it_fits():
    rows = [Row("r", ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), "")]
    tokenizer = model_zoo.tokenizer()
    full = encode(rows, tokenizer, max_length=99, stage="train").samples[0].input_ids.tolist()
    assert full[-1] == tokenizer.eos_token_id
    cut = encode(rows, tokenizer, max_length=len(full) - 1, stage="train").samples[0].input_ids
    assert cut.tolist() == full[:-1]


def targets(rows, tokenizer=None, **options):
    tokenizer = tokenizer or model_zoo.tokenizer()
    return encode_targets(read_rows(rows), tokenizer, **{"max_length": 200} | options)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (
            "published",
            "<|system|>\nBe brief.\n\n<|user|>\nTwo and two?\n\n<|assistant|>\nFour.\n\n"
            "<|user|>\nAnd three?\n\n<|assistant|>\nSeven",
        ),
        ("plain", "Be brief. Two and two? Four.\nAnd three? Seven"),
    ],
)
def test_the_target_is_the_last_token_of_the_stripped_answer(form, text):
    found = targets([{"messages": TURNS}], prompt_format=form)
    (sample,) = found.samples
    assert sample.input_ids.tolist() == ids(text)
    assert sample.labels.tolist() == [IGNORED] * (len(ids(text)) - 1) + ids(text)[-1:]
    assert found.example["target"] == "n" and found.example["loss_mask"][-2:] == [0, 1]
    assert found.truncated == found.dropped == []


def test_a_chat_template_ends_where_the_answer_does():
    tokenizer = model_zoo.tokenizer(chat=True)
    text = "".join(f"<{m['role']}>{m['content']}</{m['role']}>\n" for m in TURNS[:4])
    (sample,) = targets([{"messages": TURNS}], tokenizer).samples
    assert sample.input_ids.tolist() == ids(text + "<assistant> Seven", bos=False)
    # an answer whose letters also stand in the template's own words
    (sample,) = targets([{"prompt": "x", "completion": "ass."}], tokenizer).samples
    assert sample.input_ids.tolist() == ids("<user>x</user>\n<assistant>ass", bos=False)


def test_a_template_that_rewrites_answers_is_refused():
    tokenizer = model_zoo.tokenizer(chat=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | length }}{% endfor %}"
    with pytest.raises(InputError, match="row:1: .*does not write answers as they are"):
        targets([{"messages": TURNS}], tokenizer)


@pytest.mark.parametrize(
    ("answer", "kept"),
    [('The answer is: "B".', "B"), ("#### 72 \n", "2"), ("f(x)]) , .", "x"), ("1.5", "5")],
)
def test_what_closes_an_answer_is_stripped(answer, kept):
    (sample,) = targets([{"prompt": "x", "completion": answer}]).samples
    assert sample.labels[-1] == ids(kept)[-1]


def test_rows_without_a_target_are_dropped_by_name():
    rows = [
        {"id": "empty", "prompt": "x", "completion": ""},
        {"id": "closing", "prompt": "x", "completion": ' .")]\n'},
        {"id": "long", "prompt": "x" * 200, "completion": "B"},
        {"id": "good", "prompt": "x", "completion": "B"},
    ]
    found = targets(rows)
    assert [s.id for s in found.samples] == ["good"]
    assert dict(found.dropped) == {
        "empty": "the answer is empty",
        "closing": "the answer is empty",
        "long": "227 tokens up to its target, --max-length 200",
    }
    with pytest.raises(InputError, match=r"none of the 2 rows has a target \(empty: the answer is"):
        targets(rows[:2])
    alone = targets(
        [{"prompt": "", "completion": "BC"}], model_zoo.tokenizer(bos=False), prompt_format="plain"
    )
    assert len(alone.samples[0].input_ids) == 2
    with pytest.raises(InputError, match="nothing stands before the target"):
        targets(
            [{"prompt": "", "completion": "B"}],
            model_zoo.tokenizer(bos=False),
            prompt_format="plain",
        )


def test_a_tokenizer_that_appends_eos_gives_the_same_target():
    from tokenizers import processors

    tokenizer = model_zoo.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    (sample,) = targets([{"messages": TURNS}], tokenizer).samples
    (plain,) = targets([{"messages": TURNS}]).samples
    assert sample.input_ids.equal(plain.input_ids)
