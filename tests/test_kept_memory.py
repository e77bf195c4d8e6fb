"""What a training step keeps for its backward, counted on tensors without memory."""

import torch
import torchvision
from torch import Tensor, nn

import fastres


def kept_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes of all that autograd saves in a forward, parameters and buffers aside."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images)
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
    assert output.requires_grad
    return sum(size for storage, size in sizes.items() if storage not in own)


def test_resnet50_keeps_six_tenths_of_torchvisions_in_16_bit() -> None:
    kept = []
    for build in (lambda: fastres.resnet50(fused=True), torchvision.models.resnet50):
        with torch.device("meta"):
            model = build().train()
            images = torch.empty(256, 3, 224, 224, dtype=torch.bfloat16)
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(torch.bfloat16)
        kept.append(kept_bytes(model, images.to(memory_format=torch.channels_last)))
    ours, theirs = kept
    assert 0 < ours <= 0.6 * theirs
