# SPDX-License-Identifier: Apache-2.0
"""Which tokens two tokenizers share, by what the tokens stand for.

Tokenizers spell the same bytes in different ways: SentencePiece writes a space as a lower one
eighth block and a byte that is in no token as <0x0A>, byte-level BPE writes every byte as a
printable character. What is compared is the bytes a token stands for (METHODS 4.6).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

_ROLES = ("eos", "bos", "unk", "pad")  # pad last: it is often one of the others
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # SentencePiece's


@dataclass(frozen=True, eq=False)
class SharedVocabulary:
    """m tokens that both models have a head row for, by the student's id; no id occurs twice."""

    teacher: torch.Tensor  # int64 [m], the teacher's ids
    student: torch.Tensor  # int64 [m], the student's
    identical: bool  # every token of the smaller vocabulary has the same id in the larger

    def __len__(self) -> int:
        return len(self.teacher)


def shared_vocabulary(
    teacher_tokenizer, student_tokenizer, teacher_rows: int, student_rows: int
) -> SharedVocabulary:
    """Pair the ids of the tokens that stand for the same bytes.

    Special tokens are paired by equal strings, then by their role (end, begin, unknown, padding).
    Where several ids of one tokenizer stand for the same bytes, the first one is taken, a byte
    token of SentencePiece last: beside an ordinary token for that byte it is never used. Rows of a
    head that are in no tokenizer, and ids beyond the head, are left out.

    Args:
        teacher_tokenizer, student_tokenizer: transformers tokenizers.
        teacher_rows, student_rows: rows of the models' heads.
    """
    theirs = _Tokens(teacher_tokenizer, teacher_rows)
    ours = _Tokens(student_tokenizer, student_rows)
    small, large = sorted((theirs.ids, ours.ids), key=len)
    if all(large.get(token) == number for token, number in small.items()):
        both = torch.tensor(sorted(set(small.values())), dtype=torch.int64)
        return SharedVocabulary(both, both, True)
    taken: dict[int, int] = {}  # student id -> teacher id
    used: set[int] = set()

    def pair(teacher: int | None, student: int | None) -> None:
        known = teacher is not None and student is not None
        if known and teacher not in used and student not in taken:
            taken[student] = teacher
            used.add(teacher)

    for token in sorted(ours.special | theirs.special):
        pair(theirs.ids.get(token), ours.ids.get(token))
    for role in _ROLES:
        pair(theirs.role(role), ours.role(role))
    texts = theirs.by_text()
    for text, number in ours.by_text().items():
        pair(texts.get(text), number)
    student = torch.tensor(sorted(taken), dtype=torch.int64)
    teacher = torch.tensor([taken[number] for number in sorted(taken)], dtype=torch.int64)
    return SharedVocabulary(teacher, student, False)


class _Tokens:
    """A tokenizer's tokens that have a row in its model's head."""

    def __init__(self, tokenizer, rows: int):
        self._tokenizer = tokenizer
        self.ids = {token: i for token, i in tokenizer.get_vocab().items() if i < rows}
        added = tokenizer.added_tokens_decoder.values()
        self._added = {str(token) for token in added}  # written as they are
        self.special = {str(token) for token in added if token.special}
        self.special |= set(tokenizer.all_special_tokens)
        # how it spells bytes: asked, because no attribute says so in every kind of tokenizer
        self._byte_level = self._joins("\u0120x", "x x")
        self._spaces = self._joins(_SPACE + "x", "x x")
        self._byte_tokens = self._joins("<0x41>", "xA")

    def _joins(self, token: str, expected: str) -> bool:
        return self._tokenizer.convert_tokens_to_string(["x", token]) == expected

    def role(self, name: str) -> int | None:
        """The id of the token that the tokenizer uses as this one."""
        return self.ids.get(getattr(self._tokenizer, f"{name}_token"))

    def by_text(self) -> dict[bytes, int]:
        """{bytes: id} of all tokens that are not special."""
        found: dict[bytes, int] = {}
        ordinary = (token for token in self.ids if token not in self.special)
        for token in sorted(ordinary, key=lambda t: (self._is_byte(t), self.ids[t])):
            found.setdefault(self._text(token), self.ids[token])
        return found

    def _is_byte(self, token: str) -> bool:
        return self._byte_tokens and _BYTE.fullmatch(token) is not None

    def _text(self, token: str) -> bytes:
        if self._is_byte(token):
            return bytes.fromhex(_BYTE.fullmatch(token)[1])
        if self._byte_level and token not in self._added and _ALPHABET.keys() >= set(token):
            return bytes(_ALPHABET[character] for character in token)
        if self._spaces:
            token = token.replace(_SPACE, " ")
        return token.encode("utf-8", "surrogatepass")


def _alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE, as GPT-2 chose them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


_ALPHABET = _alphabet()
