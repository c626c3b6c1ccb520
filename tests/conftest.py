"""What the tests share: small runs whose networks start fitted, without files."""

from pathlib import Path

import pytest
import torch

import train
from toy import toy2d

torch.set_num_threads(1)  # tests of small networks: a second thread only waits
FIT = toy2d.fit  # tests that need none replace it


@pytest.fixture(scope="session")
def start():
    """start(cfg): tensors to start from, fitted once a mixture and session, and briefly."""
    made = {}

    def of(cfg):
        key = cfg.toy, cfg.classes
        if key not in made:
            made[key] = FIT(cfg, lambda steps: steps, steps=500)
        return made[key]

    return of


@pytest.fixture
def new_run(start):
    """new_run(**settings): a run on the ring before its first iteration."""

    def of(**settings):
        cfg = train.config(**settings)
        run = train.new_run(cfg, start(cfg), torch.device("cpu"), Path("nowhere"))
        train.begin_phase(run, 1)
        return run

    return of
