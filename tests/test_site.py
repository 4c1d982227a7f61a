"""The site of the documentation: every page has its place, it is built without a warning, it loads nothing from outside."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}


def targets(entry: object) -> Iterator[str]:
    """The pages that a part of the navigation names."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict):
        yield from (page for inner in entry.values() for page in targets(inner))
    elif isinstance(entry, list):
        yield from (page for inner in entry for page in targets(inner))


def test_every_page_has_one_place_in_the_navigation() -> None:
    project = tomllib.loads((ROOT / "zensical.toml").read_text("utf-8"))["project"]
    placed = list(targets(project["nav"]))
    assert len(placed) == len(set(placed))
    assert set(placed) == PAGES


def test_every_package_has_its_page_of_the_reference() -> None:
    packages = {path.parent.name for path in (ROOT / "src" / "kilofed").glob("*/__init__.py")}
    assert {f"reference/{name}.md" for name in packages} == {
        page for page in PAGES if page.startswith("reference/") and page != "reference/index.md"
    }
    for name in packages:
        assert (ROOT / "docs" / "reference" / f"{name}.md").read_text("utf-8") == f"::: kilofed.{name}\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the site is made of, in a folder of its own."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "zensical.toml", folder)
    shutil.copytree(ROOT / "docs", folder / "docs")
    (folder / "src").symlink_to(ROOT / "src")
    return folder


def build(project: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_outside(project: Path) -> None:
    done = build(project)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "griffe" not in said
    pages = {str(path.relative_to(project / "site")): path for path in (project / "site").rglob("*.html")}
    assert {page.removesuffix(".md") + ".html" for page in PAGES} <= pages.keys()
    loads = re.compile(r"""<(?:script|img|link|iframe|source)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^"' >]*""")
    for name, path in pages.items():
        assert not loads.findall(path.read_text("utf-8")), name
    for style in (project / "site").rglob("*.css"):
        assert not re.findall(r"""(?:url\(|@import\s+)["']?(?:https?:)?//""", style.read_text("utf-8")), style
    assert "The weighted mean of the replies" in pages["reference/federation.html"].read_text("utf-8")


@pytest.mark.slow
def test_a_link_that_leads_nowhere_stops_the_build(tmp_path: Path) -> None:
    settings = (ROOT / "zensical.toml").read_text("utf-8")
    (tmp_path / "zensical.toml").write_text(re.sub(r"^nav = \[.*?^\]$", "", settings, flags=re.M | re.S), "utf-8")
    (tmp_path / "src").mkdir()
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "index.md"
    page.write_text("# A page\n\n[itself](index.md)\n", "utf-8")
    assert build(tmp_path).returncode == 0
    page.write_text("# A page\n\n[nowhere](no-such-page.md)\n", "utf-8")
    done = build(tmp_path)
    assert done.returncode != 0
    assert "page does not exist" in done.stdout + done.stderr
