"""Fetching data packages with stand-ins for apt-get and dpkg: checked, cached, offline, damaged, interrupted."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from training import fetch
from training.fetch import DataError, DataUnavailable, Package

FILES = {"a.txt": b"the first file", "b.bin": bytes(range(256))}
FOLDER = "usr/share/made"
MADE = Package("made", "1", FOLDER, {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()})
LISTED = "'made-up:made.deb' made_1_all.deb 4242 SHA256:00"

# Runs in a process of its own, so that it can be interrupted and killed.
CHILD = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs behind it with SIGINT ignored
sys.path.insert(0, {str(Path(fetch.__file__).parents[1])!r})
from training.fetch import Package, read
read(Package("made", "1", {FOLDER!r}, {dict(MADE.checksums)!r}))
"""


class Apt:
    """Stand-ins for apt-get and dpkg, first on the PATH: the package file is a tar archive."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.archive = folder, folder / "log", folder / "made.tar"
        self.pack(FILES)
        self.write("dpkg", 'mkdir -p "$3" && tar -xf "$2" -C "$3"')
        self.downloads(f'cp "{self.archive}" made_1_all.deb')

    def write(self, name: str, body: str) -> None:
        script = self.folder / name
        script.write_text(f'#!/bin/sh\necho "{name} $*" >> "{self.log}"\n{body}\n', encoding="utf-8")
        script.chmod(0o755)

    def downloads(self, body: str) -> None:
        self.write("apt-get", f'case "$*" in *--print-uris*) echo "{LISTED}"; exit 0;; esac\n{body}')

    def pack(self, files: dict[str, bytes]) -> None:
        with tarfile.open(self.archive, "w") as archive:
            for name, content in files.items():
                entry = tarfile.TarInfo(f"{FOLDER}/{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))

    def calls(self) -> list[str]:
        return self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Apt:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "SYSTEM", tmp_path / "system")
    return Apt(folder)


def cached() -> list[str]:
    """Names in the cache, the lock aside."""
    folder = fetch.cache_folder(MADE)
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock") if folder.exists() else []


def test_a_fetch_fills_the_cache_and_the_second_read_starts_nothing(apt: Apt, tmp_path: Path) -> None:
    assert fetch.cache_folder(MADE) == tmp_path / "cache" / "ggpass" / "data" / "made"
    assert fetch.read(MADE) == FILES
    calls = apt.calls()
    assert [call.split()[0] for call in calls] == ["apt-get", "apt-get", "dpkg"]
    assert all("download made" in call for call in calls[:2])
    assert cached() == sorted(FILES)
    apt.downloads("exit 1")
    assert fetch.read(MADE) == FILES
    assert apt.calls() == calls


def test_an_installed_package_is_read_in_place(apt: Apt) -> None:
    folder = fetch.SYSTEM / FOLDER
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    assert fetch.read(MADE) == FILES
    assert apt.calls() == []
    assert cached() == []


@pytest.mark.parametrize("under", ["", FOLDER])
def test_data_is_read_from_the_given_folder_and_nowhere_else(apt: Apt, tmp_path: Path, under: str) -> None:
    fetch.read(MADE)
    folder = tmp_path / "given" / under
    folder.mkdir(parents=True)
    (folder / "a.txt").write_bytes(FILES["a.txt"])
    with pytest.raises(DataUnavailable, match=r"lacks b\.bin of made; on a Debian machine"):
        fetch.read(MADE, tmp_path / "given")
    (folder / "b.bin").write_bytes(FILES["b.bin"])
    assert fetch.read(MADE, tmp_path / "given") == FILES
    (folder / "b.bin").write_bytes(b"other")
    with pytest.raises(DataError, match=r"b\.bin is damaged or another version.*delete or replace"):
        fetch.read(MADE, str(tmp_path / "given"))


def test_a_damaged_cache_is_named_and_fetched_again(apt: Apt, capsys: pytest.CaptureFixture[str]) -> None:
    fetch.read(MADE)
    (fetch.cache_folder(MADE) / "b.bin").write_bytes(FILES["b.bin"][:-1])
    assert fetch.read(MADE) == FILES
    assert "is damaged" in capsys.readouterr().err.replace("\n", " ")
    assert (fetch.cache_folder(MADE) / "b.bin").read_bytes() == FILES["b.bin"]


def test_another_build_of_the_package_is_refused_and_not_cached(apt: Apt) -> None:
    apt.pack({**FILES, "b.bin": b"another build"})
    with pytest.raises(DataError, match=r"b\.bin is damaged or another version") as caught:
        fetch.read(MADE)
    assert not isinstance(caught.value, DataUnavailable)
    assert cached() == []
    apt.pack({"a.txt": FILES["a.txt"]})
    with pytest.raises(DataError, match="lacks files of made 1"):
        fetch.read(MADE)
    assert cached() == []


@pytest.mark.parametrize("tool", ["apt-get", "dpkg"])
def test_without_the_tools_the_error_says_how_to_bring_the_files(
    apt: Apt, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    monkeypatch.setenv("PATH", str(apt.folder))
    (apt.folder / tool).unlink()
    with pytest.raises(
        DataUnavailable, match=rf"^made is not installed .* no {tool}; .*`apt-get download made`.*--data"
    ):
        fetch.read(MADE)


@pytest.mark.parametrize("body", ["echo 'E: Could not connect' >&2; exit 100", "cat x; exit 100", "exit 100", ":"])
def test_a_failing_download_is_quoted_and_leaves_nothing(apt: Apt, body: str) -> None:
    apt.downloads(body)
    with pytest.raises(
        DataUnavailable, match=r"^made is not installed and cannot be fetched: apt-get .*--data"
    ) as caught:
        fetch.read(MADE)
    assert ("E: Could not connect" in str(caught.value)) == ("connect" in body)
    assert cached() == []


def test_a_package_that_dpkg_refuses_leaves_nothing(apt: Apt) -> None:
    apt.downloads("head -c 700 /dev/zero > made_1_all.deb")
    apt.write("dpkg", 'mkdir "$3"; echo "dpkg-deb: error: not a Debian format archive" >&2; exit 2')
    with pytest.raises(DataUnavailable, match="cannot be unpacked: it says `dpkg-deb: error: not a Debian"):
        fetch.read(MADE)
    assert cached() == []


def test_a_download_without_end_is_stopped(apt: Apt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "SECONDS", 0.2)
    apt.downloads('echo $$ > "' + str(apt.folder / "pid") + '"; exec sleep 60')
    with pytest.raises(DataUnavailable, match="no end after 0 s"):
        fetch.read(MADE)
    with pytest.raises(ProcessLookupError):
        os.kill(int((apt.folder / "pid").read_text()), 0)
    assert cached() == []


def test_a_cache_that_cannot_be_written_is_named(apt: Apt, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"a file where a folder should be")
    with pytest.raises(DataUnavailable, match=r"cannot be written .*set XDG_CACHE_HOME"):
        fetch.read(MADE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_fetch_leaves_no_half_written_file(apt: Apt, number: signal.Signals) -> None:
    pid = apt.folder / "pid"
    apt.downloads(f'head -c 100 "{apt.archive}" > made_1_all.deb; echo $$ > "{pid}"; exec sleep 60')
    with subprocess.Popen([sys.executable, "-c", CHILD], stderr=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 30
        while not (pid.exists() and pid.read_text().strip()) and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(number)
        assert child.wait(30) != 0
    # Killed outright, it cannot tidy up: its scratch folder stays until the next fetch, and nothing else does.
    left = cached()
    assert not set(left) & set(FILES)
    assert left == [] if number == signal.SIGINT else [name[:7] for name in left] == [".fetch-"]
    if number == signal.SIGKILL:
        os.kill(int(pid.read_text()), signal.SIGKILL)
    apt.downloads(f'cp "{apt.archive}" made_1_all.deb')
    assert fetch.read(MADE) == FILES
    assert cached() == sorted(FILES)


def test_processes_that_start_together_download_once(apt: Apt) -> None:
    apt.downloads(f'sleep 0.3; cp "{apt.archive}" made_1_all.deb')
    children = [subprocess.Popen([sys.executable, "-c", CHILD], stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [child.wait(60) for child in children] == [0, 0]
    assert sum("dpkg -x" in call for call in apt.calls()) == 1
