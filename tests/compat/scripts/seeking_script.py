# SPDX-License-Identifier: Apache-2.0
"""A script of ParaKnowTransfer's shape, written anew: what it defines, and how `main` uses it.

Slow on purpose, as scripts of its kind are: every function does in plain Python and torch what the
published one is described to do, so its results are the truth for those that replace it.
"""

import argparse
import gc
import json
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

LORA_PARA = {
    "7b": {"dim": 32, "ffn": 48, "n_layer": 2},
    "13b": {"dim": 48, "ffn": 80, "n_layer": 3},
}


def compute_summed_area_table(matrix):
    return matrix.cumsum(dim=0).cumsum(dim=1)


def sum_submatrix(sum_area_table, top_left, bottom_right):
    def at(i, j):
        return sum_area_table[i, j] if i >= 0 and j >= 0 else 0

    (i0, j0), (i1, j1) = top_left, bottom_right
    return at(i1, j1) - at(i0 - 1, j1) - at(i1, j0 - 1) + at(i0 - 1, j0 - 1)


def max_sens_submatrix(sens, tgt_x, tgt_y):
    table = compute_summed_area_table(sens)
    best, where = float("-inf"), (0, 0)
    for i in range(sens.shape[0] - tgt_x + 1):
        for j in range(sens.shape[1] - tgt_y + 1):
            here = sum_submatrix(table, (i, j), (i + tgt_x - 1, j + tgt_y - 1))
            if here > best:
                best, where = here, (i, j)
    return where, (where[0] + tgt_x - 1, where[1] + tgt_y - 1)


def render(messages, eos):
    ends = {"system": "\n\n", "user": "\n\n", "assistant": eos}
    return "".join(f"<|{m['role']}|>\n{m['content'].strip()}{ends[m['role']]}" for m in messages)


def calculate_sensitivity(model, tokenizer, data, device="cpu", loss_on_output=True):
    def encode(text):
        return tokenizer(text, truncation=True, max_length=2048, return_tensors="pt").input_ids

    whole = encode(render(data["messages"], tokenizer.eos_token))
    labels = whole.clone()
    if loss_on_output:
        asked = render(data["messages"][:-1], tokenizer.eos_token) + "<|assistant|>\n"
        labels[:, : encode(asked).shape[1]] = -100
    model.zero_grad()
    model(input_ids=whole, labels=labels).loss.backward()
    found = {
        name: (p * p.grad).abs().detach()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    model.zero_grad()
    gc.collect()
    return found


def select_top_k_layers(sensitivity, args):
    totals = defaultdict(float)
    for name, score in sensitivity.items():
        if "layers" in name:
            totals[name.split(".")[2]] += score.sum().item()
    ranked = sorted(totals.items(), key=lambda item: -item[1])
    print(ranked)
    return sorted(int(block) for block, _ in ranked[: LORA_PARA[args.lora_size]["n_layer"]])


def resize_params(params, sens, tgt_x, tgt_y):
    if tgt_x > params.size(0) or tgt_y > params.size(1):
        raise ValueError("the window is larger than the matrix")
    if params.shape != sens.shape:
        raise ValueError("two shapes")
    (i0, j0), (i1, j1) = max_sens_submatrix(sens, tgt_x, tgt_y)
    return params[i0 : i1 + 1, j0 : j1 + 1]


def svd(mat, r):
    u, s, vh = torch.linalg.svd(mat)
    return (u[:, :r] @ torch.diag(s[:r])).half(), vh[:r].half()


def main(args):
    out = Path("extracted_lora", f"{args.model_size}-to-{args.lora_size}-{args.task}")
    out.mkdir(parents=True)
    folder = f"meta-llama/Llama-2-{args.model_size}-hf"
    model = LlamaForCausalLM.from_pretrained(folder, low_cpu_mem_usage=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = Path("data", args.task, f"sample_{args.task}.jsonl").read_text().splitlines()

    sensitivity = {}
    for row in map(json.loads, rows):
        for name, score in calculate_sensitivity(model, tokenizer, row, "cpu").items():
            if name in sensitivity:
                sensitivity[name] += score
            else:
                sensitivity[name] = score
        gc.collect()

    kept = select_top_k_layers(sensitivity, args)
    print("kept", kept)
    weights, small = model.state_dict(), LORA_PARA[args.lora_size]
    d, f, vocab = small["dim"], small["ffn"], model.config.vocab_size
    sizes = {name: (d, d) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    sizes |= {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
    lora = {}

    def cut(key, size, target, names=("lora_A.weight", "lora_B.weight"), turn=lambda x: x):
        b, a = svd(resize_params(turn(weights[key]), turn(sensitivity[key]), *size), args.r)
        lora[f"base_model.model.{target}.{names[0]}"] = a
        lora[f"base_model.model.{target}.{names[1]}"] = b

    if args.include_emb:
        own = ("lora_embedding_A", "lora_embedding_B")
        key = "model.embed_tokens.weight"
        cut(key, (d, vocab), "model.embed_tokens", own, lambda x: x.t())
    for number, block in enumerate(kept):
        for part, size in sizes.items():
            home = "self_attn" if part in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            key = f"model.layers.{block}.{home}.{part}.weight"
            cut(key, size, f"model.layers.{number}.{home}.{part}")
    if args.include_emb:
        cut("lm_head.weight", (vocab, d), "lm_head")
    torch.save(lora, out / "adapter_model.bin")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_size", default="13b")
    parser.add_argument("--lora_size", default="7b")
    parser.add_argument("--task", default="gsm")
    parser.add_argument("--r", default=16, type=int)
    parser.add_argument("--include_emb", default=True, type=lambda x: x.lower() == "true")
    main(parser.parse_args())
