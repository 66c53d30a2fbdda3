"""Class names: text files with one name a line, line i (from 0) for class i."""

from pathlib import Path

from mobilemix.errors import InputError


def read_labels(path: Path, expected: int | None = None) -> tuple[str, ...]:
    """The class names in `path`: UTF-8, with or without a byte-order mark; blank lines at the end do not count.

    Args:
        path: the labels file.
        expected: the number of classes; None takes any.

    Raises:
        InputError: the file cannot be read, is empty, has a blank line before its last name, names two classes alike
            (Core ML's classifiers look labels up by name), or has not as many names as `expected`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"labels file {path} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"labels file {path} is not UTF-8 text; give one class name a line") from error
    labels = [line.strip() for line in text.rstrip().split("\n")]
    first: dict[str, int] = {}
    for number, label in enumerate(labels, start=1):
        if not label:
            raise InputError(f"labels file {path} has no name in line {number}; give one class name a line")
        if first.setdefault(label, number) != number:
            raise InputError(f"labels file {path} has '{label}' in lines {first[label]} and {number}; make them differ")
    if expected is not None and len(labels) != expected:
        raise InputError(f"labels file {path} has {len(labels)} names, the model has {expected} classes")
    return tuple(labels)
