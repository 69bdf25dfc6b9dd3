"""The page "Merge" for ``panel serve`` and JupyterLab's preview of Panel files."""

import panel as pn

from orthokit_widgets.merge_view import MergePage

pn.extension("plotly")
MergePage().servable(title="Merge")
