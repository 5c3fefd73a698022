"""Reading files that others may have written: as data only, and in no more memory than they take on the disk."""

import pickle
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor

from lightning_topkast.errors import TopKastError

# A view such as `torch.ones(1).expand(n)` is small in a file and large once it is copied. Buffers of real models are
# sometimes such views, so a few are allowed.
_MOST_EXPANDED = 64 << 20  # bytes, of all tensors of a file together

# What the index of a distributed checkpoint consists of; nothing else in it is built.
_INDEX_CLASSES = frozenset(
    [("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
    )]
    + [("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout")]
    + [("torch", name) for name in ("Size", "device")]
    + [("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)]
    + [("pathlib", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")]
)  # fmt: skip


def load(file: Path | IO[bytes], map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Return the content of a file of `torch.save`, without running code of the file.

    Args:
        file: its path, or the open file.
        map_location: as in `torch.load`.
        mmap: whether tensors stay in the file until they are used.

    Raises:
        TopKastError: its parts or its tensors would take far more memory than the file.
        RuntimeError, UnpicklingError, EOFError: it is damaged, or holds more than tensors and primitives.
        OSError: it cannot be read.
    """
    if is_zipfile(file):
        with ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > (size := _size_of(file)):  # torch stores its parts as they are, one after the other
            raise TopKastError(f"the file is damaged: its parts take {unpacked:,} bytes, and it has {size:,}")
    if not isinstance(file, Path):
        file.seek(0)
    content = torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
    expanded = sum(map(_expanded_bytes, _tensors_in(content)))
    if expanded > _MOST_EXPANDED:
        raise TopKastError(
            f"the file is damaged, or made to fill the memory: it has tensors of {expanded:,} bytes that repeat a few "
            f"stored values; expected at most {_MOST_EXPANDED:,}"
        )
    return content


def check_distributed(folder: Path) -> None:
    """Refuse a distributed checkpoint from which `torch.distributed.checkpoint` would run code.

    torch unpickles the index, and every entry that is not a tensor, whatever they hold.

    Raises:
        TopKastError: the index or an entry holds more than tensors and primitives, or tensors exceed the files' size.
    """
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

    try:
        if odd := sorted(path.name for path in folder.iterdir() if not path.is_file()):
            raise TopKastError(f"its {odd[0]} is no regular file")
        with open(folder / ".metadata", "rb") as file:
            index = _IndexUnpickler(file).load()
        needed = 0
        for name, entry in index.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                needed += entry.size.numel() * entry.properties.dtype.itemsize
            elif not isinstance(entry, BytesStorageMetadata):
                raise TopKastError(f"'{name}' is neither a tensor nor bytes")
        for place, stored in index.storage_data.items():
            if Path(stored.relative_path).name != str(stored.relative_path):
                raise TopKastError(f"'{place.fqn}' is said to be in {stored.relative_path}, which is not in its folder")
            if stored.transform_descriptors:  # torch would unpack, then unpickle what was never looked at
                raise TopKastError(f"'{place.fqn}' is stored in a form, {stored.transform_descriptors}, of its own")
            if isinstance(index.state_dict_metadata.get(place.fqn), BytesStorageMetadata):
                with open(folder / stored.relative_path, "rb") as file:
                    file.seek(stored.offset)
                    load(BytesIO(file.read(stored.length)))
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        if needed > size:
            raise TopKastError(f"its tensors take {needed:,} bytes, and its files have {size:,}")
    except OSError:
        raise
    except Exception as error:  # damaged files cause many kinds of errors
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise TopKastError(f"the distributed checkpoint {folder} cannot be read safely ({first})") from error


class _IndexUnpickler(pickle.Unpickler):
    """Reads the index of a distributed checkpoint, and refuses any other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _INDEX_CLASSES:
            raise pickle.UnpicklingError(f"its index names {module}.{name}")
        return super().find_class(module, name)


def _size_of(file: Path | IO[bytes]) -> int:
    if isinstance(file, Path):
        return file.stat().st_size
    return file.seek(0, 2)


def _tensors_in(content: Any) -> Iterator[Tensor]:
    """Yield each tensor once, also where containers hold each other many times over."""
    seen, stack = set(), [content]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            stack += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            stack += value


def _expanded_bytes(tensor: Tensor) -> int:
    """Return the size of a tensor whose storage is smaller than its shape says, and 0 for any other."""
    local = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
    if local.layout is not torch.strided or local.is_meta:
        return 0
    size = local.numel() * local.element_size()
    return size if size > local.untyped_storage().nbytes() else 0
