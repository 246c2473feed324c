"""Files from anywhere, read without running anything that they name and without taking more memory than they have.

A pickle is a program: it names functions and calls them. Here every name stands for an `Inert` object, but for those
that arrays and tensors are made of; and what a small file could make huge is refused before anything is read.
"""

import io
import pickle
import pickletools
import zipfile
from itertools import chain
from pathlib import Path

import torch

from common.checkpoint import verify
from common.errors import UserError


class Inert:
    """Stands for any class or function that a file names. `state` is what its object was to be filled with."""

    state = None

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        pass

    def append(self, item):
        pass

    def extend(self, items):
        pass


class Unsafe(ValueError):
    """Why a file is not read: it would take more memory than its own size explains."""


# Modules that PyTorch does not read from, and what it takes for safe though it asks for any amount of memory
SYSTEM = ("sys", "os", "posix", "nt")
HUNGRY = ("bytearray", "Tensor", "UntypedStorage", "TypedStorage", "_rebuild_sparse_tensor", "_rebuild_qtensor",
          "_rebuild_wrapper_subclass", "_rebuild_nested_tensor", "_rebuild_meta_tensor_no_storage")  # fmt: skip


def opened(file) -> zipfile.ZipFile:
    """A zip archive whose parts, unpacked, are not many times as large as it is. Raises `Unsafe`, BadZipFile."""
    archive = zipfile.ZipFile(file)
    unpacked = sum(part.file_size for part in archive.infolist())
    packed = archive.fp.seek(0, io.SEEK_END)
    if unpacked > 4 * packed + (1 << 24):
        raise Unsafe(f"its {packed / 1e6:.1f} MB unpack to {unpacked / 1e6:,.0f} MB")
    return archive


def absent(path: Path) -> str:
    """What to say of a file that is not there."""
    return f"{path} is a folder; name the file in it, as policy.pt" if path.is_dir() else f"there is no file {path}"


def read_tensors(path: Path, device, content: bytes | None = None) -> object:
    """What PyTorch wrote to a file, or to a part of it with this `content`. Raises UserError.

    It is `torch.load`, which executes nothing: what is no tensor, number, string or container becomes an `Inert`.
    """
    if not path.is_file():
        raise UserError(absent(path))
    if content is None:
        verify(path)
    content = path.read_bytes() if content is None else content
    if not content:
        raise UserError(f"{path} is empty; copy it again")
    try:
        with opened(io.BytesIO(content)) as archive:
            pickles = [archive.read(part) for part in archive.infolist() if part.filename.lower().endswith("data.pkl")]
        for opcode, name, _ in chain.from_iterable(map(pickletools.genops, pickles)):
            if opcode.name == "GLOBAL" and (name.split()[0] in SYSTEM or name.split()[-1] in HUNGRY):
                raise Unsafe(f"it calls {name.replace(' ', '.')}, which no policy needs")
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
        with torch.serialization.safe_globals([(Inert, name) for name in unknown]):
            return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except zipfile.BadZipFile as error:
        if content.startswith(b"PK\3\4"):
            raise UserError(f"{path} is not whole, its end is missing: copy it again") from error
        raise UserError(
            f"{path} is no file of PyTorch's; if one older than 1.6 wrote it, load it there and save it in a newer one"
        ) from error
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read safely ({first[:200]}); copy it again, or save it anew") from error


def fault_of(tensor: object, like: torch.Tensor | None = None) -> str:
    """Why something is no array of finite numbers (of the shape and type of `like`); "" where it is."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or not tensor.is_floating_point():
        return "is no array of real numbers"
    if like is not None and (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
        return f"is {tensor.dtype} of shape {tuple(tensor.shape)}, not {like.dtype} of shape {tuple(like.shape)}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "declares more numbers than the file holds"
    return "" if tensor.isfinite().all() else "holds NaN or infinite numbers"


def load_pickle(data: bytes) -> object:
    """What a pickle holds, with NumPy's arrays as they are and everything else inert. Raises many kinds of errors."""
    for opcode, arg, _ in pickletools.genops(
        data
    ):  # notices declared lengths beyond the end, which a load would reserve
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and arg > len(data):
            raise Unsafe(f"it numbers its objects up to {arg}")
    return Arrays(io.BytesIO(data)).load()


class Arrays(pickle.Unpickler):
    """Knows NumPy's arrays and numbers, and no other class or function."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("_codecs", "encode"):  # bytes, as protocol 2 writes them
            return lambda text, encoding="latin1": text.encode("latin1")
        arrays = ("_reconstruct", "scalar", "_frombuffer", "ndarray", "dtype")
        if name in arrays and module.replace("._core", ".core") in (
            "numpy",
            "numpy.core.multiarray",
            "numpy.core.numeric",
        ):
            return super().find_class(module, name)
        return type(name, (Inert,), {})
