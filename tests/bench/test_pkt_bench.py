# SPDX-License-Identifier: Apache-2.0
"""`pkt bench` end to end on tiny cases: what it prints and writes, comparisons, bad input."""

import copy
import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pkt_ext import cli
from pkt_ext.bench import cases, ceilings, compare, contest, machine, report, roofline, run
from pkt_ext.bench.sensitivity import Elementwise
from pkt_ext.errors import InputError

ARGV = ["bench", "max_window", "--size", "small", "--device", "cpu"]


@pytest.fixture(autouse=True)
def quick(any_threads, monkeypatch):
    """Small ceilings, one thread: nothing here depends on how fast anything is."""
    torch.set_num_threads(1)
    monkeypatch.setattr(ceilings, "match", lambda *_: SimpleNamespace(lap=lambda _: None))
    monkeypatch.setattr(ceilings, "read", lambda _: copy.deepcopy(LIMITS))


LIMITS = {
    name: {"unit": unit, "per_second": 1e9, "seconds": [0.01, 0.01],
           "quantiles": contest.quantiles([0.01, 0.01])}
    for name, unit in (("copy", "bytes"), ("float32", "flops"), ("bfloat16", "flops"))
}  # fmt: skip


def entry(name, role, samples, **changed):
    """One contestant's result, as a run would have it."""
    result = contest.Result(
        name=name, role=role, seconds=samples, repeats=1, quantiles=contest.quantiles(samples),
        error=None, allowed=None, note="", part="", flops=2e6, bytes=4e6, peak_bytes=0, failed="",
    )  # fmt: skip
    return replace(result, **changed)


def document(times: dict[str, list[float]]) -> dict:
    """A run of one case whose contestants took these times."""
    roles = {"ours": "ours", "loop": "published", "mm": "light"}
    results = [entry(name, roles.get(name, "torch"), samples) for name, samples in times.items()]
    limits = copy.deepcopy(LIMITS)
    case = Elementwise("some matrix", 10, 10)
    return {
        "format": report.FORMAT,
        "machine": {"cpu": "one", "gpu": None, "cores": 2},
        "versions": {"torch": "2"},
        "settings": {"size": "small"},
        "others_share": 0.0,
        "elapsed": 1.0,
        "ceilings": limits,
        "cases": [report.case_entry("sensitivity", case, "cpu", played(results), limits)],
    }


def played(results):
    """A match that is over."""
    return SimpleNamespace(results=lambda: results, sets=1)


def noisy(median, share, seed, count=20):
    draw = random.Random(seed)
    return [median * draw.uniform(1 - share, 1 + share) for _ in range(count)]


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_prints_every_contestant_and_writes_what_it_printed(tmp_path, capsys):
    out, plot = tmp_path / "run.json", tmp_path / "run.png"
    assert cli.run([*ARGV, "--json", str(out), "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found == report.read(out) and found["complete"]
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory_bytes"] > 1 << 28
    assert found["versions"]["torch"] == torch.__version__
    (case,) = found["cases"]
    assert (case["stem"], case["op"], case["name"]) == ("max_window", "max_window", "tiny")
    for contestant in case["contestants"]:
        assert contestant["name"] in text
        assert report.seconds(contestant["quantiles"]["0.5"]) in text
        assert contestant["quantiles"] == contest.quantiles(contestant["seconds"])
    ours = case["contestants"][0]
    assert ours["flops"] == 160 * 160 + 2 * 33 * 33 and ours["bytes"] == 4 * 160 * 160
    assert ours["of_ceiling"] == pytest.approx(ours["bytes"] / 1e9 / ours["quantiles"]["0.5"])
    assert set(ours["ratios"]) == {"published", "torch", "light"}
    assert found["machine"]["cpu"] in text and "as fast as published" in text
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "run.png"]
    assert cli.run(["bench", "--compare", str(out), str(out)]) == 0
    assert "nothing moved beyond the noise, of 7 timings" in capsys.readouterr().out


def test_progress_is_plain_lines_with_v(capfd):
    assert cli.run([*ARGV, "-v"]) == 0
    err = capfd.readouterr().err
    assert "max_window tiny: case 1 of 1, lap 1 of 1" in err
    assert "\r" not in err


def test_a_wrong_contestant_ends_the_run_with_exit_code_1(monkeypatch, tmp_path, capsys):
    from pkt_ext.bench import max_window

    real = max_window.max_window
    monkeypatch.setattr(max_window, "max_window", lambda *a: real(*a)._replace(col=torch.tensor(0)))
    assert cli.run([*ARGV, "--json", str(tmp_path / "run.json")]) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(
        "pkt: error: max_window tiny: ours is off by .* allowed; nothing was timed\n", err
    )
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_keeps_what_it_measured(monkeypatch, tmp_path, capsys):
    lap, out = contest.Match.lap, tmp_path / "run.json"

    def interrupted(self, seconds):
        if out.exists():
            raise RuntimeError("the power is gone")
        lap(self, seconds)

    monkeypatch.setattr(contest.Match, "lap", interrupted)
    with pytest.raises(RuntimeError, match="power"):
        run.run(["small_svd"], device="cpu", size="small", json=out, tell=lambda _: None)
    found = report.read(out)
    assert not found["complete"] and len(found["cases"]) == 1
    assert found["cases"][0]["contestants"][0]["seconds"]
    assert "old run was interrupted" in compare.compare(found, document({"ours": [1.0]}))


def test_other_processes_share_of_the_cpus_is_told(monkeypatch):
    reads = iter([(100.0, 50.0, 30.0), (200.0, 120.0, 60.0)])
    monkeypatch.setattr(machine.Neighbours, "_read", staticmethod(lambda: next(reads)))
    assert machine.Neighbours().share() == pytest.approx(0.4)  # 70 s busy, 30 of them ours
    assert "other processes took 40%" in report.disturbed({"others_share": 0.4})
    assert (
        report.disturbed({"others_share": 0.01}) == report.disturbed({"others_share": None}) == ""
    )


def test_ratios_are_medians_over_ours():
    times = {"ours": [1.0, 2.0, 9.0], "loop": [20.0], "a": [6.0], "b": [4.0], "mm": [1.0]}
    (case,) = document(times)["cases"]
    assert case["contestants"][0]["ratios"] == {"published": 10.0, "torch": 2.0, "light": 0.5}
    text = report.case_text(case)
    assert "counted: 2.00 MFLOP, 4.00 MB at least" in text
    assert "10.0x as fast as published, 2.0x as fast as the best torch, 2.0x the time of mm" in text
    assert "one sample" in text


def test_the_summary_fits_a_screen_and_has_the_spread():
    times = {"ours": [0.95] * 4 + [1.0] * 12 + [1.5] * 4, "loop": [3333.0], "mm": [0.012]}
    run = document(times)
    run["cases"][0]["name"] = "8 llama2-13b.up_proj windows, rank 128, fast"
    text = report.summary(run)
    assert max(len(line) for line in text.splitlines()) <= 120
    assert re.search(r"fast +1\.00 s +-5% \+50% .* 3333x +- +0\.012x +0\n", text)


def test_rivals_are_held_against_the_ceiling_of_their_own_arithmetic():
    limits = copy.deepcopy(LIMITS)
    limits["float32"]["per_second"] = 1e6
    results = [entry("ours", "ours", [1.0]), entry("a", "torch", [4.0], arithmetic="float32")]
    matrix = Elementwise("m", 2, 2, torch.bfloat16)
    case = report.case_entry("s", matrix, "cpu", played(results), limits)
    ours, rival = case["contestants"]
    assert (ours["bound"], rival["bound"], rival["of_ceiling"]) == ("copy", "matmul", 0.5)


def test_a_contestant_without_samples_is_a_line(capsys):
    results = [entry("ours", "ours", [1.0]), entry("big", "torch", [], failed="out of memory")]
    matrix = Elementwise("m", 2, 2)
    case = report.case_entry("s", matrix, "cpu", played(results), LIMITS)
    assert re.search("big +out of memory", report.case_text(case))
    assert "torch" not in case["contestants"][0]["ratios"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.69e-2, "26.9 ms"), (9.9996e-4, "1.00 ms"), (4.2e-7, "0.42 us"), (362.0, "362 s"),
     (0.0099951, "10.0 ms")],
)  # fmt: skip
def test_times_have_three_digits(seconds, text):
    assert report.seconds(seconds) == text


def test_sizes_and_ratios_in_words():
    assert (
        report.size(0) == "0" and report.size(None) == "-" and report.size(5_283_864) == "5.28 MB"
    )
    assert report.rate(1.234e12, "flops") == "1.23 TFLOP/s"
    assert [report.times(r) for r in (1283.4, 12.31, 0.912, 0.0123)] == [
        "1283x", "12.3x", "0.91x", "0.012x",
    ]  # fmt: skip


# --- comparisons ----------------------------------------------------------------------------------


def test_a_slowdown_is_flagged_and_noise_is_not():
    old = document(
        {"ours": noisy(1.0, 0.05, 1), "loop": noisy(9.0, 0.2, 2), "mm": noisy(1, 0.1, 3)}
    )
    new = document(
        {"ours": noisy(1.3, 0.05, 4), "loop": noisy(9.4, 0.2, 5), "mm": noisy(1, 0.1, 6)}
    )
    text = compare.compare(old, new)
    assert re.search(r"some matrix, ours: 1\.\d\dx slower", text)
    assert "loop" not in text and "mm" not in text and "1 of 6 timings moved" in text
    assert re.search(r"some matrix, ours: 1\.\d\dx faster", compare.compare(new, old))


@pytest.mark.parametrize("seed", range(8))
def test_equal_runs_do_not_differ(seed):
    old, new = (document({"ours": noisy(1, 0.1, seed + 100 * i)}) for i in (1, 2))
    assert "nothing moved" in compare.compare(old, new)


@pytest.mark.parametrize(("change", "told"), [(1.2, False), (1.8, True)])
def test_single_samples_must_move_far(change, told):
    text = compare.compare(document({"ours": [1.0]}), document({"ours": [change]}))
    assert ("slower" in text) == told


def test_a_tiny_change_is_no_news_however_quiet():
    assert "nothing moved" in compare.compare(
        document({"ours": [1.0] * 9}), document({"ours": [1.02] * 9})
    )


def test_a_comparison_says_what_else_differs():
    old, new = document({"ours": [1.0], "gone": [1.0]}), document({"ours": [1.0], "a": [1.0]})
    new["machine"]["cpu"], new["versions"]["commit"] = "another", "abc"
    new["others_share"] = 0.3
    text = compare.compare(old, new)
    assert "machine differ: cpu was one, is another" in text
    assert "versions differ: commit was None, is abc" in text
    assert "new run: other processes took 30%" in text
    assert "only in the old run: accumulate_sensitivity_ some matrix, gone" in text
    assert "only in the new run: accumulate_sensitivity_ some matrix, a" in text


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nonsense"], "no stem 'nonsense' to benchmark; choose from sensitivity, max_window, low"),
        (["--size", "huge"], "size is 'huge'; choose one of small, default, full"),
        (["--device", "tpu"], "device 'tpu' cannot be used here"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here; use --device cpu"),
        (["--json", "absent/run.json"], "absent/run.json: not a file in an existing folder"),
        (["--plot", "."], "not a file in an existing folder"),
        (["--compare", "absent.json", "absent.json"], "cannot read absent.json: No such file"),
        (["max_window", "--compare", "a", "b"], "--compare measures nothing: leave stems out"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_line(argv, says, capsys, monkeypatch):
    monkeypatch.setattr(cases.Window, "contest", lambda *_: pytest.fail("a contest was started"))
    assert cli.run(["bench", *argv]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_a_gpu_without_kernels_built_for_it_is_refused(capsys, monkeypatch):
    from pkt_ext import _C

    monkeypatch.delattr(_C, "cuda_versions", raising=False)
    monkeypatch.setattr(run, "find_device", lambda _: torch.device("cuda"))
    assert cli.run(["bench"]) == 2
    assert "built without CUDA kernels" in capsys.readouterr().err


def test_an_unreadable_document_is_refused(tmp_path, capsys):
    good = document({"ours": [1.0]})
    spoiled = [
        b"not json", b"\xff\xfe", b"[]", b"{}", b"[" * 100_000,
        json.dumps(good | {"format": 99}).encode(),
        json.dumps({k: v for k, v in good.items() if k != "ceilings"}).encode(),
        json.dumps(good | {"cases": [{"name": "x"}]}).encode(),
        json.dumps(good | {"cases": 3}).encode(),
    ]  # fmt: skip
    for number, content in enumerate(spoiled):
        path = tmp_path / f"{number}.json"
        path.write_bytes(content)
        assert cli.run(["bench", "--compare", str(path), str(path)]) == 2, content[:40]
        err = capsys.readouterr().err
        assert str(path) in err and err.count("\n") == 1


def test_a_missing_matplotlib_names_its_pip_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(cases.Window, "contest", lambda *_: pytest.fail("a contest was started"))
    assert cli.run([*ARGV, "--plot", str(tmp_path / "run.png")]) == 2
    assert "pip install 'pkt_ext[report]'" in capsys.readouterr().err


def test_nothing_half_written(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    path.write_text("before")
    with pytest.raises(ValueError):
        report.write(path, {"a": float("nan")})
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(InputError):
        report.read(path)


def test_the_plot_holds_both_ceilings_and_every_op(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(
        roofline, "figure_class", lambda: lambda **given: kept.append(Figure(**given)) or kept[0]
    )
    roofline.plot(document({"ours": [1.0], "mm": [1.0]}), tmp_path / "a.png")
    (axes,) = kept[0].axes
    x, y = axes.lines[-2].get_data()
    assert (x[0], y[0]) == (0.5, 2e6)  # FLOPs per byte and per second of `entry`
    labels = [text.get_text() for text in kept[0].legends[0].get_texts()]
    assert labels[0] == "matmul, float32" and "some matrix" in labels[-1]


def test_more_ops_than_markers_are_drawn(tmp_path):
    run = document({"ours": [1.0]})
    run["cases"] = [run["cases"][0] | {"op": f"op{i}"} for i in range(9)]
    roofline.plot(run, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_the_commit_is_known_in_a_checkout_only(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "pkt_ext" / "bench" / "machine.py"))
    assert machine._commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    assert re.fullmatch("[0-9a-f]{12}", machine._commit())
    (tmp_path / "file").write_text("2")
    assert re.fullmatch(r"[0-9a-f]{12}\+", machine._commit())


def test_a_card_is_described(monkeypatch):
    card = SimpleNamespace(name="a card", total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    found = machine.describe(torch.device("cuda"))
    assert found["machine"]["gpu"] == "a card" and "driver" in found["versions"]
    assert "a card, 80 GiB" in report.header(found)
