"""Short texts that tell tokenizers apart: the token gate encodes each of them in every runtime.

Each line is there for something that tokenizers are known to get wrong: case, contractions, runs of white space,
scripts with and without case, combining marks, digits of several scripts, code, emoji sequences, control characters.
The strings of a model's own special tokens are added by the caller.
"""

from __future__ import annotations

TOKEN_CORPUS: tuple[str, ...] = (
    # Plain prose in Latin script, with punctuation and contractions.
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure they'll say it's fine; we've heard he'd go, don't you think? You're right.",
    "IT'S LATE, THEY'LL WAIT. WE'VE DON'T I'D I'M YOU'RE",
    "She said: “It’s over…” – and left—quickly.",
    "a",
    "A",
    "e.g. i.e. etc. ... ?! ?? !!! (see [1], {2}, <3>)",
    "camelCaseName HTTPServerError parseJSONFile iPhone McDonald XMLHttpRequest",
    "well-known state-of-the-art co-operate re-entry",
    # Other European languages.
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. STRASSE Straße ÜBERGRÖSSE",
    "L'été dernier, l'élève n'aimait pas l'école. À BIENTÔT, ÉCOLE, ÇA VA?",
    "¿Dónde está el niño? ¡Aquí, señor! Él vivía en España.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy. ČESKÁ REPUBLIKA",
    "Zażółć gęślą jaźń. ŁÓDŹ",
    "İstanbul'da ılık bir gün; IŞIK ışık İĞNE iğne",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. ΑΘΗΝΑ Αθήνα",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. МОСКВА приветМИР",
    "Ďakujem, köszönöm, mulțumesc, благодаря, дякую, takk, kiitos",
    # Scripts without case, with combining marks, without spaces.
    "我能吞下玻璃而不伤身体。北京欢迎你！",
    "吾輩は猫である。名前はまだ無い。カタカナとひらがな、漢字（かんじ）。",
    "나는 유리를 먹을 수 있어요. 그래도 아프지 않아요.",
    "أنا قادر على أكل الزجاج و هذا لا يؤلمني. مَرْحَبًا",
    "אני יכול לאכול זכוכית וזה לא מזיק לי. שָׁלוֹם",
    "मैं काँच खा सकता हूँ और मुझे उससे कोई चोट नहीं पहुंचती। नमस्ते",
    "আমি কাঁচ খেতে পারি, তাতে আমার কোনো ক্ষতি হয় না।",
    "நான் கண்ணாடி சாப்பிடுவேன். வணக்கம்",
    "ฉันกินกระจกได้ แต่มันไม่ทำให้ฉันเจ็บ",
    "ខ្ញុំអាចញុំកញ្ចក់បាន។ ລາວ မြန်မာ",
    "Việt Nam: Tôi có thể ăn thủy tinh mà không hại gì.",
    "მინას ვჭამ და არა მტკივა. Ես կարող եմ ապակի ուտել",
    "ᐊᐃᓄᒃ ᏣᎳᎩ ⵜⴰⵎⴰⵣⵉⵖⵜ አማርኛ",
    "e\u0301 versus \u00e9, n\u0303 versus \u00f1, a\u030a\u0323, o\u0302\u0309",
    "\u1100\u1161\u11a8 \uac01 \u0915\u094d\u0937 \u0e33",
    # Digits.
    "0 1 12 123 1234 12345 123456 1234567 12345678901234567890",
    "3.14159 1,000,000.00 -42 +7 1e-9 0x1F 0b1010 1_000",
    "x1 y22 z333 a4b5c6 2024-12-31T23:59:59Z 192.168.0.1",
    "٠١٢٣٤٥٦٧٨٩ ۰۱۲۳ १२३ 一二三 １２３ ½ ¾ ² ³ ₄ Ⅷ ① 𝟘𝟙𝟚",
    "$5.00 €20 £3 ¥100 ₹99 50% 20°C §7 №5",
    # White space.
    " ",
    "  ",
    "   leading and trailing   ",
    "a  b   c    d     e      f       g        h",
    "\t",
    "\tone\t\ttwo\t \tthree",
    "\n",
    "\n\n",
    "\n\n\n\n a\n b\n\n  c \n",
    "line one\nline two\r\nline three\rline four\n\n\nend",
    "trailing newline\n",
    "trailing spaces and newline   \n   ",
    "mixed \t\n \t\n\t text",
    "a\u00a0b\u2003c\u3000d\u200be\u202ff\u2028g\u2029h\u0085i",
    # Code.
    "def f(x: int) -> str:\n    if x > 0:\n        return f\"{x!r:>10}\"\n    return ''\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * c[i]; } // sum\n",
    "SELECT * FROM users WHERE name LIKE '%o''brien%' AND id != 7;",
    "<div class=\"a b\" id='c'>text &amp; more</div><!-- note --></s><br/>",
    '{"key": [1, 2.5, null, true], "nested": {"a": "\\u00e9\\n"}}',
    '#include <stdio.h>\nint main(void){printf("%d\\n",1);return 0;}',
    "\\frac{a}{b} \\sum_{i=1}^{n} x_i^2 \\leq \\alpha",
    "https://example.com/path/to/file.html?q=a%20b&x=1#frag user@mail.example.org",
    "C:\\Users\\name\\file.txt /usr/local/bin ../.. ~/.config",
    "sudo apt-get install -y foo && ./run.sh --flag=value | grep -v '^#' > out.log 2>&1",
    "if(a&&b||!c){return a?b:c;} x<<=2; y>>=3; z**=2; a//b; ==!= === <=> -> => :: ...",
    '\t\tif ok {\n\t\t\treturn nil\n\t\t}\n\n\n\tfmt.Println("x")\n',
    "__init__ _private CONSTANT_CASE snake_case kebab-case $var @decorator #hashtag",
    "| a | b |\n|---|:-:|\n| 1 | `x` |\n\n- [ ] **bold** _it_ ~~no~~\n\n```py\nprint(1)\n```\n",
    # Emoji and symbols.
    "🙂 😀🎉🚀 ❤️ ☺ ✅ → ← ↔ ∞ ≠ ≤ ∑ √ ∂",
    "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇫🇷🇩🇪 1️⃣ #️⃣",
    "text🙂text 🙂's 🙂's",
    "𝒜𝓃𝑜𝓉𝒽𝑒𝓇 𝕗𝕠𝕟𝕥 Ｆｕｌｌ ｗｉｄｔｈ",
    "\ufeffbyte order mark, \ufffd replacement, \u00ad soft hyphen, \u200d joiner",
    # Control characters and rare planes.
    "\x01\x02\x1b[0m\x7f",
    "\U0001f9d1\u200d\U0001f4bb \U00020000\U0002a6d6 \U000e0041 \U0010fffd",
    # Things that look like special tokens but are not.
    "< |user| > <|nope|> [INST] <<SYS>> </ s> <unk <0x41> <s >",
    "\u2581 the underline that SentencePiece uses \u2581\u2581, Ġ and Ċ of byte-level vocabularies",
    # Words that repeat, long runs.
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "----------------========________********........,,,,,,,,",
    "ha" * 24 + "!" * 12 + " " * 33 + "end",
    "the the the The THE tHe",
    "'s 'S 't 'T 'll 'LL 'Ve 'rE ''s s's '",
)
