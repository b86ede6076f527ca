"""The paper's instability as a negative control (DMD2, section 4.2): the critic has to keep up with the student."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.build import make_engine, make_feed, make_metrics, make_samples, student_sampler
from fewstep.recipe import load_recipe

RECIPES = Path(__file__).resolve().parents[1] / "jobs" / "recipes"
STUDENT_UPDATES = 50
OPTIM = "{lr: 3e-4, betas: [0.9, 0.999], warmup_steps: 20}"


@pytest.mark.parametrize(("ttur", "collapses"), [(1, True), pytest.param(5, False, marks=pytest.mark.slow)])
def test_one_critic_update_a_student_update_at_equal_rates_collapses_and_five_do_not(tmp_path, ttur, collapses):
    recipe = load_recipe(
        [
            f"method.critic_updates_per_student_update={ttur}",
            *(f"optim.{role}={OPTIM}" for role in ("student", "fake", "disc")),
            f"train={{steps: {ttur * STUDENT_UPDATES}, batch: 32, report_every: 10, save_every: 10}}",
            "evaluate.metrics=[fd_fashion]",
        ],
        RECIPES,
        "fashion_mnist",
    )
    with make_feed(recipe.data, recipe.seed) as feed:
        engine = make_engine(recipe, feed)
        reports = list(engine.run())
    assert reports[-1].metrics["updates/student"] == STUDENT_UPDATES
    alarms = [event.step for report in reports for event in report.events if event.kind == "collapse"]
    assert (len(alarms) == 1 and alarms[0] <= 40) if collapses else not alarms
    [fd_fashion] = make_metrics(recipe)
    score = fd_fashion(make_samples(student_sampler(recipe.method, engine.sampling), images=1000))
    assert score.value > 14 if collapses else score.value < 8, score
