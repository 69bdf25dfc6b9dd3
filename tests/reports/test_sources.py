"""Finding notebooks, reading their parameters, refusing what does not fit."""

import pytest

from orthokit.errors import ReportError, UnknownNameError
from orthokit.reports.runner import resolve
from orthokit.reports.sources import find_notebooks, notebooks_folder, read_source, select

CELL = """
size: str = "laptop"  # smoke | laptop | gpu
seed: int = 0
lr: float = 2e-2  # peak step size
verbose: bool = False
betas: list[float] = [0.5, 0.9]
names: list = ["a"]
order: Literal["pre", "post"] = "pre"
limit: int | None = None  # cut here
plain = 3
"""


@pytest.fixture
def source(make):
    return read_source(make("01_demo", parameters=CELL, title="A demo"))


def test_parameters_are_read_with_type_default_and_help(source):
    assert source.title == "A demo"
    kinds = {name: p.kind for name, p in source.parameters.items()}
    assert kinds == {
        "size": "str",
        "seed": "int",
        "lr": "float",
        "verbose": "bool",
        "betas": "list[float]",
        "names": "list",
        "order": "str",
        "limit": "int",
        "plain": "int",
    }
    assert source.parameters["lr"].default == 0.02
    assert source.parameters["lr"].help == "peak step size"
    assert source.parameters["order"].choices == ("pre", "post")
    assert source.parameters["limit"].optional


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("verbose", "true", True),
        ("verbose", "False", False),
        ("verbose", "0", False),
        ("seed", "007", 7),
        ("lr", "1", 1.0),
        ("lr", "1e-3", 1e-3),
        ("size", "3", "3"),
        ("betas", "0.5,1", [0.5, 1.0]),
        ("betas", "[1, 2]", [1.0, 2.0]),
        ("names", "x, y", ["x", "y"]),
        ("limit", "None", None),
        ("limit", "4", 4),
        ("order", "post", "post"),
        ("plain", "5", 5),
    ],
)
def test_text_becomes_the_declared_type(source, name, text, value):
    got = source.resolve({name: text})[name]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("verbose", "maybe"),
        ("verbose", 1),
        ("seed", "1.5"),
        ("seed", "ten"),
        ("seed", True),
        ("seed", None),
        ("lr", "fast"),
        ("betas", "a,b"),
        ("betas", 0.5),
        ("order", "none"),
        ("size", 3),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(source, name, value):
    with pytest.raises((ReportError, UnknownNameError), match=name):
        source.resolve({name: value})


def test_an_unknown_parameter_is_refused_with_the_closest_name(source):
    with pytest.raises(UnknownNameError, match="did you mean 'verbose'"):
        source.resolve({"verbos": "true"})


def test_a_parameters_cell_that_computes_is_refused(make):
    for cell in ("import os", "x = 1 + len('a')", "x ="):
        with pytest.raises(ReportError, match="parameter"):
            read_source(make("bad", parameters=cell))


def test_names_may_be_shortened_but_not_ambiguous(make, sources):
    for name in ("00_start", "01_energy", "01_extra"):
        make(name)
    assert list(find_notebooks(sources)) == ["00_start", "01_energy", "01_extra"]
    assert list(select([], sources)) == ["00_start", "01_energy", "01_extra"]
    assert list(select(["00", "01_ex"], sources)) == ["00_start", "01_extra"]
    with pytest.raises(UnknownNameError, match="'01_energy', '01_extra'"):
        select(["01"], sources)
    with pytest.raises(UnknownNameError, match="did you mean '01_energy'"):
        select(["energy"], sources)


def test_a_folder_without_notebooks_is_an_error(tmp_path):
    with pytest.raises(ReportError, match="holds no notebook"):
        find_notebooks(tmp_path)
    with pytest.raises(ReportError, match="no notebook folder"):
        find_notebooks(tmp_path / "absent")


def test_an_installed_package_uses_its_own_copies(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "orthokit"
    (package.parent / "notebooks").mkdir(parents=True)  # somebody else's folder: no pyproject beside it
    monkeypatch.setattr("orthokit.reports.sources.PACKAGE", package)
    assert notebooks_folder() == package / "_notebooks"
    (package.parent / "pyproject.toml").touch()
    assert notebooks_folder() == package.parent / "notebooks"


def test_a_file_that_is_no_notebook_is_named(tmp_path):
    (tmp_path / "x.ipynb").write_text("not json")
    with pytest.raises(ReportError, match=r"x\.ipynb"):
        read_source(tmp_path / "x.ipynb")


def test_the_key_depends_on_source_parameters_and_code_only(make, monkeypatch):
    first = read_source(make("a", "x = 1", parameters="n: int = 1"))
    assert first.key({"n": 1}) == read_source(make("a", "x = 1", parameters="n: int = 1")).key({"n": 1})
    assert first.key({"n": 1}) != first.key({"n": 2})
    assert first.key({}) != read_source(make("a", "x = 2", parameters="n: int = 1")).key({})
    key = first.key({})
    monkeypatch.setattr("orthokit.reports.sources.code_version", lambda: "another")
    assert first.key({}) != key


def test_common_parameters_must_fit_every_notebook_and_addressed_ones_only_theirs(make):
    with_size = read_source(make("01_a", parameters='size: str = "laptop"\nsteps: int = 1'))
    without = read_source(make("02_b", parameters="steps: int = 1"))
    both = [with_size, without]
    assert resolve(both, {"steps": "3"}, size="smoke") == {
        "01_a": {"steps": 3, "size": "smoke"},
        "02_b": {"steps": 3},
    }
    assert resolve(both, {"02:steps": "5"}) == {"01_a": {}, "02_b": {"steps": 5}}
    with pytest.raises(UnknownNameError, match="02_b"):
        resolve(both, {"size": "gpu"})
    with pytest.raises(UnknownNameError, match="notebook '03'"):
        resolve(both, {"03:steps": "5"})
    with pytest.raises(UnknownNameError, match="size 'huge'"):
        resolve(both, {}, size="huge")
