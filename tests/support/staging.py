"""What an interrupted run left beside its target."""

from pathlib import Path

from ggpass.packed.staging import PART_SUFFIX


def left_in(folder: Path) -> Path:
    """Return the only staging directory in a folder."""
    (found,) = folder.glob(f".*{PART_SUFFIX}")
    return found
