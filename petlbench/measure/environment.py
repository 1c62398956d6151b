"""What a result was measured on and with. No paths, no host names."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import petlbench

PACKAGES = ("transformers", "datasets", "numpy")
CODE = ("petlbench", "methods", "tasks")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _output(*command: str) -> str | None:
    """What `command` prints, or None when it is absent, fails or hangs."""
    # Variables such as GIT_DIR, set while git runs a hook, would point git at another repository.
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=env, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()


def source_tree(root: Path | None = None) -> dict[str, Any]:
    """`git_commit` and `git_dirty` (code that differs from that commit) of the checkout at `root`, else None twice.

    `root` is where petlbench was imported from; a package merely installed below somebody's repository is not it.
    """
    root = root or Path(petlbench.__file__).resolve().parents[1]
    git = ("git", "-C", str(root))
    if not _output(*git, "ls-files", "--error-unmatch", "petlbench/__init__.py"):
        return {"git_commit": None, "git_dirty": None}
    status = _output(*git, "status", "--porcelain", "--", *CODE)
    return {"git_commit": _output(*git, "rev-parse", "HEAD"), "git_dirty": None if status is None else bool(status)}


def _cpu_name() -> str:
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe(device: str, threads: int) -> dict[str, Any]:
    """Versions, platform, CPU, device and source tree, as JSON values."""
    import torch

    cuda = torch.device(device).type == "cuda"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None
    return {
        "petlbench": petlbench.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with its build, such as +cpu, which package metadata leaves out
        **{package: _version(package) for package in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": cores(),
        "threads": threads,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "cuda_runtime": torch.version.cuda if cuda else None,
        "cuda_driver": driver.splitlines()[0] if driver else None,
        **source_tree(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
