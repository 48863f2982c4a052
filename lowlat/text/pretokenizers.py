"""Pre-tokenizers of byte-level BPE vocabularies, by their names in GGUF files.

The patterns are those of the released tokenizer.json files; only the names are GGUF's. Vocabularies
and merges are `text.gguf_vocab`'s.
"""

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

from lowlat.utils.errors import UserError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WHITESPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + WHITESPACE
)
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + WHITESPACE
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + WHITESPACE
)
CJK_AND_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + WHITESPACE,
)
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK_AND_HANGUL, r"\p{N}")
# Cased letters as the DeepSeek-V2 tokenizer lists them: most, not all, of Unicode's Lu, Ll and Lt.
CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
DEEPSEEK_LLM = (
    r"[\r\n]",
    r"\s?[" + CASED_LETTERS + "]+",
    r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    CJK_AND_HANGUL,
    r"\p{N}",
)
# For files that were converted without a known pre-tokenizer.
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """Normalizer and pre-tokenizer that the vocabulary was trained with."""

    patterns: tuple[str, ...]
    """Applied in order; each isolates its matches inside the splits of the one before."""
    ignore_merges: bool = False
    """Whether a split that is a token as a whole is taken without merging."""
    adds_bos: bool = False
    """Whether bos is added by default."""
    nfc: bool = False
    """Whether text is normalized to NFC first."""

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """All patterns, then the map from bytes to visible characters."""
        splits = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in self.patterns]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*splits, byte_level])

    def normalizer(self) -> normalizers.Normalizer | None:
        """NFC, or None."""
        return normalizers.NFC() if self.nfc else None


def splitting(pre: str, origin: str) -> Splitting:
    """The splitting that `tokenizer.ggml.pre` names. Raises UserError for a name not known here."""
    match pre:
        case "smollm":
            return Splitting(patterns=(r"\p{N}", GPT2))
        case "gpt-2":
            return Splitting(patterns=(GPT2,))
        case "default":
            return Splitting(patterns=DEFAULT)
        case "llama-bpe" | "llama-v3" | "llama3":
            return Splitting(patterns=(LLAMA3,), ignore_merges=True, adds_bos=True)
        case "tekken":
            return Splitting(patterns=(TEKKEN,), ignore_merges=True, adds_bos=True)
        case "qwen2" | "deepseek-r1-qwen":
            return Splitting(patterns=(QWEN2,), nfc=True)
        case "stablelm2":
            return Splitting(patterns=(QWEN2,))
        case "glm4":
            return Splitting(patterns=(LLAMA3,))
        case "deepseek-llm":
            return Splitting(patterns=DEEPSEEK_LLM)
        case "deepseek-coder":
            return Splitting(patterns=DEEPSEEK_CODER)
        case "deepseek-v3":
            return Splitting(patterns=DEEPSEEK_V3)
    raise UserError(
        f"{origin}: tokenizer.ggml.pre '{pre}' is not supported;"
        " use the model's Hugging Face folder instead"
    )
