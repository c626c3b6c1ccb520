"""One iteration at full size, on tensors without contents: devices, dtypes, waits, peak memory.

Every operation of the loop is executed, on the meta device in place of a GPU. What the host would
wait for is counted, and so are the bytes of all tensors that are alive.
"""

import gc
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

import train
from models import layers, lora, plan, teachers, weights
from models.parallel import SINGLE

ROOT, META = Path(__file__).parent.parent, torch.device("meta")
PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm")}
SIZES = [("wan22", "81x480x832", "int8"), ("qwen-image", "1328x1328", "float")]


@pytest.fixture(autouse=True)
def forget():
    """Forget tables of rope that exist, and afterwards the costs of shortened networks."""
    layers.rope_table.cache_clear()
    yield
    plan.role_bytes.cache_clear(), plan.cost.cache_clear()


class FakeGPU(plan.MemoryTracker):
    """Take the meta device for a GPU."""

    def __init__(self):
        super().__init__([])
        self.waits = Counter()  # function that causes it -> number

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = any(x.is_meta for x in inputs)
        name = operation._schema.name
        if on_gpu and name == "aten::_local_scalar_dense":
            self.waits[caller()] += 1
            return 0.5
        if name == "aten::_to_copy" and kwargs.get("device") not in (None, args[0].device):
            if not kwargs.get("non_blocking"):
                self.waits[caller()] += 1
            if on_gpu:
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if on_gpu and (name in PRODUCTS or "attention" in name) and "backward" not in name:
            kinds = {(x.device, x.dtype) for x in inputs if x.ndim > 1 and x.is_floating_point()}
            assert len(kinds) == 1, (name, kinds)
        out = operation(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.is_meta:
                self.add(x.untyped_storage())
        if self.now > self.peak:
            gc.collect(1)  # recomputation leaves reference cycles under a dispatch mode
            self.peak = max(self.peak, self.now)
        return out


def caller() -> str:
    """The innermost function of the project on the stack, but for this file."""
    frames = [(Path(f.filename), f.name) for f in traceback.extract_stack()]
    ours = [x for x in frames if ROOT in x[0].parents and "site-packages" not in x[0].parts]
    return [name for path, name in ours if path != Path(__file__)][-1]


def empty_network(teacher, dtype, device, seed, allocate, int8) -> torch.nn.Module:
    """As weights.random_network, without values."""
    net = plan.teacher_network(teacher, dtype, int8)
    return weights.load_tensors(net, (), device, allocate)


def config(teacher: str, size: str, base: str = "float") -> train.Config:
    """The settings of a short iteration."""
    settings = dict(weights=("random",), size=(size,), batch=1, fake_updates=1, base=base)
    return train.make_config(teacher, **settings)


def iterate(monkeypatch, cfg: train.Config) -> FakeGPU:
    """Run an iteration of phase 2 after phase 1 has begun. Returns what it counts."""
    monkeypatch.setattr(weights, "random_network", empty_network)
    with FakeGPU() as gpu:
        run = train.make_run(cfg, META, Path("nowhere"))
        train.begin_phase(run, 1)
        train.begin_phase(run, 2)
        run.i, gpu.peak = 0, gpu.now
        gpu.waits.clear()
        train.run_iteration(run)
    return gpu


def expected_waits(teacher: str) -> dict[str, int]:
    """One per update, and one per table of rope. Qwen-Image has two more for its text."""
    return {"step_optimizers": 2, "rope_table": 1 if teacher.startswith("wan") else 3}


def shrink(monkeypatch, teacher: str) -> None:
    """Give a teacher one block."""
    spec = weights.TEACHERS[teacher]
    spec = spec._replace(settings=spec.settings | {"num_layers": 1})
    monkeypatch.setitem(weights.TEACHERS, teacher, spec)


@pytest.mark.slow
@pytest.mark.parametrize("teacher,size,base", SIZES)
def test_an_iteration_at_full_size(monkeypatch, teacher, size, base):
    """Each update waits once, for the numbers of the log, and not for its noise or conditions."""
    cfg = config(teacher, size, base)
    gpu, phases, [shape] = iterate(monkeypatch, cfg), train.phases_of(cfg), teachers.buckets(cfg)
    active = teachers.active_roles(cfg, phases)[1]
    planned = plan.phase_memory(cfg, active, shape, SINGLE).peak
    print(f"{teacher} {size} {base}: peak {gpu.peak / 1e9:.1f} GB, plan {planned / 1e9:.1f} GB")
    assert gpu.waits == expected_waits(teacher)
    assert gpu.peak == pytest.approx(planned, rel=0.1)


QWEN = ("qwen-image", "1024x1024", "float")


@pytest.mark.parametrize("line", [SIZES[0], pytest.param(QWEN, marks=pytest.mark.slow)])
def test_an_iteration_of_one_block(monkeypatch, line):
    """As above, in seconds."""
    shrink(monkeypatch, line[0])
    assert iterate(monkeypatch, config(*line)).waits == expected_waits(line[0])


def test_a_missing_cast_and_a_hidden_wait_are_seen(monkeypatch):
    """Two negative controls: an adapter that computes in float32, and an .item() in the loss."""
    shrink(monkeypatch, "wan22")

    def without_cast(self, y, x):
        y.addmm_(torch.nn.functional.linear(x, self.down), self.up.T)

    with monkeypatch.context() as patch, pytest.raises((AssertionError, RuntimeError)):
        patch.setattr(lora.Adapter, "add_to", without_cast)
        iterate(patch, config("wan22", "1x720x1280"))
    with monkeypatch.context() as patch:
        loss = train.dmd_loss
        patch.setattr(train, "dmd_loss", lambda *x: loss(*x) * loss(*x).sum().item())
        waits = iterate(patch, config("wan22", "1x720x1280")).waits
        assert waits["<lambda>"] + waits["update_student"] == 1, waits
