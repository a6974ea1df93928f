# SPDX-License-Identifier: Apache-2.0
"""`KnowledgeNeurons` and `Knowledge_translator` of LaTen's released scripts, on our kernels.

Names, arguments, their order, and what comes back are the published ones; both the published
modified model and a stock one of transformers will do. What the published code computes is
computed here, bit for bit where its order of operations is fixed, in one forward pass a prompt and
without a product of every neuron with the whole vocabulary.

Reproduced, since results depend on it, unless `fix=True` (METHODS 3.8, BASELINES 7):

  * the lens divides by the root of a standard deviation, its arithmetic is float16, neurons'
    scores are rounded to 4 decimals. `fix`: the model's own final norm, float32, no rounding;
  * an attention neuron is what the last position takes from itself alone. `fix`: from all;
  * several prompts add up for blocks and FFN neurons, of attention neurons the last one counts.
    `fix`: all add up;
  * a probability that float16 cannot hold has score NaN or infinity, and NaN comes first.
    `fix`: it has its score;
  * an injected delta is an attribute, which `save_pretrained` does not save, and which is still
    there when the next rate is attributed. `fix`, outside autograd: weights are changed (in
    float32, rounded once), and changed back before the next attribution or injection;
  * the translator's output is float16, in which at the start all of it is 0. `fix`: float32.

Equal scores, which abound, come as published in the order of torch's unstable sort; with `fix` the
lower index first. Blocks of equal gain: the later one first. Models that are not float16, on which
the published code crashes, are scored by its formulas in float32.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pkt_ext.compat import notices
from pkt_ext.compat._injection import (
    ROLES,
    attach,
    by_block,
    dense,
    extract,
    merge,
    place,
    put_back,
)
from pkt_ext.compat._positions import Position, positions
from pkt_ext.compat._scores import Scorer
from pkt_ext.models.anatomy import describe

__all__ = ["KnowledgeNeurons", "Knowledge_translator"]

_ROWS = 2048  # neurons translated at a time


class KnowledgeNeurons:
    """Locates the blocks and neurons of a model that speak for a token, takes neurons out and in.

    The methods take any `self` with `model`, `tokenizer` and `device`, so they may be put into the
    published class; whether to fix they read from its attribute `fix`.

    Args:
        model:        a causal language model, published-modified or stock.
        tokenizer:    encodes prompts, as it is: with a start token if it adds one.
        model_type:   "llama"; with `fix` any that `pkt_ext` supports.
        device:       where the model is.
        is_teacher:   kept, never used, as published.
        FFN_MODUELS:  likewise.
        ATTN_MODUELS: likewise.
        fix:          correct what the published code gets wrong.
    Raises:
        NotImplementedError: another `model_type`, without `fix`.
    """

    fix = False

    def __init__(
        self,
        model,
        tokenizer,
        model_type: str = "llama",
        device: str = "cuda:0",
        is_teacher: bool = False,
        FFN_MODUELS: list | None = None,
        ATTN_MODUELS: list | None = None,
        *,
        fix: bool = False,
    ):
        if fix:  # else it stays the class's, which `patched` may have set
            self.fix = True
        if model_type != "llama" and not getattr(self, "fix", False):
            raise NotImplementedError(
                f"model_type {model_type!r}: the published methods know llama alone; pass fix=True"
            )
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.model_type, self.is_teacher = model_type, is_teacher
        self.FFN_MODULES, self.SELF_ATTENTION_MODULES = FFN_MODUELS, ATTN_MODUELS
        config = model.config
        self.n_layers, self.n_head = config.num_hidden_layers, config.num_attention_heads
        self.n_embd = config.hidden_size
        self.head_dim = self.n_embd // self.n_head
        self.intermediate_size = getattr(config, "intermediate_size", None)
        # none of ours reads these; a script's own methods may
        self.transformer_layers_attr = "model.layers"
        self.ff_attr_format, self.attn_attr_format = "mlp.{}", "self_attn.{}"

    @torch.no_grad()
    def get_top_attribute_layers(
        self, prompts: list, ground_truths: list, top_cnt: int = 2
    ) -> tuple[list[int], list[int]]:
        """The blocks that speak most for each prompt's last token, all prompts together.

        An answer that is empty without its punctuation leaves the prompt's own last token.

        Args:
            prompts:       texts.
            ground_truths: their answers; trailing punctuation is ignored.
            top_cnt:       how many blocks to keep; fewer where there are fewer.
        Returns:
            (attention blocks, FFN blocks), best first.
        """
        scorer, found = _look(self, prompts, ground_truths, empty=True)
        count = len(scorer.anatomy.blocks)
        attention, ffn = [0.0] * count, [0.0] * count
        for position in found:
            for total, gains in zip((attention, ffn), scorer.block_gains(position), strict=True):
                total[:] = [a + b for a, b in zip(total, gains, strict=True)]
        for what, total in (("attention", attention), ("ffn", ffn)):
            gains = [(b, round(total[b], 3)) for b in _best_first(total)]
            print(f"{what}: {sum(g for _, g in gains):.3f} in all; by block {gains}")
        return _best_first(attention)[:top_cnt], _best_first(ffn)[:top_cnt]

    @torch.no_grad()
    def get_top_attribute_neurons_ffn(
        self, prompts, ground_truths, layer_idxs: list, student_dim: int, top: bool = True
    ) -> list[list[int]]:
        """The FFN neurons that speak most (or least) for each prompt's last token.

        Args:
            prompts, ground_truths: see `get_top_attribute_layers`.
            layer_idxs:  blocks to look at.
            student_dim: how many neurons to keep in each.
            top:         the best ones, best first; else the worst, worst first.
        Returns:
            [[block, neuron], ...], block by block as in `layer_idxs`.
        Raises:
            EmptyAnswerError: an answer of punctuation alone (a ValueError and an IndexError).
        """
        return _neurons(self, prompts, ground_truths, layer_idxs, student_dim, top, "down")

    @torch.no_grad()
    def get_top_attribute_neurons_attn(
        self, prompts, ground_truths, layer_idxs: list, student_dim: int, top: bool = True
    ) -> list[list[int]]:
        """The attention neurons likewise: columns of o_proj, head * head_dim + place in the head.

        Arguments, result and errors as of `get_top_attribute_neurons_ffn`.
        """
        if not getattr(self, "fix", False):
            notices.once(
                "laten.attention",
                "attention neurons are scored as published: what the last position takes from "
                "itself alone, of several prompts the last; fix=True takes all positions and "
                "prompts",
            )
        return _neurons(self, prompts, ground_truths, layer_idxs, student_dim, top, "o")

    @torch.no_grad()
    def extract_ffn_attn_knowledge(
        self,
        ffn_neurons: list[list[int]],
        attn_neurons: list[list[int]],
        extract_ffn_module: list[str] | None = ("down_proj", "up_proj"),
        extract_attn_module: list[str] | None = ("v_proj", "o_proj"),
    ) -> dict[str, torch.Tensor]:
        """The neurons' weights, by module.

        Args:
            ffn_neurons, attn_neurons: [[block, neuron], ...], as many in every block.
            extract_ffn_module, extract_attn_module: modules' names; None: none.
        Returns:
            {module: float16 [blocks, neurons, in], of down_proj and o_proj [blocks, out, neurons]},
            blocks and neurons in the order that they come in.
        Raises:
            ValueError: neurons or modules that are not there; v_proj where heads share values.
        """
        anatomy, found = describe(self.model), {}
        for neurons, names in (
            (ffn_neurons, extract_ffn_module),
            (attn_neurons, extract_attn_module),
        ):
            for name in names or ():
                parts = [
                    extract(place(self.model, anatomy, block, name, some)).to(torch.float16)
                    for block, some in by_block(neurons).items()
                ]
                found[name] = torch.stack(parts)
        return found

    def knowledge_injection(
        self,
        teacher_weights: dict,
        student_weights: dict,
        ffn_layers: list | None = None,
        attn_layers: list | None = None,
        ffn_neurons: list[list[int]] | None = None,
        ffn_module: list[str] | None = None,
        attn_neurons: list[list[int]] | None = None,
        attn_module: list[str] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Add translated neurons to the model's own, as deltas that are attached to its modules.

        Args:
            teacher_weights: {module: [blocks, ...]}, translated; part i goes to the i-th block.
            student_weights: not used, as published.
            ffn_layers, attn_layers:   blocks.
            ffn_neurons, attn_neurons: [[block, neuron], ...], -1 the last neuron; None: nothing is
                added to that half.
            ffn_module, attn_module:   modules' names.
        Returns:
            {"model.layers.B.mlp.M.delta" or "model.layers.B.self_attn.M.delta": the dense delta,
            differentiable in `teacher_weights`}; take it off with `delattr(module, "delta")`. With
            `fix`, outside autograd, the weights themselves are changed and nothing is attached.
        Raises:
            ValueError: as `extract_ffn_attn_knowledge`, or weights of another shape.
        """
        fix, anatomy = getattr(self, "fix", False), describe(self.model)
        put_back(self.model)
        if not fix:
            notices.once(
                "laten.injection",
                "deltas are attached as published: save_pretrained does not save them, and the "
                "next attribution sees them; fix=True changes the weights instead",
            )
        deltas, merged = {}, {}
        for half, neurons, blocks, names in (
            ("mlp", ffn_neurons, ffn_layers, ffn_module),
            ("self_attn", attn_neurons, attn_layers, attn_module),
        ):
            chosen = {} if neurons is None else by_block(neurons)
            for i, block in enumerate(map(int, blocks) if neurons is not None else ()):
                for name in names:
                    task, some = teacher_weights[name][i], chosen.get(block, [])
                    where = place(self.model, anatomy, block, name, some, from_end=True)
                    delta = dense(where, task if fix else task.to(torch.float16))
                    key = f"model.layers.{block}.{half}.{name}.delta"
                    deltas[key] = delta
                    if fix and not delta.requires_grad:
                        merged[key] = where, task  # of a block that comes twice the last counts
                    else:
                        attach(self.model, where, delta)
        for where, task in merged.values():
            merge(self.model, where, task)
        return deltas


class Knowledge_translator(nn.Module):
    """Two-layer perceptrons that take a teacher's neurons to a student's width, one for a module.

    `state_dict` has the published keys, and under one torch seed the weights are the published
    ones, bit for bit. Hidden activations are computed anew in the backward, `_ROWS` neurons at a
    time, so that no more of them are in memory.

    Args:
        translate_modules: module names, such as "up_proj".
        n_layers:          kept, never used, as published.
        input_dim:         the teacher's hidden size.
        output_dim:        the student's.
        fix:               float32 output.
    """

    fix = False

    def __init__(
        self, translate_modules, n_layers: int, input_dim: int, output_dim: int, *, fix=False
    ):
        super().__init__()
        if fix:
            self.fix = True
        self.model_mapping = {
            name: "mlp" if role in ("gate", "up", "down") else "self_attn"
            for name, role in ROLES.items()
        }
        self.n_layers, self.network = n_layers, nn.ModuleDict()
        # torch's own start is drawn first, for all, as published: it moves the generator
        for name in translate_modules:
            self.network[name] = nn.Sequential(
                nn.Linear(input_dim, input_dim, bias=False, dtype=torch.float32),
                nn.ReLU(),
                nn.Linear(input_dim, output_dim, bias=False, dtype=torch.float32),
            )
        self.network.apply(self.init_weights)

    def init_weights(self, module: nn.Module) -> None:
        """N(0, (1e-5)^2) for a linear layer."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, mean=0.0, std=1e-5)

    def forward(self, x: dict[str, torch.Tensor], source_idxs) -> dict[str, torch.Tensor]:
        """Translate neurons.

        Args:
            x: {module: [blocks, neurons, input_dim]; of down_proj and o_proj [blocks, input_dim,
                neurons]}.
            source_idxs: not used, as published.
        Returns:
            The same with output_dim in the place of input_dim: float16, with `fix` float32.
        """
        fix, found = getattr(self, "fix", False), {}
        if not fix:
            notices.once(
                "laten.translator",
                "translated neurons are float16 as published, in which the first steps' are all "
                "0; fix=True gives float32",
            )
        dtype = torch.float32 if fix else torch.float16
        for name, weights in x.items():
            by_column = ROLES.get(name) in ("down", "o")
            vectors = weights.transpose(1, 2) if by_column else weights
            translated = _translated(self.network[name], vectors, dtype)
            found[name] = translated.transpose(1, 2) if by_column else translated
        return found


def _translated(network: nn.Module, vectors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[blocks, n, input_dim] -> [blocks, n, output_dim], _ROWS neurons at a time."""

    def translate(part: torch.Tensor) -> torch.Tensor:
        return network(part.to(torch.float32)).to(dtype)

    parts = vectors.flatten(0, 1).split(_ROWS)
    done = torch.cat([checkpoint(translate, part, use_reentrant=False) for part in parts])
    return done.unflatten(0, vectors.shape[:2])


def _look(self, prompts, answers, *, empty: bool = False) -> tuple[Scorer, list[Position]]:
    """What scores, and what there is to score; on a model without deltas of ours in its weights."""
    fix, anatomy = getattr(self, "fix", False), describe(self.model)
    put_back(self.model)
    if not fix:
        notices.once(
            "laten.lens",
            "scores are the published ones: float16, 4 decimals, divided by the root of a "
            "standard deviation; fix=True gives exact ones",
        )
    found = positions(self, prompts, answers, anatomy, fix=fix, empty=empty)
    return Scorer(self.model, anatomy, fix=fix), found


def _neurons(self, prompts, answers, blocks, count: int, top: bool, role: str) -> list[list[int]]:
    scorer, found = _look(self, prompts, answers)
    blocks = [int(block) for block in blocks]  # of a tensor or an array too
    chosen = scorer.best(found, role, blocks, count, top=top)
    return [[b, neuron] for b, some in zip(blocks, chosen, strict=True) for neuron in some]


def _best_first(totals: list[float]) -> list[int]:
    """Blocks by falling total; of equal ones the later comes first, as published."""
    return sorted(range(len(totals)), key=totals.__getitem__)[::-1]
