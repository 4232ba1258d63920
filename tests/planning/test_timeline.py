"""Tests the page and the trace of a simulated step."""

import json
import re

import pytest
from programs import LOOP, SPARSE, START, WHILE, op, program, run

from llada_jax.planning import timeline


@pytest.fixture(scope="module")
def step():
    """Returns a step: two instructions around a transfer, and a loop of three iterations of a microsecond."""
    module = program(
        f"""
        %p = f32[250]{{0}} parameter(0)
        {START}
        %e = f32[250]{{0}} add(%p, %p), {op("jvp()/closed_call/feed_forward/mul", 1000)}
        %d = f32[1000]{{0}} call-done(%s)
        {WHILE}
        %f = f32[250]{{0}} add(%p, %p), {op("optimizer/</script>", 500)}
        """,
        SPARSE + LOOP.replace("LIMIT", "%n = s32[] constant(3)"),
    )
    return module, *run(module)


def test_the_page_holds_the_step_and_needs_nothing_else(step):
    module, block, found = step
    record = found | {"topology": "v5e:2x2", "kernel_share": 0.5, "estimated_tokens_per_second": 1.0}
    record |= {"estimated_mfu": 0.5, "estimated_recipe_days": 1.0, "estimated_recipe_chip_hours": 1.0}
    record["estimated_products"]["share_of_peak"] = 0.0
    page = timeline.html(record, module, block)
    assert not re.search(r"https?://|<link|src=", page)
    assert page.count("</script>") == 1  # The name of an instruction cannot end the script.
    data = json.loads(re.search(r"const data = (.*);\n", page)[1])
    assert data["seconds"] == pytest.approx(6.5e-6) and data["times"] == found["estimated_parts"]
    entry = data["blocks"][data["entry"]]["rows"]
    (loop,) = [row for row in entry if row[7] >= 0]
    assert loop[1:3] == [3.0, 3.0] and loop[8] == 3
    assert data["blocks"][loop[7]]["seconds"] == pytest.approx(1e-6)


def test_the_trace_has_every_iteration(step):
    module, block, _ = step
    events = [event for event in json.loads(timeline.trace(module, block))["traceEvents"] if event["ph"] == "X"]
    assert [(event["ts"], event["dur"]) for event in events if event["name"] == "y"] == [(3, 1), (4, 1), (5, 1)]
    (transfer,) = [event for event in events if event["tid"] == 1]
    assert (transfer["name"], transfer["ts"], transfer["dur"]) == ("s", 0, 3)
    last = max(events, key=lambda event: event["ts"] + event["dur"])
    assert (last["name"], last["ts"] + last["dur"]) == ("f", 6.5)
