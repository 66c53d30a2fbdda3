from pathlib import Path

import pytest

from mobilemix import assets
from mobilemix.errors import InputError
from mobilemix.labels import read_labels

# Class indices that ImageNet models are commonly tried with.
IMAGENET = {
    0: "tench",
    1: "goldfish",
    207: "golden retriever",
    281: "tabby",
    285: "Egyptian cat",
    340: "zebra",
    388: "giant panda",
    620: "laptop",
    817: "sports car",
    954: "banana",
    985: "daisy",
    999: "toilet tissue",
}


def test_imagenet_has_a_thousand_different_names_in_the_models_order() -> None:
    labels = read_labels(assets.path("imagenet1k.txt"), expected=1000)
    assert {index: labels[index] for index in IMAGENET} == IMAGENET
    assert {labels[134], labels[517]} == {"crane (bird)", "crane (machine)"}


@pytest.mark.parametrize(
    "content",
    [b"a\nb c\n", b"a\nb c", b"\xef\xbb\xbfa\nb c\n", b"a\r\nb c\r\n", b"a \n  b c\n\n \n\n", b"a\rb c\r"],
)
def test_line_ends_marks_and_trailing_blank_lines_do_not_matter(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    assert read_labels(path) == ("a", "b c")


def test_names_may_be_in_any_script(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("löwenzahn\n蒲公英\na\u2028b\n", encoding="utf-8")
    assert read_labels(path, expected=3) == ("löwenzahn", "蒲公英", "a\u2028b")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no name in line 1"),
        (b"\n\n", "no name in line 1"),
        (b"a\n\nb\n", "no name in line 2"),
        (b"a\nb\na \n", "'a' in lines 1 and 3"),
        (b"a\nb\nc\nd\n", "4 names, the model has 3 classes"),
        ("größe\n".encode("latin-1"), "not UTF-8"),
        ("a\nb\nc\n".encode("utf-16"), "not UTF-8"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=complaint):
        read_labels(path, expected=3)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_labels(path)
