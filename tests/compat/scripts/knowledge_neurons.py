# SPDX-License-Identifier: Apache-2.0
"""LaTen's attribution in the published shape and way, written anew from its description.

Every position of every block becomes a nested list, every neuron meets the whole vocabulary in
half precision, and Python walks over the neurons: the truth to test against, and what it costs.
"""

import torch

PUNCTUATION = {".", '"', " ", ")", "\n", ",", "]"}


class KnowledgeNeurons:
    def __init__(
        self,
        model,
        tokenizer,
        model_type="llama",
        device="cuda:0",
        is_teacher=False,
        FFN_MODUELS=None,
        ATTN_MODUELS=None,
    ):
        if model_type != "llama":
            raise NotImplementedError
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.n_layers = model.config.num_hidden_layers
        self.n_head = model.config.num_attention_heads
        self.width = model.config.hidden_size
        self.ffn_width = model.config.intermediate_size

    @torch.no_grad()
    def get_top_attribute_layers(self, prompts, ground_truths, top_cnt=2):
        attention, ffn = [0] * self.n_layers, [0] * self.n_layers
        for prompt, answer in zip(prompts, ground_truths, strict=False):
            while answer and answer[-1] in PUNCTUATION:
                answer = answer[:-1]
            seen = self._see(prompt + answer)
            for i in range(self.n_layers):
                entered, attended, residual, added = (
                    torch.tensor(seen["lists"][i][part][-1]) for part in range(4)
                )
                after = self._log_prob(seen, attended + entered)
                attention[i] += (after - self._log_prob(seen, entered)).item()
                after = self._log_prob(seen, added + residual)
                ffn[i] += (after - self._log_prob(seen, residual)).item()

        def best(totals):
            ranked = sorted(([i, total] for i, total in enumerate(totals)), key=lambda x: x[1])
            return [i for i, _ in ranked[::-1]][:top_cnt]

        return best(attention), best(ffn)

    @torch.no_grad()
    def get_top_attribute_neurons_ffn(
        self, prompts, ground_truths, layer_idxs, student_dim, top=True
    ):
        scores = self.ffn_scores(prompts, ground_truths)
        return self._chosen(scores, layer_idxs, student_dim, top)

    @torch.no_grad()
    def get_top_attribute_neurons_attn(
        self, prompts, ground_truths, layer_idxs, student_dim, top=True
    ):
        scores = self.attention_scores(prompts, ground_truths)
        return self._chosen(scores, layer_idxs, student_dim, top)

    @torch.no_grad()
    def ffn_scores(self, prompts, ground_truths):
        """[blocks, neurons], of all prompts."""
        scores = torch.zeros(self.n_layers, self.ffn_width)
        for prompt, answer in zip(prompts, ground_truths, strict=False):
            seen, ranked = self._see(prompt + self._stripped(answer)), []
            parts = []
            for i, block in enumerate(self.model.model.layers):
                strengths = torch.tensor(seen["lists"][i][6][-1])
                parts.append((strengths * block.mlp.down_proj.weight.data).T)
            for i in range(self.n_layers):
                residual = torch.tensor(seen["lists"][i][2][-1])
                before = self._log_prob(seen, residual)
                increase = self._log_prob(seen, parts[i] + residual) - before
                for neuron, value in enumerate(increase):
                    ranked.append((f"{i}_{neuron}", value.item()))
            for name, value in sorted(ranked, key=lambda x: x[1])[::-1]:
                i, neuron = name.split("_")
                scores[int(i), int(neuron)] += round(value, 4)
        return scores

    @torch.no_grad()
    def attention_scores(self, prompts, ground_truths):
        """[blocks, neurons], of the last prompt."""
        scores = torch.zeros(self.n_layers, self.width)
        for prompt, answer in zip(prompts, ground_truths, strict=False):
            seen, ranked = self._see(prompt + self._stripped(answer)), []
            for i, block in enumerate(self.model.model.layers):
                entered = torch.tensor(seen["lists"][i][0])[-1]
                own = torch.tensor(seen["lists"][i][5])[:, -1]  # [H, hd]
                by_head = block.self_attn.o_proj.weight.data.T.unflatten(0, (self.n_head, -1))
                before = self._log_prob(seen, entered)
                after = self._log_prob(seen, by_head * own[..., None] + entered)
                for neuron, value in enumerate((after - before).flatten()):
                    ranked.append((f"{i}_{neuron}", value.item()))
                for name, value in sorted(ranked, key=lambda x: x[1])[::-1]:
                    at, neuron = name.split("_")
                    scores[int(at), int(neuron)] = round(value, 4)
        return scores

    @torch.no_grad()
    def extract_ffn_attn_knowledge(
        self,
        ffn_neurons,
        attn_neurons,
        extract_ffn_module=("down_proj", "up_proj"),
        extract_attn_module=("v_proj", "o_proj"),
    ):
        found = {}
        for half, neurons, names in (
            ("mlp", ffn_neurons, extract_ffn_module),
            ("self_attn", attn_neurons, extract_attn_module),
        ):
            for name in names or ():
                axis = 1 if name in ("down_proj", "o_proj") else 0
                parts = []
                for block in dict.fromkeys(at for at, _ in neurons):
                    some = torch.tensor([neuron for at, neuron in neurons if at == block])
                    weight = self._module(block, half, name).weight
                    parts.append(weight.index_select(axis, some.to(weight.device)))
                found[name] = torch.stack(parts).half()
        return found

    def knowledge_injection(
        self,
        teacher_weights,
        student_weights,
        ffn_layers=None,
        attn_layers=None,
        ffn_neurons=None,
        ffn_module=None,
        attn_neurons=None,
        attn_module=None,
    ):
        deltas = {}
        for half, neurons, blocks, names in (
            ("mlp", ffn_neurons, ffn_layers, ffn_module),
            ("self_attn", attn_neurons, attn_layers, attn_module),
        ):
            if neurons is None:
                continue
            for place, block in enumerate(blocks):
                some = [neuron for at, neuron in neurons if at == block]
                for name in names:
                    module = self._module(block, half, name)
                    delta = torch.zeros_like(module.weight, dtype=torch.float16).clone()
                    task = teacher_weights[name][place].half()
                    if name in ("down_proj", "o_proj"):
                        delta[:, some] = task
                    else:
                        delta[some] = task
                    module.delta = deltas[f"model.layers.{block}.{half}.{name}.delta"] = delta
        return deltas

    def _module(self, block, half, name):
        return getattr(getattr(self.model.model.layers[block], half), name)

    def _stripped(self, answer):
        while answer[-1] in PUNCTUATION:
            answer = answer[:-1]
        return answer

    def _see(self, text):
        tokens = self.tokenizer.encode(text)
        context = torch.tensor([tokens[:-1]]).to(self.device)
        flows = self.model(context, use_cache=True)[2]
        lists = [[part[0].tolist() for part in block[:7]] for block in flows]
        final = torch.tensor(lists[-1][4][-1])
        deviation = (final.var(-1, unbiased=False) + 1e-5) ** 0.5
        return {"lists": lists, "deviation": deviation, "target": tokens[-1]}

    def _log_prob(self, seen, rows):
        scaled = rows * torch.rsqrt(seen["deviation"] + 1e-6) * self.model.model.norm.weight.data
        logits = self.model.lm_head(scaled.half())
        return torch.nn.Softmax(-1)(logits)[..., seen["target"]].log()

    def _chosen(self, scores, layer_idxs, student_dim, top):
        order = torch.argsort(scores[layer_idxs], descending=top)[:, :student_dim].tolist()
        return [
            [block, neuron]
            for block, some in zip(layer_idxs, order, strict=True)
            for neuron in some
        ]
