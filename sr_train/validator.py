"""Validation inside a run: this worker's share of the images, the model's score beside bicubic's, and pictures of
both.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sr_data.manifest import Manifest
from sr_data.pairs import DecodedPair
from sr_data.resize import upscale_bicubic
from sr_models.inference import upscale_tensor
from sr_train.collective import Collective
from sr_train.metrics import ImageScore, MeasuredImage, measure_image, read_scores, score_image
from sr_train.options import ValidationConfig
from sr_train.perceptual_metric import LpipsMetric
from sr_train.pictures import comparison
from sr_train.validation import SetScore, gather_score, score_pairs


class OnPicture(Protocol):
    """Receives a picture, in a thread of the validator's."""

    def __call__(self, name: str, image_HWC: np.ndarray, *, step: int) -> None:
        """An image's name, and LR | bicubic | SR | HR side by side, uint8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _HeldPair:
    """A pair as it is kept from one validation to the next: uint8 in host memory, pinned where a GPU is in use."""

    name: str
    hr_HWC: Tensor
    lr_HWC: Tensor
    bicubic: ImageScore

    def to(self, device: torch.device) -> "_HeldPair":
        """The images on a device, on their way if that is a GPU."""
        hr_HWC, lr_HWC = (image.to(device, non_blocking=True) for image in (self.hr_HWC, self.lr_HWC))
        return replace(self, hr_HWC=hr_HWC, lr_HWC=lr_HWC)

    def on_host(self) -> DecodedPair:
        return DecodedPair(self.name, self.hr_HWC.numpy(), self.lr_HWC.numpy())


class Validator:
    """Scores a network on a set that the workers share out, image by image. Called by every worker, at the same
    steps.

    What needs no network is done in threads beside the training: decoding and scoring bicubic before the first
    validation, drawing pictures after each.
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
        lpips: LpipsMetric | None = None,
        reference: tuple[str, nn.Module] | None = None,
        title: str = "SR",
        leave: Callable[[], str | None] = lambda: None,
    ):
        """`load` decodes this worker's part of the manifest; it begins in a thread now, while training starts.
        `leave` is asked after each image: why a validation should be given up, None to go on.
        `reference` is another network, with its title, that the pictures show beside the one in training (`title`).
        """
        self._manifest, self._config, self._collective = manifest, config, collective
        self._num_pictures = num_pictures if collective.rank == 0 else 0
        self._load, self._on_picture = load, on_picture
        self._lpips, self._reference, self._title, self._leave = lpips, reference, title, leave
        self._reference_images: list[np.ndarray] = []
        self._closing = threading.Event()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="validation-images")
        self._painter = ThreadPoolExecutor(1, thread_name_prefix="validation-pictures")
        self._pairs: Future[list[_HeldPair]] = self._loader.submit(self._hold)
        self._pictures: Future[None] | None = None
        self._bicubic: SetScore | None = None

    def __call__(self, network: nn.Module, step: int) -> Mapping[str, float] | None:
        """psnr_db and ssim (and lpips, if asked for) of the network (in eval mode) and of bicubic, the same on every
        worker; pictures of the first images follow while training goes on. None, on every worker, if one of them was
        told to leave meanwhile.

        Whatever `load` or the pictures of the validation before raised is raised here.
        """
        pairs = self._pairs.result()
        if self._bicubic is None:
            self._bicubic = self._gather([pair.bicubic for pair in pairs])
        device = next(network.parameters()).device
        shown: list[Tensor] = []
        measured: list[MeasuredImage] = []
        distances: list[Tensor] = []
        for pair in pairs:
            on_device = pair.to(device)
            sr_HWC = upscale_tensor(network, on_device.lr_HWC, tile_px_lr=self._config.tile_px_lr)
            measured.append(self._measure(sr_HWC, on_device))
            if self._lpips is not None:
                distances.append(self._lpips.to(device).distance(sr_HWC, on_device.hr_HWC))
            if len(shown) < self._num_pictures:
                shown.append(sr_HWC)
            if self._leave() is not None:
                break
        if any(self._collective.gather(self._leave() is not None)):
            return None
        score = self._gather(read_scores(measured))
        if shown:
            if self._pictures is not None:  # so that they can't pile up
                self._pictures.result()
            self._upscale_by_reference(pairs, device)
            images = [sr_HWC.cpu().numpy() for sr_HWC in shown]
            self._pictures = self._painter.submit(self._paint, pairs, images, step)
        return {
            "psnr_db": score.psnr_db,
            "ssim": score.ssim,
            "bicubic_psnr_db": self._bicubic.psnr_db,
            "bicubic_ssim": self._bicubic.ssim,
            **self._mean_lpips(pairs, distances),
        }

    def close(self) -> None:
        """Waits for the pictures of the last validation, not for images that are still being decoded."""
        self._closing.set()
        self._loader.shutdown(wait=False, cancel_futures=True)
        self._painter.shutdown(wait=True)
        if self._pictures is not None and (error := self._pictures.exception()) is not None:
            logging.getLogger(__name__).warning("the last validation's pictures could not be drawn: %s", error)

    def _hold(self) -> list[_HeldPair]:
        """This worker's images and bicubic's scores of them, in host memory."""
        bicubic = partial(upscale_bicubic, scale=self._manifest.scale)
        held = []
        for pair in self._load(self._manifest):
            if self._closing.is_set():  # nobody will ask for them
                break
            (score,) = score_pairs(bicubic, [pair], scale=self._manifest.scale, protocol=self._config.protocol)
            held.append(_HeldPair(name=pair.name, hr_HWC=_kept(pair.hr_HWC), lr_HWC=_kept(pair.lr_HWC), bicubic=score))
        return held

    def _measure(self, sr_HWC: Tensor, pair: _HeldPair) -> MeasuredImage:
        scale, protocol = self._manifest.scale, self._config.protocol
        return measure_image(sr_HWC, pair.hr_HWC, scale=scale, protocol=protocol, name=pair.name)

    def _mean_lpips(self, pairs: Sequence[_HeldPair], distances: Sequence[Tensor]) -> dict[str, float]:
        """Over all workers' images, the same to the last bit on each."""
        if self._lpips is None:
            return {}
        values = torch.stack(list(distances)).tolist() if distances else []
        local = dict(zip((pair.name for pair in pairs), values, strict=True))
        everyones = [value for share in self._collective.gather(local) for value in share.values()]
        return {"lpips": math.fsum(everyones) / len(everyones)}

    def _upscale_by_reference(self, pairs: Sequence[_HeldPair], device: torch.device) -> None:
        """Once, the images that pictures show."""
        if self._reference is None or self._reference_images:
            return
        _, network = self._reference
        network.to(device).eval()
        for pair in pairs[: self._num_pictures]:
            sr_HWC = upscale_tensor(network, pair.lr_HWC.to(device), tile_px_lr=self._config.tile_px_lr)
            self._reference_images.append(sr_HWC.cpu().numpy())
        network.to("cpu")

    def _gather(self, local: list[ImageScore]) -> SetScore:
        return gather_score(
            local,
            set_name=self._manifest.split,
            scale=self._manifest.scale,
            protocol=self._config.protocol,
            gather=self._collective.gather,
        )

    def _paint(self, pairs: Sequence[_HeldPair], images: Sequence[np.ndarray], step: int) -> None:
        scale, protocol = self._manifest.scale, self._config.protocol
        for index, (pair, sr_HWC) in enumerate(zip(pairs, images, strict=False)):
            on_host = pair.on_host()
            upscaled = {"bicubic": upscale_bicubic(on_host.lr_HWC, scale)}
            if self._reference is not None:
                upscaled[self._reference[0]] = self._reference_images[index]
            upscaled[self._title] = sr_HWC
            self._on_picture(pair.name, side_by_side(on_host, upscaled, scale=scale, protocol=protocol), step=step)


def side_by_side(pair: DecodedPair, upscaled: Mapping[str, np.ndarray], *, scale: int, protocol: str) -> np.ndarray:
    """LR | what was made of it, with title and score | HR, and below the most detailed part enlarged; uint8 HWC."""
    scores = {
        title: score_image(image_HWC, pair.hr_HWC, scale=scale, protocol=protocol).psnr_db
        for title, image_HWC in upscaled.items()
    }
    captions = ["LR", *(f"{title} {psnr_db:.2f} dB" for title, psnr_db in scores.items()), "HR"]
    return comparison(pair.lr_HWC, list(upscaled.values()), pair.hr_HWC, captions=captions)


def _kept(image_HWC: np.ndarray) -> Tensor:
    """A copy: what comes from Ray Data are read-only views that keep its shared memory from being freed. Pinned if this
    process uses a GPU: then it is sent while the GPU works on.
    """
    copy_HWC = torch.from_numpy(image_HWC.copy())
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return copy_HWC.pin_memory() if in_use else copy_HWC
