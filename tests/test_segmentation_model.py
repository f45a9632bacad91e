"""SAM without prompts: the official layout, the package's own output, files, and the task."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from snella.data.prepared import Prepared
from snella.errors import UserError
from snella.models.sam import (
    MEAN,
    STD,
    build_sam,
    load_sam,
    mask_logits,
    sam_sizes,
)
from snella.tasks.base import Backbone, DatasetSpec
from snella.tasks.segmentation import TASK
from snella.tasks.segmentation.masks import resize_image, resize_mask
from snella.tasks.segmentation.score import SegmentationScorer
from snella.tasks.segmentation.task import Segmentation
from snella.tasks.segmentation.toy import SIZES, toy

segment_anything = pytest.importorskip("segment_anything")
GOLDEN = Path(__file__).parent / "golden" / "spt_gps" / "segmentation_sam.npz"


@pytest.mark.parametrize("size", ["b", "l", "h"])
def test_the_published_sizes_have_the_official_layout(size: str) -> None:
    with torch.device("meta"):
        ours = build_sam(f"sam_vit_{size}").state_dict()
        official = segment_anything.sam_model_registry[f"vit_{size}"]().state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in official.items()}


def test_parameters_are_those_of_the_reference() -> None:
    with torch.device("meta"):
        model = build_sam("sam_vit_b")
    count = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children()}
    assert count["image_encoder"] == 89_670_912
    assert count["mask_decoder"] == 4_058_340
    assert model.prompt_encoder.no_mask_embed.weight.numel() == 256


def test_logits_are_those_of_the_package_without_prompts() -> None:
    torch.manual_seed(0)
    model = build_sam("sam_vit", SIZES).eval()
    torch.nn.init.normal_(model.image_encoder.pos_embed)
    pixels = torch.randint(0, 256, (3, 3, 32, 32)).float()
    records = [{"image": image, "original_size": (32, 32)} for image in pixels]
    expected = torch.cat([r["low_res_logits"][:, 0] for r in model(records, False)])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    got = mask_logits(model, (pixels / 255 - mean) / std)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_resizing_is_the_released_codes() -> None:
    golden = np.load(GOLDEN, allow_pickle=False)
    small = resize_image(golden["raw_image"], 32).transpose(2, 0, 1) / 255
    normal = (small - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    np.testing.assert_allclose(normal, golden["resized_image"], atol=1e-5)
    mask = resize_mask(golden["raw_mask"] > 128, 32)
    np.testing.assert_array_equal(mask, golden["resized_mask"][0] * 255 > 128)


# ------------------------------------------------------------------------------------ files


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    model = build_sam("sam_vit", SIZES)
    for name, parameter in model.named_parameters():
        if "pos_embed" in name or "rel_pos" in name:
            torch.nn.init.normal_(parameter)
    torch.save(model.state_dict(), tmp_path / "sam.pth")
    return tmp_path / "sam.pth"


def test_a_checkpoint_loads_and_another_image_size_interpolates_positions(file: Path) -> None:
    saved = torch.load(file, weights_only=True)
    model = load_sam("sam_vit", SIZES, 32, file.as_posix())
    assert all(torch.equal(t, saved[n]) for n, t in model.state_dict().items())
    larger = load_sam("sam_vit", SIZES, 64, file.as_posix()).state_dict()
    assert larger["image_encoder.pos_embed"].shape == (1, 8, 8, 96)
    assert larger["image_encoder.blocks.1.attn.rel_pos_h"].shape[0] == 15  # global attention
    window = "image_encoder.blocks.0.attn.rel_pos_h"
    assert torch.equal(larger[window], saved[window])
    with torch.no_grad():
        assert mask_logits(load_sam("sam_vit", SIZES, 64, file.as_posix()), torch.zeros(1, 3, 64, 64))[0].shape == (32, 32)  # fmt: skip # noqa: E501


def test_wrong_checkpoints_are_one_clear_line(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no sam_vit: .* there and .* here"):
        load_sam("sam_vit", {**SIZES, "encoder_dim": 48}, 32, file.as_posix())
    large = {"image_encoder.pos_embed": torch.zeros(1, 64, 64, 1024)}
    torch.save(large, tmp_path / "large.pth")
    with pytest.raises(UserError, match="it looks like sam_vit_l"), torch.device("meta"):
        load_sam("sam_vit_b", {}, 1024, (tmp_path / "large.pth").as_posix())
    state = torch.load(file, weights_only=True)
    state.pop("mask_decoder.iou_token.weight")
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"it lacks mask_decoder.iou_token.weight; correct `arch:`"):
        load_sam("sam_vit", SIZES, 32, (tmp_path / "less.pth").as_posix())
    cut = tmp_path / "cut.pth"
    cut.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="damaged"):
        load_sam("sam_vit", SIZES, 32, cut.as_posix())
    with pytest.raises(UserError, match="is missing"):
        load_sam("sam_vit", SIZES, 32, (tmp_path / "none.pth").as_posix())
    with pytest.raises(UserError, match=r"is a folder; name a file in segment-anything's"):
        load_sam("sam_vit", SIZES, 32, tmp_path.as_posix())


@pytest.mark.parametrize(
    ("name", "shape"),
    [("pos_embed", (1, 2, 8, 96)), ("pos_embed", (1, 3, 3, 96)),
     ("blocks.1.attn.rel_pos_h", (9, 48)), ("blocks.0.attn.rel_pos_w", (9, 48))],
)  # fmt: skip
def test_only_tables_of_the_sizes_that_are_said_are_interpolated(
    file: Path, tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    state = torch.load(file, weights_only=True)
    width = state[f"image_encoder.{name}"].shape[-1]
    state[f"image_encoder.{name}"] = torch.zeros(*shape[:-1], width)
    torch.save(state, tmp_path / "other.pth")
    for image_size in (32, 64):
        with pytest.raises(UserError, match=rf"{re.escape(name)} is .* there and .* here"):
            load_sam("sam_vit", SIZES, image_size, (tmp_path / "other.pth").as_posix())


@pytest.mark.parametrize(
    ("arch", "kwargs", "message"),
    [
        ("sam_vit_x", {}, "Did you mean 'sam_vit_"),
        ("sam_vit", {}, "kwargs lack encoder_dim"),
        ("sam_vit_b", {"windows_size": 7}, "Did you mean 'window_size'"),
        ("sam_vit_b", {"image_size": 100}, "not a multiple of the patch size"),
    ],
)
def test_wrong_sizes_are_one_clear_line(arch: str, kwargs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sam_sizes(arch, kwargs)


# ------------------------------------------------------------------------------------- task


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Prepared:
    folder = tmp_path_factory.mktemp("prepared") / "polyps"
    TASK.prepare("polyps", DatasetSpec(kind="quick", task="segmentation"), folder)
    return Prepared.open(folder)


def task(data: Prepared, **settings) -> Segmentation:
    return Segmentation(data, TASK.settings(image_size=32, **settings), batch_size=24)


def model_of(task: Segmentation) -> torch.nn.Module:
    torch.manual_seed(2)
    return task.build_model(Backbone(name="tiny", arch="sam_vit", kwargs=SIZES)).eval()


def test_batches_hold_every_image_once_and_depend_on_the_seed_alone(data: Prepared) -> None:
    plain = task(data, augmentation="none")
    found = [batch["image"] for batch in plain.batches("train", 5)]
    assert [len(b) for b in found] == [24] * 5 + [8] and plain.steps("train") == 6
    again = [batch["image"] for batch in plain.batches("train", 5)]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    ordered = torch.cat([batch["image"] for batch in plain.batches("train", None)])
    sums = torch.cat(found).sum((1, 2, 3))
    torch.testing.assert_close(sums.sort()[0], ordered.sum((1, 2, 3)).sort()[0])


def test_flips_mirror_image_and_mask_together(data: Prepared) -> None:
    plain = next(task(data, augmentation="none").batches("train", 5))
    flipped = next(task(data).batches("train", 5))
    mirrored = [
        not torch.equal(a, b) for a, b in zip(plain["image"], flipped["image"], strict=True)
    ]
    assert 4 < sum(mirrored) < 20
    for i, was in enumerate(mirrored):
        for name in ("image", "mask"):
            expected = plain[name][i].flip(-1) if was else plain[name][i]
            assert torch.equal(flipped[name][i], expected)
    # and what is kept for the next epoch is not what was mirrored
    repeated = task(data)
    first = next(repeated.batches("train", 5))["image"]
    assert torch.equal(next(repeated.batches("train", 5))["image"], first)


def test_the_loss_is_float32_under_mixed_precision(data: Prepared) -> None:
    """A mean over a million pixels needs more digits than bf16 has."""
    plain = task(data)
    model, batch = model_of(plain), next(plain.batches("train", 0))
    with torch.autocast("cpu", torch.bfloat16):
        assert plain.forward(model, batch).dtype == torch.bfloat16
        loss = plain.loss(model, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain.loss(model, batch), rtol=0.02, atol=0.02)


def test_prediction_resumes_where_it_was_killed(data: Prepared, tmp_path: Path) -> None:
    segmentation = task(data)
    model = model_of(segmentation)
    assert segmentation.predict(model, "test", tmp_path / "whole") == 96
    whole = (tmp_path / "whole" / "masks.bin").read_bytes()
    assert segmentation.predict(model, "test", tmp_path / "cut") == 96
    (tmp_path / "cut" / "masks.bin").write_bytes(whole[: len(whole) // 2])
    seen: list[int] = []
    model.image_encoder.register_forward_hook(lambda m, inputs, out: seen.append(len(out)))
    segmentation.predict(model, "test", tmp_path / "cut")
    assert (tmp_path / "cut" / "masks.bin").read_bytes() == whole
    assert 0 < sum(seen) < 60
    segmentation.predict(model, "test", tmp_path / "cut")
    assert sum(seen) < 60, "a finished prediction was repeated"


def test_another_models_prediction_starts_again(data: Prepared, tmp_path: Path) -> None:
    segmentation = task(data)
    model = model_of(segmentation)
    segmentation.predict(model, "val", tmp_path)
    before = (tmp_path / "masks.bin").read_bytes()
    with torch.no_grad():
        model.mask_decoder.output_upscaling[3].bias.add_(0.3)
    segmentation.predict(model, "val", tmp_path)
    assert (tmp_path / "masks.bin").read_bytes() != before


def test_collapse_on_the_validation_split_is_warned_about(
    data: Prepared, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    segmentation = task(data)
    model = model_of(segmentation)
    last = model.mask_decoder.output_hypernetworks_mlps[0].layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()  # logits of zero: nothing is above one half
    with caplog.at_level("WARNING", logger="snella"):
        segmentation.predict(model, "val", tmp_path / "val")
    assert "Validation: the masks of most images are empty" in caplog.text
    scores = SegmentationScorer(data, segmentation.settings).score(tmp_path / "val", "val")
    assert scores["dice"].value == 0.0 and "collapsed" in scores["dice"].warnings[0]


def test_nan_and_lack_of_memory_in_prediction_say_what_to_do(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN would pass for an empty mask."""
    segmentation = task(data)
    model = model_of(segmentation)
    with torch.no_grad():
        model.mask_decoder.output_upscaling[3].bias.fill_(float("nan"))
    with pytest.raises(UserError, match=r"predicts NaN: half precision.*`precision: bf16`"):
        segmentation.predict(model, "val", tmp_path / "nan")

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("snella.tasks.segmentation.task.mask_logits", full)
    with pytest.raises(torch.OutOfMemoryError, match="while predicting 32 images of 32 pix"):
        segmentation.predict(model, "val", tmp_path / "oom")


def test_stored_masks_are_the_models(data: Prepared, tmp_path: Path) -> None:
    from snella.models.sam import upsample
    from snella.tasks.segmentation.predictions import read_predictions

    segmentation = task(data)
    model = model_of(segmentation)
    segmentation.predict(model, "val", tmp_path)
    batch = next(segmentation.batches("val", None))
    with torch.no_grad():
        low = segmentation.forward(model, batch)
    sizes = data.column("val", "size").tolist()
    found = list(read_predictions(tmp_path, sizes))[: len(low)]
    ours = torch.stack([torch.from_numpy(p.mask) for p in found])
    assert (ours != (upsample(low, (96, 96)) > 0)).float().mean() < 1e-4
    maps = torch.stack([torch.from_numpy(p.probabilities.copy()) for p in found])
    assert (maps / 255 - torch.sigmoid(low)).abs().max() < 0.5 / 255 + 1e-4


def test_the_toy_is_learnt_by_heart() -> None:
    subject = toy("sam")
    optimizer = torch.optim.AdamW(subject.model.parameters(), lr=3e-3)
    first = subject.loss(subject.model, subject.batch).item()
    for _ in range(25):
        loss = subject.loss(subject.model, subject.batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7 * first
    with pytest.raises(UserError, match="not vit"):
        toy("vit")


def test_trainable_parameters_are_those_of_the_released_code() -> None:
    """Full, SSF and GPS on ViT-B: the decoder and the no-mask embedding train with all of them.

    SSF lacks one pair of 256: it leaves out the neck's convolutions, which have no bias.
    """
    from snella.methods.base import count_parameters, load_method, prepare_model, trainable
    from snella.models.families import head

    expected = {"full": 93_729_508, "ssf": 4_264_420 - 512, "gps": 4_227_044, "linear": 4_058_596}
    for name, total in expected.items():
        method = load_method(Path("baselines") / f"{name}.py")
        settings = {"score": "cross-entropy"} if name == "gps" else {}
        with torch.device("meta"):
            model = build_sam("sam_vit_b")
            prepare_model(method(**settings), model)
        counts = count_parameters(model)
        found = counts["trainable"] + counts["head"]
        if name == "gps":  # one entry for each row of every weight, chosen later by calibration
            rows = [p for n, p in model.image_encoder.named_parameters() if _selected(n, p)]
            found += sum(len(p) for p in rows)
        assert found == total, name
        assert counts["head"] == 4_058_596
        names = [n for n in trainable(model) if n.startswith("prompt_encoder")]
        assert names == ["prompt_encoder.no_mask_embed.weight"]
        assert head(model) is not None


def _selected(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim >= 2 and "rel_pos" not in name and "pos_embed" not in name
