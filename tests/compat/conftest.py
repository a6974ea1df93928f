# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the compat tests."""

import pytest

from pkt_ext.compat import notices


@pytest.fixture
def told_nothing(monkeypatch):
    """As in a process that has not been warned of anything."""
    monkeypatch.setattr(notices, "_given", set())
