# SPDX-License-Identifier: Apache-2.0
"""The demo's second question: does steering bring a student closer to its teacher, and is it more
than a distillation of the same rows and steps does?"""

from __future__ import annotations

import statistics
from pathlib import Path

from pkt_ext import demo_world
from pkt_ext.demo_world import DemoConfig, World
from pkt_ext.methods import semalign

BASELINES = {"distillation": "logit distillation", "finetune": "fine-tuning"}
OBJECTIVES = {
    "cosine": "SemAlign, cosine",
    "fisher": "SemAlign, fisher",
    "geometry": "SemAlign, geometry",
    **BASELINES,
}
SHOWN = "geometry"  # the one that goes on as an arm
MEASURES = ("kl", "agreement")
LEGEND = (
    "Distance from the teacher on held-out shared facts: KL in nats a position, share of positions "
    "with the same most probable word. Same rows, steps and rate."
)


def steer(
    models: Path, world: World, seed: int, work: Path, config: DemoConfig
) -> dict[str, dict[str, float]]:
    """Steer the student by every objective; what each ended at, by objective, and the student.

    The adapters are left in `work`, named by objective. No row holds a teacher-only fact.
    """
    rows = demo_world.make_rows(world.tuned, demo_world.NEW)
    held = demo_world.make_rows(world.shared[len(world.tuned) :], demo_world.NEW)
    found = {}
    for objective in OBJECTIVES:
        settings = semalign.SemAlignConfig(
            objective=objective,
            schedule="frontier",
            steps=max(1, config.tune_steps // config.student[2]),
            batch=config.tune_batch,
            micro_batch=config.tune_batch,
            learning_rate=config.steer_rate,
            rank=config.rank,
            alpha=config.rank,
            gradient_checkpointing=False,
            map_cache="none",
            device="cpu",
            seed=seed,
        )
        report = semalign.align(
            models / "teacher",
            models / "student",
            rows,
            work / objective,
            settings,
            holdout=held,
            progress=False,
        )
        found.setdefault("student", report["before"])
        found[objective] = report["after"]
    return found


def table(closeness: list[dict]) -> list[list[str]]:
    """Rows of cells: means over the seeds, and the standard deviation of the KL."""
    rows = [["", "KL to teacher", "agreement"]]
    for key, name in {"student": "raw student", **OBJECTIVES}.items():
        kl, agreement = ([seed[key][measure] for seed in closeness] for measure in MEASURES)
        spread = f" ± {statistics.stdev(kl):.2f}" if len(closeness) > 1 else ""
        rows.append(
            [name, f"{statistics.fmean(kl):.2f}{spread}", f"{statistics.fmean(agreement):.2f}"]
        )
    return rows


def conclusion(closeness: list[dict]) -> list[str]:
    """Whether steering brought the student closer, and closer than the baselines, in sentences."""
    lines = []
    for objective in (key for key in OBJECTIVES if key not in BASELINES):
        moved = [seed[objective]["kl"] - seed["student"]["kl"] for seed in closeness]
        rose = [seed for seed, change in enumerate(moved) if not change < 0]
        word = f"rose in seeds {', '.join(map(str, rose))}" if rose else "fell in every seed"
        against = ", ".join(
            f"{_against(closeness, objective, key)} than by {name}"
            for key, name in BASELINES.items()
        )
        lines.append(
            f"{OBJECTIVES[objective]}: the KL to the teacher {word} "
            f"({statistics.fmean(moved):+.2f}), {against}"
        )
    return lines


def _against(closeness: list[dict], objective: str, baseline: str) -> str:
    gaps = [seed[objective]["kl"] - seed[baseline]["kl"] for seed in closeness]
    return "lower" if max(gaps) < 0 else "higher" if min(gaps) > 0 else "not always lower"
