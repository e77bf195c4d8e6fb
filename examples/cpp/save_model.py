"""Save a scripted fused model for main.cpp, with images and the logits that Python gets for them.

python save_model.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import fastres


def main(folder: Path) -> None:
    torch.manual_seed(0)
    model = fastres.resnet18(fused=True, stem="cifar", num_classes=10).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        logits = model(images)
    torch.jit.script(model).save(folder / "model.pt")
    torch.save({"images": images, "logits": logits}, folder / "expected.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
