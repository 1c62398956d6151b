"""Test recipe options that change how a cell computes: precision, attention, recomputation, compilation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from petlbench.api.registries import TASKS
from petlbench.api.sites import Layer, Pass, Stack, current_pass
from petlbench.core.cell import Cell
from petlbench.core.errors import UserError
from petlbench.core.recipe import Recipe
from petlbench.measure.memory import SavedTensors
from petlbench.pipeline.assembly import build_backbone, build_setup
from petlbench.pipeline.data import Data, load_data, load_source
from petlbench.training import precision, state
from petlbench.training.checkpoint import Checkpoint
from petlbench.training.context import RunContext
from petlbench.training.evaluation import evaluate
from petlbench.training.loop import Diverged, fit, train_step
from petlbench.training.setup import TrainingSetup
from petlbench.training.state import TrainingResult, TrainingState
from petlbench.training.step_costs import canonical_saved_bytes, first_batch, inference, training_flops
from tests.backbone_factory import small_tiny
from tests.training.test_training import recipe as line_recipe
from tests.training.test_training import rows as line_rows
from tests.training.test_training import setup as line_setting

SCENES = {"train_scenes": 8, "validation_scenes": 4, "test_scenes": 4}
SMALL = {"vision_layers": 1, "encoder_layers": 1, "decoder_layers": 1, "ffn": 96, "vision_ffn": 96}
CPU = torch.device("cpu")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
STEPS = 3
# The relative change of a loss by each option: none if the same operations run.
TOLERANCES: list[tuple[dict[str, Any], float]] = [
    ({"precision": "bf16"}, 3e-2),
    ({"precision": "fp16"}, 5e-3),
    ({"attention": "unfused"}, 1e-5),
    ({"gradient_checkpointing": True}, 0.0),
    ({"compile": True}, 1e-5),
    ({"precision": "bf16", "attention": "unfused", "gradient_checkpointing": True, "compile": True}, 3e-2),
]


@pytest.fixture(scope="module")
def all_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Data]]:
    """Return the data by task."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PETLBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        cells = [cell(task=task) for task in ("vqa", "rec")]
        yield {one.task: load_data(one, load_source(one, None), TASKS.get(one.task)()) for one in cells}


@pytest.fixture
def data(all_data: dict[str, Data]) -> Data:
    return all_data["vqa"]


@pytest.fixture(autouse=True)
def cheap_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace layers, but generate no code, which would take half a minute."""
    monkeypatch.setattr(precision, "COMPILER", "eager")
    yield
    torch.compiler.reset()


def cell(method: str = "lora", task: str = "vqa", **options: Any) -> Cell:
    return Cell(
        method=method,
        task=task,
        dataset="digits",
        dataset_config=SCENES,
        backbone="tiny",
        backbone_config=SMALL | {"dropout": 0.1, "weights": "none"},
        recipe=Recipe(**{"steps": STEPS, "batch_size": 4, "eval_batch_size": 4, **options}),
    )


def made(method: str = "lora", task: str = "vqa", device: torch.device = CPU, **options: Any) -> TrainingSetup:
    described = cell(method, task, **options)
    backbone = build_backbone(described, device)
    return build_setup(described, backbone, TASKS.get(task)(), RunContext.on(device))[0]


def run(data: Data, **options: Any) -> TrainingResult:
    return fit(made(**options), data.train, data.validation, 1e-3)


def stepped(data: Data, **options: Any) -> tuple[TrainingState, dict[str, Tensor]]:
    """Return the training state after one step, and its gradients."""
    training, gradients = TrainingState(made(**options), data.train, 1e-3), dict[str, Tensor]()
    keep = {n: p.register_post_accumulate_grad_hook(lambda p, n=n: gradients.update({n: p.grad.clone()}))
            for n, p in training.parameters.items()}  # fmt: skip
    train_step(training)
    for hook in keep.values():
        hook.remove()
    return training, gradients


@pytest.mark.parametrize(
    ("options", "tolerance"), TOLERANCES, ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else ""
)
def test_a_cell_with_any_option_trains_to_the_same_losses_within_its_precision(
    options: dict[str, Any], tolerance: float, all_data: dict[str, Data]
) -> None:
    task = "rec" if "compile" in options else "vqa"  # generating text compiles a dozen variants of each function
    data = all_data[task]
    plain, found = dict(run(data, task=task).losses), dict(run(data, task=task, **options).losses)
    assert found and found.keys() <= plain.keys()
    if tolerance == 0:
        assert found == plain
    elif "precision" in options:
        assert found != plain
    assert all(loss == pytest.approx(plain[step], rel=tolerance) for step, loss in found.items() if step < 3)


def test_options_at_their_defaults_do_not_count_in_the_name_of_a_cell() -> None:
    assert Cell(method="lora", task="vqa", dataset="digits", backbone="tiny").digest == "8291e716"
    names = {cell(**options).id for options, _ in TOLERANCES}
    assert len(names | {cell().id}) == len(TOLERANCES) + 1


# Gradient checkpointing


def test_checkpointing_keeps_every_bit_of_losses_and_gradients_and_saves_less(data: Data) -> None:
    plain, gradients = stepped(data, method="full")
    training, found = stepped(data, method="full", gradient_checkpointing=True)
    assert training.losses == plain.losses
    assert found.keys() == gradients.keys() and all(torch.equal(found[name], gradients[name]) for name in found)
    assert training.memory and plain.memory
    assert training.memory.native_saved_bytes < plain.memory.native_saved_bytes / 2  # type: ignore[operator]


def test_canonical_figures_see_checkpointing_and_nothing_else(data: Data) -> None:
    def figures(**options: Any) -> tuple[int, Any]:
        setup = made("full", **options)
        batch = first_batch(data.train, setup)
        return canonical_saved_bytes(setup, batch), training_flops(setup, batch)

    saved, flops = figures()
    for options in ({"precision": "bf16"}, {"attention": "unfused"}, {"compile": True}):
        assert figures(**options) == (saved, flops)
    less, more = figures(gradient_checkpointing=True)
    assert less < saved / 2
    assert more.forward == flops.forward and more.backward > flops.backward


def test_stacks_of_supplied_parts_are_checkpointed_too_and_a_plain_recipe_undoes_all() -> None:
    class WithPart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.part = small_tiny(), small_tiny().stack("encoder")

    model = WithPart()
    stacks = [m for m in model.modules() if isinstance(m, Stack)]
    layers = [m for m in model.modules() if isinstance(m, Layer)]
    precision.prepare(model, Recipe(gradient_checkpointing=True, compile=True), CPU)
    assert len(stacks) == 4 and all(stack.checkpointing for stack in stacks)
    assert all(layer._compiled_call_impl is not None for layer in layers)
    precision.prepare(model, Recipe(), CPU)
    assert not any(stack.checkpointing for stack in stacks)
    assert all("_compiled_call_impl" not in vars(layer) for layer in layers)


# Precision and attention


def test_autocast_saves_fewer_bytes_and_leaves_weights_gradients_and_moments_alone(data: Data) -> None:
    plain, _ = stepped(data, batch_size=16)
    training, gradients = stepped(data, batch_size=16, precision="bf16")
    assert training.memory and plain.memory
    assert training.memory.native_saved_bytes < 0.8 * plain.memory.native_saved_bytes  # type: ignore[operator]
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    same = ("weights_bytes", "gradients_bytes", "optimizer_bytes")
    assert all(getattr(training.memory, name) == getattr(plain.memory, name) for name in same)


@pytest.mark.parametrize("use", ["train", "evaluate", "inference"])
def test_every_pass_computes_as_the_recipe_says(use: str, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []

    def note(module: nn.Module, arguments: Any) -> None:
        seen.append((torch.is_autocast_enabled("cpu"), torch.backends.cuda.flash_sdp_enabled()))

    for options, expected in (({}, (False, True)), ({"precision": "bf16", "attention": "unfused"}, (True, False))):
        setup = made(**options)
        setup.backbone.stack("encoder").layers[0].register_forward_pre_hook(note)
        seen.clear()
        if use == "train":
            train_step(TrainingState(setup, data.train, 1e-3))
        elif use == "evaluate":
            evaluate(setup, data.validation)
        else:
            monkeypatch.setattr("petlbench.training.step_costs.latency", lambda call, **_: call() or 1.0)
            inference(setup, data.validation, 2)
        assert seen and set(seen) == {expected}
        assert not torch.is_autocast_enabled("cpu") and torch.backends.cuda.flash_sdp_enabled()


def test_unfused_attention_keeps_its_maps() -> None:
    backbone = small_tiny(dropout=0.0).float().train()
    texts = backbone.texts(["the small blue square on the left of it"] * 2, 30)
    saved: dict[str, int] = {}
    for attention in ("fused", "unfused"):
        with precision.computing(Recipe(attention=attention), CPU), SavedTensors(backbone) as found:  # type: ignore[arg-type]
            backbone.fuse(backbone.embed_text(texts), task="vqa").states.sum().backward()
        saved[attention] = found.saved_bytes
    length, heads, layers = texts.ids.shape[1], 4, 2
    assert saved["unfused"] - saved["fused"] > 0.9 * layers * 2 * heads * length**2 * 4, "but for a row of sums"


@pytest.mark.parametrize(
    ("options", "config", "expected"),
    [
        ({}, {}, "cpu, fused attention, fp32"),
        ({"attention": "unfused", "precision": "fp16"}, {}, "cpu, unfused attention, fp16"),
        ({}, {"attention": "eager"}, "cpu, unfused attention, fp32"),
        (
            {"gradient_checkpointing": True, "compile": True},
            {},
            "cpu, fused attention, fp32, gradient checkpointing, compiled",
        ),
    ],
)
def test_a_record_says_what_natively_saved_bytes_depend_on(
    options: dict[str, Any], config: dict[str, Any], expected: str
) -> None:
    assert precision.backend_text(Recipe(**options), CPU, small_tiny(**config)) == expected


def test_native_bytes_of_a_step_come_with_what_they_depend_on(data: Data) -> None:
    training, _ = stepped(data, precision="bf16")
    assert training.memory and training.memory.saved_backend == "cpu, fused attention, bf16"


# Scaling of the loss in fp16


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, CUDA])])
def test_a_resumed_training_in_fp16_ends_with_the_same_bits(device: str, data: Data, tmp_path: Any) -> None:
    def start() -> TrainingSetup:
        return made(device=torch.device(device), precision="fp16", lr=1e-2)

    file = Checkpoint(tmp_path / "half.safetensors", "key", 0)
    scales: list[float] = []

    def keep(training: TrainingState) -> None:
        scales.append(training.scaler.get_scale())
        if training.step == 2:
            file.save(training.state())

    with ScaledBy(2.0**40):  # so large that it shrinks at every step
        fit(start(), data.train, data.validation, 1e-2, keep=keep)
        fit(start(), data.train, data.validation, 1e-2, resume=file.load(), keep=keep)
    assert scales == [2.0**39, 2.0**38, *[2.0**37] * 2]
    with ScaledBy(2.0**10):
        whole = fit(start(), data.train, data.validation, 1e-2, keep=keep)
        resumed = fit(start(), data.train, data.validation, 1e-2, resume=file.load())
    assert resumed.losses == whole.losses and len(whole.losses) == STEPS
    assert all(torch.equal(resumed.state[name], value) for name, value in whole.state.items())


class ScaledBy:
    """Let loss scaling start from another number."""

    def __init__(self, scale: float) -> None:
        self._scale, self._patch = scale, pytest.MonkeyPatch()

    def __enter__(self) -> None:
        def scaler(recipe: Recipe, device: torch.device) -> torch.amp.GradScaler:
            return torch.amp.GradScaler(device.type, init_scale=self._scale, enabled=recipe.precision == "fp16")

        self._patch.setattr(state, "scaler", scaler)

    def __exit__(self, *error: object) -> None:
        self._patch.undo()


def test_a_step_that_overflows_in_fp16_is_skipped_and_training_goes_on() -> None:
    here = line_setting(line_recipe(precision="fp16"))
    seen: list[tuple[float, float, int]] = []

    def keep(training: TrainingState) -> None:
        assert training.memory is not None
        seen.append((here.backbone.weight.item(), training.scaler.get_scale(), training.memory.optimizer_bytes))  # type: ignore[operator,union-attr]

    before = here.backbone.weight.item()  # type: ignore[operator,union-attr]
    with ScaledBy(2.0**20):
        found = fit(here, line_rows(), line_rows(5), lr=0.1, keep=keep)
    weights, scales, moments = zip(*seen, strict=True)
    assert weights[0] == before and scales[0] == 2**19, "skipped, and scaled by less"
    assert moments[0] == 0 and moments[-1] == 24, "accounted again, when there were moments"
    assert found.validation["fit"] > -0.01


def test_gradients_are_clipped_at_their_own_scale_and_not_at_the_loss_s() -> None:
    moved = []
    for precision_ in ("fp32", "fp16"):
        here = line_setting(line_recipe(precision=precision_, steps=1, clip_norm=1e-3, warmup=0.0, eps=1e-3))
        with ScaledBy(2.0**8):
            fit(here, line_rows(), line_rows(5), lr=0.1)
        moved.append(here.backbone.weight.item())  # type: ignore[operator,union-attr]
    assert moved[0] == pytest.approx(moved[1], rel=1e-2)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_a_loss_that_is_not_finite_still_ends_a_trial_in_the_other_precisions(kind: str) -> None:
    with pytest.raises(Diverged, match=r"the loss is (nan|inf) at step"):
        fit(line_setting(line_recipe(lr=1e30, clip_norm=1e30, precision=kind)), line_rows(), line_rows(5), lr=1e30)


def test_fp16_that_overflows_however_the_loss_is_scaled_ends_the_trial() -> None:
    here = line_setting(line_recipe(precision="fp16"))
    with torch.no_grad():
        here.backbone.weight.fill_(1e30)  # type: ignore[union-attr,operator]
    with pytest.raises(Diverged, match="fp16 overflows at step 17 of 60"):
        fit(here, line_rows(), line_rows(5), lr=0.1)


# Compilation


class Reads(nn.Module):
    """An inserted module that reads which pass it is in."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        types = current_pass().types
        assert types is not None
        return h * (1.5 + types.unsqueeze(-1))


def test_compiled_layers_keep_names_values_taps_and_the_pass() -> None:
    backbone = small_tiny()
    backbone.stack("encoder").layers[0]["attention"].insert("output", Reads())  # type: ignore[index,operator]
    names = list(backbone.state_dict())
    inputs = [backbone.embed_text(backbone.texts(["red circle", text], 30)) for text in ("a", "the small blue square")]

    def outputs() -> list[Tensor]:
        found: list[Tensor] = []
        for tokens in inputs:
            context = Pass(types=tokens.types, mask=tokens.mask, segments=tokens.segments)
            y, taps = backbone.stack("encoder").run(tokens.states, context, taps=[(1, "ffn", "normed")])
            found += [y, taps[1, "ffn", "normed"]]
        return found

    plain = outputs()
    precision.prepare(backbone, Recipe(compile=True), CPU)
    assert list(backbone.state_dict()) == names
    for one, other in zip(plain, outputs(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_layers_really_go_through_the_compiler(all_data: dict[str, Data], monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(precision, "COMPILER", backend)
    setup = made(task="rec", compile=True)
    graphs.clear()  # drop the graph of the compiler's trial
    evaluate(setup, all_data["rec"].validation)
    assert len(graphs) >= 3


def test_without_a_compiler_the_recipe_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "COMPILER", "no such compiler")
    with pytest.raises(UserError, match=r"recipe: compile: .*does not work here.*leave `compile` out") as error:
        made(compile=True)
    assert "\n" not in str(error.value)
    precision.prepare(small_tiny(), Recipe(compile=True), torch.device("meta"))


@pytest.mark.slow
def test_torch_s_own_compiler_trains_and_predicts(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "COMPILER", "inductor")
    if fault := precision._fault_of_compiler("inductor", "cpu"):
        pytest.skip(f"no compiler here: {fault}")
    found, plain = run(data, compile=True), run(data)
    assert len(found.losses) == STEPS
    assert found.losses[0][1] == pytest.approx(plain.losses[0][1], rel=5e-2), "dropout draws otherwise"
