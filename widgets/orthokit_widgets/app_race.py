"""The page "Optimizer race" for ``panel serve`` and JupyterLab's preview of Panel files."""

import panel as pn

from orthokit_widgets.race_view import RacePage

pn.extension("plotly")
RacePage().servable(title="Optimizer race")
