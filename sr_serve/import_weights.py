"""Weights of another project: converted, tried on a picture that can't go wrong, saved, scored beside bicubic."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from sr_data.resize import downscale_bicubic, upscale_bicubic
from sr_models.architectures import architecture_name, build_model, config_to_dict, num_parameters
from sr_models.edsr import EDSRConfig
from sr_models.errors import ModelError
from sr_models.foreign_layout import Given, Imported
from sr_models.foreign_weights import convert, unwrap
from sr_models.inference import ImageHWC, upscale_image
from sr_models.weights import save_model
from sr_serve.evaluation import OpenSet, SetEvaluation, evaluate, open_models
from sr_serve.weight_file import WeightFile
from sr_train.champion import CHAMPION
from sr_train.metrics import score_image
from sr_train.model_registry import CHALLENGER

SMOOTH_PROTOCOL = "psnr@rgb,crop=scale+6"
REFUSED_BELOW_DB = 24.0
WARNED_BELOW_DB = 34.0
"""Of the smooth picture: bicubic reaches 52 to 55 dB, six small trained EDSRs 39 to 44, untrained ones 12; trained ones
with the wrong pixel range 13 to 23, with 10 times the right residual_scaling 5 to 9, with a tenth of it 22 to 37."""
FAR_BELOW_BICUBIC_DB = 3.0
_SMOOTH_PX_LR = 48


class ImportRefusedError(ValueError):
    """The imported network, or what was asked for it, is not as it must be; the message says what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SmoothCheck:
    """How well a network enlarges a picture in which there is nothing to get wrong."""

    psnr_db: float
    bicubic_psnr_db: float

    @property
    def is_poor(self) -> bool:
        """Whether what comes out is another picture."""
        return self.psnr_db < REFUSED_BELOW_DB

    def sentence(self) -> str:
        """For people."""
        return f"a smooth picture comes out at {self.psnr_db:.1f} dB (bicubic: {self.bicubic_psnr_db:.1f} dB)"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImportedModel:
    """An imported network, and where it comes from."""

    file: WeightFile
    imported: Imported
    notes: tuple[str, ...]
    """What was taken, converted and assumed, in the order in which it happened."""
    warnings: tuple[str, ...] = ()
    """What looks wrong, and was let pass."""
    check: SmoothCheck | None = None
    """Of `try_out`; None before it."""

    @property
    def not_promotable(self) -> str | None:
        """Why it must not be promoted; None if it may be."""
        return self.check.sentence() if self.check is not None and self.check.is_poor else None

    def describe(self) -> str:
        """For people: file, layout, network, and each note."""
        config = self.imported.config
        values = ", ".join(f"{name} {value}" for name, value in config_to_dict(config).items())
        rows = [
            ("file", f"{self.file.uri}  sha256 {self.file.sha256}"),
            ("layout", self.imported.layout),
            ("network", f"{architecture_name(config)}: {values}; {num_parameters(config):,} parameters"),
            *(("note", note) for note in self.notes),
        ]
        return "\n".join(f"{name:<10}  {text}" for name, text in rows)

    def doubts(self) -> str:
        """For people: what `try_out` gave, and a line for each warning."""
        rows = [("check", self.check.sentence())] if self.check is not None else []
        return "\n".join(f"{name:<10}  {text}" for name, text in (*rows, *(("WARNING", it) for it in self.warnings)))


def check_request(*, register_as: str | None, licence: str | None, save: str | None, alias: str | None) -> None:
    """What would be refused only at the end: ImportRefusedError names the flag."""
    if register_as is not None and re.fullmatch(r"\w([\w -]*[\w-])?", register_as) is None:
        raise ImportRefusedError(
            f"--register-as {register_as!r}: may hold letters, digits, '-', '_' and inner spaces only"
        )
    if alias is not None and (re.fullmatch(r"[\w-]+", alias) is None or re.fullmatch(r"v\d+|latest", alias.lower())):
        raise ImportRefusedError(
            f"--alias {alias!r}: may hold letters, digits, '-' and '_'; not latest, nor v and a number (MLflow)"
        )
    if alias == CHAMPION:
        raise ImportRefusedError(
            f"--alias {CHAMPION}: a version becomes {CHAMPION} by comparison, and with a way back, by "
            f"pipelines/promote_model.py; import it as {CHALLENGER}"
        )
    if licence is not None and not 1 <= len(licence.strip()) <= 2000:
        raise ImportRefusedError(f"--licence: must have 1 to 2000 characters; this has {len(licence.strip())}")
    if save is not None:
        folder = Path(save)
        if "://" in save or (folder.exists() and not folder.is_dir()) or (folder.is_dir() and any(folder.iterdir())):
            raise ImportRefusedError(f"--save {save}: must be a folder on this machine, new or empty")


@contextmanager
def work_folder(save: str | None) -> Iterator[Path]:
    """A new folder, which becomes `save` at the end, whole, unless something was raised; if that is None, it goes away.

    It is made beside `save`; ImportRefusedError if that, or the last step, can't be done.
    """
    target = None if save is None else Path(save).absolute()
    try:
        if target is None:
            scratch = TemporaryDirectory(prefix="sr-import-")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent)
    except OSError as error:
        raise ImportRefusedError(f"--save {save}: can't be written here ({error.strerror})") from error
    with scratch as parent:
        folder = Path(parent) / "model"
        yield folder
        if target is not None:
            try:
                folder.rename(target)
            except OSError as error:
                raise ImportRefusedError(f"--save {save}: is not free any more ({error.strerror})") from error


def import_file(
    file: WeightFile, *, architecture: str, scale: int, given: Given, entry: str | None = None
) -> ImportedModel:
    """Converts what the file holds; ModelError, its message starting with the file's URI, if that can't be done."""
    try:
        tensors, notes = unwrap(file.loaded, entry=entry)
        imported = convert(tensors, architecture_name=architecture, scale=scale, given=given)
    except ModelError as error:
        raise ModelError(f"{file.uri}: {error}") from error
    warnings = []
    if file.named_hash is not None and not file.sha256.startswith(file.named_hash):
        warnings.append(f"the file's name says that its sha256 begins with {file.named_hash}: changed, or renamed")
    return ImportedModel(file=file, imported=imported, notes=(*notes, *imported.notes), warnings=tuple(warnings))


def try_out(model: ImportedModel, *, allow_poor: bool) -> ImportedModel:
    """Runs the network on the CPU on a smooth picture, and says how well it came out.

    ImportRefusedError if the output is not finite or has another shape, or, unless `allow_poor`, if it is another
    picture than the one that went in.
    """
    config = model.imported.config
    network = build_model(config, seed=0)
    network.load_state_dict(dict(model.imported.state))
    network.eval()
    hr_HWC = smooth_picture(_SMOOTH_PX_LR * config.scale)
    lr_HWC = downscale_bicubic(hr_HWC, config.scale)
    with torch.inference_mode():
        sr_NCHW = network(torch.from_numpy(lr_HWC).permute(2, 0, 1).unsqueeze(0) / 255.0)
    if sr_NCHW.shape != (1, 3, *hr_HWC.shape[:2]) or not torch.isfinite(sr_NCHW).all():
        raise ImportRefusedError(
            f"{model.file.uri}: the network makes {tuple(sr_NCHW.shape)} of a picture of {lr_HWC.shape}, or values "
            "that are not finite; these weights can't be used"
        )
    check = SmoothCheck(
        psnr_db=_smooth_score(upscale_image(network, lr_HWC), hr_HWC, config.scale),
        bicubic_psnr_db=_smooth_score(upscale_bicubic(lr_HWC, config.scale), hr_HWC, config.scale),
    )
    of_edsr = "a wrong --residual-scaling or --rgb-range, " if isinstance(config, EDSRConfig) else ""
    causes = f"causes can be {of_edsr}weights that are not trained, or trained for something else"
    if check.is_poor and not allow_poor:
        raise ImportRefusedError(
            f"{model.file.uri}: {check.sentence()}: that is not the picture that went in; {causes}. "
            "--allow-poor imports it all the same, without an alias"
        )
    doubt = f"{check.sentence()}, where about 40 dB is usual, and a little less for a GAN; {causes}"
    doubts = () if check.psnr_db >= WARNED_BELOW_DB else (doubt,)
    return replace(model, check=check, warnings=(*model.warnings, *doubts))


def smooth_picture(side_px: int) -> NDArray[np.uint8]:
    """uint8 RGB: about one wave in each colour across the whole, so that bicubic shrinking loses next to nothing."""
    y, x = np.mgrid[0:side_px, 0:side_px] * (2.0 * np.pi / side_px)
    waves = (np.sin(x + 0.5 * y), np.cos(y - 0.3 * x), np.sin(0.7 * x + y + 1.0))
    levels_HWC: NDArray[np.uint8] = np.rint(127.5 + 85.0 * np.stack(waves, axis=-1)).astype(np.uint8)
    return levels_HWC


def _smooth_score(sr_HWC: ImageHWC, hr_HWC: NDArray[np.uint8], scale: int) -> float:
    return score_image(sr_HWC, hr_HWC, scale=scale, protocol=SMOOTH_PROTOCOL, name="smooth").psnr_db


def origin_tags(model: ImportedModel, *, licence: str | None) -> dict[str, str]:
    """Where the weights come from, for a version's tags and a folder's notes."""
    tags = {
        "source_file": model.file.name,
        "source_sha256": model.file.sha256,
        "source_layout": model.imported.layout,
        "source_notes": "; ".join((*model.notes, *model.warnings)),
    }
    return tags if licence is None else {**tags, "licence": licence.strip()}


def save_import(model: ImportedModel, folder: Path, *, licence: str | None) -> None:
    """Writes the folder that any MODEL argument takes, with its origin in the notes."""
    save_model(folder, model.imported.config, model.imported.state, notes=origin_tags(model, licence=licence))


def score_import(
    folder: Path, sets: Sequence[OpenSet], *, protocol: str, device: str, label: str
) -> list[SetEvaluation]:
    """Scores of a folder of `save_import` with bicubic beside it; `label` names it in tables."""
    models = open_models([str(folder)], device=device)
    named = {
        scale: [bicubic, replace(model, upscaler=replace(model.upscaler, name=label))]
        for scale, (bicubic, model) in models.items()
    }
    return list(evaluate(named, sets, protocol=protocol))


def score_warnings(evaluations: Sequence[SetEvaluation]) -> tuple[str, ...]:
    """A sentence for each set on which the model is far below bicubic."""
    return tuple(
        f"{gain_db:+.2f} dB to bicubic on {it.set}: a GAN's, or for another reduction than bicubic, or wrong options"
        for it in evaluations
        if (gain_db := it.models[1].score.psnr_db - it.bicubic.psnr_db) < -FAR_BELOW_BICUBIC_DB
    )
