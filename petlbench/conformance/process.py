"""Load adapters in a new process, which gets only their cells and files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from petlbench.core.cell import Cell


def reload_adapters(adapters: Mapping[Path, Cell], device: str) -> dict[Path, dict[str, Any]]:
    """Return what a new process computes with each adapter file: `bits` of its outputs and all `values`, or `error`.

    All files share one process, because starting one takes seconds.
    """
    import torch

    if not adapters:
        return {}
    jobs = {str(path): cell.model_dump(mode="json") for path, cell in adapters.items()}
    task = {"jobs": jobs, "device": device, "threads": torch.get_num_threads()}  # their number can change bits
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)  # plug-ins may be anywhere on the path
    done = subprocess.run(
        [sys.executable, "-m", "petlbench.conformance"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {path: {"error": f"it ended with status {done.returncode}: {last}"} for path in adapters}
    results = json.loads(done.stdout.splitlines()[-1])
    return {path: results[str(path)] for path in adapters}


def main() -> None:
    """Read jobs from standard input; print results as the last line of standard output."""
    import torch

    from petlbench.core.messages import one_line

    task = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    results: dict[str, Any] = {}
    for path, cell in task["jobs"].items():
        try:
            results[path] = _outputs(Cell.model_validate(cell), Path(path), task["device"])
        except Exception as error:  # one adapter's fault must not take the others down
            results[path] = {"error": one_line(error)}
    print("\n" + json.dumps(results))


def _outputs(cell: Cell, path: Path, device: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    from petlbench.conformance.bench import Bench, method_class
    from petlbench.conformance.module_snapshot import values
    from petlbench.pipeline.assembly import build_method
    from petlbench.training.evaluation import load_state

    bench, method = Bench(cell, device), build_method(cell, method_class(cell.method))
    setup, _ = bench.setup(bench.backbone(), method)
    load_state(setup, load_file(path, device=device))
    outputs = bench.outputs(setup.backbone, setup.head)
    return {"bits": outputs.bits, "values": values(setup.modules(), method)}
