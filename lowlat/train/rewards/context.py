"""RewardContext of a run: the reasoning tags of its chat template."""

from lowlat.text.reasoning_tags import THINK, find_reasoning_tags, opens_reasoning
from lowlat.text.tokenizer import Tokenizer
from lowlat.train.rewards.sample import RewardContext


def reward_context(
    tokenizer: Tokenizer, *, max_completion_length: int, are_chats: bool = True
) -> RewardContext:
    """Facts for the built-in rewards. Without tags of its own a model may use <think>.

    are_chats: prompts are rendered by the chat template, which may open the reasoning. Raises
    UserError if the template rejects a plain question.
    """
    tags = find_reasoning_tags(tokenizer) or THINK
    return RewardContext(
        max_completion_length=max_completion_length,
        reasoning_open=tags.open,
        reasoning_close=tags.close,
        is_reasoning_open=are_chats and opens_reasoning(tokenizer, tags),
    )
