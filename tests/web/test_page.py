"""What people see and do on the page, in a real browser."""

import re
import threading

import numpy as np
import pytest

from tests.web.files import SHAPE, SPACING, as_drawn, drop, picture, pixels, volume, write_mrc
from tests.web.stand_in import TOMOGRAM, motor, problem

expect = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright: pip install it").expect

HEIGHT, WIDTH = 90, 120
SLICE = np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8)
JPEG = picture(".jpg", SLICE)


def detection(y, x, score):
    return {"y": y, "x": x, "height": 20.0, "width": 20.0, "score": score}


@pytest.fixture
def slice_answer(endpoint):
    endpoint.size = (1, HEIGHT, WIDTH)
    endpoint.detections = [detection(30.0, 40.0, 0.9), detection(60.0, 100.0, 0.4), detection(10.0, 10.0, 0.12)]
    return endpoint


@pytest.fixture
def tomogram(endpoint, tmp_path):
    endpoint.size = SHAPE
    endpoint.motors = [motor(4.0, 5.0, 6.0, 0.8), motor(20.0, 15.0, 18.0, 0.5), motor(12.0, 9.0, 9.0, 0.11)]
    return write_mrc(tmp_path / "tomo_1.mrc", volume())


def opened(page, path):
    page.set_input_files("#file", path)
    expect(page.locator("#status")).to_have_text(re.compile("^Done"))


def marks(page):
    return page.locator("#overlay .mark")


def listed(page):
    return page.locator("#motor-list button")


def slide(page, slider, value):
    page.locator(slider).fill(str(value))


def at_slice(page, z):
    expect(page.locator("#canvas")).to_have_attribute("data-z", str(z))
    expect(page.locator("#z-value")).to_have_text(f"{z} / {SHAPE[0] - 1}")


# A slice


def test_a_dropped_slice_is_sent_as_it_is_and_shows_its_detections(page, slice_answer):
    drop(page, "slice_0024.jpg", JPEG, "image/jpeg")
    expect(marks(page)).to_have_count(2)
    assert sorted(marks(page).all_text_contents()) == ["1 · 0.90", "2 · 0.40"]
    assert listed(page).all_inner_texts()[0].split() == ["1", "0.90", "–", "30.0", "40.0"]
    assert slice_answer.asked_for("POST", "/v1/slices") == [({"model": "default"}, JPEG)]
    expect(page.locator("#detail")).to_contain_text("0.93")
    np.testing.assert_allclose(pixels(page), as_drawn(page, SLICE), atol=8)  # JPEG loses a little


@pytest.mark.usefixtures("slice_answer")
def test_a_mark_lies_on_its_motor(page):
    drop(page, "slice.jpg", JPEG)
    expect(page.locator(".mark.selected")).to_have_count(1)
    canvas = page.locator("#canvas").bounding_box()
    ring = page.locator(".mark.selected ellipse.line").bounding_box()
    scale = canvas["width"] / WIDTH
    centre = [ring["x"] + ring["width"] / 2 - canvas["x"], ring["y"] + ring["height"] / 2 - canvas["y"]]
    # A pixel's index is its centre, so half a pixel is added.
    assert centre == pytest.approx([40.5 * scale, 30.5 * scale], abs=1)


def test_the_threshold_filters_without_asking_again(page, slice_answer):
    drop(page, "slice.jpg", JPEG)
    expect(marks(page)).to_have_count(2)
    asked = len(slice_answer.asked)
    for value, count, words in [(0.1, 3, "3 motors"), (0.5, 1, "1 of 3 motors"), (0.95, 0, "None of 3 motors reaches")]:
        slide(page, "#threshold", value)
        expect(marks(page)).to_have_count(count)
        expect(listed(page)).to_have_count(count)
        expect(page.locator("#summary")).to_contain_text(words)
    assert len(slice_answer.asked) == asked


def test_the_slices_csv_holds_what_is_shown_and_the_place_in_angstrom(page, slice_answer):
    page.fill("#spacing", "10")
    drop(page, 'a, "b".jpg', JPEG)
    expect(marks(page)).to_have_count(2)
    expect(page.locator("#star")).to_be_disabled()
    with page.expect_download() as download:
        page.click("#csv")
    assert download.value.path().read_text().splitlines() == [
        "image,y,x,height,width,score,y_angstrom,x_angstrom",
        '"a, ""b"".jpg",30,40,20,20,0.9,300,400',
        '"a, ""b"".jpg",60,100,20,20,0.4,600,1000',
    ]
    assert slice_answer.asked_for("POST", "/v1/slices")[0][0]["voxel_spacing_angstrom"] == "10"


@pytest.mark.usefixtures("slice_answer")
@pytest.mark.parametrize(
    ("name", "data", "loss"),
    [
        ("deep.png", picture(".png", SLICE.astype(np.uint16) * 257), 1),
        ("plain.tif", picture(".tif", SLICE, 259, 1), 1),
        ("deep.tif", picture(".tiff", SLICE.astype(np.uint16) * 257, 259, 1), 1),
    ],
    ids=["16-bit PNG", "TIFF", "16-bit TIFF"],
)
def test_other_images_are_drawn(page, name, data, loss):
    drop(page, name, data)
    expect(marks(page)).to_have_count(2)
    deep = float(page.locator("#high").get_attribute("max")) > 255
    np.testing.assert_allclose(pixels(page), as_drawn(page, SLICE.astype(float) * (257 if deep else 1)), atol=loss)


@pytest.mark.usefixtures("slice_answer")
def test_a_tiff_that_browsers_cannot_draw_has_its_motors_marked_on_an_empty_field(page):
    drop(page, "packed.tif", picture(".tif", SLICE, 259, 5))  # LZW
    expect(marks(page)).to_have_count(2)
    expect(page.locator("#notes")).to_contain_text("cannot draw")
    assert pixels(page).shape == (HEIGHT, WIDTH)


# A tomogram


def test_slices_are_reached_by_slider_wheel_and_keys_and_show_their_own_values(page, tomogram):
    opened(page, tomogram)
    at_slice(page, 4)  # that of the best motor
    stage = page.locator("#stage")

    def wheel(turn):
        stage.hover()
        page.mouse.wheel(0, turn)

    moves = [
        (lambda: slide(page, "#z", 17), 17),
        (lambda: wheel(-100), 18),
        (lambda: wheel(100), 17),
        (lambda: stage.press("ArrowUp"), 18),
        (lambda: stage.press("ArrowDown"), 17),
        (lambda: stage.press("PageDown"), 7),
        (lambda: stage.press("PageUp"), 17),
        (lambda: stage.press("End"), 29),
        (lambda: stage.press("ArrowUp"), 29),
        (lambda: stage.press("Home"), 0),
    ]
    for move, z in moves:
        move()
        at_slice(page, z)
        np.testing.assert_allclose(pixels(page), as_drawn(page, volume()[z]), atol=1)


def test_the_file_is_uploaded_as_it_is_with_the_spacing_of_its_header(page, endpoint, tomogram):
    opened(page, tomogram)
    assert page.input_value("#spacing") == str(SPACING)
    query = {"model": "default", "voxel_spacing_angstrom": str(SPACING), "name": tomogram.name}
    expected = (query, tomogram.read_bytes())
    assert endpoint.asked_for("POST", "/v1/tomograms") == [expected]


def test_the_contrast_follows_its_sliders_and_auto_takes_the_percentiles_of_the_slice(page, tomogram):
    opened(page, tomogram)
    slide(page, "#z", 10)
    at_slice(page, 10)
    page.click("#auto")
    own = np.sort(volume()[10], axis=None)
    expected = np.percentile(own, [0.5, 99.5], method="nearest")
    assert [float(page.input_value(slider)) for slider in ("#low", "#high")] == pytest.approx(expected, abs=1)
    slide(page, "#high", page.input_value("#low"))
    levels = pixels(page)
    np.testing.assert_array_equal(levels > 128, volume()[10] > float(page.input_value("#low")))
    page.click("#auto")
    slide(page, "#low", expected.mean())
    np.testing.assert_allclose(pixels(page), as_drawn(page, volume()[10]), atol=1)


def test_a_motor_in_the_list_leads_to_its_slice_and_is_highlighted(page, tomogram):
    opened(page, tomogram)
    listed(page).nth(1).click()
    at_slice(page, 20)
    expect(listed(page).nth(1)).to_have_attribute("aria-current", "true")
    expect(listed(page).nth(1)).to_be_focused()
    expect(page.locator(".mark.selected")).to_have_attribute("data-rank", "2")
    expect(page.locator("#canvas")).to_have_attribute(
        "aria-label", re.compile("z 20 of 0 to 29.*1 motor marked.*score 0.50")
    )


def test_a_large_view_brings_the_chosen_motor_to_the_middle(page, endpoint, tomogram):
    page.set_viewport_size({"width": 390, "height": 700})
    endpoint.size = (3, 400, 500)
    endpoint.motors = [motor(1.0, 20.0, 30.0, 0.9), motor(1.0, 300.0, 400.0, 0.8)]
    opened(page, write_mrc(tomogram, np.zeros(endpoint.size, np.int16)))
    page.select_option("#zoom", "4")
    assert page.locator("#canvas").bounding_box()["width"] == 4 * 500
    listed(page).nth(1).click()
    stage = page.locator("#stage").bounding_box()
    ring = page.locator(".mark.selected ellipse.line").bounding_box()
    for start, length in [("x", "width"), ("y", "height")]:
        middle = stage[start] + stage[length] / 2
        assert ring[start] + ring[length] / 2 == pytest.approx(middle, abs=10)


def test_the_voxel_under_the_pointer_is_read_out(page, tomogram):
    opened(page, tomogram)
    at_slice(page, 4)
    scale = page.locator("#canvas").bounding_box()["width"] / SHAPE[2]
    page.hover("#canvas", position={"x": 7.5 * scale, "y": 3.5 * scale})
    expect(page.locator("#readout")).to_have_text(f"z 4  y 3  x 7  value {volume()[4, 3, 7]}")


def test_a_motor_is_marked_near_its_z_fainter_further_off_and_then_no_more(page, tomogram):
    opened(page, tomogram)
    # 60 angstrom are 4.6 voxels, and a motor's radius of 225 angstrom 17.2.
    for z, seen in [(4, "near"), (8, "near"), (9, "far"), (21, "far"), (22, None)]:
        slide(page, "#z", z)
        at_slice(page, z)
        mark = page.locator('.mark[data-rank="1"]')
        if seen:
            expect(mark).to_have_class(re.compile(rf"\b{seen}\b"))
        else:
            expect(mark).to_have_count(0)


@pytest.mark.parametrize("kind", ["csv", "star"])
def test_a_tomograms_tables_come_from_the_endpoint_by_the_threshold(page, tomogram, kind):
    opened(page, tomogram)
    slide(page, "#threshold", 0.45)
    with page.expect_download() as download:
        page.click(f"#{kind}")
    assert download.value.suggested_filename == f"tomo_1_motors.{kind}"
    assert download.value.path().read_text() == f"{kind} from 0.45\n"


def test_progress_is_shown_in_slices_and_a_busy_endpoint_is_waited_for(page, endpoint, tomogram):
    endpoint.steps = [
        {"status": "queued"},
        {"response": problem(503, "Service Unavailable", "busy", **{"Retry-After": "0.1"})},
        *[{"status": "running", "slices_done": 12, "slices_planned": 30}] * 3,
    ]
    endpoint.failures = [{"z": 3, "error": "ends early"}]
    page.set_input_files("#file", tomogram)
    expect(page.locator("#detail")).to_have_text("12 of 30 slices")
    expect(page.locator("#status")).to_have_text("Looking at the slices: 40 %")
    assert page.locator("#progress").evaluate("(bar) => bar.value") == pytest.approx(0.4)
    expect(page.locator("#status")).to_have_text("Done: 3 motors found")
    expect(page.locator("#notes")).to_have_text("1 slice could not be read: z 3: ends early")
    expect(page.locator("#working")).to_be_hidden()


def test_cancel_stops_the_work_at_the_endpoint_too(page, endpoint, tomogram):
    endpoint.steps = [{"status": "running", "slices_done": 1, "slices_planned": 30}] * 100
    page.set_input_files("#file", tomogram)
    expect(page.locator("#detail")).to_have_text("1 of 30 slices")
    with page.expect_request(lambda request: request.method == "DELETE" and request.url.endswith(TOMOGRAM)):
        page.click("#cancel")
    expect(page.locator("#status")).to_have_text("Cancelled")
    expect(page.locator("#find")).to_be_enabled()
    expect(page.locator("#alert")).to_be_empty()


def test_voxels_that_are_no_cubes_wait_for_a_spacing_to_be_stated(page, endpoint, tomogram):
    write_mrc(tomogram, volume(), spacing=(10.0, 10.0, 20.0))
    page.set_input_files("#file", tomogram)
    expect(page.locator("#notes")).to_contain_text("expected cubes")
    page.fill("#spacing", "10")
    page.click("#find")
    expect(listed(page)).to_have_count(2)
    queries = [query for query, _ in endpoint.asked_for("POST", "/v1/tomograms")]
    assert queries == [{"model": "default", "voxel_spacing_angstrom": "10", "name": "tomo_1.mrc"}]


@pytest.mark.usefixtures("tomogram")
def test_a_tomogram_in_a_bucket_shows_its_motors_without_pixels(page, endpoint):
    page.fill("#uri", "s3://bucket/runs/tomo_7.mrc")
    page.press("#uri", "Enter")
    expect(listed(page)).to_have_count(2)
    assert endpoint.asked_for("POST", "/v1/tomograms") == [
        ({"model": "default"}, b'{"uri":"s3://bucket/runs/tomo_7.mrc"}')
    ]
    expect(page.locator("#notes")).to_contain_text("stay in the bucket")
    expect(page.locator("#ticks line")).to_have_count(2)
    expect(page.locator('.mark.far[data-rank="2"]')).to_have_count(1)
    listed(page).nth(1).click()
    expect(page.locator("#z")).to_have_value("20")
    expect(page.locator('.mark.near[data-rank="2"]')).to_have_count(1)


# What goes wrong


def test_a_problem_is_shown_in_the_endpoints_words(page, slice_answer):
    slice_answer.problem = problem(429, "Too Many Requests", "64 images wait already", **{"Retry-After": "7"})
    drop(page, "slice.jpg", JPEG)
    expect(page.get_by_role("alert")).to_contain_text("Too Many Requests")
    for words in ("64 images wait already", "Try again in 7 s", "Request r-1"):
        expect(page.get_by_role("alert")).to_contain_text(words)
    page.click("#find")
    expect(marks(page)).to_have_count(2)
    expect(page.get_by_role("alert")).to_be_empty()


def test_a_tomogram_that_failed_says_why(page, endpoint, tomogram):
    why = {"title": "Unprocessable Content", "status": 422, "detail": "its voxels are too small"}
    endpoint.steps = [{"status": "failed", "problem": why}]
    page.set_input_files("#file", tomogram)
    expect(page.get_by_role("alert")).to_contain_text("its voxels are too small")
    expect(page.locator("#working")).to_be_hidden()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda route: route.abort(), "The endpoint does not answer"),
        (lambda route: route.fulfill(status=502, body="<html>proxy</html>"), "The endpoint answered 502"),
    ],
    ids=["no connection", "an answer of a proxy"],
)
def test_an_endpoint_that_is_gone_is_said_to_be(page, answer, words):
    page.route("**/v1/slices*", answer)
    drop(page, "slice.jpg", JPEG)
    expect(page.get_by_role("alert")).to_contain_text(words)
    expect(page.locator("#find")).to_be_enabled()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("tomo.mrc.gz", b"\x1f\x8b" + bytes(2000), "gunzip it first"),
        ("notes.txt", b"These are my notes. " * 100, "is not an MRC file"),
        ("short.mrc", b"\x01" * 100, "expected an MRC header of 1024"),
        ("broken.jpg", JPEG[:200], "cannot be decoded"),
        ("empty.rec", b"", "is empty"),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused_and_not_sent(page, endpoint, name, data, words):
    drop(page, name, data)
    expect(page.get_by_role("alert")).to_contain_text(words)
    assert [way for way, *_ in endpoint.asked] == ["GET"]


def test_a_file_too_large_for_the_endpoint_is_shown_but_not_sent(page, endpoint, tomogram):
    endpoint.model["limits"] = {**endpoint.model["limits"], "tomogram_bytes": 1000}
    page.reload()
    page.set_input_files("#file", tomogram)
    expect(page.get_by_role("alert")).to_contain_text("expected at most 0.00 MB")
    at_slice(page, SHAPE[0] // 2)
    assert endpoint.asked_for("POST", "/v1/tomograms") == []


def test_a_file_that_ends_early_shows_the_slices_it_has(page, tomogram):
    tomogram.write_bytes(tomogram.read_bytes()[: 1024 + 20 * SHAPE[1] * SHAPE[2] * 2])
    opened(page, tomogram)
    slide(page, "#z", 25)
    expect(page.get_by_role("alert")).to_contain_text("ends within or before slice 25 of 30")
    assert not pixels(page).any()
    slide(page, "#z", 19)
    at_slice(page, 19)
    np.testing.assert_allclose(pixels(page), as_drawn(page, volume()[19]), atol=1)


def test_a_second_file_replaces_the_first_whose_late_answer_is_ignored(page, slice_answer):
    slice_answer.gate = threading.Event()
    drop(page, "first.jpg", JPEG)
    expect(page.locator("#working")).to_be_visible()
    first, slice_answer.gate = slice_answer.gate, None
    slice_answer.size, slice_answer.detections = (1, 40, 50), [detection(5.0, 6.0, 0.7)]
    drop(page, "second.png", picture(".png", SLICE[:40, :50]))
    expect(marks(page)).to_have_text(["1 · 0.70"])
    first.set()
    page.wait_for_timeout(300)
    expect(marks(page)).to_have_text(["1 · 0.70"])
    expect(page.locator("#source-name")).to_have_text("second.png")
    assert pixels(page).shape == (40, 50)
    expect(page.get_by_role("alert")).to_be_empty()


# The key


@pytest.mark.usefixtures("slice_answer")
def test_the_key_is_asked_for_once_and_sent_from_then_on(context, endpoint):
    endpoint.key = "right"
    page = context.new_page()
    page.goto("/")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    page.get_by_role("textbox", name="Key").fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_have_text("The key was refused.")
    page.get_by_role("textbox", name="Key").fill("right")
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#version")).to_have_text("motor_ray 0.1.0")
    drop(page, "slice.jpg", JPEG)
    expect(marks(page)).to_have_count(2)
    page.reload()
    expect(page.locator("#model-name")).to_contain_text("0123456789ab")
    expect(dialog).to_be_hidden()


def test_without_a_key_the_refusal_is_shown(context, endpoint):
    endpoint.key = "right"
    page = context.new_page()
    page.goto("/")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#alert")).to_contain_text("A key is needed")


# For everybody


def test_a_model_is_chosen_among_several(page, slice_answer):
    expect(page.locator("#model-field")).to_be_hidden()
    slice_answer.model["models"] = ["default", "fast"]
    page.reload()
    page.select_option("#model", "fast")
    expect(page.locator("#model-name")).to_contain_text("model fast")
    drop(page, "slice.jpg", JPEG)
    expect(marks(page)).to_have_count(2)
    assert slice_answer.asked_for("POST", "/v1/slices")[0][0]["model"] == "fast"


def test_everything_can_be_done_with_the_keyboard(page, tomogram):
    def go_to(name):
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id || document.activeElement.dataset.rank") == name:
                return
        raise AssertionError(f"{name} is not reached by Tab")

    page.on("filechooser", lambda chooser: chooser.set_files(tomogram))
    go_to("file")
    page.keyboard.press("Space")
    expect(listed(page)).to_have_count(2)
    go_to("stage")
    page.keyboard.press("Home")
    at_slice(page, 0)
    go_to("z")
    page.keyboard.press("ArrowUp")
    at_slice(page, 1)
    go_to("threshold")
    page.keyboard.press("End")
    expect(listed(page)).to_have_count(0)
    page.keyboard.press("Home")
    expect(listed(page)).to_have_count(3)
    go_to("2")
    page.keyboard.press("Enter")
    at_slice(page, 20)
    go_to("csv")


def test_every_control_has_a_name(page, tomogram):
    opened(page, tomogram)
    script = """() => [...document.querySelectorAll("input, select, button, progress, canvas, a, dialog")]
        .filter((part) => !(part.labels?.length || part.ariaLabel || part.getAttribute("aria-labelledby") ||
            (part.matches("button, a") && part.textContent.trim())))
        .map((part) => part.outerHTML)"""
    assert page.evaluate(script) == []
    names = "() => [...document.querySelectorAll('[id]')].map((part) => part.id)"
    identifiers = page.evaluate(names)
    assert len(identifiers) == len(set(identifiers))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(page, scheme):
    page.emulate_media(color_scheme=scheme)
    script = "(name) => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()"

    def luminance(name):
        colour = page.evaluate(script, name)
        parts = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722)

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    # WCAG 2.2 AA: 4.5 for text, 3 for the edges of controls and for signs.
    texts = [("ink", "panel"), ("ink", "ground"), ("quiet", "panel"), ("quiet", "ground"), ("accent", "ground")]
    texts += [("on-accent", "accent"), ("wrong", "wrong-ground"), ("wrong", "panel"), ("ink", "chosen")]
    assert {pair: contrast(*pair) for pair in texts if contrast(*pair) < 4.5} == {}
    signs = [("control", "panel"), ("tick", "ground"), ("accent", "panel"), ("accent", "ground")]
    assert {pair: contrast(*pair) for pair in signs if contrast(*pair) < 3} == {}


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_nothing_is_wider_than_the_window(page, tomogram, width):
    page.set_viewport_size({"width": width, "height": 800})
    opened(page, tomogram)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    canvas, stage = page.locator("#canvas").bounding_box(), page.locator("#stage").bounding_box()
    assert canvas["width"] <= stage["width"]
    assert canvas["height"] <= stage["height"]
