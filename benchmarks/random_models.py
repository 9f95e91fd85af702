"""Small random models of many kinds: is each quantized, right, saved, loaded, traced? `make random` runs them all.

    python benchmarks/random_models.py [NAME …] [--onnx] [-o benchmarks/results/random_models.md]

Each model is built from its configuration with random weights, and asked:

1. `ref`: the module for `rf8-cpu` equals the one for `rf8-reference` (relative 1e-4);
2. `file`: `ggpass.save`, then `ggpass.load` into a model of other values, gives the same output, bit for bit;
3. `meta`: loading into a model on the meta device does too;
4. `traced`: with example inputs, it equals the module with the same weights quantized (relative 1e-4);
5. `onnx` (of transformers models with `--onnx`): `ggpass.export_onnx` with its check in ONNX Runtime.

`share` is that of the bytes of matrices that are quantized in the module. Where torch's own export of the float model
fails, or its construction on the meta device, the answer is `torch`. Models run in chunks, each in a process, and
each is given up after its time.
"""

import argparse
import contextlib
import copy
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from random_torch_models import TORCH_MODELS
from torch import Tensor, nn

import ggpass

CHUNK, SECONDS_A_MODEL, RELATIVE = 8, 120, 1e-4
ROOT = Path(__file__).parent.parent
CHECKS = ("ref", "file", "meta", "traced", "onnx")

#: Sizes that a configuration gets if it has the attribute.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "true_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_hidden_groups", "d_kv_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_ff", "hidden_dim"), 96),
    **dict.fromkeys(
        ("n_inner", "d_inner", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size"), 96
    ),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "n_group", "topk_group", "moe_topk", "decoder_start_token_id"), 1),
    **dict.fromkeys(("vocab_size", "sep_token_id"), 120),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_source_positions"), 128),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size", "kv_channels"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
    "intra_bottleneck_size": 64,
    "first_k_dense_replace": 1,
    "rotary_dim": 8,
    "image_size": 32,
    "patch_size": 8,
    "num_conv_pos_embeddings": 16,
    "conv_dim": (32, 32, 32),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "sep_token_id": 2,
    "use_cache": False,
    "block_sizes": [1, 1],
}


def plain(types: str) -> dict[str, dict[str, Any]]:
    """Return configurations that need nothing beside SMALL."""
    return {name: {} for name in types.split()}


#: type -> what its configuration needs beside SMALL.
LANGUAGE: dict[str, dict[str, Any]] = {
    **plain(
        "bert albert roberta electra distilbert mpnet deberta deberta-v2 camembert xlm-roberta mobilebert convbert "
        "nystromformer squeezebert layoutlm ernie fnet megatron-bert roformer rembert ibert esm "
        "xlnet xlm mra yoso data2vec-text modernbert bert-generation t5 mt5 umt5 bart mbart pegasus marian "
        "blenderbot m2m_100 longt5 fsmt led switch_transformers"
    ),
    "roformer": {"embedding_size": 64},
    "modernbert": {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
    "fsmt": {"src_vocab_size": 120, "tgt_vocab_size": 120, "langs": ["en", "de"]},
    "led": {"attention_window": 16},
}
CAUSAL: dict[str, dict[str, Any]] = {
    **plain(
        "gpt2 gpt_neox gptj opt bloom falcon codegen llama mistral qwen2 qwen3 gemma gemma2 phi phi3 stablelm "
        "starcoder2 olmo olmo2 olmoe mixtral qwen2_moe qwen3_moe granite granitemoe gpt_oss deepseek_v2 "
        "deepseek_v3 cohere glm mamba mamba2 persimmon biogpt gpt_bigcode nemotron smollm3 helium jetmoe seed_oss"
    ),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16},
    "phi3": {"pad_token_id": 0},
}
VISION: dict[str, dict[str, Any]] = {
    **plain("vit deit beit dinov2 vit_msn clip_vision_model siglip_vision_model ijepa"),
    "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "patch_size": 4, "window_size": 4},
    "convnext": {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "patch_size": 4},
    "convnextv2": {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "patch_size": 4},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]},
    "regnet": {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "groups_width": 8},
    "segformer": {
        "hidden_sizes": [16, 32, 32, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 4],
        "patch_sizes": [7, 3, 3, 3],
    },
    "poolformer": {"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1], "patch_sizes": [7, 3, 3, 3]},
    "pvt": {
        "hidden_sizes": [16, 32, 32, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 4],
        "patch_sizes": [4, 2, 2, 2],
    },
    "mobilenet_v2": {"depth_multiplier": 0.25, "image_size": 64},
    "focalnet": {
        "embed_dim": 16,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "focal_levels": [1, 1],
        "focal_windows": [3, 3],
        "patch_size": 4,
    },
}
AUDIO: dict[str, dict[str, Any]] = {
    **plain("wav2vec2 hubert unispeech wavlm data2vec-audio"),
    "whisper": {"max_source_positions": 30, "max_target_positions": 32, "num_mel_bins": 20},
}


def transformers_model(kind: str) -> tuple[Callable[[], nn.Module], dict[str, Tensor]]:
    """Return what builds a random model of a type, and its inputs."""
    import transformers

    families = {"language": LANGUAGE, "causal": CAUSAL, "vision": VISION, "audio": AUDIO}
    family = next(name for name, types in families.items() if kind in types)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = CONFIG_MAPPING[kind]()
    names = {*known.to_dict(), *known.attribute_map}
    attributes = {name: value for name, value in SMALL.items() if name in names}
    if "depths" in families[family][kind]:  # sizes for each stage, given whole
        attributes = {"image_size": 32} if "image_size" in names else {}
    if family != "audio":
        attributes = {name: value for name, value in attributes.items() if not name.startswith("conv_")}
    config = CONFIG_MAPPING[kind](**{**attributes, **families[family][kind]})
    config.return_dict = True
    auto = transformers.AutoModelForCausalLM if family == "causal" else transformers.AutoModel
    model = auto.from_config(copy.deepcopy(config))
    takes = inspect.signature(model.forward).parameters
    ids = torch.randint(3, 119, (2, 12))
    if family == "vision":
        inputs = {"pixel_values": torch.randn(2, 3, *[getattr(config, "image_size", 32)] * 2)}
    elif kind == "whisper":
        inputs = {"input_features": torch.randn(2, 20, 60)}
    elif family == "audio":
        inputs = {"input_values": torch.randn(2, 1600)}
    else:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = torch.randint(3, 119, (2, 5))
    inputs = {name: value for name, value in inputs.items() if name in takes}
    return lambda: auto.from_config(copy.deepcopy(config)), inputs


def torch_model(name: str) -> tuple[Callable[[], nn.Module], dict[str, Tensor]]:
    build, *args = TORCH_MODELS[name]
    names = list(inspect.signature(build().forward).parameters)[: len(args)]
    return build, dict(zip(names, (arg() for arg in args)))


def all_models() -> list[str]:
    return [*LANGUAGE, *CAUSAL, *VISION, *AUDIO, *TORCH_MODELS]


def first_tensor(output: Any) -> Tensor:
    """Return the first floating tensor of a model's output."""
    leaves = torch.utils._pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())


def difference(got: Tensor, wanted: Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖; NaN is infinite."""
    value = ((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()
    return math.inf if math.isnan(value) else value


def fails(action: Callable[[], object]) -> bool:
    """Return True if something that torch does with the float model raises."""
    try:
        action()
    except Exception:
        return True
    return False


def on_meta_device(build: Callable[[], nn.Module]) -> nn.Module:
    """Return a model without values."""
    with torch.device("meta"):
        return build()


def run_plain_onnx(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Write the float model by torch's own exporter, and run it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plain.onnx"
        torch.onnx.export(model, (), path, kwargs=inputs, dynamo=True, verbose=False)
        session = ggpass.onnxruntime.session(path)
        taken = {node.name for node in session.get_inputs()}
        session.run(None, {name: value.numpy() for name, value in inputs.items() if name in taken})


def examine(name: str, onnx: bool) -> dict[str, Any]:
    """Return a model's answers: '' if it holds, `torch` if torch's export fails, or else what went wrong."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    build, inputs = torch_model(name) if name in TORCH_MODELS else transformers_model(name)
    torch.manual_seed(1)
    model = build().eval()
    lowered = ggpass.compile(model, target="rf8-cpu")
    wanted = first_tensor(lowered(**inputs))
    report = ggpass.report(lowered)
    stays: dict[str, int] = {}
    for skip in report.skips:
        if skip.matrix:
            stays[skip.reason] = stays.get(skip.reason, 0) + skip.bytes
    answer: dict[str, Any] = {
        "name": name,
        "matrices": sum(c.bytes_before for c in report.changes) + sum(stays.values()),
        "share": report.lowered_share,
        "stays": stays,
        "float": difference(wanted, first_tensor(model(**inputs))),
    }

    def ask(check: str, question: Callable[[], float], bound: float) -> None:
        try:
            found = question()
            answer[check] = "" if found <= bound else f"off by {found:.1e}"
        except Exception as error:
            answer[check] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]

    reference = ggpass.compile(model, target="rf8-reference")
    ask("ref", lambda: difference(wanted, first_tensor(reference(**inputs))), RELATIVE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"

        def loaded(blank: nn.Module) -> float:
            filled = ggpass.load(path, into=blank.eval(), target="rf8-cpu")
            return (
                0.0
                if torch.equal(first_tensor(filled(**inputs)), wanted)
                else difference(first_tensor(filled(**inputs)), wanted)
            )

        def saved() -> float:
            ggpass.save(lowered, path)
            torch.manual_seed(2)
            return loaded(build())

        ask("file", saved, 0.0)
        ask("meta", lambda: loaded(on_meta_device(build)), 0.0)

        def traced() -> float:
            artifact = ggpass.compile(model, (), inputs, target="rf8-cpu")
            lowers = [part for part in artifact.report.parts if part.title == "LowerWeights"]
            chosen = {name for part in lowers for change in part.changes for name in change.name.split(" = ")}
            if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
                same = ggpass.compile(model, (), inputs, target="rf8-reference")  # norms are folded ahead of rounding
            else:
                same = ggpass.compile(model, target="rf8-cpu", only=chosen) if chosen else model
            return difference(first_tensor(artifact(**inputs)), first_tensor(same(**inputs)))

        def exported() -> float:
            ggpass.export_onnx(model, (), Path(folder) / "model.onnx", kwargs=inputs)
            return 0.0

        ask("traced", traced, RELATIVE)
        if onnx:
            ask("onnx", exported, 0.0)
    plain = {
        "meta": lambda: on_meta_device(build),
        "traced": lambda: torch.export.export(model, (), dict(inputs)),
        "onnx": lambda: run_plain_onnx(model, inputs),
    }
    answer |= {check: "torch" for check, action in plain.items() if answer.get(check) and fails(action)}
    return answer


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def worker(names: list[str], onnx: bool) -> None:
    """Print an answer for each model, one JSON object a line."""
    for name in names:
        start = time.perf_counter()
        try:
            with limited(SECONDS_A_MODEL), torch.no_grad():
                answer = examine(name, onnx or name in TORCH_MODELS)
        except Exception as error:
            answer = {"name": name, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]}
        print("@", json.dumps({**answer, "seconds": time.perf_counter() - start}), flush=True)


def run_all(names: list[str], onnx: bool) -> list[dict[str, Any]]:
    """Return the answers of all models, from one process for each chunk."""
    answers = {}
    for start in range(0, len(names), CHUNK):
        chunk = names[start : start + CHUNK]
        command = [sys.executable, __file__, "--worker", *chunk, *(["--onnx"] if onnx else [])]
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        }
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        for line in done.stdout.splitlines():
            if line.startswith("@ "):
                answer = json.loads(line[2:])
                answers[answer["name"]] = answer
                print(f"{answer['seconds']:6.1f} s  {row(answer)}", flush=True)
        for name in chunk:
            answers.setdefault(name, {"name": name, "error": f"the process ended with {done.returncode}"})
    return [answers[name] for name in names]


def row(answer: dict[str, Any]) -> str:
    """Return a model's line of the table."""
    if "error" in answer:
        return f"| {answer['name']} | – | {answer['error']} | – | – | – | – | – |"
    stays = "; ".join(
        f"{reason} ({size / max(1, answer['matrices']):.1%})"
        for reason, size in sorted(answer["stays"].items(), key=lambda item: -item[1])
        if size >= 0.005 * answer["matrices"]
    )
    cells = [answer.get(c, "–") or "✓" for c in CHECKS]
    return f"| {answer['name']} | {answer['share']:.3f} | {stays} | " + " | ".join(cells) + " |"


def table(answers: list[dict[str, Any]]) -> str:
    """Return the page of results."""
    ran = [a for a in answers if "error" not in a]
    whole = sum(a["share"] >= 0.95 for a in ran)
    counts = ", ".join(
        f"{check} {sum(a.get(check) == '' for a in ran)}"
        f" (torch's own export fails: {sum(a.get(check) == 'torch' for a in ran)})".replace(
            " (torch's own export fails: 0)", ""
        )
        for check in CHECKS
        if any(check in a for a in ran)
    )
    lines = [
        "# Small random models",
        "",
        f"`benchmarks/random_models.py`, torch {torch.__version__}: {len(answers)} models, {len(ran)} ran.",
        f"At least .95 of the bytes of matrices are quantized in {whole}. Right: {counts}.",
        "",
        "`share` is that of the bytes of matrices that the module holds as codes; `stays` is what is float, and why.",
        "",
        "| model | share | stays | " + " | ".join(CHECKS) + " |",
        "|---|---|---|" + "---|" * len(CHECKS),
        *map(row, answers),
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--onnx", action="store_true", help="write those of transformers as ONNX files too (an hour)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.worker:
        worker(options.names, options.onnx)
        return 0
    answers = run_all(options.names or all_models(), options.onnx)
    if options.output:
        options.output.write_text(table(answers))
    bad = [a for a in answers if "error" in a or any(a.get(c) not in ("", "torch", None) for c in CHECKS)]
    print(f"{len(answers) - len(bad)} of {len(answers)} hold")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
