"""Images of every kind to pixels: by hand, the same from a shard and from a folder."""

import io
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from selectflow.data import DataError, contact_sheet, make_folder, read_split
from selectflow.data.pixels import pixels_of

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(256, size=(4, 6, 3), dtype=np.uint8)


def encoded(image, fmt="PNG", **options):
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_16_bits(pixels, colour_type, more=b""):
    """PIL cannot write these: uint16 (height, width, channels)."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    body = more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body


def from_shard(tmp_path, data, extension="png"):
    path = tmp_path / "train-000000.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in {f"a.{extension}": data, "a.cls": b"0"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return next(read_split(path, "train"))[extension]


def from_folder(tmp_path, data, size, extension="png"):
    for name in ("a/1", "a/2", "b/1", "b/2"):
        path = tmp_path / "in" / f"{name}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    make_folder(tmp_path / "out", tmp_path / "in", size=size, num_target=1, num_test=1)
    return next(read_split(tmp_path / "out", "train"))["png"]


LEVELS = np.arange(65536, dtype=np.uint16).reshape(256, 256)
BY_257 = np.round(LEVELS / 257).astype(np.uint8)


def test_16_bits_of_grey_are_scaled_by_257(tmp_path):
    data = encoded(Image.fromarray(LEVELS))
    np.testing.assert_array_equal(from_shard(tmp_path, data), BY_257[None])
    np.testing.assert_array_equal(from_folder(tmp_path, data, 256), np.stack([BY_257] * 3))


def test_16_bits_of_colour_keep_all_levels(tmp_path):
    colours = np.stack([LEVELS, LEVELS.T, LEVELS[::-1]], axis=-1)
    pixels = from_shard(tmp_path, png_of_16_bits(colours, 2))
    assert np.abs(pixels.transpose(1, 2, 0) - colours / 257.0).max() <= 1
    assert [np.unique(channel).size for channel in pixels] == [256] * 3


def test_the_orientation_of_exif_data_is_followed(tmp_path):
    turned = {  # by the names of the sides that the first row and column are at, in the standard
        2: COLOURS[:, ::-1], 3: COLOURS[::-1, ::-1], 4: COLOURS[::-1],
        5: COLOURS.transpose(1, 0, 2), 6: np.rot90(COLOURS, -1),
        7: COLOURS[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(COLOURS),
    }  # fmt: skip
    for orientation, expected in turned.items():
        exif = Image.Exif()
        exif[274] = orientation
        data = encoded(Image.fromarray(COLOURS), exif=exif)
        pixels = from_shard(tmp_path, data)
        np.testing.assert_array_equal(pixels, expected.transpose(2, 0, 1), f"{orientation}")
    jpeg = encoded(Image.fromarray(np.repeat(COLOURS, 8, axis=0)), "JPEG", exif=exif)
    assert from_shard(tmp_path, jpeg, "jpg").shape == (3, 6, 32)
    square = Image.fromarray(np.kron(COLOURS[:4, :4], np.ones((8, 8, 1), np.uint8)))
    made = from_folder(tmp_path, encoded(square, exif=exif), 32)
    np.testing.assert_array_equal(made, np.rot90(np.asarray(square)).transpose(2, 0, 1))


def test_damaged_exif_data_cost_no_image(tmp_path):
    data = encoded(Image.fromarray(COLOURS), exif=b"Exif\0\0nonsense")
    np.testing.assert_array_equal(from_shard(tmp_path, data), COLOURS.transpose(2, 0, 1))


def on_white(colours, alpha):
    share = alpha[..., None] / 255
    return (colours * share + 255 * (1 - share)).transpose(2, 0, 1)


def test_what_is_transparent_lies_on_white(tmp_path):
    alpha = np.tile(np.array([0, 1, 128, 200, 254, 255], np.uint8), (4, 1))
    expected = on_white(COLOURS, alpha)
    rgba = np.dstack([COLOURS, alpha])
    for pixels in (
        from_shard(tmp_path, encoded(Image.fromarray(rgba))),
        from_shard(tmp_path, png_of_16_bits(rgba.astype(np.uint16) * 257, 6)),
    ):
        assert np.abs(pixels - expected).max() <= 1
    grey = np.dstack([COLOURS[..., 0], alpha])
    expected = on_white(COLOURS[..., :1].repeat(3, axis=2), alpha)
    assert np.abs(from_shard(tmp_path, encoded(Image.fromarray(grey))) - expected).max() <= 1


def test_one_colour_may_be_transparent(tmp_path):
    expected = COLOURS.copy()
    expected[0, 0] = 255
    colour = tuple(COLOURS[0, 0].tolist())
    data = encoded(Image.fromarray(COLOURS), transparency=colour)
    np.testing.assert_array_equal(from_shard(tmp_path, data), expected.transpose(2, 0, 1))
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    pixels = from_shard(tmp_path, encoded(palette, transparency=0))
    assert pixels.tolist() == [[[255, 40]], [[255, 50]], [[255, 60]]]
    opaque = from_shard(tmp_path, encoded(palette))
    assert opaque.tolist() == [[[10, 40]], [[20, 50]], [[30, 60]]]


def test_bits_are_black_and_white_in_grey(tmp_path):
    bits = COLOURS[..., 0] > 127
    pixels = from_shard(tmp_path, encoded(Image.fromarray(bits)))
    np.testing.assert_array_equal(pixels, bits[None] * np.uint8(255))


def test_inks_become_light(tmp_path):
    cyan = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG")
    pixels = from_shard(tmp_path, cyan, "jpg")
    assert np.abs(pixels[:, 8, 8] - np.array([0, 255, 255.0])).max() <= 2


def test_of_a_cameras_jpeg_the_first_image_is_taken(tmp_path):
    """The further ones, such as a preview, are no frames."""
    grey = Image.new("RGB", (16, 16), (128, 128, 128))
    data = encoded(grey, "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    for made in (from_shard(tmp_path, data, "jpg"), from_folder(tmp_path, data, 16, "jpg")):
        assert made.tolist() == np.full((3, 16, 16), 128).tolist()


REFUSED = {
    "several images": encoded(
        Image.fromarray(COLOURS), save_all=True, append_images=[Image.fromarray(255 - COLOURS)]
    ),
    "transparency in 16 bits": png_of_16_bits(LEVELS[..., None], 0, chunk(b"tRNS", b"\1\0")),
    "a transparent colour of 16 bits": png_of_16_bits(
        np.stack([LEVELS] * 3, axis=-1), 2, chunk(b"tRNS", b"\1\0" * 3)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_converted_is_refused_by_name(tmp_path, message):
    with pytest.raises(DataError, match=f"key 'a' that can be decoded, .*{message}"):
        from_shard(tmp_path, REFUSED[message])
    with pytest.raises(DataError, match=rf"a/1\.png' must be readable, .*{message}"):
        from_folder(tmp_path, REFUSED[message], 4)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_unknown_range_are_refused(tmp_path, mode):
    data = encoded(Image.fromarray(COLOURS[..., 0]).convert(mode), "TIFF")
    with pytest.raises(DataError, match=rf"a/1\.jpg' .* of mode {mode}, of unknown range"):
        from_folder(tmp_path, data, 4, "jpg")


def test_images_that_others_open_are_converted_alike():
    """As torchvision's datasets give them."""
    grey = Image.fromarray(LEVELS)
    np.testing.assert_array_equal(pixels_of(grey), BY_257[None])
    palette = Image.new("P", (1, 1))
    palette.putpalette([10, 20, 30])
    assert pixels_of(palette).tolist() == [[[10]], [[20]], [[30]]]
    with pytest.raises(ValueError, match="mode F, of unknown range"):
        pixels_of(Image.new("F", (1, 1)))


def test_every_field_of_images_is_shown(tmp_path):
    wide = {"npy": (LEVELS[None, :8, :8]).astype(np.int64)}
    for sample in ({"jpeg": COLOURS.transpose(2, 0, 1)}, {"png": COLOURS[None, ..., 0]}, wide):
        contact_sheet([{"__key__": "a"} | sample], tmp_path / "sheet.png", side=20)
        with Image.open(tmp_path / "sheet.png") as sheet:
            inside = np.asarray(sheet)[2:-2, 2:-2]
        assert np.unique(inside[..., 0]).size > 6
