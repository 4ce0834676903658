"""What a browser makes of the report: everything shown, nothing fetched, no sideways scrolling."""

from pathlib import Path

import pytest
from browser import BROWSER, NARROW, seen_by_browser
from report_results import EVIL, write_all

from evaluation import report


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("results")
    write_all(output)
    report.main(["--input-dir", f"{output}", "--title", f"Title {EVIL}"])
    return output


WRAPPER = """<!DOCTYPE html><iframe src="report.html" style="border:0;width:{width}px;height:3000px"></iframe>
<pre></pre><script>
window.onload = () => {{
  const frame = document.querySelector("iframe"), page = frame.contentDocument, root = page.documentElement;
  const list = (query) => [...page.querySelectorAll(query)];
  const seen = (query) => list(query).filter((e) => e.getClientRects().length && e.checkVisibility());
  const found = {{
    values: seen(".value").map((e) => e.innerText), intervals: seen(".interval").map((e) => e.innerText),
    headings: seen("h1, h2, h3").map((e) => e.innerText), warnings: seen(".warnings li").map((e) => e.innerText),
    random: seen(".random").map((e) => e.innerText), images: list("img").map((e) => [e.naturalWidth, e.clientWidth]),
    plots: seen(".plot img").map((e) => e.clientWidth), bold: list("b").map((e) => e.innerText),
    viewport: root.clientWidth, width: root.scrollWidth,
    scrolling: list(".scroll").filter((e) => e.scrollWidth > e.clientWidth).length,
    requests: frame.contentWindow.performance.getEntriesByType("resource")
      .map((e) => e.name).filter((name) => !name.startsWith("data:")),
  }};
  document.querySelector("pre").textContent = JSON.stringify(found);
}};
</script>"""


def render(folder: Path, profile: Path, width: int) -> dict:
    """What a browser shows of the report in a frame `width` pixels wide."""
    wrapper = folder / f"wrapper_{width}.html"
    wrapper.write_text(WRAPPER.format(width=width))
    return seen_by_browser(wrapper, profile, "--disable-gpu")[0]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
@pytest.mark.parametrize("width", [NARROW, 1200])
def test_a_browser_shows_all_of_it(folder, tmp_path, width):
    found = render(folder, tmp_path / "profile", width)
    assert found["viewport"] == width
    assert found["width"] == width  # the page does not scroll sideways
    assert (found["scrolling"] > 0) == (width == NARROW)  # its tables do, in boxes of their own
    assert sorted(found["values"]) == sorted([*["31.20", "0.9313", "–"] * 4, "12.35", "14.25", "1.234 × 10⁻⁵", "1235"])
    assert sorted(found["intervals"]) == sorted(["[30.50, 31.90]", "[–, 3.000]"] * 4 + ["[11.00, 14.50]"] * 2)
    assert found["headings"][0] == f"Title {EVIL}"
    assert found["headings"].count(EVIL) == 1
    assert found["warnings"] == [f"Reconstruction: A warning {EVIL}", "Generation: Few volumes"]
    assert found["random"] == ["random features"]
    assert found["bold"] == ["Reconstruction:", "Generation:"]
    assert len(found["images"]) == 4
    for natural, shown in found["images"]:
        assert natural > 100
        assert 100 < shown < width
    assert len(found["plots"]) == 2
    assert all(250 < plot_width < width for plot_width in found["plots"])
    assert found["requests"] == []
