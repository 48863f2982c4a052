"""minnow: the trained model that comes with lowlat, real and without a download."""

import math
from collections import Counter

import pytest

import lowlat
from lowlat.checkpoint.fetch.model_names import BUNDLED_MODELS, resolve
from lowlat.config.model import MLAConfig
from lowlat.generate.model import Model

MINNOW = BUNDLED_MODELS["minnow"]
PROSE = (
    "The house stood at the end of a long road, and in the evening the light of the sun came "
    "through the trees and fell upon the windows. There was nobody in the garden. She opened the "
    "door, and looked for some time at the letter which had been left for her upon the table, "
    "before she could bring herself to read it."
)


@pytest.fixture(scope="module")
def minnow() -> Model:
    return lowlat.load("minnow")


def test_it_is_bundled_and_small(minnow: Model) -> None:
    assert resolve("minnow") == MINNOW
    assert sum(file.stat().st_size for file in MINNOW.glob("*.safetensors")) <= 16_000_000
    config = minnow.config
    assert config.model_type == "deepseek_v3"
    assert isinstance(config.attention, MLAConfig)
    assert config.moe is not None
    assert config.num_nextn_predict_layers == 1


def test_it_has_learned_english(minnow: Model) -> None:
    """Prose that it has not seen costs far less than its vocabulary's 13 bits a token; text with
    the same words in another order costs more.
    """
    words = sorted(PROSE.split())
    told, sorted_words = (
        math.log2(minnow.perplexity(text).perplexity) for text in (PROSE, " ".join(words))
    )
    assert told < 7.0
    assert sorted_words > told + 1.0


def test_its_drafts_are_taken_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["It is a truth", "The population of the country is", "In the beginning"]
    found: list[object] = []
    for speculates in (True, False):
        model = lowlat.load("minnow", speculates=speculates)
        counts = Counter[str]()
        monkeypatch.setattr(
            model.engine.recorder, "verified", lambda counts=counts, **own: counts.update(own)
        )
        if model.engine.speculator is not None:
            # whether they pay depends on the machine
            monkeypatch.setattr(
                model.engine.speculator.policy,
                "choose",
                lambda most: {sequence: min(2, left) for sequence, left in most.items()},
            )
        found.append(model.generate_many(prompts, max_tokens=64, temperature=0.0))
        assert (counts["drafted"] > 0) == speculates
        assert counts["accepted"] >= 0.2 * counts["drafted"]
    assert found[0] == found[1]
