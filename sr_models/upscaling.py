"""A network applied to image files: whatever kind of picture goes in comes out larger, and of the same kind."""

from dataclasses import replace

import numpy as np
import torch

from sr_models.errors import ModelError
from sr_models.image_file import MAX_MPX, Picture, check_writable, output_format, read_picture, write_picture
from sr_models.inference import upscale_image, windows
from sr_models.network import SRNetwork

_BAND_PX = 256
_CUBIC_RADIUS_PX_LR = 3  # of the interpolation below: 2, and one for its half-pixel positions
PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}
"""Name → what convolutions round to (`autocast`)."""

PREDICT_DEFAULTS: dict[str, int | float | bool | str] = {
    "tile_px_lr": 192,
    "self_ensemble": False,
    "precision": "float32",
    "format": "same",
    "max_mpx": MAX_MPX,
}
"""Parameters of a registered model's `predict`, and what they are if not given; its signature holds them too.

`tile_px_lr` bounds memory; `self_ensemble` is better and eight times slower; `precision` is float32 or bfloat16; of
files, `format` is what comes out (same, png, jpeg, webp) and `max_mpx` the most that is decoded.
"""


def upscale_file(
    model: SRNetwork,
    data: bytes,
    *,
    name: str,
    format: str | None = None,  # noqa: A002  Pillow's word
    max_mpx: float = MAX_MPX,
    tile_px_lr: int = 192,
    self_ensemble: bool = False,
    autocast: torch.dtype | None = None,
) -> bytes:
    """An image file → the file of the upscaled image, in `format` (PNG, JPEG, WEBP), or in its own, or else as PNG.

    `max_mpx` limits what is decoded; the rest is as for `upscale_picture`. ImageFileError, which starts with `name`, if
    the file can't be read, or the format can't hold what is in it.
    """
    lr_picture = read_picture(data, name=name, max_mpx=max_mpx)
    written_as = format or output_format(lr_picture.format)
    check_writable(lr_picture, format=written_as, name=name, scale=model.config.scale)
    sr_picture = upscale_picture(
        model, lr_picture, tile_px_lr=tile_px_lr, self_ensemble=self_ensemble, autocast=autocast
    )
    return write_picture(sr_picture, format=written_as, name=name)


def upscale_picture(
    model: SRNetwork,
    picture: Picture,
    *,
    tile_px_lr: int = 192,
    self_ensemble: bool = False,
    autocast: torch.dtype | None = None,
) -> Picture:
    """The picture in `scale` times the size, depth, profile and EXIF as they were.

    Options as for `upscale_batch`. Grey goes through the network as R = G = B and comes back as the mean of the three.
    Alpha is interpolated (bicubic): a network trained on photos puts noise where a mask is opaque.
    """
    return with_upscaled(
        picture,
        upscale_image(
            model, network_input(picture), tile_px_lr=tile_px_lr, self_ensemble=self_ensemble, autocast=autocast
        ),
        scale=model.config.scale,
    )


def network_input(picture: Picture) -> np.ndarray:
    """What a network is given of a picture: RGB H×W×3, grey as R = G = B."""
    colour_HWC = picture.colour_HWC
    return colour_HWC if colour_HWC.shape[2] == 3 else np.repeat(colour_HWC, 3, axis=2)


def with_upscaled(picture: Picture, sr_HWC: np.ndarray, *, scale: int) -> Picture:
    """The picture with what a network made of its `network_input` in place of its pixels."""
    if picture.colour_HWC.shape[2] == 1:
        sr_HWC = _mean_of_channels(sr_HWC)
    alpha_HW = picture.alpha_HW if picture.alpha_HW is None else upscale_alpha(picture.alpha_HW, scale)
    return replace(picture, colour_HWC=sr_HWC, alpha_HW=alpha_HW)


def _mean_of_channels(image_HWC: np.ndarray) -> np.ndarray:
    mean_HW1 = np.empty((*image_HWC.shape[:2], 1), image_HWC.dtype)
    for start in range(0, len(image_HWC), _BAND_PX):  # in bands: the mean is in float32
        band = slice(start, start + _BAND_PX)
        mean_HW1[band] = np.rint(image_HWC[band].mean(axis=2, keepdims=True, dtype=np.float32))
    return mean_HW1


def upscale_alpha(alpha_HW: np.ndarray, scale: int) -> np.ndarray:
    """Bicubic (Keys, a = -0.5) of uint8 or uint16 H×W → sH×sW of that dtype; what is constant stays exactly that."""
    height, width = alpha_HW.shape
    if (alpha_HW == alpha_HW[0, 0]).all():
        return np.full((scale * height, scale * width), alpha_HW[0, 0])
    max_level = np.iinfo(alpha_HW.dtype).max
    larger_HW = np.empty((scale * height, scale * width), alpha_HW.dtype)
    for rows, top, bottom in windows(height, _BAND_PX, _CUBIC_RADIUS_PX_LR):  # in bands: it is in float32
        band_1HW = torch.from_numpy(alpha_HW[rows].astype(np.float32))[None, None]
        # `antialias` changes nothing when enlarging, but takes Keys's a = -0.5 where PyTorch's other path has -0.75.
        wide_HW = torch.nn.functional.interpolate(
            band_1HW, scale_factor=scale, mode="bicubic", align_corners=False, antialias=True
        )[0, 0].numpy()
        kept = wide_HW[scale * (top - rows.start) : scale * (bottom - rows.start)]
        larger_HW[scale * top : scale * bottom] = np.clip(np.rint(kept), 0, max_level).astype(alpha_HW.dtype)
    return larger_HW


def precision(name: str) -> torch.dtype | None:
    """`PRECISIONS[name]`; ModelError lists the names if there is none."""
    if name not in PRECISIONS:
        raise ModelError(f"precision={name!r} is not one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]
