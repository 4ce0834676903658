"""The report on made-up results: what is on the page, what a browser makes of it, and what is refused."""

import base64
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_results import EVIL, STAGES, write_all

from common.errors import UserError
from common.script import run_script
from evaluation import report
from evaluation.report_page.content import read_png
from evaluation.report_page.curves import plot
from evaluation.report_page.tables import number
from evaluation.results.results import Curves, Figure, Floor, Results, Series

VOID = {"meta", "link", "img", "path", "circle", "br"}  # elements that nothing closes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("results")
    write_all(output)
    assert run_script(report.main, ["--input-dir", f"{output}", "--title", f"Title {EVIL}"]) == 0
    return output


@pytest.fixture(scope="module")
def html(folder) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Elements with their attributes, the cells of all tables, and all text outside of <style>."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []  # every element is closed

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            return
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(html) -> Reader:
    return Reader(html)


def test_all_figures_stand_in_the_tables(page):
    rows = [" | ".join(row) for row in page.rows]
    both = "31.20 [30.50, 31.90] | 31.20 [30.50, 31.90]"  # checkpoints side by side
    assert rows.count(f"PSNR dB | ↑ higher | real 100 | {both}") == 2
    assert rows.count("SSIM | ↑ higher | real 100 | 0.9313 | 0.9313") == 2
    assert rows.count("MAE HU | ↓ lower | real 100 | – [–, 3.000] | – [–, 3.000]") == 2
    assert rows.count("Metric | Better | N | " + " | ".join(STAGES)) == 2
    assert "FID | ↓ lower | InceptionV3 | real 100generated 200 | 12.35 [11.00, 14.50] |  |  | " in rows
    assert "random 3D CNN random features | real 100generated 200 | 14.25 [11.00, 14.50] | 50 | 3.500 | 15.75" in rows
    assert "MS-SSIM | ≈ like real |  | real 100 | 1.234 × 10⁻⁵ ± 0.2500 |  |  | " in rows
    assert "N | Real against real | This set" in rows
    assert "FID | ↓ lower | real 8 | 1235" in rows


def test_everything_else_is_there_and_shown_literally(page):
    rows, text = page.rows, "".join(page.texts)
    assert [EVIL, "0.8123", "1"] in rows
    assert ["b", "–", "2"] in rows
    assert ["Reconstruction", f"a/{EVIL}.nii.gz", "not finite"] in rows
    assert ["data.json", EVIL] in rows
    assert ["data.spacing_mm", "[1.0, 2.0]"] in rows
    assert ["nothing", "null"] in rows
    for words in (f"A warning {EVIL}", "Few volumes", f"Peak signal {EVIL}.", f"Slices {EVIL}", f"Nearest {EVIL}"):
        assert words in text
    for words in ("2 warnings", "1 excluded file", "a device", "All volumes", f"PSNR {EVIL}", f"Title {EVIL}", "torch"):
        assert words in text
    assert page.texts.count("Command") == 3
    assert page.texts.count("Device") == 1
    assert not re.search(r"\bnan\b|\bNone\b", text)


def test_no_words_of_the_results_become_markup(page, html):
    assert "$x</b>" not in html
    names = ["PSNR {}: dB against slice", "Spectrum: power against 1/mm", "Slices {}", "Wide"]
    assert [image["alt"] for image in page.named("img")] == [name.format(EVIL) for name in names]


def test_pictures_are_embedded_as_they_are(page, folder):
    sources = [image["src"] for image in page.named("img")]
    found = [base64.b64decode(uri.removeprefix("data:image/png;base64,")) for uri in sources if "/png;" in uri]
    assert found == [(folder / "pictures" / name).read_bytes() for name in ("a.png", "wide.png")]


def test_warnings_come_first(html):
    places = [html.index(words) for words in ("</h1>", "A warning", "Few volumes", "<nav", "Command", "<h2>")]
    assert places == sorted(places)


def test_the_page_has_an_outline(page):
    names = [name for name, _ in page.elements]
    assert names.count("h1") == 1
    assert names.count("h2") == 3
    assert names.count("h3") == 7  # CTChest, EVIL, curves, pictures; CTChest, tables; all volumes
    assert page.named("html") == [{"lang": "en"}]
    metas = page.named("meta")
    assert {"charset": "utf-8"} in metas
    assert any(meta.get("name") == "viewport" for meta in metas)
    assert names.count("thead") == names.count("table") == 7
    assert all("scope" in attributes for attributes in page.named("th"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for attributes in page.named("a")]
    assert sorted(links) == sorted(f"#{name}" for name in ids)


def test_the_page_needs_nothing_else(page, html):
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), attributes
    assert "url(" not in html
    assert "@import" not in html
    assert "<script" not in html
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_a_part_alone_is_enough_and_the_output_can_be_named(tmp_path):
    Results("validity", {}, {}).write(tmp_path)
    report.main(["--input-dir", f"{tmp_path}", "--output", f"{tmp_path / 'new' / 'page.html'}"])
    page = Reader((tmp_path / "new" / "page.html").read_text(encoding="utf-8"))
    assert "Validity" in page.texts
    assert "Generation" not in page.texts
    assert "aside" not in [name for name, _ in page.elements]
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0, "0"), (31.2, "31.20"), (0.93127, "0.9313"), (12.0, "12.00"), (-0.5, "−0.5000"), (9999.6, "10000")),
        *((12345.0, "12340"), (123456.0, "123500"), (1.5e6, "1.500 × 10⁶"), (0.0001234, "0.0001234")),
        *((1.234e-5, "1.234 × 10⁻⁵"), (math.nan, "–"), (math.inf, "–"), (123456, "123456"), (-1, "−1")),
    ],
)
def test_numbers_have_four_digits(value, text):
    assert number(value) == text


def test_no_figure_hides_another(tmp_path):
    """Two of the same checkpoint, one of another number of volumes, one of another floor."""
    same = {"group": "", "metric": "FID", "interval": None, "better": "lower"}
    figures = [
        Figure(value=1.0, num={"real": 5}, model="a", **same),
        Figure(value=2.0, num={"real": 5}, model="a", **same),
        Figure(value=3.0, num={"real": 6}, model="<i>b", **same),
        Figure(value=4.0, num={"real": 5}, model="<i>b", **same),
        Figure(value=5.0, num={"real": 5}, model="<i>b", floor=Floor(6.0, 7.0, 2), **same),
    ]
    Results("validity", {}, {}, figures).write(tmp_path)
    report.main(["--input-dir", f"{tmp_path}"])
    head, names, *rows = Reader((tmp_path / "report.html").read_text(encoding="utf-8")).rows
    rows = [row[-7:] for row in rows]
    assert head[-3:-1] == ["a", "<i>b"]
    assert names[-2:] == ["This set: a", "This set: <i>b"]
    assert rows == [
        ["real 5", "1.000", "4.000", "", "", "", ""],
        ["real 5", "2.000", "", "", "", "", ""],
        ["real 6", "", "3.000", "", "", "", ""],
        ["real 5", "", "5.000", "2", "6.000", "", "7.000"],
    ]


def test_lines_are_cut_where_a_value_is_missing():
    """And a point that no line reaches is marked."""
    y = [1, 2, math.nan, 2, 1, *[math.nan, 3, math.nan] * 20]
    drawn = plot(Curves("t", "x", "y", [Series("_s $x$ <b>", list(range(len(y))), y)])).decode()
    (line,) = re.findall(r'<path d="([^"]+)" clip-path="[^"]+" style="[^"]*stroke: #0b66b2; stroke-width: 1.5', drawn)
    assert [part.count("L") for part in line.split("M")[1:]][:2] == [1, 1]
    assert len(re.findall(r"<use [^>]+fill: #ffffff", drawn)) == 25  # 4 + 20, and one in the legend
    assert "_s $x$ &lt;b&gt;</text>" in drawn


@pytest.mark.parametrize("y", [[], [math.nan], [2.0], [1e308], [0.0, 0.0]])
def test_plots_of_next_to_nothing(y):
    drawn = plot(Curves("t", "x", "y", [Series("s", list(range(len(y))), y)])).decode()
    assert "nan" not in drawn
    assert "inf" not in drawn


def test_nothing_there(tmp_path):
    with pytest.raises(
        UserError, match=r"none of reconstruction.json, generation.json, paired.json, validity.json is there"
    ):
        report.main(["--input-dir", f"{tmp_path}"])
    assert list(tmp_path.iterdir()) == []


def set_in(content: dict, place: str, value) -> None:
    """Sets "a.0.b" of a JSON; deletes it where the value is `del`."""
    *way, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    for part in way:
        content = content[part]
    if value == "del":
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("schema_version", 2, "schema_version is 2, this code reads 1"),
        ("figures", "del", "figures missing"),
        ("figures", {}, "figures: Input should be a valid array, found '{}'"),
        ("figures.0.value", "del", r"figures\[0\].value: Field required: run the script that wrote it again"),
        ("figures.1", None, r"figures\[1\]: Input should be an object, found 'None'"),
        ("figures.0.value", "high", r"figures\[0\].value: Input should be a valid number, found 'high'"),
        ("figures.0.value", True, r"figures\[0\].value: Input should be a valid number, found 'True'"),
        ("figures.0.value", 10**400, "cannot be read as JSON .a number of more than 100 digits"),
        ("figures.0.interval", [1], r"figures\[0\].interval\[1\]: Field required"),
        ("figures.0.num", {"real": 1.5}, r"figures\[0\].num.real: Input should be a valid integer, found '1.5'"),
        ("figures.0.better", "bigger", r"figures\[0\].better is 'bigger', not one of lower, higher, real"),
        ("figures.0.floor", {"value": 1}, r"figures\[0\].floor.comparable: Field required"),
        ("kind", "validity", "kind is 'validity', the name says 'reconstruction'"),
        ("command", "del", "reconstruction.json: command: Field required"),
        ("versions", {"torch": 2}, "versions.torch: Input should be a valid string, found '2'"),
        ("warnings", [1], r"warnings\[0\]: Input should be a valid string, found '1'"),
        ("excluded", ["a"], r"excluded\[0\]: Input should be an object, found 'a'"),
        ("curves.0.series.0.y", [1], r"curves\[0\].series\[0\]: x, y, low, high have \[3, 1, 3, 3\] values"),
        ("curves.0.series.0.low", [], r"curves\[0\].series\[0\]: x, y, low, high have \[3, 3, 0, 3\] values"),
        ("tables", [{"title": "", "columns": ["a"], "rows": [[1, 2]]}], r"tables\[0\].rows: each needs 1 cells"),
        (
            "tables",
            [{"title": "", "columns": ["a"], "rows": [[[]]]}],
            r"rows\[0\]\[0\].str: Input should be a valid",
        ),
        ("pictures.0.file", "pictures/b.png", r"reconstruction.json: picture 'pictures/b.png' cannot be read"),
        ("pictures.0.file", "\0", "cannot be read"),
        ("pictures.0.file", "../a.png", r"picture '../a.png' lies outside of the folder"),
        ("pictures.0.file", "reconstruction.csv", r"reconstruction.csv: no PNG, or a damaged one"),
    ],
)
def test_faults_are_one_line(tmp_path, folder, capsys, place, value, message):
    shutil.copytree(folder, tmp_path / "results")
    path = tmp_path / "results" / "reconstruction.json"
    (path.parent / "report.html").unlink()
    content = json.loads(path.read_text())
    set_in(content, place, value)
    path.write_text(json.dumps(content))
    assert run_script(report.main, ["--input-dir", f"{path.parent}"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (path.parent / "report.html").exists()


def test_halves_of_characters_are_replaced(tmp_path):
    Results("validity", {}, {}, warnings=["half \udce4 a character"]).write(tmp_path)
    report.main(["--input-dir", f"{tmp_path}"])
    assert "half ? a character" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_damaged_pngs_are_found(folder):
    data = (folder / "pictures" / "a.png").read_bytes()
    width, height = read_png(data)
    assert 300 < width < 1000
    assert 100 < height < 300
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    for bad in (b"", data[:8], data[:20], data[:-12], data[: len(data) // 2], bytes(flipped), b"x" + data):
        assert read_png(bad) is None
