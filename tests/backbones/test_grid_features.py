"""Grid features of CLIP's ResNet, live and from disk."""

from __future__ import annotations

import errno
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor, nn

open_clip = pytest.importorskip("open_clip")

from open_clip.modified_resnet import ModifiedResNet  # noqa: E402

from petlbench.api.tokens import Images  # noqa: E402
from petlbench.backbones.parts import grid_features  # noqa: E402
from petlbench.backbones.parts.feature_cache import FeatureCache, image_digest  # noqa: E402
from petlbench.backbones.parts.grid_features import GridFeatures, as_buffers  # noqa: E402
from petlbench.core.errors import Unwritable, UserError  # noqa: E402
from petlbench.measure import memory, parameters  # noqa: E402

SIDE = 64
SHAPE = (4, 128)


@pytest.fixture(autouse=True)
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PETLBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tiny(weights: str = "none", *, seed: int = 0, side: int = SIDE, fit: str = "crop", cached: bool = False) -> Any:
    torch.manual_seed(seed)
    return GridFeatures("tiny", side, weights, cached=cached, fit=fit)


def picture(seed: int = 0, size: tuple[int, int] = (90, 70), mode: str = "RGB") -> Image.Image:
    """Return smooth noise, which resizing changes little."""
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    return noise.resize(size, Image.Resampling.BICUBIC).convert(mode)


def pictures(count: int) -> list[Image.Image]:
    return [picture(seed) for seed in range(count)]


def published(seed: int = 1) -> ModifiedResNet:
    """Return open_clip's own network with attention pooling; no value is the initial one."""
    torch.manual_seed(seed)
    network = ModifiedResNet([1, 1, 1, 1], output_dim=8, heads=4, image_size=SIDE, width=4).eval()
    for name, tensor in network.state_dict().items():
        if name.endswith(("bias", "running_mean")):
            tensor.normal_()
        elif name.endswith("running_var") or (tensor.ndim == 1 and tensor.is_floating_point()):
            tensor.uniform_(0.5, 1.5)
        elif tensor.ndim == 4:
            nn.init.kaiming_normal_(tensor)
    return network


def before_pooling(network: ModifiedResNet, pixels: Tensor) -> Tensor:
    kept: list[Tensor] = []
    handle = network.layer4.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        network(pixels)
    handle.remove()
    return kept[0]


def runs(features: GridFeatures) -> list[int]:
    """Return a list that gets the number of images at every run of the network."""
    seen: list[int] = []
    features.cnn.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    return seen


def kept_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


# --- the network


def save_whole(tensors: dict[str, Tensor], folder: Path) -> Path:
    text = {"text_projection": torch.ones(3), "logit_scale": torch.ones(1)}
    save_file({**{f"visual.{name}": t for name, t in tensors.items()}, **text}, folder / "clip.safetensors")
    return folder / "clip.safetensors"


def save_visual(tensors: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"state_dict": tensors}, folder / "visual.pt")
    return folder / "visual.pt"


def save_half_without_counters(tensors: dict[str, Tensor], folder: Path) -> Path:
    """Save in half precision as OpenAI did; values that half precision can hold stay equal."""
    bare = {name: t for name, t in tensors.items() if not name.endswith("num_batches_tracked")}
    for tensor in bare.values():
        tensor.copy_(tensor.half())
    save_file({name: t.half() for name, t in bare.items()}, folder / "half.safetensors")
    return folder / "half.safetensors"


@pytest.mark.parametrize("save", [save_whole, save_visual, save_half_without_counters])
def test_features_are_what_open_clips_network_has_before_attention_pooling(
    save: Callable[[dict[str, Tensor], Path], Path], tmp_path: Path
) -> None:
    network = published()
    features = tiny(str(save(network.state_dict(), tmp_path))).double()
    images = features.images(pictures(3)).to_dtype(torch.float64)
    found = features(images)
    stage = before_pooling(network.double(), images.pixels)
    assert found.shape == (3, *SHAPE) == (3, features.grid**2, features.channels) and found.dtype == torch.float64
    for row, column in ((0, 0), (0, 1), (1, 0)):  # row by row from the upper left
        torch.testing.assert_close(found[:, 2 * row + column], stage[:, :, row, column], rtol=0, atol=1e-9)
    assert stage.std() > 0.1


def test_rn101_is_the_published_network_and_gives_7_x_7_x_2048() -> None:
    with torch.device("meta"):
        features = GridFeatures("RN101", 224, "pretrained", cached=False, fit="crop")
        network = ModifiedResNet([3, 4, 23, 3], output_dim=512, heads=32, image_size=224, width=64)
        out = features(Images(torch.empty(2, 3, 224, 224), *torch.empty(3, 2)))
    own = {name: t.shape for name, t in features.cnn.state_dict().items()}
    theirs = {name: t.shape for name, t in network.state_dict().items() if not name.startswith("attnpool.")}
    assert own == theirs
    assert out.shape == (2, 49, 2048) and (features.grid, features.channels) == (7, 2048)


def test_random_weights_keep_the_scale_of_the_pixels() -> None:
    features = tiny()
    images = features.images(pictures(4))
    assert 0.1 < features(images).std() / images.pixels.std() < 10


def test_all_tensors_are_buffers_that_weigh_but_are_never_counted() -> None:
    features = tiny()
    assert not list(features.parameters())
    assert parameters.count(features, None, set()).total == 0
    tensors = ModifiedResNet([1, 1, 1, 1], output_dim=1, heads=1, width=4).state_dict()
    tensors = {name: t for name, t in tensors.items() if not name.startswith("attnpool.")}
    assert set(features.state_dict()) == {f"cnn.{name}" for name in tensors}
    expected = sum(t.numel() * t.element_size() for t in tensors.values())
    assert memory.planned([features]).weights_bytes == expected
    moved = features.to(torch.bfloat16)
    assert {t.dtype for t in moved.buffers() if t.is_floating_point()} == {torch.bfloat16}
    assert moved(moved.images(pictures(1))).dtype == torch.bfloat16


def test_a_shared_parameter_stays_one_tensor_and_an_absent_one_absent() -> None:
    module = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3)])
    module[1].weight = module[0].weight  # type: ignore[assignment]
    as_buffers(module)
    assert module[0].weight is module[1].weight and module[0].bias is None
    assert set(module.state_dict()) == {"0.weight", "1.weight", "1.bias"}


def test_training_changes_nothing_and_reaches_nothing() -> None:
    features = tiny()
    images = features.images(pictures(3))
    before = {name: t.clone() for name, t in features.state_dict().items()}
    expected = features(images)
    parent = nn.ModuleList([features]).train()
    assert parent.training and not any(module.training for module in features.modules())
    images.pixels.requires_grad_()
    found = features(images)
    assert torch.equal(found, expected) and not found.requires_grad
    assert all(torch.equal(t, before[name]) for name, t in features.state_dict().items())


# --- an image's pixels and places


@pytest.mark.parametrize(
    ("size", "mode"),
    [((90, 70), "RGB"), ((70, 131), "RGB"), ((64, 64), "RGB"), ((33, 40), "RGB"), ((301, 64), "RGB"), ((99, 70), "L")],
)
@pytest.mark.parametrize(("fit", "mode_of_open_clip"), [("crop", "shortest"), ("squash", "squash")])
def test_pixels_are_open_clips(size: tuple[int, int], mode: str, fit: str, mode_of_open_clip: str) -> None:
    image = picture(3, size, mode)
    transform = open_clip.image_transform(
        SIDE,
        is_train=False,
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
        resize_mode=mode_of_open_clip,
        interpolation="bicubic",
    )
    images = tiny(fit=fit).images([image])
    assert images.mask.shape == (1, SIDE, SIDE) and images.mask.all()
    torch.testing.assert_close(images.pixels[0], transform(image), rtol=0, atol=2e-6)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("size", [(128, 256), (300, 128), (150, 150)])
@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_points_of_the_stored_image_are_where_its_pixels_are(size: tuple[int, int], fit: str, cached: bool) -> None:
    image = Image.new("RGB", size)
    middle = [length // 2 for length in size]
    corners = (middle[0] - 30, middle[1] - 16, middle[0] + 10, middle[1] + 40)  # of a box of 40 x 56
    ImageDraw.Draw(image).rectangle((*corners[:2], corners[2] - 1, corners[3] - 1), fill="white")
    bright = tiny(fit=fit).images([image]).pixels[0, 0] > 0
    rows, columns = (torch.nonzero(bright.any(dim))[:, 0] for dim in (1, 0))
    seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    box = torch.tensor([[middle[0] - 10, middle[1] + 12, 40, 56]], dtype=torch.float32)
    cx, cy, w, h = tiny(fit=fit, cached=cached).images([image]).place(box)[0] * SIDE
    placed = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
    assert max(abs(float(a) - float(b)) for a, b in zip(seen, placed, strict=True)) < 0.75


def test_what_the_crop_cuts_off_lies_outside_the_unit_square() -> None:
    images = tiny().images([Image.new("RGB", (200, 100)), Image.new("RGB", (100, 200))])
    corners = images.place(torch.tensor([[0.0, 0, 0, 0], [100, 200, 0, 0]]))
    torch.testing.assert_close(corners[:, :2], torch.tensor([[-0.5, 0.0], [1.0, 1.5]]), rtol=0, atol=1e-6)


# --- kept on disk


def test_the_network_runs_once_per_image_whoever_asks(cache_root: Path) -> None:
    features = tiny(cached=True)
    seen = runs(features)
    a, b, c = pictures(3)
    first = features.images([a, b, a.copy()])
    assert seen == [2]  # in one batch, and the same image once
    second = features.images([b, c, a])
    assert seen == [2, 1]
    assert torch.equal(first.features[[1, 0]], second.features[[0, 2]])
    again = tiny(cached=True)
    seen = runs(again)
    assert torch.equal(again.images([a, b, c]).features, second.features[[2, 0, 1]]) and seen == []
    folder = cache_root / "features" / features.fingerprint()
    assert kept_files(cache_root) == sorted(
        folder / image_digest(image)[:2] / f"{image_digest(image)}.npy" for image in (a, b, c)
    )


def test_cached_is_live_rounded_to_float16_and_carries_no_pixels() -> None:
    live, cached = tiny(), tiny(cached=True)
    images = cached.images(pictures(3))
    assert images.pixels.numel() == 0 == images.mask.numel() and len(images.pixels) == 3
    assert images.features.dtype == torch.float16 and images.features.shape == (3, *SHAPE)
    expected = live(live.images(pictures(3)))
    found = cached(images)
    assert found.dtype == torch.float32 and found.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=2**-10, atol=2**-24)
    assert not torch.equal(found, expected)
    assert cached.double()(images.to_dtype(torch.float64)).dtype == torch.float64
    assert (live.note, cached.note) == ("image features: live", "image features: cached, float16")
    torch.testing.assert_close(images.scale, live.images(pictures(3)).scale)
    torch.testing.assert_close(images.offset, live.images(pictures(3)).offset)


def test_a_training_step_on_cached_features_is_the_live_one_and_runs_no_network() -> None:
    torch.manual_seed(2)
    losses, gradients = [], []
    head = nn.Linear(SHAPE[1], 5)
    for features in (tiny(), tiny(cached=True)):
        images = features.images(pictures(4))
        seen = runs(features)
        head.zero_grad()
        loss = head(features(images)).square().mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append(head.weight.grad.clone())  # type: ignore[union-attr]
    assert seen == []  # the second's
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-4)


def test_stored_features_do_not_depend_on_the_callers_autocast() -> None:
    features = tiny(cached=True)
    with torch.autocast("cpu", torch.bfloat16):
        under = features.images(pictures(2)).features
    expected = features(tiny().images(pictures(2))).half()
    torch.testing.assert_close(under, expected, rtol=2**-9, atol=2**-23)


def test_a_fingerprint_covers_weights_and_preprocessing_and_nothing_else(tmp_path: Path) -> None:
    same = tiny().fingerprint()
    assert same == tiny().fingerprint() == tiny(cached=True).train().fingerprint()
    others = {
        tiny(seed=1).fingerprint(),
        tiny(side=96).fingerprint(),
        tiny(fit="squash").fingerprint(),
        tiny().double().fingerprint(),
        tiny(str(save_whole(published().state_dict(), tmp_path))).fingerprint(),
    }
    assert len(others | {same}) == 6


def test_a_fingerprint_is_computed_once_and_follows_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    features, other = tiny(), tiny(seed=1)
    before = features.fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(grid_features.hashlib, "sha256", lambda data: pytest.fail("computed again"))
        assert features.fingerprint() == before
    features.load_state_dict(other.state_dict())
    assert features.fingerprint() == other.fingerprint()
    features.cnn.bn1.bias[0] += 1
    assert features.fingerprint() not in (before, other.fingerprint())
    features.cnn.bn1.bias[0] -= 1
    features.half().float().load_state_dict(other.state_dict())
    assert features.fingerprint() == other.fingerprint()


def test_other_weights_never_read_what_the_first_stored() -> None:
    one, two = tiny(cached=True), tiny(cached=True, seed=1)
    assert not torch.equal(one.images(pictures(1)).features, two.images(pictures(1)).features)


def test_an_image_is_identified_by_its_pixels() -> None:
    image = picture()
    assert image_digest(image) == image_digest(image.copy())
    assert image_digest(image) == image_digest(image.convert("RGBA"))
    assert image_digest(Image.new("RGB", (6, 4))) != image_digest(Image.new("RGB", (4, 6)))
    indices = Image.new("P", (4, 4), 1)
    digests = set()
    for colour in (10, 20):
        indices.putpalette([0, 0, 0, colour, 0, 0])
        digests.add(image_digest(indices))
    assert len(digests) == 2


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _header_only(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def _zeros(path: Path) -> None:
    path.write_bytes(bytes(len(path.read_bytes())))


def _unbalanced(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"}", b"(", 1))


def _other_shape(path: Path) -> None:
    np.save(path, np.ones((SHAPE[1], SHAPE[0]), np.float16))


def _other_type(path: Path) -> None:
    np.save(path, np.ones(SHAPE, np.float32))


def _archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, np.ones(SHAPE, np.float16))


def _pickle(path: Path) -> None:
    np.save(path, np.array([None]), allow_pickle=True)


@pytest.mark.parametrize(
    "damage",
    [_empty, _truncated, _header_only, _zeros, _unbalanced, _other_shape, _other_type, _archive, _pickle],
)
def test_a_damaged_file_is_computed_anew_and_replaced(damage: Callable[[Path], None], cache_root: Path) -> None:
    features = tiny(cached=True)
    for picture in pictures(2):  # each alone, because it is computed again: a larger batch may round differently
        features.images([picture])
    expected = features.images(pictures(2)).features
    file = kept_files(cache_root)[0]
    whole = file.read_bytes()
    damage(file)
    seen = runs(features)
    assert torch.equal(features.images(pictures(2)).features, expected)
    assert seen == [1] and file.read_bytes() == whole


def test_writers_of_the_same_files_do_not_disturb_each_other(tmp_path: Path) -> None:
    images = pictures(12)
    values = {image_digest(image): np.float16(index) for index, image in enumerate(images)}

    def compute(unseen: list[Image.Image]) -> Tensor:
        return torch.stack([torch.full(SHAPE, float(values[image_digest(image)])) for image in unseen])

    def work(turn: int) -> Tensor:
        return FeatureCache(tmp_path / "kept", SHAPE).get(images[turn:] + images[:turn], compute)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(8)))
    for turn, rows in enumerate(found):
        assert rows[:, 0, 0].tolist() == [(turn + index) % 12 for index in range(12)]
    assert len(kept_files(tmp_path)) == 12  # and nothing temporary


def test_a_cache_that_cannot_be_written_ends_the_run_in_one_line(cache_root: Path) -> None:
    cache_root.write_bytes(b"a file where the folder should be")
    with pytest.raises(Unwritable, match=r"cannot write to folder .*features") as caught:
        tiny(cached=True).images(pictures(1))
    assert "\n" not in str(caught.value)


def test_a_full_disk_ends_the_run_and_leaves_no_half_file(monkeypatch: pytest.MonkeyPatch, cache_root: Path) -> None:
    def full(*paths: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(Unwritable, match="No space left on device"):
        tiny(cached=True).images(pictures(1))
    assert kept_files(cache_root) == []


def test_a_cache_that_is_complete_is_only_read(monkeypatch: pytest.MonkeyPatch) -> None:
    features = tiny(cached=True)
    expected = features.images(pictures(2)).features
    monkeypatch.setattr(FeatureCache, "write", lambda *args: pytest.fail("written again"))
    assert torch.equal(features.images(pictures(2)).features, expected)


@pytest.mark.parametrize("value", [1e6, math.nan])
def test_values_that_float16_cannot_hold_are_refused_not_kept(value: float, cache_root: Path) -> None:
    features = tiny(cached=True)
    features.cnn.layer4[0].bn3.bias.fill_(value)
    with pytest.raises(UserError, match="float16"):
        features.images(pictures(1))
    assert kept_files(cache_root) == []


def test_on_meta_nothing_is_read_computed_or_kept(cache_root: Path) -> None:
    with torch.device("meta"):
        features = GridFeatures("tiny", SIDE, "/no/such/file", cached=True, fit="crop")
    images = features.images(pictures(2)).to(torch.device("meta"))
    assert features(images).shape == (2, *SHAPE) and features(images).is_meta
    assert not cache_root.exists()


# --- what a user can fix


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cnn": "RN102"}, "unknown CNN 'RN102': did you mean 'RN101'?"),
        ({"cnn": "ViT-B-32"}, "unknown CNN 'ViT-B-32': choose one of RN50, "),
        ({"image_size": 100}, "image_size 100 does not divide into cells: choose a multiple of 32"),
        ({"image_size": 0}, "choose a multiple of 32"),
        ({"fit": "corp"}, "unknown fit 'corp': did you mean 'crop'?"),
        ({"fit": "pad"}, "unknown fit 'pad': choose crop or squash"),
        ({"weights": "/no/such.safetensors"}, "'/no/such.safetensors' does not exist"),
        ({"weights": "pretrained"}, "CNN 'tiny' has no published weights: give the path of a file, or 'none'"),
    ],
)
def test_a_wrong_option_is_named_in_one_line(arguments: dict[str, Any], message: str) -> None:
    options = {"cnn": "tiny", "image_size": SIDE, "weights": "none", "cached": False, "fit": "crop", **arguments}
    with pytest.raises(UserError) as caught:
        GridFeatures(**options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = ModifiedResNet([1, 2, 1, 1], output_dim=8, heads=4, image_size=SIDE, width=4)
    with pytest.raises(UserError, match=r"visual.pt do not fit this configuration: \d+ unexpected \(layer2.1.conv1"):
        tiny(str(save_visual(other.state_dict(), tmp_path)))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the local cache of a hub with weights for `tiny`: the folder of one revision, still empty."""
    found = {"hf_hub": "timm/tiny_clip.openai/"}
    monkeypatch.setattr("open_clip.pretrained.get_pretrained_cfg", lambda model, tag: found)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--timm--tiny_clip.openai"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    (repository / "snapshots" / "0123").mkdir(parents=True)
    return repository / "snapshots" / "0123"


def test_published_weights_on_this_machine_need_no_network(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_clip.pretrained.download_pretrained", lambda source: pytest.fail("fetched"))
    network = published()
    file = save_whole(network.state_dict(), hub).rename(hub / "open_clip_model.safetensors")
    assert GridFeatures.files("tiny", "pretrained") == [file]
    found = tiny("pretrained").cnn.state_dict()
    assert found and all(torch.equal(t, network.state_dict()[name]) for name, t in found.items())


def test_published_weights_that_cannot_be_fetched_say_what_to_put_where(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: dict[str, Any]) -> str:
        raise FileNotFoundError("Failed to download file.\nLast error: no network. Try again.")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", refuse)
    with pytest.raises(UserError) as caught:
        tiny("pretrained")
    message = str(caught.value)
    with pytest.raises(UserError, match=re.escape(message)):  # before anything runs
        GridFeatures.files("tiny", "pretrained")
    assert "open_clip_model.safetensors of timm/tiny_clip.openai" in message and "HF_HOME" in message
    assert "\n" not in message


def test_files_are_the_weights_that_were_named(tmp_path: Path) -> None:
    path = save_visual(published().state_dict(), tmp_path)
    assert GridFeatures.files("tiny", "none") == []
    assert GridFeatures.files("tiny", str(path)) == [path]
    with pytest.raises(UserError, match="does not exist"):
        GridFeatures.files("tiny", str(tmp_path / "gone.pt"))
