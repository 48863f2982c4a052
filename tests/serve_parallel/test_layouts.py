"""A model divided among processes gives the bits of one process, for every dtype and feature, and
sends what docs/scale.md says.

Regression: a token or logit that changes with the layout; loaded weights of other processes.
"""

import json
from pathlib import Path
from typing import Any

import pytest

import lowlat
from lowlat.attention.cache import PAGE_SIZE
from lowlat.config.serving_layout import ServingLayout
from lowlat.ops import native
from lowlat.plan.serving_stages import serving_stages
from tests.train_parallel.processes import run

from .cases import CASES, TRAFFIC_PROMPT, TRAFFIC_TOKENS, outcome, stored_tokens

if not native.available():
    pytest.skip(native.reason(), allow_module_level=True)

PROGRAM = str(Path(__file__).with_name("program.py"))
KEYS = ("tokens", "logits", "nll", "preemptions")
LAYOUTS = {
    "pipeline=2": 2,
    "tensor=2": 2,
    "expert=2": 2,
    "tensor=2,pipeline=2": 4,
    "tensor=2,expert=4": 4,
    "tensor=4,expert=2": 4,
}
APART = {
    "prefill=1": tuple(name for name, case in CASES.items() if not case.is_stored),
    "tensor=2,prefill=1": ("small-cache", "int8", "lora", "sparse"),
}
"""Layouts with prefill processes, and their cases."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of all cases."""
    folder = tmp_path_factory.mktemp("models")
    for name, case in CASES.items():
        case.write(folder / name)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Any]]:
    """Results of one process."""
    found = {}
    threads = native.threads()
    native.use_threads(1)
    try:
        for name, case in CASES.items():
            model = lowlat.load(**case.arguments(folder / name))
            found[name] = outcome(model, case)
            found[name]["parameters"] = sum(each.numel() for each in model.transformer.parameters())
            if case.is_stored:
                found[name]["stored"] = stored_tokens(model)["tokens"]
            model.free()
    finally:
        native.use_threads(threads)
    assert found["small-cache"]["preemptions"] > 0
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_those_of_one_process(
    folder: Path, alone: dict[str, dict[str, Any]], layout: str
) -> None:
    sizes = ServingLayout.parse(layout)
    names = [name for name, case in CASES.items() if case.allows(sizes)]
    run(LAYOUTS[layout], [PROGRAM, str(folder), layout, *names])
    differing = []
    for name in names:
        found = json.loads((folder / name / f"{layout}.json").read_text())
        differing += [f"{name}: {key}" for key in KEYS if found[key] != alone[name][key]]
        assert found["parameters"] < alone[name]["parameters"], name
        if CASES[name].is_stored:
            first, second = found["stored"]
            assert first["tokens"] == second["tokens"] == alone[name]["stored"], name
            assert second["cached"] >= 2 * PAGE_SIZE, name
    assert not differing
    if "dense" in names:
        found = json.loads((folder / "dense" / f"{layout}.json").read_text())
        assert found["traffic"] == expected_traffic(layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", APART)
def test_prefill_processes_change_no_token(
    folder: Path, alone: dict[str, dict[str, Any]], layout: str
) -> None:
    sizes = ServingLayout.parse(layout)
    names = [name for name in APART[layout] if CASES[name].allows(sizes)]
    run(sizes.processes, [PROGRAM, str(folder), layout, *names])
    differing = []
    for name in names:
        found = json.loads((folder / name / f"{layout}.json").read_text())
        differing += [f"{name}: {key}" for key in KEYS[:3] if found[key] != alone[name][key]]
        first, second = found["transferred"]
        assert first > 0, name
        # What is in process 0's prefix cache is not sent again.
        assert second == first or CASES[name].cache_bytes is not None, name
    assert not differing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "names"),
    {
        "expert=2": ("mtp-moe", "small-cache", "int8", "int4", "gguf", "sparse"),
        "tensor=2,pipeline=2": ("mtp-moe", "small-cache", "gguf"),
        "expert=2,prefill=1": ("mtp-moe", "int4"),
    }.items(),
)
def test_tokens_do_not_change_while_experts_move(
    folder: Path, alone: dict[str, dict[str, Any]], layout: str, names: tuple[str, ...]
) -> None:
    """EPLB with replicas places experts again every three steps, within and between requests."""
    sizes = ServingLayout.parse(layout)
    run(sizes.processes, [PROGRAM, str(folder), f"{layout}+eplb", *names])
    keys = KEYS[:3] if sizes.prefill else KEYS
    for name in names:
        found = json.loads((folder / name / f"{layout}+eplb.json").read_text())
        assert found["placements"] > 9 and found["moved"] > 0, name
        config = CASES[name].config
        layers = [n for n in range(config.num_hidden_layers) if config.is_moe_layer(n)]
        tokens = {int(layer): sum(counts) for layer, counts in found["loads"].items()}
        assert sorted(tokens) == layers and len(set(tokens.values())) == 1, name
        assert [key for key in keys if found[key] != alone[name][key]] == [], name


def expected_traffic(layout: str) -> dict[str, int]:
    """Messages and bytes of process 0 by the formula of docs/scale.md, for one process per stage or
    one stage.
    """
    config, sizes = CASES["dense"].config, ServingLayout.parse(layout)
    steps, tokens, others = TRAFFIC_TOKENS, TRAFFIC_PROMPT + TRAFFIC_TOKENS - 1, sizes.processes - 1
    messages, sent = steps * others, steps * others * 4096
    first = serving_stages(config, sizes.pipeline)[0]
    if sizes.pipeline > 1:
        messages, sent = messages + steps, sent + tokens * config.hidden_size * 2
    if sizes.tensor > 1:
        peers, attention = sizes.tensor - 1, config.attention_of(0)
        width = attention.num_attention_heads * attention.v_head_dim
        width += 2 * config.hidden_size + config.intermediate_size
        messages += peers * steps * 4 * len(first.layers)
        sent += peers * tokens * len(first.layers) * width * 2 // sizes.tensor
        if first.is_last:
            messages += peers * steps
            sent += peers * steps * config.vocab_size * 4 // sizes.tensor
    return {"messages": messages, "bytes": sent}
