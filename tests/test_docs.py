"""Every piece of code in the README, the docs and the examples runs and prints what it says."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md")))]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def run(*arguments: str, timeout: int = 300) -> str:
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def promised(code: str) -> list[str]:
    """Output that a page promises: comment lines that follow a line which prints."""
    lines, wanted = code.splitlines(), []
    for before, line in itertools.pairwise(lines):
        if line.startswith("# ") and ("print" in before or (before.startswith("# ") and wanted)):
            wanted.append(line[2:])
    return wanted


def blocks() -> list[tuple[str, str]]:
    return [(page, code) for page in PAGES for code in BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))]


def test_blocks_are_found_in_the_pages_that_have_code():
    assert {page for page, _ in blocks()} >= {"README.md", "docs/layouts.md", "docs/new-cities.md"}


def test_promised_output_of_a_printing_line_is_the_comment_below():
    assert promised("print(1)\n# 1\nx = 2  # no\n# a remark") == ["1"]


@pytest.mark.parametrize(("page", "code"), blocks(), ids=lambda value: value if value in PAGES else "")
def test_code_block_runs_and_prints_what_the_page_says(page, code):
    printed = run("-W", "ignore", "-c", code).splitlines()
    wanted = promised(code)
    assert wanted, f"{page}: a block that promises no output shows nothing"
    assert printed == wanted


@pytest.mark.parametrize("name", ["01_your_own_model.py", "03_two_cities_one_backbone.py"])
def test_example_prints_what_its_header_says(name):
    header = (ROOT / "examples" / name).read_text(encoding="utf-8").split('"""')[1]
    printed = run("-W", "ignore", f"examples/{name}").strip().splitlines()
    assert printed
    for line in printed:
        assert line in header


def test_example_la_to_shenzhen_runs_on_simulated_cities(tmp_path):
    printed = run("-W", "ignore", "examples/02_la_to_shenzhen.py", "--data", str(tmp_path), "--epochs", "1")
    lines = printed.strip().splitlines()
    assert [line.split()[0] for line in lines] == ["persistence", "zero-shot", "st-lora", "adapter"]
    assert lines[-1].endswith("same forecasts True")


def test_generated_parts_of_the_readme_are_up_to_date():
    assert "is up to date" in run("benchmarks/write_readme.py", "--check", "--quick")


@pytest.mark.slow
def test_what_the_compilers_can_do_is_up_to_date():
    assert "is up to date" in run("benchmarks/write_readme.py", "--check", timeout=1200)


def test_every_link_between_pages_leads_somewhere():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_every_public_name_is_in_the_docs():
    import stlora_peft

    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in stlora_peft.__all__ if name not in text] == []
