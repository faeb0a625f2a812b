"""Scores for people and programs: a table with bicubic beside the model, and a JSON file."""

import json
from collections.abc import Sequence
from pathlib import Path

from sr_data.errors import StorageError
from sr_data.storage import split_uri
from sr_train.validation import SetScore


def score_table(model: str, scores: Sequence[SetScore], bicubic: Sequence[SetScore]) -> str:
    """A line per set: the model's PSNR and SSIM, bicubic's, and the difference. The heading names scale and protocol.

    `bicubic` holds the scores of the same sets, in the same order, under the same protocol.
    """
    header = ("set", "images", "PSNR dB", "SSIM", "bicubic dB", "SSIM", "gain dB")
    rows = [
        (
            score.set,
            str(len(score.images)),
            f"{score.psnr_db:.3f}",
            f"{score.ssim:.4f}",
            f"{baseline.psnr_db:.3f}",
            f"{baseline.ssim:.4f}",
            f"{score.psnr_db - baseline.psnr_db:+.3f}",
        )
        for score, baseline in zip(scores, bicubic, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    return "\n".join([f"{model}  x{scores[0].scale}  {scores[0].protocol} (SSIM of Y)", *lines])


def write_scores(uri: str, scores: Sequence[SetScore]) -> None:
    """Writes `[{"set","scale","protocol","psnr_db","ssim","images":[{"name","psnr_db","ssim"}]}]` to a file or URI.

    An infinite PSNR, which is that of identical images, is null. StorageError if it can't be written.
    """
    text = json.dumps([score.to_json_dict() for score in scores], indent=2, allow_nan=False, ensure_ascii=False)
    store, key = split_uri(uri)
    store.write(key, f"{text}\n".encode())


def check_scores_writable(uri: str) -> None:
    """StorageError if `write_scores` can't write there, found before scoring: hours of it would have nowhere to go."""
    store, key = split_uri(uri)
    if "://" not in store.uri and (Path(store.uri) / key).is_dir():
        raise StorageError(f"{uri}: is a folder, not a file (--json)")
    try:
        store.check_writable()
    except StorageError as error:
        raise StorageError(f"{error} (--json)") from error
