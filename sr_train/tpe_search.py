"""Optuna's TPE under Ray Tune, never the same trial twice."""

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from sr_train.pareto import over_limit
from sr_train.search_space import Domain, Ints, choices
from sr_train.sweep_plan import SweepPlan, cost_of
from sr_train.training_space import canonical, domains_of, trial_name
from sr_train.trial_record import Sample, Value

PSNR = "psnr_db"
_MOST_REPEATS = 100
"""How often TPE may propose what was tried, or costs too much, before it is taken to have nothing new."""


def as_config(sample: Sample, name: str | None = None) -> dict[str, Any]:
    """Tune's config of a trial."""
    return {"trial": {"name": name or trial_name(sample), "sample": dict(sample)}}


def name_in(config: dict[str, Any]) -> str:
    """The trial's name."""
    return str(config["trial"]["name"])


def sample_in(config: dict[str, Any]) -> Sample:
    """The trial's point of the space."""
    sample: Sample = config["trial"]["sample"]
    return sample


class TpeSearch(Searcher):
    """Proposes points of the sweep's space by TPE (Bergstra et al. 2011).

    Trials that the sweep knows already come first, so that TPE learns from them when they tell what they told before.
    What was proposed once, or costs more than the limits allow, is answered in its stead and asked for anew.
    """

    def __init__(self, sweep: SweepPlan) -> None:
        super().__init__(metric=PSNR, mode="max")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._sweep, self._domains = sweep, domains_of(sweep.config.space)
        domains = domains_of(sweep.config.space)
        self._inner = OptunaSearch(
            space={name: _distribution(domain) for name, domain in domains.items()},
            metric=PSNR,
            mode="max",
            sampler=optuna.samplers.TPESampler(
                seed=sweep.config.search.search_seed,
                n_startup_trials=max(5, sweep.num_trials // 4),
                constant_liar=True,  # of trials that run beside each other
            ),
            points_to_evaluate=[_whole(record.sample, domains) for record in sweep.known] or None,
        )
        self._scores: dict[str, float | None] = {}
        self._proposals: dict[str, tuple[str, str]] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        for attempt in range(_MOST_REPEATS):
            inner_id = f"{trial_id}-{attempt}"
            proposed = self._inner.suggest(inner_id)
            if proposed is None:
                return None
            sample = canonical({option: _rounded(value, self._domains[option]) for option, value in proposed.items()})
            name = trial_name(sample)
            if name in self._scores:
                self._answer(inner_id, self._scores[name])
            elif over_limit(cost_of(self._sweep, sample), self._sweep.config.limits) is not None:
                self._answer(inner_id, None)
            else:
                self._scores[name] = None
                self._proposals[trial_id] = inner_id, name
                return as_config(sample, name)
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        inner_id, name = self._proposals.pop(trial_id)
        self._scores[name] = None if error or result is None else result.get(PSNR)
        self._answer(inner_id, self._scores[name])

    def _answer(self, inner_id: str, score: float | None) -> None:
        self._inner.on_trial_complete(inner_id, None if score is None else {PSNR: score}, error=score is None)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep goes on from its trials' records."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError


def _whole(sample: Sample, domains: Mapping[str, Domain]) -> dict[str, Value]:
    """The sample with a value for each option, also those without influence: Tune takes no points that lack some."""
    return {name: sample.get(name, domain.values[0]) for name, domain in domains.items()}


def _rounded(value: Value, domain: Domain) -> Value:
    """As random search rounds what it draws from a range: a trial's name depends on all digits."""
    return float(f"{value:.6g}") if isinstance(value, float) and choices(domain) is None else value


def _distribution(domain: Domain) -> BaseDistribution:
    values = choices(domain)
    if values is not None:
        return CategoricalDistribution(values)
    low, high = domain.values
    if isinstance(domain, Ints):
        return IntDistribution(int(low), int(high), log=domain.spread == "log")
    return FloatDistribution(float(low), float(high), log=domain.spread == "log")
