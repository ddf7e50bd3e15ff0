"""Pages of stories, whose words are words."""

import base64
import html
import io
import re

import PIL.Image
import pytest

from llada_uni.commands.story import write_story


RED = PIL.Image.new("RGB", (4, 4), "red")
WORDS = "<script>alert(1)</script> & ![x](http://example.org/x.png) `code` *stars* _lines_ 🍎\n# a heading\n1. a list"


def test_a_page_of_html_holds_its_images_and_no_markup_of_words(tmp_path):
    path = write_story([WORDS, RED, "The end."], tmp_path / "story", f'Title "{WORDS}"', "html")
    text = path.read_text()
    assert [file.name for file in path.parent.iterdir()] == ["story.html"]
    (image,) = re.findall(r'<img src="data:image/png;base64,([^"]*)" alt="image 1">', text)
    assert PIL.Image.open(io.BytesIO(base64.b64decode(image))).getpixel((0, 0)) == (255, 0, 0)
    assert f"<p>{html.escape(WORDS)}</p>" in text and text.index("script&gt;") < text.index("<img") < text.index(
        "The end"
    )
    assert "<script" not in text and "http:" not in re.sub(html.escape("http://example.org"), "", text)


def test_a_page_of_markdown_has_its_images_beside_it(tmp_path):
    path = write_story([WORDS, RED], tmp_path / "story", f"Title\n{WORDS}", "md")
    first, *_ = text = path.read_text().splitlines()
    assert first.startswith("# Title &lt;script&gt;") and "\\# a heading 1. a list" in first
    assert "![image 1](image-1.png)" in text and (path.parent / "image-1.png").is_file()
    assert "\\# a heading" in text and "\\1. a list" in text
    assert "<script" not in path.read_text() and "![x]" not in path.read_text() and "\\`code\\`" in path.read_text()


def test_a_folder_that_is_there(tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        write_story(["a"], tmp_path, "a")
