"""Describe the machine and software of a result, without paths or host names."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from petlbench.core.version import __version__

PACKAGES = (  # distributions that can change a number; torch reports its own version
    "torchvision",
    "transformers",
    "tokenizers",
    "datasets",
    "numpy",
    "scikit-learn",
    "pillow",
    "safetensors",
    "pydantic",
    "timm",
    "open_clip_torch",
    "peft",
)
CODE = ("petlbench", "methods", "tasks")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _output(*command: str) -> str | None:
    """Return the output of `command`, or None if it is absent, fails or hangs."""
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
    root = root or Path(__file__).resolve().parents[2]
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


def _matmul_precision() -> str | None:
    """`highest`, `high` or `medium`; None where somebody has set precisions by both of torch's interfaces."""
    import torch

    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _tf32(backend: Any) -> bool:
    """Whether float32 products are rounded to TF32: by the interface from torch 2.9 on, as the older then raises."""
    precision = getattr(backend, "fp32_precision", None)
    return bool(backend.allow_tf32) if precision is None else precision == "tf32"


def describe(device: str, threads: int) -> dict[str, Any]:
    """Versions, platform, CPU, device, source tree and torch's switches, as JSON values.

    `device`: as torch names it. `threads`: the cell's setting; the number that torch really uses stands beside it. A
    package that is not installed is null.
    """
    import torch

    cuda = torch.device(device).type == "cuda"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None
    return {
        "petlbench": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with its build, such as +cpu, which package metadata leaves out
        **{package: _version(package) for package in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": cores(),
        "threads": threads,
        "intra_op_threads": torch.get_num_threads(),
        "inter_op_threads": torch.get_num_interop_threads(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "cuda_runtime": torch.version.cuda if cuda else None,
        "cuda_driver": driver.splitlines()[0] if driver else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        **source_tree(),
        **switches(),
    }


def switches() -> dict[str, Any]:
    """Return torch's switches in this process for reproducible results, or for faster and less exact ones."""
    import torch

    cudnn = torch.backends.cudnn
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": cudnn.deterministic,
        "cudnn_benchmark": cudnn.benchmark,
        "matmul_precision": _matmul_precision(),
        "tf32_matmul": _tf32(torch.backends.cuda.matmul),
        "tf32_cudnn": _tf32(getattr(cudnn, "conv", cudnn)),
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }
