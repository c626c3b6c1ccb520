"""Claims about several processes: they are one, in numbers, checkpoints, errors and signals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from students import refusal, wait_for_log, write_lora

import sample
import train
from models import encoders, parallel, weights
from models.common import UserError, torchrun_ranks

ROOT = Path(__file__).parent.parent
HELPER = ROOT / "tests" / "two_processes.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
PATIENCE = 600  # seconds: a busy machine must not fail


def run_jobs(folder: Path, jobs: list[dict]) -> list:
    """Run jobs of tests/two_processes.py. Returns [[exit status, stderr] per rank] per job."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    command = [sys.executable, str(HELPER), str(file)]
    subprocess.run(command, check=True, timeout=1500, env=ENVIRONMENT)
    return json.loads(file.with_suffix(".done").read_text())


def run_all(folder: Path, jobs: list[dict]) -> None:
    """Run jobs, all of which must succeed."""
    for job, ranks in zip(jobs, run_jobs(folder, jobs)):
        assert all(status == 0 for status, _ in ranks), (job, ranks)


@pytest.mark.parametrize(
    "line,ranks",
    [
        ("", (0, 1, 0, 1)),
        ("WORLD_SIZE=1 RANK=1", (0, 1, 0, 1)),  # one process prints, whatever its rank
        ("WORLD_SIZE=4 RANK=3 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2", (3, 4, 1, 2)),
        ("WORLD_SIZE=2 RANK=0", None),  # a scheduler's pod
        ("WORLD_SIZE=two RANK=0 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2", None),
    ],
)
def test_only_the_variables_of_torchrun_make_ranks(monkeypatch, line, ranks):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for pair in line.split():
        monkeypatch.setenv(*pair.split("="))
    if ranks:
        assert torchrun_ranks() == ranks
    else:
        with pytest.raises(UserError, match="variables of torchrun, found RANK=0.*; start"):
            torchrun_ranks()


def test_the_encoders_run_in_one_process(monkeypatch, tmp_path, capsys):
    """Several would write the same files."""
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), "1212"):
        monkeypatch.setenv(name, value)
    line = ["text", "--teacher", "wan22", "--out", tmp_path / "new"]
    assert "runs in one process" in refusal(capsys, line, encoders.main)
    assert not list(tmp_path.iterdir())


# -- the numbers of one process ------------------------------------------------------------------

# 15 tokens: two ranks have 8 and 7. Texts of Qwen-Image are 1 to 16 tokens, so also 1 and 0.
SHORT = dict(iters=5, size=["48x80"], frames=1, dtype="float32", batch=4, micro_batch=2)
TWO = {"two": dict(processes=2)}
MORE_WAYS = {
    "context": dict(processes=2, context=2),
    "nodes": dict(processes=4, nodes=2, context=2),
}
BOUNDS = {"log": 1e-5, "v": 1e-4, "moved": 1e-2}  # relative L2 that rounding may cost


def differences(folder: Path, mix: str, ways: dict, **settings) -> dict[str, list[str]]:
    """For each way, what differs from one process: of the log, of movements, of v."""
    job = (
        dict(zip(("teacher", "train_student", "train_fake"), mix.split()), job="numbers")
        | SHORT
        | settings
    )
    jobs = {"one": {}} | ways
    run_all(folder, [job | how | dict(out=str(folder / way)) for way, how in jobs.items()])
    one, found = load_file(folder / "one"), {}
    for way in ways:
        other = load_file(folder / way)
        assert set(one) == set(other)
        norms = {name: x.norm() or 1 for name, x in one.items()}  # a frozen expert moves by 0
        errors = {name: ((x - other[name]).norm() / norms[name]).item() for name, x in one.items()}
        bad = [name for name, x in errors.items() if not x < BOUNDS[name.split("/")[0]]]
        found[way] = [f"{name}: {errors[name]:.1e}" for name in bad]
    return found


def test_two_processes_have_the_numbers_of_one(tmp_path):
    """In two phases. Controls: test_each_mistake_is_caught."""
    found = differences(tmp_path, "wan22-tiny lora full", TWO, iters=1, fake_updates=2)
    assert found == {"two": []}


OTHER_STEPS = dict(truncate=False, reuse_rollouts=True, warmup=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mix,settings",
    [
        ("wan22-tiny full lora", dict(checkpointing=False)),
        ("qwen-image-tiny lora full", OTHER_STEPS),
    ],
)
def test_more_processes_have_the_numbers_of_one(tmp_path, mix, settings):
    """With context parallelism, and as two nodes of two processes."""
    found = differences(tmp_path, mix, MORE_WAYS, **settings)
    assert not any(found.values()), found


@pytest.mark.slow
def test_each_mistake_is_caught(tmp_path):
    """Negative controls of the comparison with one process."""
    mistakes = {
        "no sum of replicated gradients": 1,
        "means instead of sums": 1,
        "attention to own tokens": 2,
    }
    ways = {name: dict(processes=2, context=n, mistake=name) for name, n in mistakes.items()}
    found = differences(tmp_path, "wan22-tiny lora full", ways, iters=1, fake_updates=1)
    assert all(found.values()), found


@pytest.mark.slow
def test_small_steps_of_norms_reach_a_bf16_student(tmp_path):
    """Norms are replicated and used in float32: a step that bf16 would lose changes v."""
    out = {n: str(tmp_path / str(n)) for n in (1, 2)}
    job = dict(job="small_step", teacher="wan22-tiny")
    run_all(tmp_path, [dict(job, processes=n, out=out[n]) for n in out])
    one, two = (load_file(file) for file in out.values())
    change = (one["after"] - one["before"]).norm()
    assert change and all((one[name] - two[name]).norm() < 0.01 * change for name in one)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts what is read")
def test_a_rank_reads_its_own_rows_of_published_weights(tmp_path):
    """Half of the bytes, and rows of a LoRA are merged. Negative control: ranks read all rows."""
    net = weights.random_network("wan21-tiny", torch.float32)
    file, lora = str(tmp_path / "base.safetensors"), str(tmp_path / "lora.safetensors")
    save_file(dict(net.named_parameters()), file)
    write_lora(lora, "lightning", net)
    job = dict(job="load", processes=2, files=[file])
    ways = {"rows": {}, "merged": dict(lora=lora), "whole": dict(mistake="whole tensors")}
    run_all(tmp_path, [job | how | dict(out=str(tmp_path / way)) for way, how in ways.items()])
    rows, merged, whole = (load_file(tmp_path / way) for way in ways)
    size = Path(file).stat().st_size
    shares = [x.pop("bytes read") / size for x in (rows, merged, whole)]
    print(f"bytes read of {size}, per rank: rows {shares[0]}, whole tensors {shares[2]}")
    assert (shares[0] < 0.6).all() and (shares[2] > 0.99).all()
    assert_identical(rows, load_file(file))
    expected = weights.load(file, torch.float32, teacher="wan21-tiny", loras=[(Path(lora), 1.0)])
    assert_close(dict(expected.named_parameters()), merged)
    with pytest.raises(AssertionError):
        assert_close(rows, merged)


# -- checkpoints ---------------------------------------------------------------------------------

FLAGS = (
    "--teacher wan22-tiny --iters 3 --batch 4 --micro-batch 2 --fake-updates 1 --save-every 100 "
    "--sample-every 0 --eval-samples 2 --size 1x48x80 --dtype float32 --train-student lora "
    "--train-fake full"
).split()


def train_job(out: Path, *flags: str, processes: int = 1, **how) -> dict:
    argv = [*FLAGS, "--out", str(out), *flags]
    return dict(job="command", processes=processes, argv=argv, **how)


def load_student(out: Path) -> dict:
    return load_file(out / "student.safetensors")


def assert_close(a: dict, b: dict, tolerance: float = 1e-5) -> None:
    off = sum((a[name] - b[name]).square().sum() for name in a)
    assert off < tolerance**2 * sum(x.square().sum() for x in a.values())


def assert_identical(a: dict, b: dict) -> None:
    assert set(a) == set(b) and all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.slow
def test_a_checkpoint_resumes_on_another_number_of_processes(tmp_path):
    """After a signal to one rank in phase 2. As many processes give the bits of a whole run."""
    jobs = [train_job(tmp_path / f"whole{n}", processes=n) for n in (1, 2)]
    for a, b in [(2, 2), (2, 1), (1, 2)]:
        jobs.append(train_job(tmp_path / f"{a}{b}", processes=a, stop_in=(2, 1)))
        jobs.append(train_job(tmp_path / f"{a}{b}", "--resume", processes=b))
    jobs.append(train_job(tmp_path / "c2", "--context-parallel", "2", processes=2, stop_in=(2, 1)))
    jobs.append(train_job(tmp_path / "c2", "--resume", processes=2))
    statuses = [{status for status, _ in ranks} for ranks in run_jobs(tmp_path, jobs)]
    assert statuses == [{0}, {0}, *[{143}, {0}] * 4]
    assert_identical(load_student(tmp_path / "whole2"), load_student(tmp_path / "22"))
    for name in ("whole2", "21", "12", "c2"):
        assert_close(load_student(tmp_path / "whole1"), load_student(tmp_path / name))
    state = json.loads((tmp_path / "22" / "state" / "state.json").read_text())
    files = {path.name for path in (tmp_path / "22" / "state").iterdir()}
    assert files == {"state.json", *state["files"]} and len(files) == 3  # older ones are gone
    assert sample.main(["--student", str(tmp_path / "22"), "--n", "2"]) == 0  # in one process


@pytest.mark.slow
def test_half_a_checkpoint_is_an_error(tmp_path, capsys):
    """A file that is missing, truncated, or another rank's: one line, exit status 2."""
    out = tmp_path / "run"
    [[(status, _), _]] = run_jobs(tmp_path, [train_job(out, processes=2, stop_in=(2, 0))])
    one, two = sorted(out.glob("state/*.safetensors"))
    assert status == 143 and (one.name[-16:-12], two.name[-16:-12]) == ("1of2", "2of2")
    content, other = two.read_bytes(), one.read_bytes()
    two.unlink()
    assert str(out / "state") in refusal(capsys, ["--resume", "--out", out])
    for damaged in (other, content[:999]):
        two.write_bytes(damaged)
        assert str(out / "state") in refusal(capsys, ["--resume", "--out", out])
    two.write_bytes(content)
    assert train.main(["--out", str(out), "--resume"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("rank,calls", [(0, (1, 10, 19)), (1, (1, 4))])
def test_a_rank_that_cannot_write_ends_the_run_which_resumes(tmp_path, rank, calls):
    """Some call to write a file fails: one line, by that rank; then as if it had not failed."""
    small = ["--iters", "1", "--batch", "2", "--micro-batch", "1", "--save-every", "1"]
    jobs = [train_job(tmp_path / "whole", *small, processes=2)]
    for n in calls:
        out, failure = tmp_path / str(n), dict(fail_at=n, fail_rank=rank)
        jobs.append(train_job(out, *small, processes=2, **failure))
        jobs.append(train_job(out, *small, "--resume", processes=2))
    _, *results = run_jobs(tmp_path, jobs)
    for n, failed, resumed in zip(calls, results[::2], results[1::2]):
        lines = [our_lines(stderr) for _, stderr in failed]
        assert [status for status, _ in failed] == [2, 2], (n, failed)
        assert len(lines[rank]) == 1 and "No space left" in lines[rank][0], (n, failed)
        assert not lines[1 - rank], (n, failed)
        assert [status for status, _ in resumed] == [0, 0], (n, resumed)
        assert not list((tmp_path / str(n)).rglob("*.tmp"))
        assert_identical(load_student(tmp_path / "whole"), load_student(tmp_path / str(n)))


# -- torchrun ------------------------------------------------------------------------------------


def torchrun(out: Path, *flags: str, program: Path = HELPER) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(program), "--teacher", "wan22-tiny", "--out", str(out), *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT)


LONG = "--iters 200 --batch 4 --save-every 2 --sample-every 0 --size 1x48x64".split()


def our_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("train.py: ")]


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_and_the_checkpoint_stays(tmp_path):
    """Another rank prints one line: how to continue."""
    out = tmp_path / "run"
    process = torchrun(out, *LONG)
    wait_for_log(process, out, 20)
    assert process.poll() is None, process.communicate()[1]
    ranks = rank_pids(process.pid)
    os.kill(ranks[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode and not any(map(is_alive, ranks))
    [line] = our_lines(stderr)
    assert "another process ended" in line and "train.py --resume" in line
    settings = dict(iters=200, batch=4, sample_every=0, save_every=2, size=("1x48x64",))
    cfg = train.make_config("wan22-tiny", **settings)
    run = train.make_run(cfg, torch.device("cpu"), out)  # in one process
    train.load_state(run)
    assert run.i > 1


def rank_pids(launcher: int) -> list[int]:
    """The processes of rank 0 and rank 1."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
    return [
        next(pid for pid, text in environments.items() if b"\0RANK=%d\0" % rank in text)
        for rank in (0, 1)
    ]


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.slow
def test_a_signal_stops_all_ranks_after_a_checkpoint(tmp_path):
    """SIGTERM of the launcher. The last line says how to continue."""
    out = tmp_path / "run"
    process = torchrun(out, *LONG)
    wait_for_log(process, out, 10)
    assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=PATIENCE)
    [line] = our_lines(stderr)
    command = "torchrun --standalone --nproc-per-node 2 train.py --resume --out"
    assert process.returncode and line == f"train.py: stopped; continue with: {command} {out}"
    state = json.loads((out / "state" / "state.json").read_text())
    assert len(state["files"]) == 2 and state["log_bytes"] == (out / "log.jsonl").stat().st_size


@pytest.mark.slow
def test_a_wrong_command_is_one_line_of_one_rank_and_writes_nothing(tmp_path):
    process = torchrun(tmp_path / "run", "--batch", "6", program=ROOT / "train.py")
    _, stderr = process.communicate(timeout=PATIENCE)
    [line] = our_lines(stderr)
    assert process.returncode and "3 micro-batches" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks,context", [(8, 1), (8, 2), (6, 3), (4, 4)])
def test_ranks_share_every_micro_batch_and_every_token_once(monkeypatch, ranks, context):
    shares, lengths = [], []
    for rank in range(ranks):
        monkeypatch.setattr(parallel, "topology", parallel.Topology(ranks, 1, context, rank))
        shares.append(parallel.my_share(list(range(24))))
        lengths.append(parallel.local_length(15))
    assert sorted(sum(shares, [])) == sorted(list(range(24)) * context)
    for first in range(0, ranks, context):
        group = slice(first, first + context)
        assert all(share == shares[first] for share in shares[group])
        chunks = [len(chunk) for chunk in torch.arange(15).chunk(context)]
        assert lengths[group] == chunks + [0] * (context - len(chunks))
