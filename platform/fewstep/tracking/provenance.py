"""The provenance of a run: its code, installed packages, machine and inputs."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

DIFF_CHARS = 2_000_000


@dataclass(frozen=True)
class Provenance:
    """tags: short facts by name, for `Tracker.open(tags=...)`. files: text by file name, for `Tracker.text`."""

    tags: dict[str, str]
    files: dict[str, str]


def provenance(root: Path, **fingerprints: str) -> Provenance:
    """Collects the provenance of a run: git commit and diff, packages, hardware, the caller's fingerprints.

    root: a folder of a git checkout. Elsewhere the tag `git.commit` is "not a git checkout". fingerprints: such as
    data="sha256:...", recorded as the tags `fingerprint.<name>`.
    Files: `environment.txt`, every installed package; `git.diff` when the checkout differs from its commit.
    Call it in the process that trains: it asks torch for the devices.
    """
    tags, files = _git(Path(root))
    packages = sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()}, key=str.lower)
    files["environment.txt"] = "\n".join([f"# Python {platform.python_version()}", *packages, ""])
    tags |= _torch() | {
        "host.cpu": f"{len(os.sched_getaffinity(0))} of {_cpu()}",
        "host.os": platform.platform(),
        "version.python": platform.python_version(),
    }
    for package in ("ray", "diffusers", "fewstep"):
        tags[f"version.{package}"] = _version(package)
    return Provenance(tags | {f"fingerprint.{k}": str(v) for k, v in fingerprints.items()}, files)


def _git(root: Path) -> tuple[dict[str, str], dict[str, str]]:
    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)

    try:
        inside = git("rev-parse", "--show-toplevel")
    except FileNotFoundError:
        return {"git.commit": "git is not installed"}, {}
    if inside.returncode:
        reason = (inside.stderr.strip().splitlines() or ["git failed"])[0]
        return {"git.commit": "not a git checkout" if "not a git repository" in reason else reason}, {}
    head = git("rev-parse", "HEAD")
    commit = head.stdout.strip() if head.returncode == 0 else "no commit yet"
    changed = git("diff", "--no-color", "--no-ext-diff", *(["HEAD"] if head.returncode == 0 else ["--cached"])).stdout
    listing = git("ls-files", "--others", "--exclude-standard", "--full-name", inside.stdout.strip())
    untracked = listing.stdout.splitlines()
    tags = {"git.commit": commit, "git.dirty": str(bool(changed or untracked)).lower()}
    if head.returncode == 0:
        tags["mlflow.source.git.commit"] = commit  # the page's "Version"
    if not changed and not untracked:
        return tags, {}
    if len(changed) > DIFF_CHARS:
        changed = f"{changed[:DIFF_CHARS]}\n# cut here: {len(changed)} characters in all\n"
    return tags, {"git.diff": changed + "".join(f"# untracked: {name}\n" for name in untracked)}


def _cpu() -> str:
    """The processor's name, as the kernel or else Python gives it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.machine()


def _torch() -> dict[str, str]:
    import torch  # here: no other module of this package waits for it

    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return {
        "host.gpu": ", ".join(map(torch.cuda.get_device_name, devices)) or "none",
        "version.torch": torch.__version__,
        "version.cuda": torch.version.cuda or "none",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
