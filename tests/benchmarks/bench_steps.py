"""Seconds of a training step and of a prediction, by method, on the embedded backbone, and the loop's overhead.

Not collected with the tests: `make microbench` names these files.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from petlbench.api.registries import METHODS
from petlbench.measure.clock import WARMUP
from petlbench.training.loop import train_step
from petlbench.training.state import TrainingState
from tests.benchmarks import overhead, sized

ROUNDS = sized(20, 1)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # one thread gives the steadiest times, comparable between machines


@pytest.mark.benchmark(group="training step")
@pytest.mark.parametrize("method", METHODS.names())
def test_training_step(method: str, benchmark: BenchmarkFixture) -> None:
    setup, rows = overhead.prepare(method)
    training = TrainingState(setup, rows, setup.recipe.lr)
    benchmark.pedantic(train_step, (training,), rounds=ROUNDS, warmup_rounds=WARMUP)
    assert training.step == ROUNDS + WARMUP


@pytest.mark.benchmark(group="inference step")
@pytest.mark.parametrize("method", METHODS.names())
def test_inference_step(method: str, benchmark: BenchmarkFixture) -> None:
    setup, rows = overhead.prepare(method)
    setup.modules().eval()
    chosen = [rows[i] for i in range(len(rows))]

    @torch.no_grad()
    def predict() -> list[str]:
        batch = setup.task.collate(chosen, setup.backbone, None)
        return setup.task.predict(setup.backbone, setup.head, batch)

    answers = benchmark.pedantic(predict, rounds=ROUNDS, warmup_rounds=WARMUP)
    assert len(answers) == len(rows)


@pytest.mark.benchmark(group="overhead of the training loop")
def test_training_loop_against_one_by_hand(benchmark: BenchmarkFixture) -> None:
    found = benchmark.pedantic(overhead.measure, rounds=1)
    benchmark.extra_info.update(vars(found))
    print(f"\nours {1e3 * found.loop_seconds:.2f} ms, by hand {1e3 * found.hand_seconds:.2f} ms, {found.ratio:.3f}")
    assert abs(found.phases_share - 1) < 0.01
