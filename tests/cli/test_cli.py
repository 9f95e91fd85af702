"""The command line: what it prints at 80 and 120 columns, as JSON, and how it says that something is wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ggpass
from ggpass import targets
from ggpass.cli import bench, console, main, models
from ggpass.errors import GgpassError
from ggpass.formats import FORMATS
from ggpass.graph.tables import count, size, wrap_name


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in this process, as it is outside of a terminal of 120 columns."""

    def run_main(*arguments: object, columns: int | None = 120) -> Ran:
        if columns:
            monkeypatch.setenv("COLUMNS", str(columns))
        else:
            monkeypatch.delenv("COLUMNS", raising=False)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(int(exit_info.value.code or 0), captured.out, captured.err)

    return run_main


def assert_one_line_error(ran: Ran, *parts: str, code: int = 1) -> None:
    """Exit code 1, nothing on stdout, one line on stderr that holds every part, no traceback."""
    assert ran.code == code
    assert ran.out == ""
    lines = ran.err.strip().splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    names = {
        "encoder.layer.0.attention.self.query.weight": torch.randn(48, 32),
        "encoder.layer.0.attention.self.query.bias": torch.randn(48),
        "encoder.layer.11.output.a_name_without_any_dots_that_is_long.weight": torch.randn(32, 64),
        "position_ids": torch.arange(4)[None],
        "zeros.weight": torch.zeros(8, 8),
    }
    save_file(names, path)
    return path


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a BERT of 27 k weights."""
    transformers = pytest.importorskip("transformers", reason="needs transformers; pip install 'ggpass[transformers]'")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def copy_of(folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A model directory with its tensors changed."""
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


# General.


def test_version_and_help(run: Run) -> None:
    version = run("--version")
    assert (version.code, version.out.strip()) == (0, f"ggpass {ggpass.__version__}")
    for command in ("inspect", "compile", "bench", "targets"):
        assert command in run("--help").out
        helped = run(command, "-h", columns=80)
        assert helped.code == 0
        assert max(map(len, helped.out.splitlines())) <= 80


def test_inspect_help_says_what_a_bare_file_cannot_tell(run: Run) -> None:
    helped = " ".join(run("inspect", "--help").out.split())
    assert "Rows (dimension 0) are taken as the output channels" in helped
    assert "Conv1D" in helped
    assert ".bin and .pt files are refused" in helped


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["inspect"],
        ["inspect", "x", "--no-such-option"],
        ["compile", "x", "--granularity", "row"],
        ["bench", "x", "--rounds", "0"],
        ["bench", "x", "--shape", "8by64"],
        ["bench", "x", "--shape", "0x64"],
    ],
)
def test_wrong_usage_exits_with_2(run: Run, arguments: list[str]) -> None:
    ran = run(*arguments)
    assert ran.code == 2
    assert "Traceback" not in ran.err
    assert "Usage: ggpass" in ran.err


def test_the_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "ggpass.cli", "inspect", "no-such-file"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: no-such-file does not exist; give a .safetensors file")


def test_an_error_of_the_system_is_one_line_too(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "/x")

    monkeypatch.setattr("ggpass.cli.inspect.inspect_checkpoint", refuse)
    assert_one_line_error(run("inspect", checkpoint), "Permission denied", "/x")


def test_brackets_in_an_error_are_printed_as_they_are(run: Run) -> None:
    assert_one_line_error(run("inspect", "weights[bold].safetensors"), "weights[bold].safetensors does not exist")


def test_a_pipe_is_wide_unless_columns_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console.stdout().width == console.FILE_WIDTH
    monkeypatch.setenv("COLUMNS", "90")
    assert console.stdout().width == 90


@pytest.mark.parametrize(
    ("name", "width", "lines"),
    [
        ("a.b", 16, ["a.b"]),
        ("encoder.layer.0.query", 16, ["encoder.layer.0.", "query"]),
        ("one_part_that_is_far_too_long", 8, ["one_part_that_is_far_too_long"]),
        ("long_first_part.x", 8, ["long_first_part.", "x"]),
    ],
)
def test_names_are_wrapped_after_dots(name: str, width: int, lines: list[str]) -> None:
    assert wrap_name(name, width).split("\n") == lines


def test_counts_and_sizes_for_people() -> None:
    assert [console.many(n, "thread") for n in (0, 1, 2)] == ["0 threads", "1 thread", "2 threads"]
    assert [count(n) for n in (0, 384, 22_682_112, 1_240_000_000)] == ["0", "384", "22.68 M", "1.24 G"]
    assert [size(n) for n in (0, 999, 1000, 90_855_520, 2 * 10**9)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "90.86 MB",
        "2.00 GB",
    ]


# inspect


#: Columns that hold the table of the formats there are: 80 for three.
NARROW = 47 + 11 * len(FORMATS)


@pytest.mark.parametrize("columns", [NARROW, 120, None])
def test_inspect_prints_every_weight_within_the_terminal(run: Run, checkpoint: Path, columns: int | None) -> None:
    ran = run("inspect", checkpoint, columns=columns)
    assert ran.code == 0
    assert ran.err == ""
    assert max(map(len, ran.out.splitlines())) <= (columns or console.FILE_WIDTH)
    squeezed = "".join(line.split()[0] for line in ran.out.splitlines() if line.strip())
    assert "…" not in ran.out
    # The name is the first column, wrapped after dots where it must be.
    for name in ("encoder.layer.0.attention.self.query", "encoder.layer.11.output.a_name_without_any_dots"):
        assert name in squeezed
    for figure in ("48×32", "32×64", "28.", "RF8", "E4M3", "INT8", "zero", "exact 0.00", "all 3 matrices"):
        assert figure in ran.out
    assert "1 vector (biases, norms; 192 B) left as they are" in ran.out
    assert "skipped position_ids: integer (I64): an index, a mask or codes, not a weight" in " ".join(ran.out.split())


def test_inspect_names_the_dtype_where_they_differ(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.randn(8, 8), "b": torch.randn(8, 8).bfloat16()}, path)
    mixed = run("inspect", path, columns=80).out
    assert "BF16" in mixed
    assert "F32" in mixed
    assert "all F32" not in mixed
    save_file({"a": torch.randn(8, 8)}, path)
    assert "all F32" in run("inspect", path).out


def test_inspect_of_vectors_only_says_so(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.randn(8)}, path)
    assert "no matrices" in run("inspect", path).out


def test_inspect_json_is_all_of_stdout(run: Run, checkpoint: Path) -> None:
    ran = run("inspect", checkpoint, "--json")
    data = json.loads(ran.out)
    assert [w["name"].split(".")[-2] for w in data["weights"]] == [
        "query",
        "a_name_without_any_dots_that_is_long",
        "zeros",
    ]
    assert 27 < data["weights"][0]["formats"]["rf8"]["sqnr_db"] < 30
    assert data["totals"]["weights"] == 48 * 32 + 32 * 64 + 64


def test_inspect_plot_writes_a_png(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib; pip install 'ggpass[plot]'")
    out = tmp_path / "out.png"
    ran = run("inspect", checkpoint, "--plot", out, "--largest", "1", "--linear")
    assert ran.code == 0
    assert f"histograms of 1 weight: {out}" in ran.out.replace("\n", "")
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert json.loads(run("inspect", checkpoint, "--plot", out, "--json").out)


def test_a_plot_of_codes_is_refused(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.safetensors"
    assert run("pack", checkpoint, packed).code == 0
    assert "efficiency" in run("inspect", packed).out
    ran = run("inspect", packed, "--plot", tmp_path / "out.png")
    assert_one_line_error(ran, "--plot draws float weights", "leave --plot out")
    assert not (tmp_path / "out.png").exists()


def test_inspect_errors_are_one_line(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    assert_one_line_error(run("inspect", tmp_path / "none.safetensors"), "none.safetensors does not exist; give")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert_one_line_error(run("inspect", tmp_path / "pytorch_model.bin"), "is a pickle", "save the model again")
    for bad in (tmp_path / "out.jpg", tmp_path / "none" / "out.png"):
        assert_one_line_error(run("inspect", checkpoint, "--plot", bad), "--plot takes a .png in a directory", str(bad))


# targets


@dataclass(frozen=True)
class Missing:
    name: str = "moon"

    def unavailable(self) -> str | None:
        return "no rocket [yet]"


def test_targets_are_listed_with_the_reasons(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(targets.TARGETS, "moon", Missing())
    ran = run("targets")
    assert ran.code == 0
    lines = {line.split()[0]: line for line in ran.out.splitlines()}
    assert "rf8-reference, e4m3-reference, int8-reference" in lines["reference"]
    assert lines["reference"].rstrip().endswith("yes")
    assert "no: no rocket [yet]" in lines["moon"]


# compile


def test_compile_prints_the_report_and_the_sizes(run: Run, tiny_bert: Path) -> None:
    before = (tiny_bert / "model.safetensors").read_bytes()
    ran = run("compile", tiny_bert, "--target", "rf8-reference", columns=80)
    assert ran.code == 0
    text = " ".join(ran.out.split())
    assert "100.00% of the bytes of matrices lowered" in text
    assert "BertModel: " in text
    assert "compiled for rf8-reference in" in text
    assert (tiny_bert / "model.safetensors").read_bytes() == before


def test_compile_hands_every_option_on(run: Run, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    original = ggpass.compile

    def spy(model: torch.nn.Module, **options: Any) -> Any:
        seen.update(options, dtype=next(model.parameters()).dtype)
        return original(model, **options)

    monkeypatch.setattr("ggpass.api.compile", spy)
    ran = run(
        *("compile", tiny_bert, "-t", "rf8-reference", "--only", "encoder*", "--only", "pooler*"),
        *("--skip", "*query*", "--granularity", "tensor", "--scale", "real", "--rounding", "paper"),
        *("--dtype", "bfloat16"),
    )
    assert ran.code == 0, ran.err
    assert seen["target"] == "rf8-reference"
    assert (list(seen["only"]), list(seen["skip"])) == (["encoder*", "pooler*"], ["*query*"])
    assert seen["scheme"] == ggpass.Scheme("tensor", "real", "paper")
    assert seen["dtype"] == torch.bfloat16
    assert "embeddings.word_embeddings.weight" in ran.out  # left as it is, with the reason


def test_compile_builds_ahead_and_writes(
    run: Run, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a CUDA compiler that writes only names; what the file carries is read in test_cuda_file.py."""
    from support.cuda_device import build_ahead

    from ggpass.file.kernels import read_kernels

    fake = build_ahead(tmp_path / "kernels", monkeypatch)
    out = tmp_path / "small.safetensors"
    ahead = ("compile", tiny_bert, "-t", "rf8-cuda", "--arch", "sm_80", "--arch", "sm_90", "--dtype", "bfloat16")
    ran = run(*ahead, "--output", out, columns=200)
    assert ran.code == 0, ran.err
    assert f"{len(fake.built)} CUDA kernels for sm_80, sm_90 by nvcc13.0.88" in ran.out
    assert sorted((k.name, k.arch) for k in read_kernels(out)) == sorted(fake.built)
    assert_one_line_error(run(*ahead, "-o", tmp_path / "small.bin"), "is not named .safetensors")
    wrong = ("compile", tiny_bert, "-t", "rf8-cuda", "--arch", "sm_75")
    assert_one_line_error(run(*wrong), "the kernels need sm_80 or newer, not sm_75")


def test_compile_errors_are_one_line(run: Run, tiny_bert: Path, tmp_path: Path) -> None:
    for target, part in (("rf9-cpu", "rf9"), ("rf8-moon", "moon"), ("rf8", "rf8")):
        assert_one_line_error(run("compile", tiny_bert, "--target", target), part, "formats: rf8, e4m3, int8")
    reference = ("--target", "int8-reference")
    assert_one_line_error(run("compile", tmp_path / "none", *reference), "none is not a directory; give the one")
    assert_one_line_error(run("compile", tmp_path, *reference), "holds no config.json; give the directory")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert_one_line_error(
        run("compile", tmp_path, *reference), "only pickles (pytorch_model.bin)", "save the model again"
    )
    wrong_rounding = run("compile", tiny_bert, *reference, "--rounding", "paper")
    assert_one_line_error(wrong_rounding, "int8 has no rounding 'paper'; choose one of nearest")


def test_compile_names_the_weight_that_holds_nan(run: Run, tiny_bert: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["encoder.layer.1.output.dense.weight"][3, 4] = float("nan")

    folder = copy_of(tiny_bert, tmp_path / "nan", spoil)
    ran = run("compile", folder, "--target", "rf8-reference")
    assert_one_line_error(ran, "encoder.layer.1.output.dense.weight", "NaN")


def test_weights_missing_from_a_checkpoint_are_reported(run: Run, tiny_bert: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_bert, tmp_path / "less", lambda tensors: tensors.__delitem__("pooler.dense.weight"))
    ran = run("compile", folder, "--target", "rf8-reference")
    assert ran.code == 0
    assert "note: not in the checkpoint, so random: pooler.dense.weight" in ran.out


def test_a_model_that_transformers_cannot_load_is_one_line(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers; pip install 'ggpass[transformers]'")
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    ran = run("compile", tmp_path, "--target", "rf8-reference")
    assert_one_line_error(ran, "transformers cannot load", str(tmp_path))


def test_without_transformers_the_error_says_what_to_install(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(GgpassError, match=r"needs transformers; pip install 'ggpass\[transformers\]'"):
        models.load_model(tiny_bert)


# bench


def test_bench_prints_a_row_for_each_shape(run: Run, tiny_bert: Path) -> None:
    ran = run(
        "bench", tiny_bert, "-t", "rf8-reference", "--rounds", "2", "--shape", "1x8", "--shape", "3x5", columns=80
    )
    assert ran.code == 0, ran.err
    rows = {line.split()[0]: line.split() for line in ran.out.splitlines() if line[:1].isdigit()}
    assert list(rows) == ["1x8", "3x5"]
    for row in rows.values():
        assert float(row[1]) > 0
        assert float(row[2]) > 0
        assert row[3].endswith("x")
        assert 0.98 < float(row[5]) <= float(row[4]) <= 1
    assert "medians of 2 rounds" in " ".join(ran.out.split())


def test_bench_json_and_threads(run: Run, tiny_bert: Path) -> None:
    threads = torch.get_num_threads()
    try:
        ran = run(
            *("bench", tiny_bert, "-t", "int8-reference", "--rounds", "1", "--shape", "2x4", "--threads", "1", "--json")
        )
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    data = json.loads(ran.out)
    assert (data["target"], data["threads"], data["rounds"], data["dtype"]) == ("int8-reference", 1, 1, "float32")
    assert data["bytes"]["after"] < data["bytes"]["before"]
    assert data["timings"][0]["cosine_mean"] > 0.9999


def test_bench_calls_both_models_in_turns_and_takes_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    calls: list[str] = []

    def model(name: str, seconds: list[float]) -> Any:
        left = iter([0.0, 0.0, *seconds])

        def forward(**_: Any) -> tuple[torch.Tensor]:
            calls.append(name)
            clock[0] += next(left)
            return (torch.tensor([[[3.0, 4.0]]]) if name == "float" else torch.tensor([[[4.0, 3.0]]]),)

        return forward

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    steps: list[int] = []
    got = bench.compare(
        model("float", [0.2, 0.4, 9.0]), model("lowered", [0.1, 0.1, 9.0]), {}, 3, 1, 1, lambda: steps.append(1)
    )
    assert calls[:4] == ["float", "lowered"] * 2  # not timed
    assert calls[4:] == ["lowered", "float", "float", "lowered", "lowered", "float"]
    assert len(steps) == 3
    assert (got.float_ms, got.lowered_ms, got.ratio) == pytest.approx((400.0, 100.0, 2.0))
    assert got.cosine_mean == got.cosine_min == pytest.approx(24 / 25)


@pytest.mark.parametrize("names", [["logging"], ["AutoConfig"], ["__name__"], [5], "BertModel", {"a": 1}, 7, []])
def test_odd_architectures_load_as_the_model_type_says(tiny_bert: Path, tmp_path: Path, names: Any) -> None:
    for file in tiny_bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": names}))
    model, _ = models.load_model(tmp_path)
    assert type(model).__name__ == "BertModel"


def test_bench_errors_are_one_line(run: Run, tiny_bert: Path, tmp_path: Path) -> None:
    ran = run("bench", tiny_bert, "-t", "rf8-reference", "--shape", "1x41")
    assert_one_line_error(ran, "at most 40 tokens, not 41; give a shorter --shape")
    transformers = pytest.importorskip("transformers", reason="needs transformers; pip install 'ggpass[transformers]'")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    ran = run("bench", tmp_path / "vit", "-t", "rf8-reference")
    assert_one_line_error(ran, "bench feeds token ids, and ViTModel takes pixel_values; time it with ggpass.compile")


def test_bench_feeds_a_decoder_of_its_own(tmp_path: Path, run: Run) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers; pip install 'ggpass[transformers]'")
    config = transformers.T5Config(
        vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    ran = run("bench", tmp_path / "t5", "-t", "rf8-reference", "--shape", "2x9", "--rounds", "1", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["timings"][0]["cosine_mean"] > 0.98
