"""Errors as a visitor reads them: a sentence, and never a traceback."""

import html
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from ..serving.jobs import EngineBusy, EngineStopped


logger = logging.getLogger(__name__)
OUR_FAULT = "The model has failed to do this; the log of the demo says why."
BUSY = "Too many visitors wait already; please try again in a minute."

MIN_SECONDS = 3  # that an error is shown; Gradio's 10 cover what is made next


@contextmanager
def told_in_a_sentence() -> Iterator[None]:
    """What is wrong with a visitor's wish is told as it is; of anything else, only that it has failed."""
    try:
        yield
    except gr.Error:  # a ValueError, too
        raise
    except (ValueError, TypeError) as error:
        raise _sentence(str(error)) from error
    except EngineBusy as error:
        raise _sentence(BUSY) from error
    except EngineStopped as error:
        raise _sentence("The demo is being stopped.") from error
    except Exception as error:
        logger.exception("A visitor's wish has failed.")
        raise _sentence(OUR_FAULT) from error


def _sentence(message: str) -> gr.Error:
    words = " ".join(message.replace("`", "").split())  # names of arguments are those of fields here
    # The page takes messages for HTML, and they may hold a visitor's words.
    seconds = MIN_SECONDS + len(words) / 25  # to read it
    return gr.Error(html.escape(words[:1].upper() + words[1:], quote=False), seconds, print_exception=False)
