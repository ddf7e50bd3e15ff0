"""Command lines say of every setting what its configuration's docstring says."""

import inspect

import pytest
from transformers import HfArgumentParser

import diffusers_llada_uni.training
import transformers_llada_uni.training
from transformers_llada_uni.training import LLaDAUniImageTokenizerConfig, LLaDAUniSFTConfig


CONFIGURATIONS = [
    value
    for package in (transformers_llada_uni.training, diffusers_llada_uni.training)
    for name, value in vars(package).items()
    if name.endswith("Config")
]


@pytest.mark.parametrize("config_class", CONFIGURATIONS)
def test_every_setting_has_help(config_class):
    own = [base for base in config_class.__mro__ if base.__module__.split(".")[0].endswith("_llada_uni")]
    names = {name for base in own for name in inspect.get_annotations(base)}
    fields = config_class.__dataclass_fields__
    assert len(CONFIGURATIONS) == 8 and names
    for name in names & fields.keys():
        said = fields[name].metadata["help"]
        assert len(said) > 12 and "[`" not in said and not said.startswith(("See", "Default")), name
    shown = HfArgumentParser(config_class).format_help()
    assert all(f"--{name}" in shown for name in names & fields.keys())


def test_help_is_what_the_docstring_says():
    fields = LLaDAUniImageTokenizerConfig.__dataclass_fields__
    assert fields["commitment_weight"].metadata["help"] == "Weight of the loss that draws features to their code."
    assert fields["resize_mode"].metadata["choices"] == ["understanding", "editing"]
    fields = LLaDAUniSFTConfig.__dataclass_fields__
    assert fields["text_weight"].metadata["help"] == fields["image_weight"].metadata["help"]  # described together
    assert fields["noise_level"].metadata["help"].startswith("Whether each")  # of a base
    assert "checkpoint" in fields["save_steps"].metadata["help"]  # of transformers'
