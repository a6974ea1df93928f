# SPDX-License-Identifier: Apache-2.0
"""LaTen's training and inference in the published shape, on the CPU, written anew.

laten_script.py TEACHER STUDENT ROWS.jsonl OUT
"""

import json
import sys
from pathlib import Path

import torch
from knowledge_neurons import KnowledgeNeurons
from knowledge_translator import Knowledge_translator
from modified_llama import ModifiedLlama
from transformers import AutoTokenizer

BLOCKS = 2
FFN, ATTENTION = ["down_proj", "up_proj"], ["o_proj", "v_proj"]
STEPS, RATES = 2, (0.25, 0.5)


def located(kn, prompt, answer, rate, size, ffn_size):
    """Blocks, neurons and weights of one model."""
    attention, ffn = (sorted(b) for b in kn.get_top_attribute_layers(prompt, answer, BLOCKS))
    ffn_neurons = kn.get_top_attribute_neurons_ffn(
        prompt, answer, ffn, student_dim=int(ffn_size * rate), top=True
    )
    attn_neurons = kn.get_top_attribute_neurons_attn(
        prompt, answer, attention, student_dim=int(size * rate)
    )
    weights = kn.extract_ffn_attn_knowledge(
        ffn_neurons, attn_neurons, extract_ffn_module=FFN, extract_attn_module=ATTENTION
    )
    return attention, ffn, attn_neurons, ffn_neurons, weights


def inject(kn, translated, found):
    attention, ffn, attn_neurons, ffn_neurons, weights = found
    return kn.knowledge_injection(
        translated,
        weights,
        ffn_layers=ffn,
        attn_layers=attention,
        ffn_neurons=ffn_neurons,
        ffn_module=FFN,
        attn_neurons=attn_neurons,
        attn_module=ATTENTION,
    )


def main(teacher, student, rows, out):
    torch.manual_seed(42)
    rows = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    kns = []
    for folder in (teacher, student):
        model = ModifiedLlama.from_pretrained(folder, torch_dtype=torch.float16)
        kns.append(KnowledgeNeurons(model, AutoTokenizer.from_pretrained(folder), device="cpu"))
    teacher_kn, student_kn = kns
    config = student_kn.model.config
    sizes = config.hidden_size, config.intermediate_size
    translator = Knowledge_translator(
        FFN + ATTENTION,
        config.num_hidden_layers,
        teacher_kn.model.config.hidden_size,
        config.hidden_size,
    )
    with torch.no_grad():  # the published start is 0 in half precision for many steps
        for weight in translator.parameters():
            weight.mul_(2e4)
    optimizer = torch.optim.AdamW(translator.parameters(), lr=1e-3)
    log = []
    for row in rows[:STEPS]:
        prompt, answer = [row["prompt"]], [row["response"]]
        theirs = located(teacher_kn, prompt, answer, RATES[0], *sizes)
        ours = located(student_kn, prompt, answer, RATES[0], *sizes)
        losses = []
        for sample in rows:
            translated = translator(theirs[-1], theirs[1])
            penalty = sum(v.float().square().mean() for v in translated.values())
            deltas = inject(student_kn, translated, ours)
            ids = torch.tensor([student_kn.tokenizer.encode(sample["prompt"] + sample["response"])])
            loss = student_kn.model(input_ids=ids, labels=ids, return_dict=True).loss
            for key in deltas:
                delattr(student_kn.model.get_submodule(key.removesuffix(".delta")), "delta")
            (loss + penalty).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        log.append({"losses": losses, "neurons": [theirs[2:4], ours[2:4]]})
    prompt, answer = [rows[0]["prompt"]], [rows[0]["response"]]
    for rate in RATES:
        theirs = located(teacher_kn, prompt, answer, rate, *sizes)
        ours = located(student_kn, prompt, answer, rate, *sizes)
        with torch.no_grad():
            inject(student_kn, translator(theirs[-1], theirs[1]), ours)
        student_kn.model.save_pretrained(Path(out) / f"rate{rate}")
        log.append({"rate": rate, "neurons": [theirs[2:4], ours[2:4]]})
    (Path(out) / "log.json").write_text(json.dumps(log))
    torch.save(translator.state_dict(), Path(out) / "translator.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
