"""Models captured in CUDA graphs: their checks everywhere, their answers on a GPU."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastres
from fastres.cuda_graph import _check_like, capture_inference, capture_training

DTYPES = [None, torch.bfloat16]


def model(device: str = "cpu") -> torch.nn.Module:
    built = fastres.resnet18(num_classes=10, stem="cifar", fused=True)
    return built.to(device, memory_format=torch.channels_last)


def batch(seed: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(8, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(10, (8,), generator=generator).to(device)
    return images.to(memory_format=torch.channels_last), labels


class TestChecks:
    def test_the_model(self) -> None:
        images, labels = batch(0)
        with pytest.raises(TypeError, match="capture_inference: model is function"):
            capture_inference(lambda x: x, images)
        with pytest.raises(ValueError, match=r"model is not in eval mode, expected model.eval\(\)"):
            capture_inference(model().train(), images)
        with pytest.raises(ValueError, match="capture_training: model is not in training mode"):
            capture_training(model().eval(), F.cross_entropy, images, labels)

    def test_the_tensors(self) -> None:
        with pytest.raises(TypeError, match="images is list, expected a Tensor"):
            capture_inference(model().eval(), [1.0])
        with pytest.raises(TypeError, match="targets is NoneType, expected a Tensor"):
            capture_training(model().train(), F.cross_entropy, batch(0)[0], None)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
    def test_without_a_gpu(self) -> None:
        images, labels = batch(0)
        with pytest.raises(RuntimeError, match="capture_inference: torch sees no CUDA device"):
            capture_inference(model().eval(), images)
        with pytest.raises(RuntimeError, match="capture_training: torch sees no CUDA device"):
            capture_training(model().train(), F.cross_entropy, images, labels)

    def test_a_device_that_is_not_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(ValueError, match=r"conv1.weight is on cpu, expected on a CUDA device"):
            capture_inference(model().eval(), batch(0)[0])

    def test_other_shapes_and_dtypes_than_captured(self) -> None:
        static = torch.zeros(8, 3, 32, 32)
        _check_like("images", torch.ones(8, 3, 32, 32), static)
        for wrong in (static[:4], static.half()):
            with pytest.raises(ValueError, match=r"images is .*, expected torch.float32 \(8, 3"):
                _check_like("images", wrong, static)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference(dtype: torch.dtype | None) -> None:
    network = model("cuda").eval()
    images, _ = batch(0, "cuda")
    forward = capture_inference(network, images, dtype)
    for seed in (1, 2):
        images, _ = batch(seed, "cuda")
        with torch.inference_mode(), torch.autocast("cuda", dtype, enabled=dtype is not None):
            expected = network(images)
        assert torch.equal(forward(images), expected)
        with torch.no_grad():  # in place: the graph sees it
            network.conv1.weight.mul_(0.5)
    with pytest.raises(ValueError, match="for which the graph was captured"):
        forward(images[:4])
    network.train()
    with pytest.raises(RuntimeError, match="mode has changed"):
        forward(images)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training(dtype: torch.dtype | None) -> None:
    """Three steps of SGD, captured and not, from the same weights: the same in every bit."""
    torch.backends.cudnn.deterministic = True
    try:
        eager, network = model("cuda").train(), model("cuda").train()
        network.load_state_dict(eager.state_dict())
        start = copy.deepcopy(network.state_dict())
        step = capture_training(network, F.cross_entropy, *batch(0, "cuda"), dtype)
        for name, value in network.state_dict().items():
            assert torch.equal(value, start[name]), f"the capture has changed {name}"
        ours, theirs = (
            torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (network, eager)
        )
        for seed in (1, 2, 3):
            images, labels = batch(seed, "cuda")
            ours.zero_grad(set_to_none=True)
            loss = step(images, labels)
            theirs.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False):
                expected = F.cross_entropy(eager(images), labels)
            expected.backward()
            assert torch.equal(loss, expected.detach())
            for optimizer in (ours, theirs):
                optimizer.step()
                optimizer.param_groups[0]["lr"] = 0.01
        for name, value in network.state_dict().items():
            assert torch.equal(value, eager.state_dict()[name]), name
    finally:
        torch.backends.cudnn.deterministic = False
