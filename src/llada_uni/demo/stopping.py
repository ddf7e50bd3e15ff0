"""Stop, and what the status says then."""

from collections.abc import Iterable
from typing import Any

import gradio as gr


def stop_by(button: gr.Button, events: Iterable[Any], status: gr.Markdown) -> None:
    """
    Lets a button end work. The status of what goes on ends in "...".

    Args:
        button: What is pressed.
        events: Gradio's, that may run.
        status: Where they tell how far they are.
    """
    button.click(None, cancels=list(events), api_visibility="private")
    for event in events:
        # After the end of the event and in its queue, lest its last news overwrite this; after an error, too.
        event.failure(settle, status, status, concurrency_limit=None, show_progress="hidden", api_visibility="private")


def settle(status: str | None) -> Any:
    """Before anything has been done there is no status yet."""
    return "Stopped." if status is not None and status.endswith("...") else gr.skip()
