"""Pictures for people: what the network sees, and what it makes of an image beside bicubic and the truth."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

GAP_PX = 6
MARGIN_PX = 8
FONT_PX = 14
BACKGROUND = (32, 32, 36)
TEXT = (235, 235, 235)
MARK = (255, 210, 0)


def comparison(
    lr_HWC: np.ndarray,
    upscaled_HWC: Sequence[np.ndarray],
    hr_HWC: np.ndarray,
    *,
    captions: Sequence[str],
    crop_px_hr: int | None = None,
    panel_px: int = 512,
) -> np.ndarray:
    """Set LR (by nearest neighbour), what was made of it, and HR side by side and, in a second row, a detail of each.

    All images are uint8 RGB; those upscaled and HR have one size, LR that size divided by the scale. `captions` has one
    text per image. `crop_px_hr` is the side of the detail, None a quarter of the shorter side (at most of `panel_px`),
    0 no detail; it is taken where HR has the most gradient energy. Images wider or higher than `panel_px` are reduced
    in the first row; the detail always shows whole pixels. Returns uint8 RGB. Raises ValueError if sizes or captions
    don't fit.
    """
    panels = _same_size(lr_HWC, upscaled_HWC, hr_HWC)
    if len(captions) != len(panels):
        raise ValueError(f"got {len(captions)} captions, want {len(panels)}: LR, each that was upscaled, HR")
    height, width = hr_HWC.shape[:2]
    scale = height // lr_HWC.shape[0]
    shorter = min(width, height)
    crop_px = min(shorter // 4, panel_px // 4) if crop_px_hr is None else min(crop_px_hr, shorter)
    crop_px -= crop_px % scale
    shrink = min(1.0, panel_px / max(height, width))
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    overview = [Image.fromarray(panel).resize(size, Image.Resampling.LANCZOS) for panel in panels]
    rows = [overview]
    if crop_px > 0:
        top, left = most_detailed(hr_HWC, crop_px, stride_px=scale)
        zoom = max(1, size[0] // crop_px)
        crops = [panel[top : top + crop_px, left : left + crop_px] for panel in panels]
        rows.append([Image.fromarray(crop).resize((crop_px * zoom,) * 2, Image.Resampling.NEAREST) for crop in crops])
        box = [round(edge * shrink) for edge in (left, top, left + crop_px, top + crop_px)]
        ImageDraw.Draw(overview[-1]).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=MARK, width=2)
    return _sheet(rows, captions)


def patch_grid(lr_NCHW: torch.Tensor, hr_NCHW: torch.Tensor, *, max_columns: int = 8) -> np.ndarray:
    """Show training patches as the network gets them: each LR (by nearest neighbour) over its HR.

    Both are float RGB in [0, 1] on any device, HR being `scale` times LR. Returns uint8 HWC RGB. Values are rounded to
    8 bits and not adjusted in any way, so that a wrong range, channel order or alignment shows.
    """
    lr_images, hr_images = _to_uint8(lr_NCHW), _to_uint8(hr_NCHW)
    if len(lr_images) != len(hr_images) or len(lr_images) == 0:
        raise ValueError(f"got {len(lr_images)} LR and {len(hr_images)} HR patches, want as many of both, at least one")
    scale = hr_images.shape[1] // lr_images.shape[1]
    zoom = max(1, 96 // hr_images.shape[1])  # tiny patches stay visible
    rows: list[list[Image.Image]] = []
    for start in range(0, len(lr_images), max_columns):
        for images, factor in ((lr_images, scale * zoom), (hr_images, zoom)):
            chosen = images[start : start + max_columns]
            rows.append([Image.fromarray(_enlarge(image, factor)) for image in chosen])
    size_lr, size_hr = lr_images.shape[1:3], hr_images.shape[1:3]
    title = f"LR {size_lr[1]}x{size_lr[0]} over HR {size_hr[1]}x{size_hr[0]}, {len(lr_images)} patches"
    return _sheet(rows, [title])


def most_detailed(image_HWC: np.ndarray, side_px: int, *, stride_px: int = 1) -> tuple[int, int]:
    """Top and left, multiples of `stride_px`, of the square with the most gradient energy; the first of equal ones.

    Gradient energy is the sum of squared differences of neighbouring pixels' luma, over rows and columns.
    """
    luma = image_HWC.astype(np.float64) @ np.array([0.299, 0.587, 0.114])  # BT.601
    energy = np.zeros_like(luma)
    energy[:, 1:] += np.diff(luma, axis=1) ** 2
    energy[1:, :] += np.diff(luma, axis=0) ** 2
    integral = np.pad(energy.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums = integral[side_px:, side_px:] - integral[:-side_px, side_px:]
    sums = (sums - integral[side_px:, :-side_px] + integral[:-side_px, :-side_px])[::stride_px, ::stride_px]
    row, column = np.unravel_index(int(np.argmax(sums.round(6))), sums.shape)  # rounded: equal sums stay equal
    return int(row) * stride_px, int(column) * stride_px


def _same_size(lr_HWC: np.ndarray, upscaled_HWC: Sequence[np.ndarray], hr_HWC: np.ndarray) -> tuple[np.ndarray, ...]:
    scale = hr_HWC.shape[0] // max(1, lr_HWC.shape[0])
    numbered = [(f"image {number} of those upscaled", image, 1) for number, image in enumerate(upscaled_HWC, 1)]
    for name, image, factor in (("LR", lr_HWC, scale), *numbered):
        enlarged = (image.shape[0] * factor, image.shape[1] * factor, *image.shape[2:])
        if image.dtype != np.uint8 or enlarged != hr_HWC.shape:
            raise ValueError(f"{name} is {image.dtype} {image.shape} and does not fit HR, uint8 {hr_HWC.shape}")
    return _enlarge(lr_HWC, scale), *upscaled_HWC, hr_HWC


def _enlarge(image_HWC: np.ndarray, factor: int) -> np.ndarray:
    return image_HWC.repeat(factor, axis=0).repeat(factor, axis=1)


def _to_uint8(images_NCHW: torch.Tensor) -> np.ndarray:
    images = images_NCHW.detach().to("cpu", torch.float32).clamp(0, 1).mul(255).round().to(torch.uint8)
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def _sheet(rows: Sequence[Sequence[Image.Image]], captions: Sequence[str]) -> np.ndarray:
    """Rows of pictures on one sheet, each column as wide as its widest, with captions above the first row.

    As many captions as columns: one above each, on as many lines as it needs. Otherwise they stand one below the other.
    """
    font = ImageFont.load_default(FONT_PX)
    line_px = FONT_PX + 4
    num_columns = max(len(row) for row in rows)
    widths = [max(row[i].width for row in rows if i < len(row)) for i in range(num_columns)]
    per_column = len(captions) == num_columns
    total = sum(widths) + GAP_PX * (num_columns - 1)
    wrapped = [_wrap(text, widths[i] if per_column else total, font) for i, text in enumerate(captions)]
    head_px = line_px * (max(map(len, wrapped)) if per_column else sum(map(len, wrapped)))
    height = head_px + sum(max(image.height for image in row) + GAP_PX for row in rows) - GAP_PX
    sheet = Image.new("RGB", (total + 2 * MARGIN_PX, height + 2 * MARGIN_PX), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    lefts = [MARGIN_PX + sum(widths[:i]) + GAP_PX * i for i in range(num_columns)]
    if per_column:
        for left, lines in zip(lefts, wrapped, strict=True):
            draw.text((left, MARGIN_PX), "\n".join(lines), fill=TEXT, font=font)
    else:
        draw.text((MARGIN_PX, MARGIN_PX), "\n".join(itertools.chain(*wrapped)), fill=TEXT, font=font)
    top = MARGIN_PX + head_px
    for row in rows:
        for left, image in zip(lefts, row, strict=False):
            sheet.paste(image, (left, top))
        top += max(image.height for image in row) + GAP_PX
    return np.asarray(sheet).copy()


def _wrap(text: str, width_px: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Break a text at spaces so that each line fits; a single word may stick out."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width_px:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
