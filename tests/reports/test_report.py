"""The page says what the run folder holds, to the byte, and needs nothing but itself."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.made_results import MADE, made, row

from kilofed.errors import RunError
from kilofed.federation.ledger import Ledger, Row
from kilofed.records.codec import to_json
from kilofed.records.facts import Forecast
from kilofed.records.results import Costs, PartyCost, PrivacySpent, Results, TotalBytes
from kilofed.reports import report

NASTY = '<script>alert("x")</script> & co'
NAMES = ["torch", "numbers & text", "_private $x$", "<b>bold</b>", "系统"]


class Page(HTMLParser):
    """The tags, the visible text and the table rows of a page."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(path.read_text("utf-8"))
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        """The only table row that begins with `first`."""
        (found,) = [row for row in self.rows if row and row[0] == first]
        return found


def a_row(at: int, client: int, way: str, num_bytes: int, action: str = "fit", verb: str = "mean") -> Row:
    return Row(at, 0, action, verb, way, client, num_bytes, 0.5)  # type: ignore[arg-type]


def plain_rows(num_rounds: int = 3, num_clients: int = 5, up: int = 1_003, down: int = 2_007) -> list[Row]:
    return [
        a_row(at, client, way, num_bytes)
        for at in range(1, num_rounds + 1)
        for way, num_bytes in (("down", down), ("up", up))
        for client in range(num_clients)
    ]


def make(
    folder: Path,
    *,
    rows: Iterable[Row] = (),
    name: str = "tiny",
    labels: bool = True,
    results: Results | None = None,
    num_rounds: int = 3,
    num_clients: int = 5,
) -> Path:
    """A run folder as a finished run leaves it, but for its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [NAMES[i] if i < len(NAMES) else f"client {i}" for i in range(num_clients)]
    run = {
        "kilofed": "0.1.0",
        "created": "2030-01-02T03:04:05+00:00",
        "recipe": {
            "name": name,
            "rounds": num_rounds,
            "model": {"path": "builtin:small"},
            "method": {"name": "fedavg"},
        },
        "environment": {"python": "3.11.0", "device": "cpu"},
        "data_note": "made by hand",
        "clients": [
            {
                "id": i,
                "name": each,
                "train_rows": 100 + i,
                "test_rows": 10 + i,
                "labels": {f"kind {k}": 5 * i + k for k in range(10)} if labels else {},
            }
            for i, each in enumerate(names)
        ],
        "forecast": [{"action": "fit", "down": [2_007, 2_007], "up": [1_003, 1_003], "exchanges": [1, 1]}],
        "num_trained": 43_776,
        "num_parameters": 769_440,
    }
    rounds = [
        {
            "round": at,
            "loss": 4.5 - at / 3,
            "accuracy": 0.25,
            "clients": [{"id": i, "loss": 4.4 - at / 3 + i / 10, "num_tokens": 9} for i in range(num_clients)],
            **({"train_loss": 4.0 - at, "failures": {}, "seconds": 0.5} if at else {}),
        }
        for at in range(num_rounds + 1)
    ]  # fmt: skip
    (folder / "recipe.toml").write_text(f'name = "{name}"\n', "utf-8")
    (folder / "run.json").write_text(json.dumps(run), "utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rounds), "utf-8")
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results.to_json()), "utf-8")
    ledger = Ledger(folder / "ledger.jsonl")
    for sent in rows:
        ledger.add(sent)
    ledger.close()
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its page, to be read only."""
    folder = make(tmp_path_factory.mktemp("run"), rows=plain_rows(), results=MADE)
    report.write(folder)
    return folder


def test_totals_are_the_sums_of_ledger_rows(tmp_path: Path) -> None:
    rows = [
        a_row(at, client, way, 1_000 * at + 17 * client + (way == "up"))
        for at in (1, 2, 3)
        for way in ("down", "up")
        for client in range(5)
    ]
    page = Page(report.write(make(tmp_path, rows=rows, results=MADE)))
    for way in ("down", "up"):
        assert f"{sum(row.bytes for row in rows if row.direction == way):,} bytes" in page.text
    for client, name in enumerate(NAMES):
        mine = [sum(r.bytes for r in rows if (r.client, r.direction) == (client, way)) for way in ("up", "down")]
        assert page.row(name)[-2:] == [f"{count:,}" for count in mine]
    for at in (1, 2, 3):
        sums = [sum(r.bytes for r in rows if (r.round, r.direction) == (at, way)) for way in ("up", "down")]
        assert page.row(str(at))[4:7] == [*(f"{count:,}" for count in sums), "1"]


def test_scores_and_intervals_are_those_of_the_results(folder: Path) -> None:
    page = Page(folder / "report.html")
    assert page.row("federated") == ["federated", "3.500 [3.250, 3.750]", "31.2 %", "2.50", "0.250", "50.0 %"]
    assert page.row("base")[-2:] == ["-", "-"]
    assert "Held-out loss 3.500: lower than the base model's (4.500)" in page.text
    assert "federated is 0.250 nats below local-only training" in page.text


def test_a_model_that_does_not_win_is_said_to_lose(tmp_path: Path) -> None:
    rows = {"base": row(3.0), "federated": row(3.5)}
    page = Page(report.write(make(tmp_path, results=made(rows=rows))))
    assert "NOT lower than the base model's (3.000)" in page.text


def test_what_users_wrote_is_text_and_never_markup(tmp_path: Path) -> None:
    results = made(name=NASTY, method=NASTY, verdict=(NASTY,))
    folder = make(tmp_path, rows=[*plain_rows(), a_row(3, 0, "up", 1, action=NASTY)], name=NASTY, results=results)
    add_failure(folder, NASTY)
    page = Page(report.write(folder))
    assert "script" not in {tag for tag, _ in page.tags}
    assert "b" not in {tag for tag, _ in page.tags}
    assert page.text.count(NASTY) >= 6, "title, heading, method, verdict, action, failure, recipe"


def add_failure(folder: Path, text: str, outlier: str = "") -> None:
    told = {"failures": {"2": text}, **({"outliers": {"1": outlier}} if outlier else {})}
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"round": 4, "loss": None, **told, "clients": []}) + "\n")


def test_failures_are_listed_by_round_and_name(tmp_path: Path, folder: Path) -> None:
    assert "None: every client that was asked answered." in Page(folder / "report.html").text
    make(tmp_path, rows=plain_rows(), results=MADE)
    add_failure(tmp_path, "the loss was NaN")
    assert ["4", NAMES[2], "the loss was NaN"] in Page(report.write(tmp_path)).rows


def test_replies_unlike_the_others_are_listed_by_round_and_name(tmp_path: Path, folder: Path) -> None:
    assert "Replies unlike the others" not in Page(folder / "report.html").text
    make(tmp_path, rows=plain_rows(), results=MADE)
    add_failure(tmp_path, "the loss was NaN", "<b>over 10 times</b> the median")
    page = Page(report.write(tmp_path))
    assert ["4", NAMES[1], "<b>over 10 times</b> the median"] in page.rows


def test_the_page_needs_nothing_but_itself(folder: Path) -> None:
    page = Page(folder / "report.html")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "base"}
    for tag, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "data", "action"):
            assert (attributes.get(key) or "#").startswith("#"), (tag, key, attributes[key])
    source = (folder / "report.html").read_text("utf-8")
    assert "@import" not in source
    assert not re.findall(r"url\((?!#)", source)
    assert "http" not in source


def test_every_plot_has_words_and_every_id_is_its_own(folder: Path) -> None:
    page = Page(folder / "report.html")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    drawings = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(drawings) == 6
    assert all(page.text.count(name) == 4 for name in NAMES), "a key, the ticks of two plots, a table"
    for drawing in drawings:
        assert set((drawing["aria-labelledby"] or "").split()) <= set(ids)
    source = (folder / "report.html").read_text("utf-8")
    assert set(re.findall(r'(?:href="#|url\(#)([\w.-]+)', source)) <= set(ids)
    assert set(re.findall(r"var\((--\w+)\)", source)) <= set(re.findall(r"(--\w+):", source))


def test_same_folder_same_bytes(folder: Path) -> None:
    first = (folder / "report.html").read_bytes()
    assert report.write(folder).read_bytes() == first
    assert sorted(path.name for path in folder.iterdir()) == [
        "ledger.jsonl", "metrics.jsonl", "recipe.toml", "report.html", "results.json", "run.json",
    ]  # fmt: skip


def test_forecast_beside_measured_is_said_in_words(tmp_path: Path, folder: Path) -> None:
    page = Page(folder / "report.html")
    assert "Every forecast equals what was measured" in page.text
    assert [r for r in page.rows if r[-1:] == ["equal"]] == [
        ["fit", "down", "2,007", "2,007", "equal"],
        ["fit", "up", "1,003", "1,003", "equal"],
        ["fit", "exchanges", "1", "1", "equal"],
    ]  # fmt: skip
    rows = [*plain_rows(), a_row(4, 0, "up", 1_004)]
    page = Page(report.write(make(tmp_path, rows=rows, results=MADE)))
    assert "1 of 3 forecasts differ from what was measured." in page.text
    assert ["fit", "up", "1,003", "1,003 to 1,004", "differs"] in page.rows


def test_the_verb_decides_what_is_said_about_privacy(tmp_path: Path, folder: Path) -> None:
    mean = Page(folder / "report.html").text
    assert "the method never sees a single client's reply" in mean
    assert "saw every client's reply by itself" not in mean
    rows = [a_row(1, 0, way, 10, action="stack", verb="call") for way in ("down", "up")]
    call = Page(report.write(make(tmp_path / "call", rows=rows, results=MADE))).text
    assert "call (stack): the method saw every client's reply by itself" in call
    assert "never sees" not in call


def test_spent_privacy_is_shown(tmp_path: Path) -> None:
    spent = PrivacySpent("central", 3.21, 1e-5, 6)
    page = Page(report.write(make(tmp_path, rows=plain_rows(), results=made(privacy=spent))))
    assert "epsilon 3.21 at delta 1e-05 spent over 6 noisy means" in page.text
    assert "No noise was added" not in page.text
    assert "no guarantee" in report.table(made(privacy=replace(spent, epsilon=None)), 80)


def test_results_that_disagree_with_the_ledger_are_told(tmp_path: Path, folder: Path) -> None:
    assert "disagree" not in Page(folder / "report.html").text
    up, down = (sum(row.bytes for row in plain_rows() if row.direction == way) for way in ("up", "down"))
    results = made(bytes_total=TotalBytes(up, down))
    assert "disagree" not in Page(report.write(make(tmp_path / "a", rows=plain_rows(), results=results))).text
    results = made(bytes_total=TotalBytes(up + 1, down))
    assert "disagree" in Page(report.write(make(tmp_path / "b", rows=plain_rows(), results=results))).text


def test_absent_rows_are_left_out(tmp_path: Path) -> None:
    results = made(rows={"federated": row(3.5)})
    page = Page(report.write(make(tmp_path, rows=plain_rows(), results=results)))
    assert [row[0] for row in page.rows[:2]] == ["", "federated"]
    assert page.row("federated")[-2:] == ["-", "-"]
    assert "centralized" not in report.table(results, 80)


def test_an_unfinished_run_is_reported_as_such(tmp_path: Path) -> None:
    page = Page(report.write(make(tmp_path, rows=plain_rows(num_rounds=2), num_rounds=2)))
    assert "This run has not finished: 2 of 2 rounds are here." in page.text
    assert "federated" not in [row[0] for row in page.rows if row]


def test_a_run_that_did_nothing_yet_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"recipe": {"rounds": 3}}', "utf-8")
    text = Page(report.write(tmp_path)).text
    assert "This run has not finished: 0 of 3 rounds are here." in text
    assert "Nothing was sent." in text


@pytest.mark.parametrize("num_clients", [1, 9, 70])
def test_any_number_of_clients_and_rounds_can_be_drawn(tmp_path: Path, num_clients: int) -> None:
    folder = make(
        tmp_path,
        rows=plain_rows(130, num_clients),
        results=MADE,
        labels=False,
        num_rounds=130,
        num_clients=num_clients,
    )
    page = Page(report.write(folder))
    assert f"{130 * num_clients * 1_003:,} bytes" in page.text
    assert "sent per round, means of 3" in page.text
    assert ("The first 60 of 70 clients" in page.text) == (num_clients == 70)


def test_seeds_are_summed_and_shown_one_by_one(tmp_path: Path) -> None:
    results = made(seeds=(0, 1))
    make(tmp_path, results=results)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "ledger.jsonl").unlink()
    report.write(make(tmp_path / "seed-0", rows=plain_rows(up=1_003), results=MADE))
    make(tmp_path / "seed-1", rows=plain_rows(up=2_003), results=made(rows={"federated": row(3.625)}))
    page = Page(report.write(tmp_path))
    assert f"{15 * (1_003 + 2_003):,} bytes" in page.text
    assert page.row("seed-0") == ["seed-0", "3.500", "15,045", "30,105", "3"]
    assert page.row("seed-1") == ["seed-1", "3.625", "30,045", "30,105", "3"]
    assert "95 % interval over 2 seeds" in page.text
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == ["seed-0/report.html"], "a page that is not there is not linked"


def test_a_broken_folder_leaves_the_page_as_it_was(tmp_path: Path) -> None:
    page = report.write(make(tmp_path, rows=plain_rows(), results=MADE))
    before = page.read_bytes()
    with (tmp_path / "ledger.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"round": 4, "exch')
    with pytest.raises(RunError, match="line 31 is not a ledger row"):
        report.write(tmp_path)
    assert page.read_bytes() == before


def test_table_says_scores_costs_and_verdict() -> None:
    results = made(bytes_total=TotalBytes(6_172_835, 11_728_390))
    assert report.table(results, 120).splitlines() == [
        "                             loss  accuracy  perplexity  ROUGE-L  exact match",
        "base         4.500 [4.250, 4.750]    31.2 %        2.50        -            -",
        "local-only   3.750 [3.500, 4.000]    31.2 %        2.50    0.125        0.0 %",
        "federated    3.500 [3.250, 3.750]    31.2 %        2.50    0.250       50.0 %",
        "centralized  3.250 [3.000, 3.500]    31.2 %        2.50    0.375       25.0 %",
        "",
        "loss: nats per held-out response token, with the 95 % interval over clients",
        "per client 1.2 MB up, 2.3 MB down; in all 6.2 MB up, 11.7 MB down; 3 exchanges, 12.3 s, 1.5 GB peak memory",
        "federated is 0.250 nats below local-only training",
    ]


def test_rows_of_a_methods_own_stand_behind_the_usual_ones() -> None:
    rows = {"large base": row(4.0), "federated": row(3.0), "base": row(5.0)}
    lines = report.scores(rows, 100).splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == ["base", "federated", "large base"]


@pytest.mark.parametrize("width", [40, 60, 80])
def test_table_keeps_to_the_width(width: int) -> None:
    text = report.table(made(seeds=(0, 1, 2)), width)
    assert max(map(len, text.splitlines())) <= width
    assert "over 3 seeds" in " ".join(text.split())
    for title in ("loss", "accuracy", "perplexity", "ROUGE-L", "exact match"):
        assert title in text


def test_scores_alone_have_no_costs() -> None:
    lines = report.scores({"federated": row(3.5)}, 100).splitlines()
    assert [line.split()[0] for line in lines if line] == ["loss", "federated", "loss:"]


def test_no_torch_is_loaded(folder: Path) -> None:
    code = (
        "import sys, pathlib; from kilofed.reports import report; report.write(pathlib.Path(sys.argv[1])); "
        "print([name for name in ('torch', 'transformers', 'matplotlib.pyplot') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_costs_are_shown_as_forecast_by_measured(tmp_path: Path) -> None:
    spent = Costs(PartyCost(2e9, 0.5, 3, 10**9), PartyCost(5e8, 0.5, 3, 10**9))
    folder = make(tmp_path, rows=plain_rows(), results=made(costs=spent))
    run = json.loads((folder / "run.json").read_text("utf-8"))
    told = Forecast("tiny", "fedavg", "trained tensors", client_flops=1e9, server_flops=1e9)
    (folder / "run.json").write_text(json.dumps({**run, "plan": to_json(told)}), "utf-8")
    page = Page(report.write(folder))
    assert page.row("operations of a client, round 1")[-1] == "0.500"
    assert page.row("operations of the server, round 1")[-1] == "2.000"
