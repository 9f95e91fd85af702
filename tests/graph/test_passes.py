"""The passes: each keeps the function it claims to keep, does what its contract says, and says what it left."""

from collections.abc import Callable

import pytest
import torch
from support.closeness import assert_rejects_corruption
from torch import nn

from ggpass import Program, Report, Scheme, WeightError
from ggpass.formats import INT8, RF8
from ggpass.lowering.decide import Lowering
from ggpass.lowering.operators import DISPATCHED, REFERENCE
from ggpass.passes import CleanUp, FoldBatchNorm, LowerWeights, MergeLinears

aten = torch.ops.aten


class Function(nn.Module):
    """A module around a function of (module, x), so that a test reads as its formula."""

    def __init__(self, function: Callable[..., torch.Tensor], **members: nn.Module | torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, torch.Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def count(program: Program, *targets: object) -> int:
    return len(list(program.calls(*targets)))


def double_of(program: Program) -> Program:
    """The same program on float64 tensors: the reference that rounding cannot blur."""
    twin = program.copy()
    for name in {str(n.target) for n in twin.graph.nodes if n.op == "get_attr"}:
        if twin.weight(name).is_floating_point():
            twin.set_weight(name, twin.weight(name).detach().double(), buffer=True)
    return twin


def with_statistics(norm: nn.Module) -> nn.Module:
    """A batch norm as training leaves it: nothing at its neutral value."""
    for tensor in (norm.running_mean, norm.weight, norm.bias):
        if tensor is not None:
            nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.1, 3.0)
    return norm


NETS = {
    "conv2d": (lambda m, x: m.n(m.c(x)), {"c": nn.Conv2d(3, 8, 3), "n": nn.BatchNorm2d(8)}, (2, 3, 7, 9)),
    "conv2d without bias": (
        lambda m, x: m.n(m.c(x)),
        {"c": nn.Conv2d(4, 8, 3, bias=False, groups=2), "n": nn.BatchNorm2d(8)},
        (2, 4, 7, 9),
    ),
    "conv1d, padding by name": (
        lambda m, x: m.n(m.c(x)),
        {"c": nn.Conv1d(3, 8, 3, padding="same"), "n": nn.BatchNorm1d(8)},
        (2, 3, 9),
    ),
    "linear, norm without affine": (
        lambda m, x: m.n(m.c(x)),
        {"c": nn.Linear(3, 8), "n": nn.BatchNorm1d(8, affine=False)},
        (5, 3),
    ),
}


@pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())
def test_fold_batch_norm_keeps_the_function(net: tuple) -> None:
    function, members, shape = net
    with_statistics(members["n"])
    model, x = Function(function, **members).eval(), torch.randn(shape)
    program = Program.trace(model, (x,))
    expected = double_of(program)(x.double())
    report = FoldBatchNorm()(program)
    program.check()
    assert len(report.changes) == 1
    assert not report.skips
    assert count(program, aten.batch_norm.default) == 0
    # W' and b' are each rounded once to float32, and the sum of K + 1 products in float32 follows.
    weight = members["c"].weight
    terms = weight[0].numel() + 4
    magnitude = expected.detach().abs().amax() + sum(
        p.detach().double().abs().sum() for p in (weight[0], x.flatten()[:1])
    )
    assert_rejects_corruption(program(x), expected, float(terms * 2**-23 * magnitude * 4))


@pytest.mark.parametrize(("make", "shape"), [(nn.Conv1d, (8, 8)), (nn.Linear, (2, 5, 3))], ids=["conv1d", "linear"])
def test_fold_batch_norm_knows_which_dimension_holds_the_channels(make: Callable, shape: tuple[int, ...]) -> None:
    """Unbatched, dimension 1 of a conv1d's result is time; of a linear on three dimensions it is the sequence."""
    producer = nn.Conv1d(8, 6, 3) if make is nn.Conv1d else nn.Linear(3, 5)
    norm = with_statistics(nn.BatchNorm1d(6 if make is nn.Conv1d else 5))
    model, x = nn.Sequential(producer, norm).eval(), torch.randn(shape)
    program = Program.trace(model, (x,))
    report = FoldBatchNorm()(program)
    program.check()
    assert ["batch dimension" in s.reason for s in report.skips] == [True]
    assert torch.equal(program(x), model(x))


def test_fold_batch_norm_leaves_the_model_alone() -> None:
    conv, norm = nn.Conv2d(3, 8, 3), with_statistics(nn.BatchNorm2d(8))
    model, x = nn.Sequential(conv, norm).eval(), torch.randn(1, 3, 5, 5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    FoldBatchNorm()(Program.trace(model, (x,)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: m.n(m.c(x)) + m.c(x), ""),
        (lambda m, x: (lambda y: m.n(y) + y)(m.c(x)), "has other readers"),
        (lambda m, x: m.n(torch.relu(m.c(x))), "does not follow"),
        (lambda m, x: m.n(torch.conv2d(x, m.c.weight * 2)), "is computed"),
    ],
)
def test_fold_batch_norm_says_why_not(function: Callable, reason: str) -> None:
    model = Function(function, c=nn.Conv2d(3, 3, 1), n=with_statistics(nn.BatchNorm2d(3))).eval()
    x = torch.randn(2, 3, 4, 4)
    program = Program.trace(model, (x,))
    report = FoldBatchNorm()(program)
    program.check()
    assert torch.equal(program(x), model(x)) if reason else len(report.changes + report.skips) == 1
    if reason:
        assert [reason in skip.reason for skip in report.skips] == [True]


def test_clean_up_keeps_the_function_and_drops_what_computes_nothing() -> None:
    model = Function(
        lambda m, x: (m.unused(x), m.d(x).detach() * 2)[1], d=nn.Dropout(0.5), unused=nn.Linear(4, 4)
    ).eval()
    x = torch.randn(3, 4)
    program = Program.trace(model, (x,))
    report = CleanUp()(program)
    program.check()
    assert torch.equal(program(x), model(x))
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [aten.mul.Tensor]
    assert {c.name for c in report.changes} == {"graph", "unused.weight", "unused.bias"}


def three_linears(bias: tuple[bool, ...] = (True, True, True)) -> nn.Module:
    return Function(
        lambda m, x: torch.cat([m.q(x).view(-1, 2, 4), m.k(x).view(-1, 2, 4), m.v(x).view(-1, 3, 4)], 1),
        q=nn.Linear(16, 8, bias=bias[0]),
        k=nn.Linear(16, 8, bias=bias[1]),
        v=nn.Linear(16, 12, bias=bias[2]),
    ).eval()


@pytest.mark.parametrize("operators", [REFERENCE, DISPATCHED], ids=["reference", "dispatched"])
@pytest.mark.parametrize("bias", [(True, True, True), (False, True, False), (False, False, False)])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_merging_coded_linears_keeps_the_function(operators, bias, granularity) -> None:  # type: ignore[no-untyped-def]
    model, x = three_linears(bias), torch.randn(5, 16)
    program = Program.trace(model, (x,))
    LowerWeights(Lowering(scheme=Scheme(granularity=granularity), operators=operators))(program)
    program.check()
    apart = program(x)
    report = MergeLinears(operators)(program)
    program.check()
    assert [c.what for c in report.changes] == ["3 linears merged: 28 channels"]
    assert count(program, operators.linear) == 1
    # The same products; only the order of float32 sums may differ between the two shapes of the product.
    expected = double_of_values(model, x)
    torch.testing.assert_close(program(x), apart, rtol=0, atol=float(17 * 2**-24 * expected) * 2)


def double_of_values(model: nn.Module, x: torch.Tensor) -> float:
    """max Σ|x·w|: the magnitude that float32 rounding errors are relative to."""
    return max(
        float((x.abs().double() @ p.detach().abs().double().T).max()) for p in model.parameters() if p.dim() == 2
    )


def test_merging_float_linears() -> None:
    model, x = three_linears((False, True, True)), torch.randn(5, 16)
    program = Program.trace(model, (x,))
    assert len(MergeLinears()(program).changes) == 1
    program.check()
    actual, bound = program(x), float(18 * 2**-24 * (double_of_values(model, x) + 1))
    assert_rejects_corruption(actual, model.double()(x.double()), bound)


MERGED: dict[str, tuple[Callable, int]] = {
    "an in-place write between": (lambda m, x: (lambda y: m.a(y) + (y.mul_(3.0), m.b(y))[1])(x.clone()), 0),
    "in-place on a part": (lambda m, x: (lambda p, q: torch.relu_(p) + q)(m.a(x), m.b(x)), 1),
    "a view of a view": (lambda m, x: m.a(x).unsqueeze(0).view(1, -1) + m.b(x).view(1, -1), 1),
    "as_strided": (lambda m, x: m.a(x).as_strided((3, 8), (8, 1)) + m.b(x), 1),
    "a weight of one dimension": (
        lambda m, x: nn.functional.linear(x, m.a.bias) + nn.functional.linear(x, m.b.bias),
        0,
    ),
}


@pytest.mark.parametrize("case", MERGED.values(), ids=MERGED.keys())
@pytest.mark.parametrize("coded", [True, False])
def test_merging_keeps_what_follows_right(case: tuple[Callable, int], coded: bool) -> None:
    function, merged = case
    model, x = Function(function, a=nn.Linear(8, 8), b=nn.Linear(8, 8)).eval(), torch.randn(3, 8)
    program = Program.trace(model, (x,))
    if coded:
        LowerWeights()(program)
    program.check()
    expected = program(x)
    report = MergeLinears()(program)
    program.check()
    assert len(report.changes) == merged
    # Sums of eight products of numbers below 10, in another order.
    torch.testing.assert_close(program(x), expected, rtol=0, atol=float(9 * 2**-24 * 800))


def test_linears_of_two_codebooks_stay_apart() -> None:
    model, x = Function(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(8, 8), b=nn.Linear(8, 8)).eval(), torch.randn(3, 8)
    program = Program.trace(model, (x,))
    LowerWeights(Lowering(skip=("b",)))(program)
    LowerWeights(Lowering(format=INT8))(program)
    assert not MergeLinears()(program).changes


def test_names_that_are_taken_are_left_alone() -> None:
    """The model's own `w_scale` and `rf8_codebook` are not the codes' scale and codebook."""
    model = Function(
        lambda m, x: nn.functional.linear(x, m.w) * m.w_scale + m.rf8_codebook,
        w=nn.Parameter(torch.randn(8, 8)),
        w_scale=torch.randn(8),
        rf8_codebook=torch.randn(8),
    ).eval()
    x = torch.randn(3, 8)
    program = Program.trace(model, (x,))
    LowerWeights()(program)
    program.check()
    actual = program(x)
    expected = decoded(model, {"w"}, Scheme(), set()).double()(x.double())
    assert_rejects_corruption(actual, expected.detach(), float(12 * 2**-24 * 8 * 50))


def test_a_tied_weight_stays_apart() -> None:
    tied = nn.Linear(8, 8)
    model = Function(lambda m, x: m.a(x) + m.b(x) + m.c(x) + m.a(m.a(x)), a=tied, b=nn.Linear(8, 8), c=nn.Linear(8, 8))
    program = Program.trace(model.eval(), (torch.randn(2, 8),))
    LowerWeights()(program)
    report = MergeLinears()(program)
    program.check()
    assert [c.name for c in report.changes] == ["b.weight + c.weight"]
    assert all("other readers" in s.reason for s in report.skips)
    assert report.skips


def decoded(model: nn.Module, names: set[str], scheme: Scheme, transposed: set[str]) -> nn.Module:
    """The model with these weights replaced by what their codes mean, by the format alone: no pass, no operator."""
    from ggpass.formats import quantize

    for name, parameter in model.named_parameters():
        if name in names:
            matrix = parameter.detach().t() if name in transposed else parameter.detach().flatten(1)
            quantized = quantize(matrix, RF8, scheme)
            flat = RF8.decode(quantized.codes) * quantized.scale.unsqueeze(-1)
            parameter.data = (flat.t() if name in transposed else flat.view(parameter.shape)).to(parameter.dtype)
    return model


USES: dict[str, tuple[Callable, dict, set[str]]] = {
    "linear": (lambda m, x: m.l(x), {"l": lambda: nn.Linear(6, 10)}, set()),
    "linear, 3-D": (lambda m, x: m.l(x.view(2, 2, 6)), {"l": lambda: nn.Linear(6, 10, bias=False)}, set()),
    "matmul": (lambda m, x: x @ m.w, {"w": lambda: nn.Parameter(torch.randn(6, 10))}, {"w"}),
    "mm": (lambda m, x: torch.mm(x, m.w), {"w": lambda: nn.Parameter(torch.randn(6, 10))}, {"w"}),
    "addmm": (
        lambda m, x: torch.addmm(m.b, x, m.w),
        {"w": lambda: nn.Parameter(torch.randn(6, 10)), "b": lambda: nn.Parameter(torch.randn(10))},
        {"w"},
    ),
    "matmul, transposed": (lambda m, x: x @ m.w.t(), {"w": lambda: nn.Parameter(torch.randn(10, 6))}, set()),
    "matmul, .T": (lambda m, x: x @ m.w.T, {"w": lambda: nn.Parameter(torch.randn(10, 6))}, set()),
    "matmul, permuted": (lambda m, x: x @ m.w.permute(1, 0), {"w": lambda: nn.Parameter(torch.randn(10, 6))}, set()),
    "linear of a transpose": (
        lambda m, x: nn.functional.linear(x, m.w.transpose(-1, -2)),
        {"w": lambda: nn.Parameter(torch.randn(6, 10))},
        {"w"},
    ),
    "embedding": (lambda m, x: m.e((x[:, 0] * 0 + 3).long()), {"e": lambda: nn.Embedding(12, 10)}, set()),
    "conv1d": (lambda m, x: m.c(x[None]), {"c": lambda: nn.Conv1d(4, 8, 3, padding="same")}, set()),
    "conv2d, groups": (
        lambda m, x: m.c(x.view(1, 4, 2, 3)),
        {"c": lambda: nn.Conv2d(4, 8, (2, 3), padding=1, groups=2)},
        set(),
    ),
}


@pytest.mark.parametrize("operators", [REFERENCE, DISPATCHED], ids=["reference", "dispatched"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_lowering_equals_decoding_by_hand(use, granularity, operators) -> None:  # type: ignore[no-untyped-def]
    function, members, transposed = use
    model, x = Function(function, **{k: make() for k, make in members.items()}).eval(), torch.randn(4, 6)
    program = Program.trace(model, (x,))
    scheme = Scheme(granularity=granularity)
    report = LowerWeights(Lowering(scheme=scheme, operators=operators))(program)
    program.check()
    names = {n for n, p in model.named_parameters() if p.dim() >= 2}
    assert {c.name for c in report.changes} == names
    assert report.lowered_share == 1.0
    actual = program(x)  # before the model's own Parameters, which the program shares, become float64
    expected = decoded(model, names, scheme, transposed).double()(x.double())
    # At most 24 products of |x| < 5 with |w| < 5 to a result, in float32.
    assert_rejects_corruption(actual, expected.detach(), float(28 * 2**-24 * 24 * 25))


def test_tied_weights_are_stored_once() -> None:
    embedding, head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
    head.weight = embedding.weight
    model = Function(lambda m, x: m.h(m.e(x)), e=embedding, h=head).eval()
    ids = torch.randint(0, 40, (2, 3))
    program = Program.trace(model, (ids,))
    report = LowerWeights()(program)
    program.check()
    assert len(report.changes) == 1
    codes = [n for n in dict(program.graph_module.named_buffers()) if n.endswith("_codes")]
    assert len(codes) == 1
    assert not list(program.graph_module.parameters())


SKIPS: dict[str, tuple[Callable, dict, str]] = {
    "returned": (lambda m, x: (x @ m.w).sum() + m.w, {"w": nn.Parameter(torch.randn(6, 10))}, "has no lowering"),
    "one orientation, twice": (
        lambda m, x: (x @ m.w) @ m.w,
        {"w": nn.Parameter(torch.randn(6, 6))},
        "",
    ),
    "both orientations": (
        lambda m, x: x @ m.w + x @ m.w.t(),
        {"w": nn.Parameter(torch.randn(6, 6))},
        "both orientations",
    ),
    "left operand": (lambda m, x: m.w @ x, {"w": nn.Parameter(torch.randn(6, 4))}, "other than its weight"),
    "scaled addmm": (
        lambda m, x: torch.addmm(m.b, x, m.w, alpha=2),
        {"w": nn.Parameter(torch.randn(6, 10)), "b": nn.Parameter(torch.randn(10))},
        "addmm with alpha",
    ),
    "buffer": (lambda m, x: x @ m.w, {"w": torch.randn(6, 10)}, "a buffer"),
    "no gain": (lambda m, x: x[:, :1] @ m.w, {"w": nn.Parameter(torch.randn(1, 10))}, "no smaller"),
    "transposed conv": (
        lambda m, x: m.c(x[None]),
        {"c": nn.ConvTranspose1d(4, 4, 3)},
        "no lowering",
    ),
    "float64": (lambda m, x: x.double() @ m.w, {"w": nn.Parameter(torch.randn(6, 10).double())}, "is float64"),
}


@pytest.mark.parametrize("case", SKIPS.values(), ids=SKIPS.keys())
def test_what_stays_is_reported_with_its_reason(case: tuple) -> None:
    function, members, reason = case
    model, x = Function(function, **members).eval(), torch.randn(4, 6)
    program = Program.trace(model, (x,))
    report = LowerWeights()(program)
    program.check()
    if reason:
        assert not report.changes
        assert [reason in s.reason for s in report.skips if "1-D" not in s.reason] == [True]
        assert torch.equal(program(x), model(x))
    else:
        assert len(report.changes) == 1


def test_only_and_skip() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))).eval()

    def lowered(**options: tuple[str, ...]) -> set[str]:
        program = Program.trace(model, (torch.randn(2, 8),))
        report: Report = LowerWeights(Lowering(**options))(program)  # type: ignore[arg-type]
        return {c.name for c in report.changes}

    assert lowered() == {"0.weight", "1.0.weight", "1.1.weight"}
    assert lowered(only=("1",)) == {"1.0.weight", "1.1.weight"}
    assert lowered(only=("1.*",), skip=("1.1",)) == {"1.0.weight"}
    assert lowered(skip=("*.0.weight",)) == {"0.weight", "1.1.weight"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_weights_are_named(value: float) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    model[1].weight.data[3, 4] = value
    program = Program.trace(model, (torch.randn(2, 8),))
    with pytest.raises(WeightError, match=r"'1\.weight'.*channel 3.*skip=\['1\.weight'\]"):
        LowerWeights()(program)
    again = Program.trace(model, (torch.randn(2, 8),))
    assert LowerWeights(Lowering(skip=("1",)))(again).changes


def test_int8_and_real_scales_reach_the_program() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4, bias=False)).eval(), torch.randn(2, 8)
    program = Program.trace(model, (x,))
    LowerWeights(Lowering(format=INT8))(program)
    weight = model[0].weight.detach().double()
    scale = program.weight("0.weight_scale")
    assert torch.equal(scale, weight.abs().amax(1).float())
    codes = program.weight("0.weight_codes").view(torch.int8).double()
    assert_rejects_corruption(
        codes * scale.unsqueeze(-1).double() / 127, weight, (scale / 254 * 1.001).double()[:, None]
    )
