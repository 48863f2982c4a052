"""Context length of a model: most tokens of prompt and output together."""

from lowlat.config.model import ModelConfig
from lowlat.engine.params import integer_of
from lowlat.utils.errors import UserError


def check_context(config: ModelConfig, context: int | None) -> int:
    """Most tokens of prompt and output together: `context`, or if None all that the model allows.

    Raises UserError if the model allows fewer.
    """
    longest = config.max_position_embeddings
    if context is None:
        return longest
    wanted = integer_of(context)
    if wanted is None or not 2 <= wanted <= longest:
        raise UserError(
            "context must be an integer from 2 to the model's max_position_embeddings of "
            f"{longest}, got {context!r}"
        )
    return wanted
