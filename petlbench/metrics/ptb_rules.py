r"""The rules of the Penn Treebank lexer in `ptb.py`: regular expressions, and how each token is rewritten.

Group 1 of a pattern is the token; whatever it matches after group 1 is context, which counts for the longest match.
On a tie the first rule wins. `<NAME>` stands for a fragment. As in JFlex, literals ignore the case of
ASCII letters and character classes do not. An address keeps its soft hyphens, other words lose them.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from petlbench.metrics.ptb_letters import DIGIT, LETTER, WORD_LETTER

FRAGMENTS = {
    "LETTER": LETTER,
    "WORDLETTER": rf"{WORD_LETTER}|(?ai:&[aeiou](?:acute|grave|uml);)",
    "DIGIT": DIGIT,
    "SPACE": r"[ \t\u00A0\u2000-\u200A\u3000]",
    "GAP": r"<SPACE>|[\r\n\u2028\u2029\v\f\u0085]",
    "APOS": r"['\u0092\u2019]|(?ai:&apos;)",
    "APOSETC": r"['`\u0091\u0092\u2018\u2019\u201B]|(?ai:&apos;)",
    "AMP": r"(?ai:&amp;)",
    "ALNUM": r"<LETTER>|<DIGIT>",
    "HYPHEN": r"[-_\u058A\u2010\u2011]",
    "WORD": r"<WORDLETTER>(?:<WORDLETTER>|<DIGIT>)*(?:[.!?]<WORDLETTER>(?:<WORDLETTER>|<DIGIT>)*)*",
    "REDAUX": r"<APOS>(?ai:[msd]|re|ve|ll)",
    "SREDAUX": r"(?ai:n)<APOSETC>(?ai:t)",
    "NUM": r"<DIGIT>*(?:[.:,\u00AD\u066B\u066C]<DIGIT>+)+|<DIGIT>+",
    "NAME": r"[A-Za-z][A-Za-z0-9_:.\-]*",
    "SGML": r"<LT>(?:[!?][A-Za-z\-][^>\r\n]*|/<NAME>|<NAME><ATTRIBUTE>*[ ]*/?)[ ]*>",
    "ATTRIBUTE": r"[ ]+<NAME>(?:[ ]*=[ ]*(?:'[^'\r\n]*'|\"[^\"\r\n]*\"))?",
    "LT": r"[<]",
    "STARTER": r"(?=[A-Z])(?ai:a|about|according|additionally|after|an|as|at|but|earlier|he|her|here|however|if|in|it"
    r"|last|many|more|mr\.|ms\.|now|once|one|other|our|she|since|so|some|such|that|the|their|then|there|these|they|this"
    r"|we|what|when|while|yet|you)",
    "INITIALS": r"[A-Za-z](?:\.[A-Za-z])+",
    "ACRO": r"(?ai:(?:canada|sino|korean|eu|japan|non)-u\.s|u\.s\.-u\.(?:k|s\.s\.r))|<INITIALS>|[A-Za-z]",
    "MONTH": r"(?ai:jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu(?:rs)?|fri)",
    "STATE": r"(?ai:ala|ariz|calif|colo|conn|ct|dak|fla|ga|ind|kans?|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn"
    r"|va|vt|wisc?|wyo)|A(?ai:z|rk)|D(?ai:el)|I(?ai:ll)|L(?ai:a)|M(?ai:ass|iss)|O(?ai:re)|P(?ai:a)|T(?ai:ex)|W(?ai:ash)",
    "FIRM": r"(?ai:inc|cos?|corp|ltd|plc|rt|bancorp|bhd|assn|univ|intl|sys)|(?ai:pp?t)[ye](?ai:s?)",
    "OFFICE": r"(?ai:dept|invt|elec|natl)|(?ai:m)[ft](?ai:g)",
    "TITLE": r"(?ai:mr|mrs|ms|drs?|profs?|sens?|reps?|attys?|lt|col|gen|messrs|govs?|adm|rev|maj|sgt|cpl|pvt|capt|ste?"
    r"|ave|pres|lieut|hon|brig|co?mdr|pfc|spc|supts?|det|mt|ft|adj|adv|asst|assoc|ens|insp|mlle|mme|msgr|sfc)",
    "CLOSING": r"<MONTH>|<STATE>|<FIRM>|(?ai:tel|est|ext|sq|jr|sr|bros|(?:ed|ph)\.d|blvd|rd|esq|etc|al|seq|bldg)",
    "LEADING": r"<TITLE>|<OFFICE>|<ACRO>|(?ai:vs|alex|wm|jos|cie|a\.k\.a|cf|treas|ph)",
    "EXTENSION": r"(?ai:bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|pdf|php|pl|png|ppt|ps"
    r"|py|sql|tar|txt|wav|x|xml|zip|3gp|wm[va]|avi|flv|mp[34g])",
    "PHONE": r"(?:\(\d{2,3}\)[ \u00A0]?|(?:\+\+?)?(?:\d{2,4}[- \u00A0])?\d{2,4}[- \u00A0])\d{3,4}[- \u00A0]?\d{3,5}"
    r"|(?:(?:\+\+?)?\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}",
    "ELIDED": r"[dDoOlL](?:<APOSETC>)(?:<ALNUM>)",
    "THING": r"(?:<ELIDED>)?(?:<ALNUM>)+(?:<HYPHEN>(?:<ELIDED>)?(?:<ALNUM>)+)*",
    "COMPOUND": r"[A-Za-z0-9][A-Za-z0-9.,\u00AD]*(?:-(?:<INITIALS>\.|[A-Za-z0-9\u00AD]+))+",
    "FIRMNAME": r"[A-Z]+(?:(?:[+&]|<AMP>)[A-Z]+)+",
    "SYMBOL": r"[+%&~^|\\¦§¨©¬®¯°-º×÷\u0387\u05BE\u05C0\u05C3\u05C6\u05F3\u05F4\u0600-\u0603\u0606-\u060A\u060C"
    r"\u0614\u061B\u061E\u066A\u066D\u0703-\u070D\u07F6-\u07F8\u0964\u0965\u0E4F\u1FBD\u2016\u2017\u2020-\u2023\u2030-\u2038\u203B"
    r"\u203E-\u2042\u2044\u207A-\u207F\u208A-\u208E\u2100-\u214F\u2190-\u2BFF\u3001\u3002\u3005\u3006\u3012\u30FB"
    r"\uFF01-\uFF0F\uFF1A-\uFF20\uFF3B-\uFF40\uFF5B-\uFF65]",
}


def _plain(token: str) -> str:
    return token.replace("\u00ad", "")


def _joined(token: str) -> str:
    """A token that holds a space keeps it as a no-break space."""
    return token.replace(" ", "\u00a0")


def _spaced(token: str) -> str:
    """Brackets are spelt out as well."""
    return _joined(token).replace("(", "-LRB-").replace(")", "-RRB-")


_QUOTE_MAPS = (
    (re.compile("&apos;"), "'"),
    (re.compile('"|&quot;'), "''"),
    (re.compile("[\u0091\u2018\u201b\u2039]"), "`"),
    (re.compile("[\u0092\u2019\u203a]"), "'"),
    (re.compile("[\u0093\u201c\u00ab]"), "``"),
    (re.compile("[\u0094\u201d\u00bb]"), "''"),
)


def _quotes(token: str) -> str:
    """Apostrophes and quotation marks in their ASCII and LaTeX forms, soft hyphens removed."""
    for pattern, ascii_form in _QUOTE_MAPS:
        token = pattern.sub(ascii_form, token)
    return _plain(token)


_SPELT = {
    "¼": "1/4",
    "½": "1/2",
    "¾": "3/4",
    "\u2153": "1/3",
    "\u2154": "2/3",
    "¢": "cents",
    "£": "#",
    "¤": "$",
    "\u0080": "$",
    "\u20a0": "$",
    "€": "$",
    "&lt;": "<",
    "&gt;": ">",
    "(": "-LRB-",
    ")": "-RRB-",
    "[": "-LSB-",
    "]": "-RSB-",
    "{": "-LCB-",
    "}": "-RCB-",
}


def _spelt(token: str) -> str:
    return _SPELT.get(token.lower(), token)


def _to(constant: str) -> Callable[[str], str]:
    return lambda token: constant


def _amp(token: str) -> str:
    return re.sub("(?ai:&amp;)", "&", token)


def _dashes(token: str) -> str:
    return "--" if len(token) in (3, 4) else token


# What ends an address: these four alone, so that rarer spaces may stand in one.
_BLANK = r" \t\r\n"
_URL_END = rf"[^{_BLANK}\"<>|.!?(){{}},\-]"
_MAIL = rf"[^{_BLANK}\u00A0\"<>|(){{}}"
RULES: tuple[tuple[str, Callable[[str], str]], ...] = (
    (r"((?ai:can(?=not)|gon(?=na)|got(?=ta)|lem(?=me)|gim(?=me)|wan(?=na)))(?ai:not|na|ta|me)", _plain),
    (r"('(?ai:t))(?ai:is|was)", _plain),
    (r"(<SPACE>+|<GAP>|(?ai:&nbsp;))", _to("")),
    (r"(<SGML>)", _joined),
    (r"((?ai:c)(?:\+\+|\#)|(?ai:f)\#)", _plain),
    (r"((?ai:&(?:md|mdash|ndash);)|[\u0096\u0097\u2013-\u2015])", _to("--")),
    (r"(<AMP>)", _amp),
    (r"((?ai:&(?:ht|tl|ur|lr|qc|ql|qr|odq|cdq|\#\d+);))", _plain),
    (r"(<WORD>)<REDAUX>", _plain),
    (r"([A-Za-z\u00AD]*[A-MO-Za-mo-z]\u00AD*)<SREDAUX>", _plain),
    (r"(<WORD>)", _plain),
    (rf"((?ai:https?://)[^{_BLANK}\"<>|(){{}}]+{_URL_END})", str),
    (
        rf"((?:(?ai:www\.)(?:[^{_BLANK}\"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}"
        # The lexer's own slip: a range from the comma to the underscore, which holds digits and capitals.
        rf"|(?:[^{_BLANK}\"`'<>|!(){{}},-_$]+\.)+(?ai:com|net|org|edu))(?:/[^{_BLANK}\"<>|()]+{_URL_END})?)",
        str,
    ),
    (rf"((?:&lt;|<)?[a-zA-Z0-9]{_MAIL}]*@(?:{_MAIL}.]+\.)*{_MAIL}.]+>?)", str),
    (r"(@[a-zA-Z_][a-zA-Z_0-9]*|\#(?:<WORDLETTER>)+)", str),
    (r"(<REDAUX>)[^A-Za-z]", _quotes),
    (r"(<SREDAUX>)", _quotes),
    (r"(\d{1,2}[-/]\d{1,2}[-/]\d{2,4})", _plain),
    (r"([-+]?(?:<NUM>))", _plain),
    (r"([\u207A\u207B\u208A\u208B]?(?:[\u2070¹²³\u2074-\u2079]+|[\u2080-\u2089]+))", _plain),
    (r"((?:\d{1,4}[- \u00A0])?\d{1,4}(?:\\?/|\u2044)\d{1,4})", _spaced),
    (r"([\u00BC-\u00BE\u2153-\u215E])", _spelt),
    (
        r"((?ai:-[rl][rcs]b-|c\.d\.s|pro-|anti-|s(?:&|&amp;)p-500|s(?:&|&amp;)ls)|(?ai:cap)<APOS>(?ai:n)|(?ai:c)<APOS>(?ai:est))",
        _amp,
    ),
    (r"([A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2})", _plain),
    (r"([A-Z]*\$|\#)", _plain),
    (r"([¢£¤¥\u0080\u20A0€\u060B\u0E3F\u20A4\uFFE0\uFFE1\uFFE5\uFFE6])", _spelt),
    (r"([A-Za-z])\.<GAP>+(?:<STARTER>|<SGML>)<GAP>", _plain),  # the period ends the sentence
    (r"((?:<CLOSING>)\.)(?:[\s\S]{2})?", _plain),
    (r"((?:<LEADING>)\.)", _plain),
    (r"((?ai:ca|figs?|prop|nos?|art|bldg|pp|op)\.)<GAP>?\d", _plain),
    (r"(<APOS>\d\d)<GAP>", _plain),
    (r"((?:<WORDLETTER>|<DIGIT>)+(?:\.(?:<WORDLETTER>|<DIGIT>)+)*\.<EXTENSION>)(?:<GAP>|[.?!,])", str),
    (r"(<PHONE>)", _spaced),
    (r"(<<|>>)", _plain),
    (r"([<>]|(?ai:&[lg]t;))", _spelt),
    (r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]", _spaced),
    (r"([-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\))", _spaced),
    (r"([()\[\]{}])", _spelt),
    (r"(-+)", _dashes),
    (r"(\.{3,5}|(?:\.[ \u00A0]){2,4}\.|\u2026)", _to("...")),
    (r"(@+|\#+|_+|\*+|(?:\\\*){1,3})", _plain),
    (r"([,;:\u3001])", _plain),
    (r"([?!]+)", _plain),
    (r"([.¡¿\u037E\u0589\u061F\u06D4\u0700-\u0702\u07FA\u3002])", _plain),
    (r"([=/])", _plain),
    (
        r"([A-HJ-XZn]<APOSETC><LETTER>{2,}|<LETTER>+[aeiouyAEIOUY]<APOSETC>[aeiouA-Z]<LETTER>*|<APOS>(?ai:n)<APOS>"
        r"|(?ai:cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)|(?ai:o)<APOSETC>(?ai:o)"
        r"|<APOS>(?ai:n|em|till?|cause|[2-9]0s)|(?ai:dunkin|somethin|ol)<APOS>|[lLdDjJ]<APOS>)",
        _plain,
    ),
    (r"((?ai:y)<APOS>)<LETTER>", _plain),
    (r"(<THING>)", _plain),
    (r"(<COMPOUND>)", _plain),
    (r"(<FIRMNAME>)", _amp),
    (r"((?:<WORD>|<THING>|<COMPOUND>|<FIRMNAME>)\.)[,;:\u3001]", _amp),  # inside a sentence: an abbreviation
    (r"(')[A-Za-z][^ \t\r\n\u00A0]", _quotes),
    (r"(<REDAUX>)", _quotes),
    (r"(''|[`\u2018\u2019\u201A-\u201F\u0091-\u0094\u2039\u203A«»]{1,2}|<APOS>)", _quotes),
    (r"(\"|(?ai:&quot;))", _quotes),
    (r"(<SYMBOL>)", _plain),
)
