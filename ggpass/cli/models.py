"""Hugging Face directories: loaded from disk only, from safetensors only, in the class that their config names."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggpass.errors import GgpassError
from ggpass.packed.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import nn


def place_for(target: str, arch: Sequence[str] = ()) -> str:
    """Where a model must lie to be compiled for a target: on the GPU, unless it is built for one elsewhere."""
    return "cuda" if target.partition("-")[2] == "cuda" and not arch else "cpu"


def load_model(directory: Path, dtype: str = "auto") -> tuple["nn.Module", list[str]]:
    """The model of a Hugging Face directory, in eval mode, and notes on what was odd about it.

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
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        name = (getattr(config, "architectures", None) or ["AutoModel"])[0]
        cls: Any = getattr(transformers, name, transformers.AutoModel)
        model, loading = cls.from_pretrained(
            directory, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise GgpassError(f"transformers cannot load {directory}: {reason}") from error
    missing = sorted(loading.get("missing_keys", ()))
    notes = []
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        notes.append(f"not in the checkpoint, so random: {', '.join(missing[:3])}{more}")
    return model.eval(), notes
