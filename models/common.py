"""What every module needs: errors that users see, files written whole, random numbers."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES, save_file
from torch import Tensor
from tqdm import tqdm

# as PyTorch, CUDA, cuBLAS and NCCL say it
OUT_OF_MEMORY = re.compile("out of memory|allocate memory|ALLOC_FAILED|CUDA malloc", re.I)


class UserError(Exception):
    """An error the user can fix. Printed as one line; the exit status is 2."""


class Interrupted(Exception):
    """SIGTERM or Ctrl-C stopped the run between two iterations."""

    def __init__(self, number: int, advice: str = ""):
        self.number, self.advice = number, advice


def first_line(error: BaseException) -> str:
    """First line of an error's text, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is short, on any device."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


@lru_cache
def note(text: str) -> None:
    """Print a note once, above a progress bar if there is one."""
    tqdm.write(f"note: {text}")


def torchrun_ranks() -> tuple[int, int, int, int]:
    """This rank, the number of ranks, and both within the node. Raises UserError."""
    if os.environ.get("WORLD_SIZE", "") in ("", "1"):  # whatever the other variables are
        return 0, 1, 0, 1
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = [os.environ.get(name, "") for name in names]
    if not all(map(str.isdecimal, values)):
        found = ", ".join(f"{name}={value}" for name, value in zip(names, values))
        advice = "start the processes with torchrun, or unset WORLD_SIZE for one process"
        raise UserError(f"expected the variables of torchrun, found {found}; {advice}")
    return tuple(map(int, values))


def is_rank0() -> bool:
    """Whether this process writes the files that ranks share: it is rank 0, or the only one."""
    return torchrun_ranks()[0] == 0


# -- files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path, flag: str = "--out"):
    """Turn a full disk or a missing permission into a UserError. flag: names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        advice = f"fix this or choose another {flag}"
        raise UserError(f"cannot write {path}: {reason}; {advice}") from error


@contextlib.contextmanager
def reading(path: Path | str, advice: str):
    """Turn whatever goes wrong while a file is read into a UserError that ends with the advice."""
    try:
        yield
    except Exception as error:  # a broken file makes parsers raise nearly any kind
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot read {path} ({reason}); {advice}") from error


def replace_file(path: Path, save: Callable[[Path], object]) -> None:
    """Let save(temporary path) write a file, then move it to path in one step."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # the contents must be on disk before the name is
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):  # the temporary file of a failed write
                temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk. Without it a power cut can undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a file, on rank 0: a crash leaves the old file or the new one, never a part."""
    if is_rank0():
        replace_file(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, value) -> None:
    """Write JSON."""
    write_file(path, (json.dumps(value, indent=1) + "\n").encode())


def finite(value):
    """The same JSON value with None in place of NaN and infinity, which JSON lacks."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def write_tensors(path: Path, tensors: dict, metadata: dict) -> None:
    """Write safetensors, with metadata as JSON in the header, on the ranks that call it."""
    tensors = {name: x.detach().contiguous() for name, x in tensors.items()}
    header = {"metadata": json.dumps(metadata)}
    replace_file(path, lambda temporary: save_tensors(tensors, temporary, header))


def save_tensors(tensors: dict, path: Path, header: dict) -> None:
    """Write safetensors with the permissions of other new files, where 0.8 makes them private."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, header)
    path.chmod(mode)


def read_json(path: Path, advice: str) -> dict:
    """Read a JSON object. If that fails, the error ends with the advice."""
    with reading(path, advice):
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("expected a JSON object")
        return value


class FileTensor:
    """A tensor in a safetensors file: x[a:b] reads these rows, and no other bytes."""

    def __init__(self, file: Path, key: str, entry: dict, data: int):
        self.file = file
        self.key = key
        self.dtype = entry["dtype"]  # "F32", "BF16", ...
        self.shape = tuple(entry["shape"])
        self.start = data + entry["data_offsets"][0]

    def __getitem__(self, rows: slice) -> Tensor:
        count, *row = self.shape or (1,)
        first, end, _ = rows.indices(count)
        dtype = _TYPES[self.dtype]
        shape = self.shape and (max(0, end - first), *row)
        size = math.prod(row) * dtype.itemsize  # bytes of a row
        content = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        with open(self.file, "rb") as file:
            file.seek(self.start + first * size)
            if file.readinto(content.numpy()) < len(content):
                raise OSError(f"{self.file} is shorter than its header says")
        return content.view(dtype).view(shape)


class TensorFile(dict):
    """Key -> tensor of a safetensors file, which may be larger than RAM: it is not mapped.

    safe_open for torch maps it as memory to write to, as much as the system must be able to give.
    """

    def __init__(self, path: Path):
        safe_open(path, framework="np")  # mapped to read; fails unless the file is whole
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        self.metadata = entries.pop("__metadata__", {})
        super().__init__({key: FileTensor(path, key, x, 8 + length) for key, x in entries.items()})

    def get_tensor(self, key: str) -> Tensor:
        """The whole tensor of a key."""
        return self[key][:]


def open_tensors(path: Path, kind: str, advice: str) -> tuple[TensorFile, dict]:
    """Open a file of write_tensors whose metadata has this kind. Returns the file and metadata."""
    with reading(path, advice):
        file = TensorFile(path)  # fails if the file is truncated
        header = file.metadata
        metadata = json.loads(header.get("metadata") or "{}")
        metadata.keys()  # fails unless it is a JSON object
    if metadata.get("kind") != kind:
        raise UserError(f"{path} is not a file of the kind {kind!r}; {advice}")
    return file, metadata


def file_digest(path: Path, piece: int = 2**20) -> str:
    """sha256 of a file. Of one larger than 64 MB, such as weights, of about 64 pieces."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for offset in range(0, size, max(piece, size // 64)):
            file.seek(offset)
            digest.update(file.read(piece))
    return digest.hexdigest()


def digest_files(paths: Iterable[Path]) -> dict[str, str]:
    """Digest of every input file of a run, by its path."""
    return {str(path): file_digest(path) for path in paths}


# -- random numbers ------------------------------------------------------------------------------


def stream(*key) -> torch.Generator:
    """Random stream that is a function of its key, e.g. (seed, phase, iteration, update).

    There is no global random state, so a resumed run needs its counters only. The stream is on
    the CPU: a seed gives the same numbers on every device.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def normal(shape, *key) -> Tensor:
    """Standard normal numbers of the stream `key`, float32 on the CPU."""
    return torch.randn(shape, generator=stream(*key))


def uniform(shape, *key) -> Tensor:
    """Uniform numbers in [0, 1) of the stream `key`, float32 on the CPU."""
    return torch.rand(shape, generator=stream(*key))


def integers(n: int, count: int, *key) -> Tensor:
    """n integers in 0 ... count - 1 of the stream `key`, int64 on the CPU."""
    return torch.randint(count, (n,), generator=stream(*key))
