"""The list of all scores of confidence. Records, report and pages follow from it."""

from collections.abc import Iterable

from flatcal_dist.calibration.confidence import of_features, of_head, of_passes
from flatcal_dist.calibration.confidence import of_logits as scores
from flatcal_dist.calibration.confidence.score import OF_FEATURES, Score

SCORES: tuple[Score, ...] = (
    *scores.SCORES,
    *of_features.SCORES,
    *of_head.SCORES,
    *of_passes.SCORES,
)
BY_KEY = {score.key: score for score in SCORES}
ON_REQUEST = tuple(s.key for s in SCORES if s.needs in (*OF_FEATURES, "passes"))


def requested(keys: Iterable[str]) -> tuple[Score, ...]:
    """Return the scores that `evaluate.confidence` names, in the order of the list.

    ValueError for an unknown name, and for a score that needs no request.
    """
    wanted = list(keys)
    for key in wanted:
        if key in ON_REQUEST:
            continue
        known = f"you can ask for {', '.join(ON_REQUEST)}"
        if key not in BY_KEY:
            raise ValueError(f"no confidence score is called {key!r}; {known}")
        if BY_KEY[key].of_logits:
            raise ValueError(f"every report holds {key}, so it needs no request; {known}")
        raise ValueError(
            f"{key} needs several networks, and only `flatcal evaluate RUN RUN ... --ensemble` "
            f"computes it; {known}"
        )
    return tuple(score for score in SCORES if score.key in wanted)
