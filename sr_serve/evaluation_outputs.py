"""Where an evaluation's scores go while it goes on: terminal, JSON, CSV, report and tags.

A set may take an hour. What is scored is out when its set is finished, and an output that fails stops neither the
scoring nor the others.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from sr_data.errors import DataError, StorageError
from sr_models.errors import ModelError
from sr_serve.evaluation import OpenSet, ScoredImage, SetEvaluation, scores_csv
from sr_serve.evaluation_report import EvaluationReport
from sr_serve.score_tags import ScoreTag, score_tags, write_score_tags
from sr_train.checkpoint import CheckpointError
from sr_train.metrics import MetricError
from sr_train.score_report import check_scores_writable, write_scores, write_text
from sr_train.tracking_server import TrackingError, resolve_tracking_uri
from sr_train.upscaler import UpscalerError

USER_ERRORS = (DataError, StorageError, ModelError, CheckpointError, MetricError, UpscalerError, TrackingError)
"""What opening, scoring and writing raise, and the user can mend."""
_SCORING = "scoring"


class EvaluationOutputs:
    """`check`, then `write` what is being scored; `observe` is for the one who scores."""

    def __init__(
        self,
        *,
        json: str | None,
        csv: str | None,
        report: EvaluationReport | None,
        tags: bool,
        tracking_uri: str | None,
    ) -> None:
        """`json` and `csv` are files or URIs. What is None is not asked for."""
        self._json, self._csv = json, csv
        self._report = report
        self._tags, self._tracking_uri = tags, tracking_uri
        self._errors: dict[str, Exception] = {}
        """What failed, and why; it leaves when a later attempt succeeds."""

    def check(self) -> None:
        """StorageError if a file or the report could not be written."""
        for flag, uri in (("--json", self._json), ("--csv", self._csv)):
            if uri is not None:
                check_scores_writable(uri, flag=flag)
        if self._report is not None:
            self._report.check()

    def observe(self, one: OpenSet, number: int, image: ScoredImage) -> None:
        """Gives an image to the report, until a picture can't be written."""
        report = self._report
        if report is not None and "--html" not in self._errors:
            self._attempt("--html", lambda: report.observe(one, number, image))

    def write(self, evaluations: Iterable[SetEvaluation]) -> None:
        """Writes JSON and CSV anew and prints the table after each set; report and tags follow the last one.

        When scoring stops on an error, finished sets have their tags; a report that is there stays as it is. The first
        error is raised when all else is out; others are printed.
        """
        done: list[SetEvaluation] = []
        try:
            self._attempt(_SCORING, lambda: self._follow(evaluations, done))
            if self._report is not None and not self._errors.keys() & {_SCORING, "--html"}:
                report = self._report
                self._attempt("--html", lambda: print(f"\nreport: {report.write(done)}"))
        finally:
            if self._report is not None:
                self._report.discard()
        if self._tags:
            self._write_tags(done)
        errors = list(self._errors.values())
        for error in errors[1:]:
            print(f"error: {error}", file=sys.stderr)
        if errors:
            raise errors[0]

    def _follow(self, evaluations: Iterable[SetEvaluation], done: list[SetEvaluation]) -> None:
        for evaluation in evaluations:
            done.append(evaluation)
            self._write_files(done)
            print(("\n" if len(done) > 1 else "") + evaluation.table(), flush=True)

    def _write_files(self, done: Sequence[SetEvaluation]) -> None:
        if (json := self._json) is not None:
            scores = [scores for evaluation in done for scores in evaluation.to_json_dicts()]
            self._attempt("--json", lambda: write_scores(json, scores))
        if (csv := self._csv) is not None:
            self._attempt("--csv", lambda: write_text(csv, scores_csv(done)))

    def _write_tags(self, done: Sequence[SetEvaluation]) -> None:
        for (name, version), tags in score_tags(done).items():
            model = f"models:/{name}/{version}"
            if self._attempt(model, partial(self._tag, name, version, tags)):
                print(f"{model} is tagged: {', '.join(tag.key for tag in tags)}")

    def _tag(self, name: str, version: str, tags: Sequence[ScoreTag]) -> None:
        write_score_tags(resolve_tracking_uri(self._tracking_uri), name=name, version=version, tags=tags)

    def _attempt(self, what: str, action: Callable[[], None]) -> bool:
        """Whether it succeeded; if not, the error is kept."""
        try:
            action()
        except USER_ERRORS as error:
            self._errors[what] = error
            return False
        self._errors.pop(what, None)
        return True
