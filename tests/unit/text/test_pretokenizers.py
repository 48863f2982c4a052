"""How text is cut before merging, against pieces found by hand and patterns of transformers."""

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from lowlat.text.pretokenizers import splitting
from lowlat.utils.errors import UserError

SPACE, NEWLINE = "\u0120", "\u010a"
TEXT = "It's 12345\n  x_1"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["It", "'s", " 12345", "\n ", " x", "_", "1"]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "5", "\n ", " x", "_", "1"]),
        ("default", ["It", "'", "s", " ", "123", "45", "\n ", " x", "_", "1"]),
        ("llama-bpe", ["It", "'s", " ", "123", "45", "\n", " ", " x", "_", "1"]),
        ("tekken", ["It", "'s", " ", "1", "2", "3", "4", "5", "\n", " ", " x", "_", "1"]),
        ("glm4", ["It", "'s", " ", "123", "45", "\n", " ", " x", "_", "1"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "5", "\n", " ", " x", "_", "1"]),
        ("stablelm2", ["It", "'s", " ", "1", "2", "3", "4", "5", "\n", " ", " x", "_", "1"]),
        ("deepseek-v3", ["It", "'s", " ", "123", "45", "\n", " ", " x", "_", "1"]),
        ("deepseek-llm", ["It", "'", "s", " ", "1", "2", "3", "4", "5", "\n", " ", " x", "_", "1"]),
        (
            "deepseek-coder",
            ["It", "'", "s", " ", "1", "2", "3", "4", "5", "\n", " ", " x", "_", "1"],
        ),
    ],
)
def test_pieces(pre: str, pieces: list[str]) -> None:
    """Regression: digits grouped as in another family, which changes every number's ids."""
    found = splitting(pre, "file").pre_tokenizer().pre_tokenize_str(TEXT)
    plain = [piece.replace(SPACE, " ").replace(NEWLINE, "\n") for piece, _ in found]
    assert plain == pieces


def test_deepseek_v3_keeps_scripts_apart() -> None:
    found = splitting("deepseek-v3", "file").pre_tokenizer().pre_tokenize_str("漢字かなabc한")
    assert [offsets for _, offsets in found] == [(0, 4), (4, 8)]


def test_deepseek_llm_letters_are_its_own_list() -> None:
    """Regression: a range from ASCII K instead of U+212A, which makes a letter of U+00D7."""
    found = (
        splitting("deepseek-llm", "file").pre_tokenizer().pre_tokenize_str("a\u00d7 \u0561\u00e9")
    )
    assert [offsets for _, offsets in found] == [(0, 1), (1, 4), (4, 5)]


def test_the_gpt2_pattern_is_the_library_s() -> None:
    text = " I'm  12 caf\u00e9s\u3000\u00bd\n\n\ttab  "
    ours = splitting("gpt-2", "file").pre_tokenizer().pre_tokenize_str(text)
    assert ours == ByteLevel(add_prefix_space=False).pre_tokenize_str(text)


def test_the_qwen2_pattern_is_transformers_s() -> None:
    qwen2 = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2")
    assert splitting("qwen2", "file").patterns == (qwen2.PRETOKENIZE_REGEX,)


def test_stablelm2_is_qwen2_without_nfc() -> None:
    """Regression: a vocabulary trained without a normalizer, written with one."""
    assert splitting("stablelm2", "file").patterns == splitting("qwen2", "file").patterns
    assert splitting("stablelm2", "file").normalizer() is None


@pytest.mark.parametrize("pre", ["llama-bpe", "tekken"])
def test_other_patterns_are_transformers_s(pre: str) -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    assert splitting(pre, "file").patterns == (mapping.GGUF_PRE_TOKENIZER_SPLITS[pre],)


def test_an_unknown_name_is_an_error() -> None:
    """Regression: a silent default, which gives wrong ids for some texts only."""
    with pytest.raises(
        UserError, match=r"m\.gguf: tokenizer\.ggml\.pre 'kimi-k9' is not supported"
    ):
        splitting("kimi-k9", "m.gguf")
