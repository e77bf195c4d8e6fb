"""conv_chain, and the models that compute their blocks by it: the bits of one unit at a time."""

import copy
import gc
import pickle
import weakref
from collections import OrderedDict
from unittest import mock

import pytest
import torch
from algorithms import AMX, DIGITS
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import fastres
from fastres import _C, ops
from fastres.backends import cpu
from fastres.models.resnet import FusedBasicBlock
from fastres.ops import reference
from fastres.ops.kept_chain import KeptChain, all_empty, same_types, same_values
from running import in_threads

EPS = [1e-5, 1e-3, 1e-5]
NO_POOL = (0,) * 6
# A projection (no ReLU, no bias, no packed weights), a 3x3 of stride 2, a 1x1 with the residual.
PROGRAM = [
    *(0, -1, 0, -1, 1, 2, 3, 4, -1, 2, 2, 0, 0, 1, 1, 1, 0, *NO_POOL),
    *(0, -1, 5, 6, 7, 8, -1, -1, 9, 2, 2, 1, 1, 1, 1, 1, 1, *NO_POOL),
    *(2, 1, 10, -1, 1, 2, 3, 4, -1, 1, 1, 0, 0, 1, 1, 1, 1, *NO_POOL),
]


def three_units(dtype: torch.dtype = torch.float32, channels: int = 24):
    """The arguments of conv_chain for a block that ends in its shortcut."""
    random = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def vector(least: float) -> torch.Tensor:
        values = torch.rand(channels, generator=random, dtype=torch.float64)
        return (values + least).to(reference.parameter_dtype(torch.empty(0, dtype=dtype)))

    x = tensor(2, 16, 9, 9).to(dtype)
    weights = [tensor(channels, ci, k, k).to(dtype) / (ci * k * k) ** 0.5
               for ci, k in ((16, 1), (16, 3), (channels, 1))]  # fmt: skip
    packed = ops.pack_conv_weight(weights[1], [2, 2], [1, 1], [1, 1], 1, [2, 9, 9])
    mean, var, gamma, beta = vector(-0.5), vector(0.5), vector(0.5), vector(-0.5)
    tensors = [
        *(weights[0], mean, var, gamma, beta),
        *(weights[1], vector(0), vector(-0.5), vector(0.5), packed),
        weights[2],
    ]
    return x, tensors, PROGRAM, EPS


def one_by_one(x, tensors, program, eps):
    projection, middle, last = tensors[0], tensors[5], tensors[10]
    mean, var, gamma, beta = tensors[1:5]
    shortcut = ops.conv_bn_relu(
        x, projection, None, mean, var, gamma, beta, eps[0], None,
        [2, 2], [0, 0], [1, 1], 1, False, None,
    )  # fmt: skip
    y = ops.conv_bn_relu(
        x, middle, tensors[6], tensors[7], tensors[8], None, None, eps[1], None,
        [2, 2], [1, 1], [1, 1], 1, True, tensors[9],
    )  # fmt: skip
    return ops.conv_bn_relu(
        y, last, None, mean, var, gamma, beta, eps[2], shortcut,
        [1, 1], [0, 0], [1, 1], 1, True, None,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_chain_has_the_bits_of_its_units(dtype):
    arguments = three_units(dtype)
    assert torch.equal(ops.conv_chain(*arguments), one_by_one(*arguments))


def test_the_reference_says_the_same():
    arguments = three_units(torch.float64)
    torch.testing.assert_close(reference.conv_chain(*arguments), ops.conv_chain(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype):
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.fastres.conv_chain.default, three_units(dtype), test_utils=checks
    )


def changed(**fields: int) -> list[int]:
    """PROGRAM with other fields in its last unit."""
    names = ["source", "residual", "weight", "bias", "running_mean", "running_var"]
    program = list(PROGRAM)
    for name, value in fields.items():
        program[46 + names.index(name)] = value
    return program


@pytest.mark.parametrize(
    ("program", "eps", "message"),
    [
        ([], [], r"program must have 23 integers for each of one or more units, got 0"),
        (PROGRAM[:-1], EPS, r"program must have 23 integers .* got 68"),
        (PROGRAM, EPS[:2], r"eps must have one number for each of 3 units, got 2"),
        (changed(source=3), EPS, r"source of unit 2 must be in \[0, 2\], got 3"),
        (changed(source=-1), EPS, r"source of unit 2 must be in \[0, 2\], got -1"),
        (changed(residual=3), EPS, r"residual of unit 2 must be in \[-1, 2\], got 3"),
        (changed(weight=11), EPS, r"weight of unit 2 must be in \[0, 11\), got 11"),
        (changed(bias=-2), EPS, r"bias of unit 2 must be in \[-1, 11\), got -2"),
        (changed(running_var=-1), EPS, r"running_var of unit 2 must be in \[0, 11\), got -1"),
        (changed(running_mean=0), EPS, r"running_mean must be"),
        (changed(residual=0), EPS, r"residual must be of shape"),
        ([*PROGRAM[:-6], 3, 0, 2, 2, 1, 1], EPS, r"kernel_size must be"),
        ([*PROGRAM[:-6], 3, 3, 2, 2, 2, 2], EPS, r"padding must be at most half of kernel_size"),
        ([*PROGRAM[:-6], 9, 9, 2, 2, 0, 0], EPS, r"at least kernel_size \(9, 9\) high and wide"),
    ],
)
def test_a_program_that_does_not_fit(program, eps, message):
    x, tensors, _, _ = three_units()
    with pytest.raises(RuntimeError, match=rf"fastres::conv_(chain|bn_relu): .*{message}"):
        ops.conv_chain(x, tensors, program, eps)


def test_a_chain_has_no_gradient():
    x, tensors, program, eps = three_units()
    with pytest.raises(RuntimeError, match="fastres::conv_chain has no derivative"):
        ops.conv_chain(x.requires_grad_(), tensors, program, eps).sum().backward()


# Kernel size, stride and padding: as in torchvision; larger; with gaps between windows; not square.
POOLS = [((3, 3), (2, 2), (1, 1)), ((5, 5), (3, 3), (2, 2)), ((2, 2), (13, 5), (0, 1)),
         ((1, 4), (1, 2), (0, 2)), ((13, 2), (4, 2), (6, 0))]  # fmt: skip
# Sizes of a stem's input: two blocks of tiles side by side, bands of rows for several blocks and
# none at all, a last tile that is not whole, rows too long for a band.
SIZES = [(64, 64), (37, 300), (150, 41), (17, 16), (16, 2300)]


def stem_and_pool(size, pool, batch=2, channels=32, dtype=torch.float32):
    """A chain of a stem and a max-pool, and the function that computes it by the ops."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, *size, generator=random).to(dtype)
    weight = (torch.randn(channels, 3, 7, 7, generator=random) / 12).to(dtype)
    vectors = torch.randn(2, channels, generator=random) * 0.1 + torch.tensor([[0.0], [1.0]])
    mean, var = vectors.to(reference.parameter_dtype(x))
    geometry = ([2, 2], [3, 3], [1, 1], 1)
    packed = ops.pack_conv_weight(weight, *geometry, [batch, *size])
    given = [packed] if packed.numel() > 0 else []
    unit = (0, -1, 0, -1, 1, 2, -1, -1, 3 if given else -1)
    program = [*unit, 2, 2, 3, 3, 1, 1, 1, 1, *pool[0], *pool[1], *pool[2]]

    def apart():
        y = ops.conv_bn_relu(
            x, weight, None, mean, var, None, None, 1e-5, None, *geometry, True, *given
        )
        return ops.max_pool2d(y, *map(list, pool))

    return (x, [weight, mean, var, *given], program, [1e-5]), apart


@pytest.fixture(params=["chosen", "packed", "winograd4", DIGITS, AMX])
def algorithm(request, monkeypatch) -> str:
    if request.param != "chosen":
        monkeypatch.setenv("FASTRES_CPU_ALGORITHM", request.param)
    return request.param


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_pool_has_the_bits_of_its_own_op(size, pool, algorithm):
    arguments, apart = stem_and_pool(size, pool)
    expected = apart()
    assert torch.equal(ops.conv_chain(*arguments), expected)
    close = reference.conv_chain(*arguments)
    torch.testing.assert_close(close, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_a_pool_in_every_number_of_threads(batch, threads):
    arguments, apart = stem_and_pool((70, 90), POOLS[0], batch)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(ops.conv_chain(*arguments), apart())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_pool_of_another_dtype(dtype, algorithm):
    arguments, apart = stem_and_pool((70, 90), POOLS[0], dtype=dtype)
    assert torch.equal(ops.conv_chain(*arguments), apart())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_pool_passes_on_what_is_not_finite(value, algorithm):
    arguments, apart = stem_and_pool((64, 64), POOLS[0])
    arguments[0][1, 2, 40, 33] = value
    y = ops.conv_chain(*arguments)
    torch.testing.assert_close(y, apart(), rtol=0, atol=0, equal_nan=True)
    expected = reference.conv_chain(*arguments)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert not y.isfinite().all()


def test_a_pool_of_slices_and_of_no_images():
    arguments, _ = stem_and_pool((64, 64), POOLS[0], batch=3)
    x, *rest = arguments
    wide = torch.randn(3, 64, 64, 8)
    wide[..., 2:5] = x.permute(0, 2, 3, 1)
    expected = ops.conv_chain(x, *rest)
    assert torch.equal(ops.conv_chain(wide[..., 2:5].permute(0, 3, 1, 2), *rest), expected)
    assert ops.conv_chain(x[:0], *rest).shape == (0, 32, 16, 16)


def test_opcheck_of_a_pool():
    checks = ("test_schema", "test_faketensor")
    arguments, _ = stem_and_pool((65, 40), POOLS[1])
    torch.library.opcheck(torch.ops.fastres.conv_chain.default, arguments, test_utils=checks)


def test_a_pool_after_a_residual():
    x, tensors, program, eps = three_units()
    pooled = [*program[:-6], 3, 3, 2, 2, 1, 1]
    expected = ops.max_pool2d(ops.conv_chain(x, tensors, program, eps), [3, 3], [2, 2], [1, 1])
    assert torch.equal(ops.conv_chain(x, tensors, pooled, eps), expected)


def head_of(channels: int = 24, outputs: int = 5, dtype: torch.dtype = torch.float32):
    """A linear layer's weight and bias."""
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(outputs, channels, generator=random, dtype=torch.float64)
    return weight.to(dtype), torch.arange(outputs).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_head_has_the_bits_of_its_own_op(dtype, has_bias):
    arguments, (weight, bias) = three_units(dtype), head_of(dtype=dtype)
    head = (weight, bias if has_bias else None)
    y = ops.conv_chain(*arguments, *head)
    assert torch.equal(y, ops.avg_pool_linear(ops.conv_chain(*arguments), *head))
    # A transposed weight's rows are copied.
    turned = (weight.t().contiguous().t(), head[1])
    assert torch.equal(ops.conv_chain(*arguments, *turned), y)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_a_head_and_units_in_every_number_of_threads(threads):
    x, *rest = three_units(channels=96)
    x, head = x.repeat(3, 1, 1, 1), head_of(96, 1000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        units = one_by_one(x, *rest)
        logits = ops.avg_pool_linear(units, *head)
        for _ in range(20):
            assert torch.equal(ops.conv_chain(x, *rest), units)
            assert torch.equal(ops.conv_chain(x, *rest, *head), logits)
    finally:
        torch.set_num_threads(before)


def test_a_head_of_the_reference_and_of_no_images():
    arguments, head = three_units(torch.float64), head_of(dtype=torch.float64)
    y = ops.conv_chain(*arguments, *head)
    torch.testing.assert_close(reference.conv_chain(*arguments, *head), y)
    x, *rest = arguments
    assert ops.conv_chain(x[:0], *rest, *head).shape == (0, 5)
    checks = ("test_schema", "test_faketensor")
    chain = torch.ops.fastres.conv_chain.default
    torch.library.opcheck(chain, (*arguments, *head), test_utils=checks)


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.ones(5, 23), None, r"weight must be .*24.* got .*5, 23"),
        (torch.ones(24), None, r"weight must be .*24.* got .*24"),
        (torch.ones(5, 24).double(), None, r"weight must be .*float32.* got .*float64"),
        (torch.ones(5, 24), torch.ones(4), r"bias must be .*5,.* got .*4,"),
        (torch.ones(5, 24), torch.ones(5).half(), r"bias must be .*float32.* got .*float16"),
    ],
)
def test_a_head_that_does_not_fit(weight, bias, message):
    with pytest.raises(RuntimeError, match=rf"fastres::conv_chain: fc_{message}"):
        ops.conv_chain(*three_units(), weight, bias)


def test_memory_of_results_is_used_again_when_they_are_not_needed_any_more():
    """Twelve units, of which each takes the last two results, and one the first."""
    x, tensors, _, _ = three_units(channels=16)
    vectors = tensors[1:5]
    weights = [torch.randn(16, 16, 3, 3) / 12 for _ in range(12)]
    program, eps = [], []
    for i in range(12):
        residual = 1 if i == 9 else max(i - 1, -1)
        program += (i, residual, 4 + i, -1, 0, 1, 2, 3, -1, 1, 1, 1, 1, 1, 1, 1, 1, *NO_POOL)
        eps.append(1e-5)
    results = [x]
    for i, weight in enumerate(weights):
        residual = results[1] if i == 9 else results[i - 1] if i > 0 else None
        mean, var, gamma, beta = vectors
        y = ops.conv_bn_relu(
            results[i], weight, None, mean, var, gamma, beta, 1e-5, residual,
            [1, 1], [1, 1], [1, 1], 1, True, None,
        )  # fmt: skip
        results.append(y)
    assert torch.equal(ops.conv_chain(x, [*vectors, *weights], program, eps), results[-1])


def test_the_input_as_a_residual(algorithm):
    _, tensors, _, _ = three_units(channels=16)
    weight = torch.randn(16, 16, 3, 3) / 12
    program = [0, 0, 4, -1, 0, 1, 2, 3, -1, 1, 1, 1, 1, 1, 1, 1, 1, *NO_POOL]
    # A slice, whose pixels hold their channels next to each other, but are not dense.
    x = torch.randn(2, 12, 12, 32)[..., 3:19].permute(0, 3, 1, 2)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    expected = ops.conv_bn_relu(x, weight, None, *tensors[1:5], 1e-5, x, *geometry, True, None)
    assert torch.equal(ops.conv_chain(x, [*tensors[1:5], weight], program, [1e-5]), expected)


def kept(arguments, watched=(), head=(None, None)) -> KeptChain:
    with torch.no_grad():
        return KeptChain(*arguments, *head, list(watched))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_kept_chain_reads_its_vectors_anew(dtype):
    arguments, head = three_units(dtype), head_of(dtype=dtype)
    x, tensors, program, eps = arguments
    chain = kept(arguments, head=head)
    for _ in range(2):
        assert torch.equal(chain.compute(x), ops.conv_chain(*arguments, *head))
        other = torch.randn_like(x)
        expected = ops.conv_chain(other, tensors, program, eps, *head)
        assert torch.equal(chain.compute(other), expected)
        tensors[1] += 1
        tensors[3].data = tensors[3].data * 2
        head[0].mul_(3)
        head[1].data = head[1] + 1
    tensors[1].data = torch.zeros(3, dtype=dtype)
    with pytest.raises(RuntimeError, match=r"running_mean must be of shape \(24,\).* got \(3,\)"):
        chain.compute(x)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_what_a_thread_finds_wrong_is_said(threads, monkeypatch):
    """Vectors are checked by all threads; a chain goes on after an error."""
    monkeypatch.setenv("FASTRES_CPU_ALGORITHM", "packed")
    arguments = three_units()
    x, tensors, _, _ = arguments
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        chain, expected = kept(arguments), ops.conv_chain(*arguments)
        for index, name in ((1, "running_mean"), (8, "running_var"), (4, "bn_bias"), (6, "bias")):
            data = tensors[index].data
            tensors[index].data = torch.zeros(7)
            for _ in range(3):
                with pytest.raises(RuntimeError, match=rf"{name} must be .*24.* got \(7,\)"):
                    chain.compute(x)
            tensors[index].data = data
            assert torch.equal(chain.compute(x), expected)
    finally:
        torch.set_num_threads(before)


def test_a_kept_chain_is_for_one_kind_of_input():
    arguments = three_units()
    x, chain = arguments[0], kept(arguments)
    wanted = r"fastres::conv_chain: input must be of shape \(2, 16, 9, 9\) and float32, got"
    for other, got in ((x[:1], r"\(1, 16, 9, 9\)"), (x.double(), r".* float64")):
        with pytest.raises(RuntimeError, match=rf"{wanted} {got}"):
            chain.compute(other)
    wide = torch.randn(2, 9, 9, 32)[..., 3:19].permute(0, 3, 1, 2)
    assert torch.equal(chain.compute(wide), ops.conv_chain(wide, *arguments[1:]))


def test_what_a_kept_chain_watches():
    arguments = three_units()
    weight = arguments[1][5]
    for change, stays in (
        (lambda: arguments[1][1].add_(1), True),
        (lambda: weight.mul_(2), False),
        (lambda: setattr(weight, "data", weight.data.clone()), False),
        (lambda: setattr(weight, "data", weight.data.transpose(2, 3)), False),
        (lambda: setattr(weight, "data", weight.data[:, :8]), False),
    ):
        chain = kept(arguments, [weight])
        assert chain.stays()
        change()
        assert chain.stays() == stays


def test_a_kept_chain_goes_with_its_object():
    arguments = three_units()
    chain = kept(arguments)
    number, weight = chain._chain, weakref.ref(arguments[1][0])
    del chain
    with pytest.raises(RuntimeError, match=f"chain must be one that is kept, got {number}"):
        torch.ops.fastres.kept_conv_chain(arguments[0], number)
    assert not _C.conv_chain_stays(number)
    _C.drop_conv_chain(number)
    arguments[1].clear()
    assert weight() is None


def test_comparing_objects():
    one, two = object(), object()
    assert same_values([{1: one}, {}, {2: two, 3: one}], [one, two, one])
    assert not same_values([{1: one}, {2: two}], [one])
    assert not same_values([{1: one}], [one, two])
    assert not same_values([{1: [1]}], [[1]])
    assert all_empty([{}, OrderedDict()])
    assert not all_empty([{}, {1: one}])
    assert same_types([1, "a"], [int, str])
    assert not same_types([True], [int])
    assert not same_types([1], [int, int])


def fused(name: str = "resnet18", **arguments):
    torch.manual_seed(0)
    model = getattr(fastres, name)(fused=True, num_classes=10, **arguments).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
    return model


def chained_units(model, x) -> tuple[int, torch.Tensor]:
    """How many units a forward without gradients gives to conv_chain, and its result."""
    with mock.patch.object(ops, "conv_chain", wraps=ops.conv_chain) as chain, torch.no_grad():
        y = model(x)
    return sum(len(call.args[3]) for call in chain.call_args_list), y


@pytest.mark.parametrize(
    ("name", "arguments", "units"),
    [
        ("resnet18", {"stem": "cifar"}, 20),
        ("resnet34", {}, 36),
        ("resnet50", {"stem": "cifar"}, 53),
        ("resnet50", {"replace_stride_with_dilation": [False, True, True]}, 53),
        ("resnet50", {"groups": 4, "width_per_group": 8}, 53),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_model_has_the_bits_that_it_has_with_gradients(name, arguments, units, batch):
    model, x = fused(name, **arguments), torch.randn(batch, 3, 40, 33)
    count, y = chained_units(model, x)
    assert count == units
    assert torch.equal(y, model(x))
    with torch.inference_mode():
        assert torch.equal(y, model(x))


class Doubled(FusedBasicBlock):
    def forward(self, x):
        return 2 * super().forward(x)


def with_hook(of):
    def attach(model):
        of(model).register_forward_hook(lambda module, inputs, output: output + 1)

    return attach


def with_other_block(model):
    block = Doubled(64, 64)
    block.load_state_dict(model.layer1[1].state_dict())
    model.layer1[1] = block.eval()


def with_patched_forward(model):
    block = model.layer2[1]
    forward = block.forward
    block.forward = lambda x: forward(x) + 1


def with_batch_statistics(model):
    model.layer3[0].bn2.train()
    model.layer3[0].bn2.momentum = 0.0


def with_parametrization(model):
    parametrizations.weight_norm(model.layer4[0].conv2)


def with_zero_pad(model):
    model.layer2[0].downsample = fastres.resnet18(shortcut="zero_pad").layer2[0].downsample


ATTACHMENTS = {
    "hook on a block": with_hook(lambda model: model.layer1[0]),
    "hook on a stage": with_hook(lambda model: model.layer2),
    "hook on a convolution": with_hook(lambda model: model.layer3[1].conv2),
    "hook on a BatchNorm": with_hook(lambda model: model.layer3[1].bn1),
    "hook on a ReLU": with_hook(lambda model: model.layer3[1].relu),
    "hook on a projection": with_hook(lambda model: model.layer3[0].downsample),
    "another block": with_other_block,
    "patched forward": with_patched_forward,
    "batch statistics": with_batch_statistics,
    "parametrization": with_parametrization,
    "another shortcut": with_zero_pad,
}


def with_other_pool(model):
    model.maxpool = nn.AvgPool2d(3, 2, 1)


def with_stem_of_two(model):
    model.conv1 = nn.Sequential(model.conv1, nn.ReLU())


STEM_ATTACHMENTS = {
    "hook on the convolution": with_hook(lambda model: model.conv1),
    "hook on the BatchNorm": with_hook(lambda model: model.bn1),
    "hook on the ReLU": with_hook(lambda model: model.relu),
    "hook on the pool": with_hook(lambda model: model.maxpool),
    "another pool": with_other_pool,
    "another convolution": with_stem_of_two,
    "batch statistics": lambda model: model.bn1.train(),
}


def with_other_head(model):
    model.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 10, bias=False)).eval()


def with_max_at_the_end(model):
    model.avgpool = nn.AdaptiveMaxPool2d(1)


def with_parametrized_fc(model):
    parametrizations.weight_norm(model.fc)
    with torch.no_grad():
        model.fc.bias.add_(1)


HEAD_ATTACHMENTS = {
    "hook on the pool": with_hook(lambda model: model.avgpool),
    "hook on the linear layer": with_hook(lambda model: model.fc),
    "another linear layer": with_other_head,
    "another pool": with_max_at_the_end,
    "parametrization": with_parametrized_fc,
}
# What is attached, and how many units still wait.
ALL_ATTACHMENTS = (
    {name: (attach, 0) for name, attach in ATTACHMENTS.items()}
    | {f"stem: {name}": (attach, 19) for name, attach in STEM_ATTACHMENTS.items()}
    | {f"head: {name}": (attach, 20) for name, attach in HEAD_ATTACHMENTS.items()}
)


@pytest.mark.parametrize("recorded", [False, True], ids=["", "recorded"])
@pytest.mark.parametrize(("attach", "units"), ALL_ATTACHMENTS.values(), ids=ALL_ATTACHMENTS)
def test_what_is_attached_is_seen(attach, units, recorded):
    model, x = fused(), torch.randn(2, 3, 40, 40)
    before = model(x)
    if recorded:
        assert chained_units(model, x)[0] == 20
    attach(model)
    count, y = chained_units(model, x)
    assert count == units
    assert torch.equal(y, model(x))
    assert not torch.allclose(y, before, rtol=1e-4, atol=1e-4) or attach is with_parametrization


def test_a_module_that_is_not_called_does_no_harm():
    model, x = fused(), torch.randn(2, 3, 40, 40)
    before = model(x)
    model.conv_more = nn.Conv2d(3, 3, 1)
    count, y = chained_units(model, x)
    assert count == 20
    assert torch.equal(y, before)


def test_a_global_hook_is_called():
    model, x, seen = fused(stem="cifar"), torch.randn(1, 3, 16, 16), []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.append(type(module))
    )
    try:
        count, _ = chained_units(model, x)
    finally:
        hook.remove()
    assert count == 0
    assert seen.count(nn.Conv2d) == 20


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_who_looks_at_every_op_sees_every_unit():
    model, x = fused(stem="cifar"), torch.randn(1, 3, 16, 16)
    with torch.no_grad(), Names() as seen:
        model(x)
    assert seen.names.count("fastres::conv_bn_relu") == 20


def test_other_precisions_are_left_to_the_units():
    x = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.float16):
        assert chained_units(fused(stem="cifar"), x)[0] == 0
    assert chained_units(fused(stem="cifar").double(), x.double())[0] == 0
    assert chained_units(fused(stem="cifar").half(), x.half())[0] == 0


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_bfloat16_has_the_bits_that_it_has_with_gradients(stem):
    model, x = fused(stem=stem), torch.randn(2, 3, 48, 40)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            count, y = chained_units(model, x)
            assert count == 20
            assert torch.equal(y, model(x))
        with torch.no_grad():
            model.layer2[0].conv1.weight.mul_(-2)
    model, x = model.bfloat16(), x.bfloat16()
    count, y = chained_units(model, x)
    assert count == 20
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, model(x))


def test_types_that_do_not_fit_are_an_error():
    model, x = fused(stem="cifar"), torch.randn(2, 3, 16, 16)
    with torch.no_grad(), pytest.raises(RuntimeError, match="weight must be bfloat16"):
        model(x.bfloat16())
    with torch.no_grad(), pytest.raises(RuntimeError, match="weight must be float32"):
        model.bfloat16()(x)


def test_nothing_is_stale():
    model, x = fused(stem="cifar"), torch.randn(2, 3, 16, 16)
    _, before = chained_units(model, x)
    with torch.no_grad():
        model.layer1[0].conv1.weight.mul_(-1)
        model.layer2[0].bn2.running_mean.add_(1)
        model.layer3[0].downsample[0].weight.mul_(2)
    count, after = chained_units(model, x)
    assert count == 20
    assert not torch.allclose(before, after)
    assert torch.equal(after, copy.deepcopy(model)(x))


def recordings(model, x) -> tuple[int, torch.Tensor]:
    """How often a forward without gradients records the chain, and its result."""
    with mock.patch.object(model, "_record", wraps=model._record) as record, torch.no_grad():
        y = model(x)
    return record.call_count, y


def test_a_chain_is_recorded_once_for_each_size_and_type():
    model, x = fused(), torch.randn(2, 3, 40, 40)
    kinds = {
        "": (lambda: recordings(model, x)),
        "size": (lambda: recordings(model, x[:1, :, 3:])),
        "autocast": autocast_to_bfloat16(lambda: recordings(model, x)),
        "layout": (lambda: recordings(model, x.to(memory_format=torch.channels_last))),
        "winograd": cpu.flags(allow_winograd=False)(lambda: recordings(model, x)),
    }
    results = {}
    for kind, forward in kinds.items():
        count, results[kind] = forward()
        assert count == (kind != "layout"), kind
    for kind, forward in kinds.items():
        count, y = forward()
        assert count == 0, kind
        assert torch.equal(y, results[kind]), kind
    assert torch.equal(results[""], model(x))


def autocast_to_bfloat16(call):
    def wrapped():
        with torch.autocast("cpu", torch.bfloat16):
            return call()

    return wrapped


def replace_weight(model):
    model.layer1[1].conv2.weight = nn.Parameter(model.layer1[1].conv2.weight * 2)


def replace_data(model):
    model.layer1[1].conv2.weight.data = model.layer1[1].conv2.weight.data * 2


def transpose_data(model):
    weight = model.layer1[1].conv2.weight
    weight.data = weight.data.transpose(0, 1)


def replace_module(model):
    model.layer2[1].bn1 = copy.deepcopy(model.layer2[1].bn1)
    model.layer2[1].bn1.running_mean += 1


def replace_buffer(model):
    model.bn1.running_var = model.bn1.running_var * 3


def load_into(model):
    model.load_state_dict({k: v / 2 for k, v in model.state_dict().items()})


def step_of(optimizer, **options):
    def step(model):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer(model.parameters(), 0.1, **options).step()

    return step


CHANGES = {
    "weight in place": lambda model: model.layer3[0].conv1.weight.mul_(2),
    "buffer in place": lambda model: model.layer3[0].bn1.running_mean.add_(1),
    "bias of a BatchNorm": lambda model: model.bn1.bias.add_(1),
    "another weight": replace_weight,
    "a weight's data": replace_data,
    "a weight's strides": transpose_data,
    "another module": replace_module,
    "another buffer": replace_buffer,
    "eps": lambda model: setattr(model.layer4[0].bn2, "eps", 0.5),
    "state_dict": load_into,
    "step": step_of(torch.optim.SGD),
    "fused step": step_of(torch.optim.SGD, fused=True),
    "another block": lambda model: model.layer1.append(copy.deepcopy(model.layer1[1])),
    "a projection less": lambda model: setattr(model.layer1[0], "downsample", nn.Sequential()),
    "another pool": lambda model: setattr(model.maxpool, "kernel_size", 2),
    "linear layer in place": lambda model: model.fc.weight.mul_(2),
    "a linear layer's data": lambda model: setattr(model.fc.bias, "data", model.fc.bias.data + 1),
    "another linear layer": lambda model: setattr(model, "fc", nn.Linear(512, 7)),
    "no bias": lambda model: setattr(model.fc, "bias", None),
    "no linear layer": lambda model: setattr(model, "fc", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_recorded_chain_sees_every_change(change):
    model, x = fused(), torch.randn(2, 3, 40, 40)
    recordings(model, x)
    count, before = recordings(model, x)
    assert count == 0
    with torch.no_grad():
        change(model)
    _, after = recordings(model, x)
    assert torch.equal(after, copy.deepcopy(model)(x))
    same = after.shape == before.shape and torch.allclose(after, before)
    assert not same or change is CHANGES["a projection less"]
    count, again = recordings(model, x)
    assert torch.equal(again, after)


def test_vectors_of_a_bfloat16_model_are_read_anew():
    model, x = fused().bfloat16(), torch.randn(2, 3, 40, 40).bfloat16()
    _, before = recordings(model, x)
    with torch.no_grad():
        model.bn1.running_mean.add_(1)
    _, after = recordings(model, x)
    assert not torch.equal(before, after)
    assert torch.equal(after, model(x))


def test_copies_of_a_recorded_model():
    model, x = fused(stem="cifar"), torch.randn(2, 3, 16, 16)
    _, y = recordings(model, x)
    twin, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        model.conv1.weight.zero_()
    for other in (twin, pickled):
        assert torch.equal(recordings(other, x)[1], y)
    # A shallow copy with modules of its own, as replicas have.
    other = copy.copy(twin)
    other._modules = dict(twin._modules, conv1=copy.deepcopy(twin.conv1))
    with torch.no_grad():
        other.conv1.weight.mul_(-1)
        assert not torch.equal(other(x), y)
    assert torch.equal(recordings(twin, x)[1], y)


@pytest.mark.parametrize("order", [[65, 2], [2, 65]], ids=str)
def test_a_head_is_watched_where_it_is_in_the_chain(order):
    """A chain of more images ends before the head, whose hooks do it no harm."""
    model = fused(stem="cifar")
    inputs = {batch: torch.randn(batch, 3, 16, 16) for batch in order}
    before = {batch: recordings(model, x)[1] for batch, x in inputs.items()}
    assert [recordings(model, x)[0] for x in inputs.values()] == [0, 0]
    model.fc.register_forward_hook(lambda module, args, y: y + 1)
    assert recordings(model, inputs[65])[0] == 0
    for batch, x in inputs.items():
        _, y = recordings(model, x)
        assert torch.equal(y, model(x))
        torch.testing.assert_close(y, before[batch] + 1)


def test_a_recorded_model_goes_when_it_is_of_no_use():
    model, x = fused(stem="cifar"), torch.randn(2, 3, 16, 16)
    recordings(model, x)
    assert recordings(model, x)[0] == 0
    parts = [weakref.ref(part) for part in (model, model.fc.weight, model.layer1[0].bn1.bias)]
    del model
    gc.collect()
    assert [part() for part in parts] == [None] * 3


def test_threads_share_a_recorded_model():
    model = fused(stem="cifar")
    inputs = [torch.randn(1 + i, 3, 16, 16) for i in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]

    def right(i):
        with torch.no_grad():
            for _ in range(20):
                if i == 0:
                    model.eval()  # forgets what the others may be using
                if not torch.equal(model(inputs[i]), expected[i]):
                    return False
        return True

    assert not in_threads(4, right)


def test_parameters_of_functional_call():
    model, other, x = fused(stem="cifar"), fused(stem="cifar"), torch.randn(2, 3, 16, 16)
    recordings(model, x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
        tensors = dict(other.named_parameters()) | dict(other.named_buffers())
        y = torch.func.functional_call(model, tensors, (x,))
        assert torch.equal(y, other(x))
