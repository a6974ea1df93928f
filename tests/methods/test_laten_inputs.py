# SPDX-License-Identifier: Apache-2.0
"""What a LaTen run is made of, before it runs."""

import model_zoo
import pytest

from pkt_ext.methods.laten import LatenConfig
from pkt_ext.methods.laten_inputs import prepare

ROWS = [{"prompt": f"{i} + {i} =", "completion": str(2 * i)} for i in range(5)]


@pytest.mark.parametrize("on_inputs", [False, True])
def test_the_loss_may_look_at_prompts(tmp_path, on_inputs):
    model_zoo.save_pair(tmp_path, ROWS)
    config = LatenConfig(train_on_inputs=on_inputs, device="cpu", prompt_format="plain")
    models = tmp_path / "teacher", tmp_path / "student"
    job = prepare(models, (None, None), ROWS, ROWS, ROWS[:2], config)
    assert len(job.align) == 5 and len(job.holdout) == 2
    for sample in [*job.align, *job.located, *job.holdout]:
        assert (sample.labels == sample.input_ids).all() == on_inputs
    for targets in job.targets:  # what is located by is one token either way
        assert [(s.labels >= 0).sum().item() for s in targets] == [1] * 6


def test_the_optimiser_gets_what_was_asked_for():
    config = LatenConfig(beta1=0.8, beta2=0.99, weight_decay=0.1, learning_rate=1e-3).alignment(7)
    assert (config.steps, config.betas, config.weight_decay) == (7, (0.8, 0.99), 0.1)
    assert config.learning_rate == 1e-3
