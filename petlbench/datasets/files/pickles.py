"""Read pickles of data sets as plain data: nothing that a file names is imported, called or executed.

Containers, strings, bytes and numbers are accepted. Stand-ins turn NumPy's arrays and scalars of numbers into lists and
numbers. Every other name in a file is refused. The C unpickler does the work, as fast as `pickle.load`.
"""

from __future__ import annotations

import copyreg
import io
import math
import pickle
import re
import textwrap
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from petlbench.core.errors import UserError
from petlbench.core.gc_pause import collector_paused

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in a file of torch's format before 1.6
ZIP_MAGIC = b"PK\3\4"
TORCH_PREAMBLE = 2  # pickles after the magic number: the protocol and facts of the system
# Python 2 wrote text as bytes, mostly UTF-8. Other bytes become surrogates, which `text_column` decodes as Latin-1.
FROM_PYTHON_2: dict[str, str] = {"encoding": "utf-8", "errors": "surrogateescape"}
MESSAGE_LENGTH = 200  # characters of an error's text, which may quote the file
LATIN_1 = {0xDC00 + byte: chr(byte) for byte in range(0x80, 0x100)}


def load_pickle(path: Path) -> Any:
    """Return the object in a file of one pickle, of any protocol. Raise UserError if it is not plain data."""
    with _opened(path) as file:
        return _Plain(file, path).load()


def load_torch(path: Path) -> Any:
    """Return the plain object in a plain pickle, or in a file that `torch.save` wrote, as a zip or in the older format.

    Raise UserError for tensors and everything else that is not plain data.
    """
    with _opened(path) as file:
        zipped = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        file.seek(0)
        if zipped:
            return _Plain(_open_archive(file, path), path).load()
        unpickler = _Plain(file, path)
        first = unpickler.load()
        if first != TORCH_MAGIC:
            return first
        for _ in range(TORCH_PREAMBLE):
            unpickler.load()
        return unpickler.load()


def text_column(values: Sequence[str]) -> pa.Array:
    """Return strings of a pickle as a column; bytes that are not UTF-8 are read as Latin-1."""
    import pyarrow as pa

    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        return pa.array(
            [_decode_surrogates(value) if isinstance(value, str) else value for value in values], pa.string()
        )


def _decode_surrogates(value: str) -> str:
    """Return the text with its surrogates, which stand for bytes, read as Latin-1."""
    return value.translate(LATIN_1).encode("utf-8", "replace").decode()


@contextmanager
def blame_file(path: Path, expected: str) -> Iterator[None]:
    """Turn every error of the block into a UserError that the file at `path` is not an `expected`.

    An untrusted file may fail anywhere, at a key, a conversion or a depth; each error means the same here.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = textwrap.shorten(f"{type(error).__name__}: {error}", MESSAGE_LENGTH)
        raise UserError(f"{path} is truncated or not a {expected} ({message}): get the file again") from None


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb") as file, collector_paused(), blame_file(path, "pickle of plain data"):
            yield file
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; get the file again") from None


def _open_archive(file: IO[bytes], path: Path) -> IO[bytes]:
    """Return the pickle in a torch archive. Only uncompressed members are read, so none is larger than the file."""
    with zipfile.ZipFile(file) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith("/data.pkl")]
        if len(members) != 1 or members[0].compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path} is not a file that torch.save wrote (it stores one data.pkl): get the file again")
        return io.BytesIO(archive.read(members[0]))


class _Plain(pickle.Unpickler):
    """An unpickler that replaces known names by the stand-ins below and refuses all other names."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file, **FROM_PYTHON_2)  # type: ignore[arg-type]
        self.path = path
        copyreg.clear_extension_cache()  # because entries of that cache bypass find_class

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            self._refuse(f"names {f'{module}.{name}'!r}")
        return STAND_INS[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        self._refuse("refers to tensors or other objects outside of itself")

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"{self.path} {what}, but only plain data are read from a pickle: do not trust the file")


class _Inert:
    """A callable that a file cannot change: each subclass declares `__slots__`, hence no `__dict__`, no state."""

    __slots__ = ()


class _Encode(_Inert):
    """`_codecs.encode`, with which Python 3 writes bytes in protocols that have no bytes type."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise ValueError(f"encoding {encoding!r}")
        return str.encode(text, "latin-1")


class _Dtype:
    """A type of numbers: `numpy.dtype("f8", False, True)`, followed by a state with the byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        if not re.fullmatch("b1|[iu][1248]|f[248]", code):
            raise ValueError(f"an array of {code!r}")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise ValueError(f"byte order {state[1]!r}")
        self.order = state[1]

    def numbers(self, raw: bytes | str) -> np.ndarray[Any, Any]:
        import numpy as np

        if isinstance(raw, str):
            raw = raw.encode(**FROM_PYTHON_2)
        return np.frombuffer(raw, np.dtype(self.order + self.code))


class _MakeDtype(_Inert):
    __slots__ = ()

    def __call__(self, code: str, *_: object) -> _Dtype:
        return _Dtype(code)


class _Array(list[Any]):
    """An array, as a list or a list of lists."""

    __slots__ = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _Dtype) or math.prod(shape) < 1:  # an empty array may claim any length on another axis
            raise ValueError("an array of objects, or an empty one")
        self[:] = dtype.numbers(raw).reshape(shape, order="F" if fortran else "C").tolist()


class _MakeArray(_Inert):
    """`_reconstruct`, which makes an empty array; its content follows as state."""

    __slots__ = ()

    def __call__(self, *_: object) -> _Array:
        return _Array()


class _Scalar(_Inert):
    __slots__ = ()

    def __call__(self, dtype: _Dtype, raw: bytes | str) -> int | float | bool:
        if not isinstance(dtype, _Dtype):
            raise ValueError("a scalar that is not a number")
        (number,) = dtype.numbers(raw).tolist()
        return number


STAND_INS: Mapping[tuple[str, str], _Inert] = {
    ("_codecs", "encode"): _Encode(),
    ("numpy", "dtype"): _MakeDtype(),
    ("numpy", "ndarray"): _Inert(),
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _MakeArray() for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Scalar() for core in ("core", "_core")},
}
