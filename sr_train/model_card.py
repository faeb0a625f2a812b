"""A model card as Markdown: what a model is and is not for, its origin, scores, licences and limits, how to load it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sr_models.architectures import architecture_name, config_to_dict, num_parameters
from sr_models.network import ModelConfig

CARD_FILE = "MODEL_CARD.md"
MAX_DESCRIPTION_LENGTH = 5_000
"""Characters of a version's description that MLflow's databases hold (`SqlModelVersion.description`)."""

LICENCE_UNKNOWN = "Not known: whoever registers or passes on this model must say what its training images allow."

_HEADING = "\n\n## "
_LEFT_OUT_FIRST = ("Also recorded", "How it was trained", "What it was trained on", "How to load it")

Row = tuple[str, str]
"""A fact's name and the fact: a line of a table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CardScore:
    """What one way of enlarging the set's images scores; None is not known."""

    name: str
    psnr_db: float | None
    ssim: float | None
    lpips: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CardScores:
    """Scores on one set, and what they may be compared with."""

    dataset: str
    """Its place, without secrets, and split."""
    fingerprint: str
    num_images: int
    protocol: str
    """Of PSNR: a name in `sr_train.metrics.PROTOCOLS`. SSIM is always of Y."""
    lpips_protocol: str | None = None
    """None where LPIPS was not measured."""
    rows: tuple[CardScore, ...] = ()
    """The model and, beside it, bicubic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFacts:
    """All that a card says. What is empty or None is not known, and the card says so."""

    name: str
    """Of the registered model."""
    config: ModelConfig
    """Of the network."""
    trained_on: tuple[Row, ...] = ()
    """Dataset, fingerprint, images, patches seen, code, versions, hardware."""
    method: tuple[Row, ...] = ()
    """Loss, schedule, batch, patches."""
    recorded: tuple[Row, ...] = ()
    """What else is known of the version."""
    scores: tuple[CardScores, ...] = ()
    invents_detail: bool = False
    """Whether it was trained to look right rather than to be right: a GAN, a perceptual loss."""
    samples: tuple[str, ...] = ("lr", "bicubic", "sr")
    """Names of the pictures in samples/."""
    licences: tuple[str, ...] = ()
    """What is known, a paragraph each; Markdown. `LICENCE_UNKNOWN` if there is none."""
    limits: tuple[str, ...] = ()
    """What else to beware of, a sentence each; Markdown."""
    not_promotable: str | None = None
    """Why it must not be used for real."""


def model_card(facts: CardFacts) -> str:
    """The card. Links to pictures and files are relative to the registered model's folder; `VERSION` stands for the
    number that the registry gives.
    """
    sections = {
        "What it is for": _purpose(facts),
        "What it was trained on": _table(facts.trained_on)
        or "Not known: these weights did not come from a run of this project, or it left no record.",
        "How it was trained": _table(facts.method) or "Not known.",
        "Scores": _scores(facts.scores),
        "Samples": _samples(facts.samples),
        "Licence": _licence(facts.licences),
        "Limits": _limits(facts),
        "How to load it": _loading(facts),
    }
    if facts.recorded:
        sections["Also recorded"] = _table(facts.recorded)
    return _HEADING.join([_head(facts), *(f"{title}\n{text}" for title, text in sections.items())]) + "\n"


def description_of(card: str, *, name: str, version: str) -> str:
    """The card as a version's description in MLflow: with the version's number, without pictures, which can't be shown
    there, and without some sections where it would be too long.
    """
    parts = card.replace(f"models:/{name}/VERSION", f"models:/{name}/{version}").strip().split(_HEADING)
    pictures = f"Samples\nPictures lie in the version's artefact, in `samples/` beside `{CARD_FILE}`."
    parts = [pictures if part.startswith("Samples\n") else part for part in parts]
    more = f"\n\nThe rest is in the version's artefact `{CARD_FILE}`."
    text = _HEADING.join(parts)
    for title in _LEFT_OUT_FIRST:
        if len(text) > MAX_DESCRIPTION_LENGTH:
            parts = [part for part in parts if not part.startswith(f"{title}\n")]
            text = _HEADING.join(parts) + more
    return text if len(text) <= MAX_DESCRIPTION_LENGTH else text[: MAX_DESCRIPTION_LENGTH - len(more)] + more


def _head(facts: CardFacts) -> str:
    config = facts.config
    lines = [
        f"# {facts.name}",
        f"{_network_name(config)} for ×{config.scale}, {num_parameters(config):,} parameters: "
        f"enlarges images to {config.scale} times their width and height.",
    ]
    if facts.not_promotable is not None:
        lines.append(f"**Not to be used for real, nor promoted: {facts.not_promotable}.**")
    return "\n\n".join(lines)


def _network_name(config: ModelConfig) -> str:
    name = architecture_name(config)
    return {"edsr": "EDSR", "srresnet": "SRResNet"}.get(name, name)


def _purpose(facts: CardFacts) -> str:
    character = "It stays close to what the small image says: of what it can't know it shows an average, which is soft."
    if facts.invents_detail:
        character = "It was trained to look right: it draws detail that is likely, and that need not be what was there."
    return (
        f"Photographs that were made smaller by interpolation (MATLAB's bicubic) and have little noise or compression. "
        f"{character}\n\n"
        "Not for: reading what can't be read in the small image (faces, number plates, text), evidence, diagnosis or "
        "measurement, since pixels that it adds are guesses; images with noise, blur or strong JPEG artefacts, which "
        "it has not seen and may amplify."
    )


def _table(rows: Sequence[Row], head: Row = ("", "")) -> str:
    if not rows:
        return ""
    return "\n".join(f"| {_cell(name)} | {_cell(text)} |" for name, text in (head, ("---", "---"), *rows))


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _scores(scores: Sequence[CardScores]) -> str:
    later = (
        "What was measured after registration, under which protocol and on which set, is in the version's tags. Scores "
        "under other protocols or on other images can't be compared with these."
    )
    if not scores:
        return f"None at the time of registration. {later}"
    return "\n\n".join([*(_score_table(score) for score in scores), later])


def _score_table(scores: CardScores) -> str:
    protocols = f"PSNR by `{scores.protocol}`, SSIM of Y"
    if scores.lpips_protocol is not None:
        protocols += f", LPIPS by `{scores.lpips_protocol}` (lower is better)"
    images = f"{scores.num_images:,} image{'s' * (scores.num_images != 1)}"
    lines = [
        f"{_cell(scores.dataset)}, {images}, fingerprint `{scores.fingerprint}`; {protocols}:\n",
        "| | PSNR dB | SSIM | LPIPS |",
        "|---|---|---|---|",
    ]
    for row in scores.rows:
        values = (_number(row.psnr_db, 3), _number(row.ssim, 4), _number(row.lpips, 4))
        lines.append(f"| {_cell(row.name)} | {' | '.join(values)} |")
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _samples(names: Sequence[str]) -> str:
    titles = {"lr": "input", "bicubic": "bicubic", "sr": "this model", "hr": "original"}
    head = " | ".join(titles.get(name, name) for name in names)
    pictures = " | ".join(f"![{name}](samples/{name}.png)" for name in names)
    return f"| {head} |\n|{'---|' * len(names)}\n| {pictures} |"


def _licence(licences: Sequence[str]) -> str:
    return "\n\n".join(licences or [LICENCE_UNKNOWN])


def _limits(facts: CardFacts) -> str:
    limits = [
        "Made for bicubic reduction; on images that became small in another way it is worse than its scores.",
        *facts.limits,
    ]
    if facts.not_promotable is not None:
        limits.insert(0, f"Not promotable: {facts.not_promotable}.")
    return "\n".join(f"- {limit}" for limit in limits)


def _loading(facts: CardFacts) -> str:
    uri = f"models:/{facts.name}/VERSION"
    config = json.dumps(config_to_dict(facts.config))
    return f"""Needs MLflow and what `requirements.txt` in its folder lists; no checkout of the project that trained it.

```python
import mlflow

model = mlflow.pyfunc.load_model("{uri}")
with open("photo.jpg", "rb") as source, open("larger.jpg", "wb") as target:
    target.write(model.predict(source.read()))  # or a uint8 array N×H×W×3 RGB
```

Over HTTP: `mlflow models serve -m {uri} --env-manager uv --port 5001`, then

```sh
printf '{{"inputs": ["%s"]}}' "$(base64 -w 0 photo.jpg)" |
  curl -s -H 'Content-Type: application/json' -d @- http://127.0.0.1:5001/invocations |
  jq -r '.predictions[0]' | base64 -d > larger.jpg
```

Many files: `python pipelines/upscale_images.py {uri} SOURCE TARGET` in a checkout of the project.

As ONNX, float32 in [0, 1], whole images (no tiles; `receptive_radius_px_lr` in its metadata says how far tiles must
overlap):

```python
import numpy as np, onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("onnx/model.onnx")
lr_HWC = np.asarray(Image.open("photo.jpg").convert("RGB"), dtype=np.float32) / 255
sr_NCHW = session.run(["sr"], {{"lr": lr_HWC.transpose(2, 0, 1)[None]}})[0]
sr_HWC = (sr_NCHW[0].transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8)
Image.fromarray(sr_HWC).save("larger-onnx.png")
```

The network's config: `{config}`"""
