"""RewardContext of a run: the reasoning tags of its model, and whether prompts open them."""

from collections.abc import Sequence

from lowlat.text.reasoning_tags import THINK, find_reasoning_tags
from lowlat.text.tokenizer import Tokenizer
from lowlat.train.rewards.sample import RewardContext


def reward_context(
    tokenizer: Tokenizer, prompt: Sequence[int], *, max_completion_length: int
) -> RewardContext:
    """Facts for the built-in rewards. `prompt` has the token ids of one of the run's prompts.

    Without tags of its own a model may use <think>.
    """
    tags = find_reasoning_tags(tokenizer) or THINK
    text = tokenizer.decode(prompt, skip_special_tokens=False)
    return RewardContext(
        max_completion_length=max_completion_length,
        reasoning_open=tags.open,
        reasoning_close=tags.close,
        is_reasoning_open=text.rstrip().endswith(tags.open),
    )
