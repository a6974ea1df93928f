# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests: the backends a kernel runs on, and quiet, offline libraries."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Backend:
    """Where a kernel test runs: its tensors' device, and whether the .cu files run on the host."""

    name: str
    device: str

    @property
    def emulated(self) -> bool:
        return self.name.startswith("emulated")

    @property
    def has_wgmma(self) -> bool:
        """sm_90a kernels run here: a Hopper card and a build for it, or the emulation."""
        if self.name != "cuda":
            return self.emulated
        from pkt_ext.ops import _backend

        built = _backend._C.build_info()["cuda_architectures"].split(";")
        return torch.cuda.get_device_capability() == (9, 0) and "90a" in built


def _load_emulation():
    """The test-only module; PKT_EXT_EMULATION names its folder (default build/emulated)."""
    folder = ROOT / os.environ.get("PKT_EXT_EMULATION", "build/emulated")
    found = sorted(folder.glob("_C_emulated*.so"))
    if not found:
        pytest.fail(f"no emulation module in {folder}: run `make emulation`")
    spec = importlib.util.spec_from_file_location("_C_emulated", found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulation():
    """The module that runs the .cu files on the host."""
    return _load_emulation()


BACKENDS = ["cpu", "emulated-ascending", "emulated-descending", "emulated-random", "cuda"]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> Backend:
    """Runs the test on the CPU kernels, on the emulated CUDA kernels in three orders, on a GPU."""
    name = request.param
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return Backend(name, "cuda")
    if name != "cpu":
        from pkt_ext.ops import _backend

        module = request.getfixturevalue("emulation")
        module.set_fiber_order(name.removeprefix("emulated-"), 20231011)
        monkeypatch.setattr(_backend, "_C", module)
    return Backend(name, "cpu")


@pytest.fixture
def any_threads():
    """For a test that sets torch's thread count: put back afterwards, whatever happened."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_bars():
    """As `pkt` itself does where there is no terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """folder -> the Hub that has it, which is the one asked from now on, with an empty cache."""
    import huggingface_hub
    from fake_hub import Hub

    servers = []

    def start(folder):
        hub = Hub(folder)
        servers.append(hub.server)
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache{len(servers)}"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()
        return hub

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
    huggingface_hub.close_session()


def pytest_report_header(config):
    count = torch.cuda.device_count()
    return f"CUDA devices: {count}" + ("" if count else " (tests on cuda are skipped)")
