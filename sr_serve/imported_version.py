"""An imported model as a registered version: its origin, scores and card."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np

from sr_data.pairs import load_pair
from sr_data.storage import open_store
from sr_models.architectures import config_to_dict
from sr_serve.evaluation import OpenSet, SetEvaluation
from sr_serve.import_weights import ImportedModel, origin_tags
from sr_serve.score_tags import score_tags, write_score_tags
from sr_train.model_card import CardFacts, CardScore, CardScores, model_card
from sr_train.model_registry import NOT_PROMOTABLE_TAG, RegisteredVersion, register_model
from sr_train.run_facts import run_facts
from sr_train.tracking import finish_run, start_run

_SAMPLE_PX_LR = 64


def register_import(
    model: ImportedModel,
    folder: Path,
    evaluations: Sequence[SetEvaluation],
    sets: Sequence[OpenSet],
    *,
    name: str,
    tracking_uri: str,
    experiment: str,
    alias: str | None,
    licence: str | None,
) -> RegisteredVersion:
    """Registers the folder of `save_import` as a version of `name`, with origin, scores and card, in a run of its own.

    One that is not promotable says so in its tags, and gets no alias. TrackingError if the server refuses.
    """
    first = evaluations[0]
    origin, facts = origin_tags(model, licence=licence), run_facts()
    tags = {
        **origin,
        "git_sha": facts["git_sha"],
        "scale": str(first.scale),
        "protocol": first.protocol,
        "psnr_db": f"{first.models[1].score.psnr_db:.4f}",
        "ssim": f"{first.models[1].score.ssim:.4f}",
        "bicubic_psnr_db": f"{first.bicubic.psnr_db:.4f}",
        "validation_fingerprint": first.fingerprint,
    }
    if model.not_promotable is not None:
        tags[NOT_PROMOTABLE_TAG] = model.not_promotable
    manifest = sets[0].manifest
    pair = load_pair(open_store(manifest.uri), min(manifest.images, key=lambda record: record.name), manifest.scale)
    side_px_lr, side_px_hr = _SAMPLE_PX_LR, _SAMPLE_PX_LR * manifest.scale
    config = config_to_dict(model.imported.config)
    run = start_run(
        tracking_uri=tracking_uri,
        experiment=experiment,
        run_name=f"import-{name}-{datetime.now():%Y%m%d-%H%M%S}",
        params={f"model.{key}": str(value) for key, value in config.items()},
        tags={**facts, **origin},
        texts={"import.txt": f"{model.describe()}\n{model.doubts()}\n"},
    )
    done = False
    try:
        version = register_model(
            run,
            folder,
            name=name,
            tags=tags,
            sample_lr_HWC=np.ascontiguousarray(pair.lr_HWC[:side_px_lr, :side_px_lr]),
            sample_hr_HWC=np.ascontiguousarray(pair.hr_HWC[:side_px_hr, :side_px_hr]),
            card=model_card(_card(model, evaluations, sets, name=name, licence=licence)),
            alias=alias if model.not_promotable is None else None,
        )
        registered = [_registered(evaluation, version) for evaluation in evaluations]
        for (_, number), scores in score_tags(registered).items():
            write_score_tags(tracking_uri, name=name, version=number, tags=scores)
        done = True
    finally:
        finish_run(run, "FINISHED" if done else "FAILED")
    return version


def registered_line(version: RegisteredVersion, model: ImportedModel, alias: str | None) -> str:
    """For people: the version, and the alias it was to have."""
    if model.not_promotable is not None:
        return f"{version.uri}, without an alias: {model.not_promotable}"
    return f"{version.uri} ({f'{version.name}@{alias}' if alias is not None else 'without an alias'})"


def _registered(evaluation: SetEvaluation, version: RegisteredVersion) -> SetEvaluation:
    """The evaluation as one of the version that was registered after it."""
    bicubic, ours = evaluation.models
    model = replace(ours.model, registered=(version.name, version.version))
    return replace(evaluation, models=(bicubic, replace(ours, model=model)))


def _card(
    model: ImportedModel,
    evaluations: Sequence[SetEvaluation],
    sets: Sequence[OpenSet],
    *,
    name: str,
    licence: str | None,
) -> CardFacts:
    scores = tuple(
        CardScores(
            dataset=f"{one.manifest.uri} ({one.manifest.split})",
            fingerprint=it.fingerprint,
            num_images=len(it.bicubic.images),
            protocol=it.protocol,
            rows=tuple(
                CardScore(name=label, psnr_db=scored.score.psnr_db, ssim=scored.score.ssim)
                for label, scored in zip(("bicubic", "this model"), it.models, strict=True)
            ),
        )
        for it, one in zip(evaluations, sets, strict=True)
    )
    unsaid = (
        "Not said by whoever imported it. The weights are their authors': ask what they allow, and what their "
        "training images do."
    )
    return CardFacts(
        name=name,
        config=model.imported.config,
        trained_on=(("imported from", f"{model.file.name}, sha256 {model.file.sha256}"), ("by", model.imported.layout)),
        recorded=tuple(("import", note) for note in model.notes),
        scores=scores,
        samples=("lr", "bicubic", "sr", "hr"),
        licences=(licence.strip() if licence is not None else unsaid,),
        limits=("Trained elsewhere: on which images, and made small how, this project does not know.", *model.warnings),
        not_promotable=model.not_promotable,
    )
