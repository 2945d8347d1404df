"""Prompts and captions: which lines there are, and what isn't text."""

import io
import json
import re
import tarfile

import pytest
from PIL import Image

from headscope.sweep import SweepConfig
from headscope.sweep.plan.sources import TarGroup
from headscope.sweep.plan.texts import read_prompts

# what splitlines() takes for ends of lines and a text editor doesn't
KEPT = "a\x0bfox\x0cin\x1cthe\x1dred\x1ehouse\x85of\u2028the\u2029sea"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_prompts_are_the_lines(tmp_path, mark, end):
    lines = ["un café, naïve 狐", "", f"  {KEPT}\t", "   ", "the end"]
    (tmp_path / "prompts.txt").write_bytes(mark + end.join(lines).encode())
    assert read_prompts(tmp_path / "prompts.txt") == ["un café, naïve 狐", KEPT, "the end"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a fox\na na\xefve fox\n", "isn't UTF-8 text: byte 0xef in line 2"),
        ("a fox\n".encode("utf-16"), "isn't UTF-8 text: byte 0xff in line 1"),
        ("a fox\n".encode("utf-16-le"), "isn't UTF-8 text: a zero byte in line 1, as UTF-16 has them"),
        (b"a fox\na dog\ra cat\n", "has a carriage return inside of line 2"),
    ],
)
def test_what_is_no_such_text_is_named_with_its_line(tmp_path, content, message):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"prompts.txt' {message}")):
        read_prompts(tmp_path / "prompts.txt")


def test_a_plan_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "plan.toml").write_text('groups = ["faces"]', encoding="utf-8-sig")
    assert SweepConfig.from_toml(tmp_path / "plan.toml").groups == ("faces",)


def captioned(path, suffix: str, content: bytes) -> TarGroup:
    """A tar of one image and its caption."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    with tarfile.open(path, "w") as archive:
        for end, part in (("png", image.getvalue()), (suffix, content)):
            member = tarfile.TarInfo(f"0.{end}")
            member.size = len(part)
            archive.addfile(member, io.BytesIO(part))
    return TarGroup("mine", str(path), 8)


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        ("txt", b"\xef\xbb\xbfa red fox\n"),
        ("caption", b" a red fox\r\n"),
        ("json", json.dumps({"text": ["a red fox", "a fox"]}).encode("utf-8-sig")),
    ],
)
def test_captions_are_what_their_files_say(tmp_path, suffix, content):
    assert captioned(tmp_path / "one.tar", suffix, content).item(0).caption == "a red fox"


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (
            "txt",
            b"na\xefve",
            "image 'one.tar/0' of 'mine' can't be read: its .txt isn't UTF-8 text: byte 0xef in line 1",
        ),
        ("json", b"{", "can't be read: Expecting property name"),
        ("json", b"[]", "its .json is a list, expected an object with a caption"),
    ],
)
def test_captions_that_cannot_be_read_are_named(tmp_path, suffix, content, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        captioned(tmp_path / "one.tar", suffix, content).item(0)
