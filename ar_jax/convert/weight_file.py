"""Files of weights, of whatever format: told apart by what they hold, not by their names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ar_jax.convert import legacy_torch_file, safetensors_file, torch_file, torch_file_writer

SAFETENSORS = ".safetensors"
TORCH = (".pth", ".pt", ".ckpt", ".bin")
TAR_MAGIC, TAR_MAGIC_AT = b"ustar", 257


def read(path: str | Path) -> Any:
    """What a .pth, .pt, .ckpt, .bin or .safetensors file holds; nothing of it is ever run.

    Returns:
        A tensor, or nested dict, list, tuple, str, int, float, bool and None with tensors: numpy
        arrays, read-only and mapped into memory, so that reading costs next to nothing and no
        second copy is made.

    Raises:
        ValueError: names the file, and what is wrong with it or what it asks for.
        OSError: it cannot be opened.
    """
    path = Path(path)
    try:
        return _read(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write(path: str | Path, tensors: Mapping[str, Any]) -> None:
    """Writes tensors in the format that the suffix names; whole or not at all.

    Args:
        tensors: state_dict; for torch's format see `torch_file_writer.write` for what else.

    Raises:
        ValueError: an unknown suffix, or tensors that the format cannot hold.
    """
    suffix = Path(path).suffix
    if suffix == SAFETENSORS:
        safetensors_file.write(path, tensors, {"format": "pt"})
    elif suffix in TORCH:
        torch_file_writer.write(path, tensors)
    else:
        raise ValueError(f"{path}: the suffix is none of {', '.join((SAFETENSORS, *TORCH))}")


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(TAR_MAGIC_AT + len(TAR_MAGIC))
    if not head:
        raise ValueError("it is empty")
    if head.startswith(torch_file.MAGIC):
        return torch_file.read(path)
    if head[8:9] == b"{" or path.suffix == SAFETENSORS:
        return safetensors_file.read(path)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError("it is a pointer of git-lfs: fetch the file itself (git lfs pull)")
    if head.lstrip()[:1] == b"<":
        raise ValueError("it is a web page: the download gave something else than the file")
    if head[TAR_MAGIC_AT:] == TAR_MAGIC:
        raise ValueError("it is a tar file, as torch wrote until 2017: save it with a newer torch")
    try:
        return legacy_torch_file.read(path)
    except ValueError as error:
        if head[:1] == b"\x80" or "asks for" in str(error):
            raise
        raise ValueError(
            f"it is no weight file: it begins with {head[:8]!r}, and neither as a zip file nor as "
            "a pickle of torch.save nor as safetensors"
        ) from error
