"""The project's own promises: locked versions, no package index named, imports without effects, docs that agree."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

# Brackets keep this file from matching itself.
INDEX_ADDRESS = re.compile(
    r"https?://[^\s\"]+/simpl[e]|registry = [{\"]|(inde[x]|registr[y])[-_]?url|https?://[^\s\"]+\.(whl|tar\.gz|tgz|deb)"
)
IMPORT_ALL = """
import importlib, json, logging, pkgutil, runpy, sys, threading
from pathlib import Path
repo = Path(sys.argv[1])
packages = ("sr_data", "sr_models", "sr_serve", "sr_train")
names = [f"{p}.{m.name}" for p in packages for m in pkgutil.iter_modules([str(repo / p)])]
skipped = {"sr_models.pyfunc"}  # models-from-code: MLflow runs it, and set_model() is its purpose
for name in sorted(set(names) - skipped):
    importlib.import_module(name)
for script in sorted((repo / "pipelines").glob("*.py")):
    runpy.run_path(str(script), run_name="imported")
import ray, torch
print(json.dumps({
    "modules": len(names),
    "files": [str(p) for p in Path.cwd().rglob("*")],
    "ray": ray.is_initialized(),
    "cuda": torch.cuda.is_initialized(),
    "root handlers": len(logging.getLogger().handlers),
    "threads": [t.name for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon],
}))
"""


def tracked_files(repo: Path) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=repo, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [repo / name for name in listed.stdout.split("\0") if name and (repo / name).is_file()]


def direct_dependencies(repo: Path, *, dev: bool = True) -> set[str]:
    project = tomllib.loads((repo / "pyproject.toml").read_text())
    requirements = project["project"]["dependencies"] + (project["dependency-groups"]["dev"] if dev else [])
    return {re.split(r"[\[<>=]", requirement)[0] for requirement in requirements}


def third_party_imports(path: Path) -> Iterator[str]:
    """The top-level packages that a file imports anywhere, without Python's own and the project's."""
    own = {"sr_data", "sr_models", "sr_serve", "sr_train", "pipelines", "benchmarks", "tests"}
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import():
                modules = [alias.name for alias in node.names]
            case ast.ImportFrom(module=str(module), level=0):
                modules = [module]
            case _:
                continue
        yield from {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - own


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_package_index_is_named(repo: Path) -> None:
    found = [
        f"{path.relative_to(repo)}:{number}"
        for path in tracked_files(repo)
        if path.suffix not in {".png", ".jpg", ".safetensors"}
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if INDEX_ADDRESS.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("name", ["run", "dev", "uv"])
def test_every_locked_requirement_has_a_version_and_a_hash(repo: Path, name: str) -> None:
    text = (repo / "requirements" / f"{name}.txt").read_text()
    blocks = re.split(r"\n(?=\S)", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    assert len(blocks) >= 1
    for block in blocks:
        assert re.match(r"[\w.-]+(\[[\w,-]+\])?==[\w.!+]+", block), block[:80]
        assert "--hash=sha256:" in block, block[:80]


def test_every_direct_dependency_is_locked_and_has_its_reason(repo: Path) -> None:
    locked = {
        line.split("==")[0].split("[")[0].strip()
        for line in (repo / "requirements" / "dev.txt").read_text().splitlines()
        if "==" in line and not line.startswith(("#", " "))
    }
    reasons = (repo / "docs" / "decisions" / "0001-dependencies.md").read_text()
    for name in direct_dependencies(repo):
        assert name in locked
        assert f"`{name}" in reasons, f"{name} has no reason in docs/decisions/0001-dependencies.md"


def test_every_import_is_a_direct_dependency(repo: Path) -> None:
    """What is installed by chance, or by another package, is gone on the next machine, or in the next version."""
    distributions = packages_distributions()
    needed_to_run = {"sr_data", "sr_models", "sr_serve", "sr_train", "pipelines"}
    undeclared = {
        f"{path.relative_to(repo)}: {name}"
        for path in tracked_files(repo)
        if path.suffix == ".py"
        for name in third_party_imports(path)
        if not (path.parent / f"{name}.py").exists()  # a script's neighbour
        if not {it.lower() for it in distributions.get(name, [name])}
        & direct_dependencies(repo, dev=path.relative_to(repo).parts[0] not in needed_to_run)
    }
    assert undeclared == set()


def test_development_is_locked_to_the_versions_that_runs_use(repo: Path) -> None:
    def versions(name: str) -> set[str]:
        lines = (repo / "requirements" / f"{name}.txt").read_text().splitlines()
        return {line.rstrip(" \\") for line in lines if "==" in line and not line.startswith(("#", " "))}

    assert versions("run") <= versions("dev")


def test_importing_does_nothing(repo: Path) -> None:
    seen = json.loads(run_python(IMPORT_ALL, str(repo)).splitlines()[-1])
    assert seen.pop("modules") > 10
    assert seen == {"files": [], "ray": False, "cuda": False, "root handlers": 0, "threads": []}


def test_training_loop_needs_neither_ray_nor_mlflow() -> None:
    heavy = "import sys, sr_train.loop; print(sorted({'ray', 'mlflow', 'tyro'} & set(sys.modules)))"
    assert run_python(heavy).strip() == "[]"


def test_inference_needs_sr_models_alone() -> None:
    others = (
        "import sys, sr_models.inference, sr_models.weights;"
        "print([name for name in ('sr_data', 'sr_train', 'ray') if name in sys.modules])"
    )
    assert run_python(others).strip() == "[]"


def test_ci_runs_the_readmes_second_command(repo: Path) -> None:
    readme = (repo / "README.md").read_text()
    commands = [block.strip().splitlines()[-1] for block in re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)]
    assert commands[:2] == ["make run", "make check"]
    assert (repo / ".ci" / "run").read_text().rstrip().endswith(commands[1])


def test_the_architecture_names_every_module_and_no_other(repo: Path) -> None:
    text = (repo / "docs" / "architecture.md").read_text()
    rows = [row for row in text.partition("## Conventions")[0].splitlines() if "`sr_" in row]
    named = set()
    for row in rows:
        folder = re.search(r"`(sr_\w+)/", row)
        for path in re.findall(r"`([\w/]+\.py)`", row):
            named.add(path if "/" in path or folder is None else f"{folder[1]}/{path}")
    packages = ("sr_data", "sr_models", "sr_serve", "sr_train")
    modules = {path.relative_to(repo).as_posix() for name in packages for path in (repo / name).glob("[!_]*.py")}
    assert named == modules


def test_links_of_the_docs_lead_somewhere(repo: Path) -> None:
    pages = [repo / "README.md", *(repo / "docs").rglob("*.md")]
    broken = [
        f"{page.relative_to(repo)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert broken == []
