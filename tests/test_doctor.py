"""orthokit doctor: every fault is named with the command that mends it, and hides no other."""

import json
import shlex
import shutil
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from orthokit import doctor
from orthokit.doctor import Finding

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def here():
    """The examination of this machine; by name."""
    return {finding.name: finding for finding in doctor.examine()}


def finding(name: str) -> Finding:
    return {found.name: found for found in doctor.examine()}[name]


def test_the_core_works_where_the_tests_run(here):
    assert doctor.core_works(list(here.values()))
    assert {here[name].status for name in ("python", "core", "device", "matmul", "assets", "requirements")} == {"ok"}


def test_the_rates_of_three_dtypes_are_shown(here):
    assert all(dtype in here["matmul"].found for dtype in ("float32", "bfloat16", "float16"))


def test_every_missing_part_comes_with_what_to_do(here):
    assert all(found.mend for found in here.values() if found.status == "missing")


def test_every_extra_of_the_project_is_listed(here):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {f"[{extra}]" for extra in extras} <= set(here)


def test_the_ranges_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, lines in {"": project["dependencies"], "sweep": project["optional-dependencies"]["sweep"]}.items():
        wanted = {canonicalize_name(r.name): r.specifier for r in map(Requirement, lines)}
        read = {canonicalize_name(name): SpecifierSet(rule) for name, rule in doctor._requirements()[extra].items()}
        assert read == wanted, "installed metadata and pyproject.toml disagree: run make setup"


def test_an_extra_that_contains_others_lists_only_what_it_adds():
    found = doctor._requirements()
    assert "pytest" in found["dev"] and "panel" in found["widgets"] and "panel" not in found["dev"]


def test_a_damaged_asset_breaks_the_core_and_is_named(tmp_path, monkeypatch, capsys):
    from orthokit.lab import _assets

    shutil.copytree(_assets.ASSETS / "digits", tmp_path / "digits")
    file = tmp_path / "digits" / "images.safetensors.xz"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr(_assets, "ASSETS", tmp_path)
    found = finding("assets")
    assert found.status == "broken" and "images.safetensors.xz" in found.found
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.endswith("The core is broken: assets.\n")


def test_an_empty_asset_folder_is_not_intact(tmp_path, monkeypatch):
    from orthokit.lab import _assets

    monkeypatch.setattr(_assets, "ASSETS", tmp_path)
    assert finding("assets").status == "broken"


def test_without_a_browser_the_core_still_works(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    found = finding("browser")
    assert found.status == "missing" and "Chromium" in found.mend
    assert doctor.core_works([found])


def test_a_cuda_build_without_a_gpu_is_a_note(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = finding("torch")
    assert found.status == "note" and "without a GPU" in found.found


def test_a_cpu_build_beside_a_gpu_is_a_note(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", None)
    found = finding("torch")
    assert found.status == "note" and "the GPU stays unused" in found.found


@pytest.mark.parametrize(
    ("line", "version", "name", "status"),
    [
        ("plotly<7,>=6.9; extra == 'notebooks'", "7.1.0", "[notebooks]", "missing"),
        ("plotly<7,>=6.9; extra == 'notebooks'", "6.9.0", "[notebooks]", "ok"),
        ("plotly<7,>=6.9; extra == 'notebooks'", None, "[notebooks]", "missing"),
        ("einops<0.9,>=0.8.2", "0.9.0", "requirements", "broken"),
        ("einops<0.9,>=0.8.2", None, "requirements", "broken"),
    ],
)
def test_versions_out_of_range_are_found(monkeypatch, line, version, name, status):
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: [line])
    monkeypatch.setattr(doctor, "_installed", lambda _: version)
    (found,) = doctor._packages()
    assert (found.name, found.status) == (name, status)
    if status != "ok":
        requirement = Requirement(shlex.split(found.mend)[-1])
        assert requirement.specifier == Requirement(line.split(";")[0]).specifier


def test_a_bare_source_folder_is_a_note(monkeypatch):
    def absent(_):
        raise metadata.PackageNotFoundError("orthokit")

    monkeypatch.setattr(doctor.metadata, "requires", absent)
    (found,) = doctor._packages()
    assert found.status == "note" and "pip install -e ." in found.mend


def test_one_broken_part_hides_no_other(monkeypatch):
    def fail():
        raise RuntimeError("the driver does not answer")

    monkeypatch.setattr(doctor, "_device", fail)
    found = {entry.name: entry for entry in doctor.examine()}
    assert found["device"] == Finding("device", "broken", "RuntimeError: the driver does not answer")
    assert found["core"].status == "ok" and "browser" in found


def test_json_holds_the_same_findings_as_the_table(here, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: list(here.values()))
    assert doctor.main(["--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["core_works"] is True
    assert [Finding(**row) for row in shown["findings"]] == list(here.values())
    assert doctor.main([]) == 0
    table = capsys.readouterr().out
    assert all(found.found in table and found.mend in table for found in here.values())


def test_an_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--jsn"])
    assert stop.value.code == 2 and "--jsn" in capsys.readouterr().err


releases = st.lists(st.integers(0, 12), min_size=1, max_size=3).map(lambda numbers: ".".join(map(str, numbers)))
clauses = st.tuples(st.sampled_from([">=", "<=", "<", ">", "==", "!="]), releases).map("".join)


@settings(deadline=None)
@given(version=releases, specifier=st.lists(clauses, max_size=3).map(",".join))
def test_ranges_agree_with_packaging(version, specifier):
    assert doctor.satisfies(version, specifier) == SpecifierSet(specifier).contains(version)
