"""Validation inside a run: this worker's share of the images, the model's score beside bicubic's, and pictures of
both.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
from torch import nn

from sr_data.manifest import Manifest
from sr_data.pairs import DecodedPair
from sr_data.resize import upscale_bicubic
from sr_models.inference import upscale_image
from sr_train.collective import Collective
from sr_train.config import ValidationConfig
from sr_train.pictures import comparison
from sr_train.validation import SetScore, Upscale, validate_distributed


class OnPicture(Protocol):
    """Receives a picture."""

    def __call__(self, name: str, image_HWC: np.ndarray, *, step: int) -> None:
        """An image's name, and LR | bicubic | SR | HR side by side, uint8."""


class Validator:
    """Scores a network on a set that the workers share out, image by image. Called by every worker, at the same
    steps.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: ValidationConfig,
        *,
        load: Callable[[Manifest], Iterator[DecodedPair]],
        collective: Collective,
        num_pictures: int,
        on_picture: OnPicture,
    ):
        """`load` decodes this worker's part of the manifest; it begins in a thread now, while training starts."""
        self._manifest, self._config, self._collective = manifest, config, collective
        self._num_pictures, self._on_picture = num_pictures, on_picture
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="validation-images")
        # Copies: what comes from Ray Data are read-only views that keep its shared memory from being freed.
        self._pairs: Future[list[DecodedPair]] = self._thread.submit(
            lambda: [DecodedPair(pair.name, pair.hr_HWC.copy(), pair.lr_HWC.copy()) for pair in load(manifest)]
        )
        self._bicubic: SetScore | None = None

    def __call__(self, network: nn.Module, step: int) -> Mapping[str, float]:
        """psnr_db and ssim of the network (in eval mode) and of bicubic, the same on every worker; pictures of the
        first images.
        """
        scale, pairs = self._manifest.scale, self._pairs.result()
        if self._bicubic is None:
            self._bicubic = self._score(lambda lr_HWC: upscale_bicubic(lr_HWC, scale))
        upscaled: list[np.ndarray] = []

        def upscale(lr_HWC: np.ndarray) -> np.ndarray:
            sr_HWC = upscale_image(network, lr_HWC, tile_px_lr=self._config.tile_px_lr)
            if len(upscaled) < self._num_pictures:
                upscaled.append(sr_HWC)
            return sr_HWC

        score = self._score(upscale)
        if self._collective.rank == 0:
            psnr_db = {image.name: image.psnr_db for image in score.images}
            bicubic_db = {image.name: image.psnr_db for image in self._bicubic.images}
            for pair, sr_HWC in zip(pairs, upscaled, strict=False):
                picture = side_by_side(pair, sr_HWC, bicubic_db[pair.name], psnr_db[pair.name])
                self._on_picture(pair.name, picture, step=step)
        return {
            "psnr_db": score.psnr_db,
            "ssim": score.ssim,
            "bicubic_psnr_db": self._bicubic.psnr_db,
            "bicubic_ssim": self._bicubic.ssim,
        }

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _score(self, upscale: Upscale) -> SetScore:
        return validate_distributed(
            upscale,
            self._pairs.result(),
            set_name=self._manifest.split,
            scale=self._manifest.scale,
            protocol=self._config.protocol,
            gather=self._collective.gather,
        )


def side_by_side(pair: DecodedPair, sr_HWC: np.ndarray, bicubic_psnr_db: float, sr_psnr_db: float) -> np.ndarray:
    """LR | bicubic | SR | HR with their scores, and below the most detailed part enlarged; uint8 HWC."""
    scale = pair.hr_HWC.shape[0] // pair.lr_HWC.shape[0]
    return comparison(
        pair.lr_HWC,
        upscale_bicubic(pair.lr_HWC, scale),
        sr_HWC,
        pair.hr_HWC,
        captions=["LR", f"bicubic {bicubic_psnr_db:.2f} dB", f"SR {sr_psnr_db:.2f} dB", "HR"],
    )
