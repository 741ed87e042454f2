"""Names of classes from a file, in the order of the classes' numbers."""

import json
import re
from pathlib import Path


def read_class_names(path: Path) -> list[str]:
    """Read the names of K classes.

    A text file has one name per line, and may have the number before the name. A JSON file holds a
    list of names, or an object from number to name or to [WordNet id, name], as in Keras'
    imagenet_class_index.json. ValueError for anything else.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = _of_json(json.loads(text)) if text.lstrip()[:1] in ("[", "{") else _of_lines(text)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no names of classes: {error}") from None
    if len(names) < 2 or any(not name or len(name) > 500 for name in names):
        raise ValueError(
            f"{path} holds no names of classes: expected one name per line, in the order of the "
            f"classes' numbers, and found {len(names)} of them, or an empty one"
        )
    return names


def _of_lines(text: str) -> list[str]:
    if "\0" in text:
        raise ValueError("it is no text in UTF-8")
    lines = [line.strip() for line in text.rstrip().splitlines()]
    numbered = [re.fullmatch(r"(\d+)[\s,;:]+(.*\S)", line) for line in lines]
    if all(numbered) and [int(part[1]) for part in numbered if part] == list(range(len(lines))):
        return [part[2].strip('"') for part in numbered if part]
    return lines


def _of_json(stored: object) -> list[str]:
    if isinstance(stored, dict):
        numbers = [str(i) for i in range(len(stored))]
        if set(stored) != set(numbers):
            raise ValueError(f"expected the numbers 0 to {len(stored) - 1} as keys")
        stored = [stored[number] for number in numbers]
    if not isinstance(stored, list):
        raise ValueError("expected a list of names, or an object from number to name")
    names = [entry[-1] if isinstance(entry, list) and entry else entry for entry in stored]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("expected texts as names")
    return [name.strip() for name in names]
