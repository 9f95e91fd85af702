"""export_onnx on real architectures, three ways at other sizes against the Artifact; what a user meets if it fails."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.closeness import assert_rejects_corruption, assert_within
from support.onnx_runs import WAYS, check, onnx, onnxruntime, session
from support.real_models import load_minilm
from torch import Tensor, nn

import ggpass
from ggpass import Artifact, InputError, TargetError
from ggpass.formats import FORMATS
from ggpass.onnx.names import operator_name
from ggpass.onnx.rounding import expected_and_bounds

ir = pytest.importorskip("onnx_ir", reason="needs onnx-ir; pip install 'ggpass[onnx]'")
pytest.importorskip("onnxscript", reason="needs onnxscript; pip install 'ggpass[onnx]'")
transformers = pytest.importorskip("transformers", reason="needs transformers; pip install 'ggpass[transformers]'")

AUTO = torch.export.Dim.AUTO
#: Each input of a language model has these sizes open.
TOKENS = {0: AUTO, 1: AUTO}


class Tied(nn.Module):
    """A head that is the embedding, a convolution, linears that merge, one without a bias, a nested result."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 32)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.up, self.gate, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32, bias=False)
        self.head = nn.Linear(32, 60)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, *, scores: bool = True) -> dict[str, Any]:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        x = x + self.down(torch.tanh(self.gate(x)) * self.up(x))
        return {"logits": self.head(x), "hidden": (x, None)}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 64), nn.GELU(), nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 16))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, groups=2, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 16),
    )


def bert() -> nn.Module:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return transformers.BertModel(transformers.BertConfig(vocab_size=100, **sizes))


def llama() -> nn.Module:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    config = transformers.LlamaConfig(vocab_size=100, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    return transformers.LlamaForCausalLM(config)


def tokens(batch: int, length: int, vocabulary: int = 100, mask: bool = True, types: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(0, vocabulary, (batch, length))
    made = {"input_ids": ids}
    if mask:
        made["attention_mask"] = torch.ones_like(ids)
        made["attention_mask"][0, length // 2 :] = 0
    # With token types as an input: without, transformers gathers them from a buffer, where onnx.reference has a bug.
    return made | ({"token_type_ids": torch.zeros_like(ids)} if types else {})


@dataclass
class Exported:
    """A written model: the file, the Artifact, and inputs of other sizes than those it was traced with."""

    path: Path
    artifact: Artifact
    feed: dict[str, Tensor]
    constants: dict[str, Any]


#: model, example inputs by batch and sequence, constant keywords, open sizes of one input.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], dict[str, Tensor]], dict[str, Any], Any]] = {
    "mlp": (mlp, lambda b, s: {"input": torch.randn(b, s, 24)}, {}, TOKENS),
    "cnn": (cnn, lambda b, s: {"input": torch.randn(b, 3, 16, 16)}, {}, {0: AUTO}),
    "tied": (Tied, lambda b, s: {"ids": torch.randint(0, 60, (b, s))}, {"scores": False}, TOKENS),
    "bert": (bert, tokens, {}, TOKENS),
    "llama": (llama, lambda b, s: tokens(b, s, types=False), {"use_cache": False}, TOKENS),
    "minilm": (load_minilm, lambda b, s: tokens(b, s, 30000), {}, TOKENS),
}


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    build, inputs, constants, shape = MODELS[request.param]
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    example = inputs(2, 9)
    shapes = {**dict.fromkeys(example, shape), **dict.fromkeys(constants)}
    artifact = ggpass.export_onnx(
        build().eval(), None, path, kwargs={**example, **constants}, dynamic_shapes=shapes, check=False
    )
    return Exported(path, artifact, inputs(3, 17), constants)


def outputs_and_bounds(exported: Exported) -> list[tuple[Tensor, Tensor]]:
    """Each output of the Artifact's graph, and how far roundings can move it (see `ggpass.onnx.rounding`)."""
    from ggpass.onnx.from_program import flatten

    graph, inputs = flatten(exported.artifact.program, [*exported.feed.values(), *exported.constants.values()])
    nodes = [node.name for node in graph.graph.output_node().args[0]]  # type: ignore[union-attr]
    found = expected_and_bounds(graph, list(inputs.values()), nodes)
    return [(found[name][0].double(), found[name][1]) for name in nodes]


@pytest.mark.parametrize("way", WAYS)
def test_real_architectures_three_ways(exported: Exported, way: str) -> None:
    check(exported.path)
    results = WAYS[way](exported.path, exported.feed)
    wanted = outputs_and_bounds(exported)
    assert len(results) == len(wanted)
    for got, (want, bound) in zip(results, wanted):
        assert_within(got, want, bound, way)
        assert_rejects_corruption(got, want, bound)


def test_the_file_holds_codes_once_and_nothing_of_this_machine(exported: Exported) -> None:
    raw = exported.path.read_bytes()
    assert b"site-packages" not in raw
    assert b'File "' not in raw
    model = onnx.load(exported.path)
    codes = [i for i in model.graph.initializer if i.data_type == onnx.TensorProto.UINT8]
    assert len({i.raw_data for i in codes}) == len(codes)
    coded = sum(len(i.raw_data) for i in codes)
    assert exported.artifact.report.lowered_share == 1.0
    # Beside codes and scales there are biases, norms, shapes, nodes and the bodies: small change, by the tensor.
    assert len(raw) <= exported.artifact.sizes.after + 2048 * (len(model.graph.node) + 8)
    assert coded >= 0.9 * exported.artifact.report.bytes_after - 5 * len(model.graph.initializer)
    assert not [i for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT and len(i.dims) > 1]
    assert all(len(n.input) >= 3 and all(n.input) for n in model.graph.node if n.domain == "ai.ggpass")


def test_outputs_have_the_names_of_their_keys(exported: Exported) -> None:
    names = [output.name for output in onnx.load(exported.path).graph.output]
    known = {"tied": ["logits", "hidden_0"], "llama": ["logits"], "bert": ["last_hidden_state", "pooler_output"]}
    kind = exported.path.parent.name[:-1]
    assert names == known.get(kind, known["bert"] if kind == "minilm" else ["output"])


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_format_is_checked_on_export(format_name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    artifact = ggpass.export_onnx(
        mlp().eval().to(dtype), torch.randn(5, 24, dtype=dtype), path, target=f"{format_name}-onnx", fallback="lowmem"
    )
    note = artifact.report.parts[-1].notes[-1]
    assert note.startswith("checked in ONNX Runtime")
    expected = operator_name(format_name, "MatMul")
    assert {n.op_type for n in onnx.load(path).graph.node if n.domain} == {expected}


def test_a_file_that_computes_something_else_is_an_error_that_names_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ggpass.onnx import save

    def spoil(model: Any, fallback: Any) -> None:
        second = [n for n in model.graph if n.op_type == "RF8MatMul"][1]
        scale = second.inputs[2]
        scale.const_value = ir.tensor(scale.const_value.numpy() * 1.01, name=scale.name)
        attach(model, fallback)

    attach = save.attach_functions
    monkeypatch.setattr(save, "attach_functions", spoil)
    with pytest.raises(TargetError, match=r"first node that is off is 'node_linear_1' \(RF8MatMul\)"):
        ggpass.export_onnx(mlp().eval(), torch.randn(5, 24), tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]


def test_tensors_of_a_large_model_lie_beside_it_at_page_boundaries(tmp_path: Path) -> None:
    path, x = tmp_path / "m.onnx", torch.randn(3, 256)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()
    artifact = ggpass.export_onnx(model, x, path, external_data=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert path.stat().st_size < 20_000
    assert path.stat().st_mode == path.with_name("m.onnx.data").stat().st_mode
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        entries = {e.key: e.value for e in tensor.external_data}
        if tensor.data_type == onnx.TensorProto.UINT8:
            assert int(entries["offset"]) % 4096 == 0
    check(path)
    (y,) = WAYS["stock"](path, {"input": x})
    torch.testing.assert_close(y, artifact(x), rtol=0, atol=1e-5)


def test_without_a_fallback_the_file_needs_the_library(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    ggpass.export_onnx(mlp().eval(), torch.randn(5, 24), path, fallback=None)
    assert not onnx.load(path).functions
    with pytest.raises(Exception, match="RF8MatMul"):
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_a_later_version_of_an_operator_is_refused_in_words_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "later.onnx"
    ggpass.export_onnx(Tied().eval(), (torch.randint(0, 60, (1, 5)),), path)
    model = onnx.load(path)
    ours = [node for node in model.graph.node if node.domain == "ai.ggpass"]
    versions = [a for node in ours for a in node.attribute if a.name == "op_version"]
    assert len(versions) == len(ours) > 3
    assert {a.i for a in versions} == {1}
    versions[-1].i = 2
    onnx.save(model, path)
    with pytest.raises(Exception, match="asks for version 2 of the operator and this library runs version 1; upgrade"):
        session(path)


def test_weights_that_stay_float_stay_float_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    artifact = ggpass.export_onnx(mlp().eval(), torch.randn(5, 24), path, skip="0")
    assert [s.reason for r in artifact.report.flat() for s in r.skips if s.matrix] == ["matches skip='0'"]
    assert [n.op_type for n in onnx.load(path).graph.node].count("RF8MatMul") == 2


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = mlp().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ggpass.export_onnx(model, torch.randn(5, 24), tmp_path / "m.onnx")
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_bfloat16_is_refused_with_what_to_do(tmp_path: Path) -> None:
    x = torch.randn(5, 24, dtype=torch.bfloat16)
    with pytest.raises(TargetError, match=r"bfloat16.*model\.float\(\)"):
        ggpass.export_onnx(mlp().eval().bfloat16(), x, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"path": "missing/m.onnx"}, InputError, "directory that exists"),
        ({"path": "m.bin"}, InputError, ".onnx file"),
        ({"args": None}, InputError, "example inputs"),
        ({"target": "rf8-cpu"}, TargetError, "ends in -onnx"),
        ({"target": "rf9-onnx"}, TargetError, "rf8"),
        ({"fallback": "slow"}, InputError, "fallback is"),
    ],
)
def test_bad_calls_are_answered_before_anything_is_written(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call = {"args": (torch.randn(5, 24),), "path": "m.onnx", **change}
    args, path = call.pop("args"), call.pop("path")
    with pytest.raises(error) as refused:
        ggpass.export_onnx(mlp().eval(), args, path, **call)
    assert message in str(refused.value)
    assert not list(tmp_path.iterdir())
