"""One manifest record → a decoded, aligned HR/LR pair."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sr_data.decode import decode_image
from sr_data.errors import DataError, ImageError
from sr_data.manifest import ImageRecord
from sr_data.resize import crop_to_multiple, downscale_bicubic
from sr_data.storage import Store


@dataclass(frozen=True, slots=True)
class DecodedPair:
    """Two uint8 HWC RGB images; HR has exactly `scale` times the sides of LR."""

    name: str
    hr_HWC: NDArray[np.uint8]
    lr_HWC: NDArray[np.uint8]


def load_pair(store: Store, record: ImageRecord, scale: int) -> DecodedPair:
    """Reads the files of `record`, makes LR where none is shipped.

    Raises:
        DataError: a file is no longer the one that the manifest was made from.
        ImageError: it can't be decoded.
        StorageError: it can't be read.
    """
    hr_HWC = crop_to_multiple(_read(store, record.hr_key, record.hr_sha256), scale)
    if hr_HWC.shape != (record.height, record.width, 3):
        raise DataError(f"{store.uri_of(record.hr_key)}: {_size(hr_HWC)} px at scale {scale}, where the manifest says "
                        f"{record.width} x {record.height}: it was made for another scale")  # fmt: skip
    hr_HWC = np.ascontiguousarray(hr_HWC)
    if record.lr_key is None:
        return DecodedPair(record.name, hr_HWC, downscale_bicubic(hr_HWC, scale))
    lr_HWC = _read(store, record.lr_key, record.lr_sha256)
    if lr_HWC.shape != (record.height // scale, record.width // scale, 3):
        raise ImageError(f"{store.uri_of(record.lr_key)}: {_size(lr_HWC)} px is not 1/{scale} of HR's {_size(hr_HWC)}")
    return DecodedPair(record.name, hr_HWC, lr_HWC)


def middle(pair: DecodedPair, side_px_lr: int) -> DecodedPair:
    """At most `side_px_lr` x `side_px_lr` LR pixels from the middle, if either side is twice as long or longer; a pair
    that is smaller as it is.
    """
    height, width = pair.lr_HWC.shape[:2]
    if max(height, width) < 2 * side_px_lr:
        return pair
    scale = pair.hr_HWC.shape[0] // height
    top, left = max(0, (height - side_px_lr) // 2), max(0, (width - side_px_lr) // 2)
    lr_HWC = pair.lr_HWC[top : top + side_px_lr, left : left + side_px_lr]
    hr_HWC = pair.hr_HWC[top * scale : (top + side_px_lr) * scale, left * scale : (left + side_px_lr) * scale]
    return DecodedPair(pair.name, np.ascontiguousarray(hr_HWC), np.ascontiguousarray(lr_HWC))


def _read(store: Store, key: str, sha256: str | None) -> NDArray[np.uint8]:
    data = store.read(key)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{store.uri_of(key)}: was replaced since the manifest was made; start the run again")
    return decode_image(data, name=store.uri_of(key))[0]


def _size(image_HWC: NDArray[np.uint8]) -> str:
    return f"{image_HWC.shape[1]} x {image_HWC.shape[0]}"
