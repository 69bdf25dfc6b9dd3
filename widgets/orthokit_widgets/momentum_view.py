"""The page "Momentum gap": what momentum does to a low-rank signal in noise, at the pull of a slider."""

from __future__ import annotations

from typing import Any

import panel as pn

from orthokit_widgets.components import Chart, Facts
from orthokit_widgets.momentum_state import MomentumState
from orthokit_widgets.page import Page, columns, stack

__all__ = ["MomentumPage"]

_EXPLANATION = """
Every gradient is a fixed signal of rank <i>r</i> plus fresh noise,
<math><msub><mi>G</mi><mi>t</mi></msub><mo>=</mo><mi>S</mi><mo>+</mo><mi>σ</mi><msub><mi>Ξ</mi><mi>t</mi></msub></math>.
Momentum averages them,
<math><msub><mi>M</mi><mi>t</mi></msub><mo>=</mo><mi>β</mi><msub><mi>M</mi><mrow><mi>t</mi><mo>−</mo><mn>1</mn></mrow></msub>
<mo>+</mo><mo
stretchy="false">(</mo><mn>1</mn><mo>−</mo><mi>β</mi><mo
stretchy="false">)</mo><msub><mi>G</mi><mi>t</mi></msub></math>:
the signal stays, the variance of the noise falls by
<math><mo
stretchy="false">(</mo><mn>1</mn><mo>+</mo><mi>β</mi><mo
stretchy="false">)</mo><mo
stretchy="false">/</mo><mo
stretchy="false">(</mo><mn>1</mn><mo>−</mo><mi>β</mi><mo
stretchy="false">)</mo></math>,
and a gap opens between the singular values
<math><msub><mi>σ</mi><mi>r</mi></msub></math> and
<math><msub><mi>σ</mi><mrow><mi>r</mi><mo>+</mo><mn>1</mn></mrow></msub></math>.
Muon orthogonalises after averaging (order <i>pre</i>) and so sees the gap; orthogonalising each gradient first
(<i>post</i>), or not averaging at all (<i>none</i>), does not.
"""


class MomentumPage(Page[MomentumState]):
    """The page as a Panel object: serve it, or show it in a notebook cell.

    Args:
        links: Show links to the other pages.
        **settings: Settings to start from: ``beta``, ``sigma``, ``rank``, ``size``, ``order``, ``noise``, ``seed``.

    Raises:
        OptionError: A setting out of range; the message names the range.
    """

    def __init__(self, *, links: bool = False, **settings: Any) -> None:
        state = MomentumState(**settings)
        self.facts = Facts()
        heights = {"spectrum": 245, "arrows": 205, "gap": 542}
        self.charts = {name: Chart(plot_height=height) for name, height in heights.items()}
        super().__init__(state, title="Momentum gap", explanation=_EXPLANATION, links=links)

    def parts(self) -> list[pn.viewable.Viewable]:
        """Numbers above, three charts below."""
        right = stack(self.charts["spectrum"], self.charts["arrows"])
        return [self.facts, columns(self.charts["gap"], right)]

    def paint(self) -> bool:
        """Show the snapshot; more to come while gradients are drawn or orthogonalised."""
        found = self.state.snapshot()
        for name, chart in self.charts.items():
            chart.show(found["figures"].get(name), title="" if found["figures"] else "…", empty="Drawing gradients")
        self.facts.items = found["facts"]
        current = found["settings"] == self.state.values()
        answer = "Up to date." if current else "The charts show the last settings."
        self.status.text = f"{found['busy']} …" if found["busy"] else answer
        return bool(found["busy"])

    def problems(self) -> list[str]:
        """A computation that failed."""
        return [self.state.error] if self.state.error else []

    def close(self) -> None:
        """Stop computing for a page nobody sees."""
        super().close()
        self.state.close()
