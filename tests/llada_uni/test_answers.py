"""The text of an answer while its bytes come."""

import pytest

from llada_uni.answers import Answer


class Bytes:
    """A tokenizer whose ids are bytes."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize(
    "stop_strings, wanted",
    [
        ([], "a 🍎 and a 🍐"),
        (["🍐"], "a 🍎 and a "),
        (["and", "🍎 a"], "a "),  # the first in the text, not in the list
        (["🍎 and a pear"], "a 🍎 and a 🍐"),
        (["a 🍎"], ""),
    ],
)
@pytest.mark.parametrize("step", [1, 2, 3, 5, 100])
def test_stop_strings_wherever_blocks_end(stop_strings, wanted, step):
    content, answer, pieces = list("a 🍎 and a 🍐".encode()), Answer(Bytes(), stop_strings), []
    for stop in range(step, len(content) + step, step):
        pieces.append(answer.take(content[:stop], is_finished=stop >= len(content)))
        if answer.is_stopped:
            break
    assert "".join(pieces) == answer.text == wanted
    assert answer.is_stopped == (wanted != "a 🍎 and a 🍐")
