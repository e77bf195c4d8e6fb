"""The tiles of the convolutions' kernels, and the ways to compute a backward."""

from typing import NamedTuple

import torch


class ConvTile(NamedTuple):
    """A tile configuration; block_depth is in bytes of Ci, so that 16- and 32-bit share it."""

    block_rows: int
    block_columns: int
    block_depth_bytes: int
    num_warps: int
    num_stages: int

    def block_depth(self, dtype: torch.dtype) -> int:
        return self.block_depth_bytes // dtype.itemsize

    def block_depth_of_pixels(self, dtype: torch.dtype, wide: bool) -> int:
        """The weight gradient's, whose steps are pixels: each has an offset of 64 bits if `wide`.

        In float32 there are registers for half as many of them.
        """
        return self.block_depth(dtype) // (2 if wide and dtype == torch.float32 else 1)


CONV_TILES = {
    "wide": ConvTile(128, 256, 128, 8, 3),
    "square": ConvTile(128, 128, 128, 8, 3),
    "tall": ConvTile(128, 64, 128, 4, 4),
    "small": ConvTile(64, 64, 128, 4, 3),
}


class Gradients(NamedTuple):
    """How the backward's two products are computed: by a tile of ours, or by aten (None)."""

    dgrad: str | None
    wgrad: str | None
    apply: bool  # the products apply the gradient of the statistics to dz as they load it


# A stem has 64 channels.
STEM_TILES = ("tall", "small")
# The wide tile's registers do not suffice for the backward's.
GRADIENT_TILES = ("square", "tall", "small")
_PAIRS = [(dgrad, wgrad) for dgrad in GRADIENT_TILES for wgrad in GRADIENT_TILES]
GRADIENTS = {
    **{f"triton:{d}+{w}": Gradients(d, w, False) for d, w in _PAIRS},
    **{f"triton_apply:{d}+{w}": Gradients(d, w, True) for d, w in _PAIRS},
    **{f"dgrad:{tile}": Gradients(tile, None, False) for tile in GRADIENT_TILES},
    **{f"wgrad:{tile}": Gradients(None, tile, False) for tile in GRADIENT_TILES},
    "cudnn": Gradients(None, None, False),
}


def conv_tile(name: str, target: str) -> ConvTile:
    """The tile of that name for an architecture: AMD's 64 KB of shared memory hold one stage."""
    tile = CONV_TILES[name]
    return tile._replace(num_stages=2) if target.startswith("gfx") else tile


def tile_of_8_warps(name: str, target: str) -> ConvTile:
    """The tile of that name for the backward and for stems: 4 warps would spill registers."""
    return conv_tile(name, target)._replace(num_warps=8)
