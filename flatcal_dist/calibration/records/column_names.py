"""The meaning of columns, by their names: labels, ids, and the scores of the classes.

Case does not matter, and . - and space count as _. The name of a split may stand before or after a
name (test_logits, labels_val). If several names of a list occur, the first one counts. These names
are understood:

    labels          label, labels, target, targets; y_true, gt, ground_truth, class_id, ..., y
    ids             id, ids; image_id, image_path, filename, path, key, ...
    scores          logits; probabilities, probs, softmax, y_prob, ...; log_probs, log_softmax;
                    names that leave the kind open: scores, y_score, outputs, arr_0
    one class each  logit_0, prob_0, p0, class_0, 0; counted from 1: prob_1 to prob_K;
                    prob_cat, prob_dog
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

LABELS = (
    ("label", "labels", "target", "targets"),
    ("y_true", "true_label", "true_labels", "gt", "gts", "gt_label", "gt_labels", "ground_truth",
     "ground_truths", "ground_truth_label", "truth", "true_class", "label_id", "label_ids",
     "label_idx", "label_index", "class_id", "class_idx", "class_index", "class_label", "y"),
    ("class", "true", "actual"),
)  # fmt: skip
IDS = (
    ("id", "ids"),
    ("image_id", "image_ids", "img_id", "sample", "sample_id", "sample_ids", "uid", "uuid", "key",
     "keys",
     "image_path", "image_paths", "img_path", "img_paths", "path", "paths", "file_path",
     "file_paths", "filepath", "filepaths", "filename", "filenames", "file_name", "file_names",
     "file", "files", "image_name", "image_names", "image_file", "img_name", "image", "img"),
)  # fmt: skip
LOGITS = ("logits", "logit", "raw_logits", "log_odds")
LOG_PROBABILITIES = (
    "log_probabilities", "log_probability", "log_probs", "log_prob", "logprobs", "logprob",
    "log_softmax", "logsoftmax", "log_p",
)  # fmt: skip
PROBABILITIES = (
    "probabilities", "probability", "probs", "prob", "p", "proba", "probas", "softmax",
    "softmaxes", "softmax_probs", "y_prob", "y_probs", "y_proba", "pred_prob", "pred_probs",
    "pred_proba", "predict_proba", "sigmoid",
)  # fmt: skip
OPEN = (
    "scores", "score", "y_score", "y_scores", "outputs", "output", "preds", "predictions",
    "y_pred", "y_hat", "arr_0",
)  # fmt: skip
KINDS = {"logits": LOGITS, "log-probabilities": LOG_PROBABILITIES, "probabilities": PROBABILITIES}
CLASS_NAMES = ("class_names", "classes", "categories", "label_names")
SPLITS = "train|test|val|valid|validation|eval|evaluation|dev"
# These words name no class: prob_max is a figure of the whole row.
FIGURES = {
    "max", "min", "mean", "std", "sum", "top1", "top_1", "top5", "top_5", "true", "label", "pred",
    "predicted", "correct", "target", "gt", "margin", "entropy", "y", "loss",
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Where the scores are.

    Args:
        names: The name of one array [N, K] or of one column of a binary classifier, or the names of
            a column per class.
        kind: One of KINDS. None if the names leave it open.
        classes: The names of the classes, if columns tell them.
        first: The number of the first column, 0 or 1. None for a whole array.
    """

    names: list[str]
    kind: str | None
    classes: list[str] | None = None
    first: int | None = None


def plain(name: str) -> str:
    """Return `testLogits` and `Test.Logits` as test_logits."""
    cut = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip())
    return re.sub(r"[\s.\-/:\[\](){}_]+", "_", cut).strip("_").lower()


def split_of(name: str) -> tuple[str, str | None]:
    """Return `test_logits` and `logits_test` as (logits, test)."""
    name = plain(name)
    before = re.fullmatch(rf"({SPLITS})_(.+)", name)
    if before:
        return before[2], before[1]
    after = re.fullmatch(rf"(.+)_({SPLITS})", name)
    return (after[1], after[2]) if after else (name, None)


def first_of(names: Sequence[str], tiers: Sequence[Sequence[str]], split: str | None) -> list[str]:
    """Return the names that are in the first tier of which any name occurs.

    Args:
        names: The names of columns.
        tiers: The words to look for. Words of an earlier tier come first.
        split: The split. Names of this split come before names of no split.
    """
    for words in tiers:
        for wanted in dict.fromkeys((split, None)):
            found = [n for n in names if split_of(n) in {(word, wanted) for word in words}]
            if found:
                return found
    return []


def find_labels(names: Sequence[str], split: str | None) -> list[str]:
    """Return the column of the labels, or the columns label_0, label_1, ... of one-hot labels.

    ValueError if no name, or more than one, means labels.
    """
    found = first_of(names, LABELS, split)
    if not found:
        numbered = _numbered(names, LABELS[0], split)
        if numbered:
            return _in_order(numbered)[0]
    if len(found) != 1:
        state = "none is" if not found else f"{', '.join(found)} all are"
        raise ValueError(
            f"expected one of {', '.join(LABELS[0])} to hold the labels, and {state} among "
            f"{shortened(names)}"
        )
    return found


def find_ids(names: Sequence[str], split: str | None) -> list[str]:
    """Return the columns that name images, the best one first."""
    return [name for tier in IDS for name in first_of(names, [tier], split)]


def find_scores(names: Sequence[str], wanted: str | None) -> tuple[Found, str | None] | None:
    """Return the scores and their split. None if no name tells.

    `wanted` is the kind that the user names, which counts more than the name of a column.
    ValueError if names allow more than one reading.
    """
    found: list[tuple[Found, str | None]] = []
    splits = dict.fromkeys([None, *(split_of(name)[1] for name in names)])
    for kind, words in (*KINDS.items(), (None, OPEN)):
        if kind is None and found:
            break  # a name that tells the kind comes before names that leave it open
        for split in splits:
            whole = [n for n in names if split_of(n) in {(word, split) for word in words}]
            found += [(Found([name], kind), split) for name in whole]
            numbered = _numbered(names, words, split)
            if numbered:
                ordered, first = _in_order(numbered)
                found.append((Found(ordered, kind, first=first), split))
            elif split is None and (by_class := _by_class(names, words)):
                found.append((Found(list(by_class), kind, list(by_class.values())), split))
    if not found and (bare := _numbered(names, ("",), None)) and len(bare) > 1:
        ordered, first = _in_order(bare)
        found.append((Found(ordered, None, first=first), None))
    if wanted is not None and len(found) > 1:
        found = [one for one in found if one[0].kind == wanted] or found
    if len(found) > 1:
        several = {split for _, split in found}
        if len(several) > 1:
            raise ValueError(
                f"expected the scores of one set of images, and found "
                f"{', '.join(str(s.names[0]) for s, _ in found)}: write a file for each set"
            )
        raise _no_scores(names)
    return found[0] if found else None


def _no_scores(names: Sequence[str]) -> ValueError:
    return ValueError(
        "expected the scores either as logits or as probabilities, whole or a column per class "
        f"(logit_0, ... or probability_0, ...), and found {shortened(names)}; if columns "
        "have the names of the classes, give these names with --classes FILE"
    )


def scores_by_labels(
    names: Sequence[str], known: Collection[str], classes: Sequence[str] | None
) -> Found:
    """Return the scores of a file whose columns have the names of the classes.

    Args:
        names: The names of the columns.
        known: The columns of labels and ids.
        classes: The names of the classes, if the user gave them.

    Raises:
        ValueError: The classes are not known, or are no columns.
    """
    rest = [name for name in names if name not in known]
    if classes is not None and len(classes) > 1 and set(classes) <= set(rest):
        return Found(list(classes), None, list(classes))
    raise _no_scores(names)


def _numbered(names: Sequence[str], words: Sequence[str], split: str | None) -> dict[int, str]:
    """The columns WORD_NUMBER, by number."""
    either = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
    found: dict[int, str] = {}
    for name in names:
        rest, own = split_of(name)
        part = re.fullmatch(rf"(?:{either})_?(?:class_|cls_)?(\d{{1,7}})", rest)
        if part is None or own != split:
            continue
        number = int(part[1])
        if number in found:
            raise ValueError(f"two columns hold class {number}, one of them {name}")
        found[number] = name
    return found


def _in_order(numbered: dict[int, str]) -> tuple[list[str], int]:
    first = 0 if 0 in numbered else 1
    missing = sorted(set(range(first, max(numbered) + 1)) - numbered.keys())
    if missing:
        raise ValueError(f"there is no column for class {missing[0]}, but one for {max(numbered)}")
    return [numbered[number] for number in sorted(numbered)], first


def _by_class(names: Sequence[str], words: Sequence[str]) -> dict[str, str]:
    """The class of each column WORD_CLASS, such as prob_cat. Empty unless there are two."""
    either = "|".join(sorted((w.replace("_", "[_ .-]") for w in words), key=len, reverse=True))
    found = {}
    for name in names:
        part = re.fullmatch(rf"(?i)(?:{either})[_ .:\-/]+(.*\D.*)", name.strip())
        if part and plain(part[1]) not in FIGURES and split_of(name)[1] is None:
            found[name] = part[1]
    return found if len(found) > 1 else {}


def partner_stems(stem: str, words: Sequence[str]) -> set[str]:
    """Return the names of a file of labels beside logits_test.npy: labels_test, targets_test, ...

    There are none if the name of the file does not say that it holds scores.
    """
    parts = plain(stem)
    every = sorted((w for group in (*KINDS.values(), OPEN) for w in group), key=len, reverse=True)
    for word in every:
        cut = re.fullmatch(rf"(|.*_){word}(|_.*)", parts)
        if cut:
            return {f"{cut[1]}{other}{cut[2]}" for other in words}
    return set()


def kind_of_stem(stem: str) -> str | None:
    """Return the kind of scores that the name of a file tells, such as resnet_logits_test."""
    rest, found = f"_{plain(stem)}_", []
    for kind, words in KINDS.items():
        there = [word for word in words if f"_{word}_" in rest]
        for word in there:
            rest = rest.replace(f"_{word}_", "_")
        found += [kind] if there else []
    return found[0] if len(found) == 1 else None


def shortened(names: Sequence[str]) -> str:
    """Return the first names of a list as text."""
    return f"{', '.join(names[:8])}{', ...' * (len(names) > 8)}"
