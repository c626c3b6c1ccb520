"""Files: every read and write of the project goes through here, and a write is whole or absent."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import safetensors.torch
import torch
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
        with contextlib.suppress(OSError):
            temporary.unlink()
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


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """Safetensors with `about` (plain JSON values) and a digest in the header. Never a pickle."""
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # one entry: safetensors writes several in an order that changes from process to process
    header = {"about": json.dumps(about | {"digest": digest(cpu)})}
    write(path, safetensors.torch.save(cpu, metadata=header))


def digest(tensors: dict[str, Tensor]) -> str:
    """Of names, shapes and bytes: a flipped bit reads as a weight, and shows here only."""
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        total.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        total.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def read_tensors(path: Path, kind: str, settings: dict, what_to_do: str) -> tuple[dict, dict]:
    """Tensors and `about` of write_tensors, whose about holds this kind and these settings.

    A UserError if the file is truncated, garbled, of another kind or of another run.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({first_line(error)}); {what_to_do}") from error
    if about.get("kind") != kind or about.get("digest") != digest(tensors):
        raise UserError(f"{path} is damaged, or no {kind}; {what_to_do}")
    if about.get("settings") != settings:
        raise UserError(f"{path} is of another run; {what_to_do}")
    return tensors, about


def first_line(error: Exception) -> str:
    """What an error says, without the rest."""
    return (str(error).splitlines() or [type(error).__name__])[0]
