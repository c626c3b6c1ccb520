"""Claims about large teachers: roles share one base, and Wan2.2 follows the paper's rules."""

import gc
import math
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from students import error_of, train_student, write_embeddings

import sample
import train
from models import lora, parallel, plan, qwen_image, teachers
from models.common import UserError, normal, stream, write_tensors

CPU = torch.device("cpu")
FAST = dict(batch=4, micro_batch=2, fake_updates=2, lr=1e-3, fake_lr=1e-3)


def begin(teacher="wan22-tiny", k=1, stir=True, **settings) -> train.Run:
    """Make a run at iteration 0 of phase k in float32. stir: move its adapters away from 0."""
    size = ("32x32",) if "qwen" in teacher else ("1x32x32",)
    usual = dict(dtype="float32", fake_updates=1, size=size)
    cfg = train.make_config(teacher, **usual | settings)
    train.validate(cfg)
    bases = {}
    keep = lambda load: lambda branch: bases.get(branch) or bases.setdefault(branch, load(branch))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers, "cache", keep)
        run = train.make_run(cfg, CPU, Path("nowhere"))
    run.bases = bases
    for phase in range(1, k + 1):
        train.begin_phase(run, phase)
    run.i = 0
    for role in trained_roles(run) if stir else ():
        for name, p in role.parameters.items():
            if name.endswith(".up"):
                p.data.copy_(normal(p.shape, role.name, name) / 10)
    return run


def trained_roles(run) -> list:
    """The roles of the run that have parameters."""
    roles = [*run.roles.student.values(), *run.roles.fakes.values()]
    return [role for role in roles if role.parameters]


def inputs(run, n=2) -> tuple:
    """x, t and c of n samples."""
    c, shape = run.data(n, stream("shared"), stream("rng"))
    return normal((n, *shape), "x"), torch.tensor([0.9, 0.3])[:n], c


def iterate(run, n=3) -> torch.Tensor:
    """Run n iterations and return the fakes' losses and the student's distances."""
    numbers = []
    for _ in range(n):
        numbers += [row.get("loss", row.get("distance")) for row in train.run_iteration(run)]
        run.i += 1
    return torch.tensor(numbers)


def report(run) -> tuple[dict, bytes]:
    """Metrics and picture of a run."""
    return teachers.report(run.cfg, run.phases, run.roles, run.k, CPU, run.out, run.finished)


# -- roles ---------------------------------------------------------------------------------------


def test_a_phase_starts_from_the_teacher(monkeypatch):
    """Student and fakes equal it to the bit; the fake is reset in place, student1 is kept.

    Optimizers are new, and the old ones freed before: there is no memory for both.
    """
    settings = dict(train_student="lora", train_fake="full", dtype="bf16", guidance=(1.0,))
    run = begin(stir=False, **FAST, **settings)
    iterate(run, 1)
    fake1 = run.roles.fakes[1, 0]
    memory = {p.data_ptr() for p in fake1.parameters.values()}
    x, teacher = inputs(run), run.roles.teacher

    @torch.no_grad()
    def is_equal(role, branch):
        return torch.equal(role(*x), teacher[branch](*x))

    assert not is_equal(fake1, 1) and not is_equal(run.roles.student[1], 1)
    old, freed, adamw = weakref.ref(run.optimizers["fake1"]), [], train.AdamW
    monkeypatch.setattr(train, "AdamW", lambda *x: freed.append(old() is None) or adamw(*x))
    train.begin_phase(run, 2)
    assert freed and all(freed)
    assert not any(moment.any() for moment in run.optimizers["fake1"].second.values())
    assert is_equal(fake1, 1) and is_equal(run.roles.fakes[2, 0], 2)
    assert is_equal(run.roles.student[2], 2) and not is_equal(run.roles.student[1], 1)
    assert memory == {p.data_ptr() for p in fake1.parameters.values()}


def test_nothing_is_in_memory_twice():
    """The parameters are two bases, each once, and the bytes that plan.py gives the roles."""
    gc.collect()
    before = {id(x) for x in gc.get_objects() if type(x) is torch.nn.Parameter}
    run = begin(k=2, train_student="full", train_fake="lora", dtype="bf16")
    train.run_iteration(run)
    gc.collect()
    new = [x for x in gc.get_objects() if type(x) is torch.nn.Parameter and id(x) not in before]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in new}
    full, adapter = (
        plan.role_bytes("wan22-tiny", is_full, 4, torch.bfloat16, parallel.SINGLE)
        for is_full in (True, False)
    )
    roles = 2 * full.role + 2 * adapter.role  # student1, student2; fake1, fake2
    assert sum(storages.values()) == 2 * adapter.base + roles
    assert len(storages) == len(new)


def test_gradients_do_not_depend_on_checkpointing():
    """Of blocks and of a whole step. Networks and the negative control: tests/test_ports.py."""
    settings = dict(k=2, batch=2, fake_updates=1, lr=1e-3, fake_lr=1e-3)
    runs = [begin(checkpointing=x, **settings) for x in (True, False)]
    on, off = ({row["role"]: row["grad_norm"] for row in train.run_iteration(run)} for run in runs)
    assert on == pytest.approx(off, rel=1e-5) and "student2" in on
    for role, other in zip(*map(trained_roles, runs)):  # a step moves one by 4e-3 or more
        for name, p in role.parameters.items():
            assert error_of(other.parameters[name], p) < 1e-4, (role.name, name)


def test_the_log_has_the_speed_of_whole_iterations_only():
    """run.i is the next iteration: 0 after the last of the warm-up."""
    run = begin()
    for run.i, has_speed in ((0, False), (1, True)):
        rows = [{}]
        train.add_measurements(run, rows, 1.0)
        assert ("mfu" in rows[0]) == has_speed and "seconds_iteration" in rows[0]


# -- Wan2.2 by the paper's rules -----------------------------------------------------------------


def test_phase_1_never_loads_the_low_noise_base_and_phase_2_does():
    """Training, with a fake per depth, and previews. Losses and metrics are finite."""
    settings = dict(iters=1, batch=2, micro_batch=1, eval_samples=2, lr=1e-3)
    run = begin(stir=False, **settings, depths="mixed", fake_rollout="per-depth")
    for rows in train.train(run):
        assert all(math.isfinite(row.get("loss", row.get("distance"))) for row in rows)
        metrics, picture = report(run)
        assert list(run.bases) == ([1] if run.k == 1 else [1, 2])
    assert run.finished and picture.startswith(b"\x89PNG")
    assert metrics["latent_distance"] > 0 and metrics["latent_distance_teacher_same_steps"] > 0


@pytest.mark.parametrize(
    "teacher", ["wan22-tiny", pytest.param("qwen-image-tiny", marks=pytest.mark.slow)]
)
def test_a_phase_changes_its_student_and_its_fakes_and_nothing_else(teacher):
    """Phase 2 of Wan2.2 changes three adapters; on one base, two. Bases and student1 stay."""

    def snapshot():
        nets = {f"base{branch}": net for branch, net in run.bases.items()}
        named = [(name, *x) for name, net in nets.items() for x in net.named_parameters()]
        named = [x for x in named if not x[2].requires_grad]
        named += [(r.name, *x) for r in trained_roles(run) for x in r.parameters.items()]
        return {(role, name): p.detach().clone() for role, name, p in named}

    run = begin(teacher, 2, **FAST)
    before = snapshot()
    iterate(run, 2)
    after = snapshot()
    changed = {name[0] for name in before if not torch.equal(before[name], after[name])}
    fakes = {"fake1", "fake2"} if teacher.startswith("wan22") else {"fake1"}
    assert changed == {"student2"} | fakes
    assert {name[0] for name in before} >= {"base1", "student1"}


@pytest.mark.parametrize("teacher", ["wan22-tiny", "qwen-image-tiny"])
@torch.no_grad()
def test_guidance_is_its_closed_form_with_the_scale_of_each_branch(teacher):
    """v_null + g (v - v_null); for Qwen-Image it is rescaled to the norm of v in every token."""
    run = begin(teacher, 2)
    x, t, c = inputs(run)
    null = teachers.null_text(run.cfg, run.out).expand(2, -1, -1)
    for branch, net in run.bases.items():
        scale = run.cfg.guidance[branch - 1]
        v, v_null = net(x, t, c), net(x, t, {"text": null})
        expected = v_null + scale * (v - v_null)
        if teacher == "qwen-image-tiny":
            tokens, like = qwen_image.pack(expected), qwen_image.pack(v)
            tokens = tokens * like.norm(dim=-1, keepdim=True) / tokens.norm(dim=-1, keepdim=True)
            expected = qwen_image.unpack(tokens, x.shape[-2] // 2)
        guided = run.roles.teacher[branch](x, t, c)
        torch.testing.assert_close(guided, expected)
        assert (guided - (v_null + (scale + 1) * (v - v_null))).abs().max() > 0.01


@pytest.mark.parametrize("name,shift", [("wan22", 5.0), ("qwen-image", 3.0)])
def test_shifts_and_learning_rates_are_the_papers(name, shift):
    """The learning rate follows from what a role trains: an adapter or all parameters."""
    cfg, full = train.make_config(name), train.make_config(name, train_fake="full")
    assert (cfg.phases, cfg.steps, cfg.shift) == (2, 4, shift)
    assert (cfg.lr, cfg.fake_lr, full.lr, full.fake_lr) == (5e-5, 5e-5, 5e-5, 4e-7)


# -- int8 bases and buckets ----------------------------------------------------------------------


@torch.no_grad()
def test_an_int8_base_is_the_base_within_half_a_step_of_its_rows():
    """Merged LoRAs would be rounded with it, adapters are not. All but adapted layers is as it was.

    An int8 layer computes what a layer with the product of integers and scales would.
    """
    run, rounded = begin(), begin(base="int8")
    (base,), (int8,) = run.bases.values(), rounded.bases.values()
    is_linear = lambda name: isinstance(base.get_submodule(name), lora.Linear)
    named = dict(int8.named_parameters())
    for name, p in base.named_parameters():
        layer = name.removesuffix(".weight")
        if layer == name or not layer.startswith("blocks.") or not is_linear(layer):
            assert torch.equal(named[name], p)
            continue
        step = named[f"{layer}.scale"][:, None]
        assert named[name].dtype == torch.int8 and torch.equal(step, step.bfloat16().float())
        assert ((named[name] * step - p).abs() <= 0.51 * step).all()
        p.copy_(named[name] * step)
    x, t, c = inputs(run)
    for role in ("teacher", "student"):
        v, expected = (getattr(r.roles, role)[1](x, t, c) for r in (rounded, run))
        torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-5)


def test_an_int8_base_is_never_kept_in_another_dtype_for_backward():
    """Without checkpointing a forward saves as many bytes as on a float base. Control: autograd."""
    dtype = torch.bfloat16
    x, t, c = plan.meta_inputs(plan.teacher_network("wan21-tiny", dtype), (16, 1, 2, 2))
    saved = []
    for int8, product in ((False, None), (True, None), (True, lambda x, w: x @ w.to(x.dtype).T)):
        net = plan.teacher_network("wan21-tiny", dtype, int8=int8)
        lora.add_adapter(net, "role", 1)
        with pytest.MonkeyPatch.context() as patch:
            if product:
                patch.setattr(lora.Int8Product, "apply", product)
            with plan.MemoryTracker([x, t, *c.values(), *net.parameters()]) as tracker:
                v = net(x, t, c, "role")
                saved.append(tracker.now)
                v.backward(torch.empty_like(v))
    float_base, int8_base, cast = saved
    weights_size = sum(p.nbytes for p in net.parameters() if p.dtype == torch.int8)
    assert int8_base < float_base + weights_size / 20  # the scales, cast
    assert cast > int8_base + weights_size * dtype.itemsize / 2


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_and_are_freed():
    """Attention, rope, int8 layers and adapters in one graph per role. Needs a C++ compiler."""
    settings = dict(teacher="wan21-tiny", base="int8", batch=2, micro_batch=1)
    expected = iterate(begin(**settings), 1)
    run = begin(**settings, compile=True)
    torch.testing.assert_close(iterate(run, 1), expected, rtol=1e-4, atol=0)
    net = weakref.ref(run.bases[1])
    del run
    gc.collect()
    assert net() is None


@pytest.mark.slow
def test_a_student_trains_on_an_int8_base(tmp_path):
    """And is sampled on the int8 and on the float base."""
    out = train_student(tmp_path / "run", "wan22-tiny", "--base", "int8", "--size", "1x32x32")
    sampled = [
        sample.main(["--student", str(out), "--n", "1", *base, "--out", str(tmp_path / str(i))])
        for i, base in enumerate(([], ["--base", "int8"], ["--base", "float"]))
    ]
    assert sampled == [0, 0, 0]
    own, int8, full = (load_file(tmp_path / f"{i}/latents.safetensors")["x"] for i in range(3))
    assert torch.equal(own, int8) and 0 < (full - own).norm() < 0.1 * full.norm()


def test_an_update_of_a_bucket_is_the_update_of_a_run_with_that_size_alone():
    sizes = ("48x64", "64x48")
    mixed, first, second = (begin(**FAST, size=size) for size in (sizes, sizes[:1], sizes[1:]))
    _, shape = mixed.data(1, stream(*mixed.key(0), "data"), stream("any"))
    numbers = [iterate(run, 1)[0] for run in (mixed, first, second)]
    same, other = numbers[1:] if shape == (16, 3, 6, 8) else numbers[:0:-1]
    torch.testing.assert_close(numbers[0], same, rtol=1e-5, atol=0)
    assert (numbers[0] - other).abs() > 1e-3


def test_the_buckets_are_the_papers_and_are_drawn_with_their_probabilities():
    wide, large = (60, 104), (90, 160)
    expected = {(16, 21, *hw): 0.4 for hw in (wide, wide[::-1])}
    expected |= {(16, 21, *hw): 0.1 for hw in (large, large[::-1])}
    assert teachers.buckets(train.make_config("wan22")) == pytest.approx(expected)
    assert teachers.buckets(train.make_config("wan21")) == {(16, 1, 90, 160): 1.0}
    assert len(teachers.buckets(train.make_config("qwen-image"))) == 7
    run = begin(size=("48x64:3", "1x64x48:1"))  # frames may be part of a size
    shapes = [run.data(1, stream(i), stream(i, "rng"))[1] for i in range(200)]
    assert set(shapes) == {(16, 3, 6, 8), (16, 1, 8, 6)}
    assert shapes.count((16, 3, 6, 8)) == pytest.approx(150, abs=25)


# -- files and commands --------------------------------------------------------------------------


def test_image_to_video_pairs_an_image_with_the_embedding_of_its_caption(tmp_path):
    prompts = write_embeddings(tmp_path / "p.safetensors", "wan22-tiny", "cabab")
    images = tmp_path / "i.safetensors"
    frames = normal((2, 20, 3, 6, 8), "image").bfloat16()
    metadata = {"kind": "first frames", "captions": {"image.48x64": ["a", "b"]}}
    write_tensors(images, {"image.48x64": frames}, metadata)
    files = dict(prompts=str(prompts), images=str(images), size=("48x64",))
    cfg = train.make_config("wan22-i2v-tiny", **files)
    train.validate(cfg)
    c, shape = teachers.make_data(cfg, tmp_path)(20, stream("shared"), stream("rng"))
    assert shape == (16, 3, 6, 8) and set(c) == {"text", "image"}
    rows = [next(i for i in (0, 1) if torch.equal(x, frames[i])) for x in c["image"]]
    embeddings = teachers.open_prompts(cfg, prompts)
    texts = [embeddings.row("cabab".index("ab"[i])) for i in rows]
    assert set(rows) == {0, 1} and all(map(torch.equal, c["text"], texts))


def test_embeddings_of_another_teacher_or_width_are_refused(tmp_path):
    for teacher, dim in (("mine", 64), ("wan22-tiny", 32)):
        path = write_embeddings(tmp_path / "e.safetensors", teacher, dim=dim)
        with pytest.raises(UserError, match=f"found {dim} for .*python -m models.encoders"):
            teachers.open_prompts(train.make_config("wan22-tiny"), path)
