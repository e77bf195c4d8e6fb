"""The yardstick counts what one counts by hand, and a model's sum is all of it."""

import json
import sys
from pathlib import Path

import pytest
import torch

import fastres

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import roofline  # noqa: E402
import workloads  # noqa: E402

EPS = 1e-5
BF16 = torch.bfloat16
CEILINGS = roofline.Ceilings(1e12, 1e9, "a test")


def tensor(*shape, dtype=BF16):
    value = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
    return value.to(memory_format=torch.channels_last) if value.dim() == 4 else value


def vectors(channels):
    return [tensor(channels, dtype=torch.float32) for _ in range(4)]


def works(run):
    return {work.kernel: work for work in roofline.work_of_run(run)}


def geometry(stride, padding):
    return [stride] * 2, [padding] * 2, [1, 1], 1


# Of 3 images of 64x10x10, 2 bytes an element; a vector of 64 has 256 bytes.
X = 3 * 64 * 10 * 10 * 2


@pytest.mark.parametrize("residual", [False, True])
def test_inference_convolution(residual):
    x, weight = tensor(3, 64, 10, 10), tensor(64, 64, 3, 3)
    r = tensor(3, 64, 10, 10) if residual else None

    def run():
        options = geometry(1, 1)
        fastres.ops.conv_bn_relu(x, weight, None, *vectors(64), EPS, r, *options, True, None)

    (work,) = roofline.work_of_run(run)
    assert work.kernel == ("conv_bn_add_relu" if residual else "conv_bn_relu")
    assert work.shape == "3 x 10x10, 64 to 64, 3x3"
    assert work.flops == 2 * 300 * 64 * 576
    assert work.nbytes == (2 + residual) * X + 64 * 576 * 2 + 4 * 256
    assert work.intensity == work.flops / work.nbytes


@pytest.mark.parametrize("prologue", [False, True])
def test_training_convolution_and_its_two_gradients(prologue):
    x, weight = tensor(3, 64, 10, 10), tensor(128, 64, 1, 1)
    before = vectors(64) if prologue else [None] * 4

    def run():
        z, mean, var = fastres.ops.conv_stats(x, weight, *before, EPS, *geometry(2, 0))
        torch.autograd.backward([z, mean, var], [z, mean, var])

    found = works(run)
    after = " after bn_relu" if prologue else ""
    z, w, vector = 3 * 128 * 25 * 2, 128 * 64 * 2, 4 * 256 * prologue
    # The stride leaves three quarters of the input unread.
    forward = found.pop(f"conv_stats{after}")
    assert forward.shape == "3 x 10x10, 64 to 128, 1x1 stride 2"
    assert forward.nbytes == X // 4 + w + z + vector + 2 * 512
    data, weights = (found.pop(f"conv {which} gradient{after}") for which in ("data", "weight"))
    assert forward.flops == data.flops == weights.flops == 2 * 75 * 128 * 64
    # z and its gradient, three vectors of the statistics; the mask reads the input where it counts.
    assert data.nbytes == 2 * z + 3 * 512 + w + X + (X // 4 + 2 * vector if prologue else 0)
    assert weights.nbytes == 2 * z + 3 * 512 + X // 4 + vector + w
    assert not found


@pytest.mark.parametrize("branch", ["none", "plain", "projection"])
def test_the_passes_of_batch_norm(branch):
    z, r = tensor(3, 64, 10, 10), None if branch == "none" else tensor(3, 64, 10, 10)
    others = vectors(64) if branch == "projection" else [None] * 4
    own = vectors(64)

    def run():
        fastres.ops.bn_add_relu(z, *own, EPS, r, *others, EPS, True).sum().backward()

    found = works(run)
    name = {"none": "bn_relu", "plain": "bn_add_relu", "projection": "bn_add_bn_relu"}[branch]
    inputs = 1 if branch == "none" else 2
    projection = branch == "projection"
    assert found[name].nbytes == (inputs + 1) * X + (4 + 4 * projection) * 256
    # dy, y and z are read, and the branch only where it has a BatchNorm; then all gradients.
    backward = found[f"{name}_backward"]
    assert backward.nbytes == (3 + projection + inputs) * X + (7 + 7 * projection) * 256
    assert backward.flops == found[name].flops == 0


def test_time_at_the_ceilings():
    by_flops = roofline.Work("op", "kernel", "", 4 * 10**9, 10**6)
    by_bytes = roofline.Work("op", "kernel", "", 0, 5 * 10**6)
    assert CEILINGS.seconds(by_flops) == pytest.approx(4e-3)
    assert CEILINGS.bound(by_flops) == "FLOPs"
    assert CEILINGS.seconds(by_bytes) == pytest.approx(5e-3)
    assert CEILINGS.bound(by_bytes) == "bytes"
    first, second = roofline.lines_of([by_flops, by_bytes, by_flops], CEILINGS)
    assert (first["calls"], first["seconds"]) == (2, pytest.approx(8e-3))
    assert (second["calls"], second["seconds"]) == (1, pytest.approx(5e-3))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_model_has_all_its_flops(training):
    case = workloads.ModelCase("resnet50", 64, 2)
    model = workloads.torchvision_model(case).train(training)
    images, _ = workloads.batch(case)
    record = roofline.record_of(case, training, BF16, CEILINGS)
    assert record["flops"] == workloads.model_flops(model, images, training)
    assert record["seconds"] == pytest.approx(sum(k["seconds"] for k in record["kernels"]))
    assert record["bytes"] > 0
    kernels = {k["kernel"] for k in record["kernels"]}
    assert ("optimizer" in kernels) == ("conv data gradient after bn_relu" in kernels) == training
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = [k["nbytes"] for k in record["kernels"] if k["kernel"] == "optimizer"]
    assert optimizer == [20 * parameters] * training


def test_ceilings_come_from_the_options_or_a_measured_file(tmp_path):
    def of(*arguments):
        return roofline.ceilings_of(roofline.parse(arguments))

    assert (of().flops, of().bandwidth) == (989.4e12, 3.35e12)
    assert "H100 data sheet" in of().source
    assert of("--dtype", "float32").flops == 494.7e12
    given = of("--card", "a100", "--flops", "1e14")
    assert (given.flops, given.bandwidth) == (1e14, 2.039e12)
    assert given.source.startswith("--flops, else NVIDIA A100")
    records = [
        {
            "runs_on": "cuda",
            "device": "a card",
            "date": "2026-01-01T00:00",
            "peaks": {"bfloat16 FLOP/s": rate, "float32 FLOP/s": 1.0, "copy B/s": 2.0},
        }
        for rate in (5.0, 7.0)
    ]
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(records))
    found = of("--ceilings", str(path))
    assert (found.flops, found.bandwidth) == (7.0, 2.0)
    assert found.source == "measured on a card, 2026-01-01 (gpu.json)"
    path.write_text(json.dumps([{"runs_on": "cpu"}]))
    with pytest.raises(ValueError, match="no record of a CUDA device"):
        of("--ceilings", str(path))


def test_the_command(tmp_path, capsys):
    path = tmp_path / "roofline.json"
    assert roofline.main(["--only", "cifar", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "conv weight gradient after bn_relu" in out
    assert "Ceilings, not results: 989.4 TFLOP/s, 3.35 TB/s" in out
    inference, training = json.loads(path.read_text())
    assert inference["case"] == "cifar-resnet18-32px-n512 inference"
    assert training["seconds"] > inference["seconds"]
    assert roofline.main(["--only", "vgg"]) == 2
    assert roofline.main(["--ceilings", str(tmp_path / "none.json")]) == 2
    assert "no case has 'vgg'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        roofline.parse(["--flops", "-1"])


def test_every_target_of_the_benches_has_its_roofline():
    names = {
        f"{case} {'training' if training else 'inference'}" for case, training in roofline.CASES
    }
    for n in (1, 32, 256):
        assert {f"resnet{d}-224px-n{n} inference" for d in (18, 34, 50, 101, 152)} <= names
    assert {"resnet50-224px-n256 training", "cifar-resnet18-32px-n512 training"} <= names
