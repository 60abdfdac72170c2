"""One file of a model, read with care: plain, within a size, hashed before it is parsed, told by what is in it.

What would run code when it is read is refused with a sentence that says how to convert it.
"""

import errno
import hashlib
import io
import os
import stat
import zipfile
from pathlib import Path

from mcdrop.errors import ArtifactError, ModelNotFound

__all__ = ["kind_of", "read_plain"]

_MOST = 8 * 2**30
_CONVERT = "mcdrop convert weights.pth weights.safetensors"
_PICKLE = (
    "{name} is a pickle, which can run code when it is read; turn a state dict into safetensors with '"
    + _CONVERT
    + "', "
    "and save a whole pickled network where you trust it: mcdrop.save(mcdrop.wrap(network, ...), folder, format='onnx')"
)
_SCRIPT = (
    "{name} is TorchScript, which is deprecated, unsafe to read, and whose dropout is out of reach of masks; save the "
    "Python network it was made from: mcdrop.save(mcdrop.wrap(network, ...), folder, format='onnx')"
)
_MAR = (
    "{name} is a TorchServe archive, which carries code; take the weights out of it and turn them into safetensors "
    "with '" + _CONVERT + "'"
)
_SAFETENSORS = (
    "{name} holds weights alone; a network needs a factory too: build it in Python, load the weights into it, and save "
    "a model folder with mcdrop.save(mcdrop.wrap(network, ...), folder, factory='package.module:function')"
)


def read_plain(path: Path, *, sha256: str | None = None, most: int = _MOST) -> bytes:
    """Gives the content of a plain file.

    Raises:
        ModelNotFound: there is no such file.
        ArtifactError: it is a link or a special file, has another name elsewhere, is too large, or has another sha256.
    """
    try:
        opened = open(path, "rb", opener=_plainly)  # noqa: SIM115 (the errors of opening alone are told here)
    except FileNotFoundError:
        raise ModelNotFound(f"there is no file {path}") from None
    except OSError as error:
        linked = error.errno == errno.ELOOP and path.is_symlink()
        said = "it is a link; give the file that it leads to" if linked else error.strerror
        raise ArtifactError(f"{path} must be a plain file that can be read: {said}") from None
    with opened as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise ArtifactError(f"{path} must be a plain file, not a link or a special file")
        if status.st_size > most:
            raise ArtifactError(f"{path} has {status.st_size} bytes, above the limit of {most}")
        data = file.read(status.st_size)  # not "most": room for as much would be asked for first
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise ArtifactError(f"{path} is not the file that was asked for: its sha256 is {found}, not {sha256}")
    return data


def _plainly(path: str, flags: int) -> int:
    """Opens a file so that no link leads elsewhere, and no pipe is waited at for ever."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def kind_of(data: bytes, name: str) -> str:
    """Tells by its content what a file is: "onnx" or "pt2".

    Raises:
        ArtifactError: something else; the message says how to convert it.
    """
    if data[:2] == b"PK":
        return _kind_of_zip(data, name)
    if data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise ArtifactError(_PICKLE.format(name=name))
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data):
        raise ArtifactError(_SAFETENSORS.format(name=name))
    return "onnx"  # protobuf has no mark of its own; what is no ONNX model is refused when it is parsed


def _kind_of_zip(data: bytes, name: str) -> str:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            first = min((member.header_offset for member in archive.infolist()), default=0)
            members = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise ArtifactError(f"{name} is a damaged archive: {error}") from None
    if first:  # what was found is an archive within this one, such as the sample inputs of a program
        raise ArtifactError(f"{name} is cut off: its archive has no end of its own")
    inner = {member.partition("/")[2] for member in members}
    if any(member.startswith("MAR-INF/") for member in members):
        raise ArtifactError(_MAR.format(name=name))
    if "constants.pkl" in inner or any(part.startswith("code/") for part in inner):
        raise ArtifactError(_SCRIPT.format(name=name))
    if "data.pkl" in inner:
        raise ArtifactError(_PICKLE.format(name=name))
    return "pt2"
