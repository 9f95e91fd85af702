"""Hugging Face directories: loaded from disk only, from safetensors only, in the class that their config names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor, nn

from ggpass.cli.console import stderr
from ggpass.errors import GgpassError
from ggpass.packed.checkpoint import Checkpoint


def place_for(target: str, arch: Sequence[str] = ()) -> str:
    """Where a model must lie to be compiled for a target: on the GPU, unless it is built for one elsewhere."""
    return "cuda" if target.partition("-")[2] == "cuda" and not arch else "cpu"


def load_model(directory: Path, dtype: str = "auto") -> tuple[nn.Module, list[str]]:
    """Return the model of a Hugging Face directory, in eval mode, and notes on its oddities, to be printed.

    Args:
        directory: holds config.json and safetensors weights.
        dtype: `auto` (the checkpoint's), or torch's name of one.

    Raises:
        GgpassError: no such model, only pickled weights, or transformers is missing or cannot load it.
    """
    if not directory.is_dir():
        raise GgpassError(f"{directory} is not a directory; give the one that save_pretrained wrote")
    if not (directory / "config.json").exists():
        raise GgpassError(f"{directory} holds no config.json; give the directory that save_pretrained wrote")
    Checkpoint(directory)  # refuses pickles and damaged files, with the next action
    try:
        import transformers
    except ImportError as error:
        raise GgpassError("loading a model needs transformers; pip install 'ggpass[transformers]'") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with stderr().status(escape(f"loading {directory}")):
            config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
            architectures = getattr(config, "architectures", None)
            name = architectures[0] if isinstance(architectures, list) and architectures else None
            cls: Any = getattr(transformers, name, None) if isinstance(name, str) else None
            if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
                cls = transformers.AutoModel
            model, loading = cls.from_pretrained(
                directory, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # a damaged configuration can make transformers raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise GgpassError(f"transformers cannot load {directory}: {reason}") from error
    missing = sorted(loading.get("missing_keys", ()))
    notes = []
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        notes.append(f"note: not in the checkpoint, so random: {', '.join(missing[:3])}{more}")
    return model.eval(), notes


def token_inputs(model: nn.Module, batch: int, sequence: int, command: str, instead: str) -> dict[str, Tensor]:
    """Random token ids and a full mask, with decoder ids if the model has a decoder of its own.

    Args:
        command, instead: of whom and of what an error speaks.

    Raises:
        GgpassError: the model does not take token ids, or not so many.
    """
    config: Any = model.config
    if getattr(model, "main_input_name", None) != "input_ids" or not getattr(config, "vocab_size", None):
        raise GgpassError(
            f"{command} feeds token ids, and {type(model).__name__} takes "
            f"{getattr(model, 'main_input_name', 'others')}; {instead} in a script"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest and sequence > longest:
        raise GgpassError(f"this model takes at most {longest} tokens, not {sequence}; give a shorter --shape")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (batch, sequence), generator=generator)
    ids = ids.to(next(model.parameters()).device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, : min(sequence, 8)]
    return inputs


#: Batch and sequence of the example; both are left open in the file.
EXAMPLE = (2, 9)


def example(model: nn.Module) -> tuple[dict[str, Tensor | bool], dict[str, Any]]:
    """Keyword inputs of a language model, and which of their sizes stay open.

    Raises:
        GgpassError: the model does not take token ids.
    """
    config: Any = model.config
    tensors = token_inputs(model, *EXAMPLE, "export", "call ggpass.export_onnx with example inputs")
    # BERT and its kin have the buffer that makes token_type_ids; given as an input it is the caller's to choose.
    if getattr(config, "type_vocab_size", 0) > 1:
        tensors["token_type_ids"] = torch.zeros_like(tensors["input_ids"])
    open_sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    inputs: dict[str, Tensor | bool] = dict(tensors)
    shapes: dict[str, Any] = dict.fromkeys(tensors, open_sizes)
    if hasattr(config, "use_cache"):
        # A cache is state between calls, which a plain file has no place for.
        inputs["use_cache"], shapes["use_cache"] = False, None
    return inputs, shapes
