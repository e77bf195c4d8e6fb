"""How a gradient's size changes on its way through a deep network, plain against residual.

    python examples/gradient_norm_by_depth.py --out docs/gradient-norm-by-depth.svg

Four untrained networks of the same convolutions, from the same seed: with or without residual
connections, with or without BatchNorm. One backward each, on real images; drawn is the norm of the
loss's gradient with respect to every block's output. Takes a minute on a CPU.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import fastres
from fastres import data


class PlainBlock(BasicBlock):
    """A BasicBlock without its residual connection: the same parameters, nothing added."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))


# Name -> block, norm layer, colour, line.
NETWORKS: dict[str, tuple[type[BasicBlock], Callable[..., nn.Module], str, str]] = {
    "plain": (PlainBlock, nn.Identity, "#d9822b", "--"),
    "plain, BatchNorm": (PlainBlock, nn.BatchNorm2d, "#d9822b", "-"),
    "residual": (BasicBlock, nn.Identity, "#3b75af", "--"),
    "residual, BatchNorm": (BasicBlock, nn.BatchNorm2d, "#3b75af", "-"),
}


def gradient_norms(model: fastres.ResNet, images: Tensor, labels: Tensor) -> list[float]:
    """The gradient's norm at the output of every block, from the first to the last.

    Args:
        model: in training mode.
        images: (N, 3, H, W), normalised.
        labels: (N,), int64.
    """
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    hooks = [block.register_forward_hook(keep) for block in model.blocks()]
    F.cross_entropy(model(images), labels).backward()
    for hook in hooks:
        hook.remove()
    return [float(output.grad.norm()) for output in outputs if output.grad is not None]


def measure(images: int = 16, blocks: int = 12, size: int = 16) -> dict[str, list[float]]:
    """Each network's norms.

    Args:
        images: of the packaged sample.
        blocks: in each of the four stages, of two convolutions each.
        size: pixels a side, of the images' middle.
    """
    sample = data.sample()
    few = sample.train[torch.arange(images)]
    edge = (few.images.shape[2] - size) // 2
    middle = few.images[:, :, edge : edge + size, edge : edge + size]
    pictures = data.normalize(middle, sample.mean, sample.std)
    norms = {}
    for name, (block, norm_layer, *_) in NETWORKS.items():
        torch.manual_seed(0)
        model = fastres.ResNet(
            block, [blocks] * 4, num_classes=10, norm_layer=norm_layer, stem="cifar",
            shortcut="zero_pad",
        )  # fmt: skip
        norms[name] = gradient_norms(model, pictures, few.labels)
    return norms


def draw(norms: dict[str, list[float]]) -> Figure:
    """The norms by the blocks' number, relative to the last block's."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    ax = figure.subplots()
    for name, values in norms.items():
        *_, colour, line = NETWORKS[name]
        relative = [value / values[-1] for value in values]
        ax.semilogy(range(1, len(values) + 1), relative, line, color=colour, label=name)
    ax.set_xlabel("block, from the input to the loss")
    ax.set_ylabel("gradient norm, relative to the last block's")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return figure


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Measure, print and draw; returns each network's norms."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gradient-norm-by-depth.svg"))
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=12, help="in each of the four stages")
    parser.add_argument("--size", type=int, default=16, help="pixels a side")
    options = parser.parse_args(arguments)
    norms = measure(options.images, options.blocks, options.size)
    for name, values in norms.items():
        print(f"{name}: the first block's gradient is {values[0] / values[-1]:.2g} of the last's")
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastres"}):
        draw(norms).savefig(options.out, metadata={"Date": None, "Creator": None})
    return norms


if __name__ == "__main__":
    main()
