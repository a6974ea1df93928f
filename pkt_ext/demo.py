# SPDX-License-Identifier: Apache-2.0
"""A small experiment with a known answer: do facts move from a teacher's weights into a student?

docs/demo.md says what is asked, which arms must differ, and why. Everything goes through the public
functions: `seeking.extract` or `lora.write_adapter`, then `finetune`, `lora.merge`, and a look at
the merged model.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import math
import os
import random
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from pkt_ext import artifact, demo_steering, demo_world, ops
from pkt_ext.demo_world import MODELS, DemoConfig, World
from pkt_ext.errors import InputError
from pkt_ext.finetune import FinetuneConfig, finetune
from pkt_ext.lora import Factor, merge, write_adapter
from pkt_ext.methods import laten, seeking
from pkt_ext.models.anatomy import describe

ARMS = {
    "raw": "raw student",
    "gaussian": "Gaussian LoRA",
    "pissa": "PiSSA LoRA",
    "seeking": "Seeking",
    "grown": "Seeking, best-case teacher",
    "shuffled": "Seeking, shuffled teacher (-)",  # negative control
    "laten": "LaTen",
    "semalign": "SemAlign",
    "injected": "injected difference (+)",  # positive control
}
MEASURES = {
    "extra": "teacher-only",  # recall
    "shared": "shared",  # recall
    "perplexity": "perplexity",
    "extra_old": "t-only, old",  # recall, in the wordings the models grew up with
    "shared_old": "shared, old",
}
LEGEND = (
    "Recall of teacher-only and shared facts (mean and standard deviation over seeds), perplexity "
    "of held-out answers; both in the wording of the fine-tune. Last: recall in old wordings."
)
_NO_PLOT = "No plot: it needs matplotlib, pip install 'pkt_ext[report]'."
EXPECTED = (
    "premise: in the old wordings teachers recall > 0.9 of both halves, the student > 0.9 of the "
    "shared half and < 0.25 of the teacher-only half",
    "must differ: the injected difference recalls >= 0.5 of the teacher-only facts in every seed, "
    "and >= 0.3 more than Gaussian LoRA in every seed",
    "must not differ: Seeking from a shuffled teacher recalls no more teacher-only facts than "
    "Gaussian LoRA",
    "must fall, or the verdict says so: the KL to the teacher on held-out rows, by every objective "
    "of SemAlign in every seed",
    "open: whether Seeking, Seeking from its best-case teacher, LaTen, SemAlign and PiSSA differ "
    "from Gaussian LoRA, and SemAlign's KL from that of distillation",
)


# --- the arms -------------------------------------------------------------------------------------


def transfer(
    arm: str, models: Path, world: World, seed: int, work: Path, config: DemoConfig
) -> tuple[Path, dict]:
    """Take one arm through its whole path: the folder of its model, and what the steps reported."""
    student, start = models / "student", None
    if arm == "raw":
        return student, {}
    details: dict = {}
    if arm in ("seeking", "grown", "shuffled"):
        teacher = models / ("grown" if arm == "grown" else "teacher")
        if arm == "shuffled":
            demo_world.shuffle(_load(teacher), seed).save_pretrained(work / "teacher")
            demo_world.make_tokenizer(world).save_pretrained(work / "teacher")
            teacher = work / "teacher"
        # they choose blocks and windows; none of them is fine-tuned on
        rows = demo_world.make_rows(world.extra, demo_world.OLD)
        rows = random.Random(seed).sample(rows, min(config.seed_rows, len(rows)))
        settings = seeking.SeekingConfig(
            rank=config.rank, alpha=config.rank, micro_batch=config.seed_rows, device="cpu"
        )
        start = work / "start"
        extracted = seeking.extract(teacher, student, rows, start, settings, progress=False)
        details = {name: extracted[name] for name in ("blocks", "block_scores", "windows")}
    elif arm == "laten":
        # each step's rows are learned from: none may hold what only the teacher was taught
        rows = demo_world.make_rows(world.tuned, demo_world.NEW)
        settings = laten.LatenConfig(
            rate=0.1,
            steps=config.align_steps,
            learning_rate=config.align_rate,
            micro_batch=config.seed_rows,
            gradient_checkpointing=False,
            device="cpu",
            seed=seed,
        )
        aligned = laten.align(
            models / "teacher", student, rows, rows, work / "delta", settings, progress=False
        )
        merge(student, work / "delta", work / "student", progress=False)
        student = work / "student"
        details = {name: aligned[name] for name in ("blocks", "unedited_losses", "delta_norms")}
        details["edited_losses"] = aligned["losses"]
    elif arm == "semalign":
        details["closeness"] = demo_steering.steer(models, world, seed, work, config)
        merge(student, work / demo_steering.SHOWN, work / "student", progress=False)
        student = work / "student"
    elif arm == "injected":
        start = work / "start"
        factors = difference(_load(models / "taught"), _load(student), config.rank)
        write_adapter(start, factors, alpha_over_rank=1.0, base_model=str(student))
    settings = FinetuneConfig(
        init="pissa" if arm == "pissa" else "gaussian",
        rank=config.rank,
        alpha=config.rank,
        dropout=0.05,
        max_steps=config.tune_steps,
        batch=config.tune_batch,
        micro_batch=config.tune_batch,
        learning_rate=config.tune_rate,
        gradient_checkpointing=False,
        device="cpu",
        seed=seed + 1,
    )
    rows = demo_world.make_rows(world.tuned, demo_world.NEW)
    tuned = finetune(student, start, rows, work / "adapter", settings, progress=False)
    merged = merge(student, work / "adapter", work / "model", progress=False)
    details |= {"losses": tuned["losses"], "survived": merged["survived"]}
    return work / "model", details


def _load(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def difference(taught, student, rank: int) -> dict[str, Factor]:
    """Truncated SVD of W_t - W_s for every matrix of two models of one shape, by module path."""
    anatomy = describe(student)
    paths = [anatomy.embedding, anatomy.head]
    for block, projections in zip(anatomy.blocks, anatomy.projections, strict=True):
        paths += [f"{block}.{p.module}" for p in projections]
    factors = {}
    for path in paths:
        embedding = path == anatomy.embedding
        delta = taught.get_submodule(path).weight - student.get_submodule(path).weight
        B, A = ops.lora_factors(delta.T.contiguous() if embedding else delta, rank)
        factors[path] = Factor(A=A, B=B, embedding=embedding)
    return factors


# --- what the numbers say -------------------------------------------------------------------------


def compare(results: list[dict], arm: str, other: str) -> dict:
    """Teacher-only recall of two arms, over all seeds.

    They differ when the sign is the same in every seed and the pooled counts are more than three
    standard errors apart (two proportions, pooled variance).
    """
    ours, theirs = ([r["arms"][a]["extra"] for r in results] for a in (arm, other))
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    asked = sum(r["facts"] for r in results)  # seeds ask equally many
    p = (statistics.fmean(ours) + statistics.fmean(theirs)) / 2
    error = math.sqrt(2 * p * (1 - p) / asked)
    gap = statistics.fmean(gaps)
    same_sign = all(g > 0 for g in gaps) or all(g < 0 for g in gaps)
    return {"gap": gap, "standard_error": error, "differs": same_sign and abs(gap) > 3 * error}


def judge(results: list[dict]) -> dict:
    """Hold the results against `EXPECTED`: what failed, and each arm against Gaussian LoRA."""
    failures = []
    for result in results:
        seed, arms, known = result["seed"], result["arms"], result["references"]
        for name, scores in known.items():
            halves = (scores["shared_old"], scores["extra_old"])
            knows = halves[0] > 0.9 and (halves[1] < 0.25 if name == "student" else halves[1] > 0.9)
            if not knows:
                failures.append(
                    f"premise, seed {seed}: {name} recalls {halves[0]:.2f} of the shared and "
                    f"{halves[1]:.2f} of the teacher-only half"
                )
        injected, gaussian = arms["injected"]["extra"], arms["gaussian"]["extra"]
        if injected < 0.5 or injected - gaussian < 0.3:
            failures.append(
                f"positive control, seed {seed}: the injected difference recalls {injected:.2f} "
                f"of the teacher-only facts, Gaussian LoRA {gaussian:.2f}"
            )
    against = {arm: compare(results, arm, "gaussian") for arm in ARMS if arm != "gaussian"}
    if against["shuffled"]["differs"] and against["shuffled"]["gap"] > 0:
        failures.append("negative control: a shuffled teacher brought teacher-only facts along")
    return {"conclusive": not failures, "failures": failures, "against_gaussian": against}


def summarise(results: list[dict]) -> dict[str, dict[str, tuple[float, float]]]:
    """Per arm and measure: mean and standard deviation over the seeds (0 for a single one)."""
    summary = {}
    for arm in ARMS:
        columns = {m: [r["arms"][arm][m] for r in results] for m in MEASURES}
        summary[arm] = {
            m: (statistics.fmean(c), statistics.stdev(c) if len(c) > 1 else 0.0)
            for m, c in columns.items()
        }
    return summary


def conclusion(summary: dict, verdict: dict) -> list[str]:
    """The verdict in sentences; a ranking only when the controls allow one."""
    if not verdict["conclusive"]:
        return ["inconclusive: this run cannot tell the methods apart.", *verdict["failures"]]
    lines = ["The controls hold. Teacher-only recall, highest first, against Gaussian LoRA:"]
    for arm in sorted(ARMS, key=lambda arm: -summary[arm]["extra"][0]):
        against = verdict["against_gaussian"].get(arm)
        if against is None:
            words = "the arm compared with"
        elif not against["differs"]:
            words = f"no difference (3 standard errors: {3 * against['standard_error']:.2f})"
        else:
            words = "higher" if against["gap"] > 0 else "lower"
        lines.append(f"  {summary[arm]['extra'][0]:.2f}  {ARMS[arm]}: {words}")
    return lines


def _table(summary: dict, seeds: int) -> list[list[str]]:
    rows = [["", *MEASURES.values()]]
    for arm, scores in summary.items():
        cells = (f"{mean:.2f}" + f" ± {sd:.2f}" * (seeds > 1) for mean, sd in scores.values())
        rows.append([ARMS[arm], *cells])
    return rows


def _print_table(rows: list[list[str]]) -> None:
    width = max(len(row[0]) for row in rows)
    for name, *cells in rows:
        print(name.ljust(width), *(cell.rjust(13) for cell in cells))


def plot(results: list[dict]) -> bytes | None:
    """A PNG of recalls and perplexity, a dot a seed; None where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    summary, names = summarise(results), list(ARMS.values())
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, key in zip(axes, ("extra", "shared", "perplexity"), strict=True):
        axis.barh(names, [summary[arm][key][0] for arm in ARMS], color="#9db8d2")
        for result in results:
            axis.plot([result["arms"][a][key] for a in ARMS], names, "o", color="#1f3b57", ms=4)
        axis.set_title(MEASURES[key] + " recall" * (key != "perplexity"), fontsize=10)
    axes[0].axvline(1 / results[0]["values"], color="#b0413e", lw=1, ls="--", label="chance")
    axes[0].legend(fontsize=8)
    axes[0].invert_yaxis()
    for axis in axes[:2]:
        axis.set_xlim(0, 1.05)
    axes[2].set_xlim(left=1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _page(
    table: list[list[str]],
    closer: list[list[str]],
    lines: list[str],
    report: dict,
    picture: bytes | None,
) -> str:
    def tags(tag: str, texts) -> str:
        return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)

    def html_table(rows: list[list[str]]) -> str:
        head, *rest = rows
        body = "".join(f"<tr>{tags('td', row)}</tr>" for row in rest)
        return f"<table><tr>{tags('th', head)}</tr>{body}</table>"

    image = tags("p", [_NO_PLOT])
    if picture:
        data = base64.b64encode(picture).decode()
        image = f'<img alt="recall and perplexity by arm" src="data:image/png;base64,{data}">'
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>pkt demo</title>
<style>
body {{ font: 15px/1.5 sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
td, th {{ padding: .3rem .8rem; text-align: left; border-bottom: 1px solid #ccc }}
img {{ max-width: 100% }} pre {{ white-space: pre-wrap }}
</style>
<h1>Does knowledge move?</h1>
<h2>Written down before running</h2><ol>{tags("li", EXPECTED)}</ol>
<h2>Measured</h2><p>{html.escape(LEGEND)}</p>
{html_table(table)}{image}
<p>{html.escape(demo_steering.LEGEND)}</p>{html_table(closer)}
<h2>Verdict</h2>{tags("pre", [chr(10).join(lines)])}
<h2>Every number</h2>
<details><summary>report.json</summary>{tags("pre", [json.dumps(report, indent=1)])}</details>
</html>
"""


# --- the demo -------------------------------------------------------------------------------------


class _Progress:
    """A line a finished step, with the time that is probably left."""

    def __init__(self, total: int, quiet: bool):
        self.total, self.quiet, self.done, self.start = total, quiet, 0, time.perf_counter()

    def __call__(self, message: str, cost: int = 1) -> None:
        self.done += cost
        spent = time.perf_counter() - self.start
        rest = spent * (self.total / self.done - 1) if self.done else 0
        if not self.quiet:
            print(f"[{spent:.0f} s" + f", about {rest:.0f} s left" * (rest > 0) + f"] {message}")


def run(
    out: str | os.PathLike,
    seeds: int = 3,
    *,
    config: DemoConfig | None = None,
    cache: str | os.PathLike | None = None,
    progress: bool = True,
) -> dict:
    """Run every arm on every seed, print a table and the verdict, write the reports into `out`.

    Args:
        out: folder for report.json, report.html and report.png, made or reused.
        seeds: how many worlds, with their own facts, split and initial weights.
        config: sizes and budgets.
        cache: where trained models are kept; None: `pkt_ext/demo` in the user's cache folder.
        progress: print a line a step.
    Returns:
        What report.json holds.
    Raises:
        InputError: fewer than one seed, or `out` cannot be a folder.
    """
    if seeds < 1:
        raise InputError(f"seeds is {seeds}; give at least 1")
    config, out = config or DemoConfig(), Path(out)
    if cache is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = Path(home) / "pkt_ext" / "demo"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {out}: {error.strerror}; choose another --out") from error
    for line in ("Written down before running:", *EXPECTED):
        print(line)
    tick = _Progress(seeds * (sum(MODELS.values()) + len(ARMS)), not progress)
    with _surroundings():
        results = [_one_seed(seed, config, Path(cache), tick) for seed in range(seeds)]
    summary, verdict = summarise(results), judge(results)
    lines, table = conclusion(summary, verdict), _table(summary, seeds)
    closeness = [result["details"]["semalign"]["closeness"] for result in results]
    closer = demo_steering.table(closeness)
    lines += demo_steering.conclusion(closeness)
    report = {
        "config": asdict(config) | {"seeds": seeds},
        "versions": artifact.versions(),
        "expected": EXPECTED,
        "results": results,
        "summary": summary,
        "verdict": verdict | {"text": lines},
        "seconds": time.perf_counter() - tick.start,
    }
    print("", LEGEND, "", sep="\n")
    _print_table(table)
    print("", demo_steering.LEGEND, "", sep="\n")
    _print_table(closer)
    print("", *lines, sep="\n")
    picture = plot(results)
    if picture is None:
        print(_NO_PLOT)
    else:
        (out / "report.png").write_bytes(picture)
    artifact.write_json(out / "report.json", report)
    (out / "report.html").write_text(_page(table, closer, lines, report, picture), encoding="utf-8")
    print(f"\n{out / 'report.html'} has the details.")
    return report


def _one_seed(seed: int, config: DemoConfig, cache: Path, tick) -> dict:
    world = demo_world.make_world(seed, config)
    tokenizer = demo_world.make_tokenizer(world)
    models = demo_world.models_of(world, seed, config, cache, tick)
    result = {
        "seed": seed,
        "facts": len(world.extra),
        "values": config.values,
        "references": {n: demo_world.measure(_load(models / n), tokenizer, world) for n in MODELS},
        "arms": {},
        "details": {},
    }
    for arm, name in ARMS.items():
        with tempfile.TemporaryDirectory(prefix="pkt_ext-") as work:
            folder, details = transfer(arm, models, world, seed, Path(work), config)
            result["arms"][arm] = demo_world.measure(_load(folder), tokenizer, world)
        result["details"][arm] = details
        tick(f"seed {seed}: {name} recalls {result['arms'][arm]['extra']:.2f} of what it lacked")
    return result


@contextlib.contextmanager
def _surroundings():
    """One thread, and no bars of transformers' for loading what is there at once.

    Matrices this small gain nothing from a second thread, and lose much where its core is busy.
    """
    from transformers.utils import logging as theirs

    shown, threads = theirs.is_progress_bar_enabled(), torch.get_num_threads()
    theirs.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if shown:
            theirs.enable_progress_bar()
