"""Live pages of orthokit: Panel objects that are served by ``orthokit dash`` and show inside JupyterLab.

Example:
    In a notebook::

        import orthokit_widgets as widgets

        widgets.notebook()
        widgets.momentum_page(beta=0.95)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthokit_widgets.adapters_view import AdaptersPage
    from orthokit_widgets.forgetting_view import ForgettingPage
    from orthokit_widgets.inspect_view import InspectPage
    from orthokit_widgets.merge_view import MergePage
    from orthokit_widgets.momentum_view import MomentumPage
    from orthokit_widgets.race_view import RacePage
    from orthokit_widgets.training_view import TrainingPage

__all__ = [
    "adapters_page",
    "forgetting_page",
    "inspect_page",
    "merge_page",
    "momentum_page",
    "notebook",
    "race_page",
    "training_page",
]


def notebook() -> None:
    """Prepare a notebook for the pages: everything they need is put into it, nothing is fetched when it is shown."""
    import panel as pn

    pn.extension("plotly", inline=True)


def adapters_page(**settings: Any) -> AdaptersPage:
    """The page "Adapters": an adapter on a real weight, how orthogonal it is and what it keeps.

    Args:
        **settings: Where to start: ``matrix``, ``adapter``, ``angle``, ``picture``, ``seed``, ``block_size``,
            ``factors``, ``rank``, ``map``, ``terms``, ``series``.

    Returns:
        A Panel viewer; the last line of a cell shows it.

    Raises:
        OptionError: A setting out of range.

    Example:
        >>> page = adapters_page(adapter="oft", angle=0.5)
        >>> page.state.snapshot()["values"]["spectrum"] < 1e-6
        True
    """
    from orthokit_widgets.adapters_view import AdaptersPage

    return AdaptersPage(**settings)


def forgetting_page(**settings: Any) -> ForgettingPage:
    """The page "Forgetting": what fine-tuning taught and cost a model, run by run, and the way back.

    Args:
        **settings: Where to start: ``ground``, ``shown`` (a method, or the name of a run in the run store), ``which``
            (``"mean"`` or a seed), ``path``, ``alpha``; for a run of your own ``method``, ``rate`` (over the tuned
            learning rate), ``steps``, ``seed``; and ``root``, the folder of runs, and ``evidence``, that of evidence.

    Returns:
        A Panel viewer; the last line of a cell shows it.

    Raises:
        OptionError: A setting out of range.

    Example:
        >>> page = forgetting_page(shown="lora", alpha=0.5)
        >>> page.state.sentence
        'Ready: choose a run, or press Start.'
    """
    from orthokit_widgets.forgetting_view import ForgettingPage

    return ForgettingPage(**settings)


def inspect_page(**settings: Any) -> InspectPage:
    """The page "Inspect": the geometry of every matrix of a model, alone, against its base, or beside others.

    Args:
        **settings: Where to start: ``model`` and ``base`` (``"tinygpt"``, ``"tinygpt-oft"``, ``"minilm"`` and so on),
            ``detail`` (``"spectrum"`` or ``"norms"``), ``sample``, ``groups`` (of columns), ``sort`` and ``falling``,
            ``column`` (of the charts), ``chosen`` (places of matrices), ``of``, ``across``, ``height`` and ``unit`` (of
            the spectra), ``second``, ``third`` and ``fourth`` (models beside it), ``file``. Files of this machine are
            opened on the page by their path.

    Returns:
        A Panel viewer; the last line of a cell shows it.

    Raises:
        OptionError: A setting out of range.

    Example:
        >>> page = inspect_page(model="tinygpt-lora", base="tinygpt", column="change_rank")
        >>> [asked.base for asked in page.state.wanted]
        ['tinygpt']
    """
    from orthokit_widgets.inspect_view import InspectPage

    return InspectPage(local=True, **settings)


def merge_page(**settings: Any) -> MergePage:
    """The page "Merge": experts of one model merged by any method, task by task, scale by scale, layer by layer.

    Args:
        **settings: Where to start: ``family``, ``experts`` (names of its tasks), ``seed``, ``method``, its options each
            as ``METHOD_OPTION`` (such as ``ties_density``), ``weight_1`` and so on, ``part`` (``"validation"`` or
            ``"test"``), ``scale``, ``value`` and ``below`` (of the maps); and ``evidence``, the folder of evidence.

    Returns:
        A Panel viewer; the last line of a cell shows it.

    Raises:
        OptionError: A setting out of range.

    Example:
        >>> page = merge_page(method="ties", ties_density=0.5, experts=["footwear", "low digits"])
        >>> page.state.asked.options[0]
        ('density', 0.5)
    """
    from orthokit_widgets.merge_view import MergePage

    return MergePage(**settings)


def momentum_page(**settings: Any) -> MomentumPage:
    """The page "Momentum gap": sliders for momentum, noise, rank and size, and what they do to the spectrum.

    Args:
        **settings: Where to start: ``beta``, ``sigma``, ``rank``, ``size``, ``order``, ``noise``, ``seed``.

    Returns:
        A Panel viewer; the last line of a cell shows it.

    Raises:
        OptionError: A setting out of range.

    Example:
        >>> page = momentum_page(beta=0.95, size=40)
        >>> round(page.state.wait()["values"]["samples"])
        39
    """
    from orthokit_widgets.momentum_view import MomentumPage

    return MomentumPage(**settings)


def race_page(**settings: Any) -> RacePage:
    """The page "Optimizer race": several optimizers train side by side on equal batches, with spectra and drift.

    Args:
        **settings: Where to start: ``racers`` (a list of names from ``orthokit.lab.contestants()``), ``track``,
            ``steps``, ``seed``, and for each racer ``rate_<name>``, its learning rate over the one tuned for it.

    Returns:
        A Panel viewer; the last line of a cell shows it.

    Raises:
        OptionError: A setting out of range.

    Example:
        >>> page = race_page(racers=["adamw", "muon_pre"], track="cnn", steps=50)
        >>> page.state.sentence
        'Ready: press Start.'
    """
    from orthokit_widgets.race_view import RacePage

    return RacePage(**settings)


def training_page(**settings: Any) -> TrainingPage:
    """The page "Live training": start, pause and stop a small training and watch its spectra.

    Args:
        **settings: Where to start: ``optimizer``, ``order``, ``momentum``, ``lr``, ``model``, ``data``, ``steps``,
            ``seed``, ``budget``; and ``root``, the folder of runs.

    Returns:
        A Panel viewer; the last line of a cell shows it.

    Raises:
        OptionError: A setting out of range.

    Example:
        >>> page = training_page(model="cnn", data="digits", steps=50)
        >>> page.state.status
        'ready'
    """
    from orthokit_widgets.training_view import TrainingPage

    return TrainingPage(**settings)
