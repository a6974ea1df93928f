# SPDX-License-Identifier: Apache-2.0
"""The cases of `pkt bench` under pytest-benchmark, one test a case.

pytest benchmarks                 # tiny cases, as CI runs them
pytest benchmarks --size full     # real shapes
pytest benchmarks --size full --benchmark-json out.json
"""

import pytest
import torch

from pkt_ext.bench import cases, ceilings, contest, report
from pkt_ext.settings import find_device

_texts: list[str] = []


def pytest_addoption(parser):
    parser.addoption("--size", choices=cases.SIZES, default="small", help="shapes to benchmark")


def pytest_generate_tests(metafunc):
    """A benchmark's `case` comes from the list of its module's STEM."""
    if "case" in metafunc.fixturenames:
        size, device = metafunc.config.getoption("size"), find_device("auto").type
        found = [case for _, case in cases.select([metafunc.module.STEM], device, size)]
        metafunc.parametrize("case", found, ids=[f"{case.op}: {case.name}" for case in found])


@pytest.fixture(scope="session")
def device():
    return find_device("auto")


@pytest.fixture(scope="session")
def limits(request, device):
    """This machine's ceilings, measured once."""
    size = request.config.getoption("size")
    selected = [case for _, case in cases.select([], device.type, size)]
    match = ceilings.match(device, ceilings.dtypes(selected, device.type))
    match.lap(0.5 if size == "small" else 4.0)
    return ceilings.read(match)


@pytest.fixture
def measure(benchmark, request, device, limits):
    """measure(case): verify all contestants, race them, hand ours to pytest-benchmark as well."""

    def run(case) -> None:
        small = request.config.getoption("size") == "small"
        made = case.contest(device)
        match = contest.Match(lambda: made, device)
        match.lap(0.2 if small else 15.0)
        entry = report.case_entry(request.module.STEM, case, device.type, match, limits)
        benchmark.extra_info.update(entry)
        _texts.append(report.case_text(entry))
        ours = made.contestants[0]
        benchmark.pedantic(ours.call, args=made.sets[0], rounds=1 if small else 7)

    return run


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    if _texts:
        terminalreporter.section(f"contests, {torch.get_num_threads()} threads")
        terminalreporter.write_line("\n".join(_texts))
