"""Files: a write is whole or absent, a read is whole or one line that says what to do."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy
import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor


writes = True  # whether this process does: of several, one


class UserError(Exception):
    """Something the user can mend: shown as one line, exit status 2."""


class Interrupted(Exception):
    """SIGTERM or Ctrl-C: the run was left between two iterations."""

    def __init__(self, number: int):
        self.number = number


def write(path: Path, *contents: bytes | Iterable, everyone: bool = False) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part of it.

    contents: bytes, or things that yield bytes: more than memory holds may go by. everyone: each
    of several processes has a file of its own.
    """
    if not (writes or everyone):
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            for content in contents:
                for piece in [content] if isinstance(content, bytes) else content:
                    file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)  # without it a power cut can undo the rename
    except BaseException as error:  # Ctrl-C too
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> UserError:
    """The one line for a full disk, a missing right, a folder in the way."""
    return UserError(
        f"cannot write {path}: {error.strerror or error}; mend that, or choose another --out"
    )


def _sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value) -> None:
    """JSON with a line a top-level entry, so that it reads well and diffs well."""
    write(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path, what_to_do: str) -> dict:
    """A JSON object; a UserError that ends with what_to_do if the file is not one, whole."""
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({first_line(error)}); {what_to_do}") from error


def write_tensors(
    path: Path, tensors: dict[str, Tensor], about: dict, everyone: bool = False
) -> str:
    """Safetensors with `about` (plain JSON values) and a digest in the header. Never a pickle.

    From any device, one tensor at a time: no second copy of them all. Returns the digest. Tensors
    that are cut over processes are written whole, by one; so all must call.
    """
    tensors = dict(sorted(tensors.items()))
    if not (writes or everyone):  # but the writer needs the parts that are here, twice
        for x in [*tensors.values(), *tensors.values()]:
            whole(x)
        return ""
    shapes = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    found = digest(tensors)
    head, _ = header(shapes, said(about | {"digest": found}))
    write(path, head, pieces(raw(x) for x in tensors.values()), everyone=everyone)
    return found


class Entry(NamedTuple):
    """A tensor of a file to come."""

    dtype: torch.dtype
    shape: tuple
    read: Callable[[], Tensor]  # its values, when their turn comes


def write_entries(path: Path, entries: dict[str, Entry], metadata: dict[str, str]) -> None:
    """Safetensors as other tools read them; one tensor at a time is in memory."""
    wide_first = sorted(entries.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    head, _ = header({key: (e.dtype, e.shape) for key, e in wide_first}, metadata)
    write(path, head, pieces(raw(e.read().to(e.dtype)) for _, e in wide_first))


def whole(x: Tensor) -> Tensor:
    """All of a tensor; every process that has a part must ask."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def raw(x: Tensor) -> numpy.ndarray:
    """A tensor's bytes."""
    return whole(x.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def pieces(arrays: Iterable, size: int = 2**24) -> Iterator[bytes]:
    """Many small arrays of bytes as few large ones; large ones as they are."""
    held = bytearray()
    for array in arrays:
        if len(held) + array.nbytes >= size:
            yield bytes(held)
            held.clear()
        if array.nbytes >= size:
            yield array.data
        else:
            held += array.data
        del array  # let go before the next is read
    yield bytes(held)


def digest(tensors) -> str:
    """Of names, shapes and bytes: a flipped bit reads as a weight, and shows here only.

    tensors: a dict, or an open file, one of whose tensors at a time is in memory.
    """
    total, of = hashlib.blake2b(digest_size=16), getattr(tensors, "get_tensor", None)
    for name in sorted(tensors.keys()):
        x = of(name) if of else tensors[name]
        total.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        total.update(raw(x))
    return total.hexdigest()


def opened(path: Path, kind: str, what_to_do: str):
    """A file of write_tensors, and its `about` of this kind. A UserError if it is none."""
    try:
        file = safetensors.safe_open(path, framework="pt")
        about = json.loads((file.metadata() or {}).get("about", "{}"))
        if not isinstance(about, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({first_line(error)}); {what_to_do}") from error
    if about.get("kind") != kind or "digest" not in about:
        raise UserError(f"{path} is no {kind}; {what_to_do}")
    return file, about


def read_tensors(path: Path, kind: str, settings: dict, what_to_do: str) -> tuple[dict, dict]:
    """Tensors and `about` of write_tensors, whose about holds this kind and these settings.

    A UserError if the file is truncated, garbled, of another kind or of another run.
    """
    file, about = verified(path, kind, settings, what_to_do)
    return {name: file.get_tensor(name) for name in file.keys()}, about


def verified(path: Path, kind: str, settings: dict, what_to_do: str):
    """The file of read_tensors, open, and its `about`: one tensor at a time was in memory."""
    file, about = opened(path, kind, what_to_do)
    if about["digest"] != digest(file):
        raise UserError(f"{path} is damaged; {what_to_do}")
    if about.get("settings") != settings:
        raise UserError(f"{path} is of another run; {what_to_do}")
    return file, about


def first_line(error: Exception) -> str:
    """What an error says, without the rest."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# -- a safetensors file larger than memory --------------------------------------------------------


def check_out(out: Path, overwrite: bool) -> None:
    """Raise UserError where a file cannot be made, before any work is done for it."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file")
    if out.exists() and not overwrite:
        raise UserError(f"{out} is there already; give --overwrite, or another --out")


NAMES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64",
}  # fmt: skip


class Part:
    """path.part: a safetensors file in the making, mapped, filled piece by piece, then renamed.

    shapes: name -> (dtype, shape). `tensors` are views of the file. The same request finds the
    pieces, `total` in all, that an interrupted one left; `done` counts them. Another request's
    pieces are a UserError unless they may be replaced.
    """

    def __init__(
        self, path: Path, shapes: dict[str, tuple], about: dict, total: int, replace: bool = False
    ):
        self.path, self.file = path, path.with_name(path.name + ".part")
        self.progress = path.with_name(path.name + ".part.json")
        head, size = header(shapes, said(about))
        if not self._same(head, size):
            if self.file.exists() and not replace:
                raise UserError(
                    f"{self.file} is what another command left unfinished; repeat that one, "
                    "or give --overwrite, or another --out"
                )
            self._create(head, size)
        self.done = self._progress(total)
        self.mapped = numpy.memmap(self.file, numpy.uint8, "r+")
        self.tensors, start = {}, len(head)
        for name, (dtype, shape) in shapes.items():
            end = start + dtype.itemsize * math.prod(shape)
            self.tensors[name] = torch.from_numpy(self.mapped[start:end]).view(dtype).view(shape)
            start = end

    def _same(self, head: bytes, size: int) -> bool:
        """Whether the file there is of this request."""
        if not self.file.exists() or self.file.stat().st_size != size:
            return False
        with open(self.file, "rb") as file:
            return file.read(len(head)) == head

    def _progress(self, total: int) -> int:
        """How many pieces are done; none where the count is damaged."""
        with contextlib.suppress(UserError):
            done = read_json(self.progress, "").get("done")
            return done if type(done) is int and 0 <= done <= total else 0
        return 0

    def _create(self, head: bytes, size: int) -> None:
        try:
            self.progress.unlink(missing_ok=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "wb") as file:
                file.write(head)
                file.flush()
                if hasattr(os, "posix_fallocate"):  # a full disk shows now, not in an hour
                    os.posix_fallocate(file.fileno(), 0, size)
                file.truncate(size)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.unlink()
            raise cannot_write(self.path, error) from error

    def save(self, done: int) -> None:
        """Put what was filled on the disk, then say so."""
        self.mapped.flush()
        write_json(self.progress, {"done": done})

    def finish(self) -> None:
        """The file gets its name: it is whole."""
        try:
            self.mapped.flush()
            os.replace(self.file, self.path)
            _sync_folder(self.path.parent)
            self.progress.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(self.path, error) from error


def said(about: dict) -> dict[str, str]:
    """JSON values as the metadata of a header, which is strings."""
    return {"about": json.dumps(about, ensure_ascii=False)}  # unescaped: a third of the bytes


def header(shapes: dict[str, tuple], metadata: dict[str, str]) -> tuple[bytes, int]:
    """The header of a safetensors file, name -> (dtype, shape), and the size of the whole."""
    entries, start = {"__metadata__": metadata}, 0
    for name, (dtype, shape) in shapes.items():
        end = start + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > 100_000_000:
        raise UserError("names and texts fill more than the 100 MB that safetensors allows; split")
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + start
