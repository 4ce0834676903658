"""Warnings of a kind are one line, however many classes and networks have it."""

import json
import pickle

import pytest

from evaluation.results.results import Results, Warned, one_line_a_kind

FEW = " are few, intervals are rough"


@pytest.mark.parametrize(
    ("warnings", "expected"),
    [
        ([], []),
        (["one", "two"], ["one", "two"]),
        ([Warned("CT", "3 volumes", FEW)], ["CT: 3 volumes are few, intervals are rough"]),
        (
            [Warned("CT", "3 volumes", FEW), "other", Warned("MR", "4 volumes", FEW), Warned("PET", "3 volumes", FEW)],
            ["CT, PET: 3 volumes; MR: 4 volumes are few, intervals are rough", "other"],
        ),
        ([Warned("", "net a is new", ": no"), Warned("", "net b is new", ": no")], ["net a is new; net b is new: no"]),
    ],
)
def test_one_line_a_kind(warnings, expected):
    assert one_line_a_kind(warnings) == expected
    assert one_line_a_kind(one_line_a_kind(warnings)) == expected


def test_a_warning_is_a_text_and_survives_sending():
    warning = Warned("CT", "3 volumes", FEW)
    assert warning == "CT: 3 volumes are few, intervals are rough"
    sent = pickle.loads(pickle.dumps(warning))
    assert (sent, sent.place, sent.found, sent.meaning) == (warning, "CT", "3 volumes", FEW)


def test_results_hold_one_line_a_kind(tmp_path):
    results = Results("validity", {}, {}, warnings=[Warned(f"class {i}", "3 volumes", FEW) for i in range(26)])
    (line,) = json.loads(results.write(tmp_path).read_text())["warnings"]
    assert line.startswith("class 0, class 1, ")
    assert line.endswith(", class 25: 3 volumes are few, intervals are rough")
    assert results.warnings == [line]
