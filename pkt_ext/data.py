# SPDX-License-Identifier: Apache-2.0
"""Chat rows -> token ids with a loss mask.

Rows are JSON lines, `{"messages": [{"role", "content"}, ...]}` or `{"prompt", "completion"}`; the
last assistant turn (the completion) is what the loss sees. Source of the published rendering:
Zhong et al., ICLR 2024 (arXiv 2310.11451), its released scripts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pkt_ext.errors import InputError
from pkt_ext.rendering import Row, render, token_ids, up_to
from pkt_ext.streaming.batches import IGNORED, Sample

PROMPT_FORMATS = ("auto", "published", "chat", "plain")
MAX_LINE_BYTES = 16 * 2**20  # a line beyond this is not a chat row; refuse before parsing it
_ROLES = ("system", "user", "assistant")
_CLOSING = '. ")\n,]'  # behind an answer's last word, as published
_EXPECTED = 'expected {"messages": [{"role", "content"}, ...]} or {"prompt", "completion"}'


@dataclass(frozen=True)
class Encoded:
    """What became of a file of rows."""

    samples: list[Sample]
    dropped: list[tuple[str, str]]  # (row id, reason)
    truncated: list[str]  # ids of the samples that lost tokens at the end and were kept
    example: dict  # the first kept row: id, format, prompt, target (text), input_ids, loss_mask

    def left_out(self) -> str:
        """What was dropped, in one line however many rows that are."""
        return left_out(self.dropped, len(self.samples))


def read_rows(source: str | os.PathLike | Iterable[Mapping | Row]) -> list[Row]:
    """Read and check every row.

    Args:
        source: a JSON-lines file, or the rows themselves as mappings.
    Raises:
        InputError: no such file, no rows, or a bad row (named by file and line).
    """
    if not isinstance(source, (str, os.PathLike)):
        rows = [r if isinstance(r, Row) else _row(r, "row", i) for i, r in enumerate(source, 1)]
        if not rows:
            raise InputError("the data has no rows; give at least one")
        return rows
    if not str(source):  # Path("") would be the working directory
        raise InputError("the name of a data file is empty; give a JSON-lines file")
    path = Path(source)
    rows = []
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise InputError(
                        f"{path}:{number}: the line is longer than {MAX_LINE_BYTES >> 20} MiB; "
                        "give one JSON row a line"
                    )
                if row := _parse(line, path, number):
                    rows.append(row)
    except OSError as error:
        raise InputError(
            f"cannot read the data file {path}: {error.strerror}; give a JSON-lines file"
        ) from error
    if not rows:
        raise InputError(f"{path} has no rows; {_EXPECTED}, one a line")
    return rows


def _parse(line: bytes, path: Path, number: int) -> Row | None:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}:{number}: not UTF-8 (byte {error.start} of the line); save the file as UTF-8"
        ) from error
    if not text.strip():
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "a value beyond limits"
        raise InputError(f"{path}:{number}: not JSON ({reason}); {_EXPECTED}") from error
    return _row(value, str(path), number)


def _row(value, source: str, number: int) -> Row:
    where = f"{source}:{number}"

    def bad(what: str) -> InputError:
        return InputError(f"{where}: {what}; {_EXPECTED}")

    if not isinstance(value, Mapping):
        raise bad(f"the row is a {type(value).__name__}, not an object")
    if "messages" in value:
        messages = value["messages"]
    elif "prompt" in value and "completion" in value:
        messages = _turns(value["prompt"], "user") + _turns(value["completion"], "assistant")
    else:
        keys = ", ".join(map(str, value)) or "none"
        raise bad(f"no 'messages' and no 'prompt' with 'completion' (keys: {keys[:200]})")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise bad("'messages' is not a list with at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise bad(f"message {i} has no text in 'content'")
        if message.get("role") not in _ROLES:
            role = str(message.get("role"))[:40]
            raise bad(f"message {i} has role {role!r}, not one of {', '.join(_ROLES)}")
        if not _encodable(message["content"]):
            raise bad(f"message {i} has half a surrogate pair in 'content'")
    if messages[-1]["role"] != "assistant":
        raise bad("the last message is not the assistant's, so there is nothing to score")
    identity = value.get("id")
    identity = (
        str(identity) if isinstance(identity, (str, int)) else f"{Path(source).name}:{number}"
    )
    return Row(
        str(identity), tuple({"role": m["role"], "content": m["content"]} for m in messages), where
    )


def _encodable(text: str) -> bool:
    """JSON can spell lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _turns(value, role: str) -> list:
    """A plain string is one turn; a list is already a conversation (TRL's other spelling)."""
    return list(value) if isinstance(value, (list, tuple)) else [{"role": role, "content": value}]


def encode(
    rows: list[Row],
    tokenizer,
    *,
    max_length: int,
    prompt_format: str = "auto",
    stage: str = "extract",
) -> Encoded:
    """Render, tokenise and mask the rows.

    `published` writes each turn as a role line, the stripped text and a blank line. For `extract`
    an assistant turn is followed by EOS instead of the blank line; for `train` the blank line stays
    and EOS follows if there is room. The mask covers as many tokens as the prompt alone has.
    `chat` is the tokenizer's own template, masked up to where prompt and whole conversation part.
    `plain` joins the texts as they are, then EOS. `auto` is `chat` where the tokenizer has a
    template, else `published`. BOS is the tokenizer's business in all but `chat`.

    Args:
        rows: from `read_rows`.
        tokenizer: a transformers tokenizer.
        max_length: tokens kept of a row, counted from its start.
        prompt_format: one of `PROMPT_FORMATS`.
        stage: "extract" or "train".
    Raises:
        InputError: an unknown format, no template for `chat`, a template that refuses a row, or
            no row that keeps a token to predict.
    """
    if stage not in ("extract", "train"):
        raise ValueError(f"stage must be 'extract' or 'train', got {stage!r}")
    if max_length < 2:
        raise InputError(f"--max-length is {max_length}; give at least 2 tokens")
    form = resolve_format(prompt_format, tokenizer)
    if form != "chat" and tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token; set eos_token in its tokenizer_config")
    samples, dropped, truncated, example = [], [], [], None
    for row in rows:
        ids, prompt = render(row, tokenizer, form, stage).ids(tokenizer)
        kept = ids[:max_length]
        masked = min(prompt, len(kept))
        labels = [IGNORED] * masked + kept[masked:]
        # position 0 is never predicted: nothing stands before it
        if all(label == IGNORED for label in labels[1:]):
            reason = (
                f"the prompt alone fills the {max_length} tokens"
                if len(ids) > max_length
                else "the answer is empty"
            )
            dropped.append((row.id, reason))
            continue
        if len(ids) > max_length:
            truncated.append(row.id)
        samples.append(Sample(row.id, torch.tensor(kept), torch.tensor(labels)))
        example = example or describe_sample(samples[-1], tokenizer, form)
    if not samples:
        name, reason = dropped[0]
        raise InputError(
            f"none of the {len(rows)} rows keeps a token to predict ({name}: {reason}); "
            "raise --max-length or shorten the prompts"
        )
    return Encoded(samples, dropped, truncated, example)


def encode_targets(
    rows: list[Row], tokenizer, *, max_length: int, prompt_format: str = "auto"
) -> Encoded:
    """Render and tokenise the rows up to the last token of their answers, the one target of each.

    What closes an answer (stops, quotes, brackets, blanks) says nothing about it and is stripped
    first. Nothing is truncated: a row loses its target with its end, so long rows are dropped.
    Source: the released scripts of LaTen (ACL 2025), which render as Seeking's fine-tuning does.

    Args:
        rows: from `read_rows`.
        tokenizer: of the model that will be asked; each model takes its own.
        max_length: tokens of a row, context and target.
        prompt_format: see `encode`; earlier answers are closed as in its stage "train".
    Raises:
        InputError: see `encode`.
    """
    if max_length < 2:
        raise InputError(f"--max-length is {max_length}; give at least 2 tokens")
    form = resolve_format(prompt_format, tokenizer)
    samples, dropped, example = [], [], None
    for row in rows:
        answer = row.messages[-1]["content"]
        answer = (answer.strip() if form == "published" else answer).rstrip(_CLOSING)
        ids = token_ids(tokenizer, up_to(answer, row, tokenizer, form), special=form != "chat")
        if not answer.strip():
            dropped.append((row.id, "the answer is empty"))
        elif len(ids) > max_length:
            dropped.append(
                (row.id, f"{len(ids)} tokens up to its target, --max-length {max_length}")
            )
        elif len(ids) < 2:
            dropped.append((row.id, "nothing stands before the target"))
        else:
            labels = [IGNORED] * (len(ids) - 1) + ids[-1:]
            samples.append(Sample(row.id, torch.tensor(ids), torch.tensor(labels)))
            example = example or describe_sample(samples[-1], tokenizer, form)
    if not samples:
        name, reason = dropped[0]
        raise InputError(
            f"none of the {len(rows)} rows has a target ({name}: {reason}); give rows with answers "
            "that end within --max-length"
        )
    return Encoded(samples, dropped, [], example)


def resolve_format(prompt_format: str, tokenizer) -> str:
    """The rendering `auto` stands for, checked.

    Raises:
        InputError: an unknown format, or `chat` without a chat template.
    """
    if prompt_format not in PROMPT_FORMATS:
        raise InputError(
            f"--prompt-format is {prompt_format!r}; choose one of {', '.join(PROMPT_FORMATS)}"
        )
    template = getattr(tokenizer, "chat_template", None)
    if prompt_format == "auto":
        return "chat" if template else "published"
    if prompt_format == "chat" and not template:
        raise InputError("--prompt-format chat: the tokenizer has no chat template; use published")
    return prompt_format


def left_out(dropped: list[tuple[str, str]], kept: int) -> str:
    """What was dropped beside so many kept rows, in one line however many that are."""
    row, reason = dropped[0]
    more = len(dropped) - 1
    others = f", and {more} more; report.json names them" if more else ""
    return f"{len(dropped)} of {kept + len(dropped)} rows left out ({row}: {reason}{others})"


def describe_sample(sample: Sample, tokenizer, form: str) -> dict:
    """A sample for a report: what it is made of, and where the loss looks."""
    ids, mask = sample.input_ids.tolist(), (sample.labels != IGNORED).long().tolist()
    masked = mask.index(1)
    return {
        "id": sample.id,
        "format": form,
        "prompt": tokenizer.decode(ids[:masked]),
        "target": tokenizer.decode(ids[masked:]),
        "input_ids": ids,
        "loss_mask": mask,
    }


def match_vocabularies(teacher, student) -> list[tuple[int, int]] | None:
    """(teacher id, student id) of every token both tokenizers have, by student id.

    Returns:
        None where both give every token the same id.
    """
    ours, theirs = teacher.get_vocab(), student.get_vocab()
    if ours == theirs:
        return None
    return sorted(
        ((ours[token], i) for token, i in theirs.items() if token in ours), key=lambda pair: pair[1]
    )
