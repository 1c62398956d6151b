"""The recipe: the options of training and evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from petlbench.core.units import parse_bytes

Positive = Annotated[int, Field(gt=0)]

Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]

Outcome = Literal["ok", "oom", "diverged", "failed", "timeout"]


class Frozen(BaseModel):
    """An immutable model in which an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Recipe(Frozen):
    """The options of training and evaluation, the same for every method unless a suite overrides them."""

    steps: Positive = Field(300, description="optimizer steps")
    batch_size: Positive = Field(32, description="training samples per step")
    eval_batch_size: Positive = Field(128, description="samples per evaluation batch")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.01, ge=0, description="AdamW decay; biases and one-dimensional gains are exempt")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW moment decays")
    eps: float = Field(1e-6, gt=0, description="AdamW epsilon")
    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps with a rising rate")
    warmup_from_zero: bool = Field(False, description="the rate of the very first step is 0, not a share of the peak")
    schedule: Literal["linear", "cosine", "constant", "step"] = Field(
        "linear", description="the rate after warm-up; step: a tenth after two thirds of the steps"
    )
    lr_floor: float = Field(0.0, ge=0, le=1, description="share of the peak rate that linear and cosine fall to")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="a layer's rate as a share of the next one's; heads, final norms: the peak"
    )
    method_lr: float = Field(
        1.0, gt=0, description="rate of the method's own parameters as a share of the rate of heads and host parts"
    )
    released: bool = Field(
        False,
        description="optimizer of VL-T5's, VL-Adapter's and VL-PET's code: decay after the update, of all "
        "parameters without `bias` in their name (also gains), eps beside the uncorrected moment, first step at rate 0",
    )
    clip_norm: float | None = Field(5.0, gt=0, description="global gradient-norm clip; null: none")
    validations: Positive = Field(1, description="evaluations on validation, evenly spaced; the best is kept for test")
    train_limit: Positive | None = Field(None, description="training rows used; all when null")
    eval_limit: Positive | None = Field(None, description="validation and test rows used; all when null")
    augment: str = Field("none", description="augmentation of training rows, named as in the task (rec: `transvg`)")
    beams: Positive = Field(1, description="beam width of generation; 1 is greedy")
    lr_factors: tuple[float, ...] = Field((1.0,), min_length=1, description="trials: lr times each; best on validation")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="precision of matrix products, by autocast; weights stay fp32; fp16 scales the loss"
    )
    attention: Literal["fused", "unfused"] = Field("fused", description="unfused attention keeps its maps for backward")
    gradient_checkpointing: bool = Field(False, description="recompute layers in backward instead of keeping tensors")
    compile: bool = Field(False, description="run layers through torch.compile; needs a C++ compiler")
