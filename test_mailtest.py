"""Tests of mailtest.py: the same sections in the same order.

Tables stand before the function that runs them; the key of a row is a sentence, and names the
test.  Sessions and requests are played in memory; sockets appear where the socket is the subject.

    python -m pytest                    runs them
    python test_mailtest.py             prints how fast mailtest is on this machine
"""

import ast
import asyncio
import base64
import contextlib
import datetime
import email.message
import errno
import functools
import gc
import hmac
import http.client
import http.server
import importlib.util
import io
import itertools
import json
import logging
import multiprocessing
import operator
import os
import pathlib
import queue
import re
import secrets
import select
import shlex
import shutil
import signal
import smtplib
import socket
import socketserver
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
import types
import urllib.error
import urllib.parse
import urllib.request

import pytest

import mailtest


def rows(table):
    """The rows of a table as parameters that are named by their sentences."""
    return [pytest.param(*(row if isinstance(row, tuple) else (row,)), id=sentence)
            for sentence, row in table.items()]


class FakeClock:
    """Seconds that grow only when a test says so."""

    def __init__(self, now=1_000.0):
        self.now = now

    def __call__(self):
        return self.now


def store_on_clock(strict=False, domain="mailtest.example", **limits):
    """(clock, store): a Store whose both clocks are one fake."""
    clock = FakeClock()
    return clock, mailtest.Store(mailtest.Limits(**limits), domain, strict, clock, clock)


def letter(*paths, octets=b"Subject: x\r\n\r\nx\r\n", direction="Received", kind="Email",
           **said):
    """A message to these recipients, as a session makes it."""
    envelope = mailtest.Envelope("s@sender.example", paths, **said)
    return mailtest.Message(mailtest.new_id(), octets, envelope, kind, direction)


def at(text):
    """The place that a test means: an address, or a server's id behind "/"."""
    return {"server": text[1:]} if text.startswith("/") else {"address": text}


def delivered(store, *paths, **options):
    """A message that the store has taken."""
    server = options.pop("server", "")
    message = letter(*paths, **options)
    store.deliver(message, server)
    return message


# ---- Limits ----------------------------------------------------------------

def test_every_limit_has_a_default_that_is_no_negative_number():
    assert all(value >= 0 for value in mailtest.Limits())


# ---- Messages --------------------------------------------------------------
# One small mail per cause. The key of a row says what holds, and is the test's id.


def crlf(*lines):
    """A mail of these lines, each with its CRLF."""
    return b"".join((line if isinstance(line, bytes) else line.encode()) + b"\r\n"
                    for line in lines)


def multipart(subtype, *parts):
    """A multipart mail with boundary "b"; a part is a tuple of lines."""
    lines = ["Content-Type: multipart/%s; boundary=b" % subtype, ""]
    for part in parts:
        lines += ["--b"] + list(part)
    return crlf(*lines, "--b--")


def message_rows(table):
    return pytest.mark.parametrize("given, expected", list(table.values()), ids=list(table))


def read(octets, *paths, **envelope):
    """A mail that was read."""
    envelope = mailtest.Envelope(None, paths, **envelope)
    return mailtest.read_message(octets, envelope)


PLAIN, HTML = "Content-Type: text/plain", "Content-Type: text/html"
EIGHT_BIT = "Content-Transfer-Encoding: 8bit"
IMAGE = ("Content-Type: image/png", "Content-ID: <i@x>", "Content-Disposition: inline", "", "png")

SUBJECTS = {
    "a subject is as written": ("hello", "hello"),
    "no subject is empty": ("", ""),
    "a folded subject is one line": ("one\r\n two", "one two"),
    "blanks around it go": ("  x \t", "x"),
    "base64 words are decoded": ("=?utf-8?B?w7xiZXI=?=", "über"),
    "Q words are decoded, _ is a blank": ("=?iso-8859-1?Q?a_b=FC?=", "a bü"),
    "a language in a word is skipped": ("=?utf-8*en?q?hi?=", "hi"),
    "blanks between words go": ("=?utf-8?q?a?=\r\n =?utf-8?q?b?=", "ab"),
    "blanks between a word and text stay": ("=?utf-8?q?a?= b", "a b"),
    "a character may be split over two words": ("=?utf-8?q?=C3?= =?utf-8?q?=BC?=", "ü"),
    "words of two charsets are joined as text": ("=?utf-8?q?=C3=BC?= =?latin1?q?=FC?=", "üü"),
    "a question mark in a Q word is kept": ("=?utf-8?q?what?_now??=", "what? now?"),
    "a word that does not end is text": ("=?utf-8?q?abc", "=?utf-8?q?abc"),
    "an unknown charset is read as UTF-8": ("=?x-none?q?=C3=BC?=", "ü"),
    "a zlib word is not inflated": ("=?zlib?b?eJw=?=", "x\u0153"),
    "raw UTF-8 is read": ("über", "über"),
    "raw latin-1 is read": (b"\xfcber", "über"),
    "ISO-2022-JP is read": ("=?ISO-2022-JP?B?GyRCRnxLXBsoQg==?=", "日本"),
    "a line end that was encoded is a blank": ("=?utf-8?q?a=0D=0AB:_c?=", "a B: c"),
    "half a surrogate pair is replaced": ("=?utf-7?q?+2AA-?=", "\ufffd"),
}


@message_rows(SUBJECTS)
def test_subject(given, expected):
    given = given if isinstance(given, bytes) else given.encode()
    raw = b"Subject: " + given + b"\r\n\r\nbody\r\n"
    assert read(raw).subject == expected


HEADER_BLOCKS = {
    "fields come in order, each as often as it is there":
        (b"A: 1\r\nB: 2\r\nA: 3\r\n\r\n", [("A", "1"), ("B", "2"), ("A", "3")]),
    "a blank before the colon is no part of the name": (b"A : 1\r\n\r\n", [("A", "1")]),
    "junk does not end the block": (b"A: 1\r\njunk\r\nB: 2\r\n\r\n", [("A", "1"), ("B", "2")]),
    "a blank before the first field is skipped":
        (b" A: 1\r\nB: 2\r\n\r\n", [("A", "1"), ("B", "2")]),
    "a field may be empty": (b"A:\r\nB: 2\r\n\r\n", [("A", ""), ("B", "2")]),
    "an mbox line is no field": (b"From x Mon Jan 1 00:00:00 2024\r\nA: 1\r\n\r\n", [("A", "1")]),
    "bare LF ends lines, too": (b"A: 1\nB: 2\n\nC: 3\n", [("A", "1"), ("B", "2")]),
    "bare CR ends lines, too": (b"A: 1\rB: 2\r\rC: 3\r", [("A", "1"), ("B", "2")]),
    "a mail may be all header": (b"A: 1\r\nB: 2\r\n", [("A", "1"), ("B", "2")]),
    "a mail may have no header": (b"\r\nA: 1\r\n", []),
    "a mail may be empty": (b"", []),
}


@message_rows(HEADER_BLOCKS)
def test_header_block(given, expected):
    assert list(read(given).headers) == expected


ADDRESSES = {
    "an address": ("a@b", [("", "a@b")]),
    "a name": ("Ann B <a@b>", [("Ann B", "a@b")]),
    "a quoted name": (r'"B, \"Ann\"" <a@b>', [('B, "Ann"', "a@b")]),
    "a quoted name in single quotes": ("'Ann' <a@b>", [("Ann", "a@b")]),
    "a comment is the name where there is none": ("a@b (Ann B)", [("Ann B", "a@b")]),
    "comments nest": ("a@b (Ann (or Bob) B)", [("Ann (or Bob) B", "a@b")]),
    "a comment beside a name is dropped": ("Ann (x) <a@b>", [("Ann", "a@b")]),
    "a comment inside <> is dropped": ("Ann <a(x)@b>", [("Ann", "a@b")]),
    "several": ("a@b, Ann <c@d>", [("", "a@b"), ("Ann", "c@d")]),
    "semicolons separate, too": ("a@b; c@d", [("", "a@b"), ("", "c@d")]),
    "a comma too many costs nothing": (",a@b,, c@d,", [("", "a@b"), ("", "c@d")]),
    "a group is opened": ("team: a@b, Ann <c@d>;", [("", "a@b"), ("Ann", "c@d")]),
    "an empty group holds no one": ("undisclosed-recipients:;", []),
    "an address follows a group": ("g: a@b; c@d", [("", "a@b"), ("", "c@d")]),
    "encoded names are decoded": ("=?utf-8?q?=C3=BC=2C_x?= <a@b>", [("ü, x", "a@b")]),
    "encoded names in quotes are decoded": ('"=?utf-8?q?=C3=BC?=" <a@b>', [("ü", "a@b")]),
    "a comma in an encoded name separates nothing": ("=?utf-8?q?B,A?= <a@b>", [("B,A", "a@b")]),
    "an encoded address is read": ("=?utf-8?q?Ann_<a@b>?=", [("Ann", "a@b")]),
    "a quoted local part keeps its quotes": ('"a b"@c', [("", '"a b"@c')]),
    "a route is dropped": ("<@x,@y:a@b>", [("", "a@b")]),
    "blanks around the @ are dropped": ("a @ b", [("", "a@b")]),
    "a name without <>": ("Ann B a@b", [("Ann B", "a@b")]),
    "a local name is an address": ("root", [("", "root")]),
    "words without an address are a name": ("Ann B", [("Ann B", "")]),
    "a missing > ends at the comma": ("Ann <a@b, c@d", [("Ann", "a@b"), ("", "c@d")]),
    "a quote that does not end is dropped": ('"Ann <a@b>, c@d', [("Ann", "a@b"), ("", "c@d")]),
    "an international address": ("Jürgen <jürgen@exämple>", [("Jürgen", "jürgen@exämple")]),
    "garbage is no address": ("<<<>>>,;:", []),
    "null": ("<>", []),
}


@message_rows(ADDRESSES)
def test_addresses(given, expected):
    raw = crlf("To: " + given, "", "x")
    assert [tuple(address) for address in read(raw).to] == expected


def test_several_to_fields_all_count_and_the_first_from_does():
    mail = read(crlf(
        "From: a@x", "From: b@x", "To: c@x", "To: d@x", "Cc: e@x", "Reply-To: g@x"))
    assert [[address.email for address in field]
            for field in (mail.from_, mail.to, mail.cc, mail.reply_to)] == [
        ["a@x"], ["c@x", "d@x"], ["e@x"], ["g@x"]]


@message_rows({
    "case": ("a@X.example", "A@x.example"),
    "IDNA": ("j@b\u00fccher.example", "J@xn--bcher-kva.EXAMPLE"),
})
def test_two_spellings_of_one_address(given, expected):
    assert mailtest.address_key(given) == mailtest.address_key(expected)
    assert mailtest.inbox_key(given) == mailtest.inbox_key(expected)
    assert read(crlf("To: " + given, "", "x"), expected).bcc == ()


@message_rows({"two": ("a@x@y", "a@x@y"), "none": ("Root", "root"), "no name of DNS": (
    "a@\u00fc..x", "a@\u00fc..x"), "too long": ("a@" + "\u00fc" * 300, "a@" + "\u00fc" * 300)})
def test_key_of_what_is_no_address(given, expected):
    assert mailtest.address_key(given) == expected


DATES = {
    "a date": ("Fri, 17 May 2024 10:00:00 +0200", True),
    "a comment after the zone": ("17 May 2024 10:00:00 +0000 (UTC)", True),
    "a comment before the zone": ("20 Sep 95 00:19:00 (EDT) -0400", True),
    "no zone is UTC": ("17 May 2024 10:00", True),
    "an unknown zone is UTC": ("17 May 2024 10:00:00 -0000", True),
    "garbage is none": ("yesterday", False),
    "an impossible date is none": ("99 Jan 99999999999 99:99:99 +9999999", False),
    "an impossible zone is none": ("17 May 2024 10:00:00 +9999", False),
    "empty is none": ("", False),
    "a time of four numbers is none": ("17 May 2024 10.00.00.00 +0000", False),
}


@message_rows(DATES)
def test_date(given, expected):
    warnings = read(crlf("Date: " + given, "", "x")).warnings
    assert ("Date field that is no date" not in warnings) is expected


PART_NAMES = {
    "filename": ('Content-Disposition: attachment; filename="a b.txt"', "a b.txt"),
    "an unquoted name with blanks":
        ("Content-Disposition: attachment; filename=a b.txt", "a b.txt"),
    "a semicolon in quotes":
        ('Content-Disposition: attachment; filename="a;b=c.txt"', "a;b=c.txt"),
    "name of the Content-Type": ('Content-Type: image/png; name="a.png"', "a.png"),
    "an encoded word": ('Content-Disposition: attachment; filename="=?utf-8?q?=C3=BC?="', "ü"),
    "raw UTF-8": ('Content-Disposition: attachment; filename="ü.txt"', "ü.txt"),
    "RFC 2231": ("Content-Disposition: attachment; filename*=utf-8''%C3%BC.txt", "ü.txt"),
    "RFC 2231 wins over the plain one":
        ("Content-Disposition: attachment; filename=u.txt; filename*=utf-8''%C3%BC.txt", "ü.txt"),
    "RFC 2231 without a charset":
        ("Content-Disposition: attachment; filename*=%C3%BC.txt", "ü.txt"),
    "RFC 2231 in latin-1":
        ("Content-Disposition: attachment; filename*=iso-8859-1'de'%FC.txt", "ü.txt"),
    "continuations in any order":
        ('Content-Disposition: attachment; filename*1="b.txt"; filename*0="a"', "ab.txt"),
    "a character split over continuations":
        ("Content-Disposition: attachment; filename*0*=utf-8''%C3; filename*1*=%BC.txt", "ü.txt"),
    "an encoded word split over continuations":
        ('Content-Disposition: attachment; filename*0="=?utf-8?q?"; filename*1="=C3=BC?="', "ü"),
    "a quoted pair": (r'Content-Disposition: attachment; filename="a\"b"', 'a"b'),
    "a folder is kept": ("Content-Disposition: attachment; filename=Resources/dog.png",
                         "Resources/dog.png"),
    "the first of two counts": ("Content-Disposition: attachment; filename=a; filename=b", "a"),
    "without a disposition": ('Content-Type: x/y\nContent-Disposition: filename="a.pdf"', "a.pdf"),
    "a comma in place of the semicolon":
        ('Content-Disposition: attachment, filename="a.pdf"', "a.pdf"),
    "nothing in place of the semicolon": ('Content-Type: application/pdf name="a.pdf"', "a.pdf"),
    "nothing after a quoted parameter": ('Content-Type: x/y; x="y" name="a.pdf"', "a.pdf"),
    "brackets are no comment":
        ("Content-Disposition: attachment; filename=a (1).pdf", "a (1).pdf"),
    "line ends are dropped":
        ("Content-Disposition: attachment; filename*=utf-8''a%0D%0AX-Injected:%201",
         "a X-Injected: 1"),
    "half a surrogate pair is replaced":
        ("Content-Disposition: attachment; filename*=utf-8''%ED%A0%80", "\ufffd\ufffd\ufffd"),
    "none": ("Content-Disposition: attachment", ""),
}


@message_rows(PART_NAMES)
def test_file_name(given, expected):
    mail = read(multipart("mixed", (PLAIN, "", "hi"), (given, "", "x")))
    assert [attachment.file_name for attachment in mail.attachments] == [expected]


# mail: (text, html, [(type, name, content id, octets) of each attachment])
STRUCTURES = {
    "text": (crlf("", "hi"), ("hi\n", None, [])),
    "HTML only": (crlf(HTML, "", "<p>hi"), (None, "<p>hi\n", [])),
    "nothing": (b"", ("", None, [])),
    "an alternative is two bodies":
        (multipart("alternative", (PLAIN, "", "hi"), (HTML, "", "<p>hi")), ("hi", "<p>hi", [])),
    "several texts are joined":
        (multipart("mixed", (PLAIN, "", "one"), IMAGE, (PLAIN, "", "two")),
         ("one\ntwo", None, [("image/png", "", "i@x", b"png")])),
    "an inline image is an attachment":
        (multipart("related", (HTML, "", "<img src=cid:i@x>"), IMAGE),
         (None, "<img src=cid:i@x>", [("image/png", "", "i@x", b"png")])),
    "only the root of related is a body":
        (multipart("related", (HTML, "", "<p>"), (PLAIN, "", "x")),
         (None, "<p>", [("text/plain", "", None, b"x")])),
    "text said to be an attachment is one":
        (multipart("mixed", (PLAIN, "", "hi"),
                   (PLAIN, "Content-Disposition: attachment; filename=a.txt", "", "x")),
         ("hi", None, [("text/plain", "a.txt", None, b"x")])),
    "text with a name behind the first is an attachment":
        (multipart("mixed", (PLAIN, "", "hi"),
                   (PLAIN + "; name=a.txt", "Content-Disposition: inline", "", "x")),
         ("hi", None, [("text/plain", "a.txt", None, b"x")])),
    "names of alternatives say nothing":
        (multipart("alternative", (PLAIN + "; name=a.txt", "", "hi"),
                   (HTML + "; name=a.html", "", "<p>hi")), ("hi", "<p>hi", [])),
    "an unknown disposition is an attachment":
        (multipart("mixed", (PLAIN, "", "hi"), (PLAIN, "Content-Disposition: file", "", "x")),
         ("hi", None, [("text/plain", "", None, b"x")])),
    "a quoted disposition":
        (multipart("mixed", (PLAIN, "", "hi"),
                   (PLAIN, 'Content-Disposition: "attachment"', "", "x")),
         ("hi", None, [("text/plain", "", None, b"x")])),
    "HTML behind its images is a body":
        (multipart("related", IMAGE, (HTML, "", "<p>")),
         (None, "<p>", [("image/png", "", "i@x", b"png")])),
    "a comment behind the boundary":
        (crlf("Content-Type: multipart/mixed; boundary=b (a comment)", "", "--b", "", "hi",
              "--b--"), ("hi", None, [])),
    "a boundary without its semicolon":
        (crlf('Content-Type: multipart/mixed; charset="utf-8" boundary="b"', "", "--b", "", "hi",
              "--b--"), ("hi", None, [])),
    "a boundary after the type alone":
        (crlf("Content-Type: multipart/mixed boundary=b", "", "--b", "", "hi", "--b--"),
         ("hi", None, [])),
    "a quoted type": (crlf('Content-Type: "text/html"; charset=utf-8', "", "<p>"),
                      (None, "<p>\n", [])),
    "blanks at line ends that join lines":
        (crlf(PLAIN + "; format=flowed; delsp=yes", "", "one ", "two", "-- ", "me"),
         ("onetwo\n-- \nme\n", None, [])),
    "a calendar in an alternative is an attachment":
        (multipart("alternative", (PLAIN, "", "hi"), ("Content-Type: text/calendar", "", "BEGIN")),
         ("hi", None, [("text/calendar", "", None, b"BEGIN")])),
    "a signature is an attachment":
        (multipart("signed", (PLAIN, "", "hi"),
                   ("Content-Type: application/pgp-signature", "", "s")),
         ("hi", None, [("application/pgp-signature", "", None, b"s")])),
    "an attached mail is not looked into":
        (multipart("mixed", (PLAIN, "", "hi"),
                   ("Content-Type: message/rfc822", "", "Subject: in", "", "x  ")),
         ("hi", None, [("message/rfc822", "", None, b"Subject: in\r\n\r\nx  ")])),
    "parts of a digest are mails":
        (multipart("digest", ("", "Subject: in", "", "x")),
         (None, None, [("message/rfc822", "", None, b"Subject: in\r\n\r\nx")])),
    "a mail may be an attachment only":
        (crlf("Content-Type: image/png; name=a.png", "", "png"),
         (None, None, [("image/png", "a.png", None, b"png\r\n")])),
    "a type without a subtype is a file":
        (crlf("Content-Type: application-gzip", "", "x"),
         (None, None, [("application-gzip", "", None, b"x\r\n")])),
    "a part without a header is text": (multipart("mixed", ("", "hi")), ("hi", None, [])),
    "preamble and epilogue are no content":
        (crlf("Content-Type: multipart/mixed; boundary=b", "", "pre", "--b", "", "hi", "--b--",
              "epi"),
         ("hi", None, [])),
    "a missing final boundary costs nothing":
        (crlf("Content-Type: multipart/mixed; boundary=b", "", "--b", "", "hi"),
         ("hi\n", None, [])),
    "an inner multipart without its end":
        (crlf("Content-Type: multipart/mixed; boundary=b", "", "--b",
              "Content-Type: multipart/alternative; boundary=c", "", "--c", "", "hi", "--b",
              "Content-Type: image/png", "", "png", "--b--"),
         ("hi", None, [("image/png", "", None, b"png")])),
    "a boundary may begin with another":
        (crlf("Content-Type: multipart/mixed; boundary=b", "", "--b",
              "Content-Type: multipart/alternative; boundary=b-c", "", "--b-c", "", "hi",
              "--b-c--", "--b", "Content-Type: image/png", "", "png", "--b--"),
         ("hi", None, [("image/png", "", None, b"png")])),
    "a boundary may end with hyphens":
        (crlf('Content-Type: multipart/mixed; boundary="b--"', "", "--b--", "", "one", "--b--", "",
              "two", "--b----"), ("one\ntwo", None, [])),
    "a line that only begins like a boundary is content":
        (multipart("mixed", ("", "hi", "--bb", "--")), ("hi\n--bb\n--", None, [])),
    "blanks after a boundary do not matter":
        (crlf("Content-Type: multipart/mixed; boundary=b", "", "--b  ", "", "hi", "--b-- \t"),
         ("hi", None, [])),
    "a boundary cuts a header block short":
        (multipart("mixed", ("X: y",), (PLAIN, "", "hi")), ("\nhi", None, [])),
    "base64":
        (crlf("Content-Transfer-Encoding: BASE64", "", "aGk="), ("hi", None, [])),
    "quoted-printable":
        (crlf("Content-Transfer-Encoding: quoted-printable", "", "h=69=", "x =  ", "=C3=BC"),
         ("hix \u00fc\n", None, [])),
    "uuencode":
        (multipart("mixed", ("Content-Type: image/png",
                             "Content-Transfer-Encoding: x-uuencode", "",
                             "begin 644 a", "#86)C", "`", "end")),
         (None, None, [("image/png", "", None, b"abc")])),
    "an encoding with a comment or a semicolon":
        (crlf("Content-Transfer-Encoding: base64; (x)", "", "aGk="), ("hi", None, [])),
    "an unknown encoding is taken as it is":
        (crlf("Content-Transfer-Encoding: spam", "", "aGk="), ("aGk=\n", None, [])),
    "NUL octets are shown": (crlf("", "a\0b"), ("a\ufffdb\n", None, [])),
    "CR CR LF is one line end":
        (crlf("Content-Transfer-Encoding: quoted-printable", "", "a=0D", "b"),
         ("a\nb\n", None, [])),
}


@message_rows(STRUCTURES)
def test_structure(given, expected):
    mail = read(given)
    attachments = [(attachment.content_type, attachment.file_name, attachment.content_id,
                    attachment.octets)
                   for attachment in mail.attachments]
    assert (mail.text_body.body, mail.html_body.body, attachments) == expected


BASE64 = {
    "padding": (b"YQ==", b"a"),
    "no padding": (b"YWI", b"ab"),
    "one symbol too many": (b"YWJjZ", b"abc"),
    "two files joined": (b"YQ==YmM=ZGVm", b"abcdef"),
    "junk between": (b"Y!W\r\n J\xffj", b"abc"),
    "nothing": (b"", b""),
    "only padding": (b"====", b""),
}


@message_rows(BASE64)
def test_base64(given, expected):
    raw = b"Content-Type: image/png\r\nContent-Transfer-Encoding: base64\r\n\r\n" + given
    attachment, = read(raw).attachments
    assert attachment.octets == expected


CHARSETS = {
    "none, UTF-8": (("", "ü".encode()), "ü"),
    "none, no UTF-8": (("", b"\xfc\x80"), "ü€"),
    "what cp1252 leaves out is a control character": (("windows-1252", b"a\x81"), "a\x81"),
    "ascii that lies": (("us-ascii", "ü".encode()), "ü"),
    "big5 with the euro sign": (("big5", b"\xa3\xe1"), "€"),
    "big5 of Hong Kong": (("big5", "嘅".encode("big5hkscs")), "嘅"),
    "iso-2022-jp with more characters":
        (("iso-2022-jp", b"x\x1b$B-!-j-b|bF|\x1b(B y"), "x①㈱№髙日 y"),
    "iso-2022-jp with half-width kana": (("iso-2022-jp", b"\x1b(I1\x1b$B-!\x1b(B"), "ｱ①"),
    "euc-jp with more characters": (("euc-jp", b"\xad\xa1\xc6\xfc\x8e\xb1x"), "①日ｱx"),
    "euc-jp with rare ones": (("euc-jp", "丂".encode("euc_jp")), "丂"),
    "a damaged euc-jp": (("euc-jp", b"\xc6\xfc\xff"), "日\ufffd"),
    "a charset with a comment": (("iso-8859-2 (Central)", b"\xf8"), "ř"),
    "euc-kr is cp949": (("ks_c_5601-1987", "똠".encode("cp949")), "똠"),
    "cp-850": (("cp-850", "ü".encode("cp850")), "ü"),
    "utf-16": (("utf-16", "ü".encode("utf-16")), "ü"),
    "utf-7": (("utf-7", b"+APw-"), "ü"),
    "utf-7, half a pair": (("utf-7", b"+2AA-"), "\ufffd"),
    "a byte order mark goes": (("utf-8", b"\xef\xbb\xbfx"), "x"),
    "a damaged one": (("utf-8", b"a\xffb"), "a\ufffdb"),
    "an unknown one": (("x-none", "ü".encode()), "ü"),
    "quoted, in capitals, with a blank": (('"UTF-8 "', "ü".encode()), "ü"),
    "one that Python must not look for": (("../../x", b"x"), "x"),
    "one with a NUL": (('"a\0b"', b"x"), "x"),
    **{"no charset: " + name: ((name, b"abc"), "abc") for name in (
        "idna", "punycode", "undefined", "rot13", "hex", "zlib", "bz2", "base64", "uu", "quopri",
        "unicode_escape", "raw_unicode_escape", "mbcs", "oem")},
}


@message_rows(CHARSETS)
def test_charset(given, expected):
    label, octets = given
    head = PLAIN + ("; charset=" + label if label else "")
    assert read(head.encode() + b"\r\n\r\n" + octets).text_body.body == expected


# What a browser makes of some octets, and the labels that this encoding has in WHATWG's Encoding
# standard. Browsers refuse six more: iso-2022-kr, hz-gb-2312 ...
OCTETS = b"\xa4\xbd\xca\xd6\xe6\xff\x81"      # where a row does not begin with others
LABELS = """
д╜╩╓ц\xa0Б: 866 cp866 csibm866 ibm866
\xc3\xbc\xe2\x82\xac=ü€: unicode-1-1-utf-8 unicode11utf8 unicode20utf8 utf-8 utf8
    x-unicode20utf8
¤˝ĘÖć˙\x81: csisolatin2 iso-8859-2 iso-ir-101 iso8859-2 iso88592 iso_8859-2 iso_8859-2:1987
    l2 latin2
¤½ÊÖĉ˙\x81: csisolatin3 iso-8859-3 iso-ir-109 iso8859-3 iso88593 iso_8859-3 iso_8859-3:1988
    l3 latin3
¤ŊĘÖæ˙\x81: csisolatin4 iso-8859-4 iso-ir-110 iso8859-4 iso88594 iso_8859-4 iso_8859-4:1988
    l4 latin4
ЄНЪжцџ\x81: csisolatincyrillic cyrillic iso-8859-5 iso-ir-144 iso8859-5 iso88595 iso_8859-5
    iso_8859-5:1988
¤\ufffd\u062a\u0636\u0646\ufffd\x81: arabic asmo-708 csiso88596e csiso88596i
    csisolatinarabic ecma-114 iso-8859-6 iso-8859-6-e iso-8859-6-i iso-ir-127 iso8859-6 iso88596
    iso_8859-6 iso_8859-6:1987
€½ΚΦζ\ufffd\x81: csisolatingreek ecma-118 elot_928 greek greek8 iso-8859-7 iso-ir-126
    iso8859-7 iso88597 iso_8859-7 iso_8859-7:1987 sun_eu_greek
¤½\ufffd\ufffd\u05d6\ufffd\x81: csiso88598e csisolatinhebrew hebrew iso-8859-8 iso-8859-8-e
    iso-ir-138 iso8859-8 iso88598 iso_8859-8 iso_8859-8:1988 visual
¤½\ufffd\ufffd\u05d6\ufffd\x81: csiso88598i iso-8859-8-i logical
Ī―ĘÖæĸ\x81: csisolatin6 iso-8859-10 iso-ir-157 iso8859-10 iso885910 l6 latin6
¤½ŹÖę’\x81: iso-8859-13 iso8859-13 iso885913
ĊẄÊÖæÿ\x81: iso-8859-14 iso8859-14 iso885914
€œÊÖæÿ\x81: csisolatin9 iso-8859-15 iso8859-15 iso885915 iso_8859-15 l9
€œÊÖæÿ\x81: iso-8859-16
╓╫йжФЪ│: cskoi8r koi koi8 koi8-r koi8_r
єҐйжФЪ│: koi8-ru koi8-u
§Ω\xa0÷ÊˇÅ: csmacintosh mac macintosh x-mac-roman
คฝสึๆ\ufffd\x81: dos-874 iso-8859-11 iso8859-11 iso885911 tis-620 windows-874
¤˝ĘÖć˙\x81: cp1250 windows-1250 x-cp1250
¤ЅКЦжяЃ: cp1251 windows-1251 x-cp1251
¤½ÊÖæÿ\x81: ansi_x3.4-1968 ascii cp1252 cp819 csisolatin1 ibm819 iso-8859-1 iso-ir-100
    iso8859-1 iso88591 iso_8859-1 iso_8859-1:1987 l1 latin1 us-ascii windows-1252 x-cp1252
¤½ΚΦζ\ufffd\x81: cp1253 windows-1253 x-cp1253
¤½ÊÖæÿ\x81: cp1254 csisolatin5 iso-8859-9 iso-ir-148 iso8859-9 iso88599 iso_8859-9
    iso_8859-9:1989 l5 latin5 windows-1254 x-cp1254
₪½\u05ba\u05f2\u05d6\ufffd\x81: cp1255 windows-1255 x-cp1255
¤½\u062a\u0636\u0648\u06d2\u067e: cp1256 windows-1256 x-cp1256
¤½ŹÖę˙\x81: cp1257 windows-1257 x-cp1257
¤½ÊÖæÿ\x81: cp1258 windows-1258 x-cp1258
§љ\xa0÷ж€Б: x-mac-cyrillic x-mac-ukrainian
\xd6\xd0\xe6\x67=中鎔: chinese csgb2312 csiso58gb231280 gb2312 gb_2312 gb_2312-80 gbk
    iso-ir-58 x-gbk
\xd6\xd0\xe6\x67=中鎔: gb18030
\xa4\xa4\xa4\xe5=中文: big5 big5-hkscs cn-big5 csbig5 x-x-big5
\xc6\xfc\xad\xa1=日①: cseucpkdfmtjapanese euc-jp x-euc-jp
\x1b\x24\x42\x46\x7c\x21\x41\x1b\x28\x42=日～: csiso2022jp iso-2022-jp
\x93\xfa\x87\x40\xb1=日①ｱ: csshiftjis ms932 ms_kanji shift-jis shift_jis sjis windows-31j
    x-sjis
\xc7\xd1\x8c\x63=한똠: cseuckr csksc56011987 euc-kr iso-ir-149 korean ks_c_5601-1987
    ks_c_5601-1989 ksc5601 ksc_5601 windows-949
\x00\x61\x65\xe5=a日: unicodefffe utf-16be
\x61\x00\xe5\x65=a日: csunicode iso-10646-ucs-2 ucs-2 unicode unicodefeff utf-16 utf-16le
\uf7a4\uf7bd\uf7ca\uf7d6\uf7e6\uf7ff\uf781: x-user-defined
"""


def test_labels_of_charsets_are_those_of_browsers():
    wrong, count = {}, 0
    for row in LABELS.replace("\n    ", " ").strip("\n").split("\n"):
        sample, _, labels = row.partition(": ")
        octets, _, expected = sample.rpartition("=")
        for label in labels.split():
            text, _ = mailtest.decode_charset(octets.encode("latin-1") or OCTETS, label)
            count += 1
            if text != expected:
                wrong[label] = text
    assert (wrong, count) == ({}, 228 - 6)


def test_charset_of_html_is_in_its_meta_element():
    raw = (HTML + "\r\n\r\n<meta charset=koi8-r>да").encode("koi8-r")
    assert read(raw).html_body.body == "<meta charset=koi8-r>да"


# HTML: ([(href, text)], [(src, alt)])
HTML_LINKS = {
    "a link": ('<a href="http://x/">y</a>', ([("http://x/", "y")], [])),
    "twice is two": ("<a href=x>y</a><a href=x>y</a>", ([("x", "y"), ("x", "y")], [])),
    "single quotes, no quotes, capitals": ("<A HREF='x y'>1</A><a href=z>2</a>",
                                           ([("x y", "1"), ("z", "2")], [])),
    "entities": ('<a href="x?a=1&amp;b=2">&lt;y&gt;</a>', ([("x?a=1&b=2", "<y>")], [])),
    "no entities without their semicolon":
        ('<a href="x?a=1&copy=2&region=3&notit;&amp;lt=4&#38;&lt;">y</a><img src="i?&reg&times">',
         ([("x?a=1&copy=2&region=3&notit;&lt=4&<", "y")], [("i?®×", None)])),
    "text is what is seen": ("<a href=x> a <b>b</b>\n c </a>", ([("x", "a b c")], [])),
    "without scripts": ("<noscript><a href=x>y</a></noscript>", ([("x", "y")], [])),
    "an image has no text": ("<a href=x><img src=i alt=pic></a>", ([("x", None)], [("i", "pic")])),
    "blanks have no text": ("<a href=x> &nbsp; </a>", ([("x", None)], [])),
    "line ends in href": ('<a href=" http://x/\n  y ">z</a>', ([("http://x/  y", "z")], [])),
    "an anchor without href is no link": ("<a name=x>y</a><a href=''>z</a>", ([], [])),
    "> in an attribute": ('<a title="a>b" href=x>y</a>', ([("x", "y")], [])),
    "an anchor ends where the next begins":
        ("<a href=x>1<a href=y>2", ([("x", "1"), ("y", "2")], [])),
    "an area": ("<area href=x alt=y>", ([("x", None)], [])),
    "a comment holds nothing": ("<!-- <a href=x>y</a> --><a href=z>1</a>", ([("z", "1")], [])),
    "what is shown to all but Outlook": ("<!--[if !mso]><!--><a href=x>y</a><!--<![endif]-->",
                                         ([("x", "y")], [])),
    "what is shown to Outlook only": ("<!--[if mso]><a href=x>y</a><![endif]-->", ([], [])),
    "scripts and styles hold nothing":
        ("<style><a href=x></style><script>'<a href=x>'</script><a href=z>1</a>",
         ([("z", "1")], [])),
    "a base is joined": ('<base href="http://x/a/"><a href=b>1</a><img src="/c">',
                         ([("http://x/a/b", "1")], [("http://x/c", None)])),
    "a base changes no cid": ('<base href="http://x/"><img src=cid:i>', ([], [("cid:i", None)])),
    "images, with and without alt": ('<img src=a><img alt="" src=b><img alt=c>',
                                     ([], [("a", None), ("b", "")])),
    "the first of two attributes counts": ("<a href=x href=y>1</a>", ([("x", "1")], [])),
    "what is not closed ends the scan": ('<a href=x>1</a><a href="y>2</a>', ([("x", "1")], [])),
    "half a surrogate pair as an entity": ("<a href=x>&#xD800;</a>", ([("x", "\ufffd")], [])),
    "a number too long for int": ("<a href=x>&#%s;</a>" % ("9" * 5000), ([("x", "\ufffd")], [])),
}


@message_rows(HTML_LINKS)
def test_html_links(given, expected):
    body = read((HTML + "\r\n\r\n" + given).encode()).html_body
    links, images = [tuple(link) for link in body.links], [tuple(image) for image in body.images]
    assert (links, images) == expected


TEXT_LINKS = {
    "a URL": ("see https://x.example/a?b=1#c now", [("https://x.example/a?b=1#c",) * 2]),
    "in <>": ("mailosaur <https://x.example/>", [("https://x.example/",) * 2]),
    "the sentence's full stop is not in it":
        ("go to http://x.example/a.", [("http://x.example/a",) * 2]),
    "brackets around it are not in it": ("(http://x.example/a)", [("http://x.example/a",) * 2]),
    "brackets that pair are in it": ("http://x.example/a_(b)", [("http://x.example/a_(b)",) * 2]),
    "www": ("www.x.example, too", [("http://www.x.example", "www.x.example")]),
    "mailto": ("mailto:a@x.example", [("mailto:a@x.example",) * 2]),
    "twice is two": ("http://a.x http://a.x", [("http://a.x",) * 2] * 2),
    "a word is none": ("invalid awww.x http://", []),
    "a token may end in an underscore": ("http://x.example/a_", [("http://x.example/a_",) * 2]),
    "nor are those of other scripts, nor what is not seen":
        ("http://x.example/a\u060c http://x.example/b\u0964\u200b",
         [("http://x.example/a",) * 2, ("http://x.example/b",) * 2]),
    "it may be set in asterisks": ("*http://x.example/a*", [("http://x.example/a",) * 2]),
}


@message_rows(TEXT_LINKS)
def test_text_links(given, expected):
    links = read(crlf("", given)).text_body.links
    assert [(link.href, link.text) for link in links] == expected


CODES = {
    "before the word": ("482913 is your verification code", ["482913"]),
    "two groups, joined": ("Code: 482 913 or 123-456", ["482913", "123456"]),
    "a no-break space between": ("code 482\u00a0913", ["482913"]),
    "digits one by one": ("Your PIN\n4 8 2 9 1 3", ["482913"]),
    "letters and digits": ("enter G3H1Y2 here", ["G3H1Y2"]),
    "a prefix is not typed in": ("G-482913 is your Google verification code", ["482913"]),
    "six digits that nothing names": ("so 123456 it is", []),
    "in order, each once": ("123456 5H0Y2 123456", ["123456", "5H0Y2"]),
    "alone on its line, in a mail about codes": ("Use this code to go on.\n\n4711\n", ["4711"]),
    "alone on its line, in another mail": ("Sales\n4711\n", []),
    "Japanese": ("認証番号: 4829\n注文番号: 482913", ["4829"]),
    "Korean": ("인증번호 482913\n주문번호 482914", ["482913"]),
    "a German word that ends so": ("Anmeldecode: 4829", ["4829"]),
    "a verb that ends so": ("We decode: 4829", []),
    "an adjective behind the word": ("Mot de passe temporaire : x7k2p9", ["x7k2p9"]),
    "not what merely follows": ("Your code is 482913.\n\nAcme, 1600 Main St", ["482913"]),
    "in brackets, quotes and asterisks":
        ('(code: 9182) code "9183" code *9184*', ["9182", "9183", "9184"]),
    "dates": ("2024-05-17, 17.05.2024, 05/17/2024, 20240517", []),
    "times": ("at 12:30:45 or 1430", []),
    "prices": ("$1234 and EUR 4999 and 4999 EUR and 1234.50 and 123,456.00", []),
    "amounts": ("250000 people, 250 000 users, 100000 kB", []),
    "colours": ("#A1B2C3 #123456", []),
    "URLs and addresses": ("https://x.example/123456?c=G3H1Y2 a123456@x.example", []),
    "telephone numbers": ("+49 30 123456, (030) 123456, 1-800-123456, Tel. 123456, 555-1234", []),
    "order, invoice and customer numbers":
        ("Order 482913, invoice no. 482914, customer number: 482915", []),
    "ZIP codes": ("ZIP code 90210, CA 94043", []),
    "cards": ("The PIN for your card ending in 4711 is 9182", ["9182"]),
    "names that end in digits": ("SHA256, HTTP2, ISO8859", []),
    "words": ("XVLBZGBAIC code VERIFY", []),
    "parts of longer numbers": ("code 12345678901, version 1.2.3456", []),
    "a list of recovery codes": ("Recovery codes:\n\n1. a3f8-91bc\n2. 77de-0f42",
                                 ["a3f8-91bc", "77de-0f42"]),
    "a list in rows": ("Backup codes\n\n55273190 88241067\n30495518 71120946",
                       ["55273190", "88241067", "30495518", "71120946"]),
    "digits of other scripts": ("code: ٥٥٢٧٣١, code: ４８２９", ["552731", "4829"]),
    "six digits alone in a short mail": ("Hello,\n\n482913\n\nAcme", ["482913"]),
    "but not under what may be a title": ("Singapore\n018956", []),
    "nor where an order is spoken of": ("Thank you for your order.\n\n482913", []),
    "codes that are none": ("product code 915732, error code E2207, HS code 610910, "
                            "SWIFT code HAWKGB2L, postal code 10145, dress code 1920", []),
    "the nearest word wins": ("Your login code is 552731. Ticket 915732.", ["552731"]),
    "postal codes": ("London EC4A 1JP\nCork T12 W8KP\nKolkata 700029\n00-838 Warszawa", []),
    "call signs, flights, bookings": ("worked OH2BH, flight LH1234, booking X7K2P9", []),
    "IBAN, VAT, ISBN, CVE": ("IBAN DE89 3704 0044 0532 0130 00, VAT GB123456789, "
                             "ISBN 978-3-16-148410-0, CVE-2024-12345", []),
    "meetings": ("Meeting ID: 823 4567 8901", []),
}


@message_rows(CODES)
def test_codes_in_text(given, expected):
    assert list(read(crlf("", *given.split("\n"))).text_body.codes) == expected


CODE_SHAPES = (       # each alone under "Your code:" and behind "Your code is"
    "4711", "20764", "482913", "5527319", "40197362", "204917638", "2031", "7000", "482000",
    "20261125", "K7Q2XM", "GHTRWZ", "KQTX-BMWP", "DJZ-TLX", "7f3a9c", "fGiy8ZC9", "q7x2m9vk",
    "tt226-5398x", "bkdh-wyqe-rmfx", "sparo-ndigo-amurt-secan", "8F3A-91BD-77C0-2E4D",
    "9K2MX-7QPLD-44TRZ-VB8HN", "8F3A 91BD 77C0 2E4D", "EARTH-9KX2")


@pytest.mark.parametrize("code", CODE_SHAPES)
def test_codes_of_every_shape(code):
    for text in ("Your code:\n\n%s\n\nBye" % code, "Your code is %s." % code):
        assert list(read(crlf("", *text.split("\n"))).text_body.codes) == [code]
    source = "<tr><td>Your code</td><td>%s</td></tr>" % code
    assert list(read(crlf(HTML, "", source)).html_body.codes) == [code]


CODE_LANGUAGES = {     # a sentence with a code, and one with another number
    "ar": ("رمز التحقق الخاص بك هو {}", "رقم الطلب: {}"),
    "bg": ("Вашият код за потвърждение е {}.", "Номер на поръчка: {}"),
    "bn": ("আপনার যাচাইকরণ কোড হল {}", "অর্ডার নম্বর: {}"),
    "cs": ("Váš ověřovací kód je {}.", "Objednávka č. {} byla odeslána."),
    "da": ("Din engangskode er {}", "Sagsnr. {}"),
    "de": ("Ihr Einmalpasswort lautet {}.", "Vertragsnummer {}"),
    "el": ("Ο κωδικός επαλήθευσης είναι {}", "Αριθμός πελάτη {}"),
    "es": ("Tu código de acceso es {}", "Su pedido {} ha sido enviado"),
    "et": ("Teie kinnituskood on {}.", "Tellimuse number: {}"),
    "fa": ("کد تأیید شما: {}", "شماره سفارش: {}"),
    "fi": ("Kertakäyttöinen salasanasi on {}.", "Viitenumero: {}"),
    "fr": ("Votre code de vérification est {}", "Code postal : {}"),
    "he": ("קוד האימות שלך הוא {}", "מספר הזמנה: {}"),
    "hi": ("आपका सत्यापन कोड {} है", "ऑर्डर संख्या: {}"),
    "hu": ("Az ellenőrző kódod: {}", "Rendelésszám: {}"),
    "hy": ("Ձեր հաստատման կոդն է {}", "Պատվերի համարը: {}"),
    "id": ("Kode verifikasi Anda adalah {}.", "Kode pos {}"),
    "it": ("Il tuo codice di verifica è {}.", "Codice cliente: {}"),
    "ja": ("認証番号は{}です。", "商品コード: {}"),
    "ka": ("თქვენი დადასტურების კოდია {}", "შეკვეთის ნომერი: {}"),
    "ko": ("인증번호는 {}입니다.", "주문번호: {}"),
    "lt": ("Jūsų patvirtinimo kodas yra {}.", "Pašto kodas {}"),
    "nl": ("Je verificatiecode is {}.", "Klantnummer: {}"),
    "pl": ("Twój kod weryfikacyjny to {}.", "Kod towaru {}"),
    "pt": ("A sua senha é {}.", "Código de rastreio: {}"),
    "ro": ("Codul tău de verificare este {}.", "Cod poștal {}"),
    "ru": ("Ваш код подтверждения: {}", "Код товара: {}"),
    "sv": ("Din verifieringskod är {}.", "Ärendenummer: {}"),
    "sw": ("Msimbo wako wa uthibitishaji ni {}.", "Nambari ya oda: {}"),
    "ta": ("உங்கள் சரிபார்ப்புக் குறியீடு {}", "ஆர்டர் எண்: {}"),
    "th": ("รหัสยืนยันของคุณคือ {}", "รหัสไปรษณีย์ {}"),
    "tr": ("Doğrulama kodunuz {}", "Posta kodu {}"),
    "uk": ("Ваш код підтвердження: {}", "Поштовий індекс {}"),
    "vi": ("Mã xác minh của bạn là {}.", "Mã đơn hàng: {}"),
    "zh": ("您的验证码是{}，10分钟内有效。", "订单编号 {}"),
}


@pytest.mark.parametrize("language", CODE_LANGUAGES)
def test_codes_of_every_language(language):
    code, other = CODE_LANGUAGES[language]
    text = other.format(551201) + "\n\n" + code.format(5281)
    assert list(read(crlf("", *text.split("\n"))).text_body.codes) == ["5281"]


def test_every_word_of_the_table_is_found():
    lines = [line.partition(": ") for line in
             mailtest._WORDS.replace("\n   ", " ").strip().splitlines()]
    assert [line[0] for line in lines] == sorted(line[0] for line in lines)
    for languages, _, words in lines:
        for word in words.replace("|", " ").split():
            bare = mailtest._in_ascii(word.strip("-.").replace("_", " "))
            assert mailtest._labels(bare), (languages, word)


HTML_CODES = {
    "across elements": ("<p>Your code: <b>482</b> <b>913</b></p>", ["482913"]),
    "a digit in each cell":
        ("<p>Your code</p><tr><td>4</td><td>7</td><td>1</td><td>1</td></tr>", ["4711"]),
    "in its own block": ("<p>Use this code.</p><p>4711</p><p>Bye</p>", ["4711"]),
    "not in style sheets, scripts, comments":
        ("<style>.A1B2C3{color:#123456}</style><script>123456</script><!-- 123456 -->", []),
    "not in attributes": ('<p id=123456><a href="http://x/123456">x</a>', []),
    "not hidden": ('<div style="display: none">code 123456<div>123456</div>123456</div>', []),
    "not hidden otherwise": ('<p hidden>123456</p><p style="max-height:0px">123456</p>', []),
    "in what a template sets to no size":
        ('<td style="font-size:0px"><b style="font-size:13px">123456</b></td>', ["123456"]),
    "not under what says that it is none": ("<p>Order number</p><p>123456</p>", []),
    "a digit in each block": ("<p>Your code</p><p>4</p><p>7</p><p>1</p><p>1</p>", ["4711"]),
    "a digit in each span":
        ("Your code: <b>4</b>&nbsp;<b>7</b>&nbsp;<b>1</b>&nbsp;<b>1</b>", ["4711"]),
    "under the head of its column":
        ("<tr><th>User<th>Code</tr><tr><td>ann<td>482913</tr>", ["482913"]),
    "not beside what says that it is none": ("<tr><td>Customer<td>915732</tr>", []),
    "not a figure of a table":
        ("<tr><td>May<td>915732</tr><tr><td>June<td>882410</tr>", []),
    "after what is hidden": ('<div style="display:none">x</div><p>123456</p>', ["123456"]),
}


@message_rows(HTML_CODES)
def test_codes_in_html(given, expected):
    assert list(read(crlf(HTML, "", given)).html_body.codes) == expected


def test_a_code_that_only_the_subject_has():
    assert list(read(crlf("Subject: 552731 is your code", "", "See above.")).text_body.codes) == [
        "552731"]


def test_the_surest_of_several_codes():
    body = read(crlf("", "Use the code SAVE20 today.", "", "Your PIN is: 4711")).text_body
    assert (body.codes, body.code) == (("SAVE20", "4711"), "4711")


def test_a_long_base_does_not_multiply():
    source = '<base href="http://x/%s/">%s' % ("a" * 8_000, "<a href=y>1</a>" * 5_000)
    body = read(crlf(HTML, "", source)).html_body
    assert len(body.links) == 5_000
    assert sum(len(link.href) for link in body.links) < 2 * len(source) + 200_000


PREVIEWS = {
    "text, on one line": (crlf("", "", " one", "two  three"), "one two three"),
    "of HTML what is seen":
        (crlf(HTML, "", "<style>x</style><p>one</p><p>two</p>"), "one two"),
    "the subject where there is nothing else": (crlf("Subject: hi", "", " "), "hi"),
    "not more than 200 characters": (crlf("", "a" * 300), "a" * 200),
    "invisible padding is skipped": (crlf("", "\u200b\u034f \u200c x\u00ady"), "xy"),
    "nothing": (b"", ""),
}


@message_rows(PREVIEWS)
def test_preview(given, expected):
    assert read(given).preview == expected


FINE = ("From: a@b", "Date: Fri, 17 May 2024 10:00:00 +0000", "Message-ID: <1@b>",
        "MIME-Version: 1.0")
LATER = "8-bit octets, but BODY=8BITMIME was not announced"
MIXED = FINE + ("Content-Type: multipart/mixed; boundary=b", "", "--b")
WARNINGS = {
    "nothing": (crlf(*FINE, "", "x"), []),
    "an empty mail": (b"", ["no From field", "no Date field", "no Message-ID field"]),
    "fields twice": (crlf(*FINE, "From: c@d", "Subject: x", "Subject: y", "", "x"),
                     ["2 From fields: one is allowed", "2 Subject fields: one is allowed"]),
    "no date": (crlf(FINE[0], "Date: x", *FINE[2:], "", "x"), ["Date field that is no date"]),
    "no address": (crlf("From: <>", *FINE[1:], "", "x"), ["From field without an address"]),
    "junk": (crlf(*FINE, "junk", "", "x"), ["header line that is no field: 'junk'"]),
    "8-bit header": (crlf(*FINE, "Subject: ü", "", "x"), [
        "raw 8-bit octets in the header block: only SMTPUTF8 mail may have them", LATER]),
    "8-bit body": (crlf(*FINE, EIGHT_BIT, PLAIN + "; charset=utf-8", "", "ü"), [LATER]),
    "8-bit body that says 7bit": (crlf(*FINE, PLAIN + "; charset=utf-8", "", "ü"), [
        LATER, "text/plain part is 8-bit, but its Content-Transfer-Encoding says 7bit"]),
    "8-bit body without a charset": (crlf(*FINE, EIGHT_BIT, "", "ü"), [
        LATER, "text/plain part has 8-bit text without a charset"]),
    "encoded text without a charset": (
        crlf(*FINE, "Content-Transfer-Encoding: base64", "", "w7w="),
        ["text/plain part has 8-bit text without a charset"]),
    "8-bit quoted-printable": (
        crlf(*FINE, PLAIN + "; charset=utf-8", "Content-Transfer-Encoding: quoted-printable", "",
             "ü"),
        [LATER, "text/plain part is broken quoted-printable (8-bit octets in it)"]),
    "Bcc": (crlf(*FINE, "Bcc: c@d", "", "x"), ["Bcc field: every recipient can read it"]),
    "no MIME-Version": (crlf(*FINE[:3], PLAIN, "", "x"), ["Content-Type without MIME-Version"]),
    "no Message-ID": (crlf(*FINE[:2], "Message-ID: 17", FINE[3], "", "x"),
                      ["Message-ID '17' is none: expected <unique@domain>"]),
    "a line break in the subject": (
        crlf(*FINE, "Subject: hi", "", "To: you@b", "Content-Type: text/html", "", "x"),
        ["the body begins with header fields: an empty line ended the header early"]),
    "NUL": (crlf(*FINE, "", "a\0b"), ["text/plain part has NUL octets"]),
    "a mail in a mail": (
        crlf(*FINE, "Content-Type: message/rfc822", "", "Bcc: a@b", "", "x"), []),
    "a quoted mail": (crlf(*FINE, "", "From: a@b", "To: c@d", "Subject: x", "", "hi"), []),
    "lost quotes": (crlf(*FINE, "To: Dr. X, Head of Y <a@b>", "", "x"), [
        "To names 'Dr. X' without an address: a name with a comma needs quotes"]),
    "no address at all": (crlf(*FINE, "Cc: Doe, John <a@b>", "", "x"), [
        "Cc names 'Doe' without an address: a name with a comma needs quotes"]),
    "bare LF": (crlf(*FINE, "", "x\ny"), ["bare LF: a line that does not end in CRLF"]),
    "bare CR": (crlf(*FINE, "", "x\ry"), ["bare CR: a CR without LF"]),
    "998 octets": (crlf(*FINE, "", "x" * 998), []),
    "999 octets": (crlf(*FINE, "", "x" * 999), ["line over 998 octets (RFC 5322 2.1.1)"]),
    "HTML only": (crlf(*FINE, HTML, "", "x"), ["HTML without a text alternative"]),
    "no boundary": (crlf(*FINE, "Content-Type: multipart/mixed", "", "x"),
                    ["multipart/mixed without a boundary: its parts were not read"]),
    "no final boundary": (crlf(*MIXED, "", "x"), ["multipart without its final boundary"]),
    "no type": (crlf(*FINE, "Content-Type: ;", "", "x"), ["Content-Type '' is no type/subtype"]),
    "unknown charset": (crlf(*FINE, PLAIN + "; charset=x-y", "", "x"),
                        ["text/plain part names the unknown charset 'x-y'"]),
    "a charset that lies": (crlf(*FINE, PLAIN + "; charset=utf-8",
                                 "Content-Transfer-Encoding: quoted-printable", "", "=FF"),
                            ["text/plain part says charset utf-8 but is not valid in it"]),
    "broken base64": (crlf(*FINE, "Content-Type: image/x; name=a",
                           "Content-Transfer-Encoding: base64", "", "YWJ!"),
                      ["attachment a: broken base64 (other characters in it)"]),
    "cut base64": (crlf(*FINE, "Content-Transfer-Encoding: base64", "", "YWJ"),
                   ["text/plain part is broken base64 (cut off)"]),
    "broken quoted-printable":
        (crlf(*FINE, "Content-Transfer-Encoding: quoted-printable", "", "=x"),
                                ["text/plain part is broken quoted-printable"]),
    "unknown encoding": (crlf(*FINE, "Content-Transfer-Encoding: spam", "", "x"),
                         ["unknown Content-Transfer-Encoding 'spam': taken as it is"]),
}


@message_rows(WARNINGS)
def test_warnings(given, expected):
    assert list(read(given, eight_bit=False).warnings) == expected


@message_rows({
    "UTF-8 in the header": (crlf(*FINE, "Subject: ü", "", "x"), []),
    "latin-1 in the header": (crlf(*FINE, b"Subject: \xfc", "", "x"), [
        "raw 8-bit octets in the header block that are no UTF-8"]),
    "UTF-8 in the body": (crlf(*FINE, EIGHT_BIT, PLAIN + "; charset=utf-8", "", "ü"), [LATER]),
})
def test_warnings_of_smtputf8_mail(given, expected):
    assert list(read(given, eight_bit=False, utf8=True).warnings) == expected


def nested(depth):
    return b"".join(b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (n, n)
                    for n in range(depth)) + b"\r\nx"


# mail: the warning
BOUNDED = {
    "multiparts in multiparts":
        (nested(3000), "multipart/mixed nested over 200 deep: its parts were not read"),
    "parts": (b"Content-Type: multipart/mixed; boundary=a\r\n\r\n" + b"--a\r\n\r\n" * 5000,
              "more than 1000 parts: the rest was not read"),
    "fields": (b"X: y\r\n" * 5000, "more than 2000 header fields: the rest was not read"),
    "a field": (b"X: " + b"y" * 300000 + b"\r\n",
                "more than 262144 characters in header field X: the rest was not read"),
    "a header block": (b"X: " + b"y" * 1100000 + b"\r\n",
                       "more than 1000000 octets in a header block: the rest was not read"),
    "addresses": (b"To: a@b" + b",a@b" * 20000 + b"\r\n\r\n",
                  "more than 10000 addresses in To: the rest was not read"),
    "parameters": (b"Content-Type: text/plain" + b";a=b" * 5000 + b"\r\n\r\n",
                   "more than 500 parameters in a header field: the rest was not read"),
    "links": (b"Content-Type: text/html\r\n\r\n" + b"<a href=x>" * 6000,
              "more than 5000 links or images: the rest of them is not listed"),
    "HTML": (b"Content-Type: text/html\r\n\r\n" + b"<" * 1100000,
             "HTML over 1000000 characters: links and images after that are not listed"),
}


@message_rows(BOUNDED)
def test_bound_is_told(given, expected):
    assert expected in read(given).warnings


PARTS = b"Content-Type: multipart/mixed; boundary=a\r\n\r\n"
NEC = b"Content-Type: text/plain; charset=iso-2022-jp\r\n\r\n\x1b$B"
HOSTILE_MAIL = {
    "blanks that no line end follows": b"Subject: x" + b" " * 190000 + b"y",
    "words and an emoji": "To: \U0001f600".encode() + b"a " * 90000,
    "empty comments": b"To: " + b"()" * 90000, "routes": b"To: " + b"<@;;;" * 40000,
    "escaped quotes in <>": b"To: " + b'<\\"' * 60000, "groups": b"To: " + b"a @:" * 45000,
    "many addresses": b"To: " + b"a," * 90000,
    "encoded addresses": b"To: " + b"=?a?q?a@b?=," * 15000,
    "encoded words of two charsets": b"X: " + b"=?utf-8?q?a?= =?koi8-r?q?a?=" * 6000,
    "control characters": b"To: " + b"\x01" * 190000, "junk lines": b"a\r\n" * 60000,
    "base64 runs in each part": PARTS + (
        b"--a\r\nContent-Transfer-Encoding: base64\r\n\r\n" + b"A=" * 70 + b"\r\n") * 1000,
    "dashes": PARTS + b"--\r\n" * 45000, "empty parts": PARTS + b"--a\r\n" * 36000,
    "characters of NEC": NEC + b"-!" * 90000, "escape sequences": NEC + b"\x1b$B-!\x1b(B" * 22000,
    "lines of uuencode": b"Content-Transfer-Encoding: uuencode\r\n\r\n" + b"!\n" * 90000,
    "quotes": b"To: " + b'"' * 190000, "commas": b"To: " + b"," * 190000,
    "comments": b"To: " + b"(" * 190000, "words": b"To: " + b"a " * 90000,
    "open words": b"Subject: " + b"=?a?q?" * 30000, "markers": b"Subject: " + b"=?" * 90000,
    "blanks before a folded line": b"Subject: x" + b" " * 60000 + b"y\r\n z",
    "sections": b"Content-Disposition: x" + b"".join(b";filename*%d=a" % n for n in range(9000)),
    "escapes": b"Content-Type: text/plain" + b';a="\\' * 40000,
    "a long base": b"Content-Type: text/html\r\n\r\n<base href=http://" + b"x" * 50000 + b"/>"
                   + b"<a href=y>" * 5000,
    "control characters in links": b"Content-Type: text/html\r\n\r\n" + (
        b"<a href='" + b"\x01" * 6000 + b"'>" + b"\x01" * 6000 + b"</a>") * 15,
    "open tags": b"Content-Type: text/html\r\n\r\n" + b"<a " * 60000,
    "open quotes": b"Content-Type: text/html\r\n\r\n" + b'<a href="' * 20000,
    "open comments": b"Content-Type: text/html\r\n\r\n" + b"<!--" * 45000,
    "ampersands": b"Content-Type: text/html\r\n\r\n" + b"&#" * 90000,
    "open brackets": b"\r\n\r\nhttp://x/" + b"(" * 180000,
    "closed brackets": b"\r\n\r\nhttp://x/" + b")" * 180000,
    "equals signs": b"Content-Transfer-Encoding: quoted-printable\r\n\r\n" + b"=" * 180000,
    "padding": b"Content-Transfer-Encoding: base64\r\n\r\n" + b"A=" * 90000,
    **{"codes in %r" % piece: b"Subject: code\r\n\r\n" + piece.encode() * (100000 // len(piece))
       for piece in (":.1234", " 1\u00a0", "K\u7801code4829\n", "code 1234\t", "K7Q2 ", "1 A\n")},
    "carriage returns": b"\r" * 180000 + b"\n", "NULs": b"\0" * 180000, "0xFF": b"\xff" * 180000,
}


@pytest.mark.parametrize("raw", list(HOSTILE_MAIL.values()), ids=list(HOSTILE_MAIL))
def test_hostile_mail_is_read_in_linear_time_to_valid_and_bounded_text(raw):
    began = time.process_time()
    mail = read(raw)
    assert time.process_time() - began < 1           # 0.2 s is usual for 200 kB
    text = json.dumps([mail.headers, mail.from_, mail.to, mail.html_body, mail.text_body,
                       mail.preview, mail.warnings], ensure_ascii=False)
    assert len(text.encode("utf-8")) < 10 * len(raw) + 1_000_000


# ---- Search ----------------------------------------------------------------

SEARCHED = (b"From: Ann Sender <Ann@Sender.example>\r\nTo: Bob <bob@mailtest.example>\r\n"
            b"Cc: carl@cc.example\r\nSubject: Your Code is 482913\r\n"
            b"Content-Type: text/plain; charset=utf-8\r\n\r\n"
            b"Hello Stra\xc3\x9fe, see https://x.example/one, the code is 482913\r\n")

# the arguments of criteria(), whether they match
CRITERIA = {
    "no condition matches": ({}, True),
    "no condition matches, any of none": ({"any_of": True}, True),
    "part of the subject": ({"subject": "code IS"}, True),
    "not in the subject": ({"subject": "invoice"}, False),
    "sender's full address in any case": ({"sender": "ann@SENDER.example"}, True),
    "part of the sender's address is not enough": ({"sender": "ann@"}, False),
    "To": ({"to": "bob@mailtest.example"}, True),
    "Cc": ({"to": "carl@cc.example"}, True),
    "envelope recipient that no field names": ({"to": "hidden@bcc.example"}, True),
    "part of a recipient is not enough": ({"to": "bob"}, False),
    "the sender's name is not enough": ({"sender": "ann sender"}, False),
    "part of a header field": ({"header": "content-type: TEXT/"}, True),
    "not in the header": ({"header": "x-mailer"}, False),
    "part of the body": ({"body": "HELLO stra"}, True),
    "not in the body": ({"body": "goodbye"}, False),
    "a subject with an @ is no address": ({"subject": "\u00fc @ \u00fc"}, False),
    "all: one of two fails": ({"subject": "code", "body": "goodbye"}, False),
    "any: one of two holds": ({"subject": "code", "body": "goodbye", "any_of": True}, True),
    "any: none holds": ({"subject": "no", "body": "goodbye", "any_of": True}, False),
}


@pytest.mark.parametrize("arguments, expected", rows(CRITERIA))
def test_criteria(arguments, expected):
    message = letter("bob@mailtest.example", "hidden@bcc.example", octets=SEARCHED)
    assert mailtest.criteria(**arguments).match(message) is expected


# what is typed into the search box, whether it matches
WORDS = {
    "nothing matches everything": ("", True),
    "a word of the subject": ("code", True),
    "a word of the body": ("hello", True),
    "a display name": ("ann", True),
    "a recipient of the envelope": ("hidden@", True),
    "a word that is nowhere": ("nowhere", False),
    "each word must be somewhere": ("code nowhere", False),
    "two words in quotes are one": ('"code is"', True),
    "two words in quotes in the wrong order": ('"is code"', False),
    "minus means not": ("-nowhere", True),
    "minus on a word that is there": ("-hello", False),
    "from: takes a part": ("from:sender", True),
    "from: takes a part of the name": ('from:"ann s"', True),
    "from: does not look at recipients": ("from:bob", False),
    "to: takes a part": ("to:bob@", True),
    "to: takes a part of the name": ("to:bo", True),
    "to: does not look at senders": ("to:ann", False),
    "cc:": ("cc:carl", True),
    "cc: does not look at To": ("cc:bob", False),
    "bcc: takes whom no field names": ("bcc:hidden", True),
    "bcc: does not look at Cc": ("bcc:carl", False),
    "has:links": ("has:links", True),
    "header: takes a name": ("header:content-type", True),
    "header: takes name and value": ('header:"cc: carl"', True),
    "header: does not look at bodies": ("header:hello", False),
    "file:": ("file:a.pdf", False),
    "id: takes the whole id": ("id:THE-ID", True),
    "id: takes no part of it": ("id:the", False),
    "user: takes a part": ("user:proj", True),
    "user: does not look at addresses": ("user:bob", False),
    "subject:": ('subject:"your code"', True),
    "subject: does not look at bodies": ("subject:hello", False),
    "body:": ("body:hello", True),
    "body: does not look at subjects": ("body:your", False),
    "fields in capitals": ("FROM:ANN", True),
    "has:link": ("has:link", True),
    "has:code": ("has:code", True),
    "has:text": ("has:text", True),
    "has:html": ("has:html", False),
    "has:attachment": ("has:attachment", False),
    "-has:attachments": ("-has:attachments", True),
    "has:warning for a mail without Date": ("has:warning", True),
    "a URL is free text": ("https://x.example/one", True),
    "another URL is free text": ("http://y.example/", False),
    "an address as a URL is free text": ("mailto:bob@mailtest.example", False),
    "a time is free text": ("10:30", False),
    "what ends with a colon is free text": ("re: hello", False),
    "a word with a colon in quotes is free text": ('"subject:hello"', False),
    "a lone minus is a word": ("-", False),
}


@pytest.mark.parametrize("query, expected", rows(WORDS))
def test_words_of_the_search_box(query, expected):
    envelope = mailtest.Envelope("", ("bob@mailtest.example", "hidden@bcc.example"),
                                 user="project-a")
    message = mailtest.Message("the-id", SEARCHED, envelope)
    assert mailtest.words(query).match(message) is expected


@pytest.mark.parametrize("query, known", rows({
    "an unknown word": (
        "colour:red", "bcc: body: cc: file: from: has: header: id: subject: to: user:"),
    "an unknown thing to have": (
        "has:money",
        "has:attachment has:code has:html has:image has:link has:text has:warning"),
}))
def test_search_refuses_and_lists_what_there_is(query, known):
    with pytest.raises(ValueError) as refused:
        mailtest.words(query)
    assert known in str(refused.value)


def test_a_search_for_nothing_reads_nothing(monkeypatch):
    message = mailtest.Message("the-id", SEARCHED, mailtest.Envelope("", ("bob@x.example",)))
    monkeypatch.setattr(mailtest.Message, "header", None)       # would fail if it were called
    assert mailtest.words("").match(message)


def test_page_and_readme_tell_of_each_word():
    page = b"".join(octets for _, octets in mailtest.PAGE_FILES.values()).decode()
    readme = pathlib.Path(mailtest.__file__).with_name("README.md").read_text(encoding="utf-8")
    for text in (page, readme):
        assert [word for word in mailtest.WORDS if f"{word}:" not in text] == []


def test_words_look_at_header_fields_before_bodies():
    fields = [field for field, _, _ in mailtest.words(
        "free body:b has:link from:f subject:s").terms]
    assert fields == ["subject", "from", "body", "has", ""]


# ---- Store -----------------------------------------------------------------
# Stories, played through what the store offers; the clock is a fake.

def listed(store, where, after=0):
    """The messages of a place: an address, or a server's id behind "/"."""
    return store.messages(**at(where), after=after)


def why_unknown(action, *arguments):
    """The text of the Unknown that this raises."""
    with pytest.raises(mailtest.Unknown) as unknown:
        action(*arguments)
    return str(unknown.value)


def test_acquired_addresses_are_unguessable_and_never_the_same(monkeypatch):
    _, store = store_on_clock(domain="s1.mail.example")
    names = [re.fullmatch(r"test-([a-z2-9]{13})@s1\.mail\.example", store.acquire().address)[1]
             for _ in range(200)]
    assert len(set(names)) == 200
    assert all(len({name[place] for name in names}) > 20 for place in range(13))
    drawn = iter("a" * 13 + "a" * 13 + "b" * 13)
    monkeypatch.setattr(secrets, "choice", lambda letters: next(drawn))
    assert [store.acquire().address[5] for _ in range(2)] == ["a", "b"]    # a taken one is not


def test_acquired_inbox_ends_ten_minutes_after_acquiring_whatever_it_gets():
    clock, store = store_on_clock()
    inbox = store.acquire()
    address = inbox.address
    assert inbox == mailtest.InboxView(address, True, clock.now + 600, 0, 0, (), latest=1)
    clock.now += 599.0
    delivered(store, address)
    view = store.inbox(address.upper())
    assert (view.count, view.unseen, view.latest, view.expires) == (1, 1, 2, inbox.expires)
    clock.now += 1.0
    ended = (f"the inbox {address!r} expired at 1970-01-01T00:26:40.000000+00:00; "
             "acquire a new one")
    assert why_unknown(store.inbox, address) == why_unknown(store.messages, address) == ended
    assert store.counters()["messages"] == 0


def test_inbox_that_came_with_a_mail_lives_after_its_latest_and_opens_again():
    clock, store = store_on_clock()
    delivered(store, "app@user.example")
    for _ in range(3):
        clock.now += 599.0
        delivered(store, "App@USER.example")
    assert store.inbox("app@user.example")[:4] == ("app@user.example", False, clock.now + 600, 4)
    clock.now += 600.0
    assert "expired at" in why_unknown(store.inbox, "app@user.example")
    assert listed(store, "app@user.example") == []
    new = delivered(store, "app@user.example")
    assert listed(store, "app@user.example") == [new]


def test_unknown_says_what_is_known():
    clock, store = store_on_clock()
    never = "no inbox 'a@x.example'; acquire one, or send mail to it first"
    assert why_unknown(store.inbox, "a@x.example") == never
    assert why_unknown(store.drop_inbox, "a@x.example") == never
    assert why_unknown(store.empty_inbox, "a@x.example") == never
    delivered(store, "a@x.example")
    store.drop_inbox("A@x.example")
    clock.now += 5
    assert why_unknown(store.inbox, "a@x.example") == (
        "the inbox 'a@x.example' was deleted at 1970-01-01T00:16:40.000000+00:00; "
        "the next mail to it opens it again")
    for action in (store.message, store.delete, store.see):
        assert why_unknown(action, "5d0f") == (
            "no message has the id '5d0f'; it may be deleted or expired")
    assert why_unknown(store.drop_device, "5d0f") == "no device has the id '5d0f'"


def test_latest_ends_of_inboxes_are_remembered_up_to_the_bound():
    _, store = store_on_clock(expired_kept=2)
    for name in "abac":
        delivered(store, f"{name}@x.example")
        store.drop_inbox(f"{name}@x.example")
    assert [why_unknown(store.inbox, f"{name}@x.example").split()[0] for name in "abc"] == [
        "the", "no", "the"]


# recipient ("test" stands for the local-part acquired), whether the acquired inbox takes it
TAGS = {
    "the address itself": ("test@mailtest.example", True),
    "a tag": ("test+shop@mailtest.example", True),
    "a tag in capitals": ("TEST+SHOP@Mailtest.EXAMPLE", True),
    "two tags": ("test+a+b@mailtest.example", True),
    "an empty tag": ("test+@mailtest.example", True),
    "another local-part": ("other+test@mailtest.example", False),
    "another domain": ("test+shop@other.example", False),
    "a quoted local-part": ('"test+shop"@mailtest.example', False),
}


@pytest.mark.parametrize("path, lands", rows(TAGS))
def test_tagged_recipient_lands_in_the_acquired_inbox(path, lands):
    _, store = store_on_clock()
    address = store.acquire().address
    local = address.partition("@")[0]
    path = re.sub('(?<![a-z])test(?=[@+])', local, re.sub("^TEST", local.upper(), path))
    message = delivered(store, path)
    assert message.envelope.forward_paths == (path,)
    assert [store.inbox(address).count, listed(store, path)] == [int(lands), [message]]


def test_message_lives_while_one_inbox_holds_it():
    clock, store = store_on_clock()
    address = store.acquire().address
    clock.now += 300.0
    message = delivered(store, address, "b@x.example", address.upper())
    assert list(message.inboxes) == [address, "b@x.example"]
    clock.now += 300.0                   # the acquired one ends
    assert store.message(message.id.upper()) is message
    assert list(message.inboxes) == ["b@x.example"]
    store.drop_inbox("b@x.example")
    assert why_unknown(store.message, message.id)
    assert store.counters()["octets"] == 0


def test_deleted_message_leaves_every_inbox():
    _, store = store_on_clock()
    gone, stays = delivered(store, "a@x.example", "b@x.example"), delivered(store, "a@x.example")
    store.delete(gone.id.upper())
    assert listed(store, "a@x.example") == listed(store, "/x") == listed(store, "/mailtest") == [
        stays]
    assert listed(store, "b@x.example") == []


def test_emptied_inbox_stays_and_its_mail_lives_elsewhere():
    clock, store = store_on_clock()
    address = store.acquire().address
    alone, both = delivered(store, address), delivered(store, address, "b@x.example")
    store.empty_inbox(address.upper())
    assert listed(store, address) == [] and listed(store, "/mailtest") == [both]
    assert store.inbox(address).expires == clock.now + 600
    assert store.events(4, 0.0)[0] == []
    assert store.events(3, 0.0)[0] == [mailtest.Event(4, "emptied", {"address": address})]
    assert why_unknown(store.message, alone.id) and list(both.inboxes) == ["b@x.example"]
    new = delivered(store, address)
    assert listed(store, address) == [new]


def test_messages_have_growing_times_unless_the_clock_is_set_back():
    clock, store = store_on_clock()
    times = [delivered(store, "a@x.example").received for _ in range(3)]
    clock.now -= 0.5                     # as clocks do that are kept right
    times.append(delivered(store, "a@x.example").received)
    assert times == sorted(set(times)) and times[-1] - times[0] < 0.001
    clock.now -= 3_600
    assert delivered(store, "a@x.example").received == clock.now     # and not in the future


def test_marks_of_what_was_seen():
    _, store = store_on_clock()
    first, second = delivered(store, "a@x.example"), delivered(store, "a@x.example")
    store.see(first.id)
    store.see(first.id)
    assert (first.seen, second.seen) == (True, False)
    assert store.inbox("a@x.example").unseen == store.counters()["unseen"] == 1
    store.see(first.id, False)
    assert store.events(2, 0.0)[0] == [mailtest.Event(3, "seen", {"id": first.id, "seen": True}),
                                       mailtest.Event(4, "seen", {"id": first.id, "seen": False})]


def test_newest_mails_are_kept_and_older_ones_end():
    _, store = store_on_clock(keep=2)
    sent = [delivered(store, "a@x.example", f"b{number}@x.example") for number in range(4)]
    assert listed(store, "/mailtest") == listed(store, "a@x.example") == sent[:1:-1]
    assert store.events(5, 0.0)[0][0] == mailtest.Event(
        6, "deleted", {"id": sent[1].id, "inboxes": ("a@x.example", "b1@x.example")})


# -- memory

def _drop_inboxes(store, clock, messages):
    for view in store.inboxes():
        store.drop_inbox(view.address)


def _expire(store, clock, messages):
    clock.now += 600.0


ENDS = {
    "messages one by one": lambda store, clock, messages: [
        store.delete(message.id) for message in messages],
    "all at once": lambda store, clock, messages: store.empty("mailtest"),
    "server by server": lambda store, clock, messages: [
        store.empty(server) for server in store.servers()],
    "inbox by inbox": lambda store, clock, messages: [
        store.empty_inbox(view.address) for view in store.inboxes()],
    "inboxes with their mail": _drop_inboxes,
    "by expiry": _expire,
}


@pytest.mark.parametrize("end", rows(ENDS))
def test_memory_returns_to_zero_when_everything_has_ended(end):
    clock, store = store_on_clock()
    address = store.acquire().address
    messages = [delivered(store, address, f"u{i}@s{i % 3}.example", octets=b"x" * i)
                for i in range(20)]
    messages.append(delivered(store, "a@x.example", direction="Sent", server="abcd1234"))
    store.keep(messages[0], b"json")
    store.keep(messages[0], b"more json")
    end(store, clock, messages)
    store.keep(messages[0], b"made while it ended")
    assert store.counters()["messages"] <= 1         # the outbox's, which is no inbox
    _drop_inboxes(store, clock, messages)
    _expire(store, clock, messages)
    counters = store.counters()
    assert (counters["octets"], counters["messages"], counters["inboxes"]) == (0, 0, 0)
    assert store.servers() == {"mailtest": "Every message"}
    assert store._of_client == {} == store._inboxes


def test_memory_counts_what_messages_inboxes_and_places_cost():
    _, store = store_on_clock(message_cost=100, inbox_cost=10, place_cost=1)
    message = mailtest.Message(mailtest.new_id(), b"x" * 1000,
                               mailtest.Envelope("", ("a@x.example", "b@x.example")),
                               session=(b"C: EHLO x\r\n", b"S: 250\r\n"))
    store.deliver(message)
    own = 1000 + 11 + 8 + 2 * 11 + 100 + 2 * 1
    assert store.counters()["octets"] == own + 2 * (10 + 4 * 11)
    store.keep(message, b"12345")
    store.keep(message, b"1234567")
    assert store.counters()["octets"] == own + 2 * (10 + 4 * 11) + 7


def test_ends_of_large_inboxes_hold_the_lock_for_moments_only():
    clock, store = store_on_clock()
    paths = [f"u{number}@x.example" for number in range(1_000)]
    for _ in range(20):
        delivered(store, *paths)
    steps = []
    unhold = store._unhold

    def counted(*arguments):
        steps[-1] += 1
        unhold(*arguments)
    store._unhold = counted
    clock.now += 600.0
    while not steps or steps[-1]:
        steps.append(0)
        store.counters()
    assert sum(steps) == 20_000 and max(steps) <= 2_000
    assert store.counters()["octets"] == 0


def test_inbox_that_is_due_is_gone_before_its_turn_to_end():
    clock, store = store_on_clock()
    for number in range(2_000):
        delivered(store, f"u{number}@x.example")
    clock.now += 600.0
    assert "expired at" in why_unknown(store.inbox, "u1999@x.example")
    assert store.inboxes() == []


# what fills a store of small limits: its text
FULL = {
    "octets": (lambda store: delivered(store, "a@x.example", octets=b"x" * 10_000),
               "the 5000 octets of --max-memory are in use"),
    "octets that are arriving": (lambda store: store.reserve(5_001),
                                 "the 5000 octets of --max-memory are in use"),
    "no memory for an inbox": (lambda store: (store.reserve(5_000), store.acquire()),
                               "the 5000 octets of --max-memory are in use"),
    "mail beside octets that are arriving": (
        lambda store: (store.reserve(4_999), delivered(store, "a@x.example")),
        "the 5000 octets of --max-memory are in use"),
    "inboxes": (lambda store: [delivered(store, f"{name}@x.example") for name in "abcd"],
                "3 inboxes are open"),
    "inboxes of one mail": (lambda store: delivered(store, "a@x", "b@x", "c@x", "d@x"),
                            "3 inboxes are open"),
    "acquired inboxes": (lambda store: [store.acquire() for _ in range(4)], "3 inboxes are open"),
    "servers": (lambda store: [store.name_server(name, "n") for name in "abc"],
                "2 servers exist"),
    "devices": (lambda store: [store.add_device(name, "S") for name in "abc"],
                "2 devices exist"),
    "waiters": (lambda store: store.messages("a@x.example", timeout=60),
                "0 requests are waiting for mail"),
    "watches": (lambda store: [store.watch(f"{name}@x", 60) for name in "aab"],
                "1 watches are set"),
    "messages of an inbox": (lambda store: [delivered(store, "a@x") for _ in range(4)],
                             "the inbox 'a@x' is full; delete mail of it"),
    "octets of an inbox": (lambda store: delivered(store, "a@x", octets=b"x" * 3_000)
                           and delivered(store, "a@x"),
                           "the inbox 'a@x' is full; delete mail of it"),
    "octets of a client": (lambda store: [delivered(store, f"{name}@x", octets=b"x" * 1_500,
                                                    client="192.0.2.1") for name in "abc"],
                           "the client has 4000 octets of mail here; some must end"),
}


@pytest.mark.parametrize("action, text", rows(FULL))
def test_full_at_each_bound(action, text):
    _, store = store_on_clock(max_memory=5_000, inboxes=3, servers=2, devices=2, waiters=0,
                              message_cost=10, inbox_cost=10, place_cost=1, watches=1,
                              inbox_messages=3, inbox_octets=3_040, client_octets=4_000)
    with pytest.raises(mailtest.Full) as full:
        action(store)
    assert str(full.value) == text


def test_refused_mail_leaves_no_trace():
    _, store = store_on_clock(inboxes=2)
    kept = delivered(store, "a@x.example")
    before = store.counters()
    with pytest.raises(mailtest.Full):
        delivered(store, "a@x.example", "b@x.example", "c@x.example")
    assert store.counters() == before
    assert listed(store, "/mailtest") == [kept]
    address = store.acquire().address            # the second
    assert delivered(store, address)             # opens none


def test_bound_of_memory_is_met_exactly_and_released_octets_make_room():
    clock, store = store_on_clock(max_memory=1_011, message_cost=0, inbox_cost=-44, place_cost=0)
    delivered(store, "a@x.example", octets=b"x" * 1_000)
    with pytest.raises(mailtest.Full):
        store.reserve(1)
    clock.now += 600.0                   # expiry needs no request
    store.reserve(1_011)
    assert store.counters()["octets"] == 1_011
    store.release(1_000)
    store.reserve(1_000)


def test_expiry_is_said_alike_whenever_it_is_asked_for_and_follows_a_clock_that_is_set():
    ticks = itertools.count(1000.0, 0.000_1)         # time passes between two looks at it
    store = mailtest.Store(clock=lambda: next(ticks), wall=lambda: next(ticks) + 1e9)
    address = store.acquire().address
    assert len({store.inbox(address).expires for _ in range(40)}) == 1
    wall = FakeClock()
    store = mailtest.Store(clock=FakeClock(), wall=wall)
    address = store.acquire().address
    wall.now += 3_600
    assert store.inbox(address).expires == wall.now + 600


# -- servers, lists, directions

SERVERS_OF = {
    "first label and whole domain": ("a@abcd1234.mailosaur.net",
                                     ("abcd1234", "abcd1234.mailosaur.net")),
    "a domain of one label": ("a@localhost", ("localhost",)),
    "an address literal": ("a@[127.0.0.1]", ("[127.0.0.1]",)),
    "postmaster has none": ("postmaster", ()),
    "a telephone has none": ("+4915112345", ()),
    "a quoted at sign": ('"a@b"@c.example', ("c", "c.example")),
}


@pytest.mark.parametrize("key, ids", rows(SERVERS_OF))
def test_servers_of_an_address(key, ids):
    assert mailtest.servers_of(key) == ids


def test_server_lists_its_messages_newest_first():
    _, store = store_on_clock()
    first = delivered(store, "a@abcd1234.example")
    second = delivered(store, "b@ABCD1234.example", "c@other.example")
    assert listed(store, "/abcd1234") == listed(store, "/abcd1234.example") == [second, first]
    assert listed(store, "/other") == listed(store, "/mailtest", first.number) == [second]
    assert listed(store, "/mailtest") == [second, first]
    assert listed(store, "/unknown1") == listed(store, "@mailtest") == []    # no inbox's name
    assert [store.count(each) for each in ("abcd1234", "other", "mailtest", "unknown1")] == [
        2, 1, 2, 0]


def test_mail_is_listed_under_the_server_that_is_named_and_that_of_its_user():
    _, store = store_on_clock()
    message = delivered(store, "a@x.example", server="abcd1234", user="Shop5678@mailosaur.net")
    assert message.servers == ("abcd1234", "x", "x.example", "shop5678")
    assert listed(store, "/abcd1234") == listed(store, "/shop5678") == listed(store, "/x") == [
        message]


def test_sent_mail_is_in_the_outbox_alone():
    _, store = store_on_clock()
    sent = delivered(store, "a@x.example", direction="Sent", server="abcd1234")
    assert list(sent.inboxes) == ["outbox of abcd1234"]
    assert listed(store, "/abcd1234") == listed(store, "/mailtest") == [sent]
    assert listed(store, "/x") == store.inboxes() == listed(store, "outbox of abcd1234") == []
    assert why_unknown(store.inbox, "a@x.example")
    assert why_unknown(store.inbox, "outbox of abcd1234")


def test_emptying_a_server_ends_its_messages_everywhere():
    _, store = store_on_clock()
    delivered(store, "a@x.example", "b@y.example")
    stays = delivered(store, "b@y.example")
    store.empty("x")
    assert listed(store, "/mailtest") == listed(store, "/y") == listed(store, "b@y.example") == [
        stays]
    assert listed(store, "a@x.example") == []
    store.empty("mailtest")
    assert store.counters()["messages"] == 0
    assert listed(store, "/y") == []


def test_servers_are_the_default_the_named_and_those_that_hold_mail():
    _, store = store_on_clock()
    store.name_server("abcd1234", "Shop")
    delivered(store, "a@x.example")
    assert store.servers() == {"mailtest": "Every message", "abcd1234": "Shop",
                               "x": "x", "x.example": "x.example"}
    store.name_server("abcd1234", "Shop 2")
    assert store.servers()["abcd1234"] == "Shop 2"
    store.name_server("abcd1234", "")
    assert "abcd1234" not in store.servers()


def test_devices_are_kept_until_they_are_dropped():
    _, store = store_on_clock()
    device = store.add_device("phone", "ONSWG4TFOQYTEMY=")
    assert device == {"id": device["id"], "name": "phone", "sharedSecret": "ONSWG4TFOQYTEMY="}
    assert store.devices() == [device]
    store.drop_device(device["id"])
    assert store.devices() == []


def test_is_ours():
    _, store = store_on_clock(domain="b\u00fccher.example")
    acquired = store.acquire().address
    store.name_server("abcd1234", "Shop")
    delivered(store, "app@user.example")
    for address in (acquired, acquired.replace("@", "+tag@"), "new@B\u00dcCHER.example",
                    "new@xn--bcher-kva.example", "a@abcd1234.mailosaur.net"):
        assert store.is_ours(address), address
    for address in ("app@user.example", "someone@else.example", "a@sub.xn--bcher-kva.example"):
        assert not store.is_ours(address), address


def test_inboxes_are_listed_newest_first():
    _, store = store_on_clock()
    delivered(store, "z@x.example")
    acquired = store.acquire().address
    delivered(store, "a@x.example")
    delivered(store, "z@x.example")
    assert [view.address for view in store.inboxes()] == ["z@x.example", "a@x.example", acquired]


def test_counters_of_a_store():
    _, store = store_on_clock(max_memory=10_000, message_cost=1_000, inbox_cost=500,
                              place_cost=100)
    delivered(store, "a@x.example", octets=b"")
    delivered(store, "+4915112345", octets=b"hi", kind="SMS")
    store.reserve(5)
    assert store.counters() == {
        "messages": 2, "inboxes": 2, "unseen": 2,
        "octets": 2 * 1_000 + 2 * 500 + 2 * 100 + 2 * 5 * 11 + 2 + 5,
        "max_memory": 10_000, "accepted": 1, "sms": 1, "sessions": 0, "events": 2, "waiters": 0}


# -- strict, scripted failures, watches

def test_strict_store_takes_mail_for_acquired_inboxes_alone():
    clock, store = store_on_clock(strict=True)
    address = store.acquire().address
    assert store.refusal(address.upper()) == store.refusal(address.replace("@", "+tag@")) == ""
    assert store.refusal("a@x.example") == "no such inbox; acquire it first (--strict)"
    with pytest.raises(mailtest.NeverSeen, match="no inbox 'a@x.example'; acquire one$"):
        store.inbox("a@x.example")
    clock.now += 600.0
    expired = "expired at 1970-01-01T00:26:40.000000+00:00; acquire a new one"
    assert store.refusal(address) == f"the inbox {address!r} {expired}"
    assert "expired at" in store.refusal(address.replace("@", "+tag@"))


def test_attempts_count_from_the_one_that_opens_the_inbox():
    _, store = store_on_clock()
    for _ in range(2):
        assert store.refusal("a@x.example") == ""
        store.deliver(mailtest.Message(mailtest.new_id(), b"", mailtest.Envelope(
            "", ("a@x.example",)), session=(b"C: RCPT TO:<a@x.example>\r\n",)))
    assert store.inbox("a@x.example").attempts == 2
    delivered(store, "b@x.example")      # not by SMTP
    assert store.inbox("b@x.example").attempts == 0


# fail=..., then (stage, code, delay, times)
FAILURES = {
    "a reply code once": ("rcpt:451", ("rcpt", 451, 0.0, 1)),
    "a reply code so often": ("rcpt:451*2", ("rcpt", 451, 0.0, 2)),
    "5xx": ("data:554*3", ("data", 554, 0.0, 3)),
    "drop": ("mail:drop", ("mail", -1, 0.0, 1)),
    "delay": ("data:delay=2.5*9", ("data", 0, 2.5, 9)),
    "capitals and blanks around": (" RCPT:DROP ", ("rcpt", -1, 0.0, 1)),
    "the longest delay": ("rcpt:delay=60", ("rcpt", 0, 60.0, 1)),
}


@pytest.mark.parametrize("text, expected", rows(FAILURES))
def test_parse_failure(text, expected):
    failure = mailtest.parse_failure(text, mailtest.Limits())
    assert (failure.stage, failure.code, failure.delay, failure.times) == expected
    assert (failure.text, failure.answered) == (text.strip(), 0)


@pytest.mark.parametrize("text", [
    "", "rcpt", "rcpt:", "rcpt:250", "rcpt:600", "rcpt:45", "ehlo:451", "rcpt:451*0", "rcpt:451*",
    "rcpt:451*-1", "rcpt:delay", "rcpt:delay=-1", "rcpt:delay=1e3", "rcpt:delay=.5", "rcpt:451 2",
    "rcpt:451*2*3", "rcpt:451,data:drop", "rcpt:delay=0." + "0" * 80])
def test_failure_that_is_none_says_what_was_expected(text):
    with pytest.raises(ValueError) as error:
        mailtest.parse_failure(text, mailtest.Limits())
    assert str(error.value) == (
        "expected fail=STAGE:ACTION[*TIMES] with a stage mail, rcpt or data and an action 4xx, "
        f"5xx, drop or delay=SECONDS, such as fail=rcpt:451*2; got {text[:80]!r}")


def test_failures_beyond_the_bounds_say_what_was_expected():
    with pytest.raises(ValueError) as error:
        mailtest.parse_failure("rcpt:delay=60.5", mailtest.Limits())
    assert str(error.value) == "expected a delay of at most 60 seconds, got 'rcpt:delay=60.5'"
    with pytest.raises(ValueError) as error:
        failing(store_on_clock()[1], *["rcpt:451"] * 21)
    assert str(error.value) == "expected at most 20 times fail=, got 21"


def failing(store, *texts):
    """The address of an inbox with these scripted failures."""
    return store.acquire(tuple(mailtest.parse_failure(text, store.limits)
                               for text in texts)).address


def test_scripted_failures_are_answered_in_order_and_counted():
    clock, store = store_on_clock()
    address = failing(store, "rcpt:451*2", "data:552", "rcpt:550")
    found = [store.scripted("rcpt", address.upper()) for _ in range(4)]
    assert [failure and failure.text for failure in found] == [
        "rcpt:451*2", "rcpt:451*2", "rcpt:550", None]
    assert store.inbox(address).failures == (
        ("rcpt:451*2", 2, 0), ("data:552", 0, 1), ("rcpt:550", 1, 0))
    clock.now += 600.0
    assert store.scripted("data", address) is None


def test_call_that_does_not_come_in_time_is_told_once_until_the_next_one(waiting_store):
    store, clock = waiting_store, waiting_store.fake
    expiry = in_thread(store.keep_expiring)
    store.next_waiter()
    watch = store.watch("Job@x.example", 60).watch
    assert (watch.within, watch.told) == (60, False)
    for _ in range(2):
        store.next_waiter()              # it looks when the next call is due
        clock.now += 59.0
        store.watch("job@x.example", 60)
        assert listed(store, "job@x.example")[1:] == []
        store.next_waiter()
        clock.now += 60.0
        waiter = in_thread(functools.partial(store.messages, "job@x.example", timeout=60.0,
                                             after=store.number))
        store.next_waiter()
        store.watch("other@x.example", 60)       # wakes the thread, as its own time would
        mail = waiter.join_value()[0]
        assert b"Subject: No call within 60 seconds\r\n" in mail.octets
        assert store.inbox("job@x.example").watch.told
        store.watch("job@x.example", 60)
        store.next_waiter()
    store.unwatch("job@x.example")
    assert store.inbox("job@x.example").watch is None
    store.close()
    expiry.join_value()


@pytest.mark.parametrize("address, within", [
    ("a@x.example", 0), ("a@x.example", 601), ("a@x.example", float("nan")), ("nobody", 60),
    ("a@x.example\r\nBcc: b@x.example", 60), ("a b@x.example", 60), ("a@", 60), ("@x", 60)])
def test_watch_that_cannot_be_says_what_was_expected(address, within):
    _, store = store_on_clock()
    with pytest.raises(ValueError, match="^expected "):
        store.watch(address, within)
    assert store.inboxes() == []


# -- events

def test_events_are_numbered_from_one_and_tell_what_happened():
    clock, store = store_on_clock()
    address = store.acquire().address
    message = delivered(store, address)
    other = delivered(store, "b@x.example")
    store.delete(other.id)
    store.empty("x")
    store.drop_inbox("b@x.example")
    clock.now += 600.0
    store.counters()
    told = [
        mailtest.Event(1, "inbox", {"address": address,
                                    "expires": "1970-01-01T00:26:40.000000+00:00"}),
        mailtest.Event(2, "message", {"id": message.id}),
        mailtest.Event(3, "message", {"id": other.id}),
        mailtest.Event(4, "deleted", {"id": other.id, "inboxes": ("b@x.example",)}),
        mailtest.Event(5, "emptied", {"server": "x"}),
        mailtest.Event(6, "deleted", {"address": "b@x.example"}),
        mailtest.Event(7, "expired", {"address": address}),
    ]
    assert store.events(0, 0.0) == (told, 7, False)
    assert (message.number, other.number, store.number) == (2, 3, 7)
    assert [event.number for event in store.events(0, 0.0, ["B@x.example"])[0]] == [3, 4, 6]
    assert [event.number for event in store.events(0, 0.0, [address])[0]] == [1, 2, 7]


# events seen, then the numbers that follow and whether some were lost; 3 of 6 are kept
RESUMED = {
    "from the start": (0, [4, 5, 6], True),
    "after one that is not kept": (2, [4, 5, 6], True),
    "after the last that is not kept": (3, [4, 5, 6], False),
    "after one that is kept": (5, [6], False),
    "after the latest": (6, [], False),
}


@pytest.mark.parametrize("after, numbers, lost", rows(RESUMED))
def test_events_resume(after, numbers, lost):
    _, store = store_on_clock(events=3)
    for _ in range(3):
        store.acquire()
        delivered(store, "a@x.example")
    events, number, was_lost = store.events(after, 0.0)
    assert ([event.number for event in events], number, was_lost) == (numbers, 6, lost)


def test_followers_are_counted_exactly():
    _, store = store_on_clock(followers=1)
    for _ in range(2):
        with store.follower():
            with pytest.raises(mailtest.Full, match="^1 others follow the events$"):
                with store.follower():
                    pass


# -- waiting

@pytest.fixture
def waiting_store():
    """A store whose waiters are announced: next_waiter() returns once one more has begun.
    `fake` is its clock."""
    entered = threading.Semaphore(0)

    class Announced(mailtest.Store):
        """Says when somebody begins to wait.  The lock is held then, so whoever takes the lock
        afterwards finds him waiting."""

        def _wait(self, *arguments):
            entered.release()
            super()._wait(*arguments)

    class Alarm(threading.Condition):
        """The same of keep_expiring()."""

        def wait(self, timeout=None):
            entered.release()
            return super().wait(timeout)
    clock = FakeClock()
    store = Announced(mailtest.Limits(waiters=1_000), clock=clock)
    store.fake, store._alarm = clock, Alarm(store._lock)

    def next_waiter():
        assert entered.acquire(timeout=10), "nobody waits"
    store.next_waiter = next_waiter
    yield store
    store.close()


def in_thread(function, *arguments):
    """A thread that runs the function; join_value() returns its result."""
    results = []

    def run():
        try:
            results.append(function(*arguments))
        except Exception as error:       # handed to the test
            results.append(error)
    thread = threading.Thread(target=run, daemon=True)

    def join_value():
        thread.join(10)
        assert results, "the thread did not end"
        return results[0]
    thread.join_value = join_value
    thread.start()
    return thread


def waiter_at(store, where, timeout=60.0):
    """A thread that waits for mail at a place."""
    waiter = in_thread(functools.partial(store.messages, **at(where), timeout=timeout))
    store.next_waiter()
    return waiter


def test_wait_returns_at_once_for_what_is_there_or_cannot_come():
    _, store = store_on_clock(waiters=0)         # nobody may wait
    message = delivered(store, "a@x.example")
    for where in ("a@x.example", "/x"):
        assert store.messages(**at(where), timeout=60.0) == [message]
    acquired = store.acquire().address
    store.drop_inbox(acquired)
    with pytest.raises(mailtest.Ended, match="was deleted"):
        store.messages(acquired, timeout=60.0)
    store.close()
    assert store.messages("b@x.example", timeout=60.0) == []
    _, store = store_on_clock()
    assert store.messages("a@x.example", timeout=0.001) == []
    assert (store.counters()["waiters"], store._waiting) == (0, {})


PLACES = {
    "an inbox": "a@x.example",
    "an inbox in another case": "A@X.example",
    "a server": "/x",
    "a server's whole domain": "/x.example",
    "the default server": "/mailtest",
    "the second recipient's inbox": "b@x.example",
    "the second recipient's server": "/y",
}


@pytest.mark.parametrize("place", rows(PLACES))
def test_waiter_is_woken_by_mail_at_its_place(place, waiting_store):
    store = waiting_store
    waiter = waiter_at(store, place)
    message = delivered(store, "a@x.example", "b@x.example", "c@y.example")
    assert waiter.join_value() == [message]
    assert store.counters()["waiters"] == 0


def test_waiter_is_woken_by_mail_to_a_tag_and_by_the_end_of_its_inbox(waiting_store):
    store = waiting_store
    address = store.acquire().address
    waiter = waiter_at(store, address.replace("@", "+tag@"))
    message = delivered(store, address.replace("@", "+tag@"))
    assert waiter.join_value() == [message]
    store.empty_inbox(address)
    waiter = waiter_at(store, address)
    store.drop_inbox(address)
    assert isinstance(waiter.join_value(), mailtest.Ended)


def test_two_hundred_waiters_are_each_woken_by_their_own_mail_alone(waiting_store):
    store = waiting_store
    addresses = [store.acquire().address for _ in range(200)]
    waiters = [waiter_at(store, address) for address in addresses]
    assert store.counters()["waiters"] == 200
    for done, (waiter, address) in enumerate(zip(waiters, addresses), 1):
        delivered(store, address)
        waiter.join_value()
        assert store.counters()["waiters"] == 200 - done


def test_close_wakes_everyone(waiting_store):
    store = waiting_store
    waiters = [waiter_at(store, where) for where in ("a@x.example", "/x", "/mailtest")]
    waiters += [in_thread(store.events, 0, 60.0), in_thread(store.keep_expiring)]
    for _ in range(2):
        store.next_waiter()
    store.close()
    assert [waiter.join_value() for waiter in waiters] == [[]] * 3 + [([], 0, False), None]


def test_thread_that_expires_needs_no_request(waiting_store):
    store = waiting_store
    delivered(store, "a@x.example")
    follower = in_thread(store.events, 1, 60.0)
    store.next_waiter()
    store.fake.now += 600.0
    in_thread(store.keep_expiring)
    assert [event.kind for event in follower.join_value()[0]] == ["expired"]


def test_events_are_waited_for_of_some_inboxes_too(waiting_store):
    store = waiting_store
    everything = in_thread(store.events, 0, 60.0)
    some = in_thread(store.events, 0, 60.0, ["B@x.example"])
    for _ in range(2):
        store.next_waiter()
    first = delivered(store, "a@x.example")
    assert everything.join_value() == ([mailtest.Event(1, "message", {"id": first.id})], 1, False)
    second = delivered(store, "b@x.example")
    assert some.join_value() == ([mailtest.Event(2, "message", {"id": second.id})], 2, False)


def collected(store, count, match=lambda message: True, where="a@x.example", **options):
    """What collect() returns."""
    return mailtest.collect(store, match, count, 60.0, **at(where), **options)


def test_collect_returns_at_once_what_is_there():
    _, store = store_on_clock(waiters=0)
    sent = [delivered(store, "a@x.example") for _ in range(3)][::-1]
    assert collected(store, 2) == sent
    assert collected(store, 1, after=sent[1].number) == sent[:1]
    assert mailtest.collect(store, lambda message: False, 1, 0.0, address="a@x.example") == []


def test_collect_looks_at_each_message_once_and_waits_for_the_rest(waiting_store):
    store = waiting_store
    looked_at = []

    def match(message):
        looked_at.append(message)
        return b"yes" in message.octets
    first = delivered(store, "a@x.example", octets=b"yes 1")
    thread = in_thread(collected, store, 2, match)
    store.next_waiter()
    other = delivered(store, "a@x.example", octets=b"no")
    store.next_waiter()
    store.delete(other.id)
    second = delivered(store, "a@x.example", octets=b"yes 2")
    assert thread.join_value() == [second, first]
    assert looked_at == [first, other, second]


def test_collect_gives_up_when_its_client_has_hung_up():
    _, store = store_on_clock()
    with pytest.raises(mailtest.Abandoned):
        collected(store, 1, abandoned=lambda: True)
    assert store.counters()["waiters"] == 0


# -- what is kept beside

def test_polling_client_is_told_from_one_that_searches_again():
    clock, store = store_on_clock(polls=2)
    store.poll_answered("search")
    assert not store.polled_again("another search")
    clock.now += 0.25
    assert store.polled_again("search")
    assert not store.polled_again("search")      # it was not answered since
    store.poll_answered("search")
    clock.now += 0.26
    assert not store.polled_again("search")
    for key in "abc":
        store.poll_answered(key)
    assert [store.polled_again(key) for key in "abc"] == [False, True, True]


def test_store_counts_requests_of_any_minute_by_client():
    clock, store = store_on_clock(rate=2, rate_clients=2)
    assert [store.rate("192.0.2.1") for _ in range(3)] == [0, 0, 60]
    clock.now += 20.0
    assert [store.rate("192.0.2.2"), store.rate("192.0.2.1")] == [0, 40]
    clock.now += 40.0
    assert store.rate("192.0.2.1") == 0
    for client in ("192.0.2.3", "192.0.2.4"):
        store.rate(client)
    assert [store.rate("192.0.2.1") for _ in range(2)] == [0, 0]     # it was forgotten
    _, store = store_on_clock()
    assert [store.rate("192.0.2.1") for _ in range(100)] == [0] * 100


def test_sessions_are_remembered_newest_first_up_to_the_bound():
    _, store = store_on_clock(sessions=2)
    for _ in range(3):
        mailtest.Session(store, client="192.0.2.1").receive(b"NOOP\r\nQUIT\r\n")
    assert [record.number for record in store.sessions()] == [3, 2]
    assert store.counters()["sessions"] == 3


# ---- SMTP session ----------------------------------------------------------
# Dialogues are rows: the state of the session, what is said then, what comes back, which messages
# are stored.  In them ¶ is CRLF, \r, \n and \xNN are octets, {x*9} are nine x, <id> is the id of a
# message.  Sessions have small limits: 2000 octets of a message, 3 recipients, 6 bad commands.

SMALL = {"max_size": 2_000, "recipients": 3, "bad_commands": 6}

_GREETED = "EHLO client.example¶"
STATES = {
    "new": "",
    "idle": _GREETED,
    "mail": _GREETED + "MAIL FROM:<>¶",
    "rcpt": _GREETED + "MAIL FROM:<>¶RCPT TO:<b@mailtest.example>¶",
    "data": _GREETED + "MAIL FROM:<>¶RCPT TO:<b@mailtest.example>¶DATA¶",
}

EHLO = ("250-mailtest.example¶250-SIZE 2000¶250-8BITMIME¶250-SMTPUTF8¶250-PIPELINING¶"
        "250-ENHANCEDSTATUSCODES¶250-CHUNKING¶250-AUTH PLAIN LOGIN CRAM-MD5 XOAUTH2¶250 HELP")
HELP = ("214-2.0.0 Commands:¶214-2.0.0 EHLO domain¶214-2.0.0 HELO domain¶214-2.0.0 MAIL "
        "FROM:<reverse-path> [SIZE=n] [BODY=7BIT|8BITMIME] [SMTPUTF8] [AUTH=mailbox]¶"
        "214-2.0.0 RCPT TO:<forward-path>¶214-2.0.0 DATA¶214-2.0.0 BDAT octets [LAST]¶"
        "214-2.0.0 RSET¶214-2.0.0 NOOP [text]¶214-2.0.0 VRFY mailbox¶214-2.0.0 HELP [command]¶"
        "214-2.0.0 QUIT¶214-2.0.0 STARTTLS¶214 2.0.0 AUTH mechanism [initial-response]")
OK, QUEUED, BYE = "250 2.0.0 Ok", "250 2.0.0 Ok: queued as <id>", "221 2.0.0 Bye"
MAIL_OK, RCPT_OK = "250 2.1.0 Ok", "250 2.1.5 Ok"
DATA_OK = "354 End data with <CR><LF>.<CR><LF>"
NOT_CONTROL = "500 5.5.2 Expected no control character, NUL, bare CR or bare LF in a command"
NO_DOMAIN = "501 5.5.4 Expected EHLO with your domain or address literal"
EHLO_FIRST, MAIL_FIRST = "503 5.5.1 Send EHLO first", "503 5.5.1 Send MAIL first"
RCPT_FIRST = "503 5.5.1 Send RCPT first: no recipient was accepted"
IS_OPEN = "503 5.5.1 A mail transaction is open: send RSET, or end it"
TOO_LARGE = "552 5.3.4 Message too large: expected at most 2000 octets (--max-size)"
TOO_LONG = "500 5.5.2 Line too long: expected at most 1065 octets with CRLF"
NO_BASE64 = "501 5.5.2 Expected base64"
NO_PLAIN = "501 5.5.2 Expected base64 of [identity] NUL user NUL password"
NO_XOAUTH2 = "501 5.5.2 Expected base64 of user=USER ^A auth=Bearer TOKEN ^A ^A"
UNKNOWN = "500 5.5.2 Unknown command '%s': HELP lists them"
NO_MECHANISM = "504 5.5.4 Unknown mechanism: expected PLAIN, LOGIN, CRAM-MD5, XOAUTH2"
AUTHENTICATED, ALREADY = "235 2.7.0 Authenticated", "503 5.5.1 Already authenticated"
TOO_BAD, NOT_HTTP = "421 4.7.0 Too many bad commands", "421 4.7.0 This is SMTP, not HTTP"
TLS_TALKER = "spoke TLS at once: use STARTTLS, or the port of --smtps"
RESPONSE = "AGFsaWNlAHNlY3JldA=="

DIALOGUES = {
    "EHLO lists the extensions": ("new", "EHLO client.example¶", EHLO),
    "EHLO may be an address literal": ("new", "EHLO [127.0.0.1]¶", EHLO),
    "a mail goes through after HELO": (
        "new", "HELO x¶MAIL FROM:<>¶RCPT TO:<b@x.example>¶DATA¶.¶",
        f"250 mailtest.example¶{MAIL_OK}¶{RCPT_OK}¶{DATA_OK}¶{QUEUED}", ""),
    "EHLO without a domain does not greet": (
        "new", "EHLO¶MAIL FROM:<>¶", f"{NO_DOMAIN}¶{EHLO_FIRST}"),
    "HELO without a domain": ("new", "HELO¶", NO_DOMAIN.replace("EHLO", "HELO")),
    "MAIL, RCPT, DATA and AUTH want EHLO first": (
        "new", f"MAIL FROM:<>¶RCPT TO:<b@x.example>¶DATA¶AUTH PLAIN {RESPONSE}¶",
        "¶".join([EHLO_FIRST] * 4)),
    "BDAT before EHLO is refused once its octets are read": (
        "new", "BDAT 6 LAST¶NOOP¶", EHLO_FIRST),
    "RSET, NOOP, VRFY, HELP and QUIT need no EHLO": (
        "new", "RSET¶NOOP¶VRFY b¶HELP QUIT¶QUIT¶",
        f"{OK}¶{OK}¶252 2.5.2 Not verified, but mail to it may be accepted¶214 2.0.0 QUIT¶{BYE}"),
    "commands and keywords are written in any case": (
        "new", "hElO x¶mAiL fRoM:<> sIzE=10 bOdY=8bitMime sMtPuTf8 aUtH=<>¶"
        "rCpT tO:<b@x.example>¶bDaT 1 lAsT¶xqUiT¶",
        f"250 mailtest.example¶{MAIL_OK}¶{RCPT_OK}¶{QUEUED}¶{BYE}", "x"),

    "an HTTP request is cut off": ("new", "POST / HTTP/1.1¶Host: x¶", NOT_HTTP),
    "an HTTP request through a proxy is cut off": ("new", "GET http://x/ HTTP/1.1¶", NOT_HTTP),
    "an HTTP request that is not known is cut off at its Host field": (
        "new", "OPTIONS * HTTP/1.1¶host: x¶", UNKNOWN % "OPTIONS" + "¶" + NOT_HTTP),
    "an HTTP request with a long line is cut off": ("new", "POST /{a*2000} HTTP/1.1¶", NOT_HTTP),
    "an HTTP request with a control character is cut off": (
        "new", r"POST /\x09 HTTP/1.1¶", NOT_HTTP),
    "an HTTP request with bare LF is cut off": ("new", r"GET / HTTP/1.1\n", NOT_HTTP),
    "a TLS talker is cut off": ("new", r"\x16\x03", ""),
    "a TLS talker whose hello holds CRLF is cut off": ("new", r"\x16\x03\x01\x00\xfa¶", ""),
    "a session of many blank lines ends": (
        "new", "¶¶¶¶¶¶¶", (UNKNOWN % "" + "¶") * 6 + TOO_BAD),
    "too many bad commands end the session": (
        "idle", r"FOO¶FOO¶NOOP¶FOO¶FOO¶EXPN list¶NOOP\x00¶FOO¶",
        "¶".join([UNKNOWN % "FOO"] * 2 + [OK] + [UNKNOWN % "FOO"] * 2
                 + ["502 5.5.1 EXPN is not implemented", NOT_CONTROL, TOO_BAD])),

    "two transactions in a session": (
        "data", "one¶.¶MAIL FROM:<>¶RCPT TO:<b@x.example>¶DATA¶two¶.¶",
        f"{QUEUED}¶{MAIL_OK}¶{RCPT_OK}¶{DATA_OK}¶{QUEUED}", "one¶", "two¶"),
    "mail data without a line": ("data", ".¶", QUEUED, ""),
    "mail data that is one empty line": ("data", "¶.¶", QUEUED, "¶"),
    "mail data that holds commands": (
        "data", "QUIT¶RSET¶DATA¶.¶", QUEUED, "QUIT¶RSET¶DATA¶"),
    "dot-stuffing is undone": (
        "data", "a¶..¶...¶..x¶.y¶a..b¶.¶", QUEUED, "a¶.¶..¶.x¶y¶a..b¶"),
    "dot-stuffing is undone in the first line": ("data", "..¶.¶", QUEUED, ".¶"),
    "octets are kept exactly": (
        "data", r"\x00\x01\x7f\x80\xff\n\r\x0c bare\n\nLF\rCR¶{x*1500}¶.¶", QUEUED,
        r"\x00\x01\x7f\x80\xff\n\r\x0c bare\n\nLF\rCR¶{x*1500}¶"),
    "mail data that is too large is read to its end": (
        "data", "{x*1999}¶QUIT¶.¶NOOP¶DATA¶", f"{TOO_LARGE}¶{OK}¶{MAIL_FIRST}"),

    "order: RCPT or DATA before MAIL": (
        "idle", "RCPT TO:<b@x.example>¶DATA¶", f"{MAIL_FIRST}¶{MAIL_FIRST}"),
    "order: DATA before RCPT": ("mail", "DATA¶", RCPT_FIRST),
    "order: DATA after every recipient was refused": (
        "mail", "RCPT TO:<nobody>¶DATA¶",
        f"501 5.1.3 Expected local-part@domain, got 'nobody'¶{RCPT_FIRST}"),
    "order: MAIL or AUTH within a transaction": (
        "mail", f"MAIL FROM:<>¶AUTH PLAIN {RESPONSE}¶", f"{IS_OPEN}¶{IS_OPEN}"),
    "order: the transaction ends with its mail": (
        "data", ".¶RCPT TO:<b@x.example>¶", f"{QUEUED}¶{MAIL_FIRST}", ""),
    "RSET ends a transaction": ("rcpt", "RSET¶DATA¶", f"{OK}¶{MAIL_FIRST}"),
    "EHLO ends a transaction": ("rcpt", "EHLO x¶DATA¶", f"{EHLO}¶{MAIL_FIRST}"),
    "EHLO that fails does not end a transaction": (
        "rcpt", "EHLO¶DATA¶.¶", f"{NO_DOMAIN}¶{DATA_OK}¶{QUEUED}", ""),
    "NOOP, VRFY and HELP do not touch a transaction": (
        "rcpt", "NOOP¶VRFY b¶HELP NOOP¶BDAT 1 LAST¶x",
        f"{OK}¶252 2.5.2 Not verified, but mail to it may be accepted¶214 2.0.0 NOOP [text]¶"
        + QUEUED, "x"),
    "a refused RCPT leaves the others": (
        "rcpt", "RCPT TO:<>¶BDAT 1 LAST¶x",
        f"501 5.5.4 Expected RCPT TO:<address>, got 'RCPT TO:<>'¶{QUEUED}", "x"),
    "too many recipients": (
        "rcpt", "RCPT TO:<c@x.example>¶RCPT TO:<d@x.example>¶RCPT TO:<e@x.example>¶BDAT 1 LAST¶x",
        f"{RCPT_OK}¶{RCPT_OK}¶452 4.5.3 Too many recipients: expected at most 3¶{QUEUED}", "x"),
    "QUIT stores nothing": ("rcpt", "QUIT¶", BYE),
    "HELP lists the commands": ("idle", "HELP¶HELP me¶HELP ü¶", f"{HELP}¶{HELP}¶{HELP}"),

    "a bare CR does not end a line": ("idle", r"NOOP\rNOOP¶", NOT_CONTROL),
    "a bare LF does not end a line": ("idle", r"NOOP\nNOOP¶", NOT_CONTROL),
    "CR CR LF ends a line that holds a bare CR": ("idle", r"NOOP\r¶", NOT_CONTROL),
    "NUL in a command": ("idle", r"NOOP \x00¶", NOT_CONTROL),
    "TAB in a command": ("idle", r"NOOP\x09x¶", NOT_CONTROL),
    "DEL in a command": ("idle", r"NOOP \x7f¶", NOT_CONTROL),
    "NEL in a command": ("idle", "NOOP \x85¶", NOT_CONTROL),
    "U+2028 in a command": ("idle", "EHLO x\u2028S: 250 forged¶", NOT_CONTROL),
    "an argument that is not UTF-8": ("idle", r"NOOP \xff¶", "501 5.5.2 Expected ASCII or UTF-8"),
    "a verb that is not UTF-8": (
        "idle", r"\xff\xfe¶", UNKNOWN % r"\x5c\x5cxff\x5c\x5cxfe"),
    "an empty line": ("idle", "¶", UNKNOWN % ""),
    "a blank before the verb": ("idle", " NOOP¶", UNKNOWN % ""),
    "an unknown verb is quoted in short": ("idle", "{X*100}¶", UNKNOWN % "{X*57}..."),
    "a line of 512 octets": ("idle", "NOOP {x*505}¶", OK),
    "a line of 1065 octets": ("idle", "NOOP {x*1058}¶", OK),
    "a line of 1066 octets": ("idle", "NOOP {x*1059}¶", TOO_LONG),
    "a line of 64 kB": ("idle", "NOOP {x*65531}¶", TOO_LONG),
    "a line that is too long within a transaction": (
        "mail", "RCPT TO:<{x*2000}@x.example>¶RCPT TO:<b@x.example>¶", f"{TOO_LONG}¶{RCPT_OK}"),
    "a line that is too long and ends in CR CR LF": ("idle", r"{x*2000}\r¶", TOO_LONG),
    "AUTH may have a line of 12288 octets": ("idle", "AUTH NONE {x*12276}¶", NO_MECHANISM),
    "AUTH with a line of 12289 octets": (
        "idle", "AUTH NONE {x*12277}¶", TOO_LONG.replace("1065", "12288")),

    "BDAT: one chunk": ("rcpt", "BDAT 12 LAST¶Subject: x¶", QUEUED, "Subject: x¶"),
    "BDAT: chunks": (
        "rcpt", r"BDAT 3¶a¶BDAT 0¶BDAT 2¶b\rBDAT 1 LAST¶\n",
        "250 2.0.0 3 octets so far¶250 2.0.0 3 octets so far¶250 2.0.0 5 octets so far¶" + QUEUED,
        "a¶b¶"),
    "BDAT: an empty last chunk": (
        "rcpt", "BDAT 1¶xBDAT 0 LAST¶", f"250 2.0.0 1 octets so far¶{QUEUED}", "x"),
    "BDAT: nothing but an empty last chunk": ("rcpt", "BDAT 0 LAST¶", QUEUED, ""),
    "BDAT: octets are kept exactly": (
        "rcpt", r"BDAT 14 LAST¶.¶..¶.¶\x00\xff\n\r", QUEUED, r".¶..¶.¶\x00\xff\n\r"),
    "BDAT: a chunk that looks like commands": (
        "rcpt", "BDAT 12 LAST¶QUIT¶RSET¶", QUEUED, "QUIT¶RSET¶"),
    "BDAT: too large": (
        "rcpt", "BDAT 1999¶{x*1999}BDAT 2 LAST¶xxBDAT 5 LAST¶xxxxx",
        f"250 2.0.0 1999 octets so far¶{TOO_LARGE}¶{MAIL_FIRST}"),
    "BDAT: far too large before the last chunk": (
        "rcpt", "BDAT 3000¶{x*3000}BDAT 5 LAST¶xxxxx", f"{TOO_LARGE}¶{MAIL_FIRST}"),
    "BDAT: before RCPT": ("mail", "BDAT 5 LAST¶xxxxx", RCPT_FIRST),
    "BDAT: a refused chunk without octets": ("idle", "BDAT 0 LAST¶", MAIL_FIRST),
    "BDAT: DATA after a chunk": (
        "rcpt", "BDAT 1¶xDATA¶BDAT 1 LAST¶y",
        f"250 2.0.0 1 octets so far¶503 5.5.1 Expected BDAT: this transaction began with it¶"
        f"{QUEUED}", "xy"),
    "BDAT: RSET between chunks": (
        "rcpt", "BDAT 1¶xRSET¶BDAT 1 LAST¶y", f"250 2.0.0 1 octets so far¶{OK}¶{MAIL_FIRST}"),
    "BDAT: QUIT between chunks": (
        "rcpt", "BDAT 1¶xQUIT¶", f"250 2.0.0 1 octets so far¶{BYE}"),

    "AUTH: PLAIN with an initial response, then again after EHLO": (
        "idle", f"AUTH PLAIN {RESPONSE}¶AUTH PLAIN {RESPONSE}¶EHLO x¶AUTH PLAIN {RESPONSE}¶",
        f"{AUTHENTICATED}¶{ALREADY}¶{EHLO}¶{ALREADY}"),
    "AUTH: PLAIN without one": ("idle", f"AUTH PLAIN¶{RESPONSE}¶", f"334 ¶{AUTHENTICATED}"),
    "AUTH: PLAIN with an identity": (
        "idle", "auth plain Ym9iAGFsaWNlAHNlY3JldA==¶", AUTHENTICATED),
    "AUTH: PLAIN with an empty initial response": ("idle", "AUTH PLAIN =¶", NO_PLAIN),
    "AUTH: PLAIN with one NUL": ("idle", "AUTH PLAIN YWxpY2UAc2VjcmV0¶", NO_PLAIN),
    "AUTH: PLAIN without a user": ("idle", "AUTH PLAIN AABzZWNyZXQ=¶", NO_PLAIN),
    "AUTH: an initial response that is not base64": ("idle", "AUTH PLAIN !!!¶", NO_BASE64),
    "AUTH: a response that is not base64 ends the exchange": (
        "idle", "AUTH PLAIN¶!!!¶NOOP¶", f"334 ¶{NO_BASE64}¶{OK}"),
    "AUTH: a response that is not ASCII": ("idle", "AUTH PLAIN¶ü¶", f"334 ¶{NO_BASE64}"),
    "AUTH: an empty response": ("idle", "AUTH PLAIN¶¶", f"334 ¶{NO_PLAIN}"),
    "AUTH: cancelled": (
        "idle", "AUTH PLAIN¶*¶NOOP¶", f"334 ¶501 5.7.0 Authentication cancelled¶{OK}"),
    "AUTH: a response that is too long ends the exchange": (
        "idle", "AUTH PLAIN¶{x*12287}¶NOOP¶",
        f"334 ¶500 5.5.6 Line too long: expected at most 12288 octets with CRLF¶{OK}"),
    "AUTH: LOGIN": (
        "idle", "AUTH LOGIN¶YWxpY2U=¶c2VjcmV0¶",
        f"334 VXNlcm5hbWU6¶334 UGFzc3dvcmQ6¶{AUTHENTICATED}"),
    "AUTH: LOGIN with the user at once, cancelled, then again": (
        "idle", "AUTH LOGIN YWxpY2U=¶*¶AUTH LOGIN YWxpY2U=¶c2VjcmV0¶",
        "334 UGFzc3dvcmQ6¶501 5.7.0 Authentication cancelled¶334 UGFzc3dvcmQ6¶" + AUTHENTICATED),
    "AUTH: CRAM-MD5 takes no initial response": (
        "idle", "AUTH CRAM-MD5 YWxpY2U=¶",
        "501 5.5.4 Expected CRAM-MD5 without an initial response"),
    "AUTH: XOAUTH2": (
        "idle", "AUTH XOAUTH2 dXNlcj1hbGljZQFhdXRoPUJlYXJlciBzZWNyZXQBAQ==¶", AUTHENTICATED),
    "AUTH: XOAUTH2 without an initial response": (
        "idle", "AUTH XOAUTH2¶dXNlcj1hbGljZQFhdXRoPUJlYXJlciBzZWNyZXQBAQ==¶",
        f"334 ¶{AUTHENTICATED}"),
    "AUTH: XOAUTH2 that is none": ("idle", "AUTH XOAUTH2 YWxpY2U=¶", NO_XOAUTH2),
    "AUTH: without a mechanism": ("idle", "AUTH¶", "501 5.5.4 Expected AUTH mechanism"),
    "AUTH: an unknown mechanism": ("idle", "AUTH DIGEST-MD5¶", NO_MECHANISM),
}

# one line after EHLO, and its reply
LINES = {
    "RSET with an argument": ("RSET now", "501 5.5.4 Expected RSET alone, got 'now' after it"),
    "RSET with blanks": ("RSET  ", "250 2.0.0 Ok"),
    "QUIT with an argument": ("QUIT now", "501 5.5.4 Expected QUIT alone, got 'now' after it"),
    "NOOP with text": ("NOOP some text ü", "250 2.0.0 Ok"),
    "VRFY without a mailbox": ("VRFY ", "501 5.5.4 Expected VRFY mailbox"),
    "STARTTLS that is not offered": (
        "STARTTLS", "502 5.5.1 TLS is not offered: start with --tls or --tls-cert"),
    "TURN": ("TURN", "502 5.5.1 TURN is not implemented"),
    "ETRN": ("ETRN x", "502 5.5.1 ETRN is not implemented"),
    "ATRN": ("ATRN x", "502 5.5.1 ATRN is not implemented"),
    "SEND": ("SEND FROM:<a@b>", "502 5.5.1 SEND is not implemented"),
    "SOML": ("SOML FROM:<a@b>", "502 5.5.1 SOML is not implemented"),
    "SAML": ("SAML FROM:<a@b>", "502 5.5.1 SAML is not implemented"),
    "EXPN": ("EXPN list", "502 5.5.1 EXPN is not implemented"),
    "XCLIENT": ("XCLIENT ADDR=192.0.2.1",
                "500 5.5.2 Unknown command 'XCLIENT': HELP lists them"),
    "BDAT without a number": ("BDAT", "501 5.5.4 Expected BDAT octets [LAST], got ''"),
    "BDAT with a negative number": ("BDAT -1", "501 5.5.4 Expected BDAT octets [LAST], got '-1'"),
    "BDAT with something after it": (
        "BDAT 5 FIRST", "501 5.5.4 Expected BDAT octets [LAST], got '5 FIRST'"),
    "BDAT with digits beyond ASCII": (
        "BDAT ٣", "501 5.5.4 Expected BDAT octets [LAST], got '\\u0663'"),
    "HELP with a command": ("HELP bdat", "214 2.0.0 BDAT octets [LAST]"),
}

_NO_PATH = "501 5.5.4 Expected MAIL FROM:<address>, got 'MAIL "
_NO_DOMAIN = "501 5.1.7 Expected a domain or address literal, got "
_NOT_ASCII = "553 5.6.7 Expected an ASCII address, or SMTPUTF8 on MAIL; got "

# what follows MAIL, and the reply
MAIL_ARGUMENTS = {
    "a mailbox": ("FROM:<a@client.example>", MAIL_OK),
    "the null reverse-path": ("FROM:<>", MAIL_OK),
    "a blank after the colon": ("FROM: <a@client.example>", MAIL_OK),
    "a blank after it": ("FROM:<a@client.example> ", MAIL_OK),
    "a local-part alone": ("FROM:<root>", MAIL_OK),
    "an empty domain": ("FROM:<a@>", MAIL_OK),
    "a domain of one label": ("FROM:<a@localhost>", MAIL_OK),
    "an underscore in the domain": ("FROM:<a@my_host.example>", MAIL_OK),
    "every character of an atom": ("FROM:<!#$%&'*+-/=?^_`{|}~@client.example>", MAIL_OK),
    "a local-part of 64": ("FROM:<{x*64}@client.example>", MAIL_OK),
    "dots anywhere": ("FROM:<.a..b.@client.example>", MAIL_OK),
    "quoted": ('FROM:<"a b"@client.example>', MAIL_OK),
    "quoted angle brackets": ('FROM:<"a>b<c"@client.example>', MAIL_OK),
    "quoted at sign": ('FROM:<"a@b"@client.example>', MAIL_OK),
    "quoted pairs": (r'FROM:<"a\"b\\"@client.example>', MAIL_OK),
    "quoted and empty": ('FROM:<""@client.example>', MAIL_OK),
    "an IPv4 literal": ("FROM:<a@[127.0.0.1]>", MAIL_OK),
    "an IPv6 literal": ("FROM:<a@[IPv6:::1]>", MAIL_OK),
    "an IPv6 literal in lower case": ("FROM:<a@[ipv6:2001:db8::1]>", MAIL_OK),
    "a source route": ("FROM:<@a.example,@b.example:a@client.example>", MAIL_OK),
    "a source route to nobody": ("FROM:<@a.example:>", _NO_PATH + "FROM:<@a.example:>'"),
    "UTF-8 with SMTPUTF8": ("FROM:<jürgen@exämple.example> SMTPUTF8", MAIL_OK),
    "UTF-8 without SMTPUTF8": ("FROM:<jürgen@client.example>",
                               _NOT_ASCII + r"'j\x5cxfcrgen@client.example'"),
    "a UTF-8 domain without SMTPUTF8": ("FROM:<a@exämple.example>",
                                        _NOT_ASCII + r"'a@ex\x5cxe4mple.example'"),
    "nothing": ("", _NO_PATH + "'"),
    "no colon": ("FROM <a@client.example>", _NO_PATH + "FROM <a@client.example>'"),
    "no path": ("FROM:", _NO_PATH + "FROM:'"),
    "TO": ("TO:<a@client.example>", _NO_PATH + "TO:<a@client.example>'"),
    "no bracket": ("FROM:a@client.example", _NO_PATH + "FROM:a@client.example'"),
    "no closing bracket": ("FROM:<a@client.example", _NO_PATH + "FROM:<a@client.example'"),
    "two opening brackets": ("FROM:<<a@b>>", _NO_PATH + "FROM:<<a@b>>'"),
    "something after the bracket": ("FROM:<a@b>x", _NO_PATH + "FROM:<a@b>x'"),
    "two at signs": ("FROM:<a@@b>", _NO_PATH + "FROM:<a@@b>'"),
    "three parts": ("FROM:<a@b@c>", _NO_PATH + "FROM:<a@b@c>'"),
    "a blank in the path": ("FROM:<a b@c>", _NO_PATH + "FROM:<a b@c>'"),
    "a name before the path": ("FROM:Ann <a@b>", _NO_PATH + "FROM:Ann <a@b>'"),
    "an open quote": ('FROM:<"a@b>', _NO_PATH + "FROM:<\"a@b>'"),
    "no local-part": ("FROM:<@b>", _NO_PATH + "FROM:<@b>'"),
    "a literal that is no address": ("FROM:<a@[x]>", _NO_DOMAIN + "'[x]'"),
    "an IPv4 literal out of range": ("FROM:<a@[256.0.0.1]>", _NO_DOMAIN + "'[256.0.0.1]'"),
    "an IPv6 literal that is none": ("FROM:<a@[IPv6:zz]>", _NO_DOMAIN + "'[IPv6:zz]'"),
    "an IPv6 address without its tag": ("FROM:<a@[::1]>", _NO_DOMAIN + "'[::1]'"),
    "a literal that is not closed": ("FROM:<a@[127.0.0.1>", _NO_PATH + "FROM:<a@[127.0.0.1>'"),
    "an empty label": ("FROM:<a@b..example>", _NO_DOMAIN + "'b..example'"),
    "a label that begins with a hyphen": ("FROM:<a@-b.example>", _NO_DOMAIN + "'-b.example'"),
    "a label of 63": ("FROM:<a@{b*63}.example>", MAIL_OK),
    "a label of 64": ("FROM:<a@{b*64}>", _NO_DOMAIN + "'{b*57}...'"),
    "a domain of 256": ("FROM:<a@{b*63}.{b*63}.{b*63}.{b*63}.>",
                        _NO_DOMAIN + "'{b*57}...'"),
    "a control character in the path": (r"FROM:<a\x1b@b>", NOT_CONTROL),
    "NUL in the path": (r"FROM:<a\x00@b>", NOT_CONTROL),
    "a bare CR in the path": (r"FROM:<a\r@b>", NOT_CONTROL),
    "a bare LF in the path": (r"FROM:<a\n@b>", NOT_CONTROL),
    "DEL in a quoted local-part": (r'FROM:<"a\x7f"@b>', NOT_CONTROL),
    "octets that are not UTF-8": (r"FROM:<\xff@b> SMTPUTF8", "501 5.5.2 Expected ASCII or UTF-8"),

    "SIZE": ("FROM:<> SIZE=2000", MAIL_OK),
    "SIZE 0": ("FROM:<> SIZE=0", MAIL_OK),
    "SIZE above the limit": ("FROM:<> SIZE=2001", "552 5.3.4 Message too large: expected at most "
                                                  "2000 octets, got SIZE=2001"),
    "SIZE of 20 digits": ("FROM:<> SIZE={9*20}", "552 5.3.4 Message too large: expected at most "
                                                 "2000 octets, got SIZE={9*20}"),
    "SIZE of 21 digits": ("FROM:<> SIZE={9*21}", "501 5.5.4 Expected SIZE=octets, got '{9*21}'"),
    "SIZE that is no number": ("FROM:<> SIZE=big", "501 5.5.4 Expected SIZE=octets, got 'big'"),
    "SIZE that is negative": ("FROM:<> SIZE=-1", "501 5.5.4 Expected SIZE=octets, got '-1'"),
    "SIZE without a number": ("FROM:<> SIZE=", "501 5.5.4 Expected SIZE=octets, got ''"),
    "SIZE without a value": ("FROM:<> SIZE", "501 5.5.4 Expected SIZE=octets, got ''"),
    "SIZE twice": ("FROM:<> SIZE=1 size=1", "501 5.5.4 Parameter 'size' was given twice"),
    "BODY=7BIT": ("FROM:<> BODY=7BIT", MAIL_OK),
    "BODY=8BITMIME": ("FROM:<> BODY=8BITMIME", MAIL_OK),
    "BODY=BINARYMIME is not offered": (
        "FROM:<> BODY=BINARYMIME",
        "501 5.5.4 Expected BODY=7BIT or BODY=8BITMIME, got 'BINARYMIME'"),
    "BODY without a value": (
        "FROM:<> BODY", "501 5.5.4 Expected BODY=7BIT or BODY=8BITMIME, got ''"),
    "BODY twice": ("FROM:<> BODY=7BIT BODY=7BIT", "501 5.5.4 Parameter 'BODY' was given twice"),
    "SMTPUTF8 with a value": (
        "FROM:<> SMTPUTF8=yes", "501 5.5.4 Expected SMTPUTF8 without a value"),
    "SMTPUTF8 twice": (
        "FROM:<> SMTPUTF8 SMTPUTF8", "501 5.5.4 Parameter 'SMTPUTF8' was given twice"),
    "AUTH=<>": ("FROM:<> AUTH=<>", MAIL_OK),
    "AUTH=mailbox": ("FROM:<> AUTH=e+3Dmc2@example.com", MAIL_OK),
    "AUTH without a value": ("FROM:<> AUTH", "501 5.5.4 Expected AUTH=mailbox or AUTH=<>"),
    "all parameters": ("FROM:<>  SIZE=1  BODY=8BITMIME SMTPUTF8 AUTH=<>  ", MAIL_OK),
    "an unknown parameter": (
        "FROM:<> RET=HDRS",
        "555 5.5.4 Unknown parameter 'RET': expected SIZE, BODY, SMTPUTF8 or AUTH"),
    "an unknown parameter without a value": (
        "FROM:<> FOO", "555 5.5.4 Unknown parameter 'FOO': expected SIZE, BODY, SMTPUTF8 or AUTH"),
}

_NO_RECIPIENT = "501 5.5.4 Expected RCPT TO:<address>, got 'RCPT "
_NO_MAILBOX = "501 5.1.3 Expected local-part@domain, got "

# what follows RCPT, and the reply
RCPT_ARGUMENTS = {
    "a mailbox": ("TO:<b@mailtest.example>", RCPT_OK),
    "a blank after the colon": ("TO: <b@mailtest.example>", RCPT_OK),
    "blanks after it": ("TO:<b@mailtest.example>  ", RCPT_OK),
    "postmaster": ("TO:<Postmaster>", RCPT_OK),
    "quoted": (r'TO:<"b \"c\""@mailtest.example>', RCPT_OK),
    "an IPv4 literal": ("TO:<b@[127.0.0.1]>", RCPT_OK),
    "an IPv6 literal": ("TO:<b@[IPv6:::1]>", RCPT_OK),
    "a source route": ("TO:<@a.example,@b.example:b@mailtest.example>", RCPT_OK),
    "nobody": ("TO:<>", _NO_RECIPIENT + "TO:<>'"),
    "a source route to nobody": ("TO:<@a.example:>", _NO_RECIPIENT + "TO:<@a.example:>'"),
    "nothing": ("", _NO_RECIPIENT + "'"),
    "no colon": ("TO b@x.example", _NO_RECIPIENT + "TO b@x.example'"),
    "FROM": ("FROM:<b@x.example>", _NO_RECIPIENT + "FROM:<b@x.example>'"),
    "no brackets": ("TO:b@x.example", _NO_RECIPIENT + "TO:b@x.example'"),
    "no closing bracket": ("TO:<b@x.example", _NO_RECIPIENT + "TO:<b@x.example'"),
    "two recipients": ("TO:<b@x.example>,<c@x.example>",
                       _NO_RECIPIENT + "TO:<b@x.example>,<c@x.example>'"),
    "a local-part alone": ("TO:<root>", _NO_MAILBOX + "'root'"),
    "an empty domain": ("TO:<b@>", _NO_MAILBOX + "'b@'"),
    "a domain that is none": ("TO:<b@-x>", _NO_MAILBOX + "'b@-x'"),
    "a literal that is none": ("TO:<b@[1.2.3]>", _NO_MAILBOX + "'b@[1.2.3]'"),
    "UTF-8 without SMTPUTF8 on MAIL": ("TO:<jürgen@x.example>",
                                       _NOT_ASCII + r"'j\x5cxfcrgen@x.example'"),
    "a parameter": ("TO:<b@x.example> NOTIFY=NEVER",
                    "555 5.5.4 Unknown parameter 'NOTIFY': expected none"),
    "a parameter twice": ("TO:<b@x.example> A=1 A=2", "501 5.5.4 Parameter 'A' was given twice"),
    "a control character": (r"TO:<b\x07@x.example>", NOT_CONTROL),
}

# what stands between two lines of mail data and must not end it
SMUGGLING = {
    "LF . LF": rb"\n.\n", "LF . CRLF": rb"\n.\r\n", "CRLF . LF": rb"\r\n.\n",
    "CR . CR": rb"\r.\r", "CR . CRLF": rb"\r.\r\n", "CRLF . CR": rb"\r\n.\r",
    "CR . LF": rb"\r.\n", "LF . CR": rb"\n.\r", "CRCRLF . CRCRLF": rb"\r\r\n.\r\r\n",
    "CRLF NUL . CRLF": rb"\r\n\x00.\r\n", "CRLF . NUL CRLF": rb"\r\n.\x00\r\n",
    "CRLF . SP CRLF": rb"\r\n. \r\n", "CRLF SP . CRLF": rb"\r\n .\r\n",
    "CRLF . CRCRLF": rb"\r\n.\r\r\n", "LFCR . LFCR": rb"\n\r.\n\r",
    "CRLF .. CRLF": rb"\r\n..\r\n", "CRLF . CR NUL LF": rb"\r\n.\r\x00\n",
    "LF LF . LF LF": rb"\n\n.\n\n", "CRLF U+FF0E CRLF": rb"\r\n\xef\xbc\x8e\r\n",
    "CRLF . CRLF with the high bit": rb"\x8d\x8a.\x8d\x8a",
}


def _smuggling(between):
    """The row in which a second mail is hidden behind these octets."""
    hidden = (rb"body" + between + rb"MAIL FROM:<evil@x.example>\r\nRCPT TO:<b@mailtest.example>"
              rb"\r\nDATA\r\nSubject: smuggled\r\n")
    return ("data", hidden.decode() + ".¶", QUEUED,
            re.sub(rb"(^|\\r\\n)\.", rb"\1", hidden).decode())


DIALOGUES.update(("smuggling: " + name, _smuggling(between))
                 for name, between in SMUGGLING.items())
DIALOGUES.update(("line: " + name, ("idle", line + "¶", answer))
                 for name, (line, answer) in LINES.items())
DIALOGUES.update(("MAIL: " + name, ("idle", f"MAIL {argument}¶", answer))
            for name, (argument, answer) in MAIL_ARGUMENTS.items())
DIALOGUES.update(("RCPT: " + name, ("mail", f"RCPT {argument}¶", answer))
            for name, (argument, answer) in RCPT_ARGUMENTS.items())
PLAYED = {name: (state, said, answer, kept) for name, (state, said, answer, *kept)
              in DIALOGUES.items()}


def octets(text):
    """What a text of a row stands for."""
    found = text.replace("¶", "\r\n").encode("utf-8")
    found = re.sub(rb"\{(.)\*(\d+)\}", lambda match: match[1] * int(match[2]), found)
    return re.sub(rb"\\(r|n|x[0-9a-f]{2})",
                  lambda match: {b"r": b"\r", b"n": b"\n"}.get(match[1])
                  or bytes.fromhex(match[1][1:].decode()), found)


def masked(replies):
    """Replies with the ids of messages replaced."""
    return re.sub(rb"queued as [0-9a-f-]{36}", b"queued as <id>", replies)


def new_session(policy=mailtest.SmtpPolicy(), strict=False, tls=False, **limits):
    """(clock, store, session) with small limits."""
    clock, store = store_on_clock(strict=strict, **dict(SMALL, **limits))
    return clock, store, mailtest.Session(store, policy, "192.0.2.1", tls)


def stored(store):
    """The octets of all messages, oldest first."""
    return [message.octets for message in store.messages(server="mailtest")][::-1]


CUTS = {
    "at once": lambda octets: [octets],
    "byte by byte": lambda octets: [octets[at:at + 1] for at in range(len(octets))],
}


@pytest.mark.parametrize("state, said, answer, kept", rows(PLAYED))
def test_dialogue(state, said, answer, kept):
    ends = answer.rpartition("¶")[2].startswith(("421", "221")) or not answer
    for cut in CUTS.values():
        _, store, session = new_session()
        session.receive(octets(STATES[state]))
        replies = masked(b"".join(map(session.receive, cut(octets(said)))))
        assert replies == octets(answer + "¶" * bool(answer))
        assert (stored(store), session.ended) == (list(map(octets, kept)), ends)
        assert session.receive(b"NOOP\r\n") == (b"" if ends else b"250 2.0.0 Ok\r\n")
        session.end("test")
        assert store._reserved == 0


# -- mail data

# octets as they are sent, before CRLF.CRLF or the dot that ends nothing else
ENDINGS = {
    "an empty mail": (b".\r\n", b""),
    "an empty line": (b"\r\n.\r\n", b"\r\n"),
    "a line": (b"x\r\n.\r\n", b"x\r\n"),
    "a stuffed dot": (b"..\r\n.\r\n", b".\r\n"),
    "a CR before CRLF": (b"x\r\r\n.\r\n", b"x\r\r\n"),
    "a dot and CR before it": (b"x\r\n.\r\r\n.\r\n", b"x\r\n\r\r\n"),
    "dots without end": (b"\r\n.\r.\r\n.\r\n", b"\r\n\r.\r\n"),
}


@pytest.mark.parametrize("sent, kept", rows(ENDINGS))
def test_end_of_data_in_every_cut(sent, kept):
    _, store, session = new_session()
    session.receive(b"EHLO client.example\r\n")
    cuts = [places for count in range(len(sent)) for places in
            itertools.combinations(range(1, len(sent)), count)]
    for places in cuts:
        session.receive(b"MAIL FROM:<>\r\nRCPT TO:<b@mailtest.example>\r\nDATA\r\n")
        edges = (0,) + places + (len(sent),)
        replies = [session.receive(sent[start:end]) for start, end in zip(edges, edges[1:])]
        assert b"".join(replies[:-1]) == b""
        assert masked(replies[-1]) == b"250 2.0.0 Ok: queued as <id>\r\n"
        message = store.messages(server="mailtest")[0]
        assert message.octets == kept
        store.delete(message.id)
    assert len(cuts) == 2 ** (len(sent) - 1)


@pytest.mark.parametrize("cut", rows({
    "at once": (b"",), "after CRLF": (b"\r\n",), "after CRLF.": (b"\r\n.",),
    "after CRLF.CR": (b"\r\n.\r",)}))
def test_mail_of_exactly_the_largest_size_is_taken_however_it_is_cut(cut):
    _, store, session = new_session(max_size=100)
    session.receive(b"EHLO x\r\nMAIL FROM:<> SIZE=100\r\nRCPT TO:<b@x.example>\r\nDATA\r\n")
    assert session.receive(b"x" * 98 + cut) == b""
    assert masked(session.receive(b"\r\n.\r\n"[len(cut):])) == b"250 2.0.0 Ok: queued as <id>\r\n"
    assert stored(store) == [b"x" * 98 + b"\r\n"]


def test_mail_one_octet_larger_is_refused_however_it_is_cut():
    for cut in CUTS.values():
        _, store, session = new_session(max_size=100)
        session.receive(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@x.example>\r\nDATA\r\n")
        assert b"".join(map(session.receive, cut(b"x" * 99 + b"\r\n.\r\n"))) == (
            b"552 5.3.4 Message too large: expected at most 100 octets (--max-size)\r\n")
        assert stored(store) == []


def test_doubled_dots_do_not_count_as_size():
    _, store, session = new_session(max_size=100)
    session.receive(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@x.example>\r\nDATA\r\n")
    assert session.receive(b"..\r\n" * 26 + b".\r\n").startswith(b"250 2.0.0 Ok: queued as ")
    assert stored(store) == [b".\r\n" * 26]


@pytest.mark.parametrize("cut", CUTS.values(), ids=list(CUTS))
def test_dot_doubled_after_a_bare_lf_is_undone_like_others(cut):
    _, store, session = new_session()
    session.receive(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@x.example>\r\nDATA\r\n")
    for piece in cut(b"a\n..env\n.z\n.\n\r\n..y\r\n.\r\n"):       # smtplib doubles after either
        session.receive(piece)
    assert stored(store) == [b"a\n.env\n.z\n.\n\r\n.y\r\n"]


def test_every_octet_is_kept_through_data_and_bdat():
    octets = bytes(range(256)) * 4
    for said in (b"DATA\r\n" + octets + b"\r\n.\r\n",
                 b"BDAT %d LAST\r\n" % (len(octets) + 2) + octets + b"\r\n"):
        _, store, session = new_session()
        session.receive(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@x.example>\r\n")
        for piece in CUTS["byte by byte"](said):
            session.receive(piece)
        assert stored(store) == [octets + b"\r\n"]


def test_memory_that_is_full_is_told_at_the_end_of_the_data():
    _, store, session = new_session(max_size=10_000, max_memory=4_000, reserve_step=1_000)
    session.receive(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@x.example>\r\nDATA\r\n")
    assert session.receive(b"x" * 3_000) == b""
    assert store.counters()["octets"] == 3_000
    assert session.receive(b"x" * 3_000) == b""
    assert store.counters()["octets"] == 0       # it is refused already: nothing is held
    assert session.receive(b"x\r\n.\r\nNOOP\r\n") == (
        b"452 4.3.1 Out of memory: the 4000 octets of --max-memory are in use\r\n250 2.0.0 Ok\r\n")
    assert (stored(store), store.counters()["octets"]) == ([], 0)


def test_memory_that_is_full_at_the_last_moment():
    _, store, session = new_session(max_memory=1_000)
    assert session.receive(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@x.example>\r\nDATA\r\nx\r\n.\r\n"
                           b"NOOP\r\n").splitlines()[-2:] == [
        b"452 4.3.1 Not stored: the 1000 octets of --max-memory are in use", b"250 2.0.0 Ok"]
    assert store.counters()["octets"] == 0


def test_memory_that_is_full_in_a_chunk():
    _, store, session = new_session(max_size=10_000, max_memory=4_000, reserve_step=1_000)
    session.receive(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@x.example>\r\n")
    assert session.receive(b"BDAT 6000\r\n" + b"x" * 6_000 + b"BDAT 5 LAST\r\nxxxxxNOOP\r\n") == (
        b"452 4.3.1 Out of memory: the 4000 octets of --max-memory are in use\r\n"
        b"503 5.5.1 Send MAIL first\r\n250 2.0.0 Ok\r\n")
    assert store.counters()["octets"] == 0


ABORTS = {
    "RSET between chunks": (b"BDAT 2500\r\n" + b"x" * 2_500 + b"RSET\r\n",),
    "EHLO between chunks": (b"BDAT 2500\r\n" + b"x" * 2_500 + b"EHLO x\r\n",),
    "QUIT between chunks": (b"BDAT 2500\r\n" + b"x" * 2_500 + b"QUIT\r\n",),
    "the end of the session within the data": (b"DATA\r\n" + b"x" * 2_500,),
    "the end of the session within a chunk": (b"BDAT 5000\r\n" + b"x" * 2_500,),
}


@pytest.mark.parametrize("said", rows(ABORTS))
def test_reserved_memory_is_given_back_after(said):
    _, store, session = new_session(max_size=10_000, reserve_step=1_000)
    session.receive(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@x.example>\r\n" + said)
    session.end("left without QUIT")
    assert (store.counters()["octets"], stored(store)) == (0, [])


def test_overlong_line_is_not_kept_while_it_arrives():
    _, _, session = new_session()
    assert session.receive(b"x" * 65_536) == (       # at once
        b"500 5.5.2 Line too long: expected at most 1065 octets with CRLF\r\n")
    for _ in range(50):
        assert (session.receive(b"x" * 65_536), session._buffer) == (b"", b"")
    assert session.receive(b"\r\nNOOP\r\n") == b"250 2.0.0 Ok\r\n"


# -- envelope

def test_envelope_is_kept_beside_the_mail():
    _, store, session = new_session(tls=True)
    session.receive(b"EHLO [192.0.2.9]\r\nAUTH PLAIN AGFsaWNlAHNlY3JldA==\r\n"
                    b"MAIL FROM:<\"A b\"@Client.example> BODY=8BITMIME\r\n"
                    b"RCPT TO:<@route.example:B@mailtest.example>\r\nRCPT TO:<c@x.example>\r\n"
                    b"BDAT 1 LAST\r\nx")
    assert store.messages(server="mailtest")[0].envelope == mailtest.Envelope(
        '"A b"@Client.example', ("B@mailtest.example", "c@x.example"), "[192.0.2.9]", "192.0.2.1",
        "alice", True, True)


def test_envelope_without_anything_special():
    _, store, session = new_session()
    session.receive(b"HELO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@x.example>\r\nBDAT 1 LAST\r\nx")
    assert store.messages(server="mailtest")[0].envelope == mailtest.Envelope(
        "", ("b@x.example",), "x", "192.0.2.1", "", False, False)


def test_recipient_that_is_given_twice_gets_one_mail():
    _, store, session = new_session()
    session.receive(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@x.example>\r\nRCPT TO:<B@X.example>\r\n"
                    b"BDAT 1 LAST\r\nx")
    message, = store.messages("b@x.example")
    assert message.envelope.forward_paths == ("b@x.example", "B@X.example")


def test_id_in_the_reply_is_the_message():
    _, store, session = new_session()
    reply = session.receive(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@x.example>\r\nBDAT 1 LAST\r\nx")
    assert store.message(reply.split()[-1].decode()).octets == b"x"


def test_utf8_recipient_needs_smtputf8_on_mail():
    _, store, session = new_session()
    replies = session.receive("EHLO x\r\nMAIL FROM:<> SMTPUTF8\r\n"
                              "RCPT TO:<jürgen@exämple.example>\r\nBDAT 1 LAST\r\nx".encode())
    assert masked(replies).splitlines()[-3:] == [
        b"250 2.1.0 Ok", b"250 2.1.5 Ok", b"250 2.0.0 Ok: queued as <id>"]
    message, = store.messages("JÜRGEN@xn--exmple-cua.example")
    assert message.envelope.utf8


# -- AUTH with credentials, and what is told of it

ALICE = mailtest.SmtpPolicy(users={"alice": "secret", "carol": "other"})
REFUSED_AUTH = b"535 5.7.8 Expected a user and password of --auth\r\n"


def b64(text):
    return base64.b64encode(text.encode())


# what is sent after EHLO, whether these are the credentials
CREDENTIALS = {
    "PLAIN": (b"AUTH PLAIN " + b64("\0alice\0secret"), True),
    "PLAIN with an identity": (b"AUTH PLAIN " + b64("bob\0alice\0secret"), True),
    "PLAIN, wrong password": (b"AUTH PLAIN " + b64("\0alice\0Secret"), False),
    "PLAIN, no password": (b"AUTH PLAIN " + b64("\0alice\0"), False),
    "PLAIN, wrong user": (b"AUTH PLAIN " + b64("\0bob\0secret"), False),
    "PLAIN, user beyond ASCII": (b"AUTH PLAIN " + b64("\0älice\0secret"), False),
    "PLAIN, user that is not UTF-8": (
        b"AUTH PLAIN " + base64.b64encode(b"\0\xff\0secret"), False),
    "PLAIN, another user's password": (b"AUTH PLAIN " + b64("\0alice\0other"), False),
    "XOAUTH2": (b"AUTH XOAUTH2 " + b64("user=alice\1auth=Bearer secret\1\1"), True),
    "XOAUTH2, wrong token": (b"AUTH XOAUTH2 " + b64("user=alice\1auth=Bearer x\1\1"), False),
    "LOGIN": (b"AUTH LOGIN\r\n" + b64("alice") + b"\r\n" + b64("secret"), True),
    "LOGIN with the user at once": (
        b"AUTH LOGIN " + b64("alice") + b"\r\n" + b64("secret"), True),
    "LOGIN, wrong password": (b"AUTH LOGIN\r\n" + b64("alice") + b"\r\n" + b64("x"), False),
    "LOGIN, empty password": (b"AUTH LOGIN\r\n" + b64("alice") + b"\r\n", False),
    "LOGIN, wrong user": (b"AUTH LOGIN\r\n" + b64("bob") + b"\r\n" + b64("secret"), False),
}


@pytest.mark.parametrize("cut", rows(CUTS))
@pytest.mark.parametrize("said, right", rows(CREDENTIALS))
def test_credentials(said, right, cut):
    _, _, session = new_session(ALICE)
    session.receive(b"EHLO x\r\n")
    reply = b"".join(map(session.receive, cut(said + b"\r\n"))).splitlines(True)[-1]
    assert reply == (b"235 2.7.0 Authenticated\r\n" if right else REFUSED_AUTH)
    assert session.user == ("alice" if right else "")
    again = session.receive(b"AUTH PLAIN " + b64("\0alice\0secret") + b"\r\n")
    assert again == (b"503 5.5.1 Already authenticated\r\n" if right else
                     b"235 2.7.0 Authenticated\r\n")


@pytest.mark.parametrize("user, password, right", rows({
    "right": ("alice", "secret", True), "wrong password": ("alice", "x", False),
    "wrong user": ("bob", "secret", False)}))
def test_credentials_by_cram_md5(user, password, right):
    _, _, session = new_session(ALICE)
    session.receive(b"EHLO x\r\n")
    challenge = base64.b64decode(session.receive(b"AUTH CRAM-MD5\r\n")[4:])
    assert re.fullmatch(rb"<[^<>@ ]{16,}@mailtest>", challenge)      # a msg-id (RFC 2195 2)
    digest = hmac.new(password.encode(), challenge, "md5").hexdigest()
    assert session.receive(b64(f"{user} {digest}") + b"\r\n") == (
        b"235 2.7.0 Authenticated\r\n" if right else REFUSED_AUTH)


# what a policy requires, what is said, and the codes that come back
REQUIRED = {
    "auth": (("auth",), ["EHLO x", "MAIL FROM:<>", "AUTH PLAIN AGEAYg==", "MAIL FROM:<>"],
             ["530 5.7.0 Send AUTH first (--require auth)", "235 2.7.0 Authenticated",
              "250 2.1.0 Ok"]),
    "tls": (("tls",), ["EHLO x", "MAIL FROM:<>", "AUTH PLAIN AGEAYg==", "NOOP"],
            ["530 5.7.0 Send STARTTLS first (--require tls)"] * 2 + ["250 2.0.0 Ok"]),
    "both": (("auth", "tls"), ["EHLO x", "MAIL FROM:<>"],
             ["530 5.7.0 Send STARTTLS first (--require tls)"]),
}


@pytest.mark.parametrize("kinds, said, answers", rows(REQUIRED))
def test_what_is_required_before_mail(kinds, said, answers):
    _, _, session = new_session(mailtest.SmtpPolicy(starttls=True, require=kinds))
    assert say(session, *said)[1:] == answers


def test_user_is_taken_of_several():
    for user, password in ALICE.users.items():
        _, store, session = new_session(ALICE)
        say(session, "EHLO x", "AUTH PLAIN " + b64(f"\0{user}\0{password}").decode(),
            "MAIL FROM:<>", "RCPT TO:<b@x.example>", "BDAT 0 LAST")
        assert store.messages("b@x.example")[0].envelope.user == user


def test_cram_md5_without_a_digest():
    _, _, session = new_session(ALICE)
    session.receive(b"EHLO x\r\nAUTH CRAM-MD5\r\n")
    assert session.receive(b64("alice") + b"\r\n") == (
        b"501 5.5.2 Expected base64 of user, blank, digest\r\n")


def test_cram_md5_never_challenges_twice_alike():
    challenges = set()
    for _ in range(20):
        _, _, session = new_session()
        challenges.add(session.receive(b"EHLO x\r\nAUTH CRAM-MD5\r\n").splitlines()[-1])
    assert len(challenges) == 20


SECRETS = {
    "PLAIN at once": (b"AUTH PLAIN AGFsaWNlAHNlY3JldA==",),
    "PLAIN": (b"AUTH PLAIN\r\nAGFsaWNlAHNlY3JldA==",),
    "in lower case with many blanks": (b"auth   plain   AGFsaWNlAHNlY3JldA==",),
    "an unknown mechanism": (b"AUTH DIGEST-MD5 AGFsaWNlAHNlY3JldA==",),
    "behind a TAB": (b"AUTH PLAIN\tAGFsaWNlAHNlY3JldA==",),
    "with a NUL": (b"AUTH PLAIN AGFsaWNlAHNlY3JldA==\0",),
    "behind a blank": (b" AUTH PLAIN AGFsaWNlAHNlY3JldA==",),
    "LOGIN": (b"AUTH LOGIN\r\nYWxpY2U=\r\nAGFsaWNlAHNlY3JldA==",),
    "before EHLO": (b"QUIT x\r\nAUTH PLAIN AGFsaWNlAHNlY3JldA==",),
    "without a mechanism": (b"AUTH AGFsaWNlAHNlY3JldA==",),
}


@pytest.mark.parametrize("said", rows(SECRETS))
def test_secrets_are_in_no_record_and_no_reply(said):
    _, store, session = new_session()
    greeting = b"" if b"QUIT" in said else b"EHLO x\r\n"
    replies = session.receive(greeting + said + b"\r\nMAIL FROM:<>\r\n"
                              b"RCPT TO:<b@x.example>\r\nBDAT 1 LAST\r\nx")
    session.end("left without QUIT")
    records = [replies, repr(store.sessions()).encode()]
    records += [message.transcript() for message in store.messages(server="mailtest")]
    assert not [record for record in records if b"AGFsaWNl" in record or b"secret" in record]


# -- STARTTLS

def test_starttls_is_offered_and_forgets_what_was_said_before():
    _, store, session = new_session(mailtest.SmtpPolicy(starttls=True))
    assert session.receive(b"EHLO x\r\n").splitlines()[1] == b"250-STARTTLS"
    session.receive(b"AUTH PLAIN AGFsaWNlAHNlY3JldA==\r\n"
                    b"MAIL FROM:<>\r\nRCPT TO:<b@x.example>\r\n")
    assert session.receive(b"STARTTLS\r\nNOOP\r\nRSET\r\n") == b"220 2.0.0 Go ahead\r\n"
    assert session.wants_tls
    session.tls_started()
    assert (session.wants_tls, session.tls, session.helo, session.user) == (False, True, "", "")
    assert session.receive(b"DATA\r\n") == b"503 5.5.1 Send EHLO first\r\n"
    assert b"STARTTLS" not in session.receive(b"EHLO x\r\n")
    assert session.receive(b"STARTTLS\r\n") == b"503 5.5.1 TLS has begun already\r\n"
    assert session.receive(b"RCPT TO:<b@x.example>\r\n") == b"503 5.5.1 Send MAIL first\r\n"


def test_starttls_in_the_middle_of_a_chunked_mail_gives_its_memory_back():
    _, store, session = new_session(mailtest.SmtpPolicy(starttls=True), reserve_step=10)
    session.receive(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@x.example>\r\nBDAT 50\r\n" + b"x" * 50)
    assert session.receive(b"STARTTLS\r\n") == b"220 2.0.0 Go ahead\r\n"
    session.tls_started()
    assert store.counters()["octets"] == 0


def test_starttls_with_an_argument():
    _, _, session = new_session(mailtest.SmtpPolicy(starttls=True))
    assert session.receive(b"STARTTLS now\r\n") == (
        b"501 5.5.4 Expected STARTTLS alone, got 'now' after it\r\n")
    assert not session.wants_tls


def test_starttls_needs_no_ehlo():
    _, _, session = new_session(mailtest.SmtpPolicy(starttls=True))
    assert session.receive(b"STARTTLS\r\n") == b"220 2.0.0 Go ahead\r\n"


# -- strict mode, scripted failures

def test_strict_mode_refuses_who_was_not_acquired():
    clock, store, session = new_session(strict=True)
    address = store.acquire().address
    session.receive(b"EHLO x\r\nMAIL FROM:<>\r\n")
    assert session.receive(b"RCPT TO:<b@x.example>\r\n") == (
        b"550 5.1.1 'b@x.example': no such inbox; acquire it first (--strict)\r\n")
    assert session.receive(b"RCPT TO:<Postmaster>\r\n") == (
        b"550 5.1.1 'Postmaster': no such inbox; acquire it first (--strict)\r\n")
    assert session.receive(f"RCPT TO:<{address.upper()}>\r\n".encode()) == b"250 2.1.5 Ok\r\n"
    clock.now += 600.0
    assert session.receive(f"RCPT TO:<{address}>\r\n".encode()) == (
        f"550 5.1.1 '{address}': the inbox '{address.lower()}' expired at 1970-01-01T00:26:40."
        "000000+00:00; acquire a new one\r\n").encode()


def say(session, *lines):
    """The replies to these lines, one by one, without ids."""
    return [masked(session.receive(line.encode() + b"\r\n")).decode().rstrip() for line in lines]


def test_recipient_fails_twice_and_is_then_accepted_and_attempts_are_counted():
    _, store, session = new_session()
    bob, alice = failing(store, "rcpt:451*2"), store.acquire().address
    say(session, "EHLO x", "MAIL FROM:<a@x.example>")
    to_bob, to_alice = f"RCPT TO:<{bob}>", f"RCPT TO:<{alice}>"
    assert say(session, to_bob, to_alice, to_bob, to_bob) == [
        "451 4.0.0 Scripted: fail=rcpt:451*2", "250 2.1.5 Ok",
        "451 4.0.0 Scripted: fail=rcpt:451*2", "250 2.1.5 Ok"]
    assert say(session, "BDAT 0 LAST") == ["250 2.0.0 Ok: queued as <id>"]
    assert store.inbox(bob)[3:6] == (1, 3, (("rcpt:451*2", 2, 0),))
    assert store.inbox(alice)[3:6] == (1, 1, ())


def test_refused_recipient_gets_no_mail_though_others_do():
    _, store, session = new_session()
    bob = failing(store, "rcpt:550*9")
    say(session, "EHLO x", "MAIL FROM:<a@x.example>", f"RCPT TO:<{bob}>", "RCPT TO:<c@x.example>",
        "BDAT 0 LAST")
    assert (store.inbox(bob).count, store.inbox("c@x.example").count) == (0, 1)


# what the inbox is told, then the replies to MAIL from it, RCPT to it, DATA, and its end
SCRIPTED = {
    "mail": ("mail:452", ["452 4.0.0 Scripted: fail=mail:452", "503 5.5.1 Send MAIL first",
                          "503 5.5.1 Send MAIL first", ""]),
    "rcpt": ("rcpt:550", ["250 2.1.0 Ok", "550 5.0.0 Scripted: fail=rcpt:550",
                          "503 5.5.1 Send RCPT first: no recipient was accepted", ""]),
    "data": ("data:554", ["250 2.1.0 Ok", "250 2.1.5 Ok", "354 End data with <CR><LF>.<CR><LF>",
                          "554 5.0.0 Scripted: fail=data:554"]),
    "drop at mail": ("mail:drop", ["", "", "", ""]),
    "drop at rcpt": ("rcpt:drop", ["250 2.1.0 Ok", "", "", ""]),
    "drop at data": ("data:drop", ["250 2.1.0 Ok", "250 2.1.5 Ok",
                                   "354 End data with <CR><LF>.<CR><LF>", ""]),
}


@pytest.mark.parametrize("script, replies", rows(SCRIPTED))
def test_scripted_failure(script, replies):
    _, store, session = new_session()
    address = failing(store, script)
    said = ["MAIL FROM:<%s>" % address, "RCPT TO:<%s>" % address, "DATA"]
    say(session, "EHLO x")
    seen = say(session, *said)
    seen += say(session, "x\r\n.") if seen[-1].startswith("354") else [""]
    assert seen == replies
    assert session.ended is script.endswith("drop")
    assert stored(store) == [] and store.counters()["octets"] == store._cost(address)
    if session.ended:
        assert store.sessions()[0].ending == f"dropped by fail={script}"
        session = mailtest.Session(store, client="192.0.2.1")
        say(session, "EHLO x")
    say(session, "RSET", *said)
    assert say(session, "x\r\n.") == ["250 2.0.0 Ok: queued as <id>"]    # once, then never again


def test_scripted_failure_at_mail_counts_as_an_attempt():
    _, store, session = new_session()
    address = failing(store, "mail:451")
    say(session, "EHLO x", f"MAIL FROM:<{address}>", f"MAIL FROM:<{address}>")
    assert store.inbox(address).attempts == 1


def test_scripted_delay_holds_what_follows_until_it_is_over():
    _, store, session = new_session()
    address = failing(store, "rcpt:delay=2.5")
    said = f"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<{address}>\r\nDATA\r\n".encode()
    assert session.receive(said).splitlines()[-2:] == [b"250 2.1.0 Ok", b"250 2.1.5 Ok"]
    assert session.pause == 2.5
    assert session.receive(b"x\r\n.\r\n") == b""        # what arrives meanwhile waits too
    assert masked(session.resume()) == (
        b"354 End data with <CR><LF>.<CR><LF>\r\n250 2.0.0 Ok: queued as <id>\r\n")


def test_scripted_delays_of_a_session_are_bounded_together():
    _, store, session = new_session(script_delay=60.0)
    address = failing(store, "rcpt:delay=50*9")
    say(session, "EHLO x", "MAIL FROM:<>")
    pauses = []
    for _ in range(4):
        session.receive(f"RCPT TO:<{address}>\r\n".encode())
        pauses.append(session.pause)
        session.resume()
    assert pauses == [50.0, 10.0, 0.0, 0.0]


# -- records

@pytest.mark.parametrize("lines, ending, kept", rows({
    "EHLO and QUIT": (["EHLO x", "QUIT"], "", 0), "HELO and QUIT": (["helo x", "quit"], "", 0),
    "QUIT": (["QUIT"], "", 0), "not a word": ([], "left without QUIT", 0),
    "a reset": ([], mailtest.BROKE, 0), "EHLO alone": (["EHLO x"], "left without QUIT", 1),
    "NOOP": (["NOOP", "QUIT"], "", 1), "silence": ([], "Silent for too long", 1)}))
def test_health_check_is_no_session_to_remember(lines, ending, kept):
    _, store, session = new_session()
    session.greet()
    say(session, *lines)
    session.end(ending)
    assert len(store.sessions()) == kept


@pytest.mark.parametrize("line", rows({
    "LF": b"NOOP\nS: 250 forged", "U+2028": "HELO x\u2028S: 250 forged".encode(),
    "NEL": "HELO x\x85S: 250 forged".encode(), "FS": b"NOOP \x1cS: 250 forged"}))
def test_no_command_forges_a_line_of_the_transcript(line):
    _, store, session = new_session()
    say(session, "EHLO x")
    session.receive(line + b"\r\n")
    session.end("left without QUIT")
    text = store.sessions()[0].transcript.decode()
    assert not [each for each in text.splitlines() if each.startswith("S: 250 forged")]
    assert text.splitlines() == text.split("\r\n")[:-1]


def test_session_is_recorded():
    clock, store, session = new_session(tls=True)
    session.greet()
    clock.now += 1
    say(session, "EHLO x", "AUTH PLAIN AGFsaWNlAHNlY3JldA==", "MAIL FROM:<>", "RCPT TO:<nobody>",
        "RCPT TO:<b@x.example>", "BDAT 0 LAST", "QUIT")
    record, = store.sessions()
    assert record._replace(transcript=b"") == mailtest.SessionRecord(
        1, "192.0.2.1", "x", "alice", True, 1_000.0, 1_001.0, 1,
        "501 5.1.3 Expected local-part@domain, got 'nobody'", "quit", b"")
    assert masked(record.transcript).decode() == (
        "S: 220 mailtest.example ESMTP mailtest\r\n"
        "C: EHLO x\r\n"
        "S: 250-mailtest.example\r\nS: 250-SIZE 2000\r\nS: 250-8BITMIME\r\n"
        "S: 250-SMTPUTF8\r\nS: 250-PIPELINING\r\nS: 250-ENHANCEDSTATUSCODES\r\n"
        "S: 250-CHUNKING\r\nS: 250-AUTH PLAIN LOGIN CRAM-MD5 XOAUTH2\r\nS: 250 HELP\r\n"
        "C: AUTH PLAIN ********\r\n"
        "S: 235 2.7.0 Authenticated\r\n"
        "C: MAIL FROM:<>\r\n"
        "S: 250 2.1.0 Ok\r\n"
        "C: RCPT TO:<nobody>\r\n"
        "S: 501 5.1.3 Expected local-part@domain, got 'nobody'\r\n"
        "C: RCPT TO:<b@x.example>\r\n"
        "S: 250 2.1.5 Ok\r\n"
        "C: BDAT 0 LAST\r\n"
        "C: (0 octets of mail data)\r\n"
        "S: 250 2.0.0 Ok: queued as <id>\r\n"
        "C: QUIT\r\n"
        "S: 221 2.0.0 Bye\r\n")


def transcript(store):
    """The lines of the newest message's transcript that the client said."""
    lines = store.messages(server="mailtest")[0].transcript().decode().splitlines()
    return [line[3:] for line in lines if line.startswith("C: ")]


def test_message_knows_how_it_came():
    _, store, session = new_session()
    say(session, "EHLO x", "MAIL FROM:<>", "RCPT TO:<b@x.example>", "DATA", "first\r\n.",
        "MAIL FROM:<c@x.example>", "RCPT TO:<d@x.example>", "DATA", "second\r\n.")
    assert transcript(store) == ["EHLO x", "MAIL FROM:<c@x.example>", "RCPT TO:<d@x.example>",
                                 "DATA", "(8 octets of mail data)"]
    last = store.messages(server="mailtest")[0].transcript().splitlines()[-1]
    assert masked(last) == b"S: 250 2.0.0 Ok: queued as <id>"


def test_message_knows_how_it_came_even_when_mail_was_said_twice():
    _, store, session = new_session()
    say(session, "EHLO x", "MAIL FROM:<>", "RCPT TO:<b@x.example>", "MAIL FROM:<>", "DATA",
        "x\r\n.")
    assert transcript(store) == ["EHLO x", "MAIL FROM:<>", "RCPT TO:<b@x.example>", "MAIL FROM:<>",
                                 "DATA", "(3 octets of mail data)"]


def test_transcript_is_bounded():
    _, store, session = new_session(transcript_lines=5)
    say(session, "EHLO x", *["NOOP"] * 20, "QUIT")
    lines = store.sessions()[0].transcript.splitlines()
    assert lines[-1] == b"(further lines were not kept)"
    assert lines.count(b"C: NOOP") <= 2


def test_transcript_of_many_transactions_is_bounded():
    _, store, session = new_session()
    for _ in range(200):
        say(session, "HELO x", "MAIL FROM:<>", "RSET")
    session.end("left without QUIT")
    lines = store.sessions()[0].transcript.splitlines()
    assert len(lines) == 2 + 200 + 4     # up to the first MAIL; between; since the latest one
    assert lines[-2:] == [b"C: RSET", b"S: 250 2.0.0 Ok"]


def test_overlong_line_is_not_in_the_transcript():
    _, store, session = new_session()
    say(session, "x" * 2_000, "QUIT")
    assert store.sessions()[0].transcript.startswith(b"C: (a line that is too long)\r\nS: 500 ")


ENDINGS_OF_SESSIONS = {
    "quit": (["EHLO x", "NOOP", "QUIT"], "quit", False),
    "something refused": (["FOO", "QUIT"], "quit", True),
    "left": (["EHLO x"], "left without QUIT", True),
    "left in the data": (
        ["EHLO x", "MAIL FROM:<>", "RCPT TO:<b@x.example>", "DATA", "x"],
        "left without QUIT, 3 octets into the mail data", True),
    "left in a chunk": (
        ["EHLO x", "MAIL FROM:<>", "RCPT TO:<b@x.example>", "BDAT 99", "xx"],
        "left without QUIT, 4 octets into the mail data", True),
    "left after a mail": (
        ["EHLO x", "MAIL FROM:<>", "RCPT TO:<b@x.example>", "DATA", "."],
        "left without QUIT", False),
}


@pytest.mark.parametrize("lines, ending, is_event", rows(ENDINGS_OF_SESSIONS))
def test_end_of_a_session_is_recorded(lines, ending, is_event):
    _, store, session = new_session()
    say(session, *lines)
    session.end("left without QUIT")
    session.end("once is enough")
    record, = store.sessions()
    assert record.ending == ending
    events = [event.data for event in store.events(0, 0.0)[0] if event.kind == "session"]
    assert events == [{"number": 1, "client": "192.0.2.1", "refused": record.refused,
                       "ending": ending}] * is_event


def test_session_that_is_refused_from_our_side():
    _, store, session = new_session()
    assert session.refuse(421, "4.3.2", "Shutting down") == (
        b"421 4.3.2 Shutting down\r\n")
    assert session.ended and session.cut_off
    assert store.sessions()[0][8:10] == ("421 4.3.2 Shutting down", "Shutting down")


def test_cut_off_tells_whether_the_client_may_still_be_talking():
    for said, cut_off in ((b"QUIT\r\n", False), (b"QUIT\r\nNOOP\r\n", True),
                          (b"GET / HTTP/1.1\r\n", True)):
        _, _, session = new_session()
        session.receive(said)
        assert (session.ended, session.cut_off) == (True, cut_off)


# -- replies

def test_replies_are_ascii_lines_of_512_octets_at_most():
    long = "ü" * 400
    for said in (f"FOO{long}", f"MAIL FROM:<{long}", f"MAIL FROM:<a@{long}>", f"NOOP {long}",
                 f"MAIL FROM:<> {long}", f"VRFY {long}", f"AUTH {long}", f"BDAT {long}"):
        _, _, session = new_session()
        session.receive(b"EHLO x\r\n")
        reply = session.receive(said.encode() + b"\r\n")
        assert reply.isascii() and all(len(line) <= 512 for line in reply.splitlines(True))


def test_every_reply_but_greetings_and_challenges_has_an_enhanced_status_code():
    shape = re.compile(r"[245]\d\d[ -](?P<status>[245]\.\d{1,3}\.\d{1,3} )?")
    for _, _, answer, *_ in DIALOGUES.values():
        for line in answer.split("¶"):
            if line and not line.startswith(("250-", "334", "354", "250 mailtest", "250 HELP")):
                match = shape.match(line)
                assert match and match["status"] and match["status"][0] == line[0], line



def test_help_knows_every_command():
    assert sorted(mailtest.COMMANDS) == sorted(
        b"EHLO HELO MAIL RCPT DATA BDAT RSET NOOP VRFY HELP QUIT STARTTLS AUTH".split())


def test_line_with_a_bare_lf_is_refused_before_its_end_comes():
    _, store = store_on_clock()
    session = mailtest.Session(store)
    session.greet()
    refusal = f"{NOT_CONTROL}\r\n".encode()
    assert session.receive(b"EHLO x\n") == refusal
    assert session.receive(b"MAIL FROM:<a@b.example>\nRSET") == b""
    assert session.receive(b"\r\n") == b""           # one line, one reply
    assert session.receive(b"NOOP\r\n") == b"250 2.0.0 Ok\r\n"


# ---- Network ---------------------------------------------------------------

CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBqzCCAVKgAwIBAgIUaSm8rt2h32qU9Gr7TlBy6bTjWFwwCgYIKoZIzj0EAwIw
EzERMA8GA1UEAwwIbWFpbHRlc3QwIBcNMjYxMTIxMDYxNDA3WhgPMjEyNjEwMjgw
NjE0MDdaMBMxETAPBgNVBAMMCG1haWx0ZXN0MFkwEwYHKoZIzj0CAQYIKoZIzj0D
AQcDQgAEaMg8fKIG/Jfq0I0sw5Ddoj9qkGAOyMGy/92d9UfYhTyLUYpW7tB3hWGE
50XzRhqiusH+1dM9dsgf5o1nagZ4GKOBgTB/MB0GA1UdDgQWBBRZPPUrnc8iEzhS
U6OxqOSDTRaY3DAfBgNVHSMEGDAWgBRZPPUrnc8iEzhSU6OxqOSDTRaY3DAPBgNV
HRMBAf8EBTADAQH/MCwGA1UdEQQlMCOCCWxvY2FsaG9zdIcEfwAAAYcQAAAAAAAA
AAAAAAAAAAAAATAKBggqhkjOPQQDAgNHADBEAiAoiuameawlEKoNqRSWaHUdxD58
0/08WtcQEhOwHvWipwIgICKiPgg4bUCelJXGqXrCFrbtidfxkvY7ZwQfV0moAls=
-----END CERTIFICATE-----
"""

KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgetsiGyTYAedqax4y
c4/QRMG5WXdlCtQc1ZRpf/YWyuKhRANCAARoyDx8ogb8l+rQjSzDkN2iP2qQYA7I
wbL/3Z31R9iFPItRilbu0HeFYYTnRfNGGqK6wf7V0z12yB/mjWdqBngY
-----END PRIVATE KEY-----
"""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """The path of a file with a certificate for localhost, 127.0.0.1 and ::1, and its key."""
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    path.write_text(CERTIFICATE + KEY, encoding="ascii")
    return str(path)


@pytest.fixture
def trusting(certificate):
    """A client's TLS settings, which trust that certificate alone."""
    return ssl.create_default_context(cafile=certificate)


@pytest.fixture
def pair():
    """(our end, the peer's end): a Connection and a socket that waits ten seconds at most."""
    ours, peer = socket.socketpair()
    peer.settimeout(10)
    connection = mailtest.Connection(ours, ("192.0.2.1", 25))
    yield connection, peer
    connection.close()
    peer.close()


CLIENTS = {
    "IPv4": ("192.0.2.1", "192.0.2.1"),
    "IPv6": ("2001:db8::1", "2001:db8::1"),
    "IPv6 with a scope": ("fe80::1%eth0", "fe80::1"),
    "IPv4 on a dual-stack socket": ("::ffff:192.0.2.1", "192.0.2.1"),
}


@pytest.mark.parametrize("address, client", rows(CLIENTS))
def test_connection_names_its_client(address, client, pair):
    assert mailtest.Connection(pair[1], (address, 25)).client == client


def test_connection_that_is_dead_already_is_one_all_the_same(pair):
    """macOS: setsockopt() fails on a connection that was reset."""
    pair[1].close()
    assert mailtest.Connection(pair[1], ("192.0.2.1", 25)).is_gone()


def test_connection_receives_what_arrives_and_then_the_end(pair):
    connection, peer = pair
    peer.sendall(b"abc")
    peer.shutdown(socket.SHUT_WR)
    assert [connection.receive(2), connection.receive(), connection.receive()] == [
        b"ab", b"c", b""]


def test_connection_sends_all_parts(pair):
    connection, peer = pair
    connection.send(b"ab", b"", b"c")
    connection.shut(socket.SHUT_WR)
    assert b"".join(iter(lambda: peer.recv(9), b"")) == b"abc"


def test_connection_hangs_up_after_silence(pair):
    connection, _ = pair
    connection.set_timeout(0.001)
    with pytest.raises(mailtest.Hangup, match="^was silent for too long$"):
        connection.receive()


def test_connection_hangs_up_on_who_does_not_read(pair):
    connection, _ = pair
    connection.set_timeout(0.001)
    with pytest.raises(mailtest.Hangup, match="^did not read for too long$"):
        connection.send(b"x" * 10_000_000)


def test_connection_hangs_up_on_who_is_gone(pair):
    connection, peer = pair
    peer.close()
    with pytest.raises(mailtest.Hangup, match="^broke the connection$"):
        connection.send(b"x" * 10_000_000)


def test_connection_sends_what_can_be_sent_without_blocking(pair):
    connection, peer = pair
    connection.set_timeout(0)
    connection.unsent = b"x" * 10_000_000
    connection.send_some()
    rest = len(connection.unsent)
    assert 0 < rest < 10_000_000
    connection.send_some()
    assert len(connection.unsent) == rest
    connection.shut(socket.SHUT_WR)
    assert len(b"".join(iter(lambda: peer.recv(1_000_000), b""))) == 10_000_000 - rest


def test_connection_sees_whether_its_peer_is_gone(pair):
    connection, peer = pair
    assert connection.is_gone() is False
    peer.sendall(b"x")
    assert connection.is_gone() is False
    assert connection.receive() == b"x"
    peer.shutdown(socket.SHUT_WR)        # it may read still
    assert (connection.is_gone(), connection.is_gone(b"?")) == (False, False)
    assert peer.recv(9) == b"?"          # asked once
    assert (connection.is_gone(b"?"), connection.close()) == (False, None)
    assert connection.is_gone() is True


def test_linger_takes_what_arrives_so_that_the_last_reply_is_read(pair):
    connection, peer = pair
    peer.sendall(b"x" * 100)
    connection.send(b"bye")
    peer.shutdown(socket.SHUT_WR)
    connection.linger()
    connection.close()
    assert [peer.recv(9), peer.recv(9)] == [b"bye", b""]


def test_handshake_that_fails_says_why(pair, certificate):
    connection, peer = pair
    peer.sendall(b"EHLO client.example\r\n")
    with pytest.raises(mailtest.Hangup, match="^failed the TLS handshake: "):
        connection.start_tls(mailtest.tls_context(certificate))


def test_handshake_that_takes_too_long(pair, certificate):
    connection, _ = pair
    with pytest.raises(mailtest.Hangup, match="^failed the TLS handshake: .*timed out"):
        connection.start_tls(mailtest.tls_context(certificate), 0.001)


def test_connection_is_shut_within_the_handshake(pair, certificate, trusting):
    connection, peer = pair
    context = mailtest.tls_context(certificate)
    context.sni_callback = lambda *_: connection.shut()      # as a stop does it

    def shake_hands():
        with pytest.raises(OSError):     # ssl.SSLError is one
            trusting.wrap_socket(peer, server_hostname="localhost").close()
    client = in_thread(shake_hands)
    try:
        with pytest.raises(mailtest.Hangup):
            connection.start_tls(context)
    finally:
        connection.close()
        client.join_value()


def test_tls_context_without_a_certificate(tmp_path):
    with pytest.raises(OSError):
        mailtest.tls_context(str(tmp_path / "none.pem"))


def test_make_certificate_without_openssl(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(OSError) as error:
        mailtest.make_certificate(str(tmp_path), ["localhost"])
    assert str(error.value) == (
        "--tls needs the openssl program to make a certificate, and it is not on the PATH; "
        "install it, or give --tls-cert and --tls-key")


@pytest.mark.skipif(not shutil.which("openssl"), reason="there is no openssl program")
def test_made_certificate_serves_the_names_it_was_made_for(tmp_path, pair):
    certificate, key = mailtest.make_certificate(str(tmp_path), ["localhost", "127.0.0.1", "::1"])
    connection, peer = pair
    server = in_thread(connection.start_tls, mailtest.tls_context(certificate, key))
    client = ssl.create_default_context(cafile=certificate)
    with client.wrap_socket(peer, server_hostname="::1") as tls:
        names = tls.getpeercert()["subjectAltName"]
        assert server.join_value() is None
        connection.close()
    assert names == (("DNS", "localhost"), ("IP Address", "127.0.0.1"),
                     ("IP Address", "0:0:0:0:0:0:0:1"))


# ---- SMTP server -----------------------------------------------------------

class SmtpClient:
    """A client that says what a test says, and waits ten seconds at most."""

    def __init__(self, server, tls=None, host=None):
        self.socket = socket.create_connection((host or server.host, server.port), 10)
        if tls is not None:
            self.start_tls(tls)
        self.received = b""

    def start_tls(self, context):
        self.socket = context.wrap_socket(self.socket, server_hostname="localhost",
                                          suppress_ragged_eofs=False)

    def say(self, octets):
        self.socket.sendall(octets)
        return self

    def lines(self, count=1):
        """So many lines of replies, without ids."""
        while self.received.count(b"\r\n") < count:
            more = self.socket.recv(65_536)
            assert more, f"the end came after {self.received!r}"
            self.received += more
        lines = self.received.split(b"\r\n")
        self.received = b"\r\n".join(lines[count:])
        return masked(b"".join(line + b"\r\n" for line in lines[:count]))

    def begin(self, lines=9):
        """Greets, and leaves the greeting and EHLO's reply behind."""
        self.say(b"EHLO client.example\r\n")
        self.lines(1 + lines)
        return self

    def at_end(self):
        """Whether the server has closed the connection, and said nothing more."""
        return self.received == b"" == self.socket.recv(1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()


@contextlib.contextmanager
def smtp_server(policy=mailtest.SmtpPolicy(), tls=None, implicit=False, host="127.0.0.1",
                strict=False, **limits):
    """(server, store): a server on a free port, which leaves no thread behind."""
    store = mailtest.Store(mailtest.Limits(**limits), strict=strict)
    server = mailtest.SmtpServer(host, 0, store, policy, tls, implicit)
    server.start()
    try:
        yield server, store
    finally:
        server.stop()
    assert server.connection_count() == 0
    assert not any(thread.is_alive() for thread in (server._waits, *server._threads))


TRANSACTION = b"MAIL FROM:<a@client.example>\r\nRCPT TO:<b@mailtest.example>\r\nDATA\r\n"
TRANSACTION_OK = (b"250 2.1.0 Ok\r\n250 2.1.5 Ok\r\n354 End data with <CR><LF>.<CR><LF>\r\n")
QUEUED_OK = b"250 2.0.0 Ok: queued as <id>\r\n"
STOPPED = b"421 4.3.2 Shutting down\r\n"


@pytest.fixture(scope="module")
def dialogue_server():
    with smtp_server(**SMALL) as pair:
        yield pair


@pytest.mark.parametrize("state, said, answer, kept", rows({
    name: row for name, row in PLAYED.items() if row[3] or row[0] == "new"}))
def test_dialogue_over_a_socket(state, said, answer, kept, dialogue_server):
    server, store = dialogue_server
    store.empty("mailtest")
    with SmtpClient(server) as client:
        assert client.lines() == b"220 mailtest.example ESMTP mailtest\r\n"
        client.say(octets(STATES[state])).lines({"new": 0, "idle": 9}.get(
            state, 8 + STATES[state].count("¶")))
        client.say(octets(said))
        answer = octets(answer + "¶" * bool(answer))
        assert client.lines(answer.count(b"\r\n")) == answer
        assert stored(store) == list(map(octets, kept))


def test_standard_library_sends_a_mail():
    with smtp_server() as (server, store):
        with smtplib.SMTP(server.host, server.port, timeout=10) as client:
            client.login("alice", "secret")
            assert client.sendmail("a@client.example", ["b@x.example", "c@x.example"],
                                   "Subject: Hi\n\n.dot\n") == {}
        message, = store.messages(server="mailtest")
        assert message.octets == b"Subject: Hi\r\n\r\n.dot\r\n"
        assert message.envelope.forward_paths == ("b@x.example", "c@x.example")
        assert message.envelope[3:6] == ("127.0.0.1", "alice", False)


def test_two_hundred_connections_are_served_by_few_threads():
    with smtp_server() as (server, store), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(SmtpClient(server)).begin() for _ in range(200)]
        assert (server.connection_count(), server._threads) == (200, set())
        for client in clients:
            client.say(TRANSACTION)
        for client in clients:
            assert client.lines(3) == TRANSACTION_OK
        for client in clients:
            client.say(b"x\r\n.\r\nQUIT\r\n")
        assert all(client.lines(2) == QUEUED_OK + b"221 2.0.0 Bye\r\n" for client in clients)
        assert all(client.at_end() for client in clients)
        assert store.counters()["messages"] == 200


def test_client_that_does_not_read_keeps_nobody_waiting():
    with smtp_server() as (server, store):
        with SmtpClient(server) as silent, SmtpClient(server) as other:
            silent.socket.settimeout(0.001)
            with pytest.raises(OSError):                     # until nothing more can be sent
                while True:
                    silent.say(b"HELP\r\n" * 10_000)
            assert other.begin().say(b"NOOP\r\n").lines() == b"250 2.0.0 Ok\r\n"
            silent.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_clients_that_do_not_read_are_left_to_threads_of_their_own():
    with smtp_server() as (server, store):
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(SmtpClient(server).begin()) for _ in range(3)]
            for client in silent:        # replies of 7 MB, more than any socket takes
                client.say(b"HELP\r\n" * 10_000)
            with SmtpClient(server).begin() as other:
                assert other.say(TRANSACTION).lines(3) == TRANSACTION_OK
                assert other.say(b"x\r\n.\r\n").lines() == QUEUED_OK
            for client in silent:        # nothing is lost, and the order is kept
                client.say(b"NOOP\r\nQUIT\r\n")
                told = b"".join(iter(functools.partial(client.socket.recv, 1_000_000), b""))
                assert told.count(b"214 2.0.0 ") == 10_000
                assert told.endswith(b"\r\n250 2.0.0 Ok\r\n221 2.0.0 Bye\r\n")


def test_connections_beyond_the_bound_are_told_to_try_again():
    with smtp_server(connections=2) as (server, _):
        with SmtpClient(server).begin() as first, SmtpClient(server).begin():
            with SmtpClient(server) as third:
                assert third.lines() == b"421 4.7.0 Too many connections: try again later\r\n"
                assert third.at_end()
            assert first.say(b"QUIT\r\n").lines() == b"221 2.0.0 Bye\r\n"
            assert first.at_end()
            with SmtpClient(server) as fourth:
                assert fourth.lines().startswith(b"220 ")


def test_connections_of_one_client_are_bounded_alone():
    with smtp_server(connections_per_client=1) as (server, _):
        with SmtpClient(server).begin(), SmtpClient(server) as second:
            assert second.lines() == b"421 4.7.0 Too many connections: try again later\r\n"


def test_connections_that_are_dead_on_arrival_cost_no_thread(monkeypatch):
    """macOS: accept() may return a connection that was reset, and no address of it."""
    make, dead = mailtest.Connection.__init__, [1, 2, 3]

    def dead_at_first(connection, sock, address):
        make(connection, sock, () if dead and dead.pop() else address)
    monkeypatch.setattr(mailtest.Connection, "__init__", dead_at_first)
    with smtp_server() as (server, _):
        for _ in range(3):
            with SmtpClient(server) as client:
                assert client.at_end()
        with SmtpClient(server) as client:
            assert client.lines().startswith(b"220 ")
            assert server.connection_count() == 1


def test_server_goes_on_when_the_system_gives_no_more_threads(monkeypatch):
    server = mailtest.SmtpServer("127.0.0.1", 0, mailtest.Store(), mailtest.SmtpPolicy())
    start, left = threading.Thread.start, [1]

    def start_one(thread):
        if not left:
            raise RuntimeError("can't start new thread")
        left.pop()
        start(thread)
    monkeypatch.setattr(threading.Thread, "start", start_one)
    server.start()
    with SmtpClient(server).begin() as client:
        assert client.say(TRANSACTION + b"x\r\n.\r\n").lines(4) == TRANSACTION_OK + QUEUED_OK
        server.stop()
        assert client.lines() == STOPPED


def test_client_hears_it_when_no_thread_or_descriptor_is_left(monkeypatch, caplog, certificate):
    with smtp_server(TLS_OFFERED, mailtest.tls_context(certificate)) as (server, _):
        def fail(*_):
            raise RuntimeError("can't start new thread")
        with SmtpClient(server).begin(lines=10) as client, monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            client.say(b"STARTTLS\r\n")
            assert client.lines(2).endswith(b"421 4.3.2 No thread could be had: try again "
                                            b"later\r\n")
        left, accept = [2], socket.socket.accept

        def accept_two(listening):       # the first of each pair fails
            left[0] += 1
            if left[0] % 2:
                raise OSError(errno.EMFILE, "Too many open files")
            return accept(listening)
        monkeypatch.setattr(socket.socket, "accept", accept_two)
        for _ in range(3):
            with SmtpClient(server) as client:
                assert client.lines() == b"421 4.7.0 Too many connections: try again later\r\n"
                assert client.at_end()
    told = [record.getMessage() for record in caplog.records]
    assert told == ["smtp: the system gives no more threads",
                    "smtp: no file descriptor is free: raise the bound (ulimit -n)"]


def test_exception_in_a_session_is_answered_and_costs_one_connection_alone(monkeypatch, caplog):
    with smtp_server() as (server, store), SmtpClient(server).begin() as client:
        client.say(TRANSACTION).lines(3)
        with monkeypatch.context() as patch:
            patch.setattr(store, "deliver", lambda message: 1 / 0)
            client.say(b"x\r\n.\r\n")
            assert client.lines() == (b"421 4.3.0 This is a defect of mailtest; its log on "
                                      b"standard error says more\r\n")
            assert client.at_end()
        assert "smtp: a connection from 127.0.0.1 failed" in caplog.text
        with SmtpClient(server).begin() as another:
            another.say(TRANSACTION + b"x\r\n.\r\n")
            assert another.lines(4) == TRANSACTION_OK + QUEUED_OK


# -- what it costs

@pytest.mark.skipif(sys.implementation.name == "pypy", reason="its collector counts nothing")
def test_refusals_leave_nothing_to_the_garbage_collector():
    _, _, session = new_session()
    say(session, "EHLO x", "MAIL FROM:<a@b.example> X=1", "RCPT TO:nobody", "FOO")
    gc.collect()
    say(session, "MAIL FROM:<a@b.example> X=2", "RCPT TO:no-one", "BAR")
    assert gc.collect() == 0


# -- how connections end

def session_end(store):
    """The ending of the first session that ended badly, waited for."""
    seen = 0
    while True:
        events, _, _ = store.events(seen, 10.0)
        assert events, "no session has ended badly"
        for event in events:
            seen = event.number
            if event.kind == "session":
                return event.data["ending"]


@pytest.mark.parametrize("said, ending", rows({
    "at once": (b"EHLO x\r\n", "left without QUIT"),
    "in the middle of a line": (b"EHLO", "left without QUIT"),
    "in the middle of mail data": (
        b"EHLO x\r\n" + TRANSACTION + b"half", "left without QUIT, 4 octets into the mail data"),
    "before the last octet of mail data": (
        b"EHLO x\r\n" + TRANSACTION + b"\r\n.\r",
        "left without QUIT, 4 octets into the mail data"),
}))
def test_client_that_leaves_stores_nothing(said, ending):
    with smtp_server() as (server, store):
        with SmtpClient(server) as client:
            client.lines()
            client.say(said).socket.shutdown(socket.SHUT_WR)
            while client.socket.recv(65_536):
                pass
        assert session_end(store) == ending
        assert (stored(store), store.counters()["octets"]) == ([], 0)


def test_client_that_resets_in_the_middle_of_mail_data():
    with smtp_server() as (server, store):
        with SmtpClient(server).begin() as client:
            client.say(TRANSACTION).lines(3)
            client.say(b"half")
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert session_end(store) == "broke the connection, 4 octets into the mail data"
        assert stored(store) == []


def test_client_that_half_closes_gets_every_reply():
    with smtp_server() as (server, store):
        with SmtpClient(server) as client:
            client.say(b"EHLO x\r\n" + TRANSACTION + b"x\r\n.\r\n")
            client.socket.shutdown(socket.SHUT_WR)
            assert client.lines(14).endswith(TRANSACTION_OK + QUEUED_OK)
            assert client.at_end()
        assert stored(store) == [b"x\r\n"]


def test_what_follows_quit_does_not_reset_the_connection():
    with smtp_server() as (server, _):
        with SmtpClient(server) as client:
            client.say(b"QUIT\r\n" + b"NOOP\r\n" * 1_000).socket.shutdown(socket.SHUT_WR)
            assert client.lines(2).endswith(b"221 2.0.0 Bye\r\n")
            assert client.at_end()


def test_browser_is_cut_off_and_can_read_why():
    with smtp_server() as (server, store):
        with SmtpClient(server) as client:
            client.say(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 300\r\n\r\n"
                       b"EHLO evil\r\n" + TRANSACTION + b"x\r\n.\r\nQUIT\r\n")
            client.socket.shutdown(socket.SHUT_WR)
            assert client.lines(2).endswith(b"421 4.7.0 This is SMTP, not HTTP\r\n")
            assert client.at_end()
        assert stored(store) == []


def test_silent_client_is_told_why_it_is_left():
    with smtp_server(smtp_timeout=0.0) as (server, store):
        with SmtpClient(server) as silent:
            assert silent.lines(2).endswith(b"\r\n421 4.4.2 Silent for too long\r\n")
            assert silent.at_end()
        assert session_end(store) == "Silent for too long"


# -- scripted delays and drops

def test_commands_that_are_pipelined_behind_a_delay_are_answered():
    with smtp_server() as (server, store):
        address = failing(store, "mail:delay=0.001", "rcpt:delay=0.001*2", "data:delay=0.001")
        said = f"MAIL FROM:<{address}>\r\n" + f"RCPT TO:<{address}>\r\n" * 2 + "DATA\r\n"
        with SmtpClient(server).begin() as client:
            client.say(said.encode() + b"x\r\n.\r\nNOOP\r\nQUIT\r\n")
            assert client.lines(7) == (b"250 2.1.0 Ok\r\n" + b"250 2.1.5 Ok\r\n" * 2
                                       + b"354 End data with <CR><LF>.<CR><LF>\r\n" + QUEUED_OK
                                       + b"250 2.0.0 Ok\r\n221 2.0.0 Bye\r\n")
            assert client.at_end()


def test_delay_keeps_nobody_else_waiting():
    with smtp_server() as (server, store):
        address = failing(store, "rcpt:delay=60")
        with SmtpClient(server).begin() as slow, SmtpClient(server).begin() as other:
            slow.say(f"MAIL FROM:<>\r\nRCPT TO:<{address}>\r\n".encode())
            assert other.say(TRANSACTION + b"x\r\n.\r\n").lines(4) == TRANSACTION_OK + QUEUED_OK
            server.stop()                # and a stop does not wait for it
            assert slow.lines(3) == b"250 2.1.0 Ok\r\n250 2.1.5 Ok\r\n" + STOPPED


def test_delay_is_over_before_the_mail_is_seen():
    with smtp_server() as (server, store):
        address = failing(store, "data:delay=60")
        with SmtpClient(server).begin() as client:
            client.say(f"MAIL FROM:<>\r\nRCPT TO:<{address}>\r\nDATA\r\n".encode()).lines(3)
            client.say(b"x\r\n.\r\n")
            in_thread(server.stop).join_value()
            assert client.lines() == QUEUED_OK
        assert store.inbox(address).count == 1


def test_client_that_left_a_delay_gives_its_connection_back():
    with smtp_server() as (server, store):
        address = failing(store, "mail:delay=60")
        with SmtpClient(server).begin() as client:
            client.say(f"MAIL FROM:<{address}>\r\n".encode())
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert session_end(store) == "broke the connection"


def test_client_that_half_closes_in_a_delay_gets_its_answer():
    with smtp_server() as (server, store):
        address = failing(store, "mail:delay=0.1")
        with SmtpClient(server).begin() as client:
            client.say(f"MAIL FROM:<{address}>\r\n".encode()).socket.shutdown(socket.SHUT_WR)
            assert client.lines() == b"250 2.1.0 Ok\r\n"


def test_flood_of_commands_is_taken_in_turns(monkeypatch):
    with smtp_server() as (server, _), SmtpClient(server).begin() as client:
        taken, take = [], mailtest.Session.receive
        monkeypatch.setattr(mailtest.Session, "receive", lambda session, octets: (
            taken.append(len(octets)), take(session, octets))[1])
        client.say(b"NOOP\r\n" * 2_000).lines(2_000)
        assert sum(taken) == 12_000 and max(taken) <= 1_024


def test_scripted_drop_closes_without_a_word():
    with smtp_server() as (server, store):
        address = failing(store, "rcpt:drop")
        with SmtpClient(server).begin() as client:
            client.say(f"MAIL FROM:<>\r\nRCPT TO:<{address}>\r\nDATA\r\n".encode())
            assert client.lines() == b"250 2.1.0 Ok\r\n"
            client.socket.shutdown(socket.SHUT_WR)
            assert client.at_end()
        assert session_end(store) == "dropped by fail=rcpt:drop"
        assert store.inbox(address).attempts == 1


# -- stop

def test_stop_ends_silent_sessions_and_frees_the_port():
    with smtp_server() as (server, store):
        with SmtpClient(server) as fresh, SmtpClient(server).begin() as greeted:
            fresh.lines()
            greeted.say(b"MAIL FROM:<>\r\n").lines()
            server.stop()
            assert fresh.lines() == greeted.lines() == STOPPED
            assert fresh.at_end() and greeted.at_end()
        assert {record.ending for record in store.sessions()} == {"Shutting down"}
        again = mailtest.SmtpServer(server.host, server.port, store, mailtest.SmtpPolicy())
        again.start()
        with SmtpClient(again) as client:
            assert client.lines().startswith(b"220 ")
        again.stop()


def test_stop_waits_for_mail_data_to_end():
    with smtp_server() as (server, store):
        with SmtpClient(server).begin() as client:
            client.say(TRANSACTION + b"first half, ").lines(3)
            stopping = in_thread(server.stop)
            assert server.stopping.wait(10)
            client.say(b"second half\r\n.\r\n")
            assert client.lines(2) == QUEUED_OK + STOPPED
            assert client.at_end()
            stopping.join_value()
        assert stored(store) == [b"first half, second half\r\n"]


def test_stop_waits_for_the_data_of_several_clients():
    with smtp_server() as (server, store), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(SmtpClient(server)).begin() for _ in range(5)]
        for client in clients:
            client.say(TRANSACTION + b"x").lines(3)
        stopping = in_thread(server.stop)
        assert server.stopping.wait(10)
        for client in clients:
            client.say(b"\r\n.\r\n")
            assert client.lines(2) == QUEUED_OK + STOPPED
        stopping.join_value()
        assert stored(store) == [b"x\r\n"] * 5


def test_stop_refuses_mail_data_that_does_not_end():
    with smtp_server(stop_time=0.21) as (server, store):
        with SmtpClient(server).begin() as client:
            client.say(TRANSACTION + b"half").lines(3)
            server.stop()
            assert client.lines() == STOPPED
            assert client.at_end()
        assert (stored(store), store.counters()["octets"]) == ([], 0)
        assert store.sessions()[0].ending == "Shutting down, 4 octets into the mail data"


def test_stop_refuses_new_connections():
    with smtp_server() as (server, _):
        server.stop()
        with pytest.raises(OSError):
            SmtpClient(server)


def test_server_may_be_stopped_twice_and_without_having_started():
    server = mailtest.SmtpServer("127.0.0.1", 0, mailtest.Store(), mailtest.SmtpPolicy())
    server.stop()
    server.stop()


def test_port_in_use_is_an_error():
    with smtp_server() as (server, store):
        with pytest.raises(OSError) as error:
            mailtest.SmtpServer(server.host, server.port, store, mailtest.SmtpPolicy())
        assert error.value.errno in (errno.EADDRINUSE, errno.EACCES)     # EACCES: Windows


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
        return True
    except OSError:                      # the machine has none
        return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_ipv6():
    with smtp_server(host="::1") as (server, store):
        assert server.host == "::1"
        with SmtpClient(server).begin() as client:
            client.say(TRANSACTION + b"x\r\n.\r\n").lines(4)
        assert store.messages(server="mailtest")[0].envelope.client == "::1"


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["::", "*", "[::]", "localhost"])
def test_every_address_of_both_families(host):
    with smtp_server(host=host) as (server, store):
        for host in ("127.0.0.1", "::1"):
            with SmtpClient(server, host=host).begin() as client:
                client.say(TRANSACTION + b"x\r\n.\r\n").lines(4)
        assert [message.envelope.client for message in store.messages(server="mailtest")] == [
            "::1", "127.0.0.1"]


# -- TLS

TLS_OFFERED = mailtest.SmtpPolicy(starttls=True)


@pytest.fixture
def starttls_server(certificate):
    with smtp_server(TLS_OFFERED, mailtest.tls_context(certificate)) as pair:
        yield pair


@pytest.fixture
def smtps_server(certificate):
    with smtp_server(TLS_OFFERED, mailtest.tls_context(certificate), implicit=True) as pair:
        yield pair


def test_standard_library_sends_over_starttls(starttls_server, trusting):
    server, store = starttls_server
    with smtplib.SMTP(server.host, server.port, timeout=10) as client:
        client.starttls(context=trusting)
        client.sendmail("a@client.example", ["b@x.example"], "Subject: Hi\r\n\r\n")
        assert not client.has_extn("starttls")
    assert store.messages(server="mailtest")[0].envelope.tls is True


def test_standard_library_sends_over_implicit_tls(smtps_server, trusting):
    server, store = smtps_server
    with smtplib.SMTP_SSL(server.host, server.port, timeout=10, context=trusting) as client:
        client.sendmail("a@client.example", ["b@x.example"], "Subject: Hi\r\n\r\n")
        assert not client.has_extn("starttls")
    assert store.messages(server="mailtest")[0].envelope.tls is True


def test_plaintext_behind_starttls_is_discarded(starttls_server, trusting):
    server, store = starttls_server
    with SmtpClient(server).begin(lines=10) as client:
        client.say(b"STARTTLS\r\nEHLO injected\r\nMAIL FROM:<>\r\nRCPT TO:<b@x.example>\r\n")
        assert client.lines() == b"220 2.0.0 Go ahead\r\n"
        client.start_tls(trusting)
        client.say(b"DATA\r\n")
        assert client.lines() == b"503 5.5.1 Send EHLO first\r\n"


def test_failed_handshake_is_recorded(starttls_server):
    server, store = starttls_server
    with SmtpClient(server).begin(lines=10) as client:
        client.say(b"STARTTLS\r\n").lines()
        with pytest.raises(ssl.SSLError):
            client.start_tls(ssl.create_default_context())   # which does not trust us
    ending = session_end(store)
    assert ending.startswith("failed the TLS handshake: ")
    assert "EHLO client.example" in store.sessions()[0].transcript.decode()


def test_failed_handshake_of_implicit_tls_is_recorded_too(smtps_server):
    server, store = smtps_server
    with pytest.raises(ssl.SSLError):
        SmtpClient(server, tls=ssl.create_default_context())
    ending = session_end(store)
    assert ending.startswith("failed the TLS handshake: ")


def test_tls_ends_with_a_close_notify(smtps_server, trusting):
    """RFC 8446 6.1; without it a client cannot tell the end from an attack."""
    server, _ = smtps_server
    with SmtpClient(server, tls=trusting) as client:
        client.say(b"QUIT\r\n")
        assert client.lines(2).endswith(b"221 2.0.0 Bye\r\n")
        assert client.at_end()


@pytest.fixture
def tls_pair(pair, certificate, trusting):
    """(our end, the peer's end) of a connection with TLS."""
    connection, peer = pair
    client = in_thread(lambda: trusting.wrap_socket(peer, server_hostname="localhost"))
    connection.start_tls(mailtest.tls_context(certificate))
    with client.join_value() as tls:
        yield connection, tls


def test_connection_that_receives_no_more_still_sends_over_tls(tls_pair):
    connection, peer = tls_pair
    connection.shut(socket.SHUT_RD)      # as a stop does it
    connection.send(STOPPED)
    assert peer.recv(100) == STOPPED


def test_connection_over_tls_sees_whether_its_peer_is_gone(tls_pair):
    connection, peer = tls_pair
    assert connection.is_gone() is False
    peer.sendall(b"ab")
    assert (connection.is_gone(), connection.receive()) == (False, b"ab")
    peer.close()
    assert connection.is_gone() is True


def test_stop_waits_for_mail_data_over_tls(smtps_server, trusting):
    server, store = smtps_server
    with SmtpClient(server, tls=trusting) as client:
        client.begin()
        client.say(TRANSACTION + b"x").lines(3)
        stopping = in_thread(server.stop)
        assert server.stopping.wait(10)
        client.say(b"\r\n.\r\n")
        assert client.lines(2) == QUEUED_OK + STOPPED
        stopping.join_value()
    assert stored(store) == [b"x\r\n"]


def test_plain_client_on_the_tls_port_is_left(smtps_server):
    server, store = smtps_server
    with SmtpClient(server) as client, contextlib.suppress(OSError):
        client.say(b"EHLO client.example\r\n")
        while client.socket.recv(65_536):
            pass
    ending = session_end(store)
    assert ending.startswith("failed the TLS handshake: ")


# ---- HTTP API --------------------------------------------------------------

NOVEMBER = 1_795_224_817.0               # 2026-11-21T01:33:37Z


def api_on_clock(strict=False, now=NOVEMBER, limits=(), **policy):
    """(clock, api): an Api with the page's files, over a Store whose clocks are one fake."""
    clock, store = store_on_clock(strict, **dict(limits))
    clock.now = now
    return clock, mailtest.Api(store, mailtest.ApiPolicy(files=mailtest.PAGE_FILES, **policy))


def ask(api, method, target, body=b"", client="127.0.0.1", tunnel=False, gone=False, **fields):
    """The Response to a request; `fields` are header fields with _ for -, a body that is not
    octets becomes JSON."""
    path, _, query = target.partition("?")
    headers = {"host": "localhost:8080"}
    headers.update((name.replace("_", "-"), value) for name, value in fields.items())
    octets = body if isinstance(body, bytes) else json.dumps(body).encode()
    def read(most):
        if len(octets) > most:
            raise mailtest.ApiError(413, "too_large", f"Expected at most {most} octets")
        return octets
    response = mailtest.answer(api, mailtest.Request(method, path, query, headers, read, client,
                                                     tunnel=tunnel, gone=lambda: gone))
    if response.stream is not None and response.type == "application/json":
        response = response._replace(body=b"".join(response.stream), stream=None)
    return response


def said(response):
    """(status, value of the JSON) of a Response."""
    assert response.type == "application/json"
    return response.status, json.loads(response.body)


def got(api, target, **fields):
    """The JSON of a GET that must succeed."""
    status, value = said(ask(api, "GET", target, **fields))
    assert status == 200, value
    return value


def subjects_of(value):
    """The subjects_of of a list."""
    return [item["subject"] for item in value["items"]]


def invalid(field, text):
    """What Mailosaur's clients are told of a wrong parameter."""
    return 400, {"type": "ValidationError", "message": text,
                 "errors": [{"field": field, "detail": [{"description": text}]}]}


def not_found(text):
    """What Mailosaur's clients are told of what is not there."""
    return 404, {"type": "NotFound", "message": text,
                 "errors": [{"field": "", "detail": [{"description": text}]}]}


def mail(subject="x", body="x", fields=""):
    """The octets of a small mail."""
    return f"Subject: {subject}\r\n{fields}\r\n{body}\r\n".encode()


EVERYTHING = (b"From: Ann <ann@sender.example>\r\n"
         b"To: Bob <bob@abcd1234.example>\r\n"
         b"Cc: carl@cc.example\r\n"
         b"Date: Sat, 21 Nov 2026 01:33:36 +0000\r\n"
         b"Message-ID: <1@sender.example>\r\n"
         b"Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\n"
         b"MIME-Version: 1.0\r\n"
         b"Content-Type: multipart/mixed; boundary=B\r\n\r\n"
         b"--B\r\nContent-Type: multipart/alternative; boundary=A\r\n\r\n"
         b"--A\r\nContent-Type: text/plain\r\n\r\nYour code is 482913, see https://x.example/t\r\n"
         b"--A\r\nContent-Type: text/html\r\n\r\n<p>Your code is <b>G3H1Y2</b>, "
         b"<a href=\"https://x.example/h\">here</a> <a href=\"https://x.example/i\">"
         b"<img src=\"cid:logo\" alt=\"Logo\"></a><img src=\"https://x.example/1.png\"></p>\r\n"
         b"--A--\r\n"
         b"--B\r\nContent-Type: image/png\r\nContent-ID: <logo>\r\n"
         b"Content-Disposition: inline; filename=\"cat.png\"\r\n"
         b"Content-Transfer-Encoding: base64\r\n\r\niVBORw==\r\n--B--\r\n")


def whole(api):
    """A message with something in every member."""
    envelope = mailtest.Envelope("bounce@sender.example",
                                 ("bob@abcd1234.example", "hidden@bcc.example"), "client.example",
                                 "192.0.2.1", "ann", True)
    message = mailtest.Message(mailtest.new_id(), EVERYTHING, envelope,
                               session=(b"C: EHLO client.example\r\nS: 250 ok\r\n",
                                        b"C: DATA\r\n"))
    api.store.deliver(message)
    return message


def person(email, name=""):
    return {"name": name, "email": email, "phone": None}


# -- shapes

def test_message_has_every_member():
    _, api = api_on_clock()
    message = whole(api)
    assert got(api, f"/api/messages/{message.id}") == {
        "id": message.id, "type": "Email", "received": "2026-11-21T01:33:37.000000+00:00",
        "subject": "Grüße", "from": [person("ann@sender.example", "Ann")],
        "to": [person("bob@abcd1234.example", "Bob")], "cc": [person("carl@cc.example")],
        "bcc": [person("hidden@bcc.example")],
        "html": {"body": EVERYTHING.decode().split("\r\n\r\n")[4].partition("\r\n--A--")[0],
                 "links": [{"href": "https://x.example/h", "text": "here"},
                           {"href": "https://x.example/i", "text": None}],
                 "codes": [{"value": "G3H1Y2"}],
                 "images": [{"src": "cid:logo", "alt": "Logo"},
                            {"src": "https://x.example/1.png", "alt": None}]},
        "text": {"body": "Your code is 482913, see https://x.example/t",
                 "links": [{"href": "https://x.example/t", "text": "https://x.example/t"}],
                 "codes": [{"value": "482913"}], "images": []},
        "attachments": [{"id": f"{message.id}-0", "contentType": "image/png",
                         "fileName": "cat.png", "contentId": "logo", "length": 4,
                         "url": "http://localhost:8080/api/files/attachments/"
                                f"{message.id}-0"}],
        "metadata": {
            "headers": [{"field": "From", "value": "Ann <ann@sender.example>"},
                        {"field": "To", "value": "Bob <bob@abcd1234.example>"},
                        {"field": "Cc", "value": "carl@cc.example"},
                        {"field": "Date", "value": "Sat, 21 Nov 2026 01:33:36 +0000"},
                        {"field": "Message-ID", "value": "<1@sender.example>"},
                        {"field": "Subject", "value": "Grüße"},
                        {"field": "MIME-Version", "value": "1.0"},
                        {"field": "Content-Type", "value": "multipart/mixed; boundary=B"}],
            "ehlo": "client.example", "mailFrom": "bounce@sender.example",
            "rcptTo": [{"name": None, "email": "bob@abcd1234.example", "phone": None},
                       {"name": None, "email": "hidden@bcc.example", "phone": None}],
            "client": "192.0.2.1", "user": "ann", "tls": True},
        "size": len(EVERYTHING), "direction": "Received", "warnings": [],
        "session": ["C: EHLO client.example", "S: 250 ok", "C: DATA",
                        f"C: ({len(EVERYTHING)} octets of mail data)",
                        f"S: 250 2.0.0 Ok: queued as {message.id}"], "server": "abcd1234"}


def test_summary_has_every_member():
    _, api = api_on_clock()
    message = whole(api)
    assert got(api, "/api/messages?server=abcd1234") == {"items": [{
        "id": message.id, "type": "Email", "received": "2026-11-21T01:33:37.000000+00:00",
        "subject": "Grüße", "from": [person("ann@sender.example", "Ann")],
        "to": [person("bob@abcd1234.example", "Bob")], "cc": [person("carl@cc.example")],
        "bcc": [person("hidden@bcc.example")],
        "summary": "Your code is 482913, see https://x.example/t", "attachments": 1,
        "direction": "Received", "size": len(EVERYTHING), "code": "482913", "links": 2,
        "warnings": 0, "seen": False,
        "inboxes": ["bob@abcd1234.example", "hidden@bcc.example"],
        "server": "abcd1234"}]}


def test_summary_names_the_server_that_was_asked():
    _, api = api_on_clock()
    whole(api)
    for server, named in (("abcd1234", "abcd1234"), ("bcc", "bcc"), ("ABCD1234", "abcd1234"),
                          ("abcd1234.example", "abcd1234.example"), ("mailtest", "abcd1234")):
        assert got(api, f"/api/messages?server={server}")["items"][0]["server"] == named


@pytest.mark.parametrize("octets", rows({
    "nothing": b"", "no header fields": b"\r\nhello\r\n", "no body": b"Subject: x\r\n",
    "text alone": mail(), "html alone": mail(fields="Content-Type: text/html\r\n"),
    "neither text nor html": mail(fields="Content-Type: image/png\r\n"),
    "broken addresses": mail(fields="From: <<<>>>,;:@@@\r\nTo: @\r\n"),
    "a multipart without parts": mail(fields="Content-Type: multipart/mixed; boundary=B\r\n"),
    "octets that are no text": b"\xff\x00\x80: \xfe\r\n\r\n\xff\x00"}))
def test_lists_are_never_null_and_objects_never_absent(octets):
    _, api = api_on_clock()
    message = delivered(api.store, "a@x.example", octets=octets)
    value = got(api, f"/api/messages/{message.id}")
    for name in ("from", "to", "cc", "bcc", "attachments", "warnings"):
        assert isinstance(value[name], list)
    for kind in ("html", "text"):
        assert [type(value[kind][name]) for name in ("links", "codes", "images")] == [list] * 3
    assert [type(value["metadata"][name]) for name in ("headers", "rcptTo")] == [list] * 2
    item, = got(api, "/api/messages")["items"]
    assert isinstance(item["attachments"], int) and item["summary"]


# -- lists

def shelf():
    """An Api with mails "1" to "5" for abcd1234 a second apart, one of others, one sent."""
    clock, api = api_on_clock()
    for number in range(1, 6):
        delivered(api.store, f"u{number}@abcd1234.example", octets=mail(number, f"body {number}"))
        clock.now += 1
    delivered(api.store, "a@other000.example", octets=mail("other"))
    delivered(api.store, "b@abcd1234.example", octets=mail("sent"), direction="Sent",
              server="abcd1234")
    return api


# query, subjects_of
LISTS = {
    "newest first": ("server=abcd1234", "5 4 3 2 1"),
    "a server by its whole domain": ("server=abcd1234.example", "5 4 3 2 1"),
    "a server in capitals": ("server=ABCD1234", "5 4 3 2 1"),
    "another server": ("server=other000", "other"),
    "a server that has no mail": ("server=nobody00", ""),
    "no server: everything": ("", "other 5 4 3 2 1"),
    "an empty server: everything": ("server=", "other 5 4 3 2 1"),
    "mailtest: everything": ("server=mailtest", "other 5 4 3 2 1"),
    "the first page is 0": ("server=abcd1234&page=0&itemsPerPage=2", "5 4"),
    "the second page is 1": ("server=abcd1234&page=1&itemsPerPage=2", "3 2"),
    "the last page is short": ("server=abcd1234&page=2&itemsPerPage=2", "1"),
    "after the last page": ("server=abcd1234&page=3&itemsPerPage=2", ""),
    "a page far away": ("server=abcd1234&page=10000000&itemsPerPage=1000", ""),
    "one item": ("server=abcd1234&itemsPerPage=1", "5"),
    "a thousand items": ("server=abcd1234&itemsPerPage=1000", "5 4 3 2 1"),
    "empty parameters are not given": (
        "server=abcd1234&page=&itemsPerPage=&receivedAfter=&dir=&q=", "5 4 3 2 1"),
    "unknown parameters are ignored": ("server=abcd1234&colour=red&&=&a", "5 4 3 2 1"),
    "a repeated parameter that nobody knows": ("server=abcd1234&x=1&x=2", "5 4 3 2 1"),
    "dir=Received": ("server=abcd1234&dir=Received", "5 4 3 2 1"),
    "dir=Sent": ("server=abcd1234&dir=Sent", "sent"),
    "dir=sent in lower case": ("server=abcd1234&dir=sent", "sent"),
    "dir=Sent of everybody": ("dir=Sent", "sent"),
    "dir=Sent of another server": ("server=other000&dir=Sent", ""),
    "received after": ("server=abcd1234&receivedAfter=2026-11-21T01:33:39Z", "5 4"),
    "received after, paged": (
        "server=abcd1234&receivedAfter=2026-11-21T01:33:38Z&itemsPerPage=2&page=1", "3"),
    "the page's search": ("server=abcd1234&q=subject:3", "3"),
    "the page's search, paged": ("server=abcd1234&q=-subject:3&itemsPerPage=2&page=1", "2 1"),
    "the page's search, after": (
        "server=abcd1234&q=body&receivedAfter=2026-11-21T01:33:39Z", "5 4"),
}


@pytest.mark.parametrize("query, expected", rows(LISTS))
def test_list(query, expected):
    response = ask(shelf(), "GET", f"/api/messages?{query}")
    assert (response.status, subjects_of(said(response)[1])) == (200, expected.split())
    total = int(dict(response.headers)["X-Total-Count"])
    assert total >= len(expected.split())


def test_list_has_fifty_items_unless_asked_for_more():
    _, api = api_on_clock()
    for number in range(60):
        delivered(api.store, "a@x.example", octets=mail(number))
    assert subjects_of(got(api, "/api/messages")) == [str(number) for number in range(59, 9, -1)]
    assert subjects_of(got(api, "/api/messages?page=1")) == [str(n) for n in range(9, -1, -1)]
    assert len(got(api, "/api/messages?itemsPerPage=1000")["items"]) == 60


# the form on the wire; mails came at 01:33:37.352 ("1") and 01:33:39 ("2")
RECEIVED_AFTER = {
    "Python: offset, no fraction": ("2026-11-21T01%3A33%3A37%2B00%3A00", "2 1"),
    "Node: milliseconds, not escaped": ("2026-11-21T01:33:37.351Z", "2 1"),
    "Node: strictly after": ("2026-11-21T01:33:37.352Z", "2"),
    "Ruby and PHP: seconds and an offset": ("2026-11-21T01%3A33%3A38%2B00%3A00", "2"),
    "Go: seconds and Z": ("2026-11-21T01%3A33%3A38Z", "2"),
    "Java: milliseconds since 1970": ("1795224817351", "2 1"),
    "Java: strictly after": ("1795224817352", "2"),
    ".NET: 7 digits and Z": ("2026-11-21T01:33:37.3510000Z", "2 1"),
    ".NET: strictly after": ("2026-11-21T01:33:37.3520000Z", "2"),
    ".NET: 7 digits and an offset": ("2026-11-21T02:33:37.3520000%2B01:00", "2"),
    ".NET: 7 digits and no offset is UTC": ("2026-11-21T01:33:37.3520000", "2"),
    "a plus that became a blank": ("2026-11-21T02:33:38+01:00", "2"),
    "west of Greenwich": ("2026-11-20T20:33:38-05:00", "2"),
    "an offset without colon": ("2026-11-21T02:33:38%2B0100", "2"),
    "nine digits": ("2026-11-21T01:33:37.352000000Z", "2"),
    "small letters": ("2026-11-21t01:33:38z", "2"),
    "a blank for T": ("2026-11-21%2001:33:38", "2"),
    "no seconds": ("2026-11-21T01:34Z", ""),
    "a day": ("2026-11-21", "2 1"),
    "the next day": ("2026-11-22", ""),
    "the time of the last": ("2026-11-21T01:33:39Z", ""),
    "blanks around": ("%202026-11-21T01:33:38Z%20", "2"),
}


@pytest.mark.parametrize("text, expected", rows(RECEIVED_AFTER))
def test_received_after(text, expected):
    clock, api = api_on_clock(now=NOVEMBER + 0.352)
    delivered(api.store, "a@x.example", octets=mail(1))
    clock.now = NOVEMBER + 2
    delivered(api.store, "a@x.example", octets=mail(2))
    assert subjects_of(got(api, f"/api/messages?receivedAfter={text}")) == expected.split()
    found = ask(api, "POST", f"/api/messages/search?receivedAfter={text}", {"body": "x"})
    assert subjects_of(said(found)[1]) == expected.split()


A_TIME = "Expected receivedAfter to be a time such as 2026-01-31T12:00:00Z, got "
A_PAGE = "Expected page to be a whole number from 0 to 10000000, got "
A_SIZE = "Expected itemsPerPage to be a whole number from 1 to 1000, got "
MANY = "Expected at most 100 parameters in percent-encoded UTF-8"
BAD_LISTS = {
    "a word for a time": ("receivedAfter=yesterday", "receivedAfter", A_TIME + "'yesterday'"),
    "a month that is none": ("receivedAfter=2026-13-01", "receivedAfter", A_TIME + "'2026-13-01'"),
    "an hour that is none": ("receivedAfter=2026-01-01T24:00Z", "receivedAfter",
                             A_TIME + "'2026-01-01T24:00Z'"),
    "an offset that is none": ("receivedAfter=2026-01-01T12:00%2B99:99", "receivedAfter",
                               A_TIME + "'2026-01-01T12:00+99:99'"),
    "a negative page": ("page=-1", "page", A_PAGE + "'-1'"),
    "half a page": ("page=1.5", "page", A_PAGE + "'1.5'"),
    "a page that is too far": ("page=10000001", "page", A_PAGE + "'10000001'"),
    "Arabic digits": ("page=%D9%A1", "page", A_PAGE + "'\u0661'"),
    "no items": ("itemsPerPage=0", "itemsPerPage", A_SIZE + "'0'"),
    "too many items": ("itemsPerPage=1001", "itemsPerPage", A_SIZE + "'1001'"),
    "a direction that is none": ("dir=up", "dir", "Expected dir to be Received or Sent, got 'up'"),
    "octets that are not UTF-8": ("server=%ff", "", MANY),
    "too many parameters": ("&".join(f"a{n}=1" for n in range(101)), "", MANY),
    "a parameter twice": ("server=a&server=b", "server", "Expected server once, got it 2 times"),
}


@pytest.mark.parametrize("query, field, text", rows(BAD_LISTS))
def test_bad_list_says_what_was_expected(query, field, text):
    _, api = api_on_clock()
    assert said(ask(api, "GET", f"/api/messages?{query}")) == invalid(field, text)
    assert said(ask(api, "POST", f"/api/messages/search?{query}", {"body": "x"})) == (
        invalid(field, text))


# what is required, or has bounds: request, field, text; {id} is a mail of nobody
BAD_CALLS = {
    "a wait that is too long": (
        "POST", "/api/messages/search?timeout=60001", {"body": "x"}, "timeout",
        "Expected timeout to be a whole number from 0 to 60000, got '60001'"),
    "an unknown search word": ("GET", "/api/messages?q=colour:red", {}, "q", "colour"),
    "deleting without a server": ("DELETE", "/api/messages", {}, "server",
                                  "Expected server: whose messages; mailtest: all"),
    "deleting of an empty server": ("DELETE", "/api/messages?server=", {}, "server",
                                    "Expected server: whose messages; mailtest: all"),
    "creating without a server": ("POST", "/api/messages", {}, "server",
                                  "Expected server: where the message is made"),
    "a forward to nobody": ("POST", "/api/messages/{id}/forward", {"text": "t"}, "to",
                            "Expected to: addresses to send to"),
    "a reply to nobody": ("POST", "/api/messages/{id}/reply", {"text": "t"}, "id",
                          "Expected a message with From or Reply-To"),
    "a server without a name": ("POST", "/api/servers", {"name": None}, "name",
                                "Servers need a name"),
    "a server of blanks": ("PUT", "/api/servers/mailtest", {"name": " "}, "name",
                           "Servers need a name"),
    "a long name": ("POST", "/api/servers", {"name": "x" * 201}, "name",
                    "Expected name to be a string of at most 200 characters, got 'xxx"),
    "a device without a name": ("POST", "/api/devices", {"sharedSecret": "GEZA"}, "name",
                                "Devices need a name"),
}


@pytest.mark.parametrize("method, target, body, field, text", rows(BAD_CALLS))
def test_bad_call_says_what_was_expected(method, target, body, field, text):
    _, api = api_on_clock()
    id = delivered(api.store, "a@x.example").id
    status, value = said(ask(api, method, target.format(id=id), body))
    assert (status, value) == invalid(field, value["message"])
    assert text in value["message"] and api.store.message(id)


# -- search

SEARCHED_LETTERS = (
    (b"From: Ann <Ann@sender.example>\r\nTo: Bob@abcd1234.example\r\nCc: carl@cc.example\r\n"
     b"Subject: Welcome to the Shop \xe2\x80\xa6\r\n\r\nThis is a link, Stra\xc3\x9fe\r\n",
     ("Bob@abcd1234.example", "hidden@bcc.example")),
    (b"From: eve@sender.example\r\nTo: bob@abcd1234.example\r\nSubject: Invoice 7\r\n"
     b"Content-Type: text/html\r\n\r\n<p class=\"fancy\">this is a link</p>\r\n",
     ("bob@abcd1234.example",)),
)

# criteria, which of the two letters match (the second is newer)
SEARCHES = {
    "the subject": ({"subject": "WELCOME"}, "1"), "text": ({"body": "stra\u00dfe"}, "1"),
    "the HTML's source": ({"body": "class=\"FANCY"}, "2"),
    "both bodies": ({"body": "this is a link"}, "2 1"),
    "the sender": ({"sentFrom": "ann@SENDER.example"}, "1"),
    "a recipient": ({"sentTo": "BOB@abcd1234.example"}, "2 1"),
    "all by default": ({"sentTo": "bob@abcd1234.example", "subject": "invoice"}, "2"),
    "ALL": ({"body": "link", "subject": "nope", "match": "ALL"}, ""),
    "any in small letters": ({"body": "link", "subject": "nope", "match": "any"}, "2 1"),
    "an empty match is ALL": ({"body": "link", "subject": "nope", "match": ""}, ""),
    "Python's nulls": ({"sentFrom": None, "sentTo": None, "subject": "invoice", "body": None,
                        "match": None}, "2"),
    "Go's empty strings": ({"sentFrom": "", "sentTo": "", "subject": "invoice", "body": "",
                            "match": "ALL"}, "2"),
    ".NET's PascalCase, 0 is ALL": ({"SentFrom": None, "SentTo": "bob@abcd1234.example",
                                     "Subject": "welcome", "Body": None, "Match": 0}, "1"),
    ".NET's PascalCase, 1 is ANY": ({"SentFrom": None, "SentTo": "bob@abcd1234.example",
                                     "Subject": "welcome", "Body": None, "Match": 1}, "2 1"),
    "unknown members are ignored": ({"subject": "invoice", "colour": [{}]}, "2"),
    "a lone surrogate": ({"subject": "\ud800"}, ""), "a NUL": ({"body": "\0"}, ""),
    "a byte order mark": (b'\xef\xbb\xbf{"subject":"invoice"}', "2"),
}


def letters():
    """An Api that holds SEARCHED_LETTERS, subjects_of in order of arrival."""
    _, api = api_on_clock()
    for octets, paths in SEARCHED_LETTERS:
        delivered(api.store, *paths, octets=octets)
    return api, ["Welcome to the Shop \u2026", "Invoice 7"]


@pytest.mark.parametrize("body, expected", rows(SEARCHES))
def test_search(body, expected):
    api, known = letters()
    status, value = said(ask(api, "POST", "/api/messages/search?server=abcd1234", body))
    assert (status, subjects_of(value)) == (200, [known[int(n) - 1] for n in expected.split()])


NO_CRITERIA = invalid("sentFrom",
                      "Expected at least one of sentFrom, sentTo, subject and body")


def no_json(shown):
    return invalid("body", f"Expected a JSON object in UTF-8 as the body, got {shown!r}")


def no_kind(name, expected, shown):
    return invalid(name, f"Expected {name} to be {expected}, got {shown}")


BAD_SEARCHES = {
    "no body": (b"", NO_CRITERIA), "match alone": (b'{"match":"ANY"}', NO_CRITERIA),
    "nulls alone": (b'{"sentFrom":null,"sentTo":null,"subject":null,"body":null,"match":"ALL"}',
                    NO_CRITERIA),
    "empty strings alone": (b'{"sentFrom":"","sentTo":"","subject":"","body":""}', NO_CRITERIA),
    "no JSON": (b"{", no_json("{")), "a form": (b"subject=x", no_json("subject=x")),
    "JSON and more": (b'{"body":"x"} y', no_json('{"body":"x"} y')),
    "NaN": (b'{"subject":NaN}', no_json('{"subject":NaN}')),
    "Latin-1": (b'{"subject":"\xe9"}', no_json('{"subject":"\ufffd"}')),
    "nesting without end": (b"[" * 100_000, no_json("[" * 60)),
    "a list": (b"[]", no_kind("the body", "a JSON object", "a list")),
    "null": (b"null", no_kind("the body", "a JSON object", "null")),
    "a string": (b'"x"', no_kind("the body", "a JSON object", "'x'")),
    "a number for a subject": (b'{"subject":5}', no_kind("subject", "a string", "5")),
    "a list for a body": (b'{"body":["x"]}', no_kind("body", "a string", "a list")),
    "an object for a sender": (b'{"sentFrom":{}}', no_kind("sentFrom", "a string", "an object")),
    "truth for a recipient": (b'{"sentTo":true}', no_kind("sentTo", "a string", "true")),
    "a word for match": (b'{"subject":"x","match":"SOME"}',
                         no_kind("match", "ALL or ANY", "'SOME'")),
    "a number for match": (b'{"subject":"x","match":2}', no_kind("match", "ALL or ANY", "2")),
    "truth for match": (b'{"subject":"x","match":true}', no_kind("match", "ALL or ANY", "true")),
    "a list for match": (b'{"subject":"x","match":[]}', no_kind("match", "ALL or ANY", "a list")),
}


@pytest.mark.parametrize("body, expected", rows(BAD_SEARCHES))
def test_bad_search_says_what_was_expected(body, expected):
    _, api = api_on_clock()
    response = ask(api, "POST", "/api/messages/search?server=abcd1234", body)
    assert said(response) == expected
    assert response.body.startswith(b'{"type":')     # the clients' own tests look for that


def test_deep_nesting_is_no_defect_at_any_depth():
    _, api = api_on_clock()
    statuses = {ask(api, "POST", "/api/messages/search", b"[" * depth + b"]" * depth).status
                for depth in range(500, 1_000)}
    assert statuses == {400}


# -- waiting

@pytest.fixture
def timed(monkeypatch):
    """(clock, api, later): waiting takes no time; later(seconds, action, *arguments) is what
    happens so many seconds after now, when somebody waits."""
    clock, api = api_on_clock()
    agenda = []

    def later(seconds, action, *arguments, **options):
        agenda.append((clock.now + seconds, lambda: action(*arguments, **options)))

    def wait(what, names, timeout):
        until = clock.now + timeout
        if agenda and agenda[0][0] <= until:
            clock.now, action = agenda.pop(0)
            api.store._lock.release()    # as a Condition does
            action()
            api.store._lock.acquire()
        else:
            clock.now = until
    monkeypatch.setattr(api.store, "_wait", wait)
    monkeypatch.setattr(mailtest, "time", types.SimpleNamespace(
        **dict(vars(time), monotonic=clock, time=clock, perf_counter=clock)))
    return clock, api, later


SEARCH = "/api/messages/search?server=abcd1234"


def test_search_that_finds_nothing_is_answered_at_once_and_asks_to_come_back(timed):
    clock, api, _ = timed
    response = ask(api, "POST", SEARCH, {"subject": "x"})
    assert said(response) == (200, {"items": []})
    assert (response.headers, clock.now) == ((("x-ms-delay", "1"),), NOVEMBER)


def test_polling_search_is_held_and_gets_its_mail_when_it_comes(timed):
    clock, api, later = timed
    ask(api, "POST", SEARCH, {"subject": "x"})
    later(0.3, delivered, api.store, "a@abcd1234.example")
    assert subjects_of(said(ask(api, "POST", SEARCH, {"subject": "x"}))[1]) == ["x"]
    assert clock.now == NOVEMBER + 0.3


def test_polling_search_is_held_for_half_a_second_and_asks_to_come_back(timed):
    clock, api, later = timed
    later(0.2, delivered, api.store, "a@abcd1234.example", octets=mail("another"))
    for polls in range(4):
        response = ask(api, "POST", SEARCH, {"subject": "x"})
        assert (said(response), response.headers) == ((200, {"items": []}), (("x-ms-delay", "1"),))
        assert clock.now == pytest.approx(NOVEMBER + polls * 0.5)


NOT_POLLING = {
    "another subject": (SEARCH, {"subject": "y"}, {}, 0.0),
    "another server": ("/api/messages/search?server=other000", {"subject": "x"}, {}, 0.0),
    "another client": (SEARCH, {"subject": "x"}, {"authorization": "Basic eDo="}, 0.0),
    "more than a quarter of a second later": (SEARCH, {"subject": "x"}, {}, 0.26),
}


@pytest.mark.parametrize("target, body, fields, pause", rows(NOT_POLLING))
def test_search_is_not_held_for(target, body, fields, pause, timed):
    clock, api, _ = timed
    ask(api, "POST", SEARCH, {"subject": "x"})
    clock.now += pause
    now = clock.now
    ask(api, "POST", target, body, **fields)
    assert clock.now == now


def test_hold_looks_at_direction_and_time_of_what_comes(timed):
    clock, api, later = timed
    target = SEARCH + "&receivedAfter=2026-11-21T01:33:37.2Z"
    ask(api, "POST", target, {"subject": "x"})
    later(0.1, delivered, api.store, "a@abcd1234.example")
    later(0.3, delivered, api.store, "a@abcd1234.example", direction="Sent", server="abcd1234")
    later(0.4, delivered, api.store, "a@abcd1234.example", octets=mail("xx"))
    assert subjects_of(said(ask(api, "POST", target, {"subject": "x"}))[1]) == ["xx"]


def test_search_with_a_timeout_waits_so_many_milliseconds(timed):
    clock, api, later = timed
    later(3.0, delivered, api.store, "a@abcd1234.example")
    found = ask(api, "POST", SEARCH + "&timeout=5000", {"subject": "x"})
    assert (subjects_of(said(found)[1]), clock.now) == (["x"], NOVEMBER + 3)
    assert said(ask(api, "POST", SEARCH + "&timeout=2500", {"subject": "y"})) == (
        200, {"items": []})
    assert clock.now == NOVEMBER + 5.5


def test_search_with_a_timeout_waits_for_a_later_page(timed):
    clock, api, later = timed
    delivered(api.store, "a@abcd1234.example", octets=mail("x 1"))
    later(3.0, delivered, api.store, "a@abcd1234.example", octets=mail("x 2"))
    found = ask(api, "POST", SEARCH + "&page=1&itemsPerPage=1&timeout=5000", {"subject": "x"})
    assert (subjects_of(said(found)[1]), clock.now) == (["x 1"], NOVEMBER + 3)


@pytest.mark.parametrize("query", ["", "&timeout=1"])
def test_search_is_answered_at_once_when_too_many_wait_and_told_to_pause(query):
    _, api = api_on_clock(limits={"waiters": 0})
    ask(api, "POST", SEARCH + query, {"subject": "x"})
    response = ask(api, "POST", SEARCH + query, {"subject": "x"})
    assert (said(response), response.headers) == ((200, {"items": []}), (("x-ms-delay", "1000"),))


# -- one message

def test_deleted_message_is_gone_with_its_files():
    _, api = api_on_clock()
    id = whole(api).id
    response = ask(api, "DELETE", f"/api/messages/{id}")
    assert (response.status, response.body) == (204, b"")
    gone = not_found(f"no message has the id '{id}'; it may be deleted or expired")
    assert said(ask(api, "DELETE", f"/api/messages/{id}")) == gone
    assert said(ask(api, "GET", f"/api/messages/{id}")) == gone
    for target in (f"/api/files/attachments/{id}-0", f"/api/files/email/{id}"):
        assert ask(api, "GET", target)[:2] == (404, b"")
    assert got(api, "/api/messages") == {"items": []}


ODD_IDS = ("5d0f", "..", "%2e%2e%2fetc%2fpasswd", "search", "*", "%20", "__proto__",
           "x" * 5_000, "77061c9f-da47-4009-9f33-9715a3bbf00c")


@pytest.mark.parametrize("path, method", [
    ("/api/messages/{}", "GET"), ("/api/messages/{}", "DELETE"),
    ("/api/messages/{}/forward", "POST"), ("/api/messages/{}/reply", "POST"),
    ("/api/messages/{}/screenshots", "POST"), ("/api/analysis/spam/{}", "GET"),
    ("/api/analysis/deliverability/{}", "GET")])
def test_unknown_message_is_not_found(path, method):
    _, api = api_on_clock()
    for id in ODD_IDS:
        text = urllib.parse.unquote(id)[:80]
        assert said(ask(api, method, path.format(id), {"to": "a@b.example"})) == not_found(
            f"no message has the id {text!r}; it may be deleted or expired")


def test_all_messages_of_a_server_are_deleted():
    api = shelf()
    assert ask(api, "DELETE", "/api/messages?server=ABCD1234").status == 204
    assert subjects_of(got(api, "/api/messages")) == ["other"]
    assert ask(api, "DELETE", "/api/messages?server=nobody00").status == 204
    assert ask(api, "DELETE", "/api/messages?server=mailtest").status == 204
    assert subjects_of(got(api, "/api/messages")) == []


# -- files

SAFE = ("Content-Security-Policy", "sandbox; default-src 'none'")


def test_email_is_given_back_octet_for_octet():
    _, api = api_on_clock()
    octets = bytes(range(256)) + b"\r\n\r\n.\r\nFrom \n\r\0"
    id = delivered(api.store, "a@x.example", octets=octets).id
    assert ask(api, "GET", f"/api/files/email/{id}") == mailtest.Response(
        200, octets, "message/rfc822", (
            ("Content-Disposition", f"attachment; filename=\"{id}.eml\"; "
                                    f"filename*=UTF-8''{id}.eml"), SAFE))
    assert ask(api, "GET", f"/v1/messages/{id}/source") == mailtest.Response(
        200, octets, "text/plain; charset=utf-8")


def test_attachment_is_given_back_octet_for_octet():
    _, api = api_on_clock()
    id = whole(api).id
    expected = mailtest.Response(200, b"\x89PNG", "image/png", (
        ("Content-Disposition", "attachment; filename=\"cat.png\"; filename*=UTF-8''cat.png"),
        SAFE))
    assert ask(api, "GET", f"/api/files/attachments/{id}-0") == expected
    assert ask(api, "GET", f"/v1/attachments/{id}-0") == expected


@pytest.mark.parametrize("suffix", ["", "-1", "-", "-x", "--1", "-0-0", "-\u0661",
                                    "-" + "9" * 500])
def test_unknown_attachment_has_no_body_since_nodes_client_would_take_it_for_the_file(suffix):
    _, api = api_on_clock()
    id = whole(api).id
    assert ask(api, "GET", f"/api/files/attachments/{id}{suffix}")[:2] == (404, b"")
    assert ask(api, "GET", f"/v1/attachments/{id}{suffix}").status == 404


def attached(disposition, kind="application/octet-stream", octets=b"DATA", fields=""):
    """The octets of a mail with one attachment."""
    return (f"Subject: x\r\nContent-Type: multipart/mixed; boundary=B\r\n\r\n--B\r\n"
            f"Content-Type: text/plain\r\n\r\nx\r\n--B\r\nContent-Type: {kind}\r\n{fields}"
            f"Content-Disposition: attachment; {disposition}\r\n\r\n").encode(
                "utf-8", "surrogateescape") + octets + b"\r\n--B--\r\n"


# disposition, ASCII name, encoded name
FILE_NAMES = {
    "plain": ("filename=\"a.txt\"", "a.txt", "a.txt"),
    "line break, encoded": ("filename*=utf-8''a%0d%0aX-Injected:1.txt",
                            "a X-Injected:1.txt", "a%20X-Injected%3A1.txt"),
    "quotes": ('filename="a\\"; filename=\\"evil.exe"', "a__ filename=_evil.exe",
               "a%22%3B%20filename%3D%22evil.exe"),
    "backslashes": ('filename="a\\\\b.txt"', "b.txt", "b.txt"),
    "traversal": ('filename="../../etc/passwd"', "passwd", "passwd"),
    "emoji": ("filename*=utf-8''%F0%9F%98%8A.txt", "_.txt", "%F0%9F%98%8A.txt"),
    "raw UTF-8": ('filename="ü-日.txt"', "_-_.txt", "%C3%BC-%E6%97%A5.txt"),
    "percent signs": ('filename="100%25.txt"', "100_25.txt", "100%2525.txt"),
    "semicolon and comma": ('filename="a;b,c.txt"', "a_b,c.txt", "a%3Bb%2Cc.txt"),
    "NUL": ("filename*=utf-8''a%00b.txt", "a b.txt", "a%20b.txt"),
    "escape sequence": ("filename*=utf-8''a%1b%5b31m.txt", "a [31m.txt", "a%20%5B31m.txt"),
    "right to left": ("filename*=utf-8''a%E2%80%AEtxt.exe", "a_txt.exe", "a%E2%80%AEtxt.exe"),
    "line separator": ("filename*=utf-8''a%E2%80%A8b", "a b", "a%20b"),
    "none": ("x=y", "attachment", "attachment"),
    "empty": ('filename=""', "attachment", "attachment"),
    "dots alone": ('filename=".."', "attachment", "attachment"),
    "a path of Windows": ('filename="C:\\\\x\\\\a.txt"', "a.txt", "a.txt"),
    "long: its end": (f"filename=\"{'a' * 300}.txt\"", "a" * 196 + ".txt", "a" * 196 + ".txt"),
}


@pytest.mark.parametrize("disposition, plain, full", rows(FILE_NAMES))
def test_name_of_a_download_injects_nothing(disposition, plain, full):
    _, api = api_on_clock()
    id = delivered(api.store, "a@x.example", octets=attached(disposition)).id
    assert ask(api, "GET", f"/api/files/attachments/{id}-0") == mailtest.Response(
        200, b"DATA", "application/octet-stream", (
            ("Content-Disposition", f"attachment; filename=\"{plain}\"; filename*=UTF-8''{full}"),
            SAFE))


@pytest.mark.parametrize("kind, name", rows({
    "PDF": ("application/pdf", "attachment.pdf"), "text": ("text/plain", "attachment.txt"),
    "SVG": ("image/svg+xml", "attachment.svg"), "a mail": ("message/rfc822", "message.eml"),
    "a calendar": ("text/calendar", "attachment.ics"),
    "what has no common ending": ("application/vnd.ms-excel", "attachment")}))
def test_download_without_a_name_gets_one_that_fits_its_type(kind, name):
    _, api = api_on_clock()
    id = delivered(api.store, "a@x.example", octets=attached("x=y", kind)).id
    found = dict(ask(api, "GET", f"/v1/attachments/{id}-0").headers)["Content-Disposition"]
    assert f'filename="{name}"' in found


# Content-Type in the mail, media type of the download
KINDS = {
    "what browsers run: HTML": ("text/html; charset=utf-7", "text/html"),
    "what browsers run: SVG": ("image/svg+xml", "image/svg+xml"),
    "capitals": ("TEXT/HTML", "text/html"),
    "no media type": ("nonsense", "application/octet-stream"),
    "with a line break": ("text/x\r\n\tX-Injected: 1", "text/x"),
    "with characters that are no token": ("text/<b>", "text/plain"),
    "not ASCII": ("text/ü", "text/plain"),
}


@pytest.mark.parametrize("kind, expected", rows(KINDS))
def test_download_is_never_shown(kind, expected):
    _, api = api_on_clock()
    id = delivered(api.store, "a@x.example", octets=attached("filename=x", kind)).id
    response = ask(api, "GET", f"/api/files/attachments/{id}-0")
    assert (response.status, response.headers[0][0], response.headers[1]) == (
        200, "Content-Disposition", SAFE)
    assert response.headers[0][1].startswith("attachment; ")
    assert response.type == expected


# -- create, forward, reply

CREATE = "/api/messages?server=abcd1234"


def created(api, body, target=CREATE):
    """The message that a POST has made, as JSON."""
    status, value = said(ask(api, "POST", target, body))
    assert status == 200, value
    return value


def outline(value):
    """What a test of a created message looks at."""
    return {"from": [each["email"] for each in value["from"]],
            "to": [each["email"] for each in value["to"]],
            "cc": [each["email"] for each in value["cc"]],
            "subject": value["subject"], "direction": value["direction"],
            "text": value["text"]["body"], "html": value["html"]["body"]}


def test_created_message_without_options_is_a_sample_that_was_received():
    _, api = api_on_clock()
    first, second = created(api, {}), created(api, {})
    assert [each["email"] for each in first["to"]] == ["sample@abcd1234.mailosaur.net"]
    assert "Example message" in first["subject"]
    assert "This is a sample email" in first["html"]["body"]
    assert "This is a sample email" in first["text"]["body"]
    assert (first["metadata"]["ehlo"], first["metadata"]["mailFrom"]) == (None, None)
    assert (first["type"], first["server"], first["bcc"]) == ("Email", "abcd1234", [])
    assert first["from"] != second["from"]
    listed = got(api, "/api/messages?server=abcd1234")["items"]
    assert [item["id"] for item in listed] == [second["id"], first["id"]]
    assert got(api, f"/api/messages/{first['id']}") == first


PYTHONS = {"to": "x@verified.example", "cc": "c@verified.example",
           "from": "me@abcd1234.mailosaur.net", "send": True, "subject": "Subj",
           "text": "Text body", "html": None, "attachments": [
               {"contentType": "text/plain", "fileName": "a.txt", "contentId": None,
                "content": "aGk="}]}


def test_created_message_that_is_sent_is_listed_as_sent():
    _, api = api_on_clock()
    value = created(api, PYTHONS)
    assert outline(value) == {
        "from": ["me@abcd1234.mailosaur.net"], "to": ["x@verified.example"],
        "cc": ["c@verified.example"], "subject": "Subj", "direction": "Sent",
        "text": "Text body\n", "html": None}
    assert value["attachments"] == [
        {"id": f"{value['id']}-0", "contentType": "text/plain", "fileName": "a.txt",
         "contentId": None, "length": 2,
         "url": f"http://localhost:8080/api/files/attachments/{value['id']}-0"}]
    assert ask(api, "GET", f"/api/files/attachments/{value['id']}-0").body == b"hi"
    assert got(api, "/api/messages?server=abcd1234") == {"items": []}
    assert subjects_of(got(api, "/api/messages?server=abcd1234&dir=Sent")) == ["Subj"]
    assert got(api, "/v1/inboxes") == {"items": []}


BODIES = {
    "text": ({"text": "Grüße\nzwei", "html": None}, "Grüße\nzwei\n", None),
    "html": ({"text": None, "html": "<b>Grüße</b>"}, None, "<b>Grüße</b>\n"),
    "both": ({"text": "t", "html": "<b>h</b>"}, "t\n", "<b>h</b>\n"),
    "a subject alone": ({"subject": "s"}, "\n", None),
    "a lone surrogate": ({"text": "\ud800"}, "?\n", None),
    "a long line": ({"text": "x" * 5_000}, "x" * 5_000 + "\n", None),
    "a dot alone": ({"text": ".\n.."}, ".\n..\n", None),
}


@pytest.mark.parametrize("body, text, source", rows(BODIES))
def test_bodies_of_a_created_message(body, text, source):
    _, api = api_on_clock()
    value = created(api, {"to": "a@b.example", "subject": "s", "send": True, **body})
    assert (value["text"]["body"], value["html"]["body"]) == (text, source)


def test_created_message_is_delivered_to_inboxes_of_ours():
    _, api = api_on_clock()
    address = api.store.acquire().address
    created(api, {"to": f"Me <{address}>, other@else.example", "from": "Shop <shop@x.example>",
                  "subject": "Hi", "text": "t", "send": True})
    value = got(api, f"/v1/get/{address}")
    assert value["message_count"] == 1
    message, = value["messages"]
    assert outline(message) == {
        "from": ["shop@x.example"], "to": [address, "other@else.example"], "cc": [],
        "subject": "Hi", "direction": "Received", "text": "t\n", "html": None}
    assert [each["email"] for each in message["metadata"]["rcptTo"]] == [address]


ATTACHMENTS = {
    "Ruby's line breaks in base64": ({"fileName": "a", "contentType": "a/b", "content": "aG\nk=\n",
                                      "id": None, "length": None, "url": None},
                                     ("a", "a/b", None, b"hi")),
    "PascalCase": ({"FileName": "a", "ContentType": "a/b", "Content": "aGk=", "ContentId": "c"},
                   ("a", "a/b", "c", b"hi")),
    "nothing": ({}, ("attachment", "application/octet-stream", None, b"")),
    "a name with line breaks": ({"fileName": "a\r\nX: 1", "content": "aGk="},
                                ("aX: 1", "application/octet-stream", None, b"hi")),
    "a name that is not ASCII": ({"fileName": "ü 日.txt", "content": ""},
                                 ("ü 日.txt", "application/octet-stream", None, b"")),
    "a content id with brackets and breaks": (
        {"fileName": "a", "contentType": "image/png", "contentId": "<i\r\ni>", "content": "aGk="},
        ("a", "image/png", "ii", b"hi")),
}


@pytest.mark.parametrize("given, expected", rows(ATTACHMENTS))
def test_attachment_of_a_created_message(given, expected):
    _, api = api_on_clock()
    value = created(api, {"to": "a@b.example", "text": "t", "send": True, "attachments": [given]})
    part, = value["attachments"]
    octets = ask(api, "GET", f"/api/files/attachments/{part['id']}").body
    assert (part["fileName"], part["contentType"], part["contentId"], octets) == expected
    assert part["length"] == len(octets)


BAD_CREATES = {
    "sent to nobody": ({"send": True, "subject": "x"}, "to"),
    "send is a word": ({"send": "yes"}, "send"),
    "to is a list": ({"to": ["a@b.example"]}, "to"),
    "to has no at sign": ({"to": "anna"}, "to"),
    "to has a line break": ({"to": "a@b.example\r\nBcc: c@d.example"}, "to"),
    "to is too long": ({"to": "a@b.example," * 200}, "to"),
    "cc has no at sign": ({"cc": "anna"}, "cc"),
    "from has no at sign": ({"from": "anna"}, "from"),
    "subject has a line break": ({"subject": "a\r\nBcc: c@d.example"}, "subject"),
    "subject is a number": ({"subject": 1}, "subject"),
    "attachments are an object": ({"attachments": {}}, "attachments"),
    "attachments are strings": ({"attachments": ["a"]}, "attachments"),
    "attachment is no base64": ({"attachments": [{"content": "%%%"}]}, "content"),
    "attachment has no media type": ({"attachments": [{"contentType": "png"}]}, "contentType"),
    "attachment is a message": ({"attachments": [{"contentType": "message/rfc822"}]},
                                "contentType"),
    "attachment is a multipart": ({"attachments": [{"contentType": "multipart/mixed"}]},
                                  "contentType"),
}


@pytest.mark.parametrize("server", ["a/../b", "a%0A", "a%20b", "a@b", "x" * 256])
def test_created_message_needs_a_server_that_can_be_one(server):
    _, api = api_on_clock()
    status, value = said(ask(api, "POST", f"/api/messages?server={server}", {"subject": "x"}))
    assert (status, value["errors"][0]["field"]) == (400, "server")
    assert value["message"].startswith(
        "Expected server to be a server id: a label or a whole domain, got ")
    assert api.store.counters()["messages"] == 0


@pytest.mark.parametrize("body, field", rows(BAD_CREATES))
def test_bad_message_is_not_created(body, field):
    _, api = api_on_clock()
    status, value = said(ask(api, "POST", CREATE, body))
    assert (status, value["type"], [each["field"] for each in value["errors"]]) == (
        400, "ValidationError", [field])
    assert value["message"] == value["errors"][0]["detail"][0]["description"] != ""
    assert got(api, "/api/messages") == got(api, "/api/messages?dir=Sent") == {"items": []}


ODD = ("\ud800", "\0", "<", "\"", "(", "=?utf-8?q?=0d=0a?=", "@", ":;", "[", "\u2028", "\x85")
HEADER = re.compile(rb"(?:[!-9;-~]+: [^\r\n]*\r\n(?:[ \t][^\r\n]*\r\n)*)+\r\n")


@pytest.mark.parametrize("member", ["to", "cc", "from", "subject", "text", "html"])
def test_odd_characters_never_break_a_message_that_is_created(member):
    for odd in ODD:
        _, api = api_on_clock()
        body = {"to": "a@b.example", "subject": "x", "send": True}
        body[member] = body.get(member, "") + odd
        response = ask(api, "POST", CREATE, body)
        sent = api.store.messages(server="mailtest")
        assert (response.status, len(sent)) in ((200, 1), (400, 0)), ascii(odd)
        assert all(HEADER.match(message.octets) for message in sent), ascii(odd)


@pytest.mark.parametrize("end", list("\n\x0b\x0c\r\x1c\x1d\x1e\x85\u2028\u2029"))
@pytest.mark.parametrize("member", ["to", "cc", "from", "subject"])
def test_no_line_end_gets_into_a_header_field(member, end):
    _, api = api_on_clock()
    body = {"to": "a@b.example", "subject": "x", "send": True}
    body[member] = f"a@b.example{end}Bcc : c@d.example"
    assert ask(api, "POST", CREATE, body).status == 400


@pytest.mark.parametrize("send", [True, False])
def test_message_that_is_too_large_is_not_created(send):
    _, api = api_on_clock(limits={"max_size": 1_000})
    body = {"to": "a@b.example", "text": "x\n" * 500, "send": send}
    status, value = said(ask(api, "POST", CREATE, body))
    assert (status, value["type"]) == (413, "Error")
    assert re.fullmatch("Expected a mail of at most 1000 octets, got 1[0-9]{3}", value["message"])


def test_forward_has_the_original_below_and_its_attachments():
    _, api = api_on_clock()
    original = whole(api)
    value = created(api, {"to": "x@verified.example", "cc": "c@verified.example", "text": "See",
                          "html": None}, f"/api/messages/{original.id}/forward")
    assert outline(value) == {
        "from": ["bob@abcd1234.example"], "to": ["x@verified.example"],
        "cc": ["c@verified.example"], "subject": "Fwd: Grüße", "direction": "Sent",
        "text": "See\n\nann@sender.example wrote:\n> Your code is 482913, see "
                "https://x.example/t\n", "html": None}
    assert [(part["fileName"], part["contentId"], part["length"]) for part in value["attachments"]
            ] == [("cat.png", "logo", 4)]
    assert subjects_of(got(api, "/api/messages?server=abcd1234&dir=Sent")) == ["Fwd: Grüße"]


def test_reply_goes_to_the_sender_and_names_the_original():
    _, api = api_on_clock()
    original = whole(api)
    value = created(api, {"cc": None, "text": None, "html": "<p>hi</p>", "attachments": [
        {"contentType": "text/plain", "fileName": "a.txt", "contentId": None,
         "content": "aGk="}]}, f"/api/messages/{original.id}/reply")
    assert (outline(value)["to"], value["subject"]) == (["ann@sender.example"], "Re: Grüße")
    assert value["html"]["body"].startswith(
        "<p>hi</p><p>ann@sender.example wrote:</p><blockquote>")
    assert [part["fileName"] for part in value["attachments"]] == ["a.txt"]
    fields = {each["field"]: each["value"] for each in value["metadata"]["headers"]}
    assert fields["In-Reply-To"] == "<1@sender.example>"


def test_reply_goes_where_reply_to_says():
    _, api = api_on_clock()
    id = delivered(api.store, "a@x.example", octets=mail(
        "RE: hello", fields="From: a@b.example\r\nReply-To: c@d.example, E <e@f.example>\r\n")).id
    value = created(api, {"text": "t"}, f"/api/messages/{id}/reply")
    assert (outline(value)["to"], value["subject"]) == (
        ["c@d.example", "e@f.example"], "RE: hello")


HOSTILE = {
    "a broken address literal": "From: a@[1.2\r\n",
    "a quote without end": "From: \"a <a@b.example>\r\n",
    "a comment without end": "From: a@b.example (c\r\n",
    "brackets": "From: <<<a@b>>>,;:@@@\r\n",
    "an encoded line break": "From: =?utf-8?q?a=0d=0ab?= <a@b.example>\r\n",
    "an encoded line break in the subject":
        "From: a@b.example\r\nSubject: =?utf-8?q?=0d=0aBcc:x?=\r\n",
    "8 bit": "From: \udcff <a@b.example>\r\n",
    "a Message-ID with a break": "From: a@b.example\r\nMessage-ID: <a\udcff\r\n b>\r\n",
    "a surrogate in UTF-8": "From: a@b.example\r\nSubject: =?utf-8?q?=ED=A0=80=00?=\r\n",
}


@pytest.mark.parametrize("action", ["reply", "forward"])
@pytest.mark.parametrize("fields", rows(HOSTILE))
def test_hostile_mail_is_answered_and_forwarded_or_refused(fields, action):
    _, api = api_on_clock()
    id = delivered(api.store, "a@x.example",
                   octets=(fields + "\r\nx\r\n").encode("utf-8", "surrogateescape")).id
    body = {"text": "t", "to": "b@c.example"}
    assert ask(api, "POST", f"/api/messages/{id}/{action}", body).status in (200, 400)


@pytest.mark.parametrize("disposition, fields", rows({
    "a name with an encoded line break": ("filename*=utf-8''a%0d%0aX:1", ""),
    "a name that is no UTF-8": ("filename=\"\udcfc\"", ""),
    "a content id that is not ASCII": ("filename=x", "Content-ID: <\u00e9>\r\n"),
    "a content id with an encoded line break": (
        "filename=x", "Content-ID: =?utf-8?q?a=0d=0ab?=\r\n"),
    "a content id that is long": ("filename=x", f"Content-ID: <{'c' * 3_000}>\r\n"),
}))
def test_hostile_attachment_is_forwarded(disposition, fields):
    _, api = api_on_clock()
    id = delivered(api.store, "a@x.example", octets=attached(disposition, fields=fields)).id
    value = created(api, {"to": "b@c.example"}, f"/api/messages/{id}/forward")
    part, = value["attachments"]
    assert ask(api, "GET", f"/v1/attachments/{part['id']}").body == b"DATA"


# -- servers

def test_servers_are_created_read_renamed_and_deleted():
    _, api = api_on_clock()
    status, server = said(ask(api, "POST", "/api/servers/", {"name": "My test"}))
    assert (status, re.fullmatch("[a-z0-9]{8}", server["id"]) is not None) == (200, True)
    assert server == {"id": server["id"], "name": "My test", "users": [], "messages": 0}
    assert got(api, f"/api/servers/{server['id']}") == server
    assert got(api, "/api/servers") == {"items": [
        {"id": "mailtest", "name": "Every message", "users": [], "messages": 0}, server]}
    name = "My test … 👨🏿‍🚒"
    assert said(ask(api, "PUT", f"/api/servers/{server['id']}", {**server, "name": name})) == (
        200, {**server, "name": name})
    delivered(api.store, f"a@{server['id']}.example")
    assert got(api, f"/api/servers/{server['id'].upper()}") == {
        "id": server["id"], "name": name, "users": [], "messages": 1}
    assert ask(api, "DELETE", f"/api/servers/{server['id']}").status == 204
    gone = not_found(f"no server has the id '{server['id']}'; it appears with its first mail, "
                     "or with POST /api/servers")
    assert said(ask(api, "GET", f"/api/servers/{server['id']}")) == gone
    assert said(ask(api, "PUT", f"/api/servers/{server['id']}", {"name": "x"})) == gone
    assert said(ask(api, "DELETE", f"/api/servers/{server['id']}")) == gone
    assert said(ask(api, "GET", f"/api/servers/{server['id']}/password")) == gone
    assert got(api, "/api/messages") == {"items": []}


@pytest.mark.parametrize("password", ["", "correct horse"])
def test_password_of_a_server_is_the_one_of_smtp(password):
    _, api = api_on_clock(password=password)
    value = got(api, "/api/servers/mailtest/password")
    assert value == {"value": password or "anything"}
    assert len(value["value"]) >= 8                  # the clients' own tests look at that


def test_servers_are_bounded():
    _, api = api_on_clock(limits={"servers": 1})
    ask(api, "POST", "/api/servers", {"name": "a"})
    response = ask(api, "POST", "/api/servers", {"name": "b"})
    assert (response.status, response.headers) == (503, (("Retry-After", "1"),))


# -- devices

# RFC 6238 appendix B, SHA-1: time, the last six of its eight digits, end of its step
TOTP = {
    "1970-01-01 00:00:59": (59, "287082", "1970-01-01T00:01:00.000000+00:00"),
    "2005-03-18 01:58:29": (1111111109, "081804", "2005-03-18T01:58:30.000000+00:00"),
    "2005-03-18 01:58:31": (1111111111, "050471", "2005-03-18T01:59:00.000000+00:00"),
    "2009-02-13 23:31:30": (1234567890, "005924", "2009-02-13T23:32:00.000000+00:00"),
    "2033-05-18 03:33:20": (2000000000, "279037", "2033-05-18T03:33:30.000000+00:00"),
    "2603-10-11 11:33:20": (20000000000, "353130", "2603-10-11T11:33:30.000000+00:00"),
}
SECRET = "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ"    # 12345678901234567890


@pytest.mark.parametrize("now, code, expires", rows(TOTP))
def test_one_time_password(now, code, expires):
    _, api = api_on_clock(now=now)
    expected = 200, {"code": code, "expires": expires}
    assert said(ask(api, "POST", "/api/devices/otp", {"sharedSecret": SECRET})) == expected
    device = said(ask(api, "POST", "/api/devices", {"name": "d", "sharedSecret": SECRET}))[1]
    assert said(ask(api, "GET", f"/api/devices/{device['id']}/otp")) == expected


@pytest.mark.parametrize("secret", [
    SECRET.lower(), "GEZD GNBV GY3T QOJQ GEZD GNBV GY3T QOJQ", SECRET + "====",
    "GEZD-GNBV-GY3T-QOJQ-GEZD-GNBV-GY3T-QOJQ"])
def test_secret_is_taken_as_people_write_it(secret):
    _, api = api_on_clock(now=59)
    value = said(ask(api, "POST", "/api/devices/otp", {"sharedSecret": secret}))[1]
    assert value["code"] == "287082"


@pytest.mark.parametrize("secret", ["", None, "018", "ä", "=", "A" * 3 + "\0"])
def test_secret_that_is_none_is_refused(secret):
    _, api = api_on_clock()
    expected = invalid("sharedSecret", "Expected sharedSecret" + (
        f" to be base32, such as ONSWG4TFOQYTEMY=, got {secret!r}" if secret else
        ": a secret in base32"))
    for target in ("/api/devices/otp", "/api/devices"):
        body = {"name": "d", "sharedSecret": secret}
        assert said(ask(api, "POST", target, body)) == expected


def test_devices_are_created_listed_and_deleted():
    _, api = api_on_clock()
    status, device = said(ask(api, "POST", "/api/devices", {"name": "d", "sharedSecret": SECRET}))
    assert (status, device) == (200, {"id": device["id"], "name": "d"})
    assert "-" in device["id"]                       # the clients tell ids from secrets by that
    assert got(api, "/api/devices") == {"items": [device]}
    assert ask(api, "DELETE", f"/api/devices/{device['id']}").status == 204
    gone = not_found(f"no device has the id '{device['id']}'")
    assert said(ask(api, "DELETE", f"/api/devices/{device['id']}")) == gone
    assert said(ask(api, "GET", f"/api/devices/{device['id']}/otp")) == gone
    assert got(api, "/api/devices") == {"items": []}


# -- usage, analysis, previews

def test_usage_counts_what_was_accepted():
    clock, api = api_on_clock(limits={"max_memory": 1_000_000, "message_cost": 1_000,
                                      "servers": 7})
    clock.now += 3_600
    delivered(api.store, "a@x.example")
    ask(api, "POST", "/2010-04-01/Accounts/AC1/Messages.json", b"From=a&To=b&Body=c")
    clock.now += 3_600
    delivered(api.store, "a@x.example")
    assert got(api, "/api/usage/limits") == {
        "servers": {"limit": 7, "current": 3}, "users": {"limit": 1, "current": 1},
        "email": {"limit": 1_000, "current": 2}, "sms": {"limit": 1_000, "current": 1}}
    items = got(api, "/api/usage/transactions")["items"]
    assert items[:3] == [
        {"timestamp": "2026-11-21T03:00:00.000000+00:00", "email": 1, "sms": 0},
        {"timestamp": "2026-11-21T02:00:00.000000+00:00", "email": 1, "sms": 1},
        {"timestamp": "2026-11-21T01:00:00.000000+00:00", "email": 0, "sms": 0}]
    assert len(items) == 24
    clock.now += 24 * 3_600
    delivered(api.store, "a@x.example")
    items = got(api, "/api/usage/transactions")["items"]
    assert [item["email"] for item in items] == [1] + 23 * [0]
    clock.now -= 3_600                   # somebody sets the clock
    delivered(api.store, "a@x.example")
    assert got(api, "/api/usage/transactions")["items"][0] == {
        "timestamp": "2026-11-22T02:00:00.000000+00:00", "email": 1, "sms": 0}


SPAMMY = mail("x", "<form><script></script><iframe></iframe><embed><object></object></form>"
                   "<a href=\"https://bit.ly/x\">x</a><img src=a>",
              "Content-Type: text/html\r\nDate: Sat, 21 Nov 2026 01:33:36 +0000\r\n"
              "Message-ID: <1@x.example>\r\nFrom: a@b.example\r\nMIME-Version: 1.0\r\n")


def test_spam_analysis_says_what_it_saw_and_that_it_is_no_verdict():
    _, api = api_on_clock()
    id = delivered(api.store, "a@x.example", octets=SPAMMY).id
    value = got(api, f"/api/analysis/spam/{id}")
    assert value["score"] == 0
    rules = value["spamFilterResults"]["spamAssassin"]
    assert {rule["score"] for rule in rules} == {0}
    assert [rule["rule"] for rule in rules if rule["rule"] != "WARNING"] == [
        "NOT_SCORED", "CONTENT_EMBED", "CONTENT_IFRAME", "CONTENT_OBJECT", "CONTENT_SCRIPT",
        "CONTENT_FORM"]
    assert [rule["description"] for rule in rules if rule["rule"] == "WARNING"] == got(
        api, f"/api/messages/{id}")["warnings"]


def test_deliverability_says_what_it_saw_and_what_was_not_checked():
    _, api = api_on_clock()
    id = delivered(api.store, "a@x.example", octets=SPAMMY).id
    offline = "Not checked: this catcher works offline, and asks no other machine"
    unknown = {"result": "Timeout", "description": offline, "rawValue": "", "tags": {}}
    assert got(api, f"/api/analysis/deliverability/{id}") == {
        "spf": unknown, "dkim": [unknown], "dmarc": unknown,
        "blockLists": [{"id": "none", "name": offline, "result": "Timeout"}],
        "content": {"embed": True, "iframe": True, "object": True, "script": True, "form": True,
                    "shortUrls": True, "textSize": 0, "totalSize": len(SPAMMY),
                    "missingAlt": True, "missingListUnsubscribe": True},
        "dnsRecords": {"a": [], "mx": [], "ptr": []},
        "spamAssassin": {"score": 0, "result": "Timeout", "rules": [
            {"score": 0, "rule": "NOT_SCORED", "description": offline}]}}


def test_previews_in_mail_clients_are_not_faked():
    _, api = api_on_clock()
    id = delivered(api.store, "a@x.example").id
    assert got(api, "/api/screenshots/clients") == {"items": []}
    text = ("Screenshots in mail clients need those clients, and none is here; "
            f"http://localhost:8080/v1/messages/{id}/preview shows the HTML")
    assert said(ask(api, "POST", f"/api/messages/{id}/screenshots", {"emailClients": ["x"]})) == (
        501, {"type": "Error", "message": text,
              "errors": [{"field": "", "detail": [{"description": text}]}]})
    assert ask(api, "GET", f"/api/files/screenshots/{id}")[:2] == (404, b"")


# -- SMS

TWILIO = "/2010-04-01/Accounts/AC123/Messages.json"


def number(phone):
    return {"name": None, "email": None, "phone": phone}


def test_sms_is_stored_as_the_seed_shows_it_and_never_null():
    _, api = api_on_clock()
    status, sent = said(ask(api, "POST", TWILIO, b"To=%2B491512&From=%2B15005550006&"
                                                 b"Body=Your+code+is+482913+%F0%9F%98%80",
                            client="192.0.2.1"))
    item, = got(api, "/api/messages")["items"]
    text = "Your code is 482913 😀"
    sid = "SM" + item["id"].replace("-", "")
    assert (status, sent) == (201, {
        "sid": sid, "account_sid": "AC123", "from": "+15005550006", "to": "+491512",
        "body": text, "status": "queued", "direction": "outbound-api", "num_segments": "1",
        "num_media": "0", "api_version": "2010-04-01", "date_sent": None,
        "date_created": "Sat, 21 Nov 2026 01:33:37 -0000",
        "date_updated": "Sat, 21 Nov 2026 01:33:37 -0000",
        "error_code": None, "error_message": None, "price": None, "price_unit": "USD",
        "messaging_service_sid": None, "subresource_uris": {},
        "uri": f"/2010-04-01/Accounts/AC123/Messages/{sid}.json"})
    assert got(api, f"/api/messages/{item['id']}") == {
        "id": item["id"], "type": "SMS", "received": "2026-11-21T01:33:37.000000+00:00",
        "subject": "", "from": [number("+15005550006")], "to": [number("+491512")],
        "cc": [], "bcc": [], "html": {"body": None, "links": [], "codes": [], "images": []},
        "text": {"body": text, "links": [], "codes": [{"value": "482913"}], "images": []},
        "attachments": [],
        "metadata": {"headers": [], "ehlo": None, "mailFrom": "+15005550006",
                     "rcptTo": [number("+491512")], "client": "192.0.2.1", "user": None,
                     "tls": False},
        "size": len(text.encode()), "direction": "Received", "warnings": [], "session": [],
        "server": "mailtest"}
    assert item == {
        "id": item["id"], "type": "SMS", "received": "2026-11-21T01:33:37.000000+00:00",
        "subject": "", "from": [number("+15005550006")], "to": [number("+491512")], "cc": [],
        "bcc": [], "summary": text, "attachments": 0, "size": len(text.encode()),
        "code": "482913", "links": 0, "warnings": 0, "direction": "Received",
        "seen": False, "inboxes": ["+491512"], "server": "mailtest"}


def test_sms_is_searched_and_read_in_the_inbox_of_its_number():
    _, api = api_on_clock()
    assert ask(api, "POST", TWILIO, b"To=%2B49&MessagingServiceSid=MG1&Body=code").status == 201
    for body, found in (({"sentTo": "+49"}, 1), ({"sentFrom": "MG1"}, 1), ({"sentTo": "+4"}, 0)):
        assert len(said(ask(api, "POST", "/api/messages/search", body))[1]["items"]) == found
    assert got(api, "/v1/get/%2B49")["messages"][0]["text"]["body"] == "code"


@pytest.mark.parametrize("form, field", rows({
    "nothing": (b"", "To"), "no To": (b"From=a&Body=b", "To"),
    "no From": (b"To=a&Body=b", "From"), "no Body": (b"To=a&From=b", "Body"),
    "an empty Body": (b"To=a&From=b&Body=", "Body")}))
def test_sms_that_lacks_something_is_refused_as_twilio_does(form, field):
    _, api = api_on_clock()
    said_of = {"To": "Expected To: the recipient of an SMS", "From": "Expected From: its sender",
               "Body": "Expected Body: its text"}
    assert said(ask(api, "POST", TWILIO, form)) == (400, {
        "error": "bad_request", "detail": said_of[field],
        "code": {"To": 21604, "From": 21603, "Body": 21602}[field], "message": said_of[field]})


@pytest.mark.parametrize("to", ["a%0d%0ab", "%00", "x" * 101, "x" * 99 + "%20x", "+49"])
def test_sms_to_what_is_no_number_is_refused(to):
    _, api = api_on_clock()
    status, value = said(ask(api, "POST", TWILIO, f"To={to}&From=a&Body=b".encode()))
    assert (status, value["error"]) == (400, "bad_request")
    assert value["detail"].startswith("Expected To to be a telephone number or sender id "
        "of at most 100 characters (a + is sent as %2B), got ")


# -- the Mailtest service

@pytest.mark.parametrize("target, detail", [
    ("/v1/get/a@x.example?timeout=1&subjekt=x", "Unknown parameter 'subjekt': expected timeout, "
     "count, subject, from, to, body, header, after, expect"),
    ("/v1/acquire?fale=rcpt:451", "Unknown parameter 'fale': expected fail"),
    ("/a@x.example?Count=2", "Unknown parameter 'Count': expected timeout, count, subject, from, "
     "to, body, header, after, expect"),
], ids=["a filter", "a script", "another case"])
def test_mistyped_parameter_is_refused(target, detail):
    _, api = api_on_clock()
    delivered(api.store, "a@x.example")
    assert said(ask(api, "GET", target)) == (400, {"error": "bad_request", "detail": detail})
    assert len(api.store.inboxes()) == 1             # and none was made


@pytest.mark.parametrize("path", ["/v1/acquire", "/v1/register", "/acquire", "/aquire",
                                  "/v1/acquire/"])
def test_acquire_gives_an_address_and_a_newline(path):
    _, api = api_on_clock(smtp="127.0.0.1:2525")
    response = ask(api, "GET", path)
    view, = api.store.inboxes()
    assert response == mailtest.Response(200, f"{view.address}\n".encode(),
                                         "text/plain; charset=utf-8")
    status, value = said(ask(api, "GET", path, accept="application/json, */*"))
    assert (status, value) == (200, {
        "address": value["address"], "expires": "2026-11-21T01:43:37.000000+00:00",
        "server": "mailtest", "smtp": "127.0.0.1:2525"})
    assert {each.address for each in api.store.inboxes()} == {view.address, value["address"]}


def test_inbox_says_what_it_holds_newest_first():
    clock, api = api_on_clock()
    address = api.store.acquire().address
    for subject in ("1", "2"):
        delivered(api.store, address, octets=mail(subject))
    value = got(api, f"/v1/get/{address}")
    messages = value.pop("messages")
    assert value == {
        "address": address, "expires": "2026-11-21T01:43:37.000000+00:00", "acquired": True,
        "message_count": 2, "unseen": 2, "attempts": 0, "watch": None, "failures": []}
    assert [message["subject"] for message in messages] == ["2", "1"]
    assert messages == [got(api, f"/api/messages/{each['id']}") for each in messages]
    for path in (f"/v1/load/{address}", f"/{address}", f"/v1/get/{address.replace('@', '%40')}",
                 f"/v1/get/{address.upper()}", f"/v1/get/{address.replace('@', '+tag@')}"):
        assert got(api, path) == {**value, "messages": messages}


NOBODY = ("no SMTP client has connected since: is the application set to this host and port? "
          "(test modes replace the mailer: Django's locmem, Flask-Mail's TESTING, Rails' :test, "
          "Laravel's array)")


def test_get_fails_while_there_is_no_mail_and_load_does_not():
    _, api = api_on_clock()
    address = api.store.acquire().address
    assert said(ask(api, "GET", f"/v1/get/{address}")) == (404, {
        "error": "empty", "detail": f"Expected 1 message for {address}, got 0; "
        "the inbox holds 0 in all", "waited": 0.0, "received": [],
        "hints": [NOBODY]})
    value = got(api, f"/v1/load/{address}")
    assert (value["message_count"], value["messages"]) == (0, [])


UNKNOWN_INBOXES = {
    "an address that never was": "nobody@x.example",
    "no address": "nobody", "an empty one": "%20", "a long one": "a" * 3_000 + "@x.example",
    "the default server": "mailtest", "a server's place": "%2Fmailtest",
    "an outbox": "outbox%20of%20mailtest", "a message id": "5d0f-0",
}


@pytest.mark.parametrize("path", ["/v1/get/", "/v1/load/"])
@pytest.mark.parametrize("address", rows(UNKNOWN_INBOXES))
def test_unknown_inbox_is_not_found(path, address):
    _, api = api_on_clock()
    delivered(api.store, "a@mailtest.example", direction="Sent", server="mailtest")
    text = urllib.parse.unquote(address)[:320]
    expected = 404, {"error": "not_found", "detail": f"no inbox {text!r}; acquire one, or send "
                                                     "mail to it first"}
    assert said(ask(api, "GET", path + address)) == expected
    assert said(ask(api, "DELETE", "/v1/get/" + address)) == expected


@pytest.mark.parametrize("query", ["timeout=1&expect=0", "timeout=1&count=9"])
@pytest.mark.parametrize("address", ["%2Fmailtest", "%2Fx", "outbox%20of%20x"])
def test_inbox_request_gives_no_mail_of_others(address, query, timed):
    _, api, _ = timed
    delivered(api.store, "a@x.example", octets=mail("secret"))
    delivered(api.store, "a@x.example", octets=mail("secret"), direction="Sent", server="x")
    response = ask(api, "GET", f"/v1/load/{address}?{query}")
    assert b"secret" not in response.body


def test_expired_inbox_says_when_it_ended():
    clock, api = api_on_clock()
    address = api.store.acquire().address
    clock.now += 600
    expected = 404, {"error": "not_found", "detail": f"the inbox '{address.lower()}' expired at "
                     "2026-11-21T01:43:37.000000+00:00; acquire a new one"}
    for path in (f"/v1/get/{address}", f"/v1/load/{address}?timeout=10", f"/{address}"):
        assert said(ask(api, "GET", path)) == expected
    assert said(ask(api, "DELETE", f"/v1/get/{address}")) == expected


def test_deleted_inbox_is_gone_with_its_mail():
    _, api = api_on_clock()
    address = api.store.acquire().address
    delivered(api.store, address)
    response = ask(api, "DELETE", f"/v1/get/{address}")
    assert (response.status, response.body) == (204, b"")
    gone = 404, {"error": "not_found", "detail": f"the inbox '{address.lower()}' was deleted at "
                 "2026-11-21T01:33:37.000000+00:00; acquire a new one"}
    assert said(ask(api, "GET", f"/v1/load/{address}")) == gone
    assert said(ask(api, "DELETE", f"/v1/get/{address}")) == gone
    assert got(api, "/api/messages") == {"items": []}


def test_scripted_failures_are_acquired_and_counted():
    _, api = api_on_clock()
    address = ask(api, "GET", "/v1/acquire?fail=rcpt:451*2&fail=data:delay=0.5").body[:-1].decode()
    api.store.refusal(address)
    assert api.store.scripted("rcpt", address).code == 451
    value = got(api, f"/v1/load/{address}")
    assert (value["attempts"], value["failures"]) == (1, [
        {"fail": "rcpt:451*2", "answered": 1, "left": 1},
        {"fail": "data:delay=0.5", "answered": 0, "left": 1}])


def test_inboxes_are_listed():
    _, api = api_on_clock()
    delivered(api.store, "a@x.example")
    address = api.store.acquire().address
    expires = "2026-11-21T01:43:37.000000+00:00"
    assert got(api, "/v1/inboxes") == {"items": [
        {"address": address, "expires": expires, "acquired": True, "message_count": 0,
         "unseen": 0, "attempts": 0, "watch": None, "failures": []},
        {"address": "a@x.example", "expires": expires, "acquired": False, "message_count": 1,
         "unseen": 1, "attempts": 0, "watch": None, "failures": []}]}


def test_seen_marks_and_emptying_are_told_in_lists():
    _, api = api_on_clock()
    first = delivered(api.store, "a@x.example", "b@x.example")
    delivered(api.store, "a@x.example")
    for method, unseen in (("PUT", 1), ("DELETE", 2)):
        assert ask(api, method, f"/v1/messages/{first.id}/seen").status == 204
        assert [each["seen"] for each in got(api, "/api/messages")["items"]] == [
            False, method == "PUT"]
        assert got(api, "/healthz")["unseen"] == unseen
    assert ask(api, "DELETE", "/v1/inboxes/a@x.example/messages").status == 204
    assert [each["id"] for each in got(api, "/api/messages")["items"]] == [first.id]
    assert ask(api, "DELETE", "/v1/inboxes/nobody@x.example/messages").status == 404


def test_sessions_are_listed_newest_first():
    _, api = api_on_clock()
    for _ in range(2):
        api.store.add_session(mailtest.SessionRecord(
            0, "192.0.2.1", "", "", False, NOVEMBER, NOVEMBER + 1, 0, "550 5.1.1 No", "quit",
            b"C: QUIT\r\nS: 221 \xff\0\r\n"))
    items = got(api, "/v1/sessions")["items"]
    assert [item["number"] for item in items] == [2, 1]
    assert items[0] == {
        "number": 2, "client": "192.0.2.1", "helo": None, "user": None, "tls": False,
        "started": "2026-11-21T01:33:37.000000+00:00", "ended": "2026-11-21T01:33:38.000000+00:00",
        "messages": 0, "refused": "550 5.1.1 No", "ending": "quit",
        "transcript": ["C: QUIT", "S: 221 \ufffd\ufffd"]}


# -- waiting for an inbox

def post_mail(api, subject, paths=("a@x.example",), text="x", sender="s@sender.example"):
    """Delivers a mail of that subject."""
    return delivered(api.store, *paths, octets=mail(subject, text, f"From: {sender}\r\n"))


# what is there, what comes (seconds, subject), the query; seconds waited, subjects in the answer
WAITS = {
    "there is one already": (["1"], [], "timeout=60", 0, "1"),
    "one comes": ([], [(2.5, "1")], "timeout=60", 2.5, "1"),
    "one comes at the last moment": ([], [(10, "1")], "timeout=10", 10, "1"),
    "all that are there are given": (["1", "2"], [], "timeout=60", 0, "2 1"),
    "no timeout: what is there": (["1"], [(1, "2")], "", 0, "1"),
    "two are waited for": (["1"], [(1, "2")], "timeout=60&count=2", 1, "2 1"),
    "more than two when there are": (["1", "2", "3"], [], "timeout=60&count=2", 0, "3 2 1"),
    "one that matches": (["1"], [(1, "2"), (2, "wanted"), (3, "4")],
                         "timeout=60&subject=ante", 2, "wanted"),
    "only those that match": (["wanted 1", "2"], [(1, "3"), (2, "WANTED 4")],
                              "timeout=60&subject=wanted&count=2", 2, "WANTED-4 wanted-1"),
    "by the sender": (["1"], [], "from=S@SENDER.example", 0, "1"),
    "by the body": (["1"], [], "body=X", 0, "1"),
    "silence": ([], [(11, "1")], "timeout=10&expect=0", 10, ""),
    "silence in an inbox that has mail, after it": (
        ["1"], [], "timeout=10&expect=0&after={1}", 10, ""),
    "silence but for what does not match": (
        ["1"], [(1, "2")], "timeout=10&expect=0&subject=wanted", 10, ""),
    "silence at this moment": ([], [], "expect=0&subject=wanted", 0, ""),
    "only what came after that one": (["1", "2", "3"], [], "after={1}", 0, "3 2"),
    "the next one after that one": (["1", "2"], [(1, "3")], "timeout=60&after={2}", 1, "3"),
    "seconds with a fraction": ([], [(0.25, "1")], "timeout=0.5", 0.25, "1"),
    "the longest timeout": ([], [(59.5, "1")], "timeout=60.0", 59.5, "1"),
    "empty parameters are not given": (
        ["1"], [], "timeout=&count=&subject=&from=&body=&after=&expect=", 0, "1"),
}


def play_wait(timed, before, coming, query, path="/v1/get/"):
    """The answer to a wait in which things happen, and the seconds that it took."""
    clock, api, later = timed
    delivered(api.store, "a@x.example", octets=mail("first"))
    known = {subject: post_mail(api, subject).id for subject in before}
    api.store.delete(api.store.messages(server="mailtest")[-1].id)        # the inbox is open now
    for seconds, subject in coming:
        later(seconds, post_mail, api, subject)
    query = re.sub(r"\{(\d)\}", lambda match: known[match.group(1)], query)
    return ask(api, "GET", f"{path}a@x.example?{query}"), clock.now - NOVEMBER


@pytest.mark.parametrize("before, coming, query, seconds, expected", rows(WAITS))
def test_wait(before, coming, query, seconds, expected, timed):
    response, waited = play_wait(timed, before, coming, query)
    status, value = said(response)
    assert (status, [each["subject"].replace(" ", "-") for each in value["messages"]],
            value["message_count"], waited) == (
        200, expected.split(), len(expected.split()), seconds)


TIMEOUTS = {
    "nothing came": ([], [], "timeout=10", 10, ""),
    "load waits as well": ([], [], "timeout=10", 10, ""),
    "too few came": (["1"], [(1, "2")], "timeout=10&count=3", 10, "2 1"),
    "others came": (["1"], [(1, "2")], "timeout=10&subject=wanted", 10, "2 1"),
    "nothing came after that one": (["1"], [], "timeout=10&after={1}", 10, "1"),
    "it came too late": ([], [(10.5, "1")], "timeout=10", 10, ""),
}


@pytest.mark.parametrize("path", ["/v1/get/", "/v1/load/", "/"])
@pytest.mark.parametrize("before, coming, query, seconds, received", rows(TIMEOUTS))
def test_wait_that_times_out_says_what_did_arrive(before, coming, query, seconds, received, path,
                                                  timed):
    response, waited = play_wait(timed, before, coming, query, path)
    status, value = said(response)
    assert (status, value["error"], value["waited"], waited) == (404, "timeout", seconds, seconds)
    assert value["received"] == got(timed[1], "/api/messages")["items"]
    assert [item["subject"] for item in value["received"]] == received.split()


@pytest.mark.parametrize("before, coming, query, seconds, expected", rows({
    "one is there": (["1"], [], "timeout=10&expect=0", 0, "1"),
    "one is there, and nobody waits": (["1"], [], "expect=0", 0, "1"),
    "one comes": ([], [(2, "1"), (3, "2")], "timeout=10&expect=0", 2, "1"),
    "one that matches comes": (["1"], [(2, "2"), (3, "wanted")],
                               "timeout=10&expect=0&subject=wanted", 3, "wanted"),
}))
def test_silence_that_is_broken_is_a_conflict_with_the_message(before, coming, query, seconds,
                                                               expected, timed):
    response, waited = play_wait(timed, before, coming, query)
    status, value = said(response)
    message, = api_messages = value.pop("messages")
    assert (status, value, waited) == (409, {
        "error": "unexpected", "detail": "Expected no such mail for a@x.example, got 1",
        "waited": seconds}, seconds)
    assert api_messages == [got(timed[1], f"/api/messages/{message['id']}")]
    assert message["subject"] == expected


def test_wait_for_an_inbox_that_does_not_exist_yet(timed):
    clock, api, later = timed
    later(3, post_mail, api, "1")
    assert got(api, "/v1/get/a@x.example?timeout=10")["message_count"] == 1
    assert clock.now == NOVEMBER + 3
    assert said(ask(api, "GET", "/v1/get/b@x.example?timeout=10&expect=0")) == (200, {
        "address": "b@x.example", "expires": None, "message_count": 0, "messages": []})


@pytest.mark.parametrize("query, detail", rows({
    "a word for seconds": ("timeout=soon", "timeout to be a number from 0 to 60, got 'soon'"),
    "too many seconds": ("timeout=60.1", "timeout to be a number from 0 to 60, got '60.1'"),
    "negative seconds": ("timeout=-1", "timeout to be a number from 0 to 60, got '-1'"),
    "endless": ("timeout=inf", "timeout to be a number from 0 to 60, got 'inf'"),
    "no messages": ("count=0", "count to be a whole number from 1 to 10000, got '0'"),
    "half a message": ("count=1.5", "count to be a whole number from 1 to 10000, got '1.5'"),
    "something else than silence": ("expect=1", "expect to be 0, which proves that no mail comes, "
                                                "got '1'"),
}))
def test_bad_wait_says_what_was_expected(query, detail):
    _, api = api_on_clock()
    post_mail(api, "1")
    assert said(ask(api, "GET", f"/v1/get/a@x.example?{query}")) == (
        400, {"error": "bad_request", "detail": f"Expected {detail}"})


def test_waits_are_bounded():
    _, api = api_on_clock(limits={"waiters": 0})
    response = ask(api, "GET", "/v1/get/a@x.example?timeout=1")
    assert said(response) == (503, {
        "error": "full", "detail": "Try again later: 0 requests are waiting for mail"})
    assert response.headers == (("Retry-After", "1"),)


def test_wait_of_a_client_that_hangs_up_is_given_up():
    _, api = api_on_clock()
    with pytest.raises(mailtest.Hangup, match="hung up while it waited"):
        ask(api, "GET", "/v1/get/a@x.example?timeout=60", gone=True)
    assert api.store.counters()["waiters"] == 0


def test_wait_is_one_step_with_looking(waiting_store):
    api = mailtest.Api(waiting_store)
    waiter = in_thread(ask, api, "GET", "/v1/get/a@x.example?timeout=60&count=2")
    for subject in ("1", "2"):
        waiting_store.next_waiter()
        delivered(waiting_store, "a@x.example", octets=mail(subject))
    status, value = said(waiter.join_value())
    assert (status, [each["subject"] for each in value["messages"]]) == (200, ["2", "1"])


# -- who may

OPEN = {("GET", "/"), ("GET", "/page.css"), ("GET", "/page.js"), ("GET", "/favicon.ico"),
        ("GET", "/healthz"), ("GET", "/cert.pem"), ("GET", "/v1/messages/{id}/preview"),
        ("GET", "/v1/messages/{id}/source"), ("GET", "/v1/attachments/{id}"),
        ("PUT", "/v1/messages/{id}/seen"), ("DELETE", "/v1/messages/{id}/seen")}
SERVICE = {("GET", "/v1/acquire"), ("GET", "/v1/register"), ("GET", "/acquire"),
           ("GET", "/aquire"), ("GET", "/v1/get/{address}"), ("GET", "/v1/load/{address}"),
           ("DELETE", "/v1/get/{address}"), ("GET", "/{address}"),
           ("DELETE", "/v1/inboxes/{address}/messages"), ("GET", "/v1/watch/{address}"),
           ("DELETE", "/v1/watch/{address}")}


def key(text):
    """The Authorization field of HTTP Basic."""
    return "Basic " + mailtest.base64.b64encode(text.encode()).decode()


# policy, authorization; the status for routes of the API, 0 for whatever they answer
ACCESS = {
    "no key, no credentials": ({}, "", 0),
    "no key: credentials are ignored": ({}, key("any:thing"), 0),
    "a key, no credentials": ({"api_key": "k"}, "", 401),
    "a key, another key": ({"api_key": "k"}, key("x:"), 401),
    "a key, the right one as user": ({"api_key": "k"}, key("k:"), 0),
    "a key, the right one as password": ({"api_key": "k"}, key("api:k"), 0),
    "hosted without a key": ({"hosted": True}, "", 403),
    "hosted without a key, credentials": ({"hosted": True}, key(":"), 403),
    "hosted, no credentials": ({"hosted": True, "api_key": "k"}, "", 401),
    "hosted, the right key": ({"hosted": True, "api_key": "k"}, key("k:"), 0),
}


@pytest.mark.parametrize("policy, authorization, status", rows(ACCESS))
def test_access_to_every_route(policy, authorization, status):
    _, api = api_on_clock(**policy)
    fields = {"authorization": authorization} if authorization else {}
    for route in mailtest.ROUTES:
        target = re.sub(r"\{\w+\}", api.store.acquire().address, route.path)
        found = ask(api, route.method, target, **fields)
        closed = status if (route.method, route.path) not in OPEN | SERVICE else 0
        assert found.status == closed if closed else (
            found.status not in (401, 403, 405, 429, 500)), route
        assert (dict(found.headers).get("WWW-Authenticate") is not None) == (closed == 401)


@pytest.mark.parametrize("authorization, right", rows({
    "user": (key("k\u00e9y:"), True), "password": (key(":k\u00e9y"), True),
    "user and any password": (key("k\u00e9y:x"), True),
    "lower case scheme": (key("k\u00e9y:").replace("Basic", "basic"), True),
    "no colon": (key("k\u00e9y"), True),
    "part of it": (key("k\u00e9:"), False), "more than it": (key("k\u00e9yy:"), False),
    "another case": (key("K\u00c9Y:"), False), "empty halves": (key(":"), False),
    "Bearer": ("Bearer k\u00e9y", False), "no base64": ("Basic k\u00e9y:", False),
    "nothing": ("", False), "the scheme alone": ("Basic", False)}))
def test_key_in_either_half(authorization, right):
    _, api = api_on_clock(api_key="k\u00e9y")
    status = ask(api, "GET", "/api/servers", authorization=authorization).status
    assert status == (200 if right else 401)


@pytest.mark.parametrize("text", ["a:b:", "api:a:b", "a:b"])
def test_key_may_hold_a_colon(text):
    _, api = api_on_clock(api_key="a:b")
    assert ask(api, "GET", "/api/servers", authorization=key(text)).status == 200


@pytest.mark.parametrize("policy, status", rows({
    "a key": ({"api_key": "k"}, 401), "hosted": ({"hosted": True}, 403),
    "hosted with a key": ({"hosted": True, "api_key": "k"}, 401)}))
def test_what_was_not_acquired_is_open_to_holders_of_the_key_alone(policy, status):
    _, api = api_on_clock(**policy)
    mine = api.store.acquire().address
    ids = [delivered(api.store, address).id for address in ("admin@corp.example", mine)]
    for method, path in (("GET", "/v1/get/{}"), ("GET", "/v1/load/{}"), ("GET", "/{}"),
                         ("DELETE", "/v1/inboxes/{}/messages"), ("DELETE", "/v1/get/{}")):
        for address in ("admin@corp.example", "nobody@corp.example"):
            assert ask(api, method, path.format(address)).status == status
    assert [ask(api, "GET", f"/api/messages/{id}").status for id in ids] == [status, 200]
    for path in ("/api/messages?", "/v1/inboxes?", "/v1/events?"):
        assert ask(api, "GET", path).status == status
    for query, found in ((f"inbox={mine}", ids[1:]), ("inbox=admin@corp.example", []),
                         (f"inbox=admin@corp.example&inbox={mine}&q=subject:x", ids[1:]),
                         (f"inbox={mine}&q=nothing", [])):
        assert [each["id"] for each in got(api, f"/api/messages?{query}")["items"]] == found
    assert [each["address"] for each in got(
        api, f"/v1/inboxes?inbox=admin@corp.example&inbox={mine}")["items"]] == [mine]
    for query, found in ((f"inbox={mine}", ids[1:]), ("inbox=admin@corp.example", [])):
        text = stream(ask(api, "GET", f"/v1/events?after=0&{query}", gone=True), 3)
        assert [id for id in ids if id in text] == found
    assert ask(api, "GET", f"/v1/get/{mine}").status == 200
    assert ask(api, "GET", f"/v1/get/{mine}?count=2").body.endswith(b',"hints":[],"received":[' +
        mailtest.item(api, api.store.message(ids[1])) + b"]}")
    assert ask(api, "DELETE", f"/v1/get/{mine}").status == 204


def test_refusals_for_want_of_a_key_say_what_to_do():
    text = ("Expected HTTP Basic authentication with the API key as user or password; only what "
            "acquired addresses get is open without")
    _, api = api_on_clock(api_key="k")
    assert said(ask(api, "GET", "/api/servers")) == (401, {
        "type": "AuthenticationError", "message": text,
        "errors": [{"field": "", "detail": [{"description": text}]}]})
    assert said(ask(api, "GET", "/v1/inboxes")) == (401, {"error": "unauthorized", "detail": text})
    _, api = api_on_clock(hosted=True)
    assert said(ask(api, "GET", "/v1/events")) == (403, {
        "error": "forbidden", "detail": "This hosted service was started without --api-key: "
        "who knows an acquired address may read it, and nobody may do more"})


# clients in turn, the statuses that they get when two requests a minute may be made
RATES = {
    "one IPv4 address": ("192.0.2.1 192.0.2.1 192.0.2.1", "200 200 429"),
    "two IPv4 addresses": ("192.0.2.1 192.0.2.2 192.0.2.1 192.0.2.2", "200 200 200 200"),
    "one IPv6 /64": ("2001:db8::1 2001:db8::2 2001:db8::3", "200 200 429"),
    "two IPv6 /64": ("2001:db8::1 2001:db8::1 2001:db8:0:1::1", "200 200 200"),
    "one IPv6 address in two spellings": ("2001:DB8::1 2001:db8:0::1 2001:db8::1", "200 200 429"),
    "IPv4 through a dual-stack proxy": (
        "::ffff:192.0.2.1 ::ffff:192.0.2.1 ::ffff:192.0.2.2", "200 200 200"),
    "what is no address": ("unknown unknown unknown", "200 200 429"),
    "IPv4 with ports": ("7.7.7.7:1234 7.7.7.7 7.7.7.7:80", "200 200 429"),
    "IPv6 with brackets and ports": ("[2001:db8::1] 2001:db8::1 [2001:db8::1]:80", "200 200 429"),
}


@pytest.mark.parametrize("clients, statuses", rows(RATES))
def test_rate_of_the_mailtest_service(clients, statuses):
    _, api = api_on_clock(limits={"rate": 2})
    found = [ask(api, "GET", "/v1/acquire", client=client).status for client in clients.split()]
    assert found == [int(status) for status in statuses.split()]


def test_rate_says_when_to_come_back_and_lets_pass_then():
    clock, api = api_on_clock(limits={"rate": 1})
    address = ask(api, "GET", "/v1/acquire").body[:-1].decode()
    clock.now += 15.5
    response = ask(api, "GET", f"/v1/get/{address}")
    assert said(response) == (429, {
        "error": "rate_limited",
        "detail": "Expected at most 1 requests a minute; try again in 44 s"})
    assert response.headers == (("Retry-After", "45"),)
    clock.now += 44.5
    assert ask(api, "GET", f"/v1/load/{address}").status == 200


def test_rate_leaves_everything_else_alone():
    _, api = api_on_clock(limits={"rate": 1})
    ask(api, "GET", "/v1/acquire")
    for target in ("/", "/healthz", "/api/messages", "/api/servers", "/v1/inboxes"):
        assert [ask(api, "GET", target).status for _ in range(3)] == [200] * 3
    for route in mailtest.ROUTES:
        if (route.method, route.path) in SERVICE:
            target = re.sub(r"\{\w+\}", "a@x.example", route.path)
            assert ask(api, route.method, target).status == 429


def test_hosted_service_lets_who_knows_an_address_read_it():
    _, api = api_on_clock(strict=True, hosted=True)
    address = ask(api, "GET", "/v1/acquire").body[:-1].decode()
    id = delivered(api.store, address, octets=EVERYTHING).id
    part = got(api, f"/v1/get/{address}")["messages"][0]["attachments"][0]
    assert part["url"] == f"http://localhost:8080/v1/attachments/{id}-0"
    for target in (f"/v1/messages/{id}/preview", f"/v1/messages/{id}/source",
                   f"/v1/attachments/{id}-0"):
        assert ask(api, "GET", target).status == 200
    assert ask(api, "DELETE", f"/v1/get/{address}").status == 204


# Host field, status
HOSTS = {
    "an IPv4 address": ("127.0.0.1", 200), "with a port": ("192.168.0.7:8080", 200),
    "an IPv6 address": ("[::1]", 200), "IPv6 with a port": ("[fe80::1]:8080", 200),
    "localhost": ("localhost", 200), "localhost in capitals": ("LOCALHOST:8080", 200),
    "a single label": ("mailtest", 200), "a label with a line": ("mail_test-1:8080", 200),
    "below localhost": ("app.localhost:8080", 200),
    "one that is allowed": ("mail.example", 200),
    "allowed with a port": ("mail.example:8080", 200),
    "allowed in capitals": ("MAIL.example", 200),
    "below one that is allowed": ("x.mail.example", 421),
    "a domain that is allowed": ("corp.example:8080", 200),
    "below a domain that is allowed": ("a.b.CORP.example", 200),
    "a name that ends like it": ("evilcorp.example", 421),
    "a container's host": ("host.docker.internal:8080", 200), "a test name": ("mail.test", 200),
    "in the home": ("mail.home.arpa", 200), "found by multicast": ("mail.local", 200),
    "another": ("evil.example", 421), "another with a port": ("evil.example:8080", 421),
    "localhost as a subdomain": ("localhost.evil.example", 421),
    "an address as a subdomain": ("127.0.0.1.evil.example", 421),
    "an address in words": ("127.0.0.1.nip.io:8080", 421),
    "a user before it": ("evil.example@localhost", 421),
    "two names": ("localhost, evil.example", 421), "a path": ("localhost/x", 421),
    "a dot at the end": ("evil.example.", 421), "a port that is none": ("evil.example:x", 421),
    "a line break at the end": ("localhost\n", 421),
    "empty": ("", 200),
}


@pytest.mark.parametrize("host, status", rows(HOSTS))
def test_host(host, status):
    _, api = api_on_clock(allow_hosts=("mail.example", ".corp.example"))
    for target in ("/", "/healthz", "/api/messages"):
        assert ask(api, "GET", target, host=host).status == status
    assert ask(api, "GET", "/healthz", host=host, tunnel=True).status == 200     # CONNECT checked


def test_host_is_checked_before_anything_is_told():
    _, api = api_on_clock(api_key="k", limits={"rate": 1})
    for method, target in (("GET", "/nope"), ("PUT", "/api/messages"), ("GET", "/api/messages"),
                           ("OPTIONS", "/"), ("GET", "/v1/acquire"), ("GET", "/v1/acquire")):
        assert ask(api, method, target, host="evil.example").status == 421


ORIGINS = {
    "no page at all": ({}, True),
    "our page": ({"origin": "http://localhost:8080", "sec_fetch_site": "same-origin"}, True),
    "our page over TLS": ({"origin": "https://localhost:8080"}, True),
    "our page behind a proxy that rewrites Host": (
        {"origin": "https://mail.corp.example", "sec_fetch_site": "same-origin"}, True),
    "typed by the user": ({"sec_fetch_site": "none"}, True),
    "a foreign page": ({"origin": "http://evil.example"}, False),
    "another port": ({"origin": "http://localhost:3000"}, False),
    "a sandboxed page": ({"origin": "null"}, False),
    "an empty origin": ({"origin": ""}, False),
    "a name that ends like ours": ({"origin": "http://evillocalhost:8080"}, False),
    "cross-site": ({"sec_fetch_site": "cross-site"}, False),
    "same-site": ({"sec_fetch_site": "same-site"}, False),
    "our origin, but cross-site": (
        {"origin": "http://localhost:8080", "sec_fetch_site": "cross-site"}, False),
}
CHANGES = (("DELETE", "/api/messages?server=x", 204), ("POST", "/api/servers", 200),
           ("PUT", "/api/servers/mailtest", 200), ("POST", "/api/messages?server=x", 200),
           ("GET", "/v1/acquire", 200), ("GET", "/aquire", 200),
           ("DELETE", "/v1/get/b@x.example", 204))
READS = ("/", "/healthz", "/api/messages", "/v1/load/a@x.example", "/v1/inboxes")


@pytest.mark.parametrize("fields, ours", rows(ORIGINS))
def test_origin(fields, ours):
    _, api = api_on_clock()
    delivered(api.store, "a@y.example", "b@x.example")
    delivered(api.store, "a@x.example", "b@x.example")
    before = api.store.number
    for method, target, status in CHANGES:
        found = ask(api, method, target, {"name": "n"}, **fields)
        assert found.status == (status if ours else 403), (method, target)
    assert (api.store.number > before) is ours
    for target in READS:                 # which no page can read, since nothing allows CORS
        assert ask(api, "GET", target, **fields).status in (200, 404)


def test_foreign_origin_is_told_what_was_expected():
    _, api = api_on_clock()
    text = ("Expected a request from a page of this catcher or from no page, got Origin "
            "'http://evil.example' for the host 'localhost:8080'")
    assert said(ask(api, "GET", "/v1/acquire", origin="http://evil.example"))[1]["error"] == (
        "foreign_origin")
    assert said(ask(api, "DELETE", "/api/messages", origin="http://evil.example")) == (403, {
        "type": "Error", "message": text,
        "errors": [{"field": "", "detail": [{"description": text}]}]})
    assert said(ask(api, "GET", "/v1/acquire", origin="null", sec_fetch_site="cross-site"))[1][
        "detail"].endswith("and Sec-Fetch-Site 'cross-site'")


# request, status, error, what its detail has
TOLD = {
    "an unknown path": ("/nope?x=1", {}, 404, "not_found", "'/nope': see GET /openapi.json"),
    "a foreign host": ("/v1/inboxes", {"host": "evil.example"}, 421, "misdirected",
                       "Expected a Host field with an IP address, a local name, or one that "
                       "--allow-host names, got 'evil.example'"),
    "a message that is gone": ("/v1/get/a@x.example?after=5d0f", {}, 404, "not_found",
                               "no message has the id '5d0f'; it may be deleted or expired"),
    "no event": ("/v1/events", {"last_event_id": "1.5"}, 400, "bad_request",
                 "Expected Last-Event-ID to be the number of an event, got '1.5'"),
    "no script": ("/v1/acquire?fail=rcpt:250", {}, 400, "bad_request",
                  "expected fail=STAGE:ACTION[*TIMES] with a stage mail, rcpt or data"),
    "an empty script": ("/v1/acquire?fail=", {}, 400, "bad_request", "got ''"),
    "a wait of several": ("/v1/get/a@x.example?count=2&subject=wanted", {}, 404, "empty",
                          "Expected 2 messages for a@x.example of that kind, got 0; "
                          "the inbox holds 1 in all"),
}


@pytest.mark.parametrize("target, fields, status, error, detail", rows(TOLD))
def test_error_says_what_was_seen_and_expected(target, fields, status, error, detail):
    _, api = api_on_clock()
    delivered(api.store, "a@x.example")
    found, value = said(ask(api, "GET", target, **fields))
    assert (found, value["error"], detail in value["detail"]) == (status, error, True), value


@pytest.mark.parametrize("target", [
    "/api/messages/{id}?_method=DELETE", "/api/messages/{id}/delete", "/delete/{id}",
    "/api/messages?server=x&_method=DELETE", "/clear"])
def test_no_get_deletes_anything(target):
    _, api = api_on_clock()
    id = delivered(api.store, "a@x.example").id
    ask(api, "GET", target.format(id=id), x_http_method_override="DELETE")
    assert ask(api, "GET", f"/api/messages/{id}").status == 200


# -- routes

# path, methods that it has
ALLOWED = {
    "/": "GET, HEAD, OPTIONS", "/healthz": "GET, HEAD, OPTIONS",
    "/page.js": "GET, HEAD, OPTIONS", "/openapi.json": "GET, HEAD, OPTIONS",
    "/v1/acquire": "GET, OPTIONS", "/v1/get/a@x.example": "GET, DELETE, HEAD, OPTIONS",
    "/v1/load/a@x.example": "GET, HEAD, OPTIONS", "/a@x.example": "GET, HEAD, OPTIONS",
    "/api/messages": "GET, POST, DELETE, HEAD, OPTIONS",
    "/api/messages/": "GET, POST, DELETE, HEAD, OPTIONS",
    "/api/messages/search": "POST, OPTIONS",
    "/api/messages/5d0f": "GET, DELETE, HEAD, OPTIONS",
    "/api/messages/5d0f/reply": "POST, OPTIONS", "/api/servers": "GET, POST, HEAD, OPTIONS",
    "/api/servers/x": "GET, PUT, DELETE, HEAD, OPTIONS", "/api/devices/5d0f": "DELETE, OPTIONS",
    "/api/devices/otp": "POST, OPTIONS",
    "/2010-04-01/Accounts/AC1/Messages.json": "POST, OPTIONS",
}


@pytest.mark.parametrize("path, allowed", ALLOWED.items())
def test_method_that_is_not_allowed(path, allowed):
    _, api = api_on_clock()
    for method in ("PATCH", "TRACE", "get", "BREW"):
        response = ask(api, method, path)
        assert (response.status, response.headers) == (405, (("Allow", allowed),))
    detail = f"Expected {' or '.join(allowed.split(', ')[:-1])}, got 'BREW'"
    value = said(response)[1]
    assert value.get("detail", value.get("message")) == detail


@pytest.mark.parametrize("path, allowed", ALLOWED.items())
def test_options_tell_the_methods_and_allow_no_cors(path, allowed):
    _, api = api_on_clock()
    assert ask(api, "OPTIONS", path, origin="http://evil.example",
               access_control_request_method="DELETE") == mailtest.Response(
        204, headers=(("Allow", allowed),))


@pytest.mark.parametrize("target", [
    "/nope", "/v1", "/v1/get", "/v1/get/a/b", "/api", "/api/messages/5d0f/nope", "/.git/config",
    "/index.html", "/etc/passwd", "/<script>alert(1)</script>", "/v1/smuggled", "/nobody",
    "/api/messages/a/b/c", "/%2e%2e", "//evil.example/x"])
def test_unknown_path_is_not_found(target):
    _, api = api_on_clock()
    for method in ("GET", "POST", "DELETE", "OPTIONS", "BREW"):
        response = ask(api, method, target)
        assert (response.status, response.type) == (404, "application/json")


@pytest.mark.parametrize("target", [
    "/v1/get/%", "/v1/get/%zz@x", "/v1/get/a%4", "/v1/get/%ff", "/v1/get/%c0%af",
    "/v1/get/%ed%a0%80"])
def test_percent_signs_that_encode_no_text_are_refused(target):
    _, api = api_on_clock()
    assert said(ask(api, "GET", target)) == (400, {
        "error": "bad_request", "detail": "Expected percent-encoded UTF-8 in the path, got "
        f"{target[8:]!r}"})


@pytest.mark.parametrize("target", [
    "/v1/get/%00@x", "/v1/get/a%0d%0aX-Injected:%201@x", "/v1/get/%7F"])
def test_control_characters_in_a_path_name_nothing(target):
    _, api = api_on_clock()
    response = ask(api, "GET", target)
    assert (response.status, response.headers) == (404, ())


@pytest.mark.parametrize("path, kind", [
    ("/", "text/html; charset=utf-8"), ("/page.css", "text/css; charset=utf-8"),
    ("/page.js", "text/javascript; charset=utf-8"), ("/favicon.ico", "image/svg+xml")])
def test_page_is_served_under_a_policy_without_inline_script(path, kind):
    _, api = api_on_clock()
    response = ask(api, "GET", path)
    assert response[:3] == (200, mailtest.PAGE_FILES[path][1], kind)
    assert dict(response.headers)["Content-Security-Policy"] == (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; frame-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'")


def test_health_tells_counters_and_how_the_catcher_was_started():
    clock, api = api_on_clock(api_key="k", smtp="127.0.0.1:2525",
                              state=lambda: {"save": {"saved": 0}})
    delivered(api.store, "a@x.example")
    api.store.acquire()
    clock.now += 1.5
    value = got(api, "/healthz")
    started = round(clock.now - api.store.started, 3)
    octets = api.store.counters()["octets"]
    assert value == {
        "status": "ok", "version": mailtest.__version__, "uptime": started, "messages": 1,
        "inboxes": 2, "unseen": 1, "octets": octets, "max_memory": 512_000_000, "accepted": 1,
        "sms": 0,
        "sessions": 0, "events": 2, "waiters": 0, "smtp": "127.0.0.1:2525",
        "domain": "mailtest.example", "ttl": 600.0, "max_size": 25_000_000, "rate": 0,
        "hosted": False, "strict": False, "api_key": True, "save": {"saved": 0}}
    api.store.close()
    assert got(api, "/healthz")["status"] == "stopping"


def test_openapi_describes_exactly_the_routes():
    _, api = api_on_clock()
    value = got(api, "/openapi.json")
    described = {(method.upper(), path) for path, methods in value["paths"].items()
                 for method in methods}
    files = {("GET", path) for path in mailtest.PAGE_FILES}
    assert described == {(route.method, route.path) for route in mailtest.ROUTES} - files
    assert (value["openapi"], value["servers"]) == ("3.0.3", [{"url": "http://localhost:8080"}])
    names = [operation["operationId"] for methods in value["paths"].values()
             for operation in methods.values()]
    assert len(set(names)) == len(names)
    for path, methods in value["paths"].items():
        for operation in methods.values():
            assert operation["summary"]
            in_path = [each["name"] for each in operation["parameters"] if each["in"] == "path"]
            assert in_path == re.findall(r"\{(\w+)\}", path)


def test_routes_are_all_in_one_of_the_tables_of_access():
    routes = {(route.method, route.path): route.access for route in mailtest.ROUTES}
    assert len(routes) == len(mailtest.ROUTES)
    assert {which for which, access in routes.items() if access == "open"} == OPEN
    assert {which for which, access in routes.items() if access == "inbox"} == SERVICE
    assert set(routes.values()) == {"open", "inbox", "known", "api"}


BODY_LIMITS = {
    "creating a mail": ("POST", "/api/messages?server=x", 152),
    "forwarding": ("POST", "/api/messages/5d0f/forward", 152),
    "searching": ("POST", "/api/messages/search", 2),
    "a server": ("POST", "/api/servers", 2), "an SMS": ("POST", TWILIO, 2),
    "what has no body": ("GET", "/api/messages", 2),
}


@pytest.mark.parametrize("method, target, expected", rows(BODY_LIMITS))
def test_bodies_may_be_as_large_as_they_need(method, target, expected):
    _, api = api_on_clock(limits={"max_size": 100, "http_body": 2})
    assert ask(api, method, target, b"x" * (expected + 1)).status == 413
    assert ask(api, method, target, b"x" * expected).status != 413


@pytest.mark.parametrize("method, target, fields, status", rows({
    "no key": ("POST", "/api/messages?server=x", {}, 401),
    "a foreign page": ("POST", "/api/servers", {"origin": "http://evil.example"}, 403),
    "an unknown path": ("POST", "/nope", {}, 404),
    "another method": ("PUT", "/api/messages", {}, 405),
    "a foreign host": ("POST", "/api/messages?server=x", {"host": "evil.example"}, 421)}))
def test_body_is_not_read_when_the_head_is_refused(method, target, fields, status):
    _, api = api_on_clock(api_key="k")
    path, _, query = target.partition("?")
    request = mailtest.Request(method, path, query, {"host": "localhost", **fields}, None)
    assert mailtest.answer(api, request).status == status


PIECES = {
    "an object": {"a": 1, "b": [None, "x", True], "c": {}, "d": 0.0},
    "texts that are cut": {"a": "\x01é😀\"\\" * 60_000, "b": {"c": "x" * 100_001}},
    "lists made one by one": {"items": [{"a": "1"}, {"a": "2" * 200_000}], "none": []},
}


@pytest.mark.parametrize("value", rows(PIECES))
def test_json_in_pieces_is_the_same(value):
    pieces = {name: iter(each) if isinstance(each, list) and name in ("items", "none") else each
              for name, each in value.items()}
    assert json.loads(b"".join(mailtest._pieces(pieces))) == value
    assert b"".join(mailtest._pieces(value)) == mailtest._json(value)


def test_large_answer_is_a_stream_of_bounded_pieces():
    _, api = api_on_clock()
    for _ in range(5):
        delivered(api.store, "a@x.example", octets=mail(body="\x01" * 100_000))
    headers = {"host": "localhost"}
    response = mailtest.answer(api, mailtest.Request("GET", "/v1/load/a@x.example", "", headers))
    pieces = list(response.stream)
    assert json.loads(b"".join(pieces))["message_count"] == 5
    assert max(map(len, pieces)) < 1_000_000


# header fields, base URL; the proxy is trusted
BASES = {
    "nothing": ({}, "http://localhost:8080"),
    "https": ({"x_forwarded_proto": "https"}, "https://localhost:8080"),
    "a path": ({"x_forwarded_prefix": "/mail/"}, "http://localhost:8080/mail"),
    "both, of two proxies": ({"x_forwarded_proto": "http, https",
                              "x_forwarded_prefix": "/x, /a/b"}, "https://localhost:8080/a/b"),
    "what is no path": ({"x_forwarded_prefix": "//evil.example"}, "http://localhost:8080"),
}


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("fields, base", rows(BASES))
def test_urls_are_those_that_the_proxy_is_reached_by(fields, base, trusted):
    _, api = api_on_clock(trust_proxy=trusted)
    id = whole(api).id
    value = got(api, f"/api/messages/{id}", **fields)
    assert value["attachments"][0]["url"] == (
        f"{base if trusted else 'http://localhost:8080'}/api/files/attachments/{id}-0")


def test_pages_of_an_allowed_origin_may_read():
    _, api = api_on_clock(allow_origins=("http://app.example",))
    allowed = {"Access-Control-Allow-Origin": "http://app.example", "Vary": "Origin"}
    for method, target in (("GET", "/api/messages"), ("GET", "/v1/acquire"),
                           ("GET", "/v1/get/x@x.example"), ("OPTIONS", "/api/messages")):
        found = dict(ask(api, method, target, origin="http://app.example").headers)
        assert allowed.items() <= found.items()
        assert "Vary" not in dict(ask(api, method, target, origin="http://b.example").headers)
    assert ask(api, "DELETE", "/api/messages?server=x", origin="http://app.example").status == 403


def test_certificate_is_served_without_its_key():
    _, api = api_on_clock()
    assert ask(api, "GET", "/cert.pem").status == 404
    pem = "-----BEGIN {0}-----\nMIIB\n-----END {0}-----\n"
    _, api = api_on_clock(certificate=pem.format("PRIVATE KEY") + pem.format("CERTIFICATE"))
    assert ask(api, "GET", "/cert.pem").body.decode() == pem.format("CERTIFICATE")


def test_bounds_of_this_catcher_are_in_its_description():
    _, api = api_on_clock(limits={"poll": 5})
    operation = got(api, "/openapi.json")["paths"]["/v1/get/{address}"]["get"]
    assert operation["parameters"][1]["schema"] == {"type": "number", "minimum": 0, "maximum": 5}
    assert said(ask(api, "GET", "/v1/get/a@x.example?timeout=6"))[1]["detail"] == (
        "Expected timeout to be a number from 0 to 5, got '6'")


def test_description_has_every_member_of_a_message():
    _, api = api_on_clock()
    schemas = got(api, "/openapi.json")["components"]["schemas"]
    id = whole(api).id
    for name, value in (("Message", got(api, f"/api/messages/{id}")),
                        ("Item", got(api, "/api/messages")["items"][0])):
        assert list(schemas[name]["properties"]) == list(value)
        assert schemas[name]["required"] == list(value)
    assert schemas["Message"]["properties"]["attachments"]["items"]["properties"]["length"] == {
        "type": "integer"}


def test_watch_awaits_the_next_call():
    clock, api = api_on_clock()
    address = api.store.acquire().address
    assert got(api, f"/v1/watch/{address}?within=5")["watch"] == {
        "within": 5.0, "due": mailtest.iso_time(NOVEMBER + 5), "told": False}
    assert ask(api, "DELETE", f"/v1/watch/{address}").status == 204
    assert got(api, f"/v1/load/{address}")["watch"] is None
    for query in ("", "?within=0", "?within=601", "?within=x"):
        assert ask(api, "GET", f"/v1/watch/{address}{query}").status == 400


@pytest.mark.parametrize("any_host, host, told", rows({
    "one address": (False, "10.0.0.7:8080", "127.0.0.1:25"),
    "all addresses": (True, "10.0.0.7:8080", "10.0.0.7:25"),
    "all, of version 6": (True, "[fe80::1]:8080", "[fe80::1]:25")}))
def test_acquire_names_the_host_by_which_it_was_reached(any_host, host, told):
    _, api = api_on_clock(smtp="127.0.0.1:25", any_host=any_host)
    found = said(ask(api, "GET", "/v1/acquire", host=host, accept="application/json"))
    assert found[1]["smtp"] == told


def test_all_addresses_are_told_from_one():
    for host, named in (("0.0.0.0", "mail"), ("127.0.0.1", "127.0.0.1")):
        with mailtest.Mailtest(host=host) as server:
            request = urllib.request.Request(server.url + "/healthz", headers={"Host": "mail"})
            with urllib.request.urlopen(request, timeout=10) as answer:
                assert json.load(answer)["smtp"] == f"{named}:{server.smtp_port}"


def test_events_of_an_inbox_are_not_those_of_others():
    _, api = api_on_clock(hosted=True)
    store = api.store
    mine = store.acquire().address
    before = store.number
    store.empty("private")
    store.add_session(mailtest.SessionRecord(0, "127.0.0.1", "x", "", False, 0.0, 0.0, 0,
                                             "550 5.1.1 secret@corp.example", "quit", b""))
    for inboxes in ([mine], ["\0"]):
        assert store.events(before, 0, inboxes)[0] == []
    assert len(store.events(before, 0)[0]) == 2
    delivered(store, mine)
    store.empty("mailtest")
    assert [event.kind for event in store.events(before, 0, [mine])[0]] == ["message", "emptied"]


def test_parameter_that_a_route_does_not_have_opens_nothing():
    _, api = api_on_clock(hosted=True)
    for path in ("/api/messages/search?inbox=x", "/api/messages/some-id?inbox=x"):
        assert ask(api, "GET", path).status in (403, 404, 405)


def test_defect_is_told_as_one_and_no_more(monkeypatch):
    _, api = api_on_clock()
    told = []
    monkeypatch.setattr(mailtest, "log_error", lambda text, *values, **_: told.append(
        text % values))

    def fail(*arguments):
        raise RuntimeError("secret")
    monkeypatch.setattr(api.store, "inboxes", fail)
    assert said(ask(api, "GET", "/v1/inboxes")) == (500, {
        "error": "internal",
        "detail": "This is a defect of mailtest; its log on standard error says more"})
    assert told == ["GET /v1/inboxes failed"]


# -- events

def stream(response, pieces=9):
    """The first pieces of an event stream as text, fewer if it ends before."""
    assert (response.status, response.type) == (200, "text/event-stream; charset=utf-8")
    return b"".join(itertools.islice(response.stream, pieces)).decode()


def test_events_say_what_happened_since():
    clock, api = api_on_clock()
    address = api.store.acquire().address
    id = delivered(api.store, address, octets=mail("Grüße")).id
    gone = delivered(api.store, "b@x.example").id
    api.store.delete(gone)
    item, = got(api, "/api/messages")["items"]
    found = stream(ask(api, "GET", "/v1/events?after=0", gone=True))
    head, *events = found.split("\n\n")[1:-1] if found.startswith("event") else (
        found.split("\n\n")[:-1])
    assert head == "retry: 1000\n: 0"
    assert [event.split("\n")[:2] for event in events] == [
        ["id: 1", "event: inbox"], ["id: 2", "event: message"], ["id: 4", "event: deleted"]]
    data = [json.loads(event.split("\n")[2][len("data: "):]) for event in events]
    assert data == [{"address": address, "expires": mailtest.iso_time(NOVEMBER + 600)},
                    {**item, "direction": "Received"}, {"id": gone, "inboxes": ["b@x.example"]}]
    assert item["inboxes"] == [address.lower()] and data[1]["id"] == id


RESUMES = {
    "from the beginning": ({}, "after=0", ["1", "2", "3"], False),
    "after the second": ({"last_event_id": "2"}, "", ["3"], False),
    "the field goes before the parameter": ({"last_event_id": "2"}, "after=0", ["3"], False),
    "by the parameter": ({}, "after=1", ["2", "3"], False),
}


@pytest.mark.parametrize("fields, query, ids, reset", rows(RESUMES))
def test_events_resume_after_the_last_one_seen(fields, query, ids, reset):
    _, api = api_on_clock()
    for _ in range(3):
        delivered(api.store, "a@x.example")
    found = stream(ask(api, "GET", f"/v1/events?{query}", gone=True, **fields))
    assert (re.findall("(?m)^id: (.*)$", found), "event: reset" in found) == (ids, reset)


def test_events_that_are_no_longer_kept_are_a_reset():
    _, api = api_on_clock(limits={"events": 2})
    for _ in range(4):
        delivered(api.store, "a@x.example")
    response = ask(api, "GET", "/v1/events", last_event_id="1", gone=True)
    assert re.findall("(?m)^(?:id|event): (.*)$", stream(response)) == [
        "reset", "3", "message", "4", "message"]


def test_events_of_a_catcher_that_ran_before_are_a_reset():
    _, api = api_on_clock()
    delivered(api.store, "a@x.example")
    api.store.close()                    # nothing is waited for
    assert stream(ask(api, "GET", "/v1/events", last_event_id="99")) == (
        "event: reset\ndata: {}\n\nretry: 1000\n: 1\n\n")


def test_events_begin_now_unless_asked_for_more(waiting_store):
    api = mailtest.Api(waiting_store)
    delivered(waiting_store, "a@x.example")
    response = ask(api, "GET", "/v1/events", gone=True)
    follower = in_thread(stream, response, 2)
    waiting_store.next_waiter()
    delivered(waiting_store, "a@x.example")
    assert re.findall("(?m)^id: (.*)$", follower.join_value()) == ["2"]


# -- preview

def previewed(api, source, parts=(), query=""):
    """The Response to the preview of a mail with that HTML and (content id, type, octets)."""
    octets = (b"Content-Type: multipart/related; boundary=B\r\n\r\n--B\r\n"
              b"Content-Type: text/html; charset=utf-8\r\n\r\n" + source.encode() + b"\r\n")
    for content_id, kind, content in parts:
        octets += (f"--B\r\nContent-ID: <{content_id}>\r\nContent-Type: {kind}\r\n\r\n".encode()
                   + content + b"\r\n")
    message = delivered(api.store, "a@x.example", octets=octets + b"--B--\r\n")
    return ask(api, "GET", f"/v1/messages/{message.id}/preview{query}")


FRAME = '<!doctype html><meta charset="utf-8"><base target="_blank">'
# HTML of the mail, HTML of the preview; the mail has an image "logo" of "PNG" and a page "page"
INLINED = {
    "an image": ('<img src="cid:logo">', '<img src="data:image/png;base64,UE5H">'),
    "without quotes": ("<img src=cid:logo>", "<img src=data:image/png;base64,UE5H>"),
    "twice": ("<img src='cid:logo'><img src='cid:logo'>",
              "<img src='data:image/png;base64,UE5H'><img src='data:image/png;base64,UE5H'>"),
    "in a style": ('<p style="background:url(cid:logo)">',
                   '<p style="background:url(data:image/png;base64,UE5H)">'),
    "percent-encoded": ('<img src="cid:%6cogo">', '<img src="data:image/png;base64,UE5H">'),
    "with an entity": ('<img src="cid:log&#111;">', '<img src="data:image/png;base64,UE5H">'),
    "an unknown one stays": ('<img src="cid:nope">', '<img src="cid:nope">'),
    "scripts stay, and do not run": ("<script>alert(1)</script>", "<script>alert(1)</script>"),
    "text is kept": ("Grüße &amp; <b>x</b>", "Grüße &amp; <b>x</b>"),
}


@pytest.mark.parametrize("source, expected", rows(INLINED))
def test_preview_shows_images_of_the_mail(source, expected):
    _, api = api_on_clock()
    response = previewed(api, source, [("logo", "image/png", b"PNG")])
    assert (response.status, response.type) == (200, "text/html; charset=utf-8")
    assert response.body.decode() == FRAME + expected


# HTML of the mail, HTML of the preview without and with remote=1
NEUTRAL = {
    "a connection": ("<link rel=preconnect href=http://x/>", "<x-link rel=preconnect href=http://x/>",
                     "<link rel=preconnect href=http://x/>"),
    "a frame": ("<IFRAME\nsrc=http://x>", "<x-IFRAME\nsrc=http://x>", ""),
    "frames": ("<frameset><frame/src=x>", "<x-frameset><x-frame/src=x>", ""),
    "a refresh": ('<meta http-equiv=refresh content="0;url=http://x">',
                  '<x-meta http-equiv=refresh content="0;url=http://x">', ""),
    "a hidden refresh": ("<meta name=viewport http-equiv=refresh content='1'>",
                         "<x-meta name=viewport http-equiv=refresh content='1'>", ""),
    "what describes the page": ("<meta name=viewport content='width=1'>",
                                "<meta name=viewport content='width=1'>", ""),
    "a place in the mail": ("<a href='#x' target=_top>", '<a href="#x" target="_self">', ""),
    "a link": ("<a class=c href=https://x/?a&amp;b target=y ping=http://z>",
               '<a class=c href="https://x/?a&amp;b" target="_blank">', ""),
    "a relative link": ("<a title='>' href=/v1/acquire>", "<a title='>'>", ""),
    "a relative link with a base": ("<base href='http://x/a/'><a href=b>",
                                    '<x-base href=\'http://x/a/\'><a href="http://x/a/b" '
                                    'target="_blank">', ""),
    "brackets that do not match": ("<base href='http://x/'><a href='//['>",
                                   "<x-base href='http://x/'><a>", ""),
    "a script": ("<AREA/HREF=' javascript:alert(1)'>", "<AREA>", ""),
    "an odd attribute": ("<a =x href=/x>", "<a =x>", ""),
}


@pytest.mark.parametrize("source, closed, remote", rows(NEUTRAL))
def test_preview_connects_to_nothing_and_its_links_open_new_tabs(source, closed, remote):
    _, api = api_on_clock()
    assert previewed(api, source).body.decode() == FRAME + closed
    assert previewed(api, source, query="?remote=1").body.decode() == FRAME + (remote or closed)


def test_preview_does_not_multiply_a_long_base():
    _, api = api_on_clock()
    source = f"<base href='http://{'x' * 50_000}/'>" + "<a href=y>" * 5_000
    assert len(previewed(api, source).body) < 2 * len(source)


CLOSED = ("default-src 'none'; img-src data:{0}; style-src 'unsafe-inline'{0}; font-src data:{0}; "
          "media-src data:{0}; frame-ancestors 'self'; form-action 'none'; base-uri 'none'; "
          "sandbox allow-popups allow-popups-to-escape-sandbox")


@pytest.mark.parametrize("query, sources", rows({
    "nothing remote": ("", ""), "remote=0": ("?remote=0", ""),
    "remote=1": ("?remote=1", " http: https:")}))
def test_preview_runs_nothing_and_loads_nothing_remote_unless_asked(query, sources):
    _, api = api_on_clock()
    headers = dict(previewed(api, "<script src=http://evil.example/x>", query=query).headers)
    assert headers == {"Content-Security-Policy": CLOSED.format(sources),
                       "X-DNS-Prefetch-Control": "off"}


def test_preview_is_not_much_larger_than_a_mail_may_be():
    _, api = api_on_clock(limits={"max_size": 10_000})
    response = previewed(api, "<img src=cid:a>" * 1_000, [("a", "image/png", b"x" * 3_000)])
    assert [response.body.count(b"src=data:"), response.body.count(b"src=cid:")] == [3, 997]


def test_event_streams_are_bounded():
    _, api = api_on_clock(limits={"followers": 1})
    first = ask(api, "GET", "/v1/events")
    assert (first.status, ask(api, "GET", "/v1/events").status) == (200, 503)
    first.stream.close()
    assert ask(api, "GET", "/v1/events").status == 200


# ---- HTTP server -----------------------------------------------------------

@pytest.fixture(scope="module")
def tls(certificate):
    """A server's SSLContext."""
    return mailtest.tls_context(certificate)


@contextlib.contextmanager
def serving(api=None, **options):
    """A running HttpServer on a free port."""
    if api is None:
        api = mailtest.Api(mailtest.Store(), mailtest.ApiPolicy(files=mailtest.PAGE_FILES))
    server = mailtest.HttpServer("127.0.0.1", 0, api, **options)
    server.ended = queue.Queue()         # why each connection ended
    server.closed = lambda connection, why: server.ended.put(why)
    server.start()
    try:
        yield server
    finally:
        api.store.close()
        server.stop()


@pytest.fixture(scope="module")
def server():
    """One server for all tests that need nothing special."""
    with serving() as server:
        yield server


def receive_all(sock):
    """Everything until the end."""
    return b"".join(iter(lambda: sock.recv(65_536), b""))


def connect(server):
    """A client's socket."""
    return socket.create_connection(("127.0.0.1", server.port), 10)


def over_socket(server, octets):
    """The same through a socket."""
    with connect(server) as sock:
        with contextlib.suppress(ConnectionError):       # it closes while we still send
            sock.sendall(octets)
            sock.shutdown(socket.SHUT_WR)
        return receive_all(sock)


def piece_by_piece(server, octets, step=1):
    """The same from a server that receives so many octets at a time."""
    class Piecewise(mailtest.Connection):
        def receive(self, most=65_536):
            return super().receive(step)

    def serve():
        connection = Piecewise(theirs, ("127.0.0.1", 1))
        with contextlib.suppress(mailtest.Hangup):
            mailtest.HttpHandler(connection, "127.0.0.1", server)
        connection.linger()              # else the client loses what it has not read yet
        connection.close()
    ours, theirs = socket.socketpair()
    thread = in_thread(serve)
    with ours:
        with contextlib.suppress(OSError):               # it closes while we still send
            ours.sendall(octets)
            ours.shutdown(socket.SHUT_WR)
        sent = receive_all(ours)
    thread.join_value()
    return sent


EVERY_ANSWER = {
    "server": "mailtest", "cache-control": "no-store", "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer", "cross-origin-resource-policy": "same-origin",
}


def responses(octets, heads=False):
    """[(status, header fields, body)] of what a server sent; looks at what each must have."""
    found = []
    while octets:
        head, end, octets = octets.partition(b"\r\n\r\n")
        assert end, head
        lines = head.decode("ascii").split("\r\n")
        version, status, reason = lines[0].split(" ", 2)
        assert (version, reason) == ("HTTP/1.1", http.client.responses[int(status)])
        fields = dict(line.lower().split(": ", 1) for line in lines[1:])
        assert len(fields) == len(lines) - 1         # no field twice
        if status == "100":
            assert fields == {}
            found.append((100, fields, b""))
            continue
        assert {name: fields.get(name) for name in EVERY_ANSWER} == EVERY_ANSWER
        assert "default-src 'none'" in fields["content-security-policy"] and fields["date"]
        assert ("content-length" in fields) == (status != "204") == ("content-type" in fields)
        assert not any(name.startswith("access-control-") for name in fields)
        length = 0 if heads else int(fields.get("content-length", 0))
        body, octets = octets[:length], octets[length:]
        assert len(body) == length
        found.append((int(status), fields, body))
    return found


def statuses(octets):
    """The statuses of what a server sent, but for leave to go on."""
    return [status for status, _, _ in responses(octets) if status != 100]


LAST = b"GET /last HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
OTP = b'{"sharedSecret":"GEZDGNBVGY3TQOJQ"}'     # 200 if it is read as it is, 400 if not
SMUGGLED = b"GET /v1/smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"


def request(line="GET /v1/inboxes HTTP/1.1", *fields, body=b"", host="Host: localhost"):
    """The octets of a request."""
    return "\r\n".join((line,) + ((host,) if host else ()) + fields).encode("latin-1") + (
        b"\r\n\r\n" + body)


def posted(*fields, body=b"", line="POST /api/devices/otp HTTP/1.1"):
    """The octets of a request with a body, whose framing these fields tell."""
    return request(line, *fields, body=body)


def chunked(body, *fields):
    """The octets of a request with a chunked body."""
    return posted("Transfer-Encoding: chunked", *fields, body=body)


LENGTH = f"Content-Length: {len(OTP)}"
WHOLE_CHUNK = b"%X\r\n%b\r\n0\r\n\r\n" % (len(OTP), OTP)

# Each is answered 400, and ends the connection.
BAD_LINES = [
    "GET", "GET /", "GET / HTTP/1.1 x", "GET  / HTTP/1.1", " GET / HTTP/1.1", "GET / HTTP/1.1 ",
    "GET\t/\tHTTP/1.1", "GET /\0 HTTP/1.1", "GET /\xff HTTP/1.1", "G(T / HTTP/1.1",
    "GET v1/inboxes HTTP/1.1", "GET ?x HTTP/1.1", "GET / HTTP/1.10", "GET / HTTP/11",
    "GET / HTTP/-1.1", "GET / http/1.1", "GET http:///x HTTP/1.1", "GET ftp://localhost/ HTTP/1.1",
    "GET http://[ HTTP/1.1", "GET * HTTP/1.1", "CONNECT mailosaur.com HTTP/1.1",
    "CONNECT / HTTP/1.1"]
BAD_FIELDS = [
    "X : 1", "junk", ": x", "X\xe4: 1", "X: a\r\n b", "X: a\r\n\tb: c", "X: \0", "Host: localhost",
    "X: a\rContent-Length: 5", "X: a\nContent-Length: 5", "Transfer-Encoding : chunked",
    "Content-Length: -1", "Content-Length: +5", "Content-Length: 1_0", "Content-Length: 0x5",
    "Content-Length: 5.0", "Content-Length:", "Content-Length: \xb2", "Content-Length: 5, 5",
    f"{LENGTH}\r\n{LENGTH}", f"{LENGTH}\r\ncontent-length: 0", "Content-Length: 1" + "0" * 40]
BAD_CHUNKS = [
    b"2\r\n{}xx0\r\n\r\n", b"0x5\r\n12345\r\n0\r\n\r\n", b"+5\r\n12345\r\n0\r\n\r\n", b"-1\r\n",
    b"1_0\r\n", b"\r\n", b"five\r\n", b"2\n{}\r\n0\r\n\r\n", b"1" + b"0" * 15 + b"\r\n",
    b"5;" + b"x" * 5_000, b"2\r\n{}\r\n", b"2;a=\x0b\r\n{}\r\n0\r\n\r\n",
    b"2;a\n\r\n{}\r\n0\r\n\r\n", b"2\r\n{}\r\n0\r\nGET /x HTTP/1.1\r\n\r\n"]

# octets in; statuses; whether the connection can be used for another request
RAW = {
    **{f"line {line!r}": (request(line), [400], False) for line in BAD_LINES},
    **{f"field {field!r}": (posted(field, body=OTP), [400], False) for field in BAD_FIELDS},
    **{f"chunk {chunk[:50]!r}": (chunked(chunk), [400], False) for chunk in BAD_CHUNKS},
    # requests
    "GET": (request(), [200], True),
    "a body with its length": (posted(LENGTH, body=OTP), [200], True),
    "no body and no length": (posted(), [400], True),
    "a length of 0": (posted("Content-Length: 0"), [400], True),
    "a length with zeros": (posted(f"Content-Length: 000{len(OTP)}", body=OTP), [200], True),
    "ten requests at once": (request() * 10, [200] * 10, True),
    "bodies and none in turn": (
        (posted(LENGTH, body=OTP) + request() + chunked(WHOLE_CHUNK)) * 3, [200] * 9, True),
    "nothing": (b"", [], True),
    # lengths
    "a length beyond the bound": (posted("Content-Length: 2000001"), [413], False),
    "a terabyte": (posted("Content-Length: 1000000000000"), [413], False),
    "a body that ends early": (posted("Content-Length: 2000", body=OTP), [], False),
    # chunks
    "a chunked body": (chunked(WHOLE_CHUNK), [200], True),
    "chunked in capitals": (posted("TRANSFER-ENCODING: CHUNKED", body=WHOLE_CHUNK), [200], True),
    "many chunks": (chunked(b"".join(b"1\r\n%c\r\n" % each for each in OTP) + b"0\r\n\r\n"),
                    [200], True),
    "a chunk size with zeros": (chunked(b"00000" + WHOLE_CHUNK), [200], True),
    "chunk extensions": (chunked(b"%x;a=b;c=\"d\"\r\n%b\r\n0;e\r\n\r\n" % (len(OTP), OTP)),
                         [200], True),
    "trailers": (chunked(WHOLE_CHUNK[:-2] + b"X-A: 1\r\nHost: evil.example\r\n\r\n"),
                 [200], True),
    "an empty chunked body": (chunked(b"0\r\n\r\n"), [400], True),
    "a chunk beyond the bound": (chunked(b"1E8481\r\n"), [413], False),
    "chunks beyond the bound": (chunked(b"1\r\nx\r\n1E8480\r\n"), [413], False),
    "trailers without end": (chunked(b"0\r\n" + b"X: 1\r\n" * 300), [431], False),
    "chunks that end early": (chunked(b"500\r\n12"), [], False),
    # both
    "a length and chunks": (posted("Content-Length: 4", "Transfer-Encoding: chunked",
                                   body=b"0\r\n\r\n" + SMUGGLED), [400], False),
    "chunks and a length": (posted("Transfer-Encoding: chunked", "Content-Length: 0",
                                   body=b"0\r\n\r\n" + SMUGGLED), [400], False),
    "chunked twice": (posted("Transfer-Encoding: chunked", "Transfer-Encoding: chunked",
                             body=WHOLE_CHUNK), [400], False),
    "chunked in HTTP/1.0": (posted("Transfer-Encoding: chunked", body=WHOLE_CHUNK,
                                   line="POST /api/devices/otp HTTP/1.0"), [400], False),
    "gzip and chunked": (posted("Transfer-Encoding: gzip, chunked", body=WHOLE_CHUNK),
                         [501], False),
    "identity": (posted("Transfer-Encoding: identity", "X: 1"), [501], False),
    # bodies that nobody reads
    "a body for an unknown path": (posted(f"Content-Length: {len(SMUGGLED)}", body=SMUGGLED,
                                          line="POST /nope HTTP/1.1"), [404], False),
    "a body for a method that is not allowed": (
        posted(f"Content-Length: {len(SMUGGLED)}", body=SMUGGLED,
               line="PUT /api/messages HTTP/1.1"), [405], False),
    "a body of a DELETE": (posted(f"Content-Length: {len(SMUGGLED)}", body=SMUGGLED,
                                  line="DELETE /api/messages/x HTTP/1.1"), [404], True),
    "a body of a GET": (posted(f"Content-Length: {len(SMUGGLED)}", body=SMUGGLED,
                               line="GET /v1/inboxes HTTP/1.1"), [200], True),
    "a chunked body of a GET": (
        posted("Transfer-Encoding: chunked", line="GET /v1/inboxes HTTP/1.1",
               body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)), [200], True),
    "a body of a foreign page": (posted("Origin: http://evil.example", LENGTH, body=OTP),
                                 [403], False),
    "a body for a foreign host": (
        posted(LENGTH, body=OTP).replace(b"localhost", b"evil.example"), [421], False),
    # request lines
    "an unknown method": (request("BREW / HTTP/1.1"), [405], True),
    "a method in small letters": (request("get / HTTP/1.1"), [405], True),
    "TLS": (b"\x16\x03\x01\x02\x00\x01" + b"x" * 200, [400], False),
    "noise": (bytes(range(255, 0, -1)) + b"\r\n\r\n", [400], False),
    "a target of 16384 octets": (request("GET /" + "x" * 16_383 + " HTTP/1.1"), [404], True),
    "a target of 16385 octets": (request("GET /" + "x" * 16_384 + " HTTP/1.1"), [414], False),
    "an empty line before": (b"\r\n" + request(), [200], True),
    "an empty line between": (request() + b"\r\n" + request(), [200, 200], True),
    "two empty lines before": (b"\r\n\r\n" + request(), [200], True),
    # versions
    "HTTP/1.0": (request("GET /v1/inboxes HTTP/1.0"), [200], False),
    "HTTP/1.0 without Host": (request("GET /v1/inboxes HTTP/1.0", host=""), [200], False),
    "HTTP/1.0 that is kept": (request("GET /v1/inboxes HTTP/1.0", "Connection: Keep-Alive"),
                              [200], True),
    "HTTP/1.2": (request("GET /v1/inboxes HTTP/1.2"), [200], True),
    "HTTP/2.0": (request("GET / HTTP/2.0"), [505], False),
    "HTTP/0.9": (request("GET / HTTP/0.9"), [505], False),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505], False),
    # header fields
    "no Host": (request(host=""), [400], False),
    "an empty Host": (request(host="Host:"), [200], True),
    "a foreign Host": (request(host="Host: evil.example"), [421], True),
    "lines that end with a bare LF": (request().replace(b"\r\n", b"\n"), [400], False),
    "8 bit in a value": (request("GET /v1/inboxes HTTP/1.1", "X: \xff"), [200], True),
    "an empty value": (request("GET /v1/inboxes HTTP/1.1", "X:"), [200], True),
    "200 fields": (request("GET /v1/inboxes HTTP/1.1", *["X: 1"] * 199), [200], True),
    "201 fields": (request("GET /v1/inboxes HTTP/1.1", *["X: 1"] * 200), [431], False),
    "a head of 70 kB": (request("GET / HTTP/1.1", "X: " + "x" * 70_000), [431], False),
    "a head of 100 kB": (request("GET / HTTP/1.1", "X: " + "x" * 150_000), [431], False),
    # connection
    "close": (request("GET /v1/inboxes HTTP/1.1", "Connection: close"), [200], False),
    "close among others": (request("GET /v1/inboxes HTTP/1.1", "Connection: x, close"),
                           [200], False),
    "what follows a close is not answered": (
        request("GET /v1/inboxes HTTP/1.1", "Connection: close") + request(), [200], False),
    "an upgrade is ignored": (request("GET /v1/inboxes HTTP/1.1", "Connection: Upgrade",
                                      "Upgrade: h2c"), [200], True),
    # expectations
    "100-continue with the body": (posted("Expect: 100-continue", LENGTH, body=OTP), [200], True),
    "100-Continue with chunks": (chunked(WHOLE_CHUNK, "Expect: 100-Continue"), [200], True),
    "100-continue for too much": (posted("Expect: 100-continue", "Content-Length: 2000001"),
                                  [413], False),
    "another expectation": (posted("Expect: cookies", LENGTH, body=OTP), [417], False),
    # targets
    "absolute form": (request("GET http://localhost/v1/inboxes HTTP/1.1"), [200], True),
    "absolute form with a query": (
        request("GET http://localhost/api/messages?page=x HTTP/1.1"), [400], True),
    "absolute form of a foreign host": (
        request("GET http://evil.example/v1/inboxes HTTP/1.1"), [421], True),
    "absolute form goes before Host": (
        request("GET http://localhost/v1/inboxes HTTP/1.1", host="Host: evil.example"),
        [200], True),
    "absolute form without Host": (
        request("GET http://localhost/v1/inboxes HTTP/1.1", host=""), [400], False),
    "OPTIONS for the server": (request("OPTIONS * HTTP/1.1"), [204], True),
    # tunnels
    "a tunnel without certificate": (
        request("CONNECT mailosaur.com:443 HTTP/1.1", host="Host: mailosaur.com:443"),
        [501], False),
    "a tunnel to a name that ends like it": (
        request("CONNECT evilmailosaur.com:443 HTTP/1.1"), [403], False),
}


@pytest.mark.parametrize("octets, expected, usable", rows(RAW))
def test_raw_request(octets, expected, usable, server):
    sent = over_socket(server, octets + LAST)
    assert statuses(sent) == expected + [404] * usable
    if usable:
        assert b"No endpoint '/last'" in sent
    step = 1 if len(octets) < 3_000 else 997
    assert statuses(piece_by_piece(server, octets + LAST, step)) == statuses(sent)


def test_errors_of_framing_say_what_was_seen_and_close(server):
    detail = "Expected Content-Length: digits, got '-1'"
    (status, fields, body), = responses(over_socket(server, posted("Content-Length: -1")))
    assert (status, fields["connection"], fields["content-type"]) == (
        400, "close", "application/json")
    assert json.loads(body)["errors"] == [         # Mailosaur's shape under /api/
        {"field": "", "detail": [{"description": detail}]}]
    (status, fields, body), = responses(over_socket(server, request(
        "DELETE /v1/get/a@x.example HTTP/1.1", "Content-Length: -1")))
    assert json.loads(body) == {"error": "bad_request", "detail": detail}


def test_connection_field_says_whether_it_is_kept(server):
    def kept(*head):
        (_, fields, _), = responses(over_socket(server, request(*head)))
        return fields.get("connection")
    assert kept("GET / HTTP/1.1") is None
    assert kept("GET / HTTP/1.1", "Connection: close") == "close"
    assert kept("GET / HTTP/1.0") == "close"
    assert kept("GET / HTTP/1.0", "Connection: keep-alive") == "keep-alive"


def test_client_that_waits_for_leave_to_send_gets_it(server):
    with connect(server) as sock:
        sock.sendall(posted("Expect: 100-continue", LENGTH, "Connection: close"))
        assert sock.recv(65_536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(OTP)
        assert statuses(receive_all(sock)) == [200]
    old = posted("Expect: 100-continue", LENGTH, line="POST /api/devices/otp HTTP/1.0", body=OTP)
    assert [status for status, _, _ in responses(piece_by_piece(server, old))] == [200]


@pytest.mark.parametrize("target", ["/", "/page.js", "/v1/inboxes", "/nope",
                                    "/api/messages?page=x"])
def test_head_gives_the_head_of_get_without_a_body(target, server):
    def answer(method):
        sent = over_socket(server, request(f"{method} {target} HTTP/1.1"))
        (status, fields, _), = responses(sent, heads=method == "HEAD") or [None]
        fields.pop("date")
        return status, fields
    assert answer("HEAD") == answer("GET")


def test_large_answer_comes_whole(server):
    octets = b"Subject: x\r\n\r\n" + bytes(range(256)) * 4_000
    id = delivered(server.api.store, "a@x.example", octets=octets).id
    sent = over_socket(server, request(f"GET /api/files/email/{id} HTTP/1.1") + LAST)
    (status, fields, body), last = responses(sent)
    assert (status, body, last[0]) == (200, octets, 404)
    server.api.store.empty("mailtest")


def test_long_list_comes_in_pieces_and_the_connection_stays():
    with serving() as server, connect(server) as sock:
        for _ in range(200):
            delivered(server.api.store, "a@x.example")
        sock.sendall(request("GET /api/messages?itemsPerPage=200 HTTP/1.1") + LAST)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += sock.recv(1)
        assert b"\r\nTransfer-Encoding: chunked\r\n" in head
        octets = receive_all(sock)
        body, last = octets.split(b"\r\n0\r\n\r\n")
        assert body.count(b'"type":"Email"') == 200 and statuses(last) == [404]


# the last address that X-Forwarded-For names, the client of a trusted proxy
FORWARDED = {
    "an address": ("203.0.113.9", "203.0.113.9"),
    "an address with a port": ("203.0.113.9:1234", "203.0.113.9"),
    "IPv6": ("2001:db8::9", "20010db800000000"),
    "IPv6 in brackets": ("[2001:db8::9]", "20010db800000000"),
    "IPv6 in brackets with a port": ("[2001:db8::9]:1", "20010db800000000"),
}


@pytest.mark.parametrize("named, client", rows(FORWARDED))
def test_forwarded_address_counts_only_behind_a_trusted_proxy(named, client):
    for trusted in (False, True):
        policy = mailtest.ApiPolicy(trust_proxy=trusted)
        with serving(mailtest.Api(mailtest.Store(mailtest.Limits(rate=1)), policy)) as server:
            octets = request("GET /acquire HTTP/1.1", f"X-Forwarded-For: 198.51.100.1, {named}")
            assert statuses(over_socket(server, octets * 2)) == [200, 429]
            assert server.api.store.rate(client if trusted else "127.0.0.1") > 0
            assert server.api.store.rate("198.51.100.1") == 0


def test_client_that_speaks_smtp_is_told_at_once():
    api = mailtest.Api(mailtest.Store(), mailtest.ApiPolicy(smtp="127.0.0.1:2525"))
    told = b"554 5.3.2 This is the HTTP port of mailtest; SMTP is at 127.0.0.1:2525\r\n"
    with serving(api) as server:
        for said in (b"EHLO x\r\n", b"helo x\n"):
            with connect(server) as sock:
                sock.sendall(said)       # and waits for a reply
                assert receive_all(sock) == told


def test_bodies_are_counted_while_they_arrive():
    api = mailtest.Api(mailtest.Store(mailtest.Limits(max_memory=100_000)))
    with serving(api) as server:
        octets = posted("Content-Length: 200000", body=b"x" * 200_000)
        found = responses(over_socket(server, octets))
        assert [(status, fields.get("retry-after")) for status, fields, _ in found] == [(503, "1")]
        assert api.store.counters()["octets"] == 0


# -- time

SLOW = mailtest.Limits(http_head_time=-1.0, http_body_time=-1.0)


def test_head_that_takes_too_long_is_told_so(server):
    slow = types.SimpleNamespace(**{name: getattr(server, name) for name in (
        "api", "tls", "https", "stopping", "port")}, limits=SLOW)
    (status, fields, body), = responses(piece_by_piece(slow, b"GET / HTTP/1.1\r\nHost: x"))
    assert (status, fields["connection"], json.loads(body)["error"]) == (408, "close", "timeout")


def test_body_that_takes_too_long_ends_the_connection(server):
    slow = types.SimpleNamespace(**{name: getattr(server, name) for name in (
        "api", "tls", "https", "stopping", "port")}, limits=SLOW._replace(
            http_head_time=30.0))
    for octets in (posted(LENGTH), chunked(b"10\r\n")):
        assert piece_by_piece(slow, octets + OTP) == b""


@pytest.mark.parametrize("octets", rows({
    "nothing": b"", "half a head": b"GET / HT", "half a body": posted(LENGTH, body=b"{")}))
def test_client_that_is_silent_is_left(octets):
    api = mailtest.Api(mailtest.Store(mailtest.Limits(http_idle=0.01)))
    with serving(api) as server, connect(server) as sock:
        sock.sendall(octets)
        told = b"" if octets else b"554 5.3.2 This is the HTTP port"     # perhaps it speaks SMTP
        assert receive_all(sock)[:len(told) or None] == told
        assert server.ended.get(timeout=10) == "was silent for too long"


def test_client_that_reads_too_slowly_is_left():
    api = mailtest.Api(mailtest.Store(mailtest.Limits(http_idle=0.05)))
    with serving(api) as server, connect(server) as sock:
        id = delivered(api.store, "a@x.example", octets=b"x" * 20_000_000).id
        sock.sendall(request(f"GET /api/files/email/{id} HTTP/1.1"))
        assert server.ended.get(timeout=10) == "did not read for too long"
        assert server._sending == {}


def test_answer_has_to_be_read_at_a_least_rate(monkeypatch):
    clock, sent = FakeClock(), []
    monkeypatch.setattr(mailtest, "time", types.SimpleNamespace(monotonic=clock))
    handler = object.__new__(mailtest.HttpHandler)
    handler.server = types.SimpleNamespace(limits=mailtest.Limits())     # 30 s and 20 kB a second

    def send(octets):
        sent.append(len(octets))
        clock.now += 25.0
    handler.request = types.SimpleNamespace(send=send)
    handler._blocked, handler._sent = 0.0, 0
    with pytest.raises(mailtest.Silence, match="^read its answer too slowly$"):
        handler._write(b"x" * 2_000_000)
    assert sum(sent) == 3 * 262_144      # 75 seconds, and 30 + 39 are allowed


@pytest.fixture
def announced(monkeypatch):
    """A server that says when somebody begins to wait for mail: next_waiter()."""
    api = mailtest.Api(mailtest.Store())
    entered, wait = queue.Queue(), api.store._wait

    def announce(*arguments):
        entered.put(True)
        wait(*arguments)
    monkeypatch.setattr(api.store, "_wait", announce)
    with serving(api) as server:
        server.next_waiter = lambda: entered.get(timeout=10)
        yield server


WAITING = {
    "an inbox": request("GET /v1/get/a@x.example?timeout=60&count=9 HTTP/1.1"),
    "a search": posted("Content-Length: 13", body=b'{"body":"no"}',
                       line="POST /api/messages/search?timeout=60000 HTTP/1.1"),
}


@pytest.mark.parametrize("octets", rows(WAITING))
def test_client_that_hangs_up_while_it_waits_frees_its_place(octets, announced):
    with connect(announced) as sock:
        sock.sendall(octets)
        announced.next_waiter()
    delivered(announced.api.store, "a@x.example")    # wakes it: it looks whether anybody is there
    assert announced.ended.get(timeout=10) == "hung up while it waited"
    assert announced.api.store.counters()["waiters"] == 0


def test_client_that_waits_is_answered_when_the_mail_comes(announced):
    with connect(announced) as sock:
        sock.sendall(request("GET /v1/get/a@x.example?timeout=60 HTTP/1.1") + LAST)
        announced.next_waiter()
        id = delivered(announced.api.store, "a@x.example").id
        first, last = responses(receive_all(sock))
        assert (first[0], json.loads(first[2])["messages"][0]["id"], last[0]) == (200, id, 404)


def test_client_that_waits_is_answered_when_the_catcher_stops(announced):
    with connect(announced) as sock:
        sock.sendall(request("GET /v1/get/a@x.example?timeout=60 HTTP/1.1"))
        announced.next_waiter()
        announced.stopping.set()
        announced.api.store.close()
        (status, fields, _), = responses(receive_all(sock))
        assert (status, fields["connection"]) == (404, "close")


# -- events

def chunks(sock):
    """The chunks of a body as they come."""
    octets = b""
    while True:
        while b"\r\n" not in octets:
            octets += sock.recv(65_536)
        size, _, octets = octets.partition(b"\r\n")
        count = int(size, 16)
        while len(octets) < count + 2:
            octets += sock.recv(65_536)
        yield octets[:count]
        octets = octets[count + 2:]
        if not count:
            return


def test_events_come_as_they_happen_and_end_with_the_catcher():
    with serving() as server, connect(server) as sock:
        sock.sendall(request("GET /v1/events HTTP/1.1"))
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += sock.recv(1)
        fields = head.decode().lower().split("\r\n")
        assert fields[0] == "http/1.1 200 ok"
        assert {"transfer-encoding: chunked", "cache-control: no-store",
                "content-type: text/event-stream; charset=utf-8"} <= set(fields)
        assert not any(field.startswith("content-length") for field in fields)
        events = chunks(sock)
        assert next(events) == b"retry: 1000\n: 0\n\n"
        for number in (1, 2):
            delivered(server.api.store, "a@x.example")
            assert next(events).startswith(b"id: %d\nevent: message\ndata: {" % number)
        server.api.store.close()
        assert list(events)[-1] == b""


def test_events_for_http_1_0_are_not_chunked():
    with serving() as server, connect(server) as sock:
        delivered(server.api.store, "a@x.example")
        sock.sendall(request("GET /v1/events?after=0 HTTP/1.0"))
        server.api.store.close()
        head, _, body = receive_all(sock).partition(b"\r\n\r\n")
        assert b"Transfer-Encoding" not in head and b"Connection: close" in head
        assert body.startswith(b"retry: 1000\n: 0\n\n")


def test_head_of_events_ends_at_once(server):
    sent = over_socket(server, request("HEAD /v1/events HTTP/1.1"))
    assert sent.startswith(b"HTTP/1.1 200 OK\r\n") and sent.endswith(b"\r\n\r\n")


def test_reader_of_events_that_hangs_up_is_left():
    with serving() as server:
        with connect(server) as sock:
            sock.sendall(request("GET /v1/events HTTP/1.1"))
            sock.recv(1)
        delivered(server.api.store, "a@x.example")
        assert server.ended.get(timeout=10) in ("", "broke the connection")


# -- bounds

def test_connections_beyond_the_bound_of_one_client_are_refused():
    api = mailtest.Api(mailtest.Store(mailtest.Limits(connections_per_client=1)))
    with serving(api) as server, connect(server) as first:
        first.sendall(request())
        assert first.recv(65_536).startswith(b"HTTP/1.1 200 OK\r\n")
        with connect(server) as second:
            head, _, body = receive_all(second).partition(b"\r\n\r\n")
        assert head.decode().split("\r\n") == [
            "HTTP/1.1 503 Service Unavailable", "Retry-After: 1", "Connection: close",
            "Content-Type: application/json", f"Content-Length: {len(body)}"]
        assert json.loads(body) == {"error": "busy",
                                    "detail": "Too many connections: try again later"}
        first.sendall(LAST)
        assert statuses(receive_all(first)) == [404]


# -- TLS

def trusting_all():
    """A client's SSLContext that takes any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def over_tls(sock, octets):
    """What a client gets over TLS."""
    with trusting_all().wrap_socket(sock, server_hostname="mailosaur.com") as secure:
        secure.sendall(octets)
        return receive_all(secure)


def test_https(tls):
    with serving(tls=tls, https=True) as server:
        id = whole(server.api).id
        with connect(server) as sock:
            (status, _, body), last = responses(over_tls(sock, request(
                f"GET /api/messages/{id} HTTP/1.1", host="Host: localhost:1") + LAST))
        assert (status, last[0]) == (200, 404)
        assert json.loads(body)["attachments"][0]["url"].startswith("https://localhost:1/api/")


def test_plain_http_on_a_port_with_tls_is_left(tls):
    with serving(tls=tls, https=True) as server, connect(server) as sock:
        sock.sendall(request())
        assert server.ended.get(timeout=10).startswith("failed the TLS handshake: ")


TUNNELS = {
    "HTTP/1.1": request("CONNECT mailosaur.com:443 HTTP/1.1", host="Host: mailosaur.com:443"),
    "HTTP/1.0 without fields, as Python does": b"CONNECT mailosaur.com:443 HTTP/1.0\r\n\r\n",
    "in capitals": request("CONNECT MAILOSAUR.COM:443 HTTP/1.1"),
    "a subdomain": request("CONNECT api.mailosaur.net:443 HTTP/1.1"),
    "this machine": request("CONNECT 127.0.0.1:443 HTTP/1.1"),
    "a host that is allowed": request("CONNECT mail.example:443 HTTP/1.1"),
}


@pytest.mark.parametrize("octets", rows(TUNNELS))
def test_tunnel_ends_here(octets, tls):
    api = mailtest.Api(mailtest.Store(), mailtest.ApiPolicy(allow_hosts=("mail.example",)))
    with serving(api, tls=tls) as server, connect(server) as sock:
        sock.sendall(octets)
        assert sock.recv(65_536) == b"HTTP/1.1 200 Connection established\r\n\r\n"
        found = responses(over_tls(sock, request(
            "GET /api/messages?server=abcd1234 HTTP/1.1", host="Host: mailosaur.com") + LAST))
        assert [(status, body) for status, _, body in found][0] == (200, b'{"items":[]}')
        assert len(found) == 2


def test_tunnel_gives_urls_that_lead_through_it(tls):
    with serving(tls=tls) as server, connect(server) as sock:
        id = whole(server.api).id
        sock.sendall(TUNNELS["HTTP/1.1"])
        sock.recv(65_536)
        (_, _, body), = responses(over_tls(sock, request(
            f"GET /api/messages/{id} HTTP/1.1", "Connection: close", host="Host: mailosaur.com")))
        assert json.loads(body)["attachments"][0]["url"].startswith("https://mailosaur.com/api/")


@pytest.mark.parametrize("target, body, status", [
    ("evil.example:443", b"", 403), ("mailosaur.com:80", b"", 403),
    ("mailosaur.com:443", b"x", 400)])
def test_tunnel_is_refused(target, body, status, tls):
    with serving(tls=tls) as server:
        octets = request(f"CONNECT {target} HTTP/1.1", body=body)
        assert statuses(over_socket(server, octets)) == [status]


def test_client_that_fails_the_handshake_is_left(tls):
    with serving(tls=tls) as server, connect(server) as sock:
        sock.sendall(TUNNELS["HTTP/1.1"])
        sock.recv(65_536)
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert server.ended.get(timeout=10).startswith("failed the TLS handshake: ")


def test_large_answers_under_way_are_bounded():
    api = api_on_clock(limits={"sending": 1_000})[1]
    server = mailtest.HttpServer("127.0.0.1", 0, api)
    try:
        assert server.may_send("a", 5_000)           # a single one always
        assert not server.may_send("a", 1) and not server.may_send("b", 1)
        server.may_send("a", -5_000)
        assert server.may_send("a", 300) and server.may_send("a", 200)
        assert not server.may_send("a", 1)           # half is for others
        assert server.may_send("b", 500) and not server.may_send("c", 1)
    finally:
        server.stop()


# ---- Mailtest --------------------------------------------------------------

LETTER = b"""\
From: "The Shop" <shop@sender.example>
To: Bob <bob@mailtest.example>, eve@other.example
Cc: carl@cc.example
Subject: =?utf-8?q?Your_code_f=C3=BCr_heute?=
Date: Tue, 6 Aug 2019 17:44:07 +0000
Message-ID: <1@sender.example>
X-Twice: one
X-Twice: two
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary="b"

--b
Content-Type: multipart/alternative; boundary="c"

--c
Content-Type: text/plain; charset=utf-8

Your code is 482913, see https://text.example/
--c
Content-Type: text/html; charset=utf-8

<p>Your code is <b>482913</b>, <a href="https://html.example/">see</a></p>
--c--
--b
Content-Type: application/pdf; name="bill.pdf"
Content-Disposition: attachment; filename="bill.pdf"
Content-ID: <bill@sender.example>
Content-Transfer-Encoding: base64

JVBERi0=
--b--
""".replace(b"\n", b"\r\n")


def inbox_on_clock(*subjects, **limits):
    """(clock, store, inbox): an acquired inbox on a fake clock that has got mail with these
    subjects."""
    clock, store = store_on_clock(**limits)
    inbox = mailtest.Inbox(store, store.acquire().address)
    clock.now += 1
    for subject in subjects:
        delivered(store, inbox.address, octets=_with_subject(subject))
    return clock, store, inbox


def _with_subject(subject):
    return (f"From: s@sender.example\r\nTo: b@x.example\r\nSubject: {subject}\r\n"
            "Date: Tue, 6 Aug 2019 17:44:07 +0000\r\nMessage-ID: <1@sender.example>\r\n\r\n"
            f"Body of {subject}\r\n").encode()


def subjects(mails):
    return [mail.subject for mail in mails]


def post(server, *paths, octets=b"Subject: x\r\n\r\nx\r\n"):
    """Sends a mail over SMTP."""
    with smtplib.SMTP("127.0.0.1", server.smtp_port, "client.example", 10) as client:
        client.sendmail("s@sender.example", paths, octets)


def fetch(url, **headers):
    """(status, octets) of a GET."""
    request = urllib.request.Request(url, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@contextlib.contextmanager
def started_threads():
    """A list of the threads that this one starts meanwhile, and that those start; not of the
    others in this process, which come and go with the servers of other tests."""
    first, start, started = threading.current_thread(), threading.Thread.start, []

    def noted(thread):
        if threading.current_thread() in [first] + started:
            started.append(thread)
        start(thread)
    threading.Thread.start = noted
    try:
        yield started
    finally:
        threading.Thread.start = start


def all_end(threads):
    """Whether these threads end by themselves."""
    for thread in threads:
        thread.join(10)
    return not any(thread.is_alive() for thread in threads)


def answers(port):
    """Whether somebody listens on the port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


# -- Mail

def test_what_a_test_reads_of_a_mail():
    mail = mailtest.Mail(letter("bob@mailtest.example", "hidden@bcc.example", octets=LETTER))
    assert [[(each.name, each.email) for each in kind]
            for kind in (mail.from_, mail.to, mail.cc, mail.bcc)] == [
        [("The Shop", "shop@sender.example")],
        [("Bob", "bob@mailtest.example"), ("", "eve@other.example")],
        [("", "carl@cc.example")],
        [("", "hidden@bcc.example")],
    ]
    assert (mail.subject, mail.text, mail.links, mail.codes, mail.octets) == (
        "Your code für heute", "Your code is 482913, see https://text.example/",
        ["https://html.example/"], ["482913"], LETTER)
    assert [(each.file_name, each.content_type, each.content_id, each.octets)
            for each in mail.attachments] == [
        ("bill.pdf", "application/pdf", "bill@sender.example", b"%PDF-")]
    assert [mail.header("x-twice"), mail.header("X-None"), mail.header("X-None", "-")] == [
        "one", "", "-"]


def test_mail_and_inbox_show_themselves():
    _, store = store_on_clock()
    assert repr(mailtest.Mail(letter("b@x.example", "c@x.example", octets=LETTER))) == (
        "<Mail 'Your code für heute' from 'shop@sender.example' to b@x.example, c@x.example>")
    assert repr(mailtest.Mail(letter("b@x.example", octets=b""))) == (
        "<Mail '' from '' to b@x.example>")
    assert repr(mailtest.Inbox(store, "b@x.example")) == "<Inbox b@x.example>"


# -- Inbox

# subjects of the mail in the inbox, arguments of wait_all(), subjects of what it returns
WAITED = {
    "one of one": (["a"], {"count": 1}, ["a"]),
    "newest first": (["a", "b"], {"count": 2}, ["b", "a"]),
    "all there are, beyond the count": (["a", "b", "c"], {"count": 2}, ["c", "b", "a"]),
    "a part of the subject in any case": (
        ["Your Invoice", "b"], {"count": 1, "subject": "INVOICE"}, ["Your Invoice"]),
    "the sender's address": (["a"], {"count": 1, "sender": "S@sender.example"}, ["a"]),
    "a part of the body": (["a", "b"], {"count": 1, "body": "body of a"}, ["a"]),
    "all conditions hold": (["a", "ab"], {"count": 1, "subject": "a", "body": "ab"}, ["ab"]),
}


@pytest.mark.parametrize("got, arguments, expected", rows(WAITED))
def test_wait_all_returns_what_is_there(got, arguments, expected):
    _, _, inbox = inbox_on_clock(*got)
    assert subjects(inbox.wait_all(**arguments)) == expected


def test_wait_after_a_mail_looks_only_at_later_ones():
    _, _, inbox = inbox_on_clock("a", "b")
    newest, oldest = inbox.messages
    assert inbox.wait(after=oldest).id == newest.id
    with pytest.raises(mailtest.NoMail):
        inbox.wait(after=newest, timeout=0)


def test_wait_after_a_mail_that_was_deleted():
    _, store, inbox = inbox_on_clock("a")
    mail = inbox.wait()
    store.delete(mail.id)
    delivered(store, inbox.address, octets=_with_subject("b"))
    assert inbox.wait(after=mail).subject == "b"


# what is waited for with one mail too few
WAITERS = {
    "wait": (lambda inbox: inbox.wait(timeout=10).subject, "b"),
    "wait for a subject": (lambda inbox: inbox.wait("b", timeout=10).subject, "b"),
    "wait_all": (lambda inbox: subjects(inbox.wait_all(1, timeout=10)), ["b"]),
    "expect_none": (lambda inbox: str(inbox.expect_none(timeout=10)),
                    "expected no mail for b@x.example\nb@x.example got 1 mail:\n"
                    "  <time> <Mail 'b' from 's@sender.example' to b@x.example>"),
}


@pytest.mark.parametrize("wait, expected", rows(WAITERS))
def test_waiting_ends_when_the_mail_arrives(wait, expected, waiting_store):
    waiter = in_thread(wait, mailtest.Inbox(waiting_store, "b@x.example"))
    waiting_store.next_waiter()
    delivered(waiting_store, "b@x.example", octets=_with_subject("b"))
    found = waiter.join_value()
    if isinstance(found, mailtest.NoMail):
        found = re.sub(r"\d\d:\d\d:\d\d\.\d{6}", "<time>", str(found))
    assert found == expected


NO_CLIENT = (
    "no SMTP client has connected since: is the application set to this host and port? (test "
    "modes replace the mailer: Django's locmem, Flask-Mail's TESTING, Rails' :test, Laravel's "
    "array)")

# subjects of the mail in the inbox, arguments of wait_all(), the text of NoMail
NO_MAIL = {
    "nothing at all": (
        [], {"count": 1, "timeout": 0},
        "expected 1 mail for <inbox> within 0 s, got 0\n<inbox> got 0 mails\n" + NO_CLIENT),
    "one of two": (
        ["a"], {"count": 2, "timeout": 0},
        "expected 2 mails for <inbox> within 0 s, got 1\n<inbox> got 1 mail:\n"
        "  00:16:41.000000 <Mail 'a' from 's@sender.example' to <inbox>>"),
    "another subject": (
        ["a", "b"], {"count": 1, "subject": "Invoice", "timeout": 0},
        "expected 1 mail for <inbox> with subject='Invoice' within 0 s, got 0\n"
        "<inbox> got 2 mails:\n"
        "  00:16:41.000001 <Mail 'b' from 's@sender.example' to <inbox>>\n"
        "  00:16:41.000000 <Mail 'a' from 's@sender.example' to <inbox>>"),
    "each condition is named": (
        [], {"count": 1, "subject": "a", "sender": "b@c", "body": "d", "timeout": 0.001},
        "expected 1 mail for <inbox> with subject='a', sender='b@c', body='d' within 0.001 s, "
        "got 0\n<inbox> got 0 mails\n" + NO_CLIENT),
}


@pytest.mark.parametrize("got, arguments, expected", rows(NO_MAIL))
def test_no_mail_says_what_was_expected_and_what_came(got, arguments, expected):
    _, _, inbox = inbox_on_clock(*got)
    with pytest.raises(mailtest.NoMail) as no_mail:
        inbox.wait_all(**arguments)
    assert str(no_mail.value) == expected.replace("<inbox>", inbox.address)


def test_where_is_asked_of_each_mail():
    _, _, inbox = inbox_on_clock("a", "b")
    assert inbox.wait(where=lambda mail: mail.subject == "a").subject == "a"
    assert inbox.wait(to="B@x.example", timeout=0).subject == "b"
    inbox.expect_none(to="c@x.example", timeout=0)


def test_silence_is_explained():
    _, store, inbox = inbox_on_clock()
    for number in range(7):
        delivered(store, f"{number}@x.example")
    store.add_session(mailtest.SessionRecord(
        0, "127.0.0.1", "c", "", False, 0.0, 1001.0, 0, "", "connection closed", b""))
    assert inbox.report().splitlines()[1:] == [
        "mail to other addresses since: 6@x.example, 5@x.example, 4@x.example, 3@x.example, "
        "2@x.example, ...",
        "SMTP sessions that were broken: 1, the last: connection closed"]


def test_silence_in_an_event_loop_is_explained():
    _, _, inbox = inbox_on_clock()

    async def waits():
        with pytest.raises(mailtest.NoMail) as no_mail:
            inbox.wait(timeout=0)
        return str(no_mail.value).splitlines()[2]
    assert asyncio.run(waits()) == (
        "this thread runs an event loop, which stands still while a test waits; write: await "
        "asyncio.to_thread(inbox.wait, ...)")


def test_expect_none_is_content_with_silence_and_with_other_mail():
    _, _, inbox = inbox_on_clock("a")
    assert inbox.expect_none(timeout=0, subject="b") is None
    assert inbox.expect_none(timeout=0, after=inbox.wait()) is None


def test_report_lists_warnings_and_the_last_refused_session():
    _, store, inbox = inbox_on_clock()
    delivered(store, inbox.address, octets=b"From: s@x.example\r\nSubject: a\r\n\r\nx\r\n")
    for refused in ("", "550 5.1.1 Expected another", "451 4.0.0 Later", ""):
        store.add_session(mailtest.SessionRecord(
            0, "127.0.0.1", "c", "", False, 0.0, 1001.0, 0, refused, "quit",
            b"C: QUIT\r\nS: " + refused.encode() + b"\r\n"))
    assert inbox.report() == (
        f"{inbox.address} got 1 mail:\n"
        f"  00:16:41.000000 <Mail 'a' from 's@x.example' to {inbox.address}>\n"
        "    warning: no Date field\n"
        "    warning: no Message-ID field\n"
        "SMTP sessions that were refused: 2, the last: 451 4.0.0 Later\n"
        "last refused SMTP session (451 4.0.0 Later):\n"
        "  C: QUIT\n"
        "  S: 451 4.0.0 Later")


def test_report_knows_nothing_of_sessions_before_the_inbox():
    _, store, inbox = inbox_on_clock()
    store.add_session(mailtest.SessionRecord(
        0, "127.0.0.1", "c", "", False, 0.0, 999.0, 0, "451 4.0.0 Later", "quit", b""))
    assert inbox.report() == f"{inbox.address} got 0 mails\n{NO_CLIENT}"


# how an inbox ends, what NoMail says of it
ENDED_INBOXES = {
    "deleted": (lambda clock, store, inbox: inbox.delete(),
                "the inbox '<inbox>' was deleted at 1970-01-01T00:16:40.000000+00:00; acquire a "
                "new one"),
    "expired": (lambda clock, store, inbox: setattr(clock, "now", clock.now + 600),
                "the inbox '<inbox>' expired at 1970-01-01T00:26:40.000000+00:00; acquire a new "
                "one"),
    "stopped": (lambda clock, store, inbox: store.close(),
                "the catcher was stopped\n<inbox> got 0 mails\n" + NO_CLIENT),
}


@pytest.mark.parametrize("end, expected", rows(ENDED_INBOXES))
@pytest.mark.parametrize("wait", [mailtest.Inbox.wait, mailtest.Inbox.expect_none])
def test_nothing_is_waited_for_in_an_inbox_that_has_ended(wait, end, expected):
    clock, store = store_on_clock()
    inbox = mailtest.Inbox(store, store.acquire().address.lower())
    end(clock, store, inbox)
    with pytest.raises(mailtest.NoMail) as no_mail:
        wait(inbox, timeout=60)
    assert str(no_mail.value) == (f"no mail for {inbox.address} can come: "
                                  + expected.replace("<inbox>", inbox.address))


def test_inbox_that_nobody_acquired_may_get_mail_again():
    clock, store = store_on_clock()
    delivered(store, "a@x.example")
    clock.now += 600
    assert mailtest.Inbox(store, "a@x.example").expect_none(timeout=0) is None


@pytest.mark.parametrize("arguments, expected", [
    ({"timeout": float("nan")}, "expected timeout to be seconds, 0 or more, got nan"),
    ({"timeout": float("inf")}, "expected timeout to be seconds, 0 or more, got inf"),
    ({"timeout": -1}, "expected timeout to be seconds, 0 or more, got -1"),
    ({"timeout": None}, "expected timeout to be seconds, 0 or more, got None"),
    ({"timeout": "5"}, "expected timeout to be seconds, 0 or more, got '5'"),
    ({"subject": 5}, "expected subject to be text, got 5"),
    ({"after": "5d0f"}, "expected after to be a Mail, got '5d0f'"),
    ({"count": 0}, "expected count to be 1 or more, got 0"),
], ids=str)
def test_wait_says_what_it_expected(arguments, expected):
    _, _, inbox = inbox_on_clock()
    with pytest.raises((ValueError, TypeError)) as refused:
        inbox.wait_all(**{"count": 1, **arguments})
    assert str(refused.value) == expected


def test_report_is_of_bounded_length():
    _, store, inbox = inbox_on_clock(*map(str, range(30)))
    lines = inbox.report().splitlines()
    assert (lines[0], len(lines)) == (f"{inbox.address} got 30 mails:", 21)


def test_messages_of_an_inbox_that_has_ended_are_unknown():
    _, _, inbox = inbox_on_clock("a")
    inbox.delete()
    with pytest.raises(mailtest.Unknown):
        print(inbox.messages)


def test_report_says_that_the_inbox_has_expired():
    clock, _, inbox = inbox_on_clock("a")
    clock.now += 600
    assert inbox.report().startswith(
        f"nothing arrived: the inbox {inbox.address.lower()!r} expired at "
        "1970-01-01T00:26:40.000000+00:00; acquire a new one\nno SMTP client has connected")


def test_fixed_address_may_be_deleted_before_it_exists_and_again():
    _, store, inbox = inbox_on_clock()
    fixed = mailtest.Inbox(store, "support@x.example")
    fixed.delete()
    assert fixed.messages == []
    delivered(store, "support@x.example")
    fixed.delete()
    fixed.delete()
    assert fixed.messages == []
    delivered(store, "suport@x.example")
    assert "suport@x.example" in fixed.report()


def test_inbox_knows_its_end():
    clock, _, inbox = inbox_on_clock()
    assert inbox.expires == datetime.datetime.fromtimestamp(clock.now + 599,
                                                            datetime.timezone.utc)
    inbox.delete()
    with pytest.raises(mailtest.Unknown):
        print(inbox.expires)


# -- what follows the store

def follow(follower, *subjects):
    """Has the follower handle mail with these subjects, up to its stop; the state then."""
    store = follower._store
    for subject in subjects:
        delivered(store, "b@x.example", octets=_with_subject(subject))
    follower.start()
    store.close()
    follower.stop()
    return follower.state()


def logged(caplog):
    """What was logged as errors, without ids."""
    return [re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "<id>", record.getMessage())
            for record in caplog.records if record.levelno == logging.ERROR]


def saver(folder):
    return mailtest.Saver(store_on_clock()[1], str(folder))


def test_saved_file_is_whole_before_it_has_its_name(tmp_path, monkeypatch):
    seen = []

    def replace(old, new, really=os.replace):
        seen.append((os.listdir(tmp_path), pathlib.Path(old).read_bytes()))
        really(old, new)
    monkeypatch.setattr(os, "replace", replace)
    follower = saver(tmp_path / "a" / "b")
    tmp_path = tmp_path / "a" / "b"      # it makes its folder
    message = delivered(follower._store, "b@x.example", octets=LETTER)
    assert follow(follower) == {"folder": str(tmp_path), "saved": 1, "waiting": 0, "failed": 0,
                                "error": None}
    name = f"19700101T001640.000000Z-{message.id}"
    assert seen == [([f".{name}.part"], LETTER)]
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [
        (name + ".eml", LETTER)]


def _full_disk(monkeypatch):
    class Full(io.FileIO):
        def write(self, octets):
            super().write(octets[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(mailtest, "open", lambda path, mode: Full(path, mode), raising=False)
    return "No space left on device"


def _no_permission(monkeypatch):
    def refuse(path, mode):
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(mailtest, "open", refuse, raising=False)
    return "Permission denied"


def _cannot_be_named(monkeypatch):
    def refuse(old, new):
        raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(os, "replace", refuse)
    return "Input/output error"


UNWRITABLE = {
    "a full disk": _full_disk,
    "a folder without permission": _no_permission,
    "a disk that fails at the last step": _cannot_be_named,
}


@pytest.mark.parametrize("breaks", rows(UNWRITABLE))
def test_mail_that_cannot_be_saved_stays_and_one_line_tells(breaks, tmp_path, monkeypatch, caplog):
    follower = saver(tmp_path)
    error = breaks(monkeypatch)
    assert follow(follower, *"abc") == {"folder": str(tmp_path), "saved": 0, "waiting": 0,
                                        "failed": 3, "error": error}
    assert os.listdir(tmp_path) == []
    assert len(follower._store.messages(server="mailtest")) == 3
    assert logged(caplog) == [f"--save: {error}"]
    monkeypatch.undo()                   # and later mail is written again
    assert (follower.handle(letter("b@x.example")), len(os.listdir(tmp_path))) == ("", 1)


class Receiver(http.server.ThreadingHTTPServer):
    """Takes POSTs: what came is in `came`, and is answered with the next of `statuses`, then
    with 200."""

    daemon_threads = True

    def __init__(self, *statuses):
        super().__init__(("127.0.0.1", 0), _ReceiverHandler)
        self.came = queue.Queue()
        self.statuses = list(statuses)
        self.url = f"http://127.0.0.1:{self.server_port}/hook?a=b"

    def server_bind(self):               # the base class asks for the host's name
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address

    def next(self):
        """(path, content type, subject, credentials) of the next POST."""
        return self.came.get(timeout=10)

    def subjects(self):
        """Those of all POSTs that came."""
        return [self.next()[2] for _ in range(self.came.qsize())]


class _ReceiverHandler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        mail = json.loads(self.rfile.read(int(self.headers["Content-Length"])).decode("utf-8"))
        # Before the answer: after it the next POST may come first, in another thread.
        self.server.came.put((self.path, self.headers["Content-Type"], mail["subject"],
                              self.headers["Authorization"]))
        statuses = self.server.statuses
        self.send_response(statuses.pop(0) if statuses else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format, *arguments):
        pass


@contextlib.contextmanager
def receiving(*statuses):
    with Receiver(*statuses) as receiver:
        thread = threading.Thread(target=receiver.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield receiver
        finally:
            receiver.shutdown()
            thread.join()


def webhook(url, **limits):
    """A Webhook that has not started."""
    _, store = store_on_clock(**limits)
    api = mailtest.Api(store)
    return mailtest.Webhook(
        store, url, lambda message: mailtest.message_json(api, message, "http://127.0.0.1:8080"))


def hook_state(sent, dropped=0, waiting=0, error=None):
    return {"sent": sent, "dropped": dropped, "waiting": waiting, "error": error}


def test_webhook_posts_each_message_in_order():
    with receiving() as receiver:
        assert follow(webhook(receiver.url), *"abc") == hook_state(3)
        assert [receiver.next() for _ in range(3)] == [
            ("/hook?a=b", "application/json", subject, None) for subject in "abc"]


def test_webhook_sends_the_password_of_its_url():
    with receiving() as receiver:
        follow(webhook(receiver.url.replace("//", "//me:p%40ss@")), "a")
        assert receiver.next()[3] == "Basic " + base64.b64encode(b"me:p@ss").decode()


# statuses that are answered, limits, subjects as they came, state, what is logged
HOOKS = {
    "tries again and keeps the order": (
        (500, 301, 404), {}, "aaaab", hook_state(2),
        ["--webhook: answered 500", "--webhook: answered 301",
         "--webhook: answered 404"]),
    "gives one message up and goes on": (
        (500, 500), {"webhook_tries": 2}, "aab", hook_state(1, 1),
        ["--webhook: answered 500"]),
}


@pytest.mark.parametrize("statuses, limits, came, state, lines", rows(HOOKS))
def test_webhook(statuses, limits, came, state, lines, caplog):
    with receiving(*statuses) as receiver:
        hook = webhook(receiver.url, webhook_pause=0.001, **limits)
        hook.start()
        for subject in "ab":
            delivered(hook._store, "b@x.example", octets=_with_subject(subject))
        assert "".join(receiver.next()[2] for _ in came) == came
        hook._store.close()
        hook.stop()
        assert (hook.state(), logged(caplog)) == (state, lines)


def test_webhook_goes_on_after_a_message_that_cannot_be_rendered(caplog):
    with receiving() as receiver:
        hook = webhook(receiver.url)
        body = hook._body
        hook._body = lambda message: body(message if b"Subject: a" not in message.octets else None)
        assert follow(hook, *"ab") == hook_state(1, 1)
        assert (receiver.subjects(), logged(caplog)) == (["b"], ["--webhook: message <id>"])


def test_stop_of_a_webhook_tells_what_it_did_not_send(caplog):
    hook = webhook(_unreachable(), webhook_pause=60.0)
    pausing = threading.Event()
    hook.given_up.wait = lambda seconds, wait=hook.given_up.wait: pausing.set() or wait(seconds)
    hook.start()
    for subject in "abc":
        delivered(hook._store, "b@x.example", octets=_with_subject(subject))
    assert pausing.wait(10)
    hook._store.close()
    hook.stop()
    assert hook.state() == hook_state(0, 0, 3, "Connection refused")
    assert caplog.messages[-1] == "--webhook: 3 messages were left at the stop"


class _Pauses:
    """Stands for the event that ends a webhook's pauses: writes down how long they are."""

    def __init__(self, ends_after=100):
        self.seconds = []
        self._ends_after = ends_after

    def is_set(self):
        return len(self.seconds) >= self._ends_after

    def wait(self, seconds):
        self.seconds.append(seconds)
        return self.is_set()


def _unreachable():
    """A URL where nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}/"


# limits, the pause that ends it, pauses
PAUSES = {
    "they double up to thirty seconds": ({}, 100, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0]),
    "none after the last try": ({"webhook_tries": 2}, 100, [0.5]),
    "a stop ends them": ({}, 2, [0.5, 1.0]),
}


@pytest.mark.parametrize("limits, ends_after, seconds", rows(PAUSES))
def test_pauses_of_a_webhook(limits, ends_after, seconds):
    hook = webhook(_unreachable(), **limits)
    hook.given_up = _Pauses(ends_after)
    assert hook.handle(letter("b@x.example")) == "Connection refused"
    assert hook.given_up.seconds == seconds


def test_webhook_whose_answer_trickles_in_is_timed_out_as_a_whole():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def trickle():
            client = listener.accept()[0]
            with contextlib.suppress(OSError), client:
                while True:              # until the hook hangs up
                    client.sendall(b"H")
                    time.sleep(0.02)
        thread = threading.Thread(target=trickle)
        thread.start()
        hook = webhook(f"http://127.0.0.1:{listener.getsockname()[1]}/", webhook_tries=1,
                       webhook_time=0.1)
        assert hook.handle(letter("b@x.example"))
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("url", [
    "ftp://x.example/", "x.example", "http:///x", "http://h:99999/", "http://h:abc/",
    "http://[::1/", "http://a..b/", "http://h/a b", "http://h/\x0b", "http://h/\u00e9"])
def test_webhook_refuses_a_url_that_is_none(url):
    with pytest.raises(ValueError) as error:
        webhook(url)
    assert str(error.value) == f"expected --webhook http://host/path, got {url!r}"


def test_refused_url_does_not_show_its_password():
    with pytest.raises(ValueError) as error:
        webhook("http://me:secret@a..b/")
    assert str(error.value) == "expected --webhook http://host/path, got 'http://...@a..b/'"


# -- Mailtest

@pytest.fixture(scope="module")
def running():
    """One running Mailtest for the tests that need sockets."""
    with mailtest.Mailtest() as server:
        yield server


def test_mail_goes_in_over_smtp_and_out_in_python(running):
    inbox = running.acquire()
    post(running, inbox.address, octets=LETTER)
    mail = inbox.wait(subject="code")
    assert (mail.octets, mail.codes, mail.envelope.forward_paths) == (
        LETTER, ["482913"], (inbox.address,))
    assert subjects(inbox.messages) == [mail.subject]
    assert running.messages[0].id == mail.id
    assert f"c: rcpt to:<{inbox.address}>\r\ns: 250 2.1.5 ok\r\n".lower() in (
        mail.transcript.lower())         # smtplib's case differs by version


def test_inbox_of_any_address(running):
    inbox = running.inbox("Anyone@User.example")
    post(running, "anyone@user.example")
    assert inbox.wait().envelope.forward_paths == ("anyone@user.example",)


def test_attempts_count_what_was_refused(running):
    inbox = running.acquire("rcpt:451*2")
    for _ in range(2):
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            post(running, inbox.address)
    post(running, inbox.address)
    assert (inbox.attempts, len(inbox.messages)) == (3, 1)
    assert "last refused SMTP session (451 4.0.0 Scripted: fail=rcpt:451*2):" in inbox.report()


def test_addresses_of_a_server(running):
    assert (running.smtp, running.url) == (f"127.0.0.1:{running.smtp_port}",
                                           f"http://127.0.0.1:{running.http_port}")
    assert fetch(running.url + "/healthz")[0] == 200
    assert answers(running.smtp_port)
    assert running.smtps_port is None


# host, how the SMTP address is told with port 25
TOLD = {
    "IPv4": ("127.0.0.2", "127.0.0.2:25"),
    "both loopbacks": ("localhost", "127.0.0.1:25"),
    "all, as a star": ("*", "127.0.0.1:25"),
    "all of IPv6 in brackets": ("[::]", "[::1]:25"),
    "IPv6": ("::1", "[::1]:25"),
    "IPv6 in brackets": ("[::1]", "[::1]:25"),
    "all of IPv4": ("0.0.0.0", "127.0.0.1:25"),
    "all of IPv6": ("::", "[::1]:25"),
}


@pytest.mark.parametrize("host, told", rows(TOLD))
def test_told_address_is_one_that_a_client_can_use(host, told):
    server = mailtest.Mailtest(host, smtp_port=25, http_port=80)
    assert (server.smtp, server.url) == (told, f"http://{told[:-3]}:80")


def test_two_servers_know_nothing_of_each_other():
    with mailtest.Mailtest() as one, mailtest.Mailtest() as two:
        assert len({one.smtp_port, one.http_port, two.smtp_port, two.http_port}) == 4
        post(one, "b@x.example", octets=_with_subject("one"))
        post(two, "b@x.example", octets=_with_subject("two"))
        assert [subjects(each.messages) for each in (one, two)] == [["one"], ["two"]]


def test_stop_leaves_no_thread_and_no_port(tmp_path):
    with receiving() as receiver, started_threads() as threads:
        with mailtest.Mailtest(save=str(tmp_path), webhook=receiver.url) as server:
            post(server, "b@x.example")
            assert fetch(server.url + "/healthz")[0] == 200
            receiver.next()
            assert {"smtp", "http", "webhook", "expiry"} <= {each.name for each in threads}
        assert all_end(threads)
    assert not answers(server.smtp_port) and not answers(server.http_port)
    server.stop()                        # once more does no harm


def test_stop_ends_waiting():
    with mailtest.Mailtest() as server:
        waiter = in_thread(server.acquire().wait)
        server.stop()
        assert isinstance(waiter.join_value(), mailtest.NoMail)


@contextlib.contextmanager
def taken_port():
    """A port that another program listens on."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.parametrize("name", ["smtp_port", "http_port"])
def test_start_opens_all_ports_or_none(name):
    with taken_port() as port, started_threads() as threads:
        server = mailtest.Mailtest(**{name: port})
        with pytest.raises(OSError) as error:
            server.start()
        assert error.value.errno == errno.EADDRINUSE
        assert str(error.value).endswith(f": '127.0.0.1:{port}'")
        assert all_end(threads)


def test_webhook_that_is_none_opens_no_port():
    server = mailtest.Mailtest(webhook="nowhere")
    with started_threads() as threads, pytest.raises(ValueError):
        server.start()
    assert all_end(threads)
    assert not answers(server.smtp_port) and not answers(server.http_port)


@pytest.mark.parametrize("arguments", [{"smtps_port": 0}, {"https": True}], ids=str)
def test_tls_port_needs_a_certificate(arguments):
    with pytest.raises(ValueError) as error:
        mailtest.Mailtest(**arguments)
    assert str(error.value) == "smtps_port and https need tls=True, or a certificate's paths"


def test_server_starts_once():
    server = mailtest.Mailtest().start()
    server.stop()
    with pytest.raises(RuntimeError) as error:
        server.start()
    assert str(error.value) == "a Mailtest starts once; make another"
    assert not answers(server.smtp_port) and not answers(server.http_port)


def test_followers_tell_their_state_in_healthz(tmp_path):
    with receiving() as receiver:
        with mailtest.Mailtest(save=str(tmp_path), webhook=receiver.url) as server:
            post(server, "b@x.example", octets=LETTER)
            receiver.next()
            state = json.loads(fetch(server.url + "/healthz")[1].decode("utf-8"))
    assert (sorted(state["save"]), sorted(state["webhook"])) == (
        ["error", "failed", "folder", "saved", "waiting"],
        ["dropped", "error", "sent", "waiting"])
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [LETTER]


# arguments, what is said
BAD_SETTINGS = {
    "credentials as text": ({"auth": "user:secret"},
                            "expected auth to be (user, password), or a dict from user to "
                            "password, got str"),
    "what to require": ({"require": "tls"},
                        "expected require to be some of ('auth', 'tls'), got 'tls'"),
    "a time as text": ({"limits": mailtest.Limits(ttl="10m")},
                       "expected Limits(ttl=...) to be a number such as 600.0, got '10m'"),
    "limits as a dict": ({"limits": {"ttl": 5}},
                         "expected limits to be Limits(...), got {'ttl': 5}"),
    "a certificate alone": ({"tls": "cert.pem"},
                            "expected tls to be True, (certificate, key) with their paths, or an "
                            "SSLContext, got 'cert.pem'"),
}


@pytest.mark.parametrize("arguments, text", rows(BAD_SETTINGS))
def test_settings_are_checked_at_once(arguments, text):
    with pytest.raises(TypeError) as error:
        mailtest.Mailtest(**arguments)
    assert str(error.value) == text


def test_port_of_a_server_that_has_not_started():
    with pytest.raises(RuntimeError) as error:
        print(mailtest.Mailtest().smtp)
    assert str(error.value) == ("the smtp port is known once this Mailtest has started: write "
                                "`with Mailtest() as server:`, or call start()")


def test_clear_ends_all_mail(running):
    inbox = running.inbox("root@localhost")
    post(running, "root@localhost")
    running.clear()
    assert (running.messages, inbox.messages) == ([], [])


# -- the pytest plugin

CONFTEST = """\
pytest_plugins = ["mailtest"]
"""
PROJECT = """\
import smtplib

def send(server, inbox):
    with smtplib.SMTP("127.0.0.1", server.smtp_port, "c.example") as client:
        client.sendmail("shop@x.example", [inbox.address], "From: shop@x.example\\r\\n"
                        "Date: Tue, 6 Aug 2019 17:44:07 +0000\\r\\nMessage-ID: <1@x.example>\\r\\n"
                        "Subject: Welcome\\r\\n\\r\\nx\\r\\n")

def test_that_passes(mailtest_server, inbox):
    inbox.expect_none(timeout=0)
    send(mailtest_server, inbox)
    assert inbox.wait(subject="Welcome").subject == "Welcome"

def test_that_fails(mailtest_server, inbox):
    send(mailtest_server, inbox)
    assert "Invoice" == inbox.wait().subject
"""
PROJECT_IN_SETUP = """\
import pytest
from test_project import send

@pytest.fixture
def user(mailtest_server, inbox):
    send(mailtest_server, inbox)
    raise LookupError("no user")

def test_whose_setup_fails(user):
    pass
"""


def run_project(folder, conftest, files, *options):
    """Runs pytest as its users do on a project that holds a copy of mailtest.py; its output."""
    shutil.copy(mailtest.__file__, str(folder))
    for name, text in dict(files, conftest=conftest).items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("PYTEST", "PYTHONPATH"))}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"      # others may warn, or change the order
    done = subprocess.run([sys.executable, "-W", "error", "-m", "pytest", "-p", "no:cacheprovider",
                           "--color=no", *options], cwd=str(folder), env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    return done.stdout.decode("utf-8", "replace").replace("\r\n", "\n")


REPORTED = re.compile(r"^-+ mailtest -+\n(test-\w{13}@mailtest\.example) got 1 mail:\n"
                      r"  \d\d:\d\d:\d\d\.\d{6} <Mail 'Welcome' from 'shop@x\.example' to \1>\n",
                      re.M)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What pytest prints of each failed test and fixture, by its title."""
    output = run_project(tmp_path_factory.mktemp("project"), CONFTEST,
                         {"test_project": PROJECT, "test_setup": PROJECT_IN_SETUP})
    assert re.search(r"^=+ 1 failed, 1 passed, 1 error in ", output, re.M), output
    parts = re.split(r"^_+ (\S.*\S) _+\n", output, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def test_report_of_a_failed_test_shows_what_its_inbox_received(reports):
    assert REPORTED.search(reports["test_that_fails"]), reports


def test_fixtures_of_the_pytest_plugin_in_each_worker_of_xdist(tmp_path):
    pytest.importorskip("xdist")
    output = run_project(tmp_path, CONFTEST, {"test_project": PROJECT},
                         "-p", "xdist", "-n", "2")
    assert re.search(r"^=+ 1 failed, 1 passed in ", output, re.M), output
    assert len(REPORTED.findall(output)) == 1, output


def test_report_of_a_failed_fixture_does_so_too(reports):
    assert REPORTED.search(reports["ERROR at setup of test_whose_setup_fails"]), reports


def test_conftest_may_import_mailtest_itself(tmp_path):
    output = run_project(tmp_path, "import mailtest\n" + CONFTEST, {"test_project": PROJECT})
    assert re.search(r"^=+ 1 failed, 1 passed in ", output, re.M), output


# ---- Command line ----------------------------------------------------------

class _Ready(io.StringIO):
    """Standard output that calls `then` with the ready line once that is there."""

    def __init__(self, then):
        super().__init__()
        self.then = then

    def flush(self):
        then, self.then = self.then, None
        if then is not None:
            then(json.loads(self.getvalue()))


@pytest.fixture
def program(monkeypatch, capsys):
    """Runs main() in this process, on free ports and for no time unless told otherwise.

    program(*arguments, ready=function) -> (exit status, standard output, standard error).
    `ready` gets the ready line while the servers run.
    """
    monkeypatch.setattr(mailtest, "LOG_SETTINGS", {})
    monkeypatch.delenv("MAILTEST_API_KEY", raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK")
               if hasattr(signal, name)]
    before = [signal.getsignal(number) for number in numbers]

    def run(*arguments, ready=None):
        output = _Ready(ready)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", output)
            try:
                status = mailtest.main(list(arguments))
            except SystemExit as ended:
                status = ended.code
            except KeyboardInterrupt:    # else it would end the test run
                status = "KeyboardInterrupt"
        return status, output.getvalue(), capsys.readouterr().err
    yield run
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


FREE = ("--smtp", "0", "--http", "0")
BRIEF = FREE + ("--exit-after", "1", "--timeout", "0.001")

# arguments, what is expected and was got
BAD_VALUES = {
    "--ttl soon": "a time such as 90s, 10m or 1h, got 'soon'",
    "--ttl 0": "a time such as 90s, 10m or 1h, got '0'",
    "--timeout 2weeks": "a time such as 90s, 10m or 1h, got '2weeks'",
    "--ttl 99999999d": "a time such as 90s, 10m or 1h, got '99999999d'",
    "--max-size big": "a size such as 200k, 25M or 1G, got 'big'",
    "--max-memory=-1": "a size such as 200k, 25M or 1G, got '-1'",
    "--max-memory 0k": "a size such as 200k, 25M or 1G, got '0k'",
    "--smtp smtp": "a port from 0 to 65535, got 'smtp'",
    "--http 65536": "a port from 0 to 65535, got '65536'",
    "--smtps=-1": "a port from 0 to 65535, got '-1'",
    "--domain a..b": "a domain such as a.example, got 'a..b'",
    "--allow-host mail.example:8080":
        "a name such as mail.example, without scheme and port, got 'mail.example:8080'",
    "--domain '[127.0.0.1]'": "a domain such as a.example, got '[127.0.0.1]'",
    "--domain a@b.example": "a domain such as a.example, got 'a@b.example'",
    "--auth secret": "USER:PASSWORD",
    "--auth :secret": "USER:PASSWORD",
    "--rate 0": "a whole number from 1, got '0'",
    "--exit-after 1.5": "a whole number from 1, got '1.5'",
    "--api-key ''": "a value, got ''",
    "--host ''": "a value, got ''",
    "--max-size 25MiB": "a size such as 200k, 25M or 1G, got '25MiB'",
}

# arguments, the last line on standard error
BAD_OPTIONS = {"--max-memory 1k":
        "expected --max-memory to hold a mail of --max-size, got 1000 and 25000000 octets",
    "--timeout 5": "--timeout needs --exit-after",
    "--smtp": "argument --smtp: expected one argument",
    "--max-m 1M": "unrecognized arguments: --max-m 1M; did you mean --max-memory?",
    "--smpt 25": "unrecognized arguments: --smpt 25; did you mean --smtp?",
    "serve": "unrecognized arguments: serve",
    "--webhook ftp://x.example/": "expected --webhook http://host/path, got 'ftp://x.example/'",
    "--tls-key key.pem": "--tls-key needs --tls-cert",
    "--smtps 0":
        "--smtps, --https and --require tls need a certificate: give --tls, or --tls-cert",
    "--https": "--smtps, --https and --require tls need a certificate: give --tls, or --tls-cert",
}


@pytest.mark.parametrize("arguments, text", [
    *((given, f"argument {re.split('[ =]', given)[0]}: expected {text}")
      for given, text in BAD_VALUES.items()), *BAD_OPTIONS.items()])
def test_bad_option_says_what_was_seen_and_what_is_expected(arguments, text, program):
    limited = () if "--timeout" in arguments or "--exit-after" in arguments else BRIEF[4:]
    status, out, err = program(*FREE, *limited, *shlex.split(arguments))
    assert (status, out, err.splitlines()[-1]) == (2, "", "mailtest.py: error: " + text)
    assert "secret" not in err


@pytest.mark.parametrize("text, error", [
    ("no certificate", "expected a PEM certificate and its key in {}: "),
    (None, "cannot read {}: No such file or directory")], ids=str)
def test_file_that_is_no_certificate(text, error, program, tmp_path):
    path = tmp_path / "cert.pem"
    if text:
        path.write_text(text, encoding="ascii")
    status, out, err = program(*BRIEF, "--tls-cert", str(path))
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("mailtest.py: error: " + error.format(path))


# a text, what it means
MEANT = {
    "a_time": {"1": 1, "90s": 90, "10m": 600, "10 min": 600, "1H": 3600, "1d": 86400, "0.5": 0.5},
    "a_size": {"1": 1, "200k": 200_000, "25M": 25_000_000, "25 MB": 25_000_000, "2g": 2 * 10 ** 9},
}


@pytest.mark.parametrize("name", MEANT)
def test_times_and_sizes(name):
    assert {text: getattr(mailtest, name)(text) for text in MEANT[name]} == MEANT[name]


@pytest.mark.parametrize("option", ["smtp", "http"])
def test_port_in_use(option, program):
    with taken_port() as port:
        ports = {"smtp": 0, "http": 0, option: port}
        shown = f"--smtp {ports['smtp']}, --http {ports['http']}"
        assert program("--exit-after", "1", "--timeout", "0.001", *shown.replace(",", "").split()
                       ) == (1, "", f"mailtest: 127.0.0.1:{port} is in use ({shown}); choose "
                                    "another port, or 0 for a free one\n")


def test_address_that_is_not_of_this_machine(program):
    status, out, err = program(*BRIEF, "--host", "192.0.2.1")
    assert (status, out) == (1, "")
    assert err.startswith("mailtest: cannot start with --host 192.0.2.1 --smtp 0, --http 0: ")


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"),
                                   FileExistsError(errno.EEXIST, "File exists")], ids=type)
def test_folder_that_cannot_be_made(error, program, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise error
    monkeypatch.setattr(os, "makedirs", refuse)
    folder = str(tmp_path / "mails")
    status, out, err = program(*BRIEF, "--save", folder)
    assert (status, out, err.splitlines()[-1]) == (
        2, "", f"mailtest.py: error: --save: cannot make the folder {folder!r}: {error.strerror}")


def test_first_line_is_json_with_both_addresses_once_they_answer(program):
    def ready(line):
        seen.append(line)
        ports = [int(address.rpartition(":")[2]) for address in line.values()]
        assert all(map(answers, ports))
    seen = []
    status, out, err = program(*BRIEF, ready=ready)
    line, = seen
    assert out == json.dumps(line) + "\n"
    assert sorted(line) == ["http", "smtp"]
    assert re.fullmatch(r"127\.0\.0\.1:\d+", line["smtp"])
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", line["http"])


def test_exit_after_with_time_out(program):
    status, out, err = program(*BRIEF)
    assert (status, err) == (1, "mailtest: expected 1 message within 0.001 s, got 0\n")
    assert out.count("\n") == 1


def test_exit_after_prints_the_messages_oldest_first(program):
    def ready(line):
        port = int(line["smtp"].rpartition(":")[2])
        with smtplib.SMTP("127.0.0.1", port, "client.example", 10) as client:
            for subject in "ab":
                client.sendmail("s@x.example", ["b@x.example"], _with_subject(subject))
    status, out, err = program(*FREE, "--exit-after", "2", "--timeout", "10", ready=ready)
    assert (status, err) == (0, "")
    mails = json.loads(out.partition("\n")[2])
    assert [mail["subject"] for mail in mails] == ["a", "b"]
    assert [mail["text"]["body"].strip() for mail in mails] == ["Body of a", "Body of b"]


# signal, further arguments, exit status
SIGNALS = {
    "SIGTERM is the normal end": ("SIGTERM", [], 0),
    "SIGINT is the normal end": ("SIGINT", [], 0),
    "SIGTERM before the messages came": ("SIGTERM", ["--exit-after", "1"], 1),
    "SIGINT before the messages came": ("SIGINT", ["--exit-after", "1"], 1),
}


@pytest.mark.parametrize("name, arguments, expected", rows(SIGNALS))
def test_exit_status_after_a_signal(name, arguments, expected, program):
    status, _, err = program(*FREE, *arguments,
                             ready=lambda line: signal.raise_signal(getattr(signal, name)))
    assert (status, err) == (expected, "")


def test_signal_during_the_start(program, monkeypatch):
    def start(server):
        signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(mailtest.Mailtest, "start", start)
    assert program(*FREE) == (0, "", "")


def test_main_leaves_the_handlers_of_signals_as_they_were(program):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    program(*BRIEF)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def _until(connection, octets):
    """What comes until it holds these octets."""
    got = b""
    while octets not in got:
        more = connection.recv(65_536)
        assert more, got
        got += more
    return got


def _end_in_mail_data(process):
    """Sends SIGTERM to the program while a client sends it a mail."""
    host, port = json.loads(process.stdout.readline().decode())["smtp"].split(":")
    with socket.create_connection((host, int(port)), 10) as sender, \
            socket.create_connection((host, int(port)), 10) as idle:
        _until(idle, b"220 ")
        _until(sender, b"220 ")
        sender.sendall(b"EHLO c\r\nMAIL FROM:<>\r\nRCPT TO:<b@x.example>\r\nDATA\r\n")
        _until(sender, b"354 ")
        sender.sendall(b"Subject: half\r\n")
        process.send_signal(signal.SIGTERM)
        _until(idle, b"421 ")            # the stop has begun
        sender.sendall(b"\r\nand half\r\n.\r\n")
        assert re.match(rb"250 2\.0\.0 Ok: queued as ", _until(sender, b"\r\n"))


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send SIGTERM")
def test_sigterm_lets_mail_data_end_first_and_saves_it(tmp_path):
    with subprocess.Popen([sys.executable, "-W", "error", mailtest.__file__, *FREE,
                           "--save", str(tmp_path)],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            _end_in_mail_data(process)
            out, err = process.communicate(timeout=10)
        finally:
            process.kill()               # if it has not ended by itself
    assert (process.returncode, out, err) == (0, b"", b"")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [
        b"Subject: half\r\n\r\nand half\r\n"]


def test_script_ends_with_the_status_of_main():
    for arguments, status, says in (
            (["--version"], 0, f"mailtest {mailtest.__version__}"),
            (["--smtp", "x"], 2, "expected"),
            ([*FREE, "--exit-after", "1", "--timeout", "0.01"], 1, "got 0")):
        done = subprocess.run([sys.executable, "-W", "error", mailtest.__file__, *arguments],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        assert (done.returncode, says in done.stdout.decode()) == (status, True), done.stdout


def test_until_eof_ends_with_standard_input(program, monkeypatch):
    reading, writing = os.pipe()
    with open(reading) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert program(*FREE, "--until-eof", ready=lambda line: os.close(writing))[::2] == (0, "")


def test_log_has_a_line_for_mail_and_for_what_was_refused(running, monkeypatch):
    lines = []
    monkeypatch.setattr(mailtest, "log_info", lambda text, *rest: lines.append(text % rest))
    with mailtest.Mailtest() as server:
        thread = in_thread(mailtest._log_events, server.store)
        inbox = server.acquire("rcpt:550")
        for _ in range(2):
            with contextlib.suppress(smtplib.SMTPException):
                post(server, inbox.address)
        id = inbox.wait().id
        while len(lines) < 2:            # the thread has not seen the mail yet
            pass
    thread.join_value()
    assert lines == [
        "SMTP session of 127.0.0.1 refused: 550 5.0.0 Scripted: fail=rcpt:550",
        f"mail from <s@sender.example> to <{inbox.address}>: 'x', 17 octets, id {id}"]


def test_log_never_waits_for_whoever_reads_it(monkeypatch):
    written, stalled = [], threading.Event()

    class Pipe:
        def write(self, text):
            stalled.wait(10)
            written.append(text)

        def flush(self):
            pass
    monkeypatch.setattr(sys, "stderr", Pipe())
    stream = mailtest._LogStream()
    for number in range(2_000):
        stream.write(f"{number}\n")
    stalled.set()
    stream._thread.join(0)
    stream._lines.put("")
    stream._thread.join(10)
    assert written[0] == "0\n" and 1_000 <= len(written) <= 1_002


def test_ready(program, running):
    assert program("ready", running.url) == (0, "", "")
    assert program("ready", running.url[len("http://"):]) == (0, "", "")
    where = _unreachable()[:-1]
    status, out, err = program("ready", where, "--timeout", "0.01")
    assert (status, out) == (1, "")
    assert err.startswith(f"mailtest: {where} does not answer within 0.01 s: ")
    assert program("ready", "http://" + running.smtp)[2].endswith(
        f"http://{running.smtp} is an SMTP port; expected that of HTTP\n")


def test_start_without_a_thread_is_told_in_a_line(program, monkeypatch):
    def start(server):
        raise RuntimeError("can't start new thread")
    monkeypatch.setattr(mailtest.Mailtest, "start", start)
    assert program(*FREE) == (1, "", "mailtest: cannot start with --host localhost --smtp 0, "
                                     "--http 0: can't start new thread\n")


def test_version(program):
    assert program("--version") == (0, f"mailtest {mailtest.__version__}\n", "")


def help_text(program):
    """--help, as Python 3.10 and later print it."""
    status, out, err = program("--help")
    assert (status, err) == (0, "")
    return out.replace("\noptional arguments:\n", "\noptions:\n")


@pytest.mark.parametrize("columns", ["20", "300"])
def test_help_does_not_depend_on_the_terminal(columns, program, monkeypatch):
    expected = help_text(program)
    monkeypatch.setenv("COLUMNS", columns)
    assert help_text(program) == expected
    assert max(map(len, expected.splitlines())) <= 99


def test_help_tells_the_defaults_that_hold(program):
    text = help_text(program)
    limits = mailtest.Limits()
    assert (limits.ttl, limits.max_size, limits.max_memory) == (600, 25_000_000, 512_000_000)
    for told in ("an inbox lives (10m)", "a message (25M; hosted 200k)", "together (512M)"):
        assert told in text


def test_help_does_not_tell_the_api_key(program, monkeypatch):
    monkeypatch.setenv("MAILTEST_API_KEY", "s3cret")
    assert "s3cret" not in help_text(program)


KEYS = {
    "no key": (None, [], {"secret": 200, "other": 200, "": 200}),
    "the environment's": ("secret", [], {"secret": 200, "other": 401, "": 401}),
    "the option's": (None, ["--api-key", "secret"], {"secret": 200, "other": 401, "": 401}),
    "the option before the environment": (
        "other", ["--api-key", "secret"], {"secret": 200, "other": 401, "": 401}),
}


@pytest.mark.parametrize("variable, arguments, expected", rows(KEYS))
def test_api_key(variable, arguments, expected, program, monkeypatch):
    def ready(line):
        for key in expected:
            basic = base64.b64encode(f"{key}:".encode()).decode()
            seen[key] = fetch(line["http"] + "/api/messages?server=mailtest",
                              **({"Authorization": f"Basic {basic}"} if key else {}))[0]
        seen["acquire"] = fetch(line["http"] + "/v1/acquire")[0]
    seen = {}
    if variable is not None:
        monkeypatch.setenv("MAILTEST_API_KEY", variable)
    assert program(*BRIEF, *arguments, ready=ready)[0] == 1
    assert seen == dict(expected, acquire=200)


# arguments, what /healthz says of it
TOLD_OPTIONS = {
    "defaults": ([], {"domain": "mailtest.example", "ttl": 600.0, "max_size": 25_000_000,
                      "max_memory": 512_000_000, "rate": 0, "hosted": False, "strict": False,
                      "api_key": False}),
    "each its own": (
        ["--domain", "S1.Mail.example", "--ttl", "1h", "--max-size", "1M", "--max-memory", "2M",
         "--rate", "7", "--strict", "--api-key", "k", "--keep", "5"],
        {"domain": "s1.mail.example", "ttl": 3600.0, "max_size": 1_000_000,
         "max_memory": 2_000_000, "rate": 7, "hosted": False, "strict": True, "api_key": True}),
    "hosted": (["--hosted"], {"max_size": 200_000, "rate": 10, "hosted": True, "strict": True}),
    "hosted with limits of its own": (
        ["--hosted", "--max-size", "1M", "--rate", "5"],
        {"max_size": 1_000_000, "rate": 5, "hosted": True, "strict": True}),
}


@pytest.mark.parametrize("arguments, expected", rows(TOLD_OPTIONS))
def test_options_arrive(arguments, expected, program):
    def ready(line):
        state.update(json.loads(fetch(line["http"] + "/healthz")[1].decode("utf-8")))
    state = {}
    program(*BRIEF, *arguments, ready=ready)
    assert {name: state[name] for name in expected} == expected


def test_users_and_what_is_required_of_them(program):
    def ready(line):
        for user, password in ("anna", "1"), ("ben", "2"), ("anna", "2"), ("", ""):
            host, _, port = line["smtp"].partition(":")
            with smtplib.SMTP(host, int(port), "c.example", 10) as client:
                with contextlib.suppress(smtplib.SMTPAuthenticationError):
                    client.ehlo()
                    if user:
                        client.login(user, password)
                codes.append(client.mail("s@x.example")[0])
    codes = []
    program(*BRIEF, "--auth", "anna:1", "--auth", "ben:2", "--require", "auth", ready=ready)
    assert codes == [250, 250, 530, 530]


def test_listening_on_all_addresses_without_a_key_is_warned_of(program):
    warning = ("mailtest: anyone who reaches 0.0.0.0 can read and delete this mail; --api-key "
               "closes it\n")
    assert program(*BRIEF, "--host", "0.0.0.0")[2].startswith(warning)
    assert warning not in program(*BRIEF, "--host", "0.0.0.0", "--api-key", "k")[2]


# -- TLS

@pytest.mark.skipif(not shutil.which("openssl"), reason="there is no openssl program")
def test_tls_makes_a_certificate_that_a_client_can_check(program, tmp_path, monkeypatch):
    def ready(line):
        nonlocal key_mode
        files.extend(sorted(tmp_path.glob("*/*.pem")))
        key_mode = files[1].stat().st_mode
        context = ssl.create_default_context(cafile=str(files[0]))
        host, port = line["smtps"].split(":")
        with smtplib.SMTP_SSL(host, int(port), "client.example", context=context) as client:
            seen.append(client.noop()[0])
        host, port = line["smtp"].split(":")
        with smtplib.SMTP("localhost", int(port), "client.example") as client:
            seen.append(client.starttls(context=context)[0])
        with urllib.request.urlopen(line["http"] + "/cert.pem", context=context) as response:
            seen.append(response.status)
            assert response.read() == files[0].read_bytes()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    seen, files, key_mode = [], [], 0
    status, out, err = program(*BRIEF, "--tls", "--smtps", "0", "--https", ready=ready)
    assert (status, seen) == (1, [250, 220, 200])
    certificate, key = files
    assert os.name == "nt" or key_mode & 0o077 == 0
    assert os.listdir(tmp_path) == []    # no key is left behind
    line = json.loads(out)
    assert (sorted(line), line["http"].partition(":")[0], line["cert"]) == (
        ["cert", "http", "smtp", "smtps"], "https", str(certificate))


def test_tls_without_the_openssl_program(program, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert program(*BRIEF, "--tls") == (
        1, "", "mailtest: cannot start with --host localhost --smtp 0, --http 0: --tls needs the "
               "openssl program to make a certificate, and it is not on the PATH; install it, or "
               "give --tls-cert and --tls-key\n")


def test_folder_of_the_certificate_is_removed_in_the_end(program, tmp_path, monkeypatch):
    seen = []

    def make(folder, names):
        seen.extend(os.listdir(tmp_path))
        raise OSError("no program")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(mailtest, "make_certificate", make)
    assert program(*BRIEF, "--tls")[0] == 1
    assert (len(seen), os.listdir(tmp_path)) == (1, [])


# -- the sendmail stand-in

@pytest.fixture
def standin(running, monkeypatch, capsys):
    """Runs `mailtest.py sendmail`: standin(arguments, octets) -> (exit status, what stands on
    standard error, the messages that came, oldest first)."""
    monkeypatch.setenv("MAILTEST_SMTP", running.smtp)
    monkeypatch.setenv("USER", "tester")

    def run(arguments, octets=b""):
        before = {message.id for message in running.store.messages(server="mailtest")}
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(octets)))
        status = mailtest.main(["sendmail", *arguments])
        out, err = capsys.readouterr()
        assert out == ""
        return status, err, [message for message in running.store.messages(server="mailtest")[::-1]
                             if message.id not in before]
    return run


def completed(octets):
    """The octets with the date and the id that the stand-in makes replaced by words."""
    octets = re.sub(rb"(?m)^Date: [A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d "
                    rb"[+-]\d{4}\r$", b"Date: <date>\r", octets)
    return re.sub(rb"(?m)^Message-ID: <[0-9a-f-]{36}@localhost>\r$", b"Message-ID: <id>\r", octets)


WHOLE = ("From: a@x.example|To: b@x.example|Date: Tue, 6 Aug 2019 17:44:07 +0000|"
         "Message-ID: <1@x.example>")


def spelled(text, end="\n"):
    """The octets that a row means: "|" ends a line, WHOLE and DATED stand for header fields."""
    text = text.replace("WHOLE", WHOLE).replace("DATED", "Date: <date>|Message-ID: <id>")
    return text.replace("|", end).encode("utf-8", "surrogateescape")


# command line, standard input, reverse-path and forward-paths, mail data
FLAGS = {
    "PHP: -t -i": (
        "-t -i", "To: Bob <b@x.example>, c@x.example|Subject: Hi|X-PHP: 1||Hello|",
        "tester@localhost b@x.example c@x.example",
        "To: Bob <b@x.example>, c@x.example|Subject: Hi|X-PHP: 1|From: "
        "tester@localhost|DATED||Hello|"),
    "cron: -FCronDaemon -i -B8BITMIME -oem root": (
        "-FCronDaemon -i -B8BITMIME -oem root",
        "From: root (Cron Daemon)|To: root|Subject: Cron <root@host> ls||out|",
        "root@localhost root@localhost",
        "From: root@localhost (Cron Daemon)|To: root@localhost|Subject: Cron <root@host> "
        "ls|DATED||out|"),
    "cron with MAILTO=ops@x.example": (
        "-FCronDaemon -i -B8BITMIME -oem ops@x.example", "Subject: Cron ls||out|",
        "tester@localhost ops@x.example",
        "Subject: Cron ls|From: CronDaemon <tester@localhost>|To: ops@x.example|DATED||out|"),
    "mailx: -i -f a@b c@d": (
        "-i -f a@b.example c@d.example", "To: c@d.example|Subject: Hi||Hello|",
        "a@b.example c@d.example", "To: c@d.example|Subject: Hi|From: a@b.example|DATED||Hello|"),
    "seed: -t address -s subject -m text": (
        "-t b@x.example -s 'Hi there' -m 'Some text'", "", "tester@localhost b@x.example",
        "Subject: Hi there|From: tester@localhost|To: b@x.example|DATED||Some text|"),
    "mutt: -oem -oi -f a@b -- c@d": (
        "-oem -oi -f a@b.example -- c@d.example", "WHOLE||x|.|y|", "a@b.example c@d.example",
        "WHOLE||x|.|y|"),
    "MIME::Lite: -t -oi -oem": (
        "-t -oi -oem", "WHOLE||x|.|y|", "a@x.example b@x.example", "WHOLE||x|.|y|"),
    "two letters in one word: -ti": (
        "-ti", "WHOLE||x|.|y|", "a@x.example b@x.example", "WHOLE||x|.|y|"),
    "two letters in one word: -it": (
        "-it", "WHOLE||x|.|y|", "a@x.example b@x.example", "WHOLE||x|.|y|"),
    "a complete mail is left as it is": (
        "b@x.example", "WHOLE||x|", "a@x.example b@x.example", "WHOLE||x|"),
    "CRLF stays, a lone LF becomes it": (
        "-t", "WHOLE\r|\r|one\r|two|three\r|", "a@x.example b@x.example", "WHOLE||one|two|three|"),
    "a last line without end gets one": (
        "-t", "WHOLE||end", "a@x.example b@x.example", "WHOLE||end|"),
    "a lone dot ends the mail": (
        "-t", "WHOLE||x|.|y|", "a@x.example b@x.example", "WHOLE||x|"),
    "with -i a lone dot is text": (
        "-t -i", "WHOLE||.|..|.x|", "a@x.example b@x.example", "WHOLE||.|..|.x|"),
    "8-bit text passes": (
        "-t -i", "WHOLE|Subject: Grüße||Straße ÿ|\udcff\udcfe|", "a@x.example b@x.example",
        "WHOLE|Subject: Grüße||Straße ÿ|\udcff\udcfe|"),
    "Bcc gets the mail and is removed, folded or not": (
        "-t", "WHOLE|BCC: c@x.example,| d@x.example|Bcc :|\te@x.example|X-Bcc: f||x|",
        "a@x.example b@x.example c@x.example d@x.example e@x.example", "WHOLE|X-Bcc: f||x|"),
    "Bcc as the last line": (
        "-t", "WHOLE|Bcc: c@x.example", "a@x.example b@x.example c@x.example", "WHOLE||"),
    "Bcc without -t is removed too": (
        "b@x.example", "WHOLE|Bcc: c@x.example||x|", "a@x.example b@x.example", "WHOLE||x|"),
    "Bcc in the body is text": (
        "-t", "WHOLE||Bcc: c@x.example|", "a@x.example b@x.example", "WHOLE||Bcc: c@x.example|"),
    "recipients of all kinds, each once": (
        "-t d@x.example b@x.example", "WHOLE|Cc: c@x.example||x|",
        "a@x.example d@x.example b@x.example c@x.example", "WHOLE|Cc: c@x.example||x|"),
    "-f before From": (
        "-fbounce@x.example -t", "WHOLE||x|", "bounce@x.example b@x.example", "WHOLE||x|"),
    "-r is -f": (
        "-r bounce@x.example -t", "WHOLE||x|", "bounce@x.example b@x.example", "WHOLE||x|"),
    "-f <> is the null reverse-path": (
        "-f '<>' -t", "WHOLE||x|", "<> b@x.example", "WHOLE||x|"),
    "a full name in another script": (
        "-F 'Zoë' -f z@x.example b@x.example", "|x|", "z@x.example b@x.example",
        "From: =?utf-8?q?Zo=C3=AB?= <z@x.example>|To: b@x.example|DATED||x|"),
    "text without a header section": (
        "b@x.example", "Hello, world|", "tester@localhost b@x.example",
        "From: tester@localhost|To: b@x.example|DATED||Hello, world|"),
    "nothing on standard input": (
        "b@x.example", "", "tester@localhost b@x.example",
        "From: tester@localhost|To: b@x.example|DATED||"),
    "an address of SMTPUTF8": (
        "'büro@x.example'", "WHOLE||x|", "a@x.example büro@x.example", "WHOLE||x|"),
    "two addresses in one argument": (
        "'b@x.example, c@x.example'", "WHOLE||x|", "a@x.example b@x.example c@x.example",
        "WHOLE||x|"),
    "-f with a full name": (
        "-f 'Bob <bob@x.example>' b@x.example", "Subject: x||x|", "bob@x.example b@x.example",
        "Subject: x|From: bob@x.example|To: b@x.example|DATED||x|"),
    "the separator line of an mbox is dropped": (
        "-t", "From root Mon Nov 21 06:00:00 2026|WHOLE||x|", "a@x.example b@x.example",
        "WHOLE||x|"),
    "a subject in another script": (
        "-t b@x.example -s 'Grüße' -m 'Straße'", "", "tester@localhost b@x.example",
        "Subject: =?utf-8?b?R3LDvMOfZQ==?=|From: tester@localhost|To: b@x.example|DATED||Straße|"),
    "flags that change nothing here": (
        "-v -n -U -bm -odb -em -Oa=b -N never -R hdrs -t", "WHOLE||x|", "a@x.example b@x.example",
        "WHOLE||x|"),
}


@pytest.mark.parametrize("arguments, given, paths, expected", rows(FLAGS))
def test_sendmail_flags(arguments, given, paths, expected, standin):
    status, err, messages = standin(shlex.split(arguments), spelled(given))
    assert (status, err) == (0, "")
    message, = messages
    envelope = message.envelope
    assert [envelope.reverse_path or "<>", *envelope.forward_paths] == paths.split(" ")
    assert completed(message.octets) == spelled(expected, "\r\n")


# command line, what stands on standard error
USED_WRONGLY = {
    "": "expected a recipient: as an argument, or with -t in To, Cc or Bcc",
    "-t": "expected a recipient: as an argument, or with -t in To, Cc or Bcc",
    "b@x.example -f": "argument -f/-r: expected one argument",
    "-Z b@x.example": "unrecognized arguments: -Z",
    "-S localhost b@x.example": "expected HOST:PORT in -S or MAILTEST_SMTP, got 'localhost'",
    "-S localhost:smtp b@x.example":
        "expected HOST:PORT in -S or MAILTEST_SMTP, got 'localhost:smtp'",
    "-S :2525 b@x.example": "expected HOST:PORT in -S or MAILTEST_SMTP, got ':2525'",
}


@pytest.mark.parametrize("arguments, text", USED_WRONGLY.items())
def test_sendmail_used_wrongly_is_ex_usage(arguments, text, standin):
    assert standin(shlex.split(arguments), b"Subject: x\n\nx\n") == (
        64, f"sendmail: {text}\n", [])


INJECTIONS = {
    "in the sender": ["-f", "a@x.example\nX-Evil: 1", "b@x.example"],
    "in the full name": ["-F", "Bob\nX-Evil: 1", "b@x.example"],
    "in a recipient": ["b@x.example\nX-Evil: 1"],
    "in a recipient after --": ["--", "b@x.example\r\nX-Evil: 1"],
    "in the subject": ["-s", "Hi\nX-Evil: 1", "-m", "text", "b@x.example"],
    **{f"in the subject with {break_!a}": ["-s", f"Hi{break_}X-Evil: 1", "-m", "x", "b@x.example"]
       for break_ in "\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\0"},
}


@pytest.mark.parametrize("arguments", rows(INJECTIONS))
def test_sendmail_arguments_inject_no_header_field(arguments, standin):
    status, err, messages = standin(arguments, b"Subject: Hi\n\nx\n")
    assert (status, messages, "Traceback" in err) in [(64, [], False), (0, messages, False)]
    assert not any(b"\nX-Evil:" in message.octets for message in messages)


def test_sendmail_qualifies_names_without_a_domain(standin):
    mail = b'To: root, bob (the builder)\nCc: "A, b" <c@x.example>\nFrom: me\n\nx\n'
    status, _, messages = standin(["-t"], mail)
    assert messages[0].octets.startswith(
        b'To: root@localhost, bob@localhost (the builder)\r\nCc: "A, b" <c@x.example>\r\n'
        b"From: me@localhost\r\n")
    assert messages[0].envelope.forward_paths == ("root@localhost", "bob@localhost", "c@x.example")


def test_sendmail_help(program):
    assert program("sendmail", "--help")[1].startswith("usage: sendmail [-h] [-t] [-i] ")


def test_program_that_is_called_sendmail_is_it(running, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/usr/sbin/sendmail", "-S", "nowhere", "b@x.example"])
    assert mailtest.main() == 64


def test_sendmail_tells_of_an_argument_that_is_no_address(standin):
    status, err, messages = standin(["b@x.example", "not an address"], spelled("WHOLE||x|"))
    assert status in (64, 67)
    assert "'not an address'" in err


# failures of the recipient's inbox, exit status by sysexits.h, text, how many messages came
REFUSED = {
    "EX_NOUSER: the recipient is refused for good": (
        ["rcpt:550"], 67, "<inbox>: 550 5.0.0 Scripted: fail=rcpt:550", 0),
    "EX_TEMPFAIL: the recipient is refused for now": (
        ["rcpt:451"], 75, "<inbox>: 451 4.0.0 Scripted: fail=rcpt:451", 0),
    "EX_UNAVAILABLE: the mail data are refused for good": (
        ["data:554"], 69, "<smtp> answered 554 5.0.0 Scripted: fail=data:554", 0),
    "EX_TEMPFAIL: the mail data are refused for now": (
        ["data:452"], 75, "<smtp> answered 452 4.0.0 Scripted: fail=data:452", 0),
    "EX_TEMPFAIL: the connection is lost": (
        ["data:drop"], 75, "<smtp> does not take mail: Connection unexpectedly closed; is "
                           "mailtest running there?", 0),
}


@pytest.mark.parametrize("failures, expected, text, count", rows(REFUSED))
def test_sendmail_exit_status_when_refused(failures, expected, text, count, standin, running):
    address = running.acquire(*failures).address
    status, err, messages = standin([address], spelled("WHOLE||x|"))
    text = text.replace("<inbox>", address).replace("<smtp>", running.smtp)
    assert (status, err, len(messages)) == (expected, f"sendmail: {text}\n", count)


@pytest.mark.parametrize("code, expected", [("550", 67), ("451", 75)])
def test_sendmail_exit_status_when_one_of_two_is_refused(code, expected, standin, running):
    address = running.acquire(f"rcpt:{code}").address
    status, err, messages = standin([address, "b@x.example"], spelled("WHOLE||x|"))
    assert (status, err, len(messages)) == (
        expected, f"sendmail: {address}: {code} {code[0]}.0.0 Scripted: fail=rcpt:{code}\n", 1)
    assert messages[0].envelope.forward_paths == ("b@x.example",)


def test_sendmail_closes_its_connection_when_refused(standin, running, monkeypatch):
    class Noted(smtplib.SMTP):
        def __init__(self, *arguments, **options):
            clients.append(self)
            super().__init__(*arguments, **options)
    clients = []
    monkeypatch.setattr(smtplib, "SMTP", Noted)
    for failure in ("mail:550", "rcpt:550", "data:550"):
        address = running.acquire(failure).address
        assert standin(["-f", address, address], spelled("WHOLE||x|"))[0] != 0
    assert [client.sock for client in clients] == [None, None, None]


def test_sendmail_exit_status_when_nobody_listens(standin):
    where = _unreachable()[len("http://"):-1]
    status, err, messages = standin(["-S", where, "b@x.example"], spelled("WHOLE||x|"))
    assert (status, messages) == (75, [])
    assert re.fullmatch(rf"sendmail: {where} does not take mail: .+; is mailtest running "
                        r"there\?\n", err)


def test_sendmail_option_comes_before_the_environment(standin, running, monkeypatch):
    monkeypatch.setenv("MAILTEST_SMTP", _unreachable()[len("http://"):-1])
    assert standin(["-S", running.smtp, "b@x.example"], spelled("WHOLE||x|"))[0] == 0


def test_sendmail_counts_a_mail_as_taken_whatever_quit_says(monkeypatch, standin):
    said = []

    def broken(session, argument):
        said.append("QUIT")
        raise mailtest.Refuse(421, "4.3.2", "Shutting down")
    mailtest._KNOWN_LINES.clear()
    monkeypatch.setitem(mailtest.COMMANDS, b"QUIT",
                        mailtest.COMMANDS[b"QUIT"]._replace(run=broken))
    status, err, messages = standin(["b@x.example"], spelled("WHOLE||x|"))
    assert (status, err, len(messages), said) == (0, "", 1, ["QUIT"])


# ---- Web page --------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ("--headless", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check",
         "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--disable-extensions",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-features=IsolateSandboxedIframes")         # so that frames are seen too

KEY_CODES = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38,
             "ArrowRight": 39, "ArrowDown": 40, "Delete": 46}


class Browser:
    """Chromium over --remote-debugging-pipe: it reads descriptor 3 and writes 4, JSON each ended
    by a NUL octet.  Calls are DevTools methods: `browser("Page.reload", ignoreCache=True)`."""

    def __init__(self, program):
        self.folder = tempfile.mkdtemp(prefix="browser-")
        child_in, self._out = os.pipe()
        self._in, child_out = os.pipe()
        flags = QUIET + ("--no-sandbox",) * (os.geteuid() == 0)

        def descriptors():               # ours may be 3 or 4 already: by way of high numbers
            os.dup2(child_in, 103)
            os.dup2(child_out, 104)
            os.dup2(103, 3)
            os.dup2(104, 4)
            os.closerange(5, 110)
        self.process = subprocess.Popen(
            (program,) + flags + ("--user-data-dir=" + self.folder, "about:blank"),
            preexec_fn=descriptors, close_fds=False, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(child_in)
        os.close(child_out)
        self._buffer, self._number, self._session, self.events = b"", 0, None, []
        self.login = {"response": "CancelAuth"}
        self.login = {"response": "CancelAuth"}
        self.login = {"response": "CancelAuth"}
        self.login = {"response": "CancelAuth"}
        self.login = {"response": "CancelAuth"}
        self.login = {"response": "CancelAuth"}
        self.login = {"response": "CancelAuth"}
        self.login = {"response": "CancelAuth"}
        self.login = {"response": "CancelAuth"}
        self.login = {"response": "CancelAuth"}
        self.login = {"response": "CancelAuth"}
        self.login = {"response": "CancelAuth"}
        self.login = {"response": "CancelAuth"}
        self.login = {"response": "CancelAuth"}
        self.login = {"response": "CancelAuth"}
        self.login = {"response": "CancelAuth"}
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(domain + ".enable")

    def __call__(self, method, **parameters):
        number = self._send(method, parameters)
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            if "method" in answer:
                self.events.append(answer)
                self._react(answer["method"], answer["params"])

    def _send(self, method, parameters):
        self._number += 1
        call = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            call["sessionId"] = self._session
        os.write(self._out, json.dumps(call).encode() + b"\0")
        return self._number

    def _react(self, event, values):
        """Says yes to dialogs, and to a login what the test wants."""
        if event == "Page.javascriptDialogOpening":
            self._send("Page.handleJavaScriptDialog", {"accept": True})
        elif event == "Fetch.requestPaused":
            self._send("Fetch.continueRequest", {"requestId": values["requestId"]})
        elif event == "Fetch.authRequired":
            self._send("Fetch.continueWithAuth", {"requestId": values["requestId"],
                                                  "authChallengeResponse": self.login})

    def _read(self):
        while b"\0" not in self._buffer:
            assert select.select([self._in], [], [], 20)[0], "the browser does not answer"
            octets = os.read(self._in, 1 << 16)
            assert octets, "the browser has ended"
            self._buffer += octets
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message.decode())

    def js(self, expression):
        """The value of an expression in the page; promises are awaited."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True,
                      awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression, timeout=10):
        """The value of an expression as soon as it is true."""
        return self.js("""new Promise((done, failed) => {
            const until = performance.now() + %d, look = () => {
                let value; try { value = (%s) } catch (error) { value = null }
                if (value) done(value);
                else if (performance.now() > until) failed(Error(%s));
                else setTimeout(look, 10); }; look() })""" % (
            timeout * 1000, expression, json.dumps("never true: " + expression)))

    def goto(self, url):
        """Opens a page of its own and waits until its script has run."""
        self("Page.navigate", url="about:blank")
        self.events.clear()
        self("Page.navigate", url=url)
        self.wait("location.href.startsWith(%s) && document.readyState === 'complete'"
                  % json.dumps(url))

    def click(self, selector):
        """A real click in the middle of the first such element that is to be seen."""
        x, y = self.wait("""(() => { const node = [...document.querySelectorAll(%s)].find(
            (each) => each.checkVisibility()); node.scrollIntoView({block: "nearest"});
            const box = node.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2] })()""" % json.dumps(selector))
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, *keys):
        """Keys by their names: "j", "Enter", "ArrowDown"."""
        for key in keys:
            event = {"key": key, "windowsVirtualKeyCode": KEY_CODES.get(key, ord(key[0].upper()))}
            text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
            self("Input.dispatchKeyEvent", type="keyDown", **event, **text)
            self("Input.dispatchKeyEvent", type="keyUp", **event)

    def size(self, width, height, dark=False):
        self("Emulation.setDeviceMetricsOverride", width=width, height=height,
             deviceScaleFactor=1, mobile=width < 700)
        self("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def requests(self):
        """The URLs that were asked for since the page was opened; a policy may have refused some
        before they left."""
        refused = {event["params"]["requestId"] for event in self.events
                   if event.get("method") == "Network.loadingFailed"
                   and event["params"].get("blockedReason") == "csp"}
        return [event["params"]["request"]["url"] for event in self.events
                if event.get("method") == "Network.requestWillBeSent"
                and event["params"]["requestId"] not in refused]

    def complaints(self):
        """What the browser and the page's script complained of since the page was opened, but for
        what a mail's frame was refused."""
        return [event["params"] for event in self.events if event.get("method") in (
            "Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
            and "/preview?" not in event["params"].get("entry", {}).get("url", "")]

    def until(self, condition, timeout=10):
        """Waits until a condition on this side holds; meanwhile events come in."""
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, "never true"
            self.js("new Promise((done) => setTimeout(done, 10))")

    def close(self):
        self._session = None
        try:
            self("Browser.close")
        except (AssertionError, OSError):
            self.process.kill()
        self.process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def chromium():
    """One browser for all tests of the page."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None or sys.platform == "win32":
        if os.environ.get("MAILTEST_REQUIRE_BROWSER") == "1":
            pytest.fail("MAILTEST_REQUIRE_BROWSER=1, but there is no Chromium")
        pytest.skip("no Chromium found")
    browser = Browser(program)
    browser("Browser.grantPermissions", permissions=["clipboardReadWrite",
                                                     "clipboardSanitizedWrite"])
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def catcher():
    """One catcher, emptied for each test that opens its page."""
    with mailtest.Mailtest() as server:
        yield server


@pytest.fixture
def page(chromium, catcher):
    """The page of an empty catcher in a fresh browser, and afterwards: no complaint of the
    browser (such as a breach of the policy), and nothing asked of anyone else."""
    catcher.store.empty("mailtest")
    for view in catcher.store.inboxes():
        catcher.store.drop_inbox(view.address)
    chromium.size(1400, 900)
    chromium("Storage.clearDataForOrigin", origin=catcher.url, storageTypes="local_storage")
    chromium.goto(catcher.url + "/")
    chromium.wait(LIVE)
    yield chromium
    assert chromium.complaints() == []
    assert [url for url in chromium.requests() if not url.startswith((catcher.url, "data:"))] == []


LIVE = "document.querySelector('[data-testid=status]').textContent === 'live'"
ROWS = ("[...document.querySelectorAll('[data-testid=message-row]')].filter((row) => !row.hidden)")
SUBJECTS = ROWS + ".map((row) => row.querySelector('.subject').textContent)"
TITLE = "(document.querySelector('#message h2') || {}).textContent"
ADDRESS = "document.querySelector('[data-testid=address]').textContent"
NOTHING = "document.getElementById('nothing').textContent"
PANEL = "document.getElementById('panel').textContent"
FOCUS = "(document.activeElement.id || document.activeElement.localName)"


def a_mail(subject="Hello", text="It works", to="jane@example.com", html="", sender="a@b.example"):
    mail = email.message.EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = sender, to, subject
    mail["Date"], mail["Message-ID"] = "Fri, 21 Nov 2025 10:00:00 +0000", "<1@b.example>"
    mail.set_content(text)
    if html:
        mail.add_alternative(html, subtype="html")
    return mail


def send(server, *mails):
    with smtplib.SMTP("127.0.0.1", server.smtp_port, "client.example") as client:
        for mail in mails:
            client.send_message(mail)


def deliver(server, count, *recipients):
    """Puts mails into the store, without SMTP's time; the ids."""
    octets, ids = a_mail("Mail").as_bytes(), [mailtest.new_id() for _ in range(count)]
    for number, id in enumerate(ids):
        server.store.deliver(mailtest.Message(id, octets, mailtest.Envelope(
            "a@b.example", recipients or (f"user{number}@example.com",))))
    return ids


def page_rows(browser, count):
    """The texts of the rows, once there are so many."""
    return browser.wait(f"{ROWS}.length === {count} && {ROWS}.map((row) => row.textContent)")


def opened(browser, subject):
    """Selects the newest message by key, and waits until it is shown."""
    page_rows(browser, browser.wait(ROWS + ".length"))
    browser.press("j")
    browser.wait(f"{TITLE} === {json.dumps(subject)}")


def test_page_names_every_word_of_the_search():
    assert [word for word in mailtest.WORDS if f"{word}:" not in mailtest.PAGE_JS] == []


def test_page_shows_how_to_send_mail_while_there_is_none(page, catcher):
    manual = page.wait("document.querySelector('[data-testid=empty]').innerText")
    assert str(catcher.smtp_port) in manual and catcher.url + "/v1/acquire" in manual
    page.click("[data-testid=sample]")
    (row,) = page_rows(page, 1)
    assert "482913" in row
    page.wait("document.title === '(1) mailtest'")


def test_page_acquires_an_address_and_its_mail_appears_by_itself(page, catcher):
    page.click("[data-testid=acquire]")
    address = page.wait(f"{ADDRESS}.includes('@') && {ADDRESS}")
    page.wait(f"navigator.clipboard.readText().then((text) => text === '{address}')")
    page.wait("document.querySelector('[data-testid=empty]').innerText.includes("
              f"'\"me@example.com\", \"{address}\"')")      # how to send to it
    send(catcher, a_mail("Not for it"), a_mail("Confirm: code 482 913", "code 482 913", address))
    (row,) = page_rows(page, 1)                           # the acquired inbox is selected
    assert "Confirm" in row and "482913" in row and "a@b.example" in row
    page.click("[data-testid=inbox]")                # all mail
    page_rows(page, 2)
    send(catcher, a_mail(to="adam@example.com"))
    page.wait("[...document.querySelectorAll('#others .inbox')].map(({title}) => title).join() ==="
              " 'adam@example.com,jane@example.com'")     # late recipients first
    assert len([url for url in page.requests() if url == catcher.url + "/"]) == 1


TABS = {  # data-testid: what its panel shows
    "tab-preview": "320",
    "tab-text": "Text 482913",
    "tab-html": "<a href=",
    "tab-links": "https://acme.example/verify?a=1&b=2",
    "tab-headers": "Fri, 21 Nov 2025 10:00:00 +0000",
    "tab-source": "Content-Type: multipart/",
    "tab-smtp": "C: ehlo client.example",
    "tab-json": '"rcptTo" timeout=30',
}


def test_page_shows_a_message_in_eight_tabs(page, catcher):
    send(catcher, a_mail("Tabs", "Text 482913", html='<img src="https://elsewhere.example/x.png">'
                         '<a href="https://acme.example/verify?a=1&amp;b=2">Verify</a>'))
    page_rows(page, 1)
    page.click("[data-testid=message-row]")
    assert page.wait(f"{TITLE} === 'Tabs'")
    for tab, expected in TABS.items():
        page.click(f"[data-testid={tab}]")
        for part in expected.split():
            page.wait(f"{PANEL}.includes({json.dumps(part)})")
        assert page.js(f"document.querySelector('[data-testid={tab}] input').checked")
    page.press("1")
    page.click("#scheme")                            # the mail itself, light or dark
    page.wait("document.querySelector('iframe').style.colorScheme === 'dark'")


def test_page_greys_empty_tabs_and_says_why(page, catcher):
    send(catcher, a_mail("Plain"))
    opened(page, "Plain")
    tab = "document.querySelector('[data-testid=tab-preview]')"
    assert page.js(f"[{tab}.firstChild.disabled, {tab}.title]") == [
        True, "This message has no HTML part"]
    page.press("1")
    page.wait("document.getElementById('toast').innerText.includes('no HTML part')")
    assert page.js("document.getElementById('panel').dataset.tab") == "text"


def test_page_blocks_remote_content_until_asked_for(page, catcher):
    elsewhere = socket.socket()
    elsewhere.bind(("127.0.0.1", 0))
    elsewhere.listen()
    elsewhere.settimeout(10)
    url = "http://127.0.0.1:%d/pixel.gif" % elsewhere.getsockname()[1]
    send(catcher, a_mail("News", html=f'<img src="{url}"><style>@import "{url}"</style>'
                                      f'<link rel="preload" as="image" href="{url}">'))
    opened(page, "News")
    frame = "document.querySelector('[data-testid=preview-frame]')"
    assert page.wait(f"{frame}.sandbox.value") == "allow-popups allow-popups-to-escape-sandbox"
    page.wait("new Promise((done) => setTimeout(done, 100, true))")    # for what should not come
    assert select.select([elsewhere], [], [], 0)[0] == []
    page.click("[data-testid=load-remote]")
    elsewhere.accept()[0].close()                    # now it comes
    elsewhere.close()
    page.events.clear()


def test_page_copies_code_and_links(page, catcher):
    send(catcher, a_mail("Your code", "Your code is 482913", html=(
        'Your code is 482913 <a href="#top">Top</a><a href="https://evil.example/v?t=1">'
        'https://bank.example</a> <a href="https://acme.example/">acme.example</a>')))
    opened(page, "Your code")
    page.click("[data-testid=chip-code]")
    page.until(lambda: page.js("navigator.clipboard.readText()") == "482913")
    page.click("[data-testid=chip-link]")
    page.until(lambda: page.js("navigator.clipboard.readText()") == "https://evil.example/v?t=1")
    page.press("y")
    page.until(lambda: page.js("navigator.clipboard.readText()") == "482913")
    assert page.js("[...document.querySelectorAll('[data-testid=chip-link]')].map((chip) => "
                   "chip.textContent)") == ["https://bank.exampleevil.example", "acme.example"]


TYPED = {  # what is typed: subjects that remain
    "invoice": ["Invoice"],
    "to:bob": ["Hello"],
    "from:": ["Invoice", "Hello"],                   # not yet finished
    '"it works" -invoice': ["Hello"],
    "nothing like it": [],
}


def typed(page, query):
    page.js("document.querySelector('[data-testid=search]').value = ''")
    page.press("Escape", "/")
    page("Input.insertText", text=query)


def test_page_searches_as_it_is_typed(page, catcher):
    send(catcher, a_mail("Hello", to="bob@example.com"), a_mail("Invoice"))
    page_rows(page, 2)
    hits = "document.querySelector('[data-testid=hits]').textContent"
    for query, subjects in TYPED.items():
        typed(page, query)
        page.wait(f"JSON.stringify({SUBJECTS}) === "
                  f"{json.dumps(json.dumps(subjects, separators=(',', ':')))}")
        count = f"{len(subjects)} hit{'s' * (len(subjects) != 1)}"
        assert page.wait(f"{hits} === '{count}'")
    assert "Nothing matches" in page.js(NOTHING)
    typed(page, "form:bob")                          # there is no such word
    page.wait(f"{NOTHING}.includes('form') && {NOTHING}.includes('from')")
    page.press("Escape")
    page_rows(page, 2)
    page.events.clear()                              # the browser complains of the 400


def test_page_deletes_with_undo(page, catcher):
    send(catcher, a_mail("First"), a_mail("Second"))
    opened(page, "Second")
    page.click("[data-testid=delete]")
    page_rows(page, 1)
    page.wait(f"{TITLE} === 'First'")
    page.click("[data-testid=undo]")
    page_rows(page, 2)
    page.wait(f"{TITLE} === 'Second'")
    assert len(catcher.messages) == 2
    page.press("Delete")
    page_rows(page, 1)
    page.goto(catcher.url + "/?again")               # who leaves does not undo
    page.until(lambda: [mail.subject for mail in catcher.messages] == ["First"])


def menu(page, action):
    page.click("[data-testid=menu] summary")
    page.js("document.querySelectorAll('[data-testid=menu] button').forEach((button) => {"
            f"button.id = button.textContent === '{action}' ? 'action' : ''}})")
    page.click("#action")
    return [event["params"]["message"] for event in page.events
            if event.get("method") == "Page.javascriptDialogOpening"][-1]


def test_page_empties_an_inbox_wholly_and_nobody_else(page, catcher):
    inbox = catcher.acquire()
    deliver(catcher, 1_100, inbox.address, "other@example.com")
    page.click(f"[data-testid=inbox][title='{inbox.address}']")
    page_rows(page, 100)
    assert inbox.address in menu(page, "Empty")      # it asks
    page_rows(page, 0)
    assert catcher.store.inbox(inbox.address).count == 0
    assert catcher.store.inbox("other@example.com").count == 1_100
    menu(page, "End")
    page_rows(page, 100)                             # back to all mail
    assert inbox.address not in [view.address for view in catcher.store.inboxes()]


def test_page_keeps_what_is_in_sight_in_the_url(page, catcher):
    send(catcher, a_mail("Else"), a_mail("One", to="bob@example.com", html="<p>x"),
         a_mail("Two", to="bob@example.com", html="<p>x"))
    page_rows(page, 3)
    page.click("[data-testid=inbox][title='bob@example.com']")
    page_rows(page, 2)
    typed(page, "works")
    page.click("[data-testid=message-row]")
    page.wait(f"{TITLE} === 'Two'")
    page.click("#panel label:has([value='375'])")
    page.press("2")
    page.goto(page.js("location.href"))              # as a link, or a reload
    page.wait(f"{TITLE} === 'Two' && document.getElementById('panel').dataset.tab === 'text'")
    page_rows(page, 2)
    page.press("1")
    page.wait("document.querySelector('iframe').style.width === '375px'")
    assert page.js("document.getElementById('search').value") == "works"
    page.press("j")
    page.wait(f"{TITLE} === 'One'")
    page.click("h1 a")
    page_rows(page, 3)
    page.wait("document.querySelector('[data-testid=empty]')")         # the manual, by mouse
    page.js("history.back()")
    page.wait(f"{TITLE} === 'One'")
    page_rows(page, 2)
    assert page.js(f"{ROWS}[0].href.includes('?q=works&inbox=bob') && {ROWS}[0].localName") == "a"
    page.goto(f"{catcher.url}/?message={deliver(catcher, 60)[5]}")
    page.wait("document.querySelector('.row[aria-selected=true]').getBoundingClientRect().bottom"
              " <= innerHeight")                     # its row comes into sight


def test_page_shows_a_long_head_from_its_start_and_prints_the_mail_alone(page, catcher):
    mail = a_mail("Long", "Hello " * 2_000, ", ".join(f"p{n}@x.example" for n in range(24)))
    mail["Reply-To"], mail["List-Unsubscribe"] = "answer@b.example", "<https://b.example/u>"
    for number in range(15):
        mail.add_attachment(b"x", "text", "csv", filename=f"{number}.csv")
    with smtplib.SMTP("127.0.0.1", catcher.smtp_port) as client:
        client.send_message(mail, to_addrs=[f"q{n}@x.example" for n in range(24)])
    opened(page, "Long")
    assert page.js("document.getElementById('message').scrollTop") == 0
    head = page.js("document.querySelector('.head').innerText")
    for part in ("and 20 more", "and 21 more", "answer@b.example", "https://b.example/u",
                 "Date field: Fri, 21 Nov 2025", "15 attachments"):
        assert part in head
    page.click(".head > details summary")
    assert page.js("""[...document.querySelectorAll('[data-testid=attachment]')].every((file) =>
        file.offsetTop + file.offsetHeight <= document.querySelector('.tabs').offsetTop)""")
    page("Emulation.setEmulatedMedia", media="print")
    assert page.js("[...document.querySelectorAll('body > *, main > *')].filter("
                   "(node) => node.checkVisibility()).map((node) => node.id)") == ["message"]
    page("Emulation.setEmulatedMedia", media="")


def test_page_is_usable_by_keyboard_alone(page, catcher):
    send(catcher, *(a_mail(f"Mail {number}", to=f"{number}@x.example", html="<p>x")
                    for number in range(30)))
    page_rows(page, 30)
    stops = []
    while "rows" not in stops:                       # few stops to the list, visible ones
        page.press("Tab")
        stops.append(page.js(FOCUS))
        assert page.js("getComputedStyle(document.activeElement.closest('label') || "
                       "document.activeElement).outlineStyle") != "none"
    assert len(stops) <= 12 and stops[0] == "skip" and {"search", "acquire", "help"} < set(stops)
    page.press("j", "j", "ArrowDown", "k")
    page.wait(f"{TITLE} === 'Mail 28'")
    assert page.js(FOCUS) == "rows"
    assert page.js("document.getElementById(document.activeElement.getAttribute("
                   "'aria-activedescendant')).textContent.includes('Mail 28')")
    page.press("Enter")
    assert page.js(FOCUS) == "panel"
    page.press("5")
    page.wait(f"{PANEL}.includes('Message-ID')")
    page.js("document.querySelector('[name=tab]:checked').focus()")
    page.press("ArrowRight")
    page.wait("document.getElementById('panel').dataset.tab === 'source'")
    page.press("Escape")
    assert page.js(FOCUS) == "rows"
    page.press("Delete", "u", "/")
    assert page.js(FOCUS) == "search"
    page.press("Escape", "?")
    page.wait("document.querySelector('[data-testid=empty]').innerText.includes('Keyboard')")
    page.press("Escape")
    page_rows(page, 30)


def test_page_keeps_the_selection_and_tells_a_screen_reader_what_is_unread(page, catcher):
    send(catcher, a_mail("Old"))
    opened(page, "Old")
    send(catcher, a_mail("New"))
    page.wait(f"{SUBJECTS}.join() === 'New,Old'")
    assert page.js(f"{ROWS}.map((row) => row.ariaSelected)") == ["false", "true"]
    assert page.js(TITLE) == "Old"
    page.wait("document.querySelector('[role=status]#hits').textContent === '2 messages'")
    texts = "[...document.querySelectorAll('.row, .inbox')].map((node) => node.textContent)"
    page.wait(f"{texts}.some((text) => text.includes('1 unread of 2'))")
    page.wait(f"{texts}.slice(-2).map((text) => /^unread/.test(text)).join() === 'true,false'")
    page.press("m")
    page.wait("document.title === '(2) mailtest'")
    page.wait("fetch('healthz').then((answer) => answer.json()).then(({unseen}) => unseen === 2)")


def test_page_shows_sessions_and_scripted_failures(page, catcher):
    inbox = catcher.acquire("rcpt:451")
    with smtplib.SMTP("127.0.0.1", catcher.smtp_port) as client:
        client.docmd("MAIL FROM:<a@b.example> SIZE=99000000")
        client.docmd("RCPT TO:<c@d.example>")
    strip = "document.querySelector('[data-testid=refused]:not([hidden])').innerText"
    page.wait(f"/refused: 5[05]/.test({strip})")
    page.click("[data-testid=refused] a")
    page.click("[data-testid=session] summary")
    page.wait("document.querySelector('[data-testid=session]').innerText.includes('RCPT TO')")
    send(catcher, a_mail())                          # then the last one is a good one
    page.wait("document.querySelector('[data-testid=refused]').hidden")
    page.click(f"[data-testid=inbox][title='{inbox.address}']")
    page.click("[data-testid=menu] summary")
    assert "rcpt:451" in page.wait("document.querySelector('[data-testid=menu] p + p').innerText")
    assert page.js("document.querySelector('[data-testid=menu] p + p').innerText").endswith(
        "answered 0 times, 1 left")


VISIBLE_CONTRASTS = """(() => {
    const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const rgb = (color) => { context.clearRect(0, 0, 1, 1); context.fillStyle = color;
        context.fillRect(0, 0, 1, 1); return context.getImageData(0, 0, 1, 1).data };
    const light = (color) => { const [r, g, b] = [...rgb(color)].map((value) => value <= 10 ?
        value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05 };
    const behind = (node) => { while (rgb(getComputedStyle(node).backgroundColor)[3] < 255)
        node = node.parentElement; return getComputedStyle(node).backgroundColor };
    return [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility()
        && !node.querySelector(":disabled") && [...node.childNodes].some((each) =>
        each.nodeType === 3 && each.textContent.trim())).map((node) => {
            const pair = [light(getComputedStyle(node).color), light(behind(node))];
            return [Math.max(...pair) / Math.min(...pair), node.outerHTML.slice(0, 90)];
        }).filter(([ratio]) => ratio < 4.5) })()"""


@pytest.mark.parametrize("dark", (False, True), ids=("light", "dark"))
def test_page_has_contrast_in_both_themes(page, catcher, dark):
    page.size(1400, 900, dark)
    page.wait(f"document.documentElement.style.colorScheme === '{'dark' if dark else 'light'}'")
    assert page.js(VISIBLE_CONTRASTS) == []
    send(catcher, a_mail("Your code", "Your code is 482913", html="<a href='//x'>y</a>"))
    opened(page, "Your code")
    for tab in "23456781":
        page.press(tab)
        assert page.js(VISIBLE_CONTRASTS) == []
    page.click("#theme")
    page.wait(f"document.documentElement.style.colorScheme === '{'light' if dark else 'dark'}'")


@pytest.mark.parametrize("width", (320, 390, 700, 1100))
def test_page_needs_no_sideways_scrolling(page, catcher, width):
    send(catcher, a_mail("A subject that does not end " * 9, "x" * 300, html="<p>x", sender=(
        "Somebody With A Long Name <with.a.very.long.local.part@a.very.long.domain.example>")))
    page_rows(page, 1)
    overflow = "document.documentElement.scrollWidth - innerWidth"
    page.size(width, 800)
    page.wait(f"innerWidth === {width}")
    assert page.js(overflow) <= 0
    page.click("[data-testid=message-row]")
    page.wait(PANEL)
    for key in "12345678":
        page.press(key)
        assert page.js(overflow) <= 0
        assert page.js("((node) => node.scrollWidth - node.clientWidth)"
                       "(document.getElementById('message'))") <= 0
    if width < 700:                                  # one column, a way back, and help
        assert not page.js("document.getElementById('list').checkVisibility()")
        page.js("history.back()")
        page.wait("document.getElementById('list').checkVisibility()")
        page.click("#help")
        page.wait("document.querySelector('[data-testid=empty]').checkVisibility()")
        assert page.js(overflow) <= 0
        page.click(".back")
        page.wait("document.getElementById('list').checkVisibility()")


def test_page_runs_nothing_that_comes_in_a_mail(page, catcher):
    evil = "<script>top.pwned=1</script><img src=x onerror=top.pwned=1>"
    mail = a_mail(evil, evil + " javascript:top.pwned=1", html=evil + (
        '<a href="javascript:top.pwned=1">x</a><svg onload="top.pwned=1"></svg>'
        '<iframe src="javascript:top.pwned=1"></iframe><base href="//elsewhere.example">'
        '<meta http-equiv="refresh" content="0;url=https://elsewhere.example/">'
        '<link rel="stylesheet" href="https://elsewhere.example/x.css">'))
    mail.replace_header("From", f'"{evil}" <a@b.example>')
    mail["X-Evil"] = mail["Reply-To"] = mail["List-Unsubscribe"] = evil
    mail.add_attachment(evil.encode(), "text", "html", filename=evil + ".html")
    mail.add_attachment(b'<svg xmlns="http://www.w3.org/2000/svg" onload="top.pwned=1"/>', "image",
                        "svg+xml", filename="evil.svg")
    send(catcher, mail)
    page_rows(page, 1)
    page.press("j")
    page.wait(f"{TITLE}.includes('<script>')")
    page.wait("document.querySelectorAll('[data-testid=attachment]').length === 2")
    for tab in "23456781":
        page.press(tab)
        page.wait(f"{PANEL}")
    page.until(lambda: any("/preview" in url for url in page.requests()))
    page.wait("new Promise((done) => setTimeout(done, 100, true))")    # what would run runs now
    assert page.js("window.pwned") is None
    assert page.js("document.querySelectorAll('[onerror], [onload], script:not([src]), "
                   "a[href^=javascript]').length") == 0
    assert page.js(TITLE) == evil


def test_page_follows_again_when_the_catcher_restarts(chromium):
    first = mailtest.Mailtest().start()
    chromium.size(1400, 900)
    chromium.goto(first.url + "/")
    chromium.wait(LIVE)
    send(first, a_mail("Before"))
    page_rows(chromium, 1)
    first.stop()
    chromium.wait("document.querySelector('[data-testid=status]').textContent === 'reconnecting'")
    with mailtest.Mailtest(http_port=first.http_port) as second:
        send(second, a_mail("After"))
        chromium.wait(LIVE)
        chromium.wait(f"{SUBJECTS}.join() === 'After'")
        send(second, a_mail("And live"))
        chromium.wait(f"{SUBJECTS}.join() === 'And live,After'")


def test_page_holds_no_connection_while_it_is_hidden(page, catcher):
    hide = ("Object.defineProperty(document, 'hidden', {value: %s, configurable: true}); "
            "document.dispatchEvent(new Event('visibilitychange'))")
    page.js(hide % "true")
    page.wait("source === null")
    send(catcher, a_mail("Meanwhile"))
    page.js(hide % "false")
    page.wait(LIVE)
    page_rows(page, 1)
    assert len([url for url in page.requests() if "/v1/events" in url]) == 2


def test_page_lists_ten_thousand_messages_in_a_window(chromium):
    with mailtest.Mailtest() as server:
        deliver(server, 10_000)
        chromium.size(1400, 900)
        chromium.goto(server.url + "/")
        chromium.wait(f"{LIVE} && {ROWS}.length === 100")
        chromium.wait("document.querySelectorAll('[data-testid=inbox]').length === 101")
        began = time.monotonic()
        send(server, a_mail("The newest"))
        chromium.wait(f"{SUBJECTS}[0] === 'The newest'")
        assert time.monotonic() - began < 2
        chromium.js("document.getElementById('rows').scrollTop = 1e9")
        page_rows(chromium, 200)                     # more, when the end comes into sight
        assert chromium.js("document.querySelectorAll('*').length") < 9000


def test_page_in_hosted_mode_shows_what_this_browser_acquired(chromium):
    limits = mailtest.Limits(max_size=200_000, rate=10)
    with mailtest.Mailtest(strict=True, limits=limits,
                           policy=mailtest.ApiPolicy(hosted=True)) as server:
        chromium.size(1400, 900)
        chromium.goto(server.url + "/")
        manual = chromium.wait("document.querySelector('[data-testid=empty]').innerText")
        for part in ("10 requests a minute", "200 kB", "10 min", server.url + "/v1/acquire",
                     str(server.smtp_port)):
            assert part in manual
        addresses = []
        for _ in range(8):                           # more than a browser has connections
            chromium.click("[data-testid=acquire]")
            addresses.append(chromium.wait(
                f"!{json.dumps(addresses)}.includes({ADDRESS}) && {ADDRESS}.includes('@') "
                f"&& {ADDRESS}"))
        chromium.wait(LIVE)
        send(server, *(a_mail(f"Hosted {address}", "Your code is 482913", address, html="<p>x")
                       for address in addresses))
        page_rows(chromium, 1)
        chromium.click("[data-testid=inbox]")
        page_rows(chromium, 8)
        typed(chromium, "subject:" + addresses[0])   # the search words are those of the API
        page_rows(chromium, 1)
        chromium.press("Escape")
        page_rows(chromium, 8)
        chromium.press("j")
        chromium.wait("document.querySelector('[data-testid=preview-frame]')")
        while chromium.js("fetch('v1/acquire').then(({ok}) => ok)"):
            pass                                     # until the limit of this minute is reached
        chromium.goto(chromium.js("location.href"))  # what is known stays known
        assert "482913" in page_rows(chromium, 8)[0]
        chromium.wait(f"{TITLE}.includes('Hosted')")
        chromium.click("[data-testid=acquire]")
        chromium.wait("document.getElementById('toast').innerText.includes('Too many requests')")


def test_page_says_that_the_login_was_cancelled(chromium):
    with mailtest.Mailtest(policy=mailtest.ApiPolicy(api_key="key")) as server:
        send(server, a_mail("Secret"))
        for answer, seen in (("CancelAuth", "signed-out"), ("ProvideCredentials", "message-row")):
            chromium.login = {"response": answer, "username": "", "password": "key"}
            chromium("Fetch.enable", handleAuthRequests=True)
            chromium.goto(server.url + "/")
            chromium.wait(f"document.querySelector('[data-testid={seen}]')")
            asked = [event for event in chromium.events
                     if event.get("method") == "Fetch.authRequired"]
            assert len(asked) == 1
            assert "No mail yet" not in chromium.js(NOTHING)
            chromium("Fetch.disable")


class SubPath(socketserver.StreamRequestHandler):
    """A proxy that has the catcher under /mail/."""

    def handle(self):
        line, head = self.rfile.readline(), b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.rfile.readline()
        method, path, version = line.split()
        if not path.startswith(b"/mail/"):
            self.server.strays.append(path)
            self.wfile.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        with socket.create_connection(("127.0.0.1", self.server.port)) as catcher:
            head = re.sub(rb"(?im)^(connection|host):.*\r\n", b"", head)
            catcher.sendall(b"%b %b %b\r\nConnection: close\r\nHost: catcher.internal:1\r\n%b" % (
                method, path[5:], version, head))
            length = re.search(rb"(?i)content-length: (\d+)", head)
            catcher.sendall(self.rfile.read(int(length.group(1)) if length else 0))
            for octets in iter(lambda: catcher.recv(65536), b""):
                self.wfile.write(octets)


def test_page_works_under_a_sub_path(chromium):
    policy = mailtest.ApiPolicy(allow_hosts=("catcher.internal",))
    with mailtest.Mailtest(policy=policy) as server, socketserver.ThreadingTCPServer(
            ("127.0.0.1", 0), SubPath) as proxy:
        proxy.port, proxy.strays, proxy.daemon_threads = server.http_port, [], True
        proxy.block_on_close = False
        threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
        url = "http://127.0.0.1:%d/mail/" % proxy.server_address[1]
        chromium.goto(url)
        chromium.wait(LIVE)
        assert url + "v1/acquire" in chromium.js("document.querySelector('pre').innerText")
        chromium.click("[data-testid=sample]")       # a change, though the proxy rewrites Host
        page_rows(chromium, 1)
        chromium.click("[data-testid=message-row]")
        chromium.wait("document.querySelector('[data-testid=preview-frame]')")
        chromium.press("Delete")
        page_rows(chromium, 0)
        chromium.goto("about:blank")
        proxy.shutdown()
        assert proxy.strays == []


# ---- Source ----------------------------------------------------------------

SOURCE = pathlib.Path(mailtest.__file__).read_text(encoding="utf-8")
README = pathlib.Path(mailtest.__file__).with_name("README.md")


@functools.lru_cache(maxsize=None)
def sections():
    """(name, number of its first line) of each section in order, after what stands before."""
    banners = re.finditer(r"^# ---- (.+?) -+$", SOURCE, re.M)
    return [("", 1)] + [(match.group(1), SOURCE.count("\n", 0, match.start()) + 1)
                        for match in banners]


def section_of(line):
    """The number of the section that a line is in."""
    return max(number for number, (_, first) in enumerate(sections()) if first <= line)


@functools.lru_cache(maxsize=None)
def tree():
    return ast.parse(SOURCE)


def module_lines():
    """{name: number of the line that binds it}."""
    lines = {}
    for node in tree().body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines[node.name] = node.lineno
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in ast.walk(node):
                if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                    lines.setdefault(target.id, node.lineno)
    return lines


def module_names():
    """{name: number of the section that binds it}."""
    return {name: section_of(line) for name, line in module_lines().items()}


def within(scope):
    """The nodes of a module, class or function, without those of functions and classes in it."""
    for node in ast.iter_child_nodes(scope):
        yield node
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.Lambda)):
            yield from within(node)


def bound_names(nodes):
    """The names that these nodes of a function or class make its own."""
    for node in nodes:
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.ExceptHandler)):
            yield node.name
        elif isinstance(node, ast.alias):
            yield node.asname or node.name.partition(".")[0]


def global_uses(scope, enclosing=frozenset()):
    """(name, line of the scope) of each name that the functions and classes in a scope use and
    do not bind.  Not by `symtable`: PyPy has none, and Python 3.14 adds scopes of annotations."""
    nodes = list(within(scope))
    own = set(bound_names(nodes))
    for node in nodes:
        if isinstance(node, ast.Global):
            own.difference_update(node.names)
    if not isinstance(scope, ast.Module):
        used = {node.id for node in nodes
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        yield from ((name, scope.lineno) for name in used - own - enclosing)
        if not isinstance(scope, ast.ClassDef):      # whose names its methods do not see
            enclosing = enclosing | own
    for node in nodes:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.Lambda)):
            yield from global_uses(node, enclosing)


@functools.lru_cache(maxsize=None)
def all_uses():
    return list(global_uses(tree()))


def annotated_names():
    """(name, line) of each name in an annotation that is a string."""
    for node in ast.walk(tree()):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
                for name in ast.walk(ast.parse(annotation.value, mode="eval")):
                    if isinstance(name, ast.Name):
                        yield name.id, node.lineno


def test_sections_are_those_that_the_docstring_announces():
    announced = re.findall(r"^    ([A-Z][\w ]*?)  +\S", mailtest.__doc__.partition(
        "The sections, ")[2], re.M)
    assert [name for name, _ in sections()[1:]] == announced


def test_docstring_names_steps_that_exist():
    flow = mailtest.__doc__.partition("The way of a mail")[2].partition("(PYTEST")[0]
    steps = re.findall(r"^    ([A-Z]\w+\.\w+|[a-z]+)  ", flow, re.M)
    steps += re.findall(r"\b([A-Z]\w+\.\w+|[A-Z]{2,}S)\b", flow)
    assert len(steps) > 12
    for step in steps:
        operator.attrgetter(step)(mailtest)


def test_banners_have_one_width():
    banners = re.findall(r"^# ---- .+$", SOURCE, re.M)
    assert {len(banner) for banner in banners} == {78}


def test_sections_only_look_up():
    names = module_names()
    assert len(all_uses()) > 500         # the walk has seen something
    assert [(sections()[section_of(line)][0], name)
            for name, line in all_uses() + list(annotated_names())
            if names.get(name, 0) > section_of(line)] == []


def test_functions_only_look_up():
    lines = module_lines()
    assert sorted(name for name, line in all_uses() if lines.get(name, 0) > line) == [
        "openapi"]                       # it describes ROUTES, which lead to its own handler too


def test_smtp_and_http_do_not_know_each_other():
    names = module_names()
    kinds = {number: name.split()[0] for number, (name, _) in enumerate(sections()) if name}
    foreign = {("SMTP", "HTTP"), ("HTTP", "SMTP")}
    assert [(sections()[section_of(line)][0], name)
            for name, line in all_uses()
            if (kinds.get(section_of(line)), kinds.get(names.get(name))) in foreign] == []


def imported_modules():
    """The modules that are imported anywhere in the file."""
    for node in ast.walk(tree()):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            yield node.module


def _is_standard(module):
    if hasattr(sys, "stdlib_module_names"):          # Python 3.10
        return module in sys.stdlib_module_names
    if module in sys.builtin_module_names:
        return True
    origin = os.path.realpath(importlib.util.find_spec(module).origin)
    return origin.startswith(os.path.realpath(sys.base_prefix)) and "site-packages" not in origin


def test_only_the_standard_library_is_imported():
    modules = {name.partition(".")[0] for name in imported_modules()}
    assert len(modules) > 20
    assert [name for name in sorted(modules) if not _is_standard(name)] == []


def test_nothing_private_of_the_standard_library_is_used():
    modules = {name.partition(".")[0] for name in imported_modules()}
    private = re.compile(r"_(?!_\w+__$)")
    assert [f"{node.value.id}.{node.attr}" for node in ast.walk(tree())
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            and node.value.id in modules and private.match(node.attr)] == [
                ]
    assert [name for name in imported_modules() if re.search(r"(^|\.)_", name)] == []


def takes_the_lock(node):
    return isinstance(node, ast.With) and [
        getattr(item.context_expr, "id", "") for item in node.items] == ["self"]


def outside_the_lock(node):
    """The nodes below that no `with self:` encloses."""
    if not takes_the_lock(node):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from outside_the_lock(child)


def test_store_methods_take_the_lock_before_they_touch_state():
    """Only what is no state may stand before `with self:`, since parsing belongs there."""
    store, = (node for node in tree().body
              if isinstance(node, ast.ClassDef) and node.name == "Store")
    own = {node.name for node in store.body if isinstance(node, ast.FunctionDef)}
    seen, unlocked = 0, []
    for method in store.body:
        if not isinstance(method, ast.FunctionDef) or method.name.startswith("_"):
            continue
        seen += 1
        touched = [node.attr for node in outside_the_lock(method)
                   if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
                   and node.value.id == "self" and node.attr.startswith("_")
                   and node.attr not in own]
        if touched or not any(map(takes_the_lock, ast.walk(method))):
            unlocked.append((method.name, touched))
    assert seen > 25
    assert unlocked == []


def test_no_line_is_over_99_columns():
    assert [(number, len(line)) for number, line in enumerate(SOURCE.splitlines(), 1)
            if len(line) > 99] == []


def test_functions_are_short():
    lengths = sorted((node.end_lineno - node.lineno + 1, node.name) for node in ast.walk(tree())
                     if isinstance(node, ast.FunctionDef))
    assert lengths[len(lengths) // 2][0] <= 8
    assert [each for each in lengths if each[0] > 50] == []


def test_only_the_command_line_prints():
    uses = [token.start[0] for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline)
            if token.type == tokenize.NAME and token.string == "print"]
    assert uses
    assert {sections()[section_of(line)][0] for line in uses} == {"Command line"}


def test_only_the_command_line_reads_arguments_and_environment():
    uses = [(node.lineno, node.attr) for node in ast.walk(tree())
            if isinstance(node, ast.Attribute) and node.attr in ("argv", "environ", "getenv")]
    assert {attribute for _, attribute in uses} == {"argv", "environ"}
    assert {sections()[section_of(line)][0] for line, _ in uses} == {"Command line"}


def test_all_names_what_there_is():
    assert [name for name in mailtest.__all__ if not hasattr(mailtest, name)] == []


def test_readme_lists_the_parameters():
    paragraph = README.read_text(encoding="utf-8").partition("\nParameters of queries, ")[2]
    paragraph = paragraph.partition("\n\n")[2].partition(".\n\n")[0].replace("\n", " ")
    listed = re.findall(r"`(\w+)` (.*?)(?:; (?=`)|$)", paragraph)
    declared = mailtest.declare(mailtest.Limits()).values()
    assert listed == list(dict.fromkeys((each.name, each.text) for each in declared))


def test_readme_lists_the_routes():
    rows = re.findall(r"^\| `([A-Z]+)` \| (`/.*`) \| (.*) \|$", README.read_text(encoding="utf-8"),
                      re.M)
    assert [(method, path) for method, paths, _ in rows
            for path in re.findall("`(.+?)`", paths)] == [
        (route.method, route.path) for route in mailtest.ROUTES]


def test_readme_lists_the_options(program):
    readme = README.read_text(encoding="utf-8")
    block = re.search(r"^## Options$.*?^```text\n(.*?)^```$", readme, re.M | re.S)
    groups = help_text(program).partition("\nwhere to listen:\n")
    assert block.group(1) == (groups[1].lstrip() + groups[2]).rpartition("\n\n")[0] + "\n"


def recipe(heading, language):
    """The first code block of a language under a heading of the README."""
    section = README.read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    return re.search(rf"^```{language}\n(.*?)^```$", section, re.M | re.S).group(1)


def test_readme_recipe_for_pytest(tmp_path):
    output = run_project(tmp_path, 'pytest_plugins = ["mailtest"]\n',
                         {"test_welcome": recipe("### pytest", "python")})
    assert re.search(r"^=+ 1 passed in ", output, re.M), output


def test_readme_recipe_for_plain_python(capsys):
    exec(recipe("### Plain Python", "python"), {})
    assert capsys.readouterr().out.count("refused: ") == 2


def run_recipe(command, script, server, **environment):
    """What a script of the README prints, played on a server."""
    script = script.replace("http://127.0.0.1:8080", server.url).replace(
        "python mailtest.py", f'"{sys.executable}" "{mailtest.__file__}"')
    run = subprocess.run(command + [script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         env=dict(os.environ, MAILTEST_SMTP=server.smtp, **environment),
                         timeout=30, check=False)
    return run.stdout.decode()


@pytest.mark.skipif(not shutil.which("curl") or not shutil.which("sh"), reason="no curl, no sh")
def test_readme_recipe_for_the_shell(running):
    output = run_recipe(["sh", "-c"], recipe("## A shell script", "sh"), running)
    assert json.loads(output)["messages"][0]["subject"] == "testmail"


def has_nodemailer():
    """Whether Node finds nodemailer, from here or by NODE_PATH."""
    return shutil.which("node") and not subprocess.run(
        ["node", "-e", "require('nodemailer')"], stderr=subprocess.DEVNULL, check=False).returncode


def test_readme_recipe_for_node(running):
    if not has_nodemailer():
        pytest.skip("no Node with nodemailer")
    output = run_recipe(["node", "-e"], recipe("### Node, or anything that speaks HTTP", "js"),
                        running)
    assert output == "[ { value: '482913' } ]\n"


def test_readme_begins_its_changes_with_this_version():
    changes = README.read_text(encoding="utf-8").partition("\n## Changes\n")[2].lstrip("\n")
    assert changes.partition("\n")[0] == f"### {mailtest.__version__}"


# ---- Speed -----------------------------------------------------------------
# Not a test: `python test_mailtest.py` prints a table in less than a minute.

LINE = b"The quick brown fox jumps over the lazy dog, https://bench.example/a\r\n"


def send_for(port, seconds, size, connections, kept, sent):
    """Sends mail of about `size` octets for some seconds; puts the number sent."""
    head = b"From: a@bench.example\r\nTo: b@bench.example\r\nSubject: bench\r\n\r\n"
    data = head + LINE * max(1, (size - len(head)) // len(LINE)) + b".\r\n"
    steps = (b"MAIL FROM:<a@bench.example>\r\n", b"RCPT TO:<b@bench.example>\r\n", b"DATA\r\n",
             data)
    until, count, clients = time.perf_counter() + seconds, 0, []
    while time.perf_counter() < until:
        if not clients:
            clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]
            for client in clients:
                client.recv(999)
                client.sendall(b"EHLO bench\r\n")
                client.recv(999)
        for step in steps:
            for client in clients:
                client.sendall(step)
            for client in clients:
                assert client.recv(999)[:1] in b"23"
        count += connections
        if not kept:
            for client in clients:
                client.sendall(b"QUIT\r\n")
                client.recv(999)
                client.close()
            clients = []
    sent.put(count)


def mails_a_second(port, size, connections, kept, seconds=1.5):
    """How many mails a second a process of its own can hand over."""
    sent = multiprocessing.Queue()
    sender = multiprocessing.Process(target=send_for,
                                     args=(port, seconds, size, connections, kept, sent))
    sender.start()
    count = sent.get()
    sender.join()
    return count / seconds


def health(http_port):
    """What /healthz says."""
    with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/healthz") as answer:
        return json.load(answer)


def started():
    """(process, SMTP port, HTTP port, milliseconds until both answered)."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, mailtest.__file__, "--smtp", "0", "--http", "0", "--max-memory", "2G"],
        stdout=subprocess.PIPE)
    ready = json.loads(process.stdout.readline())
    took = (time.perf_counter() - began) * 1e3
    return (process, int(ready["smtp"].rpartition(":")[2]),
            int(ready["http"].rpartition(":")[2]), took)


def benchmark():
    """Prints the table."""
    starts = []
    for _ in range(5):
        process, smtp_port, http_port, took = started()
        starts.append(took)
        process.terminate()
        process.wait()
    print(f"mailtest {mailtest.__version__}, Python {sys.version.split()[0]}, "
          f"{os.cpu_count()} processors\n")
    print(f"| {'what':44} | {'figure':>18} |\n|{'-' * 46}|{'-' * 20}|")

    def row(what, figure):
        print(f"| {what:44} | {figure:>18} |", flush=True)
    row("start until both ports answer, median", f"{statistics.median(starts):.0f} ms")
    for size, connections, kept in ((1_000, 1, True), (1_000, 10, True), (1_000, 1, False),
                                    (1_000, 10, False), (100_000, 1, True), (1_000_000, 10, True)):
        process, smtp_port, http_port, _ = started()
        rate = mails_a_second(smtp_port, size, connections, kept)
        what = f"mails of {size // 1000} kB, {connections} connection{'s' * (connections > 1)}"
        row(f"{what}, {'kept' if kept else 'one a mail'}", f"{rate:,.0f} /s")
        process.terminate()
        process.wait()
    process, smtp_port, http_port, _ = started()
    mails_a_second(smtp_port, 1_000, 10, True, 1.0)
    stored = health(http_port)["messages"]
    began = time.perf_counter()
    with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/api/messages") as answer:
        answer.read()
    row(f"first list of 50 of {stored:,} mails", f"{(time.perf_counter() - began) * 1e3:.0f} ms")
    process.terminate()
    process.wait()


if __name__ == "__main__":
    benchmark()
