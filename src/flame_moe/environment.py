"""What a run ran on: written into every result, so that a number can be traced."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from flame_moe.nn import products
from flame_moe.results import Environment


def environment() -> Environment:
    """Versions, processor and commit of this process."""
    return Environment(
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=version("numpy"),
        platform=platform.platform(),
        cpu=_processor(),
        threads=torch.get_num_threads(),
        package=_package(),
        products=products.in_use(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        git_commit=_commit(),
    )


def _package() -> str:
    try:
        return version("flame-moe")
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """Model name of the processor; `platform.processor` is empty on most Linux systems."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the source tree, with "-dirty" where it was changed; None for an installed package.

    Looked for only right above `src`, so that the commit of a project that merely uses the package is never taken.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, env={**os.environ, "LC_ALL": "C"})
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() or None
