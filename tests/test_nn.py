"""The conv-bn unit inside a block: the same answers as the modules, and never a stale weight."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.models.resnet import BasicBlock, Bottleneck

from fastres import _C, models, ops
from fastres.models.resnet import FusedBasicBlock, FusedBottleneck
from fastres.nn import PackedWeights, Pending, finish, max_pool
from recording import FastresOps, convolutions_of, ops_of
from running import in_threads
from tolerances import assert_within_twice

FUSED = {BasicBlock: FusedBasicBlock, Bottleneck: FusedBottleneck}


def pair(block=BasicBlock, *, project=True, dtype=torch.float64, **norm):
    """The same block twice: torchvision's, and ours."""
    torch.manual_seed(0)
    wide = 8 * block.expansion
    inplanes = 12 if project else wide
    downsample = nn.Sequential(nn.Conv2d(inplanes, wide, 1, 2, bias=False), nn.BatchNorm2d(wide))
    plain = block(
        inplanes,
        8,
        2 if project else 1,
        downsample if project else None,
        norm_layer=lambda channels: nn.BatchNorm2d(channels, **norm),
    )
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.running_var):
                if value is not None:
                    nn.init.uniform_(value, 0.5, 2)
            for value in (module.bias, module.running_mean):
                if value is not None:
                    nn.init.uniform_(value, -1, 1)
    fused = FUSED[block](
        inplanes,
        8,
        2 if project else 1,
        copy.deepcopy(downsample) if project else None,
        norm_layer=lambda channels: nn.BatchNorm2d(channels, **norm),
    )
    fused.load_state_dict(plain.state_dict())
    return plain.to(dtype), fused.to(dtype), torch.randn(3, inplanes, 6, 6, dtype=dtype)


def assert_same_step(plain, fused, x):
    """Output, buffers and all gradients of one forward and backward."""
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, actual = plain(a), fused(b)
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (actual * weight).sum().backward()
    torch.testing.assert_close(b.grad, a.grad)
    for (key, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=lambda m, key=key: f"{key}: {m}")
    for (key, p), q in zip(plain.named_buffers(), fused.named_buffers(), strict=True):
        torch.testing.assert_close(q[1], p, msg=lambda m, key=key: f"{key}: {m}")


blocks = pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
projections = pytest.mark.parametrize("project", [False, True], ids=["identity", "projection"])


@blocks
@projections
def test_training_is_one_op_a_convolution_and_one_a_block(block, project):
    _, fused, x = pair(block, project=project)
    convolutions = {BasicBlock: 2, Bottleneck: 3}[block] + project
    assert ops_of(fused.train(), x) == ["conv_stats"] * convolutions + ["bn_add_relu"]
    with torch.no_grad():
        assert ops_of(fused.eval(), x) == ["conv_bn_relu"] * convolutions


@blocks
@projections
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_a_block_answers_as_torchvisions(block, project, train):
    plain, fused, x = pair(block, project=project)
    assert_same_step(plain.train(train), fused.train(train), x)


@pytest.mark.parametrize(
    "norm",
    [
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 1.0},
        {"track_running_stats": False},
        {"affine": False},
        {"eps": 0.1},
    ],
    ids=str,
)
@blocks
def test_batch_norm_options(block, norm):
    plain, fused, x = pair(block, **norm)
    for scale in (1, 3):  # two steps: averages of averages
        assert_same_step(plain.train(), fused.train(), scale * x)
    assert_same_step(plain.eval(), fused.eval(), x)


@blocks
@pytest.mark.parametrize("frozen", ["bn1", "bn2", "downsample.1", "all"])
def test_frozen_batch_norm_uses_its_running_statistics(block, frozen):
    plain, fused, x = pair(block)
    for module in (plain, fused):
        module.train()
        for name, child in module.named_modules():
            if isinstance(child, nn.BatchNorm2d) and frozen in (name, "all"):
                child.eval()
    assert_same_step(plain, fused, x)
    assert "conv_bn_relu" in ops_of(fused, x)


def test_batch_statistics_in_an_eval_block():
    plain, fused, x = pair()
    for module in (plain, fused):
        module.eval()
        module.bn1.train()
    assert_same_step(plain, fused, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_running_statistics_of_a_16_bit_model(dtype):
    _, fused, x = pair(dtype=dtype)
    before = fused.bn1.running_mean.clone()
    fused.train()(x)
    z = fused.conv1(x).float()
    expected = 0.9 * before.float() + 0.1 * z.mean((0, 2, 3))
    torch.testing.assert_close(fused.bn1.running_mean, expected.to(dtype))


def test_one_value_per_channel_is_torchs_error():
    plain, fused, _ = pair(project=False)
    x = torch.randn(1, 8, 1, 1, dtype=torch.float64)
    before = copy.deepcopy(fused.state_dict())
    for module in (plain.train(), fused.train()):
        with pytest.raises(
            ValueError, match="Expected more than 1 value per channel when training"
        ):
            module(x)
    assert all(torch.equal(value, before[key]) for key, value in fused.state_dict().items())


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_an_empty_batch(train):
    plain, fused, x = pair()
    assert_same_step(plain.train(train), fused.train(train), x[:0])


def hook(module):
    module.register_forward_hook(lambda module, args, output: None)


ATTACHED = {
    "conv1 forward hook": lambda m: hook(m.conv1),
    "bn1 forward pre-hook": lambda m: m.bn1.register_forward_pre_hook(lambda module, args: None),
    "conv2 backward hook": lambda m: m.conv2.register_full_backward_hook(lambda *args: None),
    "conv2 backward pre-hook": lambda m: m.conv2.register_full_backward_pre_hook(lambda *a: None),
    "relu hook": lambda m: hook(m.relu),
    "relu replaced": lambda m: setattr(m, "relu", nn.SiLU()),
    "bn1 replaced": lambda m: setattr(m, "bn1", nn.GroupNorm(2, 8).double()),
    "bn1 identity": lambda m: setattr(m, "bn1", nn.Identity()),
    "conv1 parametrized": lambda m: parametrizations.orthogonal(m.conv1),
    "conv1 weight norm": lambda m: parametrizations.weight_norm(m.conv1),
    "conv2 pruned": lambda m: prune.l1_unstructured(m.conv2, "weight", 0.5),
    "bn2 pruned": lambda m: prune.l1_unstructured(m.bn2, "weight", 0.5),
    "conv1 patched": lambda m: setattr(m.conv1, "forward", m.conv1.forward),
    "downsample hook": lambda m: hook(m.downsample),
    "downsample replaced": lambda m: setattr(
        m, "downsample", nn.Sequential(nn.Identity(), *m.downsample)
    ),
}


@pytest.mark.parametrize("attached", ATTACHED)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_a_unit_with_something_attached_runs_its_modules(attached, train):
    plain, fused, x = pair()
    before = convolutions_of(copy.deepcopy(fused).train(train), x)
    for module in (plain, fused):
        torch.manual_seed(1)
        ATTACHED[attached](module)
    assert_same_step(plain.train(train), fused.train(train), x)
    assert convolutions_of(fused, x) < before


@pytest.mark.parametrize("where", ["conv1", "bn1", "conv2", "bn2", "relu", "downsample.0"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_hooks_fire_and_can_be_removed(where, train):
    plain, fused, x = pair()
    seen = []
    for module in (plain.train(train), fused.train(train)):
        handle = module.get_submodule(where).register_forward_hook(
            lambda module, args, output: seen.append(output.detach().clone())
        )
        module(x)
        handle.remove()
    half = len(seen) // 2
    assert half
    torch.testing.assert_close(seen[half:], seen[:half])
    seen.clear()
    assert len(ops_of(fused, x)) == 3 + train
    assert not seen


def test_global_hooks_see_every_module():
    _, fused, x = pair()
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.add(m))
    try:
        fused.eval()(x)
    finally:
        handle.remove()
    assert {fused.conv1, fused.bn1, fused.conv2, fused.bn2, fused.downsample[1]} <= seen


@pytest.mark.parametrize("mode", ["circular", "reflect"])
def test_other_padding_runs_the_modules(mode):
    plain, fused, x = pair(project=False)
    for module in (plain, fused):
        reference = nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode, bias=False).double()
        reference.load_state_dict(module.conv1.state_dict())
        module.conv1 = reference
    assert_same_step(plain.train(), fused.train(), x)
    for module in (plain, fused):
        module.conv1 = nn.Conv2d(8, 8, 3, padding="same", bias=False).double()
        module.conv1.load_state_dict(module.conv2.state_dict())
    assert_same_step(plain.eval(), fused.eval(), x)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_a_convolution_with_bias(train):
    plain, fused, x = pair(project=False)
    for module in (plain, fused):
        torch.manual_seed(2)
        module.conv1 = nn.Conv2d(8, 8, 3, padding=1).double()
    assert_same_step(plain.train(train), fused.train(train), x)


def test_parameters_that_were_taken_out_of_the_modules():
    """As ``nn.DataParallel`` does to its replicas."""
    plain, fused, x = pair()
    for name in ("conv1", "bn1"):
        child = fused.get_submodule(name)
        weight = child._parameters.pop("weight")
        child.weight = weight.detach()
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x))


def test_sync_batch_norm_before_and_after():
    plain, fused, x = pair()
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    assert_same_step(plain.train(), convert(copy.deepcopy(fused)).train(), x)
    fused.load_state_dict(plain.state_dict())
    fused.eval()(x)
    converted = convert(fused)
    assert isinstance(converted.bn1, nn.SyncBatchNorm)
    torch.testing.assert_close(converted.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_functional_call_uses_the_parameters_it_is_given(train):
    plain, fused, x = pair(dtype=torch.float32)
    fused.eval()(x)
    values = {key: torch.rand_like(value) for key, value in fused.named_parameters()}
    for module in (plain.train(train), fused.train(train)):
        module.zero_grad()
    expected, actual = (torch.func.functional_call(m, values, (x,)) for m in (plain, fused))
    torch.testing.assert_close(actual, expected)


def test_fx_shows_the_modules():
    plain, fused, x = pair()
    traced = torch.fx.symbolic_trace(fused.eval())
    targets = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert {"conv1", "bn1", "relu", "conv2", "bn2", "downsample.0", "downsample.1"} <= targets
    torch.testing.assert_close(traced(x), plain.eval()(x))


# ---- packed weights


def assert_packs_are_true(module, x):
    """Every packed weight that reaches the op is the packing of the weight that does."""
    with torch.no_grad(), FastresOps() as recorded:
        module(x)
    calls = [args for name, args in recorded.calls if name == "conv_bn_relu"]
    assert calls
    for args in calls:
        x, weight, packed = args[0], args[1], args[-1]
        size = [x.shape[0], *x.shape[2:]]
        assert torch.equal(packed, ops.pack_conv_weight(weight, *args[9:13], size))
    return calls


CHANGES = {
    "optimizer": lambda m: torch.optim.SGD(m.parameters(), 0.5).step(),
    "fused optimizer": lambda m: torch.optim.SGD(m.parameters(), 0.5, fused=True).step(),
    "fused optimizer with moments": lambda m: torch.optim.AdamW(
        m.parameters(), 0.5, fused=True
    ).step(),
    "compiled optimizer": lambda m: compiled_step(torch.optim.SGD(m.parameters(), 0.5)),
    "compiled fused optimizer": lambda m: compiled_step(
        torch.optim.SGD(m.parameters(), 0.5, fused=True)
    ),
    "copy_": lambda m: m.conv1.weight.copy_(torch.rand_like(m.conv1.weight)),
    "inference mode": lambda m: inference_update(m.conv1.weight),
    "load_state_dict": lambda m: m.load_state_dict(
        {key: value + 1 for key, value in m.state_dict().items()}
    ),
    "load_state_dict of the convolution": lambda m: m.conv1.load_state_dict(
        {"weight": torch.rand_like(m.conv1.weight)}
    ),
    "assign": lambda m: m.load_state_dict(
        {key: value + 1 for key, value in m.state_dict().items()}, assign=True
    ),
    "new parameter": lambda m: setattr(
        m.conv1, "weight", nn.Parameter(torch.rand_like(m.conv1.weight))
    ),
    "new convolution": lambda m: setattr(m, "conv1", nn.Conv2d(12, 8, 3, 2, 1, bias=False)),
    "data": lambda m: setattr(m.conv1.weight, "data", torch.rand_like(m.conv1.weight)),
    "data twice": lambda m: [
        setattr(m.conv1.weight, "data", torch.rand_like(m.conv1.weight)) for _ in range(2)
    ],
    "write through data, then eval": lambda m: (m.conv1.weight.data.mul_(2), m.eval()),
    "memory format": lambda m: m.to(memory_format=torch.channels_last),
    "to float64 and back": lambda m: (m.double(), m.float()),
    "same memory, other shape": lambda m: setattr(
        m.conv1.weight, "data", m.conv1.weight.data.transpose(2, 3)
    ),
}


def compiled_step(optimizer):
    torch.compile(optimizer.step, backend="eager")()


def inference_update(weight):
    with torch.inference_mode():
        weight.mul_(3)


@pytest.mark.fits_in("weights that change between two evaluations", "Training")
@pytest.mark.parametrize("change", CHANGES)
def test_packed_weights_are_never_stale(change):
    plain, fused, x = pair(dtype=torch.float32)
    fused.train()(x).sum().backward()  # gradients for the optimizer
    fused.eval()
    for _ in range(3):
        assert_packs_are_true(fused, x)
        with torch.no_grad():
            CHANGES[change](fused)
        assert_packs_are_true(fused, x)
        plain.load_state_dict(fused.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(fused(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.fits_in("training and evaluation in turn", "Training")
def test_train_eval_train_eval_with_steps_between():
    plain, fused, x = pair(dtype=torch.float32)
    optimizer = torch.optim.SGD(fused.parameters(), 0.1)
    for _ in range(3):
        fused.train()(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        fused.eval()
        plain.load_state_dict(fused.state_dict())
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(fused(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_weight_is_packed_once():
    _, fused, x = pair(dtype=torch.float32)
    fused.eval()
    with torch.no_grad(), FastresOps() as recorded:
        for _ in range(3):
            fused(x)
    assert [name for name, _ in recorded.calls].count("pack_conv_weight") == 3  # convolutions


@pytest.mark.parametrize(
    "drop",
    [
        lambda m: m.train(),
        lambda m: m.eval(),
        lambda m: m.load_state_dict(m.state_dict()),
        lambda m: m.to(torch.float32),
    ],
    ids=["train", "eval", "load_state_dict", "to"],
)
def test_packed_weights_are_dropped(drop):
    _, fused, x = pair(dtype=torch.float32)
    with torch.no_grad():
        fused.eval()(x)
    assert len(fused._packed) == 3
    drop(fused)
    assert len(fused._packed) == 0


def test_packed_weights_stay_out_of_states_copies_and_pickles():
    _, fused, x = pair(dtype=torch.float32)
    keys = set(fused.state_dict())
    with torch.no_grad():
        expected = fused.eval()(x)
        assert set(fused.state_dict()) == keys
        assert len(fused._packed) == 3
        for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert isinstance(copied._packed, PackedWeights)
            assert len(copied._packed) == 0
            assert torch.equal(copied(x), expected)
            assert len(copied._packed) == 3


def test_weights_made_in_inference_mode_are_not_kept():
    with torch.inference_mode():
        plain, fused, x = pair(dtype=torch.float32)
        for _ in range(2):
            torch.testing.assert_close(fused.eval()(x), plain.eval()(x))
        assert len(fused._packed) == 0


def test_no_packing_in_training_or_float16():
    _, fused, x = pair(dtype=torch.float32)
    fused.train()(x)
    assert len(fused._packed) == 0
    with torch.no_grad():
        fused.eval().half()(x.half())
    assert len(fused._packed) == 0


def autocast_to_bfloat16(call):
    def wrapped(x):
        with torch.autocast("cpu", torch.bfloat16):
            return call(x)

    return wrapped


@pytest.mark.parametrize("autocast", [False, True], ids=["model", "autocast"])
def test_packing_of_bfloat16(autocast):
    """Of what autocast made of the weights, too, which is made once."""
    fused, x = FusedBasicBlock(32, 32).eval(), torch.randn(2, 32, 9, 9)
    call = autocast_to_bfloat16(fused) if autocast else fused
    if not autocast:
        fused, x = fused.bfloat16(), x.bfloat16()
    calls = assert_packs_are_true(call, x)
    assert all(args[1].dtype == torch.bfloat16 for args in calls)
    if _C.cpu_capability() == "amx":
        assert all(args[-1].numel() > 0 for args in calls)
    again = assert_packs_are_true(call, x)
    assert all(a[1] is b[1] and a[-1] is b[-1] for a, b in zip(calls, again, strict=True))
    with torch.no_grad():
        before = call(x)
        fused.conv1.weight.mul_(-2)
    assert_packs_are_true(call, x)
    with torch.no_grad():
        after = call(x)
    assert not torch.equal(before, after)
    # With gradients, for which the weights are rounded anew.
    assert torch.equal(call(x).detach(), after)


def test_autocast_gives_gradients_after_inference():
    _, fused, x = pair(dtype=torch.float32)
    call = autocast_to_bfloat16(fused.eval())
    with torch.no_grad():
        call(x)
    call(x).sum().backward()
    assert all(parameter.grad is not None for parameter in fused.parameters())


def test_threads_share_a_model():
    _, fused, x = pair(dtype=torch.float32)
    fused.eval()
    inputs = [x + i for i in range(4)]
    with torch.no_grad():
        expected = [fused(value) for value in inputs]
    fused.eval()

    def right(i):
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(fused(inputs[i]), expected[i]):
                    return False
                if i == 0:
                    fused.eval()  # drops what the others may be using
        return True

    assert not in_threads(4, right)


# ---- precision


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@blocks
def test_autocast_runs_in_its_dtype_and_keeps_batch_norm_in_float32(block, train):
    plain, fused, x = pair(block, dtype=torch.float32)
    exact = copy.deepcopy(plain).double().train(train)(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        theirs = plain.train(train)(x)
        ours = fused.train(train)(x)
        with FastresOps() as recorded:
            fused(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    for _, args in recorded.calls:
        assert args[0].dtype == torch.bfloat16
    ours.sum().backward()
    for key, parameter in fused.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, key
    for key, value in fused.named_buffers():
        assert value.dtype in (torch.float32, torch.int64), key
    assert_within_twice(ours.detach(), theirs.detach(), exact.detach())


def test_autocast_leaves_float64_alone():
    plain, fused, x = pair()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_16_bit_models(dtype, train):
    plain, fused, x = pair(dtype=dtype)
    exact = copy.deepcopy(plain).double().train(train)(x.double())
    ours, theirs = fused.train(train)(x), plain.train(train)(x)
    assert ours.dtype == dtype
    assert_within_twice(ours.detach(), theirs.detach(), exact.detach())


def test_the_model_asks_for_channels_last_once():
    model = models.resnet18(fused=True, stem="cifar", num_classes=10).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad(), FastresOps() as recorded:
        model(x)
    assert recorded.names == ["conv_bn_relu"] * 20 + ["avg_pool_linear"]
    for name, args in recorded.calls:
        if name == "conv_bn_relu":
            assert args[0].is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(model(x.contiguous(memory_format=torch.channels_last)), expected)
        torch.testing.assert_close(model.to(memory_format=torch.channels_last)(x), expected)


# ---- the max-pool


class DoubledMaxPool(nn.MaxPool2d):
    def forward(self, x):
        return 2 * super().forward(x)


def patched_max_pool():
    pool = nn.MaxPool2d(3, 2, 1)
    pool.forward = lambda x: -x
    return pool


def hooked_max_pool(register):
    pool = nn.MaxPool2d(3, 2, 1)
    getattr(pool, register)(lambda module, *args: args[0] if "backward" in register else None)
    return pool


FUSED_POOLS = {
    "torchvision's": lambda: nn.MaxPool2d(3, 2, 1),
    "pairs": lambda: nn.MaxPool2d((3, 2), (2, 1), (1, 0)),
    "no stride": lambda: nn.MaxPool2d(2),
    "dilation of pairs": lambda: nn.MaxPool2d(3, dilation=(1, 1)),
}
OTHER_POOLS = {
    "dilation": lambda: nn.MaxPool2d(3, 2, 1, dilation=2),
    "ceil mode": lambda: nn.MaxPool2d(3, 2, ceil_mode=True),
    "indices": lambda: nn.MaxPool2d(3, 2, 1, return_indices=True),
    "average": lambda: nn.AvgPool2d(3, 2, 1),
    "identity": nn.Identity,
    "subclass": lambda: DoubledMaxPool(3, 2, 1),
    "patched": patched_max_pool,
    "forward hook": lambda: hooked_max_pool("register_forward_hook"),
    "forward pre-hook": lambda: hooked_max_pool("register_forward_pre_hook"),
    "backward hook": lambda: hooked_max_pool("register_full_backward_hook"),
    "backward pre-hook": lambda: hooked_max_pool("register_full_backward_pre_hook"),
}


def pooled_twice(pool, pending):
    """x -> by max_pool and by the modules: results, gradients, and max_pool's fastres ops."""
    z = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    bn = [torch.rand(6, dtype=torch.float64) + 0.5 for _ in range(4)]
    found = []
    for fused in (True, False):
        leaves = [t.clone().requires_grad_() for t in (z, *bn)]
        x = Pending(*leaves, 1e-5) if pending else leaves[0]
        with FastresOps() as recorded:
            result = max_pool(pool, x) if fused else pool(finish(x, relu=True))
        result = result if isinstance(result, tuple) else (result,)
        result[0].sin().sum().backward()
        gradients = [t.grad for t in leaves[: 5 if pending else 1]]
        found.append((list(result) + gradients, recorded.names))
    return found


@pytest.mark.parametrize("pending", [False, True], ids=["finished", "pending"])
@pytest.mark.parametrize("kind", FUSED_POOLS)
def test_a_max_pool_is_one_op(kind, pending):
    (ours, names), (theirs, _) = pooled_twice(FUSED_POOLS[kind](), pending)
    assert names == ["max_pool2d"]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("pending", [False, True], ids=["finished", "pending"])
@pytest.mark.parametrize("kind", OTHER_POOLS)
def test_another_pool_is_called(kind, pending):
    (ours, names), (theirs, _) = pooled_twice(OTHER_POOLS[kind](), pending)
    assert names == ["bn_add_relu"] * pending
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_global_hook_sees_the_max_pool():
    pool, seen = nn.MaxPool2d(3, 2, 1), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.append(m))
    try:
        max_pool(pool, torch.randn(1, 4, 8, 8))
    finally:
        handle.remove()
    assert seen == [pool]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_the_model_pools_by_the_op_until_a_hook_is_there(train):
    model = models.resnet18(fused=True, num_classes=10).train(train)
    x = torch.randn(2, 3, 64, 64)
    # In training the stem's BatchNorm and ReLU are the pool's.
    expected = ["conv_stats" if train else "conv_bn_relu", "max_pool2d"]
    assert ops_of(model, x)[:2] == expected
    seen = []
    handle = model.maxpool.register_forward_hook(lambda m, args, output: seen.append(output.shape))
    names = ops_of(model, x)
    assert "max_pool2d" not in names and seen == [(2, 64, 16, 16)]
    assert names.count("bn_add_relu") == 9 * train
    handle.remove()
    assert ops_of(model, x)[:2] == expected


def test_fx_shows_the_max_pool():
    model = models.resnet18(fused=True, num_classes=10).eval()
    traced = torch.fx.symbolic_trace(model)
    targets = [node.target for node in traced.graph.nodes]
    assert targets[2:6] == ["conv1", "bn1", "relu", "maxpool"]
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
