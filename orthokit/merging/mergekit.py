"""Recipes written for mergekit, read for the methods that both have."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orthokit.errors import MissingExtraError, OptionError, unknown_name
from orthokit.merging.files import FilesReport, merge_by_recipes
from orthokit.merging.recipe import Recipe

__all__ = ["MergekitRecipe", "read_mergekit"]

# What each method may be told, as mergekit names it, with its default there; None: it has to be given.
_EACH, _ALL = ("weight", "density"), ("normalize", "lambda", "rescale", "int8_mask", "t", "filter_wise")
_DELTAS: dict[str, Any] = {"weight": None, "lambda": 1.0, "int8_mask": False}
_METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": None, "normalize": True},
    "task_arithmetic": {**_DELTAS, "density": 1.0, "normalize": False, "rescale": False},
    "slerp": {"t": None},
    "ties": {**_DELTAS, "density": 1.0, "normalize": True, "rescale": False},
    "dare_linear": {**_DELTAS, "density": 1.0, "normalize": False, "rescale": True},
    "dare_ties": {**_DELTAS, "density": 1.0, "normalize": False, "rescale": True},
    "model_stock": {"filter_wise": False},
}
_TOP = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source")
_REFUSED = {
    "modules": "models of several modules",
    "tokenizer": "a tokenizer of its own",
    "chat_template": "another chat template",
}

# The folder that a stack of layers stands in, by the names that models give it.
_LAYER = re.compile(r"(.*(?:^|\.)(?:layers?|h|blocks?))\.(\d+)\.")


@dataclass(frozen=True)
class MergekitRecipe:
    """What a recipe asks for, in orthokit's terms.

    Args:
        method: As mergekit names it.
        base: The model whose names, configuration and tokenizer the result gets.
        experts: The models that are merged, in the order of the recipe.
        dtype: Of the result; ``None``: the widest of the models.
        notes: What of the recipe makes no difference here, in words.
        settings: Per expert, then of the whole, from the nearest to the farthest, what the recipe sets.
        layers: How many layers the recipe says that the models have; ``None``: it does not say.
    """

    method: str
    base: Path
    experts: tuple[Path, ...]
    dtype: str | None
    notes: tuple[str, ...]
    settings: tuple[tuple[Mapping[str, Any], ...], ...] = field(repr=False)
    layers: int | None = field(repr=False, default=None)

    def options_for(self, name: str, *, position: float = 0.0) -> dict[str, Any]:
        """The options of orthokit's method for one tensor.

        Args:
            name: Of the tensor.
            position: Where its layer lies in the stack, 0 the first and 1 the last; 0 for a tensor of no layer.
        """
        known = _METHODS[self.method]
        each = {key: self._each(key, name, position) for key in _EACH if key in known}
        whole = {key: self._value(key, self.settings[-1], name, position) for key in _ALL if key in known}
        if self.method == "slerp":
            return {"t": whole["t"]}
        if self.method == "model_stock":
            return {"filter_wise": bool(whole["filter_wise"])}
        weights = each["weight"]
        if self.method == "linear":
            return {"weights": weights, "normalize": bool(whole["normalize"])}
        scale, normalize = whole["lambda"], bool(whole["normalize"])
        if self.method == "ties":
            if whole["rescale"]:
                raise OptionError("rescale: true of ties has no counterpart here; take it out of the recipe.")
            return {"weights": weights, "scale": scale, "density": each["density"], "normalize": normalize}
        if normalize and self.method != "dare_ties":
            # By the sum where there is one, as mergekit divides.
            total = sum(weights)
            weights = weights if abs(total) < 1e-8 else [weight / total for weight in weights]
        if self.method == "task_arithmetic":
            return {"weights": weights, "scale": scale}
        if len(set(each["density"])) > 1:
            raise OptionError(
                f"{self.method} takes one density for all experts here; the recipe has {each['density']}."
            )
        options = {"p": 1 - each["density"][0], "rescale": "l1" if whole["rescale"] else "none"}
        signs = {"signs": "ties", "normalize": normalize} if self.method == "dare_ties" else {"normalize": False}
        return {"weights": weights, "scale": scale} | options | signs

    def recipes(self, names: Iterable[str], *, seed: int = 0, report: str = "brief") -> dict[str, Recipe]:
        """What is to be done to each tensor.

        Args:
            names: Of the tensors of the base.
            seed: As of :func:`~orthokit.merging.merge_checkpoints`.
            report: As there.

        Raises:
            OptionError: The recipe takes a part of the layers only, or leaves out what the method needs.
        """
        places = _positions(names)
        deepest = max((count for _, count in places.values()), default=0)
        if self.layers not in (None, deepest):
            raise OptionError(
                f"the recipe takes {self.layers} layers and the model has {deepest}; only whole models can be merged."
            )
        method = "dare" if self.method.startswith("dare") else self.method
        found: dict[str, Recipe] = {}
        alike: dict[str, Recipe] = {}
        for name, (position, _) in places.items():
            options = self.options_for(name, position=position)
            text = json.dumps(options, sort_keys=True)
            if text not in alike:
                weights, scale = options.pop("weights", None), options.pop("scale", None)
                alike[text] = Recipe(method, weights, scale, {}, options, seed, report)
            found[name] = alike[text]
        return found

    def merge(
        self, out: str | os.PathLike[str], *, seed: int = 0, report: str = "brief", **options: Any
    ) -> FilesReport:
        """Merge the models of the recipe into a folder.

        Args:
            out: The folder that is to come.
            seed: Of random choices; default 0.
            report: ``"brief"`` (default) or ``"full"``.
            options: ``dtype``, ``rename``, ``missing``, ``threads``, ``shard_bytes``, ``progress`` and ``resume`` of
                :func:`~orthokit.merging.merge_checkpoints`.

        Returns:
            Its report.
        """
        return merge_by_recipes(
            self.base,
            self.experts,
            out,
            lambda names: self.recipes(names, seed=seed, report=report),
            **{"dtype": self.dtype, **options},
        )

    def _each(self, key: str, name: str, position: float) -> list[float]:
        return [self._value(key, scopes, name, position) for scopes in self.settings[:-1]]

    def _value(self, key: str, scopes: Sequence[Mapping[str, Any]], name: str, position: float) -> Any:
        for scope in scopes:
            if key in scope and (value := _evaluated(key, scope[key], name, position)) is not None:
                return value
        default = _METHODS[self.method][key]
        if default is None:
            raise OptionError(f"{self.method} needs {key}, and the recipe sets none for {name!r}.")
        return default


def read_mergekit(recipe: str | os.PathLike[str]) -> MergekitRecipe:
    """A merge that is written down for mergekit, to be done here.

    Understood are the methods ``linear``, ``task_arithmetic``, ``slerp``, ``ties``, ``dare_linear``, ``dare_ties`` and
    ``model_stock`` over whole models; parameters of the recipe, of a model and of a slice, as one value, as a list of
    filters, or as values to go through from the first layer to the last. What cannot be done is refused in words.

    Args:
        recipe: Path of a YAML file; or the YAML itself, known by a line break.

    Returns:
        The :class:`MergekitRecipe`; ``recipe.merge(out)`` carries it out.

    Raises:
        OptionError: It is no YAML, asks for what only mergekit can do, or contradicts itself.
        UnknownNameError: A method or parameter that orthokit does not have.
        MissingExtraError: PyYAML is not installed.

    Example:
        >>> recipe = read_mergekit('''
        ... merge_method: slerp
        ... base_model: models/a
        ... models: [{model: models/a}, {model: models/b}]
        ... parameters:
        ...   t: [{filter: self_attn, value: [0, 1]}, {value: 0.5}]
        ... ''')
        >>> recipe.options_for("model.layers.1.self_attn.q_proj.weight", position=0.25)
        {'t': 0.25}
        >>> recipe.options_for("model.norm.weight")
        {'t': 0.5}

    Numerics:
        Tensors are merged in float32 or wider whatever ``dtype`` says, which is the type of the result; mergekit
        rounds the models to it before it subtracts them. The two agree to rounding in float32.

    References:
        C. Goddard et al. (2024), Arcee's MergeKit: a toolkit for merging large language models, arXiv 2403.13257.
        Differences: model_stock does not step away from the experts where their changes oppose each other; the random
        masks of dare are drawn from another generator.
    """
    values = _loaded(recipe)
    method = _checked_top(values)
    notes = []
    entries, scopes, depth, base = _entries(values)
    base = base or values.get("base_model")
    named = [(_path(entry.get("model")), entry) for entry in entries]
    start = _path(base) if base is not None else None
    for owner in (*(entry.get("parameters") or {} for _, entry in named), *scopes):
        _check_parameters(method, owner)
        if "int8_mask" in owner:
            notes.append("int8_mask saves memory in mergekit and makes no difference here")
    if method == "linear":
        if start is not None and start not in [path for path, _ in named]:
            named.append((start, {}))  # mergekit adds it, and asks for its weight too
        used = named
    elif start is None:
        raise OptionError(f"{method} needs a base_model, and the recipe names none.")
    elif method == "slerp":
        used = [(start, {}), *[one for one in named if one[0] != start]]
        if len(used) != 2:
            raise OptionError(f"slerp takes the base and one other model; the recipe has {len(used) - 1} others.")
    else:
        used = [one for one in named if one[0] != start]
    if not used:
        raise OptionError("the recipe has no models besides its base.")
    if values.get("dtype") and values.get("out_dtype") not in (None, values["dtype"]):
        notes.append(f"dtype {values['dtype']} of the computation: it is float32 or wider here")
    settings = tuple((entry.get("parameters") or {}, *scopes) for _, entry in used)
    return MergekitRecipe(
        method,
        start or used[0][0],
        tuple(path for path, _ in used),
        values.get("out_dtype") or values.get("dtype"),
        tuple(dict.fromkeys(notes)),
        (*settings, tuple(scopes)),
        depth,
    )


def _loaded(recipe: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as cause:
        raise MissingExtraError("reading mergekit's recipes needs PyYAML: pip install pyyaml.") from cause
    try:
        text = recipe if isinstance(recipe, str) and "\n" in recipe else Path(recipe).read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as cause:
        raise OptionError(f"the recipe cannot be read: {' '.join(str(cause).split())}. Give a YAML file.") from cause
    if not isinstance(values, dict):
        raise OptionError(f"the recipe must be a mapping with merge_method and models; it is {values!r:.60}.")
    return values


def _checked_top(values: Mapping[str, Any]) -> str:
    """The method, once nothing at the top is beyond what can be done here."""
    for key in values:
        if key in _REFUSED:
            raise OptionError(f"the recipe asks for {_REFUSED[key]} ({key}), which only mergekit can do.")
        if key not in _TOP:
            raise unknown_name("entry of the recipe", key, _TOP)
    if values.get("tokenizer_source") not in (None, "base"):
        raise OptionError(
            f"tokenizer_source must be 'base' here, and is {values['tokenizer_source']!r}: rows of the embedding are "
            "not moved. Give the models one vocabulary first, or merge with mergekit."
        )
    if values.get("merge_method") not in _METHODS:
        raise unknown_name("method of mergekit's that orthokit has too", values.get("merge_method"), _METHODS)
    return values["merge_method"]


def _entries(values: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[Any], int | None, Any]:
    """The models, the parameters of all from the nearest to the farthest, the depth and the base of the slice."""
    top = values.get("parameters") or {}
    if bool(values.get("models")) == bool(values.get("slices")):
        raise OptionError("the recipe must have either models or slices, and one of them only.")
    if values.get("models"):
        return _mappings("models", values["models"]), [top], None, None
    slices = _mappings("slices", values["slices"])
    if len(slices) > 1:
        raise OptionError(f"the recipe stacks {len(slices)} slices; only whole models can be merged here.")
    sources = _mappings("sources", slices[0].get("sources"))
    ranges = {tuple(source.get("layer_range") or ()) for source in sources}
    first = next(iter(ranges))
    if len(ranges) > 1 or len(first) != 2 or first[0] != 0:
        raise OptionError(f"the slice takes the layers {sorted(ranges)}; only whole models, from 0 on, can be merged.")
    return sources, [slices[0].get("parameters") or {}, top], int(first[1]), slices[0].get("base_model")


def _mappings(what: str, values: Any) -> list[dict[str, Any]]:
    if not isinstance(values, list) or not values or not all(isinstance(value, dict) for value in values):
        raise OptionError(f"{what} of the recipe must be a list of mappings; it is {values!r:.60}.")
    return values


def _path(model: Any) -> Path:
    if not isinstance(model, str):
        raise OptionError(f"a model of the recipe must be a path; it is {model!r:.60}. Adapters are not read here.")
    if "+" in model and not Path(model).exists():
        raise OptionError(f"the recipe puts an adapter on a model ({model!r}); merge it in and save the model first.")
    return Path(model)


def _check_parameters(method: str, parameters: Any) -> None:
    if not isinstance(parameters, dict):
        raise OptionError(f"parameters of the recipe must be a mapping; they are {parameters!r:.60}.")
    for key in parameters:
        if key not in _METHODS[method]:
            raise unknown_name(f"parameter of {method}", key, _METHODS[method])


def _evaluated(key: str, setting: Any, name: str, position: float) -> Any:
    """What a setting says for a tensor: a value, values along the layers, or the first of filters that fits."""
    cases = [setting] if isinstance(setting, dict) else setting
    if not isinstance(cases, list):
        return _scalar(key, cases)
    if any(isinstance(case, dict) for case in cases):
        for case in cases:
            if not isinstance(case, dict) or "value" not in case:
                raise OptionError(f"each case of {key} must have a value, and a filter or none; got {case!r:.60}.")
            if case.get("filter") in (None, "*") or str(case["filter"]) in name:
                return _evaluated(key, case["value"], name, position)
        return None
    if not cases:
        return None
    values = [_scalar(key, value) for value in cases]
    if any(isinstance(value, bool) for value in values):
        return values[int(position * (len(values) - 1))]
    place = position * (len(values) - 1)
    before = min(int(place), len(values) - 1)
    after = min(before + 1, len(values) - 1)
    return values[before] + (place - before) * (values[after] - values[before])


def _scalar(key: str, value: Any) -> bool | float:
    if isinstance(value, bool):
        return value
    try:
        number = float(value)  # YAML reads 1e-3 as text
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise OptionError(f"{key} of the recipe must be a finite number; it is {value!r:.60}.")
    return number


def _positions(names: Iterable[str]) -> dict[str, tuple[float, int]]:
    """By name, where its layer lies in its stack from 0 to 1, and how many layers that has; 0 and 0 outside."""
    found = {name: _LAYER.match(name) for name in names}
    depths: dict[str, int] = {}
    for layer in filter(None, found.values()):
        depths[layer[1]] = max(depths.get(layer[1], 0), int(layer[2]) + 1)
    places = {}
    for name, layer in found.items():
        depth = depths[layer[1]] if layer else 0
        # A stack of one layer counts as its own end.
        places[name] = ((int(layer[2]) / (depth - 1) if depth > 1 else 1.0) if layer else 0.0, depth)
    return places
