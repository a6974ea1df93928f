# SPDX-License-Identifier: Apache-2.0
"""An interrupted search goes on as it was shared out, whatever memory is free by then."""

import model_zoo
import pytest
from transformers import AutoModelForCausalLM

from pkt_ext.errors import InputError
from pkt_ext.methods import locating
from pkt_ext.methods.laten import LatenConfig, align
from pkt_ext.streaming import budget
from pkt_ext.streaming.progress import Progress

ROWS = [{"prompt": f"{i} + {i} =", "completion": str(2 * i)} for i in range(5)]


def test_what_touches_the_rounding_is_remembered(tmp_path, monkeypatch):
    model_zoo.save_pair(tmp_path, ROWS)
    config = LatenConfig(rate=0.2, steps=1, rows=2, device="cpu", prompt_format="plain")
    asked, fit, locate = [], budget.fit, locating.locate

    def fitting(*arguments, fixed, **options):
        asked.append(fixed)
        return fit(*arguments, fixed=fixed, **options)

    monkeypatch.setattr(locating, "fit", fitting)
    run = (tmp_path / "teacher", tmp_path / "student", ROWS, ROWS, tmp_path / "out", config)
    with monkeypatch.context() as patch:
        patch.setattr(locating, "locate", lambda *_, **__: 1 / 0)
        patch.setattr(Progress, "remove", lambda self: None)  # as a kill would leave it
        with pytest.raises(ZeroDivisionError):
            align(*run, progress=False)
    assert asked == [None]
    found = []
    monkeypatch.setattr(
        locating, "locate", lambda *a, **k: found.append(k["allotment"]) or locate(*a, **k)
    )
    align(*run, progress=False)
    assert asked[1:] == [{"micro_batch": 4, "head_rows": None}, None]
    assert [(each.micro_batch, each.head_rows) for each in found] == [(4, None)] * 2


def test_a_model_in_memory_leaves_an_earlier_runs_progress_alone(tmp_path):
    model_zoo.save_pair(tmp_path, ROWS)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    earlier = Progress(tmp_path / "out.progress", {"config": "another"})
    earlier.record("a step")
    config = LatenConfig(rate=0.2, steps=1, rows=2, device="cpu", prompt_format="plain")
    run = (tmp_path / "teacher", student, ROWS, ROWS, tmp_path / "out", config)
    with pytest.raises(InputError, match="progress of another run"):
        align(*run, progress=False)
    assert (tmp_path / "out.progress" / "journal.jsonl").is_file()
    align(*run, resume=False, progress=False)
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out"]
