import contextlib
import dataclasses
import io
import json
import os
import pickle
import re
import shutil
import struct
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

import data.folders
import data.sources
from data import Augmentation, TrainLoader, calibration_batches, load_data, plain_batches
from data.augment import augment, to_float
from data.loading import _free_memory, channel_statistics
from data.sources import DataLocation, stratified
from tests import toy
from utils.compat import import_torchvision
from utils.errors import InputError
from utils.storage.paths import RunPaths
from utils.storage.run_folder import RunFolder

# ---------------------------------------------------------------- splits


def test_digits_have_the_split_of_the_specification():
    digits = load_data("digits")
    assert (len(digits.train), len(digits.val), len(digits.test)) == (1000, 300, 497)
    assert digits.image_shape == (1, 8, 8)
    assert not set(digits.train.indices.tolist()) & set(digits.val.indices.tolist())
    for split in (digits.train, digits.val, digits.test):
        shares = torch.bincount(split.labels[split.indices], minlength=10) / len(split)
        assert (shares - 0.1).abs().max() < 0.015
    assert digits.train.images.max() == 255
    assert digits.augmentation == Augmentation(padding=1)


def test_stratified_takes_exact_counts_in_proportion():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    rows = stratified(labels, 50)
    assert np.bincount(labels[rows]).tolist() == [30, 15, 5]
    assert len(set(rows.tolist())) == 50
    assert (rows == stratified(labels, 50)).all()
    assert np.bincount(labels[stratified(labels, 7)]).tolist() == [4, 2, 1]
    assert np.bincount(labels[stratified(labels, 3)]).tolist() == [1, 1, 1]
    with pytest.raises(InputError, match="at least one of each"):
        stratified(labels, 2)
    with pytest.raises(InputError, match="cannot take 101"):
        stratified(labels, 101)


def fake_torchvision(monkeypatch, **attributes):
    made = type("Fake", (), attributes)
    monkeypatch.setattr(data.sources, "_torchvision", lambda name, place, **options: made())


def test_cifar_splits_by_order(monkeypatch):
    pixels = np.arange(50 * 4 * 4 * 3, dtype=np.uint8).reshape(50, 4, 4, 3)
    fake_torchvision(
        monkeypatch, data=pixels, targets=[i % 10 for i in range(50)], classes=list("abcdefghij")
    )
    for name, rotation in (("cifar10", 0.0), ("cifar100", 15.0)):
        loaded = load_data(name)
        assert loaded.train.indices.tolist() == list(range(45))
        assert loaded.val.indices.tolist() == list(range(45, 50))
        assert loaded.augmentation == Augmentation(4, flip=True, rotation=rotation)
        assert torch.equal(loaded.train.images, torch.from_numpy(pixels))
        assert (loaded.mean, loaded.std) == {
            "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
            "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        }[name]


def test_svhn_is_channels_last_here_and_does_not_flip(monkeypatch):
    pixels = np.random.RandomState(0).randint(0, 256, (40, 3, 4, 4)).astype(np.uint8)
    fake_torchvision(monkeypatch, data=pixels, labels=np.arange(40) % 10)
    svhn = load_data("svhn")
    assert (len(svhn.train), len(svhn.val)) == (36, 4)
    assert not set(svhn.train.indices.tolist()) & set(svhn.val.indices.tolist())
    assert torch.equal(svhn.train.images.permute(0, 3, 1, 2), torch.from_numpy(pixels))
    assert svhn.augmentation == Augmentation(4)
    order = np.random.RandomState(10).permutation(40)
    assert svhn.val.indices.tolist() == sorted(order[36:])


def test_torchvision_reads_what_lies_in_the_folder(tmp_path, monkeypatch):
    """The real torchvision class on a small archive with the real layout."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.RandomState(0)
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name in files:
        batch = {
            "data": rng.randint(0, 256, (10, 3072)).astype(np.uint8),
            "labels": list(range(10)),
        }
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    real = import_torchvision("datasets").CIFAR10
    monkeypatch.setattr(real, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    for root in (tmp_path, folder):
        cifar = load_data("cifar10", root)
        assert (len(cifar.train), len(cifar.val), len(cifar.test)) == (45, 5, 10)
        assert cifar.image_shape == (3, 32, 32)


def test_a_download_that_fails_is_one_clear_error(tmp_path, monkeypatch):
    real = import_torchvision("datasets").CIFAR10

    def refuse(self):
        Path(self.root).mkdir(exist_ok=True)  # as torchvision does before it downloads
        raise OSError("no route to host")

    monkeypatch.setattr(real, "download", refuse)
    for folder, was_there in ((tmp_path, True), (tmp_path / "new", False)):
        with pytest.raises(
            InputError, match=re.escape(f"CIFAR10 is not in {folder} and could not be downloaded")
        ):
            load_data("cifar10", folder)
        assert folder.exists() == was_there


def write_tinyimagenet(root: Path, annotations: bool) -> None:
    rng = np.random.RandomState(1)

    def image(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.randint(0, 256, (64, 64, 3)).astype(np.uint8)).save(path)

    classes = ("n02", "n01")
    for name in classes:
        for i in range(10):
            image(root / "train" / name / "images" / f"{name}_{i}.JPEG")
    if annotations:
        for i in range(4):
            image(root / "val" / "images" / f"val_{i}.JPEG")
        lines = [f"val_{i}.JPEG\t{classes[i % 2]}\t0\t0\t62\t62" for i in range(4)]
        (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    else:
        for i in range(4):
            image(root / "val" / classes[i % 2] / f"val_{i}.JPEG")


@pytest.mark.parametrize("annotations", [True, False])
def test_tinyimagenet_has_the_papers_split(tmp_path, annotations):
    write_tinyimagenet(tmp_path, annotations)
    tiny = load_data("tinyimagenet", tmp_path)
    expected = np.random.RandomState(10).permutation(20)
    assert tiny.train.indices.tolist() == expected[:18].tolist()
    assert tiny.val.indices.tolist() == expected[18:].tolist()
    assert tiny.classes == ["n01", "n02"]
    assert tiny.train.labels.tolist() == [0] * 10 + [1] * 10
    assert sorted(tiny.test.labels.tolist()) == [0, 0, 1, 1]
    assert tiny.image_shape == (3, 64, 64)
    assert (tiny.mean, tiny.std) == ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262))
    assert tiny.augmentation == Augmentation(4, flip=True)


@pytest.mark.parametrize("line", ["val_0.JPEG", "../secret.JPEG\tn01", "val_0.JPEG\tn99"])
def test_bad_annotations_are_named(tmp_path, line):
    write_tinyimagenet(tmp_path, True)
    (tmp_path / "val" / "val_annotations.txt").write_text(line + "\n")
    with pytest.raises(InputError, match="line 1"):
        load_data("tinyimagenet", tmp_path)


def test_a_missing_image_is_named(tmp_path):
    write_tinyimagenet(tmp_path, True)
    (tmp_path / "val" / "images" / "val_2.JPEG").unlink()
    with pytest.raises(InputError, match=r"val_2\.JPEG: missing image"):
        load_data("tinyimagenet", tmp_path)


# ---------------------------------------------------------------- image folders


def test_imagefolder_splits_by_class(image_tree):
    folder = load_data("imagefolder", image_tree)
    assert (len(folder.train), len(folder.val), len(folder.test)) == (54, 6, 24)
    assert torch.bincount(folder.val.labels[folder.val.indices]).tolist() == [2, 2, 2]
    assert folder.classes == ["ant", "bee", "cow"]
    assert folder.augmentation == Augmentation(padding=2, flip=True)
    path = image_tree / "train" / "bee" / "004.png"
    assert torch.equal(folder.train.images[24], torch.from_numpy(np.array(Image.open(path))))


def test_val_may_stand_for_test_and_other_files_do_not_count(image_tree):
    (image_tree / "test").rename(image_tree / "val")
    (image_tree / "train" / "ant" / "notes.txt").write_text("not an image")
    (image_tree / "train" / "ant" / ".hidden.png").write_text("neither")
    (image_tree / "train" / ".cache").mkdir()
    assert len(load_data("imagefolder", image_tree).train) == 54


def test_images_are_resized_once_by_area(image_tree):
    folder = load_data("imagefolder", image_tree, image_size=8)
    assert folder.image_shape == (3, 8, 8)
    original = np.asarray(Image.open(image_tree / "train" / "ant" / "000.png")).astype(float)
    area = original.reshape(8, 2, 8, 2, 3).mean(axis=(1, 3))
    assert np.abs(folder.train.images[0].numpy() - area).max() <= 1
    assert load_data("imagefolder", image_tree).image_shape == (3, 16, 16)  # has a separate cache


def test_grey_and_palette_images_become_rgb(image_tree):
    Image.fromarray(np.full((16, 16), 77, np.uint8)).save(image_tree / "train" / "ant" / "000.png")
    Image.fromarray(np.full((16, 16), 7, np.uint8)).convert("P").save(
        image_tree / "train" / "ant" / "001.gif"
    )
    folder = load_data("imagefolder", image_tree)
    assert (folder.train.images[0] == 77).all()
    assert len(folder.train) + len(folder.val) == 61


def test_deeper_pixels_are_scaled_and_not_clipped(image_tree):
    ramp = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    Image.fromarray(ramp).save(image_tree / "train" / "ant" / "000.png")
    folder = load_data("imagefolder", image_tree)
    assert torch.equal(
        folder.train.images[0, ..., 0], torch.from_numpy((ramp // 257).astype(np.uint8))
    )


def test_pixels_without_a_known_range_are_refused(image_tree):
    Image.fromarray(np.zeros((16, 16), np.float32)).save(image_tree / "train" / "ant" / "000.tiff")
    with pytest.raises(InputError, match=r"000\.tiff: pixels of type F"):
        load_data("imagefolder", image_tree)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff", "xmp"])
@pytest.mark.parametrize("orientation", range(10))
def test_images_are_upright_as_their_header_says(tmp_path, kind, orientation):
    """Equal to Pillow's ``exif_transpose``, also for orientations that no camera writes."""
    path = tmp_path / f"image.{'png' if kind == 'xmp' else kind}"
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (12, 8, 3)).astype(np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    if kind == "xmp":
        told = PngImagePlugin.PngInfo()
        told.add_itxt("XML:com.adobe.xmp", f'<x tiff:Orientation="{orientation}"/>')
        image.save(path, pnginfo=told)
    else:
        image.save(path, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    expected = ImageOps.exif_transpose(Image.open(path))
    assert expected.size == ((12, 8) if 5 <= orientation <= 8 else (8, 12))
    assert np.array_equal(data.folders.decode_image(path, None).pixels, np.asarray(expected))
    resized = np.asarray(expected.resize((4, 4), Image.Resampling.BOX))
    assert np.array_equal(data.folders.decode_image(path, 4).pixels, resized)


@pytest.mark.parametrize(
    "header",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0nothing",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x02",
    ],
)
def test_a_broken_header_does_not_cost_the_image(image_tree, header):
    path = image_tree / "train" / "ant" / "000.png"
    image = Image.open(path)
    image.save(path.with_name("000.jpg"))
    plain = np.array(Image.open(path.with_name("000.jpg")))
    image.save(path.with_name("000.jpg"), exif=header)
    path.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(
            load_data("imagefolder", image_tree).train.images[0], torch.from_numpy(plain)
        )


def with_alpha(mode: str) -> tuple[Image.Image, dict, np.ndarray]:
    """An image, the options to save it with, and its pixels on black."""
    pixels = np.random.RandomState(0).randint(0, 256, (16, 16, 4)).astype(np.uint8)
    pixels[0, :, 3], pixels[1, :, 3] = 0, 255
    grey, alpha = pixels[..., 0], pixels[..., 3]
    if mode == "I;16":
        key = int(grey[3, 3]) * 257
        return (
            Image.fromarray(grey.astype(np.uint16) * 257),
            {"transparency": key},
            np.where(grey == grey[3, 3], 0, grey)[..., None],
        )
    if mode == "P":
        palette = Image.fromarray(grey).convert("P")
        return (
            palette,
            {"transparency": int(grey[3, 3])},
            np.where(grey == grey[3, 3], 0, grey)[..., None],
        )
    if mode == "RGB":
        key = tuple(pixels[3, 3, :3].tolist())
        seen = np.where((pixels[..., :3] == key).all(-1, keepdims=True), 0, pixels[..., :3])
        return Image.fromarray(pixels[..., :3]), {"transparency": key}, seen
    shown = pixels[..., :3] if mode == "RGBA" else grey[..., None]
    image = (
        Image.fromarray(pixels)
        if mode == "RGBA"
        else Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    )
    return image, {}, shown * (alpha[..., None] / 255)


def test_further_pages_and_dim_pixels_are_noted(tmp_path):
    """As with X-rays of 12 bits in files of 16: 16 levels would be left of 4,096."""
    pages = [Image.fromarray(np.full((16, 16), value, np.uint16)) for value in (4095, 2000, 9)]
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for number in range(12):
                path = tmp_path / "data" / part / name / f"{number}.tiff"
                several = part == "train" and number < 5
                pages[0].save(path, save_all=several, append_images=pages[1:] if several else [])
    for _ in range(2):  # decoded, and from the cache
        loaded = load_data("imagefolder", tmp_path / "data", cache_dir=tmp_path / "cache")
        assert loaded.notes == (
            "10 of the 24 images of imagefolder-train have further pages or frames, which are left"
            " out",
            "the brightest of all pixels of imagefolder-train is 15, where white is 255: attacks"
            " are measured on that scale",
            "the brightest of all pixels of imagefolder-test is 15, where white is 255: attacks are"
            " measured on that scale",
        )


def test_damaged_later_frames_do_not_matter(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (9, 90, 200)]
    frames[0].save(tmp_path / "whole.gif", save_all=True, append_images=frames[1:])
    content = (tmp_path / "whole.gif").read_bytes()
    assert data.folders.decode_image(tmp_path / "whole.gif", None).is_paged
    (tmp_path / "cut.gif").write_bytes(content[:-12])
    pixels = data.folders.decode_image(tmp_path / "cut.gif", None).pixels
    assert np.array_equal(pixels, data.folders.decode_image(tmp_path / "whole.gif", None).pixels)


def test_an_odd_tag_beside_the_orientation_does_not_matter(tmp_path):
    width = struct.pack(">HHI4s", ExifTags.Base.ImageWidth, 2, 4, b"abc")  # text
    turn = struct.pack(">HHIHH", ExifTags.Base.Orientation, 3, 1, 6, 0)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + width + turn + bytes(4)
    Image.new("RGB", (9, 7)).save(tmp_path / "odd.png", exif=exif)
    assert data.folders.decode_image(tmp_path / "odd.png", None).pixels.shape == (9, 7, 3)


def test_one_class_is_nothing_to_learn(image_tree, tmp_path):
    for part in ("train", "test"):
        for folder in sorted((image_tree / part).iterdir())[1:]:
            shutil.rmtree(folder)
    with pytest.raises(InputError, match="has only the class ant: nothing to learn"):
        load_data("imagefolder", image_tree, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "I;16"])
def test_transparent_images_are_laid_on_black_and_counted(image_tree, tmp_path, decoded, mode):
    image, options, expected = with_alpha(mode)
    opaque = Image.new("RGBA", (16, 16), (9, 99, 199, 255))
    for number in (0, 1):
        image.save(image_tree / "train" / "ant" / f"00{number}.png", **options)
        opaque.save(image_tree / "test" / "ant" / f"00{number}.png")
    for _ in range(2):  # decoded, and from the cache
        loaded = load_data("imagefolder", image_tree, cache_dir=tmp_path / "cache")
        assert np.abs(loaded.train.images[0].numpy() - expected).max() <= 1
        assert loaded.notes == (
            "2 of the 60 images of imagefolder-train have transparent parts, which are black here",
        )
        assert loaded.test.images[0, 0, 0].tolist() == [9, 99, 199]
    assert len(decoded) == 84
    (image_tree / "train" / "ant" / "002.png").write_bytes(
        (image_tree / "train" / "ant" / "000.png").read_bytes()
    )
    small = load_data(
        "imagefolder", image_tree, cache_dir=tmp_path / "cache", image_size=4
    ).train.images[0]
    area = np.broadcast_to(expected, (16, 16, 3)).reshape(4, 4, 4, 4, 3).mean(axis=(1, 3))
    assert np.abs(small.numpy() - area).max() <= 1.5


def test_what_is_left_out_is_counted_and_said(image_tree, run_adv, tmp_path):
    assert load_data("imagefolder", image_tree).notes == ()
    ant = image_tree / "train" / "ant"
    (ant / ".hidden").touch()
    (ant / "notes.txt").touch()
    assert load_data("imagefolder", image_tree).notes == (
        f"ignored, as they are not images of a class: {ant / 'notes.txt'}",
    )
    (ant / "deeper").mkdir()
    shutil.copy(ant / "000.png", ant / "deeper" / "000.png")
    shutil.copy(ant / "000.png", image_tree / "train" / "000.png")
    (image_tree / "test" / "labels.csv").touch()
    ignored = "ignored, as they are not images of a class:"
    notes = [f"{ignored} {image_tree / 'train' / '000.png'} and 2 more"]
    notes.append(f"{ignored} {image_tree / 'test' / 'labels.csv'}")
    assert load_data("imagefolder", image_tree).notes == tuple(notes)
    (image_tree / "val").mkdir()
    notes.append(
        f"{image_tree / 'val'} is left out: validation is on a tenth of the training images"
    )
    small = "--width 0.0625 --epochs 1 --batch_size 60 --train_step 1 --test_step 1".split()
    outcome = run_adv(
        "--dataset", "imagefolder", "--data", image_tree, "--save_dir", tmp_path / "out", *small
    )
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert [line for line in lines if "left out" in line or "ignored" in line] == [
        f"note: {note}" for note in notes
    ]


def damage(kind, root):
    train = root / "train"
    if kind == "corrupt":
        (train / "bee" / "003.png").write_bytes(b"no image")
    elif kind == "truncated":
        path = train / "bee" / "003.png"
        path.write_bytes(path.read_bytes()[:300])
    elif kind == "link":
        (train / "bee" / "003.png").unlink()
        (train / "bee" / "003.png").symlink_to(root / "nowhere.png")
    elif kind == "empty class":
        for path in (train / "cow").iterdir():
            path.unlink()
    elif kind == "missing class":
        (root / "test" / "cow").rename(root / "cow")
    elif kind == "unknown class":
        (root / "test" / "elk").mkdir()
    elif kind == "no test":
        (root / "test").rename(root / "elsewhere")
    elif kind == "odd size":
        Image.new("RGB", (20, 16)).save(train / "bee" / "003.png")
    elif kind == "odd test size":
        for path in (root / "test").rglob("*.png"):
            Image.new("RGB", (20, 20)).save(path)
    elif kind == "no classes":
        (train / "x").mkdir()
        (root / "train").rename(root / "old")
        (root / "train").mkdir()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("corrupt", r"bee/003\.png: not an image"),
        ("truncated", r"bee/003\.png: corrupt image"),
        ("link", r"bee/003\.png: missing image"),
        ("empty class", r"cow: no images of this class"),
        ("missing class", r"test: no folder for the class cow"),
        ("unknown class", r"elk: this class does not appear"),
        ("no test", r"neither a folder test nor val"),
        ("odd size", r"bee/003\.png: 20x16 pixels where others have 16x16"),
        ("odd test size", r"--image_size"),
        ("no classes", r"no class folders"),
    ],
)
def test_damage_is_named(image_tree, kind, message):
    damage(kind, image_tree)
    with pytest.raises(InputError, match=message):
        load_data("imagefolder", image_tree)


def test_classes_with_a_single_image_are_named(image_tree):
    for path in sorted((image_tree / "train" / "bee").iterdir())[1:]:
        path.unlink()
    with pytest.raises(InputError, match="bee: one image"):
        load_data("imagefolder", image_tree)


def test_too_few_images_are_refused(tmp_path):
    write_tinyimagenet(tmp_path, True)
    for path in list((tmp_path / "train").rglob("*.JPEG")):
        if not path.stem.endswith("_1"):
            path.unlink()
    with pytest.raises(InputError, match="too few images"):
        load_data("tinyimagenet", tmp_path)


def test_a_wrong_path_is_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_data("imagefolder", tmp_path / "nowhere")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(
        InputError, match=r"train has no folder train; --data holds train/<class>/\*"
    ):
        load_data("imagefolder", tmp_path / "train")
    with pytest.raises(InputError, match="unknown data set"):
        load_data("mnist")


# ---------------------------------------------------------------- cache


@pytest.fixture
def decoded(monkeypatch):
    """Paths decoded so far."""
    seen = []
    original = data.folders.decode_image
    monkeypatch.setattr(
        data.folders, "decode_image", lambda path, size: seen.append(path) or original(path, size)
    )
    return seen


def test_folders_are_decoded_once(image_tree, tmp_path, decoded):
    first = load_data("imagefolder", image_tree, cache_dir=tmp_path / "cache")
    assert len(decoded) == 84
    again = load_data("imagefolder", image_tree, cache_dir=tmp_path / "cache")
    assert len(decoded) == 84
    assert torch.equal(first.train.images, again.train.images)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("change", ["content", "same size and time", "swapped", "added", "removed"])
def test_a_stale_cache_is_rebuilt(image_tree, tmp_path, decoded, monkeypatch, change, large):
    """A small set is checked by its content, a large one only where its stamp differs or cannot be
    trusted."""
    path, other = image_tree / "train" / "ant" / "005.png", image_tree / "train" / "ant" / "006.png"
    Image.new("RGB", (16, 16), "white").save(path, "BMP")  # BMP: one size, whatever it shows
    Image.new("RGB", (16, 16), "green").save(other, "BMP")
    if large:
        monkeypatch.setattr(data.folders, "_SMALL", 0)
        monkeypatch.setattr(data.folders, "_SETTLED", 0)
    load_data("imagefolder", image_tree, cache_dir=tmp_path / "cache")
    before = path.stat()
    if change == "content":
        Image.new("RGB", (16, 16)).save(path)
    elif change == "same size and time":
        Image.new("RGB", (16, 16)).save(path, "BMP")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (
            before.st_size,
            before.st_mtime_ns,
        )
    elif change == "swapped":
        path.rename(tmp_path / "aside")
        other.rename(path)
        (tmp_path / "aside").rename(other)
    elif change == "added":
        path.with_name("new.png").write_bytes(path.read_bytes())
    else:
        path.unlink()
    loaded = load_data("imagefolder", image_tree, cache_dir=tmp_path / "cache")
    assert len(decoded) > 84 + 50
    if change in ("content", "same size and time"):
        assert not loaded.train.images[5].any()
    if change == "swapped":
        assert loaded.train.images[5, 0, 0].tolist() == [0, 128, 0]


def test_files_that_were_only_touched_or_moved_are_not_decoded_again(
    image_tree, tmp_path, decoded, monkeypatch
):
    for limit in (2**28, 0):
        monkeypatch.setattr(data.folders, "_SMALL", limit)
        load_data("imagefolder", image_tree, cache_dir=tmp_path / "cache")
        os.utime(image_tree / "train" / "ant" / "005.png", ns=(limit, 1))
        (image_tree / "train" / "bee" / "005.png").rename(image_tree / "train" / "bee" / "005b.png")
        load_data("imagefolder", image_tree, cache_dir=tmp_path / "cache")
        (image_tree / "train" / "bee" / "005b.png").rename(image_tree / "train" / "bee" / "005.png")
        assert len(decoded) == 84


def test_a_large_set_is_not_read_whole_at_every_start(
    image_tree, tmp_path, decoded, monkeypatch, capsys
):
    """Neither its files nor the decoded images; after a touch, they are read once."""
    read = []
    for name in ("_file_digest", "pixels_digest"):
        original = getattr(data.folders, name)
        monkeypatch.setattr(
            data.folders, name, lambda what, original=original: read.append(what) or original(what)
        )
    monkeypatch.setattr(data.folders, "_SMALL", 0)
    monkeypatch.setattr(data.folders, "_SETTLED", 0)
    monkeypatch.setattr(data.folders, "_CHUNK", 10)
    load_data("imagefolder", image_tree, cache_dir=tmp_path / "cache")
    assert (len(read), len(decoded)) == (84, 84)
    expected = load_data("imagefolder", image_tree, cache_dir=tmp_path / "cache").digest
    assert len(read) == 84
    os.utime(image_tree / "train" / "ant" / "005.png")
    monkeypatch.setattr(data.folders, "_PATIENCE", 0)
    capsys.readouterr()
    for _ in range(2):
        assert load_data("imagefolder", image_tree, cache_dir=tmp_path / "cache").digest == expected
        assert (len(read), len(decoded)) == (84 + 60, 84)
    assert re.fullmatch(r"checking 60 images for changes: \d+ s to go\n", capsys.readouterr().err)
    (folder,) = (tmp_path / "cache").glob("imagefolder-train-*")
    os.utime(folder / "images.npy")
    for _ in range(2):
        load_data("imagefolder", image_tree, cache_dir=tmp_path / "cache")
        assert (len(read), len(decoded)) == (84 + 60 + 1, 84)
    assert re.fullmatch(
        r"checking 0\.0 GB of decoded images in \S+, once\n", capsys.readouterr().err
    )


def test_files_of_a_moment_ago_are_not_known_by_their_stamp(image_tree, tmp_path, monkeypatch):
    """Another change could fall into the same clock tick."""
    path = image_tree / "train" / "ant" / "005.png"
    changed = path.stat().st_ctime
    for passed, known in ((1.9, False), (2.1, True), (-60.0, False)):
        monkeypatch.setattr(time, "time", lambda passed=passed: changed + passed)
        assert (data.folders._stamp([path], data.folders._SETTLED)[0] is not None) == known
    read = []
    original = data.folders._file_digest
    monkeypatch.setattr(
        data.folders, "_file_digest", lambda path: read.append(path) or original(path)
    )
    monkeypatch.setattr(data.folders, "_SMALL", 0)
    for known, count in ((False, 84), (False, 168), (True, 252), (True, 252)):
        monkeypatch.setattr(time, "time", lambda known=known: changed + 60 * known)
        load_data("imagefolder", image_tree, cache_dir=tmp_path / "cache")
        assert len(read) == count


def test_a_cache_may_be_read_by_those_whom_the_umask_lets(image_tree, tmp_path):
    before = os.umask(0o027)
    try:
        load_data("imagefolder", image_tree, cache_dir=tmp_path / "cache")
    finally:
        os.umask(before)
    (folder,) = (tmp_path / "cache").glob("imagefolder-train-*")
    assert [
        path.stat().st_mode & 0o777
        for path in (folder, folder / "images.npy", folder / "meta.json")
    ] == [0o750, 0o640, 0o640]


@pytest.mark.parametrize(
    "fault",
    [
        "flipped",
        "truncated",
        "empty",
        "other type",
        "other shape",
        "no meta",
        "broken meta",
        "deep meta",
        "old meta",
        "gone",
    ],
)
def test_a_broken_cache_is_rebuilt(image_tree, tmp_path, decoded, fault):
    expected = load_data("imagefolder", image_tree, cache_dir=tmp_path / "cache").train.images
    (folder,) = (tmp_path / "cache").glob("imagefolder-train-*")
    images, meta = folder / "images.npy", folder / "meta.json"
    content = bytearray(images.read_bytes())
    if fault == "flipped":
        content[-100] ^= 1
        images.write_bytes(content)
    elif fault == "truncated":
        images.write_bytes(content[:-5])
    elif fault == "empty":
        images.write_bytes(b"")
    elif fault == "other type":
        np.save(images, np.load(images).view(np.int8))
    elif fault == "other shape":
        np.save(images, np.load(images).reshape(60, -1))
    elif fault == "deep meta":
        meta.write_text("[" * 100_000)
    elif fault == "old meta":
        meta.write_text(
            json.dumps({"fingerprint": "0", "checksum": 0, "images": 60, "pixels": "0"})
        )
    elif fault == "no meta":
        meta.unlink()
    elif fault == "broken meta":
        meta.write_text("[]")
    else:
        images.unlink()
    assert torch.equal(
        load_data("imagefolder", image_tree, cache_dir=tmp_path / "cache").train.images, expected
    )
    assert len(decoded) == 84 + 60


def test_names_that_are_not_utf8_are_read(image_tree, tmp_path, capsys):
    """As archives of old systems have."""
    root = Path(os.fsdecode(bytes(image_tree.parent) + b"/\xe9"))
    image_tree.rename(root)
    images = root / "train" / "ant"
    (images / "000.png").rename(images / os.fsdecode(b"caf\xe9.png"))
    (images / os.fsdecode(b"r\xe9adme.txt")).write_text("not an image")
    data = load_data("imagefolder", root, cache_dir=tmp_path / "cache")
    assert len(data.train) + len(data.val) == 60
    folder = RunFolder.create(RunPaths(tmp_path / "run"), {})
    for note in data.notes:
        folder.say(note)
    assert "r\\udce9adme.txt" in capsys.readouterr().out


def test_a_size_beyond_the_limit_is_refused_by_its_flag(image_tree, tmp_path):
    with pytest.raises(InputError, match="--image_size 40000 exceeds the limit"):
        load_data("imagefolder", image_tree, cache_dir=tmp_path, image_size=40_000)


def test_a_failed_decoding_leaves_no_cache_behind(image_tree, tmp_path):
    (image_tree / "train" / "cow" / "019.png").write_bytes(b"x")
    with pytest.raises(InputError):
        load_data("imagefolder", image_tree, cache_dir=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_a_long_decoding_is_told_once(image_tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data.folders, "_CHUNK", 10)
    load_data("imagefolder", image_tree, cache_dir=tmp_path / "soon")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(data.folders, "_PATIENCE", 0)
    load_data("imagefolder", image_tree, cache_dir=tmp_path / "late")
    assert re.fullmatch(
        r"(decoding (60|24) images, once: \d+ s to go\n){2}", capsys.readouterr().err
    )


def test_two_processes_decode_once(image_tree, tmp_path, decoded):
    """The second waits, and does not replace the cache that the first already reads."""
    cache = tmp_path / "cache"
    expected = load_data("imagefolder", image_tree, cache_dir=cache).train.images
    finished = [path for path in cache.iterdir() if path.is_dir()]
    for folder in finished:
        folder.rename(tmp_path / folder.name)
    with contextlib.ExitStack() as first, ThreadPoolExecutor(1) as pool:
        for lock in cache.glob(".*.lock"):
            first.enter_context(FileLock(lock))
        second = pool.submit(
            lambda: load_data("imagefolder", image_tree, cache_dir=cache).train.images
        )
        time.sleep(0.3)
        assert not second.done()
        for folder in finished:
            (tmp_path / folder.name).rename(folder)
        first.close()
        assert torch.equal(second.result(60), expected)
    assert len(decoded) == 84


def test_a_cache_that_cannot_be_written_is_one_clear_error(image_tree, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="--cache_dir"):
        load_data("imagefolder", image_tree, cache_dir=tmp_path / "file")


def test_what_does_not_fit_is_mapped_and_streamed(image_tree, tmp_path):
    held = load_data("imagefolder", image_tree, cache_dir=tmp_path / "cache")
    streamed = load_data(
        "imagefolder", image_tree, cache_dir=tmp_path / "cache", memory_budget=1000
    )
    # A memory map shows changes of the file; images held in memory do not.
    (folder,) = (tmp_path / "cache").glob("imagefolder-train-*")
    for ours, theirs in zip(
        plain_batches(held.val, 4), plain_batches(streamed.val, 4), strict=True
    ):
        assert torch.equal(ours.x, theirs.x)
    loaders = [TrainLoader(d.train, 8, d.augmentation, seed=1) for d in (held, streamed)]
    for ours, theirs in zip(loaders[0].epoch(3), loaders[1].epoch(3), strict=True):
        assert torch.equal(ours.x, theirs.x)
    with (folder / "images.npy").open("r+b") as file:
        file.seek(-1, io.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, io.SEEK_END)
        file.write(bytes([last ^ 255]))
    assert streamed.train.images[-1, -1, -1, -1] == last ^ 255
    assert held.train.images[-1, -1, -1, -1] == last


# ---------------------------------------------------------------- identity of a data set

PARTS = ["classes", "training labels", "training pixels", "test labels", "test pixels"]


def test_a_data_set_is_its_content_wherever_it_lies(image_tree, tmp_path):
    """In memory or mapped, cached or decoded again, whole or a subset, here or on another path."""
    first = load_data("imagefolder", image_tree)
    assert list(first.digests) == PARTS
    assert first.digest
    for digest in [first.digest, *first.digests.values()]:
        assert re.fullmatch("[0-9a-f]{32}", digest)
    shutil.copytree(image_tree, tmp_path / "elsewhere" / "other")
    for again in (
        load_data("imagefolder", image_tree),
        load_data("imagefolder", image_tree, train_subset=10, test_subset=6),
        load_data("imagefolder", image_tree, memory_budget=1000),
        load_data("imagefolder", tmp_path / "elsewhere" / "other"),
    ):
        assert again.digests == first.digests
        assert again.digest == first.digest
    assert load_data("imagefolder", image_tree, image_size=8).digest != first.digest


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("training pixel", ["training pixels"]),
        ("test pixel", ["test pixels"]),
        ("class renamed", ["classes"]),
        ("training label", ["training labels"]),
        ("test label", ["test labels"]),
    ],
)
def test_what_changes_changes_its_part_of_the_digest(image_tree, change, parts):
    first = load_data("imagefolder", image_tree)
    part = change.split()[0]
    if "pixel" in change:
        path = image_tree / {"training": "train", "test": "test"}[part] / "bee" / "003.png"
        pixels = np.array(Image.open(path))
        pixels[5, 7, 1] ^= 1
        Image.fromarray(pixels).save(path)
    elif change == "class renamed":
        for folder in ("train", "test"):
            (image_tree / folder / "bee").rename(image_tree / folder / "bug")
    else:  # the last image of one class becomes the first of the next: the pixels keep their order
        root = image_tree / {"training": "train", "test": "test"}[part]
        sorted((root / "ant").iterdir())[-1].rename(root / "bee" / "0.png")
    again = load_data("imagefolder", image_tree)
    assert [part for part in PARTS if again.digests[part] != first.digests[part]] == parts
    assert again.digest != first.digest


def test_arrays_have_the_digest_of_the_same_images_in_a_file(tmp_path):
    digits = load_data("digits")
    source = data.sources.digits(data.sources.DataLocation(tmp_path))
    np.save(tmp_path / "training.npy", source.training.images)
    filed = dataclasses.replace(
        source, training=data.sources.ImageSet(tmp_path / "training.npy", source.training.labels)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.SOURCES, "filed", lambda place: filed)
        assert load_data("filed").digests == digits.digests
    assert toy.data().digest == ""


# ---------------------------------------------------------------- arrays as data sets


@pytest.fixture
def own(monkeypatch):
    """Loads arrays as a data set: the last six rows for validation, the others for training."""

    def load(images, labels, test=None, test_labels=None, classes=None, **options):
        count = len(labels)
        training = data.sources.ImageSet(images, labels)
        test_set = data.sources.ImageSet(
            images if test is None else test, labels if test_labels is None else test_labels
        )
        names = [str(label) for label in np.unique(labels)] if classes is None else classes
        rows = {"train": np.arange(count - 6), "val": np.arange(count - 6, count)}
        source = data.sources.Source(
            training, test_set, classes=names, augmentation=Augmentation(), **{**rows, **options}
        )
        monkeypatch.setitem(data.SOURCES, "own", lambda place: source)
        return load_data("own")

    return load


PIXELS = np.random.RandomState(0).randint(0, 256, (24, 4, 5, 3)).astype(np.uint8)
LABELS = np.arange(24) % 3


@pytest.mark.parametrize(
    "images",
    [
        PIXELS / 255,
        (PIXELS / 255).astype(np.float32),
        (PIXELS / 255).astype(np.float16),
        PIXELS.astype(np.float32),
        PIXELS.astype(np.uint16),
        PIXELS.astype(np.int32),
        PIXELS.astype(">i8"),
        PIXELS[::-1][::-1],
        PIXELS.tolist(),
        torch.from_numpy(PIXELS / 255),
    ],
    ids=lambda images: str(getattr(images, "dtype", "list")),
)
def test_pixels_of_every_clear_type_are_the_same_data_set(own, images):
    ours, expected = own(images, LABELS), own(PIXELS, LABELS)
    assert torch.equal(ours.train.images, torch.from_numpy(PIXELS))
    assert torch.equal(
        next(iter(plain_batches(ours.test, 24))).x,
        torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255,
    )
    assert (ours.digest, ours.mean, ours.notes) == (expected.digest, expected.mean, ())


def test_floats_in_a_file_of_ones_own_are_not_divided_twice(own, tmp_path):
    np.save(tmp_path / "images.npy", PIXELS / 255)
    assert torch.equal(own(tmp_path / "images.npy", LABELS).test.images, torch.from_numpy(PIXELS))


def test_grey_images_in_a_file_have_one_channel(own, tmp_path):
    np.save(tmp_path / "grey.npy", PIXELS[..., 0])
    ours = own(tmp_path / "grey.npy", LABELS)
    assert ours.image_shape == (1, 4, 5)
    assert torch.equal(ours.test.images[..., 0], torch.from_numpy(PIXELS[..., 0]))


def test_images_on_a_device_that_is_named_without_its_index_are_not_streamed(monkeypatch):
    monkeypatch.setattr("data.loader.streamed", None)
    split = dataclasses.replace(toy.split(6), device=torch.device("cpu", 0))
    (batch,) = TrainLoader(split, 6, Augmentation(), 1).epoch(0)
    assert len(batch.x) == 6


def test_grey_images_without_channels_have_one(own):
    grey = own(PIXELS[..., 0], LABELS)
    assert grey.image_shape == (1, 4, 5)
    assert torch.equal(grey.train.images[..., 0], torch.from_numpy(PIXELS[..., 0]))
    assert own(PIXELS[..., 0] > 100, LABELS).train.images.unique().tolist() == [0, 255]


def test_what_pixels_lose_and_how_dark_they_are_is_said(own):
    (note,) = own(PIXELS / 256 + 0.001, LABELS).notes
    assert re.fullmatch(r"pixels are rounded to 256 levels, some by 0\.[345]\d of one", note)
    (note,) = own(PIXELS // 16, LABELS).notes
    assert (
        note
        == "the brightest of all pixels is 15, where white is 255: attacks are measured on that"
        " scale"
    )


@pytest.mark.parametrize(
    ("images", "test", "message"),
    [
        (
            PIXELS / 127.5 - 1,
            None,
            r"unknown scale \(training images: float64 from -1 to 1, not all whole; test",
        ),
        (PIXELS / 255, PIXELS, r"test images: uint8 from 0 to 255"),
        (PIXELS / 255, PIXELS / 1.0, r"test images: float64 from 0 to 255"),
        (PIXELS.astype(np.uint16) * 257, None, r"uint16 from 0 to 65535"),
        (PIXELS > 9, PIXELS, r"bool from 0 to 1"),
        (np.where(PIXELS == 7, np.nan, PIXELS / 255), None, r"from nan to nan"),
        (PIXELS.astype(complex), None, r"complex128 are not pixels"),
        (PIXELS.astype(object), None, r"object are not pixels"),
        (PIXELS[0, 0], None, r"shape \[5, 3\]"),
        (PIXELS[:0], None, r"shape \[0, 4, 5, 3\]"),
        (np.zeros((24, 3, 8, 8)), None, r"channels first"),
        (np.zeros((24, 2, 8, 8)), None, r"channels first"),
        (np.zeros((24, 13, 64, 64)), None, r"channels first"),
        (PIXELS, PIXELS[:, :2], r"training images are 4x5x3 and test images 2x5x3"),
        (PIXELS[:20], PIXELS, r"20 training images have 24 labels"),
        ([[1, 2], [3]], None, r"training images are not an array"),
    ],
)
def test_pixels_that_may_mean_several_things_are_refused(own, images, test, message):
    with pytest.raises(InputError, match=message):
        own(images, LABELS, test)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (LABELS.astype(np.int32), None),
        (LABELS.astype(np.uint8), ["ant", "bee", "cow"]),
        (LABELS.astype(np.float32), None),
        (LABELS[:, None], None),
        (LABELS.tolist(), None),
        (LABELS + 1, None),
        (LABELS + 1.0, None),
        (LABELS * 5 - 3, None),
        (LABELS * 5 - 3, []),
        (np.array(["ant", "bee", "cow"])[LABELS], ["ant", "bee", "cow"]),
    ],
)
def test_labels_of_every_clear_kind_are_numbers_of_the_classes(own, labels, classes):
    loaded = own(PIXELS, labels, classes=classes)
    for split in (loaded.train, loaded.test):
        assert split.labels.dtype == torch.int64
        assert split.labels.tolist() == LABELS.tolist()
    assert len(loaded.classes) == 3


def test_ten_classes_from_one_on_keep_their_names(own):
    """As text, "10" sorts before "2"."""
    labels = np.arange(24) % 10 + 1
    loaded = own(PIXELS, labels, classes=sorted({str(label) for label in labels}))
    assert [loaded.classes[label] for label in loaded.train.labels] == [
        str(label) for label in labels
    ]


def test_numbers_below_the_number_of_classes_stay(own):
    assert (
        own(PIXELS, LABELS * 2, classes=["a", "b", "c", "d", "e"]).train.labels.tolist()
        == (LABELS * 2).tolist()
    )


def test_folders_named_by_numbers_keep_their_order(own, tmp_path):
    """Eleven such names are sorted as text, and the labels are positions in that order."""
    np.save(tmp_path / "images.npy", PIXELS)
    names = sorted(str(number) for number in range(11))
    assert (
        own(tmp_path / "images.npy", np.arange(24) % 11, classes=names).train.labels.tolist()
        == (np.arange(24) % 11).tolist()
    )
    with pytest.raises(InputError, match="may be numbers or names"):
        own(PIXELS, np.arange(24) % 11, classes=names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"labels": LABELS + 1, "classes": ["a", "b", "c"]},
            r"labels 1, 2, 3 are neither numbers from 0 to 2 nor names of the classes a, b, c",
        ),
        ({"labels": LABELS % 2 + 1, "classes": ["1", "2", "3"]}, r"may be numbers or names"),
        ({"test_labels": LABELS + 1}, r"test labels 3 do not appear"),
        ({"test_labels": LABELS.astype(str)}, r"both numbers or both names"),
        ({"labels": LABELS + 0.5}, r"not whole: 0.5"),
        ({"labels": np.where(LABELS == 1, np.nan, LABELS)}, r"not whole: nan"),
        ({"labels": np.eye(3)[LABELS]}, r"shape \[24, 3\]"),
        ({"labels": LABELS.astype(object)}, r"training labels are object"),
        ({"classes": ["a", "b", "a"]}, r"the same name"),
        ({"train": np.arange(24) < 18}, r"rows for training must be whole numbers from 0 to 23"),
        ({"val": [22, 24]}, r"rows for validation must"),
        ({"val": [17, 18]}, r"1 images are for training and for validation"),
        ({"mean": (0.5,)}, r"mean \(0.5,\) does not fit: one for each of 3 channels"),
        ({"mean": (125.0, 123.0, 114.0)}, r"of pixels in \[0, 1\]"),
        ({"std": (0.2, 0.2, 0.0)}, r"std .* does not fit"),
    ],
)
def test_labels_and_rows_that_do_not_fit_are_refused(own, options, message):
    with pytest.raises(InputError, match=f"^own in data: .*{message}"):
        own(PIXELS, **{"labels": LABELS, **options})


# ---------------------------------------------------------------- subsets and statistics


def test_subsets_are_stratified_and_leave_validation_whole():
    digits = load_data("digits", train_subset=100, test_subset=50)
    assert (len(digits.train), len(digits.val), len(digits.test)) == (100, 300, 50)
    assert (torch.bincount(digits.train.labels[digits.train.indices]) - 10).abs().max() <= 1
    assert digits.mean == load_data("digits").mean
    with pytest.raises(InputError, match="--train_subset"):
        load_data("digits", train_subset=5000)


def test_statistics_equal_numpys():
    split = toy.split(50)
    rows = split.subset(torch.arange(7, 40))
    mean, std = channel_statistics(rows)
    pixels = rows.images[7:40].numpy() / 255
    assert mean == pytest.approx(pixels.mean(axis=(0, 1, 2)).tolist())
    assert std == pytest.approx(pixels.std(axis=(0, 1, 2)).tolist())


def test_calibration_batches_hold_all_classes_in_an_order_of_the_seeds():
    """On a set sorted by class, as image folders are, every class contributes equally."""
    sorted_set = toy.data(400)
    labels = torch.arange(400) // 20
    sorted_set = dataclasses.replace(
        sorted_set,
        train=dataclasses.replace(sorted_set.train, labels=labels),
        classes=[str(c) for c in range(20)],
    )
    one, again, other = (calibration_batches(sorted_set, seed=seed) for seed in (1, 1, 2))
    assert [len(y) for _, y in one] == [128, 72]
    assert all(len(y.unique()) >= 18 for _, y in one)
    for batches in (one, other):
        assert torch.bincount(torch.cat([y for _, y in batches])).tolist() == [10] * 20
    assert all(
        torch.equal(a, b)
        for mine, yours in zip(one, again, strict=True)
        for a, b in zip(mine, yours, strict=True)
    )
    assert not torch.equal(one[0][0], other[0][0])


def test_calibration_images_cover_the_classes():
    batches = calibration_batches(load_data("digits"), per_class=5, seed=1)
    labels = torch.cat([y for _, y in batches])
    assert (torch.bincount(labels) - 5).abs().max() <= 1


# ---------------------------------------------------------------- loader and augmentation


def test_an_epoch_holds_every_image_once_in_an_order_of_its_own():
    loader = TrainLoader(toy.split(23), 5, Augmentation(), seed=1)
    epochs = [torch.cat([batch.indices for batch in loader.epoch(e)]) for e in (0, 1, 0)]
    assert all(sorted(e.tolist()) == list(range(23)) for e in epochs)
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])
    assert len(loader) == 5
    assert [len(batch.y) for batch in loader.epoch(0)] == [5, 5, 5, 5, 3]


def test_a_single_left_over_image_joins_the_last_batch():
    assert [
        len(batch.y) for batch in TrainLoader(toy.split(11), 5, Augmentation(), seed=1).epoch(0)
    ] == [5, 6]
    assert [
        len(batch.y) for batch in TrainLoader(toy.split(1), 5, Augmentation(), seed=1).epoch(0)
    ] == [1]


def test_an_epoch_can_begin_in_its_middle():
    loader = TrainLoader(toy.split(23), 5, Augmentation(2, flip=True), seed=1)
    whole, rest = list(loader.epoch(2)), list(loader.epoch(2, first_step=3))
    assert [torch.equal(a.x, b.x) for a, b in zip(whole[3:], rest, strict=True)] == [True, True]


def test_batch_size_does_not_change_an_images_augmentation():
    split = toy.split(12)
    augmentation = Augmentation(2, flip=True, rotation=15)
    by_index = []
    for batch_size in (12, 4):
        images = {}
        for batch in TrainLoader(split, batch_size, augmentation, seed=1).epoch(5):
            images |= dict(zip(batch.indices.tolist(), batch.x, strict=True))
        by_index.append(images)
    assert all(torch.equal(by_index[0][i], by_index[1][i]) for i in range(12))


def test_no_augmentation_is_the_image():
    split = toy.split(4)
    x = augment(split.images, torch.arange(4), Augmentation(), 1, 0)
    assert torch.equal(x, to_float(split.images))
    assert torch.equal(x, split.images.permute(0, 3, 1, 2) / 255)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.dtype == torch.float32


def test_crop_and_flip_give_every_result_they_may_and_no_other():
    image = torch.arange(1, 17, dtype=torch.uint8).view(1, 4, 4, 1)
    padded = torch.nn.functional.pad(image[0, :, :, 0].float(), (1, 1, 1, 1))
    allowed = {
        tuple(padded[i : i + 4, j : j + 4].flatten().tolist()) for i in range(3) for j in range(3)
    }
    allowed |= {tuple(torch.tensor(a).view(4, 4).flip(1).flatten().tolist()) for a in allowed}
    x = augment(image.expand(900, 4, 4, 1), torch.arange(900), Augmentation(1, flip=True), 1, 0)
    seen = [tuple((image * 255).round().flatten().tolist()) for image in x]
    assert set(seen) == allowed
    assert max(seen.count(a) for a in allowed) < 2 * 900 / 18  # all occur about equally often


@pytest.mark.parametrize("degrees", [-15.0, -7.3, 0.0, 4.0, 15.0])
def test_rotation_equals_torchvisions_nearest_neighbour(degrees, monkeypatch):
    import_torchvision()
    from torchvision.transforms.v2 import functional

    images = toy.split(3, side=32).images

    def draw(indices, augmentation, seed, epoch):
        zeros = torch.zeros(len(indices), dtype=torch.long)
        return zeros, zeros, zeros.bool(), torch.full((len(indices),), np.deg2rad(degrees))

    monkeypatch.setattr("data.augment._draw", draw)
    ours = augment(images, torch.arange(3), Augmentation(rotation=15), 1, 0)
    theirs = (
        functional.rotate(
            images.permute(0, 3, 1, 2), degrees, interpolation=functional.InterpolationMode.NEAREST
        )
        / 255
    )
    assert (ours == theirs).double().mean() > 0.999


def test_angles_stay_within_the_limit():
    from data.augment import _draw

    *_, angle = _draw(torch.arange(5000), Augmentation(rotation=15), 1, 0)
    limit = np.deg2rad(15)
    assert -limit <= angle.min() < -0.95 * limit
    assert 0.95 * limit < angle.max() <= limit


def test_images_of_absurd_size_are_refused_by_their_header(tmp_path):
    """An empty PNG whose header claims 100,000 x 100,000 pixels: 30 GB if believed."""
    import struct
    import zlib

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb)
    with pytest.raises(InputError, match=r"bomb\.png"):
        data.folders.decode_image(path, 32)
    Image.new("1", (10_000, 8_000)).save(tmp_path / "large.png")
    with pytest.raises(InputError, match="10000x8000 pixels exceed"):
        data.folders.decode_image(tmp_path / "large.png", 32)


def test_a_pipe_among_the_images_is_not_waited_for(image_tree):
    os.mkfifo(image_tree / "train" / "ant" / "pipe.png")
    images, others = data.folders._sorted_out(image_tree / "train" / "ant")
    assert (images[-1].name, [path.name for path in others]) == ("019.png", ["pipe.png"])


def test_a_user_without_a_home_has_a_cache_with_the_temporary_files(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    place = DataLocation(Path("somewhere"))
    assert place.cache_dir == Path(tempfile.gettempdir()) / f"sparse-adversarial-{os.getuid()}"


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="free memory is told by Linux")
def test_memory_that_caches_files_is_free():
    told = {
        line.split(":")[0]: 1024 * int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
    }
    assert abs(_free_memory(torch.device("cpu")) - told["MemAvailable"]) < 2**28
