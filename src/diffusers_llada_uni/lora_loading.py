"""LoRA adapters of the decoders and of the language model, by diffusers' methods for pipelines."""

import os
from typing import Any

import torch
from diffusers.loaders.lora_pipeline import ZImageLoraLoaderMixin
from transformers.utils import find_adapter_config_file

from transformers_llada_uni.input_checks import check_choice

from .decoders import DECODERS, loaded


# Where `load_lora_weights` finds what it fetches, among its keyword arguments
_LOCATION = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


class LLaDAUniLoraLoaderMixin(ZImageLoraLoaderMixin):
    """
    diffusers' methods (`set_adapters`, `fuse_lora`, `unload_lora_weights`, ...) for a pipeline with two decoders and a
    language model.
    """

    _lora_loadable_modules = ["model", "transformer", "transformer_turbo"]

    def load_lora_weights(  # type: ignore[override]  # as diffusers' own do
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        decoder: str | None = None,
        **kwargs: Any,
    ) -> None:
        r"""
        Loads an adapter of the language model, or of a decoder.

        Args:
            pretrained_model_name_or_path_or_dict: A folder or repository with an `adapter_config.json` holds an
                adapter of the language model, as peft saves it. Everything else is for a decoder: files of LoRA
                weights for Z-Image as diffusers knows them, or a dict of such weights.
            adapter_name (`str`, *optional*): For [`set_adapters`]; by default `"default"` for the language model, and
                diffusers' numbered names for decoders.
            hotswap (`bool`, defaults to `False`): Put the weights in the place of the adapter of that name.
            decoder (`str`, *optional*): `"turbo"` or `"normal"`; turbo when it is loaded, by default. Where it is
                given, the adapter is a decoder's.
            **kwargs: Of diffusers' `load_lora_weights`: `weight_name`, `subfolder`, `token`, ...

        Raises:
            ValueError: if there is no such decoder or model, or the file holds no LoRA weights.
        """
        source = pretrained_model_name_or_path_or_dict
        is_for_decoder = decoder is not None or "weight_name" in kwargs
        if not (is_for_decoder or isinstance(source, dict) or os.path.isfile(source)):
            location = {name: kwargs[name] for name in _LOCATION if name in kwargs}
            if find_adapter_config_file(os.fspath(source), **location) is not None:
                model = loaded("model", getattr(self, "model", None))
                model.load_adapter(os.fspath(source), adapter_name, hotswap=hotswap, adapter_kwargs=location)
                return
        if decoder is None:
            decoder = next((name for name in DECODERS if getattr(self, DECODERS[name][0]) is not None), "turbo")
        check_choice("decoder", decoder, list(DECODERS))
        name, _ = DECODERS[decoder]
        transformer = loaded(name, getattr(self, name))
        weights, metadata = self.lora_state_dict(
            dict(source) if isinstance(source, dict) else os.fspath(source), return_lora_metadata=True, **kwargs
        )
        if not weights or not all("lora" in name or "lokr" in name for name in weights):
            raise ValueError("`pretrained_model_name_or_path_or_dict` must hold weights of LoRA or LoKr only.")
        self.load_lora_into_transformer(
            weights, transformer, adapter_name=adapter_name, metadata=metadata, _pipeline=self, hotswap=hotswap
        )
        transformer.train(transformer.training)  # what peft has added, and would drop out

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """As any pipeline's; by default of all components that have an adapter."""
        components = components or list(self.get_list_adapters())
        super().fuse_lora(components, lora_scale, safe_fusing, adapter_names, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """As any pipeline's; by default of all components that have an adapter."""
        super().unfuse_lora(components=components or list(self.get_list_adapters()), **kwargs)

    def unload_lora_weights(self) -> None:
        """As any pipeline's."""
        super().unload_lora_weights()
        model = getattr(self, "model", None)
        if model is not None:  # it remembers the names of an adapter's file, and would be saved under them
            vars(model).pop("_weight_conversions", None)
