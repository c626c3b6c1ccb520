"""Files: every read and write of the project goes through here, and a write is whole or absent."""

import json
import os
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor


class UserError(Exception):
    """Something the user can mend: shown as one line, exit status 2."""


def write(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part of it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)  # without it a power cut can undo the rename
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> UserError:
    """The one line for a full disk, a missing right, a folder in the way."""
    return UserError(
        f"cannot write {path}: {error.strerror or error}; mend that, or choose another --out"
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value) -> None:
    """JSON with a line a top-level entry, so that it reads well and diffs well."""
    write(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path, what_to_do: str):
    """Parsed JSON; a UserError that ends with what_to_do if the file is not whole."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({_first_line(error)}); {what_to_do}") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """Safetensors with `about` (plain JSON values) in the header. Never a pickle."""
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {name: json.dumps(value) for name, value in about.items()}
    write(path, safetensors.torch.save(cpu, metadata=about))


def read_tensors(path: Path, what_to_do: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and `about` of write_tensors; a UserError if the file is truncated or garbled."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, about
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({_first_line(error)}); {what_to_do}") from error


def read_tensors_of(settings: dict, path: Path, what_to_do: str) -> tuple[dict[str, Tensor], dict]:
    """read_tensors, of a file that was written with these settings and no others."""
    tensors, about = read_tensors(path, what_to_do)
    if about.get("settings") != settings:
        raise UserError(f"{path} is of another run; {what_to_do}")
    return tensors, about


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
