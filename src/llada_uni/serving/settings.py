"""What a server allows."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ServerSettings:
    """
    Args:
        model_name: What clients call the model.
        api_key: Clients must send it as `Authorization: Bearer ...`. Default: no key is asked for.
        max_new_tokens: Most tokens of an answer; also what one gets that asks for no number.
        max_prompt_tokens: Most tokens of a conversation, its images as codes among them.
        max_images: Most images of a request, in and out.
        max_side: Longest side of an image to make, in pixels.
        max_input_pixels: Most pixels of an image that is sent.
        max_body_bytes: Longest body of a request.
        max_body_seconds: What a body may take to come.
        allowed_image_hosts: Hosts from which images are fetched that a request names by URL. Addresses of private
            networks are refused even then. Default: images come as data URLs only.
        retry_after: Seconds after which a client that was turned away may try again.
    """

    model_name: str = "llada-uni"
    api_key: str | None = None
    max_new_tokens: int = 1024
    max_prompt_tokens: int = 16_384
    max_images: int = 8
    max_side: int = 2048
    max_input_pixels: int = 4096 * 4096
    max_body_bytes: int = 32 * 1024 * 1024
    max_body_seconds: float = 120.0
    allowed_image_hosts: frozenset[str] = field(default_factory=frozenset)
    retry_after: int = 2
