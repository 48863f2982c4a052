"""Evaluate a model with EleutherAI's lm-eval (lm-evaluation-harness): its model class `lowlat`.

`python -m lowlat.bench.lm_eval ARGUMENTS` is lm-eval's command with this class, which it cannot
load by itself. Needs the package lm-eval.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch

from lowlat.api import load
from lowlat.generate.model import Model
from lowlat.generate.params import SamplingOptions, SamplingParams, make_params
from lowlat.utils.errors import UserError

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise SystemExit(
        f"this needs the package {error.name}; install it with: pip install lm-eval"
    ) from error

BATCH_SIZE = 64
MAX_GEN_TOKS = 256
"""lm-eval's default of generated tokens."""
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p", "seed"}

Scored = tuple[tuple[str, str], list[int], list[int]]
"""(context and continuation as text, ids of the context, ids of the continuation)."""


@register_model("lowlat")
class LowlatLM(TemplateLM):
    """lm-eval's interface over a Model: log-likelihoods and generation, in batches.

    model: as `load` takes it, and so are the other options, such as dtype and context.
    """

    def __init__(
        self,
        model: str | Model = "default",
        *,
        batch_size: int | str = BATCH_SIZE,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        # Without --device lm-eval gives "cuda", also on machines without one.
        if device is not None and (torch.cuda.is_available() or not device.startswith("cuda")):
            options["device"] = device
        self.model = model if isinstance(model, Model) else load(model, **options)
        size = BATCH_SIZE if batch_size == "auto" else int(batch_size)
        self._batch_size = min(size, max_batch_size or size)

    @property
    def max_length(self) -> int:
        """Most tokens of an input. The engine needs a place for the predicted token, and one for
        its own.
        """
        return self.model.context - 2

    @property
    def eot_token_id(self) -> int:
        ids = sorted(self.model.tokenizer.eos_ids)
        if not ids:
            raise UserError(f"{self.model.name}: the tokenizer has no end-of-sequence token")
        return ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What an empty context consists of."""
        bos = self.model.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.model.name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        return self.model.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.model.tokenizer.apply_chat_template(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.model.tokenizer.chat_template

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of each whole text, in windows of `max_length` tokens."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            scored: list[Scored] = [(("", ""), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(scored)))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first of its stop strings."""
        texts = []
        for batch in _batches(requests, self._batch_size):
            prompts, params = [], []
            for request in batch:
                context, options = request.args
                own = _params(options)
                room = self.model.context - (own.max_tokens or 1)
                if room < 1:
                    raise UserError(
                        f"max_gen_toks {own.max_tokens} exceeds the context of "
                        f"{self.model.context} tokens; lower it"
                    )
                prompts.append(self.tok_encode(context)[-room:])
                params.append(own)
            for (completion,) in self.model.generate_each(prompts, params):
                texts.append(completion)
        return [str(text) for text in texts]

    def _loglikelihood_tokens(
        self, requests: list[Scored], disable_tqdm: bool = False, **kwargs: object
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of each continuation."""
        results = []
        for batch in _batches(requests, self._batch_size):
            # The context loses its start where it does not fit, as in lm-eval's own models.
            prompts = [(before + after)[-self.max_length - 1 :] for _, before, after in batch]
            scored = self.model.prompt_logprobs(prompts, top=1)
            for (_, _, after), entries in zip(batch, scored, strict=True):
                own = entries[-len(after) :]
                is_greedy = all(entry.top[0][0] == entry.token for entry in own)
                results.append((sum(entry.logprob for entry in own), is_greedy))
        return results


def _params(options: dict[str, Any]) -> SamplingParams:
    """The sampling params of a task's generation_kwargs. Raises UserError for unknown ones."""
    if unknown := sorted(options.keys() - _KNOWN):
        raise UserError(
            f"generation option '{unknown[0]}' is not supported; known are "
            f"{', '.join(sorted(_KNOWN))}"
        )
    given: dict[str, Any] = {
        name: options[name] for name in ("top_p", "top_k", "min_p", "seed") if name in options
    }
    temperature = options.get("temperature", 0.0)
    if not options.get("do_sample", temperature > 0.0):
        # Filters change nothing in greedy decoding.
        temperature, given = 0.0, {}
    given |= {
        "max_tokens": int(options.get("max_gen_toks", MAX_GEN_TOKS)),
        "temperature": temperature,
        "stop": options.get("until"),
    }
    return make_params(cast(SamplingOptions, given))


def _batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def main() -> None:
    """lm-eval's command."""
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
