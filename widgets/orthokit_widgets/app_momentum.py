"""The page "Momentum gap" for ``panel serve`` and JupyterLab's preview of Panel files."""

import panel as pn

from orthokit_widgets.momentum_view import MomentumPage

pn.extension("plotly")
MomentumPage().servable(title="Momentum gap")
