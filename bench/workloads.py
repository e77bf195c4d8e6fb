"""The models, layers and batches that the benches run on, torchvision's and ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from rivals import load
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class ModelCase:
    """A model of the family on a batch (n, 3, size, size).

    `short`: one block a stage. `bf16`: under autocast to bfloat16 on the CPU too.
    """

    model: str
    size: int
    n: int
    stem: str = "imagenet"
    short: bool = False
    bf16: bool = False

    @property
    def classes(self) -> int:
        return 10 if self.stem == "cifar" else 1000

    def __str__(self) -> str:
        stem = "cifar-" if self.stem == "cifar" else ""
        short = "-short" if self.short else ""
        return f"{stem}{self.model}{short}-{self.size}px-n{self.n}{'-bf16' * self.bf16}"


def cifar(model: str, n: int, *, bf16: bool = False) -> ModelCase:
    return ModelCase(model, 32, n, "cifar", bf16=bf16)


# Compiling takes most of a quick run's time, so the model has one block of each kind.
QUICK = ModelCase("resnet18", 32, 4, "cifar", short=True)


def shorten(model: nn.Module) -> None:
    """Leave one block in each stage."""
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        setattr(model, stage, getattr(model, stage)[:1])


def torchvision_model(case: ModelCase) -> nn.Module:
    """torchvision's model, seeded, with BatchNorm statistics of real activations.

    Fresh running statistics (0 and 1) let the activations of a deep network grow without bound,
    which no trained network does and which would hide errors.
    """
    torch.manual_seed(0)
    model = getattr(torchvision.models, case.model)(num_classes=case.classes)
    if case.stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    if case.short:
        shorten(model)
    return settled(model, case.size)


def settled(model: nn.Module, size: int) -> nn.Module:
    """The model with BatchNorm statistics of real activations, of pictures of at most 64 pixels."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.0)
        nn.init.normal_(norm.bias, 0, 0.1)
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, min(size, 64), min(size, 64)))
    for norm in norms:
        norm.momentum = 0.1
    return model


class Logits(nn.Module):
    """A model of Hugging Face's that returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def resnet50_of(library: str, size: int, short: bool = False) -> nn.Module:
    """A seeded ResNet-50 of torchvision, timm or transformers; `short`: one block a stage."""
    torch.manual_seed(0)
    depths = [1, 1, 1, 1] if short else [3, 4, 6, 3]
    if library == "torchvision":
        block = torchvision.models.resnet.Bottleneck
        model: nn.Module = torchvision.models.ResNet(block, depths)
    elif library == "timm":
        model = load("timm").create_model("resnet50", layers=depths)
    else:
        transformers = load("transformers")
        config = transformers.ResNetConfig(depths=depths, num_labels=1000)
        model = Logits(transformers.ResNetForImageClassification(config))
    return settled(model, size)


def fastres_model(case: ModelCase, theirs: nn.Module) -> nn.Module:
    """fastres's fused model with the parameters, device and mode of torchvision's."""
    models = load("fastres.models")
    build = getattr(models, case.model)
    ours = build(num_classes=case.classes, stem=case.stem, fused=True)
    if case.short:
        shorten(ours)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(next(theirs.parameters()).device).train(theirs.training)


def model_flops(model: nn.Module, x: Tensor, training: bool) -> int:
    """FLOPs of the forward, or of forward and backward, a multiply-add being two."""
    shadow = copy.deepcopy(model).to("meta").train(training)
    with FlopCounterMode(display=False) as counter:
        output = shadow(x.to("meta"))
        if training:
            output.sum().backward()
    return counter.get_total_flops()


def batch(case: ModelCase, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Seeded images (n, 3, size, size) float32 in channels_last, and labels (n,)."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.n, 3, case.size, case.size, generator=generator)
    labels = torch.randint(case.classes, (case.n,), generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    return images.to(device), labels.to(device)


class ConvBNReLU(nn.Module):
    """relu(bn(conv(x)) [+ residual]) as torchvision spells it."""

    def __init__(self, conv, residual: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            conv.c_in, conv.c_out, conv.kernel, conv.stride, conv.padding, bias=False
        )
        self.bn = nn.BatchNorm2d(conv.c_out)
        nn.init.uniform_(self.bn.running_mean, -0.5, 0.5)
        nn.init.uniform_(self.bn.running_var, 0.5, 1.5)
        nn.init.uniform_(self.bn.weight, 0.5, 1.5)
        nn.init.uniform_(self.bn.bias, -0.5, 0.5)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x))
        return torch.relu(y if residual is None else y + residual)


def fused_conv_bn_relu(module: ConvBNReLU) -> Callable[..., Tensor]:
    """The op fastres::conv_bn_relu with `module`'s parameters, its weight packed beforehand."""
    ops = load("fastres.ops")
    conv, bn = module.conv, module.bn
    weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)
    geometry = [list(conv.stride), list(conv.padding), [1, 1], 1]
    packed = ops.pack_conv_weight(weight, *geometry)

    def forward(x: Tensor, residual: Tensor | None = None) -> Tensor:
        w = weight if x.dtype == weight.dtype else weight.to(x.dtype)
        return ops.conv_bn_relu(
            x, w, None, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps,
            residual, *geometry, True, packed if w is weight else None,
        )  # fmt: skip

    return forward


def images_uint8(n: int) -> tuple[Tensor, Tensor]:
    """Seeded pictures (n, 32, 32, 3) uint8, as CIFAR-10 keeps them, and labels (n,)."""
    generator = torch.Generator().manual_seed(2)
    pictures = torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return pictures, torch.randint(10, (n,), generator=generator)


def write_jpegs(folder: Path, n: int) -> None:
    """`n` JPEG files of 500 x 375 pixels, as large as ImageNet's are on average, in two classes.

    Smooth noise: it is compressed to about as many bytes as a photograph.
    """
    from PIL import Image

    generator = torch.Generator().manual_seed(3)
    for number in range(n):
        path = folder / f"class-{number % 2}" / f"{number:04}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse = torch.rand(1, 3, 94, 125, generator=generator) * 255
        pixels = nn.functional.interpolate(coarse, (375, 500), mode="bicubic").clamp(0, 255)
        Image.fromarray(pixels[0].permute(1, 2, 0).byte().numpy()).save(path, quality=90)


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def fastres_pictures(folder: Path, batch_size: int, augment: bool, workers: int):
    """fastres's batches of picture files at 224 pixels."""
    data = load("fastres.data")
    return data.PictureBatches(
        data.picture_folder(folder).train,
        batch_size,
        IMAGENET_MEAN,
        IMAGENET_STD,
        image_size=224,
        resize_size=256,
        augment=augment,
        workers=workers,
    )


def image_folder_loader(folder: Path, batch_size: int, augment: bool, workers: int, v2: bool):
    """torchvision's ImageFolder in a DataLoader, with the same transforms as fastres's."""
    if v2:
        from torchvision.transforms import v2 as t

        tail: Sequence = [t.PILToTensor(), t.ToDtype(torch.float32, scale=True)]
    else:
        from torchvision import transforms as t

        tail = [t.ToTensor()]
    head = [t.Resize(256), t.CenterCrop(224)]
    if augment:
        head = [t.RandomResizedCrop(224), t.RandomHorizontalFlip()]
    return torch.utils.data.DataLoader(
        torchvision.datasets.ImageFolder(
            folder, t.Compose([*head, *tail, t.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
        ),
        batch_size,
        shuffle=augment,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def fastres_batches(pictures: Tensor, labels: Tensor, batch_size: int, augment: bool):
    """fastres's batch pipeline over pictures (N, 32, 32, 3) uint8."""
    data = load("fastres.data")
    part = data.ImageSet(pictures.permute(0, 3, 1, 2), labels)
    return data.Batches(part, batch_size, MEAN, STD, augment=augment, seed=0)


class PictureDataset(torch.utils.data.Dataset):
    """What torchvision.datasets.CIFAR10 does: a picture, its transform, its label."""

    def __init__(self, pictures: Tensor, labels: Tensor, transform: Callable) -> None:
        self.pictures, self.labels, self.transform = pictures.numpy(), labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.pictures[index])), self.labels[index]


def torchvision_loader(
    pictures: Tensor, labels: Tensor, batch_size: int, augment: bool, workers: int, v2: bool
):
    """DataLoader with torchvision's transforms, its workers kept from epoch to epoch."""
    if v2:
        from torchvision.transforms import v2 as t

        tail: Sequence = [t.ToImage(), t.ToDtype(torch.float32, scale=True), t.Normalize(MEAN, STD)]
    else:
        from torchvision import transforms as t

        tail = [t.ToTensor(), t.Normalize(MEAN, STD)]
    head = [t.RandomCrop(32, padding=4), t.RandomHorizontalFlip()] if augment else []
    return torch.utils.data.DataLoader(
        PictureDataset(pictures, labels, t.Compose([*head, *tail])),
        batch_size,
        shuffle=augment,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
