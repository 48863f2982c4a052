"""Exactness of the default model's conversion: logits and greedy continuations, GQA against MLA.

    python benchmarks/exact_conversion.py

Loads SmolLM2-135M-Instruct before (GQA) and after conversion (MLA) in fp32. Prints the largest
difference of their logits, relative to the largest logit, and the number of equal ones of 20 greedy
continuations.
"""

import lowlat

TOKENS = 48
PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):",
    "Once upon a time there was a",
    "The three primary colours are",
    "In 1969, the first humans",
    "A recipe for pancakes:",
    "SELECT name FROM users WHERE",
    "The opposite of cold is",
    "Dear Sir or Madam,",
    "Photosynthesis is the process by which",
    "1, 1, 2, 3, 5, 8,",
    "The speed of light is about",
    "To be, or not to be,",
    "My favourite season is autumn because",
    "The Pacific Ocean is",
    "import numpy as np\n\nx =",
    "Question: What is gravity?\nAnswer:",
    "Die Hauptstadt von Deutschland ist",
    "The train left the station at",
)


def main() -> None:
    before = lowlat.load("smollm2-135m", dtype="fp32")
    after = lowlat.load("default", dtype="fp32")
    worst, equal = 0.0, 0
    for prompt in PROMPTS:
        ids = before.tokenizer.encode(prompt)
        (first,) = before.generate_many([prompt], max_tokens=TOKENS)[0]
        (second,) = after.generate_many([prompt], max_tokens=TOKENS)[0]
        equal += first.token_ids == second.token_ids
        ids += first.token_ids
        expected, found = before.logits(ids), after.logits(ids)
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    print(f"largest relative difference of logits  {worst:.2e}")
    print(f"equal greedy continuations             {equal} of {len(PROMPTS)}, {TOKENS} tokens each")


if __name__ == "__main__":
    main()
