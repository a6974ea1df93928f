# SPDX-License-Identifier: Apache-2.0
"""Tiny random decoders of every supported family, made by transformers on the spot, for the tests.

Every parameter is random, norm gains and biases included: a test that forgets one fails.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from pkt_ext.models.versions import DTYPE

VOCAB = 264  # the tokenizer's 259 tokens and a few unused rows, as real checkpoints have
TEACHER = dict(layers=3, hidden=48, ffn=80, heads=4, seed=1)
STUDENT = dict(layers=2, hidden=32, ffn=48, heads=4, seed=2)
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _common(s: dict) -> dict:
    """The settings that every family but GPT-2 and OPT spells alike."""
    return dict(
        vocab_size=s["vocab"],
        hidden_size=s["hidden"],
        intermediate_size=s["ffn"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        max_position_embeddings=128,
    )


def _gqa(s: dict) -> dict:
    return _common(s) | dict(num_key_value_heads=s["kv_heads"] or s["heads"] // 2)


def _wide(s: dict) -> dict:
    """head_dim larger than hidden / heads, as Qwen3 and Gemma have it."""
    return _gqa(s) | dict(head_dim=s["hidden"] // s["heads"] + 4)


def _mha(s: dict) -> dict:
    return _common(s) | dict(num_key_value_heads=s["kv_heads"] or s["heads"])


def _layer_types(s: dict) -> dict:
    kinds = ["sliding_attention", "full_attention"]
    return dict(sliding_window=4, layer_types=[kinds[i % 2] for i in range(s["layers"])])


def _gpt2(s: dict) -> dict:
    return dict(
        vocab_size=s["vocab"],
        n_embd=s["hidden"],
        n_inner=s["ffn"],
        n_layer=s["layers"],
        n_head=s["heads"],
        n_positions=128,
    )


def _opt(s: dict) -> dict:
    return dict(
        vocab_size=s["vocab"],
        hidden_size=s["hidden"],
        ffn_dim=s["ffn"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        max_position_embeddings=128,
        word_embed_proj_dim=s["hidden"],
    )


# name -> (configuration class, sizes -> arguments, fixed arguments)
_ALL = {
    "llama": ("LlamaConfig", _mha, {}),
    "llama_gqa": ("LlamaConfig", _gqa, {}),
    "llama_tied": ("LlamaConfig", _mha, dict(tie_word_embeddings=True)),
    "llama_bias": ("LlamaConfig", _gqa, dict(attention_bias=True, mlp_bias=True)),
    "llama_wide_heads": ("LlamaConfig", _wide, {}),
    "mistral": ("MistralConfig", _gqa, dict(sliding_window=4)),
    "qwen2": ("Qwen2Config", _gqa, {}),
    "qwen2_tied": ("Qwen2Config", _gqa, dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", _wide, dict(tie_word_embeddings=True)),
    "gemma2": (
        "Gemma2Config",
        lambda s: _wide(s) | _layer_types(s),
        dict(query_pre_attn_scalar=12, final_logit_softcapping=5.0, attn_logit_softcapping=4.0),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        lambda s: _wide(s) | _layer_types(s),
        dict(query_pre_attn_scalar=12),
    ),
    "olmo2": ("Olmo2Config", _gqa, {}),
    "gpt_neox": ("GPTNeoXConfig", _common, {}),
    "gpt_neox_sequential": ("GPTNeoXConfig", _common, dict(use_parallel_residual=False)),
    "gpt2": ("GPT2Config", _gpt2, {}),
    "opt": ("OPTConfig", _opt, {}),
    "opt_post_norm": ("OPTConfig", _opt, dict(do_layer_norm_before=False)),
    "phi3": ("Phi3Config", _mha, {}),
    "phi3_gqa": ("Phi3Config", _gqa, dict(sliding_window=4)),
}
# transformers 4.46 (`make test-legacy`) has not got them all
FAMILIES = {name: family for name, family in _ALL.items() if hasattr(hf, family[0])}
TIED = tuple(
    n
    for n in FAMILIES
    if n
    in ("llama_tied", "qwen2_tied", "qwen3", "gemma2", "gemma3", "gpt2", "opt", "opt_post_norm")
)


def config(
    family: str,
    *,
    layers: int = 2,
    hidden: int = 32,
    ffn: int = 48,
    heads: int = 4,
    kv_heads: int | None = None,
    vocab: int = VOCAB,
    **overrides,
):
    """The family's configuration at these sizes; `overrides` are the configuration's own names."""
    if family in _ALL.keys() - FAMILIES.keys():
        pytest.skip(f"transformers {hf.__version__} has no {family}")
    cls, arguments, fixed = FAMILIES[family]
    sizes = dict(layers=layers, hidden=hidden, ffn=ffn, heads=heads, kv_heads=kv_heads, vocab=vocab)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return getattr(hf, cls)(**(arguments(sizes) | ids | fixed | overrides))


def randomize(model, seed: int = 0):
    """Draw every parameter of `model` anew, in place: matrices by fan-in, gains and biases too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            noise *= 0.3 if "emb" in name or "wte" in name else parameter.shape[-1] ** -0.5
        elif name.endswith("bias"):
            noise *= 0.1
        else:
            # a gain varies about what the module starts it at (1, or 0 where it is stored as 1 + w)
            noise = parameter.detach().float().mean() + 0.2 * noise
        with torch.no_grad():
            parameter.copy_(noise)
    return model


def build(family: str, *, seed: int = 0, **sizes):
    """A random causal LM of `family` in float32 and eval mode. Equal arguments, equal weights."""
    with torch.random.fork_rng(devices=[]):
        settings = config(family, **sizes)
        model = hf.AutoModelForCausalLM.from_config(settings, **{DTYPE: torch.float32})
    return randomize(model, seed).eval()


def pair(family: str, teacher: dict | None = None, student: dict | None = None):
    """(teacher, student) of one family, the teacher larger on every axis."""
    return (
        build(family, **(TEACHER | (teacher or {}))),
        build(family, **(STUDENT | (student or {}))),
    )


def tokenizer(*, bos: bool = True, chat: bool = False, size: int = 0) -> hf.PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: 3 specials, then one token per byte; exact round trip.

    Args:
        bos:  put <s> first, as Llama's tokenizer does.
        chat: carry a chat template.
        size: tokens in all, at least; further ones are words that no text becomes.
    """
    specials = ["<pad>", "<s>", "</s>"]
    known = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    known += [f"word{i}" for i in range(size - len(known))]
    vocabulary = {token: i for i, token in enumerate(known)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    outer = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    if chat:
        outer.chat_template = CHAT_TEMPLATE
    return outer


def save(model, folder, *, tokens: hf.PreTrainedTokenizerFast | None = None, **options) -> Path:
    """Write model and tokenizer as a hub folder; `options` go to `save_pretrained`."""
    folder = Path(folder)
    model.save_pretrained(folder, **options)
    (tokens or tokenizer()).save_pretrained(folder)
    return folder


def save_pair(folder: Path, rows: list[dict]) -> Path:
    """Write what a `pkt seeking` needs into `folder`: teacher/, student/ and rows.jsonl."""
    for name, model in zip(("teacher", "student"), pair("llama_gqa"), strict=True):
        save(model, folder / name)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
