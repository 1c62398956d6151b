r"""The rules of the Penn Treebank lexer in `ptb.py`: regular expressions, and what becomes of a token.

Group 1 of a pattern is the token; whatever it matches after group 1 is context, which counts for the longest match.
On a tie the first rule wins. `<NAME>` stands for a fragment. As in JFlex, literals ignore case and character classes
do not.
"""

from __future__ import annotations

import re
from collections.abc import Callable

GAP = r"[ \t\u00A0\u2000-\u200A\u3000\r\n\u2028\u2029\v\f\u0085]"

FRAGMENTS = {
    "GAP": GAP,
    "APOS": r"['\u0092\u2019]|(?i:&apos;)",
    "APOSETC": r"['\u0091\u0092\u2018\u2019\u201B]|(?i:&apos;)",
    "AMP": r"(?i:&amp;)",
    "ALNUM": r"<LETTER>|\d",
    "HYPHEN": r"[-_\u058A\u2010\u2011]",
    "WORD": r"<LETTER>(?:<ALNUM>)*(?:[.!?]<LETTER>(?:<ALNUM>)*)*",
    "REDAUX": r"<APOS>(?i:[msd]|re|ve|ll)",
    "SREDAUX": r"(?i:n)<APOSETC>(?i:t)",
    "NUM": r"\d*(?:[.:,\u00AD\u066B\u066C]\d+)+|\d+",
    "NAME": r"[A-Za-z][A-Za-z0-9_:.\-]*",
    "SGML": r"<LT>(?:[!?][A-Za-z\-][^>\r\n]*|/?<NAME><ATTRIBUTE>*[ ]*/?)[ ]*>",
    "ATTRIBUTE": r"[ ]+<NAME>(?:[ ]*=[ ]*(?:'[^'\r\n]*'|\"[^\"\r\n]*\"|<NAME>))?",
    "LT": r"[<]",
    "SENTEND": r"<GAP>(?:<GAP>|[A-Z]|<SGML>)",
    "ACRO": r"[A-Za-z](?:\.[A-Za-z])*|(?i:(?:canada|sino|korean|eu|japan|non)-u\.s|u\.s\.-u\.(?:k|s\.s\.r))",
    "MONTH": r"(?i:jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu(?:rs)?|fri)",
    "STATE": r"(?i:ala|ariz|calif|colo|conn|ct|dak|fla|ga|ind|kans?|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn"
    r"|va|vt|wisc?|wyo)|A(?i:z|rk)|D(?i:el)|I(?i:ll)|L(?i:a)|M(?i:ass|iss)|O(?i:re)|P(?i:a)|T(?i:ex)|W(?i:ash)",
    "FIRM": r"(?i:inc|cos?|corp|pp?t[ye]s?|ltd|plc|rt|bancorp|dept|bhd|assn|univ|intl|sys|invt|elec|natl|m[ft]g)",
    "TITLE": r"(?i:mr|mrs|ms|drs?|profs?|sens?|reps?|attys?|lt|col|gen|messrs|govs?|adm|rev|maj|sgt|cpl|pvt|capt|ste?"
    r"|ave|pres|lieut|hon|brig|co?mdr|pfc|spc|supts?|det|mt|ft|adj|adv|asst|assoc|ens|insp|mlle|mme|msgr|sfc)",
    "ABBREV": r"<MONTH>|<STATE>|<FIRM>|<TITLE>|<ACRO>|(?i:tel|est|ext|sq|jr|sr|bros|(?:ed|ph)\.d|blvd|rd|esq|etc|al"
    r"|seq|bldg|vs|alex|wm|jos|cie|a\.k\.a|cf|treas|ph)",
    "EXTENSION": r"(?i:bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|pdf|php|pl|png|ppt|ps|py"
    r"|sql|tar|txt|wav|x|xml|zip|3gp|wm[va]|avi|flv|mp[34g])",
    "PHONE": r"(?:\(\d{2,3}\)[ \u00A0]?|(?:\+\+?)?(?:\d{2,4}[- \u00A0])?\d{2,4}[- \u00A0])\d{3,4}[- \u00A0]?\d{3,5}"
    r"|(?:(?:\+\+?)?\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}",
    "ELIDED": r"[dDoOlL]<APOSETC><LETTER>",
    "SYMBOL": r"[+%&~^|\\¦§¨©¬®¯°-º×÷\u0387\u05BE\u05C0\u05C3\u05C6\u05F3\u05F4\u0600-\u0603\u0606-\u060A\u060C"
    r"\u0614\u061B\u061E\u066A\u066D\u0703-\u070D\u07F6-\u07F8\u0964\u0965\u0E4F\u1FBD\u2016\u2017\u2020-\u2023\u2030-\u2038\u203B"
    r"\u203E-\u2042\u2044\u207A-\u207F\u208A-\u208E\u2100-\u214F\u2190-\u2BFF\u3001-\u3006\u3008-\u3020\u30FB"
    r"\uFF01-\uFF0F\uFF1A-\uFF20\uFF3B-\uFF40\uFF5B-\uFF65]",
}


def _plain(token: str) -> str:
    return token.replace("\u00ad", "")


def _spaced(token: str) -> str:
    """A token that holds a space keeps it as a no-break space; brackets in it are spelt out."""
    return token.replace(" ", "\u00a0").replace("(", "-LRB-").replace(")", "-RRB-")


_QUOTE_MAPS = (
    (re.compile(r"(?i:&apos;)"), "'"),
    (re.compile(r"\"|(?i:&quot;)"), "''"),
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
    return re.sub("(?i:&amp;)", "&", token)


def _dashes(token: str) -> str:
    return "--" if len(token) in (3, 4) else token


_URL_END = r"[^\s\"'<>|.!?(){},\-]"
RULES: tuple[tuple[str, Callable[[str], str]], ...] = (
    (r"((?i:can(?=not)|gon(?=na)|got(?=ta)|lem(?=me)|gim(?=me)|wan(?=na)))(?i:not|na|ta|me)", _plain),
    (r"(<APOS>(?i:t))(?i:is|was)", _quotes),
    (r"(<SGML>)", _spaced),
    (r"((?i:&(?:md|mdash|ndash);)|[\u0096\u0097\u2013-\u2015])", _to("--")),
    (r"(<AMP>)", _amp),
    (r"((?i:&(?:ht|tl|ur|lr|qc|ql|qr|odq|cdq|\#\d+);))", _plain),
    (r"(<WORD>)<REDAUX>", _plain),
    (r"([A-Za-z\u00AD]*[A-MO-Za-mo-z]\u00AD*)<SREDAUX>", _plain),
    (r"(<WORD>)", _plain),
    (rf"((?i:https?://)[^\s\"<>|(){{}}]+{_URL_END})", _plain),
    (
        r"((?:(?i:www\.)(?:[^\s\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}|(?:[^\s\"`'<>|.!?(){},\-_$]+\.)+(?i:com|net|org|edu))"
        rf"(?:/[^\s\"<>|()]+{_URL_END})?)(?:\W|$)",
        _plain,
    ),
    (r"((?:&lt;|<)?[a-zA-Z0-9][^\s\"<>|(){}]*@(?:[^\s\"<>|(){}.]+\.)*[^\s\"<>|(){}\[\].,;:]+(?:&gt;|>)?)", _plain),
    (r"([@\#][a-zA-Z_][a-zA-Z_0-9]*)", _plain),
    (r"(<REDAUX>)(?:[^A-Za-z]|$)", _quotes),
    (r"(<SREDAUX>)", _quotes),
    (r"(\d{1,2}[-/]\d{1,2}[-/]\d{2,4})", _plain),
    (r"([-+]?(?:<NUM>))", _plain),
    (r"([\u207A\u207B\u208A\u208B]?(?:[\u2070¹²³\u2074-\u2079]+|[\u2080-\u2089]+))", _plain),
    (r"((?:\d{1,4}[- \u00A0])?\d{1,4}(?:\\?/|\u2044)\d{1,4})", _spaced),
    (r"([\u00BC-\u00BE\u2153-\u215E])", _spelt),
    (
        r"((?i:-[rl][rcs]b-|c\.d\.s|pro-|anti-|s(?:&|&amp;)p-500|s(?:&|&amp;)ls)|(?i:cap)<APOS>(?i:n)|(?i:c)<APOS>(?i:est))",
        _amp,
    ),
    (r"((?i:e|yahoo|jeopardy)!)", _plain),
    (r"([A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2})", _plain),
    (r"([A-Z]*\$|\#)", _plain),
    (r"([¢£¤¥\u0080\u20A0€\u060B\u0E3F\u20A4\uFFE0\uFFE1\uFFE5\uFFE6])", _spelt),
    (r"([A-Za-z])\.<SENTEND>", _plain),  # a lone letter before a new sentence: the period ends the sentence
    (r"((?:<ABBREV>)\.)", _plain),
    (r"((?i:ca|figs?|prop|nos?|art|bldg|pp|op)\.)<GAP>?\d", _plain),
    (r"(<APOS>\d\d)<GAP>", _quotes),
    (r"((?:<ALNUM>)+(?:[-._/](?:<ALNUM>)+)*\.<EXTENSION>)(?:<GAP>|[.?!,])", _plain),
    (r"(<PHONE>)", _spaced),
    (r"(<<|>>)", _plain),
    (r"([<>]|(?i:&[lg]t;))", _spelt),
    (r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z]", _spaced),
    (r"([-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\))", _spaced),
    (r"([()\[\]{}])", _spelt),
    (r"(-+)", _dashes),
    (r"(\.{3,5}|(?:\.[ \u00A0]){2,4}\.|\u2026)", _to("...")),
    (r"(@+|\#+|_+|\*+|(?:\\\*){1,3})", _plain),
    (r"([,;:\u3001])", _plain),
    (r"([?!]+)", _plain),
    (r"([.¡¿\u037E\u0589\u061F\u06D4\u0700-\u0702\u07FA\u3002])", _plain),
    (r"(=+|/)", _plain),
    (r"([A-Za-z0-9][A-Za-z0-9.,\u00AD]*(?:-(?:[A-Za-z0-9\u00AD]+|(?:<ACRO>)\.))+)[^a-zA-Z0-9.+]", _plain),
    (
        r"(<APOS>(?i:n)<APOS>|<APOS>(?i:n|em|till?|cause|[2-9]0s)|[lLdDjJ]<APOS>|(?i:dunkin|somethin|ol)<APOS>"
        r"|[A-HJ-XZn]<APOSETC><LETTER>{2,}|<LETTER>+[aeiouyAEIOUY]<APOSETC>[aeiouA-Z]<LETTER>*"
        r"|(?i:cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l))",
        _quotes,
    ),
    (r"((?i:y)<APOS>)<LETTER>", _quotes),
    (r"((?:<ELIDED>)?(?:<ALNUM>)+(?:<HYPHEN>(?:<ELIDED>)?(?:<ALNUM>)+)*)", _quotes),
    (r"([A-Z]+(?:(?:[+&]|<AMP>)[A-Z]+)+)", _amp),
    (r"(')[A-Za-z][^ \t\r\n\u00A0]", _quotes),
    (r"(<REDAUX>)", _quotes),
    (r"(''|<APOS>|[`\u2018\u2019\u201A-\u201F\u0091-\u0094\u2039\u203A«»]{1,2})", _quotes),
    (r"(\"|(?i:&quot;))", _quotes),
    (r"(<SYMBOL>)", _plain),
)
