"""Tags around a model's reasoning, such as <think> and </think>, found in its chat template."""

from dataclasses import dataclass

from lowlat.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    open: str
    close: str


THINK = ReasoningTags("<think>", "</think>")
KNOWN = (
    THINK,
    ReasoningTags("[THINK]", "[/THINK]"),
    ReasoningTags("<seed:think>", "</seed:think>"),
    ReasoningTags("◁think▷", "◁/think▷"),
    ReasoningTags("<|thought_start|>", "<|thought_end|>"),
)
_PROBE = "probe_7f3a"


def find_reasoning_tags(tokenizer: Tokenizer) -> ReasoningTags | None:
    """Tags that the chat template contains, else tags that are tokens of the model; None without
    either, and without a template.
    """
    source = tokenizer.chat_template or ""
    named = [tags for tags in KNOWN if tags.close in source]
    known = set(tokenizer.added_tokens.values()) if source else set()
    return next(iter(named + [tags for tags in KNOWN if tags.close in known]), None)


def opens_reasoning(tokenizer: Tokenizer, tags: ReasoningTags) -> bool:
    """Whether the generation prompt ends with the opening tag, so that answers begin after it.

    Raises UserError if the chat template rejects a plain question.
    """
    if tokenizer.chat_template is None:
        return False
    text = tokenizer.apply_chat_template([{"role": "user", "content": _PROBE}])
    return text.rstrip().endswith(tags.open)
