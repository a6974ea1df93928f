# SPDX-License-Identifier: Apache-2.0
"""One conversation as the text that a model reads, and which characters its tokens stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from pkt_ext.errors import InputError

_MARK = "\ue000"  # for private use: stands for an answer while a template is rendered


@dataclass(frozen=True)
class Row:
    """One conversation that ends in an assistant turn."""

    id: str
    messages: tuple[dict[str, str], ...]  # {"role", "content"}, roles system, user, assistant
    where: str  # "file:line", for messages to the user


@dataclass(frozen=True)
class Rendered:
    """One row as text."""

    text: str
    prompt: str  # what the answer is asked by; in `chat` the text may go on differently
    form: str  # "published", "chat" or "plain"

    def ids(self, tokenizer) -> tuple[list[int], int]:
        """Token ids of the text with EOS, and how many of them the loss mask covers."""
        special = self.form != "chat"
        whole, prompt = (token_ids(tokenizer, text, special) for text in (self.text, self.prompt))
        if special:
            return [*whole, tokenizer.eos_token_id], len(prompt)
        # a template may open the answer differently than its generation prompt announces
        shared = 0
        while shared < min(len(whole), len(prompt)) and whole[shared] == prompt[shared]:
            shared += 1
        return whole, shared

    def ends(self, tokenizer) -> list[int]:
        """How many characters of the text are read with each token of `ids`, but for the EOS.

        Tokens that share a character all count as having read it.

        Raises:
            InputError: a tokenizer that does not tell.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"{type(tokenizer).__name__} does not tell which characters its tokens stand for; "
                "give a folder with a tokenizer.json"
            )
        found = tokenizer(
            self.text,
            add_special_tokens=self.form != "chat",
            return_offsets_mapping=True,
            verbose=False,
        )
        # a token that stands for no text, as BOS does, is said to end at 0
        return list(accumulate((end for _, end in found["offset_mapping"]), max))


def render(row: Row, tokenizer, form: str, stage: str) -> Rendered:
    """The row as text in a format of `data.resolve_format`; see `data.encode`.

    Raises:
        InputError: a template that refuses the row.
    """
    if form == "chat":
        text = _templated(row, tokenizer, row.messages, False)
        return Rendered(text, _templated(row, tokenizer, row.messages[:-1], True), form)
    answer = row.messages[-1]["content"]
    if form == "plain":
        prompt = "".join(m["content"] for m in row.messages[:-1])
        return Rendered(prompt + answer, prompt, form)
    prompt = published_prompt(
        row.messages[:-1], tokenizer.eos_token if stage == "extract" else "\n\n"
    )
    closing = "" if stage == "extract" else "\n\n"
    return Rendered(prompt + answer.strip() + closing, prompt, form)


def answer_start(row: Row, rendered: Rendered, tokenizer) -> int | None:
    """Where in the text the answer starts, blanks around it left out.

    Returns:
        None where a chat template has changed the answer's words.
    Raises:
        InputError: a chat template that does not write answers at all.
    """
    before = rendered.prompt
    if rendered.form == "chat":
        before = _before_answer(row, tokenizer)
    text, answer = rendered.text, row.messages[-1]["content"].strip()
    rest = text[len(before) :].lstrip()
    if not (text.startswith(before) and rest.startswith(answer)):
        return None
    return len(text) - len(rest)


def up_to(answer: str, row: Row, tokenizer, form: str) -> str:
    """The row's text up to the end of `answer`, which takes the last message's place."""
    if form == "published":
        return published_prompt(row.messages[:-1], "\n\n") + answer
    if form == "plain":
        return "".join(m["content"] for m in row.messages[:-1]) + answer
    return _before_answer(row, tokenizer) + answer


def published_turns(messages: Sequence[Mapping[str, str]], closing: str) -> str:
    """Turns as the released scripts write them; an assistant's ends in `closing`."""
    return "".join(
        f"<|{m['role']}|>\n{m['content'].strip()}"
        + (closing if m["role"] == "assistant" else "\n\n")
        for m in messages
    )


def published_prompt(earlier: Sequence[Mapping[str, str]], closing: str) -> str:
    """What asks for an answer to these turns."""
    return published_turns(earlier, closing) + "<|assistant|>\n"


def token_ids(tokenizer, text: str, special: bool = True) -> list[int]:
    """Token ids of a text, with the tokenizer's own BOS where `special`, and never its EOS."""
    # verbose=False: rows longer than the model's context are cut by max_length, no warning needed
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    if special and ids and ids[-1] == tokenizer.eos_token_id and len(ids) > 1:
        ids = ids[:-1]  # a tokenizer that appends EOS by itself: counted once, by the caller
    return list(ids)


def _before_answer(row: Row, tokenizer) -> str:
    """What a chat template writes before the answer; its generation prompt may differ."""
    marked = [*row.messages[:-1], {"role": "assistant", "content": _MARK}]
    before, mark, _ = _templated(row, tokenizer, marked, False).rpartition(_MARK)
    if not mark:
        raise InputError(
            f"{row.where}: the tokenizer's chat template does not write answers as they are; "
            "use --prompt-format published"
        )
    return before


def _templated(row: Row, tokenizer, messages, generation: bool) -> str:
    from jinja2 import TemplateError

    if not messages:  # an answer to nothing: templates refuse an empty conversation
        return ""
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{row.where}: the tokenizer's chat template refuses the row ({error}); "
            "change the row or use --prompt-format published"
        ) from error
