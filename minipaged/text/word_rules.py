"""How text is cut into words, which no merge of a byte-level tokenizer crosses. A GGUF file only names its rule.

Where the tokenizer.json of the models that bear a name is known, its rule stands here. llama.cpp writes some of
them in another way, which comes to the same on the vocabularies they were trained with. For the rest llama.cpp's
own table (src/llama-vocab.cpp) is the source.
"""

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

BYTES = "bytes"  # a step that turns each byte into a letter; the last one, unless a rule has it earlier
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"

_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+END|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*END"
_SIGNS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
TEKKEN = rf"{_CASED}|\p{{N}}|{_SIGNS}".replace("END", "")
GPT4O = rf"{_CASED}|\p{{N}}{{1,3}}|{_SIGNS}".replace("END", f"{_SHORT}?")

# Letters that have cases, as of the Unicode version that DeepSeek's list was made from.
_CASES = (
    r"A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF}"
    r"\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}"
    r"\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}"
    r"\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}"
    r"\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}"
    r"\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}"
    r"\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}"
    r"\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}"
    r"\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}"
    r"\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}"
    r"\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}"
    r"\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}"
    r"\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}"
)
_CJK = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+"
_STOPS = r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)


@dataclass(frozen=True)
class WordRule:
    """steps: expressions, each of which cuts what the one before has left; a match is a word, and so is a gap.

    nfc: characters are composed first. whole: a word that is a token is taken as it is, whatever the merges say.
    add_bos: text begins with the beginning-of-text token where the file does not say.
    """

    steps: tuple[str, ...]
    nfc: bool = False
    whole: bool = False
    add_bos: bool = False

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        steps = self.steps if BYTES in self.steps else (*self.steps, BYTES)
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        cuts = [to_bytes if s == BYTES else pre_tokenizers.Split(Regex(s), "isolated") for s in steps]
        return pre_tokenizers.Sequence(cuts)


_RULES = {  # names, as tokenizer.ggml.pre has them: rule
    "gpt-2 mellum": WordRule((GPT2,)),
    "mpt olmo": WordRule((GPT2,), nfc=True),
    "smollm starcoder refact minerva-7b": WordRule((DIGIT, GPT2)),
    "command-r": WordRule((DIGIT, GPT2), nfc=True),
    "llama-bpe llama3 llama-v3 falcon3 pixtral": WordRule((LLAMA3,), whole=True, add_bos=True),
    "smaug-bpe": WordRule((LLAMA3,)),
    "qwen2 deepseek-r1-qwen": WordRule((QWEN2,), nfc=True),
    "megrez": WordRule((QWEN2,)),
    "qwen35": WordRule((QWEN35,), nfc=True),
    "tekken": WordRule((TEKKEN,), whole=True, add_bos=True),
    "gpt-4o llama4": WordRule((GPT4O,)),
    "deepseek-llm": WordRule((r"[\r\n]", rf"\s?[{_CASES}]+", _STOPS, r"\s+$", _CJK, DIGIT)),
    "deepseek-coder": WordRule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, DIGIT)),
    "deepseek-v3": WordRule((r"\p{N}{1,3}", r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+", _DEEPSEEK3)),
    "falcon": WordRule((r"[\p{P}$+<=>^~|`]+", GPT2, BYTES, r"\p{N}+", r"[0-9]{3}")),
    "default": WordRule((r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", r"[0-9]{3}")),
}
WORD_RULES = {name: rule for names, rule in _RULES.items() for name in names.split()}
