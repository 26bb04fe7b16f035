from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from stlora_peft.provenance import environment, source_commit


def test_environment_names_python_and_the_machine() -> None:
    known = environment()
    assert known["python"].count(".") == 2
    assert known["machine"].endswith(" cores")


def test_environment_names_every_commit_that_rows_were_measured_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stlora_peft.provenance.source_commit", lambda: "present")
    assert environment([{"commit": "b"}, {"commit": "a"}, {"commit": "b"}])["commit"] == "a, b"
    assert environment([{"commit": "b"}, {"commit": None}, {}])["commit"] == "b, not noted"
    assert "commit" not in environment([{"commit": None}, {}])
    assert environment()["commit"] == "present"
    monkeypatch.setattr("stlora_peft.provenance.source_commit", lambda: None)
    assert "commit" not in environment()


def test_source_commit_in_a_repository_says_the_commit_and_whether_files_changed(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    git("init", "--quiet")
    (tmp_path / "provenance.py").write_text("1\n")
    assert source_commit(tmp_path) is None  # a package that is not part of the repository around it
    git("add", "provenance.py")
    git("commit", "--quiet", "--message", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert source_commit(tmp_path) == commit
    (tmp_path / "provenance.py").write_text("2\n")
    assert source_commit(tmp_path) == f"{commit} + changes"


def test_source_commit_outside_of_git_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert source_commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert source_commit(tmp_path) is None
