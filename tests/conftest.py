"""What the tests share: small runs whose networks are already fitted, without files."""

from pathlib import Path

import pytest
import torch
from students import train_student

import train
from models import media, plan
from toy import toy2d

torch.set_num_threads(1)  # tests of small networks: a second thread only waits
FIT = toy2d.fit_start  # some tests replace it
SMALL_TEACHERS = "teachers", "sample", "export", "encoders", "fuzz", "published"


@pytest.fixture(scope="session")
def start():
    """start(cfg): the tensors that roles start from, fitted briefly, once per mixture."""
    tensors = {}

    def fit(cfg):
        key = cfg.toy, cfg.classes
        if key not in tensors:
            tensors[key] = FIT(cfg, steps=300)
        return tensors[key]

    return fit


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """runs(teacher, *flags): the folder of a finished student, trained once for all files."""
    folders = {}

    def make(teacher, *flags):
        if (teacher, flags) not in folders:
            out = tmp_path_factory.mktemp("run") / teacher
            always = "--dtype float32 --sample-every 1 --size 1x32x32".split()
            folders[teacher, flags] = train_student(out, teacher, *always, *flags)
        return folders[teacher, flags]

    return make


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Runs of small teachers draw nothing and count no FLOPs: it takes longer than training."""
    if request.module.__name__.removeprefix("test_") in SMALL_TEACHERS:
        monkeypatch.setattr(media, "contact_sheet", lambda *_: b"\x89PNG")
        monkeypatch.setattr(media, "curves", lambda log: b"curves")
        monkeypatch.setattr(plan, "step_flops", lambda *_: (1.0, 1.0))


@pytest.fixture
def quick_toys(monkeypatch, start):
    """Runs of toys take the short fit and draw nothing: commands and files are tested."""
    monkeypatch.setattr(toy2d, "fit_start", lambda cfg, progress: start(cfg))
    monkeypatch.setattr(toy2d, "draw_picture", lambda *_: b"a picture")


@pytest.fixture
def new_run(start):
    """new_run(**settings): a run on the ring before its first iteration."""

    def make(**settings):
        cfg = train.make_config(**settings)
        device = torch.device("cpu")
        roles = toy2d.roles_from(cfg, train.phases_of(cfg), device, start(cfg))
        run = train.make_run(cfg, device, Path("nowhere"), roles)
        train.begin_phase(run, 1)
        return run

    return make
