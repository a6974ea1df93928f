# SPDX-License-Identifier: Apache-2.0
"""Where the parts of a Hugging Face decoder are: blocks, projections, embedding, head, norms.

`describe` reads the structure of the model at hand (also one on the meta device) and checks it
against the configuration. Names decide only what structure cannot tell (q from o where both are
square), sizes never come from a table. What does not fit is refused, so that no parameter is
overlooked. Weights are spoken of as [out, in]; GPT-2's Conv1D stores [in, out].
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pkt_ext.errors import InputError
from pkt_ext.models import quantisation

SUPPORTED = {  # configuration's model_type -> what people call it
    "llama": "Llama 2/3",
    "mistral": "Mistral",
    "qwen2": "Qwen2/Qwen2.5",
    "qwen3": "Qwen3",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "olmo2": "OLMo 2",
    "gpt_neox": "GPT-NeoX/Pythia",
    "gpt2": "GPT-2",
    "opt": "OPT",
    "phi3": "Phi-3",
}

# module name -> the roles of its output rows, in order. `c_proj` is o or down, by its siblings.
_ROLES = {
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
    "qkv_proj": ("q", "k", "v"),
    "c_attn": ("q", "k", "v"),
    "query_key_value": ("q", "k", "v"),
    "o_proj": ("o",),
    "out_proj": ("o",),
    "dense": ("o",),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "gate_up_proj": ("gate", "up"),
    "fc1": ("up",),
    "c_fc": ("up",),
    "dense_h_to_4h": ("up",),
    "down_proj": ("down",),
    "fc2": ("down",),
    "dense_4h_to_h": ("down",),
}
_INTERLEAVED = "query_key_value"  # rows are [head, (q, k, v), head_dim], not [(q, k, v), ...]
_OPTIONAL = {"gate"}


@dataclass(frozen=True)
class Rows:
    """Output rows {start + g * stride + i : g < groups, i < length} of a fused [out, in] matrix.

    groups = 1 is a contiguous chunk; GPT-NeoX has one group per head.
    """

    start: int
    length: int
    groups: int = 1
    stride: int = 0

    @property
    def count(self) -> int:
        """How many rows."""
        return self.length * self.groups

    def index(self) -> torch.Tensor:
        """The rows' numbers: int64 [count], ascending, on the CPU."""
        group = torch.arange(self.groups)[:, None] * self.stride
        return (self.start + group + torch.arange(self.length)).flatten()

    def select(self, matrix: torch.Tensor) -> torch.Tensor:
        """[out, ...] -> [count, ...]: a view where the rows are contiguous, else a copy."""
        if self.groups == 1:
            return matrix.narrow(0, self.start, self.length)
        return matrix.index_select(0, self.index().to(matrix.device))


@dataclass(frozen=True)
class Projection:
    """One logical weight matrix of a block."""

    role: str  # "q", "k", "v", "o", "gate", "up" or "down"
    module: str  # path relative to the block
    rows: Rows | None  # its rows of a fused module, None = the whole module
    transposed: bool  # stored [in, out]
    shape: tuple[int, int]  # (out, in)

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The module's weight (or anything of its stored shape) -> this projection's [out, in]."""
        weight = weight.T if self.transposed else weight
        return weight if self.rows is None else self.rows.select(weight)


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model, by module path. Every parameter belongs to exactly one of them."""

    model_type: str
    blocks: tuple[str, ...]
    projections: tuple[tuple[Projection, ...], ...]  # per block
    embedding: str
    head: str
    final_norm: str | None  # None: OPT with do_layer_norm_before=False
    position_embedding: str | None  # learned positions (GPT-2, OPT), else None
    tied: bool  # the head's weight is the embedding's
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int
    logit_softcap: float | None


def matmul_modules(block: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Linear and Conv1D of `block`, by path relative to it."""
    return {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def check_config(config) -> None:
    """Refuse a configuration whose models we cannot take apart, before anything is built.

    Raises:
        InputError: what it is, and what is supported.
    """
    reason = _unsupported(config)
    where = f"{config.name_or_path}: " if getattr(config, "name_or_path", "") else ""
    if reason:
        kind = getattr(config, "model_type", None) or type(config).__name__
        known = ", ".join(SUPPORTED.values())
        raise InputError(
            f"{where}model type {kind!r}: {reason}; supported are dense decoders: {known}"
        )
    if reason := quantisation.refusal(config):
        raise InputError(f"{where}{reason}")


def describe(model: PreTrainedModel) -> Anatomy:
    """Find the parts of `model`, a causal language model; its weights may be on meta.

    Raises:
        InputError: an architecture that is not supported (the message lists those that are), or
            a model whose modules do not fit its configuration.
    """
    if not isinstance(model, PreTrainedModel):
        hint = ": merge the adapter first" if hasattr(model, "peft_config") else ""
        raise InputError(
            f"expected a transformers PreTrainedModel, got {type(model).__name__}{hint}"
        )
    config = model.config
    check_config(config)
    paths = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        _misfit(model, "it has no language-model head; load it with AutoModelForCausalLM")
    list_path, blocks = _block_list(model)
    siblings = model.get_submodule(list_path.rpartition(".")[0]).named_children()
    norms, positions = [], []
    for _, module in siblings:
        parameters = list(module.parameters())
        if module is embedding or module is blocks or not parameters:
            continue
        if isinstance(module, nn.Embedding):
            positions.append(module)
        elif all(p.ndim == 1 for p in parameters):
            norms.append(module)
    if len(norms) > 1 or len(positions) > 1:
        _misfit(model, "it has more than one final norm or position embedding")
    parts = [blocks, embedding, head, *norms, *positions]
    _check_covered(model, parts)

    sizes = _head_sizes(config)
    projections = tuple(
        _projections(model, f"{list_path}.{i}", block, config.hidden_size, *sizes)
        for i, block in enumerate(blocks)
    )
    for module, kind in ((embedding, "embedding"), (head, "head")):
        if module.weight.ndim != 2 or module.weight.shape[1] != config.hidden_size:
            _misfit(model, f"its {kind} is not [vocabulary, hidden size {config.hidden_size}]")
    return Anatomy(
        model_type=config.model_type,
        blocks=tuple(f"{list_path}.{i}" for i in range(len(blocks))),
        projections=projections,
        embedding=paths[id(embedding)],
        head=paths[id(head)],
        final_norm=paths[id(norms[0])] if norms else None,
        position_embedding=paths[id(positions[0])] if positions else None,
        tied=head.weight is embedding.weight,
        hidden_size=config.hidden_size,
        intermediate_size=next(p.shape[1] for p in projections[0] if p.role == "down"),
        vocab_size=head.weight.shape[0],
        heads=sizes[0],
        kv_heads=sizes[1],
        head_dim=sizes[2],
        logit_softcap=getattr(config, "final_logit_softcapping", None),
    )


def _unsupported(config) -> str | None:
    """Why this configuration is refused, in words; None when it is not."""
    settings = {k: v for k, v in config.to_dict().items() if v}
    kinds = " ".join(map(str, settings.get("layer_types") or ()))
    if settings.get("is_encoder_decoder"):
        return "an encoder-decoder"
    if any("expert" in k and isinstance(v, int) and v > 1 for k, v in settings.items()):
        return "a mixture of experts (MoE)"
    if any(re.search(r"mamba|ssm|state_size|conv_kernel|rwkv", k) for k in settings) or re.search(
        r"mamba|linear_attention|recurrent", kinds
    ):
        return "a state-space or hybrid model"
    if settings.get("num_kv_shared_layers"):
        return "its blocks share keys and values"
    if settings.get("use_bidirectional_attention"):
        return "its attention is bidirectional"
    if settings.get("add_cross_attention"):
        return "it has cross-attention"
    if config.model_type not in SUPPORTED:
        if "text_config" in settings:
            return "a multimodal model; pass its folder or hub id, the text model inside is used"
        return "an architecture that is not supported"
    return None


def _misfit(model: PreTrainedModel, what: str):
    raise InputError(f"{type(model).__name__} ({model.config.model_type}) cannot be used: {what}")


def _block_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == model.config.num_hidden_layers
        and len({type(block) for block in module}) == 1
        and matmul_modules(module)
    ]
    if len(found) != 1:
        count = f"{len(found)} lists of {model.config.num_hidden_layers} equal blocks"
        _misfit(model, f"{count} were found instead of one")
    return found[0]


def _check_covered(model: PreTrainedModel, parts: list[nn.Module]) -> None:
    known = {id(p) for part in parts for p in part.parameters()}
    rest = [name for name, p in model.named_parameters() if id(p) not in known]
    if rest:
        _misfit(model, f"{', '.join(rest[:6])} lie outside blocks, embedding, final norm and head")


def _head_sizes(config) -> tuple[int, int, int]:
    """(query heads, key-value heads, head dimension)."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _projections(
    model: PreTrainedModel,
    path: str,
    block: nn.Module,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> tuple[Projection, ...]:
    """The block's projections, each checked against the configuration's sizes."""
    modules = matmul_modules(block)
    found: list[Projection] = []
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        roles = _ROLES.get(leaf)
        if leaf == "c_proj":
            roles = ("o",) if f"{parent}.c_attn" in modules else ("down",)
        if roles is None:
            _misfit(model, f"the role of {path}.{name} is unknown")
        transposed = isinstance(module, Conv1D)
        # the modules' own numbers: a 4-bit weight's shape says nothing
        size_in, size_out = (
            (module.nx, module.nf) if transposed else (module.in_features, module.out_features)
        )
        lengths = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
        counts = [lengths.get(role, size_out // len(roles)) for role in roles]
        if sum(counts) != size_out:
            _misfit(model, f"{path}.{name} has {size_out} rows, its parts have {counts}")
        for i, role in enumerate(roles):
            rows = None
            if leaf == _INTERLEAVED:
                rows = Rows(i * head_dim, head_dim, groups=heads, stride=3 * head_dim)
            elif len(roles) > 1:
                rows = Rows(sum(counts[:i]), counts[i])
            found.append(Projection(role, name, rows, transposed, (counts[i], size_in)))
    shapes = {p.role: p.shape for p in found}
    if len(shapes) != len(found) or shapes.keys() | _OPTIONAL != _ALL_ROLES:
        _misfit(model, f"{path} has the projections {[p.role for p in found]}")
    wide, ffn = heads * head_dim, shapes["down"][1]
    expected = {r: (ffn, hidden) for r in ("gate", "up")} | {
        "q": (wide, hidden),
        "k": (kv_heads * head_dim, hidden),
        "v": (kv_heads * head_dim, hidden),
        "o": (hidden, wide),
        "down": (hidden, ffn),
    }
    for role, shape in shapes.items():
        if shape != expected[role]:
            _misfit(model, f"{role} of {path} is {shape}, its configuration says {expected[role]}")
    return tuple(sorted(found, key=lambda p: _ORDER.index(p.role)))


_ORDER = ("q", "k", "v", "o", "gate", "up", "down")
_ALL_ROLES = set(_ORDER)
