# SPDX-License-Identifier: Apache-2.0
"""What an interrupted run leaves behind, and what is taken up of it."""

import json

import pytest
import torch

from pkt_ext.errors import InputError
from pkt_ext.streaming.progress import Progress

STATE = {"config": {"rank": 16, "dtype": None}, "inputs": {"data": {"sha256": "a"}}}


@pytest.fixture
def place(tmp_path):
    return tmp_path / "out.progress"


def filled(place):
    progress = Progress(place, STATE)
    saved = progress.save("factors-3", {"A": torch.arange(6.0).view(2, 3).T})
    progress.record("forward 0", groups={})
    progress.record("factors 3", saved={"factors": saved}, total=0.1 + 0.2)
    progress.record("backward 3", largest=2.5)
    return progress


def test_steps_and_tensors_come_back(place):
    filled(place)
    again = Progress(place, STATE)
    assert again.found and again.find("backward 3")["largest"] == 2.5
    line = again.find("factors 3")
    assert line["total"] == 0.1 + 0.2
    assert again.load(line["saved"]["factors"])["A"].equal(torch.arange(6.0).view(2, 3).T)
    assert again.find("forward 1") is None
    again.remove()
    assert not place.exists()


def test_a_torn_line_is_forgotten_and_the_next_one_is_sound(place):
    filled(place)
    journal = place / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-5])
    again = Progress(place, STATE)
    assert again.find("factors 3") and again.find("backward 3") is None
    again.record("backward 3", largest=7.0)
    assert Progress(place, STATE).find("backward 3")["largest"] == 7.0


def test_a_damaged_result_ends_what_is_remembered(place):
    filled(place)
    path = place / "factors-3.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again = Progress(place, STATE)
    assert again.find("forward 0") and again.find("factors 3") is None
    assert again.find("backward 3") is None
    path.unlink()
    assert Progress(place, STATE).find("forward 0")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("config", "rank"), 8, "config.rank was 16, is 8"),
        (("config", "dtype"), "float32", 'config.dtype was null, is "float32"'),
        (("inputs", "data", "sha256"), "b", 'inputs.data.sha256 was "a", is "b"'),
    ],
)
def test_another_run_is_refused_with_the_reason(place, path, value, says):
    filled(place)
    state = json.loads(json.dumps(STATE))
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(InputError) as refusal:
        Progress(place, state)
    assert says in str(refusal.value) and "--no-resume" in str(refusal.value)
    assert Progress(place, STATE).found  # nothing was lost
    assert not Progress(place, state, resume=False).found


def test_what_was_added_to_the_state_stays_with_the_run(place):
    filled(place).remember(skipped=[{"id": "row 2"}])
    again = Progress(place, STATE)
    assert again.state["skipped"] == [{"id": "row 2"}]
    again.restart()
    assert not again.found and Progress(place, STATE).state["skipped"] == [{"id": "row 2"}]


def test_what_a_kill_during_the_removal_leaves_is_known(place):
    filled(place)
    (place / "journal.jsonl").unlink()
    assert not Progress(place, STATE).found


@pytest.mark.parametrize("resume", [True, False])
def test_what_no_run_has_made_is_left_alone(place, resume):
    place.mkdir()
    (place / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not the progress of a run"):
        Progress(place, STATE, resume=resume)
    assert (place / "notes.txt").read_text() == "mine"
    (place / "notes.txt").unlink()
    for name in ("state.tmp", "journal.jsonl"):  # but what a kill leaves without its state goes
        (place / name).write_text("{")
    (place / "rank-1").mkdir()
    assert not Progress(place, STATE, resume=resume).found
    assert [path.name for path in place.iterdir()] == ["state.json"]


def test_a_file_in_its_place_is_refused(place):
    place.write_text("mine")
    with pytest.raises(InputError, match="not the progress of a run"):
        Progress(place, STATE)
    assert place.read_text() == "mine"
