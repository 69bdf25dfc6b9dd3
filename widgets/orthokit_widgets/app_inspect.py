"""The page "Inspect" for ``panel serve`` and JupyterLab's preview of Panel files.

Who can reach it is not known here, so files are uploaded and never named by their path.
"""

import panel as pn

from orthokit_widgets.inspect_view import InspectPage

pn.extension("plotly")
InspectPage().servable(title="Inspect")
