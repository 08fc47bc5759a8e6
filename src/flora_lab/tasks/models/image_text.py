"""An image-text model's processor: of a folder or the hub, or of bytes for a LLaVA that is given by its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flora_lab.errors import SectionError
from flora_lab.tasks.data.dialogues import IMAGE
from flora_lab.tasks.models.language_model import LanguageModel
from flora_lab.tasks.models.pretrained import Pretrained, brief, make_config

VICUNA = (  # as LLaVA 1.5 has it
    "{% for message in messages %}"
    "{{ 'USER: ' if message.role == 'user' else 'ASSISTANT: ' if message.role == 'assistant' else '' }}"
    "{% for part in message.content %}{{ '<image>\\n' if part.type == 'image' else part.text }}{% endfor %}"
    "{{ '</s>' if message.role == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


@dataclass
class ImageTextModel(LanguageModel):
    def load_processor(self) -> Any:
        """Raises ValueError naming the model."""
        from transformers import AutoProcessor

        self.check()
        if not (name := self.tokenizer or self.name):
            return self._of_bytes()
        try:
            processor = AutoProcessor.from_pretrained(str(Pretrained(name=name).source()))
        except Exception as error:  # a model's own code may raise anything
            raise ValueError(f"{self.reader}: {brief(error, name)}") from error
        if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
            kind = type(processor).__name__
            raise ValueError(f"{self.reader} has no processor of pictures and text, but a {kind}")
        if not isinstance(getattr(processor, "image_token", None), str):
            kind = type(processor).__name__
            raise ValueError(f"{self.reader}: its {kind} does not say which token stands for a picture")
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        return processor

    def _of_bytes(self) -> Any:
        from transformers import ByT5Tokenizer, CLIPImageProcessor, LlavaProcessor

        try:
            config = make_config(self.config)
        except Exception as error:  # a config's own code may raise anything
            raise self.fault(brief(error)) from error
        if config.model_type != "llava":
            raise self.fault("expected task.model.tokenizer, the name of a processor")
        vision, size = config.vision_config, config.vision_config.image_size
        tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=[IMAGE])
        if (token := tokenizer.convert_tokens_to_ids(IMAGE)) != config.image_token_index:
            given = f"config.image_token_index={config.image_token_index}"
            raise SectionError(self, given, f"expected {token}, after 259 bytes")
        pictures = CLIPImageProcessor(
            size={"height": size, "width": size}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
        strategy = config.vision_feature_select_strategy
        return LlavaProcessor(
            pictures,
            tokenizer,
            patch_size=vision.patch_size,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=1,
            chat_template=VICUNA,
        )
