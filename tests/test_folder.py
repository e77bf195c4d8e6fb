"""Own pictures: class folders, checked before training, read by any number of processes."""

import gc
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fastres import data, train
from fastres.cli import main
from fastres.data import draws
from fastres.data.folder import IMAGENET_MEAN, IMAGENET_STD
from fastres.train import checkpoint, loop, parts
from fastres.train.run import MODEL_KEYS, RUN_KEYS
from running import in_two, run_python
from tiny_runs import TINY, TINY_NAMES

CLASSES = ("cat", "dog", "owl")


def write_pictures(root: Path, count: int = 10, classes: tuple[str, ...] = CLASSES) -> Path:
    """ROOT/CLASS/N.png and .jpg: noise of each class's own brightness, of many shapes."""
    noise = np.random.default_rng(len(classes))
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            height, width = 34 + 3 * i, 60 - 2 * i
            pixels = noise.integers(60 * label, 60 * label + 120, (height, width, 3))
            suffix = "jpg" if i % 2 else "png"
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:02}.{suffix}")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pictures in three classes, for reading only."""
    return write_pictures(tmp_path_factory.mktemp("folder") / "pets")


@pytest.fixture
def own(pictures: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(pictures, tmp_path / "own"))


def relative(part: data.PictureSet, root: Path) -> list[str]:
    return [str(Path(path).relative_to(root)) for path in part.paths]


class TestFolder:
    def test_class_folders(self, pictures: Path) -> None:
        dataset = data.load(f"folder:{pictures}", "nowhere")
        assert isinstance(dataset, data.PictureFolder)
        assert dataset.classes == CLASSES
        assert relative(dataset.train, pictures)[:2] == ["cat/00.png", "cat/01.jpg"]
        assert dataset.train.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
        assert (dataset.valid, dataset.test) == (None, None)

    def test_folders_in_a_class_belong_to_it_and_dots_are_left_out(self, own: Path) -> None:
        (own / "dog" / "a").mkdir()
        (own / "dog" / "00.png").rename(own / "dog" / "a" / "z.PNG")
        (own / ".git").mkdir()
        (own / "cat" / ".DS_Store").write_text("")
        dataset = data.picture_folder(own)
        assert dataset.classes == CLASSES
        assert relative(dataset.train, own)[19] == "dog/a/z.PNG"
        assert len(dataset.train) == 30

    def test_parts_of_their_own(self, tmp_path: Path) -> None:
        for part, count in (("train", 5), ("valid", 3), ("test", 2)):
            write_pictures(tmp_path / part, count)
        shutil.rmtree(tmp_path / "test" / "cat")
        dataset = data.picture_folder(tmp_path)
        train, valid, test = dataset.split(0.2, 0.1, seed=0)
        assert (train.paths, len(train)) == (dataset.train.paths, 15)
        assert valid.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
        assert test.labels.tolist() == [1, 1, 2, 2]  # a part may lack a class: no other moves up

    @pytest.mark.parametrize("name", ["valid", "val", "validation"])
    def test_only_what_is_not_given_is_held_out(self, name: str, tmp_path: Path) -> None:
        for part, count in (("train", 5), (name, 3)):
            write_pictures(tmp_path / part, count)
        dataset = data.picture_folder(tmp_path)
        train, valid, test = dataset.split(0.4, 0.2, seed=0)
        assert [len(part) for part in (train, valid, test)] == [12, 9, 3]
        assert {Path(path).parts[-3] for path in valid.paths} == {name}
        assert {Path(path).parts[-3] for path in (*train.paths, *test.paths)} == {"train"}

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            ("shutil.rmtree(own)", r"there is no folder .*own: expected a folder of pictures"),
            ("shutil.rmtree(own); own.write_text('')", r"own is a file, expected a folder"),
            ("[shutil.rmtree(c) for c in own.iterdir()]", r"own is empty, expected class folders"),
            ("(own / 'a.png').write_text('')", r"own/a\.png is a file, expected nothing but fol"),
            ("shutil.rmtree(own / 'cat'); (own / 'cat').mkdir()", r"class cat has no picture: "),
            ("[shutil.rmtree(own / c) for c in ('cat', 'dog')]", r"own has the one class owl"),
            ("(own / 'dog' / 'a.gif').write_text('')", r"dog/a\.gif is no picture: .*\.jpg, "),
            ("(own / 'dog' / 'README').write_text('')", r"dog/README is no picture"),
            ("(own / 'cat').rename(own / 'train')", r"own/dog stands beside .*own/train"),
            ("(own / 'cat').rename(own / 'val'); (own / 'dog').rename(own / 'valid')",
             r"own/val and .*own/valid are both the valid part: expected one"),
            ("shutil.rmtree(own / 'owl'); (own / 'cat').rename(own / 'valid'); "
             "(own / 'dog').rename(own / 'test')", r"own has test and valid but no train folder"),
        ],
    )  # fmt: skip
    def test_wrong_layout_is_named(self, damage: str, message: str, own: Path) -> None:
        exec(damage, {"own": own, "shutil": shutil})
        with pytest.raises(data.DataError, match=message):
            data.picture_folder(own)

    def test_class_that_training_does_not_have(self, tmp_path: Path) -> None:
        write_pictures(tmp_path / "train", 2)
        write_pictures(tmp_path / "valid", 2, ("cat", "cow"))
        with pytest.raises(data.DataError, match=r"valid/cow is a class that .*train does not"):
            data.picture_folder(tmp_path)


class TestSplit:
    def test_each_class_gives_its_share_and_every_picture_is_used_once(
        self, pictures: Path
    ) -> None:
        dataset = data.picture_folder(pictures)
        split = dataset.split(0.2, 0.1, seed=3)
        assert [part.labels.bincount().tolist() for part in split] == [[7] * 3, [2] * 3, [1] * 3]
        assert sorted(path for part in split for path in part.paths) == sorted(dataset.train.paths)
        for part in split:
            names = [Path(path).parent.name for path in part.paths]
            assert names == [CLASSES[label] for label in part.labels]

    def test_follows_the_seed_alone(self, pictures: Path) -> None:
        dataset = data.picture_folder(pictures)
        torch.rand(1)
        again, other = dataset.split(0.2, 0.1, seed=3), dataset.split(0.2, 0.1, seed=4)
        assert dataset.split(0.2, 0.1, seed=3)[1].paths == again[1].paths
        assert other[1].paths != again[1].paths

    def test_small_classes_give_one_each_or_are_named(self, tmp_path: Path) -> None:
        dataset = data.picture_folder(write_pictures(tmp_path, 3))
        assert [len(part) for part in dataset.split(0.01, 0.01, seed=0)] == [3, 3, 3]
        (tmp_path / "dog" / "00.png").unlink()
        with pytest.raises(data.DataError, match=r"class dog in .* has 2 pictures, but 1 for vali"):
            data.picture_folder(tmp_path).split(0.01, 0.01, seed=0)


class TestCheck:
    def test_faults_are_named_and_the_rest_is_counted(self, own: Path) -> None:
        (own / "cat" / "03.jpg").write_text("no picture")
        for name in ("04.png", "05.jpg"):
            path = own / "cat" / name
            path.write_bytes(path.read_bytes()[:-900])
        (own / "dog" / "01.jpg").write_bytes(b"")
        (own / "dog" / "02.png").unlink()
        (own / "dog" / "02.png").symlink_to("nowhere.png")
        for i in (6, 7):
            Image.new("RGB", (50, 3)).save(own / "owl" / f"0{i}.{'jpg' if i % 2 else 'png'}")
        seen: list[int] = []
        with pytest.raises(data.DataError) as error:
            data.picture_folder(own).train.check(4, workers=2, on_picture=lambda: seen.append(1))
        message = str(error.value)
        assert message.startswith("7 of 30 pictures cannot be used: cannot read the image ")
        assert "cat/03.jpg: not an image; " in message
        assert "cat/04.png" in message and "cat/05.jpg" in message
        assert "dog/01.jpg: not an image; " in message
        assert message.endswith("dog/02.png; and 2 more")
        assert len(seen) == 30

    def test_can_be_broken_off(self, own: Path) -> None:
        """Ctrl-C does not wait until all pictures are decoded."""
        part = data.picture_folder(own).train
        opened: list[str] = []

        class BrokenError(Exception):
            pass

        def breaks() -> None:
            raise BrokenError

        def read(path: str) -> Image.Image:
            opened.append(path)
            return data.read_picture(path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastres.data.folder.read_picture", read)
            with pytest.raises(BrokenError):
                data.PictureSet(part.paths * 99, part.labels.repeat(99)).check(4, on_picture=breaks)
        assert len(opened) < 99 * 30

    def test_sixteen_bits_are_not_cut_to_eight(self, own: Path) -> None:
        Image.fromarray(np.full((40, 40), 3000, np.uint16)).save(own / "owl" / "06.png")
        with pytest.raises(
            data.DataError, match=r"owl/06\.png: its pixels are of mode I;16, expected 8 bits"
        ):
            data.picture_folder(own).train.check(4)

    def test_tiny_pictures(self, own: Path) -> None:
        Image.new("RGB", (50, 3)).save(own / "owl" / "06.png")
        part = data.picture_folder(own).train
        part.check(3)
        with pytest.raises(
            data.DataError, match=r"owl/06\.png has 50 x 3 pixels, expected at least 4 a side"
        ):
            part.check(4)


def batches(part: data.PictureSet, batch_size: int = 4, **options: Any) -> data.PictureBatches:
    sizes = {"image_size": 72, "resize_size": 82}
    return data.PictureBatches(
        part, batch_size, IMAGENET_MEAN, IMAGENET_STD, **{**sizes, **options}
    )


def assert_equal(one: Any, other: Any) -> None:
    one, other = list(one), list(other)
    assert len(one) == len(other)
    for (a, b), (c, d) in zip(one, other, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


class TestBatches:
    @pytest.fixture
    def part(self, pictures: Path) -> data.PictureSet:
        return data.picture_folder(pictures).train

    def test_evaluation_is_torchvisions(self, part: data.PictureSet) -> None:
        theirs = v2.Compose(
            [
                v2.Resize(30),
                v2.CenterCrop(24),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )
        ours = list(batches(part, image_size=24, resize_size=30))
        assert [len(labels) for _, labels in ours] == [4] * 7 + [2]
        assert torch.equal(torch.cat([labels for _, labels in ours]), part.labels)
        for images, _ in ours:
            assert images.is_contiguous(memory_format=torch.channels_last)
        images = torch.cat([images for images, _ in ours])
        for image, path in zip(images, part.paths, strict=True):
            torch.testing.assert_close(image, theirs(Image.open(path).convert("RGB")))

    @pytest.mark.parametrize("augment", [False, True])
    def test_workers_change_nothing(self, augment: bool, part: data.PictureSet) -> None:
        def epoch(workers: int) -> list[Any]:
            made = batches(part, augment=augment, seed=5, workers=workers)
            made.set_epoch(2)
            torch.rand(workers)  # the global generator has no say
            return list(made)

        alone = epoch(0)
        assert_equal(alone, epoch(1))
        assert_equal(alone, epoch(2))

    def test_function_of_seed_and_epoch(self, part: data.PictureSet) -> None:
        def epoch(seed: int, number: int) -> torch.Tensor:
            made = batches(part, 30, augment=True, seed=seed)
            made.set_epoch(number)
            ((images, labels),) = made
            assert torch.equal(labels.sort().values, part.labels)
            return images[labels.argsort(stable=True)]

        first = epoch(5, 2)
        assert torch.equal(first, epoch(5, 2))
        assert not torch.equal(first, epoch(5, 3))
        assert not torch.equal(first, epoch(6, 2))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_alternating_flips_show_both_sides_in_two_epochs(
        self, workers: int, tmp_path: Path
    ) -> None:
        """Pictures that grow brighter from left to right, or darker once mirrored."""
        ramp = np.broadcast_to(np.linspace(40, 250, 80)[:, None], (80, 80, 3)).astype(np.uint8)
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            for i in range(10):
                Image.fromarray(ramp).save(tmp_path / name / f"{i}.png")
        paths = tuple(sorted(str(path) for path in tmp_path.rglob("*.png")))
        part = data.PictureSet(paths, torch.arange(20))
        made = batches(part, 6, augment=True, seed=3, workers=workers, flip="alternating")

        def mirrored(epoch: int) -> torch.Tensor:
            made.set_epoch(epoch)
            flips = torch.zeros(20, dtype=torch.bool)
            for images, labels in made:
                flips[labels] = images[:, 0, 36, 24] > images[:, 0, 36, 48]
            return flips

        first = mirrored(0)
        assert 3 < first.sum() < 17
        assert torch.equal(mirrored(1), ~first)
        assert torch.equal(mirrored(6), first)

    def test_unknown_kind_of_flips(self, part: data.PictureSet) -> None:
        with pytest.raises(ValueError, match="flip is 'often', expected random or alternating"):
            batches(part, flip="often")

    def test_cutout_changes_nothing_else(self, part: data.PictureSet) -> None:
        """Order, crop and flip are as without, in the middle of an epoch too."""
        plain, cut = (batches(part, augment=True, seed=3, cutout=side) for side in (0, 9))
        for (a, labels), (b, same) in zip(plain.iterate(1), cut.iterate(1), strict=True):
            assert torch.equal(labels, same)
            hole = (b == 0).all(1)
            assert hole.flatten(1).any(1).all()
            assert torch.equal(a.masked_fill(hole[:, None], 0), b)
        whole = [images for images, _ in cut]
        assert all(torch.equal(a, b) for a, (b, _) in zip(whole[1:], cut.iterate(1), strict=True))

    def test_pictures_stay_with_their_labels(self, part: data.PictureSet) -> None:
        """The classes differ in brightness, whatever is cut out of a picture."""
        for images, labels in batches(part, augment=True):
            brightness = images.mean((1, 2, 3))
            assert torch.equal(torch.bucketize(brightness, torch.tensor([-0.1, 0.9])), labels)

    def test_augmentation_does_not_depend_on_the_batch_size(self, part: data.PictureSet) -> None:
        few, many = (
            torch.cat([images for images, _ in batches(part, size, augment=True)])
            for size in (3, 30)
        )
        assert torch.equal(few, many)

    @pytest.mark.parametrize("augment", [False, True])
    def test_can_begin_in_the_middle(self, augment: bool, part: data.PictureSet) -> None:
        made = batches(part, augment=augment, workers=2)
        whole = list(made)
        for first in (0, 3, len(made)):
            assert_equal(whole[first:], made.iterate(first))

    def test_processes_together_have_the_batch(self, part: data.PictureSet) -> None:
        whole, *halves = (
            list(batches(part, augment=True, seed=5, cutout=9, share=share))
            for share in ((0, 1), (0, 2), (1, 2))
        )
        for batch, *pieces in zip(whole, *halves, strict=True):
            for together, of_each in zip(batch, zip(*pieces, strict=True), strict=True):
                assert torch.equal(together, torch.cat(of_each))

    def test_global_generator_is_left_alone(self, part: data.PictureSet) -> None:
        before = torch.get_rng_state()
        for workers in (0, 2):
            list(batches(part, augment=True, workers=workers))
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_iteration_that_was_left_does_no_harm(
        self, workers: int, part: data.PictureSet
    ) -> None:
        made = batches(part, augment=True, workers=workers)
        whole = list(made)
        left = iter(made)
        next(left)
        again = iter(made)
        assert_equal([next(again)], whole[:1])
        with pytest.raises(RuntimeError, match="another iteration of these batches has begun"):
            next(left)
        assert_equal(again, whole[1:])

    def test_workers_stay(self, part: data.PictureSet) -> None:
        made = batches(part, augment=True, workers=2)
        list(made)
        before = {child.pid for child in multiprocessing.active_children()}
        made.set_epoch(1)
        list(made)
        assert {child.pid for child in multiprocessing.active_children()} == before

    def test_workers_leave_signals_to_their_parent(self, part: data.PictureSet) -> None:
        made = batches(part, augment=True, workers=2)
        others = multiprocessing.active_children()
        whole = list(made)
        for process in set(multiprocessing.active_children()) - set(others):
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(process.pid, number)
        assert_equal(whole, iter(made))

    def test_workers_end_with_batches_that_only_a_cycle_holds(self, part: data.PictureSet) -> None:
        """An error's traceback is one. There the queues may be gone before the iterator is."""
        made = batches(part, augment=True, workers=2)
        others = multiprocessing.active_children()
        list(made)
        processes = set(multiprocessing.active_children()) - set(others)
        assert len(processes) == 2
        made.cycle = made
        del made
        gc.collect()
        assert [process.exitcode for process in processes] == [0, 0]

    def test_workers_end_with_their_program(self, pictures: Path) -> None:
        """In whose last moment the batches are still there."""
        done = run_python(f"""
from fastres import data
part = data.picture_folder({str(pictures)!r}).train
sizes = dict(image_size=72, resize_size=82, workers=2, augment=True)
batches = data.PictureBatches(part, 4, (0.5,) * 3, (0.5,) * 3, **sizes)
for images, labels in batches:
    raise SystemError("mine")
""")
        assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "SystemError: mine")

    @pytest.mark.parametrize("workers", [0, 2])
    def test_vanished_picture_is_named(self, workers: int, own: Path) -> None:
        part = data.picture_folder(own).train
        (own / "dog" / "04.png").unlink()
        made = iter(batches(part, workers=workers))
        for _ in range(3):
            next(made)
        with pytest.raises(data.DataError, match=r"^no image at .*dog/04\.png$"):
            next(made)

    def test_camera_that_was_held_upright(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter before it is shown
        Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
        assert data.read_picture(tmp_path / "a.jpg").size == (20, 40)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("run", "inference"):
        monkeypatch.setattr(f"fastres.train.{module}.build_model", TINY_NAMES["build_model"])


def fit(out: Path, source: Path, **changes: Any) -> train.Result:
    settings: dict[str, Any] = {
        "epochs": 2, "batch_size": 4, "device": "cpu", "image_size": 32, "workers": 0,
    }  # fmt: skip
    settings |= changes
    return train.fit(
        train.TrainConfig(out=out, data=f"folder:{source}", **settings), progress=False
    )


def last(out: Path) -> dict[str, Any]:
    return checkpoint.load(out / "last.pt", RUN_KEYS)


def assert_same_end(one: Path, other: Path) -> None:
    a, b = last(one), last(other)
    assert (a["epoch"], a["early_stopping"]) == (b["epoch"], b["early_stopping"])
    for key, value in a["model"].items():
        assert torch.equal(value, b["model"][key]), key
    losses = [[line["train_loss"] for line in content["history"]] for content in (a, b)]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def unbroken(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("unbroken") / "run"

    def folder() -> Path:  # called in a test, where the tiny model is in place
        if not out.exists():
            fit(out, pictures)
        return out

    return folder


@pytest.mark.usefixtures("tiny")
class TestFit:
    def test_workers_change_nothing(
        self, pictures: Path, tmp_path: Path, unbroken: Callable[[], Path]
    ) -> None:
        fit(tmp_path / "run", pictures, workers=2)
        assert_same_end(tmp_path / "run", unbroken())

    def test_interrupted_and_resumed_is_bit_equal(
        self,
        pictures: Path,
        tmp_path: Path,
        unbroken: Callable[[], Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """After step 3 of epoch 2, and from pictures that were moved meanwhile."""
        out = tmp_path / "run"
        real = data.PictureBatches.iterate

        def iterate(self: data.PictureBatches, first: int = 0) -> Any:
            for step, batch in enumerate(real(self, first), start=1):
                if self.augment and (self.epoch, step) == (1, 3):
                    os.kill(os.getpid(), signal.SIGINT)
                yield batch

        with monkeypatch.context() as patch:
            patch.setattr(data.PictureBatches, "iterate", iterate)
            with pytest.raises(train.RunInterruptedError):
                fit(out, pictures, workers=2)
        assert last(out)["meter"]["step"] == 3
        moved = Path(shutil.copytree(pictures, tmp_path / "moved"))
        fit(out, moved, workers=1, resume=True)
        assert_same_end(out, unbroken())

    def test_picture_that_goes_missing_costs_nothing(
        self, own: Path, tmp_path: Path, unbroken: Callable[[], Path]
    ) -> None:
        """Not even the steps of the epoch before it is needed."""
        out = tmp_path / "run"
        (training, _, _) = data.picture_folder(own).split(0.2, 0.1, seed=0)
        order = torch.randperm(len(training), generator=draws.generator(draws.EPOCH, 0, 0))
        gone = Path(training.paths[order[13]])  # in the fourth batch
        kept = gone.read_bytes()
        real = parts.check_pictures

        def then_it_goes(*arguments: Any, **options: Any) -> None:
            real(*arguments, **options)
            gone.unlink()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "check_pictures", then_it_goes)
            with pytest.raises(data.DataError, match=f"no image at {gone}"):
                fit(out, own)
        assert (last(out)["epoch"], last(out)["meter"]["step"]) == (0, 3)
        gone.write_bytes(kept)
        fit(out, own, resume=True)
        assert_same_end(out, unbroken())

    def test_other_pictures_are_not_resumed(self, own: Path, tmp_path: Path) -> None:
        fit(tmp_path / "run", own, epochs=1)
        (own / "cat" / "00.png").rename(own / "cat" / "new.png")
        with pytest.raises(train.RunFolderError, match=r"own has other pictures than .*own had"):
            fit(tmp_path / "run", own, resume=True)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            ("(own / 'owl' / '04.png').write_text('x')", r"1 of 30 .*owl/04\.png: not an image"),
            ("Image.new('L', (3, 3)).save(own / 'owl' / '04.png')", r"owl/04\.png has 3 x 3 pix"),
            ("(own / 'notes.txt').write_text('x')", r"notes\.txt is a file"),
        ],
    )
    def test_nothing_is_begun_with_bad_pictures(
        self, damage: str, message: str, own: Path, tmp_path: Path
    ) -> None:
        exec(damage, {"own": own, "Image": Image})
        with pytest.raises(data.DataError, match=message):
            fit(tmp_path / "run", own)
        assert not (tmp_path / "run").exists()

    def test_default_folder_has_the_pictures_name(
        self, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        settings: dict[str, Any] = {"epochs": 1, "image_size": 32, "workers": 0}
        result = train.fit(train.TrainConfig(data=f"folder:{pictures}", **settings), progress=False)
        assert result.folder.name.startswith("pets-resnet18-2")

    def test_eval_takes_the_pictures_that_were_held_out(
        self, own: Path, pictures: Path, tmp_path: Path
    ) -> None:
        result = fit(tmp_path / "run", own)

        def evaluate(source: Path | None) -> train.Meter:
            name = None if source is None else f"folder:{source}"
            return train.evaluate_checkpoint(
                train.EvalConfig(result.best_checkpoint, data=name, workers=0)
            )[1]

        meter = evaluate(None)
        assert (meter.images, meter.accuracy) == (3, result.test_accuracy)
        assert meter.mean_loss == pytest.approx(result.test_loss)
        assert evaluate(pictures).mean_loss == meter.mean_loss  # the same ones, elsewhere
        assert evaluate(write_pictures(tmp_path / "unseen", 2)).images == 6
        Image.new("RGB", (40, 40)).save(own / "cat" / "new.png")
        with pytest.raises(data.DataError, match="has other pictures than when the run began"):
            evaluate(None)
        (own / "cow").mkdir()
        shutil.copy(own / "cat" / "new.png", own / "cow")
        with pytest.raises(data.DataError, match="has other classes than"):
            evaluate(None)


# One of two processes, whose part of a batch is lost after the first of them checked the pictures.
TWO = """
import sys
from pathlib import Path
from fastres import cli
from fastres.train import loop
from fastres.train import run as run_state

run_state.build_model = build_model
check = loop.check_pictures

def then_it_goes(*arguments, **options):
    check(*arguments, **options)
    print("checked", flush=True)
    Path(sys.argv[-1]).unlink()

loop.check_pictures = then_it_goes
sys.exit(cli.main(sys.argv[1:-1]))
"""


def test_picture_that_one_of_two_processes_misses(own: Path, tmp_path: Path) -> None:
    """Both end, with all steps before it saved; the first alone has checked the pictures."""
    (training, _, _) = data.picture_folder(own).split(0.2, 0.1, seed=0)
    order = torch.randperm(len(training), generator=draws.generator(draws.EPOCH, 0, 0))
    gone = training.paths[order[11]]  # the last of the fourth batch of three
    (tmp_path / "two.py").write_text(TINY + TWO)
    out = tmp_path / "run"
    words = f"train --data folder:{own} --batch-size 3 --image-size 32 --workers 0 --device cpu"
    first, second = in_two(tmp_path / "two.py", *words.split(), "--out", str(out), gone)
    (code, said, heard), (other_code, also_said, error) = first, second
    assert (code, other_code) == (130, 2), heard + error
    assert error.endswith(f"fastres: error: no image at {gone}\n")
    assert "go on with: fastres train" in heard and "Traceback" not in heard + error
    assert (said.count("checked"), also_said) == (1, "")
    saved = last(out)
    assert (saved["epoch"], saved["meter"]["step"], saved["meter"]["images"]) == (0, 3, 9)


@pytest.mark.usefixtures("tiny")
def test_eval_of_other_sizes_is_refused(tmp_path: Path) -> None:
    classes = data.sample().classes
    source = write_pictures(tmp_path / "pictures", 3, tuple(classes))
    best = fit(tmp_path / "run", source, epochs=1, image_size=40).best_checkpoint
    with pytest.raises(data.DataError, match=r"sample has images of 32 pixels, but .* on 40"):
        train.evaluate_checkpoint(train.EvalConfig(best, data="sample"))


def test_settings() -> None:
    with pytest.raises(train.ConfigError, match=r"data is 'folder:', expected .* or folder:PATH"):
        train.TrainConfig(data="folder:")
    with pytest.raises(train.ConfigError, match="image_size is 64, expected --data folder:PATH"):
        train.TrainConfig(image_size=64)
    assert train.TrainConfig(data="folder:x", image_size=64).image_size == 64


@pytest.mark.parametrize(
    ("size", "stem"), [(32, "cifar"), (64, "cifar"), (96, "imagenet"), (224, "imagenet")]
)
def test_stem_fits_the_size(size: int, stem: str) -> None:
    config = train.TrainConfig(data="folder:x")
    assert parts.stem_for(size, config) == stem
    assert parts.stem_for(size, train.TrainConfig(stem="imagenet")) == "imagenet"


def test_sample_as_a_folder_gives_the_samples_images(tmp_path: Path) -> None:
    """Small pictures are neither resized nor cut: what the model gets is what memory has."""
    sample = data.sample()
    few = sample.test[torch.arange(40)]
    for i, (image, label) in enumerate(zip(few.images, few.labels, strict=True)):
        path = tmp_path / sample.classes[label] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    part = data.picture_folder(tmp_path).train
    settings = {"image_size": 32, "resize_size": 32}
    ((images, labels),) = data.PictureBatches(part, 40, sample.mean, sample.std, **settings)
    order = torch.tensor([int(Path(path).stem) for path in part.paths])
    assert torch.equal(labels, few.labels[order])
    assert torch.equal(images, data.normalize(few.images[order], sample.mean, sample.std))

    # In training too: each is one of the crops that there are of it.
    made = data.PictureBatches(part, 40, (0.0,) * 3, (1.0,) * 3, augment=True, **settings)
    ((images, _),) = made
    shuffled = torch.randperm(40, generator=draws.generator(draws.EPOCH, 0, 0))
    side = torch.arange(9)
    top, left, flip = torch.cartesian_prod(side, side, torch.arange(2)).T
    seen = set()
    for image, original in zip(images, few.images[order[shuffled]], strict=True):
        copies = original.expand(len(flip), -1, -1, -1)
        crops = data.random_crop_flip(copies, top, left, flip.bool(), padding=4)
        (which,) = (crops == (image * 255).round()).flatten(1).all(1).nonzero().ravel()[:1]
        seen.add(int(which))
    assert len(seen) > 20


def test_whole_road_at_224_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """train, eval and predict by the command line, with a real ResNet."""
    monkeypatch.chdir(tmp_path)
    source = write_pictures(Path("pets"), 4, ("cat", "dog"))

    def fastres(arguments: str) -> str:
        code = main(arguments.split())
        said = capsys.readouterr()
        assert code == 0, said.err
        return said.out

    said = fastres("train --data folder:pets --epochs 1 --batch-size 4 --device cpu --out run")
    assert "4 training, 2 validation, 2 test images" in said
    content = checkpoint.load(Path("run/best.pt"), MODEL_KEYS)
    assert (content["image_size"], content["resize_size"]) == (224, 256)
    assert content["model_arguments"] == {"stem": "imagenet", "num_classes": 2}
    assert content["mean"] == list(IMAGENET_MEAN)

    monkeypatch.chdir("run")  # wherever the checkpoint is used, it knows its pictures
    said = fastres("eval --checkpoint best.pt --workers 0").splitlines()
    monkeypatch.chdir(tmp_path)
    assert said[0].endswith(f"(2 images of folder:{tmp_path / source})")
    assert [line.split()[0] for line in said[2:]] == ["cat", "dog"]

    picture = source / "dog" / "02.png"
    said = fastres(f"predict {picture} --checkpoint run/best.pt --top 2")
    name, *found = said.splitlines()[1].split()
    assert name == str(picture)
    model, _ = train.load_model(Path("run/best.pt"), fused=False)
    image = v2.functional.pil_to_tensor(
        v2.CenterCrop(224)(v2.Resize(256)(Image.open(picture).convert("RGB")))
    )
    with torch.inference_mode():
        logits = model(data.normalize(image[None], IMAGENET_MEAN, IMAGENET_STD))
    for name, share in zip(found[::2], found[1::2], strict=True):
        expected = float(logits.softmax(1)[0, ("cat", "dog").index(name)])
        assert float(share.rstrip("%")) / 100 == pytest.approx(expected, abs=1e-3)
