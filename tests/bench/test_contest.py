# SPDX-License-Identifier: Apache-2.0
"""Contests: wrong results are caught, memory and turns are counted, inputs have their structure."""

import time
from dataclasses import replace

import pytest
import torch

from pkt_ext.bench import cases, ceilings, contest
from pkt_ext.bench.contest import Contest, Contestant, Estimate, Verdict, Work
from pkt_ext.bench.data import Source
from pkt_ext.bench.low_rank import LowRank, leading_triplets
from pkt_ext.bench.max_window import Window, published_search
from pkt_ext.bench.sensitivity import Elementwise, Linear
from pkt_ext.bench.small_svd import CholeskyInverse, Svd
from pkt_ext.ops import max_window_reference, truncated_svd_reference

CPU = torch.device("cpu")
DEVICES = [
    CPU,
    pytest.param(
        torch.device("cuda"),
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ),
]
SMALL_SVDS = ("batched_svd", "batched_cholesky_inverse")  # nothing published does them
TINY = cases.select([], "cpu", "small")


@pytest.fixture(autouse=True)
def one_thread(any_threads):
    """Tiny matrices gain nothing from a second thread and lose much where its core is busy."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("case", [c for _, c in TINY], ids=[f"{c.op} {c.name}" for _, c in TINY])
def test_every_contestant_of_a_tiny_case_is_right_and_timed(case, device):
    made = case.contest(device)
    results = contest.hold(made, device, 0.05)
    assert [r.name for r in results] == [c.name for c in made.contestants]
    roles = {"ours", "torch", "light"} | ({"published"} if case.op not in SMALL_SVDS else set())
    assert {r.role for r in results} >= roles
    for result in results:
        assert result.seconds and min(result.seconds) > 0 and not result.failed
        assert result.quantiles["0"] <= result.quantiles["0.5"] <= result.quantiles["1"]
        if result.role != "light":
            assert result.error <= result.allowed


# --- planted faults -------------------------------------------------------------------------------


def spoil(made: Contest, place: int, wrong) -> Contest:
    """The contest with a fault planted into one contestant's result."""

    def call(*inputs):
        return wrong(inputs, made.contestants[place].call(*inputs))

    entries = list(made.contestants)
    entries[place] = replace(entries[place], call=call)
    return replace(made, contestants=entries)


def drop_last_row(inputs, _):
    inputs[0][-1] = 0


def one_element_a_thousandth_off(inputs, _):
    inputs[0].view(-1)[77] *= 1.001


def twice(inputs, _):
    inputs[0].mul_(2)


def not_written(inputs, _):
    inputs[0][3] = torch.empty_like(inputs[0][3])


ELEMENTWISE, LINEAR = Elementwise("", 40, 33), Linear("", 40, 33, (5, 9))
HALVES = [Elementwise("", 70, 90, torch.float16), Linear("", 70, 90, (40, 60), torch.float16)]
SUMS = Linear("", 40, 33, (5, 9), sums=True)
WINDOW = Window("", 30, 40, 20, 25)
SVDS, GRAMS = Svd("", 2, 9), CholeskyInverse("", 2, 9)
FACTORS = LowRank("", 560, 530, 4, "spiked", stride=1100)


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        *((case, wrong) for case in (ELEMENTWISE, LINEAR)
          for wrong in (drop_last_row, one_element_a_thousandth_off, twice, not_written)),
        (SUMS, lambda _, out: (out[0], out[1].roll(1))),
        (SUMS, lambda _, out: (out[0] * 1.001, out[1])),
        (WINDOW, lambda _, out: out._replace(row=(out.row + 1) % 11)),
        (WINDOW, lambda _, out: out._replace(total=out.total * (1 + 1e-9))),
        (WINDOW, lambda _, out: out._replace(col=out.col + 100)),
        (WINDOW, lambda _, out: out._replace(total=out.total * float("nan"))),
        (SVDS, lambda _, out: out._replace(s=out.s * 1.001)),
        (SVDS, lambda _, out: out._replace(u=out.u * 1.001, s=out.s / 1.001)),
        (GRAMS, lambda _, out: out._replace(lower=out.lower * (1 + 1e-9))),
        (GRAMS, lambda _, out: out._replace(inverse=out.inverse.mT)),
        (FACTORS, lambda _, out: (out[0] * 1.01, out[1])),
        (FACTORS, lambda _, out: (out[0], out[1].flip(-1))),
    ],
)  # fmt: skip
def test_a_wrong_result_is_an_error_and_nothing_is_timed(case, wrong):
    made = case.contest(CPU)
    calls = []
    made.contestants[-1] = replace(made.contestants[-1], call=lambda *_: calls.append(1))
    with pytest.raises(contest.VerificationError, match="ours is off by .* nothing was timed"):
        contest.hold(spoil(made, 0, wrong), CPU, 0.05)
    assert not calls


@pytest.mark.parametrize("case", [ELEMENTWISE, LINEAR])
def test_a_large_matrix_is_compared_on_rows_and_columns(case, monkeypatch):
    """One wrong row or column is found though few of either are looked at."""
    from pkt_ext.bench import sensitivity

    monkeypatch.setattr(sensitivity, "_SAMPLE", 6)
    for place in ((5, slice(None)), (slice(None), 5)):

        def wrong(inputs, _, place=place):
            inputs[0][place] *= 1.01

        with pytest.raises(contest.VerificationError):
            contest.verify(spoil(case.contest(CPU), 0, wrong), CPU)


def test_uninitialised_memory_is_poisoned_while_verifying():
    seen = []

    def call():
        whole, like = torch.empty(5, dtype=torch.int64), torch.empty_like(torch.ones(2, 3))
        seen.append((whole, like, torch.ones(2).new_empty(4, dtype=torch.bfloat16)))

    contest.verify(Contest([()], [Contestant("one", "ours", call)]), CPU)
    whole, like, new = seen[0]
    assert (whole == -1).all() and like.isnan().all() and new.isnan().all()


@pytest.mark.parametrize("case", HALVES, ids=lambda case: case.op)
def test_float16_gradients_stay_within_its_range(case):
    assert not any(trial.failed for trial in contest.verify(case.contest(CPU), CPU).values())


# --- counting -------------------------------------------------------------------------------------


def test_bytes_and_flops_by_hand():
    # 6 elements: 2 operands of 4 (2) bytes, a float32 score read and written
    assert Elementwise("", 2, 3).work() == Work(12, 6 * 16)
    assert Elementwise("", 2, 3, torch.bfloat16).work() == Work(12, 6 * 12)
    assert Elementwise("", 2, 3, torch.float16, sums=True).work() == Work(12, 6 * 4)
    # 7 tokens: 2 * 7 * 6 FLOPs; 7 x (2 + 3) operands, 6 weights, 6 scores read and written
    assert Linear("", 2, 3, (3, 4)).work() == Work(84, 7 * 5 * 4 + 6 * 4 + 6 * 8)
    assert Linear("", 2, 3, (3, 4), torch.bfloat16).work() == Work(84, 7 * 5 * 2 + 6 * 2 + 6 * 8)
    assert Linear("", 2, 3, (7,), sums=True).work() == Work(84, 7 * 5 * 4 + 6 * 4)
    assert Linear("", 2, 3, (7,)).work("cuda").flops == 3 * 84  # float32 as three products
    assert Linear("", 2, 3, (7,), torch.float16).work("cuda").flops == 84
    # 20 elements, 3 x 2 positions
    assert Window("", 4, 5, 2, 4).work() == Work(20 + 12, 80)
    # 26 n^3; the matrix and two factors of 4 values, 2 singular values; two thirds of n^3
    assert Svd("", 5, 2).work() == Work(5 * 26 * 8, 5 * 14 * 4)
    assert CholeskyInverse("", 5, 3).work() == Work(5 * 18, 5 * 27 * 8)
    # 8 passes over 2 matrices of 6 elements in 2 bytes, 16 columns; three slices on a GPU
    assert LowRank("", 2, 3, 16, "flat", count=2).work(8) == Work(2 * 96 * 16, 96 * 2)
    assert LowRank("", 2, 3, 16, "flat", count=2).work(8, "cuda") == Work(6 * 96 * 16, 96 * 2)


def test_rivals_of_split_float32_are_counted_in_what_they_compute(monkeypatch):
    case = Linear("", 20, 30, (3, 4))
    monkeypatch.setattr(Linear, "arithmetic", lambda self, _: torch.bfloat16)  # as on a GPU
    made = case.contest(CPU)
    ours, loop, light = (made.contestants[i] for i in (0, 1, -1))
    assert ours.work.flops == light.work.flops == 3 * loop.work.flops
    assert loop.arithmetic == torch.float32 and ours.arithmetic is light.arithmetic is None
    assert light.call(*made.sets[0]).dtype == torch.bfloat16
    assert ceilings.dtypes([case], "cuda") == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("sums", [False, True])
def test_wgmma_is_a_contestant_of_16_bits_where_a_card_has_it(sums, monkeypatch):
    from pkt_ext.bench import sensitivity

    monkeypatch.setattr(sensitivity, "_has_wgmma", lambda _: True)
    names = [c.name for c in LINEAR.contest(CPU).contestants]
    assert "ours, wgmma" not in names
    case = replace(SUMS if sums else LINEAR, dtype=torch.bfloat16)
    results = {r.name: r for r in contest.hold(case.contest(CPU), CPU, 0.02)}
    found = results["ours, wgmma"]  # a CPU has one kernel
    assert found.role == "other" and found.seconds and found.error <= found.allowed == 1e-4


def test_the_binding_ceiling():
    limits = {"copy": {"per_second": 10.0}, "float32": {"per_second": 100.0}}
    assert ceilings.binding(50.0, 20.0, limits, "float32") == (2.0, "copy")
    assert ceilings.binding(500.0, 20.0, limits, "float32") == (5.0, "matmul")


def test_ceilings_are_rates_of_counted_work(monkeypatch):
    monkeypatch.setattr(ceilings, "cache_bytes", lambda _: 1024)
    match = ceilings.match(CPU, {torch.float32})
    match.lap(0.1)
    found = ceilings.read(match)
    assert set(found) == {"copy", "float32"}
    assert found["copy"]["per_second"] == 2 * (1 << 28) / found["copy"]["quantiles"]["0.5"]
    assert found["float32"]["per_second"] == 2 * 2048**3 / found["float32"]["quantiles"]["0.5"]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_peak_memory_counts_what_lives_at_once(device):
    x = torch.ones(1 << 18, device=device)  # 1 MiB, there before

    def call():
        a = x + 1
        del a
        b = x * 2
        return (b + 3).sum()

    peak = contest.peak_bytes(call, device)
    assert 2 << 20 <= peak <= (2 << 20) + 4096
    assert contest.peak_bytes(lambda: x.add_(x), device) == 0


# --- turns ----------------------------------------------------------------------------------------


class Player:
    """Stands in for a clock: notes when it played."""

    def __init__(self, name, cost, log):
        self.name, self.cost, self.log = name, cost, log

    def sample(self):
        self.log.append(self.name)
        return self.cost


def test_contestants_take_turns_and_the_dear_ones_are_spread_evenly():
    log = []
    costs = {"a": 0.01, "b": 0.02, "dear": 1.0, "dearest": 50.0}
    samples = contest.race({n: Player(n, c, log) for n, c in costs.items()}, 6.0)
    assert {name: len(found) for name, found in samples.items()} == {
        "a": 40, "b": 40, "dear": 3, "dearest": 1,
    }  # fmt: skip
    quick = [name for name in log if name in "ab"]
    assert quick == ["a", "b"] * 40
    between = [log[:i].count("a") for i, name in enumerate(log) if name == "dear"]
    assert between == [14, 27, 40]


def test_time_left_by_the_cheap_goes_to_the_dear():
    assert contest._turns({"dear": 1.0, "cheap": 0.001}, 10.04, {}) == {"cheap": 40, "dear": 10}


@pytest.mark.parametrize("seconds", [0.1, -3.0])
def test_nobody_starves_however_little_time_is_left(seconds):
    costs = {"quick": 0.9, "slow": 1.1}
    assert contest._turns(costs, seconds, {}) == {"quick": 3, "slow": 1}
    assert contest._turns(costs, seconds, {"quick": 2, "slow": 1}) == {"quick": 1, "slow": 0}


def test_the_profilers_time_is_not_the_contestants(monkeypatch):
    def measured(call, device):
        time.sleep(0.05)
        call()
        time.sleep(0.05)

    monkeypatch.setattr(contest, "peak_bytes", measured)
    made = Contest([()], [Contestant("one", "ours", lambda: time.sleep(0.01))])
    assert 0.01 <= contest.verify(made, CPU)["one"].seconds < 0.05


def test_short_calls_are_repeated_within_a_sample_on_rotating_inputs():
    seen = []
    made = Contest([(i,) for i in range(3)], [Contestant("one", "ours", seen.append)])
    (result,) = contest.hold(made, CPU, 0.02)
    assert result.repeats == 100
    assert len(seen) == 3 + 100 * len(result.seconds)  # verified, warmed up twice
    assert set(seen[-3:]) == {0, 1, 2}


def test_laps_make_inputs_anew_verify_once_and_add_their_samples():
    made, checked = [], []

    def make():
        made.append(len(made))
        check = lambda _: checked.append(1) or Verdict(0.0, 0.0)  # noqa: E731
        return Contest([()], [Contestant("one", "ours", lambda: time.sleep(0.003), check)])

    match = contest.Match(make, CPU)
    match.lap(0.02)
    (first,) = match.results()
    match.lap(0.02)
    (both,) = match.results()
    assert made == [0, 1] and checked == [1]
    count = len(first.seconds)
    assert both.seconds[:count] == first.seconds and len(both.seconds) > count


def test_a_call_longer_than_a_lap_is_made_once(monkeypatch):
    monkeypatch.setattr(contest, "_SLOW", 0.01)
    calls = []

    def slow():
        calls.append(time.sleep(0.05))
        return Estimate(7.0, None)

    ways = [Contestant("slow", "torch", slow, part="some"), Contestant("ok", "ours", time.time)]
    match = contest.Match(lambda: Contest([()], ways), CPU)
    for _ in range(2):
        match.lap(0.02)
    slow_one, quick = match.results()
    assert len(calls) == 1 and slow_one.seconds == [7.0] and len(quick.seconds) > 1


def test_a_part_stands_for_the_whole():
    def call():
        return Estimate(7.0, "output")

    def check(output):
        return Verdict(0.0 if output == "output" else 1.0, 0.0)

    made = Contest([()], [Contestant("some", "published", call, check, part="one of many")])
    (result,) = contest.hold(made, CPU, 0.01)
    assert set(result.seconds) == {7.0} and result.part == "one of many"


@pytest.mark.parametrize(
    ("error", "row"),
    [
        (torch.OutOfMemoryError("too much"), "out of memory"),
        (RuntimeError("unaligned\nat line 3"), "fails: unaligned"),
    ],
)
def test_a_rival_that_fails_is_a_row_that_says_so_and_ours_is_an_error(error, row):
    def call():
        raise error

    made = Contest([()], [Contestant("big", "torch", call), Contestant("ok", "ours", time.time)])
    big, fine = contest.hold(made, CPU, 0.01)
    assert big.failed == row and not big.seconds and fine.seconds
    with pytest.raises(type(error)):
        contest.hold(Contest([()], [Contestant("big", "ours", call)]), CPU, 0.01)


@pytest.mark.parametrize("slow", [contest._SLOW, 0.0])
@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_a_rivals_wrong_result_is_a_row_that_says_so(error, slow, monkeypatch):
    monkeypatch.setattr(contest, "_SLOW", slow)
    bad = Contestant("bad", "torch", time.time, lambda _: Verdict(error, 0.1))
    wrong, fine = contest.hold(Contest([()], [bad, Contestant("ok", "ours", time.time)]), CPU, 0.01)
    assert wrong.failed == f"wrong: off by {error:.3g} where 0.1 is allowed" and not wrong.seconds
    assert fine.seconds and not fine.failed


def test_compiling_is_no_sample_and_sees_no_poison(monkeypatch):
    monkeypatch.setattr(contest, "_Poisoned", lambda: pytest.fail("poisoned"))
    seen = []

    def call(score):
        time.sleep(0.1 * (not seen))
        seen.append(score.item())
        score += 1

    score = torch.zeros(())
    made = Contest([(score,)], [Contestant("one", "torch", call, compiles=True)], score.zero_)
    assert contest.verify(made, CPU)["one"].seconds < 0.1
    assert seen == [0.0, 0.0]


def test_input_sets_exceed_three_caches(monkeypatch):
    monkeypatch.setattr(contest, "cache_bytes", lambda _: 100)

    def sets(count):
        return contest.input_sets(lambda seed: (torch.zeros(count), seed), CPU)

    assert [seed for _, seed in sets(25)] == [0, 1, 2]
    assert len(sets(75)) == 1 and len(sets(1)) == contest._SETS


# --- what the contests stand on -------------------------------------------------------------------


def test_float64_triplets_are_the_full_svds():
    for kind, shape in (("power", (600, 540)), ("spiked", (530, 700))):
        matrix = Source(3, CPU).spectrum(*shape, kind)
        u, s, vh = leading_triplets(matrix, 5)
        best_u, best_s, best_vh = truncated_svd_reference(matrix, 5)
        wanted = (best_u * best_s) @ best_vh
        assert float(((u * s) @ vh - wanted).norm() / wanted.norm()) < 1e-6


def test_the_published_loop_finds_the_window_and_scales_its_time():
    score = Source(0, CPU).score(20, 30)
    best = max_window_reference(score, 12, 7)
    whole = published_search(score, 12, 7)
    assert [int(x) for x in whole.output[:2]] == [int(best.row), int(best.col)]
    part = published_search(score, 12, 7, most=24)  # one of nine rows of positions
    assert int(part.output[0]) == 0


def test_spectra_are_what_they_are_called():
    power = torch.linalg.svdvals(Source(0, CPU).spectrum(90, 60, "power"))
    torch.testing.assert_close(power, torch.arange(1, 61) ** -0.3, rtol=1e-4, atol=1e-5)
    spiked = torch.linalg.svdvals(Source(0, CPU).spectrum(300, 200, "spiked"))
    edge = 300**0.5 + 200**0.5
    assert (spiked > edge).sum() >= 12 and spiked[14] < 1.05 * edge
    assert torch.linalg.svdvals(Source(0, CPU).spectrum(300, 200, "flat"))[0] < 1.1 * edge


def test_gradients_are_small_heavy_tailed_and_scaled():
    values = Source(0, CPU).output_gradients(400, 300).abs()
    assert 2e-5 < values.median() < 5e-4
    assert values.max() > 100 * values.median()
    rows = values.median(1).values
    assert rows.max() > 5 * rows.median()
    torch.testing.assert_close(values, Source(0, CPU).output_gradients(400, 300).abs())


def test_names_are_unique_and_the_sizes_nest():
    for device in ("cpu", "cuda"):
        full = cases.select([], device, "full")
        names = [(stem, case.op, case.name) for stem, case in full]
        assert len(set(names)) == len(names)
        default = cases.select([], device, "default")
        assert set(default) < set(full)
        assert {stem for stem, _ in default} == set(cases.STEMS)
