"""The page "Forgetting" for ``panel serve`` and JupyterLab's preview of Panel files."""

import panel as pn

from orthokit_widgets.forgetting_view import ForgettingPage

pn.extension("plotly")
ForgettingPage().servable(title="Forgetting")
