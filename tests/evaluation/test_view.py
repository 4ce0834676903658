"""The page of volumes: what is in it, and what a browser with WebGL shows of it at two widths, without a network."""

import base64
import gzip
import hashlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from browser import BROWSER, NARROW, seen_by_browser
from report_results import EVIL, shown_in

from dataset.volumes.volume_io import write_nifti
from evaluation.report_page import view
from evaluation.results.results import Beside, Panel

NIIVUE_SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"  # as vendored/README.md says
AFFINE = nib.affines.from_matvec(np.diag([2.0, 2.0, 3.0]), [-5.0, 7.0, 11.0])


def test_niivue_is_the_recorded_one():
    assert hashlib.sha256(view.NIIVUE.read_bytes()).hexdigest() == NIIVUE_SHA256
    assert NIIVUE_SHA256 in view.NIIVUE.with_name("README.md").read_text()
    assert "BSD 2-Clause" in view.NIIVUE.with_name("LICENSE.niivue").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A ball of -1 to 1 of 256 x 32 x 16 voxels, a smaller one, labels; one file is gone, one has no room."""
    output = tmp_path_factory.mktemp("volumes")
    for name, shape in (("real", (256, 32, 16)), ("generated", (32, 32, 32))):
        axes = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")
        write_nifti(output / f"{name}.nii.gz", np.clip(1.5 - 2 * sum(axis**2 for axis in axes), -1, 1), AFFINE)
    labels = np.zeros((32, 32, 32))
    labels[8:24, 8:24, 8:16], labels[8:24, 8:24, 16:24] = 1, 3
    write_nifti(output / "labels.nii.gz", labels, AFFINE)
    noise = np.random.default_rng(0).uniform(-1, 1, (64, 64, 64))
    write_nifti(output / "noise.nii.gz", noise, AFFINE)
    generated, real = Panel("generated", "generated.nii.gz", (-1, 1)), Panel("real", "real.nii.gz", (-1, 1))
    entries = [
        Beside(f"all {EVIL}", [real, generated, Panel(f"condition {EVIL}", "labels.nii.gz")]),
        Beside("gone", [Panel("real", "gone.nii.gz")]),
        Beside("alone", [generated]),
        Beside("large", [Panel("generated", "noise.nii.gz")]),
        Beside("last", [generated]),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view, "MOST_BYTES", view.NIIVUE.stat().st_size + 2e5)
        view.write_view(output / view.VIEW_NAME, entries, f"Title {EVIL}")
    return output


def test_what_is_in_the_page(folder):
    text = (folder / view.VIEW_NAME).read_text(encoding="utf-8")
    entries = shown_in(folder)
    assert [entry["name"] for entry in entries] == [f"all {EVIL}", "alone"]
    real, generated, labels = entries[0]["panels"]
    assert (real["note"], generated["note"]) == ("256x32x16, here 128x16x8", "32x32x32")
    shown = {panel["role"]: _volume(panel) for panel in (real, generated, labels)}
    np.testing.assert_allclose(
        shown["generated"].get_fdata(), nib.load(folder / "generated.nii.gz").get_fdata(), atol=0.004
    )
    assert (shown[f"condition {EVIL}"].get_fdata() == nib.load(folder / "labels.nii.gz").get_fdata()).all()
    assert labels["range"] == [0, 3]
    whole, small = nib.load(folder / "real.nii.gz"), shown["real"]
    means = whole.get_fdata().reshape(128, 2, 16, 2, 8, 2).mean((1, 3, 5))
    np.testing.assert_allclose(small.get_fdata(), means, atol=0.004)
    corners = [np.array([[0, 0, 0], shape]) - 0.5 for shape in (whole.shape, small.shape)]
    ends = [nib.affines.apply_affine(i.affine, of) for i, of in zip((whole, small), corners, strict=True)]
    np.testing.assert_allclose(*ends)  # at the same place
    assert "gone.nii.gz: no such file" in text
    assert "2 of 5, from large on" in text
    assert len(text) < view.NIIVUE.stat().st_size + 2.2e5


def _volume(panel: dict) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(panel["data"])))


# Grey values of the four tiles of each canvas, and their spread; a canvas can be read right after it was drawn.
WRAPPER = """<!DOCTYPE html><iframe src="view.html" style="border:0;width:{narrow}px;height:2000px"></iframe>
<iframe src="view.html" style="border:0;width:1200px;height:1000px"></iframe><pre></pre><script>
const tiles = (shown) => {{
  shown.viewer.drawScene();
  const side = 64, copy = document.createElement("canvas");
  const context = copy.getContext("2d", {{willReadFrequently: true}});
  copy.width = copy.height = side;
  context.drawImage(shown.canvas, 0, 0, side, side);
  return [[0, 0], [1, 0], [0, 1], [1, 1]].map(([x, y]) => {{
    const pixels = context.getImageData(x * side / 2, y * side / 2, side / 2, side / 2).data;
    return new Set(pixels.filter((_, i) => i % 4 == 0)).size;
  }});
}};
const look = (frame) => {{
  const page = frame.contentDocument, root = page.documentElement, list = (query) => [...page.querySelectorAll(query)];
  return {{
    viewport: root.clientWidth, width: root.scrollWidth, title: page.querySelector("h1").innerText,
    options: list("option").map((e) => e.innerText), captions: list("figcaption").map((e) => e.innerText),
    left: list("details").map((e) => e.innerText), canvases: list("canvas").map((e) => [e.clientWidth, e.clientHeight]),
    tiles: frame.contentWindow.viewers.map(tiles), markup: list("main b, select b").length,
    requests: frame.contentWindow.performance.getEntriesByType("resource").map((e) => e.name)
      .filter((name) => !/^(data|blob):/.test(name)),
  }};
}};
const frames = [...document.querySelectorAll("iframe")], found = [];
const is_ready = (number) => frames.every((f) => f.contentDocument.documentElement.dataset.shown == number);
const wait = setInterval(() => {{
  if (found.length == 0 && is_ready("0")) {{
    found.push(frames.map(look));
    for (const frame of frames) for (const id of ["open", "next"]) frame.contentDocument.getElementById(id).click();
  }} else if (found.length == 1 && is_ready("1")) {{
    found.push(frames.map(look));
    clearInterval(wait);
    document.querySelector("pre").textContent = JSON.stringify(found);
  }}
}}, 100);
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_draws_volumes_in_three_planes_and_a_rendering(folder, tmp_path):
    wrapper = folder / "wrapper.html"
    wrapper.write_text(WRAPPER.format(narrow=NARROW))
    options = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--enable-logging=stderr"]
    frames, said = seen_by_browser(wrapper, tmp_path, *options, "--virtual-time-budget=20000")
    assert "CONSOLE" not in said
    for first, second in zip(*frames, strict=True):  # of each width, what is shown first and after "Next"
        assert first["width"] == first["viewport"]  # the page does not scroll sideways
        assert (first["title"], first["options"]) == (f"Title {EVIL}", [f"all {EVIL}", "alone"])
        assert [caption.split()[0] for caption in first["captions"]] == ["real", "generated", "condition"]
        assert f"condition {EVIL} 32x32x32 labels.nii.gz" in " ".join(first["captions"][2].split())
        assert [len(state["canvases"]) for state in (first, second)] == [3, 1]
        for state in (first, second):
            assert all(250 < side < state["width"] for canvas in state["canvases"] for side in canvas)
            assert state["requests"] == []
        assert "gone.nii.gz: no such file" in first["left"][0]
        assert first["markup"] == 0
        for tiles in (*first["tiles"][:2], *second["tiles"]):
            assert min(tiles) > 8, first["tiles"]  # many grey values in each plane and in the rendering
        assert min(first["tiles"][2]) > 2
    narrow, wide = (of_width["viewport"] for of_width in frames[0])
    assert (narrow, wide) == (NARROW, 1200)
