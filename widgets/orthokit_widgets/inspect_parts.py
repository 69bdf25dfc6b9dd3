"""Two parts that the page "Inspect" has for itself: the table of the matrices, and the way in for a visitor's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import param

from orthokit_widgets.components import Part, stylesheets

__all__ = ["Files", "MatrixTable"]

_ASSETS = Path(__file__).parent / "assets"


class MatrixTable(Part):
    """A row a matrix; a press on a head comes as ``{"sort": column}``, a tick as ``{"tick": place, "on": bool}``."""

    content = param.String('{"columns":[],"rows":[],"lists":[]}', doc="What :meth:`show` sends.")
    ticked = param.List([], doc="Places of the rows that are ticked.")
    tickable = param.Boolean(False, doc="Whether a tick does anything.")
    sort = param.Dict({"name": "order", "falling": True}, doc="Column that it is sorted by, and the way.")
    empty = param.String("", doc="What to say without a row.")

    _esm = (_ASSETS / "matrices.js").read_text(encoding="utf-8")
    _stylesheets: ClassVar = stylesheets("matrices.css")

    def show(self, table: dict[str, Any]) -> None:
        """Send a table, as :func:`orthokit_widgets.inspect_words.table` makes it."""
        self.content = json.dumps(table, separators=(",", ":"), ensure_ascii=False)


class Files(Part):
    """Opens a model by path, ``{"open": path, "use"}``, or begins an upload, ``{"upload": name, "size", "use"}``.

    The pieces that :attr:`wanted` names come one by one as ``{"piece": base64, "of": token, "start"}``.
    """

    paths = param.Boolean(False, doc="Whether a path on the server's machine can be named.")
    help = param.String("", doc="What can be uploaded.")
    wanted = param.Dict({}, doc="The piece that is asked for: token, start, stop; empty: none.")

    _esm = (_ASSETS / "files.js").read_text(encoding="utf-8")
    _stylesheets: ClassVar = stylesheets("files.css")
