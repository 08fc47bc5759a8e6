"""Image-text models of no size, each with a processor of its own: what the hub's folders hold, but for weights."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{{ 'PICTURE' if part.type == 'image' else part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def bytes_of(*special):
    """A tokenizer of bytes with special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *special]})
    return tokenizer


def qwen2_vl(folder):
    """The config; its processor, which makes as many tokens of a picture as its size asks for, is in ``folder``."""
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    tokenizer = bytes_of(*(f"<|{name}|>" for name in names))
    template = CHATML.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>")
    pictures = Qwen2VLImageProcessor(min_pixels=16 * 16, max_pixels=32 * 32, patch_size=4, merge_size=2)
    videos = Qwen2VLVideoProcessor(patch_size=4, merge_size=2)
    Qwen2VLProcessor(pictures, tokenizer, videos, chat_template=template).save_pretrained(folder)
    image, video, start, end = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    return {
        "model_type": "qwen2_vl", "image_token_id": image, "video_token_id": video,
        "vision_start_token_id": start, "vision_end_token_id": end,
        "text_config": {**TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope},
        "vision_config": {
            "depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2,
        },
    }  # fmt: skip


def idefics3(folder):
    """The config; its processor, which cuts a picture into five and names their places, is in ``folder``."""
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = bytes_of("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *places)
    pictures = Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    template = CHATML.replace("PICTURE", "<image>")
    Idefics3Processor(pictures, tokenizer, image_seq_len=4, chat_template=template).save_pretrained(folder)
    text = {**TEXT, "model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return {
        "model_type": "idefics3", "image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "scale_factor": 2,
        "pad_token_id": tokenizer.pad_token_id, "text_config": text,
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 4,
        },
    }  # fmt: skip
