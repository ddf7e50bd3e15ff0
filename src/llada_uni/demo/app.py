"""The page: a tab for each thing the model can do, and how it is served."""

from typing import Any

import gradio as gr
import PIL.Image

from diffusers_llada_uni import LLaDAUniPipeline

from .chat_tab import MAX_PIXELS, chat_tab
from .draw_tab import draw_tab
from .edit_tab import edit_tab
from .examples import Examples, examples_of
from .model_turns import ModelTurns
from .story_tab import story_tab


MAX_FILE = "20mb"
MAX_WAITING = 64  # visitors, over all tabs
KEPT_SECONDS = 3600  # files of visitors, and of what was made for them
# Fonts of the visitor's own machine: nothing comes from elsewhere, so the page works without internet.
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
CSS = """
.gradio-container, .gradio-container > main { width: 100%; max-width: 1100px !important; margin: 0 auto !important; }
.head h1 { margin-bottom: 0; }
.head p, .status, .credit { color: var(--body-text-color-subdued); }
.head p { margin-top: .25rem; }
.status { min-height: 1.6em; }
.credit { font-size: .85em; text-align: center; }
.images .grid-wrap { max-height: none; }
.images .grid-container { max-width: 480px; margin: 0 auto; }
.images img, .story img { background: #fff; }
.story p { font-size: 1.1rem; line-height: 1.6; margin: .75rem 0 .5rem; }
.story img { width: min(100%, 256px); border-radius: var(--radius-lg); }
@media (max-width: 640px) { /* what has been made comes before examples and settings */
  .sides { flex-direction: column; flex-wrap: nowrap; align-items: stretch; }
  .sides > :first-child { display: contents; }
  .sides > .result { order: 1; }
  .sides .later { order: 2; }
}
"""


class Demo:
    r"""
    The page, and the model behind it.

        Demo(pipe).launch()

    Args:
        pipe ([`LLaDAUniPipeline`]): Nobody else may call it. No part of it may be offloaded.

    Attributes:
        page: Of Gradio.
        turns: How visitors share the model.
    """

    def __init__(self, pipe: LLaDAUniPipeline):
        pipe.set_progress_bar_config(disable=True)
        self.turns = ModelTurns(pipe)
        self.page = _page(self.turns, examples_of(str(pipe.config["_name_or_path"])))

    def launch(self, host: str | None = None, port: int | None = None, **settings: Any) -> str:
        """
        Serves the page, until Ctrl-C or, with `prevent_thread_lock=True`, in threads of this process.

        Args:
            host: Where to listen. Default: `GRADIO_SERVER_NAME`, as Spaces set it, or this machine only.
            port: Default: `GRADIO_SERVER_PORT`, or the first that is free from 7860 on.
            **settings: Of Gradio's `launch`. `share` is off by default, wherever it runs.

        Returns:
            Where the page is: what is shared, by its public address.

        Raises:
            OSError: if the port is taken.
        """
        # Gradio decodes what is painted on before we see it; PIL refuses what is larger than twice this.
        PIL.Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
        _, local, public = self.page.launch(
            server_name=host,
            server_port=port,
            theme=_theme(),
            css=CSS,
            footer_links=[],
            max_file_size=MAX_FILE,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
            **{"share": False, **settings},
        )
        return public or local

    def close(self) -> None:
        """Ends the page, then the work for those who looked at it, at its next block or part."""
        self.page.close()
        self.turns.stop()


def _page(turns: ModelTurns, examples: Examples) -> gr.Blocks:
    with gr.Blocks(title="LLaDA-Uni", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gr.Markdown(
            "# LLaDA-Uni\nOne masked-diffusion model that draws, edits, sees and tells stories.", elem_classes="head"
        )
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw"):
                drawn = draw_tab(turns, examples)
            with gr.Tab("Edit", id="edit"):
                edit_tab(turns, examples, drawn, tabs, "edit")
            with gr.Tab("Chat", id="chat"):
                chat_tab(turns, examples)
            with gr.Tab("Story", id="story"):
                story_tab(turns, examples)
        if examples.credit:
            gr.Markdown(examples.credit, elem_classes="credit")
    return page.queue(max_size=MAX_WAITING, api_open=False)


def _theme() -> gr.Theme:
    theme = gr.themes.Default(primary_hue="violet", font=FONTS, font_mono=("ui-monospace", "monospace"))
    return theme.set(
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        input_placeholder_color="*neutral_500",
    )
