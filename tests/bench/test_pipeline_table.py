"""What the pipeline benchmark makes of its measurements."""

import json

import pytest

from orion.bench.pipeline.plan import MORE_SETTINGS, SETTINGS, UNSHAPED, Setting, System, Window, workload
from orion.bench.pipeline.table import Study
from orion.bench.pipeline.window import Measurement, last_step_loss, tokens_per_s


def test_a_step_has_ended_when_its_last_stage_has_taken_it_and_warm_up_is_not_counted() -> None:
    first, last = [10.0, 12.0, 14.0, 90.0], [11.0, 12.5, 16.0, 91.0]
    assert tokens_per_s([first, last], Window(1, 2), tokens_per_step=100) == pytest.approx(200 / (16.0 - 11.0))
    assert tokens_per_s([last, first], Window(2, 1), tokens_per_step=100) == pytest.approx(100 / (16.0 - 12.5))


def test_a_stage_that_took_too_few_steps_cannot_be_timed() -> None:
    with pytest.raises(ValueError, match="not every stage took 3 inner steps"):
        tokens_per_s([[1.0, 2.0, 3.0], [1.0, 2.0]], Window(1, 2), tokens_per_step=1)


def test_the_loss_is_that_of_the_last_measured_steps_own_tokens() -> None:
    assert last_step_loss([9.0, 9.0, 5.0, 5.0, 1.0, 3.0, 0.0], Window(1, 2), microbatches_per_step=2) == 2.0
    with pytest.raises(ValueError, match="5 losses"):
        last_step_loss([1.0] * 5, Window(1, 2), microbatches_per_step=2)


class Machine:
    """Gets slower with every measurement; Orion is 1.2 times torch, or half of it at 20 Mbit."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, System]] = []

    def measure(self, system: System, setting: Setting) -> Measurement:
        self.asked.append((setting.name, system))
        repetition = self.asked.count((setting.name, system))
        speed = {System.ORION: 0.5 if setting.name == "20" else 1.2}.get(system, 1.0)
        return Measurement(speed * 1000.0 / repetition, cpu_s=0.5, idle_share=0.1, loss=5.0 + repetition)


def test_ratios_are_within_a_repetition_and_every_setting_must_hold() -> None:
    machine, heard = Machine(), []
    settings = [setting for setting in SETTINGS if setting.name in ("20", "20_rtt60")]
    work = workload(quick=False)
    study = Study(work, settings, 3)
    study.run(machine, lambda *one: heard.append(one))
    table = study.table()
    assert [(setting.name, system) for setting, system, _ in heard] == machine.asked
    one_round = machine.asked[: len(machine.asked) // 3]
    assert machine.asked == one_round * 3
    assert one_round == [
        *(("unshaped", system) for system in System),
        ("20", System.ORION),
        ("20_rtt60", System.ORION),
        ("20", System.TORCH_BOUNDARY),
        ("20", System.TORCH),
    ], "what the bar is about comes first"
    assert [row.ratio for row in table.rows] == pytest.approx([1.2, 0.5, 1.2])
    assert table.misses() == ["20: 0.500"]
    told = json.loads(json.dumps(table.as_json()))
    assert told["holds"] is False
    assert told["is_whole"] is True
    unshaped, slow, far = told["settings"]
    assert unshaped["tokens_per_s"] == pytest.approx(
        {"single": 500, "torch_1f1b": 500, "torch_1f1b_boundary": 500, "orion": 600}
    )
    assert unshaped["loss"] == {"single": 7.0, "torch_1f1b": 7.0, "orion": 7.0}
    assert (slow["upload_mbit"], slow["rtt_ms"]) == (20.0, 0.0)
    assert slow["ratio_spread"] == pytest.approx([0.5, 0.5])
    assert slow["tokens_per_s_spread"]["orion"] == pytest.approx([500 / 3, 500])
    assert (far["upload_mbit"], far["rtt_ms"]) == (20.0, 60.0)
    assert far["tokens_per_s"]["single"] == pytest.approx(500), "one process meets no network"
    assert far["tokens_per_s"]["torch_1f1b"] is None
    assert far["loss"]["torch_1f1b"] is None
    assert far["cpu_s_per_1000_tokens"] == {
        "single": 0.5,
        "torch_1f1b": None,
        "torch_1f1b_boundary": None,
        "orion": 0.5,
    }


class BrokenOff(Machine):
    """Ctrl-C, while torch with a boundary is measured at 20 Mbit for the second time."""

    def measure(self, system: System, setting: Setting) -> Measurement:
        one = super().measure(system, setting)
        if self.asked.count(("20", System.TORCH_BOUNDARY)) == 2:
            raise KeyboardInterrupt
        return one


def test_a_study_that_is_broken_off_tells_what_it_has_measured() -> None:
    study = Study(workload(quick=False), [setting for setting in SETTINGS if setting.name in ("20", "100")], 3)
    told = json.loads(json.dumps(study.table().as_json()))
    assert [row["ratio_to_colocated"] for row in told["settings"]] == [None, None, None]
    with pytest.raises(KeyboardInterrupt):
        study.run(BrokenOff(), lambda *_: None)
    table = study.table()
    told = json.loads(json.dumps(table.as_json()))
    assert (told["is_whole"], told["holds"]) == (False, False)
    unshaped, hundred, twenty = told["settings"]
    assert [len(row.ratios) for row in table.rows] == [2, 2, 2]
    assert unshaped["tokens_per_s"]["orion"] == pytest.approx(900)
    assert twenty["tokens_per_s"]["torch_1f1b_boundary"] == pytest.approx(1000)
    assert twenty["tokens_per_s"]["torch_1f1b"] == pytest.approx(1000)
    assert hundred["tokens_per_s"]["torch_1f1b_boundary"] == pytest.approx(750)


def test_a_reference_that_links_make_very_slow_is_timed_over_fewer_steps_and_its_loss_is_not_compared() -> None:
    work = workload(quick=False)
    slow = next(setting for setting in SETTINGS if setting.name == "20")
    assert work.window_of(System.TORCH, slow) == Window(1, 1)
    assert work.window_of(System.TORCH_BOUNDARY, slow) == work.window_of(System.ORION, slow) == work.window
    study = Study(work, [slow], 1)
    study.run(Machine(), lambda *_: None)
    row = study.table().as_json()["settings"][1]
    assert (row["steps"], row["torch_steps"]) == ({"warm_up": 2, "timed": 4}, {"warm_up": 1, "timed": 1})


def test_the_settings_are_those_that_are_reported() -> None:
    assert [setting.name for setting in SETTINGS] == ["unshaped", "856", "100", "20", "856_rtt60", "20_rtt60"]
    assert UNSHAPED.profile is None
    for setting in (*SETTINGS[1:], *MORE_SETTINGS):
        profile = setting.profile
        assert profile is not None
        assert (profile.upload_mbit, 2 * profile.delay_ms) == (setting.upload_mbit, setting.rtt_ms)


def test_the_model_has_eight_million_parameters_in_four_stages_and_the_step_leaves_room_to_run_empty() -> None:
    work = workload(quick=False)
    assert work.spec.num_stages == 4
    assert 7.5e6 < sum(work.spec.stage_sizes) < 9.5e6
    assert work.model(with_boundary=False).boundary_width == work.spec.model.width
    assert work.spec.inner_steps >= work.window.num_steps + 2
