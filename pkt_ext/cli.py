# SPDX-License-Identifier: Apache-2.0
"""The command line, `pkt`: each verb parses its options and calls the function of the same name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pkt_ext import console, recipes, verbs
from pkt_ext.errors import InputError
from pkt_ext.settings import read_yaml

app = typer.Typer(
    name="pkt",
    help="Move knowledge from a larger language model into a smaller one.",
    epilog="-v, -q and --debug (show the traceback of an error) go with every command.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the `pkt` script."""
    console.settle_environment()
    console.leave(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Run one command line; the exit code. Errors are reported on stderr and nowhere else."""
    return console.run(app, argv)


# --- options --------------------------------------------------------------------------------------
# Every option defaults to None, "not given": a value of --config stands then, else the default of
# the verb's configuration class, which is what the help shows. Second names are those of the
# published scripts.


def _option(*names: str, default: object = None, help: str):
    shown = "" if default is None else f" [default: {default}]"
    return typer.Option(*names, help=help + shown, show_default=False)


Config = Annotated[Path | None, _option("--config", help="YAML file of options; flags win.")]
Overwrite = Annotated[
    bool | None, _option("--overwrite/--no-overwrite", help="Replace an earlier output.")
]
Teacher = Annotated[str | None, _option("--teacher", help="Folder or hub id of the larger model.")]
Student = Annotated[
    str | None,
    _option(
        "--student",
        "--base_model",
        "--base-model-path",
        help="Folder or hub id of the smaller model.",
    ),
]
Data = Annotated[str | None, _option("--data", "--data_path", help="JSON lines: chat rows.")]
Out = Annotated[
    str | None, _option("--out", "--output_dir", "--target-model-path", help="Folder to make.")
]
Format = Annotated[
    str | None,
    _option("--prompt-format", default="auto", help="auto, published, chat or plain."),
]
Length = Annotated[
    int | None, _option("--max-length", "--cutoff_len", default=2048, help="Tokens kept of a row.")
]

Budget = Annotated[
    str | None,
    _option(
        "--budget",
        default="most of what is free",
        help="Memory of the device, 8GiB; on a CPU resident memory.",
    ),
]
Resume = Annotated[
    bool | None,
    _option("--resume/--no-resume", default=True, help="Go on from an interrupted run's progress."),
]
Device = Annotated[
    str | None, _option("--device", default="auto", help="cpu or cuda; auto: cuda if there is one.")
]
TeacherRevision = Annotated[
    str | None, _option("--teacher-revision", help="Branch, tag or commit on the hub.")
]
StudentRevision = Annotated[
    str | None, _option("--student-revision", help="Branch, tag or commit on the hub.")
]

# of an extraction
Rank = Annotated[int | None, _option("--rank", "--r", default=16, help="LoRA rank.")]
Attention = Annotated[
    bool | None, _option("--attention/--no-attention", default=True, help="Extract q, k, v, o.")
]
Mlp = Annotated[
    bool | None, _option("--mlp/--no-mlp", default=True, help="Extract gate, up, down.")
]
Embeddings = Annotated[
    bool | None,
    _option("--embeddings/--no-embeddings", default=True, help="Extract embedding and head."),
]
Vocabulary = Annotated[
    str | None,
    _option("--vocabulary", default="identical", help="identical, or shared: common tokens."),
]
TeacherDtype = Annotated[
    str | None, _option("--dtype", default="the checkpoint's", help="float32, bfloat16 or float16.")
]
MicroBatch = Annotated[
    int | None, _option("--micro-batch", default=4, help="Rows a forward takes at once.")
]
Svd = Annotated[str | None, _option("--svd", default="converged", help="converged, fast or exact.")]

# of LaTen
Rate = Annotated[
    float | None,
    _option("--rate", "--transfer_rate", default=0.1, help="Share of a block's neurons."),
]
Modules = Annotated[str | None, _option("--modules", default="up,down,v,o", help="What moves.")]
Blocks = Annotated[
    int | None, _option("--blocks", help="Kept in both models [default: the smaller one's].")
]
Mode = Annotated[
    str | None, _option("--mode", default="top", help="Of scoring: top, all or first-order.")
]
Compat = Annotated[
    str | None, _option("--compat", help="published: the released scripts' ranking.")
]
Steps = Annotated[
    int | None, _option("--steps", help="Optimiser steps [default: one for each located row].")
]
Rows = Annotated[
    int | None, _option("--rows", default=16, help="Rows of a step, the located one included.")
]
KeepCheckpoints = Annotated[
    bool | None,
    _option(
        "--keep-checkpoints/--no-keep-checkpoints",
        default=False,
        help="Leave every step's hypernetwork in the output.",
    ),
]

# of SemAlign
Objective = Annotated[
    str | None,
    _option(
        "--objective",
        default="cosine",
        help="cosine, fisher or geometry; baselines: finetune, distillation.",
    ),
]
Schedule = Annotated[
    str | None,
    _option(
        "--schedule",
        help="pairs (critical blocks) or frontier (every block) [default: the objective's].",
    ),
]
Critical = Annotated[
    int | None, _option("--critical", default=4, help="Teacher blocks that pairs are made for.")
]
Train = Annotated[
    str | None, _option("--train", default="lora", help="lora, or block: its own weights.")
]
Output = Annotated[
    str | None,
    _option("--output", help="onehot, kl, ce or none [default: the objective's]."),
]
Pairing = Annotated[
    str | None,
    _option(
        "--pairing",
        help="published, attribution or similarity [default: the schedule's].",
    ),
]
AttributionRows = Annotated[
    int | None, _option("--attribution-rows", default=64, help="Rows to attribute by.")
]
Looks = Annotated[
    str | None,
    _option(
        "--positions",
        help="Where the layer loss looks: supervised or all [default: the objective's].",
    ),
]
PhaseSteps = Annotated[
    int | None,
    _option("--steps", help="Optimiser steps of a phase [default: 50; of pairs, by --epochs]."),
]

# of a training
Batch = Annotated[
    int | None, _option("--batch", "--batch_size", default=64, help="Rows a step averages.")
]
FourBit = Annotated[
    bool | None,
    _option("--load-in-4bit/--no-load-in-4bit", default=False, help="NF4 by bitsandbytes."),
]
Inputs = Annotated[
    bool | None,
    _option(
        "--train-on-inputs/--no-train-on-inputs",
        default=False,
        help="Take the loss on prompts too.",
    ),
]
Checkpointing = Annotated[
    bool | None,
    _option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        default=True,
        help="Recompute activations in the backward pass.",
    ),
]


def _settings(ctx: typer.Context) -> dict:
    """What was given: the flags over the file of --config."""
    given = {key: value for key, value in ctx.params.items() if value is not None}
    path = given.pop("config", None)
    if path is None:
        return given
    return read_yaml(path, known=ctx.params.keys() - {"config"}) | given


# --- verbs ----------------------------------------------------------------------------------------


@app.command("plan")
def plan_command(
    ctx: typer.Context,
    method: Annotated[
        str | None, _option("--method", default="seeking", help="seeking, laten or semalign.")
    ] = None,
    teacher: Teacher = None,
    student: Student = None,
    samples: Annotated[
        int | None,
        _option("--samples", default=32, help="Rows, each of --max-length tokens, to plan for."),
    ] = None,
    data: Annotated[
        str | None, _option("--data", "--data_path", help="Plan for these seed rows instead.")
    ] = None,
    max_length: Length = None,
    prompt_format: Format = None,
    rank: Rank = None,
    attention: Attention = None,
    mlp: Mlp = None,
    embeddings: Embeddings = None,
    vocabulary: Vocabulary = None,
    dtype: TeacherDtype = None,
    device: Annotated[
        str | None,
        _option("--device", default="auto", help="cpu, or cuda: with --budget no card is needed."),
    ] = None,
    micro_batch: MicroBatch = None,
    budget: Budget = None,
    svd: Svd = None,
    rate: Rate = None,
    modules: Modules = None,
    blocks: Blocks = None,
    mode: Mode = None,
    compat: Compat = None,
    steps: Steps = None,
    rows: Rows = None,
    keep_checkpoints: KeepCheckpoints = None,
    objective: Objective = None,
    output: Output = None,
    schedule: Schedule = None,
    pairing: Pairing = None,
    critical: Critical = None,
    attribution_rows: AttributionRows = None,
    positions: Looks = None,
    train: Train = None,
    batch: Batch = None,
    train_dtype: Annotated[
        str | None, _option("--train-dtype", help="As pkt finetune --dtype.")
    ] = None,
    load_in_4bit: FourBit = None,
    gradient_checkpointing: Checkpointing = None,
    probe: Annotated[
        bool | None,
        _option("--probe/--no-probe", default=True, help="Run one block for a moment: times."),
    ] = None,
    json: Annotated[bool | None, _option("--json/--no-json", help="As JSON.")] = None,
    teacher_revision: TeacherRevision = None,
    student_revision: StudentRevision = None,
    config: Config = None,
) -> None:
    """Say what a transfer will take: memory, disk, traffic and time, from headers alone."""
    verbs.plan(_settings(ctx))


@app.command("seeking")
def seeking_command(
    ctx: typer.Context,
    teacher: Teacher = None,
    student: Student = None,
    data: Data = None,
    out: Out = None,
    rank: Rank = None,
    alpha: Annotated[float | None, _option("--alpha", default=16, help="LoRA alpha.")] = None,
    dropout: Annotated[
        float | None, _option("--dropout", default=0.05, help="LoRA dropout of the later training.")
    ] = None,
    max_length: Length = None,
    prompt_format: Format = None,
    attention: Attention = None,
    mlp: Mlp = None,
    embeddings: Embeddings = None,
    vocabulary: Vocabulary = None,
    dtype: TeacherDtype = None,
    device: Device = None,
    micro_batch: MicroBatch = None,
    budget: Budget = None,
    nonfinite: Annotated[
        str | None,
        _option(
            "--nonfinite", default="error", help="error, or skip-sample: leave out a row with NaN."
        ),
    ] = None,
    svd: Svd = None,
    seed: Annotated[int | None, _option("--seed", default=0, help="Of the SVD's start.")] = None,
    export: Annotated[
        str | None, _option("--export", help="residual-model: also write W - eta B0 A0.")
    ] = None,
    teacher_revision: TeacherRevision = None,
    student_revision: StudentRevision = None,
    overwrite: Overwrite = None,
    resume: Resume = None,
    config: Config = None,
) -> None:
    """Extract a LoRA start for the student from the teacher (Seeking, ICLR 2024)."""
    verbs.seeking(_settings(ctx))


@app.command("laten")
def laten_command(
    ctx: typer.Context,
    teacher: Teacher = None,
    student: Student = None,
    locate: Annotated[
        str | None, _option("--locate", help="JSON lines: rows to locate by, a step for each.")
    ] = None,
    align: Annotated[
        str | None, _option("--align", help="JSON lines: rows that the student's loss is taken on.")
    ] = None,
    holdout: Annotated[
        str | None, _option("--holdout", help="JSON lines: rows to choose the step by.")
    ] = None,
    out: Out = None,
    rate: Rate = None,
    modules: Modules = None,
    blocks: Blocks = None,
    mode: Mode = None,
    compat: Compat = None,
    neurons: Annotated[
        str | None, _option("--neurons", default="located", help="located, or random: a baseline.")
    ] = None,
    steps: Steps = None,
    rows: Rows = None,
    learning_rate: Annotated[
        float | None, _option("--learning-rate", "--lr", default=3e-5, help="The highest.")
    ] = None,
    schedule: Annotated[
        str | None, _option("--schedule", default="onecycle", help="onecycle or constant.")
    ] = None,
    cycle_momentum: Annotated[
        bool | None,
        _option(
            "--cycle-momentum/--no-cycle-momentum", default=True, help="onecycle moves beta1 too."
        ),
    ] = None,
    beta1: Annotated[float | None, _option("--beta1", default=0.9, help="AdamW's.")] = None,
    beta2: Annotated[float | None, _option("--beta2", default=0.95, help="AdamW's.")] = None,
    weight_decay: Annotated[
        float | None, _option("--weight-decay", default=0.05, help="AdamW's.")
    ] = None,
    regulariser: Annotated[
        float | None,
        _option("--regulariser", default=1000, help="Weight of what is injected, squared."),
    ] = None,
    reduction: Annotated[
        str | None, _option("--reduction", default="sum", help="Over a step's rows: sum or mean.")
    ] = None,
    patience: Annotated[
        int | None, _option("--patience", help="Stop after so many steps without a better one.")
    ] = None,
    inject_step: Annotated[
        int | None,
        _option(
            "--inject-step", help="Step to inject [default: the best held out, else the last]."
        ),
    ] = None,
    keep_checkpoints: KeepCheckpoints = None,
    max_length: Annotated[
        int | None,
        _option("--max-length", "--cutoff_len", default=1024, help="Tokens of a row."),
    ] = None,
    train_on_inputs: Inputs = None,
    prompt_format: Format = None,
    dtype: Annotated[
        str | None,
        _option("--dtype", default="the checkpoints'", help="float32, bfloat16 or float16."),
    ] = None,
    device: Device = None,
    micro_batch: MicroBatch = None,
    budget: Budget = None,
    gradient_checkpointing: Checkpointing = None,
    seed: Annotated[
        int | None, _option("--seed", default=42, help="Of the order of rows and the start.")
    ] = None,
    export: Annotated[
        str | None, _option("--export", help="adapter: also write a PEFT adapter.")
    ] = None,
    teacher_revision: TeacherRevision = None,
    student_revision: StudentRevision = None,
    overwrite: Overwrite = None,
    resume: Resume = None,
    config: Config = None,
) -> None:
    """Translate a teacher's knowledge neurons into changes of the student (LaTen, ACL 2025)."""
    verbs.laten(_settings(ctx))


@app.command("semalign")
def semalign_command(
    ctx: typer.Context,
    teacher: Teacher = None,
    student: Student = None,
    data: Data = None,
    holdout: Annotated[
        str | None, _option("--holdout", help="JSON lines: rows to look at only.")
    ] = None,
    unrelated: Annotated[
        str | None, _option("--unrelated", help="JSON lines: rows whose perplexity is looked at.")
    ] = None,
    out: Out = None,
    objective: Objective = None,
    output: Output = None,
    beta: Annotated[
        float | None, _option("--beta", default=1, help="Weight of the output loss.")
    ] = None,
    temperature: Annotated[
        float | None, _option("--temperature", default=1, help="Of kl and fisher.")
    ] = None,
    schedule: Schedule = None,
    pairing: Pairing = None,
    attribution: Annotated[
        str | None,
        _option(
            "--attribution",
            help="Gradient times output or contribution [default: the objective's].",
        ),
    ] = None,
    critical: Critical = None,
    attribution_rows: AttributionRows = None,
    interpolate: Annotated[
        bool | None,
        _option(
            "--interpolate/--no-interpolate",
            default=True,
            help="Pairs: targets between two teacher blocks.",
        ),
    ] = None,
    interface: Annotated[
        str | None,
        _option("--interface", help="contribution or output [default: the objective's]."),
    ] = None,
    positions: Looks = None,
    map: Annotated[
        str | None, _option("--map", help="frames or least-squares [default: the objective's].")
    ] = None,
    fold_norm: Annotated[
        bool | None,
        _option(
            "--fold-norm/--no-fold-norm",
            default=True,
            help="The final norm's gain belongs to the head.",
        ),
    ] = None,
    train: Train = None,
    modules: Annotated[
        str | None, _option("--modules", default="up,down,v,o", help="With LoRA on them.")
    ] = None,
    rank: Rank = None,
    alpha: Annotated[float | None, _option("--alpha", default=16, help="LoRA alpha.")] = None,
    dropout: Annotated[float | None, _option("--dropout", default=0, help="LoRA dropout.")] = None,
    steps: PhaseSteps = None,
    epochs: Annotated[
        float | None, _option("--epochs", default=5, help="Pairs: passes over the rows a phase.")
    ] = None,
    batch: Batch = None,
    micro_batch: MicroBatch = None,
    learning_rate: Annotated[
        float | None,
        _option("--learning-rate", "--lr", help="Peak [default: 3e-4 of cosine, else 1e-4]."),
    ] = None,
    warmup: Annotated[
        float | None, _option("--warmup", default=0.03, help="Share of steps the rate rises in.")
    ] = None,
    hold_out: Annotated[
        float | None,
        _option("--hold-out", default=0.1, help="Share of rows held out without --holdout."),
    ] = None,
    max_length: Annotated[
        int | None, _option("--max-length", default=1024, help="Tokens kept of a row.")
    ] = None,
    train_on_inputs: Inputs = None,
    prompt_format: Format = None,
    dtype: Annotated[
        str | None,
        _option("--dtype", default="the checkpoints'", help="float32, bfloat16 or float16."),
    ] = None,
    device: Device = None,
    budget: Budget = None,
    gradient_checkpointing: Checkpointing = None,
    map_cache: Annotated[
        str | None,
        _option("--map-cache", default="auto", help="Folder for maps; auto: the user's; none."),
    ] = None,
    seed: Annotated[
        int | None, _option("--seed", default=42, help="Of start, order, what is held out.")
    ] = None,
    teacher_revision: TeacherRevision = None,
    student_revision: StudentRevision = None,
    overwrite: Overwrite = None,
    resume: Resume = None,
    config: Config = None,
) -> None:
    """Steer the student towards the teacher's hidden states (SemAlign, 2025 and 2026)."""
    verbs.semalign(_settings(ctx))


@app.command("finetune")
def finetune_command(
    ctx: typer.Context,
    student: Student = None,
    adapter: Annotated[
        str | None,
        _option("--adapter", help="A Seeking start, or an adapter to go on from; none: --init."),
    ] = None,
    data: Data = None,
    out: Out = None,
    epochs: Annotated[
        float | None, _option("--epochs", "--num_epochs", default=3, help="Passes over the data.")
    ] = None,
    max_steps: Annotated[
        int | None, _option("--max-steps", help="Optimiser steps, instead of --epochs.")
    ] = None,
    batch: Batch = None,
    micro_batch: Annotated[
        int | None,
        _option(
            "--micro-batch",
            "--micro_batch_size",
            help="Rows at a time, a divisor of --batch [default: the largest that fits].",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        _option("--learning-rate", "--learning_rate", default=0.0003, help="Of AdamW, peak."),
    ] = None,
    schedule: Annotated[
        str | None,
        _option(
            "--schedule", default="linear", help="linear, cosine, constant, constant_with_warmup."
        ),
    ] = None,
    warmup: Annotated[
        float | None, _option("--warmup", default=0.03, help="Share of steps the rate rises in.")
    ] = None,
    max_length: Length = None,
    prompt_format: Format = None,
    init: Annotated[
        str | None,
        _option("--init", default="gaussian", help="Without --adapter: gaussian or pissa."),
    ] = None,
    rank: Annotated[
        int | None, _option("--rank", "--lora_r", default=16, help="Of a new adapter.")
    ] = None,
    alpha: Annotated[
        float | None, _option("--alpha", "--lora_alpha", default=16, help="Of a new adapter.")
    ] = None,
    dropout: Annotated[
        float | None,
        _option("--dropout", "--lora_dropout", help="[default: the adapter's, else 0.05]."),
    ] = None,
    embeddings: Annotated[
        bool | None,
        _option("--embeddings/--no-embeddings", default=True, help="A new adapter on them too."),
    ] = None,
    dtype: Annotated[
        str | None,
        _option("--dtype", help="[default: bfloat16 on CUDA, float32 on the CPU]."),
    ] = None,
    load_in_4bit: FourBit = None,
    gradient_checkpointing: Checkpointing = None,
    device: Device = None,
    budget: Budget = None,
    seed: Annotated[
        int | None, _option("--seed", default=1, help="Of start, order, dropout.")
    ] = None,
    student_revision: StudentRevision = None,
    overwrite: Overwrite = None,
    config: Config = None,
) -> None:
    """Train an adapter for the student, from a start or from scratch (transformers' Trainer)."""
    verbs.finetune(_settings(ctx))


@app.command("merge")
def merge_command(
    ctx: typer.Context,
    student: Student = None,
    adapter: Annotated[
        str | None, _option("--adapter", "--lora-path", help="Folder or hub id of the adapter.")
    ] = None,
    out: Out = None,
    dtype: Annotated[
        str | None,
        _option("--dtype", default="the student's", help="float32 (exact), bfloat16 or float16."),
    ] = None,
    student_revision: StudentRevision = None,
    overwrite: Overwrite = None,
    config: Config = None,
) -> None:
    """Write student and adapter as one complete model."""
    verbs.merge(_settings(ctx))


@app.command("convert")
def convert_command(
    source: Annotated[str, typer.Argument(help="Folder or hub id with .bin weights.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    revision: Annotated[
        str | None, _option("--revision", help="Branch, tag or commit on the hub.")
    ] = None,
    overwrite: Overwrite = None,
) -> None:
    """Rewrite a checkpoint of pickled .bin files as safetensors."""
    from pkt_ext.streaming.convert import convert

    convert(source, out, revision=revision, overwrite=bool(overwrite), progress=console.progress())
    typer.echo(f"{out}: written as safetensors")


@app.command("transfer")
def transfer_command(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see recipes/.")],
    teacher: Teacher = None,
    student: Student = None,
    out: Out = None,
    overwrite: Overwrite = None,
) -> None:
    """Run all stages of a recipe: extract, finetune, merge; each equals its verb.

    A stage that an earlier run of the same recipe finished is kept.
    """
    given = {"teacher": teacher, "student": student, "out": out}
    content = read_yaml(recipe, known={"method", *given, *recipes.STAGES})
    recipes.transfer(content | {k: v for k, v in given.items() if v is not None}, bool(overwrite))


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("pkt-demo"),
    seeds: Annotated[int, typer.Option(help="Worlds, each with its own facts and models.")] = 3,
    cache: Annotated[
        Path | None, _option("--cache", help="Folder that keeps the trained models.")
    ] = None,
) -> None:
    """Teach a tiny teacher facts, move them into a student, print what arrived."""
    from pkt_ext import demo

    demo.run(out, seeds, cache=cache, progress=console.progress())


@app.command("bench")
def bench_command(
    stems: Annotated[
        list[str] | None,
        typer.Argument(
            help="sensitivity, max_window, low_rank, small_svd, neuron_score, alignment, "
            "streaming; none: all."
        ),
    ] = None,
    device: Device = None,
    size: Annotated[
        str | None,
        _option("--size", default="default", help="small, default (under 3 minutes) or full."),
    ] = None,
    json_file: Annotated[
        Path | None, _option("--json", help="File for every figure, machine and versions.")
    ] = None,
    plot: Annotated[Path | None, _option("--plot", help="PNG file for the roofline.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        _option("--compare", help="Two --json files, old and new: what moved. Measures nothing."),
    ] = None,
) -> None:
    """Time the kernels against torch, the published way and this machine's limits."""
    if compare is not None:
        verbs.compare(*compare, {"stems": stems, "json": json_file, "plot": plot})
    else:
        verbs.bench(stems or [], device or "auto", size or "default", json_file, plot)


@app.command("verify")
def verify_command(folder: Annotated[Path, typer.Argument(help="An output of pkt.")]) -> None:
    """Compare an output, file by file, with the hashes of its manifest."""
    from pkt_ext import artifact

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the --out of a finished pkt run")
    problems = artifact.verify(folder)
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise InputError(f"{folder} is damaged: {problems[0]}{more}; repeat the run that made it")
    typer.echo(f"{folder}: complete, every hash matches")


@app.command("info")
def info_command(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Print what was built and what runs here."""
    from pkt_ext.build_info import info

    facts = info()
    if as_json:
        typer.echo(json.dumps(facts, indent=2, default=str))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        typer.echo(f"{key:<{width}}  {shown}")


if __name__ == "__main__":
    main()
