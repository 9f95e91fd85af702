"""ggpass.compile: both ways in, the caller's model untouched, and answers to bad input that name the next action."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ggpass
from ggpass import FormatError, InputError, Scheme, TargetError, TraceError, WeightError
from ggpass.formats import FORMATS, RF8, quantize
from ggpass.lowering.modules import Lowered, LoweredWeight


class Tiny(nn.Module):
    """A model with every kind of module that has a lowering, a tied head, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.norm = nn.LayerNorm(16)
        self.up, self.gate, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16, bias=False)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2))
        return self.head(x + self.down(torch.relu(self.gate(x)) * self.up(x)))


def tiny(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    return Tiny().eval().to(dtype), torch.randint(0, 50, (2, 7))


def snapshot(model: nn.Module) -> dict[str, tuple[int, torch.Tensor]]:
    return {k: (id(v), v.clone()) for k, v in dict(model.named_parameters(remove_duplicate=False)).items()}


UNKNOWN = Scheme(rounding="up")
TARGETS = [f"{fmt}-{device}" for fmt in FORMATS for device in ("reference", "cpu")]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_ways_in_agree_and_leave_the_model_alone(target: str, dtype: torch.dtype) -> None:
    model, ids = tiny(dtype)
    before = snapshot(model)
    with torch.no_grad():
        module = ggpass.compile(model, target=target)
        artifact = ggpass.compile(model, (ids,), target=target)
        expected = model(ids)
        got, traced = module(ids), artifact(ids)
    assert type(module) is type(model)
    assert got.dtype is traced.dtype is dtype
    # The same codes both ways; 8 bits of relative error against the float model (28 dB on a Gaussian, see SPEC).
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert 0.001 < error < 0.12
    # bf16 rounds 2^-9 at each of some ten steps, in another order.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), traced.double(), rtol=0, atol=float(40 * eps * expected.abs().max()))
    after = snapshot(model)
    assert all(after[k][0] == v[0] and torch.equal(after[k][1], v[1]) for k, v in before.items())
    assert type(model.up) is nn.Linear


def test_example_inputs_in_every_form() -> None:
    model, ids = tiny()
    expected = ggpass.compile(model, (ids,), target="rf8-reference")(ids)
    assert torch.equal(ggpass.compile(model, ids, target="rf8-reference")(ids), expected)
    assert torch.equal(ggpass.compile(model, kwargs={"ids": ids}, target="rf8-reference")(ids=ids), expected)


def test_dynamic_batch_and_sequence() -> None:
    model, ids = tiny()
    auto = torch.export.Dim.AUTO
    artifact = ggpass.compile(model, (ids,), target="rf8-cpu", dynamic_shapes={"ids": {0: auto, 1: auto}})
    module = ggpass.compile(model, target="rf8-cpu")
    for shape in ((1, 3), (2, 7), (5, 11)):
        other = torch.randint(0, 50, shape)
        with torch.no_grad():
            torch.testing.assert_close(artifact(other), module(other), rtol=0, atol=1e-5)


def test_the_report_covers_every_weight() -> None:
    model, ids = tiny()
    for compiled in (ggpass.compile(model, target="rf8-cpu"), ggpass.compile(model, (ids,), target="rf8-cpu")):
        report = ggpass.report(compiled)
        names = {n for r in report.flat() for c in r.changes for n in c.name.replace("=", "+").split(" + ")}
        names |= {s.name for r in report.flat() for s in r.skips}
        text = str(report)
        for name in ("conv.weight", "up.weight", "gate.weight", "down.weight", "norm.weight", "norm.bias", "up.bias"):
            assert name in names
        assert "embed.weight" in text
        assert "head.weight" in text
        assert "100.00% of the bytes of matrices lowered" in text
        assert report.lowered_share == 1.0


def test_sizes_count_tied_weights_once() -> None:
    model, ids = tiny()
    matrices = 50 * 16 + 16 * 16 * 3 + 3 * 16 * 32
    vectors = 16 + 16 * 2 + 32 * 2
    channels = 50 + 16 + 32 + 32 + 16
    names = 5 * len("rf8")  # a module's state_dict says which format its codes are
    for args, extra in (((), names), ((ids,), 0)):
        sizes = ggpass.sizes(ggpass.compile(model, *([args] if args else []), target="rf8-cpu"))
        assert sizes.before == 4 * (matrices + vectors)
        assert sizes.after == matrices + 4 * (channels + vectors + 256) + extra


def test_a_lowered_module_is_still_a_module() -> None:
    model, ids = tiny()
    calls: list[str] = []
    model.up.register_forward_hook(lambda *_: calls.append("hook"))
    model.up.note = "kept"
    lowered = ggpass.compile(model, target="rf8-cpu")
    expected = lowered(ids)
    assert calls == ["hook"]
    assert isinstance(lowered.up, nn.Linear)
    assert lowered.up.note == "kept"
    assert lowered.up.in_features == 16
    assert lowered.head.lowered is lowered.embed.lowered
    twin = copy.deepcopy(lowered)
    assert torch.equal(twin(ids), expected)
    assert twin.head.lowered is twin.embed.lowered
    with pytest.raises(WeightError, match=r"up\.weight, which is quantized"):
        lowered.up.weight = nn.Parameter(torch.zeros(32, 16))


@pytest.mark.parametrize("name", ["up", "conv", "embed"])
def test_weight_decodes_on_access(name: str) -> None:
    model, _ = tiny()
    weight = model.get_submodule(name).weight.detach()
    lowered = ggpass.compile(model, target="rf8-cpu").get_submodule(name)
    quantized = quantize(weight.flatten(1), RF8)
    expected = (RF8.decode(quantized.codes) * quantized.scale.unsqueeze(-1)).view(weight.shape)
    assert torch.equal(lowered.weight, expected)
    assert not lowered.weight.requires_grad


def test_state_dict_round_trip_and_canonical_codes() -> None:
    model, ids = tiny()
    lowered = ggpass.compile(model, target="rf8-cpu")
    other = ggpass.compile(Tiny().eval(), target="rf8-cpu")
    assert not torch.equal(other(ids), lowered(ids))
    other.load_state_dict(lowered.state_dict())
    assert torch.equal(other(ids), lowered(ids))
    state = {k: v.clone() for k, v in lowered.state_dict().items()}
    state["up.lowered.codes"][0, :3] = torch.tensor([0x80, 0x07, 0x10], dtype=torch.uint8)  # zeros and an alias
    other.load_state_dict(state)
    assert other.up.lowered.codes[0, :3].tolist() == [0, 0, 0x0F]
    e4m3 = ggpass.compile(model, target="e4m3-cpu")
    state = {k: v.clone() for k, v in e4m3.state_dict().items()}
    state["up.lowered.codes"][0, 0] = 0x7F
    with pytest.raises(FormatError, match="means no number"):
        e4m3.load_state_dict(state)


def test_casting_changes_what_the_codes_stand_for_and_not_the_scales() -> None:
    model, ids = tiny()
    lowered = ggpass.compile(model, target="e4m3-cpu")
    scale = lowered.up.lowered.scale.clone()
    lowered.to(torch.bfloat16)
    assert lowered.up.weight.dtype is torch.bfloat16
    assert lowered(ids).dtype is torch.bfloat16
    assert lowered.up.lowered.scale.dtype is torch.float32
    assert torch.equal(lowered.up.lowered.scale, scale)
    assert lowered.head.lowered is lowered.embed.lowered


def test_gradients_flow_through_lowered_modules_to_what_is_float() -> None:
    model, ids = tiny()
    lowered = ggpass.compile(model, target="rf8-cpu")
    lowered(ids).square().mean().backward()
    assert lowered.norm.weight.grad is not None
    assert lowered.norm.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("traced", [False, True], ids=["module", "traced"])
def test_inplace_frees_the_float_weights(traced: bool) -> None:
    model, ids = tiny()
    expected = ggpass.compile(model, target="rf8-cpu")(ids)
    weights = [p for p in model.parameters() if p.dim() >= 2]
    args: tuple[Any, ...] = ((ids,),) if traced else ()
    result = ggpass.compile(model, *args, target="rf8-cpu", inplace=True)
    torch.testing.assert_close(result(ids), expected, rtol=0, atol=1e-5)
    assert all(w.numel() == 0 for w in weights)
    assert traced or result is model


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("make", [lambda: nn.MultiheadAttention(16, 2, batch_first=True), encoder])
def test_parents_that_read_a_childs_weight(make: Callable[[], nn.Module]) -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = make(), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x, x, x)[0] if isinstance(self.inner, nn.MultiheadAttention) else self.inner(x)
            return self.out(y)

    model, x = Holds().eval(), torch.randn(2, 5, 16)
    lowered = ggpass.compile(model, target="rf8-cpu")
    assert ggpass.report(lowered).lowered_share == 1.0
    with torch.no_grad():
        artifact = ggpass.compile(model, (x,), target="rf8-cpu")
        assert artifact.report.lowered_share == 1.0
        # The same codes both ways, in layers that round differently.
        torch.testing.assert_close(lowered(x), artifact(x), rtol=0, atol=1e-5)
        assert (lowered(x) - model(x)).norm() / model(x).norm() < 0.2


def test_one_module_in_two_places_and_a_bare_module() -> None:
    shared = nn.Linear(8, 8)
    model, x = nn.Sequential(shared, nn.ReLU(), shared), torch.randn(2, 8)
    lowered = ggpass.compile(model, target="rf8-cpu")
    assert lowered[0] is lowered[2]
    assert isinstance(lowered[0], Lowered)
    assert torch.equal(lowered(x), ggpass.compile(model, (x,), target="rf8-cpu")(x))
    bare = ggpass.compile(shared, target="rf8-cpu")
    assert isinstance(bare, Lowered)
    assert ggpass.report(bare).changes[0].name == "weight"


@pytest.mark.parametrize("scheme", [Scheme(), Scheme("tensor"), Scheme(scale="real"), Scheme(rounding="paper")])
def test_schemes_reach_the_codes(scheme: Scheme) -> None:
    linear = nn.Linear(16, 8)
    lowered = ggpass.compile(linear, target="rf8-cpu", scheme=scheme).lowered
    assert isinstance(lowered, LoweredWeight)
    expected = quantize(linear.weight.detach(), RF8, scheme)
    assert torch.equal(lowered.codes, expected.codes)
    assert torch.equal(lowered.scale, expected.scale)


def bad(text: str, error: type[Exception], call: Callable[[nn.Module, torch.Tensor], Any]) -> Any:
    return pytest.param(text, error, call, id=text)


@pytest.mark.parametrize(
    ("text", "error", "call"),
    [
        bad(r"no format 'rf9'.*rf8.*devices.*cpu", TargetError, lambda m, x: ggpass.compile(m, target="rf9-cpu")),
        bad(r"no device 'tpu'.*rf8.*cpu.*reference", TargetError, lambda m, x: ggpass.compile(m, target="rf8-tpu")),
        bad("FORMAT-DEVICE, as in 'rf8-cpu'", TargetError, lambda m, x: ggpass.compile(m, target="rf8")),
        bad("takes a torch.nn.Module", InputError, lambda m, x: ggpass.compile(x, target="rf8-cpu")),
        bad("need a graph", InputError, lambda m, x: ggpass.compile(m, target="rf8-cpu", dynamic_shapes={})),
        bad("matches no weight", WeightError, lambda m, x: ggpass.compile(m, target="rf8-cpu", skip="lm_head")),
        bad("no rounding 'up'", FormatError, lambda m, x: ggpass.compile(m, target="rf8-cpu", scheme=UNKNOWN)),
        bad("granularity is", FormatError, lambda m, x: Scheme("row")),  # type: ignore[arg-type]
        bad("scale is", FormatError, lambda m, x: Scheme(scale="big")),  # type: ignore[arg-type]
        bad("carries no report", InputError, lambda m, x: ggpass.report(m)),
        bad("carries no sizes", InputError, lambda m, x: ggpass.sizes(m)),
        bad("leave out args", TraceError, lambda m, x: ggpass.compile(m, (x.float(),), target="rf8-cpu")),
    ],
)
def test_bad_input_names_the_thing_and_the_next_action(text: str, error: type[Exception], call: Callable) -> None:
    model, ids = tiny()
    before = snapshot(model)
    with pytest.raises(error, match=f"(?s){text}"):
        call(model, ids)
    assert all(torch.equal(snapshot(model)[k][1], v[1]) for k, v in before.items())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_bad_weight_is_named_and_nothing_is_lost(inplace: bool) -> None:
    model, ids = tiny()
    model.down.weight.data[2, 3] = float("nan")
    with pytest.raises(WeightError, match=r"'down\.weight'.*skip=\['down\.weight'\]"):
        ggpass.compile(model, target="rf8-cpu", inplace=inplace)
    assert type(model.up) is nn.Linear
    assert model(ids).shape == (2, 7, 50)
    integer = nn.Linear(8, 8)
    integer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int32), requires_grad=False)
    with pytest.raises(WeightError, match=r"'weight' is int32.*\.float\(\).*skip="):
        ggpass.compile(integer, target="rf8-cpu")
    with pytest.raises(WeightError, match=r"meta device.*load the model"):
        ggpass.compile(nn.Linear(8, 8, device="meta"), target="rf8-cpu")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda a, x: a(x.float()), r"'ids' is float32 \(2, 7\), and was traced as int64 \(2, 7\)"),
        (lambda a, x: a(x[0]), r"\(7\), and was traced as int64 \(2, 7\)"),
        (lambda a, x: a(x[:, :3]), r"\(2, 3\).*dynamic_shapes="),
        (lambda a, x: a(x, x), "1 positional inputs .*called with 2"),
        (lambda a, x: a(ids=x), r"call it as it was traced"),
        (lambda a, x: a(3), r"'ids' is 3"),
    ],
)
def test_wrong_inputs_to_an_artifact_are_named(call: Callable, text: str) -> None:
    model, ids = tiny()
    artifact = ggpass.compile(model, (ids,), target="rf8-cpu")
    with pytest.raises(InputError, match=f"(?s){text}"):
        call(artifact, ids)
    assert artifact(ids).shape == (2, 7, 50)


class Counts(nn.Module):
    """A model that writes to a buffer of its own at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.linear(x) + self.calls


def test_a_model_that_writes_to_its_buffers_is_left_alone() -> None:
    model, x = Counts().eval(), torch.randn(2, 8)
    artifact = ggpass.compile(model, (x,), target="rf8-cpu")
    first, second = artifact(x), artifact(x)
    assert model.calls.item() == 0
    torch.testing.assert_close(second - first, torch.ones(2, 8), rtol=0, atol=1e-5)


@pytest.mark.parametrize("traced", [False, True], ids=["module", "traced"])
def test_the_result_and_the_model_do_not_share_what_stayed_float(traced: bool) -> None:
    model, ids = tiny()
    compiled = ggpass.compile(model, *([(ids,)] if traced else []), target="rf8-cpu")
    expected = compiled(ids).detach().clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(7.0)
    assert torch.equal(compiled(ids).detach(), expected)


def test_every_reference_to_a_module_sees_it_lowered() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.order = [self.a, self.b]  # plain references, which are no submodules

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.order:
                x = layer(x)
            return x

    model, x = Lists(), torch.randn(2, 8)
    lowered = ggpass.compile(model, target="rf8-cpu")
    assert lowered.order[0] is lowered.a
    assert not torch.equal(lowered(x), model(x))
    assert ggpass.compile(model, target="rf8-cpu", inplace=True) is model
    assert torch.equal(model(x), lowered(x))
    single = nn.Linear(8, 8)
    assert ggpass.compile(single, target="rf8-cpu", inplace=True) is single


def test_lowered_models_pickle(tmp_path: Any) -> None:
    import pickle

    model, ids = tiny()
    lowered = ggpass.compile(model, target="int8-cpu")
    twin = pickle.loads(pickle.dumps(lowered))
    assert torch.equal(twin(ids), lowered(ids))
    assert type(twin.up) is type(lowered.up)


def test_codes_of_one_format_are_not_loaded_as_another() -> None:
    model, _ = tiny()
    state = ggpass.compile(model, target="int8-cpu").state_dict()
    lowered = ggpass.compile(model, target="rf8-cpu")
    with pytest.raises(FormatError, match=r"codes are int8, and this model was compiled for rf8"):
        lowered.load_state_dict(state)
    state = lowered.state_dict()
    with pytest.raises(FormatError, match="uint8"):
        lowered.load_state_dict(state | {"up.lowered.codes": state["up.lowered.codes"].int()})
    with pytest.raises(FormatError, match="NaN or infinity"):
        lowered.load_state_dict(state | {"up.lowered.scale": state["up.lowered.scale"] * float("nan")})


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, gain: float = 1.0) -> torch.Tensor:
        y = self.linear(x) * gain
        return y if mask is None else y * mask


def test_what_was_traced_as_a_constant_must_stay_it() -> None:
    model, x = Masked().eval(), torch.randn(2, 8)
    artifact = ggpass.compile(model, (x,), {"mask": None, "gain": 2.0}, target="rf8-cpu")
    assert torch.equal(artifact(x, gain=2.0, mask=None), artifact(x, mask=None, gain=2.0))
    with pytest.raises(InputError, match=r"'mask' is float32.*None was traced"):
        artifact(x, mask=torch.zeros(2, 8), gain=2.0)
    with pytest.raises(InputError, match=r"'gain' is 3.0.*compile again"):
        artifact(x, mask=None, gain=3.0)


def test_subgraphs_are_carried_along() -> None:
    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", enabled=False):
                y = self.a(x)
            return self.b(y)

    model, x = Autocast().eval(), torch.randn(2, 8)
    artifact = ggpass.compile(model, (x,), target="rf8-cpu")
    assert "b.weight" in str(artifact.report)
    assert (artifact(x) - model(x)).norm() / model(x).norm() < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    model, ids = tiny()
    lowered = ggpass.compile(model, target="rf8-cpu")
    many = torch.randint(0, 50, (64, 8))
    expected = [lowered(i).detach() for i in (ids, many)]
    torch.set_default_dtype(dtype)
    try:
        assert all(torch.equal(lowered(i).detach(), e) for i, e in zip((ids, many), expected))
    finally:
        torch.set_default_dtype(torch.float32)


def test_patterns_select_tied_and_unused_weights_both_ways() -> None:
    model, ids = tiny()
    model.unused = nn.Linear(16, 16)
    for args in ((), ((ids,),)):
        compiled = ggpass.compile(model, *args, target="rf8-cpu", skip=["embed", "unused"])
        kept = {s.name: s.reason for r in ggpass.report(compiled).flat() for s in r.skips if s.matrix}
        assert any("skip='embed'" in reason for reason in kept.values())
    with pytest.raises(WeightError, match=r"skip='2' matches no weight.*embed\.weight"):
        ggpass.compile(model, (ids,), target="rf8-cpu", skip="2")


def test_inplace_gives_up_nothing_where_one_weight_has_no_codes() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(80, 8))
    model[1].weight.data[0, 0] = 3.3e38  # no power-of-two scale covers it
    with pytest.raises(WeightError, match=r"'1\.weight'.*scale='real'"):
        ggpass.compile(model, target="rf8-cpu", inplace=True)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.numel() == 64


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("lowered already", {}),
        ("is a string FORMAT-DEVICE", {"target": None}),
        (r"scheme is a ggpass\.Scheme", {"scheme": "tensor"}),
        ("give keyword inputs as kwargs=", {"args": {"ids": torch.zeros(1)}}),
    ],
)
def test_misuse_is_answered_with_the_next_action(text: str, options: dict[str, Any]) -> None:
    lowered = ggpass.compile(tiny()[0], target="rf8-cpu")
    with pytest.raises(ggpass.GgpassError, match=text):
        ggpass.compile(lowered, **{"target": "int8-cpu", **options})


def test_conv1d_of_hugging_face_decodes_in_its_own_orientation() -> None:
    utils = pytest.importorskip("transformers.pytorch_utils", reason="needs transformers for its Conv1D")
    conv = utils.Conv1D(12, 8)
    nn.init.normal_(conv.weight)
    lowered = ggpass.compile(conv, target="rf8-cpu")
    quantized = quantize(conv.weight.detach().t(), RF8)
    expected = (RF8.decode(quantized.codes) * quantized.scale.unsqueeze(-1)).t()
    assert torch.equal(lowered.weight, expected)


@pytest.mark.parametrize("model", [nn.Linear(16, 8), nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU())])
def test_an_artifact_says_how_to_move_it_and_copies(model: nn.Module, tmp_path: Any) -> None:
    import pickle

    x = torch.randn(2, 4, 16)
    artifact = ggpass.compile(model, x, target="rf8-cpu")
    for twin in (copy.copy(artifact), copy.deepcopy(artifact)):
        assert torch.equal(twin(x), artifact(x))
    assert copy.deepcopy(artifact).program is not artifact.program
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(InputError, match=r"artifact\.save\(path\).*ggpass\.load"):
            pickle.dumps([artifact], protocol)
    artifact.save(tmp_path / "model.safetensors")
    other = ggpass.compile(copy.deepcopy(model).requires_grad_(False), x, target="rf8-cpu")
    assert torch.equal(ggpass.load(tmp_path / "model.safetensors", into=other)(x), artifact(x))


@pytest.mark.parametrize("name", ["file.Grid", "onnxruntime.session", "formats.RF8", "ggd.fit", "training.Schedule"])
def test_rooms_are_found_after_a_plain_import(name: str) -> None:
    import subprocess
    import sys

    heavy = "[m for m in ('onnx', 'onnxruntime', 'onnx_ir', 'tvm', 'transformers', 'matplotlib') if m in sys.modules]"
    code = f"import sys, ggpass; print({heavy}); ggpass.{name}; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
    with pytest.raises(AttributeError, match="no attribute 'rooms'"):
        _ = ggpass.rooms
