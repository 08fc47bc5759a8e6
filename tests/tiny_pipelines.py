"""Pipelines of diffusers of no size, saved as their users save them."""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "photo", "of", "cat", "dog", "sks"]


def tokenizer(length=8):
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=length, **names)


def text_model(cls):
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "projection_dim": 8, "num_hidden_layers": 1}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return cls(CLIPTextConfig(**sizes, **ids, num_attention_heads=2, max_position_embeddings=8))


def t5():
    return T5EncoderModel(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


def vae(**options):
    down, up = ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2
    sizes = {"block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4, "sample_size": 16}
    return AutoencoderKL(**sizes, down_block_types=down, up_block_types=up, **options)


def unet(**options):
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4, **options,
    )  # fmt: skip


def stable_diffusion():
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    parts = {"unet": unet(cross_attention_dim=8), "vae": vae(), "text_encoder": text_model(CLIPTextModel)}
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, tokenizer=tokenizer(), scheduler=scheduler, **absent)


def sdxl():
    # SDXL's levels and blocks, on which the names in its files depend
    network = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8, 16), norm_num_groups=4, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=32,
    )  # fmt: skip
    parts = {
        "unet": network,
        "vae": vae(),
        "text_encoder": text_model(CLIPTextModel),
        "text_encoder_2": text_model(CLIPTextModelWithProjection),
    }
    tokenizers = {"tokenizer": tokenizer(), "tokenizer_2": tokenizer()}
    return StableDiffusionXLPipeline(**parts, **tokenizers, scheduler=PNDMScheduler(skip_prk_steps=True))


def flux():
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    parts = {
        "transformer": transformer,
        "vae": vae(shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": text_model(CLIPTextModel),
        "text_encoder_2": t5(),
    }
    tokenizers = {"tokenizer": tokenizer(), "tokenizer_2": tokenizer(512)}
    return FluxPipeline(**parts, **tokenizers, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def sd3():
    transformer = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, pos_embed_max_size=8, joint_attention_dim=16,
        caption_projection_dim=8, pooled_projection_dim=16, attention_head_dim=4, num_attention_heads=2, num_layers=2,
    )  # fmt: skip
    t5_wide = T5EncoderModel(T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    parts = {
        "transformer": transformer,
        "vae": vae(shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": text_model(CLIPTextModelWithProjection),
        "text_encoder_2": text_model(CLIPTextModelWithProjection),
        "text_encoder_3": t5_wide,
    }
    tokenizers = {f"tokenizer{end}": tokenizer(512 if end == "_3" else 8) for end in ("", "_2", "_3")}
    return StableDiffusion3Pipeline(**parts, **tokenizers, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


PIPELINES = {"sd": stable_diffusion, "sdxl": sdxl, "flux": flux, "sd3": sd3}


def save(kind, folder):
    """The pipeline with weights that are not all zero where diffusers starts them so. Returns the folder."""
    torch.manual_seed(0)
    made = PIPELINES[kind]()
    made.save_pretrained(folder)
    return folder
