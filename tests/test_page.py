import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from tests.test_runs import write_run
from tests.test_tables import write_evaluation
from utils.errors import InputError
from utils.report.figures import gap_bars
from utils.report.page import command_of, write_report
from utils.report.runs import find_runs, grouped
from utils.storage.files import drawn, writable_folder

EVIL = "<script>alert('x')</script>&\"quoted\""
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Asserts that tags match; collects elements and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page_path(tmp_path):
    """The page of made-up runs: two methods with two seeds, and a run whose name is HTML."""
    for seed in (1, 2):
        write_run(tmp_path / "runs", "dense", seed, ra=48.0 + seed)
        run = write_run(tmp_path / "runs", "fbp", seed, ra=50.0 + seed, density=0.1, live=0.07)
        write_evaluation(run, title=EVIL)
        write_evaluation(run, "b")
    write_run(tmp_path / "runs", "rb", 1, name=EVIL.replace("/", ""), data=EVIL)
    groups, _ = grouped(find_runs([tmp_path / "runs"])[0])
    out = tmp_path / "out"
    writable_folder(out)
    return write_report(out, groups, None)


def test_the_page_is_whole_and_needs_nothing_else(page_path):
    text = page_path.read_text()
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in page.all("meta")
    assert "5 runs" in re.search("<title>(.*)</title>", text)[1]
    assert not page.all("link") + page.all("script") + page.all("iframe")
    assert all(
        image["src"].startswith("data:image/svg+xml;base64,") and image["alt"]
        for image in page.all("img")
    )
    assert not re.search(r"(src|href)\s*=\s*[\"']?(http|//)|url\(|@import", text)
    # curves, sparsity, gaps, densities, distances
    assert len(page.all("img")) == len(list(page_path.parent.glob("*.png"))) == 5
    assert len(page.all("figcaption")) == 5


def test_the_page_shows_tables_and_how_each_run_was_made(page_path):
    page = Page(page_path.read_text())
    for words in (
        "Strong evaluations",
        "90 % of the weights pruned",
        "51.50 ± 0.71",
        "ours - paper",
        "all settings",
        "a machine",
        "revision",
    ):
        assert words in page.text, words
    assert len(page.all("details")) == 2 * 5
    assert "python main_adv.py --dataset cifar10 --seed 2 --fbp --density 0.1" in page.text
    assert (page_path.parent / "evaluations.csv").read_text().count("\n") == 3
    assert (page_path.parent / "evaluations.md").read_text().count("###") == 2


def test_text_from_outside_is_escaped(page_path):
    text = page_path.read_text()
    assert "<script" not in text
    page = Page(text)
    assert EVIL in page.text
    assert EVIL.replace("/", "") in page.text


def test_the_same_runs_give_the_same_page(page_path, tmp_path):
    before = page_path.read_bytes()
    groups, _ = grouped(find_runs([tmp_path / "runs"])[0])
    write_report(page_path.parent, groups, None)
    assert page_path.read_bytes() == before
    assert drawn(gap_bars(groups), "svg") == drawn(gap_bars(groups), "svg")


def test_a_command_says_what_is_not_at_its_default(tmp_path):
    write_run(tmp_path, "rb-channel", 3, data="a b", train_randinit=False, save_dir="elsewhere")
    (group,), _ = grouped(find_runs([tmp_path])[0])
    expected = (
        "python Robust-Bird/train_eb.py --dataset cifar10 --data 'a b' --seed 3 --no-train_randinit"
        " --pruning channel"
    )
    assert command_of(group.first) == expected


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write into"):
        writable_folder(tmp_path / "file", "--out DIR")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_the_page(page_path, tmp_path, width):
    picture = tmp_path / "screenshot.png"
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command = [
        CHROMIUM,
        *flags,
        f"--window-size={width},3000",
        f"--screenshot={picture}",
        page_path.as_uri(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert picture.stat().st_size > 20_000, result.stderr
    assert "CONSOLE" not in result.stderr
