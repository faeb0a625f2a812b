"""A file of weights, read without running anything in it: safetensors, or a pickle that holds nothing but tensors."""

import hashlib
import io
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch

from sr_data.storage import split_uri

# What torch.load and safetensors answer damaged bytes with, found by cutting and changing files at random places.
_DAMAGED = (
    safetensors.SafetensorError, struct.error, RuntimeError, ValueError, EOFError, LookupError, TypeError,
    AttributeError, AssertionError, ArithmeticError, MemoryError,
)  # fmt: skip
# torch's words: "… unsupported GLOBAL posix.system whose …", "Unsupported global: GLOBAL models.SRResNet was not …".
_REFUSED = re.compile(r"GLOBAL (\S+)")
MAX_GIB = 4.0
"""Of a file, and of what it unpacks to. All of it is held in memory, more than once; the largest EDSR (43 million
parameters) has 0.2 GiB, a checkpoint with discriminator, averages and the optimiser's state six times that."""
_LFS_POINTER = b"version https://git-lfs."
_HOW_TO_CONVERT = (
    "Where you trust the file and have its authors' code, load it there, save only the tensors with "
    "torch.save(network.state_dict(), 'tensors.pth'), and import that"
)


class WeightFileError(ValueError):
    """The file is damaged, another one than announced, or not only tensors; the message starts with its URI."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WeightFile:
    """What a file holds, and which file it was."""

    uri: str
    """As it was given."""
    name: str
    """The last part of the URI."""
    sha256: str
    """Of its bytes, 64 hex digits."""
    loaded: Any
    """What `torch.load` gave: tensors, numbers, text, lists and dicts of them, nothing else."""

    @property
    def named_hash(self) -> str | None:
        """The beginning of the sha256 that authors write into names: `edsr_x2-0edfb8a3.pt` → `0edfb8a3`."""
        match = re.search(r"-([0-9a-f]{8,64})\.\w+$", self.name)
        return match[1] if match else None


def check_sha256(sha256: str | None) -> None:
    """WeightFileError if this is no sha256, nor the first 8 or more digits of one; None is fine."""
    if sha256 is not None and re.fullmatch("[0-9a-fA-F]{8,64}", sha256) is None:
        raise WeightFileError(f"--sha256 {sha256!r}: must be 8 to 64 hex digits, as sha256sum prints them")


def read_weight_file(uri: str, *, sha256: str | None = None) -> WeightFile:
    """Reads the file at a path or URI. `sha256` is what its hash must be, or begin with.

    WeightFileError if it is larger than `MAX_GIB`, packed or unpacked, if the hash is another, if loading would run
    code, or if it is damaged or no file of weights. StorageError if it can't be read.
    """
    check_sha256(sha256)
    store, name = split_uri(uri)
    _check_size(store.num_bytes(name), uri)
    data = store.read(name)
    digest = hashlib.sha256(data).hexdigest()
    if sha256 is not None and not digest.startswith(sha256.lower()):
        raise WeightFileError(f"{uri}: its sha256 is {digest}, but --sha256 says {sha256}: damaged, or another file")
    if data.startswith(_LFS_POINTER):
        raise WeightFileError(f"{uri}: is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`")
    num_bytes = _unpacked_bytes(data)
    _check_size(num_bytes, uri)
    loaded = _loaded(data, uri)
    _check_backed(loaded, num_bytes, uri)
    return WeightFile(uri=uri, name=name, sha256=digest, loaded=loaded)


def _check_size(num_bytes: int, uri: str) -> None:
    if num_bytes > MAX_GIB * 2**30:
        raise WeightFileError(
            f"{uri}: holds {num_bytes / 2**30:,.1f} GiB, more than the {MAX_GIB:g} that a file of weights may have. "
            f"{_HOW_TO_CONVERT}"
        )


def _unpacked_bytes(data: bytes) -> int:
    """How much memory its parts take: the files of a zip archive (what torch.save writes) may be compressed."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, *_DAMAGED):  # another format, or damaged: then torch says so
        return len(data)


def _check_backed(loaded: Any, num_bytes: int, uri: str) -> None:
    """WeightFileError if its tensors have more memory than came from the file: in torch's old format, a few bytes can
    ask for a terabyte, which nothing is read into.
    """
    storages: dict[int, int] = {}
    seen: set[int] = set()
    left = [loaded]
    while left:
        value = left.pop()
        if id(value) in seen:  # lists and dicts may hold themselves
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.layout is torch.strided and not value.is_meta:  # others are refused for what they are
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
    if sum(storages.values()) > num_bytes:
        raise WeightFileError(
            f"{uri}: damaged, or made to do harm: its tensors ask for {sum(storages.values()):,} bytes, of which it "
            f"holds {num_bytes:,}"
        )


def _loaded(data: bytes, uri: str) -> Any:
    try:
        if _is_safetensors(data):
            return safetensors.torch.load(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to load TorchScript and old pickles with what runs code
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = _REFUSED.search(str(error))
        if refused is None:
            raise WeightFileError(
                f"{uri}: refused, because it is a pickle with more than tensors in it, or damaged; nothing was run. "
                f"{_HOW_TO_CONVERT}"
            ) from error
        raise WeightFileError(
            f"{uri}: refused, because loading it would run code from outside this file ({refused[1]}): a pickle can "
            f"make whoever loads it do anything. Nothing was run. {_HOW_TO_CONVERT}"
        ) from error
    except _DAMAGED as error:
        if "TorchScript" in str(error):
            raise WeightFileError(
                f"{uri}: refused, because it is a TorchScript archive, a program that loading would run. Nothing was "
                f"run. {_HOW_TO_CONVERT}"
            ) from error
        raise WeightFileError(
            f"{uri}: damaged, or no file of weights (.pt, .pth, .safetensors); nothing in it was run. Its sha256 is "
            f"{hashlib.sha256(data).hexdigest()}, of {len(data):,} bytes: compare that with what its authors say"
        ) from error


def _is_safetensors(data: bytes) -> bool:
    """Whether it begins as that format does, whatever its name says: a header's length, then a JSON object."""
    return len(data) > 9 and data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8
