"""Tests that pickles are read as plain data, and that a hostile one only causes an error of one line."""

from __future__ import annotations

import copyreg
import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from petlbench.core.errors import UserError
from petlbench.datasets.files.pickles import STAND_INS, load_pickle, load_torch, text_column

PLAIN = [{"a": [1, -2.5, None, True, (b"\xff", "é", 2**70)], "b": {"c": [("d", "e", "f", "g")], "h": {1, 2}}}]
EXTENSION = 0x70


def written(folder: Path, content: bytes) -> Path:
    path = folder / "refs(unc).p"
    path.write_bytes(content)
    return path


def refused(path: Path, load: Callable[[Path], Any] = load_pickle) -> str:
    """Return the error's text, which must be one line and name the file."""
    with pytest.raises(UserError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_data_come_through_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    plain = PLAIN if protocol >= 4 else [{"a": PLAIN[0]["a"]}]  # before 4, a set is a call
    assert load_pickle(written(tmp_path, pickle.dumps(plain, protocol))) == plain


@pytest.mark.parametrize("protocol", [0, 1])
def test_text_and_numbers_come_through_in_the_oldest_protocols(tmp_path: Path, protocol: int) -> None:
    plain = {"a": ["é", 1, 2.5, (None, True)], "b": {}}
    assert load_pickle(written(tmp_path, pickle.dumps(plain, protocol))) == plain


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"(lp0\nS'the caf\\xc3\\xa9'\np1\na.", "the café"),  # UTF-8, protocol 0
        (b"(lp0\nS'the caf\\xe9'\np1\na.", "the café"),  # Latin-1
        (b"\x80\x02]U\x05caf\xc3\xa9a.", "café"),
        (b"\x80\x02]U\x04caf\xe9a.", "café"),
        (b"\x80\x02]U\x06\xc3\xa9caf\xe9a.", "écafé"),  # both in one string
        (b"\x80\x02]X\x05\x00\x00\x00caf\xc3\xa9a.", "café"),  # unicode
        (b"\x80\x02]X\x03\x00\x00\x00\xed\xa0\x80a.", "?"),  # half of a surrogate pair, which is not a character
    ],
)
def test_strings_of_python_2_are_text(tmp_path: Path, content: bytes, expected: str) -> None:
    assert text_column(load_pickle(written(tmp_path, content))).to_pylist() == [expected]


@pytest.mark.parametrize("core", [b"core", b"_core"])
@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize(
    "numbers",
    [
        np.array([1, -2, 300], np.int64),
        np.array([[1.5, 2], [3, 4]], ">f4"),
        np.asfortranarray([[1, 2, 3], [4, 5, 6]]),
        np.array([True, False]),
        np.float32(0.5),
        np.int16(-7),
    ],
)
def test_numpys_numbers_become_lists_and_numbers(tmp_path: Path, numbers: Any, protocol: int, core: bytes) -> None:
    content = pickle.dumps(numbers, protocol)
    found = load_pickle(written(tmp_path, _renamed(content, core)))
    assert found == numbers.tolist()
    assert isinstance(found, list) == isinstance(numbers, np.ndarray)


def _renamed(content: bytes, core: bytes) -> bytes:
    """Rename the module as in NumPy 1 or NumPy 2; protocol 4 stores the lengths of the name and of the frame."""
    new = b"numpy.%s.multiarray" % core
    old = b"numpy.%s.multiarray" % (b"core" if core == b"_core" else b"_core")
    content = content.replace(b"\x8c" + bytes([len(old)]) + old, b"\x8c" + bytes([len(new)]) + new).replace(
        b"c" + old, b"c" + new
    )
    assert new in content
    return content[:3] + struct.pack("<Q", len(content) - 11) + content[11:] if content[2:3] == b"\x95" else content


def test_an_array_written_by_python_2_keeps_its_bytes(tmp_path: Path) -> None:
    content = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\ntcnumpy\ndtype\n(S'u1'\nI0\n"
        b"I1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\xc3\\xe9'\ntb."
    )
    assert load_pickle(written(tmp_path, content)) == [0xC3, 0xE9]


class Call:
    """An object that is pickled as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def _touch(marker: Path) -> bytes:
    return text(f"touch {marker}")


def _python(marker: Path) -> bytes:
    return text(f"open({str(marker)!r}, 'w').close()")


def _system(marker: Path, protocol: int) -> bytes:
    import os

    return pickle.dumps(Call(os.system, f"touch {marker}"), protocol)


# Pickles whose code a plain `pickle.loads` runs; each leaves the marker.
LIVE: dict[str, Callable[[Path], bytes]] = {
    **{f"os.system, protocol {n}": (lambda m, n=n: _system(m, n)) for n in range(6)},  # type: ignore[misc]
    "os": lambda m: b"cos\nsystem\n(" + _touch(m) + b"tR.",
    "posix": lambda m: b"cposix\nsystem\n" + _touch(m) + b"\x85R.",
    "subprocess": lambda m: b"csubprocess\ncheck_call\n(](" + text("touch") + text(str(m)) + b"etR.",
    "Popen": lambda m: b"csubprocess\nPopen\n(](" + text("touch") + text(str(m)) + b"etR.",
    "exec": lambda m: b"cbuiltins\nexec\n(" + _python(m) + b"tR.",
    "eval": lambda m: b"c__builtin__\neval\n(" + _python(m) + b"tR.",
    "getattr of __import__": lambda m: (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n("
        + text("os")
        + b"tR"
        + text("system")
        + b"tR("
        + _touch(m)
        + b"tR."
    ),
    "partial": lambda m: b"cfunctools\npartial\n(cos\nsystem\n" + _touch(m) + b"tR)R.",
    "map": lambda m: b"cbuiltins\nlist\n(cbuiltins\nmap\n(cos\nsystem\n](" + _touch(m) + b"etRtR.",
    "stack global": lambda m: b"\x80\x04" + short("os") + short("system") + b"\x93" + _touch(m) + b"\x85R.",
    "dotted name": lambda m: b"\x80\x04" + short("shutil") + short("os.system") + b"\x93" + _touch(m) + b"\x85R.",
    "memo": lambda m: b"cos\nsystem\nq\x000h\x00(" + _touch(m) + b"tR.",
    "inst": lambda m: b"(" + _touch(m) + b"ios\nsystem\n.",
    "obj": lambda m: b"(cos\nsystem\n" + _touch(m) + b"o.",
    "in a list": lambda m: b"(lcos\nsystem\n(" + _touch(m) + b"tRa.",
    "in a key": lambda m: b"}cos\nsystem\n(" + _touch(m) + b"tRNs.",
    "after an allowed one": lambda m: (
        b"c_codecs\nencode\n(" + text("x") + text("latin1") + b"tR0cos\nsystem\n(" + _touch(m) + b"tR."
    ),
    "method": lambda m: (
        b"\x80\x04"
        + short("pathlib")
        + short("PosixPath.touch")
        + b"\x93cpathlib\nPosixPath\n"
        + text(str(m))
        + b"\x85R\x85R."
    ),
    "extension": lambda m: b"\x80\x02\x82" + bytes([EXTENSION]) + b"(" + _touch(m) + b"tR.",
    "extension of two bytes": lambda m: b"\x80\x02\x83" + bytes([EXTENSION, 0]) + b"(" + _touch(m) + b"tR.",
}


@pytest.fixture
def extension() -> Iterator[None]:
    """Register `os.system` by a number, as another library might do with its own functions."""
    copyreg.add_extension("os", "system", EXTENSION)
    yield
    copyreg.remove_extension("os", "system", EXTENSION)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("name", LIVE)
def test_a_hostile_pickle_that_runs_elsewhere_runs_nothing_here(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    content = LIVE[name](marker)
    found = pickle.loads(content)
    if hasattr(found, "wait"):
        found.wait()
    assert marker.exists(), "the payload is not live: this test would prove nothing"
    marker.unlink()
    for load in (load_pickle, load_torch):
        message = refused(written(tmp_path, content), load)
        assert "do not trust" in message
        assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cnt\nsystem\n(S'x'\ntR.",
        b"ccopyreg\n_reconstructor\n(cbuiltins\nobject\ncbuiltins\nobject\nNtR.",
        b"\x80\x02cbuiltins\nobject\n)\x81.",
        b"\x80\x04cbuiltins\nobject\n)}\x92.",
        b"ccodecs\ndecode\n(S'x'\nS'zip'\ntR.",
        b"cbuiltins\nbytearray\n(I9\ntR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cos\nsystem\n.",  # named, not called
        b"cevil\nname\x00\x1b[2J\n.",
        b"Pa name\n.",
        b"\x80\x02U\x01xQ.",
    ],
)
def test_names_and_references_are_refused(tmp_path: Path, content: bytes) -> None:
    message = refused(written(tmp_path, content))
    assert "do not trust" in message
    assert message.isprintable()


@pytest.mark.parametrize(
    "content",
    [
        b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        b"c_codecs\nencode\n(I5\nS'latin1'\ntR.",
        b"cnumpy\ndtype\n(S'O8'\ntR.",
        b"cnumpy\ndtype\n(S'V9999999999'\ntR.",
        b"cnumpy\ndtype\n(](S'f8'\netR.",
        b"cnumpy\ndtype\n(S'f8'\ntR(I3\nS'O'\ntb.",
        b"cnumpy\ndtype\n(S'f8'\ntR(I3\nS'<'\nt}S'code'\nS'O8'\ns\x86b.",
        b"cnumpy\ndtype\n}S'__call__'\nNsb.",  # a state for a stand-in
        b"cnumpy\ndtype\nN}S'__call__'\nNs\x86b.",
        b"cnumpy\nndarray\n)\x81.",
        b"cnumpy\nndarray\n)R.",
        b"cnumpy.core.multiarray\nscalar\n(NS'x'\ntR.",
        # An array that claims to be huge but is empty, and one with a malformed state.
        b"cnumpy.core.multiarray\n_reconstruct\n)R(I1\n(I99999\nI0\ntcnumpy\ndtype\n(S'u1'\ntRI00\nS''\ntb.",
        b"cnumpy.core.multiarray\n_reconstruct\n)RI5\nb.",
    ],
)
def test_the_names_that_are_known_take_numbers_only(tmp_path: Path, content: bytes) -> None:
    assert "plain data" in refused(written(tmp_path, content))


@pytest.mark.parametrize("stand_in", sorted(STAND_INS))
@pytest.mark.parametrize("state", [b"}S'x'\nI1\ns", b"N}S'x'\nI1\ns\x86", b"N}S'__class__'\nI1\ns\x86"])
def test_a_stand_in_cannot_be_changed_by_a_file(tmp_path: Path, stand_in: tuple[str, str], state: bytes) -> None:
    refused(written(tmp_path, "c{}\n{}\n".format(*stand_in).encode() + state + b"b."))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_truncated_pickle_is_an_error_wherever_it_ends(tmp_path: Path, protocol: int) -> None:
    whole = pickle.dumps([{"a": ["é", 1, 2.5]}] * 3, protocol)
    for end in range(len(whole)):
        refused(written(tmp_path, whole[:end]))


@pytest.mark.parametrize("content", [b"", b"\0", b"garbage", b"\x80\xff.", b"\x80\x04\x95", b"[1, 2]", b"<html>", b"."])
def test_garbage_is_an_error(tmp_path: Path, content: bytes) -> None:
    for load in (load_pickle, load_torch):
        refused(written(tmp_path, content), load)


def test_a_long_text_in_a_file_does_not_become_a_long_error(tmp_path: Path) -> None:
    path = written(tmp_path, b"cnumpy\ndtype\n(S'" + b"many words " * 10_000 + b"'\ntR.")
    assert len(refused(path)) < len(str(path)) + 400


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    for load in (load_pickle, load_torch):
        refused(tmp_path / "none.p", load)
        refused(tmp_path, load)


def test_depth_and_cycles_do_not_bring_the_reader_down(tmp_path: Path) -> None:
    depth = 300_000
    assert len(load_pickle(written(tmp_path, b"]" * depth + b"a" * (depth - 1) + b"."))) == 1
    itself = load_pickle(written(tmp_path, b"]q\x00h\x00a."))
    assert itself[0] is itself


@pytest.mark.parametrize(
    "content", [b"\x80\x04\x8e" + b"\xff" * 8, b"\x80\x04\x8e" + struct.pack("<Q", 2**45), b"X\xff\xff\xff\x7fa."]
)
def test_claimed_lengths_beyond_the_file_are_errors(tmp_path: Path, content: bytes) -> None:
    refused(written(tmp_path, content))


ENTRIES = [("COCO_train2014_000000000009.jpg", "9.mat", [1, 2, 3, 4], "the left bowl", [("r1", ["none"])])]


@pytest.mark.parametrize("new", [True, False])
def test_both_formats_of_torch_give_what_was_saved(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "unc_train.pth"
    torch.save(ENTRIES, path, _use_new_zipfile_serialization=new)
    assert zipfile.is_zipfile(path) == new
    assert load_torch(path) == ENTRIES


def test_a_plain_pickle_under_torchs_name_is_read(tmp_path: Path) -> None:
    assert load_torch(written(tmp_path, pickle.dumps(ENTRIES, 2))) == ENTRIES


@pytest.mark.parametrize("new", [True, False])
def test_tensors_and_calls_in_torchs_files_are_refused(tmp_path: Path, new: bool) -> None:
    import os

    marker, path = tmp_path / "marker", tmp_path / "unc_train.pth"
    for content in (torch.zeros(3), Call(os.system, f"touch {marker}")):
        torch.save([content], path, _use_new_zipfile_serialization=new)
        assert "do not trust" in refused(path, load_torch)
    assert not marker.exists()


@pytest.mark.parametrize("new", [True, False])
def test_a_truncated_file_of_torch_is_an_error(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "unc_train.pth"
    torch.save(ENTRIES, path, _use_new_zipfile_serialization=new)
    whole = path.read_bytes()
    # The old format ends with the storages' keys, which nothing here needs.
    ends = range(0, len(whole), 7) if new else range(0, whole.index(b"r1"), 3)
    for end in ends:
        path.write_bytes(whole[:end])
        refused(path, load_torch)


def test_a_damaged_byte_in_an_archive_is_found(tmp_path: Path) -> None:
    path = tmp_path / "unc_train.pth"
    torch.save(ENTRIES, path)
    path.write_bytes(path.read_bytes().replace(b"the left bowl", b"the left bowls"[1:], 1))
    assert "CRC" in refused(path, load_torch)


def _archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_an_archive_that_is_not_as_torch_writes_it_is_refused(tmp_path: Path) -> None:
    path, content = tmp_path / "x.pth", pickle.dumps(ENTRIES, 2)
    assert load_torch(_archive(path, {"x/data.pkl": content})) == ENTRIES
    refused(_archive(path, {"x/other": content}), load_torch)
    refused(_archive(path, {"x/data.pkl": content, "y/data.pkl": content}), load_torch)


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = io.BytesIO()
    pickle.dump("0" * 20_000_000, bomb, 2)
    path = _archive(tmp_path / "x.pth", {"x/data.pkl": bomb.getvalue()}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("unpacked"))
    assert "torch.save" in refused(path, load_torch)
