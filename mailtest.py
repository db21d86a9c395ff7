#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""mailtest: a mail catcher for tests.  One file, standard library only.

    python mailtest.py --smtp 2525 --http 8080      run it
    python -m pytest                                test it

Point the application under test at the SMTP port, then ask the HTTP port what
it sent: as a temporary inbox (GET /v1/acquire, GET /v1/get/<address>), or as
Mailosaur's Messages API (GET /api/messages) through Mailosaur's own client
libraries.  In a Python test:

    with mailtest.Mailtest() as server:
        inbox = server.acquire()
        ...                                         # send to inbox.address
        mail = inbox.wait(subject="Welcome", timeout=5)

The sections, each of which uses only those above it:

    Limits         every bound, in one NamedTuple
    Messages       octets in, header fields, bodies, links, codes out
    Search         which messages a request means
    Store          inboxes, messages, events: everything that threads share
    SMTP session   commands in, replies out; no sockets
    Network        listening, connections, one thread that waits, others for what may block; TLS
    SMTP server    drives sessions over connections
    HTTP API       requests in, responses out; no sockets
    HTTP server    drives the API over connections
    Mailtest       wires all that; what a Python test holds; the pytest fixtures
    Command line   options, signals, the sendmail stand-in
    Web page       HTML, CSS and JavaScript, as three strings

The way of a mail, from the socket to whoever waits for it:

    Listener._round         waits for sockets; SmtpServer.ready takes a turn with each that spoke
    Session.receive         octets in, replies out: mail data, or the next line, and the next ...
    Session._take_line      finds the Command in COMMANDS and runs it; it may raise Refuse, Drop
    Session._take_data      gathers octets up to the lone dot; Session._finish makes a Message
    Store.deliver           with the lock: numbers it, files it under its inboxes, wakes who waits
    HttpHandler.handle_one_request    in a thread of its own: reads a request into a Request
    answer                  finds the Route in ROUTES, checks access and parameters, runs it
    collect                 waits with Store.messages until enough messages match
    Message.read            the octets once more, as a Mail: what JSON, searches, tests look at
    Inbox.wait              the same collect and Mail, without HTTP

(PYTEST_DONT_REWRITE: there is no assert here for pytest to explain.)
"""

(_PYTHON := (3, 8))  # mailtest needs Python 3.8 or later; an older one shows this line

import argparse
import base64
import binascii
import collections
import contextlib
import datetime
import email.errors
import email.message
import email.parser
import email.utils
import encodings.aliases
import errno
import functools
import html.entities
import http.client
import http.server
import itertools
import json
import math
import os
import queue
import re
import select
import selectors
import signal
import socket
import ssl
import struct
import sys
import threading
import time
import types
import urllib.parse
# Imported where they are used, since a start needs none of them and waits for each:
# email.policy, hmac, logging, secrets, shutil, smtplib, subprocess, tempfile.
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, \
    Tuple, Union

__version__ = "1.1.0"
__all__ = ["Mailtest", "Inbox", "Mail", "NoMail", "Limits"]


LOG_SETTINGS: Dict[str, Any] = {}        # for logging.basicConfig(): the command line has some


def _log(level: str, text: str, arguments: Tuple[Any, ...], trace: bool = False) -> None:
    import logging
    if LOG_SETTINGS:
        logging.basicConfig(**LOG_SETTINGS)          # does nothing the second time
    getattr(logging.getLogger("mailtest"), level)(text, *arguments, exc_info=trace)


def log_error(text: str, *arguments: Any, trace: Any = False) -> None:
    """Logs what went wrong to the logger "mailtest"; with `trace` (an exception, or True for the
    one that is being handled) where it came from."""
    _log("error", text, arguments, trace)


def log_info(text: str, *arguments: Any) -> None:
    """Logs what happened, for whoever asked to see it (--log)."""
    _log("info", text, arguments)


# ---- Limits ----------------------------------------------------------------
# Every bound of the program, with its unit and where the number comes from.
# A bound that is met refuses what is new; it never drops what was accepted.

class Limits(NamedTuple):
    """Every bound, in octets, seconds or a count, as the comment says."""

    # Mail
    max_size: int = 25_000_000        # octets of a message; EHLO's SIZE announces it
    max_memory: int = 512_000_000     # octets of all messages, with what they cost beside
    ttl: float = 600.0                # seconds that an inbox lives (seed: 10 minutes)
    recipients: int = 1_000           # of one transaction; RFC 5321 4.5.3.1.8: at least 100
    inboxes: int = 100_000            # at once
    message_cost: int = 1_200         # octets that a message costs beside its own, measured
    inbox_cost: int = 1_000           # octets that an inbox costs, measured
    place_cost: int = 100             # octets that a message costs in each of its inboxes
    expired_kept: int = 1_000         # addresses whose end is remembered, to say when it was
    keep: int = 0                     # newest mails that are kept while older ones end; 0: all
    inbox_messages: int = 0           # of one inbox, then 452; 0: no bound but max_memory
    inbox_octets: int = 0             # of one inbox, with what its mails cost beside
    client_octets: int = 0            # of all mails that came from one client address
    failures: int = 20                # scripted for one inbox
    watches: int = 1_000              # calls that are awaited

    # SMTP
    command_line: int = 1_065         # octets with CRLF: 512 (RFC 5321 4.5.3.1.4), 26 for SIZE,
                                      # 17 for BODY, 10 for SMTPUTF8, 500 for AUTH (their RFCs)
    auth_line: int = 12_288           # octets with CRLF (RFC 4954 4)
    bad_commands: int = 1_000         # in one session, then 421
    smtp_timeout: float = 300.0       # seconds without a word (RFC 5321 4.5.3.2.7)
    reserve_step: int = 65_536        # octets of unfinished mail data that are counted at a time
    transcript_lines: int = 200       # lines kept of a transaction, or between two
    transcript_line: int = 300        # octets kept of each
    sessions: int = 100               # finished sessions that are remembered
    script_delay: float = 60.0        # seconds that a scripted failure may wait

    # HTTP
    http_head: int = 65_536           # octets of request line and header fields
    http_fields: int = 200            # header fields
    http_target: int = 16_384         # octets of the request target
    http_body: int = 2_000_000        # octets of a request body; creating a mail may send more
    http_idle: float = 30.0           # seconds of silence on a connection
    http_head_time: float = 30.0      # seconds for a whole request head
    http_body_time: float = 120.0     # seconds for a whole request body
    http_rate: int = 20_000           # octets a second that a client has to read, after http_idle
    poll: float = 60.0                # seconds that a request may wait for mail
    hold: float = 0.5                 # seconds that a polling search is held (below 10: Cypress)
    repoll: float = 0.25              # seconds after which the same search is a new one
    polls: int = 1_000                # searches remembered to tell polling clients
    waiters: int = 500                # requests that wait at once; more get 503
    followers: int = 50               # event streams at once; each mail wakes them all
    sending: int = 250_000_000        # octets of large answers that are under way at once
    events: int = 2_000               # kept, for those who follow them
    rate: int = 0                     # requests a minute and client to the Mailtest service
    rate_clients: int = 10_000        # client addresses whose requests are counted
    devices: int = 1_000
    servers: int = 1_000

    # Network
    connections: int = 1_000          # at once, for each port
    connections_per_client: int = 600 # of one client address
    backlog: int = 1_024              # connections the system queues; 5 cost seconds
    stop_time: float = 3.0            # seconds that a stop waits for mail data to end

    # Following mail
    webhook_tries: int = 8            # POSTs of one message
    webhook_pause: float = 0.5        # seconds after the first failure; doubles to 30
    webhook_time: float = 10.0        # seconds of one POST, with its answer


def _seen(text: str) -> str:
    """What a client sent, short enough to be quoted in an answer."""
    return ascii(text if len(text) <= 60 else text[:57] + "...")


# ---- Messages --------------------------------------------------------------
# Octets in, values out: header fields, addresses, bodies, links, images, codes and attachments of
# one mail. Nothing here raises, whatever the octets, and nothing takes more than linear time.
# Beyond a bound reading stops, and the mail's `warnings` say so, as they say all that is wrong
# with it; its octets are kept.

class Address(NamedTuple):
    """One mailbox of a header field. `name` may be "", `email` is "" where it is only a name."""

    name: str
    email: str


class Link(NamedTuple):
    """`text` is what a reader sees, None where there is nothing to see (an image, say)."""

    href: str
    text: Optional[str]


class Image(NamedTuple):
    """An image of an HTML body; `alt` is None where there is no such attribute."""

    src: str
    alt: Optional[str]


class Attachment(NamedTuple):
    """A leaf of the MIME tree that is no body, decoded."""

    file_name: str                # "" where the mail gives none
    content_type: str             # "type/subtype", lower case
    content_id: Optional[str]     # without <>
    octets: bytes


class Body(NamedTuple):
    """One of a mail's two bodies; `body` is None where the mail has none of that kind."""

    body: Optional[str] = None
    links: Tuple[Link, ...] = ()
    codes: Tuple[str, ...] = ()
    images: Tuple[Image, ...] = ()
    code: str = ""               # the surest of the codes


MAX_WARNINGS = 40


class _Warnings(Dict[str, None]):
    """Warnings in order, each once, and no more than the bound."""

    def add(self, text: str) -> None:
        """Adds a warning, once."""
        if len(self) < MAX_WARNINGS:
            self[text] = None

    def cut(self, value: Any, most: int, what: str) -> Any:
        """The first `most` items of a value; warns if there are more."""
        if len(value) > most:
            self.add(f"more than {most} {what}: the rest was not read")
        return value[:most]


# Octets to text

# Charset labels that Python does not know: those of the WHATWG Encoding standard, and what mail
# has. They are without "x-" and what is no letter or digit; "" is the codec of what says nothing.
_LABELS = {
    "": "unknown default 8bit unknown8bit binary none",
    "utf_8": "unicode11utf8 unicode20utf8 utf8mb4", "utf_7": "unicode11utf7",
    "utf_16": "unicode unicodefeff csunicode ucs2 iso10646ucs2", "utf_16_be": "unicodefffe",
    "iso8859_6": "csiso88596e csiso88596i iso88596e iso88596i", "iso8859_7": "suneugreek",
    "iso8859_8": "csiso88598e csiso88598i iso88598e iso88598i logical visual",
    "iso8859_15": "csisolatin9", "cp1252": "ansi ansix31101983", "cp874": "cp874",
    "koi8_r": "koi koi8", "koi8_u": "koi8u koi8ru", "mac_cyrillic": "macukrainian",
    "mac_roman": "mac csmacintosh", "gb2312": "csgb2312 gb231280", "big5": "cnbig5",
    "euc_jp": "cseucpkdfmtjapanese", "iso2022_jp": "cp50220 cp50221", "shift_jis": "cp31j 31j",
    "euc_kr": "cseuckr csksc56011987 isoir149 ksc56011989", "user": "userdefined",
    "cp720": "cp720", "cp737": "cp737", "cp856": "cp856", "cp875": "cp875", "cp1006": "cp1006",
}
# An unknown name would be looked for as a module on the disk and remembered for ever, once for
# each name that a hostile mail makes up. Those taken out are no charsets, or take quadratic time.
_NO_CHARSETS = frozenset((
    "base64_codec", "bz2_codec", "hex_codec", "idna", "mbcs", "oem", "punycode", "quopri_codec",
    "raw_unicode_escape", "rot_13", "undefined", "unicode_escape", "uu_codec", "zlib_codec"))
# What senders of these charsets write in fact (as in the WHATWG Encoding standard).
_LARGER = {"latin_1": "cp1252", "iso8859_9": "cp1254", "iso8859_11": "cp874", "tis_620": "cp874",
           "gb2312": "gb18030", "gbk": "gb18030", "big5": "cp950", "shift_jis": "cp932",
           "iso2022_jp": "iso2022_jp_ext", "euc_kr": "cp949"}
_CODECS = {label.replace("_", ""): _LARGER.get(codec, codec)
           for alias, codec in encodings.aliases.aliases.items() if codec not in _NO_CHARSETS
           for label in (alias, codec)}
_CODECS.update((label, _LARGER.get(codec, codec))
               for codec, labels in _LABELS.items() for label in labels.split())


def charset_codec(label: str) -> Optional[str]:
    """Python's codec for a charset label, "" for a label that says nothing, None: unknown."""
    name = re.sub(r"[^a-z0-9]+", "", label[:60].lower())
    name = re.sub(r"^(?:charset)?x*(?:(?:windows|win|dos|cp|ibm)(?=[0-9]))?", "", name)
    return _CODECS.get("cp" + name if name.isdigit() else name, None if name else "")


# What browsers read differently from Python: octets, and characters of larger charsets (in
# gb18030 those of its edition of 2005).
_BROWSER_OCTETS = {"cp1255": {0xCA: "\u05ba"}, "koi8_u": {0xAE: "\u045e", 0xBE: "\u040e"}}
_JIS = str.maketrans("\u301c\u2016\u2212\xa2\xa3\xac", "\uff5e\u2225\uff0d\uffe0\uffe1\uffe2")
_BROWSER_CHARACTERS = {"iso2022_jp_ext": _JIS, "euc_jp": _JIS, "gb18030": str.maketrans(
    "\ue5e5\ue78d\ue78e\ue78f\ue790\ue791\ue792\ue793\ue794\ue795\ue796\ue7c7",
    "\u3000\ufe10\ufe12\ufe11\ufe13\ufe14\ufe15\ufe16\ufe17\ufe18\ufe19\u1e3f")}


@functools.lru_cache(maxsize=None)
def _single_octets(codec: str) -> str:
    """The character of each octet in some codecs, as in every browser: what they leave undefined
    below A0 is a control character."""
    if codec == "user":                  # x-user-defined
        return "".join(chr(code + 0xF700 * (code > 0x7F)) for code in range(256))
    characters = [bytes((code,)).decode(codec, "replace") for code in range(256)]
    for code in range(0x80, 0xA0):
        characters[code] = characters[code].replace("\ufffd", chr(code))
    for code, character in _BROWSER_OCTETS.get(codec, {}).items():
        characters[code] = character
    return "".join(characters)


def decode_octets(octets: bytes) -> str:
    """Octets of unknown charset as text: UTF-8 if they are, else cp1252."""
    try:
        return octets.decode("utf-8")
    except UnicodeDecodeError:
        return octets.decode("latin-1").translate(_single_octets("cp1252"))


_JIS_RUN = re.compile(rb"\x1b\$(?:[@B]|\(B)([^\x1b]*)|\x1b\(I([^\x1b]*)|\x1b\([BHJ]")
_JIS_PAIR = re.compile(rb"[!-~]{2}")
_EUC_PAIR = re.compile(rb"[\xa1-\xfe]{2}|\x8e([\xa1-\xdf])")


def _shift_pair(match) -> bytes:
    row, cell = (octet & 0x7F for octet in match[0])
    return bytes(((row - 0x21 >> 1) + (0x81 if row < 0x5F else 0xC1),
                  cell + (0x1F + (cell >= 0x60) if row & 1 else 0x7E)))


def _in_larger_codec(octets: bytes, codec: str) -> Tuple[bytes, str]:
    """The same text for a codec with more characters: ISO-2022-JP and EUC-JP as Shift_JIS, since
    Python has those that NEC and IBM added in cp932 alone."""
    if codec == "iso2022_jp_ext":
        return _JIS_RUN.sub(lambda run: (
            bytes(octet | 0x80 if octet > 0x20 else octet for octet in run[2] or b"")
            if run[1] is None else _JIS_PAIR.sub(_shift_pair, run[1])), octets), "cp932"
    if codec == "euc_jp" and _EUC_PAIR.sub(b"", octets).isascii():
        return _EUC_PAIR.sub(lambda match: match[1] or _shift_pair(match), octets), "cp932"
    return octets, "big5hkscs" if codec == "cp950" else codec


def decode_charset(octets: bytes, label: str) -> Tuple[str, str]:
    """(text, problem) of octets said to be in the charset `label`; "" is no problem.

    Never a lone surrogate: the text is always valid UTF-8 once encoded.
    """
    codec = charset_codec(label) if label else ""
    if codec is None:
        return decode_octets(octets), f"names the unknown charset {label[:60]!r}"
    if codec in ("", "ascii"):
        lies = codec and not octets.isascii()
        return decode_octets(octets), "says charset us-ascii but holds 8-bit octets" * bool(lies)
    try:
        if codec[:5] in ("cp125", "cp874", "koi8_", "user"):
            text = octets.decode("latin-1").translate(_single_octets(codec))
        else:
            text = octets.decode(codec)
    except UnicodeError:
        octets, codec = _in_larger_codec(octets, codec)
        text = octets.decode(codec, "replace")
    if codec in _BROWSER_CHARACTERS:
        text = text.translate(_BROWSER_CHARACTERS[codec])
    elif codec != "utf_8":    # utf-7 can spell half a surrogate pair
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    wrong = "\ufffd" in text and codec != "cp1252"
    return text, f"says charset {label[:60]} but is not valid in it" if wrong else ""


# Transfer encodings

_NOT_BASE64 = bytes(set(range(256)) - set(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="))


def decode_base64(octets: bytes) -> bytes:
    """What base64 stands for: "=" ends a run, junk is skipped, padding may miss (RFC 2045 6.8).

    `binascii` alone stops at the first "=" (351 kB of joined base64 became 251 kB) and refuses
    what lacks its padding.
    """
    pieces = []
    for run in octets.translate(None, _NOT_BASE64).split(b"="):
        if len(run) % 4 == 1:       # six bits of nothing
            run = run[:-1]
        if run:
            pieces.append(binascii.a2b_base64(run + b"=" * (-len(run) % 4)))
    return b"".join(pieces)


# For `binascii` "=" and blanks at the end of a line is no soft break (RFC 2045 6.7, rule 3), and
# one with a bare CR swallows the next line.
_SOFT_BREAK = re.compile(rb"=(?:[ \t]+\r?\n|[ \t]*\r(?!\n))")


def decode_quoted_printable(octets: bytes) -> bytes:
    """What quoted-printable stands for (RFC 2045 6.7), blanks after a soft break too."""
    return binascii.a2b_qp(_SOFT_BREAK.sub(b"=\n", octets))


def decode_uuencode(octets: bytes) -> bytes:
    """The file between `begin` and `end`; a line that is not uuencode is skipped."""
    found = re.search(rb"^begin [0-7]{3,4} [^\r\n]*\r?\n", octets, re.MULTILINE)
    pieces = []
    for line in octets[found.end() if found else 0:].splitlines():
        if line.rstrip() == b"end":
            break
        if line:    # some encoders write more than the line's count says
            with contextlib.suppress(binascii.Error):
                pieces.append(binascii.a2b_uu(line[:1 + ((line[0] - 32 & 63) + 2) // 3 * 4]))
    return b"".join(pieces)


_DECODERS = {
    "base64": decode_base64, "quoted-printable": decode_quoted_printable,
    "quotedprintable": decode_quoted_printable, "uuencode": decode_uuencode,
    "x-uuencode": decode_uuencode, "x-uue": decode_uuencode, "uue": decode_uuencode,
    "7bit": bytes, "8bit": bytes, "binary": bytes, "": bytes,
}
_BAD_QUOTED = re.compile(rb"=(?![0-9A-Fa-f]{2}|[ \t]*\r?\n|[ \t]*\Z)")


def _damage(octets: bytes, encoding: str) -> str:
    """What is wrong with encoded content, "" if nothing is."""
    if encoding.startswith("quoted") and not octets.isascii():
        return "broken quoted-printable (8-bit octets in it)"
    if encoding.startswith("quoted") and _BAD_QUOTED.search(octets):
        return "broken quoted-printable"
    if encoding == "base64":
        solid = octets.translate(None, b" \t\r\n")
        symbols = solid.translate(None, _NOT_BASE64)
        if len(symbols) < len(solid):
            return "broken base64 (other characters in it)"
        if len(symbols) % 4:
            return "broken base64 (cut off)"
    return ""


# Header fields

# RFC 2047, and what mail makes of it: words inside words' neighbours, "?" in Q text, a language.
_ENCODED_WORD = re.compile(
    r"=\?([^?\s*]{1,60})(?:\*[^?\s]{0,40})?\?"
    r"(?:[bB]\?([^?]*)|[qQ]\?([^?=]*(?:(?:=(?!\?[^=])|\?(?!=))[^?=]*)*))\?=")
_CONTROL = re.compile(r"[\x00-\x08\n-\x1f\x7f\x85\u2028\u2029]+")     # six octets of JSON each


def decode_words(value: str) -> str:
    """A field's value as a reader sees it: one line, its encoded words (RFC 2047) decoded.

    Words of one charset are joined before decoding: one character may be split over two of them.
    """
    if "=?" in value:
        pieces: List[Tuple[str, bytes]] = []     # (charset, octets)
        run: List[bytes] = []                    # of words that follow each other
        charset, end = "", 0
        for match in _ENCODED_WORD.finditer(value):
            gap = value[end:match.start()]
            apart = bool(gap.strip()) or not end
            if apart or match[1].lower() != charset:
                pieces.append((charset, b"".join(run)))
                run = []
            if apart:
                pieces.append(("utf-8", gap.encode("utf-8", "replace")))
            charset, end = match[1].lower(), match.end()
            run.append(binascii.a2b_qp(match[3].encode("utf-8"), header=True)
                       if match[2] is None else decode_base64(match[2].encode("ascii", "replace")))
        pieces += (charset, b"".join(run)), ("utf-8", value[end:].encode("utf-8", "replace"))
        value = "".join(decode_charset(octets, label)[0] for label, octets in pieces if octets)
    return value if value.isprintable() else _CONTROL.sub(" ", value).strip()


# Addresses

# Own code, because `email.utils.getaddresses` loses the name of `a@b (Name)` and, since 3.13,
# all of `a@b, c@d,`, and `policy.default` needs minutes for 190 kB of commas.
MAX_ADDRESSES = 10_000       # of one kind (To, Cc ...); Exchange allows 5,000
_ADDRESS_TOKEN = re.compile(
    r'=\?[^?\s]{1,60}\?[bBqQ]\?[^?]{0,2000}\?='      # an encoded word
    r'|"(?:[^"\\]|\\.)*"'                            # a quoted string; an address, ">" may miss:
    r'|<(?:@[^<>:]*:)?(?:"(?:[^"\\]|\\.)*"|\\.|\([^()]*\)|[^<>,;"\\()])*>?'
    r"|[^\s\"(),:;<>\\@]+|\s+|\\.|.", re.DOTALL)
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_QUOTED_PAIR = re.compile(r"\\(.)", re.DOTALL)
_COMMENT = re.compile(r"\([^()]*\)")


def _unquoted(text: str) -> str:
    if "\\" not in text:
        return text.replace('"', "")
    return _QUOTED.sub(lambda match: _QUOTED_PAIR.sub(r"\1", match[1]), text)


def _mailbox(name: str, comment: str, angle: str, has_at: bool) -> Address:
    """The mailbox that words, comments and <...> ("": there is none) make."""
    box = angle.strip("<>")
    if has_at and not angle:             # `Ann a@b`, `a@b (Ann)`, `a @ b`, `"a b"@c`
        local, _, domain = name.rpartition("@")
        name, blank, last = local.rstrip().rpartition(" ")
        if not blank or last[-1:] in '".':
            name, last = "", local
        else:
            domain = domain.strip().partition(" ")[0]
        box = last + "@" + domain
    elif not angle and " " not in name:  # `root`
        name, box = "", _unquoted(name)
    name = decode_words(_unquoted(name.strip() or comment.strip()))
    if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"":
        name = name[1:-1].strip()
    if box[:1] == "@" and ":" in box:    # an obsolete route, RFC 5322 4.4
        box = box.rpartition(":")[2]
    if '"' not in box:
        box = "".join(_COMMENT.sub("", box).split())
    return Address(name, decode_words(box))


def read_addresses(value: str) -> List[Address]:
    """The mailboxes of one address field: groups opened, comments as names, in order. Wrong
    syntax costs a name, never the list."""
    found: List[Address] = []
    words: List[str] = []                # of the mailbox that is being read
    comment: List[str] = []
    angle, depth, has_at = "", 0, False  # <...>; comments in comments; an "@" among the words
    for token in [*_ADDRESS_TOKEN.findall(value), ""]:
        first = token[:1]
        if first == "(" or token and depth:
            outer, depth = depth, depth + (first == "(") - (first == ")")
            comment.append(token if outer and depth else " ")
        elif first not in ',;:<>")\\' or first == '"' and len(token) > 1:
            words.append(" " if first.isspace() else token)
            has_at = has_at or first == "@"
        elif first == "<":
            angle = angle if len(angle) > 2 else token
        elif first in ",;":              # "" at the end
            phrase = "".join(words).strip()
            if not (has_at or angle) and "=?" in phrase and "@" in decode_words(phrase):
                found.extend(read_addresses(decode_words(phrase).replace("=?", "= ?")))
            elif phrase or angle:
                found.append(_mailbox(phrase, "".join(comment), angle, has_at))
            words, comment, angle, has_at = [], [], "", False
            if len(found) > MAX_ADDRESSES:
                break
        elif first == ":" and not (has_at or angle):
            words, comment = [], []      # the name of a group, RFC 5322 3.4
    return [address for address in found if any(address)]


def address_key(address: str) -> str:
    """What is equal for two spellings of one address: lower case, the domain as in DNS (xn--)."""
    address = address.lower()
    local, at, domain = address.rpartition("@")
    if not address.isascii() and len(domain) <= 255:     # the codec takes quadratic time
        with contextlib.suppress(UnicodeError):          # no name of DNS
            return local + at + domain.encode("idna").decode("ascii")
    return address


def hidden_recipients(paths: Iterable[str], named: Iterable[Address]) -> Tuple[Address, ...]:
    """The envelope's recipients that no header field names: blind copies."""
    keys = {address_key(address.email) for address in named}
    return tuple(Address("", path) for path in dict.fromkeys(paths)
                 if address_key(path) not in keys)


# Header blocks

MAX_HEADER = 1_000_000       # octets of a header block; Postfix cuts at 102,400
MAX_FIELDS = 2_000           # of a header block; Gmail's own mails have about 60
MAX_FIELD = 262_144          # characters of a field: room for 10,000 addresses
# What `email.parser` would end the block at: a line that is no field, with what folds it; blanks
# between a name and its colon, which RFC 5322 4.5 allows.
_NO_FIELD = re.compile(r"^(?![ \t]|[!-9;-~]+[ \t]*:).*(?:\n[ \t].*)*\n?", re.MULTILINE)
_BLANK_BEFORE_COLON = re.compile(r"^([!-9;-~]+)[ \t]+:", re.MULTILINE)


class Header:
    """The fields of a header block: `fields` has them in order, unfolded but not decoded, `first`
    the first of each name in lower case. A line that is no field is skipped."""

    def __init__(self, block: bytes, warnings: Optional[_Warnings] = None):
        self.warnings = _Warnings() if warnings is None else warnings
        block = self.warnings.cut(block, MAX_HEADER, "octets in a header block")
        try:
            text = block.decode("utf-8")
        except UnicodeDecodeError:
            text = "\n".join(map(decode_octets, block.split(b"\n")))
        text = text.replace("\r\n", "\n").replace("\r", "\n").lstrip(" \t\n")
        text = _BLANK_BEFORE_COLON.sub(r"\1:", _NO_FIELD.sub("", text))
        found = email.parser.Parser().parsestr(text, headersonly=True).items()
        self.fields = [(name, self._unfolded(name, value)) for name, value in self.warnings.cut(
            found, MAX_FIELDS, "header fields")]
        self.first = {name.lower(): value for name, value in reversed(self.fields)}

    def _unfolded(self, name: str, value: str) -> str:
        value = self.warnings.cut(value, MAX_FIELD, f"characters in header field {name[:60]}")
        if "\n" in value:
            value = " ".join(line.strip(" \t") for line in value.split("\n"))
        return value.strip()

    def text(self, name: str) -> str:
        """The first field of that name as a reader sees it, "" where there is none."""
        return decode_words(self.first.get(name, ""))

    def addresses(self, name: str) -> Tuple[Address, ...]:
        """The mailboxes of all fields of that name; of several From fields the first counts."""
        found: List[Address] = []
        for field, value in self.fields if name in self.first else ():
            if field.lower() == name and not (name == "from" and found):
                found.extend(read_addresses(value))
        return tuple(self.warnings.cut(found, MAX_ADDRESSES, f"addresses in {name.title()}"))


# Parameters

MAX_PARAMETERS = 500         # of one Content-Type or Content-Disposition
_PARAMETER = re.compile(     # some forget the ";" before it
    r'(?<=[\s;,"])([^\s=;,"*]{1,100})(?:\*([0-9]{1,4}))?(\*)?\s*=\s*'
    r'(?:"((?:[^"\\]|\\.)*)(?:"|$)|([^;]*))', re.DOTALL)


def _joined(numbered: Dict[int, Tuple[str, str]]) -> str:
    """The value of a parameter that came as `name*=` (-1) or as `name*0*=`, `name*1=` ..."""
    charset, pieces = "", []
    for index in sorted(numbered) if -1 not in numbered else (-1,):
        encoded, text = numbered[index]
        if encoded and not charset and text.count("'") >= 2:
            charset, _, text = text.split("'", 2)
        pieces.append(urllib.parse.unquote_to_bytes(text) if encoded else text.encode("utf-8"))
    return decode_charset(b"".join(pieces), charset)[0]


def read_parameters(value: str, warnings: _Warnings) -> Tuple[str, Dict[str, str]]:
    """(main value, parameters) of a Content-Type or Content-Disposition, RFC 2231 undone.

    Names are lower case. `name*=` wins over `name*0=`, that over `name=`; of two alike the first.
    """
    main = re.match(r"[^\s;,]*", value)[0]
    if "=" in main:          # it is missing
        main = ""
    plain: Dict[str, str] = {}
    sections: Dict[str, Dict[int, Tuple[str, str]]] = {}
    for name, number, encoded, quoted, token in warnings.cut(
            [match.groups() for match in _PARAMETER.finditer(";" + value[len(main):])],
            MAX_PARAMETERS, "parameters in a header field"):
        name = name.lower()
        if quoted is not None:
            text = _QUOTED_PAIR.sub(r"\1", quoted)
        else:                # brackets in a name are no comment
            text = (token if name in ("name", "filename") else _COMMENT.sub("", token)).strip()
        if number or encoded:                    # `name*=` is section -1: alone and first
            sections.setdefault(name, {}).setdefault(int(number or -1), (encoded, text))
        else:
            plain.setdefault(name, text)
    for name, numbered in sections.items():
        plain[name] = _joined(numbered) or plain.get(name, "")
    return main.strip('"'), plain


# Structure

MAX_PARTS = 1_000            # leaves and multiparts together; postal-mime has no bound
MAX_NESTING = 200            # multiparts in multiparts; Postfix stops at 100
MAX_PART_HEADER = 65_536     # octets of a part's header block
MAX_FILE_NAME = 1_000        # characters; file systems allow 255
_TYPE = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+(?:/[!#$%&'*+.^_`|~0-9A-Za-z-]+)?")
_BLANK_LINE = re.compile(rb"\n\r{0,3}\n|\r\r(?!\r{0,3}\n)")
_DASHES = re.compile(rb"[\r\n]--([^\r\n]{0,1024})[^\r\n]*")
_FLOWED_BREAK = re.compile("(?<!^--) \n", re.M)         # RFC 3676 4.1; "-- " begins a signature
_NO_HTML = re.compile(r"[\x00-\x08\x0b\x0e-\x1f]")
_META_CHARSET = re.compile(rb"<meta[^>]{1,200}charset\s{0,9}=\s{0,9}[\"']?([\w.:-]{2,40})", re.I)


class Part:
    """A part of the MIME tree: what its header says of it, and its octets as they are encoded."""

    def __init__(self, header: Header, default: str = "text/plain"):
        first, self.warnings = header.first, header.warnings
        main, parameters = read_parameters(first.get("content-type", default), self.warnings)
        match = _TYPE.match(main)
        self.type = match[0].lower() if match else ""
        if "/" not in self.type:
            self.warnings.add(f"Content-Type {main[:60]!r} is no type/subtype")
        if self.type in ("", "text"):            # RFC 2045 5.2
            self.type = "text/plain"
        disposition, named = read_parameters(first.get("content-disposition", ""), self.warnings)
        self.disposition = disposition.lower()
        self.file_name = decode_words(named.get("filename") or named.get("name")
                                      or parameters.get("name", ""))[:MAX_FILE_NAME]
        self.is_named = "name" in parameters     # a file, even if it is shown inline
        self.id = first.get("content-id", "").strip("<> \t") or None
        self.charset = parameters.get("charset", "")
        self.boundary = parameters.get("boundary", "").rstrip().encode("utf-8", "replace")
        self.joins = parameters.get("delsp", "").lower() == "yes"            # RFC 3676 4.1
        encoding = _COMMENT.sub("", first.get("content-transfer-encoding", "")).partition(";")[0]
        self.encoding = encoding.strip(" \t\"'").lower()
        if self.encoding not in _DECODERS:
            self.warnings.add(f"unknown Content-Transfer-Encoding {self.encoding[:60]!r}: "
                              "taken as it is")
        self.octets = b""
        self.parent = ""                         # type of the multipart around it
        self.first = True                        # of the parts there
        self.count = 0                           # of parts in it

    def decoded(self) -> bytes:
        """What its octets stand for."""
        return _DECODERS.get(self.encoding, bytes)(self.octets)

    def is_body(self) -> bool:
        """Whether a leaf is shown as a body, after RFC 8621 4.1.4: text that is not said to be an
        attachment (RFC 2183 2.8: any word but "inline" says so); beside the first part not what
        has a name, and in multipart/related HTML alone, which its start parameter may put behind
        images."""
        if self.type not in ("text/plain", "text/html") or self.disposition not in ("", "inline"):
            return False
        if self.first or self.parent == "multipart/alternative":
            return True
        return not self.is_named and (self.parent != "multipart/related" or (
            self.type == "text/html" and not self.disposition))

    def text(self) -> str:
        """A text part as text, its line ends as \\n."""
        octets = self.decoded()
        text, problem = decode_charset(octets, self.charset)
        if not self.charset and not octets.isascii():
            problem = "has 8-bit text without a charset"
            meta = self.type == "text/html" and _META_CHARSET.search(octets, 0, 2048)
            if meta:
                problem = ""
                if text != octets.decode("utf-8", "replace"):
                    text, problem = decode_charset(octets, meta[1].decode("ascii", "replace"))
        damage = _damage(self.octets, self.encoding)
        if self.encoding in ("", "7bit") and not octets.isascii():
            damage = "8-bit, but its Content-Transfer-Encoding says 7bit"
        for wrong in filter(None, (problem, damage and "is " + damage)):
            self.warnings.add(f"{self.type} part {wrong}")
        text = text[1:] if text.startswith("\ufeff") else text
        kept = (_NO_HTML.sub("\ufffd", text) if self.type == "text/html" else
                text.replace("\0", "\ufffd"))   # JSON has six octets for each
        if kept != text:
            what = "NUL octets" if "\0" in text else "control characters"
            self.warnings.add(f"{self.type} part has {what}")
            text = kept
        if "\r" in text:     # CR CR LF: quoted-printable made of CRLF twice, as Ruby's mail does
            text = text.replace("\r\r\n", "\n").replace("\r\n", "\n").replace("\r", "\n")
        return _FLOWED_BREAK.sub("", text) if self.joins else text

    def attachment(self) -> Attachment:
        """A leaf that is no body."""
        damage = _damage(self.octets, self.encoding)
        if damage:
            self.warnings.add(f"attachment {(self.file_name or self.type)[:60]}: {damage}")
        return Attachment(self.file_name, self.type, self.id, self.decoded())


def split_mail(octets: bytes) -> Tuple[bytes, int]:
    """(header block, where the body begins) of a mail: an empty line parts them."""
    start = 0
    if octets.startswith((b"From ", b">From ")):
        start = octets.find(b"\n") + 1           # an mbox's separator line
    blank = re.compile(rb"\r{0,3}\n").match(octets, start) or _BLANK_LINE.search(octets, start)
    return (octets[start:blank.start()], blank.end()) if blank else (octets[start:], len(octets))


class _Tree:
    """The multiparts of a mail that are open at one place, from the outside in."""

    def __init__(self):
        self.open: List[Part] = []
        self.levels: Dict[bytes, int] = {}       # boundary: index into `open`

    def add(self, part: Part) -> Optional[Part]:
        """Opens a multipart; returns what is a leaf, or must be taken for one."""
        if not part.type.startswith("multipart/"):
            return part
        if part.boundary and len(self.open) < MAX_NESTING:
            self.levels[part.boundary] = len(self.open)
            self.open.append(part)
            return None
        reason = f"nested over {MAX_NESTING} deep" if part.boundary else "without a boundary"
        part.warnings.add(f"{part.type[:60]} {reason}: its parts were not read")
        return part if part.boundary else None

    def delimiter(self, line: bytes) -> Optional[Tuple[int, bool]]:
        """(index of the multipart, whether this ends it) of a line that begins with "--" and then
        this; None if it is no delimiter."""
        line = line.rstrip(b" \t")
        if line in self.levels:
            return self.levels[line], False
        level = self.levels.get(line[:-2].rstrip(b" \t")) if line.endswith(b"--") else None
        return None if level is None else (level, True)

    def header(self, octets: bytes, start: int) -> Tuple[int, int]:
        """(end of the header block, start of the body) of the part at `start`: up to an empty
        line, or to a delimiter that comes before one."""
        limit = min(len(octets), start + MAX_PART_HEADER)
        end = next((line.start() for line in _DASHES.finditer(octets, start, limit)
                    if self.delimiter(line[1])), limit)
        blank = _BLANK_LINE.search(octets, start, end + 1)
        return blank.span() if blank else (end, min(end + 1, limit))

    def close(self, level: int, is_close: bool) -> None:
        """Ends the multiparts inside one whose delimiter has come; with `is_close` that, too."""
        if level + 1 < len(self.open):
            self.open[0].warnings.add("multipart without its final boundary")
        del self.open[level + (not is_close):]
        self.levels = {part.boundary: index for index, part in enumerate(self.open)}


def leaves(octets: bytes, start: int, root: Part) -> Iterator[Part]:
    """The leaves of a mail's MIME tree in order; a message/* part is a leaf, whatever it holds.

    Own code, because `email.parser` recurses (1,500 multiparts end it), needs four times the mail
    in memory, rewrites message/* parts, and takes 10 to 100 times as long.  Here a line that
    begins with "--" is looked up once among the boundaries of all open multiparts.
    """
    tree, warnings, body, count = _Tree(), root.warnings, start, 0
    leaf = tree.add(root)
    for line in _DASHES.finditer(octets, max(0, start - 1)) if tree.open else ():
        found = tree.delimiter(line[1]) if line.start() >= body - 1 else None
        if not found:
            continue
        if leaf:
            end = line.start()           # the line end there belongs to the delimiter (5.1.1)
            leaf.octets = octets[body:end - (octets[end - 1:end + 1] == b"\r\n")]
            yield leaf
            leaf = None
        tree.close(*found)
        if not tree.open:
            return
        if found[1]:
            continue
        count += 1
        if count > MAX_PARTS:
            warnings.add(f"more than {MAX_PARTS} parts: the rest was not read")
            return
        outer = tree.open[-1]
        end, body = tree.header(octets, line.end())
        part = Part(Header(octets[line.end():end], warnings),
                    "message/rfc822" if outer.type == "multipart/digest" else "text/plain")
        part.parent, part.first = outer.type, not outer.count
        outer.count += 1
        leaf = tree.add(part)
    if leaf:
        leaf.octets = octets[body:]
        yield leaf
    if tree.open:
        warnings.add("multipart without its final boundary")


# Text

MAX_TEXT = 1_000_000          # characters scanned for links
MAX_HTML = 1_000_000          # characters scanned; Gmail clips at 102,400
MAX_LINKS = 5_000             # of one body, and as many images
MAX_URL = 8_192               # characters; IIS and nginx stop at 8 kB
MAX_CODE_TEXT = 100_000       # characters looked through for codes
MAX_CODES = 100               # of one body
MAX_PREVIEW = 200             # characters

_TEXT_LINK = re.compile(
    r"(?<![A-Za-z0-9])(?:https?://|www\.(?=[A-Za-z0-9])|mailto:)"
    r"[^\s<>\"\u00ab\u00bb\u201c-\u201f\u3000-\u303f\uff00-\uff0f\x00-\x1f]{1,%d}" % MAX_URL, re.I)


def _trim_url(url: str, before: str) -> str:
    """A URL without the punctuation of the sentence around it; brackets stay where they pair, and
    "*", "_" and "~" belong to it unless it is set between two of them: tokens end so."""
    surplus = {pair[1]: url.count(pair[1]) - url.count(pair[0]) for pair in ("()", "[]", "{}")}
    end = len(url)
    while end:
        last = url[end - 1]
        if surplus.get(last, 0) > 0:
            surplus[last] -= 1
        elif last not in ".,;:!?'|\u2019\u2026\u060c\u0964\u200b" and not (
                last in "*_~" and last == before):
            break
        end -= 1
    return url[:end]


def find_text_links(text: str) -> Tuple[Link, ...]:
    """The URLs of plain text: http, https, mailto, and bare `www.` names (href with http://)."""
    links: List[Link] = []
    for match in _TEXT_LINK.finditer(text[:MAX_TEXT]):
        url = _trim_url(match.group(), text[match.start() - 1:match.start()])
        if url[-1:] not in ":/" or url.count("/") > 2:
            links.append(Link("http://" + url if url[:4].lower() == "www." else url, url))
        if len(links) >= MAX_LINKS:
            break
    return tuple(links)


# Codes
#
# A code is what a reader is meant to type in somewhere. Three steps find it, the same in every
# language:
#
# 1. Candidates: the tokens that look like a code (`_candidates`).
# 2. The label of each: the words left of it in its sentence; of one alone in its cell, the cell
#    before it or the head of its column; of one alone in its line, the nearest of the lines above
#    that says anything, the line below, the subject of the mail. Only then the words right of it
#    ("482913 is your PIN"). The nearest wins.
# 3. One judgement: what the label means, how near it is, and what the token looks like.
#
# Words are of four kinds. A secret (PIN, password, verification) makes a code of the token, a
# thing (order, customer, postal, error) makes something else of it. "Code" and "number" take
# their meaning from the word beside them: "postal code" is none and "PIN number" is one; without
# such a neighbour "code" speaks for a code and "number" against it.

# Languages, then code | secret | number | thing. A word that several have stands once. One of four
# letters or more may have an ending, but not where a "." follows it, a shorter one only where a
# "-" does; with a "-" before it, it may also end a longer word. "_" is a blank. From Hebrew on in
# Unicode a word is found anywhere: there words have prefixes, or are not set apart.
_WORDS = """
af: | wagwoord | -nommer | bestel faktuur klant- pakket pos-
am: ኮድ | ማረጋገጫ የይለፍ_ቃል | ቁጥር | ትዕዛዝ ደረሰኝ ደንበኛ ፖስታ
ar: رمز كود | التحقق السري كلمة_المرور كلمة_مرور | رقم | طلب عضوية عقد عميل فاتورة
as bn: কোড সংকেত | ওটিপি পাছৱৰ্ড পাসওয়ার্ড পিন যাচাই | নং নম্বর নম্বৰ | অর্ডার অৰ্ডাৰ গ্রাহক
    গ্ৰাহক চালান পোস্ট
az: -kod- | təsdiq şifrə | nömrə | müqavilə müştəri poçt sifariş
be bg mk ru sr uk: | верификац лозинк пацверджанн пин подтвержден потврд потвържд підтвердж
    шифра | broj број- номер нумар № | porudžbin артикул бик дагавор договор заказ замов заявк
    индекс инн клиент кліент клієнт купац накладн нарачк наруџбин ошибк паштов поруџбин поръчк
    посылк почтов поштенск поштов пощенск рахун рачун счет счёт товар трек фактур індекс
bh hi mr ne sa: कूट कोड सङ्केत संकेत | ओटीपी पडताळणी पासवर्ड पिन प्रमाणीकरण संकेतशब्द सत्यापन
    | क्रमांक नं नंबर नम्बर संख्या | अर्डर आदेश आर्डर ऑर्डर ग्राहक चालान टपाल बिल बीजक हुलाक
bs hr sr: kôd- | lozink potvrdni zapork | | kupac narudžb poštansk račun
ca es gl: codi código | clave contrasenya contraseña contrasinal nip | nº núm | artículo
    client cuenta envío pedido referencia reserva seguimiento
cs sk: | hesla heslo overovac ověřovac | čísla číslo | faktur faktúr objednáv poštov psč
    zákazní
cy: chod cod god | cyfrinair côd dilysu gôd | rhif | anfoneb archeb cwsmer
da nb: | adgangskode bekreftelses engangs -passord- | nr -nummer | bestilling ordre-
de lb: -code. -codes. | bestätigungs gutschein -kennwort mtan -passwort -passwuert- pin-
    -schlüssel- tan | | artikel auftrag buchung farb- fehler lieferschein mitglied paket- plz
    rechnung referenz sendung steuer strich- ticket vertrag vorgang zähler
el: κωδικ- | επαλήθευσ συνθηματικ | αρ αριθμ | παραγγελί πελάτ συμβόλαι ταχυδρομικ τιμολόγ
en fil: kowd | 2fa coupon enter gift_card key mfa one-time otp passcode passphrase password
    special_id token totp verif voucher | bilang id no nos num | area article bank bar barcode bic
    booking build case claim color colour contract country customer decode document dress employee
    encode error exit hs http invoice item kostumer meeting naics regon member model order package
    parcel patient pnr policy product qr quote receipt ref reference registration release response
    review rfc serial shipment sku sort source status student swift tax transaction vat version
    zip zipcode
eo: | konfirm pasvort | | mendo poŝt
et: -kood- | kinnitus -parool- | -number- | arve klien leping tellimus
eu: | egiaztapen pasahitz | zenbaki | bezero eskaera
fa: کد | تأیید تایید گذرواژه | شماره | سفارش فاکتور قرارداد مشتری پستی
fi: | -salasana- tunnusluku vahvist | nro -numero- | asiakas- lasku- sopimus- tilau-
fo is: -kota- -kotu- -kóða- -kóði- | loyniorð lykilorð staðfesting | -nummar -númer- |
    bíleggin póst pönt -reikning rokning viðskipta
fr: | bon_cadeau clé mot_de_passe vérification | numéro | commande compte contrat dossier
    erreur expédition livraison produit référence réservation suivi
fy nl: -koade- | bevestigings -wachtwoord- wachtwurd | -nûmer | btw factuur kvk lid-
    referentie telefoon track zending
ga: chód cód gcód | fíorú pasfhocal | uimhir | custaiméir ordú phoist sonrasc teileafón
gu: કોડ | ઓટીપી ચકાસણી પાસવર્ડ પિન | નંબર | ઇન્વોઇસ ઓર્ડર ગ્રાહક પિનકોડ
ha: lamba | kalmar_sirri lambar_sirri lambar_tabbatarwa | lambar | daftari oda
he: קוד | אימות הקוד סיסמ | מס מספר | הזמנ חוזה חשבונית לקוח מיקוד
hu: -kód- | -jelszav -jelszó- megerősít | -szám | irányítószám rendelés szerződés számla
    ügyfél
hy: կոդ- | գաղտնաբառ ծածկագիր հաստատմ | համար | հաճախորդ հաշիվ պատվեր փոստային
id jv ms su: sandi | kata_laluan pengesahan sandhi | nombor nomer nomor | invois pelanggan
    pesanan pesenan resi
ig: | nkwenye okwuntughe | nọmba | ahịa
it mt: | | numru | articolo cap conto destinatario fattura fiscale iva klijent ordine ordni
    pratica prenotazione prodotto riferimento spedizione tracciamento
ja: コード | パスワード ワンタイム 暗証 検証 確認 認証 | 番号 | 〒 お客様 エラー 予約 会員
    伝票 受付 口座 商品 問い合わせ 契約 注文 製品 請求 追跡 郵便 顧客
ka: კოდ- | დადასტურ პაროლ პინ | ნომერ- ნომრ | ინვოის კლიენტ საფოსტო შეკვეთ
kk ky mn tg tt: -код- рамз- | баталгаажуул нууц_үг парол растау серсүз сырсөз ырастоо құпия |
    дугаар нөмір- рақам | буйрутма гэрээ захиалг кардар мизоҷ нэхэмжлэх почта пошта тапсырыс
    фармоиш шот шуудан эсеп үйлчлүүлэгч
km: កូដ លេខកូដ | ផ្ទៀងផ្ទាត់ ពាក្យសម្ងាត់ លេខសម្ងាត់ | លេខ | បញ្ជាទិញ ប្រៃសណីយ៍ វិក្កយបត្រ
    អតិថិជន
kn: ಸಂಕೇತ ಕೋಡ್ | ಒಟಿಪಿ ಪರಿಶೀಲನ ಪಾಸ್ವರ್ಡ್ ಪಾಸ್‌ವರ್ಡ್ | ಸಂಖ್ಯೆ | ಅಂಚೆ ಆದೇಶ ಆರ್ಡರ್ ಇನ್ವಾಯ್ಸ್
    ಗ್ರಾಹಕ
ko: 코드 | 비밀번호 승인번호 암호 인증 패스워드 확인_번호 | 번호 | 계약 계좌 고객 문의 상품
    송장 예약 오류 우편 운송장 접수 제품 주문 회원
ku: | nasnav peyvborîn şîfre | hejmar | fatûre ferman xerîdar
la: codex | verificationis | numerus | epistul
lo: ລະຫັດ | ຢືນຢັນ | ເລກ ໝາຍເລກ | ລູກຄ້າ ສັ່ງຊື້ ໃບແຈ້ງໜີ້ ໄປສະນີ
lt lv: | apstiprin patvirtin slaptažod | numer numur | līgum pasta pasūtījum pašto rēķin
    sutart sąskait užsaky
mg: kaody | fanamarinana teny_miafina | laharana | baiko faktiora mpanjifa paositra
ml: കോഡ | ഒടിപി പാസ്വേഡ് പാസ്‌വേഡ് സ്ഥിരീകരണ | നമ്പര് നമ്പർ | ഇൻവോയ്സ് ഉപഭോക്ത ഓർഡർ തപാൽ
my: ကုဒ် | စကားဝှက် အတည်ပြု | နံပါတ် | စာတိုက် ပြေစာ ဖောက်သည် မှာယူ အော်ဒါ
or: କୋଡ | ପାସୱାର୍ଡ ସଂକେତ | ନମ୍ବର ସଂଖ୍ୟା | ଅର୍ଡର ଗ୍ରାହକ ଡାକ
pa: ਕੋਡ | ਓਟੀਪੀ ਤਸਦੀਕ ਪਾਸਵਰਡ | ਨੰਬਰ | ਆਰਡਰ ਗਾਹਕ ਚਲਾਨ ਡਾਕ
pl: | hasła hasłem hasło potwierdz weryfikac | | konto paczk poczt produkt przesyłk sprawy
    towar umow zamówieni zgłoszeni
ps sd ur: کوڈ کوډ ڪوڊ | تصدیق پاس_ورڈ پاسورڊ پټنوم | شمېره نمبر | آرڈر آرڊر انوائس سپارښت صارف
    پوسٹل گاہک
pt: | palavra-passe senha | | cep conta encomenda envio nif produto protocolo rastrei
    referência
ro: codul codurile | | număr | comand factur poștal
rw sn st xh zu yo: ikhodi ikhowudi khoutu kóòdù | ijambobanga iphasiwedi kusimbisa kwemeza
    pasiwedhi phasewete | inombolo nhamba nimero nọ́mbà | fagitire ikhasimende iodolo komande
    mutengi odha oníbàárà otara umukiriya àṣẹ
si: කේත | කේතය මුරපද සත්‍යාපන | අංක | ඇණවුම ඉන්වොයිස තැපැල් දුරකථන පාරිභෝගික
sl: | gesla geslo potrditv | št številk | kupc naročil pogodb poštn
so: | furaha sirta_ah xaqiijin | tirada | dalab macmiil qaansheegad
sq: | fjalëkalim | numri numër | fatur kontrat porosi
sv: | bekräftelse engångs -koden -lösenord- | | avtal beställning försändelse kund- medlem
    ärende
sw: msimbo | nambari_ya_siri nenosiri nywila uthibitish | namba | agizo ankara mteja
ta: குறியீ | ஓடிபி கடவுச்சொல் சரிபார்ப்ப | எண் | அஞ்சல் ஆர்டர் வாடிக்கையாளர் விலைப்பட்டியல்
te: కోడ్ | ఓటీపీ ధృవీకరణ పాస్వర్డ్ పాస్‌వర్డ్ | నంబర్ నెంబర్ సంఖ్య | ఆర్డర్ ఇన్వాయిస్ కస్టమర్
    పోస్టల్
th: รหัส โค้ด | ยืนยัน | หมายเลข เลขที่ | คำสั่งซื้อ ลูกค้า สั่งซื้อ ใบแจ้งหนี้ ไปรษณีย์
tk tr uz: | açarsöz doğrulama onay parol tasdiq şifre | belgi numara raqam | buyurtma hata
    hisob kargo mijoz müşderi müşteri pochta sargyt sipariş sözleşme takip vergi ürün
ug: | مەخپىي | نومۇر | زاكاز
vi: mã | mật_khẩu xác_minh xác_thực | số | bưu_chính hóa_đơn khách_hàng đơn đơn_hàng
yi: קאָד | פּאַראָל | נומער | באַשטעלונג
zh: 代码 代碼 码 碼 | 口令 密码 密碼 | 号 編號 编号 號 | 二维 产品 会员 单号 发票 合同 單號
    客戶 客户 快递 會員 条形 物流 產品 發票 訂單 订单 运单 邮政 邮编 郵遞 錯誤 错误 预订
"""
_KINDS = ("code", "secret", "number", "thing")
_BEGINNING = re.compile(
    r"\b[0-9a-z_\xaa-\u058f\u1e00-\u1fff]{2}|[^\x00-\u058f\u1e00-\u1fff]")
_ODD = re.compile(
    "[^\\D0-9]|[\xa0\xad\u2007\u2009\u200b-\u2013\u202a-\u202f\u2060\u3000\ufeff\uff0d"
    "\uff21-\uff5a]")


def _ascii_of(odd) -> str:
    """A digit, letter, dash or blank in ASCII, "" for what has no width."""
    sign = odd[0]
    if sign.isalnum():
        return str(int(sign)) if sign.isdigit() else chr(ord(sign) - 0xFEE0)
    return "-" if "\u2010" <= sign < "\u2014" or sign == "\uff0d" else " " * sign.isspace()


def _in_ascii(text: str) -> str:
    """Text with its digits, blanks and dashes in ASCII, without what has no width."""
    return text if text.isascii() else _ODD.sub(_ascii_of, text)


@functools.lru_cache(maxsize=None)
def _words() -> Dict[str, List[Tuple[str, str, bool]]]:
    """_WORDS by what _BEGINNING matches of them, those that end longer words by "": each as
    (word, kind, whether it may have an ending)."""
    index: Dict[str, List[Tuple[str, str, bool]]] = {"": []}
    for line in _in_ascii(_WORDS.replace("\n   ", " ")).strip().splitlines():
        for kind, words in zip(_KINDS, line.partition(":")[2].split("|")):
            for word in words.split():
                bare = word.strip("-.").replace("_", " ")
                entry = bare, kind, (bare >= "\u0590" or word[-1] == "-"
                                     or len(word) > 3 and word[-1] != ".")
                index.setdefault(_BEGINNING.match(bare)[0], []).append(entry)
                if word[0] == "-":
                    index[""].append(entry)
    return index


def _labels(text: str) -> List[Tuple[int, int, str]]:
    """(start, end, kind) of the words in a text, in lower case, that _WORDS knows."""
    index = _words()
    starts = [(match.start(), word) for match in _BEGINNING.finditer(text)
              for word in index.get(match[0], ()) if text.startswith(word[0], match.start())]
    starts += [(match.start(), word) for word in index[""] if word[0] in text
               for match in re.finditer(word[0], text)]
    found: List[Tuple[int, int, str]] = []
    for start, (word, kind, may_end) in sorted(starts, key=lambda at: (at[0], -len(at[1][0]))):
        end = start + len(word)
        if (not found or start >= found[-1][1]) and (may_end or not text[end:end + 1].isalnum()):
            found.append((start, end, kind))
    return found


_BESIDE = re.compile(r"\w{0,3}[\s-]{0,2}"
                     r"|\w{0,5}[\s-]{1,2}(?:d\w{1,2}|of|for|von|del|van)?[\s'-]{0,2}")


def _meaning(text: str, labels: List[Tuple[int, int, str]], which: int) -> int:
    """1 if labels[which] speaks for a code, -1 against it."""
    kind = labels[which][2]
    beside = [labels[other][2] for other, left in ((which - 1, which - 1), (which + 1, which))
              if kind in ("code", "number") and 0 <= other < len(labels)
              and _BESIDE.fullmatch(text, labels[left][1], labels[left + 1][0])]
    if "secret" in (kind, *beside):
        return 1
    if "thing" in (kind, *beside):
        return -1
    return 1 if "code" in (kind, *beside) else -1


_SENTENCE_END = re.compile(r"(?<=\w\w\w)[.!?]+\s|[\u3002\uff01\uff1f\u0964]|(?<=\w\w)!\s")


def _heading(line: str) -> int:
    """What a line says of what stands under it: 1 a code, -1 another number, 0 nothing."""
    for sentence in reversed(_SENTENCE_END.split(line[-600:].lower())):
        labels = _labels(sentence)
        meanings = [_meaning(sentence, labels, which) for which in range(len(labels))]
        if meanings and len(sentence) < 40:
            return meanings[-1]
        if meanings:
            return max(meanings) if max(meanings) > 0 or sentence.rstrip()[-1:] == ":" else 0
    return 0


_WEB_ADDRESS = re.compile(r"https?://[^\s<>\"]*", re.I)
_SPREAD = re.compile(r"[A-Za-z0-9](?:[ \t]+[A-Za-z0-9]){3,15}")


def _laid_out(text: str) -> List[str]:
    """The lines of a text that say something; a character a line or cell is put together."""
    lines: List[str] = []
    is_single = False
    text = _WEB_ADDRESS.sub("\ufffc", _in_ascii(text)).replace("\t-\t", "-")
    for line in text.split("\n"):
        line = line.strip(" \t\r*_>|")
        if len(line) < 64 and _SPREAD.fullmatch(line):
            line = line.replace(" ", "").replace("\t", "")
        if is_single and len(line) == 1 and line.isalnum():
            lines[-1] += line
        elif line:
            is_single = len(line) == 1
            lines.append(line)
    return lines


_CANDIDATE = re.compile(r"(?<![!-~])(?:(?:%s|%s)[\])>.,;:!?*\"'_]*(?![!-~])|%s)" % (
    # groups set off with blanks, a number with all its groups, a word that may be a code
    r"(?=[0-9 ]{0,39}[A-Z])(?=[A-Z]{0,3}[0-9])[A-Z0-9]{4}(?: (?=[A-Z]{0,3}[0-9])[A-Z0-9]{4}){1,7}",
    r"[\[(<*\"'_]*[+(]?[0-9][0-9()+./,:'-]*(?:(?<=[0-9)]) [0-9(+][0-9()+./,:'-]*)*",
    r"(?=[!-~]*?(?:[0-9]|[A-Z][A-Z-]|-[a-z]+-|[a-f]+(?![!-~])))[!-~]+"))
_MAYBE = re.compile(r"[0-9]|[A-Z][A-Z-][A-Z-][A-Z]|-[a-z]+-")      # a line with one
_AROUND = "\"'()[]<>*_.,;:!?|`{}"
_DIGITS = re.compile(
    r"[0-9]{4,9}|[0-9]{3}([ -])[0-9]{3}(?:\1[0-9]{3})?|[0-9]{4}(?:[ -][0-9]{4}){1,3}"
    r"|[0-9]{5}[ -][0-9]{5}|[0-9]{2}(?:([ -])[0-9]{2}){2,3}|[0-9](?:[ -][0-9]){3,8}")
_DATE = re.compile(r"(?:19|20)[0-9]{2}(?:(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01]))?"
                   r"|(?:0[1-9]|[12][0-9]|3[01])(?:0[1-9]|1[0-2])(?:19|20)[0-9]{2}")
_AMOUNT = re.compile(     # two characters before a token, "|", two characters behind it
    r".[A-Za-z\xc0-\u058f]\||.*[$\xa3\xa5\u20a0-\u20cf] ?\||..\|(?:[A-Za-z\xc0-\u058f]"
    r"| ?[$%\xa3\xa5\xb0\xb2\u20a0-\u20cf])")


class _Candidate(NamedTuple):
    start: int
    end: int
    code: str        # as it is listed
    look: str        # "digits", "mixed" (capitals and digits), "small" (others), "letters"


def _shape(word: str) -> Tuple[str, str]:
    """(code, look) of a token, ("", "") if it cannot be one."""
    if _DIGITS.fullmatch(word):
        return word.replace(" ", "").replace("-", ""), "digits"
    groups = word.replace(" ", "-").split("-")
    letters = "".join(groups)
    if len(groups) == 2 and len(groups[0]) < 3 and groups[0].isalpha() and (
            groups[1].isdigit() and len(groups[1]) > 3):
        return groups[1], "digits"                                            # "G-482913"
    if (not 4 <= len(word) <= 60 or not word.isascii() or letters.isdigit()
            or max(map(len, groups)) > (16 if len(groups) == 1 else 8)
            or not all(map(str.isalnum, groups))):
        return "", ""
    if not letters.isalpha():
        return word, "mixed" if word == word.upper() else "small"
    is_odd = word.isupper() or word.islower() and (len(groups) > 2 or set(word) <= set("abcdef"))
    return (word, "letters") if is_odd else ("", "")


def _candidates(text: str) -> Iterator[_Candidate]:
    """What in a line or cell looks like a code."""
    for match in _CANDIDATE.finditer(text):
        word, start, end = match[0], match.start(), match.end()
        if len(word) < 4:
            continue
        head, sign, tail = word.rpartition(":" if ":" in word[:-1] else "=")
        if sign and tail and head.strip(_AROUND).isalpha():              # "code:4711"
            start, word = start + len(head) + 1, tail
        bare = word.strip(_AROUND)
        start += word.find(bare)
        shapes = [(bare, *_shape(bare))]
        if " " in bare and not shapes[0][1]:                   # a row of numbers of one length
            pieces = bare.split(" ")
            is_row = len(set(map(len, pieces))) == 1
            shapes = [(piece, *_shape(piece)) for piece in pieces if is_row]
        for piece, code, look in shapes:
            if code and not _AMOUNT.match("%2s|%s" % (
                    text[max(0, match.start() - 2):match.start()], text[end:end + 2])):
                yield _Candidate(start, start + len(piece), code, look)
            start += len(piece) + 1


_CHANGES = re.compile("-|[A-Z][0-9]+[A-Z]|[0-9][A-Z]+[0-9]")
_FILLING = re.compile(r"(?<!\S)\(?[0-9]{1,2}[.):]?(?!\S)|[^\w]")


def _alone(text: str, tokens: List[_Candidate]) -> bool:
    """Whether a text holds tokens and nothing else but their numbers in a list."""
    at = 0
    for token in tokens:
        if token.look != "letters" or len(tokens) == 1:
            if _FILLING.sub("", " %s " % text[at:token.start]):
                return False
            at = token.end
    return bool(at or not tokens) and not _FILLING.sub("", " " + text[at:])


_ENDING = re.compile(r"^\w+")
# What stands between a label and what it names, if nothing else does, and behind a code.
_IS = (r"(?:is|ist|lautet|est|es|è|é|este|jest|to|je|on|ir|yra|er|är|adalah|ialah|là|ay|ni|yw"
       r"|és|estas|είναι|huwa|është|е|є|је|это|эта|է)\b")
_COPULA = re.compile(
    r"(?:.*\W)?%s[\s\"'*(]*|.*[:=\u2014][\s\"'*(]*|.*\s-\s|.*[^\x00-\u058f\u1e00-\u2e7f]\s*"
    % _IS, re.S)
_COPULA_AFTER = re.compile(r"[\s\"'*)]*(?:%s|[^\x00-\u058f\u1e00-\u2e7f])" % _IS)


class _CodeFinder:
    """Finds the codes of one text; each line is looked at once as a line, once as a label."""

    def __init__(self, text: str, subject: str):
        """`found`: the codes in order of appearance, each with how near its label is: 5 with
        nothing but a colon or "is" between, 4 right before or above, 3 near, 2 the subject,
        1 without one."""
        self.lines = _laid_out(text)
        self.subject = subject
        self.is_short = len(text) <= 2_000
        self.headings: Dict[int, int] = {}              # what a line says of those under it
        self.lists: Dict[int, Tuple[int, int]] = {}     # lines of candidates alone, with `above`
        self.found: Dict[str, int] = {}
        above: List[str] = []
        for number, line in enumerate(self.lines):
            cells = line.split("\t")
            if len(self.found) < MAX_CODES and (
                    _MAYBE.search(line) or len(line) <= 40 and " " not in line):
                self.read(number, cells, above)
            above = cells

    def read(self, number: int, cells: List[str], above: List[str]):
        """Judges the candidates of a line. `above`: the cells of the line before."""
        row = [list(_candidates(cell)) for cell in cells]
        if not any(row):
            return
        if all(map(_alone, cells, row)):
            if any(token.look != "letters" for tokens in row for token in tokens) or (
                    self.heading(number - 1) > 0):
                self.lists[number] = self.above(number)
                self.judge([token for tokens in row for token in tokens], *self.lists[number])
            return
        for column, (cell, tokens) in enumerate(zip(cells, row)):
            if tokens and _alone(cell, tokens):
                self.judge(tokens, self.beside(number, cells, column, above), 4)
                continue
            for last, token in zip([None, *tokens], tokens):
                if token.code not in self.found:        # what a mail repeats is judged once
                    self.judge([token], 1, self.in_sentence(number, cell, token, last))

    def judge(self, tokens: List[_Candidate], said: int, near: int):
        """Takes tokens for codes, or not."""
        for token in tokens if said > 0 else ():
            if near == 1:
                is_code = (len(token.code) == 6 if token.look == "digits" else token.look ==
                           "mixed" and bool(_CHANGES.search(token.code)))
            else:
                is_code = near > (3 if token.look == "letters" else 0)
            if is_code:
                self.found[token.code] = max(near, self.found.get(token.code, 0))

    def heading(self, number: int) -> int:
        """What a line says of those under it."""
        if number not in self.headings:
            self.headings[number] = _heading(self.lines[number] if number >= 0 else "")
        return self.headings[number]

    def above(self, number: int) -> Tuple[int, int]:
        """(what is said, how near that is) of tokens that have their line for themselves: by one
        of the four lines above, down to another such line, by the next, by the subject."""
        if number - 1 in self.lists:
            return self.lists[number - 1]
        for distance in range(1, min(4, number) + 1):
            if number - distance in self.lists:
                return 0, 0
            if self.heading(number - distance):
                return self.heading(number - distance), 4 if distance == 1 else 3
        if number + 1 < len(self.lines) and self.heading(number + 1) > 0:
            return 1, 3
        said = _heading(self.subject)
        if said or not self.is_short:
            return said, 2
        # Nothing names it: a code if the mail is short and speaks of no other number, and the
        # line above is no title of something.
        title = self.lines[number - 1] if number else ""
        is_title = title[-1:] == ":" or title[-1:].isalnum() and len(title.split()) < 3
        return int(not (len(title) < 25 and is_title) and not any(
            kind in ("thing", "number") for line in self.lines + [self.subject]
            for _, _, kind in _labels(line.lower()))), 1

    def beside(self, number: int, cells: List[str], column: int, above: List[str]) -> int:
        """What is said of a token alone in its cell of a row that holds more: by the cell before
        it, or the head of its column."""
        before = next((cell for cell in reversed(cells[max(0, column - 3):column])
                       if cell.strip()), "")
        said = _heading(before)
        if not said and len(above) == len(cells):
            return _heading(above[column])
        return said or before == "" and self.heading(number - 1)

    def in_sentence(self, number: int, text: str, token: _Candidate,
                    last: Optional[_Candidate]) -> int:
        """How near the label of a token is that has words around it, 0 if none is for a code."""
        start = last.end if last and last.look != "letters" else 0
        left = text[max(start, token.start - 120):token.start]
        if not left.strip(_AROUND) and number and self.lines[number - 1][-1:] == ":":
            left = self.lines[number - 1][-120:]
        sentence = _SENTENCE_END.split(left.lower())[-1]
        labels = _labels(sentence)
        is_date = token.look == "digits" and _DATE.fullmatch(token.code)
        if labels:
            gap = sentence[labels[-1][1]:]
            words = len(_ENDING.sub("", gap).split())
            if _meaning(sentence, labels, len(labels) - 1) < 0:
                return 0
            if token.look == "letters" and left.isupper():
                return 0
            if _COPULA.fullmatch(gap):
                return 5
            if token.look == "letters":
                return 4 * (not words and (len(token.code) > 7 or not sentence.isascii()))
            is_number = len(token.code) == 4 and text[token.end:token.end + 2][-1:].isalpha()
            if words >= (1 if is_date else 2 if is_number or token.look == "small" else 12):
                return 0
            return 4 if words < 3 else 3
        if start and last:
            if last.code in self.found and last.look == token.look and len(left.split()) < 2:
                return self.found[last.code]
            if _COPULA.fullmatch(sentence):                # "The PIN for your card 4711 is 9182"
                before = text[max(0, start - 80):start].lower()
                return 3 * any(kind == "secret" for _, _, kind in _labels(before))
        is_said = (_COPULA_AFTER.match(text, token.end)
                   or not is_date and _COPULA.fullmatch(sentence))
        if token.look == "letters" or len(sentence.split()) >= (4 if is_said else 2) or (
                not is_said and (is_date or token.look == "small")):
            return 0
        right = _SENTENCE_END.split(text[token.end:token.end + 60].lower())[0]
        labels = _labels(right)
        return 3 * bool(labels and _meaning(right, labels, 0) > 0)


def find_codes(text: str, subject: str) -> Tuple[Tuple[str, ...], str]:
    """The codes of a text and the surest of them, "" if there is none. The codes stand as they are
    typed, each once, in order of appearance: "482 913" and "123-456" are 482913 and 123456,
    "K7Q-T2M" stays. The subject's are taken where the text has none."""
    subject = subject[:2_000]            # nobody reads further
    found = _CodeFinder(text[:MAX_CODE_TEXT], subject).found
    if not found and _MAYBE.search(subject):
        found = _CodeFinder(subject, "").found
    return tuple(found)[:MAX_CODES], max(found, key=found.__getitem__, default="")


def _text_body(texts: List[str], subject: str) -> Body:
    if not texts:
        return Body()
    text = "\n".join(texts)
    codes, code = find_codes(text, subject)
    return Body(text, find_text_links(text), codes, code=code)


_UNSEEN = re.compile("[\u00ad\u034f\u200b-\u200f\u2060\ufeff]+")
_SEEN = re.compile("[^\\s\u00ad\u034f\u200b-\u200f\u2060\ufeff]")


def _preview(*texts: str) -> str:
    """The beginning of the first text that has anything to read, on one line."""
    for text in texts:
        found = _SEEN.search(text)
        if found:
            head = text[found.start():found.start() + 5 * MAX_PREVIEW]
            return " ".join(_UNSEEN.sub("", head).split())[:MAX_PREVIEW].rstrip()
    return ""


# HTML

_TAG = re.compile(r"<(?:(/?)([a-zA-Z][^\s/>]{0,60})(>)?|(!--)|[!?/])")
_ATTRIBUTE = re.compile(
    r"[\s/]*(?:(>)|([^\s/>][^\s/>=]*)"
    r"(?:\s*=\s*(?:\"([^\"]*)(?:\"|\Z)|'([^']*)(?:'|\Z)|([^\s>]*)))?)")
_RAW_TEXT = frozenset(
    "script style title textarea xmp iframe noembed noframes".split())
_BLOCKS = frozenset(
    "address article aside blockquote body br center dd div dl dt fieldset figure footer form"
    " h1 h2 h3 h4 h5 h6 head header hr html li main nav ol option p pre section table tbody tfoot"
    " thead tr ul".split())
_VOID = frozenset("area base br col embed hr img input link meta param source track wbr".split())
# Not font-size: templates set it to 0 around everything, and what is inside to what it should be.
_HIDDEN_STYLE = re.compile(
    r"display\s*:\s*none|visibility\s*:\s*hidden|(?<![\w-])(?:max-height|opacity)\s*:\s*0"
    r"(?:\.0*)?(?:px|pt|em|%)?\s*(?:;|!|$)", re.I)
_LONG_ENTITY = re.compile(r"&#(?:[0-9]{9}[0-9]*|[xX][0-9a-fA-F]{9}[0-9a-fA-F]*);?")
_REFERENCE = re.compile("&(?:#[0-9]+;?|#[xX][0-9a-fA-F]+;?|[A-Za-z][A-Za-z0-9]{1,31}"
                      "(?:;|(?![A-Za-z0-9=])))")
_BLANKS = re.compile(r"\s+")


def _unescape(text: str) -> str:
    """Text with its entities decoded; `int` is kept from numbers of 100,000 digits."""
    return html.unescape(_LONG_ENTITY.sub("\ufffd", text)) if "&" in text else text


def _unescape_attribute(text: str) -> str:
    """The same for an attribute, where &copy=1 and &region are none (HTML 13.2.5.73): what is in
    a link is often written so."""
    return text if "&" not in text else _REFERENCE.sub(lambda found: (
        _unescape(found.group()) if found.group()[1] == "#"
        else html.entities.html5.get(found.group()[1:], found.group())), text)


class _HtmlReader:
    """Links, images and visible text of HTML, as a browser's tokenizer would find them. The text
    is laid out for `find_codes`: blocks are lines, cells are set apart with tabs.

    What is not closed (a comment, a quote, a <style>) runs to the end, as the standard says: that
    is also what keeps this linear, which `html.parser` is not.
    """

    def __init__(self, source: str):
        self.links: List[Link] = []
        self.images: List[Image] = []
        self.visible: List[str] = []
        self.base = ""
        self.anchor: Optional[List[str]] = None     # what is read of the last link's text
        self.hidden = ""                            # the element that hides what is read
        self.hidden_depth = 0
        at = 0
        while at < len(source):
            tag = source.find("<", at)
            tag = tag if tag >= 0 else len(source)
            self.text(source[at:tag])
            match = _TAG.match(source, tag)
            if not match:
                self.text(source[tag:tag + 1])
                at = tag + 1
            elif match[2]:
                at = self.tag(source, match)
            else:
                end = source.find("-->" if match[4] else ">", tag + 2 if match[4] else tag)
                at = end + (3 if match[4] else 1) if end >= 0 else len(source)
        self.end_anchor()

    def tag(self, source: str, match) -> int:
        """Reads the tag that `match` begins; returns where it, or the text it keeps, ends."""
        name, at, attributes = match[2].lower(), match.end(), {}
        while not match[3]:
            found = _ATTRIBUTE.match(source, at)
            if not found:
                return len(source)
            at = found.end()
            if found[1]:
                break
            key = found[2].lower()
            if key in ("href", "src", "alt", "style", "hidden"):
                value = found[3] or found[4] or found[5] or ""
                attributes.setdefault(key, _unescape_attribute(value))
        self.element(name, bool(match[1]), attributes)
        if name in _RAW_TEXT and not match[1]:
            end = re.compile("</%s(?=[\\s/>])" % name, re.I).search(source, at)
            return end.start() if end else len(source)
        return at

    def element(self, name: str, is_end: bool, attributes: Dict[str, str]):
        """Takes a start or an end tag."""
        blank = "\n" if name in _BLOCKS else "\t" if name in ("td", "th") and not is_end else ""
        if blank and not self.hidden:
            self.visible.append(blank)
        if blank and self.anchor is not None:
            self.anchor.append(" ")
        if name in ("a", "area"):
            self.end_anchor()
        if name == self.hidden:
            self.hidden_depth += -1 if is_end else 1
            self.hidden = name if self.hidden_depth else ""
        elif not self.hidden and not is_end and name not in _VOID and (
                "hidden" in attributes or _HIDDEN_STYLE.search(attributes.get("style", ""))):
            self.hidden, self.hidden_depth = name, 1
        # A URL as a browser takes it: trimmed, without the line ends inside.
        href, src = (re.sub(r"[\t\r\n]+", "", attributes.get(key, "").strip(" \t\r\n\x0c\x00"))
                     for key in ("href", "src"))
        if name in ("a", "area") and href and len(self.links) < MAX_LINKS:
            self.links.append(Link(href, None))
            self.anchor = [] if name == "a" else None
        elif name == "img" and "src" in attributes and len(self.images) < MAX_LINKS:
            self.images.append(Image(src, attributes.get("alt")))
        elif name == "base":
            self.base = self.base or href

    def text(self, text: str):
        """Takes text between tags."""
        if text and not self.hidden:
            text = _BLANKS.sub(" ", _unescape(text))
            self.visible.append(text)
            if self.anchor is not None:
                self.anchor.append(text)

    def end_anchor(self):
        """Ends a link: what a reader saw since its start is its text."""
        if self.anchor is not None:
            text = " ".join("".join(self.anchor).split())
            self.links[-1] = self.links[-1]._replace(text=text or None)
            self.anchor = None


def _html_body(texts: List[str], subject: str, warnings: _Warnings) -> Tuple[Body, str]:
    """(body, visible text) of the HTML parts of a mail."""
    if not texts:
        return Body(), ""
    text = "\n".join(texts)
    if len(text) > MAX_HTML:
        warnings.add("HTML over %d characters: links and images after that are not listed"
                     % MAX_HTML)
    reader = _HtmlReader(text[:MAX_HTML])
    links, images, visible = reader.links, reader.images, "".join(reader.visible)
    if max(len(links), len(images)) >= MAX_LINKS:
        warnings.add("more than %d links or images: the rest of them is not listed" % MAX_LINKS)
    if 0 < len(reader.base) <= MAX_URL:
        # A long base and many links must not make much more than the mail weighs.
        room = len(text) + 100_000

        def resolve(url: str) -> str:
            nonlocal room
            try:
                whole = urllib.parse.urljoin(reader.base, url) if room > 0 else url
            except ValueError:      # "http://[": not a URL to join with
                whole = url
            room -= len(whole) - len(url)
            return whole

        links = [link._replace(href=resolve(link.href)) for link in links]
        images = [image._replace(src=resolve(image.src)) for image in images]
    codes, code = find_codes(visible, subject)
    return Body(text, tuple(links), codes, tuple(images), code), visible


# Whole mails

def is_date(value: str) -> bool:
    """Whether a Date field can be read as a date."""
    try:
        # without comments: `10:00 (EDT) -0400` is not read as two zones
        return bool(email.utils.parsedate_to_datetime(_COMMENT.sub(" ", value[:200])))
    except (ValueError, TypeError, IndexError, OverflowError, NameError):
        return False    # NameError: 3.8's parsedate_tz at `10.00.00.00`


class Envelope(NamedTuple):
    """What was said of a mail beside its octets (RFC 5321 2.3.1)."""

    reverse_path: Optional[str]          # None: not from SMTP; "": the null reverse-path
    forward_paths: Tuple[str, ...]
    helo: Optional[str] = None
    client: str = ""                     # the sender's network address
    user: str = ""                       # whom AUTH named
    tls: bool = False
    eight_bit: bool = True               # BODY=8BITMIME was announced
    utf8: bool = False                   # SMTPUTF8 was: header fields may be raw UTF-8


MAX_LINE = 998               # octets without CRLF, RFC 5322 2.1.1
_ONCE = ("bcc cc content-transfer-encoding content-type date from message-id mime-version "
         "reply-to sender subject to").split()       # RFC 5322 3.6 and RFC 2045: at most one each
_JUNK_LINE = re.compile(rb"^(?![!-9;-~]+[ \t]*:)[^ \t\r\n][^\n]*", re.M)
_MESSAGE_ID = re.compile(r"<[^\s<>]+@[^\s<>]+>")
# Header fields at the start of a body, one of which no one writes as text.
_STRAY_FIELDS = re.compile(
    rb"(?:[!-9;-~]+:[^\n]*\n(?:[ \t][^\n]*\n)*){0,50}?"
    rb"(?:bcc|content-(?:type|transfer-encoding)|message-id|mime-version):", re.I)


def _check_header(header: Header, mail: "Mail") -> Iterator[str]:
    """What RFC 5322 and MIME ask of a mail's header fields and these do not do."""
    names, first = [name.lower() for name, _ in header.fields], header.first
    yield from (f"no {name} field" for name in ("From", "Date", "Message-ID")
                if name.lower() not in first)
    if len(names) > len(first):
        yield from (f"{names.count(name)} {name.title()} fields: one is allowed"
                    for name in _ONCE if names.count(name) > 1)
    if "date" in first and not any(
            is_date(value) for name, value in header.fields if name.lower() == "date"):
        yield "Date field that is no date"
    if "message-id" in first and not _MESSAGE_ID.fullmatch(first["message-id"]):
        yield f"Message-ID {first['message-id'][:60]!r} is none: expected <unique@domain>"
    if "bcc" in first:
        yield "Bcc field: every recipient can read it"
    if "content-type" in first and "mime-version" not in first:
        yield "Content-Type without MIME-Version"
    if "from" in first and not mail.from_:
        yield "From field without an address"
    for field, found in (("From", mail.from_), ("To", mail.to), ("Cc", mail.cc),
                         ("Reply-To", mail.reply_to)):
        lost = next((name or box for name, box in found if "@" not in box), "")
        if lost:
            yield (f"{field} names {lost[:60]!r} without an address: a name with a comma needs "
                   "quotes")


def _check_octets(octets: bytes, block: bytes, start: int, envelope: Envelope) -> Iterator[str]:
    """What RFC 5321 and 5322 ask of the octets of a mail and these do not do; `block` is its
    header block, its body begins at `start`."""
    if not block.isascii() and not envelope.utf8:
        yield "raw 8-bit octets in the header block: only SMTPUTF8 mail may have them"
    elif "\ufffd" in block.decode("utf-8", "replace"):
        yield "raw 8-bit octets in the header block that are no UTF-8"
    junk = _JUNK_LINE.search(block, 0, MAX_HEADER)
    if junk:
        yield f"header line that is no field: {junk[0][:60].decode('ascii', 'replace').rstrip()!r}"
    if not envelope.eight_bit and not (octets[start:] if envelope.utf8 else octets).isascii():
        yield "8-bit octets, but BODY=8BITMIME was not announced"
    ends = octets.count(b"\r\n")
    if octets.count(b"\n") > ends:
        yield "bare LF: a line that does not end in CRLF"
    if octets.count(b"\r") > ends:
        yield "bare CR: a CR without LF"
    at = 0
    while at + MAX_LINE < len(octets):
        at = octets.rfind(b"\n", at, at + MAX_LINE + 2) + 1
        if not at:
            yield f"line over {MAX_LINE} octets (RFC 5322 2.1.1)"
            break


class Mail:
    """A mail that was read: what tests, JSON and searches look at. An SMS has the shape of a mail,
    with numbers for addresses."""

    headers: Tuple[Tuple[str, str], ...] = ()    # all fields in order, unfolded and decoded
    subject = message_id = ""
    from_: Tuple[Address, ...] = ()      # addresses have .name and .email
    to: Tuple[Address, ...] = ()
    cc: Tuple[Address, ...] = ()
    bcc: Tuple[Address, ...] = ()        # the envelope recipients that neither To nor Cc names
    reply_to: Tuple[Address, ...] = ()
    text_body = html_body = Body()
    preview = ""                         # one line
    attachments: List[Attachment] = []   # in the order of the mail
    warnings: Tuple[str, ...] = ()       # what is wrong with the mail

    def __init__(self, message: "Message"):
        self.id = message.id
        self.number = message.number     # of its arrival
        self.octets = message.octets     # exactly as received
        self.envelope = message.envelope
        self.received = datetime.datetime.fromtimestamp(message.received, datetime.timezone.utc)
        self.transcript = message.transcript().decode("utf-8", "replace")
        if message.kind == "SMS":
            self._read_sms()
        else:
            self._read_mail()
        self.bcc = hidden_recipients(self.envelope.forward_paths, self.to + self.cc)
        self.text = self.text_body.body or ""
        self.html = self.html_body.body or ""
        links = self.html_body.links or self.text_body.links
        self.links: List[str] = [link.href for link in links]
        self.codes: List[str] = list(self.text_body.codes or self.html_body.codes)

    def _read_sms(self) -> None:
        text = self.octets.decode("utf-8", "replace")
        self.from_ = (Address("", self.envelope.reverse_path or ""),)
        self.to = tuple(Address("", number) for number in self.envelope.forward_paths)
        self.text_body, self.preview = _text_body([text], ""), _preview(text)

    def _read_mail(self) -> None:
        block, start = split_mail(self.octets)
        warnings = _Warnings()
        header = Header(block, warnings)
        self.headers = tuple((name, decode_words(value)) for name, value in header.fields)
        self.subject, self.message_id = header.text("subject"), header.text("message-id")
        self.from_, self.to, self.cc, self.reply_to = map(
            header.addresses, ("from", "to", "cc", "reply-to"))
        for wrong in itertools.chain(_check_header(header, self), _check_octets(
                self.octets, block, start, self.envelope)):
            warnings.add(wrong)
        root, texts, htmls, self.attachments = Part(header), [], [], []
        if not root.type.startswith("message/") and _STRAY_FIELDS.match(
                self.octets, start, start + 4_000):
            warnings.add("the body begins with header fields: an empty line ended the header "
                         "early")
        for part in leaves(self.octets, start, root):
            if part.is_body():
                (htmls if part.type == "text/html" else texts).append(part.text())
            else:
                self.attachments.append(part.attachment())
        self.html_body, visible = _html_body(htmls, self.subject, warnings)
        self.text_body = _text_body(texts, self.subject)
        if htmls and not texts:
            warnings.add("HTML without a text alternative")
        self.preview = _preview(self.text_body.body or "", visible, self.subject)
        self.warnings = tuple(warnings)

    def header(self, name: str, default: str = "") -> str:
        """The value of the first header field of that name."""
        return next((value for field, value in self.headers if field.lower() == name.lower()),
                    default)

    def __repr__(self) -> str:
        sender = self.from_[0].email if self.from_ else ""
        return (f"<Mail {self.subject!r} from {sender!r} to "
                f"{', '.join(self.envelope.forward_paths)}>")


class Message:
    """One mail or SMS as it was accepted.  Nothing changes but what is derived from it and kept.

    Slots, because ten thousand of them are a normal day.
    """

    __slots__ = ("id", "number", "kind", "direction", "received", "envelope", "octets",
                 "session", "cost", "inboxes", "servers", "seen", "summary")

    def __init__(self, id: str, octets: bytes, envelope: Envelope, kind: str = "Email",
                 direction: str = "Received", session: Tuple[bytes, ...] = ()):
        self.id = id
        self.number = 0                  # of its arrival: the Store counts
        self.kind = kind                 # "Email" or "SMS"
        self.direction = direction       # "Received" or "Sent"
        self.received = 0.0              # seconds since 1970: the Store's clock
        self.envelope = envelope
        self.octets = octets
        self.session = session           # parts of the transcript, each of lines with CRLF
        self.cost = 0                    # octets of memory: the Store counts
        self.inboxes: Dict[str, None] = {}           # names of those that hold it
        self.servers: Tuple[str, ...] = ()
        self.seen = False                # somebody marked it as read
        self.summary: Optional[bytes] = None         # kept JSON: see HTTP API

    def transcript(self) -> bytes:
        """The dialogue that brought it: lines with CRLF.  The last two are not kept, because they
        differ from mail to mail; the size in them is without stuffed dots."""
        if not self.session:
            return b""
        return b"%bC: (%d octets of mail data)\r\nS: 250 2.0.0 Ok: queued as %b\r\n" % (
            b"".join(self.session), len(self.octets), self.id.encode())

    def read(self) -> Mail:
        """Everything that the octets say, read anew at each call: it is large and seldom used."""
        return Mail(self)

    def header(self) -> Header:
        """What the header block alone says; an SMS has none."""
        return Header(split_mail(self.octets)[0] if self.kind == "Email" else b"")

    def bodies(self, header: Header) -> List[str]:
        """The texts and HTML sources, and nothing else."""
        if self.kind == "SMS":
            return [self.octets.decode("utf-8", "replace")]
        _, start = split_mail(self.octets)
        return [part.text() for part in leaves(self.octets, start, Part(header))
                if part.is_body()]


def read_message(octets: bytes, envelope: Envelope = Envelope(None, ())) -> Mail:
    """A mail that nobody delivered, read completely; never raises, whatever the octets."""
    return Message("", octets, envelope).read()


# ---- Search ----------------------------------------------------------------
# Which messages a request means: terms on a message, all or any of them. One table of words
# serves the search box, the API's q=, the filters, the page and the README.

class Searched:
    """A message while a search looks at it: each piece is read once, when a term asks for it."""

    def __init__(self, message: Message):
        self.message = message

    @functools.cached_property
    def header(self) -> Header:
        """Its header fields."""
        return self.message.header()

    @functools.cached_property
    def mail(self) -> Mail:
        """All of it."""
        return self.message.read()

    @functools.cached_property
    def body(self) -> str:
        """Its text and HTML source in lower case."""
        return "\0".join(self.message.bodies(self.header)).lower()

    def addresses(self, field: str) -> Iterable[Address]:
        """The mailboxes of From, of all recipients (to), of Cc, or of those hidden (bcc)."""
        envelope, of = self.message.envelope, self.header.addresses
        if field == "to":
            return itertools.chain(of("to"), of("cc"), (
                Address("", path) for path in envelope.forward_paths))
        if field == "bcc":
            return of("bcc") + hidden_recipients(envelope.forward_paths, of("to") + of("cc"))
        if field == "from" and self.message.kind == "SMS":
            return (Address("", envelope.reverse_path or ""),)
        return of(field)

    def names(self, field: str, value: str) -> bool:
        """Whether a part of a name or an address there is `value`."""
        return any(value in f"{name}\0{box}\0{address_key(box)}".lower()
                   for name, box in self.addresses(field))

    def has_address(self, field: str, value: str) -> bool:
        """Whether an address there is `value`."""
        return any(value == address_key(box) for _, box in self.addresses(field))


_HAS: Dict[str, Callable[[Mail], Any]] = {
    "attachment": lambda mail: mail.attachments, "code": lambda mail: mail.codes,
    "html": lambda mail: mail.html_body.body, "image": lambda mail: mail.html_body.images,
    "link": lambda mail: mail.links, "text": lambda mail: mail.text_body.body,
    "warning": lambda mail: mail.warnings,
}
# Word: its test; what costs less to look at comes first.
WORDS: Dict[str, Callable[[Searched, str], bool]] = {
    "id": lambda mail, value: (value == mail.message.id.lower()
                               or value in mail.header.text("message-id").lower()),
    "user": lambda mail, value: value in mail.message.envelope.user.lower(),     # named by AUTH
    "subject": lambda mail, value: value in mail.header.text("subject").lower(),
    "from": lambda mail, value: mail.names("from", value),
    "to": lambda mail, value: mail.names("to", value),
    "cc": lambda mail, value: mail.names("cc", value),
    "bcc": lambda mail, value: mail.names("bcc", value),
    "header": lambda mail, value: any(           # header:"x-mailer: acme"
        value in f"{name}: {decode_words(text)}".lower() for name, text in mail.header.fields),
    "body": lambda mail, value: value in mail.body,
    "file": lambda mail, value: any(
        value in part.file_name.lower() for part in mail.mail.attachments),
    "has": lambda mail, value: bool(_HAS[value](mail.mail)),
}
_TESTS: Dict[str, Callable[[Searched, str], bool]] = {
    **WORDS,
    "sender": lambda mail, value: mail.has_address("from", value),
    "recipient": lambda mail, value: mail.has_address("to", value),
    "": lambda mail, value: any(WORDS[word](mail, value)         # free text
                                for word in ("subject", "from", "to", "body")),
}


class Criteria(NamedTuple):
    """Terms that must hold, all of them or any one.  Without terms every message matches."""

    terms: Tuple[Tuple[str, str, bool], ...] = ()    # key of _TESTS, lower-case value, wanted
    any_of: bool = False

    def match(self, message: Message) -> bool:
        """Whether the message is meant."""
        mail = Searched(message)
        results = (_TESTS[field](mail, value) is wanted for field, value, wanted in self.terms)
        return any(results) if self.any_of and self.terms else all(results)


def criteria(subject: str = "", sender: str = "", to: str = "", body: str = "", header: str = "",
             any_of: bool = False) -> Criteria:
    """The filters of HTTP and Python: a part of the subject, of the body or of a header field; the
    sender's or a recipient's full address. "" is no condition."""
    given = (("subject", subject), ("sender", sender), ("to", to), ("header", header),
             ("body", body))
    for name, value in given:
        if not isinstance(value, str):
            raise TypeError(f"expected {name} to be text, got {value!r}")
    return Criteria(tuple(
        ("recipient", address_key(value), True) if name == "to" else
        (name, address_key(value) if name == "sender" else value.lower(), True)
        for name, value in given if value), any_of)


_WORD = re.compile(      # a URL is no word with a colon, nor is what ends with one
    r'(-?)(?:(?!(?:mailto|tel|cid|data):)([a-z]+):(?=[^\s/]))?(?:"([^"]*)"|(\S+))', re.I)


def words(query: str) -> Criteria:
    """The criteria of a search box: WORDS with their colon, free text, "two words", -not.
    ValueError if it has a word that is none."""
    terms = []
    for minus, word, quoted, plain in _WORD.findall(query):
        word, value = word.lower(), (quoted or plain).lower()
        value = value.rstrip("s") if word == "has" else value            # has:links
        if word and word not in WORDS or word == "has" and value not in _HAS:
            known = [f"has:{what}" for what in _HAS] if word == "has" else [
                f"{name}:" for name in sorted(WORDS)]
            raise ValueError(f"expected {' '.join(known)} or the text in quotes, got "
                             f"{_seen(word + ':' + value)}")
        if value:
            terms.append((word, value, not minus))
    order = [*WORDS, ""]
    return Criteria(tuple(sorted(terms, key=lambda term: order.index(term[0]))))


# ---- Store -----------------------------------------------------------------
# Everything that threads share is here: inboxes, messages, events, waiting.
# One lock guards it.  Parse before taking it, do no I/O while holding it.

DEFAULT_SERVER = "mailtest"              # lists every message; 8 characters, as clients demand
_LETTERS = "abcdefghijkmnopqrstuvwxyz23456789"       # none that look alike
_OUTBOX = "outbox of "                   # names of what holds sent mail; no address has this form


class Full(Exception):
    """A bound of the store is met: what is new must wait until something ends."""


class Unknown(Exception):
    """No such inbox, message or server; the text says what is known of it."""


class NeverSeen(Unknown):
    """No such inbox, and none is remembered."""


class Ended(Unknown):
    """An acquired inbox that has expired or was deleted: nothing will come to it any more."""


class Event(NamedTuple):
    """Something that happened.  Numbers grow by one, and also number the messages, each of which
    is the event of its own arrival."""

    number: int
    kind: str                            # message, seen, deleted, emptied, inbox, expired, session
    data: Dict[str, Any]


class Failure:
    """One `fail=STAGE:ACTION[*TIMES]` of an inbox (see parse_failure)."""

    __slots__ = ("text", "stage", "code", "delay", "times", "answered")

    def __init__(self, text: str, stage: str, code: int, delay: float, times: int):
        self.text = text
        self.stage = stage               # "mail", "rcpt" or "data"
        self.code = code                 # a reply code; 0: see delay; -1: drop
        self.delay = delay               # seconds
        self.times = times
        self.answered = 0


_FAILURE = re.compile(r"(mail|rcpt|data):(?:([45][0-9]{2})|(drop)|delay=([0-9]+(?:\.[0-9]+)?))"
                      r"(?:\*([1-9][0-9]{0,5}))?", re.I)


def parse_failure(text: str, limits: Limits) -> Failure:
    """The Failure that `STAGE:ACTION[*TIMES]` describes; ValueError says what was expected.

    Stages: mail (the inbox is the reverse-path), rcpt (it is a forward-path), data (the end of
    the mail data, if it is one of the recipients).  Actions: a reply code 4xx or 5xx, drop (close
    the connection), delay=SECONDS (then go on).  TIMES: how often; once if not given.
    """
    match = _FAILURE.fullmatch(text.strip()) if len(text) <= 80 else None
    if not match:
        raise ValueError(f"expected fail=STAGE:ACTION[*TIMES] with a stage mail, rcpt or data and "
                         f"an action 4xx, 5xx, drop or delay=SECONDS, such as fail=rcpt:451*2; "
                         f"got {text[:80]!r}")
    stage, code, drop, delay, times = match.groups()
    if delay and float(delay) > limits.script_delay:
        raise ValueError(f"expected a delay of at most {limits.script_delay:g} seconds, "
                         f"got {text[:80]!r}")
    return Failure(text.strip(), stage.lower(), int(code or (-1 if drop else 0)),
                   float(delay or 0), int(times or 1))


class Watch(NamedTuple):
    """A call that is awaited: if it does not come in time, the inbox gets a mail about it."""

    within: float                        # seconds between two calls
    due: float                           # when the next one must have come
    told: bool                           # whether that passed, and the mail was delivered


class InboxView(NamedTuple):
    """What there is to say of an inbox at one moment."""

    address: str
    acquired: bool
    expires: float                       # seconds since 1970
    count: int
    attempts: int
    failures: Tuple[Tuple[str, int, int], ...]       # text, times answered, times left
    unseen: int = 0
    latest: int = 0                      # number of its latest mail, of its opening without one
    watch: Optional[Watch] = None        # in seconds since 1970


class SessionRecord(NamedTuple):
    """A finished SMTP session."""

    number: int
    client: str
    helo: str
    user: str
    tls: bool
    started: float                       # seconds since 1970
    ended: float
    accepted: int                        # messages
    refused: str                         # the first reply 4xx or 5xx, "" if there was none
    ending: str                          # "quit", or why it ended without
    transcript: bytes


def inbox_key(address: str) -> str:
    """The name of an address's inbox: domains compare without case (RFC 5321 2.4), and so do
    local-parts, as everyone's mail system does in practice.  No name begins with "@": those
    folders are the servers'."""
    return address_key(address).lstrip("@")


def untagged(key: str) -> str:
    """The key without `+tag`: local+tag@domain -> local@domain."""
    local, at, domain = key.rpartition("@")
    return local.partition("+")[0] + at + domain if at and not key.startswith('"') else key


def servers_of(key: str) -> Tuple[str, ...]:
    """The server ids of an address: the first label of its domain, and the whole domain."""
    domain = key.rpartition("@")[2] if "@" in key else ""    # an outbox or a telephone has none
    ids = (domain,) if domain.startswith("[") else (domain.partition(".")[0], domain)
    return tuple(filter(None, dict.fromkeys(ids)))


def iso_time(seconds: float) -> str:
    """2019-08-06T17:44:07.197781+00:00: seconds since 1970, in UTC, with microseconds."""
    when = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return when.isoformat(timespec="microseconds")


def _random_name(length: int) -> str:
    """Letters and digits that nobody can guess."""
    import secrets
    return "".join(secrets.choice(_LETTERS) for _ in range(length))


def same(one: bytes, other: bytes) -> bool:
    """Whether two secrets are the same, in a time that does not tell how much of them is."""
    import hmac
    return hmac.compare_digest(one, other)


def new_id() -> str:
    """A random UUID (RFC 4122 4.4); the uuid module takes three times as long."""
    digits = os.urandom(16).hex()
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


class _Inbox:
    """An address and what is known of it.  The Store's own; others see an InboxView."""

    __slots__ = ("name", "address", "servers", "acquired", "expires", "cost", "held", "latest",
                 "attempts", "failures")

    def __init__(self, address: str, acquired: bool, expires: float, cost: int, latest: int,
                 failures: Tuple[Failure, ...] = ()):
        self.name = inbox_key(address)
        self.address = address
        self.servers = servers_of(self.name)
        self.acquired = acquired         # by a request; else it came with a mail
        self.expires = expires           # on the Store's clock
        self.cost = cost                 # octets of memory without its mail
        self.held = 0                    # octets of its mail
        self.latest = latest             # number of the event that opened it, or of its last mail
        self.attempts = 0                # RCPT commands for it, MAIL commands that it failed
        self.failures = failures


class Store:
    """Inboxes that expire, the messages that they hold, and what happened to them.

    A folder is a dict of messages in the order of arrival; its name is that of an inbox, or "@"
    and a server id.  A message lives while an inbox holds it; servers only list it.  Its keys are
    numbers, since those have their places side by side; the default server's are ids.
    `clock` gives seconds that only grow, `wall` seconds since 1970; tests pass their own.
    """

    def __init__(self, limits: Limits = Limits(), domain: str = "mailtest.example",
                 strict: bool = False, clock: Callable[[], float] = time.monotonic,
                 wall: Callable[[], float] = time.time):
        self.limits = limits
        self.domain = domain
        self.strict = strict             # only acquired inboxes take mail
        self.wall = wall
        self.started = wall()
        self._clock = clock
        self._lock = threading.RLock()
        self.closed = False              # the catcher is stopping: nobody should wait
        # Who waits, by the name of a folder ("" for any), and how many there are of each kind.
        # One Condition for all would wake all: with 200 who wait each mail then costs 0.45 ms
        # more (measured in pairs).
        self._waiting: Dict[str, List[threading.Condition]] = {}
        self._waiters = {"mail": 0, "events": 0}
        self._alarm = threading.Condition(self._lock)          # wakes keep_expiring()
        self._folders: Dict[str, Dict[Any, Message]] = {"@" + DEFAULT_SERVER: {}}
        self._all = self._folders["@" + DEFAULT_SERVER]
        self._inboxes: "collections.OrderedDict[str, _Inbox]" = (
            collections.OrderedDict())                         # in the order in which they end
        self._ended: "collections.OrderedDict[str, Tuple[float, str, bool]]" = (
            collections.OrderedDict())                         # when, how, whether acquired
        # Messages that inboxes need not hold any longer, with the names of those: let go by and
        # by, so that nobody waits for the lock until an inbox of 100,000 mails has ended.
        self._due = math.inf             # nothing ends before this
        self._released: "collections.deque[Iterator[Tuple[Message, str]]]" = collections.deque()
        self._watches: Dict[str, Watch] = {}                   # on this clock, by inbox
        self._names: Dict[str, str] = {}                       # servers that have a name
        self._devices: Dict[str, Dict[str, str]] = {}
        self._octets = 0                                       # of messages and inboxes, with cost
        self._reserved = 0                                     # of what is still arriving
        self._of_client: "collections.Counter[str]" = collections.Counter()    # its octets
        self.number = 0                                        # of the latest event
        self._latest_time = 0.0                                # no two messages have one time
        self._ahead = wall() - clock()                         # of the clock that only grows
        self._events: "collections.deque[Tuple[int, str, Any, Tuple[str, ...]]]" = (
            collections.deque(maxlen=limits.events))           # as in Event, and their places
        self._forgotten = 0                                    # the latest event that is not kept
        self._sessions: "collections.deque[SessionRecord]" = collections.deque(
            maxlen=limits.sessions)
        self._session_count = 0
        self._accepted: "collections.Counter[str]" = collections.Counter()     # by kind
        self._hours: "collections.Counter[Tuple[float, str]]" = collections.Counter()
        self._polls: "collections.OrderedDict[int, float]" = collections.OrderedDict()
        self._requests: "collections.OrderedDict[str, List[float]]" = (
            collections.OrderedDict())                         # the last minute's, by client
        self._following = 0                                    # event streams
        self.client_seen = 0.0                                 # when the latest SMTP session began
        self.scripts = 0                                       # inboxes that have one, open now

    def __enter__(self) -> None:
        """Takes the lock and ends what is due: so begins each method."""
        self._lock.acquire()
        try:
            self._expire()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *exception: Any) -> None:
        self._lock.release()

    # -- inboxes

    def acquire(self, failures: Tuple[Failure, ...] = ()) -> InboxView:
        """A new inbox with an unguessable address that was never handed out before."""
        if len(failures) > self.limits.failures:
            raise ValueError(f"expected at most {self.limits.failures} times fail=, "
                             f"got {len(failures)}")
        with self:
            address = ""
            while not address or inbox_key(address) in self._inboxes:
                address = f"test-{_random_name(13)}@{self.domain}"
            inbox = self._open(address, True, failures)
            self._happened("inbox", {
                "address": address, "expires": iso_time(self._when(inbox.expires))}, inbox.name)
            return self._view(inbox)

    def inbox(self, address: str) -> InboxView:
        """What there is to say of an inbox; Unknown says when it ended if it did."""
        with self:
            return self._view(self._find(address))

    def inboxes(self) -> List[InboxView]:
        """All inboxes, the one with the newest mail first."""
        with self:
            now = self._clock()
            views = [self._view(inbox) for inbox in self._inboxes.values()
                     if inbox.expires > now and not inbox.name.startswith(_OUTBOX)]
        return sorted(views, key=lambda view: view.latest, reverse=True)

    def drop_inbox(self, address: str) -> None:
        """Ends an inbox and its mail."""
        with self:
            self._end(self._find(address), "deleted")
        self._settle()

    def empty_inbox(self, address: str) -> None:
        """Ends an inbox's hold on its mail; the inbox stays."""
        with self:
            inbox = self._find(address)
            self._release(inbox)
            self._folders[inbox.name] = {}
            self._happened("emptied", {"address": inbox.address}, inbox.name)
        self._settle()

    def refusal(self, address: str) -> str:
        """Why mail to the address is not taken, "" if it is.  Counts the attempt."""
        with self:
            inbox = self._taker(address)
            if inbox is not None:
                inbox.attempts += 1
            if self.strict and (inbox is None or not inbox.acquired):
                return str(self._unknown(inbox_key(address))
                           or "no such inbox; acquire it first (--strict)")
        return ""

    def scripted(self, stage: str, address: str) -> Optional[Failure]:
        """The failure that the inbox answers with at this stage, now counted; else None."""
        with self:
            inbox = self._taker(address)
            for failure in inbox.failures if inbox is not None else ():
                if failure.stage == stage and failure.answered < failure.times:
                    failure.answered += 1
                    if stage == "mail":
                        inbox.attempts += 1
                    return failure
        return None

    def watch(self, address: str, within: float) -> InboxView:
        """Awaits the next call within so many seconds; if it does not come, the inbox gets one
        mail about that.  Opens an inbox that is not there, as a mail would."""
        if not (0 < within <= self.limits.ttl):
            raise ValueError(f"expected within to be seconds, more than 0 and at most the "
                             f"{self.limits.ttl:g} that an inbox lives, got {within:g}")
        if not (address.isprintable() and " " not in address and 2 < address.find("@") + 2
                <= len(address) <= 320):
            raise ValueError(f"expected an address, got {address[:80]!r}")
        with self:
            inbox = self._find(address) if self.strict else (
                self._taker(address) or self._open(address))
            if inbox.name not in self._watches and len(self._watches) >= self.limits.watches:
                raise Full(f"{self.limits.watches} watches are set")
            self._watches[inbox.name] = Watch(within, self._clock() + within, False)
            self._touch(inbox)
            self._alarm.notify()
            return self._view(inbox)

    def unwatch(self, address: str) -> None:
        """Awaits no call any longer."""
        with self:
            self._watches.pop(self._find(address).name, None)

    # -- messages

    def deliver(self, message: Message, server: str = "") -> None:
        """Keeps a message in the inbox of each recipient; one that was sent, in the outbox of
        `server`.  It is listed under its recipients' servers, that of the user of AUTH, and
        `server` if one is given.

        Raises Full, and nothing is kept.  When this returns everyone can see the message.
        """
        keys = ([_OUTBOX + server] if message.direction == "Sent" else
                list(map(inbox_key, message.envelope.forward_paths)))
        with self:
            self._take(message, keys, server)

    def message(self, id: str) -> Message:
        """The message of that id."""
        with self:
            message = self._all.get(id.lower())
            if message is None:
                raise Unknown(f"no message has the id {id[:80]!r}; it may be deleted or expired")
            return message

    def messages(self, address: str = "", server: str = "", after: int = 0,
                 timeout: float = 0.0) -> List[Message]:
        """The messages of an inbox, or of a server, with a number above `after`, newest first.

        With a timeout it waits for the first one: until then, or until the inbox ends or the
        store closes.  Raises Full, Ended for an inbox to which nothing will come any more, and
        Unknown when the inbox ends meanwhile.
        """
        with self:
            name = self._folder(address, server)
            there = name in self._folders
            if not there and isinstance(self._unknown(name), Ended):
                self._find(name)
            found = self._after(name, after)
            if found or timeout <= 0 or self.closed:
                return found
            if self._waiters["mail"] >= self.limits.waiters:
                raise Full(f"{self.limits.waiters} requests are waiting for mail")
            self._wait("mail", (name,), timeout)
            if there and address and name not in self._folders:
                self._find(name)
            return self._after(self._folder(address, server), after)

    def see(self, id: str, seen: bool = True) -> None:
        """Marks a message as read, or as not read."""
        with self:
            message = self.message(id)
            if message.seen != seen:
                message.seen = seen
                self._happened("seen", {"id": message.id, "seen": seen}, *message.inboxes)

    def delete(self, id: str) -> None:
        """Ends one message, whoever holds it."""
        with self:
            self._remove(self.message(id))

    def empty(self, server: str) -> None:
        """Ends all messages of a server; of the default server: all there are."""
        with self:
            doomed = list(self._folders.get("@" + server, {}).values())
            self._released.append((message, name) for message in doomed
                                  for name in tuple(message.inboxes))
            self._due = 0.0
            self._happened("emptied", {"server": server},
                           *{name for message in doomed for name in message.inboxes})
        self._settle()

    def keep(self, message: Message, summary: bytes) -> None:
        """Keeps the JSON of a message that lists show, if there is room for it."""
        with self:
            cost = len(summary) - len(message.summary or b"")
            if message.id in self._all and (
                    self._octets + self._reserved + cost <= self.limits.max_memory):
                message.summary = summary
                self._octets += cost

    # -- what happens

    def events(self, after: int, timeout: float,
               inboxes: Iterable[str] = ()) -> Tuple[List[Event], int, bool]:
        """The events after that number, of these inboxes if any are given, waited for up to
        `timeout` seconds; the number to go on from; whether some are no longer kept."""
        names = tuple(map(inbox_key, inboxes))
        with self:
            found, lost = self._events_after(after, names)
            if not (found or lost or self.closed):
                self._wait("events", names or ("",), timeout)
                found, lost = self._events_after(after, names)
            return found, self.number, lost

    @contextlib.contextmanager
    def follower(self) -> Iterator[None]:
        """Counts one who follows the events; Full if there are too many."""
        with self:
            if self._following >= self.limits.followers:
                raise Full(f"{self.limits.followers} others follow the events")
            self._following += 1
        try:
            yield
        finally:
            with self:
                self._following -= 1

    def close(self) -> None:
        """Wakes everyone who waits; nobody waits again."""
        with self:
            self.closed = True
            self._alarm.notify_all()
            self._wake(self._waiting)

    def keep_expiring(self) -> None:
        """Ends what is due, and tells of calls that did not come, until the store is closed: the
        body of a thread."""
        with self:
            while not self.closed:
                self._expire()
                now = self._clock()
                pauses = [self._tell(name, now) for name in list(self._watches)]
                pauses.extend(inbox.expires - now
                              for inbox in itertools.islice(self._inboxes.values(), 1))
                self._alarm.wait(0.002 if self._released else max(0.05, min([5.0, *pauses])))

    # -- memory

    def reserve(self, octets: int) -> None:
        """Counts octets that are still arriving; Full if there is no room for them."""
        with self:
            self._check_room(octets)
            self._reserved += octets

    def release(self, octets: int) -> None:
        """Gives back what was reserved."""
        with self:
            self._reserved -= octets

    # -- sessions, polling, rates

    def add_session(self, record: SessionRecord) -> None:
        """Remembers a finished session; one that was refused something is an event too."""
        with self:
            self._session_count += 1
            self._sessions.append(record._replace(number=self._session_count))
            if record.refused or (record.ending != "quit" and not record.accepted):
                self._happened("session", {"number": self._session_count, "client": record.client,
                                           "refused": record.refused, "ending": record.ending}, "")

    def sessions(self) -> List[SessionRecord]:
        """The finished sessions that are remembered, newest first."""
        with self:
            return list(reversed(self._sessions))

    def polled_again(self, key: Any) -> bool:
        """Whether the same search was answered a moment ago: its client is polling."""
        with self:
            answered = self._polls.pop(hash(key), None)
            return answered is not None and self._clock() - answered <= self.limits.repoll

    def poll_answered(self, key: Any) -> None:
        """Remembers that a search was answered with nothing."""
        with self:
            self._polls[hash(key)] = self._clock()
            while len(self._polls) > self.limits.polls:
                self._polls.popitem(last=False)

    def rate(self, client: str) -> float:
        """Counts a request of the client; the seconds until it may be made, 0.0 for now.  Any
        minute may have so many (`limits.rate`)."""
        with self:
            if not self.limits.rate:
                return 0.0
            now = self._clock()
            times = [each for each in self._requests.pop(client, ()) if each > now - 60]
            wait = times[0] + 60 - now if len(times) >= self.limits.rate else 0.0
            self._requests[client] = times if wait else times + [now]
            if len(self._requests) > self.limits.rate_clients:
                self._requests.popitem(last=False)
            return wait

    # -- servers and devices

    def servers(self) -> Dict[str, str]:
        """Names of all servers by id: the default one, the named ones, those that hold mail."""
        with self:
            found = {DEFAULT_SERVER: "Every message"}
            found.update(self._names)
            for name in self._folders:
                if name[:1] == "@":
                    found.setdefault(name[1:], name[1:])
            return found

    def count(self, server: str) -> int:
        """How many messages a server holds."""
        with self:
            return len(self._folders.get("@" + server, ()))

    def name_server(self, server: str, name: str) -> None:
        """Makes a server, or gives it another name; "" ends it (empty() ends its messages)."""
        with self:
            if server not in self._names and len(self._names) >= self.limits.servers:
                raise Full(f"{self.limits.servers} servers exist")
            self._names[server] = name
            if not name:
                del self._names[server]

    def is_ours(self, address: str, server: str = "") -> bool:
        """Whether mail to the address belongs into this catcher: an open acquired inbox, our
        domain, that server's or a named one's."""
        key = inbox_key(address)
        with self:
            inbox = self._taker(address)
            return bool(inbox is not None and inbox.acquired
                        or key.rpartition("@")[2] == inbox_key("x@" + self.domain)[2:]
                        or any(each == server or each in self._names for each in servers_of(key)))

    def devices(self) -> List[Dict[str, str]]:
        """The devices: id, name, sharedSecret."""
        with self:
            return list(self._devices.values())

    def add_device(self, name: str, secret: str) -> Dict[str, str]:
        """A new device; Full beyond the bound."""
        with self:
            if len(self._devices) >= self.limits.devices:
                raise Full(f"{self.limits.devices} devices exist")
            device = {"id": new_id(), "name": name, "sharedSecret": secret}
            self._devices[device["id"]] = device
            return device

    def drop_device(self, id: str) -> None:
        """Ends a device."""
        with self:
            if self._devices.pop(id, None) is None:
                raise Unknown(f"no device has the id {id[:80]!r}")

    def counters(self) -> Dict[str, Any]:
        """What the store holds and has seen."""
        with self:
            return {"messages": len(self._all), "inboxes": len(self._inboxes),
                    "unseen": sum(not message.seen for message in self._all.values()),
                    "octets": self._octets + self._reserved, "max_memory": self.limits.max_memory,
                    "accepted": self._accepted["Email"], "sms": self._accepted["SMS"],
                    "sessions": self._session_count, "events": self.number,
                    "waiters": self._waiters["mail"]}

    def transactions(self) -> List[Tuple[float, int, int]]:
        """The last 24 hours, newest first: when each began, mails and SMS accepted in it."""
        with self:
            this = int(max(self.wall(), self._latest_time) // 3600)
            return [(hour * 3600.0, self._hours[hour, "Email"], self._hours[hour, "SMS"])
                    for hour in range(this, this - 24, -1)]

    # -- the lock is held from here on, but for _settle

    def _take(self, message: Message, keys: Iterable[str], server: str = "") -> None:
        """Numbers a message and puts it into every folder where it belongs, or raises Full."""
        limits, user = self.limits, message.envelope.user
        user = user and user.partition("@")[0].lower()[:80]
        found = {}
        for key in keys:
            known = self._inboxes.get(key) or self._untagged(key)
            found[known.name if known else key] = known
        new = [name for name, known in found.items() if known is None]
        message.cost = (len(message.octets) + sum(map(len, message.session))
                        + sum(map(len, message.envelope.forward_paths))
                        + limits.message_cost + limits.place_cost * len(found))
        self._check_room(message.cost, new)
        if limits.client_octets or limits.inbox_octets or limits.inbox_messages:
            self._check_shares(message, found.values())
        self._stamp(message)
        for name in new:
            found[name] = self._open(name)
            found[name].attempts = int(bool(message.session))    # nobody could count its RCPT
        message.inboxes = dict.fromkeys(found)
        inboxes = list(found.values())
        if server or user or len(inboxes) != 1:
            message.servers = tuple(filter(None, dict.fromkeys(itertools.chain(
                (server,), *[inbox.servers for inbox in inboxes], (user,)))))
        else:                            # as of most mails: one tuple for all of an inbox
            message.servers = inboxes[0].servers
        number, folders = message.number, self._folders
        for inbox in inboxes:
            folders[inbox.name][number] = message
            inbox.latest = number
            inbox.held += message.cost
            self._touch(inbox)
        self._all[message.id] = message
        for id in message.servers:
            if id != DEFAULT_SERVER:
                if "@" + id not in folders:
                    folders["@" + id] = {}
                folders["@" + id][number] = message
        self._octets += message.cost
        self._of_client[message.envelope.client] += message.cost
        self._happened("message", {"id": message.id}, *found)
        if self._waiting:
            self._wake(["@" + id for id in {*message.servers, DEFAULT_SERVER}])
        while 0 < limits.keep < len(self._all):
            self._remove(next(iter(self._all.values())))

    def _stamp(self, message: Message) -> None:
        """Gives a message its number and its time, which no other has; a clock that somebody has
        set back is believed."""
        now = self.wall()
        if self._latest_time - 1.0 < now <= self._latest_time:
            now = self._latest_time + 1e-6
        message.received = self._latest_time = now
        message.number = self.number + 1             # of the event of its arrival
        self._accepted[message.kind] += 1
        self._hours[now // 3600, message.kind] += 1
        if len(self._hours) > 100:                   # more than a day
            del self._hours[min(self._hours)]

    def _check_room(self, octets: int, new: Sequence[str] = ()) -> None:
        """Full if these octets and new inboxes are too much."""
        if new:
            octets += sum(map(self._cost, new))
            if len(self._inboxes) + len(new) > self.limits.inboxes:
                raise Full(f"{self.limits.inboxes} inboxes are open")
        if self._octets + self._reserved + octets > self.limits.max_memory:
            raise Full(f"the {self.limits.max_memory} octets of --max-memory are in use")

    def _check_shares(self, message: Message, inboxes: Iterable[Optional[_Inbox]]) -> None:
        """Full if an inbox or a client would have more than its share (see --hosted)."""
        limits, client = self.limits, message.envelope.client    # no client: it came over HTTP
        if client and 0 < limits.client_octets < message.cost + self._of_client[client]:
            raise Full(f"the client has {limits.client_octets} octets of mail here; some must end")
        for inbox in filter(None, inboxes):
            if 0 < limits.inbox_messages <= len(self._folders[inbox.name]) or (
                    0 < limits.inbox_octets < inbox.held + message.cost):
                raise Full(f"the inbox {inbox.name[:80]!r} is full; delete mail of it")

    def _cost(self, name: str) -> int:
        return self.limits.inbox_cost + 4 * len(name)    # its name, address, servers

    def _untagged(self, key: str) -> Optional[_Inbox]:
        """The acquired inbox of local@domain for the key of local+tag@domain."""
        inbox = self._inboxes.get(untagged(key)) if "+" in key else None
        return inbox if inbox is not None and inbox.acquired else None

    def _taker(self, address: str) -> Optional[_Inbox]:
        """The open inbox that takes mail for an address."""
        key = inbox_key(address)
        inbox = self._inboxes.get(key) or self._untagged(key)
        if inbox is not None and inbox.expires <= self._clock():
            self._end(inbox, "expired")  # others are due before it
            return None
        return inbox

    def _open(self, address: str, acquired: bool = False,
              failures: Tuple[Failure, ...] = ()) -> _Inbox:
        self._check_room(0, [address])
        inbox = _Inbox(address, acquired, self._clock() + self.limits.ttl, self._cost(address),
                       self.number + 1, failures)
        self.scripts += bool(failures)
        self._octets += inbox.cost
        self._inboxes[inbox.name] = inbox
        self._folders[inbox.name] = {}
        self._due = min(self._due, inbox.expires)
        return inbox

    def _touch(self, inbox: _Inbox) -> None:
        """An inbox that came with a mail lives on from its latest one."""
        if not inbox.acquired:
            inbox.expires = self._clock() + self.limits.ttl
            self._inboxes.move_to_end(inbox.name)

    def _find(self, address: str) -> _Inbox:
        inbox = self._taker(address)
        if inbox is None or inbox.name.startswith(_OUTBOX):
            raise self._unknown(inbox_key(address)) or NeverSeen(
                f"no inbox {address[:320]!r}; acquire one"
                f"{'' if self.strict else ', or send mail to it first'}")
        return inbox

    def _unknown(self, key: str) -> Optional[Unknown]:
        """What is remembered of an inbox that has ended, None if nothing is."""
        for known in (key, untagged(key)):
            if known in self._ended:
                when, how, acquired = self._ended[known]
                return (Ended if acquired else Unknown)(
                    f"the inbox {known!r} {'was ' * (how == 'deleted')}{how} at {iso_time(when)}; "
                    + ("acquire a new one" if acquired or self.strict else
                       "the next mail to it opens it again"))
        return None

    def _view(self, inbox: _Inbox) -> InboxView:
        folder, watch = self._folders[inbox.name], self._watches.get(inbox.name)
        return InboxView(inbox.address, inbox.acquired, self._when(inbox.expires),
                         len(folder), inbox.attempts,
                         tuple((failure.text, failure.answered, failure.times - failure.answered)
                               for failure in inbox.failures),
                         sum(not message.seen for message in folder.values()), inbox.latest,
                         watch and watch._replace(due=self._when(watch.due)))

    def _when(self, due: float) -> float:
        """Seconds since 1970, the same whenever it is asked for, unless somebody sets the time."""
        ahead = self.wall() - self._clock()
        if abs(ahead - self._ahead) > 0.05:
            self._ahead = ahead
        return self._ahead + due

    def _folder(self, address: str, server: str = "") -> str:
        """The name of the folder of a server, or of the inbox that takes mail for an address."""
        if server:
            return "@" + server
        inbox = self._taker(address)
        name = inbox_key(address) if inbox is None else inbox.name
        return "" if name.startswith(_OUTBOX) else name

    def _after(self, name: str, number: int) -> List[Message]:
        """The messages of a folder after that number, newest first."""
        return list(itertools.takewhile(lambda message: message.number > number,
                                        reversed(self._folders.get(name, {}).values())))

    # Ending

    def _expire(self) -> None:
        """Ends what is due, not more at once than takes a few milliseconds."""
        if self._clock() < self._due:
            return
        now = self._clock()
        for _ in range(500):
            inbox = next(iter(self._inboxes.values()), None)
            if inbox is None or inbox.expires > now:
                break
            self._end(inbox, "expired")
        if self._released:
            self._let_go()
        first = next(iter(self._inboxes.values()), None)
        self._due = 0.0 if self._released else first.expires if first else math.inf

    def _end(self, inbox: _Inbox, how: str) -> None:
        del self._inboxes[inbox.name]
        self._watches.pop(inbox.name, None)
        self._release(inbox)
        self.scripts -= bool(inbox.failures)
        self._octets -= inbox.cost
        when = self._when(inbox.expires) if how == "expired" else self.wall()
        self._ended.pop(inbox.name, None)            # so that it is remembered as the latest
        self._ended[inbox.name] = (when, how, inbox.acquired)
        while len(self._ended) > self.limits.expired_kept:
            self._ended.popitem(last=False)
        self._happened(how, {"address": inbox.address}, inbox.name)

    def _release(self, inbox: _Inbox) -> None:
        """Takes its folder from an inbox; the messages are let go by and by."""
        folder, name, inbox.held = self._folders.pop(inbox.name), inbox.name, 0
        self._due = 0.0
        self._released.append((message, name) for message in folder.values())

    def _let_go(self) -> None:
        """Lets some of the released messages go, for a few milliseconds at most."""
        for _ in range(2_000):
            if not self._released:
                break
            released = next(self._released[0], None)
            if released is None:
                self._released.popleft()
            else:
                self._unhold(*released)

    def _remove(self, message: Message) -> None:
        """Ends a message, whoever holds it."""
        names = tuple(message.inboxes)
        for name in names:
            self._unhold(message, name)
        self._happened("deleted", {"id": message.id, "inboxes": names}, *names)

    def _unhold(self, message: Message, name: str) -> None:
        """An inbox holds a message no longer; with the last one it ends."""
        if name not in message.inboxes:
            return                       # it was deleted since it was released
        del message.inboxes[name]
        if self._folders.get(name, {}).pop(message.number, None) is not None:
            self._inboxes[name].held -= message.cost
        if message.inboxes:
            return
        del self._all[message.id]
        self._octets -= message.cost + len(message.summary or b"")
        message.summary = None
        self._of_client[message.envelope.client] -= message.cost
        if not self._of_client[message.envelope.client]:
            del self._of_client[message.envelope.client]
        for folder in ["@" + server for server in message.servers if server != DEFAULT_SERVER]:
            del self._folders[folder][message.number]
            if not self._folders[folder]:
                del self._folders[folder]

    def _tell(self, name: str, now: float) -> float:
        """Delivers the mail about a call that did not come in time; the seconds until then."""
        watch, address = self._watches[name], self._inboxes[name].address
        if watch.told or watch.due > now:
            return watch.due - now if not watch.told else 5.0
        octets = (f"From: mailtest <no-reply@{self.domain}>\r\nTo: <{address}>\r\n"
                  f"Subject: No call within {watch.within:g} seconds\r\n"
                  f"Date: {email.utils.formatdate(self.wall())}\r\n"
                  f"Message-ID: <{new_id()}@mailtest.example>\r\nMIME-Version: 1.0\r\n"
                  "Content-Type: text/plain; charset=utf-8\r\n"
                  "Content-Transfer-Encoding: 8bit\r\n\r\n"
                  f"/v1/watch/{address} was not called for {watch.within:g} seconds.\r\n")
        try:
            self._take(Message(new_id(), octets.encode(), Envelope(None, (address,))), [name])
        except Full:
            return 1.0                   # then it is tried again
        self._watches[name] = watch._replace(told=True)
        return 5.0

    # Telling

    def _happened(self, kind: str, data: Dict[str, Any], *places: str) -> None:
        """Numbers an event, and wakes whoever waits for it at these places: names of folders;
        none if it may be about any of them."""
        self.number += 1
        if len(self._events) == self._events.maxlen:
            self._forgotten = self._events[0][0] if self._events else self.number
        self._events.append((self.number, kind, data, places))
        if self._waiting:
            self._wake(("", *places) if places else list(self._waiting))

    def _wake(self, names: Iterable[str]) -> None:
        for name in names:
            for condition in self._waiting.get(name, ()):
                condition.notify()

    def _wait(self, what: str, names: Iterable[str], timeout: float) -> None:
        """Gives the lock to others until something happens in one of these folders."""
        condition = threading.Condition(self._lock)
        for name in names:
            self._waiting.setdefault(name, []).append(condition)
        self._waiters[what] += 1
        try:
            condition.wait(timeout)
        finally:
            self._waiters[what] -= 1
            for name in names:
                self._waiting[name].remove(condition)
                if not self._waiting[name]:
                    del self._waiting[name]

    def _events_after(self, number: int, names: Tuple[str, ...]) -> Tuple[List[Event], bool]:
        """The events after that number, and whether some of them are no longer kept."""
        found = itertools.takewhile(lambda each: each[0] > number, reversed(self._events))
        return [Event(*event) for *event, places in found
                if not names or any(name in places for name in names)][::-1], (
            number < self._forgotten)

    def _settle(self) -> None:
        """Lets all released messages go, and others have the lock in between."""
        while self._released:
            with self:
                pass
            if self._released:
                time.sleep(0.001)


class Abandoned(Exception):
    """Whoever waited has hung up."""


def collect(store: Store, match: Callable[[Message], bool], count: int, timeout: float,
            after: int = 0, abandoned: Callable[[], bool] = lambda: False,
            **place: str) -> List[Message]:
    """The messages of a place (see Store.messages) with a number above `after` that match, newest
    first: at once if there are `count`, else those there are after `timeout` seconds.

    Each message is looked at once, outside the lock.  Raises Abandoned and what messages() does.
    """
    until = time.monotonic() + timeout
    found: List[Message] = []
    new = store.messages(after=after, **place)
    while True:
        found[:0] = filter(match, new)
        left = until - time.monotonic()
        if len(found) >= count or left <= 0 or store.closed:
            return found
        if abandoned():
            raise Abandoned(place)
        after = new[0].number if new else after
        new = store.messages(after=after, timeout=min(left, 1.0), **place)   # then looks again


def silence(store: Store, address: str, since: float) -> List[str]:
    """What may explain that an inbox got nothing since that time: lines for a report."""
    own = untagged(inbox_key(address))
    came = list(itertools.takewhile(lambda message: message.received > since,
                                    store.messages(server=DEFAULT_SERVER)))[:100]
    others = list(dict.fromkeys(path for message in came for path in message.envelope.forward_paths
                                if untagged(inbox_key(path)) != own))
    lines = ["mail to other addresses since: " + ", ".join(others[:5])
             + ", ..." * (len(others) > 5)] if others else []
    sessions = [record for record in store.sessions() if record.ended >= since]
    refused = [record.refused for record in sessions if record.refused]
    broken = [record.ending for record in sessions
              if record.ending != "quit" and not record.refused and not record.accepted]
    for what, texts in (("refused", refused), ("broken", broken)):
        if texts:
            lines.append(f"SMTP sessions that were {what}: {len(texts)}, the last: {texts[0]}")
    if not came and store.client_seen < since:
        lines.append("no SMTP client has connected since: is the application set to this host "
                     "and port? (test modes replace the mailer: Django's locmem, Flask-Mail's "
                     "TESTING, Rails' :test, Laravel's array)")
    return lines


# ---- SMTP session ----------------------------------------------------------
# One session by RFC 5321: octets in, octets out; no socket, no thread.
# A refusal is raised, a success is returned; receive() sends and notes both.

@functools.lru_cache(maxsize=256)        # 6 % of the mail a second with a connection each
def reply(code: int, status: str, *lines: str) -> bytes:
    """A reply (RFC 5321 4.2) with its enhanced status code (RFC 2034, 3463), "" for none.

    It is ASCII, since nobody announced SMTPUTF8 for replies.
    """
    start = f"{status} " if status else ""
    ends = "-" * (len(lines) - 1) + " "
    return "".join(f"{code}{end}{start}{line}\r\n" for end, line in zip(ends, lines)).encode(
        "ascii", "backslashreplace")


_OK = reply(250, "2.0.0", "Ok")
BROKE = "broke the connection"           # how a session ends whose connection is reset


class Refuse(Exception):
    """A command is refused with this reply."""

    def __init__(self, code: int, status: str, text: str):
        super().__init__(text)
        self.reply = reply(code, status, text)


class Drop(Exception):
    """The connection is to be closed, after a reply if there is one; the text says why."""

    def __init__(self, why: str, reply: bytes = b""):
        super().__init__(why)
        self.reply = reply


class SmtpPolicy(NamedTuple):
    """How this catcher was started, as far as SMTP is concerned."""

    hostname: str = "mailtest.example"
    starttls: bool = False               # there is a certificate, and TLS was asked for
    users: Dict[str, str] = {}           # user to password; empty: any will do
    require: Tuple[str, ...] = ()        # "auth": MAIL needs it; "tls": MAIL and AUTH need it


class Command(NamedTuple):
    """A command: its syntax, as HELP shows it; the phases of a session in which it may come; what
    its argument means; what it does with that."""

    syntax: str
    phases: str
    read: Callable[[str], Any]
    run: Callable[["Session", Any], Optional[bytes]]


COMMANDS: Dict[bytes, Command] = {}


def command(syntax: str, phases: str = "new idle mail rcpt",
            read: Callable[[str], Any] = str) -> Callable:
    """Makes a method the command that the syntax begins with; its HELP and its 503 follow.

    `read` looks at nothing but the argument, and what it returns never changes: see read_line().
    """
    def register(run: Callable[["Session", Any], Optional[bytes]]) -> Callable:
        COMMANDS[syntax.split()[0].encode()] = Command(syntax, phases, read, run)
        return run
    return register


# Paths and their parameters

_ATOM = r'[^\s<>()\[\]\\,;:@"]'
_PATH = (rf'<(?:(?:@[^\s:<>]*:)?((?:"(?:[^"\\]|\\.)*"|{_ATOM}+)'
         rf'(?:@(?:\[[^\s\[\]\\<>]*\]|{_ATOM}*))?))?>'
         r'(?: +(.*?))? *')
_MAIL = re.compile("FROM: *" + _PATH, re.I)
_RCPT = re.compile("TO: *" + _PATH, re.I)
_LABEL = re.compile(r"(?!-)[^\x00-,./:-@\[-^`{-\x7f]{1,63}")     # letters, digits, - and _


def _is_domain(domain: str) -> bool:
    """Whether it is a domain or an address literal (RFC 5321 4.1.2, 4.1.3; RFC 6531 3.3)."""
    if not domain.startswith("["):
        return len(domain) <= 255 and all(map(_LABEL.fullmatch, domain.split(".")))
    literal = domain[1:-1]
    family = socket.AF_INET6 if literal[:5].upper() == "IPV6:" else socket.AF_INET
    try:
        socket.inet_pton(family, literal[5:] if family == socket.AF_INET6 else literal)
    except (OSError, ValueError):        # not an address of that family
        return False
    return True


def _path_parameters(text: Optional[str]) -> Dict[str, Optional[str]]:
    """SIZE=1000 BODY=8BITMIME -> {"SIZE": "1000", "BODY": "8BITMIME"}; None where no value is."""
    found: Dict[str, Optional[str]] = {}
    for word in (text or "").split():
        name, equals, value = word.partition("=")
        if name.upper() in found:
            raise Refuse(501, "5.5.4", f"Parameter {_seen(name)} was given twice")
        found[name.upper()] = value if equals else None
    return found


def _check_known(given: Dict[str, Optional[str]], known: str) -> None:
    """Refuses the parameters that are left when the known ones are taken out."""
    for name in given:
        raise Refuse(555, "5.5.4", f"Unknown parameter {_seen(name)}: expected {known}")


def _check_ascii(path: str, utf8: bool) -> None:
    """RFC 6531 3.2: an address beyond ASCII needs SMTPUTF8 on MAIL."""
    if not path.isascii() and not utf8:
        raise Refuse(553, "5.6.7", f"Expected an ASCII address, or SMTPUTF8 on MAIL; "
                                   f"got {_seen(path)}")


def read_mail(argument: str) -> Tuple[str, bool, bool, int]:
    """What MAIL says: the reverse-path, whether BODY=8BITMIME, whether SMTPUTF8, SIZE."""
    match = _MAIL.fullmatch(argument)
    if not match:
        raise Refuse(501, "5.5.4",
                     f"Expected MAIL FROM:<address>, got {_seen('MAIL ' + argument)}")
    path, given = match[1] or "", _path_parameters(match[2])
    utf8 = "SMTPUTF8" in given
    if given.pop("SMTPUTF8", None) is not None:
        raise Refuse(501, "5.5.4", "Expected SMTPUTF8 without a value")
    if given.pop("AUTH", "<>") is None:          # RFC 4954 5: nobody here needs to know
        raise Refuse(501, "5.5.4", "Expected AUTH=mailbox or AUTH=<>")
    size = given.pop("SIZE", "0") or ""
    if not re.fullmatch("[0-9]{1,20}", size):    # RFC 1870 4
        raise Refuse(501, "5.5.4", f"Expected SIZE=octets, got {_seen(size)}")
    body = (given.pop("BODY", "7BIT") or "").upper()
    if body not in ("7BIT", "8BITMIME"):
        raise Refuse(501, "5.5.4", f"Expected BODY=7BIT or BODY=8BITMIME, got {_seen(body)}")
    _check_known(given, "SIZE, BODY, SMTPUTF8 or AUTH")
    local, _, domain = path.rpartition("@")
    if domain and local and not _is_domain(domain):      # an empty one is a real client's
        raise Refuse(501, "5.1.7", f"Expected a domain or address literal, got {_seen(domain)}")
    _check_ascii(path, utf8)
    return path, body == "8BITMIME", utf8, int(size)


def read_rcpt(argument: str) -> str:
    """The forward-path that stands behind RCPT."""
    match = _RCPT.fullmatch(argument)
    if not match or not match[1]:
        raise Refuse(501, "5.5.4", f"Expected RCPT TO:<address>, got {_seen('RCPT ' + argument)}")
    path = match[1]
    _check_known(_path_parameters(match[2]), "none")
    _, at, domain = path.rpartition("@")
    if at and not _is_domain(domain) or not at and path.lower() != "postmaster":
        raise Refuse(501, "5.1.3", f"Expected local-part@domain, got {_seen(path)}")
    return path


# Authentication.  Each mechanism is a generator: it takes the client's responses (None: there was
# no initial one), yields challenges, and returns the user and a function that says whether a
# password is the one that was proved.

def _unbase64(octets: bytes) -> bytes:
    try:
        return base64.b64decode(octets, validate=True)
    except ValueError:
        raise Refuse(501, "5.5.2", "Expected base64") from None


def _plain(response: Optional[bytes]) -> Iterator[bytes]:
    """RFC 4616: authorization identity NUL user NUL password."""
    parts = ((yield b"") if response is None else response).split(b"\0")
    if len(parts) != 3 or not parts[1]:
        raise Refuse(501, "5.5.2", "Expected base64 of [identity] NUL user NUL password")
    return parts[1], lambda password: same(parts[2], password.encode())


def _login(response: Optional[bytes]) -> Iterator[bytes]:
    """The mechanism that no RFC defines; clients look for these very prompts."""
    user = response if response is not None else (yield b"Username:")
    secret = yield b"Password:"
    return user or b"?", lambda password: same(secret, password.encode())


def _cram_md5(response: Optional[bytes]) -> Iterator[bytes]:
    """RFC 2195."""
    if response is not None:
        raise Refuse(501, "5.5.4", "Expected CRAM-MD5 without an initial response")
    import hmac
    challenge = f"<{new_id()}.{int(time.time())}@mailtest>".encode()
    user, _, digest = (yield challenge).rpartition(b" ")
    if not user:
        raise Refuse(501, "5.5.2", "Expected base64 of user, blank, digest")
    return user, lambda password: same(
        digest, hmac.new(password.encode(), challenge, "md5").hexdigest().encode())


def _xoauth2(response: Optional[bytes]) -> Iterator[bytes]:
    """Google's and Microsoft's mechanism; the token is taken for a password."""
    match = re.fullmatch(rb"user=([^\x01]+)\x01auth=Bearer ([^\x01]*)\x01\x01",
                         (yield b"") if response is None else response, re.I)
    if not match:
        raise Refuse(501, "5.5.2", "Expected base64 of user=USER ^A auth=Bearer TOKEN ^A ^A")
    return match[1], lambda password: same(match[2], password.encode())


MECHANISMS = {"PLAIN": _plain, "LOGIN": _login, "CRAM-MD5": _cram_md5, "XOAUTH2": _xoauth2}


def _without_secret(line: bytes) -> bytes:
    """A line with AUTH for the transcript; whatever follows a known mechanism may be secret."""
    words = line.split(None, 2)
    if not words or words[0].upper() != b"AUTH":
        return b"********"
    known = len(words) > 1 and words[1].decode("ascii", "replace").upper() in MECHANISMS
    shown = words[:2] if known else words[:1]
    return b" ".join(shown + [b"********"] * (len(words) > len(shown)))


# Lines.  What some reader takes for a line's end is among the forbidden: controls, U+2028, U+2029.

_FORBIDDEN = re.compile(rb"[\x00-\x1f\x7f]|\xc2[\x80-\x9f]|\xe2\x80[\xa8\xa9]")
_NO_CONTROL = "Expected no control character, NUL, bare CR or bare LF in a command"
_HTTP = re.compile(rb"[A-Z]{3,20} (?:/|https?:)|Host:", re.I)
_OBSOLETE = frozenset((b"EXPN", b"TURN", b"ETRN", b"ATRN", b"SEND", b"SOML", b"SAML"))


def read_line(line: bytes) -> Tuple[Command, Any]:
    """The command that a line gives, and what its argument means, or the Refuse that it deserves:
    that is said once it is known whether the command may come now.  KeyError: it is no command."""
    verb, _, rest = line.partition(b" ")
    found = COMMANDS[verb.upper()]
    if _FORBIDDEN.search(line):
        raise KeyError
    try:
        argument = rest.decode("utf-8")
        if " " not in found.syntax and argument.strip():
            raise Refuse(501, "5.5.4", f"Expected {found.syntax} alone, got {_seen(argument)} "
                                       "after it")
        return found, found.read(argument)
    except UnicodeDecodeError:           # RFC 6531 3.1: what is not ASCII is UTF-8
        return found, Refuse(501, "5.5.2", "Expected ASCII or UTF-8")
    except Refuse as refusal:
        return found, refusal.with_traceback(None)


# What read_line() made of a line with its CRLF, and what the transcript has of it.  Senders repeat
# themselves: without it 23 % fewer mails a second on one connection that is kept.
_KNOWN_LINES: Dict[bytes, Tuple[Command, Any, bytes]] = {}
_KNOWN_LENGTH = 256                      # octets of such a line at most


# Mail data

_END = b"\r\n.\r\n"


def _end_of_data(data: bytearray, start: int) -> Tuple[int, bool]:
    """Where CRLF.CRLF begins from `start` on, -1 if nowhere; whether a dot begins another line.

    Looking from behind takes half of find()'s time, and nearly always finds the end itself:
    without that 24 % fewer mails of 100 kB a second.
    """
    last = data.rfind(b"\r\n.", start)
    if last < 0:
        return -1, False
    if data.startswith(_END, last) and data.rfind(b"\r\n.", start, last + 2) < 0:
        return last, False
    return data.find(_END, start), True


def _without_bare_dots(octets: bytes) -> bytes:
    """Mail data without the dots that smtplib doubles after a bare LF, too."""
    return re.sub(rb"(?<!\r)\n\.\.", b"\n.", octets) if b"\n.." in octets else octets


def _too_large(limits: Limits) -> Refuse:
    return Refuse(552, "5.3.4", f"Message too large: expected at most {limits.max_size} octets "
                                "(--max-size)")


class Transaction:
    """A mail transaction (RFC 5321 3.3): from MAIL until the message is in, RSET or EHLO."""

    data: Optional[bytearray] = None     # of DATA, behind a CRLF; or of BDAT
    by_chunks = False                    # BDAT
    has_dots = False                     # some line of DATA begins with a dot
    size = 0                             # octets of mail data so far, as they were sent
    reserved = 0                         # so many of them are counted in the Store
    refusal: Optional[Refuse] = None     # from then on octets are counted, not kept

    def __init__(self, reverse_path: str, eight_bit: bool, utf8: bool):
        self.reverse_path = reverse_path
        self.eight_bit = eight_bit
        self.utf8 = utf8
        self.forward_paths: List[str] = []


class Session:
    """One SMTP session.

    receive() takes octets however they were cut, and returns what to send back.  Then look at
    `pause` (wait for so many seconds before you send, then call resume()), `wants_tls` (send,
    start TLS, call tls_started()) and `ended` (send, close the connection): while one of them is
    set nothing is taken.
    """

    def __init__(self, store: Store, policy: SmtpPolicy = SmtpPolicy(), client: str = "",
                 tls: bool = False):
        self.store = store
        self.policy = policy
        self.client = client
        self.tls = tls
        self.helo = ""
        self.user = ""
        self.transaction: Optional[Transaction] = None
        self.ended = False
        self.cut_off = False             # it ended while the client may still be talking
        self.wants_tls = False
        self.pause = 0.0
        self._paused = 0.0               # seconds of all pauses so far
        self._buffer = b""
        self._skips_line = False         # the line that is arriving was refused already
        self._exchange: Any = None       # of AUTH: a generator that takes responses
        self._chunk: Optional[Tuple[int, bool]] = None         # BDAT: octets to come, LAST
        self._chunk_refusal: Optional[Refuse] = None
        self._secret_next = False        # what comes may be a secret, though it is no response
        self._bad = 0                    # commands that were none
        self._started = store.client_seen = store.wall()
        self._accepted = 0
        self._refused = ""
        self._opening: Optional[bytes] = None        # the transcript up to the first MAIL,
        self._lines: List[bytes] = []                # since the latest one, and in between
        self._past: "collections.deque[bytes]" = collections.deque(
            maxlen=store.limits.transcript_lines)    # so many of these

    @property
    def phase(self) -> str:
        """How far it has come: what a Command's phases are about."""
        transaction = self.transaction
        if transaction is None:
            return "idle" if self.helo else "new"
        return "rcpt" if transaction.forward_paths else "mail"

    @property
    def in_data(self) -> bool:
        """Mail data is arriving: a stop should wait for its end."""
        transaction = self.transaction
        return transaction is not None and transaction.data is not None

    # -- what the server calls

    def greet(self) -> bytes:
        """The greeting."""
        return self._say(reply(220, "", f"{self.policy.hostname} ESMTP mailtest"))

    def receive(self, octets: bytes) -> bytes:
        """Takes what arrived; returns all replies that it caused, to be sent at once."""
        replies: List[bytes] = []
        self._buffer = self._buffer + octets if self._buffer else octets
        while self._buffer and not (self.ended or self.wants_tls or self.pause):
            try:
                transaction = self.transaction
                if self._chunk is not None:
                    said = self._take_chunk()
                elif transaction is None or transaction.data is None or transaction.by_chunks:
                    said = self._take_line()
                else:
                    said = self._take_data()
            except Refuse as refusal:
                said = refusal.reply
                refusal.__traceback__ = None         # it may be kept, and would lead to itself
            except Drop as drop:
                replies.append(self._say(drop.reply))
                self.end(str(drop))
                break
            if said is None:             # more octets are needed
                break
            replies.append(self._say(said))
        if len(self._lines) > self.store.limits.transcript_lines:
            self._cut_part()
        return b"".join(replies)

    def resume(self) -> bytes:
        """Goes on after a pause; returns the replies to what was pipelined behind it."""
        self.pause = 0.0
        return self.receive(b"")

    def refuse(self, code: int, status: str, text: str) -> bytes:
        """Ends the session from our side; returns the last reply."""
        said = self._say(reply(code, status, text))
        self.end(text)
        return said

    def tls_started(self) -> None:
        """Forgets what was said in the clear, the rest of the buffer too (RFC 3207 4.2)."""
        self.helo = self.user = ""
        self._reset()
        self.wants_tls = False
        self.tls = True
        self._buffer = b""

    def end(self, how: str) -> None:
        """Ends the session, however it came; what was not finished is forgotten."""
        if self.ended:
            return
        self.ended = True
        if self.transaction is not None and self.in_data:
            how += f", {self.transaction.size} octets into the mail data"
        self.cut_off = how != "quit" or bool(self._buffer)
        is_probe = not self._refused and self._opening is None and self._is_probe(how)
        self._reset()
        self._buffer = b""
        self._cut_part()
        if not is_probe:
            transcript = (self._opening or b"") + b"".join(self._past) + b"".join(self._lines)
            self.store.add_session(SessionRecord(
                0, self.client, self.helo, self.user, self.tls, self._started,
                self.store.wall(), self._accepted, self._refused, how, transcript))

    def _is_probe(self, how: str) -> bool:
        """A load balancer looked whether we are alive: nothing but EHLO and QUIT came."""
        verbs = {line[3:7].upper() for line in self._lines if line.startswith(b"C: ")}
        if how == "quit":
            return verbs <= {b"EHLO", b"HELO", b"QUIT"}
        return how in ("left without QUIT", BROKE) and not verbs and not self._buffer

    # -- lines.  What takes octets returns the reply, b"" for none, None if it needs more of them.

    def _take_line(self) -> Optional[bytes]:
        """Takes one line, and does what it says."""
        buffer = self._buffer
        known = _KNOWN_LINES.get(buffer) if len(buffer) <= _KNOWN_LENGTH else None
        if known is not None and self._exchange is None and not self._skips_line:
            self._buffer = b""           # as a rule: one line, and not a new one
        else:
            known = self._read_line()
            if known is None:
                return None
        found, argument, noted = known
        self._secret_next = False
        phase = self.phase
        if phase == "idle" and found is COMMANDS[b"MAIL"]:
            self._begin_part()
        self._lines.append(noted)
        if phase not in found.phases:
            raise self._out_of_order(found.phases)
        if argument.__class__ is Refuse:
            raise argument
        return found.run(self, argument)

    def _read_line(self) -> Optional[Tuple[Command, Any, bytes]]:
        """The next line, as _KNOWN_LINES has it; None if its end has yet to come.

        RFC 5321 2.3.8: only CRLF ends a line.  Bare CR or LF never does, so that nothing which
        another server reads as one line is two here.
        """
        end = self._buffer.find(b"\r\n")
        if self._skips_line:             # the rest of one that was refused
            self._skips_line = end < 0
            self._buffer = (self._buffer[end + 2:] if end >= 0 else
                            b"\r" * self._buffer.endswith(b"\r"))
            end = -1 if end < 0 else self._buffer.find(b"\r\n")
        buffer = self._buffer
        if not self.helo and buffer.startswith(b"\x16\x03"):
            raise Drop("spoke TLS at once: use STARTTLS, or the port of --smtps")
        if (end > 510 or end < 0) and not self._skips_line:
            self._check_length(len(buffer) if end < 0 else end + 2)
        if end >= 0:
            self._buffer = buffer[end + 2:]
            return self._read(buffer[:end])
        if buffer.endswith(b"\n") and self._exchange is None:
            self._skips_line, self._buffer = True, b""         # nc and telnet wait for a reply to
            raise self._not_a_command(buffer)        # a bare LF; the line goes on to its CRLF
        return None

    def _read(self, line: bytes) -> Tuple[Command, Any, bytes]:
        if self._exchange is not None:
            return Command("", "idle", str, Session._respond), line, b"C: ********\r\n"
        known = _KNOWN_LINES.get(line + b"\r\n")
        if known is None:
            try:
                found, argument = read_line(line)
            except KeyError:
                raise self._not_a_command(line) from None
            secret = found is COMMANDS[b"AUTH"]
            known = found, argument, self._noted(_without_secret(line) if secret else line)
            if len(line) < _KNOWN_LENGTH - 2 and not secret:
                if len(_KNOWN_LINES) >= 1_000:
                    _KNOWN_LINES.clear()
                _KNOWN_LINES[line + b"\r\n"] = known
        return known

    def _check_length(self, octets: int) -> None:
        """Refuses a line that is too long as soon as it is; the rest of it is skipped."""
        secret = self._exchange is not None
        most = (self.store.limits.auth_line if secret or self._buffer[:4].upper() == b"AUTH" else
                self.store.limits.command_line)
        if octets > most:
            self._skips_line = True
            self._refuse_http(self._buffer)
            self._exchange = None
            self._lines.append(b"C: (a line that is too long)\r\n")
            raise Refuse(500, "5.5.6" if secret else "5.5.2",        # RFC 4954 4, 6
                         f"Line too long: expected at most {most} octets with CRLF")

    def _not_a_command(self, line: bytes) -> Refuse:
        verb = line.partition(b" ")[0].upper()
        secret = self._secret_next and verb not in COMMANDS    # a password after a failed AUTH
        self._secret_next = False
        hidden = secret or b"AUTH" in line[:20].upper()
        self._lines.append(self._noted(
            _without_secret(line) if hidden else _FORBIDDEN.sub(         # one line stays one
                lambda match: "".join(map(r"\x%02x".__mod__, match[0])).encode(), line)))
        if verb not in COMMANDS:
            self._refuse_http(line)
        self._bad += 1
        if self._bad > self.store.limits.bad_commands:
            raise Drop("too many bad commands", reply(421, "4.7.0", "Too many bad commands"))
        if _FORBIDDEN.search(line):
            return Refuse(500, "5.5.2", _NO_CONTROL)
        if verb in _OBSOLETE:
            return Refuse(502, "5.5.1", f"{verb.decode()} is not implemented")
        shown = "'********'" if secret else _seen(verb.decode("utf-8", "backslashreplace"))
        return Refuse(500, "5.5.2", f"Unknown command {shown}: HELP lists them")

    def _refuse_http(self, line: bytes) -> None:
        """Ends the session of a browser: a foreign page may post to this port what looks like
        commands."""
        if _HTTP.match(line):
            raise Drop("spoke HTTP", reply(421, "4.7.0", "This is SMTP, not HTTP"))

    def _out_of_order(self, phases: str) -> Refuse:
        return Refuse(503, "5.5.1", (
            "Send EHLO first" if self.phase == "new" else
            "A mail transaction is open: send RSET, or end it" if "idle" in phases else
            "Send MAIL first" if self.phase == "idle" else
            "Send RCPT first: no recipient was accepted"))

    # -- mail data

    def _take_data(self) -> Optional[bytes]:
        """Takes mail data up to CRLF.CRLF, and nothing else ends it (RFC 5321 4.1.1.4)."""
        transaction, octets = self.transaction, self._buffer
        data, before = transaction.data, len(transaction.data)
        if before == 2 and octets.endswith(_END) and octets.find(b"\r\n.") == len(octets) - 5 and (
                octets[0] != 46):        # as a rule: the whole mail, and no line begins with a dot
            self._buffer = b""
            transaction.size = len(octets) - 3
            return self._finish(_without_bare_dots(octets[:-3]))
        data += octets
        end, has_dots = _end_of_data(data, max(0, before - 4))
        transaction.has_dots = transaction.has_dots or has_dots
        if end < 0:
            self._buffer = b""
            self._count(len(data) - before)
            return None
        self._buffer = bytes(data[end + 5:])
        transaction.size += end + 2 - before         # the CRLF belongs to the last line
        del data[end + 2:]
        if transaction.has_dots:         # RFC 5321 4.5.2: the client doubled leading dots
            data = data.replace(b"\r\n.", b"\r\n")
        return self._finish(_without_bare_dots(bytes(data[2:])))

    def _take_chunk(self) -> Optional[bytes]:
        """Takes octets of a BDAT chunk (RFC 3030 2), also of one that is refused."""
        left, last = self._chunk
        octets, self._buffer = self._buffer[:left], self._buffer[left:]
        refusal, transaction = self._chunk_refusal, self.transaction
        if refusal is None:
            transaction.data += octets
            self._count(len(octets))
        if len(octets) < left:
            self._chunk = left - len(octets), last
            return None
        self._chunk = None
        if refusal is None and last:
            return self._finish(bytes(transaction.data))
        if refusal is None and transaction.refusal is not None:
            refusal = transaction.refusal
            self._reset()
        if refusal is not None:
            raise refusal
        return reply(250, "2.0.0", f"{transaction.size} octets so far")

    def _count(self, octets: int) -> None:
        """Counts mail data that arrived, and keeps no more of it once it is too much."""
        transaction, limits = self.transaction, self.store.limits
        transaction.size += octets
        uncounted = transaction.size - transaction.reserved
        if transaction.refusal is None and uncounted > limits.reserve_step:
            try:
                self.store.reserve(uncounted)
                transaction.reserved += uncounted
            except Full as full:
                transaction.refusal = Refuse(452, "4.3.1", f"Out of memory: {full}")
        if transaction.size > limits.max_size * 4 // 3 + 5:    # no longer dots, and what ends it
            transaction.refusal = _too_large(limits)
        if transaction.refusal is not None:
            del transaction.data[:-4]    # what CRLF.CRLF may begin with
            self._release()

    def _release(self) -> None:
        """Gives back what was reserved for mail data that is complete, or given up."""
        transaction = self.transaction
        if transaction is not None and transaction.reserved:
            self.store.release(transaction.reserved)
            transaction.reserved = 0

    def _finish(self, octets: bytes) -> bytes:
        """Ends the transaction: the message is stored before its 250 is made."""
        transaction, dialogue = self.transaction, b"".join(self._lines)
        self._lines.append(b"C: (%d octets of mail data)\r\n" % transaction.size)
        self._release()                  # from here on the message itself is counted
        try:
            if transaction.refusal is not None:
                raise transaction.refusal
            if len(octets) > self.store.limits.max_size:     # RFC 1870 3: without stuffed dots
                raise _too_large(self.store.limits)
            for path in transaction.forward_paths if self.store.scripts else ():
                self._follow_script("data", path)
            id = new_id()
            self.store.deliver(Message(id, octets, Envelope(
                transaction.reverse_path, tuple(transaction.forward_paths), self.helo, self.client,
                self.user, self.tls, transaction.eight_bit, transaction.utf8),
                session=(self._opening, dialogue)))
            self._accepted += 1
            return b"250 2.0.0 Ok: queued as %b\r\n" % id.encode()
        except Full as full:
            raise Refuse(452, "4.3.1", f"Not stored: {full}") from None
        finally:
            self._reset()

    # -- commands

    @command("EHLO domain")
    def _ehlo(self, argument: str) -> bytes:
        self._greeted(argument, "EHLO")
        offers = ["STARTTLS"] * (self.policy.starttls and not self.tls)
        return reply(250, "", self.policy.hostname, *offers,
                     f"SIZE {self.store.limits.max_size}", "8BITMIME", "SMTPUTF8", "PIPELINING",
                     "ENHANCEDSTATUSCODES", "CHUNKING", "AUTH " + " ".join(MECHANISMS), "HELP")

    @command("HELO domain")
    def _helo(self, argument: str) -> bytes:
        self._greeted(argument, "HELO")
        return reply(250, "", self.policy.hostname)

    def _greeted(self, argument: str, verb: str) -> None:
        name = argument.strip()
        if not name:
            raise Refuse(501, "5.5.4", f"Expected {verb} with your domain or address literal")
        self.helo = name[:255]
        self._reset()                    # RFC 5321 4.1.4: EHLO ends a transaction

    @command("MAIL FROM:<reverse-path> [SIZE=n] [BODY=7BIT|8BITMIME] [SMTPUTF8] [AUTH=mailbox]",
             phases="idle", read=read_mail)
    def _mail(self, said: Tuple[str, bool, bool, int]) -> bytes:
        if self.policy.require:
            self._check_required("tls", "auth")
        path, eight_bit, utf8, size = said
        most = self.store.limits.max_size
        if size > most:
            raise Refuse(552, "5.3.4", f"Message too large: expected at most {most} octets, "
                                       f"got SIZE={size}")
        if self.store.scripts and path:
            self._follow_script("mail", path)
        self.transaction = Transaction(path, eight_bit, utf8)
        return b"250 2.1.0 Ok\r\n"

    def _check_required(self, *kinds: str) -> None:
        there = {"tls": self.tls, "auth": self.user}
        for kind in kinds:               # RFC 3207 4, RFC 4954 6
            if kind in self.policy.require and not there[kind]:
                raise Refuse(530, "5.7.0", f"Send {'STARTTLS' if kind == 'tls' else 'AUTH'} first "
                                           f"(--require {kind})")

    @command("RCPT TO:<forward-path>", phases="mail rcpt", read=read_rcpt)
    def _rcpt(self, path: str) -> bytes:
        paths = self.transaction.forward_paths
        _check_ascii(path, self.transaction.utf8)
        if len(paths) >= self.store.limits.recipients:
            raise Refuse(452, "4.5.3", f"Too many recipients: expected at most "
                                       f"{self.store.limits.recipients}")
        why = self.store.refusal(path)
        if why:
            raise Refuse(550, "5.1.1", f"{_seen(path)}: {why}")
        if self.store.scripts:
            self._follow_script("rcpt", path)
        paths.append(path)
        return b"250 2.1.5 Ok\r\n"

    def _follow_script(self, stage: str, path: str) -> None:
        """Does what the inbox was told to do at this stage: refuse, drop, or wait."""
        failure = self.store.scripted(stage, path)
        if failure is None:
            return
        if failure.code < 0:
            raise Drop(f"dropped by fail={failure.text}")
        if failure.code:
            raise Refuse(failure.code, f"{failure.code // 100}.0.0",
                         f"Scripted: fail={failure.text}")
        delay = min(failure.delay, self.store.limits.script_delay - self._paused)
        self._paused += delay            # all of a session's together are bounded
        self.pause += delay

    @command("DATA", phases="rcpt")
    def _data(self, argument: str) -> bytes:
        if self.transaction.data is not None:
            raise Refuse(503, "5.5.1", "Expected BDAT: this transaction began with it")
        self.transaction.data = bytearray(b"\r\n")   # as if after a line's end
        return b"354 End data with <CR><LF>.<CR><LF>\r\n"

    @command("BDAT octets [LAST]")
    def _bdat(self, argument: str) -> Optional[bytes]:
        match = re.fullmatch(r"([0-9]{1,15})(?: +(LAST))? *", argument, re.I)
        if not match:
            raise Refuse(501, "5.5.4", f"Expected BDAT octets [LAST], got {_seen(argument)}")
        self._chunk, self._chunk_refusal = (int(match[1]), bool(match[2])), None
        if self.phase != "rcpt":         # its octets follow all the same, and are read
            self._chunk_refusal = self._out_of_order("rcpt")
        elif not self.in_data:
            self.transaction.data, self.transaction.by_chunks = bytearray(), True
        return self._take_chunk()

    @command("RSET")
    def _rset(self, argument: str) -> bytes:
        self._reset()
        return _OK

    @command("NOOP [text]")
    def _noop(self, argument: str) -> bytes:
        return _OK

    @command("VRFY mailbox")
    def _vrfy(self, argument: str) -> bytes:
        if not argument.strip():
            raise Refuse(501, "5.5.4", "Expected VRFY mailbox")
        return reply(252, "2.5.2", "Not verified, but mail to it may be accepted")

    @command("HELP [command]")
    def _help(self, argument: str) -> bytes:
        found = COMMANDS.get(argument.strip().upper().encode("utf-8"))
        if found is not None:
            return reply(214, "2.0.0", found.syntax)
        return reply(214, "2.0.0", "Commands:", *(each.syntax for each in COMMANDS.values()))

    @command("QUIT")
    def _quit(self, argument: str) -> Optional[bytes]:
        raise Drop("quit", reply(221, "2.0.0", "Bye"))

    @command("STARTTLS")
    def _starttls(self, argument: str) -> bytes:
        if not self.policy.starttls:
            raise Refuse(502, "5.5.1", "TLS is not offered: start with --tls or --tls-cert")
        if self.tls:
            raise Refuse(503, "5.5.1", "TLS has begun already")
        self.wants_tls = True
        return reply(220, "2.0.0", "Go ahead")

    @command("AUTH mechanism [initial-response]", phases="idle")
    def _auth(self, argument: str) -> bytes:
        self._check_required("tls")
        name, _, initial = argument.strip().partition(" ")
        mechanism = MECHANISMS.get(name.upper())
        if not name:
            raise Refuse(501, "5.5.4", "Expected AUTH mechanism")
        if mechanism is None:            # not quoted: it may be a secret without its mechanism
            raise Refuse(504, "5.5.4", f"Unknown mechanism: expected {', '.join(MECHANISMS)}")
        if self.user:
            raise Refuse(503, "5.5.1", "Already authenticated")
        response = _unbase64(b"" if initial == "=" else initial.encode()) if initial else None
        exchange = mechanism(response)
        return self._advance(exchange, None)

    def _respond(self, line: bytes) -> bytes:
        """Takes a line that answers a challenge."""
        exchange, self._exchange = self._exchange, None
        if line == b"*":                 # RFC 4954 4
            raise Refuse(501, "5.7.0", "Authentication cancelled")
        self._secret_next = True         # if this fails: a client may send the rest all the same
        said = self._advance(exchange, _unbase64(line))
        self._secret_next = False
        return said

    def _advance(self, exchange: Any, response: Optional[bytes]) -> bytes:
        """Hands a response to an exchange; its next challenge, or how it ended."""
        try:
            challenge = exchange.send(response)
            self._exchange = exchange
            return reply(334, "", base64.b64encode(challenge).decode())
        except StopIteration as stop:
            octets, proves = stop.value
        user, users = octets.decode("utf-8", "replace"), self.policy.users
        if users and not (user in users and proves(users[user])):
            raise Refuse(535, "5.7.8", "Expected a user and password of --auth")
        self.user = user
        return reply(235, "2.7.0", "Authenticated")

    def _reset(self) -> None:
        """Ends the transaction; RFC 5321 4.1.1.5: nothing else changes."""
        self._release()
        self.transaction = self._exchange = None

    # -- the transcript

    def _say(self, said: bytes) -> bytes:
        """The one place where a reply enters the transcript.  The first one that refuses is
        remembered: what comes after follows from it."""
        if said:
            several = said[3] == 45      # a hyphen
            self._lines.append(b"S: " + (
                said.replace(b"\r\n", b"\r\nS: ")[:-3] if several else said))
            if said[0] >= 52 and not self._refused:          # 4 or 5
                self._refused = said[:200].decode("ascii").rstrip()
        return said

    def _noted(self, line: bytes) -> bytes:
        """What the transcript has of a client's line: it, or its begin."""
        longest = self.store.limits.transcript_line
        return b"C: %b\r\n" % (line if len(line) <= longest else line[:longest] + b"...")

    def _cut_part(self) -> None:
        """Keeps the transcript since the latest MAIL within bounds."""
        most = self.store.limits.transcript_lines
        if len(self._lines) > most:
            self._lines[most - 1:] = [b"(further lines were not kept)\r\n"]

    def _begin_part(self) -> None:
        """A MAIL command begins a new part of the transcript."""
        if self._opening is None:
            self._opening = b"".join(self._lines)
        else:
            self._past.extend(self._lines)
        self._lines = []


# ---- Network ---------------------------------------------------------------
# One thread for each port waits for what its connections say.  What may block
# gets a thread for as long: TLS handshakes, HTTP connections, slow goodbyes.

class Hangup(Exception):
    """The peer is gone."""


class Silence(Hangup):
    """The peer said nothing, or read nothing, for too long; or just now, if nobody waits."""


_NOT_NOW = (BlockingIOError, socket.timeout, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Connection:
    """One accepted connection: receive, send, time-outs, TLS.

    Raises Hangup where a socket raises a dozen things that all mean the same.
    """

    __slots__ = ("socket", "client", "session", "events", "active", "unsent", "_was_probed")

    def __init__(self, sock: socket.socket, address: Any):
        self.socket = sock
        self.session: Optional[Session] = None       # of an SMTP connection
        self.events = 0                  # for which its listener waits
        self.active = 0.0                # when it said something, by the listener's clock
        self.unsent = b""                # what is to be sent at the end of a round, or later
        self._was_probed = False
        self.client: str = address[0].partition("%")[0]
        if self.client.startswith("::ffff:"):        # IPv4 on a dual-stack socket
            self.client = self.client[7:]
        with contextlib.suppress(OSError):           # macOS: reset meanwhile
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def set_timeout(self, seconds: float) -> None:
        """The longest silence in receive() and send(); 0: neither blocks."""
        with contextlib.suppress(OSError):           # closed
            self.socket.settimeout(seconds)

    def receive(self, most: int = 65_536) -> bytes:
        """What arrived, b"" at the end of it."""
        try:
            return self.socket.recv(most)
        except _NOT_NOW:
            raise Silence("was silent for too long") from None
        except OSError:                  # reset, shut down, or a TLS failure
            raise Hangup(BROKE) from None

    def send(self, *parts: bytes) -> None:
        """Sends all octets."""
        try:
            for octets in parts:
                self.socket.sendall(octets)
        except _NOT_NOW:
            raise Silence("did not read for too long") from None
        except OSError:
            raise Hangup(BROKE) from None

    def send_some(self) -> None:
        """Sends as much of `unsent` as can be sent without blocking."""
        try:
            if self.unsent:
                sent = self.socket.send(self.unsent)
                self.unsent = self.unsent[sent:]
        except _NOT_NOW:
            pass
        except OSError:
            raise Hangup(BROKE) from None

    def start_tls(self, context: ssl.SSLContext, seconds: float = 20.0) -> None:
        """Does the server's side of the handshake; Hangup if it fails."""
        try:
            self.socket.settimeout(seconds)
            self.socket = context.wrap_socket(self.socket, server_side=True,
                                              do_handshake_on_connect=False)
            self.socket.do_handshake()   # now shut() can end it, which a stop does
        except (OSError, ValueError) as error:       # ValueError: closed meanwhile
            raise Hangup(f"failed the TLS handshake: {getattr(error, 'reason', error)}") from None

    def is_gone(self, probe: bytes = b"") -> bool:
        """Whether the peer has hung up, as far as one can see without taking octets.

        A peer that closed but its sending side still reads.  The `probe` tells: who reads no
        more answers it with a reset.
        """
        seconds = self.socket.gettimeout()
        try:                             # of the octets below TLS, if there is TLS
            self.socket.settimeout(0)
            first = socket.socket.recv(self.socket, 1, socket.MSG_PEEK)
            if first == b"" and probe and not self._was_probed:
                self._was_probed = True
                self.socket.send(probe)
            if first == b"" and probe:   # fails once the reset is here: on this machine at once,
                socket.socket.send(self.socket, b"")           # else the next time
            return isinstance(self.socket, ssl.SSLSocket) and first == b"\x15"     # TLS ends
        except BlockingIOError:
            return False
        except (OSError, ValueError):    # closed
            return True
        finally:
            self.set_timeout(seconds)

    def linger(self, seconds: float = 0.5) -> None:
        """Says that nothing more is sent, and takes what is still arriving.

        A socket closed over unread octets resets the connection, and the peer may lose the reply
        that says why.
        """
        self.shut(socket.SHUT_WR)
        until = time.monotonic() + seconds
        self.set_timeout(seconds)
        with contextlib.suppress(Hangup):
            while self.receive() and time.monotonic() < until:
                pass

    def shut(self, how: int = socket.SHUT_RDWR) -> None:
        """Ends the connection under a thread that is blocked in it."""
        with contextlib.suppress(OSError):           # gone already
            # SSLSocket's own would forget TLS, and what is sent then goes out in the clear.
            socket.socket.shutdown(self.socket, how)

    def close(self) -> None:
        """Gives the socket back; says so to a TLS peer (RFC 8446 6.1)."""
        with contextlib.suppress(OSError, ValueError):
            if isinstance(self.socket, ssl.SSLSocket):
                self.socket.setblocking(False)
                self.socket.unwrap()
        self.socket.close()


def _bind(host: str, port: int, backlog: int) -> socket.socket:
    """A listening socket.  OSError says which address could not be had."""
    if host == "::" and not socket.has_dualstack_ipv6():     # all addresses, as far as there are
        host = "0.0.0.0"
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                            flags=socket.AI_PASSIVE)[0]
    sock = socket.socket(family, kind, protocol)
    try:
        if os.name == "nt":              # there SO_REUSEADDR would share the port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
        sock.bind(address)
        sock.listen(backlog)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        error.filename = f"{host}:{port}"            # so that its text names it
        raise
    return sock


def bind(host: str, port: int, backlog: int) -> List[socket.socket]:
    """Listening sockets with one port number, 0: a free one.  "localhost" means both loopbacks,
    since clients take either; "*" and "::" every address of both families."""
    host = host[1:-1] if host[:1] == "[" else host
    names = ["127.0.0.1", "::1"] if host == "localhost" else ["::" if host in ("*", "") else host]
    for tries in range(20):
        sockets: List[socket.socket] = []
        try:
            for name in names:
                number = sockets[0].getsockname()[1] if sockets else port
                sockets.append(_bind(name, number, backlog))
        except OSError as error:
            if sockets and error.errno != errno.EADDRINUSE:
                break                    # this machine has no IPv6
            for sock in sockets:
                sock.close()
            if port or not sockets or tries == 19:
                raise
        else:
            break
    return sockets


def allow_descriptors(count: int) -> None:
    """Raises the bound of open files to `count`, as far as the system lets a program do that."""
    with contextlib.suppress(ImportError, OSError, ValueError):    # Windows; other bounds
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Listener:
    """Accepts the connections of one port, and ends them.

    One thread waits for all that happens.  By default a connection gets a thread of its own, which
    runs serve() to its end; a protocol that takes turns overrides accepted(), ready() and
    between().
    """

    refusal = b""                        # sent to those that there is no room for

    def __init__(self, name: str, host: str, port: int, limits: Limits):
        self.name = name
        self.limits = limits
        self.stopping = threading.Event()
        self._guard = threading.Condition()          # of the three below; held with no other
        self._clients: "collections.Counter[str]" = collections.Counter()
        self._connections: "set[Connection]" = set()
        self._threads: "set[threading.Thread]" = set()
        self._most = limits.connections if hasattr(select, "poll") else (
            min(limits.connections, 500))            # Windows: select() takes 512 sockets
        self._complained: Dict[str, float] = {}      # what was logged, and when
        self._sockets = bind(host, port, limits.backlog)
        self.host, self.port = self._sockets[0].getsockname()[:2]
        self._waker, self._woken = socket.socketpair()
        self._spare = os.open(os.devnull, os.O_RDONLY)         # see _refuse_without_descriptor
        self._selector = selectors.DefaultSelector()
        for sock in (*self._sockets, self._woken):
            self._selector.register(sock, selectors.EVENT_READ)
        self._now = 0.0                  # the monotonic clock, when this round began
        self._waits = threading.Thread(target=self._run, name=name, daemon=True)

    # -- what a protocol does

    def serve(self, connection: Connection) -> None:
        """Serves a connection to its end, and may block."""
        raise NotImplementedError

    def accepted(self, connection: Connection) -> None:
        """A connection is there."""
        connection.socket.setblocking(True)
        if not self.begin(self._serve, connection):
            connection.unsent = self.refusal
            with contextlib.suppress(Hangup):
                connection.send_some()
            self.close(connection, "came when no thread could be had")

    def ready(self, connection: Connection) -> None:
        """A connection that the selector watches said something, or can be sent to."""

    def between(self) -> float:
        """Does what is due between two rounds; the seconds after which something else is."""
        return 60.0

    def is_over(self) -> bool:
        """Whether the thread may end; it is asked once the stop has begun."""
        return True

    def closed(self, connection: Connection, why: str) -> None:
        """The connection has ended; `why` is empty if the protocol ended it."""

    # -- from outside

    def start(self) -> None:
        """Begins to accept."""
        allow_descriptors(4 * self.limits.connections + 200)   # four ports at most
        try:
            self._waits.start()
        except RuntimeError:
            raise OSError(errno.EAGAIN, "the system gives no thread") from None

    def connection_count(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    def stop(self) -> None:
        """Takes no further connection, ends the others.  No thread is left, unless its peer
        blocks it for more than a second beyond `stop_time`."""
        until = time.monotonic() + self.limits.stop_time
        self.stopping.set()
        self.wake()
        if self._waits.ident is not None:
            self._waits.join(self.limits.stop_time)
        for deadline, how in ((until, socket.SHUT_RD), (until + 1.0, socket.SHUT_RDWR)):
            while self._connections and time.monotonic() < deadline:
                for connection in self._open_now():  # a thread that only cannot read says why
                    connection.shut(how)
                with self._guard:
                    self._guard.wait_for(lambda: not self._connections, 0.02)
        for thread in list(self._threads):
            thread.join(max(0.0, until + 1.0 - time.monotonic()))
        for sock in (*self._sockets, self._waker, self._woken):
            sock.close()
        self._selector.close()
        self._give_up_spare()

    # -- threads

    def begin(self, job: Callable[[Connection], None], connection: Connection) -> bool:
        """Lets a thread do what may block; False if the system gives none."""
        def work() -> None:
            job(connection)
            with self._guard:
                self._threads.discard(thread)
        thread = threading.Thread(target=work, name=self.name, daemon=True)
        with self._guard:
            self._threads.add(thread)
        try:
            thread.start()
            return True
        except RuntimeError:
            self._threads.discard(thread)
            self.complain("the system gives no more threads")
            return False

    def wake(self) -> None:
        """Makes the thread that waits look around."""
        with contextlib.suppress(OSError):           # stopped already
            self._waker.send(b"!")

    def _run(self) -> None:
        seconds = 60.0
        while not self.stopping.is_set() or not self.is_over():
            try:
                seconds = self._round(seconds)
            except Exception as error:   # the port must not die of a defect
                self.complain("met a defect of mailtest", error)
                seconds = 0.1

    def _round(self, seconds: float) -> float:
        """Waits for so long at most, and does what is to be done; the seconds to wait then."""
        found = self._selector.select(seconds)
        self._now = time.monotonic()
        for key, _ in found:
            if key.data is not None:
                self.ready(key.data)
            elif key.fileobj is self._woken:
                self._woken.recv(4_096)
            elif not self.stopping.is_set():
                self._accept(key.fileobj)
        if self.stopping.is_set() and self._sockets[0].fileno() >= 0:
            for sock in self._sockets:
                self._selector.unregister(sock)
                sock.close()
        return self.between()

    def _accept(self, listening: socket.socket) -> None:
        """Takes the connections that wait."""
        for _ in range(64):              # then those that are there have their turn
            try:
                sock, address = listening.accept()
                connection = Connection(sock, address)
            except BlockingIOError:
                return
            except IndexError:           # macOS: dead on arrival, it has no address
                sock.close()
                continue
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._refuse_without_descriptor(listening)
                return                   # else the peer is gone
            if self._admit(connection):
                self.accepted(connection)

    def _refuse_without_descriptor(self, listening: socket.socket) -> None:
        """Gives up a spare descriptor, so that the client hears why it is not served."""
        self._give_up_spare()
        with contextlib.suppress(OSError):
            sock, _ = listening.accept()
            with sock:
                sock.setblocking(False)
                sock.send(self.refusal)
        self.complain("no file descriptor is free: raise the bound (ulimit -n)")
        try:
            self._spare = os.open(os.devnull, os.O_RDONLY)
        except OSError:                  # somebody was faster: others will end
            self.stopping.wait(0.01)

    def _give_up_spare(self) -> None:
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1

    def complain(self, text: str, error: Optional[Exception] = None) -> None:
        """Logs a fault, once a minute at most."""
        if self._now > self._complained.get(text, -60.0) + 60.0:
            self._complained[text] = self._now
            with contextlib.suppress(ImportError, OSError):  # no descriptor is left even for this
                log_error("%s: %s", self.name, text, trace=error or False)

    # -- connections

    def _admit(self, connection: Connection) -> bool:
        """Counts a connection, or refuses it."""
        with self._guard:
            if (len(self._connections) < self._most
                    and self._clients[connection.client] < self.limits.connections_per_client):
                self._connections.add(connection)
                self._clients[connection.client] += 1
                return True
        with contextlib.suppress(OSError):
            connection.socket.setblocking(False)
            connection.socket.send(self.refusal)
        connection.close()
        return False

    def _open_now(self) -> List[Connection]:
        with self._guard:
            return list(self._connections)

    def _serve(self, connection: Connection) -> None:
        """Serves a connection by a thread of its own."""
        why = ""
        try:
            self.serve(connection)
        except Hangup as hangup:
            why = str(hangup)
        except Exception as error:       # the edge of a thread: the next client is served
            why = "met a defect of mailtest"
            self.met_defect(connection, error)
        self.close(connection, why)

    def met_defect(self, connection: Connection, error: Exception) -> None:
        """Logs an exception that is none of the peer's making."""
        log_error("%s: a connection from %s failed", self.name, connection.client, trace=error)

    def watch(self, connection: Connection, events: int) -> None:
        """Calls ready() for these events of the connection from now on, 0 for none."""
        if events == connection.events:
            return
        if not connection.events:
            self._selector.register(connection.socket, events, connection)
        elif not events:
            self._selector.unregister(connection.socket)
        else:
            self._selector.modify(connection.socket, events, connection)
        connection.events = events

    def close(self, connection: Connection, why: str) -> None:
        """Ends a connection; one that is watched, by the thread that waits alone."""
        self.watch(connection, 0)
        connection.close()
        with self._guard:
            self._connections.discard(connection)
            self._clients[connection.client] -= 1
            if not self._clients[connection.client]:
                del self._clients[connection.client]
            self._guard.notify_all()
        self.closed(connection, why)


def tls_context(certificate: str, key: str = "") -> ssl.SSLContext:
    """A server's TLS settings from PEM files; OSError or ssl.SSLError if they will not do."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key or None)
    return context


def make_certificate(folder: str, names: Iterable[str]) -> Tuple[str, str]:
    """The paths of a new self-signed certificate and its key, made by the openssl program.

    OSError says what is missing.  The names are DNS names or addresses: clients look for the
    host that they connect to among the SANs, and some at nothing else.
    """
    import shutil
    import subprocess
    program = shutil.which("openssl")
    if program is None:
        raise OSError("--tls needs the openssl program to make a certificate, and it is not on "
                      "the PATH; install it, or give --tls-cert and --tls-key")
    certificate = os.path.join(folder, "mailtest-cert.pem")
    key = os.path.join(folder, "mailtest-key.pem")
    sans = ",".join(("IP:" if re.fullmatch(r"[0-9.]+|[0-9a-fA-F]*:.*", name) else "DNS:") + name
                    for name in dict.fromkeys(names))
    settings = os.path.join(folder, "openssl.cnf")
    with open(settings, "w", encoding="ascii") as file:      # -addext needs openssl 1.1.1
        file.write("[req]\ndistinguished_name=dn\nx509_extensions=ext\nprompt=no\n"
                   "[dn]\nCN=mailtest\n"
                   f"[ext]\nsubjectAltName={sans}\nbasicConstraints=critical,CA:TRUE\n")
    made = subprocess.run([program, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-sha256",
                           "-days", "365", "-config", settings, "-keyout", key,
                           "-out", certificate],
                          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, check=False)
    if made.returncode:
        raise OSError("openssl could not make a certificate: "
                      + made.stderr.decode("utf-8", "replace").strip()[-300:])
    os.chmod(key, 0o600)
    return certificate, key


# ---- SMTP server -----------------------------------------------------------
# Drives sessions by turns: one receive and one send each.  All replies of a
# round are sent at its end: a client that is woken by each of ten answers, and
# sleeps between them, costs both sides more than the answers.

_COMMAND_OCTETS = 1_024                  # taken in a turn, so that no flood of commands holds up
_DATA_OCTETS = 65_536                    # others: 170 of them are 0.5 ms


class SmtpServer(Listener):
    """SMTP on one port.  With `implicit`, TLS begins before the greeting (RFC 8314 3.3).

    A connection is watched for what it says or, when it did not read all of an answer, for room
    to send; or a thread has it; or it is in `_pauses`, with the time at which its scripted delay
    ends.
    """

    refusal = reply(421, "4.7.0", "Too many connections: try again later")

    def __init__(self, host: str, port: int, store: Store, policy: SmtpPolicy,
                 tls: Optional[ssl.SSLContext] = None, implicit: bool = False):
        super().__init__("smtp", host, port, store.limits)
        self._store = store
        self._policy = policy
        self._tls = tls
        self._implicit = implicit
        self._speaking: List[Connection] = []        # with something to send in this round
        self._pauses: Dict[Connection, float] = {}
        self._returned: "collections.deque[Any]" = collections.deque()     # by threads
        self._next_sweep = 0.0
        self._stop_at = float("inf")     # then no mail data is waited for

    # -- turns

    def accepted(self, connection: Connection) -> None:
        """Greets; with implicit TLS after the handshake."""
        connection.socket.setblocking(False)
        connection.active = self._now
        self._next_sweep = min(self._next_sweep, self._now + 1.0)
        session = connection.session = Session(self._store, self._policy, connection.client,
                                               self._implicit)
        if self._implicit:
            self._lend(connection, self._shake_hands)
        else:
            self._say(connection, session.greet())

    def ready(self, connection: Connection) -> None:
        """One turn of a connection that said something, or can be sent to."""
        connection.active, session = self._now, connection.session
        if connection.unsent:
            self._speaking.append(connection)
            return
        try:
            octets = connection.receive(
                _DATA_OCTETS if session.in_data or session.tls else _COMMAND_OCTETS)
            if not octets:
                raise Hangup("left without QUIT")
            connection.unsent = session.receive(octets)
            if session.pause:
                self._say(connection, b"")
            else:                        # as a rule
                self._speaking.append(connection)
        except Exception as error:       # the edge of a thread: the next client is served
            self._fail(connection, error)

    def _fail(self, connection: Connection, error: Exception) -> None:
        """What went wrong in a step of a connection ends it, and no other."""
        if isinstance(error, Silence):   # not a word yet: half a record of TLS
            self.watch(connection, selectors.EVENT_READ)
        elif isinstance(error, Hangup):
            self.close(connection, str(error))
        else:
            self.met_defect(connection, error)
            self._end(connection, "4.3.0", "This is a defect of mailtest; its log on standard "
                                           "error says more")

    def _say(self, connection: Connection, replies: bytes) -> None:
        """Sends replies at the end of the round, after a scripted delay if there is one."""
        connection.unsent += replies
        if connection.session.pause:
            self.watch(connection, 0)
            self._pauses[connection] = self._now + connection.session.pause
        else:
            self._speaking.append(connection)

    def _go_on(self, connection: Connection) -> None:
        """Sees to it that the rest is sent or, when all is sent, what comes next."""
        session = connection.session
        if connection.unsent:
            self.watch(connection, selectors.EVENT_WRITE)
        elif session.wants_tls:
            self._lend(connection, self._shake_hands)
        elif not session.ended:
            self.watch(connection, selectors.EVENT_READ)
        elif session.cut_off:
            self._lend(connection, self._linger)
        else:
            self.close(connection, "")

    # -- what may block

    def _lend(self, connection: Connection, job: Callable[[Connection], bytes]) -> None:
        """Lets a thread take a step of a connection, which nobody else touches meanwhile."""
        self.watch(connection, 0)

        def work(connection: Connection) -> None:
            outcome: Any
            try:
                outcome = job(connection)
            except Exception as error:   # the thread that waits knows what to do about it
                outcome = error
            self._returned.append((connection, outcome))
            self.wake()
        if not self.begin(work, connection):
            self._end(connection, "4.3.2", "No thread could be had: try again later")

    def _shake_hands(self, connection: Connection) -> bytes:
        connection.start_tls(self._tls)
        connection.set_timeout(0)
        if connection.session.wants_tls:
            connection.session.tls_started()
            return b""
        return connection.session.greet()

    def _linger(self, connection: Connection) -> bytes:
        connection.linger()
        raise Hangup("quit")

    # -- between the rounds

    def between(self) -> float:
        """Sends the replies, ends pauses and silences; the seconds until the next one ends."""
        while self._returned:
            connection, outcome = self._returned.popleft()
            if isinstance(outcome, Exception):
                self._fail(connection, outcome)
            else:
                self._say(connection, outcome)
        if self._pauses:
            self._end_pauses()
        speaking, self._speaking = self._speaking, []
        for connection in speaking:
            try:
                connection.send_some()
                session = connection.session
                if (connection.unsent or connection.events != selectors.EVENT_READ
                        or session.ended or session.wants_tls):
                    self._go_on(connection)
            except Hangup as hangup:
                self.close(connection, str(hangup))
        if self._now >= self._next_sweep or self.stopping.is_set():
            self._sweep()
        return max(0.0, min(self._next_sweep, *self._pauses.values(), self._now + 60.0)
                   - self._now)

    def _end_pauses(self) -> None:
        for connection, end in list(self._pauses.items()):
            if end <= self._now or self.stopping.is_set():
                del self._pauses[connection]
                try:
                    connection.send_some()           # before what follows pauses again
                    self._say(connection, connection.session.resume())
                except Exception as error:
                    self._fail(connection, error)

    def _sweep(self) -> None:
        """Ends the connections that are silent for too long, or meet the stop."""
        late = self._now >= self._stop_at
        pace = min(1.0, max(0.01, self.limits.smtp_timeout)) if self._connections else 60.0
        self._next_sweep = self._now + (0.02 if self.stopping.is_set() else pace)
        for connection in self._open_now():
            session = connection.session
            if connection in self._pauses:
                if connection.is_gone():
                    del self._pauses[connection]
                    self.close(connection, BROKE)
            elif self.stopping.is_set() and (late or not session.in_data):
                if connection.events:
                    self._end(connection, "4.3.2", "Shutting down")
                else:                    # a thread has it
                    connection.shut(socket.SHUT_RD)
            elif connection.events and connection.active <= self._now - self.limits.smtp_timeout:
                self._end(connection, "4.4.2", "Silent for too long")

    def _end(self, connection: Connection, status: str, text: str) -> None:
        """Closes a connection with 421, which RFC 5321 3.8 allows at any time."""
        connection.unsent += connection.session.refuse(421, status, text)
        with contextlib.suppress(Hangup):
            connection.send_some()
        self.close(connection, text)

    def stop(self) -> None:
        """Waits for mail data that is arriving."""
        self._stop_at = time.monotonic() + self.limits.stop_time - 0.2
        super().stop()

    def is_over(self) -> bool:
        """The thread ends the connections too, but those that a thread does not give back."""
        return not self._connections or time.monotonic() > self._stop_at + 0.5

    def closed(self, connection: Connection, why: str) -> None:
        """Makes the session end in the records too."""
        connection.session.end(why or "quit")


# ---- HTTP API --------------------------------------------------------------
# Requests in, responses out; no socket.  ROUTES says which endpoint takes which
# parameters, declare() what each of them is: the checks, OpenAPI and the README's
# tables all come from these two.  Handlers take values and return values.

class Request(NamedTuple):
    """A request whose head was found right.  Its body is read when somebody asks for it."""

    method: str
    path: str                            # still percent-encoded
    query: str = ""
    headers: Dict[str, str] = {}         # names in lower case
    read: Callable[[int], bytes] = lambda most: b""  # the body; ApiError 413 if it is larger
    client: str = "127.0.0.1"            # network address
    secure: bool = False
    tunnel: bool = False                 # came through CONNECT, which checked the host
    gone: Callable[[], bool] = lambda: False         # the client has hung up


class Response(NamedTuple):
    """A response; a `stream` has no end known before, and takes the place of the body."""

    status: int = 200
    body: bytes = b""
    type: str = "application/json"
    headers: Tuple[Tuple[str, str], ...] = ()
    stream: Optional[Iterator[bytes]] = None


class ApiError(Exception):
    """A refusal: `error` is a word for programs, `detail` says what was seen and expected.
    `field` is the parameter that is wrong, for Mailosaur's clients."""

    def __init__(self, status: int, error: str, detail: str, field: str = "",
                 headers: Tuple[Tuple[str, str], ...] = (), **more: Any):
        super().__init__(detail)
        self.status, self.error, self.detail, self.field = status, error, detail, field
        self.headers, self.more = headers, more      # more: further members of the JSON


class ApiPolicy(NamedTuple):
    """How this catcher was started, as far as HTTP is concerned."""

    api_key: str = ""
    hosted: bool = False
    trust_proxy: bool = False            # X-Forwarded-For, -Proto, -Prefix are true
    allow_hosts: Tuple[str, ...] = ()    # Host header fields taken beside the usual ones
    allow_origins: Tuple[str, ...] = ()  # whose pages may read (CORS)
    password: str = ""                   # of --auth
    smtp: str = ""                       # where mail is to be sent, as host:port
    any_host: bool = False               # ... at whatever address this machine is reached
    certificate: str = ""                # PEM
    files: Dict[str, Tuple[str, bytes]] = {}         # the page: path -> media type, octets
    state: Callable[[], Dict[str, Any]] = dict       # what else /healthz should say


# -- JSON

_encoded = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _json(value: Any) -> bytes:
    """JSON in UTF-8.  A lone surrogate can come from a request's JSON: it becomes "?"."""
    return _encoded(value).encode("utf-8", "replace")


def _pieces(value: Any) -> Iterator[bytes]:
    """The JSON of a value, piece by piece: an iterator is a list whose items are made one by one,
    octets are JSON already, a long text is cut.  So an answer is never in memory as a whole."""
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict):
        before = b"{"
        for name, member in value.items():
            yield before + _json(name) + b":"
            yield from _pieces(member)
            before = b","
        yield b"}" if value else b"{}"
    elif isinstance(value, str) and len(value) > 100_000:
        yield b'"'
        for start in range(0, len(value), 100_000):
            yield _json(value[start:start + 100_000])[1:-1]
        yield b'"'
    elif hasattr(value, "__next__"):
        before = b"["
        for item in value:
            yield before
            yield from _pieces(item)
            before = b","
        yield b"]" if before == b"," else b"[]"
    else:
        yield _json(value)


def _chunks(value: Any) -> Iterator[bytes]:
    """The pieces, gathered to 64 kB and more."""
    gathered, size = [], 0
    for piece in _pieces(value):
        gathered.append(piece)
        size += len(piece)
        if size > 65_536:
            yield b"".join(gathered)
            gathered, size = [], 0
    yield b"".join(gathered)


def _response(value: Any) -> Response:
    """What a handler returned, as a response: nothing, JSON, or the Response itself.  JSON of
    more than 64 kB is sent in pieces."""
    if isinstance(value, Response):
        return value
    if value is None:
        return Response(204)
    chunks = _chunks(value)
    first = next(chunks)
    second = next(chunks, None)
    return Response(body=first) if second is None else Response(
        stream=(chunk for some in ((first, second), chunks) for chunk in some))


_STRING = {"type": "string"}


def _list(items: Dict[str, Any]) -> Dict[str, Any]:
    return {"type": "array", "items": items}


# -- parameters

class Kind(NamedTuple):
    """The JSON schema of a parameter; what is expected, in words ("": the error says it); a
    function from what came to the value, ValueError if it does not fit; the value without any."""

    schema: Dict[str, Any]
    expected: str
    read: Callable[[Any], Any]
    default: Any = ""


class Parameter(NamedTuple):
    """A parameter of the query, or a member of a body.  `many` may be repeated: a list then."""

    name: str                            # on the wire
    kind: Kind
    text: str                            # what it does
    missing: str = ""                    # what is said when it is required and not there
    many: bool = False


def _bad(name: str, expected: str, got: Any) -> ApiError:
    """400: what was expected of a parameter, and what came."""
    if isinstance(got, (dict, list)):    # not shown: it may be nested without end
        shown = "an object" if isinstance(got, dict) else "a list"
    else:
        shown = repr(got[:80]) if isinstance(got, str) else json.dumps(got)[:80]
    return ApiError(400, "bad_request", f"Expected {name} to be {expected}, got {shown}", name)


def _pairs(text: str) -> Dict[str, List[str]]:
    """The names of a query or a form with their values."""
    try:
        pairs = urllib.parse.parse_qsl(text, keep_blank_values=True, errors="strict",
                                       max_num_fields=100)
    except ValueError:                   # UnicodeDecodeError is one
        raise ApiError(400, "bad_request", "Expected at most 100 parameters in percent-encoded "
                                           "UTF-8") from None
    found: Dict[str, List[str]] = {}
    for name, value in pairs:
        found.setdefault(name, []).append(value)
    return found


def _members(octets: bytes) -> Any:
    """The JSON of a body, {} for none."""
    def refuse(constant: str) -> None:
        raise ValueError(constant)
    try:
        return json.loads(octets.decode("utf-8-sig") or "{}", parse_constant=refuse)
    except (ValueError, RecursionError):             # not UTF-8, not JSON, NaN, or too deep
        raise ApiError(400, "bad_request", "Expected a JSON object in UTF-8 as the body, got "
                       f"{octets[:60].decode('utf-8', 'replace')!r}", "body") from None


def _argument(parameter: Parameter, came: List[Any]) -> Any:
    """The value of a parameter; null, "" and nothing at all are the same."""
    name, (_, expected, read, default), *_ = parameter
    if len(came) > 1 and not parameter.many:
        raise ApiError(400, "bad_request", f"Expected {name} once, got it {len(came)} times", name)
    try:
        if parameter.many and came:
            return [read(each) for each in came]
        return default if came in ([], [None], [""]) else read(came[0])
    except ValueError as error:
        raise (_bad(name, expected, came[0]) if expected else
               ApiError(400, "bad_request", str(error), name)) from None


def _arguments(words: str, given: Dict[str, List[Any]],
               parameters: Dict[str, Parameter]) -> Dict[str, Any]:
    """The values of the parameters that `words` names (see Route), from what was given."""
    values: Dict[str, Any] = {}
    for word in words.split():
        keys = re.findall(r"\w+", word)
        for key in keys:
            values[key] = _argument(parameters[key], given.get(parameters[key].name, []))
        needed = "!" in word or "|" in word or ">" in word and values[keys[0]]
        if needed and not any(values[key] for key in keys[">" in word:]):
            name, _, text, missing, _ = parameters[keys[">" in word]]
            raise ApiError(400, "bad_request", missing or f"Expected {name}: {text}", name)
    return values


def _from_json(words: str, value: Any, parameters: Dict[str, Parameter]) -> Dict[str, Any]:
    """The same from an object, whatever case its names have: .NET sends PascalCase."""
    if not isinstance(value, dict):
        raise _bad("the body", "a JSON object", value)
    names = {parameters[key].name.lower(): parameters[key].name
             for key in re.findall(r"\w+", words)}
    given = {names.get(str(name).lower(), ""): [each] for name, each in value.items()}
    return _arguments(words, given, parameters)


def _text(most: int = 0, form: str = "", expected: str = "a string", **schema: Any) -> Kind:
    """A text of at most so many characters (0: any), all of which matches."""
    def read(value: Any) -> str:
        if not isinstance(value, str) or most and len(value) > most or (
                form and not re.fullmatch(form, value)):
            raise ValueError
        return value
    bounds = {**({"pattern": f"^({form})?$"} if form else {}),
              **({"maxLength": most} if most else {})}
    return Kind({"type": "string", **bounds, **schema}, expected, read)


def _number(least: float, most: float, default: float, whole: bool = True) -> Kind:
    """A number within bounds."""
    form = r"[0-9]{1,9}" if whole else r"[0-9]{1,6}(\.[0-9]{0,40})?(e[+-]?[0-9]{1,3})?"

    def read(text: str) -> float:
        if not re.fullmatch(form, text, re.I) or not least <= float(text) <= most:
            raise ValueError
        return int(text) if whole else float(text)
    schema = {"type": "integer" if whole else "number", "minimum": least, "maximum": most}
    return Kind(schema, f"a {'whole ' * whole}number from {least} to {most:.0f}", read, default)


def _choice(expected: str, choices: Dict[Any, Any], default: Any) -> Kind:
    """One of some words, in any case: word -> value."""
    known = {json.dumps(word).lower(): choice for word, choice in choices.items()}

    def read(value: Any) -> Any:
        if json.dumps(value).lower() not in known:
            raise ValueError
        return known[json.dumps(value).lower()]
    return Kind({"enum": [*choices, ""]}, expected, read, default)


_ISO = re.compile(r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,9}))?)?"
                  r"(?:(Z)|([+\- ])([01]\d|2[0-3]):?([0-5]\d))?)?", re.I)


def _time(text: str) -> float:
    """Seconds since 1970: ISO 8601 or, as Java's client has it, milliseconds.  Without an offset
    it is UTC; a "+" may have decoded to a blank."""
    if re.fullmatch(r"[0-9]{10,15}", text):          # ten or eleven digits: seconds
        return int(text) / (1 if len(text) < 12 else 1000)
    match = _ISO.fullmatch(text.strip())
    if match is None:
        raise ValueError
    *parts, second, fraction, _, sign, hours, minutes = match.groups()
    when = datetime.datetime(*(int(part or 0) for part in (*parts, second)),
                             int((fraction or "0")[:6].ljust(6, "0")))
    offset = 3600 * int(hours or 0) + 60 * int(minutes or 0)
    seconds = (when - datetime.datetime(1970, 1, 1)).total_seconds()
    return seconds + (offset if sign == "-" else -offset)


# Every character at which Python's splitlines() or SMTP would end a line.
LINE_ENDS = r"\n-\r\x1c-\x1e\x85\u2028\u2029"

_TEXT = _text(nullable=True)
_LINE = _text(2_000, f"[^{LINE_ENDS}]*", "a header field of one line and at most 2000 characters",
              nullable=True)


def _mailboxes(text: str) -> List[str]:
    """The addresses of a list such as "Anna <anna@example.com>, bob@example.com"."""
    return [address.email for address in read_addresses(text)]


def _mailbox_list(value: Any) -> str:
    text = _LINE.read(value)
    if not all("@" in address for address in _mailboxes(text) or [text.strip() and "none"]):
        raise ValueError
    return text


def _base64(value: Any) -> bytes:
    """Ruby's client sends it with line breaks; nothing else may be there."""
    return base64.b64decode("".join(_TEXT.read(value).split()), validate=True)


def _secret_key(secret: Any) -> bytes:
    """The key that a base32 secret stands for."""
    text = re.sub(r"[\s=-]", "", _TEXT.read(secret))
    key = base64.b32decode(text + "=" * (-len(text) % 8), casefold=True)
    if not key or len(secret) > 200:
        raise ValueError
    return key


# Schemas describe what is always taken; some readers take more.
_TOKENS = r"[A-Za-z0-9!#$&^_.+-]{1,127}/[A-Za-z0-9!#$&^_.+-]{1,127}"     # a media type
_PART_TYPE = "(?!(?i:multipart|message)/)" + _TOKENS
_MEDIA = "^((application|audio|font|image|model|text|video)/[0-9A-Za-z!#$&^_.+-]{1,127})?$"
_MAILBOX = r"""((\w[\w '-]*|"\w[\w .,'-]*" ?)?<SPEC>|SPEC)""".replace(
    "SPEC", r"[0-9A-Za-z]+([._+-][0-9A-Za-z]+)*@[0-9A-Za-z]+([.-][0-9A-Za-z]+)*")
_SECRET = "^(L{8})*(L{2}|L{4}|L{5}|L{7,8})[ =-]*$".replace("L", "([ =-]*[A-Za-z2-7])")
_SCRIPT = r"^(mail|rcpt|data):([45][0-9]{2}|drop|delay=[0-9](\.[0-9]+)?)(\*[1-9][0-9]{0,5})?$"

_ADDRESSES = Kind({**_LINE.schema, "pattern": f"^({_MAILBOX}(, ?{_MAILBOX})*)?$"},
                  "an address such as anna@example.com, in one line of at most 2000 characters",
                  _mailbox_list)
_NAME = Kind({"type": "string", "maxLength": 200, "pattern": r"[^\s\x1c-\x1f]"}, "a string of at "
             "most 200 characters", lambda value: _text(200).read(value).strip())
_SERVER = Kind(_STRING, "a server id", str.lower, DEFAULT_SERVER)
_MOMENT = Kind({"anyOf": [{"type": "string", "format": "date-time"},
                          {"type": "string", "enum": [""]}]},
               "a time such as 2026-01-31T12:00:00Z", _time, None)
_PHONE = _text(100, r"[^\x00-\x20\x7f]+( [^\x00-\x20\x7f]+)*", "a telephone number or sender id "
               "of at most 100 characters (a + is sent as %2B)")
_PART = {"content_type": Parameter("contentType", _text(
             255, _PART_TYPE, "a media type such as image/png, not multipart or message",
             nullable=True, pattern=_MEDIA), "its media type"),
         "file_name": Parameter("fileName", _TEXT, "its name"),
         "content_id": Parameter("contentId", _TEXT, "what cid: URLs in the HTML name"),
         "content": Parameter("content", Kind({**_TEXT.schema, "format": "byte"}, "base64",
                                              _base64, b""), "its octets in base64")}


def _parts(value: Any) -> List[Dict[str, Any]]:
    """The attachments of a mail that is to be made, their members read."""
    if not (isinstance(value, list) and len(value) <= MAX_PARTS
            and all(isinstance(each, dict) for each in value)):
        raise ValueError
    return [_from_json(" ".join(_PART), each, _PART) for each in value]


_PARTS = Kind({**_list({"type": "object", "properties": {
    member.name: member.kind.schema for member in _PART.values()}}), "nullable": True},
    f"a list of at most {MAX_PARTS} objects", _parts, ())

# The name of a handler's argument: the name on the wire, how it is read, what it does ...
PARAMETERS = {key: Parameter(*row) for key, row in {
    "inbox": ("inbox", _text()._replace(default=None), "an address whose mail alone is meant; may "
              "be repeated", "", True),
    "count": ("count", _number(1, 10_000, 1), "how many are waited for"),
    "subject": ("subject", _TEXT, "a part of the subject"),
    "sender": ("from", _TEXT, "the whole address of the sender"),
    "to": ("to", _TEXT, "the whole address of a recipient"),
    "body": ("body", _TEXT, "a part of the text or of the HTML's source"),
    "header": ("header", _TEXT, "a part of a header field, such as X-Tag: 7"),
    "after": ("after", _text(), "the id of a message: only what came after it"),
    "nothing": ("expect", _choice("0, which proves that no mail comes", {"0": True}, False),
                "0: that nothing comes"),
    "remote": ("remote", _choice("0 or 1", {"0": False, "1": True}, False),
               "1: with remote content"),
    "event": ("after", _text(15, "[0-9]+", "the number of an event"), "the number of an event"),
    "server": ("server", _SERVER, "whose messages; mailtest: all"),
    "emptied": ("server", _SERVER._replace(default=""), "whose messages; mailtest: all"),
    "page": ("page", _number(0, 10_000_000, 0), "which page; the first is 0"),
    "size": ("itemsPerPage", _number(1, 1000, 50), "messages of a page"),
    "most": ("itemsPerPage", _number(1, 1_000_000, 1_000_000), "how many at most"),
    "since": ("receivedAfter", _MOMENT, "only what was received after that time"),
    "direction": ("dir", _choice("Received or Sent", {"Received": "Received", "Sent": "Sent"},
                                 "Received"), "Received or Sent"),
    "query": ("q", Kind(_STRING, "", lambda text: words(text[:1000]), Criteria()),
              "the words of the page's search box"),
    "sent_from": ("sentFrom", _TEXT, "the whole address of the sender",
                  "Expected at least one of sentFrom, sentTo, subject and body"),
    "sent_to": ("sentTo", _TEXT, "the whole address of a recipient"),
    "any_of": ("match", _choice("ALL or ANY", {     # 0 and 1: .NET's client
        "ALL": False, "ANY": True, 0: False, 1: True}, False), "ALL or ANY of the criteria"),
    "owner": ("server", _text(255, r"[^\x00-\x20\x7f/@\\<>\"]+", "a server id: a label or a whole "
                              "domain"), "where the message is made"),
    "recipients": ("to", _ADDRESSES, "addresses to send to"),
    "copies": ("cc", _ADDRESSES, "addresses that get a copy"),
    "author": ("from", _ADDRESSES, "the sender"),
    "send": ("send", _choice("true or false", {True: True, False: False, None: False}, False),
             "true: it is sent; else the server has received it"),
    "title": ("subject", _LINE, "the subject"),
    "text": ("text", _TEXT, "the text"),
    "source": ("html", _TEXT, "the HTML"),
    "parts": ("attachments", _PARTS, "attachments"),
    "server_name": ("name", _NAME, "a name", "Servers need a name"),
    "device_name": ("name", _NAME, "a name", "Devices need a name"),
    "secret": ("sharedSecret", Kind(
        {"type": "string", "maxLength": 200, "pattern": _SECRET}, "base32, such as "
        "ONSWG4TFOQYTEMY=", lambda value: _secret_key(value) and value), "a secret in base32"),
    "sms_to": ("To", _PHONE, "the recipient of an SMS"),
    "sms_from": ("From", _PHONE, "its sender"),
    "sms_service": ("MessagingServiceSid", _PHONE, "in place of From"),
    "sms_text": ("Body", _TEXT, "its text"),
}.items()}


def declare(limits: Limits) -> Dict[str, Parameter]:
    """All parameters; the bounds of some are those of the catcher."""
    seconds = _number(0, limits.poll, 0.0, whole=False)
    script = Kind({"type": "string", "pattern": _SCRIPT}, "",
                  lambda value: parse_failure(value, limits))
    return {
        **PARAMETERS,
        "fail": Parameter("fail", script, "STAGE:ACTION[*TIMES]; may be repeated", many=True),
        "timeout": Parameter("timeout", seconds, "seconds to wait"),
        "milliseconds": Parameter("timeout", _number(0, limits.poll * 1000, 0),
                                  "milliseconds to wait for a match"),
        "within": Parameter("within", _number(0.01, limits.ttl, 0, whole=False),
                            "seconds until the next call is due")}


class Api:
    """What all endpoints share: the store, how the catcher was started, the parameters."""

    def __init__(self, store: Store, policy: ApiPolicy = ApiPolicy()):
        self.store = store
        self.policy = policy
        self.parameters = declare(store.limits)
        self._large = threading.Lock()    # see read()
        self._latest = functools.lru_cache(maxsize=64)(Message.read)

    def read(self, message: Message) -> Mail:
        """All that a message says.  What was listed is often fetched next: small ones of late are
        kept, which makes both 1.6 times as fast (measured in turns).  One larger message is read
        at a time, or a hundred who ask for 1 MB each at once would stop everyone else."""
        if len(message.octets) <= 20_000:
            return self._latest(message)
        with self._large:
            return message.read()

    def base(self, request: Request) -> str:
        """The URL that the client used for this catcher, without a slash at its end."""
        secure, prefix = request.secure, ""
        if self.policy.trust_proxy:      # what the nearest proxy says stands last
            proto, prefix = (request.headers.get(f"x-forwarded-{name}", "").rpartition(",")[2]
                             .strip() for name in ("proto", "prefix"))
            secure = proto.lower() == "https" if proto else secure
            prefix = prefix.rstrip("/") if re.fullmatch(r"(/[\w.~-]+)+/?", prefix, re.A) else ""
        return f"http{'s' * secure}://{request.headers.get('host') or 'localhost'}{prefix}"


# -- messages as JSON

def _people(message: Message, addresses: Iterable[Address]) -> List[Dict[str, Any]]:
    if message.kind == "SMS":
        return [{"name": address.name or None, "email": None, "phone": address.email}
                for address in addresses]
    return [{"name": address.name, "email": address.email, "phone": None}
            for address in addresses]


def _body(body: Body) -> Dict[str, Any]:
    return {"body": body.body,
            "links": [{"href": link.href, "text": link.text} for link in body.links],
            "codes": [{"value": code} for code in body.codes],
            "images": [{"src": image.src, "alt": image.alt} for image in body.images]}


def _lines(octets: bytes) -> List[str]:
    return octets.decode("utf-8", "replace").replace("\0", "\ufffd").splitlines()


def _server(message: Message) -> str:
    return message.servers[0] if message.servers else DEFAULT_SERVER


def _head(message: Message, mail: Mail) -> Dict[str, Any]:
    """What a message and its item in a list have in common."""
    return {"id": message.id, "type": message.kind, "received": iso_time(message.received),
            "subject": mail.subject, "from": _people(message, mail.from_),
            "to": _people(message, mail.to), "cc": _people(message, mail.cc),
            "bcc": _people(message, mail.bcc), "size": len(message.octets)}


def message_value(api: Api, message: Message, base: str) -> Dict[str, Any]:
    """Mailosaur's message object (see the README for what is beside it).  Lists are never null,
    html, text and metadata never absent: several of the clients die of that."""
    mail, envelope = api.read(message), message.envelope
    url = f"{base}/{'v1' if api.policy.hosted else 'api/files'}/attachments/{message.id}"
    kind = "phone" if message.kind == "SMS" else "email"
    return {
        **_head(message, mail),
        "html": _body(mail.html_body), "text": _body(mail.text_body),
        "attachments": [
            {"id": f"{message.id}-{number}", "contentType": part.content_type,
             "fileName": part.file_name, "contentId": part.content_id,
             "length": len(part.octets), "url": f"{url}-{number}"}
            for number, part in enumerate(mail.attachments)],
        "metadata": {
            "headers": [{"field": name, "value": text} for name, text in mail.headers],
            "ehlo": envelope.helo, "mailFrom": envelope.reverse_path,
            "rcptTo": [{"name": None, "email": None, "phone": None, kind: path}
                       for path in envelope.forward_paths],
            "client": envelope.client or None, "user": envelope.user or None,
            "tls": envelope.tls},
        "direction": message.direction, "warnings": list(mail.warnings),
        "session": _lines(message.transcript()), "server": _server(message)}


def message_json(api: Api, message: Message, base: str) -> bytes:
    """The same as JSON, at once."""
    return b"".join(_pieces(message_value(api, message, base)))


def item(api: Api, message: Message, server: str = "") -> bytes:
    """The JSON of a message in a list; in the list of a server that is not its first, it names
    that server.  What the octets say is kept."""
    octets = message.summary
    if octets is None:
        mail = api.read(message)
        octets = _json({
            **_head(message, mail), "summary": mail.preview or mail.subject or "(empty)",
            "attachments": len(mail.attachments),
            "code": mail.text_body.code or mail.html_body.code or None,
            "links": len(mail.html_body.links or mail.text_body.links),
            "warnings": len(mail.warnings)})
        api.store.keep(message, octets)
    state = _json({"direction": message.direction, "inboxes": list(message.inboxes),
                   "seen": message.seen,
                   "server": server if server not in ("", DEFAULT_SERVER) else _server(message)})
    return octets[:-1] + b"," + state[1:]


# -- what endpoints need

def _inbox(view: InboxView) -> Dict[str, Any]:
    return {"address": view.address, "expires": iso_time(view.expires),
            "acquired": view.acquired, "message_count": view.count, "unseen": view.unseen,
            "attempts": view.attempts, "watch": view.watch and {
                "within": view.watch.within, "due": iso_time(view.watch.due),
                "told": view.watch.told},
            "failures": [{"fail": text, "answered": answered, "left": left}
                         for text, answered, left in view.failures]}


_ENDINGS = {"text/plain": "txt", "text/calendar": "ics", "message/rfc822": "eml",
            "application/pkcs7-signature": "p7s", "application/pgp-signature": "asc"}


def _as_download(name: str, kind: str) -> Tuple[Tuple[str, str], ...]:
    """Header fields of a download, which has no path in its name, and an ending that fits its
    media type if it had no name.  RFC 6266: an ASCII name, and the real one encoded."""
    name = re.split(r"[/\\]", re.sub(r"[\x00-\x1f\x7f]", "", name))[-1][-200:]
    if not name.strip(". "):
        known = re.fullmatch(r"(?!message/)[a-z]+/([a-z0-9]{2,5})(\+\w+)?", kind)
        ending = _ENDINGS.get(kind) or (known and known.group(1))
        name = ("message" if kind.startswith("message/") else "attachment") + (
            f".{ending}" if ending else "")
    plain = re.sub(r"[^\x20-\x7e]|[\";%]", "_", name)
    full = urllib.parse.quote(name.encode("utf-8", "replace"), safe="")
    return (("Content-Disposition", f"attachment; filename=\"{plain}\"; filename*=UTF-8''{full}"),
            ("Content-Security-Policy", "sandbox; default-src 'none'"))


# Elements that open a connection by themselves, whatever the policy says: browsers prepare a
# navigation before they refuse it.  A name that browsers do not know is an element that does
# nothing.  The other lets names of meta elements pass that only describe the page.
_LOADERS = (r"<(?=(?:iframe|frame|frameset|object|embed|applet|portal|fencedframe|base{})[\s/>]"
            r"|meta(?!\s+name=[\"']?(?:viewport|color-scheme|supported-color-schemes)[\"']?\s+"
            r"content=[\"'][\w\s=.,-]*[\"']\s*/?>)[\s/>])")
_LINK_TAG = re.compile(r"<(?:a|area)(?=[\s/])", re.I)
_LINK_ATTRIBUTE = re.compile(r"[\s/]*([^\s/>][^\s/>=]*)"
                      r"(?:\s*=\s*(\"[^\"]*\"|'[^']*'|[^\s>\"'][^\s>]*))?")


def _link(attributes: List[Tuple[str, str]], base: str) -> str:
    """A link's attributes: what it leads to opens in a new tab; a place in the mail itself does
    not; what is no address outside it is none."""
    kept = []
    for name, quoted in attributes:
        value = quoted[1:-1] if quoted[:1] in ("'", '"') else quoted
        if name.lower() in ("href", "xlink:href"):
            url = html.unescape(value).strip()
            if base and not url.startswith("#"):
                with contextlib.suppress(ValueError):        # brackets that do not match
                    url = urllib.parse.urljoin(base, url)
            if not re.match(r"#|https?://|mailto:|tel:|sms:", url, re.I):
                continue
            kept.append(f'{name}="{html.escape(url)}"')
            kept.append('target="_self"' if url.startswith("#") else 'target="_blank"')
        elif name.lower() not in ("target", "ping", "rel", "attributionsrc"):
            kept.append(f"{name}={quoted}" if quoted else name)
    return "".join(f" {attribute}" for attribute in kept)


def _with_links(source: str) -> str:
    """The HTML with its links made safe to follow."""
    # A longer base is none, since each link would repeat it.
    match = re.search(r"<base\s[^<>]{0,2000}?href\s*=\s*[\"']?"
                      r"(https?://[^\s\"'>]{1,500})(?=[\s\"'>])", source, re.I)
    base = html.unescape(match.group(1)) if match else ""
    pieces, end = [], 0
    for tag in _LINK_TAG.finditer(source):
        if tag.start() < end:
            continue
        pieces.append(source[end:tag.end()])
        attributes, end = [], tag.end()
        while True:
            found = _LINK_ATTRIBUTE.match(source, end)
            if found is None:
                break
            attributes.append((found.group(1), found.group(2) or ""))
            end = found.end()
        pieces.append(_link(attributes, base))
    return "".join(pieces) + source[end:]


def compose(fields: Dict[str, str], text: str, source: str,
            parts: Iterable[Dict[str, Any]] = ()) -> bytes:
    """A new mail: header fields (an empty one is left out), text and HTML, attachments as
    PARAMETERS has them.  ValueError names a field that can be none."""
    import email.policy
    mail = email.message.EmailMessage(policy=email.policy.SMTP)
    for name, value in fields.items():
        try:
            _LINE.read(value)            # the package takes seconds to fold a long one
            if value:
                mail[name] = value
        except (ValueError, IndexError, TypeError, AttributeError,
                email.errors.MessageError) as error:     # it depends on the package's version
            raise ValueError(name) from error
    mail["Date"] = email.utils.format_datetime(datetime.datetime.now(datetime.timezone.utc))
    mail["Message-ID"] = f"<{new_id()}@mailtest.example>"
    text, source = (each.encode("utf-8", "replace").decode() for each in (text, source))
    if text or not source:
        mail.set_content(text, cte="quoted-printable" if not text.isascii() else None)
    if source:
        (mail.add_alternative if text else mail.set_content)(source, subtype="html")
    for part in parts:
        name = re.sub(r"[\x00-\x1f\x7f]", "", part["file_name"])
        content_id = re.sub(r"[^!-~]|[<>]", "", part["content_id"])
        kind, _, subtype = (part["content_type"] or "application/octet-stream").partition("/")
        mail.add_attachment(part["content"], kind, subtype,
                            filename=name.encode("utf-8", "replace").decode() or "attachment",
                            **({"cid": f"<{content_id}>"} if content_id else {}))
    return mail.as_bytes()


_SAMPLE = {
    "title": "Example message from mailtest",
    "text": "This is a sample email. Your code is 482913.\n\nhttps://example.com/confirm\n",
    "source": "<h1>Hello</h1><p>This is a sample email. Your code is <b>482913</b>.</p>"
              '<p><a href="https://example.com/confirm">Confirm your address</a></p>',
}


def totp(secret: str, now: float) -> Tuple[str, float]:
    """The one-time password of a base32 secret, and until when it holds (RFC 6238, RFC 4226)."""
    import hmac
    step = int(now // 30)
    digest = hmac.new(_secret_key(secret), struct.pack(">Q", step), "sha1").digest()
    offset = digest[-1] & 15
    number = struct.unpack(">I", digest[offset:offset + 4])[0] & 0x7FFFFFFF
    return f"{number % 1_000_000:06d}", (step + 1) * 30.0


_SHORTENERS = re.compile(r"https?://(?:bit\.ly|t\.co|goo\.gl|tinyurl\.com|ow\.ly|is\.gd|buff\.ly|"
                       r"rebrand\.ly|cutt\.ly|shorturl\.at)/", re.I)
_ELEMENTS = ("embed", "iframe", "object", "script", "form")
_OFFLINE = "Not checked: this catcher works offline, and asks no other machine"


def _findings(mail: Mail) -> Dict[str, Any]:
    """What can be said of a mail's content by looking at it."""
    source, links = mail.html.lower(), mail.html_body.links + mail.text_body.links
    return {**{name: f"<{name}" in source for name in _ELEMENTS},
            "shortUrls": any(_SHORTENERS.match(link.href) for link in links),
            "textSize": len(mail.text.encode("utf-8", "replace")),
            "totalSize": len(mail.octets),
            "missingAlt": any(image.alt is None for image in mail.html_body.images),
            "missingListUnsubscribe": not any(
                name.lower() == "list-unsubscribe" for name, _ in mail.headers)}


# -- endpoints

class Call:
    """One request that is being answered.  Methods are endpoints, see ROUTES: they take the
    values of parameters, and return what is to be JSON, nothing, or a Response.  What is wrong
    they raise: ApiError, Unknown, Full."""

    def __init__(self, api: Api, request: Request):
        self.api = api
        self.store = api.store
        self.policy = api.policy
        self.request = request
        self.base = api.base(request)

    # -- the Mailtest service

    def acquire(self, fail: List[Failure]):
        """Acquire a temporary inbox; `fail` scripts how it answers SMTP"""
        try:
            view = self.store.acquire(tuple(fail))
        except ValueError as error:
            raise ApiError(400, "bad_request", str(error), "fail") from None
        if "application/json" not in self.request.headers.get("accept", ""):
            return Response(body=view.address.encode("utf-8") + b"\n",
                            type="text/plain; charset=utf-8")
        return {"address": view.address, "expires": iso_time(view.expires),
                "server": DEFAULT_SERVER, "smtp": self._smtp()}

    def _smtp(self) -> str:
        """Where mail is to be sent, as this client knows the host."""
        host, _, port = self.policy.smtp.rpartition(":")
        if self.policy.any_host:
            host = re.sub(r":[0-9]*$", "", self.request.headers.get("host", host))
        return f"{host}:{port}"

    def _mail_of(self, address, least, timeout, count, nothing, after, **filters: str):
        """Mail of an inbox that matches, when there is as much as is wanted.  ApiError tells what
        came else, and what is known beside, unless that is for the holders of a key."""
        store, wanted, began = self.store, criteria(**filters), time.monotonic()
        count = 1 if nothing else count
        number = store.message(after).number if after else 0
        if not (timeout or nothing) or store.strict:         # nobody waits, or nothing can come
            store.inbox(address)
        found = collect(store, wanted.match, count, timeout, number, self.request.gone,
                        address=address)
        waited = round(time.monotonic() - began, 3) if timeout else 0.0
        mails = (message_value(self.api, message, self.base) for message in found)
        if nothing and found:
            raise ApiError(409, "unexpected", f"Expected no such mail for {address}, got "
                           f"{len(found)}", waited=waited, messages=itertools.islice(mails, 50))
        head: Dict[str, Any] = {"address": address, "expires": None}
        since = store.wall() - waited - 60
        with contextlib.suppress(Unknown):   # silence may be expected where there is no inbox
            view = store.inbox(address)
            head, since = _inbox(view), (view.expires - store.limits.ttl if view.acquired
                                         else since)
        if not nothing and len(found) < (count if timeout else least * count):
            there, kind = store.messages(address), " of that kind" * bool(wanted.terms)
            closed = self.policy.hosted or self.policy.api_key
            raise ApiError(404, "timeout" if timeout else "empty",
                           f"Expected {count} message{'s' * (count > 1)} for {address}{kind}, got "
                           f"{len(found)}{f' in {waited:g} s' * bool(timeout)}; "
                           f"the inbox holds {len(there)} in all",
                           waited=waited, hints=[] if closed else silence(store, address, since),
                           received=(item(self.api, message) for message in there[:50]))
        return {**head, "message_count": len(found), "messages": mails}

    def get_inbox(self, address: str, **wanted: Any):
        """The mail of an inbox, waited for if asked; 404 while there is none"""
        return self._mail_of(address, 1, **wanted)

    def load_inbox(self, address: str, **wanted: Any):
        """The mail of an inbox, waited for if asked; without timeout 200 while it is empty"""
        return self._mail_of(address, 0, **wanted)

    def delete_inbox(self, address: str):
        """End an inbox and its mail"""
        self.store.drop_inbox(address)

    def empty_inbox(self, address: str):
        """End the mail of an inbox; the inbox stays, and others keep what they hold too"""
        self.store.empty_inbox(address)

    def watch(self, address: str, within: float):
        """Await the next call within so many seconds; a mail tells the inbox if none comes"""
        try:
            return _inbox(self.store.watch(address, within))
        except ValueError as error:          # no address: no path of ours
            raise Unknown(str(error)) from None

    def unwatch(self, address: str):
        """Await no further call"""
        self.store.unwatch(address)

    def list_inboxes(self, inbox: Optional[List[str]], most: int):
        """Open inboxes, the newest first, or those of the addresses `inbox`"""
        known = set(map(inbox_key, inbox or ()))
        return {"items": [_inbox(view) for view in self.store.inboxes()
                          if inbox is None or inbox_key(view.address) in known][:most]}

    def list_sessions(self):
        """The last SMTP sessions with their transcripts, refused and broken ones too"""
        return {"items": [
            {"number": record.number, "client": record.client, "helo": record.helo or None,
             "user": record.user or None, "tls": record.tls, "started": iso_time(record.started),
             "ended": iso_time(record.ended), "messages": record.accepted,
             "refused": record.refused or None, "ending": record.ending,
             "transcript": _lines(record.transcript)} for record in self.store.sessions()]}

    def _event(self, event: Event) -> bytes:
        """An event as text; of a message its item, nothing if it has ended since."""
        try:
            data = _json(event.data) if event.kind != "message" else item(
                self.api, self.store.message(event.data["id"]))
        except Unknown:
            return b""
        return b"id: %d\nevent: %b\ndata: %b\n\n" % (event.number, event.kind.encode(), data)

    def _events(self, after: int, inboxes: List[str]) -> Iterator[bytes]:
        """Events as they happen.  The first piece is empty, once this follower is counted."""
        with self.store.follower():
            yield b""
            if after > self.store.number:            # numbers of a catcher that ran before
                yield b"event: reset\ndata: {}\n\n"
                after = self.store.number
            yield b"retry: 1000\n: %d\n\n" % after
            while not self.store.closed:
                events, after, lost = self.store.events(after, 15.0, inboxes)
                if lost:
                    yield b"event: reset\ndata: {}\n\n"
                for event in events:
                    yield self._event(event)
                if not events:
                    yield b":\n\n"
                if self.request.gone():
                    return

    def follow_events(self, event: str, inbox: Optional[List[str]]):
        """Server-Sent Events: what arrives, ends, is refused; resumes by Last-Event-ID"""
        last = _argument(self.api.parameters["event"]._replace(name="Last-Event-ID"),
                         [self.request.headers.get("last-event-id")]) or event
        inboxes = [] if inbox is None else inbox or ["\0"]       # no inbox has such a name
        stream = self._events(int(last) if last else self.store.number, inboxes)
        next(stream)                     # raises Full if there are too many
        return Response(type="text/event-stream; charset=utf-8", stream=stream)

    def health(self):
        """Whether the catcher works, its counters and how it was started"""
        store, policy, limits = self.store, self.policy, self.store.limits
        return {"status": "stopping" if store.closed else "ok", "version": __version__,
                "uptime": round(store.wall() - store.started, 3), **store.counters(),
                "smtp": self._smtp(), "domain": store.domain, "ttl": limits.ttl,
                "max_size": limits.max_size, "rate": limits.rate, "hosted": policy.hosted,
                "strict": store.strict, "api_key": bool(policy.api_key),
                **({} if policy.hosted else policy.state())}

    def describe_api(self):
        """This API as OpenAPI 3"""
        return openapi(self.api, self.base)

    def get_file(self):
        """The web page"""
        kind, octets = self.policy.files[self.request.path.rstrip("/") or "/"]
        policy = ("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
                  "img-src 'self' data:; frame-src 'self'; base-uri 'none'; form-action 'none'; "
                  "frame-ancestors 'none'")
        return Response(body=octets, type=kind, headers=(("Content-Security-Policy", policy),))

    def get_certificate(self):
        """The certificate that clients may trust, in PEM"""
        found = re.findall(r"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----",
                           self.policy.certificate)       # a key may stand beside it
        if not found:
            raise Unknown("no certificate: start with --tls, or --tls-cert")
        return Response(body="\n".join(found + [""]).encode("ascii", "replace"),
                        type="application/x-pem-file")

    # -- one message

    def get_message(self, id: str):
        """The whole message"""
        return message_value(self.api, self.store.message(id), self.base)

    def delete_message(self, id: str):
        """Delete a message"""
        self.store.delete(id)

    def see(self, id: str):
        """Mark a message as read"""
        self.store.see(id)

    def unsee(self, id: str):
        """Mark a message as not read"""
        self.store.see(id, False)

    def source(self, id: str):
        """A message's octets as text, to be looked at"""
        return Response(body=self.store.message(id).octets, type="text/plain; charset=utf-8")

    def get_attachment(self, id: str):
        """An attachment's octets"""
        message_id, _, number = id.rpartition("-")
        parts = self.api.read(self.store.message(message_id)).attachments if message_id else []
        if not re.fullmatch("[0-9]{1,9}", number) or int(number) >= len(parts):
            raise Unknown(f"no attachment has the id {id[:80]!r}")
        part = parts[int(number)]
        kind = part.content_type if re.fullmatch(_TOKENS, part.content_type) else ""
        return Response(body=part.octets, type=kind or "application/octet-stream",
                        headers=_as_download(part.file_name, kind))

    def get_email(self, id: str):
        """A message's octets, exactly as they came"""
        message = self.store.message(id)
        return Response(body=message.octets, type="message/rfc822",
                        headers=_as_download(f"{message.id}.eml", "message/rfc822"))

    # -- preview

    def _with_images(self, mail: Mail) -> str:
        """The HTML with its cid: images as data: URLs, as long as that is not too large."""
        images = {part.content_id: f"data:{part.content_type};base64,"
                  + base64.b64encode(part.octets).decode() for part in mail.attachments
                  if part.content_id and re.fullmatch(_TOKENS, part.content_type)}
        room = self.store.limits.max_size * 3 // 2

        def inline(match: Any) -> str:
            nonlocal room
            url = images.get(urllib.parse.unquote(html.unescape(match.group(1))), "")
            room -= len(url)
            return url if url and room > 0 else match.group()
        return re.sub(r"cid:([^\s\"'<>)\\]{1,998})", inline, mail.html)

    def preview(self, id: str, remote: bool):
        """A mail's HTML for a sandboxed frame; remote content only with remote=1"""
        body = _with_links(self._with_images(self.api.read(self.store.message(id))))
        body = re.sub(_LOADERS.format("" if remote else "|link"), "<x-", body, flags=re.I)
        sources = " http: https:" if remote else ""
        policy = (f"default-src 'none'; img-src data:{sources}; "
                  f"style-src 'unsafe-inline'{sources}; font-src data:{sources}; "
                  f"media-src data:{sources}; frame-ancestors 'self'; form-action 'none'; "
                  "base-uri 'none'; sandbox allow-popups allow-popups-to-escape-sandbox")
        return Response(body=b'<!doctype html><meta charset="utf-8"><base target="_blank">'
                        + body.encode("utf-8", "replace"), type="text/html; charset=utf-8",
                        headers=(("Content-Security-Policy", policy),
                                 ("X-DNS-Prefetch-Control", "off")))

    # -- Mailosaur: lists and searches

    def _messages_of(self, server: str, direction: str, since: Optional[float],
                     inboxes: Optional[List[str]] = None) -> Iterator[Message]:
        """Messages newest first: those of some inboxes, or of a server."""
        found = self.store.messages(server=server) if inboxes is None else []
        for address in inboxes or ():
            with contextlib.suppress(Unknown):
                found += self.store.messages(address)
        if len(inboxes or ()) > 1:
            numbered = {message.number: message for message in found}
            found = [numbered[number] for number in sorted(numbered, reverse=True)]
        for message in found:
            if since is not None and message.received <= since:
                return
            if message.direction == direction:
                yield message

    def list_messages(self, server, page, size, since, direction, query, inbox):
        """Summaries, newest first; `q` searches as the page does, X-Total-Count counts"""
        found = list(filter(query.match if query.terms else None,
                            self._messages_of(server, direction, since, inbox)))
        response = _response({"items": (item(self.api, message, server) for message in
                                        found[page * size:(page + 1) * size])})
        return response._replace(headers=(("X-Total-Count", str(len(found))),))

    def search_messages(self, server, page, size, since, direction, milliseconds, any_of,
                        sent_from, sent_to, subject, body):
        """Summaries that match criteria; a client that polls is held until one arrives"""
        store, timeout, number = self.store, milliseconds / 1000, self.store.number
        wanted = criteria(subject, sent_from, sent_to, body, any_of=any_of)
        poll = self.request.headers.get("authorization"), self.request.query, wanted
        delay = "1"          # 0: PHP's client takes it for 1000, others do not pause

        def find() -> List[Message]:
            found = filter(wanted.match, self._messages_of(server, direction, since))
            return list(itertools.islice(found, page * size, (page + 1) * size))
        found = find()
        if not found and not timeout and store.polled_again(poll):
            timeout = store.limits.hold
        if not found and timeout:
            try:
                collect(store, lambda message: (
                    message.direction == direction and wanted.match(message)
                    and (since is None or message.received > since)), 1, timeout, number,
                    self.request.gone, server=server)
                found = find()
            except Full:                     # too many wait: this client polls without being held
                delay = "1000"
        if not found:
            store.poll_answered(poll)
            return Response(body=b'{"items":[]}', headers=(("x-ms-delay", delay),))
        return {"items": (item(self.api, message, server) for message in found)}

    def delete_messages(self, emptied: str):
        """Delete all messages of a server"""
        self.store.empty(emptied)

    # -- Mailosaur: creating mail

    def _keep(self, fields: Dict[str, str], text: str, source: str, parts, server: str,
              envelope: Optional[Envelope] = None):
        """Composes a mail and keeps it: as received with that envelope, else as sent, and then
        recipients of ours get it."""
        try:
            octets = compose(fields, text, source, parts)
        except ValueError as error:
            name = str(error)
            raise _bad(name.lower(), _LINE.expected, fields.get(name, "")) from error
        most = self.store.limits.max_size
        if len(octets) > most:
            raise ApiError(413, "too_large", f"Expected a mail of at most {most} octets, "
                                             f"got {len(octets)}")
        to = tuple(_mailboxes(fields["To"]) + _mailboxes(fields["Cc"]))
        message = Message(new_id(), octets, envelope or Envelope(None, to),
                          direction="Received" if envelope else "Sent")
        self.store.deliver(message, server)
        ours = () if envelope else tuple(path for path in to if self.store.is_ours(path, server))
        if ours:
            self.store.deliver(Message(new_id(), octets,
                                       Envelope(fields["From"], ours, "localhost")))
        return message_value(self.api, message, self.base)

    def create_message(self, owner, recipients, copies, author, send, parts, **content: str):
        """Create a mail: sent with send=true, else received by the server"""
        if not any(content.values()):
            content = _SAMPLE
        label = re.sub(r"[^!-~]|[][]", "-", owner.lower()[:63])      # a mailbox needs it plain
        receiver = recipients or f"sample@{label}.mailosaur.net"
        fields = {"From": author or f"{_random_name(8)}@{self.store.domain}", "To": receiver,
                  "Cc": copies, "Subject": content["title"]}
        to = _mailboxes(recipients) + _mailboxes(copies)
        return self._keep(fields, content["text"], content["source"], parts, owner.lower(),
                          None if send else Envelope(None, tuple(to) or (receiver,)))

    def _answer(self, id: str, prefix: str, to: str, copies: str, text: str, source: str, parts):
        """Composes and keeps a reply or a forward, with the original below."""
        message = self.store.message(id)
        if message.kind != "Email":
            raise ApiError(400, "bad_request", f"Expected a mail, got an {message.kind}", "id")
        mail = self.api.read(message)
        if prefix == "Fwd: ":
            parts = [{"file_name": part.file_name, "content_type": part.content_type,
                      "content_id": part.content_id or "", "content": part.octets}
                     for part in mail.attachments
                     if re.fullmatch(_PART_TYPE, part.content_type)] + list(parts)
        else:
            to = ", ".join(each.email for each in mail.reply_to or mail.from_ if each.email)
        if not to:
            raise ApiError(400, "bad_request", "Expected a message with From or Reply-To", "id")
        writer = mail.from_[0].email if mail.from_ else "someone"
        if text or not source:
            text += f"\n\n{writer} wrote:\n" + "".join(
                f"> {line}\n" for line in (mail.text or mail.preview).splitlines())
        if source:
            below = mail.html or html.escape(mail.text)
            source += f"<p>{html.escape(writer)} wrote:</p><blockquote>{below}</blockquote>"
        subject = re.sub(f"[{LINE_ENDS}]+", " ", mail.subject)
        return self._keep({
            "From": next(iter(message.envelope.forward_paths), f"sample@{self.store.domain}"),
            "To": to, "Cc": copies,
            "Subject": prefix * (not subject.lower().startswith(prefix.lower())) + subject,
            "In-Reply-To": re.sub(r"[^!-~]", "", mail.message_id)}, text, source, parts,
            _server(message))

    def forward_message(self, id: str, recipients: str, **content: Any):
        """Forward a message; stored as sent"""
        return self._answer(id, "Fwd: ", recipients, **content)

    def reply_to_message(self, id: str, **content: Any):
        """Reply to a message; stored as sent"""
        return self._answer(id, "Re: ", "", **content)

    # -- Mailosaur: servers, devices, usage

    def _known_server(self, server: str) -> str:
        name = self.store.servers().get(server.lower())
        if name is None:
            raise Unknown(f"no server has the id {server[:80]!r}; it appears with its first mail, "
                          "or with POST /api/servers")
        return name

    def list_servers(self):
        """The servers: the default one, the named ones, those that hold mail"""
        return {"items": [self.get_server(server) for server in self.store.servers()]}

    def create_server(self, server_name: str):
        """Create a server with a new id"""
        server = _random_name(8).lower()     # 8 characters: what the clients demand
        self.store.name_server(server, server_name)
        return self.get_server(server)

    def get_server(self, id: str):
        """One server"""
        return {"id": id.lower(), "name": self._known_server(id), "users": [],
                "messages": self.store.count(id.lower())}

    def update_server(self, id: str, server_name: str):
        """Give a server another name"""
        self._known_server(id)
        self.store.name_server(id.lower(), server_name)
        return self.get_server(id)

    def delete_server(self, id: str):
        """Delete a server and its messages"""
        self._known_server(id)
        self.store.empty(id.lower())
        self.store.name_server(id.lower(), "")

    def get_password(self, id: str):
        """The SMTP password of a server: any will do unless --auth names one"""
        self._known_server(id)
        return {"value": self.policy.password or "anything"}

    def make_otp(self, secret: str):
        """The one-time password of a shared secret"""
        code, until = totp(secret, self.store.wall())
        return {"code": code, "expires": iso_time(until)}

    def list_devices(self):
        """Authenticator devices"""
        return {"items": [{"id": each["id"], "name": each["name"]}
                          for each in self.store.devices()]}

    def create_device(self, device_name: str, secret: str):
        """Create a device that makes one-time passwords"""
        return {"id": self.store.add_device(device_name, secret)["id"], "name": device_name}

    def delete_device(self, id: str):
        """Delete a device"""
        self.store.drop_device(id)

    def get_otp(self, id: str):
        """A device's one-time password"""
        for device in self.store.devices():
            if device["id"] == id:
                return self.make_otp(device["sharedSecret"])
        raise Unknown(f"no device has the id {id[:80]!r}")

    def usage_limits(self):
        """How much of each limit is used"""
        limits, counters = self.store.limits, self.store.counters()
        most = limits.max_memory // limits.message_cost
        return {"servers": {"limit": limits.servers, "current": len(self.store.servers())},
                "users": {"limit": 1, "current": 1},
                "email": {"limit": most, "current": counters["accepted"]},
                "sms": {"limit": most, "current": counters["sms"]}}

    def usage_transactions(self):
        """What was accepted in each of the last 24 hours"""
        return {"items": [{"timestamp": iso_time(began), "email": mails, "sms": texts}
                          for began, mails, texts in self.store.transactions()]}

    # -- Mailosaur: analysis

    def spam(self, id: str):
        """What the content says; no score, since no spam filter is asked"""
        mail = self.api.read(self.store.message(id))
        found = _findings(mail)
        rules = [("NOT_SCORED", "No spam filter was asked: the score 0 is no verdict"),
                 *((f"CONTENT_{name.upper()}", f"The HTML has a {name} element")
                   for name in _ELEMENTS if found[name]),
                 *(("WARNING", warning) for warning in mail.warnings)]
        results = [{"score": 0.0, "rule": rule, "description": text} for rule, text in rules]
        return {"spamFilterResults": {"spamAssassin": results}, "score": 0.0}

    def deliverability(self, id: str):
        """Content checks; DNS and blocklist checks say that they were not made"""
        unknown = {"result": "Timeout", "description": _OFFLINE, "rawValue": "", "tags": {}}
        return {"spf": unknown, "dkim": [unknown], "dmarc": unknown,
                "blockLists": [{"id": "none", "name": _OFFLINE, "result": "Timeout"}],
                "content": _findings(self.api.read(self.store.message(id))),
                "dnsRecords": {"a": [], "mx": [], "ptr": []},
                # Go's client wants a whole number for this one score
                "spamAssassin": {"score": 0, "result": "Timeout", "rules": [
                    {"score": 0.0, "rule": "NOT_SCORED", "description": _OFFLINE}]}}

    def email_clients(self):
        """The mail clients that previews can be made with: none"""
        return {"items": []}

    def make_previews(self, id: str):
        """Not possible offline; says so"""
        self.store.message(id)
        raise ApiError(501, "not_implemented", "Screenshots in mail clients need those clients, "
                       f"and none is here; {self.base}/v1/messages/{id}/preview shows the HTML")

    def get_screenshot(self, id: str):
        """There is none: see make_previews"""
        raise Unknown(f"no screenshot has the id {id[:80]!r}: this catcher makes none")

    # -- SMS

    def receive_sms(self, sid: str, sms_to: str, sms_from: str,
                    sms_service: str, sms_text: str):
        """Send an SMS here instead of to Twilio: form fields From, To, Body"""
        sender = sms_from or sms_service
        message = Message(new_id(), sms_text.encode("utf-8", "replace"),
                          Envelope(sender, (sms_to,), None, self.request.client), kind="SMS")
        self.store.deliver(message)
        now = email.utils.formatdate(message.received)
        number = "SM" + message.id.replace("-", "")
        return _response({
            "sid": number, "account_sid": sid, "from": sender, "to": sms_to,
            "body": sms_text, "status": "queued", "direction": "outbound-api",
            "num_segments": "1", "num_media": "0", "api_version": "2010-04-01",
            "date_created": now, "date_updated": now, "date_sent": None, "error_code": None,
            "error_message": None, "price": None, "price_unit": "USD",
            "messaging_service_sid": None, "subresource_uris": {},
            "uri": self.request.path.replace(".json", f"/{number}.json")})._replace(status=201)


# -- routes

class Route(NamedTuple):
    """An endpoint.  Parameters are words, see declare(): "a!" is required, of "a|b" at least one
    is, "a>b" requires b where a is true.

    `access`: open; inbox: the Mailtest service, which may be limited in rate; api: needs the key
    if there is one, and is closed in hosted mode without one; known: likewise, unless all that it
    names is in acquired inboxes.  So does inbox: other addresses can be guessed.
    """

    method: str
    path: str
    run: Callable[..., Any]
    access: str = "api"
    query: str = ""                      # parameters of the query
    body: str = ""                       # members of the body
    gives: str = ""                      # a media type, or a schema of OpenAPI's components


_WAIT = "timeout count subject sender to body header after nothing"
_LIST = "server page size since direction"
_LISTED, _SEARCH = _LIST + " query inbox", _LIST + " milliseconds"
_CRITERIA = "sent_from|sent_to|subject|body any_of"
_ANSWER = "copies text source parts"
_CREATE, _FORWARD = "send>recipients author title " + _ANSWER, "recipients! " + _ANSWER
_DEVICE, _SMS_FORM = "device_name! secret!", "sms_to! sms_from|sms_service sms_text!"


ROUTES = tuple(Route(*columns) for columns in (
    ("GET", "/", Call.get_file, "open", "", "", "text/html"),
    ("GET", "/page.css", Call.get_file, "open", "", "", "text/css"),
    ("GET", "/page.js", Call.get_file, "open", "", "", "text/javascript"),
    ("GET", "/favicon.ico", Call.get_file, "open", "", "", "image/svg+xml"),
    ("GET", "/healthz", Call.health, "open"),
    ("GET", "/cert.pem", Call.get_certificate, "open", "", "", "application/x-pem-file"),
    ("GET", "/openapi.json", Call.describe_api),
    *(("GET", path, Call.acquire, "inbox", "fail", "", "text/plain")
      for path in ("/v1/acquire", "/v1/register", "/acquire", "/aquire")),
    ("GET", "/v1/get/{address}", Call.get_inbox, "inbox", _WAIT, "", "Inbox"),
    ("GET", "/v1/load/{address}", Call.load_inbox, "inbox", _WAIT, "", "Inbox"),
    ("DELETE", "/v1/get/{address}", Call.delete_inbox, "inbox"),
    ("DELETE", "/v1/inboxes/{address}/messages", Call.empty_inbox, "inbox"),
    ("GET", "/v1/watch/{address}", Call.watch, "inbox", "within!"),
    ("DELETE", "/v1/watch/{address}", Call.unwatch, "inbox"),
    ("PUT", "/v1/messages/{id}/seen", Call.see, "open"),
    ("DELETE", "/v1/messages/{id}/seen", Call.unsee, "open"),
    ("GET", "/v1/messages/{id}/preview", Call.preview, "open", "remote", "", "text/html"),
    ("GET", "/v1/messages/{id}/source", Call.source, "open", "", "", "text/plain"),
    ("GET", "/v1/attachments/{id}", Call.get_attachment, "open", "", "", "*/*"),
    ("GET", "/v1/inboxes", Call.list_inboxes, "known", "inbox most"),
    ("GET", "/v1/sessions", Call.list_sessions),
    ("GET", "/v1/events", Call.follow_events, "known", "event inbox", "", "text/event-stream"),
    ("GET", "/api/messages", Call.list_messages, "known", _LISTED, "", "List"),
    ("POST", "/api/messages", Call.create_message, "api", "owner!", _CREATE, "Message"),
    ("DELETE", "/api/messages", Call.delete_messages, "api", "emptied!"),
    ("POST", "/api/messages/search", Call.search_messages, "api", _SEARCH, _CRITERIA, "List"),
    ("GET", "/api/messages/{id}", Call.get_message, "known", "", "", "Message"),
    ("DELETE", "/api/messages/{id}", Call.delete_message),
    ("POST", "/api/messages/{id}/forward", Call.forward_message, "api", "", _FORWARD, "Message"),
    ("POST", "/api/messages/{id}/reply", Call.reply_to_message, "api", "", _ANSWER, "Message"),
    ("POST", "/api/messages/{id}/screenshots", Call.make_previews),
    ("GET", "/api/files/attachments/{id}", Call.get_attachment, "api", "", "", "*/*"),
    ("GET", "/api/files/email/{id}", Call.get_email, "api", "", "", "message/rfc822"),
    ("GET", "/api/files/screenshots/{id}", Call.get_screenshot),
    ("GET", "/api/screenshots/clients", Call.email_clients),
    ("GET", "/api/analysis/spam/{id}", Call.spam),
    ("GET", "/api/analysis/deliverability/{id}", Call.deliverability),
    ("GET", "/api/servers", Call.list_servers),
    ("POST", "/api/servers", Call.create_server, "api", "", "server_name!"),
    ("GET", "/api/servers/{id}", Call.get_server),
    ("PUT", "/api/servers/{id}", Call.update_server, "api", "", "server_name!"),
    ("DELETE", "/api/servers/{id}", Call.delete_server),
    ("GET", "/api/servers/{id}/password", Call.get_password),
    ("GET", "/api/devices", Call.list_devices),
    ("POST", "/api/devices", Call.create_device, "api", "", _DEVICE),
    ("DELETE", "/api/devices/{id}", Call.delete_device),
    ("GET", "/api/devices/{id}/otp", Call.get_otp),
    ("POST", "/api/devices/otp", Call.make_otp, "api", "", "secret!"),
    ("GET", "/api/usage/limits", Call.usage_limits),
    ("GET", "/api/usage/transactions", Call.usage_transactions),
    ("POST", "/2010-04-01/Accounts/{sid}/Messages.json", Call.receive_sms, "api", "", _SMS_FORM),
    ("GET", "/{address}", Call.load_inbox, "inbox", _WAIT, "", "Inbox"),
))


# -- OpenAPI

_MAY_BE_NULL = {"name", "email", "phone", "body", "text", "alt", "contentId", "ehlo", "mailFrom",
                "client", "user", "code", "expires", "watch"}


def _schema_of(value: Any, name: str = "") -> Dict[str, Any]:
    """The schema of values like this one, which has something in each list."""
    null = {"nullable": True} if name in _MAY_BE_NULL else {}
    if isinstance(value, dict):
        members = {name: _schema_of(member, name) for name, member in value.items()}
        return {"type": "object", "properties": members, "required": list(members), **null}
    if isinstance(value, (list, tuple)):
        return _list(_schema_of(value[0]) if value else _STRING)
    kind = {bool: "boolean", int: "integer", float: "number"}.get(type(value), "string")
    return {"type": kind, **null}


def _schemas(api: Api) -> Dict[str, Any]:
    """The schemas of what routes give, read from a message that has something in every member."""
    message = Message(new_id(), compose(
        {"From": "a@b.example", "To": "c@d.example", "Cc": "e@f.example"}, _SAMPLE["text"],
        _SAMPLE["source"] + "<img src=cid:a>", [{
            "file_name": "a", "content_type": "image/png", "content_id": "a", "content": b"x"}]),
        Envelope("a@b.example", ("g@h.example",)))
    listed = {"$ref": "#/components/schemas/Item"}, {"$ref": "#/components/schemas/Message"}
    inbox = InboxView("", True, 0.0, 0, 0, (("", 0, 0),), watch=Watch(1.0, 0.0, False))
    return {"Message": _schema_of(message_value(api, message, "")),
            "Item": _schema_of(json.loads(item(api, message))),
            "List": {"type": "object", "properties": {"items": _list(listed[0])}},
            "Inbox": {"type": "object", "properties": {
                **_schema_of(_inbox(inbox))["properties"], "messages": _list(listed[1])}}}


def _needed(schema: Dict[str, Any]) -> Dict[str, Any]:
    """The schema of what must be there."""
    least = {"minLength": 1} if schema.get("type") == "string" else {}
    return {**{name: value for name, value in schema.items() if name != "nullable"}, **least}


def _body_schema(words: str, parameters: Dict[str, Parameter]) -> Dict[str, Any]:
    """The schema of a body with these members."""
    schema: Dict[str, Any] = {"type": "object", "properties": {}}
    for word in words.split():
        given = [(parameters[key].name, parameters[key].kind.schema)
                 for key in re.findall(r"\w+", word)]
        schema["properties"].update(given)
        there = [{"required": [name], "properties": {name: _needed(kind)}} for name, kind in given]
        if "!" in word:
            schema["properties"].update(there[0]["properties"])
            schema.setdefault("required", []).extend(there[0]["required"])
        elif "|" in word:
            schema["anyOf"] = there
        elif ">" in word:
            schema["anyOf"] = [{"properties": {given[0][0]: {"enum": [False, None]}}}, there[1]]
    return schema


def _operation(route: Route, parameters: Dict[str, Parameter]) -> Dict[str, Any]:
    """The OpenAPI description of a route."""
    given = [{"name": name, "in": "path", "required": True, "schema": _STRING}
             for name in re.findall(r"\{(\w+)\}", route.path)]
    for word in route.query.split():
        parameter = parameters[word.rstrip("!")]
        schema = _needed(parameter.kind.schema) if "!" in word else parameter.kind.schema
        given.append({"name": parameter.name, "in": "query", "description": parameter.text,
                      "required": "!" in word,
                      "schema": _list(schema) if parameter.many else schema})
    success = {Call.receive_sms: "201", Call.see: "204"}.get(route.run) or (
        "204" if route.method == "DELETE" else "200")
    content: Dict[str, Any] = {route.gives: {}} if "/" in route.gives else {"application/json": (
        {"schema": {"$ref": f"#/components/schemas/{route.gives}"}} if route.gives else {})}
    error = {"description": "An error", "content": {
        "application/json": {"schema": {"type": "object"}}}}
    found: Dict[str, Any] = {"summary": route.run.__doc__, "parameters": given,
             "operationId": route.run.__name__ + re.sub(r"\W", "_", route.path),
             "responses": {success: {"description": "Success", **(
                 {} if success == "204" else {"content": content})}, "default": error}}
    if route.path.startswith("/api/files/"):
        found["responses"]["404"] = {"description": "None such, without a body"}
    if route.body:
        form = "x-www-form-urlencoded" if route.run is Call.receive_sms else "json"
        found["requestBody"] = {
            "required": bool(re.search("[!|]", route.body)),
            "content": {f"application/{form}": {"schema": _body_schema(route.body, parameters)}}}
    return found


def openapi(api: Api, base: str) -> Dict[str, Any]:
    """The OpenAPI 3.0 description of ROUTES."""
    paths: Dict[str, Any] = {}
    for route in ROUTES:
        if route.run is not Call.get_file:
            paths.setdefault(route.path, {})[route.method.lower()] = _operation(
                route, api.parameters)
    return {"openapi": "3.0.3", "info": {"title": "mailtest", "version": __version__},
            "servers": [{"url": base}], "paths": paths,
            "components": {"schemas": _schemas(api)}}


# -- dispatch

# What the paths of a route look like; one slash at the end does not count.
_PATTERNS = [(re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", route.path.replace(".", r"\."))
                         + "/?"), route) for route in ROUTES]
_MAKERS = (Call.acquire, Call.watch)     # a GET that changes something


def _segment_text(segment: str) -> str:
    try:
        if re.search(r"%(?![0-9A-Fa-f]{2})", segment):
            raise ValueError
        return urllib.parse.unquote(segment, errors="strict")
    except ValueError:                   # UnicodeDecodeError is one
        raise ApiError(400, "bad_request", "Expected percent-encoded UTF-8 in the path, got "
                                           f"{segment[:80]!r}", "path") from None


def _methods(route: Route) -> Tuple[str, ...]:
    """Those that a route takes: HEAD asks for what GET would, unless that changes something."""
    return ("GET", "HEAD") if route.method == "GET" and route.run not in _MAKERS else (
        route.method,)


def find_route(method: str, path: str) -> Tuple[Route, Dict[str, Any]]:
    """The route of a request and the values of its path; ApiError 404 or 405."""
    found = [(match, route) for pattern, route in _PATTERNS for match in [pattern.fullmatch(path)]
             if match and (route.path != "/{address}" or "@" in path or "%40" in path)]
    if not found:
        raise ApiError(404, "not_found", f"No endpoint {path[:80]!r}: see GET /openapi.json")
    for match, route in found:
        if method in _methods(route):
            return route, {name: _segment_text(text) for name, text in match.groupdict().items()}
    exact = [each for each in found if not each[0].groups()]     # search is itself, and no {id}
    allowed = [each for _, route in exact or found for each in _methods(route)]
    allowed = sorted(dict.fromkeys(allowed), key="HEAD".__eq__)
    raise ApiError(405, "method_not_allowed", f"Expected {' or '.join(allowed)}, got {method!r}",
                   headers=(("Allow", ", ".join(allowed + ["OPTIONS"])),))


# Addresses, and names that no public DNS can hold.
_LOCAL = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}|\[[0-9a-f:.]+\]|[a-z0-9_-]+|[a-z0-9_.-]+"
                    r"\.(?:localhost|local|internal|test|invalid|home\.arpa)", re.I)


def is_allowed(policy: ApiPolicy, host: str) -> bool:
    """Whether --allow-host names a host, or a domain (.example.com) that it belongs to."""
    return any(host.lower() == name.lstrip(".")
               or name.startswith(".") and host.lower().endswith(name)
               for name in policy.allow_hosts)


def _check_host(api: Api, request: Request) -> None:
    """Refuses names that a foreign page may have pointed at this address (DNS rebinding)."""
    given = request.headers.get("host", "")
    host = re.sub(r":[0-9]{1,5}$", "", given)
    if given and not request.tunnel and not _LOCAL.fullmatch(host) and (
            not is_allowed(api.policy, host)):       # no host at all: a health check, no browser
        raise ApiError(421, "misdirected", "Expected a Host field with an IP address, a local "
                       f"name, or one that --allow-host names, got {given[:80]!r}")


def _check_origin(api: Api, request: Request, route: Route) -> None:
    """Refuses what a foreign page would change.  What it reads, its browser keeps from it, unless
    --allow-origin names it."""
    host = request.headers.get("host", "")
    origin, site = (request.headers.get(name) for name in ("origin", "sec-fetch-site"))
    reads = route.method == "GET" and (route.run not in _MAKERS
                                       or origin in api.policy.allow_origins)
    ours = site == "same-origin" or site in (None, "none") and (
        origin is None or origin.partition("://")[2] == host)
    if not reads and not ours:
        raise ApiError(403, "foreign_origin", "Expected a request from a page of this catcher or "
                       f"from no page, got Origin {(origin or '')[:80]!r} for the host "
                       f"{host[:80]!r}" + (f" and Sec-Fetch-Site {site[:80]!r}" if site else ""))


def _has_key(key: str, authorization: str) -> bool:
    """Whether Basic credentials hold the API key as user or password, compared in constant time.
    A key may hold a colon itself."""
    scheme, _, text = authorization.partition(" ")
    try:
        given = base64.b64decode(text.strip(), validate=True)
    except ValueError:
        return False
    halves = [given, *given.split(b":", 1), *given.rsplit(b":", 1)]
    right = [same(half, key.encode("utf-8")) for half in halves]
    return scheme.lower() == "basic" and any(right)


def _network(client: str) -> str:
    """Whose requests are counted together: an IPv4 address, an IPv6 /64.  A proxy may have given
    the port too: 192.0.2.1:1234, [2001:db8::1]:1234."""
    match = re.fullmatch(r"\[([^]]*)\](?::[0-9]+)?|([0-9.]+):[0-9]+", client)
    client = (match.group(1) or match.group(2) or "") if match else client
    if client.lower().startswith("::ffff:"):
        client = client[7:]
    try:
        return socket.inet_pton(socket.AF_INET6, client)[:8].hex()
    except (OSError, ValueError):        # IPv4, or whatever a proxy calls it
        return client


def _is_acquired(api: Api, address: str) -> bool:
    """Whether the inbox was acquired, and so cannot be guessed."""
    try:
        return api.store.inbox(address).acquired
    except Ended:                        # the answer says when
        return True
    except Unknown:
        return False


def _check_access(api: Api, request: Request, route: Route, values: Dict[str, Any]) -> None:
    """Refuses what needs the API key.  Without it, `inbox` keeps only what was acquired."""
    policy = api.policy
    wait = api.store.rate(_network(request.client)) if route.access == "inbox" else 0
    if wait:
        raise ApiError(429, "rate_limited", f"Expected at most {api.store.limits.rate} "
                       f"requests a minute; try again in {wait:.0f} s",
                       headers=(("Retry-After", str(int(wait) + 1)),))
    if not policy.hosted and not policy.api_key or route.access == "open" or policy.api_key and (
            _has_key(policy.api_key, request.headers.get("authorization", ""))):
        return
    named = [values["address"]] if "address" in values else []
    if route.access == "known" and "id" in values:
        with contextlib.suppress(Unknown):
            named = list(api.store.message(values["id"]).inboxes)
    if "inbox" in values:
        values["inbox"] = [each for each in values["inbox"] if _is_acquired(api, each)]
    elif route.access == "api" or not any(_is_acquired(api, address) for address in named) and (
            route.run is not Call.acquire):
        if not policy.api_key:
            raise ApiError(403, "forbidden", "This hosted service was started without --api-key: "
                           "who knows an acquired address may read it, and nobody may do more")
        raise ApiError(401, "unauthorized", "Expected HTTP Basic authentication with the API key "
                       "as user or password; only what acquired addresses get is open without",
                       headers=(("WWW-Authenticate", 'Basic realm="mailtest"'),))


def _respond(api: Api, request: Request) -> Response:
    """Checks what the head of a request says, and only then reads its body; the handler's answer
    as a response."""
    _check_host(api, request)
    route, values = find_route(request.method, request.path)
    _check_origin(api, request, route)
    given, limits = _pairs(request.query), api.store.limits
    if "inbox" in given and "inbox" in route.query.split():
        values["inbox"] = given["inbox"]
    _check_access(api, request, route, values)
    known = [api.parameters[word.rstrip("!")].name for word in route.query.split()]
    for name in given:                   # Mailosaur ignores what it does not know; but a mistyped
        if route.access == "inbox" and name not in known:        # filter would match any mail
            raise ApiError(400, "bad_request", f"Unknown parameter {_seen(name)}: expected "
                           f"{', '.join(known) or 'none'}")
    values = {**_arguments(route.query, given, api.parameters), **values}
    mail = "source" in route.body        # HTML and attachments, in base64
    octets = request.read(limits.max_size * 3 // 2 * mail + limits.http_body)
    if route.run is Call.receive_sms:
        form = _pairs(octets.decode("utf-8", "replace"))
        values.update(_arguments(route.body, form, api.parameters))
    elif route.body:
        values.update(_from_json(route.body, _members(octets), api.parameters))
    return _response(route.run(Call(api, request), **values))


_TWILIO = {"To": 21604, "From": 21603, "Body": 21602}            # its codes for what is missing


def _error(request: Request, error: ApiError) -> Response:
    """A refusal as a response; Mailosaur's endpoints have a form of their own."""
    if request.path.startswith("/api/files/") and error.status == 404:
        return Response(404, headers=error.headers)  # Node's client hands a body on as the file
    value: Dict[str, Any] = {"error": error.error, "detail": error.detail}
    if request.path.startswith("/api/"):
        kind = {400: "ValidationError", 401: "AuthenticationError", 404: "NotFound"}
        value = {"type": kind.get(error.status, "Error"), "message": error.detail, "errors": [
            {"field": error.field, "detail": [{"description": error.detail}]}]}
    if request.path.startswith("/2010-04-01/") and error.field in _TWILIO:
        value.update(code=_TWILIO[error.field], message=error.detail)
    value.update(error.more)
    return _response(value)._replace(status=error.status, headers=error.headers)


def _refusal(error: Exception) -> ApiError:
    """What the client is told of an exception."""
    if isinstance(error, Unknown):
        return ApiError(404, "not_found", str(error))
    if isinstance(error, Full):
        return ApiError(503, "full", f"Try again later: {error}",
                        headers=(("Retry-After", "1"),))
    return ApiError(500, "internal", "This is a defect of mailtest; its log on standard error "
                                     "says more")


def answer(api: Api, request: Request) -> Response:
    """The response to a request, whatever it is."""
    try:
        response = _respond(api, request)
    except Abandoned:
        raise Hangup("hung up while it waited") from None
    except Hangup:
        raise
    except Exception as error:           # the edge of a request: the client learns no more
        refusal = error if isinstance(error, ApiError) else _refusal(error)
        if refusal.status == 500:
            log_error("%s %s failed", request.method, request.path, trace=True)
        response = _error(request, refusal)
        if refusal.status == 405 and request.method == "OPTIONS":
            response = Response(204, headers=refusal.headers)
    origin = request.headers.get("origin")
    if origin in api.policy.allow_origins and request.method in ("GET", "HEAD", "OPTIONS"):
        response = response._replace(headers=response.headers + (
            ("Access-Control-Allow-Origin", origin), ("Vary", "Origin"),
            ("Access-Control-Allow-Headers", "Authorization"),
            ("Access-Control-Expose-Headers", "X-Total-Count")))
    return response


# ---- HTTP server -----------------------------------------------------------
# Drives the API over a connection.  http.server's own reading of requests
# spends half its time in the email parser, ignores Transfer-Encoding, waits
# for -1 octets and leaves unread bodies to be the next request: RFC 9112 here.

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_TARGET = re.compile(rb"[\x21-\x7e]+")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
_FORWARDED = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::[0-9]+)?|([0-9.]+)(?::[0-9]+)?")
_TUNNELS = re.compile(r"(?:[a-z0-9-]+\.)?mailosaur\.(?:com|net|io)|localhost|127\.0\.0\.1|\[::1\]",
                    re.I)
_FIXED = (b"Server: mailtest\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
          b"Referrer-Policy: no-referrer\r\nCross-Origin-Resource-Policy: same-origin\r\n")
_CLOSED_POLICY = b"Content-Security-Policy: default-src 'none'; frame-ancestors 'none'\r\n"


def _expected(what: str, got: Union[None, str, bytes] = None, status: int = 400,
              error: str = "bad_request") -> ApiError:
    """The refusal of what is no request by RFC 9112, or is beyond a bound."""
    text = got.decode("latin-1") if isinstance(got, bytes) else got
    return ApiError(status, error, f"Expected {what}{'' if text is None else ', got '}"
                                   f"{'' if text is None else _seen(text)}")


class HttpHandler(http.server.BaseHTTPRequestHandler):
    """One connection; `request` is a Connection, `server` an HttpServer."""

    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        """Begins without the files that the base class makes: an own buffer is faster."""
        self._buffer = b""
        self._silent = True              # nothing was said yet
        self._reserved = 0               # octets of the body, counted in the store
        self._tunnel = False
        self._secure = self.server.https
        self.close_connection = False

    def handle(self) -> None:
        """Answers requests until the connection should close."""
        if self._secure:
            self.request.start_tls(self.server.tls)
        self.request.set_timeout(self.server.limits.http_idle)
        while not self.close_connection:
            self.handle_one_request()

    def finish(self) -> None:
        """Nothing to flush: each response is sent whole."""

    def handle_one_request(self) -> None:
        """Reads a request, answers it."""
        self.command, self._target, self.version = "GET", "/", b"HTTP/1.1"
        try:
            head = self._read_head()
            if head is None:
                self.close_connection = True
                return
            self.parse_request(head)
            if self.command == "CONNECT":
                self._connect()
                return
        except ApiError as error:        # after that the framing cannot be trusted
            self.close_connection = True
            path = self._target.partition("?")[0]
            self._send(_error(Request(self.command, path), error))
            self.request.linger()
            return
        path, _, query = self._target.partition("?")
        request = Request(self.command, path, query, self.headers, self._read_body,
                          self._client(), self._secure, self._tunnel, self._is_gone)
        self._unread = not {"content-length", "transfer-encoding"}.isdisjoint(self.headers)
        try:
            response = answer(self.server.api, request)
        finally:
            if self._reserved:
                self.server.api.store.release(self._reserved)
                self._reserved = 0
        if self._unread:                 # refused by its head alone, or broken
            self.close_connection = True
        self._send(response)
        if self._unread:
            self.request.linger()

    def _is_gone(self) -> bool:
        """Whether the client has hung up; HTTP/1.1 allows us to ask (RFC 9110 15.2)."""
        return self.request.is_gone(b"" if self.version == b"HTTP/1.0" else
                                    b"HTTP/1.1 102 Processing\r\n\r\n")

    # -- reading

    def _read_head(self) -> Optional[bytes]:
        """The request line and header fields; None when the client has nothing more to say."""
        limits, until = self.server.limits, 0.0
        self._buffer = self._buffer.lstrip(b"\r\n")     # RFC 9112 2.2: ignore empty lines
        while b"\r\n\r\n" not in self._buffer and b"\n\n" not in self._buffer:
            if self._buffer[:2] == b"\x16\x03":
                raise _expected("HTTP, got TLS")
            if self._buffer[:5].upper() in (b"EHLO ", b"HELO ", b"LHLO "):
                self._refuse_smtp()
                return None
            if len(self._buffer) > limits.http_head:
                break                                # refused below
            try:
                octets = self.request.receive()
            except Silence:
                if self._silent and not self._secure:
                    self._refuse_smtp()  # perhaps it waits for a greeting
                raise
            if not octets or self.server.stopping.is_set():
                return None
            self._silent = False
            self._buffer = (self._buffer + octets).lstrip(b"\r\n")
            until = until or time.monotonic() + limits.http_head_time
            if time.monotonic() > until:
                raise _expected(f"a whole request head within {limits.http_head_time:g} seconds",
                                None, 408, "timeout")
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        if len(head) > limits.http_head:
            raise _expected(f"a request head of at most {limits.http_head} octets", None, 431,
                            "too_large")
        return head

    def _refuse_smtp(self) -> None:
        """One line for a client that speaks SMTP: such clients show it to their users."""
        self.request.send(b"554 5.3.2 This is the HTTP port of mailtest; SMTP is at %b\r\n"
                          % self.server.api.policy.smtp.encode("ascii", "replace"))

    def parse_request(self, head: bytes) -> None:
        """Takes the head apart; ApiError if it is not RFC 9112's."""
        lines = head.split(b"\r\n")
        words = lines[0].split(b" ")
        if len(words) != 3 or not _TOKEN.fullmatch(words[0]) or not _TARGET.fullmatch(words[1]):
            raise _expected("METHOD TARGET HTTP/1.1", lines[0])
        self._target, self.version = words[1].decode("ascii"), words[2]
        if not re.fullmatch(rb"HTTP/1\.[0-9]", words[2]):
            known = re.fullmatch(rb"HTTP/[0-9]\.[0-9]", words[2])
            raise _expected("HTTP/1.1 or HTTP/1.0", None, 505 if known else 400, "bad_version")
        if len(words[1]) > self.server.limits.http_target:
            raise _expected(f"a target of at most {self.server.limits.http_target} octets", None,
                            414, "too_large")
        self.command = words[0].decode("ascii")
        self.headers = self._parse_fields(lines[1:])
        if words[2] != b"HTTP/1.0" and "host" not in self.headers:
            raise _expected("a Host field")
        if self._target[:1] != "/" and self.command != "CONNECT":
            self._take_absolute_target()
        connection = self.headers.get("connection", "").lower()
        self.close_connection = ("close" in connection or words[2] == b"HTTP/1.0"
                                 and "keep-alive" not in connection)

    def _parse_fields(self, lines: List[bytes]) -> Dict[str, str]:
        if len(lines) > self.server.limits.http_fields:
            raise _expected(f"at most {self.server.limits.http_fields} header fields", None, 431,
                            "too_large")
        fields: Dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(b":")
            if not colon or not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
                raise _expected("a header field", line)
            key, text = name.decode("ascii").lower(), value.strip(b" \t").decode("latin-1")
            if key in fields:
                if key in ("host", "content-length", "transfer-encoding", "authorization"):
                    raise _expected(f"one {key} field, got more")
                text = f"{fields[key]}, {text}"
            fields[key] = text
        return fields

    def _take_absolute_target(self) -> None:
        """RFC 9112 3.2.2: a client may name the whole URL, or * for OPTIONS."""
        if self._target == "*" and self.command == "OPTIONS":
            self._target = "/"
            return
        try:
            parts = urllib.parse.urlsplit(self._target)
        except ValueError:               # brackets that do not match
            parts = urllib.parse.urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise _expected("a target that begins with /", self._target)
        self.headers["host"] = parts.netloc
        self._target = (parts.path or "/") + ("?" + parts.query if parts.query else "")

    def _read_body(self, most: int) -> bytes:
        """The whole body, so that it is never taken for the next request."""
        octets = self._body(most)
        self._unread = False
        return octets

    def _body(self, most: int) -> bytes:
        length, coding = self.headers.get("content-length"), self.headers.get("transfer-encoding")
        if length is None and coding is None:
            return b""
        if coding is not None:
            if length is not None or self.version == b"HTTP/1.0":
                raise _expected("Content-Length or Transfer-Encoding, not both, and the latter in "
                                "HTTP/1.1 alone")
            if coding.lower() != "chunked":
                raise _expected("Transfer-Encoding: chunked", coding, 501, "not_implemented")
            self._continue()
            return self._read_chunks(most)
        if not re.fullmatch("[0-9]{1,20}", length):
            raise _expected("Content-Length: digits", length)
        if int(length) > most:
            raise _expected(f"a body of at most {most} octets", length, 413, "too_large")
        if int(length):
            self._continue()
        return self._take(int(length), time.monotonic() + self.server.limits.http_body_time)

    def _continue(self) -> None:
        """RFC 9110 10.1.1: a client may wait for leave before it sends a large body."""
        expect = self.headers.get("expect")
        if expect is None or self.version == b"HTTP/1.0":
            return
        if expect.lower() != "100-continue":
            raise _expected("Expect: 100-continue", expect, 417, "expectation_failed")
        if not self._buffer:
            self.request.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _take(self, count: int, until: float) -> bytes:
        """Exactly that many octets."""
        parts, left = [self._buffer], count - len(self._buffer)
        while left > 0:
            octets = self._more(until)
            parts.append(octets)
            left -= len(octets)
        octets = b"".join(parts)
        self._buffer = octets[count:]
        return octets[:count]

    def _more(self, until: float) -> bytes:
        """What arrives of the body next, counted as mail that is arriving is; raises Full."""
        octets = self.request.receive()
        if not octets or time.monotonic() > until:
            raise Hangup("hung up within a request body")
        self.server.api.store.reserve(len(octets))
        self._reserved += len(octets)
        return octets

    def _take_line(self, until: float) -> bytes:
        while b"\r\n" not in self._buffer:
            if len(self._buffer) > 4_096:
                raise _expected("a chunk size in a short line")
            self._buffer += self._more(until)
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line

    def _read_chunks(self, most: int) -> bytes:
        """A chunked body (RFC 9112 7.1); extensions and trailers are not looked at."""
        until = time.monotonic() + self.server.limits.http_body_time
        parts: List[bytes] = []
        total, size = 0, 1
        while size:
            line = _CHUNK.fullmatch(self._take_line(until))
            if not line:
                raise _expected("a chunk size in hexadecimal")
            size = int(line[1], 16)
            total += size
            if total > most:
                raise _expected(f"a body of at most {most} octets", None, 413, "too_large")
            if size:
                parts.append(self._take(size, until))
                if self._take(2, until) != b"\r\n":
                    raise _expected("CRLF after a chunk")
        self._parse_fields(list(itertools.islice(
            iter(lambda: self._take_line(until), b""), self.server.limits.http_fields + 1)))
        return b"".join(parts)

    def _client(self) -> str:
        """The client's network address; behind a trusted proxy the one that it names last."""
        if not self.server.api.policy.trust_proxy:
            return self.client_address
        named = self.headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
        match = _FORWARDED.fullmatch(named)          # with a port, perhaps
        return (match[1] or match[2] if match else named[:60]) or self.client_address

    def _connect(self) -> None:
        """Ends a client's tunnel to Mailosaur here: HTTPS_PROXY alone brings it to us."""
        host, _, number = self._target.rpartition(":")
        if not host or not number.isdecimal():
            raise _expected("CONNECT host:port", self._target)
        known = _TUNNELS.fullmatch(host) or is_allowed(self.server.api.policy, host)
        if not known or number not in ("443", str(self.server.port)):
            log_info("refused a tunnel to %s for %s", _seen(self._target), self.client_address)
            raise _expected("CONNECT mailosaur.com:443 (all other tunnels are refused)",
                            self._target, 403, "forbidden")
        if self.server.tls is None:
            raise ApiError(501, "not_implemented", "CONNECT needs a certificate: start with "
                                                   "--tls-cert and --tls-key, or --tls")
        if self._buffer:
            raise _expected("nothing before the answer to CONNECT")
        self.request.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        self.request.start_tls(self.server.tls)
        self.request.set_timeout(self.server.limits.http_idle)
        self._secure = self._tunnel = True
        self.close_connection = False

    # -- writing

    def _send(self, response: Response) -> None:
        """The one place where a response becomes octets: one write for head and body."""
        status, body, kind, headers, stream = response
        fields = b"".join(f"{name}: {value}\r\n".encode("latin-1", "replace")
                          for name, value in headers)
        if self.server.stopping.is_set():
            self.close_connection = True
        head = b"HTTP/1.1 %d %b\r\nDate: %b\r\n%b%b%b%b" % (
            status, http.client.responses.get(status, "").encode("ascii"),
            email.utils.formatdate(usegmt=True).encode("ascii"), _FIXED,
            b"" if b"Content-Security-Policy" in fields else _CLOSED_POLICY, fields,
            b"Connection: close\r\n" if self.close_connection else
            b"Connection: keep-alive\r\n" if self.version == b"HTTP/1.0" else b"")
        if status != 204:
            head += b"Content-Type: " + kind.encode("latin-1", "replace") + b"\r\n"
        self._blocked, self._sent = 0.0, 0
        if stream is not None:
            self._send_stream(head, stream)
            return
        if status != 204:
            head += b"Content-Length: %d\r\n" % len(body)
        if self.command == "HEAD":
            body = b""
        if len(body) < 65_536:
            self._write(head + b"\r\n" + body)
        else:
            self._send_large(head + b"\r\n", body)

    def _write(self, octets: bytes) -> None:
        """Sends octets, if they are read fast enough: a client that is slow holds memory."""
        for start in range(0, len(octets), 262_144):
            began = time.monotonic()
            self.request.send(memoryview(octets)[start:start + 262_144])
            self._blocked += time.monotonic() - began
            self._sent += min(262_144, len(octets) - start)
            if self._blocked > self.server.limits.http_idle + self._sent / (
                    self.server.limits.http_rate):
                raise Silence("read its answer too slowly")

    def _send_large(self, head: bytes, body: bytes) -> None:
        """Two writes, since a copy would cost more.  Those who ask for much at once and do not
        read it may hold only so many octets."""
        client = self._client()
        if not self.server.may_send(client, len(body)):
            self.close_connection = True
            self._send(_error(Request(self.command, "/"), ApiError(
                503, "busy", "Too many large answers are being sent; try again",
                headers=(("Retry-After", "1"),))))
            return
        try:
            self._write(head)
            self._write(body)
        finally:
            self.server.may_send(client, -len(body))

    def _send_stream(self, head: bytes, stream: Any) -> None:
        """Chunks as they come; an HTTP/1.0 client reads to the end of the connection."""
        chunked = self.version != b"HTTP/1.0"
        if not chunked and not self.close_connection:
            self.close_connection = True
            head = head.replace(b"Connection: keep-alive\r\n", b"Connection: close\r\n")
        try:
            self._write(head + (b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"\r\n"))
            if self.command == "HEAD":
                return
            for octets in filter(None, stream):
                self._write(b"%x\r\n%b\r\n" % (len(octets), octets) if chunked else octets)
            if chunked:
                self._write(b"0\r\n\r\n")
        finally:
            getattr(stream, "close", bool)()         # a generator counts its client until then


_BUSY = _json({"error": "busy", "detail": "Too many connections: try again later"})


class HttpServer(Listener):
    """HTTP on one port; with `https` HTTP over TLS alone.  Each connection has a thread, since
    an answer may wait for mail."""

    refusal = (b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
               b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
               % (len(_BUSY), _BUSY))

    def __init__(self, host: str, port: int, api: Api, tls: Optional[ssl.SSLContext] = None,
                 https: bool = False):
        super().__init__("http", host, port, api.store.limits)
        self.api = api
        self.tls = tls
        self.https = https
        self._sending: "collections.Counter[str]" = collections.Counter()    # see may_send()

    def serve(self, connection: Connection) -> None:
        """Answers the connection's requests."""
        HttpHandler(connection, connection.client, self)

    def may_send(self, client: str, octets: int) -> bool:
        """Counts octets of a client's large answer, a negative number once they are sent; False
        if too many are being sent already: half of all may be to one client."""
        with self._guard:
            own, total = self._sending[client], sum(self._sending.values())
            if octets > 0 and (own and own + octets > self.limits.sending // 2
                               or total and total + octets > self.limits.sending):
                return False
            self._sending[client] += octets
            if not self._sending[client]:
                del self._sending[client]
            return True


# ---- Mailtest --------------------------------------------------------------
# Wires store, servers and page; what a Python test holds in its hands.

class NoMail(AssertionError):
    """The mail that was waited for did not come, or one came that should not; the text tells
    what did arrive, and what may explain the silence."""


class Inbox:
    """A temporary address, and the mail that it got."""

    def __init__(self, store: Store, address: str):
        self._store = store
        self._since = store.wall()       # what came earlier is not of its test
        self.address = address

    def __repr__(self) -> str:
        return f"<Inbox {self.address}>"

    @property
    def messages(self) -> List[Mail]:
        """Its mail, newest first; Unknown once an acquired one has ended."""
        return [Mail(message) for message in self._store.messages(self.address)]

    @property
    def attempts(self) -> int:
        """How many times a client asked to send to it (RCPT), refused or not."""
        return self._store.inbox(self.address).attempts

    @property
    def expires(self) -> datetime.datetime:
        """When it and its mail will be gone."""
        return datetime.datetime.fromtimestamp(self._store.inbox(self.address).expires,
                                               datetime.timezone.utc)

    def delete(self) -> None:
        """Ends it and its mail now, if there is any; so a test can begin with it."""
        with contextlib.suppress(Unknown):
            self._store.drop_inbox(self.address)

    def wait(self, subject: str = "", timeout: float = 5.0, count: int = 1, **more: Any) -> Mail:
        """The newest mail that matches, at once or when it arrives, with `count` once there are
        so many; NoMail after `timeout` seconds.  wait_all() tells what matches."""
        __tracebackhide__ = True         # pytest then shows the line that waits
        return self.wait_all(count, subject, timeout, **more)[0]

    def wait_all(self, count: int, subject: str = "", timeout: float = 5.0,
                 after: Optional[Mail] = None, where: Optional[Callable[[Mail], Any]] = None,
                 **filters: str) -> List[Mail]:
        """At least `count` mails that match, newest first: that came after the mail `after`, for
        which `where` returns something true, and that the filters of criteria() mean: a part of
        the `subject`, of a `body`, of a `header` field; the `sender` or a recipient (`to`)."""
        __tracebackhide__ = True
        filters["subject"] = subject
        found = self._collect(count, timeout, after, where, filters)
        if len(found) < count:
            shown = ", ".join(f"{name}={filters[name]!r}" for name in (
                "subject", "sender", "to", "body", "header") if filters.get(name))
            raise NoMail(f"expected {count} mail{'s' * (count > 1)} for {self.address}"
                         f"{' with ' * bool(shown)}{shown} within {timeout:g} s, "
                         f"got {len(found)}\n{self.report()}")
        return found

    def expect_none(self, timeout: float = 1.0, after: Optional[Mail] = None,
                    where: Optional[Callable[[Mail], Any]] = None, **filters: str) -> None:
        """Returns after `timeout` seconds of silence; NoMail once a matching mail is there."""
        __tracebackhide__ = True
        if self._collect(1, timeout, after, where, filters):
            raise NoMail(f"expected no mail for {self.address}\n{self.report()}")

    def _collect(self, count: int, timeout: float, after: Optional[Mail],
                 where: Optional[Callable[[Mail], Any]], filters: Dict[str, str]) -> List[Mail]:
        """See collect(); NoMail if the inbox or the catcher has ended, since then nothing can
        come, and silence proves nothing."""
        __tracebackhide__ = True
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"expected count to be 1 or more, got {count!r}")
        if not isinstance(timeout, (int, float)) or not 0 <= timeout < float("inf"):
            raise ValueError(f"expected timeout to be seconds, 0 or more, got {timeout!r}")
        if not (after is None or isinstance(after, Mail)):
            raise TypeError(f"expected after to be a Mail, got {after!r}")
        wanted = criteria(**filters)

        def match(message: Message) -> bool:
            return wanted.match(message) and (where is None or bool(where(Mail(message))))
        try:
            found = collect(self._store, match, count, timeout,
                            after.number if after is not None else 0, address=self.address)
        except Unknown as ended:
            raise NoMail(f"no mail for {self.address} can come: {ended}") from None
        if len(found) < count and self._store.closed:
            raise NoMail(f"no mail for {self.address} can come: the catcher was stopped\n"
                         f"{self.report()}")
        return [Mail(message) for message in found]

    def report(self) -> str:
        """What the inbox got, and what may explain what it did not get, for a failed test."""
        mails: List[Mail] = []
        try:
            mails = self.messages
            lines = [f"{self.address} got {len(mails)} mail{'s' * (len(mails) != 1)}"
                     f"{':' * bool(mails)}"]
        except Unknown as unknown:
            lines = [f"nothing arrived: {unknown}"]
        for mail in mails[:20]:
            lines.append(f"  {mail.received:%H:%M:%S.%f} {mail!r}")
            lines.extend(f"    warning: {warning}" for warning in mail.warnings)
        with contextlib.suppress(KeyError, RuntimeError):    # not imported, or no loop
            if sys.modules["asyncio"].get_running_loop() and not mails:
                lines.append("this thread runs an event loop, which stands still while a test "
                             "waits; write: await asyncio.to_thread(inbox.wait, ...)")
        lines.extend(silence(self._store, self.address, self._since))
        refused = next((record for record in self._store.sessions()
                        if record.refused and record.ended >= self._since), None)
        if refused:
            lines.append(f"last refused SMTP session ({refused.refused}):")
            lines.extend("  " + line for line in
                         refused.transcript.decode("utf-8", "replace").splitlines()[-20:])
        return "\n".join(lines)


def _webhook_parts(url: str) -> Any:
    """The parts of an http or https URL; ValueError for any other."""
    with contextlib.suppress(ValueError):            # no port, or brackets that do not match
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
        if (parts.scheme in ("http", "https") and parts.port != 0
                and re.fullmatch("[!-~]+", url) and (":" in host or _is_domain(host))):
            return parts
    shown = re.sub("//[^/]*@", "//...@", url)        # a log shows no password
    raise ValueError(f"expected --webhook http://host/path, got {shown!r}")


class Follower:
    """Does something with each message beside keeping it, in order, in a thread of its own: mail
    never waits for it.  A fault is logged once, not for each message."""

    option = ""                          # of the command line
    words = ("done", "failed")           # how /healthz calls what was handled

    def __init__(self, store: Store):
        self.done = self.failed = 0
        self.error = ""                  # of the message that is being handled, or of the last
        self.given_up = threading.Event()
        self._store = store
        self._logged = ""                # the error that was logged, until something works
        self._number = 0                 # of the latest message that was handled
        self._thread = threading.Thread(target=self._run, name=self.option[2:], daemon=True)
        self.start = self._thread.start

    def handle(self, message: Message) -> str:
        """Does it; "", or why it failed."""
        raise NotImplementedError

    def hang_up(self) -> None:
        """Ends what is under way."""

    def stop(self) -> None:
        """Lets the thread come to its end once the store is closed, unless nothing works just
        now; logs what was left."""
        if self._thread.ident:           # else it never started
            self._thread.join(0.0 if self.error else self._store.limits.stop_time)
            self.given_up.set()
            self.hang_up()
            self._thread.join(self._store.limits.stop_time)
            left = len(self._new(0.0))
            if left:
                log_error("%s: %d messages were left at the stop", self.option, left)

    def tell(self, error: str) -> None:
        """Remembers why the latest try failed; logs that if it is new."""
        if error and error != self._logged:
            log_error("%s: %s", self.option, error)
            self._logged = error
        self.error = error

    def state(self) -> Dict[str, Any]:
        """For /healthz."""
        done, failed = self.words
        return {done: self.done, "waiting": len(self._new(0.0)), failed: self.failed,
                "error": self._logged or None}

    def _new(self, timeout: float) -> List[Message]:
        """What is to be handled yet, oldest first, waited for."""
        try:
            return self._store.messages(server=DEFAULT_SERVER, after=self._number,
                                        timeout=timeout)[::-1]
        except Full:                     # too many others wait
            self.given_up.wait(0.1)
            return []

    def _run(self) -> None:
        ending = False
        while not ending:
            ending = self._store.closed  # then nothing comes after what _new() returns
            for message in self._new(1.0):
                self.error = ""
                try:
                    error = self.handle(message)
                except Exception as defect:          # the next message has its turn
                    log_error("%s: message %s", self.option, message.id, trace=True)
                    error = self._logged = type(defect).__name__
                if error and self.given_up.is_set():
                    return
                self._number = message.number
                self.done += not error
                self.failed += bool(error)
                self._logged = error and self._logged
                self.tell(error)


class Saver(Follower):
    """Writes each message as <time>-<id>.eml.  A reader never sees half a file."""

    option, words = "--save", ("saved", "failed")

    def __init__(self, store: Store, folder: str):
        super().__init__(store)
        self._folder = folder
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--save: cannot make the folder {folder!r}: {error.strerror}"
                             ) from None

    def handle(self, message: Message) -> str:
        """Writes one message.  If the disk is full, the mail stays in memory."""
        when = datetime.datetime.fromtimestamp(message.received, datetime.timezone.utc)
        name = f"{when:%Y%m%dT%H%M%S.%fZ}-{message.id}"
        unfinished = os.path.join(self._folder, f".{name}.part")
        try:
            with open(unfinished, "wb") as file:
                file.write(message.octets)
            os.replace(unfinished, os.path.join(self._folder, name + ".eml"))
            return ""
        except OSError as error:
            with contextlib.suppress(OSError):
                os.remove(unfinished)
            return error.strerror or type(error).__name__

    def state(self) -> Dict[str, Any]:
        """For /healthz."""
        return {"folder": self._folder, **super().state()}


class Webhook(Follower):
    """POSTs each message as JSON to a URL."""

    option, words = "--webhook", ("sent", "dropped")

    def __init__(self, store: Store, url: str, body: Callable[[Message], bytes]):
        super().__init__(store)
        self._parts = parts = _webhook_parts(url)
        self._body = body
        self._fields = {"Content-Type": "application/json"}
        if parts.username is not None:
            pair = urllib.parse.unquote_to_bytes(f"{parts.username}:{parts.password or ''}")
            self._fields["Authorization"] = "Basic " + base64.b64encode(pair).decode()
        self._connection: Any = None     # of the POST that is under way

    def handle(self, message: Message) -> str:
        """Tries until the other side answers 2xx, with pauses that double."""
        pause = self._store.limits.webhook_pause
        for left in range(self._store.limits.webhook_tries - 1, -1, -1):
            error = self._post(self._body(message))
            self.tell(error)
            if not error or not left or self.given_up.wait(pause):
                break
            pause = min(30.0, pause * 2)
        return error

    def hang_up(self) -> None:
        """Ends the POST that is under way."""
        with contextlib.suppress(AttributeError, OSError):       # there is none, or it has ended
            self._connection.sock.shutdown(socket.SHUT_RDWR)

    def _post(self, octets: bytes) -> str:
        """"" when it was taken, else why not."""
        parts, limit = self._parts, self._store.limits.webhook_time
        kind = http.client.HTTPSConnection if parts.scheme == "https" else (
            http.client.HTTPConnection)
        target = (parts.path or "/") + ("?" + parts.query) * bool(parts.query)
        connection = self._connection = kind(parts.hostname, parts.port, timeout=limit)
        # For the POST as a whole: each recv() of an answer that trickles in is in time.
        watch = threading.Timer(limit, self.hang_up)
        try:
            watch.start()
            connection.request("POST", target, octets, self._fields)
            status = connection.getresponse().status
            return "" if 200 <= status < 300 else f"answered {status}"
        except (OSError, http.client.HTTPException, RuntimeError) as error:  # no thread: Runtime
            return getattr(error, "strerror", None) or type(error).__name__
        finally:
            watch.cancel()
            self._connection = None
            connection.close()


# What is listened on beyond one address, and the one that clients are told.
_ALL_HOSTS = {"": "127.0.0.1", "*": "127.0.0.1", "0.0.0.0": "127.0.0.1", "localhost": "127.0.0.1",
              "::": "[::1]", "[::]": "[::1]"}
Auth = Union[None, Tuple[str, str], Dict[str, str]]
Certificate = Union[None, bool, Tuple[str, str], ssl.SSLContext]


def _check_settings(limits: Limits, auth: Auth, tls: Certificate, require: Iterable[str]) -> None:
    """TypeError says what a setting should be, before it fails where nobody expects it."""
    if not isinstance(limits, Limits):
        raise TypeError(f"expected limits to be Limits(...), got {limits!r}")
    for name, value in limits._asdict().items():
        if type(value) not in (int, float) or not value >= 0:
            raise TypeError(f"expected Limits({name}=...) to be a number such as "
                            f"{getattr(Limits(), name)}, got {value!r}")
    pairs = auth.items() if isinstance(auth, dict) else [auth] if auth is not None else []
    if not all(isinstance(pair, tuple) and list(map(type, pair)) == [str, str] for pair in pairs):
        raise TypeError("expected auth to be (user, password), or a dict from user to password, "
                        f"got {type(auth).__name__}")      # which may be a password
    if not (tls in (None, True, False) or isinstance(tls, ssl.SSLContext)
            or isinstance(tls, tuple) and len(tls) == 2):
        raise TypeError("expected tls to be True, (certificate, key) with their paths, or an "
                        f"SSLContext, got {tls!r}")
    if isinstance(require, str) or not set(require) <= {"auth", "tls"}:
        raise TypeError(f"expected require to be some of ('auth', 'tls'), got {require!r}")


class Mailtest:
    """A mail catcher in this process.  Ports are free ones unless given; see the README.

        with Mailtest() as server:
            inbox = server.acquire()

    `tls` is True for a certificate made by openssl, the paths of a certificate and its key, or a
    server's SSLContext (see tls_context); smtps_port None: no port with implicit TLS.
    """

    page: Dict[str, Tuple[str, bytes]] = {}          # the web page: path -> media type, octets

    def __init__(self, host: str = "localhost", smtp_port: int = 0, http_port: int = 0,
                 smtps_port: Optional[int] = None, domain: str = "mailtest.example",
                 strict: bool = False, limits: Limits = Limits(),
                 policy: ApiPolicy = ApiPolicy(), auth: Auth = None, tls: Certificate = None,
                 https: bool = False, save: str = "", webhook: str = "",
                 require: Tuple[str, ...] = ()):
        _check_settings(limits, auth, tls, require)
        if not tls and (smtps_port is not None or https):
            raise ValueError("smtps_port and https need tls=True, or a certificate's paths")
        self.host = host
        self.store = Store(limits, domain, strict)
        self.certificate = ""            # path, if it is known
        self._ports = {"smtp": smtp_port, "http": http_port, "smtps": smtps_port}
        self._policy = policy
        self._users = dict([auth] if isinstance(auth, tuple) else auth or {})
        self._require = require
        self._pem = ""                   # the certificate
        self._tls = tls
        self._https = https
        self._save = save
        self._webhook = webhook
        self._api: Optional[Api] = None
        self._followers: Dict[str, Any] = {}
        self._servers: List[Any] = []
        self._expiry: Optional[threading.Thread] = None
        self._ends = contextlib.ExitStack()          # what stop() undoes
        self._started = False

    def start(self) -> "Mailtest":
        """Opens the ports, once; OSError if one cannot be had, and then none is."""
        if self._started:
            raise RuntimeError("a Mailtest starts once; make another")
        self._started = True
        try:
            self._open_ports()
            self._expiry = threading.Thread(target=self.store.keep_expiring, name="expiry",
                                            daemon=True)
            for each in [self._expiry, *self._followers.values(), *self._servers]:
                each.start()
        except (OSError, ValueError, RuntimeError):  # RuntimeError: no thread could be had
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Closes everything.  Mail data that is arriving may end first; no thread is left."""
        for server in self._servers:     # SMTP first: what it accepts wakes who waits
            if isinstance(server, HttpServer):
                self.store.close()
            server.stop()
        self.store.close()
        self._servers = []
        for follower in self._followers.values():
            follower.stop()
        if self._expiry is not None and self._expiry.ident:
            self._expiry.join()
        self._ends.close()

    def __enter__(self) -> "Mailtest":
        return self.start()

    def __exit__(self, *exception: Any) -> None:
        self.stop()

    smtp_port = property(lambda self: self._port("smtp"))
    http_port = property(lambda self: self._port("http"))
    smtps_port = property(lambda self: self._port("smtps"), doc="None without such a port.")

    @property
    def url(self) -> str:
        """Where HTTP answers, without a trailing slash."""
        return f"http{'s' * self._https}://{self._at(self.http_port)}"

    @property
    def smtp(self) -> str:
        """Where SMTP answers, as host:port."""
        return self._at(self.smtp_port)

    def acquire(self, *fail: str) -> Inbox:
        """A new inbox; each `fail` is STAGE:ACTION[*TIMES], see parse_failure."""
        failures = tuple(parse_failure(text, self.store.limits) for text in fail)
        return Inbox(self.store, self.store.acquire(failures).address)

    def inbox(self, address: str) -> Inbox:
        """The inbox of any address, also of one that has got no mail yet."""
        return Inbox(self.store, address)

    @property
    def messages(self) -> List[Mail]:
        """All mail, newest first."""
        return [Mail(message) for message in self.store.messages(server=DEFAULT_SERVER)]

    def clear(self) -> None:
        """Ends all mail; inboxes stay."""
        self.store.empty(DEFAULT_SERVER)

    def let_quit(self, seconds: float) -> None:
        """Waits a little for SMTP clients to end by themselves: some take a 421 in place of
        QUIT's 221 for a mail that was not taken."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(
                server.connection_count() for server in self._servers
                if isinstance(server, SmtpServer)):
            time.sleep(0.01)

    def json(self, message: Message) -> str:
        """A message as the HTTP API gives it."""
        return message_json(self._api, message, self.url).decode("utf-8")

    def _open_ports(self) -> None:
        """Wires everything, from the store to the sockets."""
        tls = self._tls_context()
        rules = SmtpPolicy(self.store.domain, tls is not None, self._users, self._require)
        self._open("smtp", SmtpServer, self.store, rules, tls)
        if self._ports["smtps"] is not None:
            self._open("smtps", SmtpServer, self.store, rules, tls, True)
        api = self._api = Api(self.store, self._policy._replace(
            password=next(iter(self._users.values()), ""), smtp=self.smtp, files=self.page,
            any_host=self.host.strip("[]") in ("", "*", "0.0.0.0", "::"),
            certificate=self._pem,
            state=lambda: {name: each.state() for name, each in self._followers.items()}))
        self._open("http", HttpServer, api, tls, self._https)
        if self._save:
            self._followers["save"] = Saver(self.store, self._save)
        if self._webhook:
            self._followers["webhook"] = Webhook(
                self.store, self._webhook,
                lambda message: message_json(api, message, self.url))

    def _open(self, name: str, kind: Callable[..., Any], *rest: Any) -> None:
        server = kind(self.host, self._ports[name], *rest)
        self._servers.append(server)
        self._ports[name] = server.port

    def _tls_context(self) -> Optional[ssl.SSLContext]:
        """The TLS settings; OSError or ValueError says what is wrong with them."""
        tls = self._tls
        if tls is True:
            import tempfile
            folder = self._ends.enter_context(tempfile.TemporaryDirectory(prefix="mailtest-"))
            names = ["localhost", "127.0.0.1", "::1", self.store.domain, "mailosaur.com"]
            names += ["*" * name.startswith(".") + name for name in self._policy.allow_hosts]
            tls = make_certificate(folder, names + [self.host] * (self.host not in _ALL_HOSTS))
        if not isinstance(tls, tuple):
            return tls or None
        self.certificate, files = tls[0], " and ".join(filter(None, tls))
        try:
            with open(self.certificate, encoding="ascii", errors="replace") as file:
                self._pem = file.read()
            return tls_context(*tls)
        except ssl.SSLError as error:
            raise ValueError(f"expected a PEM certificate and its key in {files}: "
                             f"{error.reason or error}") from None
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)    # PyPy's is "Error"
            raise ValueError(f"cannot read {files}: {why}") from None

    def _port(self, name: str) -> Optional[int]:
        port = self._ports[name]
        if port == 0:
            raise RuntimeError(f"the {name} port is known once this Mailtest has started: write "
                               "`with Mailtest() as server:`, or call start()")
        return port

    def _at(self, port: int) -> str:
        host = _ALL_HOSTS.get(self.host, self.host)
        return f"[{host}]:{port}" if ":" in host and host[0] != "[" else f"{host}:{port}"


def _pytest_plugin(pytest: Any) -> Any:
    """A plugin with the fixtures, and the report of a failed test."""

    @pytest.fixture(scope="session")
    def mailtest_server():
        """A mail catcher for the whole run (with pytest-xdist: for each worker)."""
        with Mailtest() as server:
            yield server

    @pytest.fixture
    def inbox(request, mailtest_server):
        """A fresh address for each test."""
        inbox = request.node.mailtest_inbox = mailtest_server.acquire()
        yield inbox
        with contextlib.suppress(Unknown):           # the test has deleted it
            inbox.delete()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(item, call):
        """Adds to a failure what the test's inbox received."""
        outcome = yield
        inbox = getattr(item, "mailtest_inbox", None)
        if (call.excinfo is not None and call.when != "teardown" and isinstance(inbox, Inbox)
                and not isinstance(call.excinfo.value, NoMail)):         # whose text has it
            outcome.get_result().sections.append(("mailtest", inbox.report()))

    plugin = types.ModuleType("mailtest_fixtures")   # pytest wants fixtures in no class
    plugin.mailtest_server = mailtest_server
    plugin.inbox = inbox
    plugin.pytest_runtest_makereport = pytest_runtest_makereport
    return plugin


def pytest_configure(config: Any) -> None:
    """Makes `pytest_plugins = ["mailtest"]` bring the fixtures mailtest_server and inbox.

    pytest is running, so it need not be imported; without pytest nobody calls this.
    """
    config.pluginmanager.register(_pytest_plugin(sys.modules["pytest"]), "mailtest-fixtures")


# ---- Command line ----------------------------------------------------------
# Options in, exit status out.  Standard output carries JSON for programs, the
# ready line first; everything else goes to standard error.

_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_OCTETS = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}


def _option_type(expected: str, pattern: str, read: Callable[..., Any]) -> Callable[[str], Any]:
    """A type for argparse: what `read` makes of the groups of the pattern; None is refused."""
    def option_type(text: str) -> Any:
        match = re.fullmatch(pattern, text.strip(), re.I)
        value = read(*match.groups()) if match else None
        if value is None:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value
    return option_type


def _in_time(number: str, unit: Optional[str]) -> Optional[float]:
    seconds = float(number) * _SECONDS[(unit or "").lower()]
    return seconds if 0 < seconds <= 36_525 * 86_400 else None       # a hundred years


a_time = _option_type("a time such as 90s, 10m or 1h",
                      r"([0-9]{1,9}(?:\.[0-9]{1,3})?)\s*(s|m|min|h|d)?", _in_time)
a_size = _option_type("a size such as 200k, 25M or 1G", r"([0-9]{1,15})\s*([kmg]?)b?",
                      lambda number, unit: int(number) * _OCTETS[unit.lower()] or None)
a_port = _option_type("a port from 0 to 65535", "([0-9]{1,5})",
                      lambda digits: int(digits) if int(digits) <= 65_535 else None)
a_count = _option_type("a whole number from 1", "0*([1-9][0-9]{0,8})", int)
some_text = _option_type("a value", "(.+)", str)
a_host = _option_type("a name such as mail.example, without scheme and port", "(.+)",
                      lambda name: name.lower() if _is_domain(name.lstrip(".")) else None)
a_domain = _option_type("a domain such as a.example", r"([^\[].*)",
                        lambda name: name.lower() if _is_domain(name) else None)
an_origin = _option_type("an origin such as http://127.0.0.1:3000", r"(https?://[^/\s]+)/?",
                         str.lower)


def user_and_password(text: str) -> Tuple[str, str]:
    """USER:PASSWORD, which no error text shows."""
    user, colon, password = text.partition(":")
    if not colon or not user:
        raise argparse.ArgumentTypeError("expected USER:PASSWORD")
    return user, password


def _add_uses(parser: argparse.ArgumentParser) -> None:
    """Adds the options of services and of scripts."""
    add = parser.add_argument_group("on a network").add_argument
    add("--hosted", action="store_true",
        help="a public service: --strict, --max-size 200k, --rate 10, no lists")
    add("--rate", type=a_count, metavar="N",
        help="requests a minute and client to the Mailtest service")
    add("--trust-proxy", action="store_true",
        help="take the client's address from X-Forwarded-For")
    add("--allow-host", type=a_host, action="append", default=[], metavar="NAME",
        help="a Host header to answer to, .NAME for all below it; repeatable")
    add("--allow-origin", type=an_origin, action="append", default=[], metavar="URL",
        help="scheme, host and port whose pages may read by script (CORS); repeatable")
    add = parser.add_argument_group("in scripts").add_argument
    add("-v", "--log", action="store_true",
        help="a line on standard error for each mail and whatever is refused")
    add("--save", metavar="DIR", default="", help="also write each message to DIR/<time>-<id>.eml")
    add("--webhook", metavar="URL", default="", help="also POST each message as JSON to URL")
    add("--exit-after", type=a_count, metavar="N",
        help="leave after N messages, printed as JSON; status 1 if they do not come")
    add("--timeout", type=a_time, metavar="TIME", help="how long --exit-after waits (no end)")
    add("--until-eof", action="store_true", help="leave when standard input ends")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mailtest.py", usage="mailtest.py [--smtp PORT] [--http PORT] [options]\n"
        "       mailtest.py ready [URL] [--timeout TIME]\n"
        "       mailtest.py sendmail [-t] [-i] [-f ADDRESS] [RECIPIENT] (see sendmail --help)",
        description="Catches mail for tests: SMTP in, JSON out.",
        allow_abbrev=False,
        epilog="The first line on standard output is JSON with both addresses, once they answer. "
               "`ready` waits until a catcher at URL (http://127.0.0.1:8080) answers: exit status "
               "0, or 1 after TIME (10s).",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=96))
    add = parser.add_argument_group("where to listen").add_argument
    add("--smtp", type=a_port, default=2525, metavar="PORT",
        help="SMTP port, 0 for a free one (2525)")
    add("--http", type=a_port, default=8080, metavar="PORT",
        help="HTTP port, 0 for a free one (8080)")
    add("--host", type=some_text, default="localhost", metavar="ADDRESS",
        help="address to listen on; '*' for all (127.0.0.1 and ::1)")
    add = parser.add_argument_group("inboxes").add_argument
    add("--domain", type=a_domain, default="mailtest.example",
        help="of acquired addresses (mailtest.example)")
    add("--ttl", type=a_time, metavar="TIME", help="how long an inbox lives (10m)")
    add("--strict", action="store_true", help="refuse mail to addresses that were not acquired")
    add("--max-size", type=a_size, metavar="SIZE", help="of a message (25M; hosted 200k)")
    add("--max-memory", type=a_size, metavar="SIZE", help="of all messages together (512M)")
    add("--keep", type=a_count, metavar="N", help="the newest N mails only; older ones end")
    add = parser.add_argument_group("TLS and authentication").add_argument
    add("--tls", action="store_true", help="offer STARTTLS, with a certificate made by openssl")
    add("--tls-cert", metavar="FILE", help="offer STARTTLS, with this certificate (PEM)")
    add("--tls-key", metavar="FILE", help="its key, if not in the same file")
    add("--smtps", type=a_port, metavar="PORT",
        help="SMTP with TLS from the start, on this port too")
    add("--https", action="store_true", help="speak TLS on the HTTP port")
    add("--auth", type=user_and_password, metavar="USER:PASS", action="append", default=[],
        help="the only SMTP credentials taken, repeatable; without it any are")
    add("--require", choices=["auth", "tls"], action="append", default=[],
        help="refuse SMTP clients that do not use it")
    add("--api-key", type=some_text, metavar="KEY",
        default=os.environ.get("MAILTEST_API_KEY") or None,
        help="demand it on all but the Mailtest service (or MAILTEST_API_KEY)")
    _add_uses(parser)
    parser.add_argument("--version", action="version", version=f"mailtest {__version__}")
    return parser


def _limits(options: argparse.Namespace) -> Limits:
    limits = Limits(max_size=200_000, rate=10, inbox_messages=1_000, inbox_octets=20_000_000,
                    client_octets=50_000_000) if options.hosted else Limits()
    given = {"ttl": options.ttl, "max_size": options.max_size, "max_memory": options.max_memory,
             "rate": options.rate, "keep": options.keep}
    return limits._replace(**{name: value for name, value in given.items() if value is not None})


def _read_options(parser: argparse.ArgumentParser, arguments: List[str]) -> argparse.Namespace:
    """The options, once they fit together; else the program ends and says what does not."""
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        import difflib
        known = ["--" + name.replace("_", "-") for name in vars(options)]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1, 0.7)
        parser.error("unrecognized arguments: " + " ".join(unknown)
                     + "".join(f"; did you mean {name}?" for name in close))
    options.limits = _limits(options)
    limits = options.limits
    if limits.max_size + limits.message_cost + limits.inbox_cost > limits.max_memory:
        parser.error(f"expected --max-memory to hold a mail of --max-size, got "
                     f"{limits.max_memory} and {limits.max_size} octets")
    if options.timeout and not options.exit_after:
        parser.error("--timeout needs --exit-after")
    if options.tls_key and not options.tls_cert:
        parser.error("--tls-key needs --tls-cert")
    if not options.tls and not options.tls_cert and (
            options.smtps is not None or options.https or "tls" in options.require):
        parser.error("--smtps, --https and --require tls need a certificate: give --tls, or "
                     "--tls-cert")
    return options


def _mailtest(options: argparse.Namespace) -> Mailtest:
    policy = ApiPolicy(options.api_key or "", options.hosted, options.trust_proxy,
                       tuple(options.allow_host + [options.domain]),
                       tuple(options.allow_origin))
    tls = (options.tls_cert, options.tls_key or "") if options.tls_cert else options.tls
    return Mailtest(options.host, options.smtp, options.http, options.smtps, options.domain,
                    options.strict or options.hosted, options.limits, policy, dict(options.auth),
                    tls, options.https, options.save, options.webhook, tuple(options.require))


def _why_not(error: Exception, options: argparse.Namespace) -> str:
    """Why the ports could not be opened, and what to do about it."""
    ports = [name for name in ("smtp", "http", "smtps") if getattr(options, name) is not None]
    shown = ", ".join(f"--{name} {getattr(options, name)}" for name in ports)
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        return f"{error.filename} is in use ({shown}); choose another port, or 0 for a free one"
    if number in (errno.EACCES, errno.EPERM):
        return f"not allowed: {error}; ports below 1024 need privileges ({shown})"
    return f"cannot start with --host {options.host} {shown}: {error}"


# -- the sendmail stand-in

_EX_OK, _EX_USAGE, _EX_NOUSER, _EX_UNAVAILABLE, _EX_TEMPFAIL = 0, 64, 67, 69, 75   # sysexits.h

def _line(text: str) -> str:
    """The text, if it can stand in a header field: what ends a line for Python or for SMTP would
    let it add fields of its own."""
    if "".join(text.splitlines()) != text or re.search("[\0\ud800-\udfff]", text):
        raise ValueError(f"expected one line of UTF-8, got {_seen(text)}")
    return text


class _SendmailParser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(message)


def _recipients(text: str) -> List[str]:
    """The addresses of an argument, which may be several with commas."""
    found = [address.email for address in read_addresses(_line(text))]
    if not found or not all(found):
        raise argparse.ArgumentTypeError(f"expected an address, got {_seen(text)}")
    return found


def _sendmail_options(arguments: List[str]) -> argparse.Namespace:
    """What the flags mean; ValueError for what sendmail does not know."""
    parser = _SendmailParser(
        prog="sendmail", description="Takes a mail on standard input to a catcher.",
        epilog="Other flags of sendmail are taken and change nothing.  Exit status: 0, 64 used "
        "wrongly, 67 a recipient is refused, 69 the mail is refused, 75 try again later.")
    add = parser.add_argument
    add("recipients", nargs="*", type=_recipients, metavar="RECIPIENT")
    add("-t", action="store_true", help="send to the recipients in To, Cc and Bcc, too")
    add("-i", action="store_true", help="a line with a lone dot does not end the mail")
    add("-f", "-r", type=_line, metavar="ADDRESS", help="the sender")
    add("-F", type=_line, metavar="NAME", help="the sender's name", default="")
    add("-s", type=_line, metavar="SUBJECT", help="the subject, with -m", default="")
    add("-m", metavar="TEXT", help="the text, in place of standard input")
    add("-S", type=_line, metavar="HOST:PORT", help="the catcher (MAILTEST_SMTP, 127.0.0.1:2525)")
    for flag in "nvUG":
        add("-" + flag, help=argparse.SUPPRESS, action="store_true")
    for flag in "obdeqBNRLXCO":
        add("-" + flag, help=argparse.SUPPRESS, action="append")
    options = parser.parse_intermixed_args(arguments)
    options.i = options.i or "i" in (options.o or ())
    options.recipients = list(itertools.chain.from_iterable(options.recipients))
    return options


def _qualified(address: str) -> str:
    """root -> root@localhost; the null reverse-path stays."""
    return address if "@" in address or not address else address + "@localhost"


def _qualified_field(match: Any) -> bytes:
    """To: root (the boss), bob  ->  To: root@localhost (the boss), bob@localhost"""
    return re.sub(rb"((?:^\w+[ \t]*:|,)\s*[\w.+-]+)(?=\s*(?:\([^()]*\)\s*)?(?:,|$))",
                  rb"\1@localhost", match.group())


def _head_and_body(octets: bytes, dot_ends: bool) -> Tuple[bytes, bytes]:
    """Header fields and body of what came on standard input, with CRLF."""
    octets = re.sub(rb"\AFrom .*\n", b"", octets)           # the separator line of an mbox
    octets = re.sub(rb"\r?\n", b"\r\n", octets)
    if not octets.endswith(b"\r\n"):
        octets += b"\r\n"
    if dot_ends:
        octets = re.split(rb"(?m)^\.\r$\n?", octets, maxsplit=1)[0]
    head = re.match(rb"(?:[!-9;-~]+[ \t]*:.*\r\n(?:[ \t].*\r\n)*)*", octets).group()
    body = octets[len(head):]
    return head, body if body.startswith(b"\r\n") else b"\r\n" + body


def _completed(octets: bytes, options: argparse.Namespace) -> Tuple[bytes, List[str]]:
    """The mail with CRLF, without Bcc, with the header fields that sendmail adds; and whom it
    names as recipients.  Settles the sender, `options.f`."""
    head, body = _head_and_body(octets, dot_ends=not options.i and options.m is None)
    header = Header(head)
    named = [address.email for field in ("to", "cc", "bcc")
             for address in header.addresses(field) if address.email]
    head = re.sub(rb"(?im)^bcc[ \t]*:.*\r\n(?:[ \t].*\r\n)*", b"", head)
    head = re.sub(rb"(?im)^(?:from|to|cc)[ \t]*:[^\"\r\n]*(?=\r\n)", _qualified_field, head)
    user = re.sub("[^A-Za-z0-9._-]", "", os.environ.get("USER") or os.environ.get("USERNAME", ""))
    user = f"{user or 'nobody'}@localhost"
    if options.f is None:
        author = header.addresses("from")
        options.f = author[0].email if author else user
    sender = read_addresses(options.f)   # -f "Bob <bob@x.example>" is bob@x.example
    options.f = _qualified(sender[0].email if sender else options.f.strip("<>"))
    if "from" not in header.first:
        shown = email.utils.formataddr((options.F, options.f or user))
        head += f"From: {shown}\r\n".encode()
    if options.recipients and not {"to", "cc", "bcc"} & header.first.keys():
        head += f"To: {', '.join(map(_qualified, options.recipients))}\r\n".encode()
    if "date" not in header.first:
        head += f"Date: {email.utils.formatdate(localtime=True)}\r\n".encode()
    if "message-id" not in header.first:
        head += f"Message-ID: <{new_id()}@localhost>\r\n".encode()
    return head + body, named


def _catcher(where: str) -> Tuple[str, int]:
    """Host and port of the catcher to send to."""
    host, _, number = where.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", number) or int(number) > 65535:
        raise ValueError(f"expected HOST:PORT in -S or MAILTEST_SMTP, got {_seen(where)}")
    return host.strip("[]"), int(number)


def _hand_over(host: str, number: int, sender: str, recipients: List[str], octets: bytes) -> int:
    """Sends the mail; the exit status says how that went."""
    import smtplib                       # here, since a catcher that runs does not need it
    where = f"[{host}]:{number}" if ":" in host else f"{host}:{number}"
    wide = not all(address.isascii() for address in [sender] + recipients)
    try:
        with contextlib.closing(smtplib.SMTP(host, number, local_hostname="localhost",
                                             timeout=60)) as client:
            refused = client.sendmail(sender, recipients, octets,
                                      ["BODY=8BITMIME"] + ["SMTPUTF8"] * wide)
            with contextlib.suppress(OSError, smtplib.SMTPException):
                client.quit()            # whatever it says, the mail is taken already
    except smtplib.SMTPRecipientsRefused as error:
        refused = error.recipients
    except smtplib.SMTPResponseException as error:
        text = error.smtp_error.decode("utf-8", "replace")
        print(f"sendmail: {where} answered {error.smtp_code} {text}", file=sys.stderr)
        return _EX_TEMPFAIL if error.smtp_code < 500 else _EX_UNAVAILABLE
    except (OSError, smtplib.SMTPException) as error:
        print(f"sendmail: {where} does not take mail: {error}; is mailtest running there?",
              file=sys.stderr)
        return _EX_TEMPFAIL
    for address, (code, text) in refused.items():
        print(f"sendmail: {address}: {code} {text.decode('utf-8', 'replace')}", file=sys.stderr)
    if not refused:
        return _EX_OK
    return _EX_TEMPFAIL if any(code < 500 for code, _ in refused.values()) else _EX_NOUSER


def sendmail(arguments: List[str]) -> int:
    """Takes a mail on standard input to a catcher, as /usr/sbin/sendmail would; exit status by
    sysexits.h."""
    try:
        options = _sendmail_options(arguments)
        catcher = _catcher(options.S or os.environ.get("MAILTEST_SMTP") or "127.0.0.1:2525")
        if options.m is None:
            octets = sys.stdin.buffer.read()
        else:                            # the whole mail is on the command line
            import email.header
            subject = email.header.Header(
                options.s, "us-ascii" if options.s.isascii() else "utf-8").encode()
            octets = f"Subject: {subject}\n\n{options.m}\n".encode("utf-8", "surrogateescape")
        octets, named = _completed(octets, options)
        recipients = options.recipients + (named if options.t else [])
        if not recipients:
            raise ValueError("expected a recipient: as an argument, or with -t in To, Cc or Bcc")
    except ValueError as error:
        print(f"sendmail: {error}", file=sys.stderr)
        return _EX_USAGE
    return _hand_over(*catcher, options.f, list(dict.fromkeys(map(_qualified, recipients))),
                      octets)


# -- running

def ready(arguments: List[str]) -> int:
    """Waits until a catcher answers; exit status 0, or 1 when it does not."""
    import urllib.request
    parser = argparse.ArgumentParser(prog="mailtest.py ready", description=ready.__doc__)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8080", metavar="URL",
                        help="of its HTTP port (http://127.0.0.1:8080)")
    parser.add_argument("--timeout", type=a_time, default=10.0, metavar="TIME",
                        help="how long to wait (10s)")
    options = parser.parse_args(arguments)
    trusting = ssl.create_default_context()          # no password goes there
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}),
                                         urllib.request.HTTPSHandler(context=trusting))
    url = options.url if "://" in options.url else "http://" + options.url
    until = time.monotonic() + options.timeout
    while True:
        try:
            with opener.open(url.rstrip("/") + "/healthz", timeout=2) as answer:
                if answer.headers["Server"] == "mailtest":
                    return 0
                raise OSError("something else answers there")
        except (OSError, http.client.HTTPException) as error:
            if str(error).startswith("220 "):
                parser.error(f"{url} is an SMTP port; expected that of HTTP")
            if getattr(error, "code", 0) == 421:     # it says which Host fields it takes
                error = OSError(json.load(error)["detail"])
                until = 0.0
            if time.monotonic() >= until:
                print(f"mailtest: {url} does not answer within {options.timeout:g} s: {error}",
                      file=sys.stderr)
                return 1
        except ValueError as error:
            parser.error(str(error))
        time.sleep(0.05)


class _LogStream:
    """Writes to standard error in a thread of its own: a pipe that nobody reads stops no mail."""

    def __init__(self) -> None:
        self._lines: "queue.Queue[str]" = queue.Queue(1_000)     # a full one loses lines
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        """Never waits."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(text)

    def close(self) -> None:
        """Gives what is written half a second."""
        self.write("")
        self._thread.join(0.5)

    def _run(self) -> None:
        for text in iter(self._lines.get, ""):
            with contextlib.suppress(OSError, ValueError):       # closed by whoever listened
                sys.stderr.write(text)
                sys.stderr.flush()


def _log_events(store: Store) -> None:
    """Logs each mail, and each session that was refused or broke off: the body of a thread."""
    number = store.number
    while not store.closed:
        events, number, lost = store.events(number, 1.0)
        if lost:
            log_info("some events came too fast for this log")
        for _, kind, data in events:
            with contextlib.suppress(Unknown):       # the mail has ended meanwhile
                if kind == "message":
                    message = store.message(data["id"])
                    envelope = message.envelope
                    log_info("mail from <%s> to <%s>: %r, %d octets, id %s",
                        envelope.reverse_path or "", ">, <".join(envelope.forward_paths),
                        Mail(message).subject, len(message.octets), message.id)
                elif kind == "session":
                    log_info("SMTP session of %s %s", data["client"],
                        "refused: " + data["refused"] if data["refused"] else
                        "broke off: " + data["ending"])


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _signals(handler: Any) -> Iterator[None]:
    """Handles what ends the program, and puts back what handled it before."""
    known = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
             if hasattr(signal, name)]               # the last on Windows
    before = [signal.signal(each, handler) for each in known]
    try:
        yield
    finally:
        for each, old in zip(known, before):
            signal.signal(each, old if old is not None else signal.SIG_DFL)


def _interrupt_at_eof() -> None:
    """Ends the program when its standard input ends: the body of a thread."""
    with contextlib.suppress(OSError, ValueError):   # it is closed already
        while os.read(sys.stdin.fileno(), 4096):
            pass
    signal.raise_signal(signal.SIGINT)


def _exit_after(server: Mailtest, count: int, timeout: Optional[float]) -> int:
    """Prints that many messages once they are there; the exit status."""
    until = time.monotonic() + (timeout or float("inf"))
    found: List[Message] = []
    while len(found) < count and time.monotonic() < until:
        # In steps: Windows delivers Ctrl-C between them.
        found += server.store.messages(
            server=DEFAULT_SERVER, after=found[-1].number if found else 0,
            timeout=max(0.0, min(1.0, until - time.monotonic())))[::-1]
    if len(found) < count:
        print(f"mailtest: expected {count} message{'s' * (count > 1)} within {timeout:g} s, "
              f"got {len(found)}", file=sys.stderr)
        return 1
    server.let_quit(0.5)
    print("[" + ",\n".join(map(server.json, found)) + "]", flush=True)
    return 0


def _run(server: Mailtest, options: argparse.Namespace) -> int:
    """Says that the ports answer, then waits for the end."""
    if options.log:
        threading.Thread(target=_log_events, args=(server.store,), daemon=True).start()
    told = {"smtp": server.smtp, "http": server.url}
    if server.smtps_port is not None:
        told["smtps"] = f"{server.smtp.rpartition(':')[0]}:{server.smtps_port}"
    if server.certificate:
        told["cert"] = os.path.abspath(server.certificate)
    if options.until_eof:
        threading.Thread(target=_interrupt_at_eof, daemon=True).start()
    print(json.dumps(told), flush=True)
    local = options.host in ("::1", "localhost") or options.host.startswith("127.")
    if not local and not options.api_key:
        print(f"mailtest: anyone who reaches {options.host} can read and delete this mail; "
              "--api-key closes it", file=sys.stderr, flush=True)
    while not options.exit_after:        # in steps: a signal may come to another thread, where it
        time.sleep(0.5)                  # wakes no sleep of this one
    return _exit_after(server, options.exit_after, options.timeout)


def main(arguments: Optional[List[str]] = None) -> int:
    """Runs the program; returns its exit status."""
    if arguments is None:                # `ln -s mailtest.py sendmail` works
        called = os.path.basename(sys.argv[0]).partition(".")[0]
        arguments = ["sendmail"] * (called == "sendmail") + sys.argv[1:]
    commands = {"sendmail": sendmail, "ready": ready}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    parser = _options()
    options = _read_options(parser, arguments)
    server = None
    with contextlib.ExitStack() as ends, _signals(_interrupt):
        try:
            stream = _LogStream()
            ends.callback(stream.close)
            LOG_SETTINGS.update(stream=stream, format="mailtest: %(message)s",
                                level="INFO" if options.log else "WARNING")
            server = _mailtest(options)
            server.start()
            return _run(server, options)
        except ValueError as error:
            parser.error(str(error))
        except (OSError, RuntimeError) as error:     # RuntimeError: no thread could be had
            print(f"mailtest: {_why_not(error, options)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 0 if not options.exit_after else 1
        finally:
            with _signals(signal.SIG_IGN):           # a second one must not break the stop
                if server is not None:
                    server.stop()


# ---- Web page --------------------------------------------------------------
# Three strings, served under URLs of their own, so that the page's policy
# needs no inline script or style.  The last section: it is other languages,
# and the sections above only know that there are files.

PAGE_HTML = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mailtest</title>
<link rel="icon" href="favicon.ico">
<link rel="stylesheet" href="page.css">
<script src="page.js" defer></script>
</head>
<body data-pane="list">
<a id="skip" href="#rows">To the messages</a>
<header class="line">
  <h1><a class="line" href="./" data-icon="mail" data-inside title="All mail">mailtest</a></h1>
  <span id="status" class="soft line" data-testid="status" role="status">connecting</span>
  <button id="smtp" class="quiet mono"></button>
  <div id="find" role="search"><input id="search" data-testid="search" type="search"
    placeholder="Search or address" aria-label="Search messages"
    title="Search (/)" autocomplete="off" spellcheck="false"></div>
  <button id="acquire" class="primary" data-testid="acquire" data-icon="plus"
    title="Acquire a temporary address and copy it (a)">address</button>
  <button id="theme" class="square" data-icon="theme" aria-label="Light or dark"></button>
  <a id="help" class="square" data-inside href="?message=help"
    aria-label="Help" title="How to send, search and type (?)">?</a>
</header>
<aside id="refused" data-testid="refused" aria-label="Refused session" hidden>
  <a class="line refusal" data-inside></a>
</aside>
<main>
<nav id="inboxes" aria-label="Inboxes">
  <div id="all"></div>
  <h2>Acquired</h2>
  <div id="acquired"></div>
  <h2>Other recipients</h2>
  <div id="others"></div>
  <p id="more"></p>
</nav>
<section id="list" aria-label="Messages">
  <div id="bar" class="line wrap"></div>
  <div id="nothing" role="status"></div>
  <div id="rows" role="listbox" tabindex="0" aria-label="Messages, newest first"></div>
</section>
<section id="message" aria-label="Message"></section>
</main>
<div id="toast" class="line" role="status" hidden>
  <span class="cut"></span><button data-testid="undo" hidden>Undo</button>
</div>
</body>
</html>
"""

PAGE_CSS = r"""/* Colours: text 4.5:1 and more on every background it stands on, in both themes. */
:root {
  color-scheme: light dark;
  --back: light-dark(#f5f6f8, #111418); --card: light-dark(#fff, #181c22);
  --sunk: light-dark(#eceef2, #222831); --edge: 1px solid light-dark(#dde1e7, #2c333d);
  --text: light-dark(#1b2027, #e4e8ee); --soft: light-dark(#59636f, #9aa5b3);
  --accent: light-dark(#2455c8, #8db4ff); --tint: light-dark(#e6edfd, #1d2b46);
  --warn: light-dark(#8a5300, #f3c063); --bad: light-dark(#b42318, #ff9b91);
  --mono: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}

/* Base */
* { box-sizing: border-box; margin: 0; scrollbar-width: thin; }
[hidden] { display: none !important; }
main { display: contents; }
body {
  display: grid; grid-template: "head head head" auto "strip strip strip" auto
    "side list main" minmax(0, 1fr) / 232px minmax(330px, 27vw) minmax(0, 1fr);
  height: 100dvh; background: var(--back); color: var(--text);
  font: 14px/1.45 system-ui, sans-serif;
}
a, .client, .code { color: var(--accent); }
pre, code, .mono { font: 12.5px/1.5 var(--mono); white-space: pre-wrap; }
pre, h2, dd, p, .line { overflow-wrap: anywhere; }
.line { display: flex; align-items: center; gap: 4px 8px; }
.wrap { flex-wrap: wrap; }
.grow { flex: 1; min-width: 0; }
.cut, .chip span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.soft, small, summary, time, dt { color: var(--soft); font-size: 12.5px; }
button, input { font: inherit; color: inherit; }
button, .button, .square {
  display: inline-flex; align-items: center; justify-content: center; gap: 6px; min-height: 30px;
  padding: 3px 10px; color: inherit; text-decoration: none; cursor: pointer;
}
button, .button, .box, #search {
  border: var(--edge); border-radius: 8px; background: var(--card);
}
.square, .quiet, .chip button { border: 0; background: none; }
.square { flex: none; width: 30px; height: 30px; padding: 0; color: var(--soft); }
:is(button:not(.primary), .button, .square, .inbox, .row):hover { background: var(--sunk); }
button.primary { background: var(--accent); color: var(--card); }
#search { width: 100%; height: 32px; padding: 0 11px; }
::placeholder { color: var(--soft); opacity: 1; }
:focus { outline: none; }
:focus-visible, label:has(:focus-visible) {
  outline: 2px solid var(--accent); outline-offset: -2px;
}
.heard, [type=radio], #skip:not(:focus) { position: absolute; clip-path: inset(50%); }
.icon { flex: none; width: 16px; fill: none; stroke: currentColor; stroke-width: 1.5; }
summary, label { cursor: pointer; }

/* Header */
header { grid-area: head; padding: 8px 14px; border-bottom: var(--edge); background: var(--card); }
h1 a { color: inherit; font-size: 15px; text-decoration: none; }
h1 .icon { color: var(--accent); }
#status::before, .unread::before {
  content: ""; width: 8px; height: 8px; border-radius: 50%; background: gray;
}
#status[data-state=live]::before { background: light-dark(#15803d, #4ade80); }
#find { flex: 1; max-width: 480px; margin-left: auto; }
#refused { grid-area: strip; padding: 6px 14px; border-bottom: var(--edge); }
.refusal, #status:is([data-state=reconnecting], [data-state=waiting]) { color: var(--bad); }

/* Inboxes */
#inboxes { grid-area: side; overflow: auto; padding: 10px 8px; border-right: var(--edge); }
#inboxes h2, #more { padding: 14px 8px 4px; color: var(--soft); font-size: 12px; }
#inboxes h2:has(+ :empty), #inboxes p:empty { display: none; }
.inbox { padding: 4px 8px; border-radius: 7px; line-height: 22px; }
label:has(:checked), .row[aria-selected=true] { background: var(--tint); }
label:has(:checked) { color: var(--accent); font-weight: 550; }
.count { color: var(--soft); font-size: 11.5px; }
.count b { padding: 1px 7px; border-radius: 9px; background: var(--accent); color: var(--card); }

/* List */
#list {
  grid-area: list; display: flex; flex-direction: column; min-width: 0;
  border-right: var(--edge); background: var(--card);
}
#bar { padding: 6px 10px 6px 14px; border-bottom: var(--edge); }
#bar h2 { flex: auto; font-size: 13.5px; }
.menu, .block, .inbox, .row, .tools label { position: relative; }
.menu { margin-left: auto; }
.menu div {
  position: absolute; z-index: 2; right: 0; display: grid; gap: 6px; width: 220px;
  padding: 10px; box-shadow: 0 6px 24px #0003;
}
#rows { flex: 1; overflow: hidden auto; }
#rows:has([aria-selected=true]) { outline: none; }
#rows:focus-visible [aria-selected=true] { box-shadow: inset 0 0 0 2px var(--accent); }
.row {
  display: block; padding: 9px 14px 9px 26px; border-bottom: var(--edge);
  color: inherit; text-decoration: none; content-visibility: auto;
  contain-intrinsic-height: 79px;
}
.row .line { height: 20px; white-space: nowrap; }
.unread::before { position: absolute; left: 10px; top: 15px; background: var(--accent); }
.unread .subject { font-weight: 600; }
.warning, .notice, .notice summary { color: var(--warn); }
.code { font: 600 12.5px/18px var(--mono); }
#nothing { padding: 20px 24px; text-align: center; color: var(--soft); }
:is(#nothing, #gone, .chips):empty { display: none; }

/* Message */
#message { grid-area: main; display: flex; flex-direction: column; min-width: 0; overflow: auto; }
.head { flex: none; display: grid; gap: 6px; padding: 14px 20px 4px; background: var(--card); }
.head h2, .sheet h2 { font-size: 19px; line-height: 1.35; }
.back { display: none; }
.parties, .meta { gap: 0 14px; }
.meta button { min-height: 0; padding: 0; border: 0; background: none; }
.chip { max-width: 100%; gap: 0; }
.chip > button { min-width: 0; }
.chip span, .file .cut { max-width: 260px; }
.file { max-width: 100%; padding: 5px 12px 5px 6px; color: inherit; text-decoration: none; }
.file > :first-child {
  display: grid; place-items: center; width: 38px; height: 38px; border-radius: 5px;
  background: var(--sunk); object-fit: contain; font: 600 10px var(--mono);
}
.tabs {
  position: sticky; top: 0; z-index: 1; display: flex; flex: none; padding: 0 12px;
  overflow: auto hidden; border-bottom: var(--edge); background: var(--card);
}
.tabs, #inboxes { scrollbar-width: none; }
.tabs label { flex: none; padding: 7px 10px; border-bottom: 2px solid transparent; }
.tabs label:has(:checked) { border-color: var(--accent); background: none; }
label:has(:disabled) { color: light-dark(#9aa2ac, #596371); cursor: default; }
#panel { flex: 1 0 auto; padding: 14px 20px 20px; }
#panel[data-tab=preview] { display: flex; flex-direction: column; min-height: 50vh; padding: 0; }
.tools { padding: 4px 20px; font-size: 12.5px; }
.tools label { padding: 3px 6px; border-radius: 7px; }
.away { display: none; color: var(--accent); }
.tools:has(+ .stage iframe:focus) .away { display: inline; }
.stage { flex: 1; display: grid; overflow: auto; background: var(--sunk); }
iframe { justify-self: center; width: 100%; height: 100%; border: 0; background: #fff; }
.letter { max-width: 78ch; font-size: 14px; }
.block { margin: 6px 0 10px; }
.block pre { overflow-x: auto; padding: 10px 46px 12px 12px; white-space: pre; }
.block button { position: absolute; right: 7px; top: 6px; background: var(--card); }
.links > *, .pairs > *, #sessions > * { padding: 5px 0; border-bottom: var(--edge); }
.pairs { display: grid; grid-template-columns: minmax(90px, auto) minmax(0, 1fr); }
.pairs dt { padding-right: 20px; }

/* Manual and sessions */
.sheet { width: 100%; max-width: 800px; margin: 0 auto; padding: 30px 28px 48px; }
.sheet h3 { margin: 24px 0 6px; font-size: 13.5px; }
.sheet > p, .sheet > .wrap { margin: 12px 0; }
.places { align-items: stretch; }
.places > div { flex: auto; padding: 9px 8px 5px 14px; }
#toast {
  position: fixed; z-index: 3; left: 50%; bottom: 22px; transform: translateX(-50%);
  max-width: calc(100vw - 24px); padding: 9px 16px; border-radius: 9px; background: var(--text);
  color: var(--back);
}
#toast button { color: var(--text); }

/* Two columns: the inboxes lie in a row above them */
@media (max-width: 1099px) {
  body {
    grid-template: "head head" auto "strip strip" auto "side side" auto
      "list main" minmax(0, 1fr) / minmax(280px, 38vw) minmax(0, 1fr);
  }
  #inboxes, #inboxes div { flex: none; display: flex; gap: 2px; }
  #inboxes { padding: 5px 10px; border-bottom: var(--edge); }
  #inboxes h2 { display: none; }
  .inbox, #inboxes #more { flex: none; padding: 4px 8px; }
  .inbox bdi { flex: none; max-width: 150px; }
}

/* One column: list or message */
@media (max-width: 699px) {
  body { grid-template: "head" auto "strip" auto "side" auto "list" minmax(0, 1fr) / 100%; }
  header { flex-wrap: wrap; }
  #find, #acquire { order: 1; }
  #theme { margin-left: auto; }
  header::after { content: ""; flex-basis: 100%; }
  button, .button, #search, .square { min-height: 36px; min-width: 36px; }
  #search { font-size: 16px; }
  #smtp { display: none; }
  #message { grid-row: side / list; grid-column: 1; }
  [data-pane=list] #message, [data-pane=message] :is(#list, #inboxes) { display: none; }
  .head, #panel, .sheet, .tools { padding-left: 14px; padding-right: 14px; }
  .square.back { display: inline-flex; margin-left: -8px; }
  .pairs { grid-template-columns: 100%; }
  .pairs dt { border: 0; }
}
@media (forced-colors: active) {
  [aria-selected=true], label:has(:checked) { outline: 3px solid Highlight; outline-offset: -3px; }
  .unread::before { forced-color-adjust: none; }
}
@media print {
  body, #message, #panel[data-tab=preview], .stage { display: block; height: auto; }
  body > :not(main), #inboxes, #list, .square, .tabs, .tools, button { display: none !important; }
  body #message { display: block; }
  iframe { height: calc(100vh * var(--pages)); }
}
"""

PAGE_JS = r""""use strict";

// What happens in the catcher or is done here leads to refresh(), which asks for all that is in
// sight, and to render(), which shows the state.  What is in sight stands in the URL.  What comes
// from a mail enters the document as text or as the value of an attribute, never as markup; its
// HTML is shown by the server alone, in a sandboxed frame.

// -- State

const PAGE = 100;  // messages that are listed at first, and more at the end of the list
const INBOXES = 100;  // inboxes that are shown
const UNDO = 5000;  // milliseconds in which a deletion can be taken back
const SHOWN = 400000;  // characters of a body or a source that are shown

const VIEW = {q: "", inbox: "", message: "", tab: "preview", width: "100%", scheme: "light"};
let view = VIEW;  // what the URL says, VIEW where it says nothing

const state = {
  health: null,  // of GET healthz
  own: null,  // whether only inboxes acquired here may be read
  inboxes: new Map(),  // address in lower case -> inbox
  items: [],  // summaries, newest first
  count: PAGE,  // how many are asked for
  total: null,  // how many there are; null while that is not known
  problem: "",  // why it is not
  pause: 0,  // time before which nothing is asked
  sessions: [],
  message: null,  // the whole of it
  gone: "",  // why there is none, or none any more
  revealed: null,  // the row that was scrolled into sight
  remote: false,  // the preview may load from elsewhere
  deleted: new Map(),  // id -> timer: to be deleted unless that is undone
};

function urlOf(changes) {
  const words = Object.entries({...view, ...changes}).filter(([name, is]) => is !== VIEW[name]);
  return location.pathname + (words.length ? "?" + new URLSearchParams(words) : "");
}

/** Goes to another view.  history.state: whether Back leads to the list alone. */
function go(changes, replace = false) {
  if (replace) history.replaceState(history.state, "", urlOf(changes));
  else history.pushState(!view.message, "", urlOf(changes));
  moved();
}

function moved() {
  const before = view;
  view = {...VIEW, ...Object.fromEntries(new URLSearchParams(location.search))};
  if (before.q !== view.q || before.inbox !== view.inbox) {
    Object.assign(state, {total: null, problem: "", items: [], count: PAGE});
    refresh();
  }
  if (before.message !== view.message) {
    Object.assign(state, {message: null, gone: "", remote: false});
    loadMessage();
  }
  if ($("search").value.trim() !== view.q) $("search").value = view.q;
  render();
}

/** What this browser keeps for the page: own (inboxes), signedIn, theme. */
function recall() {
  try {
    return {own: [], ...JSON.parse(localStorage.mailtest)};
  } catch {  // there is nothing yet, or storage is switched off
    return {own: []};
  }
}

function remember(changes) {
  try {
    localStorage.mailtest = JSON.stringify({...recall(), ...changes});
  } catch { /* then for this visit only */ }
}

// -- Document

const $ = (id) => document.getElementById(id), uri = encodeURIComponent;
const sleep = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
const narrow = matchMedia("(max-width: 699px)"), dark = matchMedia("(prefers-color-scheme: dark)");

/** A new element of "tag.class@testid".  Attributes may come first; what is false is left out. */
function h(name, ...children) {
  const [, tag, classes, testid] = /^(\w+)([^@]*)@?(.*)$/.exec(name);
  const node = document.createElement(tag);
  if (classes) node.className = classes.replaceAll(".", " ").trim();
  if (testid) node.dataset.testid = testid;
  const given = children[0] && children[0].constructor === Object ? children.shift() : {};
  for (const [key, value] of Object.entries(given)) {
    if (typeof value === "function") node[key] = value;
    else if (value !== false) node.setAttribute(key, value);
  }
  node.append(...children.flat(9).filter((child) => child || child === 0));
  return node;
}

/** Fills a node anew if its key has changed; else frames, focus and selection stay. */
function fill(node, key, build) {
  if (node.key === JSON.stringify(key)) return;
  node.key = JSON.stringify(key);
  node.replaceChildren(...[build()].flat(9).filter(Boolean));
}

/** Makes one child of each item.  Those that stay are not touched: clicks arrive. */
function each(parent, items, key, make, update = () => {}) {
  const before = parent.nodes || new Map();
  parent.nodes = new Map(items.map((item) => [item[key], before.get(item[key]) || make(item)]));
  before.forEach((node, name) => parent.nodes.has(name) || node.remove());
  items.forEach((item, index) => {
    const node = parent.nodes.get(item[key]), there = parent.children[index];
    if (there !== node) parent.insertBefore(node, there || null);
    update(node, item);
  });
}

const ICONS = {  // paths in a square of 16
  mail: "M1.5 3h13v10h-13zM2 4l6 5 6-5", plus: "M8 2.5v11M2.5 8h11",
  copy: "M5.5 5.5H14V14H5.5zM10.5 3V2H2v8.5h1", open: "M6 3H3v10h10v-3M9 2.5h4.5V7m0-4.5-6 6",
  load: "M8 2v8M4.5 7 8 10.5 11.5 7M2.5 13.5h11", back: "M10 2.5 4.5 8l5.5 5.5",
  bin: "M2 4h12M6 4V2h4v2M3.5 4l.8 10h7.4l.8-10", warn: "M8 2l6.5 12h-13zM8 6v4m0 1v1.5",
  clip: "m13.5 7.3-5.6 5.6a3.4 3.4 0 0 1-4.8-4.8L9 2.2a2.3 2.3 0 0 1 3.2 3.2l-5.8 5.8",
  more: "M2 8h2m3 0h2m3 0h2", dot: "M10 3H1.5v10h13V7.5M2 4l6 5 2.5-2M13 2.5v2m-1-1h2",
  theme: "M8 2a6 6 0 1 0 0 12A6 6 0 1 0 8 2v12",
};

const icon = (name) => document.createRange().createContextualFragment('<svg class="icon" '
  + `viewBox="0 0 16 16" aria-hidden="true"><path d="${ICONS[name]}"/></svg>`);

/** A button, or with href a link, that shows only an icon. */
const tool = (name, title, attributes, more = "") => h((attributes.href ? "a" : "button")
  + ".square" + more, {title, "aria-label": title, ...attributes}, icon(name));

/** A radio button that looks like a button. */
const choice = (kind, group, value, title, onchange, ...children) => h("label" + kind, {title},
  h("input", {type: "radio", name: group, value, onchange}), children);

function choose(group, value) {
  for (const input of document.getElementsByName(group)) input.checked = input.value === value;
}

/** The function, run at once and then at most so often: less often if it takes long. */
function throttled(run) {
  let busy = false, again = false;
  return async function begin() {
    again = busy;
    if (busy) return;
    busy = true;
    const began = performance.now();
    await run().catch(trouble);
    render();
    await sleep(Math.max(100, 3 * (performance.now() - began)));
    busy = false;
    if (again) begin();
  };
}

let toastTimer = 0;

function toast(text, undoable = false) {
  const [span, button] = $("toast").children;
  span.textContent = text;
  button.hidden = !undoable;
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { $("toast").hidden = true; }, UNDO);
}

async function copy(text, what = text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // there is no clipboard without HTTPS or localhost
    const focused = document.activeElement, area = h("textarea.heard", text);
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    focused.focus();
  }
  toast("Copied " + what);
}

const copier = (text, what) => tool("copy", "Copy " + what, {onclick: () => copy(text, what)});

// -- Words

const party = ({email, phone}) => email || phone || "";
const nameOf = (address) => address.name || party(address);
const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

/** The local time of day, before today with the date; to minutes (16), to milliseconds (23). */
function clock(iso, end = 16) {
  const [then, now] = [new Date(iso), new Date()].map((time) => time.toLocaleString("sv"));
  return (then + iso.slice(19, 23)).slice(then.slice(0, 10) === now.slice(0, 10) ? 11 : 5, end);
}

function size(octets) {
  const [per, unit] = octets < 1e3 ? [1, "B"] : octets < 1e6 ? [1e3, "kB"] : [1e6, "MB"];
  return `${Number((octets / per).toFixed(1))} ${unit}`;
}

// -- Asking

const ALL = "api/messages?server=mailtest";
const apiUrl = (id) => "api/messages/" + uri(id);
const viewUrl = (id, what) => `v1/messages/${uri(id)}/${what}`;
const own = () => (state.own ? recall().own.filter(({expires}) => Date.parse(expires) > Date.now())
  .map(({address}) => address) : []);
const blind = () => state.own && !own().length;  // nothing may be asked for
const list = (path) => (blind() ? {items: [], total: 0} : ask(path));

/** Parameters that limit a request to these inboxes, or to nothing. */
const only = (addresses) => new URLSearchParams(addresses.map((address) => ["inbox", address]));

/** The JSON of an answer, and `total`.  A refusal is an Error with status and retry (seconds). */
async function ask(path, options) {
  const response = await fetch(path, {headers: {Accept: "application/json"}, ...options});
  const body = await response.json().catch(() => ({})), {headers, status, ok} = response;
  if (ok) return {...body, total: headers.get("X-Total-Count")};
  throw Object.assign(new Error(body.detail || body.message || response.statusText),
    {status, retry: Number(headers.get("Retry-After"))});
}

/** Changes something in the catcher; null if that could not be, which is said. */
async function change(path, options) {
  try {
    return await ask(path, options);
  } catch ({status, retry, message}) {
    toast(retry ? `Too many requests: try again in ${retry} s` : message);
    return status === 404 ? {} : null;
  } finally {
    refresh();
  }
}

/** The list.  In a search half typed an open quotation is closed, a lone `from:` left out. */
async function loadList() {
  const {q, inbox} = view, closed = q.split('"').length % 2 ? q : q + '"';
  const words = uri(closed.replace(/(^|\s)-?(\w+:)?(?=\s|$)/g, "$1").trim());
  const {items, total} = await list(
    `${ALL}&itemsPerPage=${state.count}&q=${words}&` + only(inbox ? [inbox] : own()));
  if (q !== view.q || inbox !== view.inbox) return;
  const known = items.length < state.count ? items.length : state.health.messages;
  Object.assign(state, {items, total: Number(total ?? known)});
}

const recount = throttled(async () => {
  const {items} = await list(`v1/inboxes?itemsPerPage=${INBOXES}&` + only(own()));
  state.inboxes = new Map(items.map((item) => [item.address.toLowerCase(), item]));
});

async function loadSessions() {
  const {items} = state.own ? {} : await ask("v1/sessions").catch(() => ({}));
  if (items) state.sessions = items;
  render();
}

/** Whether only inboxes acquired here may be read: one request, so that there is one login. */
async function limited({hosted, api_key: key}) {
  if (hosted && !recall().signedIn || !key) return hosted;
  return ask(ALL + "&itemsPerPage=1").then(() => false, (error) => {
    if ([401, 403].includes(error.status)) return true;
    throw error;
  });
}

/** Asks for all that is in sight. */
const refresh = throttled(async () => {
  if (Date.now() < state.pause) return;
  state.health = await ask("healthz");
  if (state.own === null) {
    state.own = await limited(state.health);
    loadSessions();
  }
  follow();
  await loadList();
  recount();
  if (state.sessions[0] && failed(state.sessions[0])) loadSessions();
  if (state.message) await ask(apiUrl(view.message), {method: "HEAD"}).catch(lose);
  state.problem = "";
});

/** Says what keeps the list from being known. */
function trouble({status, message, retry}) {
  state.problem = status ? message : "mailtest does not answer";
  state.pause = retry ? Date.now() + 1000 * retry : 0;
  if (status === 400) Object.assign(state, {total: null, items: []});  // a search word
  else if (state.own && [401, 403].includes(status)) remember({own: []});
  else setStatus(status === 429 ? "waiting" : "reconnecting");
}

/** The message of the URL; after a moment, as it may be one of many leafed through. */
async function loadMessage() {
  const id = view.message;
  await sleep(30);
  if (!id || SHEETS[id] || id !== view.message) return;
  const message = await ask(apiUrl(id)).catch((error) => id === view.message && lose(error));
  if (id === view.message) {
    state.message = message;
    if (message) ask(viewUrl(id, "seen"), {method: "PUT"}).catch(() => {});
  }
  render();
}

function lose({status, message}) {
  state.gone = status === 404 ? "This message is gone from the catcher: deleted or expired"
    : `This message could not be read: ${message}`;
}

// -- Live

let source = null, followed = "";

const live = () => source && source.readyState !== EventSource.CLOSED;

/** Follows the events while the page is to be seen: a browser has six connections to a host. */
function follow() {
  const path = document.hidden || blind() ? "" : "v1/events?" + only(own());
  if (path === followed && (!path || live())) return;
  if (source) source.close();
  source = path ? new EventSource(path) : null;
  followed = path;
  if (!path) return setStatus("ready");
  source.onopen = () => {
    setStatus("live");
    refresh();
  };
  source.onerror = () => setStatus(live() ? "reconnecting" : "polling");
  for (const kind of ["message", "deleted", "emptied", "inbox", "expired", "seen", "reset"]) {
    source.addEventListener(kind, refresh);
  }
  source.addEventListener("session", loadSessions);
}

function setStatus(text) {
  $("status").textContent = $("status").dataset.state = text;
}

// -- Inboxes

function render() {
  if (state.health) {
    renderHeader();
    renderInboxes();
    renderBar();
  }
  renderList();
  renderMain();
}

async function acquire() {
  const {address, expires} = await change("v1/acquire") || {};
  if (!address) return;
  remember({own: [{address, expires}, ...recall().own].slice(0, 50)});
  go({inbox: address, message: "", q: ""});
  copy(address);
}

function renderInboxes() {
  const all = [...state.inboxes.values()], {messages, unseen, inboxes} = state.health;
  const sum = (name) => all.reduce((total, inbox) => total + inbox[name], 0);
  const whole = {address: "", message_count: state.own ? sum("message_count") : messages,
    unseen: state.own ? sum("unseen") : unseen};
  for (const [id, part] of [["all", [whole]], ["acquired", all.filter((one) => one.acquired)],
    ["others", all.filter((one) => !one.acquired)]]) {
    each($(id), part, "address", inboxEntry, updateEntry);
  }
  choose("inbox", view.inbox);
  const more = all.length < INBOXES ? 0 : inboxes - all.length;
  $("more").textContent = more > 0 ? `${more.toLocaleString("en")} more: search with to:` : "";
  document.title = whole.unseen ? `(${whole.unseen}) mailtest` : "mailtest";
}

const inboxEntry = ({address, acquired, expires}) => choice(".inbox.line@inbox", "inbox",
  address, address || "All mail", ({target}) => go({inbox: target.value}),
  h("bdi.grow.cut", address.replace("@" + state.health.domain, "") || "All mail"),
  acquired && h("time", "until " + clock(expires)), h("span.count"));

const updateEntry = (node, {message_count: all, unseen}) => fill(node.lastChild, [all, unseen],
  () => [h(unseen ? "b" : "span", unseen || all),
    h("span.heard", unseen ? ` unread of ${all}` : " messages, all read")]);

const chosen = () => state.inboxes.get(view.inbox.toLowerCase());

/** What stands above the list: whose mail it is, and what can be done with it. */
function renderBar() {
  const inbox = chosen() || {address: view.inbox, failures: []};
  const {address, failures, attempts, acquired, expires} = inbox;
  const button = (name, question, path, next) => h("button", {onclick: async () => {
    if (confirm(question) && await change(path, {method: "DELETE"})) go({inbox: next}, true);
  }}, name);
  fill($("bar"), [address, acquired && expires, failures, attempts], () => [
    h("h2.line@address", h("bdi", address || "All mail"),
      address && copier(address, "the address")),
    acquired && h("time", "until " + clock(expires)),
    h("small@hits", {id: "hits", role: "status"}), h("details.menu@menu",
      h("summary.square", {title: "Menu"}, icon("more")),
      h("div.box", (address || !state.own) && button("Empty",
        `Delete all mail to ${address || "everyone"}? There is no undo.`, address
          ? `v1/inboxes/${uri(address)}/messages`
          : ALL, address),
      address && button("End", `End ${address} and delete its mail?`,
        "v1/get/" + uri(address), ""),
      failures.length > 0 && h("p", `Failures to play, in ${plural(attempts, "attempt")}:`),
      failures.map(({fail, answered, left}) => h("p", h("code", fail),
        ` answered ${answered} times, ${left} left`))))]);
  $("hits").textContent = state.total === null ? ""
    : plural(state.total, view.q ? "hit" : "message");
}

// -- List

const listed = () => state.items.filter(({id}) => !state.deleted.has(id));

function renderList() {
  each($("rows"), state.items, "id", row, (node, {id, seen}) => {
    node.href = urlOf({message: id});
    node.hidden = state.deleted.has(id);
    node.ariaSelected = String(id === view.message);
    node.classList.toggle("unread", !seen);
    node.firstChild.textContent = seen ? "" : "unread, ";
  });
  const selected = $("row-" + view.message);
  $("rows").setAttribute("aria-activedescendant", selected ? selected.id : "");
  if (selected && selected !== state.revealed) selected.scrollIntoView({block: "nearest"});
  state.revealed = selected;
  renderNothing();
}

function row(item) {
  const to = [...item.to, ...item.cc, ...item.bcc];
  const fact = (count, noun, mark) => count > 0 && h("span.line." + noun,
    {title: plural(count, noun)}, icon(mark), count, h("span.heard", " " + noun));
  return h("a.row@message-row", {role: "option", id: "row-" + item.id, tabindex: -1,
    "data-inside": ""}, h("span.heard"),
  h("div.line", h("small.grow.cut", h("bdi", item.from.map(nameOf).join(", ") || "(no sender)"),
    " \u2192 ", h("bdi", to.length ? nameOf(to[0]) : "(nobody)"),
    to.length > 1 && ` +${to.length - 1}`), h("time", clock(item.received))),
  h("div.line", h("span.subject.grow.cut", {dir: "auto"}, item.subject || "(no subject)"),
    h("small", size(item.size))),
  h("div.line.soft", item.code && h("span.code", item.code), fact(item.links, "link", "open"),
    fact(item.attachments, "attachment", "clip"), fact(item.warnings, "warning", "warn"),
    h("span.grow.cut", {dir: "auto"}, item.summary)));
}

/** Why there is no row: only what is known is said. */
function renderNothing() {
  const text = state.total ? "" : state.problem || (state.total === null ? "Asking\u2026"
    : view.q ? "Nothing matches"
      : view.inbox ? "No mail for this address yet"
        : state.own ? "No mail to an address acquired here" : "No mail yet");
  fill($("nothing"), [text, state.own], () => [text && h("p", text),
    state.own && !state.health.hosted && [h("p@signed-out", "You are not signed in: only mail to "
      + "addresses acquired here is shown"), signIn()]]);
}

/** Selects the message so many rows further, or the first.  Leafing leaves no history. */
function move(step) {
  const items = listed(), now = items.findIndex(({id}) => id === view.message);
  const next = items[Math.max(0, Math.min(items.length - 1, now < 0 ? 0 : now + step))];
  toList();
  if (next) go({message: next.id}, view.message !== "");
}

// -- Message

function back() {
  if (history.state) history.back();
  else go({message: ""});
  toList();
}

const heading = (text, ...tools) => h("div.line", tool("back", "Back to the list",
  {onclick: back}, ".back"), h("h2.grow", {dir: "auto"}, text), tools);

function renderMain() {
  const {message, gone} = state, main = $("message"), {message: id} = view;
  document.body.dataset.pane = id ? "message" : "list";
  if (message) {
    fill(main, message.id, () => mail(message));
    $("gone").textContent = gone;
    renderPanel(message);
  } else if (id && !SHEETS[id]) {
    fill(main, [id, gone], () => gone && h("div.sheet", heading("No message"), h("p", gone)));
  } else if (state.health) (SHEETS[id] || SHEETS.help)(main);
}

const folded = (kind, title, small, ...children) => h("details" + kind, small ? {open: ""} : {},
  h("summary", title), children);

function mail(message) {
  const {subject, warnings, attachments, id} = message;
  $("message").scrollTop = 0;
  return [h("div.head", heading(subject || "(no subject)",
    tool("dot", "Mark unread (m)", {onclick: unread}),
    tool("load", "Download as .eml", {href: viewUrl(id, "source"), download: id + ".eml"}),
    !state.own && tool("bin", "Delete (Del)", {onclick: remove}, "@delete")),
  partiesOf(message), metaOf(message), h("p.notice", {id: "gone", role: "alert"}),
  warnings.length > 0 && folded(".notice", plural(warnings.length, "warning"), false,
    h("ul", warnings.map((warning) => h("li", warning)))),
  h("div.line.wrap.chips", chipsOf(message)),
  attachments.length > 0 && folded("", plural(attachments.length, "attachment"),
    attachments.length < 7, h("div.line.wrap", attachments.map(fileOf)))),
  tabsOf(message), h("div", {id: "panel", tabindex: 0, role: "region"})];
}

const fields = ({metadata}, name) => metadata.headers.filter(
  ({field}) => field.toLowerCase() === name).map(({value}) => value);

function partiesOf(message) {
  const few = (texts) => texts.flatMap((text, index) => [index ? ", " : "", h("bdi", text)]);
  const line = (label, texts) => texts.length > 0 && h("div", h("span.soft", label + " "),
    few(texts.slice(0, 4)), texts.length > 4 && folded("", `and ${texts.length - 4} more`, false,
      few(texts.slice(4))));
  return h("div.line.wrap.parties", ["From", "To", "Cc", "Bcc"].map((label) => line(label,
    message[label.toLowerCase()].map((one) => (one.name ? `${one.name} <${party(one)}>`
      : party(one))))), line("Reply to", fields(message, "reply-to")),
  line("Unsubscribe", fields(message, "list-unsubscribe")));
}

function metaOf(message) {
  const {received, from, to, cc, id, metadata} = message, [date] = fields(message, "date");
  const {mailFrom, rcptTo, client, tls, user} = metadata;
  const text = (addresses) => addresses.map(party).sort().join().toLowerCase();
  const differs = mailFrom !== null && (text(from) !== mailFrom.toLowerCase()
    || text(rcptTo) !== text([...to, ...cc]));  // the envelope, from the header fields
  return h("div.line.wrap.soft.meta",
    h("span", clock(received, 23)),
    Math.abs(Date.parse(date) - Date.parse(received)) > 60000 && h("span", "Date field: " + date),
    h("span", size(message.size)),
    client && h("span", `from ${client}${tls ? " over TLS" : ""}${user ? ` as ${user}` : ""}`),
    differs && h("span", "envelope ", h("bdi", mailFrom || "<>"), " \u2192 ",
      h("bdi", rcptTo.slice(0, 3).map(party).join(", ")),
      rcptTo.length > 3 && ` and ${rcptTo.length - 3} more`),
    h("button", {title: "Copy the id", onclick: () => copy(id, "the id")}, "id " + id));
}

const codesOf = ({text, html}) => [...new Set([...text.codes, ...html.codes].map(
  ({value}) => value))];
const linksOf = ({text, html}) => (html.links.length ? html : text).links;

/** The codes and the first links, with the host if the text does not show it. */
function chipsOf(message) {
  const chip = (kind, text, what, ...shown) => h("button@chip-" + kind, {title: "Copy " + text,
    onclick: () => copy(text, what)}, shown, icon("copy"));
  return [codesOf(message).slice(0, 3).map((code) => h("span.chip.box.line",
    chip("code", code, code, "code ", h("b.code", code)))),
  linksOf(message).filter(({href}) => !href.startsWith("#")).slice(0, 3).map(({href, text}) => {
    const [, host] = /^\w+:\/+(?:[^/?#]*@)?([^/?#]+)/.exec(href) || [];
    return h("span.chip.box.line", chip("link", href, "the link", h("span", {dir: "auto"},
      text || href), host && text && !text.includes(host) && h("small", host)), opener(href));
  })];
}

/** A way to follow a link, if it is one for browsers. */
const opener = (href) => /^(https?|mailto):/i.test(href) && tool("open", "Open " + href,
  {href, target: "_blank", rel: "noreferrer"});

function fileOf({id, fileName, contentId, contentType, length}) {
  const href = "v1/attachments/" + uri(id);
  const name = fileName || contentId || "(no name)", [, type] = /\.(\w{1,4})$/.exec(name) || [];
  return h("a.file.box.line@attachment", {href, download: name, title: name},
    /^image\//.test(contentType) && length < 1e7 ? h("img", {src: href, alt: "", loading: "lazy"})
      : h("span.soft", {"aria-hidden": "true"}, (type || "file").toUpperCase()),
    h("div.grow", h("div.cut", name), h("div.soft.cut", `${contentType} \u00b7 ${size(length)}`)));
}

const unread = () => state.message
  && change(viewUrl(view.message, "seen"), {method: "DELETE"});

/** Deletes the message that is shown, after a moment for second thoughts. */
function remove() {
  const id = view.message, items = listed(), now = items.findIndex((item) => item.id === id);
  const next = items[now + 1] || items[now - 1];
  if (state.own || !state.message || state.deleted.has(id)) return;
  state.deleted.set(id, setTimeout(removeNow, UNDO, id));
  toast(`Deleted ${plural(state.deleted.size, "message")}`, true);
  if (narrow.matches || !next) back();
  else go({message: next.id}, true);
  toList();
}

function undo() {
  const ids = [...state.deleted.keys()];
  state.deleted.forEach(clearTimeout);
  state.deleted.clear();
  $("toast").hidden = true;
  if (ids.length) go({message: ids.pop()}, true);
}

async function removeNow(id) {
  await change(apiUrl(id), {method: "DELETE", keepalive: true});
  await loadList().catch(() => {});
  state.deleted.delete(id);
  render();
}

// -- Tabs

const pre = (text, id, attributes = {}) => h("pre", attributes, text.slice(0, SHOWN),
  text.length > SHOWN && h("a", {href: viewUrl(id, "source")}, "\n\n\u2026 The whole source"));

// What in a mail's HTML would be fetched from elsewhere.
const REMOTE = /((src|srcset|background|poster)\s*=|url\()\s*["']?\s*(https?:)?\/\/|<link\b/i;

function showPreview({id, html, text}) {
  const frame = h("iframe@preview-frame", {title: "The HTML of the message",
    src: viewUrl(id, "preview?remote=" + Number(state.remote)), referrerpolicy: "no-referrer",
    sandbox: "allow-popups allow-popups-to-escape-sandbox"});
  // Nobody can ask a sandboxed document how long it is: on paper it gets room for its text.
  frame.style.setProperty("--pages", Math.ceil(((text.body || html.body).length + 1) / 3000));
  const load = () => {
    state.remote = true;
    render();
  };
  return [h("div.tools.line.wrap", REMOTE.test(html.body) && !state.remote
    && ["Remote content is blocked", h("button@load-remote", {onclick: load}, "Load it")],
  h("span.grow", h("span.away", "The keys are in the mail: Shift+Tab leads back")),
  h("label", h("input", {type: "checkbox", id: "scheme", onchange: ({target}) => go(
    {scheme: target.checked ? "dark" : "light"}, true)}), " Dark"),
  ["320", "375", "768", "100%"].map((width) => choice("", "width", width, "Width",
    () => go({width}, true), width))), h("div.stage", frame)];
}

const showLinks = (message) => h("div.links", linksOf(message).map(({href, text}) => h("div.line",
  h("div.grow", h("div", {dir: "auto"}, text), h("code.soft", href)), copier(href, "the link"),
  opener(href))));

const pairs = (lines) => h("dl.pairs", lines.map(([term, text]) => [h("dt", term),
  h("dd", {dir: "auto"}, text)]));

function showSource({id}) {
  const node = h("div@source", "\u2026");
  fetch(viewUrl(id, "source")).then(async (response) => node.replaceChildren(
    response.ok ? pre(await response.text(), id) : "The source is gone with the message"),
  () => node.replaceChildren("mailtest does not answer"));
  return node;
}

const REFUSAL = /^(S: )?[45]\d\d[ -]/;

/** The lines of a session: what the client said, and what was refused, in their colours. */
const transcript = (lines) => h("pre", lines.map((line) => h(/^C:/.test(line) ? "span.client"
  : REFUSAL.test(line) ? "span.refusal" : "span", line + "\n")));

const block = (text) => h("div.block", h("pre.box", {tabindex: 0}, text), copier(text, "this"));

const base = () => new URL(".", location).href.slice(0, -1);

function showJson(message) {
  const curl = (path) => block(`curl -s '${base()}/${path.replaceAll("'", "%27")}'`);
  const {email} = message.metadata.rcptTo[0] || {}, subject = uri(message.subject);
  return [curl(apiUrl(message.id)),
    email && curl(`v1/get/${uri(email)}?timeout=30&subject=${subject}`),
    h("div@json", pre(JSON.stringify(message, null, 2), message.id))];
}

const TABS = {  // label, noun of what it needs, that, how it is shown
  preview: ["Preview", "HTML part", ({html}) => html.body, showPreview],
  text: ["Text", "text part", ({text}) => text.body,
    ({text, id}) => pre(text.body, id, {class: "letter", dir: "auto"})],
  html: ["HTML", "HTML part", ({html}) => html.body, ({html, id}) => pre(html.body, id)],
  links: ["Links", "links", (message) => linksOf(message).length, showLinks],
  headers: ["Headers", "header fields", ({metadata}) => metadata.headers.length,
    ({metadata}) => pairs(metadata.headers.map(({field, value}) => [field, value]))],
  source: ["Source", "source", () => true, showSource],
  smtp: ["SMTP", "SMTP session", ({session}) => session[0], ({session}) => transcript(session)],
  json: ["JSON", "JSON", () => true, showJson],
};

const missing = (name) => !TABS[name][2](state.message) && "This message has no " + TABS[name][1];

const tabsOf = (message) => h("div.tabs", {role: "radiogroup", "aria-label": "Parts"},
  Object.entries(TABS).map(([name, [label, , holds]], index) => {
    const held = holds(message), tab = choice("@tab-" + name, "tab", name, missing(name)
      || `${label} (${index + 1})`, () => go({tab: name}, true), label,
    Number.isInteger(held) && held > 0 && h("small", " ", held));
    tab.firstChild.disabled = !held;
    return tab;
  }));

/** The chosen tab, or the first that holds something. */
function renderPanel(message) {
  const name = [view.tab, "preview", "text", "source"].find((tab) => TABS[tab] && !missing(tab));
  const panel = $("panel");
  choose("tab", name);
  panel.dataset.tab = name;
  panel.ariaLabel = TABS[name][0];
  fill(panel, [message.id, name, state.remote], () => TABS[name][3](message));
  const frame = panel.querySelector("iframe");
  if (!frame) return;
  choose("width", view.width);  // without loading it anew
  $("scheme").checked = view.scheme === "dark";
  frame.style.width = view.width.replace(/\d$/, "$&px");
  frame.style.colorScheme = view.scheme;
}

// -- Manual and sessions

const SHEETS = {  // what may stand in the place of a message
  help: (main) => {
    const {smtp, strict} = state.health;
    fill(main, [smtp, strict, state.own, chosen()?.address], manual);
  },
  sessions: (main) => {
    fill(main, "sessions", () => h("div.sheet", heading("The last SMTP sessions"),
      h("div", {id: "sessions"})));
    each($("sessions"), state.sessions, "number", (session) => h("details@session",
      h(failed(session) ? "summary.refusal" : "summary", `${clock(session.started, 19)} `
        + `${session.client} ${outcome(session)}`), transcript(session.transcript)));
  },
};

const failed = ({refused, messages, ending}) => refused || !messages && ending !== "quit";

function outcome({refused, ending, transcript: lines, messages}) {
  const [first = refused] = lines.filter((line) => REFUSAL.test(line));  // the cause of others
  if (refused) return "was refused: " + first.replace("S: ", "");
  return messages ? `brought ${plural(messages, "message")}` : `ended without mail: ${ending}`;
}

const HELP = [["word \"two words\"", "in subject, addresses and bodies"],
  ["from: to: cc: bcc:", "a part of a name or address"],
  ["subject: body: header: file: id: user:", "a part of that"],
  ["has:attachment", "also code, link, html, text, warning"], ["-word -has:link", "not that"],
  ["j k or arrows", "next and previous message"], ["Enter", "into it"], ["Esc", "back"],
  ["1 to 8", "the tabs of the message"], ["y", "copy the code"], ["m", "mark as unread"],
  ["Del", "delete the message"], ["u", "undo that, within 5 seconds"], ["/", "search"],
  ["a", "acquire an address and copy it"]];

/** How to use this catcher; it names the inbox that is chosen. */
function manual() {
  const {ttl, strict, rate, smtp, max_size: most, version} = state.health, url = base();
  const {address} = chosen() || {}, [, host, port] = /(.*):(.*)/.exec(smtp);
  const place = (term, text) => text && h("div.box", h("dt", term), h("dd.line",
    h("span.mono.grow", text), copier(text, term)));
  const sample = () => change(ALL, {method: "POST", body:
    JSON.stringify({to: address || "jane@example.com", from: "Acme <noreply@acme.example>"})});
  return h("div.sheet@empty", heading("Send mail here"),
    h("p", `Mail of up to ${size(most)} to ${strict ? "an acquired" : "any"} address appears here `
      + `at once and goes no further. After ${plural(ttl / 60, "minute")} it is deleted. `
      + (rate ? `You have ${plural(rate, "request")} a minute, and who knows an address can read `
        + "its mail: nothing secret, please." : "")),
    h("dl.line.wrap.places", place("Address", address), place("SMTP host", host),
      place("SMTP port", port), place("HTTP API", url)),
    h("div.line.wrap", !state.own && h("button.primary@sample", {onclick: sample},
      "Send me a sample mail"), h("button", {onclick: acquire}, icon("plus"),
      "Acquire an address"), signIn(), !state.own && h("a.button", {"data-inside": "",
      href: urlOf({message: "sessions"})}, "Last SMTP sessions")),
    h("h3", "In a shell: acquire an address, send to it, wait for what arrives"),
    block(`to=$(curl -s ${url}/v1/acquire)
printf 'Subject: Hello\\n\\nIt works\\n' | curl -s --crlf -T - \\
  --mail-from me@example.com --mail-rcpt "$to" smtp://${smtp}
curl -s "${url}/v1/get/$to?timeout=10"`),
    h("h3", "In Python"), block(`import smtplib
with smtplib.SMTP("${host}", ${port}) as smtp:
    smtp.sendmail("me@example.com", "${address || (strict ? "an acquired address"
    : "jane@example.com")}", "Subject: Hello\\n\\nIt works")`),
    h("h3", "Search"), pairs(HELP.slice(0, 5)), h("h3", "Keyboard"), pairs(HELP.slice(5)),
    h("p", `mailtest ${version}`));
}

/** Who has the API key sees all mail; the browser asks for it. */
const signIn = () => state.own && state.health.api_key && h("button@sign-in", {onclick: () => {
  remember({signedIn: true});
  location.reload();
}}, "Show all mail (API key)");

// -- Header

function renderHeader() {
  const {smtp} = state.health, [session] = state.sessions, strip = $("refused");
  fill($("smtp"), smtp, () => ["smtp " + smtp, icon("copy")]);
  $("smtp").onclick = () => copy(smtp);
  $("help").href = urlOf({message: "help"});
  strip.hidden = !session || !failed(session);
  strip.firstElementChild.href = urlOf({message: "sessions"});
  if (session) {
    fill(strip.firstElementChild, session.number, () => [icon("warn"), "The last SMTP session, of "
      + `${clock(session.started, 19)}, ${outcome(session)}`]);
  }
}

/** Light or dark, as the system has it unless something else was chosen. */
function renderTheme() {
  const theme = recall().theme || (dark.matches ? "dark" : "light");
  const other = theme === "dark" ? "light" : "dark";
  document.documentElement.style.colorScheme = theme;
  $("theme").title = `Switch to ${other} colours`;
  $("theme").onclick = () => {
    remember({theme: other});
    renderTheme();
  };
}

// -- Keys and clicks

const toList = () => $("rows").focus({preventScroll: true});

function copyCode() {
  const [code] = state.message ? codesOf(state.message) : [];
  return code ? copy(code) : toast("There is no code");
}

/** One step back: from the message to the list, from there to the manual. */
function escape() {
  const inList = [$("rows"), document.body].includes(document.activeElement);
  if (view.message && (inList || narrow.matches || SHEETS[view.message])) back();
  else toList();
}

const KEYS = {j: () => move(1), k: () => move(-1), a: acquire, u: undo, y: copyCode, m: unread,
  "/": () => $("search").select(), "?": () => go({message: "help"}), Delete: remove,
  Escape: escape};
Object.keys(TABS).forEach((name, index) => {
  KEYS[index + 1] = () => state.message && (missing(name) ? toast(missing(name))
    : go({tab: name}, true));
});
const LIST_KEYS = {ArrowDown: KEYS.j, ArrowUp: KEYS.k, Home: () => move(-1000),
  End: () => move(1000), Enter: () => ($("panel") ? $("panel").focus() : move(0)), ...KEYS};
const SEARCH_KEYS = {ArrowDown: () => move(0), Enter: () => move(0),
  Escape: () => (go({q: ""}), toList())};

function pressed(event) {
  const {target, key} = event;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const keys = target === $("search") ? SEARCH_KEYS
    : [document.body, $("rows")].includes(target) ? LIST_KEYS : KEYS;
  if (!Object.hasOwn(keys, key)) return;
  event.preventDefault();
  keys[key]();
}

/** A plain click on a link within the page changes the view; others are the browser's. */
function clicked(event) {
  for (const menu of document.querySelectorAll(".menu[open]")) {
    menu.open = menu.contains(event.target) && !event.target.closest("button, a");
  }
  const link = event.target.closest("a[data-inside]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  if (link.role) toList();  // a row
  history.pushState(!view.message, "", link.href);
  moved();
}

addEventListener("keydown", pressed);
addEventListener("click", clicked);
addEventListener("popstate", moved);
addEventListener("pagehide", () => state.deleted.forEach((timer, id) => removeNow(id)));
document.onvisibilitychange = () => {
  if (state.health) follow();
  refresh();
};
dark.onchange = renderTheme;
$("rows").onscroll = ({target: {scrollTop, clientHeight, scrollHeight}}) => {
  if (state.items.length < state.count || scrollHeight - scrollTop > 2 * clientHeight) return;
  state.count = Math.min(1000, state.count + PAGE);
  refresh();
};
$("search").oninput = () => {
  const q = $("search").value.trim();
  go({q}, view.q !== "" && q !== "");
};
$("acquire").onclick = acquire;
$("toast").lastElementChild.onclick = undo;
document.querySelectorAll("[data-icon]").forEach((node) => node.prepend(icon(node.dataset.icon)));
setInterval(() => live() || refresh(), 5000);
renderTheme();
moved();
refresh();
"""

PAGE_FILES = {
    "/": ("text/html; charset=utf-8", PAGE_HTML.encode("utf-8")),
    "/page.css": ("text/css; charset=utf-8", PAGE_CSS.encode("utf-8")),
    "/page.js": ("text/javascript; charset=utf-8", PAGE_JS.encode("utf-8")),
    "/favicon.ico": ("image/svg+xml", (
        b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">'
        b'<rect x="2" y="6" width="28" height="20" rx="4" fill="#2f5fd0"/>'
        b'<path d="m5 10 11 8 11-8" fill="none" stroke="#fff" stroke-width="2.5"/></svg>')),
}

Mailtest.page = PAGE_FILES


if __name__ == "__main__":
    sys.exit(main())
