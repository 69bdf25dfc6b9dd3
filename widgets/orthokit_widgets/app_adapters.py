"""The page "Adapters" for ``panel serve`` and JupyterLab's preview of Panel files."""

import panel as pn

from orthokit_widgets.adapters_view import AdaptersPage

pn.extension("plotly")
AdaptersPage().servable(title="Adapters")
