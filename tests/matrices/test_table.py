"""The table as text, markup and frame."""

from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from orthokit.errors import UnknownNameError
from orthokit.matrices import matrices


@pytest.fixture
def table():
    return matrices(nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 6), nn.Conv2d(4, 6, 3, groups=2)))


def test_indexing_by_position_name_and_slice(table):
    assert table[0] is table["1.weight"] and table[-1].name == "2.weight"
    assert table[:1] == [table[0]] and "1.weight" in table and "0.weight" not in table
    assert list(table) == [table[0], table[1]] and len(table) == 2
    assert table.blocks("1.bias") == []


def test_names_that_are_no_block_say_why(table):
    with pytest.raises(UnknownNameError, match=r"is not a matrix here\. Embedding: rows are looked up"):
        table["0.weight"]
    with pytest.raises(UnknownNameError, match=r"did you mean '1\.weight'"):
        table["1.weigth"]
    with pytest.raises(UnknownNameError, match="unknown parameter"):
        table.blocks("3.weight")
    with pytest.raises(IndexError):
        table[7]


def test_the_frame_has_a_row_for_everything(table):
    frame = table.to_frame()
    wanted = ["name", "parameter", "rule", "shape", "matrix shape", "numel", "dtype", "trainable", "reason"]
    assert list(frame.columns) == wanted
    assert list(frame["name"]) == ["0.weight", "1.weight", "1.bias", "2.weight", "2.bias"]
    assert frame["numel"].sum() == 50 * 8 + 8 * 6 + 6 + 6 * 2 * 9 + 6
    assert frame.loc[3, "matrix shape"] == (2, 3, 18) and frame.loc[3, "shape"] == (6, 2, 3, 3)
    assert frame.loc[0, "matrix shape"] is None and frame.loc[1, "dtype"] == "float32"


def test_the_summary_counts_matrices_in_batches(table):
    assert table.summary() == "3 matrices in 2 blocks hold 156 of 568 parameters; 3 left out."


def test_the_text_is_aligned_and_long_tables_are_shortened():
    text = repr(matrices({f"layers.{i}.weight": torch.zeros(3, 4) for i in range(100)}))
    lines = text.splitlines()
    assert lines[0] == matrices({f"layers.{i}.weight": torch.zeros(3, 4) for i in range(100)}).summary()
    assert "40 more rows" in text and len(lines) == 63
    assert len({line.index("linear") for line in lines if " linear " in line and "layers" in line}) == 1


def test_the_markup_is_well_formed_escaped_and_labelled(table):
    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.scopes: list[str | None] = []

        def handle_starttag(self, tag, attrs):
            self.open.append(tag)
            if tag == "th":
                self.scopes.append(dict(attrs).get("scope"))

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    markup = matrices({"<b>&.weight": torch.zeros(3, 4), "a.bias": torch.zeros(2)})._repr_html_()
    reader = Reader()
    reader.feed(markup)
    assert not reader.open
    assert reader.scopes == ["col"] * 5 + ["row"] * 2
    assert "&lt;b&gt;&amp;" in markup and "<b>" not in markup
    assert "<caption>" in markup and "aria-label" in markup


@pytest.mark.parametrize(("size", "text"), [(999, "999"), (1000, "1 k"), (10_600_000, "10.6 M"), (999_999, "1000 k")])
def test_counts_are_short(size, text):
    vector = {"v.bias": torch.zeros(size, device="meta"), "w.weight": torch.zeros(2, 2)}
    assert f" {text} " in repr(matrices(vector))
