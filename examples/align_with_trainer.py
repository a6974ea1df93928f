# SPDX-License-Identifier: Apache-2.0
"""Align one block of a student with one of a teacher that has the same tokenizer.

python align_with_trainer.py STUDENT TEACHER ROWS.jsonl OUT BLOCK [STEPS]; blocks count from 0
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from pkt_ext import data
from pkt_ext.alignment_trainer import AlignmentTrainer
from pkt_ext.methods.layer_maps import published_map
from pkt_ext.models.anatomy import describe
from pkt_ext.models.frontier import activations
from pkt_ext.objectives import Objective, OutputDistillation, RelationGeometry

student, teacher, rows, out, block = sys.argv[1:6]
block, steps = int(block), int(sys.argv[6]) if len(sys.argv) > 6 else 48
args = TrainingArguments(f"{out}-progress", max_steps=steps, learning_rate=1e-4, report_to="none")
tokenizer = AutoTokenizer.from_pretrained(student)
student, teacher = (
    AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(args.device)
    for folder in (student, teacher)
)
ours, theirs = describe(student), describe(teacher)
source = published_map(len(theirs.blocks), len(ours.blocks))[block]  # at the same depth
encoded = data.encode(data.read_rows(rows), tokenizer, max_length=2048, stage="train")
items = []
for sample in encoded.samples:
    with torch.no_grad():
        found = activations(teacher, theirs, sample.input_ids[None].to(args.device), source)
    positions = (sample.labels[1:] != data.IGNORED).nonzero().flatten()
    added = found.after.float() - found.before.float()
    items.append(
        {
            "input_ids": sample.input_ids,
            "positions": positions,
            "layer": added[0].cpu()[positions],  # may be wider than the student
            "output": found.outputs[0].cpu()[positions],
        }
    )
student.requires_grad_(False)
student.get_submodule(ours.blocks[block]).requires_grad_(True)
heads = (  # without the rows behind the tokenizer's, which pad a head
    model.get_output_embeddings().weight.detach()[: len(tokenizer)] for model in (student, teacher)
)
distillation = OutputDistillation(*heads, cap=ours.logit_softcap, teacher_cap=theirs.logit_softcap)
trainer = AlignmentTrainer(
    student,
    args,
    objective=Objective(RelationGeometry(), distillation),
    block=block,
    train_dataset=items,
)
trainer.train()
student.save_pretrained(out)
tokenizer.save_pretrained(out)
