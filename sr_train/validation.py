"""Scores of a model on a set of images: exact, whatever the number of workers that shared them."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from sr_models.inference import ImageHWC
from sr_train.metrics import ImageScore, MetricError, measure_image, read_scores

ImageT_co = TypeVar("ImageT_co", bound=ImageHWC, covariant=True)


class ImagePair(Protocol[ImageT_co]):
    """Arrays, as in `sr_data.pairs.DecodedPair`, or tensors: uint8 RGB; HR has `scale` times the sides of LR."""

    @property
    def name(self) -> str: ...
    @property
    def hr_HWC(self) -> ImageT_co: ...
    @property
    def lr_HWC(self) -> ImageT_co: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SetScore:
    """Scores of one set under one protocol."""

    set: str
    """Name of the set."""
    scale: int
    """Upscaling factor."""
    protocol: str
    """A name in `sr_train.metrics.PROTOCOLS`."""
    psnr_db: float
    """Mean of the images' PSNR in dB (not the PSNR of the mean error); infinite if any image is identical."""
    ssim: float
    """Mean of the images' SSIM."""
    images: tuple[ImageScore, ...]
    """Sorted by name."""

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for JSON. An infinite PSNR becomes null: JSON has no infinity."""
        return {
            "set": self.set,
            "scale": self.scale,
            "protocol": self.protocol,
            "psnr_db": _finite_or_none(self.psnr_db),
            "ssim": self.ssim,
            "images": [
                {"name": image.name, "psnr_db": _finite_or_none(image.psnr_db), "ssim": image.ssim}
                for image in self.images
            ],
        }


def score_pairs(
    upscale: Callable[[ImageT_co], ImageHWC], pairs: Iterable[ImagePair[ImageT_co]], *, scale: int, protocol: str
) -> list[ImageScore]:
    """Upscales each pair's LR image and compares it with its HR image, in the order given.

    A GPU works through all of them before it is waited for.
    """
    return read_scores(
        [
            measure_image(upscale(pair.lr_HWC), pair.hr_HWC, scale=scale, protocol=protocol, name=pair.name)
            for pair in pairs
        ]
    )


def mean_score(set: str, scale: int, protocol: str, images: Iterable[ImageScore]) -> SetScore:  # noqa: A002
    """The set's score; the same to the last bit in whatever order the images come.

    MetricError if there is no image, or one comes twice.
    """
    by_name = sorted(images, key=lambda image: image.name)
    if not by_name:
        raise MetricError(f"the set {set!r} has no images, so it has no score")
    twice = [first.name for first, second in itertools.pairwise(by_name) if first.name == second.name]
    if twice:
        raise MetricError(f"the set {set!r} has more than one score for {', '.join(twice)}")
    return SetScore(
        set=set,
        scale=scale,
        protocol=protocol,
        psnr_db=math.fsum(image.psnr_db for image in by_name) / len(by_name),
        ssim=math.fsum(image.ssim for image in by_name) / len(by_name),
        images=tuple(by_name),
    )


def gather_score(
    local_scores: list[ImageScore],
    *,
    set_name: str,
    scale: int,
    protocol: str,
    gather: Callable[[list[ImageScore]], Sequence[Sequence[ImageScore]]],
) -> SetScore:
    """The score of a set whose images are shared out over the workers, on every worker.

    `gather` returns every worker's list to every worker (`torch.distributed.all_gather_object`); for a worker alone it
    is `lambda scores: [scores]`. Every worker must call this, also one without images. Each image belongs to one
    worker, so none is padded or counted twice: the result is `mean_score` of all images.
    """
    everyones = gather(local_scores)
    return mean_score(set_name, scale, protocol, (score for scores in everyones for score in scores))


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
