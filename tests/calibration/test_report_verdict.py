"""What the verdict says, and that it says no more than the intervals allow."""

from functools import cache

from flatcal_dist.calibration.calibrators.of_logits import BOUNDS
from flatcal_dist.calibration.pages.display import percent
from flatcal_dist.calibration.report.model import Report
from flatcal_dist.calibration.report.summary import summarize
from flatcal_dist.calibration.report_page.verdict import Finding, verdict
from tests.support.synthetic import make_records


@cache
def any_report() -> Report:
    """What a report holds that no sentence is asked about here."""
    return summarize(make_records(60), resamples=2)


def findings(m: dict, shift: dict | None = None) -> list[Finding]:
    """The verdict of a report with these values."""
    other = any_report().as_json()
    after = other["after_temperature"] | m["after_temperature"]
    columns = {key: [None if key == "name" else 0] * len(m["per_class"]["class"])
               for key in other["per_class"]}  # fmt: skip
    parts = {"after_temperature": after, "per_class": columns | m["per_class"]}
    return verdict(Report.model_validate(other | m | parts), shift)


def texts(m: dict, shift: dict | None = None) -> list[str]:
    return [finding.text for finding in findings(m, shift)]


def wanted(accuracy: float, held_out: float, low: float, high: float) -> dict:
    """An operating point, and what its threshold gave on other images."""
    answered = {"coverage": 0.6, "images": 600, "wrong": 31}
    return {
        "accuracy_wanted": accuracy, "coverage": 0.6, "confidence": 0.7,
        "held_out": answered | {"accuracy": held_out, "low": low, "high": high},
    }  # fmt: skip


def side(gap: tuple, ece: float = 0.05, p: float = 0.001, **values: object) -> dict:
    """A side of metrics.json, as far as the verdict reads it."""
    value, low, high = gap
    return {
        "accuracy": 0.8,
        "mean_confidence": 0.8 + value,
        "signed_gap": value,
        "ece": ece,
        "auroc": 0.9,
        "coverage_at_95_accuracy": 0.6,
        "confidence_at_95_accuracy": 0.7,
        "ece_null": {"mean": 0.01, "quantile_95": 0.02, "p_value": p, "resamples": 9},
        "intervals": {
            "signed_gap": {"low": low, "high": high},
            "auroc": {"low": 0.88, "high": 0.92},
            "coverage_at_95_accuracy": {"low": 0.51, "high": 0.66},
        },
        "operating_points": {
            "by_accuracy": [wanted(0.9, 0.9, 0.88, 0.92), wanted(0.95, 0.948, 0.93, 0.96)],
            "by_threshold": [],
            "by_cost": [],
        },
    } | values


def run(
    gap: tuple = (0.05, 0.03, 0.07),
    nll: tuple = (-0.02, -0.03, -0.01),
    ece: tuple = (-0.04, -0.05, -0.03),
    p_after: float = 0.4,
    moved: tuple = (-0.05, -0.06, -0.04),
    images: int = 1000,
    **values: object,
) -> dict:
    difference = {
        name: dict(zip(("value", "low", "high"), v, strict=True))
        for name, v in (("nll", nll), ("ece", ece), ("signed_gap", moved))
    }
    after = side((0.0, -0.02, 0.02), 0.05 + ece[0], p_after, difference=difference)
    head = {
        "images": images,
        "temperature": 1.237,
        "after_temperature": after,
        "per_class": {"class": []},
        "confident_errors": [],
    }
    return side(gap, **values) | head


def test_verdict_claims_what_the_intervals_allow() -> None:
    said = " ".join(texts(run()))
    assert "over-confident by 5.0 points (95 % interval 3.0 to 7.0)" in said
    assert "so it is miscalibrated" in said
    assert "lowers NLL by 0.020 (0.010 to 0.030) and lowers ECE from 5.0 % to 1.0 %" in said
    assert "a calibrated network could show as much" in said
    assert "divide the logits by 1.24" in said
    assert "60 % of these images (51 % to 66 % of others like them) can be answered at" in said
    assert "confidence of 70.0 % or more" in said


def test_verdict_of_an_under_confident_network() -> None:
    said = " ".join(texts(run(gap=(-0.05, -0.07, -0.03))))
    assert "under-confident by 5.0 points (95 % interval 3.0 to 7.0)" in said


def test_verdict_does_not_claim_what_is_not_shown() -> None:
    m = run(gap=(0.01, -0.01, 0.03), nll=(-0.001, -0.01, 0.01), ece=(-0.01, -0.02, 0.01))
    m["ece_null"]["p_value"] = 0.3
    said = " ".join(texts(m))
    assert "Neither over- nor under-confidence is shown" in said
    assert "do not show it to be miscalibrated" in said
    assert "shows no change in NLL; ECE goes from 5.0 % to 4.0 %, no change shown" in said
    assert "no case here for changing the temperature" in said


def test_verdict_when_nll_and_ece_disagree() -> None:
    said = " ".join(texts(run(ece=(0.02, 0.01, 0.03), p_after=0.001)))
    assert "lowers NLL by 0.020 (0.010 to 0.030) but raises ECE from 5.0 % to 7.0 %" in said
    assert "still more than a calibrated network would show" in said
    assert "The two disagree" in said


def test_verdict_when_only_ece_moves() -> None:
    said = " ".join(texts(run(nll=(-0.001, -0.01, 0.01))))
    assert "shows no change in NLL but lowers ECE from 5.0 % to 1.0 %" in said
    assert "is shown to mend ECE and nothing else" in said


def test_verdict_near_zero_shows_the_digits_that_decide() -> None:
    assert "by 0.04 points (95 % interval 0.01 to 0.07)" in texts(run((4e-4, 1e-4, 7e-4)))[0]


def test_verdict_on_coverage() -> None:
    assert "no threshold on confidence" in texts(run(coverage_at_95_accuracy=0.0))[2]
    said = texts(run(accuracy=0.97))
    assert any("all of these images can be answered" in s for s in said)
    said = texts(run(accuracy=0.995))
    assert "Only 5 predictions are wrong" in said[-1]
    assert "Only 1 prediction is wrong" in texts(run(accuracy=0.999))[-1]


def test_verdict_gives_no_advice_from_the_end_of_the_search() -> None:
    for bound in BOUNDS:
        said = " ".join(texts(run() | {"temperature": bound}))
        assert "No temperature can be fitted" in said
        assert "divide the logits" not in said
        assert "T = 0.00," not in said
    assert "divide the logits by 0.0123" in " ".join(texts(run() | {"temperature": 0.0123}))


def test_verdict_names_the_worst_classes_on_either_side() -> None:
    gaps = {"signed_gap": [0.3, 0.1, -0.2, -0.4], "gap_low": [0.2, -0.1, -0.3, -0.5]}
    table = {"class": [0, 1, 2, 3], "images": [50] * 4, "gap_high": [0.4, 0.2, -0.1, -0.25]}
    table |= {"accuracy": [0.5, 0.4, 0.8, 0.9], "mean_confidence": [0.8, 0.5, 0.6, 0.5]}
    table |= {"confused_with": [1, 2, None, 0], "confused_share": [0.3, 0.25, 0.0, 0.1]}
    said = " ".join(texts(run() | {"per_class": table | gaps, "about": {"class_names": None}}))
    assert "1 of 4 classes are over-confident and 2 under-confident" in said
    assert "most over-confident is class 0, by 30.0 points (20.0 to 40.0)" in said
    assert "most under-confident is class 3, by 40.0 points (25.0 to 50.0)" in said
    assert "The least accurate class is class 1: 40.0 % of its 50 images are right" in said
    assert "(30.0 % to 60.0 %); 25 % are taken for class 2" in said


def test_what_is_not_whole_is_not_printed_as_100_per_cent() -> None:
    assert percent(17297 / 17300, 1) == "99.98 %"
    assert percent(1 - 1 / 14650, 1) == "99.99 %"
    assert percent(0.9994, 0) == "99.9 %"
    assert percent(1.0, 1) == "100.0 %"
    assert percent(0.5, 1) == "50.0 %"


def shifted(before: tuple, after: tuple, distance: tuple | None, temperature: float = 0.8) -> dict:
    """shift.json of one set of images, as far as the verdict reads it; gaps with intervals."""

    def figures(gap: tuple) -> dict:
        value, low, high = gap
        ends = {"signed_gap": {"low": low, "high": high}, "accuracy": {"low": 0.45, "high": 0.55}}
        return {"accuracy": 0.5, "signed_gap": value, "ece": 0.1, "intervals": ends}

    row = {"name": "v2", "before": figures(before), "after": figures(after)}
    value, low, high = distance or (None, None, None)
    row["effect"] = {"distance": {"value": value, "low": low, "high": high}}
    return {"clean": {"temperature": temperature}, "sets": [row], "corruptions": []}


def shift_text(*arguments: object, **options: float) -> str:
    m = run() | {"per_class": {"class": []}}
    return next(f.text for f in findings(m, shifted(*arguments, **options)) if f.topic == "Shift")


def test_a_change_of_sign_under_shift_is_named() -> None:
    """9.3 points below became 9.1 above: the dangerous side, and no nearer."""
    said = shift_text((-0.093, -0.11, -0.08), (0.091, 0.08, 0.1), (-0.002, -0.01, 0.006))
    assert "under-confidence has become over-confidence, which is the dangerous side" in said
    assert "neither nearer to accuracy nor further away" in said
    assert "brings it nearer" not in said
    assert "this is nearer" not in said
    said = shift_text((0.093, 0.08, 0.11), (-0.04, -0.05, -0.03), (-0.053, -0.06, -0.04))
    assert "over-confidence has become under-confidence;" in said
    assert "dangerous" not in said
    assert "this is nearer to accuracy, by 5.3 points (4.0 to 6.0)" in said
    said = shift_text((-0.01, -0.02, 0.001), (0.01, -0.002, 0.03), (0.0, -0.01, 0.01))
    assert "the gap has changed its sign" in said
    assert "has become" not in said, "neither is shown"


def test_nearer_under_shift_is_said_with_an_interval_alone() -> None:
    same = ((0.2, 0.18, 0.22), (0.1, 0.08, 0.12))
    assert "this is nearer to accuracy, by 10.0 points (9.0 to 11.0)" in shift_text(
        *same, (-0.1, -0.11, -0.09)
    )
    assert "this is further away from accuracy, by 3.0" in shift_text(*same, (0.03, 0.01, 0.05))
    for distance in ((-0.1, -0.2, 0.01), (-0.1, None, None)):
        assert "neither nearer to accuracy nor further away" in shift_text(*same, distance)
    said = shift_text(*same, (-0.1, -0.11, -0.09), temperature=BOUNDS[0])
    assert "no temperature that could be used" in said
    assert "nearer" not in said


def test_the_worst_corruption_is_named() -> None:
    def figures(accuracy: float, gap: float, ece: float) -> dict:
        ends = {"signed_gap": {"low": gap - 0.01, "high": gap + 0.01}}
        ends |= {"accuracy": {"low": accuracy - 0.01, "high": accuracy + 0.01}}
        return {"accuracy": accuracy, "signed_gap": gap, "ece": ece, "intervals": ends}

    def change(value: float) -> dict:
        return {"ece": {"value": value, "low": value - 0.005, "high": value + 0.005},
                "distance": {"value": 0.0, "low": -0.1, "high": 0.1}}  # fmt: skip

    before = {"fog": figures(0.6, -0.05, 0.05), "glass_blur": figures(0.3, 0.2, 0.2)}
    after = {"fog": figures(0.6, 0.1, 0.1), "glass_blur": figures(0.3, 0.1, 0.1)}
    effect = {"fog": change(0.05), "glass_blur": change(-0.1)}
    group = {
        "name": "imagenet_c", "severities": [5],
        "before": {"by_corruption": before, "by_severity": {"5": before["fog"]}},
        "after": {"by_corruption": after, "by_severity": {"5": after["fog"]}},
        "effect": {"by_corruption": effect, "by_severity": {"5": effect["fog"]}},
    }  # fmt: skip
    shift = {"clean": {"temperature": 0.8}, "sets": [], "corruptions": [group]}
    said = next(f.text for f in findings(run(), shift) if f.topic == "Corruptions")
    assert "glass blur leaves the least accuracy, 30.0 % (29.0 % to 31.0 %)" in said
    assert "Over-confidence is largest under glass blur" in said
    assert "raises ECE under 1 of them, most under fog, from 5.0 % to 10.0 %" in said


def test_one_image_is_no_images() -> None:
    assert texts(run(images=1, accuracy=1.0))[0].startswith("1 image is too few")
    assert texts(run(images=2, accuracy=1.0))[0].startswith("2 images are too few")


def test_no_figure_after_a_temperature_that_could_not_be_fitted() -> None:
    said = " ".join(texts(run() | {"temperature": BOUNDS[0]}))
    assert "use none of them" in said
    assert "after temperature scaling 60 %" not in said
    assert "0.001" not in said


def test_no_figure_after_a_temperature_that_a_fold_has_not() -> None:
    """One wrong image of 300: the fold that holds it is scored by a T of images that are right."""
    said = " ".join(texts(run() | {"temperature_folds": [1.5, 1.6, BOUNDS[0], 1.5, 1.4]}))
    assert "without the images of 1 of the 5 folds none can be fitted" in said
    assert "use no figure after temperature scaling" in said
    assert "after temperature scaling 60 %" not in said
    assert "is shown to mend" not in said
    assert "divide the logits" not in said
