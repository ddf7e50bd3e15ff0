from diffusers_llada_uni.pipeline_card import make_pipeline_card


def test_card_of_something_trained():
    card = make_pipeline_card("someone/model", ["turbo"], "bfloat16", base_model="a/b", training="Ten steps.")
    assert card.data.base_model == "a/b" and card.data.pipeline_tag == "any-to-any"
    assert "license" not in card.data.to_dict()  # which the package does not know
    assert "pip install llada-uni" in card.text
    assert "## Training\n\nTen steps." in card.text
    assert "## Evaluation" not in card.text
    assert "normal" not in card.text
