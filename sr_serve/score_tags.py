"""Scores of a registered version as its tags: a set, scale and protocol each, with the set's fingerprint.

A tag's key is `score.<set>.x<scale>.<protocol>`, as in `score.Set5.x4.psnr_y_crop_scale`, with `.self_ensemble` behind
it if the scores are a self-ensemble's. Its value is a JSON object: the fields of `ScoreTag`. What the key can't hold is
there as it is.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime

from sr_serve.evaluation import SetEvaluation
from sr_train.tracking_server import as_tracking_error, connect

PREFIX = "score."
_MAX_SET_LENGTH = 100
"""Of a set's name in a key: MLflow allows 250 characters in all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreTag:
    """What a version scored on a set, and all that must be equal before two such scores may be compared."""

    set: str
    """Name of the set."""
    scale: int
    """Upscaling factor."""
    protocol: str
    """A name in `sr_train.metrics.PROTOCOLS`."""
    psnr_db: float | None
    """Mean PSNR; None if it is infinite."""
    ssim: float
    """Mean SSIM."""
    bicubic_psnr_db: float | None
    """Bicubic's, on the same images under the same protocol."""
    bicubic_ssim: float
    images: int
    """How many the set holds."""
    fingerprint: str
    """Of the set at this scale: names and contents of its images."""
    evaluated: str
    """When, in UTC, ISO 8601."""
    self_ensemble: bool = False
    """Whether eight flips and turns were averaged."""

    @property
    def key(self) -> str:
        """The tag's key. A set's name that MLflow would refuse is made to fit, and told apart by a hash."""
        name = re.sub(r"[^A-Za-z0-9_-]", "_", self.set)[:_MAX_SET_LENGTH]
        if name != self.set:
            name += f"-{hashlib.sha256(self.set.encode()).hexdigest()[:8]}"
        protocol = re.sub(r"[^a-z0-9]+", "_", self.protocol)
        return f"{PREFIX}{name}.x{self.scale}.{protocol}{'.self_ensemble' if self.self_ensemble else ''}"

    @property
    def value(self) -> str:
        """The tag's value."""
        return json.dumps(asdict(self), ensure_ascii=False)


def score_tags(evaluations: Iterable[SetEvaluation]) -> dict[tuple[str, str], list[ScoreTag]]:
    """(Registered name, version) → the tags it is to have, of all registered models that were evaluated."""
    tags: dict[tuple[str, str], list[ScoreTag]] = {}
    evaluated = datetime.now(UTC).isoformat(timespec="seconds")
    for evaluation in evaluations:
        bicubic = evaluation.bicubic
        for it in evaluation.models:
            if it.model.registered is None:
                continue
            tag = ScoreTag(
                set=evaluation.set,
                scale=evaluation.scale,
                protocol=evaluation.protocol,
                psnr_db=_finite_or_none(it.score.psnr_db),
                ssim=it.score.ssim,
                bicubic_psnr_db=_finite_or_none(bicubic.psnr_db),
                bicubic_ssim=bicubic.ssim,
                images=len(it.score.images),
                fingerprint=evaluation.fingerprint,
                evaluated=evaluated,
                self_ensemble=it.model.self_ensemble,
            )
            tags.setdefault(it.model.registered, []).append(tag)
    return tags


def write_score_tags(tracking_uri: str, *, name: str, version: str, tags: Iterable[ScoreTag]) -> None:
    """Sets the tags on a registered version; what an earlier evaluation of the same kind said is replaced.

    TrackingError if the registry can't be reached or refuses.
    """
    with as_tracking_error(tracking_uri):
        client = connect(tracking_uri)
        for tag in tags:
            client.set_model_version_tag(name, version, tag.key, tag.value)


def read_score_tags(tags: Mapping[str, str]) -> list[ScoreTag]:
    """The scores among a version's tags, sorted by set, scale and protocol. Tags of another form are not scores."""
    scores = []
    for key, text in tags.items():
        score = _parse(text) if key.startswith(PREFIX) else None
        if score is not None:
            scores.append(score)
    return sorted(scores, key=lambda it: (it.set, it.scale, it.protocol, it.self_ensemble))


def _parse(text: str) -> ScoreTag | None:
    """The inverse of `value`; None if it is anything else. Fields that a later version may add are left out."""
    try:
        plain = json.loads(text)
    except json.JSONDecodeError:
        return None
    if not isinstance(plain, dict):
        return None
    names = {field.name for field in fields(ScoreTag)}
    try:
        return ScoreTag(**{name: value for name, value in plain.items() if name in names})
    except TypeError:  # a field is missing
        return None


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
