"""The published toy study, repeated: a miner that raises losses by a tenth stands out, its neighbours do not."""

from orion.bench.clasp_study import Malicious, format_row, study_report, study_row

SEED = 0


def test_a_tenth_more_loss_is_found_from_two_hundred_pathways_on() -> None:
    for malicious in Malicious:
        row = study_row(malicious, 200, 1.1, num_trials=60, seed=SEED)
        assert row.found >= 0.95, row
        assert row.false_alarms <= 0.1, row
        assert row.false_alarms_beside <= 0.05, row


def test_without_harm_hardly_any_alarm_is_raised() -> None:
    row = study_row(Malicious.ONE, 400, 1.0, num_trials=200, seed=SEED)
    assert row.found == 0.0
    assert row.false_alarms <= 0.05, row


def test_smaller_harm_needs_more_pathways() -> None:
    found = [study_row(Malicious.ONE, num, 1.02, num_trials=40, seed=SEED).found for num in (100, 400, 1600)]
    assert found == sorted(found)
    assert found[0] < 0.5
    assert found[-1] > 0.9


def test_the_report_says_what_was_run() -> None:
    row = study_row(Malicious.ONE_STAGE, 100, 1.05, num_trials=3, seed=SEED)
    report = study_report([row], SEED)
    assert report["rows"] == [
        {
            "malicious": "two in one stage",
            "num_pathways": 100,
            "factor": 1.05,
            "num_trials": 3,
            "found": row.found,
            "false_alarms": row.false_alarms,
            "false_alarms_beside": row.false_alarms_beside,
        }
    ]
    assert format_row(row).startswith("two in one stage, losses × 1.05, 100 pathways: found ")
