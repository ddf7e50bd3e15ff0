"""
An untrained LLaDA-Uni of 17 million parameters for images of 64 x 64 to 192 x 192, with a tokenizer trained on the
corpus.

    python examples/emoji/build_model.py runs/emoji/data/corpus.txt runs/emoji/model

Writes a pipeline folder, and beside the pipeline's parts `text_model/`, the encoder of captions that the image
tokenizer is trained against.
"""

import argparse
from pathlib import Path

import torch
from diffusers.models import AutoencoderKL, ZImageTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ModernBertConfig, ModernBertModel, PreTrainedTokenizerFast
from transformers.models.glm_image.configuration_glm_image import GlmImageVisionConfig, GlmImageVQVAEConfig

from diffusers_llada_uni import LLaDAUniPipeline, LLaDAUniSemanticEmbedder
from transformers_llada_uni import (
    LLaDA2MoeConfig,
    LLaDAUniConfig,
    LLaDAUniForConditionalGeneration,
    LLaDAUniImageProcessor,
    LLaDAUniProcessor,
)
from transformers_llada_uni.prompts import ANSWER, SYSTEM_PROMPTS, UNCONDITION


# An emoji is 64 x 64 pixels and 4 x 4 codes; a scene of nine 192 x 192 and 12 x 12.
PATCH_SIZE, SIDE = 16, 64
LARGEST_SIDE = 3 * SIDE
LARGEST_GRID = LARGEST_SIDE // PATCH_SIZE
NUM_CODES = 1024
NUM_TEXT_TOKENS = 6144


def build_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE. What frames every prompt is one token each: words that never vary need no thought."""
    tokenizer = Tokenizer(models.BPE())
    # The corpus has neither capitals nor compatibility characters; what people type has.
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    # With a space before every text, a word is one token wherever it stands.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    special = ["<|startoftext|>", "<|endoftext|>", "<|mask|>", "<|role_end|>", "<|image|>", "<|/image|>", "<boi>"]
    special += [f"<|reserved_token_{number}|>" for number in range(LARGEST_GRID + 1)]
    special += ["<role>", "</role>", ANSWER, "<role>HUMAN</role>"]
    special += [f"<role>SYSTEM</role> {words} <role>HUMAN</role>" for words in SYSTEM_PROMPTS.values()]
    num_words = NUM_TEXT_TOKENS - 1  # one is left for UNCONDITION, which is text and not special
    trainer = trainers.BpeTrainer(
        vocab_size=num_words,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(corpus)], trainer)
    tokenizer.add_tokens([AddedToken(UNCONDITION, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        extra_special_tokens={"image_token": "<|image|>"},
        padding_side="left",
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LLaDAUniProcessor:
    image_processor = LLaDAUniImageProcessor(
        patch_size=PATCH_SIZE,
        size_multiple=SIDE,
        min_pixels=SIDE**2,
        max_pixels=LARGEST_SIDE**2,
        max_pixels_several=LARGEST_SIDE**2,
        max_side=LARGEST_SIDE,
        max_pixels_scaled=SIDE**2,  # what is no drawing of its own is an emoji, however large
        editing_max_pixels=LARGEST_SIDE**2,
        editing_max_ratio=3.0,
        editing_upscales=False,
        drawn_patch_size=PATCH_SIZE,
        default_side=SIDE,
    )
    return LLaDAUniProcessor(
        image_processor,
        tokenizer,
        image_token_offset=NUM_TEXT_TOKENS,
        codebook_size=NUM_CODES,
        max_position_embeddings=1024,
    )


def build_language_model(processor: LLaDAUniProcessor) -> LLaDAUniForConditionalGeneration:
    token_id = processor.tokenizer.convert_tokens_to_ids
    text_config = LLaDA2MoeConfig(
        vocab_size=NUM_TEXT_TOKENS + NUM_CODES,
        image_token_offset=NUM_TEXT_TOKENS,
        hidden_size=256,
        intermediate_size=768,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.0,
        block_length=16,  # an image is a block; prompts and answers are shorter
        max_position_embeddings=1024,
        initializer_range=0.03,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        mask_token_id=token_id("<|mask|>"),
        pad_token_id=token_id("<|endoftext|>"),
        eos_token_id=token_id("<|endoftext|>"),
    )
    vision_config = GlmImageVisionConfig(
        hidden_size=192,
        intermediate_size=512,
        depth=4,
        num_heads=4,
        patch_size=PATCH_SIZE,
        image_size=LARGEST_SIDE,
        spatial_merge_size=1,
    )
    vq_config = GlmImageVQVAEConfig(num_embeddings=NUM_CODES, embed_dim=32, latent_channels=192)
    config = LLaDAUniConfig(
        text_config=text_config,
        vision_config=vision_config,
        vq_config=vq_config,
        image_token_id=processor.image_token_id,
        image_start_token_id=token_id("<|image|>"),
        image_end_token_id=token_id("<|/image|>"),
        begin_of_image_token_id=token_id("<boi>"),
        grid_token_ids=processor.grid_token_ids,
    )
    model = LLaDAUniForConditionalGeneration(config)
    model.generation_config.update(
        eos_token_id=[token_id("<|endoftext|>"), token_id("<|role_end|>")], num_steps_per_block=16, max_new_tokens=32
    )
    return model


def build_vae() -> AutoencoderKL:
    """A quarter of the image's sides, 8 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=SIDE,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_decoder() -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=8,
        dim=192,
        n_layers=5,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=192,
        axes_dims=[16, 16, 16],
        axes_lens=[1024, 32, 32],
        siglip_feat_dim=None,
    )


def build_text_model(tokenizer: PreTrainedTokenizerFast) -> ModernBertModel:
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        layer_types=["full_attention"] * 2,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        cls_token_id=tokenizer.bos_token_id,
        sep_token_id=tokenizer.eos_token_id,
    )
    return ModernBertModel(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    processor = build_processor(build_tokenizer(arguments.corpus))
    pipe = LLaDAUniPipeline(
        model=build_language_model(processor),
        processor=processor,
        semantic_embedder=LLaDAUniSemanticEmbedder(codebook_size=NUM_CODES, embedding_dim=192),
        vae=build_vae(),
        transformer=build_decoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer_turbo=None,
        scheduler_turbo=None,
        editing_guidance_scale=1.0,  # unlike the released model, this one edits best without (tried on trained edits)
        decoder_tile_size=SIDE // PATCH_SIZE,  # of a scene each place is drawn as it is alone
    )
    pipe.save_pretrained(arguments.output_dir)
    text_model = build_text_model(processor.tokenizer)
    text_model.save_pretrained(arguments.output_dir / "text_model")
    processor.tokenizer.save_pretrained(arguments.output_dir / "text_model")
    parts = {**pipe.components, "text_model": text_model}
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            print(f"{name}: {sum(p.numel() for p in part.parameters()) / 1e6:.2f} million parameters")


if __name__ == "__main__":
    main()
