"""Run jobs for test_parallel.py on processes that are forked from this one: torch is loaded once.

python tests/two_processes.py JOBS.json     a list of {"job": function below, "processes", its
                                            arguments}; writes [[status, stderr] per rank] per job
torchrun tests/two_processes.py FLAGS       train.py, without what takes long and is not tested
"""

import ctypes
import errno
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch._dynamo  # what FSDP loads at its first call
from safetensors.torch import save_file

import train
from models import media, parallel, plan, teachers, weights
from models.common import from_json, normal, stream
from models.parallel import full_tensor, local

# -- jobs ----------------------------------------------------------------------------------------


def numbers(out: str, context: int = 1, mistake: str = "", **settings) -> None:
    """Train. Save the log, all parameters at the start and end of a phase, and the student's v."""
    make_mistake(mistake)
    with parallel.distributed("cpu", context, "test"):
        run = train.make_run(
            train.make_config(**from_json(settings)), torch.device("cpu"), Path(out)
        )
        rows, tensors, begin_phase = [], {}, train.begin_phase

        def save(name: str) -> None:
            for key, x in train.state_tensors(run).items():
                tensors[f"{name}/{run.k}/{key}"] = full_tensor(x).clone()

        def begin_and_save(run, k):
            begin_phase(run, k)
            save("start")

        train.begin_phase = begin_and_save
        begin_and_save(run, 1)
        for row in train.train(run):
            rows += row
            if run.i == run.cfg.iters:
                save("end")
                tensors |= {f"v/{run.k}/{i}": v for i, v in enumerate(student_v(run))}
        if parallel.topology.rank == 0:
            Path(out).mkdir()
            save_file(tensors, Path(out) / "tensors.safetensors")
            (Path(out) / "rows.json").write_text(json.dumps(rows))


@torch.no_grad()
def student_v(run) -> list:
    """v of each step of the student, at the same x_t."""
    c, shape = run.data(2, stream("shape"), stream("conditions"))
    x_t = normal((2, *shape), "x_t")
    return [net(x_t, torch.full((2,), 0.9), c) for net in run.nets]


def small_step(out: str, teacher: str, by: float) -> None:
    """Save v of a bf16 student after its norms moved by less than bf16 resolves."""
    with parallel.distributed("cpu", 1, "test"):
        cfg = train.make_config(teacher, generator="full", dtype="bf16", size=("48x80",), frames=1)
        run = train.make_run(cfg, torch.device("cpu"), Path(out))
        train.begin_phase(run, 1)
        for name, p in run.roles.student[1].parameters.items():
            if "norm" in name and "blocks" in name:
                local(p.detach()).add_(by)
        v = student_v(run)[0]
        if parallel.topology.rank == 0:
            save_file({"v": v}, out)


def memory(out: str, **settings) -> None:
    """Save the peak memory of an iteration of phase 2 on each rank, and the plan's."""
    for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: free memory at once
        ctypes.CDLL(None).mallopt(option, 2**20)
    spec = weights.TEACHERS["wan22-tiny"]
    size = dict(dim=768, ffn_dim=3072, num_heads=8, num_layers=8, text_dim=64, text_len=16)
    weights.TEACHERS["wan22-tiny"] = spec._replace(settings=size)
    settings = from_json(settings) | dict(steps=2, fake_updates=1, size=("64x64",), frames=1)
    cfg = train.make_config("wan22-tiny", **settings)
    with parallel.distributed("cpu", 1, "test"):
        phases, [shape] = train.phases_of(cfg), teachers.buckets(cfg)
        active = train.moe.active_roles(phases, 2, False, train.module_of(cfg).boundary_of(cfg))
        planned, before = plan.phase_memory(cfg, active, shape).peak, process_peak()
        run = train.make_run(cfg, torch.device("cpu"), Path("nowhere"))
        run.roles.student[1].start()  # phase 1 would have
        train.begin_phase(run, 2)
        Path("/proc/self/clear_refs").write_text("5")  # measure the peak from now on
        run.i = 0
        train.run_iteration(run)
        peaks = parallel.gather([process_peak() - before, planned])
        if parallel.topology.rank == 0:
            Path(out).write_text(json.dumps(peaks))


def process_peak() -> int:
    """Peak memory of this process in bytes, as Linux counts it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if "VmHWM" in line).split()[1])


def command(
    argv: list[str], stop_in: list[int] | None = None, fail_at: int = 0, fail_rank: int = 0
) -> None:
    """Call train.py.

    stop_in    [k, i]: the last rank receives a signal in phase k, iteration i
    fail_at    on fail_rank, the call of fsync or rename with this number fails
    """
    media.sheet, media.curves = lambda *_: b"an image", lambda *_: b"curves"
    teachers.throughput, teachers.phase_summary = lambda *_: {}, lambda *_: ""
    run_iteration = train.run_iteration

    def run_and_stop(run):
        if [run.k, run.i] == stop_in and parallel.topology.rank == parallel.topology.processes - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return run_iteration(run)

    train.run_iteration = run_and_stop
    fails = fail_at and fail_rank == int(os.environ.get("RANK", 0))
    calls = fail_call(fail_at if fails else 0)
    status = train.main(argv)
    sys.exit(NO_SUCH_CALL if fails and next(calls) <= fail_at else status)


NO_SUCH_CALL = 99


def fail_call(n: int) -> Iterator[int]:
    """Let call n of fsync or rename fail. Returns the counter of calls."""
    calls = count(1)

    def failing(usual: Callable) -> Callable:
        def call(*args):
            if next(calls) == n:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return usual(*args)

        return call

    os.fsync, os.replace = failing(os.fsync), failing(os.replace)
    return calls


# -- mistakes ------------------------------------------------------------------------------------


def make_mistake(name: str) -> None:
    """Change models/parallel.py, so that the tests can see that the mistake is caught."""
    allocate, redistribute = parallel.shard_and_allocate, parallel.redistribute

    def allocate_with_means(net, device):
        allocate(net, device)
        for module in (net, *parallel.blocks_of(net)):
            module.set_gradient_divide_factor(float(parallel.topology.processes))

    def rope_of_first_tokens(x, *how):
        return x[: parallel.local_length(len(x))] if x.is_complex() else redistribute(x, *how)

    changes = {
        "no sum of replicated gradients": {"all_reduce_grad": lambda grad: grad},
        "one micro-batch twice": {"my_share": lambda x: x[:: parallel.topology.data_parallel]},
        "means instead of sums": {"shard_and_allocate": allocate_with_means},
        "attention to own tokens": {
            "tokens_to_heads": lambda x, streams: x,
            "heads_to_tokens": lambda x, streams: x,
        },
        "rope of the first tokens": {"redistribute": rope_of_first_tokens},
    }
    for function, wrong in changes[name].items() if name else ():
        setattr(parallel, function, wrong)


# -- the launcher --------------------------------------------------------------------------------


def launch(job: str, processes: int = 1, nodes: int = 1, **arguments) -> list:
    """Fork the ranks of a job. Returns [exit status, stderr] of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    per_node, children = processes // nodes, []
    for rank in range(processes):
        stderr = tempfile.TemporaryFile("w+")
        child = os.fork()
        if not child:
            if processes > 1:
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank))
                os.environ.update(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(per_node))
                os.environ["LOCAL_RANK"] = str(rank % per_node)
            os.dup2(stderr.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            status = 1
            try:
                globals()[job](**arguments)
                status = 0
            except SystemExit as end:
                status = end.code
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append((child, stderr))
    results = []
    for child, stderr in children:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        stderr.seek(0)
        results.append([status, stderr.read()])
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        command(sys.argv[1:])
    file = Path(sys.argv[1])
    results = [launch(**job) for job in json.loads(file.read_text())]
    file.with_suffix(".done").write_text(json.dumps(results))
