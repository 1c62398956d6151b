"""Published figures: the file is sound, the verdicts are right, and ours equal the published ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from petlbench.api.backbone import Backbone
from petlbench.api.registries import BACKBONES, METHODS, TASKS
from petlbench.commands import main
from petlbench.core.errors import UserError
from petlbench.describe import published
from petlbench.describe.published import (
    SAVED,
    Figure,
    FigureCheck,
    failed,
    figure_table,
    read_figures,
    saved_mib,
    verify,
)
from petlbench.pipeline.assembly import build_backbone


def figure(**fields: Any) -> Figure:
    texts = {
        "method": "full",
        "variant": "",
        "method_config": "",
        "backbone": "tiny",
        "backbone_config": '{"weights": "none"}',
        "task": "vqa",
        "quantity": "trainable_parameters",
        "kind": "count",
        "value": "1",
        "unit": "parameters",
        "source": "a paper",
    }
    return Figure.model_validate(texts | fields)


def tiny_parameters() -> int:
    kind: Any = BACKBONES.get("tiny")
    with torch.device("meta"):
        return sum(p.numel() for p in kind(kind.Config(weights="none")).parameters())


@pytest.mark.parametrize(
    ("kind", "value", "ours", "verdict"),
    [
        ("count", "100", 100, "equal"),
        ("count", "100", 101, "DIFFERS"),
        ("percent", "4.18", 4.1767, "equal"),
        ("percent", "4.18", 4.1749, "DIFFERS"),
        ("percent", "2.00", 1.9969, "equal"),
        ("bytes", "480.4", 480.4 * 1.0199, "within 2 %"),
        ("bytes", "480.4", 480.4 * 0.9799, "DIFFERS"),
        ("claim", "4.4", 4.4449, "measured"),
        ("claim", "4.4", 4.1767, "contradicted"),
        ("claim", "2-3", 2.6, "measured"),
        ("claim", "2-3", 26.6, "contradicted"),
        ("claim", "57", None, "not measured"),
    ],
)
def test_each_kind_is_judged_by_its_own_measure(kind: str, value: str, ours: float | None, verdict: str) -> None:
    check = FigureCheck(figure(kind=kind, value=value), ours)
    assert check.verdict == verdict
    assert failed([check]) == (verdict == "DIFFERS")


def test_the_packaged_figures_name_what_there_is_each_once_and_with_a_source() -> None:
    figures = read_figures()
    assert len({(f.label, f.backbone, f.quantity, f.kind) for f in figures}) == len(figures) >= 110
    for one in figures:
        kind: Any = BACKBONES.get(one.backbone)
        kind.configured(one.backbone, one.cell.backbone_config)
        METHODS.get(one.method).Config(**one.cell.method_config)
        assert not one.variant or one.variant in METHODS.get(one.method).variants or one.method_config
        assert TASKS.get(one.task)().refuses(kind, kind.configured(one.backbone, one.backbone_config)) is None
        assert one.source and one.limits[0] <= one.limits[1]
        assert one.kind == "claim" or one.quantity in {*published.COUNTED, SAVED}


def test_counts_go_through_method_and_head_and_each_backbone_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    build: Callable[..., Backbone] = build_backbone

    def counting(cell: Any, device: torch.device) -> Backbone:
        built.append(device.type)
        return build(cell, device)

    monkeypatch.setattr(published, "build_backbone", counting)
    whole, host = tiny_parameters(), 96 * 96 + 3 * 96
    figures = [
        figure(value=str(whole)),
        figure(method="head_only", quantity="host_parameters", value=str(host)),
        figure(method="head_only", quantity="trainable_percent", kind="percent", value=f"{100 * host / whole:.2f}"),
        figure(quantity="hours", kind="claim", unit="GB", value="3"),
        figure(quantity="total_parameters", kind="claim", unit="million parameters", value="1.1"),
        figure(value=str(whole + 1)),
    ]
    found = verify(figures)
    assert [check.verdict for check in found] == [*["equal"] * 3, "not measured", "measured", "DIFFERS"]
    assert [check.figure for check in found] == figures
    assert built == ["meta"]


def test_a_variant_stands_for_its_options_and_for_those_that_it_needs_of_the_backbone() -> None:
    plain = figure(method="lora", variant="plain", method_config='{"rank": 4}').cell
    assert plain.method_config == {**METHODS.get("lora").variants["plain"], "rank": 4}
    frozen = figure(method="multiway_adapter", method_config='{"train_heads": false}', backbone="beit3:tiny").cell
    assert frozen.backbone_config == {"heads": "frozen", "weights": "none"}


def test_a_methods_own_effective_parameters_are_those_that_can_receive_a_gradient() -> None:
    options = '{"weights": "none", "image_size": 96}'
    quantities = ("method_parameters", published.EFFECTIVE, "trainable_parameters", "host_and_head_parameters")
    figures = [figure(method="vl_adapter", task="rec", backbone_config=options, quantity=q) for q in quantities]
    tasks = '{"tasks": ["rec", "vqa", "captioning", "retrieval"]}'
    several = {"method": "vl_adapter", "variant": "multiple", "method_config": tasks, "task": "rec"}
    figures += [figure(**several, backbone_config=options, quantity=q) for q in quantities]
    found = [check.ours for check in verify(figures)]
    own, reached, trained, others, all_own, of_task, *_ = (int(one or 0) for one in found)
    assert trained == own + others
    assert 0 < reached < own  # a referring expression decodes no word
    assert of_task == reached and all_own > 3 * own - others


def test_percentages_are_of_the_adapted_or_of_the_untouched_backbone() -> None:
    quantities = ("trainable_percent", "trainable_percent_of_untouched", "method_percent_of_untouched")
    of_all, of_untouched, own = (
        check.ours or 0.0
        for check in verify([figure(method="lora", quantity=q, kind="percent", unit="percent") for q in quantities])
    )
    whole = tiny_parameters()
    of_method = verify([figure(method="lora", quantity="method_parameters")])[0].ours or 0
    trained = verify([figure(method="lora")])[0].ours or 0
    assert (of_untouched, own) == (100 * trained / whole, 100 * of_method / whole)
    assert of_all < of_untouched


def test_variants_are_distinguished_and_the_backbone_is_left_as_it_was() -> None:
    figures = [
        figure(method="lora", variant=f"r{rank}", method_config=json.dumps({"rank": rank, "train_biases": False}))
        for rank in (2, 4)
    ]
    small, large = (check.ours for check in verify(figures))
    host = verify([figure(method="head_only")])[0].ours
    assert small and large and host
    assert 2 * (small - host) == large - host


def test_saved_bytes_are_canonical_and_beside_them_native_and_fused() -> None:
    """Attention maps grow with the square of the number of tokens; fused attention keeps none."""
    options = {"image_size": 96, "dropout": 0.1}
    cell = figure(method="full", task="rec", backbone_config=json.dumps(options)).cell
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    canonical, native = saved_mib(cell)
    assert 1 < native < canonical
    assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
    row = figure(task="rec", backbone_config=json.dumps(options), quantity=SAVED, kind="bytes", unit="MiB", value="0.1")
    (check,) = verify([row])
    assert (check.ours, check.native, check.verdict) == (canonical, native, "DIFFERS")


def test_patterns_choose_methods_and_variants() -> None:
    figures = [figure(method=name, variant=variant) for name, variant in (("full", ""), ("lora", "a"), ("lora", "b"))]
    assert [check.figure for check in verify(figures, ["lora:b"])] == figures[2:]
    assert [check.figure for check in verify(figures, ["f*", "lora:a"])] == figures[:2]
    with pytest.raises(UserError, match=r"^unknown method 'lroa': did you mean 'lora'\?"):
        verify(figures, ["lroa"])
    with pytest.raises(UserError, match=r"^there is no published figure for 'head_only': .* full, lora:a, lora:b$"):
        verify(figures, ["full", "head_only"])


def test_the_table_shows_figures_by_backbone() -> None:
    rows = [
        FigureCheck(figure(value="1234567"), 1234567),
        FigureCheck(figure(kind="percent", unit="percent", quantity="trainable_percent", value="4.18"), 4.1767),
        FigureCheck(figure(kind="bytes", unit="MiB", quantity=SAVED, value="480.4"), 480.1, 300.25),
        FigureCheck(figure(kind="claim", unit="percent", value="2-3", backbone="beit3"), None),
    ]
    console = Console(width=300, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(figure_table(rows))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert lines[0] == 'tiny weights="none"'
    assert "full trainable_parameters 1,234,567 parameters 1,234,567 0 equal a paper" in lines
    assert "full trainable_percent 4.18 percent 4.18 0 equal a paper" in lines
    fused = "a paper; natively with fused attention, its own dropout off: 300.2 MiB"
    assert f"full {SAVED} 480.4 MiB 480.1 -0.3 within 2 % {fused}" in lines
    assert 'beit3 weights="none"' in lines
    assert "full trainable_parameters 2-3 percent not measured a paper" in lines


@pytest.mark.parametrize(("surplus", "status"), [(0, 0), (1, 1)])
def test_the_command_ends_with_1_when_a_figure_differs(
    surplus: int, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ",".join(Figure.model_fields)
    row = f"full,,,tiny,,vqa,trainable_parameters,count,{tiny_parameters() + surplus},parameters,a paper"
    path = tmp_path / "figures.csv"
    path.write_text(f"{names}\n{row}\n")
    figures = read_figures(path)
    monkeypatch.setattr(published, "read_figures", lambda: figures)
    assert main.main(["verify", "published", "--json"]) == status
    (shown,) = json.loads(capsys.readouterr().out)
    assert (shown["verdict"], shown["difference"]) == (("equal", 0), ("DIFFERS", -1))[surplus]
    assert main.main(["verify", "published", "--methods", "fulll"]) == 2
    assert capsys.readouterr().err == (
        "petlbench: error: unknown method 'fulll': did you mean 'full'? `petlbench list methods` shows all\n"
    )


def test_every_published_count_and_percentage_is_met() -> None:
    found = verify([one for one in read_figures() if one.quantity != SAVED])
    assert {row.figure.backbone.partition(":")[0] for row in found} == {"vl_bart", "vl_t5", "transvg", "beit3", "clip"}
    assert [row.as_json() for row in found if row.verdict == "DIFFERS"] == []


@pytest.mark.slow
def test_published_saved_bytes_are_met() -> None:
    found = verify([one for one in read_figures() if one.quantity == SAVED])
    assert found and [row.verdict for row in found] == ["within 2 %"] * len(found)
    assert all(row.native and row.ours and row.native < row.ours for row in found)
