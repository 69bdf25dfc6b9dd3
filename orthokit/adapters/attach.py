"""Put adapters into a model, merge them into it, or take them off again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from orthokit.adapters.base import AdapterConfig, AdapterLayer, PartConfig
from orthokit.adapters.layer import AdaptedLayer
from orthokit.adapters.targets import (
    Targets,
    candidates,
    check_layers,
    chosen_layers,
    forget_trained,
    keep_trained,
    shared_weights,
    trained_beside,
    trained_modules,
    unfit,
    why_not,
    within,
)
from orthokit.errors import OptionError, ParameterError, unknown_name

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["adapted_layers", "attach", "detach", "merge", "table", "unmerge"]

# Kept on the model, so that copies and pickles have them too: the names of the parameters that attach froze, and the
# layers that it left without an adapter, with the reason.
_FROZEN, _MISFITS = "_frozen_for_adapters", "_without_adapters"


def attach(
    model: nn.Module,
    config: AdapterConfig,
    *,
    targets: Targets = "linear",
    name: str = "default",
    train: str | Sequence[str] = (),
    misfits: str = "refuse",
    freeze: bool | None = None,
    keep_base: bool = True,
    track_spectrum: bool = True,
) -> nn.Module:
    """Put adapters on layers of ``model``, in place; the model computes what it did before.

    Args:
        model: Any module. A bare layer is not changed; its adapted layer is returned.
        config: The adapter and its options, such as ``OFT(block_size=32)``.
        targets: ``"linear"`` (default): every linear layer, GPT-2's transposed ones included, that
            ``orthokit.matrices`` counts among the matrices, so not the output head. ``"conv"``, ``"embedding"`` or
            ``"all"``: layers of these kinds. Or shell patterns of module names, such as ``"blocks.*.attn.?"``, or a
            function of the name: every layer they match, the head included.
        name: Of the adapter; default ``"default"``. A layer that has adapters already gets another one, which acts
            after them, closest to the weight. POET stands alone.
        train: Shell patterns of names of modules that are trained as they are beside the adapters, such as the fresh
            head of a classifier: they get none and are not frozen. :func:`save` keeps their weights with the adapters;
            :func:`detach` does not undo their training. Default: none.
        misfits: What to do with layers among the targets that the options do not suit, such as a width that the block
            size does not divide. ``"refuse"`` (default): an error, which offers sizes that do. ``"leave"``: they stay
            as they are, frozen, and :func:`table` says why; not for POET, which has a rule for them.
        freeze: Freeze every parameter of the model that is not an adapter's, until the adapters are merged or taken
            off. Default ``None``: yes, but for POET, with which the rest of the model trains.
        keep_base: POET: keep a copy of each weight, so that :func:`detach` can restore it; default ``True``. Other
            adapters never change the weight.
        track_spectrum: POET: keep the initial singular values for ``spectrum_report``; default ``True``.

    Returns:
        ``model``; :func:`table` says what was adapted, and why the rest was not.

    Raises:
        ParameterError: Nothing matched, or a layer cannot be adapted, carries hooks, or (for POET) shares its weight
            with another. Nothing was changed.
        OptionError: ``config`` is no adapter or does not suit a layer (with ``"leave"``: any layer), the name is taken,
            or ``targets`` has the wrong form. Nothing was changed.
        UnknownNameError: Another word for ``misfits``.
        DtypeError: A weight is not a real floating tensor.

    Example:
        >>> from orthokit.adapters import OFT
        >>> model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 16))
        >>> _ = attach(model, OFT(block_size=4), targets="1")
        >>> [type(layer).__name__ for layer in model]
        ['Embedding', 'AdaptedLayer', 'LayerNorm', 'Linear']
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['1.adapters.default.generator']
    """
    if not isinstance(config, AdapterConfig):
        raise OptionError(f"config must be an adapter such as OFT(block_size=32); got {type(config).__name__}.")
    if misfits not in ("refuse", "leave"):
        raise unknown_name("treatment of misfits", misfits, ("refuse", "leave"))
    beside = trained_modules(model, train)
    chosen = chosen_layers(model, targets, config, without=beside)
    check_layers(model, chosen, config)
    if isinstance(config, PartConfig):
        whole = _attach_parts(
            model, chosen, config, name=name, freeze=freeze is None or freeze, beside=beside, leave=misfits == "leave"
        )
        return keep_trained(whole, beside)
    options = {"keep_base": keep_base, "track_spectrum": track_spectrum}
    # All are made before the first is put in: an error leaves the model as it was.
    adapted = {
        layer: config.wrap(layer, name=path, stream=stream, **options).train(layer.training)
        for stream, (path, layer) in enumerate(chosen.items())
    }
    if freeze:
        _freeze(model, {id(p) for new in adapted.values() for p in new.parameters()}, beside)
    return keep_trained(_replace(model, adapted), beside)


def _attach_parts(
    model: nn.Module,
    chosen: dict[str, nn.Module],
    config: PartConfig,
    *,
    name: str,
    freeze: bool,
    beside: Sequence[str],
    leave: bool,
) -> nn.Module:
    flags = {id(p): p.requires_grad for p in model.parameters()}
    new: dict[nn.Module, nn.Module] = {}
    extended: list[AdaptedLayer] = []
    left: dict[str, str] = {}
    try:
        for stream, (path, layer) in enumerate(chosen.items()):
            adapted = layer if isinstance(layer, AdaptedLayer) else AdaptedLayer(layer, name=path)
            if layer is not adapted:
                # Of before the first layer was frozen: two of them may share a weight.
                adapted.trained_before = [flags[id(p)] for p in layer.parameters()]
            try:
                adapted.add(name, config, stream=stream)
            except OptionError as error:
                if not leave or name in adapted.adapters:
                    raise
                left[path] = str(error)
                for p in layer.parameters():
                    p.requires_grad_(flags.get(id(p), p.requires_grad))
                continue
            if isinstance(layer, AdaptedLayer):
                extended.append(layer)
            else:
                new[layer] = adapted
        if not new and not extended:
            raise OptionError(f"the options suit no layer among the targets. {next(iter(left.values()))}")
    except Exception:
        for layer in extended:
            layer.remove(name)
        for p in model.parameters():
            p.requires_grad_(flags.get(id(p), p.requires_grad))
        raise
    if freeze:
        every = [*new.values(), *adapted_layers(model, missing_ok=True).values()]
        parts = {id(p) for layer in every if isinstance(layer, AdaptedLayer) for p in layer.adapters.parameters()}
        _freeze(model, parts, beside)
    model.__dict__[_MISFITS] = model.__dict__.get(_MISFITS, {}) | left
    return _replace(model, new)


def merge(model: nn.Module, *, keep: bool = False, untie: bool = False) -> nn.Module:
    """Put the adapters into the weights, in place: the model computes the same, without them.

    Args:
        model: A model with adapters. A bare adapted layer is not changed; its plain layer is returned.
        keep: ``False`` (default): every adapted layer becomes the plain one that computes the same, a quantised one a
            layer of full precision. ``True``: the layers stay, with the adapters in their weights, until
            :func:`unmerge`; costs a copy of the weights.
        untie: Where a weight is shared, give the adapted layer one of its own; default ``False``: an error.

    Returns:
        ``model``. An optimizer made before still holds the adapters' parameters: make a new one.

    Raises:
        ParameterError: The model has no adapter, some are not active (they would be lost), a weight is shared, or
            ``keep`` is asked for with POET or a quantised layer. Nothing was changed.
        NonFiniteError: An adapter holds NaN or infinity.

    Example:
        >>> import torch
        >>> from orthokit.adapters import OFT
        >>> model = attach(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), OFT(block_size=4))
        >>> _ = nn.init.constant_(model[0].adapters["default"].generator, 0.5)
        >>> x = torch.ones(1, 8)
        >>> before = model(x)
        >>> torch.allclose(merge(model)(x), before, atol=1e-6), [type(layer).__name__ for layer in model]
        (True, ['Linear', 'ReLU', 'Linear'])

    Numerics:
        Rotations and products in float64, rounded once to the type of the weight.
    """
    layers = adapted_layers(model)
    shared = {} if untie else shared_weights(model)
    for name, layer in layers.items():
        if not isinstance(layer, AdaptedLayer):
            if keep:
                raise ParameterError(
                    f"{name!r} is adapted by POET, which merges by itself; call merge with keep=False."
                )
            continue
        lost = [one for one in layer.adapters if one not in layer.active]
        if (lost and not keep) or layer.disabled:
            found = "is disabled" if layer.disabled else f"has adapters that are not active: {lost}"
            raise ParameterError(f"{name!r} {found}; activate them with set_adapters, or take them off with detach.")
        if name in shared:
            leaf, places = shared[name]
            raise ParameterError(
                f"{name!r} shares its {leaf} ({places}); merge with untie=True gives it one of its own."
            )
    if keep:
        return _fold(layers, model)
    done = {layer: layer.merged() for layer in layers.values()}
    return _thaw(_replace(model, done))


def _fold(layers: dict[str, AdapterLayer], model: nn.Module) -> nn.Module:
    done: list[AdaptedLayer] = []
    try:
        for layer in layers.values():
            layer.fold()  # type: ignore[attr-defined]
            done.append(layer)  # type: ignore[arg-type]
    except Exception:
        for layer in done:
            layer.unfold()
        raise
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo :func:`merge` with ``keep=True``: weights have the bits they had before, adapters act beside them.

    Args:
        model: A model with adapters.

    Returns:
        ``model``.

    Raises:
        ParameterError: The model has no adapter.
    """
    for layer in adapted_layers(model).values():
        if isinstance(layer, AdaptedLayer):
            layer.unfold()
    return model


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take adapters off: the layers are again what they were before :func:`attach`, weights and biases alike.

    Args:
        model: A model with adapters (POET's attached with ``keep_base=True``).
        name: One adapter of several; default ``None``: all. A layer without any is plain again.

    Returns:
        ``model``.

    Raises:
        ParameterError: The model has no such adapter, it is merged with ``keep=True``, or a weight was not kept.
            Nothing was changed.

    Example:
        >>> import torch
        >>> from orthokit.adapters import POET
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> before = model[0].weight.clone()
        >>> torch.equal(detach(attach(model, POET(block_size=4, init="normalised")))[0].weight, before)
        True
    """
    layers = adapted_layers(model)
    if name is None:
        bare = {layer: layer.original() for layer in layers.values()}
        for layer in bare:
            layer.release()
        return _thaw(_replace(model, bare))
    having = [layer for layer in layers.values() if isinstance(layer, AdaptedLayer) and name in layer.adapters]
    if not having:
        there = sorted({one for layer in layers.values() for one in getattr(layer, "adapters", ())})
        raise ParameterError(f"no layer of {type(model).__name__} has an adapter {name!r}; there are {there}.")
    bare = {layer: layer.original() for layer in having if len(layer.adapters) == 1}
    for layer in having:
        layer.remove(name)
        if layer in bare:
            layer.release()
    model = _replace(model, bare)
    return model if adapted_layers(model, missing_ok=True) else _thaw(model)


def adapted_layers(model: nn.Module, *, missing_ok: bool = False) -> dict[str, AdapterLayer]:
    """The adapted layers of ``model`` by name.

    Args:
        model: Any module.
        missing_ok: Return an empty dict where there is none, instead of raising; default ``False``.

    Returns:
        Name to layer, in the order of the model.

    Raises:
        ParameterError: There is none.
    """
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, AdapterLayer)}
    if not found and not missing_ok:
        raise ParameterError(f"{type(model).__name__} has no adapter; call adapters.attach(model, ...) first.")
    return found


def table(model: nn.Module) -> pd.DataFrame:
    """One row per layer that an adapter could sit on: adapted or not, how, and why not.

    Args:
        model: Any module.

    Returns:
        Columns ``layer``, ``shape`` ``(out, in)`` (words and width of an embedding), ``adapter`` (``"none"`` where
        there is none), ``trainable`` (numbers the adapters train), ``weights`` (entries of the weight) and ``detail``.

    Example:
        >>> from orthokit.adapters import POET
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6))
        >>> table(attach(model, POET(block_size=4)))[["layer", "adapter", "trainable"]].values.tolist()
        [['0', 'POET', 24], ['2', 'POET', 19]]
    """
    import pandas as pd

    from orthokit.adapters.sites import kind_of

    reasons, shared = why_not(model) | model.__dict__.get(_MISFITS, {}), shared_weights(model)
    reasons |= {name: "trained as it is" for name, _ in candidates(model) if within(name, trained_beside(model))}
    rows: list[dict[str, Any]] = []
    for name, layer in candidates(model):
        tied = f"shares its weight: {shared[name][1]}" if name in shared else ""
        if isinstance(layer, AdapterLayer):
            found = layer.describe()
            shape = (layer.out_features, layer.in_features)
            patch = layer.site.patch / layer.site.groups if isinstance(layer, AdaptedLayer) else 1
            found["detail"] = "; ".join(text for text in (found["detail"], tied) if text)
        else:
            kind = kind_of(layer)
            shape: Any = kind.shape(layer) if kind else (layer.out_features, layer.in_features)
            patch = kind.patch(layer) / getattr(layer, "groups", 1) if kind else 1
            why = reasons.get(name) or (unfit(layer, None) if kind is None else None) or tied or "not among the targets"
            found = {"adapter": "none", "trainable": 0, "detail": why}
        rows.append({"layer": name, "shape": shape, "weights": round(shape[0] * shape[1] * patch), **found})
    return pd.DataFrame(rows, columns=["layer", "shape", "adapter", "trainable", "weights", "detail"])


def _freeze(model: nn.Module, kept: set[int], beside: Sequence[str]) -> None:
    """Freeze what is neither among ``kept`` nor trained beside, and remember which parameters that were."""
    names = set(model.__dict__.get(_FROZEN, ()))
    kept = kept | {id(p) for one in (*beside, *trained_beside(model)) for p in model.get_submodule(one).parameters()}
    for name, p in model.named_parameters():
        if id(p) not in kept and p.requires_grad:
            p.requires_grad_(False)
            names.add(name)
    model.__dict__[_FROZEN] = sorted(names)


def _thaw(model: nn.Module) -> nn.Module:
    """Give back their gradients to the parameters that :func:`_freeze` froze."""
    names = set(model.__dict__.pop(_FROZEN, ()))
    model.__dict__.pop(_MISFITS, None)
    forget_trained(model)
    for name, p in model.named_parameters():
        if name in names:
            p.requires_grad_(True)
    return model


def _replace(model: nn.Module, new: Mapping[Any, nn.Module]) -> nn.Module:
    """Put layers in the places of others, wherever they are registered."""
    if model in new:
        return new[model]
    for parent in list(model.modules()):
        # Not named_children(), which names a child once: a layer may stand in two places of one parent.
        for key, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, key, new[child])
    return model
