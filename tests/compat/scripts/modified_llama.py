# SPDX-License-Identifier: Apache-2.0
"""A Llama that returns what LaTen's modified model returns, and adds the deltas that hang on it.

Written anew over the stock one's modules: eager attention, no cache.
"""

import torch
from torch.nn.functional import cross_entropy, linear
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


class ModifiedLlama(LlamaForCausalLM):
    """`outputs[2]` has, per block: its input, attention output, mid residual, FFN output, its
    output [B, T, D]; the last query's weights times the values [B, H, T, hd]; what goes into
    down_proj [B, T, F]; attention weights [B, H, T, T]."""

    def forward(
        self,
        input_ids,
        attention_mask=None,
        labels=None,
        use_cache=None,
        return_dict=None,
    ):
        hidden = self.model.embed_tokens(input_ids)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        rotary = self.model.rotary_emb(hidden, places)
        hidden_from = (places[:, :, None] < places[:, None])[:, None]  # a later key
        if attention_mask is not None:
            hidden_from = hidden_from | (attention_mask[:, None, None] == 0)
        flows = []
        for block in self.model.layers:
            hidden, flow = self._block(block, hidden, rotary, hidden_from)
            flows.append(flow)
        logits = self.lm_head(self.model.norm(hidden))
        loss = None
        if labels is not None:
            loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=(), hidden_states=tuple(flows)
        )

    def _block(self, block, entered, rotary, hidden_from):
        x = block.input_layernorm(entered)
        attended, subvalues, weights = self._attention(block.self_attn, x, rotary, hidden_from)
        residual = entered + attended
        ffn, coefficients = self._ffn(block.mlp, block.post_attention_layernorm(residual))
        left = residual + ffn
        return left, (entered, attended, residual, ffn, left, subvalues, coefficients, weights)

    def _attention(self, attention, x, rotary, hidden_from):
        config = self.config
        size = config.hidden_size // config.num_attention_heads
        query, key, value = (
            projected(module, x).unflatten(-1, (-1, size)).transpose(1, 2)
            for module in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        shared = config.num_attention_heads // config.num_key_value_heads
        key, value = (t.repeat_interleave(shared, 1) for t in (key, value))
        scores = (query @ key.transpose(2, 3)) * size**-0.5
        scores = scores.masked_fill(hidden_from, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1, dtype=torch.float32).to(x.dtype)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        subvalues = weights[:, :, -1, :, None] * value
        return projected(attention.o_proj, mixed), subvalues, weights

    def _ffn(self, mlp, x):
        gate = mlp.act_fn(mlp.gate_proj(x))
        coefficients = gate * mlp.up_proj(x)
        if hasattr(mlp.up_proj, "delta"):
            coefficients = coefficients + gate * linear(x, mlp.up_proj.delta.to(x.dtype))
        return projected(mlp.down_proj, coefficients), coefficients


def projected(module, x):
    """What a projection computes, and its delta if it has one."""
    y = module(x)
    return y + linear(x, module.delta.to(x.dtype)) if hasattr(module, "delta") else y
