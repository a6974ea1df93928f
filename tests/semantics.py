# SPDX-License-Identifier: Apache-2.0
"""Heads of known singular values, tokenizers of two kinds, and the largest tensor of a run."""

import math

import model_zoo as zoo
import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode

from pkt_ext.streaming.blocks import StreamedModel
from pkt_ext.streaming.checkpoint import Checkpoint


def stream_of(model) -> StreamedModel:
    return StreamedModel(Checkpoint.open(model))


def llama_with(weight: torch.Tensor):
    """A float64 model with this head and final norm gains of 1."""
    vocab, width = weight.shape
    model = zoo.build("llama", hidden=width, vocab=vocab, ffn=8).double()
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(weight)
        model.model.norm.weight.fill_(1.0)
    return model


def random_head(m: int, d: int, condition: float, seed=0, rank=None) -> torch.Tensor:
    """[m, d] float64 with singular values from 1 down to 1 / condition, zero beyond the rank."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, d, generator=generator, dtype=torch.float64))[0]
        for n in (m, d)
    )
    values = torch.logspace(0, -math.log10(condition), rank or d, dtype=torch.float64)
    values = torch.cat([values, values.new_zeros(d - len(values))])
    return left * values @ right.T


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return found


def wrapped(inner, **special) -> hf.PreTrainedTokenizerFast:
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, clean_up_tokenization_spaces=False, **special
    )


def byte_level(*tokens: str, special=("<|endoftext|>",), added=(), **roles):
    """A byte-level BPE tokenizer: its 256 bytes, these tokens, then the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *tokens])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens([AddedToken(token, normalized=False) for token in added])
    inner.add_special_tokens(list(special))
    return wrapped(inner, **({"eos_token": "<|endoftext|>"} | roles))


def sentencepiece(*tokens: str, special=("<unk>", "<s>", "</s>"), **roles):
    """A BPE tokenizer as Llama 2 has it: special tokens, 256 byte tokens, then these."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: i for i, token in enumerate([*special, *bytes_, *tokens])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    roles = roles or dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return wrapped(inner, **roles)
