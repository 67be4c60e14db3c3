from __future__ import annotations

import re
import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from exegete.analysis.index_page import extremes
from exegete.analysis.report import write_report
from exegete.analysis.shapes import BASELINES
from exegete.analysis.summary import summarise
from exegete.analysis.text import bracket, number, percent, small
from exegete.metrics import Interval
from exegete.results import Results
from exegete.results_columns import ScoreColumn
from exegete.scorers.scorer import Scoring
from exegete.tokens import TokenTable
from exegete.types import Example, ExampleSet, Explanation, Judgement, LatentId, LatentStats, Score, Skipped

if TYPE_CHECKING:
    from .conftest import SyntheticRun

NAME = '<script>alert("x")</script> \u202eevil\u2066 <img src=x onerror=alert(1)>{{ 7*7 }}\x1b[31m</style>&lt;"\''
HOSTILE = NAME + "\ud800"
ALLOWED_TAGS = frozenset(
    re.findall(
        r"\w+",
        "html head meta title style body nav div span a main header h1 h2 h3 h4 p ul ol li figure figcaption section "
        "table thead tbody tr th td b em code pre strong i svg line polygon polyline rect circle text g blockquote "
        "details summary dl dt dd input select option button script",
    )
)


class Page(HTMLParser):
    """What a browser would see: tags, links, handlers, and the cells of each table by its id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._table = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "action")]
        if tag == "table":
            self._table = dict(attrs).get("id") or dict(attrs).get("class") or ""
            self.tables[self._table] = []
        if tag == "tr":
            self.tables[self._table].append([])
        if tag in ("td", "th"):
            self.tables[self._table][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._table = ""

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._table and self.tables[self._table] and self.tables[self._table][-1]:
            self.tables[self._table][-1][-1] += data


def written(run: SyntheticRun, folder: Path, **options: Any) -> Path:
    with run.results() as results:
        write_report(results, run.table, run.examples_of, folder, **options)
    return folder


@pytest.fixture(scope="module")
def report(synthetic_run: SyntheticRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(synthetic_run, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def index(report: Path) -> Page:
    return Page((report / "index.html").read_text())


def test_there_is_a_page_per_latent_and_links_lead_to_files(report: Path, synthetic_run: SyntheticRun) -> None:
    pages = sorted((report / "latents").iterdir())
    assert len(pages) == len(synthetic_run.examples) == 36
    assert all(re.fullmatch(r"\d+-\d+\.html", page.name) for page in pages)
    for page in [report / "index.html", *pages]:
        for link in Page(page.read_text()).links:
            target = link.partition("#")[0]
            assert not target or (page.parent / target).is_file(), link


def test_previous_and_next_form_one_chain(report: Path) -> None:
    follows = {}
    for page in (report / "latents").iterdir():
        text = page.read_text()
        found = re.search(r'<a href="([^"]+)" rel="next">', text)
        follows[page.name] = found[1] if found else None
        if found:
            assert f'<a href="{page.name}" rel="prev">' in (page.parent / found[1]).read_text()
    first = next(name for name in follows if name not in follows.values())
    seen = [first]
    while (after := follows[seen[-1]]) is not None:
        seen.append(after)
    assert len(seen) == len(follows)


def test_pages_are_self_contained(report: Path) -> None:
    for page in report.rglob("*.html"):
        text = page.read_text()
        assert "http" not in text.replace("http-equiv", "")
        assert "url(" not in text
        assert "default-src 'none'" in text
        found = Page(text)
        assert not any(name.startswith("on") for name in found.attributes)
        assert set(found.tags) <= ALLOWED_TAGS


def test_the_policy_allows_exactly_the_script_of_the_page(report: Path) -> None:
    import base64
    import hashlib

    text = (report / "index.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def ci(interval: Interval) -> str:
    return bracket(interval)


def test_every_number_of_the_tables_is_the_summarys(index: Page, synthetic_run: SyntheticRun) -> None:
    with synthetic_run.results() as results:
        summary = summarise(results)
    contrasts = [[ci(c.trained), ci(c.null), bracket(c.difference, sign=True)] for c in summary.contrasts]
    assert [row[3:] for row in index.tables["contrasts"][1:]] == contrasts
    assert len(contrasts) == 12
    coders = [
        [
            c.name,
            *(f"{n:,}" for n in (c.n_latents, c.n_alive, c.n_selected, c.n_explained, c.n_skipped)),
            "–",
            "–",
            ci(c.entropy),
        ]
        for c in summary.coders
    ]
    assert index.tables["coders"][1:] == coders
    scorers = []
    executed = []
    for c in summary.coders:
        for e in c.explainers:
            for s in e.scorers:
                others = dict(s.others)
                scorers.append(
                    [
                        f"{c.name} {e.name}",
                        s.scorer,
                        "balanced accuracy",
                        s.judge,
                        f"{s.n:,}",
                        ci(s.median),
                        bracket(s.lift, sign=True),
                        "other latents",
                        ci(s.null_mean),
                        ci(s.null_median),
                        percent(s.ties.value),
                        ci(others["sensitivity"]),
                        ci(others["specificity"]),
                        f"{s.n_failed:,} / {s.n_total:,}",
                    ]
                )
            assert e.executed is not None
            for part in (e.executed, *e.thirds):
                row = [c.name if part.name == "all" else part.name, f"{part.n:,}"]
                row += [small(part.metric("base_rate").value), ci(part.metric("auprc"))]
                for name in BASELINES:
                    row += [ci(dict(part.baselines)[name]), bracket(dict(part.lifts)[name], sign=True)]
                executed.append(row + [ci(part.metric(m)) for m in ("precision", "recall", "f1", "pearson")])
    assert index.tables["scorers"][1:] == scorers
    assert index.tables["executed-table"][1:] == executed
    assert len(executed) == 12


def test_captions_print_the_summarys_numbers(index: Page, synthetic_run: SyntheticRun) -> None:
    with synthetic_run.results() as results:
        summary = summarise(results)
    (trained,) = summary.trained()
    for s in trained.explainers[0].scorers:
        assert f"median {ci(s.median)}; null mean {number(s.null_mean.value)}, median {ci(s.null_median)}" in index.text
        for curve in s.curves:
            if not curve.truth and curve.control == "none":
                assert f"Specificity: silent {ci(curve.points[0][2])}." in index.text
    for c in summary.contrasts:
        if c.quantity.endswith("lift"):
            assert f"(difference {bracket(c.difference, sign=True)})" in index.text


def test_the_report_opens_with_the_controls(index: Page) -> None:
    assert index.text.index("Trained against controls") < index.text.index("The run")
    assert index.text.index("random-init coder") < index.text.index("Scores against their null")


def test_a_run_without_controls_says_that_its_null_is_the_weakest(
    build: Callable[..., SyntheticRun], tmp_path: Path
) -> None:
    run = build(nulls=False, n_latents=4)
    text = Page((written(run, tmp_path / "report") / "index.html").read_text()).text
    assert "the weakest null in the field" in text
    assert "Trained against controls" not in text


def test_a_latents_page_shows_its_scores_beside_their_nulls(report: Path, synthetic_run: SyntheticRun) -> None:
    latent = LatentId(coder="layers.3", index=10)
    page = Page((report / "latents" / "0-10.html").read_text())
    rows = {(row[0], row[1]): row for row in page.tables["latent-scores"][1:]}
    with synthetic_run.results() as results:
        scores = results.scores(coder=latent.coder, index=latent.index)
        (explanation,) = [e for e in results.explanations(latent.coder).values() if e.latent == latent]
    assert explanation.text is not None
    assert explanation.text in page.text
    own = {(s.scorer, s.metric): s for s in scores if s.control == "none"}
    null = {(s.scorer, s.metric): s for s in scores if s.control != "none"}
    for metric, shown in (("balanced_accuracy", "balanced accuracy"), ("f1", "F1")):
        row = rows["detection", shown]
        a, b = own["detection", metric], null["detection", metric]
        assert row[2] == f"{number(a.value)} [{number(a.low)}, {number(a.high)}]"
        assert row[4] == f"{number(b.value)} [{number(b.low)}, {number(b.high)}]"
        assert row[6] == str(a.n_scored)
        widened = f" [{number(a.floor)}, {number(a.ceiling)}]" if a.n_failed else ""
        assert row[7] == f"{a.n_failed}{widened}"
    assert rows["no rule", "AUPRC, smoothed bigram table"][2].startswith(number(own["baseline", "auprc_bigram"].value))
    assert rows["execution", "base rate"][2].startswith(small(own["execution", "base_rate"].value))
    assert rows["execution", "AUPRC"][4] == "–"
    assert "judge: executed rule" in page.text
    assert not [metric for _, metric in rows if "mass" in metric]


def test_windows_show_every_strength_and_judgement(tmp_path: Path) -> None:
    table = TokenTable([b"<bos>", b" the", b"\n", b"    ", "é".encode()[:1], "é".encode()[1:]], special=[0])
    latent = LatentId(coder="a", index=0)
    tokens = np.array([0, 1, 2, 3, 4, 5], dtype=np.uint32)

    def window(row: int, split: Any, values: list[float], stratum: str) -> Example:
        return Example(
            split=split,
            fires=any(values),
            stratum=stratum,
            row=row,
            start=32,
            tokens=tokens,
            activations=np.array(values, dtype=np.float32),
            document=row,
            inclusion_probability=1.0,
            multiplicity=1 + row,
        )

    chosen = ExampleSet(
        latent=latent,
        examples=(
            window(0, "train", [0, 2.0, 0, 0, 0, 0.01], "top"),
            window(1, "test", [0, 1.0, 0, 4.0, 0, 0], "bin_0"),
            window(2, "test", [0, 0, 0, 0, 0, 0], "silent"),
        ),
        maximum=2.0,
        firing_rate=0.5,
        frame=2,
        seed=0,
    )
    judged = (
        Judgement(row=1, start=32, document=1, stratum="decile_0", truth=True, prediction=False, probability=0.25),
        Judgement(row=2, start=32, document=2, stratum="silent", truth=False, prediction=False),
        Judgement(row=2, start=32, document=2, stratum="silent", truth=False, prediction=None, status="unparsed"),
    )
    explanation = Explanation(latent=latent, text="t", status="ok", explainer={"name": "default", "args": {}})
    own = Score(
        latent=latent, scorer="detection", metric="balanced_accuracy", value=0.5, low=0.1, high=0.9, method="m",
        n_total=3, n_scored=2, n_failed=1,
    )  # fmt: skip
    with Results.open(tmp_path / "results.db") as results:
        id_ = results.add_explanation(explanation, "k")
        results.add_scoring(Scoring(explanation=explanation, scores=(own,), judgements={"none": judged}), "d", id_)
        write_report(results, table, lambda _: chosen, tmp_path / "report")
    text = (tmp_path / "report" / "latents" / "0-0.html").read_text()
    windows = re.findall(r'<div class="window">(.*?)</div><div class="side">(.*?)</div></div>', text, flags=re.S)
    assert len(windows) == 3
    train, firing, silent = windows
    assert train[0] == (
        '&lt;bos&gt;<span class="t a10 peak" title="2.000 · token 1"> the</span><i>↵</i><i>····</i>'
        '<span class="t a1" title="0.010 · token 5">é</span>'
    )
    assert '<span class="t a5" title="1.000 · token 1"> the</span>' in firing[0]
    assert '<span class="t a10 peak" title="4.000 · token 3"><i>····</i></span>' in firing[0]
    assert '<span class="wrong" title="judge said no (P(yes) 0.25); it fires">detection ✗</span>' in firing[1]
    assert '<span class="ok" title="judge said no; it does not fire">detection ✓</span>' in silent[1]
    assert '<span class="failed" title="unparsed; it does not fire">detection ?</span>' in silent[1]
    assert 'class="t ' not in silent[0]
    assert "<span>2.00 · top · row 0:32</span>" in train[1]
    assert "<span>4.00 · bin 1 · one of 2 alike · row 1:32</span>" in firing[1]
    assert "<span>silent · one of 3 alike · row 2:32</span>" in silent[1]


def hostile_run(folder: Path) -> tuple[Results, TokenTable, ExampleSet]:
    coder = f"layers {NAME}"
    latent = LatentId(coder=coder, index=0)
    table = TokenTable([HOSTILE.encode("utf-8", errors="surrogatepass"), b"</style>", b"\xe2\x80\xae"], special=[2])
    examples = [
        Example(
            split="train" if row < 2 else "test",
            fires=row % 2 == 0,
            stratum="random" if row % 2 == 0 else "silent",
            row=row,
            start=0,
            tokens=np.array([0, 1, 2, 0], dtype=np.uint32),
            activations=np.array([0, 1, 0, 2], dtype=np.float32) * (row % 2 == 0),
            document=row,
            inclusion_probability=1.0,
        )
        for row in range(4)
    ]
    chosen = ExampleSet(latent=latent, examples=tuple(examples), maximum=2.0, firing_rate=0.5, frame=2, seed=0)
    results = Results.open(folder / "results.db")
    results.put_meta("title", HOSTILE)
    results.put_meta(NAME, {HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]})
    results.put_meta("corpus", {HOSTILE: HOSTILE, "tokens": 3})
    results.put_meta("config", {"llm": {"llm": f"http://{HOSTILE}#{HOSTILE}"}})
    skipped = Skipped(latent=LatentId(coder=coder, index=9), stage=NAME, reason=HOSTILE, have=1, need=2)
    results.add_skip(skipped, "s")
    explanation = Explanation(
        latent=latent,
        text=HOSTILE,
        status="ok",
        explainer={"name": HOSTILE, "args": {}},
        program={HOSTILE: HOSTILE},
        detail={HOSTILE: HOSTILE},
    )
    id_ = results.add_explanation(explanation, "k")
    scores = [
        Score(
            latent=latent, scorer=name, metric=metric, value=0.5, low=0.4, high=0.6, method=NAME, n_total=2,
            n_scored=2, n_failed=0, control=control,
        )
        for name, metric, control in (
            (NAME, "balanced_accuracy", "none"),
            (NAME, "balanced_accuracy", "other_latent"),
            (NAME, NAME, "none"),
            ("execution", "auprc", "none"),
            ("baseline", NAME, "none"),
        )
    ]  # fmt: skip
    judged = tuple(
        Judgement(row=e.row, start=0, document=e.row, stratum=HOSTILE, truth=e.fires, prediction=True)
        for e in examples[2:]
    )
    made = Scoring(explanation=explanation, scores=tuple(scores), judgements={"none": judged})
    results.add_scoring(made, "d", id_, scorer=NAME)
    counts = LatentStats(
        latent=latent, count=2, rate=0.5, maximum=2.0, mean=1.0, sum_squares=2.0, histogram=np.array([1, 1]),
        edges=np.array([0.5, 1.0, 2.0]), top_tokens=((0, 1), (1, 1), (999, 1)), token_entropy=1.0,
    )  # fmt: skip
    results.add_latents([counts], selected=[latent])
    return results, table, chosen


def test_nothing_foreign_acts_in_a_page(tmp_path: Path) -> None:
    results, table, chosen = hostile_run(tmp_path)
    with results:
        write_report(results, table, lambda _: chosen, tmp_path / "report")
    pages = sorted((tmp_path / "report").rglob("*.html"))
    assert [page.name for page in pages] == ["index.html", "0-0.html"]
    for page in pages:
        text = page.read_text()
        found = Page(text)
        assert found.tags.count("script") == (page.name == "index.html")
        assert found.tags.count("style") == 1
        assert set(found.tags) <= ALLOWED_TAGS
        assert not any(name.startswith("on") for name in found.attributes)
        assert all(re.fullmatch(r"(\.\./index\.html)?(#\w+)?|latents/0-0\.html", link) for link in found.links)
        hidden = {c for c in text if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}} - set("\n\t")
        assert hidden == set()
        assert "⟨U+202E⟩" in text
        assert "{{ 7*7 }}" in text
        assert "<img" not in text
        assert "<script>alert" not in text


def test_the_same_results_give_the_same_bytes(synthetic_run: SyntheticRun, report: Path, tmp_path: Path) -> None:
    again = written(synthetic_run, tmp_path / "again")
    files = sorted(path.relative_to(report) for path in report.rglob("*.html"))
    assert files == sorted(path.relative_to(again) for path in again.rglob("*.html"))
    assert all((report / name).read_bytes() == (again / name).read_bytes() for name in files)


def test_equal_runs_made_anew_give_the_same_bytes(build: Callable[..., SyntheticRun], tmp_path: Path) -> None:
    first = written(build(n_latents=3, nulls=False), tmp_path / "a")
    shutil.rmtree(tmp_path / "run")
    second = written(build(n_latents=3, nulls=False), tmp_path / "b")
    assert (first / "index.html").read_bytes() == (second / "index.html").read_bytes()


def test_pages_are_capped_and_old_ones_removed(synthetic_run: SyntheticRun, tmp_path: Path) -> None:
    folder = written(synthetic_run, tmp_path / "report")
    (folder / "latents" / "notes.html").write_text("mine")
    written(synthetic_run, folder, max_latent_pages=5)
    names = sorted(path.name for path in (folder / "latents").iterdir())
    assert len(names) == 3 * 5 + 1
    assert "notes.html" in names
    page = Page((folder / "index.html").read_text())
    assert len(page.tables["latents"]) == 1 + 15
    assert "21 more latents are in results.db but not in this page." in page.text
    with synthetic_run.results() as results:
        column = results.score_column("layers.3", "execution", "auprc")
    best, worst = extremes(column, 1)
    for position in (*best, *worst):
        assert f"0-{column.index[position]}.html" in names


def test_extremes_do_not_overlap() -> None:
    def column(*values: float) -> ScoreColumn:
        n = np.arange(len(values))
        value = np.array(values)
        return ScoreColumn(index=n, value=value, low=value, high=value, n_total=n, n_failed=n)

    assert extremes(column(0.1, 0.9, float("nan"), 0.5), 10) == ([1, 3], [0])
    assert extremes(column(0.1, 0.9, 0.5, 0.7), 1) == ([1], [0])
    assert extremes(column(0.5, 0.5, 0.5), 1) == ([0], [2])
    assert extremes(column(), 3) == ([], [])


def test_a_latent_without_windows_or_explanation_has_a_page_that_says_so(tmp_path: Path) -> None:
    latent = LatentId(coder="a", index=4)
    failed = Explanation(latent=latent, text=None, status="refused", explainer={"name": "default", "args": {}})
    with Results.open(tmp_path / "results.db") as results:
        results.add_explanation(failed, "k")
        write_report(results, TokenTable([b"a"]), lambda _: None, tmp_path / "report")
    text = Page((tmp_path / "report" / "latents" / "0-4.html").read_text()).text
    assert "There is no explanation: its status is refused." in text
    assert "There are no windows to show" in text
    assert "No counts are stored" in text
    assert "a (default): 1 refused" in Page((tmp_path / "report" / "index.html").read_text()).text


def test_an_empty_run_has_a_report(tmp_path: Path) -> None:
    with Results.open(tmp_path / "results.db") as results:
        write_report(results, TokenTable([b"a"]), lambda _: None, tmp_path / "report")
    assert "No latent was skipped." in (tmp_path / "report" / "index.html").read_text()


def test_half_a_surrogate_pair_in_an_explanation_does_no_harm(tmp_path: Path) -> None:
    made = Explanation(latent=LatentId(coder="a", index=4), text="\ud800", status="ok", explainer={"name": "r"})
    with Results.open(tmp_path / "results.db") as results:
        results.add_explanation(replace(made), "k")
        write_report(results, TokenTable([b"a"]), lambda _: None, tmp_path / "report")
    assert "⟨U+D800⟩" in (tmp_path / "report" / "latents" / "0-4.html").read_text()
