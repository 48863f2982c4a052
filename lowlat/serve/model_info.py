"""ModelInfo: what the API reports of a model, from its files before it is loaded, then from memory.

It outlives the loaded model, and refers to none of its parts.
"""

from dataclasses import dataclass, replace

from lowlat.config.hf.sentence_transformers import Pooling
from lowlat.config.model import ModelConfig
from lowlat.config.parameter_count import num_stored_parameters
from lowlat.generate.model import Model
from lowlat.model.native import weight_bytes
from lowlat.model.quant import weight_format
from lowlat.serve.chat.template_features import TemplateFeatures
from lowlat.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """Facts about a model. Those that are None are known once it has been loaded."""

    config: ModelConfig
    context: int
    """Maximum number of tokens of prompt and output together."""
    num_parameters: int
    weights_bytes: int
    chat_template: str | None
    supports_tools: bool
    reasoning: bool
    """Whether outputs may begin with reasoning."""
    chat_template_kwargs: tuple[str, ...]
    """Variables of the chat template that a request may set."""
    is_embedding: bool
    """Whether the model makes embeddings and generates no text."""
    weight_format: str | None = None
    cache_bytes_per_token: int | None = None
    cache_dtype: str | None = None
    batch_invariant: bool | None = None

    @classmethod
    def of_files(
        cls,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        context: int,
        weights_bytes: int,
        pooling: Pooling | None,
    ) -> "ModelInfo":
        """The facts of a model that is not loaded. Renders its chat template, which takes some
        tenths of a second."""
        features = TemplateFeatures.of(tokenizer)
        has_template = tokenizer.chat_template is not None
        return cls(
            config=config.for_context(context),
            context=context,
            num_parameters=num_stored_parameters(config),
            weights_bytes=weights_bytes,
            chat_template=tokenizer.chat_template,
            supports_tools=has_template and features.tools is not None,
            reasoning=has_template and features.reasoning is not None,
            chat_template_kwargs=tuple(sorted(features.variables)),
            is_embedding=pooling is not None,
        )

    @classmethod
    def of(cls, model: Model) -> "ModelInfo":
        """The facts of a loaded model."""
        transformer = model.transformer
        info = cls.of_files(
            model.config,
            model.tokenizer,
            context=model.context,
            weights_bytes=weight_bytes(transformer),
            pooling=model.pooling,
        )
        return replace(
            info,
            num_parameters=model.num_parameters,
            weight_format=weight_format(transformer, transformer.embed_tokens.dtype),
            cache_bytes_per_token=model.cache_bytes_per_token,
            cache_dtype=model.cache_dtype,
            batch_invariant=model.runner.is_batch_invariant,
        )
