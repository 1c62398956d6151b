"""Referring expression comprehension: find the box that an expression describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api import schemas
from petlbench.api.backbone import Backbone
from petlbench.api.heads import Grounder
from petlbench.api.sites import IMAGE
from petlbench.api.task import Augmentation, Batch, Row, Scores, Task, enlarged, own_or
from petlbench.api.tokens import Tokens
from petlbench.core.drawing import draw_boxes
from petlbench.metrics.boxes import acc_at, iou_xywh, mean_iou

from .rec_augmentation import transvg, transvg_released


class PointingHead(nn.Module):
    """Points at visual tokens by a softmax; a box is their expected centre plus an offset, with a width and a height.

    (B, N, d) fused states -> (B, 4) boxes (cx, cy, w, h) in units of the backbone's image side.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.point = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        self.box = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4))

    def log_weights(self, visual: Tokens) -> Tensor:
        """Return the log-softmax (B, N) over visual tokens; other tokens have -inf."""
        scores = self.point(visual.states).squeeze(-1)
        return scores.masked_fill(~visual.mask, -torch.inf).log_softmax(-1)

    def forward(self, tokens: Tokens) -> Tensor:
        visual = tokens.of_type(IMAGE)
        weights = self.log_weights(visual).exp().unsqueeze(-1)
        offset, size = self.box((weights * visual.states).sum(1)).split(2, dim=-1)
        centre = (weights * visual.positions).sum(1)
        # Softplus, not sigmoid: on a wide image a box can be wider than the image's short side.
        return torch.cat([centre + 0.25 * offset.tanh(), F.softplus(size - 1)], dim=-1)


def corners(boxes: Tensor) -> Tensor:
    """Convert (…, 4) from cx, cy, w, h to x1, y1, x2, y2."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the generalised IoU (B,) of corners (B, 4), (B, 4). Rezatofighi et al., CVPR 2019."""
    inner = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp_min(0).prod(-1)
    area = (a[:, 2:] - a[:, :2]).prod(-1) + (b[:, 2:] - b[:, :2]).prod(-1) - inner
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(-1)
    return inner / area - (hull - area) / hull


def within_canvas(boxes: Tensor) -> Tensor:
    """Cut boxes (…, 4) cx, cy, w, h to the unit square."""
    first, last = corners(boxes).clamp(0, 1).split(2, dim=-1)
    return torch.cat([(first + last) / 2, last - first], dim=-1)


def pointing_loss(head: PointingHead, tokens: Tokens, boxes: Tensor) -> Tensor:
    """Return the cross-entropy of pointing at the visual token nearest to the centre of each box (B, 4)."""
    visual = tokens.of_type(IMAGE)
    distance = (visual.positions - boxes[:, None, :2]).norm(dim=-1).masked_fill(~visual.mask, torch.inf)
    return F.nll_loss(head.log_weights(visual), distance.argmin(-1))


class ReferringExpressions(Task):
    """TransVG's setting: L1 and GIoU losses, both of weight one, on a single box; Acc@0.5 and mean IoU.

    As in TransVG's evaluation, a Grounder's boxes are cut to its canvas, the unit square with padding included, before
    scoring; targets are not cut. The pointing head's boxes are scored uncut: its canvas depends on the backbone, and
    with `tiny` on the other images of the batch.

    `pointing` is the weight of a further loss, which only pre-training uses: from scratch, the box losses alone predict
    every box in the middle of the image for thousands of steps.
    """

    name: ClassVar[str] = "rec"
    default_dataset: ClassVar[str] = "digits"
    main_metric: ClassVar[str] = "acc_50"
    needs: ClassVar[frozenset[str]] = frozenset({"fuse", "ground"})
    features = schemas.REC
    unit: ClassVar[str] = "expressions"
    augmentations: ClassVar[Mapping[str, Augmentation]] = {
        "transvg": transvg,
        "transvg_released": transvg_released,
    }

    def __init__(self, pointing: float = 0.0) -> None:
        self.pointing = pointing

    def head(self, backbone: Backbone) -> nn.Module:
        return own_or(lambda: PointingHead(backbone.width), backbone, self.name)

    def collate(self, rows: Sequence[Row], backbone: Backbone, rng: np.random.Generator | None) -> Batch:
        pictures = [row["image"] for row in rows]
        placements = [row["placement"] for row in rows if "placement" in row]
        images = backbone.images_placed(pictures, placements) if placements else backbone.images(pictures)
        text = backbone.texts([row["expression"] for row in rows], max_length=64)
        x, y, width, height = torch.tensor([row["box"] for row in rows], dtype=torch.float32).unbind(-1)
        boxes = images.place(torch.stack([x + width / 2, y + height / 2, width, height], dim=-1))
        return Batch(images, {"expression": text}, {"boxes": boxes})

    def _fused(self, backbone: Backbone, batch: Batch) -> Tokens:
        text = backbone.embed_text(batch.texts["expression"], task=self.name)
        return backbone.fuse(text, backbone.embed_image(batch.images, task=self.name), task=self.name)

    def loss(self, backbone: Backbone, head: nn.Module, batch: Batch) -> Tensor:
        fused, boxes = self._fused(backbone, batch), batch.extras["boxes"]
        predicted = head(fused)
        giou = generalised_iou(corners(predicted), corners(boxes))
        loss = F.l1_loss(predicted, boxes, reduction="sum") / len(boxes) + (1 - giou).mean()
        if self.pointing:
            assert isinstance(head, PointingHead)
            loss = loss + self.pointing * pointing_loss(head, fused, boxes)
        return loss

    def predict(self, backbone: Backbone, head: nn.Module, batch: Batch, *, beams: int = 1) -> list[list[float]]:
        """Return boxes (x, y, width, height) in pixels of the stored image."""
        predicted = head(self._fused(backbone, batch))
        predicted = within_canvas(predicted) if isinstance(head, Grounder) else predicted
        centre, size = batch.images.unplace(predicted).split(2, dim=-1)
        boxes: list[list[float]] = torch.cat([centre - size / 2, size], dim=-1).tolist()
        return boxes

    def score(self, rows: Sequence[Row], predictions: Sequence[Any]) -> Scores:
        """Score all rows and, if they come from several subsets, each subset: `acc_50/testA`.

        A prediction that is not finite is a miss with an overlap of 0.
        """
        boxes = np.array([row["box"] for row in rows], dtype=np.float64)
        predicted = np.array(predictions, dtype=np.float64)
        ious = np.zeros(len(rows))
        finite = np.isfinite(predicted).all(axis=-1)
        ious[finite] = iou_xywh(predicted[finite], boxes[finite])
        metrics = _overlaps(ious)
        subsets = np.array([row.get("subset", "") for row in rows])
        names = sorted(set(subsets.tolist()) - {""})
        for name in names if len(names) > 1 else ():
            metrics |= {f"{metric}/{name}": value for metric, value in _overlaps(ious[subsets == name]).items()}
        samples = {"acc_50": (ious >= 0.5).astype(float).tolist(), "mean_iou": ious.tolist()}
        return Scores(metrics, samples, [row["sample_id"] for row in rows])

    def picture(self, row: Row, prediction: Any) -> tuple[Image, str]:
        """Draw the target in green and the prediction in red; the caption gives the overlap."""
        image = enlarged(row["image"])
        factor = image.width / row["image"].width
        boxes = [([factor * x for x in box], colour) for box, colour in ((row["box"], "lime"), (prediction, "red"))]
        drawn = draw_boxes(image, [(tuple(box), "", colour) for box, colour in boxes])
        overlap = iou_xywh(np.array([prediction], dtype=np.float64), np.array([row["box"]], dtype=np.float64))[0]
        return drawn, f"{row['expression']} (IoU {overlap:.2f})"


def _overlaps(ious: np.ndarray) -> dict[str, float]:
    return {"acc_50": acc_at(ious, 0.5), "mean_iou": mean_iou(ious)}
