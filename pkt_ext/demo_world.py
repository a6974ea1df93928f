# SPDX-License-Identifier: Apache-2.0
"""What the demo experiments on: a small language of facts, and tiny Llamas that were taught it."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import random
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pkt_ext import artifact
from pkt_ext.data import IGNORED, encode, read_rows

RELATIONS = ("home", "craft", "friend", "beast")
# wordings the models grow up with: question, and the answer that belongs to it
OLD = (
    ("what {r} has {e}", "{v}"),
    ("{e} : {r}", "it is {v}"),
    ("tell me which {r} {e} has", "{v} i think"),
    ("i ask about the {r} not of me but of {e}", "{e} has {v}"),
)
NEW = (("pray name unto us the {r} that {e} keeps", "{v}"),)  # the wording of the fine-tune


@dataclass(frozen=True)
class DemoConfig:
    """Sizes and budgets."""

    entities: int = 48
    values: int = 12  # per relation
    student: tuple[int, int, int] = (64, 128, 4)  # hidden size, intermediate size, blocks
    teacher: tuple[int, int, int] = (96, 192, 6)
    head_dim: int = 16
    batch: int = 64
    steps: int = 240  # of every training of a student or teacher
    rate: float = 3e-3  # from scratch
    teach_rate: float = 1e-3  # of a trained model that is taught the other half
    rank: int = 16
    tune_steps: int = 60
    tune_batch: int = 32
    tune_rate: float = 5e-4
    seed_rows: int = 32  # rows of an extraction
    align_steps: int = 20  # of LaTen's hypernetwork
    align_rate: float = 1e-2
    steer_rate: float = 2e-3  # of SemAlign and its baselines


MODELS = {"student": 2, "teacher": 5, "taught": 2, "grown": 5}  # relative times, for the estimate


# --- the language ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Facts (entity, relation, value), in two halves that have nothing in common."""

    shared: tuple[tuple[str, str, str], ...]  # known to teacher and student
    extra: tuple[tuple[str, str, str], ...]  # known to the teacher only
    values: frozenset[str]
    words: tuple[str, ...]  # the vocabulary without special tokens

    @property
    def tuned(self) -> tuple[tuple[str, str, str], ...]:
        """The shared facts whose rows are fine-tuned on; the others are held out."""
        return self.shared[: len(self.shared) * 3 // 4]


def make_world(seed: int, config: DemoConfig) -> World:
    """Draw names, facts and the split."""
    rng = random.Random(seed)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    plain = {w for q, a in OLD + NEW for w in f"{q} {a}".split() if "{" not in w} | {*RELATIONS}
    names: dict[str, None] = {}  # ordered, without repeats
    while len(names) < config.entities + len(RELATIONS) * config.values:
        word = "".join(rng.choices(syllables, k=rng.choice((2, 3))))
        if word not in plain:
            names[word] = None
    entities, rest = list(names)[: config.entities], list(names)[config.entities :]
    values = {r: rest[i :: len(RELATIONS)] for i, r in enumerate(RELATIONS)}
    facts = [(e, r, rng.choice(values[r])) for e in entities for r in RELATIONS]
    rng.shuffle(facts)
    half = len(facts) // 2
    return World(
        shared=tuple(facts[:half]),
        extra=tuple(facts[half:]),
        values=frozenset(rest),
        words=tuple(sorted(plain) + list(names)),
    )


def make_rows(facts: Iterable[tuple[str, str, str]], wordings) -> list[dict]:
    """Chat rows that ask every fact in every wording."""
    return [
        {"prompt": question.format(e=e, r=r), "completion": answer.format(e=e, v=v)}
        for question, answer in wordings
        for e, r, v in facts
    ]


def make_tokenizer(world: World):
    """One token a word, and a chat template: `<|user|> question <|assistant|> answer </s>`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "</s>", "<unk>", "<|user|>", "<|assistant|>")
    words = {word: i for i, word in enumerate(special + world.words)}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        model_max_length=64,
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|> ' + m.content }}"
        "{{ ' </s>' if m.role == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    return tokenizer


def padded(rows: list[dict], tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both int64 [rows, T], right-padded."""
    samples = encode(read_rows(rows), tokenizer, max_length=64, stage="train").samples
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([s.input_ids for s in samples], True, float(tokenizer.pad_token_id))
    return ids, pad([s.labels for s in samples], True, float(IGNORED))


# --- the models -----------------------------------------------------------------------------------


def make_model(
    shape: tuple[int, int, int], vocabulary: int, head_dim: int, seed: int, epsilon: float = 1e-6
):
    """A Llama with random weights; `shape` is hidden size, intermediate size, blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, blocks = shape
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=blocks,
            num_attention_heads=hidden // head_dim,
            num_key_value_heads=hidden // head_dim,
            head_dim=head_dim,
            max_position_embeddings=64,
            initializer_range=0.05,
            rms_norm_eps=epsilon,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


def train(model, tokenizer, rows: list[dict], *, steps: int, batch: int, rate: float, seed: int):
    """Train all weights on the answers of `rows`; returns the model."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    ids, labels = padded(rows, tokenizer)
    dataset = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch, max_steps=steps, per_device_train_batch_size=batch, learning_rate=rate,
            warmup_steps=steps // 10, weight_decay=0.01, seed=seed, use_cpu=True, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=dataset)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model.eval()


@torch.no_grad()
def grow(student, shape: tuple[int, int, int], seed: int):
    """A wider and deeper Llama that computes what `student` does.

    New residual coordinates, heads and neurons write zero, and read random; new blocks write zero.
    RMSNorm divides by the mean over all coordinates, so gains and epsilon absorb the ratio of the
    widths. Source: the idea of Chen et al., Net2Net (arXiv 1511.05641).
    """
    small = student.config
    ratio = small.hidden_size / shape[0]
    epsilon = small.rms_norm_eps * ratio
    grown = make_model(shape, small.vocab_size, small.head_dim, seed, epsilon)
    position = {i * shape[2] // small.num_hidden_layers: i for i in range(small.num_hidden_layers)}
    theirs = dict(student.named_parameters())
    for name, weight in grown.named_parameters():
        source = name
        if name.startswith("model.layers."):
            _, _, index, rest = name.split(".", 3)
            source = f"model.layers.{position.get(int(index))}.{rest}"
        if name.endswith("norm.weight"):
            weight.fill_(math.sqrt(ratio))
            if source in theirs:
                weight[: small.hidden_size] = theirs[source] * math.sqrt(ratio)
            continue
        if any(part in name for part in ("o_proj", "down_proj", "embed_tokens")):
            weight.zero_()  # whatever writes to the residual stream
        if source in theirs:
            rows, columns = theirs[source].shape
            weight[:rows, :columns] = theirs[source]
    return grown


@torch.no_grad()
def shuffle(model, seed: int):
    """A copy of `model` with the entries of every parameter permuted."""
    shuffled = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for weight in shuffled.parameters():
        order = torch.randperm(weight.numel(), generator=generator)
        weight.copy_(weight.flatten()[order].view_as(weight))
    return shuffled


def _build_models(folder: Path, world: World, seed: int, config: DemoConfig, tick) -> None:
    """Train the student and its teachers into `folder`/{student, teacher, taught, grown}."""
    tokenizer = make_tokenizer(world)
    vocabulary = len(tokenizer)
    shared, both = make_rows(world.shared, OLD), make_rows(world.shared + world.extra, OLD)

    def make(name: str, model, rows, rate):
        model = train(
            model, tokenizer, rows, steps=config.steps, batch=config.batch, rate=rate, seed=seed
        )
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        tick(f"seed {seed}: trained {name}", MODELS[name])
        return model

    student = make_model(config.student, vocabulary, config.head_dim, seed)
    student = make("student", student, shared, config.rate)
    teacher = make_model(config.teacher, vocabulary, config.head_dim, seed + 1)
    make("teacher", teacher, both, config.rate)
    make("taught", copy.deepcopy(student), both, config.teach_rate)
    make("grown", grow(student, config.teacher, seed), both, config.teach_rate)


def models_of(world: World, seed: int, config: DemoConfig, cache: Path, tick) -> Path:
    """The folder with the trained models of one seed, from the cache where it is there and sound.

    Its name is a hash of all that makes the models: settings, code and library versions.
    """
    import transformers

    makers = (make_world, make_rows, make_tokenizer, padded, make_model, train, grow, _build_models)
    recipe = [asdict(config), seed, RELATIONS, OLD, NEW, [inspect.getsource(f) for f in makers]]
    recipe += [torch.__version__, transformers.__version__]
    name = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    folder = cache / name
    if folder.is_dir() and not artifact.verify(folder):
        tick.total -= sum(MODELS.values())
        tick(f"seed {seed}: found trained models in {folder}", 0)
        return folder
    record = {"config": asdict(config) | {"seed": seed}}
    with artifact.publish(folder, kind="model", run=record, report={}, overwrite=True) as staging:
        _build_models(staging, world, seed, config, tick)
    return folder


@torch.no_grad()
def measure(model, tokenizer, world: World) -> dict[str, float]:
    """Recall of either half in either wording, and the perplexity of held-out answers.

    Recall is the share of facts whose value is the most probable token where the answer has it.
    """
    values = torch.tensor(tokenizer.convert_tokens_to_ids(sorted(world.values)))

    def predict(facts, wordings):
        ids, labels = padded(make_rows(facts, wordings), tokenizer)
        return model(input_ids=ids).logits[:, :-1].float(), labels[:, 1:]

    def recall(facts, wordings) -> float:
        logits, labels = predict(facts, wordings)
        return (logits.argmax(-1) == labels)[torch.isin(labels, values)].float().mean().item()

    logits, labels = predict(world.shared[len(world.tuned) :], NEW)
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED)
    return {
        "extra": recall(world.extra, NEW),
        "shared": recall(world.shared, NEW),
        "perplexity": loss.exp().item(),
        "extra_old": recall(world.extra, OLD),
        "shared_old": recall(world.shared, OLD),
    }
