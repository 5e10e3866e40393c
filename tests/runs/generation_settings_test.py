"""Settings of generation: ranges, the model's defaults, and settings that a mode does not read."""

import types

import pytest

from nanoflax.config import GenerationDefaults, ModelConfig
from nanoflax.errors import UserError
from nanoflax.runs import GenerationSettings, Run
from nanoflax.runs.generation import READ, model_settings, used_of_model

OFF = dict(top_k=0, top_p=1.0, min_p=0.0, top_h=0, typical_p=1, eta_cutoff=0, repetition_penalty=1.0, beams=0)
ON = dict(top_k=5, top_p=0.5, min_p=0.1, seed=3, length_penalty=2.0, stop=["x"], max_new_tokens=3,
          repetition_penalty=1.5, top_h=0.3, typical_p=0.4, epsilon_cutoff=0.01, eta_cutoff=0.02)  # fmt: skip
MODES = {"sampling": dict(temperature=0.7), "temperature=0": dict(temperature=0.0), "beams": dict(beams=2)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ON)
def test_what_a_mode_does_not_read_is_refused_and_what_it_reads_is_not(mode, name):
    given = MODES[mode] | {name: ON[name]}
    for generation in (None, GenerationDefaults()):  # before the model is opened, and after
        if name in READ[mode]:
            assert getattr(GenerationSettings.of(given, {}, generation), name) == ON[name]
            continue
        with pytest.raises(
            UserError, match=f"--{name}={ON[name]}: not read with --"[: -2 if mode == "sampling" else 99]
        ):
            GenerationSettings.of(given, {}, generation, prefix="--")
        GenerationSettings.of(MODES[mode] | {name: OFF[name]} if name in OFF else MODES[mode], {}, generation)


def test_beams_do_not_sample():
    with pytest.raises(UserError, match="temperature=0.5: not read with beams=2"):
        GenerationSettings.of(dict(beams=2, temperature=0.5))
    assert GenerationSettings.of(dict(beams=2, temperature=0)).beams == 2


@pytest.mark.parametrize("given, words", [
    (dict(temperature=-1), "--temperature=-1 must be at least 0"), (dict(temperature=float("nan")), "temperature=nan"),
    (dict(top_k=-1), "--top_k=-1 must be at least 0"), (dict(top_k=2.5), "--top_k=2.5 must be an integer"),
    (dict(top_p=0.0), "--top_p=0.0 must be in (0, 1]"), (dict(min_p=2.0), "--min_p=2.0 must be in [0, 1]"),
    (dict(repetition_penalty=0.0), "--repetition_penalty=0.0 must be positive"),
    (dict(length_penalty=float("nan")), "--length_penalty=nan must be"),
    (dict(max_new_tokens=-1), "--max_new_tokens=-1 must be at least 1"), (dict(beams=-1), "--beams=-1 must be"),
    (dict(stop=3), "--stop=3 must be a text or a list"),
    (dict(seed=-1), "--seed=-1 must be"), (dict(tempreature=1), "tempreature: not a setting of generation"),
])  # fmt: skip
def test_ranges_are_checked_without_a_model(given, words):
    with pytest.raises(UserError) as caught:
        GenerationSettings.of(given, prefix="--")
    assert words in str(caught.value)


def test_the_models_settings_are_defaults():
    of = lambda given, **own: GenerationSettings.of(given, {}, GenerationDefaults(**own))
    assert vars(of({})) == vars(GenerationSettings(stop=()))
    assert (of({}, temperature=0.6, top_p=0.9).temperature, of({}, temperature=0.6).top_k) == (0.6, 50)
    assert of({}, do_sample=True).temperature == 1.0 and of({}, do_sample=False, temperature=0.6).temperature == 0
    found = of({}, num_beams=4, length_penalty=2.0, stop_strings=("\n",), repetition_penalty=1.2)
    assert (found.beams, found.length_penalty, found.stop, found.repetition_penalty) == (4, 2.0, ("\n",), 1.2)
    assert of(dict(top_k=3), num_beams=4).beams == 0  # sampling was asked for
    assert of(dict(length_penalty=3.0), num_beams=4).length_penalty == 3.0
    with pytest.raises(UserError, match="top_k=3: not read with temperature=0"):
        of(dict(top_k=3), do_sample=False)
    with pytest.raises(UserError, match="do_sample with num_beams=4"):
        of({}, do_sample=True, num_beams=4)
    assert of(dict(beams=2), do_sample=True, num_beams=4).beams == 2
    own = GenerationDefaults(do_sample=True, top_p=0.9, repetition_penalty=1.2)
    assert used_of_model({}, own) == "temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.2"
    assert used_of_model(dict(top_k=3, temperature=0.5), own) == "top_p=0.9, repetition_penalty=1.2"
    assert used_of_model(dict(beams=2), own) == "repetition_penalty=1.2"


def test_the_largest_length_is_given_the_models_or_a_hundred():
    limit = lambda given, architecture="decoder", **own: GenerationSettings.of(given).limit(
        ModelConfig(context=200, architecture=architecture, generation=GenerationDefaults(**own)), [[1] * 30]
    )
    assert (limit({}), limit({"max_new_tokens": 500}), limit({}, max_new_tokens=7)) == (100, 500, 7)
    assert (limit({}, max_length=50), limit({}, max_length=10), limit({}, max_length=900)) == (20, 1, 170)
    assert limit({}, "encoder_decoder", max_length=50) == 49


def test_a_classifier_reads_no_settings():
    config = types.SimpleNamespace(task=types.SimpleNamespace(kind="classify"))
    classifier = types.SimpleNamespace(task=types.SimpleNamespace(prompt=None), config=config)
    with pytest.raises(UserError, match="stop=.'x'.: not read by task.kind='classify'"):
        Run.predict(classifier, "a text", stop=["x"])


def test_filters_of_the_model_without_effect_do_not_ask_for_sampling():
    assert model_settings(GenerationDefaults(typical_p=1.0, epsilon_cutoff=0.0, top_h=0.0)) == {}
    assert model_settings(GenerationDefaults(typical_p=0.9)) == {"temperature": 1.0, "top_k": 50, "typical_p": 0.9}
