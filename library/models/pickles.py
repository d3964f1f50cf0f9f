"""PyTorch pickles (`.ckpt`, `.pt`, `.pth`, `.bin`) -> the same `Header` as of a `.safetensors` file; torch-free.

Nothing in the pickle runs. It is taken apart with a short list of inert stand-ins for what `torch.save` writes, which
no pickle can change; one that names anything else is refused. The tensors' values are not read here: a header tells
where they stand in the file.
"""

import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from library.errors import UserError
from library.models.headers import BYTES_OF, Entry, Header, read_header

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
_AGAIN = "download or copy it again"
_CONVERT = "convert it to .safetensors"
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_MAX_PICKLE = 200_000_000
_MAX_WORD = 16
_DEPTH = 4
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


def read_weights(path: Path, where: str, *, loose: bool = False) -> Header:
    """The header of a weight file: `.safetensors`, or a pickle if its name ends as pickles do.

    Args:
        loose: a pickle may be a tensor alone, whose name is "", and its outermost texts become the metadata.

    Raises:
        UserError: not such a file, damaged, truncated, or a pickle that could run code.
    """
    if path.suffix.lower() not in SUFFIXES:
        return read_header(path, where)
    try:
        with path.open("rb") as file:
            start = file.read(9)
            file.seek(0)
            if start[8:] == b"{":
                return read_header(path, where)
            if len(start) < 9:
                raise UserError.single(where, f"the file holds only {len(start)} bytes, it is truncated", _AGAIN)
            if not start.startswith((b"PK", b"\x80")):
                wrong = "is neither a PyTorch pickle nor a safetensors file"
                raise UserError.single(where, wrong, _AGAIN)
            zipped = start.startswith(b"PK")
            root, places = _zipped(file, where) if zipped else _legacy(file, where)
    except IsADirectoryError as error:
        raise UserError.single(where, "is a folder", "name a file in it") from error
    except OSError as error:
        raise UserError.single(where, f"can't be read ({error.strerror})") from error
    size = path.stat().st_size
    named = {"": root} if loose and isinstance(root, _Tensor) else dict(_named(root, where))
    texts = _texts(root) if loose and isinstance(root, Mapping) else {}
    entries = {name: _entry(name, tensor, places[tensor.storage.key], size, where) for name, tensor in named.items()}
    return Header(path, entries, texts)


class _Storage(NamedTuple):
    """A run of values of a file; its place there is kept by its key."""

    dtype: str
    length: int
    key: str


class _View(NamedTuple):
    """A part of a storage, as old files name them: from this value on."""

    storage: _Storage
    offset: int


class _Tensor(NamedTuple):
    """What a pickle says of a tensor, in values of its dtype."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str


class _Name(NamedTuple):
    """A dtype or a kind of storage."""

    dtype: str


class _Function(NamedTuple):
    """A stand-in for something that a pickle calls."""

    call: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)


class _Ordered(dict[Any, Any]):
    """An `OrderedDict` whose own attributes, such as `_metadata`, are passed over."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class _Parameters(dict[Any, Any]):
    """A `ParameterDict`, in which old embeddings are: of its state the table of parameters alone counts."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        self.update(state["_parameters"])


class _RefusedError(Exception):
    """A pickle names something that is not on the list."""


class _DamagedError(Exception):
    """A pickle contradicts itself or its file."""


def _tensor(storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> _Tensor:
    """torch's `_rebuild_tensor_v2`."""
    if isinstance(storage, _View):
        storage, offset = storage.storage, storage.offset + offset
    return _strided(storage, offset, shape, stride, storage.dtype)


def _tensor_v3(storage: Any, offset: int, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any) -> Any:
    """torch's `_rebuild_tensor_v3`: the storage is bytes, the dtype stands beside it."""
    return _strided(storage, offset, shape, stride, dtype.dtype)


def _strided(storage: Any, offset: Any, shape: Any, stride: Any, dtype: str) -> _Tensor:
    shape, stride = tuple(shape), tuple(stride)
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or not all(type(number) is int and number >= 0 for number in numbers):
        raise _DamagedError("a tensor without a storage, or of an impossible shape")
    if len(shape) != len(stride):
        raise _DamagedError("a tensor with more lengths than strides")
    return _Tensor(storage, offset, shape, stride, dtype)


def _rebuilt(call: Any, _kind: Any, arguments: Any, *_: Any) -> Any:
    """torch's `_rebuild_from_type_v2`: a tensor with attributes, which are passed over."""
    if not isinstance(call, _Function):
        raise _DamagedError("a tensor that is made by no function")
    return call(*arguments)


def _nothing(*_: Any) -> None:
    """What is of no use to us."""


_FUNCTIONS = {
    "collections.OrderedDict": _Function(lambda pairs=(): _Ordered(pairs)),
    "collections.defaultdict": _Function(lambda *_: _Ordered()),
    "torch._utils._rebuild_tensor": _Function(_tensor),
    "torch._utils._rebuild_tensor_v2": _Function(_tensor),
    "torch._utils._rebuild_tensor_v3": _Function(_tensor_v3),
    "torch._utils._rebuild_parameter": _Function(lambda value, *_: value),
    "torch._utils._rebuild_parameter_with_state": _Function(lambda value, *_: value),
    "torch._tensor._rebuild_from_type_v2": _Function(_rebuilt),
    "torch.Size": _Function(lambda lengths=(): tuple(lengths)),
    "torch.Tensor": _Function(_nothing),
    "torch.nn.parameter.Parameter": _Function(_nothing),
    "torch.device": _Function(_nothing),
    "torch.serialization._get_layout": _Function(_nothing),
    "_codecs.encode": _Function(_nothing),
    "builtins.set": _Function(_nothing),
    "builtins.frozenset": _Function(_nothing),
    "builtins.bytearray": _Function(_nothing),
    "builtins.complex": _Function(_nothing),
    "builtins.dict": _Function(lambda *_: _Ordered()),
}


class _Unpickler(pickle.Unpickler):
    """Knows the stand-ins above and nothing else; `storage` gives a storage its place in the file."""

    def __init__(self, file: IO[bytes], storage: Callable[[str, str, int, Any], Any]) -> None:
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full in _FUNCTIONS:
            return _FUNCTIONS[full]
        if full == "torch.nn.modules.container.ParameterDict":
            return _Parameters
        if module in ("torch", "torch.storage", "torch.cuda") and name in _STORAGES:
            return _Name(_STORAGES[name])
        if module == "torch" and name in _DTYPES:
            return _Name(_DTYPES[name])
        raise _RefusedError(full)

    def persistent_load(self, told: Any) -> Any:
        kind, storage_type, key, _location, length, *view = told
        if kind != "storage" or not isinstance(storage_type, _Name) or type(length) is not int or length < 0:
            raise _DamagedError("a storage of an unknown kind")
        return self._storage(storage_type.dtype, str(key), length, view[0] if view else None)


_BROKEN = (
    *(pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, OverflowError),
    *(RuntimeError, ImportError, MemoryError, struct.error, zipfile.BadZipFile, zlib.error, _DamagedError),
)


def _unpickle(file: IO[bytes], where: str, storage: Callable[[str, str, int, Any], Any]) -> Any:
    try:
        return _Unpickler(file, storage).load()
    except _RefusedError as error:
        wrong = f"the pickle needs {error}, which could run code"
        raise UserError.single(where, wrong, "it is not read; take it as .safetensors") from None
    except _BROKEN as error:
        raise UserError.single(where, "is a pickle that is damaged, or not one of PyTorch's", _AGAIN) from error


def _zipped(file: IO[bytes], where: str) -> tuple[Any, dict[str, int]]:
    """What is in a file, and where its storages begin. Since 1.6 torch writes a zip archive of members as they are."""
    try:
        archive = zipfile.ZipFile(file)
    except _BROKEN as error:
        raise UserError.single(
            where, "is truncated or damaged: the end of the zip archive is missing", _AGAIN
        ) from error
    with archive:
        members = {info.filename: info for info in archive.infolist()}
        main = next((name for name in members if name.endswith("/data.pkl") or name == "data.pkl"), None)
        if main is None:
            raise UserError.single(where, "is a zip archive, but not one of PyTorch's")
        prefix = main.removesuffix("data.pkl")
        if f"{prefix}constants.pkl" in members:
            raise UserError.single(where, "is a TorchScript program, not a file of weights", _CONVERT)
        if members[main].file_size > _MAX_PICKLE:
            raise UserError.single(where, "its pickle is too large to be one of a base model", _CONVERT)
        _check_plain(members[main], where)
        told = members.get(f"{prefix}byteorder")
        if told is not None:
            _check_plain(told, where)
        try:
            if told is not None and told.file_size > _MAX_WORD:
                raise _DamagedError("a word that is too long")
            order = b"little" if told is None else archive.read(told)
            content = archive.open(main)
        except _BROKEN as error:
            raise UserError.single(where, "is a damaged zip archive", _AGAIN) from error
        if order != b"little":
            raise UserError.single(where, "was written on a big-endian machine", f"{_CONVERT} there")
        places: dict[str, int] = {}

        def storage(dtype: str, key: str, length: int, _view: object) -> _Storage:
            info = members[f"{prefix}data/{key}"]
            _check_plain(info, where)
            if length * BYTES_OF[dtype] > info.file_size:
                raise _DamagedError("a storage is longer than its member")
            if key not in places:
                places[key] = _place(file, info.header_offset)
            return _Storage(dtype, length, key)

        with content:
            return _unpickle(content, where, storage), places


def _check_plain(info: zipfile.ZipInfo, where: str) -> None:
    """PyTorch writes members as they are."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise UserError.single(where, f"its member {info.filename} is compressed or encrypted", _CONVERT)


def _place(file: IO[bytes], header_offset: int) -> int:
    """Where a member's bytes begin, as its local header tells."""
    here = file.tell()
    file.seek(header_offset)
    local = file.read(30)
    file.seek(here)
    if local[:4] != b"PK\x03\x04" or len(local) < 30:
        raise _DamagedError("a member's header is missing")
    name, extra = local[26] + 256 * local[27], local[28] + 256 * local[29]
    return header_offset + 30 + name + extra


def _legacy(file: IO[bytes], where: str) -> tuple[Any, dict[str, int]]:
    """The same of a file from before torch 1.6: pickles one behind the other, then the storages' bytes."""
    found: dict[str, _Storage] = {}

    def storage(dtype: str, key: str, length: int, view: Any) -> _Storage | _View:
        whole = found.setdefault(key, _Storage(dtype, length, key))
        if view is None:
            return whole
        _key, offset, _length = view
        if type(offset) is not int:
            raise _DamagedError("a view without a beginning")
        return _View(whole, offset)

    if _unpickle(file, where, storage) != _MAGIC or _unpickle(file, where, storage) != _PROTOCOL:
        raise UserError.single(where, "is a pickle, but not one that torch.save wrote", _CONVERT)
    system = _unpickle(file, where, storage)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise UserError.single(where, "was written on a big-endian machine", f"{_CONVERT} there")
    root = _unpickle(file, where, storage)
    keys = _unpickle(file, where, storage)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(found):
        raise UserError.single(where, "is a pickle that is damaged: its list of storages is wrong", _AGAIN)
    places, end = {}, file.tell()
    for key in map(str, keys):
        file.seek(end)
        count = file.read(8)
        whole = found[key]
        if len(count) < 8:
            raise UserError.single(where, "is truncated: the last of its storages are missing", _AGAIN)
        if struct.unpack("<q", count)[0] != whole.length:
            raise UserError.single(where, "is a pickle that is damaged: a storage has another length", _AGAIN)
        places[key] = end + 8
        end += 8 + whole.length * BYTES_OF[whole.dtype]
    return root, places


def _named(root: Any, where: str) -> Iterator[tuple[str, _Tensor]]:
    """The tensors by name, without the `state_dict` around them."""
    if isinstance(root, Mapping) and isinstance(root.get("state_dict"), Mapping):
        root = root["state_dict"]
    if not isinstance(root, Mapping):
        raise UserError.single(where, "is a pickle that holds no named tensors")
    return _flat("", root, _DEPTH)


def _texts(root: Mapping[Any, Any]) -> dict[str, str]:
    return {name: text for name, text in root.items() if isinstance(name, str) and isinstance(text, str)}


def _flat(prefix: str, values: Mapping[Any, Any], depth: int) -> Iterator[tuple[str, _Tensor]]:
    for name, value in values.items():
        if isinstance(value, _Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping) and depth:
            yield from _flat(f"{prefix}{name}.", value, depth - 1)


def _entry(name: str, tensor: _Tensor, place: int, size: int, where: str) -> Entry:
    """Where a tensor's values stand; `stride` only where they don't follow each other row after row."""
    width, storage = BYTES_OF[tensor.dtype], tensor.storage
    start = place + tensor.offset * width
    if 0 in tensor.shape:
        return Entry(tensor.dtype, tensor.shape, place, place)
    span = 1 + sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride, strict=True))
    end = start + span * width
    if end > place + storage.length * BYTES_OF[storage.dtype]:
        raise UserError.single(where, f"is damaged: the tensor {name} is larger than its storage", _AGAIN)
    if end > size:
        raise UserError.single(where, f"is truncated: {size:,} bytes of {end:,} are there", _AGAIN)
    plain = _is_row_after_row(tensor)
    return Entry(tensor.dtype, tensor.shape, start, end, None if plain else tensor.stride)


def _is_row_after_row(tensor: _Tensor) -> bool:
    expected = math.prod(tensor.shape)
    for length, step in zip(tensor.shape, tensor.stride, strict=True):
        expected //= length
        if length > 1 and step != expected:
            return False
    return True
