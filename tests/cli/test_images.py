"""Pictures of every kind that people have: read right, or refused in one clear line."""

import numpy as np
import pytest
from PIL import Image

from popmm.cli.images import open_image


def gradient(width=40, height=30):
    values = np.add.outer(np.arange(height), np.arange(width)) / (width + height - 2)
    return np.stack([255 * values, 255 * (1 - values), np.full_like(values, 90)], -1).round().astype(np.uint8)


def save(tmp_path, image, name="picture.png", **how):
    image.save(tmp_path / name, **how)
    return tmp_path / name


def test_rgb_is_taken_as_it_is(tmp_path):
    image, note = open_image(save(tmp_path, Image.fromarray(gradient())))
    assert (np.asarray(image) == gradient()).all() and note == ""


@pytest.mark.parametrize("mode", ["CMYK", "P", "L", "LA", "1"])
def test_other_modes_are_converted_and_said_so(tmp_path, mode):
    name = "picture.tif" if mode == "CMYK" else "picture.png"
    original = Image.fromarray(gradient()).convert(mode)
    image, note = open_image(save(tmp_path, original, name))
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert note == f"{tmp_path / name}: {mode} picture converted to RGB"
    if mode == "CMYK":
        assert abs(np.asarray(image).astype(int) - gradient()).max() <= 2


def test_16_bit_values_are_scaled_not_cut_off(tmp_path):
    values = np.linspace(0, 65535, 1200).reshape(30, 40).round().astype(np.uint16)
    image, note = open_image(save(tmp_path, Image.fromarray(values)))
    assert "I;16 picture converted" in note
    assert (np.asarray(image)[..., 0] == (values / 257).round()).all()


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparent_parts_are_white(tmp_path, mode):
    image = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 10, 20))
    if mode == "P":
        image = image.quantize(4)
    found, _ = open_image(save(tmp_path, image))
    assert found.getpixel((15, 5)) == (255, 255, 255) and found.getpixel((5, 5)) == (0, 0, 255)


def test_a_picture_is_turned_as_the_camera_was_held(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image, _ = open_image(save(tmp_path, Image.fromarray(gradient()), "turned.jpg", exif=exif))
    assert image.size == (30, 40)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    file = tmp_path / "moving.gif"
    frames[0].save(file, save_all=True, append_images=frames[1:])
    assert open_image(file)[0].getpixel((3, 3)) == (255, 0, 0)


def broken(tmp_path):
    file = save(tmp_path, Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)))
    file.write_bytes(file.read_bytes()[:3000])
    return file


def no_picture(tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    return tmp_path / "notes.png"


@pytest.mark.parametrize(
    "make, message",
    [
        (broken, r"picture\.png is damaged \(.*\): save or download it again"),
        (no_picture, r"notes\.png is no picture of a known format: give a JPEG"),
        (lambda folder: folder / "missing.png", r"there is no file .*missing\.png: give the path"),
        (lambda folder: folder, r"is no file: give the path of a picture"),
        (lambda folder: save(folder, Image.new("RGB", (1, 1))), r"has 1 x 1 pixels: give a picture of at least 4 x 4"),
        (lambda folder: save(folder, Image.new("RGB", (1000, 5))), r"has 1000 x 5 pixels: crop it"),
        (
            lambda _: "http://127.0.0.1:9/picture.png",
            r"http://127\.0\.0\.1:9/picture\.png cannot be reached \(.*\): check",
        ),
        (lambda _: "https://", r"https:// cannot be reached"),
        (lambda _: "http://a b/c.png", r"http://a b/c\.png cannot be reached \(.*\): check"),
        (lambda _: "http://[bad", r"http://\[bad cannot be reached"),
        (lambda _: "HTTP://127.0.0.1:9/p.png", r"cannot be reached"),
        (lambda _: "x" * 5000, r"^x{80} cannot be read: File name too long"),
        (lambda _: "~nobody-of-this-name/x.png", r"~nobody-of-this-name/x\.png"),
    ],
)
def test_what_cannot_be_looked_at_is_named(tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_image(make(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale, dtype", [(255, np.int32), (65535, np.int32), (1, np.float32), (255, np.float32)])
def test_32_bit_values_are_scaled_by_their_range(tmp_path, scale, dtype):
    values = np.linspace(0, 1, 1200).reshape(30, 40)
    image, note = open_image(save(tmp_path, Image.fromarray((values * scale).astype(dtype)), "p.tif"))
    assert "converted to RGB" in note
    assert abs(np.asarray(image)[..., 0].astype(int) - 255 * values).max() <= 1
