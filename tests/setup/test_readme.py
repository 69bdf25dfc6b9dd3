"""The README says what is true: its example prints what it shows, and it lists every notebook."""

import contextlib
import io
import re
from pathlib import Path

import torch

from orthokit.reports import find_notebooks

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()


def test_the_example_prints_the_output_shown():
    code, shown = re.search(r"```python\n(.*?)```\s+```text\n(.*?)```", TEXT, re.DOTALL).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == shown


def test_the_example_of_an_adapter_runs_and_merging_keeps_the_function():
    first, second, _ = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(first, "README.md", "exec"), names)
        exec(compile(second, "README.md", "exec"), names)
    assert re.search(r"^[1-9]\d* numbers to train$", printed.getvalue(), re.MULTILINE)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.allclose(names["model"](ids), names["ok"].lab.load_pretrained()(ids), atol=1e-5)


def test_the_example_of_merging_runs_and_all_tasks_get_a_score():
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[::2]:
            exec(compile(code, "README.md", "exec"), names)
    scores = names["ok"].lab.expert_scores("pictures", names["merged"], names["experts"])
    assert all(0.5 < score <= 1 for score in scores.values()) and str(scores) in printed.getvalue()
    assert f"all {len(names['ok'].merging.methods())}".replace("16", "sixteen") in TEXT


def test_every_notebook_is_listed():
    listed = re.findall(r"\[`(\d\d_\w+)`\]\(notebooks/\1\.ipynb\)", TEXT)
    assert listed == sorted(find_notebooks())


def test_every_picture_and_link_into_the_project_exists():
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", TEXT)
    assert targets
    assert [t for t in targets if not (ROOT / t).exists()] == []
