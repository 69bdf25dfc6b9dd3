"""The page "Live training" for ``panel serve`` and JupyterLab's preview of Panel files."""

import panel as pn

from orthokit_widgets.training_view import TrainingPage

pn.extension("plotly")
TrainingPage().servable(title="Live training")
