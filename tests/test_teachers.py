"""Claims about large teachers: one base and many roles, Wan2.2 by the paper's rules."""

import gc
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from students import write_embeddings

import sample
import train
from models import lora, parallel, plan, qwen_image, teachers, weights
from models.common import UserError, normal, stream, write_tensors
from phases import step_times

CPU = torch.device("cpu")
TINY = ["wan21-tiny", "wan22-tiny", "wan22-i2v-tiny", "qwen-image-tiny"]
MIX = [("lora", "lora"), ("lora", "full"), ("full", "full")]  # generator, fake
FAST = dict(batch=4, micro_batch=2, fake_updates=2, lr=1e-3, fake_lr=1e-3)


def begin(teacher="wan22-tiny", k=1, stir=True, **settings) -> train.Run:
    """A run at iteration 0 of phase k, in float32; stir: its adapters are not 0 any more."""
    cfg = train.make_config(teacher, **dict(dtype="float32", fake_updates=1) | settings)
    train.validate(cfg)
    with pytest.MonkeyPatch.context() as patch:
        make_bases = teachers.OffloadedBases
        keep = lambda *arguments: bases.append(make_bases(*arguments)) or bases[0]
        bases = []
        patch.setattr(teachers, "OffloadedBases", keep)
        run = train.make_run(cfg, CPU, Path("nowhere"))
    run.bases = bases[0]
    for phase in range(1, k + 1):
        train.begin_phase(run, phase)
    run.i = 0
    for role in all_roles(run) if stir else ():
        for name, p in role.parameters.items():
            if name.endswith(".up"):
                p.data.copy_(normal(p.shape, role.name, name) / 10)
    return run


def all_roles(run) -> list:
    """The roles of the run that have parameters."""
    roles = [*run.roles.student.values(), *run.roles.fakes.values()]
    return [role for role in roles if role.parameters]


def snapshot(run) -> dict:
    """A copy of every tensor of the run: roles and bases."""
    tensors = {f"{r.name}/{n}": p for r in all_roles(run) for n, p in r.parameters.items()}
    for branch, net in run.bases.networks.items():
        frozen = [(n, p) for n, p in net.named_parameters() if not p.requires_grad]
        tensors |= {f"base{branch}/{n}": p for n, p in frozen}
    return {name: p.detach().clone() for name, p in tensors.items()}


def inputs(run, n=2) -> tuple:
    """x, t and c of n samples."""
    c, shape = run.data(n, stream("shared"), stream("rng"))
    return normal((n, *shape), "x"), torch.tensor([0.9, 0.3])[:n], c


def numbers_of(run, n=3) -> torch.Tensor:
    """Losses of the fakes and distances of the student in some iterations."""
    numbers = []
    for _ in range(n):
        numbers += [row.get("loss", row.get("distance")) for row in train.run_iteration(run)]
        run.i += 1
    return torch.tensor(numbers)


def gradients_of(run) -> dict:
    """(update, role, parameter) -> gradient, of one iteration that takes no step."""
    gradients = {}

    def collect(run, name, values):
        for role in all_roles(run):
            for key, p in role.parameters.items():
                if p.grad is not None:
                    gradients[name, role.name, key] = p.grad.clone()
                p.grad = None
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "step_optimizers", collect)
        train.run_iteration(run)
    return gradients


# -- roles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator,fake", MIX)
@pytest.mark.parametrize("teacher", ["wan22-tiny", "qwen-image-tiny"])
@torch.no_grad()
def test_at_the_start_student_fake_and_teacher_are_one_function(teacher, generator, fake):
    """To the bit, adapters and full copies alike; after an update they are not."""
    kinds = dict(generator=generator, fake=fake, dtype="bf16", guidance=(1.0,))
    run = begin(teacher, 2, False, fake_lr=1e-3, lr=1e-3, **kinds)
    x, student, low = inputs(run), run.roles.student[2], max(run.roles.teacher)
    assert torch.equal(run.roles.fakes[1, 0](*x), run.roles.teacher[1](*x))
    assert torch.equal(run.roles.fakes[low, 0](*x), run.roles.teacher[low](*x))
    assert torch.equal(student(*x), run.roles.teacher[low](*x))
    with torch.enable_grad():
        numbers_of(run)
    assert not torch.equal(student(*x), run.roles.teacher[low](*x))


@pytest.mark.parametrize("generator,fake", MIX)
def test_nothing_is_in_memory_twice(generator, fake):
    """All parameters that exist are two bases, once, and what the plan says of the roles."""
    gc.collect()
    before = {id(x) for x in gc.get_objects() if type(x) is torch.nn.Parameter}
    run = begin(k=2, generator=generator, fake=fake, dtype="bf16")
    train.run_iteration(run)
    gc.collect()
    new = [x for x in gc.get_objects() if type(x) is torch.nn.Parameter and id(x) not in before]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in new}
    size = {
        kind: plan.role_bytes("wan22-tiny", kind == "full", 4, torch.bfloat16, parallel.topology)
        for kind in ("lora", "full")
    }
    roles = 2 * size[generator].role + 2 * size[fake].role  # student1, student2; fake1, fake2
    assert sum(storages.values()) == 2 * size["lora"].base + roles
    assert len(storages) == len(new)


@pytest.mark.parametrize("generator,fake", MIX)
@pytest.mark.parametrize(
    "teacher,k", [("wan22-tiny", 2), ("wan22-i2v-tiny", 1), ("qwen-image-tiny", 2)]
)
def test_gradients_do_not_depend_on_checkpointing(teacher, k, generator, fake):
    """Of every role and parameter, to 1e-5: nothing depends on when a forward was recorded."""
    settings = dict(generator=generator, fake=fake, fake_updates=4, batch=2)
    on, off = (gradients_of(begin(teacher, k, checkpointing=x, **settings)) for x in ("on", "off"))
    assert {role[:-1] for _, role, _ in on} == {"student", "fake"} and on.keys() == off.keys()
    for key, gradient in on.items():
        torch.testing.assert_close(off[key], gradient, rtol=1e-5, atol=1e-7, msg=str(key))


def test_a_role_that_is_an_attribute_gives_wrong_gradients(monkeypatch):
    """Negative control: with checkpointing, backward would recompute with the last role."""
    active = [None]

    def forward(self, x, adapter=None):
        y = torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return y + self.adapters[active[0]](x) if active[0] in self.adapters else y

    def by_attribute(run):
        for role in [*run.roles.teacher.values(), *all_roles(run)]:
            velocity = role.velocity
            role.velocity = lambda *x, name=role.name, velocity=velocity: (
                active.__setitem__(0, name) or velocity(*x)
            )
        return student_gradient(run)

    def student_gradient(run):
        found = gradients_of(run).items()
        return torch.cat([x.flatten() for (_, role, _), x in found if role == "student1"])

    right = student_gradient(begin())
    monkeypatch.setattr(lora.Linear, "forward", forward)
    off = by_attribute(begin(checkpointing="off"))
    run = begin(checkpointing="on")  # of blocks; that of the whole step would call the role again
    run.cfg = train.replace(run.cfg, checkpointing="off")
    on = by_attribute(run)
    torch.testing.assert_close(off, right)  # nothing is computed again
    assert (on - right).norm() > 0.05 * right.norm()


# -- Wan2.2 by the paper's rules -----------------------------------------------------------------


def test_phase_1_never_loads_the_low_noise_base_and_phase_2_does():
    run = begin(iters=2, warmup=1, eval_samples=2)
    run.i = -1
    for _ in train.train(run):
        assert list(run.bases.networks) == ([1] if run.k == 1 else [1, 2])
        report(run)
        assert list(run.bases.networks) == ([1] if run.k == 1 else [1, 2])
    assert run.finished


def report(run) -> tuple[dict, bytes]:
    """Metrics and picture of a run."""
    return teachers.report(run.cfg, run.phases, run.roles, run.k, CPU, run.out, run.finished)


@pytest.mark.parametrize("teacher", TINY)
def test_a_phase_changes_its_student_and_its_fakes_and_nothing_else(teacher):
    """Phase 2 of Wan2.2: exactly three adapters. On one base: two. Bases and student1 stay."""
    run = begin(teacher, 2, **FAST)
    before = snapshot(run)
    numbers_of(run, 6)
    after = snapshot(run)
    changed = {name.split("/")[0] for name in before if not torch.equal(before[name], after[name])}
    fakes = {"fake1", "fake2"} if teacher.startswith("wan22") else {"fake1"}
    assert changed == {"student2"} | fakes
    assert {name.split("/")[0] for name in before} >= {"base1", "student1"}


def test_an_update_reaches_the_fake_of_its_branch_only():
    """Of eight updates in phase 2 some go to fake1 and some to fake2, none to both."""
    gradients = gradients_of(begin(k=2, fake_updates=8))
    assert {(update, role) for update, role, _ in gradients} == {
        (name, name) for name in ("fake1", "fake2", "student2")
    }


@pytest.mark.parametrize("teacher", ["wan22-tiny", "qwen-image-tiny"])
@torch.no_grad()
def test_guidance_is_its_closed_form_with_the_scale_of_each_branch(teacher):
    """v_null + g (v - v_null), for Qwen-Image at the norm of v in every token."""
    run = begin(teacher, 2)
    x, t, c = inputs(run)
    null = teachers.null_text(run.cfg, run.out).expand(2, -1, -1)
    for branch, net in run.bases.networks.items():
        scale = run.cfg.guidance[branch - 1]
        v, v_null = net(x, t, c), net(x, t, {"text": null})
        expected = v_null + scale * (v - v_null)
        if teacher == "qwen-image-tiny":
            tokens, like = qwen_image.pack(expected), qwen_image.pack(v)
            tokens = tokens * like.norm(dim=-1, keepdim=True) / tokens.norm(dim=-1, keepdim=True)
            expected = qwen_image.unpack(tokens, x.shape[-2] // 2)
        found = run.roles.teacher[branch](x, t, c)
        torch.testing.assert_close(found, expected)
        assert (found - (v_null + (scale + 1) * (v - v_null))).abs().max() > 0.01
    assert train.make_config("wan22").guidance == (4.0, 3.0)


@pytest.mark.parametrize("generator,fake", MIX)
def test_phase_2_starts_its_fakes_from_the_teacher_again(generator, fake):
    """Adapters at 0, copies at the base, to the bit, in the memory of the old ones."""
    run = begin(generator=generator, fake=fake, fake_lr=1e-2)
    numbers_of(run, 2)
    fake1 = run.roles.fakes[1, 0]
    memory = {p.data_ptr() for p in fake1.parameters.values()}
    train.begin_phase(run, 2)
    x = inputs(run)
    with torch.no_grad():
        v = run.bases(1)(*x)
        assert torch.equal(fake1(*x), v) and not torch.equal(run.roles.student[1](*x), v)
    assert memory == {p.data_ptr() for p in fake1.parameters.values()}


# -- what may not change a number ----------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("generator,fake", MIX[:2])
def test_offload_changes_no_number(k, generator, fake):
    """One base is on the device at a time; the other is the host's own tensors."""
    settings = FAST | dict(generator=generator, fake=fake, eval_samples=2)
    run, offloaded = (begin(k=k, offload=x, **settings) for x in ("none", "expert"))
    torch.testing.assert_close(numbers_of(offloaded), numbers_of(run), rtol=1e-5, atol=0)
    bases = offloaded.bases
    for call in (lambda: report(offloaded), lambda: train.run_iteration(offloaded)):
        call()
        copied = [
            branch
            for branch, pairs in bases.host.items()
            if any(p.data_ptr() != host.data_ptr() for p, host in pairs)
        ]
        assert copied == [bases.on_device] and len(bases.networks) == k


def test_an_update_of_a_bucket_is_the_update_of_a_run_with_that_size_alone():
    sizes = ("48x64", "64x48")
    mixed, first, second = (begin(**FAST, size=size) for size in (sizes, sizes[:1], sizes[1:]))
    _, shape = mixed.data(1, stream(*mixed.key(0), "data"), stream("any"))
    numbers = [numbers_of(run, 1)[0] for run in (mixed, first, second)]
    same, other = numbers[1:] if shape == (16, 3, 6, 8) else numbers[:0:-1]
    torch.testing.assert_close(numbers[0], same, rtol=1e-5, atol=0)
    assert (numbers[0] - other).abs() > 1e-3


@pytest.mark.parametrize(
    "name,expected",
    [
        (
            "wan22",
            {
                (16, 21, 60, 104): 0.4,
                (16, 21, 104, 60): 0.4,
                (16, 21, 90, 160): 0.1,
                (16, 21, 160, 90): 0.1,
            },
        ),
        ("wan21", {(16, 1, 90, 160): 1.0}),
        ("wan22-5b", {(48, 21, 44, 80): 1.0}),
    ],
)
def test_the_buckets_are_the_papers(name, expected):
    """Drawn with their probabilities; 7 of Qwen-Image; frames may be part of a size."""
    assert teachers.buckets(train.make_config(name)) == pytest.approx(expected)
    assert len(teachers.buckets(train.make_config("qwen-image"))) == 7
    mixed = train.make_config("wan22", size=("480x832:3", "1x720x1280:1"))
    assert teachers.buckets(mixed) == {(16, 21, 60, 104): 0.75, (16, 1, 90, 160): 0.25}
    run = begin(size=("48x64:3", "1x64x48:1"))
    shapes = [run.data(1, stream(i), stream(i, "rng"))[1] for i in range(200)]
    assert shapes.count((16, 3, 6, 8)) == pytest.approx(150, abs=25)


@pytest.mark.parametrize(
    "settings",
    [
        dict(phases=1),
        dict(phases=4),
        dict(phases=1, truncate="off"),
        dict(fake_per_depth=True),
        dict(interval="disjoint", shift=3.0),
        dict(depths="mixed", fake_per_depth=True),
        dict(reuse_rollouts=True, depths="mixed"),
        dict(target="biased"),
        dict(weight="normalised"),
    ],
)
def test_every_way_of_figure_1_distils_a_teacher_of_two_branches(settings):
    """All phases to their end; a preview has more samples than a micro-batch."""
    quick = dict(iters=1, batch=2, micro_batch=1, fake_updates=2, eval_samples=3, lr=1e-3)
    run = begin(stir=False, **quick, **settings)
    for rows in train.train(run):
        assert all(row.get("loss", row.get("distance")) is not None for row in rows)
        metrics, picture = report(run)
    assert run.finished and picture.startswith(b"\x89PNG")
    assert metrics["latent_distance"] > 0 and metrics["latent_distance_teacher_same_steps"] > 0


def test_the_latent_distance_is_the_mean_rms_distance_of_pairs():
    x = torch.tensor([0.0, 1.0, 3.0])[:, None, None].expand(3, 2, 5)
    assert teachers.latent_distance(x) == pytest.approx((1 + 3 + 2) / 3)
    assert teachers.latent_distance(x * math.nan) is None


# -- files and commands --------------------------------------------------------------------------


def write_frames(path: Path, captions=("a", "b")) -> Path:
    """First frames as models.encoders makes them, at 48 x 64 pixels and 9 frames."""
    tensors = {"image.48x64": normal((len(captions), 20, 3, 6, 8), "image").bfloat16()}
    metadata = {"kind": "first frames", "captions": {"image.48x64": list(captions)}}
    write_tensors(path, tensors, metadata)
    return path


def write_weights(folder: Path) -> Path:
    """Two branches of a small Wan, in the layout of diffusers."""
    for branch, name in ((1, "transformer"), (2, "transformer_2")):
        net = weights.random_network("wan22-tiny", torch.float32, seed=branch)
        (folder / name).mkdir(parents=True)
        config = {"_class_name": "WanModel"} | net.settings
        (folder / name / "config.json").write_text(json.dumps(config))
        tensors = {net.diffusers_name(n): p.detach() for n, p in net.named_parameters()}
        save_file(tensors, folder / name / "diffusion_pytorch_model.safetensors")
    return folder


QUICK = "--iters 1 --batch 2 --fake-updates 1 --eval-samples 2 --sample-every 0".split()


def test_embeddings_and_first_frames_of_files_are_what_a_run_sees(tmp_path):
    """An image comes with the embedding of its caption."""
    prompts = write_embeddings(tmp_path / "p.safetensors", "wan22-tiny", "cab")
    images = write_frames(tmp_path / "i.safetensors")
    files = dict(prompts=str(prompts), images=str(images), size=("48x64",))
    cfg = train.make_config("wan22-i2v-tiny", **files)
    train.validate(cfg)
    c, shape = teachers.make_data(cfg, tmp_path)(20, stream("shared"), stream("rng"))
    opened, frames = teachers.open_prompts(cfg, prompts), teachers.open_images(cfg)
    frames = frames.file.get_tensor("image.48x64")
    assert shape == (16, 3, 6, 8) and set(c) == {"text", "image"}
    rows = [next(i for i in (0, 1) if torch.equal(x, frames[i])) for x in c["image"]]
    assert set(rows) == {0, 1}
    for text, i in zip(c["text"], rows):
        assert torch.equal(text, opened.row("cab".index("ab"[i])))


SLOW = pytest.param("qwen-image-tiny", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["wan22-tiny", SLOW])
def test_a_small_teacher_is_distilled_sampled_and_resumed(name, tmp_path, monkeypatch):
    """Previews are kept; sampling repeats; a run cut short ends as if it had not been."""
    out, half = tmp_path / "run", tmp_path / "half"
    flags = ["--teacher", name, "--fake-updates", "1", "--iters", "2", "--save-every", "1"]
    assert train.main([*flags, "--out", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"latent_distance", "latent_distance_teacher_same_steps", "seconds"} <= set(metrics)
    previews = sorted(p.name for p in (out / "previews").iterdir())
    assert "phase1-000002.png" in previews
    assert sum(p.endswith(".safetensors") for p in previews) == train.KEEP_STUDENTS
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"tokens_per_second", "mfu", "hfu", "memory_gb", "seconds_iteration"} <= set(rows[1])
    latents = []
    for path in (out, out / "previews" / "phase2-000002.safetensors"):
        folder = tmp_path / f"samples{len(latents)}"
        line = ["--student", str(path), "--n", "2", "--out", str(folder)]
        assert sample.main(line) == 0
        latents.append(load_file(folder / "latents.safetensors")["x"])
    assert torch.equal(*latents)
    student, whole = (out / "student.safetensors").read_bytes(), train.train

    def cut_short(run):
        for i, rows in enumerate(whole(run)):
            if i == 3:  # inside phase 2
                raise UserError("enough")
            yield rows

    monkeypatch.setattr(train, "train", cut_short)
    assert train.main([*flags, "--out", str(half)]) == 2
    monkeypatch.undo()
    assert not (half / "student.safetensors").exists()
    assert train.main(["--teacher", name, "--resume", "--out", str(half)]) == 0
    assert (half / "student.safetensors").read_bytes() == student


def test_published_weights_are_distilled_and_watched_for_changes(tmp_path, capsys):
    """A folder, embeddings and a LoRA per branch; a base that has changed since is refused."""
    folder = write_weights(tmp_path / "weights")
    prompts = write_embeddings(tmp_path / "p.safetensors", "wan22-tiny")
    files = []
    for name in ("high", "low"):
        net, tensors = weights.random_network("wan22-tiny", torch.float32), {}
        for key, p in lora.start_adapter(net, "x", (name,), 2).items():
            layer, part = key.rsplit(".", 1)
            tensors[f"diffusion_model.{layer}.lora_{part}.weight"] = p.detach() + 0.01
        files.append(tmp_path / f"{name}.safetensors")
        save_file(tensors, files[-1])
    out, samples = tmp_path / "run", ["--n", "2", "--out", str(tmp_path / "samples")]
    flags = [
        *QUICK,
        "--teacher",
        "wan22-tiny",
        "--weights",
        folder,
        "--prompts",
        prompts,
        "--out",
        out,
        "--teacher-lora",
        *files,
    ]
    assert train.main([*map(str, flags)]) == 0
    digests = json.loads((out / "config.json").read_text())["files"]
    assert len(digests) == 5 and str(prompts) in digests
    assert sample.main(["--student", str(out), *samples]) == 0
    write_embeddings(prompts, "wan22-tiny", "xyzw")  # only the base matters for sampling
    assert sample.main(["--student", str(out), *samples]) == 0
    save_file({key: 2 * x for key, x in tensors.items()}, files[-1])
    capsys.readouterr()
    assert sample.main(["--student", str(out), *samples]) == 2
    assert "has changed" in capsys.readouterr().err


WRONG = {
    "--guidance 4 3 2": "high noise, low noise, got 3",
    "--teacher wan21-tiny --guidance 4 3": "expected one number",
    "--size 50x64": "nearest: 48x64",
    "--teacher wan22-5b --weights random --size 720x1280": "nearest: 704x1280",
    "--size wide": "HEIGHTxWIDTH",
    "--size 48x64:none": "HEIGHTxWIDTH",
    "--size 48x64:0.0": "HEIGHTxWIDTH",
    "--frames 80": "nearest: 81",
    "--teacher qwen-image-tiny --frames 5": "makes pictures",
    "--offload expert --truncate off": "--truncate on",
    "--images x.safetensors": "is for image to video",
    "--prompts nowhere.txt": "No such file",
    "--prompts nowhere.safetensors": "cannot read",
    "--prompts some.txt": "no text encoder",
    "--prompts of-qwen.safetensors": "of 64 channels for wan22-tiny",
    "--prompts wide.safetensors": "found 32",
    "--prompts long.safetensors": "at most 16 tokens",
    "--teacher wan22-i2v-tiny --images frames.safetensors --prompts p.safetensors --size 64x48": "expected 9x64x48",
    "--teacher wan22-i2v-tiny --images frames.safetensors": "needs --images and --prompts",
    "--teacher wan22-i2v-tiny --size 48x64 --images frames.safetensors --prompts z.safetensors": "no embedding of the caption 'a'",
    "--teacher wan22": "hf download",
    "--teacher wan22 --weights nowhere": "does not exist",
    "--weights weights --prompts p.safetensors --teacher-lora p.safetensors": "one per transformer",
    "--teacher wan21-tiny --weights weights --prompts p.safetensors": "expected one transformer",
    "--weights cut --prompts p.safetensors": "cut/transformer_2",
    "--teacher-lora x.safetensors": "needs published weights",
    "--teacher toy2d --offload expert": "for large teachers",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with all that the wrong commands name."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "some.txt").write_text("a cat\n")
    write_embeddings(folder / "p.safetensors", "wan22-tiny")
    write_embeddings(folder / "z.safetensors", "wan22-tiny", "z")
    write_embeddings(folder / "of-qwen.safetensors", "qwen-image")
    write_embeddings(folder / "wide.safetensors", "wan22-tiny", dim=32)
    write_embeddings(folder / "long.safetensors", "wan22-tiny", length=20)
    write_frames(folder / "frames.safetensors")
    write_weights(folder / "weights")
    cut = write_weights(folder / "cut") / "transformer_2"  # only phase 2 would read it
    (cut / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    return folder


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_is_answered_in_one_line(line, files, monkeypatch, capsys):
    """Exit status 2, no traceback, nothing written."""
    monkeypatch.chdir(files)
    teacher = [] if "--teacher " in line else ["--teacher", "wan22-tiny"]
    capsys.readouterr()
    assert train.main([*teacher, *line.split()]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and WRONG[line] in printed.err, printed
    assert printed.out == "" and not (files / "out").exists()


def test_a_teacher_that_is_not_finite_stops_the_run_with_one_line(tmp_path, monkeypatch, capsys):
    """After MAX_SKIPS updates in a row, with previews between; the line names phase and role."""
    load_base = teachers.load_base

    def load_broken(*arguments):
        net = load_base(*arguments)
        parallel.blocks_of(net)[0].ffn[0].weight.data[0] = math.nan
        return net

    monkeypatch.setattr(teachers, "load_base", load_broken)
    monkeypatch.setattr(train, "MAX_SKIPS", 3)
    flags = ["--teacher", "wan22-tiny", "--iters", "20", "--out", str(tmp_path / "o")]
    capsys.readouterr()
    assert train.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "phase 1" in error and "fake1" in error


def test_times_and_learning_rates_are_the_papers():
    """Wan: 1000 937.5 833.3 625, Qwen-Image: 1000 900 750 500. Rates go with the kind of role."""
    for name, expected in (
        ("wan22", [1000, 937.5, 833.33, 625]),
        ("qwen-image", [1000, 900, 750, 500]),
    ):
        cfg = train.make_config(name)
        times = step_times(cfg.steps, cfg.shift)
        assert [1000 * t for t in times[:-1]] == pytest.approx(expected, abs=0.01)
        assert cfg.phases == 2 and (cfg.lr, cfg.fake_lr) == (5e-5, 5e-5)
    full = train.make_config("wan22", fake="full")
    assert (full.generator, full.lr, full.fake_lr) == ("lora", 5e-5, 4e-7)
    assert train.make_config("wan22", generator="full").lr == 2e-6
    assert train.make_config("wan22", generator="full", lr=1e-6).lr == 1e-6
