"""One table of named shapes, for the tests and the benches.

Every convolution of the ResNet family (18 to 152), ImageNet and CIFAR stems, is in `RESNET_CONVS`
once; `ODD_CONVS` are shapes that kernels get wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Conv:
    """A convolution: (n, c_in, size, size) -> (n, c_out, out, out)."""

    name: str
    c_in: int
    c_out: int
    kernel: int
    stride: int
    size: int
    n: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def flops(self) -> int:
        """Floating-point operations of the direct convolution, a multiply-add being two."""
        taps = self.kernel * self.kernel * self.c_in
        return 2 * self.n * self.out * self.out * self.c_out * taps

    @property
    def winograd(self) -> tuple[str, ...]:
        """Which of Winograd's algorithms can compute it."""
        if self.kernel == 3 and self.stride <= 2 and self.c_in % 16 == self.c_out % 16 == 0:
            return "winograd4", "winograd2"
        stem = self.kernel == 7 and self.stride == 2 and self.c_in <= 4 and self.c_out % 16 == 0
        return ("winograd4",) if stem else ()

    @property
    def factor(self) -> float:
        """How many times torch's own error fastres's may be: F(4,3) on squares rounds more."""
        return 4.0 if "winograd2" in self.winograd and self.stride == 1 else 2.0

    def batch(self, n: int) -> Conv:
        return replace(self, n=n)

    def at(self, size: int) -> Conv:
        """The same convolution on a smaller or larger picture."""
        return replace(self, size=size)

    def __str__(self) -> str:
        return f"{self.name}-n{self.n}-{self.size}px"


def _conv(c_in: int, c_out: int, kernel: int, stride: int, size: int, family: str) -> Conv:
    name = f"{family}-{kernel}x{kernel}s{stride}-{c_in}to{c_out}"
    return Conv(name, c_in, c_out, kernel, stride, size)


def _resnet_convs() -> tuple[Conv, ...]:
    convs = [_conv(3, 64, 7, 2, 224, "imagenet"), _conv(3, 64, 3, 1, 32, "cifar")]
    for family, first in (("imagenet", 56), ("cifar", 32)):
        c_basic = c_bottleneck = 64
        size = first
        for stage, width in enumerate((64, 128, 256, 512)):
            stride, wide = (1 if stage == 0 else 2), 4 * width
            before, size = size, (size if stage == 0 else size // 2)
            # BasicBlock (18, 34): two 3x3, and a projection where the shape changes.
            convs.append(_conv(width, width, 3, 1, size, family))
            if stage:
                convs.append(_conv(c_basic, width, 3, stride, before, family))
                convs.append(_conv(c_basic, width, 1, stride, before, family))
            # Bottleneck (50, 101, 152): 1x1, 3x3 with the stride, 1x1, and the projection.
            convs.append(_conv(c_bottleneck, width, 1, 1, before, family))
            if stage:
                convs.append(_conv(width, width, 3, stride, before, family))
            convs.append(_conv(wide, width, 1, 1, size, family))
            convs.append(_conv(width, wide, 1, 1, size, family))
            convs.append(_conv(c_bottleneck, wide, 1, stride, before, family))
            c_basic, c_bottleneck = width, wide
    return tuple(dict.fromkeys(convs))


RESNET_CONVS = _resnet_convs()

ODD_CONVS = (
    Conv("one-pixel", 5, 7, 1, 1, 1),
    Conv("one-channel", 1, 1, 3, 1, 5, n=2),
    Conv("three-by-three-picture", 17, 33, 3, 1, 3, n=2),
    Conv("odd-channels-stride-2", 19, 21, 3, 2, 7, n=3),
    Conv("odd-1x1-stride-2", 63, 65, 1, 2, 9),
    Conv("stem-odd", 3, 10, 7, 2, 31, n=2),
    Conv("five-by-five", 6, 18, 5, 1, 11),
    Conv("wide-63", 63, 64, 3, 1, 63),
    Conv("empty-batch", 8, 16, 3, 1, 8, n=0),
    Conv("one-tile", 32, 16, 3, 1, 1, n=2),
    Conv("cut-tiles", 16, 48, 3, 1, 7, n=3),
    Conv("five-panels", 80, 80, 3, 1, 13),
    Conv("one-tile-stride-2", 32, 16, 3, 2, 2, n=2),
    Conv("cut-tiles-stride-2", 16, 48, 3, 2, 13, n=3),
    Conv("five-panels-stride-2", 80, 80, 3, 2, 26),
)


@dataclass(frozen=True)
class Activation:
    """An activation (n, c, size, size) between two layers."""

    name: str
    n: int
    c: int
    size: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.size, self.size

    def __str__(self) -> str:
        return self.name


ODD_ACTIVATIONS = (
    Activation("one-value", 2, 1, 1),
    Activation("three-channels", 2, 3, 5),
    Activation("63-channels", 1, 63, 7),
    Activation("1000-channels", 3, 1000, 3),
    Activation("2048-channels", 2, 2048, 7),
    Activation("stage-1", 4, 64, 32),
    Activation("stage-1-bottleneck", 1, 256, 56),
    Activation("empty-batch", 0, 16, 8),
)


@dataclass(frozen=True)
class Pool:
    """A max-pool of (n, c, height, width)."""

    name: str
    n: int
    c: int
    height: int
    width: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (1, 1)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.height, self.width

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        return list(self.kernel), list(self.stride), list(self.padding)

    @property
    def out(self) -> tuple[int, int, int, int]:
        height, width = (
            (size + 2 * padding - kernel) // stride + 1
            for size, kernel, stride, padding in zip(
                self.shape[2:], self.kernel, self.stride, self.padding, strict=True
            )
        )
        return self.n, self.c, height, width

    def __str__(self) -> str:
        return self.name


POOLS = (
    Pool("stem", 2, 64, 30, 30),
    Pool("many-rows", 1, 64, 112, 50),
    Pool("odd", 3, 19, 13, 17),
    Pool("one-channel", 2, 1, 5, 6),
    Pool("three-channels", 1, 3, 31, 29),
    Pool("1000-channels", 1, 1000, 6, 5),
    Pool("one-pixel", 2, 20, 1, 1),
    Pool("one-row", 2, 16, 1, 40),
    Pool("no-padding", 2, 33, 9, 8, (2, 2), (2, 2), (0, 0)),
    Pool("gaps", 2, 66, 11, 10, (2, 2), (3, 4), (0, 1)),
    Pool("stride-1", 1, 70, 12, 11, (3, 3), (1, 1), (1, 1)),
    Pool("two-sizes", 2, 48, 12, 15, (5, 2), (1, 3), (2, 0)),
    Pool("whole-picture", 2, 17, 7, 7, (7, 7), (7, 7), (0, 0)),
    Pool("wide-kernel", 1, 24, 40, 40, (13, 13), (4, 4), (6, 6)),
    Pool("1x1", 2, 65, 6, 6, (1, 1), (2, 1), (0, 0)),
    Pool("empty-batch", 0, 16, 8, 8),
)


@dataclass(frozen=True)
class Head:
    """A classifier's head: (n, c, height, width) -> (n, outputs)."""

    name: str
    n: int
    c: int
    height: int
    width: int
    outputs: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.height, self.width

    def __str__(self) -> str:
        return self.name


HEADS = (
    Head("imagenet-basic", 1, 512, 7, 7, 1000),
    Head("imagenet-bottleneck", 5, 2048, 7, 7, 1000),
    Head("cifar", 33, 512, 4, 4, 10),
    Head("one-value", 1, 1, 1, 1, 1),
    Head("one-pixel", 3, 20, 1, 1, 5),
    Head("odd", 7, 67, 5, 3, 13),
    Head("half-a-vector", 4, 8, 2, 9, 6),
    Head("63-channels", 2, 63, 9, 8, 3),
    Head("one-over-a-block", 2, 513, 3, 3, 7),
    Head("three-blocks", 6, 1030, 2, 2, 21),
    Head("two-blocks-of-pixels", 2, 40, 23, 29, 4),
    Head("empty-batch", 0, 16, 8, 8, 10),
)
