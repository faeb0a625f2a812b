"""A file of weights, read without running anything in it: safetensors, or a pickle that holds nothing but tensors."""

import hashlib
import io
import pickle
import re
import struct
import warnings
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

    WeightFileError if the hash is another, if loading would run code, or if it is damaged or no file of weights.
    StorageError if it can't be read.
    """
    check_sha256(sha256)
    store, name = split_uri(uri)
    data = store.read(name)
    digest = hashlib.sha256(data).hexdigest()
    if sha256 is not None and not digest.startswith(sha256.lower()):
        raise WeightFileError(f"{uri}: its sha256 is {digest}, but --sha256 says {sha256}: damaged, or another file")
    if data.startswith(_LFS_POINTER):
        raise WeightFileError(f"{uri}: is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`")
    return WeightFile(uri=uri, name=name, sha256=digest, loaded=_loaded(data, uri))


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
