"""What `/v1/chat/completions` takes."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .errors import RequestError
from .image_inputs import image_of_url
from .settings import ServerSettings


class Strict(BaseModel):
    """What is not known is refused by name, and not ignored; `null` asks for nothing, whatever it stands for."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _leave_out_null(cls, fields: Any) -> Any:
        """OpenAI's own client sends it for what was not given, also in answers that are sent back."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageURL(Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL


class AnswerImage(ImagePart):
    """
    An image of an answer, as this server and others give it in `message.images`.

    Args:
        text_offset: How many characters of the answer's text stand before it. Default: all.
    """

    index: int | None = None
    text_offset: int | None = Field(None, ge=0)


class Message(Strict):
    """A turn of the conversation; answers may be sent back as they came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    images: list[AnswerImage] = []
    name: str | None = None


class StreamOptions(Strict):
    include_usage: bool = False


StopString = Annotated[str, Field(min_length=1, max_length=256)]
# Settings of an answer with images, as its job calls them
IMAGE_SETTINGS = ("guidance_scale", "num_inference_steps", "num_image_steps_per_block")
# More than any text has. Counting the tokens of megabytes would take a minute, in which nobody else's are counted.
CHARACTERS_PER_TOKEN = 16
# Below, what logits are divided by makes infinite ones of them.
LOWEST_TEMPERATURE = 0.01


# What asks for what is done anyway
NEUTRAL: dict[str, Any] = {
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "logit_bias": {},
    "store": False,
}


class ChatRequest(Strict):
    """
    OpenAI's request, as far as this model has what it asks for, and more settings of generation. What asks for
    nothing, such as penalties of 0, may stand there.
    """

    @model_validator(mode="before")
    @classmethod
    def _leave_out_neutral(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if name not in NEUTRAL or NEUTRAL[name] != value}

    model: str
    messages: list[Message] = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    user: str | None = None
    threshold: float | None = Field(None, ge=0, le=1)
    num_steps_per_block: int | None = Field(None, ge=1, le=1024)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    logprobs: Literal[False] | None = None
    # Of answers with images
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1, max_length=2)] | None = None
    max_images: int | None = Field(None, ge=1)
    size: str | None = None
    guidance_scale: float | None = Field(None, ge=0, le=100)
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    num_image_steps_per_block: int | None = Field(None, ge=1, le=1024)

    @property
    def wants_images(self) -> bool:
        return self.modalities is not None and "image" in self.modalities

    def check(self, settings: ServerSettings) -> None:
        """
        Fields that must fit one another, or what this server allows.

        Raises:
            RequestError: for the first that does not.
        """
        num_characters = sum(map(_num_characters, self.messages))
        if num_characters > CHARACTERS_PER_TOKEN * settings.max_prompt_tokens:
            raise RequestError(
                f"`messages` hold {num_characters} characters, more than fit into the {settings.max_prompt_tokens} "
                "tokens that are taken.",
                "messages",
                code="context_length_exceeded",
            )
        if self.temperature is not None and 0 < self.temperature < LOWEST_TEMPERATURE:
            raise RequestError(
                f"`temperature` must be 0, or {LOWEST_TEMPERATURE} at least, got {self.temperature}.", "temperature"
            )
        wanted = self.wanted_tokens
        if wanted is not None and wanted > settings.max_new_tokens:
            raise RequestError(f"`max_tokens` may be {settings.max_new_tokens} at most, got {wanted}.", "max_tokens")
        if not self.wants_images:
            for name in ("max_images", "size", *IMAGE_SETTINGS):
                if getattr(self, name) is not None:
                    raise RequestError(f"`{name}` is for answers with images: `modalities` must name them.", name)
            return
        if self.modalities == ["image"]:
            raise RequestError(
                "`modalities` must name text, too; images alone are /v1/images/generations.", "modalities"
            )
        if self.stop is not None:
            raise RequestError("`stop` cannot be had in answers with images.", "stop")
        if len(self.messages) != 1 or self.messages[0].role != "user":
            raise RequestError(
                "`messages` must be one message of the user for an answer with images: the model was trained so.",
                "messages",
            )
        if self.max_images is not None and self.max_images > settings.max_images:
            raise RequestError(
                f"`max_images` may be {settings.max_images} at most, got {self.max_images}.", "max_images"
            )

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def generation_settings(self) -> dict[str, Any]:
        """
        Fields of `BlockDiffusionGenerationConfig`, and of an answer with images. As for OpenAI, a temperature of 0 is
        greedy; so is none.
        """
        settings: dict[str, Any] = {}
        for name in ("threshold", "num_steps_per_block", *IMAGE_SETTINGS):
            if getattr(self, name) is not None:
                settings[name] = getattr(self, name)
        if self.temperature:
            settings |= {"do_sample": True, "temperature": self.temperature}
            for name in ("top_p", "top_k"):
                if getattr(self, name) is not None:
                    settings[name] = getattr(self, name)
        return settings


def read_messages(messages: list[Message], settings: ServerSettings) -> list[dict[str, Any]]:
    """Messages as the processor takes them, their images read."""
    num_images = 0
    conversation: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str) and not message.images:
            conversation.append({"role": role, "content": message.content})
            continue
        parts: list[dict[str, Any]] = []
        for param, part in _parts_of(message, f"messages.{index}"):
            if isinstance(part, TextPart):
                parts.append({"type": "text", "text": part.text})
                continue
            num_images += 1
            if num_images > settings.max_images:
                raise RequestError(f"`messages` hold more than {settings.max_images} images.", "messages")
            parts.append({"type": "image", "image": image_of_url(part.image_url.url, param, settings)})
        conversation.append({"role": role, "content": parts})
    return conversation


def _num_characters(message: Message) -> int:
    if isinstance(message.content, str):
        return len(message.content)
    return sum(len(part.text) for part in message.content if isinstance(part, TextPart))


def _parts_of(message: Message, param: str) -> Iterator[tuple[str, TextPart | ImagePart]]:
    """Text and images of a message in their order, each with its place in the request."""
    if not message.images:
        assert not isinstance(message.content, str)  # which needs no taking apart
        for place, part in enumerate(message.content):
            yield f"{param}.content.{place}.image_url", part
        return
    if message.role != "assistant" or not isinstance(message.content, str):
        raise RequestError(
            f"`{param}.images` are those of an answer, beside its text as a string; others stand in the content.",
            f"{param}.images",
        )
    begin = 0
    for place, image in enumerate(message.images):
        end = len(message.content) if image.text_offset is None else image.text_offset
        if text := message.content[begin:end]:
            yield param, TextPart(type="text", text=text)
        begin = max(begin, end)
        yield f"{param}.images.{place}.image_url", image
    if text := message.content[begin:]:
        yield param, TextPart(type="text", text=text)
