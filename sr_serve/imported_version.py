"""An imported model as a registered version: its origin, scores and card."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from sr_data.pairs import DecodedPair, load_pair, middle
from sr_data.storage import open_store
from sr_models.architectures import config_to_dict
from sr_serve.evaluation import OpenSet, SetEvaluation
from sr_serve.import_weights import ImportedModel, origin_tags
from sr_serve.score_tags import score_tags, write_score_tags
from sr_train.model_card import CardFacts, CardScore, CardScores, model_card
from sr_train.model_registry import NOT_PROMOTABLE_TAG, RegisteredVersion, register_model
from sr_train.run_facts import run_facts
from sr_train.tracking import finish_run, start_run
from sr_train.tracking_server import redact

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
    invents_detail: bool,
) -> RegisteredVersion:
    """Registers the folder of `save_import` as a version of `name`, with origin, scores and card, in a run of its own.

    `invents_detail` says that it was trained to look right (a GAN); no file tells that.
    One that is not promotable says so in its tags, and gets no alias. TrackingError if the server refuses.
    """
    origin, facts = origin_tags(model, licence=licence), run_facts()
    sample = _sample(sets[0])
    card = _card(model, evaluations, sets, name=name, licence=licence, invents_detail=invents_detail)
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
            tags={**origin, "git_sha": facts["git_sha"], **_tags(model, evaluations[0])},
            sample_lr_HWC=sample.lr_HWC,
            sample_hr_HWC=sample.hr_HWC,
            card=model_card(card),
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


def _tags(model: ImportedModel, first: SetEvaluation) -> dict[str, str]:
    """As a run's versions have them, of the first set. No `validation_fingerprint`: no checkpoint was chosen on it."""
    score, bicubic = first.models[1].score, first.bicubic
    tags = {
        "scale": str(first.scale),
        "protocol": first.protocol,
        "psnr_db": f"{score.psnr_db:.4f}",
        "ssim": f"{score.ssim:.4f}",
        "bicubic_psnr_db": f"{bicubic.psnr_db:.4f}",
    }
    return tags if model.not_promotable is None else {**tags, NOT_PROMOTABLE_TAG: model.not_promotable}


def _sample(one: OpenSet) -> DecodedPair:
    """The set's first image, or the middle of a large one."""
    manifest = one.manifest
    record = min(manifest.images, key=lambda record: record.name)
    return middle(load_pair(open_store(manifest.uri), record, manifest.scale), _SAMPLE_PX_LR)


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
    invents_detail: bool,
) -> CardFacts:
    scores = tuple(
        CardScores(
            dataset=f"{redact(one.manifest.uri)} [{one.manifest.split}]",
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
        trained_on=(
            ("imported from", f"{model.file.name}, sha256 {model.file.sha256}"),
            ("layout", model.imported.layout),
        ),
        recorded=tuple(("import", note) for note in model.notes),
        scores=scores,
        invents_detail=invents_detail,
        samples=("lr", "bicubic", "sr", "hr"),
        licences=(licence.strip() if licence is not None else unsaid,),
        limits=("Trained elsewhere: on which images, and made small how, this project does not know.", *model.warnings),
        not_promotable=model.not_promotable,
    )
