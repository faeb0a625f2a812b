"""The HTML report: which images have pictures, what a browser makes of it from disk, what it replaces."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sr_data.errors import StorageError
from sr_data.resize import crop_to_multiple, downscale_bicubic, upscale_bicubic
from sr_data.storage import open_store
from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_models.inference import upscale_image
from sr_models.weights import save_model
from sr_serve.evaluation import evaluate, open_models, open_sets
from sr_serve.evaluation_report import EvaluationReport, worst_crop

CONFIG = EDSRConfig(scale=2, num_blocks=1, num_channels=4)
PROTOCOL = "psnr@y,crop=scale"
HOSTILE = '<img src=x onerror=boom()> & "quoted" 100%#?'


@pytest.fixture
def models(tmp_path):
    """Two models of one scale, the second named so that a careless page would run it."""
    names = [tmp_path / "first", tmp_path / HOSTILE]
    for seed, folder in enumerate(names):
        save_model(folder, CONFIG, build_model(CONFIG, seed=seed).state_dict())
    return [str(name) for name in names]


def make_report(uri, models, photos, *, num_pictured=20):
    """Scores and writes, as the script does; the evaluations."""
    report, scoring = begin_report(uri, models, photos, num_pictured=num_pictured)
    evaluations = list(scoring)
    report.write(evaluations)
    return evaluations


def begin_report(uri, models, photos, *, num_pictured=20):
    """A report, and the iterator over evaluations that gives it its images."""
    report = EvaluationReport(str(uri), protocol=PROTOCOL, num_pictured=num_pictured)
    report.check()
    opened = open_models(models, scales=[2], device="cpu")
    sets = open_sets(str(photos), split="test", scales=opened, protocol=PROTOCOL)
    return report, evaluate(opened, sets, protocol=PROTOCOL, observe=report.observe)


def contents(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def shown_files(page):
    return set(re.findall(r'(?:src|data-src)="([^"]*)"', page))


def worst_first(evaluation):
    bicubic, model = (it.score.images for it in evaluation.models[:2])
    gains_db = {one.name: one.psnr_db - other.psnr_db for one, other in zip(model, bicubic, strict=True)}
    return sorted(gains_db, key=lambda name: (gains_db[name], name))


def pictured(folder):
    return sorted(re.sub(r"\d{4}-(.*)-hr\.png", r"\1", path.name) for path in folder.rglob("*-hr.png"))


def test_the_worst_images_have_pictures_and_all_have_numbers(models, tiny_photos, tmp_path):
    [evaluation] = make_report(tmp_path / "report", models, tiny_photos, num_pictured=2)
    order = worst_first(evaluation)
    assert pictured(tmp_path / "report") == sorted(order[:2])
    page = (tmp_path / "report/index.html").read_text()
    at = [page.index(f'data-value="{name}"') for name in order]
    assert at == sorted(at), "worst first"
    assert re.findall(r"<h3>\d+\. (.*)</h3>", page) == order[:2]
    files = {path.relative_to(tmp_path / "report").as_posix() for path in (tmp_path / "report").rglob("*.[pj]*g")}
    assert shown_files(page) == files, "no file without use, no use without file"


def test_of_equally_bad_images_the_first_in_the_table_are_pictured(models, tiny_photos, tmp_path):
    [evaluation] = make_report(tmp_path / "first", models, tiny_photos, num_pictured=0)
    worst, *_, best = worst_first(evaluation)
    (tmp_path / "photos").mkdir()
    for name, source in {"b": best, "c": best, "a": best, "z": worst}.items():
        shutil.copy(tiny_photos / f"{source}.png", tmp_path / f"photos/{name}.png")
    make_report(tmp_path / "report", models, tmp_path / "photos", num_pictured=2)
    assert pictured(tmp_path / "report") == ["a", "z"]


def test_pictures_are_what_was_scored_and_crops_show_where_the_first_model_errs_most(models, tiny_photos, tmp_path):
    make_report(tmp_path / "report", models, tiny_photos, num_pictured=6)
    hr_HWC = crop_to_multiple(np.array(Image.open(tiny_photos / "photo-2.png")), 2)
    lr_HWC = downscale_bicubic(hr_HWC, 2)
    sr_HWC = upscale_image(build_model(CONFIG, seed=0), lr_HWC)

    def picture(name):
        [path] = (tmp_path / "report/images").glob(f"*/01-tiny_photos-x2/0003-photo-2-{name}.png")
        return np.array(Image.open(path))

    top, left, side = worst_crop(sr_HWC, hr_HWC, border_px=2)
    for name, expected_HWC in (("hr", hr_HWC), ("model-1", sr_HWC), ("bicubic", upscale_bicubic(lr_HWC, 2))):
        assert np.array_equal(picture(name), expected_HWC)
        assert np.array_equal(picture(f"{name}-crop"), expected_HWC[top : top + side, left : left + side])


def test_the_worst_crop_holds_the_error_and_keeps_off_the_border():
    hr_HWC = np.zeros((90, 120, 3), np.uint8)
    sr_HWC = hr_HWC.copy()
    sr_HWC[:4], sr_HWC[:, -4:] = 255, 255  # not scored
    sr_HWC[30:34, 70:75] = 9
    top, left, side = worst_crop(sr_HWC, hr_HWC, border_px=4, side_px=16)
    assert side == 16
    assert top <= 30 and top + side >= 34 and left <= 70 and left + side >= 75
    top, left, side = worst_crop(sr_HWC, hr_HWC, border_px=4, side_px=500)
    assert top == 4 and side == 90 - 8 and 4 <= left <= 120 - 4 - side


def test_a_report_replaces_an_earlier_one_and_nothing_else(models, tiny_photos, tmp_path):
    mine = {Path(name): name.encode() for name in ("notes.txt", "images/mine.png", "images/tiny_photos-x2/mine.png")}
    for name, data in mine.items():
        (tmp_path / "report" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "report" / name).write_bytes(data)
    before = contents(tmp_path / "report")
    make_report(tmp_path / "report", models, tiny_photos, num_pictured=6)
    make_report(tmp_path / "report", ["bicubic"], tiny_photos, num_pictured=1)
    assert len(pictured(tmp_path / "report")) == 1
    after = contents(tmp_path / "report")
    assert before.items() <= after.items()
    files = shown_files(after[Path("index.html")].decode())
    new = {path for path in after.keys() - before.keys() if after[path] is not False}
    assert {path.as_posix() for path in new} == {*files, "index.html"}
    folders = {path for path in after.keys() - before.keys() if after[path] is False}
    assert len(folders) == 2, "no empty folder of the first report"
    (tmp_path / "report/index.html").write_text("<h1>My sr-ray evaluation report</h1>")
    with pytest.raises(StorageError, match=r"holds another index\.html.*--html"):
        make_report(tmp_path / "report", ["bicubic"], tiny_photos)


@pytest.mark.parametrize("is_killed", [False, True])
def test_an_earlier_report_is_whole_after_a_run_that_fails(models, tiny_photos, tmp_path, is_killed):
    make_report(tmp_path / "report", models[:1], tiny_photos, num_pictured=2)
    before = contents(tmp_path / "report")
    shutil.copytree(tiny_photos, tmp_path / "second")
    report, scoring = begin_report(
        tmp_path / "report", models[::-1], f"{tiny_photos},{tmp_path / 'second'}", num_pictured=2
    )
    next(scoring)
    (tmp_path / "second/photo-3.png").unlink()
    with pytest.raises(StorageError, match="photo-3"):
        next(scoring)
    assert contents(tmp_path / "report").items() > before.items(), "pictures of both sets, beside the earlier report's"
    if not is_killed:
        report.discard()
        assert contents(tmp_path / "report") == before
    make_report(tmp_path / "report", models, tiny_photos, num_pictured=2)
    report.discard()
    page = (tmp_path / "report/index.html").read_text()
    assert all((tmp_path / "report" / name).exists() for name in shown_files(page))


def test_a_report_that_a_page_shows_is_not_discarded(models, tiny_photos, tmp_path):
    report, scoring = begin_report(tmp_path / "report", models, tiny_photos, num_pictured=1)
    report.write(list(scoring))
    before = contents(tmp_path / "report")
    report.discard()
    assert contents(tmp_path / "report") == before


@pytest.mark.parametrize(
    "listed", ['["images/mine.png", "index.html", "images/20260102-030405-0123abcd/../mine.png", 7]', "7", "[mine"]
)
def test_what_an_edited_page_lists_is_not_deleted(tiny_photos, tmp_path, listed):
    make_report(tmp_path / "report", ["bicubic"], tiny_photos, num_pictured=1)
    (tmp_path / "report/images/mine.png").write_text("mine")
    index = tmp_path / "report/index.html"
    page, replaced = re.subn(r'(id="files">)[^<]*', lambda it: it[1] + listed, index.read_text())
    assert replaced == 1
    index.write_text(page)
    make_report(tmp_path / "report", ["bicubic"], tiny_photos, num_pictured=0)
    assert (tmp_path / "report/images/mine.png").read_text() == "mine"
    assert json.loads(re.search(r'id="files">([^<]*)', index.read_text())[1]) == []


def test_sets_whose_names_look_alike_have_pictures_of_their_own(tiny_photos, tmp_path):
    names = ["a b", "a-b", "写真", "фото"]
    for number, name in enumerate(names):
        (tmp_path / name).mkdir()
        shutil.copy(tiny_photos / f"photo-{number}.png", tmp_path / name / "photo.png")
    make_report(tmp_path / "report", ["bicubic"], ",".join(str(tmp_path / name) for name in names))
    page = (tmp_path / "report/index.html").read_text()
    keys = re.findall(r'data-src="([^"]*-hr\.png)"', page)[::2]  # A's and B's
    assert len(keys) == 4
    for number, key in enumerate(keys):
        hr_HWC = crop_to_multiple(np.array(Image.open(tiny_photos / f"photo-{number}.png")), 2)
        assert np.array_equal(np.array(Image.open(tmp_path / "report" / key)), hr_HWC)


def test_a_report_on_s3(s3, models, tiny_photos):
    folder = open_store(f"{s3.new_bucket()}/report")
    make_report(folder.uri, models, tiny_photos, num_pictured=1)
    page = folder.read_text("index.html")
    keys = {entry.key for entry in folder.list("images/")}
    assert keys == shown_files(page)
    make_report(folder.uri, ["bicubic"], tiny_photos, num_pictured=1)
    keys = {entry.key for entry in folder.list("images/")}
    assert keys == shown_files(folder.read_text("index.html")), "nothing is left of the first one"
    assert len([key for key in keys if key.endswith("-hr.png")]) == 1


@pytest.fixture
def open_report(browser, tmp_path):
    """`open_report()`: the page of tmp_path/report, opened from disk; afterwards nothing may have gone wrong in it."""
    said, requests = [], []

    def open_(**options):
        page = browser.new_context(viewport={"width": 1200, "height": 900}, **options).new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((tmp_path / "report/index.html").as_uri())
        return page

    yield open_
    assert said == []
    assert requests
    assert [url for url in requests if not url.startswith(("file://", "data:"))] == []


def shown(page, card):
    """The viewer's picture as it is on the screen, at its own size, without what lies on it."""
    card.locator(".zooms").get_by_text("1×").click()
    page.add_style_tag(content=".box, .divider { visibility: hidden }")
    canvas = card.locator(".canvas")
    canvas.evaluate("element => element.scrollIntoView({block: 'center'})")
    canvas.evaluate("element => Promise.all([...element.querySelectorAll('img')].map(image => image.decode()))")
    left, top, width, height = (round(canvas.bounding_box()[side]) for side in ("x", "y", "width", "height"))
    screen_HWC = np.array(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(int)
    return screen_HWC[top : top + height, left : left + width]


def assert_shows(image_HWC, path, columns=slice(None)):
    expected_HWC = np.array(Image.open(path)).astype(int)
    assert image_HWC.shape == expected_HWC.shape
    assert np.abs(image_HWC - expected_HWC)[:, columns].max() <= 2  # of a display's colours


def test_flip_and_slider_show_any_two_pictures(models, tiny_photos, tmp_path, open_report):
    [evaluation] = make_report(tmp_path / "report", models, tiny_photos, num_pictured=2)
    name = worst_first(evaluation)[0]
    page = open_report()
    card = page.locator(".card").first

    def file(kind):
        [path] = (tmp_path / "report/images").rglob(f"*-{name}-{kind}.png")
        return path

    assert card.locator("h3").inner_text() == f"1. {name}"
    card.locator(".flip").click()
    assert_shows(shown(page, card), file("bicubic"))
    card.locator(".flip").click()
    assert_shows(shown(page, card), file("model-1"))
    card.locator("[data-side=a]").get_by_text("HR").click()
    card.locator("h3").hover()
    page.keyboard.press("f")
    assert_shows(shown(page, card), file("hr"))
    page.keyboard.press("Shift+Digit3")
    assert_shows(shown(page, card), file("model-2"))
    page.keyboard.press("s")
    page.keyboard.press("Digit4")
    card.locator(".cut").fill("25")
    image_HWC = shown(page, card)
    cut = image_HWC.shape[1] // 4
    assert_shows(image_HWC, file("model-2"), slice(0, cut - 1))
    assert_shows(image_HWC, file("hr"), slice(cut + 1, None))
    box = card.locator(".canvas").bounding_box()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 20)
    page.mouse.up()
    assert float(card.locator(".cut").input_value()) == pytest.approx(75, abs=1)
    assert_shows(shown(page, card), file("model-2"), slice(0, 3 * cut - 1))


def test_the_table_sorts_and_every_picture_loads(models, tiny_photos, tmp_path, open_report):
    (tiny_photos / "photo-0.png").rename(tiny_photos / f"{HOSTILE.replace('/', '')}.png")
    [evaluation] = make_report(tmp_path / "report", models, tiny_photos, num_pictured=6)
    page = open_report(color_scheme="dark")
    table = page.locator(".per-image table")

    def column(number):
        return [cell.inner_text().strip() for cell in table.locator(f"tbody td:nth-child({number})").all()]

    assert column(2) == worst_first(evaluation)
    first_gain = [float(text.replace("−", "-")) for text in column(7)]
    assert first_gain == sorted(first_gain)
    for heading, number, name in ((2, 2, None), (3, 3, "PSNR"), (7, 7, "gain")):
        button = table.locator("thead tr").nth(1).locator("th").nth(heading - 1).locator("button")
        assert name is None or button.inner_text() == name
        orders = []
        for _ in range(2):
            button.click()
            orders.append(column(number))
        values = [[text if name is None else float(text.replace("−", "-")) for text in order] for order in orders]
        if name is None:
            assert sorted(values[0]) == sorted(worst_first(evaluation)) and values[0] == values[1][::-1]
        else:
            assert values == [sorted(values[0]), sorted(values[0], reverse=True)]
    for card in page.locator(".card").all():
        card.scroll_into_view_if_needed()
        card.hover()
    page.wait_for_function("[...document.images].every(image => image.complete)")
    assert page.evaluate("[...document.images].filter(image => !image.naturalWidth).map(image => image.src)") == []
    assert page.locator(".card").count() == 6
    assert page.evaluate("document.querySelectorAll('[onerror]').length") == 0
    summary = page.locator(".summary tbody th").all_inner_texts()
    assert summary == ["bicubic", *models]


def test_headings_tell_models_of_one_name_apart(tiny_photos, tmp_path):
    names = [str(tmp_path / f"{run}/checkpoints/best") for run in ("one", "two")]
    for seed, name in enumerate(names):
        save_model(Path(name), CONFIG, build_model(CONFIG, seed=seed).state_dict())
    make_report(tmp_path / "report", names, tiny_photos, num_pictured=0)
    page = (tmp_path / "report/index.html").read_text()
    assert re.findall(r'class="of-model"[^>]*>(.*?)<', page) == [
        "bicubic",
        "one/checkpoints/best",
        "two/checkpoints/best",
    ]
    assert not (tmp_path / "report/images").exists()


def test_a_phone_scrolls_down_only(models, tiny_photos, tmp_path, open_report):
    make_report(tmp_path / "report", models, tiny_photos, num_pictured=1)
    page = open_report(is_mobile=True, has_touch=True, device_scale_factor=2)
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_the_network_is_never_named(repo):
    page = (repo / "sr_serve/evaluation_report.html").read_text()
    assert not re.search(r"https?:|//\w+\.|@import|<link(?! rel=\"icon\" href=\"data:)", page)
