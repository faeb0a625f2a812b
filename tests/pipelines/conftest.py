"""The scripts' `main` as a test calls it, and a Ray cluster that all tests of a module share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import ray

from pipelines import train_edsr


class Outcome(NamedTuple):
    """What a user sees of a script."""

    status: int
    out: str
    err: str


RunMain = Callable[..., Outcome]


@pytest.fixture
def run_main(capsys: pytest.CaptureFixture[str]) -> RunMain:
    """`run_main(main, *arguments)`: the script in this process. Anything it raises but SystemExit fails the test."""

    def run(main: Callable[[Sequence[str]], None], *arguments: object) -> Outcome:
        capsys.readouterr()
        status: object = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            status = exit_.code or 0
        assert isinstance(status, int), f"exited with {status!r}"
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def small_cluster() -> Iterator[None]:
    """A Ray cluster of 2 CPUs in this process, which a driver joins."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def train(run_main: RunMain) -> RunMain:
    """train_edsr.py with these arguments and no others."""
    return partial(run_main, train_edsr.main)


@pytest.fixture
def plan(train: RunMain, small_cluster: None, tiny_photos: Path) -> RunMain:
    """train_edsr.py --plan on six small photos and a database of its own; a flag given replaces the one here."""

    def run(*arguments: object) -> Outcome:
        defaults = {
            "--data.uri": tiny_photos,
            "--data.patch-px-hr": 48,
            "--model.num-blocks": 1,
            "--model.num-channels": 4,
            "--tracking.uri": "sqlite:///mlflow.db",
        }
        kept = [part for flag, value in defaults.items() if flag not in arguments for part in (flag, value)]
        outcome = train("--plan", *kept, *arguments)
        assert not [path for path in Path("runs").glob("[!.]*") if not (path / "config.json").exists()]
        return outcome

    return run
