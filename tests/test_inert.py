"""Files that were made to do harm: none is executed, and none takes more memory than it has."""

import collections
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from common.cli import UserError
from common.inert import Inert, Unsafe, load_pickle, read_tensors


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Scalar(torch.nn.Module):
    """CORL's CQL puts such a module, not its weights, into its checkpoint."""

    def __init__(self):
        super().__init__()
        self.constant = torch.nn.Parameter(torch.zeros(1))


@pytest.fixture(autouse=True)
def _nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "executed").exists()


def test_tensors_and_numbers_are_read_and_objects_are_not_brought_to_life(tmp_path):
    path = tmp_path / "file.pt"
    weights = {"w": torch.randn(3, 2), "half": torch.ones(2).half(), "n": torch.tensor(3)}
    torch.save(
        {
            "actor": collections.OrderedDict(weights),
            "alpha": Scalar(),
            "x": [1, 2.5, "text", None],
            "path": Path("x"),
            "call": Call(eval, "open('executed', 'w')"),
        },
        path,
    )
    read = read_tensors(path, "cpu")
    assert read["x"] == [1, 2.5, "text", None] and isinstance(read["alpha"], Inert) and isinstance(read["path"], Inert)
    assert isinstance(read["call"], Inert)
    assert all(torch.equal(read["actor"][name], value) for name, value in weights.items())


HARMFUL = {
    "a plain pickle": lambda: pickle.dumps({"actor": Evil()}),
    "text": lambda: b"hello",
    "nothing": lambda: b"",
    "a zip of something else": lambda: zipped({"hello.txt": b"hello"}),
    "no pickle within": lambda: torch_file(b"hello"),
    "a pickle without an end": lambda: torch_file(pickle.dumps({}, 2)[:-1]),
    "bytes by their number": lambda: torch_file(pickle.dumps(Call(bytearray, 10**12), 2)),
    "a tensor by its size": lambda: torch_file(pickle.dumps(Call(torch.Tensor, 10**12), 2)),
    "a sparse tensor": lambda: saved(torch.sparse_coo_tensor(torch.zeros(1, 1).long(), torch.ones(1), (10**12,))),
    "a call of the system": lambda: torch_file(b"cos\nsystem\n(S'touch executed'\ntR."),
    "the same within a checkpoint": lambda: saved({"actor": {}, "x": Evil()}),
    "much from little": lambda: zipped({"x/data.pkl": b"}.", "x/data/0": bytes(1 << 26)}, zipfile.ZIP_DEFLATED),
    "more numbers than bytes": lambda: saved(torch.ones(10)).replace(b"K\n\x85", b"J\0\0\0\x10\x85"),
}  # fmt: skip


def zipped(parts: dict[str, bytes], compression=zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return file.getvalue()


def torch_file(pickled: bytes) -> bytes:
    return zipped({"archive/data.pkl": pickled, "archive/version": b"3\n", "archive/byteorder": b"little"})


def saved(thing) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("what", HARMFUL)
def test_a_harmful_file_is_refused(what, tmp_path):
    path = tmp_path / "file.pt"
    path.write_bytes(HARMFUL[what]())
    with pytest.raises(UserError) as error:
        read_tensors(path, "cpu")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_was_cut_off_is_called_that(tmp_path):
    whole = saved({"actor": {"w": torch.randn(40, 40)}})
    for share in (0.1, 0.6, 0.98):
        (tmp_path / "file.pt").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match="is not whole"):
            read_tensors(tmp_path / "file.pt", "cpu")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_give_arrays_and_nothing_else(protocol):
    inner = Scalar()
    inner.array = np.arange(6.0).reshape(2, 3)
    read = load_pickle(pickle.dumps([inner, np.float64(1.5), collections.OrderedDict(a=1), Evil()], protocol))
    assert type(read[0]).__name__ == "Scalar" and isinstance(read[0], Inert)
    np.testing.assert_array_equal(read[0].state["array"], inner.array)
    assert read[1] == 1.5 and isinstance(read[2], Inert) and isinstance(read[3], Inert)


@pytest.mark.parametrize("data", [
    b"\x80\x02Nr\xff\xff\xff\x7f.",  # an object numbered 2³¹
    b"\x80\x05\x96" + struct.pack("<Q", 10**12) + b"x.",  # 1 TB of bytes, of which one is there
])  # fmt: skip
def test_a_pickle_that_asks_for_memory_is_refused(data):
    with pytest.raises((Unsafe, ValueError, MemoryError)):
        load_pickle(data)
