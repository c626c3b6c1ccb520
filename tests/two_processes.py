"""Run jobs for test_parallel.py on processes that are forked from this one: torch is loaded once.

python tests/two_processes.py JOBS.json     a list of {"job": function below, "processes", its
                                            arguments}; writes [[status, stderr] per rank] per job
torchrun tests/two_processes.py FLAGS       train.py, without what takes long and is not tested
"""

import json
import os
import signal
import sys
import tempfile
import threading
from collections import defaultdict
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
import torch._dynamo  # what FSDP loads at its first call
from safetensors.torch import save_file
from students import FailingCall
from torch.distributed import TCPStore

import train
from models import media, parallel, teachers
from models.cli import from_json
from models.common import normal, stream
from models.parallel import full_tensor, local

# -- jobs ----------------------------------------------------------------------------------------


def numbers(out: str, context: int = 1, mistake: str = "", **settings) -> None:
    """Train. Save the log, how far each role moved in each phase, and the student's v."""
    make_mistake(mistake)
    with parallel.distributed("cpu", context, "test"):
        cfg = train.make_config(**from_json(settings))
        run, rows, tensors = train.make_run(cfg, torch.device("cpu"), Path(out)), [], {}
        for phase in run.phases:
            train.begin_phase(run, phase.k)
            start = values_of_roles(run)
            while run.i < cfg.iters:
                rows += train.run_iteration(run)
                run.i += 1
            for role, x in values_of_roles(run).items():
                tensors[f"moved/{run.k}/{role}"] = x - start.get(role, 0)
            tensors |= {f"v/{run.k}/{i}": v for i, v in enumerate(student_v(run))}
        names = "loss", "grad_norm", "update_rms", "distance"
        for role, name in product(("fake", "student"), names):
            values = [row[name] for row in rows if name in row and row["role"].startswith(role)]
            tensors[f"log/{role} {name}"] = torch.tensor(values)
        if parallel.topology.rank == 0:
            save_file(tensors, out)


def values_of_roles(run) -> dict[str, torch.Tensor]:
    """All that was trained of each role, as one vector."""
    values = defaultdict(list)
    for name, x in train.state_tensors(run).items():
        values[name.split("/")[0]].append(full_tensor(x).flatten())
    return {role: torch.cat(tensors) for role, tensors in values.items()}


@torch.no_grad()
def student_v(run) -> list:
    """v of each step of the student, at the same x_t."""
    c, shape = run.data(2, stream("shape"), stream("conditions"))
    x_t = normal((2, *shape), "x_t")
    return [net(x_t, torch.full((2,), 0.9), c) for net in run.nets]


def small_step(out: str, teacher: str) -> None:
    """Save v of a bf16 student before and after its norms move by less than bf16 resolves."""
    with parallel.distributed("cpu", 1, "test"):
        cfg = train.make_config(
            teacher, train_student="full", dtype="bf16", size=("48x80",), frames=1
        )
        run = train.make_run(cfg, torch.device("cpu"), Path(out))
        train.begin_phase(run, 1)
        before = student_v(run)[0]
        for name, p in run.roles.student[1].parameters.items():
            if "norm" in name and "blocks" in name:
                local(p.detach()).add_(1.5e-3)
        after = student_v(run)[0]
        if parallel.topology.rank == 0:
            save_file({"before": before, "after": after}, out)


def load(out: str, files: list[str], lora: str = "", mistake: str = "") -> None:
    """Load published weights. Save them, and the bytes that every rank read."""
    make_mistake(mistake)
    with parallel.distributed("cpu", 1, "test"):
        loras = dict(teacher_lora=(lora,)) if lora else {}
        cfg = train.make_config("wan21-tiny", weights=tuple(files), dtype="float32", **loras)
        for _ in range(2):  # the first time Python's modules are read, too
            before = bytes_read()
            net = teachers.load_base(cfg, 1, torch.device("cpu"))
            read = bytes_read() - before
        tensors = {name: full_tensor(p.detach()) for name, p in net.named_parameters()}
        read = torch.tensor(parallel.gather(read))
        if parallel.topology.rank == 0:
            save_file(tensors | {"bytes read": read}, out)


def bytes_read() -> int:
    """Bytes that this process has read so far, as the kernel counts them."""
    return int(Path("/proc/self/io").read_text().split()[1])


def command(
    argv: list[str], stop_in: list[int] | None = None, fail_at: int = 0, fail_rank: int = 0
) -> None:
    """Call train.py.

    stop_in    [k, i]: the last rank receives a signal in phase k, iteration i
    fail_at    on fail_rank, the FailingCall with this number
    """
    media.sheet, media.curves = lambda *_: b"an image", lambda *_: b"curves"
    teachers.throughput, teachers.phase_summary = lambda *_: {}, lambda *_: ""
    run_iteration = train.run_iteration

    def run_and_stop(run):
        if [run.k, run.i] == stop_in and parallel.topology.rank == parallel.topology.processes - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return run_iteration(run)

    train.run_iteration = run_and_stop
    if fail_at and fail_rank == int(os.environ["RANK"]):
        FailingCall(pytest.MonkeyPatch(), Path(argv[argv.index("--out") + 1]), fail_at)
    sys.exit(train.main(argv))


# -- mistakes ------------------------------------------------------------------------------------


def make_mistake(name: str) -> None:
    """Change models/parallel.py, so that the tests can see that the mistake is caught."""
    allocate, copy_to_local = parallel.shard_and_allocate, parallel.copy_to_local

    def allocate_with_means(net, device):
        allocate(net, device)
        for module in (net, *parallel.blocks_of(net)):
            module.set_gradient_divide_factor(float(parallel.topology.processes))

    changes = {
        "no sum of replicated gradients": {"all_reduce_grad": lambda grad: grad},
        "means instead of sums": {"shard_and_allocate": allocate_with_means},
        "whole tensors": {"copy_to_local": lambda x, source: copy_to_local(x, source[:])},
        "attention to own tokens": {
            "tokens_to_heads": lambda x, token_counts: x,
            "heads_to_tokens": lambda x, token_counts: x,
        },
    }
    for function, wrong in changes[name].items() if name else ():
        setattr(parallel, function, wrong)


# -- the launcher --------------------------------------------------------------------------------


def start_store() -> tuple[int, int]:
    """Fork a process with the store at which ranks meet, as torchrun's. Returns its id and port."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writer, f"{store.port}\n".encode())
        signal.pause()
    with open(reader) as pipe:
        port = int(pipe.readline())
    os.close(writer)
    return child, port


def launch(job: str, processes: int = 1, nodes: int = 1, **arguments) -> list:
    """Fork the ranks of a job. Returns [exit status, stderr] of each."""
    assert threading.active_count() == 1  # a lock that another thread holds would stay locked
    storekeeper, port = start_store()
    per_node, children = processes // nodes, []
    for rank in range(processes):
        stderr = tempfile.TemporaryFile("w+")
        child = os.fork()
        if not child:
            if processes > 1:
                names = "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
                values = port, rank, processes, rank % per_node, per_node
                store = dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
                os.environ |= dict(zip(names, map(str, values)), MASTER_ADDR="127.0.0.1") | store
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
    os.kill(storekeeper, signal.SIGKILL)
    os.waitpid(storekeeper, 0)
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        command(sys.argv[1:])
    file = Path(sys.argv[1])
    results = [launch(**job) for job in json.loads(file.read_text())]
    file.with_suffix(".done").write_text(json.dumps(results))
