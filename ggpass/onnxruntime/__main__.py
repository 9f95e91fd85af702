"""`python -m ggpass.onnxruntime` prints the path of the custom-op library, for hosts written in other languages."""

import sys

from ggpass.errors import GgpassError
from ggpass.onnxruntime.library import library_path


def main() -> int:
    """Print the path; where there is none, print the reason and return 1."""
    try:
        sys.stdout.write(f"{library_path()}\n")
    except GgpassError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
