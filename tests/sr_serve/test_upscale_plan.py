"""Which images are to be made: from two listings and the record of an earlier run."""

from dataclasses import replace

import pytest

from sr_data.storage import FileEntry
from sr_serve.upscale_plan import (
    RECORD_KEY,
    Recipe,
    UpscaleError,
    check_apart,
    make_plan,
    read_record,
    target_format,
)

RECIPE = Recipe(
    model_sha256="0123", scale=2, self_ensemble=False, precision="float32", format="same", source="s3://b/in"
)


def listing(*keys, version="1"):
    return [FileEntry(key=key, num_bytes=1, version=version) for key in keys]


def planned(sources, targets=(), recorded=None, recipe=RECIPE, **options):
    return make_plan(
        listing(*sources) if isinstance(sources, tuple) else sources,
        listing(*targets, version="other"),
        recipe=recipe,
        model="models:/edsr/1",
        target_uri="s3://b/out",
        recorded=recorded,
        **options,
    )


def pairs(plan):
    return [(image.key, image.target_key) for image in plan.todo]


def test_folders_and_names_stay_and_what_can_not_be_written_becomes_png():
    plan = planned(("b/x.JPG", "a.tif", "b/c/y.webp", "notes.txt", ".hidden.png", "z.bmp"))
    assert pairs(plan) == [("a.tif", "a.png"), ("b/c/y.webp",) * 2, ("b/x.JPG",) * 2, ("z.bmp", "z.png")]
    assert plan.num_ignored == 2
    as_webp = planned(("a.tif", "b/y.webp"), recipe=replace(RECIPE, format="webp"))
    assert pairs(as_webp) == [("a.tif", "a.webp"), ("b/y.webp",) * 2]


def test_what_is_finished_shows_whether_source_is_there():
    keys = tuple(f"{number}.png" for number in range(10))
    first = planned(keys)
    assert len(first.witnesses) == 3 and set(first.witnesses) <= set(keys)
    last = planned(keys, targets=keys[:9], recorded=first.record)
    assert pairs(last) == [("9.png",) * 2]
    assert len(set(last.witnesses[:3]) & set(keys[:9])) == 3


def test_two_sources_of_one_target_are_refused_before_any_work():
    with pytest.raises(UpscaleError, match=r"^s3://b/in: 1 times .*b/a\.png and b/a\.tif → b/a\.png.*--format"):
        planned(("b/a.png", "b/a.tif", "a.tif"))
    with pytest.raises(UpscaleError, match=r"a\.jpg and a\.png → a\.jpg"):
        planned(("a.jpg", "a.png"), recipe=replace(RECIPE, format="jpeg"))


def test_a_second_run_does_the_rest():
    record = planned(("a.png", "b.png", "c.png")).record
    plan = planned(("a.png", "b.png", "c.png", "d.png"), targets=("a.png", "c.png", RECORD_KEY), recorded=record)
    assert pairs(plan) == [("b.png",) * 2, ("d.png",) * 2]
    assert (plan.num_finished, plan.outdated) == (2, ())
    whole = planned(("a.png",), targets=("a.png",), recorded=plan.record)
    assert (whole.todo, whole.num_finished) == ((), 1)
    assert set(whole.record.sources) == {"a.png"} | set(plan.record.sources)


def test_the_record_survives_being_written():
    record = planned(("a.png", "ä b.png")).record
    assert read_record(record.to_json(), uri="u") == record


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"recipe": {"scale": 2}, "model": "m", "sources": {}}'])
def test_a_damaged_record_is_named_with_the_way_out(text):
    with pytest.raises(UpscaleError, match=f"^s3://b/out/{RECORD_KEY}: .*--overwrite"):
        read_record(text, uri=f"s3://b/out/{RECORD_KEY}")


def test_an_image_whose_source_has_changed_is_deleted_and_made_anew():
    record = planned(("a.png", "b.png")).record
    now = [*listing("a.png", version="2"), *listing("b.png", version="1")]
    plan = planned(now, targets=("a.png", "b.png"), recorded=record)
    assert (pairs(plan), plan.outdated) == ([("a.png", "a.png")], ("a.png",))
    assert plan.record.sources == {"a.png": "2", "b.png": "1"}
    # It was deleted, then the run was killed, before or after it had written the record.
    for recorded in (record, plan.record):
        again = planned(now, targets=("b.png",), recorded=recorded)
        assert (pairs(again), again.outdated) == ([("a.png", "a.png")], ())


def test_a_target_of_another_recipe_is_refused_and_says_in_what():
    record = planned(("a.png",)).record
    changes = {"model_sha256": "4567", "self_ensemble": True, "format": "png", "source": "s3://b/else", "scale": 4}
    for name, value in changes.items():
        with pytest.raises(UpscaleError, match=f"^s3://b/out: .*made with {name} .*, not {value}.*--overwrite"):
            planned(("a.png",), targets=("a.png",), recorded=record, recipe=replace(RECIPE, **{name: value}))


def test_overwrite_deletes_first_also_what_had_another_suffix():
    record = planned(("a.jpg", "b.jpg")).record
    targets = ("a.jpg", "b.jpg", "mine.jpg", RECORD_KEY)
    plan = planned(
        ("a.jpg", "b.jpg"), targets=targets, recorded=record, recipe=replace(RECIPE, format="png"), overwrite=True
    )
    assert plan.outdated == ("a.jpg", "b.jpg")
    assert pairs(plan) == [("a.jpg", "a.png"), ("b.jpg", "b.png")]
    # Killed after that, and run without --overwrite: what the new recipe has made counts, and nothing else.
    rest = planned(("a.jpg", "b.jpg"), targets=("a.png",), recorded=plan.record, recipe=plan.record.recipe)
    assert pairs(rest) == [("b.jpg", "b.png")]


def test_files_that_nobody_has_a_record_of_are_not_taken_for_finished():
    with pytest.raises(UpscaleError, match=r"^s3://b/out: holds 1 files .*: a\.png\. .*--overwrite"):
        planned(("a.png",), targets=("a.png", "other.png"))
    record = planned(("b.png",)).record
    with pytest.raises(UpscaleError, match=r"no record of making: a\.png"):
        planned(("a.png", "b.png"), targets=("a.png", "b.png"), recorded=record)
    assert planned(("a.png",), targets=("a.png", "other.png"), overwrite=True).outdated == ("a.png",)


def test_a_source_without_images_is_an_error():
    with pytest.raises(UpscaleError, match=r"^s3://b/in: none of its 2 files"):
        planned(("notes.txt", ".a.png"))


@pytest.mark.parametrize(
    ("source", "target", "apart"),
    [
        ("/a/in", "/a/out", True),
        ("/a/in", "/a/in-x2", True),
        ("s3://b/in", "s3://c/in", True),
        ("/a/in", "/a/in", False),
        ("/a/in", "/a/in/out", False),
        ("s3://b/in", "s3://b", False),
    ],
)
def test_target_is_never_source_nor_in_it_nor_around_it(source, target, apart):
    if apart:
        check_apart(source, target)
    else:
        with pytest.raises(UpscaleError, match=f"^{target}: TARGET must not be SOURCE"):
            check_apart(source, target)


def test_a_target_file_says_its_format():
    assert [target_format(f"x{suffix}", "same") for suffix in (".png", ".JPEG", ".webp")] == ["PNG", "JPEG", "WEBP"]
    assert target_format("x.jpeg", "jpeg") == "JPEG"
    for name, flag in (("x.tiff", "same"), ("x.png", "jpeg")):
        with pytest.raises(UpscaleError, match=f"^{name}: its suffix"):
            target_format(name, flag)
