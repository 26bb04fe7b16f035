import json
import math
import os
import stat

import pytest

from stlora_peft.files import atomic_write, read_json, write_json


def test_atomic_write_without_error_replaces_the_file_and_leaves_nothing_else(tmp_path):
    final = tmp_path / "new" / "a.txt"
    for text in ("first", "second"):
        with atomic_write(final) as temporary:
            assert temporary.parent == final.parent
            assert temporary.suffix == ".txt"
            temporary.write_text(text)
        assert final.read_text() == text
    assert list(final.parent.iterdir()) == [final]


def test_atomic_write_with_error_keeps_the_old_file(tmp_path):
    final = tmp_path / "a.txt"
    final.write_text("old")

    def write_half():
        with atomic_write(final) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert final.read_text() == "old"
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.skipif(os.name == "nt", reason="no file modes on Windows")
def test_atomic_write_file_has_the_mode_of_an_ordinary_one(tmp_path):
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("a")
    (tmp_path / "b.txt").write_text("b")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.txt", "b.txt")}
    assert len(modes) == 1


def test_write_json_then_read_json_returns_the_content(tmp_path):
    content = {"name": "Zürich", "numbers": [1, 2.5, None], "nested": {"a": True}}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    assert (tmp_path / "a.json").read_text().endswith("}\n")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_write_json_non_finite_number_raises_and_writes_nothing(tmp_path, value):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": value})
    assert list(tmp_path.iterdir()) == []


def test_read_json_missing_file_names_it(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(FileNotFoundError) as error:
        read_json(path)
    assert str(error.value).split("\n") == [
        f"file '{path}' is missing.",
        "  expected: a JSON file",
        "  got:      nothing",
        "  to fix:   check the path",
    ]


@pytest.mark.parametrize("content", [json.dumps({"a": 1})[:-1].encode(), b"\xff\xfe{}", b""])
def test_read_json_damaged_file_names_it(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read") as error:
        read_json(path)
    lines = str(error.value).split("\n")
    assert lines[0] == f"file '{path}' cannot be read."
    assert lines[1] == "  expected: JSON text"
    assert lines[2].startswith("  got:      ")
    assert len(lines[2]) > len("  got:      ")
    assert lines[3] == "  to fix:   write the file again"
