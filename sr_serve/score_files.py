"""evaluate_model.py's JSON files as two models' scores that may be compared."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sr_data.storage import split_uri
from sr_serve.promotion import PairedSet, PromotionError
from sr_serve.succession import Version
from sr_train.metrics import ImageScore, MetricError
from sr_train.upscaler import BICUBIC, REGISTRY_PREFIX
from sr_train.validation import SetScore, mean_score


@dataclass(frozen=True, kw_only=True, slots=True)
class FiledScore:
    """A model's scores on one set, as a file holds them."""

    model: str
    """MODEL, as it was given when it was scored."""
    version: str | None
    """What its alias meant then; None where the file doesn't say, or it is no registered model."""
    self_ensemble: bool
    """Whether eight flips and turns were averaged."""
    fingerprint: str
    """Of the set at this scale."""
    score: SetScore

    def is_of(self, version: Version | None) -> bool:
        """Whether these are scores of that version, by name and number: which registry it was in, the file doesn't say.
        None asks for bicubic.
        """
        if version is None:
            return self.model == BICUBIC
        by_alias = self.model.startswith(f"{REGISTRY_PREFIX}{version.name}@") and self.version == version.version
        return by_alias or self.model == version.uri


def read_filed_scores(uri: str) -> list[FiledScore]:
    """Reads a file that evaluate_model.py wrote with --json.

    PromotionError if it is another file, or lacks what a comparison needs; StorageError if it can't be read.
    """
    store, key = split_uri(uri)
    try:
        entries = json.loads(store.read_text(key))
    except ValueError as error:
        raise PromotionError(f"{uri}: is no JSON file ({error}) (--scores)") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise PromotionError(f"{uri}: holds no list of scores, as evaluate_model.py --json writes them (--scores)")
    return [_filed(entry, f"{uri}: entry {number}") for number, entry in enumerate(entries, start=1)]


def paired_sets(files: tuple[str, str], challenger: Version, champion: Version | None) -> list[PairedSet]:
    """The scores of both in the challenger's file and the champion's; no champion means bicubic.

    PromotionError if a file lacks that model, or sets, images, fingerprints, scales, protocols or self-ensemble differ.
    """
    ours = _of(read_filed_scores(files[0]), files[0], challenger)
    others = _of(read_filed_scores(files[1]), files[1], champion)
    if ours.keys() != others.keys():
        apart = ", ".join(sorted(ours.keys() ^ others.keys()))
        raise PromotionError(f"{files[0]} and {files[1]} are not of the same sets: only one has {apart} (--scores)")
    return [_pair(ours[name], others[name], files) for name in ours]


def _pair(ours: FiledScore, others: FiledScore, files: tuple[str, str]) -> PairedSet:
    facts: Mapping[str, tuple[Any, Any]] = {
        "scale": (ours.score.scale, others.score.scale),
        "protocol": (ours.score.protocol, others.score.protocol),
        "fingerprint": (ours.fingerprint, others.fingerprint),
        "images": ([it.name for it in ours.score.images], [it.name for it in others.score.images]),
        # Bicubic is the same in whatever way the models beside it were applied.
        "self_ensemble": (ours.self_ensemble, ours.self_ensemble if others.model == BICUBIC else others.self_ensemble),
    }
    for what, (mine, its) in facts.items():
        if mine != its:
            shown = (sorted(set(mine) ^ set(its)), "only in one") if what == "images" else (mine, its)
            raise PromotionError(
                f"{ours.score.set}: {what} differ between {files[0]} and {files[1]}: {shown[0]}, {shown[1]} (--scores)"
            )
    return PairedSet(fingerprint=ours.fingerprint, challenger=ours.score, champion=others.score)


def _of(scores: Sequence[FiledScore], uri: str, version: Version | None) -> dict[str, FiledScore]:
    """By set."""
    wanted = BICUBIC if version is None else version.uri
    found: dict[str, FiledScore] = {}
    for score in (it for it in scores if it.is_of(version)):
        if score.score.set in found:
            raise PromotionError(
                f"{uri}: holds scores of {wanted} on {score.score.set} twice, at several scales, protocols, or with "
                f"and without self-ensemble; one of each can be compared (--scores)"
            )
        found[score.score.set] = score
    if not found:
        others = sorted({it.model + (f" (version {it.version})" if it.version else "") for it in scores})
        raise PromotionError(f"{uri}: holds no scores of {wanted}, but of {', '.join(others)} (--scores)")
    return found


def _filed(entry: Mapping[str, Any], at: str) -> FiledScore:
    try:
        images = [
            ImageScore(
                name=str(image["name"]),
                psnr_db=math.inf if image["psnr_db"] is None else float(image["psnr_db"]),
                ssim=float(image["ssim"]),
            )
            for image in entry["images"]
        ]
        if any(math.isnan(value) for image in images for value in (image.psnr_db, image.ssim)):
            raise PromotionError(f"{at}: holds a score that is no number (--scores)")
        version = entry.get("version")
        return FiledScore(
            model=str(entry["model"]),
            version=None if version is None else str(version),
            self_ensemble=bool(entry.get("self_ensemble", False)),
            fingerprint=str(entry["fingerprint"]),
            # The file's own means are not trusted: those of its images are taken.
            score=mean_score(str(entry["set"]), int(entry["scale"]), str(entry["protocol"]), images),
        )
    except MetricError as error:
        raise PromotionError(f"{at}: {error} (--scores)") from error
    except KeyError as error:
        raise PromotionError(f"{at}: has no {error}; score again with evaluate_model.py --json (--scores)") from error
    except (TypeError, AttributeError) as error:
        raise PromotionError(f"{at}: is not as evaluate_model.py --json writes it ({error}) (--scores)") from error
