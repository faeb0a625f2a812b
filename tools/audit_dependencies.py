"""Are the locked versions still fit to be installed: known vulnerabilities, withdrawn releases, abandoned projects.

python tools/audit_dependencies.py [requirements/run.txt …]

uv does the work, against the package index that it is configured with and the OSV database. A finding ends with 1. A
service that can't be reached is said and ends with 0: that is no property of the locked versions.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parent.parent
IGNORED: dict[str, str] = {}
"""Findings that are known and do no harm here, by their id (GHSA-…, PYSEC-…), with the reason."""
_YANKED = re.compile(r"^warning: (`.+?` is yanked.*)$", re.MULTILINE)
_TIMEOUT_S = 180.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is audited, and against what."""

    locks: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Files with exact versions, as `make lock` writes them; all of requirements/ when none is given."""
    osv_url: str | None = None
    """A mirror of the OSV database, for machines that can't reach it."""


@dataclass(slots=True)
class Audit:
    """What came out."""

    findings: list[str] = field(default_factory=list)
    """One line each."""
    not_asked: list[str] = field(default_factory=list)
    """What could not be looked up, and why."""


def main(arguments: list[str]) -> int:
    """Prints one line per finding; returns the exit status."""
    options = tyro.cli(Options, args=arguments, prog="audit_dependencies.py", description=__doc__)
    locks = options.locks or tuple(sorted((ROOT / "requirements").glob("*.txt")))
    requirements = sorted({line for lock in locks for line in pinned(lock.read_text())})
    audit = audited(requirements, osv_url=options.osv_url)
    for line in audit.findings:
        print(f"finding: {line}")
    for line in audit.not_asked:
        print(f"not looked up: {line}")
    outcome = f"{len(audit.findings) or 'nothing'} found{' in what could be looked up' if audit.not_asked else ''}"
    print(f"{len(requirements)} locked versions: {outcome}")
    return 1 if audit.findings else 0


def pinned(text: str) -> list[str]:
    """The requirements of a lock: `name==version`, with its marker where it has one, without hashes."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.partition(" --hash")[0].strip() for line in lines if re.match(r"[\w.-]+(\[.*?\])?==", line)]


def audited(requirements: list[str], *, osv_url: str | None) -> Audit:
    """Asks the index for each version, and OSV for what is known of it."""
    audit = Audit()
    uv = shutil.which("uv") or shutil.which(str(Path(sys.executable).parent / "uv"))
    if uv is None:
        audit.not_asked.append("anything: there is no uv on the PATH or in the environment")
        return audit
    with tempfile.TemporaryDirectory(prefix="audit-") as folder:
        # uv audits projects: this one needs exactly what is locked.
        project = {"name": '"audited"', "version": '"0"', "requires-python": '">=3.11"'}
        project["dependencies"] = json.dumps(requirements)
        text = "\n".join(["[project]", *(f"{name} = {value}" for name, value in project.items())])
        (Path(folder) / "pyproject.toml").write_text(text)
        _ask_index(uv, folder, audit)
        if (Path(folder) / "uv.lock").exists():
            _ask_osv(uv, folder, osv_url, audit)
    return audit


def _ask_index(uv: str, folder: str, audit: Audit) -> None:
    done = _run([uv, "lock", "--python", sys.executable], folder)
    audit.findings += _YANKED.findall(done.stderr)
    if done.returncode == 1:  # no error of uv's: what is locked can't be had together, or no longer at all
        audit.findings.append(f"the index can't provide what is locked: {' '.join(done.stderr.split())}")
    elif done.returncode != 0:
        audit.not_asked.append(f"withdrawn releases, vulnerabilities: {_reason(done)}")


def _ask_osv(uv: str, folder: str, osv_url: str | None, audit: Audit) -> None:
    command = [uv, "audit", "--preview-features", "audit-command,json-output", "--frozen", "--output-format", "json"]
    command += [word for finding in IGNORED for word in ("--ignore", finding)]
    command += ["--service-url", osv_url] if osv_url else []
    done = _run(command, folder)
    if done.returncode not in (0, 1):
        audit.not_asked.append(f"vulnerabilities, projects' status: {_reason(done)}")
        return
    report = json.loads(done.stdout)
    for item in report["vulnerabilities"]:
        name, version = item["dependency"]["name"], item["dependency"]["version"]
        fixed = ", ".join(item["fix_versions"]) or "no version yet"
        audit.findings.append(
            f"{name}=={version}: {item['display_id']}, {item['summary']} (mended in {fixed}; {item['link']})"
        )
    for item in report["adverse_statuses"]:
        reason = f" ({item['reason']})" if item.get("reason") else ""
        audit.findings.append(f"{item['name']}: the index says that the project is {item['status']}{reason}")


def _run(command: list[str], folder: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 2, "", f"error: no answer within {_TIMEOUT_S:.0f} s")


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The error's first line, and its last cause."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.startswith(("error:", "  "))]
    return "; ".join(dict.fromkeys([lines[0], lines[-1]])) if lines else f"uv ended with {done.returncode}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
