"""The data: real images, an honest split, and torchvision's augmentation on whole batches."""

import subprocess
import sys
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets as torchvision_datasets
from torchvision import transforms
from torchvision.transforms import functional as TF

from fastres import data
from fastres.data.datasets import CLASSES, MEAN, STD

ROOT = Path(__file__).resolve().parents[1]
RESTORE = ROOT.parent / "shared" / "data" / "cifar10" / "restore_cifar10.py"


@pytest.fixture(scope="session")
def official_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the official CIFAR-10 files."""
    if not RESTORE.exists():
        pytest.skip(f"no official CIFAR-10 beside the repository ({RESTORE.parent})")
    root = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, str(RESTORE), "--root", str(root)], check=True)
    return root


@pytest.fixture(scope="module")
def sample() -> data.Dataset:
    return data.sample()


def random_images(n: int, seed: int = 0, size: int = 32) -> torch.Tensor:
    """(n, 3, size, size) uint8, channels_last."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return images.contiguous(memory_format=torch.channels_last)


def numbered(n: int) -> data.ImageSet:
    """n images whose label is their number."""
    return data.ImageSet(random_images(n), torch.arange(n))


class TestSample:
    def test_shapes_and_layout(self, sample: data.Dataset) -> None:
        for part, n in ((sample.train, 3600), (sample.test, 1000)):
            assert part.images.shape == (n, 3, 32, 32)
            assert part.images.dtype == torch.uint8
            assert part.images.is_contiguous(memory_format=torch.channels_last)
            assert part.labels.dtype == torch.int64

    def test_classes_are_balanced(self, sample: data.Dataset) -> None:
        assert sample.train.labels.bincount().tolist() == [360] * 10
        assert sample.test.labels.bincount().tolist() == [100] * 10

    def test_train_and_test_are_apart(self, sample: data.Dataset) -> None:
        def pixels(part: data.ImageSet) -> set[bytes]:
            return {image.numpy().tobytes() for image in part.images}

        assert not pixels(sample.train) & pixels(sample.test)

    def test_at_most_8_megabytes(self) -> None:
        folder = Path(data.__file__).parent / "sample"
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 8_000_000

    def test_images_are_the_official_ones(self, sample: data.Dataset, official_root: Path) -> None:
        official = data.cifar10(official_root)
        for ours, theirs in ((sample.train, official.train), (sample.test, official.test)):
            for c in range(10):
                mine = ours.images[ours.labels == c]
                assert torch.equal(mine, theirs.images[theirs.labels == c][: len(mine)])

    def test_damaged_files_are_named(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("fastres.data.datasets.files", lambda package: tmp_path)
        with pytest.raises(data.DataError, match=r"missing: .*train\.webp"):
            data.sample()
        (tmp_path / "sample").mkdir()
        (tmp_path / "sample" / "train.webp").write_bytes(b"no picture")
        with pytest.raises(data.DataError, match=r"cannot read .*train\.webp"):
            data.sample()


class TestCifar10:
    def test_official_files(self, official_root: Path) -> None:
        dataset = data.load("cifar10", official_root)
        assert dataset.train.images.shape == (50_000, 3, 32, 32)
        assert dataset.test.labels.bincount().tolist() == [1000] * 10
        theirs = torchvision_datasets.CIFAR10(str(official_root), train=False)
        assert tuple(theirs.classes) == CLASSES
        assert np.array_equal(dataset.test.images[17].permute(1, 2, 0).numpy(), theirs.data[17])

    def test_mean_and_std_are_those_of_the_training_images(self, official_root: Path) -> None:
        pixels = data.cifar10(official_root).train.images.double() / 255
        torch.testing.assert_close(
            pixels.mean((0, 2, 3)), torch.tensor(MEAN).double(), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            pixels.std((0, 2, 3)), torch.tensor(STD).double(), atol=1e-4, rtol=0
        )

    def test_no_files_and_no_network(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def no_network(*_: object, **__: object) -> None:
            raise urllib.error.URLError("no network")

        monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
        with pytest.raises(
            data.DataError, match=f"{tmp_path} and could not be downloaded.*network"
        ):
            data.cifar10(tmp_path)

    def test_unknown_name(self) -> None:
        with pytest.raises(ValueError, match="data is 'mnist', expected"):
            data.load("mnist", ".")


class TestSplit:
    def test_parts_cover_everything_once(self) -> None:
        train, valid = data.split(103, 0.2, seed=3)
        assert len(valid) == 21
        assert torch.equal(torch.cat([train, valid]).sort().values, torch.arange(103))

    def test_follows_the_seed_alone(self) -> None:
        torch.manual_seed(1)
        first = data.split(100, 0.2, seed=3)[1]
        torch.manual_seed(2)
        assert torch.equal(data.split(100, 0.2, seed=3)[1], first)
        assert not torch.equal(data.split(100, 0.2, seed=4)[1], first)

    @pytest.mark.parametrize("ratio", [0.001, 0.999])
    def test_empty_part_is_refused(self, ratio: float) -> None:
        with pytest.raises(data.DataError, match=f"valid_ratio is {ratio}.*at least one"):
            data.split(10, ratio, seed=0)


class TestAugmentation:
    @pytest.mark.parametrize("padding", [0, 1, 4])
    def test_each_image_is_torchvisions_crop_and_flip(self, padding: int) -> None:
        side = torch.arange(2 * padding + 1)
        top, left = torch.cartesian_prod(side, side).repeat(2, 1).T
        flip = torch.arange(2 * len(side) ** 2) >= len(side) ** 2
        images = random_images(len(flip))
        ours = data.random_crop_flip(images, top, left, flip, padding)
        assert ours.is_contiguous(memory_format=torch.channels_last)
        for i, image in enumerate(images):
            picture = TF.pad(TF.to_pil_image(image), padding)
            picture = TF.crop(picture, int(top[i]), int(left[i]), 32, 32)
            picture = TF.hflip(picture) if flip[i] else picture
            assert torch.equal(ours[i], TF.pil_to_tensor(picture))

    def test_layout_does_not_matter(self) -> None:
        images = random_images(7)
        top = left = torch.arange(7)
        flip = top % 2 == 0
        expected = data.random_crop_flip(images, top, left, flip, 4)
        for same in (images.contiguous(), random_images(14).index_copy(0, top * 2, images)[::2]):
            assert torch.equal(data.random_crop_flip(same, top, left, flip, 4), expected)

    @pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
    @pytest.mark.parametrize("size", [32, 150])
    def test_normalize_is_torchvisions_bit_for_bit(
        self, size: int, layout: torch.memory_format
    ) -> None:
        images = random_images(4, size=size)[:, :, :, 3:].contiguous(memory_format=layout)
        theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
        ours = data.normalize(images, MEAN, STD)
        assert ours.is_contiguous(memory_format=layout)
        for image, result in zip(images, ours, strict=True):
            assert torch.equal(result, theirs(Image.fromarray(image.permute(1, 2, 0).numpy())))

    @pytest.mark.parametrize("side", [1, 4, 7, 64])
    def test_cutout_is_a_square_of_zeros(self, side: int) -> None:
        row, column = torch.cartesian_prod(torch.arange(8), torch.arange(10)).T
        images = torch.rand(80, 3, 8, 10) + 1
        expected = images.clone()
        for image, r, c in zip(expected, row.tolist(), column.tolist(), strict=True):
            top, left = r - side // 2, c - side // 2
            image[:, max(top, 0) : top + side, max(left, 0) : left + side] = 0
        assert data.cutout(images, row, column, side) is images
        assert torch.equal(images, expected)

    def test_cutout_changes_nothing_else_of_a_batch(self) -> None:
        """Order, crop and flip are as without, and the squares are new in every epoch."""
        plain, cut = (
            data.Batches(numbered(30), 8, MEAN, STD, augment=True, seed=3, cutout=side)
            for side in (0, 6)
        )
        holes = []
        for epoch in range(2):
            plain.set_epoch(epoch)
            cut.set_epoch(epoch)
            for (a, labels), (b, same) in zip(plain, cut, strict=True):
                assert torch.equal(labels, same)
                hole = (b == 0).all(1)
                assert hole.flatten(1).any(1).all()
                assert torch.equal(a.masked_fill(hole[:, None], 0), b)
                holes.append(hole)
        assert not torch.equal(holes[0], holes[4])

    def test_draws_are_uniform(self) -> None:
        """Over 10,000 images every crop and both flips come equally often."""
        corner = torch.zeros(500, 3, 32, 32, dtype=torch.uint8)
        corner[:, :, 12, 16] = 255  # where it lands tells top, left and flip
        part = data.ImageSet(corner, torch.zeros(500, dtype=torch.int64))
        batches = data.Batches(part, 100, (0.0,) * 3, (1.0,) * 3, augment=True)
        counts = torch.zeros(32, 32)
        for epoch in range(20):
            batches.set_epoch(epoch)
            counts += sum(images[:, 0].sum(0) for images, _ in batches)
        assert counts.sum() == 10_000
        rows, columns = counts.sum(1), counts.sum(0)
        # Row 12 moves by 4 - top; column 16 too, and to 31 - that when mirrored.
        assert torch.equal(rows.nonzero().ravel(), torch.arange(8, 17))
        assert torch.equal(columns.nonzero().ravel(), torch.arange(11, 21))
        twice = torch.tensor([1, 2, 2, 2, 2, 2, 2, 2, 2, 1])
        assert (rows[8:17] / (10_000 / 9) - 1).abs().max() < 0.1
        assert (columns[11:21] / (10_000 / 18 * twice) - 1).abs().max() < 0.15


class TestBatches:
    def test_every_image_once_an_epoch_in_a_new_order(self) -> None:
        batches = data.Batches(numbered(50), 16, MEAN, STD, augment=True, seed=1)
        orders = []
        for epoch in range(2):
            batches.set_epoch(epoch)
            labels = [labels for _, labels in batches]
            assert [len(batch) for batch in labels] == [16, 16, 16, 2]
            orders.append(torch.cat(labels))
            assert torch.equal(orders[-1].sort().values, torch.arange(50))
        assert len(batches) == 4
        assert not torch.equal(*orders)

    def test_images_stay_with_their_labels(self) -> None:
        part = numbered(20)
        batches = data.Batches(part, 6, (0.0,) * 3, (1.0,) * 3, augment=True, padding=0)
        for images, labels in batches:
            for image, label in zip((images * 255).round().to(torch.uint8), labels, strict=True):
                original = part.images[label]
                assert torch.equal(image, original) or torch.equal(image, original.flip(2))

    def test_alternating_flips_show_both_sides_of_every_image_in_two_epochs(self) -> None:
        part = numbered(60)

        def mirrored(seed: int, batch_size: int, epoch: int) -> torch.Tensor:
            """By image."""
            zeros, ones = (0.0,) * 3, (1.0,) * 3
            options: dict[str, Any] = {"augment": True, "padding": 0, "flip": "alternating"}
            batches = data.Batches(part, batch_size, zeros, ones, seed=seed, **options)
            batches.set_epoch(epoch)
            flips = torch.zeros(60, dtype=torch.bool)
            for images, labels in batches:
                pixels, original = (images * 255).round().to(torch.uint8), part.images[labels]
                flips[labels] = torch.tensor(
                    [torch.equal(*pair) for pair in zip(pixels, original.flip(3), strict=True)]
                )
                assert torch.equal(
                    pixels, torch.where(flips[labels, None, None, None], original.flip(3), original)
                )
            return flips

        first = mirrored(3, 16, 0)
        assert 15 < first.sum() < 45
        assert torch.equal(mirrored(3, 7, 1), ~first)
        assert torch.equal(mirrored(3, 16, 8), first)
        assert not torch.equal(mirrored(4, 16, 0), first)

    def test_kind_of_flips_changes_nothing_else(self) -> None:
        """Order, crop and square are those of random flips."""

        def epoch(flip: str, **more: int) -> list[torch.Tensor]:
            options: dict[str, Any] = {"augment": True, "seed": 3, "flip": flip, **more}
            batches = data.Batches(numbered(30), 8, (0.0,) * 3, (1.0,) * 3, **options)
            return [torch.cat(tensors) for tensors in zip(*batches, strict=True)]

        (drawn, labels), (in_turn, same_labels) = (epoch(f) for f in ("random", "alternating"))
        assert torch.equal(labels, same_labels)
        flips = [not torch.equal(a, b) for a, b in zip(drawn, in_turn, strict=True)]
        assert 0 < sum(flips) < 30
        assert torch.equal(
            drawn, torch.where(torch.tensor(flips)[:, None, None, None], in_turn.flip(3), in_turn)
        )
        holes = [(epoch(f, cutout=6, padding=0)[0] == 0).all(1) for f in ("random", "alternating")]
        assert holes[0].flatten(1).any(1).all()
        assert torch.equal(*holes)

    def test_unknown_kind_of_flips(self) -> None:
        with pytest.raises(ValueError, match="flip is 'often', expected random or alternating"):
            data.Batches(numbered(4), 2, MEAN, STD, flip="often")  # type: ignore[arg-type]

    def test_function_of_seed_and_epoch_alone(self) -> None:
        def epoch(seed: int, number: int) -> torch.Tensor:
            batches = data.Batches(numbered(10), 4, MEAN, STD, augment=True, seed=seed)
            batches.set_epoch(number)
            torch.rand(number + 1)  # the global generator has no say
            return torch.cat([images for images, _ in batches])

        assert torch.equal(epoch(5, 2), epoch(5, 2))
        assert not torch.equal(epoch(5, 2), epoch(5, 3))
        assert not torch.equal(epoch(5, 2), epoch(6, 2))

    def test_augmentation_does_not_depend_on_the_batch_size(self) -> None:
        def images(batch_size: int) -> torch.Tensor:
            batches = data.Batches(numbered(10), batch_size, MEAN, STD, augment=True)
            return torch.cat([images for images, _ in batches])

        assert torch.equal(images(3), images(10))

    @pytest.mark.parametrize("augment", [False, True])
    @pytest.mark.parametrize("size", [2, 3])
    def test_processes_together_have_the_batch(self, size: int, augment: bool) -> None:
        def epoch(share: tuple[int, int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
            options = {"augment": augment, "seed": 5, "cutout": 6 * augment, "share": share}
            batches = data.Batches(numbered(20), 8, MEAN, STD, **options)
            batches.set_epoch(2)
            return list(batches)

        parts = [epoch((rank, size)) for rank in range(size)]
        for whole, *shares in zip(epoch((0, 1)), *parts, strict=True):
            for together, pieces in zip(whole, zip(*shares, strict=True), strict=True):
                assert torch.equal(together, torch.cat(pieces))

    @pytest.mark.parametrize("augment", [False, True])
    def test_can_begin_in_the_middle(self, augment: bool) -> None:
        batches = data.Batches(numbered(10), 4, MEAN, STD, augment=augment)
        whole = list(batches)
        for first in range(4):
            rest = list(batches.iterate(first))
            assert len(rest) == 3 - first
            for (a, b), (c, d) in zip(whole[first:], rest, strict=True):
                assert torch.equal(a, c)
                assert torch.equal(b, d)

    @pytest.mark.parametrize("augment", [False, True])
    def test_memory_layout_is_a_choice(self, augment: bool) -> None:
        for channels_last in (True, False):
            layout = torch.channels_last if channels_last else torch.contiguous_format
            batches = data.Batches(
                numbered(6), 4, MEAN, STD, augment=augment, channels_last=channels_last
            )
            assert all(images.is_contiguous(memory_format=layout) for images, _ in batches)

    def test_without_augmentation_nothing_is_changed(self) -> None:
        part = numbered(10)
        batches = data.Batches(part, 4, MEAN, STD)
        images = torch.cat([images for images, _ in batches])
        assert torch.equal(images, data.normalize(part.images, MEAN, STD))
        assert torch.equal(torch.cat([labels for _, labels in batches]), part.labels)
        assert images.dtype == torch.float32
