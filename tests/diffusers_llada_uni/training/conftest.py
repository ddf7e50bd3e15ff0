"""What several tests of the trainers begin with, made once."""

from pathlib import Path

import pytest

from diffusers_llada_uni.training import LLaDAUniDecoderConfig, LLaDAUniDecoderTrainer
from tests.diffusers_llada_uni.training.decoder_common import RUN, dataset_of_images, make_components


@pytest.fixture(scope="session")
def trained_decoder(tmp_path_factory) -> tuple[LLaDAUniDecoderTrainer, Path]:
    """A run in which a decoder has learnt its images, with a moving average; and the folder it was saved to."""
    folder = tmp_path_factory.mktemp("trained_decoder")
    settings = {"max_steps": 200, "per_device_train_batch_size": 16, "learning_rate": 5e-3, "ema_decay": 0.95}
    args = LLaDAUniDecoderConfig(str(folder), **settings, **RUN)
    trainer = LLaDAUniDecoderTrainer(*make_components(), args, train_dataset=dataset_of_images(256))
    trainer.train()
    trainer.save_model(str(folder))
    return trainer, folder
