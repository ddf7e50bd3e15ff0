"""What is asked of prepared data before a run of the decoder's trainers."""

import pytest
from datasets import Dataset

from diffusers_llada_uni.training import (
    LLaDAUniDecoderConfig,
    LLaDAUniDecoderTrainer,
    LLaDAUniDistillationConfig,
    LLaDAUniDistillationTrainer,
    decoder_data,
)
from tests.diffusers_llada_uni.training.decoder_common import RUN, dataset_of_images, make_components


TRAINERS = [
    (LLaDAUniDecoderTrainer, LLaDAUniDecoderConfig),
    (LLaDAUniDistillationTrainer, LLaDAUniDistillationConfig),
]


@pytest.mark.parametrize("trainer_class, config_class", TRAINERS)
@pytest.mark.parametrize("code", [-1, 2])
def test_codes_that_no_embedding_stands_for_are_refused(trainer_class, config_class, code, tmp_path, monkeypatch):
    monkeypatch.setattr(decoder_data, "ROWS_CHECKED", 2)
    rows = dataset_of_images(6).to_list()
    rows[3]["codes"] = [code]
    args = config_class(str(tmp_path), **RUN)
    with pytest.raises(ValueError, match=rf"Row 3 of `eval_dataset`: `codes` must lie in 0\.\.1, got {code}"):
        trainer_class(
            *make_components(), args=args, train_dataset=dataset_of_images(6), eval_dataset=Dataset.from_list(rows)
        )


def test_codes_that_are_grids_or_made_by_a_transform():
    grids = Dataset.from_dict({"codes": [[[0, 1], [1, 0]], None, [[1, 1], [0, 5]]]})
    with pytest.raises(ValueError, match=r"Row 2 of `train_dataset`: `codes` must lie in 0\.\.1, got 5"):
        decoder_data.check_codes("train_dataset", grids, 2)
    decoder_data.check_codes("train_dataset", grids, 6)
    decoder_data.check_codes("train_dataset", grids.select([1]), 2)
    decoder_data.check_codes("train_dataset", grids.with_transform(lambda rows: rows), 2)
