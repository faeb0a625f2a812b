"""Scores for people and programs: a table with bicubic beside the models, and a JSON file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sr_data.errors import StorageError
from sr_data.storage import split_uri
from sr_train.validation import SetScore


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRow:
    """What made the images, and what they scored."""

    label: str
    """A model, or where the images lie."""
    score: SetScore
    seconds_per_image: float | None = None
    """Time that making one image took; None if unknown."""


def score_table(rows: Sequence[ScoreRow], bicubic: SetScore) -> str:
    """A line for each row: PSNR, SSIM and the gain over `bicubic`; the heading names set, scale and protocol.

    All scores are of one set, at one scale, under one protocol. Time has a column if a row has one.
    """
    timed = any(row.seconds_per_image is not None for row in rows)
    header = ("model", "PSNR dB", "SSIM", "gain dB", *(["s/image"] if timed else []))
    lines = [
        (
            row.label,
            f"{row.score.psnr_db:.3f}",
            f"{row.score.ssim:.4f}",
            f"{gain_db(row.score.psnr_db, bicubic.psnr_db):+.3f}",
            *([format_seconds(row.seconds_per_image)] if timed else []),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    num_images = len(bicubic.images)
    images = f"{num_images} image{'s' if num_images > 1 else ''}"
    return "\n".join(
        [
            f"{bicubic.set}  x{bicubic.scale}  {bicubic.protocol} (SSIM of Y)  {images}",
            *(
                "  ".join(
                    cell.rjust(width) if column else cell.ljust(width)
                    for column, (cell, width) in enumerate(zip(line, widths, strict=True))
                )
                for line in (header, *lines)
            ),
        ]
    )


def gain_db(psnr_db: float, bicubic_psnr_db: float) -> float:
    """The difference in dB; 0 where both are infinite: identical to HR, as is bicubic's."""
    return 0.0 if psnr_db == bicubic_psnr_db else psnr_db - bicubic_psnr_db


def format_seconds(seconds: float | None) -> str:
    """Three digits; a dash if it is unknown."""
    return "–" if seconds is None else f"{seconds:#.3g}" if seconds < 100 else f"{seconds:.0f}"


def write_scores(uri: str, scores: Sequence[Mapping[str, Any]]) -> None:
    """Writes a JSON list of objects, each made from `SetScore.to_json_dict`, to a file or URI.

    StorageError if it can't be written.
    """
    write_text(uri, json.dumps(list(scores), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_text(uri: str, text: str) -> None:
    """Writes a UTF-8 file to a path or URI; StorageError if it can't be written."""
    store, key = split_uri(uri)
    store.write(key, text.encode())


def check_scores_writable(uri: str, *, flag: str = "--json") -> None:
    """StorageError if `write_scores` can't write there, found before scoring: hours of it would have nowhere to go."""
    store, key = split_uri(uri)
    if "://" not in store.uri and (Path(store.uri) / key).is_dir():
        raise StorageError(f"{uri}: is a folder, not a file ({flag})")
    try:
        store.check_writable()
    except StorageError as error:
        raise StorageError(f"{error} ({flag})") from error
