"""Man pages say what the programs do: every option and keyword is on its page, and pages name only each other."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bpfs.config import KEYWORDS
from engine import checkpoint, image

TOP = Path(__file__).resolve().parent.parent
PAGES = {path.name.removesuffix(".md"): path for path in (TOP / "bpfs" / "man").glob("*.md")}
COMMANDS = sorted(name for name in PAGES if name.endswith((".1", ".8")) and not name.startswith("lib"))


VERBS = {
    "bpcluster": [["up"], ["status"], ["down"], ["check-move"]],
    "bpboot": [["image"]],
    "bpckpt": [["save"], ["restart"], ["info"], ["verify"], ["merge"]],
}


def help_of(command: str) -> str:
    if command == "bpsh":
        program = [str(TOP / "bpfs" / "bin" / "bpsh")]
    else:
        program = [sys.executable, "-m", f"bpfs.cli.{command}"]
    texts = []
    for verb in [*VERBS.get(command, []), []]:
        run = subprocess.run([*program, *verb, "--help"], cwd=TOP, capture_output=True, text=True, check=True)
        texts.append(run.stdout)
    return "\n".join(texts)


@pytest.mark.parametrize("page", COMMANDS)
def test_every_option_is_on_the_page_and_only_those(page: str) -> None:
    text = PAGES[page].read_text()
    shown = help_of(page.split(".")[0])
    known = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", shown))
    assert known - set(re.findall(r"--[a-z][a-z-]*", text)) - {"--help", "--version"} == set()
    assert set(re.findall(r"`(--[a-z][a-z-]*)", text)) - known == set()


@pytest.mark.parametrize("page", sorted(PAGES))
def test_a_page_begins_with_its_name_and_refers_to_pages_that_exist(page: str) -> None:
    name, section = page.rsplit(".", 1)
    text = PAGES[page].read_text()
    assert re.match(rf"# {re.escape(name)}\({section}\): \S", text)
    pages = {f"{name}({section})" for name, section in (page.rsplit(".", 1) for page in PAGES)}
    see_also = text.partition("## See also")[2]
    # Until all of them are written, those of the project must exist; others are the system's.
    assert set(re.findall(r"\b(?:bp\w+|nodespec)\(\d\)", see_also)) - pages == set()


def test_every_keyword_is_on_the_masters_page() -> None:
    text = PAGES["bpmaster.8"].read_text().replace("\\|", "|")  # in a cell of a table
    for name, keyword in KEYWORDS.items():
        assert f"| `{name} {keyword.usage}` |" in text


def test_the_format_of_images_is_as_the_page_says() -> None:
    text = PAGES["bpckpt.1"].read_text()
    frames = {"ABOUT": checkpoint.ABOUT, "META": image.META, "STATE": image.STATE, "TABLE": checkpoint.TABLE}
    for name, kind in (frames | {"TAIL": checkpoint.TAIL}).items():
        assert re.search(rf"\b{kind} {name}\b", text), name
    assert f"version (u16, now {image.VERSION})" in text


def test_the_readme_names_pages_that_exist() -> None:
    for link in re.findall(r"\]\((bpfs/man/[^)]*)\)", (TOP / "README.md").read_text()):
        assert (TOP / link).exists(), link


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z0-9_]{2,}", text)


@pytest.fixture(scope="module")
def troff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, TOP / "mountscripts" / "manpages", TOP / "bpfs" / "man", folder], check=True)
    return folder


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_man_shows_all_of_a_page(troff: Path) -> None:
    pages = [troff / f"man{name[-1]}" / name for name in sorted(PAGES)]
    shown = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", "-Kutf8", "-P-cbou", "-rLL=2000n", "-rcR=0", *pages],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stderr == ""
    said = set(words(shown.stdout))
    for name, source in PAGES.items():
        # Where links lead, and heads of tables, are not shown.
        text = re.sub(r"\]\([^)]*\)|^\|.*\|\n\|[-| ]+\|$", "", source.read_text(), flags=re.MULTILINE)
        assert [word for word in words(text) if word not in said] == [], name


def test_each_call_of_a_library_has_a_page(troff: Path) -> None:
    for name in ("bproc", "beostat"):
        header = (TOP / "bpfs" / "lib" / "csrc" / "sys" / f"{name}.h").read_text()
        for call in set(re.findall(rf"\b(_?{name}_\w+)\((?!set, i)", header)):
            assert (troff / "man3" / f"{call}.3").read_text() == f".so man3/lib{name}.3\n"
